//! What the runner counts, and where the engine's time goes; readable from any thread.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use mesh_core::Slot;
use mesh_kernels::{Ffn, Matrix};
use mesh_service::profile::{Part, Profile, Work};
use mesh_transport::TransportStats;

/// The parts of a step, in its order. The engine begins and ends the step, the runner laps between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepPart {
    /// Choosing what the step computes.
    Schedule,
    /// Rows of the embedding.
    Embed,
    /// RMS norms, of q and k too, with what lies beside them: biases and clipping of q, k and v, the copy of the rows
    /// whose logits are wanted.
    Norm,
    /// The projection to q, k and v.
    Qkv,
    /// Rotation, and writing K and V to the cache.
    RopeKv,
    /// Attention over the cache.
    Attention,
    /// The projection back, added to the residual stream.
    Out,
    /// The feed-forward network of layers without routed experts.
    Dense,
    /// Scores of the experts and the choice of the best.
    Gate,
    /// Planning the exchange, building and sending its frames.
    Dispatch,
    /// Blocked for answers, and taking in what came.
    Wait,
    /// Weighing and adding the answers.
    Combine,
    /// The output head.
    Head,
    /// Choosing tokens and telling their listeners.
    Sample,
}

impl Part for StepPart {
    const NAMES: &'static [&'static str] = &[
        "schedule",
        "embed",
        "norm",
        "qkv",
        "rope+kv",
        "attention",
        "out",
        "dense",
        "gate",
        "dispatch",
        "wait",
        "combine",
        "head",
        "sample",
    ];

    fn index(self) -> usize {
        self as usize
    }
}

/// A projection of `rows` rows. Of no rows it is nothing.
pub(super) fn linear_work(weights: &Matrix, rows: usize) -> Work {
    let weight_bytes = if rows == 0 { 0 } else { weights.bytes() as u64 };
    Work { flops: 2 * (rows * weights.n() * weights.k()) as u64, weight_bytes }
}

/// A feed-forward network on `rows` rows.
pub(super) fn ffn_work(weights: &Ffn, rows: usize) -> Work {
    let products = rows * 3 * weights.hidden() * weights.intermediate();
    Work { flops: 2 * products as u64, weight_bytes: weights.bytes() as u64 }
}

/// Answers of one expert slot.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Waits {
    /// How many.
    pub answers: u64,
    /// From a frame's sending to its answer, all together, nanoseconds.
    pub ns: u64,
    /// What they were asked for: experts read, and a sixteenth for each row.
    pub work: f64,
}

/// Counters from the node's start; gauges where it says so.
#[derive(Debug, Default)]
pub struct RunnerCounters {
    /// Where the time of steps goes.
    pub profile: Profile<StepPart>,
    lanes_total: AtomicU64,
    lanes_free: AtomicU64,
    rows: AtomicU64,
    pairs: AtomicU64,
    dispatch_bytes: AtomicU64,
    combine_bytes: AtomicU64,
    frames_sent: AtomicU64,
    frames_received: AtomicU64,
    server_ns: AtomicU64,
    replayed: AtomicU64,
    waits: Mutex<BTreeMap<Slot, Waits>>,
    refused: Mutex<BTreeMap<&'static str, u64>>,
    /// What the transport turned away before the runner saw it, and faults made on purpose, by its own names.
    of_transport: Mutex<BTreeMap<&'static str, u64>>,
}

/// A reading of [`RunnerCounters`].
#[derive(Clone, Debug, Default, PartialEq)]
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
    /// Nanoseconds that expert nodes say the accepted answers took them, receive to send.
    pub server_ns: u64,
    /// Pairs that were sent again, to another holder of their expert.
    pub replayed: u64,
    /// Answers, by the slot that they came from.
    pub waits: BTreeMap<Slot, Waits>,
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

    /// Pairs that were sent again, to another holder.
    pub(super) fn replayed(&self, pairs: usize) {
        self.replayed.fetch_add(pairs as u64, Relaxed);
    }

    pub(super) fn received(&self, slot: Slot, bytes: usize, server_ns: u64, took: Duration, work: f64) {
        // A poisoned count is still a count.
        let mut waits = self.waits.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let of = waits.entry(slot).or_default();
        of.answers += 1;
        of.ns += took.as_nanos() as u64;
        of.work += work;
        drop(waits);
        self.combine_bytes.fetch_add(bytes as u64, Relaxed);
        self.frames_received.fetch_add(1, Relaxed);
        self.server_ns.fetch_add(server_ns, Relaxed);
    }

    pub(super) fn refused(&self, why: &'static str) {
        // A poisoned count is still a count.
        let mut refused = self.refused.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *refused.entry(why).or_default() += 1;
    }

    /// What the transport counted by now.
    pub(super) fn set_transport(&self, stats: &TransportStats) {
        let both = stats.refused.iter().chain(&stats.injected).map(|(name, count)| (*name, *count));
        *self.of_transport.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = both.collect();
    }

    /// What was refused, here and by the transport, and faults made on purpose.
    fn read_refused(&self) -> BTreeMap<&'static str, u64> {
        let mut refused = self.refused.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        for (name, count) in self.of_transport.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
            *refused.entry(name).or_default() += count;
        }
        refused
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
            server_ns: self.server_ns.load(Relaxed),
            replayed: self.replayed.load(Relaxed),
            waits: self.waits.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
            refused: self.read_refused(),
        }
    }
}
