//! Why the data plane failed, with who was at the other end.

use std::time::Duration;

use crate::ChannelId;
use crate::frame::FrameError;
use crate::handshake::HandshakeError;

/// Why the data plane failed.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The peer could not be reached.
    #[error("cannot connect to {peer}: {source}")]
    Connect {
        /// Its address.
        peer: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// An address that this transport cannot use.
    #[error("{addr} is no address of the {kind} transport; use {wanted}")]
    BadAddress {
        /// The address.
        addr: String,
        /// The transport.
        kind: crate::TransportKind,
        /// The form that it takes.
        wanted: &'static str,
    },
    /// The peer did not prove itself, or we did not to it.
    #[error("handshake with {peer} failed: {error}")]
    Handshake {
        /// Its address.
        peer: String,
        /// Why.
        error: HandshakeError,
    },
    /// Bytes that are no frame; the channel is closed.
    #[error("bad frame from {peer}: {error}")]
    Frame {
        /// Who sent it.
        peer: String,
        /// What is wrong.
        error: FrameError,
    },
    /// A frame that this node was about to send contradicts itself.
    #[error("refusing to send a bad frame: {0}")]
    BadSend(FrameError),
    /// The peer closed the channel or died.
    #[error("{peer} closed the channel")]
    Closed {
        /// Who.
        peer: String,
    },
    /// The peer does not read, and what waits for it reached the bound.
    #[error("{peer} reads too slowly: {frames} frames wait for it")]
    SlowPeer {
        /// Who.
        peer: String,
        /// How many frames.
        frames: usize,
    },
    /// The caller's deadline passed.
    #[error("{peer} did not answer within {waited:?}")]
    Deadline {
        /// Who was waited for.
        peer: String,
        /// How long.
        waited: Duration,
    },
    /// The channel is not open.
    #[error("channel {} is not open", channel.0)]
    NoChannel {
        /// The channel named.
        channel: ChannelId,
    },
    /// A body beyond the window's largest.
    #[error("a body of {bytes} bytes exceeds the window's {max}; send it in chunks")]
    BodyTooLarge {
        /// Bytes wanted.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// All bodies are taken.
    #[error("all {bodies} bodies of the window are in use; drop some and poll")]
    WindowFull {
        /// The bound that was reached.
        bodies: usize,
    },
    /// No room for one more channel.
    #[error("all {max} channels are open; raise channels_max")]
    TooManyChannels {
        /// The limit.
        max: usize,
    },
    /// The listening address cannot be taken.
    #[error("cannot listen on {addr}: {source}")]
    Bind {
        /// The address.
        addr: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// This machine cannot run the transport.
    #[error("the {kind} transport is not available: {why}")]
    Unavailable {
        /// The transport.
        kind: crate::TransportKind,
        /// Why, and what would help.
        why: String,
    },
    /// The system failed us.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
}
