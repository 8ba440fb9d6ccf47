//! The expert nodes as this node sees them: who can be reached, who is silent, how long answers take; and which holder of
//! an expert computes its rows.

use std::time::{Duration, Instant};

use mesh_core::{ExpertId, Seq, Slot, speed};

/// How much of a new answer's time goes into the moving average.
const AVERAGE_SHARE: f64 = 0.05;
/// After how long without answers a node's average has come halfway to the usual one: a node that was slow is tried again.
/// One ten times as slow is after some seven seconds. Whether it still is can be learned from its answers alone.
const FORGET_HALF: Duration = Duration::from_secs(2);
/// After how long the slowest answer seen counts half.
const SLOWEST_HALF: Duration = Duration::from_secs(10);
/// So many times the slowest answer of late is silence.
const SILENCE_FACTOR: f64 = 4.0;
/// A node that was silent is asked only where nobody else holds an expert, until it is heard or for this long.
const DOUBT_MAX: Duration = Duration::from_secs(5);
/// And it is not asked at all for this long, twice as long after each further time.
const AVOID_MIN: Duration = Duration::from_millis(500);
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

/// How long answers took of late: the slowest, in seconds, and the slowest for a unit of work.
#[derive(Clone, Copy, Debug)]
struct Pace {
    answer: Slowest,
    unit: Slowest,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { answer: Slowest(0.0, now), unit: Slowest(0.0, now) }
    }

    fn add(&mut self, took: Duration, units: f64, now: Instant) {
        self.answer.add(took.as_secs_f64(), now);
        self.unit.add(took.as_secs_f64() / units.max(1.0), now);
    }

    /// What so much work may take, seconds.
    fn at(&self, units: f64, now: Instant) -> f64 {
        self.answer.at(now).min(self.unit.at(now) * units.max(1.0))
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
    /// Times that it was silent since it was last heard.
    silences: u32,
    /// Until then it is asked only where nobody else can be.
    doubted: Option<Instant>,
    /// When the first of its late answers came that no answer in time has followed.
    late: Option<Instant>,
    /// How slow answers were that came late again and again: they are waited for.
    pace: Pace,
    /// Moving average of an answer's nanoseconds for a unit of work; 0: none yet.
    average: f64,
    heard: Instant,
}

impl Seen {
    fn new(connected: bool) -> Self {
        let now = Instant::now();
        Self {
            connected,
            avoided: None,
            unanswered: None,
            silences: 0,
            doubted: None,
            late: None,
            pace: Pace::new(now),
            average: 0.0,
            heard: now,
        }
    }
}

impl Seen {
    fn learn(&mut self, took: Duration, units: f64, now: Instant) {
        let each = took.as_nanos() as f64 / units.max(1.0);
        self.average = if self.average == 0.0 { each } else { self.average + (each - self.average) * AVERAGE_SHARE };
        self.heard = now;
    }

    fn is_doubted(&self, now: Instant) -> bool {
        self.doubted.is_some_and(|until| until > now)
    }
}

/// All slots of the view in force.
#[derive(Debug)]
pub(super) struct Peers {
    slots: Vec<Seen>,
    silence_min: Duration,
    silence_max: Duration,
    /// How slow answers of all slots were that came in time.
    pace: Pace,
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
        let pace = Pace::new(Instant::now());
        let (chosen, asked, costs) = (Vec::new(), Vec::new(), Vec::new());
        Self { slots: Vec::new(), silence_min, silence_max, pace, chosen, asked, costs }
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

    /// How long a slot's answer to `units` of work may take before its node counts as silent. A decoded token's is not waited
    /// for as long as a prompt's, though that was the slowest.
    pub fn silence(&self, slot: Slot, units: f64, now: Instant) -> Duration {
        let own = self.slots.get(slot.index()).map_or(0.0, |seen| seen.pace.at(units, now));
        let slowest = self.pace.at(units, now).max(own);
        // The bounds first: what is beyond a Duration is beyond them.
        let (min, max) = (self.silence_min.as_secs_f64(), self.silence_max.as_secs_f64());
        Duration::from_secs_f64((SILENCE_FACTOR * slowest).clamp(min, max))
    }

    /// The slot owes an answer for too long.
    pub fn silent(&mut self, slot: Slot, of: Unanswered, now: Instant) {
        let seen = self.seen(slot);
        let avoid = AVOID_MIN.saturating_mul(1 << seen.silences.min(8)).min(AVOID_MAX);
        seen.silences += 1;
        seen.avoided = Some(now + avoid);
        seen.doubted = Some(now + DOUBT_MAX);
        seen.unanswered = Some(of);
    }

    /// The answer to a frame came from the slot: it lives.
    ///
    /// An answer that ends a silence tells how long that was, which may be a node that stood still for a moment or an answer
    /// that was lost: others are not waited for any longer. Only what comes late again, though it was asked for after the
    /// last late answer had come, is a node that is slow: it is given the time that it takes.
    pub fn heard(&mut self, slot: Slot, seq: Seq, now: Instant) {
        let seen = self.seen(slot);
        let ended = std::mem::take(&mut seen.silences) > 0;
        let late = seen.unanswered.take_if(|of| of.seq == seq);
        (seen.avoided, seen.doubted) = (None, None);
        if let Some(of) = late
            && seen.late.is_some_and(|at| of.sent >= at)
        {
            let took = now.saturating_duration_since(of.sent);
            seen.pace.add(took, of.units, now);
            seen.learn(took, of.units, now);
        }
        if late.is_some() || ended {
            seen.late.get_or_insert(now);
        }
    }

    /// An answer for `units` of work, of a slot that was just [`heard`](Peers::heard), took so long.
    pub fn answered(&mut self, slot: Slot, took: Duration, units: f64, now: Instant) {
        let seen = self.seen(slot);
        // This one was sent while the slot was silent.
        if seen.late.is_some_and(|at| now.checked_sub(took).is_none_or(|sent| sent < at)) {
            return;
        }
        seen.late = None;
        seen.learn(took, units, now);
        self.pace.add(took, units, now);
    }

    /// Begins the choices of one dispatch among `experts` experts.
    pub fn begin(&mut self, experts: usize, now: Instant) {
        self.chosen.clear();
        self.chosen.resize(experts, None);
        self.asked.clear();
        self.asked.resize(self.slots.len(), 0.0);
        // Once for each layer: the costs' room serves for the averages first.
        self.costs.clear();
        self.costs.extend(self.slots.iter().filter(|s| s.connected && s.average > 0.0).map(|s| s.average));
        let usual = if self.costs.is_empty() { 1.0 } else { speed::usual(&mut self.costs) };
        self.costs.clear();
        self.costs.extend(self.slots.iter().map(|s| {
            let halvings = now.saturating_duration_since(s.heard).as_secs_f64() / FORGET_HALF.as_secs_f64();
            if s.average == 0.0 { usual } else { usual + (s.average - usual) * 0.5f64.powf(halvings) }
        }));
    }

    /// Who computes an expert's rows: of the usable holders the one that has to do the least, by what it is asked in this
    /// dispatch and how fast it has been, where two are equal the first; one that was silent comes last. All of an expert's rows go to one node, which reads its weights
    /// once.
    pub fn choose(&mut self, expert: ExpertId, holders: &[Slot], except: Option<Slot>, now: Instant) -> Option<Slot> {
        let usable = |s: &Slot| Some(*s) != except && self.usable(*s, now);
        if let Some(slot) = self.chosen.get(expert.index()).copied().flatten().filter(usable) {
            return Some(slot);
        }
        let doubted = |s: &Slot| self.slots[s.index()].is_doubted(now);
        let after = |s: &Slot| self.asked[s.index()] + self.costs[s.index()];
        let before = |a: &Slot, b: &Slot| doubted(a).cmp(&doubted(b)).then(after(a).total_cmp(&after(b)));
        let best = holders.iter().copied().filter(usable).min_by(before)?;
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
        let later = now + 10 * FORGET_HALF;
        peers.answered(Slot(1), Duration::from_millis(1), 1.0, later);
        assert!(of_slow(chosen(&mut peers, &holders, later)) >= 3, "the other was as fast all the time");
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
        assert_eq!(chosen(&mut peers, &[&[0, 1], &[1, 2]], now), [Some(1), Some(2)]);
        peers.silent(Slot(1), frame(3), now);
        let got = chosen(&mut peers, &[&[0, 1], &[1, 2]], now + AVOID_MIN);
        assert_eq!(got, [Some(1), Some(2)], "it is tried again where nobody else can be asked");
        assert_eq!(chosen(&mut peers, &[&[1, 2]], now + DOUBT_MAX), [Some(1)], "and elsewhere when nobody hears of it");
    }

    #[test]
    fn silence_is_measured_by_how_long_answers_take() {
        let (mut peers, now) = peers(1);
        let silence = |peers: &Peers, units, now| peers.silence(Slot(0), units, now);
        assert_eq!(silence(&peers, 8.0, now), MIN);
        peers.answered(Slot(0), Duration::from_secs(1), 8.0, now);
        assert_eq!(silence(&peers, 8.0, now), Duration::from_secs(4));
        assert_eq!(silence(&peers, 80.0, now), Duration::from_secs(4), "nothing was slower so far");
        assert_eq!(silence(&peers, 2.0, now), Duration::from_secs(1), "a quarter of the work");
        assert_eq!(silence(&peers, 8.0, now + SLOWEST_HALF), Duration::from_secs(2));
    }

    #[test]
    fn a_node_that_stood_still_is_waited_for_no_longer_the_next_time_and_a_slow_one_is() {
        let (mut peers, start) = peers(2);
        let at = |ms| start + Duration::from_millis(ms);
        let frame = |seq, sent| Unanswered { seq: Seq(seq), sent: at(sent), units: 8.0 };
        let silence = |peers: &Peers, slot, ms| peers.silence(Slot(slot), 8.0, at(ms));
        // Asked twice while it stands still, it answers both when it goes on, and the next in time.
        peers.silent(Slot(0), frame(1, 0), at(500));
        peers.silent(Slot(0), frame(2, 800), at(1300));
        peers.heard(Slot(0), Seq(1), at(3000));
        peers.heard(Slot(0), Seq(2), at(3001));
        peers.answered(Slot(0), Duration::from_millis(400), 8.0, at(3002));
        assert_eq!(silence(&peers, 0, 3002), MIN, "sent while it stood still");
        peers.heard(Slot(0), Seq(3), at(3010));
        peers.answered(Slot(0), Duration::from_millis(1), 8.0, at(3010));
        // The next time the same.
        peers.silent(Slot(0), frame(4, 4000), at(4500));
        peers.heard(Slot(0), Seq(4), at(7000));
        assert_eq!(silence(&peers, 0, 7000), MIN);
        // Late again, though asked after the late one came: it is slow, and the other is not.
        peers.silent(Slot(0), frame(5, 7001), at(7501));
        peers.heard(Slot(0), Seq(5), at(8001));
        assert_eq!(silence(&peers, 0, 8001), Duration::from_secs(4));
        assert_eq!(silence(&peers, 1, 8001), MIN);
    }
}
