//! `meshctl drill`: a mesh of processes under load is disturbed by a plan, and answers as if it were not.
//!
//! # Layout
//! - [`args`]: the flags; they go before what the plan says
//! - [`plan`], [`step`], [`span`]: the plan, its phases, its numbers and their bounds
//! - [`load`]: sends the plan's requests, once undisturbed and then under the phases
//! - [`conduct`], [`drain`]: carries out the phases and writes down what happened
//! - [`compare`], [`measure`], [`watch`]: tokens bit for bit; stalls and throughput; memory and handles
//! - [`report`], [`verdict`]: what was found, and what of it was expected otherwise
//! - [`error`]: why a drill cannot be run

pub mod args;
pub mod compare;
pub mod conduct;
pub mod drain;
pub mod error;
pub mod load;
pub mod measure;
pub mod plan;
pub mod report;
pub mod span;
pub mod step;
pub mod verdict;
pub mod watch;

use indicatif::{ProgressBar, ProgressStyle};
use mesh_proto::v1::ModelInfo;

pub use args::DrillArgs;
use conduct::Conductor;
pub use error::DrillError;
use load::{Run, Sender};
use plan::Plan;
use report::{Found, Report};
use step::Step;

use crate::bench::put;
use crate::cli::UpArgs;
use crate::exit::{CliError, Exit};
use crate::launch::{Mesh, Progress};
use crate::process::LogSink;
use crate::signals::StopSignals;

/// Runs the command.
///
/// # Errors
/// [`CliError`] when the drill cannot be run; nothing is left running then. What the mesh does wrong is in the report.
pub async fn run(args: DrillArgs) -> Result<Exit, CliError> {
    let mut plan = Plan::read(&args.plan)?;
    args.override_in(&mut plan);
    let steps = step::written_out(&plan.steps);
    let up = args.up(&plan)?;
    let progress = Progress::new(false);
    let log: LogSink = if args.verbose { progress.sink() } else { std::sync::Arc::new(|_, _| ()) };

    let mut signals = StopSignals::watch()?;
    let (found, model) = signals.unless(both_runs(&plan, &steps, up, &progress, &log)).await?;
    let report = Report::new(&plan, found);
    let json = args.json.as_deref().map(|path| (path, report.to_json(&plan, &model)));
    put(&report.to_text(&plan, &model), json)?;
    Ok(if report.violations.is_empty() { Exit::Ok } else { Exit::Unmet })
}

/// The undisturbed run and the disturbed one. They share a mesh, unless it is the mesh itself that makes faults.
async fn both_runs(
    plan: &Plan,
    steps: &[&Step],
    args: UpArgs,
    progress: &Progress,
    log: &LogSink,
) -> Result<(Found, ModelInfo), CliError> {
    let (mut mesh, _) = Mesh::start(&args, progress, log.clone()).await?;
    let model = load::model(mesh.grpc()).await?;
    let undisturbed = load::undisturbed(&plan.load, &model, mesh.grpc()).await?;
    if plan.mesh.faults.is_some() {
        stop(mesh, &args).await;
        let faulty = UpArgs { faults: plan.mesh.faults.clone(), ..args.clone() };
        (mesh, _) = Mesh::start(&faulty, progress, log.clone()).await?;
    }
    let found = disturbed(plan, steps, undisturbed, &model, &mut mesh).await?;
    stop(mesh, &args).await;
    Ok((found, model))
}

async fn stop(mesh: Mesh, args: &UpArgs) {
    for name in mesh.stop().await {
        eprintln!("{name} did not stop within {} s and was killed", args.grace.as_secs());
    }
}

async fn disturbed(
    plan: &Plan,
    steps: &[&Step],
    undisturbed: Run,
    model: &ModelInfo,
    mesh: &mut Mesh,
) -> Result<Found, CliError> {
    let bar = spinner(&format!("disturbed; waits of {:.0} s at most", step::waits_max(&plan.steps).as_secs_f64()));
    let requests = undisturbed.answers.len() as u64;
    let sender = Sender::again(&plan.load, &undisturbed, model, mesh.grpc(), bar.clone()).await?;
    let (start, limit) = (sender.start(), sender.limit());
    let load = async { (sender.run().await, start.elapsed()) };
    let phases = async {
        let mut conductor = Conductor::new(mesh, start, plan.load.seed, |line| bar.suspend(|| eprintln!("{line}")));
        let ended = conductor.run(steps).await;
        let phases_end = start.elapsed();
        // Every request is sent at least once, also where the phases take no time.
        limit.lower(requests);
        (conductor, ended, phases_end)
    };
    let ((disturbed, load_end), (conductor, ended, phases_end)) = tokio::join!(load, phases);
    let (events, watched) = conductor.end().await;
    bar.finish_and_clear();
    let moved = load::moved(mesh.grpc()).await;
    Ok(Found {
        moved,
        undisturbed,
        disturbed: disturbed?,
        events,
        watched,
        phases_end,
        phases_ended_by: ended.err().map(|error| error.to_string()),
        load_ended_early: load_end < phases_end,
    })
}

/// Requests counted and time, where their number is not known before.
fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}: {pos} requests ({elapsed})") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}
