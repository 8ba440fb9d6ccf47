//! A node's side of the control plane: it registers, keeps its lease by heartbeats, and follows the views it is told.
//!
//! # Layout
//! - here: what a node says of itself ([`NodeSpec`]) and what it does with views ([`ViewTarget`])
//! - `register`: the way in
//! - `session`: the lease

mod register;
mod session;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use mesh_core::view::View;
use mesh_core::{Role, Slot, ViewId};
use mesh_proto::v1;

use crate::BoxFuture;
pub use register::{Registration, register};

/// What a node tells the router of itself.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Its role.
    pub role: Role,
    /// A name for people.
    pub name: String,
    /// The router's address, `http://host:port`.
    pub router: String,
    /// Digest of configuration and weights.
    pub model_digest: [u8; 32],
    /// The model it serves.
    pub model: v1::ModelInfo,
    /// Where it listens: experts their data channel, attention nodes their gRPC.
    pub addr: String,
    /// The transport it took.
    pub transport: String,
    /// The compute backend it took.
    pub compute: String,
    /// Version of the frame protocol.
    pub protocol: u32,
    /// Its slot.
    pub slot: SlotWish,
    /// Bytes that it may fill with experts; 0: no limit named.
    pub capacity_bytes: u64,
}

/// Which slot a node asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SlotWish {
    /// The lowest free one.
    #[default]
    Any,
    /// This one or none: what somebody configured.
    Must(Slot),
    /// This one, or the lowest free one: what the node had before it lost the router, which may not have noticed yet that it
    /// was gone.
    Rather(Slot),
}

impl From<Option<Slot>> for SlotWish {
    fn from(configured: Option<Slot>) -> Self {
        configured.map_or(SlotWish::Any, SlotWish::Must)
    }
}

/// What a node saw of an expert node; the router decides what follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The view in force.
    pub view: ViewId,
    /// Whom it is about.
    pub expert_slot: Slot,
    /// What was seen.
    pub what: String,
}

/// What follows views: the part of a service that loads, warms and switches.
///
/// `prepare` and `commit` are never in flight together and never twice; `abandon` and `load` may come at any time, also
/// while `prepare` is in flight, and must not block.
pub trait ViewTarget: Send + Sync + 'static {
    /// Loads and warms what `view` gives this node, while the view in force serves on. An error's text goes to the router.
    fn prepare(&self, view: Arc<View>) -> BoxFuture<'_, Result<(), String>>;
    /// Puts the prepared view in force.
    fn commit(&self, view: ViewId) -> BoxFuture<'_, Result<(), String>>;
    /// Forgets a view that was prepared or is being prepared; the view in force stays.
    fn abandon(&self, view: ViewId);
    /// The node's account of itself, for a heartbeat.
    fn load(&self) -> v1::NodeLoad;
}
