//! What the CPU backend reaches beside what this machine can do: products, expert FFNs and attention as shares of its
//! arithmetic from registers and its streaming read. With `--invariance`, beside variants of the same kernels that break
//! batch invariance: what the promise costs. With `--beside`, those of two builds in turns.

use std::fmt::Write as _;

use clap::Args;
use mesh_kernels::cpu::{Cpu, CpuOptions, Isa};
use mesh_kernels::kv::KvShape;
use mesh_kernels::rows::{MatrixView, RowBuf};
use mesh_kernels::{
    AttentionShape, Compute, Dtype, Ffn, FfnGroup, KV_PAGE_TOKENS, KernelError, Matrix, QueryRow, Term,
};
use serde::Serialize;

use crate::about::{JsonArg, processors};
use crate::error::BenchError;
use crate::limits::{Limits, Probe, best_seconds, walked_bytes};
use crate::turns::{self, Turns, TurnsArgs};

const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 512;
const HEADS: usize = 16;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 64;
/// Rows of a product.
const ROWS: [usize; 9] = [1, 2, 3, 4, 8, 12, 16, 64, 512];
/// Contributions to a row.
const TOP_K: usize = 8;
/// How often each kernel and its variant are measured in turn.
const ROUNDS: usize = 9;

/// `mesh-bench kernels`.
#[derive(Clone, Debug, Args)]
pub struct KernelsArgs {
    /// Threads that share each call's work.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: u16,
    /// The instruction set: avx512-bf16, avx512, avx2, neon, ...; the best that the machine has when absent. One that is for
    /// bf16 alone leaves f32 at its own best.
    #[arg(long, value_name = "NAME")]
    pub isa: Option<Isa>,
    /// Measures instead what batch invariance costs: each kernel and its variant that breaks it, in turn.
    #[arg(long)]
    pub invariance: bool,
    /// Another build.
    #[command(flatten)]
    pub turns: TurnsArgs,
    /// Where the results go.
    #[command(flatten)]
    pub json: JsonArg,
}

/// A run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// One for each dtype.
    pub backends: Vec<Backend>,
    /// One for each dtype, with `--invariance`.
    pub invariance: Vec<Invariance>,
    /// One for each dtype, with `--beside`.
    pub turns: Vec<Turns>,
}

/// One backend beside its variant that breaks invariance.
#[derive(Debug, Serialize)]
pub struct Invariance {
    /// Its name.
    pub backend: String,
    /// The kernels, with several numbers of rows.
    pub cases: Vec<InvarianceCase>,
}

/// A kernel and its variant.
#[derive(Debug, Serialize)]
pub struct InvarianceCase {
    /// `linear`, `ffn`, `attention`, `combine`.
    pub name: &'static str,
    /// Rows.
    pub rows: usize,
    /// Tokens of the sequence, or contributions to a row.
    pub over: usize,
    /// Microseconds of the invariant kernel, the median of its rounds.
    pub us: f64,
    /// Of the variant.
    pub breaking_us: f64,
    /// The median over the rounds of the one divided by the other, less 1: negative where the invariant one is faster.
    pub cost: f64,
}

/// One backend's figures.
#[derive(Debug, Serialize)]
pub struct Backend {
    /// Its name.
    pub backend: String,
    /// Threads of each call.
    pub threads: usize,
    /// Those of its threads; what shares are of.
    pub limits: Limits,
    /// The machine's with one thread and with all.
    pub machine: Vec<Limits>,
    /// Products and expert FFNs.
    pub products: Vec<ProductCase>,
    /// Attention.
    pub attention: Vec<AttentionCase>,
}

/// `[m, k]` rows by `[n, k]` weights out of memory.
#[derive(Debug, Serialize)]
pub struct ProductCase {
    /// `linear`, or `ffn`: gate, up and down together, as one matrix.
    pub name: &'static str,
    /// Rows.
    pub m: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Microseconds.
    pub us: f64,
    /// Arithmetic.
    pub gflops: f64,
    /// Weights read.
    pub gbytes: f64,
    /// Of the arithmetic limit.
    pub gflops_share: f64,
    /// Of the streaming read.
    pub gbytes_share: f64,
}

/// The last rows of sequences.
#[derive(Debug, Serialize)]
pub struct AttentionCase {
    /// Sequences. One's K and V are in a cache, as a prefill finds them; those of several come out of memory, as each layer of
    /// a decoding step finds them.
    pub sequences: usize,
    /// Query rows of each.
    pub rows: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Microseconds.
    pub us: f64,
    /// Arithmetic.
    pub gflops: f64,
    /// K and V, once.
    pub gbytes: f64,
    /// Of the arithmetic limit.
    pub gflops_share: f64,
    /// Of the streaming read.
    pub gbytes_share: f64,
}

/// Runs it all.
///
/// # Errors
/// The backend cannot be made on this machine, or the other build does not run.
pub fn run(args: &KernelsArgs) -> Result<Report, BenchError> {
    let mut report = Report { backends: Vec::new(), invariance: Vec::new(), turns: Vec::new() };
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let isa = args.isa.filter(|isa| isa.suits(dtype));
        let options = CpuOptions { dtype, threads: args.threads.into(), isa, bind_from: None };
        if let Some(other) = &args.turns.beside {
            report.turns.push(turns::run(&args.turns, other, options)?);
        } else if args.invariance {
            report.invariance.push(invariance(options)?);
        } else {
            report.backends.push(backend(options)?);
        }
    }
    Ok(report)
}

fn invariance(options: CpuOptions) -> Result<Invariance, KernelError> {
    let (cpu, breaking) = (Cpu::new(options)?, Cpu::breaking_invariance(options)?);
    let sides = Sides { cpus: &[&cpu, &breaking], rounds: ROUNDS };
    let mut measured = Vec::new();
    measured
        .extend(ROWS.into_iter().zip(linear_seconds(sides, HIDDEN, HIDDEN)?).map(|(m, s)| (("linear", m, HIDDEN), s)));
    measured.extend(ROWS.into_iter().zip(ffn_seconds(sides)?).map(|(m, s)| (("ffn", m, HIDDEN), s)));
    for (rows, tokens) in [(1, 128), (1, 1024), (1, 8192), (64, 512), (512, 512)] {
        measured.push((("attention", rows, tokens), attention_seconds(sides, 1, rows, tokens)?));
    }
    for rows in [1, 32, 512] {
        measured.push((("combine", rows, TOP_K), combine_seconds(sides, rows)?));
    }
    let cases = measured.into_iter().map(|((name, rows, over), seconds)| {
        let all = |of: fn(f64, f64) -> f64| median(seconds.iter().map(|round| of(round[0], round[1])).collect());
        InvarianceCase {
            name,
            rows,
            over,
            us: all(|a, _| a * 1e6),
            breaking_us: all(|_, b| b * 1e6),
            cost: all(|a, b| a / b - 1.0),
        }
    });
    Ok(Invariance { backend: cpu.name(), cases: cases.collect() })
}

/// Backends that are measured in turns, over the same operands: where those lie in memory is a cost of neither.
#[derive(Clone, Copy)]
struct Sides<'a> {
    cpus: &'a [&'a Cpu],
    rounds: usize,
}

/// For each round, the seconds of each backend's call.
type Seconds = Vec<Vec<f64>>;

impl Sides<'_> {
    /// The first; operands that it packs are in the layout of all.
    fn cpu(&self) -> &Cpu {
        self.cpus[0]
    }

    fn seconds(&self, mut call: impl FnMut(&Cpu)) -> Seconds {
        let mut all = vec![vec![0.0; self.cpus.len()]; self.rounds];
        for (round, seconds) in all.iter_mut().enumerate() {
            for turn in 0..self.cpus.len() {
                // Who comes first changes from round to round.
                let side = (turn + round) % self.cpus.len();
                seconds[side] = best_seconds(|| call(self.cpus[side]));
            }
        }
        all
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn backend(options: CpuOptions) -> Result<Backend, KernelError> {
    let probe = Probe::new(options)?;
    let (cpu, dtype, before) = (probe.cpu(), options.dtype, probe.limits());
    let alone = Sides { cpus: &[cpu], rounds: 1 };
    let mut products = Vec::new();
    for (n, k) in [(HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)] {
        for (m, seconds) in ROWS.into_iter().zip(linear_seconds(alone, n, k)?) {
            products.push(("linear", [m, n, k], seconds[0][0]));
        }
    }
    for (m, seconds) in ROWS.into_iter().zip(ffn_seconds(alone)?) {
        products.push(("ffn", [m, 3 * INTERMEDIATE, HIDDEN], seconds[0][0]));
    }
    let mut attention = Vec::new();
    for (sequences, rows, tokens) in [(1, 1, 1024), (1, 64, 512), (1, 512, 512), (32, 1, 128), (8, 1, 1024)] {
        attention.push(([sequences, rows, tokens], attention_seconds(alone, sequences, rows, tokens)?[0][0]));
    }
    // Before and after: what a neighbour takes of a shared machine for a while is no limit.
    let limits = before.or_better(probe.limits());
    let mut machine = Vec::new();
    for threads in [1, processors()] {
        let same = threads == options.threads;
        machine.push(if same { limits } else { Probe::new(CpuOptions { threads, ..options })?.limits() });
    }
    machine.dedup_by_key(|limits| limits.threads);
    Ok(Backend {
        backend: cpu.name(),
        threads: options.threads,
        limits,
        machine,
        products: products.into_iter().map(|(name, mnk, s)| product(name, mnk, s, limits, dtype)).collect(),
        attention: attention.into_iter().map(|(case, s)| attention_case(case, s, limits, dtype)).collect(),
    })
}

fn product(name: &'static str, [m, n, k]: [usize; 3], seconds: f64, limits: Limits, dtype: Dtype) -> ProductCase {
    let gflops = (2 * m * n * k) as f64 / seconds / 1e9;
    let gbytes = (n * k * dtype.bytes()) as f64 / seconds / 1e9;
    let (gflops_share, gbytes_share) = (gflops / limits.gflops, gbytes / limits.gbytes);
    ProductCase { name, m, n, k, us: seconds * 1e6, gflops, gbytes, gflops_share, gbytes_share }
}

/// Rows that were written: untouched pages would all be the one page of zeros. Their bytes make numbers near one in either
/// dtype: products of far smaller ones are subnormal, which costs some processors a hundred times as much.
fn written_rows(dtype: Dtype, rows: usize, cols: usize) -> Result<RowBuf, KernelError> {
    let mut buf = RowBuf::new(dtype, rows, cols)?;
    buf.as_rows_mut().bytes.fill(0x3f);
    Ok(buf)
}

/// A checkpoint's matrix of small values.
fn weights(n: usize, k: usize) -> Vec<u8> {
    (0..n * k).flat_map(|i| ((i * 7919 % 1013) as f32 / 1e4 - 0.05).to_le_bytes()).collect()
}

/// A product of each number of rows, over weights that no cache holds.
fn linear_seconds(sides: Sides<'_>, n: usize, k: usize) -> Result<Vec<Seconds>, KernelError> {
    let (stored, dtype) = (weights(n, k), sides.cpu().dtype());
    let copies = walked_bytes() / (n * k * dtype.bytes());
    let pack = || sides.cpu().pack(&[MatrixView { dtype: Dtype::F32, n, k, bytes: &stored }]);
    let packed: Vec<Matrix> = (0..copies).map(|_| pack()).collect();
    let mut copy = 0;
    let mut seconds = Vec::new();
    for m in ROWS {
        let x = written_rows(dtype, m, k)?;
        let mut out = vec![0f32; m * n];
        seconds.push(sides.seconds(|cpu| {
            cpu.linear(&packed[copy], x.as_rows(), &mut out);
            copy = (copy + 1) % copies;
        }));
    }
    Ok(seconds)
}

/// The same of an expert's FFN.
fn ffn_seconds(sides: Sides<'_>) -> Result<Vec<Seconds>, KernelError> {
    let mut ffns = Ffns::new(sides.cpu());
    ROWS.into_iter().map(|rows| Ok(sides.seconds(ffns.calls(rows)?))).collect()
}

/// Experts' FFNs that no cache holds.
pub struct Ffns {
    dtype: Dtype,
    packed: Vec<Ffn>,
    next: usize,
}

impl Ffns {
    /// As many as [`walked_bytes`] are, packed for `cpu` and those like it.
    pub fn new(cpu: &Cpu) -> Self {
        let (n, k) = (INTERMEDIATE, HIDDEN);
        let stored = weights(n, k);
        let view = MatrixView { dtype: Dtype::F32, n, k, bytes: &stored };
        let count = walked_bytes() / (3 * n * k * cpu.dtype().bytes());
        let packed = (0..count).map(|_| cpu.pack_ffn(view, view, MatrixView { n: k, k: n, ..view })).collect();
        Self { dtype: cpu.dtype(), packed, next: 0 }
    }

    /// What sends `rows` rows through the next of them at each call.
    pub fn calls(&mut self, rows: usize) -> Result<impl FnMut(&Cpu), KernelError> {
        let Self { dtype, packed, next } = self;
        let (x, mut out) = (written_rows(*dtype, rows, HIDDEN)?, written_rows(*dtype, rows, HIDDEN)?);
        Ok(move |cpu: &Cpu| {
            let x = (0..rows).map(|row| x.as_rows().row(row)).collect();
            let out = out.as_rows_mut().bytes.chunks_mut(HIDDEN * dtype.bytes()).collect();
            cpu.ffn(&mut [FfnGroup { weights: &packed[*next], x, out }]);
            *next = (*next + 1) % packed.len();
        })
    }
}

/// The last `rows` rows of each of `sequences` of `tokens`.
fn attention_seconds(sides: Sides<'_>, sequences: usize, rows: usize, tokens: usize) -> Result<Seconds, KernelError> {
    let cpu = sides.cpu();
    let width = HEADS * HEAD_DIM;
    let per_sequence = tokens.div_ceil(KV_PAGE_TOKENS);
    let pages: Vec<u32> = (0..(sequences * per_sequence) as u32).collect();
    let layer_bytes = 2 * pages.len() * KV_PAGE_TOKENS * KV_HEADS * HEAD_DIM * cpu.dtype().bytes();
    let layers = if sequences == 1 { 1 } else { walked_bytes().div_ceil(layer_bytes) };
    let shape = KvShape { layers, pages: pages.len(), kv_heads: KV_HEADS, head_dim: HEAD_DIM };
    let mut cache = cpu.kv_cache(shape);
    let token = vec![0.1; KV_HEADS * HEAD_DIM];
    for layer in 0..layers {
        for slot in 0..KV_PAGE_TOKENS {
            pages.iter().for_each(|page| cpu.kv_write(&mut cache, layer, *page, slot, &token, &token));
        }
    }
    let q = vec![0f32; sequences * rows * width];
    let queries: Vec<QueryRow<'_>> = pages
        .chunks(per_sequence)
        .flat_map(|pages| (tokens - rows..tokens).map(move |position| QueryRow { pages, position: position as u32 }))
        .collect();
    let mut out = RowBuf::new(cpu.dtype(), queries.len(), width)?;
    let shape = AttentionShape { heads: HEADS, scale: 0.125, window: None };
    let mut layer = 0;
    Ok(sides.seconds(|cpu| {
        cpu.attention(&cache, layer, &q, width, &queries, shape, out.as_rows_mut());
        layer = (layer + 1) % layers;
    }))
}

/// A combine of [`TOP_K`] contributions to each of `rows` rows.
fn combine_seconds(sides: Sides<'_>, rows: usize) -> Result<Seconds, KernelError> {
    let outputs = written_rows(sides.cpu().dtype(), rows * TOP_K, HIDDEN)?;
    let outputs = outputs.as_rows();
    let terms: Vec<Term<'_>> = (0..rows * TOP_K).map(|row| Term { weight: 0.125, row: outputs.row(row) }).collect();
    let mut residual = vec![0f32; rows * HIDDEN];
    Ok(sides.seconds(|cpu| cpu.combine(&mut residual, HIDDEN, TOP_K, &terms)))
}

fn attention_case([sequences, rows, tokens]: [usize; 3], seconds: f64, limits: Limits, dtype: Dtype) -> AttentionCase {
    let pairs: usize = (tokens - rows..tokens).map(|position| position + 1).sum();
    let gflops = (4 * sequences * pairs * HEADS * HEAD_DIM) as f64 / seconds / 1e9;
    let gbytes = (2 * sequences * tokens * KV_HEADS * HEAD_DIM * dtype.bytes()) as f64 / seconds / 1e9;
    let (gflops_share, gbytes_share) = (gflops / limits.gflops, gbytes / limits.gbytes);
    AttentionCase { sequences, rows, tokens, us: seconds * 1e6, gflops, gbytes, gflops_share, gbytes_share }
}

impl Report {
    /// As text.
    pub fn table(&self) -> String {
        let backends = self.backends.iter().map(Backend::table);
        backends
            .chain(self.invariance.iter().map(Invariance::table))
            .chain(self.turns.iter().map(Turns::table))
            .collect()
    }
}

impl Invariance {
    fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}, what batch invariance costs (medians of {ROUNDS} rounds in turn)", self.backend);
        let _ =
            writeln!(text, "  {:10} {:>5} {:>6} {:>12} {:>12} {:>8}", "", "rows", "over", "us", "breaking us", "cost");
        for InvarianceCase { name, rows, over, us, breaking_us, cost } in &self.cases {
            let cost = 100.0 * cost;
            let _ = writeln!(text, "  {name:10} {rows:>5} {over:>6} {us:>12.1} {breaking_us:>12.1} {cost:>+7.1}%");
        }
        text
    }
}

impl Backend {
    fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}, shares of the limits of {} threads", self.backend, self.threads);
        for Limits { threads, gflops, gbytes } in &self.machine {
            let _ = writeln!(
                text,
                "  limits, {threads} threads: {gflops:.1} GFLOP/s from registers, {gbytes:.1} GB/s streaming read"
            );
        }
        let _ =
            writeln!(text, "  {:8} {:>4} {:>5} {:>5} {:>9} {:>15} {:>14}", "", "m", "n", "k", "us", "GFLOP/s", "GB/s");
        for c in &self.products {
            let (arithmetic, read) = (100.0 * c.gflops_share, 100.0 * c.gbytes_share);
            let _ = writeln!(
                text,
                "  {:8} {:>4} {:>5} {:>5} {:>9.1} {:>8.1} ({arithmetic:>3.0}%) {:>7.1} ({read:>3.0}%)",
                c.name, c.m, c.n, c.k, c.us, c.gflops, c.gbytes
            );
        }
        let _ = writeln!(
            text,
            "  attention, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}: the last m rows of sequences of n tokens (of one in a cache, \
             of more out of memory)"
        );
        let _ =
            writeln!(text, "  {:>9} {:>3} {:>5} {:>15} {:>15} {:>14}", "sequences", "m", "n", "us", "GFLOP/s", "GB/s");
        for c in &self.attention {
            let (arithmetic, read) = (100.0 * c.gflops_share, 100.0 * c.gbytes_share);
            let _ = writeln!(
                text,
                "  {:>9} {:>3} {:>5} {:>15.1} {:>8.1} ({arithmetic:>3.0}%) {:>7.1} ({read:>3.0}%)",
                c.sequences, c.rows, c.tokens, c.us, c.gflops, c.gbytes
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_limits_and_of_one_reading_of_the_weights() {
        let limits = Limits { threads: 1, gflops: 100.0, gbytes: 10.0 };
        let case = product("linear", [2, 1000, 500], 1e-3, limits, Dtype::Bf16);
        assert!((case.gflops - 2.0).abs() < 1e-9 && (case.gflops_share - 0.02).abs() < 1e-9);
        assert!((case.gbytes - 1.0).abs() < 1e-9 && (case.gbytes_share - 0.1).abs() < 1e-9);
    }

    #[test]
    fn attention_counts_the_pairs_that_each_row_sees() {
        // Rows at positions 2 and 3 see 3 and 4 keys: 4 x 7 x 1024 operations, over 4 x 2 x 256 elements of K and V.
        let limits = Limits { threads: 1, gflops: 286.72, gbytes: 81.92 };
        let case = attention_case([1, 2, 4], 1e-6, limits, Dtype::Bf16);
        assert!((case.gflops - 28.672).abs() < 1e-9 && (case.gflops_share - 0.1).abs() < 1e-9);
        assert!((case.gbytes - 4.096).abs() < 1e-9 && (case.gbytes_share - 0.05).abs() < 1e-9);
    }
}
