//! Why an attention node cannot start, or stopped.

use mesh_core::LayerId;
use mesh_kernels::KernelError;
use mesh_kernels::packed::PackedError;
use mesh_model::ModelError;
use mesh_service::ServiceError;
use mesh_transport::TransportError;

use crate::runner::RunError;

/// Why an attention node cannot start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AttentionError {
    /// A setting that cannot be run.
    #[error("{flag}: {what}")]
    Config {
        /// The setting, as a flag.
        flag: &'static str,
        /// What is wrong, and what to do.
        what: String,
    },
    /// The model directory cannot be served.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The compute backend or the KV cache cannot be made.
    #[error(transparent)]
    Compute(#[from] KernelError),
    /// Packed weights cannot be kept where they should be.
    #[error("--cache-dir: {0}")]
    Cache(#[from] PackedError),
    /// The data plane cannot be opened.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The runner's options contradict the model.
    #[error(transparent)]
    Runner(#[from] RunError),
    /// The address for gRPC cannot be taken.
    #[error("cannot listen on {addr}: {reason}; name another --listen")]
    Listen {
        /// The address.
        addr: String,
        /// Why not.
        reason: std::io::Error,
    },
    /// The control plane.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The gRPC server failed.
    #[error("the gRPC server failed: {0}")]
    Server(String),
    /// A thread cannot be started.
    #[error("cannot start the {thread} thread: {reason}")]
    Thread {
        /// Its name.
        thread: &'static str,
        /// Why not.
        reason: std::io::Error,
    },
    /// The engine panicked: a defect, whose words are on stderr.
    #[error("the engine died; its last words are on stderr above")]
    EngineDied,
}

impl AttentionError {
    /// Whether another configuration, not another attempt, is the remedy.
    pub fn is_configuration(&self) -> bool {
        match self {
            AttentionError::Config { .. } | AttentionError::Model(_) | AttentionError::Compute(_) => true,
            AttentionError::Cache(_) | AttentionError::Runner(_) | AttentionError::Listen { .. } => true,
            AttentionError::Transport(error) => {
                matches!(error, TransportError::BadAddress { .. } | TransportError::Unavailable { .. })
            }
            AttentionError::Service(error) => matches!(
                error,
                ServiceError::RouterUri { .. } | ServiceError::LogFilter { .. } | ServiceError::NoAddress { .. }
            ),
            AttentionError::Server(_) | AttentionError::Thread { .. } | AttentionError::EngineDied => false,
        }
    }
}

/// Why a view cannot be prepared. The text goes to the router.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The placement is of another model.
    #[error("the view places {found} experts on {layers} layers, the model has {wanted} on {wanted_layers}")]
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
    /// A holder that is no member.
    #[error("{layer} has an expert at {slot}, where the view has no node")]
    NoMember {
        /// The layer.
        layer: LayerId,
        /// The slot.
        slot: mesh_core::Slot,
    },
}
