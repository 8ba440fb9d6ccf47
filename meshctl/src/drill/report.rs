//! The results of a drill, for programs and for people.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use mesh_proto::v1::{ModelInfo, Moved};
use serde::Serialize;
use serde_json::{Value, json};

use super::compare::Comparison;
use super::conduct::Event;
use super::load::{Answer, Run};
use super::measure::{self, Throughput};
use super::plan::Plan;
use super::verdict::{self, Violation};
use super::watch::{self, Usage, Watched};
use crate::bench::stats::percentile;
use crate::cli::spelled;

/// The JSON's form; raised when a field changes its meaning.
const FORMAT: &str = "meshctl-drill/1";
/// Different texts of one error code that are kept.
const TEXTS_MAX: usize = 8;

/// Errors of one code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Errors {
    /// How many.
    pub count: u64,
    /// What they said, the first few different ones.
    pub texts: Vec<String>,
}

/// Stalls over events, in milliseconds; each event counts with its longest one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Stalls {
    /// Events at which anybody waited for a token.
    pub count: u64,
    /// Half of them are at most this.
    pub p50_ms: f64,
    /// All but one of a hundred.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

/// An event and what clients saw of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EventLine {
    /// When, from the load's start.
    pub at_s: f64,
    /// What happened.
    pub what: &'static str,
    /// To whom.
    pub who: String,
    /// Its process then.
    pub pid: u32,
    /// The longest stall; `None` where nobody waited for a token.
    pub stall_ms: Option<f64>,
    /// The stream that had it.
    pub stall_stream: Option<u32>,
    /// The request that had it, by its number in the disturbed run.
    pub stall_sent_as: Option<u64>,
}

/// Everything that a drill found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Different requests: those of the undisturbed run.
    pub requests: u64,
    /// How long that took.
    pub undisturbed_s: f64,
    /// Requests of the disturbed run.
    pub sent: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// Those that were sent more than once, because they could not be served at first.
    pub retried: u64,
    /// How long the disturbed run took.
    pub elapsed_s: f64,
    /// Failures by code.
    pub errors: BTreeMap<&'static str, Errors>,
    /// Tokens beside those of the undisturbed run.
    pub comparison: Comparison,
    /// Over all events.
    pub stalls: Option<Stalls>,
    /// Output tokens a second.
    pub throughput: Throughput,
    /// What happened.
    pub events: Vec<EventLine>,
    /// What changes of the view had nodes load since the router's start, the first view not included.
    #[serde(serialize_with = "as_status")]
    pub moved: Option<Moved>,
    /// What processes used that ran for long enough to settle.
    pub processes: Vec<Usage>,
    /// Why not all phases were carried out.
    pub phases_ended_by: Option<String>,
    /// Whether the load was over before the phases were.
    pub load_ended_early: bool,
    /// What was expected and did not hold.
    pub violations: Vec<Violation>,
}

/// What the two runs left.
#[derive(Debug)]
pub struct Found {
    /// The undisturbed one.
    pub undisturbed: Run,
    /// The disturbed one.
    pub disturbed: Run,
    /// What happened in it.
    pub events: Vec<Event>,
    /// What was moved, if the router could be asked.
    pub moved: Option<Moved>,
    /// What each process used meanwhile.
    pub watched: Vec<Watched>,
    /// When the phases were over.
    pub phases_end: Duration,
    /// Why they ended early.
    pub phases_ended_by: Option<String>,
    /// Whether the load was over before they were.
    pub load_ended_early: bool,
}

impl Report {
    /// Computes everything from what the runs left.
    pub fn new(plan: &Plan, found: Found) -> Self {
        let Found { undisturbed, disturbed, events, moved, watched, phases_end, phases_ended_by, load_ended_early } =
            found;
        let times: Vec<Duration> = events.iter().map(|event| event.at).collect();
        let faults = plan.mesh.faults.is_some();
        // What comes after the last request was sent is streams that run out.
        let last_sent = disturbed.answers.iter().filter_map(|answer| answer.record.sent).max().unwrap_or_default();
        let end = phases_end.max(last_sent);
        let events = event_lines(&undisturbed, &disturbed, events, &times);
        let mut report = Self {
            requests: undisturbed.answers.len() as u64,
            undisturbed_s: undisturbed.elapsed.as_secs_f64(),
            sent: disturbed.answers.len() as u64,
            failed: disturbed.answers.iter().filter(|a| a.record.failure.is_some()).count() as u64,
            retried: disturbed.answers.iter().filter(|a| a.trace.attempts.len() > 1).count() as u64,
            elapsed_s: disturbed.elapsed.max(phases_end).as_secs_f64(),
            errors: errors(&disturbed.answers),
            comparison: Comparison::of(&undisturbed.answers, &disturbed.answers),
            stalls: stalls(&events),
            throughput: Throughput::of(&undisturbed, &disturbed.answers, &times, end, faults),
            events,
            moved,
            processes: watch::usages(&watched, Duration::from_secs_f64(plan.expect.settle_s)),
            phases_ended_by,
            load_ended_early,
            violations: Vec::new(),
        };
        report.violations = verdict::violations(&plan.expect, &report);
        report
    }

    /// All of it, with what was asked for.
    pub fn to_json(&self, plan: &Plan, model: &ModelInfo) -> Value {
        let (mesh, load) = (&plan.mesh, &plan.load);
        let command: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
        json!({
            "format": FORMAT,
            "version": env!("CARGO_PKG_VERSION"),
            "command": command,
            "about": plan.about,
            "model": { "name": model.name, "dtype": model.dtype, "digest": model.digest },
            "mesh": {
                "attention": mesh.attention, "experts": mesh.experts, "replicas": mesh.replicas,
                "transport": spelled(mesh.transport), "threads": mesh.threads, "faults": mesh.faults,
            },
            "load": {
                "streams": load.streams, "prompt_tokens": load.input.to_string(),
                "output_tokens": load.output.to_string(), "seed": load.seed, "sampled": load.sampled.share,
                "temperature": load.sampled.temperature, "timeout_s": load.timeout.as_secs_f64(), "retry": load.retry,
                "rate_share": load.rate_share,
            },
            "passed": self.violations.is_empty(),
            "found": self,
        })
    }

    /// For people.
    pub fn to_text(&self, plan: &Plan, model: &ModelInfo) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut text, plan, model);
        text
    }

    fn write(&self, text: &mut String, plan: &Plan, model: &ModelInfo) -> std::fmt::Result {
        let (mesh, load) = (&plan.mesh, &plan.load);
        if !plan.about.is_empty() {
            writeln!(text, "{}", plan.about)?;
        }
        writeln!(
            text,
            "{} ({}) on {} attention and {} expert nodes, replicas {}, transport {}; {} streams",
            model.name,
            model.dtype,
            mesh.attention,
            mesh.experts,
            mesh.replicas,
            spelled(mesh.transport),
            load.streams
        )?;
        writeln!(text, "  undisturbed  {} requests in {:.2} s", self.requests, self.undisturbed_s)?;
        let retried = if self.retried > 0 { format!(", {} sent again", self.retried) } else { String::new() };
        writeln!(
            text,
            "  disturbed    {} requests in {:.2} s, {} failed{retried}",
            self.sent, self.elapsed_s, self.failed
        )?;
        for (code, errors) in &self.errors {
            writeln!(text, "  errors       {} x {code}: {}", errors.count, errors.texts.join(" | "))?;
        }
        self.write_tokens(text)?;
        let t = &self.throughput;
        let rates = [t.undisturbed, t.before, t.during, t.after];
        let [undisturbed, before, during, after] = rates.map(|rate| number(rate, 1));
        writeln!(text, "  tokens/s     undisturbed {undisturbed}, before {before}, during {during}, after {after}")?;
        match &self.stalls {
            Some(Stalls { count, p50_ms, p99_ms, max_ms }) => {
                writeln!(text, "  stall ms     p50 {p50_ms:.1}, p99 {p99_ms:.1}, max {max_ms:.1} over {count} events")?
            }
            None => writeln!(text, "  stall ms     no stream waited for a token at an event")?,
        }
        self.write_events(text)?;
        if let Some(m) = &self.moved {
            let [all, most, bound] = [m.bytes, m.change_bytes_max, m.change_bytes_bound].map(|b| b as f64 / 1e6);
            writeln!(
                text,
                "  moved        {all:.1} MB in {} views, one {most:.1} MB at most (bound {bound:.1})",
                m.changes
            )?;
        }
        self.write_processes(text, plan.expect.settle_s)?;
        if self.violations.is_empty() {
            return writeln!(text, "passed");
        }
        writeln!(text, "FAILED")?;
        self.violations.iter().try_for_each(|v| writeln!(text, "  {}: {}", v.expectation, v.why))
    }

    fn write_tokens(&self, text: &mut String) -> std::fmt::Result {
        let c = &self.comparison;
        let same = if c.tokens_different == 0 {
            "all as undisturbed".to_owned()
        } else {
            format!("{} of {} answers DIFFER", c.tokens_different, c.requests_different)
        };
        writeln!(text, "  tokens       {} of {} answers compared, {same}", c.tokens, c.requests)?;
        for d in &c.differences {
            let id = |id: Option<u32>| id.map_or_else(|| "none".to_owned(), |id| id.to_string());
            writeln!(
                text,
                "               request {} (sent as {}): token {} is {}, undisturbed {}",
                d.request,
                d.sent_as,
                d.token,
                id(d.found),
                id(d.wanted)
            )?;
        }
        Ok(())
    }

    fn write_events(&self, text: &mut String) -> std::fmt::Result {
        if self.events.is_empty() {
            return Ok(());
        }
        writeln!(text, "  {:>8}  {:<16} {:<14} {:>8} {:>10}", "at s", "event", "who", "pid", "stall ms")?;
        for e in &self.events {
            let stall = number(e.stall_ms, 1);
            writeln!(text, "  {:>8.2}  {:<16} {:<14} {:>8} {stall:>10}", e.at_s, e.what, e.who, e.pid)?;
        }
        Ok(())
    }

    fn write_processes(&self, text: &mut String, settle_s: f64) -> std::fmt::Result {
        if self.processes.is_empty() {
            return Ok(());
        }
        let settled = format!("MB at {settle_s:.0} s");
        writeln!(
            text,
            "  {:<14} {:>8} {:>9} {settled:>12} {:>10} {:>28} {:>8}  handles",
            "process", "pid", "ran s", "in the end", "beside work", "growth"
        )?;
        for p in &self.processes {
            let mb = |bytes: f64| bytes / 1e6;
            writeln!(
                text,
                "  {:<14} {:>8} {:>9.0} {:>12.1} {:>10.1} {:>28} {:>6.1} %  {} to {}, at most {}",
                p.who,
                p.pid,
                p.watched_s,
                mb(p.resident_settled as f64),
                mb(p.resident_end as f64),
                format!(
                    "{:.2} to {:.2}, at most {:.2}",
                    mb(p.own_settled as f64),
                    mb(p.own_end as f64),
                    mb(p.own_most as f64)
                ),
                100.0 * p.growth(),
                p.handles_settled,
                p.handles_end,
                p.handles_most
            )?;
        }
        Ok(())
    }
}

fn as_status<S: serde::Serializer>(moved: &Option<Moved>, to: S) -> Result<S::Ok, S::Error> {
    moved.map(crate::status::moved_json).serialize(to)
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

fn event_lines(undisturbed: &Run, disturbed: &Run, events: Vec<Event>, times: &[Duration]) -> Vec<EventLine> {
    let stalls = measure::stalls(&undisturbed.answers, &disturbed.answers, times);
    let lines = events.into_iter().zip(stalls).map(|(event, stall)| EventLine {
        at_s: event.at.as_secs_f64(),
        what: event.what,
        who: event.who,
        pid: event.pid,
        stall_ms: stall.map(|stall| stall.length.as_secs_f64() * 1e3),
        stall_stream: stall.map(|stall| stall.stream),
        stall_sent_as: stall.map(|stall| stall.sent_as),
    });
    lines.collect()
}

fn stalls(events: &[EventLine]) -> Option<Stalls> {
    let mut lengths: Vec<f64> = events.iter().filter_map(|event| event.stall_ms).collect();
    lengths.sort_unstable_by(f64::total_cmp);
    let max_ms = *lengths.last()?;
    let at = |percent| percentile(&lengths, percent);
    Some(Stalls { count: lengths.len() as u64, p50_ms: at(50.0), p99_ms: at(99.0), max_ms })
}

fn errors(answers: &[Answer]) -> BTreeMap<&'static str, Errors> {
    let mut errors: BTreeMap<&'static str, Errors> = BTreeMap::new();
    for (answer, failure) in answers.iter().filter_map(|a| Some((a, a.record.failure?))) {
        let errors = errors.entry(failure.code()).or_default();
        errors.count += 1;
        if errors.texts.len() < TEXTS_MAX && !errors.texts.contains(&answer.trace.why) {
            errors.texts.push(answer.trace.why.clone());
        }
    }
    errors
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::record::Failure;
    use crate::drill::load::tests::answer;
    use crate::drill::plan::tests::with_load;
    use mesh_proto::Code;

    fn run(answers: Vec<Answer>) -> Run {
        Run { answers, elapsed: Duration::from_secs(10) }
    }

    /// Of a drill in which nothing happened.
    pub(in crate::drill) fn report() -> Report {
        let runs = (run(vec![answer(0, &[&[1, 2]])]), run(vec![answer(0, &[&[1, 2]])]));
        Report::new(&with_load("").unwrap(), found(runs, Vec::new()))
    }

    fn found((undisturbed, disturbed): (Run, Run), events: Vec<Event>) -> Found {
        let phases_end = Duration::from_secs(10);
        Found {
            undisturbed,
            disturbed,
            events,
            moved: None,
            watched: Vec::new(),
            phases_end,
            phases_ended_by: None,
            load_ended_early: false,
        }
    }

    #[test]
    fn failures_keep_their_texts_and_events_their_stalls() {
        let mut failed = answer(1, &[&[1]]);
        failed.record.failure = Some(Failure::Mesh(Code::NodeLost));
        failed.trace.why = "expert-1 is gone".to_owned();
        failed.record.end = Duration::from_secs(2);
        let mut other = answer(2, &[&[1], &[1, 2]]);
        other.trace.arrivals = [100, 200, 5000].map(Duration::from_millis).to_vec();
        let events = vec![Event {
            at: Duration::from_secs(3),
            what: "kill",
            who: "expert-1".to_owned(),
            pid: 77,
            note: String::new(),
        }];
        let runs = (run(vec![answer(0, &[&[1, 2]])]), run(vec![answer(0, &[&[1, 2]]), failed.clone(), failed, other]));
        let plan = with_load("").unwrap();
        let report = Report::new(&plan, found(runs, events));
        assert_eq!((report.sent, report.failed, report.retried), (4, 2, 1));
        assert_eq!(report.errors["NODE_LOST"], Errors { count: 2, texts: vec!["expert-1 is gone".to_owned()] });
        assert_eq!(report.events[0].stall_ms, Some(4700.0));
        assert_eq!(report.stalls.unwrap(), Stalls { count: 1, p50_ms: 4700.0, p99_ms: 4700.0, max_ms: 4700.0 });
        assert_eq!(report.violations.len(), 1, "{:?}", report.violations);

        let model = ModelInfo::default();
        let text = report.to_text(&plan, &model);
        for words in ["2 failed, 1 sent again", "2 x NODE_LOST: expert-1 is gone", "all as undisturbed", "kill", "77"] {
            assert!(text.contains(words), "`{words}` in:\n{text}");
        }
        assert!(text.contains("FAILED\n  failed_requests: 2 failed, at most 0 may"), "{text}");
        let json = report.to_json(&plan, &model);
        assert_eq!((&json["passed"], &json["found"]["events"][0]["who"]), (&false.into(), &"expert-1".into()));
        assert_eq!(json["found"]["violations"][0]["expectation"], "failed_requests");
    }

    #[test]
    fn a_difference_is_told_with_its_place() {
        let runs = (run(vec![answer(0, &[&[1, 2]])]), run(vec![answer(0, &[&[1, 9]])]));
        let plan = with_load("").unwrap();
        let text = Report::new(&plan, found(runs, Vec::new())).to_text(&plan, &ModelInfo::default());
        assert!(text.contains("request 0 (sent as 0): token 1 is 9, undisturbed 2"), "{text}");
        assert!(text.contains("tokens_identical: 1 of 2 tokens differ"), "{text}");
    }

    #[test]
    fn a_quiet_drill_passes_and_says_that_nobody_stalled() {
        let text = report().to_text(&with_load("").unwrap(), &ModelInfo::default());
        assert!(text.ends_with("passed\n") && text.contains("no stream waited"), "{text}");
    }
}
