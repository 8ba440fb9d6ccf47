//! Memory and handles of each process while a drill goes on, by the kernel's own accounting: whether they stay flat.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// How often the processes are looked at.
pub const EVERY: Duration = Duration::from_secs(1);
/// Parts of the time after settling; the first is compared with each of the others.
const PARTS: u32 = 4;
/// Samples that a part has at least: fewer say nothing of a median.
const PART_MIN: usize = 5;

/// What a process had at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When, from the load's start.
    pub at: Duration,
    /// Resident memory, bytes.
    pub resident: u64,
    /// Those of it that are pages of files and of shared memory: programs, mapped weights, frames between processes.
    pub mapped: u64,
    /// Bytes that its work put into its memory: experts, which come and go with views, and KV pages, of which the most were
    /// written when the most sequences met.
    pub work: u64,
    /// Open files, sockets included.
    pub handles: u64,
}

/// A process and its samples, in order of time.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    /// The node's name.
    pub who: String,
    /// Its process; a node that is started again has another.
    pub pid: u32,
    /// One a second.
    pub samples: Vec<Sample>,
}

/// Looks at processes.
#[derive(Debug, Default)]
pub struct Watch {
    processes: BTreeMap<u32, Watched>,
    next: Duration,
}

impl Watch {
    /// Whether it is time for samples.
    pub fn is_due(&self, at: Duration) -> bool {
        at >= self.next
    }

    /// Takes a sample of each process: name, pid, and bytes that its work put into its memory.
    pub fn look<'a>(&mut self, at: Duration, processes: impl Iterator<Item = (&'a str, u32, u64)>) {
        self.next = at + EVERY;
        for (who, pid, work) in processes {
            // One that has just ended has nothing left to be read.
            let Some((resident, mapped, handles)) = usage(pid) else { continue };
            let watched = self.processes.entry(pid);
            let watched = watched.or_insert_with(|| Watched { who: who.to_owned(), pid, samples: Vec::new() });
            watched.samples.push(Sample { at, resident, mapped, work, handles });
        }
    }

    /// All that was seen, by pid.
    pub fn end(self) -> Vec<Watched> {
        self.processes.into_values().collect()
    }
}

/// Resident bytes, those of them that are mapped, and open files; `None` where there is no such process, or no /proc.
fn usage(pid: u32) -> Option<(u64, u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let handles = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    let mapped = bytes(&status, "RssFile:")?.checked_add(bytes(&status, "RssShmem:")?)?;
    Some((bytes(&status, "VmRSS:")?, mapped, handles as u64))
}

/// A size of /proc/PID/status, in bytes.
fn bytes(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What a process had when it had settled, in the end, and at the most: medians over the first quarter of the time between, the last,
/// and whichever later one had the most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Usage {
    /// The node's name.
    pub who: String,
    /// Its process.
    pub pid: u32,
    /// How long it was watched.
    pub watched_s: f64,
    /// Resident memory when it had settled, bytes.
    pub resident_settled: u64,
    /// In the end.
    pub resident_end: u64,
    /// Bytes of experts and KV pages in its memory when it had settled.
    pub work_settled: u64,
    /// In the end.
    pub work_end: u64,
    /// Resident memory beside those when it had settled, bytes: a median of its own, since experts come and go between samples.
    pub own_settled: i64,
    /// In the end.
    pub own_end: i64,
    /// At the most.
    pub own_most: i64,
    /// Open files when it had settled.
    pub handles_settled: u64,
    /// In the end.
    pub handles_end: u64,
    /// At the most.
    pub handles_most: u64,
    /// All that was seen of it, for who asks when it grew, and in what.
    pub samples: Columns,
}

/// Samples of one process as columns of equal length, in order of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Columns {
    /// [`Sample::at`], seconds.
    pub at_s: Vec<f64>,
    /// [`Sample::resident`].
    pub resident: Vec<u64>,
    /// [`Sample::mapped`].
    pub mapped: Vec<u64>,
    /// [`Sample::work`].
    pub work: Vec<u64>,
    /// [`Sample::handles`].
    pub handles: Vec<u64>,
}

impl Columns {
    fn of(samples: &[Sample]) -> Self {
        Self {
            // A thousandth of a second is more than enough of what is looked at once a second.
            at_s: samples.iter().map(|s| (s.at.as_secs_f64() * 1e3).round() / 1e3).collect(),
            resident: samples.iter().map(|s| s.resident).collect(),
            mapped: samples.iter().map(|s| s.mapped).collect(),
            work: samples.iter().map(|s| s.work).collect(),
            handles: samples.iter().map(|s| s.handles).collect(),
        }
    }
}

impl Sample {
    /// Resident memory beside experts and KV pages, bytes; below 0 where an expert was told of before it was read.
    fn own(&self) -> i64 {
        i64::try_from(self.resident).unwrap_or(i64::MAX).saturating_sub_unsigned(self.work)
    }
}

impl Usage {
    /// What memory grew by at the most, beside the experts that views gave or took and the KV pages that were first written, as a
    /// share of all that it was; below 0 if it shrank.
    pub fn growth(&self) -> f64 {
        (self.own_most - self.own_settled) as f64 / self.resident_settled.max(1) as f64
    }

    /// How many more files were open at the most.
    pub fn handles_growth(&self) -> f64 {
        self.handles_most as f64 - self.handles_settled as f64
    }
}

/// How it was with every process that was watched for long enough after `settle` from its first sample.
pub fn usages(watched: &[Watched], settle: Duration) -> Vec<Usage> {
    watched.iter().filter_map(|process| usage_of(process, settle)).collect()
}

fn usage_of(process: &Watched, settle: Duration) -> Option<Usage> {
    let (first, last) = (process.samples.first()?.at, process.samples.last()?.at);
    let part = last.checked_sub(first + settle)? / PARTS;
    let within = |from: Duration, to: Duration| -> Vec<&Sample> {
        process.samples.iter().filter(|s| (from..=to).contains(&s.at)).collect()
    };
    let begin = |of: u32| first + settle + part * of;
    let settled = Medians::of(&within(begin(0), begin(1)))?;
    let later: Option<Vec<Medians>> = (1..PARTS).map(|of| Medians::of(&within(begin(of), begin(of + 1)))).collect();
    let later = later?;
    let end = later.last()?;
    let watched_s = (last - first).as_secs_f64();
    let (who, pid) = (process.who.clone(), process.pid);
    Some(Usage {
        who,
        pid,
        watched_s,
        resident_settled: settled.resident,
        resident_end: end.resident,
        work_settled: settled.work,
        work_end: end.work,
        own_settled: settled.own,
        own_end: end.own,
        own_most: later.iter().map(|part| part.own).max()?,
        handles_settled: settled.handles,
        handles_end: end.handles,
        handles_most: later.iter().map(|part| part.handles).max()?,
        samples: Columns::of(&process.samples),
    })
}

/// Medians of some samples, each of its own.
struct Medians {
    resident: u64,
    work: u64,
    own: i64,
    handles: u64,
}

impl Medians {
    /// `None` of fewer than [`PART_MIN`].
    fn of(samples: &[&Sample]) -> Option<Self> {
        Some(Self {
            resident: median(samples, |s| s.resident)?,
            work: median(samples, |s| s.work)?,
            own: median(samples, |s| s.own())?,
            handles: median(samples, |s| s.handles)?,
        })
    }
}

fn median<T: Ord + Copy>(samples: &[&Sample], of: impl Fn(&Sample) -> T) -> Option<T> {
    let mut values: Vec<T> = samples.iter().map(|sample| of(sample)).collect();
    let middle = values.len() / 2;
    (values.len() >= PART_MIN).then(|| *values.select_nth_unstable(middle).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(seconds: u64, resident: impl Fn(u64) -> u64, handles: impl Fn(u64) -> u64) -> Watched {
        let sample =
            |s| Sample { at: Duration::from_secs(s), resident: resident(s), mapped: 0, work: 0, handles: handles(s) };
        Watched { who: "router".to_owned(), pid: 7, samples: (10..=10 + seconds).map(sample).collect() }
    }

    #[test]
    fn what_grows_while_a_process_settles_does_not_count() {
        let flat = process(100, |s| if s < 30 { s } else { 1000 }, |_| 9);
        let found = usages(&[flat], Duration::from_secs(20));
        assert_eq!((found[0].growth(), found[0].handles_settled, found[0].handles_end), (0.0, 9, 9));
        assert_eq!((found[0].who.as_str(), found[0].watched_s), ("router", 100.0));
        let all = &found[0].samples;
        assert_eq!((all.at_s.len(), all.at_s[1], all.resident[1], all.resident[100]), (101, 11.0, 11, 1000));
    }

    #[test]
    fn what_grows_later_is_told_and_a_moment_s_peak_is_not() {
        let leak = process(100, |s| 1000 + 10 * s, |s| s / 10);
        let found = usages(&[leak], Duration::from_secs(20));
        // From 30 to 50 s, and from 90 to 110.
        assert_eq!((found[0].resident_settled, found[0].resident_end), (1400, 2000));
        assert_eq!((found[0].handles_settled, found[0].handles_end, found[0].handles_growth()), (4, 10, 6.0));
        let hill = process(100, |s| if (50..=70).contains(&s) { 1500 } else { 1000 }, |s| u64::from(s / 20 == 3));
        let found = usages(&[hill], Duration::from_secs(20));
        assert_eq!((found[0].growth(), found[0].handles_growth()), (0.5, 1.0), "what is gone in the end counts too");
        let peak = process(100, |s| if s % 20 == 0 { 9000 } else { 1000 }, |_| 1);
        assert_eq!(usages(&[peak], Duration::from_secs(20))[0].growth(), 0.0);
    }

    #[test]
    fn experts_that_the_view_gives_are_no_growth() {
        let mut given = process(100, |s| 1000 + if s < 60 { 0 } else { 300 }, |_| 1);
        given.samples.iter_mut().for_each(|s| s.work = if s.at.as_secs() < 60 { 400 } else { 700 });
        let found = usages(&[given], Duration::from_secs(20));
        assert_eq!((found[0].resident_end, found[0].work_end, found[0].growth()), (1300, 700, 0.0));
    }

    #[test]
    fn experts_that_come_and_go_between_samples_are_no_growth() {
        // More often there in the end than in the beginning.
        let has = |s: u64| if s < 60 { s.is_multiple_of(3) } else { !s.is_multiple_of(3) };
        let mut process = process(100, |s| 1000 + if has(s) { 300 } else { 0 }, |_| 1);
        process.samples.iter_mut().for_each(|s| s.work = if has(s.at.as_secs()) { 300 } else { 0 });
        let found = usages(&[process], Duration::from_secs(20));
        assert_eq!((found[0].resident_settled, found[0].resident_end, found[0].growth()), (1000, 1300, 0.0));
    }

    #[test]
    fn a_process_that_did_not_live_long_is_not_judged() {
        assert!(usages(&[process(25, |_| 1, |_| 1)], Duration::from_secs(20)).is_empty());
        assert!(usages(&[process(5, |_| 1, |_| 1)], Duration::from_secs(20)).is_empty());
        assert!(usages(&[Watched::default()], Duration::ZERO).is_empty());
    }

    #[test]
    fn this_process_has_memory_and_handles() {
        let pid = std::process::id();
        let mut watch = Watch::default();
        for at in [0, 500, 1000].map(Duration::from_millis).into_iter() {
            if watch.is_due(at) {
                watch.look(at, [("self", pid, 0), ("nobody", u32::MAX, 0)].into_iter());
            }
        }
        let seen = watch.end();
        assert_eq!((seen.len(), seen[0].samples.len()), (1, 2), "once a second");
        assert!(seen[0].samples.iter().all(|s| s.resident > 1 << 20 && s.handles >= 3), "{seen:?}");
        // Its program is mapped, its heap is not.
        assert!(seen[0].samples.iter().all(|s| s.mapped > 1 << 16 && s.mapped < s.resident), "{seen:?}");
        assert_eq!(bytes("VmPeak:\t 9 kB\nVmRSS:\t     12 kB\n", "VmRSS:"), Some(12 * 1024));
        assert_eq!(bytes("VmRSS:\t 12 MB\n", "VmRSS:"), None);
    }
}
