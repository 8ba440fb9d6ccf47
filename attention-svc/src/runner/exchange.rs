//! The exchange with the expert nodes: one frame to each that gets rows, one answer from each, nobody else waited for.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::lanes::{Answer, Lanes, Owed};
use mesh_core::routing::{Destination, DispatchPlan};
use mesh_core::view::{Member, View};
use mesh_core::{Lane, LayerId, NodeId, Role, Seq, Slot, ViewId};
use mesh_kernels::rows::Rows;
use mesh_transport::buffer::FrameBuf;
use mesh_transport::frame::{self, AbortReason, FrameHeader, Kind};
use mesh_transport::{ChannelId, Event, Transport, TransportError};

use super::counters::RunnerCounters;
use super::error::RunError;

/// The bounds of an exchange.
#[derive(Clone, Copy, Debug)]
pub struct ExchangeLimits {
    /// Exchanges in flight at once.
    pub lanes: u16,
    /// How long an answer may take before its node counts as silent.
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

/// A dispatch that was sent, and its answers as they arrive.
#[derive(Debug)]
pub(super) struct InFlight {
    lane: Lane,
    layer: LayerId,
    chunks: Vec<Chunk>,
    /// For each destination, the chunk in which it begins.
    first_chunk: Vec<usize>,
    row_bytes: usize,
}

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
    /// By lane, by position in the dispatch.
    answers: Vec<Vec<Option<FrameBuf>>>,
    events: Vec<Event>,
    /// Nodes lost since the last [`Exchange::take_lost`].
    lost: Vec<(Slot, String)>,
    counters: Arc<RunnerCounters>,
}

impl Exchange {
    pub fn new(
        transport: Box<dyn Transport>,
        slot: Slot,
        limits: ExchangeLimits,
        counters: Arc<RunnerCounters>,
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
            answers: (0..limits.lanes).map(|_| Vec::new()).collect(),
            events: Vec::new(),
            lost: Vec::new(),
            counters,
        }
    }

    pub fn transport(&self) -> &dyn Transport {
        self.transport.as_ref()
    }

    /// The committed view, if each of its expert nodes is connected.
    pub fn serving(&self) -> Option<&Arc<View>> {
        self.view.as_ref().filter(|v| v.experts.iter().all(|m| self.peers.contains_key(&m.node)))
    }

    /// Connects to the expert nodes of a view that are not connected yet. The committed view serves on.
    pub fn prepare(&mut self, view: Arc<View>) -> Result<(), RunError> {
        for member in &view.experts {
            self.connect(member)?;
        }
        self.prepared = Some(view);
        Ok(())
    }

    fn connect(&mut self, member: &Member) -> Result<(), RunError> {
        if self.peers.contains_key(&member.node) {
            return Ok(());
        }
        let lost = |what: String| RunError::NodeLost { slot: member.slot, node: member.node, what };
        let deadline = Instant::now() + self.limits.connect_max;
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
        self.nodes = vec![None; view.experts.iter().map(|m| m.slot.index() + 1).max().unwrap_or(0)];
        for member in &view.experts {
            self.nodes[member.slot.index()] = Some(member.node);
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
        for member in &view.experts {
            if let Err(error) = self.connect(member) {
                tracing::debug!(%error, "expert node still out of reach");
            }
        }
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
        let (chunks, first_chunk) = chunk(plan.destinations(), row_bytes, self.limits.body_bytes_max);
        let mut owed = Vec::with_capacity(chunks.len());
        for c in &chunks {
            let slot = plan.destinations()[c.destination].slot;
            let peer = self.peer(view, slot)?;
            owed.push(Owed { slot, seq: Seq(peer.seq_next), pairs: (c.pairs.1 - c.pairs.0) as u32 });
            peer.seq_next += 1;
        }
        let lane = self.lanes.begin(view.id, layer, owed.iter().copied());
        let lane = lane.ok_or(RunError::NoLane { lanes: self.limits.lanes })?;
        self.count_lanes();
        self.answers[lane.index()].clear();
        self.answers[lane.index()].resize_with(chunks.len(), || None);
        let in_flight = InFlight { lane, layer, chunks, first_chunk, row_bytes };
        for (i, o) in owed.iter().enumerate() {
            self.send_chunk(view, &in_flight, i, o.seq, &plan.destinations()[in_flight.chunks[i].destination], rows)?;
        }
        Ok(in_flight)
    }

    fn send_chunk(
        &mut self,
        view: &Arc<View>,
        to: &InFlight,
        index: usize,
        seq: Seq,
        destination: &Destination,
        rows: Rows<'_>,
    ) -> Result<(), RunError> {
        let c = to.chunks[index];
        let (row_count, pairs) = (c.rows.1 - c.rows.0, c.pairs.1 - c.pairs.0);
        let bytes = frame::dispatch_body_bytes(row_count, pairs, to.row_bytes);
        let bytes = bytes.ok_or(RunError::Internal(format!("a frame of {row_count} rows and {pairs} pairs")))?;
        let mut body = self.buffer(bytes, destination.slot)?;
        let counts = &destination.pairs_per_row[c.rows.0..c.rows.1];
        let place = frame::write_dispatch(&mut body, counts, &destination.experts[c.pairs.0..c.pairs.1]);
        for (place, row) in place.chunks_exact_mut(to.row_bytes).zip(&destination.rows[c.rows.0..c.rows.1]) {
            place.copy_from_slice(&rows.bytes[*row as usize * to.row_bytes..][..to.row_bytes]);
        }
        let header = FrameHeader {
            kind: Kind::Dispatch,
            flags: 0,
            view: view.id,
            seq,
            layer: to.layer,
            lane: to.lane,
            chunk: index as u16,
            chunks: to.chunks.len() as u16,
            rows: row_count as u32,
            pairs: pairs as u32,
            row_bytes: to.row_bytes as u32,
            body_bytes: bytes as u32,
            server_ns: 0,
            origin: self.slot,
        };
        let peer = self.peer(view, destination.slot)?;
        let (channel, slot, node) = (peer.channel, destination.slot, peer.member.node);
        self.transport.send(channel, &header, body).map_err(|e| RunError::NodeLost {
            slot,
            node,
            what: e.to_string(),
        })?;
        self.counters.sent(row_count, pairs, row_count * to.row_bytes);
        Ok(())
    }

    /// A body out of the window, waiting (bounded) for one to come back when it is full.
    fn buffer(&mut self, bytes: usize, slot: Slot) -> Result<FrameBuf, RunError> {
        let deadline = Instant::now() + self.limits.answer_max;
        loop {
            match self.transport.buffer(bytes) {
                Ok(body) => return Ok(body),
                Err(TransportError::WindowFull { .. }) if Instant::now() < deadline => {
                    self.pump()?;
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

    /// Blocks until every answer of a dispatch has arrived.
    pub fn wait(&mut self, of: &InFlight) -> Result<(), RunError> {
        let deadline = Instant::now() + self.limits.answer_max;
        loop {
            self.pump()?;
            if self.lanes.is_complete(of.lane) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.silent(of.lane));
            }
            self.transport.wait(deadline);
        }
    }

    fn silent(&mut self, lane: Lane) -> RunError {
        let waited = self.limits.answer_max;
        let mut slots: Vec<Slot> = self.lanes.missing(lane).map(|o| o.slot).collect();
        slots.dedup();
        let what = format!("no answer within {waited:?}");
        self.lost.extend(slots.iter().map(|s| (*s, what.clone())));
        RunError::Silent { slots, waited }
    }

    /// The answer's row of a contribution.
    pub fn row(&self, of: &InFlight, source: mesh_core::routing::Source) -> &[u8] {
        let pair = source.pair as usize;
        let first = of.first_chunk[source.destination as usize];
        let within = of.chunks[first..].iter().position(|c| pair < c.pairs.1).expect("chunks cover all pairs");
        let body = self.answers[of.lane.index()][first + within].as_ref().expect("the lane is complete");
        &body[(pair - of.chunks[first + within].pairs.0) * of.row_bytes..][..of.row_bytes]
    }

    /// Gives the lane and its answers' buffers back.
    pub fn end(&mut self, of: InFlight) {
        self.answers[of.lane.index()].clear();
        self.lanes.end(of.lane);
        self.count_lanes();
    }

    /// Gives every lane back; answers under way will be refused when they come.
    pub fn abandon_lanes(&mut self) {
        for lane in 0..self.limits.lanes {
            self.answers[usize::from(lane)].clear();
            self.lanes.end(Lane(lane));
        }
        self.count_lanes();
    }

    fn count_lanes(&self) {
        self.counters.set_lanes(self.lanes.len(), self.lanes.free());
    }

    /// Takes in what the transport has: answers to their lanes, closed channels off the list.
    ///
    /// # Errors
    /// When a node that a lane waits for is gone or refused its rows.
    pub fn pump(&mut self) -> Result<(), RunError> {
        let mut events = std::mem::take(&mut self.events);
        self.transport.poll(&mut events);
        let mut outcome = Ok(());
        for event in events.drain(..) {
            let handled = match event {
                Event::Frame { channel, header, body } => self.take_frame(channel, &header, body),
                Event::Closed { channel, error } => self.take_closed(channel, &error),
                // Nobody knows where an attention node listens, for it does not.
                Event::Accepted { channel, .. } => {
                    self.transport.close(channel);
                    Ok(())
                }
            };
            outcome = outcome.and(handled);
        }
        self.events = events;
        outcome
    }

    fn take_frame(&mut self, channel: ChannelId, header: &FrameHeader, body: FrameBuf) -> Result<(), RunError> {
        let Some(peer) = self.peers.values().find(|p| p.channel == channel) else {
            self.counters.refused("unknown channel");
            return Ok(());
        };
        let (slot, node) = (peer.member.slot, peer.member.node);
        let FrameHeader { view, seq, layer, lane, pairs, .. } = *header;
        match header.kind {
            Kind::Combine => {
                match self.lanes.accept(Answer { slot, view, seq, layer, lane, pairs }) {
                    Ok(accepted) => {
                        self.counters.received(body.len(), header.server_ns);
                        self.answers[lane.index()][accepted.index] = Some(body);
                    }
                    Err(refused) => {
                        tracing::warn!(%refused, "answer refused");
                        self.counters.refused(refusal_name(&refused));
                    }
                }
                Ok(())
            }
            Kind::Abort => {
                let reason = AbortReason::from_flags(header.flags);
                self.counters.refused("aborted by expert node");
                if self.lanes.missing(lane).any(|o| o.slot == slot && o.seq == seq) {
                    return Err(RunError::Aborted { slot, node, layer, reason });
                }
                Ok(())
            }
            Kind::Dispatch | Kind::Probe => {
                self.counters.refused("unexpected kind");
                Ok(())
            }
        }
    }

    fn take_closed(&mut self, channel: ChannelId, error: &TransportError) -> Result<(), RunError> {
        let Some(node) = self.peers.iter().find(|(_, p)| p.channel == channel).map(|(n, _)| *n) else {
            return Ok(());
        };
        let Some(peer) = self.peers.remove(&node) else { return Ok(()) };
        let slot = peer.member.slot;
        let what = error.to_string();
        tracing::warn!(%slot, %node, error = what, "lost an expert node's channel");
        self.lost.push((slot, what.clone()));
        let owes = (0..self.limits.lanes).any(|l| self.lanes.missing(Lane(l)).any(|o| o.slot == slot));
        if owes { Err(RunError::NodeLost { slot, node, what }) } else { Ok(()) }
    }

    /// Sleeps until something happens on the transport, a wake-up, or `deadline`.
    pub fn sleep(&mut self, deadline: Instant) {
        self.transport.wait(deadline);
    }

    /// What was seen of nodes lost since the last call.
    pub fn take_lost(&mut self) -> Vec<(Slot, String)> {
        std::mem::take(&mut self.lost)
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

/// Cuts each destination's rows so that neither the frame nor its answer (a row for each pair) exceeds `body_bytes_max`.
fn chunk(destinations: &[Destination], row_bytes: usize, body_bytes_max: usize) -> (Vec<Chunk>, Vec<usize>) {
    // Metadata is 2 bytes a row and 2 a pair, and at most 64 of padding; a row alone always fits (checked at start).
    let fits = |rows: usize, pairs: usize| {
        pairs * row_bytes <= body_bytes_max && 2 * (rows + pairs) + 64 + rows * row_bytes <= body_bytes_max
    };
    let mut chunks = Vec::with_capacity(destinations.len());
    let mut first_chunk = Vec::with_capacity(destinations.len());
    for (destination, to) in destinations.iter().enumerate() {
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
        let (chunks, first) = chunk(&[to.clone(), to], 100, 799);
        assert_eq!(first, [0, 4]);
        let rows: Vec<_> = chunks[..4].iter().map(|c| c.rows).collect();
        assert_eq!(rows, [(0, 3), (3, 6), (6, 9), (9, 10)]);
        assert!(chunks.iter().all(|c| c.pairs == (c.rows.0 * 2, c.rows.1 * 2)));
    }
}
