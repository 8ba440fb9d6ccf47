//! Seeded random numbers: the same seed gives the same load, on every machine.

/// SplitMix64: 64 bits of state, every value once a period, good enough for loads and small enough to read.
#[derive(Clone, Debug)]
pub struct Random(u64);

/// The odd constant nearest to 2^64 over the golden ratio.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    /// A generator of its own for each `path` under the seed: what one of them is asked for shifts no other.
    pub fn new(seed: u64, path: &[u64]) -> Self {
        let state = path.iter().fold(mixed(seed.wrapping_add(STEP)), |state, &part| {
            mixed(state ^ mixed(part.wrapping_add(1).wrapping_mul(STEP)))
        });
        Self(state)
    }

    /// Any 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mixed(self.0)
    }

    /// In (0, 1]: its logarithm is finite.
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// In `0..n`; 0 when `n` is. The bias of multiply-and-shift is below 2^-32 for every `n` used here.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// Exponentially distributed around `mean`: the gap between the arrivals of a Poisson process.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * self.unit().ln()
    }

    /// Normally distributed (Box and Muller).
    pub fn normal(&mut self, mean: f64, sd: f64) -> f64 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        mean + sd * radius * (std::f64::consts::TAU * self.unit()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(mut draw: impl FnMut() -> f64) -> (f64, f64) {
        const DRAWS: usize = 100_000;
        let drawn: Vec<f64> = (0..DRAWS).map(|_| draw()).collect();
        let mean = drawn.iter().sum::<f64>() / DRAWS as f64;
        let variance = drawn.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / DRAWS as f64;
        (mean, variance.sqrt())
    }

    #[test]
    fn the_same_seed_and_path_repeat_and_any_other_does_not() {
        let first = |seed, path: &[u64]| Random::new(seed, path).bits();
        assert_eq!(first(1, &[2, 3]), first(1, &[2, 3]));
        let others = [first(1, &[2, 3]), first(2, &[2, 3]), first(1, &[3, 2]), first(1, &[2]), first(1, &[2, 4])];
        for (i, a) in others.iter().enumerate() {
            assert!(others[..i].iter().all(|b| a != b), "{others:?}");
        }
    }

    #[test]
    fn the_distributions_have_their_moments() {
        let mut random = Random::new(7, &[]);
        let (mean, sd) = moments(|| random.exponential(2.0));
        assert!((mean - 2.0).abs() < 0.03 && (sd - 2.0).abs() < 0.05, "exponential {mean} {sd}");
        let (mean, sd) = moments(|| random.normal(10.0, 3.0));
        assert!((mean - 10.0).abs() < 0.05 && (sd - 3.0).abs() < 0.05, "normal {mean} {sd}");
        let (mean, sd) = moments(|| random.below(10) as f64);
        assert!((mean - 4.5).abs() < 0.05 && (sd - 2.872).abs() < 0.05, "uniform {mean} {sd}");
    }

    #[test]
    fn values_stay_in_their_range() {
        let mut random = Random::new(0, &[]);
        for _ in 0..10_000 {
            assert!(random.below(3) < 3);
            assert!(random.unit() > 0.0);
            assert!(random.exponential(1.0).is_finite());
        }
        assert_eq!(random.below(0), 0);
    }
}
