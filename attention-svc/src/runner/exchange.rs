//! The exchange with the expert nodes: one frame to each that gets rows, one answer from each, nobody else waited for.
//!
//! Experts are pure, so rows that a node owes when it dies, falls silent or refuses them are sent to other holders of the
//! same experts at once, and whatever still comes of the first frames is refused as late (invariants 2 and 3). Where an
//! expert has no other holder the step fails, to be computed again once the mesh holds it.

mod waiting;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::lanes::{Answer, Lanes, Owed};
use mesh_core::routing::{Destination, DispatchPlan, Routing};
use mesh_core::view::{Member, View};
use mesh_core::{Lane, LayerId, NodeId, Role, Seq, Slot, ViewId};
use mesh_kernels::rows::Rows;
use mesh_transport::buffer::FrameBuf;
use mesh_transport::frame::{self, AbortReason, FrameHeader, Kind};
use mesh_transport::{ChannelId, Event, Transport, TransportError};

use super::counters::RunnerCounters;
use super::error::RunError;
use super::outside::Outside;
use super::peers::{self, Peers};

/// The bounds of an exchange.
#[derive(Clone, Copy, Debug)]
pub struct ExchangeLimits {
    /// Exchanges in flight at once.
    pub lanes: u16,
    /// How long an answer may take before its node counts as silent, however slow answers were before; after half of it the
    /// router is told.
    pub silence_min: Duration,
    /// How long an answer may take at all.
    pub answer_max: Duration,
    /// How long connecting to one expert node may take.
    pub connect_max: Duration,
    /// Largest frame body, bytes; rows beyond it travel in further frames.
    pub body_bytes_max: usize,
}

/// One frame of a dispatch: a run of a destination's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Chunk {
    destination: usize,
    rows: (usize, usize),
    pairs: (usize, usize),
}

/// A dispatch that was sent.
#[derive(Debug)]
pub(super) struct InFlight {
    lane: Lane,
    layer: LayerId,
    view: Arc<View>,
    chunks: Vec<Chunk>,
    /// For each destination, the chunk in which it begins.
    first_chunk: Vec<usize>,
    row_bytes: usize,
    /// When it is given up.
    until: Instant,
    /// How often rows of it were sent to another holder.
    replays: u32,
}

/// A frame on its way, and its answer.
struct Sent {
    slot: Slot,
    seq: Seq,
    at: Instant,
    /// What it asks for, in the units of [`peers::work`].
    work: f64,
    /// Bytes that its answer must have.
    answer_bytes: usize,
    /// When the router was told last that its answer is late.
    told: Option<Instant>,
    /// Its node refused it.
    refused: Option<AbortReason>,
    answer: Option<FrameBuf>,
}

/// How long a node whose channel closed may take to be connected again while others wait.
const RECONNECT_MAX: Duration = Duration::from_millis(50);

struct Peer {
    member: Member,
    channel: ChannelId,
    seq_next: u64,
}

/// This node's end of the all-to-all.
pub(super) struct Exchange {
    transport: Box<dyn Transport>,
    slot: Slot,
    limits: ExchangeLimits,
    lanes: Lanes,
    view: Option<Arc<View>>,
    prepared: Option<Arc<View>>,
    /// Open channels by the node behind them.
    peers: HashMap<NodeId, Peer>,
    /// Slot to node under the committed view.
    nodes: Vec<Option<NodeId>>,
    /// How the slots of the committed view do.
    health: Peers,
    /// By lane, by position in the dispatch.
    sent: Vec<Vec<Sent>>,
    events: Vec<Event>,
    outside: Outside,
    /// Whether a channel closed since the last [`Exchange::take_closed`].
    closed: bool,
    counters: Arc<RunnerCounters>,
}

impl Exchange {
    pub fn new(
        transport: Box<dyn Transport>,
        slot: Slot,
        limits: ExchangeLimits,
        counters: Arc<RunnerCounters>,
        outside: Outside,
    ) -> Self {
        counters.set_lanes(limits.lanes.into(), limits.lanes.into());
        Self {
            transport,
            slot,
            limits,
            lanes: Lanes::new(limits.lanes),
            view: None,
            prepared: None,
            peers: HashMap::new(),
            nodes: Vec::new(),
            health: Peers::new(limits.silence_min, limits.answer_max),
            sent: (0..limits.lanes).map(|_| Vec::new()).collect(),
            events: Vec::new(),
            outside,
            closed: false,
            counters,
        }
    }

    pub fn outside(&self) -> &Outside {
        &self.outside
    }

    pub fn transport(&self) -> &dyn Transport {
        self.transport.as_ref()
    }

    /// The committed view, if each of its experts has a holder that rows can be sent to.
    pub fn serving(&self) -> Option<&Arc<View>> {
        let now = Instant::now();
        let usable = |slot: &Slot| self.health.usable(*slot, now);
        // Every step asks: the table of all experts is gone through only while somebody is missing.
        let everybody = |v: &View| v.experts.iter().all(|m| usable(&m.slot));
        let covered = |v: &View| v.placement.table().iter().all(|holders| holders.iter().any(usable));
        self.view.as_ref().filter(|v| everybody(v) || covered(v))
    }

    /// The committed view.
    pub fn view(&self) -> Option<&Arc<View>> {
        self.view.as_ref()
    }

    /// When silence may have ended that keeps the view from being served.
    pub fn next_try(&self) -> Option<Instant> {
        self.health.next_try(Instant::now())
    }

    /// Whether a node of the committed view is not connected.
    pub fn lacks(&self) -> bool {
        self.view.as_ref().is_some_and(|v| v.experts.iter().any(|m| !self.peers.contains_key(&m.node)))
    }

    /// Connects to the expert nodes of a view that are not connected yet. The committed view serves on.
    pub fn prepare(&mut self, view: Arc<View>) -> Result<(), RunError> {
        for member in &view.experts {
            self.connect(member, self.limits.connect_max)?;
        }
        self.prepared = Some(view);
        Ok(())
    }

    fn connect(&mut self, member: &Member, within: Duration) -> Result<(), RunError> {
        if self.peers.contains_key(&member.node) {
            return Ok(());
        }
        let lost = |what: String| RunError::NodeLost { slot: member.slot, node: member.node, what };
        let deadline = Instant::now() + within;
        let (channel, identity) =
            self.transport.connect(&member.data_addr, deadline).map_err(|e| lost(format!("cannot connect: {e}")))?;
        if identity.role != Role::Expert || identity.slot != member.slot || identity.node != member.node {
            self.transport.close(channel);
            let (role, slot, node) = (identity.role, identity.slot, identity.node);
            return Err(lost(format!("{} is {role} {slot} {node}", member.data_addr)));
        }
        self.peers.insert(member.node, Peer { member: member.clone(), channel, seq_next: 1 });
        Ok(())
    }

    /// Puts the prepared view in force and closes the channels that it no longer needs. Nothing may be in flight.
    pub fn commit(&mut self, id: ViewId) -> Result<(), RunError> {
        let view = match self.prepared.take() {
            Some(view) if view.id == id => view,
            other => {
                let prepared = other.as_ref().map(|v| v.id);
                self.prepared = other;
                return Err(RunError::NotPrepared { id, prepared });
            }
        };
        let leaving: Vec<NodeId> =
            self.peers.keys().filter(|n| !view.experts.iter().any(|m| m.node == **n)).copied().collect();
        for node in leaving {
            if let Some(peer) = self.peers.remove(&node) {
                self.transport.close(peer.channel);
            }
        }
        let slots = view.experts.iter().map(|m| m.slot.index() + 1).max().unwrap_or(0);
        let before = std::mem::replace(&mut self.nodes, vec![None; slots]);
        for slot in (slots..before.len()).map(|slot| Slot(slot as u16)) {
            self.health.reset(slot, false);
        }
        for member in &view.experts {
            self.nodes[member.slot.index()] = Some(member.node);
        }
        for (index, node) in self.nodes.iter().enumerate() {
            let connected = node.is_some_and(|n| self.peers.contains_key(&n));
            if before.get(index).copied().flatten() == *node {
                self.health.set_connected(Slot(index as u16), connected);
            } else {
                self.health.reset(Slot(index as u16), connected);
            }
        }
        self.view = Some(view);
        Ok(())
    }

    /// Forgets a prepared view and closes the channels that only it needed.
    pub fn abandon(&mut self, id: ViewId) {
        if self.prepared.as_ref().is_none_or(|v| v.id != id) {
            return;
        }
        self.prepared = None;
        let kept: Vec<NodeId> = self.view.iter().flat_map(|v| v.experts.iter().map(|m| m.node)).collect();
        let only: Vec<NodeId> = self.peers.keys().filter(|n| !kept.contains(n)).copied().collect();
        for node in only {
            if let Some(peer) = self.peers.remove(&node) {
                self.transport.close(peer.channel);
            }
        }
    }

    /// Tries once more to reach nodes of the committed view whose channel closed.
    pub fn reconnect(&mut self) {
        let Some(view) = self.view.clone() else { return };
        for member in view.experts.iter().filter(|m| !self.peers.contains_key(&m.node)).cloned().collect::<Vec<_>>() {
            match self.connect(&member, RECONNECT_MAX) {
                Ok(()) => self.health.reset(member.slot, true),
                Err(error) => tracing::debug!(%error, "expert node still out of reach"),
            }
        }
    }

    /// Plans which nodes compute the experts of a batch.
    ///
    /// # Errors
    /// [`RoutingError::Unreachable`] above all.
    pub fn plan(
        &mut self,
        plan: &mut DispatchPlan,
        routing: &Routing,
        view: &View,
        layer: LayerId,
    ) -> Result<(), RunError> {
        let (health, now) = (&mut self.health, Instant::now());
        health.begin(view.placement.experts(), now);
        let planned =
            plan.rebuild(routing, view, layer, |_, expert, holders| health.choose(expert, holders, None, now));
        planned.map_err(|error| RunError::Routing { layer, error })
    }

    /// Sends the planned rows, each destination's in as many frames as its bytes need.
    pub fn dispatch(
        &mut self,
        view: &Arc<View>,
        layer: LayerId,
        plan: &DispatchPlan,
        rows: Rows<'_>,
    ) -> Result<InFlight, RunError> {
        let row_bytes = rows.cols * rows.dtype.bytes();
        let (chunks, first_chunk) = chunk(plan.destinations(), 0, row_bytes, self.limits.body_bytes_max);
        let owed = self.owe(&chunks, plan, view)?;
        let lane = self.lanes.begin(view.id, layer, owed.iter().map(|(owed, _)| *owed));
        let lane = lane.ok_or(RunError::NoLane { lanes: self.limits.lanes })?;
        self.count_lanes();
        self.sent[lane.index()].clear();
        let until = Instant::now() + self.limits.answer_max;
        let in_flight =
            InFlight { lane, layer, view: Arc::clone(view), chunks, first_chunk, row_bytes, until, replays: 0 };
        self.send_chunks(&in_flight, 0, &owed, plan, rows)?;
        Ok(in_flight)
    }

    /// What chunks will be owed, and how much work each is.
    fn owe(&mut self, chunks: &[Chunk], plan: &DispatchPlan, view: &View) -> Result<Vec<(Owed, f64)>, RunError> {
        let mut owed = Vec::with_capacity(chunks.len());
        for c in chunks {
            let slot = plan.destinations()[c.destination].slot;
            let pairs = c.pairs.1 - c.pairs.0;
            let peer = self.peer(view, slot)?;
            let seq = Seq(peer.seq_next);
            peer.seq_next += 1;
            let work = peers::work(pairs, view.placement.experts());
            owed.push((Owed { slot, seq, pairs: pairs as u32 }, work));
        }
        Ok(owed)
    }

    /// Sends the chunks from `first` on, which are owed as said. A node that cannot be sent to is lost: waiting for its answer
    /// finds that.
    fn send_chunks(
        &mut self,
        of: &InFlight,
        first: usize,
        owed: &[(Owed, f64)],
        plan: &DispatchPlan,
        rows: Rows<'_>,
    ) -> Result<(), RunError> {
        for (index, (Owed { slot, seq, pairs }, work)) in owed.iter().enumerate().map(|(i, o)| (first + i, *o)) {
            let (at, answer_bytes) = (Instant::now(), pairs as usize * of.row_bytes);
            let sent = Sent { slot, seq, at, work, answer_bytes, told: None, refused: None, answer: None };
            self.sent[of.lane.index()].push(sent);
            self.send_chunk(of, index, seq, &plan.destinations()[of.chunks[index].destination], rows)?;
        }
        Ok(())
    }

    fn send_chunk(
        &mut self,
        of: &InFlight,
        index: usize,
        seq: Seq,
        destination: &Destination,
        rows: Rows<'_>,
    ) -> Result<(), RunError> {
        let c = of.chunks[index];
        let (row_count, pairs) = (c.rows.1 - c.rows.0, c.pairs.1 - c.pairs.0);
        let bytes = frame::dispatch_body_bytes(row_count, pairs, of.row_bytes);
        let bytes = bytes.ok_or(RunError::Internal(format!("a frame of {row_count} rows and {pairs} pairs")))?;
        let mut body = self.buffer(bytes, destination.slot)?;
        let counts = &destination.pairs_per_row[c.rows.0..c.rows.1];
        let place = frame::write_dispatch(&mut body, counts, &destination.experts[c.pairs.0..c.pairs.1]);
        for (place, row) in place.chunks_exact_mut(of.row_bytes).zip(&destination.rows[c.rows.0..c.rows.1]) {
            place.copy_from_slice(&rows.bytes[*row as usize * of.row_bytes..][..of.row_bytes]);
        }
        let header = FrameHeader {
            kind: Kind::Dispatch,
            flags: 0,
            view: of.view.id,
            seq,
            layer: of.layer,
            lane: of.lane,
            chunk: index as u16,
            chunks: of.chunks.len() as u16,
            rows: row_count as u32,
            pairs: pairs as u32,
            row_bytes: of.row_bytes as u32,
            body_bytes: bytes as u32,
            server_ns: 0,
            origin: self.slot,
        };
        let Ok(peer) = self.peer(&of.view, destination.slot) else { return Ok(()) };
        let (channel, node) = (peer.channel, peer.member.node);
        match self.transport.send(channel, &header, body) {
            Ok(()) => self.counters.sent(row_count, pairs, row_count * of.row_bytes),
            Err(error) => {
                self.transport.close(channel);
                self.lose(node, &error.to_string());
            }
        }
        Ok(())
    }

    /// A body out of the window, waiting (bounded) for one to come back when it is full.
    fn buffer(&mut self, bytes: usize, slot: Slot) -> Result<FrameBuf, RunError> {
        let deadline = Instant::now() + self.limits.answer_max;
        loop {
            match self.transport.buffer(bytes) {
                Ok(body) => return Ok(body),
                Err(TransportError::WindowFull { .. }) if Instant::now() < deadline => {
                    self.pump();
                    self.transport.wait(deadline);
                }
                Err(error) => return Err(RunError::Window { slot, error }),
            }
        }
    }

    fn peer(&mut self, view: &View, slot: Slot) -> Result<&mut Peer, RunError> {
        let node = self.nodes.get(slot.index()).copied().flatten();
        let node = node.ok_or_else(|| RunError::Internal(format!("{slot} is not in {}", view.id)))?;
        let gone = RunError::NodeLost { slot, node, what: "its channel is closed".into() };
        self.peers.get_mut(&node).ok_or(gone)
    }

    /// The answer's row of a contribution.
    pub fn row(&self, of: &InFlight, source: mesh_core::routing::Source) -> &[u8] {
        let pair = source.pair as usize;
        let first = of.first_chunk[source.destination as usize];
        let within = of.chunks[first..].iter().position(|c| pair < c.pairs.1).expect("chunks cover all pairs");
        let body = self.sent[of.lane.index()][first + within].answer.as_ref().expect("the lane is complete");
        &body[(pair - of.chunks[first + within].pairs.0) * of.row_bytes..][..of.row_bytes]
    }

    /// Gives the lane and its answers' buffers back.
    pub fn end(&mut self, of: InFlight) {
        self.sent[of.lane.index()].clear();
        self.lanes.end(of.lane);
        self.count_lanes();
    }

    /// Gives every lane back; answers under way will be refused when they come.
    pub fn abandon_lanes(&mut self) {
        for lane in 0..self.limits.lanes {
            self.sent[usize::from(lane)].clear();
            self.lanes.end(Lane(lane));
        }
        self.count_lanes();
    }

    fn count_lanes(&self) {
        self.counters.set_lanes(self.lanes.len(), self.lanes.free());
    }

    /// Takes in what the transport has: answers to their lanes, closed channels off the list.
    pub fn pump(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        self.transport.poll(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Frame { channel, header, body } => self.take_frame(channel, &header, body),
                Event::Closed { channel, error } => {
                    let node = self.peers.iter().find(|(_, p)| p.channel == channel).map(|(n, _)| *n);
                    node.into_iter().for_each(|node| self.lose(node, &error.to_string()));
                }
                // Nobody knows where an attention node listens, for it does not.
                Event::Accepted { channel, .. } => self.transport.close(channel),
            }
        }
        self.events = events;
    }

    fn take_frame(&mut self, channel: ChannelId, header: &FrameHeader, body: FrameBuf) {
        let Some(peer) = self.peers.values().find(|p| p.channel == channel) else {
            return self.counters.refused("unknown channel");
        };
        let (slot, now) = (peer.member.slot, Instant::now());
        let FrameHeader { view, seq, layer, lane, pairs, .. } = *header;
        if self.nodes.get(slot.index()).copied().flatten() == Some(peer.member.node) {
            self.health.heard(slot, seq, now);
        }
        match header.kind {
            // As many rows as are owed can still be shorter ones: nothing of it may be read.
            Kind::Combine if self.is_of_other_length(header, slot, body.len()) => self.counters.refused("wrong length"),
            Kind::Combine => match self.lanes.accept(Answer { slot, view, seq, layer, lane, pairs }) {
                Ok(accepted) => {
                    let sent = &mut self.sent[lane.index()][accepted.index];
                    let took = now.saturating_duration_since(sent.at);
                    self.counters.received(slot, body.len(), header.server_ns, took, sent.work);
                    self.health.answered(slot, took, sent.work, now);
                    sent.answer = Some(body);
                }
                Err(refused) => {
                    tracing::debug!(%refused, "answer refused");
                    self.counters.refused(refusal_name(&refused));
                }
            },
            Kind::Abort => {
                let reason = AbortReason::from_flags(header.flags);
                self.counters.refused("aborted by expert node");
                let frames = self.sent.get_mut(lane.index()).into_iter().flatten();
                for sent in frames.filter(|s| s.slot == slot && s.seq == seq) {
                    sent.refused = Some(reason);
                }
            }
            Kind::Dispatch | Kind::Probe => self.counters.refused("unexpected kind"),
        }
    }

    /// Whether an answer has not as many bytes as its frame is owed.
    fn is_of_other_length(&self, header: &FrameHeader, slot: Slot, bytes: usize) -> bool {
        let mut frames = self.sent.get(header.lane.index()).into_iter().flatten();
        frames.any(|s| s.slot == slot && s.seq == header.seq && s.answer_bytes != bytes)
    }

    /// A node's channel is gone.
    fn lose(&mut self, node: NodeId, what: &str) {
        let Some(peer) = self.peers.remove(&node) else { return };
        let slot = peer.member.slot;
        tracing::warn!(%slot, %node, error = what, "lost an expert node's channel");
        if self.nodes.get(slot.index()).copied().flatten() == Some(node) {
            self.health.set_connected(slot, false);
            if let Some(view) = &self.view {
                self.outside.tell(view.id, slot, what.to_owned());
            }
            self.closed = true;
        }
    }

    /// Makes what the transport counted readable from other threads.
    pub fn count_transport(&self) {
        self.counters.set_transport(&self.transport.stats());
    }

    /// Sleeps until something happens on the transport, a wake-up, or `deadline`.
    pub fn sleep(&mut self, deadline: Instant) {
        self.transport.wait(deadline);
    }

    /// Whether a channel of the committed view closed since the last call.
    pub fn take_closed(&mut self) -> bool {
        std::mem::take(&mut self.closed)
    }
}

fn refusal_name(refused: &mesh_core::lanes::Refused) -> &'static str {
    use mesh_core::lanes::Refused as R;
    match refused {
        R::UnknownLane { .. } => "unknown lane",
        R::Unexpected { .. } => "late answer",
        R::Duplicate { .. } => "duplicate answer",
        R::WrongView { .. } => "wrong view",
        R::WrongLayer { .. } => "wrong layer",
        R::WrongRows { .. } => "wrong rows",
    }
}

/// Whether rows were refused for the view that they are of.
fn of_other_view(error: &RunError) -> bool {
    matches!(error, RunError::Aborted { reason: AbortReason::StaleView | AbortReason::FutureView, .. })
}

/// Cuts each destination's rows so that neither the frame nor its answer (a row for each pair) exceeds `body_bytes_max`.
/// The first of `destinations` is number `first`.
fn chunk(
    destinations: &[Destination],
    first: usize,
    row_bytes: usize,
    body_bytes_max: usize,
) -> (Vec<Chunk>, Vec<usize>) {
    // Metadata is 2 bytes a row and 2 a pair, and at most 64 of padding; a row alone always fits (checked at start).
    let fits = |rows: usize, pairs: usize| {
        pairs * row_bytes <= body_bytes_max && 2 * (rows + pairs) + 64 + rows * row_bytes <= body_bytes_max
    };
    let mut chunks = Vec::with_capacity(destinations.len());
    let mut first_chunk = Vec::with_capacity(destinations.len());
    for (destination, to) in (first..).zip(destinations) {
        first_chunk.push(chunks.len());
        let (mut rows, mut pairs) = ((0, 0), (0, 0));
        for count in to.pairs_per_row.iter().map(|c| usize::from(*c)) {
            if rows.1 > rows.0 && !fits(rows.1 - rows.0 + 1, pairs.1 - pairs.0 + count) {
                chunks.push(Chunk { destination, rows, pairs });
                (rows, pairs) = ((rows.1, rows.1), (pairs.1, pairs.1));
            }
            rows.1 += 1;
            pairs.1 += count;
        }
        chunks.push(Chunk { destination, rows, pairs });
    }
    (chunks, first_chunk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::ExpertId;

    #[test]
    fn rows_beyond_a_frame_travel_in_further_frames() {
        let to = Destination {
            slot: Slot(0),
            rows: (0..10).collect(),
            pairs_per_row: vec![2; 10],
            experts: (0..20).map(|i| ExpertId(i % 2)).collect(),
        };
        // 7 answer rows of 100 bytes fit: 3 rows of 2 pairs a frame.
        let (chunks, first) = chunk(&[to.clone(), to], 0, 100, 799);
        assert_eq!(first, [0, 4]);
        let rows: Vec<_> = chunks[..4].iter().map(|c| c.rows).collect();
        assert_eq!(rows, [(0, 3), (3, 6), (6, 9), (9, 10)]);
        assert!(chunks.iter().all(|c| c.pairs == (c.rows.0 * 2, c.rows.1 * 2)));
    }
}
