//! One request between steps: what it has been given, and what it takes of each step's output.

use std::ops::Range;
use std::time::Instant;

use mesh_core::LayerId;
use mesh_core::routing::Routing;
use mesh_proto::{Code, MeshError};
use tokio::sync::mpsc;

use super::{Event, FinishReason, OutputToken, Progress, RoutingRun, Submission};
use crate::output::TextOutput;
use crate::request::Request;
use crate::sampling::{Occurrences, Sampler, logprobs};
use crate::scheduler::NewSequence;

/// A request in the engine.
pub(super) struct Active {
    pub request: Request,
    pub deadline: Option<Instant>,
    events: mpsc::Sender<Result<Event, MeshError>>,
    text: TextOutput,
    seen: Occurrences,
    chosen: u32,
    prompt: Vec<OutputToken>,
    routing: Vec<RoutingRun>,
    /// Positions whose routing was taken: a recomputed token is reported once.
    routed: u32,
}

impl Active {
    /// The request, and the sequence that it is to the scheduler.
    pub fn new(submission: Submission, events: mpsc::Sender<Result<Event, MeshError>>) -> (Self, NewSequence) {
        let Submission { mut request, detokenizer, deadline } = submission;
        if !request.resumed.is_empty() {
            // They came with the first token.
            request.prompt_logprobs = None;
        }
        let (mut prompt, resumed) = (request.prompt.clone(), request.resumed.len() as u32);
        let prompt_tokens = prompt.len() as u32;
        prompt.extend_from_slice(&request.resumed);
        let sequence = NewSequence {
            prompt,
            max_new_tokens: request.max_new_tokens - resumed,
            score_prompt: request.prompt_logprobs.is_some(),
        };
        let active = Self {
            text: TextOutput::new(detokenizer, std::mem::take(&mut request.stops)),
            seen: Occurrences::new(&request.sampling, &request.prompt),
            request,
            deadline,
            events,
            chosen: 0,
            prompt: Vec::new(),
            routing: Vec::new(),
            // The last of them has not entered the model: its routing was not told.
            routed: if resumed == 0 { 0 } else { prompt_tokens + resumed - 1 },
        };
        (active, sequence)
    }

    /// Goes over the tokens that were generated elsewhere, whose text and scores the listener has. `true` when generation
    /// ended with the last of them: the listener has then been told.
    ///
    /// # Errors
    /// `INTERNAL` when the tokenizer is damaged.
    pub fn resume(&mut self, eos: &[u32]) -> Result<bool, MeshError> {
        for id in self.request.resumed.clone() {
            let (_, ended) = self.take(id, eos)?;
            if let Some(reason) = ended {
                self.finish(reason)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Counts a token as generated; returns the text that became certain with it, and whether it ended generation.
    fn take(&mut self, id: u32, eos: &[u32]) -> Result<(String, Option<FinishReason>), MeshError> {
        self.seen.push(id);
        self.chosen += 1;
        let ends = self.request.stop_token_ids.contains(&id) || (self.request.stop_at_eos && eos.contains(&id));
        let text = if ends { String::new() } else { self.text.push(id).map_err(|e| self.defect(&e))? };
        let reason = if ends || self.text.stopped() {
            Some(FinishReason::Stop)
        } else if self.chosen == self.request.max_new_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        Ok((text, reason))
    }

    fn finish(&mut self, reason: FinishReason) -> Result<(), MeshError> {
        let text = self.text.finish().map_err(|e| self.defect(&e))?;
        // The last bytes can complete a stop string that nothing else did.
        let reason = if self.text.stopped() { FinishReason::Stop } else { reason };
        self.tell(Ok(Event::Finished { reason, text, completion_tokens: self.chosen }));
        Ok(())
    }

    /// Whether nobody listens any more.
    pub fn cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Tells the listener. There is room for every event, so this fails only when nobody listens, which is seen before
    /// the next step.
    pub fn tell(&self, event: Result<Event, MeshError>) {
        let _cancelled = self.events.try_send(event);
    }

    /// Takes the routing of `rows` of a step, the first of which is at `position`.
    pub fn take_routing(&mut self, step: &[(LayerId, Routing)], rows: Range<usize>, position: u32) {
        let known = self.routed.saturating_sub(position) as usize;
        let end = position + rows.len() as u32;
        let new = (rows.start + known).min(rows.end)..rows.end;
        for (layer, routing) in step {
            let at = self.routing.iter().position(|run| run.layer == *layer).unwrap_or_else(|| {
                self.routing.push(RoutingRun { layer: *layer, ..RoutingRun::default() });
                self.routing.len() - 1
            });
            for row in new.clone() {
                self.routing[at].experts.extend(routing.experts(row).iter().map(|e| u32::from(e.0)));
                self.routing[at].weights.extend_from_slice(routing.weights(row));
            }
        }
        self.routed = self.routed.max(end);
    }

    /// Scores the prompt's token after `position`, whose logits these are.
    pub fn score_prompt(&mut self, position: u32, logits: &[f32]) {
        let Some(token) = self.request.prompt.get(position as usize + 1).copied() else { return };
        let token = scored(token, logits, self.request.prompt_logprobs);
        self.prompt.push(token);
    }

    /// Chooses the next token out of its logits and tells the listener. Returns the token to go on with, or `None` when
    /// generation has ended.
    ///
    /// # Errors
    /// `INTERNAL` when the logits or the tokenizer are damaged; the listener is not told of that yet.
    pub fn choose(&mut self, logits: &[f32], sampler: &mut Sampler, eos: &[u32]) -> Result<Option<u32>, MeshError> {
        let chosen = sampler.choose(logits, &self.request.sampling, &self.seen, self.chosen);
        let id = chosen.map_err(|e| self.defect(&e))?;
        let (text, ended) = self.take(id, eos)?;
        let mut token = scored(id, logits, self.request.logprobs);
        if self.request.return_logits {
            token.logits = logits.to_vec();
        }
        let (prompt, routing) = (std::mem::take(&mut self.prompt), std::mem::take(&mut self.routing));
        self.tell(Ok(Event::Token(Box::new(Progress { token, text, prompt, routing }))));
        let Some(reason) = ended else { return Ok(Some(id)) };
        self.finish(reason)?;
        Ok(None)
    }

    fn defect(&self, what: &dyn std::fmt::Display) -> MeshError {
        MeshError::new(Code::Internal, format!("request {}: {what}", self.request.id))
    }
}

fn scored(id: u32, logits: &[f32], wanted: Option<u32>) -> OutputToken {
    let mut token = OutputToken { id, logprob: None, top: Vec::new(), logits: Vec::new() };
    if let Some(top) = wanted {
        let (chosen, best) = logprobs(logits, id, top as usize);
        token.logprob = Some(chosen.logprob);
        token.top = best;
    }
    token
}
