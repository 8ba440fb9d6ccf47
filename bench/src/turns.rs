//! Expert FFNs of two builds in turns: what a change to a kernel gains or costs, in fractions of what the machine's own
//! moods move it by. Each build is a process with weights of its own; turns are short and both of a pair see the same mood.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use mesh_kernels::cpu::{Cpu, CpuOptions, Isa};
use mesh_kernels::{Compute, Dtype};
use serde::Serialize;

use crate::child::{Process, orders, say};
use crate::error::BenchError;
use crate::kernels::Ffns;

/// How long a turn lasts.
const TURN: Duration = Duration::from_millis(40);

/// The flags of `mesh-bench kernels` that set two builds beside each other.
#[derive(Clone, Debug, Args)]
pub struct TurnsArgs {
    /// Measures instead expert FFNs of this build and of another, in turns of 40 ms: the other build's mesh-bench.
    #[arg(long, value_name = "FILE", conflicts_with = "invariance")]
    pub beside: Option<PathBuf>,
    /// Rows of an expert, for `--beside`.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,3,4,6,8,16,24,64,512", requires = "beside",
        value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub rows: Vec<u16>,
    /// Turns of each build and number of rows, for `--beside`.
    #[arg(long, value_name = "N", default_value_t = 30, requires = "beside", value_parser = clap::value_parser!(u16).range(2..=10_000))]
    pub turns: u16,
}

/// What each process of a run computes with.
#[derive(Clone, Debug, Args)]
pub struct ChildArgs {
    /// The compute dtype.
    #[arg(long)]
    dtype: Dtype,
    /// Threads that share a call's work.
    #[arg(long)]
    threads: usize,
    /// The instruction set.
    #[arg(long)]
    isa: Option<Isa>,
}

/// Two builds, in one dtype.
#[derive(Debug, Serialize)]
pub struct Turns {
    /// This build's backend.
    pub backend: String,
    /// The other's.
    pub beside: String,
    /// One for each number of rows.
    pub cases: Vec<Case>,
}

/// An expert FFN of so many rows.
#[derive(Debug, Serialize)]
pub struct Case {
    /// Rows.
    pub rows: usize,
    /// Microseconds of this build, the mean over all turns.
    pub us: f64,
    /// Of the other.
    pub beside_us: f64,
    /// The geometric mean over pairs of turns of this build's time divided by the other's.
    pub ratio: f64,
    /// The standard error of that mean.
    pub ratio_error: f64,
}

/// Measures both builds in `dtype`.
///
/// # Errors
/// A process does not start, or ends early.
pub fn run(args: &TurnsArgs, other: &Path, options: CpuOptions) -> Result<Turns, BenchError> {
    let mut words =
        vec!["ffns".to_owned(), format!("--dtype={}", options.dtype), format!("--threads={}", options.threads)];
    words.extend(options.isa.map(|isa| format!("--isa={isa}")));
    let mut ours = Process::start(&words)?;
    let mut other = Process::start_of(other, &words).map_err(|error| match error {
        BenchError::Other(_) => BenchError::Stranger { program: other.to_owned() },
        error => error,
    })?;
    let mut cases = Vec::new();
    for &rows in &args.rows {
        let mut pairs = Vec::new();
        for turn in 0..args.turns {
            let ((first, second), ours_first) =
                if turn % 2 == 0 { ((&mut ours, &mut other), true) } else { ((&mut other, &mut ours), false) };
            let (a, b) = (microseconds(first, rows.into())?, microseconds(second, rows.into())?);
            pairs.push(if ours_first { (a, b) } else { (b, a) });
        }
        cases.push(Case::of(rows.into(), &pairs));
    }
    Ok(Turns { backend: ours.greeting.clone(), beside: other.greeting.clone(), cases })
}

/// One turn of a process: microseconds of a call.
fn microseconds(process: &mut Process, rows: usize) -> Result<f64, BenchError> {
    process.order(rows, TURN)?;
    let line = process.hear()?;
    match line.parse() {
        Ok(us) if f64::is_finite(us) && us > 0.0 => Ok(us),
        _ => Err(BenchError::Other(format!("a process says {line:?} where a time was expected"))),
    }
}

impl Case {
    /// From both builds' microseconds in each pair of turns; there are at least two.
    fn of(rows: usize, pairs: &[(f64, f64)]) -> Case {
        let count = pairs.len() as f64;
        let mean = |of: &dyn Fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / count;
        let log = mean(&|(a, b)| (a / b).ln());
        let variance = mean(&|(a, b)| ((a / b).ln() - log).powi(2)) * count / (count - 1.0);
        let ratio = log.exp();
        let ratio_error = ratio * (variance / count).sqrt();
        Case { rows, us: mean(&|pair| pair.0), beside_us: mean(&|pair| pair.1), ratio, ratio_error }
    }
}

/// The body of a process of such a run: says what it computes with, then runs `ROWS MILLISECONDS` per line of input and
/// answers microseconds of a call.
///
/// # Errors
/// The backend cannot be made.
pub fn obey(args: &ChildArgs) -> Result<(), BenchError> {
    let &ChildArgs { dtype, threads, isa } = args;
    let cpu = Cpu::new(CpuOptions { dtype, threads, isa, bind_from: None })?;
    let mut ffns = Ffns::new(&cpu);
    say(&cpu.name())?;
    orders(|rows, time| {
        let mut call = ffns.calls(rows)?;
        call(&cpu);
        let (start, mut calls) = (Instant::now(), 0u32);
        while start.elapsed() < time {
            call(&cpu);
            calls += 1;
        }
        say(&format!("{:.3}", start.elapsed().as_secs_f64() * 1e6 / f64::from(calls)))
    })
}

impl Turns {
    /// As text.
    pub fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{}, beside {}: an expert's FFN, in turns of {} ms",
            self.backend,
            self.beside,
            TURN.as_millis()
        );
        let _ = writeln!(text, "  {:>5} {:>10} {:>10} {:>16}", "rows", "us", "beside us", "ratio");
        for Case { rows, us, beside_us, ratio, ratio_error } in &self.cases {
            let _ = writeln!(text, "  {rows:>5} {us:>10.1} {beside_us:>10.1} {ratio:>7.3} +- {ratio_error:.3}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_the_mean_of_pairs_with_its_error() {
        let case = Case::of(4, &[(100.0, 200.0), (200.0, 100.0), (50.0, 100.0), (300.0, 150.0)]);
        assert!((case.ratio - 1.0).abs() < 1e-9);
        // Logarithms are +-ln 2: their standard deviation is ln 2 * sqrt(4/3), of their mean half of that.
        assert!((case.ratio_error - std::f64::consts::LN_2 * (4.0f64 / 3.0).sqrt() / 2.0).abs() < 1e-9);
        assert_eq!((case.us, case.beside_us), (162.5, 137.5));
    }
}
