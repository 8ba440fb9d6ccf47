//! The attention node's program.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use attention_svc::scheduler::SchedulerLimits;
use attention_svc::{AttentionConfig, AttentionError, AttentionNode, KvBudget};
use clap::Parser;
use mesh_core::Slot;
use mesh_kernels::Dtype;
use mesh_kernels::cpu::Isa;
use mesh_proto::limits::SLOTS_MAX;
use mesh_service::advertise::Host;
use mesh_service::telemetry::LogArgs;
use mesh_service::{config, shutdown};
use mesh_transport::{FaultSpec, TransportChoice};

/// An attention node: owns requests and their KV cache, asks expert nodes for their rows.
#[derive(Debug, Parser)]
#[command(name = "attention-svc", version, about, max_term_width = 120)]
struct Flags {
    /// A Hugging Face checkpoint directory.
    #[arg(long, env = "MESH_MODEL", value_name = "DIR")]
    model: PathBuf,
    /// The router.
    #[arg(long, env = "MESH_ROUTER", value_name = "URI")]
    router: String,
    /// Where the node's gRPC listens; port 0 takes a free one.
    #[arg(long, env = "MESH_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:0")]
    listen: String,
    /// The host name or IP address under which the router reaches this node, without port. By default the host of
    /// --listen; where that is every address (0.0.0.0), this machine's name.
    #[arg(long, env = "MESH_ADVERTISE", value_name = "HOST")]
    advertise: Option<Host>,
    /// The data plane: auto takes UCX where the machine has it, else TCP.
    #[arg(long, env = "MESH_TRANSPORT", value_name = "auto|tcp|ucx", default_value = "auto", value_parser = transport)]
    transport: TransportChoice,
    /// The type that operands are held in; the same on every node.
    #[arg(long, env = "MESH_DTYPE", value_name = "f32|bf16", default_value = "bf16")]
    dtype: Dtype,
    /// Keep packed weights in this directory, as many bytes as the node holds: the next start maps them and serves at
    /// once. Nodes may share it.
    #[arg(long, env = "MESH_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Compute threads; 0: one for each processor.
    #[arg(long, env = "MESH_THREADS", value_name = "N", default_value_t = 0,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(..=1024))]
    threads: usize,
    /// The instruction set to compute with: avx512-bf16, avx512, avx2, neon, ...; the best that the machine has when absent. All
    /// nodes of a mesh need the same, for each sums in its own way: name one that the least of the machines has.
    #[arg(long, env = "MESH_ISA", value_name = "NAME")]
    isa: Option<Isa>,
    /// Bind the engine's and the compute threads to a processor each, from the Nth on of those allowed, counted round. For
    /// nodes that share processors: give each another N. Not bound when absent.
    #[arg(long, env = "MESH_BIND_FROM", value_name = "N")]
    bind_from: Option<usize>,
    /// The slot to have among the attention nodes; the lowest free one when absent.
    #[arg(long, env = "MESH_SLOT", value_name = "N", value_parser = clap::value_parser!(u16).range(..SLOTS_MAX as i64))]
    slot: Option<u16>,
    /// A name for people.
    #[arg(long, env = "MESH_NAME", default_value = "")]
    name: String,
    /// Pages of KV cache; by default as many as fit --kv-bytes.
    #[arg(long, env = "MESH_KV_PAGES", value_name = "N")]
    kv_pages: Option<u32>,
    /// Bytes of KV cache.
    #[arg(long, env = "MESH_KV_BYTES", value_name = "BYTES", default_value_t = AttentionConfig::KV_BYTES)]
    kv_bytes: u64,
    /// Prompt tokens that a request may add to one step.
    #[arg(long, env = "MESH_PREFILL_CHUNK", value_name = "N", default_value_t = AttentionConfig::LIMITS.prefill_chunk)]
    prefill_chunk: u32,
    /// Tokens of one step, prefill and decode together.
    #[arg(long, env = "MESH_STEP_TOKENS_MAX", value_name = "N",
          default_value_t = AttentionConfig::LIMITS.step_tokens_max)]
    step_tokens_max: u32,
    /// Requests that run at once.
    #[arg(long, env = "MESH_RUNNING_MAX", value_name = "N", default_value_t = AttentionConfig::LIMITS.running_max)]
    running_max: u32,
    /// Requests that wait for their turn; more are refused as overload.
    #[arg(long, env = "MESH_WAITING_MAX", value_name = "N", default_value_t = AttentionConfig::LIMITS.waiting_max)]
    waiting_max: u32,
    /// Micro-batches that a step is cut into at most: while one is at the experts, the next computes.
    #[arg(long, env = "MESH_MICRO_BATCHES", value_name = "N", default_value_t = AttentionConfig::MICRO_BATCHES)]
    micro_batches: u16,
    /// Rows that a micro-batch has at least; by default so many that an expert gets 64 of them on average.
    #[arg(long, env = "MESH_MICRO_BATCH_ROWS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    micro_batch_rows: Option<u32>,
    /// How long an expert node may owe an answer before its rows go to another holder of their experts, milliseconds; four
    /// times the slowest answer of late, where that is longer. After half of it the router asks whether the node lives.
    #[arg(long, env = "MESH_SILENCE_MS", value_name = "N",
          default_value_t = AttentionConfig::SILENCE_MIN.as_millis() as u64,
          value_parser = clap::value_parser!(u64).range(10..=60_000))]
    silence_ms: u64,
    /// How long requests wait for a mesh that can compute them, once nodes were lost, seconds; 0: they end at once.
    #[arg(long, env = "MESH_RECOVERY_MAX", value_name = "SECONDS", default_value_t = AttentionConfig::RECOVERY_MAX.as_secs(),
          value_parser = clap::value_parser!(u64).range(..=3600))]
    recovery_max: u64,
    /// How long the router may take to be up, seconds.
    #[arg(long, env = "MESH_REGISTER_FOR", value_name = "SECONDS",
          default_value_t = AttentionConfig::REGISTER_FOR.as_secs())]
    register_for: u64,
    /// How long a node that lost the router tries to register again, keeping what it holds, seconds.
    #[arg(long, env = "MESH_REJOIN_FOR", value_name = "SECONDS", default_value_t = AttentionConfig::REJOIN_FOR.as_secs())]
    rejoin_for: u64,
    /// How long the router may take to hand over what the node holds when it is to stop, seconds.
    #[arg(long, env = "MESH_DRAIN_MAX", value_name = "SECONDS", default_value_t = AttentionConfig::DRAIN_MAX.as_secs())]
    drain_max: u64,
    /// FOR TESTS AND DRILLS ONLY: harm this node's frames, as seed=7,drop=0.001,delay=0.01:2ms-20ms (docs/OPERATING.md).
    #[arg(long, env = "MESH_FAULTS", value_name = "SPEC")]
    faults: Option<FaultSpec>,
    #[command(flatten)]
    log: LogArgs,
}

/// A transport between processes.
fn transport(name: &str) -> Result<TransportChoice, String> {
    match name.parse()? {
        TransportChoice::Local => Err("local joins roles of one process: use mesh-local, or tcp".into()),
        choice => Ok(choice),
    }
}

impl Flags {
    fn config(self) -> AttentionConfig {
        let limits = SchedulerLimits {
            prefill_chunk: self.prefill_chunk,
            step_tokens_max: self.step_tokens_max,
            running_max: self.running_max,
            waiting_max: self.waiting_max,
            ..AttentionConfig::LIMITS
        };
        AttentionConfig {
            listen: self.listen,
            advertise: self.advertise,
            transport: self.transport,
            dtype: self.dtype,
            cache_dir: self.cache_dir,
            threads: self.threads,
            isa: self.isa,
            bind_from: self.bind_from,
            slot: self.slot.map(Slot),
            name: self.name,
            kv: self.kv_pages.map_or(KvBudget::Bytes(self.kv_bytes), KvBudget::Pages),
            limits,
            micro_batches: self.micro_batches,
            micro_batch_rows_min: self.micro_batch_rows.map(|rows| rows as usize),
            silence_min: Duration::from_millis(self.silence_ms),
            recovery_max: Duration::from_secs(self.recovery_max),
            register_for: Duration::from_secs(self.register_for),
            rejoin_for: Duration::from_secs(self.rejoin_for),
            drain_max: Duration::from_secs(self.drain_max),
            faults: self.faults,
            ..AttentionConfig::new(self.model, self.router)
        }
    }
}

fn main() -> ExitCode {
    let flags: Flags = config::parse();
    if let Err(error) = flags.log.init() {
        return config::refuse(&error);
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "no runtime");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(serve(flags.config())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_configuration() => config::refuse(&error),
        Err(error) => {
            tracing::error!(%error, "attention node stopped");
            ExitCode::FAILURE
        }
    }
}

async fn serve(config: AttentionConfig) -> Result<(), AttentionError> {
    let stop = shutdown::on_signals()?;
    let node = tokio::select! {
        node = AttentionNode::start(config) => node?,
        () = stop.cancelled() => return Ok(()),
    };
    let ready = serde_json::json!({
        "ready": "attention",
        "slot": node.slot().0,
        "node": node.id().0,
        "pid": std::process::id(),
        "addr": node.addr(),
    });
    mesh_service::ready::print(&ready.to_string());
    node.serve(stop).await
}
