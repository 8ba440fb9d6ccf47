//! Sixteen lanes in plain Rust, for machines without a kernel of their own.

use super::simd::Simd;
use crate::bf16;
use crate::matrix::LANES;

/// Plain Rust; every machine has it.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut out = [0f32; LANES];
    for lane in 0..LANES {
        out[lane] = f(a[lane], b[lane]);
    }
    out
}

impl Simd for Portable {
    type V = [f32; LANES];
    type Pair = [f32; 2];
    type Pairs = [u32; LANES];

    const ROWS_F32: usize = 2;
    const ROWS_BF16: usize = 2;
    // No faster and no slower: every machine's tests take this way too.
    const ROWS_WIDENED: usize = 2;
    const ROWS_APART: usize = 2;
    const QUERIES: usize = 1;

    #[inline(always)]
    fn blocks(_rows: usize, _bf16: bool) -> usize {
        1
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }

    // Not fused: without the instruction a fused product is a library call.
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        zip(zip(a, b, |a, b| a * b), c, |product, c| product + c)
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        let mut out = y;
        for lane in 0..LANES {
            if a[lane] < b[lane] {
                out[lane] = x[lane];
            }
        }
        out
    }

    #[inline(always)]
    fn pow2(self, n: Self::V) -> Self::V {
        let mut out = n;
        for value in &mut out {
            *value = f32::from_bits(((*value as i32 + 127) as u32) << 23);
        }
        out
    }

    #[inline(always)]
    unsafe fn load(self, at: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self::V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self::V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u16) -> Self::V {
        // SAFETY: the caller's promise.
        let bits = unsafe { at.cast::<[u16; LANES]>().read_unaligned() };
        let mut out = [0f32; LANES];
        for lane in 0..LANES {
            out[lane] = bf16::widen(bits[lane]);
        }
        out
    }

    #[inline(always)]
    unsafe fn store_bf16(self, at: *mut u16, v: Self::V) {
        let mut bits = [0u16; LANES];
        for lane in 0..LANES {
            bits[lane] = bf16::narrow(v[lane]);
        }
        // SAFETY: the caller's promise.
        unsafe { at.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    fn pair(self, bits: u32) -> Self::Pair {
        [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)]
    }

    #[inline(always)]
    unsafe fn load_pairs(self, at: *const u32) -> Self::Pairs {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self::Pairs>().read_unaligned() }
    }

    #[inline(always)]
    fn dot(self, acc: Self::V, x: Self::Pair, w: Self::Pairs) -> Self::V {
        let mut out = acc;
        for lane in 0..LANES {
            let low = out[lane] + x[0] * f32::from_bits(w[lane] << 16);
            out[lane] = low + x[1] * f32::from_bits(w[lane] & 0xffff_0000);
        }
        out
    }

    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
    #[inline(always)]
    fn prefetch_far(self, _at: *const u8) {}
}
