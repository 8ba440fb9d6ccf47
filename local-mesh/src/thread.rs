//! One node's thread: a runtime of its own, from the node's start to its end, told of by events.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::Duration;

use attention_svc::{AttentionConfig, AttentionNode};
use expert_svc::{ExpertConfig, ExpertNode};
use router_svc::RouterConfig;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::error::NodeError;

/// How long what a node left running (loading, mostly) may take to end.
const LEFTOVERS_MAX: Duration = Duration::from_secs(2);

/// What a node's thread tells: it is up, at most once, and it ended, once.
#[derive(Debug)]
pub(crate) enum Event {
    Ready { node: usize, addr: String },
    Ended { node: usize, result: Result<(), NodeError> },
}

/// Events that a node sends in all: the channel has room for as many from each.
pub(crate) const EVENTS_PER_NODE: usize = 2;

/// What a node's thread needs to tell of itself.
#[derive(Clone)]
pub(crate) struct Teller {
    pub node: usize,
    pub events: mpsc::Sender<Event>,
}

impl Teller {
    fn tell(&self, event: Event) {
        // Room is kept for every event; a mesh that is gone does not want to know.
        let _untold = self.events.try_send(event);
    }

    fn ready(&self, addr: &str) {
        self.tell(Event::Ready { node: self.node, addr: addr.to_owned() });
    }
}

/// What a node is.
pub(crate) enum Start {
    Router(Box<RouterConfig>, std::net::TcpListener),
    Attention(Box<AttentionConfig>),
    Expert(Box<ExpertConfig>),
}

/// Runs a node on a thread of its name until `stop` is cancelled.
pub(crate) fn spawn(
    name: &str,
    start: Start,
    teller: Teller,
    stop: CancellationToken,
) -> Result<JoinHandle<()>, std::io::Error> {
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime: Runtime = runtime.map_err(|source| NodeError::Os { what: "making a runtime", source })?;
            let ended = runtime.block_on(live(start, &teller, stop));
            runtime.shutdown_timeout(LEFTOVERS_MAX);
            ended
        }));
        teller.tell(Event::Ended { node: teller.node, result: ran.unwrap_or(Err(NodeError::Panicked)) });
    })
}

async fn live(start: Start, teller: &Teller, stop: CancellationToken) -> Result<(), NodeError> {
    match start {
        Start::Router(config, listener) => {
            let taken = |source| NodeError::Os { what: "taking the router's listener over", source };
            let listener = TcpListener::from_std(listener).map_err(taken)?;
            teller.ready(&listener.local_addr().map_err(taken)?.to_string());
            Ok(router_svc::serve(*config, listener, stop.cancelled_owned()).await?)
        }
        Start::Attention(config) => {
            let node = tokio::select! {
                node = AttentionNode::start(*config) => node?,
                () = stop.cancelled() => return Ok(()),
            };
            teller.ready(node.addr());
            Ok(node.serve(stop).await?)
        }
        Start::Expert(config) => {
            let node = tokio::select! {
                node = ExpertNode::start(*config) => node?,
                () = stop.cancelled() => return Ok(()),
            };
            teller.ready(node.addr());
            Ok(node.serve(stop).await?)
        }
    }
}
