//! One channel's state: what waits for credit on its way out, and what waits for its turn on its way in.

use std::collections::VecDeque;

use super::inbox::{CREDITS, Descriptor, HEAD_BYTES, PREFIX_BYTES, Payload, Token};
use crate::buffer::FrameBuf;
use crate::fault::{Damage, Way};
use crate::frame::{BodyCrc, FrameError, FrameHeader, HEADER_BYTES};

/// Frames on their way out of one channel.
#[derive(Debug)]
pub struct Outgoing {
    /// The name that the peer gave the channel.
    theirs: Token,
    sent: u64,
    acked: u64,
    waiting: VecDeque<([u8; HEADER_BYTES], FrameBuf)>,
}

impl Outgoing {
    /// To a peer that calls the channel `theirs`.
    pub fn new(theirs: Token) -> Self {
        Self { theirs, sent: 0, acked: 0, waiting: VecDeque::new() }
    }

    /// The name that the peer gave the channel.
    pub fn theirs(&self) -> Token {
        self.theirs
    }

    /// How many frames wait for credit.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Adds a frame behind those that wait.
    pub fn push(&mut self, header: [u8; HEADER_BYTES], body: FrameBuf) {
        self.waiting.push_back((header, body));
    }

    /// The active-message header of a frame that may go at once; none when it must wait behind others or for credit.
    pub fn straight(&mut self, header: &[u8; HEADER_BYTES]) -> Option<[u8; HEAD_BYTES]> {
        (self.waiting.is_empty() && self.has_credit()).then(|| self.number(header))
    }

    /// The next frame that the peer has credit for, with its active-message header.
    pub fn next(&mut self) -> Option<([u8; HEAD_BYTES], FrameBuf)> {
        if !self.has_credit() {
            return None;
        }
        let (header, body) = self.waiting.pop_front()?;
        Some((self.number(&header), body))
    }

    fn has_credit(&self) -> bool {
        self.sent - self.acked < CREDITS
    }

    fn number(&mut self, header: &[u8; HEADER_BYTES]) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(&self.theirs.0.to_le_bytes());
        head[8..PREFIX_BYTES].copy_from_slice(&self.sent.to_le_bytes());
        head[PREFIX_BYTES..].copy_from_slice(header);
        self.sent += 1;
        head
    }

    /// The peer says that it has taken `count` frames in all; false if it cannot have.
    pub fn acknowledge(&mut self, count: u64) -> bool {
        let possible = count <= self.sent;
        // Acknowledgements may overtake each other: an older one says nothing new.
        self.acked = self.acked.max(count.min(self.sent));
        possible
    }
}

/// A header, and what its body has to give.
type Head = (FrameHeader, BodyCrc);

/// Where a frame on its way in has got to.
#[derive(Debug)]
enum Place {
    /// Nothing of it is here.
    Absent,
    /// It has no buffer yet.
    Unbuffered(Head, Payload),
    /// It is being fetched.
    Fetching(Head),
    /// It is whole.
    Whole(Head, FrameBuf),
}

/// Frames on their way in. UCX keeps no order between small frames and large ones: this does.
#[derive(Debug, Default)]
pub struct Incoming {
    /// The number of the first of `places`, which is also how many were delivered.
    delivered: u64,
    acknowledged: u64,
    places: VecDeque<Place>,
    /// How many of `places` have no buffer.
    unbuffered: usize,
}

/// What is to be done about a frame that came in.
#[derive(Debug)]
pub enum Step {
    /// It is whole: deliver it when it is its turn.
    Deliver,
    /// Find it a buffer when there is one.
    NeedsBuffer,
    /// Fetch frame `number` into `body`.
    Fetch {
        /// Which frame.
        number: u64,
        /// What UCX knows it by.
        descriptor: Descriptor,
        /// Where it goes.
        body: FrameBuf,
    },
}

/// What a peer got wrong.
#[derive(Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The frame itself.
    Frame(FrameError),
    /// Its number: seen before, or beyond the credits.
    Number(u64),
    /// Its header and its body disagree about its length.
    Length {
        /// What the header says.
        header: usize,
        /// What came.
        body: usize,
    },
}

impl Incoming {
    /// A frame arrived.
    ///
    /// # Errors
    /// What is wrong with it, and the payload if UCX must be given it back.
    pub fn arrived(
        &mut self,
        number: u64,
        header: &[u8; HEADER_BYTES],
        payload: Payload,
        body_bytes_max: usize,
    ) -> Result<Step, (Wrong, Payload)> {
        let head = match FrameHeader::decode(header, body_bytes_max) {
            Ok(head) => head,
            Err(error) => return Err((Wrong::Frame(error), payload)),
        };
        let (said, came) = (head.0.body_bytes as usize, payload.bytes());
        if said != came {
            return Err((Wrong::Length { header: said, body: came }, payload));
        }
        let at = number.checked_sub(self.delivered).filter(|at| *at < CREDITS).map(|at| at as usize);
        let Some(at) = at else { return Err((Wrong::Number(number), payload)) };
        while self.places.len() <= at {
            self.places.push_back(Place::Absent);
        }
        if !matches!(self.places[at], Place::Absent) {
            return Err((Wrong::Number(number), payload));
        }
        let (place, step) = match payload {
            Payload::Whole(body) => (Place::Whole(head, body), Step::Deliver),
            Payload::Remote { descriptor, body: Some(body), .. } => {
                (Place::Fetching(head), Step::Fetch { number, descriptor, body })
            }
            payload => {
                self.unbuffered += 1;
                (Place::Unbuffered(head, payload), Step::NeedsBuffer)
            }
        };
        self.places[at] = place;
        Ok(step)
    }

    /// Finds a buffer for the next frame that lacks one, with `take(number, bytes)`; none when there is no such frame or
    /// no buffer.
    pub fn buffer_next(&mut self, take: impl FnOnce(u64, usize) -> Option<FrameBuf>) -> Option<Step> {
        if self.unbuffered == 0 {
            return None;
        }
        let at = self.places.iter().position(|place| matches!(place, Place::Unbuffered(..) | Place::Absent))?;
        let number = self.delivered + at as u64;
        let Place::Unbuffered(head, payload) = std::mem::replace(&mut self.places[at], Place::Absent) else {
            return None;
        };
        let Some(mut body) = take(number, payload.bytes()) else {
            self.places[at] = Place::Unbuffered(head, payload);
            return None;
        };
        self.unbuffered -= 1;
        let (place, step) = match payload {
            Payload::Whole(body) => (Place::Whole(head, body), Step::Deliver),
            Payload::Copied(bytes) => {
                body.copy_from_slice(&bytes);
                (Place::Whole(head, body), Step::Deliver)
            }
            Payload::Remote { descriptor, .. } => (Place::Fetching(head), Step::Fetch { number, descriptor, body }),
        };
        self.places[at] = place;
        Some(step)
    }

    /// Whether a frame is here that lacks a buffer.
    pub fn is_starving(&self) -> bool {
        self.unbuffered > 0
    }

    /// Frame `number` was fetched.
    pub fn fetched(&mut self, number: u64, body: FrameBuf) {
        let at = number.checked_sub(self.delivered).and_then(|at| self.places.get_mut(at as usize));
        if let Some(place) = at
            && let Place::Fetching(head) = *place
        {
            *place = Place::Whole(head, body);
        }
    }

    /// The next frame in order, if it is whole, or what is wrong with its body.
    pub fn next(&mut self, damage: &mut Damage) -> Option<Result<(FrameHeader, FrameBuf), FrameError>> {
        match self.places.pop_front()? {
            Place::Whole((header, crc), mut body) => {
                self.delivered += 1;
                damage.strike_body(Way::In, &mut body);
                Some(crc.check(&body).map(|()| (header, body)))
            }
            place => {
                self.places.push_front(place);
                None
            }
        }
    }

    /// How many frames to acknowledge, when it is time to.
    pub fn acknowledge_now(&mut self, every: u64) -> Option<u64> {
        if self.delivered - self.acknowledged < every {
            return None;
        }
        self.acknowledged = self.delivered;
        Some(self.delivered)
    }

    /// What UCX keeps for frames that will not be delivered any more.
    pub fn into_descriptors(self) -> impl Iterator<Item = Descriptor> {
        self.places.into_iter().filter_map(|place| match place {
            Place::Unbuffered(_, payload) => payload.into_descriptor(),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::Slot;

    use super::super::inbox::ACK_EVERY;
    use super::*;
    use crate::buffer::Window;

    const BODY_BYTES_MAX: usize = 1024;

    fn header() -> [u8; HEADER_BYTES] {
        FrameHeader::probe(Slot(1)).encode(&[])
    }

    fn arrive(incoming: &mut Incoming, number: u64) -> Result<Step, (Wrong, Payload)> {
        incoming.arrived(number, &header(), Payload::Whole(FrameBuf::empty()), BODY_BYTES_MAX)
    }

    #[test]
    fn frames_are_delivered_in_the_order_they_were_sent() {
        let mut incoming = Incoming::default();
        for number in [2, 0, 3] {
            arrive(&mut incoming, number).unwrap();
        }
        assert!(incoming.next(&mut Damage::default()).is_some());
        assert!(incoming.next(&mut Damage::default()).is_none(), "frame 1 is not here yet");
        arrive(&mut incoming, 1).unwrap();
        assert_eq!(std::iter::from_fn(|| incoming.next(&mut Damage::default())).count(), 3);
    }

    #[test]
    fn a_number_seen_before_or_beyond_the_credits_is_refused() {
        let mut incoming = Incoming::default();
        arrive(&mut incoming, 0).unwrap();
        assert_eq!(arrive(&mut incoming, 0).unwrap_err().0, Wrong::Number(0));
        incoming.next(&mut Damage::default()).unwrap().unwrap();
        assert_eq!(arrive(&mut incoming, 0).unwrap_err().0, Wrong::Number(0));
        arrive(&mut incoming, CREDITS).unwrap();
        assert_eq!(arrive(&mut incoming, CREDITS + 1).unwrap_err().0, Wrong::Number(CREDITS + 1));
    }

    #[test]
    fn a_damaged_body_is_refused_when_it_is_its_turn() {
        let mut incoming = Incoming::default();
        let mut damage = Damage::default();
        damage.arm(Way::In, crate::fault::Spot::Body(3));
        let mut body = Window::new(1, BODY_BYTES_MAX).take(8).unwrap();
        body.fill(1);
        let row = FrameHeader {
            kind: crate::frame::Kind::Combine,
            pairs: 1,
            row_bytes: 8,
            body_bytes: 8,
            ..FrameHeader::probe(Slot(1))
        };
        arrive(&mut incoming, 0).unwrap();
        incoming.arrived(1, &row.encode(&body), Payload::Whole(body), BODY_BYTES_MAX).unwrap();
        assert!(incoming.next(&mut damage).unwrap().is_ok(), "a frame without a body");
        assert!(matches!(incoming.next(&mut damage), Some(Err(FrameError::BadBodyCrc { .. }))));
    }

    #[test]
    fn a_damaged_header_or_a_wrong_length_is_refused() {
        let mut incoming = Incoming::default();
        let mut damaged = header();
        damaged[20] ^= 1;
        let refused = incoming.arrived(0, &damaged, Payload::Copied(Vec::new()), BODY_BYTES_MAX);
        assert!(matches!(refused, Err((Wrong::Frame(_), _))));
        let refused = incoming.arrived(0, &header(), Payload::Copied(vec![0; 5]), BODY_BYTES_MAX);
        assert!(matches!(refused, Err((Wrong::Length { header: 0, body: 5 }, _))));
    }

    #[test]
    fn a_frame_without_a_buffer_gets_the_next_one_in_order() {
        let window = Window::new(4, BODY_BYTES_MAX);
        let mut incoming = Incoming::default();
        for number in [1, 0] {
            incoming.arrived(number, &header(), Payload::Copied(Vec::new()), BODY_BYTES_MAX).unwrap();
        }
        assert!(incoming.buffer_next(|_, _| None).is_none(), "the window is full");
        let mut asked = Vec::new();
        while incoming
            .buffer_next(|number, bytes| {
                asked.push(number);
                window.take_received(bytes).ok()
            })
            .is_some()
        {}
        assert_eq!(asked, [0, 1]);
        assert_eq!(std::iter::from_fn(|| incoming.next(&mut Damage::default())).count(), 2);
    }

    #[test]
    fn a_sender_stops_at_its_credits_and_goes_on_when_acknowledged() {
        let mut outgoing = Outgoing::new(Token(7));
        for _ in 0..CREDITS + 5 {
            outgoing.push(header(), FrameBuf::empty());
        }
        assert_eq!(std::iter::from_fn(|| outgoing.next()).count() as u64, CREDITS);
        assert!(!outgoing.acknowledge(CREDITS + 1), "more than were sent");
        let mut outgoing = Outgoing::new(Token(7));
        for _ in 0..CREDITS + 5 {
            outgoing.push(header(), FrameBuf::empty());
        }
        while outgoing.next().is_some() {}
        assert!(outgoing.acknowledge(3));
        assert!(outgoing.acknowledge(2), "an older one changes nothing");
        assert!(outgoing.straight(&header()).is_none(), "others wait");
        assert_eq!(std::iter::from_fn(|| outgoing.next()).count(), 3);
    }

    #[test]
    fn acknowledgements_come_every_so_often() {
        let mut incoming = Incoming::default();
        let mut acknowledged = Vec::new();
        for number in 0..2 * ACK_EVERY + 1 {
            arrive(&mut incoming, number).unwrap();
            incoming.next(&mut Damage::default()).unwrap().unwrap();
            acknowledged.extend(incoming.acknowledge_now(ACK_EVERY));
        }
        assert_eq!(acknowledged, [ACK_EVERY, 2 * ACK_EVERY]);
    }
}
