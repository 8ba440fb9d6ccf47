//! Credits for exchanges in flight, what each still owes, and the check of every answer's identity (invariant 2).

use crate::ids::{Lane, LayerId, Seq, Slot, ViewId};

/// One dispatched frame and the answer that it is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owed {
    /// The expert node that owes it.
    pub slot: Slot,
    /// The frame's number on that node's channel.
    pub seq: Seq,
    /// Rows that the answer must have: one per (row, expert) pair.
    pub pairs: u32,
}

/// What an answer says of itself, out of its frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The expert node whose channel it came on.
    pub slot: Slot,
    /// The view that it was computed under.
    pub view: ViewId,
    /// The dispatch that it answers.
    pub seq: Seq,
    /// The layer that it was computed for.
    pub layer: LayerId,
    /// The lane that it belongs to.
    pub lane: Lane,
    /// Rows that it carries.
    pub pairs: u32,
}

/// An accepted answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Which of the frames given to [`Lanes::begin`] it answers, by position.
    pub index: usize,
    /// Whether the lane is owed nothing more.
    pub complete: bool,
}

/// Why an answer is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The lane does not exist.
    #[error("{lane} does not exist")]
    UnknownLane {
        /// The lane named.
        lane: Lane,
    },
    /// Nothing is in flight on the lane, or nothing with this number: a late answer to an abandoned dispatch.
    #[error("{lane} awaits no {seq} of {slot}")]
    Unexpected {
        /// The lane named.
        lane: Lane,
        /// The number named.
        seq: Seq,
        /// The sender.
        slot: Slot,
    },
    /// The same answer a second time.
    #[error("{seq} of {slot} arrived on {lane} before")]
    Duplicate {
        /// The lane named.
        lane: Lane,
        /// The number named.
        seq: Seq,
        /// The sender.
        slot: Slot,
    },
    /// Computed under another view.
    #[error("answer of {slot} is of {found}, {lane} awaits {wanted}")]
    WrongView {
        /// The lane named.
        lane: Lane,
        /// The sender.
        slot: Slot,
        /// The view in flight.
        wanted: ViewId,
        /// The view named.
        found: ViewId,
    },
    /// Computed for another layer.
    #[error("answer of {slot} is of {found}, {lane} awaits {wanted}")]
    WrongLayer {
        /// The lane named.
        lane: Lane,
        /// The sender.
        slot: Slot,
        /// The layer in flight.
        wanted: LayerId,
        /// The layer named.
        found: LayerId,
    },
    /// More or fewer rows than were asked for.
    #[error("answer of {slot} on {lane} has {found} rows, {wanted} are owed")]
    WrongRows {
        /// The lane named.
        lane: Lane,
        /// The sender.
        slot: Slot,
        /// Rows owed.
        wanted: u32,
        /// Rows that came.
        found: u32,
    },
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Awaited,
    Answered,
    /// Another frame was sent in its place: its answer, should it still come, counts no more.
    Replaced,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct InFlight {
    view: ViewId,
    layer: LayerId,
    owed: Vec<(Owed, State)>,
    missing: usize,
}

/// A fixed number of lanes. A lane is taken by [`Lanes::begin`] and free again after [`Lanes::end`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lanes {
    slots: Vec<Option<InFlight>>,
}

impl Lanes {
    /// `lanes` credits, all free.
    pub fn new(lanes: u16) -> Self {
        Self { slots: (0..lanes).map(|_| None).collect() }
    }

    /// Lanes that are not in flight.
    pub fn free(&self) -> usize {
        self.slots.iter().filter(|s| s.is_none()).count()
    }

    /// Lanes there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Takes a free lane for one exchange; `None` when all are in flight.
    pub fn begin(&mut self, view: ViewId, layer: LayerId, owed: impl IntoIterator<Item = Owed>) -> Option<Lane> {
        let lane = self.slots.iter().position(Option::is_none)?;
        let owed: Vec<(Owed, State)> = owed.into_iter().map(|o| (o, State::Awaited)).collect();
        let missing = owed.len();
        self.slots[lane] = Some(InFlight { view, layer, owed, missing });
        Some(Lane(lane as u16))
    }

    /// Checks an answer and counts it.
    ///
    /// # Errors
    /// [`Refused`]; the lane then still owes what it owed.
    pub fn accept(&mut self, answer: Answer) -> Result<Accepted, Refused> {
        let Answer { slot, view, seq, layer, lane, pairs } = answer;
        let in_flight = self.slots.get_mut(lane.index()).ok_or(Refused::UnknownLane { lane })?;
        let in_flight = in_flight.as_mut().ok_or(Refused::Unexpected { lane, seq, slot })?;
        let found = in_flight.owed.iter().position(|(o, _)| o.slot == slot && o.seq == seq);
        let index = found.ok_or(Refused::Unexpected { lane, seq, slot })?;
        if in_flight.view != view {
            return Err(Refused::WrongView { lane, slot, wanted: in_flight.view, found: view });
        }
        if in_flight.layer != layer {
            return Err(Refused::WrongLayer { lane, slot, wanted: in_flight.layer, found: layer });
        }
        let (owed, state) = &mut in_flight.owed[index];
        if owed.pairs != pairs {
            return Err(Refused::WrongRows { lane, slot, wanted: owed.pairs, found: pairs });
        }
        match *state {
            State::Awaited => *state = State::Answered,
            State::Answered => return Err(Refused::Duplicate { lane, seq, slot }),
            State::Replaced => return Err(Refused::Unexpected { lane, seq, slot }),
        }
        in_flight.missing -= 1;
        Ok(Accepted { index, complete: in_flight.missing == 0 })
    }

    /// Puts further frames in the place of frame `index`: its answer is owed no more (nor counts, if it was there
    /// already), theirs are. Returns the position of the first of them.
    pub fn replace(&mut self, lane: Lane, index: usize, by: impl IntoIterator<Item = Owed>) -> Option<usize> {
        let in_flight = self.slots.get_mut(lane.index())?.as_mut()?;
        let (_, state) = in_flight.owed.get_mut(index)?;
        if *state == State::Awaited {
            in_flight.missing -= 1;
        }
        *state = State::Replaced;
        let first = in_flight.owed.len();
        in_flight.owed.extend(by.into_iter().map(|o| (o, State::Awaited)));
        in_flight.missing += in_flight.owed.len() - first;
        Some(first)
    }

    /// Whether the lane is in flight and owed nothing more.
    pub fn is_complete(&self, lane: Lane) -> bool {
        self.slots.get(lane.index()).and_then(Option::as_ref).is_some_and(|f| f.missing == 0)
    }

    /// What the lane is still owed: whom a missed deadline names.
    pub fn missing(&self, lane: Lane) -> impl Iterator<Item = Owed> + '_ {
        let in_flight = self.slots.get(lane.index()).and_then(Option::as_ref);
        in_flight.into_iter().flat_map(|f| f.owed.iter().filter(|(_, s)| *s == State::Awaited).map(|(o, _)| *o))
    }

    /// Gives the lane back, complete or abandoned. Answers that come later are refused as unexpected.
    pub fn end(&mut self, lane: Lane) {
        if let Some(slot) = self.slots.get_mut(lane.index()) {
            *slot = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWED: [Owed; 2] =
        [Owed { slot: Slot(0), seq: Seq(5), pairs: 3 }, Owed { slot: Slot(2), seq: Seq(9), pairs: 1 }];

    fn answer(lane: Lane) -> Answer {
        Answer { slot: Slot(0), view: ViewId(7), seq: Seq(5), layer: LayerId(1), lane, pairs: 3 }
    }

    fn in_flight() -> (Lanes, Lane) {
        let mut lanes = Lanes::new(2);
        let lane = lanes.begin(ViewId(7), LayerId(1), OWED).unwrap();
        (lanes, lane)
    }

    #[test]
    fn a_lane_is_complete_when_everyone_has_answered_once() {
        let (mut lanes, lane) = in_flight();
        assert_eq!(lanes.accept(answer(lane)), Ok(Accepted { index: 0, complete: false }));
        assert_eq!(lanes.missing(lane).collect::<Vec<_>>(), [OWED[1]]);
        let second = Answer { slot: Slot(2), seq: Seq(9), pairs: 1, ..answer(lane) };
        assert_eq!(lanes.accept(second), Ok(Accepted { index: 1, complete: true }));
        assert!(lanes.is_complete(lane));
        lanes.end(lane);
        assert_eq!(lanes.free(), 2);
    }

    #[test]
    fn what_is_stale_foreign_or_repeated_is_refused_and_changes_nothing() {
        let (mut lanes, lane) = in_flight();
        let a = answer(lane);
        let refusals = [
            Answer { lane: Lane(9), ..a },
            Answer { lane: Lane(1), ..a },
            Answer { seq: Seq(4), ..a },
            Answer { slot: Slot(1), ..a },
            Answer { view: ViewId(6), ..a },
            Answer { layer: LayerId(2), ..a },
            Answer { pairs: 2, ..a },
        ];
        for r in refusals {
            assert!(lanes.accept(r).is_err(), "{r:?}");
            assert_eq!(lanes.missing(lane).count(), 2);
        }
        lanes.accept(a).unwrap();
        assert!(matches!(lanes.accept(a), Err(Refused::Duplicate { .. })));
        lanes.end(lane);
        assert!(matches!(lanes.accept(a), Err(Refused::Unexpected { .. })));
    }

    #[test]
    fn a_replaced_frame_is_owed_no_more_and_its_late_answer_does_not_count() {
        let (mut lanes, lane) = in_flight();
        let by = [Owed { slot: Slot(2), seq: Seq(10), pairs: 2 }, Owed { slot: Slot(3), seq: Seq(1), pairs: 1 }];
        assert_eq!(lanes.replace(lane, 0, by), Some(2));
        assert!(matches!(lanes.accept(answer(lane)), Err(Refused::Unexpected { .. })));
        let answers = [(Slot(2), Seq(9), 1), (Slot(2), Seq(10), 2), (Slot(3), Seq(1), 1)];
        let completes = answers
            .map(|(slot, seq, pairs)| lanes.accept(Answer { slot, seq, pairs, ..answer(lane) }).unwrap().complete);
        assert_eq!(completes, [false, false, true]);
        // What was answered is given up too, where a part of its destination has to be asked for again.
        lanes.replace(lane, 1, [Owed { slot: Slot(0), seq: Seq(6), pairs: 1 }]);
        assert!(!lanes.is_complete(lane));
        assert_eq!(lanes.replace(Lane(1), 0, []), None);
    }

    #[test]
    fn there_are_only_so_many_lanes() {
        let mut lanes = Lanes::new(1);
        let lane = lanes.begin(ViewId(1), LayerId(0), []).unwrap();
        assert!(lanes.is_complete(lane));
        assert_eq!(lanes.begin(ViewId(1), LayerId(0), []), None);
    }
}
