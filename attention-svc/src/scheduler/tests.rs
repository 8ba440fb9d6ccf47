//! The scheduler driven with a model that checks every page and position.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::fake::{FakeModel, PAGE, VOCAB, lone_logits};
use crate::sampling::{Occurrences, Sampler, Sampling};

const WIDE: SchedulerLimits =
    SchedulerLimits { step_tokens_max: 64, prefill_chunk: 16, scored_rows_max: 8, running_max: 16, waiting_max: 64 };

fn sampling(seed: u64) -> Sampling {
    Sampling { temperature: 0.8, top_p: 0.95, repetition_penalty: 1.1, seed, ..Sampling::default() }
}

/// A mesh of one scheduler and one model; every sequence samples with its own seed.
struct Rig {
    scheduler: Scheduler,
    model: FakeModel,
    sampler: Sampler,
    limits: SchedulerLimits,
    alive: BTreeMap<SequenceId, Running>,
    done: BTreeMap<SequenceId, (Vec<u32>, Vec<f32>)>,
    steps: u32,
}

struct Running {
    prompt: Vec<u32>,
    max_new: usize,
    seed: u64,
    output: Vec<u32>,
    /// The first logit of each scored prompt row.
    scores: Vec<f32>,
}

impl Rig {
    fn new(limits: SchedulerLimits, pages: u32) -> Self {
        Self {
            scheduler: Scheduler::new(limits, KvBlocks::new(pages, PAGE)),
            model: FakeModel::new(pages),
            sampler: Sampler::default(),
            limits,
            alive: BTreeMap::new(),
            done: BTreeMap::new(),
            steps: 0,
        }
    }

    fn submit(&mut self, prompt: Vec<u32>, max_new: u32, seed: u64, score: bool) -> Result<SequenceId, Refusal> {
        let new = NewSequence { prompt: prompt.clone(), max_new_tokens: max_new, score_prompt: score };
        let id = self.scheduler.submit(new)?;
        self.alive.insert(id, Running { prompt, max_new: max_new as usize, seed, output: vec![], scores: vec![] });
        Ok(id)
    }

    fn cancel(&mut self, id: SequenceId) {
        assert_eq!(self.scheduler.remove(id), self.alive.remove(&id).is_some());
    }

    fn step(&mut self) -> Vec<Share> {
        self.steps += 1;
        let shares = self.scheduler.plan();
        self.check_bounds(&shares);
        let step = self.scheduler.step(&shares, false);
        let logits = self.model.step(&step).logits;
        let mut logits = logits.chunks_exact(VOCAB as usize);
        for share in &shares {
            self.scheduler.computed(share);
            let running = self.alive.get_mut(&share.id).expect("only the living are scheduled");
            assert!(share.scored == 0 || running.scores.len() as u32 == share.scored_first, "scored once, in order");
            running.scores.extend(logits.by_ref().take(share.scored as usize).map(|l| l[0]));
            if !share.samples {
                continue;
            }
            let sampling = sampling(running.seed);
            let mut seen = Occurrences::new(&sampling, &running.prompt);
            running.output.iter().for_each(|t| seen.push(*t));
            let place = running.output.len() as u32;
            let token = self.sampler.choose(logits.next().unwrap(), &sampling, &seen, place).unwrap();
            running.output.push(token);
            if running.output.len() < running.max_new {
                self.scheduler.append(share.id, token);
                continue;
            }
            assert!(self.scheduler.remove(share.id));
            let running = self.alive.remove(&share.id).unwrap();
            self.done.insert(share.id, (running.output, running.scores));
        }
        assert_eq!(logits.next(), None);
        shares
    }

    fn check_bounds(&self, shares: &[Share]) {
        let rows: u32 = shares.iter().map(|s| s.rows).sum();
        assert!(rows <= self.limits.step_tokens_max, "{rows} rows");
        assert!(shares.iter().map(|s| s.scored).sum::<u32>() <= self.limits.scored_rows_max);
        assert!(shares.iter().all(|s| 0 < s.rows && s.rows <= self.limits.prefill_chunk.max(1)));
        assert!(self.scheduler.running() as u32 <= self.limits.running_max.min(self.limits.step_tokens_max));
        // Whoever decodes does so in every step.
        let decoding = self.scheduler.running.iter().filter(|s| s.pending() == 1);
        assert!(decoding.clone().all(|s| shares.iter().any(|share| share.id == s.id && share.samples)));
        // The oldest of all always moves on.
        let oldest = self.alive.keys().next();
        assert!(oldest.is_none_or(|id| shares.first().is_some_and(|s| s.id == *id)), "the oldest stands still");
    }

    /// Steps until nobody is left.
    ///
    /// The oldest sequence computes at least one row in each step and is never preempted, which bounds the steps.
    fn drain(&mut self) {
        let bound: usize = self.alive.values().map(|r| r.prompt.len() + r.max_new).sum();
        for _ in 0..bound {
            if self.alive.is_empty() {
                return;
            }
            self.step();
        }
        assert!(self.alive.is_empty(), "{} sequences unfinished after {bound} steps", self.alive.len());
    }

    fn assert_nothing_held(&self) {
        let s = &self.scheduler;
        assert_eq!((s.running(), s.waiting(), s.kv().free()), (0, 0, s.kv().total()));
    }
}

/// What a sequence gives when it is alone and nothing is cached.
fn lone(prompt: &[u32], max_new: u32, seed: u64) -> Vec<u32> {
    let sampling = sampling(seed);
    let mut seen = Occurrences::new(&sampling, prompt);
    let mut tokens = prompt.to_vec();
    for place in 0..max_new {
        let token = Sampler::default().choose(&lone_logits(&tokens), &sampling, &seen, place).unwrap();
        seen.push(token);
        tokens.push(token);
    }
    tokens.split_off(prompt.len())
}

fn prompt(length: u32, salt: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 7 + salt * 3 + i * i) % VOCAB).collect()
}

#[test]
fn a_long_prompt_is_cut_in_chunks_and_decodes_go_on_beside_it() {
    let mut rig = Rig::new(SchedulerLimits { step_tokens_max: 9, prefill_chunk: 8, ..WIDE }, 64);
    let short = rig.submit(prompt(2, 1), 12, 1, false).unwrap();
    rig.step();
    let long = rig.submit(prompt(30, 2), 3, 2, false).unwrap();
    for chunk in [8, 8, 8, 6] {
        let shares: Vec<(SequenceId, u32)> = rig.step().iter().map(|s| (s.id, s.rows)).collect();
        assert_eq!(shares, [(short, 1), (long, chunk)]);
    }
    rig.drain();
    assert_eq!(rig.done[&long].0, lone(&prompt(30, 2), 3, 2));
    assert_eq!(rig.done[&short].0, lone(&prompt(2, 1), 12, 1));
    rig.assert_nothing_held();
}

#[test]
fn prefills_share_a_step_in_order_of_arrival() {
    let mut rig = Rig::new(SchedulerLimits { step_tokens_max: 10, prefill_chunk: 6, ..WIDE }, 64);
    for salt in 0..3 {
        rig.submit(prompt(8, salt), 1, 0, false).unwrap();
    }
    let rows = |shares: Vec<Share>| shares.iter().map(|s| (s.id.0, s.rows)).collect::<Vec<_>>();
    assert_eq!(rows(rig.step()), [(0, 6), (1, 4)]);
    assert_eq!(rows(rig.step()), [(0, 2), (1, 4), (2, 4)]);
}

#[test]
fn the_youngest_gives_way_when_the_cache_runs_out_and_nothing_changes_for_it() {
    let mut rig = Rig::new(WIDE, 8);
    let ids: Vec<SequenceId> = (0..3).map(|i| rig.submit(prompt(4, i), 20, i.into(), false).unwrap()).collect();
    rig.step();
    assert_eq!(rig.scheduler.running(), 3);
    rig.drain();
    assert!(rig.scheduler.preemptions() > 0);
    for (i, id) in ids.iter().enumerate() {
        assert_eq!(rig.done[id].0, lone(&prompt(4, i as u32), 20, i as u64));
    }
    rig.assert_nothing_held();
}

#[test]
fn a_sequence_that_needs_the_whole_cache_runs_alone() {
    let mut rig = Rig::new(WIDE, 4);
    let before = rig.submit(prompt(6, 9), 4, 9, false).unwrap();
    let whole = rig.submit(prompt(4, 1), 4 * PAGE - 3, 1, false).unwrap();
    let after = rig.submit(prompt(1, 2), 2, 2, false).unwrap();
    rig.drain();
    assert_eq!(rig.done[&whole].0.len() as u32, 4 * PAGE - 3);
    assert!(rig.done.contains_key(&before) && rig.done.contains_key(&after));
    let refused = rig.submit(prompt(4, 1), 4 * PAGE - 2, 1, false);
    assert_eq!(refused, Err(Refusal::NeverFits { tokens: 4 * PAGE + 1, needed: 5, total: 4 }));
}

#[test]
fn the_queue_is_bounded_and_does_not_count_who_runs() {
    let mut rig = Rig::new(SchedulerLimits { running_max: 2, waiting_max: 1, ..WIDE }, 64);
    for salt in 0..3 {
        rig.submit(prompt(4, salt), 4, 0, false).unwrap();
    }
    assert_eq!((rig.scheduler.running(), rig.scheduler.waiting()), (2, 1));
    assert_eq!(rig.submit(prompt(4, 3), 4, 0, false), Err(Refusal::QueueFull { waiting: 1 }));
    rig.drain();
    assert_eq!(rig.done.len(), 3);
    rig.assert_nothing_held();
}

#[test]
fn cancelled_sequences_give_their_pages_back_at_once() {
    let mut rig = Rig::new(SchedulerLimits { running_max: 1, ..WIDE }, 16);
    let (running, waiting) =
        (rig.submit(prompt(9, 0), 9, 0, false).unwrap(), rig.submit(prompt(9, 1), 9, 0, false).unwrap());
    rig.step();
    assert_eq!(rig.scheduler.kv().free(), 13);
    rig.cancel(waiting);
    rig.cancel(running);
    rig.assert_nothing_held();
    assert!(!rig.scheduler.remove(running));
}

#[test]
fn prompt_rows_are_scored_once_within_their_bound() {
    let mut rig = Rig::new(WIDE, 64);
    let p = prompt(20, 3);
    let id = rig.submit(p.clone(), 3, 0, true).unwrap();
    let other = rig.submit(p.clone(), 1, 0, true).unwrap();
    assert_eq!(rig.step().iter().map(|s| (s.rows, s.scored)).collect::<Vec<_>>(), [(8, 8)]);
    rig.drain();
    let expected: Vec<f32> = (1..20).map(|n| lone_logits(&p[..n])[0]).collect();
    assert_eq!(rig.done[&id].1, expected);
    assert_eq!(rig.done[&other].1, expected);
}

#[derive(Clone, Debug)]
enum Op {
    Submit { length: u32, max_new: u32, score: bool },
    Cancel(usize),
    Step,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (1u32..14, 1u32..12, any::<bool>())
            .prop_map(|(length, max_new, score)| Op::Submit { length, max_new, score }),
        1 => (0usize..8).prop_map(Op::Cancel),
        4 => Just(Op::Step),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever arrives, leaves and is preempted in a tiny cache: everyone gets what they would get alone, nobody
    /// stands still for ever, no bound is passed, and no page is lost.
    #[test]
    fn everyone_gets_what_they_would_get_alone(
        ops in prop::collection::vec(op(), 1..60), pages in 4u32..12, step_tokens_max in 1u32..12,
        prefill_chunk in 1u32..8, scored_rows_max in 1u32..4, running_max in 1u32..8, waiting_max in 1u32..12,
    ) {
        let limits = SchedulerLimits { step_tokens_max, prefill_chunk, scored_rows_max, running_max, waiting_max };
        let mut rig = Rig::new(limits, pages);
        let mut taken = BTreeMap::new();
        for (i, op) in ops.into_iter().enumerate() {
            match op {
                Op::Submit { length, max_new, score } => {
                    let p = prompt(length, i as u32);
                    match rig.submit(p.clone(), max_new, i as u64, score) {
                        Ok(id) => { taken.insert(id, (p, max_new, i as u64, score)); }
                        Err(Refusal::NeverFits { needed, total, .. }) => prop_assert!(needed > total),
                        Err(Refusal::QueueFull { waiting }) => prop_assert!(waiting >= waiting_max),
                    }
                }
                Op::Cancel(nth) => {
                    if let Some(id) = rig.alive.keys().nth(nth).copied() {
                        rig.cancel(id);
                        taken.remove(&id);
                    }
                }
                Op::Step => { rig.step(); }
            }
        }
        rig.drain();
        rig.assert_nothing_held();
        prop_assert_eq!(rig.done.len(), taken.len());
        for (id, (p, max_new, seed, score)) in taken {
            let (output, scores) = &rig.done[&id];
            prop_assert_eq!(output, &lone(&p, max_new, seed));
            let rows = if score { 1..p.len() } else { 0..0 };
            let expected: Vec<f32> = rows.map(|n| lone_logits(&p[..n])[0]).collect();
            prop_assert_eq!(scores, &expected);
        }
    }
}
