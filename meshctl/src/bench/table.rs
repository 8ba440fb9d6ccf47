//! The results for people.

use std::fmt::Write;

use super::args::Load;
use super::drive::EndedBy;
use super::profile::Profile;
use super::report::{PointReport, Report};
use super::stats::Summary;

/// Writing to a String cannot fail.
macro_rules! line {
    ($text:expr, $($words:tt)*) => {{ let _ = writeln!($text, $($words)*); }};
}

/// One block for each load point, and for a sweep one line for each at the end.
pub fn to_text(report: &Report) -> String {
    let mut text = String::new();
    if let Some(model) = &report.status.model {
        let place = report.machine.cpu.as_deref().unwrap_or("unknown processor");
        let processors = report.machine.processors.unwrap_or(0);
        line!(text, "model {} ({}) on {place}, {processors} processors", model.name, model.dtype);
    }
    for (code, errors) in &report.warmup_errors {
        line!(text, "warm-up: {} x {code}: {}", errors.count, errors.first);
    }
    for point in &report.points {
        text.push('\n');
        block(&mut text, point);
        if report.args.profile {
            profile(&mut text, point);
        }
    }
    if report.points.len() > 1 {
        text.push('\n');
        sweep(&mut text, report);
    }
    text
}

fn title(point: &PointReport) -> String {
    match (point.rate, point.concurrency) {
        (Some(rate), _) => format!("open loop, {rate} requests/s offered"),
        (None, Some(1)) => "closed loop, 1 stream".to_owned(),
        (None, streams) => format!("closed loop, {} streams", streams.unwrap_or(0)),
    }
}

fn block(text: &mut String, point: &PointReport) {
    let ended = match point.ended_by {
        EndedBy::Requests => "",
        EndedBy::Duration => ", ended by --duration",
        EndedBy::Interrupt => ", interrupted",
    };
    let PointReport { completed, requests, elapsed_s, .. } = point;
    line!(text, "{}: {completed} of {requests} requests complete in {elapsed_s:.2} s{ended}", title(point));
    line!(
        text,
        "  throughput   {:.2} requests/s, {:.1} output tokens/s, {:.1} input tokens/s",
        point.requests_per_s,
        point.output_tokens_per_s,
        point.input_tokens_per_s
    );
    line!(text, "  {:<12} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9}", "ms", "mean", "p50", "p90", "p99", "max", "count");
    let latency = &point.latency_ms;
    let rows = [
        ("TTFT", latency.ttft),
        ("TPOT", latency.tpot),
        ("inter-token", latency.inter_token),
        ("end-to-end", latency.e2e),
        ("send lag", latency.send_lag),
    ];
    for (name, summary) in rows {
        row(text, name, summary);
    }
    if let Some(good) = &point.goodput {
        line!(text, "  goodput      {:.2} requests/s, {:.1} % of all", good.requests_per_s, good.share * 100.0);
    }
    for (code, errors) in &point.errors {
        line!(text, "  errors       {} x {code}: {}", errors.count, errors.first);
    }
    mesh(text, point);
    cpu(text, point);
}

fn row(text: &mut String, name: &str, summary: Option<Summary>) {
    match summary {
        None => line!(text, "  {name:<12} {:>10}", "-"),
        Some(Summary { count, mean, p50, p90, p99, max }) => {
            line!(text, "  {name:<12} {mean:>10.2} {p50:>10.2} {p90:>10.2} {p99:>10.2} {max:>10.2} {count:>9}");
        }
    }
}

fn mesh(text: &mut String, point: &PointReport) {
    let Some(counters) = &point.mesh else {
        line!(text, "  mesh         could not be asked after the load");
        return;
    };
    let lag = if counters.settled { "" } else { " (not every node has reported since)" };
    line!(text, "  mesh         {} requests at the router{lag}", counters.requests);
    for (role, c) in &counters.roles {
        let mut words = format!("{} {role}: ", c.nodes);
        let _ = match role.as_str() {
            "attention" => write!(
                words,
                "{} steps, {} tokens, {} B dispatched, {} B combined",
                c.steps, c.tokens, c.dispatch_bytes, c.combine_bytes
            ),
            _ => write!(words, "{} rows, {} pairs, {} frames", c.rows, c.pairs, c.frames_received),
        };
        for (reason, count) in &c.refused {
            let _ = write!(words, ", {count} refused ({reason})");
        }
        line!(text, "               {words}");
    }
}

fn profile(text: &mut String, point: &PointReport) {
    match point.profile.as_ref().map(Profile::to_text).filter(|tables| !tables.is_empty()) {
        Some(tables) => text.push_str(&tables),
        None => line!(text, "  profile      no node told where its time went"),
    }
}

fn cpu(text: &mut String, point: &PointReport) {
    let own = point.cpu.own_s.map_or_else(|| "unknown".to_owned(), |s| format!("{s:.2} s"));
    if point.cpu.mesh_s.is_empty() {
        line!(text, "  processor    load tester {own}; no process of the mesh lives on this machine");
        return;
    }
    let each: Vec<String> = point.cpu.mesh_s.iter().map(|(name, s)| format!("{name} {s:.2} s")).collect();
    let ratio = point.cpu.own_over_mesh.map_or_else(|| "-".to_owned(), |r| format!("{:.2} %", r * 100.0));
    line!(text, "  processor    load tester {own} = {ratio} of the mesh's: {}", each.join(", "));
}

fn sweep(text: &mut String, report: &Report) {
    let open = matches!(report.args.loads().first(), Some(Load::Open(_)));
    let name = if open { "rate" } else { "streams" };
    line!(
        text,
        "{name:>9} {:>9} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>7}",
        "req/s",
        "tokens/s",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
        "TPOT p99",
        "E2E p50",
        "E2E p99",
        "errors"
    );
    for point in &report.points {
        let latency = &point.latency_ms;
        let mut words = format!("{:>9} {:>9.2} {:>9.1}", point.load(), point.requests_per_s, point.output_tokens_per_s);
        for summary in [latency.ttft, latency.tpot, latency.e2e] {
            let _ = match summary {
                Some(s) => write!(words, " {:>10.2} {:>10.2}", s.p50, s.p99),
                None => write!(words, " {:>10} {:>10}", "-", "-"),
            };
        }
        let errors: u64 = point.errors.values().map(|e| e.count).sum();
        line!(text, "{words} {errors:>7}");
    }
}
