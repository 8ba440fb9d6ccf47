//! The placement while it is made: who holds what, what that was before, and what may still be spent on it.

use super::level::{Ground, Ledger, Shift, level};
use super::steps::{heaviest_first, pack};
use super::{Move, Placed, Why};
use crate::ids::{ExpertId, LayerId, Slot};
use crate::placement::{Placement, PlacementError};

/// Rounds of filling and levelling in one change. Two are the rule (the second finds nothing to do); what is still open
/// after so many waits for the next change.
const ROUNDS_MAX: usize = 8;

/// A node as the board knows it; nodes are named by their index, which is the order of their slots.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) slot: Slot,
    pub(super) speed: f64,
    pub(super) room: usize,
}

/// How many copies each expert is to have.
#[derive(Clone, Debug, Default)]
pub(super) struct Goal {
    /// Copies of every expert.
    pub(super) floor: usize,
    /// Experts that get a further one, the most urgent first; once for each copy.
    pub(super) hot: Vec<usize>,
    /// Both together, by expert.
    pub(super) copies: Vec<usize>,
}

/// A node that holds an expert, and why it has to load it (`None`: it holds it already).
#[derive(Clone, Copy, Debug)]
struct Copy {
    node: usize,
    why: Option<Why>,
}

impl Copy {
    /// Whether its loading counts towards the bound.
    fn is_spent(&self) -> bool {
        self.why.is_some_and(|why| why != Why::Unheld)
    }
}

/// The table of holders with everything that follows from it, kept up to date.
#[derive(Clone, Debug)]
pub(super) struct Board {
    nodes: Vec<Node>,
    experts: usize,
    loads: Vec<f64>,
    /// Table indices by falling load.
    order: Vec<usize>,
    before: Vec<Vec<usize>>,
    copies: Vec<Vec<Copy>>,
    held: Vec<usize>,
    ledger: Ledger,
    spent: usize,
    moves_max: usize,
    pub(super) deferred: bool,
}

impl Board {
    /// A board with what is held already, `before[i]` being the nodes that hold the expert of table index `i`.
    pub(super) fn new(
        nodes: Vec<Node>,
        loads: Vec<f64>,
        experts: usize,
        before: Vec<Vec<usize>>,
        moves_max: usize,
    ) -> Self {
        let layers = loads.len().checked_div(experts).unwrap_or(0);
        let mut board = Self {
            ledger: Ledger::new(nodes.iter().map(|n| n.speed).collect(), layers),
            experts,
            order: heaviest_first(&loads),
            copies: vec![vec![]; loads.len()],
            held: vec![0; nodes.len()],
            nodes,
            loads,
            before,
            spent: 0,
            moves_max,
            deferred: false,
        };
        for item in 0..board.loads.len() {
            for at in 0..board.before[item].len() {
                board.add(item, board.before[item][at], Why::Balance); // nothing to load: held before
            }
        }
        board
    }

    /// Whether all experts are as busy, all nodes as fast.
    pub(super) fn is_uniform(&self) -> bool {
        self.loads.windows(2).all(|l| l[0] == l[1]) && self.has_equal_nodes()
    }

    fn has_equal_nodes(&self) -> bool {
        self.nodes.windows(2).all(|n| n[0].speed == n[1].speed)
    }

    fn layer(&self, item: usize) -> usize {
        item / self.experts
    }

    /// What each copy of an expert bears, if there are so many.
    fn share(&self, item: usize, copies: usize) -> f64 {
        (self.loads[item] / copies as f64).round()
    }

    fn holds(&self, item: usize, node: usize) -> bool {
        self.copies[item].iter().any(|c| c.node == node)
    }

    fn has_room(&self, node: usize) -> bool {
        self.held[node] < self.nodes[node].room
    }

    fn free_room(&self) -> usize {
        self.nodes.iter().zip(&self.held).map(|(node, held)| node.room.saturating_sub(*held)).sum()
    }

    /// A copy as it is to be noted: what a node held before need not be loaded.
    fn copy(&self, item: usize, node: usize, why: Why) -> Copy {
        Copy { node, why: (!self.before[item].contains(&node)).then_some(why) }
    }

    /// Sets the share of every present holder from what it is with `old` copies to what it is with `new`.
    fn reshare(&mut self, item: usize, old: usize, new: usize) {
        let by = self.share(item, new) - self.share(item, old);
        let layer = self.layer(item);
        for copy in &self.copies[item] {
            self.ledger.change(layer, copy.node, by);
        }
    }

    fn add(&mut self, item: usize, node: usize, why: Why) {
        let copies = self.copies[item].len();
        if copies > 0 {
            self.reshare(item, copies, copies + 1);
        }
        let copy = self.copy(item, node, why);
        self.spent += usize::from(copy.is_spent());
        self.held[node] += 1;
        self.ledger.add(self.layer(item), node, item, self.share(item, copies + 1));
        self.copies[item].push(copy);
    }

    /// Gives up a copy of an expert that has several: the one whose node is slowest in the layer.
    fn give_up(&mut self, item: usize) {
        let (layer, copies) = (self.layer(item), self.copies[item].len());
        let slowest = (0..copies)
            .min_by(|a, b| self.ledger.slower(layer, self.copies[item][*a].node, self.copies[item][*b].node));
        let Some(at) = slowest.filter(|_| copies > 1) else { return };
        let copy = self.copies[item].remove(at);
        self.spent -= usize::from(copy.is_spent());
        self.held[copy.node] -= 1;
        self.ledger.remove(layer, copy.node, item, self.share(item, copies));
        self.reshare(item, copies, copies - 1);
    }

    /// Gives up copies past the goal.
    pub(super) fn give_up_surplus(&mut self, goal: &Goal) {
        for item in 0..self.copies.len() {
            for _ in goal.copies[item]..self.copies[item].len() {
                self.give_up(item);
            }
        }
    }

    /// Where nodes are full of replicas while experts have no holder, gives up replicas: of those with the most copies
    /// first, the idlest first.
    ///
    /// # Errors
    /// [`PlacementError::NoRoom`] when there are not enough.
    pub(super) fn make_room(&mut self) -> Result<(), PlacementError> {
        let unheld = self.copies.iter().filter(|c| c.is_empty()).count();
        let copies_max = self.copies.iter().map(Vec::len).max().unwrap_or(0);
        for copies in (2..=copies_max).rev() {
            for at in (0..self.order.len()).rev() {
                if self.free_room() >= unheld {
                    return Ok(());
                }
                if self.copies[self.order[at]].len() == copies {
                    self.give_up(self.order[at]);
                }
            }
        }
        if self.free_room() >= unheld {
            return Ok(());
        }
        let room = self.nodes.iter().map(|n| n.room).sum();
        Err(PlacementError::NoRoom { nodes: self.nodes.len(), room, wanted: self.copies.len() })
    }

    /// Takes a table for an empty board, if every node has the room.
    pub(super) fn adopt(&mut self, placement: &Placement) -> bool {
        let index = |slot: &Slot| self.nodes.binary_search_by_key(slot, |n| n.slot).unwrap_or_default();
        let table: Vec<Vec<usize>> = placement.table().iter().map(|slots| slots.iter().map(index).collect()).collect();
        let mut held = vec![0; self.nodes.len()];
        table.iter().flatten().for_each(|node| held[*node] += 1);
        if self.nodes.iter().zip(&held).any(|(node, held)| *held > node.room) {
            return false;
        }
        for (item, holders) in table.iter().enumerate() {
            for (r, node) in holders.iter().enumerate() {
                self.add(item, *node, if r == 0 { Why::Unheld } else { Why::Replica });
            }
        }
        true
    }

    /// Gives an empty board's experts one holder each, as many on every node, where nodes are equal and have room.
    pub(super) fn pack(&mut self) {
        let most = self.copies.len();
        if !self.has_equal_nodes() || self.nodes.iter().any(|n| n.room < most) {
            return;
        }
        let nodes = self.nodes.len();
        for first in (0..most).step_by(self.experts.max(1)) {
            let packed = pack(&self.loads[first..first + self.experts], nodes);
            for (expert, to) in packed.pack.iter().enumerate() {
                // Every layer begins at another node, so that what the first packs have more goes around.
                self.add(first + expert, (to + self.layer(first)) % nodes, Why::Unheld);
            }
        }
    }

    /// Gives every expert without a holder one, the busiest first. There is room: see [`Board::make_room`].
    pub(super) fn hold_unheld(&mut self) {
        for at in 0..self.order.len() {
            let item = self.order[at];
            if self.copies[item].is_empty()
                && let Some(node) = self.best_node(item)
            {
                self.add(item, node, Why::Unheld);
            }
        }
    }

    /// The node on which one more copy is done soonest.
    fn best_node(&self, item: usize) -> Option<usize> {
        let (layer, share) = (self.layer(item), self.share(item, self.copies[item].len() + 1));
        let key = |node: usize| (self.ledger.time_with(layer, node, share), self.ledger.time_in_all(node));
        (0..self.nodes.len()).filter(|node| self.may(item, *node)).min_by(|a, b| {
            let ((a_here, a_all), (b_here, b_all)) = (key(*a), key(*b));
            a_here.total_cmp(&b_here).then(a_all.total_cmp(&b_all))
        })
    }

    /// Fills up copies and evens out the work, until there is nothing to do or nothing left to spend; says whether
    /// anything was done.
    pub(super) fn settle(&mut self, goal: &Goal) -> bool {
        for round in 0..ROUNDS_MAX {
            let filled = self.fill(goal);
            let changed = !self.deferred && level(self) || filled;
            if self.deferred || !changed {
                return changed || round > 0;
            }
        }
        self.deferred = true;
        true
    }

    /// Adds the copies that are missing: the experts with the fewest first, then the hot ones (before anything is moved
    /// for balance: a further copy of a hot expert often spares several moves).
    fn fill(&mut self, goal: &Goal) -> bool {
        let mut filled = false;
        for copies in 1..goal.floor {
            for at in 0..self.order.len() {
                let item = self.order[at];
                if self.copies[item].len() == copies {
                    filled |= self.add_copy(item, Why::Replica);
                }
            }
        }
        for item in goal.hot.iter().copied() {
            if self.copies[item].len() < goal.copies[item] {
                filled |= self.add_copy(item, Why::Hot);
            }
        }
        filled
    }

    /// Adds a copy where there is room, unless that would be one too many to load.
    fn add_copy(&mut self, item: usize, why: Why) -> bool {
        let Some(node) = self.best_node(item) else { return false };
        if self.copy(item, node, why).is_spent() && self.spent >= self.moves_max {
            self.deferred = true;
            return false;
        }
        self.add(item, node, why);
        true
    }

    /// Orders every expert's holders so that the first ones are even as well. Costs nothing.
    pub(super) fn order_holders(&mut self) {
        let mut firsts = Firsts::new(self);
        for _ in 0..ROUNDS_MAX {
            if !level(&mut firsts) {
                return;
            }
        }
    }

    /// The placement, and what it takes.
    pub(super) fn finish(self, moe_layers: &[LayerId]) -> Result<Placed, PlacementError> {
        let mut moves = Vec::new();
        for (item, copies) in self.copies.iter().enumerate() {
            let (layer, expert) = (moe_layers[self.layer(item)], ExpertId((item % self.experts) as u16));
            for copy in copies {
                moves.extend(copy.why.map(|why| Move { layer, expert, to: self.nodes[copy.node].slot, why }));
            }
        }
        moves.sort_by_key(|m| m.why); // stable: by layer, then expert
        let is_gone = |item: usize, node: &&usize| !self.holds(item, **node);
        let gone = |(item, before): (usize, &Vec<usize>)| before.iter().filter(|node| is_gone(item, node)).count();
        let dropped = self.before.iter().enumerate().map(gone).sum();
        let slots = |copies: &Vec<Copy>| copies.iter().map(|c| self.nodes[c.node].slot).collect();
        let placement = Placement::new(moe_layers.to_vec(), self.experts, self.copies.iter().map(slots).collect())?;
        Ok(Placed { placement, moves, dropped, deferred: self.deferred })
    }
}

/// Copies, which cost their loading.
impl Ground for Board {
    fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    fn work(&self, item: usize) -> f64 {
        self.share(item, self.copies[item].len())
    }

    fn may(&self, item: usize, to: usize) -> bool {
        self.has_room(to) && !self.holds(item, to)
    }

    fn is_free(&self, item: usize, to: usize) -> bool {
        self.before[item].contains(&to)
    }

    fn shift(&mut self, shift: Shift) {
        let Shift { layer, item, from, to } = shift;
        let Some(at) = self.copies[item].iter().position(|c| c.node == from) else { return };
        let old = self.copies[item][at];
        // A copy that was not there yet is only loaded elsewhere, and for the same reason.
        let new = self.copy(item, to, old.why.unwrap_or(Why::Balance));
        self.copies[item][at] = new;
        self.spent = self.spent + usize::from(new.is_spent()) - usize::from(old.is_spent());
        self.held[from] -= 1;
        self.held[to] += 1;
        let work = self.work(item);
        self.ledger.remove(layer, from, item, work);
        self.ledger.add(layer, to, item, work);
    }

    fn is_affordable(&self) -> bool {
        self.spent <= self.moves_max
    }

    fn defer(&mut self) {
        self.deferred = true;
    }

    fn is_deferred(&self) -> bool {
        self.deferred
    }
}

/// First choices, which go from one holder to another for nothing.
struct Firsts<'a> {
    board: &'a mut Board,
    ledger: Ledger,
}

impl<'a> Firsts<'a> {
    /// As if all of an expert's rows went to its first holder.
    fn new(board: &'a mut Board) -> Self {
        let layers = board.loads.len().checked_div(board.experts).unwrap_or(0);
        let mut ledger = Ledger::new(board.nodes.iter().map(|n| n.speed).collect(), layers);
        for (item, copies) in board.copies.iter().enumerate() {
            if let Some(first) = copies.first() {
                ledger.add(board.layer(item), first.node, item, board.share(item, 1));
            }
        }
        Self { board, ledger }
    }
}

impl Ground for Firsts<'_> {
    fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    fn work(&self, item: usize) -> f64 {
        self.board.share(item, 1)
    }

    fn may(&self, item: usize, to: usize) -> bool {
        self.board.holds(item, to)
    }

    fn is_free(&self, _: usize, _: usize) -> bool {
        true
    }

    /// The two change places, so that a shift back leaves no trace.
    fn shift(&mut self, shift: Shift) {
        let Shift { layer, item, from, to } = shift;
        let Some(at) = self.board.copies[item].iter().position(|c| c.node == to) else { return };
        self.board.copies[item].swap(0, at);
        let work = self.work(item);
        self.ledger.remove(layer, from, item, work);
        self.ledger.add(layer, to, item, work);
    }

    fn is_affordable(&self) -> bool {
        true
    }

    fn defer(&mut self) {}

    fn is_deferred(&self) -> bool {
        false
    }
}
