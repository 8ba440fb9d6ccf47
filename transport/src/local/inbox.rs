//! What waits for a transport's thread, and its sleep.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Link;
use crate::buffer::FrameBuf;
use crate::frame::FrameHeader;
use crate::handshake::{HandshakeError, Refusal};
use crate::{ChannelId, FRAMES_QUEUED_MAX, Identity, TransportError, Wake};

/// Looks at the queue between two offers of the processor to others.
const SPINS_A_YIELD: u32 = 4;

pub(super) enum Message {
    Accepted { channel: ChannelId, peer: Identity, link: Link },
    Frame { channel: ChannelId, header: FrameHeader, body: FrameBuf },
    Closed { channel: ChannelId, error: TransportError },
}

impl Message {
    fn channel(&self) -> ChannelId {
        match self {
            Message::Accepted { channel, .. } | Message::Frame { channel, .. } | Message::Closed { channel, .. } => {
                *channel
            }
        }
    }
}

/// What became of a frame for a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    Queued,
    Gone,
    Full { frames: usize },
}

#[derive(Default)]
struct State {
    queue: Vec<Message>,
    /// Channels that may still bring something, and how many of their frames are queued.
    open: BTreeMap<ChannelId, usize>,
    channels: u64,
    sleeping: bool,
    shut: bool,
    refused: BTreeMap<&'static str, u64>,
}

/// What waits for one transport's thread; others push, it takes.
pub(crate) struct Inbox {
    channels_max: usize,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether there is something in the queue: what the spinning thread looks at. Written under the lock.
    ready: AtomicBool,
    /// Whether somebody called since the last wait that saw it.
    woken: AtomicBool,
}

impl Inbox {
    pub(super) fn new(channels_max: usize) -> Self {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { channels_max, state, changed, ready: AtomicBool::new(false), woken: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the owner that there is something; releases the lock first.
    fn announce(&self, state: MutexGuard<'_, State>) {
        let sleeping = state.sleeping;
        self.ready.store(!state.queue.is_empty(), Ordering::Release);
        drop(state);
        if sleeping {
            self.changed.notify_one();
        }
    }

    /// A new channel's number, or nothing when all are open.
    pub(super) fn open(&self) -> Option<ChannelId> {
        let mut state = self.lock();
        if state.shut || state.open.len() >= self.channels_max {
            return None;
        }
        state.channels += 1;
        let channel = ChannelId(state.channels);
        state.open.insert(channel, 0);
        Some(channel)
    }

    /// Takes a proven peer in, and returns the channel's number here.
    pub(super) fn accept(&self, peer: Identity, link: Link) -> Result<ChannelId, HandshakeError> {
        let Some(channel) = self.open() else {
            self.refuse("busy");
            return Err(HandshakeError::Refused(Refusal::Busy));
        };
        let mut state = self.lock();
        if state.shut {
            return Err(HandshakeError::HungUp);
        }
        state.queue.push(Message::Accepted { channel, peer, link });
        self.announce(state);
        Ok(channel)
    }

    pub(super) fn push_frame(&self, channel: ChannelId, header: &FrameHeader, body: FrameBuf) -> Pushed {
        let mut state = self.lock();
        let Some(queued) = state.open.get_mut(&channel) else {
            // The body goes back to its window outside the lock: that may wake its owner.
            drop(state);
            drop(body);
            return Pushed::Gone;
        };
        if *queued >= FRAMES_QUEUED_MAX {
            let frames = *queued;
            drop(state);
            drop(body);
            return Pushed::Full { frames };
        }
        *queued += 1;
        state.queue.push(Message::Frame { channel, header: *header, body });
        self.announce(state);
        Pushed::Queued
    }

    /// Ends a channel; what was pushed before is still taken first.
    pub(super) fn push_closed(&self, channel: ChannelId, error: TransportError) {
        let mut state = self.lock();
        if state.open.remove(&channel).is_some() {
            state.queue.push(Message::Closed { channel, error });
            self.announce(state);
        }
    }

    /// Drops whatever a channel brought. The messages are returned, to be dropped outside the lock.
    pub(super) fn forget(&self, channel: ChannelId) -> Vec<Message> {
        let mut state = self.lock();
        state.open.remove(&channel);
        let (mine, others) = std::mem::take(&mut state.queue).into_iter().partition(|m| m.channel() == channel);
        state.queue = others;
        mine
    }

    /// Ends everything: nothing can be pushed any more. The messages are returned, to be dropped outside the lock.
    pub(super) fn shut(&self) -> Vec<Message> {
        let mut state = self.lock();
        state.shut = true;
        state.open.clear();
        std::mem::take(&mut state.queue)
    }

    /// Everything in the queue; `into` must be empty, and its memory is the queue's from then on.
    pub(super) fn take(&self, into: &mut Vec<Message>) {
        if !self.ready.load(Ordering::Acquire) {
            return;
        }
        let mut state = self.lock();
        std::mem::swap(&mut state.queue, into);
        state.open.values_mut().for_each(|queued| *queued = 0);
        self.ready.store(false, Ordering::Release);
    }

    /// Returns when there is something, on a wake, or at the deadline; spins until `spin_until`, then sleeps.
    pub(super) fn wait(&self, deadline: Instant, spin_until: Instant) {
        if self.has_news() {
            return;
        }
        let spin_until = deadline.min(spin_until);
        while Instant::now() < spin_until {
            for _ in 0..SPINS_A_YIELD {
                if self.has_news() {
                    return;
                }
                std::hint::spin_loop();
            }
            // On few cores, the peer that is waited for may need this one.
            std::thread::yield_now();
        }
        let mut state = self.lock();
        while state.queue.is_empty() && !self.has_news() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state.sleeping = true;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.sleeping = false;
        }
    }

    /// Whether a wait is over; takes note of a call.
    fn has_news(&self) -> bool {
        // Looking before writing keeps the cache line shared while the owner spins.
        self.ready.load(Ordering::Acquire)
            || self.woken.load(Ordering::Acquire) && self.woken.swap(false, Ordering::AcqRel)
    }

    pub(super) fn refuse(&self, reason: &'static str) {
        *self.lock().refused.entry(reason).or_default() += 1;
    }

    pub(super) fn refused(&self) -> BTreeMap<&'static str, u64> {
        self.lock().refused.clone()
    }
}

impl Wake for Inbox {
    fn wake(&self) {
        let state = self.lock();
        self.woken.store(true, Ordering::Release);
        self.announce(state);
    }
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        write!(f, "Inbox({} messages of {} channels)", state.queue.len(), state.open.len())
    }
}
