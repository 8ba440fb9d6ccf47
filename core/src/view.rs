//! The immutable picture of the mesh that the router issues and every frame names.

use crate::ids::{NodeId, Slot, ViewId};
use crate::placement::Placement;

/// A node in a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its fixed number in its group.
    pub slot: Slot,
    /// The process behind the slot.
    pub node: NodeId,
    /// Where its data channel listens, in the transport's own form (`tcp://127.0.0.1:4711`); empty for attention
    /// nodes, which connect and are never connected to.
    pub data_addr: String,
}

/// Who is in the mesh and which of them holds which expert. Immutable; a change is a new view with a larger id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Larger than every view's before.
    pub id: ViewId,
    /// Attention nodes, by slot.
    pub attention: Vec<Member>,
    /// Expert nodes, by slot.
    pub experts: Vec<Member>,
    /// Which expert slots hold which expert.
    pub placement: Placement,
}

impl View {
    /// The expert node at a slot.
    pub fn expert(&self, slot: Slot) -> Option<&Member> {
        self.experts.iter().find(|m| m.slot == slot)
    }

    /// The attention node at a slot.
    pub fn attention(&self, slot: Slot) -> Option<&Member> {
        self.attention.iter().find(|m| m.slot == slot)
    }
}
