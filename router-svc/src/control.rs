//! The service that nodes call: registration, and the session that is a node's lease.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::{NodeId, Slot, ViewId};
use mesh_proto::v1::control_server::Control;
use mesh_proto::v1::node_message::Message;
use mesh_proto::{Code, MeshError, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::mesh::Event;
use crate::plane::{Outbound, Plane, SESSION_QUEUE};

/// Sessions at once, those that have not said Hello yet included.
const SESSIONS_MAX: usize = 2 * mesh_proto::limits::SLOTS_MAX + 64;

/// The `Control` service.
#[derive(Debug)]
pub struct ControlService {
    plane: Arc<Plane>,
    hello_max: Duration,
    sessions: Arc<Semaphore>,
}

impl ControlService {
    /// A service whose sessions must begin with Hello within `hello_max`.
    pub fn new(plane: Arc<Plane>, hello_max: Duration) -> Self {
        Self { plane, hello_max, sessions: Arc::new(Semaphore::new(SESSIONS_MAX)) }
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        let request = request.into_inner();
        let (name, role) = (request.name.clone(), request.role);
        let registered = self.plane.register(request);
        let response = registered.inspect_err(|error| tracing::warn!(name, role, %error, "registration refused"))?;
        Ok(Response::new(response))
    }

    type SessionStream = ReceiverStream<Result<v1::RouterMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::NodeMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let permit = Arc::clone(&self.sessions).try_acquire_owned().map_err(|_| {
            MeshError::new(Code::Overloaded, format!("{SESSIONS_MAX} sessions are open; no more are taken"))
        })?;
        let (out, outbound) = mpsc::channel(SESSION_QUEUE);
        let session = Session { plane: Arc::clone(&self.plane), hello_max: self.hello_max, _permit: permit };
        // The answer goes out before Hello comes in, for nodes that wait for it before they send.
        tokio::spawn(session.run(request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

struct Session {
    plane: Arc<Plane>,
    hello_max: Duration,
    _permit: OwnedSemaphorePermit,
}

impl Session {
    async fn run(self, mut inbound: Streaming<v1::NodeMessage>, out: Outbound) {
        let opened = match self.hello(&mut inbound).await {
            Ok(hello) => {
                let node = NodeId(hello.node);
                self.plane.hello(node, &hello.token, out.clone()).map(|closed| (node, closed))
            }
            Err(error) => Err(error),
        };
        let (node, closed) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                tracing::warn!(%error, "session refused");
                // Whoever does not read the refusal sees the stream's end.
                let _unread = out.try_send(Err(error.into()));
                return;
            }
        };
        // The link holds the other end: the stream must end with it.
        drop(out);
        loop {
            let message = tokio::select! {
                () = closed.cancelled() => return,
                message = inbound.message() => message,
            };
            let event = match message {
                Ok(Some(message)) => event(node, message),
                Ok(None) => Some(Event::Lost(node, "it ended its session".into())),
                Err(status) => Some(Event::Lost(node, format!("its session broke: {}", status.message()))),
            };
            if let Some(event) = event {
                self.plane.step(event);
            }
        }
    }

    async fn hello(&self, inbound: &mut Streaming<v1::NodeMessage>) -> Result<v1::SessionHello, MeshError> {
        let first = tokio::time::timeout(self.hello_max, inbound.message()).await.map_err(|_| {
            MeshError::new(Code::Deadline, format!("no Hello within {:?} of the session's start", self.hello_max))
        })?;
        let first = first.map_err(|status| MeshError::from_status(&status))?;
        match first.and_then(|m| m.message) {
            Some(Message::Hello(hello)) => Ok(hello),
            _ => Err(MeshError::invalid("message", "a session's first message must be Hello")),
        }
    }
}

fn event(node: NodeId, message: v1::NodeMessage) -> Option<Event> {
    Some(match message.message? {
        Message::Heartbeat(load) => Event::Heartbeat(node, Box::new(load)),
        Message::Prepared(v) => Event::Prepared(node, ViewId(v.view)),
        Message::Failed(v) => Event::Failed(node, ViewId(v.view), v.reason),
        Message::Committed(v) => Event::Committed(node, ViewId(v.view)),
        Message::Leaving(leaving) => Event::Leaving(node, leaving.why),
        Message::Draining(draining) => Event::Draining(node, draining.why),
        Message::Evidence(seen) => {
            let slot = Slot(u16::try_from(seen.expert_slot).ok()?);
            Event::Evidence(node, ViewId(seen.view), slot, seen.what)
        }
        Message::Hello(_) => Event::Lost(node, "it said Hello twice".into()),
    })
}
