//! Names to listeners, and the handshake with one.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::inbox::Inbox;
use crate::handshake::{Handshake, HandshakeError};
use crate::{Credentials, Identity, TransportError};

const SCHEME: &str = "local://";

/// Where the nodes of one process find each other. Made by whoever starts them, and passed to each.
#[derive(Default)]
pub struct LocalHub {
    names: Mutex<Names>,
    started: Condvar,
}

#[derive(Default)]
struct Names {
    /// `None` until the listener is started.
    listeners: HashMap<String, Option<Listener>>,
    next: u64,
}

/// A listener that takes peers in.
#[derive(Clone)]
pub(super) struct Listener {
    pub inbox: Arc<Inbox>,
    credentials: Credentials,
}

impl LocalHub {
    /// A hub without listeners.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    fn lock(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take_name(&self, addr: &str) -> Result<String, TransportError> {
        let wanted = addr.strip_prefix(SCHEME).unwrap_or(addr);
        let mut names = self.lock();
        let name = if wanted.is_empty() || wanted.ends_with(":0") {
            names.next += 1;
            format!("{SCHEME}{}", names.next)
        } else {
            format!("{SCHEME}{wanted}")
        };
        if names.listeners.contains_key(&name) {
            let source = std::io::ErrorKind::AddrInUse.into();
            return Err(TransportError::Bind { addr: name, source });
        }
        names.listeners.insert(name.clone(), None);
        Ok(name)
    }

    pub(super) fn give_name_back(&self, name: &str) {
        self.lock().listeners.remove(name);
        self.started.notify_all();
    }

    pub(super) fn start(&self, name: &str, inbox: Arc<Inbox>, credentials: Credentials) {
        self.lock().listeners.insert(name.to_owned(), Some(Listener { inbox, credentials }));
        self.started.notify_all();
    }

    /// The listener of a name; waits, bounded, for one that is bound and not started.
    pub(super) fn listener(
        &self,
        addr: &str,
        deadline: Instant,
        handshake_max: Duration,
    ) -> Result<Listener, TransportError> {
        let name = format!("{SCHEME}{}", addr.strip_prefix(SCHEME).unwrap_or(addr));
        let asked = Instant::now();
        let give_up = deadline.min(asked + handshake_max);
        let mut names = self.lock();
        loop {
            match names.listeners.get(&name) {
                None => {
                    let source = std::io::ErrorKind::ConnectionRefused.into();
                    return Err(TransportError::Connect { peer: addr.to_owned(), source });
                }
                Some(Some(listener)) => return Ok(listener.clone()),
                Some(None) => {}
            }
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TransportError::Deadline { peer: addr.to_owned(), waited: asked.elapsed() });
            }
            names = self.started.wait_timeout(names, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl fmt::Debug for LocalHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().listeners.keys()).finish()
    }
}

impl Listener {
    /// The handshake of every transport, with both sides held in one hand.
    pub(super) fn prove(&self, addr: &str, credentials: &Credentials) -> Result<Identity, HandshakeError> {
        let mut client = Handshake::client(credentials, &[])?;
        let mut server = Handshake::server(&self.credentials, &[])?;
        loop {
            let of_client = client.output().to_vec();
            client.wrote(of_client.len());
            if let Err(error) = server.advance(&of_client) {
                self.refuse(addr, credentials, &error);
                client.advance(server.output())?;
                return Err(error);
            }
            let of_server = server.output().to_vec();
            server.wrote(of_server.len());
            if let Err(error) = client.advance(&of_server) {
                self.refuse(addr, credentials, &error);
                return Err(error);
            }
            if let Some(proven) = client.finished() {
                return Ok(proven.identity);
            }
            if client.output().is_empty() {
                return Err(HandshakeError::HungUp);
            }
        }
    }

    fn refuse(&self, addr: &str, peer: &Credentials, error: &HandshakeError) {
        let Identity { node, role, slot, .. } = &peer.identity;
        tracing::warn!(listener = addr, %node, %role, %slot, %error, "refused a peer");
        self.inbox.refuse(error.name());
    }
}
