//! What UCX's callbacks write: arrivals that were let in, under a bound per peer, and endpoints that failed.
//!
//! The callbacks run inside `ucp_worker_progress` and the calls that start an operation, on the transport's own thread,
//! while nothing else holds the state: it is borrowed for the length of one method and never across a call into UCX.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;

use ucx_sys as sys;

use super::lend::KEY_BYTES_MAX;
use crate::buffer::{FrameBuf, Window};
use crate::frame::HEADER_BYTES;

/// The active message that carries a frame.
pub const AM_FRAME: u32 = 1;
/// The active message that acknowledges frames.
pub const AM_ACK: u32 = 2;
/// The active message that tells where a frame's body can be read.
pub const AM_LENT: u32 = 3;
/// The active message that says that it cannot.
pub const AM_UNREACHABLE: u32 = 4;

/// Bytes of the active-message header of an acknowledgement: the receiver's token, then how many frames were taken. The
/// sentinel's messages are such too, under a token that no channel has.
pub const ACK_BYTES: usize = 16;
/// Bytes that a frame's every active message begins with: the receiver's token, the frame's number, where in the body the
/// message's part of it goes, and the body's length.
pub const PREFIX_BYTES: usize = 24;
/// Bytes of the active-message header of a frame's first message: the prefix, then the frame's own header.
pub const HEAD_BYTES: usize = PREFIX_BYTES + HEADER_BYTES;
/// Frames that a peer may have under way or undelivered here; it waits for an acknowledgement before it sends more.
pub const CREDITS: u64 = 64;
/// Frames delivered between two acknowledgements: half of the credits, so that a steady stream never stops.
pub const ACK_EVERY: u64 = CREDITS / 2;
/// The same for frames whose bodies the sender keeps until then.
pub const ACK_EVERY_BORROWED: u64 = 4;

/// Names a channel to the one who sends on it: random, with the place in the table in its low 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

impl Token {
    /// The token of the channel at `place`.
    pub fn new(random: u64, place: u16) -> Self {
        Self((random & !0xffff) | u64::from(place))
    }

    /// Its channel's place in the table.
    pub fn place(self) -> usize {
        usize::from((self.0 & 0xffff) as u16)
    }
}

/// The body of an arrival.
#[derive(Debug)]
pub enum Payload {
    /// In the window.
    Placed(FrameBuf),
    /// Beside it: the window was full, or an earlier frame must have its buffer first.
    Beside(Vec<u8>),
}

impl Payload {
    /// The body's length.
    pub fn bytes(&self) -> usize {
        match self {
            Payload::Placed(body) => body.len(),
            Payload::Beside(bytes) => bytes.len(),
        }
    }

    /// To fill it.
    pub fn body(&mut self) -> &mut [u8] {
        match self {
            Payload::Placed(body) => body,
            Payload::Beside(bytes) => bytes,
        }
    }
}

/// What a callback let in.
#[derive(Debug)]
pub enum Arrival {
    /// A frame.
    Frame {
        /// Its number on its channel.
        number: u64,
        /// The frame's header, unchecked.
        header: [u8; HEADER_BYTES],
        /// Its body, whole.
        payload: Payload,
    },
    /// A frame whose body is still where the peer keeps it.
    Lent {
        /// As of a frame that is here.
        number: u64,
        /// As of a frame that is here.
        header: [u8; HEADER_BYTES],
        /// Where its body is to go.
        payload: Payload,
        /// What the peer says its body can be read by.
        key: Vec<u8>,
    },
    /// The peer has taken this many of our frames.
    Ack(u64),
    /// The peer cannot read the body of this frame of ours, which was lent to it.
    Unreachable(u64),
    /// The peer broke the protocol.
    Violation(&'static str),
}

/// What is let in from one peer.
#[derive(Debug)]
struct Admission {
    token: Token,
    /// Whether the peer proved itself. Until then it is told the token and nothing of it is let in.
    proven: bool,
    /// The number of the next frame that may take a buffer: buffers go out in the order of delivery, so that a frame
    /// that waits for one never waits for a later frame.
    next_buffer: u64,
    /// Frames let in whole and not delivered.
    undelivered: u64,
    /// Frames of which not all is here.
    parts: Vec<Partial>,
}

/// A frame of which not all is here.
#[derive(Debug)]
struct Partial {
    number: u64,
    header: Option<[u8; HEADER_BYTES]>,
    payload: Payload,
    /// Bytes of the body that came. Where they went is not remembered: a peer that sends the same ones twice has left
    /// others out, which the body's checksum shows.
    came: usize,
}

#[derive(Debug)]
struct State {
    window: Arc<Window>,
    body_bytes_max: usize,
    admitted: Vec<Option<Admission>>,
    arrivals: VecDeque<(Token, Arrival)>,
    failed: Vec<(usize, i8)>,
    unknown: u64,
    /// The token of the sentinel.
    secret: Token,
    /// How many messages it says that it has sent.
    sentinel: u64,
}

/// Shared by the callbacks and the transport, on one thread.
#[derive(Debug)]
pub struct Inbox(RefCell<State>);

impl Inbox {
    /// Room for `channels` peers whose bodies go to `window`, and a sentinel that knows `secret`.
    pub fn new(window: Arc<Window>, body_bytes_max: usize, channels: usize, secret: Token) -> Self {
        let admitted = (0..channels.min(usize::from(u16::MAX))).map(|_| None).collect();
        Self(RefCell::new(State {
            window,
            body_bytes_max,
            admitted,
            arrivals: VecDeque::new(),
            failed: Vec::new(),
            unknown: 0,
            secret,
            sentinel: 0,
        }))
    }

    /// Takes a place for a new peer, under a token made of `random`; none when all are taken.
    pub fn reserve(&self, random: u64) -> Option<Token> {
        let mut state = self.0.borrow_mut();
        let place = state.admitted.iter().position(Option::is_none)?;
        let token = Token::new(random, place as u16);
        state.admitted[place] =
            Some(Admission { token, proven: false, next_buffer: 0, undelivered: 0, parts: Vec::new() });
        Some(token)
    }

    /// Lets the peer of `token` in, which proved itself.
    pub fn admit(&self, token: Token) {
        let mut state = self.0.borrow_mut();
        let place = state.admitted.get_mut(token.place()).and_then(Option::as_mut);
        if let Some(peer) = place.filter(|peer| peer.token == token) {
            peer.proven = true;
        }
    }

    /// Lets nothing more in under `token`; what arrived and was not taken comes back through [`Self::take`].
    pub fn dismiss(&self, token: Token) {
        let mut state = self.0.borrow_mut();
        if let Some(place) = state.admitted.get_mut(token.place())
            && place.as_ref().is_some_and(|peer| peer.token == token)
        {
            *place = None;
        }
    }

    /// How many peers there is room for.
    pub fn channels_max(&self) -> usize {
        self.0.borrow().admitted.len()
    }

    /// The next arrival.
    pub fn take(&self) -> Option<(Token, Arrival)> {
        self.0.borrow_mut().arrivals.pop_front()
    }

    /// Whether there is anything to take.
    pub fn has_news(&self) -> bool {
        let state = self.0.borrow();
        !state.arrivals.is_empty() || !state.failed.is_empty()
    }

    /// The next endpoint that failed, by its address, and UCX's status.
    pub fn take_failed(&self) -> Option<(usize, i8)> {
        self.0.borrow_mut().failed.pop()
    }

    /// Messages for no channel of ours since the last call.
    pub fn take_unknown(&self) -> u64 {
        std::mem::take(&mut self.0.borrow_mut().unknown)
    }

    /// How many messages the sentinel had sent when it sent the last that came.
    pub fn sentinel(&self) -> u64 {
        self.0.borrow().sentinel
    }

    /// A frame of `token` was delivered.
    pub fn delivered(&self, token: Token) {
        if let Some(peer) = self.0.borrow_mut().peer(token) {
            peer.undelivered = peer.undelivered.saturating_sub(1);
        }
    }

    /// A buffer for frame `number` of `token`, if it is that frame's turn and the window has one.
    pub fn buffer(&self, token: Token, number: u64, bytes: usize) -> Option<FrameBuf> {
        self.0.borrow_mut().buffer(token, number, bytes)
    }

    /// The body of frame `number` of `token` could not be read where the peer keeps it: it is to come as others do, to `payload`.
    pub fn expect(&self, token: Token, number: u64, payload: Payload) {
        if let Some(peer) = self.0.borrow_mut().peer(token) {
            peer.undelivered = peer.undelivered.saturating_sub(1);
            peer.parts.push(Partial { number, header: None, payload, came: 0 });
        }
    }

    /// A message's callback.
    fn frame(&self, head: &[u8], part: Part<'_>) {
        // The only way to fail is a borrow held across a call into UCX, which the module rules out.
        let Ok(mut state) = self.0.try_borrow_mut() else { return };
        let Some((prefix, header)) = head.split_first_chunk().map(|(prefix, rest)| (Prefix::decode(prefix), rest))
        else {
            state.unknown += 1;
            return;
        };
        let token = prefix.token;
        let body_bytes_max = state.body_bytes_max;
        let Some(peer) = state.peer(token) else {
            state.unknown += 1;
            return;
        };
        let let_in = match part {
            Part::Here(part) => peer.refusal(&prefix, header, part.len(), body_bytes_max).map_or(Ok(part), Err),
            Part::Elsewhere => Err("a body that is to be fetched"),
        };
        match let_in {
            Ok(part) => state.take_in(&prefix, header, part),
            Err(why) => state.shut_out(token, why),
        }
    }

    /// The callback of a message about a frame whose body is lent.
    fn lent(&self, head: &[u8]) {
        let Ok(mut state) = self.0.try_borrow_mut() else { return };
        let body_bytes_max = state.body_bytes_max;
        let known = head.split_first_chunk().and_then(|(prefix, rest)| {
            let prefix = Prefix::decode(prefix);
            let (header, key) = rest.split_first_chunk::<HEADER_BYTES>()?;
            let peer = state.peer(prefix.token)?;
            let twice = peer.parts.iter().any(|partial| partial.number == prefix.number);
            let refusal = peer.refusal(&prefix, header, prefix.body_bytes, body_bytes_max);
            let refusal = refusal.or(twice.then_some("a frame is both sent and lent"));
            let refusal = refusal.or((key.len() > KEY_BYTES_MAX).then_some("a key that is too long"));
            Some((prefix, *header, key, refusal))
        });
        match known {
            None => state.unknown += 1,
            Some((Prefix { token, .. }, _, _, Some(why))) => state.shut_out(token, why),
            Some((Prefix { token, number, body_bytes, .. }, header, key, None)) => {
                let payload = state.payload(token, number, body_bytes);
                if let Some(peer) = state.peer(token) {
                    peer.undelivered += 1;
                    state.arrivals.push_back((token, Arrival::Lent { number, header, payload, key: key.to_vec() }));
                }
            }
        }
    }

    fn ack(&self, head: &[u8]) {
        let Ok(mut state) = self.0.try_borrow_mut() else { return };
        match counted(head) {
            Some((token, count)) if token == state.secret => state.sentinel = state.sentinel.max(count),
            Some((token, count)) => state.told(token, Arrival::Ack(count)),
            None => state.unknown += 1,
        }
    }

    fn unreachable(&self, head: &[u8]) {
        let Ok(mut state) = self.0.try_borrow_mut() else { return };
        match counted(head) {
            Some((token, number)) => state.told(token, Arrival::Unreachable(number)),
            None => state.unknown += 1,
        }
    }
}

/// A message of a token and a number.
fn counted(head: &[u8]) -> Option<(Token, u64)> {
    let head: &[u8; ACK_BYTES] = head.try_into().ok()?;
    Some((Token(u64_at(head, 0)), u64_at(head, 8)))
}

impl State {
    /// Takes something that the peer of `token` says, if there is one.
    fn told(&mut self, token: Token, arrival: Arrival) {
        match self.peer(token) {
            Some(_) => self.arrivals.push_back((token, arrival)),
            None => self.unknown += 1,
        }
    }

    /// Lets nothing more in of a peer that broke the protocol. Once is enough: whatever else it has sent is for no channel of ours.
    fn shut_out(&mut self, token: Token, why: &'static str) {
        self.admitted[token.place()] = None;
        self.arrivals.push_back((token, Arrival::Violation(why)));
    }

    fn payload(&mut self, token: Token, number: u64, bytes: usize) -> Payload {
        match self.buffer(token, number, bytes) {
            Some(body) => Payload::Placed(body),
            None => Payload::Beside(vec![0; bytes]),
        }
    }

    fn peer(&mut self, token: Token) -> Option<&mut Admission> {
        self.admitted.get_mut(token.place())?.as_mut().filter(|peer| peer.token == token && peer.proven)
    }

    fn buffer(&mut self, token: Token, number: u64, bytes: usize) -> Option<FrameBuf> {
        self.peer(token).filter(|peer| peer.next_buffer == number)?;
        let body = self.window.take_received(bytes).ok()?;
        let peer = self.peer(token)?;
        peer.next_buffer += 1;
        Some(body)
    }

    /// Puts a part, which was not refused, where it belongs; if its frame is whole by that, the frame has arrived.
    fn take_in(&mut self, prefix: &Prefix, header: &[u8], part: &[u8]) {
        let &Prefix { token, number, offset, body_bytes } = prefix;
        let begun = self.peer(token).and_then(|peer| {
            let at = peer.parts.iter().position(|partial| partial.number == number)?;
            Some(peer.parts.swap_remove(at))
        });
        let mut partial = begun.unwrap_or_else(|| {
            let payload = self.payload(token, number, body_bytes);
            Partial { number, header: None, payload, came: 0 }
        });
        partial.payload.body()[offset..offset + part.len()].copy_from_slice(part);
        partial.came += part.len();
        partial.header = header.try_into().ok().or(partial.header);
        let Some(peer) = self.peer(token) else { return };
        match partial {
            Partial { header: Some(header), payload, came, .. } if came >= body_bytes => {
                peer.undelivered += 1;
                self.arrivals.push_back((token, Arrival::Frame { number, header, payload }));
            }
            partial => peer.parts.push(partial),
        }
    }
}

impl Admission {
    /// Why a part of a frame is not let in. Every bound on what a peer can make us hold is here.
    fn refusal(
        &self,
        prefix: &Prefix,
        header: &[u8],
        part_bytes: usize,
        body_bytes_max: usize,
    ) -> Option<&'static str> {
        let &Prefix { number, offset, body_bytes, .. } = prefix;
        if header.len() != if offset == 0 { HEADER_BYTES } else { 0 } {
            return Some("a frame's header has the wrong length");
        }
        if body_bytes > body_bytes_max {
            return Some("a frame's body is longer than the agreed bound");
        }
        if offset.saturating_add(part_bytes) > body_bytes || (part_bytes == 0 && body_bytes > 0) {
            return Some("a part of a frame's body lies outside of it");
        }
        match self.parts.iter().find(|partial| partial.number == number) {
            Some(partial) if partial.payload.bytes() != body_bytes => {
                Some("parts of a frame disagree about its length")
            }
            Some(_) => None,
            None if self.undelivered + self.parts.len() as u64 >= CREDITS
                || number.saturating_sub(self.next_buffer) > CREDITS =>
            {
                Some("more frames than there are credits")
            }
            None => None,
        }
    }
}

/// The data of a callback.
enum Part<'a> {
    Here(&'a [u8]),
    /// Still with the sender: a rendezvous, which nobody asks for who speaks this protocol.
    Elsewhere,
}

/// What each message of a frame begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The receiver's name for the channel.
    pub token: Token,
    /// The frame's number on its channel.
    pub number: u64,
    /// Where in the body the message's part goes.
    pub offset: usize,
    /// The body's length.
    pub body_bytes: usize,
}

impl Prefix {
    /// As bytes. Bodies are shorter than 4 GiB ([`crate::frame::FrameHeader::body_bytes`]).
    pub fn encode(&self) -> [u8; PREFIX_BYTES] {
        let mut bytes = [0; PREFIX_BYTES];
        bytes[..8].copy_from_slice(&self.token.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..20].copy_from_slice(&(self.offset as u32).to_le_bytes());
        bytes[20..].copy_from_slice(&(self.body_bytes as u32).to_le_bytes());
        bytes
    }

    /// From bytes.
    fn decode(bytes: &[u8; PREFIX_BYTES]) -> Self {
        let lengths = u64_at(bytes, 16);
        let (offset, body_bytes) = (lengths as u32 as usize, (lengths >> 32) as usize);
        Self { token: Token(u64_at(bytes, 0)), number: u64_at(bytes, 8), offset, body_bytes }
    }
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]))
}

/// A C pointer and length as a slice; an empty one may come as null.
///
/// # Safety
/// `bytes` readable bytes at `data` for as long as the slice lives, unless `bytes` is 0.
unsafe fn slice<'a>(data: *const c_void, bytes: usize) -> &'a [u8] {
    if bytes == 0 || data.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data.cast::<u8>(), bytes) }
}

/// UCX's callback for a frame; `arg` is the [`Inbox`].
///
/// # Safety
/// Only UCX calls it, on the worker's thread, with a live inbox as `arg`.
pub unsafe extern "C" fn on_frame(
    arg: *mut c_void,
    header: *const c_void,
    header_length: usize,
    data: *mut c_void,
    length: usize,
    param: *const sys::ucp_am_recv_param_t,
) -> sys::ucs_status_t {
    // SAFETY: `arg` is the inbox that the worker keeps alive; `param` is valid during the callback.
    let (inbox, attr) = unsafe { (&*arg.cast::<Inbox>(), (*param).recv_attr) };
    // SAFETY: UCX says so, for the length of the callback.
    let head = unsafe { slice(header, header_length) };
    let remote = attr & u64::from(sys::ucp_am_recv_attr_t::UCP_AM_RECV_ATTR_FLAG_RNDV.0) != 0;
    let part = match remote {
        true => Part::Elsewhere,
        // SAFETY: without the rendezvous flag, `data` is `length` readable bytes for the length of the callback.
        false => Part::Here(unsafe { slice(data, length) }),
    };
    inbox.frame(head, part);
    // UCX keeps nothing for us.
    sys::ucs_status_t::UCS_OK
}

/// UCX's callback for the messages that are all header, by their `ID`; `arg` is the [`Inbox`].
///
/// # Safety
/// As for [`on_frame`].
pub unsafe extern "C" fn on_head<const ID: u32>(
    arg: *mut c_void,
    header: *const c_void,
    header_length: usize,
    _data: *mut c_void,
    _length: usize,
    _param: *const sys::ucp_am_recv_param_t,
) -> sys::ucs_status_t {
    // SAFETY: as in `on_frame`. Returning UCS_OK drops whatever data came along.
    let (inbox, head) = unsafe { (&*arg.cast::<Inbox>(), slice(header, header_length)) };
    match ID {
        AM_ACK => inbox.ack(head),
        AM_LENT => inbox.lent(head),
        AM_UNREACHABLE => inbox.unreachable(head),
        _ => {}
    }
    sys::ucs_status_t::UCS_OK
}

/// UCX's callback for an endpoint that failed; `arg` is the [`Inbox`].
///
/// # Safety
/// As for [`on_frame`].
pub unsafe extern "C" fn on_failed(arg: *mut c_void, endpoint: sys::ucp_ep_h, status: sys::ucs_status_t) {
    // SAFETY: as in `on_frame`.
    let inbox = unsafe { &*arg.cast::<Inbox>() };
    if let Ok(mut state) = inbox.0.try_borrow_mut() {
        state.failed.push((endpoint as usize, status.0));
    }
}

#[cfg(test)]
#[path = "inbox_tests.rs"]
mod tests;
