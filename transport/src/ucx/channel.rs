//! One channel's state: what waits for credit on its way out, and what waits for its turn on its way in.

use std::collections::VecDeque;

use super::inbox::{CREDITS, HEAD_BYTES, PREFIX_BYTES, Payload, Prefix, Token};
use crate::buffer::FrameBuf;
use crate::fault::{Damage, Way};
use crate::frame::{BodySum, FrameError, FrameHeader, HEADER_BYTES};

/// A frame on its way out, cut into messages.
#[derive(Debug)]
pub struct Sending {
    prefix: Prefix,
    header: [u8; HEADER_BYTES],
    body: FrameBuf,
    /// Whether it was lent before.
    again: bool,
}

impl Sending {
    /// The next message: its active-message header, written to `head`, and its part of the body, `part_bytes` of it at most.
    pub fn next<'a>(&self, part_bytes: usize, head: &'a mut [u8]) -> (&'a [u8], &[u8]) {
        let at = self.prefix.offset;
        self.head(&mut head[..HEAD_BYTES]);
        let head_bytes = if at == 0 { HEAD_BYTES } else { PREFIX_BYTES };
        (&head[..head_bytes], &self.body[at..self.body.len().min(at.saturating_add(part_bytes))])
    }

    /// Writes what the first message begins with to `head`, of [`HEAD_BYTES`].
    pub fn head(&self, head: &mut [u8]) {
        head[..PREFIX_BYTES].copy_from_slice(&self.prefix.encode());
        head[PREFIX_BYTES..].copy_from_slice(&self.header);
    }

    /// What the peer can read the body by where it is, if that is in shared memory.
    pub fn key(&self) -> Option<&[u8]> {
        self.body.key()
    }

    /// Lets the peer read the body where it is, if that is worth it: it is in shared memory, and longer than one message of
    /// `part_bytes`. Whether it may.
    pub fn lend(&mut self, part_bytes: usize) -> bool {
        let worth_it = self.body.key().is_some() && self.body.len() > part_bytes;
        if worth_it {
            self.body.lend(self.prefix.token.0);
        }
        worth_it
    }

    /// `bytes` of the body are with UCX; whether that was the rest.
    pub fn advance(&mut self, bytes: usize) -> bool {
        self.prefix.offset += bytes;
        self.is_sent()
    }

    /// Whether it is sent once more.
    pub fn is_again(&self) -> bool {
        self.again
    }

    /// Bytes of the whole frame.
    pub fn bytes(&self) -> usize {
        HEADER_BYTES + self.body.len()
    }

    /// Whether the whole body is with UCX.
    pub fn is_sent(&self) -> bool {
        self.prefix.offset >= self.body.len()
    }
}

/// Frames on their way out of one channel.
#[derive(Debug)]
pub struct Outgoing {
    /// The name that the peer gave the channel.
    theirs: Token,
    sent: u64,
    acked: u64,
    /// Whether UCX took a part of a frame and has no room for the next.
    halted: bool,
    waiting: VecDeque<([u8; HEADER_BYTES], FrameBuf)>,
    /// Frames whose bodies the peer reads where they are, in their order.
    lent: VecDeque<Sending>,
    /// The number of the first frame that was lent.
    first_lent: Option<u64>,
    /// Whether the peer could read all that was lent to it so far.
    reachable: bool,
    /// Frames that it could not.
    again: VecDeque<Sending>,
}

impl Outgoing {
    /// To a peer that calls the channel `theirs`.
    pub fn new(theirs: Token) -> Self {
        Self {
            theirs,
            sent: 0,
            acked: 0,
            halted: false,
            waiting: VecDeque::new(),
            lent: VecDeque::new(),
            first_lent: None,
            reachable: true,
            again: VecDeque::new(),
        }
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

    /// Whether UCX is in the middle of a frame, which others must not overtake.
    pub fn halt(&mut self, halted: bool) {
        self.halted = halted;
    }

    /// The next frame that may go.
    pub fn next(&mut self) -> Option<Sending> {
        if self.halted {
            return None;
        }
        if let Some(frame) = self.again.pop_front() {
            return Some(frame);
        }
        if self.sent - self.acked >= CREDITS {
            return None;
        }
        let (header, body) = self.waiting.pop_front()?;
        let prefix = Prefix { token: self.theirs, number: self.sent, offset: 0, body_bytes: body.len() };
        self.sent += 1;
        Some(Sending { prefix, header, body, again: false })
    }

    /// The peer says that it has taken `count` frames in all; false if it cannot have.
    pub fn acknowledge(&mut self, count: u64) -> bool {
        let possible = count <= self.sent;
        // Acknowledgements may overtake each other: an older one says nothing new.
        self.acked = self.acked.max(count.min(self.sent));
        while self.lent.front().is_some_and(|frame| frame.prefix.number < self.acked) {
            self.lent.pop_front();
        }
        possible
    }

    /// Whether the peer could read what was lent to it.
    pub fn is_reachable(&self) -> bool {
        self.reachable
    }

    /// Whether the peer has read from our memory, and so has attached it.
    pub fn is_memory_known(&self) -> bool {
        self.first_lent.is_some_and(|number| number < self.acked)
    }

    /// Keeps a frame that was lent.
    pub fn keep(&mut self, frame: Sending) {
        self.first_lent.get_or_insert(frame.prefix.number);
        self.lent.push_back(frame);
    }

    /// The peer cannot read the body of frame `number`, which is sent again with it; false if it was not lent.
    pub fn unreachable(&mut self, number: u64) -> bool {
        self.reachable = false;
        let at = self.lent.iter().position(|frame| frame.prefix.number == number);
        self.again.extend(at.and_then(|at| self.lent.remove(at)).map(|frame| Sending { again: true, ..frame }));
        at.is_some()
    }
}

/// A header, and what its body has to give.
type Head = (FrameHeader, BodySum);

/// Where a frame on its way in has got to.
#[derive(Debug)]
enum Place {
    /// It is not here, or not all of it.
    Absent,
    /// It has no buffer yet.
    Unbuffered(Head, Vec<u8>),
    /// It is where it belongs.
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
    /// Frames since the last acknowledgement whose bodies the peer keeps.
    borrowed: u64,
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
    /// A frame arrived; whether it has its buffer.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn arrived(
        &mut self,
        number: u64,
        header: &[u8; HEADER_BYTES],
        payload: Payload,
        body_bytes_max: usize,
    ) -> Result<bool, Wrong> {
        let head = FrameHeader::decode(header, body_bytes_max).map_err(Wrong::Frame)?;
        let (said, came) = (head.0.body_bytes as usize, payload.bytes());
        if said != came {
            return Err(Wrong::Length { header: said, body: came });
        }
        let at = number.checked_sub(self.delivered).filter(|at| *at < CREDITS).map(|at| at as usize);
        let at = at.ok_or(Wrong::Number(number))?;
        while self.places.len() <= at {
            self.places.push_back(Place::Absent);
        }
        if !matches!(self.places[at], Place::Absent) {
            return Err(Wrong::Number(number));
        }
        let buffered = matches!(payload, Payload::Placed(_));
        self.unbuffered += usize::from(!buffered);
        self.places[at] = match payload {
            Payload::Placed(body) => Place::Whole(head, body),
            Payload::Beside(bytes) => Place::Unbuffered(head, bytes),
        };
        Ok(buffered)
    }

    /// Finds a buffer for the next frame that lacks one, with `take(number, bytes)`; false when there is no such frame or no
    /// buffer.
    pub fn buffer_next(&mut self, take: impl FnOnce(u64, usize) -> Option<FrameBuf>) -> bool {
        if self.unbuffered == 0 {
            return false;
        }
        let next = self.places.iter().position(|place| !matches!(place, Place::Whole(..)));
        let Some((at, Place::Unbuffered(head, bytes))) = next.map(|at| (at, &self.places[at])) else { return false };
        let Some(mut body) = take(self.delivered + at as u64, bytes.len()) else { return false };
        body.copy_from_slice(bytes);
        self.places[at] = Place::Whole(*head, body);
        self.unbuffered -= 1;
        true
    }

    /// Whether a frame is here that lacks a buffer.
    pub fn is_starving(&self) -> bool {
        self.unbuffered > 0
    }

    /// The next frame in order, if it is whole, or what is wrong with its body.
    pub fn next(&mut self, damage: &mut Damage) -> Option<Result<(FrameHeader, FrameBuf), FrameError>> {
        match self.places.pop_front()? {
            Place::Whole((header, sum), mut body) => {
                self.delivered += 1;
                damage.strike_body(Way::In, &mut body);
                Some(sum.check(&body).map(|()| (header, body)))
            }
            place => {
                self.places.push_front(place);
                None
            }
        }
    }

    /// The body of a frame was copied out of where the peer keeps it.
    pub fn borrowed(&mut self) {
        self.borrowed += 1;
    }

    /// How many frames to acknowledge, when it is time to: after `every`, or after `every_borrowed` whose bodies the peer keeps.
    pub fn acknowledge_now(&mut self, every: u64, every_borrowed: u64) -> Option<u64> {
        if self.delivered - self.acknowledged < every && self.borrowed < every_borrowed {
            return None;
        }
        (self.acknowledged, self.borrowed) = (self.delivered, 0);
        Some(self.delivered)
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

    fn arrive(incoming: &mut Incoming, number: u64) -> Result<bool, Wrong> {
        incoming.arrived(number, &header(), Payload::Placed(FrameBuf::empty()), BODY_BYTES_MAX)
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
        assert_eq!(arrive(&mut incoming, 0).unwrap_err(), Wrong::Number(0));
        incoming.next(&mut Damage::default()).unwrap().unwrap();
        assert_eq!(arrive(&mut incoming, 0).unwrap_err(), Wrong::Number(0));
        arrive(&mut incoming, CREDITS).unwrap();
        assert_eq!(arrive(&mut incoming, CREDITS + 1).unwrap_err(), Wrong::Number(CREDITS + 1));
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
        incoming.arrived(1, &row.encode(&body), Payload::Placed(body), BODY_BYTES_MAX).unwrap();
        assert!(incoming.next(&mut damage).unwrap().is_ok(), "a frame without a body");
        assert!(matches!(incoming.next(&mut damage), Some(Err(FrameError::BadBody { .. }))));
    }

    #[test]
    fn a_damaged_header_or_a_wrong_length_is_refused() {
        let mut incoming = Incoming::default();
        let mut damaged = header();
        damaged[20] ^= 1;
        let refused = incoming.arrived(0, &damaged, Payload::Beside(Vec::new()), BODY_BYTES_MAX);
        assert!(matches!(refused, Err(Wrong::Frame(_))));
        let refused = incoming.arrived(0, &header(), Payload::Beside(vec![0; 5]), BODY_BYTES_MAX);
        assert!(matches!(refused, Err(Wrong::Length { header: 0, body: 5 })));
    }

    #[test]
    fn a_frame_without_a_buffer_gets_the_next_one_in_order() {
        let window = Window::new(4, BODY_BYTES_MAX);
        let mut incoming = Incoming::default();
        for number in [1, 0] {
            incoming.arrived(number, &header(), Payload::Beside(Vec::new()), BODY_BYTES_MAX).unwrap();
        }
        assert!(!incoming.buffer_next(|_, _| None), "the window is full");
        let mut asked = Vec::new();
        while incoming.buffer_next(|number, bytes| {
            asked.push(number);
            window.take_received(bytes).ok()
        }) {}
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
        outgoing.halt(true);
        assert!(outgoing.next().is_none(), "in the middle of a frame");
        outgoing.halt(false);
        assert_eq!(std::iter::from_fn(|| outgoing.next()).count(), 3);
    }

    #[test]
    fn a_body_that_is_lent_is_kept_until_its_frame_is_acknowledged() {
        let window = Window::new(8, BODY_BYTES_MAX);
        let mut outgoing = Outgoing::new(Token(7));
        for _ in 0..4 {
            outgoing.push(header(), window.take(10).unwrap());
            let frame = outgoing.next().unwrap();
            outgoing.keep(frame);
        }
        assert_eq!(window.in_use(), 4);
        assert!(outgoing.acknowledge(0) && !outgoing.is_memory_known(), "it has read none of them");
        assert!(outgoing.acknowledge(3) && outgoing.is_memory_known());
        assert_eq!(window.in_use(), 1);
        assert!(outgoing.acknowledge(4));
        assert_eq!(window.in_use(), 0);
    }

    #[test]
    fn a_body_that_cannot_be_read_is_sent_again_before_others_under_its_number() {
        let window = Window::new(8, BODY_BYTES_MAX);
        let mut outgoing = Outgoing::new(Token(7));
        for _ in 0..3 {
            outgoing.push(header(), window.take(10).unwrap());
            let frame = outgoing.next().unwrap();
            outgoing.keep(frame);
        }
        outgoing.push(header(), FrameBuf::empty());
        assert!(outgoing.is_reachable());
        assert!(outgoing.unreachable(1) && !outgoing.is_reachable());
        assert!(!outgoing.unreachable(1) && !outgoing.unreachable(9), "it is not lent");
        outgoing.halt(true);
        assert!(outgoing.next().is_none(), "in the middle of another");
        outgoing.halt(false);
        let again = outgoing.next().unwrap();
        assert_eq!((again.prefix.number, again.is_again()), (1, true));
        let new = outgoing.next().unwrap();
        assert_eq!((new.prefix.number, new.is_again()), (3, false));
    }

    #[test]
    fn a_frame_is_cut_into_parts_that_say_where_they_belong() {
        let mut body = Window::new(2, BODY_BYTES_MAX).take(10).unwrap();
        body.iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8);
        for (part_bytes, ends) in [(4, vec![4, 8, 10]), (10, vec![10]), (usize::MAX, vec![10])] {
            let mut outgoing = Outgoing::new(Token(7));
            let mut copy = Window::new(2, BODY_BYTES_MAX).take(10).unwrap();
            copy.copy_from_slice(&body);
            outgoing.push(header(), copy);
            let mut frame = outgoing.next().unwrap();
            let mut reached = Vec::new();
            loop {
                let mut kept = [0; HEAD_BYTES];
                let (head, part) = frame.next(part_bytes, &mut kept);
                let at = frame.prefix.offset;
                let prefix = Prefix { token: Token(7), number: 0, offset: at, body_bytes: 10 };
                assert_eq!(head[..PREFIX_BYTES], prefix.encode());
                assert_eq!(head[PREFIX_BYTES..], if at == 0 { header().to_vec() } else { Vec::new() });
                assert_eq!(part, &body[at..at + part.len()]);
                reached.push(at + part.len());
                let bytes = part.len();
                if frame.advance(bytes) {
                    break;
                }
            }
            assert_eq!(reached, ends);
        }
        let mut outgoing = Outgoing::new(Token(7));
        outgoing.push(header(), FrameBuf::empty());
        let mut empty = outgoing.next().unwrap();
        assert_eq!(empty.next(4, &mut [0; HEAD_BYTES]).1, [0_u8; 0]);
        assert!(empty.advance(0), "a frame without a body is one message");
    }

    #[test]
    fn acknowledgements_come_every_so_often() {
        let mut incoming = Incoming::default();
        let mut acknowledged = Vec::new();
        for number in 0..2 * ACK_EVERY + 1 {
            arrive(&mut incoming, number).unwrap();
            incoming.next(&mut Damage::default()).unwrap().unwrap();
            acknowledged.extend(incoming.acknowledge_now(ACK_EVERY, 4));
        }
        assert_eq!(acknowledged, [ACK_EVERY, 2 * ACK_EVERY]);
        (0..4).for_each(|_| incoming.borrowed());
        assert_eq!(incoming.acknowledge_now(ACK_EVERY, 4), Some(2 * ACK_EVERY + 1), "the peer keeps four bodies");
        assert_eq!(incoming.acknowledge_now(ACK_EVERY, 4), None);
    }
}
