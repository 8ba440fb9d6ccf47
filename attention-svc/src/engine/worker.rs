//! The engine thread's loop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

use mesh_core::ViewId;
use mesh_core::routing::RoutingError;
use mesh_proto::{Code, MeshError};
use tokio::sync::mpsc;

use super::active::Active;
use super::{Command, EngineOptions, Event, ModelRunner, Shared, Submission, stopped};
use crate::runner::{RunError, RunnerCounters, StepOutput, StepPart};
use crate::sampling::Sampler;
use crate::scheduler::{Refusal, Scheduler, SequenceId, Share};

/// How long the engine sleeps at most when nobody wakes it.
const IDLE_MAX: Duration = Duration::from_secs(1);

/// Pause before a step that failed is computed again, for what it needs to come: a view's commit, an answer after all.
const RETRY_PAUSE: Duration = Duration::from_millis(5);

/// The engine's state; belongs to its thread.
pub(super) struct Worker<R> {
    runner: R,
    scheduler: Scheduler,
    options: EngineOptions,
    active: BTreeMap<SequenceId, Active>,
    sampler: Sampler,
    commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    /// The runner's, for where the time goes.
    counted: Arc<RunnerCounters>,
    view: ViewId,
    /// Since when steps fail for want of a node, and how the first failure read.
    failing: Option<(Instant, MeshError)>,
    /// When a step that failed is computed again.
    retry_at: Option<Instant>,
}

impl<R: ModelRunner> Worker<R> {
    pub fn new(
        runner: R,
        scheduler: Scheduler,
        options: EngineOptions,
        commands: mpsc::Receiver<Command>,
        shared: Arc<Shared>,
    ) -> Self {
        let (active, sampler, counted) = (BTreeMap::new(), Sampler::default(), runner.counters());
        Self {
            runner,
            scheduler,
            options,
            active,
            sampler,
            commands,
            shared,
            counted,
            view: ViewId::default(),
            failing: None,
            retry_at: None,
        }
    }

    /// Works until it is told to stop or everyone who could tell it anything is gone.
    pub fn run(mut self) {
        self.runner.enter();
        while self.obey() {
            self.drop_cancelled_and_late();
            self.give_up_failing();
            if self.active.is_empty() || !self.runner.serving() {
                self.publish();
                self.runner.idle(self.wake_at());
            } else if let Some(at) = self.retry_at.filter(|at| Instant::now() < *at) {
                self.runner.idle(at);
            } else {
                self.step();
            }
        }
        for id in self.active.keys().copied().collect::<Vec<_>>() {
            self.end(id, stopped());
        }
        // Those that wait in the queue learn it from its end.
        self.publish();
    }

    /// Does what was asked since the last time. `false`: stop.
    fn obey(&mut self) -> bool {
        if self.shared.stopping.load(SeqCst) {
            return false;
        }
        loop {
            match self.commands.try_recv() {
                Ok(Command::Submit(submission, events)) => self.submit(*submission, events),
                Ok(Command::Prepare(view, done)) => {
                    let prepared = self.runner.prepare_view(view).map_err(|e| e.to_string());
                    // Whoever asked may have given up; the router then abandons the view.
                    let _unheard = done.send(prepared);
                }
                Ok(Command::Commit(id, done)) => {
                    let committed = self.runner.commit_view(id).map_err(|e| e.to_string());
                    if committed.is_ok() {
                        self.view = id;
                    }
                    let _unheard = done.send(committed);
                }
                Ok(Command::Rejoin(transport, slot, done)) => {
                    self.runner.rejoin(transport, slot);
                    self.view = ViewId::default();
                    let _unheard = done.send(());
                }
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => return false,
            }
        }
        let abandoned = self.shared.abandoned.swap(0, SeqCst);
        if abandoned != 0 {
            self.runner.abandon_view(ViewId(abandoned));
        }
        true
    }

    fn submit(&mut self, submission: Submission, events: mpsc::Sender<Result<Event, MeshError>>) {
        let (mut active, sequence) = Active::new(submission, events);
        // A mesh that had a view and lost it is waited for, if at all; one that never had any is not.
        let waits = self.view != ViewId::default() && !self.options.recovery_max.is_zero();
        if !self.runner.serving() && !waits {
            return active.tell(Err(mesh_error(&RunError::NotServing)));
        }
        let resumes = !active.request.resumed.is_empty();
        if resumes {
            active.tell(Ok(Event::Started));
            match active.resume(&self.options.eos) {
                Ok(false) => {}
                Ok(true) => return,
                Err(error) => return active.tell(Err(error)),
            }
        }
        match self.scheduler.submit(sequence) {
            Ok(id) => {
                if !resumes {
                    active.tell(Ok(Event::Started));
                }
                self.active.insert(id, active);
            }
            Err(refusal) => {
                let code = match refusal {
                    Refusal::QueueFull { .. } => Code::Overloaded,
                    Refusal::NeverFits { .. } => Code::ContextExceeded,
                };
                active.tell(Err(MeshError::new(code, refusal.to_string())));
            }
        }
    }

    fn drop_cancelled_and_late(&mut self) {
        let now = Instant::now();
        let late = |a: &Active| a.deadline.is_some_and(|d| d <= now);
        let gone = self.active.iter().filter(|(_, a)| a.cancelled() || late(a)).map(|(id, _)| *id).collect::<Vec<_>>();
        for id in gone {
            self.end(id, MeshError::new(Code::Deadline, "the request's deadline passed before it was finished"));
        }
    }

    /// Frees what a request holds and tells it why it ended.
    fn end(&mut self, id: SequenceId, error: MeshError) {
        self.scheduler.remove(id);
        if let Some(active) = self.active.remove(&id) {
            tracing::debug!(request = %active.request.id, %error, "request ended early");
            active.tell(Err(error));
        }
    }

    fn publish(&self) {
        let counters = &self.shared.counters;
        let kv = self.scheduler.kv();
        counters.kv_total.store(kv.total(), Relaxed);
        counters.kv_free.store(kv.free(), Relaxed);
        counters.kv_used_max.store(kv.used_max(), Relaxed);
        counters.running.store(self.scheduler.running() as u32, Relaxed);
        counters.waiting.store(self.scheduler.waiting() as u32, Relaxed);
        counters.preemptions.store(self.scheduler.preemptions(), Relaxed);
    }

    fn wake_at(&self) -> Instant {
        let idle = Instant::now() + IDLE_MAX;
        let given_up = self.failing.as_ref().map(|(since, _)| *since + self.options.recovery_max);
        self.active.values().filter_map(|a| a.deadline).chain(given_up).fold(idle, Instant::min)
    }

    fn step(&mut self) {
        self.counted.profile.start();
        let shares = self.scheduler.plan();
        self.publish();
        let routing = shares.iter().any(|s| self.active.get(&s.id).is_some_and(|a| a.request.return_routing));
        let step = self.scheduler.step(&shares, routing);
        let wanted = step.rows.iter().filter(|r| r.logits).count();
        let rows = step.rows.len();
        self.counted.profile.lap(StepPart::Schedule);
        let result = self.runner.step(&step);
        let result = result.and_then(|output| self.check(&output, rows, wanted, routing).map(|()| output));
        match result {
            Ok(output) => {
                (self.failing, self.retry_at) = (None, None);
                self.shared.counters.steps.fetch_add(1, Relaxed);
                self.deliver(&shares, &output);
            }
            Err(error) => self.failed(&shares, &error),
        }
        self.publish();
        self.counted.profile.stop(StepPart::Sample);
    }

    /// What the runner promised: so many logits, so many rows routed.
    fn check(&self, output: &StepOutput, rows: usize, wanted: usize, routing: bool) -> Result<(), RunError> {
        let logits = wanted * self.options.vocab as usize;
        if output.logits.len() != logits {
            return Err(RunError::Internal(format!("{} logits where {logits} are due", output.logits.len())));
        }
        let short = output.routing.iter().find(|(_, r)| routing && r.rows() != rows);
        match short {
            Some((layer, r)) => Err(RunError::Internal(format!("routing of {} rows at {layer} of {rows}", r.rows()))),
            None => Ok(()),
        }
    }

    fn deliver(&mut self, shares: &[Share], output: &StepOutput) {
        let mut logits = output.logits.chunks_exact(self.options.vocab as usize);
        let mut row = 0;
        for share in shares {
            let rows = row..row + share.rows as usize;
            row = rows.end;
            let scored: Vec<&[f32]> = logits.by_ref().take(share.scored as usize).collect();
            let last = if share.samples { logits.next() } else { None };
            self.scheduler.computed(share);
            let Some(active) = self.active.get_mut(&share.id) else { continue };
            if active.request.return_routing {
                active.take_routing(&output.routing, rows, share.first);
            }
            for (logits, position) in scored.into_iter().zip(share.scored_first..) {
                active.score_prompt(position, logits);
            }
            let Some(last) = last else { continue };
            self.shared.counters.tokens.fetch_add(1, Relaxed);
            match active.choose(last, &mut self.sampler, &self.options.eos) {
                Ok(Some(token)) => self.scheduler.append(share.id, token),
                Ok(None) => {
                    self.scheduler.remove(share.id);
                    self.active.remove(&share.id);
                }
                Err(error) => {
                    tracing::error!(%error, "no token could be chosen");
                    self.end(share.id, error);
                }
            }
        }
    }

    /// A step that failed counts for nothing: its rows are computed again once a view serves, or its requests end.
    fn failed(&mut self, shares: &[Share], error: &RunError) {
        let typed = mesh_error(error);
        let lost = matches!(typed.code, Code::NodeLost | Code::NotServing);
        tracing::warn!(%error, requests = shares.len(), "step failed");
        if lost && !self.options.recovery_max.is_zero() {
            let now = Instant::now();
            self.failing.get_or_insert((now, typed));
            self.retry_at = Some(now + RETRY_PAUSE);
            return;
        }
        for share in shares {
            self.end(share.id, typed.clone());
        }
    }

    /// Ends everybody once nothing has been computed for `recovery_max` for want of a node.
    fn give_up_failing(&mut self) {
        if self.active.is_empty() {
            self.failing = None;
        } else if !self.runner.serving() {
            self.failing.get_or_insert_with(|| (Instant::now(), mesh_error(&RunError::NotServing)));
        }
        let expired = self.failing.as_ref().is_some_and(|(since, _)| since.elapsed() >= self.options.recovery_max);
        if !expired {
            return;
        }
        if let Some((_, error)) = self.failing.take() {
            for id in self.active.keys().copied().collect::<Vec<_>>() {
                self.end(id, error.clone());
            }
        }
    }
}

/// What a request is told of a failed step.
pub(super) fn mesh_error(error: &RunError) -> MeshError {
    let text = error.to_string();
    match error {
        RunError::NotServing => MeshError::new(Code::NotServing, text),
        RunError::Routing { error: RoutingError::Unreachable { .. }, .. } => MeshError::new(Code::NodeLost, text),
        RunError::NodeLost { node, .. } | RunError::Aborted { node, .. } => {
            MeshError::new(Code::NodeLost, text).at_node(node.to_string())
        }
        RunError::Silent { slots, .. } => {
            let names: Vec<String> = slots.iter().map(ToString::to_string).collect();
            MeshError::new(Code::NodeLost, text).at_node(names.join(", "))
        }
        _ => MeshError::new(Code::Internal, text),
    }
}
