//! [`mesh_core`] types from and to the wire. Nothing that arrives is trusted, least of all as a length.

use mesh_core::placement::{Placement, PlacementError};
use mesh_core::view::{Member, View};
use mesh_core::{LayerId, NodeId, Role, Slot, ViewId};

use crate::limits::{ADDR_BYTES_MAX, EXPERTS_PER_LAYER_MAX, LAYERS_MAX, REPLICAS_MAX, SLOTS_MAX};
use crate::v1;

/// Why a message is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtoError {
    /// A number past its bound.
    #[error("{field} is {found}, at most {max} is allowed")]
    TooLarge {
        /// The field, with its place.
        field: &'static str,
        /// What it holds.
        found: u64,
        /// Its bound.
        max: u64,
    },
    /// A number that is never issued.
    #[error("{field} is 0, which is never issued")]
    Zero {
        /// The field, with its place.
        field: &'static str,
    },
    /// A list that must be sorted without repetition is not.
    #[error("{field} is not strictly ascending: {found} comes after {last}")]
    NotAscending {
        /// The field, with its place.
        field: &'static str,
        /// The offender.
        found: u64,
        /// Its predecessor.
        last: u64,
    },
    /// A layer that does not list every expert.
    #[error("layer {layer} places {found} experts, the view has {wanted} per layer")]
    WrongExperts {
        /// The layer.
        layer: u32,
        /// Experts it lists.
        found: usize,
        /// Experts per layer.
        wanted: usize,
    },
    /// An expert placed where no member is.
    #[error("layer {layer} places an expert on {slot}, which no member has")]
    Homeless {
        /// The layer.
        layer: LayerId,
        /// The slot without a member.
        slot: Slot,
    },
    /// A placement that core refuses.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// A role that this version does not know.
    #[error("node role {0} is unknown; 1 is attention, 2 is expert")]
    Role(i32),
    /// A byte string of the wrong length.
    #[error("{field} has {found} bytes, {wanted} are needed")]
    WrongLength {
        /// The field.
        field: &'static str,
        /// Its length.
        found: usize,
        /// What it must be.
        wanted: usize,
    },
}

fn bounded(field: &'static str, found: u64, max: usize) -> Result<(), ProtoError> {
    let max = max as u64;
    if found > max { Err(ProtoError::TooLarge { field, found, max }) } else { Ok(()) }
}

/// A slot from the wire, below [`SLOTS_MAX`].
///
/// # Errors
/// [`ProtoError::TooLarge`].
pub fn slot(field: &'static str, found: u32) -> Result<Slot, ProtoError> {
    bounded(field, found.into(), SLOTS_MAX - 1)?;
    Ok(Slot(found as u16))
}

/// A layer from the wire, below [`LAYERS_MAX`].
///
/// # Errors
/// [`ProtoError::TooLarge`].
pub fn layer(field: &'static str, found: u32) -> Result<LayerId, ProtoError> {
    bounded(field, found.into(), LAYERS_MAX - 1)?;
    Ok(LayerId(found as u16))
}

/// A byte string of exactly 32 bytes: a digest or a secret.
///
/// # Errors
/// [`ProtoError::WrongLength`].
pub fn bytes32(field: &'static str, found: &[u8]) -> Result<[u8; 32], ProtoError> {
    found.try_into().map_err(|_| ProtoError::WrongLength { field, found: found.len(), wanted: 32 })
}

/// The ascending layers of a message, none twice.
///
/// # Errors
/// [`ProtoError::TooLarge`] and [`ProtoError::NotAscending`].
pub fn layers(field: &'static str, found: impl ExactSizeIterator<Item = u32>) -> Result<Vec<LayerId>, ProtoError> {
    bounded(field, found.len() as u64, LAYERS_MAX)?;
    let mut layers: Vec<LayerId> = Vec::with_capacity(found.len());
    for number in found {
        let next = layer(field, number)?;
        if let Some(last) = layers.last().filter(|last| **last >= next) {
            return Err(ProtoError::NotAscending { field, found: number.into(), last: last.0.into() });
        }
        layers.push(next);
    }
    Ok(layers)
}

impl From<Role> for v1::NodeRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Attention => v1::NodeRole::Attention,
            Role::Expert => v1::NodeRole::Expert,
        }
    }
}

/// A role from a message's field.
///
/// # Errors
/// [`ProtoError::Role`].
pub fn role(found: i32) -> Result<Role, ProtoError> {
    match v1::NodeRole::try_from(found) {
        Ok(v1::NodeRole::Attention) => Ok(Role::Attention),
        Ok(v1::NodeRole::Expert) => Ok(Role::Expert),
        Ok(v1::NodeRole::Unspecified) | Err(_) => Err(ProtoError::Role(found)),
    }
}

impl TryFrom<v1::NodeRole> for Role {
    type Error = ProtoError;

    fn try_from(found: v1::NodeRole) -> Result<Self, ProtoError> {
        role(found as i32)
    }
}

fn members(field: &'static str, found: Vec<v1::ViewMember>) -> Result<Vec<Member>, ProtoError> {
    bounded(field, found.len() as u64, SLOTS_MAX)?;
    let mut members: Vec<Member> = Vec::with_capacity(found.len());
    for v1::ViewMember { slot: number, node, addr } in found {
        let slot = slot(field, number)?;
        bounded(field, addr.len() as u64, ADDR_BYTES_MAX)?;
        if let Some(last) = members.last().filter(|last| last.slot >= slot) {
            return Err(ProtoError::NotAscending { field, found: number.into(), last: last.slot.0.into() });
        }
        members.push(Member { slot, node: NodeId(node), data_addr: addr });
    }
    Ok(members)
}

/// One message per MoE layer, as a view and the router's status carry the placement.
pub fn placement_to_wire(placement: &Placement) -> Vec<v1::LayerPlacement> {
    let wire = |slots: &Vec<Slot>| v1::Slots { slots: slots.iter().map(|s| s.0.into()).collect() };
    // A placement without experts has no table rows to give its layers.
    let per_layer = placement.experts().max(1);
    let rows = placement.moe_layers().iter().zip(placement.table().chunks(per_layer));
    rows.map(|(layer, row)| v1::LayerPlacement { layer: layer.0.into(), experts: row.iter().map(wire).collect() })
        .collect()
}

/// A placement from the wire, every layer listing `experts` experts.
///
/// # Errors
/// [`ProtoError`].
pub fn placement_from_wire(found: &[v1::LayerPlacement], experts: u32) -> Result<Placement, ProtoError> {
    bounded("experts_per_layer", experts.into(), EXPERTS_PER_LAYER_MAX)?;
    let wanted = experts as usize;
    let moe_layers = layers("placement.layer", found.iter().map(|p| p.layer))?;
    if wanted == 0 && !moe_layers.is_empty() {
        return Err(ProtoError::Zero { field: "experts_per_layer" });
    }
    let mut table = Vec::new();
    for v1::LayerPlacement { layer, experts } in found {
        if experts.len() != wanted {
            return Err(ProtoError::WrongExperts { layer: *layer, found: experts.len(), wanted });
        }
        for holders in experts {
            bounded("placement.experts.slots", holders.slots.len() as u64, REPLICAS_MAX)?;
            let holders = holders.slots.iter().map(|s| slot("placement.experts.slots", *s));
            table.push(holders.collect::<Result<Vec<Slot>, ProtoError>>()?);
        }
    }
    Ok(Placement::new(moe_layers, wanted, table)?)
}

impl From<&View> for v1::ViewMessage {
    fn from(view: &View) -> Self {
        let wire = |m: &Member| v1::ViewMember { slot: m.slot.0.into(), node: m.node.0, addr: m.data_addr.clone() };
        Self {
            view: view.id.0,
            attention: view.attention.iter().map(wire).collect(),
            experts: view.experts.iter().map(wire).collect(),
            placement: placement_to_wire(&view.placement),
            experts_per_layer: view.placement.experts() as u32,
        }
    }
}

impl TryFrom<v1::ViewMessage> for View {
    type Error = ProtoError;

    fn try_from(found: v1::ViewMessage) -> Result<Self, ProtoError> {
        if found.view == 0 {
            return Err(ProtoError::Zero { field: "view" });
        }
        let placement = placement_from_wire(&found.placement, found.experts_per_layer)?;
        let experts = members("experts", found.experts)?;
        for (i, holders) in placement.table().iter().enumerate() {
            let stranger = holders.iter().find(|s| experts.binary_search_by_key(*s, |m| m.slot).is_err());
            if let Some(slot) = stranger {
                // A table row exists only where there are experts, so the division is by one at least.
                let layer = placement.moe_layers()[i / placement.experts()];
                return Err(ProtoError::Homeless { layer, slot: *slot });
            }
        }
        Ok(Self { id: ViewId(found.view), attention: members("attention", found.attention)?, experts, placement })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    fn view(nodes: u16, experts: usize, replicas: usize) -> View {
        let slots: Vec<Slot> = (0..nodes).map(|s| Slot(s * 2)).collect();
        let member =
            |s: &Slot| Member { slot: *s, node: NodeId(s.0 as u64 + 40), data_addr: format!("tcp://h:{}", s.0) };
        View {
            id: ViewId(7),
            attention: vec![Member { slot: Slot(1), node: NodeId(3), data_addr: String::new() }],
            experts: slots.iter().map(member).collect(),
            placement: Placement::balanced(vec![LayerId(1), LayerId(3)], experts, &slots, replicas).unwrap(),
        }
    }

    fn refused(change: impl FnOnce(&mut v1::ViewMessage)) -> ProtoError {
        let mut wire = v1::ViewMessage::from(&view(3, 8, 1));
        change(&mut wire);
        View::try_from(wire).unwrap_err()
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_its_place() {
        assert_eq!(refused(|w| w.view = 0), ProtoError::Zero { field: "view" });
        assert!(matches!(refused(|w| w.experts_per_layer = u32::MAX), ProtoError::TooLarge { .. }));
        assert!(matches!(refused(|w| w.experts_per_layer = 9), ProtoError::WrongExperts { wanted: 9, .. }));
        assert!(matches!(refused(|w| w.experts_per_layer = 0), ProtoError::Zero { .. }));
        assert!(matches!(refused(|w| w.placement[1].layer = 70_000), ProtoError::TooLarge { .. }));
        assert!(matches!(refused(|w| w.placement[1].layer = 1), ProtoError::NotAscending { .. }));
        assert!(matches!(refused(|w| w.experts[1].slot = 0), ProtoError::NotAscending { .. }));
        assert!(matches!(refused(|w| w.experts[2].slot = SLOTS_MAX as u32), ProtoError::TooLarge { .. }));
        assert!(matches!(refused(|w| w.experts[0].addr = "x".repeat(5000)), ProtoError::TooLarge { .. }));
        assert!(matches!(refused(|w| w.placement[0].experts[3].slots.clear()), ProtoError::Placement(_)));
        assert!(matches!(refused(|w| w.placement[0].experts[3].slots = vec![2, 2]), ProtoError::Placement(_)));
        let homeless = ProtoError::Homeless { layer: LayerId(3), slot: Slot(1) };
        assert_eq!(refused(|w| w.placement[1].experts[3].slots = vec![1]), homeless);
    }

    #[test]
    fn roles_map_both_ways_and_strangers_are_refused() {
        for role in [Role::Attention, Role::Expert] {
            assert_eq!(Role::try_from(v1::NodeRole::from(role)), Ok(role));
        }
        assert_eq!(super::role(0), Err(ProtoError::Role(0)));
        assert_eq!(super::role(9), Err(ProtoError::Role(9)));
    }

    #[test]
    fn a_view_of_a_dense_model_has_no_placement() {
        let dense = View { placement: Placement::default(), ..view(1, 1, 1) };
        assert_eq!(View::try_from(v1::ViewMessage::from(&dense)), Ok(dense));
    }

    proptest! {
        #[test]
        fn a_view_survives_the_wire(nodes in 1u16..9, experts in 1usize..20, replicas in 1usize..4) {
            let view = view(nodes, experts, replicas.min(nodes as usize));
            let bytes = v1::ViewMessage::from(&view).encode_to_vec();
            prop_assert_eq!(View::try_from(v1::ViewMessage::decode(&bytes[..]).unwrap()), Ok(view));
        }

        /// Whatever arrives is refused or is a view that holds what a view promises; nothing panics.
        #[test]
        fn mutated_bytes_are_a_sound_view_or_an_error(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<prop::sample::Index>(), truncate in any::<bool>(),
        ) {
            let mut bytes = v1::ViewMessage::from(&view(3, 8, 2)).encode_to_vec();
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if truncate {
                bytes.truncate(cut.index(bytes.len()));
            }
            let Ok(wire) = v1::ViewMessage::decode(&bytes[..]) else { return Ok(()) };
            let Ok(view) = View::try_from(wire) else { return Ok(()) };
            prop_assert!(view.id.0 > 0);
            prop_assert!(view.experts.windows(2).all(|w| w[0].slot < w[1].slot));
            for holders in view.placement.table() {
                prop_assert!(!holders.is_empty());
                prop_assert!(holders.iter().all(|s| view.expert(*s).is_some()));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(wire) = v1::ViewMessage::decode(&bytes[..]) {
                let _ = View::try_from(wire);
            }
            let _ = v1::GenerateRequest::decode(&bytes[..]);
            let _ = v1::NodeMessage::decode(&bytes[..]);
        }
    }
}
