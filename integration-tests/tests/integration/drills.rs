//! Fault drills through the real program: what it prints, what it ends with, and that it leaves nothing running.

use std::path::Path;

use integration_tests::fixture::repository;
use integration_tests::mesh::{binary, is_running};
use integration_tests::patience::soon;
use serde_json::Value;
use tokio::process::Command;

/// Runs a plan. The exit code, the JSON report and the table.
async fn drill(plan: &Path) -> (i32, Value, String) {
    let mut command = Command::new(binary("meshctl"));
    command.arg("drill").arg(plan).arg("--json").kill_on_drop(true);
    let output = soon("meshctl drill", command.output()).await.expect("meshctl runs");
    let table = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("no JSON ({e}):\n{table}"));
    (output.status.code().unwrap_or(-1), report, table)
}

/// What happened, to whom, and to which process.
fn events(report: &Value) -> Vec<(&str, &str, u32)> {
    let events = report["found"]["events"].as_array().expect("events").iter();
    events
        .map(|event| {
            let pid = u32::try_from(event["pid"].as_u64().expect("a pid")).expect("a pid");
            (event["what"].as_str().expect("what"), event["who"].as_str().expect("who"), pid)
        })
        .collect()
}

#[tokio::test]
async fn the_smoke_drill_passes_and_leaves_nothing() {
    let (code, report, table) = drill(&repository().join("drills/smoke.toml")).await;
    assert_eq!(code, 0, "{table}");
    let found = &report["found"];
    assert_eq!((&report["passed"], &found["failed"]), (&true.into(), &0.into()), "{table}");
    assert_eq!(found["comparison"]["tokens_different"], 0);
    let compared = found["comparison"]["tokens"].as_u64().expect("tokens");
    assert!(found["requests"] == 12 && compared >= 12 * 16, "{found}");
    let events = events(&report);
    assert_eq!(events.iter().map(|(what, ..)| *what).collect::<Vec<_>>(), ["stop", "continue"], "{table}");
    assert!(found["stalls"]["max_ms"].as_f64().is_some_and(|ms| ms >= 200.0), "some stream was on it: {table}");
    assert!(found["throughput"]["before"].as_f64().is_some_and(|rate| rate > 0.0), "{found}");
    assert!(events.iter().all(|(_, _, pid)| !is_running(*pid)), "{events:?}");
    assert!(table.contains("passed") && table.contains("stall ms"), "{table}");
}

#[tokio::test]
async fn a_killed_node_is_in_the_report_and_what_was_not_met_ends_it_with_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = folder.path().join("kill.toml");
    let text = "
        [mesh]\nexperts = 2\ntransport = 'tcp'\nthreads = 1
        [load]\nstreams = 4\nrequests = 2\nprompt_tokens = 8\noutput_tokens = [16, 32]
        [[phase]]\ndo = 'wait'\nseconds = 0.5
        [[phase]]\ndo = 'kill'\nwho = 'expert:1'\nrestart_after = 0.2
        [[phase]]\ndo = 'start'\nwho = 'expert'
        [expect]\nwithin_s = 0.1\nfailed_requests = 100000
    ";
    std::fs::write(&plan, text).expect("a plan");
    let (code, report, table) = drill(&plan).await;
    assert_eq!(code, 1, "{table}");
    let found = &report["found"];
    let events = events(&report);
    let wanted = [("kill", "expert-1"), ("restart", "expert-1"), ("start", "expert-2")];
    assert_eq!(events.iter().map(|(what, who, _)| (*what, *who)).collect::<Vec<_>>(), wanted, "{table}");
    assert_ne!(events[0].2, events[1].2, "another process");
    let violations = found["violations"].as_array().expect("violations");
    assert_eq!(violations.iter().map(|v| &v["expectation"]).collect::<Vec<_>>(), ["within_s"], "{table}");
    assert!(table.contains("FAILED") && table.contains("within_s"), "{table}");
    let errors = found["errors"].as_object().expect("errors").values();
    let counted: u64 = errors.map(|errors| errors["count"].as_u64().expect("a count")).sum();
    assert_eq!(found["failed"], counted, "every failure has its text: {found}");
    assert_eq!(found["comparison"]["tokens_different"], 0, "what came was right: {table}");
}

/// One that is stopped keeps its connections: nothing but its silence tells that its requests wait in vain.
#[tokio::test]
async fn requests_of_a_stopped_attention_node_go_on_at_another() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = folder.path().join("stop.toml");
    let text = "
        [mesh]\nattention = 2\nexperts = 1\ntransport = 'tcp'\nthreads = 1
        [load]\nstreams = 4\nrequests = 2\nprompt_tokens = 8\noutput_tokens = [64, 128]
        [[phase]]\ndo = 'wait'\nseconds = 0.5
        [[phase]]\ndo = 'stop'\nwho = 'attention:0'\nfor = 6
        [[phase]]\ndo = 'wait'\nseconds = 1
        [expect]\nstall_max_ms = 3000
    ";
    std::fs::write(&plan, text).expect("a plan");
    let (code, report, table) = drill(&plan).await;
    assert_eq!(code, 0, "{table}");
    let found = &report["found"];
    assert_eq!((&found["failed"], &found["comparison"]["tokens_different"]), (&0.into(), &0.into()), "{table}");
    assert!(found["stalls"]["max_ms"].as_f64().is_some_and(|ms| ms >= 500.0), "some stream was on it: {table}");
}

#[tokio::test]
async fn a_plan_with_a_mistake_is_a_usage_error_that_names_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = folder.path().join("plan.toml");
    let load = "[load]\nstreams = 1\nrequests = 1\nprompt_tokens = 1\noutput_tokens = 1\n";
    for (text, word) in [("do = 'kill'\nwho = 'router'", "phase[1].who"), ("do = 'wait'\nsecond = 1", "`second`")] {
        std::fs::write(&plan, format!("{load}[[phase]]\n{text}\n")).expect("a plan");
        let output = Command::new(binary("meshctl")).arg("drill").arg(&plan).output();
        let output = soon("meshctl drill", output).await.expect("meshctl runs");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{errors}");
        assert!(errors.contains(word) && errors.contains("remedy:"), "{errors}");
    }
}

/// The soak of drills/soak.toml in less than a minute: whoever leaks with every fault shows it here already. What is within the
/// two percent of the long one takes the long one.
#[tokio::test]
async fn a_short_soak_serves_every_request_and_nobody_grows() {
    let long = std::fs::read_to_string(repository().join("drills/soak.toml")).expect("the plan");
    let shorter = [
        ("[mesh]\n", "[mesh]\ntransport = \"tcp\"\nthreads = 1\n"),
        ("streams = 16\n", "streams = 6\n"),
        ("seconds = 20\n", "seconds = 2\n"),
        ("count = 90\n", "count = 9\n"),
        ("seconds = [12, 22]\n", "seconds = [1, 3]\n"),
        ("memory_growth_max = 0.02\n", "memory_growth_max = 0.2\nsettle_s = 12\n"),
        ("handles_growth_max = 0\n", "handles_growth_max = 4\n"),
    ];
    let short = shorter.iter().fold(long, |plan, (from, to)| {
        assert!(plan.contains(from), "{from:?} in {plan}");
        plan.replace(from, to)
    });
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = folder.path().join("soak.toml");
    std::fs::write(&plan, short).expect("a plan");
    let (code, report, table) = drill(&plan).await;
    eprintln!("{table}");
    assert_eq!(code, 0, "{table}");
    let processes = report["found"]["processes"].as_array().expect("processes");
    let watched: Vec<&str> = processes.iter().filter_map(|p| p["who"].as_str()).collect();
    assert!(["router", "attention-0", "expert-0", "expert-1"].iter().all(|who| watched.contains(who)), "{table}");
}
