//! The grouped expert FFN.

use mesh_kernels::reference::Reference;
use mesh_kernels::rows::RowBuf;
use mesh_kernels::{Compute, Dtype, Ffn, FfnGroup};

use crate::{DTYPES, Noise, Stored, assert_close, assert_same_bits, backends, rows_of};

struct Expert([Stored; 3]);

impl Expert {
    fn new(hidden: usize, intermediate: usize, seed: u64) -> Expert {
        Expert([
            Stored::noise(intermediate, hidden, seed),
            Stored::noise(intermediate, hidden, seed + 100),
            Stored::noise(hidden, intermediate, seed + 200),
        ])
    }

    fn pack(&self, compute: &dyn Compute) -> Ffn {
        compute.pack_ffn(self.0[0].view(), self.0[1].view(), self.0[2].view())
    }
}

/// Runs groups of the given sizes, rows taken from `x` in order; the answers in the same order.
fn run(compute: &dyn Compute, experts: &[Ffn], sizes: &[usize], x: &RowBuf) -> Vec<f32> {
    let mut out = RowBuf::new(compute.dtype(), x.rows(), x.cols()).unwrap();
    let mut places: Vec<&mut [u8]> = out.as_rows_mut().bytes.chunks_mut(x.cols() * x.dtype().bytes()).collect();
    let (mut groups, mut row) = (Vec::new(), 0);
    for (weights, &size) in experts.iter().zip(sizes) {
        let x = (row..row + size).map(|row| x.as_rows().row(row)).collect();
        groups.push(FfnGroup { weights, x, out: places.drain(..size).collect() });
        row += size;
    }
    compute.ffn(&mut groups);
    out.as_rows().to_f32()
}

#[test]
fn groups_agree_with_the_reference_empty_ones_among_them() {
    for dtype in DTYPES {
        for (hidden, intermediate) in [(48, 80), (17, 33), (128, 96), (1, 1)] {
            let experts: Vec<Expert> = (0..4).map(|seed| Expert::new(hidden, intermediate, seed)).collect();
            let sizes = [3, 0, 1, 17];
            let x = Noise::new(7).values(21 * hidden);
            let reference = Reference::new(dtype);
            let packed: Vec<Ffn> = experts.iter().map(|expert| expert.pack(&reference)).collect();
            let want = run(&reference, &packed, &sizes, &rows_of(&reference, hidden, &x));
            let scale = want.iter().fold(0f32, |max, value| max.max(value.abs()));
            for cpu in backends(dtype, 2) {
                let packed: Vec<Ffn> = experts.iter().map(|expert| expert.pack(&cpu)).collect();
                let got = run(&cpu, &packed, &sizes, &rows_of(&cpu, hidden, &x));
                // bf16: an intermediate value near a rounding boundary may go the other way, and so may the result.
                let tolerance = scale * if dtype == Dtype::F32 { 1e-5 } else { 1e-2 };
                assert_close(&format!("{} {hidden}x{intermediate}", cpu.name()), &got, &want, tolerance);
            }
        }
    }
}

#[test]
fn nothing_to_do_is_done() {
    for cpu in backends(Dtype::F32, 2) {
        cpu.ffn(&mut []);
        let weights = Expert::new(8, 4, 1).pack(&cpu);
        cpu.ffn(&mut [FfnGroup { weights: &weights, x: Vec::new(), out: Vec::new() }]);
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_grouping_and_thread_count() {
    let (hidden, intermediate, rows) = (224, 112, 40);
    for dtype in DTYPES {
        let experts = [Expert::new(hidden, intermediate, 1), Expert::new(hidden, intermediate, 2)];
        let x = Noise::new(8).values(2 * rows * hidden);
        for single in backends(dtype, 1) {
            let packed: Vec<Ffn> = experts.iter().map(|expert| expert.pack(&single)).collect();
            let mut alone = Vec::new();
            for (row, x) in x.chunks(hidden).enumerate() {
                let expert = &packed[row / rows..=row / rows];
                alone.push(run(&single, expert, &[1], &rows_of(&single, hidden, x)));
            }
            for threads in [1, 2, 3] {
                let cpus = backends(dtype, threads);
                let cpu = cpus.iter().find(|cpu| cpu.isa() == single.isa()).unwrap();
                let packed: Vec<Ffn> = experts.iter().map(|expert| expert.pack(cpu)).collect();
                for size in 1..=rows {
                    // The last `size` rows of the first expert, and the first of the second.
                    let part = &x[(rows - size) * hidden..(rows + size) * hidden];
                    let got = run(cpu, &packed, &[size, size], &rows_of(cpu, hidden, part));
                    let want: Vec<f32> = alone[rows - size..rows + size].concat();
                    assert_same_bits(&format!("{} size={size}", cpu.name()), &got, &want);
                }
            }
        }
    }
}

#[test]
fn rows_may_lie_at_any_element() {
    let (hidden, intermediate) = (50, 34);
    for dtype in DTYPES {
        for cpu in backends(dtype, 1) {
            let packed = [Expert::new(hidden, intermediate, 1).pack(&cpu)];
            let x = rows_of(&cpu, hidden, &Noise::new(3).values(hidden));
            let want = run(&cpu, &packed, &[1], &x);
            for shift in [0, dtype.bytes(), 5 * dtype.bytes()] {
                let mut wire = vec![0u8; shift];
                wire.extend_from_slice(x.as_rows().bytes);
                let mut answer = vec![0xAA; shift + wire.len() - shift + 3];
                let place = &mut answer[shift..wire.len()];
                cpu.ffn(&mut [FfnGroup { weights: &packed[0], x: vec![&wire[shift..]], out: vec![place] }]);
                let rows = mesh_kernels::rows::Rows { dtype, cols: hidden, bytes: &answer[shift..wire.len()] };
                assert_same_bits(&cpu.name(), &rows.to_f32(), &want);
                let untouched = answer[..shift].iter().chain(&answer[wire.len()..]);
                assert!(untouched.copied().all(|byte| byte == 0xAA), "wrote past its place");
            }
        }
    }
}

#[test]
fn large_gates_neither_overflow_nor_lose_their_sign() {
    // silu(-x) -> 0 and silu(x) -> x where the exponential leaves f32.
    for cpu in backends(Dtype::F32, 1) {
        let (gate, up, down) =
            (Stored::new(2, 1, &[1.0, -1.0]), Stored::new(2, 1, &[1.0; 2]), Stored::new(1, 2, &[1.0; 2]));
        let weights = [cpu.pack_ffn(gate.view(), up.view(), down.view())];
        for x in [50.0f32, 200.0, 1e4] {
            let got = run(&cpu, &weights, &[1], &rows_of(&cpu, 1, &[x]));
            assert_close(&cpu.name(), &got, &[x * x], 1e-6);
        }
    }
}
