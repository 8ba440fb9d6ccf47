//! The results: what is computed from the records, and the JSON form of all of it.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_proto::v1::StatusResponse;
use serde::Serialize;
use serde_json::{Value, json};

use super::args::{BenchArgs, Load};
use super::counters::Counters;
use super::dataset::Skipped;
use super::drive::EndedBy;
use super::host::Machine;
use super::profile::Profile;
use super::record::{Errors, Kept, Record};
use super::stats::Summary;
use super::workload::OUTPUT_DEFAULT;

/// The JSON's own version: raised when a field changes its meaning.
pub const FORMAT: u32 = 1;

/// Bounds that a good answer keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Slo {
    /// To the first token.
    pub ttft_ms: Option<f64>,
    /// For each further one.
    pub tpot_ms: Option<f64>,
}

impl Slo {
    /// Whether any bound is set.
    pub fn is_set(&self) -> bool {
        self.ttft_ms.is_some() || self.tpot_ms.is_some()
    }

    /// Whether a complete answer kept them. One of a single token has no time for further ones to keep.
    fn kept_by(&self, record: &Record) -> bool {
        let within = |found: Option<Duration>, bound: Option<f64>, absent: bool| match bound {
            None => true,
            Some(bound) => found.map_or(absent, |found| ms(found) <= bound),
        };
        record.failure.is_none()
            && within(record.ttft(), self.ttft_ms, false)
            && within(record.tpot(), self.tpot_ms, true)
    }
}

/// Latencies of the complete answers, milliseconds, from when each request was due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latencies {
    /// To the first token.
    pub ttft: Option<Summary>,
    /// Mean of each answer's further tokens.
    pub tpot: Option<Summary>,
    /// Between tokens, each one counted (of failed answers too).
    pub inter_token: Option<Summary>,
    /// To the end.
    pub e2e: Option<Summary>,
    /// How late requests were sent: the load tester's own share, part of all others.
    pub send_lag: Option<Summary>,
}

/// Answers that kept the bounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Goodput {
    /// How many.
    pub requests: u64,
    /// A second.
    pub requests_per_s: f64,
    /// Of all requests, failed ones among them.
    pub share: f64,
}

/// Processor time spent on this machine during a load point.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Cpu {
    /// By the load tester.
    pub own_s: Option<f64>,
    /// By the mesh's processes here, by name; empty when none of them is.
    pub mesh_s: BTreeMap<String, f64>,
    /// The load tester's over all the mesh's.
    pub own_over_mesh: Option<f64>,
}

impl Cpu {
    /// What was spent between two readings. A process that ended meanwhile is left out.
    pub fn between(own: [Option<f64>; 2], before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>) -> Self {
        let own_s = own[0].zip(own[1]).map(|(before, after)| after - before);
        let spent = after.iter().filter_map(|(name, after)| Some((name.clone(), after - before.get(name)?)));
        let mesh_s: BTreeMap<String, f64> = spent.collect();
        let mesh: f64 = mesh_s.values().sum();
        let own_over_mesh = own_s.filter(|_| mesh > 0.0).map(|own| own / mesh);
        Self { own_s, mesh_s, own_over_mesh }
    }
}

/// What one load point gave.
#[derive(Clone, Debug, Serialize)]
pub struct PointReport {
    /// Streams of a closed loop.
    pub concurrency: Option<u32>,
    /// Offered requests a second of an open loop.
    pub rate: Option<f64>,
    /// Why it ended.
    pub ended_by: EndedBy,
    /// From the start until the last request was over.
    pub elapsed_s: f64,
    /// Requests that were due.
    pub requests: u64,
    /// Complete answers.
    pub completed: u64,
    /// Failures by code.
    pub errors: BTreeMap<&'static str, Errors>,
    /// Prompt tokens of complete answers.
    pub input_tokens: u64,
    /// Tokens of complete answers.
    pub output_tokens: u64,
    /// Tokens received of answers that failed later.
    pub output_tokens_failed: u64,
    /// Complete answers a second.
    pub requests_per_s: f64,
    /// Their tokens a second.
    pub output_tokens_per_s: f64,
    /// Their prompts' tokens a second.
    pub input_tokens_per_s: f64,
    /// Latencies.
    pub latency_ms: Latencies,
    /// When bounds were given.
    pub goodput: Option<Goodput>,
    /// The mesh's own counters; absent when it could not be asked any more.
    pub mesh: Option<Counters>,
    /// Where the nodes' time went; absent when the mesh could not be asked any more.
    pub profile: Option<Profile>,
    /// Processor time.
    pub cpu: Cpu,
    /// Every request, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_request: Option<Vec<Value>>,
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl PointReport {
    /// Computes everything from what was kept.
    pub fn new(load: Load, ended_by: EndedBy, kept: Kept, slo: Slo, per_request: bool) -> Self {
        let Kept { mut records, gaps, errors, .. } = kept;
        records.sort_unstable_by_key(|record| record.index);
        let complete: Vec<&Record> = records.iter().filter(|r| r.failure.is_none()).collect();
        let elapsed_s = records.iter().map(|r| r.end).max().unwrap_or_default().as_secs_f64();
        let per_s = |count: u64| if elapsed_s > 0.0 { count as f64 / elapsed_s } else { 0.0 };
        let sum = |of: &[&Record], count: fn(&Record) -> u32| of.iter().map(|r| u64::from(count(r))).sum::<u64>();
        let failed: Vec<&Record> = records.iter().filter(|r| r.failure.is_some()).collect();
        let input_tokens = sum(&complete, |r| r.prompt_tokens);
        let output_tokens = sum(&complete, |r| r.tokens);
        let summary =
            |of: fn(&Record) -> Option<Duration>| Summary::of(complete.iter().filter_map(|r| of(r)).map(ms).collect());
        let latency_ms = Latencies {
            ttft: summary(Record::ttft),
            tpot: summary(Record::tpot),
            inter_token: gaps.summary(),
            e2e: summary(|r| Some(r.e2e())),
            send_lag: summary(Record::lag),
        };
        let good = complete.iter().filter(|r| slo.kept_by(r)).count() as u64;
        let share = good as f64 / records.len().max(1) as f64;
        let goodput = Goodput { requests: good, requests_per_s: per_s(good), share };
        let (concurrency, rate) = match load {
            Load::Closed(streams) => (Some(streams), None),
            Load::Open(rate) => (None, Some(rate)),
        };
        Self {
            concurrency,
            rate,
            ended_by,
            elapsed_s,
            requests: records.len() as u64,
            completed: complete.len() as u64,
            errors,
            input_tokens,
            output_tokens,
            output_tokens_failed: sum(&failed, |r| r.tokens),
            requests_per_s: per_s(complete.len() as u64),
            output_tokens_per_s: per_s(output_tokens),
            input_tokens_per_s: per_s(input_tokens),
            latency_ms,
            goodput: slo.is_set().then_some(goodput),
            mesh: None,
            profile: None,
            cpu: Cpu::default(),
            per_request: per_request.then(|| records.iter().map(record_json).collect()),
        }
    }

    /// The number on the x axis.
    pub fn load(&self) -> f64 {
        self.rate.or(self.concurrency.map(f64::from)).unwrap_or_default()
    }
}

fn record_json(r: &Record) -> Value {
    json!({
        "index": r.index, "due_ms": ms(r.intended), "sent_ms": r.sent.map(ms), "first_token_ms": r.first.map(ms),
        "last_token_ms": r.last.map(ms), "end_ms": ms(r.end), "input_tokens": r.prompt_tokens,
        "output_tokens": r.tokens, "error": r.failure.map(super::record::Failure::code),
    })
}

/// The whole run.
#[derive(Debug)]
pub struct Report {
    /// What was asked for.
    pub args: BenchArgs,
    /// Where the load came from.
    pub machine: Machine,
    /// The mesh before the first load point.
    pub status: StatusResponse,
    /// Seconds since 1970 at the start.
    pub started_unix_s: u64,
    /// Warm-up requests that failed, by code.
    pub warmup_errors: BTreeMap<&'static str, Errors>,
    /// Conversations of the dataset that were not used.
    pub skipped: Option<Skipped>,
    /// Bytes of a token, where prompts are texts.
    pub bytes_per_token: Option<f64>,
    /// Ctrl-C ended it early.
    pub interrupted: bool,
    /// Load points in the order in which they were run.
    pub points: Vec<PointReport>,
}

impl Report {
    /// Bounds of a good answer.
    pub fn slo(args: &BenchArgs) -> Slo {
        Slo { ttft_ms: args.slo_ttft_ms, tpot_ms: args.slo_tpot_ms }
    }

    /// All of it.
    pub fn to_json(&self) -> Value {
        let command: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
        let status = crate::status::to_json(&self.status);
        json!({
            "format": FORMAT,
            "version": env!("CARGO_PKG_VERSION"),
            "command": command,
            "started_unix_s": self.started_unix_s,
            "machine": self.machine,
            "model": status["model"],
            "nodes": status["nodes"],
            "load": self.load_json(),
            "warmup_errors": self.warmup_errors,
            "interrupted": self.interrupted,
            "points": self.points,
        })
    }

    /// The load's settings as resolved from flags and defaults.
    fn load_json(&self) -> Value {
        let args = &self.args;
        let output = match (args.output_tokens, &args.dataset) {
            (Some(output), _) => output.to_string(),
            (None, Some(_)) => "dataset".to_owned(),
            (None, None) => OUTPUT_DEFAULT.to_string(),
        };
        let bounds = args.loads().first().map(|load| args.bounds(*load));
        json!({
            "input_tokens": args.dataset.is_none().then(|| args.input_tokens.to_string()),
            "output_tokens": output,
            "dataset": args.dataset,
            "dataset_skipped": self.skipped,
            "dataset_bytes_per_token": self.bytes_per_token,
            "seed": args.seed,
            "ignore_eos": !args.stop_at_eos,
            "warmup": args.warmup,
            "requests_max": bounds.map(|b| b.requests),
            "duration_max_s": bounds.map(|b| b.duration.as_secs_f64()),
            "timeout_s": args.timeout.as_secs_f64(),
            "in_flight_max": args.in_flight_max,
            "slo": Self::slo(args),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::Failure;
    use crate::bench::stats::Histogram;
    use mesh_proto::Code;

    /// Due at `due`, first token 10 ms later, then a token each 5 ms.
    fn record(index: u64, due: u64, tokens: u32) -> Record {
        let at = |ms| Duration::from_millis(due + ms);
        let last = 10 + 5 * u64::from(tokens - 1);
        Record {
            index,
            intended: at(0),
            sent: Some(at(1)),
            first: Some(at(10)),
            last: Some(at(last)),
            end: at(last + 1),
            prompt_tokens: 7,
            tokens,
            failure: None,
        }
    }

    fn point(records: Vec<Record>, slo: Slo) -> PointReport {
        let kept = Kept { records, traces: Vec::new(), gaps: Histogram::default(), errors: BTreeMap::new() };
        PointReport::new(Load::Open(2.0), EndedBy::Requests, kept, slo, true)
    }

    #[test]
    fn throughput_and_latency_are_of_complete_answers_and_failures_stay_in_the_count() {
        let failed = Record { failure: Some(Failure::Mesh(Code::NodeLost)), ..record(1, 0, 3) };
        let report = point(vec![record(2, 969, 5), failed, record(0, 0, 5)], Slo::default());
        assert_eq!((report.requests, report.completed), (3, 2));
        assert_eq!((report.input_tokens, report.output_tokens, report.output_tokens_failed), (14, 10, 3));
        // The last one ends at 969 + 30 + 1 ms.
        assert!((report.elapsed_s - 1.0).abs() < 1e-9 && (report.output_tokens_per_s - 10.0).abs() < 1e-9);
        let latency = report.latency_ms;
        assert_eq!(latency.ttft.map(|s| (s.count, s.p50)), Some((2, 10.0)));
        assert_eq!(latency.tpot.map(|s| s.p99), Some(5.0));
        assert_eq!(latency.e2e.map(|s| s.max.round()), Some(31.0));
        assert_eq!(latency.send_lag.map(|s| s.p50.round()), Some(1.0));
        assert_eq!(report.goodput, None);
        let rows = report.per_request.unwrap();
        assert_eq!(rows.iter().map(|r| r["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(rows[1]["error"], "NODE_LOST");
    }

    #[test]
    fn goodput_is_the_share_of_all_requests_that_kept_both_bounds() {
        let slow = Record { first: Some(Duration::from_millis(60)), ..record(1, 0, 20) };
        let failed = Record { failure: Some(Failure::StreamCut), ..record(2, 0, 5) };
        let single = record(3, 0, 1);
        let records = vec![record(0, 0, 5), slow, failed, single];
        let good = |ttft_ms, tpot_ms| point(records.clone(), Slo { ttft_ms, tpot_ms }).goodput.unwrap();
        assert_eq!(good(Some(20.0), None).requests, 2);
        assert_eq!(good(Some(20.0), None).share, 0.5);
        assert_eq!(good(None, Some(6.0)).requests, 3, "the failed one never counts");
        assert_eq!(good(Some(20.0), Some(1.0)).requests, 1, "a single token has no further ones");
    }

    #[test]
    fn a_point_without_a_request_has_no_numbers_instead_of_wrong_ones() {
        let report = point(vec![], Slo { ttft_ms: Some(1.0), tpot_ms: None });
        assert_eq!((report.requests, report.latency_ms.ttft, report.requests_per_s), (0, None, 0.0));
        assert_eq!(report.goodput.unwrap().share, 0.0);
    }

    #[test]
    fn processor_time_is_compared_only_where_both_were_read() {
        let reading = |router: f64, expert: f64| [("router".into(), router), ("expert-0".into(), expert)].into();
        let cpu = Cpu::between([Some(1.0), Some(1.5)], &reading(1.0, 1.0), &reading(2.0, 10.0));
        assert_eq!((cpu.own_s, cpu.own_over_mesh, cpu.mesh_s["expert-0"]), (Some(0.5), Some(0.05), 9.0));
        let cpu = Cpu::between([Some(1.0), Some(1.5)], &BTreeMap::new(), &reading(2.0, 10.0));
        assert_eq!((cpu.own_over_mesh, cpu.mesh_s.len()), (None, 0));
    }
}
