//! The matrix product: one accumulator for each output element, walked over K in ascending order, whatever the number
//! of rows and however the work was cut.
//!
//! A micro-kernel holds `MR` rows x `NR` blocks of sixteen outputs in registers over the whole of K. `MR` and `NR`
//! change from call to call; what they cannot change is the order in which one element is summed.
//!
//! Where rows make several passes, they pass over a chunk of the panel's inputs at a time, whose weights stay in a cache
//! meanwhile, and ask for the next chunk; sums between chunks are kept in memory, which changes no bit of them.
//!
//! Where the instruction set has no bf16 products, weights and inputs are widened to f32 as they are multiplied. With more
//! than a few rows the inputs are widened once before, for all weights: the micro-kernel then has registers for more rows and,
//! next to its multiplications, little else to do.

// Micro-kernels index registers by constants; iterators in their place would hide the shape of the code that results.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::isa::Asking;
use super::simd::{ROWS_MAX, Simd, TILE_BLOCKS};
use super::widened;
use crate::Dtype;
use crate::matrix::LANES;

/// Outputs of a tile.
pub(crate) const TILE_COLS: usize = TILE_BLOCKS * LANES;
/// How many steps of K ahead of a product the weights are asked for, where the processor's own prefetchers do worse.
pub(crate) const ASK_STEPS: usize = 32;
/// The same for those that are asked for again.
pub(crate) const ASK_AGAIN_STEPS: usize = 8;

/// Steps of K whose weights, of a whole panel, stay in a first-level cache of 32 KiB next to those that are asked for.
const CHUNK_STEPS: usize = 64;
/// More passes than this compute far longer than weights take to come.
const CHUNK_PASSES_MAX: usize = 8;
/// Their chunk, in the second-level cache: sums go to memory and back less often.
const CHUNK_STEPS_MANY: usize = 256;
/// Fewer rows than this are never one of several passes: seven are four and three.
const AHEAD_ROWS_MIN: usize = 3;

/// Input rows that stay in the second-level cache while all weights pass by: rows are read piecemeal, which the
/// processor cannot foresee, and weights in order, which it can.
const INPUT_BLOCK_BYTES: usize = 256 << 10;
/// Fewer rows than this would read the weights too often.
const INPUT_BLOCK_ROWS_MIN: usize = 48;

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
    /// Blocks that lie side by side, a power of two: 1 where they lie one after another.
    pub side_by_side: usize,
    /// For weights that are read once.
    pub asking: Asking,
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

/// The sums of one row and a panel.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Sums([f32; TILE_COLS]);

/// What products need beside their operands, kept between calls.
pub(crate) struct Scratch {
    sums: Vec<Sums>,
    /// Inputs.
    widened: Vec<f32>,
}

impl Scratch {
    pub const fn new() -> Scratch {
        Scratch { sums: Vec::new(), widened: Vec::new() }
    }
}

/// Computes a product's part.
/// # Safety
/// Rows of `x` hold `k` elements, places of `out` hold `cols`, `rows` and `blocks` exist, and nobody else touches that
/// part of `out`.
#[inline(always)]
pub(crate) unsafe fn product<S: Simd>(s: S, p: &Product<'_>, scratch: &mut Scratch) {
    let rows = p.rows.len();
    let widens = match p.dtype {
        Dtype::Bf16 => S::widens(rows),
        Dtype::F32 => S::ROWS_APART > 0 && rows > S::ROWS_F32,
    };
    let element = if widens { size_of::<f32>() } else { p.dtype.bytes() };
    let block_rows = (INPUT_BLOCK_BYTES / (p.k * element).max(1)).max(INPUT_BLOCK_ROWS_MIN);
    let Scratch { sums, widened: kept } = scratch;
    let most = block_rows.min(rows);
    if sums.len() < most {
        sums.resize(most, Sums([0.0; TILE_COLS]));
    }
    let mut from = p.rows.start;
    while from < p.rows.end {
        let to = p.rows.end.min(from + block_rows);
        // SAFETY: the caller's promise, for some of the rows.
        unsafe {
            match p.dtype {
                Dtype::Bf16 if widens => {
                    let x = widened::inputs(s, p, from, to, kept);
                    product_of_rows::<S, WIDENED>(s, p, from, to, x, from, sums);
                }
                Dtype::F32 if widens => {
                    let x = widened::inputs(s, p, from, to, kept);
                    product_of_rows::<S, WIDENED_F32>(s, p, from, to, x, from, sums);
                }
                Dtype::Bf16 => product_of_rows::<S, BF16>(s, p, from, to, p.x, 0, sums),
                Dtype::F32 => product_of_rows::<S, F32>(s, p, from, to, p.x, 0, sums),
            }
        }
        from = to;
    }
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
    sums: &mut [Sums],
) {
    let rows_at_once = rows_max::<S>(KIND);
    let passes = (to - from).div_ceil(rows_at_once);
    let steps = if p.dtype == Dtype::F32 { p.k } else { p.k.div_ceil(2) };
    let chunk = match passes {
        _ if !is_widened(KIND) && p.side_by_side < TILE_BLOCKS => steps,
        0..=1 if !is_widened(KIND) || S::blocks_widened(to - from, 1) == TILE_BLOCKS => steps,
        0..=CHUNK_PASSES_MAX => CHUNK_STEPS.min(steps),
        _ => CHUNK_STEPS_MANY.min(steps),
    };
    let mut block = p.blocks.start;
    while block < p.blocks.end {
        let panel = Panel::of(p, block, passes);
        let mut begin = 0;
        loop {
            let end = steps.min(begin + chunk);
            let (mut row, mut pass) = (from, 0);
            while row < to {
                let left = to - row;
                // As even as possible: 4 + 4 rows rather than 6 + 2.
                let rows = left.div_ceil(left.div_ceil(rows_at_once));
                let mut x = [inputs.row(row - first); ROWS_MAX];
                for i in 1..rows {
                    x[i] = inputs.row(row - first + i);
                }
                let here = Pass { steps: begin..end, ask: panel.next_chunk(end, chunk, pass), number: pass };
                let sums = &mut sums[row - from..][..rows];
                // SAFETY: `rows` rows of k elements and the panel's blocks of weights, as promised.
                unsafe {
                    fill::<S, KIND>(s, rows, &x, &panel, here, sums);
                    if end == steps {
                        for i in 0..rows {
                            finish(s, p, block, panel.blocks, &sums[i].0, p.out.row(row + i));
                        }
                    }
                }
                row += rows;
                pass += 1;
            }
            begin = end;
            if begin == steps {
                break;
            }
        }
        block += panel.blocks;
    }
}

/// Up to [`TILE_BLOCKS`] column blocks of weights.
pub(crate) struct Panel<'a> {
    weights: &'a [u8],
    /// Where the panel begins in the weights.
    start: usize,
    pub blocks: usize,
    pub block_bytes: usize,
    /// [`Product::side_by_side`].
    pub side_by_side: usize,
    /// Inputs.
    pub k: usize,
    /// Times that the weights are read.
    pub passes: usize,
    /// What each pass asks for of the next weights at a step, for each block.
    pub asks_bytes: usize,
    /// [`Product::asking`].
    pub asking: Asking,
}

/// Where blocks of a panel lie, from one of them on as far as they lie alike.
#[derive(Clone, Copy)]
pub(crate) struct Blocks {
    start: *const u8,
    /// Bytes from a block to the next.
    block_stride: usize,
    /// Bytes from one step of K to the next, in each block.
    step_stride: usize,
}

impl Blocks {
    /// Where the first one's weights for a step of K lie.
    #[inline(always)]
    pub fn at(&self, step: usize) -> *const u8 {
        self.start.wrapping_add(step * self.step_stride)
    }

    /// `at`, so many blocks and steps further on.
    #[inline(always)]
    pub fn further(&self, at: *const u8, blocks: usize, steps: usize) -> *const u8 {
        at.wrapping_add(blocks * self.block_stride + steps * self.step_stride)
    }
}

impl<'a> Panel<'a> {
    /// The panel of `p` that begins at `block`.
    #[inline(always)]
    pub fn of(p: &Product<'a>, block: usize, passes: usize) -> Panel<'a> {
        let blocks = TILE_BLOCKS.min(p.blocks.end - block);
        let start = block * p.block_bytes;
        // Tasks end between panels or with the last one, so all blocks that lie side by side are this part's.
        assert!(start + blocks * p.block_bytes <= p.weights.len(), "a panel outside of the weights");
        debug_assert!(p.side_by_side.is_power_of_two());
        let Product { weights, k, block_bytes, side_by_side, asking, .. } = *p;
        let asks_bytes = (LANES * 4).div_ceil(passes);
        Panel { weights, start, blocks, block_bytes, side_by_side, k, passes, asks_bytes, asking }
    }

    /// The first of the blocks that lie side by side with block `of`. A micro-kernel's call is too short for a division.
    #[inline(always)]
    pub fn beside(&self, of: usize) -> usize {
        of & !(self.side_by_side - 1)
    }

    /// Its blocks from `first` on.
    #[inline(always)]
    pub fn blocks_from(&self, first: usize) -> Blocks {
        let base = self.weights.as_ptr().wrapping_add(self.start);
        if self.side_by_side == 1 {
            let start = base.wrapping_add(first * self.block_bytes);
            return Blocks { start, block_stride: self.block_bytes, step_stride: LANES * 4 };
        }
        let beside = self.beside(first);
        let width = self.side_by_side.min(self.blocks - beside);
        let start = base.wrapping_add(beside * self.block_bytes + (first - beside) * LANES * 4);
        Blocks { start, block_stride: LANES * 4, step_stride: width * LANES * 4 }
    }

    /// What pass `pass` over a chunk asks for of the next, whose steps begin with `step`, in quarters: the first of several
    /// passes would find them in memory, but asked for evenly by all of them they come while these compute. After a panel's
    /// last chunk that is the next panel's first one, also beyond this task: its thread's next task has those that follow.
    #[inline(always)]
    fn next_chunk(&self, step: usize, steps: usize, pass: usize) -> Ask {
        let each = if self.passes < TILE_BLOCKS { 2 } else { 1 };
        let quarter = steps * LANES * 4;
        let next = self.start + step * self.blocks * LANES * 4 + pass * each * quarter;
        let rests = self.passes < 2 || self.side_by_side < TILE_BLOCKS || pass * each >= TILE_BLOCKS;
        if rests || next >= self.weights.len() {
            return Ask::Nothing;
        }
        let next = self.weights.as_ptr().wrapping_add(next);
        if each == 2 { Ask::Half([next, next.wrapping_add(quarter)]) } else { Ask::Quarter(next) }
    }
}

/// What a pass asks for of the next chunk: as many lines as it has steps, from where on.
#[derive(Clone, Copy)]
enum Ask {
    Nothing,
    Half([*const u8; 2]),
    Quarter(*const u8),
}

/// Some rows' way over some of a panel's weights.
pub(crate) struct Pass {
    /// Of K.
    pub steps: Range<usize>,
    ask: Ask,
    /// Which of [`Panel::passes`].
    pub number: usize,
}

/// What a micro-kernel multiplies: f32 by f32.
const F32: u8 = 0;
/// Inputs and weights of bf16.
const BF16: u8 = 1;
/// Inputs that were widened to f32 by weights of bf16.
pub(crate) const WIDENED: u8 = 2;
/// Inputs that lie as widened ones do by weights of f32.
pub(crate) const WIDENED_F32: u8 = 3;

const fn is_widened(kind: u8) -> bool {
    kind == WIDENED || kind == WIDENED_F32
}

/// What weights a micro-kernel asks for meanwhile: none, for the processor's own prefetchers do better.
const ASK_NOTHING: u8 = 0;
/// [`Ask::Half`].
const ASK_HALF: u8 = 1;
/// [`Ask::Quarter`].
const ASK_QUARTER: u8 = 2;
/// Its own, [`ASK_STEPS`] ahead.
const ASK_ONCE: u8 = 3;
/// As well, and [`ASK_AGAIN_STEPS`] ahead again.
const ASK_TWICE: u8 = 4;

/// Rows that a micro-kernel holds.
const fn rows_max<S: Simd>(kind: u8) -> usize {
    match kind {
        F32 => S::ROWS_F32,
        BF16 => S::ROWS_BF16,
        WIDENED => S::ROWS_WIDENED,
        _ => S::ROWS_APART,
    }
}

/// # Safety
/// As `kernel`, for `rows` rows and all blocks.
#[inline(always)]
unsafe fn fill<S: Simd, const KIND: u8>(
    s: S,
    rows: usize,
    x: &[*const u8; ROWS_MAX],
    panel: &Panel<'_>,
    pass: Pass,
    sums: &mut [Sums],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match rows {
            1 => fill_rows::<S, KIND, 1>(s, x, panel, pass, sums),
            2 => fill_rows::<S, KIND, 2>(s, x, panel, pass, sums),
            3 => fill_rows::<S, KIND, 3>(s, x, panel, pass, sums),
            4 => fill_rows::<S, KIND, 4>(s, x, panel, pass, sums),
            5 => fill_rows::<S, KIND, 5>(s, x, panel, pass, sums),
            6 => fill_rows::<S, KIND, 6>(s, x, panel, pass, sums),
            7 => fill_rows::<S, KIND, 7>(s, x, panel, pass, sums),
            8 => fill_rows::<S, KIND, 8>(s, x, panel, pass, sums),
            9 => fill_rows::<S, KIND, 9>(s, x, panel, pass, sums),
            10 => fill_rows::<S, KIND, 10>(s, x, panel, pass, sums),
            11 => fill_rows::<S, KIND, 11>(s, x, panel, pass, sums),
            12 => fill_rows::<S, KIND, 12>(s, x, panel, pass, sums),
            13 => fill_rows::<S, KIND, 13>(s, x, panel, pass, sums),
            _ => fill_rows::<S, KIND, 14>(s, x, panel, pass, sums),
        }
    }
}

/// # Safety
/// As `kernel`, for all blocks.
#[inline(always)]
unsafe fn fill_rows<S: Simd, const KIND: u8, const MR: usize>(
    s: S,
    x: &[*const u8; ROWS_MAX],
    panel: &Panel<'_>,
    pass: Pass,
    sums: &mut [Sums],
) {
    if const { MR > rows_max::<S>(KIND) } {
        return;
    }
    assert!(sums.len() >= MR, "a pass has sums for its rows");
    let (blocks, to) = (panel.blocks, sums.as_mut_ptr().cast::<f32>());
    if is_widened(KIND) {
        let wide = S::blocks_widened(MR, panel.passes).min(panel.side_by_side);
        let mut first = 0;
        while first < blocks {
            let left = blocks - first;
            // SAFETY: blocks `first..first + NR` exist and lie side by side, as does the rest by the caller's promise.
            unsafe {
                if wide >= 4 && left >= 4 {
                    widened::kernel::<S, KIND, MR, 4>(s, first, x, panel, &pass, to);
                    first += 4;
                } else if wide >= 2 && left >= 2 {
                    widened::kernel::<S, KIND, MR, 2>(s, first, x, panel, &pass, to);
                    first += 2;
                } else {
                    widened::kernel::<S, KIND, MR, 1>(s, first, x, panel, &pass, to);
                    first += 1;
                }
            }
        }
        return;
    }
    let wide = S::blocks(MR, KIND == BF16);
    let Pass { steps, ask, .. } = pass;
    let mut first = 0;
    while first < blocks {
        let left = blocks - first;
        // SAFETY: blocks `first..first + NR` exist, as does the rest by the caller's promise.
        unsafe {
            if wide == 4 && left >= 4 {
                match ask {
                    Ask::Half(ask) if MR >= AHEAD_ROWS_MIN => {
                        kernel::<S, KIND, MR, 4, ASK_HALF>(s, first, x, panel, steps.clone(), ask, to);
                    }
                    Ask::Quarter(ask) if MR >= AHEAD_ROWS_MIN => {
                        kernel::<S, KIND, MR, 4, ASK_QUARTER>(s, first, x, panel, steps.clone(), [ask; 2], to);
                    }
                    _ if panel.passes > 1 || panel.asking == Asking::Never => {
                        kernel::<S, KIND, MR, 4, ASK_NOTHING>(s, first, x, panel, steps.clone(), [x[0]; 2], to);
                    }
                    _ if panel.asking == Asking::Twice => {
                        kernel::<S, KIND, MR, 4, ASK_TWICE>(s, first, x, panel, steps.clone(), [x[0]; 2], to);
                    }
                    _ => kernel::<S, KIND, MR, 4, ASK_ONCE>(s, first, x, panel, steps.clone(), [x[0]; 2], to),
                }
                first += 4;
            } else if wide >= 2 && left >= 2 {
                match panel.asking {
                    Asking::Never => {
                        kernel::<S, KIND, MR, 2, ASK_NOTHING>(s, first, x, panel, steps.clone(), [x[0]; 2], to);
                    }
                    Asking::Once => {
                        kernel::<S, KIND, MR, 2, ASK_ONCE>(s, first, x, panel, steps.clone(), [x[0]; 2], to)
                    }
                    Asking::Twice => {
                        kernel::<S, KIND, MR, 2, ASK_TWICE>(s, first, x, panel, steps.clone(), [x[0]; 2], to);
                    }
                }
                first += 2;
            } else {
                kernel::<S, KIND, MR, 1, ASK_ONCE>(s, first, x, panel, steps.clone(), [x[0]; 2], to);
                first += 1;
            }
        }
    }
}

/// Asks for weights of the steps after that at `at`.
#[inline(always)]
pub(crate) fn ask<S: Simd, const NR: usize>(s: S, asking: Asking, blocks: &Blocks, at: *const u8) {
    for j in 0..NR {
        match asking {
            Asking::Never => {}
            Asking::Once => s.prefetch(blocks.further(at, j, ASK_STEPS)),
            Asking::Twice => {
                s.prefetch_far(blocks.further(at, j, ASK_STEPS));
                s.prefetch(blocks.further(at, j, ASK_AGAIN_STEPS));
            }
        }
    }
}

/// The micro-kernel: adds the products of `steps` to the sums of its blocks, `MR` rows of [`TILE_COLS`]; step 0 begins them.
/// # Safety
/// The first `MR` pointers of `x` are to rows of `k` elements, blocks `first..first + NR` of the panel exist, and `sums` has
/// room for `MR` rows.
#[inline(always)]
unsafe fn kernel<S: Simd, const KIND: u8, const MR: usize, const NR: usize, const ASK: u8>(
    s: S,
    first: usize,
    x: &[*const u8; ROWS_MAX],
    panel: &Panel<'_>,
    steps: Range<usize>,
    ask: [*const u8; 2],
    sums: *mut f32,
) {
    let mut acc = [[s.splat(0.0); NR]; MR];
    let blocks = panel.blocks_from(first);
    // The last input of an odd number stands alone: its partner is a zero, as in the packed weights.
    let whole = if KIND == BF16 { steps.end.min(panel.k / 2) } else { steps.end };
    // SAFETY: every weight read lies in blocks `first..first + NR`, every input in the first k elements of its row, every sum
    // in its row.
    unsafe {
        if steps.start > 0 {
            for i in 0..MR {
                for j in 0..NR {
                    acc[i][j] = s.load(sums.add(i * TILE_COLS + (first + j) * LANES));
                }
            }
        }
        for step in steps.start..whole {
            let at = blocks.at(step);
            match ASK {
                ASK_ONCE => self::ask::<S, NR>(s, Asking::Once, &blocks, at),
                ASK_TWICE => self::ask::<S, NR>(s, Asking::Twice, &blocks, at),
                _ => {}
            }
            let line = (step - steps.start) * LANES * 4;
            if ASK == ASK_HALF || ASK == ASK_QUARTER {
                s.prefetch(ask[0].wrapping_add(line));
            }
            if ASK == ASK_HALF {
                s.prefetch(ask[1].wrapping_add(line));
            }
            if KIND == BF16 {
                let mut weights = [s.load_pairs(at.cast()); NR];
                for j in 1..NR {
                    weights[j] = s.load_pairs(blocks.further(at, j, 0).cast());
                }
                for i in 0..MR {
                    let pair = s.pair(x[i].cast::<u32>().add(step).read_unaligned());
                    for j in 0..NR {
                        acc[i][j] = s.dot(acc[i][j], pair, weights[j]);
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
                        acc[i][j] = s.fma(value, weights[j], acc[i][j]);
                    }
                }
            }
        }
        if whole < steps.end {
            for i in 0..MR {
                let pair = s.pair(u32::from(x[i].cast::<u16>().add(panel.k - 1).read_unaligned()));
                for j in 0..NR {
                    acc[i][j] = s.dot(acc[i][j], pair, s.load_pairs(blocks.further(blocks.at(whole), j, 0).cast()));
                }
            }
        }
        for i in 0..MR {
            for j in 0..NR {
                s.store(sums.add(i * TILE_COLS + (first + j) * LANES), acc[i][j]);
            }
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
