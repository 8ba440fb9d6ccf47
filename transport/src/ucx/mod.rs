//! Frames as UCX active messages: shared memory within a host, the fastest network there is between hosts.
//!
//! libucp is opened at run time, and a machine without it has every other transport. A channel begins on a TCP socket with
//! the handshake that all transports share; in it the two ends exchange the addresses of their UCX workers and the tokens
//! that name the channel. The socket stays open as the sign of life: of a peer that shares memory and dies, UCX itself says so only
//! after many seconds.
//!
//! Each direction carries frames numbered from 0, as UCX keeps no order between small and large messages, under
//! `CREDITS` that the receiver renews: what a peer can make this node hold is bounded, and an honest one just waits. Through
//! shared memory a frame goes as messages that each fit what UCX passes at a time, or, if its body is longer than one of them,
//! as one message that tells where the body can be read.
//!
//! # Layout
//! - [`UcxBound`], [`UcxTransport`]: the transport; `peer`: one channel of it
//! - `door`: sockets and handshakes; `greeting`: what a handshake carries for UCX
//! - `channel`: order and credit; `inbox`: what UCX's callbacks write
//! - `lend`: bodies that are read where their sender has them
//! - `worker` and `library`: the safe face of `ucx-sys`; `sleep`: waiting and waking
//! - `sentinel`: finds out that a killed peer has blocked the way to the worker
//! - [`pingpong`]: UCX's own round trip, which benchmarks hold this against

#![allow(unsafe_code)]

mod bound;
mod channel;
mod door;
mod greeting;
mod inbox;
mod lend;
mod library;
mod peer;
pub mod pingpong;
mod sentinel;
mod sleep;
mod transport;
mod worker;

use std::path::PathBuf;

use crate::Limits;
use crate::buffer::Window;
use transport::Queues;

pub use bound::UcxBound;
pub use library::{UcxError, UcxInfo};
pub use transport::UcxTransport;

/// How UCX is opened and what it may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UcxOptions {
    /// The folder of libucp.so.0; by default the library that this process has open, or where the dynamic linker looks.
    pub library_dir: Option<PathBuf>,
    /// UCX's own list of transports (its `UCX_TLS`), as "posix,cma,self" or "tcp"; by default UCX picks: shared memory
    /// within a host, the network between hosts.
    pub tls: Option<String>,
}

/// What UCX there is on this machine.
///
/// # Errors
/// Why there is none that can be used, and the remedy.
pub fn probe(options: &UcxOptions) -> Result<UcxInfo, UcxError> {
    let context = library::Context::new(options)?;
    let (major, minor, release) = context.ucp.version();
    let info = UcxInfo { version: format!("{major}.{minor}.{release}"), transports: context.transports() };
    // A context is only plans: whether there is memory for queues shows with a worker, which no peer will talk to.
    let limits = Limits::default();
    let window = Window::new(limits.bodies_max, limits.body_bytes_max);
    Queues::open(options, &window, &limits)?;
    Ok(info)
}
