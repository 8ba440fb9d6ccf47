//! `meshctl generate`: one request; text streams to stdout as it comes.

use std::io::Write;
use std::time::{Duration, Instant};

use mesh_proto::Code;
use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::generate_response::Event;
use mesh_proto::v1::{FinishReason, Finished, GenerateRequest, Sampling, Started, Token, TokenIds};
use serde::Serialize;

use crate::cli::GenerateArgs;
use crate::client::{Client, failed};
use crate::exit::{CliError, Exit};
use crate::signals::StopSignals;
use crate::up::print_line;

/// Pause before a broken stream is asked for again.
const RESUME_PAUSE: Duration = Duration::from_millis(200);

/// A token that could have been chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TopLogprob {
    /// The token.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f32,
}

/// Tokens counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Of the answer.
    pub completion_tokens: u32,
}

/// What `--json` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Completion {
    /// The tokens made.
    pub token_ids: Vec<u32>,
    /// Their text.
    pub text: String,
    /// The log-probability of each chosen token.
    pub logprobs: Vec<f32>,
    /// The best tokens beside each chosen one, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<Vec<Vec<TopLogprob>>>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// Tokens counted.
    pub usage: Usage,
    /// The request's name in logs.
    pub request_id: String,
    /// What a sample is reproduced with.
    pub seed: u64,
    /// Slot of the attention node that took it.
    pub attention_slot: u32,
}

/// The request that the flags describe.
pub fn request(args: &GenerateArgs) -> GenerateRequest {
    let prompt = match (&args.prompt, &args.token_ids) {
        (Some(text), _) => Some(Prompt::Text(text.clone())),
        (None, ids) => ids.clone().map(|ids| Prompt::TokenIds(TokenIds { ids: ids.0 })),
    };
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed: args.seed,
        repetition_penalty: args.repetition_penalty,
        frequency_penalty: args.frequency_penalty,
        presence_penalty: args.presence_penalty,
    };
    GenerateRequest {
        prompt,
        max_new_tokens: args.max_new_tokens,
        sampling: Some(sampling),
        stop: args.stop.clone(),
        stop_token_ids: args.stop_token_id.clone(),
        ignore_eos: args.ignore_eos,
        // The JSON form always has the chosen tokens' own.
        logprobs: if args.json { Some(args.logprobs.unwrap_or(0)) } else { args.logprobs },
        ..GenerateRequest::default()
    }
}

/// Sends a request and collects its answer; `on_text` gets each piece of text as it comes.
///
/// # Errors
/// [`CliError`].
pub async fn stream(
    client: &mut Client,
    request: tonic::Request<GenerateRequest>,
    on_text: impl FnMut(&str) -> Result<(), CliError>,
) -> Result<Completion, CliError> {
    let mut completion = Completion::default();
    go_on(client, request, &mut completion, on_text).await?;
    Ok(completion)
}

/// As [`stream`], for an answer of which `completion` has the beginning.
async fn go_on(
    client: &mut Client,
    request: tonic::Request<GenerateRequest>,
    completion: &mut Completion,
    mut on_text: impl FnMut(&str) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let mut finished = false;
    let mut messages = client.mesh().generate(request).await.map_err(failed)?.into_inner();
    while let Some(message) = messages.message().await.map_err(failed)? {
        match message.event {
            Some(Event::Started(Started { request_id, attention_slot, seed, .. })) => {
                (completion.request_id, completion.attention_slot, completion.seed) =
                    (request_id, attention_slot, seed);
            }
            Some(Event::Tokens(tokens)) => {
                tokens.tokens.into_iter().for_each(|token| completion.push(token));
                completion.text.push_str(&tokens.text);
                on_text(&tokens.text)?;
            }
            Some(Event::Finished(end)) => {
                completion.text.push_str(&end.text);
                on_text(&end.text)?;
                completion.finish(&end);
                finished = true;
            }
            None => (),
        }
    }
    if finished { Ok(()) } else { Err(CliError::StreamCut) }
}

/// Whether a request may go on once the router is back: it, not the request, is what failed.
fn may_resume(error: &CliError) -> bool {
    match error {
        CliError::StreamCut | CliError::NoMesh { .. } => true,
        CliError::Mesh(error) => matches!(error.code, Code::NotServing | Code::NodeLost),
        _ => false,
    }
}

/// Sends a request, and sends it again with the tokens that came whenever the stream breaks, until nothing has come for
/// `args.resume_for`.
async fn resuming(
    args: &GenerateArgs,
    mut on_text: impl FnMut(&str) -> Result<(), CliError>,
) -> Result<Completion, CliError> {
    let mut completion = Completion::default();
    let until = args.timeout.map(|timeout| Instant::now() + timeout);
    let mut broken: Option<Instant> = None;
    loop {
        let had = completion.token_ids.len();
        let attempt = async {
            let mut client = Client::connect(&args.target.grpc).await?;
            let mut message = request(args);
            if !completion.request_id.is_empty() {
                message.request_id.clone_from(&completion.request_id);
                message.sampling.get_or_insert_default().seed = Some(completion.seed);
                message.resume_tokens.clone_from(&completion.token_ids);
            }
            let mut message = tonic::Request::new(message);
            if let Some(until) = until {
                message.set_timeout(until.saturating_duration_since(Instant::now()));
            }
            go_on(&mut client, message, &mut completion, &mut on_text).await
        };
        let error = match attempt.await {
            Ok(()) => return Ok(completion),
            Err(error) => error,
        };
        if completion.token_ids.len() > had {
            broken = None;
        }
        let since = *broken.get_or_insert_with(Instant::now);
        // A request that never began is the caller's to repeat.
        let late = since.elapsed() >= args.resume_for || until.is_some_and(|until| Instant::now() >= until);
        if completion.request_id.is_empty() || !may_resume(&error) || late {
            return Err(error);
        }
        tokio::time::sleep(RESUME_PAUSE).await;
    }
}

impl Completion {
    fn push(&mut self, token: Token) {
        self.token_ids.push(token.id);
        self.logprobs.extend(token.logprob);
        if !token.top.is_empty() {
            let top = token.top.into_iter().map(|t| TopLogprob { id: t.id, logprob: t.logprob }).collect();
            self.top_logprobs.get_or_insert_default().push(top);
        }
    }

    fn finish(&mut self, end: &Finished) {
        self.finish_reason = match end.reason() {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Unspecified => "unspecified",
        };
        let Finished { prompt_tokens, completion_tokens, .. } = *end;
        self.usage = Usage { prompt_tokens, completion_tokens };
    }
}

/// Writes a piece of text and shows it at once.
///
/// # Errors
/// [`CliError::Os`] when nobody reads stdout any more, which ends the request.
pub fn show(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    let shown = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    shown.map_err(|source| CliError::Os { what: "writing to stdout", source })
}

/// Runs the command.
///
/// # Errors
/// [`CliError`]; Ctrl-C cancels the request, which frees what it held.
pub async fn run(args: GenerateArgs) -> Result<Exit, CliError> {
    let mut signals = StopSignals::watch()?;
    let work = async { resuming(&args, |text| if args.json { Ok(()) } else { show(text) }).await };
    let done = signals.unless(work).await;
    if !args.json {
        // What was streamed ends in a line of its own, also when the stream broke.
        let _ = show("\n");
    }
    let completion = done?;
    if args.json {
        print_line(&completion);
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use mesh_proto::v1::TokenLogprob;

    fn args(flags: &[&str]) -> GenerateArgs {
        let cli = crate::cli::Cli::try_parse_from(["meshctl", "generate"].iter().chain(flags)).unwrap();
        match cli.command {
            crate::cli::Command::Generate(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_become_the_request_unchanged_so_that_the_mesh_judges_them() {
        let flags =
            ["--token-ids", "5,6", "--temperature", "NaN", "--max-new-tokens", "0", "--ignore-eos", "--stop", "x"];
        let request = request(&args(&flags));
        assert_eq!(request.prompt, Some(Prompt::TokenIds(TokenIds { ids: vec![5, 6] })));
        assert!(request.sampling.unwrap().temperature.unwrap().is_nan());
        assert_eq!((request.max_new_tokens, request.ignore_eos, request.logprobs), (Some(0), true, None));
        assert_eq!(request.stop, ["x"]);
    }

    #[test]
    fn json_has_one_logprob_for_each_token() {
        assert_eq!(request(&args(&["--prompt", "a", "--json"])).logprobs, Some(0));
        assert_eq!(request(&args(&["--prompt", "a", "--json", "--logprobs", "3"])).logprobs, Some(3));
        let mut completion = Completion::default();
        let top = vec![TokenLogprob { id: 4, logprob: -0.5 }];
        completion.push(Token { id: 4, logprob: Some(-0.5), top, ..Token::default() });
        completion.finish(&Finished { reason: FinishReason::Length as i32, prompt_tokens: 2, ..Finished::default() });
        let json = serde_json::to_value(&completion).unwrap();
        assert_eq!(json["token_ids"], serde_json::json!([4]));
        assert_eq!(json["logprobs"], serde_json::json!([-0.5]));
        assert_eq!(json["top_logprobs"][0][0]["id"], 4);
        assert_eq!((&json["finish_reason"], &json["usage"]["prompt_tokens"]), (&"length".into(), &2.into()));
    }
}
