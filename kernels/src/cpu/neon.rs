//! Sixteen lanes on AArch64: four 128-bit registers.

use std::arch::aarch64::*;

use super::simd::Simd;

/// Advanced SIMD, which every AArch64 machine has.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    /// # Safety
    /// The machine has Advanced SIMD.
    #[inline(always)]
    pub unsafe fn assume() -> Self {
        Neon(())
    }
}

type Four = [float32x4_t; 4];

/// A safe method made of one expression for each of the four registers.
macro_rules! proven {
    ($($name:ident($($arg:ident),*) = $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Four),*) -> Four {
            let mut out = [$($arg),*][0];
            for i in 0..4 {
                $(let $arg = $arg[i];)*
                // SAFETY: `self` is proof of the instruction set; nothing here touches memory.
                out[i] = unsafe { $body };
            }
            out
        }
    )*};
}

impl Simd for Neon {
    type V = Four;
    type Pair = [f32; 2];
    type Pairs = [uint32x4_t; 4];

    const ROWS_F32: usize = 6;
    const ROWS_BF16: usize = 4;
    const QUERIES: usize = 2;

    #[inline(always)]
    fn blocks(rows: usize, bf16: bool) -> usize {
        match (rows, bf16) {
            (1, false) => 4,
            (1, true) | (2..=3, false) | (2, true) => 2,
            _ => 1,
        }
    }

    proven! {
        add(a, b) = vaddq_f32(a, b);
        sub(a, b) = vsubq_f32(a, b);
        mul(a, b) = vmulq_f32(a, b);
        div(a, b) = vdivq_f32(a, b);
        fma(a, b, c) = vfmaq_f32(c, a, b);
        max(a, b) = vbslq_f32(vcgtq_f32(a, b), a, b);
        min(a, b) = vbslq_f32(vcltq_f32(a, b), a, b);
        select_lt(a, b, x, y) = vbslq_f32(vcltq_f32(a, b), x, y);
        pow2(n) = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127))));
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Four {
        // SAFETY: `self` is proof of the instruction set.
        [unsafe { vdupq_n_f32(x) }; 4]
    }

    #[inline(always)]
    unsafe fn load(self, at: *const f32) -> Four {
        // SAFETY: the caller promises sixteen elements.
        unsafe { [vld1q_f32(at), vld1q_f32(at.add(4)), vld1q_f32(at.add(8)), vld1q_f32(at.add(12))] }
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32, v: Four) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: the caller promises sixteen elements.
            unsafe { vst1q_f32(at.add(4 * i), v) }
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u16) -> Four {
        let mut out = self.splat(0.0);
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller promises sixteen elements.
            *out = unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(at.add(4 * i)))) };
        }
        out
    }

    #[inline(always)]
    unsafe fn store_bf16(self, at: *mut u16, v: Four) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: the caller promises sixteen elements.
            unsafe {
                let bits = vreinterpretq_u32_f32(v);
                let high = vshrq_n_u32::<16>(bits);
                let half = vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
                let rounded = vshrq_n_u32::<16>(vaddq_u32(bits, half));
                let quiet = vorrq_u32(high, vdupq_n_u32(0x40));
                let result = vbslq_u32(vceqq_f32(v, v), rounded, quiet);
                vst1_u16(at.add(4 * i), vmovn_u32(result));
            }
        }
    }

    #[inline(always)]
    fn pair(self, bits: u32) -> [f32; 2] {
        [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)]
    }

    #[inline(always)]
    unsafe fn load_pairs(self, at: *const u32) -> [uint32x4_t; 4] {
        // SAFETY: the caller promises sixteen pairs.
        unsafe { [vld1q_u32(at), vld1q_u32(at.add(4)), vld1q_u32(at.add(8)), vld1q_u32(at.add(12))] }
    }

    #[inline(always)]
    fn dot(self, acc: Four, x: [f32; 2], w: [uint32x4_t; 4]) -> Four {
        let mut out = acc;
        for i in 0..4 {
            // SAFETY: `self` is proof of the instruction set.
            unsafe {
                let low = vreinterpretq_f32_u32(vshlq_n_u32::<16>(w[i]));
                let high = vreinterpretq_f32_u32(vandq_u32(w[i], vdupq_n_u32(0xffff_0000)));
                out[i] = vfmaq_n_f32(vfmaq_n_f32(acc[i], low, x[0]), high, x[1]);
            }
        }
        out
    }

    // The stable toolchain has no prefetch here; these machines' own prefetchers follow linear streams.
    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
    #[inline(always)]
    fn prefetch_far(self, _at: *const u8) {}
}
