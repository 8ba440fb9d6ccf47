//! The oracle: scalar loops that say what the other backends must compute, in the order it is defined in.

use crate::kv::{KvCache, KvShape};
use crate::matrix::check_ffn;
use crate::rows::{MatrixView, Rows, RowsMut, narrow_into, widen};
use crate::{
    AttentionShape, Compute, Dtype, Ffn, FfnGroup, KV_PAGE_TOKENS, Matrix, QueryRow, Rope, Term, checks, pointwise,
};

/// The readable backend, one thread.
#[derive(Clone, Copy, Debug)]
pub struct Reference {
    dtype: Dtype,
}

impl Reference {
    /// A reference that computes in `dtype`.
    pub fn new(dtype: Dtype) -> Reference {
        Reference { dtype }
    }
}

// out[j] = sum over k, ascending, of x[k] * w[j][k].
fn multiply(w: &[f32], x: &[f32], out: &mut [f32]) {
    for (out, w) in out.iter_mut().zip(w.chunks_exact(x.len())) {
        *out = w.iter().zip(x).fold(0.0, |sum, (w, x)| sum + w * x);
    }
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

impl Compute for Reference {
    fn name(&self) -> String {
        format!("reference {}", self.dtype)
    }

    fn kind(&self) -> String {
        "reference".into()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn layout(&self) -> String {
        format!("rows-{}", self.dtype)
    }

    fn pack(&self, parts: &[MatrixView<'_>]) -> Matrix {
        Matrix::row_major(self.dtype, parts)
    }

    fn pack_ffn(&self, gate: MatrixView<'_>, up: MatrixView<'_>, down: MatrixView<'_>) -> Ffn {
        check_ffn(&gate, &up, &down);
        Ffn { gate_up: self.pack(&[gate, up]), down: self.pack(&[down]) }
    }

    fn linear(&self, w: &Matrix, x: Rows<'_>, out: &mut [f32]) {
        let rows = checks::linear(self.dtype, w, &x, out);
        if w.n == 0 {
            return;
        }
        let weights = widen(w.dtype, w.data.as_slice());
        for (row, out) in (0..rows).zip(out.chunks_exact_mut(w.n)) {
            multiply(&weights, &widen(x.dtype, x.row(row)), out);
        }
    }

    fn ffn(&self, groups: &mut [FfnGroup<'_>]) {
        checks::ffn(self.dtype, groups);
        for group in groups {
            let (hidden, intermediate) = (group.weights.hidden(), group.weights.intermediate());
            let gate_up = widen(self.dtype, group.weights.gate_up.data.as_slice());
            let down = widen(self.dtype, group.weights.down.data.as_slice());
            for (x, out) in group.x.iter().zip(&mut group.out) {
                let mut both = vec![0f32; 2 * intermediate];
                multiply(&gate_up, &widen(self.dtype, x), &mut both);
                let (gate, up) = both.split_at(intermediate);
                let product: Vec<f32> = gate.iter().zip(up).map(|(&gate, up)| silu(gate) * up).collect();
                let mut rounded = vec![0u8; intermediate * self.dtype.bytes()];
                narrow_into(self.dtype, &product, &mut rounded);
                let mut result = vec![0f32; hidden];
                multiply(&down, &widen(self.dtype, &rounded), &mut result);
                narrow_into(self.dtype, &result, out);
            }
        }
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, mut out: RowsMut<'_>) {
        checks::out(self.dtype, &out, x.len());
        for (row, x) in x.chunks_exact(weight.len()).enumerate() {
            pointwise::rms_norm_row(self.dtype, x, weight, eps, out.row(row));
        }
    }

    fn rms_norm_heads(&self, x: &mut [f32], stride: usize, offset: usize, count: usize, weight: &[f32], eps: f32) {
        checks::heads(x.len(), stride, offset, count * weight.len());
        for row in x.chunks_exact_mut(stride) {
            for head in row[offset..][..count * weight.len()].chunks_exact_mut(weight.len()) {
                pointwise::rms_norm_head(head, weight, eps);
            }
        }
    }

    fn rotate(&self, x: &mut [f32], stride: usize, offset: usize, heads: usize, positions: &[u32], rope: &Rope) {
        checks::rotate(x.len(), stride, offset, heads, positions, rope);
        let mut angles = vec![0f32; 2 * rope.inv_freq.len()];
        for (row, &position) in x.chunks_exact_mut(stride).zip(positions) {
            pointwise::angles_into(rope, position, &mut angles);
            pointwise::rotate_heads(&mut row[offset..][..heads * angles.len()], &angles);
        }
    }

    fn kv_cache(&self, shape: KvShape) -> KvCache {
        KvCache::new(shape, self.dtype).unwrap_or_else(|error| panic!("{error}"))
    }

    fn kv_write(&self, cache: &mut KvCache, layer: usize, page: u32, slot: usize, k: &[f32], v: &[f32]) {
        cache.write(layer, page, slot, k, v);
    }

    fn attention(
        &self,
        cache: &KvCache,
        layer: usize,
        q: &[f32],
        q_stride: usize,
        rows: &[QueryRow<'_>],
        shape: AttentionShape,
        mut out: RowsMut<'_>,
    ) {
        checks::attention(cache, self.dtype, q, q_stride, rows, &shape, &out);
        let KvShape { kv_heads, head_dim, .. } = cache.shape();
        for (index, row) in rows.iter().enumerate() {
            let mut result = vec![0f32; shape.heads * head_dim];
            for (head, result) in result.chunks_exact_mut(head_dim).enumerate() {
                let kv_head = head / (shape.heads / kv_heads);
                let q = &q[index * q_stride + head * head_dim..][..head_dim];
                let seen = checks::first_visible(row.position, shape.window)..=row.position;
                let places = seen.map(|p| (row.pages[p as usize / KV_PAGE_TOKENS], p as usize % KV_PAGE_TOKENS));
                let score = |(page, slot)| -> f32 {
                    let product = |d| q[d] * cache.k_at(layer, page, kv_head, slot, d);
                    (0..head_dim).map(product).sum::<f32>() * shape.scale
                };
                let scores: Vec<f32> = places.clone().map(score).collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f32 = weights.iter().sum();
                for ((page, slot), weight) in places.zip(&weights) {
                    for (d, result) in result.iter_mut().enumerate() {
                        *result += weight / total * cache.v_at(layer, page, kv_head, slot, d);
                    }
                }
            }
            narrow_into(self.dtype, &result, out.row(index));
        }
    }

    fn combine(&self, residual: &mut [f32], cols: usize, per_row: usize, terms: &[Term<'_>]) {
        checks::combine(self.dtype, residual, cols, per_row, terms);
        for (row, residual) in residual.chunks_exact_mut(cols).enumerate() {
            pointwise::combine_row(self.dtype, residual, &terms[row * per_row..][..per_row]);
        }
    }

    fn narrow(&self, x: &[f32], out: RowsMut<'_>) {
        checks::out(self.dtype, &out, x.len());
        narrow_into(self.dtype, x, out.bytes);
    }
}
