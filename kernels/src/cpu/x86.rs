//! Sixteen lanes on x86-64: one 512-bit register, or two of 256 bits.

use std::arch::asm;
use std::arch::x86_64::*;

use super::simd::Simd;

/// AVX-512 with bf16 dot products.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(());

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx512Bf16 {
    /// # Safety
    /// The machine has AVX-512 F, BW, DQ, VL and BF16.
    #[inline(always)]
    pub unsafe fn assume() -> Self {
        Avx512Bf16(())
    }
}

impl Avx512 {
    /// # Safety
    /// The machine has AVX-512 F, BW, DQ and VL.
    #[inline(always)]
    pub unsafe fn assume() -> Self {
        Avx512(())
    }
}

impl Avx2 {
    /// # Safety
    /// The machine has AVX2 and FMA.
    #[inline(always)]
    pub unsafe fn assume() -> Self {
        Avx2(())
    }
}

/// A safe method whose body is intrinsics of the instruction set that `self` proves.
macro_rules! proven {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $out:ty = $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $out {
            // SAFETY: `self` is proof of the instruction set; nothing here touches memory.
            unsafe { $body }
        }
    )*};
}

/// A method that reads or writes memory by the caller's promise.
macro_rules! promised {
    ($($name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, $($arg: $ty),*) $(-> $out)? {
            // SAFETY: `self` is proof of the instruction set, and the memory is the caller's promise.
            unsafe { $body }
        }
    )*};
}

/// What both 512-bit sets share.
macro_rules! avx512_common {
    () => {
        type V = __m512;

        const ROWS_F32: usize = 6;
        const QUERIES: usize = 8;

        proven! {
            splat(x: f32) -> __m512 = _mm512_set1_ps(x);
            add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
            sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
            mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
            div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
            fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
            max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
            min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
            select_lt(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 =
                _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x);
            pow2(n: __m512) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
                _mm512_cvtps_epi32(n),
                _mm512_set1_epi32(127),
            )));
        }

        promised! {
            load(at: *const f32) -> __m512 = _mm512_loadu_ps(at);
            store(at: *mut f32, v: __m512) = _mm512_storeu_ps(at, v);
            load_bf16(at: *const u16) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast())),
            ));
            store_bf16(at: *mut u16, v: __m512) = {
                let bits = _mm512_castps_si512(v);
                let high = _mm512_srli_epi32::<16>(bits);
                let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
                let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
                let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
                let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                let result = _mm512_mask_blend_epi32(nan, rounded, quiet);
                _mm256_storeu_si256(at.cast(), _mm512_cvtepi32_epi16(result));
            };
        }

        #[inline(always)]
        fn prefetch(self, at: *const u8) {
            // SAFETY: a prefetch of any address is harmless.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
        #[inline(always)]
        fn prefetch_far(self, at: *const u8) {
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
    };
}

impl Simd for Avx512Bf16 {
    type Pair = __m512i;
    type Pairs = __m512i;

    const ROWS_BF16: usize = 6;

    #[inline(always)]
    fn blocks(_rows: usize, _bf16: bool) -> usize {
        4
    }

    avx512_common!();

    proven! {
        pair(bits: u32) -> __m512i = _mm512_set1_epi32(bits as i32);
        dot(acc: __m512, x: __m512i, w: __m512i) -> __m512 = _mm512_dpbf16_ps(
            acc,
            std::mem::transmute::<__m512i, __m512bh>(x),
            std::mem::transmute::<__m512i, __m512bh>(w),
        );
    }

    promised! {
        load_pairs(at: *const u32) -> __m512i = _mm512_loadu_si512(at.cast());
    }
}

impl Simd for Avx512 {
    type Pair = [__m512; 2];
    type Pairs = [__m512; 2];

    const ROWS_BF16: usize = 4;
    const ROWS_WIDENED: usize = 14;
    const KEEPS_WEIGHTS: bool = true;

    // Two passes of three or four rows are faster than one of widened inputs, but not one of two and one of three.
    #[inline(always)]
    fn widens(rows: usize) -> bool {
        rows == 5 || rows > 8
    }

    // Four blocks of six rows are 24 sums, two of fourteen 28.
    #[inline(always)]
    fn blocks_widened(rows: usize, _passes: usize) -> usize {
        if rows <= 6 { 4 } else { 2 }
    }

    // bf16 needs two registers for each block of weights.
    #[inline(always)]
    fn blocks(rows: usize, bf16: bool) -> usize {
        if bf16 && rows > 4 { 2 } else { 4 }
    }

    avx512_common!();

    proven! {
        pair(bits: u32) -> [__m512; 2] = {
            // Spread first and split after: a broadcast from memory costs nothing, one from a scalar does.
            let both = _mm512_set1_epi32(bits as i32);
            let high = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(high)]
        };
        dot(acc: __m512, x: [__m512; 2], w: [__m512; 2]) -> __m512 =
            _mm512_fmadd_ps(x[1], w[1], _mm512_fmadd_ps(x[0], w[0], acc));
    }

    promised! {
        half(half: usize, at: *const u32) -> __m512 = {
            let both = _mm512_loadu_si512(at.cast());
            if half == 0 {
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both))
            } else {
                _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
            }
        };
        load_pairs(at: *const u32) -> [__m512; 2] = {
            let bits = _mm512_loadu_si512(at.cast());
            let high = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)), _mm512_castsi512_ps(high)]
        };
    }
}

type Two = [__m256; 2];

impl Simd for Avx2 {
    type V = Two;
    type Pair = Two;
    type Pairs = [__m256i; 2];

    const ROWS_F32: usize = 2;
    const ROWS_BF16: usize = 1;
    const ROWS_WIDENED: usize = 6;
    const ROWS_APART: usize = 6;
    const QUERIES: usize = 2;

    #[inline(always)]
    fn blocks(_rows: usize, _bf16: bool) -> usize {
        2
    }

    // Two blocks of three rows are twelve of sixteen registers; rows that pass again find their weights in a cache.
    #[inline(always)]
    fn blocks_widened(rows: usize, passes: usize) -> usize {
        if rows <= 3 && passes == 1 { 2 } else { 1 }
    }

    proven! {
        splat(x: f32) -> Two = [_mm256_set1_ps(x); 2];
        add(a: Two, b: Two) -> Two = [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])];
        sub(a: Two, b: Two) -> Two = [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])];
        mul(a: Two, b: Two) -> Two = [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])];
        div(a: Two, b: Two) -> Two = [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])];
        fma(a: Two, b: Two, c: Two) -> Two = [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])];
        max(a: Two, b: Two) -> Two = [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])];
        min(a: Two, b: Two) -> Two = [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])];
        select_lt(a: Two, b: Two, x: Two, y: Two) -> Two = [
            _mm256_blendv_ps(y[0], x[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(y[1], x[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])),
        ];
        pow2(n: Two) -> Two = [pow2_half(n[0]), pow2_half(n[1])];
        pair(bits: u32) -> Two = {
            let both = _mm256_set1_epi32(bits as i32);
            let high = _mm256_and_si256(both, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(both)), _mm256_castsi256_ps(high)]
        };
        dot(acc: Two, x: Two, w: [__m256i; 2]) -> Two = [dot_half(acc[0], x, w[0]), dot_half(acc[1], x, w[1])];
    }

    promised! {
        load(at: *const f32) -> Two = [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))];
        store(at: *mut f32, v: Two) = {
            _mm256_storeu_ps(at, v[0]);
            _mm256_storeu_ps(at.add(8), v[1]);
        };
        load_bf16(at: *const u16) -> Two = [load_bf16_half(at), load_bf16_half(at.add(8))];
        store_bf16(at: *mut u16, v: Two) = {
            _mm_storeu_si128(at.cast(), narrow_half(v[0]));
            _mm_storeu_si128(at.add(8).cast(), narrow_half(v[1]));
        };
        half(half: usize, at: *const u32) -> Two = {
            let (one, two) = (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(8).cast()));
            if half == 0 {
                [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(one)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(two))]
            } else {
                let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                [_mm256_castsi256_ps(_mm256_and_si256(one, mask)), _mm256_castsi256_ps(_mm256_and_si256(two, mask))]
            }
        };
        load_pairs(at: *const u32) -> [__m256i; 2] =
            [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(8).cast())];
    }

    #[inline(always)]
    fn compiler_barrier(self) {
        // SAFETY: no instruction at all.
        unsafe { asm!("", options(nostack, preserves_flags)) };
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(self, at: *const u8) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Helpers on eight lanes.
/// # Safety
/// Callers hold an [`Avx2`].
#[inline(always)]
unsafe fn pow2_half(n: __m256) -> __m256 {
    // SAFETY: the caller holds proof of AVX2.
    unsafe {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
}

#[inline(always)]
unsafe fn dot_half(acc: __m256, x: Two, w: __m256i) -> __m256 {
    // SAFETY: the caller holds proof of AVX2 and FMA.
    unsafe {
        let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
        let high = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
        _mm256_fmadd_ps(x[1], high, _mm256_fmadd_ps(x[0], low, acc))
    }
}

#[inline(always)]
unsafe fn load_bf16_half(at: *const u16) -> __m256 {
    // SAFETY: the caller holds proof of AVX2, and promises eight elements.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast())))) }
}

#[inline(always)]
unsafe fn narrow_half(v: __m256) -> __m128i {
    // SAFETY: the caller holds proof of AVX2.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let high = _mm256_srli_epi32::<16>(bits);
        let half = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
        let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let result = _mm256_blendv_epi8(rounded, quiet, nan);
        // Packing works on 128-bit halves: their low parts are put together after it.
        let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(result, result));
        _mm256_castsi256_si128(packed)
    }
}
