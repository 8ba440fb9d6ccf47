//! What is kept of each request: when it was due, sent, answered and over, and how it ended.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use mesh_proto::Code;
use mesh_proto::v1::Token;
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

    /// Whether the mesh could not serve just then, so that the same request may succeed later.
    pub fn is_unavailable(self) -> bool {
        matches!(self, Failure::Connection | Failure::Mesh(Code::NotServing | Code::NodeLost))
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

/// What came of one request, token by token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The closed loop's stream that sent it.
    pub stream: u32,
    /// The ids of each attempt, the last one's last; there is more than one where unavailable answers are asked again.
    pub attempts: Vec<Vec<u32>>,
    /// When the first token of this number came, in whichever attempt: what a client that resumes would have seen.
    pub arrivals: Vec<Duration>,
    /// What the mesh said, if it failed.
    pub why: String,
}

/// Everything kept of a load point.
#[derive(Debug)]
pub struct Kept {
    /// One for each request, in the order of their ends.
    pub records: Vec<Record>,
    /// One beside each record, from a recorder that traces.
    pub traces: Vec<Trace>,
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
    traces: bool,
}

impl Kept {
    fn nothing() -> Self {
        Self { records: Vec::new(), traces: Vec::new(), gaps: Histogram::default(), errors: BTreeMap::new() }
    }
}

impl Recorder {
    /// An empty one; `bar` moves by one for each request that ends.
    pub fn new(start: Instant, bar: ProgressBar) -> Self {
        Self { start, kept: Arc::new(Mutex::new(Kept::nothing())), bar, traces: false }
    }

    /// One that keeps every token and when it came.
    pub fn tracing(start: Instant, bar: ProgressBar) -> Self {
        Self { traces: true, ..Self::new(start, bar) }
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
        let trace = self.traces.then(|| Trace { attempts: vec![Vec::new()], ..Trace::default() });
        let why = "the load test was ended before the request".to_owned();
        OpenRecord { recorder: self.clone(), record, trace, why }
    }

    /// A poisoned lock means that a request's task panicked between two plain stores; what is kept is whole.
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been kept, leaving nothing.
    pub fn take(&self) -> Kept {
        std::mem::replace(&mut *self.lock(), Kept::nothing())
    }
}

/// A request that is not over. Dropped (aborted), it is recorded as unfinished.
#[derive(Debug)]
pub struct OpenRecord {
    recorder: Recorder,
    record: Record,
    trace: Option<Trace>,
    why: String,
}

impl OpenRecord {
    fn now(&self) -> Duration {
        self.recorder.start.elapsed()
    }

    /// It is sent by this stream of a closed loop.
    pub fn on_stream(mut self, stream: u32) -> Self {
        if let Some(trace) = &mut self.trace {
            trace.stream = stream;
        }
        self
    }

    /// It is being sent.
    pub fn sent(&mut self) {
        self.record.sent.get_or_insert(self.recorder.start.elapsed());
    }

    /// It is going to be sent again: what it got so far was for nothing.
    pub fn again(&mut self) {
        self.record.tokens = 0;
        if let Some(trace) = &mut self.trace {
            trace.attempts.push(Vec::new());
        }
    }

    /// The mesh took it.
    pub fn started(&mut self, prompt_tokens: u32) {
        self.record.prompt_tokens = prompt_tokens;
    }

    /// Tokens came together: the first of them after a gap, the others after none.
    pub fn tokens(&mut self, tokens: &[Token]) {
        if tokens.is_empty() {
            return;
        }
        let now = self.now();
        if let Some(trace) = &mut self.trace
            && let Some(ids) = trace.attempts.last_mut()
        {
            ids.extend(tokens.iter().map(|token| token.id));
            trace.arrivals.resize(trace.arrivals.len().max(ids.len()), now);
        }
        let count = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
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
        if let Some(mut trace) = self.trace.take() {
            if self.record.failure.is_some() {
                trace.why.clone_from(&self.why);
            }
            kept.traces.push(trace);
        }
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
        open.tokens(&[]);
        open.tokens(&vec![Token::default(); 2]);
        open.tokens(&vec![Token::default(); 3]);
        assert_eq!(open.received(), 5);
        open.complete();
        let kept = recorder.take();
        assert_eq!(kept.gaps.summary().unwrap().count, 4, "one less than tokens");
        let record = kept.records[0];
        assert!(record.first < record.last && record.tokens == 5);
    }

    #[test]
    fn a_trace_has_every_attempt_and_the_first_coming_of_each_token() {
        let ids = |ids: &[u32]| ids.iter().map(|&id| Token { id, ..Token::default() }).collect::<Vec<_>>();
        let recorder = Recorder::tracing(Instant::now(), ProgressBar::hidden());
        let mut open = recorder.open(0, recorder.start()).on_stream(3);
        open.sent();
        open.tokens(&ids(&[7]));
        open.tokens(&ids(&[8]));
        open.again();
        assert_eq!(open.received(), 0);
        open.tokens(&ids(&[7]));
        open.tokens(&ids(&[8, 9]));
        open.complete();
        recorder.open(1, recorder.start()).fail(Failure::StreamCut, "cut");
        let kept = recorder.take();
        let trace = &kept.traces[0];
        assert_eq!((trace.stream, trace.why.as_str()), (3, ""));
        assert_eq!(trace.attempts, [vec![7, 8], vec![7, 8, 9]]);
        assert_eq!((trace.arrivals.len(), kept.records[0].tokens), (3, 3));
        assert!(trace.arrivals.is_sorted() && trace.arrivals[1] < trace.arrivals[2], "{trace:?}");
        assert_eq!((kept.traces[1].why.as_str(), &kept.traces[1].attempts), ("cut", &vec![vec![]]));
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
