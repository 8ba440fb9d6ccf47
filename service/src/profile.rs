//! Where an engine thread's time goes: a stopwatch that laps, always running, read by heartbeats.
//!
//! A stretch of work begins with [`Profile::start`]. Each [`Profile::lap`] gives the time since the last one to a part, and
//! [`Profile::stop`] gives the rest to one, so the parts of a stretch add up to the whole of it; outside of stretches the
//! thread is idle. A lap reads the clock once and writes to memory that no other thread writes: tens of nanoseconds.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use mesh_proto::v1;

/// The parts that an engine's work is divided into.
pub trait Part: Copy + 'static {
    /// Their names in reports, by [`Part::index`].
    const NAMES: &'static [&'static str];

    /// Its place in [`Part::NAMES`].
    fn index(self) -> usize;
}

/// What the matrix products of a part amount to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Floating-point operations: two for each multiplication and addition.
    pub flops: u64,
    /// Bytes of packed weights gone through.
    pub weight_bytes: u64,
}

#[derive(Debug, Default)]
struct Counts {
    ns: AtomicU64,
    flops: AtomicU64,
    weight_bytes: AtomicU64,
}

/// An engine's stopwatch. One thread laps, any may read.
#[derive(Debug)]
pub struct Profile<P> {
    made: Instant,
    /// When the present stretch began and when its last lap ended, nanoseconds since `made`.
    start_ns: AtomicU64,
    lap_ns: AtomicU64,
    busy_ns: AtomicU64,
    parts: Vec<Counts>,
    of: PhantomData<P>,
}

impl<P: Part> Default for Profile<P> {
    fn default() -> Self {
        Self {
            made: Instant::now(),
            start_ns: AtomicU64::new(0),
            lap_ns: AtomicU64::new(0),
            busy_ns: AtomicU64::new(0),
            parts: P::NAMES.iter().map(|_| Counts::default()).collect(),
            of: PhantomData,
        }
    }
}

impl<P: Part> Profile<P> {
    /// Begins a stretch of work.
    pub fn start(&self) {
        self.start_at(self.now());
    }

    /// The time since the last lap, or since the stretch began, was this part's.
    pub fn lap(&self, part: P) {
        self.lap_at(part, self.now());
    }

    /// The same, and the part did so much in it.
    pub fn lap_with(&self, part: P, work: Work) {
        self.lap(part);
        let counts = &self.parts[part.index()];
        add(&counts.flops, work.flops);
        add(&counts.weight_bytes, work.weight_bytes);
    }

    /// Ends the stretch; the time since the last lap was this part's.
    pub fn stop(&self, part: P) {
        self.stop_at(part, self.now());
    }

    fn now(&self) -> u64 {
        self.made.elapsed().as_nanos() as u64
    }

    fn start_at(&self, now: u64) {
        self.start_ns.store(now, Relaxed);
        self.lap_ns.store(now, Relaxed);
    }

    fn lap_at(&self, part: P, now: u64) {
        let since = self.lap_ns.load(Relaxed);
        self.lap_ns.store(now, Relaxed);
        add(&self.parts[part.index()].ns, now.saturating_sub(since));
    }

    fn stop_at(&self, part: P, now: u64) {
        self.lap_at(part, now);
        add(&self.busy_ns, now.saturating_sub(self.start_ns.load(Relaxed)));
    }

    /// Puts all of it into a node's account. A stretch that goes on is in the parts already and not yet in `busy_ns`.
    pub fn report(&self, load: &mut v1::NodeLoad) {
        load.uptime_ns = self.now();
        load.busy_ns = self.busy_ns.load(Relaxed);
        let parts = P::NAMES.iter().zip(&self.parts).map(|(name, counts)| v1::PartLoad {
            part: (*name).to_owned(),
            ns: counts.ns.load(Relaxed),
            flops: counts.flops.load(Relaxed),
            weight_bytes: counts.weight_bytes.load(Relaxed),
        });
        load.parts = parts.collect();
    }
}

/// Adds where one thread alone writes: no locked instruction is needed.
fn add(to: &AtomicU64, amount: u64) {
    to.store(to.load(Relaxed).wrapping_add(amount), Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Tea {
        Boil,
        Brew,
        Pour,
    }

    impl Part for Tea {
        const NAMES: &'static [&'static str] = &["boil", "brew", "pour"];

        fn index(self) -> usize {
            self as usize
        }
    }

    fn read(profile: &Profile<Tea>) -> (u64, [u64; 3]) {
        let mut load = v1::NodeLoad::default();
        profile.report(&mut load);
        assert_eq!(load.parts.iter().map(|p| p.part.as_str()).collect::<Vec<_>>(), Tea::NAMES);
        (load.busy_ns, [0, 1, 2].map(|i| load.parts[i].ns))
    }

    #[test]
    fn laps_add_up_to_the_stretches_and_time_between_stretches_is_nobodys() {
        let profile = Profile::default();
        profile.start_at(100);
        profile.lap_at(Tea::Boil, 130);
        profile.lap_at(Tea::Brew, 131);
        profile.lap_at(Tea::Boil, 141);
        assert_eq!(read(&profile), (0, [40, 1, 0]), "parts count at once, the whole when it is over");
        profile.stop_at(Tea::Pour, 145);
        assert_eq!(read(&profile), (45, [40, 1, 4]));
        profile.start_at(1_000);
        profile.stop_at(Tea::Brew, 1_007);
        assert_eq!(read(&profile), (52, [40, 8, 4]));
    }

    #[test]
    fn the_clock_is_the_real_one_and_work_is_counted_with_its_part() {
        let profile = Profile::default();
        let before = Instant::now();
        profile.start();
        std::thread::sleep(std::time::Duration::from_millis(3));
        profile.lap(Tea::Boil);
        profile.lap_with(Tea::Brew, Work { flops: 6, weight_bytes: 2 });
        profile.lap_with(Tea::Brew, Work { flops: 1, weight_bytes: 0 });
        profile.stop(Tea::Pour);
        let whole = before.elapsed().as_nanos() as u64;
        let mut load = v1::NodeLoad::default();
        profile.report(&mut load);
        let sum: u64 = load.parts.iter().map(|p| p.ns).sum();
        assert!(load.parts[0].ns >= 3_000_000 && sum == load.busy_ns && sum <= whole, "{load:?} in {whole}");
        assert!(load.uptime_ns >= load.busy_ns);
        assert_eq!((load.parts[1].flops, load.parts[1].weight_bytes, load.parts[0].flops), (7, 2, 0));
    }
}
