//! Which backend is opened, in two steps: listen first (a node must know its address before it registers), start with the
//! credentials that registration gave.

use std::sync::Arc;

use crate::local::{self, LocalHub};
use crate::tcp;
use crate::ucx::{self, UcxOptions};
use crate::{Credentials, Limits, Transport, TransportError, TransportKind};

/// A transport that listens and takes nobody in yet: whoever connects waits.
pub trait Bound: Send {
    /// Where peers connect to, with its scheme.
    fn local_addr(&self) -> &str;

    /// Starts to take peers in.
    ///
    /// # Errors
    /// [`TransportError::Io`] and [`TransportError::Unavailable`].
    fn start(self: Box<Self>, credentials: Credentials) -> Result<Box<dyn Transport>, TransportError>;
}

/// Listens at `addr` (`127.0.0.1:0` takes a free port; for the local transport any name, with `:0` or nothing for a free one).
///
/// # Errors
/// [`TransportError::Bind`] and [`TransportError::Unavailable`]; the latter also for the local transport without a hub.
pub fn bind(
    kind: TransportKind,
    addr: &str,
    limits: Limits,
    hub: Option<Arc<LocalHub>>,
) -> Result<Box<dyn Bound>, TransportError> {
    match kind {
        TransportKind::Local => Ok(Box::new(local::LocalBound::bind(wanted_hub(hub)?, addr, limits)?)),
        TransportKind::Tcp => Ok(Box::new(tcp::TcpBound::bind(addr, limits)?)),
        TransportKind::Ucx => Ok(Box::new(ucx::UcxBound::bind(addr, limits, &UcxOptions::default())?)),
    }
}

/// A transport that only connects, for attention nodes.
///
/// # Errors
/// As [`bind`] and [`Bound::start`].
pub fn client(
    kind: TransportKind,
    limits: Limits,
    hub: Option<Arc<LocalHub>>,
    credentials: Credentials,
) -> Result<Box<dyn Transport>, TransportError> {
    match kind {
        TransportKind::Local => Ok(Box::new(local::LocalTransport::client(wanted_hub(hub)?, limits, credentials))),
        TransportKind::Tcp => Ok(Box::new(tcp::TcpTransport::client(limits, credentials)?)),
        TransportKind::Ucx => Ok(Box::new(ucx::UcxTransport::client(limits, credentials, &UcxOptions::default())?)),
    }
}

fn wanted_hub(hub: Option<Arc<LocalHub>>) -> Result<Arc<LocalHub>, TransportError> {
    let why = "it joins the nodes of one process only; run them in one process, or choose tcp or ucx";
    hub.ok_or_else(|| TransportError::Unavailable { kind: TransportKind::Local, why: why.into() })
}

/// Why the UCX backend cannot be used here; `None` when it can.
pub(crate) fn ucx_missing() -> Option<String> {
    ucx::probe(&UcxOptions::default()).err().map(|error| error.to_string())
}
