//! What heartbeats tell of load and speed, as moving averages: what placement rests on. No IO, no clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_core::speed::{self, Took};
use mesh_core::{NodeId, Slot};
use mesh_proto::limits::SLOTS_MAX;
use mesh_proto::v1;

/// After how long a rate counts half.
const RATE_HALF: Duration = Duration::from_secs(20);
/// After how long a wait counts half, while answers come.
const WAIT_HALF: Duration = Duration::from_secs(1);
/// After how long without answers a slot counts as usual again, to be given something to do.
const FORGET: Duration = Duration::from_secs(60);
/// The slowest that a node counts as.
const SPEED_MIN: f64 = 0.02;

/// Rows that one expert node computed.
#[derive(Clone, Debug)]
struct Rows {
    at: Instant,
    /// As last told, since the node's start.
    counted: Vec<u64>,
    /// Rows a second.
    rates: Vec<f64>,
}

/// Answers of one expert slot to one attention node.
#[derive(Clone, Copy, Debug, Default)]
struct Waited {
    answers: u64,
    ns: u64,
    work: f64,
    /// Nanoseconds of an answer, moving average.
    each: f64,
    /// Nanoseconds for a unit of work, moving average.
    cost: f64,
    at: Option<Instant>,
}

/// Load and speed of all nodes.
#[derive(Clone, Debug, Default)]
pub struct Loads {
    rows: BTreeMap<NodeId, Rows>,
    waits: BTreeMap<NodeId, BTreeMap<Slot, Waited>>,
}

fn share(passed: Duration, half: Duration) -> f64 {
    1.0 - 0.5f64.powf(passed.as_secs_f64() / half.as_secs_f64())
}

impl Loads {
    /// Takes a node's account in.
    pub fn heartbeat(&mut self, node: NodeId, load: &v1::NodeLoad, now: Instant) {
        if !load.expert_rows.is_empty() {
            self.rows(node, &load.expert_rows, now);
        }
        for wait in load.waits.iter().take(SLOTS_MAX) {
            let Ok(slot) = u16::try_from(wait.slot) else { continue };
            let seen = self.waits.entry(node).or_default().entry(Slot(slot)).or_default();
            let (ns, work) = (wait.ns.saturating_sub(seen.ns), wait.work - seen.work);
            let answers = wait.answers.saturating_sub(seen.answers);
            if work.is_finite() && work > 0.0 && answers > 0 {
                let (cost, each) = (ns as f64 / work, ns as f64 / answers as f64);
                let share = seen.at.map_or(1.0, |at| share(now.saturating_duration_since(at), WAIT_HALF));
                seen.cost += (cost - seen.cost) * share;
                seen.each += (each - seen.each) * share;
                seen.at = Some(now);
            }
            (seen.answers, seen.ns, seen.work) = (wait.answers, wait.ns, wait.work);
        }
    }

    fn rows(&mut self, node: NodeId, counted: &[u64], now: Instant) {
        let known = self.rows.get_mut(&node).filter(|r| r.counted.len() == counted.len());
        let Some(rows) = known else {
            let rates = vec![0.0; counted.len()];
            self.rows.insert(node, Rows { at: now, counted: counted.to_vec(), rates });
            return;
        };
        let passed = now.saturating_duration_since(rows.at);
        if passed.is_zero() {
            return;
        }
        let (share, seconds) = (share(passed, RATE_HALF), passed.as_secs_f64());
        for ((rate, before), count) in rows.rates.iter_mut().zip(&mut rows.counted).zip(counted) {
            let new = count.saturating_sub(*before) as f64 / seconds;
            *rate += (new - *rate) * share;
            *before = *count;
        }
        rows.at = now;
    }

    /// A node is gone.
    pub fn forget(&mut self, node: NodeId) {
        self.rows.remove(&node);
        self.waits.remove(&node);
    }

    /// The node behind a slot is another: how slow the one before was says nothing.
    pub fn forget_slot(&mut self, slot: Slot) {
        self.waits.values_mut().for_each(|of| {
            of.remove(&slot);
        });
    }

    /// Rows a second of each expert over all nodes, `[MoE layer][expert]`; empty while nothing is known.
    pub fn rates(&self, experts: usize) -> Vec<f64> {
        let mut rates = vec![0.0; experts];
        for rows in self.rows.values().filter(|r| r.rates.len() == experts) {
            rates.iter_mut().zip(&rows.rates).for_each(|(sum, rate)| *sum += rate);
        }
        if rates.iter().all(|rate| *rate == 0.0) { Vec::new() } else { rates }
    }

    /// How fast each slot answers beside the others: 1 is usual, and so is a slot of which nothing is known.
    pub fn speeds(&self, now: Instant) -> BTreeMap<Slot, f64> {
        let mut sums: BTreeMap<Slot, (f64, f64, f64)> = BTreeMap::new();
        let lately = |at: Instant| now.saturating_duration_since(at) < FORGET;
        for (slot, waited) in self.waits.values().flatten().filter(|(_, w)| w.at.is_some_and(lately)) {
            let of = sums.entry(*slot).or_default();
            *of = (of.0 + waited.cost, of.1 + waited.each, of.2 + 1.0);
        }
        let means = sums.into_iter().map(|(slot, (cost, each, n))| (slot, Took { unit: cost / n, answer: each / n }));
        let speeds = speed::speeds(&means.collect());
        speeds.into_iter().map(|(slot, speed)| (slot, speed.max(SPEED_MIN))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn waits(of: &[(u32, u64, f64)]) -> v1::NodeLoad {
        let waits = of.iter().map(|(slot, ns, work)| v1::SlotWait { slot: *slot, answers: 1, ns: *ns, work: *work });
        v1::NodeLoad { waits: waits.collect(), ..Default::default() }
    }

    #[test]
    fn rates_follow_what_nodes_count_and_go_with_the_node() {
        let (mut loads, now) = (Loads::default(), Instant::now());
        let rows = |rows: &[u64]| v1::NodeLoad { expert_rows: rows.to_vec(), ..Default::default() };
        loads.heartbeat(NodeId(1), &rows(&[0, 0]), now);
        assert!(loads.rates(2).is_empty(), "nothing was computed yet");
        loads.heartbeat(NodeId(1), &rows(&[2000, 0]), now + RATE_HALF);
        loads.heartbeat(NodeId(2), &rows(&[7, 7]), now + RATE_HALF);
        assert_eq!(loads.rates(2), [50.0, 0.0]);
        // A node that counts from its start again is no negative load.
        loads.heartbeat(NodeId(1), &rows(&[10, 0]), now + 2 * RATE_HALF);
        assert_eq!(loads.rates(2), [25.0, 0.0]);
        loads.forget(NodeId(1));
        assert!(loads.rates(2).is_empty());
    }

    #[test]
    fn who_was_slow_is_known_until_it_is_asked_for_nothing_or_is_another() {
        let (mut loads, now) = (Loads::default(), Instant::now());
        loads.heartbeat(NodeId(1), &waits(&[(0, MS, 1.0), (1, MS * 12 / 10, 1.0), (2, 10 * MS, 1.0)]), now);
        assert_eq!(loads.speeds(now), BTreeMap::from([(Slot(0), 1.0), (Slot(1), 1.0), (Slot(2), 0.12)]));
        assert!(loads.speeds(now + FORGET).is_empty(), "who is asked for nothing is given another chance");
        loads.forget_slot(Slot(2));
        assert!(!loads.speeds(now).contains_key(&Slot(2)));
        assert!(Loads::default().speeds(now).is_empty());
    }
}
