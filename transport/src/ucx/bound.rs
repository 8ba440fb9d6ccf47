//! A UCX transport that listens and has no credentials yet.

use std::net::TcpListener;

use super::door::SCHEME;
use super::peer::unavailable;
use super::{UcxOptions, UcxTransport, library};
use crate::{Bound, Credentials, Limits, Transport, TransportError};

/// A listening socket that takes nobody in yet.
#[derive(Debug)]
pub struct UcxBound {
    listener: TcpListener,
    local_addr: String,
    limits: Limits,
    options: UcxOptions,
}

impl UcxBound {
    /// Listens at `host:port` (port 0 takes a free one), after a look whether UCX can be used at all: a node that cannot
    /// must not learn so only when it has registered.
    ///
    /// # Errors
    /// [`TransportError::Unavailable`] and [`TransportError::Bind`].
    pub fn bind(addr: &str, limits: Limits, options: &UcxOptions) -> Result<Self, TransportError> {
        library::open(options.library_dir.as_deref()).map_err(unavailable)?;
        let failed = |source| TransportError::Bind { addr: addr.to_owned(), source };
        let listener = TcpListener::bind(addr).map_err(failed)?;
        let local_addr = format!("{SCHEME}{}", listener.local_addr().map_err(failed)?);
        Ok(Self { listener, local_addr, limits, options: options.clone() })
    }
}

impl Bound for UcxBound {
    fn local_addr(&self) -> &str {
        &self.local_addr
    }

    fn start(self: Box<Self>, credentials: Credentials) -> Result<Box<dyn Transport>, TransportError> {
        Ok(Box::new(UcxTransport::new(Some(self.listener), self.limits, credentials, &self.options)?))
    }
}
