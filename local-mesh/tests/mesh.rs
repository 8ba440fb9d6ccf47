//! Whole meshes in this process, from the client's side.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use local_mesh::{LocalMesh, LocalMeshConfig, LocalMeshError};
use mesh_kernels::Dtype;
use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::generate_response::Event;
use mesh_proto::v1::mesh_client::MeshClient;
use mesh_proto::v1::{GenerateRequest, StatusRequest, TokenIds};
use mesh_transport::TransportChoice;
use tokio_stream::StreamExt;

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

fn fixture() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-moe"))
}

fn config(attention: u16, experts: u16) -> LocalMeshConfig {
    let mut config = LocalMeshConfig::new(fixture(), attention, experts).dtype(Dtype::F32).threads(1);
    config.start_max = PATIENCE;
    config
}

/// The first golden prompt and what transformers continues it with in float32.
fn golden() -> (Vec<u32>, Vec<u32>) {
    let text = std::fs::read_to_string(fixture().join("golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |v: &serde_json::Value| v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
    let prompt = &golden["prompts"][0];
    (ids(&prompt["ids"]), ids(&prompt["f32"]["tokens"]))
}

/// Greedy tokens, and the bits of the logits that each was chosen from.
async fn generate(grpc: SocketAddr, prompt: &[u32], count: usize) -> (Vec<u32>, Vec<u8>) {
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: prompt.to_vec() })),
        max_new_tokens: Some(count as u32),
        ignore_eos: true,
        return_logits: true,
        ..GenerateRequest::default()
    };
    let client = MeshClient::connect(format!("http://{grpc}")).await.unwrap();
    let mut client = client.max_decoding_message_size(64 << 20);
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let (mut tokens, mut logits) = (Vec::new(), Vec::new());
    while let Some(response) = stream.next().await {
        if let Some(Event::Tokens(run)) = response.unwrap().event {
            for token in run.tokens {
                tokens.push(token.id);
                logits.extend(token.logits);
            }
        }
    }
    (tokens, logits)
}

#[tokio::test]
async fn every_shape_and_transport_speaks_the_golden_tokens_from_the_same_bits() {
    let (prompt, golden) = golden();
    let shapes = [(1, 1, TransportChoice::Local), (2, 3, TransportChoice::Local), (1, 2, TransportChoice::Tcp)];
    let mut first: Option<Vec<u8>> = None;
    for (attention, experts, transport) in shapes {
        let mesh = LocalMesh::start(config(attention, experts).transport(transport)).await.unwrap();
        let grpc = mesh.grpc_addr();
        let roles: Vec<&str> = mesh.nodes().iter().map(|n| n.role).collect();
        assert_eq!(roles.len(), usize::from(1 + attention + experts));
        assert!(mesh.nodes().iter().all(|n| !n.addr.is_empty()));
        let (tokens, logits) = tokio::time::timeout(PATIENCE, generate(grpc, &prompt, golden.len())).await.unwrap();
        assert_eq!(tokens, golden, "{attention}A{experts}E over {transport}");
        assert!(!logits.is_empty());
        assert!(first.get_or_insert_with(|| logits.clone()) == &logits, "{attention}A{experts}E over {transport}");

        let mut client = MeshClient::connect(format!("http://{grpc}")).await.unwrap();
        let status = client.status(StatusRequest {}).await.unwrap().into_inner();
        assert!(status.serving && status.nodes.len() == usize::from(attention + experts));
        assert_eq!(mesh.stop().await, Vec::<String>::new(), "every thread ended in time");
        assert!(tokio::net::TcpStream::connect(grpc).await.is_err(), "nobody listens any more");
    }
}

#[tokio::test]
async fn a_mesh_that_cannot_be_started_says_who_is_at_fault_and_leaves_nothing() {
    let none = LocalMesh::start(config(1, 0)).await.err().unwrap();
    assert!(matches!(none, LocalMeshError::NoNodes { experts: 0, .. }) && none.is_configuration());

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut on_taken = config(1, 1);
    on_taken.grpc = taken.local_addr().unwrap();
    let taken = LocalMesh::start(on_taken).await.err().unwrap();
    assert!(matches!(taken, LocalMeshError::Listen { .. }), "{taken}");

    let mut nowhere = config(1, 1);
    nowhere.expert_node.model_dir = "/nonexistent/model".into();
    let nowhere = LocalMesh::start(nowhere).await.err().unwrap();
    assert!(matches!(&nowhere, LocalMeshError::Node { node, .. } if node == "expert-0"), "{nowhere}");
    assert!(nowhere.is_configuration() && nowhere.to_string().contains("/nonexistent/model"), "{nowhere}");
}
