//! Which expert slots hold which expert of which layer.

use crate::ids::{ExpertId, LayerId, Slot};

/// Why a placement cannot be made or does not fit its model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// Nobody to hold the experts.
    #[error("no expert node to place {experts} experts on")]
    NoNodes {
        /// Experts per layer that want a home.
        experts: usize,
    },
    /// More replicas asked for than nodes exist, and replicas never share a node.
    #[error("{replicas} replicas of each expert need as many expert nodes, and there are {nodes}")]
    TooFewNodes {
        /// Replicas asked for.
        replicas: usize,
        /// Nodes there are.
        nodes: usize,
    },
    /// Less room than there are experts, before any replica.
    #[error(
        "{nodes} expert nodes have room for {room} experts and {wanted} need a home: add nodes or give them more room"
    )]
    NoRoom {
        /// Nodes there are.
        nodes: usize,
        /// Experts that they hold at most, together.
        room: usize,
        /// Experts of all layers.
        wanted: usize,
    },
    /// Loads of another table.
    #[error("{found} loads for {wanted} experts: give one for each expert of each layer, or none")]
    WrongLoads {
        /// Loads found.
        found: usize,
        /// Experts of all layers.
        wanted: usize,
    },
    /// The table does not have one entry per (layer, expert).
    #[error("placement has {found} entries, {layers} layers x {experts} experts need {}", layers * experts)]
    WrongSize {
        /// Entries found.
        found: usize,
        /// MoE layers.
        layers: usize,
        /// Experts per layer.
        experts: usize,
    },
    /// An expert that nobody holds.
    #[error("{expert} of {layer} is held by nobody")]
    Unheld {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
    },
    /// Two replicas on one node.
    #[error("{expert} of {layer} is placed twice on {slot}")]
    Repeated {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The node's slot.
        slot: Slot,
    },
}

/// For every MoE layer and expert, the slots of the nodes that hold it (at least one, no slot twice, first choice first).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    moe_layers: Vec<LayerId>,
    experts: usize,
    holders: Vec<Vec<Slot>>,
}

impl Placement {
    /// A placement from its table, `holders[i * experts + e]` being the slots of expert `e` of `moe_layers[i]`.
    ///
    /// # Errors
    /// [`PlacementError`] when an entry is missing, empty or names a slot twice.
    pub fn new(moe_layers: Vec<LayerId>, experts: usize, holders: Vec<Vec<Slot>>) -> Result<Self, PlacementError> {
        if holders.len() != moe_layers.len() * experts {
            return Err(PlacementError::WrongSize { found: holders.len(), layers: moe_layers.len(), experts });
        }
        for (i, slots) in holders.iter().enumerate() {
            let (layer, expert) = (moe_layers[i / experts], ExpertId((i % experts) as u16));
            if slots.is_empty() {
                return Err(PlacementError::Unheld { layer, expert });
            }
            for (j, slot) in slots.iter().enumerate() {
                if slots[..j].contains(slot) {
                    return Err(PlacementError::Repeated { layer, expert, slot: *slot });
                }
            }
        }
        Ok(Self { moe_layers, experts, holders })
    }

    /// Experts spread evenly: on each layer the counts of any two nodes differ by at most one, and over all layers too.
    ///
    /// Each node gets a run of neighbouring experts. Where the experts of a layer do not divide by the nodes (or the
    /// nodes outnumber them), each layer starts at the node where the one before it ended, so that the surplus goes
    /// around. Replica `r` of an expert goes to the `r`-th next node.
    ///
    /// # Errors
    /// [`PlacementError::NoNodes`] and [`PlacementError::TooFewNodes`].
    pub fn balanced(
        moe_layers: Vec<LayerId>,
        experts: usize,
        slots: &[Slot],
        replicas: usize,
    ) -> Result<Self, PlacementError> {
        let nodes = slots.len();
        if nodes == 0 {
            return Err(PlacementError::NoNodes { experts });
        }
        if replicas > nodes {
            return Err(PlacementError::TooFewNodes { replicas, nodes });
        }
        let mut holders = Vec::with_capacity(moe_layers.len() * experts);
        for i in 0..moe_layers.len() {
            // The first `surplus` nodes after `start` hold one expert more than the rest.
            let (share, surplus) = (experts / nodes, experts % nodes);
            let start = (i * surplus) % nodes;
            for n in 0..nodes {
                let count = share + usize::from(n < surplus);
                for _ in 0..count {
                    holders.push((0..replicas.max(1)).map(|r| slots[(start + n + r) % nodes]).collect());
                }
            }
        }
        Self::new(moe_layers, experts, holders)
    }

    /// The layers that have routed experts, ascending.
    pub fn moe_layers(&self) -> &[LayerId] {
        &self.moe_layers
    }

    /// Routed experts in each MoE layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Whether the layer has routed experts.
    pub fn is_moe(&self, layer: LayerId) -> bool {
        self.moe_layers.binary_search(&layer).is_ok()
    }

    /// The slots that hold an expert, first choice first; `None` for a layer or an expert that does not exist.
    pub fn holders(&self, layer: LayerId, expert: ExpertId) -> Option<&[Slot]> {
        let i = self.moe_layers.binary_search(&layer).ok()?;
        if expert.index() >= self.experts {
            return None;
        }
        self.holders.get(i * self.experts + expert.index()).map(Vec::as_slice)
    }

    /// Whether the slot holds the expert.
    pub fn holds(&self, slot: Slot, layer: LayerId, expert: ExpertId) -> bool {
        self.holders(layer, expert).is_some_and(|slots| slots.contains(&slot))
    }

    /// All experts that a slot holds, by layer, then expert.
    pub fn held_by(&self, slot: Slot) -> impl Iterator<Item = (LayerId, ExpertId)> + '_ {
        self.holders
            .iter()
            .enumerate()
            .filter(move |(_, slots)| slots.contains(&slot))
            .map(|(i, _)| (self.moe_layers[i / self.experts], ExpertId((i % self.experts) as u16)))
    }

    /// The table: `[moe layer][expert]` flattened, as [`Placement::new`] takes it.
    pub fn table(&self) -> &[Vec<Slot>] {
        &self.holders
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(n: u16) -> Vec<LayerId> {
        (0..n).map(LayerId).collect()
    }

    fn slots(n: u16) -> Vec<Slot> {
        (0..n).map(Slot).collect()
    }

    #[test]
    fn eight_experts_on_four_nodes_are_two_neighbours_each() {
        let p = Placement::balanced(layers(2), 8, &slots(4), 1).unwrap();
        for e in 0..8 {
            assert_eq!(p.holders(LayerId(0), ExpertId(e)).unwrap(), [Slot(e / 2)]);
        }
    }

    #[test]
    fn counts_differ_by_at_most_one_on_a_layer_and_in_all() {
        for nodes in 1..=16 {
            for experts in [1usize, 2, 3, 8, 12, 64] {
                let p = Placement::balanced(layers(5), experts, &slots(nodes), 1).unwrap();
                let total: Vec<usize> = slots(nodes).iter().map(|s| p.held_by(*s).count()).collect();
                assert!(total.iter().max().unwrap() - total.iter().min().unwrap() <= 1, "{nodes} {experts} {total:?}");
                for l in 0..5 {
                    let on = |s: &Slot| p.held_by(*s).filter(|(layer, _)| *layer == LayerId(l)).count();
                    let counts: Vec<usize> = slots(nodes).iter().map(on).collect();
                    assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
                }
            }
        }
    }

    #[test]
    fn replicas_never_share_a_node() {
        let p = Placement::balanced(layers(3), 8, &slots(3), 2).unwrap();
        assert!(p.table().iter().all(|s| s.len() == 2 && s[0] != s[1]));
        assert_eq!(
            Placement::balanced(layers(3), 8, &slots(3), 4),
            Err(PlacementError::TooFewNodes { replicas: 4, nodes: 3 })
        );
    }

    #[test]
    fn a_table_with_holes_is_refused() {
        let (layer, expert) = (LayerId(0), ExpertId(1));
        let holed = vec![vec![Slot(0)], vec![]];
        assert_eq!(Placement::new(layers(1), 2, holed), Err(PlacementError::Unheld { layer, expert }));
        let twice = vec![vec![Slot(0)], vec![Slot(1), Slot(1)]];
        let slot = Slot(1);
        assert_eq!(Placement::new(layers(1), 2, twice), Err(PlacementError::Repeated { layer, expert, slot }));
        assert!(matches!(Placement::new(layers(2), 2, vec![]), Err(PlacementError::WrongSize { .. })));
    }

    #[test]
    fn layers_and_experts_that_do_not_exist_have_no_holders() {
        let p = Placement::balanced(vec![LayerId(1)], 4, &slots(2), 1).unwrap();
        assert!(p.holders(LayerId(0), ExpertId(0)).is_none());
        assert!(p.holders(LayerId(1), ExpertId(4)).is_none());
        assert!(!p.is_moe(LayerId(0)) && p.is_moe(LayerId(1)));
    }
}
