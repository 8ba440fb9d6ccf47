//! The control plane's state machine: events in, messages to nodes out. No IO and no clock of its own.
//!
//! A change of the view is two-phase. Every member prepares; when all have, expert nodes commit, then attention nodes,
//! so that no frame names a view that its receiver does not have yet. Until the experts are asked to commit, anything
//! that goes wrong abandons the change and the view before it serves on. One change is under way at a time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::balance::Placed;
use mesh_core::view::{Member, View};
use mesh_core::{NodeId, Role, Slot, ViewId};
use mesh_proto::{Code, MeshError, v1};

use crate::load::Loads;
use crate::membership::{Members, Node, Registration, Token};
use crate::moved::Moved;

mod placing;

/// The bounds that the control plane keeps.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The version that nodes must have.
    pub version: String,
    /// Attention nodes that the first view waits for.
    pub attention_min: usize,
    /// Expert nodes that the first view waits for.
    pub experts_min: usize,
    /// Holders of each expert, as far as there are nodes for them.
    pub replicas: usize,
    /// From registration to Hello.
    pub hello_max: Duration,
    /// From one heartbeat to the next before the node counts as lost.
    pub lease: Duration,
    /// How long every member may take to prepare a view.
    pub prepare_max: Duration,
    /// How long a member may take to commit a prepared view.
    pub commit_max: Duration,
    /// How long a membership change waits for others to share its view.
    pub debounce: Duration,
    /// How long a lost expert node may come back before its copies are made elsewhere, as long as every expert has another
    /// holder.
    pub absence_max: Duration,
    /// How often speed, and load as last taken, are compared with the placement.
    pub balance_every: Duration,
    /// How often load is taken anew for that.
    pub rates_every: Duration,
    /// Further copies that the hottest experts get.
    pub hot_replicas: usize,
    /// Bytes of experts that one change loads at most, beside those that nobody holds.
    pub moves_bytes_max: u64,
    /// How long a node that others wait for in vain may be without a sign of life.
    pub suspicion_max: Duration,
    /// Pause after the first abandoned change; doubles with each in a row.
    pub backoff_min: Duration,
    /// The longest such pause.
    pub backoff_max: Duration,
    /// Failed views in a row after which a node that serves in no view yet is dismissed, lest it keep others out.
    pub prepare_failures_max: u32,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A node opened its session.
    Joined(NodeId),
    /// A node's sign of life.
    Heartbeat(NodeId, Box<v1::NodeLoad>),
    /// A node could commit the view.
    Prepared(NodeId, ViewId),
    /// A node cannot take the view, and why.
    Failed(NodeId, ViewId, String),
    /// The view is in force on a node.
    Committed(NodeId, ViewId),
    /// A node is to be handed over and dismissed.
    Draining(NodeId, String),
    /// An attention node waits in vain for the expert node at a slot of a view, or lost its channel.
    Evidence(NodeId, ViewId, Slot, String),
    /// A request waits long for anything from its attention node.
    Quiet(NodeId),
    /// A node goes in good order: what it has begun for clients it ends itself.
    Leaving(NodeId, String),
    /// A node's session is over, and why.
    Lost(NodeId, String),
    /// Time passed.
    Tick,
}

/// What is to be told to a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Load and warm what the view gives the node.
    Prepare(Arc<View>),
    /// The prepared view is in force.
    Commit(ViewId),
    /// Forget the prepared view.
    Abandon(ViewId),
    /// Others wait for the node in vain: it is to be heard at once.
    Ping,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this on the node's session.
    Send(NodeId, Order),
    /// Move the requests that an attention node has to others.
    HandOver(NodeId),
    /// The node is no member any more: tell it why and close its session. Unless it goes in good order, what waits for
    /// it waits in vain.
    Gone {
        /// Which node.
        node: NodeId,
        /// Why.
        why: String,
        /// Whether it ends by itself what it has begun.
        in_order: bool,
        /// Whether it was drained, as it asked or was asked to.
        drained: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Preparing,
    CommittingExperts,
    CommittingAttention,
}

/// How a node's membership ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Lost,
    InOrder,
    Drained,
}

fn names(view: &View, node: NodeId) -> bool {
    view.attention.iter().chain(&view.experts).any(|m| m.node == node)
}

/// A view on its way.
#[derive(Clone, Debug)]
struct Change {
    view: Arc<View>,
    phase: Phase,
    /// Members whose answer the phase still needs.
    waiting: BTreeSet<NodeId>,
    until: Instant,
}

/// The mesh as the router knows it.
#[derive(Clone, Debug)]
pub struct Mesh {
    policy: Policy,
    members: Members,
    view: Option<Arc<View>>,
    view_next: u64,
    change: Option<Change>,
    /// When the membership is to be compared with the view.
    review: Option<Instant>,
    /// When load and speed are to be compared with the placement.
    balance_at: Instant,
    loads: Loads,
    /// Rows a second of each expert as placement counts them, and when they are taken anew.
    rates: Vec<f64>,
    rates_at: Instant,
    /// Changes abandoned in a row.
    abandoned: u32,
    moved: Moved,
    actions: Vec<Action>,
}

impl Mesh {
    /// A mesh without nodes.
    pub fn new(policy: Policy) -> Self {
        let members = Members::new(policy.version.clone(), policy.hello_max, policy.lease);
        Self {
            policy,
            members,
            view: None,
            view_next: 1,
            change: None,
            review: None,
            balance_at: Instant::now(),
            loads: Loads::default(),
            rates: Vec::new(),
            rates_at: Instant::now(),
            abandoned: 0,
            moved: Moved::default(),
            actions: Vec::new(),
        }
    }

    /// What changes had nodes load so far.
    pub fn moved(&self) -> v1::Moved {
        self.moved.to_wire(self.policy.moves_bytes_max.max(self.expert_bytes()))
    }

    /// The nodes.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// The nodes, to count what is routed to them.
    pub fn members_mut(&mut self) -> &mut Members {
        &mut self.members
    }

    /// The view in force.
    pub fn view(&self) -> Option<&Arc<View>> {
        self.view.as_ref()
    }

    /// Takes a node in, until it says Hello with `token` or `hello_max` is over.
    ///
    /// # Errors
    /// As [`Members::register`].
    pub fn register(&mut self, registration: Registration, token: Token, now: Instant) -> Result<&Node, MeshError> {
        self.members.register(registration, token, now)
    }

    /// Opens a registered node's session.
    ///
    /// # Errors
    /// As [`Members::hello`].
    pub fn hello(&mut self, node: NodeId, token: &[u8], now: Instant) -> Result<Vec<Action>, MeshError> {
        self.members.hello(node, token, now)?;
        Ok(self.step(Event::Joined(node), now))
    }

    /// Whether requests are taken: some attention node has a view, and every expert of it has a live holder, or
    /// the change that gives it one is under way and has not failed yet (requests then pause).
    pub fn is_serving(&self) -> bool {
        let Some(view) = &self.view else { return false };
        let attention = self.members.live(Role::Attention).any(|n| n.committed);
        let experts = self.members.live(Role::Expert).next().is_some();
        attention && experts && (self.abandoned == 0 || self.is_covered(view))
    }

    fn is_covered(&self, view: &View) -> bool {
        let live = |m: &&Member| self.members.get(m.node).is_some_and(Node::is_live);
        let slots: BTreeSet<_> = view.experts.iter().filter(live).map(|m| m.slot).collect();
        view.placement.table().iter().all(|holders| holders.iter().any(|s| slots.contains(s)))
    }

    /// When [`Event::Tick`] is due next.
    pub fn due(&self) -> Option<Instant> {
        let change = self.change.as_ref().map(|c| c.until);
        // While a change is under way, only its end lets the membership be looked at again.
        let review = if change.is_some() { None } else { self.review };
        let balance = self.view.as_ref().map(|_| self.balance_at);
        [self.members.expiry_next(), change, review, balance].into_iter().flatten().min()
    }

    /// Takes an event in and says what is to be done about it.
    pub fn step(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Joined(node) => {
                tracing::info!(%node, label = self.label(node), "node joined");
                self.review_within(self.policy.debounce, now);
            }
            Event::Heartbeat(node, load) => {
                self.loads.heartbeat(node, &load, now);
                self.members.heartbeat(node, *load, now);
            }
            Event::Prepared(node, view) => {
                self.answered(node, view, |phase| matches!(phase, Phase::Preparing), now);
            }
            Event::Committed(node, view) => {
                self.committed(node, view, now);
            }
            Event::Failed(node, view, reason) => self.failed(node, view, &reason, now),
            Event::Draining(node, why) => self.drain(node, &why, now),
            Event::Evidence(from, view, slot, what) => self.evidence(from, view, slot, &what, now),
            Event::Quiet(node) => self.quiet(node, now),
            Event::Leaving(node, why) => self.remove(node, &format!("left: {why}"), End::InOrder, now),
            Event::Lost(node, why) => self.remove(node, &why, End::Lost, now),
            Event::Tick => {}
        }
        self.tick(now);
        std::mem::take(&mut self.actions)
    }

    fn label(&self, node: NodeId) -> String {
        self.members.get(node).map_or_else(|| node.to_string(), Node::label)
    }

    fn review_within(&mut self, pause: Duration, now: Instant) {
        let at = now + pause;
        self.review = Some(self.review.map_or(at, |earlier| earlier.min(at)));
    }

    fn tick(&mut self, now: Instant) {
        for node in self.members.expired(now) {
            let heard = self.members.get(node).filter(|n| n.is_live()).map(|n| n.heard);
            let why = match heard {
                Some(at) => format!("no heartbeat for {:?}", now.saturating_duration_since(at)),
                None => format!("no session within {:?} of its registration", self.policy.hello_max),
            };
            self.remove(node, &why, End::Lost, now);
        }
        if self.change.as_ref().is_some_and(|c| c.until <= now) {
            self.overdue(now);
        }
        if self.change.is_none() && self.review.is_some_and(|at| at <= now) {
            self.review = None;
            self.begin(now);
            self.dismiss_drained(now);
        }
        if self.view.is_some() && self.balance_at <= now {
            self.balance(now);
        }
    }

    /// A node wants to go, or is to: others take over what it holds, then it is dismissed.
    fn drain(&mut self, node: NodeId, why: &str, now: Instant) {
        let Some(member) = self.members.get_mut(node).filter(|n| n.is_live() && !n.draining) else { return };
        member.draining = true;
        let (role, label) = (member.role(), member.label());
        tracing::info!(%node, label, why, "node is drained");
        if role == Role::Attention {
            self.actions.push(Action::HandOver(node));
        }
        if self.change.as_ref().is_some_and(|c| matches!(c.phase, Phase::Preparing) && names(&c.view, node)) {
            self.abandon(&format!("{label} is drained"), &[], now);
        }
        self.review_within(Duration::ZERO, now);
    }

    /// Dismisses who is drained and in no view any more, or cannot be handed over: nobody of its role would be left.
    fn dismiss_drained(&mut self, now: Instant) {
        if self.change.is_some() {
            return;
        }
        let needed = |n: &Node| self.view.as_ref().is_some_and(|v| names(v, n.id)) && self.can_replace(n.role());
        let done: Vec<NodeId> = self.members.iter().filter(|n| n.draining && !needed(n)).map(|n| n.id).collect();
        for node in done {
            self.remove(node, "drained", End::Drained, now);
        }
    }

    /// Whether a view could do without the role's draining nodes.
    fn can_replace(&self, role: Role) -> bool {
        self.members.live(role).any(|n| !n.draining)
    }

    /// What an attention node saw of an expert node: with a heartbeat overdue too, it is lost.
    fn evidence(&mut self, from: NodeId, view: ViewId, slot: Slot, what: &str, now: Instant) {
        let of_view = self.view.as_ref().filter(|v| v.id == view).and_then(|v| v.expert(slot)).map(|m| m.node);
        tracing::warn!(from = self.label(from), view = view.0, %slot, what, "evidence");
        if let Some(node) = of_view {
            self.ping(node, now);
        }
    }

    /// An attention node that computes for long answers a ping all the same; one that does not is lost. The last one is waited
    /// for: nobody could go on with its requests.
    fn quiet(&mut self, node: NodeId, now: Instant) {
        if self.members.live(Role::Attention).any(|n| n.id != node && !n.draining) {
            self.ping(node, now);
        }
    }

    fn ping(&mut self, node: NodeId, now: Instant) {
        if self.members.suspect(node, now + self.policy.suspicion_max) {
            self.actions.push(Action::Send(node, Order::Ping));
        }
    }

    /// Ends a phase whose time is over: a change that is not prepared is abandoned, who does not commit is dismissed.
    fn overdue(&mut self, now: Instant) {
        let Some(change) = &self.change else { return };
        let waiting: Vec<NodeId> = change.waiting.iter().copied().collect();
        if matches!(change.phase, Phase::Preparing) {
            let labels: Vec<String> = waiting.iter().map(|n| self.label(*n)).collect();
            let why = format!("not prepared within {:?}: {}", self.policy.prepare_max, labels.join(", "));
            return self.abandon(&why, &waiting, now);
        }
        // Its state is unknown: the only safe view is one without it.
        for node in waiting {
            self.remove(node, &format!("did not commit within {:?}", self.policy.commit_max), End::Lost, now);
        }
    }

    fn remove(&mut self, node: NodeId, why: &str, end: End, now: Instant) {
        let Some(gone) = self.members.remove(node) else { return };
        self.loads.forget(node);
        if gone.role() == Role::Expert {
            self.loads.forget_slot(gone.slot);
        }
        let label = gone.label();
        let (in_order, drained) = (end != End::Lost, end == End::Drained);
        if in_order {
            tracing::info!(%node, label, why, "node left in good order");
        } else {
            tracing::warn!(%node, label, why, "node gone");
        }
        self.actions.push(Action::Gone { node, why: why.to_owned(), in_order, drained });
        if !gone.is_live() {
            return;
        }
        let covered = gone.role() == Role::Expert && self.view.as_ref().is_some_and(|v| self.is_covered(v));
        let pause = if covered && !in_order { self.policy.absence_max } else { Duration::ZERO };
        self.review_within(pause, now);
        let Some(change) = &mut self.change else { return };
        let is_member = names(&change.view, node);
        if !is_member {
            return;
        }
        if matches!(change.phase, Phase::Preparing) {
            return self.abandon(&format!("{label} is gone: {why}"), &[], now);
        }
        // Some may have committed already: the change goes through, and the next view is without the node.
        if change.waiting.remove(&node) {
            self.advance(now);
        }
    }

    fn failed(&mut self, node: NodeId, view: ViewId, reason: &str, now: Instant) {
        let Some(change) = self.change.as_ref().filter(|c| c.view.id == view) else { return };
        let is_member = names(&change.view, node);
        if !is_member {
            return;
        }
        if !matches!(change.phase, Phase::Preparing) {
            // It said Prepared before and broke its word: others may have committed, so it is the one to go.
            return self.remove(node, &format!("failed {view} after it had prepared it: {reason}"), End::Lost, now);
        }
        let why = format!("{}: {reason}", self.label(node));
        self.abandon(&why, &[node], now);
    }

    /// Leaves the view before in force, and tries again after a pause that grows with each failure in a row.
    fn abandon(&mut self, why: &str, blamed: &[NodeId], now: Instant) {
        let Some(Change { view, .. }) = self.change.take() else { return };
        if blamed.is_empty() {
            // A node that goes is no failure of the view: the next one is without the node, at once.
            tracing::info!(view = view.id.0, why, "view abandoned");
        } else {
            let doubled = self.policy.backoff_min.saturating_mul(1 << self.abandoned.min(16));
            let backoff = doubled.min(self.policy.backoff_max);
            self.abandoned = self.abandoned.saturating_add(1);
            tracing::warn!(view = view.id.0, why, retry_in = ?backoff, "view abandoned");
            self.review_within(backoff, now);
            self.blame(blamed, why, now);
        }
        // After the dismissals, so that nothing is sent to who is gone.
        for member in view.attention.iter().chain(&view.experts) {
            if self.members.get(member.node).is_some() {
                self.actions.push(Action::Send(member.node, Order::Abandon(view.id)));
            }
        }
    }

    /// Counts a failed view against nodes, and dismisses those that never served and keep failing.
    fn blame(&mut self, blamed: &[NodeId], why: &str, now: Instant) {
        for id in blamed {
            let serves = self.view.as_ref().is_some_and(|v| names(v, *id));
            let Some(node) = self.members.get_mut(*id) else { continue };
            node.failures += 1;
            if node.failures >= self.policy.prepare_failures_max && !serves {
                let failures = node.failures;
                self.remove(*id, &format!("failed {failures} views in a row, the last with: {why}"), End::Lost, now);
            }
        }
    }

    /// Issues a view for the present membership and load, if it differs from the view in force and suffices.
    fn begin(&mut self, now: Instant) {
        let Some((view, placed)) = self.plan() else { return };
        let waiting: BTreeSet<NodeId> = view.attention.iter().chain(&view.experts).map(|m| m.node).collect();
        let view = Arc::new(view);
        self.view_next += 1;
        tracing::info!(
            view = view.id.0,
            attention = view.attention.len(),
            experts = view.experts.len(),
            loads = placed.moves.len(),
            dropped = placed.dropped,
            deferred = placed.deferred,
            "preparing view"
        );
        // The first view moves nothing: nobody held anything.
        if self.view.is_some() {
            self.moved.count(&placed.moves, self.expert_bytes());
        }
        if placed.deferred {
            self.review_within(self.policy.debounce, now);
        }
        self.actions.extend(waiting.iter().map(|n| Action::Send(*n, Order::Prepare(Arc::clone(&view)))));
        self.change = Some(Change { view, phase: Phase::Preparing, waiting, until: now + self.policy.prepare_max });
    }

    fn plan(&self) -> Option<(View, Placed)> {
        let by_slot = |role, addressed: bool| {
            let addr = |n: &Node| if addressed { n.registration.addr.clone() } else { String::new() };
            let member = |n: &Node| Member { slot: n.slot, node: n.id, data_addr: addr(n) };
            let staying = self.members.live(role).filter(|n| !n.draining);
            let mut members: Vec<Member> = staying.map(member).collect();
            members.sort_by_key(|m| m.slot);
            members
        };
        // Attention nodes connect on the data plane and are never connected to.
        let (attention, experts) = (by_slot(Role::Attention, false), by_slot(Role::Expert, true));
        let (attention_min, experts_min) = match self.view {
            None => (self.policy.attention_min.max(1), self.policy.experts_min.max(1)),
            Some(_) => (1, 1),
        };
        if attention.len() < attention_min || experts.len() < experts_min {
            tracing::info!(
                attention = attention.len(),
                attention_min,
                experts = experts.len(),
                experts_min,
                "waiting for nodes"
            );
            return None;
        }
        let placed = match self.place(&experts) {
            Ok(placed) => placed,
            Err(error) => {
                tracing::error!(%error, "no placement");
                return None;
            }
        };
        let same = self.view.as_ref().is_some_and(|v| v.attention == attention && v.experts == experts);
        if same && placed.moves.is_empty() && placed.dropped == 0 {
            return None;
        }
        let placement = placed.placement.clone();
        Some((View { id: ViewId(self.view_next), attention, experts, placement }, placed))
    }

    fn committed(&mut self, node: NodeId, view: ViewId, now: Instant) {
        if self.answered(node, view, |phase| !matches!(phase, Phase::Preparing), now)
            && let Some(node) = self.members.get_mut(node)
        {
            node.committed = true;
            node.failures = 0;
        }
    }

    /// Counts a member's answer to the present phase; an answer to anything else is dropped.
    fn answered(&mut self, node: NodeId, view: ViewId, phase: impl Fn(&Phase) -> bool, now: Instant) -> bool {
        let expected = self.change.as_mut().filter(|c| c.view.id == view && phase(&c.phase));
        if !expected.is_some_and(|c| c.waiting.remove(&node)) {
            tracing::debug!(%node, %view, "answer that nobody awaits");
            return false;
        }
        self.advance(now);
        true
    }

    /// Goes on to the next phase as often as nobody is waited for.
    fn advance(&mut self, now: Instant) {
        while let Some(change) = self.change.as_mut().filter(|c| c.waiting.is_empty()) {
            let id = change.view.id;
            let next = match change.phase {
                Phase::Preparing => Phase::CommittingExperts,
                Phase::CommittingExperts => Phase::CommittingAttention,
                Phase::CommittingAttention => {
                    tracing::info!(view = id.0, "view committed");
                    self.abandoned = 0;
                    self.change = None;
                    return self.dismiss_drained(now);
                }
            };
            let group = match next {
                Phase::CommittingExperts => &change.view.experts,
                _ => &change.view.attention,
            };
            let live = |n: &NodeId| self.members.get(*n).is_some_and(Node::is_live);
            change.waiting = group.iter().map(|m| m.node).filter(live).collect();
            change.until = now + self.policy.commit_max;
            self.actions.extend(change.waiting.iter().map(|n| Action::Send(*n, Order::Commit(id))));
            if matches!(next, Phase::CommittingAttention) {
                // From here on frames of this view are welcome at every expert node.
                self.view = Some(Arc::clone(&change.view));
            }
            change.phase = next;
        }
    }

    /// Strikes every node out: the router goes.
    pub fn close(&mut self, why: &str) -> Vec<Action> {
        let nodes: Vec<NodeId> = self.members.iter().map(|n| n.id).collect();
        let gone = nodes.into_iter().filter_map(|node| self.members.remove(node));
        let gone = gone.map(|n| Action::Gone { node: n.id, why: why.to_owned(), in_order: true, drained: false });
        let actions = gone.collect();
        (self.change, self.review) = (None, None);
        actions
    }

    /// Why no request is taken, for people.
    pub fn why_not_serving(&self) -> MeshError {
        let count = |role| self.members.live(role).count();
        let (attention, experts) = (count(Role::Attention), count(Role::Expert));
        let Policy { attention_min, experts_min, .. } = self.policy;
        let what = match (&self.view, &self.change) {
            (_, Some(change)) => format!("{} is being prepared; try again in a moment", change.view.id),
            (None, None) => format!(
                "{attention} of {attention_min} attention and {experts} of {experts_min} expert nodes are here; start \
                 the others"
            ),
            (Some(_), None) => format!(
                "{attention} attention and {experts} expert nodes are left and cannot serve (the router's log says \
                 why); start more"
            ),
        };
        MeshError::new(Code::NotServing, what)
    }
}

// A check that cannot go on must panic, helpers included, and what was searched is printed.
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stdout)]
mod checked;
#[cfg(test)]
mod tests;
