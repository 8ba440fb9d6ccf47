//! The assembly: open the checkpoint, bind the data plane, register, serve.

use std::sync::Arc;

use mesh_core::{NodeId, Role, Slot};
use mesh_kernels::Compute;
use mesh_kernels::cpu::{Cpu, CpuOptions};
use mesh_kernels::packed::Packer;
use mesh_model::{Checkpoint, ModelConfig};
use mesh_proto::v1;
use mesh_service::advertise;
use mesh_service::membership::{NodeSpec, Registration, register};
use mesh_transport::frame::{PROTOCOL_VERSION, dispatch_body_bytes};
use mesh_transport::{Bound, Credentials, Identity, TransportKind, choose};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::ExpertConfig;
use crate::counters::Counters;
use crate::engine::{Engine, EngineHandle, EngineParts};
use crate::error::ExpertError;
use crate::load::Loader;
use crate::table::Tables;
use crate::views::ExpertViews;

/// An expert node that is registered and whose engine runs; it serves once it has a view.
pub struct ExpertNode {
    registration: Registration,
    views: Arc<ExpertViews>,
    counters: Arc<Counters>,
    engine: EngineHandle,
    engine_ended: CancellationToken,
    addr: String,
}

/// [`ExpertNode::start`], then [`ExpertNode::serve`].
///
/// # Errors
/// [`ExpertError`].
pub async fn run(config: ExpertConfig, shutdown: CancellationToken) -> Result<(), ExpertError> {
    let node = tokio::select! {
        node = ExpertNode::start(config) => node?,
        () = shutdown.cancelled() => return Ok(()),
    };
    node.serve(shutdown).await
}

impl ExpertNode {
    /// Opens, binds, registers, and starts the engine.
    ///
    /// # Errors
    /// [`ExpertError`].
    pub async fn start(config: ExpertConfig) -> Result<Self, ExpertError> {
        let host = advertise::host(&config.listen, config.advertise.as_ref()).await?;
        let checkpoint = Checkpoint::open(&config.model_dir)?;
        if checkpoint.config().moe_layers().is_empty() {
            return Err(ExpertError::NoExperts { dir: config.model_dir.display().to_string() });
        }
        let threads = if config.threads == 0 { processors() } else { config.threads };
        let compute = Cpu::new(CpuOptions { dtype: config.dtype, threads, isa: None, bind_from: config.bind_from })?;
        let compute: Arc<dyn Compute> = Arc::new(compute);
        tracing::info!(model = %config.model_dir.display(), compute = %compute.name(), "checkpoint opened");
        let packer = match &config.cache_dir {
            None => Packer::new(compute.clone()),
            Some(dir) => Packer::with_cache(compute.clone(), dir, &checkpoint.content())?,
        };
        let loader = Arc::new(Loader::new(checkpoint, packer, config.capacity_bytes));
        check_frame_size(&config, loader.shape().row_bytes)?;

        let bound = bind(&config)?;
        let addr = advertise::address(bound.local_addr(), host.as_ref());
        tracing::info!(bound = bound.local_addr(), %addr, "data plane bound");
        let spec = spec(&config, &loader, &addr);
        let registration = register(&spec, config.register_for).await?;
        let (node, slot) = (registration.node, registration.slot);
        let identity = Identity { node, role: Role::Expert, slot, model: spec.model_digest };
        let transport = bound.start(Credentials { secret: registration.secret, identity })?;

        let (tables, counters) = (Arc::new(Tables::default()), Arc::new(Counters::default()));
        let engine = Engine::new(EngineParts {
            transport,
            compute,
            tables: tables.clone(),
            counters: counters.clone(),
            shape: loader.shape().clone(),
            slot,
            limits: config.limits,
        });
        let engine_ended = CancellationToken::new();
        let ended = engine_ended.clone();
        let engine = engine.spawn(move || ended.cancel())?;
        let views = ExpertViews::new(loader, tables, counters.clone(), engine.waker(), slot, config.linger);
        Ok(Self { registration, views: Arc::new(views), counters, engine, engine_ended, addr })
    }

    /// The node's identity.
    pub fn id(&self) -> NodeId {
        self.registration.node
    }

    /// The node's slot.
    pub fn slot(&self) -> Slot {
        self.registration.slot
    }

    /// Where attention nodes connect.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// What the node has done.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Serves until `shutdown` is cancelled; the router is then told that the node leaves.
    ///
    /// # Errors
    /// [`ExpertError`] when the lease is lost or the engine dies.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), ExpertError> {
        // An expert node connects to nobody and so has no evidence: the sender stays here, unused.
        let (_evidence, evidence_rx) = mpsc::channel(1);
        let lease = self.registration.run(self.views, evidence_rx, shutdown);
        let ended = tokio::select! {
            ended = lease => ended.map_err(ExpertError::from),
            () = self.engine_ended.cancelled() => Ok(()),
        };
        let stopped = self.engine.stop();
        tracing::info!("expert node stopped");
        ended.and(stopped)
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A frame must take a row and its metadata at least.
fn check_frame_size(config: &ExpertConfig, row_bytes: usize) -> Result<(), ExpertError> {
    let body_bytes_max = config.transport_limits.body_bytes_max;
    match dispatch_body_bytes(1, 1, row_bytes).filter(|bytes| *bytes <= body_bytes_max) {
        Some(_) => Ok(()),
        None => Err(ExpertError::FrameTooSmall { row_bytes, body_bytes_max }),
    }
}

fn model_info(checkpoint: &Checkpoint, config: &ExpertConfig) -> v1::ModelInfo {
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

fn bind(config: &ExpertConfig) -> Result<Box<dyn Bound>, ExpertError> {
    let kind = choose(config.transport).kind;
    if kind == TransportKind::Local && config.hub.is_none() {
        return Err(ExpertError::NoHub);
    }
    Ok(mesh_transport::bind(kind, &config.listen, config.transport_limits.clone(), config.hub.clone())?)
}

fn spec(config: &ExpertConfig, loader: &Loader, addr: &str) -> NodeSpec {
    let checkpoint = loader.checkpoint();
    let transport = addr.split_once("://").map_or("", |(scheme, _)| scheme);
    NodeSpec {
        role: Role::Expert,
        name: config.name.clone(),
        router: config.router.clone(),
        model_digest: checkpoint.digest(),
        model: model_info(checkpoint, config),
        addr: addr.to_owned(),
        transport: transport.to_owned(),
        compute: loader.compute().kind(),
        protocol: PROTOCOL_VERSION.into(),
        slot: config.slot,
        capacity_bytes: config.capacity_bytes,
    }
}
