//! What a transport counted since it was opened.

use std::collections::BTreeMap;

/// What a transport counted since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransportStats {
    /// Frames given to the wire.
    pub frames_sent: u64,
    /// Frames handed to the caller.
    pub frames_received: u64,
    /// Their bytes, headers included.
    pub bytes_sent: u64,
    /// Their bytes, headers included.
    pub bytes_received: u64,
    /// Peers and channels turned away, by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// Faults made on purpose, by name: see [`crate::fault`].
    pub injected: BTreeMap<&'static str, u64>,
    /// Bodies of the window that are in use now.
    pub bodies_in_use: usize,
    /// Channels open now.
    pub channels: usize,
}

impl TransportStats {
    /// Counts a frame of `bytes`, header included, as sent.
    pub fn sent(&mut self, bytes: usize) {
        self.frames_sent += 1;
        self.bytes_sent += bytes as u64;
    }

    /// Counts a frame of `bytes`, header included, as received.
    pub fn received(&mut self, bytes: usize) {
        self.frames_received += 1;
        self.bytes_received += bytes as u64;
    }

    /// Counts a peer or channel turned away.
    pub fn refuse(&mut self, reason: &'static str) {
        *self.refused.entry(reason).or_default() += 1;
    }
}
