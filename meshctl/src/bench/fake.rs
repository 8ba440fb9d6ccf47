//! A front door without a mesh behind it: answers with tokens at known times, fails on purpose.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::generate_response::Event;
use mesh_proto::v1::mesh_server::{Mesh, MeshServer};
use mesh_proto::v1::{
    DrainRequest, DrainResponse, Finished, GenerateRequest, GenerateResponse, ModelInfo, NodeLoad, NodeStatus,
    PartLoad, RebalanceRequest, RebalanceResponse, Started, StatusRequest, StatusResponse, Token, Tokens,
};
use mesh_proto::{Code, MeshError};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::sleep;
use tonic::codegen::tokio_stream::Stream;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All its tokens.
    Answer,
    /// Refused at once.
    Refuse(Code),
    /// Its stream ends after the first token.
    Cut,
    /// One token less than asked for, and said so.
    Short,
    /// Nothing ever comes.
    Silence,
}

/// How the fake behaves.
#[derive(Clone, Debug)]
pub struct Script {
    /// Until the first token.
    pub first: Duration,
    /// Until each further message.
    pub each: Duration,
    /// Tokens of each message.
    pub together: u32,
    /// Requests served at a time; others wait.
    pub lanes: usize,
    /// By the number of the request.
    pub fate: fn(u64) -> Fate,
}

impl Default for Script {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self { first: ms(40), each: ms(10), together: 1, lanes: Semaphore::MAX_PERMITS, fate: |_| Fate::Answer }
    }
}

/// The model that it pretends to serve.
pub const CONTEXT: u32 = 256;
pub const VOCAB: u32 = 100;

#[derive(Debug)]
struct Fake {
    script: Script,
    lanes: Arc<Semaphore>,
    requests: AtomicU64,
    tokens: Arc<AtomicU64>,
}

/// Serves in the background of the test's runtime until that ends.
pub fn serve(script: Script) -> SocketAddr {
    let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let addr = incoming.local_addr().unwrap();
    let lanes = Arc::new(Semaphore::new(script.lanes));
    let fake = Fake { script, lanes, requests: AtomicU64::new(0), tokens: Arc::default() };
    tokio::spawn(Server::builder().add_service(MeshServer::new(fake)).serve_with_incoming(incoming));
    addr
}

pub struct Answer(mpsc::Receiver<Result<GenerateResponse, Status>>);

impl Stream for Answer {
    type Item = Result<GenerateResponse, Status>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.poll_recv(cx)
    }
}

fn event(event: Event) -> Result<GenerateResponse, Status> {
    Ok(GenerateResponse { event: Some(event) })
}

#[tonic::async_trait]
impl Mesh for Fake {
    type GenerateStream = Answer;

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Err(Status::unimplemented("a load tester drains nobody"))
    }

    async fn rebalance(&self, _: Request<RebalanceRequest>) -> Result<Response<RebalanceResponse>, Status> {
        Err(Status::unimplemented("a load tester moves nothing"))
    }

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Answer>, Status> {
        let fate = (self.script.fate)(self.requests.fetch_add(1, Ordering::Relaxed));
        if let Fate::Refuse(code) = fate {
            return Err(MeshError::new(code, "on purpose").into());
        }
        let request = request.into_inner();
        let prompt_tokens = match request.prompt {
            Some(Prompt::TokenIds(ids)) => {
                assert!(ids.ids.iter().all(|id| *id < VOCAB), "ids beyond the vocabulary");
                ids.ids.len() as u32
            }
            // Four bytes a token.
            Some(Prompt::Text(text)) => text.len().div_ceil(4) as u32,
            None => return Err(MeshError::invalid("prompt", "missing").into()),
        };
        let (sender, answer) = mpsc::channel(16);
        let (script, lanes, made) = (self.script.clone(), self.lanes.clone(), self.tokens.clone());
        tokio::spawn(async move {
            let _lane = lanes.acquire().await;
            let asked = request.max_new_tokens.unwrap_or(1);
            let tokens = if fate == Fate::Short { asked - 1 } else { asked };
            let _ = sender.send(event(Event::Started(Started { prompt_tokens, ..Started::default() }))).await;
            if fate == Fate::Silence {
                sender.closed().await;
                return;
            }
            let mut sent = 0;
            while sent < tokens {
                sleep(if sent == 0 { script.first } else { script.each }).await;
                let count = script.together.min(tokens - sent);
                let tokens = vec![Token::default(); count as usize];
                // The client is gone: so is the request.
                if sender.send(event(Event::Tokens(Tokens { tokens, ..Tokens::default() }))).await.is_err() {
                    return;
                }
                made.fetch_add(u64::from(count), Ordering::Relaxed);
                sent += count;
                if fate == Fate::Cut {
                    return;
                }
            }
            let finished = Finished { completion_tokens: sent, prompt_tokens, ..Finished::default() };
            let _ = sender.send(event(Event::Finished(finished))).await;
        });
        Ok(Response::new(Answer(answer)))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let tokens = self.tokens.load(Ordering::Relaxed);
        // Each token is a step, of 2 us and 6,000 operations.
        let part = PartLoad { part: "qkv".to_owned(), ns: tokens * 2000, flops: tokens * 6000, weight_bytes: 0 };
        let load = NodeLoad { tokens, steps: tokens, parts: vec![part], ..NodeLoad::default() };
        let node = NodeStatus { role: "attention".to_owned(), load: Some(load), ..NodeStatus::default() };
        Ok(Response::new(StatusResponse {
            serving: true,
            nodes: vec![node],
            model: Some(ModelInfo { context: CONTEXT, vocab: VOCAB, ..ModelInfo::default() }),
            requests_total: self.requests.load(Ordering::Relaxed),
            ..StatusResponse::default()
        }))
    }
}
