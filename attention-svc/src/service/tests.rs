//! The gRPC face over a real connection, in front of a model that can be held.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mesh_proto::v1::TokenIds;
use mesh_proto::v1::attention_client::AttentionClient;
use mesh_proto::v1::attention_server::AttentionServer;
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};

use super::*;
use crate::engine::{Engine, EngineOptions, start};
use crate::fake::{FakeRunner, PAGE, Switch, VOCAB};
use crate::runner::Outside;
use crate::sampling::Scored;
use crate::scheduler::SchedulerLimits;

/// Longer than any of these waits takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Rig {
    client: AttentionClient<Channel>,
    engine: Engine,
    switch: Arc<Switch>,
}

impl Rig {
    async fn new() -> Self {
        let limits = SchedulerLimits {
            step_tokens_max: 16,
            prefill_chunk: 8,
            scored_rows_max: 4,
            running_max: 4,
            waiting_max: 4,
        };
        let options = EngineOptions {
            limits,
            kv_pages: 32,
            page_tokens: PAGE,
            vocab: VOCAB,
            eos: vec![],
            recovery_max: Duration::ZERO,
        };
        let (runner, switch) = FakeRunner::new(options.kv_pages, Outside::new().0);
        let engine = start(runner, options).unwrap();
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tokenizers/llama-style-1024");
        let tokenizer = Tokenizer::open(tokenizer).unwrap();
        let bounds = RequestBounds { vocab: VOCAB, context: 64 };
        let service = AttentionService::new(engine.handle.clone(), tokenizer, bounds, Slot(5));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = format!("http://{}", listener.local_addr().unwrap());
        let server = Server::builder().add_service(AttentionServer::new(service));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        Self { client: AttentionClient::connect(addr).await.unwrap(), engine, switch }
    }

    async fn assert_nothing_held(&self) {
        let counters = self.engine.handle.counters();
        let until = Instant::now() + PATIENCE;
        let read = |c: &std::sync::atomic::AtomicU32| c.load(Ordering::SeqCst);
        while read(&counters.streams_open) > 0 || read(&counters.kv_free) < 32 || read(&counters.running) > 0 {
            assert!(Instant::now() < until, "still held: {counters:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn refused(&mut self, request: GenerateRequest) -> MeshError {
        let status = self.client.generate(request).await.expect_err("it is refused before anything is streamed");
        MeshError::detail(&status).expect("the status carries the typed error")
    }
}

fn ids(ids: &[u32], max_new_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: "r".into(),
        prompt: Some(Prompt::TokenIds(TokenIds { ids: ids.to_vec() })),
        max_new_tokens: Some(max_new_tokens),
        ..GenerateRequest::default()
    }
}

#[tokio::test]
async fn a_stream_starts_gives_tokens_and_finishes() {
    let mut rig = Rig::new().await;
    let sampling = Some(v1::Sampling { seed: Some(11), ..v1::Sampling::default() });
    let request = GenerateRequest { sampling, logprobs: Some(1), ..ids(&[1, 2, 3], 4) };
    let mut stream = rig.client.generate(request).await.unwrap().into_inner();
    let mut events = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        events.push(message.event.unwrap());
    }
    let started = v1::Started { request_id: "r".into(), attention_slot: 5, prompt_tokens: 3, seed: 11 };
    assert_eq!(events[0], Message::Started(started));
    assert_eq!(events.len(), 6);
    for event in &events[1..5] {
        let Message::Tokens(tokens) = event else { panic!("{event:?} is no token") };
        assert_eq!((tokens.tokens.len(), tokens.tokens[0].top.len()), (1, 1));
        assert_eq!(tokens.tokens[0].logprob, Some(tokens.tokens[0].top[0].logprob), "greedy takes the best");
    }
    let Message::Finished(finished) = &events[5] else { panic!("{:?} is no end", events[5]) };
    assert_eq!(
        (finished.reason(), finished.prompt_tokens, finished.completion_tokens),
        (v1::FinishReason::Length, 3, 4)
    );
    rig.assert_nothing_held().await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_what_it_held() {
    let mut rig = Rig::new().await;
    rig.switch.set(|c| c.permits = Some(2));
    let mut stream = rig.client.generate(ids(&[1, 2, 3], 50)).await.unwrap().into_inner();
    assert!(matches!(stream.message().await.unwrap().unwrap().event, Some(Message::Started(_))));
    assert!(matches!(stream.message().await.unwrap().unwrap().event, Some(Message::Tokens(_))));
    drop(stream);
    // The engine is held in a step; the stream's end must reach the node before it goes on.
    let counters = rig.engine.handle.counters();
    let until = Instant::now() + PATIENCE;
    while counters.streams_open.load(Ordering::SeqCst) > 0 {
        assert!(Instant::now() < until, "the client's leaving is not seen");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    rig.switch.set(|c| c.permits = None);
    rig.assert_nothing_held().await;
    assert!(rig.engine.handle.counters().tokens.load(Ordering::SeqCst) < 50);
}

#[tokio::test]
async fn refusals_are_typed_and_come_before_the_stream() {
    let mut rig = Rig::new().await;
    let error = rig.refused(ids(&[1, VOCAB], 4)).await;
    assert_eq!((error.code, error.field.as_str()), (Code::InvalidRequest, "token_ids"));
    let error = rig.refused(ids(&[1], 64)).await;
    assert_eq!((error.code, error.field.as_str()), (Code::ContextExceeded, "max_new_tokens"));
    let text = GenerateRequest { prompt: Some(Prompt::Text("x".repeat(9_000))), ..ids(&[], 4) };
    assert_ne!(rig.refused(text).await.code, Code::Internal, "a long text is tokenised beside the streams");
    rig.switch.set(|c| c.serving = false);
    assert_eq!(rig.refused(ids(&[1], 4)).await.code, Code::NotServing);
    rig.assert_nothing_held().await;
}

#[tokio::test]
async fn a_deadline_ends_the_stream_with_a_typed_error() {
    let mut rig = Rig::new().await;
    rig.switch.set(|c| c.permits = Some(1));
    let mut request = GrpcRequest::new(ids(&[1, 2, 3], 50));
    // As the router sends it; the client's own timer is left out.
    request.metadata_mut().insert("grpc-timeout", "50m".parse().unwrap());
    let mut stream = rig.client.generate(request).await.unwrap().into_inner();
    tokio::time::sleep(Duration::from_millis(60)).await;
    rig.switch.set(|c| c.permits = None);
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended as if nothing were wrong"),
            Err(status) => break status,
        }
    };
    assert_eq!(MeshError::from_status(&status).code, Code::Deadline);
    rig.assert_nothing_held().await;
}

#[tokio::test]
async fn an_engine_that_stops_ends_streams_with_a_typed_error() {
    let mut rig = Rig::new().await;
    rig.switch.set(|c| c.permits = Some(1));
    let mut stream = rig.client.generate(ids(&[1, 2, 3], 50)).await.unwrap().into_inner();
    rig.engine.handle.stop();
    rig.switch.set(|c| c.permits = None);
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended as if nothing were wrong"),
            Err(status) => break status,
        }
    };
    assert_eq!(MeshError::from_status(&status).code, Code::NotServing);
    assert_eq!(rig.refused(ids(&[1], 4)).await.code, Code::NotServing);
}

#[test]
fn the_callers_deadline_is_read_in_every_unit() {
    let read = |text: &str| {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", text.parse().unwrap());
        timeout(&metadata)
    };
    assert_eq!(read("2H"), Some(Duration::from_secs(7200)));
    assert_eq!(read("3M"), Some(Duration::from_secs(180)));
    assert_eq!(read("4S"), Some(Duration::from_secs(4)));
    assert_eq!(read("99999999m"), Some(Duration::from_millis(99_999_999)));
    assert_eq!(read("5u"), Some(Duration::from_micros(5)));
    assert_eq!(read("6n"), Some(Duration::from_nanos(6)));
    for bad in ["", "S", "1", "123456789S", "-1S", "1.5S", "1X"] {
        assert_eq!(read(bad), None, "{bad:?}");
    }
    assert_eq!(timeout(&MetadataMap::new()), None);
}

#[test]
fn events_travel_whole() {
    let chosen = OutputToken {
        id: 7,
        logprob: Some(-0.5),
        top: vec![Scored { token: 9, logprob: -0.25 }],
        logits: vec![1.0, -2.5],
    };
    let prompt = vec![OutputToken { id: 3, logprob: Some(-1.0), top: vec![], logits: vec![] }];
    let routing = vec![RoutingRun { layer: mesh_core::LayerId(4), experts: vec![1, 0], weights: vec![0.75, 0.25] }];
    let event = Event::Token(Box::new(Progress { token: chosen, text: "x".into(), prompt, routing }));
    let Some(Message::Tokens(wire)) = to_wire(event, 2) else { panic!("a token is sent as one") };
    assert_eq!(wire.text, "x");
    assert_eq!((wire.tokens[0].id, wire.tokens[0].logprob, wire.tokens[0].top[0].id), (7, Some(-0.5), 9));
    assert_eq!(wire.tokens[0].logits, [0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0]);
    assert_eq!((wire.prompt[0].id, wire.prompt[0].logprob), (3, Some(-1.0)));
    assert_eq!((wire.routing[0].layer, wire.routing[0].experts.as_slice()), (4, [1, 0].as_slice()));
    let done = Event::Finished { reason: FinishReason::Length, text: "y".into(), completion_tokens: 5 };
    let Some(Message::Finished(wire)) = to_wire(done, 2) else { panic!("the end is sent as one") };
    assert_eq!((wire.reason(), wire.text.as_str()), (v1::FinishReason::Length, "y"));
    assert_eq!((wire.prompt_tokens, wire.completion_tokens), (2, 5));
}
