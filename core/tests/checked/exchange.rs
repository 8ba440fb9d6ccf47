//! The model: lanes and plans of the real core, driven as an attention node's exchange drives them, over channels and
//! nodes that do anything.
//!
//! The driver is `attention-svc/src/runner/exchange.rs` without bytes and clock: a step of layers and micro-batches,
//! one dispatch of each at each layer, the wait for its lane, and what it does with frames that will not be answered.
//! Time is what a step of the model makes of it: a frame may count as silent at any moment.

use std::hash::{DefaultHasher, Hash};

use mesh_core::lanes::Lanes;
use mesh_core::placement::Placement;
use mesh_core::routing::{Destination, DispatchPlan, GateRule, Routing};
use mesh_core::view::{Member, View};
use mesh_core::{ExpertId, Lane, LayerId, NodeId, Seq, Slot, ViewId};

use crate::search::{Model, Owed};
use driver::{Failure, awaited, find_unanswerable, insert};

mod driver;

/// How large the mesh is, and what may happen to it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Micro-batches of a step, and lanes.
    pub batches: u8,
    pub layers: u16,
    pub nodes: u16,
    pub replicas: usize,
    /// Rows of a micro-batch.
    pub rows: usize,
    pub experts: usize,
    pub top_k: usize,
    /// Rows of a frame at most.
    pub frame_rows: usize,
    /// Steps, those that fail included.
    pub steps: u8,
    /// Faults in all: a channel closes, a node dies, hangs, refuses, counts as silent, answers twice.
    pub faults: u8,
    /// Whether another view, of one node less or with experts elsewhere, may come into force between steps.
    pub another_view: bool,
    /// Whether no step may fail. What fails a step however many holders there are does not happen then: that a frame is
    /// refused for its view, and that a dispatch takes longer than an answer may take at all.
    pub must_survive: bool,
    pub replays_max: u32,
    /// What the driver does wrong, to see that it is found.
    pub mistake: Option<Mistake>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// It takes answers of channels that are closed.
    AnyChannel,
    /// A step that fails keeps its lanes.
    KeepsLanes,
    /// It waits for silent nodes.
    WaitsForever,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Refusal {
    /// The node serves another view.
    View,
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Life {
    Well,
    /// It answers nothing any more; what was on its way may still come.
    Hung,
    Dead,
}

/// A channel of this node: the `opened`-th that was opened to `slot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct ChannelId {
    slot: Slot,
    opened: u8,
}

/// A dispatch under way, or its answer. Each pair's answer row is known by what it was computed from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Frame {
    channel: ChannelId,
    seq: Seq,
    view: ViewId,
    layer: LayerId,
    lane: Lane,
    pairs: Vec<(u32, ExpertId)>,
    /// Its answer came once and may come again.
    is_copy: bool,
}

/// A frame that the driver waits for.
#[derive(Clone, Debug, Hash)]
struct Sent {
    channel: ChannelId,
    seq: Seq,
    refused: Option<Refusal>,
    is_quiet: bool,
    is_replaced: bool,
    /// The frame that the counted answer was computed from.
    answer: Option<Frame>,
}

/// A run of a destination's rows.
#[derive(Clone, Copy, Debug, Hash)]
struct Chunk {
    destination: usize,
    rows: (usize, usize),
    pairs: (usize, usize),
}

#[derive(Clone, Debug, Hash)]
struct InFlight {
    lane: Lane,
    layer: LayerId,
    chunks: Vec<Chunk>,
    first_chunk: Vec<usize>,
    replays: u32,
}

#[derive(Clone, Debug, Default)]
struct Batch {
    plan: DispatchPlan,
    in_flight: Option<InFlight>,
}

#[derive(Clone, Copy, Debug, Hash)]
struct Peer {
    channel: ChannelId,
    seq_next: u64,
    /// The channel is closed, and the driver has not heard of it yet.
    is_broken: bool,
}

#[derive(Clone, Debug)]
pub struct State {
    lanes: Lanes,
    /// The next of a step's turns: each micro-batch's at the first layer, then at the second, and so on, and one more
    /// of each for its last answers. `None` between steps.
    turn: Option<u16>,
    steps: u8,
    faults: u8,
    view: usize,
    batches: Vec<Batch>,
    /// By lane.
    sent: Vec<Vec<Sent>>,
    /// By slot.
    peers: Vec<Option<Peer>>,
    opened: Vec<u8>,
    avoided: Vec<bool>,
    lives: Vec<Life>,
    net: Vec<Frame>,
    /// All was well when the step began, and nothing happened since.
    is_calm: bool,
}

#[derive(Clone, Debug)]
pub enum Step {
    /// The next step of the model begins.
    Begin,
    /// The driver goes on; which holders it chooses.
    Turn(usize),
    Answer(ChannelName),
    AnswerTwice(ChannelName),
    Refuse(ChannelName, bool),
    Close(Slot),
    HearClosed(Slot),
    Die(Slot),
    Hang(Slot),
    /// A frame of the lane that is waited for has been under way for too long.
    Silence(usize),
    /// The dispatch that is waited for has.
    GiveUp,
    /// A silent node is tried again.
    Forgive(Slot),
    Reconnect(Slot),
    ChangeView,
}

/// A frame under way, by its place, and for people by its channel and number.
#[derive(Clone, Debug)]
pub struct ChannelName(usize, #[allow(dead_code)] Slot, #[allow(dead_code)] u8, #[allow(dead_code)] Seq);

fn name(at: usize, frame: &Frame) -> ChannelName {
    ChannelName(at, frame.channel.slot, frame.channel.opened, frame.seq)
}

pub struct Exchange {
    pub setup: Setup,
    views: Vec<View>,
    /// Of each micro-batch.
    routing: Vec<Routing>,
}

fn view(id: u64, layers: u16, experts: usize, slots: &[Slot], replicas: usize) -> View {
    let layers: Vec<LayerId> = (0..layers).map(LayerId).collect();
    let member = |s: &Slot| Member { slot: *s, node: NodeId(s.0.into()), data_addr: String::new() };
    View {
        id: ViewId(id),
        attention: vec![],
        experts: slots.iter().map(member).collect(),
        placement: Placement::balanced(layers, experts, slots, replicas).unwrap(),
    }
}

impl Exchange {
    pub fn new(setup: Setup) -> Self {
        let Setup { batches, layers, nodes, replicas, rows, experts, top_k, .. } = setup;
        let slots: Vec<Slot> = (0..nodes).map(Slot).collect();
        let mut others = slots.clone();
        others.rotate_left(1);
        if slots.len() > replicas {
            others.pop();
        }
        let views = vec![view(1, layers, experts, &slots, replicas), view(2, layers, experts, &others, replicas)];
        // Each row wants a run of experts, each row another one.
        let routing = |batch: usize| {
            let wants = |row: usize, expert: usize| (expert + experts - (row + batch) % experts) % experts < top_k;
            let logits = (0..rows).flat_map(|row| (0..experts).map(move |e| if wants(row, e) { 1.0 } else { 0.0 }));
            let (logits, mut routing) = (logits.collect::<Vec<f32>>(), Routing::default());
            routing.softmax_top_k(&logits, experts, GateRule { top_k, normalise: true }).unwrap();
            routing
        };
        let routing = (0..usize::from(batches)).map(routing).collect();
        Self { setup, views, routing }
    }

    fn view<'a>(&'a self, s: &State) -> &'a View {
        &self.views[s.view]
    }

    /// Whether every expert has a holder for which `is_holder` is true.
    fn is_covered(&self, s: &State, is_holder: impl Fn(usize) -> bool) -> bool {
        self.view(s).placement.table().iter().all(|of| of.iter().any(|slot| is_holder(slot.index())))
    }

    fn batch_at(&self, turn: u16) -> usize {
        usize::from(turn) % usize::from(self.setup.batches)
    }

    /// The lane that is waited for.
    fn waited(&self, s: &State) -> Option<Lane> {
        s.batches[self.batch_at(s.turn?)].in_flight.as_ref().map(|of| of.lane)
    }

    /// Opens a channel to a node that is well.
    fn connect(&self, s: &mut State, slot: Slot) {
        let opened = &mut s.opened[slot.index()];
        *opened += 1;
        let channel = ChannelId { slot, opened: *opened };
        s.peers[slot.index()] = Some(Peer { channel, seq_next: 1, is_broken: false });
        s.avoided[slot.index()] = false;
    }

    fn change_view(&self, s: &mut State) {
        s.view = 1;
        let staying = &self.view(s).experts;
        for slot in (0..self.setup.nodes).map(Slot).filter(|slot| !staying.iter().any(|m| m.slot == *slot)) {
            self.lose(s, slot);
            s.avoided[slot.index()] = false;
        }
    }

    fn faults(&self, s: &State, steps: &mut Vec<(Step, Owed)>) {
        let mut add = |step| steps.push((step, Owed::No));
        for (at, frame) in s.net.iter().enumerate().filter(|(_, f)| !f.is_copy) {
            add(Step::AnswerTwice(name(at, frame)));
            add(Step::Refuse(name(at, frame), false));
            if !self.setup.must_survive {
                add(Step::Refuse(name(at, frame), true));
            }
        }
        for (slot, peer) in s.peers.iter().enumerate() {
            let name = Slot(slot as u16);
            if peer.is_some_and(|p| !p.is_broken) {
                add(Step::Close(name));
            }
            if peer.is_some() && s.lives[slot] == Life::Well {
                add(Step::Die(name));
                add(Step::Hang(name));
            }
        }
        let is_waiting = self.waited(s).is_some_and(|lane| !s.lanes.is_complete(lane));
        if is_waiting && !self.setup.must_survive {
            add(Step::GiveUp);
        }
    }

    /// The frames of the lane that is waited for which may count as silent, and whether they do so sooner or later.
    fn silences(&self, s: &State, steps: &mut Vec<(Step, Owed)>) {
        let Some(lane) = self.waited(s).filter(|_| self.setup.mistake != Some(Mistake::WaitsForever)) else { return };
        for index in awaited(s, lane) {
            let sent = &s.sent[lane.index()][index];
            let is_connected = s.peers[sent.channel.slot.index()].is_some();
            if !is_connected || sent.is_quiet || sent.refused.is_some() {
                continue;
            }
            let frame = s.net.iter().find(|f| f.channel == sent.channel && f.seq == sent.seq && !f.is_copy);
            let will_come = frame.is_some_and(|f| will_come(s, f));
            if !will_come {
                steps.push((Step::Silence(index), Owed::Yes));
            } else if s.faults > 0 {
                steps.push((Step::Silence(index), Owed::No));
            }
        }
    }
}

fn usable(s: &State, slot: usize) -> bool {
    s.peers[slot].is_some() && !s.avoided[slot]
}

/// Whether an answer comes by itself: its node is well and the channel open.
fn will_come(s: &State, frame: &Frame) -> bool {
    let slot = frame.channel.slot.index();
    let is_open = s.peers[slot].is_some_and(|p| p.channel == frame.channel && !p.is_broken);
    is_open && s.lives[slot] == Life::Well && !frame.is_copy
}

impl Model for Exchange {
    type State = State;
    type Step = Step;

    fn start(&self) -> State {
        let nodes = usize::from(self.setup.nodes);
        let batches = usize::from(self.setup.batches);
        let mut s = State {
            lanes: Lanes::new(self.setup.batches.into()),
            turn: None,
            steps: self.setup.steps,
            faults: self.setup.faults,
            view: 0,
            batches: vec![Batch::default(); batches],
            sent: vec![Vec::new(); batches],
            peers: vec![None; nodes],
            opened: vec![0; nodes],
            avoided: vec![false; nodes],
            lives: vec![Life::Well; nodes],
            net: Vec::new(),
            is_calm: false,
        };
        (0..self.setup.nodes).for_each(|slot| self.connect(&mut s, Slot(slot)));
        s
    }

    fn steps(&self, s: &State) -> Vec<(Step, Owed)> {
        let mut steps = Vec::new();
        if s.turn.is_none() && s.steps == 0 {
            return steps;
        }
        let is_ready = |lane| s.lanes.is_complete(lane) || find_unanswerable(s, lane).is_some();
        // Between steps, or with something to do within one: only then is it asked who is avoided.
        let may_choose = s.turn.is_none() || self.waited(s).is_none_or(is_ready);
        for (at, frame) in s.net.iter().enumerate() {
            let owed = if will_come(s, frame) { Owed::Yes } else { Owed::No };
            steps.push((Step::Answer(name(at, frame)), owed));
        }
        for (slot, peer) in s.peers.iter().enumerate() {
            let name = Slot(slot as u16);
            if peer.is_some_and(|p| p.is_broken) {
                steps.push((Step::HearClosed(name), Owed::Yes));
            }
            if s.avoided[slot] && may_choose {
                steps.push((Step::Forgive(name), Owed::Yes));
            }
            let is_member = self.view(s).experts.iter().any(|m| m.slot == name);
            if s.turn.is_none() && peer.is_none() && is_member && s.lives[slot] == Life::Well {
                steps.push((Step::Reconnect(name), Owed::Yes));
            }
        }
        if s.turn.is_none() {
            if s.steps > 0 && self.is_covered(s, |slot| usable(s, slot)) {
                steps.push((Step::Begin, Owed::Yes));
            }
            if s.view == 0 && self.setup.another_view {
                steps.push((Step::ChangeView, Owed::No));
            }
        } else {
            if may_choose {
                steps.extend((0..self.picks(s)).map(|pick| (Step::Turn(pick), Owed::Yes)));
            }
            self.silences(s, &mut steps);
        }
        if s.faults > 0 {
            self.faults(s, &mut steps);
        }
        steps
    }

    fn take(&self, s: &mut State, step: &Step) -> Result<(), String> {
        let is_fault = match step {
            Step::AnswerTwice(_) | Step::Refuse(..) | Step::Close(_) | Step::Die(_) | Step::Hang(_) => true,
            Step::GiveUp => true,
            Step::Silence(index) => self.waited(s).is_some_and(|lane| {
                let sent = &s.sent[lane.index()][*index];
                let comes = |f: &Frame| f.channel == sent.channel && f.seq == sent.seq && will_come(s, f);
                s.net.iter().any(comes)
            }),
            _ => false,
        };
        if is_fault {
            s.faults -= 1;
            s.is_calm = false;
        }
        match step {
            Step::Begin => {
                s.steps -= 1;
                s.turn = Some(0);
                let is_well = |m: &Member| {
                    let slot = m.slot.index();
                    let is_open = s.peers[slot].is_some_and(|p| !p.is_broken) && !s.avoided[slot];
                    is_open && s.lives[slot] == Life::Well
                };
                s.is_calm = self.view(s).experts.iter().all(is_well);
                Ok(())
            }
            Step::Turn(pick) => self.turn(s, *pick),
            Step::Answer(at) => {
                let frame = s.net.remove(at.0);
                self.take_frame(s, frame, None)
            }
            Step::AnswerTwice(at) => {
                let frame = s.net.remove(at.0);
                insert(&mut s.net, Frame { is_copy: true, ..frame.clone() });
                self.take_frame(s, frame, None)
            }
            Step::Refuse(at, for_its_view) => {
                let frame = s.net.remove(at.0);
                self.take_frame(s, frame, Some(if *for_its_view { Refusal::View } else { Refusal::Other }))
            }
            Step::Close(slot) => {
                s.peers[slot.index()].iter_mut().for_each(|p| p.is_broken = true);
                Ok(())
            }
            Step::Die(slot) => {
                s.lives[slot.index()] = Life::Dead;
                s.peers[slot.index()].iter_mut().for_each(|p| p.is_broken = true);
                Ok(())
            }
            Step::Hang(slot) => {
                s.lives[slot.index()] = Life::Hung;
                Ok(())
            }
            Step::HearClosed(slot) => {
                self.lose(s, *slot);
                Ok(())
            }
            Step::Silence(index) => {
                let lane = self.waited(s).ok_or("nobody is waited for")?;
                s.sent[lane.index()][*index].is_quiet = true;
                Ok(())
            }
            Step::GiveUp => {
                let lane = self.waited(s).ok_or("nobody is waited for")?;
                let silent = s.lanes.missing(lane).next().map_or(Failure::Nobody, |o| Failure::Silent(o.slot));
                self.fail(s, silent)
            }
            Step::Forgive(slot) => {
                s.avoided[slot.index()] = false;
                Ok(())
            }
            Step::Reconnect(slot) => {
                self.connect(s, *slot);
                Ok(())
            }
            Step::ChangeView => {
                self.change_view(s);
                Ok(())
            }
        }
    }

    fn key(&self, s: &State, hasher: &mut DefaultHasher) {
        let State { lanes, turn, steps, faults, view, batches, sent, peers, opened, avoided, lives, net, is_calm } = s;
        (lanes, turn, steps, faults, view).hash(hasher);
        for Batch { plan, in_flight } in batches {
            in_flight.hash(hasher);
            // What is not in flight is planned anew.
            if in_flight.is_some() {
                for Destination { slot, rows, pairs_per_row, experts } in plan.destinations() {
                    (slot, rows, pairs_per_row, experts).hash(hasher);
                }
                for c in (0..plan.rows()).flat_map(|row| plan.contributions(row)) {
                    (c.source.destination, c.source.pair).hash(hasher);
                }
            }
        }
        (sent, peers, opened, avoided, lives, net, is_calm).hash(hasher);
    }

    fn is_done(&self, s: &State) -> bool {
        let is_well = |slot: usize| s.lives[slot] == Life::Well;
        s.turn.is_none() && (s.steps == 0 || !self.is_covered(s, is_well))
    }
}
