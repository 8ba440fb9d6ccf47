//! Prompts from a file in ShareGPT's format: a JSON array of conversations of `{"from", "value"}`.
//!
//! The file is read as a stream and only as far as needed; what is kept is bounded.

use std::fmt;
use std::io::{BufReader, Read};
use std::path::Path;

use serde::de::{DeserializeSeed, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::error::BenchError;
use super::random::Random;

/// Most bytes of a file that are read; the usual ShareGPT file has 0.7 GB.
pub const FILE_BYTES_MAX: u64 = 4 << 30;
/// Most conversations that are kept.
pub const PAIRS_MAX: usize = 65_536;
/// Most bytes of prompts that are kept.
pub const KEPT_BYTES_MAX: usize = 256 << 20;
/// Longest text of one prompt or reply that is kept, bytes.
pub const TEXT_BYTES_MAX: usize = 256 << 10;
/// The seed's branch for the order of prompts.
const STREAM: u64 = u64::from_be_bytes(*b"dataset ");

/// The first question of a conversation and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// What is asked.
    pub prompt: String,
    /// How long the answer was: its text is not needed, the model under test gives its own.
    pub reply_bytes: usize,
}

/// What a file had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dataset {
    /// What can be asked.
    pub pairs: Vec<Pair>,
    /// Conversations passed over.
    pub skipped: Skipped,
}

/// Conversations that were read and not used, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// No question followed by an answer.
    pub no_pair: u64,
    /// A text of more than [`TEXT_BYTES_MAX`], or estimated to be longer than the context takes.
    pub too_long: u64,
}

#[derive(Deserialize)]
struct Conversation {
    #[serde(default)]
    conversations: Vec<Turn>,
}

#[derive(Deserialize)]
struct Turn {
    #[serde(default)]
    from: String,
    #[serde(default)]
    value: String,
}

impl Conversation {
    /// The first question that an answer follows. Datasets name the two sides in several ways.
    fn first_pair(self) -> Option<Pair> {
        let asks = |turn: &Turn| matches!(turn.from.as_str(), "human" | "user");
        let answers = |turn: &Turn| matches!(turn.from.as_str(), "gpt" | "assistant" | "chatgpt" | "bing" | "bard");
        let says = |turn: &Turn| !turn.value.trim().is_empty();
        let found =
            self.conversations.windows(2).position(|two| asks(&two[0]) && answers(&two[1]) && two.iter().all(says))?;
        let mut turns = self.conversations.into_iter().skip(found).map(|turn| turn.value);
        Some(Pair { prompt: turns.next()?, reply_bytes: turns.next()?.len() })
    }
}

/// Reads a file.
///
/// # Errors
/// [`BenchError::Dataset`] when it cannot be read, is not in the format, or has no usable conversation.
pub fn read_file(path: &Path, seed: u64) -> Result<Dataset, BenchError> {
    let bad = |why: String| BenchError::Dataset { path: path.to_owned(), why };
    let file = std::fs::File::open(path).map_err(|e| bad(e.to_string()))?;
    let mut dataset = read(BufReader::with_capacity(1 << 16, file)).map_err(bad)?;
    if dataset.pairs.is_empty() {
        let Skipped { no_pair, too_long } = dataset.skipped;
        let why =
            format!("none of its {} conversations is a question with an answer of usable length", no_pair + too_long);
        return Err(bad(why));
    }
    shuffle(&mut dataset.pairs, &mut Random::new(seed, &[STREAM]));
    Ok(dataset)
}

/// Fisher and Yates.
fn shuffle(pairs: &mut [Pair], random: &mut Random) {
    for i in (1..pairs.len()).rev() {
        pairs.swap(i, random.below(i as u64 + 1) as usize);
    }
}

/// Reads as many conversations as are kept; a mistake in the format is told with its line.
fn read(from: impl Read) -> Result<Dataset, String> {
    let mut dataset = Dataset::default();
    let mut full = false;
    let mut limited = from.take(FILE_BYTES_MAX);
    let mut json = serde_json::Deserializer::from_reader(&mut limited);
    let read = Collect { dataset: &mut dataset, full: &mut full }.deserialize(&mut json);
    match read {
        Ok(()) => Ok(dataset),
        // The visitor ended the reading itself.
        Err(_) if full => Ok(dataset),
        Err(_) if limited.limit() == 0 => Err(format!("is larger than {FILE_BYTES_MAX} bytes")),
        Err(error) => Err(format!("is not an array of ShareGPT conversations: {error}")),
    }
}

/// Takes conversations out of the array one by one, so that the file is never in memory as a whole.
struct Collect<'a> {
    dataset: &'a mut Dataset,
    full: &'a mut bool,
}

impl<'de> DeserializeSeed<'de> for Collect<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Collect<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of conversations")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut kept_bytes = 0;
        while let Some(conversation) = seq.next_element::<Conversation>()? {
            match conversation.first_pair() {
                None => self.dataset.skipped.no_pair += 1,
                Some(pair) if pair.prompt.len().max(pair.reply_bytes) > TEXT_BYTES_MAX => {
                    self.dataset.skipped.too_long += 1;
                }
                Some(pair) => {
                    kept_bytes += pair.prompt.len();
                    self.dataset.pairs.push(pair);
                }
            }
            if self.dataset.pairs.len() >= PAIRS_MAX || kept_bytes >= KEPT_BYTES_MAX {
                *self.full = true;
                return Err(serde::de::Error::custom("enough"));
            }
        }
        // A trailing element of another kind would have been an error above.
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"[
        {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "x": 1},
        {"id": "b", "conversations": [{"from": "gpt", "value": "left over"}, {"from": "user", "value": "Why?"},
            {"from": "assistant", "value": "So.", "markdown": null}, {"from": "human", "value": "more"}]},
        {"id": "c", "conversations": [{"from": "human", "value": "nobody answers"}]},
        {"id": "d", "conversations": []},
        {"id": "e"},
        {"conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": "to nothing"}]}
    ]"#;

    fn pair(prompt: &str, reply: &str) -> Pair {
        Pair { prompt: prompt.to_owned(), reply_bytes: reply.len() }
    }

    #[test]
    fn the_first_question_with_an_answer_of_each_conversation_is_taken() {
        let dataset = read(FILE.as_bytes()).unwrap();
        assert_eq!(dataset.pairs, [pair("Hi", "Hello."), pair("Why?", "So.")]);
        assert_eq!(dataset.skipped, Skipped { no_pair: 4, too_long: 0 });
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        for (text, place) in [("{}", "line 1"), ("[{}", "EOF"), ("[\n3]", "line 2"), ("", "EOF"), ("[{},]", "line 1")] {
            let error = read(text.as_bytes()).unwrap_err();
            assert!(error.contains("ShareGPT") && error.contains(place), "{text}: {error}");
        }
    }

    #[test]
    fn reading_ends_when_enough_is_kept_and_long_texts_are_passed_over() {
        let long = "x".repeat(TEXT_BYTES_MAX + 1);
        let one = r#"{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]},"#;
        let mut text =
            format!(r#"[{{"conversations":[{{"from":"human","value":"{long}"}},{{"from":"gpt","value":"a"}}]}},"#);
        text.push_str(&one.repeat(PAIRS_MAX));
        // Never reached: what follows is not even JSON.
        text.push_str("garbage");
        let dataset = read(text.as_bytes()).unwrap();
        assert_eq!((dataset.pairs.len(), dataset.skipped.too_long), (PAIRS_MAX, 1));
    }

    #[test]
    fn a_seed_fixes_the_order_and_a_file_without_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chats.json");
        let chats: Vec<_> = (0..50)
            .map(|i| {
                serde_json::json!({"conversations": [
            {"from": "human", "value": i.to_string()}, {"from": "gpt", "value": "a"}]})
            })
            .collect();
        std::fs::write(&path, serde_json::to_vec(&chats).unwrap()).unwrap();
        let order = |seed| read_file(&path, seed).unwrap().pairs;
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
        let mut sorted: Vec<u32> = order(1).iter().map(|p| p.prompt.parse().unwrap()).collect();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());

        std::fs::write(&path, "[{}]").unwrap();
        let refused = read_file(&path, 1).unwrap_err().to_string();
        assert!(refused.contains("chats.json") && refused.contains("none of its 1"), "{refused}");
        assert!(read_file(&dir.path().join("none"), 1).unwrap_err().to_string().contains("none"));
    }
}
