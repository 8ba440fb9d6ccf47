//! Waiting for answers: who is late is told of, what a node cannot be had from any more is asked of other holders.

use std::time::Instant;

use mesh_core::routing::DispatchPlan;
use mesh_core::{Lane, Slot};
use mesh_kernels::rows::Rows;

use super::super::error::RunError;
use super::super::peers::Unanswered;
use super::{Exchange, InFlight, Sent, chunk, of_other_view};

/// How often rows of one dispatch go to another holder before the step is given up: as many nodes would have to fail at once.
const REPLAYS_MAX: u32 = 16;

/// After this part of the shortest silence an answer is late: to ask whether a node lives costs less than to do without it.
const LATE_PART: u32 = 2;

impl Exchange {
    /// Blocks until every answer of a dispatch has arrived; what a node cannot be had from any more, others are asked for.
    ///
    /// # Errors
    /// When an expert has no other holder that can be asked, or `answer_max` is over.
    pub fn wait(&mut self, of: &mut InFlight, plan: &mut DispatchPlan, rows: Rows<'_>) -> Result<(), RunError> {
        loop {
            self.pump();
            if self.lanes.is_complete(of.lane) {
                return Ok(());
            }
            let now = Instant::now();
            self.tell_of_late(of, now);
            if let Some((index, why)) = self.unanswerable(of, now) {
                of.replays += 1;
                // Who serves another view will not be alone with that: the next step is under the new one.
                if of.replays > REPLAYS_MAX || of_other_view(&why) {
                    return Err(why);
                }
                // Nobody else to ask is no news to whoever wants to know what happened.
                self.replay(of, index, plan, rows).map_err(|_unreachable| why)?;
                continue;
            }
            if now >= of.until {
                return Err(self.silent(of.lane));
            }
            let sent = &self.sent[of.lane.index()];
            // Who is silent was late before: until then what silence is need not be known.
            let next = |s: &Sent| match s.told {
                None => self.late_from(s),
                Some(_) => self.late_from(s).min(self.silent_from(s, now)),
            };
            let awaited = self.awaited(of.lane).map(|i| next(&sent[i])).min();
            let until = awaited.map_or(of.until, |at| at.min(of.until));
            self.transport.wait(until);
        }
    }

    /// Frames of a lane whose answer is missing.
    fn awaited(&self, lane: Lane) -> impl Iterator<Item = usize> + '_ {
        let sent = &self.sent[lane.index()];
        self.lanes.missing(lane).filter_map(|o| sent.iter().position(|s| s.slot == o.slot && s.seq == o.seq))
    }

    /// Tells the router of frames whose answer is late, again and again. It asks the nodes, which costs little, and strikes out
    /// those that are gone; how long this node waits for an answer is another matter.
    fn tell_of_late(&mut self, of: &InFlight, now: Instant) {
        let lane = of.lane;
        let late = |i: &usize| now >= self.late_from(&self.sent[lane.index()][*i]);
        let late: Vec<usize> = self.awaited(lane).filter(late).collect();
        for index in late {
            let sent = &mut self.sent[lane.index()][index];
            sent.told = Some(now);
            let waited = now.saturating_duration_since(sent.at);
            self.outside.tell(of.view.id, sent.slot, format!("no answer for {waited:?}"));
        }
    }

    /// A frame that will not be answered, or not in time, and the error to give if nobody else can be asked.
    fn unanswerable(&mut self, of: &InFlight, now: Instant) -> Option<(usize, RunError)> {
        let found = self.awaited(of.lane).find_map(|index| {
            let sent = &self.sent[of.lane.index()][index];
            let node = self.nodes.get(sent.slot.index()).copied().flatten().unwrap_or_default();
            let (slot, layer) = (sent.slot, of.layer);
            if self.peers.get(&node).is_none_or(|p| p.member.slot != slot) {
                let lost = RunError::NodeLost { slot, node, what: "its channel closed".into() };
                return Some((index, lost));
            }
            if let Some(reason) = sent.refused {
                return Some((index, RunError::Aborted { slot, node, layer, reason }));
            }
            let waited = now.saturating_duration_since(sent.at);
            // Silent, or struck out by the router: the view that waits for this step to end is without it.
            let given_up = sent.told.is_some()
                && (now >= self.silent_from(sent, now) || self.outside.coming.is_without(node, of.view.id));
            given_up.then(|| (index, RunError::Silent { slots: vec![slot], waited }))
        });
        let (index, error) = found?;
        if let RunError::Silent { waited, .. } = &error {
            let Sent { slot, seq, at, work, .. } = self.sent[of.lane.index()][index];
            tracing::warn!(%slot, ?waited, "an expert node is silent");
            self.health.silent(slot, Unanswered { seq, sent: at, units: work }, now);
        }
        Some((index, error))
    }

    /// From when on the router is to be told of a frame without an answer.
    fn late_from(&self, sent: &Sent) -> Instant {
        sent.told.unwrap_or(sent.at) + self.limits.silence_min / LATE_PART
    }

    /// From when on a frame without an answer means that its node is silent.
    fn silent_from(&self, sent: &Sent, now: Instant) -> Instant {
        sent.at + self.health.silence(sent.slot, sent.work, now)
    }

    /// Asks other holders for what frame `index` asked for, and for the rest of its destination.
    fn replay(
        &mut self,
        of: &mut InFlight,
        index: usize,
        plan: &mut DispatchPlan,
        rows: Rows<'_>,
    ) -> Result<(), RunError> {
        let (health, now) = (&mut self.health, Instant::now());
        health.begin(of.view.placement.experts(), now);
        let destination = of.chunks[index].destination;
        let except = Some(plan.destinations()[destination].slot);
        let pairs = plan.destinations()[destination].pairs();
        let first = plan.reassign(destination, &of.view, of.layer, |_, expert, holders| {
            health.choose(expert, holders, except, now)
        });
        let first = first.map_err(|error| RunError::Routing { layer: of.layer, error })?;
        tracing::info!(layer = of.layer.0, pairs, "rows are sent to other holders of their experts");
        self.counters.replayed(pairs);
        let (mut chunks, first_chunk) =
            chunk(&plan.destinations()[first..], first, of.row_bytes, self.limits.body_bytes_max);
        let owed = self.owe(&chunks, plan, &of.view)?;
        let replaced: Vec<usize> = (0..of.chunks.len()).filter(|i| of.chunks[*i].destination == destination).collect();
        for (i, frame) in replaced.into_iter().enumerate() {
            let by = owed.iter().map(|(owed, _)| *owed).take(if i == 0 { owed.len() } else { 0 });
            self.lanes.replace(of.lane, frame, by);
            self.sent[of.lane.index()][frame].answer = None;
        }
        let first_new = of.chunks.len();
        of.first_chunk.extend(first_chunk.iter().map(|c| c + first_new));
        of.chunks.append(&mut chunks);
        self.send_chunks(of, first_new, &owed, plan, rows)
    }

    fn silent(&self, lane: Lane) -> RunError {
        let waited = self.limits.answer_max;
        let mut slots: Vec<Slot> = self.lanes.missing(lane).map(|o| o.slot).collect();
        slots.dedup();
        RunError::Silent { slots, waited }
    }
}
