//! A model for tests: its "attention" checks that the pages of a sequence hold exactly the tokens before each row, and
//! its logits are a hash of them all, so whatever the scheduler does wrong changes the output or panics.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use mesh_core::routing::{GateRule, Routing};
use mesh_core::view::View;
use mesh_core::{LayerId, Slot, ViewId};
use mesh_transport::{Transport, Wake};

use crate::engine::ModelRunner;
use crate::runner::{ComingView, Outside, RunError, RunnerCounters, Step, StepOutput};

/// Tokens in a page of the fake cache.
pub const PAGE: u32 = 4;
/// Tokens that the fake model knows.
pub const VOCAB: u32 = 23;

/// One cached token.
#[derive(Clone, Copy, Debug)]
struct Cached {
    position: u32,
    token: u32,
    /// Of the sequence up to and with this token.
    hash: u64,
}

/// See the module.
pub struct FakeModel {
    kv: Vec<Option<Cached>>,
}

fn mix(hash: u64, token: u32) -> u64 {
    let mut z = (hash ^ u64::from(token).wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x1234_5678_9abc_def1);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
}

fn logits_of(hash: u64) -> Vec<f32> {
    (0..VOCAB).map(|t| (mix(hash, t) >> 40) as f32 / (1 << 22) as f32).collect()
}

/// The logits after a whole sequence, computed without any cache.
pub fn lone_logits(tokens: &[u32]) -> Vec<f32> {
    logits_of(tokens.iter().fold(0, |hash, token| mix(hash, *token)))
}

/// Each token's own expert.
fn routing_of(tokens: &[u32]) -> Routing {
    let mut routing = Routing::default();
    let gate: Vec<f32> = tokens.iter().flat_map(|t| (0..VOCAB).map(move |e| f32::from(u8::from(*t == e)))).collect();
    routing.softmax_top_k(&gate, VOCAB as usize, GateRule { top_k: 1, normalise: true }).unwrap();
    routing
}

impl FakeModel {
    /// A cache of `pages` empty pages.
    pub fn new(pages: u32) -> Self {
        Self { kv: vec![None; (pages * PAGE) as usize] }
    }

    fn slot(pages: &[u32], position: u32) -> usize {
        (pages[(position / PAGE) as usize] * PAGE + position % PAGE) as usize
    }

    /// Computes a step, checking everything that the contract of [`Step`] promises.
    pub fn step(&mut self, step: &Step<'_>) -> StepOutput {
        let mut output = StepOutput::default();
        let pages: Vec<u32> = step.sequences.iter().flat_map(|p| p.iter().copied()).collect();
        let distinct: std::collections::HashSet<u32> = pages.iter().copied().collect();
        assert_eq!(distinct.len(), pages.len(), "a page is with two sequences");
        let mut last: Option<(u32, u32)> = None;
        for row in &step.rows {
            if let Some((sequence, position)) = last {
                let neighbours = row.sequence == sequence && row.position == position + 1;
                assert!(neighbours || row.sequence == sequence + 1, "rows of a sequence are neighbours, ascending");
            } else {
                assert_eq!(row.sequence, 0);
            }
            last = Some((row.sequence, row.position));
            assert!(row.token < VOCAB);
            let pages = step.sequences[row.sequence as usize];
            let mut hash = 0;
            for before in 0..row.position {
                let cached = self.kv[Self::slot(pages, before)].expect("a position before the row was never written");
                hash = mix(hash, cached.token);
                assert_eq!((cached.position, cached.hash), (before, hash), "the page holds another sequence's token");
            }
            hash = mix(hash, row.token);
            self.kv[Self::slot(pages, row.position)] = Some(Cached { position: row.position, token: row.token, hash });
            if row.logits {
                output.logits.extend(logits_of(hash));
            }
        }
        if step.routing {
            let tokens: Vec<u32> = step.rows.iter().map(|r| r.token).collect();
            output.routing.push((LayerId(1), routing_of(&tokens)));
        }
        assert_eq!(
            last.map_or(0, |(sequence, _)| sequence as usize + 1),
            step.sequences.len(),
            "a sequence without rows"
        );
        output
    }
}

/// What tests do to the model while it runs.
#[derive(Default)]
pub struct Controls {
    /// Whether a view is in force.
    pub serving: bool,
    /// Steps that may be computed; `None`: all.
    pub permits: Option<u32>,
    /// How the next steps fail.
    pub failures: Vec<RunError>,
    /// Rows of this token give logits that are no numbers.
    pub poison: Option<u32>,
    woken: bool,
    prepared: Vec<ViewId>,
    abandoned: Vec<ViewId>,
}

/// The other end of a [`FakeRunner`].
#[derive(Default)]
pub struct Switch {
    controls: Mutex<Controls>,
    changed: Condvar,
}

impl Switch {
    /// Changes the controls; takes effect at once.
    pub fn set(&self, change: impl FnOnce(&mut Controls)) {
        change(&mut self.controls.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Views abandoned so far.
    pub fn abandoned(&self) -> Vec<ViewId> {
        self.controls.lock().unwrap_or_else(PoisonError::into_inner).abandoned.clone()
    }
}

impl Wake for Switch {
    fn wake(&self) {
        self.set(|c| c.woken = true);
    }
}

/// A [`FakeModel`] as the engine runs it.
pub struct FakeRunner {
    model: FakeModel,
    switch: Arc<Switch>,
    outside: Outside,
    counters: Arc<RunnerCounters>,
}

impl FakeRunner {
    /// One that serves, and what it is controlled by.
    pub fn new(pages: u32, outside: Outside) -> (Self, Arc<Switch>) {
        let switch = Arc::new(Switch::default());
        switch.set(|c| c.serving = true);
        let (model, counters) = (FakeModel::new(pages), Arc::default());
        (Self { model, switch: switch.clone(), outside, counters }, switch)
    }
}

impl ModelRunner for FakeRunner {
    fn step(&mut self, step: &Step<'_>) -> Result<StepOutput, RunError> {
        let mut controls = self.switch.controls.lock().unwrap();
        while controls.permits == Some(0) {
            controls = self.switch.changed.wait(controls).unwrap();
        }
        controls.permits.iter_mut().for_each(|p| *p -= 1);
        if let Some(error) = controls.failures.pop() {
            if let RunError::NodeLost { slot, what, .. } = &error {
                self.outside.tell(ViewId(0), *slot, what.clone());
            }
            return Err(error);
        }
        let mut output = self.model.step(step);
        let wanted = step.rows.iter().filter(|r| r.logits);
        for (row, logits) in wanted.zip(output.logits.chunks_exact_mut(VOCAB as usize)) {
            if Some(row.token) == controls.poison {
                logits[3] = f32::NAN;
            }
        }
        Ok(output)
    }

    fn prepare_view(&mut self, view: Arc<View>) -> Result<(), RunError> {
        self.switch.set(|c| c.prepared.push(view.id));
        Ok(())
    }

    fn commit_view(&mut self, id: ViewId) -> Result<(), RunError> {
        let prepared = self.switch.controls.lock().unwrap().prepared.contains(&id);
        self.switch.set(|c| c.serving |= prepared);
        if prepared { Ok(()) } else { Err(RunError::Internal(format!("{id} is not prepared"))) }
    }

    fn rejoin(&mut self, _: Box<dyn Transport>, _: Slot) {}

    fn abandon_view(&mut self, id: ViewId) {
        self.switch.set(|c| c.abandoned.push(id));
    }

    fn serving(&self) -> bool {
        self.switch.controls.lock().unwrap().serving
    }

    fn idle(&mut self, deadline: Instant) {
        let controls = self.switch.controls.lock().unwrap();
        let wait = deadline.saturating_duration_since(Instant::now());
        let (mut controls, _) = self.switch.changed.wait_timeout_while(controls, wait, |c| !c.woken).unwrap();
        controls.woken = false;
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.switch.clone()
    }

    fn counters(&self) -> Arc<RunnerCounters> {
        self.counters.clone()
    }

    fn coming(&self) -> Arc<ComingView> {
        self.outside.coming.clone()
    }
}
