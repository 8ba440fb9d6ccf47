//! Packing: output channels across lanes, once, when weights are loaded.

use super::pool::{Parts, Pool};
use crate::matrix::{LANES, Layout, Matrix, block_bytes, check_ffn, out_of_memory, stacked_shape};
use crate::memory::AlignedBuf;
use crate::rows::MatrixView;
use crate::{Dtype, Ffn, bf16};

/// Inputs packed for all lanes before going on, so that what is written stays in the first-level cache.
const INPUTS: usize = 64;

/// Packs matrices stacked along `n`, with so many blocks side by side.
pub(crate) fn pack(pool: &Pool, dtype: Dtype, side_by_side: usize, parts: &[MatrixView<'_>]) -> Matrix {
    let (n, k) = stacked_shape(parts);
    let rows: Vec<Row<'_>> = parts.iter().flat_map(|part| (0..part.n).map(|i| Row::of(part, i))).collect();
    let rows_of = |block: usize| &rows[block * LANES..n.min((block + 1) * LANES)];
    let data = pack_lanes(pool, dtype, side_by_side, n.div_ceil(LANES), k, rows_of);
    let layout = Layout::of_blocks(side_by_side, false);
    Matrix { n, k, dtype, layout, data: data.into() }
}

/// Packs an FFN, gate and up in turn.
pub(crate) fn pack_ffn(
    pool: &Pool,
    dtype: Dtype,
    side_by_side: usize,
    gate: MatrixView<'_>,
    up: MatrixView<'_>,
    down: MatrixView<'_>,
) -> Ffn {
    check_ffn(&gate, &up, &down);
    stacked_shape(&[gate, up]);
    let halves = [gate, up].map(|half| (0..half.n).map(|i| Row::of(&half, i)).collect::<Vec<_>>());
    let (n, k) = (gate.n, gate.k);
    let data = pack_lanes(pool, dtype, side_by_side, 2 * n.div_ceil(LANES), k, |block| {
        let first = block / 2 * LANES;
        &halves[block % 2][first..n.min(first + LANES)]
    });
    let layout = Layout::of_blocks(side_by_side, true);
    let gate_up = Matrix { n: 2 * n, k, dtype, layout, data: data.into() };
    Ffn { gate_up, down: pack(pool, dtype, side_by_side, &[down]) }
}

/// One output's weights as the checkpoint holds them.
#[derive(Clone, Copy)]
struct Row<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
}

impl<'a> Row<'a> {
    fn of(matrix: &MatrixView<'a>, index: usize) -> Row<'a> {
        let row_bytes = matrix.k * matrix.dtype.bytes();
        Row { dtype: matrix.dtype, bytes: &matrix.bytes[index * row_bytes..][..row_bytes] }
    }
}

/// Packs `blocks` blocks, of which `rows_of` gives up to sixteen outputs; lanes without one stay zero.
fn pack_lanes<'r, 'a: 'r>(
    pool: &Pool,
    dtype: Dtype,
    side_by_side: usize,
    blocks: usize,
    k: usize,
    rows_of: impl Fn(usize) -> &'r [Row<'a>] + Sync,
) -> AlignedBuf {
    let size = block_bytes(dtype, k);
    let mut data = AlignedBuf::for_weights(blocks * size).unwrap_or_else(|error| out_of_memory(&error));
    let shared = Parts::new(data.as_mut_slice());
    pool.run(blocks.div_ceil(side_by_side), (blocks * size) as u64, |panel| {
        let first = panel * side_by_side;
        let width = side_by_side.min(blocks - first);
        // SAFETY: panels do not overlap, and `data` outlives the run.
        let out = unsafe { shared.part(first * size, width * size) };
        for from in (0..k).step_by(INPUTS) {
            let to = k.min(from + INPUTS);
            for block in 0..width {
                for (lane, row) in rows_of(first + block).iter().enumerate() {
                    pack_lane(dtype, *row, block * LANES + lane, width * LANES, from, to, out);
                }
            }
        }
    });
    data
}

/// Inputs `from..to` (from an even number) of one lane of `lanes` that lie side by side.
fn pack_lane(dtype: Dtype, row: Row<'_>, lane: usize, lanes: usize, from: usize, to: usize, out: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            let out = &mut out.as_chunks_mut::<4>().0[from * lanes + lane..];
            let places = out.iter_mut().step_by(lanes);
            match row.dtype {
                Dtype::F32 => {
                    for (place, value) in places.zip(&row.bytes.as_chunks::<4>().0[from..to]) {
                        *place = *value;
                    }
                }
                Dtype::Bf16 => {
                    for (place, value) in places.zip(&row.bytes.as_chunks::<2>().0[from..to]) {
                        *place = bf16::widen(u16::from_le_bytes(*value)).to_le_bytes();
                    }
                }
            }
        }
        Dtype::Bf16 => {
            // Pairs of neighbouring inputs; a last odd one keeps the zero beside it.
            let out = &mut out.as_chunks_mut::<4>().0[from / 2 * lanes + lane..];
            let places = out.iter_mut().step_by(lanes);
            match row.dtype {
                Dtype::Bf16 => {
                    for (place, pair) in places.zip(row.bytes[from * 2..to * 2].chunks(4)) {
                        place[..pair.len()].copy_from_slice(pair);
                    }
                }
                Dtype::F32 => {
                    for (place, pair) in places.zip(row.bytes.as_chunks::<4>().0[from..to].chunks(2)) {
                        for (half, value) in place.chunks_mut(2).zip(pair) {
                            half.copy_from_slice(&bf16::narrow(f32::from_le_bytes(*value)).to_le_bytes());
                        }
                    }
                }
            }
        }
    }
}
