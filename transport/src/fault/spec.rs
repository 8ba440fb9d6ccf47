//! Which faults are made, and how often: `seed=7,drop=0.001,delay=0.01:2ms-20ms`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::random::Random;

/// The longest delay that may be asked for: beyond it everybody has given up.
pub const DELAY_MAX: Duration = Duration::from_secs(10);

/// What may happen to a frame. One frame suffers one of them at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It vanishes.
    Drop,
    /// It is held for a while, and all behind it on its channel with it.
    Delay,
    /// It goes twice.
    Duplicate,
    /// The next one of its channel overtakes it.
    Reorder,
    /// A bit of its header is flipped behind the CRC's back.
    Corrupt,
    /// It says to be of an older view; like all that follow, under a valid CRC.
    Stale,
    /// It names another lane.
    WrongLane,
    /// It names another layer.
    WrongLayer,
    /// It names another number of pairs, in a header that agrees with its body's length.
    WrongPairs,
    /// It names a number that no frame has.
    WrongSeq,
    /// Its channel is closed, and it is lost.
    Cut,
}

impl Fault {
    /// All of them, in the order in which they are drawn.
    pub const ALL: [Fault; 11] = [
        Fault::Drop,
        Fault::Delay,
        Fault::Duplicate,
        Fault::Reorder,
        Fault::Corrupt,
        Fault::Stale,
        Fault::WrongLane,
        Fault::WrongLayer,
        Fault::WrongPairs,
        Fault::WrongSeq,
        Fault::Cut,
    ];

    /// Its key in a specification.
    pub fn key(self) -> &'static str {
        &self.injected()["injected_".len()..]
    }

    /// Under which name it is counted when it happened.
    pub fn injected(self) -> &'static str {
        match self {
            Fault::Drop => "injected_drop",
            Fault::Delay => "injected_delay",
            Fault::Duplicate => "injected_duplicate",
            Fault::Reorder => "injected_reorder",
            Fault::Corrupt => "injected_corrupt",
            Fault::Stale => "injected_stale",
            Fault::WrongLane => "injected_wrong_lane",
            Fault::WrongLayer => "injected_wrong_layer",
            Fault::WrongPairs => "injected_wrong_pairs",
            Fault::WrongSeq => "injected_wrong_seq",
            Fault::Cut => "injected_cut",
        }
    }

    /// Under which name it is counted when it was drawn and could not be made: no body in the window, too many frames
    /// held, nobody to overtake, a frame without what is to be wrong about it.
    pub fn skipped(self) -> &'static str {
        match self {
            Fault::Drop => "skipped_drop",
            Fault::Delay => "skipped_delay",
            Fault::Duplicate => "skipped_duplicate",
            Fault::Reorder => "skipped_reorder",
            Fault::Corrupt => "skipped_corrupt",
            Fault::Stale => "skipped_stale",
            Fault::WrongLane => "skipped_wrong_lane",
            Fault::WrongLayer => "skipped_wrong_layer",
            Fault::WrongPairs => "skipped_wrong_pairs",
            Fault::WrongSeq => "skipped_wrong_seq",
            Fault::Cut => "skipped_cut",
        }
    }
}

/// Which faults are made, how often, and from which seed. The default makes none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FaultSpec {
    /// What all draws come from: the same seed makes the same faults of the same frames.
    pub seed: u64,
    /// The probability of each fault for each frame, by its place in [`Fault::ALL`].
    rates: [f64; Fault::ALL.len()],
    /// The shortest and the longest delay.
    delay: (Duration, Duration),
}

/// Why a text is no specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultSpecError {
    /// Not of the form `key=value`.
    #[error("{part:?} is no key=value; write e.g. seed=7,drop=0.001,delay=0.01:2ms-20ms")]
    NoPair {
        /// The part.
        part: String,
    },
    /// A key that does not exist.
    #[error("{key:?} is no fault; the keys are seed, {}", keys())]
    UnknownKey {
        /// The key.
        key: String,
    },
    /// A key given twice.
    #[error("{key} is given twice; leave one out")]
    Twice {
        /// The key.
        key: String,
    },
    /// A seed that is no number.
    #[error("seed is {value:?}; give a whole number below 2^64")]
    BadSeed {
        /// The value.
        value: String,
    },
    /// A probability that is none.
    #[error("{key} is {value:?}; give a probability from 0 to 1")]
    BadProbability {
        /// The key.
        key: String,
        /// The value.
        value: String,
    },
    /// A delay without its times, or with times that make no sense.
    #[error("{key} is {value:?}; give a probability and two times in order, at most {DELAY_MAX:?}, as 0.01:2ms-20ms")]
    BadDelay {
        /// The key.
        key: String,
        /// The value.
        value: String,
    },
    /// Probabilities that cannot be had together.
    #[error("the probabilities add up to {sum}; a frame suffers one fault at most, so give at most 1 together")]
    TooMuch {
        /// Their sum.
        sum: String,
    },
}

fn keys() -> String {
    Fault::ALL.map(Fault::key).join(", ")
}

impl FaultSpec {
    /// Whether no fault is ever made.
    pub fn is_none(&self) -> bool {
        self.rates.iter().all(|rate| *rate == 0.0)
    }

    /// What happens to the next frame.
    pub(super) fn draw(&self, random: &mut Random) -> Option<Fault> {
        let mut left = random.unit();
        for (fault, rate) in Fault::ALL.into_iter().zip(self.rates) {
            if left < rate {
                return Some(fault);
            }
            left -= rate;
        }
        None
    }

    /// For how long a frame is held.
    pub(super) fn draw_delay(&self, random: &mut Random) -> Duration {
        let (shortest, longest) = self.delay;
        shortest + (longest - shortest).mul_f64(random.unit())
    }
}

impl FromStr for FaultSpec {
    type Err = FaultSpecError;

    fn from_str(text: &str) -> Result<Self, FaultSpecError> {
        let mut spec = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| FaultSpecError::NoPair { part: part.to_owned() })?;
            if seen.contains(&key) {
                return Err(FaultSpecError::Twice { key: key.to_owned() });
            }
            seen.push(key);
            if key == "seed" {
                spec.seed = value.parse().map_err(|_| FaultSpecError::BadSeed { value: value.to_owned() })?;
                continue;
            }
            let place = Fault::ALL.iter().position(|fault| fault.key() == key);
            let place = place.ok_or_else(|| FaultSpecError::UnknownKey { key: key.to_owned() })?;
            let rate = if Fault::ALL[place] == Fault::Delay {
                let bad = || FaultSpecError::BadDelay { key: key.to_owned(), value: value.to_owned() };
                let (rate, times) = value.split_once(':').ok_or_else(bad)?;
                spec.delay = span(times).ok_or_else(bad)?;
                rate
            } else {
                value
            };
            spec.rates[place] = probability(rate)
                .ok_or_else(|| FaultSpecError::BadProbability { key: key.to_owned(), value: value.to_owned() })?;
        }
        let sum: f64 = spec.rates.iter().sum();
        if sum > 1.0 { Err(FaultSpecError::TooMuch { sum: sum.to_string() }) } else { Ok(spec) }
    }
}

impl fmt::Display for FaultSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed={}", self.seed)?;
        for (fault, rate) in Fault::ALL.into_iter().zip(self.rates).filter(|(_, rate)| *rate > 0.0) {
            write!(f, ",{}={rate}", fault.key())?;
            if fault == Fault::Delay {
                write!(f, ":{}us-{}us", self.delay.0.as_micros(), self.delay.1.as_micros())?;
            }
        }
        Ok(())
    }
}

fn probability(text: &str) -> Option<f64> {
    text.parse().ok().filter(|rate| (0.0..=1.0).contains(rate))
}

/// `2ms-20ms`.
fn span(text: &str) -> Option<(Duration, Duration)> {
    let (shortest, longest) = text.split_once('-')?;
    let (shortest, longest) = (time(shortest)?, time(longest)?);
    (shortest <= longest && longest <= DELAY_MAX).then_some((shortest, longest))
}

fn time(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    match unit {
        "us" => Some(Duration::from_micros(number)),
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_specification_is_read_and_written() {
        let text = "seed=7,drop=0.001,delay=0.01:2ms-20ms,duplicate=0.001,reorder=0.002,corrupt=0.0005,stale=0.001,\
                    wrong_lane=0.1,wrong_layer=0.1,wrong_pairs=0.1,wrong_seq=0.1,cut=0.0001";
        let spec: FaultSpec = text.parse().unwrap();
        assert_eq!((spec.seed, spec.delay), (7, (Duration::from_millis(2), Duration::from_millis(20))));
        assert_eq!(spec.rates, [0.001, 0.01, 0.001, 0.002, 0.0005, 0.001, 0.1, 0.1, 0.1, 0.1, 0.0001]);
        assert_eq!(spec.to_string().parse::<FaultSpec>().unwrap(), spec);
        assert!(!spec.is_none());
        assert!("".parse::<FaultSpec>().unwrap().is_none() && "seed=3, ".parse::<FaultSpec>().unwrap().is_none());
    }

    #[test]
    fn every_mistake_names_its_key() {
        for (text, named) in [
            ("drop", "\"drop\" is no key=value"),
            ("drops=0.1", "\"drops\" is no fault; the keys are seed, drop, delay"),
            ("drop=0.1,drop=0.1", "drop is given twice"),
            ("seed=-1", "seed is \"-1\""),
            ("cut=1.5", "cut is \"1.5\""),
            ("cut=NaN", "cut is \"NaN\""),
            ("stale=", "stale is \"\""),
            ("delay=0.1", "delay is \"0.1\""),
            ("delay=2:1ms-2ms", "delay is \"2:1ms-2ms\""),
            ("delay=0.1:2ms-1ms", "delay is \"0.1:2ms-1ms\""),
            ("delay=0.1:1ms-11s", "delay is \"0.1:1ms-11s\""),
            ("delay=0.1:1-2", "delay is \"0.1:1-2\""),
            ("drop=0.6,cut=0.6", "add up to 1.2"),
        ] {
            let error = text.parse::<FaultSpec>().unwrap_err();
            assert!(error.to_string().contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn each_fault_is_drawn_as_often_as_said() {
        let spec: FaultSpec = "drop=0.1,corrupt=0.2,cut=0.3".parse().unwrap();
        let mut random = Random::numbered(1, 0);
        let drawn: Vec<_> = (0..10_000).map(|_| spec.draw(&mut random)).collect();
        let share = |fault| drawn.iter().filter(|drawn| **drawn == fault).count();
        for (fault, wanted) in
            [(Some(Fault::Drop), 1000), (Some(Fault::Corrupt), 2000), (Some(Fault::Cut), 3000), (None, 4000)]
        {
            assert!(share(fault).abs_diff(wanted) < 200, "{fault:?}: {}", share(fault));
        }
        let delays: FaultSpec = "delay=1:2ms-20ms".parse().unwrap();
        let drawn = (0..1000).map(|_| delays.draw_delay(&mut random));
        assert!(drawn.into_iter().all(|d| d >= Duration::from_millis(2) && d <= Duration::from_millis(20)));
    }
}
