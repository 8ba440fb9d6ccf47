//! Nodes that join, fail to join, are drained and die while requests go on: the view in force serves on, and the next
//! change succeeds.
//!
//! On the shipped model over TCP, or on `MESH_TEST_MODEL` over `MESH_TEST_TRANSPORT` (tcp, ucx).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use integration_tests::checkpoint::Copy;
use integration_tests::fixture::drilled;
use integration_tests::generation::{Generation, ids_request};
use integration_tests::mesh::{binary, send_signal};
use integration_tests::patience::{eventually, soon};
use integration_tests::{Dtype, Mesh, MeshBuilder, Transport};
use mesh_proto::v1::{DrainRequest, RebalanceRequest, Sampling, StatusResponse};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

fn prompts() -> Vec<Vec<u32>> {
    (0..4).map(|i| (0..10).map(|j| 5 + (i * 31 + j * 7) % 200).collect()).collect()
}

/// Greedy and sampled requests, one after the other.
async fn answers(mesh: &Mesh) -> Vec<Generation> {
    let mut all = Vec::new();
    for (i, ids) in prompts().into_iter().enumerate() {
        let mut request = ids_request(&ids, 24);
        let temperature = Some(if i % 2 == 0 { 0.0 } else { 0.9 });
        request.sampling = Some(Sampling { temperature, seed: Some(7), ..Sampling::default() });
        all.push(mesh.generate(request).await.unwrap_or_else(|e| panic!("{e}\n{}", mesh.log())));
    }
    all
}

fn ids(answers: &[Generation]) -> Vec<Vec<u32>> {
    answers.iter().map(Generation::ids).collect()
}

async fn experts_serve(mesh: &Mesh, count: usize) {
    eventually(&format!("{count} expert nodes hold experts"), || async {
        let status = mesh.status().await;
        let holders: std::collections::BTreeSet<u32> =
            status.placement.iter().flat_map(|l| l.experts.iter().flat_map(|s| s.slots.iter().copied())).collect();
        let nodes = status.nodes.iter().filter(|n| n.role == "expert").count();
        if status.serving && (holders.len(), nodes) == (count, count) {
            Ok(())
        } else {
            Err(format!("{holders:?} of {nodes}"))
        }
    })
    .await;
}

const DTYPE: Dtype = Dtype::Bf16;

fn mesh_of(attention: u16, experts: u16) -> MeshBuilder {
    let mesh = Mesh::builder().model(&drilled()).dtype(DTYPE).transport(Transport::drilled());
    mesh.attention(attention).experts(experts)
}

#[tokio::test]
async fn nodes_join_and_are_drained_under_load_and_nobody_notices() {
    let mesh = Arc::new(mesh_of(2, 2).start().await);
    let undisturbed = ids(&answers(&mesh).await);
    let stop = Arc::new(AtomicBool::new(false));
    let (asking, stopping, wanted) = (mesh.clone(), stop.clone(), undisturbed.clone());
    let load = tokio::spawn(async move {
        let mut rounds = 0;
        while !stopping.load(Ordering::Relaxed) {
            assert_eq!(ids(&answers(&asking).await), wanted);
            rounds += 1;
        }
        rounds
    });
    let mut joined = Vec::new();
    for count in 3..=4 {
        joined.push(mesh.add("expert", DTYPE, &[]).await);
        experts_serve(&mesh, count).await;
    }
    // One by the command, one by a signal, one that was there from the start; an attention node too.
    let drain = |node: &'static str| {
        let mut client = mesh.client();
        async move { soon("a drain", client.drain(DrainRequest { node: node.into() })).await }
    };
    let drained = drain("expert-3").await.expect("another takes over").into_inner();
    assert!(drained.node.contains("slot 3") && drained.view > 0, "{drained:?}");
    let mut last = joined.pop().expect("two joined");
    assert_eq!(last.end().await.code(), Some(0), "{}", last.log());
    experts_serve(&mesh, 3).await;
    let mut first = joined.pop().expect("two joined");
    send_signal("TERM", first.pid());
    assert_eq!(first.end().await.code(), Some(0), "{}", first.log());
    experts_serve(&mesh, 2).await;
    drain("attention-0").await.expect("the other takes over");
    drain("expert-0").await.expect("the other takes over");
    experts_serve(&mesh, 1).await;
    stop.store(true, Ordering::Relaxed);
    assert!(soon("the load", load).await.expect("every answer is as undisturbed") > 0);
    let refused = drain("expert-1").await.expect_err("nobody is left to take over");
    assert!(refused.message().contains("last expert node"), "{refused}");
    let nobody = drain("expert-9").await.expect_err("there is none");
    assert!(nobody.message().contains("no node is called"), "{nobody}");
}

#[tokio::test]
async fn a_join_that_dies_in_prepare_leaves_the_view_serving_and_the_next_join_succeeds() {
    let mesh = mesh_of(1, 2).start().await;
    let before = (mesh.status().await.view, ids(&answers(&mesh).await));
    let dying = mesh.add_stopped("expert", DTYPE).await;
    assert_eq!(ids(&answers(&mesh).await), before.1, "the view before serves on while a node prepares for ever");
    assert_eq!(mesh.status().await.view, before.0);
    send_signal("KILL", dying.pid());
    assert_eq!(ids(&answers(&mesh).await), before.1);
    let _next = mesh.add("expert", DTYPE, &[]).await;
    experts_serve(&mesh, 3).await;
    assert_eq!(ids(&answers(&mesh).await), before.1);
}

#[tokio::test]
async fn a_node_of_another_dtype_or_with_other_weights_is_refused_by_name_and_changes_nothing() {
    let mesh = mesh_of(1, 1).start().await;
    let (view, undisturbed) = (mesh.status().await.view, ids(&answers(&mesh).await));
    let retuned = Copy::of(&drilled()).retuned();
    let others = [
        mesh.spawn("expert", Dtype::F32, &[]),
        mesh.spawn_of("expert", retuned.path(), DTYPE),
        mesh.spawn_of("attention", retuned.path(), DTYPE),
    ];
    for mut other in others {
        assert_ne!(other.end().await.code(), Some(0), "{}", other.log());
        assert!(other.log().contains("MODEL_MISMATCH"), "{}", other.log());
    }
    assert_eq!((mesh.status().await.view, ids(&answers(&mesh).await)), (view, undisturbed));
    let _right = mesh.add("expert", DTYPE, &[]).await;
    experts_serve(&mesh, 2).await;
}

#[tokio::test]
async fn a_node_whose_disk_is_full_joins_without_its_cache() {
    let mesh = mesh_of(1, 1).start().await;
    let undisturbed = ids(&answers(&mesh).await);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let dir = cache.path().to_str().expect("its path is UTF-8");
    // No file may grow beyond 512 bytes, its log included, which the system says as it says of a full disk: by an error of the write.
    let full = mesh.spawn_limited("expert", DTYPE, &["--cache-dir", dir], 1);
    let full = full.ready().await;
    experts_serve(&mesh, 2).await;
    assert_eq!(ids(&answers(&mesh).await), undisturbed, "{}", full.log());
    let _next = mesh.add("expert", DTYPE, &[]).await;
    experts_serve(&mesh, 3).await;
}

#[tokio::test]
async fn a_drain_that_takes_too_long_ends_and_the_next_change_succeeds() {
    let mesh = mesh_of(1, 2).flag("--replicas", "2").start().await;
    let undisturbed = ids(&answers(&mesh).await);
    let mut leaving = mesh.add("expert", DTYPE, &["--drain-max", "1"]).await;
    experts_serve(&mesh, 3).await;
    // Who would have to take over cannot.
    let experts = mesh.pids_of("expert");
    send_signal("STOP", experts[1]);
    send_signal("TERM", leaving.pid());
    assert_eq!(leaving.end().await.code(), Some(0), "{}", leaving.log());
    send_signal("CONT", experts[1]);
    assert_eq!(ids(&answers(&mesh).await), undisturbed);
    experts_serve(&mesh, 2).await;
    let _next = mesh.add("expert", DTYPE, &[]).await;
    experts_serve(&mesh, 3).await;
    assert_eq!(ids(&answers(&mesh).await), undisturbed);
}

/// Who has which slot, by process.
fn slots(status: &StatusResponse) -> BTreeSet<(u32, u32)> {
    status.nodes.iter().map(|node| (node.pid, node.slot)).collect()
}

#[tokio::test]
async fn a_router_that_is_started_again_gets_its_nodes_back_and_a_stream_goes_on_by_its_tokens() {
    let mesh = mesh_of(1, 4).start().await;
    let whole = answers(&mesh).await.remove(1);
    let places = slots(&mesh.status().await);
    let router = mesh.pids_of("router")[0];
    send_signal("KILL", router);
    let address = mesh.grpc().to_owned();
    let mut again = Command::new(binary("router-svc"));
    again.args(["--grpc", &address, "--attention-min", "1", "--experts-min", "4", "--log", "warn"]).kill_on_drop(true);
    let _again = again.stdout(std::process::Stdio::null()).spawn().expect("router-svc starts");
    eventually("the nodes are back", || async {
        let mut client = mesh.client();
        match client.status(mesh_proto::v1::StatusRequest {}).await {
            Ok(status) if status.get_ref().serving => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(slots(&mesh.status().await), places, "each has the slot that it had");
    let mut request = ids_request(&prompts()[1], 24);
    request.sampling = Some(Sampling { temperature: Some(0.9), seed: Some(7), ..Sampling::default() });
    request.request_id.clone_from(&whole.started.request_id);
    for had in [0, 1, 11, 23, 24] {
        request.resume_tokens = whole.ids()[..had].to_vec();
        let rest = mesh.generate(request.clone()).await.unwrap_or_else(|e| panic!("{e}\n{}", mesh.log()));
        assert_eq!(rest.ids(), whole.ids()[had..], "after {had}");
        assert_eq!(rest.finished.completion_tokens, 24);
        assert!(whole.text.ends_with(&rest.text), "{:?} of {:?}", rest.text, whole.text);
    }
    request.resume_tokens = vec![1; 25];
    let refused = mesh.generate(request).await.expect_err("more than max_new_tokens");
    assert!(refused.message.contains("resume_tokens"), "{refused}");
}

#[tokio::test]
async fn a_router_waits_for_an_address_that_is_taken_for_a_moment() {
    let before = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = before.local_addr().expect("an address").to_string();
    let mut router = Command::new(binary("router-svc"));
    router.args(["--grpc", &address, "--log", "warn"]).kill_on_drop(true).stdout(std::process::Stdio::piped());
    let mut router = router.spawn().expect("router-svc starts");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(router.try_wait().expect("its state").is_none(), "it did not give up at once");
    drop(before);
    let mut lines = BufReader::new(router.stdout.take().expect("its output")).lines();
    let ready = tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await.expect("in time");
    let ready = ready.expect("its output").expect("a line");
    assert!(ready.contains(&address), "{ready}");
}

/// Lets a process run a tenth of the time until it is dropped.
struct Slowed(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl Slowed {
    fn new(pid: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                send_signal("STOP", pid);
                std::thread::sleep(Duration::from_millis(45));
                send_signal("CONT", pid);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self(stop, Some(thread))
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        self.1.take().into_iter().for_each(|thread| thread.join().expect("it only sends signals"));
    }
}

#[tokio::test]
async fn a_node_that_is_slow_is_named_and_others_that_hold_its_experts_take_its_load() {
    slow_is_named_and_loses_its_load("2", 0.05).await;
}

#[tokio::test]
async fn a_node_that_is_slow_is_named_and_loses_the_experts_that_it_alone_holds() {
    slow_is_named_and_loses_its_load("1", 0.1).await;
}

/// Four nodes, one of them slowed: within ten seconds it computes no more than `share_max` of all pairs.
async fn slow_is_named_and_loses_its_load(replicas: &str, share_max: f64) {
    let mesh = Arc::new(mesh_of(1, 4).flag("--replicas", replicas).start().await);
    let undisturbed = ids(&answers(&mesh).await);
    let stop = Arc::new(AtomicBool::new(false));
    let (asking, stopping, wanted) = (mesh.clone(), stop.clone(), undisturbed.clone());
    let load = tokio::spawn(async move {
        while !stopping.load(Ordering::Relaxed) {
            assert_eq!(ids(&answers(&asking).await), wanted);
        }
    });
    let slowed = Slowed::new(mesh.pids_of("expert")[2]);
    let begun = Instant::now();
    // What it computes within half a second, as a share of what all do.
    let pairs = || async {
        let status = mesh.status().await;
        let of = |slot: Option<u32>| -> u64 {
            let nodes = status.nodes.iter().filter(|n| n.role == "expert" && slot.is_none_or(|s| s == n.slot));
            nodes.filter_map(|n| n.load.as_ref()).map(|l| l.pairs).sum()
        };
        (of(Some(2)), of(None))
    };
    eventually("its load is gone", || async {
        let before = pairs().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let after = pairs().await;
        let share = (after.0 - before.0) as f64 / (after.1 - before.1).max(1) as f64;
        if share < share_max { Ok(()) } else { Err(format!("{share}")) }
    })
    .await;
    eprintln!("the load of a slowed node was gone after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // It is asked for nothing by now, and is named all the same.
    eventually("expert-2 is named as slow", || async {
        let output =
            Command::new(binary("meshctl")).args(["stalls", "--over", "1", "--json", "--grpc", mesh.grpc()]).output();
        let output = soon("meshctl stalls", output).await.expect("meshctl runs");
        let told: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
        let slow: Vec<u64> = told["slow"].as_array().into_iter().flatten().filter_map(|s| s[0].as_u64()).collect();
        if slow == [2] { Ok(()) } else { Err(told.to_string()) }
    })
    .await;
    eprintln!("a slowed node was named after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    drop(slowed);
    stop.store(true, Ordering::Relaxed);
    soon("the load", load).await.expect("every answer is as undisturbed");
}

#[tokio::test]
async fn a_rebalance_says_what_would_move_and_does_nothing_where_nothing_is_to_be_done() {
    let mesh = mesh_of(1, 2).start().await;
    let view = mesh.status().await.view;
    let dry = mesh.client().rebalance(RebalanceRequest { dry_run: true }).await.expect("a plan").into_inner();
    assert!(dry.moves.is_empty() && dry.view == 0, "an even mesh: {dry:?}");
    assert_eq!(mesh.status().await.view, view);
    let output = Command::new(binary("meshctl")).args(["rebalance", "--dry-run", "--grpc", mesh.grpc()]).output();
    let output = soon("meshctl rebalance", output).await.expect("meshctl runs");
    assert!(String::from_utf8_lossy(&output.stdout).contains("nothing to move"), "{output:?}");
}
