//! The command line and the processes that it starts: what they print, that they end, and that they rest.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use integration_tests::generation::ids_request;
use integration_tests::mesh::{binary, is_running, send_signal};
use integration_tests::patience::{eventually, soon};
use integration_tests::{Dtype, Mesh, Transport};
use serde_json::Value;
use tokio::process::Command;

/// How long an idle mesh is watched.
const IDLE_WATCH: Duration = Duration::from_secs(8);
/// How many times a thread that does nothing wakes meanwhile: as often as a node's.
const IDLE_TICKS: u32 = 50;
/// What a wake for nothing takes at most on a machine on which the time of an idle mesh can be judged.
const WARM_TICK: Duration = Duration::from_micros(50);
/// How many times the threads of an idle mesh of eight processes may run meanwhile: twice what they do.
const IDLE_TIMES: u64 = 1000;

async fn meshctl(args: &[&str]) -> (i32, String, String) {
    let output = soon("meshctl", Command::new(binary("meshctl")).args(args).kill_on_drop(true).output()).await;
    let output = output.expect("meshctl runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

async fn all_gone(pids: &[u32]) {
    eventually("every process is gone", || async {
        let left: Vec<_> = pids.iter().filter(|pid| is_running(**pid)).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("running: {left:?}")) }
    })
    .await;
}

#[tokio::test]
async fn the_ready_line_names_every_process_and_sigterm_ends_them_all() {
    let mut mesh = Mesh::builder().attention(2).experts(2).transport(Transport::Tcp).start().await;
    let ready = mesh.ready().clone();
    assert_eq!(ready["ready"], true);
    let nodes = ready["nodes"].as_array().expect("nodes");
    let count = |role: &str| nodes.iter().filter(|n| n["role"] == role).count();
    assert_eq!((count("router"), count("attention"), count("expert")), (1, 2, 2));
    for node in nodes {
        assert!(node["id"].is_string() && node["addr"].as_str().is_some_and(|a| a.contains("127.0.0.1:")), "{node}");
    }
    let mut pids = mesh.pids();
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 5, "every node is a process of its own");
    assert!(pids.iter().all(|pid| is_running(*pid)));

    assert_eq!(mesh.stop().await.code(), Some(0), "{}", mesh.log());
    all_gone(&pids).await;
}

#[tokio::test]
async fn a_mesh_in_one_process_has_the_same_ready_line_and_ends_as_well() {
    let mut mesh = Mesh::builder().attention(2).experts(2).transport(Transport::Local).start().await;
    let ready = mesh.ready().clone();
    assert_eq!(ready["ready"], true);
    let nodes = ready["nodes"].as_array().expect("nodes");
    assert_eq!(nodes.len(), 5, "{ready}");
    assert!(nodes.iter().all(|n| n["pid"] == mesh.pid() && n["id"].is_string() && n["addr"].is_string()), "{ready}");
    let pid = mesh.pid();
    assert_eq!(mesh.stop().await.code(), Some(0), "{}", mesh.log());
    assert!(!is_running(pid));
}

/// Starts a mesh on a cache of packed weights, and gives its tokens and every file of packed weights that it has mapped.
async fn start_on_cache(cache: &std::path::Path) -> (Vec<u32>, Vec<String>) {
    let cache_dir = cache.to_str().expect("a temporary directory's path is UTF-8");
    let mut mesh = Mesh::builder().experts(2).transport(Transport::Tcp).flag("--cache-dir", cache_dir).start().await;
    let ids = mesh.generate(ids_request(&[5, 6, 7], 16)).await.expect("tokens").ids();
    let maps = mesh.pids().into_iter().map(|pid| std::fs::read_to_string(format!("/proc/{pid}/maps")));
    let maps: Vec<String> = maps.map(|text| text.expect("a running process has maps")).collect();
    let mapped = maps
        .iter()
        .flat_map(|text| text.lines())
        .filter_map(|line| line.find(cache_dir).map(|at| line[at..].to_owned()));
    let mapped: std::collections::BTreeSet<String> = mapped.collect();
    assert_eq!(mesh.stop().await.code(), Some(0), "{}", mesh.log());
    (ids, mapped.into_iter().collect())
}

#[tokio::test]
async fn a_second_start_maps_the_packed_weights_of_the_first_and_makes_damaged_ones_anew() {
    let plain = Mesh::builder().experts(2).transport(Transport::Tcp).start().await;
    let expected = plain.generate(ids_request(&[5, 6, 7], 16)).await.expect("tokens").ids();
    let cache = tempfile::tempdir().expect("a temporary directory");
    let (first, files) = start_on_cache(cache.path()).await;
    assert_eq!(first, expected);
    assert!(files.iter().any(|f| f.contains("expert-")) && files.iter().any(|f| f.contains("qkv")), "{files:?}");
    let written = |files: &[String]| -> Vec<_> {
        files.iter().map(|f| std::fs::metadata(f).and_then(|m| m.modified()).expect("a file")).collect()
    };
    let before = written(&files);
    assert_eq!(start_on_cache(cache.path()).await, (expected.clone(), files.clone()));
    assert_eq!(written(&files), before, "nothing is packed a second time");

    let damaged = files.iter().position(|f| f.contains("expert-")).expect("an expert's file");
    let mut bytes = std::fs::read(&files[damaged]).expect("readable");
    bytes[100] ^= 1;
    std::fs::write(&files[damaged], bytes).expect("nobody has it mapped any more");
    let spoilt = written(&files);
    assert_eq!(start_on_cache(cache.path()).await, (expected, files.clone()));
    let changed: Vec<usize> = (0..files.len()).filter(|i| written(&files)[*i] != spoilt[*i]).collect();
    assert_eq!(changed, [damaged], "the damaged one alone is packed again");
}

#[tokio::test]
async fn nodes_do_not_outlive_a_killed_meshctl() {
    let mut mesh = Mesh::builder().attention(2).experts(2).transport(Transport::Tcp).start().await;
    let pids = mesh.pids();
    mesh.kill().await;
    all_gone(&pids).await;
}

#[tokio::test]
async fn sigint_ends_a_mesh_that_has_work_to_do() {
    let mesh = Mesh::builder().transport(Transport::Tcp).start().await;
    let (pids, grpc, pid) = (mesh.pids(), mesh.grpc().to_owned(), mesh.pid());
    let request = ["generate", "--grpc", &grpc, "--token-ids", "100", "--max-new-tokens", "900", "--ignore-eos"];
    let mut client = Command::new(binary("meshctl"));
    client.args(request).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).kill_on_drop(true);
    let mut client = client.spawn().expect("meshctl starts");
    eventually("the request runs", || async {
        if mesh.status().await.requests_active == 1 { Ok(()) } else { Err("not active".to_owned()) }
    })
    .await;
    send_signal("INT", pid);
    all_gone(&pids).await;
    // Its stream was finished within the grace period, or ended with a typed error; it does not hang.
    let code = soon("the client's end", client.wait()).await.expect("its status").code();
    assert!(matches!(code, Some(0 | 69)), "{code:?}");
}

#[tokio::test]
async fn generate_prints_text_as_it_comes_or_one_json_object() {
    let mesh = Mesh::builder().dtype(Dtype::F32).transport(Transport::Tcp).start().await;
    let common = ["generate", "--grpc", mesh.grpc(), "--prompt", "Wisdom is", "--max-new-tokens", "16"];
    let (code, text, errors) = meshctl(&common).await;
    assert_eq!(code, 0, "{errors}");

    let (code, json, errors) = meshctl(&[&common[..], &["--json", "--logprobs", "2"]].concat()).await;
    assert_eq!(code, 0, "{errors}");
    let json: Value = serde_json::from_str(&json).expect("one JSON object");
    let ids = json["token_ids"].as_array().expect("token_ids");
    let logprobs = json["logprobs"].as_array().expect("logprobs");
    assert_eq!(ids.len(), logprobs.len());
    assert!(logprobs.iter().all(|l| l.as_f64().is_some_and(|l| l <= 0.0)), "{logprobs:?}");
    assert!(matches!(json["finish_reason"].as_str(), Some("stop" | "length")), "{json}");
    assert_eq!(json["usage"]["completion_tokens"], ids.len());
    assert_eq!(json["top_logprobs"][0].as_array().map(Vec::len), Some(2));
    assert_eq!(json["top_logprobs"][0][0]["id"], ids[0], "greedy takes the best");
    let words = json["text"].as_str().expect("text");
    assert!(!words.trim().is_empty());
    assert_eq!(text.trim_end_matches('\n'), words.trim_end_matches('\n'), "the same text, streamed");
}

#[tokio::test]
async fn errors_have_exit_codes_of_their_own_and_name_the_remedy() {
    let mesh = Mesh::builder().transport(Transport::Local).start().await;
    let grpc = mesh.grpc();
    let (code, out, errors) = meshctl(&["generate", "--grpc", grpc, "--token-ids", "999999"]).await;
    assert_eq!((code, out.trim()), (65, ""), "{errors}");
    assert!(errors.contains("INVALID_REQUEST") && errors.contains("remedy:"), "{errors}");
    let (code, _, errors) = meshctl(&["generate", "--grpc", "127.0.0.1:1", "--prompt", "a"]).await;
    assert_eq!(code, 69, "{errors}");
    let (code, _, errors) = meshctl(&["generate", "--grpc", grpc]).await;
    assert_eq!(code, 64, "{errors}");
    let (code, _, errors) = meshctl(&["up", "--model", "/nowhere"]).await;
    assert_eq!(code, 64, "{errors}");
    assert!(errors.contains("/nowhere"), "{errors}");
}

#[tokio::test]
async fn status_and_doctor_answer_in_words_and_in_json() {
    let mesh = Mesh::builder().attention(1).experts(3).transport(Transport::Tcp).start().await;
    let (code, json, errors) = meshctl(&["status", "--grpc", mesh.grpc(), "--json"]).await;
    assert_eq!(code, 0, "{errors}");
    let json: Value = serde_json::from_str(&json).expect("one JSON object");
    assert_eq!((&json["serving"], json["nodes"].as_array().map(Vec::len)), (&true.into(), Some(4)));
    let layers = json["placement"].as_array().expect("placement");
    let held = layers.iter().flat_map(|l| l["experts"].as_array().expect("experts"));
    assert!(held.clone().count() > 0 && held.clone().all(|slots| slots.as_array().is_some_and(|s| !s.is_empty())));
    let (code, words, _) = meshctl(&["status", "--grpc", mesh.grpc()]).await;
    assert!(code == 0 && words.starts_with("serving") && words.contains("expert-2"), "{words}");

    let (code, words, _) = meshctl(&["doctor"]).await;
    assert!(code == 0 && words.contains("simd:") && words.contains("ucx:"), "{words}");
}

#[tokio::test]
async fn bench_tells_where_the_time_of_every_node_went() {
    let mesh = Mesh::builder().attention(1).experts(2).dtype(Dtype::F32).transport(Transport::Tcp).start().await;
    let load = ["--concurrency", "2", "--requests", "8", "--warmup", "1", "--output-tokens", "24"];
    let (code, json, table) =
        meshctl(&[&["bench", "--grpc", mesh.grpc(), "--profile", "--json", "-"][..], &load].concat()).await;
    assert_eq!(code, 0, "{table}");
    let json: Value = serde_json::from_str(&json).expect("one JSON object");
    let point = &json["points"][0];
    assert_eq!(point["mesh"]["settled"], true, "{point}");
    let number = |of: &Value, field: &str| of[field].as_f64().unwrap_or_else(|| panic!("no {field} in {of}"));
    let nodes = point["profile"]["nodes"].as_array().expect("nodes");
    assert_eq!(nodes.len(), 3, "{point}");
    for node in nodes {
        let parts = node["parts"].as_array().expect("parts");
        let sum: f64 = parts.iter().map(|part| number(part, "seconds")).sum();
        let (busy, wall) = (number(node, "busy_s"), number(node, "wall_s"));
        assert!(sum >= 0.8 * busy && sum <= 1.01 * busy && busy > 0.0 && busy <= wall, "{node}");
        let rated = if node["name"] == "attention-0" { "qkv" } else { "ffn" };
        let rated = parts.iter().find(|part| part["part"] == rated).expect("a part with matrix products");
        assert!(number(rated, "gflop_per_s") > 0.0 && number(rated, "weights_gb_per_s") > 0.0, "{rated}");
    }
    for words in ["1 attention node", "2 expert nodes", "rope+kv", "expert-1: idle"] {
        assert!(table.contains(words), "`{words}` in:\n{table}");
    }
}

/// How long a thread has run, and how many times it was put on a processor.
#[derive(Clone, Copy, Debug, Default)]
struct Ran {
    time: Duration,
    times: u64,
}

impl Ran {
    /// Reads it of a thread's folder under `/proc`, if the thread is still there. Clock ticks would be too coarse: each of
    /// a mesh's processes may be one off, and all that they may take is a few.
    fn of(thread: &Path) -> Option<Self> {
        let stat = std::fs::read_to_string(thread.join("schedstat")).ok()?;
        let mut numbers = stat.split_whitespace().map(|number| number.parse().expect("a number"));
        let (time, _waited) = (Duration::from_nanos(numbers.next()?), numbers.next()?);
        Some(Self { time, times: numbers.next()? })
    }

    fn since(self, before: Self) -> Self {
        Self { time: self.time.saturating_sub(before.time), times: self.times.saturating_sub(before.times) }
    }
}

/// What every thread of the processes has run, by its folder.
fn all_ran(pids: &[u32]) -> HashMap<PathBuf, Ran> {
    let threads = pids.iter().flat_map(|pid| std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs"));
    let folders = threads.filter_map(|thread| Some(thread.ok()?.path()));
    // One that has ended since it was listed has nothing to read.
    folders.filter_map(|folder| Ran::of(&folder).map(|ran| (folder, ran))).collect()
}

/// What waking this thread took, for nothing but a timer, while the mesh was watched. Where a host lets its guests get so
/// cold that it is a millisecond, 1 % of a processor is a few wakes of a whole mesh: there the test says that it can bound
/// only how often the mesh wakes, and that no thread of it stays awake.
async fn ticked() -> Ran {
    let me = Path::new("/proc/thread-self");
    let before = Ran::of(me).expect("this thread runs");
    for _ in 0..IDLE_TICKS {
        tokio::time::sleep(IDLE_WATCH / IDLE_TICKS).await;
    }
    Ran::of(me).expect("this thread runs").since(before)
}

async fn rests(transport: Transport) {
    let mesh = Mesh::builder().attention(2).experts(4).transport(transport).start().await;
    mesh.generate(integration_tests::ids_request(&[100, 101], 4)).await.expect("an answer");
    mesh.assert_idle().await;
    let mut pids = mesh.pids();
    pids.push(mesh.pid());
    pids.sort_unstable();
    pids.dedup();
    let before = all_ran(&pids);
    assert!(before.len() >= pids.len() && before.values().any(|ran| !ran.time.is_zero()), "no run times: {before:?}");
    let tick = ticked().await;
    let used = all_ran(&pids).into_iter().fold(Ran::default(), |sum, (thread, ran)| {
        let ran = ran.since(before.get(&thread).copied().unwrap_or_default());
        Ran { time: sum.time + ran.time, times: sum.times + ran.times }
    });
    let tick = tick.time / IDLE_TICKS;
    let percent = IDLE_WATCH / 100;
    let wakes = u32::try_from(used.times).expect("a few times");
    let bound = if tick > WARM_TICK { tick * wakes * 10 } else { percent };
    let (Ran { time, times }, over) = (used, transport.flag());
    eprintln!("idle over {over}: {time:?} in {IDLE_WATCH:?}, bound {bound:?}; {times} times, a tick takes {tick:?}");
    assert!(times < IDLE_TIMES, "threads of an idle mesh of {} processes ran {times} times", pids.len());
    assert!(time < bound, "an idle mesh of {} processes took {time:?}, the bound is {bound:?}", pids.len());
    if time >= percent {
        eprintln!(
            "NOT RUN: idle mesh over {over} within 1 % of a processor: waking for nothing takes {tick:?} on this machine"
        );
    }
}

#[tokio::test]
async fn an_idle_mesh_rests_over_tcp() {
    rests(Transport::Tcp).await;
}

#[tokio::test]
async fn an_idle_mesh_rests_over_ucx() {
    if integration_tests::mesh::ucx_missing("idle mesh").await.is_none() {
        rests(Transport::Ucx).await;
    }
}

#[tokio::test]
async fn the_demo_runs_to_its_end_and_leaves_nothing() {
    let (code, out, errors) = meshctl(&["demo", "--max-new-tokens", "24"]).await;
    assert_eq!(code, 0, "{out}\n{errors}");
    for what in
        ["Wisdom is", "placement", "2 x B x S x H", "before deduplication", "measured", "nothing is left running"]
    {
        assert!(out.contains(what), "`{what}` in:\n{out}");
    }
}
