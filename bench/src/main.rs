//! Benchmarks that print each figure beside the machine's own limit, measured in the same run.
//!
//! # Layout
//! - `exchange`: dispatch and combine round trips; what is run, in which order
//! - `nodes`: the measured mesh: attention ends and echoing expert ends
//! - `raw`: the same bytes over plain sockets, and over queues between threads
//! - `child`: the other processes of a run
//! - `ucp`: the same bytes over plain UCP; `perftest`: `ucx_perftest`, where it is installed
//! - `report`: its table and JSON
//! - `kernels`: products, expert FFNs and attention beside `limits`, what the machine can do at best; `turns`: two builds of them
//! - `model`: random checkpoints to measure with; `cost`: what work on a model costs at least
//! - `mesh`: whole meshes in turns, beside those limits; `growth`: how cost grows with sizes; `meshes`: starting, loading
//!   and stopping them; `chart`: pictures
//! - `about`: what every result says of itself, and where results go; `error`: why a run failed

#![forbid(unsafe_code)]

mod about;
mod chart;
mod child;
mod cost;
mod error;
mod exchange;
mod growth;
mod kernels;
mod limits;
mod mesh;
mod meshes;
mod model;
mod nodes;
mod perftest;
mod raw;
mod report;
mod turns;
mod ucp;

use std::process::ExitCode;
use std::time::Duration;

use about::{JsonArg, show};
use clap::{Parser, Subcommand};
use error::BenchError;
use mesh_transport::TransportKind;

/// Benchmarks of the mesh, each figure beside the machine's own limit.
#[derive(Parser)]
#[command(name = "mesh-bench", version, max_term_width = 120)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Dispatch and combine round trips: 0 to 128 rows of hidden 2048 in bf16, 1A1E and 2A4E.
    Exchange {
        /// Where the results go.
        #[command(flatten)]
        json: JsonArg,
        /// Which transports: local, tcp, ucx or all.
        #[arg(long, default_value = "all", value_parser = transports)]
        transport: Transports,
        /// How long to measure each figure, milliseconds in each of the rounds.
        #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=400))]
        block_ms: u64,
    },
    /// Products, expert FFNs and attention as shares of the machine's arithmetic and of its streaming read.
    Kernels(kernels::KernelsArgs),
    /// Write a random Qwen3-MoE checkpoint in bf16, as published ones are: 1.3 G parameters unless told otherwise.
    Model(model::ModelArgs),
    /// Whole meshes in turns: prefill and decode as shares of what the machine allows, and transports beside each other.
    Mesh(mesh::MeshArgs),
    /// How the time of a step grows with streams, experts, expert nodes and context: a picture, figures and exponents.
    Growth(growth::GrowthArgs),
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

fn run(command: Command) -> Result<(), BenchError> {
    match command {
        Command::Exchange { json, transport, block_ms } => {
            let report = exchange::run(&transport.0, Duration::from_millis(block_ms))?;
            json.write(&report, &report.table())
        }
        Command::Kernels(args) => {
            let report = kernels::run(&args)?;
            args.json.write(&report, &report.table())
        }
        Command::Model(args) => {
            let model::Written { parameters, shards } = model::write(&args)?;
            show(&format!("{}: {parameters} parameters in {shards} files\n", args.out.display()))
        }
        Command::Mesh(args) => {
            let report = mesh::run(&args)?;
            args.json.write(&report, &report.table())
        }
        Command::Growth(args) => {
            let report = growth::run(&args)?;
            args.json.write(&report, &report.table())
        }
        Command::Child { role } => child::run(role),
    }
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-bench: {error}");
            error.exit()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn results_go_to_a_file_to_stdout_or_nowhere() {
        let json = |flags: &[&str]| match Args::parse_from(["mesh-bench", "exchange"].iter().chain(flags)).command {
            Command::Exchange { json, .. } => json.json,
            _ => None,
        };
        assert_eq!(json(&[]), None);
        assert_eq!(json(&["--json"]), Some("-".into()));
        assert_eq!(json(&["--json", "f"]), Some("f".into()));
    }
}
