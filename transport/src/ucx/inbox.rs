//! What UCX's callbacks write: arrivals that were let in, under a bound per peer, and endpoints that failed.
//!
//! The callbacks run inside `ucp_worker_progress` and the calls that start an operation, on the transport's own thread,
//! while nothing else holds the state: it is borrowed for the length of one method and never across a call into UCX.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;

use ucx_sys as sys;

use crate::buffer::{FrameBuf, Window};
use crate::frame::HEADER_BYTES;

/// Bytes before the frame's own header in an active message: the receiver's token, then the message's number.
pub const PREFIX_BYTES: usize = 16;
/// Bytes of the active-message header of a frame.
pub const HEAD_BYTES: usize = PREFIX_BYTES + HEADER_BYTES;
/// Frames that a peer may have under way or undelivered here; it waits for an acknowledgement before it sends more.
pub const CREDITS: u64 = 64;
/// Frames delivered between two acknowledgements: half of the credits, so that a steady stream never stops.
pub const ACK_EVERY: u64 = CREDITS / 2;

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

/// Data that UCX keeps for us until it is received or released; see `Worker::receive` and `Worker::release`.
#[derive(Debug)]
pub struct Descriptor(pub *mut c_void);

// SAFETY: an opaque handle that only the worker's owner passes back to UCX, wherever it has been moved.
unsafe impl Send for Descriptor {}

/// The body of an arrival.
#[derive(Debug)]
pub enum Payload {
    /// All here, in the window.
    Whole(FrameBuf),
    /// All here, but the window was full or an earlier frame must have its buffer first.
    Copied(Vec<u8>),
    /// Still with the sender, to be fetched into `body` when there is one.
    Remote {
        /// What UCX knows it by.
        descriptor: Descriptor,
        /// Its length.
        bytes: usize,
        /// Where it goes.
        body: Option<FrameBuf>,
    },
}

impl Payload {
    /// The body's length.
    pub fn bytes(&self) -> usize {
        match self {
            Payload::Whole(body) => body.len(),
            Payload::Copied(bytes) => bytes.len(),
            Payload::Remote { bytes, .. } => *bytes,
        }
    }

    /// What UCX must be given back if the body is not wanted.
    pub fn into_descriptor(self) -> Option<Descriptor> {
        match self {
            Payload::Remote { descriptor, .. } => Some(descriptor),
            Payload::Whole(_) | Payload::Copied(_) => None,
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
        /// Its body.
        payload: Payload,
    },
    /// The peer has taken this many of our frames.
    Ack(u64),
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
    /// Frames let in and not delivered.
    undelivered: u64,
}

#[derive(Debug)]
struct State {
    window: Arc<Window>,
    body_bytes_max: usize,
    admitted: Vec<Option<Admission>>,
    arrivals: VecDeque<(Token, Arrival)>,
    failed: Vec<(usize, i8)>,
    unknown: u64,
}

/// Shared by the callbacks and the transport, on one thread.
#[derive(Debug)]
pub struct Inbox(RefCell<State>);

impl Inbox {
    /// Room for `channels` peers whose bodies go to `window`.
    pub fn new(window: Arc<Window>, body_bytes_max: usize, channels: usize) -> Self {
        let admitted = (0..channels.min(usize::from(u16::MAX))).map(|_| None).collect();
        Self(RefCell::new(State {
            window,
            body_bytes_max,
            admitted,
            arrivals: VecDeque::new(),
            failed: Vec::new(),
            unknown: 0,
        }))
    }

    /// Takes a place for a new peer, under a token made of `random`; none when all are taken.
    pub fn reserve(&self, random: u64) -> Option<Token> {
        let mut state = self.0.borrow_mut();
        let place = state.admitted.iter().position(Option::is_none)?;
        let token = Token::new(random, place as u16);
        state.admitted[place] = Some(Admission { token, proven: false, next_buffer: 0, undelivered: 0 });
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

    /// A frame's callback: whether UCX shall keep the data for us.
    fn frame(&self, head: &[u8], data: Data<'_>) -> bool {
        // The only way to fail is a borrow held across a call into UCX, which the module rules out.
        let Ok(mut state) = self.0.try_borrow_mut() else { return false };
        let Some((token, number)) = prefix(head) else {
            state.unknown += 1;
            return false;
        };
        let body_bytes_max = state.body_bytes_max;
        let Some(peer) = state.peer(token) else {
            state.unknown += 1;
            return false;
        };
        if let Some(why) = peer.refusal(head, number, data.bytes(), body_bytes_max) {
            // Once is enough: whatever else the peer has sent is for no channel of ours.
            state.admitted[token.place()] = None;
            state.arrivals.push_back((token, Arrival::Violation(why)));
            return false;
        }
        peer.undelivered += 1;
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&head[PREFIX_BYTES..]);
        let body = state.buffer(token, number, data.bytes());
        let (payload, keep) = match (data, body) {
            (Data::Here(bytes), Some(mut body)) => {
                body.copy_from_slice(bytes);
                (Payload::Whole(body), false)
            }
            (Data::Here(bytes), None) => (Payload::Copied(bytes.to_vec()), false),
            (Data::Remote(descriptor, bytes), body) => {
                (Payload::Remote { descriptor: Descriptor(descriptor), bytes, body }, true)
            }
        };
        state.arrivals.push_back((token, Arrival::Frame { number, header, payload }));
        keep
    }

    fn ack(&self, head: &[u8]) {
        let Ok(mut state) = self.0.try_borrow_mut() else { return };
        match prefix(head) {
            Some((token, count)) if state.peer(token).is_some() => {
                state.arrivals.push_back((token, Arrival::Ack(count)));
            }
            _ => state.unknown += 1,
        }
    }
}

impl State {
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
}

impl Admission {
    /// Why a frame is not let in. Every bound on what a peer can make us hold is here.
    fn refusal(&self, head: &[u8], number: u64, bytes: usize, body_bytes_max: usize) -> Option<&'static str> {
        if head.len() != HEAD_BYTES {
            return Some("a frame's header has the wrong length");
        }
        if bytes > body_bytes_max {
            return Some("a frame's body is longer than the agreed bound");
        }
        if self.undelivered >= CREDITS || number.saturating_sub(self.next_buffer) > CREDITS {
            return Some("more frames than there are credits");
        }
        None
    }
}

/// The data of a callback.
enum Data<'a> {
    Here(&'a [u8]),
    Remote(*mut c_void, usize),
}

impl Data<'_> {
    fn bytes(&self) -> usize {
        match self {
            Data::Here(bytes) => bytes.len(),
            Data::Remote(_, bytes) => *bytes,
        }
    }
}

fn prefix(head: &[u8]) -> Option<(Token, u64)> {
    let token = head.get(..8)?.try_into().ok()?;
    let number = head.get(8..PREFIX_BYTES)?.try_into().ok()?;
    Some((Token(u64::from_le_bytes(token)), u64::from_le_bytes(number)))
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
    let data = match remote {
        true => Data::Remote(data, length),
        // SAFETY: without the rendezvous flag, `data` is `length` readable bytes for the length of the callback.
        false => Data::Here(unsafe { slice(data, length) }),
    };
    match inbox.frame(head, data) {
        true => sys::ucs_status_t::UCS_INPROGRESS,
        false => sys::ucs_status_t::UCS_OK,
    }
}

/// UCX's callback for an acknowledgement; `arg` is the [`Inbox`].
///
/// # Safety
/// As for [`on_frame`].
pub unsafe extern "C" fn on_ack(
    arg: *mut c_void,
    header: *const c_void,
    header_length: usize,
    _data: *mut c_void,
    _length: usize,
    _param: *const sys::ucp_am_recv_param_t,
) -> sys::ucs_status_t {
    // SAFETY: as in `on_frame`. Returning UCS_OK drops whatever data came along.
    let (inbox, head) = unsafe { (&*arg.cast::<Inbox>(), slice(header, header_length)) };
    inbox.ack(head);
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
