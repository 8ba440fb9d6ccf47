//! A peer that proved itself: its channel, and the reasons for which a channel ends.

use std::io::{self, Read};
use std::net::TcpStream;

use super::channel::{Incoming, Outgoing, Wrong};
use super::inbox::Token;
use super::library::UcxError;
use super::worker::Endpoint;
use crate::fault::Damage;
use crate::{ChannelId, TransportError, TransportKind};

/// An authenticated channel.
pub struct Channel {
    /// What the caller names it.
    pub id: ChannelId,
    /// What the peer names it.
    pub token: Token,
    /// Who it is, in words.
    pub name: String,
    /// Whether it runs where it can share memory with us.
    pub same_host: bool,
    /// Open for as long as the peer lives; nothing is said on it after the handshake.
    pub liveness: TcpStream,
    /// The way to the peer.
    pub endpoint: Endpoint,
    /// Frames to it.
    pub outgoing: Outgoing,
    /// Frames from it.
    pub incoming: Incoming,
    /// What is to be damaged of either.
    pub damage: Damage,
}

impl Channel {
    /// A call into UCX that failed, as the reason why the channel is over.
    pub fn failed(&self, what: &'static str, error: UcxError) -> TransportError {
        if error.is_peer_gone() {
            tracing::debug!(peer = %self.name, %error, what, "ucx says that the peer is gone");
            return TransportError::Closed { peer: self.name.clone() };
        }
        failed(what, error)
    }

    /// Why the channel is over, if its socket says so.
    pub fn death(&self) -> Option<TransportError> {
        let mut byte = [0];
        match (&self.liveness).read(&mut byte) {
            Ok(0) => Some(TransportError::Closed { peer: self.name.clone() }),
            Ok(_) => Some(violation("bytes after the handshake")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(_) => Some(TransportError::Closed { peer: self.name.clone() }),
        }
    }
}

impl Wrong {
    /// As the reason why the channel of `peer` is over.
    pub fn into_error(self, peer: &str) -> TransportError {
        match self {
            Wrong::Frame(error) => TransportError::Frame { peer: peer.to_owned(), error },
            Wrong::Number(number) => violation(format!("frame number {number} out of turn from {peer}")),
            Wrong::Length { header, body } => {
                violation(format!("a header of {peer} says {header} bytes and {body} came"))
            }
        }
    }
}

/// A peer that broke the protocol.
pub fn violation(what: impl Into<String>) -> TransportError {
    let source = io::Error::new(io::ErrorKind::InvalidData, what.into());
    TransportError::Io { what: "protocol violation", source }
}

/// A call into UCX that failed.
pub fn failed(what: &'static str, error: UcxError) -> TransportError {
    TransportError::Io { what, source: io::Error::other(error) }
}

/// UCX cannot be used on this machine.
pub fn unavailable(error: UcxError) -> TransportError {
    TransportError::Unavailable { kind: TransportKind::Ucx, why: error.to_string() }
}
