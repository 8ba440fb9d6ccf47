//! The two steps of expert balancing as EPLB defines them: which items get further copies, which share a pack.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Items in packs, by item.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// The pack that an item is in.
    pub pack: Vec<usize>,
    /// How many items its pack got before it.
    pub rank: Vec<usize>,
}

/// Items with further copies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replicated {
    /// The item that a copy is of: first every item once, then the further copies as they were given.
    pub item: Vec<usize>,
    /// How many copies of its item come before a copy.
    pub rank: Vec<usize>,
    /// Copies of each item.
    pub copies: Vec<usize>,
}

/// Packs items so that counts differ by at most one and weights by little: the heaviest first, each into the lightest
/// pack that still takes one. No more items than packs are a pack each.
pub fn pack(weights: &[f64], packs: usize) -> Packed {
    let packs = packs.max(1);
    if weights.len() <= packs {
        return Packed { pack: (0..weights.len()).collect(), rank: vec![0; weights.len()] };
    }
    let (share, mut surplus) = (weights.len() / packs, weights.len() % packs);
    let mut packed = Packed { pack: vec![0; weights.len()], rank: vec![0; weights.len()] };
    let (mut weight, mut count) = (vec![0.0; packs], vec![0; packs]);
    for item in heaviest_first(weights) {
        let takes = |p: &usize| count[*p] < share + usize::from(surplus > 0);
        let lightest = (0..packs).filter(takes).min_by(|a, b| f64::total_cmp(&weight[*a], &weight[*b]));
        let to = lightest.unwrap_or_default();
        surplus -= usize::from(count[to] == share);
        packed.pack[item] = to;
        packed.rank[item] = count[to];
        weight[to] += weights[item];
        count[to] += 1;
    }
    packed
}

/// Gives items further copies until there are `replicas` in all: each to the item whose copies weigh most by then.
pub fn replicate(weights: &[f64], replicas: usize) -> Replicated {
    let mut copies = vec![1; weights.len()];
    let extra = replicas.saturating_sub(weights.len());
    let further = spread(&mut copies, extra, |item, copies| Some(weights[item] / copies as f64));
    let mut replicated = Replicated { copies: vec![0; weights.len()], ..Replicated::default() };
    for item in (0..weights.len()).chain(further) {
        replicated.item.push(item);
        replicated.rank.push(replicated.copies[item]);
        replicated.copies[item] += 1;
    }
    replicated
}

/// Adds `extra` copies, each to the item that is hottest by then (ties: the first), and says to which. `heat` is that
/// of an item with so many copies, never rising with them; `None` where it wants no more.
pub(super) fn spread(copies: &mut [usize], extra: usize, heat: impl Fn(usize, usize) -> Option<f64>) -> Vec<usize> {
    let hot = |item: usize, copies: usize| heat(item, copies).map(|heat| Hot { heat, item });
    let mut hottest: BinaryHeap<Hot> = copies.iter().enumerate().filter_map(|(i, n)| hot(i, *n)).collect();
    let mut given = Vec::new();
    while given.len() < extra
        && let Some(Hot { item, .. }) = hottest.pop()
    {
        copies[item] += 1;
        given.push(item);
        hottest.extend(hot(item, copies[item]));
    }
    given
}

/// Indices by falling weight, equal ones as they come.
pub(super) fn heaviest_first(weights: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    order
}

/// An item and what each of its copies bears; the greatest is the hottest, and the first of equals.
struct Hot {
    heat: f64,
    item: usize,
}

impl Ord for Hot {
    fn cmp(&self, other: &Self) -> Ordering {
        self.heat.total_cmp(&other.heat).then(other.item.cmp(&self.item))
    }
}

impl PartialOrd for Hot {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Hot {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Hot {}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each GPU holds, as EPLB composes the steps: groups of experts to nodes, further copies within a node,
    /// copies to the node's GPUs.
    fn hierarchical(weights: &[f64], replicas: usize, groups: usize, nodes: usize, gpus: usize) -> Vec<usize> {
        let group_size = weights.len() / groups;
        let of_groups: Vec<f64> = weights.chunks(group_size).map(|group| group.iter().sum()).collect();
        let to_nodes = pack(&of_groups, nodes);
        let mut placed = Vec::new();
        for node in 0..nodes {
            let mut here: Vec<usize> = (0..groups).filter(|g| to_nodes.pack[*g] == node).collect();
            here.sort_by_key(|g| to_nodes.rank[*g]);
            let experts: Vec<usize> = here.iter().flat_map(|g| g * group_size..(g + 1) * group_size).collect();
            let of_experts: Vec<f64> = experts.iter().map(|e| weights[*e]).collect();
            let copies = replicate(&of_experts, replicas / nodes);
            let of_copies: Vec<f64> = copies.item.iter().map(|i| of_experts[*i] / copies.copies[*i] as f64).collect();
            let to_gpus = pack(&of_copies, gpus / nodes);
            let mut order: Vec<usize> = (0..copies.item.len()).collect();
            order.sort_by_key(|c| (to_gpus.pack[*c], to_gpus.rank[*c]));
            placed.extend(order.iter().map(|c| experts[copies.item[*c]]));
        }
        placed
    }

    #[test]
    fn the_published_example_comes_out_to_the_last_expert() {
        let first = [90.0, 132.0, 40.0, 61.0, 104.0, 165.0, 39.0, 4.0, 73.0, 56.0, 183.0, 86.0];
        let second = [20.0, 107.0, 104.0, 64.0, 19.0, 197.0, 187.0, 157.0, 172.0, 86.0, 16.0, 27.0];
        assert_eq!(hierarchical(&first, 16, 4, 2, 8), [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]);
        assert_eq!(hierarchical(&second, 16, 4, 2, 8), [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]);
    }

    #[test]
    fn packs_differ_by_one_item_at_most_whatever_the_weights() {
        for (items, packs) in [(7, 3), (8, 5), (3, 8), (0, 2), (5, 1), (6, 0)] {
            let packed = pack(&vec![0.0; items], packs);
            let count = |p: usize| packed.pack.iter().filter(|at| **at == p).count();
            let counts: Vec<usize> = (0..packs.max(1)).map(count).collect();
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{items} {packs} {counts:?}");
        }
    }

    #[test]
    fn a_copy_goes_to_what_weighs_most_for_each_copy() {
        let replicated = replicate(&[6.0, 10.0, 1.0], 6);
        assert_eq!(replicated.copies, [2, 3, 1]);
        assert_eq!(replicated.item, [0, 1, 2, 1, 0, 1]);
        assert_eq!(replicated.rank, [0, 0, 0, 1, 1, 2]);
        assert_eq!(replicate(&[1.0, 2.0], 1).copies, [1, 1], "every item stays");
    }
}
