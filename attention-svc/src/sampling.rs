//! From a row of logits to the next token, and to log-probabilities. A pure function of (logits, tokens so far,
//! settings, seed, place in the output), so a seeded sample is as reproducible as a greedy one: no state is carried from
//! token to token, and neither the batch nor a recomputation can shift it.
//!
//! Order, as in vLLM: repetition penalty, then frequency and presence penalties; then greedy, or temperature, min-p,
//! top-k, top-p, draw. One difference, for the sake of one answer everywhere: equal logits are ordered by rising id, so
//! top-k keeps exactly k where vLLM keeps all that tie with the k-th.

use std::collections::BTreeMap;

/// A request's sampling settings, checked (`request.rs`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0: greedy.
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    /// In (0, 1].
    pub top_p: f32,
    /// In [0, 1].
    pub min_p: f32,
    /// What the draws depend on, with the token's place in the output.
    pub seed: u64,
    /// Above 0; 1: none.
    pub repetition_penalty: f32,
    /// 0: none.
    pub frequency_penalty: f32,
    /// 0: none.
    pub presence_penalty: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
        }
    }
}

/// Why no token can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model computed a logit that is NaN or infinite.
    #[error("logit of token {token} is not finite: the weights or the arithmetic are damaged")]
    NotFinite {
        /// The token.
        token: u32,
    },
    /// A row without logits.
    #[error("the row has no logits")]
    Empty,
}

/// Which tokens occurred, for the penalties. Costs nothing when there are none.
#[derive(Clone, Debug, Default)]
pub struct Occurrences {
    /// How often in the output; prompt tokens that do not occur there have 0.
    counts: BTreeMap<u32, u32>,
    active: bool,
}

impl Occurrences {
    /// Counts from `prompt` on, if the settings have any penalty.
    pub fn new(sampling: &Sampling, prompt: &[u32]) -> Self {
        let repetition = sampling.repetition_penalty != 1.0;
        let active = repetition || sampling.frequency_penalty != 0.0 || sampling.presence_penalty != 0.0;
        let prompt = if repetition { prompt } else { &[] };
        Self { counts: prompt.iter().map(|t| (*t, 0)).collect(), active }
    }

    /// Counts a token of the output.
    pub fn push(&mut self, token: u32) {
        if self.active {
            *self.counts.entry(token).or_default() += 1;
        }
    }

    fn penalise(&self, logits: &mut [f32], sampling: &Sampling) {
        for (token, count) in &self.counts {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            if sampling.repetition_penalty != 1.0 {
                let up = *logit > 0.0;
                *logit = if up { *logit / sampling.repetition_penalty } else { *logit * sampling.repetition_penalty };
            }
            if *count > 0 {
                *logit -= sampling.frequency_penalty * *count as f32;
                *logit -= sampling.presence_penalty;
            }
            // A penalty far from 1 must not make infinities, whose differences are no numbers.
            *logit = logit.clamp(f32::MIN, f32::MAX);
        }
    }
}

/// Scratch of one sampling thread, kept to spare its allocations.
#[derive(Debug, Default)]
pub struct Sampler {
    logits: Vec<f32>,
    kept: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    logit: f32,
    /// `exp((logit - max) / temperature)`.
    weight: f64,
}

impl Candidate {
    fn falling(&self, other: &Self) -> std::cmp::Ordering {
        other.logit.total_cmp(&self.logit).then(self.token.cmp(&other.token))
    }
}

impl Sampler {
    /// The token at `place` of the output (counted from 0), out of its row of raw logits.
    ///
    /// # Errors
    /// [`SampleError`].
    pub fn choose(
        &mut self,
        raw: &[f32],
        sampling: &Sampling,
        seen: &Occurrences,
        place: u32,
    ) -> Result<u32, SampleError> {
        if let Some(token) = first_not_finite(raw) {
            return Err(SampleError::NotFinite { token: token as u32 });
        }
        let logits = if seen.active {
            self.logits.clear();
            self.logits.extend_from_slice(raw);
            seen.penalise(&mut self.logits, sampling);
            &self.logits
        } else {
            raw
        };
        let best = argmax(logits).ok_or(SampleError::Empty)?;
        if sampling.temperature == 0.0 {
            return Ok(best as u32);
        }
        let (max, temperature) = (f64::from(logits[best]), f64::from(sampling.temperature));
        let min_weight = f64::from(sampling.min_p);
        let candidates = logits.iter().enumerate();
        self.kept.clear();
        self.kept.extend(candidates.map(|(token, logit)| Candidate {
            token: token as u32,
            logit: *logit,
            weight: 0.0,
        }));
        // This and min-p keep a head of the same order, so which comes first makes no difference but in exponentials.
        keep_top_k(&mut self.kept, sampling.top_k as usize);
        self.kept.retain_mut(|c| {
            c.weight = ((f64::from(c.logit) - max) / temperature).exp();
            c.weight >= min_weight
        });
        keep_top_p(&mut self.kept, f64::from(sampling.top_p));
        Ok(draw(&mut self.kept, uniform(sampling.seed, place)).unwrap_or(best as u32))
    }
}

fn first_not_finite(logits: &[f32]) -> Option<usize> {
    first(logits, |l| !l.is_finite())
}

/// The largest; of equal ones the first.
fn argmax(logits: &[f32]) -> Option<usize> {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    // A maximum for each lane: one for all would be a chain of comparisons that wait for each other.
    let (whole, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in whole {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, logit);
        }
    }
    let most = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    (!logits.is_empty()).then(|| first(logits, |l| l == most).unwrap_or(0))
}

/// The first that is `wanted`.
fn first(logits: &[f32], wanted: impl Fn(f32) -> bool) -> Option<usize> {
    /// Logits that are looked at together, without a branch for each.
    const RUN: usize = 64;
    let run = logits.chunks(RUN).position(|run| run.iter().fold(false, |any, &l| any | wanted(l)))?;
    let within = logits[run * RUN..].iter().position(|&l| wanted(l))?;
    Some(run * RUN + within)
}

fn keep_top_k(kept: &mut Vec<Candidate>, k: usize) {
    if k > 0 && k < kept.len() {
        kept.select_nth_unstable_by(k - 1, Candidate::falling);
        kept.truncate(k);
    }
}

/// Keeps the likeliest candidates up to and with the one that brings their sum to `p` of the whole.
fn keep_top_p(kept: &mut Vec<Candidate>, p: f64) {
    /// Candidates that are looked at first: the whole vocabulary is rarely worth sorting.
    const HEAD: usize = 256;
    if p >= 1.0 {
        return;
    }
    // The sum runs in ascending id order whatever top-k did to the order.
    kept.sort_unstable_by_key(|c| c.token);
    let wanted = p * kept.iter().map(|c| c.weight).sum::<f64>();
    let mut head = HEAD;
    loop {
        let all = head >= kept.len();
        if !all {
            kept.select_nth_unstable_by(head - 1, Candidate::falling);
        }
        let head_len = head.min(kept.len());
        kept[..head_len].sort_unstable_by(Candidate::falling);
        let mut sum = 0.0;
        let enough = kept[..head_len].iter().position(|c| {
            sum += c.weight;
            sum >= wanted
        });
        match enough {
            Some(last) => return kept.truncate(last + 1),
            None if all => return,
            None => head *= 8,
        }
    }
}

/// Picks a candidate by its weight, walking them in ascending id order.
fn draw(kept: &mut [Candidate], u: f64) -> Option<u32> {
    kept.sort_unstable_by_key(|c| c.token);
    let target = u * kept.iter().map(|c| c.weight).sum::<f64>();
    let mut sum = 0.0;
    let chosen = kept.iter().find(|c| {
        sum += c.weight;
        sum > target
    });
    // Rounding can leave the sum at the target only when u is next to 1: the last that can be drawn is meant.
    chosen.or_else(|| kept.iter().rev().find(|c| c.weight > 0.0)).map(|c| c.token)
}

/// A number in [0, 1) that depends on the seed and the place alone: SplitMix64's finaliser over both, 53 bits.
fn uniform(seed: u64, place: u32) -> f64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    // The seed is mixed first, or neighbouring seeds would draw the same numbers a place apart.
    let stream = mix(seed.wrapping_add(GOLDEN));
    let bits = mix(stream.wrapping_add(GOLDEN.wrapping_mul(u64::from(place) + 1)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// A token and its log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability under the raw logits.
    pub logprob: f32,
}

/// Log-softmax of raw logits at `token`, and at the `top` best tokens (falling logit, then rising id).
///
/// Sums are in f64 and in ascending id order.
pub fn logprobs(raw: &[f32], token: u32, top: usize) -> (Scored, Vec<Scored>) {
    let max = raw.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = raw.iter().map(|l| (f64::from(*l) - f64::from(max)).exp()).sum();
    let log_sum = sum.ln() + f64::from(max);
    let score = |token: u32| {
        let logit = raw.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        Scored { token, logprob: (f64::from(logit) - log_sum) as f32 }
    };
    let falling = |a: &u32, b: &u32| raw[*b as usize].total_cmp(&raw[*a as usize]).then(a.cmp(b));
    let top = top.min(raw.len());
    let mut order: Vec<u32> = if top > 0 { (0..raw.len() as u32).collect() } else { Vec::new() };
    if 0 < top && top < order.len() {
        order.select_nth_unstable_by(top - 1, falling);
        order.truncate(top);
    }
    order.sort_unstable_by(falling);
    (score(token), order.into_iter().map(score).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choose(logits: &[f32], sampling: &Sampling, seen: &[u32], place: u32) -> u32 {
        let mut occurrences = Occurrences::new(sampling, &[]);
        seen.iter().for_each(|t| occurrences.push(*t));
        Sampler::default().choose(logits, sampling, &occurrences, place).unwrap()
    }

    /// The tokens that `draws` draws give, with their shares.
    fn drawn(logits: &[f32], sampling: Sampling, draws: u32) -> BTreeMap<u32, f64> {
        let mut shares = BTreeMap::new();
        for place in 0..draws {
            *shares.entry(choose(logits, &sampling, &[], place)).or_default() += 1.0 / f64::from(draws);
        }
        shares
    }

    fn warm() -> Sampling {
        Sampling { temperature: 1.0, seed: 7, ..Sampling::default() }
    }

    #[test]
    fn greedy_takes_the_largest_and_of_equals_the_lowest_id() {
        assert_eq!(choose(&[0.0, 3.0, -1.0, 3.0], &Sampling::default(), &[], 0), 1);
        let mut many = [-2.0; 200];
        for (at, expected) in [(199, 199), (130, 130), (131, 130), (64, 64), (0, 0)] {
            many[at] = -1.0;
            assert_eq!(choose(&many, &Sampling::default(), &[], 0), expected);
        }
    }

    #[test]
    fn draws_follow_the_softmax_at_the_temperature() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.25].iter().map(|p| p.ln()).collect();
        let shares = drawn(&logits, warm(), 20_000);
        assert!((shares[&0] - 0.5).abs() < 0.02 && (shares[&1] - 0.25).abs() < 0.02, "{shares:?}");
        let cold = drawn(&logits, Sampling { temperature: 0.5, ..warm() }, 20_000);
        assert!((cold[&0] - 4.0 / 6.0).abs() < 0.02, "{cold:?}");
        let colder = drawn(&logits, Sampling { temperature: 1e-30, ..warm() }, 100);
        assert_eq!(colder.len(), 1);
    }

    #[test]
    fn top_k_keeps_exactly_k_and_of_equals_the_lowest_ids() {
        let logits = [1.0, 2.0, 2.0, 2.0, 0.0];
        let shares = drawn(&logits, Sampling { top_k: 2, ..warm() }, 2_000);
        assert_eq!(shares.into_keys().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(drawn(&logits, Sampling { top_k: 100, ..warm() }, 5_000).len(), 5);
    }

    #[test]
    fn top_p_keeps_the_likeliest_until_their_sum_reaches_p() {
        let logits: Vec<f32> = [0.15f32, 0.5, 0.3, 0.05].iter().map(|p| p.ln()).collect();
        let kept = |top_p| drawn(&logits, Sampling { top_p, ..warm() }, 5_000).into_keys().collect::<Vec<_>>();
        assert_eq!(kept(0.4), [1]);
        assert_eq!(kept(0.7), [1, 2]);
        assert_eq!(kept(0.9), [0, 1, 2]);
        assert_eq!(kept(1.0), [0, 1, 2, 3]);
        assert_eq!(kept(1e-9), [1]);
    }

    #[test]
    fn top_p_counts_within_what_top_k_left() {
        let logits: Vec<f32> = [0.4f32, 0.4, 0.2].iter().map(|p| p.ln()).collect();
        let shares = drawn(&logits, Sampling { top_k: 2, top_p: 0.45, ..warm() }, 500);
        assert_eq!(shares.into_keys().collect::<Vec<_>>(), [0], "half of what is left is enough");
    }

    #[test]
    fn min_p_is_relative_to_the_likeliest() {
        let logits: Vec<f32> = [0.6f32, 0.3, 0.1].iter().map(|p| p.ln()).collect();
        let kept = |min_p| drawn(&logits, Sampling { min_p, ..warm() }, 3_000).into_keys().collect::<Vec<_>>();
        assert_eq!(kept(0.2), [0, 1]);
        assert_eq!(kept(1.0), [0]);
    }

    #[test]
    fn top_p_over_a_large_flat_vocabulary_looks_past_the_head() {
        let logits = vec![0.0; 5_000];
        let shares = drawn(&logits, Sampling { top_p: 0.5, ..warm() }, 3_000);
        assert!(shares.len() > 1_000 && shares.keys().all(|t| *t < 2_500), "{}", shares.len());
    }

    #[test]
    fn penalties_work_on_what_was_seen() {
        let repetition = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(choose(&[3.0, 2.0], &repetition, &[0], 0), 1);
        assert_eq!(choose(&[-3.0, -4.0], &repetition, &[0], 0), 1, "negative logits are multiplied");
        let frequency = Sampling { frequency_penalty: 0.4, ..Sampling::default() };
        assert_eq!(choose(&[3.0, 2.0], &frequency, &[0, 0], 0), 0);
        assert_eq!(choose(&[3.0, 2.0], &frequency, &[0, 0, 0], 0), 1);
        let presence = Sampling { presence_penalty: 1.5, ..Sampling::default() };
        assert_eq!(choose(&[3.0, 2.0], &presence, &[0], 0), 1);
        let encouraged = Sampling { presence_penalty: -1.5, ..Sampling::default() };
        assert_eq!(choose(&[3.0, 2.0], &encouraged, &[1], 0), 1);
    }

    #[test]
    fn the_prompt_counts_for_repetition_alone() {
        let all = Sampling { repetition_penalty: 2.0, presence_penalty: 2.0, ..Sampling::default() };
        let mut logits = [8.0, 5.0];
        Occurrences::new(&all, &[0]).penalise(&mut logits, &all);
        assert_eq!(logits, [4.0, 5.0]);
    }

    #[test]
    fn extreme_penalties_make_no_infinities() {
        let extreme = Sampling { repetition_penalty: 1e-38, temperature: 1.0, ..Sampling::default() };
        assert_eq!(choose(&[50.0, 60.0, 1.0], &extreme, &[0], 3), 0);
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        let refused = Sampler::default().choose(&[0.0, f32::NAN], &warm(), &Occurrences::default(), 0);
        assert_eq!(refused, Err(SampleError::NotFinite { token: 1 }));
        let mut late = [0.0; 150];
        late[140] = f32::INFINITY;
        let refused = Sampler::default().choose(&late, &warm(), &Occurrences::default(), 0);
        assert_eq!(refused, Err(SampleError::NotFinite { token: 140 }));
        let refused = Sampler::default().choose(&[], &Sampling::default(), &Occurrences::default(), 0);
        assert_eq!(refused, Err(SampleError::Empty));
    }

    #[test]
    fn draws_are_spread_and_differ_by_seed_and_place() {
        let draws: Vec<f64> = (0..4_000).map(|p| uniform(1, p)).collect();
        let mean = draws.iter().sum::<f64>() / 4_000.0;
        assert!((mean - 0.5).abs() < 0.02 && draws.iter().all(|u| (0.0..1.0).contains(u)));
        assert!((0..100).all(|p| uniform(1, p + 1) != uniform(2, p) && uniform(1, p) != uniform(2, p)));
    }

    #[test]
    fn the_draw_is_pinned() {
        // These numbers are a promise to users who keep seeds: they change only with a note in the release.
        let bits = [uniform(0, 0), uniform(42, 0), uniform(42, 1), uniform(u64::MAX, 1_000)].map(f64::to_bits);
        assert_eq!(bits, PINNED);
    }

    const PINNED: [u64; 4] = [4604051953065501487, 4599855817407677468, 4606783820744611400, 4585044043362684320];

    #[test]
    fn logprobs_are_of_the_raw_logits_and_the_top_is_ordered() {
        let logits: Vec<f32> = [0.1f32, 0.4, 0.4, 0.1].iter().map(|p| p.ln() + 3.0).collect();
        let (chosen, top) = logprobs(&logits, 3, 3);
        assert!((chosen.logprob - 0.1f32.ln()).abs() < 1e-6);
        assert_eq!(top.iter().map(|s| s.token).collect::<Vec<_>>(), [1, 2, 0]);
        assert!((top[0].logprob - 0.4f32.ln()).abs() < 1e-6);
        assert_eq!(logprobs(&logits, 0, 0).1, []);
        assert_eq!(logprobs(&logits, 0, 9).1.len(), 4);
    }

    proptest! {
        /// What is drawn passes every filter, whatever their mixture.
        #[test]
        fn a_drawn_token_passes_every_filter(
            logits in prop::collection::vec(-8f32..8.0, 1..40), temperature in 0.05f32..3.0, top_k in 0u32..6,
            top_p in 0.05f32..=1.0, min_p in 0f32..0.5, seed in any::<u64>(), place in 0u32..100
        ) {
            let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
            let token = choose(&logits, &sampling, &[], place);
            prop_assert_eq!(token, choose(&logits, &sampling, &[], place), "twice the same");
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
            let rank = order.iter().position(|t| *t == token as usize).unwrap();
            prop_assert!(top_k == 0 || rank < top_k as usize);
            let best = f64::from(logits[order[0]]);
            let weight = |t: usize| ((f64::from(logits[t]) - best) / f64::from(temperature)).exp();
            prop_assert!(weight(token as usize) >= f64::from(min_p));
            let left: Vec<f64> = order.iter().map(|t| weight(*t)).filter(|w| *w >= f64::from(min_p)).collect();
            let left = if top_k == 0 { &left[..] } else { &left[..left.len().min(top_k as usize)] };
            let before: f64 = left[..rank].iter().sum();
            prop_assert!(before <= f64::from(top_p) * left.iter().sum::<f64>() * (1.0 + 1e-9));
        }
    }
}
