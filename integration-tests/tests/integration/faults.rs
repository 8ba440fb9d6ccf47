//! A data plane that loses, delays, repeats, swaps, damages and misnames frames and cuts channels: not one wrong token, not one
//! failed request, and every fault counted under its name, where it was made and where it was refused.
//!
//! `MESH_FAULT_FRAMES` sets how many frames go over each transport at least: 100,000 for the long form. `MESH_TEST_MODEL` names
//! another model than the shipped one.

use std::collections::BTreeMap;
use std::time::Instant;

use integration_tests::fixture::drilled;
use integration_tests::generation::generate;
use integration_tests::mesh::{is_running, ucx_missing};
use integration_tests::patience::soon;
use integration_tests::{Dtype, Mesh, MeshBuilder, Transport, ids_request};
use mesh_proto::v1::{GenerateRequest, NodeStatus, Sampling, StatusResponse};
use tokio::task::JoinSet;

/// Frames over each transport, unless the environment says otherwise.
const FRAMES: u64 = 6_000;
/// So many times as many frames go at most, until every kind of fault was made and refused.
const FRAMES_FACTOR_MAX: u64 = 8;
/// Every second one is greedy, the others sample.
const REQUESTS: u32 = 24;
/// In the short form each kind of fault is made so often, about.
const OF_EACH: f64 = 12.0;
/// How often each kind is made at most: of so many frames one.
const RARE: f64 = 0.001;
/// Kinds of faults but delays, which need no special rate.
const KINDS: [&str; 10] = [
    "drop",
    "duplicate",
    "reorder",
    "corrupt",
    "stale",
    "wrong_lane",
    "wrong_layer",
    "wrong_pairs",
    "wrong_seq",
    "cut",
];
/// Faults, and under which names they are refused: by an expert node or by the attention node.
const REFUSALS: [(&str, &[&str]); 7] = [
    ("duplicate", &["protocol", "duplicate answer"]),
    ("corrupt", &["bad frame"]),
    ("stale", &["stale_view", "wrong view"]),
    ("wrong_lane", &["late answer", "unknown lane"]),
    ("wrong_layer", &["wrong layer", "unknown_layer", "expert_not_held"]),
    ("wrong_pairs", &["bad_body", "wrong rows"]),
    ("wrong_seq", &["late answer"]),
];

fn frames() -> u64 {
    std::env::var("MESH_FAULT_FRAMES").ok().and_then(|frames| frames.parse().ok()).unwrap_or(FRAMES)
}

fn specification(frames: u64) -> String {
    let rate = (OF_EACH / frames as f64).max(RARE);
    // Mostly there is nobody to overtake: a node is sent the next frame when it has answered this one.
    let of_kind = |kind: &str| if kind == "reorder" { 8.0 * rate } else { rate };
    let rates: Vec<String> = KINDS.iter().map(|kind| format!("{kind}={}", of_kind(kind))).collect();
    format!("seed=11,delay=0.01:1ms-5ms,{}", rates.join(","))
}

/// Prompts from one token to several frames of rows; streams of every length.
fn requests() -> Vec<GenerateRequest> {
    let request = |i: u32| {
        let prompt: Vec<u32> = (0..1 + i * 29 % 150).map(|j| 100 + (i * 31 + j * 17) % 1900).collect();
        let sampling = Sampling { temperature: Some(0.8), seed: Some(u64::from(i)), ..Sampling::default() };
        let sampling = (i % 2 == 1).then_some(sampling);
        GenerateRequest { sampling, ..ids_request(&prompt, 24 + i * 7 % 40) }
    };
    (0..REQUESTS).map(request).collect()
}

/// Sends all requests at once and gives their tokens.
async fn answers(mesh: &Mesh) -> Vec<Vec<u32>> {
    let mut streams = JoinSet::new();
    for (i, request) in requests().into_iter().enumerate() {
        let client = mesh.client();
        streams.spawn(async move { (i, generate(client, request).await) });
    }
    let mut answers = BTreeMap::new();
    while let Some(done) = soon("an answer", streams.join_next()).await {
        let (i, answer) = done.expect("no panic");
        let answer = answer.unwrap_or_else(|e| panic!("request {i} failed: {e}\n{}", mesh.log()));
        answers.insert(i, answer.ids());
    }
    answers.into_values().collect()
}

/// What nodes of a role counted under a name.
fn counted(status: &StatusResponse, role: &str, name: &str) -> u64 {
    let nodes = status.nodes.iter().filter(|node| node.role == role);
    nodes.filter_map(|node| node.load.as_ref()?.refused.get(name)).sum()
}

/// Frames that attention nodes sent and received.
fn moved(status: &StatusResponse) -> u64 {
    let load = |node: &NodeStatus| node.load.as_ref().map_or(0, |load| load.frames_sent + load.frames_received);
    status.nodes.iter().filter(|node| node.role == "attention").map(load).sum()
}

fn builder(transport: Transport) -> MeshBuilder {
    let mesh = Mesh::builder().model(&drilled()).dtype(Dtype::Bf16).transport(transport);
    // Few enough that two micro-batches of a step are away at once.
    mesh.experts(4).flag("--replicas", "2").micro_batch_rows(4)
}

/// What is not counted as it should be.
fn uncounted(status: &StatusResponse) -> Result<(), String> {
    let injected = |kind: &str| counted(status, "attention", &format!("injected_{kind}"));
    let refused = |name: &&str| counted(status, "attention", name) + counted(status, "expert", name);
    if let Some(kind) = KINDS.iter().chain(&["delay"]).find(|kind| injected(kind) == 0) {
        return Err(format!("no {kind} was made"));
    }
    if let Some((kind, names)) = REFUSALS.iter().find(|(_, names)| names.iter().map(refused).sum::<u64>() == 0) {
        return Err(format!("{} frames with a {kind} and none refused as {names:?}", injected(kind)));
    }
    // Both ends refuse, each what it is sent.
    for (role, name) in [("expert", "bad frame"), ("attention", "bad frame"), ("expert", "stale_view")] {
        if counted(status, role, name) == 0 {
            return Err(format!("no {role} node counted a {name}"));
        }
    }
    // A damaged frame may be lost with its channel; one that was not damaged is never taken for it.
    let damaged = refused(&"bad frame");
    if damaged > injected("corrupt") { Err(format!("{damaged} bad frames")) } else { Ok(()) }
}

async fn not_one_wrong_token(transport: Transport) {
    let wanted = answers(&builder(transport).start().await).await;
    let frames = frames();
    let faulty = builder(transport).flag("--faults", &specification(frames)).env("MESH_SILENCE_MS", "50").start().await;
    let begun = Instant::now();
    let (mut rounds, mut tokens) = (0, 0);
    let status = loop {
        let found = answers(&faulty).await;
        for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            assert_eq!(found, wanted, "request {i} of round {rounds}\n{}", faulty.log());
        }
        (rounds, tokens) = (rounds + 1, tokens + found.iter().map(Vec::len).sum::<usize>());
        let status = faulty.status().await;
        match uncounted(&status) {
            Ok(()) if moved(&status) >= frames => break status,
            // By chance a kind may be missing for a while.
            Err(what) if moved(&status) >= FRAMES_FACTOR_MAX * frames => panic!("{what}\n{}", faulty.log()),
            _ => {}
        }
    };
    let took = begun.elapsed();
    eprintln!("{} frames over {} in {took:.1?}: {rounds} rounds, {tokens} tokens", moved(&status), transport.flag());
    faulty.assert_idle().await;
    for node in status.nodes.iter().filter(|node| node.role != "router") {
        let refused: BTreeMap<_, _> = node.load.iter().flat_map(|load| &load.refused).collect();
        eprintln!("{}: {refused:?}", node.name);
    }
    assert!(faulty.pids().into_iter().all(is_running), "{}", faulty.log());
}

#[tokio::test]
async fn not_one_wrong_token_over_a_faulty_tcp() {
    not_one_wrong_token(Transport::Tcp).await;
}

#[tokio::test]
async fn not_one_wrong_token_over_a_faulty_ucx() {
    if ucx_missing("faults").await.is_none() {
        not_one_wrong_token(Transport::Ucx).await;
    }
}
