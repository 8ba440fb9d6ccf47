//! Bad input of every kind: a typed, clear error each, and everyone else's streams untouched.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use integration_tests::checkpoint::Copy;
use integration_tests::fixture;
use integration_tests::generation::generate;
use integration_tests::mesh::binary;
use integration_tests::patience::{patience, soon};
use integration_tests::{Generation, Mesh, Transport, ids_request};
use mesh_proto::v1::control_client::ControlClient;
use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::{GenerateRequest, NodeRole, RegisterRequest, Sampling};
use mesh_proto::{Code, MeshError};
use tokio::process::Command;
use tokio::task::JoinHandle;

const BYSTANDER_TOKENS: u32 = 900;

/// A stream that runs while bad things happen to others.
pub struct Bystander(JoinHandle<Result<Generation, MeshError>>, Vec<u32>);

impl Bystander {
    pub async fn start(mesh: &Mesh) -> Self {
        let request = ids_request(&[57, 280, 718, 339], BYSTANDER_TOKENS);
        let alone = mesh.generate(request.clone()).await.expect("a stream with nobody else").ids();
        Self(tokio::spawn(generate(mesh.client(), request)), alone)
    }

    pub async fn assert_untouched(self) {
        let answer = soon("the bystander", self.0).await.expect("no panic").expect("its stream goes on");
        assert_eq!(answer.ids(), self.1, "its tokens are those that it gets alone");
    }
}

fn sampled(change: impl FnOnce(&mut Sampling)) -> GenerateRequest {
    let mut sampling = Sampling { temperature: Some(1.0), ..Sampling::default() };
    change(&mut sampling);
    GenerateRequest { sampling: Some(sampling), ..ids_request(&[100], 4) }
}

/// What is asked, the code that it is refused with, and the field that is named.
fn bad_requests(vocab: u32, context: u32) -> Vec<(&'static str, GenerateRequest, Code, &'static str)> {
    use Code::{ContextExceeded, InvalidRequest};
    let prompt = |prompt| GenerateRequest { prompt, ..ids_request(&[], 4) };
    let long: Vec<u32> = (0..=context).map(|i| i % 100).collect();
    vec![
        ("token id out of range", ids_request(&[1, vocab], 4), InvalidRequest, "token_ids"),
        ("largest token id", ids_request(&[u32::MAX], 4), InvalidRequest, "token_ids"),
        ("prompt past the context", ids_request(&long, 1), ContextExceeded, ""),
        ("prompt and output past the context", ids_request(&[1, 2], context), ContextExceeded, ""),
        ("no prompt", prompt(None), InvalidRequest, "prompt"),
        ("empty ids", ids_request(&[], 4), InvalidRequest, ""),
        ("empty text", prompt(Some(Prompt::Text(String::new()))), InvalidRequest, ""),
        ("zero max tokens", ids_request(&[1], 0), InvalidRequest, "max_new_tokens"),
        ("absurd max tokens", ids_request(&[1], u32::MAX), ContextExceeded, ""),
        ("NaN temperature", sampled(|s| s.temperature = Some(f32::NAN)), InvalidRequest, "temperature"),
        ("negative temperature", sampled(|s| s.temperature = Some(-1.0)), InvalidRequest, "temperature"),
        ("infinite temperature", sampled(|s| s.temperature = Some(f32::INFINITY)), InvalidRequest, "temperature"),
        ("top_p of 0", sampled(|s| s.top_p = Some(0.0)), InvalidRequest, "top_p"),
        ("top_p over 1", sampled(|s| s.top_p = Some(1.5)), InvalidRequest, "top_p"),
        ("NaN min_p", sampled(|s| s.min_p = Some(f32::NAN)), InvalidRequest, "min_p"),
        ("no repetition penalty", sampled(|s| s.repetition_penalty = Some(0.0)), InvalidRequest, "repetition_penalty"),
        ("huge frequency penalty", sampled(|s| s.frequency_penalty = Some(9.0)), InvalidRequest, "frequency_penalty"),
        ("NaN presence penalty", sampled(|s| s.presence_penalty = Some(f32::NAN)), InvalidRequest, "presence_penalty"),
        (
            "too many logprobs",
            GenerateRequest { logprobs: Some(21), ..ids_request(&[1], 4) },
            InvalidRequest,
            "logprobs",
        ),
    ]
}

#[tokio::test]
async fn a_bad_request_is_refused_by_name_and_nobody_else_notices() {
    let mesh = Mesh::builder().experts(2).start().await;
    let model = mesh.status().await.model.expect("the model is known");
    let bystander = Bystander::start(&mesh).await;
    for (what, request, code, field) in bad_requests(model.vocab, model.context) {
        let error = mesh.generate(request).await.err().unwrap_or_else(|| panic!("{what}: was served"));
        let right = error.code == code || (code == Code::ContextExceeded && error.code == Code::InvalidRequest);
        assert!(right, "{what}: {error} (field `{}`)", error.field);
        assert!(error.field.contains(field), "{what}: names the field `{}`: {error}", error.field);
        assert!(!error.message.is_empty(), "{what}: says nothing");
    }
    bystander.assert_untouched().await;
    mesh.assert_idle().await;
}

/// Starts an expert node on its own, which must refuse to serve, and returns what it said.
async fn refused_node(service: &str, router: &str, model: &Path, extra: &[&str]) -> String {
    let mut command = Command::new(binary(service));
    command.args([
        "--router",
        &format!("http://{router}"),
        "--listen",
        "127.0.0.1:0",
        "--dtype",
        "f32",
        "--threads",
        "1",
    ]);
    command.arg("--model").arg(model).args(["--transport", "tcp"]).args(extra).kill_on_drop(true);
    let output = soon("a node that must be refused", command.output()).await.expect("the service runs");
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{service} ended well: {log}");
    assert!(!log.contains("panicked"), "{service} panicked: {log}");
    log
}

#[tokio::test]
async fn a_node_that_does_not_belong_is_refused_and_the_mesh_serves_on() {
    let mesh = Mesh::builder().experts(2).transport(Transport::Tcp).start().await;
    let bystander = Bystander::start(&mesh).await;
    let same_slot = refused_node("expert-svc", mesh.grpc(), &fixture::tiny_moe(), &["--slot", "0"]).await;
    assert!(same_slot.contains("slot"), "the taken slot is named: {same_slot}");
    let same_slot = refused_node("attention-svc", mesh.grpc(), &fixture::tiny_moe(), &["--slot", "0"]).await;
    assert!(same_slot.contains("slot"), "the taken slot is named: {same_slot}");
    let other = fixture::shipped("qwen3moe-v5config");
    let other_model = refused_node("expert-svc", mesh.grpc(), &other, &[]).await;
    assert!(other_model.contains("model"), "the other model is named: {other_model}");
    for service in ["expert-svc", "attention-svc"] {
        let other_isa = refused_node(service, mesh.grpc(), &fixture::tiny_moe(), &["--isa", "portable"]).await;
        assert!(other_isa.contains("compute cpu portable"), "the other set is named: {other_isa}");
        assert!(other_isa.contains("--isa"), "the remedy is named: {other_isa}");
    }
    let no_isa = refused_node("expert-svc", mesh.grpc(), &fixture::tiny_moe(), &["--isa", "sse9"]).await;
    assert!(no_isa.contains("sse9"), "the unknown set is named: {no_isa}");
    let error = register_as_version("0.0.0-other", &mesh).await;
    assert_eq!(error.code, Code::VersionMismatch, "{error}");
    bystander.assert_untouched().await;
    assert_eq!(mesh.status().await.nodes.len(), 3, "nobody joined");
}

async fn register_as_version(version: &str, mesh: &Mesh) -> MeshError {
    let model = mesh.status().await.model;
    let mut control = ControlClient::connect(format!("http://{}", mesh.grpc())).await.expect("the router answers");
    let request = RegisterRequest {
        role: NodeRole::Expert as i32,
        name: "stranger".to_owned(),
        version: version.to_owned(),
        model_digest: vec![0; 32],
        model,
        addr: "tcp://127.0.0.1:1".to_owned(),
        ..RegisterRequest::default()
    };
    let refused = soon("a registration", control.register(request)).await.expect_err("another version");
    MeshError::from_status(&refused)
}

#[tokio::test]
async fn strangers_on_the_data_port_get_nowhere() {
    let mesh = Mesh::builder().experts(2).transport(Transport::Tcp).start().await;
    let bystander = Bystander::start(&mesh).await;
    let addr = mesh.expert_addr(0);
    let addr = addr.split_once("://").map_or(addr.as_str(), |(_, a)| a).to_owned();

    let silent = TcpStream::connect(&addr).expect("the port is open");
    let garbage: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\nHost: mesh\r\n\r\n".to_vec(),
        vec![0; 4096],
        vec![0xff; 1 << 20],
        (0..=255).cycle().take(70_000).collect(),
    ];
    for bytes in &garbage {
        let mut stranger = TcpStream::connect(&addr).expect("the port is still open");
        stranger.set_read_timeout(Some(patience())).expect("a timeout");
        // The node may close before it has read everything.
        let _ = stranger.write_all(bytes);
        let mut answer = Vec::new();
        let closed = tokio::task::spawn_blocking(move || stranger.read_to_end(&mut answer).map(|_| answer.len()));
        match soon("the node closes a stranger's connection", closed).await.expect("no panic") {
            Ok(answered) => assert!(answered <= 256, "a stranger was told {answered} bytes"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
    }
    drop(silent);
    bystander.assert_untouched().await;
    mesh.generate(ids_request(&[100], 8)).await.expect("the mesh serves on");
}

/// A checkpoint that no mesh may serve: it says so, names the culprit, and ends with an error.
async fn never_serves(what: &str, copy: Copy, culprit: &str) {
    let started = Mesh::builder().model(copy.path()).transport(Transport::Tcp).try_start().await;
    let error = match started {
        Ok(mesh) => panic!("{what}: was served\n{}", mesh.log()),
        Err(error) => error,
    };
    assert_ne!(error.status.code(), Some(0), "{what}");
    assert!(error.log.contains(culprit), "{what}: `{culprit}` is named in:\n{}", error.log);
    assert!(!error.log.contains("panicked"), "{what}: {}", error.log);
}

const EXPERT: &str = "model.layers.1.mlp.experts.3.up_proj.weight";
const QUERY: &str = "model.layers.0.self_attn.q_proj.weight";

fn tiny() -> Copy {
    Copy::of(&fixture::tiny_moe())
}

#[tokio::test]
async fn truncated_missing_misshapen_and_extra_tensors_are_named() {
    never_serves("truncated file", tiny().truncated(), "model.safetensors").await;
    let missing = |name: &'static str| tiny().tensors(move |t| assert!(t.remove(name).is_some(), "{name}"));
    never_serves("missing expert", missing(EXPERT), EXPERT).await;
    never_serves("missing attention tensor", missing(QUERY), QUERY).await;
    let misshapen = tiny().tensors(|t| {
        let tensor = t.get_mut(EXPERT).expect("the expert's tensor");
        tensor.shape[0] -= 1;
        tensor.data.truncate(tensor.data.len() - tensor.shape[1] * 2);
    });
    never_serves("misshapen expert", misshapen, EXPERT).await;
    let extra = tiny().tensors(|t| {
        let tensor = t[EXPERT].clone();
        t.insert("model.layers.1.mlp.experts.99.up_proj.weight".to_owned(), tensor);
    });
    never_serves("extra tensor", extra, "experts.99").await;
}

#[tokio::test]
async fn configs_that_cannot_be_served_are_named() {
    let unknown = tiny().config(|c| {
        c["architectures"] = serde_json::json!(["FancyForCausalLM"]);
        c["model_type"] = "fancy".into();
    });
    never_serves("unknown architecture", unknown, "FancyForCausalLM").await;
    let contradicts = tiny().config(|c| c["hidden_size"] = 256.into());
    never_serves("config that contradicts the weights", contradicts, "256").await;
    let experts = tiny().config(|c| c["num_experts"] = 16.into());
    never_serves("more experts than weights", experts, "experts").await;
    let no_json = tiny();
    std::fs::write(no_json.path().join("config.json"), "{").expect("a writable folder");
    never_serves("config that is no JSON", no_json, "config.json").await;
}
