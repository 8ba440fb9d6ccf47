//! `router-svc`: the router as a process of its own.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use mesh_service::telemetry::LogArgs;
use mesh_service::{config, ready, shutdown};
use router_svc::RouterConfig;
use tokio::net::TcpListener;

/// The front door and control plane of an Expert Mesh.
#[derive(Debug, Parser)]
#[command(name = "router-svc", version)]
struct Flags {
    /// Where clients and nodes connect; port 0 takes a free one.
    #[arg(long, env = "MESH_GRPC", default_value = "127.0.0.1:50051", value_name = "ADDR")]
    grpc: SocketAddr,
    /// Attention nodes that the first view waits for.
    #[arg(long, env = "MESH_ATTENTION_MIN", default_value_t = 1, value_name = "N")]
    attention_min: usize,
    /// Expert nodes that the first view waits for.
    #[arg(long, env = "MESH_EXPERTS_MIN", default_value_t = 1, value_name = "N")]
    experts_min: usize,
    /// Nodes that hold each expert.
    #[arg(long, env = "MESH_REPLICAS", default_value_t = 1, value_name = "N")]
    replicas: usize,
    /// Further copies that the hottest experts get, over all layers.
    #[arg(long, env = "MESH_HOT_REPLICAS", default_value_t = 0, value_name = "N",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(..=1 << 20))]
    hot_replicas: usize,
    /// Bytes of experts that one change of the view loads at most, beside experts that nobody holds.
    #[arg(long, env = "MESH_MOVES_BYTES_MAX", default_value_t = RouterConfig::default().moves_bytes_max, value_name = "BYTES")]
    moves_bytes_max: u64,
    /// How long a lost expert node may come back before its copies are made elsewhere, as long as all experts have other
    /// holders, milliseconds.
    #[arg(long, env = "MESH_ABSENCE_MS", default_value_t = RouterConfig::default().absence_max.as_millis() as u64, value_name = "MS")]
    absence_ms: u64,
    /// Requests at once; more are refused as overload.
    #[arg(long, env = "MESH_REQUESTS_MAX", default_value_t = RouterConfig::default().requests_max, value_name = "N")]
    requests_max: usize,
    /// How often nodes send heartbeats, milliseconds.
    #[arg(long, env = "MESH_HEARTBEAT_MS", default_value_t = 500, value_name = "MS")]
    heartbeat_ms: u32,
    /// How long a node is trusted without a heartbeat, milliseconds.
    #[arg(long, env = "MESH_LEASE_MS", default_value_t = 10_000, value_name = "MS")]
    lease_ms: u32,
    #[command(flatten)]
    log: LogArgs,
}

impl Flags {
    fn config(&self) -> RouterConfig {
        RouterConfig {
            attention_min: self.attention_min,
            experts_min: self.experts_min,
            replicas: self.replicas,
            requests_max: self.requests_max,
            hot_replicas: self.hot_replicas,
            moves_bytes_max: self.moves_bytes_max,
            absence_max: Duration::from_millis(self.absence_ms),
            heartbeat: Duration::from_millis(self.heartbeat_ms.into()),
            lease: Duration::from_millis(self.lease_ms.into()),
            ..RouterConfig::default()
        }
    }
}

/// How long an address that is in use is tried.
const LISTEN_FOR: Duration = Duration::from_secs(5);
/// How often.
const LISTEN_EVERY: Duration = Duration::from_millis(50);

/// Listens. A router that is started again at the address of one that died may find it taken for a moment: by that one, or by
/// a node whose call to it was given the same port for its own end.
async fn listen(addr: SocketAddr) -> std::io::Result<TcpListener> {
    let until = Instant::now() + LISTEN_FOR;
    let mut told = false;
    loop {
        match TcpListener::bind(addr).await {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < until => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%addr, for_s = LISTEN_FOR.as_secs(), "the address is in use; trying on");
                }
                tokio::time::sleep(LISTEN_EVERY).await;
            }
            listening => return listening,
        }
    }
}

async fn run(flags: Flags, router: RouterConfig) -> Result<(), Box<dyn std::error::Error>> {
    // Watched from before the ready line on, so that no parent's signal comes too early.
    let stop = shutdown::on_signals()?;
    let listener = listen(flags.grpc).await.map_err(|e| format!("cannot listen on {}: {e}", flags.grpc))?;
    let addr = listener.local_addr()?;
    tracing::info!(%addr, ?router, "router listening");
    let ready = serde_json::json!({ "ready": "router", "grpc": addr.to_string() });
    ready::print(&ready.to_string());
    router_svc::serve(router, listener, stop.cancelled_owned()).await?;
    tracing::info!("router stopped");
    Ok(())
}

fn main() -> ExitCode {
    let flags: Flags = config::parse();
    let router = flags.config();
    if let Err(mistake) = router.validate() {
        return config::refuse(&mistake);
    }
    if let Err(mistake) = flags.log.init() {
        return config::refuse(&mistake);
    }
    // One thread: the router moves small messages, and the cores belong to the nodes.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "no runtime");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(flags, router)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "router failed");
            ExitCode::FAILURE
        }
    }
}
