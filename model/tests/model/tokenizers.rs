//! Tokenizers against transformers' own ids and texts, and text in pieces against the text of the whole.

use std::fs;
use std::path::PathBuf;

use mesh_model::{ModelError, Tokenizer};
use proptest::prelude::*;
use serde_json::Value;

use crate::support::{fixture, models};

/// Tokenizer directory and its golden file: byte-level and llama-style with byte fallback. The first golden's own
/// tokenizer is the same file as the tiny model's.
fn goldens() -> [(PathBuf, PathBuf); 2] {
    let golden = |name: &str| fixture("tokenizers").join(name).join("tokenizer_golden.json");
    [
        (fixture("tiny-moe"), golden("qwen2-style-2048")),
        (fixture("tokenizers/llama-style-1024"), golden("llama-style-1024")),
    ]
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The whole text out of pieces, each of which must be whole characters by its type.
fn in_pieces(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = tokenizer.decoder();
    let mut text: String = ids.iter().map(|id| decoder.push(*id).unwrap()).collect();
    text.push_str(&decoder.flush().unwrap());
    text
}

#[test]
fn ids_and_texts_are_those_of_transformers() {
    for (dir, golden) in goldens() {
        let tokenizer = Tokenizer::open(dir).unwrap();
        let golden: Value = serde_json::from_str(&fs::read_to_string(golden).unwrap()).unwrap();
        assert_eq!(tokenizer.vocab_size() as u64, golden["vocab_size"].as_u64().unwrap());
        let cases = golden["encode"].as_array().unwrap();
        assert!(cases.len() > 30);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let expected = ids(&case["ids"]);
            assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text:?}");
            let decoded = case["decode_skip_special"].as_str().unwrap();
            assert_eq!(in_pieces(&tokenizer, &expected), decoded, "{text:?}");
            assert_eq!(in_pieces(&tokenizer, &ids(&case["ids_no_special"])), decoded, "{text:?}");
        }
        for chat in golden["chat"].as_array().unwrap().iter().filter(|c| c.get("ids").is_some()) {
            let expected = ids(&chat["ids"]);
            assert_eq!(in_pieces(&tokenizer, &expected), tokenizer.decode(&expected).unwrap());
        }
    }
}

#[test]
fn what_the_tiny_model_wrote_reads_the_same_in_pieces() {
    let dir = fixture("tiny-moe");
    let tokenizer = Tokenizer::open(&dir).unwrap();
    let golden: Value = serde_json::from_str(&fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
    for prompt in golden["prompts"].as_array().unwrap() {
        let ids = ids(&prompt["f32"]["tokens"]);
        assert_eq!(in_pieces(&tokenizer, &ids), prompt["f32"]["text"].as_str().unwrap());
    }
}

/// Texts whose characters take several tokens, followed at every cut by the rest.
#[test]
fn characters_of_many_tokens_are_never_split() {
    let text = "naïve 日本語のテキスト 한국어 👩‍👩‍👧‍👦🇫🇷 Ω≈ç √∫ 🫠";
    for (dir, _) in goldens() {
        let tokenizer = Tokenizer::open(dir).unwrap();
        let ids = tokenizer.encode(text).unwrap();
        for cut in 0..=ids.len() {
            let mut decoder = tokenizer.decoder();
            let mut given = String::new();
            for id in &ids[..cut] {
                given.push_str(&decoder.push(*id).unwrap());
                assert!(text.starts_with(&given), "{given:?} is not certain");
            }
            let rest = decoder.clone().flush().unwrap();
            assert_eq!(format!("{given}{rest}"), tokenizer.decode(&ids[..cut]).unwrap(), "cut at {cut}");
            given.extend(ids[cut..].iter().map(|id| decoder.push(*id).unwrap()));
            assert_eq!(given + &decoder.flush().unwrap(), text, "cut at {cut}");
        }
    }
}

#[test]
fn plain_text_is_given_token_by_token() {
    for (dir, _) in goldens() {
        let tokenizer = Tokenizer::open(dir).unwrap();
        let ids = tokenizer.encode("In the beginning God created the heaven and the earth.").unwrap();
        let mut decoder = tokenizer.decoder();
        let mut given = String::new();
        for (at, id) in ids.iter().enumerate() {
            given.push_str(&decoder.push(*id).unwrap());
            assert_eq!(given, tokenizer.decode(&ids[..=at]).unwrap(), "nothing is held back");
        }
        assert_eq!(decoder.flush().unwrap(), "");
    }
}

#[test]
fn special_and_unknown_ids_give_no_text() {
    for (dir, _) in goldens() {
        let tokenizer = Tokenizer::open(dir).unwrap();
        let mut decoder = tokenizer.decoder();
        for id in [0, 1, 2, tokenizer.vocab_size() as u32, u32::MAX] {
            assert_eq!(decoder.push(id).unwrap(), "");
        }
        assert_eq!(decoder.flush().unwrap(), "");
    }
}

#[test]
fn every_model_has_a_tokenizer_that_opens() {
    for dir in models() {
        let tokenizer = Tokenizer::open(&dir).unwrap();
        let text = "Let there be light";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text, "{}", dir.display());
    }
}

#[test]
fn a_missing_or_broken_tokenizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::open(dir.path()), Err(ModelError::Io { .. })));
    for broken in ["", "{", "[]", r#"{"version": "1.0"}"#] {
        fs::write(dir.path().join("tokenizer.json"), broken).unwrap();
        let refused = Tokenizer::open(dir.path());
        assert!(matches!(refused, Err(ModelError::Tokenizer { .. })), "{broken:?}: {refused:?}");
    }
}

#[test]
fn a_prompt_is_never_cut_by_what_training_left_in_the_file() {
    let file = fs::read_to_string(fixture("tiny-moe/tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&file).unwrap();
    json["truncation"] = serde_json::json!(
        {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    assert!(Tokenizer::open(dir.path()).unwrap().encode("one two three four five").unwrap().len() > 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Even ids at random, which make bytes that are no text, read in pieces as in the whole.
    #[test]
    fn any_ids_in_pieces_are_the_whole(ids in proptest::collection::vec(0u32..1100, 0..40), bytes in any::<bool>()) {
        // The llama-style vocabulary has its 256 byte tokens right after the special ones.
        let ids: Vec<u32> = if bytes { ids.iter().map(|id| 3 + id % 270).collect() } else { ids };
        for (dir, _) in goldens() {
            let tokenizer = shared(dir);
            prop_assert_eq!(in_pieces(tokenizer, &ids), tokenizer.decode(&ids).unwrap());
        }
    }
}

/// Tokenizers are parsed once for all cases.
fn shared(dir: PathBuf) -> &'static Tokenizer {
    use std::sync::OnceLock;
    static SHARED: [OnceLock<Tokenizer>; 2] = [OnceLock::new(), OnceLock::new()];
    let at = usize::from(!dir.ends_with("tiny-moe"));
    SHARED[at].get_or_init(|| Tokenizer::open(dir).unwrap())
}
