//! What every backend promises: it agrees with the reference, and a row's bits depend on that row alone.

#![allow(clippy::unwrap_used)]

mod attention;
mod ffn;
mod linear;
mod pointwise;
mod variants;

use mesh_kernels::cpu::{Cpu, CpuOptions, Isa};
use mesh_kernels::rows::{MatrixView, RowBuf};
use mesh_kernels::{Compute, Dtype, FfnGroup};

pub(crate) const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

/// A backend for every instruction set of this machine.
pub(crate) fn backends(dtype: Dtype, threads: usize) -> Vec<Cpu> {
    let options = |isa| CpuOptions { dtype, threads, isa: Some(isa), bind_from: None };
    Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(|isa| Cpu::new(options(isa)).unwrap()).collect()
}

/// Deterministic values in -1..1.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

/// f32 values as a checkpoint's bytes, at an odd address.
pub(crate) struct Stored {
    bytes: Vec<u8>,
    n: usize,
    k: usize,
}

impl Stored {
    pub(crate) fn new(n: usize, k: usize, values: &[f32]) -> Stored {
        let mut bytes = vec![0u8];
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        Stored { bytes, n, k }
    }

    pub(crate) fn noise(n: usize, k: usize, seed: u64) -> Stored {
        Stored::new(n, k, &Noise::new(seed).values(n * k))
    }

    pub(crate) fn view(&self) -> MatrixView<'_> {
        MatrixView { dtype: Dtype::F32, n: self.n, k: self.k, bytes: &self.bytes[1..] }
    }
}

/// Values rounded into rows.
pub(crate) fn rows_of(compute: &dyn Compute, cols: usize, values: &[f32]) -> RowBuf {
    let mut rows = RowBuf::new(compute.dtype(), values.len() / cols, cols).unwrap();
    compute.narrow(values, rows.as_rows_mut());
    rows
}

pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let close = (got - want).abs() <= tolerance * (1.0 + want.abs());
        assert!(close, "{what}: element {i} is {got}, not {want}");
    }
}

pub(crate) fn assert_same_bits(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{what}: element {i} is {got}, not {want}");
    }
}

#[test]
fn an_instruction_set_that_the_machine_lacks_is_refused_by_name() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        let error =
            Cpu::new(CpuOptions { dtype: Dtype::F32, threads: 1, isa: Some(isa), bind_from: None }).err().unwrap();
        assert!(error.to_string().contains(isa.as_str()), "{error}");
    }
}

#[test]
fn a_backend_names_what_it_runs_on() {
    let cpu =
        Cpu::new(CpuOptions { dtype: Dtype::Bf16, threads: 2, isa: Some(Isa::Portable), bind_from: None }).unwrap();
    assert_eq!(cpu.name(), "cpu portable bf16 threads=2");
}

#[test]
fn callers_on_several_threads_share_a_backend_and_get_their_own_bits() {
    // Large enough that each call is shared among the backend's threads too.
    let (rows, hidden, intermediate) = (40, 256, 192);
    for dtype in DTYPES {
        for cpu in backends(dtype, 3) {
            let stored = [(intermediate, hidden, 1), (intermediate, hidden, 2), (hidden, intermediate, 3)]
                .map(|(n, k, seed)| Stored::noise(n, k, seed));
            let ffn = cpu.pack_ffn(stored[0].view(), stored[1].view(), stored[2].view());
            let run = |seed: u64| {
                let x = rows_of(&cpu, hidden, &Noise::new(seed).values(rows * hidden));
                let mut out = RowBuf::new(dtype, rows, hidden).unwrap();
                let row_bytes = hidden * dtype.bytes();
                let places = out.as_rows_mut().bytes.chunks_mut(row_bytes).collect();
                let x = (0..rows).map(|row| x.as_rows().row(row)).collect();
                cpu.ffn(&mut [FfnGroup { weights: &ffn, x, out: places }]);
                out.as_rows().to_f32()
            };
            let want: Vec<Vec<f32>> = (0..4).map(run).collect();
            std::thread::scope(|scope| {
                for (seed, want) in want.iter().enumerate() {
                    let (run, name) = (&run, cpu.name());
                    scope.spawn(move || {
                        for _ in 0..10 {
                            assert_same_bits(&name, &run(seed as u64), want);
                        }
                    });
                }
            });
        }
    }
}
