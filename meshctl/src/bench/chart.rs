//! The picture of a sweep: latency over offered load, and what was achieved of it.

use super::report::{PointReport, Report};
use super::stats::Summary;
use super::svg::{Panel, Series, picture};

const P50: &str = "#0a6ebd";
const P99: &str = "#d1495b";
const GUIDE: &str = "#777777";
const GOOD: &str = "#2e8b57";

/// Draws the report.
pub fn draw(report: &Report) -> String {
    let mut points: Vec<&PointReport> = report.points.iter().collect();
    points.sort_by(|a, b| a.load().total_cmp(&b.load()));
    let open = points.iter().any(|p| p.rate.is_some());
    let x_label = if open { "offered load, requests/s (Poisson)" } else { "streams (closed loop)" };
    let slo = Report::slo(&report.args);

    let latency = |title: &str, of: fn(&PointReport) -> Option<Summary>, bound: Option<f64>| {
        let along = |at: fn(Summary) -> f64| points.iter().filter_map(|p| Some((p.load(), at(of(p)?)))).collect();
        let mut series = vec![line("p50", along(|s| s.p50), P50), line("p99", along(|s| s.p99), P99)];
        if let Some(bound) = bound {
            series.push(guide("SLO", points.iter().map(|p| (p.load(), bound)).collect()));
        }
        panel(title, x_label, true, series)
    };
    let panels = [
        latency("Time to first token, ms", |p| p.latency_ms.ttft, slo.ttft_ms),
        latency("Time per output token after the first, ms", |p| p.latency_ms.tpot, slo.tpot_ms),
        latency("End to end, ms", |p| p.latency_ms.e2e, None),
        if open { achieved(&points, x_label) } else { throughput(&points, x_label) },
    ];
    let model = report.status.model.as_ref();
    let title = model.map_or_else(|| "Load test".to_owned(), |m| format!("Load test: {} ({})", m.name, m.dtype));
    picture(&title, &words(report), &panels)
}

fn words(report: &Report) -> String {
    let count = |role: &str| report.status.nodes.iter().filter(|n| n.role == role).count();
    let transport = report.status.nodes.first().map_or("", |n| n.transport.as_str());
    let cpu = report.machine.cpu.as_deref().unwrap_or("unknown processor");
    let processors = report.machine.processors.unwrap_or(0);
    format!(
        "{} attention, {} expert nodes over {transport}; {cpu}, {processors} processors",
        count("attention"),
        count("expert")
    )
}

fn line(name: &str, points: Vec<(f64, f64)>, colour: &'static str) -> Series {
    Series { name: name.to_owned(), points, colour, guide: false }
}

fn guide(name: &str, points: Vec<(f64, f64)>) -> Series {
    Series { name: name.to_owned(), points, colour: GUIDE, guide: true }
}

fn panel(title: &str, x_label: &str, may_log: bool, series: Vec<Series>) -> Panel {
    Panel { title: title.to_owned(), x_label: x_label.to_owned(), may_log, series }
}

/// Where the line leaves the diagonal, the mesh is full.
fn achieved(points: &[&PointReport], x_label: &str) -> Panel {
    let along = |of: fn(&PointReport) -> Option<f64>| points.iter().filter_map(|p| Some((p.load(), of(p)?))).collect();
    let mut series =
        vec![guide("offered", along(|p| p.rate)), line("completed", along(|p| Some(p.requests_per_s)), P50)];
    if points.iter().any(|p| p.goodput.is_some()) {
        series.push(line("within the SLO", along(|p| p.goodput.map(|g| g.requests_per_s)), GOOD));
    }
    panel("Requests/s", x_label, false, series)
}

fn throughput(points: &[&PointReport], x_label: &str) -> Panel {
    let tokens = points.iter().map(|p| (p.load(), p.output_tokens_per_s)).collect();
    panel("Output tokens/s", x_label, false, vec![line("output tokens/s", tokens, P50)])
}
