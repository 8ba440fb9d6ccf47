//! Packing: output channels across lanes, once, when weights are loaded.

use super::pool::{Parts, Pool};
use crate::matrix::{LANES, Layout, Matrix, block_bytes, check_ffn, out_of_memory, stacked_shape};
use crate::memory::AlignedBuf;
use crate::rows::MatrixView;
use crate::{Dtype, Ffn, bf16};

/// Inputs packed for all lanes before going on, so that what is written stays in the first-level cache.
const PANEL: usize = 64;

/// Packs matrices stacked along `n`.
pub(crate) fn pack(pool: &Pool, dtype: Dtype, parts: &[MatrixView<'_>]) -> Matrix {
    let (n, k) = stacked_shape(parts);
    let rows: Vec<Row<'_>> = parts.iter().flat_map(|part| (0..part.n).map(|i| Row::of(part, i))).collect();
    let data = pack_lanes(pool, dtype, n.div_ceil(LANES), k, |block| &rows[block * LANES..n.min((block + 1) * LANES)]);
    Matrix { n, k, dtype, layout: Layout::Lanes, data: data.into() }
}

/// Packs an FFN, gate and up in turn.
pub(crate) fn pack_ffn(
    pool: &Pool,
    dtype: Dtype,
    gate: MatrixView<'_>,
    up: MatrixView<'_>,
    down: MatrixView<'_>,
) -> Ffn {
    check_ffn(&gate, &up, &down);
    stacked_shape(&[gate, up]);
    let halves = [gate, up].map(|half| (0..half.n).map(|i| Row::of(&half, i)).collect::<Vec<_>>());
    let (n, k) = (gate.n, gate.k);
    let data = pack_lanes(pool, dtype, 2 * n.div_ceil(LANES), k, |block| {
        let first = block / 2 * LANES;
        &halves[block % 2][first..n.min(first + LANES)]
    });
    let gate_up = Matrix { n: 2 * n, k, dtype, layout: Layout::LanesInTurn, data: data.into() };
    Ffn { gate_up, down: pack(pool, dtype, &[down]) }
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
    blocks: usize,
    k: usize,
    rows_of: impl Fn(usize) -> &'r [Row<'a>] + Sync,
) -> AlignedBuf {
    let size = block_bytes(dtype, k);
    let mut data = AlignedBuf::for_weights(blocks * size).unwrap_or_else(|error| out_of_memory(&error));
    let shared = Parts::new(data.as_mut_slice());
    pool.run(blocks, (blocks * size) as u64, |block| {
        // SAFETY: blocks do not overlap, and `data` outlives the run.
        let out = unsafe { shared.part(block * size, size) };
        let rows = rows_of(block);
        for from in (0..k).step_by(PANEL) {
            let to = k.min(from + PANEL);
            for (lane, row) in rows.iter().enumerate() {
                pack_lane(dtype, *row, lane, from, to, out);
            }
        }
    });
    data
}

/// Inputs `from..to` (from an even number) of one lane.
fn pack_lane(dtype: Dtype, row: Row<'_>, lane: usize, from: usize, to: usize, out: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            let out = &mut out.as_chunks_mut::<4>().0[from * LANES + lane..];
            let places = out.iter_mut().step_by(LANES);
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
            let out = &mut out.as_chunks_mut::<4>().0[from / 2 * LANES + lane..];
            let places = out.iter_mut().step_by(LANES);
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
