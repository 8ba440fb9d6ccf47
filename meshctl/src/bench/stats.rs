//! Percentiles: exact over one value a request, by histogram over one value a token.

use std::time::Duration;

use serde::Serialize;

/// What is said of a set of latencies, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// How many there are.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Half of them are at most this.
    pub p50: f64,
    /// Nine of ten.
    pub p90: f64,
    /// All but one of a hundred.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

/// The nearest-rank percentile of ascending values: the smallest one that at least `percent` of all are at most.
pub fn percentile(ascending: &[f64], percent: f64) -> f64 {
    let rank = rank(ascending.len() as u64, percent);
    ascending.get((rank as usize).saturating_sub(1)).copied().unwrap_or(0.0)
}

/// From 1 to `count`; 0 for none.
fn rank(count: u64, percent: f64) -> u64 {
    ((count as f64 * percent / 100.0).ceil() as u64).clamp(1, count.max(1)).min(count)
}

impl Summary {
    /// Of any values in any order; `None` of none, because no number would be true.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let at = |percent| percentile(&values, percent);
        Some(Self { count: values.len() as u64, mean, p50: at(50.0), p90: at(90.0), p99: at(99.0), max })
    }
}

/// Sub-buckets of each power of two: a bucket is at most 1/256 wide of its value, so a percentile is within 0.4 %.
const SUBS_LOG2: u32 = 8;
const SUBS: u64 = 1 << SUBS_LOG2;
/// Nanoseconds of a `u64` in `SUBS` exact buckets and then `SUBS` for each further power of two.
const BUCKETS: usize = ((64 - SUBS_LOG2 as usize) + 1) << SUBS_LOG2;

/// Durations counted in buckets that widen with the value: a fixed size, nothing allocated by a token.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum_ns: u128,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], count: 0, sum_ns: 0, max_ns: 0 }
    }
}

fn bucket(ns: u64) -> usize {
    if ns < SUBS {
        return ns as usize;
    }
    let shift = ns.ilog2() - SUBS_LOG2;
    ((u64::from(shift) << SUBS_LOG2) + (ns >> shift)) as usize
}

/// The middle of a bucket.
fn middle(bucket: usize) -> f64 {
    let bucket = bucket as u64;
    if bucket < 2 * SUBS {
        return bucket as f64;
    }
    let shift = (bucket >> SUBS_LOG2) - 1;
    let low = (bucket - (shift << SUBS_LOG2)) << shift;
    low as f64 + ((1u64 << shift) - 1) as f64 / 2.0
}

impl Histogram {
    /// Counts one duration.
    pub fn add(&mut self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(ns)] += 1;
        self.count += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// `None` of none.
    pub fn summary(&self) -> Option<Summary> {
        if self.count == 0 {
            return None;
        }
        let at = |percent| self.percentile_ns(percent) / 1e6;
        let mean = self.sum_ns as f64 / self.count as f64 / 1e6;
        let max = self.max_ns as f64 / 1e6;
        Some(Summary { count: self.count, mean, p50: at(50.0), p90: at(90.0), p99: at(99.0), max })
    }

    fn percentile_ns(&self, percent: f64) -> f64 {
        let rank = rank(self.count, percent);
        let mut below = 0;
        let found = self.counts.iter().position(|count| {
            below += count;
            below >= rank
        });
        // The last bucket's middle may lie above the largest value in it.
        found.map_or(0.0, middle).min(self.max_ns as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        let at = |p| percentile(&values, p);
        assert_eq!((at(50.0), at(90.0), at(99.0), at(100.0)), (50.0, 90.0, 99.0, 100.0));
        assert_eq!(percentile(&[3.0], 1.0), 3.0);
        assert_eq!(percentile(&[1.0, 2.0, 3.0, 4.0, 5.0], 50.0), 3.0);
        assert_eq!(percentile(&[], 50.0), 0.0);
    }

    #[test]
    fn a_summary_needs_no_order_and_nothing_has_none() {
        let summary = Summary::of(vec![4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((summary.count, summary.mean, summary.p50, summary.p99, summary.max), (4, 2.5, 2.0, 4.0, 4.0));
        assert_eq!(Summary::of(vec![]), None);
        assert_eq!(Histogram::default().summary(), None);
    }

    #[test]
    fn buckets_are_in_order_and_their_middle_is_near_every_value() {
        let mut last = 0;
        for ns in (0..2000).chain((11..63).flat_map(|k| [(1u64 << k) - 1, 1 << k, (1 << k) + 1])) {
            let found = bucket(ns);
            assert!(found >= last && found < BUCKETS, "{ns}");
            last = found;
            assert!((middle(found) - ns as f64).abs() <= ns as f64 / 256.0, "{ns} {}", middle(found));
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn the_histogram_agrees_with_the_exact_percentiles() {
        let mut random = crate::bench::random::Random::new(5, &[]);
        let (mut histogram, mut values) = (Histogram::default(), Vec::new());
        for _ in 0..20_000 {
            let ms = random.exponential(12.0);
            histogram.add(Duration::from_secs_f64(ms / 1e3));
            values.push(ms);
        }
        let (found, exact) = (histogram.summary().unwrap(), Summary::of(values).unwrap());
        let near = |a: f64, b: f64| (a - b).abs() <= b * 0.005;
        assert_eq!(found.count, exact.count);
        assert!(near(found.p50, exact.p50) && near(found.p90, exact.p90) && near(found.p99, exact.p99), "{found:?}");
        assert!(near(found.mean, exact.mean) && near(found.max, exact.max), "{found:?} {exact:?}");
    }
}
