//! Where channels begin: a TCP socket on which both ends prove themselves and exchange what UCX needs. The socket then stays
//! open as long as the channel: its end is the first sign of a peer's death.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use super::greeting::{self, Greeting};
use super::inbox::{Inbox, Token};
use super::sleep::Watched;
use crate::handshake::{EXTRA_BYTES_MAX, Handshake, HandshakeError};
use crate::{Credentials, Identity, Limits, TransportError, TransportKind, names};

/// The scheme of an address of this transport.
pub const SCHEME: &str = "ucx://";
/// Connections taken from the listener in one look, at most.
const ACCEPTS_MAX: usize = 16;
/// How long the listener is left alone when the system refuses to accept (out of file descriptors, say).
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// Guests that are being told that there is no room, at most; one more pushes the oldest out.
const BUSY_MAX: usize = 16;
/// Seconds of silence, seconds between probes and their number, after which the system takes a silent host for dead.
const KEEP_ALIVE: [(libc::c_int, libc::c_int); 3] =
    [(libc::TCP_KEEPIDLE, 3), (libc::TCP_KEEPINTVL, 1), (libc::TCP_KEEPCNT, 5)];

/// A peer that proved itself.
pub struct Entered {
    /// Its socket.
    pub stream: TcpStream,
    /// What it names the channel to us; reserved in the inbox.
    pub token: Token,
    /// Who it is.
    pub identity: Identity,
    /// What we name the channel to it.
    pub theirs: Token,
    /// Whether it runs where it can share memory with us.
    pub same_host: bool,
    /// Where its worker is.
    pub address: Vec<u8>,
    /// Who and where it is, in words.
    pub name: String,
}

/// A connection that has not proved itself yet.
struct Guest {
    stream: TcpStream,
    from: String,
    /// What it is to name the channel; none when it will be told that there is no room.
    token: Option<Token>,
    handshake: Handshake,
    until: Instant,
}

/// The listener, its guests, and what is said at the door.
pub struct Door {
    listener: Option<TcpListener>,
    addr: String,
    credentials: Credentials,
    handshake_max: Duration,
    greeting: Greeting,
    guests: Vec<Guest>,
    /// Until when the listener is left alone.
    resting: Option<Instant>,
    /// Those turned away since they were last counted, by the reason's name.
    turned_away: Vec<&'static str>,
}

impl Door {
    /// A door that tells of a worker's two addresses: over anything, and over the network alone.
    pub fn new(
        listener: Option<TcpListener>,
        credentials: Credentials,
        limits: &Limits,
        [address, network_address]: [Vec<u8>; 2],
    ) -> Result<Self, TransportError> {
        let greeting = Greeting { host: greeting::host(), token: Token(0), address, network_address };
        let bytes = greeting.encode().len();
        if bytes > EXTRA_BYTES_MAX {
            let why = format!(
                "its addresses take {bytes} bytes where {EXTRA_BYTES_MAX} fit; name fewer devices in UCX_NET_DEVICES"
            );
            return Err(TransportError::Unavailable { kind: TransportKind::Ucx, why });
        }
        let addr = match &listener {
            None => String::new(),
            Some(listener) => {
                let set = listener.set_nonblocking(true).and_then(|()| listener.local_addr());
                let addr = set.map_err(|source| TransportError::Io { what: "set the listener up", source })?;
                format!("{SCHEME}{addr}")
            }
        };
        let handshake_max = limits.handshake_max;
        Ok(Self {
            listener,
            addr,
            credentials,
            handshake_max,
            greeting,
            guests: Vec::new(),
            resting: None,
            turned_away: Vec::new(),
        })
    }

    /// From now on tells of another worker. Those who were told of the old one are hung up on, and may call again.
    pub fn move_to(&mut self, [address, network_address]: [Vec<u8>; 2]) {
        self.guests.clear();
        self.greeting = Greeting { address, network_address, ..self.greeting.clone() };
    }

    /// Where peers connect to; empty without a listener.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// Adds the sockets to look at.
    pub fn watch(&self, watched: &mut Watched) {
        if let Some(listener) = self.listener.as_ref().filter(|_| self.resting.is_none()) {
            watched.push(listener.as_raw_fd(), false);
        }
        for guest in &self.guests {
            watched.push(guest.stream.as_raw_fd(), !guest.handshake.output().is_empty());
        }
    }

    /// When the next guest's time is up, or the listener has rested.
    pub fn deadline(&self) -> Option<Instant> {
        self.guests.iter().map(|guest| guest.until).chain(self.resting).min()
    }

    /// The reasons for which peers were turned away since the last call.
    pub fn take_turned_away(&mut self) -> Vec<&'static str> {
        std::mem::take(&mut self.turned_away)
    }

    /// Whether there is something to look after even if no socket is ready.
    pub fn has_business(&self) -> bool {
        !self.guests.is_empty() || self.resting.is_some()
    }

    /// Takes connections in and moves their handshakes on; those that are through.
    pub fn look(&mut self, inbox: &Inbox) -> Vec<Entered> {
        self.take_in(inbox);
        let now = Instant::now();
        let mut entered = Vec::new();
        let mut at = 0;
        while at < self.guests.len() {
            let guest = &mut self.guests[at];
            let outcome = match guest.advance() {
                Ok(None) if guest.until <= now => Err(HandshakeError::Timeout { waited: self.handshake_max }),
                outcome => outcome,
            };
            match outcome {
                Ok(None) => at += 1,
                Ok(Some((identity, theirs))) => {
                    let guest = self.guests.remove(at);
                    entered.extend(guest.enter(&self.greeting, identity, theirs));
                }
                Err(error) => {
                    let guest = self.guests.remove(at);
                    self.turn_away(guest, &error, inbox);
                }
            }
        }
        entered
    }

    fn take_in(&mut self, inbox: &Inbox) {
        self.resting = self.resting.filter(|until| Instant::now() < *until);
        let Some(listener) = self.listener.as_ref().filter(|_| self.resting.is_none()) else { return };
        let mut arrived = Vec::new();
        while arrived.len() < ACCEPTS_MAX {
            match listener.accept() {
                Ok(connection) => arrived.push(connection),
                Err(error) if later(&error) => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections for a moment");
                    self.resting = Some(Instant::now() + ACCEPT_REST);
                    break;
                }
            }
        }
        for (stream, from) in arrived {
            if let Err(error) = self.welcome(stream, from.to_string(), inbox) {
                tracing::warn!(peer = %from, %error, "cannot take a connection in");
            }
        }
    }

    fn welcome(&mut self, stream: TcpStream, from: String, inbox: &Inbox) -> Result<(), TransportError> {
        prepare(&stream).map_err(|source| TransportError::Io { what: "set a connection up", source })?;
        let mut token = reserve(inbox, &from)?;
        // Whoever does not finish its handshake must not keep others out.
        let oldest = self.guests.iter().position(|guest| guest.token.is_some());
        if let (None, Some(oldest)) = (token, oldest) {
            let oldest = self.guests.remove(oldest);
            self.turn_away(oldest, &HandshakeError::Crowded, inbox);
            token = reserve(inbox, &from)?;
        }
        let handshake = match token {
            Some(token) => Handshake::server(&self.credentials, &self.greeting_with(token).encode()),
            None => Handshake::server(&self.credentials, &[]).map(Handshake::turn_away),
        };
        let handshake = handshake.map_err(|error| {
            token.into_iter().for_each(|token| inbox.dismiss(token));
            TransportError::Handshake { peer: from.clone(), error }
        })?;
        if token.is_none() && self.guests.iter().filter(|guest| guest.token.is_none()).count() >= BUSY_MAX {
            let oldest = self.guests.iter().position(|guest| guest.token.is_none());
            let oldest = oldest.map(|oldest| self.guests.remove(oldest));
            oldest.into_iter().for_each(|guest| self.turn_away(guest, &HandshakeError::Busy, inbox));
        }
        let until = Instant::now() + self.handshake_max;
        self.guests.push(Guest { stream, from, token, handshake, until });
        Ok(())
    }

    fn greeting_with(&self, token: Token) -> Greeting {
        Greeting { token, ..self.greeting.clone() }
    }

    fn turn_away(&mut self, guest: Guest, error: &HandshakeError, inbox: &Inbox) {
        tracing::warn!(peer = %guest.from, %error, "handshake failed");
        guest.token.into_iter().for_each(|token| inbox.dismiss(token));
        self.turned_away.push(error.name());
        // The refusal, as far as it fits at once.
        let _ = (&guest.stream).write(guest.handshake.output());
    }

    /// Connects to `addr` and comes through the handshake, before `deadline`.
    pub fn call(&self, addr: &str, deadline: Instant, inbox: &Inbox) -> Result<Entered, TransportError> {
        let begun = Instant::now();
        let stream = dial(addr, deadline)?;
        let Some(token) = reserve(inbox, addr)? else {
            return Err(TransportError::TooManyChannels { max: inbox.channels_max() });
        };
        let proven = Handshake::client(&self.credentials, &self.greeting_with(token).encode())
            .and_then(|handshake| {
                let until = deadline.min(begun + self.handshake_max);
                let from = addr.to_owned();
                let mut guest = Guest { stream, from, token: Some(token), handshake, until };
                let (identity, theirs) = guest.finish(begun).inspect_err(|_| {
                    // The refusal, as far as it fits at once.
                    let _ = (&guest.stream).write(guest.handshake.output());
                })?;
                guest.enter(&self.greeting, identity, theirs).ok_or(HandshakeError::Busy)
            })
            .map_err(|error| match error {
                HandshakeError::Timeout { .. } if deadline <= Instant::now() => {
                    TransportError::Deadline { peer: addr.to_owned(), waited: begun.elapsed() }
                }
                error => TransportError::Handshake { peer: addr.to_owned(), error },
            });
        if proven.is_err() {
            inbox.dismiss(token);
        }
        proven
    }
}

impl Guest {
    /// Writes and reads what it can without blocking; who the peer is, once that is known.
    fn advance(&mut self) -> Result<Option<(Identity, Greeting)>, HandshakeError> {
        let mut bytes = [0; 2048];
        loop {
            while !self.handshake.output().is_empty() {
                match (&self.stream).write(self.handshake.output()) {
                    Ok(0) => return Err(HandshakeError::HungUp),
                    Ok(written) => self.handshake.wrote(written),
                    Err(error) if later(&error) => return Ok(None),
                    Err(_) => return Err(HandshakeError::HungUp),
                }
            }
            if let Some(proven) = self.handshake.finished() {
                let theirs = Greeting::decode(&proven.extra).map_err(|why| {
                    tracing::warn!(peer = %self.from, why, "cannot use the peer's greeting");
                    HandshakeError::NotOurs
                })?;
                return Ok(Some((proven.identity, theirs)));
            }
            let wanted = self.handshake.wanted().min(bytes.len());
            match (&self.stream).read(&mut bytes[..wanted]) {
                Ok(0) => return Err(HandshakeError::HungUp),
                Ok(read) => self.handshake.advance(&bytes[..read])?,
                Err(error) if later(&error) => return Ok(None),
                Err(_) => return Err(HandshakeError::HungUp),
            };
        }
    }

    /// [`Self::advance`] to the end, sleeping in between.
    fn finish(&mut self, begun: Instant) -> Result<(Identity, Greeting), HandshakeError> {
        let mut watched = Watched::default();
        loop {
            if let Some(proven) = self.advance()? {
                return Ok(proven);
            }
            if Instant::now() >= self.until {
                return Err(HandshakeError::Timeout { waited: begun.elapsed() });
            }
            watched.clear();
            watched.push(self.stream.as_raw_fd(), !self.handshake.output().is_empty());
            watched.look_until(self.until);
        }
    }

    /// The peer, if there was a place for it.
    fn enter(self, ours: &Greeting, identity: Identity, theirs: Greeting) -> Option<Entered> {
        let name = format!("node {:x} ({:?} {}, {})", identity.node.0, identity.role, identity.slot.0, self.from);
        let same_host = theirs.shares_host_with(ours);
        let (theirs, address) = (theirs.token, theirs.address_for(ours));
        Some(Entered { stream: self.stream, token: self.token?, identity, theirs, same_host, address, name })
    }
}

/// A connected socket that does not block.
fn dial(addr: &str, deadline: Instant) -> Result<TcpStream, TransportError> {
    let bad =
        || TransportError::BadAddress { addr: addr.to_owned(), kind: TransportKind::Ucx, wanted: "ucx://host:port" };
    let begun = Instant::now();
    let at = addr.strip_prefix(SCHEME).ok_or_else(bad)?;
    let connected = names::dial(at, deadline).and_then(|stream| prepare(&stream).map(|()| stream));
    connected.map_err(|source| match source.kind() {
        io::ErrorKind::InvalidInput => bad(),
        io::ErrorKind::TimedOut if deadline <= Instant::now() => {
            TransportError::Deadline { peer: addr.to_owned(), waited: begun.elapsed() }
        }
        _ => TransportError::Connect { peer: addr.to_owned(), source },
    })
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let fd = stream.as_raw_fd();
    set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    KEEP_ALIVE.into_iter().try_for_each(|(option, value)| set_option(fd, libc::IPPROTO_TCP, option, value))
}

#[allow(unsafe_code)]
fn set_option(fd: RawFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let bytes = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is an int, as these options want, and outlives the call.
    match unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), bytes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn reserve(inbox: &Inbox, peer: &str) -> Result<Option<Token>, TransportError> {
    let random = getrandom::u64().map_err(|error| TransportError::Handshake {
        peer: peer.to_owned(),
        error: HandshakeError::NoRandom(error.to_string()),
    })?;
    Ok(inbox.reserve(random))
}

fn later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
