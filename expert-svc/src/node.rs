//! The assembly: open the checkpoint, bind the data plane, register, serve.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::{NodeId, Role, Slot};
use mesh_kernels::Compute;
use mesh_kernels::cpu::{Cpu, CpuOptions};
use mesh_kernels::packed::Packer;
use mesh_model::{Checkpoint, ModelConfig};
use mesh_proto::v1;
use mesh_service::advertise;
use mesh_service::membership::{NodeSpec, Registration, SlotWish, register};
use mesh_transport::frame::{PROTOCOL_VERSION, dispatch_body_bytes};
use mesh_transport::{Bound, Credentials, Identity, TransportKind, choose, fault};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::ExpertConfig;
use crate::counters::Counters;
use crate::engine::{Engine, EngineHandle, EngineParts};
use crate::error::ExpertError;
use crate::load::Loader;
use crate::table::{ExpertTable, Tables};
use crate::views::ExpertViews;

/// An expert node that is registered and whose engine runs; it serves once it has a view.
pub struct ExpertNode {
    config: ExpertConfig,
    loader: Arc<Loader>,
    compute: Arc<dyn Compute>,
    counters: Arc<Counters>,
    member: Member,
    addr: String,
}

/// What a membership consists of; a node that registers again makes it anew and keeps the rest.
struct Member {
    registration: Registration,
    views: Arc<ExpertViews>,
    tables: Arc<Tables>,
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
        let checkpoint = Checkpoint::open(&config.model_dir)?;
        if checkpoint.config().moe_layers().is_empty() {
            return Err(ExpertError::NoExperts { dir: config.model_dir.display().to_string() });
        }
        let threads = if config.threads == 0 { processors() } else { config.threads };
        let compute =
            Cpu::new(CpuOptions { dtype: config.dtype, threads, isa: config.isa, bind_from: config.bind_from })?;
        let compute: Arc<dyn Compute> = Arc::new(compute);
        tracing::info!(model = %config.model_dir.display(), compute = %compute.name(), "checkpoint opened");
        let packer = match &config.cache_dir {
            None => Packer::new(compute.clone()),
            Some(dir) => Packer::with_cache(compute.clone(), dir, &checkpoint.content())?,
        };
        let loader = Arc::new(Loader::new(checkpoint, packer, config.capacity_bytes));
        check_frame_size(&config, loader.shape().row_bytes)?;
        let counters = Arc::new(Counters::new(loader.shape().len(), loader.expert_bytes()));
        let member = join(&config, &loader, &compute, &counters, config.register_for, None).await?;
        let addr = member.addr.clone();
        Ok(Self { config, loader, compute, counters, member, addr })
    }

    /// The node's identity.
    pub fn id(&self) -> NodeId {
        self.member.registration.node
    }

    /// The node's slot.
    pub fn slot(&self) -> Slot {
        self.member.registration.slot
    }

    /// Where attention nodes connect.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// What the node has done.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Serves until `shutdown` is cancelled and the router has handed over what the node holds, or dismisses it. A node that
    /// loses its membership keeps its experts and registers again.
    ///
    /// # Errors
    /// [`ExpertError`] when the router cannot be had again or the engine dies.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), ExpertError> {
        let Self { config, loader, compute, counters, mut member, .. } = self;
        // An expert node connects to nobody and so has no evidence: the sender stays here, unused.
        let (_evidence, mut evidence_rx) = mpsc::channel(1);
        loop {
            let Member { registration, views, tables, engine, engine_ended, .. } = member;
            let slot = registration.slot;
            let lease = registration.run(views, &mut evidence_rx, shutdown.clone(), config.drain_max);
            let ended = tokio::select! {
                ended = lease => ended.map_err(ExpertError::from),
                () = engine_ended.cancelled() => Ok(()),
            };
            let stopped = engine.stop();
            let lost = match (ended, stopped) {
                (Err(ExpertError::Service(error)), Ok(())) if error.may_rejoin() => error,
                (ended, stopped) => {
                    tracing::info!("expert node stopped");
                    return ended.and(stopped);
                }
            };
            tracing::warn!(error = %lost, "membership lost; registering again");
            let before = Some((slot, tables.take()));
            let joined = join(&config, &loader, &compute, &counters, config.rejoin_for, before);
            member = tokio::select! {
                member = joined => member?,
                () = shutdown.cancelled() => return Ok(()),
            };
        }
    }
}

/// Binds, registers and starts an engine. A node that was a member `before` would have its slot again, and does not load again
/// what it holds.
async fn join(
    config: &ExpertConfig,
    loader: &Arc<Loader>,
    compute: &Arc<dyn Compute>,
    counters: &Arc<Counters>,
    register_for: Duration,
    before: Option<(Slot, Vec<Arc<ExpertTable>>)>,
) -> Result<Member, ExpertError> {
    let host = advertise::host(&config.listen, config.advertise.as_ref()).await?;
    let bound = bind(config)?;
    let addr = advertise::address(bound.local_addr(), host.as_ref());
    tracing::info!(bound = bound.local_addr(), %addr, "data plane bound");
    let mut spec = spec(config, loader, &addr);
    let kept = before.map_or_else(Vec::new, |(slot, kept)| {
        spec.slot = SlotWish::Rather(slot);
        kept
    });
    let registration = register(&spec, register_for).await?;
    let (node, slot) = (registration.node, registration.slot);
    let identity = Identity { node, role: Role::Expert, slot, model: spec.model_digest };
    let transport = bound.start(Credentials { secret: registration.secret, identity })?;
    let transport = fault::wrap(transport, config.faults.as_ref());
    let tables = Arc::new(Tables::default());
    let engine = Engine::new(EngineParts {
        transport,
        compute: compute.clone(),
        tables: tables.clone(),
        counters: counters.clone(),
        shape: loader.shape().clone(),
        slot,
        limits: config.limits,
    });
    let engine_ended = CancellationToken::new();
    let ended = engine_ended.clone();
    let engine = engine.spawn(move || ended.cancel())?;
    let views =
        ExpertViews::new(loader.clone(), tables.clone(), counters.clone(), engine.waker(), slot, config.linger, kept);
    Ok(Member { registration, views: Arc::new(views), tables, engine, engine_ended, addr })
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
        slot: config.slot.into(),
        capacity_bytes: config.capacity_bytes,
    }
}
