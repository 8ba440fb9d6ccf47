//! One micro-batch's way through the layers, up to each exchange and on from it.

use std::ops::Range;
use std::sync::Arc;

use mesh_core::LayerId;
use mesh_core::routing::{DispatchPlan, Routing};
use mesh_kernels::kv::KvCache;
use mesh_kernels::rows::RowBuf;
use mesh_kernels::{AttentionShape, Compute, Ffn, FfnGroup, KV_PAGE_TOKENS, QueryRow, Term};
use mesh_model::{ModelConfig, QkNorm};

use super::counters::{RunnerCounters, StepPart, ffn_work, linear_work};
use super::error::RunError;
use super::exchange::{Exchange, InFlight};
use super::weights::{Trunk, TrunkLayer};
use super::{Step, StepRow};

/// A run of a step's rows and everything that they are at the moment. Its memory is kept from step to step.
pub(super) struct MicroBatch {
    pub rows: Range<usize>,
    /// The residual stream, `[rows][hidden]`.
    pub residual: Vec<f32>,
    positions: Vec<u32>,
    /// Normed rows in the compute dtype, `[rows][hidden]`: what enters a GEMM and what travels.
    normed: RowBuf,
    qkv: Vec<f32>,
    mixed: RowBuf,
    out: Vec<f32>,
    ffn_out: RowBuf,
    logits: Vec<f32>,
    pub routing: Routing,
    plan: DispatchPlan,
    in_flight: Option<InFlight>,
    counters: Arc<RunnerCounters>,
}

impl MicroBatch {
    pub fn new(compute: &dyn Compute, config: &ModelConfig, counters: Arc<RunnerCounters>) -> Result<Self, RunError> {
        let dtype = compute.dtype();
        Ok(Self {
            rows: 0..0,
            residual: Vec::new(),
            positions: Vec::new(),
            normed: RowBuf::new(dtype, 0, config.hidden)?,
            qkv: Vec::new(),
            mixed: RowBuf::new(dtype, 0, config.heads * config.head_dim)?,
            out: Vec::new(),
            ffn_out: RowBuf::new(dtype, 0, config.hidden)?,
            logits: Vec::new(),
            routing: Routing::default(),
            plan: DispatchPlan::default(),
            in_flight: None,
            counters,
        })
    }

    /// Takes `rows` of a step: their embeddings are the residual stream.
    pub fn begin(&mut self, trunk: &Trunk, step: &Step<'_>, rows: Range<usize>) -> Result<(), RunError> {
        let hidden = trunk.config().hidden;
        self.residual.resize(rows.len() * hidden, 0.0);
        self.in_flight = None;
        for (row, out) in step.rows[rows.clone()].iter().zip(self.residual.chunks_exact_mut(hidden)) {
            trunk.embed(row.token, out)?;
        }
        self.positions.clear();
        self.positions.extend(step.rows[rows.clone()].iter().map(|r| r.position));
        self.normed.resize(rows.len(), hidden)?;
        self.mixed.resize(rows.len(), self.mixed.cols())?;
        self.ffn_out.resize(rows.len(), hidden)?;
        self.rows = rows;
        Ok(())
    }

    /// Attention of one layer, into the residual stream. Writes the rows' K and V.
    pub fn attend(&mut self, compute: &dyn Compute, trunk: &Trunk, kv: &mut KvCache, step: &Step<'_>, layer: usize) {
        let config = trunk.config();
        let weights = &trunk.layers[layer];
        let (q, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let stride = q + 2 * kv_width;
        let rows = &step.rows[self.rows.clone()];
        let profile = &self.counters.profile;

        compute.rms_norm(&self.residual, &weights.input_norm, config.rms_eps, self.normed.as_rows_mut());
        profile.lap(StepPart::Norm);
        self.qkv.resize(rows.len() * stride, 0.0);
        compute.linear(&weights.qkv, self.normed.as_rows(), &mut self.qkv);
        profile.lap_with(StepPart::Qkv, linear_work(&weights.qkv, rows.len()));
        shape_qkv(compute, config, weights, &mut self.qkv, stride);
        profile.lap(StepPart::Norm);
        compute.rotate(&mut self.qkv, stride, 0, config.heads, &self.positions, &trunk.rope);
        compute.rotate(&mut self.qkv, stride, q, config.kv_heads, &self.positions, &trunk.rope);
        for (row, qkv) in rows.iter().zip(self.qkv.chunks_exact(stride)) {
            let (page, slot) = place(step, row);
            compute.kv_write(kv, layer, page, slot, &qkv[q..q + kv_width], &qkv[q + kv_width..]);
        }
        profile.lap(StepPart::RopeKv);

        let queries: Vec<QueryRow<'_>> = rows
            .iter()
            .map(|r| QueryRow { pages: step.sequences[r.sequence as usize], position: r.position })
            .collect();
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let shape = AttentionShape { heads: config.heads, scale, window: config.sliding_window };
        compute.attention(kv, layer, &self.qkv, stride, &queries, shape, self.mixed.as_rows_mut());
        profile.lap(StepPart::Attention);

        self.out.resize(rows.len() * config.hidden, 0.0);
        compute.linear(&weights.out, self.mixed.as_rows(), &mut self.out);
        add_bias(&mut self.out, weights.out_bias.as_deref());
        for (r, o) in self.residual.iter_mut().zip(&self.out) {
            *r += o;
        }
        profile.lap_with(StepPart::Out, linear_work(&weights.out, rows.len()));
        compute.rms_norm(&self.residual, &weights.post_norm, config.rms_eps, self.normed.as_rows_mut());
        profile.lap(StepPart::Norm);
    }

    /// A dense layer's feed-forward network, into the residual stream.
    pub fn dense(&mut self, compute: &dyn Compute, ffn: &Ffn) {
        let row_bytes = self.normed.cols() * self.normed.dtype().bytes();
        let x = self.normed.as_rows().bytes.chunks_exact(row_bytes).collect();
        let out = self.ffn_out.as_rows_mut().bytes.chunks_exact_mut(row_bytes).collect();
        compute.ffn(&mut [FfnGroup { weights: ffn, x, out }]);
        let terms: Vec<Term<'_>> =
            self.ffn_out.as_rows().bytes.chunks_exact(row_bytes).map(|row| Term { weight: 1.0, row }).collect();
        compute.combine(&mut self.residual, self.ffn_out.cols(), 1, &terms);
        self.counters.profile.lap_with(StepPart::Dense, ffn_work(ffn, self.rows.len()));
    }

    /// Chooses experts and sends the rows to the nodes that hold them.
    pub fn dispatch(
        &mut self,
        compute: &dyn Compute,
        trunk: &Trunk,
        gate: &mesh_kernels::Matrix,
        exchange: &mut Exchange,
        layer: LayerId,
    ) -> Result<(), RunError> {
        let config = trunk.config();
        self.logits.resize(self.rows.len() * config.moe.experts, 0.0);
        compute.linear(gate, self.normed.as_rows(), &mut self.logits);
        let routed = self.routing.softmax_top_k(&self.logits, config.moe.experts, config.gate);
        routed.map_err(|error| RunError::Routing { layer, error })?;
        self.counters.profile.lap(StepPart::Gate);
        let view = exchange.view().cloned().ok_or(RunError::NotServing)?;
        exchange.plan(&mut self.plan, &self.routing, &view, layer)?;
        self.in_flight = Some(exchange.dispatch(&view, layer, &self.plan, self.normed.as_rows())?);
        self.counters.profile.lap(StepPart::Dispatch);
        Ok(())
    }

    /// Waits for the rows sent at the layer before, if any were, and adds them into the residual stream.
    pub fn combine(&mut self, compute: &dyn Compute, cols: usize, exchange: &mut Exchange) -> Result<(), RunError> {
        let Some(mut in_flight) = self.in_flight.take() else { return Ok(()) };
        exchange.wait(&mut in_flight, &mut self.plan, self.normed.as_rows())?;
        self.counters.profile.lap(StepPart::Wait);
        let terms: Vec<Term<'_>> = (0..self.plan.rows())
            .flat_map(|row| self.plan.contributions(row))
            .map(|c| Term { weight: c.weight, row: exchange.row(&in_flight, c.source) })
            .collect();
        compute.combine(&mut self.residual, cols, self.routing.k(), &terms);
        exchange.end(in_flight);
        self.counters.profile.lap(StepPart::Combine);
        Ok(())
    }
}

/// Where a row's K and V belong: its page and the slot in it.
fn place(step: &Step<'_>, row: &StepRow) -> (u32, usize) {
    let position = row.position as usize;
    (step.sequences[row.sequence as usize][position / KV_PAGE_TOKENS], position % KV_PAGE_TOKENS)
}

/// Biases, q/k norms and clipping, as the family has them, on rows of `[q | k | v]`.
fn shape_qkv(compute: &dyn Compute, config: &ModelConfig, weights: &TrunkLayer, qkv: &mut [f32], stride: usize) {
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    add_bias(qkv, weights.qkv_bias.as_deref());
    if let (Some(q_norm), Some(k_norm)) = (&weights.q_norm, &weights.k_norm) {
        let (q_groups, k_groups) = match config.qk_norm {
            QkNorm::PerHead => (config.heads, config.kv_heads),
            QkNorm::Whole | QkNorm::None => (1, 1),
        };
        compute.rms_norm_heads(qkv, stride, 0, q_groups, q_norm, config.rms_eps);
        compute.rms_norm_heads(qkv, stride, q, k_groups, k_norm, config.rms_eps);
    }
    if let Some(clip) = config.clip_qkv {
        debug_assert_eq!(stride, q + 2 * kv);
        qkv.iter_mut().for_each(|x| *x = x.clamp(-clip, clip));
    }
}

fn add_bias(rows: &mut [f32], bias: Option<&[f32]>) {
    let Some(bias) = bias else { return };
    for row in rows.chunks_exact_mut(bias.len()) {
        for (x, b) in row.iter_mut().zip(bias) {
            *x += b;
        }
    }
}
