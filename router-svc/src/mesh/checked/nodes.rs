//! Nodes as the router meets them: what they do with orders, and what they say.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::view::View;
use mesh_core::{NodeId, Role, ViewId};

use crate::mesh::{Event, Order};

/// What a node says, in the order in which it says it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Said {
    Prepared(ViewId),
    Failed(ViewId),
    Committed(ViewId),
    Leaving,
    /// Its session ended, without a word.
    Ended,
}

impl Said {
    pub fn event(self, node: NodeId) -> Event {
        match self {
            Said::Prepared(view) => Event::Prepared(node, view),
            Said::Failed(view) => Event::Failed(node, view, "no room".into()),
            Said::Committed(view) => Event::Committed(node, view),
            Said::Leaving => Event::Leaving(node, "shutting down".into()),
            Said::Ended => Event::Lost(node, "its session ended".into()),
        }
    }
}

/// A member, or a dead process that the router takes for one. Views are held as `expert-svc/src/table.rs` and
/// `attention-svc/src/runner/exchange.rs` hold them.
#[derive(Clone, Debug)]
pub struct Process {
    pub node: NodeId,
    pub role: Role,
    pub is_alive: bool,
    pub in_force: Option<Arc<View>>,
    pub prepared: Option<Arc<View>>,
    /// Of an expert node: the view that was in force before, and until when it is served.
    pub previous: Option<(Arc<View>, Instant)>,
    /// Orders on their way to it or waiting for the one before them.
    pub orders: VecDeque<Order>,
    pub said: VecDeque<Said>,
}

impl Process {
    pub fn new(node: NodeId, role: Role) -> Self {
        let (orders, said) = (VecDeque::new(), VecDeque::new());
        Self { node, role, is_alive: true, in_force: None, prepared: None, previous: None, orders, said }
    }

    /// Whether an order to prepare is at the front and its abandonment behind it, which overtakes it.
    pub fn may_skip(&self) -> bool {
        let Some(Order::Prepare(view)) = self.orders.front() else { return false };
        self.orders.contains(&Order::Abandon(view.id))
    }

    pub fn skip(&mut self) {
        let Some(Order::Prepare(view)) = self.orders.pop_front() else { return };
        self.orders.retain(|o| *o != Order::Abandon(view.id));
    }

    /// Does the next order. A node that `fails` cannot prepare.
    pub fn obey(&mut self, fails: bool, linger: Duration, now: Instant) {
        match self.orders.pop_front() {
            Some(Order::Prepare(view)) => {
                let is_newer = self.in_force.as_ref().is_none_or(|v| v.id < view.id);
                if fails || !is_newer {
                    return self.said.push_back(Said::Failed(view.id));
                }
                self.said.push_back(Said::Prepared(view.id));
                self.prepared = Some(view);
            }
            Some(Order::Commit(id)) => match self.prepared.take_if(|v| v.id == id) {
                Some(view) => {
                    let before = self.in_force.replace(view);
                    if self.role == Role::Expert {
                        self.previous = before.map(|v| (v, now + linger));
                    }
                    self.said.push_back(Said::Committed(id));
                }
                None => self.said.push_back(Said::Failed(id)),
            },
            Some(Order::Abandon(id)) => self.prepared = self.prepared.take().filter(|v| v.id != id),
            Some(Order::Ping) | None => {}
        }
    }

    /// Lets go of the view before, once its time is over.
    pub fn expire(&mut self, now: Instant) {
        self.previous = self.previous.take().filter(|(_, until)| *until > now);
    }

    /// Whether frames under a view are answered.
    pub fn serves(&self, view: ViewId) -> bool {
        let previous = self.previous.as_ref().map(|(v, _)| v);
        [self.in_force.as_ref(), self.prepared.as_ref(), previous].into_iter().flatten().any(|v| v.id == view)
    }

    /// Whether it does or says something by itself.
    pub fn is_busy(&self) -> bool {
        !self.said.is_empty() || (self.is_alive && !self.orders.is_empty())
    }
}
