//! What is kept of each request: when it was due, sent, answered and over, and how it ended.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use mesh_proto::Code;
use serde::Serialize;

use super::stats::Histogram;

/// Why a request gave no complete answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The mesh's own error.
    Mesh(Code),
    /// The connection to the front door broke or could not be made.
    Connection,
    /// The stream ended without a Finished message.
    StreamCut,
    /// Another number of tokens came than was asked for, or than the mesh says it made.
    WrongLength,
    /// The load test was ended first.
    Unfinished,
}

impl Failure {
    /// The code that it is counted under.
    pub fn code(self) -> &'static str {
        match self {
            Failure::Mesh(code) => code.name(),
            Failure::Connection => "CONNECTION",
            Failure::StreamCut => "STREAM_CUT",
            Failure::WrongLength => "WRONG_LENGTH",
            Failure::Unfinished => "UNFINISHED",
        }
    }
}

/// One request. Times are from the load point's start.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Its number in the load point.
    pub index: u64,
    /// When it was due.
    pub intended: Duration,
    /// When it was sent; `None` if it never was.
    pub sent: Option<Duration>,
    /// When the first token came.
    pub first: Option<Duration>,
    /// When the last token came.
    pub last: Option<Duration>,
    /// When it was over.
    pub end: Duration,
    /// Tokens of the prompt, as the mesh counts.
    pub prompt_tokens: u32,
    /// Tokens received.
    pub tokens: u32,
    /// `None`: complete.
    pub failure: Option<Failure>,
}

impl Record {
    /// From when it was due to the first token.
    pub fn ttft(&self) -> Option<Duration> {
        self.first.map(|first| first.saturating_sub(self.intended))
    }

    /// The mean time of a token after the first; `None` where there is none after it.
    pub fn tpot(&self) -> Option<Duration> {
        let further = self.tokens.checked_sub(1).filter(|&n| n > 0)?;
        Some(self.last?.saturating_sub(self.first?) / further)
    }

    /// From when it was due to its end.
    pub fn e2e(&self) -> Duration {
        self.end.saturating_sub(self.intended)
    }

    /// How late it was sent.
    pub fn lag(&self) -> Option<Duration> {
        self.sent.map(|sent| sent.saturating_sub(self.intended))
    }
}

/// Errors of one code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Errors {
    /// How many.
    pub count: u64,
    /// What the first one said.
    pub first: String,
}

/// Everything kept of a load point.
#[derive(Debug)]
pub struct Kept {
    /// One for each request, in the order of their ends.
    pub records: Vec<Record>,
    /// Times between the arrivals of one request's tokens.
    pub gaps: Histogram,
    /// Failures by code.
    pub errors: BTreeMap<&'static str, Errors>,
}

/// Where requests put what they measured. One thread runs them all, so its lock is never waited for.
#[derive(Clone, Debug)]
pub struct Recorder {
    start: Instant,
    kept: Arc<Mutex<Kept>>,
    bar: ProgressBar,
}

impl Recorder {
    /// An empty one; `bar` moves by one for each request that ends.
    pub fn new(start: Instant, bar: ProgressBar) -> Self {
        let kept = Kept { records: Vec::new(), gaps: Histogram::default(), errors: BTreeMap::new() };
        Self { start, kept: Arc::new(Mutex::new(kept)), bar }
    }

    /// What times count from.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// A request is due; from now on it ends in exactly one record, whatever becomes of it.
    pub fn open(&self, index: u64, intended: Instant) -> OpenRecord {
        let intended = intended.saturating_duration_since(self.start);
        let record = Record {
            index,
            intended,
            sent: None,
            first: None,
            last: None,
            end: intended,
            prompt_tokens: 0,
            tokens: 0,
            failure: Some(Failure::Unfinished),
        };
        OpenRecord { recorder: self.clone(), record, why: "the load test was ended before the request".to_owned() }
    }

    /// A poisoned lock means that a request's task panicked between two plain stores; what is kept is whole.
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been kept, leaving nothing.
    pub fn take(&self) -> Kept {
        let empty = Kept { records: Vec::new(), gaps: Histogram::default(), errors: BTreeMap::new() };
        std::mem::replace(&mut *self.lock(), empty)
    }
}

/// A request that is not over. Dropped (aborted), it is recorded as unfinished.
#[derive(Debug)]
pub struct OpenRecord {
    recorder: Recorder,
    record: Record,
    why: String,
}

impl OpenRecord {
    fn now(&self) -> Duration {
        self.recorder.start.elapsed()
    }

    /// It is being sent.
    pub fn sent(&mut self) {
        self.record.sent = Some(self.now());
    }

    /// The mesh took it.
    pub fn started(&mut self, prompt_tokens: u32) {
        self.record.prompt_tokens = prompt_tokens;
    }

    /// `count` tokens came together: the first of them after a gap, the others after none.
    pub fn tokens(&mut self, count: u32) {
        if count == 0 {
            return;
        }
        let now = self.now();
        let record = &mut self.record;
        let mut kept = self.recorder.lock();
        match record.last {
            None => record.first = Some(now),
            Some(last) => kept.gaps.add(now.saturating_sub(last)),
        }
        (1..count).for_each(|_| kept.gaps.add(Duration::ZERO));
        record.last = Some(now);
        record.tokens += count;
    }

    /// Tokens received so far.
    pub fn received(&self) -> u32 {
        self.record.tokens
    }

    /// It is over and complete.
    pub fn complete(mut self) {
        self.record.failure = None;
    }

    /// It is over and failed.
    pub fn fail(mut self, failure: Failure, why: impl Into<String>) {
        self.record.failure = Some(failure);
        self.why = why.into();
    }
}

impl Drop for OpenRecord {
    fn drop(&mut self) {
        self.record.end = self.now();
        let mut kept = self.recorder.lock();
        kept.records.push(self.record);
        if let Some(failure) = self.record.failure {
            let errors = kept.errors.entry(failure.code()).or_default();
            errors.count += 1;
            if errors.first.is_empty() {
                errors.first = std::mem::take(&mut self.why);
            }
        }
        drop(kept);
        self.recorder.bar.inc(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorder() -> Recorder {
        Recorder::new(Instant::now(), ProgressBar::hidden())
    }

    #[test]
    fn every_request_ends_in_one_record_also_when_it_is_dropped() {
        let recorder = recorder();
        recorder.open(0, recorder.start()).complete();
        recorder.open(1, recorder.start()).fail(Failure::Mesh(Code::Overloaded), "full");
        recorder.open(2, recorder.start()).fail(Failure::Mesh(Code::Overloaded), "still full");
        drop(recorder.open(3, recorder.start()));
        let kept = recorder.take();
        assert_eq!(kept.records.iter().map(|r| r.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(kept.records[0].failure, None);
        assert_eq!(kept.errors["OVERLOADED"], Errors { count: 2, first: "full".to_owned() });
        assert_eq!(kept.errors["UNFINISHED"].count, 1);
        assert!(recorder.take().records.is_empty());
    }

    #[test]
    fn tokens_that_come_together_are_gaps_of_nothing_between_them() {
        let recorder = recorder();
        let mut open = recorder.open(0, recorder.start());
        open.tokens(0);
        open.tokens(2);
        open.tokens(3);
        assert_eq!(open.received(), 5);
        open.complete();
        let kept = recorder.take();
        assert_eq!(kept.gaps.summary().unwrap().count, 4, "one less than tokens");
        let record = kept.records[0];
        assert!(record.first < record.last && record.tokens == 5);
    }

    #[test]
    fn latencies_count_from_when_the_request_was_due() {
        let ms = Duration::from_millis;
        let record = Record {
            index: 0,
            intended: ms(100),
            sent: Some(ms(150)),
            first: Some(ms(200)),
            last: Some(ms(260)),
            end: ms(270),
            prompt_tokens: 1,
            tokens: 4,
            failure: None,
        };
        assert_eq!((record.ttft(), record.lag()), (Some(ms(100)), Some(ms(50))));
        assert_eq!((record.tpot(), record.e2e()), (Some(ms(20)), ms(170)));
        assert_eq!(Record { tokens: 1, ..record }.tpot(), None, "no token after the first");
        assert_eq!(Record { first: None, tokens: 0, ..record }.ttft(), None);
    }
}
