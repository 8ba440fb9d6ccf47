//! Views: who is told what, in which order, and what a failure leaves behind.

use mesh_core::view::View;
use mesh_proto::v1;
use mesh_proto::v1::node_message::Message as Say;
use mesh_proto::v1::router_message::Message as Order;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::harness::{Node, Router, calm, eventually, registration, served, soon};

#[tokio::test]
async fn all_prepare_then_experts_commit_then_attention_nodes() {
    let mut mesh = served(calm(), 2).await;
    let mut kinds = Vec::new();
    for _ in 0..6 {
        let (node, order) = soon("an order", mesh.orders.recv()).await.unwrap();
        let is_attention = node == mesh.attention.registered.node;
        kinds.push(match order {
            Order::Prepare(view) => {
                let view = View::try_from(view).unwrap();
                assert_eq!((view.attention.len(), view.experts.len(), view.placement.experts()), (1, 2, 8));
                "prepare"
            }
            Order::Commit(_) if is_attention => "commit attention",
            Order::Commit(_) => "commit expert",
            other => panic!("{other:?}"),
        });
    }
    let expected = ["prepare", "prepare", "prepare", "commit expert", "commit expert", "commit attention"];
    assert_eq!(kinds, expected);
    let status = mesh.router.status().await;
    let roles: Vec<(&str, u32)> = status.nodes.iter().map(|n| (n.role.as_str(), n.slot)).collect();
    assert_eq!(roles, [("attention", 0), ("expert", 0), ("expert", 1)]);
    assert_eq!(status.placement.len(), 2);
    assert_eq!(status.model.unwrap().name, "tiny");
}

#[tokio::test]
async fn an_experts_death_is_followed_by_a_view_of_the_survivors_and_a_join_by_one_with_it() {
    let mut mesh = served(calm(), 3).await;
    mesh.experts.remove(1).kill().await;
    mesh.router.view(2).await;
    let held: Vec<u32> = slots(&mesh.router.status().await);
    assert_eq!(held, [0, 2]);
    let new = Node::join(&mesh.router, registration(v1::NodeRole::Expert)).await;
    assert_eq!(new.registered.slot, 1, "the slot is free again");
    let _new = new.obey(mesh.record.clone());
    mesh.router.view(3).await;
    assert_eq!(slots(&mesh.router.status().await), [0, 1, 2]);
}

fn slots(status: &v1::StatusResponse) -> Vec<u32> {
    let mut slots: Vec<u32> =
        status.placement.iter().flat_map(|l| &l.experts).flat_map(|e| e.slots.iter().copied()).collect();
    slots.sort_unstable();
    slots.dedup();
    slots
}

#[tokio::test]
async fn a_failed_preparation_is_abandoned_and_the_old_view_serves_on() {
    let mut mesh = served(calm(), 1).await;
    let mut bad = Node::join(&mesh.router, registration(v1::NodeRole::Expert)).await;
    let view = bad.prepare().await.view;
    bad.say(Say::Failed(v1::ViewFailed { view, reason: "no space left".into() })).await;
    assert_eq!(bad.order().await, Order::Abandon(v1::ViewId { view }));
    soon("the abandonment at the others", async {
        while mesh.orders.recv().await.unwrap().1 != Order::Abandon(v1::ViewId { view }) {}
    })
    .await;
    let status = mesh.router.status().await;
    assert_eq!((status.view, status.serving), (1, true));
    mesh.router.generate("still here").await.unwrap();
    // It is tried again, under a larger id; this time it works.
    let again = bad.prepare().await;
    assert!(again.view > view);
    bad.say(Say::Prepared(v1::ViewPrepared { view: again.view })).await;
    assert_eq!(bad.order().await, Order::Commit(v1::ViewId { view: again.view }));
    bad.say(Say::Committed(v1::ViewCommitted { view: again.view })).await;
    mesh.router.view(again.view).await;
}

#[tokio::test]
async fn health_says_serving_only_while_there_is_a_view_that_can_be_served() {
    let router = Router::start(calm()).await;
    let health = async |name: &str| {
        let request = HealthCheckRequest { service: name.into() };
        HealthClient::new(router.channel.clone()).check(request).await.unwrap().into_inner().status()
    };
    for name in ["", "expertmesh.v1.Mesh"] {
        eventually("health before nodes", async || health(name).await == ServingStatus::NotServing).await;
    }
    let (record, _orders) = tokio::sync::mpsc::unbounded_channel();
    let at = v1::RegisterRequest { addr: "http://127.0.0.1:9".into(), ..registration(v1::NodeRole::Attention) };
    let _attention = Node::join(&router, at).await.obey(record.clone());
    let expert = Node::join(&router, registration(v1::NodeRole::Expert)).await.obey(record);
    for name in ["", "expertmesh.v1.Mesh"] {
        eventually("health with a view", async || health(name).await == ServingStatus::Serving).await;
    }
    expert.kill().await;
    for name in ["", "expertmesh.v1.Mesh"] {
        eventually("health without experts", async || health(name).await == ServingStatus::NotServing).await;
    }
}

#[tokio::test]
async fn reflection_names_the_services() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let router = Router::start(calm()).await;
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(router.channel.clone());
    let mut answers = client.server_reflection_info(tokio_stream::iter([list])).await.unwrap().into_inner();
    let answer = soon("the list", answers.message()).await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
    for name in ["expertmesh.v1.Mesh", "expertmesh.v1.Control", "grpc.health.v1.Health"] {
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
}
