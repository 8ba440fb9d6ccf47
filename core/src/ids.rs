//! Newtypes for everything that is counted or addressed, so that a slot is never passed for a layer.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl $name {
            /// The number as an index.
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }
    };
}

id!(
    /// A registered process, unique for the life of a router. Never reused.
    NodeId(u64), "node-"
);
id!(
    /// A node's fixed number in its group (attention or expert). Never renumbered within a mesh's life.
    Slot(u16), "slot "
);
id!(
    /// A transformer layer, counted from 0 over all layers (dense ones included).
    LayerId(u16), "layer "
);
id!(
    /// A routed expert of a layer, counted from 0.
    ExpertId(u16), "expert "
);
id!(
    /// An issued view. Ids only grow; 0 is never issued.
    ViewId(u64), "view "
);
id!(
    /// A dispatch's number on one channel, counted from 1; its combine carries the same number.
    Seq(u64), "seq "
);
id!(
    /// A credit to have one micro-batch's exchange in flight.
    Lane(u16), "lane "
);

/// What a node does in the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Owns requests' KV caches and runs everything but the routed experts.
    Attention,
    /// Owns routed experts and no request state.
    Expert,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Attention => "attention",
            Role::Expert => "expert",
        })
    }
}
