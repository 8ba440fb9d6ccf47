//! What a placement must be, and what a change of nodes or load may cost.

use std::time::{Duration, Instant};

use super::*;
use proptest::prelude::*;

/// A mesh that is asked for one placement after the other.
#[derive(Clone, Debug)]
struct Mesh {
    layers: Vec<LayerId>,
    experts: usize,
    nodes: Vec<NodeRoom>,
    replicas: usize,
    loads: Vec<f64>,
    hot_replicas: usize,
    moves_max: usize,
    now: Option<Placement>,
}

impl Mesh {
    fn new(layers: u16, experts: usize, nodes: u16, replicas: usize) -> Self {
        Self {
            layers: (0..layers).map(LayerId).collect(),
            experts,
            nodes: (0..nodes).map(node).collect(),
            replicas,
            loads: vec![],
            hot_replicas: 0,
            moves_max: usize::MAX,
            now: None,
        }
    }

    fn try_place(&self) -> Result<Placed, PlacementError> {
        place(&Wanted {
            moe_layers: &self.layers,
            experts: self.experts,
            nodes: &self.nodes,
            replicas: self.replicas,
            loads: &self.loads,
            hot_replicas: self.hot_replicas,
            moves_max: self.moves_max,
            before: self.now.as_ref(),
        })
    }

    /// One change.
    fn step(&mut self) -> Placed {
        let placed = self.try_place().unwrap();
        self.now = Some(placed.placement.clone());
        placed
    }

    /// Changes until nothing is left to do, and all their moves.
    fn settle(&mut self) -> Vec<Move> {
        let mut moves = vec![];
        for _ in 0..10_000 {
            let placed = self.step();
            moves.extend(placed.moves);
            if !placed.deferred {
                return moves;
            }
        }
        panic!("never done");
    }

    fn lose(&mut self, slot: u16) {
        self.nodes.retain(|n| n.slot != Slot(slot));
    }

    fn now(&self) -> &Placement {
        self.now.as_ref().unwrap()
    }

    fn held(&self, slot: u16) -> usize {
        self.now().held_by(Slot(slot)).count()
    }

    fn load(&self, item: usize) -> f64 {
        self.loads.get(item).copied().unwrap_or(1.0)
    }

    /// What a node has to do in a layer.
    fn work(&self, layer: usize, slot: Slot) -> f64 {
        let items = layer * self.experts..(layer + 1) * self.experts;
        let share = |i: usize| self.load(i) / self.now().table()[i].len() as f64;
        items.filter(|i| self.now().table()[*i].contains(&slot)).map(share).sum()
    }

    /// A node's share of all work, 1.0 being as much as everybody's.
    fn share(&self, slot: u16) -> f64 {
        let all = (0..self.layers.len() * self.experts).map(|i| self.load(i)).sum::<f64>();
        let work: f64 = (0..self.layers.len()).map(|l| self.work(l, Slot(slot))).sum();
        work / all * self.nodes.len() as f64
    }

    /// The slowest node's time in a layer, 1.0 being everybody's if it were spread perfectly.
    fn slowest(&self, layer: usize) -> f64 {
        let time = |n: &NodeRoom| self.work(layer, n.slot) / n.speed;
        let all: f64 = (0..self.experts).map(|e| self.load(layer * self.experts + e)).sum();
        let speed: f64 = self.nodes.iter().map(|n| n.speed).sum();
        self.nodes.iter().map(time).fold(0.0, f64::max) / (all / speed)
    }
}

fn node(slot: u16) -> NodeRoom {
    NodeRoom { slot: Slot(slot), experts_max: None, speed: 1.0 }
}

fn room(slot: u16, experts_max: usize) -> NodeRoom {
    NodeRoom { experts_max: Some(experts_max), ..node(slot) }
}

fn count(moves: &[Move], why: Why) -> usize {
    moves.iter().filter(|m| m.why == why).count()
}

/// Loads as of a gate: a few experts of each layer are wanted much more than the rest.
fn skewed(layers: usize, experts: usize) -> Vec<f64> {
    (0..layers * experts).map(|i| 1000.0 / (1 + (i * 7 + i / experts * 3) % experts) as f64).collect()
}

#[test]
fn a_uniform_mesh_begins_with_the_balanced_placement() {
    for (layers, experts, nodes, replicas) in [(2, 8, 4, 1), (3, 8, 3, 2), (5, 6, 4, 2), (4, 2, 5, 1), (1, 1, 1, 3)] {
        let mut mesh = Mesh::new(layers, experts, nodes, replicas);
        mesh.moves_max = 0;
        let slots: Vec<Slot> = mesh.nodes.iter().map(|n| n.slot).collect();
        let balanced = Placement::balanced(mesh.layers.clone(), experts, &slots, replicas.min(slots.len())).unwrap();
        mesh.nodes.reverse();
        let placed = mesh.step();
        assert_eq!(placed.placement, balanced);
        assert_eq!(placed.moves.len(), balanced.table().iter().map(Vec::len).sum::<usize>());
        assert_eq!(count(&placed.moves, Why::Unheld), layers as usize * experts);
    }
}

#[test]
fn nothing_moves_while_nothing_changes() {
    for replicas in 1..=3 {
        let mut mesh = Mesh::new(4, 16, 5, replicas);
        mesh.settle();
        let before = mesh.now().clone();
        let placed = mesh.step();
        assert_eq!((placed.placement, placed.moves, placed.dropped, placed.deferred), (before, vec![], 0, false));
    }
}

#[test]
fn a_placement_of_another_model_or_of_other_nodes_is_as_good_as_none() {
    let fresh = Mesh::new(2, 8, 2, 1).step();
    let mut mesh = Mesh::new(2, 8, 2, 1);
    mesh.now = Some(Mesh::new(2, 4, 2, 1).step().placement);
    assert_eq!(mesh.step(), fresh);
    mesh.now = Some(Placement::new(mesh.layers.clone(), 8, vec![vec![Slot(7)]; 16]).unwrap());
    assert_eq!(mesh.step(), fresh);
}

#[test]
fn what_a_lost_node_held_is_shared_among_the_rest_and_nothing_else_moves() {
    let mut mesh = Mesh::new(4, 12, 4, 1);
    mesh.step();
    mesh.moves_max = 0;
    mesh.lose(2);
    let placed = mesh.step();
    assert_eq!((placed.moves.len(), count(&placed.moves, Why::Unheld), placed.dropped), (12, 12, 0));
    assert_eq!([0, 1, 3].map(|slot| mesh.held(slot)), [16, 16, 16]);
}

#[test]
fn with_two_replicas_a_loss_leaves_every_expert_held_and_is_made_up_for_bit_by_bit() {
    let mut mesh = Mesh::new(2, 16, 4, 2);
    mesh.step();
    mesh.moves_max = 5;
    mesh.lose(1);
    let placed = mesh.step();
    assert_eq!((placed.moves.len(), count(&placed.moves, Why::Replica), placed.deferred), (5, 5, true));
    let rest = mesh.settle();
    assert_eq!((count(&rest, Why::Unheld), count(&rest, Why::Replica)), (0, 11));
    assert!(mesh.now().table().iter().all(|holders| holders.len() == 2));
}

#[test]
fn a_node_that_joins_gets_its_share_with_no_more_moves_than_that() {
    for (experts, nodes) in [(128, 16), (8, 4), (4, 4), (8, 16)] {
        let mut mesh = Mesh::new(20, experts, nodes, 1);
        mesh.step();
        mesh.nodes.push(node(nodes));
        let moves = mesh.settle();
        assert!((0.85..=1.05).contains(&mesh.share(nodes)), "{experts} on {nodes}: {}", mesh.share(nodes));
        assert_eq!((count(&moves, Why::Balance), moves.len()), (mesh.held(nodes), mesh.held(nodes)));
        for layer in 0..20 {
            let shares = experts as f64 / (nodes + 1) as f64;
            assert!(mesh.slowest(layer) * shares <= (experts.div_ceil(nodes.into())) as f64, "no layer is slower");
        }
    }
}

#[test]
fn the_bound_on_moves_holds_and_later_changes_finish_the_work() {
    let mut mesh = Mesh::new(6, 32, 4, 1);
    mesh.step();
    mesh.nodes.push(node(4));
    mesh.moves_max = 7;
    let mut changes = 0;
    loop {
        let placed = mesh.step();
        assert!(placed.moves.len() <= 7);
        changes += 1;
        if !placed.deferred {
            break;
        }
    }
    assert!((5..=7).contains(&changes), "{changes}");
    assert!(mesh.share(4) > 0.85);
}

#[test]
fn a_slow_node_holds_little_from_the_start_and_gives_away_when_it_becomes_slow() {
    let mut slow = Mesh::new(8, 32, 4, 1);
    slow.nodes[1].speed = 0.1;
    slow.step();
    assert!(slow.share(1) < 0.25, "{}", slow.share(1));

    let mut slowed = Mesh::new(8, 32, 4, 1);
    slowed.step();
    slowed.nodes[1].speed = 0.1;
    slowed.settle();
    assert!(slowed.share(1) < 0.25, "{}", slowed.share(1));
}

#[test]
fn speeds_that_are_none_stop_nobody() {
    let mut mesh = Mesh::new(2, 8, 4, 1);
    for (node, speed) in mesh.nodes.iter_mut().zip([f64::NAN, f64::INFINITY, 0.0, -1.0]) {
        node.speed = speed;
    }
    mesh.step();
    assert_eq!([mesh.held(0), mesh.held(1)], [0, 16]);
}

#[test]
fn busy_experts_are_spread_over_the_nodes() {
    let mut mesh = Mesh::new(4, 32, 4, 1);
    mesh.loads = skewed(4, 32);
    mesh.step();
    assert!((0..4).all(|l| mesh.slowest(l) < 1.1), "fresh");
    // The same from a placement that knew nothing of the load.
    let mut later = Mesh::new(4, 32, 4, 1);
    later.step();
    later.loads = skewed(4, 32);
    let uneven: f64 = (0..4).map(|l| later.slowest(l)).sum();
    let moves = later.settle();
    let even: f64 = (0..4).map(|l| later.slowest(l)).sum();
    assert!(even < 4.4 && even < uneven, "{uneven} -> {even} with {}", moves.len());
    assert!(moves.len() < 4 * 8, "far from all: {}", moves.len());
}

#[test]
fn a_load_that_wanders_a_little_moves_nothing() {
    let mut mesh = Mesh::new(4, 32, 4, 1);
    mesh.loads = skewed(4, 32);
    mesh.settle();
    for (i, load) in mesh.loads.iter_mut().enumerate() {
        *load *= if i % 2 == 0 { 1.01 } else { 0.99 };
    }
    assert_eq!(mesh.settle(), []);
}

#[test]
fn loads_that_are_no_numbers_count_as_none_and_a_wrong_number_of_them_is_refused() {
    let mut mesh = Mesh::new(1, 4, 2, 1);
    mesh.loads = vec![f64::NAN, -5.0, f64::INFINITY, 0.0];
    let balanced = Placement::balanced(mesh.layers.clone(), 4, &[Slot(0), Slot(1)], 1).unwrap();
    assert_eq!(mesh.step().placement, balanced);
    mesh.loads.pop();
    assert_eq!(mesh.try_place(), Err(PlacementError::WrongLoads { found: 3, wanted: 4 }));
}

#[test]
fn idle_experts_are_neither_heaped_on_one_node_nor_moved_about() {
    let mut mesh = Mesh::new(1, 64, 4, 1);
    mesh.now = Some(Mesh::new(1, 64, 4, 1).step().placement);
    mesh.loads = (0..64).map(|e| if e % 16 == 0 { 1.0 } else { 0.0 }).collect();
    mesh.lose(3);
    let moves = mesh.settle();
    assert!((0..3).all(|slot| mesh.held(slot) <= 24), "{:?}", [0, 1, 2].map(|slot| mesh.held(slot)));
    assert_eq!(count(&moves, Why::Unheld), moves.len(), "nor moved about");
}

#[test]
fn hot_experts_get_the_further_copies_and_give_them_up_when_they_have_cooled() {
    let mut mesh = Mesh::new(2, 8, 4, 1);
    mesh.step();
    mesh.hot_replicas = 3;
    mesh.loads = vec![1.0; 16];
    mesh.loads[3] = 20.0;
    mesh.loads[12] = 6.0;
    let moves = mesh.settle();
    assert_eq!(count(&moves, Why::Hot), 3);
    let copies: Vec<usize> = mesh.now().table().iter().map(Vec::len).collect();
    assert_eq!((copies[3], copies[12], copies.iter().sum::<usize>()), (4, 1, 19), "by load for each copy");

    mesh.loads[12] = 7.0;
    assert_eq!(mesh.settle(), [], "a copy that is there is kept while the other is little hotter");
    mesh.loads[12] = 40.0;
    mesh.moves_max = 1;
    let placed = mesh.step();
    assert_eq!((placed.moves.len(), placed.moves[0].why, placed.dropped), (1, Why::Hot, 2));
    mesh.settle();
    mesh.loads.clear();
    let placed = mesh.step();
    assert!(placed.dropped >= 3, "given up at once, without a load");
    assert!(mesh.now().table().iter().all(|holders| holders.len() == 1));
}

#[test]
fn without_a_hot_expert_no_further_copies_are_made() {
    let mut mesh = Mesh::new(2, 8, 4, 1);
    mesh.hot_replicas = 100;
    mesh.step();
    assert!(mesh.now().table().iter().all(|holders| holders.len() == 1));
}

#[test]
fn a_node_is_never_given_more_than_it_has_room_for() {
    let mut mesh = Mesh::new(2, 16, 0, 2);
    mesh.nodes = vec![room(0, 4), room(1, 30), node(2)];
    mesh.step();
    assert_eq!(mesh.held(0), 4);
    assert!(mesh.held(1) <= 30);
    assert!(mesh.now().table().iter().all(|holders| holders.len() == 2));

    mesh.nodes = vec![room(0, 4), room(1, 27)];
    assert_eq!(mesh.step().moves, [], "what a node holds already has its room");
    mesh.now = None;
    let refused = PlacementError::NoRoom { nodes: 2, room: 31, wanted: 32 };
    assert_eq!(mesh.try_place(), Err(refused));
}

#[test]
fn replicas_make_room_for_experts_that_nobody_holds() {
    // Four nodes full of two replicas of everything; the two that remain can just hold everything once.
    let mut mesh = Mesh::new(1, 8, 0, 2);
    mesh.nodes = (0..4).map(|slot| room(slot, 4)).collect();
    mesh.step();
    assert!((0..4).all(|slot| mesh.held(slot) == 4));
    mesh.lose(0);
    mesh.lose(1);
    let placed = mesh.step();
    assert_eq!(placed.moves.len(), placed.dropped);
    assert!(placed.moves.iter().all(|m| m.why == Why::Unheld));
    assert!(mesh.now().table().iter().all(|holders| holders.len() == 1));
}

#[test]
fn first_choices_are_as_even_as_the_experts() {
    let mut mesh = Mesh::new(8, 16, 4, 2);
    mesh.step();
    mesh.lose(1);
    mesh.nodes.push(node(9));
    mesh.settle();
    let firsts = |slot: u16| mesh.now().table().iter().filter(|holders| holders[0] == Slot(slot)).count();
    let firsts = [0, 2, 3, 9].map(firsts);
    assert!(firsts.iter().all(|n| (28..=36).contains(n)), "{firsts:?}");
}

#[test]
fn nobody_to_place_on_is_an_error_and_nothing_to_place_is_not() {
    assert_eq!(Mesh::new(2, 8, 0, 1).try_place(), Err(PlacementError::NoNodes { experts: 8 }));
    let mut nothing = Mesh::new(2, 0, 2, 1);
    nothing.nodes[0].speed = 2.0;
    assert!(nothing.step().moves.is_empty());
    assert!(Mesh::new(0, 8, 2, 1).step().moves.is_empty());
}

#[test]
fn a_large_mesh_is_placed_in_no_time() {
    // 6 to 33 ms each where this was written; the bound is for machines that do other things as well.
    const TIME_MAX: Duration = Duration::from_secs(2);
    let mut mesh = Mesh::new(94, 128, 16, 2);
    mesh.hot_replicas = 256;
    let place = |what: &str, mesh: &mut Mesh| {
        let started = Instant::now();
        let placed = mesh.step();
        println!("{what}: {:?}, {} moves, deferred {}", started.elapsed(), placed.moves.len(), placed.deferred);
        assert!(started.elapsed() < TIME_MAX, "{what}");
    };
    place("fresh", &mut mesh);
    mesh.loads = skewed(94, 128);
    place("load", &mut mesh);
    place("same", &mut mesh);
    mesh.lose(5);
    place("loss", &mut mesh);
    mesh.nodes.push(node(16));
    place("join", &mut mesh);
    mesh.now = None;
    place("fresh with load", &mut mesh);
}

fn any_loads(size: usize) -> impl Strategy<Value = Vec<f64>> {
    let any_load = prop_oneof![3 => 0.0..10.0f64, 1 => Just(0.0), 1 => 10.0..200.0f64];
    prop_oneof![Just(vec![]), prop::collection::vec(any_load, size)]
}

/// What happens to a mesh between two placements.
#[derive(Clone, Debug)]
enum Event {
    Lose(prop::sample::Index),
    Join(f64),
    Load(Vec<f64>),
    Slow(prop::sample::Index, f64),
}

fn any_event(size: usize) -> impl Strategy<Value = Event> {
    prop_oneof![
        any::<prop::sample::Index>().prop_map(Event::Lose),
        (0.1..3.0f64).prop_map(Event::Join),
        any_loads(size).prop_map(Event::Load),
        (any::<prop::sample::Index>(), 0.1..3.0f64).prop_map(|(at, speed)| Event::Slow(at, speed)),
    ]
}

fn any_life() -> impl Strategy<Value = (Mesh, Vec<Event>)> {
    ((1..4u16, 1..24usize, 1..7u16, 1..4usize), 0..8usize, 1..20usize, any::<bool>()).prop_flat_map(
        |((layers, experts, nodes, replicas), hot_replicas, moves_max, is_bounded)| {
            let size = usize::from(layers) * experts;
            let rooms = prop::collection::vec(0..2 * size + 4, usize::from(nodes));
            let mesh = (any_loads(size), rooms).prop_map(move |(loads, rooms)| {
                let mut mesh = Mesh { loads, hot_replicas, moves_max, ..Mesh::new(layers, experts, nodes, replicas) };
                for (node, room) in mesh.nodes.iter_mut().zip(rooms) {
                    node.experts_max = is_bounded.then_some(room);
                }
                mesh
            });
            (mesh, prop::collection::vec(any_event(size), 0..6))
        },
    )
}

impl Mesh {
    fn happen(&mut self, event: Event, slot_new: u16) {
        match event {
            Event::Lose(at) if self.nodes.len() > 1 => drop(self.nodes.remove(at.index(self.nodes.len()))),
            Event::Lose(_) => {}
            Event::Join(speed) => self.nodes.push(NodeRoom { speed, ..node(slot_new) }),
            Event::Load(loads) => self.loads = loads,
            Event::Slow(at, speed) => {
                let at = at.index(self.nodes.len());
                self.nodes[at].speed = speed;
            }
        }
    }

    /// Takes one step and checks all that must hold of any.
    fn checked_step(&mut self) -> Placed {
        let is_there = |slot: &Slot| self.nodes.iter().any(|n| n.slot == *slot);
        let before: Option<Vec<Vec<Slot>>> = self
            .now
            .as_ref()
            .map(|now| now.table().iter().map(|holders| holders.iter().copied().filter(is_there).collect()).collect());
        let before = before.filter(|table| table.iter().any(|holders| !holders.is_empty()));
        let was_fresh = before.is_none();
        let before = before.unwrap_or_else(|| vec![vec![]; self.layers.len() * self.experts]);
        let placed = self.step();
        let after = placed.placement.table();
        assert!(after.iter().flatten().all(|slot| self.nodes.iter().any(|n| n.slot == *slot)), "nodes that are there");
        for n in &self.nodes {
            assert!(self.held(n.slot.0) <= n.experts_max.unwrap_or(usize::MAX), "room");
        }
        let unheld = before.iter().filter(|holders| holders.is_empty()).count();
        assert_eq!(count(&placed.moves, Why::Unheld), unheld, "one for each expert that nobody holds");
        assert!(was_fresh || placed.moves.len() - unheld <= self.moves_max, "bound");
        let mut loaded: Vec<(LayerId, ExpertId, Slot)> =
            placed.moves.iter().map(|m| (m.layer, m.expert, m.to)).collect();
        let mut new = vec![];
        let mut dropped = 0;
        for (i, (before, after)) in before.iter().zip(after).enumerate() {
            let (layer, expert) = (self.layers[i / self.experts], ExpertId((i % self.experts) as u16));
            new.extend(after.iter().filter(|s| !before.contains(s)).map(|s| (layer, expert, *s)));
            let gone = before.iter().filter(|s| !after.contains(s)).count();
            let balanced = placed.moves.iter().filter(|m| (m.layer, m.expert, m.why) == (layer, expert, Why::Balance));
            let surplus = before.len().saturating_sub(self.replicas.min(self.nodes.len()));
            if self.nodes.iter().all(|n| n.experts_max.is_none()) {
                assert!(gone <= balanced.count() + surplus, "kept unless moved or not wanted");
                assert!(!placed.deferred || after.len() >= before.len() - surplus);
            }
            dropped += gone;
        }
        loaded.sort_unstable();
        new.sort_unstable();
        assert_eq!(loaded, new, "what is loaded is what was not there");
        assert_eq!(placed.dropped, dropped);
        assert!(placed.moves.windows(2).all(|m| m[0].why <= m[1].why), "the urgent first");
        placed
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_happens_every_step_is_sound_and_the_last_one_final((mut mesh, events) in any_life()) {
        for (i, event) in [None].into_iter().chain(events.into_iter().map(Some)).enumerate() {
            if let Some(event) = event {
                mesh.happen(event, 100 + i as u16);
            }
            if matches!(mesh.try_place(), Err(PlacementError::NoRoom { .. })) {
                return Ok(());
            }
            // Everything may be moved, each copy a few times, as layers and totals make way for one another.
            let copies = mesh.layers.len() * mesh.experts * (mesh.replicas + 1) + mesh.hot_replicas;
            let steps_max = 2 + 3 * copies / mesh.moves_max;
            let steps = (0..steps_max).find(|_| !mesh.checked_step().deferred);
            prop_assert!(steps.is_some(), "not done after {} changes", steps_max);
            let settled = mesh.now().clone();
            let again = mesh.checked_step();
            prop_assert_eq!(&again.moves, &[], "nothing further");
            prop_assert_eq!((again.placement, again.dropped, again.deferred), (settled, 0, false));
            if mesh.nodes.iter().all(|n| n.experts_max.is_none()) {
                let floor = mesh.replicas.min(mesh.nodes.len());
                prop_assert!(mesh.now().table().iter().all(|holders| holders.len() >= floor));
            }
        }
    }

    #[test]
    fn one_loss_of_two_replicas_leaves_nothing_unheld(
        layers in 1..4u16, experts in 1..40usize, nodes in 2..9u16, lost in any::<prop::sample::Index>()
    ) {
        let mut mesh = Mesh::new(layers, experts, nodes, 2);
        mesh.settle();
        mesh.lose(lost.index(nodes.into()) as u16);
        prop_assert_eq!(count(&mesh.settle(), Why::Unheld), 0);
    }

    #[test]
    fn a_slow_node_ends_with_far_less_than_its_share(
        layers in 2..6u16, share in 2..6usize, nodes in 3..9u16, replicas in 1..3usize, is_fresh in any::<bool>()
    ) {
        let mut mesh = Mesh::new(layers, share * usize::from(nodes), nodes, replicas);
        if !is_fresh {
            mesh.settle();
        }
        mesh.nodes[1].speed = 0.1;
        mesh.settle();
        prop_assert!(mesh.share(1) < 0.4, "{}", mesh.share(1));
    }

    #[test]
    fn a_node_that_joins_ends_near_its_share(
        (nodes, experts, loads) in (2..9u16, 2..6usize).prop_flat_map(|(nodes, share)| {
            let experts = share * usize::from(nodes);
            (Just(nodes), Just(experts), prop::collection::vec(0.5..4.0f64, 6 * experts))
        }),
        replicas in 1..3usize,
        moves_max in 3..200usize,
    ) {
        let mut mesh = Mesh { loads, moves_max, ..Mesh::new(6, experts, nodes, replicas) };
        mesh.settle();
        mesh.nodes.push(node(nodes));
        mesh.settle();
        // Two experts of a layer for each node, one of them heavy, cannot be cut finer.
        prop_assert!((0.6..1.4).contains(&mesh.share(nodes)), "{}", mesh.share(nodes));
    }
}
