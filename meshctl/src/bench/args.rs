//! Flags of `meshctl bench`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;

use super::lengths::Length;
use crate::cli::{Target, seconds};

/// Most requests of one load point: what is kept of each is some tens of bytes.
pub const REQUESTS_MAX: u64 = 1_000_000;
/// Requests of a load point when neither number nor duration is given.
pub const REQUESTS_DEFAULT: u64 = 100;
/// How long a load point issues requests when nobody says.
pub const DURATION_DEFAULT: Duration = Duration::from_secs(3600);
/// Most streams of a closed loop, and most requests in flight of an open one.
pub const STREAMS_MAX: i64 = 4096;

/// `meshctl bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// The mesh.
    #[command(flatten)]
    pub target: Target,
    /// Closed loop: this many streams, each sending its next request when the last one ended. Several make a sweep.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=STREAMS_MAX))]
    pub concurrency: Vec<u32>,
    /// Open loop: this many requests a second in a Poisson process, whether the mesh keeps up or not. Several make a
    /// sweep.
    #[arg(long, value_name = "R", value_delimiter = ',', conflicts_with = "concurrency")]
    pub rate: Vec<Rate>,
    /// Requests of each load point; 100 when neither this nor --duration is given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=REQUESTS_MAX))]
    pub requests: Option<u64>,
    /// How long each load point sends requests; those in flight may then end, each within --timeout. An hour at most
    /// when not given.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub duration: Option<Duration>,
    /// Requests sent before the first load point and not measured.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub warmup: u32,
    /// Length of the prompts, which are random token ids: `128`, `uniform:LO:HI` or `normal:MEAN:SD`.
    #[arg(long, value_name = "LENGTH", default_value = "128", conflicts_with = "dataset")]
    pub input_tokens: Length,
    /// Tokens to make, in the same forms. Default: 64; with --dataset, as many as the conversation's own answer has.
    #[arg(long, value_name = "LENGTH")]
    pub output_tokens: Option<Length>,
    /// Prompts from a file in ShareGPT's format.
    #[arg(long, value_name = "FILE")]
    pub dataset: Option<PathBuf>,
    /// Makes arrivals, lengths and prompts repeatable.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// End answers at the model's end-of-sequence ids; without it every answer has the length that was asked for.
    #[arg(long)]
    pub stop_at_eos: bool,
    /// A request that has not ended this long after it was due is an error (DEADLINE).
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = seconds)]
    pub timeout: Duration,
    /// Open loop: most requests sent and not ended. Those beyond it wait here, and their latency counts the wait.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=STREAMS_MAX))]
    pub in_flight_max: u32,
    /// Goodput counts requests whose first token came within this.
    #[arg(long, value_name = "MS", value_parser = positive)]
    pub slo_ttft_ms: Option<f64>,
    /// Goodput counts requests whose mean time for each further token is within this.
    #[arg(long, value_name = "MS", value_parser = positive)]
    pub slo_tpot_ms: Option<f64>,
    /// Show where each node's time went: the share, the time a step and the rates of every part of its work.
    #[arg(long)]
    pub profile: bool,
    /// Write everything measured as JSON; `-` for stdout, which moves the table to stderr.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Have every single request in the JSON too.
    #[arg(long, requires = "json")]
    pub per_request: bool,
    /// Draw latency over rate (or over streams, in a closed loop).
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Do not wait, before and after each load point, until every node has reported: leaves the mesh's own counters out.
    #[arg(long)]
    pub no_counters: bool,
    /// The kernels of this machine instead of a mesh.
    #[command(flatten)]
    pub kernels: super::kernels::KernelsArgs,
}

/// Requests a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate(pub f64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s.parse::<f64>() {
            Ok(rate) if (0.001..=100_000.0).contains(&rate) => Ok(Rate(rate)),
            _ => Err(format!("`{s}` is not a rate: 0.001 to 100000 requests a second")),
        }
    }
}

fn positive(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err(format!("`{s}` is not a number above 0")),
    }
}

/// How requests are issued at one load point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// This many streams, each with one request at a time.
    Closed(u32),
    /// This many requests a second, on average.
    Open(f64),
}

impl Load {
    /// The number on the x axis.
    pub fn value(self) -> f64 {
        match self {
            Load::Closed(streams) => f64::from(streams),
            Load::Open(rate) => rate,
        }
    }
}

/// Where a load point ends, whichever comes first.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Requests issued.
    pub requests: u64,
    /// Time in which they are issued.
    pub duration: Duration,
    /// Time for each one from when it was due.
    pub timeout: Duration,
    /// Most in flight.
    pub in_flight: u32,
}

impl BenchArgs {
    /// The load points in the order in which they were given.
    pub fn loads(&self) -> Vec<Load> {
        if self.rate.is_empty() {
            self.concurrency.iter().map(|&streams| Load::Closed(streams)).collect()
        } else {
            self.rate.iter().map(|rate| Load::Open(rate.0)).collect()
        }
    }

    /// The bounds of a load point.
    pub fn bounds(&self, load: Load) -> Bounds {
        let requests_default = if self.duration.is_some() { REQUESTS_MAX } else { REQUESTS_DEFAULT };
        let in_flight = match load {
            Load::Closed(streams) => streams,
            Load::Open(_) => self.in_flight_max,
        };
        Bounds {
            requests: self.requests.unwrap_or(requests_default),
            duration: self.duration.unwrap_or(DURATION_DEFAULT),
            timeout: self.timeout,
            in_flight,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    pub(in crate::bench) fn parse(flags: &[&str]) -> Result<BenchArgs, clap::Error> {
        let cli = Cli::try_parse_from(["meshctl", "bench"].iter().chain(flags))?;
        match cli.command {
            Command::Bench(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_sweep_is_a_comma_list_of_streams_or_of_rates() {
        let loads = |flags: &[&str]| parse(flags).unwrap().loads();
        assert_eq!(loads(&[]), [Load::Closed(1)]);
        assert_eq!(loads(&["--concurrency", "1,8,64"]), [Load::Closed(1), Load::Closed(8), Load::Closed(64)]);
        assert_eq!(loads(&["--rate", "0.5,2"]), [Load::Open(0.5), Load::Open(2.0)]);
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for flags in [
            &["--rate", "1", "--concurrency", "1"][..],
            &["--rate", "0"],
            &["--rate", "NaN"],
            &["--concurrency", "0"],
            &["--requests", "0"],
            &["--duration", "0"],
            &["--input-tokens", "5", "--dataset", "f"],
            &["--per-request"],
            &["--slo-ttft-ms", "0"],
        ] {
            assert!(parse(flags).is_err(), "{flags:?}");
        }
    }

    #[test]
    fn every_load_point_is_bounded_in_requests_and_in_time() {
        let bounds = |flags: &[&str]| {
            let args = parse(flags).unwrap();
            let bounds = args.bounds(args.loads()[0]);
            (bounds.requests, bounds.duration.as_secs(), bounds.in_flight)
        };
        assert_eq!(bounds(&[]), (REQUESTS_DEFAULT, 3600, 1));
        assert_eq!(bounds(&["--requests", "7"]), (7, 3600, 1));
        assert_eq!(bounds(&["--duration", "9", "--concurrency", "5"]), (REQUESTS_MAX, 9, 5));
        assert_eq!(bounds(&["--duration", "9", "--requests", "7", "--rate", "1"]), (7, 9, 1024));
    }
}
