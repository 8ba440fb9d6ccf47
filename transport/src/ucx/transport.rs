//! The UCX transport: channels over one worker.

use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::UcxOptions;
use super::channel::{Incoming, Outgoing, Sending};
use super::door::{Door, Entered};
use super::inbox::{ACK_EVERY, ACK_EVERY_BORROWED, Arrival, HEAD_BYTES, Inbox, Token};
use super::lend::{self, Fetched};
use super::library::{Context, UcxError};
use super::peer::{Channel, failed, unavailable, violation};
use super::sentinel::{LOOK_EVERY, Quiet, Sentinel};
use super::sleep::{Waker, Watched};
use super::worker::{Finished, Worker};
use crate::buffer::{BODY_ALIGN, FrameBuf, Window};
use crate::fault::{Damage, Spot, Way};
use crate::frame::{FrameHeader, HEADER_BYTES};
use crate::spin::{Crowd, SpinBudget};
use crate::{
    ChannelId, Credentials, Event, FRAMES_QUEUED_MAX, Identity, Limits, Transport, TransportError, TransportKind,
    TransportStats, Wake,
};

/// Calls of `ucp_worker_progress` in one poll, at most: a peer that never stops must not keep the caller from its events.
const PROGRESS_MAX: usize = 16;
/// Polls between two looks at the sockets, which cost a system call.
const SOCKETS_EVERY: u32 = 256;
/// Yields of a wait between two looks at them.
const YIELDS_A_LOOK: u32 = 8;
/// Pauses between two spins of a wait.
const PAUSES: u32 = 2;
/// Bytes of a body in one message where the peer shares memory: UCX passes 8,256 at a time through it (its
/// `MM_SEG_SIZE`), with its own header of a few bytes. What fits is copied from there to where it belongs, while the peer
/// copies the next part in; of longer messages UCX first puts a copy together.
const SHARED_PART_BYTES: usize = 8192 - HEAD_BYTES.next_multiple_of(BODY_ALIGN);
/// Attempts to fall asleep that may find UCX busy before the wait returns instead.
const ARM_TRIES_MAX: usize = 1000;

/// UCX's names for the ways to share memory between processes.
const SHARED: [&str; 3] = ["posix/memory", "sysv/memory", "xpmem/memory"];

/// A worker, and what depends on it: made anew together.
pub struct Queues {
    worker: Worker,
    event_fd: RawFd,
    /// Over anything, and over the network alone.
    addresses: [Vec<u8>; 2],
    /// There is one if UCX may use memory that processes share.
    sentinel: Option<Sentinel>,
}

impl Queues {
    /// Queues that take bodies in to `window`.
    pub fn open(options: &UcxOptions, window: &Arc<Window>, limits: &Limits) -> Result<Self, UcxError> {
        let context = Arc::new(Context::new(options)?);
        let transports = context.transports();
        let random = getrandom::u64().map_err(|error| UcxError::NoWorker { reason: error.to_string() })?;
        let secret = Token::new(random, u16::MAX);
        let inbox = Inbox::new(Arc::clone(window), limits.body_bytes_max, limits.channels_max, secret);
        let mut worker = Worker::new(context, inbox)?;
        let (event_fd, addresses) = (worker.event_fd()?, [worker.address(false)?, worker.address(true)?]);
        let sentinel = match transports.iter().any(|way| SHARED.contains(&way.as_str())) {
            true => Some(Sentinel::new(options, &mut worker, &addresses[0], secret)?),
            false => None,
        };
        tracing::debug!(address_bytes = ?addresses.each_ref().map(Vec::len), ?transports, "ucx worker is up");
        Ok(Self { worker, event_fd, addresses, sentinel })
    }
}

/// A node's end of the data plane over UCX.
pub struct UcxTransport {
    limits: Limits,
    budget: SpinBudget,
    crowd: Crowd,
    window: Arc<Window>,
    waker: Arc<Waker>,
    options: UcxOptions,
    queues: Queues,
    door: Door,
    /// By the place that is the low 16 bits of token and id.
    channels: Vec<Option<Channel>>,
    opened: u64,
    /// Places whose channel may have something to deliver.
    touched: Vec<usize>,
    /// Whether a channel may have frames without a buffer.
    starving: bool,
    broken: Vec<(ChannelId, TransportError)>,
    finished: Vec<Finished>,
    watched: Watched,
    polls: u32,
    quiet: Quiet,
    stats: TransportStats,
}

impl UcxTransport {
    /// A transport that only connects.
    ///
    /// # Errors
    /// [`TransportError::Unavailable`] when UCX cannot be used here, [`TransportError::Io`] when the system refuses.
    pub fn client(limits: Limits, credentials: Credentials, options: &UcxOptions) -> Result<Self, TransportError> {
        Self::new(None, limits, credentials, options)
    }

    pub(super) fn new(
        listener: Option<TcpListener>,
        limits: Limits,
        credentials: Credentials,
        options: &UcxOptions,
    ) -> Result<Self, TransportError> {
        let window = Window::new(limits.bodies_max, limits.body_bytes_max);
        let waker = Waker::new().map_err(|source| TransportError::Io { what: "make an event descriptor", source })?;
        window.set_waker(waker.clone());
        let queues = Queues::open(options, &window, &limits).map_err(unavailable)?;
        let door = Door::new(listener, credentials, &limits, queues.addresses.clone())?;
        Ok(Self {
            channels: (0..limits.channels_max).map(|_| None).collect(),
            budget: SpinBudget::new(limits.spin_max),
            crowd: Crowd::default(),
            limits,
            window,
            waker,
            options: options.clone(),
            queues,
            door,
            opened: 0,
            touched: Vec::new(),
            starving: false,
            broken: Vec::new(),
            finished: Vec::new(),
            watched: Watched::default(),
            polls: 0,
            quiet: Quiet::default(),
            stats: TransportStats::default(),
        })
    }

    /// Makes a channel of a peer that proved itself.
    fn enter(&mut self, entered: Entered) -> Result<(ChannelId, Identity), TransportError> {
        let Entered { stream, token, identity, theirs, same_host, address, name } = entered;
        self.queues.worker.inbox().admit(token);
        let shares = same_host && self.queues.sentinel.is_some();
        let part_bytes = if shares { SHARED_PART_BYTES } else { usize::MAX };
        if shares {
            self.window.set_shared(lend::taker(Arc::clone(self.queues.worker.context())));
        }
        let endpoint = match self.queues.worker.connect(&address, part_bytes) {
            Ok(endpoint) => endpoint,
            Err(error) => {
                self.queues.worker.inbox().dismiss(token);
                return Err(failed("make an endpoint", error));
            }
        };
        self.opened += 1;
        let id = ChannelId(self.opened << 16 | token.place() as u64);
        tracing::debug!(channel = id.0, peer = %name, "ucx channel is open");
        self.channels[token.place()] = Some(Channel {
            id,
            token,
            name,
            same_host,
            liveness: stream,
            endpoint,
            outgoing: Outgoing::new(theirs),
            incoming: Incoming::default(),
            damage: Damage::default(),
        });
        Ok((id, identity))
    }

    fn at(&mut self, id: ChannelId) -> Option<&mut Channel> {
        let place = usize::from((id.0 & 0xffff) as u16);
        self.channels.get_mut(place)?.as_mut().filter(|channel| channel.id == id)
    }

    fn break_later(&mut self, id: ChannelId, error: TransportError) {
        if !self.broken.iter().any(|(broken, _)| *broken == id) {
            self.broken.push((id, error));
        }
    }

    /// Takes in what UCX has, and moves it as far as it goes; whether there was anything.
    fn receive(&mut self) -> bool {
        // What a wait has found already is taken as it is.
        let mut moved = self.queues.worker.inbox().has_news();
        if !moved {
            for _ in 0..PROGRESS_MAX {
                if !self.queues.worker.progress() {
                    break;
                }
                moved = true;
            }
        }
        while let Some((token, arrival)) = self.queues.worker.inbox().take() {
            moved = true;
            self.quiet.broken();
            self.arrived(token, arrival);
        }
        if self.queues.worker.pending() > 0 {
            moved |= self.reap();
        }
        if self.starving {
            self.feed();
        }
        moved
    }

    fn arrived(&mut self, token: Token, arrival: Arrival) {
        let body_bytes_max = self.limits.body_bytes_max;
        let channel = self.channels[token.place()].as_mut().filter(|channel| channel.token == token);
        // Otherwise it was closed in the meantime.
        let Some(channel) = channel else { return };
        let id = channel.id;
        match arrival {
            Arrival::Lent { number, header, mut payload, key } => {
                match self.queues.worker.fetch(&mut channel.endpoint, token, &key, payload.body()) {
                    Ok(Fetched::TakenBack) => {
                        let error = TransportError::Closed { peer: channel.name.clone() };
                        self.break_later(id, error);
                    }
                    Ok(Fetched::Whole) => {
                        channel.incoming.borrowed();
                        self.arrived(token, Arrival::Frame { number, header, payload });
                    }
                    Err(error) => {
                        tracing::debug!(peer = %channel.name, %error, "a body that is lent cannot be read: it is to be sent");
                        self.queues.worker.inbox().expect(token, number, payload);
                        let theirs = channel.outgoing.theirs();
                        if let Err(error) =
                            self.queues.worker.send_unreachable(&channel.endpoint, token, theirs, number)
                        {
                            let error = channel.failed("ask for a body", error);
                            self.break_later(id, error);
                        }
                    }
                }
            }
            Arrival::Unreachable(number) => match channel.outgoing.unreachable(number) {
                true => self.pump(token.place()),
                false => self.break_later(id, violation("wants a body again that was not lent")),
            },
            Arrival::Frame { number, mut header, payload } => {
                channel.damage.strike_header(Way::In, &mut header);
                match channel.incoming.arrived(number, &header, payload, body_bytes_max) {
                    Ok(true) => self.touched.push(token.place()),
                    Ok(false) => self.starving = true,
                    Err(wrong) => {
                        let error = wrong.into_error(&channel.name);
                        self.break_later(id, error);
                    }
                }
            }
            Arrival::Ack(count) => match channel.outgoing.acknowledge(count) {
                true => self.pump(token.place()),
                false => self.break_later(id, violation("acknowledged frames that were never sent")),
            },
            Arrival::Violation(what) => self.break_later(id, violation(what)),
        }
    }

    /// Collects operations that UCX is done with, and goes on with frames that it had no room for; whether there were any.
    fn reap(&mut self) -> bool {
        let mut finished = std::mem::take(&mut self.finished);
        self.queues.worker.reap(&mut finished);
        let any = !finished.is_empty();
        for Finished { channel: token, frame, outcome } in finished.drain(..) {
            let channel = self.channels[token.place()].as_ref().filter(|channel| channel.token == token);
            let Some(channel) = channel else { continue };
            match (outcome, frame) {
                (Err(error), _) => {
                    let (id, error) = (channel.id, channel.failed("send a frame", error));
                    self.break_later(id, error);
                }
                (Ok(()), Some(frame)) => {
                    if self.give(token.place(), frame) {
                        self.pump(token.place());
                    }
                }
                (Ok(()), None) => {}
            }
        }
        self.finished = finished;
        any
    }

    /// Gives buffers to frames that arrived when there was none.
    fn feed(&mut self) {
        self.starving = false;
        for place in 0..self.channels.len() {
            loop {
                let (inbox, channel) = (self.queues.worker.inbox(), self.channels[place].as_mut());
                let Some(channel) = channel else { break };
                let token = channel.token;
                if !channel.incoming.buffer_next(|number, bytes| inbox.buffer(token, number, bytes)) {
                    self.starving |= channel.incoming.is_starving();
                    break;
                }
                self.touched.push(place);
            }
        }
    }

    /// Appends the frames whose turn it is.
    fn deliver(&mut self, events: &mut Vec<Event>) {
        while let Some(place) = self.touched.pop() {
            let Some(channel) = self.channels[place].as_mut() else { continue };
            let mut bad = None;
            while let Some(next) = channel.incoming.next(&mut channel.damage) {
                self.queues.worker.inbox().delivered(channel.token);
                match next {
                    Ok((header, body)) => {
                        self.stats.received(HEADER_BYTES + body.len());
                        events.push(Event::Frame { channel: channel.id, header, body });
                    }
                    Err(error) => {
                        bad = Some((channel.id, TransportError::Frame { peer: channel.name.clone(), error }));
                        break;
                    }
                }
            }
            if let Some((id, error)) = bad {
                self.break_later(id, error);
                continue;
            }
            let Some(count) = channel.incoming.acknowledge_now(ACK_EVERY, ACK_EVERY_BORROWED) else { continue };
            let theirs = channel.outgoing.theirs();
            if let Err(error) = self.queues.worker.send_ack(&channel.endpoint, channel.token, theirs, count) {
                let (id, error) = (channel.id, channel.failed("acknowledge frames", error));
                self.break_later(id, error);
            }
        }
    }

    /// Sends what the peer has credit for, as far as UCX has room.
    fn pump(&mut self, place: usize) {
        while let Some(frame) = self.channels[place].as_mut().and_then(|channel| channel.outgoing.next()) {
            if !frame.is_again() {
                self.stats.sent(frame.bytes());
            }
            let Some(frame) = self.lend(place, frame) else { continue };
            if !self.give(place, frame) {
                return;
            }
        }
    }

    /// Tells the peer where to read a frame's body, if it can; otherwise the frame comes back.
    fn lend(&mut self, place: usize, mut frame: Sending) -> Option<Sending> {
        let channel = self.channels[place].as_mut()?;
        let can = channel.same_host && self.queues.sentinel.is_some() && channel.outgoing.is_reachable();
        if !can || !frame.lend(SHARED_PART_BYTES) {
            return Some(frame);
        }
        let outcome =
            self.queues.worker.lend_frame(&channel.endpoint, channel.token, &frame, channel.outgoing.is_memory_known());
        channel.outgoing.keep(frame);
        if let Err(error) = outcome {
            let (id, error) = (channel.id, channel.failed("lend a frame", error));
            self.break_later(id, error);
        }
        None
    }

    /// Gives a frame, or what is left of it, to UCX; whether it took all of it.
    fn give(&mut self, place: usize, frame: Sending) -> bool {
        let Some(channel) = self.channels[place].as_mut() else { return false };
        match self.queues.worker.send_frame(&channel.endpoint, channel.token, frame) {
            Ok(whole) => {
                channel.outgoing.halt(!whole);
                whole
            }
            Err(error) => {
                let (id, error) = (channel.id, channel.failed("send a frame", error));
                self.break_later(id, error);
                false
            }
        }
    }

    /// Fills `watched` with every socket: the channels' in their order, then the door's.
    fn watch(&mut self) {
        self.watched.clear();
        for channel in self.channels.iter().flatten() {
            self.watched.push(channel.liveness.as_raw_fd(), false);
        }
        self.door.watch(&mut self.watched);
    }

    /// Looks at the sockets: who died, who knocks.
    fn look(&mut self, events: &mut Vec<Event>) {
        self.watch();
        let ready = self.watched.look();
        if ready {
            let watched = &self.watched;
            let dead = self.channels.iter().flatten().enumerate().filter(|(at, _)| watched.ready(*at));
            let dead: Vec<_> = dead.filter_map(|(_, channel)| Some((channel.id, channel.death()?))).collect();
            if !dead.is_empty() {
                // What it sent before it died may still be delivered.
                self.receive();
                self.deliver(events);
            }
            for (id, error) in dead {
                self.break_later(id, error);
            }
        }
        if ready || self.door.has_business() {
            for entered in self.door.look(self.queues.worker.inbox()) {
                match self.enter(entered) {
                    Ok((channel, peer)) => events.push(Event::Accepted { channel, peer }),
                    Err(error) => tracing::warn!(%error, "cannot accept a channel"),
                }
            }
        }
        self.door.take_turned_away().into_iter().for_each(|reason| self.stats.refuse(reason));
        let unknown = self.queues.worker.inbox().take_unknown();
        if unknown > 0 {
            *self.stats.refused.entry("no such channel").or_default() += unknown;
            tracing::warn!(unknown, "dropped messages for no open channel");
        }
    }

    fn report_failures(&mut self, events: &mut Vec<Event>) {
        while let Some((endpoint, status)) = self.queues.worker.inbox().take_failed() {
            let channel = self.channels.iter().flatten().find(|channel| channel.endpoint.address() == endpoint);
            if let Some((id, peer)) = channel.map(|channel| (channel.id, channel.name.clone())) {
                tracing::debug!(
                    channel = id.0,
                    reason = self.queues.worker.words(status),
                    "ucx reports a failed endpoint"
                );
                self.break_later(id, TransportError::Closed { peer });
            }
        }
        for (channel, error) in std::mem::take(&mut self.broken) {
            if self.shut(channel) {
                match &error {
                    TransportError::Frame { .. } => self.stats.refuse("bad frame"),
                    TransportError::SlowPeer { .. } => self.stats.refuse("slow peer"),
                    TransportError::Io { what, .. } => self.stats.refuse(what),
                    _ => {}
                }
                events.push(Event::Closed { channel, error });
            }
        }
    }

    /// Takes a channel down; false if it is down already.
    fn shut(&mut self, id: ChannelId) -> bool {
        if self.at(id).is_none() {
            return false;
        }
        let Some(channel) = self.channels[usize::from((id.0 & 0xffff) as u16)].take() else { return false };
        self.queues.worker.inbox().dismiss(channel.token);
        if let Err(error) = self.queues.worker.close(channel.endpoint, channel.token) {
            tracing::debug!(peer = %channel.name, %error, "the endpoint is gone already");
        }
        // Everything on it was cancelled just now.
        self.reap();
        if channel.same_host {
            self.ask_sentinel();
        }
        true
    }

    /// Finds out whether the queue is blocked; [`Self::renew_if_blocked`] acts on it.
    fn ask_sentinel(&mut self) {
        let Some(sentinel) = self.queues.sentinel.as_mut() else { return };
        if let Err(error) = sentinel.ask() {
            tracing::warn!(%error, "cannot tell whether a peer has blocked this node's queue");
        }
    }

    /// When a wait that begins now is to look whether the queue is blocked.
    fn look_at(&mut self, begun: Instant) -> Option<Instant> {
        let asking = self.queues.sentinel.as_ref()?.is_asking();
        Some(if asking { begun + LOOK_EVERY } else { self.quiet.ends(begun) })
    }

    /// If a peer that was killed or stopped has blocked the queue: gives it up, and with it every channel. Peers come anew.
    fn renew_if_blocked(&mut self, events: &mut Vec<Event>) {
        let Queues { sentinel, worker, .. } = &mut self.queues;
        if !sentinel.as_mut().is_some_and(|sentinel| sentinel.is_blocked(worker)) {
            return;
        }
        self.stats.refuse("blocked queue");
        let open: Vec<_> = self.channels.iter().flatten().map(|channel| (channel.id, channel.name.clone())).collect();
        tracing::warn!(
            channels = open.len(),
            "a peer was killed or stopped while it wrote to this node's queue: opening a new one"
        );
        for (id, peer) in open {
            self.break_later(id, TransportError::Closed { peer });
        }
        self.report_failures(events);
        match Queues::open(&self.options, &self.window, &self.limits) {
            Ok(queues) => {
                self.door.move_to(queues.addresses.clone());
                self.queues = queues;
            }
            // Asked once more, it finds the same and tries again.
            Err(error) => {
                tracing::error!(%error, "cannot open a new queue; trying again");
                self.queues.sentinel.as_mut().map(Sentinel::ask_anew);
            }
        }
    }
}

impl Transport for UcxTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Ucx
    }

    fn local_addr(&self) -> &str {
        self.door.addr()
    }

    fn connect(&mut self, addr: &str, deadline: Instant) -> Result<(ChannelId, Identity), TransportError> {
        let entered = self.door.call(addr, deadline, self.queues.worker.inbox())?;
        self.enter(entered)
    }

    fn close(&mut self, channel: ChannelId) {
        self.broken.retain(|(broken, _)| *broken != channel);
        self.shut(channel);
    }

    fn buffer(&mut self, bytes: usize) -> Result<FrameBuf, TransportError> {
        self.window.take(bytes)
    }

    fn send(&mut self, channel: ChannelId, header: &FrameHeader, mut body: FrameBuf) -> Result<(), TransportError> {
        let body_bytes_max = self.limits.body_bytes_max;
        let open = self.at(channel).ok_or(TransportError::NoChannel { channel })?;
        header.check_with_body(&body, body_bytes_max).map_err(TransportError::BadSend)?;
        let place = open.token.place();
        let frames = open.outgoing.waiting() + 1;
        if frames > FRAMES_QUEUED_MAX {
            let peer = open.name.clone();
            self.break_later(channel, TransportError::SlowPeer { peer, frames });
            return Ok(());
        }
        let mut header = header.encode(&body);
        open.damage.strike_header(Way::Out, &mut header);
        open.damage.strike_body(Way::Out, &mut body);
        open.outgoing.push(header, body);
        self.pump(place);
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<Event>) -> usize {
        let before = events.len();
        self.receive();
        self.deliver(events);
        self.polls += 1;
        if self.polls >= SOCKETS_EVERY {
            self.polls = 0;
            self.look(events);
        }
        self.report_failures(events);
        self.renew_if_blocked(events);
        events.len() - before
    }

    fn wait(&mut self, deadline: Instant) {
        if !self.broken.is_empty() || !self.touched.is_empty() {
            return;
        }
        // Most waits are short, and a look at the clock is a good part of them.
        if !self.budget.next().is_zero() && self.spin_briefly() {
            self.budget.learn(Duration::ZERO);
            return;
        }
        let begun = Instant::now();
        let look_at = self.look_at(begun);
        let deadline = look_at.map_or(deadline, |at| at.min(deadline));
        if !self.spin(begun, deadline) {
            self.sleep(deadline);
        }
        let now = Instant::now();
        self.budget.learn(now.saturating_duration_since(begun));
        if self.quiet.is_over(now) {
            self.ask_sentinel();
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.waker) as Arc<dyn Wake>
    }

    fn stats(&self) -> TransportStats {
        TransportStats {
            bodies_in_use: self.window.in_use(),
            channels: self.channels.iter().flatten().count(),
            ..self.stats.clone()
        }
    }

    fn damage_next(&mut self, channel: ChannelId, way: Way, spot: Spot) -> bool {
        self.at(channel).map(|open| open.damage.arm(way, spot)).is_some()
    }
}

impl UcxTransport {
    /// Sleeps until there is something to poll for, or `deadline`.
    fn sleep(&mut self, deadline: Instant) {
        for _ in 0..ARM_TRIES_MAX {
            if self.queues.worker.progress() || self.queues.worker.inbox().has_news() {
                return;
            }
            match self.queues.worker.arm() {
                Ok(false) => continue,
                Ok(true) => {
                    self.watch();
                    self.watched.push(self.queues.event_fd, false);
                    let deadline = self.door.deadline().map_or(deadline, |door| door.min(deadline));
                    self.watched.sleep(&self.waker, deadline);
                }
                Err(error) => tracing::warn!(%error, "cannot sleep"),
            }
            break;
        }
        self.waker.take();
        self.polls = SOCKETS_EVERY;
    }

    /// Spins until it is time to yield; whether there is something to poll for.
    fn spin_briefly(&mut self) -> bool {
        for _ in 0..self.crowd.spins() {
            if self.queues.worker.progress() || self.queues.worker.inbox().has_news() || self.waker.take() {
                return true;
            }
            // The peer may be on this core's other hardware thread: what we look at too often, it pays for.
            for _ in 0..PAUSES {
                std::hint::spin_loop();
            }
        }
        false
    }

    /// Spins for as long as waits have been; whether there is something to poll for.
    fn spin(&mut self, begun: Instant, deadline: Instant) -> bool {
        let spun = begun.checked_add(self.budget.next()).map_or(deadline, |spun| spun.min(deadline));
        if spun <= begun {
            return false;
        }
        loop {
            for _ in 0..YIELDS_A_LOOK {
                if self.spin_briefly() {
                    return true;
                }
                let now = Instant::now();
                if now >= spun {
                    return spun >= deadline;
                }
                std::thread::yield_now();
                self.crowd.yielded(now.elapsed());
            }
            if self.queues.worker.pending() > 0 && self.reap() {
                return true;
            }
            self.watch();
            if self.watched.look() {
                self.polls = SOCKETS_EVERY;
                return true;
            }
        }
    }
}

impl Drop for UcxTransport {
    fn drop(&mut self) {
        for channel in self.channels.iter_mut().flatten() {
            self.queues.worker.detach(&mut channel.endpoint);
        }
    }
}
