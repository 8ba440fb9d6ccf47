//! The next placement from the nodes there are, the load on the experts and the placement before it.
//!
//! Every expert that a node loads costs bytes and time, so what is held stays where it is unless there is a reason. In
//! this order: an expert that nobody holds gets a holder; missing replicas are made up for; the hottest experts
//! get further copies, and such copies are given up once they are cold; work is evened out, within each layer (a token
//! waits for the slowest of a layer's nodes), then over all layers. Only the first is not bounded by
//! [`Wanted::moves_max`]: without it nothing serves. What the bound leaves undone, the next call does
//! ([`Placed::deferred`]); a call with its own result and the same inputs then moves nothing.
//!
//! Ties go to the lowest slot, then to the lowest layer and expert: the same inputs give the same placement anywhere.
//!
//! # Layout
//! - [`place`] and its types, here
//! - `steps`: EPLB's two steps, [`pack`] and [`replicate`]
//! - `board`: the placement while it is made
//! - `level`: evening out

mod board;
mod level;
mod steps;

#[cfg(test)]
mod tests;

use crate::ids::{ExpertId, LayerId, Slot};
use crate::placement::{Placement, PlacementError};
use board::{Board, Goal, Node};
pub use steps::{Packed, Replicated, pack, replicate};

/// Most copies of an expert: as many as a view on the wire can name.
pub const COPIES_MAX: usize = 64;

/// Speeds are held within a factor of a thousand: what is slower or faster is a mistake, and must not weigh on anyone.
const SPEED_MIN: f64 = 1.0 / SPEED_MAX;
const SPEED_MAX: f64 = 1000.0;

/// The load of the busiest expert in whole numbers: fine enough to tell experts apart, and the sum over 1024 layers of
/// 4096 experts stays below 2^53, where every sum is exact.
const LOAD_MAX: f64 = (1u64 << 30) as f64;

/// What an expert weighs however idle it was, as a share of its layer's mean: it may be wanted the next moment, and
/// without this all idle experts would be heaped on one node.
const IDLE_SHARE: f64 = 0.05;

/// How many times its layer's mean the copies of an expert must bear for a further one. Below, experts are evened out
/// better by putting busy ones beside idle ones, which takes no room.
const HOT_MIN: f64 = 1.5;

/// How much hotter an expert counts for a copy that is there already: a load that wavers about the limit must not
/// load and give up a copy by turns.
const HOT_KEPT: f64 = 1.25;

/// An expert node that can hold experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NodeRoom {
    /// Its slot.
    pub slot: Slot,
    /// Experts that it holds at most, over all layers; `None`: as many as there are. While a change is prepared it also
    /// still holds what the change takes from it.
    pub experts_max: Option<usize>,
    /// Its speed beside the others', usually 1.
    pub speed: f64,
}

/// What a placement is made for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The layers that have routed experts, ascending.
    pub moe_layers: &'a [LayerId],
    /// Routed experts in each of them.
    pub experts: usize,
    /// The nodes there are, in any order. A node that held experts and is not among them is gone.
    pub nodes: &'a [NodeRoom],
    /// Copies of every expert, as far as there are nodes and room for them.
    pub replicas: usize,
    /// Rows a second that each expert gets, in the order of [`Placement::table`]; empty: all the same. What is negative
    /// or no number counts as 0, a layer without any load as evenly loaded.
    pub loads: &'a [f64],
    /// Further copies for the hottest experts, over all layers, as far as the replicas leave room.
    pub hot_replicas: usize,
    /// Experts loaded in one change beyond those that nobody holds. A fresh placement is not bounded: nothing
    /// serves yet.
    pub moves_max: usize,
    /// The placement that is in force. One of another model, or of nodes that are all gone, is as good as none.
    pub before: Option<&'a Placement>,
}

/// Why an expert is loaded, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Why {
    /// Nobody holds it.
    Unheld,
    /// It has fewer copies than wanted.
    Replica,
    /// It is hot.
    Hot,
    /// It leaves a node that has too much to do.
    Balance,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Why::Unheld => "unheld",
            Why::Replica => "replica",
            Why::Hot => "hot",
            Why::Balance => "balance",
        })
    }
}

/// An expert that a node has to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The expert's layer.
    pub layer: LayerId,
    /// The expert.
    pub expert: ExpertId,
    /// The node that loads it.
    pub to: Slot,
    /// What for.
    pub why: Why,
}

/// The next placement, and what it takes to get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Who is to hold what.
    pub placement: Placement,
    /// What has to be loaded, the most urgent first, then by layer and expert.
    pub moves: Vec<Move>,
    /// Copies that nodes which are still there give up.
    pub dropped: usize,
    /// More is worth doing: call again once this change is made.
    pub deferred: bool,
}

/// The next placement.
///
/// Without one before it, equal nodes with room enough and equal loads get [`Placement::balanced`].
///
/// # Errors
/// [`PlacementError::NoNodes`]; [`PlacementError::NoRoom`] when the nodes cannot hold every expert once;
/// [`PlacementError::WrongLoads`].
pub fn place(wanted: &Wanted) -> Result<Placed, PlacementError> {
    let size = wanted.moe_layers.len() * wanted.experts;
    let nodes = nodes(wanted.nodes, size);
    if nodes.is_empty() {
        return Err(PlacementError::NoNodes { experts: wanted.experts });
    }
    let loads = loads(wanted, size)?;
    let before = survivors(wanted, &nodes);
    let is_fresh = before.is_none();
    let before = before.unwrap_or_else(|| vec![vec![]; size]);
    let goal = goal(wanted, &nodes, &loads, &before);
    let moves_max = if is_fresh { usize::MAX } else { wanted.moves_max };
    let slots: Vec<Slot> = nodes.iter().map(|n| n.slot).collect();
    let mut board = Board::new(nodes, loads, wanted.experts, before, moves_max);

    if is_fresh && board.is_uniform() {
        let balanced = Placement::balanced(wanted.moe_layers.to_vec(), wanted.experts, &slots, goal.floor)?;
        if board.adopt(&balanced) {
            // Replicas on the next nodes are not always as even as can be.
            board.deferred = board.clone().settle(&goal);
            return board.finish(wanted.moe_layers);
        }
    }
    board.give_up_surplus(&goal);
    board.make_room()?;
    if is_fresh {
        board.pack();
    }
    board.hold_unheld();
    board.settle(&goal);
    board.order_holders();
    board.finish(wanted.moe_layers)
}

/// The nodes by slot, each once.
fn nodes(rooms: &[NodeRoom], size: usize) -> Vec<Node> {
    let speed = |speed: f64| if speed.is_nan() { 1.0 } else { speed.clamp(SPEED_MIN, SPEED_MAX) };
    let node =
        |n: &NodeRoom| Node { slot: n.slot, speed: speed(n.speed), room: n.experts_max.unwrap_or(size).min(size) };
    let mut nodes: Vec<Node> = rooms.iter().map(node).collect();
    nodes.sort_by_key(|n| n.slot);
    nodes.dedup_by_key(|n| n.slot);
    nodes
}

/// Loads of at most about [`LOAD_MAX`], none of them 0.
fn loads(wanted: &Wanted, size: usize) -> Result<Vec<f64>, PlacementError> {
    if !wanted.loads.is_empty() && wanted.loads.len() != size {
        return Err(PlacementError::WrongLoads { found: wanted.loads.len(), wanted: size });
    }
    let known = |load: &f64| if load.is_finite() { load.max(0.0) } else { 0.0 };
    let most = wanted.loads.iter().map(known).fold(0.0, f64::max);
    if most <= 0.0 {
        return Ok(vec![LOAD_MAX; size]);
    }
    let mut loads: Vec<f64> = wanted.loads.iter().map(|load| known(load) / most * LOAD_MAX).collect();
    let mean_of_all = loads.iter().sum::<f64>() / size as f64;
    for layer in loads.chunks_mut(wanted.experts) {
        let mean = layer.iter().sum::<f64>() / layer.len() as f64;
        let least = if mean > 0.0 { IDLE_SHARE * mean } else { mean_of_all };
        layer.iter_mut().for_each(|load| *load += least);
    }
    Ok(loads)
}

/// Who of the nodes holds what already, in order, by table index; `None` where nobody holds anything.
fn survivors(wanted: &Wanted, nodes: &[Node]) -> Option<Vec<Vec<usize>>> {
    let before = wanted.before?;
    if before.moe_layers() != wanted.moe_layers || before.experts() != wanted.experts {
        return None;
    }
    let index = |slot: &Slot| nodes.binary_search_by_key(slot, |n| n.slot).ok();
    let holders = |slots: &Vec<Slot>| slots.iter().filter_map(index).collect();
    let survivors: Vec<Vec<usize>> = before.table().iter().map(holders).collect();
    survivors.iter().any(|s| !s.is_empty()).then_some(survivors)
}

/// How many copies each expert is to have. Depends on present copies only through [`HOT_KEPT`], never on the bound.
fn goal(wanted: &Wanted, nodes: &[Node], loads: &[f64], before: &[Vec<usize>]) -> Goal {
    let copies_max = nodes.len().min(COPIES_MAX);
    let floor = wanted.replicas.clamp(1, copies_max);
    let room: usize = nodes.iter().map(|n| n.room).sum();
    let hot_max = wanted.hot_replicas.min(room.saturating_sub(loads.len() * floor));
    let warm: Vec<f64> = loads
        .chunks(wanted.experts.max(1))
        .map(|layer| HOT_MIN * layer.iter().sum::<f64>() / (layer.len() * floor) as f64)
        .collect();
    let heat = |item: usize, copies: usize| {
        let kept = if before[item].len() > copies { HOT_KEPT } else { 1.0 };
        let heat = kept * loads[item] / copies as f64;
        (copies < copies_max && heat > warm[item / wanted.experts]).then_some(heat)
    };
    let mut copies = vec![floor; loads.len()];
    let hot = steps::spread(&mut copies, hot_max, heat);
    Goal { floor, hot, copies }
}
