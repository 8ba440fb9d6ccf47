//! Benchmarks that print each figure beside the machine's own limit, measured in the same run.
//!
//! # Layout
//! - `exchange`: dispatch and combine round trips; what is run, in which order
//! - `nodes`: the measured mesh: attention ends and echoing expert ends
//! - `raw`: the same bytes over plain sockets, and over queues between threads
//! - `child`: the other processes of a run
//! - `ucp`: the same bytes over plain UCP; `perftest`: `ucx_perftest`, where it is installed
//! - `report`: the table and the JSON

#![forbid(unsafe_code)]

mod child;
mod exchange;
mod nodes;
mod perftest;
mod raw;
mod report;
mod ucp;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use mesh_transport::{TransportError, TransportKind};

/// Benchmarks of the mesh, each figure beside the machine's own limit.
#[derive(Parser)]
#[command(name = "mesh-bench", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Dispatch and combine round trips: 0 to 128 rows of hidden 2048 in bf16, 1A1E and 2A4E.
    Exchange {
        /// Print one JSON object instead of the table.
        #[arg(long)]
        json: bool,
        /// Which transports: local, tcp, ucx or all.
        #[arg(long, default_value = "all", value_parser = transports)]
        transport: Transports,
        /// How long to measure each figure, milliseconds in each of the rounds.
        #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=400))]
        block_ms: u64,
    },
    /// A further process of a run; ends with its standard input.
    #[command(hide = true)]
    Child {
        /// What it is.
        #[command(subcommand)]
        role: child::ChildRole,
    },
}

#[derive(Clone, Debug)]
struct Transports(Vec<TransportKind>);

fn transports(name: &str) -> Result<Transports, String> {
    if name == "all" {
        return Ok(Transports(vec![TransportKind::Local, TransportKind::Tcp, TransportKind::Ucx]));
    }
    name.parse().map(|kind| Transports(vec![kind])).map_err(|_| format!("{name:?} is none of local, tcp, ucx and all"))
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    /// The transport failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The system failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What it says.
        source: std::io::Error,
    },
    /// Another process or thread of the run is gone or says something else.
    #[error("{0}")]
    Other(String),
}

impl BenchError {
    fn io(what: &'static str) -> impl Fn(std::io::Error) -> BenchError {
        move |source| BenchError::Io { what, source }
    }
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Exchange { json, transport, block_ms } => {
            exchange::run(&transport.0, Duration::from_millis(block_ms)).and_then(|report| report.print(json))
        }
        Command::Child { role } => child::run(role),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
