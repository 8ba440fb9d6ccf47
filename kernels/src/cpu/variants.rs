//! Kernels that break invariance, to measure what invariance costs: what a row becomes depends on how many rows it is
//! computed with. Only benchmarks make a backend of them ([`super::Cpu::breaking_invariance`]).
//!
//! - A product of few rows sums each output in several parts at once, which hides the latency of one sum; one of many
//!   rows has sums enough in flight.
//! - Attention takes as many pages in a step of its softmax as there are, up to sixteen, from where its queries begin to see.
//! - Combine adds each contribution to the residual as it comes, and takes no sum of its own.

#![allow(clippy::needless_range_loop)]

use super::attend::{self, Attend};
use super::gemm::{self, Panel, Product, Scratch, TILE_COLS};
use super::simd::{Simd, TILE_BLOCKS};
use crate::matrix::LANES;
use crate::{Dtype, Term, bf16};

/// Rows of which each output is summed in parts.
const FEW_ROWS: usize = 3;
/// Pages of one step of the softmax.
const STEP_PAGES: usize = 16;

/// # Safety
/// As [`gemm::product`].
#[inline(always)]
pub(crate) unsafe fn product<S: Simd>(s: S, p: &Product<'_>, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe {
        match (p.rows.len(), p.dtype) {
            (1, Dtype::Bf16) => few::<S, true, 1, 4>(s, p),
            (2, Dtype::Bf16) => few::<S, true, 2, 2>(s, p),
            (FEW_ROWS, Dtype::Bf16) => few::<S, true, FEW_ROWS, 2>(s, p),
            (1, Dtype::F32) => few::<S, false, 1, 4>(s, p),
            (2, Dtype::F32) => few::<S, false, 2, 2>(s, p),
            (FEW_ROWS, Dtype::F32) => few::<S, false, FEW_ROWS, 2>(s, p),
            _ => gemm::product(s, p, scratch),
        }
    }
}

/// # Safety
/// As [`gemm::product`], for `MR` rows.
#[inline(always)]
unsafe fn few<S: Simd, const BF16: bool, const MR: usize, const PARTS: usize>(s: S, p: &Product<'_>) {
    let mut x = [std::ptr::null(); MR];
    for i in 0..MR {
        x[i] = p.x.row(p.rows.start + i);
    }
    let mut block = p.blocks.start;
    while block < p.blocks.end {
        let panel = Panel::of(p, block, 1);
        let blocks = panel.blocks;
        let mut tile = [[0f32; TILE_COLS]; MR];
        // SAFETY: the panel exists; the rest is the caller's promise.
        unsafe {
            let (wide, mut first) = (S::blocks(MR, BF16), 0);
            while first < blocks {
                if wide == TILE_BLOCKS && blocks == TILE_BLOCKS {
                    in_parts::<S, BF16, MR, TILE_BLOCKS, PARTS>(s, p, &panel, &x, &mut tile, first);
                    first += TILE_BLOCKS;
                } else if wide >= 2 && first + 1 < blocks {
                    in_parts::<S, BF16, MR, 2, PARTS>(s, p, &panel, &x, &mut tile, first);
                    first += 2;
                } else {
                    in_parts::<S, BF16, MR, 1, PARTS>(s, p, &panel, &x, &mut tile, first);
                    first += 1;
                }
            }
            for i in 0..MR {
                gemm::finish(s, p, block, blocks, &tile[i], p.out.row(p.rows.start + i));
            }
        }
        block += blocks;
    }
}

/// # Safety
/// As `few`, for blocks `first..first + NR` of the panel.
#[inline(always)]
unsafe fn in_parts<S: Simd, const BF16: bool, const MR: usize, const NR: usize, const PARTS: usize>(
    s: S,
    p: &Product<'_>,
    panel: &Panel<'_>,
    x: &[*const u8; MR],
    tile: &mut [[f32; TILE_COLS]; MR],
    first: usize,
) {
    let mut sums = [[[s.splat(0.0); NR]; MR]; PARTS];
    // SAFETY: every weight read lies in the blocks, every input in the first k elements of its row.
    unsafe {
        let steps = if BF16 { p.k.div_ceil(2) } else { p.k };
        let mut step = 0;
        while step + PARTS <= steps {
            for part in 0..PARTS {
                one_step::<S, BF16, MR, NR>(s, p, panel, first, x, step + part, &mut sums[part]);
            }
            step += PARTS;
        }
        while step < steps {
            one_step::<S, BF16, MR, NR>(s, p, panel, first, x, step, &mut sums[0]);
            step += 1;
        }
        for i in 0..MR {
            for j in 0..NR {
                let mut sum = sums[0][i][j];
                for part in 1..PARTS {
                    sum = s.add(sum, sums[part][i][j]);
                }
                s.store(tile[i].as_mut_ptr().add((first + j) * LANES), sum);
            }
        }
    }
}

/// Adds the products of one step of K.
/// # Safety
/// As `in_parts`.
#[inline(always)]
unsafe fn one_step<S: Simd, const BF16: bool, const MR: usize, const NR: usize>(
    s: S,
    p: &Product<'_>,
    panel: &Panel<'_>,
    first: usize,
    x: &[*const u8; MR],
    step: usize,
    sums: &mut [[S::V; NR]; MR],
) {
    let blocks = panel.blocks_from(first);
    let at = blocks.at(step);
    gemm::ask::<S, NR>(s, p.asking, &blocks, at);
    // SAFETY: the caller's promise.
    unsafe {
        if BF16 {
            let mut weights = [s.load_pairs(at.cast()); NR];
            for j in 1..NR {
                weights[j] = s.load_pairs(blocks.further(at, j, 0).cast());
            }
            for i in 0..MR {
                // The last input of an odd number stands alone.
                let pair = if 2 * step + 1 == p.k {
                    u32::from(x[i].cast::<u16>().add(2 * step).read_unaligned())
                } else {
                    x[i].cast::<u32>().add(step).read_unaligned()
                };
                let pair = s.pair(pair);
                for j in 0..NR {
                    sums[i][j] = s.dot(sums[i][j], pair, weights[j]);
                }
            }
        } else {
            let mut weights = [s.load(at.cast()); NR];
            for j in 1..NR {
                weights[j] = s.load(blocks.further(at, j, 0).cast());
            }
            for i in 0..MR {
                let value = s.splat(x[i].cast::<f32>().add(step).read_unaligned());
                for j in 0..NR {
                    sums[i][j] = s.fma(value, weights[j], sums[i][j]);
                }
            }
        }
    }
}

/// # Safety
/// As [`attend::attend`].
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd>(s: S, a: &Attend<'_>, sums: &mut Vec<f32>) {
    // SAFETY: the caller's promise.
    unsafe { attend::attend::<S, STEP_PAGES, false>(s, a, sums) }
}

/// `residual += weight * term`, one term after another.
#[inline(always)]
pub(crate) fn combine_row(dtype: Dtype, residual: &mut [f32], terms: &[Term<'_>]) {
    for Term { weight, row } in terms {
        match dtype {
            Dtype::F32 => {
                for (residual, &value) in residual.iter_mut().zip(row.as_chunks().0) {
                    *residual += weight * f32::from_le_bytes(value);
                }
            }
            Dtype::Bf16 => {
                for (residual, &value) in residual.iter_mut().zip(row.as_chunks().0) {
                    *residual += weight * bf16::widen(u16::from_le_bytes(value));
                }
            }
        }
    }
}
