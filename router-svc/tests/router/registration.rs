//! Who is taken in, who is not, and what they are told.

use std::time::Duration;

use mesh_proto::{Code, MeshError, v1};
use router_svc::RouterConfig;
use tokio_stream::wrappers::ReceiverStream;

use crate::harness::{Node, Router, registration, session, soon};

async fn refused(router: &Router, request: v1::RegisterRequest) -> MeshError {
    MeshError::detail(&router.control().register(request).await.unwrap_err()).expect("a typed error")
}

#[tokio::test]
async fn the_secret_goes_to_registered_nodes_and_is_the_same_for_all() {
    let router = Router::start(RouterConfig::default()).await;
    let register = async |role| router.control().register(registration(role)).await.unwrap().into_inner();
    let first = register(v1::NodeRole::Expert).await;
    let second = register(v1::NodeRole::Attention).await;
    assert_eq!(first.secret.len(), 32);
    assert_eq!(first.secret, second.secret);
    assert_ne!(first.token, second.token);
    assert_ne!(first.node, second.node);
    assert_eq!((first.heartbeat_ms, first.lease_ms), (500, 10_000));
    let other = Router::start(RouterConfig::default()).await;
    let elsewhere = other.control().register(registration(v1::NodeRole::Expert)).await.unwrap().into_inner();
    assert_ne!(first.secret, elsewhere.secret, "each router makes its own");
}

#[tokio::test]
async fn a_node_of_another_slot_model_dtype_or_version_is_refused_with_both_named() {
    let router = Router::start(RouterConfig::default()).await;
    let base = || registration(v1::NodeRole::Expert);
    let at = |slot| v1::RegisterRequest { slot: Some(slot), ..base() };
    let _held = Node::join(&router, at(2)).await;
    let error = refused(&router, at(2)).await;
    assert_eq!(error.code, Code::SlotTaken);
    assert!(error.node.contains("expert slot 2"), "{error:?}");
    let error = refused(&router, v1::RegisterRequest { model_digest: vec![6; 32], ..base() }).await;
    assert_eq!((error.code, error.field.as_str()), (Code::ModelMismatch, "model_digest"));
    assert!(error.message.contains("06060606") && error.message.contains("05050505"), "{}", error.message);
    let bf16 = v1::ModelInfo { dtype: "bf16".into(), ..base().model.unwrap() };
    let error = refused(&router, v1::RegisterRequest { model: Some(bf16), ..base() }).await;
    assert_eq!(error.code, Code::ModelMismatch);
    assert!(error.message.contains("bf16") && error.message.contains("f32"), "{}", error.message);
    let error = refused(&router, v1::RegisterRequest { version: "0.0.9".into(), ..base() }).await;
    assert_eq!(error.code, Code::VersionMismatch);
    assert!(error.message.contains("0.0.9") && error.message.contains(env!("CARGO_PKG_VERSION")));
    let attention = v1::RegisterRequest { addr: "nonsense at all".into(), ..registration(v1::NodeRole::Attention) };
    assert_eq!(refused(&router, attention).await.field, "addr");
    assert_eq!(router.status().await.nodes.len(), 1);
}

#[tokio::test]
async fn a_session_with_a_garbage_token_or_without_hello_is_refused() {
    let config = RouterConfig { hello_max: Duration::from_millis(300), ..RouterConfig::default() };
    let router = Router::start(config).await;
    for (node, token) in [(1, vec![]), (1, vec![0; 32]), (77, vec![1; 4000])] {
        let (_say, mut orders) = session(&router, node, token).await;
        let status = soon("the refusal", orders.message()).await.unwrap_err();
        assert_eq!(MeshError::detail(&status).unwrap().field, "token");
    }
    let heartbeat = v1::node_message::Message::Heartbeat(v1::NodeLoad::default());
    let first = tokio_stream::iter([v1::NodeMessage { message: Some(heartbeat) }]);
    let mut orders = router.control().session(first).await.unwrap().into_inner();
    let status = soon("the refusal", orders.message()).await.unwrap_err();
    assert_eq!(MeshError::detail(&status).unwrap().code, Code::InvalidRequest);
    let (_silent, outbound) = tokio::sync::mpsc::channel(1);
    let mut orders = router.control().session(ReceiverStream::new(outbound)).await.unwrap().into_inner();
    let status = soon("the refusal", orders.message()).await.unwrap_err();
    assert_eq!(MeshError::detail(&status).unwrap().code, Code::Deadline);
}

#[tokio::test]
async fn a_node_without_heartbeats_loses_its_lease_and_its_slot_and_is_told() {
    let config = RouterConfig {
        heartbeat: Duration::from_millis(100),
        lease: Duration::from_millis(400),
        ..RouterConfig::default()
    };
    let router = Router::start(config).await;
    let taken = v1::RegisterRequest { slot: Some(0), ..registration(v1::NodeRole::Expert) };
    let mut node = Node::join(&router, taken.clone()).await;
    match node.order().await {
        v1::router_message::Message::Dismissed(d) => assert!(d.why.contains("heartbeat"), "{}", d.why),
        other => panic!("expected Dismissed, got {other:?}"),
    }
    assert_eq!(soon("the session's end", node.orders.message()).await.unwrap(), None);
    let again = router.control().register(taken).await.unwrap().into_inner();
    assert_eq!(again.slot, 0);
    assert!(again.node > node.registered.node);
}
