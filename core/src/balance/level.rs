//! Evens work out between nodes, one item at a time: first within each layer, then over all of them.
//!
//! It ends by itself. Within a layer items only leave the slowest node, for one that is faster even with them; over all
//! layers they only leave a node with more to do, and never make the slower of the two slower in their layer. So the
//! layers' times, slowest node first, never rise, and where they stay the nodes' totals fall.

use std::cmp::Ordering;

/// What is moved must be worth its loading: the share of the mean time by which the slowest node of a layer must become
/// faster, and by which a node must have more to do in all than another. Measured loads wander by a few percent from
/// one minute to the next, and to follow them would move experts to and fro for nothing.
const GAIN_MIN: f64 = 0.05;

/// The work, as a share of a layer's mean, below which an item is not worth its loading: an idle expert has as many
/// bytes as a busy one, and twenty of them would be moved for what one does.
const WORK_MIN: f64 = 0.25;

/// Who does how much work, by layer and node. Work is counted in whole numbers (below 2^53), so that sums are exact
/// and the same whatever order they came about in.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    speeds: Vec<f64>,
    work: Vec<f64>,
    total: Vec<f64>,
    items: Vec<Vec<usize>>,
}

impl Ledger {
    pub(super) fn new(speeds: Vec<f64>, layers: usize) -> Self {
        let nodes = speeds.len();
        Self { speeds, work: vec![0.0; layers * nodes], total: vec![0.0; nodes], items: vec![vec![]; layers * nodes] }
    }

    pub(super) fn nodes(&self) -> usize {
        self.speeds.len()
    }

    fn layers(&self) -> usize {
        self.work.len() / self.nodes()
    }

    /// Changes the work of items that stay where they are.
    pub(super) fn change(&mut self, layer: usize, node: usize, by: f64) {
        self.work[layer * self.speeds.len() + node] += by;
        self.total[node] += by;
    }

    pub(super) fn add(&mut self, layer: usize, node: usize, item: usize, work: f64) {
        self.change(layer, node, work);
        self.items[layer * self.speeds.len() + node].push(item);
    }

    pub(super) fn remove(&mut self, layer: usize, node: usize, item: usize, work: f64) {
        self.change(layer, node, -work);
        self.items[layer * self.speeds.len() + node].retain(|i| *i != item);
    }

    fn items(&self, layer: usize, node: usize) -> &[usize] {
        &self.items[layer * self.nodes() + node]
    }

    /// How long a node takes for more work than it has in a layer.
    pub(super) fn time_with(&self, layer: usize, node: usize, more: f64) -> f64 {
        (self.work[layer * self.nodes() + node] + more) / self.speeds[node]
    }

    /// How long a node takes in a layer.
    pub(super) fn time(&self, layer: usize, node: usize) -> f64 {
        self.time_with(layer, node, 0.0)
    }

    /// How long a node takes in all layers.
    pub(super) fn time_in_all(&self, node: usize) -> f64 {
        self.total[node] / self.speeds[node]
    }

    /// How long each node would take in a layer if all took the same.
    fn mean(&self, layer: usize) -> f64 {
        let work = &self.work[layer * self.nodes()..(layer + 1) * self.nodes()];
        work.iter().sum::<f64>() / self.speeds.iter().sum::<f64>()
    }

    /// The least work that is worth moving in a layer.
    fn work_min(&self, layer: usize) -> f64 {
        let nodes = 0..self.nodes();
        let items: usize = nodes.map(|node| self.items(layer, node).len()).sum();
        let work: f64 = self.work[layer * self.nodes()..(layer + 1) * self.nodes()].iter().sum();
        (WORK_MIN * work / items.max(1) as f64).max(1.0)
    }

    /// How long each node would take in all layers if all took the same.
    fn mean_in_all(&self) -> f64 {
        self.total.iter().sum::<f64>() / self.speeds.iter().sum::<f64>()
    }

    /// Nodes by falling time in a layer, then in all, then by slot.
    pub(super) fn slower(&self, layer: usize, a: usize, b: usize) -> Ordering {
        let in_layer = self.time(layer, b).total_cmp(&self.time(layer, a));
        in_layer.then_with(|| self.time_in_all(b).total_cmp(&self.time_in_all(a))).then(a.cmp(&b))
    }

    fn slowest(&self, layer: usize) -> usize {
        (0..self.nodes()).min_by(|a, b| self.slower(layer, *a, *b)).unwrap_or_default()
    }
}

/// An item that goes from one node to another.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shift {
    pub(super) layer: usize,
    pub(super) item: usize,
    pub(super) from: usize,
    pub(super) to: usize,
}

impl Shift {
    fn back(self) -> Self {
        Self { from: self.to, to: self.from, ..self }
    }
}

/// What is evened out, and what may go where at which price.
pub(super) trait Ground {
    fn ledger(&self) -> &Ledger;
    /// The work that goes with an item.
    fn work(&self, item: usize) -> f64;
    fn may(&self, item: usize, to: usize) -> bool;
    fn is_free(&self, item: usize, to: usize) -> bool;
    fn shift(&mut self, shift: Shift);
    /// Whether what was shifted so far is within what may be spent.
    fn is_affordable(&self) -> bool;
    /// Notes that more was worth doing than may be spent.
    fn defer(&mut self);
    fn is_deferred(&self) -> bool;
}

/// Evens out the layers, then the totals, until it is done or may spend no more; says whether anything was shifted.
/// Evener totals may open a way within a layer: to be repeated until nothing is shifted.
pub(super) fn level(ground: &mut impl Ground) -> bool {
    let mut shifted = false;
    for layer in 0..ground.ledger().layers() {
        shifted |= level_layer(ground, layer);
        if ground.is_deferred() {
            return shifted;
        }
    }
    level_totals(ground) || shifted
}

/// Makes a layer's slowest node faster. A single item seldom does (another node may be as slow), so shifts are tried
/// one after the other, and those are kept after which the slowest node had become faster by enough.
fn level_layer(ground: &mut impl Ground, layer: usize) -> bool {
    let ledger = ground.ledger();
    let gain_min = GAIN_MIN * ledger.mean(layer);
    let work_min = ledger.work_min(layer);
    let mut reached = ledger.time(layer, ledger.slowest(layer));
    let shifts_max: usize = (0..ledger.nodes()).map(|n| ledger.items(layer, n).len()).sum();
    let (mut trail, mut kept) = (Vec::new(), 0);
    while trail.len() < shifts_max {
        let from = ground.ledger().slowest(layer);
        let Some(shift) = best_in_layer(ground, layer, from, gain_min, work_min) else { break };
        ground.shift(shift);
        trail.push(shift);
        let ledger = ground.ledger();
        let slowest = ledger.time(layer, ledger.slowest(layer));
        if slowest < reached - gain_min {
            (reached, kept) = (slowest, trail.len());
        }
    }
    while trail.len() > kept || !ground.is_affordable() {
        let Some(shift) = trail.pop() else { break };
        ground.shift(shift.back());
        if trail.len() < kept {
            // A part is kept: the slowest node is not faster yet, but less is missing the next time.
            ground.defer();
        }
    }
    !trail.is_empty()
}

fn best_in_layer(ground: &impl Ground, layer: usize, from: usize, gain_min: f64, work_min: f64) -> Option<Shift> {
    let ledger = ground.ledger();
    let bound = ledger.time(layer, from) - gain_min;
    let mut best = None;
    for to in (0..ledger.nodes()).filter(|to| ledger.time(layer, *to) < bound) {
        let fits = |work: f64| work >= work_min && ledger.time_with(layer, to, work) < bound;
        best = better(best, best_between(ground, layer, from, to, fits));
    }
    best.map(|found| found.shift)
}

/// Brings the nodes' work in all layers together where no layer gets slower by it: a node that comes in empty gets its
/// share also where a layer's experts cannot be divided any better.
fn level_totals(ground: &mut impl Ground) -> bool {
    let ledger = ground.ledger();
    let gain_min = GAIN_MIN * ledger.mean_in_all();
    let work_min: Vec<f64> = (0..ledger.layers()).map(|layer| ledger.work_min(layer)).collect();
    let shifts_max: usize = ledger.items.iter().map(Vec::len).sum();
    for shifts in 0..shifts_max {
        let Some(shift) = best_in_all(ground, gain_min, &work_min) else { return shifts > 0 };
        ground.shift(shift);
        if !ground.is_affordable() {
            ground.shift(shift.back());
            ground.defer();
            return shifts > 0;
        }
    }
    shifts_max > 0
}

fn best_in_all(ground: &impl Ground, gain_min: f64, work_min: &[f64]) -> Option<Shift> {
    let ledger = ground.ledger();
    let mut nodes: Vec<usize> = (0..ledger.nodes()).collect();
    nodes.sort_by(|a, b| ledger.time_in_all(*b).total_cmp(&ledger.time_in_all(*a)).then(a.cmp(b)));
    for from in nodes.iter().copied() {
        let bound = ledger.time_in_all(from) - gain_min;
        for to in nodes.iter().rev().copied().take_while(|to| ledger.time_in_all(*to) < bound) {
            let mut best = None;
            for (layer, work_min) in work_min.iter().enumerate() {
                let fits = |work: f64| {
                    work >= *work_min
                        && (ledger.total[to] + work) / ledger.speeds[to] < bound
                        && ledger.time_with(layer, to, work) <= ledger.time(layer, from)
                };
                best = better(best, best_between(ground, layer, from, to, fits));
            }
            if let Some(found) = best {
                return Some(found.shift);
            }
        }
    }
    None
}

/// A shift and what speaks for it.
#[derive(Clone, Copy)]
struct Found {
    shift: Shift,
    /// By how much the slower of the two nodes gets faster in the layer.
    gain: f64,
    /// The new time of the node that gets the item, in the layer, and its present time in all.
    there: f64,
    there_in_all: f64,
    is_free: bool,
}

impl Found {
    /// The larger gain first, then the less busy node, then what costs nothing, then the lowest slot and item.
    fn order(&self, other: &Self) -> Ordering {
        let less_busy = || self.there.total_cmp(&other.there).then(self.there_in_all.total_cmp(&other.there_in_all));
        let cheaper = other.is_free.cmp(&self.is_free);
        let lower = (self.shift.to, self.shift.item).cmp(&(other.shift.to, other.shift.item));
        other.gain.total_cmp(&self.gain).then_with(less_busy).then(cheaper).then(lower)
    }
}

fn better(a: Option<Found>, b: Option<Found>) -> Option<Found> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b.order(&a) == Ordering::Less { b } else { a }),
        (a, b) => a.or(b),
    }
}

/// The best item of a layer to go from one node to another, of those whose work `fits` there.
fn best_between(
    ground: &impl Ground,
    layer: usize,
    from: usize,
    to: usize,
    fits: impl Fn(f64) -> bool,
) -> Option<Found> {
    let ledger = ground.ledger();
    let mut best = None;
    for item in ledger.items(layer, from).iter().copied() {
        let work = ground.work(item);
        if !fits(work) || !ground.may(item, to) {
            continue;
        }
        let there = ledger.time_with(layer, to, work);
        let found = Found {
            shift: Shift { layer, item, from, to },
            gain: ledger.time(layer, from) - there.max(ledger.time_with(layer, from, -work)),
            there,
            there_in_all: ledger.time_in_all(to),
            is_free: ground.is_free(item, to),
        };
        best = better(best, Some(found));
    }
    best
}
