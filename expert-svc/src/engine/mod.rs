//! The engine: one thread that owns the data plane and answers frames.
//!
//! A turn takes in what has arrived, picks waiting frames fairly over channels up to a bound, checks each against the
//! view that it names, runs all their rows as one grouped FFN, and answers each frame alone. Nothing here waits for
//! anybody in particular: what cannot be answered is refused, and what is wrong closes its own channel and no other.
//!
//! # Layout
//! - here: the turn
//! - `queues`: frames that wait for their turn or for their view
//! - `check`: whether a frame may be answered
//! - `gather`: rows of many frames as groups by expert, in place

mod check;
mod gather;
mod queues;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh_core::{Role, Slot};
use mesh_kernels::Compute;
use mesh_transport::buffer::FrameBuf;
use mesh_transport::frame::{AbortReason, FrameHeader, Kind};
use mesh_transport::{ChannelId, Event, Identity, Transport, TransportError, Wake};

use crate::config::EngineLimits;
use crate::counters::{Counters, Refusal, TurnPart};
use crate::error::ExpertError;
use crate::table::{ExpertShape, Standing, Tables};
use check::{Checked, Verdict};
use queues::{Pending, Queues};

/// How long the engine sleeps when nothing happens: arrivals and wakes end the sleep at once, so this only bounds it.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// What an engine is made of.
pub struct EngineParts {
    /// The data plane; the engine owns it.
    pub transport: Box<dyn Transport>,
    /// The arithmetic.
    pub compute: Arc<dyn Compute>,
    /// What is served, changed by views.
    pub tables: Arc<Tables>,
    /// Where it counts.
    pub counters: Arc<Counters>,
    /// What frames are measured by.
    pub shape: ExpertShape,
    /// This node's slot.
    pub slot: Slot,
    /// Its bounds.
    pub limits: EngineLimits,
}

/// The loop's state. Belongs to one thread.
pub struct Engine {
    parts: EngineParts,
    queues: Queues,
    stop: Arc<AtomicBool>,
    // Kept to spare their allocations.
    events: Vec<Event>,
    round: Vec<Pending>,
    grouping: gather::Grouping,
}

/// A running engine, from any other thread.
pub struct EngineHandle {
    thread: std::thread::JoinHandle<()>,
    stop: Arc<AtomicBool>,
    waker: Arc<dyn Wake>,
}

impl EngineHandle {
    /// What makes the engine look at its tables.
    pub fn waker(&self) -> Arc<dyn Wake> {
        self.waker.clone()
    }

    /// Whether the engine has ended, of itself or by panic.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends the engine after its turn and waits for that.
    ///
    /// # Errors
    /// [`ExpertError::EngineDied`] when it had panicked.
    pub fn stop(self) -> Result<(), ExpertError> {
        self.stop.store(true, Ordering::Release);
        self.waker.wake();
        self.thread.join().map_err(|_| ExpertError::EngineDied)
    }
}

impl Engine {
    /// An engine that serves nothing yet.
    pub fn new(parts: EngineParts) -> Self {
        Self {
            queues: Queues::new(parts.limits),
            grouping: gather::Grouping::new(parts.shape.len()),
            parts,
            stop: Arc::default(),
            events: Vec::new(),
            round: Vec::new(),
        }
    }

    /// Starts the engine on its own thread. `ended` is called when it ends, however it does.
    ///
    /// # Errors
    /// [`ExpertError::Thread`].
    pub fn spawn(self, ended: impl FnOnce() + Send + 'static) -> Result<EngineHandle, ExpertError> {
        struct OnDrop<F: FnOnce()>(Option<F>);
        impl<F: FnOnce()> Drop for OnDrop<F> {
            fn drop(&mut self) {
                self.0.take().into_iter().for_each(|f| f());
            }
        }
        let (stop, waker) = (self.stop.clone(), self.parts.transport.waker());
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
            let _ended = OnDrop(Some(ended));
            self.parts.compute.bind_thread();
            self.run();
        });
        Ok(EngineHandle { thread: thread.map_err(ExpertError::Thread)?, stop, waker })
    }

    fn run(mut self) {
        while !self.stop.load(Ordering::Acquire) {
            self.parts.counters.profile.start();
            let until = self.turn(Instant::now());
            self.parts.counters.profile.stop(TurnPart::Receive);
            if let Some(until) = until {
                self.parts.transport.wait(until);
            }
        }
    }

    /// One turn; returns until when there is nothing to do unless something arrives, `None` when there is more at once.
    fn turn(&mut self, now: Instant) -> Option<Instant> {
        let mut events = std::mem::take(&mut self.events);
        self.parts.transport.poll(&mut events);
        for event in events.drain(..) {
            self.take_in(event, now);
        }
        self.events = events;
        self.settle_views(now);
        if let Some(until) = self.queues.held_until(now) {
            return Some(until);
        }
        let answered = self.answer_round();
        if answered || self.queues.is_ready() && !self.window_full() {
            return None;
        }
        self.parts.counters.set_transport(&self.parts.transport.stats());
        Some(self.queues.next_expiry().unwrap_or(now + IDLE_MAX).min(now + IDLE_MAX))
    }

    /// Whether no answer can be built until one is on the wire; the window wakes this thread then.
    fn window_full(&mut self) -> bool {
        matches!(self.parts.transport.buffer(1), Err(TransportError::WindowFull { .. }))
    }

    fn take_in(&mut self, event: Event, now: Instant) {
        match event {
            Event::Accepted { channel, peer } => self.accept(channel, peer),
            Event::Frame { channel, header, body } => self.receive(channel, header, body, now),
            Event::Closed { channel, error } => {
                if let Some(peer) = self.queues.close(channel) {
                    tracing::info!(peer = %peer.node, %error, "attention node's channel closed");
                }
                self.parts.counters.set_channels(self.queues.channels());
            }
        }
    }

    fn accept(&mut self, channel: ChannelId, peer: Identity) {
        if peer.role != Role::Attention {
            tracing::warn!(peer = %peer.node, role = %peer.role, "only attention nodes dispatch; channel closed");
            self.parts.transport.close(channel);
            return;
        }
        tracing::info!(peer = %peer.node, slot = peer.slot.0, "attention node connected");
        self.queues.open(channel, peer);
        self.parts.counters.set_channels(self.queues.channels());
    }

    fn receive(&mut self, channel: ChannelId, header: FrameHeader, body: FrameBuf, now: Instant) {
        // Frames of a channel closed earlier in the same turn go with it.
        let Some(peer) = self.queues.peer(channel) else { return };
        if header.kind == Kind::Probe {
            return;
        }
        self.parts.counters.received();
        let origin = peer.slot;
        if header.kind != Kind::Dispatch || header.origin != origin || !self.queues.advance(channel, header.seq) {
            let why = format!("{} frame {} of {} where {origin} dispatches", header.kind, header.seq, header.origin);
            return self.expel(channel, Refusal::Protocol, &why);
        }
        if !self.queues.push(Pending { channel, header, body, received: now }) {
            self.refuse(channel, &header, Refusal::Overloaded);
        }
    }

    /// Moves parked frames whose view has come to their queues, and refuses those whose time is over.
    fn settle_views(&mut self, now: Instant) {
        if self.queues.next_expiry().is_none() {
            return;
        }
        let served = self.parts.tables.served();
        for refused in self.queues.unpark(now, |view| !matches!(served.standing(view), Standing::Future)) {
            self.refuse(refused.channel, &refused.header, Refusal::FutureView);
        }
    }

    /// Picks frames, checks them, computes and answers. Returns whether any frame left its queue for good.
    fn answer_round(&mut self) -> bool {
        let mut round = std::mem::take(&mut self.round);
        self.queues.pick(&mut round);
        let picked = round.len();
        let served = self.parts.tables.served();
        let mut work: Vec<Work> = Vec::with_capacity(picked);
        let mut pending = round.drain(..);
        let mut left: Vec<Pending> = Vec::new();
        for frame in pending.by_ref() {
            let checked = match check::check(&frame, &served, &self.parts.shape) {
                Verdict::Answer(checked) => checked,
                verdict => {
                    dispose(&mut self.parts, &mut self.queues, frame, verdict);
                    continue;
                }
            };
            let bytes = frame.header.pairs as usize * self.parts.shape.row_bytes;
            match self.parts.transport.buffer(bytes) {
                Ok(answer) => work.push(Work { frame, checked, answer }),
                Err(TransportError::WindowFull { .. }) => {
                    left.push(frame);
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, pairs = frame.header.pairs, "an answer fits no frame");
                    refuse(&mut self.parts, frame.channel, &frame.header, Refusal::Overloaded);
                }
            }
        }
        left.extend(pending);
        let moved = picked > left.len();
        self.queues.put_back(left);
        self.round = round;
        if !work.is_empty() {
            self.compute_and_send(work);
        }
        moved
    }

    fn compute_and_send(&mut self, mut work: Vec<Work>) {
        let row_bytes = self.parts.shape.row_bytes;
        self.parts.counters.profile.lap(TurnPart::Receive);
        let done = self.grouping.run(&mut work, row_bytes, self.parts.compute.as_ref(), &self.parts.counters);
        self.parts.counters.profile.lap_with(TurnPart::Ffn, done);
        self.parts.counters.round();
        for Work { frame: Pending { channel, header, body, received }, answer, .. } in work {
            // The request's room in the window comes first: what is sent next may need it.
            drop(body);
            let server_ns = u64::try_from(received.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let combine = header.combine(self.parts.slot, server_ns);
            match self.parts.transport.send(channel, &combine, answer) {
                Ok(()) => self.parts.counters.answered(header.rows, header.pairs, row_bytes),
                Err(error) => self.lost(channel, &error),
            }
        }
        self.parts.counters.profile.lap(TurnPart::Answer);
    }

    fn refuse(&mut self, channel: ChannelId, header: &FrameHeader, why: Refusal) {
        refuse(&mut self.parts, channel, header, why);
    }

    fn expel(&mut self, channel: ChannelId, counted: Refusal, why: &str) {
        expel(&mut self.parts, &mut self.queues, channel, counted, why);
    }

    /// A peer that went while its answer was made; its `Closed` event follows unless the transport forgot it already.
    fn lost(&mut self, channel: ChannelId, error: &TransportError) {
        tracing::debug!(%error, "an answer came too late for its channel");
        if !matches!(error, TransportError::NoChannel { .. }) {
            self.parts.transport.close(channel);
            self.queues.close(channel);
            self.parts.counters.set_channels(self.queues.channels());
        }
    }
}

/// A frame that will be answered.
struct Work {
    frame: Pending,
    checked: Checked,
    answer: FrameBuf,
}

/// Does what a verdict other than an answer asks for.
fn dispose(parts: &mut EngineParts, queues: &mut Queues, frame: Pending, verdict: Verdict) {
    match verdict {
        Verdict::Answer(_) => {}
        Verdict::Park => {
            if let Some(frame) = queues.park(frame) {
                refuse(parts, frame.channel, &frame.header, Refusal::FutureView);
            }
        }
        Verdict::Refuse(why) => refuse(parts, frame.channel, &frame.header, why),
        Verdict::Expel(error) => expel(parts, queues, frame.channel, Refusal::BadBody, &error),
    }
}

/// Answers a frame with an abort.
fn refuse(parts: &mut EngineParts, channel: ChannelId, header: &FrameHeader, why: Refusal) {
    let reason = match why {
        Refusal::StaleView => AbortReason::StaleView,
        Refusal::FutureView => AbortReason::FutureView,
        Refusal::UnknownLayer => AbortReason::UnknownLayer,
        Refusal::ExpertNotHeld => AbortReason::ExpertNotHeld,
        Refusal::WrongRowBytes => AbortReason::WrongRowBytes,
        Refusal::Overloaded => AbortReason::Overloaded,
        Refusal::BadBody | Refusal::Protocol => AbortReason::BadBody,
    };
    parts.counters.refuse(why);
    let FrameHeader { view, seq, layer, origin, .. } = *header;
    tracing::debug!(%view, %seq, %layer, from = %origin, %reason, "frame refused");
    if let Err(error) = parts.transport.send(channel, &header.abort(parts.slot, reason), FrameBuf::empty()) {
        tracing::debug!(%error, "a refusal came too late for its channel");
    }
}

/// Closes a channel whose frames cannot be trusted, and forgets what waits of it.
fn expel(parts: &mut EngineParts, queues: &mut Queues, channel: ChannelId, counted: Refusal, why: &str) {
    parts.counters.refuse(counted);
    let peer = queues.close(channel);
    tracing::warn!(peer = %peer.map(|p| p.node).unwrap_or_default(), why, "channel closed");
    parts.transport.close(channel);
    parts.counters.set_channels(queues.channels());
}
