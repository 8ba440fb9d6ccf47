//! What changes of the view have had expert nodes load, beside the bound on it. No IO, no clock.

use mesh_core::balance::{Move, Why};
use mesh_proto::v1;

/// Counted since the router's start, changes that were abandoned included: their loading was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Views that were prepared after the first.
    changes: u64,
    /// Bytes of experts that they had nodes load.
    bytes: u64,
    /// Most of one change, beside experts that nobody held: those have to be loaded, however many they are.
    bounded_max: u64,
}

impl Moved {
    /// A change of a view in force is prepared.
    pub fn count(&mut self, moves: &[Move], expert_bytes: u64) {
        let bytes = |moves: usize| expert_bytes.saturating_mul(moves as u64);
        let bounded = moves.iter().filter(|m| m.why != Why::Unheld).count();
        self.changes += 1;
        self.bytes = self.bytes.saturating_add(bytes(moves.len()));
        self.bounded_max = self.bounded_max.max(bytes(bounded));
    }

    /// For clients, with the bound.
    pub fn to_wire(self, bound: u64) -> v1::Moved {
        let Self { changes, bytes, bounded_max } = self;
        v1::Moved { changes, bytes, change_bytes_max: bounded_max, change_bytes_bound: bound }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::{ExpertId, LayerId, Slot};

    #[test]
    fn what_nobody_held_counts_as_moved_and_not_against_the_bound() {
        let moves = |why: &[Why]| -> Vec<Move> {
            why.iter().map(|why| Move { layer: LayerId(0), expert: ExpertId(1), to: Slot(2), why: *why }).collect()
        };
        let mut moved = Moved::default();
        moved.count(&moves(&[Why::Unheld; 8]), 10);
        moved.count(&moves(&[Why::Unheld, Why::Replica, Why::Balance, Why::Hot]), 10);
        moved.count(&moves(&[Why::Replica]), 10);
        let wire = moved.to_wire(40);
        assert_eq!((wire.changes, wire.bytes), (3, 130));
        assert_eq!((wire.change_bytes_max, wire.change_bytes_bound), (30, 40));
    }
}
