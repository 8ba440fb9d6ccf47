//! Requests: the way to an attention node, and every way that a stream can end.

use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_proto::v1::generate_response::Event;
use mesh_proto::{Code, MeshError, v1};
use router_svc::RouterConfig;
use tonic::{Code as GrpcCode, Request};

use crate::harness::{FakeAttention, Node, Router, Served, calm, eventually, prompt, read, registration, served, soon};

async fn drained(mesh: &Served) {
    eventually("all requests' places given back", async || mesh.router.status().await.requests_active == 0).await;
    eventually("all streams closed", async || mesh.fake.open.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn a_request_is_named_seeded_and_streamed_to_its_end() {
    let mesh = served(calm(), 1).await;
    let (events, error) = read(mesh.router.generate("go").await.unwrap()).await;
    assert_eq!(error, None);
    let ids: Vec<u32> =
        events.iter().filter_map(|e| if let Event::Tokens(t) = e { Some(t.tokens[0].id) } else { None }).collect();
    assert_eq!(ids, [1, 2, 3]);
    assert!(matches!(&events[0], Event::Started(s) if s.request_id.starts_with("req-")));
    assert!(matches!(events.last(), Some(Event::Finished(f)) if f.completion_tokens == 3));
    let sampling = v1::Sampling { seed: Some(42), ..Default::default() };
    let named = v1::GenerateRequest { request_id: "mine".into(), sampling: Some(sampling), ..prompt("go") };
    let (events, _) = read(mesh.router.mesh().generate(named).await.unwrap().into_inner()).await;
    assert!(matches!(&events[0], Event::Started(s) if s.request_id == "mine" && s.seed == 42));
    drained(&mesh).await;
    assert_eq!(mesh.router.status().await.requests_total, 2);
}

#[tokio::test]
async fn a_client_that_goes_takes_its_call_to_the_attention_node_along() {
    let mesh = served(calm(), 1).await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        let mut stream = mesh.router.generate("hang").await.unwrap();
        soon("a first event", stream.message()).await.unwrap();
        streams.push(stream);
    }
    assert_eq!(mesh.fake.open.load(Ordering::SeqCst), 20);
    assert_eq!(mesh.router.status().await.requests_active, 20);
    streams.truncate(15);
    eventually("five cancellations", async || mesh.fake.open.load(Ordering::SeqCst) == 15).await;
    drop(streams);
    drained(&mesh).await;
}

#[tokio::test]
async fn what_is_too_much_is_refused_at_once_and_a_place_given_back_is_taken() {
    let mesh = served(RouterConfig { requests_max: 2, ..calm() }, 1).await;
    let held = [mesh.router.generate("hang").await.unwrap(), mesh.router.generate("hang").await.unwrap()];
    let status = mesh.router.mesh().generate(prompt("go")).await.unwrap_err();
    assert_eq!(status.code(), GrpcCode::ResourceExhausted);
    let error = MeshError::detail(&status).unwrap();
    assert_eq!(error.code, Code::Overloaded);
    assert!(error.message.contains('2'), "{}", error.message);
    drop(held);
    drained(&mesh).await;
    assert_eq!(read(mesh.router.generate("go").await.unwrap()).await.1, None);
}

#[tokio::test]
async fn requests_without_a_view_wait_a_bounded_time() {
    let short = RouterConfig { wait_for_view_max: Duration::from_millis(50), ..calm() };
    let router = Router::start(short).await;
    let error = router.generate("go").await.unwrap_err();
    assert_eq!(error.code, Code::NotServing);
    assert!(error.message.contains("0 of 1 attention"), "{}", error.message);
    let patient = RouterConfig { wait_for_view_max: Duration::from_secs(60), ..calm() };
    let router = Router::start(patient).await;
    let mut early = router.mesh();
    let early = tokio::spawn(async move { early.generate(prompt("go")).await });
    eventually("the request waits", async || router.status().await.requests_active == 1).await;
    let (record, _orders) = tokio::sync::mpsc::unbounded_channel();
    let fake = FakeAttention::default();
    let at = v1::RegisterRequest { addr: fake.serve().await, ..registration(v1::NodeRole::Attention) };
    let _attention = Node::join(&router, at).await.obey(record.clone());
    let _expert = Node::join(&router, registration(v1::NodeRole::Expert)).await.obey(record);
    let stream = soon("the early request", early).await.unwrap().unwrap().into_inner();
    assert_eq!(read(stream).await.1, None);
}

#[tokio::test]
async fn a_request_that_can_never_be_served_is_refused_with_its_field() {
    let mesh = served(calm(), 1).await;
    let sampling = v1::Sampling { temperature: Some(f32::NAN), ..Default::default() };
    let bad = v1::GenerateRequest { sampling: Some(sampling), ..prompt("go") };
    let status = mesh.router.mesh().generate(bad).await.unwrap_err();
    assert_eq!(status.code(), GrpcCode::InvalidArgument);
    assert_eq!(MeshError::detail(&status).unwrap().field, "sampling.temperature");
    let error = mesh.router.generate("refuse").await.unwrap_err();
    assert_eq!((error.code, error.field.as_str()), (Code::ContextExceeded, "prompt"), "the attention node's own words");
    drained(&mesh).await;
    assert_eq!(mesh.fake.begun.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_stream_that_breaks_or_ends_early_and_has_nowhere_to_go_names_the_lost_node() {
    let mesh = served(RouterConfig { move_max: Duration::ZERO, ..calm() }, 1).await;
    for text in ["break", "short"] {
        let (events, error) = read(mesh.router.generate(text).await.unwrap()).await;
        assert_eq!(events.len(), 2, "what came before the break is delivered");
        let error = error.unwrap();
        assert_eq!(error.code, Code::NodeLost);
        assert!(error.node.contains("attention slot 0"), "{error:?}");
    }
    drained(&mesh).await;
}

#[tokio::test]
async fn the_streams_of_an_attention_node_that_dies_go_on_at_another() {
    let mesh = served(calm(), 1).await;
    let mut on_first = mesh.router.generate("hang").await.unwrap();
    soon("a first event", on_first.message()).await.unwrap();
    let other = FakeAttention::default();
    let at = v1::RegisterRequest { addr: other.serve().await, ..registration(v1::NodeRole::Attention) };
    let _second = Node::join(&mesh.router, at).await.obey(mesh.record.clone());
    mesh.router.view(2).await;
    let mut on_second = mesh.router.generate("hang").await.unwrap();
    soon("a first event", on_second.message()).await.unwrap();
    assert_eq!(other.open.load(Ordering::SeqCst), 1, "the second node has fewer requests");
    mesh.attention.kill().await;
    eventually("the stream is at the second node", async || other.open.load(Ordering::SeqCst) == 2).await;
    mesh.router.view(3).await;
    assert_eq!(read(mesh.router.generate("go").await.unwrap()).await.1, None);
    assert_eq!(other.open.load(Ordering::SeqCst), 2);
    drop(on_first);
    eventually("its client went", async || other.open.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_node_that_nobody_answers_at_is_a_lost_node() {
    let router = Router::start(RouterConfig { move_max: Duration::ZERO, ..calm() }).await;
    let (record, _orders) = tokio::sync::mpsc::unbounded_channel();
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let at = v1::RegisterRequest { addr: format!("http://{closed}"), ..registration(v1::NodeRole::Attention) };
    let _attention = Node::join(&router, at).await.obey(record.clone());
    let _expert = Node::join(&router, registration(v1::NodeRole::Expert)).await.obey(record);
    router.view(1).await;
    let error = router.generate("go").await.unwrap_err();
    assert_eq!(error.code, Code::NodeLost);
    assert!(error.node.contains("attention slot 0"), "{error:?}");
}

#[tokio::test]
async fn a_passed_deadline_ends_the_call_to_the_attention_node() {
    let mesh = served(calm(), 1).await;
    let mut request = Request::new(prompt("hang"));
    request.set_timeout(Duration::from_secs(4));
    let stream = mesh.router.mesh().generate(request).await.unwrap().into_inner();
    let (_, error) = read(stream).await;
    assert_eq!(error.map(|e| e.code), Some(Code::Deadline));
    drained(&mesh).await;
}

#[tokio::test]
async fn a_router_that_stops_dismisses_its_nodes_and_ends_streams_with_a_typed_error() {
    let mut mesh = served(calm(), 1).await;
    let mut stream = mesh.router.generate("hang").await.unwrap();
    soon("a first event", stream.message()).await.unwrap();
    mesh.router.stop.cancel();
    let (_, error) = read(stream).await;
    assert_eq!(error.map(|e| e.code), Some(Code::NotServing));
    let mut dismissed = 0;
    while dismissed < 2 {
        let (_, order) = soon("the dismissals", mesh.orders.recv()).await.unwrap();
        dismissed += usize::from(matches!(order, v1::router_message::Message::Dismissed(_)));
    }
    soon("the router's end", mesh.router.task).await.unwrap().unwrap();
    eventually("the stream's end", async || mesh.fake.open.load(Ordering::SeqCst) == 0).await;
}

/// A client on a connection of its own that reads one event and then no more.
async fn stalled(mesh: &Served) -> tonic::Streaming<v1::GenerateResponse> {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", mesh.router.addr)).unwrap();
    let mut client = mesh_proto::v1::mesh_client::MeshClient::new(channel.connect().await.unwrap());
    let mut stream = client.generate(prompt("flood")).await.unwrap().into_inner();
    soon("a first event", stream.message()).await.unwrap();
    stream
}

#[tokio::test]
async fn clients_that_do_not_read_hold_up_nobody_else() {
    let mesh = served(calm(), 1).await;
    let mut held = Vec::new();
    for _ in 0..12 {
        held.push(stalled(&mesh).await);
    }
    for _ in 0..3 {
        let stream = soon("a place beside them", mesh.router.generate("go")).await.unwrap();
        assert_eq!(read(stream).await.1, None);
    }
    assert_eq!(mesh.fake.open.load(Ordering::SeqCst), 12);
    drop(held);
    drained(&mesh).await;
}

#[tokio::test]
async fn a_client_that_never_reads_on_is_given_up() {
    let mesh = served(RouterConfig { stall_max: Duration::from_millis(300), ..calm() }, 1).await;
    let held = stalled(&mesh).await;
    drained(&mesh).await;
    drop(held);
}
