//! How long a blocked wait spins before it sleeps, learnt from the waits before it.
//!
//! Being woken costs tens of microseconds (more where processors are virtual), so waits that will be short are better spun
//! through, offering the processor to others all the time; waits that will be long are better slept through at once. Which
//! of them the next wait is, those before it tell: within a step they are all about as long as a layer takes the other side.

use std::time::Duration;

/// Spun through in any case: what sleeping and being woken costs at least.
const SPIN_MIN: Duration = Duration::from_micros(20);
/// Waits count as at most so many times the bound, so that one long one is soon forgotten.
const LONG: u32 = 4;

/// The budget of one thread's waits.
#[derive(Clone, Debug)]
pub(crate) struct SpinBudget {
    max: Duration,
    /// Moving average of the waits.
    typical: Duration,
}

impl SpinBudget {
    /// A budget of at most `max`; zero never spins.
    pub fn new(max: Duration) -> Self {
        Self { max, typical: Duration::ZERO }
    }

    /// How long to spin in the next wait.
    pub fn next(&self) -> Duration {
        let likely_over = self.typical * 2;
        if likely_over > self.max { SPIN_MIN.min(self.max) } else { likely_over.max(SPIN_MIN).min(self.max) }
    }

    /// Takes note of how long a wait was, spun and slept.
    pub fn learn(&mut self, waited: Duration) {
        let sample = waited.min(self.max * LONG);
        self.typical = (self.typical * 7 + sample) / 8;
    }
}

/// Spins between two offers of the processor to others, who may be whom we wait for.
const YIELD_EVERY: u32 = 32;
/// The same while others take it.
const YIELD_EVERY_CROWDED: u32 = 2;
/// What an offer that nobody takes costs at most, until a shorter one was seen.
const YIELD_MAX: Duration = Duration::from_micros(1);

/// Whether others want the processor that a wait spins on: then it is better theirs, for whoever is waited for may be among
/// them or wait for them in turn. How long yielding takes tells.
#[derive(Clone, Debug)]
pub(crate) struct Crowd {
    crowded: bool,
    /// The shortest of all yields: nobody was there.
    shortest: Duration,
}

impl Default for Crowd {
    fn default() -> Self {
        Self { crowded: false, shortest: YIELD_MAX }
    }
}

impl Crowd {
    /// How often to spin before the next yield.
    pub fn spins(&self) -> u32 {
        if self.crowded { YIELD_EVERY_CROWDED } else { YIELD_EVERY }
    }

    /// Takes note of how long a yield took.
    pub fn yielded(&mut self, took: Duration) {
        self.shortest = self.shortest.min(took);
        self.crowded = took > 2 * self.shortest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_millis(2);

    #[test]
    fn short_waits_are_spun_through() {
        let mut budget = SpinBudget::new(MAX);
        for _ in 0..50 {
            budget.learn(Duration::from_micros(300));
        }
        assert!(budget.next() > Duration::from_micros(500) && budget.next() <= Duration::from_micros(600));
    }

    #[test]
    fn long_waits_are_slept_through() {
        let mut budget = SpinBudget::new(MAX);
        for _ in 0..50 {
            budget.learn(Duration::from_millis(10));
        }
        assert_eq!(budget.next(), SPIN_MIN);
    }

    #[test]
    fn one_long_wait_is_soon_forgotten() {
        let mut budget = SpinBudget::new(MAX);
        budget.learn(Duration::from_secs(3600));
        for _ in 0..8 {
            budget.learn(Duration::from_micros(200));
        }
        assert!(budget.next() > Duration::from_micros(400));
    }

    #[test]
    fn a_bound_of_zero_never_spins_and_a_small_one_holds() {
        assert_eq!(SpinBudget::new(Duration::ZERO).next(), Duration::ZERO);
        let mut budget = SpinBudget::new(Duration::from_micros(5));
        budget.learn(Duration::from_micros(4));
        assert_eq!(budget.next(), Duration::from_micros(5));
    }

    #[test]
    fn who_shares_a_processor_yields_sooner_until_it_is_alone_again() {
        let mut crowd = Crowd::default();
        for (took_ns, spins) in
            [(400, YIELD_EVERY), (900, YIELD_EVERY_CROWDED), (5000, YIELD_EVERY_CROWDED), (500, YIELD_EVERY)]
        {
            crowd.yielded(Duration::from_nanos(took_ns));
            assert_eq!(crowd.spins(), spins, "{took_ns} ns");
        }
    }
}
