//! Why an expert node cannot start, or stopped.

use mesh_core::{ExpertId, LayerId};
use mesh_kernels::KernelError;
use mesh_kernels::packed::PackedError;
use mesh_model::ModelError;
use mesh_service::ServiceError;
use mesh_transport::TransportError;

/// Why an expert node cannot start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ExpertError {
    /// The model directory cannot be served.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model has no routed experts.
    #[error("the model in {dir} has no routed experts: it needs no expert node")]
    NoExperts {
        /// The model directory.
        dir: String,
    },
    /// The compute backend cannot be made.
    #[error(transparent)]
    Compute(#[from] KernelError),
    /// Packed weights cannot be kept where they should be.
    #[error("--cache-dir: {0}")]
    Cache(#[from] PackedError),
    /// The data plane cannot be bound.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The local transport was asked for, and no place to meet was given.
    #[error("the local transport joins roles of one process, and none is given to meet in; use tcp or ucx")]
    NoHub,
    /// A row of the model and its metadata fit no frame.
    #[error("a row of {row_bytes} bytes fits no frame of at most {body_bytes_max}; raise body_bytes_max")]
    FrameTooSmall {
        /// Bytes of a row.
        row_bytes: usize,
        /// The largest frame body.
        body_bytes_max: usize,
    },
    /// The control plane.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The engine's thread cannot be started.
    #[error("the engine's thread cannot be started: {0}")]
    Thread(std::io::Error),
    /// The engine panicked: a defect, whose words are on stderr.
    #[error("the engine died; its last words are on stderr above")]
    EngineDied,
}

impl ExpertError {
    /// Whether another attempt with the same configuration would fail the same.
    pub fn is_configuration(&self) -> bool {
        match self {
            ExpertError::Model(_) | ExpertError::NoExperts { .. } | ExpertError::Compute(_) | ExpertError::Cache(_) => {
                true
            }
            ExpertError::FrameTooSmall { .. } | ExpertError::NoHub => true,
            ExpertError::Transport(error) => matches!(
                error,
                TransportError::Bind { .. } | TransportError::BadAddress { .. } | TransportError::Unavailable { .. }
            ),
            ExpertError::Service(error) => matches!(
                error,
                ServiceError::RouterUri { .. } | ServiceError::LogFilter { .. } | ServiceError::NoAddress { .. }
            ),
            ExpertError::Thread(_) | ExpertError::EngineDied => false,
        }
    }
}

/// Why a view cannot be prepared. The text goes to the router.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The placement is of another model.
    #[error("the view places {found} experts of {layers} layers, the model has {wanted} of {wanted_layers}")]
    OtherModel {
        /// Experts per layer in the view.
        found: usize,
        /// MoE layers in the view.
        layers: usize,
        /// Experts per layer of the model.
        wanted: usize,
        /// MoE layers of the model.
        wanted_layers: usize,
    },
    /// The view is not newer than the one in force.
    #[error("{asked} is not newer than {current}, which is in force")]
    NotNewer {
        /// The view asked for.
        asked: mesh_core::ViewId,
        /// The view in force.
        current: mesh_core::ViewId,
    },
    /// More than the node may hold.
    #[error(
        "{experts} experts are {bytes} bytes, this node may hold {capacity}; add expert nodes or raise --capacity-bytes"
    )]
    Capacity {
        /// Experts assigned.
        experts: usize,
        /// What they take.
        bytes: u64,
        /// What there is.
        capacity: u64,
    },
    /// An expert cannot be read.
    #[error("{expert} of {layer} cannot be loaded: {source}")]
    Expert {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// Why.
        source: ModelError,
    },
    /// The router abandoned the view meanwhile.
    #[error("the view was abandoned while it was being loaded")]
    Abandoned,
    /// Loading panicked: memory ran out, or a defect.
    #[error("loading failed: {0}")]
    Panicked(String),
}
