//! One request's stream from its attention node to its client, with every way that it can end.
//!
//! There is no task and no queue: the client's pull pulls from the attention node, and when the client goes, the call to
//! the attention node goes with it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use mesh_proto::v1::generate_response::Event;
use mesh_proto::{Code, MeshError, v1};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Code as GrpcCode, Status, Streaming};

use crate::front::Admitted;
use crate::plane::Upstream;

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

/// Opens the request at its attention node.
///
/// # Errors
/// The attention node's own, [`Code::NodeLost`], or what `ends` says.
pub async fn open(
    mut upstream: Upstream,
    request: v1::GenerateRequest,
    mut ends: Ends,
    admitted: Admitted,
) -> Result<Relay, MeshError> {
    let opened = tokio::select! {
        biased;
        error = &mut ends => return Err(error),
        opened = upstream.client.generate(request) => opened,
    };
    let stream = opened.map_err(|status| told(&upstream.label, &status))?.into_inner();
    Ok(Relay { node: upstream.label, stream: Some(stream), ends, finished: false, _admitted: admitted })
}

/// A request's stream. Dropping it cancels the call to the attention node and gives its place back.
pub struct Relay {
    node: String,
    /// Gone once the stream has ended, whichever way.
    stream: Option<Streaming<v1::GenerateResponse>>,
    ends: Ends,
    finished: bool,
    _admitted: Admitted,
}

impl Relay {
    fn end(&mut self, error: MeshError) -> Poll<Option<Result<v1::GenerateResponse, Status>>> {
        self.stream = None;
        if self.finished {
            // The client has everything; how the attention node's stream ends after it concerns nobody.
            return Poll::Ready(None);
        }
        tracing::debug!(node = self.node, %error, "request ended");
        Poll::Ready(Some(Err(error.into())))
    }
}

impl Stream for Relay {
    type Item = Result<v1::GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(stream) = &mut this.stream else { return Poll::Ready(None) };
        // Ends first: a stream that always has something must not outlive its deadline.
        if let Poll::Ready(error) = Pin::new(&mut this.ends).poll(cx) {
            return this.end(error);
        }
        match std::task::ready!(Pin::new(stream).poll_next(cx)) {
            Some(Ok(message)) => {
                this.finished |= matches!(message.event, Some(Event::Finished(_)));
                Poll::Ready(Some(Ok(message)))
            }
            Some(Err(status)) => {
                let error = told(&this.node, &status);
                this.end(error)
            }
            None => {
                let error = node_lost(&this.node, "it ended its stream early");
                this.end(error)
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
        assert_eq!(told("attention slot 1", &own.clone().into()), own);
        let broken = told("attention slot 1", &Status::unavailable("connection reset"));
        assert_eq!((broken.code, broken.node.as_str()), (Code::NodeLost, "attention slot 1"));
        assert!(broken.message.contains("connection reset"));
        assert_eq!(told("n", &Status::out_of_range("message too large")).code, Code::InvalidRequest);
    }
}
