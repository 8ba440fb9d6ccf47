//! Start in order, wait until the mesh serves, stop in order.

use std::net::{SocketAddr, TcpListener};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_core::Slot;
use mesh_proto::v1::StatusRequest;
use mesh_proto::v1::mesh_client::MeshClient;
use mesh_transport::LocalHub;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::config::LocalMeshConfig;
use crate::error::{LocalMeshError, NodeError};
use crate::thread::{self, EVENTS_PER_NODE, Event, Start, Teller};

/// How often the router is asked whether the mesh serves.
const SERVING_POLL: Duration = Duration::from_millis(20);

/// Groups of nodes, in the order in which they stop: who takes requests first, who is needed by the others last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    Attention,
    Expert,
    Router,
}

impl Group {
    const IN_STOP_ORDER: [Group; 3] = [Group::Attention, Group::Expert, Group::Router];

    fn name(self) -> &'static str {
        match self {
            Group::Attention => "attention",
            Group::Expert => "expert",
            Group::Router => "router",
        }
    }
}

/// A node of a mesh that serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// `router`, `attention` or `expert`.
    pub role: &'static str,
    /// `router`, `attention-0`, `expert-3`.
    pub id: String,
    /// Where it listens.
    pub addr: String,
}

/// A node that ended while the mesh served.
#[derive(Debug)]
pub struct NodeEnd {
    /// Which.
    pub id: String,
    /// Whether it was the router, without which nothing goes on.
    pub is_router: bool,
    /// Why, unless it stopped in good order.
    pub error: Option<NodeError>,
}

struct Node {
    group: Group,
    id: String,
    addr: Option<String>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// A mesh that serves. Dropped, its nodes are told to stop and not waited for.
pub struct LocalMesh {
    nodes: Vec<Node>,
    events: mpsc::Receiver<Event>,
    grpc: SocketAddr,
    stop_max: Duration,
}

impl LocalMesh {
    /// Starts every node and waits until the mesh serves. On an error every node is told to stop.
    ///
    /// # Errors
    /// [`LocalMeshError`].
    pub async fn start(config: LocalMeshConfig) -> Result<Self, LocalMeshError> {
        let LocalMeshConfig { attention, experts, start_max, .. } = config;
        if attention == 0 || experts == 0 {
            return Err(LocalMeshError::NoNodes { attention, experts });
        }
        let started = Instant::now();
        let mut mesh = Self::spawn(config)?;
        let deadline = started + start_max;
        let up = async {
            while mesh.nodes.iter().any(|n| n.addr.is_none()) {
                mesh.take_event().await?;
            }
            mesh.serves().await
        };
        match timeout_at(deadline, up).await {
            Ok(up) => up.map(|()| mesh),
            Err(_) => Err(LocalMeshError::StartTimeout { waited: started.elapsed(), missing: mesh.missing() }),
        }
    }

    fn spawn(config: LocalMeshConfig) -> Result<Self, LocalMeshError> {
        let refused = |source| LocalMeshError::Listen { addr: config.grpc, source };
        let listener = TcpListener::bind(config.grpc).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        let grpc = listener.local_addr().map_err(refused)?;

        let mut starts =
            vec![(Group::Router, Group::Router.name().to_owned(), Start::Router(Box::new(config.router), listener))];
        let (router, hub) = (format!("http://{grpc}"), LocalHub::new());
        for slot in 0..config.experts {
            let mut node = config.expert_node.clone();
            (node.router, node.hub, node.slot) = (router.clone(), Some(hub.clone()), Some(Slot(slot)));
            node.bind_from = config.bind.then_some(slot.into());
            node.name = format!("{}-{slot}", Group::Expert.name());
            starts.push((Group::Expert, node.name.clone(), Start::Expert(Box::new(node))));
        }
        for slot in 0..config.attention {
            let mut node = config.attention_node.clone();
            (node.router, node.hub, node.slot) = (router.clone(), Some(hub.clone()), Some(Slot(slot)));
            node.bind_from = config.bind.then_some(slot.into());
            node.name = format!("{}-{slot}", Group::Attention.name());
            starts.push((Group::Attention, node.name.clone(), Start::Attention(Box::new(node))));
        }

        let (tell, events) = mpsc::channel(starts.len() * EVENTS_PER_NODE);
        let mut mesh = Self { nodes: Vec::new(), events, grpc, stop_max: config.stop_max };
        for (i, (group, id, start)) in starts.into_iter().enumerate() {
            let stop = CancellationToken::new();
            let spawned = thread::spawn(&id, start, Teller { node: i, events: tell.clone() }, stop.clone());
            let thread = spawned.map_err(|source| LocalMeshError::Thread { node: id.clone(), source })?;
            mesh.nodes.push(Node { group, id, addr: None, stop, thread: Some(thread) });
        }
        Ok(mesh)
    }

    /// Takes one event of a mesh that is starting: a node that ended is an error.
    async fn take_event(&mut self) -> Result<(), LocalMeshError> {
        match self.events.recv().await {
            Some(Event::Ready { node, addr }) => {
                self.nodes[node].addr = Some(addr);
                Ok(())
            }
            Some(Event::Ended { node, result }) => {
                let id = self.ended(node);
                Err(match result {
                    Ok(()) => LocalMeshError::Stopped { node: id },
                    Err(error) => LocalMeshError::Node { node: id, error: Box::new(error) },
                })
            }
            // All threads are gone and told of: nothing is left to wait for.
            None => Err(LocalMeshError::Stopped { node: "every node".into() }),
        }
    }

    /// Joins a thread that has said its last.
    fn ended(&mut self, node: usize) -> String {
        if let Some(thread) = self.nodes[node].thread.take() {
            // A panic was caught and told of within the thread.
            let _told = thread.join();
        }
        self.nodes[node].id.clone()
    }

    async fn serves(&mut self) -> Result<(), LocalMeshError> {
        let uri = format!("http://{}", self.grpc);
        let endpoint = Endpoint::from_shared(uri).expect("a socket address makes an address");
        let mut client = MeshClient::new(endpoint.connect_lazy());
        let poll = async {
            // A router that does not answer yet, or no more, is the deadline's and the events' matter.
            while !client.status(StatusRequest {}).await.is_ok_and(|s| s.into_inner().serving) {
                sleep(SERVING_POLL).await;
            }
        };
        tokio::select! {
            () = poll => Ok(()),
            Err(error) = self.take_event() => Err(error),
        }
    }

    fn missing(&self) -> String {
        let missing: Vec<&str> = self.nodes.iter().filter(|n| n.addr.is_none()).map(|n| n.id.as_str()).collect();
        if missing.is_empty() { "the first view".into() } else { missing.join(", ") }
    }

    /// Where clients connect.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc
    }

    /// Every node: the router, attention nodes, expert nodes.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        let of = |group: Group| self.nodes.iter().filter(move |n| n.group == group);
        let all = of(Group::Router).chain(of(Group::Attention)).chain(of(Group::Expert));
        all.map(|n| NodeInfo { role: n.group.name(), id: n.id.clone(), addr: n.addr.clone().unwrap_or_default() })
            .collect()
    }

    /// Waits until a node ends; the mesh goes on without it as far as it can.
    pub async fn next_end(&mut self) -> NodeEnd {
        loop {
            match self.events.recv().await {
                Some(Event::Ended { node, result }) => {
                    let is_router = self.nodes[node].group == Group::Router;
                    return NodeEnd { id: self.ended(node), is_router, error: result.err() };
                }
                Some(Event::Ready { .. }) => {}
                // Every node has ended and been told of.
                None => std::future::pending().await,
            }
        }
    }

    /// Stops every node: attention nodes, then expert nodes, then the router. Returns those that did not stop in time and
    /// are left behind.
    pub async fn stop(mut self) -> Vec<String> {
        let mut left_behind = Vec::new();
        for group in Group::IN_STOP_ORDER {
            self.nodes.iter().filter(|n| n.group == group).for_each(|n| n.stop.cancel());
            let deadline = Instant::now() + self.stop_max;
            while self.nodes.iter().any(|n| n.group == group && n.thread.is_some()) {
                let Ok(end) = timeout_at(deadline, self.next_end()).await else { break };
                if let Some(error) = end.error {
                    tracing::warn!(node = %end.id, %error, "a node stopped with an error");
                }
            }
            left_behind
                .extend(self.nodes.iter().filter(|n| n.group == group && n.thread.is_some()).map(|n| n.id.clone()));
        }
        left_behind
    }
}

impl Drop for LocalMesh {
    fn drop(&mut self) {
        self.nodes.iter().for_each(|n| n.stop.cancel());
    }
}
