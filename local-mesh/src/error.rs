//! Why a mesh does not come to serve.

use std::net::SocketAddr;
use std::time::Duration;

use attention_svc::AttentionError;
use expert_svc::ExpertError;
use router_svc::RouterError;

/// Why one node ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The router.
    #[error(transparent)]
    Router(#[from] RouterError),
    /// An attention node.
    #[error(transparent)]
    Attention(#[from] AttentionError),
    /// An expert node.
    #[error(transparent)]
    Expert(#[from] ExpertError),
    /// Its runtime cannot be made, or its listener not be taken over.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's words.
        source: std::io::Error,
    },
    /// It panicked: a defect, whose words are on stderr.
    #[error("panicked; its last words are on stderr above")]
    Panicked,
}

impl NodeError {
    /// Whether another attempt with the same configuration would fail the same.
    pub fn is_configuration(&self) -> bool {
        match self {
            NodeError::Router(error) => {
                matches!(error, RouterError::OutOfRange { .. } | RouterError::LeaseTooShort { .. })
            }
            NodeError::Attention(error) => error.is_configuration(),
            NodeError::Expert(error) => error.is_configuration(),
            NodeError::Os { .. } | NodeError::Panicked => false,
        }
    }
}

/// Why a mesh does not come to serve.
#[derive(Debug, thiserror::Error)]
pub enum LocalMeshError {
    /// No nodes of a role.
    #[error("a mesh needs at least one attention node and one expert node; asked for were {attention} and {experts}")]
    NoNodes {
        /// Attention nodes asked for.
        attention: u16,
        /// Expert nodes asked for.
        experts: u16,
    },
    /// The router's address cannot be taken.
    #[error("cannot listen on {addr}: {source}; name another address, or port 0 for a free one")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// A node's thread cannot be started.
    #[error("the thread of {node} cannot be started: {source}")]
    Thread {
        /// The node.
        node: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// A node ended before the mesh served.
    #[error("{node} ended before the mesh served: {error}")]
    Node {
        /// The node.
        node: String,
        /// Why.
        error: Box<NodeError>,
    },
    /// A node ended in good order before the mesh served, unasked.
    #[error("{node} stopped before the mesh served")]
    Stopped {
        /// The node.
        node: String,
    },
    /// The mesh did not serve in time.
    #[error("the mesh does not serve after {waited:?}; waiting for {missing}")]
    StartTimeout {
        /// How long it was waited for.
        waited: Duration,
        /// Who is not there.
        missing: String,
    },
}

impl LocalMeshError {
    /// Whether another attempt with the same configuration would fail the same.
    pub fn is_configuration(&self) -> bool {
        match self {
            LocalMeshError::NoNodes { .. } | LocalMeshError::Listen { .. } => true,
            LocalMeshError::Node { error, .. } => error.is_configuration(),
            LocalMeshError::Thread { .. } | LocalMeshError::Stopped { .. } | LocalMeshError::StartTimeout { .. } => {
                false
            }
        }
    }
}
