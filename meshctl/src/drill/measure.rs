//! Stalls after events, and throughput before, during and after them. No clock: times are from the load's start.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::load::{Answer, Run};

/// How long after an event a stall may still be its own.
pub const EVENT_WINDOW: Duration = Duration::from_secs(10);
/// Seconds of throughput that are told one by one.
const SECONDS_MAX: usize = 4 * 3600;

/// The longest stall after an event.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stall {
    /// The gap less the stream's usual one.
    pub length: Duration,
    /// The stream that had it.
    pub stream: u32,
    /// The request in which it was.
    pub sent_as: u64,
}

/// A time in which a client waited for a token.
struct Gap {
    from: Duration,
    to: Duration,
    usual: Duration,
    /// Before a first token: counts only for events during it.
    is_first: bool,
}

/// For each of `events` (ascending) the longest stall over all streams: of the gaps between two tokens of one answer that
/// overlap the time from the event to the next one, or to [`EVENT_WINDOW`] after it, each less the median gap of its
/// stream. The wait for a first token counts if the request was in flight at the event, less what it took undisturbed. What
/// a failed request waited for in vain, until it failed, is a gap as well.
/// `None`: nobody waited for a token then.
pub fn stalls(undisturbed: &[Answer], disturbed: &[Answer], events: &[Duration]) -> Vec<Option<Stall>> {
    let windows: Vec<(Duration, Duration)> = events
        .iter()
        .enumerate()
        .map(|(i, event)| {
            (*event, events.get(i + 1).map_or(*event + EVENT_WINDOW, |e| (*event + EVENT_WINDOW).min(*e)))
        })
        .collect();
    let usual = usual_gaps(disturbed);
    let mut found: Vec<Option<Stall>> = vec![None; events.len()];
    for answer in disturbed {
        let stream = answer.trace.stream;
        let usual = usual.get(&stream).copied().unwrap_or_default();
        for gap in gaps(answer, usual, usual_first(undisturbed, answer)) {
            let begin = windows.partition_point(|(_, end)| *end < gap.from);
            let met = windows.iter().enumerate().skip(begin).take_while(|(_, (event, _))| *event <= gap.to);
            for (i, _) in met.filter(|(_, (event, _))| !gap.is_first || gap.from <= *event) {
                let length = gap.to.saturating_sub(gap.from).saturating_sub(gap.usual);
                if found[i].is_none_or(|longest| length > longest.length) {
                    found[i] = Some(Stall { length, stream, sent_as: answer.record.index });
                }
            }
        }
    }
    found
}

fn gaps(answer: &Answer, usual: Duration, usual_first: Duration) -> impl Iterator<Item = Gap> + '_ {
    let arrivals = &answer.trace.arrivals;
    let failed = answer.record.failure.map(|_| answer.record.end);
    let first = answer.record.sent.zip(arrivals.first().copied().or(failed));
    let first = first.map(|(from, to)| Gap { from, to, usual: usual_first, is_first: true });
    let last = arrivals.last().copied().zip(failed);
    let between = arrivals.windows(2).map(|pair| (pair[0], pair[1])).chain(last);
    first.into_iter().chain(between.map(move |(from, to)| Gap { from, to, usual, is_first: false }))
}

/// What the same request waited for its first token when nothing was done to the mesh.
fn usual_first(undisturbed: &[Answer], answer: &Answer) -> Duration {
    let request = answer.record.index % undisturbed.len().max(1) as u64;
    let same = undisturbed.get(request as usize);
    let waited = same.and_then(|same| Some(same.trace.arrivals.first()?.saturating_sub(same.record.sent?)));
    waited.unwrap_or_default()
}

/// The median gap between two tokens, by stream.
fn usual_gaps(answers: &[Answer]) -> BTreeMap<u32, Duration> {
    let mut gaps: BTreeMap<u32, Vec<Duration>> = BTreeMap::new();
    for answer in answers {
        let between = answer.trace.arrivals.windows(2).map(|pair| pair[1].saturating_sub(pair[0]));
        gaps.entry(answer.trace.stream).or_default().extend(between);
    }
    let median = |mut gaps: Vec<Duration>| {
        let middle = gaps.len().checked_sub(1)? / 2;
        Some(*gaps.select_nth_unstable(middle).1)
    };
    gaps.into_iter().filter_map(|(stream, gaps)| Some((stream, median(gaps)?))).collect()
}

/// Output tokens a second. `None` where there was no time to measure in.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Throughput {
    /// In the undisturbed run.
    pub undisturbed: Option<f64>,
    /// From the first token to the first event.
    pub before: Option<f64>,
    /// From the first event to [`EVENT_WINDOW`] after the last, or to the end of the load.
    pub during: Option<f64>,
    /// From there to the end of the load.
    pub after: Option<f64>,
    /// In each second of the disturbed run.
    pub by_second: Vec<u32>,
}

impl Throughput {
    /// Of runs with `events` (ascending), the disturbed one until `end`; `faults` are those of the data plane.
    pub fn of(undisturbed: &Run, disturbed: &[Answer], events: &[Duration], end: Duration, faults: bool) -> Self {
        let mut arrivals: Vec<Duration> = disturbed.iter().flat_map(|a| a.trace.arrivals.iter().copied()).collect();
        arrivals.sort_unstable();
        let begin = arrivals.first().copied().unwrap_or_default();
        let whole = rate(undisturbed.tokens(), undisturbed.elapsed);
        let between = |from: Duration, to: Duration| {
            let count = arrivals.partition_point(|at| *at < to) - arrivals.partition_point(|at| *at < from.min(to));
            rate(count as u64, to.saturating_sub(from))
        };
        let (before, during, after) = match (events.first(), events.last()) {
            (Some(first), Some(last)) => {
                let settled = (*last + EVENT_WINDOW).min(end);
                (between(begin, *first), between(*first, settled), between(settled, end))
            }
            // Faults of the data plane are there from the first token to the last.
            _ if faults => (whole, between(begin, end), None),
            _ => (between(begin, end), None, None),
        };
        let mut by_second = vec![0; (arrivals.last().map_or(0, |at| at.as_secs() as usize + 1)).min(SECONDS_MAX)];
        for at in &arrivals {
            if let Some(count) = by_second.get_mut(at.as_secs() as usize) {
                *count += 1;
            }
        }
        Self { undisturbed: whole, before, during, after, by_second }
    }

    /// What was left of the throughput.
    pub fn share_during(&self) -> Option<f64> {
        self.before.filter(|before| *before > 0.0).zip(self.during).map(|(before, during)| during / before)
    }
}

fn rate(tokens: u64, time: Duration) -> Option<f64> {
    (!time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::Failure;
    use crate::drill::load::tests::answer;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Sent at `sent`, with tokens at `arrivals`.
    fn stream(index: u64, stream: u32, sent: u64, arrivals: &[u64]) -> Answer {
        let mut answer = answer(index, &[]);
        answer.record.sent = Some(ms(sent));
        answer.trace.stream = stream;
        answer.trace.arrivals = arrivals.iter().map(|at| ms(*at)).collect();
        answer
    }

    fn lengths(undisturbed: &[Answer], disturbed: &[Answer], events: &[u64]) -> Vec<Option<u64>> {
        let events: Vec<Duration> = events.iter().map(|at| ms(*at)).collect();
        let found = stalls(undisturbed, disturbed, &events);
        found.iter().map(|stall| stall.map(|stall| stall.length.as_millis() as u64)).collect()
    }

    #[test]
    fn a_stall_is_the_longest_gap_less_the_usual_one() {
        let steady = stream(0, 0, 0, &[10, 20, 30, 40, 50, 60, 70, 80]);
        let held = stream(1, 1, 0, &[10, 20, 30, 40, 540, 550, 560, 570]);
        let found = stalls(&[], &[steady.clone(), held.clone()], &[ms(45)]);
        assert_eq!(found, [Some(Stall { length: ms(490), stream: 1, sent_as: 1 })]);
        assert_eq!(lengths(&[], &[steady], &[45]), [Some(0)], "a usual gap is no stall");
        assert_eq!(lengths(&[], &[held], &[600]), [None], "nobody waited");
    }

    #[test]
    fn a_gap_belongs_to_every_event_that_it_overlaps_and_to_none_after_its_window() {
        let gap = stream(0, 0, 0, &[0, 10, 20, 30, 5030, 5040, 5050]);
        assert_eq!(lengths(&[], std::slice::from_ref(&gap), &[1000, 2000, 5045]), [Some(4990), Some(4990), Some(0)]);
        // The second event ends the first one's time, in which the stream was steady.
        assert_eq!(lengths(&[], std::slice::from_ref(&gap), &[5, 12]), [Some(0), Some(4990)]);
        let late = stream(0, 0, 0, &[0, 10, 20, 30, 40, 11_000, 14_000]);
        assert_eq!(lengths(&[], &[late], &[900]), [Some(10_950)], "the gap after 10.9 s is not the event's");
    }

    #[test]
    fn a_wait_for_the_first_token_counts_if_the_request_was_in_flight() {
        let undisturbed = [stream(0, 0, 0, &[100]), stream(1, 0, 0, &[300])];
        let in_flight = stream(3, 0, 1000, &[2000]);
        assert_eq!(lengths(&undisturbed, std::slice::from_ref(&in_flight), &[1500]), [Some(700)], "as request 1 again");
        assert_eq!(lengths(&undisturbed, &[in_flight], &[900]), [None], "sent after the event");
    }

    #[test]
    fn what_was_waited_for_in_vain_is_a_stall_too() {
        let mut cut = stream(0, 0, 0, &[10, 20, 30]);
        (cut.record.failure, cut.record.end) = (Some(Failure::StreamCut), ms(9030));
        assert_eq!(lengths(&[], &[cut], &[25]), [Some(8990)]);
        let mut nothing = stream(0, 0, 100, &[]);
        (nothing.record.failure, nothing.record.end) = (Some(Failure::StreamCut), ms(600));
        assert_eq!(lengths(&[], std::slice::from_ref(&nothing), &[200]), [Some(500)]);
        assert_eq!(lengths(&[], &[nothing], &[50]), [None], "sent after the event");
    }

    #[test]
    fn usual_is_the_median_of_the_stream_over_its_requests() {
        let answers = [stream(0, 4, 0, &[0, 10, 20]), stream(1, 4, 30, &[40, 50, 950]), stream(2, 5, 0, &[0, 30])];
        assert_eq!(usual_gaps(&answers), BTreeMap::from([(4, ms(10)), (5, ms(30))]));
    }

    #[test]
    fn throughput_is_told_before_during_and_after() {
        let arrivals: Vec<u64> = (0..100).map(|i| i * 100).chain((0..400).map(|i| 20_000 + i * 50)).collect();
        let run = [stream(0, 0, 0, &arrivals)];
        let quiet = Run { answers: vec![stream(0, 0, 0, &arrivals)], elapsed: ms(10_000) };
        let found = Throughput::of(&quiet, &run, &[ms(10_000), ms(15_000)], ms(40_000), false);
        assert_eq!((found.undisturbed, found.before), (Some(50.0), Some(10.0)));
        // Nothing from 10 to 20 s, 20 a second from there to 25 s.
        assert_eq!((found.during, found.after), (Some(100.0 / 15.0), Some(20.0)));
        assert!(found.share_during().is_some_and(|share| (share - 10.0 / 15.0).abs() < 1e-9), "{found:?}");
        assert_eq!(
            (found.by_second.len(), found.by_second[0], found.by_second[15], found.by_second[30]),
            (40, 10, 0, 20)
        );
        let still = Throughput::of(&quiet, &run, &[], ms(40_000), false);
        assert_eq!((still.before, still.during, still.share_during()), (Some(12.5), None, None));
        let faults = Throughput::of(&quiet, &run, &[], ms(40_000), true);
        assert_eq!((faults.before, faults.during), (Some(50.0), Some(12.5)));
        let early = Throughput::of(&quiet, &run, &[ms(0)], ms(40_000), false);
        assert_eq!(early.before, None, "no time before the event");
    }
}
