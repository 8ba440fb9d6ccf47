//! The router and the nodes' own side of the control plane, which the daemons use, with each other.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_core::view::View;
use mesh_core::{Role, Slot, ViewId};
use mesh_proto::v1;
use mesh_service::membership::{NodeSpec, SlotWish, ViewTarget, register};
use mesh_service::{BoxFuture, ServiceError};
use router_svc::RouterConfig;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::harness::{Router, calm, eventually, registration, soon};

/// A target that takes every view, and the last one in force.
#[derive(Default)]
struct Target {
    prepared: Mutex<Option<Arc<View>>>,
    in_force: Mutex<Option<Arc<View>>>,
}

impl ViewTarget for Target {
    fn prepare(&self, view: Arc<View>) -> BoxFuture<'_, Result<(), String>> {
        *self.prepared.lock().unwrap() = Some(view);
        Box::pin(async { Ok(()) })
    }

    fn commit(&self, view: ViewId) -> BoxFuture<'_, Result<(), String>> {
        let prepared = self.prepared.lock().unwrap().take().filter(|v| v.id == view);
        let known = prepared.is_some();
        *self.in_force.lock().unwrap() = prepared;
        Box::pin(async move { if known { Ok(()) } else { Err(format!("{view} was not prepared")) } })
    }

    fn abandon(&self, _: ViewId) {
        self.prepared.lock().unwrap().take();
    }

    fn load(&self) -> v1::NodeLoad {
        v1::NodeLoad { kv_blocks_free: 77, ..Default::default() }
    }
}

struct Member {
    target: Arc<Target>,
    leave: CancellationToken,
    run: JoinHandle<Result<(), ServiceError>>,
}

async fn join(router: &Router, role: Role) -> Result<Member, ServiceError> {
    let like = registration(role.into());
    let spec = NodeSpec {
        role,
        name: "member".into(),
        router: format!("http://{}", router.addr),
        model_digest: [5; 32],
        model: like.model.unwrap(),
        addr: "http://127.0.0.1:9".into(),
        transport: like.transport,
        compute: like.compute,
        protocol: like.protocol,
        slot: SlotWish::Must(Slot(0)),
        capacity_bytes: 0,
    };
    let registered = register(&spec, Duration::from_secs(30)).await?;
    let (target, leave) = (Arc::<Target>::default(), CancellationToken::new());
    let (following, stop) = (target.clone(), leave.clone());
    let run = tokio::spawn(async move {
        let (_no_evidence, mut evidence) = mpsc::channel(1);
        registered.run(following, &mut evidence, stop, Duration::from_secs(30)).await
    });
    Ok(Member { target, leave, run })
}

#[tokio::test]
async fn members_keep_their_lease_follow_views_and_leave_in_order() {
    // A lease that lapses during the test if heartbeats do not come through.
    let config = RouterConfig { heartbeat: Duration::from_millis(50), lease: Duration::from_secs(5), ..calm() };
    let router = Router::start(config).await;
    let attention = join(&router, Role::Attention).await.unwrap();
    let expert = join(&router, Role::Expert).await.unwrap();
    router.view(1).await;
    for target in [&attention.target, &expert.target] {
        let id = target.in_force.lock().unwrap().as_ref().map(|v| v.id);
        assert_eq!(id, Some(ViewId(1)));
    }
    eventually("a heartbeat", async || {
        router.status().await.nodes.iter().all(|n| n.load.as_ref().is_some_and(|l| l.kv_blocks_free == 77))
    })
    .await;
    let refused = join(&router, Role::Expert).await.err().unwrap().to_string();
    assert!(refused.contains("SLOT_TAKEN") || refused.contains("taken"), "{refused}");
    expert.leave.cancel();
    soon("the expert's leave", expert.run).await.unwrap().unwrap();
    eventually("its absence", async || router.status().await.nodes.len() == 1).await;
    assert!(!router.status().await.serving);
    let _again = join(&router, Role::Expert).await.unwrap();
    router.view(2).await;
    router.stop.cancel();
    let ended = soon("the attention node's dismissal", attention.run).await.unwrap();
    assert!(matches!(ended, Err(ServiceError::Dismissed { .. })), "{ended:?}");
}
