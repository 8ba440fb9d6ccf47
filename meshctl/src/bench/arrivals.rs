//! When requests are meant to arrive: a Poisson process, drawn from the seed alone.
//!
//! The schedule knows nothing of the mesh: a mesh that slows down does not slow its arrivals, and what a request waits
//! before it is even sent counts as its latency (no coordinated omission).

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::random::Random;

/// The seed's branch for arrival times.
const STREAM: u64 = u64::from_be_bytes(*b"arrivals");
/// Arrivals that the pacer may be ahead of their sending; their intended times are kept, so a full queue hides nothing.
const QUEUE: usize = 1024;

/// Times of arrival after the start, rising without end.
#[derive(Clone, Debug)]
pub struct Poisson {
    random: Random,
    gap_mean_s: f64,
    at_s: f64,
}

impl Poisson {
    /// `rate` arrivals a second; the first after a gap like any other.
    pub fn new(rate: f64, seed: u64) -> Self {
        Self { random: Random::new(seed, &[STREAM, rate.to_bits()]), gap_mean_s: 1.0 / rate, at_s: 0.0 }
    }
}

impl Iterator for Poisson {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.at_s += self.random.exponential(self.gap_mean_s);
        // Ends only beyond the age of the universe.
        Duration::try_from_secs_f64(self.at_s).ok()
    }
}

/// One arrival.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Its number in the schedule.
    pub index: u64,
    /// When it was meant to be.
    pub intended: Instant,
}

/// Hands out arrivals when they are due. Its own thread, because the async timer is a millisecond coarse, which at the
/// latencies of a small model is a share of the result.
#[derive(Debug)]
pub struct Pacer {
    due: mpsc::Receiver<Arrival>,
    /// Dropping it ends the thread at once, wherever it waits.
    _stop: SyncSender<()>,
}

impl Pacer {
    /// Starts to hand out `arrivals`, offsets from `start`.
    ///
    /// # Errors
    /// The machine's, when it has no thread left.
    pub fn start(start: Instant, arrivals: impl Iterator<Item = Duration> + Send + 'static) -> std::io::Result<Self> {
        let (sender, due) = mpsc::channel(QUEUE);
        let (stop, stopped) = sync_channel::<()>(1);
        let pace = move || {
            for (index, offset) in (0u64..).zip(arrivals) {
                let intended = start + offset;
                let wait = intended.saturating_duration_since(Instant::now());
                if !wait.is_zero() && stopped.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                if sender.blocking_send(Arrival { index, intended }).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("pacer".to_owned()).spawn(pace)?;
        Ok(Self { due, _stop: stop })
    }

    /// The next arrival when it is due; `None` after the last.
    pub async fn next(&mut self) -> Option<Arrival> {
        self.due.recv().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_and_the_spread_of_a_poisson_process() {
        const N: usize = 50_000;
        let at: Vec<f64> = Poisson::new(20.0, 1).take(N).map(|d| d.as_secs_f64()).collect();
        let rate = N as f64 / at[N - 1];
        assert!((rate - 20.0).abs() < 0.4, "{rate}");
        let gaps: Vec<f64> = at.windows(2).map(|w| w[1] - w[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let sd = (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        // A regular schedule has 0 here, a memoryless one 1.
        assert!((sd / mean - 1.0).abs() < 0.03, "{}", sd / mean);
        // Counts in windows of a second: mean and variance are both the rate.
        let mut counts = vec![0.0f64; at[N - 1] as usize];
        for t in &at {
            if let Some(count) = counts.get_mut(*t as usize) {
                *count += 1.0;
            }
        }
        let mean = counts.iter().sum::<f64>() / counts.len() as f64;
        let variance = counts.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / counts.len() as f64;
        assert!((variance / mean - 1.0).abs() < 0.1, "{}", variance / mean);
    }

    #[test]
    fn a_seed_repeats_its_schedule() {
        let first = |seed| Poisson::new(3.0, seed).take(50).collect::<Vec<_>>();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    #[tokio::test]
    async fn the_pacer_keeps_to_the_schedule_and_a_late_reader_finds_the_intended_times() {
        let start = Instant::now();
        let offsets = [5, 6, 40].map(Duration::from_millis);
        let mut pacer = Pacer::start(start, offsets.into_iter()).unwrap();
        for (i, offset) in offsets.iter().enumerate() {
            let arrival = pacer.next().await.unwrap();
            assert_eq!((arrival.index, arrival.intended), (i as u64, start + *offset));
            assert!(Instant::now() >= arrival.intended, "handed out before it was due");
        }
        assert!(pacer.next().await.is_none());
    }
}
