//! What a drill is: the mesh, the load, the phases and what is expected, read from TOML and checked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use serde::Deserialize;

use super::error::DrillError;
use super::span::Span;
use super::step::{self, RawStep, Step};
use crate::bench::args::STREAMS_MAX;
use crate::bench::lengths::{LENGTH_MAX, Length};
use crate::bench::workload::Sampled;
use crate::cli::{Dtype, Transport};

/// Largest plan file.
pub const PLAN_BYTES_MAX: u64 = 1 << 20;
/// Most requests of the undisturbed run.
pub const REQUESTS_MAX: u64 = 400_000;
/// Most output tokens of a run: each is kept with its time, 20 to 40 bytes, so that all take 1.6 GB at most.
pub const TOKENS_MAX: u64 = 40_000_000;
/// How long the undisturbed run, a request and all waits of the phases may be asked to take.
pub const DURATION_MAX: Duration = Duration::from_secs(4 * 3600);
/// Most nodes of a kind.
pub const NODES_MAX: u16 = 256;
/// Most compute threads of a node.
const THREADS_MAX: u16 = 1024;
/// Highest rate of the disturbed run, as a share of what the mesh can do.
const RATE_SHARE_MAX: f64 = 10.0;
/// Longest fault specification that is handed on.
const FAULTS_BYTES_MAX: usize = 4096;

/// A drill.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What it shows, for the report's title.
    pub about: String,
    /// The mesh that is disturbed.
    pub mesh: MeshPlan,
    /// The load on it.
    pub load: LoadPlan,
    /// The disturbances in their order.
    pub steps: Vec<Step>,
    /// What must hold.
    pub expect: Expect,
}

/// The mesh of a drill.
#[derive(Clone, Debug, PartialEq)]
pub struct MeshPlan {
    /// A checkpoint; the shipped tiny model when absent.
    pub model: Option<PathBuf>,
    /// The data plane.
    pub transport: Transport,
    /// Attention nodes at the start.
    pub attention: u16,
    /// Expert nodes at the start.
    pub experts: u16,
    /// Expert nodes that hold each expert.
    pub replicas: u16,
    /// The compute dtype; the services' own when absent.
    pub dtype: Option<Dtype>,
    /// Compute threads of each node; all processors when absent.
    pub threads: Option<u16>,
    /// Where packed weights are kept.
    pub cache_dir: Option<PathBuf>,
    /// Faults of the data plane, handed to attention nodes in the disturbed run.
    pub faults: Option<String>,
}

/// Where the undisturbed run ends, and so how many requests there are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// Requests of each stream.
    PerStream(u64),
    /// As many as are sent in this time.
    Within(Duration),
}

/// The load of a drill.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadPlan {
    /// Streams, each with one request at a time.
    pub streams: u32,
    /// How many requests there are.
    pub amount: Amount,
    /// Requests of the disturbed run, as a share of the rate at which the undisturbed one was answered; absent: each stream
    /// sends one after the other.
    pub rate_share: Option<f64>,
    /// Lengths of the prompts.
    pub input: Length,
    /// Lengths of the answers.
    pub output: Length,
    /// Makes prompts, lengths and the choice of nodes repeatable.
    pub seed: u64,
    /// Which requests sample.
    pub sampled: Sampled,
    /// How long each request may take.
    pub timeout: Duration,
    /// Whether requests that could not be served are sent again.
    pub retry: bool,
}

/// What must hold. Absent: not looked at.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    /// Requests that may fail.
    pub failed_requests: u64,
    /// Every token is that of the undisturbed run.
    pub tokens_identical: bool,
    /// The longest stall that all but one in a hundred events stay under, ms.
    pub stall_p99_ms: Option<f64>,
    /// The longest stall of any event, ms.
    pub stall_max_ms: Option<f64>,
    /// Throughput while disturbed, as a share of that before.
    pub throughput_during_min: Option<f64>,
    /// The disturbed run is over in this time, s.
    pub within_s: Option<f64>,
    /// How much the memory of any process may grow once it has settled, as a share.
    pub memory_growth_max: Option<f64>,
    /// How many more open files any process may have than when it had settled.
    pub handles_growth_max: Option<f64>,
    /// How long a process takes to settle, s.
    pub settle_s: f64,
}

impl Default for Expect {
    fn default() -> Self {
        Self {
            failed_requests: 0,
            tokens_identical: true,
            stall_p99_ms: None,
            stall_max_ms: None,
            throughput_during_min: None,
            within_s: None,
            memory_growth_max: None,
            handles_growth_max: None,
            settle_s: 300.0,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlan {
    #[serde(default)]
    about: String,
    #[serde(default)]
    mesh: RawMesh,
    load: RawLoad,
    #[serde(default)]
    phase: Vec<RawStep>,
    #[serde(default)]
    expect: Expect,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawMesh {
    model: Option<PathBuf>,
    transport: String,
    attention: u16,
    experts: u16,
    replicas: u16,
    dtype: Option<String>,
    threads: Option<u16>,
    cache_dir: Option<PathBuf>,
    faults: Option<String>,
}

impl Default for RawMesh {
    fn default() -> Self {
        Self {
            model: None,
            transport: "auto".to_owned(),
            attention: 1,
            experts: 1,
            replicas: 1,
            dtype: None,
            threads: None,
            cache_dir: None,
            faults: None,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLoad {
    streams: u32,
    requests: Option<u64>,
    duration: Option<f64>,
    rate_share: Option<f64>,
    prompt_tokens: Span,
    output_tokens: Span,
    #[serde(default)]
    seed: u64,
    #[serde(default = "half")]
    sampled: f64,
    #[serde(default = "warm")]
    temperature: f32,
    #[serde(default = "two_minutes")]
    timeout: f64,
    #[serde(default)]
    retry: bool,
}

fn half() -> f64 {
    0.5
}

fn warm() -> f32 {
    0.8
}

fn two_minutes() -> f64 {
    120.0
}

/// What is wrong with a key; the plan's path is added where it is known.
#[derive(Debug, PartialEq)]
pub(super) struct Wrong {
    pub key: String,
    pub why: String,
}

pub(super) fn wrong(key: impl Into<String>, why: impl Into<String>) -> Wrong {
    Wrong { key: key.into(), why: why.into() }
}

impl Plan {
    /// Reads a plan; relative paths in it are relative to its folder.
    ///
    /// # Errors
    /// [`DrillError::NoPlan`] and [`DrillError::BadKey`].
    pub fn read(path: &Path) -> Result<Self, DrillError> {
        let no_plan = |why: String| DrillError::NoPlan { path: path.to_owned(), why };
        let bytes = std::fs::metadata(path).map_err(|e| no_plan(e.to_string()))?.len();
        if bytes > PLAN_BYTES_MAX {
            return Err(no_plan(format!("{bytes} bytes; a plan has at most {PLAN_BYTES_MAX}")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| no_plan(e.to_string()))?;
        let raw: RawPlan = toml::from_str(&text).map_err(|e| no_plan(e.to_string().trim_end().to_owned()))?;
        let bad_key = |Wrong { key, why }| DrillError::BadKey { path: path.to_owned(), key, why };
        Self::of(raw, path.parent().unwrap_or(Path::new(""))).map_err(bad_key)
    }

    fn of(raw: RawPlan, folder: &Path) -> Result<Self, Wrong> {
        raw.expect.check()?;
        Ok(Self {
            about: raw.about,
            mesh: MeshPlan::of(raw.mesh, folder)?,
            load: LoadPlan::of(raw.load)?,
            steps: step::read(raw.phase)?,
            expect: raw.expect,
        })
    }
}

/// A word that a flag of the same name takes.
fn word<V: ValueEnum>(key: &str, found: &str) -> Result<V, Wrong> {
    V::from_str(found, false).map_err(|_| {
        let possible = V::value_variants().iter().filter_map(ValueEnum::to_possible_value);
        let possible: Vec<String> = possible.map(|v| v.get_name().to_owned()).collect();
        wrong(key, format!("`{found}` is none of {}", possible.join(", ")))
    })
}

fn within(key: &str, found: u64, max: u64) -> Result<(), Wrong> {
    if (1..=max).contains(&found) { Ok(()) } else { Err(wrong(key, format!("{found}; 1 to {max} are possible"))) }
}

impl MeshPlan {
    fn of(raw: RawMesh, folder: &Path) -> Result<Self, Wrong> {
        let counts = [("attention", raw.attention), ("experts", raw.experts), ("replicas", raw.replicas)];
        for (key, count) in counts {
            within(&format!("mesh.{key}"), count.into(), NODES_MAX.into())?;
        }
        if let Some(threads) = raw.threads {
            within("mesh.threads", threads.into(), THREADS_MAX.into())?;
        }
        let transport = word("mesh.transport", &raw.transport)?;
        if transport == Transport::Local {
            return Err(wrong("mesh.transport", "`local` is one process, of which no node can be killed alone"));
        }
        if raw.faults.as_ref().is_some_and(|faults| faults.len() > FAULTS_BYTES_MAX) {
            return Err(wrong("mesh.faults", format!("more than {FAULTS_BYTES_MAX} bytes")));
        }
        Ok(Self {
            model: raw.model.map(|dir| folder.join(dir)),
            transport,
            attention: raw.attention,
            experts: raw.experts,
            replicas: raw.replicas,
            dtype: raw.dtype.map(|dtype| word("mesh.dtype", &dtype)).transpose()?,
            threads: raw.threads,
            cache_dir: raw.cache_dir.map(|dir| folder.join(dir)),
            faults: raw.faults,
        })
    }
}

/// A number of seconds above 0.
fn seconds(key: &str, found: f64) -> Result<Duration, Wrong> {
    match Duration::try_from_secs_f64(found) {
        Ok(duration) if !duration.is_zero() && duration <= DURATION_MAX => Ok(duration),
        _ => Err(wrong(key, format!("{found} s; more than 0 and at most {} are possible", DURATION_MAX.as_secs()))),
    }
}

fn length(key: &str, span: Span) -> Result<Length, Wrong> {
    let whole = |x: f64| x.fract() == 0.0 && (1.0..=f64::from(LENGTH_MAX)).contains(&x);
    let Span { lo, hi } = span;
    if !whole(lo) || !whole(hi) {
        return Err(wrong(key, format!("{span} is no number of tokens (1 to {LENGTH_MAX}), nor a range of them")));
    }
    // Checked to be whole and in range above.
    let (lo, hi) = (lo as u32, hi as u32);
    Ok(if lo == hi { Length::Fixed(lo) } else { Length::Uniform { lo, hi } })
}

impl LoadPlan {
    fn of(raw: RawLoad) -> Result<Self, Wrong> {
        within("load.streams", raw.streams.into(), STREAMS_MAX as u64)?;
        let output = length("load.output_tokens", raw.output_tokens)?;
        let amount = match (raw.requests, raw.duration) {
            (Some(requests), None) => {
                within("load.requests", requests, REQUESTS_MAX)?;
                Amount::PerStream(requests)
            }
            (None, Some(duration)) => Amount::Within(seconds("load.duration", duration)?),
            _ => return Err(wrong("load", "give one of `requests` (of each stream) and `duration` (seconds)")),
        };
        if !(0.0..=1.0).contains(&raw.sampled) {
            return Err(wrong("load.sampled", format!("{} is no share of the requests (0 to 1)", raw.sampled)));
        }
        if !(raw.temperature.is_finite() && raw.temperature > 0.0) {
            return Err(wrong("load.temperature", format!("{} is not above 0", raw.temperature)));
        }
        if let Some(share) = raw.rate_share.filter(|share| !(*share > 0.0 && *share <= RATE_SHARE_MAX)) {
            return Err(wrong(
                "load.rate_share",
                format!("{share}; more than 0 and at most {RATE_SHARE_MAX} are possible"),
            ));
        }
        let load = Self {
            streams: raw.streams,
            amount,
            rate_share: raw.rate_share,
            input: length("load.prompt_tokens", raw.prompt_tokens)?,
            output,
            seed: raw.seed,
            sampled: Sampled { share: raw.sampled, temperature: raw.temperature },
            timeout: seconds("load.timeout", raw.timeout)?,
            retry: raw.retry,
        };
        if let Amount::PerStream(each) = amount {
            let (requests, sent_max) = (each.saturating_mul(load.streams.into()), load.sent_max());
            if requests > sent_max {
                let why = format!("{requests} requests of all streams; at most {sent_max} of this length are possible");
                return Err(wrong("load.requests", why));
            }
        }
        Ok(load)
    }

    /// Requests of a run at most: what is kept of them is bounded.
    pub fn sent_max(&self) -> u64 {
        (TOKENS_MAX / u64::from(self.output.longest())).clamp(1, REQUESTS_MAX)
    }
}

impl Expect {
    fn check(&self) -> Result<(), Wrong> {
        let numbers = [
            ("stall_p99_ms", self.stall_p99_ms),
            ("stall_max_ms", self.stall_max_ms),
            ("throughput_during_min", self.throughput_during_min),
            ("within_s", self.within_s),
            ("memory_growth_max", self.memory_growth_max),
            ("handles_growth_max", self.handles_growth_max),
            ("settle_s", Some(self.settle_s)),
        ];
        let bad = |x: f64| Duration::try_from_secs_f64(x).is_err();
        match numbers.into_iter().find_map(|(key, number)| number.filter(|x| bad(*x)).map(|x| (key, x))) {
            Some((key, x)) => Err(wrong(format!("expect.{key}"), format!("{x} is not a number of 0 or more"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The load of a plan that is about something else.
    pub(in crate::drill) const LOAD: &str =
        "[load]\nstreams = 2\nrequests = 3\nprompt_tokens = [4, 9]\noutput_tokens = 8\n";

    /// Reads a plan from text, as a file in the current folder.
    pub(in crate::drill) fn parse(text: &str) -> Result<Plan, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plan.toml");
        std::fs::write(&path, text).unwrap();
        Plan::read(&path).map_err(|e| e.to_string().replace(&format!("{}: ", path.display()), ""))
    }

    /// A plan with a load and what is given.
    pub(in crate::drill) fn with_load(text: &str) -> Result<Plan, String> {
        parse(&format!("{LOAD}{text}"))
    }

    #[test]
    fn a_plan_needs_a_load_and_has_defaults_for_the_rest() {
        let plan = with_load("").unwrap();
        assert_eq!((plan.mesh.attention, plan.mesh.experts, plan.mesh.replicas), (1, 1, 1));
        assert_eq!((plan.mesh.model, plan.mesh.transport, plan.steps.len()), (None, Transport::Auto, 0));
        assert_eq!((plan.load.input, plan.load.output), (Length::Uniform { lo: 4, hi: 9 }, Length::Fixed(8)));
        assert_eq!((plan.load.amount, plan.load.retry), (Amount::PerStream(3), false));
        assert_eq!(plan.load.sampled, Sampled { share: 0.5, temperature: 0.8 });
        assert_eq!(plan.expect, Expect::default());
        assert!(plan.expect.tokens_identical && plan.expect.failed_requests == 0);
        assert!(parse("").unwrap_err().contains("load"));
    }

    #[test]
    fn every_key_is_read() {
        let text = "about = 'x'\n[load]\nstreams = 1\nduration = 2.5\nprompt_tokens = 4\noutput_tokens = 8\nseed = 7\n\
            rate_share = 0.5\nsampled = 1\ntemperature = 1.5\ntimeout = 9\nretry = true\n\
            [mesh]\nmodel = 'm'\ntransport = 'ucx'\nattention = 3\nexperts = 4\nreplicas = 2\ndtype = 'f32'\nthreads = 1\n\
            cache_dir = '/c'\nfaults = 'delay'\n\
            [expect]\nfailed_requests = 2\ntokens_identical = false\nstall_p99_ms = 1\nstall_max_ms = 2.5\n\
            throughput_during_min = 0.5\nwithin_s = 60\nmemory_growth_max = 0.02\nhandles_growth_max = 0\nsettle_s = 9\n";
        let Plan { about, mesh, load, expect, .. } = parse(text).unwrap();
        assert_eq!((about.as_str(), mesh.transport, mesh.dtype), ("x", Transport::Ucx, Some(Dtype::F32)));
        assert_eq!((mesh.attention, mesh.experts, mesh.replicas, mesh.threads), (3, 4, 2, Some(1)));
        assert!(mesh.model.is_some_and(|m| m.is_absolute() && m.ends_with("m")), "beside the plan");
        assert_eq!((mesh.cache_dir, mesh.faults), (Some(PathBuf::from("/c")), Some("delay".to_owned())));
        assert_eq!((load.amount, load.seed), (Amount::Within(Duration::from_millis(2500)), 7));
        assert_eq!((load.timeout, load.retry, load.sampled.share), (Duration::from_secs(9), true, 1.0));
        assert_eq!((expect.failed_requests, expect.tokens_identical), (2, false));
        assert_eq!((expect.stall_max_ms, expect.within_s), (Some(2.5), Some(60.0)));
        assert_eq!(
            (expect.memory_growth_max, expect.handles_growth_max, expect.settle_s),
            (Some(0.02), Some(0.0), 9.0)
        );
        assert_eq!(load.rate_share, Some(0.5));
    }

    #[test]
    fn what_makes_no_sense_names_its_key() {
        let refused = |text: &str, words: &[&str]| {
            let error = with_load(text).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
        };
        refused("[mesh]\nexpert = 2", &["unknown field `expert`", "experts"]);
        refused("[mesh]\nexperts = 0", &["mesh.experts", "1 to 256"]);
        refused("[mesh]\ntransport = 'local'", &["mesh.transport", "one process"]);
        refused("[mesh]\ntransport = 'rdma'", &["mesh.transport", "`rdma`", "ucx"]);
        refused("[mesh]\ndtype = 'f64'", &["mesh.dtype", "bf16"]);
        refused("[expect]\nstall_max_ms = -1", &["expect.stall_max_ms"]);
        refused("[expect]\nfailed = 1", &["unknown field `failed`"]);
        let loads: [(&str, &[&str]); 7] = [
            ("streams = 1\nrequests = 1\nrate_share = 0", &["load.rate_share", "at most 10"]),
            ("streams = 0\nrequests = 1", &["load.streams", "1 to 4096"]),
            ("streams = 1", &["load", "`requests`", "`duration`"]),
            ("streams = 1\nrequests = 1\nduration = 1", &["load", "one of"]),
            ("streams = 4000\nrequests = 400000", &["load.requests", "at most 400000"]),
            ("streams = 1\nduration = 1e9", &["load.duration", "14400"]),
            ("streams = 1\nrequests = 1\nsampled = 2", &["load.sampled"]),
        ];
        for (text, words) in loads {
            let error = parse(&format!("[load]\nprompt_tokens = 4\noutput_tokens = 8\n{text}\n")).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
        }
        let lengths = parse("[load]\nstreams = 1\nrequests = 1\nprompt_tokens = 0.5\noutput_tokens = 8\n").unwrap_err();
        assert!(lengths.contains("load.prompt_tokens") && lengths.contains("0.5"), "{lengths}");
        let missing = Plan::read(Path::new("/nowhere/plan.toml")).unwrap_err();
        assert!(missing.to_string().contains("/nowhere/plan.toml"), "{missing}");
    }

    #[test]
    fn runs_are_bounded_by_what_is_kept_of_them() {
        let plan = parse("[load]\nstreams = 1\nduration = 1\nprompt_tokens = 4\noutput_tokens = 1000\n").unwrap();
        assert_eq!(plan.load.sent_max(), 40_000);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("large.toml");
        std::fs::write(&path, "#".repeat(PLAN_BYTES_MAX as usize + 1)).unwrap();
        assert!(Plan::read(&path).unwrap_err().to_string().contains("at most 1048576"));
    }

    #[test]
    fn the_shipped_plans_are_plans() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../drills");
        let plans = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let read: Vec<_> = plans.map(|path| Plan::read(&path).unwrap_or_else(|e| panic!("{e}"))).collect();
        assert!(read.len() >= 6, "{}", read.len());
        assert!(read.iter().all(|plan| !plan.about.is_empty()));
    }
}
