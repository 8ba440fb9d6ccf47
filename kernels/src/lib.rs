//! The arithmetic of the mesh, batch-invariant by construction: what a row becomes depends on that row alone, never on
//! how many rows, threads or nodes share the work (invariant 1).
//!
//! - A GEMM output element has one accumulator, walked over K in one fixed order.
//! - Attention walks the KV sequence in pages of [`KV_PAGE_TOKENS`], in order and in the same steps in prefill and decode.
//!
//! # Layout
//! - [`Compute`]: the trait that a backend implements
//! - [`rows`]: matrices of rows in the compute dtype, borrowed out of wire buffers or scratch
//! - [`kv`]: the paged KV cache
//! - [`mod@reference`]: readable, slow, the oracle
//! - [`cpu`]: SIMD chosen at run time, threads
//! - [`packed`]: packed weights kept in files
//! - `matrix`: packed weights; `memory`: aligned storage; `bf16`: the one rounding; `pointwise`: norms, rotation and
//!   combine, which every backend shares; `checks`: the entry checks of every kernel; `error`: what start-up refuses

mod bf16;
mod checks;
pub mod cpu;
mod error;
pub mod kv;
mod matrix;
mod memory;
pub mod packed;
mod pointwise;
pub mod reference;
pub mod rows;

use kv::{KvCache, KvShape};
use rows::{MatrixView, Rows, RowsMut};

pub use error::KernelError;
pub use matrix::{Ffn, Matrix};

/// Tokens in a page of the KV cache; attention reduces over the sequence in steps of whole pages.
pub const KV_PAGE_TOKENS: usize = 32;

/// The type that operands are held in; sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit floats: weights widened, the exact reference.
    F32,
    /// bfloat16 operands, f32 sums.
    Bf16,
}

/// One expert and all the rows that want it, gathered from wherever they lie, with a place for each answer.
pub struct FfnGroup<'a> {
    /// The expert.
    pub weights: &'a Ffn,
    /// Rows in the compute dtype, `hidden` elements each.
    pub x: Vec<&'a [u8]>,
    /// As many places, each `hidden` elements of the compute dtype.
    pub out: Vec<&'a mut [u8]>,
}

/// One query row of attention: a token of some sequence.
#[derive(Clone, Copy, Debug)]
pub struct QueryRow<'a> {
    /// The sequence's pages, the first holding positions `0..KV_PAGE_TOKENS`.
    pub pages: &'a [u32],
    /// The token's position; it sees positions `0..=position` (or the window's last ones). Their K and V are written.
    pub position: u32,
}

/// The shape of an attention call.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads; a multiple of the cache's KV heads.
    pub heads: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// A token sees itself and the `window - 1` before it; `None`: all.
    pub window: Option<u32>,
}

/// One contribution to a row: an expert's output and its weight.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a> {
    /// The routing weight.
    pub weight: f32,
    /// The expert's output row in the compute dtype.
    pub row: &'a [u8],
}

/// Rotary position embedding: half-split pairs `(x[i], x[i + d/2])`, angle `position * inv_freq[i]`, cos and sin times `scale`.
#[derive(Clone, Debug)]
pub struct Rope {
    /// `head_dim / 2` inverse frequencies.
    pub inv_freq: Vec<f32>,
    /// Attention factor (yarn); 1 otherwise.
    pub scale: f32,
}

/// A backend's arithmetic. Residual streams, q/k/v, logits are f32; rows that enter a GEMM or the wire are in `dtype()`.
///
/// Shapes are the caller's promise: a mismatch is a defect and panics in the kernel's entry checks, never out of bounds.
pub trait Compute: Send + Sync {
    /// For logs: backend, instruction set, threads.
    fn name(&self) -> String;
    /// What decides the bits beside the dtype: backend and instruction set. Nodes of one mesh must agree on it.
    fn kind(&self) -> String;
    /// The compute dtype.
    fn dtype(&self) -> Dtype;
    /// Called once by a thread that will make most of the calls: binds it to its processor, if the backend binds threads.
    fn bind_thread(&self) {}
    /// How packed weights lie, dtype included: equal names, equal bytes, whatever the instruction set. In letters, digits
    /// and `-`.
    fn layout(&self) -> String;
    /// Packs matrices of equal `k`, stacked along `n` in the order given (so q, k and v are one GEMM).
    fn pack(&self, parts: &[MatrixView<'_>]) -> Matrix;
    /// Packs an FFN: `gate` and `up` are `[intermediate, hidden]`, `down` is `[hidden, intermediate]`.
    fn pack_ffn(&self, gate: MatrixView<'_>, up: MatrixView<'_>, down: MatrixView<'_>) -> Ffn;
    /// `out[rows][n] = x[rows][k] w^T`.
    fn linear(&self, w: &Matrix, x: Rows<'_>, out: &mut [f32]);
    /// Runs every group; work is shared over groups and within them. The intermediate is rounded to `dtype()`.
    fn ffn(&self, groups: &mut [FfnGroup<'_>]);
    /// `out = x / rms(x) * weight`, rounded to `dtype()`; `x` is `[rows][cols]`, sums in f32.
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: RowsMut<'_>);
    /// The same in place and in f32, over each consecutive `weight.len()` elements of rows `stride` apart, starting at
    /// `offset` in each row and covering `count` such groups (per-head q/k norms: `count` heads; whole: 1).
    fn rms_norm_heads(&self, x: &mut [f32], stride: usize, offset: usize, count: usize, weight: &[f32], eps: f32);
    /// Rotates `heads` heads of each row in place; `x` rows are `stride` apart and the heads start at `offset`.
    fn rotate(&self, x: &mut [f32], stride: usize, offset: usize, heads: usize, positions: &[u32], rope: &Rope);
    /// A cache of `shape`, zeroed.
    fn kv_cache(&self, shape: KvShape) -> KvCache;
    /// Stores one token's K and V (`kv_heads * head_dim` each), rounded to `dtype()`, at `slot` of `page`.
    fn kv_write(&self, cache: &mut KvCache, layer: usize, page: u32, slot: usize, k: &[f32], v: &[f32]);
    /// Softmax attention of `q` (rows `q_stride` apart, `heads * head_dim` used) over the cache; `out` is `[rows][heads * head_dim]`.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        cache: &KvCache,
        layer: usize,
        q: &[f32],
        q_stride: usize,
        rows: &[QueryRow<'_>],
        shape: AttentionShape,
        out: RowsMut<'_>,
    );
    /// `residual[row] += sum(weight * term)` over `per_row` terms of each row, summed from zero in the order given, then added.
    fn combine(&self, residual: &mut [f32], cols: usize, per_row: usize, terms: &[Term<'_>]);
    /// Rounds f32 rows to `dtype()`.
    fn narrow(&self, x: &[f32], out: RowsMut<'_>);
}
