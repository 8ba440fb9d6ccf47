//! Text to token ids, as the model's `tokenizer.json` says.

use std::path::Path;
use std::sync::Arc;

use crate::decode::{Scheme, TextDecoder};
use crate::error::ModelError;
use crate::files::{TOKENIZER_BYTES_MAX, read_text};

/// A model's tokenizer. Clones share one.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    scheme: Scheme,
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a model directory.
    ///
    /// # Errors
    /// [`ModelError::Io`] when there is none, [`ModelError::Tokenizer`] when it cannot be understood.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ModelError> {
        let file = dir.as_ref().join("tokenizer.json");
        let text = read_text(&file, TOKENIZER_BYTES_MAX)?;
        let mut inner: tokenizers::Tokenizer =
            text.parse().map_err(|e| ModelError::Tokenizer { reason: format!("{}: {e}", file.display()) })?;
        // A file may carry its training's truncation or padding; a prompt is never cut or padded in silence.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(refused)?;
        let scheme = Scheme::of(&inner);
        Ok(Self { inner: Arc::new(inner), scheme })
    }

    /// The ids of a text, with the special tokens that the tokenizer itself adds (such as a beginning of text).
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let encoding = self.inner.encode_fast(text, true).map_err(refused)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, special tokens left out: what a [`TextDecoder`] gives in pieces.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        self.inner.decode(ids, true).map_err(refused)
    }

    /// Tokens that it knows, added ones included. The model's own vocabulary may be padded beyond.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// A decoder for one text's ids as they come.
    pub fn decoder(&self) -> TextDecoder {
        TextDecoder::new(Arc::clone(&self.inner), self.scheme)
    }
}

pub(crate) fn refused(e: tokenizers::Error) -> ModelError {
    ModelError::Tokenizer { reason: e.to_string() }
}
