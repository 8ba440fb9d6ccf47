//! The model's way through one step: trunk weights, the layer loop, and the exchange with the expert nodes.
//!
//! A step's rows are cut into micro-batches. Layer by layer each micro-batch takes in the answers to its last dispatch,
//! attends, and dispatches again: while one is away at the experts, the next computes.

mod counters;
mod error;
mod exchange;
mod forward;
mod outside;
mod peers;
#[cfg(test)]
mod tests;
mod weights;

pub use counters::{RunnerCounters, RunnerReading, StepPart};
pub use error::RunError;
pub use exchange::ExchangeLimits;
pub use outside::{ComingView, Outside};
pub use weights::Trunk;

use std::sync::Arc;
use std::time::{Duration, Instant};

use exchange::Exchange;
use forward::MicroBatch;
use mesh_core::routing::Routing;
use mesh_core::view::View;
use mesh_core::{LayerId, Slot, ViewId};
use mesh_kernels::Compute;
use mesh_kernels::kv::{KvCache, KvShape};
use mesh_kernels::rows::RowBuf;
use mesh_model::ModelConfig;
use mesh_transport::{Transport, Wake};
use weights::Mlp;

/// A token to be computed in a step.
#[derive(Clone, Copy, Debug)]
pub struct StepRow {
    /// Index into [`Step::sequences`].
    pub sequence: u32,
    /// The token's id, below the vocabulary's size.
    pub token: u32,
    /// Its position in its sequence. A sequence's rows of one step are consecutive positions, ascending, and all earlier
    /// positions were computed in earlier steps or stand before it in this one.
    pub position: u32,
    /// Whether its logits are wanted.
    pub logits: bool,
}

/// One step of the batch: any mix of prefill chunks and decode rows.
#[derive(Debug, Default)]
pub struct Step<'a> {
    /// Each sequence's KV pages, covering at least every position that the step writes.
    pub sequences: Vec<&'a [u32]>,
    /// Rows; those of one sequence are neighbours.
    pub rows: Vec<StepRow>,
    /// Whether the routing of all rows is wanted.
    pub routing: bool,
}

/// What a step computed.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// `[wanted rows][vocab]`, in row order.
    pub logits: Vec<f32>,
    /// When asked for: each MoE layer's routing of all rows, by layer.
    pub routing: Vec<(LayerId, Routing)>,
}

/// What a runner is made with.
#[derive(Clone, Debug)]
pub struct RunnerOptions {
    /// This node's slot, said in every frame.
    pub slot: Slot,
    /// Pages of the KV cache, `KV_PAGE_TOKENS` tokens each.
    pub kv_pages: usize,
    /// Micro-batches that a step is cut into at most. Also the number of lanes.
    pub micro_batches: u16,
    /// Rows that a micro-batch has at least: each one reads the weights again.
    pub micro_batch_rows_min: usize,
    /// How long an expert node's answer may take before rows are sent to another holder, however slow answers are; after half of
    /// it the router is told.
    pub silence_min: Duration,
    /// How long an expert node's answer may take at all.
    pub answer_max: Duration,
    /// How long connecting to one expert node may take.
    pub connect_max: Duration,
    /// Largest frame body, bytes.
    pub body_bytes_max: usize,
}

/// How often a node whose channel closed is tried again.
const RECONNECT_EVERY: Duration = Duration::from_secs(1);
/// How soon it is tried for the first time: mostly the node lives, and its channel alone was closed, as over a bad frame.
const RECONNECT_SOON: Duration = Duration::from_millis(20);

/// The model on this node. Belongs to the engine's thread.
pub struct Runner {
    trunk: Trunk,
    compute: Arc<dyn Compute>,
    kv: KvCache,
    exchange: Exchange,
    batches: Vec<MicroBatch>,
    options: RunnerOptions,
    counters: Arc<RunnerCounters>,
    reconnect_at: Instant,
}

impl Runner {
    /// A runner with an empty KV cache and no view.
    ///
    /// # Errors
    /// [`RunError::Internal`] when the options contradict the model (a row that fits no frame, no lanes, no pages).
    pub fn new(
        trunk: Trunk,
        compute: Arc<dyn Compute>,
        transport: Box<dyn Transport>,
        options: RunnerOptions,
        outside: Outside,
    ) -> Result<Self, RunError> {
        let config = trunk.config();
        let answer_bytes = config.moe.top_k * config.hidden * compute.dtype().bytes();
        if options.body_bytes_max < answer_bytes + 4096 || options.micro_batches == 0 || options.kv_pages == 0 {
            return Err(RunError::Internal(format!("{options:?} for rows of {answer_bytes} bytes")));
        }
        let shape = KvShape {
            layers: config.layers.len(),
            pages: options.kv_pages,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        };
        let counters = Arc::new(RunnerCounters::default());
        let limits = limits(&options);
        let batches = (0..options.micro_batches).map(|_| MicroBatch::new(compute.as_ref(), config, counters.clone()));
        Ok(Self {
            kv: compute.kv_cache(shape),
            batches: batches.collect::<Result<_, _>>()?,
            exchange: Exchange::new(transport, options.slot, limits, counters.clone(), outside),
            trunk,
            compute,
            options,
            counters,
            reconnect_at: Instant::now(),
        })
    }

    /// Called first by the thread that computes: binds it to its processor, if threads are bound.
    pub fn enter(&mut self) {
        self.compute.bind_thread();
    }

    /// Takes another data plane in the place of the one before: what was known of expert nodes is forgotten, the KV cache is
    /// kept.
    pub fn rejoin(&mut self, transport: Box<dyn Transport>, slot: Slot) {
        self.options.slot = slot;
        let limits = limits(&self.options);
        let outside = self.exchange.outside().clone();
        self.exchange = Exchange::new(transport, slot, limits, self.counters.clone(), outside);
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.trunk.config()
    }

    /// Computes a step; blocks for the expert nodes' answers.
    ///
    /// # Errors
    /// [`RunError`]; what the step wrote to the KV cache is then to be dropped, the runner itself is as before.
    pub fn step(&mut self, step: &Step<'_>) -> Result<StepOutput, RunError> {
        // What arrived since the last step: closed channels above all.
        self.exchange.pump();
        self.exchange.count_transport();
        self.reconnect();
        self.counters.profile.lap(StepPart::Wait);
        if self.exchange.serving().is_none() {
            return Err(RunError::NotServing);
        }
        let output = self.run(step);
        if output.is_err() {
            // A step fails for want of an answer: what it took since the last lap, it waited.
            self.counters.profile.lap(StepPart::Wait);
            self.exchange.abandon_lanes();
        }
        output
    }

    fn run(&mut self, step: &Step<'_>) -> Result<StepOutput, RunError> {
        let Self { trunk, compute, kv, exchange, batches, options, counters, .. } = self;
        let (trunk, compute) = (&*trunk, compute.as_ref());
        let hidden = trunk.config().hidden;
        let mut output = StepOutput::default();
        let used = cut(batches, options, trunk, step)?;
        counters.profile.lap(StepPart::Embed);
        let batches = &mut batches[..used];
        for (layer, weights) in trunk.layers.iter().enumerate() {
            let id = LayerId(layer as u16);
            let mut routing = Routing::default();
            for batch in &mut *batches {
                batch.combine(compute, hidden, exchange)?;
                batch.attend(compute, trunk, kv, step, layer);
                match &weights.mlp {
                    Mlp::Dense(ffn) => batch.dense(compute, ffn),
                    Mlp::Moe(gate) => {
                        batch.dispatch(compute, trunk, gate, exchange, id)?;
                        if step.routing {
                            routing.append(&batch.routing);
                        }
                    }
                }
            }
            if step.routing && matches!(weights.mlp, Mlp::Moe(_)) {
                output.routing.push((id, routing));
            }
        }
        for batch in &mut *batches {
            batch.combine(compute, hidden, exchange)?;
        }
        output.logits = head(compute, trunk, step, batches, counters)?;
        Ok(output)
    }

    /// Connects to the nodes of a view that is to come. Nothing may be in flight.
    ///
    /// # Errors
    /// [`RunError::NodeLost`] when one of them cannot be reached.
    pub fn prepare_view(&mut self, view: Arc<View>) -> Result<(), RunError> {
        self.exchange.prepare(view)
    }

    /// Puts the prepared view in force.
    ///
    /// # Errors
    /// [`RunError::NotPrepared`] when another or none is prepared.
    pub fn commit_view(&mut self, id: ViewId) -> Result<(), RunError> {
        self.exchange.commit(id)
    }

    /// Forgets a prepared view.
    pub fn abandon_view(&mut self, id: ViewId) {
        self.exchange.abandon(id);
    }

    /// Whether a view is committed and all its expert nodes are connected.
    pub fn serving(&self) -> bool {
        self.exchange.serving().is_some()
    }

    /// Waits until `deadline`, a wake-up or something on the transport; takes in what came and tries lost channels again.
    pub fn idle(&mut self, deadline: Instant) {
        self.note_closed();
        let lacking = self.exchange.lacks().then_some(self.reconnect_at);
        let until = lacking.into_iter().chain(self.exchange.next_try()).fold(deadline, Instant::min);
        self.exchange.sleep(until);
        self.exchange.pump();
        self.exchange.count_transport();
        self.reconnect();
    }

    /// Tries nodes of the view whose channel closed again, now and then: the router may know that they live.
    fn reconnect(&mut self) {
        self.note_closed();
        let now = Instant::now();
        if self.exchange.lacks() && now >= self.reconnect_at {
            self.exchange.reconnect();
            self.reconnect_at = now + RECONNECT_EVERY;
        }
    }

    fn note_closed(&mut self) {
        if self.exchange.take_closed() {
            self.reconnect_at = self.reconnect_at.min(Instant::now() + RECONNECT_SOON);
        }
    }

    /// What other threads wake [`Runner::idle`] with.
    pub fn waker(&self) -> Arc<dyn Wake> {
        self.exchange.transport().waker()
    }

    /// The view to come, as steps that wait see it.
    pub fn coming(&self) -> Arc<ComingView> {
        self.exchange.outside().coming.clone()
    }

    /// The runner's counters.
    pub fn counters(&self) -> Arc<RunnerCounters> {
        self.counters.clone()
    }
}

fn limits(options: &RunnerOptions) -> ExchangeLimits {
    ExchangeLimits {
        lanes: options.micro_batches,
        silence_min: options.silence_min,
        answer_max: options.answer_max,
        connect_max: options.connect_max,
        body_bytes_max: options.body_bytes_max,
    }
}

/// Cuts a step into micro-batches of nearly equal size; returns how many there are.
fn cut(batches: &mut [MicroBatch], options: &RunnerOptions, trunk: &Trunk, step: &Step<'_>) -> Result<usize, RunError> {
    let rows = step.rows.len();
    let used = (rows / options.micro_batch_rows_min.max(1)).clamp(1, batches.len());
    for (i, batch) in batches[..used].iter_mut().enumerate() {
        batch.begin(trunk, step, rows * i / used..rows * (i + 1) / used)?;
    }
    Ok(used)
}

/// Final norm and output head of the rows whose logits are wanted.
fn head(
    compute: &dyn Compute,
    trunk: &Trunk,
    step: &Step<'_>,
    batches: &[MicroBatch],
    counters: &RunnerCounters,
) -> Result<Vec<f32>, RunError> {
    let config = trunk.config();
    let mut wanted: Vec<f32> = Vec::new();
    for batch in batches {
        let rows = step.rows[batch.rows.clone()].iter().zip(batch.residual.chunks_exact(config.hidden));
        rows.filter(|(row, _)| row.logits).for_each(|(_, residual)| wanted.extend_from_slice(residual));
    }
    let rows = wanted.len() / config.hidden;
    let mut normed = RowBuf::new(compute.dtype(), rows, config.hidden)?;
    compute.rms_norm(&wanted, &trunk.final_norm, config.rms_eps, normed.as_rows_mut());
    counters.profile.lap(StepPart::Norm);
    let mut logits = vec![0.0; rows * config.vocab];
    compute.linear(&trunk.head, normed.as_rows(), &mut logits);
    counters.profile.lap_with(StepPart::Head, counters::linear_work(&trunk.head, rows));
    Ok(logits)
}
