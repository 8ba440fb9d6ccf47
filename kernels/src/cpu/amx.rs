//! bf16 products on the tile registers of AMX: sixteen rows x sixteen outputs x thirty-two inputs an instruction.
//!
//! The packed layout (sixteen outputs side by side, inputs in pairs) is a tile's own, so tiles of weights are read where
//! they lie. Input rows are spread into tiles first, zeros after the last row and the last input. An output element is
//! summed over K in steps of thirty-two, in ascending order; within a step the processor adds the even and the odd
//! inputs' products apart and both to the sum. Rows that share a tile do not meet, so an element's bits depend on its own
//! row and on K alone, as everywhere else.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS and LDTILECFG.

use std::arch::asm;
use std::cell::RefCell;
use std::sync::OnceLock;

use super::gemm::{Product, TILE_COLS, finish};
use super::simd::TILE_BLOCKS;
use super::x86::Avx512Bf16;
use crate::Dtype;
use crate::matrix::{LANES, out_of_memory};
use crate::memory::AlignedBuf;

/// Rows of a tile.
const TILE_ROWS: usize = 16;
/// Inputs of a tile.
const TILE_INPUTS: usize = 32;
/// Bytes of a tile, of inputs, weights or sums.
const TILE_BYTES: usize = 1024;
/// Bytes of a tile's row.
const TILE_LINE: usize = 64;
/// Rows of sums that a micro-kernel computes at most.
const SUM_ROWS: usize = 2 * TILE_ROWS;
/// Input rows that are spread at once: with a panel of weights beside them they fit the second-level cache.
const INPUT_BLOCK_BYTES: usize = 512 << 10;

/// Whether the processor has AMX with bf16, and the system lets this process use it.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| processor_has_tiles() && permitted())
}

fn processor_has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE
}

/// Asks the system for the tiles' state, which threads of this process may use from then on.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    // asm/prctl.h and the processor's number of the state component.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call touches no memory of ours; systems that do not know it refuse it.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// LDTILECFG's operand: palette 1, eight tiles of lines of 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

impl TileConfig {
    /// Tiles of sixteen lines, but those of sums and, where it is the only one, of input rows (0 to 4) of `rows`.
    const fn of(rows: usize) -> TileConfig {
        let mut config = [0; 64];
        config[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            config[16 + 2 * tile] = TILE_LINE as u8;
            config[48 + tile] = if tile < 5 { rows } else { TILE_ROWS } as u8;
            tile += 1;
        }
        TileConfig(config)
    }
}

/// By rows of a single tile of them, less one.
static CONFIGS: [TileConfig; TILE_ROWS] = {
    let mut configs = [TileConfig::of(TILE_ROWS); TILE_ROWS];
    let mut rows = 1;
    while rows < TILE_ROWS {
        configs[rows - 1] = TileConfig::of(rows);
        rows += 1;
    }
    configs
};

/// Holds the thread's tile registers; releasing them keeps them out of context switches.
struct Tiles(());

impl Tiles {
    /// For `rows` input rows: with fewer than a tile has, only so many are read, multiplied and stored.
    /// # Safety
    /// [`is_available`], and the thread holds no other.
    unsafe fn take(rows: usize) -> Tiles {
        let config = &CONFIGS[rows.clamp(1, TILE_ROWS) - 1];
        // SAFETY: the operand is a whole valid configuration; the compiler knows nothing of tile registers.
        unsafe { asm!("ldtilecfg [{}]", in(reg) config.0.as_ptr(), options(nostack, readonly, preserves_flags)) };
        Tiles(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: made by `take`, so the machine has the instruction.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// Sums of a pair of tiles of rows.
#[repr(C, align(64))]
struct Sums([[f32; TILE_COLS]; SUM_ROWS]);

impl Sums {
    fn new() -> Sums {
        Sums([[0.0; TILE_COLS]; SUM_ROWS])
    }
}

/// Zeroed lines around a last, partial step of weights.
#[repr(C, align(64))]
struct Tail([[u8; TILE_BYTES]; TILE_BLOCKS]);

/// What a product needs beside its operands.
struct Scratch {
    /// Input rows as tiles.
    inputs: AlignedBuf,
    sums: Vec<Sums>,
}

thread_local! {
    // Kept so that decoding allocates nothing.
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { inputs: AlignedBuf::empty(), sums: Vec::new() }) };
}

/// Computes a part of a bf16 product.
/// # Safety
/// [`is_available`], the machine has AVX-512 with BF16; the rest as `gemm::product`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(crate) unsafe fn product(p: &Product<'_>) {
    debug_assert_eq!(p.dtype, Dtype::Bf16);
    assert!(p.side_by_side == 1, "tiles of weights lie by blocks");
    let steps = p.k.div_ceil(TILE_INPUTS);
    let block_rows = (INPUT_BLOCK_BYTES / (steps * TILE_LINE).max(1)).next_multiple_of(SUM_ROWS);
    SCRATCH.with_borrow_mut(|Scratch { inputs, sums }| {
        let mut from = p.rows.start;
        while from < p.rows.end {
            let to = p.rows.end.min(from + block_rows);
            // One tile of so many rows, or whole pairs: what is missing of a last one is zeros.
            let few = to - from <= TILE_ROWS;
            let tiles = if few { 1 } else { 2 * (to - from).div_ceil(SUM_ROWS) };
            let bytes = tiles * steps * TILE_LINE * if few { to - from } else { TILE_ROWS };
            sums.resize_with(sums.len().max(tiles.div_ceil(2)), Sums::new);
            if inputs.len() < bytes {
                *inputs = AlignedBuf::zeroed(bytes).unwrap_or_else(|error| out_of_memory(&error));
            }
            // SAFETY: the caller's promise, for some of the rows, and room for all their tiles; products do not nest.
            unsafe {
                let _tiles = Tiles::take(to - from);
                spread(p, from, to, &mut inputs.as_mut_slice()[..bytes]);
                product_of_rows(p, from, to, inputs.as_slice().as_ptr(), sums);
            }
            from = to;
        }
    });
}

/// Spreads rows `from..to` into all tiles of `out`, `[row tile][step][row][inputs]`: one of just these rows, or several of sixteen.
/// # Safety
/// Rows hold `k` elements.
unsafe fn spread(p: &Product<'_>, from: usize, to: usize, out: &mut [u8]) {
    let (bytes, steps) = (p.k * 2, p.k.div_ceil(TILE_INPUTS));
    let rows = TILE_ROWS.min(to - from);
    let tile_bytes = rows * TILE_LINE;
    for (first, tiles) in (from..).step_by(TILE_ROWS).zip(out.chunks_exact_mut((steps * tile_bytes).max(1))) {
        for row in 0..rows {
            let lines = tiles.chunks_exact_mut(tile_bytes).map(|tile| &mut tile[row * TILE_LINE..][..TILE_LINE]);
            if first + row >= to {
                lines.for_each(|line| line.fill(0));
                continue;
            }
            // SAFETY: the caller's promise.
            let x = unsafe { std::slice::from_raw_parts(p.x.row(first + row), bytes) };
            let (whole, rest) = x.as_chunks::<TILE_LINE>();
            // The whole ones first: zip takes from its left side even where its right one has ended.
            let mut lines = lines;
            for (x, line) in whole.iter().zip(lines.by_ref()) {
                line.copy_from_slice(x);
            }
            if let Some(line) = lines.next() {
                line[..rest.len()].copy_from_slice(rest);
                line[rest.len()..].fill(0);
            }
        }
    }
}

/// # Safety
/// As `product`, for rows `from..to`, which `inputs` holds as tiles; `sums` has room for whole pairs of them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn product_of_rows(p: &Product<'_>, from: usize, to: usize, inputs: *const u8, sums: &mut [Sums]) {
    // SAFETY: the caller's promise.
    let s = unsafe { Avx512Bf16::assume() };
    let mut tail = Tail([[0; TILE_BYTES]; TILE_BLOCKS]);
    let few = to - from <= TILE_ROWS;
    let x_bytes = TILE_LINE * TILE_ROWS.min(to - from);
    let mut block = p.blocks.start;
    while block < p.blocks.end {
        let blocks = if few { TILE_BLOCKS } else { 2 }.min(p.blocks.end - block);
        let weights = &p.weights[block * p.block_bytes..(block + blocks) * p.block_bytes];
        let panel = Panel::new(weights, blocks, p.k, p.block_bytes, x_bytes, &mut tail);
        // SAFETY: the tiles of all rows and of `blocks` blocks exist; places as promised.
        unsafe {
            if few {
                panel.multiply_few(inputs, block + blocks < p.blocks.end, &mut sums[0]);
            } else {
                panel.multiply_many(inputs, to - from, sums);
            }
            for row in from..to {
                let sums = &sums[(row - from) / SUM_ROWS].0[(row - from) % SUM_ROWS];
                finish(s, p, block, blocks, sums, p.out.row(row));
            }
        }
        block += blocks;
    }
}

/// Consecutive column blocks of weights.
struct Panel<'a> {
    weights: *const u8,
    blocks: usize,
    block_bytes: usize,
    /// Bytes of a tile of rows.
    x_bytes: usize,
    /// Whole steps.
    steps: usize,
    /// The last step, filled up with zeros, if it is partial.
    tail: Option<&'a Tail>,
}

impl<'a> Panel<'a> {
    fn new(
        weights: &[u8],
        blocks: usize,
        k: usize,
        block_bytes: usize,
        x_bytes: usize,
        tail: &'a mut Tail,
    ) -> Panel<'a> {
        let steps = k / TILE_INPUTS;
        let rest = block_bytes - steps * TILE_BYTES;
        if rest > 0 {
            for (tile, block) in tail.0.iter_mut().zip(weights.chunks_exact(block_bytes)) {
                tile[..rest].copy_from_slice(&block[steps * TILE_BYTES..]);
            }
        }
        let tail = (rest > 0).then_some(&*tail);
        Panel { weights: weights.as_ptr(), blocks, block_bytes, x_bytes, steps, tail }
    }

    /// Bytes from one tile of rows to the next.
    fn row_tile_bytes(&self) -> usize {
        (self.steps + usize::from(self.tail.is_some())) * self.x_bytes
    }

    /// Steps `from..to` of blocks from `first` on; `x` is those of the first tile of rows, from its first step.
    fn steps(&self, x: *const u8, first: usize, from: usize, to: usize) -> Steps {
        let x = x.wrapping_add(from * self.x_bytes);
        let weights = self.weights.wrapping_add(first * self.block_bytes + from * TILE_BYTES);
        let x_second = x.wrapping_add(self.row_tile_bytes());
        Steps { x, x_second, x_bytes: self.x_bytes, weights, block_bytes: self.block_bytes, steps: to - from }
    }

    /// The partial last step of blocks from `first` on, if there is one.
    fn last(&self, x: *const u8, first: usize) -> Option<Steps> {
        let x = x.wrapping_add(self.steps * self.x_bytes);
        let weights = self.tail?.0.as_ptr().cast::<u8>().wrapping_add(first * TILE_BYTES);
        let x_second = x.wrapping_add(self.row_tile_bytes());
        Some(Steps { x, x_second, x_bytes: self.x_bytes, weights, block_bytes: TILE_BYTES, steps: 1 })
    }

    /// The sums of one tile of rows and all blocks: every weight is on its way from memory once.
    /// # Safety
    /// `x` is the rows' tiles; the thread holds [`Tiles`]. If `more`, other blocks follow this panel.
    unsafe fn multiply_few(&self, x: *const u8, more: bool, sums: &mut Sums) {
        let sums = sums.0.as_mut_ptr().cast::<f32>();
        // SAFETY: the blocks exist in the weights, the tail and the sums; tiles of x as promised.
        unsafe {
            if self.blocks == TILE_BLOCKS {
                // From the last steps of a block to the first of the same block of the next panel.
                let next = TILE_BLOCKS * self.block_bytes + AHEAD_STEPS * TILE_BYTES - self.steps * TILE_BYTES;
                self.steps(x, 0, 0, self.steps).one_by_four(false, if more { next } else { 0 }, sums);
                if let Some(last) = self.last(x, 0) {
                    last.one_by_four(true, 0, sums);
                }
                return;
            }
            for block in 0..self.blocks {
                let sums = sums.add(block * LANES);
                self.steps(x, block, 0, self.steps).one_by_one(false, sums);
                if let Some(last) = self.last(x, block) {
                    last.one_by_one(true, sums);
                }
            }
        }
    }

    /// The sums of `rows` rows and of one or two blocks. So many steps at a time that their weights stay in the first-level
    /// cache while all rows pass by; sums between them are kept in memory, which changes no bit of them.
    /// # Safety
    /// As `multiply_few`, for whole pairs of tiles of rows.
    unsafe fn multiply_many(&self, x: *const u8, rows: usize, sums: &mut [Sums]) {
        let pairs = rows.div_ceil(SUM_ROWS);
        let chunk = if pairs == 1 { self.steps.max(1) } else { CHUNK_STEPS };
        // Of a product whose blocks are no multiple of two, the last panel is one block.
        let two = self.blocks == 2;
        let mut from = 0;
        loop {
            let to = self.steps.min(from + chunk);
            for (pair, sums) in sums[..pairs].iter_mut().enumerate() {
                let x = x.wrapping_add(2 * pair * self.row_tile_bytes());
                let sums = sums.0.as_mut_ptr().cast::<f32>();
                let steps = self.steps(x, 0, from, to);
                // SAFETY: the blocks exist in weights and sums; tiles of x as promised.
                unsafe {
                    if two {
                        steps.two_by_two(from > 0, pair == 0, sums);
                    } else {
                        steps.two_by_one(from > 0, sums);
                    }
                }
            }
            from = to;
            if from == self.steps {
                break;
            }
        }
        for (pair, sums) in sums[..pairs].iter_mut().enumerate() {
            let sums = sums.0.as_mut_ptr().cast::<f32>();
            let Some(last) = self.last(x.wrapping_add(2 * pair * self.row_tile_bytes()), 0) else { break };
            // SAFETY: as above, for the tail.
            unsafe {
                if two {
                    last.two_by_two(true, false, sums);
                } else {
                    last.two_by_one(true, sums);
                }
            }
        }
    }
}

/// Steps of two blocks whose weights leave room in a first-level cache of 48 KiB.
const CHUNK_STEPS: usize = 16;
/// How many steps ahead a single tile of rows asks for weights.
const AHEAD_STEPS: usize = 3;
/// Bytes from one row of sums to the next.
const SUMS_STRIDE: usize = TILE_COLS * size_of::<f32>();
/// Asks for the sixteen lines of a tile, so many bytes ahead.
macro_rules! ask {
    ($hint:literal, $from:literal) => {
        concat!(
            ask!(@4 $hint, $from, " "), ask!(@4 $hint, $from, " + 256"),
            ask!(@4 $hint, $from, " + 512"), ask!(@4 $hint, $from, " + 768")
        )
    };
    (@4 $hint:literal, $from:literal, $more:literal) => {
        concat!(
            $hint, " [", $from, $more, "]\n", $hint, " [", $from, $more, " + 64]\n",
            $hint, " [", $from, $more, " + 128]\n", $hint, " [", $from, $more, " + 192]\n"
        )
    };
}

/// The loop over steps of `two_by_two`, with what is asked for ahead.
macro_rules! two_by_two {
    ($steps:ident, $out:ident, [$($ask:expr),*]) => {
        asm!(
            "test {steps}, {steps}",
            "jz 3f",
            "2:",
            $($ask,)*
            "tileloadd tmm6, [{a} + {line}]",
            "tileloadd tmm4, [{x} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {line}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{y} + {line}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {x}, 1024",
            "add {y}, 1024",
            "add {a}, 1024",
            "add {b}, 1024",
            "dec {steps}",
            "jnz 2b",
            "3:",
            "tilestored [{out} + {stride}], tmm0",
            "tilestored [{out} + {stride} + 64], tmm1",
            "tilestored [{below} + {stride}], tmm2",
            "tilestored [{below} + {stride} + 64], tmm3",
            x = inout(reg) $steps.x => _,
            y = inout(reg) $steps.x_second => _,
            a = inout(reg) $steps.weights => _,
            b = inout(reg) $steps.weights.wrapping_add($steps.block_bytes) => _,
            steps = inout(reg) $steps.steps => _,
            out = in(reg) $out,
            below = in(reg) $out.wrapping_add(TILE_ROWS * TILE_COLS),
            line = in(reg) TILE_LINE,
            stride = in(reg) SUMS_STRIDE,
            options(nostack)
        )
    };
}

/// A run of steps over one or two tiles of rows and up to four column blocks. Its methods begin at zero, or `go_on` from the
/// sums that are there.
struct Steps {
    x: *const u8,
    x_second: *const u8,
    /// Bytes of a tile of rows; [`TILE_BYTES`] where there are two.
    x_bytes: usize,
    weights: *const u8,
    block_bytes: usize,
    steps: usize,
}

impl Steps {
    /// Asks for weights [`AHEAD_STEPS`] ahead, and in the last steps for what lies `next` bytes on: a panel that began without
    /// would wait for memory, and an expert's panels are short.
    /// # Safety
    /// Four blocks of `steps` tiles lie at `weights`, as many tiles at `x`, and sums at `out`; the thread holds [`Tiles`].
    unsafe fn one_by_four(&self, go_on: bool, next: usize, out: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            begin_four(go_on, [0, 1, 2, 3].map(|block| out.add(block * LANES)));
            asm!(
                "test {steps}, {steps}",
                "jz 3f",
                "2:",
                "cmp {steps}, {last}",
                "cmovbe {ahead}, {next}",
                "tileloadd tmm4, [{x} + {line}]",
                ask!("prefetcht0", "{a} + {ahead}"),
                "tileloadd tmm5, [{a} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                ask!("prefetcht0", "{b} + {ahead}"),
                "tileloadd tmm6, [{b} + {line}]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                ask!("prefetcht0", "{c} + {ahead}"),
                "tileloadd tmm7, [{c} + {line}]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                ask!("prefetcht0", "{d} + {ahead}"),
                "tileloadd tmm5, [{d} + {line}]",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "add {x}, {x_bytes}",
                "add {a}, 1024",
                "add {b}, 1024",
                "add {c}, 1024",
                "add {d}, 1024",
                "dec {steps}",
                "jnz 2b",
                "3:",
                "tilestored [{out} + {stride}], tmm0",
                "tilestored [{out} + {stride} + 64], tmm1",
                "tilestored [{out} + {stride} + 128], tmm2",
                "tilestored [{out} + {stride} + 192], tmm3",
                x = inout(reg) self.x => _,
                x_bytes = in(reg) self.x_bytes,
                a = inout(reg) self.weights => _,
                b = inout(reg) self.weights.wrapping_add(self.block_bytes) => _,
                c = inout(reg) self.weights.wrapping_add(2 * self.block_bytes) => _,
                d = inout(reg) self.weights.wrapping_add(3 * self.block_bytes) => _,
                ahead = inout(reg) AHEAD_STEPS * TILE_BYTES => _,
                next = in(reg) next,
                last = const AHEAD_STEPS,
                steps = inout(reg) self.steps => _,
                out = in(reg) out,
                line = in(reg) TILE_LINE,
                stride = in(reg) SUMS_STRIDE,
                options(nostack)
            );
        }
    }

    /// # Safety
    /// As `one_by_four`, for two blocks and two tiles of rows. `ask`: for the next step's weights, which come from memory.
    unsafe fn two_by_two(&self, go_on: bool, ask: bool, out: *mut f32) {
        // SAFETY: the caller's promise; asking for any address is harmless.
        unsafe {
            let below = out.add(TILE_ROWS * TILE_COLS);
            begin_four(go_on, [out, out.add(LANES), below, below.add(LANES)]);
            if ask {
                two_by_two!(self, out, [ask!("prefetcht1", "{a} + 1024"), ask!("prefetcht1", "{b} + 1024")]);
            } else {
                two_by_two!(self, out, []);
            }
        }
    }

    /// # Safety
    /// As `two_by_two`, for one block.
    unsafe fn two_by_one(&self, go_on: bool, out: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            self.one_by_one(go_on, out);
            Steps { x: self.x_second, ..*self }.one_by_one(go_on, out.add(TILE_ROWS * TILE_COLS));
        }
    }

    /// What is left over of a product whose outputs are no multiple of more.
    /// # Safety
    /// As `one_by_four`, for one block.
    unsafe fn one_by_one(&self, go_on: bool, out: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            begin_four(go_on, [out; 4]);
            asm!(
                "test {steps}, {steps}",
                "jz 3f",
                "2:",
                "tileloadd tmm4, [{x} + {line}]",
                "tileloadd tmm5, [{a} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "add {x}, {x_bytes}",
                "add {a}, 1024",
                "dec {steps}",
                "jnz 2b",
                "3:",
                "tilestored [{out} + {stride}], tmm0",
                x = inout(reg) self.x => _,
                x_bytes = in(reg) self.x_bytes,
                a = inout(reg) self.weights => _,
                steps = inout(reg) self.steps => _,
                out = in(reg) out,
                line = in(reg) TILE_LINE,
                stride = in(reg) SUMS_STRIDE,
                options(nostack)
            );
        }
    }
}

/// Tiles 0 to 3 as zeros, or as the sums at these places.
/// # Safety
/// Each is a place of sums; the thread holds [`Tiles`].
#[inline(always)]
unsafe fn begin_four(go_on: bool, places: [*mut f32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        if go_on {
            asm!(
                "tileloadd tmm0, [{a} + {stride}]",
                "tileloadd tmm1, [{b} + {stride}]",
                "tileloadd tmm2, [{c} + {stride}]",
                "tileloadd tmm3, [{d} + {stride}]",
                a = in(reg) places[0],
                b = in(reg) places[1],
                c = in(reg) places[2],
                d = in(reg) places[3],
                stride = in(reg) SUMS_STRIDE,
                options(nostack, readonly, preserves_flags)
            );
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

/// Multiply-accumulates from registers; returns how many floating-point operations that was.
/// # Safety
/// [`is_available`].
pub(crate) unsafe fn spin(rounds: u64) -> u64 {
    // SAFETY: the caller's promise; no memory is touched.
    unsafe {
        let _tiles = Tiles::take(TILE_ROWS);
        asm!(
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            rounds = inout(reg) rounds.max(1) => _,
            options(nomem, nostack)
        );
    }
    rounds.max(1) * (4 * 2 * TILE_ROWS * LANES * TILE_INPUTS) as u64
}
