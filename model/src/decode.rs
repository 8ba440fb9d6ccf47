//! Ids back to text, piece by piece: only what no later token can change is given, so a character is never split and
//! the pieces together are exactly the decoding of the whole.

use std::sync::Arc;

use tokenizers::DecoderWrapper;

use crate::error::ModelError;
use crate::tokenizer::refused;

/// How a tokenizer's tokens become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// Tokens are bytes in a printable alphabet (GPT-2's). The bytes so far are the state.
    ByteLevel,
    /// Tokens are text, in a chain of decoders that may look at the start of the text and at runs of byte tokens.
    Windowed {
        /// Whether `<0x0A>` stands for a byte. A whole run of them is text or it is not: only its end tells.
        byte_fallback: bool,
    },
}

impl Scheme {
    pub(crate) fn of(tokenizer: &tokenizers::Tokenizer) -> Self {
        match tokenizer.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => Scheme::ByteLevel,
            Some(decoder) => Scheme::Windowed { byte_fallback: falls_back(decoder) },
            None => Scheme::Windowed { byte_fallback: false },
        }
    }
}

fn falls_back(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteFallback(_) => true,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(falls_back),
        _ => false,
    }
}

/// Decodes one text's ids as they come. Special tokens, and ids that the tokenizer does not know, give no text.
#[derive(Clone, Debug)]
pub struct TextDecoder {
    tokenizer: Arc<tokenizers::Tokenizer>,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// Bytes that may be the beginning of a character.
    Bytes(Vec<u8>),
    /// Ids whose text is not all given yet, after those that the decoder must see before them.
    Window { ids: Vec<u32>, context: usize, byte_fallback: bool },
}

impl TextDecoder {
    pub(crate) fn new(tokenizer: Arc<tokenizers::Tokenizer>, scheme: Scheme) -> Self {
        let state = match scheme {
            Scheme::ByteLevel => State::Bytes(Vec::new()),
            Scheme::Windowed { byte_fallback } => State::Window { ids: Vec::new(), context: 0, byte_fallback },
        };
        Self { tokenizer, state }
    }

    /// Takes the next id and gives the text that is certain by now; often one token's, sometimes none, sometimes more.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer's decoder refuses.
    pub fn push(&mut self, id: u32) -> Result<String, ModelError> {
        let Some(token) = self.tokenizer.id_to_token(id) else { return Ok(String::new()) };
        if self.tokenizer.get_added_vocabulary().is_special_token(&token) {
            return Ok(String::new());
        }
        match &mut self.state {
            State::Bytes(pending) => {
                push_bytes(&token, pending);
                Ok(take_certain(pending))
            }
            State::Window { ids, byte_fallback, .. } => {
                ids.push(id);
                if *byte_fallback && is_byte(&token) {
                    return Ok(String::new());
                }
                self.advance(false)
            }
        }
    }

    /// The rest, at the end of the text: what was held back, with the replacement character for what never became one.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer's decoder refuses.
    pub fn flush(&mut self) -> Result<String, ModelError> {
        match &mut self.state {
            State::Bytes(pending) => Ok(String::from_utf8_lossy(&std::mem::take(pending)).into_owned()),
            State::Window { .. } => {
                let rest = self.advance(true)?;
                if let State::Window { ids, context, .. } = &mut self.state {
                    ids.clear();
                    *context = 0;
                }
                Ok(rest)
            }
        }
    }

    /// Decodes the window with and without its new ids; the difference is their text.
    ///
    /// The context before them stays as long as it has given no text of its own: a decoder that strips the first space
    /// of a text must see in every window what it saw in the whole.
    fn advance(&mut self, last: bool) -> Result<String, ModelError> {
        let State::Window { ids, context, .. } = &mut self.state else { return Ok(String::new()) };
        let known = self.tokenizer.decode(&ids[..*context], true).map_err(refused)?;
        let whole = self.tokenizer.decode(ids, true).map_err(refused)?;
        let Some(fresh) = whole.strip_prefix(known.as_str()).filter(|f| !f.is_empty()) else {
            return Ok(String::new());
        };
        if fresh.ends_with(char::REPLACEMENT_CHARACTER) && !last {
            return Ok(String::new());
        }
        let fresh = fresh.to_owned();
        ids.drain(..*context);
        *context = ids.len();
        Ok(fresh)
    }
}

/// Whether a token is one byte in the spelling of byte fallback.
fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    hex.is_some_and(|h| h.len() == 2 && u8::from_str_radix(h, 16).is_ok())
}

/// A byte-level token's bytes: by the alphabet, or its own where it has characters outside of it (an added token).
fn push_bytes(token: &str, pending: &mut Vec<u8>) {
    let before = pending.len();
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => pending.push(byte),
            None => {
                pending.truncate(before);
                pending.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The byte that a character of the alphabet stands for: itself where it is printable, else numbered from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => Some(code as u8).filter(|b| printable(*b)),
        code => (0..=u8::MAX).filter(|b| !printable(*b)).nth(code as usize - 0x100),
    }
}

/// Takes all that is certain off the front: whole characters, and a replacement for what can never become one. At most
/// three bytes stay, the beginning of a character.
fn take_certain(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = pending.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(e) => {
                let (valid, after) = rest.split_at(e.valid_up_to());
                text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                rest = after;
                let Some(invalid) = e.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[invalid..];
            }
        }
    }
    let kept = rest.len();
    pending.drain(..pending.len() - kept);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_alphabet_is_the_one_that_the_library_encodes_with() {
        let mut bytes: Vec<u8> = Vec::new();
        for c in tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet() {
            bytes.push(byte_of(c).unwrap());
        }
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
        // The three best known: space, newline, tab.
        assert_eq!(['\u{120}', '\u{10A}', '\u{109}'].map(byte_of), [Some(b' '), Some(b'\n'), Some(b'\t')]);
        assert_eq!([' ', '\u{144}', '\u{10FFFF}'].map(byte_of), [None, None, None]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn bytes_in_any_pieces_decode_as_the_whole(
            bytes in proptest::collection::vec(any::<u8>(), 0..40), piece in 1usize..5
        ) {
            let (mut pending, mut text) = (Vec::new(), String::new());
            for piece in bytes.chunks(piece) {
                pending.extend_from_slice(piece);
                text.push_str(&take_certain(&mut pending));
                prop_assert!(pending.len() < 4);
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
