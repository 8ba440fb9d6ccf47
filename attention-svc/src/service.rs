//! The gRPC face of the engine: checks a request, hands it over, and turns its events into the stream's messages.
//!
//! The stream owns the request: dropped, by the client's cancelling or by a broken connection, it cancels it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use mesh_core::Slot;
use mesh_model::{TextDecoder, Tokenizer};
use mesh_proto::v1::attention_server::Attention;
use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::generate_response::Event as Message;
use mesh_proto::v1::{self, GenerateRequest, GenerateResponse};
use mesh_proto::{Code, MeshError};
use tonic::metadata::MetadataMap;
use tonic::{Request as GrpcRequest, Response, Status};

use crate::engine::{EngineHandle, Event, FinishReason, Generation, OutputToken, Progress, RoutingRun, Submission};
use crate::output::{Detokenize, DetokenizeError};
use crate::request::{self, Request, RequestBounds};

/// Text prompts up to this length are tokenised in place; longer ones would hold up other streams.
const TOKENISE_IN_PLACE_BYTES_MAX: usize = 1024;

/// Serves `expertmesh.v1.Attention`.
#[derive(Clone)]
pub struct AttentionService {
    engine: EngineHandle,
    tokenizer: Tokenizer,
    bounds: RequestBounds,
    slot: Arc<AtomicU16>,
}

impl AttentionService {
    /// A service in front of `engine`, on the node at `slot`.
    pub fn new(engine: EngineHandle, tokenizer: Tokenizer, bounds: RequestBounds, slot: Slot) -> Self {
        Self { engine, tokenizer, bounds, slot: Arc::new(AtomicU16::new(slot.0)) }
    }

    /// The node's slot is another from now on.
    pub fn set_slot(&self, slot: Slot) {
        self.slot.store(slot.0, Relaxed);
    }

    fn check(&self, request: GenerateRequest) -> Result<Request, MeshError> {
        let encode = |text: &str| self.tokenizer.encode(text).map_err(|e| e.to_string());
        request::check(request, &self.bounds, encode, draw_seed)
    }

    async fn start(&self, request: GenerateRequest, deadline: Option<Instant>) -> Result<GenerationStream, MeshError> {
        let long = matches!(&request.prompt, Some(Prompt::Text(text)) if text.len() > TOKENISE_IN_PLACE_BYTES_MAX);
        let request = if long {
            let service = self.clone();
            let checked = tokio::task::spawn_blocking(move || service.check(request)).await;
            checked.map_err(|e| MeshError::new(Code::Internal, format!("tokenising the prompt failed: {e}")))??
        } else {
            self.check(request)?
        };
        let prompt_tokens = request.prompt.len() as u32;
        let started = v1::Started {
            request_id: request.id.clone(),
            attention_slot: self.slot.load(Relaxed).into(),
            prompt_tokens,
            seed: request.sampling.seed,
        };
        let detokenizer = Box::new(self.tokenizer.decoder());
        let mut generation = self.engine.submit(Submission { request, detokenizer, deadline })?;
        match generation.next().await {
            Some(Ok(Event::Started)) => {
                Ok(GenerationStream { generation, first: Some(Message::Started(started)), prompt_tokens, over: false })
            }
            Some(Err(error)) => Err(error),
            Some(Ok(_)) => Err(MeshError::new(Code::Internal, "a request's first event is that it was started")),
            None => Err(gone()),
        }
    }
}

#[tonic::async_trait]
impl Attention for AttentionService {
    type GenerateStream = GenerationStream;

    async fn generate(&self, request: GrpcRequest<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let deadline = timeout(request.metadata()).and_then(|t| Instant::now().checked_add(t));
        let started = self.start(request.into_inner(), deadline).await;
        started.map(Response::new).map_err(|error| {
            tracing::debug!(%error, "request refused");
            error.into()
        })
    }
}

impl Detokenize for TextDecoder {
    fn push(&mut self, token: u32) -> Result<String, DetokenizeError> {
        TextDecoder::push(self, token).map_err(|e| DetokenizeError(e.to_string()))
    }

    fn flush(&mut self) -> Result<String, DetokenizeError> {
        TextDecoder::flush(self).map_err(|e| DetokenizeError(e.to_string()))
    }
}

/// A seed for a request that brings none and reached this node past the router.
fn draw_seed() -> u64 {
    // Without entropy any seed is as good: it is told to the client.
    getrandom::u64().unwrap_or_default()
}

/// What a stream that breaks off without an end is told.
fn gone() -> MeshError {
    MeshError::new(Code::NodeLost, "the attention node's engine is gone; try again")
}

/// The caller's deadline, out of the `grpc-timeout` header: up to eight digits and a unit. One that does not parse is
/// none.
fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

/// A request's messages.
pub struct GenerationStream {
    generation: Generation,
    first: Option<Message>,
    prompt_tokens: u32,
    over: bool,
}

impl tokio_stream::Stream for GenerationStream {
    type Item = Result<GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(GenerateResponse { event: Some(first) })));
        }
        let Poll::Ready(event) = self.generation.poll_next(cx) else { return Poll::Pending };
        let event = event.unwrap_or_else(|| Err(gone()));
        self.over = !matches!(event, Ok(Event::Started | Event::Token(_)));
        let message = event.map(|event| GenerateResponse { event: to_wire(event, self.prompt_tokens) });
        Poll::Ready(Some(message.map_err(Status::from)))
    }
}

fn to_wire(event: Event, prompt_tokens: u32) -> Option<Message> {
    match event {
        Event::Started => None,
        Event::Token(progress) => Some(Message::Tokens(tokens(*progress))),
        Event::Finished { reason, text, completion_tokens } => {
            let reason = match reason {
                FinishReason::Stop => v1::FinishReason::Stop,
                FinishReason::Length => v1::FinishReason::Length,
            };
            Some(Message::Finished(v1::Finished { reason: reason.into(), text, prompt_tokens, completion_tokens }))
        }
    }
}

fn tokens(progress: Progress) -> v1::Tokens {
    v1::Tokens {
        tokens: vec![token(progress.token)],
        text: progress.text,
        prompt: progress.prompt.into_iter().map(token).collect(),
        routing: progress.routing.into_iter().map(layer_routing).collect(),
    }
}

fn token(token: OutputToken) -> v1::Token {
    let top = token.top.iter().map(|s| v1::TokenLogprob { id: s.token, logprob: s.logprob }).collect();
    let logits = token.logits.iter().flat_map(|l| l.to_le_bytes()).collect();
    v1::Token { id: token.id, logprob: token.logprob, top, logits }
}

fn layer_routing(run: RoutingRun) -> v1::LayerRouting {
    v1::LayerRouting { layer: run.layer.0.into(), experts: run.experts, weights: run.weights }
}

#[cfg(test)]
mod tests;
