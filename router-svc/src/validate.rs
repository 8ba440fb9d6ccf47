//! What can be said against a request without knowing the model.

use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::{MeshError, v1};

/// Longest request id, bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 128;
/// Most best tokens whose log-probabilities can be asked for.
pub const LOGPROBS_MAX: u32 = 20;
/// Most stop strings, and most stop ids.
pub const STOPS_MAX: usize = 64;
/// Longest stop string, bytes: that much text is held back while it may be beginning.
pub const STOP_BYTES_MAX: usize = 1024;

/// Refuses a request that no model could serve.
///
/// # Errors
/// [`mesh_proto::Code::InvalidRequest`] naming the field.
pub fn check(request: &v1::GenerateRequest) -> Result<(), MeshError> {
    let refuse = |field: &str, what: String| Err(MeshError::invalid(field, format!("{field} {what}")));
    if request.request_id.len() > REQUEST_ID_BYTES_MAX {
        return refuse("request_id", format!("has {} bytes, at most {REQUEST_ID_BYTES_MAX}", request.request_id.len()));
    }
    match &request.prompt {
        None => return refuse("prompt", "is missing: give text or token_ids".into()),
        Some(Prompt::Text(text)) if text.is_empty() => return refuse("text", "is empty: give a prompt".into()),
        Some(Prompt::TokenIds(ids)) if ids.ids.is_empty() => {
            return refuse("token_ids", "is empty: give at least one id".into());
        }
        Some(_) => {}
    }
    if request.max_new_tokens == Some(0) {
        return refuse("max_new_tokens", "is 0; leave it out for as many as the context takes".into());
    }
    for (field, asked) in [("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)] {
        if asked.is_some_and(|n| n > LOGPROBS_MAX) {
            return refuse(field, format!("is {}, at most {LOGPROBS_MAX}", asked.unwrap_or_default()));
        }
    }
    for (field, count) in [("stop", request.stop.len()), ("stop_token_ids", request.stop_token_ids.len())] {
        if count > STOPS_MAX {
            return refuse(field, format!("has {count} entries, at most {STOPS_MAX}"));
        }
    }
    if let Some(stop) = request.stop.iter().find(|s| s.is_empty() || s.len() > STOP_BYTES_MAX) {
        return refuse("stop", format!("has a string of {} bytes, 1 to {STOP_BYTES_MAX}", stop.len()));
    }
    request.sampling.as_ref().map_or(Ok(()), sampling)
}

fn sampling(s: &v1::Sampling) -> Result<(), MeshError> {
    let above = |from: f32| move |x: f32| x > from;
    let within = |from: f32, to: f32| move |x: f32| (from..=to).contains(&x);
    let check = |field: &str, value: Option<f32>, range: &str, ok: &dyn Fn(f32) -> bool| match value {
        Some(x) if !(x.is_finite() && ok(x)) => {
            let field = format!("sampling.{field}");
            Err(MeshError::invalid(&field, format!("{field} is {x}; it must be {range}")))
        }
        _ => Ok(()),
    };
    check("temperature", s.temperature, "finite and 0 or more", &within(0.0, f32::MAX))?;
    check("top_p", s.top_p, "in (0, 1]", &|x| x > 0.0 && x <= 1.0)?;
    check("min_p", s.min_p, "in [0, 1]", &within(0.0, 1.0))?;
    check("repetition_penalty", s.repetition_penalty, "finite and above 0", &above(0.0))?;
    check("frequency_penalty", s.frequency_penalty, "in [-2, 2]", &within(-2.0, 2.0))?;
    check("presence_penalty", s.presence_penalty, "in [-2, 2]", &within(-2.0, 2.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> v1::GenerateRequest {
        v1::GenerateRequest { prompt: Some(Prompt::Text("hello".into())), ..Default::default() }
    }

    fn sampled(s: v1::Sampling) -> v1::GenerateRequest {
        v1::GenerateRequest { sampling: Some(s), ..base() }
    }

    #[test]
    fn requests_within_the_bounds_pass() {
        let edge = v1::Sampling {
            temperature: Some(0.0),
            top_k: Some(0),
            top_p: Some(1.0),
            min_p: Some(0.0),
            seed: Some(0),
            repetition_penalty: Some(0.1),
            frequency_penalty: Some(-2.0),
            presence_penalty: Some(2.0),
        };
        check(&base()).unwrap();
        check(&v1::GenerateRequest { logprobs: Some(20), max_new_tokens: Some(1), ..sampled(edge) }).unwrap();
    }

    #[test]
    fn whatever_no_model_could_serve_is_refused_with_its_field() {
        let s = v1::Sampling::default;
        let ids = Prompt::TokenIds(v1::TokenIds::default());
        let cases = [
            (v1::GenerateRequest { prompt: None, ..base() }, "prompt"),
            (v1::GenerateRequest { prompt: Some(Prompt::Text(String::new())), ..base() }, "text"),
            (v1::GenerateRequest { prompt: Some(ids), ..base() }, "token_ids"),
            (v1::GenerateRequest { max_new_tokens: Some(0), ..base() }, "max_new_tokens"),
            (v1::GenerateRequest { request_id: "x".repeat(129), ..base() }, "request_id"),
            (v1::GenerateRequest { logprobs: Some(21), ..base() }, "logprobs"),
            (v1::GenerateRequest { prompt_logprobs: Some(21), ..base() }, "prompt_logprobs"),
            (v1::GenerateRequest { stop: vec![String::new()], ..base() }, "stop"),
            (v1::GenerateRequest { stop: vec!["x".into(); 65], ..base() }, "stop"),
            (v1::GenerateRequest { stop_token_ids: vec![1; 65], ..base() }, "stop_token_ids"),
            (sampled(v1::Sampling { temperature: Some(f32::NAN), ..s() }), "sampling.temperature"),
            (sampled(v1::Sampling { temperature: Some(-0.1), ..s() }), "sampling.temperature"),
            (sampled(v1::Sampling { temperature: Some(f32::INFINITY), ..s() }), "sampling.temperature"),
            (sampled(v1::Sampling { top_p: Some(0.0), ..s() }), "sampling.top_p"),
            (sampled(v1::Sampling { top_p: Some(1.1), ..s() }), "sampling.top_p"),
            (sampled(v1::Sampling { min_p: Some(-0.1), ..s() }), "sampling.min_p"),
            (sampled(v1::Sampling { repetition_penalty: Some(0.0), ..s() }), "sampling.repetition_penalty"),
            (sampled(v1::Sampling { frequency_penalty: Some(2.1), ..s() }), "sampling.frequency_penalty"),
            (sampled(v1::Sampling { presence_penalty: Some(f32::NAN), ..s() }), "sampling.presence_penalty"),
        ];
        for (request, field) in cases {
            let refused = check(&request).unwrap_err();
            assert_eq!((refused.code, refused.field.as_str()), (mesh_proto::Code::InvalidRequest, field));
        }
    }
}
