//! What this machine can do at best, of which every other figure is a share: arithmetic from registers and a streaming
//! read of memory, with the instruction set that the kernels use.

use std::time::Instant;

use mesh_kernels::cpu::{Asking, Cpu, CpuOptions};
use mesh_kernels::rows::MatrixView;
use mesh_kernels::{Compute, Dtype, KernelError, Matrix};
use serde::Serialize;

/// Weights that are walked in turn, at least and at most.
const WALKED_BYTES: (usize, usize) = (128 << 20, 2 << 30);
/// How long each figure is measured for.
const MEASURE_S: f64 = 0.18;
/// Measurements of which the best counts: the machine's limit is wanted, not its load.
const REPEATS: usize = 6;
const WIDTH: usize = 1024;
/// Rounds of arithmetic of one call: some milliseconds.
const ROUNDS: u64 = 100_000;

/// Bytes of weights to walk in turn, so that a product of few rows reads memory and not a cache: sixteen times the last cache,
/// as far as the system says how large that is. A cache that keeps some of what passes serves a sixteenth then, where it
/// served a fifth of four times its size.
pub fn walked_bytes() -> usize {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
    let kib: usize = size.trim().trim_end_matches('K').parse().unwrap_or(0);
    (16 * kib * 1024).clamp(WALKED_BYTES.0, WALKED_BYTES.1)
}

/// The limits of this machine.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// Threads that share the work.
    pub threads: usize,
    /// Thousand million floating-point operations a second, from registers.
    pub gflops: f64,
    /// Thousand million bytes a second, read once from memory.
    pub gbytes: f64,
}

impl Limits {
    /// The better of both in each: a limit is what was reached once.
    pub fn or_better(self, other: Limits) -> Limits {
        Limits { gflops: self.gflops.max(other.gflops), gbytes: self.gbytes.max(other.gbytes), ..self }
    }
}

/// A backend and weights to read.
pub struct Probe {
    cpu: Cpu,
    threads: usize,
    weights: Matrix,
}

impl Probe {
    /// A probe of a backend.
    ///
    /// # Errors
    /// The backend cannot be made.
    pub fn new(options: CpuOptions) -> Result<Self, KernelError> {
        let cpu = Cpu::new(options)?;
        let (n, k) = (walked_bytes() / WIDTH / cpu.dtype().bytes(), WIDTH);
        let zeros = vec![0u8; n * k * Dtype::Bf16.bytes()];
        let weights = cpu.pack(&[MatrixView { dtype: Dtype::Bf16, n, k, bytes: &zeros }]);
        Ok(Self { cpu, threads: options.threads, weights })
    }

    /// The backend.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Measures, for some eight tenths of a second.
    pub fn limits(&self) -> Limits {
        let (mut operations, mut bytes) = (0, 0);
        let spin = best_seconds(|| operations = self.cpu.probe_arithmetic(ROUNDS));
        let mut read = |asking| best_seconds(|| bytes = self.cpu.probe_read(&self.weights, asking));
        let read = Asking::ALL.into_iter().map(&mut read).fold(f64::INFINITY, f64::min);
        Limits { threads: self.threads, gflops: operations as f64 / spin / 1e9, gbytes: bytes as f64 / read / 1e9 }
    }
}

/// The best seconds per call of `body`.
pub fn best_seconds(mut body: impl FnMut()) -> f64 {
    body();
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let (start, mut calls) = (Instant::now(), 0u32);
        while start.elapsed().as_secs_f64() < MEASURE_S / REPEATS as f64 {
            body();
            calls += 1;
        }
        best = best.min(start.elapsed().as_secs_f64() / f64::from(calls));
    }
    best
}
