//! The driver: what `attention-svc/src/runner/exchange.rs` does, without bytes and clock, and what is held against it.

use std::collections::BTreeSet;

use mesh_core::lanes::{Answer, Owed as OwedFrame};
use mesh_core::routing::{Destination, DispatchPlan, RoutingError};
use mesh_core::{ExpertId, Lane, LayerId, Seq, Slot};

use super::{Batch, Chunk, Exchange, Frame, InFlight, Life, Mistake, Refusal, Sent, State, usable};

/// Why a step fails, by whom it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    Lost(Slot),
    Refused(Refusal),
    Silent(Slot),
    Unreachable(ExpertId),
    Nobody,
}

impl Exchange {
    /// The driver's next move, from one look at its events to the next.
    pub(super) fn turn(&self, s: &mut State, pick: usize) -> Result<(), String> {
        let turn = s.turn.ok_or("a turn between steps")?;
        let (batch, turns) = (self.batch_at(turn), self.setup.layers * u16::from(self.setup.batches));
        if let Some(of) = &s.batches[batch].in_flight {
            let lane = of.lane;
            if !s.lanes.is_complete(lane) {
                let (index, why) = unanswerable(s, lane).ok_or("a turn though there is nothing to do")?;
                return self.instead(s, batch, index, why, pick);
            }
            self.check_complete(s, batch)?;
            s.batches[batch].in_flight = None;
            s.sent[lane.index()].clear();
            s.lanes.end(lane);
        }
        if turn < turns {
            let layer = LayerId(turn / u16::from(self.setup.batches));
            if let Err(why) = self.dispatch(s, batch, layer, pick) {
                return self.fail(s, why);
            }
        }
        s.turn = (turn + 1 < turns + u16::from(self.setup.batches)).then_some(turn + 1);
        if s.turn.is_none() {
            self.over(s);
            if s.lanes.free() != s.lanes.len() {
                return Err("a step that is done keeps lanes".into());
            }
        }
        Ok(())
    }

    /// What becomes of a frame that will not be answered.
    fn instead(&self, s: &mut State, batch: usize, index: usize, why: Failure, pick: usize) -> Result<(), String> {
        let replays = s.batches[batch].in_flight.as_mut().map(|of| {
            of.replays += 1;
            of.replays
        });
        if replays > Some(self.setup.replays_max) || why == Failure::Refused(Refusal::View) {
            return self.fail(s, why);
        }
        match self.replay(s, batch, index, pick) {
            Ok(()) => Ok(()),
            Err(_unreachable) => self.fail(s, why),
        }
    }

    pub(super) fn fail(&self, s: &mut State, why: Failure) -> Result<(), String> {
        if why == Failure::Nobody {
            return Err("a step fails and nobody is named".into());
        }
        if s.is_calm || self.setup.must_survive {
            return Err(format!("a step fails though it need not: {why:?}"));
        }
        for (lane, sent) in s.sent.iter_mut().enumerate() {
            sent.clear();
            if self.setup.mistake != Some(Mistake::KeepsLanes) {
                s.lanes.end(Lane(lane as u16));
            }
        }
        s.batches.iter_mut().for_each(|b| b.in_flight = None);
        self.over(s);
        Ok(())
    }

    fn dispatch(&self, s: &mut State, batch: usize, layer: LayerId, pick: usize) -> Result<(), Failure> {
        let view = self.view(s);
        let mut plan = std::mem::take(&mut s.batches[batch].plan);
        let choose = self.chooser(s, None, pick);
        let planned = plan.rebuild(&self.routing[batch], view, layer, choose);
        planned.map_err(|error| unreachable(&error))?;
        let (chunks, first_chunk) = chunk(plan.destinations(), 0, self.setup.frame_rows);
        let owed = owe(s, &plan, &chunks)?;
        let lane = s.lanes.begin(view.id, layer, owed.iter().copied()).ok_or(Failure::Nobody)?;
        s.sent[lane.index()].clear();
        let of = InFlight { lane, layer, chunks, first_chunk, replays: 0 };
        self.send(s, &plan, &of, 0, &owed);
        s.batches[batch] = Batch { plan, in_flight: Some(of) };
        Ok(())
    }

    /// Any usable holder may be chosen; all of an expert's rows go to one.
    fn chooser(
        &self,
        s: &State,
        except: Option<Slot>,
        pick: usize,
    ) -> impl FnMut(usize, ExpertId, &[Slot]) -> Option<Slot> + use<> {
        let usable: Vec<bool> = (0..s.peers.len()).map(|slot| usable(s, slot)).collect();
        let replicas = self.setup.replicas;
        move |_, expert, holders| {
            let of: Vec<Slot> =
                holders.iter().copied().filter(|slot| usable[slot.index()] && Some(*slot) != except).collect();
            let digit = pick / replicas.pow(expert.0.into()) % replicas;
            (!of.is_empty()).then(|| of[digit % of.len()])
        }
    }

    /// How many ways to choose there are for a turn that chooses.
    pub(super) fn picks(&self, s: &State) -> usize {
        let is_last = s.turn.is_some_and(|t| t >= self.setup.layers * u16::from(self.setup.batches));
        let is_complete = self.waited(s).is_some_and(|lane| s.lanes.is_complete(lane));
        if is_last && is_complete { 1 } else { self.setup.replicas.pow(self.setup.experts as u32) }
    }

    fn send(&self, s: &mut State, plan: &DispatchPlan, of: &InFlight, first: usize, owed: &[OwedFrame]) {
        let view = self.view(s).id;
        for (chunk, owed) in of.chunks[first..].iter().zip(owed) {
            let Some(peer) = &s.peers[owed.slot.index()] else { continue };
            let (channel, seq, lane, layer) = (peer.channel, owed.seq, of.lane, of.layer);
            let sent = Sent { channel, seq, refused: None, is_quiet: false, is_replaced: false, answer: None };
            s.sent[lane.index()].push(sent);
            // A closed channel swallows what is sent before its end is heard of, a node that hangs what is sent to it.
            if !peer.is_broken && s.lives[owed.slot.index()] != Life::Hung {
                let all = pairs(&plan.destinations()[chunk.destination]);
                let pairs = all[chunk.pairs.0..chunk.pairs.1].to_vec();
                insert(&mut s.net, Frame { channel, seq, view, layer, lane, pairs, is_copy: false });
            }
        }
    }

    fn replay(&self, s: &mut State, batch: usize, index: usize, pick: usize) -> Result<(), Failure> {
        let (view, Batch { mut plan, in_flight }) = (self.view(s), std::mem::take(&mut s.batches[batch]));
        let mut of = in_flight.ok_or(Failure::Nobody)?;
        let lost = of.chunks[index].destination;
        let choose = self.chooser(s, Some(plan.destinations()[lost].slot), pick);
        let first = plan.reassign(lost, view, of.layer, choose).map_err(|error| unreachable(&error))?;
        let (mut chunks, first_chunk) = chunk(&plan.destinations()[first..], first, self.setup.frame_rows);
        let owed = owe(s, &plan, &chunks)?;
        let replaced: Vec<usize> = (0..of.chunks.len()).filter(|i| of.chunks[*i].destination == lost).collect();
        for (i, frame) in replaced.into_iter().enumerate() {
            s.lanes.replace(of.lane, frame, owed.iter().copied().take(if i == 0 { owed.len() } else { 0 }));
            let sent = &mut s.sent[of.lane.index()][frame];
            (sent.answer, sent.is_replaced) = (None, true);
        }
        let first_new = of.chunks.len();
        of.first_chunk.extend(first_chunk.iter().map(|c| c + first_new));
        of.chunks.append(&mut chunks);
        self.send(s, &plan, &of, first_new, &owed);
        s.batches[batch] = Batch { plan, in_flight: Some(of) };
        Ok(())
    }

    /// Every pair has exactly one answer that counts: of a holder, to the frame that asked for it last.
    fn check_complete(&self, s: &State, batch: usize) -> Result<(), String> {
        let Batch { plan, in_flight: Some(of) } = &s.batches[batch] else { return Err("nothing is in flight".into()) };
        let (sent, routing, view) = (&s.sent[of.lane.index()], &self.routing[batch], self.view(s));
        let mut used = BTreeSet::new();
        if plan.rows() != routing.rows() {
            return Err(format!("{} rows of {}", plan.rows(), routing.rows()));
        }
        for row in 0..routing.rows() {
            let mut wanted = routing.experts(row).to_vec();
            wanted.sort();
            let contributions = plan.contributions(row);
            if contributions.len() != wanted.len() {
                return Err(format!("row {row} has {} contributions", contributions.len()));
            }
            for (c, expert) in contributions.iter().zip(wanted) {
                let pair = c.source.pair as usize;
                let first = of.first_chunk[c.source.destination as usize];
                let within = of.chunks[first..].iter().position(|c| pair < c.pairs.1);
                let at = first + within.ok_or(format!("row {row}, {expert}: no frame has it"))?;
                let place = pair - of.chunks[at].pairs.0;
                let frame = sent[at].answer.as_ref().ok_or(format!("row {row}, {expert}: its frame has no answer"))?;
                let is_its_own =
                    frame.channel == sent[at].channel && frame.seq == sent[at].seq && !sent[at].is_replaced;
                if !is_its_own || frame.view != view.id || frame.pairs.get(place) != Some(&(row as u32, expert)) {
                    return Err(format!("row {row}, {expert} is answered by {frame:?} in the place of {:?}", sent[at]));
                }
                if !view.placement.holds(frame.channel.slot, of.layer, expert) {
                    return Err(format!(
                        "row {row}, {expert} is computed by {}, which does not hold it",
                        frame.channel.slot
                    ));
                }
                used.insert((at, place));
            }
        }
        let counted: usize = sent.iter().filter_map(|s| s.answer.as_ref()).map(|f| f.pairs.len()).sum();
        if used.len() != counted || used.len() != routing.rows() * routing.k() {
            return Err(format!("{} answers are used and {counted} are counted", used.len()));
        }
        Ok(())
    }

    /// An answer, or a refusal, comes in.
    pub(super) fn take_frame(&self, s: &mut State, frame: Frame, refused: Option<Refusal>) -> Result<(), String> {
        let Frame { channel, seq, view, layer, lane, .. } = frame;
        let slot = channel.slot;
        let is_known = s.peers[slot.index()].is_some_and(|p| p.channel == channel);
        if !is_known && self.setup.mistake != Some(Mistake::AnyChannel) {
            return Ok(());
        }
        s.avoided[slot.index()] = false;
        let of_lane = &mut s.sent[lane.index()];
        if refused.is_some() {
            let its = of_lane.iter_mut().filter(|sent| sent.channel.slot == slot && sent.seq == seq);
            its.for_each(|sent| sent.refused = refused);
            return Ok(());
        }
        let pairs = frame.pairs.len() as u32;
        let Ok(accepted) = s.lanes.accept(Answer { slot, view, seq, layer, lane, pairs }) else { return Ok(()) };
        let sent = of_lane.get_mut(accepted.index).ok_or("an answer counts for nothing that was sent")?;
        if sent.answer.is_some() || sent.is_replaced || sent.channel != channel || sent.seq != seq {
            return Err(format!("{frame:?} counts as the answer to {sent:?}"));
        }
        sent.answer = Some(frame);
        match accepted.complete == s.lanes.is_complete(lane) {
            true => Ok(()),
            false => Err("complete for one and not for the other".into()),
        }
    }

    /// The driver hears that a channel is closed. From here on what comes of it is refused for that, so that it need
    /// not come any more.
    pub(super) fn lose(&self, s: &mut State, slot: Slot) {
        s.peers[slot.index()] = None;
        if self.setup.mistake != Some(Mistake::AnyChannel) {
            s.net.retain(|f| f.channel.slot != slot);
        }
    }

    /// A step is over: numbers of frames begin anew on every channel, after those that are still under way. Only whether
    /// two are the same matters from here on, and states that differ in nothing else are one.
    fn over(&self, s: &mut State) {
        (s.turn, s.is_calm) = (None, false);
        if self.setup.mistake == Some(Mistake::AnyChannel) {
            return;
        }
        for peer in s.peers.iter_mut().flatten() {
            let (before, slot) = (peer.channel, peer.channel.slot.index());
            (peer.channel.opened, s.opened[slot], peer.seq_next) = (1, 1, 1);
            let mut last = None;
            for frame in s.net.iter_mut().filter(|f| f.channel == before) {
                // The net is in order: the same number twice is a frame and its copy.
                if last.replace(frame.seq).is_some_and(|last| last != frame.seq) {
                    peer.seq_next += 1;
                }
                (frame.channel, frame.seq) = (peer.channel, Seq(peer.seq_next));
            }
            peer.seq_next += u64::from(last.is_some());
        }
    }
}

fn unreachable(error: &RoutingError) -> Failure {
    match error {
        RoutingError::Unreachable { expert, holders, .. } if !holders.is_empty() => Failure::Unreachable(*expert),
        _ => Failure::Nobody,
    }
}

fn pairs(of: &Destination) -> Vec<(u32, ExpertId)> {
    let rows = of.rows.iter().zip(&of.pairs_per_row).flat_map(|(row, n)| std::iter::repeat_n(*row, usize::from(*n)));
    rows.zip(of.experts.iter().copied()).collect()
}

fn chunk(destinations: &[Destination], first: usize, frame_rows: usize) -> (Vec<Chunk>, Vec<usize>) {
    let (mut chunks, mut first_chunk) = (Vec::new(), Vec::new());
    for (destination, to) in (first..).zip(destinations) {
        first_chunk.push(chunks.len());
        let (mut row, mut pair) = (0, 0);
        for counts in to.pairs_per_row.chunks(frame_rows) {
            let (rows, pairs) = (row + counts.len(), pair + counts.iter().map(|c| usize::from(*c)).sum::<usize>());
            chunks.push(Chunk { destination, rows: (row, rows), pairs: (pair, pairs) });
            (row, pair) = (rows, pairs);
        }
    }
    (chunks, first_chunk)
}

fn owe(s: &mut State, plan: &DispatchPlan, chunks: &[Chunk]) -> Result<Vec<OwedFrame>, Failure> {
    let owe = |c: &Chunk| {
        let slot = plan.destinations()[c.destination].slot;
        let peer = s.peers[slot.index()].as_mut().ok_or(Failure::Lost(slot))?;
        let seq = Seq(peer.seq_next);
        peer.seq_next += 1;
        Ok(OwedFrame { slot, seq, pairs: (c.pairs.1 - c.pairs.0) as u32 })
    };
    chunks.iter().map(owe).collect()
}

/// Frames of a lane whose answer is missing.
pub(super) fn awaited(s: &State, lane: Lane) -> Vec<usize> {
    let sent = &s.sent[lane.index()];
    let at = |o: OwedFrame| sent.iter().position(|s| s.channel.slot == o.slot && s.seq == o.seq);
    s.lanes.missing(lane).filter_map(at).collect()
}

/// A frame that will not be answered, or not in time. A node that is silent is avoided from then on.
fn unanswerable(s: &mut State, lane: Lane) -> Option<(usize, Failure)> {
    let (index, why) = find_unanswerable(s, lane)?;
    if let Failure::Silent(slot) = why {
        s.avoided[slot.index()] = true;
    }
    Some((index, why))
}

pub(super) fn find_unanswerable(s: &State, lane: Lane) -> Option<(usize, Failure)> {
    awaited(s, lane).into_iter().find_map(|index| {
        let sent = &s.sent[lane.index()][index];
        let slot = sent.channel.slot;
        if s.peers[slot.index()].is_none() {
            return Some((index, Failure::Lost(slot)));
        }
        if let Some(refusal) = sent.refused {
            return Some((index, Failure::Refused(refusal)));
        }
        sent.is_quiet.then_some((index, Failure::Silent(slot)))
    })
}

/// Frames lie in one order, whatever the order in which they were sent: the net keeps none.
pub(super) fn insert(net: &mut Vec<Frame>, frame: Frame) {
    let at = net.partition_point(|f| *f < frame);
    net.insert(at, frame);
}
