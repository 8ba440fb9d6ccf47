//! Which of several expert nodes are slow, by how long their answers take.

use std::collections::BTreeMap;

/// Who takes less than so many times the usual is as fast as the others: nodes that share processors differ by more than
/// nothing, and every move costs.
const SLOW_FACTOR: f64 = 3.0;
/// And so is whose answers take no longer than this beyond the usual: below, who shares a processor with whom decides.
const SLOW_MIN_NS: f64 = 1e6;

/// How long a node's answers take, means.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// Nanoseconds for a unit of work: about an expert.
    pub unit: f64,
    /// Nanoseconds from sending a frame to its answer.
    pub answer: f64,
}

/// How fast each node is beside the others: 1 is usual, 0.1 takes ten times as long.
pub fn speeds<K: Copy + Ord>(nodes: &BTreeMap<K, Took>) -> BTreeMap<K, f64> {
    let of = |each: fn(&Took) -> f64| usual(&mut nodes.values().map(each).collect::<Vec<f64>>());
    let usual = Took { unit: of(|n| n.unit), answer: of(|n| n.answer) };
    let is_usual = |n: &Took| n.unit < usual.unit * SLOW_FACTOR || n.answer < usual.answer + SLOW_MIN_NS;
    nodes.iter().map(|(id, n)| (*id, if is_usual(n) { 1.0 } else { usual.unit / n.unit })).collect()
}

/// What is usual among some values, 0 where there are none: the middle one; of two in the middle the lower, for of two
/// nodes the faster is the usual one. Changes their order.
pub fn usual(values: &mut [f64]) -> f64 {
    let middle = values.len().saturating_sub(1) / 2;
    if values.is_empty() { 0.0 } else { *values.select_nth_unstable_by(middle, f64::total_cmp).1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: f64 = 1e6;

    fn of(nodes: &[(f64, f64)]) -> Vec<f64> {
        let nodes = nodes.iter().enumerate().map(|(id, (unit, answer))| (id, Took { unit: *unit, answer: *answer }));
        speeds(&nodes.collect()).into_values().collect()
    }

    #[test]
    fn who_all_wait_for_is_slow_and_who_only_has_more_to_do_is_not() {
        let got = of(&[(MS, MS), (1.2 * MS, 1.2 * MS), (10.0 * MS, 10.0 * MS), (0.25 * MS, 5.0 * MS)]);
        assert_eq!(got, [1.0, 1.0, 0.1, 1.0]);
    }

    #[test]
    fn of_two_nodes_the_slower_one_is_slow() {
        assert_eq!(of(&[(10.0 * MS, 10.0 * MS), (MS, MS)]), [0.1, 1.0]);
    }

    #[test]
    fn many_times_the_usual_is_usual_where_it_is_less_than_a_millisecond() {
        assert_eq!(of(&[(0.05 * MS, 0.1 * MS), (0.5 * MS, 0.9 * MS), (0.06 * MS, 0.1 * MS)]), [1.0, 1.0, 1.0]);
    }

    #[test]
    fn of_nobody_nothing_is_known() {
        assert!(of(&[]).is_empty());
        assert_eq!(usual(&mut []), 0.0);
    }
}
