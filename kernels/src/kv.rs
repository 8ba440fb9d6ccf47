//! The paged KV cache: pages of [`KV_PAGE_TOKENS`] positions, in the compute dtype.
//!
//! K lies transposed, `[layer][page][kv_head][head_dim][32]`, so that the scores of a page's positions are lanes of one
//! sum over the head; V lies `[layer][page][kv_head][32][head_dim padded to 16]`, so that outputs are lanes.

use std::ops::Range;

use crate::matrix::LANES;
use crate::memory::AlignedBuf;
use crate::{Dtype, KV_PAGE_TOKENS, KernelError, bf16};

/// How large a cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// Pages of [`KV_PAGE_TOKENS`] tokens; a page id stands for that page in every layer.
    pub pages: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements in a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of a cache of this shape, K and V together; `None` if a dimension is zero or the size overflows.
    pub fn bytes(&self, dtype: Dtype) -> Option<usize> {
        self.halves(dtype).and_then(|(k, v)| k.checked_add(v))
    }

    // Bytes of K and of V.
    fn halves(&self, dtype: Dtype) -> Option<(usize, usize)> {
        if self.layers == 0 || self.pages == 0 || self.kv_heads == 0 || self.head_dim == 0 {
            return None;
        }
        let blocks = self.layers.checked_mul(self.pages)?.checked_mul(self.kv_heads)?;
        let line = KV_PAGE_TOKENS * dtype.bytes();
        let k = blocks.checked_mul(self.head_dim.checked_mul(line)?)?;
        let v = blocks.checked_mul(self.head_dim.checked_next_multiple_of(LANES)?.checked_mul(line)?)?;
        Some((k, v))
    }
}

/// K and V of every layer, in pages.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    dtype: Dtype,
    k: AlignedBuf,
    v: AlignedBuf,
}

impl KvCache {
    /// A zeroed cache.
    pub fn new(shape: KvShape, dtype: Dtype) -> Result<KvCache, KernelError> {
        let (k_bytes, v_bytes) = shape.halves(dtype).ok_or(KernelError::KvShape { shape, dtype })?;
        Ok(KvCache { shape, dtype, k: AlignedBuf::zeroed(k_bytes)?, v: AlignedBuf::zeroed(v_bytes)? })
    }

    /// Its shape.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Its element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Pages it has.
    pub fn pages(&self) -> usize {
        self.shape.pages
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.k.len() + self.v.len()
    }

    /// Elements between a V row and the next.
    pub(crate) fn v_stride(&self) -> usize {
        self.shape.head_dim.next_multiple_of(LANES)
    }

    /// K of one page and head: `[head_dim][32]`.
    pub(crate) fn k_block(&self, layer: usize, page: u32, head: usize) -> &[u8] {
        &self.k.as_slice()[self.block(layer, page, head, self.shape.head_dim)]
    }

    /// V of one page and head: `[32][v_stride]`.
    pub(crate) fn v_block(&self, layer: usize, page: u32, head: usize) -> &[u8] {
        &self.v.as_slice()[self.block(layer, page, head, self.v_stride())]
    }

    /// Stores one token's K and V at `slot` of `page`, rounded to the cache's dtype.
    pub(crate) fn write(&mut self, layer: usize, page: u32, slot: usize, k: &[f32], v: &[f32]) {
        let (shape, dtype) = (self.shape, self.dtype);
        let width = shape.kv_heads * shape.head_dim;
        assert!(slot < KV_PAGE_TOKENS, "slot {slot} is outside a page");
        assert_eq!((k.len(), v.len()), (width, width), "k or v of another width than the cache's");
        let size = dtype.bytes();
        for head in 0..shape.kv_heads {
            let from = head * shape.head_dim..(head + 1) * shape.head_dim;
            let block = self.block(layer, page, head, shape.head_dim);
            let k_block = &mut self.k.as_mut_slice()[block];
            for (line, &value) in k_block.chunks_exact_mut(KV_PAGE_TOKENS * size).zip(&k[from.clone()]) {
                put(dtype, &mut line[slot * size..][..size], value);
            }
            let block = self.block(layer, page, head, self.v_stride());
            let row_bytes = self.v_stride() * size;
            let v_row = &mut self.v.as_mut_slice()[block][slot * row_bytes..][..row_bytes];
            for (place, &value) in v_row.chunks_exact_mut(size).zip(&v[from]) {
                put(dtype, place, value);
            }
        }
    }

    /// One element of K, for the reference.
    pub(crate) fn k_at(&self, layer: usize, page: u32, head: usize, slot: usize, dim: usize) -> f32 {
        get(self.dtype, self.k_block(layer, page, head), dim * KV_PAGE_TOKENS + slot)
    }

    /// One element of V, for the reference.
    pub(crate) fn v_at(&self, layer: usize, page: u32, head: usize, slot: usize, dim: usize) -> f32 {
        get(self.dtype, self.v_block(layer, page, head), slot * self.v_stride() + dim)
    }

    fn block(&self, layer: usize, page: u32, head: usize, lines: usize) -> Range<usize> {
        let KvShape { layers, pages, kv_heads, .. } = self.shape;
        let page = page as usize;
        assert!(
            layer < layers && page < pages && head < kv_heads,
            "layer {layer}, page {page} or head {head} is not in the cache"
        );
        let bytes = lines * KV_PAGE_TOKENS * self.dtype.bytes();
        let index = (layer * pages + page) * kv_heads + head;
        index * bytes..(index + 1) * bytes
    }
}

#[inline(always)]
fn put(dtype: Dtype, place: &mut [u8], value: f32) {
    match dtype {
        Dtype::F32 => place.copy_from_slice(&value.to_le_bytes()),
        Dtype::Bf16 => place.copy_from_slice(&bf16::narrow(value).to_le_bytes()),
    }
}

fn get(dtype: Dtype, block: &[u8], index: usize) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes(block.as_chunks().0[index]),
        Dtype::Bf16 => bf16::widen(u16::from_le_bytes(block.as_chunks().0[index])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { layers: 2, pages: 3, kv_heads: 2, head_dim: 5 };

    #[test]
    fn what_is_written_is_read_back_and_nothing_else_changes() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let mut cache = KvCache::new(SHAPE, dtype).unwrap();
            let k: Vec<f32> = (0..10).map(|i| i as f32 + 1.0).collect();
            let v: Vec<f32> = k.iter().map(|x| -x).collect();
            cache.write(1, 2, 31, &k, &v);
            for head in 0..2 {
                for dim in 0..5 {
                    assert_eq!(cache.k_at(1, 2, head, 31, dim), k[head * 5 + dim]);
                    assert_eq!(cache.v_at(1, 2, head, 31, dim), v[head * 5 + dim]);
                }
            }
            let set =
                |buf: &AlignedBuf| buf.as_slice().chunks(dtype.bytes()).filter(|c| c.iter().any(|&b| b != 0)).count();
            assert_eq!((set(&cache.k), set(&cache.v)), (10, 10));
        }
    }

    #[test]
    fn bytes_count_both_halves_and_the_padding() {
        let cache = KvCache::new(SHAPE, Dtype::Bf16).unwrap();
        assert_eq!(cache.bytes(), 2 * 3 * 2 * 32 * 2 * (5 + 16));
        assert_eq!(SHAPE.bytes(Dtype::Bf16), Some(cache.bytes()));
        assert_eq!(cache.pages(), 3);
    }

    #[test]
    fn empty_and_absurd_shapes_are_errors() {
        for shape in [KvShape { pages: 0, ..SHAPE }, KvShape { pages: usize::MAX / 2, ..SHAPE }] {
            let error = KvCache::new(shape, Dtype::F32).unwrap_err();
            assert!(matches!(error, KernelError::KvShape { .. }), "{error}");
        }
    }
}
