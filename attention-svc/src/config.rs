//! What an attention node is started with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::Slot;
use mesh_kernels::Dtype;
use mesh_kernels::cpu::Isa;
use mesh_service::advertise::Host;
use mesh_transport::local::LocalHub;
use mesh_transport::{FaultSpec, Limits, TransportChoice};

use crate::error::AttentionError;
use crate::scheduler::SchedulerLimits;

/// How large the KV cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvBudget {
    /// As many pages as fit these bytes, but no more than all running requests can fill.
    Bytes(u64),
    /// So many pages.
    Pages(u32),
}

/// What an attention node is started with.
#[derive(Clone)]
pub struct AttentionConfig {
    /// A checkpoint directory.
    pub model_dir: PathBuf,
    /// The router, `http://host:port`.
    pub router: String,
    /// Where the node's gRPC listens, `host:port`; port 0 takes a free one.
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
    /// How large the KV cache is.
    pub kv: KvBudget,
    /// Bounds of steps and queues.
    pub limits: SchedulerLimits,
    /// Micro-batches that a step is cut into at most; also the number of lanes.
    pub micro_batches: u16,
    /// Rows that a micro-batch has at least; `None`: so many that an expert gets [`Self::MICRO_BATCH_EXPERT_ROWS`] of them on
    /// average.
    pub micro_batch_rows_min: Option<usize>,
    /// How long an expert node's answer may take before its rows go to another holder of their experts; four times the
    /// slowest answer of late, where that is longer.
    pub silence_min: Duration,
    /// How long an expert node's answer may take at all.
    pub answer_max: Duration,
    /// How long connecting to one expert node may take.
    pub connect_max: Duration,
    /// How long requests wait for a mesh that can compute them once a node was lost; zero: they end at once.
    pub recovery_max: Duration,
    /// How long the router may take to be up.
    pub register_for: Duration,
    /// How long a node that lost its membership tries to register again.
    pub rejoin_for: Duration,
    /// How long streams may go on, and the router may take to hand them over, when the node is to stop.
    pub drain_max: Duration,
    /// Bounds of the data plane.
    pub transport_limits: Limits,
    /// Faults to be made on the data plane, for tests and drills only.
    pub faults: Option<FaultSpec>,
}

impl AttentionConfig {
    /// Bytes of KV cache unless said otherwise.
    pub const KV_BYTES: u64 = 512 << 20;
    /// Bounds of steps and queues unless said otherwise.
    pub const LIMITS: SchedulerLimits = SchedulerLimits {
        step_tokens_max: 512,
        prefill_chunk: 512,
        scored_rows_max: 64,
        running_max: 256,
        waiting_max: 1024,
    };
    /// Micro-batches of a step unless said otherwise: one computes while the other is away.
    pub const MICRO_BATCHES: u16 = 2;
    /// Rows that an expert gets from a micro-batch on average, at least, unless said otherwise. Each micro-batch has the expert
    /// nodes read their weights once, and with fewer rows that takes them longer than to compute: two smaller ones would
    /// take almost twice as long there as one, which no overlap makes good.
    pub const MICRO_BATCH_EXPERT_ROWS: usize = 64;
    /// How long the router may take to be up unless said otherwise.
    pub const REGISTER_FOR: Duration = Duration::from_secs(30);

    /// How long an answer may take before its node counts as silent, unless said otherwise.
    pub const SILENCE_MIN: Duration = Duration::from_millis(500);
    /// How long requests wait for lost experts to be held again, unless said otherwise.
    pub const RECOVERY_MAX: Duration = Duration::from_secs(30);

    /// How long a node that lost its router waits for it unless said otherwise.
    pub const REJOIN_FOR: Duration = Duration::from_secs(600);
    /// How long handing over may take unless said otherwise.
    pub const DRAIN_MAX: Duration = Duration::from_secs(5);

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
            kv: KvBudget::Bytes(Self::KV_BYTES),
            limits: Self::LIMITS,
            micro_batches: Self::MICRO_BATCHES,
            micro_batch_rows_min: None,
            silence_min: Self::SILENCE_MIN,
            answer_max: Duration::from_secs(10),
            connect_max: Duration::from_secs(1),
            recovery_max: Self::RECOVERY_MAX,
            register_for: Self::REGISTER_FOR,
            rejoin_for: Self::REJOIN_FOR,
            drain_max: Self::DRAIN_MAX,
            transport_limits: Limits::default(),
            faults: None,
        }
    }

    /// Refuses what cannot be run.
    ///
    /// # Errors
    /// [`AttentionError::Config`].
    pub fn validate(&self) -> Result<(), AttentionError> {
        let least_one = [
            ("--step-tokens-max", u64::from(self.limits.step_tokens_max)),
            ("--prefill-chunk", u64::from(self.limits.prefill_chunk)),
            ("--waiting-max", u64::from(self.limits.waiting_max)),
            ("--running-max", u64::from(self.limits.running_max)),
            ("scored_rows_max", u64::from(self.limits.scored_rows_max)),
            ("--micro-batches", u64::from(self.micro_batches)),
        ];
        match least_one.iter().find(|(_, value)| *value == 0) {
            Some((flag, _)) => Err(AttentionError::Config { flag, what: "0 computes nothing; give at least 1".into() }),
            None => Ok(()),
        }
    }
}
