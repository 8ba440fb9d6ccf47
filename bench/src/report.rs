//! The table and the JSON of `exchange`.

use std::fmt::Write as _;

use serde::Serialize;

/// The ratio to the raw limit that is aimed at.
pub const RATIO_GOAL: f64 = 1.5;

/// A run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Bytes a second one thread copies, far more than the caches hold.
    pub memcpy_memory_bytes_per_s: f64,
    /// The same for the largest message, which the caches hold.
    pub memcpy_cache_bytes_per_s: f64,
    /// How the raw figures and ours wait.
    pub waiting: String,
    /// The goal for `ratio`.
    pub ratio_goal: f64,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// What was not, and why.
    pub left_out: Vec<String>,
}

/// One measurement and its raw limit.
#[derive(Debug, Serialize)]
pub struct Figure {
    /// The transport.
    pub transport: String,
    /// Attention and expert nodes.
    pub shape: String,
    /// Rows of one exchange.
    pub rows: usize,
    /// Bytes of the exchange, both ways.
    pub bytes: usize,
    /// Round trips measured.
    pub samples: usize,
    /// Microseconds, median.
    pub p50_us: f64,
    /// Microseconds, 99th percentile.
    pub p99_us: f64,
    /// What the raw limit is.
    pub raw: &'static str,
    /// Its microseconds, median.
    pub raw_p50_us: Option<f64>,
    /// Its 99th percentile, where it gives one.
    pub raw_p99_us: Option<f64>,
    /// Microseconds, median, of `ucx_perftest`'s active messages of the same bytes, where it is installed. It sends one
    /// buffer over and over and reads nothing of what it receives.
    pub perftest_us: Option<f64>,
    /// Ours over raw, medians.
    pub ratio: Option<f64>,
}

impl Report {
    /// As text.
    pub fn table(&self) -> String {
        let giga = 1e9;
        let mut text = format!(
            "memcpy, one thread: {:.1} GB/s from memory, {:.1} GB/s in cache\nwaiting: {}\n\n",
            self.memcpy_memory_bytes_per_s / giga,
            self.memcpy_cache_bytes_per_s / giga,
            self.waiting
        );
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:<6} {:<5} {:>5} {:>9}  {:>9} {:>9}  {:<12} {:>9} {:>9}  {:>6}  {:>12}",
            "", "shape", "rows", "bytes", "p50 us", "p99 us", "raw limit", "p50 us", "p99 us", "ratio", "ucx_perftest"
        );
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.1}"));
        for f in &self.figures {
            let ratio = f.ratio.map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
            let _ = writeln!(
                text,
                "{:<6} {:<5} {:>5} {:>9}  {:>9.1} {:>9.1}  {:<12} {:>9} {:>9}  {ratio:>6}  {:>12}",
                f.transport,
                f.shape,
                f.rows,
                f.bytes,
                f.p50_us,
                f.p99_us,
                f.raw,
                number(f.raw_p50_us),
                number(f.raw_p99_us),
                number(f.perftest_us)
            );
        }
        let ratios = self.figures.iter().filter_map(|f| f.ratio);
        let (within, all) = ratios.fold((0, 0), |(w, n), r| (w + usize::from(r <= RATIO_GOAL), n + 1));
        let _ = writeln!(text, "\n{within} of {all} figures are within {RATIO_GOAL}x of their raw limit");
        for line in &self.left_out {
            let _ = writeln!(text, "left out: {line}");
        }
        text
    }
}
