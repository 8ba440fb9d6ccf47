//! One request's stream from its attention node to its client, with every way that it can end.
//!
//! A task per request pulls from the attention node as the client takes. When the client goes, the task goes, and the call
//! to the attention node with it; a deadline is kept even while the client does not read.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use mesh_proto::v1::generate_response::Event;
use mesh_proto::{Code, MeshError, v1};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code as GrpcCode, Status, Streaming};

use crate::front::Admitted;
use crate::plane::Upstream;

/// Messages of one request that wait for its client. They may be large, and the attention node has a queue of its own.
const RELAY_QUEUE: usize = 1;

/// What ends a request from outside: completes with the error to tell.
pub struct Ends(Pin<Box<dyn Future<Output = MeshError> + Send>>);

impl Ends {
    /// The ends of a request that has no attention node yet.
    pub fn before_choice(stopping: CancellationToken, deadline: Option<Instant>) -> Self {
        Self(Box::pin(async move {
            tokio::select! {
                () = stopping.cancelled() => stopped(),
                () = passed(deadline) => late("no attention node was found for it"),
            }
        }))
    }

    /// The ends of a request at an attention node.
    pub fn of(upstream: &Upstream, stopping: CancellationToken, deadline: Option<Instant>) -> Self {
        let (lost, node) = (upstream.lost.clone(), upstream.label.clone());
        Self(Box::pin(async move {
            tokio::select! {
                () = stopping.cancelled() => stopped(),
                () = lost.cancelled() => node_lost(&node, "it is no member of the mesh any more"),
                () = passed(deadline) => late(&format!("{node} was generating")).at_node(node),
            }
        }))
    }
}

impl Future for Ends {
    type Output = MeshError;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<MeshError> {
        self.0.as_mut().poll(cx)
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

/// The attention node's own error as it is; an error of the way there as a lost node.
fn told(node: &str, status: &Status) -> MeshError {
    if let Some(typed) = MeshError::detail(status) {
        return typed;
    }
    match status.code() {
        GrpcCode::Unavailable | GrpcCode::Unknown | GrpcCode::Cancelled | GrpcCode::Internal | GrpcCode::Aborted => {
            node_lost(node, status.message())
        }
        _ => MeshError::from_status(status).at_node(node),
    }
}

/// What the client of a request reads.
pub type Relay = ReceiverStream<Result<v1::GenerateResponse, Status>>;

/// Opens the request at its attention node and starts to relay it. A client that takes nothing for `stall_max` is given
/// up.
///
/// # Errors
/// The attention node's own, [`Code::NodeLost`], or what `ends` says.
pub async fn open(
    mut upstream: Upstream,
    request: v1::GenerateRequest,
    mut ends: Ends,
    admitted: Admitted,
    stall_max: Duration,
) -> Result<Relay, MeshError> {
    let opened = tokio::select! {
        biased;
        error = &mut ends => return Err(error),
        opened = upstream.client.generate(request) => opened,
    };
    let stream = opened.map_err(|status| told(&upstream.label, &status))?.into_inner();
    let (out, relayed) = mpsc::channel(RELAY_QUEUE);
    let relaying = Relaying { node: upstream.label, stream, ends, out, stall_max };
    tokio::spawn(relaying.run(admitted));
    Ok(ReceiverStream::new(relayed))
}

/// How relaying went on.
enum Next {
    /// There may be more.
    More,
    /// The client has all that it is owed, or is gone.
    Done,
}

struct Relaying {
    node: String,
    stream: Streaming<v1::GenerateResponse>,
    ends: Ends,
    out: mpsc::Sender<Result<v1::GenerateResponse, Status>>,
    stall_max: Duration,
}

impl Relaying {
    async fn run(mut self, admitted: Admitted) {
        let mut finished = false;
        let ended = loop {
            match self.next(&mut finished).await {
                Ok(Next::More) => {}
                Ok(Next::Done) => return,
                Err(error) => break error,
            }
        };
        let Self { node, stream, out, stall_max, .. } = self;
        // What the request holds is freed before its client is told.
        drop((stream, admitted));
        if finished {
            // The client has everything; how the attention node's stream ends after it concerns nobody.
            return;
        }
        tracing::debug!(node, error = %ended, "request ended");
        // A client that does not read this either sees the stream's end.
        let _unread = tokio::time::timeout(stall_max, out.send(Err(ended.into()))).await;
    }

    async fn next(&mut self, finished: &mut bool) -> Result<Next, MeshError> {
        let message = tokio::select! {
            biased;
            () = self.out.closed() => return Ok(Next::Done),
            error = &mut self.ends => return Err(error),
            message = self.stream.message() => message,
        };
        let message = match message.map_err(|status| told(&self.node, &status))? {
            Some(message) => message,
            None if *finished => return Ok(Next::Done),
            None => return Err(node_lost(&self.node, "it ended its stream early")),
        };
        let is_last = matches!(message.event, Some(Event::Finished(_)));
        tokio::select! {
            biased;
            error = &mut self.ends => return Err(error),
            // A closed channel is seen at the next message.
            _sent = self.out.send(Ok(message)) => {}
            () = tokio::time::sleep(self.stall_max) => {
                let what = format!("the client took nothing for {:?} while its answer was waiting", self.stall_max);
                return Err(MeshError::new(Code::Deadline, what));
            }
        }
        *finished |= is_last;
        Ok(Next::More)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attention_nodes_own_error_passes_as_it_is_and_a_broken_way_names_the_node() {
        let own = MeshError::new(Code::ContextExceeded, "too long").at_field("prompt");
        assert_eq!(told("attention slot 1", &own.clone().into()), own);
        let broken = told("attention slot 1", &Status::unavailable("connection reset"));
        assert_eq!((broken.code, broken.node.as_str()), (Code::NodeLost, "attention slot 1"));
        assert!(broken.message.contains("connection reset"));
        assert_eq!(told("n", &Status::out_of_range("message too large")).code, Code::InvalidRequest);
    }
}
