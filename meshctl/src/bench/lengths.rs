//! How many tokens a request has and asks for: `128`, `uniform:16:512`, `normal:128:32`.

use std::fmt;
use std::str::FromStr;

use super::random::Random;

/// Longest length that a flag can ask for: above every context there is, so that sums stay far from overflow.
pub const LENGTH_MAX: u32 = 16 << 20;

/// A distribution of lengths in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Always the same.
    Fixed(u32),
    /// Every length of a range equally often, both ends included.
    Uniform {
        /// Shortest.
        lo: u32,
        /// Longest.
        hi: u32,
    },
    /// Rounded to whole tokens, and clipped to 1 and to what the context leaves.
    Normal {
        /// Mean before clipping.
        mean: f64,
        /// Standard deviation before clipping.
        sd: f64,
    },
}

impl Length {
    /// Draws a length in `1..=max`.
    pub fn draw(self, random: &mut Random, max: u32) -> u32 {
        let drawn = match self {
            Length::Fixed(n) => n,
            Length::Uniform { lo, hi } => lo + random.below(u64::from(hi - lo) + 1) as u32,
            // The cast saturates, so that a wild draw is clipped like any other.
            Length::Normal { mean, sd } => random.normal(mean, sd).round() as u32,
        };
        drawn.clamp(1, max.max(1))
    }

    /// The longest length that is asked for without being clipped on purpose.
    pub fn longest(self) -> u32 {
        match self {
            Length::Fixed(n) => n,
            Length::Uniform { hi, .. } => hi,
            Length::Normal { mean, .. } => mean.ceil() as u32,
        }
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Length::Fixed(n) => write!(f, "{n}"),
            Length::Uniform { lo, hi } => write!(f, "uniform:{lo}:{hi}"),
            Length::Normal { mean, sd } => write!(f, "normal:{mean}:{sd}"),
        }
    }
}

impl FromStr for Length {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = s.split(':').collect();
        match parts.as_slice() {
            [n] | ["fixed", n] => Ok(Length::Fixed(tokens(n)?)),
            ["uniform", lo, hi] => {
                let (lo, hi) = (tokens(lo)?, tokens(hi)?);
                if lo > hi {
                    return Err(format!("`{s}`: the lower end {lo} is above the upper end {hi}"));
                }
                Ok(Length::Uniform { lo, hi })
            }
            ["normal", mean, sd] => {
                let (mean, sd) = (number(mean)?, number(sd)?);
                if mean < 1.0 || mean > f64::from(LENGTH_MAX) {
                    return Err(format!("`{s}`: the mean must be 1 to {LENGTH_MAX} tokens"));
                }
                Ok(Length::Normal { mean, sd })
            }
            _ => Err(format!("`{s}` is not a length: write 128, uniform:16:512 or normal:128:32")),
        }
    }
}

fn tokens(s: &str) -> Result<u32, String> {
    match s.parse() {
        Ok(n) if (1..=LENGTH_MAX).contains(&n) => Ok(n),
        _ => Err(format!("`{s}` is not a number of tokens (1 to {LENGTH_MAX})")),
    }
}

fn number(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err(format!("`{s}` is not a number of 0 or more")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_printed_the_same() {
        for s in ["128", "uniform:16:512", "normal:128:32.5"] {
            assert_eq!(s.parse::<Length>().unwrap().to_string(), s);
        }
        assert_eq!("fixed:9".parse(), Ok(Length::Fixed(9)));
    }

    #[test]
    fn nonsense_is_refused_in_words() {
        for s in ["", "0", "-1", "uniform:5", "uniform:9:3", "uniform:0:3", "normal:0:3", "normal:9:-1", "normal:9:NaN"]
        {
            assert!(s.parse::<Length>().is_err(), "{s}");
        }
        assert!("normal:9".parse::<Length>().unwrap_err().contains("uniform:16:512"));
        assert!("99999999".parse::<Length>().is_err());
    }

    #[test]
    fn draws_stay_within_their_ends_and_reach_them() {
        let mut random = Random::new(3, &[]);
        let uniform = Length::Uniform { lo: 2, hi: 4 };
        let drawn: std::collections::BTreeSet<u32> = (0..200).map(|_| uniform.draw(&mut random, 100)).collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(Length::Fixed(7).draw(&mut random, 100), 7);
    }

    #[test]
    fn a_normal_length_has_its_mean_and_is_clipped_to_the_context() {
        let mut random = Random::new(3, &[]);
        let normal = Length::Normal { mean: 50.0, sd: 5.0 };
        let mean = (0..10_000).map(|_| f64::from(normal.draw(&mut random, 1000))).sum::<f64>() / 10_000.0;
        assert!((mean - 50.0).abs() < 0.3, "{mean}");
        let wild = Length::Normal { mean: 1.0, sd: 1e9 };
        for _ in 0..100 {
            assert!((1..=9).contains(&wild.draw(&mut random, 9)));
        }
    }
}
