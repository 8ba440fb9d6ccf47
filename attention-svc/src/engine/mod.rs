//! The engine: one thread that owns the model, the scheduler and every request's state; a bounded queue in, a bounded
//! stream out per request.
//!
//! A request is cancelled by dropping its [`Generation`]: the engine sees it before its next step and frees its pages.
//!
//! # Layout
//! - here: the engine's face: [`ModelRunner`], [`EngineHandle`], [`Generation`], what requests are told ([`Event`])
//! - `worker`: the thread's loop
//! - `active`: one request between steps: scores, text, stops

mod active;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use mesh_core::view::View;
use mesh_core::{LayerId, Slot, ViewId};
use mesh_proto::{Code, MeshError};
use mesh_transport::{Transport, Wake};
use tokio::sync::{mpsc, oneshot};

use crate::kv_blocks::KvBlocks;
use crate::output::Detokenize;
use crate::request::Request;
use crate::runner::{ComingView, RunError, Runner, RunnerCounters, Step, StepOutput};
use crate::sampling::Scored;
use crate::scheduler::{Scheduler, SchedulerLimits};
use worker::Worker;

/// Commands that wait for the engine's next step.
const COMMANDS_MAX: usize = 1024;

/// What the engine needs of the model. [`crate::runner::Runner`] is the real one.
pub trait ModelRunner: Send + 'static {
    /// Called first, by the thread that all other calls come from.
    fn enter(&mut self) {}
    /// Computes a step; blocks.
    ///
    /// # Errors
    /// [`RunError`]; nothing of the step counts then.
    fn step(&mut self, step: &Step<'_>) -> Result<StepOutput, RunError>;
    /// Gets ready for a view while the one in force serves on.
    ///
    /// # Errors
    /// [`RunError`].
    fn prepare_view(&mut self, view: Arc<View>) -> Result<(), RunError>;
    /// Puts the prepared view in force.
    ///
    /// # Errors
    /// [`RunError`].
    fn commit_view(&mut self, id: ViewId) -> Result<(), RunError>;
    /// Forgets a prepared view.
    fn abandon_view(&mut self, id: ViewId);
    /// Takes another data plane: the node registered anew, under a slot.
    fn rejoin(&mut self, transport: Box<dyn Transport>, slot: Slot);
    /// Whether steps can be computed.
    fn serving(&self) -> bool;
    /// Waits until `deadline` or a wake-up.
    fn idle(&mut self, deadline: Instant);
    /// What ends [`ModelRunner::idle`] from other threads.
    fn waker(&self) -> Arc<dyn Wake>;
    /// What it counts; the engine adds where its own time goes.
    fn counters(&self) -> Arc<RunnerCounters>;
    /// Where steps that wait see the view to come.
    fn coming(&self) -> Arc<ComingView>;
}

impl ModelRunner for Runner {
    fn enter(&mut self) {
        Runner::enter(self);
    }
    fn step(&mut self, step: &Step<'_>) -> Result<StepOutput, RunError> {
        Runner::step(self, step)
    }

    fn prepare_view(&mut self, view: Arc<View>) -> Result<(), RunError> {
        Runner::prepare_view(self, view)
    }

    fn commit_view(&mut self, id: ViewId) -> Result<(), RunError> {
        Runner::commit_view(self, id)
    }

    fn abandon_view(&mut self, id: ViewId) {
        Runner::abandon_view(self, id);
    }

    fn rejoin(&mut self, transport: Box<dyn Transport>, slot: Slot) {
        Runner::rejoin(self, transport, slot);
    }

    fn serving(&self) -> bool {
        Runner::serving(self)
    }

    fn idle(&mut self, deadline: Instant) {
        Runner::idle(self, deadline);
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Runner::waker(self)
    }

    fn counters(&self) -> Arc<RunnerCounters> {
        Runner::counters(self)
    }

    fn coming(&self) -> Arc<ComingView> {
        Runner::coming(self)
    }
}

/// How the engine works.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Bounds of steps and queues.
    pub limits: SchedulerLimits,
    /// Pages of the KV cache.
    pub kv_pages: u32,
    /// Tokens in a page.
    pub page_tokens: u32,
    /// The model's vocabulary: logits in a row.
    pub vocab: u32,
    /// The model's end-of-sequence ids.
    pub eos: Vec<u32>,
    /// How long requests wait for a view that serves, once a step failed for want of a node. Zero: they end at once.
    pub recovery_max: Duration,
}

/// A checked request on its way to the engine.
pub struct Submission {
    /// What is asked for.
    pub request: Request,
    /// Makes text of its tokens.
    pub detokenizer: Box<dyn Detokenize>,
    /// When it is given up.
    pub deadline: Option<Instant>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence id, a stop id or a stop string.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
}

/// A token with what was asked for about it.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputToken {
    /// Its id.
    pub id: u32,
    /// Its log-probability.
    pub logprob: Option<f32>,
    /// The best tokens in its place.
    pub top: Vec<Scored>,
    /// The raw logits that it was chosen from; empty when not asked for.
    pub logits: Vec<f32>,
}

/// Chosen experts of a run of tokens at one layer: `[tokens][k]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutingRun {
    /// The layer.
    pub layer: LayerId,
    /// Experts, by falling weight within a token.
    pub experts: Vec<u32>,
    /// Their weights.
    pub weights: Vec<f32>,
}

/// A chosen token, and what became certain with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The token. One that ends generation is given too, and is in no text.
    pub token: OutputToken,
    /// Text that became certain.
    pub text: String,
    /// With the first token: the prompt's tokens from the second on, when asked for.
    pub prompt: Vec<OutputToken>,
    /// Routing of the tokens that entered the model since the last event, when asked for.
    pub routing: Vec<RoutingRun>,
}

/// What a request is told. In order: one `Started`, `Token`s, one `Finished`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It was taken.
    Started,
    /// A token was chosen.
    Token(Box<Progress>),
    /// It is done.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Text that was still held back.
        text: String,
        /// Tokens chosen.
        completion_tokens: u32,
    },
}

/// What the engine counts; gauges where it says so.
#[derive(Debug, Default)]
pub struct EngineCounters {
    /// Pages of the cache (gauge).
    pub kv_total: AtomicU32,
    /// Pages that nobody holds (gauge).
    pub kv_free: AtomicU32,
    /// Most pages that were held at once.
    pub kv_used_max: AtomicU32,
    /// Requests with pages (gauge).
    pub running: AtomicU32,
    /// Requests that wait for pages (gauge).
    pub waiting: AtomicU32,
    /// [`Generation`]s alive (gauge).
    pub streams_open: AtomicU32,
    /// Steps computed.
    pub steps: AtomicU64,
    /// Tokens chosen.
    pub tokens: AtomicU64,
    /// Requests that lost their pages for a while.
    pub preemptions: AtomicU64,
}

#[derive(Debug, Default)]
struct Shared {
    counters: EngineCounters,
    /// The largest view to be forgotten, until the engine has done so; 0: none.
    abandoned: AtomicU64,
    stopping: AtomicBool,
}

enum Command {
    Submit(Box<Submission>, mpsc::Sender<Result<Event, MeshError>>),
    Prepare(Arc<View>, oneshot::Sender<Result<(), String>>),
    Commit(ViewId, oneshot::Sender<Result<(), String>>),
    Rejoin(Box<dyn Transport>, Slot, oneshot::Sender<()>),
}

/// Wakes the engine through whichever data plane it has.
struct EngineWaker(RwLock<Arc<dyn Wake>>);

impl Wake for EngineWaker {
    fn wake(&self) {
        self.0.read().unwrap_or_else(PoisonError::into_inner).wake();
    }
}

/// A running engine.
pub struct Engine {
    /// How it is spoken to.
    pub handle: EngineHandle,
    /// Completes when its thread has ended; with an error when by a panic.
    pub ended: oneshot::Receiver<()>,
}

/// Starts the engine's thread.
///
/// # Errors
/// The operating system's, when it gives no thread.
pub fn start(runner: impl ModelRunner, options: EngineOptions) -> std::io::Result<Engine> {
    let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
    let (ended_tx, ended) = oneshot::channel();
    let shared = Arc::new(Shared::default());
    let waker = Arc::new(EngineWaker(RwLock::new(runner.waker())));
    let handle = EngineHandle { commands, waker, coming: runner.coming(), shared: shared.clone() };
    let kv = KvBlocks::new(options.kv_pages, options.page_tokens);
    let scheduler = Scheduler::new(options.limits, kv);
    let worker = Worker::new(runner, scheduler, options, inbox, shared);
    std::thread::Builder::new().name("engine".into()).spawn(move || {
        worker.run();
        // Nobody may wait for the end any more.
        let _unheard = ended_tx.send(());
    })?;
    Ok(Engine { handle, ended })
}

/// Speaks to the engine from any thread. Cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    waker: Arc<EngineWaker>,
    coming: Arc<ComingView>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Hands a request to the engine. Its first event, or why it is not taken, comes through the [`Generation`].
    ///
    /// # Errors
    /// `OVERLOADED` when the queue to the engine is full, `NOT_SERVING` when the engine has stopped.
    pub fn submit(&self, submission: Submission) -> Result<Generation, MeshError> {
        // Started, each token, Finished: the engine never finds the stream full.
        let (sender, events) = mpsc::channel(submission.request.max_new_tokens as usize + 2);
        self.commands.try_send(Command::Submit(Box::new(submission), sender)).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => MeshError::new(
                Code::Overloaded,
                format!("{COMMANDS_MAX} commands wait for the engine; try again later"),
            ),
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })?;
        self.shared.counters.streams_open.fetch_add(1, Ordering::Relaxed);
        self.waker.wake();
        Ok(Generation { events, waker: self.waker.clone(), shared: self.shared.clone() })
    }

    /// Gets ready for a view.
    ///
    /// # Errors
    /// Why not, for the router.
    pub async fn prepare_view(&self, view: Arc<View>) -> Result<(), String> {
        // Before the engine can take it up: a step may wait for a node that the view is without.
        self.coming.set(view.clone());
        self.order(|done| Command::Prepare(view, done)).await
    }

    /// Puts the prepared view in force.
    ///
    /// # Errors
    /// Why not, for the router.
    pub async fn commit_view(&self, id: ViewId) -> Result<(), String> {
        self.order(|done| Command::Commit(id, done)).await
    }

    /// Gives the engine the data plane of a new membership. Requests wait for its first view.
    ///
    /// # Errors
    /// `NOT_SERVING` when the engine has stopped.
    pub async fn rejoin(&self, transport: Box<dyn Transport>, slot: Slot) -> Result<(), MeshError> {
        let (done, answer) = oneshot::channel();
        let waker = transport.waker();
        self.commands.send(Command::Rejoin(transport, slot, done)).await.map_err(|_| stopped())?;
        self.waker.wake();
        answer.await.map_err(|_| stopped())?;
        *self.waker.0.write().unwrap_or_else(PoisonError::into_inner) = waker;
        // What was asked for between the two is seen now.
        self.waker.wake();
        Ok(())
    }

    async fn order(&self, command: impl FnOnce(oneshot::Sender<Result<(), String>>) -> Command) -> Result<(), String> {
        let (done, answer) = oneshot::channel();
        self.commands.send(command(done)).await.map_err(|_| stopped().message)?;
        self.waker.wake();
        answer.await.map_err(|_| stopped().message)?
    }

    /// Forgets the prepared view; never blocks.
    pub fn abandon_view(&self, id: ViewId) {
        self.coming.forget(id);
        self.shared.abandoned.fetch_max(id.0, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Ends the engine after its present step: requests that are left end with `NOT_SERVING`.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// What the engine counts.
    pub fn counters(&self) -> &EngineCounters {
        &self.shared.counters
    }
}

fn stopped() -> MeshError {
    MeshError::new(Code::NotServing, "this attention node is stopping; try another")
}

/// A request's stream. Dropping it cancels the request.
pub struct Generation {
    events: mpsc::Receiver<Result<Event, MeshError>>,
    waker: Arc<EngineWaker>,
    shared: Arc<Shared>,
}

impl Generation {
    /// The next event; `None` after the last, or after an error.
    pub async fn next(&mut self) -> Option<Result<Event, MeshError>> {
        self.events.recv().await
    }

    /// [`Generation::next`], polled.
    pub fn poll_next(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<Result<Event, MeshError>>> {
        self.events.poll_recv(cx)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.events.close();
        self.shared.counters.streams_open.fetch_sub(1, Ordering::Relaxed);
        self.waker.wake();
    }
}
