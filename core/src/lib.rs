//! The pure heart of the mesh: no IO, no clock, no threads, no unsafe.
//!
//! # Layout
//! - [`ids`]: newtypes for nodes, slots, layers, experts, views, sequences, lanes
//! - [`placement`]: which expert slots hold which expert of which layer
//! - [`balance`]: the next placement, from nodes, load and the placement before it
//! - [`view`]: the immutable picture of the mesh that every frame names
//! - [`routing`]: from gate logits to chosen experts ([`routing::Routing`]) and from those to one frame per
//!   expert node ([`routing::DispatchPlan`])
//! - [`speed`]: which expert nodes are slow
//! - [`lanes`]: credits for exchanges in flight, what each still owes, and the check of every answer's identity

#![forbid(unsafe_code)]

pub mod balance;
pub mod ids;
pub mod lanes;
pub mod placement;
pub mod routing;
pub mod speed;
pub mod view;

pub use ids::{ExpertId, Lane, LayerId, NodeId, Role, Seq, Slot, ViewId};
