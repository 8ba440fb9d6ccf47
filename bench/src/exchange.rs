//! Dispatch and combine round trips beside the machine's raw limit: what is run, in which order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh_core::Role;
use mesh_transport::{Limits, LocalHub, TransportError, TransportKind, Wake, bind};

use crate::BenchError;
use crate::child::Process;
use crate::nodes::{self, Attention, ROWS_MAX, RoundTrip, credentials, split};
use crate::perftest;
use crate::raw::{self, PlainClient};
use crate::report::{Figure, RATIO_GOAL, Report};
use crate::ucp;

const ROWS: [usize; 5] = [0, 1, 8, 64, 128];

/// Attention and expert nodes.
const SHAPES: [(usize, usize); 2] = [(1, 1), (2, 4)];

/// How often ours and raw take turns.
const ROUNDS: usize = 5;

const MEMCPY_TIME: Duration = Duration::from_millis(200);

/// Runs it all.
pub fn run(transports: &[TransportKind], block: Duration) -> Result<Report, BenchError> {
    let spin = Limits::default().spin_max;
    let mut report = Report {
        memcpy_memory_bytes_per_s: raw::memcpy_rate(64 << 20, MEMCPY_TIME),
        memcpy_cache_bytes_per_s: raw::memcpy_rate(raw::wire_bytes(ROWS_MAX).0, MEMCPY_TIME),
        waiting: format!(
            "ours spins as long as waits have been, at most {spin:?}, sockets and queues {spin:?}; then they sleep; plain ucp and \
             ucx_perftest spin for ever"
        ),
        ratio_goal: RATIO_GOAL,
        figures: Vec::new(),
        left_out: Vec::new(),
    };
    for kind in transports {
        for (attention, experts) in SHAPES {
            match run_shape(*kind, attention, experts, block, &mut report) {
                Err(BenchError::Transport(error @ TransportError::Unavailable { .. })) => {
                    report.left_out.push(error.to_string());
                    break;
                }
                outcome => outcome?,
            }
        }
    }
    Ok(report)
}

fn run_shape(
    kind: TransportKind,
    attention: usize,
    experts: usize,
    block: Duration,
    report: &mut Report,
) -> Result<(), BenchError> {
    if kind != TransportKind::Local {
        // Said here, in this process, rather than by a child that fails.
        drop(bind(kind, "127.0.0.1:0", Limits::default(), None)?);
    }
    let mut ours =
        if kind == TransportKind::Local { local(attention, experts)? } else { mesh(kind, attention, experts)? };
    let (raw, mut limit) = if kind == TransportKind::Local {
        ("queues", queues(attention, experts)?)
    } else if kind == TransportKind::Ucx && experts == 1 {
        ("plain ucp", ucp::plain()?)
    } else {
        ("sockets", sockets(attention, experts)?)
    };
    for rows in ROWS {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let mut perftest_us = Vec::new();
        for round in 0..ROUNDS {
            ours.measure(rows, block, &mut a)?;
            limit.measure(rows, block, &mut b)?;
            // A whole pair of processes each time, so not in every round.
            if kind == TransportKind::Ucx && experts == 1 && round % 2 == 0 {
                perftest_us.extend(perftest::round_trip_us(raw::wire_bytes(rows).0, 2000));
            }
        }
        let bytes =
            split(rows, experts).map(|(_, share)| raw::wire_bytes(share)).map(|(ask, answer)| ask + answer).sum();
        let mut figure = Figure {
            transport: kind.to_string(),
            shape: format!("{attention}A{experts}E"),
            rows,
            bytes,
            samples: a.len(),
            p50_us: percentile(&mut a, 50),
            p99_us: percentile(&mut a, 99),
            raw,
            raw_p50_us: Some(percentile(&mut b, 50)),
            raw_p99_us: Some(percentile(&mut b, 99)),
            ratio: None,
            perftest_us: None,
        };
        if !perftest_us.is_empty() {
            perftest_us.sort_by(f64::total_cmp);
            figure.perftest_us = Some(perftest_us[perftest_us.len() / 2]);
        }
        figure.ratio = figure.raw_p50_us.map(|raw| figure.p50_us / raw);
        report.figures.push(figure);
    }
    if kind == TransportKind::Ucx && experts == 1 && report.figures.iter().all(|f| f.perftest_us.is_none()) {
        report.left_out.push("ucx_perftest is not installed (Debian: ucx-utils)".into());
    }
    Ok(())
}

/// A percentile in microseconds.
fn percentile(samples: &mut [Duration], percent: usize) -> f64 {
    samples.sort_unstable();
    let at = (samples.len() * percent / 100).min(samples.len().saturating_sub(1));
    samples.get(at).map_or(f64::NAN, |sample| sample.as_nanos() as f64 / 1e3)
}

/// One attention end here, further ones beside it, and whatever must live as long.
pub struct Running {
    here: Box<dyn RoundTrip>,
    beside: Vec<Box<dyn Beside>>,
    /// Expert ends; dropped, and so ended, last.
    _others: Vec<Box<dyn std::any::Any>>,
}

impl Running {
    /// Round trips of `rows` rows for `time`, by all attention ends at once; the times are this one's.
    fn measure(&mut self, rows: usize, time: Duration, into: &mut Vec<Duration>) -> Result<(), BenchError> {
        for beside in &mut self.beside {
            beside.begin(rows, time)?;
        }
        self.here.begin()?;
        let mut begun = Instant::now();
        let until = begun + time;
        while begun < until {
            self.here.round_trip(rows)?;
            let done = Instant::now();
            into.push(done - begun);
            begun = done;
        }
        self.here.end()?;
        self.beside.iter_mut().try_for_each(|beside| beside.end())
    }
}

/// An attention end that runs beside the measured one.
trait Beside {
    fn begin(&mut self, rows: usize, time: Duration) -> Result<(), BenchError>;
    fn end(&mut self) -> Result<(), BenchError>;
}

impl Beside for Process {
    fn begin(&mut self, rows: usize, time: Duration) -> Result<(), BenchError> {
        self.order(rows, time)
    }

    fn end(&mut self) -> Result<(), BenchError> {
        self.hear().map(|_| ())
    }
}

/// The end, back from its thread, and how it went.
type Ran = (Box<dyn RoundTrip>, Result<(), BenchError>);

/// An attention end on a thread of this process.
struct Thread {
    end: Option<Box<dyn RoundTrip>>,
    running: Option<std::thread::JoinHandle<Ran>>,
}

impl Beside for Thread {
    fn begin(&mut self, rows: usize, time: Duration) -> Result<(), BenchError> {
        if let Some(mut end) = self.end.take() {
            self.running = Some(std::thread::spawn(move || {
                let until = Instant::now() + time;
                let mut outcome = end.begin();
                while outcome.is_ok() && Instant::now() < until {
                    outcome = end.round_trip(rows);
                }
                (end, outcome)
            }));
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), BenchError> {
        let Some(running) = self.running.take() else { return Ok(()) };
        let (end, outcome) = running.join().map_err(|_| BenchError::Other("an attention thread panicked".into()))?;
        self.end = Some(end);
        outcome
    }
}

pub fn assemble(ends: Vec<Box<dyn RoundTrip>>, others: Vec<Box<dyn std::any::Any>>) -> Result<Running, BenchError> {
    let mut ends = ends.into_iter();
    let here = ends.next().ok_or_else(|| BenchError::Other("a shape without attention".into()))?;
    let beside = ends.map(|end| Box::new(Thread { end: Some(end), running: None }) as Box<dyn Beside>).collect();
    Ok(Running { here, beside, _others: others })
}

/// An echoing thread; ends when dropped.
struct EchoThread {
    stop: Arc<AtomicBool>,
    waker: Arc<dyn Wake>,
    thread: Option<std::thread::JoinHandle<Result<(), BenchError>>>,
}

impl Drop for EchoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.waker.wake();
        // Its failure has been seen by the attention end that waited for it.
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

fn local(attention: usize, experts: usize) -> Result<Running, BenchError> {
    let hub = LocalHub::new();
    let (mut addrs, mut echoes): (Vec<String>, Vec<Box<dyn std::any::Any>>) = (Vec::new(), Vec::new());
    for slot in 0..experts {
        let bound = bind(TransportKind::Local, "", Limits::default(), Some(hub.clone()))?;
        addrs.push(bound.local_addr().to_owned());
        let transport = bound.start(credentials(Role::Expert, slot as u16))?;
        let (stop, waker) = (Arc::new(AtomicBool::new(false)), transport.waker());
        let told = stop.clone();
        let thread = std::thread::spawn(move || nodes::serve(transport, || told.load(Ordering::SeqCst)));
        echoes.push(Box::new(EchoThread { stop, waker, thread: Some(thread) }));
    }
    let mut ends: Vec<Box<dyn RoundTrip>> = Vec::new();
    for slot in 0..attention {
        ends.push(Box::new(Attention::connect(TransportKind::Local, slot as u16, &addrs, Some(hub.clone()))?));
    }
    assemble(ends, echoes)
}

fn queues(attention: usize, experts: usize) -> Result<Running, BenchError> {
    let clients = raw::queues(attention, experts).into_iter();
    assemble(clients.map(|client| Box::new(client) as Box<dyn RoundTrip>).collect(), Vec::new())
}

fn mesh(kind: TransportKind, attention: usize, experts: usize) -> Result<Running, BenchError> {
    let expert = [String::from("expert"), kind.to_string()];
    let servers = (0..experts).map(|_| Process::start(&expert)).collect::<Result<Vec<_>, _>>()?;
    let addrs: Vec<String> = servers.iter().map(|server| server.greeting.clone()).collect();
    let mut beside: Vec<Box<dyn Beside>> = Vec::new();
    for slot in 1..attention {
        let mut args = vec!["attention".to_owned(), kind.to_string(), slot.to_string()];
        args.extend_from_slice(&addrs);
        beside.push(Box::new(Process::start(&args)?));
    }
    let here = Box::new(Attention::connect(kind, 0, &addrs, None)?);
    Ok(Running { here, beside, _others: servers.into_iter().map(|s| Box::new(s) as Box<dyn std::any::Any>).collect() })
}

fn sockets(attention: usize, experts: usize) -> Result<Running, BenchError> {
    let server = [String::from("plain-server"), attention.to_string()];
    let servers = (0..experts).map(|_| Process::start(&server)).collect::<Result<Vec<_>, _>>()?;
    let addrs: Vec<String> = servers.iter().map(|server| server.greeting.clone()).collect();
    let mut beside: Vec<Box<dyn Beside>> = Vec::new();
    for _ in 1..attention {
        let mut args = vec!["plain-client".to_owned()];
        args.extend_from_slice(&addrs);
        beside.push(Box::new(Process::start(&args)?));
    }
    let here = Box::new(PlainClient::connect(&addrs)?);
    Ok(Running { here, beside, _others: servers.into_iter().map(|s| Box::new(s) as Box<dyn std::any::Any>).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_samples() {
        let mut samples: Vec<Duration> = (1..=100).rev().map(Duration::from_micros).collect();
        assert_eq!(percentile(&mut samples, 50), 51.0);
        assert_eq!(percentile(&mut samples, 99), 100.0);
        assert!(percentile(&mut [], 50).is_nan());
    }

    #[test]
    fn a_short_run_measures_every_figure_in_one_process() {
        let report = run(&[TransportKind::Local], Duration::from_millis(1)).unwrap();
        assert_eq!(report.figures.len(), SHAPES.len() * ROWS.len());
        assert!(report.figures.iter().all(|f| f.samples > 0 && f.p50_us > 0.0 && f.ratio.is_some()));
        assert_eq!(report.figures[1].bytes, 64 + 64 + 4096 + 64 + 4096);
    }
}
