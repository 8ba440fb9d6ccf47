//! What the node has done since its start.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use mesh_proto::v1;
use mesh_service::profile::{Part, Profile};
use mesh_transport::TransportStats;

/// Why a frame was not answered with rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its view is older than the one in force.
    StaleView,
    /// Its view is newer than all that this node heard of in time.
    FutureView,
    /// Its layer has no routed experts.
    UnknownLayer,
    /// It wants an expert that this node does not hold under its view.
    ExpertNotHeld,
    /// Its rows are not of the model's hidden size and compute dtype.
    WrongRowBytes,
    /// Its answer does not fit a frame, or too much waits already.
    Overloaded,
    /// Its body contradicts itself; the channel was closed.
    BadBody,
    /// It is no dispatch, says to come from another, or repeats a number; the channel was closed.
    Protocol,
}

impl Refusal {
    const ALL: [Refusal; 8] = [
        Refusal::StaleView,
        Refusal::FutureView,
        Refusal::UnknownLayer,
        Refusal::ExpertNotHeld,
        Refusal::WrongRowBytes,
        Refusal::Overloaded,
        Refusal::BadBody,
        Refusal::Protocol,
    ];

    /// Its name in status reports.
    pub fn name(self) -> &'static str {
        match self {
            Refusal::StaleView => "stale_view",
            Refusal::FutureView => "future_view",
            Refusal::UnknownLayer => "unknown_layer",
            Refusal::ExpertNotHeld => "expert_not_held",
            Refusal::WrongRowBytes => "wrong_row_bytes",
            Refusal::Overloaded => "overloaded",
            Refusal::BadBody => "bad_body",
            Refusal::Protocol => "protocol",
        }
    }
}

/// The parts of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnPart {
    /// Taking in frames, picking and checking them.
    Receive,
    /// Grouping rows by expert, and the FFNs.
    Ffn,
    /// Sending the answers.
    Answer,
}

impl Part for TurnPart {
    const NAMES: &'static [&'static str] = &["receive", "ffn", "answer"];

    fn index(self) -> usize {
        self as usize
    }
}

/// Counters from the node's start; written by the engine, read by heartbeats.
#[derive(Debug, Default)]
pub struct Counters {
    /// Where the time of turns goes.
    pub profile: Profile<TurnPart>,
    rounds: AtomicU64,
    rows: AtomicU64,
    pairs: AtomicU64,
    dispatch_bytes: AtomicU64,
    combine_bytes: AtomicU64,
    frames_received: AtomicU64,
    frames_sent: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
    channels: AtomicU64,
    /// Rows that each expert of the model computed, and bytes of one expert.
    expert_rows: Vec<AtomicU64>,
    expert_bytes: u64,
    /// What the transport turned away before the engine saw it, and faults made on purpose, by its own names.
    of_transport: Mutex<BTreeMap<&'static str, u64>>,
}

/// Statistics are read alone, never to order other memory.
const ORDER: Ordering = Ordering::Relaxed;

impl Counters {
    /// For a model of so many routed experts over all layers, each of so many bytes.
    pub fn new(experts: usize, expert_bytes: u64) -> Self {
        let expert_rows = (0..experts).map(|_| AtomicU64::new(0)).collect();
        Self { expert_rows, expert_bytes, ..Self::default() }
    }

    pub(crate) fn computed(&self, expert: usize, rows: usize) {
        if let Some(counted) = self.expert_rows.get(expert) {
            counted.fetch_add(rows as u64, ORDER);
        }
    }

    pub(crate) fn round(&self) {
        self.rounds.fetch_add(1, ORDER);
    }

    pub(crate) fn received(&self) {
        self.frames_received.fetch_add(1, ORDER);
    }

    pub(crate) fn answered(&self, rows: u32, pairs: u32, row_bytes: usize) {
        self.frames_sent.fetch_add(1, ORDER);
        self.rows.fetch_add(rows.into(), ORDER);
        self.pairs.fetch_add(pairs.into(), ORDER);
        self.dispatch_bytes.fetch_add(u64::from(rows) * row_bytes as u64, ORDER);
        self.combine_bytes.fetch_add(u64::from(pairs) * row_bytes as u64, ORDER);
    }

    pub(crate) fn refuse(&self, why: Refusal) {
        self.refused[why as usize].fetch_add(1, ORDER);
    }

    /// What the transport counted by now.
    pub(crate) fn set_transport(&self, stats: &TransportStats) {
        let both = stats.refused.iter().chain(&stats.injected).map(|(name, count)| (*name, *count));
        *self.of_transport.lock().unwrap_or_else(PoisonError::into_inner) = both.collect();
    }

    pub(crate) fn set_channels(&self, open: usize) {
        self.channels.store(open as u64, ORDER);
    }

    /// Frames refused for a reason.
    pub fn refused(&self, why: Refusal) -> u64 {
        self.refused[why as usize].load(ORDER)
    }

    /// Grouped FFNs run: several frames may share one.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(ORDER)
    }

    /// Channels open.
    pub fn channels(&self) -> u64 {
        self.channels.load(ORDER)
    }

    /// The node's account for a heartbeat, which holds so many experts under the view in force and has so many in memory.
    pub fn load(&self, experts_held: usize, experts_in_memory: usize) -> v1::NodeLoad {
        let refused = Refusal::ALL.iter().map(|r| (r.name().to_owned(), self.refused(*r)));
        let mut refused: HashMap<String, u64> = refused.filter(|(_, count)| *count > 0).collect();
        for (name, count) in self.of_transport.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            *refused.entry((*name).to_owned()).or_default() += count;
        }
        let mut load = v1::NodeLoad {
            steps: self.rounds(),
            pairs: self.pairs.load(ORDER),
            rows: self.rows.load(ORDER),
            dispatch_bytes: self.dispatch_bytes.load(ORDER),
            combine_bytes: self.combine_bytes.load(ORDER),
            frames_sent: self.frames_sent.load(ORDER),
            frames_received: self.frames_received.load(ORDER),
            refused,
            experts_held: u32::try_from(experts_held).unwrap_or(u32::MAX),
            experts_in_memory: u32::try_from(experts_in_memory).unwrap_or(u32::MAX),
            expert_rows: self.expert_rows.iter().map(|rows| rows.load(ORDER)).collect(),
            expert_bytes: self.expert_bytes,
            ..v1::NodeLoad::default()
        };
        self.profile.report(&mut load);
        load
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_counted_under_its_own_name() {
        let counters = Counters::default();
        for (i, why) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(why as usize, i);
            (0..=i).for_each(|_| counters.refuse(why));
        }
        let load = counters.load(5, 7);
        assert_eq!(load.refused.len(), Refusal::ALL.len());
        assert_eq!((load.refused["stale_view"], load.refused["protocol"]), (1, 8));
        assert_eq!((load.experts_held, load.experts_in_memory), (5, 7));
        let (refused, injected) = (BTreeMap::from([("wrong_proof", 2)]), BTreeMap::from([("injected_drop", 3)]));
        counters.set_transport(&TransportStats { refused, injected, ..TransportStats::default() });
        let refused = counters.load(5, 7).refused;
        assert_eq!((refused["wrong_proof"], refused["injected_drop"]), (2, 3));
    }
}
