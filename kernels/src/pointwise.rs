//! Norms, rotation, combine and rounding: per row, no reduction but the norm's, which runs over sixteen fixed lanes.
//!
//! Written as plain loops without fused multiply-adds, so that they give the same bits on every backend; backends
//! compile them again for wider registers.

use crate::bf16;
use crate::matrix::LANES;
use crate::rows::narrow_into;
use crate::{Dtype, Rope, Term};

/// Elements worked on at a time where a row passes through f32 scratch on the stack.
const CHUNK: usize = 64;

/// `1 / rms(x)`.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for lane in 0..LANES {
            sums[lane] += chunk[lane] * chunk[lane];
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += value * value;
    }
    1.0 / (sum_lanes(sums) / x.len() as f32 + eps).sqrt()
}

/// Sixteen lanes added as a fixed tree.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `out = x / rms(x) * weight`, rounded to `dtype`.
#[inline(always)]
pub(crate) fn rms_norm_row(dtype: Dtype, x: &[f32], weight: &[f32], eps: f32, out: &mut [u8]) {
    let scale = inverse_rms(x, eps);
    let mut values = [0f32; CHUNK];
    for ((x, weight), out) in x.chunks(CHUNK).zip(weight.chunks(CHUNK)).zip(out.chunks_mut(CHUNK * dtype.bytes())) {
        for ((value, x), weight) in values.iter_mut().zip(x).zip(weight) {
            *value = x * scale * weight;
        }
        narrow_into(dtype, &values[..x.len()], out);
    }
}

/// The same in place and in f32.
#[inline(always)]
pub(crate) fn rms_norm_head(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = inverse_rms(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

/// The cosines, then the sines, of one position; `angles` has room for `2 * inv_freq.len()`.
pub(crate) fn angles_into(rope: &Rope, position: u32, angles: &mut [f32]) {
    let (cos, sin) = angles.split_at_mut(rope.inv_freq.len());
    for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(&rope.inv_freq) {
        let angle = position as f32 * freq;
        *cos = angle.cos() * rope.scale;
        *sin = angle.sin() * rope.scale;
    }
}

/// Rotates whole heads of `angles.len()` elements.
#[inline(always)]
pub(crate) fn rotate_heads(heads: &mut [f32], angles: &[f32]) {
    let half = angles.len() / 2;
    if half == 0 {
        return;
    }
    let (cos, sin) = angles.split_at(half);
    for head in heads.chunks_exact_mut(2 * half) {
        let (low, high) = head.split_at_mut(half);
        for i in 0..half {
            let (a, b) = (low[i], high[i]);
            low[i] = a * cos[i] - b * sin[i];
            high[i] = b * cos[i] + a * sin[i];
        }
    }
}

/// `residual += sum(weight * term)`, the sum taken from zero in order.
#[inline(always)]
pub(crate) fn combine_row(dtype: Dtype, residual: &mut [f32], terms: &[Term<'_>]) {
    match dtype {
        Dtype::F32 => combine_as::<4>(residual, terms, f32::from_le_bytes),
        Dtype::Bf16 => combine_as::<2>(residual, terms, |bytes| bf16::widen(u16::from_le_bytes(bytes))),
    }
}

/// The same of elements of `BYTES` bytes. Whole chunks stay in registers while their terms pass by.
#[inline(always)]
fn combine_as<const BYTES: usize>(residual: &mut [f32], terms: &[Term<'_>], widen: impl Fn([u8; BYTES]) -> f32) {
    let (whole, rest) = residual.as_chunks_mut::<CHUNK>();
    let done = whole.len() * CHUNK;
    for (chunk, residual) in whole.iter_mut().enumerate() {
        let mut sums = [0f32; CHUNK];
        for term in terms {
            let (values, _) = term.row[chunk * CHUNK * BYTES..][..CHUNK * BYTES].as_chunks::<BYTES>();
            for i in 0..CHUNK {
                sums[i] += term.weight * widen(values[i]);
            }
        }
        for i in 0..CHUNK {
            residual[i] += sums[i];
        }
    }
    for (i, residual) in rest.iter_mut().enumerate() {
        let mut sum = 0f32;
        for term in terms {
            sum += term.weight * widen(term.row.as_chunks::<BYTES>().0[done + i]);
        }
        *residual += sum;
    }
}
