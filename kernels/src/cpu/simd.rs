//! Sixteen f32 lanes, whatever the registers are: the kernels are written once over [`Simd`].
//!
//! A value of an implementing type is proof that the machine has the instructions, so arithmetic is safe; only memory
//! access is not. Everything is `inline(always)` and ends up in the `target_feature` entries of `table`.

use crate::Dtype;
use crate::matrix::{LANES, PANEL_BLOCKS};

/// Most rows that a micro-kernel takes at once, on any instruction set.
pub(crate) const ROWS_MAX: usize = 14;
/// Column blocks in a tile: what is computed before the epilogue runs.
pub(crate) const TILE_BLOCKS: usize = PANEL_BLOCKS;

/// Sixteen lanes of f32 and what the kernels need of them.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// A pair of neighbouring bf16 inputs, spread to all lanes.
    type Pair: Copy;
    /// Packed bf16 weights: a pair for each lane.
    type Pairs: Copy;

    /// Rows of a micro-kernel: as many as the registers hold accumulators for.
    const ROWS_F32: usize;
    /// The same for bf16.
    const ROWS_BF16: usize;
    /// The same for bf16 inputs that were widened to f32 before and lie apart, where `dot` is an `fma` with the earlier half and one
    /// with the later; 0 where that gains nothing, or was never measured.
    const ROWS_WIDENED: usize = 0;
    /// The same for inputs of f32, copied to where widened ones lie; with more rows than [`Simd::ROWS_F32`].
    const ROWS_APART: usize = 0;
    /// Whether there are registers for the weights of all blocks of a micro-kernel of widened inputs.
    const KEEPS_WEIGHTS: bool = false;
    /// Attention queries that share one walk over a page.
    const QUERIES: usize;

    /// Column blocks that a micro-kernel of `rows` rows takes at once: 1, 2 or 4.
    fn blocks(rows: usize, bf16: bool) -> usize;
    /// Whether so many rows of bf16 are widened before, rather than as they are multiplied.
    #[inline(always)]
    fn widens(rows: usize) -> bool {
        Self::ROWS_WIDENED > 0 && rows > Self::ROWS_BF16
    }
    /// The same as `blocks` for widened inputs, whose rows pass over the weights so many times.
    #[inline(always)]
    fn blocks_widened(_rows: usize, _passes: usize) -> usize {
        1
    }

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the machine fuses.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `x` where `a < b`, else `y`.
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// 2 to the power of `n`, a whole number in -126..=127 in each lane.
    fn pow2(self, n: Self::V) -> Self::V;

    /// # Safety
    /// Sixteen f32 are readable at `at`; no alignment is needed.
    unsafe fn load(self, at: *const f32) -> Self::V;
    /// # Safety
    /// Sixteen f32 are writable at `at`; no alignment is needed.
    unsafe fn store(self, at: *mut f32, v: Self::V);
    /// # Safety
    /// Sixteen bf16 are readable at `at`; no alignment is needed.
    unsafe fn load_bf16(self, at: *const u16) -> Self::V;
    /// Rounds to nearest even, as `bf16::narrow` does.
    /// # Safety
    /// Sixteen bf16 are writable at `at`; no alignment is needed.
    unsafe fn store_bf16(self, at: *mut u16, v: Self::V);

    /// Two bf16 inputs, the earlier in the low half.
    fn pair(self, bits: u32) -> Self::Pair;
    /// # Safety
    /// Sixteen pairs are readable at `at`.
    unsafe fn load_pairs(self, at: *const u32) -> Self::Pairs;
    /// `acc` plus both products of each lane.
    fn dot(self, acc: Self::V, x: Self::Pair, w: Self::Pairs) -> Self::V;

    /// The earlier (0) or the later (1) of each of sixteen pairs of bf16, widened.
    /// # Safety
    /// Sixteen pairs are readable at `at`.
    #[inline(always)]
    unsafe fn half(self, half: usize, at: *const u32) -> Self::V {
        let mut lanes = [0f32; LANES];
        for (lane, widened) in lanes.iter_mut().enumerate() {
            // SAFETY: the caller promises sixteen pairs.
            let bits = unsafe { at.add(lane).read_unaligned() };
            *widened = f32::from_bits(if half == 0 { bits << 16 } else { bits & 0xffff_0000 });
        }
        // SAFETY: sixteen lanes.
        unsafe { self.load(lanes.as_ptr()) }
    }

    /// What is read after it is not read before, and what was read before is read again. Where registers are few, what the compiler
    /// reads early or keeps takes those of sums, which then go to memory and back at every step.
    #[inline(always)]
    fn compiler_barrier(self) {}

    /// Asks for the line at `at` ahead of its use; the address may be anything.
    fn prefetch(self, at: *const u8);
    /// As `prefetch`, for later: not into the first-level cache.
    fn prefetch_far(self, at: *const u8);

    /// Sixteen elements of `dtype`, widened.
    /// # Safety
    /// Sixteen elements of `dtype` are readable at `at`.
    #[inline(always)]
    unsafe fn load_as(self, dtype: Dtype, at: *const u8) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe {
            match dtype {
                Dtype::F32 => self.load(at.cast()),
                Dtype::Bf16 => self.load_bf16(at.cast()),
            }
        }
    }

    /// The first `count` (at most sixteen) lanes as elements of `dtype`.
    /// # Safety
    /// `count` elements of `dtype` are writable at `at`.
    #[inline(always)]
    unsafe fn store_as(self, dtype: Dtype, at: *mut u8, v: Self::V, count: usize) {
        // SAFETY: whole vectors by the caller's promise; fewer lanes go through a buffer of sixteen.
        unsafe {
            match (dtype, count) {
                (Dtype::F32, LANES) => self.store(at.cast(), v),
                (Dtype::Bf16, LANES) => self.store_bf16(at.cast(), v),
                (Dtype::F32, _) => {
                    let mut lanes = [0f32; LANES];
                    self.store(lanes.as_mut_ptr(), v);
                    std::ptr::copy_nonoverlapping(lanes.as_ptr().cast(), at, count * 4);
                }
                (Dtype::Bf16, _) => {
                    let mut lanes = [0u16; LANES];
                    self.store_bf16(lanes.as_mut_ptr(), v);
                    std::ptr::copy_nonoverlapping(lanes.as_ptr().cast(), at, count * 2);
                }
            }
        }
    }

    /// e to the power of `x`, within 2 ulp; exactly 0 below [`EXP_MIN`], constant above [`EXP_MAX`]; NaN stays NaN.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        let (low, high) = (self.splat(EXP_MIN), self.splat(EXP_MAX));
        let clamped = self.max(low, self.min(high, x));
        // Adding and taking away 1.5 * 2^23 rounds to a whole number.
        let magic = self.splat(12_582_912.0);
        let n = self.sub(self.fma(clamped, self.splat(std::f32::consts::LOG2_E), magic), magic);
        let r = self.fma(n, self.splat(-LN2_HIGH), clamped);
        let r = self.fma(n, self.splat(-LN2_LOW), r);
        let mut p = self.splat(EXP_POLY[0]);
        for coefficient in &EXP_POLY[1..] {
            p = self.fma(p, r, self.splat(*coefficient));
        }
        let y = self.mul(p, self.pow2(n));
        self.select_lt(x, low, self.splat(0.0), y)
    }

    /// `gate / (1 + exp(-gate)) * up`.
    #[inline(always)]
    fn swiglu(self, gate: Self::V, up: Self::V) -> Self::V {
        let e = self.exp(self.sub(self.splat(0.0), gate));
        self.mul(self.div(gate, self.add(self.splat(1.0), e)), up)
    }
}

/// Below this the exponential would be subnormal: it is 0.
pub(crate) const EXP_MIN: f32 = -87.3;
/// Above this the exponential stays what it is here, so that scaling by 2^127 does not overflow.
pub(crate) const EXP_MAX: f32 = 88.0;
// ln 2 in two parts; the high one has few enough bits that n times it is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
// exp(r) for |r| <= ln 2 / 2, highest power first (the Cephes minimax polynomial, 1 + r + r^2 (...)).
const EXP_POLY: [f32; 8] =
    [1.987_569_2e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0];
