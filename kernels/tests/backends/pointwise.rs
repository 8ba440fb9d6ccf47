//! Norms, rotation, combine and rounding: the same bits on every backend, in any batch.

use mesh_kernels::reference::Reference;
use mesh_kernels::rows::RowBuf;
use mesh_kernels::{Compute, Dtype, Rope, Term};

use crate::{DTYPES, Noise, assert_close, assert_same_bits, backends, rows_of};

const ROWS: usize = 300;
const COLS: usize = 1000;

fn everything(dtype: Dtype) -> Vec<Box<dyn Compute>> {
    let cpus = [1, 2, 3].into_iter().flat_map(|threads| backends(dtype, threads));
    cpus.map(|cpu| Box::new(cpu) as Box<dyn Compute>).collect()
}

fn rms_norm(compute: &dyn Compute, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let mut out = RowBuf::new(compute.dtype(), x.len() / weight.len(), weight.len()).unwrap();
    compute.rms_norm(x, weight, 1e-6, out.as_rows_mut());
    out.as_rows().to_f32()
}

#[test]
fn the_norm_is_what_it_says_and_the_same_for_a_row_alone() {
    for dtype in DTYPES {
        let (x, weight) = (Noise::new(1).values(ROWS * COLS), Noise::new(2).values(COLS));
        let reference = Reference::new(dtype);
        let alone: Vec<f32> = x.chunks(COLS).flat_map(|row| rms_norm(&reference, row, &weight)).collect();
        let by_hand = x.chunks(COLS).flat_map(|row| {
            let mean = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / COLS as f64;
            let scale = 1.0 / (mean + 1e-6).sqrt();
            row.iter().zip(&weight).map(move |(&v, &w)| (f64::from(v) * scale * f64::from(w)) as f32)
        });
        let tolerance = if dtype == Dtype::F32 { 1e-6 } else { 5e-3 };
        assert_close("reference", &alone, &by_hand.collect::<Vec<_>>(), tolerance);
        for compute in everything(dtype) {
            assert_same_bits(&compute.name(), &rms_norm(&*compute, &x, &weight), &alone);
        }
    }
}

#[test]
fn head_norms_touch_their_heads_only() {
    let (stride, offset, heads, dim) = (1000, 100, 5, 33);
    let (x, weight) = (Noise::new(3).values(ROWS * stride), Noise::new(4).values(dim));
    let f32s = Reference::new(Dtype::F32);
    let mut want = x.clone();
    for row in want.chunks_mut(stride) {
        for head in row[offset..offset + heads * dim].chunks_mut(dim) {
            let normed = rms_norm(&f32s, head, &weight);
            head.copy_from_slice(&normed);
        }
    }
    for compute in everything(Dtype::F32) {
        let mut got = x.clone();
        compute.rms_norm_heads(&mut got, stride, offset, heads, &weight, 1e-6);
        assert_same_bits(&compute.name(), &got, &want);
    }
}

#[test]
fn rotation_is_half_split_and_the_same_for_a_row_alone() {
    let (stride, offset, heads, half) = (600, 20, 8, 32);
    let inv_freq: Vec<f32> = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
    let rope = Rope { inv_freq, scale: 1.25 };
    let x = Noise::new(5).values(ROWS * stride);
    // Near ones, far ones, and some past what tables keep.
    let positions: Vec<u32> = (0..ROWS as u32).map(|i| i * i * 10).collect();
    let mut want = x.clone();
    for (row, &position) in want.chunks_mut(stride).zip(&positions) {
        for head in row[offset..offset + heads * 2 * half].chunks_mut(2 * half) {
            for i in 0..half {
                let angle = position as f32 * rope.inv_freq[i];
                let (cos, sin) = (angle.cos() * rope.scale, angle.sin() * rope.scale);
                (head[i], head[half + i]) =
                    (head[i] * cos - head[half + i] * sin, head[half + i] * cos + head[i] * sin);
            }
        }
    }
    for compute in everything(Dtype::F32) {
        let mut got = x.clone();
        compute.rotate(&mut got, stride, offset, heads, &positions, &rope);
        assert_same_bits(&compute.name(), &got, &want);
        let mut last = x[(ROWS - 1) * stride..].to_vec();
        compute.rotate(&mut last, stride, offset, heads, &positions[ROWS - 1..], &rope);
        assert_same_bits(&compute.name(), &last, &want[(ROWS - 1) * stride..]);
    }
}

#[test]
fn combine_adds_in_the_order_given() {
    for dtype in DTYPES {
        for per_row in [0, 1, 2, 8] {
            let mut noise = Noise::new(6);
            let residual = noise.values(ROWS * COLS);
            let weights = noise.values(ROWS * per_row);
            let rows = rows_of(&Reference::new(dtype), COLS, &noise.values(ROWS * per_row * COLS));
            let values = rows.as_rows().to_f32();
            let mut want = residual.clone();
            for (i, want) in want.iter_mut().enumerate() {
                let (row, col) = (i / COLS, i % COLS);
                let mut sum = 0.0;
                for term in row * per_row..(row + 1) * per_row {
                    sum += weights[term] * values[term * COLS + col];
                }
                *want += sum;
            }
            let term = |i: usize| Term { weight: weights[i], row: rows.as_rows().row(i) };
            let terms: Vec<Term<'_>> = (0..ROWS * per_row).map(term).collect();
            for compute in everything(dtype) {
                let mut got = residual.clone();
                compute.combine(&mut got, COLS, per_row, &terms);
                assert_same_bits(&compute.name(), &got, &want);
            }
        }
    }
}

#[test]
fn rounding_is_to_nearest_even_everywhere_kernels_round() {
    let values: Vec<f32> = (0..=u16::MAX)
        .flat_map(|high| {
            [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(high) << 16 | low))
        })
        .collect();
    let reference = rows_of(&Reference::new(Dtype::Bf16), values.len(), &values);
    for compute in everything(Dtype::Bf16) {
        let got = rows_of(&*compute, values.len(), &values);
        assert_eq!(got.as_rows().bytes, reference.as_rows().bytes, "{}", compute.name());
    }
}
