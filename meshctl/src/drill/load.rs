//! The load of a drill, sent by the load tester's own generator: once undisturbed, then again and again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use mesh_proto::v1::{ModelInfo, Moved};

use super::error::DrillError;
use super::plan::{Amount, DURATION_MAX, LoadPlan};
use crate::bench::args::{Bounds, Load};
use crate::bench::drive::{Limit, Point, Pool};
use crate::bench::record::{Record, Recorder, Trace};
use crate::bench::workload::{Repeating, Workload};
use crate::bench::{BenchError, bar};
use crate::client::Client;
use crate::exit::CliError;

/// Both runs ask the same, so they are one load point.
const POINT: u64 = 0;

/// A request and what came of it.
#[derive(Clone, Debug)]
pub struct Answer {
    /// When, and how it ended.
    pub record: Record,
    /// Its tokens.
    pub trace: Trace,
}

impl Answer {
    /// The tokens of the last attempt.
    pub fn ids(&self) -> &[u32] {
        self.trace.attempts.last().map_or(&[], Vec::as_slice)
    }
}

/// A run: its answers by their numbers, and when its last one ended.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// All of them.
    pub answers: Vec<Answer>,
    /// From the start to the last end.
    pub elapsed: Duration,
}

impl Run {
    fn of(recorder: &Recorder) -> Self {
        let kept = recorder.take();
        let elapsed = kept.records.iter().map(|record| record.end).max().unwrap_or_default();
        let pairs = kept.records.into_iter().zip(kept.traces);
        let mut answers: Vec<Answer> = pairs.map(|(record, trace)| Answer { record, trace }).collect();
        answers.sort_unstable_by_key(|answer| answer.record.index);
        Self { answers, elapsed }
    }

    /// Tokens that came, each counted once.
    pub fn tokens(&self) -> u64 {
        self.answers.iter().map(|answer| answer.trace.arrivals.len() as u64).sum()
    }
}

/// What a mesh serves.
///
/// # Errors
/// [`CliError`], when it cannot be asked or does not serve.
pub async fn model(grpc: &str) -> Result<ModelInfo, CliError> {
    let status = Client::connect(grpc).await?.status().await?;
    status.model.filter(|model| model.vocab > 0).ok_or_else(|| BenchError::NoModel.into())
}

/// What changes of the view had nodes load; `None` when the router cannot be asked any more.
pub async fn moved(grpc: &str) -> Option<Moved> {
    Client::connect(grpc).await.ok()?.status().await.ok()?.moved
}

/// A load that is ready to be sent.
#[derive(Debug)]
pub struct Sender {
    point: Point,
}

impl Sender {
    /// `period` different requests, sent in turns until `limit` or `duration`.
    async fn new(
        load: &LoadPlan,
        model: &ModelInfo,
        grpc: &str,
        how: Load,
        (period, limit, duration): (u64, u64, Duration),
        bar: ProgressBar,
    ) -> Result<Self, CliError> {
        let LoadPlan { streams, input, output, seed, sampled, timeout, retry, .. } = *load;
        let workload = Workload::repeating(Repeating { input, output, sampled, seed, period }, model);
        let workload = workload.map_err(|error| match error {
            BenchError::TooLong { input, output, context } => DrillError::TooLong { input, output, context }.into(),
            other => CliError::from(other),
        })?;
        let pool = Pool::connect(grpc, streams).await?;
        let bounds = Bounds { requests: load.sent_max(), duration, timeout, in_flight: streams };
        let point = Point {
            number: POINT,
            load: how,
            bounds,
            limit: Limit::new(limit),
            retry,
            workload: Arc::new(workload),
            pool,
            recorder: Recorder::tracing(Instant::now(), bar),
            seed,
        };
        Ok(Self { point })
    }

    /// One that sends the requests of an undisturbed run again, until it is told how many are enough: each stream one after
    /// the other, or as a Poisson process at the plan's share of the rate at which they were answered.
    ///
    /// # Errors
    /// [`CliError`], when the mesh cannot be reached.
    pub async fn again(
        load: &LoadPlan,
        undisturbed: &Run,
        model: &ModelInfo,
        grpc: &str,
        bar: ProgressBar,
    ) -> Result<Self, CliError> {
        let requests = undisturbed.answers.len() as u64;
        let rate = requests as f64 / undisturbed.elapsed.as_secs_f64().max(f64::EPSILON);
        let how = load.rate_share.map_or(Load::Closed(load.streams), |share| Load::Open(share * rate));
        Self::new(load, model, grpc, how, (requests, load.sent_max(), DURATION_MAX), bar).await
    }

    /// What times count from.
    pub fn start(&self) -> Instant {
        self.point.recorder.start()
    }

    /// Ends the load once this many requests are sent.
    pub fn limit(&self) -> Limit {
        self.point.limit.clone()
    }

    /// Sends everything.
    ///
    /// # Errors
    /// None of the mesh: failures are in the answers.
    pub async fn run(self) -> Result<Run, CliError> {
        self.point.run(std::future::pending()).await?;
        Ok(Run::of(&self.point.recorder))
    }
}

/// The undisturbed run: what the mesh answers when nothing is done to it.
///
/// # Errors
/// [`DrillError::Undisturbed`] when any request fails, and [`CliError`] when the mesh cannot be reached.
pub async fn undisturbed(load: &LoadPlan, model: &ModelInfo, grpc: &str) -> Result<Run, CliError> {
    let (limit, duration) = match load.amount {
        Amount::PerStream(each) => (each.saturating_mul(load.streams.into()), DURATION_MAX),
        Amount::Within(duration) => (load.sent_max(), duration),
    };
    let bar = bar("undisturbed", limit);
    let how = Load::Closed(load.streams);
    let sender = Sender::new(load, model, grpc, how, (u64::MAX, limit, duration), bar.clone()).await?;
    let run = sender.run().await;
    bar.finish_and_clear();
    let run = run?;
    let failed: Vec<_> = run.answers.iter().filter_map(|a| a.record.failure.map(|f| (f, &a.trace.why))).collect();
    match failed.first() {
        None => Ok(run),
        Some((first, why)) => {
            let (failed, requests) = (failed.len(), run.answers.len());
            Err(DrillError::Undisturbed { failed, requests, first: *first, why: (*why).clone() }.into())
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Complete, sent at 0 and over at 10 s, its tokens without times.
    pub(in crate::drill) fn answer(index: u64, attempts: &[&[u32]]) -> Answer {
        let record = Record {
            index,
            intended: Duration::ZERO,
            sent: Some(Duration::ZERO),
            first: None,
            last: None,
            end: Duration::from_secs(10),
            prompt_tokens: 1,
            tokens: attempts.last().map_or(0, |ids| ids.len() as u32),
            failure: None,
        };
        let attempts = attempts.iter().map(|ids| ids.to_vec()).collect();
        Answer { record, trace: Trace { attempts, ..Trace::default() } }
    }
}
