//! The command line of the mesh: starts one, talks to one, explains one.
//!
//! # Layout
//! - [`cli`]: the flags of every command
//! - [`exit`]: exit codes, and the errors that they stand for
//! - [`os`]: the few system calls that the standard library does not offer: a child's death signal, kill
//! - [`process`]: one child process: its ready line, its last log lines, its end
//! - [`launch`]: a whole mesh as processes: start in order, wait until it serves, stop in order
//! - [`signals`]: SIGINT, SIGTERM and SIGHUP as something to wait for
//! - [`client`]: the gRPC connection and its errors in words
//! - [`up`], [`generate`], [`status`], [`operate`], [`health`], [`doctor`], [`demo`]: the commands
//! - [`mod@bench`]: the load tester for a running mesh
//! - [`drill`]: fault drills: a mesh disturbed by a plan under load
//! - [`probe`]: native libraries opened at run time, for `doctor`
//! - [`volume`]: the all-to-all arithmetic that `demo` prints beside what it measured

#![deny(unsafe_code)]

pub mod bench;
pub mod cli;
pub mod client;
pub mod demo;
pub mod doctor;
pub mod drill;
pub mod exit;
pub mod generate;
pub mod health;
pub mod launch;
pub mod operate;
pub mod os;
pub mod probe;
pub mod process;
pub mod signals;
pub mod status;
pub mod up;
pub mod volume;

use cli::{Cli, Command};
use exit::{CliError, Exit};

/// Runs one command.
///
/// # Errors
/// [`CliError`], whose [`CliError::exit`] is the process's exit code.
pub async fn run(cli: Cli) -> Result<Exit, CliError> {
    match cli.command {
        Command::Up(args) => up::run(args).await,
        Command::Generate(args) => generate::run(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Drain(args) => operate::drain(args).await,
        Command::Rebalance(args) => operate::rebalance(args).await,
        Command::Stalls(args) => operate::stalls(args).await,
        Command::Health(args) => health::run(args).await,
        Command::Doctor(args) => doctor::run(&args).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Bench(args) => bench::run(args).await,
        Command::Drill(args) => drill::run(args).await,
    }
}
