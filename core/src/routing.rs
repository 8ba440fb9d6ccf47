//! From gate logits to chosen experts, and from those to one frame per expert node.

use crate::ids::{ExpertId, LayerId, Slot};
use crate::view::View;

/// How a family turns gate logits into weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateRule {
    /// Experts chosen per token.
    pub top_k: usize,
    /// Whether the chosen weights are scaled to sum to one (`norm_topk_prob`; always so in Mixtral).
    pub normalise: bool,
}

/// The chosen experts of a batch of rows: for each row `k` experts by falling weight (equal weights: lower expert first).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    k: usize,
    experts: Vec<ExpertId>,
    weights: Vec<f32>,
}

/// Why gate logits cannot be routed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoutingError {
    /// A logit that is not a number would make the choice arbitrary.
    #[error("gate logit of row {row}, {expert} is not finite")]
    NotFinite {
        /// The row.
        row: usize,
        /// The expert.
        expert: ExpertId,
    },
    /// A chosen expert that the view places nowhere.
    #[error("{expert} of {layer} is in no placement of this view")]
    Unplaced {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
    },
}

impl Routing {
    /// Softmax over all experts in f32, then the `top_k` largest, then (by rule) scaled to sum to one: the gate of
    /// Mixtral, Qwen3-MoE and OLMoE as Hugging Face transformers computes it. Replaces what was held before.
    ///
    /// `logits` is `[rows][experts]`.
    ///
    /// # Errors
    /// [`RoutingError::NotFinite`] when a logit is NaN or infinite.
    pub fn softmax_top_k(&mut self, logits: &[f32], experts: usize, rule: GateRule) -> Result<(), RoutingError> {
        debug_assert!(experts > 0 && logits.len().is_multiple_of(experts) && rule.top_k <= experts);
        self.k = rule.top_k;
        self.experts.clear();
        self.weights.clear();
        let mut order: Vec<u16> = Vec::with_capacity(experts);
        for (row, logits) in logits.chunks_exact(experts).enumerate() {
            if let Some(e) = logits.iter().position(|l| !l.is_finite()) {
                return Err(RoutingError::NotFinite { row, expert: ExpertId(e as u16) });
            }
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = logits.iter().map(|l| (l - max).exp()).sum();
            order.clear();
            order.extend(0..experts as u16);
            let falling = |a: &u16, b: &u16| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
            if rule.top_k < experts {
                order.select_nth_unstable_by(rule.top_k, falling);
                order.truncate(rule.top_k);
            }
            order.sort_unstable_by(falling);
            let first = self.weights.len();
            for e in &order {
                self.experts.push(ExpertId(*e));
                self.weights.push((logits[*e as usize] - max).exp() / sum);
            }
            if rule.normalise {
                let chosen = &mut self.weights[first..];
                let total: f32 = chosen.iter().sum();
                chosen.iter_mut().for_each(|w| *w /= total);
            }
        }
        Ok(())
    }

    /// Appends another batch's rows, of the same `k` (an empty routing takes any).
    pub fn append(&mut self, other: &Routing) {
        debug_assert!(self.experts.is_empty() || self.k == other.k);
        self.k = other.k;
        self.experts.extend_from_slice(&other.experts);
        self.weights.extend_from_slice(&other.weights);
    }

    /// Rows routed.
    pub fn rows(&self) -> usize {
        self.experts.len().checked_div(self.k).unwrap_or(0)
    }

    /// Experts per row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// A row's experts, by falling weight.
    pub fn experts(&self, row: usize) -> &[ExpertId] {
        &self.experts[row * self.k..(row + 1) * self.k]
    }

    /// A row's weights, in the order of its experts.
    pub fn weights(&self, row: usize) -> &[f32] {
        &self.weights[row * self.k..(row + 1) * self.k]
    }
}

/// What goes to one expert node: each row once, with all the experts that it wants there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// The node's slot.
    pub slot: Slot,
    /// Batch rows that travel, ascending.
    pub rows: Vec<u32>,
    /// For each travelling row, how many of `experts` are its own (at least one).
    pub pairs_per_row: Vec<u16>,
    /// The wanted experts, row after row, ascending within a row: the order of the answer's rows.
    pub experts: Vec<ExpertId>,
}

impl Destination {
    /// (row, expert) pairs, which is the number of rows of the answer.
    pub fn pairs(&self) -> usize {
        self.experts.len()
    }
}

/// Where a contribution comes back: the destination (index into [`DispatchPlan::destinations`]) and the pair in its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Index of the destination.
    pub destination: u32,
    /// Index of the answer's row.
    pub pair: u32,
}

/// A contribution to a row: where it comes from and its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contribution {
    /// Where the expert's output row comes back.
    pub source: Source,
    /// What it is multiplied by.
    pub weight: f32,
}

/// The dispatch of one micro-batch at one layer: rows deduplicated per destination, and for every row its contributions
/// in **ascending expert order**, the one order in which they are ever added (invariant 1).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DispatchPlan {
    k: usize,
    destinations: Vec<Destination>,
    contributions: Vec<Contribution>,
    /// Destination index by slot; `u32::MAX` where a slot gets nothing. Kept to spare its allocation.
    by_slot: Vec<u32>,
}

impl DispatchPlan {
    /// Plans the dispatch of `routing` under `view`, replacing what was held before. `choose` picks one of an expert's
    /// holders (it gets the row, the expert and the holders, first choice first, never empty).
    ///
    /// # Errors
    /// [`RoutingError::Unplaced`] when the view places a chosen expert nowhere.
    pub fn rebuild(
        &mut self,
        routing: &Routing,
        view: &View,
        layer: LayerId,
        mut choose: impl FnMut(usize, ExpertId, &[Slot]) -> Slot,
    ) -> Result<(), RoutingError> {
        self.k = routing.k();
        self.destinations.clear();
        self.contributions.clear();
        self.by_slot.clear();
        let mut wanted: Vec<(ExpertId, f32)> = Vec::with_capacity(self.k);
        for row in 0..routing.rows() {
            wanted.clear();
            wanted.extend(routing.experts(row).iter().copied().zip(routing.weights(row).iter().copied()));
            wanted.sort_unstable_by_key(|(expert, _)| *expert);
            for (expert, weight) in &wanted {
                let holders = view.placement.holders(layer, *expert);
                let holders = holders.ok_or(RoutingError::Unplaced { layer, expert: *expert })?;
                let slot = choose(row, *expert, holders);
                let destination = self.destination(slot);
                let to = &mut self.destinations[destination as usize];
                if to.rows.last() == Some(&(row as u32)) {
                    *to.pairs_per_row.last_mut().expect("one count for each row") += 1;
                } else {
                    to.rows.push(row as u32);
                    to.pairs_per_row.push(1);
                }
                let source = Source { destination, pair: to.experts.len() as u32 };
                to.experts.push(*expert);
                self.contributions.push(Contribution { source, weight: *weight });
            }
        }
        Ok(())
    }

    fn destination(&mut self, slot: Slot) -> u32 {
        if self.by_slot.len() <= slot.index() {
            self.by_slot.resize(slot.index() + 1, u32::MAX);
        }
        let entry = &mut self.by_slot[slot.index()];
        if *entry == u32::MAX {
            *entry = self.destinations.len() as u32;
            self.destinations.push(Destination { slot, ..Destination::default() });
        }
        *entry
    }

    /// The nodes that get rows; nobody else is sent anything or waited for.
    pub fn destinations(&self) -> &[Destination] {
        &self.destinations
    }

    /// A row's contributions in the order in which they are added: ascending expert.
    pub fn contributions(&self, row: usize) -> &[Contribution] {
        &self.contributions[row * self.k..(row + 1) * self.k]
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.contributions.len().checked_div(self.k).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NodeId, ViewId};
    use crate::placement::Placement;
    use crate::view::Member;
    use proptest::prelude::*;

    fn view(experts: usize, nodes: u16, replicas: usize) -> View {
        let slots: Vec<Slot> = (0..nodes).map(Slot).collect();
        let member = |s: &Slot| Member { slot: *s, node: NodeId(s.0.into()), data_addr: String::new() };
        View {
            id: ViewId(1),
            attention: vec![],
            experts: slots.iter().map(member).collect(),
            placement: Placement::balanced(vec![LayerId(0)], experts, &slots, replicas).unwrap(),
        }
    }

    #[test]
    fn top_k_is_by_falling_weight_and_normalised_on_request() {
        let mut r = Routing::default();
        let logits = [0.0, 2.0, 1.0, 2.0];
        r.softmax_top_k(&logits, 4, GateRule { top_k: 3, normalise: true }).unwrap();
        assert_eq!(r.experts(0), [ExpertId(1), ExpertId(3), ExpertId(2)]);
        assert!((r.weights(0).iter().sum::<f32>() - 1.0).abs() < 1e-6);
        r.softmax_top_k(&logits, 4, GateRule { top_k: 3, normalise: false }).unwrap();
        assert!(r.weights(0).iter().sum::<f32>() < 0.99);
    }

    #[test]
    fn a_gate_that_is_not_a_number_is_refused_with_its_place() {
        let mut r = Routing::default();
        let logits = [0.0, 1.0, f32::NAN, 1.0];
        let refused = r.softmax_top_k(&logits, 2, GateRule { top_k: 1, normalise: true });
        assert_eq!(refused, Err(RoutingError::NotFinite { row: 1, expert: ExpertId(0) }));
    }

    proptest! {
        /// Every pair is dispatched to one holder exactly once, rows travel once per node, and contributions name them all.
        #[test]
        fn every_pair_travels_once(
            rows in 0usize..40, nodes in 1u16..12, replicas in 1usize..3, k in 1usize..8, seed in any::<u64>()
        ) {
            let experts = 8;
            let replicas = replicas.min(nodes as usize);
            let mut state = seed | 1;
            let logits: Vec<f32> = (0..rows * experts).map(|_| {
                state ^= state << 13; state ^= state >> 7; state ^= state << 17;
                (state % 1000) as f32 / 100.0
            }).collect();
            let mut routing = Routing::default();
            routing.softmax_top_k(&logits, experts, GateRule { top_k: k, normalise: true }).unwrap();
            let view = view(experts, nodes, replicas);
            let mut plan = DispatchPlan::default();
            plan.rebuild(&routing, &view, LayerId(0), |row, _, holders| holders[row % holders.len()]).unwrap();
            let pairs: usize = plan.destinations().iter().map(Destination::pairs).sum();
            prop_assert_eq!(pairs, rows * k);
            let mut seen = std::collections::HashSet::new();
            for (d, to) in plan.destinations().iter().enumerate() {
                prop_assert!(!to.rows.is_empty());
                prop_assert!(to.rows.windows(2).all(|w| w[0] < w[1]));
                let mut pair = 0;
                for (row, count) in to.rows.iter().zip(&to.pairs_per_row) {
                    for _ in 0..*count {
                        prop_assert!(view.placement.holds(to.slot, LayerId(0), to.experts[pair]));
                        prop_assert!(routing.experts(*row as usize).contains(&to.experts[pair]));
                        seen.insert((d as u32, pair as u32, *row));
                        pair += 1;
                    }
                }
                prop_assert_eq!(pair, to.pairs());
            }
            for row in 0..rows {
                let mut last = None;
                for c in plan.contributions(row) {
                    prop_assert!(seen.remove(&(c.source.destination, c.source.pair, row as u32)));
                    let expert = plan.destinations()[c.source.destination as usize].experts[c.source.pair as usize];
                    prop_assert!(last < Some(expert));
                    last = Some(expert);
                    let at = routing.experts(row).iter().position(|e| *e == expert).unwrap();
                    prop_assert_eq!(routing.weights(row)[at], c.weight);
                }
            }
            prop_assert!(seen.is_empty());
        }
    }
}
