//! Frames over TCP: needs nothing but sockets, works everywhere.
//!
//! # Layout
//! - [`TcpBound`], [`TcpTransport`]: the transport, on one epoll
//! - `door`: listening, connecting, handshakes; `conn`: frames in and out of one connection; `wake`: wakes from other threads

mod conn;
mod door;
mod wake;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

use crate::buffer::{FrameBuf, Window};
use crate::fault::{Spot, Way};
use crate::frame::{FrameHeader, HEADER_BYTES};
use crate::handshake::{Handshake, HandshakeError, Proven};
use crate::spin::SpinBudget;
use crate::{
    Bound, ChannelId, Credentials, Event, Identity, Limits, Transport, TransportError, TransportKind, TransportStats,
    Wake,
};
use conn::Conn;
use door::{GUESTS_MAX, Guest};
use wake::TcpWaker;

const LISTENER: Token = Token(usize::MAX);
const WAKER: Token = Token(usize::MAX - 1);
const EVENTS_PER_POLL: usize = 128;

/// How long to leave the listener alone after the system refused to accept (out of file descriptors, say).
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// A listening socket that takes nobody in yet.
#[derive(Debug)]
pub struct TcpBound {
    listener: std::net::TcpListener,
    local_addr: String,
    limits: Limits,
}

impl TcpBound {
    /// Listens at `host:port`; port 0 takes a free one.
    ///
    /// # Errors
    /// [`TransportError::Bind`] and [`TransportError::BadAddress`].
    pub fn bind(addr: &str, limits: Limits) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Bind { addr: addr.to_owned(), source };
        let listener = std::net::TcpListener::bind(door::bare(addr)?).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let local_addr = door::name(listener.local_addr().map_err(failed)?);
        Ok(Self { listener, local_addr, limits })
    }
}

impl Bound for TcpBound {
    fn local_addr(&self) -> &str {
        &self.local_addr
    }

    fn start(self: Box<Self>, credentials: Credentials) -> Result<Box<dyn Transport>, TransportError> {
        let listener = TcpListener::from_std(self.listener);
        Ok(Box::new(TcpTransport::new(Some(listener), self.local_addr, self.limits, credentials)?))
    }
}

/// A node's end of the data plane over TCP.
pub struct TcpTransport {
    poll: Poll,
    ready: Events,
    waker: Arc<TcpWaker>,
    listener: Option<TcpListener>,
    local_addr: String,
    limits: Limits,
    budget: SpinBudget,
    credentials: Credentials,
    window: Arc<Window>,
    /// The number of the next connection: its token, and its channel once it is authenticated.
    next: usize,
    conns: HashMap<ChannelId, Conn>,
    guests: HashMap<usize, Guest>,
    /// What is to be reported by the next poll.
    pending: Vec<Event>,
    /// When to accept without a word from epoll.
    accept_at: Option<Instant>,
    /// Whether a wait has asked epoll already, and the next poll need not.
    asked: bool,
    stats: TransportStats,
}

impl TcpTransport {
    /// One that only connects.
    ///
    /// # Errors
    /// [`TransportError::Io`] when the system gives no epoll.
    pub fn client(limits: Limits, credentials: Credentials) -> Result<Self, TransportError> {
        Self::new(None, String::new(), limits, credentials)
    }

    fn new(
        mut listener: Option<TcpListener>,
        local_addr: String,
        limits: Limits,
        credentials: Credentials,
    ) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Io { what: "open epoll", source };
        let poll = Poll::new().map_err(failed)?;
        if let Some(listener) = &mut listener {
            poll.registry().register(listener, LISTENER, Interest::READABLE).map_err(failed)?;
        }
        let waker = Arc::new(TcpWaker::new(mio::Waker::new(poll.registry(), WAKER).map_err(failed)?));
        let window = Window::new(limits.bodies_max, limits.body_bytes_max);
        window.set_waker(waker.clone());
        Ok(Self {
            poll,
            ready: Events::with_capacity(EVENTS_PER_POLL),
            waker,
            listener,
            local_addr,
            budget: SpinBudget::new(limits.spin_max),
            limits,
            credentials,
            window,
            next: 0,
            conns: HashMap::new(),
            guests: HashMap::new(),
            pending: Vec::new(),
            accept_at: None,
            asked: false,
            stats: TransportStats::default(),
        })
    }

    /// Asks epoll, and takes note of what it says. Returns whether it said anything.
    fn ask(&mut self, timeout: Duration) -> bool {
        if let Err(error) = self.poll.poll(&mut self.ready, Some(timeout)) {
            if error.kind() != std::io::ErrorKind::Interrupted {
                tracing::error!(%error, "epoll failed");
            }
            return false;
        }
        for event in &self.ready {
            match event.token() {
                LISTENER => self.accept_at = Some(Instant::now()),
                WAKER => {}
                Token(token) => {
                    // Guests are all looked at in each poll: there are few.
                    if let Some(conn) = self.conns.get_mut(&ChannelId(token as u64)) {
                        conn.note(event);
                    }
                }
            }
        }
        self.asked |= !self.ready.is_empty();
        !self.ready.is_empty()
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        self.accept_at = None;
        // One pass over a full backlog at most; further peers come with the next poll.
        for _ in 0..GUESTS_MAX {
            match listener.accept() {
                Ok((stream, addr)) => {
                    let busy = self.conns.len() >= self.limits.channels_max;
                    let full = self.conns.len() + self.guests.len() >= self.limits.channels_max;
                    if self.guests.len() >= GUESTS_MAX || (full && !busy) {
                        let oldest = self.guests.iter().min_by_key(|(_, g)| g.until).map(|(token, _)| *token);
                        if let Some(guest) = oldest.and_then(|token| self.guests.remove(&token)) {
                            refuse(&mut self.stats, guest, &HandshakeError::Crowded);
                        }
                    }
                    self.next += 1;
                    match welcome(&self.poll, &self.credentials, stream, addr, self.next, &self.limits, busy) {
                        Ok(guest) => drop(self.guests.insert(self.next, guest)),
                        Err(error) => tracing::warn!(peer = %addr, %error, "cannot take a connection in"),
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept; trying again in a moment");
                    self.accept_at = Some(Instant::now() + ACCEPT_REST);
                    return;
                }
            }
        }
        self.accept_at = Some(Instant::now());
    }

    fn advance_guests(&mut self) {
        let now = Instant::now();
        let tokens: Vec<usize> = self.guests.keys().copied().collect();
        for token in tokens {
            let Some(mut guest) = self.guests.remove(&token) else { continue };
            match guest.advance() {
                Ok(Some(proven)) => self.admit(token, guest, proven),
                Ok(None) if now < guest.until => drop(self.guests.insert(token, guest)),
                Ok(None) => {
                    let waited = self.limits.handshake_max;
                    refuse(&mut self.stats, guest, &HandshakeError::Timeout { waited });
                }
                Err(error) => refuse(&mut self.stats, guest, &error),
            }
        }
    }

    fn admit(&mut self, token: usize, guest: Guest, Proven { identity, .. }: Proven) {
        let channel = ChannelId(token as u64);
        let peer = called(&identity, &door::name(guest.addr));
        tracing::debug!(%peer, "accepted a peer");
        self.conns.insert(channel, Conn::new(guest.stream, peer));
        self.pending.push(Event::Accepted { channel, peer: identity });
    }

    fn fail(&mut self, channel: ChannelId, error: TransportError) {
        if let Some(conn) = self.conns.remove(&channel) {
            if matches!(error, TransportError::Frame { .. }) {
                tracing::warn!(peer = %conn.peer, %error, "closing a channel over a bad frame");
                self.stats.refuse("bad frame");
            }
            self.pending.push(Event::Closed { channel, error });
        }
    }

    fn move_frames(&mut self) {
        let Self { conns, window, stats, pending, .. } = self;
        let mut failed = Vec::new();
        for (channel, conn) in conns.iter_mut() {
            let channel = *channel;
            let outcome = conn.flush().and_then(|()| {
                conn.read(window, |header, body| {
                    stats.received(HEADER_BYTES + body.len());
                    pending.push(Event::Frame { channel, header, body });
                })
            });
            if let Err(error) = outcome {
                failed.push((channel, error));
            }
        }
        failed.into_iter().for_each(|(channel, error)| self.fail(channel, error));
    }

    fn has_work(&self) -> bool {
        !self.pending.is_empty()
            || self.accept_at.is_some_and(|at| at <= Instant::now())
            || self.conns.values().any(Conn::has_work)
    }
}

/// Turns a guest away, in words and in numbers.
fn refuse(stats: &mut TransportStats, guest: Guest, error: &HandshakeError) {
    tracing::warn!(peer = %guest.addr, %error, "refused a peer");
    stats.refuse(error.name());
    guest.turn_away();
}

fn welcome(
    poll: &Poll,
    credentials: &Credentials,
    mut stream: TcpStream,
    addr: SocketAddr,
    token: usize,
    limits: &Limits,
    busy: bool,
) -> Result<Guest, TransportError> {
    let failed = |source| TransportError::Io { what: "set a connection up", source };
    stream.set_nodelay(true).map_err(failed)?;
    let interest = Interest::READABLE | Interest::WRITABLE;
    poll.registry().register(&mut stream, Token(token), interest).map_err(failed)?;
    let handshake = Handshake::server(credentials, &[]);
    let handshake = handshake.map_err(|error| TransportError::Handshake { peer: door::name(addr), error })?;
    let handshake = if busy { handshake.turn_away() } else { handshake };
    Ok(Guest::new(stream, addr, Instant::now() + limits.handshake_max, handshake))
}

fn called(identity: &Identity, addr: &str) -> String {
    let Identity { role, slot, node, .. } = identity;
    format!("{role} {slot} ({node}) at {addr}")
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn local_addr(&self) -> &str {
        &self.local_addr
    }

    fn connect(&mut self, addr: &str, deadline: Instant) -> Result<(ChannelId, Identity), TransportError> {
        if self.conns.len() >= self.limits.channels_max {
            return Err(TransportError::TooManyChannels { max: self.limits.channels_max });
        }
        let called_up = door::call(addr, deadline, self.limits.handshake_max, &self.credentials);
        let (stream, Proven { identity, .. }) = called_up.inspect_err(|error| {
            if let TransportError::Handshake { error, .. } = error {
                self.stats.refuse(error.name());
            }
        })?;
        let failed = |source| TransportError::Io { what: "set a connection up", source };
        stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).map_err(failed)?;
        let mut stream = TcpStream::from_std(stream);
        self.next += 1;
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut stream, Token(self.next), interest).map_err(failed)?;
        let channel = ChannelId(self.next as u64);
        self.conns.insert(channel, Conn::new(stream, called(&identity, addr)));
        Ok((channel, identity))
    }

    fn close(&mut self, channel: ChannelId) {
        self.conns.remove(&channel);
        self.pending.retain(|event| event.channel() != channel);
    }

    fn buffer(&mut self, bytes: usize) -> Result<FrameBuf, TransportError> {
        self.window.take(bytes)
    }

    fn send(&mut self, channel: ChannelId, header: &FrameHeader, body: FrameBuf) -> Result<(), TransportError> {
        header.check_with_body(&body, self.limits.body_bytes_max).map_err(TransportError::BadSend)?;
        let conn = self.conns.get_mut(&channel).ok_or(TransportError::NoChannel { channel })?;
        let bytes = HEADER_BYTES + body.len();
        match conn.send(header, body) {
            Ok(()) => self.stats.sent(bytes),
            Err(error) => self.fail(channel, error),
        }
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<Event>) -> usize {
        if !std::mem::take(&mut self.asked) {
            self.ask(Duration::ZERO);
            self.asked = false;
        }
        if self.accept_at.is_some_and(|at| at <= Instant::now()) {
            self.accept();
        }
        if !self.guests.is_empty() {
            self.advance_guests();
        }
        self.move_frames();
        let reported = self.pending.len();
        events.append(&mut self.pending);
        reported
    }

    fn wait(&mut self, deadline: Instant) {
        if self.waker.take() || self.has_work() {
            return;
        }
        let begun = Instant::now();
        self.wait_from(begun, deadline);
        self.budget.learn(begun.elapsed());
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.waker.clone()
    }

    fn stats(&self) -> TransportStats {
        let (bodies_in_use, channels) = (self.window.in_use(), self.conns.len());
        TransportStats { bodies_in_use, channels, ..self.stats.clone() }
    }

    fn damage_next(&mut self, channel: ChannelId, way: Way, spot: Spot) -> bool {
        self.conns.get_mut(&channel).map(|conn| conn.damage.arm(way, spot)).is_some()
    }
}

impl TcpTransport {
    /// Spins for as long as waits have been, then sleeps.
    fn wait_from(&mut self, begun: Instant, deadline: Instant) {
        let spin_until = deadline.min(begun + self.budget.next());
        loop {
            if self.ask(Duration::ZERO) || self.waker.take() {
                return;
            }
            if Instant::now() >= spin_until {
                break;
            }
            // On few cores, the peer that is waited for may need this one.
            std::thread::yield_now();
        }
        let until = self.guests.values().map(|guest| guest.until).chain(self.accept_at).fold(deadline, Instant::min);
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        self.waker.set_sleeping(true);
        if !self.waker.take_before_sleep() {
            self.ask(left);
        }
        self.waker.set_sleeping(false);
        self.waker.take();
    }
}
