//! Getting in: the listener, the connections that have not proven themselves, and connecting to a peer.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::{Duration, Instant};

use mio::net::TcpStream;

use crate::handshake::{Handshake, HandshakeError, Proven};
use crate::{Credentials, TransportError, TransportKind, names};

/// Connections that may be unauthenticated at once; the oldest makes room for a newer one.
pub(super) const GUESTS_MAX: usize = 64;

const SCHEME: &str = "tcp://";

/// An accepted connection that has not proven itself.
pub(super) struct Guest {
    pub stream: TcpStream,
    pub addr: SocketAddr,
    pub until: Instant,
    handshake: Handshake,
}

impl Guest {
    pub fn new(stream: TcpStream, addr: SocketAddr, until: Instant, handshake: Handshake) -> Self {
        Self { stream, addr, until, handshake }
    }

    /// Moves the handshake on as far as the bytes there are carry it.
    pub fn advance(&mut self) -> Result<Option<Proven>, HandshakeError> {
        let mut bytes = [0; 2048];
        loop {
            let written =
                if self.handshake.output().is_empty() { Ok(0) } else { self.stream.write(self.handshake.output()) };
            match written {
                Ok(written) => self.handshake.wrote(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Err(HandshakeError::HungUp),
            }
            if let Some(proven) = self.handshake.finished() {
                return Ok(Some(proven));
            }
            let wanted = self.handshake.wanted().min(bytes.len());
            if wanted == 0 {
                continue;
            }
            match self.stream.read(&mut bytes[..wanted]) {
                Ok(0) => return Err(HandshakeError::HungUp),
                Ok(read) => {
                    self.handshake.advance(&bytes[..read])?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(HandshakeError::HungUp),
            }
        }
    }

    /// Sends the refusal, as far as it goes at once, and hangs up.
    pub fn turn_away(mut self) {
        // All of this is a courtesy to a peer that is being refused: if it fails, nothing is lost.
        let _ = self.stream.write(self.handshake.output());
        let _ = self.stream.shutdown(Shutdown::Write);
        // Unread bytes would turn the end of the stream into a reset, which overtakes the refusal.
        let _ = self.stream.read(&mut [0; 2048]);
    }
}

/// `host:port` of `tcp://host:port` or `host:port`.
pub(super) fn bare(addr: &str) -> Result<&str, TransportError> {
    let bare = addr.strip_prefix(SCHEME).unwrap_or(addr);
    if bare.contains("://") {
        return Err(bad(addr));
    }
    Ok(bare)
}

fn bad(addr: &str) -> TransportError {
    TransportError::BadAddress { addr: addr.to_owned(), kind: TransportKind::Tcp, wanted: "tcp://HOST:PORT" }
}

pub(super) fn name(addr: SocketAddr) -> String {
    format!("{SCHEME}{addr}")
}

/// Connects and proves both sides; blocks until done, `deadline`, or `handshake_max` after the connection.
pub(super) fn call(
    addr: &str,
    deadline: Instant,
    handshake_max: Duration,
    credentials: &Credentials,
) -> Result<(std::net::TcpStream, Proven), TransportError> {
    let mut stream = dial(addr, deadline)?;
    let failed = |error| TransportError::Handshake { peer: addr.to_owned(), error };
    let begun = Instant::now();
    let until = deadline.min(begun + handshake_max);
    let mut handshake = Handshake::client(credentials, &[]).map_err(failed)?;
    let mut bytes = [0; 2048];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(HandshakeError::Timeout { waited: begun.elapsed() }));
        }
        let timeouts = stream.set_read_timeout(Some(left)).and_then(|()| stream.set_write_timeout(Some(left)));
        timeouts.map_err(|source| TransportError::Io { what: "set a socket's timeouts", source })?;
        let wanted = handshake.wanted().min(bytes.len());
        let moved = if handshake.output().is_empty() {
            stream.read(&mut bytes[..wanted])
        } else {
            stream.write(handshake.output()).inspect(|written| handshake.wrote(*written)).map(|_| usize::MAX)
        };
        match moved {
            Ok(0) => return Err(failed(HandshakeError::HungUp)),
            Ok(usize::MAX) => {}
            Ok(read) => {
                if let Err(error) = handshake.advance(&bytes[..read]) {
                    // The reason, if the peer still listens.
                    let _ = stream.write(handshake.output());
                    return Err(failed(error));
                }
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(_) => return Err(failed(HandshakeError::HungUp)),
        }
        if let Some(proven) = handshake.finished() {
            return Ok((stream, proven));
        }
    }
}

fn dial(addr: &str, deadline: Instant) -> Result<std::net::TcpStream, TransportError> {
    let begun = Instant::now();
    names::dial(bare(addr)?, deadline).map_err(|source| match source.kind() {
        ErrorKind::InvalidInput => bad(addr),
        ErrorKind::TimedOut if deadline <= Instant::now() => {
            TransportError::Deadline { peer: addr.to_owned(), waited: begun.elapsed() }
        }
        _ => TransportError::Connect { peer: addr.to_owned(), source },
    })
}
