//! `meshctl bench`: a load tester for a running mesh.
//!
//! # Layout
//! - [`args`]: the flags, and the bounds of a load point
//! - [`random`], [`lengths`], [`arrivals`], [`dataset`], [`workload`]: what is asked and when, from the seed alone
//! - [`drive`]: sends it, in a closed or an open loop
//! - [`record`]: what is kept of each request
//! - [`stats`]: percentiles, exact or by histogram
//! - [`counters`], [`profile`], [`host`]: the mesh's own counters, where its time went, the machine, processor time
//! - [`report`]: the results and their JSON; [`table`], [`chart`], [`svg`]: their other forms
//! - [`kernels`]: `--kernels`, which another program does
//! - [`error`]: why it cannot start

pub mod args;
pub mod arrivals;
pub mod chart;
pub mod counters;
pub mod dataset;
pub mod drive;
pub mod error;
pub mod host;
pub mod kernels;
pub mod lengths;
pub mod profile;
pub mod random;
pub mod record;
pub mod report;
pub mod stats;
pub mod svg;
pub mod table;
pub mod workload;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressStyle};
use mesh_proto::v1::StatusResponse;
use serde_json::Value;

pub use args::BenchArgs;
use args::{Bounds, Load};
use counters::Counters;
use drive::{EndedBy, Limit, Point, Pool};
pub use error::BenchError;
use host::{Machine, MeshProcesses};
use profile::Profile;
use record::{Failure, Recorder};
use report::{Cpu, PointReport, Report};
use workload::Workload;

use crate::client::Client;
use crate::exit::{CliError, Exit};
use crate::generate::show;
use crate::signals::StopSignals;

/// Streams of the warm-up at most.
const WARMUP_STREAMS_MAX: u32 = 64;
/// The warm-up's number as a load point, so that it asks nothing that is measured later.
const WARMUP_POINT: u64 = u64::MAX;

/// Runs the command.
///
/// # Errors
/// [`CliError`] when it cannot start or its results cannot be written. What fails during the load is counted.
pub async fn run(args: BenchArgs) -> Result<Exit, CliError> {
    if args.kernels.kernels {
        match kernels::become_kernel_bench(&args)? {}
    }
    let report = measure(args, &mut StopSignals::watch()?).await?;
    write(&report)?;
    Ok(exit(&report))
}

/// Runs the warm-up and every load point.
///
/// # Errors
/// [`CliError`] when it cannot start; Ctrl-C before the first load point is one, later it ends the load early.
pub async fn measure(args: BenchArgs, signals: &mut StopSignals) -> Result<Report, CliError> {
    let addr = args.target.grpc.clone();
    let loads = args.loads();
    let prepare = async {
        let mut client = Client::connect(&addr).await?;
        let status = client.status().await?;
        let model = match &status.model {
            Some(model) if status.serving && model.vocab > 0 => model,
            _ => return Err(BenchError::NoModel.into()),
        };
        let mut dataset = match &args.dataset {
            None => None,
            Some(path) => Some((path.clone(), dataset::read_file(path, args.seed)?)),
        };
        let of = dataset.as_mut().map(|(path, dataset)| (path.clone(), dataset));
        let workload = Workload::new(&args, model, of, &mut client).await?;
        let skipped = dataset.map(|(_, dataset)| dataset.skipped);
        let in_flight = loads.iter().map(|load| args.bounds(*load).in_flight).max().unwrap_or(1);
        let pool = Pool::connect(&addr, in_flight).await?;
        Ok((client, status, Arc::new(workload), skipped, pool))
    };
    let (client, status, workload, skipped, pool) = signals.unless(prepare).await?;
    let mut bench =
        Bench { processes: MeshProcesses::find(&status, &addr), client, workload, pool, args, interrupted: false };
    let mut report = Report {
        args: bench.args.clone(),
        machine: Machine::here(),
        status,
        started_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        warmup_errors: Default::default(),
        skipped,
        bytes_per_token: bench.workload.bytes_per_token(),
        interrupted: false,
        points: Vec::new(),
    };
    report.warmup_errors = bench.warm_up(loads.first().copied(), signals).await?;
    for (number, load) in (0u64..).zip(loads) {
        report.points.extend(bench.point(number, load, signals).await?);
        if bench.interrupted {
            break;
        }
    }
    report.interrupted = bench.interrupted;
    Ok(report)
}

/// What all load points share.
struct Bench {
    args: BenchArgs,
    client: Client,
    workload: Arc<Workload>,
    pool: Pool,
    processes: MeshProcesses,
    /// Ctrl-C came: what was measured is reported, nothing more is sent.
    interrupted: bool,
}

type ErrorCounts = std::collections::BTreeMap<&'static str, record::Errors>;

impl Bench {
    /// Requests whose latencies nobody sees: first touches of memory, connections, caches.
    async fn warm_up(&self, first: Option<Load>, signals: &mut StopSignals) -> Result<ErrorCounts, CliError> {
        if self.args.warmup == 0 {
            return Ok(ErrorCounts::new());
        }
        let streams = match first {
            Some(Load::Closed(streams)) => streams,
            _ => WARMUP_STREAMS_MAX,
        };
        let load = Load::Closed(streams.min(self.args.warmup).min(WARMUP_STREAMS_MAX));
        let bounds = Bounds { requests: self.args.warmup.into(), ..self.args.bounds(load) };
        let bar = bar("warm-up", bounds.requests);
        let recorder = Recorder::new(Instant::now(), bar.clone());
        let point = self.drive(WARMUP_POINT, load, bounds, recorder.clone());
        let ended = point.run(signals.next()).await;
        bar.finish_and_clear();
        if ended? == EndedBy::Interrupt {
            return Err(CliError::Interrupted);
        }
        Ok(recorder.take().errors)
    }

    fn drive(&self, number: u64, load: Load, bounds: Bounds, recorder: Recorder) -> Point {
        let (workload, pool) = (self.workload.clone(), self.pool.clone());
        let limit = Limit::new(bounds.requests);
        Point { number, load, bounds, limit, retry: false, workload, pool, recorder, seed: self.args.seed }
    }

    /// One load point with the mesh's counters and processor time around it.
    async fn point(
        &mut self,
        number: u64,
        load: Load,
        signals: &mut StopSignals,
    ) -> Result<Option<PointReport>, CliError> {
        let before = self.settled(signals).await;
        if self.interrupted {
            return Ok(None);
        }
        let (own_before, mesh_before) = (host::own_cpu(), self.processes.cpu());
        let bounds = self.args.bounds(load);
        let bar = bar(&words(load), expected(load, &bounds));
        let recorder = Recorder::new(Instant::now(), bar.clone());
        let ended = self.drive(number, load, bounds, recorder.clone()).run(signals.next()).await;
        let (own_after, mesh_after) = (host::own_cpu(), self.processes.cpu());
        bar.finish_and_clear();
        let (slo, ended) = (Report::slo(&self.args), ended?);
        self.interrupted = ended == EndedBy::Interrupt;
        let mut report = PointReport::new(load, ended, recorder.take(), slo, self.args.per_request);
        report.cpu = Cpu::between([own_before, own_after], &mesh_before, &mesh_after);
        let after = self.settled(signals).await;
        let both = before.zip(after);
        if let Some(((before, _), (after, settled))) = &both {
            report.mesh = Some(Counters::between(before, after, *settled));
            report.profile = Some(Profile::between(before, after, report.elapsed_s));
        }
        Ok(Some(report))
    }

    /// A status whose counters are up to date. A mesh that cannot be asked any more (or Ctrl-C) leaves it out: what was
    /// measured is worth reporting all the same.
    async fn settled(&mut self, signals: &mut StopSignals) -> Option<(StatusResponse, bool)> {
        if self.args.no_counters {
            return None;
        }
        let settled = signals.unless(counters::settled(&mut self.client)).await;
        self.interrupted |= matches!(settled, Err(CliError::Interrupted));
        settled.ok()
    }
}

fn words(load: Load) -> String {
    match load {
        Load::Closed(streams) => format!("{streams} streams"),
        Load::Open(rate) => format!("{rate} requests/s"),
    }
}

/// Requests that the bar ends at: the bound, or what the rate makes of the duration.
fn expected(load: Load, bounds: &Bounds) -> u64 {
    match load {
        Load::Closed(_) => bounds.requests,
        Load::Open(rate) => bounds.requests.min((rate * bounds.duration.as_secs_f64()).ceil() as u64),
    }
}

/// A bar on stderr where stderr is a terminal, nothing otherwise.
pub(crate) fn bar(what: &str, requests: u64) -> ProgressBar {
    let bar = ProgressBar::new(requests);
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {elapsed}, {eta} left") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.to_owned());
    bar
}

/// The table, and the files that were asked for.
fn write(report: &Report) -> Result<(), CliError> {
    put(&table::to_text(report), report.args.json.as_deref().map(|path| (path, report.to_json())))?;
    match &report.args.svg {
        Some(path) => save(path, chart::draw(report)),
        None => Ok(()),
    }
}

/// Prints a table, and writes the same as JSON where that is wanted: `-` is stdout, and moves the table to stderr.
///
/// # Errors
/// [`BenchError::Output`], and [`CliError::Os`] when stdout is closed.
pub(crate) fn put(table: &str, json: Option<(&Path, Value)>) -> Result<(), CliError> {
    match json {
        Some((path, json)) if path == Path::new("-") => {
            eprint!("{table}");
            show(&format!("{json}\n"))
        }
        // The table first: a file that cannot be written must not lose the measurement.
        Some((path, json)) => {
            show(table)?;
            save(path, format!("{json:#}\n"))
        }
        None => show(table),
    }
}

fn save(path: &Path, text: String) -> Result<(), CliError> {
    std::fs::write(path, text).map_err(|source| BenchError::Output { path: path.to_owned(), source }.into())
}

/// Errors are a result like any other, unless there is no other.
fn exit(report: &Report) -> Exit {
    let completed: u64 = report.points.iter().map(|p| p.completed).sum();
    if report.interrupted {
        return Exit::Interrupted;
    }
    if completed > 0 {
        return Exit::Ok;
    }
    let errors = report.points.iter().flat_map(|p| &p.errors).max_by_key(|(_, errors)| errors.count);
    let Some((name, _)) = errors else { return Exit::Internal };
    if *name == Failure::Connection.code() {
        return Exit::Unavailable;
    }
    let code = mesh_proto::v1::ErrorCode::from_str_name(&format!("ERROR_CODE_{name}"));
    let known = code.and_then(|code| mesh_proto::Code::from_wire(code as i32));
    known.map_or(Exit::Internal, Exit::of_code)
}
