//! Sends the requests of one load point, in a closed or an open loop, and ends within its bounds.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_proto::v1::generate_response::Event;
use mesh_proto::{Code, MeshError};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout_at};

use super::args::{Bounds, Load};
use super::arrivals::{Pacer, Poisson};
use super::record::{Failure, OpenRecord, Recorder};
use super::workload::Workload;
use crate::client::Client;
use crate::exit::CliError;

/// Streams of one HTTP/2 connection: half of what servers of this kind allow, so that none queues in the client.
const STREAMS_PER_CONNECTION: u32 = 100;
/// How long a closed loop's stream waits after a failure, and a retry before it: a mesh that refuses at once must not be hammered.
const FAILURE_PAUSE: Duration = Duration::from_millis(50);

/// Why a load point ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EndedBy {
    /// All requests were sent.
    Requests,
    /// The time in which they are sent is over.
    Duration,
    /// Ctrl-C.
    Interrupt,
}

/// Connections to the mesh's front door; each request takes the first one with room.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Mutex<Vec<(Client, u32)>>>);

impl Pool {
    /// Connects as often as `in_flight` requests need.
    ///
    /// # Errors
    /// [`CliError::BadAddress`] and [`CliError::NoMesh`].
    pub async fn connect(addr: &str, in_flight: u32) -> Result<Self, CliError> {
        let mut clients = Vec::new();
        for _ in 0..in_flight.div_ceil(STREAMS_PER_CONNECTION).max(1) {
            clients.push((Client::connect(addr).await?, 0));
        }
        Ok(Self(Arc::new(Mutex::new(clients))))
    }

    fn lend(&self) -> Option<Lent> {
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = clients.iter().position(|(_, streams)| *streams < STREAMS_PER_CONNECTION).unwrap_or(0);
        let (client, streams) = clients.get_mut(free)?;
        *streams += 1;
        Some(Lent { pool: self.clone(), index: free, client: client.clone() })
    }
}

/// A stream's place on a connection.
struct Lent {
    pool: Pool,
    index: usize,
    client: Client,
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut clients = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, streams)) = clients.get_mut(self.index) {
            *streams -= 1;
        }
    }
}

/// How many requests are issued; may be lowered while that goes on, which then ends it.
#[derive(Clone, Debug)]
pub struct Limit(Arc<AtomicU64>);

impl Limit {
    /// This many.
    pub fn new(requests: u64) -> Self {
        Self(Arc::new(AtomicU64::new(requests)))
    }

    /// From now on this many; what is in flight goes on to its end.
    pub fn lower(&self, requests: u64) {
        self.0.fetch_min(requests, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One load point to run.
#[derive(Clone, Debug)]
pub struct Point {
    /// Its number in the sweep: part of what prompts are drawn from.
    pub number: u64,
    /// How requests are issued.
    pub load: Load,
    /// Where it ends.
    pub bounds: Bounds,
    /// Where it ends earlier.
    pub limit: Limit,
    /// Whether what was unavailable is asked for again, until its timeout.
    pub retry: bool,
    /// What is asked.
    pub workload: Arc<Workload>,
    /// Whom.
    pub pool: Pool,
    /// Where results go.
    pub recorder: Recorder,
    /// Makes the arrivals repeatable.
    pub seed: u64,
}

impl Point {
    /// Runs it until its bounds or `stop`. Every request that was due has its record when this returns.
    ///
    /// # Errors
    /// [`CliError::Os`] when there is no thread for the arrivals.
    pub async fn run(&self, stop: impl Future<Output = ()>) -> Result<EndedBy, CliError> {
        let mut tasks = JoinSet::new();
        let issued = Arc::new(AtomicU64::new(0));
        let ended = tokio::select! {
            done = self.issue(&mut tasks, &issued) => done,
            () = stop => Ok(EndedBy::Interrupt),
        };
        // What was aborted is recorded as unfinished when its task is dropped, which joining waits for.
        tasks.shutdown().await;
        ended
    }

    /// Issues everything and waits for the last answer.
    async fn issue(&self, tasks: &mut JoinSet<()>, issued: &Arc<AtomicU64>) -> Result<EndedBy, CliError> {
        match self.load {
            Load::Closed(streams) => {
                for number in 0..streams {
                    tasks.spawn(self.clone().stream(number, issued.clone()));
                }
            }
            Load::Open(rate) => self.issue_at(rate, tasks, issued).await?,
        }
        while tasks.join_next().await.is_some() {}
        let all = issued.load(Ordering::Relaxed) >= self.bounds.requests.min(self.limit.get());
        Ok(if all { EndedBy::Requests } else { EndedBy::Duration })
    }

    /// One stream of a closed loop: a request is due when the one before it is over.
    async fn stream(self, number: u32, issued: Arc<AtomicU64>) {
        let end = self.recorder.start() + self.bounds.duration;
        loop {
            let now = Instant::now();
            if now >= end {
                return;
            }
            // Only this thread counts, so the check and the step cannot be parted.
            let index = issued.load(Ordering::Relaxed);
            if index >= self.bounds.requests.min(self.limit.get()) {
                return;
            }
            issued.store(index + 1, Ordering::Relaxed);
            let open = self.recorder.open(index, now).on_stream(number);
            if !self.send(open, index, now + self.bounds.timeout).await {
                sleep_until((Instant::now() + FAILURE_PAUSE).min(end).into()).await;
            }
        }
    }

    /// An open loop: requests are due when the schedule says.
    async fn issue_at(&self, rate: f64, tasks: &mut JoinSet<()>, issued: &AtomicU64) -> Result<(), CliError> {
        let Bounds { requests, duration, in_flight, .. } = self.bounds;
        let arrivals = Poisson::new(rate, self.seed).take_while(move |at| *at < duration);
        let arrivals = arrivals.take(usize::try_from(requests).unwrap_or(usize::MAX));
        let pacer = Pacer::start(self.recorder.start(), arrivals);
        let mut pacer = pacer.map_err(|source| CliError::Os { what: "starting the thread of arrivals", source })?;
        let permits = Arc::new(Semaphore::new(in_flight as usize));
        while let Some(arrival) = pacer.next().await {
            if arrival.index >= self.limit.get() {
                break;
            }
            issued.store(arrival.index + 1, Ordering::Relaxed);
            let (point, permits) = (self.clone(), permits.clone());
            tasks.spawn(async move { point.request_within(arrival.index, arrival.intended, &permits).await });
            // Those that are over leave at once, so that memory follows what is in flight.
            while tasks.try_join_next().is_some() {}
        }
        Ok(())
    }

    /// A request that waits for its place among those in flight; its latency and its timeout count from when it was due.
    async fn request_within(&self, index: u64, intended: Instant, permits: &Semaphore) {
        let deadline = intended + self.bounds.timeout;
        let open = self.recorder.open(index, intended);
        match timeout_at(deadline.into(), permits.acquire()).await {
            Ok(_permit) => {
                self.send(open, index, deadline).await;
            }
            Err(_) => open.fail(Failure::Mesh(Code::Deadline), "never sent: --in-flight-max requests were in flight"),
        }
    }

    /// Sends a request that is due. Whether it succeeded.
    async fn send(&self, mut open: OpenRecord, index: u64, deadline: Instant) -> bool {
        let outcome = timeout_at(deadline.into(), self.attempts(&mut open, index, deadline)).await;
        let outcome = outcome.unwrap_or_else(|_| {
            let why = format!("no end within {:?}", self.bounds.timeout);
            Err((Failure::Mesh(Code::Deadline), why))
        });
        match outcome {
            Ok(()) => open.complete(),
            Err((failure, why)) => {
                open.fail(failure, why);
                return false;
            }
        }
        true
    }

    /// Sends a request, again and again where that is wanted and may help; its timeout bounds them.
    async fn attempts(&self, open: &mut OpenRecord, index: u64, deadline: Instant) -> Result<(), (Failure, String)> {
        loop {
            match self.converse(open, index, deadline).await {
                Err((failure, _)) if self.retry && failure.is_unavailable() => open.again(),
                outcome => return outcome,
            }
            sleep(FAILURE_PAUSE).await;
        }
    }

    /// Sends a request and follows its answer to the end.
    async fn converse(&self, open: &mut OpenRecord, index: u64, deadline: Instant) -> Result<(), (Failure, String)> {
        let ask = self.workload.ask(self.number, index);
        let Some(mut lent) = self.pool.lend() else {
            return Err((Failure::Mesh(Code::NotServing), "no connection".to_owned()));
        };
        let mut request = tonic::Request::new(ask.request);
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        open.sent();
        let answer = lent.client.mesh().generate(request).await;
        let mut messages = answer.map_err(|status| failed(&status))?.into_inner();
        let mut made = None;
        while let Some(message) = messages.message().await.map_err(|status| failed(&status))? {
            match message.event {
                Some(Event::Started(started)) => open.started(started.prompt_tokens),
                Some(Event::Tokens(tokens)) => open.tokens(&tokens.tokens),
                Some(Event::Finished(finished)) => made = Some(finished.completion_tokens),
                None => (),
            }
        }
        let Some(made) = made else {
            return Err((Failure::StreamCut, "the stream ended without a finish reason".to_owned()));
        };
        let received = open.received();
        if received != made || (self.workload.exact() && made != ask.output) {
            let why = format!("{} tokens asked for, {made} made, {received} received", ask.output);
            return Err((Failure::WrongLength, why));
        }
        Ok(())
    }
}

fn failed(status: &tonic::Status) -> (Failure, String) {
    // What the mesh says has details; without them it is gRPC's own word, and these two mean a lost front door.
    let lost = matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Unknown);
    if lost && MeshError::detail(status).is_none() {
        return (Failure::Connection, status.message().to_owned());
    }
    let error = MeshError::from_status(status);
    (Failure::Mesh(error.code), error.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_front_door_is_told_from_a_lost_node() {
        let of = |status: tonic::Status| failed(&status).0;
        assert_eq!(of(MeshError::new(Code::NodeLost, "expert-1").into()), Failure::Mesh(Code::NodeLost));
        assert_eq!(of(tonic::Status::unavailable("tcp connect error")), Failure::Connection);
        assert_eq!(of(tonic::Status::unknown("transport error")), Failure::Connection);
        assert_eq!(of(tonic::Status::cancelled("Timeout expired")), Failure::Mesh(Code::Deadline));
    }
}
