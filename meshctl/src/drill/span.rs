//! A number of a plan, or a range from which one is drawn.

use std::fmt;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

use crate::bench::random::Random;

/// `2.5` or `[1, 4]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// The least.
    pub lo: f64,
    /// The most.
    pub hi: f64,
}

impl Span {
    /// A number of seconds in it.
    pub fn draw(self, random: &mut Random) -> Duration {
        // Both ends were checked to be lengths of time.
        Duration::try_from_secs_f64(self.lo + (self.hi - self.lo) * random.unit()).unwrap_or_default()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.lo == self.hi { write!(f, "{}", self.lo) } else { write!(f, "[{}, {}]", self.lo, self.hi) }
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SpanVisitor)
    }
}

struct SpanVisitor;

fn span<E: Error>(lo: f64, hi: f64) -> Result<Span, E> {
    if lo.is_finite() && hi.is_finite() && 0.0 <= lo && lo <= hi {
        Ok(Span { lo, hi })
    } else {
        Err(E::custom(format!("[{lo}, {hi}] is not a range from a number of 0 or more upwards")))
    }
}

impl<'de> Visitor<'de> for SpanVisitor {
    type Value = Span;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number or a range of two, as in [1, 4]")
    }

    fn visit_i64<E: Error>(self, x: i64) -> Result<Span, E> {
        span(x as f64, x as f64)
    }

    fn visit_f64<E: Error>(self, x: f64) -> Result<Span, E> {
        span(x, x)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut ends: A) -> Result<Span, A::Error> {
        let mut next = |at| ends.next_element::<f64>()?.ok_or_else(|| A::Error::invalid_length(at, &self));
        let (lo, hi) = (next(0)?, next(1)?);
        if ends.next_element::<f64>()?.is_some() {
            return Err(A::Error::invalid_length(3, &self));
        }
        span(lo, hi)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Holder {
        span: Span,
    }

    fn parse(value: &str) -> Result<Span, String> {
        let holder: Result<Holder, _> = toml::from_str(&format!("span = {value}"));
        holder.map(|holder| holder.span).map_err(|e| e.to_string())
    }

    #[test]
    fn a_span_is_a_number_or_two() {
        assert_eq!(parse("2"), Ok(Span { lo: 2.0, hi: 2.0 }));
        assert_eq!(parse("0.5"), Ok(Span { lo: 0.5, hi: 0.5 }));
        assert_eq!(parse("[1, 4.5]"), Ok(Span { lo: 1.0, hi: 4.5 }));
        for value in ["-1", "[4, 1]", "[1]", "[1, 2, 3]", "'x'", "nan", "[1, inf]"] {
            assert!(parse(value).is_err(), "{value}");
        }
        assert!(parse("'x'").unwrap_err().contains("[1, 4]"));
    }

    #[test]
    fn drawn_times_lie_within_it() {
        let mut random = Random::new(1, &[]);
        for _ in 0..1000 {
            let drawn = Span { lo: 1.0, hi: 4.0 }.draw(&mut random).as_secs_f64();
            assert!((1.0..=4.0).contains(&drawn), "{drawn}");
        }
        assert_eq!(Span { lo: 2.0, hi: 2.0 }.draw(&mut random), Duration::from_secs(2));
    }
}
