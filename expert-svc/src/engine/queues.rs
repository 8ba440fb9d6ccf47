//! Frames that wait: for their turn, one queue to each channel, or for a view that this node has not heard of.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use mesh_core::{Seq, ViewId};
use mesh_transport::buffer::FrameBuf;
use mesh_transport::frame::FrameHeader;
use mesh_transport::{ChannelId, Identity};

use crate::config::EngineLimits;

/// A dispatch that waits.
pub(super) struct Pending {
    pub channel: ChannelId,
    pub header: FrameHeader,
    pub body: FrameBuf,
    pub received: Instant,
}

struct Channel {
    peer: Identity,
    /// The last dispatch's number; the next must be larger.
    seq: Seq,
    ready: VecDeque<Pending>,
}

/// All channels and what waits of each.
pub(super) struct Queues {
    limits: EngineLimits,
    channels: BTreeMap<ChannelId, Channel>,
    parked: VecDeque<Pending>,
    /// The channel that was served last: the next round begins after it.
    last: ChannelId,
    ready_frames: usize,
    ready_pairs: usize,
}

impl Queues {
    pub fn new(limits: EngineLimits) -> Self {
        let (channels, parked) = (BTreeMap::new(), VecDeque::new());
        Self { limits, channels, parked, last: ChannelId(0), ready_frames: 0, ready_pairs: 0 }
    }

    pub fn channels(&self) -> usize {
        self.channels.len()
    }

    pub fn open(&mut self, channel: ChannelId, peer: Identity) {
        self.channels.insert(channel, Channel { peer, seq: Seq(0), ready: VecDeque::new() });
    }

    /// Forgets a channel and all that waits of it.
    pub fn close(&mut self, channel: ChannelId) -> Option<Identity> {
        let closed = self.channels.remove(&channel)?;
        self.parked.retain(|f| f.channel != channel);
        self.ready_frames -= closed.ready.len();
        self.ready_pairs -= closed.ready.iter().map(pairs).sum::<usize>();
        Some(closed.peer)
    }

    pub fn peer(&self, channel: ChannelId) -> Option<&Identity> {
        self.channels.get(&channel).map(|c| &c.peer)
    }

    /// Takes note of a dispatch's number; `false` when it is not larger than the one before.
    pub fn advance(&mut self, channel: ChannelId, seq: Seq) -> bool {
        let Some(channel) = self.channels.get_mut(&channel) else { return false };
        let ascends = seq > channel.seq;
        channel.seq = channel.seq.max(seq);
        ascends
    }

    /// Queues a frame behind its channel's others; `false` when too many wait.
    pub fn push(&mut self, frame: Pending) -> bool {
        let max = self.limits.channel_frames_max;
        let Some(channel) = self.channels.get_mut(&frame.channel).filter(|c| c.ready.len() < max) else { return false };
        self.ready_frames += 1;
        self.ready_pairs += pairs(&frame);
        channel.ready.push_back(frame);
        true
    }

    /// Whether any frame waits for its turn.
    pub fn is_ready(&self) -> bool {
        self.ready_frames > 0
    }

    /// Until when a round that is not full yet should be held for more frames; `None` when it is due.
    pub fn held_until(&self, now: Instant) -> Option<Instant> {
        let hold = self.limits.hold_max;
        if hold.is_zero() || self.ready_frames == 0 || self.ready_pairs >= self.limits.round_pairs_max {
            return None;
        }
        // When every channel has something waiting, more is not to be expected soon.
        if self.channels.values().all(|c| !c.ready.is_empty()) {
            return None;
        }
        let oldest = self.channels.values().filter_map(|c| c.ready.front()).map(|f| f.received).min()?;
        Some(oldest + hold).filter(|until| *until > now)
    }

    /// Moves frames into `round`, one of each channel in turn, up to the bound on a round's pairs; the first always fits.
    pub fn pick(&mut self, round: &mut Vec<Pending>) {
        let after = (std::ops::Bound::Excluded(self.last), std::ops::Bound::Unbounded);
        let order: Vec<ChannelId> =
            self.channels.range(after).chain(self.channels.range(..=self.last)).map(|(id, _)| *id).collect();
        let mut total = 0;
        while self.ready_frames > 0 {
            for id in &order {
                let Some(channel) = self.channels.get_mut(id) else { continue };
                let Some(next) = channel.ready.front() else { continue };
                let next = pairs(next);
                if total > 0 && total + next > self.limits.round_pairs_max {
                    return;
                }
                let Some(frame) = channel.ready.pop_front() else { continue };
                total += next.max(1);
                self.ready_frames -= 1;
                self.ready_pairs -= next;
                self.last = *id;
                round.push(frame);
            }
        }
    }

    /// Puts picked frames back where they were, in front of their channels' others.
    pub fn put_back(&mut self, frames: Vec<Pending>) {
        for frame in frames.into_iter().rev() {
            if let Some(channel) = self.channels.get_mut(&frame.channel) {
                self.ready_frames += 1;
                self.ready_pairs += pairs(&frame);
                // The next round begins with whom this one could not serve.
                self.last = ChannelId(frame.channel.0.saturating_sub(1));
                channel.ready.push_front(frame);
            }
        }
    }

    /// Parks a frame until its view is known; gives it back when too many are parked.
    pub fn park(&mut self, frame: Pending) -> Option<Pending> {
        if self.parked.len() >= self.limits.parked_frames_max {
            return Some(frame);
        }
        self.parked.push_back(frame);
        None
    }

    /// When the first parked frame's time is over.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.parked.iter().map(|f| f.received + self.limits.parked_max).min()
    }

    /// Queues the parked frames whose view is known by now, and returns those that waited too long.
    pub fn unpark(&mut self, now: Instant, known: impl Fn(ViewId) -> bool) -> Vec<Pending> {
        let mut expired = Vec::new();
        for frame in std::mem::take(&mut self.parked) {
            if known(frame.header.view) {
                if !self.has_room(frame.channel) {
                    self.parked.push_back(frame);
                } else {
                    self.push(frame);
                }
            } else if now >= frame.received + self.limits.parked_max {
                expired.push(frame);
            } else {
                self.parked.push_back(frame);
            }
        }
        expired
    }

    fn has_room(&self, channel: ChannelId) -> bool {
        self.channels.get(&channel).is_some_and(|c| c.ready.len() < self.limits.channel_frames_max)
    }
}

fn pairs(frame: &Pending) -> usize {
    frame.header.pairs as usize
}
