//! The matrix product.

use mesh_kernels::reference::Reference;
use mesh_kernels::rows::MatrixView;
use mesh_kernels::{Compute, Dtype, Matrix};
use proptest::prelude::*;

use crate::{DTYPES, Noise, Stored, assert_close, assert_same_bits, backends, rows_of};

fn run(compute: &dyn Compute, w: &Matrix, x: &[f32]) -> Vec<f32> {
    let x = rows_of(compute, w.k(), x);
    let mut out = vec![f32::NAN; x.rows() * w.n()];
    compute.linear(w, x.as_rows(), &mut out);
    out
}

fn check_against_reference(dtype: Dtype, m: usize, n: usize, k: usize) {
    let (w, x) = (Stored::noise(n, k, 1), Noise::new(2).values(m * k));
    let reference = Reference::new(dtype);
    let want = run(&reference, &reference.pack(&[w.view()]), &x);
    for cpu in backends(dtype, 2) {
        let got = run(&cpu, &cpu.pack(&[w.view()]), &x);
        // Sums of k products below 1, in another order or fused.
        let tolerance = 2e-6 * (k as f32).sqrt();
        assert_close(&format!("{} m={m} n={n} k={k}", cpu.name()), &got, &want, tolerance);
    }
}

#[test]
fn agrees_with_the_reference_on_awkward_shapes() {
    for dtype in DTYPES {
        for k in [1, 2, 48, 80, 96, 224, 255] {
            for n in [1, 15, 16, 17, 50, 512] {
                for m in [0, 1, 2, 3, 5, 6, 7, 13, 70] {
                    check_against_reference(dtype, m, n, k);
                }
            }
        }
    }
}

#[test]
fn whole_numbers_give_exact_sums_on_every_instruction_set() {
    // Products and sums of small whole numbers are exact in bf16 and f32 in any order, so nothing may differ.
    for dtype in DTYPES {
        let (m, n, k) = (9, 70, 255);
        let whole = |seed, count| -> Vec<f32> {
            Noise::new(seed).values(count).iter().map(|value| (value * 100.0).round()).collect()
        };
        let (w, x) = (whole(1, n * k), whole(2, m * k));
        let mut want = Vec::new();
        for x in x.chunks(k) {
            want.extend(w.chunks(k).map(|w| w.iter().zip(x).map(|(&a, &b)| a as i64 * b as i64).sum::<i64>() as f32));
        }
        for cpu in backends(dtype, 1) {
            let w = cpu.pack(&[Stored::new(n, k, &w).view()]);
            assert_same_bits(&cpu.name(), &run(&cpu, &w, &x), &want);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch_place_and_thread_count() {
    for dtype in DTYPES {
        // The second is large enough to be shared among threads, and cut over rows as well as columns; the third has more inputs
        // than a micro-kernel takes at once, and an odd number of them.
        for (n, k, m) in [(50, 255, 70), (200, 512, 130), (70, 771, 20)] {
            let (w, x) = (Stored::noise(n, k, 3), Noise::new(4).values(m * k));
            for single in backends(dtype, 1) {
                let packed = single.pack(&[w.view()]);
                let alone: Vec<f32> = x.chunks(k).flat_map(|row| run(&single, &packed, row)).collect();
                let isa = single.isa();
                for threads in [1, 2, 3] {
                    let cpus = backends(dtype, threads);
                    let cpu = cpus.iter().find(|cpu| cpu.isa() == isa).unwrap();
                    let packed = cpu.pack(&[w.view()]);
                    for rows in 1..=m {
                        let from = (rows * 7) % (m - rows + 1);
                        let got = run(cpu, &packed, &x[from * k..(from + rows) * k]);
                        assert_same_bits(
                            &format!("{} rows={rows}", cpu.name()),
                            &got,
                            &alone[from * n..(from + rows) * n],
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn an_output_has_the_same_bits_whatever_it_is_stacked_with() {
    for dtype in DTYPES {
        let (k, parts) = (96, [17, 5, 64]);
        let stored: Vec<Stored> = parts.iter().enumerate().map(|(i, &n)| Stored::noise(n, k, i as u64)).collect();
        let x = Noise::new(9).values(3 * k);
        for cpu in backends(dtype, 1) {
            let views: Vec<MatrixView<'_>> = stored.iter().map(Stored::view).collect();
            let together = run(&cpu, &cpu.pack(&views), &x);
            let mut from = 0;
            for (view, n) in views.iter().zip(parts) {
                let alone = run(&cpu, &cpu.pack(&[*view]), &x);
                for row in 0..3 {
                    assert_same_bits(&cpu.name(), &together[row * 86 + from..][..n], &alone[row * n..][..n]);
                }
                from += n;
            }
        }
    }
}

#[test]
fn weights_stored_as_bf16_are_those_stored_as_f32() {
    for dtype in DTYPES {
        let (n, k) = (33, 51);
        let exact: Vec<f32> =
            Noise::new(5).values(n * k).iter().map(|v| f32::from_bits(v.to_bits() & !0xffff)).collect();
        let bytes: Vec<u8> = exact.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect();
        let stored = Stored::new(n, k, &exact);
        let x = Noise::new(6).values(2 * k);
        let reference: Box<dyn Compute> = Box::new(Reference::new(dtype));
        let all = backends(dtype, 1).into_iter().map(|cpu| Box::new(cpu) as Box<dyn Compute>).chain([reference]);
        for compute in all {
            let narrow = compute.pack(&[MatrixView { dtype: Dtype::Bf16, n, k, bytes: &bytes }]);
            let wide = compute.pack(&[stored.view()]);
            assert_same_bits(&compute.name(), &run(&*compute, &narrow, &x), &run(&*compute, &wide, &x));
        }
    }
}

#[test]
#[should_panic(expected = "another width")]
fn rows_of_another_width_are_refused() {
    let cpu = backends(Dtype::F32, 1).remove(0);
    let w = cpu.pack(&[Stored::noise(4, 8, 1).view()]);
    let x = rows_of(&cpu, 7, &[0.0; 7]);
    cpu.linear(&w, x.as_rows(), &mut [0.0; 4]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn agrees_with_the_reference_on_any_shape(m in 0usize..40, n in 1usize..150, k in 1usize..300, bf16: bool) {
        check_against_reference(if bf16 { Dtype::Bf16 } else { Dtype::F32 }, m, n, k);
    }
}
