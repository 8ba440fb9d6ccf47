//! What can go wrong between a node and its router.

use std::time::Duration;

use mesh_proto::MeshError;

/// Why a node is not, or no longer, a member of the mesh.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The log filter does not parse.
    #[error("log filter {filter:?} is not valid ({reason}); write e.g. `info` or `info,expert_svc=debug`")]
    LogFilter {
        /// The filter given.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Signals cannot be watched.
    #[error("signals cannot be watched: {0}")]
    Signals(std::io::Error),
    /// The router's address is not one.
    #[error("router address {uri:?} is not valid ({reason}); write e.g. http://127.0.0.1:7400")]
    RouterUri {
        /// The address given.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A node that listens everywhere does not know how others reach it.
    #[error("{listen} is every address of this machine, and {reason}; say with --advertise HOST how others reach it")]
    NoAddress {
        /// Where it listens.
        listen: String,
        /// Why the machine's own name is no answer.
        reason: String,
    },
    /// Nobody answered at the router's address.
    #[error("router {uri} did not answer within {waited:?} ({last}); is it running, and is --router right?")]
    RouterSilent {
        /// The router's address.
        uri: String,
        /// How long it was tried.
        waited: Duration,
        /// What the last attempt ended with.
        last: String,
    },
    /// The router refused the registration.
    #[error("router {uri} refuses this node: {error}")]
    Refused {
        /// The router's address.
        uri: String,
        /// What it said.
        error: MeshError,
    },
    /// The router answered what no router of this version answers.
    #[error("router {uri} broke the protocol: {what}; are router and node of one version?")]
    Protocol {
        /// The router's address.
        uri: String,
        /// What was wrong.
        what: String,
    },
    /// The router ended the membership.
    #[error("router {uri} dismissed this node: {why}")]
    Dismissed {
        /// The router's address.
        uri: String,
        /// The router's words.
        why: String,
        /// As the node asked or was asked to: it is to end.
        drained: bool,
    },
    /// The session broke; with it the lease is lost.
    #[error("session with router {uri} is lost: {why}")]
    SessionLost {
        /// The router's address.
        uri: String,
        /// How it ended.
        why: String,
    },
}

impl ServiceError {
    /// Whether the membership is lost while the node itself is well: it keeps what it holds and registers again.
    pub fn may_rejoin(&self) -> bool {
        matches!(self, ServiceError::SessionLost { .. } | ServiceError::Dismissed { drained: false, .. })
    }
}
