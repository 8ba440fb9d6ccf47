//! `mesh-local`: a whole mesh in one process, in the foreground.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use attention_svc::KvBudget;
use clap::Parser;
use local_mesh::{LocalMesh, LocalMeshConfig, NodeInfo};
use mesh_kernels::Dtype;
use mesh_service::telemetry::LogArgs;
use mesh_service::{config, ready, shutdown};
use mesh_transport::{FaultSpec, TransportChoice};
use serde::Serialize;

/// A whole mesh in one process: router, attention and expert nodes.
#[derive(Debug, Parser)]
#[command(name = "mesh-local", version, about, max_term_width = 120)]
struct Flags {
    /// A Hugging Face checkpoint directory.
    #[arg(long, env = "MESH_MODEL", value_name = "DIR")]
    model: PathBuf,
    /// Attention nodes.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    attention: u16,
    /// Expert nodes.
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    experts: u16,
    /// Expert nodes that hold each expert.
    #[arg(long, env = "MESH_REPLICAS", value_name = "R", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    replicas: u16,
    /// The data plane: local, or what separate processes would use.
    #[arg(long, env = "MESH_TRANSPORT", value_name = "local|auto|tcp|ucx", default_value = "local")]
    transport: TransportChoice,
    /// The type that operands are held in.
    #[arg(long, env = "MESH_DTYPE", value_name = "f32|bf16", default_value = "bf16")]
    dtype: Dtype,
    /// Where the router listens for clients; port 0 takes a free one.
    #[arg(long, env = "MESH_GRPC", value_name = "ADDR", default_value = "127.0.0.1:7700")]
    grpc: SocketAddr,
    /// Compute threads of each node; by default as many as there are processors, which the nodes take in turns.
    #[arg(long, env = "MESH_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Leave it to the system on which processors threads run, rather than bind each to one.
    #[arg(long)]
    no_bind: bool,
    /// Keep packed weights in this directory, as many bytes as the mesh holds: the next start maps them and serves at
    /// once.
    #[arg(long, env = "MESH_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Pages of KV cache on each attention node.
    #[arg(long, env = "MESH_KV_PAGES", value_name = "N")]
    kv_pages: Option<u32>,
    /// Prompt tokens that a request may add to one step.
    #[arg(long, env = "MESH_PREFILL_CHUNK", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    prefill_chunk: Option<u32>,
    /// Rows that a micro-batch has at least; by default so many that an expert gets 64 of them on average.
    #[arg(long, env = "MESH_MICRO_BATCH_ROWS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    micro_batch_rows: Option<u32>,
    /// FOR TESTS AND DRILLS ONLY: have attention nodes harm their frames, as seed=7,drop=0.001,delay=0.01:2ms-20ms.
    #[arg(long, env = "MESH_FAULTS", value_name = "SPEC")]
    faults: Option<FaultSpec>,
    /// How long the mesh may take until it serves, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    start_timeout: u64,
    #[command(flatten)]
    log: LogArgs,
}

impl Flags {
    fn config(self) -> LocalMeshConfig {
        let mut config =
            LocalMeshConfig::new(self.model, self.attention, self.experts).transport(self.transport).dtype(self.dtype);
        if let Some(threads) = self.threads {
            config = config.threads(threads.into());
        }
        config.bind = !self.no_bind;
        config.attention_node.cache_dir.clone_from(&self.cache_dir);
        config.expert_node.cache_dir = self.cache_dir;
        if let Some(pages) = self.kv_pages {
            config.attention_node.kv = KvBudget::Pages(pages);
        }
        if let Some(tokens) = self.prefill_chunk {
            config.attention_node.limits.prefill_chunk = tokens;
        }
        config.attention_node.micro_batch_rows_min = self.micro_batch_rows.map(|rows| rows as usize);
        config.attention_node.faults = self.faults;
        config.router.replicas = self.replicas.into();
        config.grpc = self.grpc;
        config.start_max = Duration::from_secs(self.start_timeout);
        config
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
    runtime.block_on(serve(flags.config()))
}

async fn serve(config: LocalMeshConfig) -> ExitCode {
    let stop = match shutdown::on_signals() {
        Ok(stop) => stop,
        Err(error) => {
            tracing::error!(%error, "no signals");
            return ExitCode::FAILURE;
        }
    };
    let started = tokio::select! {
        started = LocalMesh::start(config) => started,
        () = stop.cancelled() => return ExitCode::SUCCESS,
    };
    let mut mesh = match started {
        Ok(mesh) => mesh,
        Err(error) if error.is_configuration() => return config::refuse(&error),
        Err(error) => {
            tracing::error!(%error, "the mesh did not come to serve");
            return ExitCode::FAILURE;
        }
    };
    ready::print(&ready_line(&mesh));
    let mut outcome = ExitCode::SUCCESS;
    loop {
        let end = tokio::select! {
            end = mesh.next_end() => end,
            () = stop.cancelled() => break,
        };
        let error = end.error.map_or_else(|| "it stopped".to_owned(), |e| e.to_string());
        tracing::error!(node = %end.id, error, "a node ended; the mesh goes on as far as it can");
        if end.is_router {
            outcome = ExitCode::FAILURE;
            break;
        }
    }
    for node in mesh.stop().await {
        tracing::warn!(node, "did not stop in time and is left behind");
    }
    outcome
}

/// The line of a mesh that serves, as `meshctl up` prints it for separate processes.
#[derive(Serialize)]
struct ReadyLine {
    ready: bool,
    grpc: String,
    nodes: Vec<NodeLine>,
}

/// A node in the ready line.
#[derive(Serialize)]
struct NodeLine {
    role: &'static str,
    id: String,
    pid: u32,
    addr: String,
}

fn ready_line(mesh: &LocalMesh) -> String {
    let pid = std::process::id();
    let node = |NodeInfo { role, id, addr }| NodeLine { role, id, pid, addr };
    let nodes = mesh.nodes().into_iter().map(node).collect();
    let line = ReadyLine { ready: true, grpc: mesh.grpc_addr().to_string(), nodes };
    serde_json::to_string(&line).expect("strings and numbers are always JSON")
}
