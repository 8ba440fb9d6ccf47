//! Products of widened inputs: with more than a few rows, inputs are widened to f32 once before, for all weights, and what a
//! micro-kernel has next to its multiplications is little else than widening weights.

#![allow(clippy::needless_range_loop)]

use super::gemm::{ASK_AGAIN_STEPS, ASK_STEPS, Panel, Pass, Product, Source, TILE_COLS, WIDENED_F32};
use super::isa::Asking;
use super::simd::{ROWS_MAX, Simd, TILE_BLOCKS};
use crate::matrix::LANES;
use crate::{Dtype, bf16};

/// Elements between widened rows: those of neighbours at the same place go to different lines of the cache.
const APART: usize = 256;

/// Widens rows `from..to` of a product into `widened`, or copies those of f32. An odd number of inputs is followed by a zero, as in
/// the packed weights.
/// # Safety
/// Rows `from..to` of `x` hold `k` elements.
#[inline(always)]
pub(crate) unsafe fn inputs<'a, S: Simd>(
    s: S,
    p: &Product<'_>,
    from: usize,
    to: usize,
    widened: &'a mut Vec<f32>,
) -> Source<'a> {
    let stride = p.k.next_multiple_of(2) + APART;
    if widened.len() < (to - from) * stride {
        widened.resize((to - from) * stride, 0.0);
    }
    for (row, wide) in (from..to).zip(widened.chunks_exact_mut(stride)) {
        // SAFETY: a row holds `k` elements, and vectors end before `k`.
        unsafe {
            let (inputs, whole) = (p.x.row(row), p.k - p.k % LANES);
            for at in (0..whole).step_by(LANES) {
                s.store(wide.as_mut_ptr().add(at), s.load_as(p.dtype, inputs.add(at * p.dtype.bytes())));
            }
            for at in whole..p.k {
                wide[at] = match p.dtype {
                    Dtype::Bf16 => bf16::widen(inputs.cast::<u16>().add(at).read_unaligned()),
                    Dtype::F32 => inputs.cast::<f32>().add(at).read_unaligned(),
                };
            }
        }
        wide[p.k..p.k.next_multiple_of(2)].fill(0.0);
    }
    let bytes = widened.as_ptr().cast::<u8>();
    // SAFETY: the vector holds that many f32, and whoever holds it mutably is here.
    let bytes = unsafe { std::slice::from_raw_parts(bytes, size_of_val(widened.as_slice())) };
    Source::Strided { bytes, stride: stride * size_of::<f32>() }
}

/// The micro-kernel: as that of [`super::gemm`]. Meanwhile it asks for its part of the next steps' weights, after a panel's
/// last ones for the next panel's, also beyond this task: its thread's next task has those that follow. All passes together ask
/// for all of them, evenly; into the second-level cache, for the first has no room for those of this chunk and the next.
/// # Safety
/// As there; rows of `x` are f32 and padded to an even number, and where `NR` is more than one its blocks lie side by side.
#[inline(always)]
pub(crate) unsafe fn kernel<S: Simd, const KIND: u8, const MR: usize, const NR: usize>(
    s: S,
    first: usize,
    x: &[*const u8; ROWS_MAX],
    panel: &Panel<'_>,
    pass: &Pass,
    sums: *mut f32,
) {
    let inputs_a_step = if KIND == WIDENED_F32 { 1 } else { 2 };
    let (steps, blocks) = (&pass.steps, panel.blocks_from(first));
    let (at, count) = (blocks.at(steps.start), steps.len());
    // What is asked for meanwhile: from where on, and how far from a step to the next.
    let (next, stride) = if panel.passes == 1 && NR == TILE_BLOCKS {
        (blocks.at(ASK_STEPS), blocks.at(1).addr() - blocks.at(0).addr())
    } else {
        let (stride, beside) = (NR * panel.asks_bytes, panel.beside(first));
        let next = if steps.end == panel.k.div_ceil(inputs_a_step) {
            panel.blocks_from(0).at(0).wrapping_add((beside + panel.blocks) * panel.block_bytes)
        } else {
            panel.blocks_from(beside).at(steps.end)
        };
        // Those before are asked for by the blocks before.
        (next.wrapping_add(((first - beside) / NR * panel.passes + pass.number) * count * stride), stride)
    };
    // The first pass asks for its own a second time, soon before it reads them; the others find them.
    let again = panel.asking == Asking::Twice && pass.number == 0;
    let again = if again { blocks.further(at, 0, ASK_AGAIN_STEPS).addr() - at.addr() } else { 0 };
    let x: [*const f32; MR] = std::array::from_fn(|i| x[i].cast());
    let mut acc = [[s.splat(0.0); NR]; MR];
    // SAFETY: every weight read lies in the blocks, every input and sum in its row.
    unsafe {
        let sums = sums.add(first * LANES);
        if steps.start > 0 {
            for i in 0..MR {
                for j in 0..NR {
                    acc[i][j] = s.load(sums.add(i * TILE_COLS + j * LANES));
                }
            }
        }
        for step in 0..count {
            for j in 0..NR {
                s.prefetch_far(next.wrapping_add(step * stride + j * LANES * 4));
            }
            let w = blocks.further(at, 0, step);
            if const { S::KEEPS_WEIGHTS } {
                for j in 0..NR {
                    s.prefetch(w.wrapping_add(again + j * LANES * 4));
                }
            }
            let input = (steps.start + step) * inputs_a_step;
            for half in 0..inputs_a_step {
                let weight = |w: *const u8| {
                    if KIND == WIDENED_F32 { s.load(w.cast()) } else { s.half(half, w.cast()) }
                };
                if const { S::KEEPS_WEIGHTS } {
                    let mut weights = [weight(w); NR];
                    for j in 1..NR {
                        weights[j] = weight(blocks.further(w, j, 0));
                    }
                    for i in 0..MR {
                        let value = s.splat(x[i].wrapping_add(input + half).read_unaligned());
                        for j in 0..NR {
                            acc[i][j] = s.fma(value, weights[j], acc[i][j]);
                        }
                    }
                    continue;
                }
                for j in 0..NR {
                    // One reading for each half, and inputs for each block: what is kept takes the sums' registers.
                    s.compiler_barrier();
                    let weights = weight(blocks.further(w, j, 0));
                    for i in 0..MR {
                        let value = s.splat(x[i].wrapping_add(input + half).read_unaligned());
                        acc[i][j] = s.fma(value, weights, acc[i][j]);
                    }
                }
            }
        }
        for i in 0..MR {
            for j in 0..NR {
                s.store(sums.add(i * TILE_COLS + j * LANES), acc[i][j]);
            }
        }
    }
}
