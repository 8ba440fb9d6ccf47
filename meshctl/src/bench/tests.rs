//! The load tester against a front door whose times are known.
//!
//! Lower bounds of latencies are strict: time that the fake takes cannot be lost. Upper bounds leave room for a busy
//! machine, and hold for medians only.

use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::ProgressBar;
use mesh_proto::Code;

use super::args::Load;
use super::arrivals::Poisson;
use super::drive::{EndedBy, Limit, Point, Pool};
use super::fake::{Fate, Script, serve};
use super::record::{Record, Recorder};
use super::report::{PointReport, Report};
use super::workload::Workload;
use super::*;
use crate::cli::{Cli, Command};

/// Added by a busy machine to the median of a latency at most.
const BUSY_MS: f64 = 400.0;

fn args(addr: &str, flags: &[&str]) -> BenchArgs {
    let all = ["meshctl", "bench", "--grpc", addr].into_iter().chain(flags.iter().copied());
    match Cli::try_parse_from(all).unwrap().command {
        Command::Bench(args) => args,
        other => panic!("{other:?}"),
    }
}

async fn bench(script: Script, flags: &[&str]) -> Report {
    let addr = serve(script).to_string();
    measure(args(&addr, flags), &mut StopSignals::watch().unwrap()).await.unwrap()
}

async fn one(script: Script, flags: &[&str]) -> PointReport {
    bench(script, flags).await.points.remove(0)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[tokio::test]
async fn latencies_are_those_of_the_fake() {
    let script = Script { first: ms(80), each: ms(20), ..Script::default() };
    let flags = ["--concurrency", "4", "--requests", "20", "--output-tokens", "6", "--input-tokens", "9"];
    let point = one(script, &flags).await;
    assert_eq!((point.requests, point.completed, point.ended_by), (20, 20, EndedBy::Requests));
    assert_eq!((point.input_tokens, point.output_tokens), (180, 120));
    let latency = point.latency_ms;
    let (ttft, tpot) = (latency.ttft.unwrap(), latency.tpot.unwrap());
    let (gaps, e2e) = (latency.inter_token.unwrap(), latency.e2e.unwrap());
    assert!(ttft.p50 >= 80.0 && ttft.p50 < 80.0 + BUSY_MS, "{ttft:?}");
    // A late first token shortens the first gap, so gaps have no strict lower bound; their mean nearly has.
    assert!(tpot.p50 >= 15.0 && tpot.p50 < 20.0 + BUSY_MS, "{tpot:?}");
    assert!(gaps.mean >= 15.0 && gaps.p50 < 20.0 + BUSY_MS, "{gaps:?}");
    assert_eq!((ttft.count, gaps.count), (20, 100));
    assert!(e2e.p50 >= 180.0 && e2e.max >= e2e.p99 && e2e.p99 >= e2e.p50, "{e2e:?}");
    // Five rounds of four streams, 180 ms each at least.
    assert!(point.elapsed_s >= 0.9 && point.output_tokens_per_s <= 120.0 / 0.9, "{}", point.elapsed_s);
    let counters = point.mesh.unwrap();
    assert_eq!((counters.requests, counters.roles["attention"].tokens), (20, 120), "warm-up is not in the counters");
    let profile = &point.profile.unwrap().roles[0];
    let qkv = &profile.parts[0];
    assert_eq!((profile.steps, qkv.gflop_per_s), (120, Some(3.0)));
    assert!((qkv.seconds - 120.0 * 2e-6).abs() < 1e-9, "{qkv:?}");
    assert!((qkv.share * point.elapsed_s - qkv.seconds).abs() < 1e-9, "{qkv:?} of {} s", point.elapsed_s);
}

#[tokio::test]
async fn tokens_that_come_together_count_each() {
    let script = Script { together: 4, each: ms(40), ..Script::default() };
    let point = one(script, &["--requests", "5", "--output-tokens", "8", "--warmup", "0"]).await;
    assert_eq!(point.output_tokens, 40);
    let (gaps, tpot) = (point.latency_ms.inter_token.unwrap(), point.latency_ms.tpot.unwrap());
    assert_eq!((gaps.count, gaps.p50), (35, 0.0), "six of seven came with another");
    assert!(gaps.max >= 35.0 && tpot.p50 >= 4.0, "{gaps:?} {tpot:?}");
}

#[tokio::test]
async fn every_failure_is_counted_under_its_code() {
    let fate = |n| match n % 5 {
        0 => Fate::Refuse(Code::Overloaded),
        1 => Fate::Cut,
        2 => Fate::Short,
        3 => Fate::Refuse(Code::NodeLost),
        _ => Fate::Answer,
    };
    let script = Script { fate, first: ms(1), each: ms(1), ..Script::default() };
    let flags = ["--requests", "50", "--concurrency", "8", "--output-tokens", "3", "--warmup", "0"];
    let point = one(script, &[&flags[..], &["--slo-ttft-ms", "100000"]].concat()).await;
    let counts: Vec<_> = point.errors.iter().map(|(code, errors)| (*code, errors.count)).collect();
    let wanted = [("NODE_LOST", 10), ("OVERLOADED", 10), ("STREAM_CUT", 10), ("WRONG_LENGTH", 10)];
    assert_eq!(counts, wanted);
    assert_eq!((point.requests, point.completed, point.output_tokens), (50, 10, 30));
    assert_eq!(point.output_tokens_failed, 10 + 20, "one of each cut answer, two of each short one");
    assert_eq!(point.goodput.unwrap().share, 0.2);
    assert!(point.errors["WRONG_LENGTH"].first.contains("3 tokens asked for, 2 made"), "{:?}", point.errors);
    assert!(point.errors["OVERLOADED"].first.contains("on purpose"));
}

#[tokio::test]
async fn an_open_loop_keeps_to_its_schedule_and_counts_the_queue() {
    // One at a time, 50 ms each, offered ten times as fast: request n waits for all before it.
    let script = Script { first: ms(50), lanes: 1, ..Script::default() };
    let flags = ["--rate", "200", "--requests", "40", "--output-tokens", "1", "--seed", "5", "--warmup", "0"];
    let flags = [&flags[..], &["--json", "-", "--per-request"]].concat();
    let point = one(script.clone(), &flags).await;
    assert_eq!((point.completed, point.ended_by), (40, EndedBy::Requests));
    let rows = point.per_request.unwrap();
    for (row, due) in rows.iter().zip(Poisson::new(200.0, 5)) {
        assert!((row["due_ms"].as_f64().unwrap() - due.as_secs_f64() * 1e3).abs() < 0.01, "{row}");
    }
    let last_due = rows[39]["due_ms"].as_f64().unwrap();
    let ttft = point.latency_ms.ttft.unwrap();
    assert!(ttft.max >= 40.0 * 50.0 - last_due, "{ttft:?}");

    // The same load through one place in flight: most requests are sent late, and their latency says so.
    let narrow = one(script, &[&flags[..], &["--in-flight-max", "1"]].concat()).await;
    let (ttft, lag) = (narrow.latency_ms.ttft.unwrap(), narrow.latency_ms.send_lag.unwrap());
    assert!(ttft.max >= 40.0 * 50.0 - last_due, "{ttft:?}");
    assert!(lag.max >= 39.0 * 50.0 - last_due, "{lag:?}");
}

#[tokio::test]
async fn an_open_loop_offers_its_mean_rate_in_its_duration() {
    let script = Script { first: ms(1), ..Script::default() };
    let flags = ["--rate", "300", "--duration", "2", "--output-tokens", "1", "--warmup", "0"];
    let point = one(script, &flags).await;
    // The seed fixes the count; a Poisson process has 600 +- 24.
    let wanted = Poisson::new(300.0, 0).take_while(|at| *at < Duration::from_secs(2)).count() as u64;
    assert!((528..=672).contains(&wanted), "{wanted}");
    assert_eq!((point.requests, point.completed, point.ended_by), (wanted, wanted, EndedBy::Duration));
}

#[tokio::test]
async fn a_sweep_has_a_point_for_each_load_and_every_form_of_the_result() {
    let script = Script { first: ms(5), each: ms(1), ..Script::default() };
    let flags = ["--concurrency", "1,2,130", "--requests", "140", "--output-tokens", "2"];
    let mut report = bench(script, &flags).await;
    assert_eq!(report.points.iter().map(PointReport::load).collect::<Vec<_>>(), [1.0, 2.0, 130.0]);
    assert!(report.points.iter().all(|p| p.completed == 140), "more streams than one connection takes");
    let json = report.to_json();
    assert_eq!((&json["load"]["output_tokens"], &json["load"]["input_tokens"]), (&"2".into(), &"128".into()));
    assert_eq!(json["points"][1]["latency_ms"]["ttft"]["count"], 140);
    assert!(json["machine"]["processors"].as_u64().unwrap() >= 1);
    let table = table::to_text(&report);
    assert!(table.contains("closed loop, 130 streams: 140 of 140 requests complete"), "{table}");
    assert_eq!(table.lines().filter(|l| l.trim_start().starts_with("streams")).count(), 1, "{table}");
    assert!(!table.contains("profile"), "{table}");
    assert_eq!(json["points"][2]["profile"]["nodes"][0]["parts"][0]["part"], "qkv");
    report.args.profile = true;
    report.points[0].profile = None;
    let table = table::to_text(&report);
    assert_eq!(table.matches("profile      1 attention node, 280 steps").count(), 2, "{table}");
    assert!(table.contains("profile      no node told where its time went"), "{table}");
    let svg = chart::draw(&report);
    assert_eq!(svg.matches("<circle").count(), 3 * (3 * 2 + 1), "{svg}");
}

#[tokio::test]
async fn silence_ends_at_the_timeout_and_a_long_load_at_its_duration() {
    let began = Instant::now();
    let silent = Script { fate: |_| Fate::Silence, ..Script::default() };
    let flags = ["--requests", "2", "--concurrency", "2", "--timeout", "0.3", "--warmup", "0"];
    let report = bench(silent, &flags).await;
    assert_eq!(report.points[0].errors["DEADLINE"].count, 2);
    assert_eq!((report.points[0].completed, exit(&report)), (0, Exit::Deadline));
    let flags = ["--duration", "0.5", "--concurrency", "2", "--output-tokens", "2", "--warmup", "0"];
    let point = one(Script::default(), &flags).await;
    assert_eq!(point.ended_by, EndedBy::Duration);
    assert!(point.completed >= 2 && point.elapsed_s < 10.0, "{}", point.elapsed_s);
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

#[tokio::test]
async fn an_early_end_keeps_what_was_measured_and_counts_what_was_not() {
    let addr = serve(Script { fate: |n| if n < 3 { Fate::Answer } else { Fate::Silence }, ..Script::default() });
    let args = args(&addr.to_string(), &["--output-tokens", "2", "--requests", "100", "--concurrency", "2"]);
    let mut client = Client::connect(&addr.to_string()).await.unwrap();
    let model = client.status().await.unwrap().model.unwrap();
    let workload = Workload::new(&args, &model, None, &mut client).await.unwrap();
    let recorder = Recorder::new(Instant::now(), ProgressBar::hidden());
    let load = Load::Closed(2);
    let point = Point {
        number: 0,
        load,
        bounds: args.bounds(load),
        limit: Limit::new(100),
        retry: false,
        workload: Arc::new(workload),
        pool: Pool::connect(&addr.to_string(), 2).await.unwrap(),
        recorder: recorder.clone(),
        seed: 0,
    };
    let two_hang = async {
        let patience = Instant::now() + Duration::from_secs(60);
        let mut client = Client::connect(&addr.to_string()).await.unwrap();
        while client.status().await.unwrap().requests_total < 5 {
            assert!(Instant::now() < patience, "no five requests in a minute");
            tokio::time::sleep(ms(5)).await;
        }
    };
    assert_eq!(point.run(two_hang).await.unwrap(), EndedBy::Interrupt);
    let kept = recorder.take();
    let complete = |r: &&Record| r.failure.is_none();
    assert_eq!((kept.records.len(), kept.records.iter().filter(complete).count()), (5, 3));
    assert_eq!(kept.errors["UNFINISHED"].count, 2);
}

#[tokio::test]
async fn what_was_unavailable_is_sent_again_where_that_is_wanted_and_a_lowered_limit_ends_the_load() {
    // Every other request is refused, so that each is answered at its second sending at the latest.
    let fate = |n| if n % 2 == 0 { Fate::Refuse(Code::NodeLost) } else { Fate::Answer };
    let addr = serve(Script { fate, first: ms(1), each: ms(1), ..Script::default() }).to_string();
    let args = args(&addr, &["--output-tokens", "2", "--duration", "60"]);
    let model = Client::connect(&addr).await.unwrap().status().await.unwrap().model.unwrap();
    let workload = Workload::new(&args, &model, None, &mut Client::connect(&addr).await.unwrap()).await.unwrap();
    let recorder = Recorder::tracing(Instant::now(), ProgressBar::hidden());
    let load = Load::Closed(1);
    let point = Point {
        number: 0,
        load,
        bounds: args.bounds(load),
        limit: Limit::new(u64::MAX),
        retry: true,
        workload: Arc::new(workload),
        pool: Pool::connect(&addr, 1).await.unwrap(),
        recorder: recorder.clone(),
        seed: 0,
    };
    let limit = point.limit.clone();
    let (ended, ()) = tokio::join!(point.run(std::future::pending()), async {
        tokio::time::sleep(ms(300)).await;
        limit.lower(1);
    });
    assert_eq!(ended.unwrap(), EndedBy::Requests);
    let kept = recorder.take();
    assert!(kept.records.len() > 1 && kept.records.iter().all(|r| r.failure.is_none()), "{:?}", kept.errors);
    assert!(kept.traces.iter().all(|t| t.attempts.len() == 2 && t.arrivals.len() == 2), "{:?}", kept.traces);
}

#[tokio::test]
async fn a_dataset_gives_prompts_and_answers_their_length() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chats.json");
    let chat = |q: &str, a: &str| serde_json::json!({"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]});
    let chats = [chat(&"q".repeat(40), &"a".repeat(20)), chat(&"long".repeat(1000), "a"), chat("", "a")];
    std::fs::write(&path, serde_json::to_vec(&chats).unwrap()).unwrap();
    let script = Script { first: ms(1), each: ms(1), ..Script::default() };
    let report = bench(script.clone(), &["--dataset", path.to_str().unwrap(), "--requests", "4"]).await;
    let point = &report.points[0];
    // Four bytes a token by the fake's count.
    assert_eq!((point.completed, point.input_tokens, point.output_tokens), (4, 4 * 10, 4 * 5), "{:?}", point.errors);
    let skipped = report.skipped.unwrap();
    assert_eq!((skipped.too_long, skipped.no_pair), (1, 1));
    assert_eq!(report.bytes_per_token, Some(4.0));

    std::fs::write(&path, serde_json::to_vec(&chats[1..]).unwrap()).unwrap();
    let addr = serve(script).to_string();
    let refused =
        measure(args(&addr, &["--dataset", path.to_str().unwrap()]), &mut StopSignals::watch().unwrap()).await;
    assert_eq!(refused.unwrap_err().exit(), Exit::Usage);
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let addr = serve(Script::default()).to_string();
    let mut signals = StopSignals::watch().unwrap();
    let long = measure(args(&addr, &["--input-tokens", "250"]), &mut signals).await.unwrap_err();
    assert_eq!((long.exit(), long.remedy()), (Exit::Usage, Some("lower --input-tokens or --output-tokens")));
    assert!(long.to_string().contains("250 input and 64 output") && long.to_string().contains("256"), "{long}");
    let nobody = measure(args("127.0.0.1:1", &[]), &mut signals).await.unwrap_err();
    assert_eq!(nobody.exit(), Exit::Unavailable);
}
