//! Frames between the nodes of one process: bodies are moved, never copied.
//!
//! # Layout
//! - [`hub`]: names to listeners, and the handshake with one
//! - `inbox`: what waits for a transport's thread, and its sleep

pub mod hub;
mod inbox;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crate::buffer::{FrameBuf, Window};
use crate::fault::{Damage, Spot, Way};
use crate::frame::{FrameHeader, HEADER_BYTES};
use crate::spin::SpinBudget;
use crate::{
    Bound, ChannelId, Credentials, Event, Identity, Limits, Transport, TransportError, TransportKind, TransportStats,
    Wake,
};
pub use hub::LocalHub;
use inbox::{Inbox, Message, Pushed};

/// The other end of a channel.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    peer: String,
    inbox: Arc<Inbox>,
    /// The channel's number over there.
    channel: ChannelId,
    damage: Damage,
}

/// Bodies are moved and headers are not encoded, so that nothing is damaged on the way; damage done on purpose is to the
/// length, which is checked.
fn damaged(header: &FrameHeader) -> FrameHeader {
    FrameHeader { body_bytes: header.body_bytes ^ 1, ..*header }
}

/// A name taken in the hub.
#[derive(Debug)]
pub struct LocalBound {
    hub: Arc<LocalHub>,
    name: String,
    limits: Limits,
    started: bool,
}

impl LocalBound {
    /// Takes a name; one that is empty or ends in `:0` is made unique.
    ///
    /// # Errors
    /// [`TransportError::Bind`] when it is taken.
    pub fn bind(hub: Arc<LocalHub>, addr: &str, limits: Limits) -> Result<Self, TransportError> {
        let name = hub.take_name(addr)?;
        Ok(Self { hub, name, limits, started: false })
    }
}

impl Bound for LocalBound {
    fn local_addr(&self) -> &str {
        &self.name
    }

    fn start(mut self: Box<Self>, credentials: Credentials) -> Result<Box<dyn Transport>, TransportError> {
        self.started = true;
        let (hub, name) = (Arc::clone(&self.hub), self.name.clone());
        let transport = LocalTransport::new(hub, name, self.limits.clone(), credentials);
        transport.hub.start(&transport.name, Arc::clone(&transport.inbox), transport.credentials.clone());
        Ok(Box::new(transport))
    }
}

impl Drop for LocalBound {
    fn drop(&mut self) {
        if !self.started {
            self.hub.give_name_back(&self.name);
        }
    }
}

/// A node's end of the data plane inside one process.
pub struct LocalTransport {
    hub: Arc<LocalHub>,
    /// Its name in the hub; empty when it does not listen.
    name: String,
    limits: Limits,
    credentials: Credentials,
    window: Arc<Window>,
    inbox: Arc<Inbox>,
    links: BTreeMap<ChannelId, Link>,
    stats: TransportStats,
    taken: Vec<Message>,
    budget: SpinBudget,
}

impl LocalTransport {
    /// One that only connects.
    pub fn client(hub: Arc<LocalHub>, limits: Limits, credentials: Credentials) -> Self {
        Self::new(hub, String::new(), limits, credentials)
    }

    fn new(hub: Arc<LocalHub>, name: String, limits: Limits, credentials: Credentials) -> Self {
        let window = Window::new(limits.bodies_max, limits.body_bytes_max);
        let inbox = Arc::new(Inbox::new(limits.channels_max));
        window.set_waker(inbox.clone());
        let (links, stats, taken) = (BTreeMap::new(), TransportStats::default(), Vec::new());
        let budget = SpinBudget::new(limits.spin_max);
        Self { hub, name, limits, credentials, window, inbox, links, stats, taken, budget }
    }

    /// Ends a channel at both ends; the peer learns `why`.
    fn end(&mut self, channel: ChannelId) {
        drop(self.inbox.forget(channel));
        if let Some(link) = self.links.remove(&channel) {
            link.inbox.push_closed(link.channel, TransportError::Closed { peer: self.called() });
        }
    }

    fn called(&self) -> String {
        let Identity { role, slot, node, .. } = &self.credentials.identity;
        format!("{role} {slot} ({node})")
    }

    fn take_message(&mut self, message: Message) -> Option<Event> {
        match message {
            Message::Accepted { channel, peer, link } => {
                self.links.insert(channel, link);
                Some(Event::Accepted { channel, peer })
            }
            Message::Frame { channel, mut header, body } => {
                let link = self.links.get_mut(&channel)?;
                if link.damage.take(Way::In).is_some() {
                    header = damaged(&header);
                }
                let peer = &link.peer;
                if let Err(error) = header.check_with_body(&body, self.limits.body_bytes_max) {
                    tracing::warn!(%peer, %error, "closing a channel over a bad frame");
                    let error = TransportError::Frame { peer: peer.clone(), error };
                    self.stats.refuse("bad frame");
                    self.end(channel);
                    return Some(Event::Closed { channel, error });
                }
                self.stats.received(HEADER_BYTES + body.len());
                Some(Event::Frame { channel, header, body })
            }
            Message::Closed { channel, error } => {
                self.links.remove(&channel)?;
                Some(Event::Closed { channel, error })
            }
        }
    }
}

impl Transport for LocalTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Local
    }

    fn local_addr(&self) -> &str {
        &self.name
    }

    fn connect(&mut self, addr: &str, deadline: Instant) -> Result<(ChannelId, Identity), TransportError> {
        let listener = self.hub.listener(addr, deadline, self.limits.handshake_max)?;
        let identity = listener.prove(addr, &self.credentials).map_err(|error| {
            self.stats.refuse(error.name());
            TransportError::Handshake { peer: addr.to_owned(), error }
        })?;
        let too_many = || TransportError::TooManyChannels { max: self.limits.channels_max };
        let channel = self.inbox.open().ok_or_else(too_many)?;
        let back = Link { peer: self.called(), inbox: Arc::clone(&self.inbox), channel, damage: Damage::default() };
        match listener.inbox.accept(self.credentials.identity.clone(), back) {
            Ok(theirs) => {
                let Identity { role, slot, node, .. } = &identity;
                let peer = format!("{role} {slot} ({node})");
                self.links
                    .insert(channel, Link { peer, inbox: listener.inbox, channel: theirs, damage: Damage::default() });
                Ok((channel, identity))
            }
            Err(error) => {
                drop(self.inbox.forget(channel));
                Err(TransportError::Handshake { peer: addr.to_owned(), error })
            }
        }
    }

    fn close(&mut self, channel: ChannelId) {
        self.end(channel);
    }

    fn buffer(&mut self, bytes: usize) -> Result<FrameBuf, TransportError> {
        self.window.take(bytes)
    }

    fn send(&mut self, channel: ChannelId, header: &FrameHeader, body: FrameBuf) -> Result<(), TransportError> {
        header.check_with_body(&body, self.limits.body_bytes_max).map_err(TransportError::BadSend)?;
        let link = self.links.get_mut(&channel).ok_or(TransportError::NoChannel { channel })?;
        let bytes = HEADER_BYTES + body.len();
        let header = if link.damage.take(Way::Out).is_some() { damaged(header) } else { *header };
        match link.inbox.push_frame(link.channel, &header, body) {
            Pushed::Queued => self.stats.sent(bytes),
            // Its end is in our inbox already and will be reported from there.
            Pushed::Gone => {}
            Pushed::Full { frames } => {
                let error = TransportError::SlowPeer { peer: link.peer.clone(), frames };
                let (theirs, far) = (Arc::clone(&link.inbox), link.channel);
                theirs.push_closed(far, TransportError::Closed { peer: self.called() });
                self.inbox.push_closed(channel, error);
            }
        }
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<Event>) -> usize {
        let before = events.len();
        let mut taken = std::mem::take(&mut self.taken);
        self.inbox.take(&mut taken);
        events.extend(taken.drain(..).filter_map(|message| self.take_message(message)));
        self.taken = taken;
        events.len() - before
    }

    fn wait(&mut self, deadline: Instant) {
        let begun = Instant::now();
        self.inbox.wait(deadline, begun + self.budget.next());
        self.budget.learn(begun.elapsed());
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inbox.clone()
    }

    fn stats(&self) -> TransportStats {
        let mut stats = self.stats.clone();
        for (reason, count) in self.inbox.refused() {
            *stats.refused.entry(reason).or_default() += count;
        }
        TransportStats { bodies_in_use: self.window.in_use(), channels: self.links.len(), ..stats }
    }

    fn damage_next(&mut self, channel: ChannelId, way: Way, spot: Spot) -> bool {
        self.links.get_mut(&channel).map(|link| link.damage.arm(way, spot)).is_some()
    }
}

impl Drop for LocalTransport {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            self.hub.give_name_back(&self.name);
        }
        // Whoever connected and was not reported yet is told as well.
        let unreported = self.inbox.shut();
        for message in unreported {
            if let Message::Accepted { channel, link, .. } = message {
                self.links.insert(channel, link);
            }
        }
        let channels: Vec<ChannelId> = self.links.keys().copied().collect();
        channels.into_iter().for_each(|channel| self.end(channel));
    }
}
