//! The two-phase change of views, checked exhaustively for small meshes (docs/decisions/0005-checked-protocol.md).
//!
//! The router is the real state machine; nodes are modelled. Every session keeps its order, and no two have any between
//! them. `MESH_CHECK_DEEP=1` searches more; both print what they searched.

mod nodes;
// Shared with core's check: a search of two hundred lines is no crate.
#[path = "../../../core/tests/checked/search.rs"]
mod search;

use std::hash::{DefaultHasher, Hash};
use std::time::{Duration, Instant};

use mesh_core::view::View;
use mesh_core::{NodeId, Role};
use mesh_proto::v1;

use super::{Action, Event, Mesh, Order, Policy, names};
use crate::membership::Node;
use crate::membership::tests::request;
use nodes::{Process, Said};
use search::{Flaw, Model, Owed, check, is_deep, search};

/// The clock's step: time passes in whole ones, but for the search only their order counts.
const TICK: Duration = Duration::from_secs(1);
/// What is later than this is never.
const NEVER: Duration = Duration::from_secs(1 << 30);
/// How long a member may take to prepare, and to commit.
const PHASE_MAX: Duration = Duration::from_secs(2);

/// How long an expert node serves a view that was replaced: both phases of committing, and then some.
const LINGER: Duration = Duration::from_secs(5);

/// How large the mesh is, and what may happen to it.
#[derive(Clone, Copy, Debug)]
struct Setup {
    attention: usize,
    experts: usize,
    replicas: usize,
    /// Whether the first view is in force at the start.
    is_served: bool,
    /// How long expert nodes serve a view that was replaced.
    linger: Duration,
    /// Experts that one change moves at most.
    moves_max: u64,
    /// How often a node dies, loses its session, leaves or cannot prepare, in all.
    faults: u8,
    drains: u8,
    joins: u8,
    /// How often time passes while there is something on its way, and how much.
    passes: u8,
    pass: Duration,
}

#[derive(Clone, Debug)]
struct State {
    mesh: Mesh,
    now: Instant,
    nodes: Vec<Process>,
    left: Setup,
    /// The largest view prepared so far.
    issued: u64,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A node does its next order.
    Obey(NodeId),
    /// A node is told of the end of a change before it began to prepare.
    Skip(NodeId),
    /// The router hears what a node says.
    Hear(NodeId),
    /// A node cannot do its next order, which is to prepare.
    Fail(NodeId),
    Die(NodeId),
    /// The router takes a node for lost: its session broke, or it was not heard for a lease.
    Lose(NodeId),
    /// A node goes by itself.
    Leave(NodeId),
    Drain(NodeId),
    Join(Role),
    /// Time passes though there is something on its way.
    Pass,
    /// Nothing is on its way: the next that happens is a deadline.
    Wait,
}

impl Setup {
    fn policy(&self) -> Policy {
        Policy {
            version: "1.0".into(),
            attention_min: 1,
            experts_min: 1,
            replicas: self.replicas,
            hello_max: NEVER * 2,
            lease: NEVER * 2,
            prepare_max: PHASE_MAX,
            commit_max: PHASE_MAX,
            debounce: TICK,
            absence_max: 2 * TICK,
            balance_every: NEVER * 2,
            rates_every: Duration::from_secs(1 << 20),
            hot_replicas: 0,
            // Nodes do not say how large an expert is: it counts as one byte.
            moves_bytes_max: self.moves_max,
            suspicion_max: NEVER,
            backoff_min: TICK,
            backoff_max: 2 * TICK,
            prepare_failures_max: 2,
        }
    }
}

impl State {
    fn node(&self, node: NodeId) -> Option<&Process> {
        self.nodes.iter().find(|p| p.node == node)
    }

    fn node_mut(&mut self, node: NodeId) -> Result<&mut Process, String> {
        self.nodes.iter_mut().find(|p| p.node == node).ok_or_else(|| format!("{node} is no member"))
    }

    fn join(&mut self, role: Role) -> Result<(), String> {
        // Short strings: every step of the search copies them.
        let model = v1::ModelInfo { moe_layers: vec![0], experts: 4, ..Default::default() };
        let request = v1::RegisterRequest { name: String::new(), model: Some(model), ..request(role) };
        let registration = request.try_into().map_err(|e| format!("{e}"))?;
        let node = self.mesh.register(registration, [7; 32], self.now).map_err(|e| e.to_string())?.id;
        self.nodes.push(Process::new(node, role));
        let actions = self.mesh.hello(node, &[7; 32], self.now).map_err(|e| e.to_string())?;
        self.act(actions)
    }

    fn on(&mut self, event: Event) -> Result<(), String> {
        let (view, committing) = (self.mesh.view.clone(), self.mesh.change.as_ref().map(|c| c.view.clone()));
        let actions = self.mesh.step(event, self.now);
        let new = self.mesh.view.as_ref().filter(|new| view.as_ref() != Some(new));
        if new.is_some_and(|new| Some(new) != committing.as_ref() || view.is_some_and(|before| before.id >= new.id)) {
            return Err(format!("{new:?} comes into force out of nothing"));
        }
        self.act(actions)
    }

    fn pass(&mut self, by: Duration) -> Result<(), String> {
        self.now += by;
        let now = self.now;
        self.nodes.iter_mut().for_each(|p| p.expire(now));
        self.on(Event::Tick)
    }

    fn act(&mut self, actions: Vec<Action>) -> Result<(), String> {
        let (mut drained, before) = (Vec::new(), self.issued);
        for action in actions {
            match action {
                Action::Send(node, order) => {
                    if let Order::Prepare(view) = &order {
                        if view.id.0 <= before {
                            return Err(format!("{} is prepared after view {before}", view.id));
                        }
                        self.issued = view.id.0;
                    }
                    self.node_mut(node)?.orders.push_back(order);
                }
                Action::HandOver(_) => {}
                Action::Gone { node, drained: is_drained, .. } => {
                    let gone = self.nodes.iter().position(|p| p.node == node);
                    let gone = self.nodes.remove(gone.ok_or_else(|| format!("{node} goes twice"))?);
                    drained.extend(is_drained.then_some(gone));
                }
            }
        }
        drained.iter().try_for_each(|gone| self.check_drained(gone))
    }

    /// A drained node is dismissed when nobody needs it, or when nobody could take over from it.
    fn check_drained(&self, gone: &Process) -> Result<(), String> {
        let needs = |p: &&Process| p.role == Role::Attention && p.is_alive && in_force(p, gone.node);
        match self.nodes.iter().find(needs) {
            Some(needs) if self.staying(gone.role).next().is_some() => {
                Err(format!("{} is drained and dismissed while {} has it in its view", gone.node, needs.node))
            }
            _ => Ok(()),
        }
    }

    fn staying(&self, role: Role) -> impl Iterator<Item = &Node> {
        self.mesh.members.live(role).filter(|n| !n.draining)
    }

    /// Whether something is on its way, or done without any time passing.
    fn is_busy(&self) -> bool {
        self.nodes.iter().any(Process::is_busy)
    }

    /// Whether a node that prepares a view can: an attention node has to reach every expert node of it.
    fn can_prepare(&self, of: &Process) -> bool {
        let Some(Order::Prepare(view)) = of.orders.front() else { return true };
        let is_alive = |node| self.node(node).is_some_and(|p| p.is_alive);
        of.role == Role::Expert || view.experts.iter().all(|m| is_alive(m.node))
    }

    /// No frame of an attention node is refused for its view: every expert node of the view that it has in force serves
    /// that, and had it in force before.
    fn check_views(&self) -> Result<(), String> {
        for of in self.nodes.iter().filter(|p| p.role == Role::Attention && p.is_alive) {
            let Some(view) = &of.in_force else { continue };
            let had_it = |p: &Process| p.in_force.as_ref().is_some_and(|v| v.id >= view.id);
            let mut experts = view.experts.iter().filter_map(|m| self.node(m.node)).filter(|p| p.is_alive);
            if let Some(refuses) = experts.find(|p| !p.serves(view.id) || !had_it(p)) {
                return Err(format!("{} has {} in force and {} does not serve it", of.node, view.id, refuses.node));
            }
        }
        Ok(())
    }
}

fn in_force(of: &Process, node: NodeId) -> bool {
    of.in_force.as_ref().is_some_and(|v| names(v, node))
}

/// Not before: as the state machine looks at deadlines.
fn until(at: Instant, now: Instant) -> u64 {
    at.saturating_duration_since(now).as_secs()
}

fn hash_view(view: &View, hasher: &mut DefaultHasher) {
    view.id.hash(hasher);
    view.attention.iter().for_each(|m| m.node.hash(hasher));
    view.experts.iter().for_each(|m| m.node.hash(hasher));
}

impl Model for Setup {
    type State = State;
    type Step = Step;

    fn start(&self) -> State {
        let mesh = Mesh::new(self.policy());
        let mut state = State { mesh, now: Instant::now(), nodes: Vec::new(), left: *self, issued: 0 };
        let roles = std::iter::repeat_n(Role::Attention, self.attention);
        for role in roles.chain(std::iter::repeat_n(Role::Expert, self.experts)) {
            state.join(role).unwrap();
        }
        while self.is_served && !self.is_done(&state) {
            let steps = self.steps(&state);
            let (step, _) = steps.iter().find(|(_, owed)| *owed == Owed::Yes).expect("a first view comes by itself");
            self.take(&mut state, step).unwrap();
        }
        state
    }

    fn steps(&self, s: &State) -> Vec<(Step, Owed)> {
        let mut steps = Vec::new();
        for p in &s.nodes {
            if !p.said.is_empty() {
                steps.push((Step::Hear(p.node), Owed::Yes));
            }
            if p.is_alive && !p.orders.is_empty() {
                steps.push((Step::Obey(p.node), Owed::Yes));
            }
            if p.is_alive && p.may_skip() {
                steps.push((Step::Skip(p.node), Owed::No));
            }
        }
        let due = s.mesh.due().map(|due| due.saturating_duration_since(s.now)).filter(|due| *due < NEVER);
        if !s.is_busy() && due.is_some() {
            steps.push((Step::Wait, Owed::Yes));
        }
        let mut may = |step| steps.push((step, Owed::No));
        for p in s.nodes.iter().filter(|p| p.is_alive) {
            if s.left.faults > 0 {
                [Step::Die, Step::Lose, Step::Leave].into_iter().for_each(|fault| may(fault(p.node)));
                if matches!(p.orders.front(), Some(Order::Prepare(_))) && s.can_prepare(p) {
                    may(Step::Fail(p.node));
                }
            }
            if s.left.drains > 0 && s.mesh.members.get(p.node).is_some_and(|n| !n.draining) {
                may(Step::Drain(p.node));
            }
        }
        if s.left.joins > 0 {
            may(Step::Join(Role::Attention));
            may(Step::Join(Role::Expert));
        }
        if s.left.passes > 0 && s.is_busy() {
            may(Step::Pass);
        }
        steps
    }

    fn take(&self, s: &mut State, step: &Step) -> Result<(), String> {
        let now = s.now;
        match *step {
            Step::Obey(node) | Step::Fail(node) => {
                let fails = matches!(step, Step::Fail(_));
                s.left.faults -= u8::from(fails);
                let can = s.node(node).is_some_and(|p| s.can_prepare(p));
                s.node_mut(node)?.obey(fails || !can, self.linger, now);
            }
            Step::Skip(node) => s.node_mut(node)?.skip(),
            Step::Hear(node) => {
                let said = s.node_mut(node)?.said.pop_front().ok_or("nothing was said")?;
                s.on(said.event(node))?;
            }
            Step::Die(node) => {
                s.left.faults -= 1;
                let node = s.node_mut(node)?;
                node.is_alive = false;
                node.said.push_back(Said::Ended);
            }
            Step::Lose(node) => {
                s.left.faults -= 1;
                s.on(Event::Lost(node, "no heartbeat within its lease".into()))?;
            }
            Step::Leave(node) => {
                s.left.faults -= 1;
                s.node_mut(node)?.said.push_back(Said::Leaving);
            }
            Step::Drain(node) => {
                s.left.drains -= 1;
                s.on(Event::Draining(node, "asked for".into()))?;
            }
            Step::Join(role) => {
                s.left.joins -= 1;
                s.join(role)?;
            }
            Step::Pass => {
                s.left.passes -= 1;
                s.pass(self.pass)?;
            }
            Step::Wait => {
                if let Some(change) = &s.mesh.change {
                    return Err(format!("{} waits for {:?}, who have nothing to say", change.view.id, change.waiting));
                }
                let due = s.mesh.due().map_or(Duration::ZERO, |due| due.saturating_duration_since(now));
                s.pass(due)?;
            }
        }
        s.check_views()
    }

    fn key(&self, s: &State, hasher: &mut DefaultHasher) {
        let State { mesh, now, nodes, left, issued } = s;
        (issued, left.faults, left.drains, left.joins, left.passes).hash(hasher);
        (mesh.view_next, mesh.abandoned, mesh.review.map(|at| until(at, *now))).hash(hasher);
        (until(mesh.balance_at, *now) > 0).hash(hasher);
        for view in [&mesh.view, &mesh.change.as_ref().map(|c| c.view.clone())] {
            if let Some(view) = view {
                hash_view(view, hasher);
                view.placement.table().hash(hasher);
            }
            view.is_some().hash(hasher);
        }
        let change = mesh.change.as_ref();
        change.map(|c| (c.phase, &c.waiting, until(c.until, *now))).hash(hasher);
        for n in mesh.members.iter() {
            (n.id, n.slot, n.role(), n.is_live(), n.committed, n.draining, n.failures).hash(hasher);
        }
        for p in nodes {
            (p.node, p.is_alive, p.previous.as_ref().map(|(_, at)| until(*at, *now)), &p.said).hash(hasher);
            let previous = p.previous.as_ref().map(|(v, _)| v);
            for view in [p.in_force.as_ref(), p.prepared.as_ref(), previous] {
                view.inspect(|v| hash_view(v, hasher)).is_some().hash(hasher);
            }
            for order in &p.orders {
                match order {
                    Order::Prepare(view) => hash_view(view, hasher),
                    Order::Commit(view) => (1, view).hash(hasher),
                    Order::Abandon(view) => (2, view).hash(hasher),
                    Order::Ping => 3.hash(hasher),
                }
            }
            p.orders.len().hash(hasher);
        }
    }

    /// Nothing is on its way, and a view of exactly the nodes that stay is in force everywhere; where there are none of
    /// a role, whom they could not replace is gone.
    fn is_done(&self, s: &State) -> bool {
        if s.is_busy() || s.mesh.change.is_some() || s.mesh.review.is_some() {
            return false;
        }
        let stays = |role| s.staying(role).next().is_some();
        let mut draining = s.mesh.members.iter().filter(|n| n.draining);
        if !stays(Role::Attention) || !stays(Role::Expert) {
            return draining.all(|n| stays(n.role()));
        }
        let Some(view) = &s.mesh.view else { return false };
        let of_view = view.attention.iter().chain(&view.experts).map(|m| m.node);
        let have_it =
            |p: &Process| p.is_alive && p.prepared.is_none() && p.in_force.as_ref().is_some_and(|v| v == view);
        let mut members: Vec<NodeId> = s.nodes.iter().map(|p| p.node).collect();
        let mut named: Vec<NodeId> = of_view.collect();
        members.sort_unstable();
        named.sort_unstable();
        draining.next().is_none() && members == named && s.nodes.iter().all(have_it) && s.mesh.is_serving()
    }
}

/// One attention node and two expert nodes that serve; a node fails.
const SERVED: Setup = Setup {
    attention: 1,
    experts: 2,
    replicas: 1,
    is_served: true,
    linger: LINGER,
    moves_max: u64::MAX,
    faults: 1,
    drains: 0,
    joins: 0,
    passes: 0,
    pass: PHASE_MAX,
};

#[test]
fn whatever_happens_views_follow_each_other_safely_and_the_mesh_recovers() {
    for (of, setup) in [
        ("1A2E, a node fails and one joins", Setup { faults: 2, joins: 1, ..SERVED }),
        ("1A2E, a node joins, experts move one at a time", Setup { joins: 1, moves_max: 1, ..SERVED }),
        ("2A2E, nodes fail, one is drained", Setup { attention: 2, faults: 2, drains: 1, ..SERVED }),
        ("2A3E, a node fails, one is drained", Setup { attention: 2, experts: 3, drains: 1, ..SERVED }),
        ("1A3E with replicas, nodes fail", Setup { experts: 3, replicas: 2, faults: 2, drains: 1, ..SERVED }),
        ("1A2E, all are drained", Setup { faults: 0, drains: 3, ..SERVED }),
        ("1A2E from nothing, slow", Setup { is_served: false, drains: 1, passes: 1, ..SERVED }),
        ("1A2E, slow, a node joins", Setup { faults: 0, joins: 1, passes: 4, pass: TICK, ..SERVED }),
    ] {
        check(of, &setup);
    }
    if is_deep() {
        for (of, setup) in [
            ("1A2E, nodes fail, one joins, one is drained", Setup { joins: 1, drains: 1, ..SERVED }),
            ("1A2E, three faults, one joins", Setup { faults: 3, joins: 1, ..SERVED }),
            ("2A2E, three faults, one is drained", Setup { attention: 2, faults: 3, drains: 1, ..SERVED }),
            ("2A3E, two faults, one is drained", Setup { attention: 2, experts: 3, faults: 2, drains: 1, ..SERVED }),
            ("2A2E, a node fails, one joins", Setup { attention: 2, joins: 1, ..SERVED }),
            ("1A2E, two join", Setup { faults: 0, joins: 2, ..SERVED }),
            ("1A2E, a node fails, one joins, slow", Setup { joins: 1, passes: 2, ..SERVED }),
        ] {
            check(of, &setup);
        }
    }
}

/// A search that finds nothing has to show that it would find something. This is also why an expert node has to serve a
/// view that was replaced for longer than both phases of committing may take.
#[test]
fn a_replaced_view_that_is_served_for_one_phase_of_committing_only_is_found_out() {
    let short = Setup { faults: 0, joins: 1, passes: 2, pass: TICK, linger: PHASE_MAX, ..SERVED };
    let found = search(&short).map(|searched| format!("{searched:?}")).expect_err("frames are refused");
    assert!(matches!(&found, Flaw::Broken { what, .. } if what.contains("does not serve it")), "{found}");
}
