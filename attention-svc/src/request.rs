//! A client's request, checked: every field within its bounds, the prompt as token ids, defaults filled in.

use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::{self, GenerateRequest};
use mesh_proto::{Code, MeshError};

use crate::sampling::Sampling;

/// Best tokens that log-probabilities may be asked for beside the chosen one.
pub const LOGPROBS_MAX: u32 = 20;
/// Stop strings of one request.
pub const STOPS_MAX: usize = 16;
/// Length of a stop string, bytes.
pub const STOP_BYTES_MAX: usize = 256;
/// Stop ids of one request.
pub const STOP_IDS_MAX: usize = 256;
/// Length of a text prompt, bytes: more than any context holds, and little enough to tokenise.
pub const PROMPT_TEXT_BYTES_MAX: usize = 2 << 20;
/// Length of a request's name, bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 128;
/// Raw logits that one request may ask for, bytes: a slow reader's stay in memory.
pub const LOGITS_BYTES_MAX: u64 = 256 << 20;
/// A penalty's largest amount, either way.
const ADDITIVE_PENALTY_MAX: f32 = 2.0;

/// What of the model a request is checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestBounds {
    /// Token ids are below it.
    pub vocab: u32,
    /// Most tokens of prompt and output together.
    pub context: u32,
}

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Its name in logs and answers.
    pub id: String,
    /// At least one token, each below the vocabulary's size.
    pub prompt: Vec<u32>,
    /// At least 1, and within the context with the prompt.
    pub max_new_tokens: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Strings that end the text.
    pub stops: Vec<String>,
    /// Ids that end generation.
    pub stop_token_ids: Vec<u32>,
    /// Whether the model's own end-of-sequence ids end it too.
    pub stop_at_eos: bool,
    /// Log-probabilities of the chosen token and so many best ones.
    pub logprobs: Option<u32>,
    /// The same for the prompt.
    pub prompt_logprobs: Option<u32>,
    /// Whether the raw logits are wanted.
    pub return_logits: bool,
    /// Whether the chosen experts are wanted.
    pub return_routing: bool,
    /// Tokens that were generated before, by a node that is lost; fewer than `max_new_tokens`, or as many.
    pub resumed: Vec<u32>,
}

/// Checks a request. `encode` tokenises a text prompt, `draw_seed` makes up a missing seed.
///
/// # Errors
/// [`MeshError`] that names the field at fault: `INVALID_REQUEST`, or `CONTEXT_EXCEEDED` when prompt and output are too
/// long.
pub fn check(
    request: GenerateRequest,
    bounds: &RequestBounds,
    encode: impl FnOnce(&str) -> Result<Vec<u32>, String>,
    draw_seed: impl FnOnce() -> u64,
) -> Result<Request, MeshError> {
    if request.request_id.len() > REQUEST_ID_BYTES_MAX {
        return Err(invalid("request_id", format!("longer than {REQUEST_ID_BYTES_MAX} bytes")));
    }
    let sampling = check_sampling(request.sampling.unwrap_or_default(), draw_seed)?;
    check_stops(&request.stop)?;
    check_stop_ids(&request.stop_token_ids, bounds.vocab)?;
    let logprobs = check_logprobs("logprobs", request.logprobs)?;
    let prompt_logprobs = check_logprobs("prompt_logprobs", request.prompt_logprobs)?;
    // The cheap checks come before the prompt is tokenised.
    if request.max_new_tokens == Some(0) {
        return Err(invalid("max_new_tokens", "0 generates nothing; leave it out to fill the context"));
    }
    let prompt = check_prompt(request.prompt, bounds, encode)?;
    let max_new_tokens = check_length(prompt.len(), request.max_new_tokens, bounds.context)?;
    check_resumed(&request.resume_tokens, max_new_tokens, bounds.vocab)?;
    let logits_bytes = u64::from(max_new_tokens) * u64::from(bounds.vocab) * 4;
    if request.return_logits && logits_bytes > LOGITS_BYTES_MAX {
        let most = LOGITS_BYTES_MAX / (u64::from(bounds.vocab) * 4).max(1);
        let what = format!("logits of {max_new_tokens} tokens are too many; set max_new_tokens to {most} at most");
        return Err(invalid("return_logits", what));
    }
    Ok(Request {
        id: request.request_id,
        prompt,
        max_new_tokens,
        sampling,
        stops: request.stop,
        stop_token_ids: request.stop_token_ids,
        stop_at_eos: !request.ignore_eos,
        logprobs,
        prompt_logprobs,
        return_logits: request.return_logits,
        return_routing: request.return_routing,
        resumed: request.resume_tokens,
    })
}

fn invalid(field: &str, what: impl Into<String>) -> MeshError {
    MeshError::invalid(field, format!("{field}: {}", what.into()))
}

fn check_prompt(
    prompt: Option<Prompt>,
    bounds: &RequestBounds,
    encode: impl FnOnce(&str) -> Result<Vec<u32>, String>,
) -> Result<Vec<u32>, MeshError> {
    let (field, ids) = match prompt {
        None => return Err(invalid("prompt", "missing; give text or token_ids")),
        Some(Prompt::Text(text)) if text.len() > PROMPT_TEXT_BYTES_MAX => {
            let what = format!("{} bytes, and {PROMPT_TEXT_BYTES_MAX} are taken at most", text.len());
            return Err(invalid("text", what));
        }
        Some(Prompt::Text(text)) => {
            ("text", encode(&text).map_err(|e| invalid("text", format!("not tokenised: {e}")))?)
        }
        Some(Prompt::TokenIds(ids)) => ("token_ids", ids.ids),
    };
    if ids.is_empty() {
        return Err(invalid(field, "the prompt is empty; at least one token is needed"));
    }
    if let Some((at, id)) = ids.iter().enumerate().find(|(_, id)| **id >= bounds.vocab) {
        let what = format!("id {id} at {at} is not in the vocabulary, whose ids are below {}", bounds.vocab);
        return Err(invalid(field, what));
    }
    Ok(ids)
}

fn check_resumed(resumed: &[u32], max_new_tokens: u32, vocab: u32) -> Result<(), MeshError> {
    if resumed.len() > max_new_tokens as usize {
        let what = format!("{} tokens, and max_new_tokens, which counts them, is {max_new_tokens}", resumed.len());
        return Err(invalid("resume_tokens", what));
    }
    match resumed.iter().find(|id| **id >= vocab) {
        Some(id) => {
            Err(invalid("resume_tokens", format!("id {id} is not in the vocabulary, whose ids are below {vocab}")))
        }
        None => Ok(()),
    }
}

fn check_length(prompt: usize, max_new_tokens: Option<u32>, context: u32) -> Result<u32, MeshError> {
    let exceeded = |field, what: String| MeshError::new(Code::ContextExceeded, what).at_field(field);
    let room = u32::try_from(prompt).ok().and_then(|p| context.checked_sub(p)).filter(|room| *room > 0);
    let Some(room) = room else {
        let what =
            format!("the prompt has {prompt} tokens, and the context of {context} must hold one more; shorten it");
        return Err(exceeded("prompt", what));
    };
    match max_new_tokens {
        Some(most) if most > room => {
            let what = format!(
                "prompt ({prompt}) and max_new_tokens ({most}) exceed the context of {context}; ask for {room} at most, \
                 or leave it out"
            );
            Err(exceeded("max_new_tokens", what))
        }
        most => Ok(most.unwrap_or(room)),
    }
}

fn check_sampling(s: v1::Sampling, draw_seed: impl FnOnce() -> u64) -> Result<Sampling, MeshError> {
    let within = |field: &str, value: Option<f32>, default: f32, fits: fn(f32) -> bool, range: &str| {
        let value = value.unwrap_or(default);
        if value.is_finite() && fits(value) {
            return Ok(value);
        }
        Err(invalid(&format!("sampling.{field}"), format!("{value} is not {range}")))
    };
    let additive = |v: f32| v.abs() <= ADDITIVE_PENALTY_MAX;
    Ok(Sampling {
        temperature: within("temperature", s.temperature, 0.0, |v| v >= 0.0, "a finite number of at least 0")?,
        top_k: s.top_k.unwrap_or(0),
        top_p: within("top_p", s.top_p, 1.0, |v| v > 0.0 && v <= 1.0, "in (0, 1]")?,
        min_p: within("min_p", s.min_p, 0.0, |v| (0.0..=1.0).contains(&v), "in [0, 1]")?,
        seed: s.seed.unwrap_or_else(draw_seed),
        repetition_penalty: within(
            "repetition_penalty",
            s.repetition_penalty,
            1.0,
            |v| v > 0.0,
            "a finite number above 0",
        )?,
        frequency_penalty: within("frequency_penalty", s.frequency_penalty, 0.0, additive, "in [-2, 2]")?,
        presence_penalty: within("presence_penalty", s.presence_penalty, 0.0, additive, "in [-2, 2]")?,
    })
}

fn check_stops(stops: &[String]) -> Result<(), MeshError> {
    if stops.len() > STOPS_MAX {
        return Err(invalid("stop", format!("{} strings, and {STOPS_MAX} are taken at most", stops.len())));
    }
    for (at, stop) in stops.iter().enumerate() {
        if stop.is_empty() {
            return Err(invalid("stop", format!("string {at} is empty and would stop before anything")));
        }
        if stop.len() > STOP_BYTES_MAX {
            let what = format!("string {at} has {} bytes, and {STOP_BYTES_MAX} are taken at most", stop.len());
            return Err(invalid("stop", what));
        }
    }
    Ok(())
}

fn check_stop_ids(ids: &[u32], vocab: u32) -> Result<(), MeshError> {
    if ids.len() > STOP_IDS_MAX {
        return Err(invalid("stop_token_ids", format!("{} ids, and {STOP_IDS_MAX} are taken at most", ids.len())));
    }
    match ids.iter().find(|id| **id >= vocab) {
        Some(id) => {
            Err(invalid("stop_token_ids", format!("id {id} is not in the vocabulary, whose ids are below {vocab}")))
        }
        None => Ok(()),
    }
}

fn check_logprobs(field: &str, wanted: Option<u32>) -> Result<Option<u32>, MeshError> {
    match wanted {
        Some(n) if n > LOGPROBS_MAX => {
            Err(invalid(field, format!("{n} best tokens, and {LOGPROBS_MAX} are given at most")))
        }
        wanted => Ok(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: RequestBounds = RequestBounds { vocab: 100, context: 32 };

    fn ids(ids: &[u32]) -> GenerateRequest {
        let prompt = Some(Prompt::TokenIds(v1::TokenIds { ids: ids.to_vec() }));
        GenerateRequest { prompt, ..GenerateRequest::default() }
    }

    fn checked(request: GenerateRequest) -> Result<Request, MeshError> {
        check(
            request,
            &BOUNDS,
            |text| text.split(' ').map(|w| w.parse().map_err(|_| format!("{w:?}"))).collect(),
            || 99,
        )
    }

    fn refused(change: impl FnOnce(&mut GenerateRequest)) -> (Code, String) {
        let mut request = ids(&[1, 2, 3]);
        change(&mut request);
        let error = checked(request).unwrap_err();
        (error.code, error.field)
    }

    fn refused_sampling(change: impl FnOnce(&mut v1::Sampling)) -> String {
        let mut sampling = v1::Sampling::default();
        change(&mut sampling);
        let (code, field) = refused(|r| r.sampling = Some(sampling));
        assert_eq!(code, Code::InvalidRequest);
        field
    }

    #[test]
    fn what_is_left_out_gets_its_default() {
        let r = checked(ids(&[1, 2, 3])).unwrap();
        assert_eq!(r.sampling, Sampling { seed: 99, ..Sampling::default() });
        assert_eq!((r.max_new_tokens, r.stop_at_eos, r.logprobs), (29, true, None));
    }

    #[test]
    fn a_text_prompt_is_tokenised() {
        let text = |t: &str| GenerateRequest { prompt: Some(Prompt::Text(t.into())), ..GenerateRequest::default() };
        assert_eq!(checked(text("4 5")).unwrap().prompt, [4, 5]);
        assert_eq!(checked(text("4 x")).unwrap_err().field, "text");
        assert_eq!(checked(text("4 100")).unwrap_err().field, "text");
        assert_eq!(checked(text(&"1".repeat(PROMPT_TEXT_BYTES_MAX + 1))).unwrap_err().field, "text");
    }

    #[test]
    fn prompts_that_are_none_are_refused() {
        assert_eq!(refused(|r| r.prompt = None), (Code::InvalidRequest, "prompt".into()));
        assert_eq!(checked(ids(&[])).unwrap_err().field, "token_ids");
        let error = checked(ids(&[1, 100])).unwrap_err();
        assert_eq!((error.code, error.field.as_str()), (Code::InvalidRequest, "token_ids"));
        assert!(error.message.contains("id 100 at 1"), "{error}");
    }

    #[test]
    fn prompt_and_output_stay_within_the_context() {
        assert_eq!(checked(ids(&[0; 31])).unwrap().max_new_tokens, 1);
        assert_eq!(checked(ids(&[0; 32])).unwrap_err().code, Code::ContextExceeded);
        assert_eq!(checked(ids(&[0; 33])).unwrap_err().code, Code::ContextExceeded);
        let asked = |n| checked(GenerateRequest { max_new_tokens: Some(n), ..ids(&[0; 30]) });
        assert_eq!(asked(2).unwrap().max_new_tokens, 2);
        assert_eq!(asked(3).unwrap_err().code, Code::ContextExceeded);
        assert_eq!(asked(u32::MAX).unwrap_err().code, Code::ContextExceeded);
        assert_eq!(
            asked(0).unwrap_err(),
            invalid("max_new_tokens", "0 generates nothing; leave it out to fill the context")
        );
    }

    #[test]
    fn sampling_out_of_range_is_refused_by_name() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.1] {
            assert_eq!(refused_sampling(|s| s.temperature = Some(bad)), "sampling.temperature");
            assert_eq!(refused_sampling(|s| s.top_p = Some(bad)), "sampling.top_p");
            assert_eq!(refused_sampling(|s| s.min_p = Some(bad)), "sampling.min_p");
            assert_eq!(refused_sampling(|s| s.repetition_penalty = Some(bad)), "sampling.repetition_penalty");
        }
        for bad in [f32::NAN, 2.1, -2.1] {
            assert_eq!(refused_sampling(|s| s.frequency_penalty = Some(bad)), "sampling.frequency_penalty");
            assert_eq!(refused_sampling(|s| s.presence_penalty = Some(bad)), "sampling.presence_penalty");
        }
        assert_eq!(refused_sampling(|s| s.top_p = Some(0.0)), "sampling.top_p");
        assert_eq!(refused_sampling(|s| s.top_p = Some(1.1)), "sampling.top_p");
        assert_eq!(refused_sampling(|s| s.min_p = Some(1.1)), "sampling.min_p");
        assert_eq!(refused_sampling(|s| s.repetition_penalty = Some(0.0)), "sampling.repetition_penalty");
    }

    #[test]
    fn stops_and_counts_are_bounded() {
        let field = |change: fn(&mut GenerateRequest)| refused(change).1;
        assert_eq!(field(|r| r.stop = vec![String::new()]), "stop");
        assert_eq!(field(|r| r.stop = vec!["x".repeat(STOP_BYTES_MAX + 1)]), "stop");
        assert_eq!(field(|r| r.stop = vec!["x".into(); STOPS_MAX + 1]), "stop");
        assert_eq!(field(|r| r.stop_token_ids = vec![100]), "stop_token_ids");
        assert_eq!(field(|r| r.stop_token_ids = vec![1; STOP_IDS_MAX + 1]), "stop_token_ids");
        assert_eq!(field(|r| r.logprobs = Some(21)), "logprobs");
        assert_eq!(field(|r| r.prompt_logprobs = Some(21)), "prompt_logprobs");
        assert_eq!(field(|r| r.request_id = "x".repeat(REQUEST_ID_BYTES_MAX + 1)), "request_id");
    }

    #[test]
    fn logits_are_bounded_by_what_a_slow_reader_may_hold() {
        let bounds = RequestBounds { vocab: 1 << 20, context: 1 << 20 };
        let ask = |n| {
            let request = GenerateRequest { return_logits: true, max_new_tokens: n, ..ids(&[1]) };
            check(request, &bounds, |_| Ok(vec![]), || 0)
        };
        assert!(ask(Some(64)).is_ok());
        assert_eq!(ask(Some(65)).unwrap_err().field, "return_logits");
        assert_eq!(ask(None).unwrap_err().field, "return_logits");
    }

    proptest! {
        /// Whatever bytes decode to, checking them gives a request within its bounds or a typed error.
        #[test]
        fn any_message_is_checked_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            use prost::Message as _;
            let message = GenerateRequest::decode(bytes.as_slice()).unwrap_or_default();
            if let Ok(r) = checked(message) {
                prop_assert!(r.prompt.iter().all(|t| *t < BOUNDS.vocab) && !r.prompt.is_empty());
                prop_assert!(r.max_new_tokens > 0 && r.prompt.len() as u32 + r.max_new_tokens <= BOUNDS.context);
            }
        }

        #[test]
        fn any_numbers_are_checked_or_refused(
            t in any::<u32>(), p in any::<u32>(), r in any::<u32>(), f in any::<u32>(), seed in any::<Option<u64>>()
        ) {
            let sampling = v1::Sampling {
                temperature: Some(f32::from_bits(t)), top_p: Some(f32::from_bits(p)), seed,
                repetition_penalty: Some(f32::from_bits(r)), frequency_penalty: Some(f32::from_bits(f)),
                ..v1::Sampling::default()
            };
            if let Ok(r) = checked(GenerateRequest { sampling: Some(sampling), ..ids(&[1]) }) {
                let s = r.sampling;
                prop_assert!(s.temperature >= 0.0 && s.top_p > 0.0 && s.top_p <= 1.0 && s.repetition_penalty > 0.0);
                prop_assert!(s.frequency_penalty.abs() <= 2.0);
                prop_assert!(s.temperature.is_finite() && s.repetition_penalty.is_finite());
            }
        }
    }
}
