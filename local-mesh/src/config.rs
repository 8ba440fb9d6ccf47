//! How many nodes there are, and what each is started with.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use attention_svc::AttentionConfig;
use expert_svc::ExpertConfig;
use mesh_kernels::Dtype;
use mesh_transport::TransportChoice;
use router_svc::RouterConfig;

/// A mesh in one process. Slots, names, addresses and the router's place are filled in for each node.
#[derive(Clone)]
pub struct LocalMeshConfig {
    /// Attention nodes.
    pub attention: u16,
    /// Expert nodes.
    pub experts: u16,
    /// Where the router listens; port 0 takes a free one.
    pub grpc: SocketAddr,
    /// The router.
    pub router: RouterConfig,
    /// What every attention node is started with.
    pub attention_node: AttentionConfig,
    /// What every expert node is started with.
    pub expert_node: ExpertConfig,
    /// How long the mesh may take until it serves.
    pub start_max: Duration,
    /// Whether each node's threads are bound to processors, every engine to another as far as they go.
    pub bind: bool,
    /// How long each group of nodes may take to stop.
    pub stop_max: Duration,
}

impl LocalMeshConfig {
    /// A mesh over the local transport, each node with all processors: they take turns.
    pub fn new(model_dir: impl Into<PathBuf>, attention: u16, experts: u16) -> Self {
        let model_dir = model_dir.into();
        let router =
            RouterConfig { attention_min: attention.into(), experts_min: experts.into(), ..RouterConfig::default() };
        Self {
            attention,
            experts,
            grpc: (Ipv4Addr::LOCALHOST, 0).into(),
            router,
            attention_node: AttentionConfig::new(model_dir.clone(), String::new()),
            expert_node: ExpertConfig::new(model_dir, String::new()),
            bind: false,
            start_max: Duration::from_secs(600),
            stop_max: Duration::from_secs(40),
        }
        .transport(TransportChoice::Local)
    }

    /// The transport of all nodes.
    #[must_use]
    pub fn transport(mut self, transport: TransportChoice) -> Self {
        (self.attention_node.transport, self.expert_node.transport) = (transport, transport);
        self
    }

    /// The compute dtype of all nodes.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        (self.attention_node.dtype, self.expert_node.dtype) = (dtype, dtype);
        self
    }

    /// Compute threads of each node.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        (self.attention_node.threads, self.expert_node.threads) = (threads, threads);
        self
    }
}
