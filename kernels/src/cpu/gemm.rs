//! The matrix product: one accumulator for each output element, walked over K in ascending order, whatever the number
//! of rows and however the work was cut.
//!
//! A micro-kernel holds `MR` rows x `NR` blocks of sixteen outputs in registers over the whole of K. `MR` and `NR`
//! change from call to call; what they cannot change is the order in which one element is summed.
//!
//! Where the instruction set has no bf16 products, weights and inputs are widened to f32 as they are multiplied. With many
//! rows the inputs are widened once before, for all weights: the micro-kernel then has registers for more rows and, next to its
//! multiplications, little else to do.

// Micro-kernels index registers by constants; iterators in their place would hide the shape of the code that results.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::simd::{ROWS_MAX, Simd, TILE_BLOCKS};
use crate::matrix::LANES;
use crate::{Dtype, bf16};

/// Outputs of a tile.
pub(crate) const TILE_COLS: usize = TILE_BLOCKS * LANES;
/// How far ahead of a product the weights are asked for, where the processor's own prefetchers, which stop at pages, do worse.
pub(crate) const PREFETCH_BYTES: usize = 2048;

/// Fewer rows than this are never one of several passes: seven are four and three.
const AHEAD_ROWS_MIN: usize = 3;

/// Input rows that stay in the second-level cache while all weights pass by: rows are read piecemeal, which the
/// processor cannot foresee, and weights in order, which it can.
const INPUT_BLOCK_BYTES: usize = 256 << 10;
/// Fewer rows than this would read the weights too often.
const INPUT_BLOCK_ROWS_MIN: usize = 48;

/// Inputs of a widened row that a micro-kernel takes before it goes on to other weights: those of all its rows stay in the
/// first-level cache meanwhile.
const WIDENED_INPUTS: usize = 256;
/// Elements between widened rows: those of neighbours at the same place go to different lines of the cache.
const WIDENED_APART: usize = WIDENED_INPUTS;

/// Where input rows lie.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// One after another.
    Strided { bytes: &'a [u8], stride: usize },
    /// Anywhere.
    Gathered(&'a [&'a [u8]]),
}

impl Source<'_> {
    #[inline(always)]
    pub(crate) fn row(&self, index: usize) -> *const u8 {
        match self {
            Source::Strided { bytes, stride } => bytes[index * stride..].as_ptr(),
            Source::Gathered(rows) => rows[index].as_ptr(),
        }
    }
}

/// Where output rows lie. Tasks that run at once write disjoint rows or columns.
#[derive(Clone, Copy)]
pub(crate) enum Places<'a> {
    /// One after another, `stride` bytes apart.
    Strided { start: *mut u8, stride: usize },
    /// Anywhere.
    Gathered(&'a [*mut u8]),
}

impl Places<'_> {
    /// # Safety
    /// `index` is one of the rows.
    #[inline(always)]
    pub(crate) unsafe fn row(&self, index: usize) -> *mut u8 {
        match self {
            // SAFETY: the caller's promise.
            Places::Strided { start, stride } => unsafe { start.add(index * stride) },
            Places::Gathered(rows) => rows[index],
        }
    }
}

/// What becomes of the sums.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// Stored as elements of this type.
    Store(Dtype),
    /// Blocks are gate and up in turn; `silu(gate) * up` is stored as elements of this type.
    SwiGlu(Dtype),
}

/// A product, or the part of one that a task computes.
#[derive(Clone)]
pub(crate) struct Product<'a> {
    /// Packed weights.
    pub weights: &'a [u8],
    /// Their element type, and the rows'.
    pub dtype: Dtype,
    pub k: usize,
    pub block_bytes: usize,
    /// Elements of an output row.
    pub cols: usize,
    pub x: Source<'a>,
    pub out: Places<'a>,
    pub epilogue: Epilogue,
    /// The part: which rows, and which column blocks (from a multiple of [`TILE_BLOCKS`]).
    pub rows: Range<usize>,
    pub blocks: Range<usize>,
}

// SAFETY: the pointers of `out` are to buffers that the call which made the product holds `&mut` for as long as tasks
// run, and tasks write disjoint parts of them.
unsafe impl Send for Product<'_> {}
// SAFETY: as above.
unsafe impl Sync for Product<'_> {}

#[repr(C, align(64))]
struct Tile([[f32; TILE_COLS]; ROWS_MAX]);

/// Computes a product's part; `widened` is room for inputs, kept between calls.
/// # Safety
/// Rows of `x` hold `k` elements, places of `out` hold `cols`, `rows` and `blocks` exist, and nobody else touches that
/// part of `out`.
#[inline(always)]
pub(crate) unsafe fn product<S: Simd>(s: S, p: &Product<'_>, widened: &mut Vec<f32>) {
    let widens = p.dtype == Dtype::Bf16 && S::ROWS_WIDENED > 0 && p.rows.len() > S::ROWS_BF16;
    let element = if widens { size_of::<f32>() } else { p.dtype.bytes() };
    let block_rows = (INPUT_BLOCK_BYTES / (p.k * element).max(1)).max(INPUT_BLOCK_ROWS_MIN);
    let mut from = p.rows.start;
    while from < p.rows.end {
        let to = p.rows.end.min(from + block_rows);
        // SAFETY: the caller's promise, for some of the rows.
        unsafe {
            match p.dtype {
                Dtype::Bf16 if widens => product_widened(s, p, from, to, widened),
                Dtype::Bf16 => product_of_rows::<S, BF16>(s, p, from, to, p.x, 0),
                Dtype::F32 => product_of_rows::<S, F32>(s, p, from, to, p.x, 0),
            }
        }
        from = to;
    }
}

/// Widens rows `from..to` and computes their part. An odd number of inputs is followed by a zero, as in the packed weights.
/// # Safety
/// As `product`, for rows `from..to` of bf16.
#[inline(always)]
unsafe fn product_widened<S: Simd>(s: S, p: &Product<'_>, from: usize, to: usize, widened: &mut Vec<f32>) {
    let stride = p.k.next_multiple_of(2) + WIDENED_APART;
    if widened.len() < (to - from) * stride {
        widened.resize((to - from) * stride, 0.0);
    }
    for (row, wide) in (from..to).zip(widened.chunks_exact_mut(stride)) {
        // SAFETY: a row holds `k` elements, and vectors end before `k`.
        unsafe {
            let narrow = p.x.row(row).cast::<u16>();
            let whole = p.k - p.k % LANES;
            for at in (0..whole).step_by(LANES) {
                s.store(wide.as_mut_ptr().add(at), s.load_bf16(narrow.add(at)));
            }
            for at in whole..p.k {
                wide[at] = bf16::widen(narrow.add(at).read_unaligned());
            }
        }
        wide[p.k..p.k.next_multiple_of(2)].fill(0.0);
    }
    let bytes = widened.as_ptr().cast::<u8>();
    // SAFETY: the vector holds that many f32, and whoever holds it mutably is here.
    let bytes = unsafe { std::slice::from_raw_parts(bytes, size_of_val(widened.as_slice())) };
    let x = Source::Strided { bytes, stride: stride * size_of::<f32>() };
    // SAFETY: the caller's promise, and inputs as just widened.
    unsafe { product_of_rows::<S, WIDENED>(s, p, from, to, x, from) }
}

/// # Safety
/// As `product`, for rows `from..to`, whose inputs are those of `inputs` from `from - first` on.
#[inline(always)]
unsafe fn product_of_rows<S: Simd, const KIND: u8>(
    s: S,
    p: &Product<'_>,
    from: usize,
    to: usize,
    inputs: Source<'_>,
    first: usize,
) {
    let rows_at_once = rows_max::<S>(KIND);
    let mut tile = Tile([[0.0; TILE_COLS]; ROWS_MAX]);
    let mut block = p.blocks.start;
    while block < p.blocks.end {
        let blocks = TILE_BLOCKS.min(p.blocks.end - block);
        let weights = &p.weights[block * p.block_bytes..(block + blocks) * p.block_bytes];
        let mut panel = Panel {
            weights: weights.as_ptr(),
            block_bytes: p.block_bytes,
            k: p.k,
            passes: (to - from).div_ceil(rows_at_once),
            ahead: None,
            then: weights.as_ptr(),
        };
        let (mut row, mut pass) = (from, 0);
        while row < to {
            let left = to - row;
            panel.ahead = ahead(p, block + blocks, panel.passes, pass);
            pass += 1;
            if pass == panel.passes {
                panel.then = weights.as_ptr_range().end;
            }
            // As even as possible: 4 + 4 rows rather than 6 + 2.
            let rows = left.div_ceil(left.div_ceil(rows_at_once));
            let mut x = [inputs.row(row - first); ROWS_MAX];
            for i in 1..rows {
                x[i] = inputs.row(row - first + i);
            }
            // SAFETY: `rows` rows of k elements and `blocks` blocks of weights, as sliced and promised.
            unsafe {
                fill::<S, KIND>(s, rows, blocks, &x, panel, &mut tile);
                for i in 0..rows {
                    finish(s, p, block, blocks, &tile.0[i], p.out.row(row + i));
                }
            }
            row += rows;
        }
        block += blocks;
    }
}

/// What pass `pass` over a panel asks for of the next panel, which begins at block `next`. The first of several passes finds
/// the panel's weights in memory and the others in the cache: asked for evenly by all passes, the next panel comes while they
/// compute. A single pass waits for memory as it is.
fn ahead(p: &Product<'_>, next: usize, passes: usize, pass: usize) -> Option<[*const u8; 2]> {
    let each = if passes < TILE_BLOCKS { 2 } else { 1 };
    let first = next + pass * each;
    // Beyond this task's blocks as well: its thread's next task has those that follow.
    let blocks = p.weights.len() / p.block_bytes.max(1);
    if passes < 2 || pass * each >= TILE_BLOCKS || first + each > blocks {
        return None;
    }
    let of = |block: usize| p.weights.as_ptr().wrapping_add(block * p.block_bytes);
    Some([of(first), of(first + each - 1)])
}

/// Consecutive column blocks of weights.
#[derive(Clone, Copy)]
struct Panel {
    weights: *const u8,
    block_bytes: usize,
    k: usize,
    /// Times that these weights are read.
    passes: usize,
    /// Blocks to ask for while these are multiplied.
    ahead: Option<[*const u8; 2]>,
    /// The weights that are multiplied after these.
    then: *const u8,
}

impl Panel {
    /// Where the weights of a block for bf16 inputs from `input` on lie.
    #[inline(always)]
    fn at(&self, block: usize, input: usize) -> *const u8 {
        self.weights.wrapping_add(block * self.block_bytes + input / 2 * LANES * 4)
    }
}

/// What a micro-kernel multiplies: f32 by f32.
const F32: u8 = 0;
/// Inputs and weights of bf16.
const BF16: u8 = 1;
/// Inputs that were widened to f32 by weights of bf16.
const WIDENED: u8 = 2;

/// What weights a micro-kernel asks for meanwhile: none, for the processor's own prefetchers do better.
const ASK_NOTHING: u8 = 0;
/// Its own, [`PREFETCH_BYTES`] ahead.
const ASK_SHORTLY: u8 = 1;
/// Those of the next panel, [`Panel::ahead`].
const ASK_NEXT: u8 = 2;

/// Rows that a micro-kernel holds.
const fn rows_max<S: Simd>(kind: u8) -> usize {
    match kind {
        F32 => S::ROWS_F32,
        BF16 => S::ROWS_BF16,
        _ => S::ROWS_WIDENED,
    }
}

/// # Safety
/// As `kernel`, for `rows` rows and `blocks` blocks.
#[inline(always)]
unsafe fn fill<S: Simd, const KIND: u8>(
    s: S,
    rows: usize,
    blocks: usize,
    x: &[*const u8; ROWS_MAX],
    panel: Panel,
    tile: &mut Tile,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match rows {
            1 => fill_rows::<S, KIND, 1>(s, blocks, x, panel, tile),
            2 => fill_rows::<S, KIND, 2>(s, blocks, x, panel, tile),
            3 => fill_rows::<S, KIND, 3>(s, blocks, x, panel, tile),
            4 => fill_rows::<S, KIND, 4>(s, blocks, x, panel, tile),
            5 => fill_rows::<S, KIND, 5>(s, blocks, x, panel, tile),
            _ => fill_rows::<S, KIND, 6>(s, blocks, x, panel, tile),
        }
    }
}

/// # Safety
/// As `kernel`, for `blocks` blocks.
#[inline(always)]
unsafe fn fill_rows<S: Simd, const KIND: u8, const MR: usize>(
    s: S,
    blocks: usize,
    x: &[*const u8; ROWS_MAX],
    panel: Panel,
    tile: &mut Tile,
) {
    if MR > rows_max::<S>(KIND) {
        return;
    }
    if KIND == WIDENED {
        for from in (0..panel.k).step_by(WIDENED_INPUTS) {
            let to = panel.k.min(from + WIDENED_INPUTS);
            for block in 0..blocks {
                let next = if block + 1 < blocks {
                    panel.at(block + 1, from)
                } else if to < panel.k {
                    panel.at(0, to)
                } else {
                    panel.then
                };
                // SAFETY: the block exists, as does the rest by the caller's promise.
                unsafe { kernel_widened::<S, MR>(s, block, x, panel, from..to, next, tile) }
            }
        }
        return;
    }
    let wide = S::blocks(MR, KIND == BF16);
    let mut first = 0;
    while first < blocks {
        let left = blocks - first;
        // SAFETY: blocks `first..first + NR` exist, as does the rest by the caller's promise.
        unsafe {
            if wide == 4 && left >= 4 && MR >= AHEAD_ROWS_MIN && panel.ahead.is_some() {
                kernel::<S, KIND, MR, 4, ASK_NEXT>(s, first, x, panel, tile);
                first += 4;
            } else if wide == 4 && left >= 4 && panel.passes == 1 && !S::ASKS_ONCE {
                kernel::<S, KIND, MR, 4, ASK_NOTHING>(s, first, x, panel, tile);
                first += 4;
            } else if wide == 4 && left >= 4 {
                kernel::<S, KIND, MR, 4, ASK_SHORTLY>(s, first, x, panel, tile);
                first += 4;
            } else if wide >= 2 && left >= 2 {
                kernel::<S, KIND, MR, 2, ASK_SHORTLY>(s, first, x, panel, tile);
                first += 2;
            } else {
                kernel::<S, KIND, MR, 1, ASK_SHORTLY>(s, first, x, panel, tile);
                first += 1;
            }
        }
    }
}

/// The micro-kernel.
/// # Safety
/// The first `MR` pointers of `x` are to rows of `k` elements, and blocks `first..first + NR` of the panel exist.
#[inline(always)]
unsafe fn kernel<S: Simd, const KIND: u8, const MR: usize, const NR: usize, const ASK: u8>(
    s: S,
    first: usize,
    x: &[*const u8; ROWS_MAX],
    panel: Panel,
    tile: &mut Tile,
) {
    let mut sums = [[s.splat(0.0); NR]; MR];
    // SAFETY: every weight read lies in blocks `first..first + NR`, every input in the first k elements of its row.
    unsafe {
        let w = panel.weights.add(first * panel.block_bytes);
        let steps = if KIND == BF16 { panel.k / 2 } else { panel.k };
        for step in 0..steps {
            let at = w.add(step * LANES * 4);
            if ASK == ASK_SHORTLY {
                for j in 0..NR {
                    s.prefetch(at.wrapping_add(j * panel.block_bytes + PREFETCH_BYTES));
                }
            }
            if ASK == ASK_NEXT
                && let Some(ahead) = panel.ahead
            {
                s.prefetch_far(ahead[0].wrapping_add(step * LANES * 4));
                s.prefetch_far(ahead[1].wrapping_add(step * LANES * 4));
            }
            if KIND == BF16 {
                let mut weights = [s.load_pairs(at.cast()); NR];
                for j in 1..NR {
                    weights[j] = s.load_pairs(at.add(j * panel.block_bytes).cast());
                }
                for i in 0..MR {
                    let pair = s.pair(x[i].cast::<u32>().add(step).read_unaligned());
                    for j in 0..NR {
                        sums[i][j] = s.dot(sums[i][j], pair, weights[j]);
                    }
                }
            } else {
                let mut weights = [s.load(at.cast()); NR];
                for j in 1..NR {
                    weights[j] = s.load(at.add(j * panel.block_bytes).cast());
                }
                for i in 0..MR {
                    let value = s.splat(x[i].cast::<f32>().add(step).read_unaligned());
                    for j in 0..NR {
                        sums[i][j] = s.fma(value, weights[j], sums[i][j]);
                    }
                }
            }
        }
        if KIND == BF16 && panel.k % 2 == 1 {
            // The last input stands alone: its partner is a zero, as in the packed weights.
            for i in 0..MR {
                let pair = s.pair(u32::from(x[i].cast::<u16>().add(panel.k - 1).read_unaligned()));
                for j in 0..NR {
                    let weights = s.load_pairs(w.add(j * panel.block_bytes + steps * LANES * 4).cast());
                    sums[i][j] = s.dot(sums[i][j], pair, weights);
                }
            }
        }
        for i in 0..MR {
            for j in 0..NR {
                s.store(tile.0[i].as_mut_ptr().add((first + j) * LANES), sums[i][j]);
            }
        }
    }
}

/// The micro-kernel of widened inputs: adds the products of `inputs`, an even number of them from an even one on unless they
/// are the last, to the sums in `tile`; the first inputs begin them. Asks for as many weights from `next` on meanwhile.
/// # Safety
/// As `kernel`, for one block; rows of `x` are f32 and padded to an even number.
#[inline(always)]
unsafe fn kernel_widened<S: Simd, const MR: usize>(
    s: S,
    block: usize,
    x: &[*const u8; ROWS_MAX],
    panel: Panel,
    inputs: Range<usize>,
    next: *const u8,
    tile: &mut Tile,
) {
    let mut sums = [s.splat(0.0); MR];
    // SAFETY: every weight read lies in the block, every input in its row.
    unsafe {
        if inputs.start > 0 {
            for i in 0..MR {
                sums[i] = s.load(tile.0[i].as_ptr().add(block * LANES));
            }
        }
        let w = panel.at(block, inputs.start);
        for step in 0..inputs.len().div_ceil(2) {
            let at = w.add(step * LANES * 4);
            s.prefetch(next.wrapping_add(step * LANES * 4));
            for half in 0..2 {
                let weights = s.half(half, at.cast());
                for i in 0..MR {
                    let value = s.splat(x[i].cast::<f32>().add(inputs.start + 2 * step + half).read_unaligned());
                    sums[i] = s.fma(value, weights, sums[i]);
                }
            }
        }
        for i in 0..MR {
            s.store(tile.0[i].as_mut_ptr().add(block * LANES), sums[i]);
        }
    }
}

/// Turns one row of sums into elements of its place.
/// # Safety
/// `place` holds the product's columns, of which nobody else touches this tile's.
#[inline(always)]
pub(crate) unsafe fn finish<S: Simd>(
    s: S,
    p: &Product<'_>,
    block: usize,
    blocks: usize,
    sums: &[f32; TILE_COLS],
    place: *mut u8,
) {
    // SAFETY: `sums` is whole, and no more than the columns left are stored.
    unsafe {
        match p.epilogue {
            Epilogue::Store(dtype) => {
                for j in 0..blocks {
                    let col = (block + j) * LANES;
                    let sum = s.load(sums.as_ptr().add(j * LANES));
                    s.store_as(dtype, place.add(col * dtype.bytes()), sum, LANES.min(p.cols - col));
                }
            }
            Epilogue::SwiGlu(dtype) => {
                for j in 0..blocks / 2 {
                    let col = (block / 2 + j) * LANES;
                    let gate = s.load(sums.as_ptr().add(2 * j * LANES));
                    let up = s.load(sums.as_ptr().add((2 * j + 1) * LANES));
                    let value = s.swiglu(gate, up);
                    s.store_as(dtype, place.add(col * dtype.bytes()), value, LANES.min(p.cols - col));
                }
            }
        }
    }
}
