//! What is asked: the prompt and the length of each request, from the seed and the request's number alone.

use std::path::PathBuf;

use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::generate_response::Event;
use mesh_proto::v1::{GenerateRequest, ModelInfo, Sampling, TokenIds};

use super::args::BenchArgs;
use super::dataset::{Dataset, Pair};
use super::error::BenchError;
use super::lengths::Length;
use super::random::Random;
use crate::client::{Client, failed};
use crate::exit::CliError;

/// Tokens to make when nobody says.
pub const OUTPUT_DEFAULT: Length = Length::Fixed(64);
/// Most bytes of text that are sent to learn how many bytes a token has.
const CALIBRATION_BYTES_MAX: usize = 8192;
/// Part of the context that prompts from a dataset may fill by estimate; the rest is for the estimate's error.
const CONTEXT_SHARE: f64 = 0.8;
/// The seed's branches.
const LENGTHS: u64 = u64::from_be_bytes(*b"lengths ");
const PROMPTS: u64 = u64::from_be_bytes(*b"prompts ");
const SAMPLING: u64 = u64::from_be_bytes(*b"sampling");

#[derive(Debug)]
enum Source {
    /// Random ids of the vocabulary.
    Ids { input: Length },
    /// Texts, and how long their answers were.
    Texts { pairs: Vec<Pair>, bytes_per_token: f64 },
}

/// Requests to send.
#[derive(Debug)]
pub struct Workload {
    source: Source,
    output: Option<Length>,
    context: u32,
    vocab: u32,
    seed: u64,
    ignore_eos: bool,
    sampled: Option<Sampled>,
    /// Requests repeat after this many.
    period: u64,
}

/// Requests that sample, each with a seed of its own; the others are greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// Their part of all.
    pub share: f64,
    /// How they sample.
    pub temperature: f32,
}

/// Random requests of which there are only so many.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Repeating {
    /// Lengths of the prompts.
    pub input: Length,
    /// Lengths of the answers.
    pub output: Length,
    /// Which of them sample.
    pub sampled: Sampled,
    /// Makes them repeatable.
    pub seed: u64,
    /// How many differ: request `n` is request `n + period` again.
    pub period: u64,
}

/// A request to send and what it asks for.
#[derive(Debug)]
pub struct Ask {
    /// The message.
    pub request: GenerateRequest,
    /// Tokens that must come unless the model may stop by itself.
    pub output: u32,
}

impl Workload {
    /// Random prompts, or those of `dataset` where there is one, for the model that the mesh serves.
    ///
    /// # Errors
    /// [`BenchError`] when lengths and context do not fit; [`CliError::Mesh`] when the mesh cannot count tokens.
    pub async fn new(
        args: &BenchArgs,
        model: &ModelInfo,
        dataset: Option<(PathBuf, &mut Dataset)>,
        client: &mut Client,
    ) -> Result<Self, CliError> {
        let ModelInfo { context, vocab, .. } = *model;
        let (source, output) = match dataset {
            None => (Source::Ids { input: args.input_tokens }, Some(args.output_tokens.unwrap_or(OUTPUT_DEFAULT))),
            Some((path, dataset)) => {
                let bytes_per_token = calibrate(client, &dataset.pairs, context).await?;
                keep_fitting(dataset, bytes_per_token, args.output_tokens, context);
                if dataset.pairs.is_empty() {
                    return Err(BenchError::NothingFits { path, context }.into());
                }
                let pairs = std::mem::take(&mut dataset.pairs);
                (Source::Texts { pairs, bytes_per_token }, args.output_tokens)
            }
        };
        let (seed, ignore_eos) = (args.seed, !args.stop_at_eos);
        let load = Self { source, output, context, vocab, seed, ignore_eos, sampled: None, period: u64::MAX };
        Ok(load.fitting()?)
    }

    /// Requests that come again, of exact lengths.
    ///
    /// # Errors
    /// [`BenchError::TooLong`] when lengths and context do not fit.
    pub fn repeating(asked: Repeating, model: &ModelInfo) -> Result<Self, BenchError> {
        let ModelInfo { context, vocab, .. } = *model;
        let Repeating { input, output, sampled, seed, period } = asked;
        let (source, output) = (Source::Ids { input }, Some(output));
        let sampled = Some(sampled);
        Self { source, output, context, vocab, seed, ignore_eos: true, sampled, period }.fitting()
    }

    fn fitting(self) -> Result<Self, BenchError> {
        let input = if let Source::Ids { input } = &self.source { input.longest() } else { 1 };
        let output = self.output.map_or(1, Length::longest);
        let context = self.context;
        if input + output > context { Err(BenchError::TooLong { input, output, context }) } else { Ok(self) }
    }

    /// Bytes of one token, where prompts are texts.
    pub fn bytes_per_token(&self) -> Option<f64> {
        match &self.source {
            Source::Ids { .. } => None,
            Source::Texts { bytes_per_token, .. } => Some(*bytes_per_token),
        }
    }

    /// Request `index` of load point `point`. Lengths depend on the index alone, so that points of a sweep compare;
    /// random prompts on both, so that no point meets a prompt again.
    pub fn ask(&self, point: u64, index: u64) -> Ask {
        let index = index % self.period.max(1);
        let mut lengths = Random::new(self.seed, &[LENGTHS, index]);
        let (prompt, output) = match &self.source {
            Source::Ids { input } => {
                let output_max = self.output.map_or(1, Length::longest);
                let ids = input.draw(&mut lengths, self.context.saturating_sub(output_max).max(1));
                let mut random = Random::new(self.seed, &[PROMPTS, point, index]);
                let vocab = u64::from(self.vocab);
                let drawn = (0..ids).map(|_| random.below(vocab) as u32).collect();
                let room = self.context.saturating_sub(ids);
                (Prompt::TokenIds(TokenIds { ids: drawn }), self.output.map_or(1, |o| o.draw(&mut lengths, room)))
            }
            Source::Texts { pairs, bytes_per_token } => {
                let pair = &pairs[(index % pairs.len() as u64) as usize];
                let room = self.context.saturating_sub(tokens(pair.prompt.len(), *bytes_per_token));
                let own = || tokens(pair.reply_bytes, *bytes_per_token);
                (Prompt::Text(pair.prompt.clone()), self.output.map_or_else(own, |o| o.draw(&mut lengths, room)))
            }
        };
        let request = GenerateRequest {
            prompt: Some(prompt),
            max_new_tokens: Some(output),
            sampling: self.sampling(index),
            ignore_eos: self.ignore_eos,
            ..GenerateRequest::default()
        };
        Ask { request, output }
    }

    fn sampling(&self, index: u64) -> Option<Sampling> {
        let mut random = Random::new(self.seed, &[SAMPLING, index]);
        let sampled = self.sampled.filter(|sampled| random.unit() <= sampled.share)?;
        Some(Sampling { temperature: Some(sampled.temperature), seed: Some(random.bits()), ..Sampling::default() })
    }

    /// Whether every answer must have the length that was asked for.
    pub fn exact(&self) -> bool {
        self.ignore_eos
    }
}

/// An estimate from the text's length.
fn tokens(bytes: usize, bytes_per_token: f64) -> u32 {
    (bytes as f64 / bytes_per_token).round().max(1.0) as u32
}

/// Leaves what the context takes, by estimate.
fn keep_fitting(dataset: &mut Dataset, bytes_per_token: f64, output: Option<Length>, context: u32) {
    let before = dataset.pairs.len();
    dataset.pairs.retain(|pair| {
        let reply = output.map_or_else(|| tokens(pair.reply_bytes, bytes_per_token), Length::longest);
        let wanted = f64::from(tokens(pair.prompt.len(), bytes_per_token)) + f64::from(reply);
        wanted <= f64::from(context) * CONTEXT_SHARE
    });
    dataset.skipped.too_long += (before - dataset.pairs.len()) as u64;
}

/// Bytes of a token of these texts: the mesh counts one sample of them, which needs no tokenizer here.
async fn calibrate(client: &mut Client, pairs: &[Pair], context: u32) -> Result<f64, CliError> {
    // A token has at least one byte, so this many bytes fit for certain.
    let bytes_max = (context as usize / 2).clamp(1, CALIBRATION_BYTES_MAX);
    let text = sample(pairs, bytes_max);
    let bytes = text.len();
    let request = GenerateRequest { prompt: Some(Prompt::Text(text)), max_new_tokens: Some(1), ..Default::default() };
    let mut stream = client.mesh().generate(request).await.map_err(failed)?.into_inner();
    let mut prompt_tokens = 0;
    while let Some(message) = stream.message().await.map_err(failed)? {
        if let Some(Event::Started(started)) = message.event {
            prompt_tokens = started.prompt_tokens;
        }
    }
    Ok(bytes as f64 / f64::from(prompt_tokens.max(1)))
}

/// The beginnings of texts, up to `bytes_max` in all.
fn sample(pairs: &[Pair], bytes_max: usize) -> String {
    let mut text = String::new();
    for pair in pairs {
        let room = bytes_max - text.len();
        if pair.prompt.len() >= room {
            let end = (0..=room).rev().find(|&end| pair.prompt.is_char_boundary(end)).unwrap_or(0);
            text.push_str(&pair.prompt[..end]);
            break;
        }
        text.push_str(&pair.prompt);
    }
    // A single character that is longer than the room: any text counts.
    if text.is_empty() { "a".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(input: &str, output: &str) -> Workload {
        Workload {
            source: Source::Ids { input: input.parse().unwrap() },
            output: Some(output.parse().unwrap()),
            context: 100,
            vocab: 50,
            seed: 1,
            ignore_eos: true,
            sampled: None,
            period: u64::MAX,
        }
    }

    fn ids(ask: &Ask) -> &[u32] {
        match ask.request.prompt.as_ref().unwrap() {
            Prompt::TokenIds(ids) => &ids.ids,
            Prompt::Text(text) => panic!("{text}"),
        }
    }

    fn pairs(texts: &[(&str, usize)]) -> Vec<Pair> {
        texts.iter().map(|&(prompt, reply_bytes)| Pair { prompt: prompt.to_owned(), reply_bytes }).collect()
    }

    #[test]
    fn a_request_is_the_seeds_the_points_and_the_indexs_alone() {
        let load = workload("uniform:1:40", "uniform:1:20");
        let (a, again, next, other_point) = (load.ask(0, 5), load.ask(0, 5), load.ask(0, 6), load.ask(1, 5));
        assert_eq!(a.request, again.request);
        assert_ne!(a.request, next.request);
        assert_eq!((ids(&a).len(), a.output), (ids(&other_point).len(), other_point.output), "points compare");
        assert_ne!(ids(&a), ids(&other_point), "no point meets a prompt again");
    }

    #[test]
    fn random_prompts_are_of_the_vocabulary_and_fit_the_context() {
        let load = workload("normal:60:40", "normal:30:40");
        for index in 0..500 {
            let ask = load.ask(0, index);
            assert!(ids(&ask).iter().all(|&id| id < 50));
            assert!(ids(&ask).len() + ask.output as usize <= 100 && ask.output >= 1);
            assert!(ask.request.ignore_eos && ask.request.max_new_tokens == Some(ask.output));
        }
    }

    #[test]
    fn repeating_requests_come_again_and_a_share_of_them_samples() {
        let model = ModelInfo { context: 100, vocab: 50, ..ModelInfo::default() };
        let (input, output) = ("uniform:1:40".parse().unwrap(), "uniform:1:20".parse().unwrap());
        let asked =
            |share| Repeating { input, output, sampled: Sampled { share, temperature: 0.8 }, seed: 3, period: 400 };
        let load = |share| Workload::repeating(asked(share), &model).unwrap();
        let half = load(0.5);
        assert_eq!(half.ask(0, 7).request, half.ask(0, 407).request);
        assert_ne!(half.ask(0, 7).request, half.ask(0, 8).request);
        let sampled = |load: &Workload| (0..400).filter_map(|i| load.ask(0, i).request.sampling).collect::<Vec<_>>();
        let seeds: std::collections::BTreeSet<_> = sampled(&half).iter().map(|s| s.seed).collect();
        assert!((160..240).contains(&seeds.len()), "{}", seeds.len());
        assert!(sampled(&half).iter().all(|s| s.temperature == Some(0.8) && s.seed.is_some()));
        assert_eq!((sampled(&load(0.0)).len(), sampled(&load(1.0)).len()), (0, 400));
        let long = Repeating { output: Length::Fixed(90), ..asked(0.5) };
        assert!(matches!(Workload::repeating(long, &model), Err(BenchError::TooLong { .. })));
    }

    #[test]
    fn texts_repeat_in_order_and_ask_for_answers_as_long_as_their_own() {
        let load = Workload {
            source: Source::Texts { pairs: pairs(&[("one", 40), ("two", 80)]), bytes_per_token: 4.0 },
            output: None,
            ..workload("1", "1")
        };
        let asked: Vec<_> = (0..3).map(|i| load.ask(0, i)).collect();
        assert_eq!(asked.iter().map(|a| a.output).collect::<Vec<_>>(), [10, 20, 10]);
        assert_eq!(asked[1].request.prompt, Some(Prompt::Text("two".to_owned())));
    }

    #[test]
    fn conversations_that_do_not_fit_are_counted() {
        let mut dataset = Dataset { pairs: pairs(&[("fits", 40), ("does not", 400)]), ..Dataset::default() };
        keep_fitting(&mut dataset, 4.0, None, 100);
        assert_eq!((dataset.pairs.len(), dataset.skipped.too_long), (1, 1));
        keep_fitting(&mut dataset, 4.0, Some(Length::Fixed(90)), 100);
        assert_eq!((dataset.pairs.len(), dataset.skipped.too_long), (0, 2));
    }

    #[test]
    fn a_sample_of_texts_is_cut_between_characters() {
        assert_eq!(sample(&pairs(&[("ab", 1), ("cdé", 1), ("x", 1)]), 5), "abcd");
        assert_eq!(sample(&pairs(&[("ab", 1)]), 100), "ab");
        assert_eq!(sample(&pairs(&[("é", 1)]), 1), "a");
    }
}
