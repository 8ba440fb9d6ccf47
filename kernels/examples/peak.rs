//! What the CPU backend reaches beside what this machine can do: `cargo run --release -p mesh-kernels --example peak`.
//!
//! Prints arithmetic from registers and streaming reads (the limits), then products, expert FFNs and attention as
//! shares of them. `--json` prints an array instead; `--threads N` and `--isa NAME` choose the backend.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use mesh_kernels::cpu::{Cpu, CpuOptions, Isa};
use mesh_kernels::kv::KvShape;
use mesh_kernels::rows::{MatrixView, RowBuf};
use mesh_kernels::{AttentionShape, Compute, Dtype, Ffn, FfnGroup, KV_PAGE_TOKENS, Matrix, QueryRow};
use serde_json::{Value, json};

const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 512;
/// Weights walked in turn, so that a product of few rows reads memory and not the cache.
const COPIES_BYTES: usize = 128 << 20;
/// How long each figure is measured for.
const MEASURE_S: f64 = 0.18;
/// Measurements of which the best counts: the machine's limit is wanted, not its load.
const REPEATS: usize = 6;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let threads = value("--threads").map_or(Ok(1), |threads| threads.parse())?;
    let isa: Option<Isa> = value("--isa").map(|name| name.parse()).transpose()?;
    let mut reports = Vec::new();
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let isa = isa.filter(|isa| isa.suits(dtype));
        reports.push(report(&Cpu::new(CpuOptions { dtype, threads, isa })?)?);
    }
    if arguments.iter().any(|argument| argument == "--json") {
        println!("{}", json!(reports));
        return Ok(());
    }
    for report in &reports {
        print(report);
    }
    Ok(())
}

/// The best seconds per call of `body`.
fn measure(mut body: impl FnMut()) -> f64 {
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

/// The machine's limits for a backend.
#[derive(Clone, Copy)]
struct Limits {
    gflops: f64,
    gbytes: f64,
}

impl Limits {
    fn of(cpu: &Cpu) -> Limits {
        let mut operations = 0;
        let spin = measure(|| operations = cpu.probe_arithmetic(100_000));
        let (n, k) = (COPIES_BYTES / HIDDEN / cpu.dtype().bytes(), HIDDEN);
        let zeros = vec![0u8; n * k * Dtype::Bf16.bytes()];
        let weights = cpu.pack(&[MatrixView { dtype: Dtype::Bf16, n, k, bytes: &zeros }]);
        let mut bytes = 0;
        let read = measure(|| bytes = cpu.probe_read(&weights));
        Limits { gflops: operations as f64 / spin / 1e9, gbytes: bytes as f64 / read / 1e9 }
    }
}

/// Rows that were written: untouched pages would all be the one page of zeros. Their bytes make numbers near one in either
/// dtype: products of far smaller ones are subnormal, which costs some processors a hundred times as much.
fn written_rows(dtype: Dtype, rows: usize, cols: usize) -> Result<RowBuf, Failure> {
    let mut buf = RowBuf::new(dtype, rows, cols)?;
    buf.as_rows_mut().bytes.fill(0x3f);
    Ok(buf)
}

fn report(cpu: &Cpu) -> Result<Value, Failure> {
    let limits = Limits::of(cpu);
    let mut cases = Vec::new();
    for (n, k) in [(HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)] {
        for m in [1, 4, 8, 12, 16, 64, 512] {
            cases.push(case("linear", [m, n, k], linear_seconds(cpu, m, n, k)?, limits, cpu.dtype()));
        }
    }
    for m in [1, 4, 8, 12, 16, 64, 512] {
        // Gate, up and down are as one matrix of three times the intermediate size.
        cases.push(case("ffn", [m, 3 * INTERMEDIATE, HIDDEN], ffn_seconds(cpu, m)?, limits, cpu.dtype()));
    }
    let mut attention = Vec::new();
    for (rows, tokens) in [(1, 1024), (64, 512), (512, 512)] {
        attention.push(attention_case(cpu, rows, tokens, limits)?);
    }
    Ok(json!({
        "backend": cpu.name(), "gflops_max": limits.gflops, "gbytes_max": limits.gbytes,
        "cases": cases, "attention": attention,
    }))
}

fn case(name: &str, [m, n, k]: [usize; 3], seconds: f64, limits: Limits, dtype: Dtype) -> Value {
    let gflops = (2 * m * n * k) as f64 / seconds / 1e9;
    let gbytes = (n * k * dtype.bytes()) as f64 / seconds / 1e9;
    json!({
        "name": name, "m": m, "n": n, "k": k, "us": seconds * 1e6, "gflops": gflops, "gbytes": gbytes,
        "gflops_share": gflops / limits.gflops, "gbytes_share": gbytes / limits.gbytes,
    })
}

/// A checkpoint's matrix of small values.
fn weights(n: usize, k: usize) -> Vec<u8> {
    (0..n * k).flat_map(|i| ((i * 7919 % 1013) as f32 / 1e4 - 0.05).to_le_bytes()).collect()
}

fn linear_seconds(cpu: &Cpu, m: usize, n: usize, k: usize) -> Result<f64, Failure> {
    let stored = weights(n, k);
    let copies = COPIES_BYTES / (n * k * cpu.dtype().bytes());
    let pack = || cpu.pack(&[MatrixView { dtype: Dtype::F32, n, k, bytes: &stored }]);
    let packed: Vec<Matrix> = (0..copies).map(|_| pack()).collect();
    let x = written_rows(cpu.dtype(), m, k)?;
    let mut out = vec![0f32; m * n];
    let mut copy = 0;
    Ok(measure(|| {
        cpu.linear(&packed[copy], x.as_rows(), &mut out);
        copy = (copy + 1) % copies;
    }))
}

fn ffn_seconds(cpu: &Cpu, m: usize) -> Result<f64, Failure> {
    let (n, k) = (INTERMEDIATE, HIDDEN);
    let stored = weights(n, k);
    let view = MatrixView { dtype: Dtype::F32, n, k, bytes: &stored };
    let copies = COPIES_BYTES / (3 * n * k * cpu.dtype().bytes());
    let packed: Vec<Ffn> = (0..copies).map(|_| cpu.pack_ffn(view, view, MatrixView { n: k, k: n, ..view })).collect();
    let (x, mut out) = (written_rows(cpu.dtype(), m, k)?, written_rows(cpu.dtype(), m, k)?);
    let mut copy = 0;
    Ok(measure(|| {
        let x = (0..m).map(|row| x.as_rows().row(row)).collect();
        let out = out.as_rows_mut().bytes.chunks_mut(k * cpu.dtype().bytes()).collect();
        cpu.ffn(&mut [FfnGroup { weights: &packed[copy], x, out }]);
        copy = (copy + 1) % copies;
    }))
}

/// The last `rows` rows of a sequence of `tokens`.
fn attention_case(cpu: &Cpu, rows: usize, tokens: usize, limits: Limits) -> Result<Value, Failure> {
    let (heads, kv_heads, head_dim) = (16, 4, 64);
    let pages: Vec<u32> = (0..tokens.div_ceil(KV_PAGE_TOKENS) as u32).collect();
    let mut cache = cpu.kv_cache(KvShape { layers: 1, pages: pages.len(), kv_heads, head_dim });
    let token = vec![0.1; kv_heads * head_dim];
    for position in 0..tokens {
        cpu.kv_write(&mut cache, 0, pages[position / KV_PAGE_TOKENS], position % KV_PAGE_TOKENS, &token, &token);
    }
    let q = vec![0f32; rows * heads * head_dim];
    let seen = tokens - rows..tokens;
    let queries: Vec<QueryRow<'_>> =
        seen.clone().map(|position| QueryRow { pages: &pages, position: position as u32 }).collect();
    let mut out = RowBuf::new(cpu.dtype(), rows, heads * head_dim)?;
    let shape = AttentionShape { heads, scale: 0.125, window: None };
    let seconds = measure(|| cpu.attention(&cache, 0, &q, heads * head_dim, &queries, shape, out.as_rows_mut()));
    let pairs: usize = seen.map(|position| position + 1).sum();
    let gflops = (4 * pairs * heads * head_dim) as f64 / seconds / 1e9;
    let share = gflops / limits.gflops;
    Ok(json!({ "rows": rows, "tokens": tokens, "us": seconds * 1e6, "gflops": gflops, "gflops_share": share }))
}

fn print(report: &Value) {
    let number = |value: &Value, name: &str| value[name].as_f64().unwrap_or(f64::NAN);
    println!("{}", report["backend"].as_str().unwrap_or_default());
    println!("  limits: {:.1} GFLOP/s from registers", number(report, "gflops_max"));
    println!("          {:.1} GB/s streaming read", number(report, "gbytes_max"));
    println!("  {:8} {:>4} {:>5} {:>5} {:>9} {:>15} {:>14}", "", "m", "n", "k", "us", "GFLOP/s", "GB/s");
    for case in report["cases"].as_array().into_iter().flatten() {
        println!(
            "  {:8} {:>4} {:>5} {:>5} {:>9.1} {:>8.1} ({:>3.0}%) {:>7.1} ({:>3.0}%)",
            case["name"].as_str().unwrap_or_default(),
            number(case, "m"),
            number(case, "n"),
            number(case, "k"),
            number(case, "us"),
            number(case, "gflops"),
            100.0 * number(case, "gflops_share"),
            number(case, "gbytes"),
            100.0 * number(case, "gbytes_share"),
        );
    }
    for case in report["attention"].as_array().into_iter().flatten() {
        println!(
            "  attention, last {} rows of {} tokens, 16/4 heads of 64: {:.1} us, {:.1} GFLOP/s ({:.0}%)",
            number(case, "rows"),
            number(case, "tokens"),
            number(case, "us"),
            number(case, "gflops"),
            100.0 * number(case, "gflops_share"),
        );
    }
}
