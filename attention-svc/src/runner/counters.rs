//! What the runner counts, readable from any thread.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Counters from the node's start; gauges where it says so.
#[derive(Debug, Default)]
pub struct RunnerCounters {
    lanes_total: AtomicU64,
    lanes_free: AtomicU64,
    rows: AtomicU64,
    pairs: AtomicU64,
    dispatch_bytes: AtomicU64,
    combine_bytes: AtomicU64,
    frames_sent: AtomicU64,
    frames_received: AtomicU64,
    wait_ns: AtomicU64,
    server_ns: AtomicU64,
    refused: Mutex<BTreeMap<&'static str, u64>>,
}

/// A reading of [`RunnerCounters`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunnerReading {
    /// Lanes there are (gauge).
    pub lanes_total: u64,
    /// Lanes not in flight (gauge).
    pub lanes_free: u64,
    /// Rows dispatched, once per node that they travelled to.
    pub rows: u64,
    /// (row, expert) pairs dispatched.
    pub pairs: u64,
    /// Bytes of rows dispatched, without headers and metadata.
    pub dispatch_bytes: u64,
    /// Bytes of rows received as combine.
    pub combine_bytes: u64,
    /// Dispatch frames.
    pub frames_sent: u64,
    /// Combine frames accepted.
    pub frames_received: u64,
    /// Nanoseconds spent blocked for answers.
    pub wait_ns: u64,
    /// Nanoseconds that expert nodes say the accepted answers took them, receive to send.
    pub server_ns: u64,
    /// Frames refused, under their reason.
    pub refused: BTreeMap<&'static str, u64>,
}

impl RunnerCounters {
    pub(super) fn set_lanes(&self, total: usize, free: usize) {
        self.lanes_total.store(total as u64, Relaxed);
        self.lanes_free.store(free as u64, Relaxed);
    }

    pub(super) fn sent(&self, rows: usize, pairs: usize, bytes: usize) {
        self.rows.fetch_add(rows as u64, Relaxed);
        self.pairs.fetch_add(pairs as u64, Relaxed);
        self.dispatch_bytes.fetch_add(bytes as u64, Relaxed);
        self.frames_sent.fetch_add(1, Relaxed);
    }

    pub(super) fn received(&self, bytes: usize, server_ns: u64) {
        self.combine_bytes.fetch_add(bytes as u64, Relaxed);
        self.frames_received.fetch_add(1, Relaxed);
        self.server_ns.fetch_add(server_ns, Relaxed);
    }

    pub(super) fn waited(&self, time: Duration) {
        self.wait_ns.fetch_add(time.as_nanos() as u64, Relaxed);
    }

    pub(super) fn refused(&self, why: &'static str) {
        // A poisoned count is still a count.
        let mut refused = self.refused.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *refused.entry(why).or_default() += 1;
    }

    /// All of them now. Single counters are exact; together they are not one instant's.
    pub fn read(&self) -> RunnerReading {
        RunnerReading {
            lanes_total: self.lanes_total.load(Relaxed),
            lanes_free: self.lanes_free.load(Relaxed),
            rows: self.rows.load(Relaxed),
            pairs: self.pairs.load(Relaxed),
            dispatch_bytes: self.dispatch_bytes.load(Relaxed),
            combine_bytes: self.combine_bytes.load(Relaxed),
            frames_sent: self.frames_sent.load(Relaxed),
            frames_received: self.frames_received.load(Relaxed),
            wait_ns: self.wait_ns.load(Relaxed),
            server_ns: self.server_ns.load(Relaxed),
            refused: self.refused.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
        }
    }
}
