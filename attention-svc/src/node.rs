//! The assembly: open the checkpoint, load the trunk, register, start the engine, serve.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::{NodeId, Role, Slot};
use mesh_kernels::cpu::{Cpu, CpuOptions};
use mesh_kernels::packed::Packer;
use mesh_kernels::{Compute, KV_PAGE_TOKENS};
use mesh_model::{Checkpoint, ModelConfig, Tokenizer};
use mesh_proto::limits::MESSAGE_BYTES_MAX;
use mesh_proto::v1;
use mesh_proto::v1::attention_server::AttentionServer;
use mesh_service::advertise;
use mesh_service::membership::{Evidence, NodeSpec, Registration, SlotWish, register};
use mesh_transport::frame::PROTOCOL_VERSION;
use mesh_transport::{Credentials, Identity, Transport, TransportKind, choose, fault};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::config::AttentionConfig;
use crate::engine::{self, Engine, EngineHandle, EngineOptions};
use crate::error::AttentionError;
use crate::load;
use crate::request::RequestBounds;
use crate::runner::{Outside, Runner, RunnerOptions, Trunk};
use crate::service::AttentionService;
use crate::views::AttentionViews;

/// How long a connection may be silent before it is asked for a sign of life, and how long that may take.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Streams of one connection beside those that the engine takes: they get a typed refusal instead of silence.
const STREAMS_BESIDE: u32 = 256;
/// How long the engine may take to end: a step's wait for answers and a view's connecting are bounded by less.
const STOP_MAX: Duration = Duration::from_secs(30);

/// An attention node that is registered and whose engine runs; it serves once it has a view.
pub struct AttentionNode {
    config: AttentionConfig,
    spec: NodeSpec,
    registration: Registration,
    engine: Engine,
    /// What the engine saw of expert nodes.
    evidence: mpsc::Receiver<Evidence>,
    views: Arc<AttentionViews>,
    service: AttentionService,
    listener: TcpListener,
    addr: String,
}

/// [`AttentionNode::start`], then [`AttentionNode::serve`].
///
/// # Errors
/// [`AttentionError`].
pub async fn run(config: AttentionConfig, shutdown: CancellationToken) -> Result<(), AttentionError> {
    let node = tokio::select! {
        node = AttentionNode::start(config) => node?,
        () = shutdown.cancelled() => return Ok(()),
    };
    node.serve(shutdown).await
}

/// What is opened before the router is asked for anything.
struct Opened {
    trunk: Trunk,
    compute: Arc<dyn Compute>,
    tokenizer: Tokenizer,
    info: v1::ModelInfo,
    digest: [u8; 32],
}

impl AttentionNode {
    /// Opens, loads, listens, registers, and starts the engine.
    ///
    /// # Errors
    /// [`AttentionError`].
    pub async fn start(config: AttentionConfig) -> Result<Self, AttentionError> {
        config.validate()?;
        // Before the model is loaded, which may take minutes.
        let host = advertise::host(&config.listen, config.advertise.as_ref()).await?;
        let opening = config.clone();
        let opened = tokio::task::spawn_blocking(move || open(&opening)).await;
        let opened =
            opened.map_err(|e| AttentionError::Config { flag: "--model", what: format!("loading died: {e}") })??;
        let model = opened.trunk.config();
        let (kv_pages, kv_page_bytes) = load::kv_pages(model, config.dtype, config.kv, config.limits.running_max)?;
        let bounds = RequestBounds { vocab: model.vocab as u32, context: model.max_position as u32 };
        let (eos, moe_layers, experts) = (model.eos.clone(), model.moe_layers(), model.moe.experts);

        let (listener, bound) = listen(&config.listen).await?;
        let addr = advertise::address(&bound, host.as_ref());
        let kind = choose(config.transport).kind;
        let spec = spec(&config, &opened, &addr, kind);
        let registration = register(&spec, config.register_for).await?;
        let transport = transport(&config, &registration, &spec)?;
        let (outside, evidence) = Outside::new();
        let runner = runner(&config, opened.trunk, opened.compute, transport, registration.slot, kv_pages, outside)?;
        let counters = runner.counters();
        let options = EngineOptions {
            limits: config.limits,
            kv_pages,
            page_tokens: KV_PAGE_TOKENS as u32,
            vocab: bounds.vocab,
            eos,
            recovery_max: config.recovery_max,
        };
        let engine =
            engine::start(runner, options).map_err(|reason| AttentionError::Thread { thread: "engine", reason })?;
        let views = Arc::new(AttentionViews::new(engine.handle.clone(), counters, moe_layers, experts, kv_page_bytes));
        let service = AttentionService::new(engine.handle.clone(), opened.tokenizer, bounds, registration.slot);
        tracing::info!(slot = registration.slot.0, %bound, %addr, kv_pages, "attention node up");
        Ok(Self { config, spec, registration, engine, evidence, views, service, listener, addr })
    }

    /// The node's identity.
    pub fn id(&self) -> NodeId {
        self.registration.node
    }

    /// The node's slot.
    pub fn slot(&self) -> Slot {
        self.registration.slot
    }

    /// Where the router reaches the node, `http://host:port`.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// The engine, for its counters.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine.handle
    }

    /// Serves until `shutdown` is cancelled and the router has handed the node's requests over, or dismisses it; streams that
    /// are left have `drain_max` to end. A node that loses its membership keeps its weights and registers again.
    ///
    /// # Errors
    /// [`AttentionError`] when the router cannot be had again, the server fails or the engine dies.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), AttentionError> {
        let Self { config, spec, registration, engine, evidence, views, service, listener, .. } = self;
        let Engine { handle, mut ended } = engine;
        let closing = CancellationToken::new();
        let mut server = tokio::spawn(serve_grpc(service.clone(), listener, &config, closing.clone()));
        let membership = Membership { config: &config, spec: &spec, engine: &handle, views, service: &service };
        let lease = membership.keep(registration, evidence, shutdown);
        let outcome = tokio::select! {
            left = lease => left,
            _ = &mut ended => Err(AttentionError::EngineDied),
            served = &mut server => {
                handle.stop();
                return Err(AttentionError::Server(format!("it ended unasked: {served:?}")));
            }
        };
        closing.cancel();
        let drained = tokio::time::timeout(config.drain_max, &mut server).await.is_ok();
        handle.stop();
        if !drained {
            tracing::warn!(waited = ?config.drain_max, "streams are still open and are cut off");
            // The engine's end ends every stream; what then is still open is a connection that nobody uses.
            server.abort();
        }
        let stopped = stopped(ended).await;
        tracing::info!("attention node stopped");
        outcome.and(stopped)
    }
}

/// What stays when a membership is lost.
struct Membership<'a> {
    config: &'a AttentionConfig,
    spec: &'a NodeSpec,
    engine: &'a EngineHandle,
    views: Arc<AttentionViews>,
    service: &'a AttentionService,
}

impl Membership<'_> {
    /// Keeps the membership, and registers again when it is lost: with a data plane of its own, since identity and secret are
    /// new.
    async fn keep(
        self,
        mut registration: Registration,
        mut evidence: mpsc::Receiver<Evidence>,
        shutdown: CancellationToken,
    ) -> Result<(), AttentionError> {
        let Self { config, spec, engine, views, service } = self;
        loop {
            let anew = NodeSpec { slot: SlotWish::Rather(registration.slot), ..spec.clone() };
            let left = registration.run(views.clone(), &mut evidence, shutdown.clone(), config.drain_max).await;
            match left {
                Err(error) if error.may_rejoin() => {
                    tracing::warn!(%error, "membership lost; registering again");
                }
                left => return Ok(left?),
            }
            registration = tokio::select! {
                registration = register(&anew, config.rejoin_for) => registration?,
                () = shutdown.cancelled() => return Ok(()),
            };
            let slot = registration.slot;
            let transport = transport(config, &registration, spec)?;
            engine.rejoin(transport, slot).await.map_err(|_stopped| AttentionError::EngineDied)?;
            service.set_slot(slot);
        }
    }
}

/// Waits for the engine's thread, which may already be gone.
async fn stopped(mut ended: oneshot::Receiver<()>) -> Result<(), AttentionError> {
    if ended.is_terminated() {
        return Ok(());
    }
    match tokio::time::timeout(STOP_MAX, &mut ended).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_panicked)) => Err(AttentionError::EngineDied),
        Err(_) => {
            tracing::warn!(waited = ?STOP_MAX, "the engine does not end and is left behind");
            Ok(())
        }
    }
}

async fn listen(addr: &str) -> Result<(TcpListener, String), AttentionError> {
    let refused = |reason| AttentionError::Listen { addr: addr.to_owned(), reason };
    let listener = TcpListener::bind(addr).await.map_err(refused)?;
    let local = listener.local_addr().map_err(refused)?;
    Ok((listener, format!("http://{local}")))
}

fn open(config: &AttentionConfig) -> Result<Opened, AttentionError> {
    let checkpoint = Arc::new(Checkpoint::open(&config.model_dir)?);
    let tokenizer = Tokenizer::open(&config.model_dir)?;
    let threads = if config.threads == 0 { processors() } else { config.threads };
    let compute: Arc<dyn Compute> =
        Arc::new(Cpu::new(CpuOptions { dtype: config.dtype, threads, isa: config.isa, bind_from: config.bind_from })?);
    tracing::info!(model = %config.model_dir.display(), compute = %compute.name(), "checkpoint opened");
    let (info, digest) = (model_info(&checkpoint, config), checkpoint.digest());
    let packer = match &config.cache_dir {
        None => Packer::new(compute.clone()),
        Some(dir) => Packer::with_cache(compute.clone(), dir, &checkpoint.content())?,
    };
    let trunk = load::trunk(checkpoint, &packer)?;
    Ok(Opened { trunk, compute, tokenizer, info, digest })
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn spec(config: &AttentionConfig, opened: &Opened, addr: &str, kind: TransportKind) -> NodeSpec {
    NodeSpec {
        role: Role::Attention,
        name: config.name.clone(),
        router: config.router.clone(),
        model_digest: opened.digest,
        model: opened.info.clone(),
        addr: addr.to_owned(),
        transport: kind.to_string(),
        compute: opened.compute.kind(),
        protocol: PROTOCOL_VERSION.into(),
        slot: config.slot.into(),
        capacity_bytes: 0,
    }
}

fn model_info(checkpoint: &Checkpoint, config: &AttentionConfig) -> v1::ModelInfo {
    let model: &ModelConfig = checkpoint.config();
    v1::ModelInfo {
        name: checkpoint.name(),
        family: model.family.model_type().into(),
        dtype: config.dtype.to_string(),
        digest: checkpoint.digest().iter().map(|byte| format!("{byte:02x}")).collect(),
        layers: model.layers.len() as u32,
        moe_layers: model.moe_layers().iter().map(|l| l.0.into()).collect(),
        experts: model.moe.experts as u32,
        top_k: model.moe.top_k as u32,
        hidden: model.hidden as u32,
        context: model.max_position as u32,
        vocab: model.vocab as u32,
    }
}

/// The data plane of a membership.
fn transport(
    config: &AttentionConfig,
    registration: &Registration,
    spec: &NodeSpec,
) -> Result<Box<dyn Transport>, AttentionError> {
    let Registration { node, slot, secret, .. } = registration;
    let identity = Identity { node: *node, role: Role::Attention, slot: *slot, model: spec.model_digest };
    let credentials = Credentials { secret: *secret, identity };
    let kind = choose(config.transport).kind;
    let transport = mesh_transport::client(kind, config.transport_limits.clone(), config.hub.clone(), credentials)?;
    Ok(fault::wrap(transport, config.faults.as_ref()))
}

fn runner(
    config: &AttentionConfig,
    trunk: Trunk,
    compute: Arc<dyn Compute>,
    transport: Box<dyn Transport>,
    slot: Slot,
    kv_pages: u32,
    outside: Outside,
) -> Result<Runner, AttentionError> {
    let moe = trunk.config().moe;
    let rows_min = AttentionConfig::MICRO_BATCH_EXPERT_ROWS * moe.experts / moe.top_k.max(1);
    let options = RunnerOptions {
        slot,
        kv_pages: kv_pages as usize,
        micro_batches: config.micro_batches,
        micro_batch_rows_min: config.micro_batch_rows_min.unwrap_or(rows_min),
        silence_min: config.silence_min,
        answer_max: config.answer_max,
        connect_max: config.connect_max,
        body_bytes_max: config.transport_limits.body_bytes_max,
    };
    Ok(Runner::new(trunk, compute, transport, options, outside)?)
}

fn serve_grpc(
    service: AttentionService,
    listener: TcpListener,
    config: &AttentionConfig,
    closing: CancellationToken,
) -> impl Future<Output = Result<(), tonic::transport::Error>> + use<> {
    let service = AttentionServer::new(service)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let streams_max =
        config.limits.running_max.saturating_add(config.limits.waiting_max).saturating_add(STREAMS_BESIDE);
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(streams_max)
        // All of a router's clients may cancel at once: that is no attack.
        .http2_max_pending_accept_reset_streams(Some(streams_max as usize))
        .add_service(service)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), closing.cancelled_owned())
}
