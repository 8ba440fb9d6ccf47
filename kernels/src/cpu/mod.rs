//! The fast backend: SIMD chosen at run time, threads.
//!
//! # Layout
//! - `isa`: what the machine has
//! - `simd`: sixteen lanes, over which every kernel is written once; `x86`, `neon`, `portable` are its registers
//! - `gemm`, `widened`, `attend`: the kernels; `amx`: products on tiles; `table`: them compiled for each instruction set
//! - `variants`: what breaks invariance, for benchmarks alone
//! - `pack`: weights; `rope`: kept angles; `pool`, `bind`: threads; `tasks`: how products are cut

#[cfg(target_arch = "x86_64")]
mod amx;
mod attend;
mod bind;
mod gemm;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod pool;
mod portable;
mod rope;
mod simd;
mod table;
mod tasks;
mod variants;
mod widened;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

pub use isa::{Asking, Isa};
pub use pool::THREADS_MAX;

use crate::kv::{KvCache, KvShape};
use crate::rows::{MatrixView, RowBuf, Rows, RowsMut};
use crate::{
    AttentionShape, Compute, Dtype, Ffn, FfnGroup, KernelError, Matrix, QueryRow, Rope, Term, checks, pointwise,
};
use attend::Attend;
use gemm::{Epilogue, Places, Product, Source};
use pool::{Parts, Pool};
use rope::RopeTables;
use table::Kernels;

/// Scratch buffers kept between calls, at most: one for each call that may run at once.
const SCRATCH_MAX: usize = 8;
/// Rows of one attention task.
const ATTEND_ROWS: usize = 16;

/// How to make a [`Cpu`].
#[derive(Clone, Copy, Debug)]
pub struct CpuOptions {
    /// The compute dtype.
    pub dtype: Dtype,
    /// Threads that share a call's work, the caller's among them.
    pub threads: usize,
    /// The instruction set; `None` takes the best.
    pub isa: Option<Isa>,
    /// Binds each thread to a processor, from this one on of those that the process may use, counted round; the threads
    /// that call bind themselves by [`Compute::bind_thread`]. `None`: the system moves threads as it likes.
    pub bind_from: Option<usize>,
}

/// The fast backend. Calls may come from several threads at once.
pub struct Cpu {
    dtype: Dtype,
    isa: Isa,
    kernels: &'static Kernels,
    pool: Pool,
    bind_from: Option<usize>,
    ropes: RopeTables,
    scratch: Mutex<Vec<RowBuf>>,
    /// How products ask for weights that they read once.
    asking: Asking,
    breaks_invariance: bool,
}

impl Cpu {
    /// A backend on this machine.
    pub fn new(options: CpuOptions) -> Result<Cpu, KernelError> {
        let CpuOptions { dtype, threads, isa, bind_from } = options;
        let best = Isa::detect(dtype);
        let isa = isa.unwrap_or(best);
        if !isa.is_available() {
            return Err(KernelError::IsaMissing { asked: isa, best });
        }
        let (kernels, pool) = (Kernels::of(isa), Pool::new(threads, bind_from)?);
        Ok(Cpu {
            dtype,
            isa,
            kernels,
            pool,
            bind_from,
            ropes: RopeTables::default(),
            scratch: Mutex::default(),
            asking: Asking::detect(),
            breaks_invariance: false,
        })
    }

    /// A backend of kernels whose results depend on how many rows a call has, to measure what invariance costs. Its
    /// [`Compute::kind`] is a name that no mesh agrees to beside others.
    pub fn breaking_invariance(options: CpuOptions) -> Result<Cpu, KernelError> {
        let cpu = Cpu::new(options)?;
        Ok(Cpu { kernels: Kernels::breaking_invariance(cpu.isa), breaks_invariance: true, ..cpu })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Does multiply-accumulates from registers on every thread and returns how many floating-point operations that
    /// were: timed, it is the limit that products are measured against.
    pub fn probe_arithmetic(&self, rounds: u64) -> u64 {
        let operations = AtomicU64::new(0);
        self.pool.run(self.pool.threads(), u64::MAX, |_| {
            // SAFETY: `kernels` are those of an instruction set that the machine has.
            let done = unsafe { (self.kernels.spin)(self.dtype, rounds) };
            operations.fetch_add(done, Ordering::Relaxed);
        });
        operations.into_inner()
    }

    /// Reads packed weights once, shared over the threads, and returns how many bytes those were: timed, it is the limit
    /// of a product of one row.
    pub fn probe_read(&self, weights: &Matrix, asking: Asking) -> usize {
        let bytes = weights.data.as_slice();
        let part = bytes.len().div_ceil(self.pool.tasks(u64::MAX)).max(1).next_multiple_of(4096);
        let parts: Vec<&[u8]> = bytes.chunks(part).collect();
        self.pool.run(parts.len(), bytes.len() as u64, |task| {
            // SAFETY: as in `probe_arithmetic`.
            std::hint::black_box(unsafe { (self.kernels.read)(parts[task], asking) });
        });
        bytes.len()
    }

    fn take_scratch(&self) -> RowBuf {
        let kept = self.scratch.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| RowBuf::new(self.dtype, 0, 0).expect("an empty buffer allocates nothing"))
    }

    fn keep_scratch(&self, buf: RowBuf) {
        let mut kept = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < SCRATCH_MAX {
            kept.push(buf);
        }
    }

    fn run_products(&self, products: &[Product<'_>]) {
        let rows_first = self.dtype == Dtype::Bf16 && self.kernels.widens_bf16;
        let (tasks, cost) = tasks::cut(products, &self.pool, rows_first);
        self.pool.run(tasks.len(), cost, |task| {
            // SAFETY: the machine has the instruction set; rows, places and weights have the sizes that the entry
            // checks saw, and the cut gives every task its own part of the places.
            SCRATCH.with_borrow_mut(|scratch| unsafe { (self.kernels.product)(&tasks[task], scratch) });
        });
    }

    /// Runs `body` over chunks of `rows` rows of `cols` elements, each a few operations.
    fn run_rows(&self, rows: usize, cols: usize, body: impl Fn(usize) + Sync) {
        let cost = (rows * cols) as u64 * 4;
        let chunk = rows.div_ceil(self.pool.tasks(cost)).max(1);
        self.pool.run(rows.div_ceil(chunk), cost, |task| {
            for row in task * chunk..rows.min((task + 1) * chunk) {
                body(row);
            }
        });
    }
}

impl Compute for Cpu {
    fn name(&self) -> String {
        format!("cpu {} {} threads={}", self.isa, self.dtype, self.pool.threads())
    }

    fn kind(&self) -> String {
        let breaks = if self.breaks_invariance { " breaking invariance" } else { "" };
        format!("cpu {}{breaks}", self.isa)
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn bind_thread(&self) {
        if let Some(first) = self.bind_from {
            bind::bind_thread(first);
        }
    }

    fn layout(&self) -> String {
        let blocks = match self.kernels.side_by_side {
            1 => "lanes".to_owned(),
            width => format!("panels{width}x"),
        };
        format!("{blocks}{}-{}", crate::matrix::LANES, self.dtype)
    }

    fn pack(&self, parts: &[MatrixView<'_>]) -> Matrix {
        pack::pack(&self.pool, self.dtype, self.kernels.side_by_side, parts)
    }

    fn pack_ffn(&self, gate: MatrixView<'_>, up: MatrixView<'_>, down: MatrixView<'_>) -> Ffn {
        pack::pack_ffn(&self.pool, self.dtype, self.kernels.side_by_side, gate, up, down)
    }

    fn linear(&self, w: &Matrix, x: Rows<'_>, out: &mut [f32]) {
        let rows = checks::linear(self.dtype, w, &x, out);
        let x = Source::Strided { bytes: x.bytes, stride: x.cols * self.dtype.bytes() };
        let out = Places::Strided { start: out.as_mut_ptr().cast(), stride: w.n * size_of::<f32>() };
        self.run_products(&[tasks::product(w, w.n, x, out, rows, Epilogue::Store(Dtype::F32), self.asking)]);
    }

    fn ffn(&self, groups: &mut [FfnGroup<'_>]) {
        checks::ffn(self.dtype, groups);
        let widest = groups.iter().map(|group| group.weights.intermediate()).max().unwrap_or(0);
        let rows = groups.iter().map(|group| group.x.len()).sum();
        if rows == 0 {
            return;
        }
        let mut scratch = self.take_scratch();
        scratch.resize(rows, widest).unwrap_or_else(|error| panic!("an FFN's intermediate rows: {error}"));
        let stride = widest * self.dtype.bytes();
        let mut inner: &mut [u8] = scratch.as_rows_mut().bytes;
        let mut up = Vec::with_capacity(groups.len());
        for group in groups.iter() {
            let (here, after) = inner.split_at_mut(group.x.len() * stride);
            inner = after;
            let out = Places::Strided { start: here.as_mut_ptr(), stride };
            let weights = group.weights;
            let epilogue = Epilogue::SwiGlu(self.dtype);
            let x = Source::Gathered(&group.x);
            up.push(tasks::product(
                &weights.gate_up,
                weights.intermediate(),
                x,
                out,
                group.x.len(),
                epilogue,
                self.asking,
            ));
        }
        self.run_products(&up);
        drop(up);

        let places: Vec<Vec<*mut u8>> =
            groups.iter_mut().map(|group| group.out.iter_mut().map(|row| row.as_mut_ptr()).collect()).collect();
        let mut inner: &[u8] = scratch.as_rows().bytes;
        let mut down = Vec::with_capacity(groups.len());
        for (group, places) in groups.iter().zip(&places) {
            let (here, after) = inner.split_at(group.x.len() * stride);
            inner = after;
            let x = Source::Strided { bytes: here, stride };
            let (epilogue, out) = (Epilogue::Store(self.dtype), Places::Gathered(places));
            down.push(tasks::product(
                &group.weights.down,
                group.weights.hidden(),
                x,
                out,
                places.len(),
                epilogue,
                self.asking,
            ));
        }
        self.run_products(&down);
        drop(down);
        self.keep_scratch(scratch);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: RowsMut<'_>) {
        checks::out(self.dtype, &out, x.len());
        let cols = weight.len();
        let rows = checks::heads(x.len(), cols, 0, cols);
        let (row_bytes, places) = (cols * self.dtype.bytes(), Parts::new(out.bytes));
        self.run_rows(rows, cols, |row| {
            // SAFETY: each row is one task's; the machine has the instruction set.
            unsafe {
                let out = places.part(row * row_bytes, row_bytes);
                (self.kernels.rms_norm_row)(self.dtype, &x[row * cols..][..cols], weight, eps, out);
            }
        });
    }

    fn rms_norm_heads(&self, x: &mut [f32], stride: usize, offset: usize, count: usize, weight: &[f32], eps: f32) {
        let width = weight.len();
        let (rows, x) = (checks::heads(x.len(), stride, offset, count * width), Parts::new(x));
        self.run_rows(rows, count * width, |row| {
            for head in 0..count {
                // SAFETY: each row is one task's, and its heads come in turn; the machine has the instruction set.
                unsafe {
                    let head = x.part(row * stride + offset + head * width, width);
                    (self.kernels.rms_norm_head)(head, weight, eps);
                }
            }
        });
    }

    fn rotate(&self, x: &mut [f32], stride: usize, offset: usize, heads: usize, positions: &[u32], rope: &Rope) {
        checks::rotate(x.len(), stride, offset, heads, positions, rope);
        let (dim, x) = (2 * rope.inv_freq.len(), Parts::new(x));
        let table = self.ropes.table(rope);
        self.run_rows(positions.len(), heads * dim, |row| {
            // SAFETY: each row is one task's; the machine has the instruction set.
            unsafe {
                let heads = x.part(row * stride + offset, heads * dim);
                match table.as_ref().and_then(|table| table.angles(positions[row])) {
                    Some(angles) => (self.kernels.rotate_heads)(heads, angles),
                    None => {
                        let mut angles = vec![0f32; dim];
                        pointwise::angles_into(rope, positions[row], &mut angles);
                        (self.kernels.rotate_heads)(heads, &angles);
                    }
                }
            }
        });
    }

    fn kv_cache(&self, shape: KvShape) -> KvCache {
        KvCache::new(shape, self.dtype).unwrap_or_else(|error| panic!("{error}"))
    }

    fn kv_write(&self, cache: &mut KvCache, layer: usize, page: u32, slot: usize, k: &[f32], v: &[f32]) {
        cache.write(layer, page, slot, k, v);
    }

    fn attention(
        &self,
        cache: &KvCache,
        layer: usize,
        q: &[f32],
        q_stride: usize,
        rows: &[QueryRow<'_>],
        shape: AttentionShape,
        out: RowsMut<'_>,
    ) {
        checks::attention(cache, self.dtype, q, q_stride, rows, &shape, &out);
        let KvShape { kv_heads, head_dim, .. } = cache.shape();
        let row_bytes = shape.heads * head_dim * self.dtype.bytes();
        let seen = |row: &QueryRow<'_>| row.position + 1 - checks::first_visible(row.position, shape.window);
        let cost = rows.iter().map(|row| 2 * (seen(row) as usize * shape.heads * head_dim) as u64).sum();
        let runs = tasks::runs(rows, ATTEND_ROWS);
        let places = Parts::new(out.bytes);
        self.pool.run(runs.len() * kv_heads, cost, |task| {
            let (run, kv_head) = (&runs[task / kv_heads], task % kv_heads);
            let task = Attend {
                cache,
                layer,
                kv_head,
                group: shape.heads / kv_heads,
                scale: shape.scale,
                window: shape.window,
                rows: &rows[run.clone()],
                q: &q[run.start * q_stride..],
                q_stride,
                out: places.at(run.start * row_bytes),
                out_stride: row_bytes,
            };
            // SAFETY: the machine has the instruction set; shapes passed the entry checks, and a run's columns of one
            // KV head are this task's alone.
            SUMS.with_borrow_mut(|sums| unsafe { (self.kernels.attend)(&task, sums) });
        });
    }

    fn combine(&self, residual: &mut [f32], cols: usize, per_row: usize, terms: &[Term<'_>]) {
        let rows = checks::combine(self.dtype, residual, cols, per_row, terms);
        let residual = Parts::new(residual);
        self.run_rows(rows, cols * (per_row + 1), |row| {
            // SAFETY: each row is one task's; the machine has the instruction set.
            unsafe {
                let residual = residual.part(row * cols, cols);
                (self.kernels.combine_row)(self.dtype, residual, &terms[row * per_row..][..per_row]);
            }
        });
    }

    fn narrow(&self, x: &[f32], out: RowsMut<'_>) {
        checks::out(self.dtype, &out, x.len());
        // SAFETY: the machine has the instruction set.
        unsafe { (self.kernels.narrow)(self.dtype, x, out.bytes) }
    }
}

thread_local! {
    // What attention has summed so far, kept so that decoding allocates nothing.
    static SUMS: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
    // What a product's task needs; kept for the same reason.
    static SCRATCH: std::cell::RefCell<gemm::Scratch> = const { std::cell::RefCell::new(gemm::Scratch::new()) };
}
