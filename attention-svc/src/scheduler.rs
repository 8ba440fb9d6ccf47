//! Which rows the next step computes: continuous batching over a bounded KV cache. Pure: no IO, no clock, no threads.
//!
//! A sequence is its tokens (prompt, then output), of which the first `computed` have their K and V in the cache.
//! Prefill, decode and recomputation are one thing: a step takes some of the tokens that are not computed yet, and where
//! it takes the last one its logits give the next token.
//!
//! - Decoding sequences get their one row in every step; what is left of `step_tokens_max` goes to prefills in order of
//!   arrival, at most `prefill_chunk` rows each. As there are never more running sequences than `step_tokens_max`, a
//!   prefill that runs always has room, and decodes never wait for it.
//! - Admission is strictly first come, first served: everyone running is older than everyone waiting.
//! - When the cache runs out, the youngest running sequence gives its pages back and waits at the head of the queue, to
//!   be recomputed. The oldest is never preempted for another and fits alone (checked when it is submitted), so every
//!   step makes progress and everyone is served at last.

use std::collections::VecDeque;

use crate::kv_blocks::KvBlocks;
use crate::runner::{Step, StepRow};

/// Names a sequence in one scheduler; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// The named bounds of a step and of the queue.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerLimits {
    /// Rows of one step, at least 1.
    pub step_tokens_max: u32,
    /// Rows of one sequence in one step, at least 1.
    pub prefill_chunk: u32,
    /// Prompt rows of one step whose logits are wanted, at least 1: they cost a vocabulary of floats each.
    pub scored_rows_max: u32,
    /// Sequences that hold pages; cut to `step_tokens_max`.
    pub running_max: u32,
    /// Sequences that wait for pages.
    pub waiting_max: u32,
}

/// A sequence as it is submitted.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// At least 1.
    pub max_new_tokens: u32,
    /// Whether the logits of all prompt rows are wanted.
    pub score_prompt: bool,
}

/// Why a sequence is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The queue is full.
    #[error("{waiting} requests wait already, which is the most this node queues; try again later")]
    QueueFull {
        /// Sequences that wait.
        waiting: u32,
    },
    /// It could never be finished, even alone.
    #[error(
        "{tokens} tokens need {needed} KV pages and this node has {total}: ask for fewer tokens, or start the node with \
         more pages"
    )]
    NeverFits {
        /// Tokens whose K and V it may need.
        tokens: u32,
        /// Pages for them.
        needed: u32,
        /// Pages of the whole cache.
        total: u32,
    },
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    /// Prompt, then output.
    tokens: Vec<u32>,
    /// Most tokens that may need K and V: the last token of the output is never computed.
    tokens_max: u32,
    computed: u32,
    pages: Vec<u32>,
    /// Prompt rows whose logits are still wanted: `scored..score_end`.
    scored: u32,
    score_end: u32,
}

impl Sequence {
    fn pending(&self) -> u32 {
        self.tokens.len() as u32 - self.computed
    }
}

/// One sequence's share of a planned step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The sequence.
    pub id: SequenceId,
    /// Position of its first row.
    pub first: u32,
    /// Its rows.
    pub rows: u32,
    /// The first prompt row whose logits are wanted, and how many there are from it on.
    pub scored_first: u32,
    /// See `scored_first`.
    pub scored: u32,
    /// Whether its last row's logits choose the next token. These come after the scored rows'.
    pub samples: bool,
    /// Where it runs, in the plan's order.
    running: u32,
}

/// The continuous-batching scheduler.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    kv: KvBlocks,
    /// By arrival, oldest first.
    running: Vec<Sequence>,
    /// By arrival, oldest first; all younger than all running.
    waiting: VecDeque<Sequence>,
    next_id: u64,
    preemptions: u64,
}

impl Scheduler {
    /// A scheduler over all pages of `kv`.
    pub fn new(limits: SchedulerLimits, kv: KvBlocks) -> Self {
        let step_tokens_max = limits.step_tokens_max.max(1);
        let limits = SchedulerLimits {
            step_tokens_max,
            prefill_chunk: limits.prefill_chunk.max(1),
            scored_rows_max: limits.scored_rows_max.max(1),
            running_max: limits.running_max.clamp(1, step_tokens_max),
            waiting_max: limits.waiting_max,
        };
        Self { limits, kv, running: Vec::new(), waiting: VecDeque::new(), next_id: 0, preemptions: 0 }
    }

    /// Queues a sequence. Sequences that find room right now do not count against `waiting_max`.
    ///
    /// # Errors
    /// [`Refusal`]; nothing is held for the sequence then.
    pub fn submit(&mut self, new: NewSequence) -> Result<SequenceId, Refusal> {
        let prompt = new.prompt.len() as u32;
        let tokens_max = prompt.saturating_add(new.max_new_tokens) - 1;
        let needed = self.kv.pages_for(tokens_max);
        if needed > self.kv.total() {
            return Err(Refusal::NeverFits { tokens: tokens_max, needed, total: self.kv.total() });
        }
        let id = SequenceId(self.next_id);
        let score_end = if new.score_prompt { prompt - 1 } else { 0 };
        let sequence =
            Sequence { id, tokens: new.prompt, tokens_max, computed: 0, pages: Vec::new(), scored: 0, score_end };
        self.waiting.push_back(sequence);
        self.admit();
        let waiting = self.waiting.len() as u32;
        if waiting > self.limits.waiting_max && self.waiting.back().is_some_and(|s| s.id == id) {
            self.waiting.pop_back();
            return Err(Refusal::QueueFull { waiting: waiting - 1 });
        }
        self.next_id += 1;
        Ok(id)
    }

    /// Lets waiting sequences run while their tokens' pages, and one to go on with, are free.
    fn admit(&mut self) {
        while (self.running.len() as u32) < self.limits.running_max {
            let Some(head) = self.waiting.front_mut() else { return };
            let tokens = head.tokens.len() as u32;
            let to_go_on = self.kv.pages_for(tokens) + 1;
            if to_go_on.min(self.kv.pages_for(head.tokens_max)) > self.kv.free()
                || !self.kv.cover(&mut head.pages, tokens)
            {
                return;
            }
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Makes sure that all running sequences have pages for all their tokens, oldest first, at the youngest's expense.
    fn cover_running(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            let sequence = &mut self.running[i];
            let tokens = sequence.tokens.len() as u32;
            if self.kv.cover(&mut sequence.pages, tokens) {
                i += 1;
                continue;
            }
            let mut youngest = self.running.pop().expect("the one that needs a page is running");
            self.kv.give_back(&mut youngest.pages);
            youngest.computed = 0;
            self.preemptions += 1;
            self.waiting.push_front(youngest);
        }
    }

    /// Plans the next step: admits, preempts if it must, and shares out the rows. Empty when nobody runs.
    pub fn plan(&mut self) -> Vec<Share> {
        self.cover_running();
        self.admit();
        let decoding = self.running.iter().filter(|s| s.pending() == 1).count() as u32;
        let mut prefill_left = self.limits.step_tokens_max - decoding;
        let mut scored_left = self.limits.scored_rows_max;
        let mut shares = Vec::with_capacity(self.running.len());
        for (index, sequence) in self.running.iter().enumerate() {
            let pending = sequence.pending();
            let first = sequence.computed;
            let mut rows = if pending == 1 { 1 } else { pending.min(self.limits.prefill_chunk).min(prefill_left) };
            // Rows from `scored_first` on are scored until `score_end`; where too many are, the chunk ends earlier.
            let scored_first = first.max(sequence.scored);
            let scored_end = |rows: u32| (first + rows).min(sequence.score_end).max(scored_first);
            if scored_end(rows) - scored_first > scored_left {
                rows = scored_first + scored_left - first;
            }
            if rows == 0 {
                continue;
            }
            let scored = scored_end(rows) - scored_first;
            scored_left -= scored;
            if pending > 1 {
                prefill_left -= rows;
            }
            let samples = rows == pending;
            shares.push(Share { id: sequence.id, first, rows, scored_first, scored, samples, running: index as u32 });
        }
        shares
    }

    /// The step that `shares`, just planned, describe.
    pub fn step<'a>(&'a self, shares: &[Share], routing: bool) -> Step<'a> {
        let mut step = Step { sequences: Vec::with_capacity(shares.len()), rows: Vec::new(), routing };
        for (index, share) in shares.iter().enumerate() {
            let sequence = &self.running[share.running as usize];
            debug_assert_eq!(sequence.id, share.id, "shares of another plan");
            step.sequences.push(&sequence.pages);
            let last = share.first + share.rows - 1;
            let scored = share.scored_first..share.scored_first + share.scored;
            step.rows.extend((share.first..=last).map(|position| StepRow {
                sequence: index as u32,
                token: sequence.tokens[position as usize],
                position,
                logits: scored.contains(&position) || (share.samples && position == last),
            }));
        }
        step
    }

    /// Counts the rows of a share as computed, once the step has succeeded. Sequences removed meanwhile are ignored.
    pub fn computed(&mut self, share: &Share) {
        if let Some(sequence) = self.running.iter_mut().find(|s| s.id == share.id) {
            sequence.computed = share.first + share.rows;
            sequence.scored = sequence.scored.max(share.scored_first + share.scored);
        }
    }

    /// Adds the token chosen by a share that samples.
    pub fn append(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
            debug_assert_eq!(sequence.pending(), 0, "a token is chosen once all before it are computed");
            sequence.tokens.push(token);
        }
    }

    /// Forgets a sequence, finished or cancelled; its pages are free at once. `false` when it is not here.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        if let Some(at) = self.running.iter().position(|s| s.id == id) {
            let mut sequence = self.running.remove(at);
            self.kv.give_back(&mut sequence.pages);
            return true;
        }
        let at = self.waiting.iter().position(|s| s.id == id);
        at.and_then(|at| self.waiting.remove(at)).is_some()
    }

    /// A sequence's tokens, prompt and output.
    pub fn tokens(&self, id: SequenceId) -> Option<&[u32]> {
        let mut all = self.running.iter().chain(&self.waiting);
        all.find(|s| s.id == id).map(|s| s.tokens.as_slice())
    }

    /// The cache's pages.
    pub fn kv(&self) -> &KvBlocks {
        &self.kv
    }

    /// Sequences that hold pages.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for pages.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// How often a sequence lost its pages to an older one.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }
}

#[cfg(test)]
mod tests;
