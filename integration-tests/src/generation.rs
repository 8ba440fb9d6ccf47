//! Requests and their collected answers.

use std::collections::BTreeMap;

use mesh_proto::MeshError;
use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::generate_response::Event;
use mesh_proto::v1::mesh_client::MeshClient;
use mesh_proto::v1::{Finished, GenerateRequest, LayerRouting, Started, Token, TokenIds, Tokens};
use tonic::transport::Channel;

/// A greedy request for exactly `max_new_tokens` tokens after `ids`.
pub fn ids_request(ids: &[u32], max_new_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: ids.to_vec() })),
        max_new_tokens: Some(max_new_tokens),
        ignore_eos: true,
        ..GenerateRequest::default()
    }
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// Its first message.
    pub started: Started,
    /// Every token.
    pub tokens: Vec<Token>,
    /// The whole text.
    pub text: String,
    /// Log-probabilities of the prompt, when asked for.
    pub prompt: Vec<Token>,
    /// When asked for: by MoE layer, all tokens' chosen experts, flattened, and their weights.
    pub routing: BTreeMap<u32, (Vec<u32>, Vec<f32>)>,
    /// Its last message.
    pub finished: Finished,
}

impl Generation {
    /// The tokens' ids.
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }

    /// The raw logits that a token was chosen from.
    pub fn logits(&self, token: usize) -> Vec<f32> {
        let bytes = self.tokens[token].logits.chunks_exact(4);
        bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    fn add(&mut self, message: Tokens) {
        self.tokens.extend(message.tokens);
        self.text.push_str(&message.text);
        self.prompt.extend(message.prompt);
        for LayerRouting { layer, experts, weights } in message.routing {
            let entry = self.routing.entry(layer).or_default();
            entry.0.extend(experts);
            entry.1.extend(weights);
        }
    }
}

/// Sends a request and collects its answer.
///
/// # Errors
/// The mesh's typed error.
pub async fn generate(mut client: MeshClient<Channel>, request: GenerateRequest) -> Result<Generation, MeshError> {
    let failed = |status| MeshError::from_status(&status);
    let mut stream = client.generate(request).await.map_err(failed)?.into_inner();
    let (mut generation, mut finished) = (Generation::default(), None);
    while let Some(message) = stream.message().await.map_err(failed)? {
        assert!(finished.is_none(), "a message after Finished: {message:?}");
        match message.event.expect("every message has an event") {
            Event::Started(started) => generation.started = started,
            Event::Tokens(tokens) => generation.add(tokens),
            Event::Finished(end) => finished = Some(end),
        }
    }
    let finished = finished.expect("a stream that ends without an error ends with Finished");
    generation.text.push_str(&finished.text);
    generation.finished = finished;
    Ok(generation)
}
