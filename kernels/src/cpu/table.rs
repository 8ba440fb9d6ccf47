//! The kernels' entries, compiled once for each instruction set, and the table that holds one set of them.

use super::attend::{Attend, STEP_PAGES, attend};
use super::gemm::{Product, Scratch, product};
use super::isa::{Asking, Isa};
use super::portable::Portable;
use super::simd::{ROWS_MAX, Simd};
use super::variants;
use crate::matrix::LANES;
use crate::rows::narrow_into;
use crate::{Dtype, Term, pointwise};

/// One instruction set's kernels. Every entry is unsafe to call where the machine lacks the set, and as its body says.
pub(crate) struct Kernels {
    /// Blocks of weights that are packed side by side for it.
    pub side_by_side: usize,
    /// Whether products of many rows widen bf16 inputs before.
    pub widens_bf16: bool,
    pub product: unsafe fn(&Product<'_>, &mut Scratch),
    pub attend: unsafe fn(&Attend<'_>, &mut Vec<f32>),
    pub rms_norm_row: unsafe fn(Dtype, &[f32], &[f32], f32, &mut [u8]),
    pub rms_norm_head: unsafe fn(&mut [f32], &[f32], f32),
    pub rotate_heads: unsafe fn(&mut [f32], &[f32]),
    pub combine_row: unsafe fn(Dtype, &mut [f32], &[Term<'_>]),
    pub narrow: unsafe fn(Dtype, &[f32], &mut [u8]),
    #[cfg(test)]
    pub exp: unsafe fn(&mut [f32; LANES]),
    #[cfg(test)]
    pub store_bf16: unsafe fn(&[f32; LANES], &mut [u16; LANES]),
    pub spin: unsafe fn(Dtype, u64) -> u64,
    pub read: unsafe fn(&[u8], Asking) -> f32,
}

impl Kernels {
    /// The kernels of `isa`, which the machine has.
    pub fn of(isa: Isa) -> &'static Kernels {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::AmxBf16 => &amx_bf16::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => &avx512_bf16::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &neon::KERNELS,
            _ => &portable::KERNELS,
        }
    }

    /// Those that break invariance, for benchmarks.
    pub fn breaking_invariance(isa: Isa) -> &'static Kernels {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::AmxBf16 => &amx_bf16::BREAKING,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => &avx512_bf16::BREAKING,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512::BREAKING,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::BREAKING,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &neon::BREAKING,
            _ => &portable::BREAKING,
        }
    }
}

/// Multiply-accumulates from registers, `rounds` of each sum in flight; returns how many floating-point operations that
/// was. As many sums are in flight as hide the latency and fit the registers.
#[inline(always)]
fn spin<S: Simd>(s: S, dtype: Dtype, rounds: u64) -> u64 {
    if S::ROWS_F32 * S::blocks(S::ROWS_F32, false) >= 24 {
        spin_sums::<S, 24>(s, dtype, rounds)
    } else {
        spin_sums::<S, 4>(s, dtype, rounds)
    }
}

#[inline(always)]
fn spin_sums<S: Simd, const SUMS: usize>(s: S, dtype: Dtype, rounds: u64) -> u64 {
    let mut sums = [s.splat(0.0); SUMS];
    let x = s.splat(f32::from_bits(rounds as u32 | 1));
    let pair = s.pair(rounds as u32 | 1);
    let line = [rounds as u32; LANES];
    // SAFETY: a line holds sixteen pairs.
    let weights = unsafe { s.load_pairs(line.as_ptr()) };
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = match dtype {
                Dtype::F32 => s.fma(x, x, *sum),
                Dtype::Bf16 => s.dot(*sum, pair, weights),
            };
        }
    }
    let mut total = sums[0];
    for sum in &sums[1..] {
        total = s.add(total, *sum);
    }
    std::hint::black_box(first_lane(s, total));
    let products = match dtype {
        Dtype::F32 => LANES,
        Dtype::Bf16 => 2 * LANES,
    };
    rounds * (2 * SUMS * products) as u64
}

/// Reads every whole line once, in order: the machine's bandwidth limit.
#[inline(always)]
fn read<S: Simd>(s: S, bytes: &[u8], asking: Asking) -> f32 {
    const STREAMS: usize = 8;
    // Bytes ahead.
    const NEAR: usize = 2048;
    const FAR: usize = 8192;
    let mut sums = [s.splat(0.0); STREAMS];
    for lines in bytes.chunks_exact(STREAMS * 64) {
        for (stream, sum) in sums.iter_mut().enumerate() {
            let at = lines[stream * 64..].as_ptr();
            if asking != Asking::Never {
                s.prefetch(at.wrapping_add(NEAR));
            }
            if asking == Asking::Twice {
                s.prefetch_far(at.wrapping_add(FAR));
            }
            // SAFETY: the chunk holds a whole line for each stream.
            *sum = s.max(*sum, unsafe { s.load(at.cast()) });
        }
    }
    let mut total = sums[0];
    for sum in &sums[1..] {
        total = s.max(total, *sum);
    }
    first_lane(s, total)
}

#[inline(always)]
fn first_lane<S: Simd>(s: S, v: S::V) -> f32 {
    let mut lanes = [0f32; LANES];
    // SAFETY: sixteen lanes of room.
    unsafe { s.store(lanes.as_mut_ptr(), v) };
    lanes[0]
}

#[cfg(test)]
#[inline(always)]
fn exp<S: Simd>(s: S, x: &mut [f32; LANES]) {
    // SAFETY: sixteen lanes.
    unsafe { s.store(x.as_mut_ptr(), s.exp(s.load(x.as_ptr()))) }
}

/// Compiles every kernel with `features` on, around a `$simd` that may then be assumed. `$side_by_side`: blocks of weights that
/// it multiplies at once where rows are few, which then lie side by side. `$widens_bf16`: whether its `ROWS_WIDENED` is not 0.
macro_rules! entries {
    ($name:ident, $side_by_side:literal, $widens_bf16:literal, $assume:expr $(, $features:literal)?) => {
        mod $name {
            use super::*;

            $(#[target_feature(enable = $features)])?
            unsafe fn product(p: &Product<'_>, scratch: &mut Scratch) {
                // SAFETY: the table is only taken where the machine has the instruction set; the rest is the caller's.
                unsafe { super::product($assume, p, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn attend(a: &Attend<'_>, sums: &mut Vec<f32>) {
                // SAFETY: as above.
                unsafe { super::attend::<_, STEP_PAGES, true>($assume, a, sums) }
            }

            $(#[target_feature(enable = $features)])?
            fn rms_norm_row(dtype: Dtype, x: &[f32], weight: &[f32], eps: f32, out: &mut [u8]) {
                pointwise::rms_norm_row(dtype, x, weight, eps, out);
            }

            $(#[target_feature(enable = $features)])?
            fn rms_norm_head(x: &mut [f32], weight: &[f32], eps: f32) {
                pointwise::rms_norm_head(x, weight, eps);
            }

            $(#[target_feature(enable = $features)])?
            fn rotate_heads(heads: &mut [f32], angles: &[f32]) {
                pointwise::rotate_heads(heads, angles);
            }

            $(#[target_feature(enable = $features)])?
            fn combine_row(dtype: Dtype, residual: &mut [f32], terms: &[Term<'_>]) {
                pointwise::combine_row(dtype, residual, terms);
            }

            $(#[target_feature(enable = $features)])?
            fn narrow(dtype: Dtype, x: &[f32], out: &mut [u8]) {
                narrow_into(dtype, x, out);
            }

            #[cfg(test)]
            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe)]
            fn exp(x: &mut [f32; LANES]) {
                // SAFETY: as above.
                super::exp(unsafe { $assume }, x);
            }

            #[cfg(test)]
            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe)]
            fn store_bf16(x: &[f32; LANES], out: &mut [u16; LANES]) {
                // SAFETY: as above; both hold sixteen lanes.
                unsafe {
                    let s = $assume;
                    s.store_bf16(out.as_mut_ptr(), s.load(x.as_ptr()));
                }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe)]
            fn spin(dtype: Dtype, rounds: u64) -> u64 {
                // SAFETY: as above.
                super::spin(unsafe { $assume }, dtype, rounds)
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe)]
            fn read(bytes: &[u8], asking: Asking) -> f32 {
                // SAFETY: as above.
                super::read(unsafe { $assume }, bytes, asking)
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn breaking_product(p: &Product<'_>, scratch: &mut Scratch) {
                // SAFETY: as above.
                unsafe { variants::product($assume, p, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn breaking_attend(a: &Attend<'_>, sums: &mut Vec<f32>) {
                // SAFETY: as above.
                unsafe { variants::attend($assume, a, sums) }
            }

            $(#[target_feature(enable = $features)])?
            fn breaking_combine_row(dtype: Dtype, residual: &mut [f32], terms: &[Term<'_>]) {
                variants::combine_row(dtype, residual, terms);
            }

            pub(super) const BREAKING: Kernels = Kernels {
                product: breaking_product,
                attend: breaking_attend,
                combine_row: breaking_combine_row,
                ..KERNELS
            };

            pub(super) const KERNELS: Kernels = Kernels {
                side_by_side: $side_by_side,
                widens_bf16: $widens_bf16,
                product,
                attend,
                rms_norm_row,
                rms_norm_head,
                rotate_heads,
                combine_row,
                narrow,
                #[cfg(test)]
                exp,
                #[cfg(test)]
                store_bf16,
                spin,
                read,
            };
        }
    };
}

entries!(portable, 1, true, Portable);
#[cfg(target_arch = "x86_64")]
entries!(avx2, 2, true, crate::cpu::x86::Avx2::assume(), "avx2,fma");
#[cfg(target_arch = "x86_64")]
entries!(avx512, 4, true, crate::cpu::x86::Avx512::assume(), "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma");
#[cfg(target_arch = "x86_64")]
entries!(
    avx512_bf16,
    4,
    false,
    crate::cpu::x86::Avx512Bf16::assume(),
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"
);
/// AMX: bf16 products on tiles, all else as AVX-512 does it.
#[cfg(target_arch = "x86_64")]
mod amx_bf16 {
    use super::*;
    use crate::cpu::amx;

    unsafe fn product(p: &Product<'_>, scratch: &mut Scratch) {
        // SAFETY: the caller's promise, for whichever holds of the dtype.
        unsafe {
            match p.dtype {
                Dtype::Bf16 => amx::product(p),
                Dtype::F32 => (avx512_bf16::KERNELS.product)(p, scratch),
            }
        }
    }

    unsafe fn spin(dtype: Dtype, rounds: u64) -> u64 {
        // SAFETY: the caller's promise.
        unsafe {
            match dtype {
                Dtype::Bf16 => amx::spin(rounds),
                Dtype::F32 => (avx512_bf16::KERNELS.spin)(dtype, rounds),
            }
        }
    }

    // A tile is read where its block lies: blocks apart.
    pub(super) const KERNELS: Kernels = Kernels { side_by_side: 1, product, spin, ..avx512_bf16::KERNELS };
    // A tile of rows costs what one row does, and four tiles of sums are in flight: no other order of K is faster.
    pub(super) const BREAKING: Kernels = Kernels { side_by_side: 1, product, spin, ..avx512_bf16::BREAKING };
}
#[cfg(target_arch = "aarch64")]
entries!(neon, 1, false, crate::cpu::neon::Neon::assume(), "neon");

// A tile has no more rows than the largest micro-kernel anywhere.
const _: () = assert!(Portable::ROWS_F32 <= ROWS_MAX && Portable::ROWS_BF16 <= ROWS_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    fn exp(isa: Isa, x: f32, lane: usize) -> f32 {
        let mut lanes = [0f32; LANES];
        lanes[lane] = x;
        // SAFETY: only asked for available instruction sets.
        unsafe { (Kernels::of(isa).exp)(&mut lanes) };
        lanes[lane]
    }

    #[test]
    fn the_exponential_is_within_two_ulp_and_the_same_in_every_lane() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for step in -87_000i32..=87_000 {
                let x = step as f32 * 1e-3;
                let (got, want) = (exp(isa, x, step.unsigned_abs() as usize % LANES), f64::from(x).exp());
                let error = (f64::from(got) - want).abs() / want;
                assert!(error < 2.0 * f64::from(f32::EPSILON), "{isa}: exp({x}) = {got}, not {want}");
                assert_eq!(got.to_bits(), exp(isa, x, 0).to_bits());
            }
        }
    }

    #[test]
    fn vectors_round_to_bf16_as_single_values_do() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for high in 0..=u16::MAX {
                let lows = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
                let x = std::array::from_fn(|i| f32::from_bits((u32::from(high) << 16) | lows[i % lows.len()]));
                let mut got = [0u16; LANES];
                // SAFETY: only asked for available instruction sets.
                unsafe { (Kernels::of(isa).store_bf16)(&x, &mut got) };
                assert_eq!(got, x.map(crate::bf16::narrow), "{isa}: {high:#x}");
            }
        }
    }

    #[test]
    fn the_exponential_has_exact_ends_and_keeps_nan() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            assert_eq!(exp(isa, 0.0, 3), 1.0);
            assert_eq!(exp(isa, f32::NEG_INFINITY, 0), 0.0);
            assert_eq!(exp(isa, -1000.0, 15), 0.0);
            assert!(exp(isa, f32::INFINITY, 0).is_finite());
            assert!(exp(isa, f32::NAN, 0).is_nan());
        }
    }
}
