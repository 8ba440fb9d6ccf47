//! What an expert node is started with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::Slot;
use mesh_kernels::Dtype;
use mesh_kernels::cpu::Isa;
use mesh_service::advertise::Host;
use mesh_transport::local::LocalHub;
use mesh_transport::{FaultSpec, Limits, TransportChoice};

/// What an expert node is started with.
#[derive(Clone)]
pub struct ExpertConfig {
    /// A checkpoint directory.
    pub model_dir: PathBuf,
    /// The router, `http://host:port`.
    pub router: String,
    /// Where the data plane listens, `host:port`; port 0 takes a free one.
    pub listen: String,
    /// The host under which others reach the node; `None`: that of `listen`, or this machine's name where that is every
    /// address.
    pub advertise: Option<Host>,
    /// Which transport to take.
    pub transport: TransportChoice,
    /// Where in-process peers meet; needed by the local transport alone.
    pub hub: Option<Arc<LocalHub>>,
    /// The compute dtype; the same on every node.
    pub dtype: Dtype,
    /// Where packed weights are kept, so that a second start maps them; `None`: nowhere.
    pub cache_dir: Option<PathBuf>,
    /// Compute threads; 0: one for each processor.
    pub threads: usize,
    /// The instruction set, the same on every node; `None`: the best that the machine has.
    pub isa: Option<Isa>,
    /// Binds engine and compute threads to processors from this one on, counted round; `None`: not bound.
    pub bind_from: Option<usize>,
    /// The slot to have; `None`: the lowest free one.
    pub slot: Option<Slot>,
    /// A name for people.
    pub name: String,
    /// Bytes that experts may fill; 0: no limit.
    pub capacity_bytes: u64,
    /// How long the router may take to be up.
    pub register_for: Duration,
    /// How long a node that lost its membership tries to register again.
    pub rejoin_for: Duration,
    /// How long the router may take to hand over what the node holds when it is to stop.
    pub drain_max: Duration,
    /// How long a view that was replaced is served on, for attention nodes that have not followed yet.
    pub linger: Duration,
    /// Bounds of the data plane.
    pub transport_limits: Limits,
    /// Faults to be made on the data plane, for tests and drills only.
    pub faults: Option<FaultSpec>,
    /// Bounds of the engine.
    pub limits: EngineLimits,
}

/// The named bounds of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// (Row, expert) pairs that one grouped FFN takes, so that nobody waits long behind others. One frame may exceed it.
    pub round_pairs_max: usize,
    /// Frames of one channel that may wait for their turn; more are refused as overload.
    pub channel_frames_max: usize,
    /// Frames that may wait for a view that this node has not heard of; more are refused.
    pub parked_frames_max: usize,
    /// How long a frame may wait for its view.
    pub parked_max: Duration,
    /// How long a frame may be held to be batched with others; zero: not at all.
    pub hold_max: Duration,
}

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            round_pairs_max: 2048,
            channel_frames_max: 256,
            parked_frames_max: 64,
            parked_max: Duration::from_secs(2),
            hold_max: Duration::ZERO,
        }
    }
}

impl ExpertConfig {
    /// How long a replaced view is served on unless said otherwise: longer than attention nodes take for a step.
    pub const LINGER: Duration = Duration::from_secs(30);
    /// How long the router may take to be up unless said otherwise.
    pub const REGISTER_FOR: Duration = Duration::from_secs(30);

    /// How long a node that lost its router waits for it unless said otherwise.
    pub const REJOIN_FOR: Duration = Duration::from_secs(600);
    /// How long handing over may take unless said otherwise.
    pub const DRAIN_MAX: Duration = Duration::from_secs(60);

    /// A node with everything but its model and its router left at what is usual.
    pub fn new(model_dir: impl Into<PathBuf>, router: impl Into<String>) -> Self {
        Self {
            model_dir: model_dir.into(),
            router: router.into(),
            listen: "127.0.0.1:0".into(),
            advertise: None,
            transport: TransportChoice::Auto,
            hub: None,
            dtype: Dtype::Bf16,
            cache_dir: None,
            threads: 0,
            isa: None,
            bind_from: None,
            slot: None,
            name: String::new(),
            capacity_bytes: 0,
            register_for: Self::REGISTER_FOR,
            rejoin_for: Self::REJOIN_FOR,
            drain_max: Self::DRAIN_MAX,
            linger: Self::LINGER,
            transport_limits: Limits::default(),
            faults: None,
            limits: EngineLimits::default(),
        }
    }
}
