//! Registration: retried while the router is not up yet, given up at once when it refuses.

use std::time::{Duration, Instant};

use mesh_core::{NodeId, Slot};
use mesh_proto::v1::control_client::ControlClient;
use mesh_proto::{Code, MeshError, convert, v1};
use tonic::transport::{Channel, Endpoint};

use super::{NodeSpec, SlotWish};
use crate::ServiceError;

/// How long one attempt to connect may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long the router may take to answer a registration.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// The first pause between attempts; each is twice the one before.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// The longest pause between attempts.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often an idle connection is checked for life, and how long an answer to that may take.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// A node that the router took. [`Registration::run`] keeps it a member; dropped, its lease runs out.
#[derive(Debug)]
pub struct Registration {
    /// Its identity.
    pub node: NodeId,
    /// Its number in its group.
    pub slot: Slot,
    /// The mesh's data-plane secret.
    pub secret: [u8; 32],
    /// How often it must be heard.
    pub heartbeat: Duration,
    /// How long it may be silent.
    pub lease: Duration,
    pub(super) token: Vec<u8>,
    pub(super) uri: String,
    pub(super) client: ControlClient<Channel>,
}

/// Why an attempt failed, and whether another may succeed.
enum Attempt {
    NotYet(String),
    Never(ServiceError),
}

/// Registers with the router that `spec` names, trying for `retry_for` while nobody answers there.
///
/// # Errors
/// [`ServiceError`]: refusals at once, silence after `retry_for`.
pub async fn register(spec: &NodeSpec, retry_for: Duration) -> Result<Registration, ServiceError> {
    let endpoint = Endpoint::from_shared(spec.router.clone())
        .map_err(|e| ServiceError::RouterUri { uri: spec.router.clone(), reason: e.to_string() })?
        .connect_timeout(CONNECT_MAX)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    let started = Instant::now();
    let mut pause = PAUSE_MIN;
    loop {
        let last = match attempt(spec, &endpoint).await {
            Ok(registration) => {
                let Registration { node, slot, .. } = &registration;
                tracing::info!(router = %spec.router, node = node.0, slot = slot.0, role = %spec.role, "registered");
                return Ok(registration);
            }
            Err(Attempt::Never(error)) => return Err(error),
            Err(Attempt::NotYet(last)) => last,
        };
        let waited = started.elapsed();
        if waited + pause > retry_for {
            return Err(ServiceError::RouterSilent { uri: spec.router.clone(), waited, last });
        }
        tracing::debug!(router = %spec.router, %last, "router is not up yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn attempt(spec: &NodeSpec, endpoint: &Endpoint) -> Result<Registration, Attempt> {
    let channel = endpoint.connect().await.map_err(|e| Attempt::NotYet(whole(&e)))?;
    let mut client = ControlClient::new(channel);
    let answer = tokio::time::timeout(ANSWER_MAX, client.register(request(spec))).await;
    let Ok(answer) = answer else { return Err(Attempt::NotYet(format!("no answer within {ANSWER_MAX:?}"))) };
    let answer = answer.map_err(|status| {
        let error = MeshError::from_status(&status);
        match error.code {
            Code::NotServing | Code::NodeLost | Code::Overloaded | Code::Deadline => Attempt::NotYet(error.to_string()),
            // No word of the router's: it died meanwhile.
            _ if broke_off(&status) => Attempt::NotYet(error.to_string()),
            _ => Attempt::Never(ServiceError::Refused { uri: spec.router.clone(), error }),
        }
    })?;
    accepted(spec, client, answer.into_inner()).map_err(Attempt::Never)
}

/// Whether a call ended with its connection rather than with an answer.
pub(super) fn broke_off(status: &tonic::Status) -> bool {
    use tonic::Code as Grpc;
    let broken = matches!(status.code(), Grpc::Unavailable | Grpc::Unknown | Grpc::Cancelled | Grpc::Internal);
    broken && MeshError::detail(status).is_none()
}

fn request(spec: &NodeSpec) -> v1::RegisterRequest {
    let (slot, slot_optional) = match spec.slot {
        SlotWish::Any => (None, false),
        SlotWish::Must(slot) => (Some(slot.0.into()), false),
        SlotWish::Rather(slot) => (Some(slot.0.into()), true),
    };
    v1::RegisterRequest {
        role: v1::NodeRole::from(spec.role).into(),
        name: spec.name.clone(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: spec.protocol,
        model_digest: spec.model_digest.to_vec(),
        model: Some(spec.model.clone()),
        addr: spec.addr.clone(),
        transport: spec.transport.clone(),
        compute: spec.compute.clone(),
        slot,
        capacity_bytes: spec.capacity_bytes,
        slot_optional,
    }
}

fn accepted(
    spec: &NodeSpec,
    client: ControlClient<Channel>,
    answer: v1::RegisterResponse,
) -> Result<Registration, ServiceError> {
    let broken = |what: String| ServiceError::Protocol { uri: spec.router.clone(), what };
    let slot = convert::slot("slot", answer.slot).map_err(|e| broken(e.to_string()))?;
    let secret = convert::bytes32("secret", &answer.secret).map_err(|e| broken(e.to_string()))?;
    if answer.heartbeat_ms == 0 || answer.lease_ms <= answer.heartbeat_ms {
        let (heartbeat, lease) = (answer.heartbeat_ms, answer.lease_ms);
        return Err(broken(format!("a heartbeat of {heartbeat} ms does not keep a lease of {lease} ms")));
    }
    Ok(Registration {
        node: NodeId(answer.node),
        slot,
        secret,
        heartbeat: Duration::from_millis(answer.heartbeat_ms.into()),
        lease: Duration::from_millis(answer.lease_ms.into()),
        token: answer.token,
        uri: spec.router.clone(),
        client,
    })
}

/// An error with its causes: tonic's own text is only "transport error".
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}
