//! The data plane: frames between nodes, over in-process channels, TCP and UCX, behind one trait.
//!
//! An attention node connects to expert nodes; an expert node only accepts. Each connection is a **channel**: it is
//! authenticated by its first messages and then carries frames both ways, in order. A transport belongs to one thread.
//!
//! # Layout
//! - [`frame`]: the header, the layout of dispatch and combine bodies, and their checks
//! - [`buffer`]: the registered, bounded window that frames are built and read in
//! - [`handshake`]: how both ends of a channel prove themselves
//! - [`error`] and [`stats`]: what went wrong, and how much went well
//! - [`local`], [`tcp`], [`ucx`]: the backends
//! - [`fault`]: a wrapper that harms frames on purpose, for tests and drills
//! - [`choose`](mod@choose): which backend, and why not the faster one
//! - `names`: from `host:port` to a connected socket
//! - `spin`: how long a blocked wait spins before it sleeps
//! - [`open`]: [`bind`] and [`client`], which choose one

#![deny(unsafe_code)]

pub mod buffer;
pub mod choose;
pub mod error;
pub mod fault;
pub mod frame;
pub mod handshake;
pub mod local;
mod names;
pub mod open;
mod spin;
pub mod stats;
pub mod tcp;
pub mod ucx;

use std::time::{Duration, Instant};

use buffer::FrameBuf;
use fault::{Spot, Way};
use frame::FrameHeader;
use mesh_core::{NodeId, Role, Slot};

pub use choose::{Choice, TransportChoice, choose};
pub use error::TransportError;
pub use fault::FaultSpec;
pub use local::LocalHub;
pub use open::{Bound, bind, client};
pub use stats::TransportStats;

/// Frames that may wait for one peer; one that lets more pile up is cut off. Bodies are bounded by the window, this bounds the
/// frames without one.
pub const FRAMES_QUEUED_MAX: usize = 1024;

/// Which backend carries the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TransportKind {
    /// Queues inside one process.
    Local,
    /// TCP, no native library.
    Tcp,
    /// UCX, opened at run time.
    Ucx,
}

impl std::fmt::Display for TransportKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TransportKind::Local => "local",
            TransportKind::Tcp => "tcp",
            TransportKind::Ucx => "ucx",
        })
    }
}

/// A name that is no transport's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no transport; use local, tcp or ucx")]
pub struct UnknownTransport(String);

impl std::str::FromStr for TransportKind {
    type Err = UnknownTransport;

    fn from_str(name: &str) -> Result<Self, UnknownTransport> {
        match name {
            "local" => Ok(TransportKind::Local),
            "tcp" => Ok(TransportKind::Tcp),
            "ucx" => Ok(TransportKind::Ucx),
            _ => Err(UnknownTransport(name.to_owned())),
        }
    }
}

/// A channel of one transport; never reused within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelId(pub u64);

/// Who a node says it is in a channel's handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The process.
    pub node: NodeId,
    /// Its role.
    pub role: Role,
    /// Its number in its group.
    pub slot: Slot,
    /// Digest of the model served; two nodes of different models do not talk.
    pub model: [u8; 32],
}

/// What authenticates a channel.
#[derive(Clone)]
pub struct Credentials {
    /// The mesh's secret, handed out by the router at registration. Proven by a keyed challenge, never sent.
    pub secret: [u8; 32],
    /// Who this node is.
    pub identity: Identity,
}

/// The named bounds of a transport.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest frame body, bytes. A longer one is a protocol error that closes the channel.
    pub body_bytes_max: usize,
    /// Bodies in the window: sent but not on the wire yet, or received but not dropped yet.
    pub bodies_max: usize,
    /// Channels open at once, authenticated or not.
    pub channels_max: usize,
    /// How long a handshake may take.
    pub handshake_max: Duration,
    /// How long a blocked wait spins at most before it sleeps; within that, the waits before it decide.
    pub spin_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes_max: 8 << 20,
            bodies_max: 256,
            channels_max: 256,
            handshake_max: Duration::from_secs(5),
            spin_max: Duration::from_millis(2),
        }
    }
}

/// What a transport has to report.
#[derive(Debug)]
pub enum Event {
    /// A peer connected and proved itself.
    Accepted {
        /// The new channel.
        channel: ChannelId,
        /// Who it is.
        peer: Identity,
    },
    /// A whole frame; its header's magic, version, kind, CRC and lengths are checked, its meaning is not.
    Frame {
        /// Where it came from.
        channel: ChannelId,
        /// Its header.
        header: FrameHeader,
        /// Its body, of `header.body_bytes` bytes.
        body: FrameBuf,
    },
    /// The channel is gone and nothing more will come of it. Not reported after [`Transport::close`].
    Closed {
        /// The channel.
        channel: ChannelId,
        /// Why.
        error: TransportError,
    },
}

impl Event {
    /// The channel that it is about.
    pub fn channel(&self) -> ChannelId {
        match self {
            Event::Accepted { channel, .. } | Event::Frame { channel, .. } | Event::Closed { channel, .. } => *channel,
        }
    }
}

/// Wakes a transport's thread out of [`Transport::wait`] from any other thread. Cheap to clone.
pub trait Wake: Send + Sync {
    /// Makes the present or the next `wait` return. Wakes are not counted: many may be seen as one.
    fn wake(&self);
}

/// A node's end of the data plane. Belongs to one thread at a time.
pub trait Transport: Send {
    /// Which backend this is.
    fn kind(&self) -> TransportKind;

    /// Where peers connect to, with its scheme (`tcp://127.0.0.1:4711`).
    fn local_addr(&self) -> &str;

    /// Opens and authenticates a channel; blocks until done or `deadline`.
    ///
    /// # Errors
    /// [`TransportError`] naming the peer.
    fn connect(&mut self, addr: &str, deadline: Instant) -> Result<(ChannelId, Identity), TransportError>;

    /// Closes a channel. Frames under way are lost; their buffers return to the window.
    fn close(&mut self, channel: ChannelId);

    /// A body of `bytes` out of the window, 64-byte aligned; its bytes are unspecified.
    ///
    /// # Errors
    /// [`TransportError::BodyTooLarge`] and [`TransportError::WindowFull`].
    fn buffer(&mut self, bytes: usize) -> Result<FrameBuf, TransportError>;

    /// Sends a frame; the transport owns `body` until it is on the wire. `header.body_bytes` must be `body.len()`.
    ///
    /// # Errors
    /// [`TransportError::NoChannel`] when the channel is gone; other failures come as [`Event::Closed`].
    fn send(&mut self, channel: ChannelId, header: &FrameHeader, body: FrameBuf) -> Result<(), TransportError>;

    /// Moves bytes and appends what happened to `events`; never blocks. Returns how many were appended.
    fn poll(&mut self, events: &mut Vec<Event>) -> usize;

    /// Blocks until `poll` may have something, `wake` is called, or `deadline`: spins for up to `spin_max`, then
    /// sleeps.
    fn wait(&mut self, deadline: Instant);

    /// What other threads wake this one with.
    fn waker(&self) -> std::sync::Arc<dyn Wake>;

    /// What was counted so far.
    fn stats(&self) -> TransportStats;

    /// Flips a bit of the next frame that goes `way` over a channel, behind the back of what checks frames; whether this
    /// backend can. For [`fault`] alone, so that the real checks meet real damage.
    fn damage_next(&mut self, _channel: ChannelId, _way: Way, _spot: Spot) -> bool {
        false
    }
}
