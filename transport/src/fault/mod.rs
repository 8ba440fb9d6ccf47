//! Faults of the data plane, made on purpose: for tests and drills, never for service.
//!
//! [`Faulty`] wraps a node's end of the data plane and harms its frames in both directions: it drops, delays, duplicates,
//! reorders and damages them, makes them say something wrong, and cuts channels, each with its probability. What becomes of
//! the nth frame that goes one way over the nth channel depends on the seed alone. Everything that is done is counted
//! under its name in [`TransportStats::injected`], for comparison with what was refused.
//!
//! Faults are such as the receiver can see.
//!
//! # Layout
//! - here: the wrapper
//! - [`spec`]: which faults, how often
//! - `lie`: frames that say something wrong; `damage`: bits flipped inside the backends; `random`: reproducible numbers

mod damage;
mod lie;
mod random;
pub mod spec;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) use damage::Damage;
pub use damage::{Spot, Way};
use random::Random;
pub use spec::{Fault, FaultSpec, FaultSpecError};

use crate::buffer::FrameBuf;
use crate::frame::FrameHeader;
use crate::{ChannelId, Event, Identity, Transport, TransportError, TransportKind, TransportStats, Wake};

/// Frames that are held at once, over all channels: few enough for the window. Beyond it frames pass undelayed, those held
/// before them on their channel first, and that is counted.
pub const HELD_MAX: usize = 64;
/// How long a frame waits for another to overtake it.
pub const OVERTAKE_MAX: Duration = Duration::from_millis(5);

/// Wraps a transport if any fault is to be made, and says so loudly.
pub fn wrap(inner: Box<dyn Transport>, faults: Option<&FaultSpec>) -> Box<dyn Transport> {
    match faults.filter(|faults| !faults.is_none()) {
        Some(faults) => {
            tracing::warn!(%faults, "FAULTS ARE MADE ON THE DATA PLANE OF THIS NODE: for tests and drills only");
            Box::new(Faulty::new(inner, faults.clone()))
        }
        None => inner,
    }
}

/// A transport that harms its frames.
pub struct Faulty {
    inner: Box<dyn Transport>,
    spec: FaultSpec,
    channels: BTreeMap<ChannelId, Channel>,
    /// Channels opened so far: names their draws, the same over every backend.
    opened: u64,
    /// Frames held, over all channels.
    held: usize,
    /// What is to be reported by the next poll.
    ready: Vec<Event>,
    // Kept to spare its allocation.
    of_inner: Vec<Event>,
    counts: BTreeMap<&'static str, u64>,
}

struct Channel {
    /// By [`Way`].
    flows: [Flow; 2],
    /// Whether the next frame received is damaged before it is checked.
    awaits_damage: bool,
}

/// One direction of a channel.
struct Flow {
    random: Random,
    /// In the order in which they go on; due times ascend.
    held: VecDeque<Held>,
}

struct Held {
    frame: Frame,
    due: Instant,
    /// Whether it waits for another to overtake it.
    waits: bool,
}

struct Frame {
    header: FrameHeader,
    body: FrameBuf,
    /// The bit to flip in it on its way out.
    damage: Option<Spot>,
}

/// Whether a frame goes on at once.
#[derive(Clone, Copy)]
enum Hold {
    No,
    For(Duration),
    ToBeOvertaken,
}

impl Faulty {
    /// Harms the frames of `inner` as `spec` says.
    pub fn new(inner: Box<dyn Transport>, spec: FaultSpec) -> Self {
        Self {
            inner,
            spec,
            channels: BTreeMap::new(),
            opened: 0,
            held: 0,
            ready: Vec::new(),
            of_inner: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    fn count(&mut self, name: &'static str) {
        *self.counts.entry(name).or_default() += 1;
    }

    fn open(&mut self, channel: ChannelId) {
        let (seed, nth) = (self.spec.seed, self.opened);
        self.opened += 1;
        let flow = |way: Way| Flow { random: Random::numbered(seed, 2 * nth + way as u64), held: VecDeque::new() };
        self.channels.insert(channel, Channel { flows: [flow(Way::Out), flow(Way::In)], awaits_damage: false });
    }

    /// Forgets a channel and the frames held of it.
    fn forget(&mut self, id: ChannelId) -> Option<Channel> {
        let channel = self.channels.remove(&id)?;
        self.held -= channel.flows.iter().map(|flow| flow.held.len()).sum::<usize>();
        Some(channel)
    }

    fn flow(&mut self, id: ChannelId, way: Way) -> Option<&mut Flow> {
        self.channels.get_mut(&id).map(|channel| &mut channel.flows[way as usize])
    }

    /// Does to a frame what is drawn for it, and sends it on its way.
    fn harm(&mut self, id: ChannelId, way: Way, header: FrameHeader, body: FrameBuf) -> Result<(), TransportError> {
        let mut frame = Frame { header, body, damage: None };
        let Some(channel) = self.channels.get_mut(&id) else { return Err(TransportError::NoChannel { channel: id }) };
        let random = &mut channel.flows[way as usize].random;
        let Some(fault) = self.spec.draw(random) else { return self.forward(id, way, frame, Hold::No) };
        match fault {
            Fault::Drop => {
                self.count(fault.injected());
                Ok(())
            }
            Fault::Cut => {
                self.count(fault.injected());
                self.cut(id);
                Ok(())
            }
            Fault::Delay => {
                let time = self.spec.draw_delay(random);
                self.forward(id, way, frame, Hold::For(time))
            }
            Fault::Reorder => self.forward(id, way, frame, Hold::ToBeOvertaken),
            Fault::Duplicate => match self.copy(&frame) {
                Some(copy) => {
                    self.count(fault.injected());
                    self.forward(id, way, copy, Hold::No)?;
                    self.forward(id, way, frame, Hold::No)
                }
                None => {
                    self.count(fault.skipped());
                    self.forward(id, way, frame, Hold::No)
                }
            },
            Fault::Corrupt => {
                let drawn = random.next();
                let in_body = drawn >> 63 == 1 && !frame.body.is_empty();
                let spot = if in_body { Spot::Body(drawn as u32) } else { Spot::Header(drawn as u32) };
                match way {
                    Way::Out => frame.damage = Some(spot),
                    // This one has passed its check already: it is the next one's turn. Counted when that is found out.
                    Way::In if self.inner.damage_next(id, Way::In, spot) => channel.awaits_damage = true,
                    Way::In => self.count(fault.skipped()),
                }
                self.forward(id, way, frame, Hold::No)
            }
            lie => {
                let told = lie::tell(lie, &mut frame.header);
                self.count(if told { lie.injected() } else { lie.skipped() });
                self.forward(id, way, frame, Hold::No)
            }
        }
    }

    /// The same frame in a body of its own, if the window has one.
    fn copy(&mut self, frame: &Frame) -> Option<Frame> {
        let mut body = self.inner.buffer(frame.body.len()).ok()?;
        body.copy_from_slice(&frame.body);
        Some(Frame { header: frame.header, body, damage: None })
    }

    /// Sends a frame on its way: at once, or later if it is to be held or others are before it.
    fn forward(&mut self, id: ChannelId, way: Way, frame: Frame, hold: Hold) -> Result<(), TransportError> {
        let now = Instant::now();
        let Some(flow) = self.flow(id, way) else { return Ok(()) };
        // One that waits lets this one pass and goes right behind it.
        let overtaken = if flow.held.back().is_some_and(|last| last.waits) { flow.held.pop_back() } else { None };
        let before = flow.held.back().map(|last| last.due);
        let (until, waits) = match hold {
            Hold::No => (None, false),
            Hold::For(time) => (Some(now + time), false),
            // Who overtakes is not overtaken.
            Hold::ToBeOvertaken if overtaken.is_some() => (None, false),
            Hold::ToBeOvertaken => (Some(now + OVERTAKE_MAX), true),
        };
        if overtaken.is_some() {
            self.held -= 1;
            self.count(Fault::Reorder.injected());
            if matches!(hold, Hold::ToBeOvertaken) {
                self.count(Fault::Reorder.skipped());
            }
        }
        let due = until.max(before);
        let Some(due) = due.filter(|_| self.held + 2 <= HELD_MAX) else {
            if due.is_some() {
                self.count(if waits { Fault::Reorder.skipped() } else { Fault::Delay.skipped() });
                self.release(id, way, None);
            }
            let sent = self.deliver(id, way, frame);
            return overtaken.map_or(sent, |overtaken| self.deliver(id, way, overtaken.frame));
        };
        if matches!(hold, Hold::For(_)) {
            self.count(Fault::Delay.injected());
        }
        self.held += 1 + usize::from(overtaken.is_some());
        let Some(flow) = self.flow(id, way) else { return Ok(()) };
        flow.held.push_back(Held { frame, due, waits });
        flow.held.extend(overtaken.map(|overtaken| Held { due, waits: false, ..overtaken }));
        Ok(())
    }

    /// Hands a frame to the wire, or to the caller's next poll.
    fn deliver(&mut self, id: ChannelId, way: Way, frame: Frame) -> Result<(), TransportError> {
        let Frame { header, body, damage } = frame;
        if way == Way::In {
            self.ready.push(Event::Frame { channel: id, header, body });
            return Ok(());
        }
        if let Some(spot) = damage {
            let damaged = self.inner.damage_next(id, Way::Out, spot);
            self.count(if damaged { Fault::Corrupt.injected() } else { Fault::Corrupt.skipped() });
        }
        self.inner.send(id, &header, body)
    }

    /// Lets go of what is held one way on a channel: all of it, or what is due by `now`.
    fn release(&mut self, id: ChannelId, way: Way, now: Option<Instant>) {
        while let Some(flow) = self.flow(id, way) {
            if flow.held.front().is_some_and(|first| now.is_some_and(|now| first.due > now)) {
                return;
            }
            let Some(Held { frame, waits, .. }) = flow.held.pop_front() else { return };
            self.held -= 1;
            if waits {
                self.count(Fault::Reorder.skipped());
            }
            if let Err(error) = self.deliver(id, way, frame) {
                tracing::debug!(%error, "a frame that was held comes too late for its channel");
            }
        }
    }

    fn release_due(&mut self) {
        if self.held == 0 {
            return;
        }
        let now = Instant::now();
        for id in self.channels.keys().copied().collect::<Vec<_>>() {
            self.release(id, Way::Out, Some(now));
            self.release(id, Way::In, Some(now));
        }
    }

    /// When the first frame that is held goes on.
    fn next_due(&self) -> Option<Instant> {
        let flows = self.channels.values().flat_map(|channel| &channel.flows);
        flows.filter_map(|flow| flow.held.front()).map(|first| first.due).min()
    }

    /// Closes a channel, and tells the caller at the next poll.
    fn cut(&mut self, channel: ChannelId) {
        tracing::debug!(channel = channel.0, "channel cut on purpose");
        self.forget(channel);
        self.inner.close(channel);
        let error = TransportError::Closed { peer: "a fault made on purpose".to_owned() };
        self.ready.push(Event::Closed { channel, error });
    }

    fn take_in(&mut self, event: Event) {
        match event {
            Event::Accepted { channel, .. } => {
                self.open(channel);
                self.ready.push(event);
            }
            Event::Frame { channel, header, body } => {
                // A frame of a channel that was cut in the same poll goes with it.
                let _cut = self.harm(channel, Way::In, header, body);
            }
            Event::Closed { channel, error } => {
                let Some(closed) = self.forget(channel) else { return };
                if closed.awaits_damage && matches!(error, TransportError::Frame { .. }) {
                    self.count(Fault::Corrupt.injected());
                }
                self.ready.push(Event::Closed { channel, error });
            }
        }
    }
}

impl Transport for Faulty {
    fn kind(&self) -> TransportKind {
        self.inner.kind()
    }

    fn local_addr(&self) -> &str {
        self.inner.local_addr()
    }

    fn connect(&mut self, addr: &str, deadline: Instant) -> Result<(ChannelId, Identity), TransportError> {
        let (channel, identity) = self.inner.connect(addr, deadline)?;
        self.open(channel);
        Ok((channel, identity))
    }

    fn close(&mut self, channel: ChannelId) {
        self.forget(channel);
        self.ready.retain(|event| event.channel() != channel);
        self.inner.close(channel);
    }

    fn buffer(&mut self, bytes: usize) -> Result<FrameBuf, TransportError> {
        self.inner.buffer(bytes)
    }

    fn send(&mut self, channel: ChannelId, header: &FrameHeader, body: FrameBuf) -> Result<(), TransportError> {
        // What is wrong with it is said at once, also when it goes later; its length the window has bounded.
        header.check_with_body(&body, usize::MAX).map_err(TransportError::BadSend)?;
        self.harm(channel, Way::Out, *header, body)
    }

    fn poll(&mut self, events: &mut Vec<Event>) -> usize {
        self.release_due();
        let mut of_inner = std::mem::take(&mut self.of_inner);
        self.inner.poll(&mut of_inner);
        of_inner.drain(..).for_each(|event| self.take_in(event));
        self.of_inner = of_inner;
        let reported = self.ready.len();
        events.append(&mut self.ready);
        reported
    }

    fn wait(&mut self, deadline: Instant) {
        let due = self.next_due();
        if !self.ready.is_empty() || due.is_some_and(|due| due <= Instant::now()) {
            return;
        }
        self.inner.wait(due.map_or(deadline, |due| due.min(deadline)));
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }

    fn stats(&self) -> TransportStats {
        TransportStats { injected: self.counts.clone(), ..self.inner.stats() }
    }

    fn damage_next(&mut self, channel: ChannelId, way: Way, spot: Spot) -> bool {
        self.inner.damage_next(channel, way, spot)
    }
}
