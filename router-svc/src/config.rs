//! The router's configuration and its bounds.

use std::time::Duration;

use mesh_proto::limits::{REPLICAS_MAX, SLOTS_MAX};

use crate::mesh::Policy;

/// Why a configuration cannot be run, or a router ended.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// A number out of its range.
    #[error("{what} is {found}; {min} to {max} are possible")]
    OutOfRange {
        /// Which.
        what: &'static str,
        /// What it is.
        found: usize,
        /// The least.
        min: usize,
        /// The most.
        max: usize,
    },
    /// Times that contradict each other.
    #[error(
        "the lease of {lease:?} must be at least twice the heartbeat of {heartbeat:?}, or one late heartbeat kills"
    )]
    LeaseTooShort {
        /// The lease.
        lease: Duration,
        /// The heartbeat.
        heartbeat: Duration,
    },
    /// The system gives no random bytes for secrets.
    #[error("the system gives no random bytes for the mesh's secret: {0}")]
    Random(String),
    /// The server ended with an error.
    #[error("the gRPC server failed: {0}")]
    Server(#[from] tonic::transport::Error),
    /// The reflection service refuses our descriptors.
    #[error("the checked-in descriptors are broken ({0}); generate them again with proto/codegen")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// What a router is told at start. [`RouterConfig::default`] is right for a machine of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterConfig {
    /// Attention nodes that the first view waits for; later ones need one.
    pub attention_min: usize,
    /// Expert nodes that the first view waits for; later ones need one.
    pub experts_min: usize,
    /// Nodes that hold each expert, as far as there are that many.
    pub replicas: usize,
    /// How often nodes send heartbeats.
    pub heartbeat: Duration,
    /// How long a node is trusted without one.
    pub lease: Duration,
    /// How long a registered node may take to open its session.
    pub hello_max: Duration,
    /// How long members may take to prepare a view: long enough to load experts.
    pub prepare_max: Duration,
    /// How long a member may take to commit one.
    pub commit_max: Duration,
    /// How long a join waits for others to share its view.
    pub debounce: Duration,
    /// How long a lost expert node may come back before its copies are made elsewhere, if all experts have other holders.
    pub absence_max: Duration,
    /// How often speed, and load as last taken, are compared with the placement.
    pub balance_every: Duration,
    /// How often load is taken anew for that.
    pub rates_every: Duration,
    /// Further copies that the hottest experts get, over all layers.
    pub hot_replicas: usize,
    /// Bytes of experts that one change of the view loads at most, beside experts that nobody holds.
    pub moves_bytes_max: u64,
    /// Pause after the first failed view; doubles with each in a row.
    pub backoff_min: Duration,
    /// The longest such pause.
    pub backoff_max: Duration,
    /// Failed views in a row after which a newcomer that causes them is dismissed.
    pub prepare_failures_max: u32,
    /// Requests at once, those that wait for a view included; more are refused as overload.
    pub requests_max: usize,
    /// How long a request waits for a mesh that does not serve (yet).
    pub wait_for_view_max: Duration,
    /// How long a request whose attention node is lost looks for another.
    pub move_max: Duration,
    /// After how long without anything from a request's attention node that node is asked for a sign of life.
    pub quiet_max: Duration,
    /// How long a client may take nothing of an answer that waits for it.
    pub stall_max: Duration,
    /// How long connecting to an attention node may take.
    pub connect_max: Duration,
    /// How long open calls may take to end when the router stops.
    pub drain_max: Duration,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            attention_min: 1,
            experts_min: 1,
            replicas: 1,
            heartbeat: Duration::from_millis(500),
            lease: Duration::from_secs(10),
            hello_max: Duration::from_secs(10),
            prepare_max: Duration::from_secs(300),
            // Committing is two of these: less than expert nodes serve the view before (30 s).
            commit_max: Duration::from_secs(14),
            debounce: Duration::from_millis(50),
            absence_max: Duration::from_secs(2),
            balance_every: Duration::from_secs(2),
            rates_every: Duration::from_secs(30),
            hot_replicas: 0,
            moves_bytes_max: 1 << 30,
            backoff_min: Duration::from_millis(250),
            backoff_max: Duration::from_secs(10),
            prepare_failures_max: 3,
            requests_max: 1024,
            wait_for_view_max: Duration::from_secs(3),
            move_max: Duration::from_secs(30),
            quiet_max: Duration::from_millis(500),
            stall_max: Duration::from_secs(60),
            connect_max: Duration::from_secs(5),
            drain_max: Duration::from_secs(5),
        }
    }
}

/// How long a node may take to be heard once others wait for it in vain. A node answers on a thread that does not compute;
/// longer, and silent nodes that hold experts alone cost more than the second that is promised.
const SUSPICION_MAX: Duration = Duration::from_millis(300);
/// Most requests at once that a router can be told to take.
const REQUESTS_LIMIT: usize = 1 << 16;

impl RouterConfig {
    /// Refuses what cannot be run.
    ///
    /// # Errors
    /// [`RouterError::OutOfRange`] and [`RouterError::LeaseTooShort`].
    pub fn validate(&self) -> Result<(), RouterError> {
        let ranges = [
            ("attention-min", self.attention_min, 1, SLOTS_MAX),
            ("experts-min", self.experts_min, 1, SLOTS_MAX),
            ("replicas", self.replicas, 1, REPLICAS_MAX),
            ("requests-max", self.requests_max, 1, REQUESTS_LIMIT),
        ];
        for (what, found, min, max) in ranges {
            if !(min..=max).contains(&found) {
                return Err(RouterError::OutOfRange { what, found, min, max });
            }
        }
        if self.heartbeat.is_zero() || self.lease < self.heartbeat.saturating_mul(2) {
            return Err(RouterError::LeaseTooShort { lease: self.lease, heartbeat: self.heartbeat });
        }
        Ok(())
    }

    /// The control plane's share.
    pub(crate) fn policy(&self) -> Policy {
        Policy {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            attention_min: self.attention_min,
            experts_min: self.experts_min,
            replicas: self.replicas,
            hello_max: self.hello_max,
            lease: self.lease,
            prepare_max: self.prepare_max,
            commit_max: self.commit_max,
            debounce: self.debounce,
            absence_max: self.absence_max,
            balance_every: self.balance_every,
            rates_every: self.rates_every,
            hot_replicas: self.hot_replicas,
            moves_bytes_max: self.moves_bytes_max,
            suspicion_max: SUSPICION_MAX,
            backoff_min: self.backoff_min,
            backoff_max: self.backoff_max,
            prepare_failures_max: self.prepare_failures_max,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_can_be_run_and_what_cannot_is_named() {
        let base = RouterConfig::default;
        base().validate().unwrap();
        for (config, named) in [
            (RouterConfig { attention_min: 0, ..base() }, "attention-min"),
            (RouterConfig { experts_min: SLOTS_MAX + 1, ..base() }, "experts-min"),
            (RouterConfig { replicas: 0, ..base() }, "replicas"),
            (RouterConfig { requests_max: 0, ..base() }, "requests-max"),
            (RouterConfig { lease: Duration::from_millis(900), ..base() }, "lease"),
            (RouterConfig { heartbeat: Duration::ZERO, ..base() }, "heartbeat"),
        ] {
            let refused = config.validate().unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        }
    }
}
