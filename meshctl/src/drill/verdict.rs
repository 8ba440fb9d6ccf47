//! What was expected beside what was found.

use serde::Serialize;

use super::plan::Expect;
use super::report::Report;
use super::watch::Usage;

/// An expectation that was not met.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Violation {
    /// Its key in the plan, or what every drill owes.
    pub expectation: &'static str,
    /// What was found beside what was wanted.
    pub why: String,
}

/// Everything in which a report falls short of what was expected; nothing: passed.
pub fn violations(expect: &Expect, report: &Report) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut violated = |expectation, why: String| violations.push(Violation { expectation, why });
    if let Some(why) = &report.phases_ended_by {
        violated("phases", format!("not all could be carried out: {why}"));
    }
    if report.load_ended_early {
        violated("load", "ended before the phases did: it has as many requests as a drill may send".to_owned());
    }
    if report.failed > expect.failed_requests {
        violated("failed_requests", format!("{} failed, at most {} may", report.failed, expect.failed_requests));
    }
    if expect.tokens_identical && report.comparison.tokens_different > 0 {
        let found = &report.comparison;
        violated("tokens_identical", format!("{} of {} tokens differ", found.tokens_different, found.tokens));
    }
    let stall = |of: fn(&super::report::Stalls) -> f64| report.stalls.as_ref().map(of);
    let upper = [
        ("stall_p99_ms", expect.stall_p99_ms, stall(|s| s.p99_ms), "ms"),
        ("stall_max_ms", expect.stall_max_ms, stall(|s| s.max_ms), "ms"),
        ("within_s", expect.within_s, Some(report.elapsed_s), "s"),
    ];
    for (key, wanted, found, unit) in upper {
        match (wanted, found) {
            (Some(wanted), Some(found)) if found > wanted => {
                violated(key, format!("{found:.1} {unit}, at most {wanted} {unit} wanted"));
            }
            // What could not be looked at does not hold.
            (Some(_), None) => violated(key, "not measured: no stream waited for a token at an event".to_owned()),
            _ => (),
        }
    }
    if let Some(moved) = report.moved.filter(|m| m.change_bytes_max > m.change_bytes_bound) {
        let (found, bound) = (moved.change_bytes_max, moved.change_bytes_bound);
        violated("moves", format!("a change had {found} bytes loaded, the router allows {bound}"));
    }
    flat(expect, &report.processes, &mut violated);
    match (expect.throughput_during_min, report.throughput.share_during()) {
        (Some(wanted), Some(found)) if found < wanted => {
            violated("throughput_during_min", format!("{found:.3} of that before, at least {wanted} wanted"));
        }
        (Some(_), None) => {
            violated("throughput_during_min", "not measured: no time before or after an event".to_owned())
        }
        _ => (),
    }
    violations
}

/// Whether processes use no more than when they had settled.
fn flat(expect: &Expect, processes: &[Usage], violated: &mut impl FnMut(&'static str, String)) {
    type Growth = fn(&Usage) -> f64;
    let growths: [(_, _, Growth); 2] = [
        ("memory_growth_max", expect.memory_growth_max, Usage::growth),
        ("handles_growth_max", expect.handles_growth_max, Usage::handles_growth),
    ];
    for (key, wanted, growth) in growths {
        let Some(wanted) = wanted else { continue };
        if processes.is_empty() {
            violated(key, format!("not measured: no process ran for long after {} s", expect.settle_s));
        }
        for process in processes.iter().filter(|process| growth(process) > wanted) {
            let (who, pid, found) = (&process.who, process.pid, growth(process));
            violated(key, format!("{who} (pid {pid}) grew by {found:.3}, at most {wanted} wanted"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::watch::Columns;
    use super::*;
    use crate::drill::compare::Comparison;
    use crate::drill::measure::Throughput;
    use crate::drill::report::{Stalls, tests::report};

    fn violated(expect: Expect, change: impl FnOnce(&mut Report)) -> Vec<&'static str> {
        let mut report = report();
        change(&mut report);
        violations(&expect, &report).into_iter().map(|v| v.expectation).collect()
    }

    #[test]
    fn whoever_grows_is_named() {
        let expect = Expect { memory_growth_max: Some(0.02), handles_growth_max: Some(0.0), ..Expect::default() };
        assert_eq!(violated(expect.clone(), |_| ()), ["memory_growth_max", "handles_growth_max"], "not measured");
        let usage = |resident_end, handles_end| Usage {
            who: "router".to_owned(),
            pid: 7,
            watched_s: 900.0,
            resident_settled: 1000,
            resident_end,
            work_settled: 0,
            work_end: 0,
            own_settled: 1000,
            own_end: i64::try_from(resident_end).unwrap(),
            own_most: i64::try_from(resident_end).unwrap(),
            handles_settled: 12,
            handles_end,
            handles_most: handles_end,
            samples: Columns::default(),
        };
        let with = |expect: &Expect, last| {
            violated(expect.clone(), move |report| report.processes = vec![usage(1000, 12), last])
        };
        assert!(with(&expect, usage(1020, 11)).is_empty());
        assert_eq!(with(&expect, usage(1021, 12)), ["memory_growth_max"]);
        assert_eq!(with(&expect, usage(900, 13)), ["handles_growth_max"]);
    }

    #[test]
    fn a_quiet_drill_meets_what_is_expected_by_default() {
        assert!(violated(Expect::default(), |_| ()).is_empty());
    }

    #[test]
    fn each_expectation_is_named_when_it_is_not_met() {
        let expect = Expect {
            stall_p99_ms: Some(100.0),
            stall_max_ms: Some(200.0),
            throughput_during_min: Some(0.5),
            within_s: Some(30.0),
            ..Expect::default()
        };
        let met = |report: &mut Report| {
            report.stalls = Some(Stalls { count: 2, p50_ms: 10.0, p99_ms: 100.0, max_ms: 200.0 });
            report.throughput = Throughput { before: Some(10.0), during: Some(5.0), ..Throughput::default() };
            report.elapsed_s = 30.0;
        };
        assert!(violated(expect.clone(), met).is_empty(), "at the bound is within it");
        let unmet = |report: &mut Report| {
            report.stalls = Some(Stalls { count: 2, p50_ms: 10.0, p99_ms: 101.0, max_ms: 201.0 });
            report.throughput = Throughput { before: Some(10.0), during: Some(4.0), ..Throughput::default() };
            (report.elapsed_s, report.failed, report.load_ended_early) = (31.0, 1, true);
            report.phases_ended_by = Some("nobody".to_owned());
            report.comparison = Comparison { tokens: 9, tokens_different: 1, ..Comparison::default() };
        };
        let all = ["phases", "load", "failed_requests", "tokens_identical", "stall_p99_ms", "stall_max_ms", "within_s"];
        assert_eq!(violated(expect.clone(), unmet), [&all[..], &["throughput_during_min"]].concat());
        let unmeasured = violated(Expect { within_s: None, ..expect }, |report| report.stalls = None);
        assert_eq!(unmeasured, ["stall_p99_ms", "stall_max_ms", "throughput_during_min"]);
        let lax = Expect { failed_requests: 1, tokens_identical: false, ..Expect::default() };
        let failed = |report: &mut Report| (report.failed, report.comparison.tokens_different) = (1, 5);
        assert!(violated(lax, failed).is_empty());
    }
}
