//! Why a step or a view change failed.

use std::time::Duration;

use mesh_core::routing::RoutingError;
use mesh_core::{LayerId, NodeId, Slot, ViewId};
use mesh_kernels::KernelError;
use mesh_model::ModelError;
use mesh_transport::TransportError;
use mesh_transport::frame::AbortReason;

/// Why a step or a view change failed. The runner stays usable: its lanes are free again, and the step's KV is to be dropped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No committed view with all its expert nodes connected.
    #[error("the mesh has no complete view yet; wait for its expert nodes")]
    NotServing,
    /// An expert node that is needed is gone.
    #[error("expert node at {slot} ({node}) is lost: {what}")]
    NodeLost {
        /// Its slot.
        slot: Slot,
        /// Its process.
        node: NodeId,
        /// What was seen.
        what: String,
    },
    /// Expert nodes that did not answer in time.
    #[error("expert nodes {slots:?} are silent for {waited:?}")]
    Silent {
        /// Who was waited for.
        slots: Vec<Slot>,
        /// How long.
        waited: Duration,
    },
    /// An expert node refused the rows.
    #[error("expert node at {slot} ({node}) refused rows of {layer}: {reason}")]
    Aborted {
        /// Its slot.
        slot: Slot,
        /// Its process.
        node: NodeId,
        /// The layer.
        layer: LayerId,
        /// Its reason.
        reason: AbortReason,
    },
    /// The gate's output cannot be routed.
    #[error("cannot route at {layer}: {error}")]
    Routing {
        /// The layer.
        layer: LayerId,
        /// Why.
        error: RoutingError,
    },
    /// A commit of a view that is not the prepared one.
    #[error("{id} is to be committed and {prepared:?} is prepared")]
    NotPrepared {
        /// The view to be committed.
        id: ViewId,
        /// The view that is prepared.
        prepared: Option<ViewId>,
    },
    /// All lanes are in flight: more micro-batches than lanes.
    #[error("all {lanes} lanes are in flight")]
    NoLane {
        /// How many there are.
        lanes: u16,
    },
    /// The transport's window gave no buffer for rows to a node.
    #[error("no buffer for rows to {slot}: {error}")]
    Window {
        /// Whom the rows were for.
        slot: Slot,
        /// Why not.
        error: TransportError,
    },
    /// The model's tensors could not be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A buffer or the KV cache could not be had.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A broken promise of our own code.
    #[error("defect: {0}")]
    Internal(String),
}
