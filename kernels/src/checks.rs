//! The entry checks: shapes are the caller's promise, and a broken promise panics here, before any pointer is made.

use crate::kv::KvCache;
use crate::rows::{Rows, RowsMut};
use crate::{AttentionShape, Dtype, FfnGroup, KV_PAGE_TOKENS, Matrix, QueryRow, Rope, Term};

/// `linear`; returns the number of rows.
pub(crate) fn linear(dtype: Dtype, w: &Matrix, x: &Rows<'_>, out: &[f32]) -> usize {
    assert_eq!((w.dtype, x.dtype), (dtype, dtype), "linear takes weights and rows in the compute dtype");
    assert_eq!(x.cols, w.k, "linear: rows of another width than the weights");
    let rows = x.rows();
    assert_eq!(x.bytes.len(), rows * x.cols * dtype.bytes(), "linear: a broken row");
    assert_eq!(out.len(), rows * w.n, "linear: out is not rows x n");
    rows
}

/// `ffn`.
pub(crate) fn ffn(dtype: Dtype, groups: &[FfnGroup<'_>]) {
    for group in groups {
        let row_bytes = group.weights.hidden() * dtype.bytes();
        assert_eq!(group.weights.gate_up.dtype, dtype, "ffn takes weights in the compute dtype");
        assert_eq!(group.x.len(), group.out.len(), "ffn: as many places as rows");
        assert!(group.x.iter().all(|row| row.len() == row_bytes), "ffn: a row of another width than the expert");
        assert!(group.out.iter().all(|row| row.len() == row_bytes), "ffn: a place of another width than the expert");
    }
}

/// An output of `rows` x `cols` in the compute dtype.
pub(crate) fn out(dtype: Dtype, out: &RowsMut<'_>, elements: usize) {
    assert_eq!(out.dtype, dtype, "rows come out in the compute dtype");
    assert_eq!(out.bytes.len(), elements * dtype.bytes(), "out has another size than the rows");
}

/// Heads inside rows that lie `stride` apart; returns the number of rows.
pub(crate) fn heads(len: usize, stride: usize, offset: usize, width: usize) -> usize {
    assert!(stride > 0 && offset + width <= stride, "heads reach past the row");
    assert_eq!(len % stride, 0, "a broken row");
    len / stride
}

/// `rotate`.
pub(crate) fn rotate(len: usize, stride: usize, offset: usize, heads: usize, positions: &[u32], rope: &Rope) {
    let rows = self::heads(len, stride, offset, heads * 2 * rope.inv_freq.len());
    assert_eq!(rows, positions.len(), "rotate: one position a row");
}

/// `combine`; returns the number of rows.
pub(crate) fn combine(dtype: Dtype, residual: &[f32], cols: usize, per_row: usize, terms: &[Term<'_>]) -> usize {
    assert!(cols > 0 && residual.len().is_multiple_of(cols), "combine: a broken row");
    let rows = residual.len() / cols;
    assert_eq!(terms.len(), rows * per_row, "combine: per_row terms for every row");
    assert!(terms.iter().all(|term| term.row.len() == cols * dtype.bytes()), "combine: a term of another width");
    rows
}

/// `attention`.
pub(crate) fn attention(
    cache: &KvCache,
    dtype: Dtype,
    q: &[f32],
    q_stride: usize,
    rows: &[QueryRow<'_>],
    shape: &AttentionShape,
    out: &RowsMut<'_>,
) {
    let kv = cache.shape();
    let width = shape.heads * kv.head_dim;
    assert_eq!(cache.dtype(), dtype, "attention takes a cache in the compute dtype");
    assert!(shape.heads > 0 && shape.heads.is_multiple_of(kv.kv_heads), "query heads are not a multiple of KV heads");
    assert!(q_stride >= width, "attention: heads reach past the row");
    assert!(rows.is_empty() || q.len() >= (rows.len() - 1) * q_stride + width, "attention: q is short");
    assert_ne!(shape.window, Some(0), "a window of nothing");
    self::out(dtype, out, rows.len() * width);
    for row in rows {
        let last = row.position as usize / KV_PAGE_TOKENS;
        assert!(last < row.pages.len(), "position {} is past the row's pages", row.position);
        let used = &row.pages[first_visible(row.position, shape.window) as usize / KV_PAGE_TOKENS..=last];
        assert!(used.iter().all(|&page| (page as usize) < kv.pages), "a page outside the cache");
    }
}

/// The first position that a token at `position` sees.
pub(crate) fn first_visible(position: u32, window: Option<u32>) -> u32 {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_of_n_shows_a_token_itself_and_the_n_minus_one_before_it() {
        assert_eq!(first_visible(5, None), 0);
        assert_eq!(first_visible(5, Some(1)), 5);
        assert_eq!(first_visible(5, Some(3)), 3);
        assert_eq!(first_visible(5, Some(6)), 0);
        assert_eq!(first_visible(5, Some(u32::MAX)), 0);
    }
}
