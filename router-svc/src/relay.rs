//! One request's stream from its attention node to its client, with every way that it can end.
//!
//! A task per request pulls from the attention node as the client takes, and keeps the tokens that it relayed: when the node
//! is lost, another goes on from prompt and tokens, which gives the same bits (invariants 1 and 3). When the client goes, the task goes, and the call
//! to the attention node with it; a deadline is kept even while the client does not read.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::NodeId;
use mesh_proto::v1::generate_response::Event as Told;
use mesh_proto::{Code, MeshError, v1};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code as GrpcCode, Status, Streaming};

use crate::choice;
use crate::front::Admitted;
use crate::mesh::Event;
use crate::plane::{Plane, Upstream};

/// Messages of one request that wait for its client. They may be large, and the attention node has a queue of its own.
const RELAY_QUEUE: usize = 1;
/// Attention nodes that one request may lose before it is given up.
const MOVES_MAX: u32 = 64;
/// Pause between two attempts to find an attention node.
const MOVE_PAUSE: Duration = Duration::from_millis(20);

/// What ends a request from outside: completes with the error to tell.
async fn ends(stopping: &CancellationToken, deadline: Option<Instant>, meanwhile: &str) -> MeshError {
    tokio::select! {
        () = stopping.cancelled() => stopped(),
        () = passed(deadline) => late(meanwhile),
    }
}

/// Waits for `node`, and tells whenever that has lasted for `quiet_max`.
async fn heard<T>(plane: &Plane, node: NodeId, quiet_max: Duration, wait: impl Future<Output = T>) -> T {
    tokio::pin!(wait);
    loop {
        match tokio::time::timeout(quiet_max, &mut wait).await {
            Ok(heard) => return heard,
            Err(_elapsed) => plane.step(Event::Quiet(node)),
        }
    }
}

async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

fn stopped() -> MeshError {
    MeshError::new(Code::NotServing, "the router is stopping; send the request again once it is back")
}

fn late(meanwhile: &str) -> MeshError {
    MeshError::new(Code::Deadline, format!("the request's deadline passed while {meanwhile}"))
}

fn node_lost(node: &str, why: &str) -> MeshError {
    MeshError::new(Code::NodeLost, format!("{node} is lost: {why}; send the request again")).at_node(node)
}

/// The attention node's own error as it is (and `true`); an error of the way there as a lost node.
fn told(node: &str, status: &Status) -> (MeshError, bool) {
    if let Some(typed) = MeshError::detail(status) {
        return (typed, true);
    }
    let error = match status.code() {
        GrpcCode::Unavailable | GrpcCode::Unknown | GrpcCode::Cancelled | GrpcCode::Internal | GrpcCode::Aborted => {
            node_lost(node, status.message())
        }
        _ => MeshError::from_status(status).at_node(node),
    };
    (error, false)
}

/// Whether the request can go on at another attention node: its node is gone. What a node itself says of a request that it has
/// another would say too.
fn moves(error: &MeshError, typed: bool) -> bool {
    error.code == Code::NodeLost && !typed
}

/// What the client of a request reads.
pub type Relay = ReceiverStream<Result<v1::GenerateResponse, Status>>;

/// How a request is relayed.
#[derive(Clone, Copy, Debug)]
pub struct RelayLimits {
    /// How long a client may take nothing of an answer that waits for it.
    pub stall_max: Duration,
    /// How long a new request waits for a mesh that does not serve (yet).
    pub wait_for_view_max: Duration,
    /// How long a request whose attention node is lost looks for another.
    pub move_max: Duration,
    /// After how long without anything from its attention node the control plane is told, again and again.
    pub quiet_max: Duration,
}

/// A request on its way: which attention node has it, and what its client has of it.
pub struct Relaying {
    plane: Arc<Plane>,
    request: v1::GenerateRequest,
    admitted: Admitted,
    stopping: CancellationToken,
    deadline: Option<Instant>,
    limits: RelayLimits,
    blocks: u64,
    /// Where it is.
    at: Option<(Upstream, Streaming<v1::GenerateResponse>)>,
    /// Whether the client was told that it began, and that it ended.
    started: bool,
    finished: bool,
    moves: u32,
}

/// What came of a message.
enum Next {
    /// There may be more.
    More,
    /// The client has all that it is owed, or is gone.
    Done,
}

impl Relaying {
    /// A request that was admitted and named.
    pub fn new(
        plane: Arc<Plane>,
        request: v1::GenerateRequest,
        admitted: Admitted,
        stopping: CancellationToken,
        deadline: Option<Instant>,
        limits: RelayLimits,
    ) -> Self {
        let blocks = choice::blocks(&request);
        Self {
            plane,
            request,
            admitted,
            stopping,
            deadline,
            limits,
            blocks,
            at: None,
            started: false,
            finished: false,
            moves: 0,
        }
    }

    /// Opens the request at an attention node and starts to relay it. A client that takes nothing for `stall_max` is given
    /// up; a request whose node is lost goes on at another, from the tokens that its client has.
    ///
    /// # Errors
    /// The attention node's own, [`Code::NodeLost`], or what ends the request from outside.
    pub async fn open(mut self) -> Result<Relay, MeshError> {
        self.plane_serves(self.limits.wait_for_view_max).await?;
        self.place(None).await?;
        let (out, relayed) = mpsc::channel(RELAY_QUEUE);
        tokio::spawn(self.run(out));
        Ok(ReceiverStream::new(relayed))
    }

    async fn plane_serves(&self, at_most: Duration) -> Result<(), MeshError> {
        tokio::select! {
            biased;
            error = ends(&self.stopping, self.deadline, "no attention node was found for it") => Err(error),
            () = self.plane.wait_serving(at_most) => Ok(()),
        }
    }

    /// Finds an attention node that takes the request; after `failed`, which it does not go to again as long as there is
    /// another. Bounded by `move_max` and by [`MOVES_MAX`].
    async fn place(&mut self, failed: Option<(NodeId, MeshError)>) -> Result<(), MeshError> {
        let until = Instant::now() + self.limits.move_max;
        let (mut avoid, mut last) = failed.map_or((None, None), |(node, error)| (Some(node), Some(error)));
        loop {
            let chosen = self.plane.choose(self.blocks, avoid);
            let error = match chosen {
                Ok((mut upstream, routing)) => {
                    self.admitted.routed(routing);
                    let (request, node) = (self.request.clone(), upstream.label.clone());
                    let (lost, taking) = (upstream.lost.clone(), format!("{node} was taking it"));
                    let taken = upstream.client.generate(request);
                    let opened = tokio::select! {
                        biased;
                        error = ends(&self.stopping, self.deadline, &taking) => return Err(error),
                        () = lost.cancelled() => Err((node_lost(&node, "it is no member of the mesh any more"), false)),
                        opened = heard(&self.plane, upstream.node, self.limits.quiet_max, taken) => {
                            opened.map_err(|status| told(&node, &status))
                        }
                    };
                    match opened {
                        Ok(stream) => {
                            tracing::debug!(request = self.request.request_id, node, "request routed");
                            self.at = Some((upstream, stream.into_inner()));
                            return Ok(());
                        }
                        Err((error, typed)) if !moves(&error, typed) && error.code != Code::NotServing => {
                            return Err(error);
                        }
                        Err((error, _)) => {
                            avoid = Some(upstream.node);
                            self.moves += 1;
                            Some(error)
                        }
                    }
                }
                Err(error) if last.is_none() => return Err(error),
                // Nobody but the one that failed, or nobody at all: the mesh may recover.
                Err(_) => {
                    avoid = None;
                    None
                }
            };
            last = error.or(last);
            if let Some(error) = last.as_ref().filter(|_| self.moves > MOVES_MAX || Instant::now() >= until) {
                return Err(error.clone());
            }
            tokio::time::sleep(MOVE_PAUSE).await;
            self.plane_serves(until.saturating_duration_since(Instant::now())).await?;
        }
    }

    async fn run(mut self, out: mpsc::Sender<Result<v1::GenerateResponse, Status>>) {
        let ended = loop {
            match self.next(&out).await {
                Ok(Next::More) => {}
                Ok(Next::Done) => return,
                Err(error) => break error,
            }
        };
        let (stall_max, finished) = (self.limits.stall_max, self.finished);
        tracing::debug!(request = self.request.request_id, error = %ended, "request ended");
        // What the request holds is freed before its client is told.
        drop(self);
        if finished {
            // The client has everything; how the attention node's stream ends after it concerns nobody.
            return;
        }
        // A client that does not read this either sees the stream's end.
        let _unread = tokio::time::timeout(stall_max, out.send(Err(ended.into()))).await;
    }

    async fn next(&mut self, out: &mpsc::Sender<Result<v1::GenerateResponse, Status>>) -> Result<Next, MeshError> {
        let Some((upstream, stream)) = &mut self.at else { return Ok(Next::Done) };
        let (node, label, lost) = (upstream.node, upstream.label.clone(), upstream.lost.clone());
        let generating = format!("{label} was generating");
        let message = tokio::select! {
            biased;
            () = out.closed() => return Ok(Next::Done),
            error = ends(&self.stopping, self.deadline, &generating) => return Err(error.at_node(label)),
            () = lost.cancelled() => Err((node_lost(&label, "it is no member of the mesh any more"), false)),
            message = heard(&self.plane, node, self.limits.quiet_max, stream.message()) => match message {
                Ok(None) if !self.finished => Err((node_lost(&label, "it ended its stream early"), false)),
                message => message.map_err(|status| told(&label, &status)),
            },
        };
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(Next::Done),
            Err((error, typed)) if self.finished || !moves(&error, typed) => return Err(error),
            Err((error, _)) => {
                self.moves += 1;
                let id = &self.request.request_id;
                tracing::info!(request = id, node = label, %error, "request goes on at another attention node");
                self.at = None;
                tokio::select! {
                    biased;
                    () = out.closed() => return Ok(Next::Done),
                    placed = self.place(Some((node, error))) => placed?,
                }
                return Ok(Next::More);
            }
        };
        match &message.event {
            // It began long ago, as far as the client is concerned.
            Some(Told::Started(_)) if self.started => return Ok(Next::More),
            Some(Told::Started(_)) => self.started = true,
            Some(Told::Tokens(tokens)) => {
                self.request.resume_tokens.extend(tokens.tokens.iter().map(|t| t.id));
            }
            Some(Told::Finished(_)) => self.finished = true,
            None => {}
        }
        tokio::select! {
            biased;
            error = ends(&self.stopping, self.deadline, &generating) => Err(error.at_node(label)),
            // A closed channel is seen at the next message.
            _sent = out.send(Ok(message)) => Ok(Next::More),
            () = tokio::time::sleep(self.limits.stall_max) => {
                let what = format!("the client took nothing for {:?} while its answer was waiting", self.limits.stall_max);
                Err(MeshError::new(Code::Deadline, what))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attention_nodes_own_error_passes_as_it_is_and_a_broken_way_names_the_node() {
        let own = MeshError::new(Code::ContextExceeded, "too long").at_field("prompt");
        assert_eq!(told("attention slot 1", &own.clone().into()), (own, true));
        let (broken, typed) = told("attention slot 1", &Status::unavailable("connection reset"));
        assert!(!typed && moves(&broken, typed) && !moves(&broken, true));
        assert_eq!((broken.code, broken.node.as_str()), (Code::NodeLost, "attention slot 1"));
        assert!(broken.message.contains("connection reset"));
        assert_eq!(told("n", &Status::out_of_range("message too large")).0.code, Code::InvalidRequest);
    }
}
