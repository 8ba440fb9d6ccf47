//! The service that clients call: admission, choice of the attention node, and the router's status.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_proto::v1::mesh_server::Mesh as MeshApi;
use mesh_proto::{Code, MeshError, convert, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::config::RouterConfig;
use crate::membership::Node;
use crate::mesh::Mesh;
use crate::plane::{Plane, Routing};
use crate::relay::{Relay, RelayLimits, Relaying};
use crate::validate;

/// How long before its deadline a request is ended, so that the typed error is there before gRPC's own.
const DEADLINE_MARGIN: Duration = Duration::from_millis(5);
/// Longest deadline that is kept; a longer one is as good as none.
const DEADLINE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// How long a call waits for a node to be drained.
const DRAIN_WAIT_MAX: Duration = Duration::from_secs(300);
/// How often it looks.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// Requests of this router.
#[derive(Debug, Default)]
struct Requests {
    active: AtomicU64,
    total: AtomicU64,
}

/// A request's place among those admitted; dropping it gives the place back.
#[derive(Debug)]
pub struct Admitted {
    requests: Arc<Requests>,
    _permit: OwnedSemaphorePermit,
    /// Its count at the attention node that was chosen.
    routing: Option<Routing>,
}

impl Admitted {
    /// The request is counted at the attention node that was chosen, and no more at the one before.
    pub fn routed(&mut self, routing: Routing) {
        self.routing = Some(routing);
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.requests.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The `Mesh` service.
#[derive(Debug)]
pub struct FrontDoor {
    plane: Arc<Plane>,
    stopping: CancellationToken,
    places: Arc<Semaphore>,
    requests: Arc<Requests>,
    requests_max: usize,
    limits: RelayLimits,
}

impl FrontDoor {
    /// The front door of a router; `stopping` ends every request.
    pub fn new(plane: Arc<Plane>, config: &RouterConfig, stopping: CancellationToken) -> Self {
        Self {
            plane,
            stopping,
            places: Arc::new(Semaphore::new(config.requests_max)),
            requests: Arc::default(),
            requests_max: config.requests_max,
            limits: RelayLimits {
                stall_max: config.stall_max,
                wait_for_view_max: config.wait_for_view_max,
                move_max: config.move_max,
                quiet_max: config.quiet_max,
            },
        }
    }

    fn admit(&self) -> Result<Admitted, MeshError> {
        let permit = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            let what = format!(
                "{} requests are being served, which is this router's limit; try again later",
                self.requests_max
            );
            MeshError::new(Code::Overloaded, what)
        })?;
        self.requests.active.fetch_add(1, Ordering::Relaxed);
        self.requests.total.fetch_add(1, Ordering::Relaxed);
        Ok(Admitted { requests: Arc::clone(&self.requests), _permit: permit, routing: None })
    }

    async fn open(&self, mut request: v1::GenerateRequest, deadline: Option<Instant>) -> Result<Relay, MeshError> {
        validate::check(&request)?;
        let admitted = self.admit()?;
        name(&mut request)?;
        let (plane, stopping) = (Arc::clone(&self.plane), self.stopping.clone());
        Relaying::new(plane, request, admitted, stopping, deadline, self.limits).open().await
    }
}

/// Gives the request an id and a seed where the client named none.
fn name(request: &mut v1::GenerateRequest) -> Result<(), MeshError> {
    let random = || getrandom::u64().map_err(|e| MeshError::new(Code::Internal, format!("no random bytes: {e}")));
    if request.request_id.is_empty() {
        request.request_id = format!("req-{:016x}", random()?);
    }
    let sampling = request.sampling.get_or_insert_default();
    if sampling.seed.is_none() {
        sampling.seed = Some(random()?);
    }
    Ok(())
}

/// The client's deadline, if it sent one.
fn deadline(metadata: &MetadataMap, now: Instant) -> Option<Instant> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount: u32 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    let unit = match unit {
        "H" => Duration::from_secs(3600),
        "M" => Duration::from_secs(60),
        "S" => Duration::from_secs(1),
        "m" => Duration::from_millis(1),
        "u" => Duration::from_micros(1),
        "n" => Duration::from_nanos(1),
        _ => return None,
    };
    let timeout = unit.saturating_mul(amount);
    (timeout <= DEADLINE_MAX).then(|| now + timeout.saturating_sub(DEADLINE_MARGIN))
}

#[tonic::async_trait]
impl MeshApi for FrontDoor {
    type GenerateStream = Relay;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Relay>, Status> {
        let deadline = deadline(request.metadata(), Instant::now());
        let relay = self.open(request.into_inner(), deadline).await;
        Ok(Response::new(relay.inspect_err(|error| tracing::debug!(%error, "request refused"))?))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let (id, node) = self.plane.drain(&request.into_inner().node)?;
        let until = Instant::now() + DRAIN_WAIT_MAX;
        // Few drains are under way at a time, and each takes as long as loading what the node holds.
        while self.plane.read(|mesh| mesh.members().get(id).is_some()) {
            if Instant::now() >= until {
                let what = format!("{node} is not handed over after {DRAIN_WAIT_MAX:?}; it goes on being drained");
                return Err(MeshError::new(Code::Deadline, what).at_node(node).into());
            }
            tokio::time::sleep(DRAIN_POLL).await;
        }
        let view = self.plane.read(|mesh| mesh.view().map_or(0, |v| v.id.0));
        Ok(Response::new(v1::DrainResponse { node, view }))
    }

    async fn rebalance(
        &self,
        request: Request<v1::RebalanceRequest>,
    ) -> Result<Response<v1::RebalanceResponse>, Status> {
        Ok(Response::new(self.plane.rebalance(request.into_inner().dry_run)?))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let now = Instant::now();
        let mut response = self.plane.read(|mesh| status(mesh, now));
        response.requests_active = self.requests.active.load(Ordering::Relaxed);
        response.requests_total = self.requests.total.load(Ordering::Relaxed);
        Ok(Response::new(response))
    }
}

fn status(mesh: &Mesh, now: Instant) -> v1::StatusResponse {
    let members = mesh.members();
    let mut nodes: Vec<&Node> = members.iter().filter(|n| n.is_live()).collect();
    nodes.sort_by_key(|n| (n.role(), n.slot));
    v1::StatusResponse {
        serving: mesh.is_serving(),
        view: mesh.view().map_or(0, |v| v.id.0),
        nodes: nodes.into_iter().map(|n| node_status(n, now)).collect(),
        placement: mesh.view().map_or_else(Vec::new, |v| convert::placement_to_wire(&v.placement)),
        model: members.sameness().map(|n| n.registration.sameness.model.clone()),
        requests_active: 0,
        requests_total: 0,
        moved: Some(mesh.moved()),
    }
}

fn node_status(node: &Node, now: Instant) -> v1::NodeStatus {
    let registration = &node.registration;
    v1::NodeStatus {
        node: node.id.0,
        role: node.role().to_string(),
        slot: node.slot.0.into(),
        pid: registration.pid,
        addr: registration.addr.clone(),
        transport: registration.transport.clone(),
        compute: registration.sameness.compute.clone(),
        load: Some(node.load.clone()),
        since_heartbeat_ms: now.saturating_duration_since(node.heard).as_millis() as u64,
        name: registration.name.clone(),
        draining: node.draining,
        speed: node.speed as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_as_grpc_writes_them() {
        let now = Instant::now();
        let after = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            deadline(&metadata, now).map(|at| at - now + DEADLINE_MARGIN)
        };
        assert_eq!(after("2S"), Some(Duration::from_secs(2)));
        assert_eq!(after("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(after("1H"), Some(Duration::from_secs(3600)));
        for none in ["", "S", "2x", "-2S", "123456789S", "99999999H"] {
            assert_eq!(after(none), None, "{none}");
        }
        assert_eq!(deadline(&MetadataMap::new(), now), None);
    }

    #[test]
    fn a_request_without_a_name_gets_one_and_a_seed_and_keeps_its_own() {
        let mut request = v1::GenerateRequest::default();
        name(&mut request).unwrap();
        let first = request.clone();
        assert!(first.request_id.starts_with("req-") && first.sampling.unwrap().seed.is_some());
        name(&mut request).unwrap();
        assert_eq!(request, first);
    }
}
