//! A request's text as it becomes certain, and the end of generation by stop strings.

/// Why tokens cannot be made text: a defect of the tokenizer's files.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tokenizer cannot make text of the tokens: {0}")]
pub struct DetokenizeError(pub String);

/// Turns token ids into text, piece by piece; a piece never ends within a UTF-8 character.
pub trait Detokenize: Send {
    /// The text that became certain with this token; often empty.
    ///
    /// # Errors
    /// [`DetokenizeError`].
    fn push(&mut self, token: u32) -> Result<String, DetokenizeError>;
    /// What was still held back.
    ///
    /// # Errors
    /// [`DetokenizeError`].
    fn flush(&mut self) -> Result<String, DetokenizeError>;
}

/// Cuts text at the first stop string, and holds back what could still become one.
///
/// The stop that *completes* first ends the text, of several completing there the one that began first: as if the text
/// came character by character, so how it was cut into tokens does not matter.
#[derive(Debug)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopFilter {
    /// Empty strings never stop anything; requests with such are refused before.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new(), stopped: false }
    }

    /// Whether a stop string has ended the text.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Takes a piece of text and returns what is certain to be part of the whole.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        if self.stops.is_empty() {
            return piece.to_owned();
        }
        self.held.push_str(piece);
        if let Some(start) = self.first_stop() {
            self.stopped = true;
            let mut held = std::mem::take(&mut self.held);
            held.truncate(start);
            return held;
        }
        let certain = self.held.len() - self.beginning();
        let rest = self.held.split_off(certain);
        std::mem::replace(&mut self.held, rest)
    }

    /// What is still held back when generation ends otherwise.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the stop that completes first begins.
    fn first_stop(&self) -> Option<usize> {
        let found = self.stops.iter().filter_map(|s| self.held.find(s.as_str()).map(|at| (at + s.len(), at)));
        found.min().map(|(_, start)| start)
    }

    /// Length of the longest end of the held text with which some stop begins.
    fn beginning(&self) -> usize {
        let longest = self.stops.iter().map(|s| s.len() - 1).max().unwrap_or(0).min(self.held.len());
        (1..=longest)
            .rev()
            .find(|len| {
                let start = self.held.len() - len;
                self.held.is_char_boundary(start) && self.stops.iter().any(|s| s.starts_with(&self.held[start..]))
            })
            .unwrap_or(0)
    }
}

/// A request's text: detokenised, cut at stop strings.
pub struct TextOutput {
    detokenizer: Box<dyn Detokenize>,
    filter: StopFilter,
}

impl TextOutput {
    /// Text by `detokenizer`, ended by the first of `stops`.
    pub fn new(detokenizer: Box<dyn Detokenize>, stops: Vec<String>) -> Self {
        Self { detokenizer, filter: StopFilter::new(stops) }
    }

    /// The text that became certain with this token.
    ///
    /// # Errors
    /// [`DetokenizeError`].
    pub fn push(&mut self, token: u32) -> Result<String, DetokenizeError> {
        let piece = self.detokenizer.push(token)?;
        Ok(self.filter.push(&piece))
    }

    /// Whether a stop string has ended the text.
    pub fn stopped(&self) -> bool {
        self.filter.stopped()
    }

    /// The rest of the text; nothing once a stop string has ended it.
    ///
    /// # Errors
    /// [`DetokenizeError`].
    pub fn finish(&mut self) -> Result<String, DetokenizeError> {
        let rest = self.detokenizer.flush()?;
        let mut text = self.filter.push(&rest);
        text.push_str(&self.filter.finish());
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let mut f = StopFilter::new(stops.iter().map(|s| s.to_string()).collect());
        let out = pieces.iter().map(|p| f.push(p)).collect();
        let rest = f.finish();
        (out, rest, f.stopped())
    }

    #[test]
    fn text_is_held_only_while_a_stop_may_be_beginning() {
        let (out, rest, stopped) = run(&["<end>"], &["a <", "e", "x", " <en", "d> b"]);
        assert_eq!(out, ["a ", "", "<ex", " ", ""]);
        assert_eq!((rest.as_str(), stopped), ("", true));
    }

    #[test]
    fn what_was_held_comes_at_the_end_when_no_stop_came() {
        let (out, rest, stopped) = run(&["\n\n"], &["a\n"]);
        assert_eq!((out[0].as_str(), rest.as_str(), stopped), ("a", "\n", false));
    }

    #[test]
    fn nothing_comes_after_a_stop() {
        let (out, rest, _) = run(&["b"], &["abc", "def"]);
        assert_eq!((out.concat() + &rest).as_str(), "a");
    }

    #[test]
    fn overlapping_beginnings_and_wide_characters() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]).0.concat(), "a");
        assert_eq!(run(&["é→"], &["xé", "é", "→"]).0.concat(), "xé");
        assert_eq!(run(&["ë"], &["é"]).0, ["é"], "shares its first byte only");
    }

    #[test]
    fn the_stop_that_completes_first_ends_the_text() {
        assert_eq!(run(&["abc", "b"], &["abc"]).0.concat(), "a");
        assert_eq!(run(&["abc", "bc"], &["abc"]).0.concat(), "");
    }

    /// Bytes as tokens, which never split a character.
    struct Bytes(Vec<u8>);

    impl Detokenize for Bytes {
        fn push(&mut self, token: u32) -> Result<String, DetokenizeError> {
            self.0.push(token as u8);
            let whole = String::from_utf8(self.0.clone()).inspect(|_| self.0.clear());
            Ok(whole.unwrap_or_default())
        }

        fn flush(&mut self) -> Result<String, DetokenizeError> {
            Ok(String::from_utf8_lossy(&std::mem::take(&mut self.0)).into_owned())
        }
    }

    #[test]
    fn an_incomplete_character_waits_for_its_rest_or_the_end() {
        let mut t = TextOutput::new(Box::new(Bytes(vec![])), vec![]);
        let text: Vec<String> = "é".bytes().chain([0xc3]).map(|b| t.push(b.into()).unwrap()).collect();
        assert_eq!(text, ["", "é", ""]);
        assert_eq!(t.finish().unwrap(), "\u{fffd}");
    }

    proptest! {
        /// However the text is cut, the whole is the same: the text up to the first stop to complete.
        #[test]
        fn the_whole_text_does_not_depend_on_the_pieces(
            text in "[abé]{0,24}", stops in prop::collection::vec("[abé]{1,4}", 0..3),
            cuts in prop::collection::vec(0usize..25, 0..6)
        ) {
            let mut expected = text.clone();
            'scan: for (end, _) in text.char_indices().skip(1).chain([(text.len(), ' ')]) {
                for start in (0..end).filter(|i| text.is_char_boundary(*i)) {
                    if stops.iter().any(|s| *s == text[start..end]) {
                        expected.truncate(start);
                        break 'scan;
                    }
                }
            }
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|c| text.is_char_boundary(*c)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let mut filter = StopFilter::new(stops);
            let mut whole = String::new();
            for w in cuts.windows(2) {
                whole += &filter.push(&text[w[0]..w[1]]);
            }
            whole += &filter.finish();
            prop_assert_eq!(whole, expected);
        }
    }
}
