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
    /// A chosen expert none of whose holders can be reached.
    #[error("no holder of {expert} of {layer} can be reached ({})", named(holders))]
    Unreachable {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// Who holds it.
        holders: Vec<Slot>,
    },
}

fn named(slots: &[Slot]) -> String {
    slots.iter().map(Slot::to_string).collect::<Vec<_>>().join(", ")
}

/// A number that is the smaller the larger the logit, in the order of `f32::total_cmp`, and of equal ones the smaller the lower the
/// expert, which its last sixteen bits are.
fn rank(logit: f32, expert: u16) -> u64 {
    let bits = logit.to_bits();
    let falling = if bits >> 31 == 0 { bits ^ 0x7fff_ffff } else { bits };
    u64::from(falling) << 16 | u64::from(expert)
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
        let (mut order, mut exps) = (Vec::with_capacity(experts), Vec::with_capacity(experts));
        for (row, logits) in logits.chunks_exact(experts).enumerate() {
            if let Some(e) = logits.iter().position(|l| !l.is_finite()) {
                return Err(RoutingError::NotFinite { row, expert: ExpertId(e as u16) });
            }
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            exps.clear();
            exps.extend(logits.iter().map(|l| (l - max).exp()));
            let sum: f32 = exps.iter().sum();
            order.clear();
            order.extend(logits.iter().enumerate().map(|(expert, logit)| rank(*logit, expert as u16)));
            if rule.top_k < experts {
                order.select_nth_unstable(rule.top_k);
                order.truncate(rule.top_k);
            }
            order.sort_unstable();
            let first = self.weights.len();
            for rank in &order {
                let expert = *rank as u16;
                self.experts.push(ExpertId(expert));
                self.weights.push(exps[usize::from(expert)] / sum);
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

    /// Adds a pair of the last row or of a later one; returns its place in the answer.
    fn push(&mut self, row: u32, expert: ExpertId) -> u32 {
        if self.rows.last() == Some(&row) {
            *self.pairs_per_row.last_mut().expect("one count for each row") += 1;
        } else {
            self.rows.push(row);
            self.pairs_per_row.push(1);
        }
        self.experts.push(expert);
        self.experts.len() as u32 - 1
    }
}

fn holder(
    view: &View,
    layer: LayerId,
    row: usize,
    expert: ExpertId,
    choose: &mut impl FnMut(usize, ExpertId, &[Slot]) -> Option<Slot>,
) -> Result<Slot, RoutingError> {
    let holders = view.placement.holders(layer, expert).ok_or(RoutingError::Unplaced { layer, expert })?;
    choose(row, expert, holders).ok_or_else(|| RoutingError::Unreachable { layer, expert, holders: holders.to_vec() })
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
    /// holders (it gets the row, the expert and the holders, first choice first, never empty), or none if none can be
    /// reached.
    ///
    /// # Errors
    /// [`RoutingError::Unplaced`] when the view places a chosen expert nowhere, [`RoutingError::Unreachable`] when `choose`
    /// picks nobody.
    pub fn rebuild(
        &mut self,
        routing: &Routing,
        view: &View,
        layer: LayerId,
        mut choose: impl FnMut(usize, ExpertId, &[Slot]) -> Option<Slot>,
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
                let slot = holder(view, layer, row, *expert, &mut choose)?;
                let destination = self.destination(slot);
                let pair = self.destinations[destination as usize].push(row as u32, *expert);
                self.contributions.push(Contribution { source: Source { destination, pair }, weight: *weight });
            }
        }
        Ok(())
    }

    /// Gives all that destination `lost` was to compute to other holders, as further destinations: those that were sent
    /// already are not changed. `lost` is left with nothing. Returns the first of the new destinations.
    ///
    /// Contributions keep their order, so that the sums have the same bits (invariant 1).
    ///
    /// # Errors
    /// As [`DispatchPlan::rebuild`]; the plan is then as it was.
    pub fn reassign(
        &mut self,
        lost: usize,
        view: &View,
        layer: LayerId,
        mut choose: impl FnMut(usize, ExpertId, &[Slot]) -> Option<Slot>,
    ) -> Result<usize, RoutingError> {
        let first = self.destinations.len();
        let from = &self.destinations[lost];
        let mut new: Vec<Destination> = Vec::new();
        let mut moved: Vec<Source> = Vec::with_capacity(from.pairs());
        let mut experts = from.experts.iter();
        for (row, count) in from.rows.iter().zip(&from.pairs_per_row) {
            for expert in experts.by_ref().take(usize::from(*count)) {
                let slot = holder(view, layer, *row as usize, *expert, &mut choose)?;
                let at = new.iter().position(|d| d.slot == slot).unwrap_or_else(|| {
                    new.push(Destination { slot, ..Destination::default() });
                    new.len() - 1
                });
                moved.push(Source { destination: (first + at) as u32, pair: new[at].push(*row, *expert) });
            }
        }
        let from = &mut self.destinations[lost];
        let rows = std::mem::take(&mut from.rows);
        from.pairs_per_row.clear();
        from.experts.clear();
        for row in rows {
            let contributions = &mut self.contributions[row as usize * self.k..(row as usize + 1) * self.k];
            for contribution in contributions.iter_mut().filter(|c| c.source.destination as usize == lost) {
                contribution.source = moved[contribution.source.pair as usize];
            }
        }
        self.destinations.append(&mut new);
        Ok(first)
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
    fn experts_are_ranked_as_their_logits_compare_and_of_equals_the_lower_first() {
        let logits = [0.0, -0.0, 1.5, -1.5, f32::MIN, f32::MAX, 1e-40, -1e-40, 1.5, f32::MIN_POSITIVE];
        let mut expected: Vec<u16> = (0..logits.len() as u16).collect();
        expected.sort_by(|a, b| logits[usize::from(*b)].total_cmp(&logits[usize::from(*a)]));
        for top_k in [1, 4, logits.len()] {
            let mut r = Routing::default();
            r.softmax_top_k(&logits, logits.len(), GateRule { top_k, normalise: true }).unwrap();
            assert_eq!(r.experts(0).iter().map(|e| e.0).collect::<Vec<_>>(), expected[..top_k]);
        }
    }

    #[test]
    fn a_gate_that_is_not_a_number_is_refused_with_its_place() {
        let mut r = Routing::default();
        let logits = [0.0, 1.0, f32::NAN, 1.0];
        let refused = r.softmax_top_k(&logits, 2, GateRule { top_k: 1, normalise: true });
        assert_eq!(refused, Err(RoutingError::NotFinite { row: 1, expert: ExpertId(0) }));
    }

    proptest! {
        /// Every pair is dispatched to one holder exactly once, rows travel once per node, and contributions name them all;
        /// also after nodes were lost one after the other and what they were to compute went to others.
        #[test]
        fn every_pair_travels_once(
            rows in 0usize..40, nodes in 1u16..12, replicas in 1usize..4, k in 1usize..8, seed in any::<u64>()
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
            plan.rebuild(&routing, &view, LayerId(0), |row, _, holders| Some(holders[row % holders.len()])).unwrap();
            check(&plan, &routing, &view)?;
            let mut lost: Vec<Slot> = Vec::new();
            for slot in (0..nodes).map(Slot).take(replicas - 1) {
                lost.push(slot);
                for destination in 0..plan.destinations().len() {
                    let to = &plan.destinations()[destination];
                    if to.slot == slot && to.pairs() > 0 {
                        let alive = |_: usize, _: ExpertId, holders: &[Slot]| {
                            holders.iter().copied().find(|s| !lost.contains(s))
                        };
                        plan.reassign(destination, &view, LayerId(0), alive).unwrap();
                    }
                }
                prop_assert!(plan.destinations().iter().all(|d| d.pairs() == 0 || !lost.contains(&d.slot)));
                check(&plan, &routing, &view)?;
            }
        }
    }

    fn check(plan: &DispatchPlan, routing: &Routing, view: &View) -> Result<(), TestCaseError> {
        let pairs: usize = plan.destinations().iter().map(Destination::pairs).sum();
        prop_assert_eq!(pairs, routing.rows() * routing.k());
        let mut seen = std::collections::HashSet::new();
        for (d, to) in plan.destinations().iter().enumerate() {
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
        for row in 0..routing.rows() {
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
        Ok(())
    }

    #[test]
    fn rows_of_a_lost_node_without_a_replica_stay_where_they_were() {
        let (view, mut routing, mut plan) = (view(2, 2, 1), Routing::default(), DispatchPlan::default());
        routing.softmax_top_k(&[1.0, 2.0], 2, GateRule { top_k: 2, normalise: true }).unwrap();
        plan.rebuild(&routing, &view, LayerId(0), |_, _, holders| holders.first().copied()).unwrap();
        let before = plan.clone();
        let refused = plan.reassign(1, &view, LayerId(0), |_, _, _| None);
        let holders = vec![Slot(1)];
        assert_eq!(refused, Err(RoutingError::Unreachable { layer: LayerId(0), expert: ExpertId(1), holders }));
        assert_eq!(plan, before);
    }
}
