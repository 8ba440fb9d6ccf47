//! The lease: heartbeats up, views down. A slow prepare never delays a heartbeat.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_core::ViewId;
use mesh_core::view::View;
use mesh_proto::v1::node_message::Message as Up;
use mesh_proto::v1::router_message::Message as Down;
use mesh_proto::{MeshError, v1};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Streaming;

use super::register::broke_off;
use super::{Evidence, Registration, ViewTarget};
use crate::ServiceError;

/// Messages to the router that may wait to be sent.
const UP_MAX: usize = 64;
/// Orders of the router that may wait for the one before them.
const ORDERS_MAX: usize = 64;
/// How long the router may take to open the session.
const OPEN_MAX: Duration = Duration::from_secs(10);
/// How long a node that leaves waits for the router to hear it.
const LEAVE_MAX: Duration = Duration::from_secs(1);

/// What must be done one after the other.
enum Order {
    Prepare(Arc<View>),
    Commit(ViewId),
}

/// The session's parts that its loop needs.
struct Session {
    uri: String,
    up: mpsc::Sender<v1::NodeMessage>,
    orders: mpsc::Sender<Order>,
    /// The largest view abandoned: a prepare at or below it, running or waiting, is not reported.
    abandoned: Arc<AtomicU64>,
    target: Arc<dyn ViewTarget>,
    /// Ends the worker with the session.
    _worker: DropGuard,
}

impl Registration {
    /// Keeps the membership until the router ends it. Once `shutdown` is cancelled the router is asked to hand over what the
    /// node holds, and has `drain_max` to dismiss it; then the node leaves by itself. What `evidence` yields is passed on to
    /// the router.
    ///
    /// # Errors
    /// [`ServiceError`] when the session breaks or the router dismisses the node unasked: the lease is then lost.
    pub async fn run(
        mut self,
        target: Arc<dyn ViewTarget>,
        evidence: &mut mpsc::Receiver<Evidence>,
        shutdown: CancellationToken,
        drain_max: Duration,
    ) -> Result<(), ServiceError> {
        let (up, up_rx) = mpsc::channel(UP_MAX);
        let (orders, orders_rx) = mpsc::channel(ORDERS_MAX);
        let abandoned = Arc::new(AtomicU64::new(0));
        let ended = CancellationToken::new();
        let work = follow(orders_rx, target.clone(), up.clone(), abandoned.clone());
        tokio::spawn(ended.clone().run_until_cancelled_owned(work));
        let session = Session { uri: self.uri.clone(), up, orders, abandoned, target, _worker: ended.drop_guard() };
        session.say(Up::Hello(v1::SessionHello { node: self.node.0, token: std::mem::take(&mut self.token) }))?;
        let opened = tokio::select! {
            opened = tokio::time::timeout(OPEN_MAX, self.client.session(ReceiverStream::new(up_rx))) => opened,
            () = shutdown.cancelled() => return Ok(()),
        };
        let Ok(opened) = opened else {
            return Err(session.lost(format!("it was not opened within {OPEN_MAX:?}")));
        };
        let down = opened.map_err(|status| {
            let error = MeshError::from_status(&status);
            match broke_off(&status) {
                true => session.lost(error.to_string()),
                false => ServiceError::Refused { uri: self.uri.clone(), error },
            }
        })?;
        session.keep(down.into_inner(), evidence, self.heartbeat, shutdown, drain_max).await
    }
}

impl Session {
    async fn keep(
        self,
        mut down: Streaming<v1::RouterMessage>,
        evidence: &mut mpsc::Receiver<Evidence>,
        heartbeat: Duration,
        shutdown: CancellationToken,
        drain_max: Duration,
    ) -> Result<(), ServiceError> {
        let mut heartbeats = tokio::time::interval(heartbeat);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut draining: Option<tokio::time::Instant> = None;
        loop {
            tokio::select! {
                _ = heartbeats.tick() => self.say(Up::Heartbeat(self.target.load()))?,
                Some(seen) = evidence.recv() => self.say(Up::Evidence(v1::Evidence {
                    view: seen.view.0,
                    expert_slot: seen.expert_slot.0.into(),
                    what: seen.what,
                }))?,
                message = down.message() => match message {
                    Ok(Some(message)) => match self.obey(message) {
                        Err(ServiceError::Dismissed { drained, .. }) if drained || draining.is_some() => return Ok(()),
                        obeyed => obeyed?,
                    },
                    // Nobody is left to hand over to.
                    Ok(None) | Err(_) if draining.is_some() => return Ok(()),
                    Ok(None) => return Err(self.lost("the router ended it".into())),
                    Err(status) => return Err(self.lost(MeshError::from_status(&status).to_string())),
                },
                () = shutdown.cancelled(), if draining.is_none() => {
                    self.say(Up::Draining(v1::Draining { why: "shutting down".into() }))?;
                    draining = Some(tokio::time::Instant::now() + drain_max);
                }
                () = passed(draining) => {
                    tracing::warn!(router = %self.uri, waited = ?drain_max, "not handed over in time; leaving");
                    return self.leave(down).await;
                }
            }
        }
    }

    fn obey(&self, message: v1::RouterMessage) -> Result<(), ServiceError> {
        match message.message {
            Some(Down::Prepare(view)) => {
                let id = view.view;
                match View::try_from(view) {
                    Ok(view) => self.order(Order::Prepare(Arc::new(view))),
                    Err(error) => {
                        tracing::warn!(view = id, %error, "a view that contradicts itself is not prepared");
                        self.say(Up::Failed(v1::ViewFailed { view: id, reason: error.to_string() }))
                    }
                }
            }
            Some(Down::Commit(id)) => self.order(Order::Commit(ViewId(id.view))),
            Some(Down::Abandon(id)) => {
                tracing::info!(view = id.view, "view abandoned");
                self.abandoned.fetch_max(id.view, Ordering::SeqCst);
                self.target.abandon(ViewId(id.view));
                Ok(())
            }
            Some(Down::Dismissed(v1::Dismissed { why, drained })) => {
                Err(ServiceError::Dismissed { uri: self.uri.clone(), why, drained })
            }
            Some(Down::Ping(v1::Ping {})) => self.say(Up::Heartbeat(self.target.load())),
            None => Err(ServiceError::Protocol { uri: self.uri.clone(), what: "an empty or unknown message".into() }),
        }
    }

    fn order(&self, order: Order) -> Result<(), ServiceError> {
        self.orders.try_send(order).map_err(|_| ServiceError::Protocol {
            uri: self.uri.clone(),
            what: format!("more than {ORDERS_MAX} view changes at once"),
        })
    }

    /// Queues a message to the router. A full queue means that the connection has not moved for many heartbeats.
    fn say(&self, message: Up) -> Result<(), ServiceError> {
        let sent = self.up.try_send(v1::NodeMessage { message: Some(message) });
        sent.map_err(|_| self.lost(format!("{UP_MAX} messages wait to be sent")))
    }

    async fn leave(self, mut down: Streaming<v1::RouterMessage>) -> Result<(), ServiceError> {
        let heard = async {
            self.say(Up::Leaving(v1::Leaving { why: "shutting down".into() }))?;
            // The router ends the session when it has heard.
            while let Ok(Some(_)) = down.message().await {}
            Ok(())
        };
        match tokio::time::timeout(LEAVE_MAX, heard).await {
            Ok(left) => left,
            Err(_) => {
                tracing::warn!(router = %self.uri, waited = ?LEAVE_MAX, "left without the router's answer");
                Ok(())
            }
        }
    }

    fn lost(&self, why: String) -> ServiceError {
        ServiceError::SessionLost { uri: self.uri.clone(), why }
    }
}

/// Completes at a deadline, if there is one.
async fn passed(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Does the router's orders, one after the other, and reports each. Ends when nobody listens any more.
async fn follow(
    mut orders: mpsc::Receiver<Order>,
    target: Arc<dyn ViewTarget>,
    up: mpsc::Sender<v1::NodeMessage>,
    abandoned: Arc<AtomicU64>,
) {
    while let Some(order) = orders.recv().await {
        let (view, answer) = match order {
            Order::Prepare(view) => {
                let id = view.id;
                if id.0 <= abandoned.load(Ordering::SeqCst) {
                    continue;
                }
                let prepared = target.prepare(view).await;
                if id.0 <= abandoned.load(Ordering::SeqCst) {
                    // The abandon may have come before there was anything to forget.
                    target.abandon(id);
                    continue;
                }
                (id, prepared.map(|()| Up::Prepared(v1::ViewPrepared { view: id.0 })))
            }
            Order::Commit(id) => {
                (id, target.commit(id).await.map(|()| Up::Committed(v1::ViewCommitted { view: id.0 })))
            }
        };
        let message = answer.unwrap_or_else(|reason| {
            tracing::warn!(view = view.0, %reason, "view failed");
            Up::Failed(v1::ViewFailed { view: view.0, reason })
        });
        if up.send(v1::NodeMessage { message: Some(message) }).await.is_err() {
            return;
        }
    }
}
