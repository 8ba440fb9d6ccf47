//! The expert nodes as this node sees them: who can be reached, who is silent, how long answers take; and which holder of
//! an expert computes its rows.

use std::time::{Duration, Instant};

use mesh_core::{ExpertId, Seq, Slot};

/// How much of a new answer's time goes into the moving average.
const AVERAGE_SHARE: f64 = 0.05;
/// After how long without answers a node's average has come halfway to the others': a node that was slow is tried again.
const FORGET_HALF: Duration = Duration::from_secs(5);
/// After how long the slowest answer seen counts half.
const SLOWEST_HALF: Duration = Duration::from_secs(10);
/// So many times the slowest answer of late is silence.
const SILENCE_FACTOR: f64 = 4.0;
/// A node whose silence ended without an answer is avoided for this long, twice as long after each further time.
const AVOID_MIN: Duration = Duration::from_millis(250);
const AVOID_MAX: Duration = Duration::from_secs(4);
/// A pair's share of a frame's cost beside its experts': a further row of an expert that is read anyway.
const PAIR_COST: f64 = 1.0 / 16.0;

/// A frame that is not answered in time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unanswered {
    pub seq: Seq,
    pub sent: Instant,
    /// What it asks for, in the units of [`work`].
    pub units: f64,
}

/// The largest of some values, each of which counts half after [`SLOWEST_HALF`].
#[derive(Clone, Copy, Debug)]
struct Slowest(f64, Instant);

impl Slowest {
    fn at(self, now: Instant) -> f64 {
        let halvings = now.saturating_duration_since(self.1).as_secs_f64() / SLOWEST_HALF.as_secs_f64();
        self.0 * 0.5f64.powf(halvings)
    }

    fn add(&mut self, value: f64, now: Instant) {
        if value > self.at(now) {
            *self = Self(value, now);
        }
    }
}

/// What is known of one slot.
#[derive(Clone, Copy, Debug)]
struct Seen {
    connected: bool,
    /// Not to be chosen until then.
    avoided: Option<Instant>,
    /// The frame that it was silent about last.
    unanswered: Option<Unanswered>,
    /// Times that it was silent since it last answered.
    silences: u32,
    /// Moving average of an answer's nanoseconds for a unit of work; 0: none yet.
    average: f64,
    heard: Instant,
}

impl Seen {
    fn new(connected: bool) -> Self {
        Self { connected, avoided: None, unanswered: None, silences: 0, average: 0.0, heard: Instant::now() }
    }
}

/// All slots of the view in force.
#[derive(Debug)]
pub(super) struct Peers {
    slots: Vec<Seen>,
    silence_min: Duration,
    silence_max: Duration,
    /// The slowest answer, seconds, and the slowest for a unit of work.
    slowest: Slowest,
    slowest_unit: Slowest,
    /// For each expert of the layer at hand, who was chosen; and what is asked of each slot so far.
    chosen: Vec<Option<Slot>>,
    asked: Vec<f64>,
    costs: Vec<f64>,
}

/// Units of work of a frame.
pub(super) fn work(pairs: usize, experts: usize) -> f64 {
    pairs.min(experts) as f64 + pairs as f64 * PAIR_COST
}

impl Peers {
    /// Nobody yet. A node is silent when it owes an answer for four times the slowest of late, or the slowest for as much work
    /// if that is less; at least `silence_min`, at most `silence_max`.
    pub fn new(silence_min: Duration, silence_max: Duration) -> Self {
        let slowest = Slowest(0.0, Instant::now());
        let (chosen, asked, costs) = (Vec::new(), Vec::new(), Vec::new());
        Self { slots: Vec::new(), silence_min, silence_max, slowest, slowest_unit: slowest, chosen, asked, costs }
    }

    fn seen(&mut self, slot: Slot) -> &mut Seen {
        if self.slots.len() <= slot.index() {
            self.slots.resize(slot.index() + 1, Seen::new(false));
        }
        &mut self.slots[slot.index()]
    }

    /// A slot has another node behind it, or none: nothing is known of it.
    pub fn reset(&mut self, slot: Slot, connected: bool) {
        *self.seen(slot) = Seen::new(connected);
    }

    /// The slot's channel opened or closed.
    pub fn set_connected(&mut self, slot: Slot, connected: bool) {
        self.seen(slot).connected = connected;
    }

    /// Whether rows may be sent to a slot: connected, and not silent of late.
    pub fn usable(&self, slot: Slot, now: Instant) -> bool {
        let seen = self.slots.get(slot.index());
        seen.is_some_and(|s| s.connected && s.avoided.is_none_or(|until| until <= now))
    }

    /// When the first of the slots that are avoided may be tried again.
    pub fn next_try(&self, now: Instant) -> Option<Instant> {
        self.slots.iter().filter_map(|s| s.avoided).filter(|until| *until > now).min()
    }

    /// How long the answer to `units` of work may take before its node counts as silent. A decoded token's is not waited for
    /// as long as a prompt's, though that was the slowest.
    pub fn silence(&self, units: f64, now: Instant) -> Duration {
        let slowest = self.slowest.at(now).min(self.slowest_unit.at(now) * units.max(1.0));
        // The bounds first: what is beyond a Duration is beyond them.
        let (min, max) = (self.silence_min.as_secs_f64(), self.silence_max.as_secs_f64());
        Duration::from_secs_f64((SILENCE_FACTOR * slowest).clamp(min, max))
    }

    fn slow(&mut self, took: Duration, units: f64, now: Instant) {
        self.slowest.add(took.as_secs_f64(), now);
        self.slowest_unit.add(took.as_secs_f64() / units.max(1.0), now);
    }

    /// The slot owes an answer for too long.
    pub fn silent(&mut self, slot: Slot, of: Unanswered, now: Instant) {
        let seen = self.seen(slot);
        let avoid = AVOID_MIN.saturating_mul(1 << seen.silences.min(8)).min(AVOID_MAX);
        seen.silences += 1;
        seen.avoided = Some(now + avoid);
        seen.unanswered = Some(of);
    }

    /// The answer to a frame came from the slot: it lives. If this is what it was silent about, it was slow, which is
    /// remembered; if not, an answer was lost, which says nothing of how long others take.
    pub fn heard(&mut self, slot: Slot, seq: Seq, now: Instant) {
        let seen = self.seen(slot);
        seen.silences = 0;
        seen.avoided = None;
        if let Some(of) = seen.unanswered.take_if(|of| of.seq == seq) {
            self.slow(now.saturating_duration_since(of.sent), of.units, now);
        }
    }

    /// An answer for `units` of work took so long.
    pub fn answered(&mut self, slot: Slot, took: Duration, units: f64, now: Instant) {
        self.slow(took, units, now);
        let seen = self.seen(slot);
        let each = took.as_nanos() as f64 / units.max(1.0);
        seen.average = if seen.average == 0.0 { each } else { seen.average + (each - seen.average) * AVERAGE_SHARE };
        seen.heard = now;
    }

    /// Begins the choices of one dispatch among `experts` experts.
    pub fn begin(&mut self, experts: usize, now: Instant) {
        self.chosen.clear();
        self.chosen.resize(experts, None);
        self.asked.clear();
        self.asked.resize(self.slots.len(), 0.0);
        let known = self.slots.iter().filter(|s| s.connected && s.average > 0.0);
        let (sum, count) = known.fold((0.0, 0), |(sum, count), s| (sum + s.average, count + 1));
        let mean = if count == 0 { 1.0 } else { sum / f64::from(count) };
        self.costs.clear();
        self.costs.extend(self.slots.iter().map(|s| {
            let halvings = now.saturating_duration_since(s.heard).as_secs_f64() / FORGET_HALF.as_secs_f64();
            if s.average == 0.0 { mean } else { mean + (s.average - mean) * 0.5f64.powf(halvings) }
        }));
    }

    /// Who computes an expert's rows: of the usable holders the one that has to do the least, by what it is asked in this
    /// dispatch and how fast it has been; in doubt the first. All of an expert's rows go to one node, which reads its weights
    /// once.
    pub fn choose(&mut self, expert: ExpertId, holders: &[Slot], except: Option<Slot>, now: Instant) -> Option<Slot> {
        let usable = |s: &Slot| Some(*s) != except && self.usable(*s, now);
        if let Some(slot) = self.chosen.get(expert.index()).copied().flatten().filter(usable) {
            return Some(slot);
        }
        let after = |s: &Slot| self.asked[s.index()] + self.costs[s.index()];
        let best = holders.iter().copied().filter(usable).min_by(|a, b| after(a).total_cmp(&after(b)))?;
        self.asked[best.index()] += self.costs[best.index()];
        if let Some(chosen) = self.chosen.get_mut(expert.index()) {
            *chosen = Some(best);
        }
        Some(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(500);
    const MAX: Duration = Duration::from_secs(10);

    fn peers(slots: u16) -> (Peers, Instant) {
        let mut peers = Peers::new(MIN, MAX);
        (0..slots).for_each(|slot| peers.reset(Slot(slot), true));
        (peers, Instant::now())
    }

    fn chosen(peers: &mut Peers, holders: &[&[u16]], now: Instant) -> Vec<Option<u16>> {
        peers.begin(holders.len(), now);
        let choose = |(expert, holders): (usize, &&[u16])| {
            let holders: Vec<Slot> = holders.iter().map(|s| Slot(*s)).collect();
            peers.choose(ExpertId(expert as u16), &holders, None, now).map(|s| s.0)
        };
        holders.iter().enumerate().map(choose).collect()
    }

    #[test]
    fn experts_are_shared_out_evenly_over_their_holders() {
        let (mut peers, now) = peers(2);
        let got = chosen(&mut peers, &[&[0, 1], &[0, 1], &[0, 1], &[1, 0]], now);
        assert_eq!(got, [Some(0), Some(1), Some(0), Some(1)]);
    }

    #[test]
    fn a_node_that_takes_longer_gets_less_and_is_tried_again_after_a_while() {
        let (mut peers, now) = peers(2);
        for _ in 0..100 {
            peers.answered(Slot(0), Duration::from_millis(10), 1.0, now);
            peers.answered(Slot(1), Duration::from_millis(1), 1.0, now);
        }
        let holders: [&[u16]; 8] = [&[0, 1]; 8];
        let of_slow = |got: Vec<Option<u16>>| got.iter().filter(|s| **s == Some(0)).count();
        assert_eq!(of_slow(chosen(&mut peers, &holders, now)), 0);
        assert!(of_slow(chosen(&mut peers, &holders, now + 10 * FORGET_HALF)) >= 3);
    }

    #[test]
    fn who_is_gone_or_silent_is_not_chosen_and_who_answers_is_again() {
        let (mut peers, now) = peers(3);
        peers.set_connected(Slot(0), false);
        let frame = |seq| Unanswered { seq: Seq(seq), sent: now - MIN, units: 8.0 };
        peers.silent(Slot(1), frame(1), now);
        assert_eq!(chosen(&mut peers, &[&[0, 1], &[1, 2]], now), [None, Some(2)]);
        assert_eq!(peers.next_try(now), Some(now + AVOID_MIN));
        assert_eq!(peers.next_try(now + AVOID_MIN), None, "nothing is left to wait for");
        peers.heard(Slot(1), Seq(2), now);
        assert_eq!(chosen(&mut peers, &[&[0, 1]], now), [Some(1)]);
        peers.silent(Slot(1), frame(3), now);
        assert!(peers.usable(Slot(1), now + AVOID_MIN), "it is tried again when nobody hears of it");
    }

    #[test]
    fn silence_is_measured_by_how_long_answers_take() {
        let (mut peers, now) = peers(1);
        assert_eq!(peers.silence(8.0, now), MIN);
        peers.answered(Slot(0), Duration::from_secs(1), 8.0, now);
        assert_eq!(peers.silence(8.0, now), Duration::from_secs(4));
        assert_eq!(peers.silence(80.0, now), Duration::from_secs(4), "nothing was slower so far");
        assert_eq!(peers.silence(2.0, now), Duration::from_secs(1), "a quarter of the work");
        assert_eq!(peers.silence(8.0, now + SLOWEST_HALF), Duration::from_secs(2));
        // An answer that was lost changes nothing, however late others are heard of.
        let lost = Duration::from_secs(5);
        peers.silent(Slot(0), Unanswered { seq: Seq(7), sent: now - lost, units: 8.0 }, now);
        peers.heard(Slot(0), Seq(8), now);
        assert_eq!(peers.silence(8.0, now), Duration::from_secs(4));
        // One that was slower than what was taken for silence: it gets more time.
        peers.heard(Slot(0), Seq(7), now);
        assert_eq!(peers.silence(8.0, now), MAX);
    }
}
