//! The control plane at work: the state machine behind a lock, the sessions it speaks through, and its one timer.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::{NodeId, Role};
use mesh_proto::limits::MESSAGE_BYTES_MAX;
use mesh_proto::v1::attention_client::AttentionClient;
use mesh_proto::v1::router_message::Message;
use mesh_proto::{Code, MeshError, v1};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::choice;
use crate::config::{RouterConfig, RouterError};
use crate::membership::Registration;
use crate::mesh::{Action, Event, Mesh, Order};

/// Messages to a node that may wait for it to read. A view change sends three; a node that lets this many pile up is
/// lost.
pub const SESSION_QUEUE: usize = 16;
/// How long a channel to an attention node may be idle before it is asked for a sign of life, and how long that may take.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Bytes of one request that may be under way from its attention node. All requests share a connection, whose own window
/// has room for that much of each: a client that does not read holds up nobody else.
const STREAM_WINDOW: u32 = 256 << 10;
/// The largest window of a connection.
const CONNECTION_WINDOW_MAX: u32 = 1 << 30;

/// What a session sends to its node.
pub type Outbound = mpsc::Sender<Result<v1::RouterMessage, Status>>;

/// A node's connections.
#[derive(Debug)]
struct Link {
    out: Outbound,
    /// Cancelled when the node is a member no more: its session ends.
    closed: CancellationToken,
    /// The way to its service, of an attention node.
    attention: Option<Upstream>,
}

/// The way to an attention node.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// The node.
    pub node: NodeId,
    /// What the node is called in errors.
    pub label: String,
    /// Its service.
    pub client: AttentionClient<Channel>,
    /// Cancelled when the node is lost or hands over: its requests go on elsewhere.
    pub lost: CancellationToken,
}

/// A request counted at its attention node for as long as this lives.
#[derive(Debug)]
pub struct Routing {
    plane: Arc<Plane>,
    routed: choice::Routed,
}

impl Drop for Routing {
    fn drop(&mut self) {
        choice::ended(self.plane.lock().mesh.members_mut(), self.routed);
    }
}

#[derive(Debug)]
struct State {
    mesh: Mesh,
    links: BTreeMap<NodeId, Link>,
}

/// The control plane, shared by all services of the router.
#[derive(Debug)]
pub struct Plane {
    state: Mutex<State>,
    /// Told when a deadline may have come nearer.
    changed: Notify,
    serving: watch::Sender<bool>,
    secret: [u8; 32],
    connect_max: Duration,
    connection_window: u32,
    /// How often nodes send heartbeats, and how long they are trusted without.
    pace: (Duration, Duration),
}

fn random() -> Result<[u8; 32], getrandom::Error> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map(|()| bytes)
}

impl Plane {
    /// A mesh without nodes, with a new secret.
    ///
    /// # Errors
    /// [`RouterError::Random`].
    pub fn new(config: &RouterConfig) -> Result<Self, RouterError> {
        let secret = random().map_err(|e| RouterError::Random(e.to_string()))?;
        let state = State { mesh: Mesh::new(config.policy()), links: BTreeMap::new() };
        Ok(Self {
            state: Mutex::new(state),
            changed: Notify::new(),
            serving: watch::Sender::new(false),
            secret,
            connect_max: config.connect_max,
            // One more than there are requests, for what is not theirs.
            connection_window: STREAM_WINDOW.saturating_mul(config.requests_max as u32 + 1).min(CONNECTION_WINDOW_MAX),
            pace: (config.heartbeat, config.lease),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state machine leaves no step half done that a later one could trip over.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether requests are taken, to watch.
    pub fn serving(&self) -> watch::Receiver<bool> {
        self.serving.subscribe()
    }

    /// Reads the state.
    pub fn read<T>(&self, f: impl FnOnce(&Mesh) -> T) -> T {
        f(&self.lock().mesh)
    }

    /// Takes a node in.
    ///
    /// # Errors
    /// As [`crate::membership::Members::register`].
    pub fn register(&self, request: v1::RegisterRequest) -> Result<v1::RegisterResponse, MeshError> {
        let registration = Registration::try_from(request)?;
        if registration.role == Role::Attention {
            self.endpoint(&registration.addr)?;
        }
        let token = random().map_err(|e| MeshError::new(Code::Internal, format!("no random bytes: {e}")))?;
        let response = {
            let mut state = self.lock();
            let node = state.mesh.register(registration, token, Instant::now())?;
            tracing::info!(node = %node.id, label = node.label(), addr = node.registration.addr, "node registered");
            v1::RegisterResponse {
                node: node.id.0,
                slot: node.slot.0.into(),
                token: token.to_vec(),
                secret: self.secret.to_vec(),
                heartbeat_ms: self.pace.0.as_millis() as u32,
                lease_ms: self.pace.1.as_millis() as u32,
            }
        };
        self.changed.notify_one();
        Ok(response)
    }

    fn endpoint(&self, addr: &str) -> Result<Endpoint, MeshError> {
        let endpoint = Endpoint::from_shared(addr.to_owned()).map_err(|e| {
            MeshError::invalid("addr", format!("{addr:?} is no gRPC address ({e}); write http://HOST:PORT"))
        })?;
        Ok(endpoint
            .connect_timeout(self.connect_max)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(self.connection_window)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE))
    }

    /// Opens a node's session; the token is cancelled when it is to end.
    ///
    /// # Errors
    /// As [`crate::membership::Members::hello`].
    pub fn hello(&self, node: NodeId, token: &[u8], out: Outbound) -> Result<CancellationToken, MeshError> {
        let mut state = self.lock();
        let now = Instant::now();
        let actions = state.mesh.hello(node, token, now)?;
        let attention = self.upstream(&state.mesh, node)?;
        let closed = CancellationToken::new();
        state.links.insert(node, Link { out, closed: closed.clone(), attention });
        self.act(&mut state, actions, now);
        Ok(closed)
    }

    fn upstream(&self, mesh: &Mesh, node: NodeId) -> Result<Option<Upstream>, MeshError> {
        let attention = mesh.members().get(node).filter(|n| n.role() == Role::Attention);
        let Some(node) = attention else { return Ok(None) };
        let id = node.id;
        let channel = self.endpoint(&node.registration.addr)?.connect_lazy();
        let client = AttentionClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Some(Upstream { node: id, label: node.label(), client, lost: CancellationToken::new() }))
    }

    /// Takes an event in and does what follows from it.
    pub fn step(&self, event: Event) {
        let mut state = self.lock();
        let now = Instant::now();
        let actions = state.mesh.step(event, now);
        self.act(&mut state, actions, now);
    }

    fn act(&self, state: &mut State, actions: Vec<Action>, now: Instant) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                Action::Send(node, order) => {
                    let Some(link) = state.links.get(&node) else { continue };
                    if let Err(error) = link.out.try_send(Ok(wire(&order))) {
                        let why = format!("its session takes no message ({error}; {SESSION_QUEUE} may wait)");
                        actions.extend(state.mesh.step(Event::Lost(node, why), now));
                    }
                }
                Action::HandOver(node) => {
                    if let Some(upstream) = state.links.get(&node).and_then(|l| l.attention.as_ref()) {
                        upstream.lost.cancel();
                    }
                }
                Action::Gone { node, why, in_order, drained } => {
                    let Some(link) = state.links.remove(&node) else { continue };
                    dismiss(&link, why, drained);
                    if let Some(upstream) = link.attention.filter(|_| !in_order) {
                        upstream.lost.cancel();
                    }
                }
            }
        }
        let serving = state.mesh.is_serving();
        self.serving.send_if_modified(|was| std::mem::replace(was, serving) != serving);
        self.changed.notify_one();
    }

    /// Picks the attention node for a request that may need that many KV blocks; not `avoid`.
    ///
    /// # Errors
    /// [`Code::NotServing`].
    pub fn choose(self: &Arc<Self>, blocks: u64, avoid: Option<NodeId>) -> Result<(Upstream, Routing), MeshError> {
        let mut state = self.lock();
        if !state.mesh.is_serving() {
            return Err(state.mesh.why_not_serving());
        }
        let chosen = choice::choose(state.mesh.members_mut(), blocks, avoid);
        let upstream = chosen.and_then(|routed| Some((state.links.get(&routed.node)?.attention.clone()?, routed)));
        let (upstream, routed) = upstream.ok_or_else(|| state.mesh.why_not_serving())?;
        Ok((upstream, Routing { plane: Arc::clone(self), routed }))
    }

    /// Waits, bounded, until requests are taken. A mesh that does not come up is told by [`Plane::choose`].
    pub async fn wait_serving(&self, at_most: Duration) {
        let mut serving = self.serving();
        // Neither the time's end nor the sender's is an error here.
        let _ended = tokio::time::timeout(at_most, serving.wait_for(|serving| *serving)).await;
    }

    /// Begins to drain the node of that name, and gives its id and label.
    ///
    /// # Errors
    /// [`Code::InvalidRequest`] when there is no such node, or nobody who could take over from it.
    pub fn drain(&self, name: &str) -> Result<(NodeId, String), MeshError> {
        let mut state = self.lock();
        let node = state.mesh.members().named(name)?;
        let (id, label, role) = (node.id, node.label(), node.role());
        if !state.mesh.members().live(role).any(|n| n.id != id && !n.draining) {
            let what = format!("{label} is the last {role} node: nobody could take over; start another first");
            return Err(MeshError::invalid("node", what).at_node(label));
        }
        let now = Instant::now();
        let actions = state.mesh.step(Event::Draining(id, "asked for by an operator".into()), now);
        self.act(&mut state, actions, now);
        Ok((id, label))
    }

    /// Places experts anew by load and speed, or says what would move.
    ///
    /// # Errors
    /// As [`Mesh::rebalance`].
    pub fn rebalance(&self, dry_run: bool) -> Result<v1::RebalanceResponse, MeshError> {
        let mut state = self.lock();
        let now = Instant::now();
        let (told, actions) = state.mesh.rebalance(dry_run, now)?;
        self.act(&mut state, actions, now);
        Ok(told)
    }

    /// Tells every node that the router goes, and ends the sessions. Nothing is served from here on.
    pub fn close(&self, why: &str) {
        let mut state = self.lock();
        let actions = state.mesh.close(why);
        self.act(&mut state, actions, Instant::now());
    }

    /// Lets time pass, until the task is dropped. Sleeps from deadline to deadline: an idle mesh costs nothing.
    pub async fn keep_time(&self) {
        loop {
            let due = self.read(Mesh::due);
            let pause = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = pause => self.step(Event::Tick),
                () = self.changed.notified() => {}
            }
        }
    }
}

fn dismiss(link: &Link, why: String, drained: bool) {
    let message = Message::Dismissed(v1::Dismissed { why, drained });
    // A full queue or a closed session: the node learns by the stream's end.
    let _unreachable = link.out.try_send(Ok(v1::RouterMessage { message: Some(message) }));
    link.closed.cancel();
}

fn wire(order: &Order) -> v1::RouterMessage {
    let message = match order {
        Order::Prepare(view) => Message::Prepare(v1::ViewMessage::from(view.as_ref())),
        Order::Commit(view) => Message::Commit(v1::ViewId { view: view.0 }),
        Order::Abandon(view) => Message::Abandon(v1::ViewId { view: view.0 }),
        Order::Ping => Message::Ping(v1::Ping {}),
    };
    v1::RouterMessage { message: Some(message) }
}
