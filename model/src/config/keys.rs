//! Typed, bounded look-ups in a JSON object; every refusal names the key.

use serde_json::{Map, Value};

use crate::error::ModelError;

/// One JSON object of a config and where it stands (`""`, or `"rope_scaling."`).
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    object: &'a Map<String, Value>,
    within: &'static str,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(object: &'a Map<String, Value>, within: &'static str) -> Self {
        Self { object, within }
    }

    /// The key as messages call it.
    pub(crate) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.within)
    }

    /// The value, `None` for an absent key and for null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn missing(&self, key: &str) -> ModelError {
        ModelError::MissingKey { key: self.path(key) }
    }

    pub(crate) fn bad(&self, key: &str, found: &Value, expected: impl Into<String>) -> ModelError {
        ModelError::BadKey { key: self.path(key), found: shorten(found), expected: expected.into() }
    }

    /// An object within this one.
    pub(crate) fn object(&self, key: &'static str, within: &'static str) -> Result<Option<Keys<'a>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Keys::new(object, within))),
            Some(other) => Err(self.bad(key, other, "an object")),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.bad(key, other, "a string")),
        }
    }

    pub(crate) fn flag(&self, key: &str, absent: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(absent),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.bad(key, other, "true or false")),
        }
    }

    /// A whole number of `min..=max`.
    pub(crate) fn count_or_none(&self, key: &str, min: usize, max: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        let number = number.filter(|n| (min..=max).contains(n));
        number.map(Some).ok_or_else(|| self.bad(key, value, format!("a whole number from {min} to {max}")))
    }

    pub(crate) fn count(&self, key: &str, min: usize, max: usize) -> Result<usize, ModelError> {
        self.count_or_none(key, min, max)?.ok_or_else(|| self.missing(key))
    }

    /// One number under either of two names, which must agree where both stand.
    pub(crate) fn count_either(&self, key: &str, alias: &str, min: usize, max: usize) -> Result<usize, ModelError> {
        match (self.count_or_none(key, min, max)?, self.count_or_none(alias, min, max)?) {
            (Some(a), Some(b)) if a != b => Err(ModelError::Contradiction {
                first: self.path(key),
                second: self.path(alias),
                reason: format!("{a} and {b}"),
            }),
            (Some(n), _) | (None, Some(n)) => Ok(n),
            (None, None) => Err(self.missing(key)),
        }
    }

    /// A finite number above zero.
    pub(crate) fn positive_or_none(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        // What a single cannot hold would become zero or infinite further down.
        let sound = |n: &f64| (*n as f32).is_normal() && *n > 0.0;
        let number = value.as_f64().filter(sound);
        number.map(Some).ok_or_else(|| self.bad(key, value, "a number above zero"))
    }

    pub(crate) fn positive(&self, key: &str) -> Result<f64, ModelError> {
        self.positive_or_none(key)?.ok_or_else(|| self.missing(key))
    }

    /// Token ids: null, one, or a list.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match value {
            Value::Array(list) if list.len() <= EOS_MAX => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.bad(key, value, format!("a token id or a list of at most {EOS_MAX}")))
    }
}

/// Token ids that one key may list.
const EOS_MAX: usize = 64;

/// A value as messages show it: never pages of it.
fn shorten(value: &Value) -> String {
    const SHOWN_MAX: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
