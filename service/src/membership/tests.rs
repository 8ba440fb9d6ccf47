//! A node against a router that is played by the test.

use std::sync::Mutex;
use std::time::Duration;

use mesh_core::placement::Placement;
use mesh_core::view::Member;
use mesh_core::{LayerId, NodeId};
use mesh_proto::v1::control_server::{Control, ControlServer};
use mesh_proto::v1::node_message::Message as Up;
use mesh_proto::v1::router_message::Message as Down;
use mesh_proto::{Code, MeshError};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::ServiceError;

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

type Session = (Streaming<v1::NodeMessage>, mpsc::Sender<Result<v1::RouterMessage, Status>>);

/// Answers registrations as told, and hands sessions to the test.
struct FakeRouter {
    answer: Box<dyn Fn() -> Result<v1::RegisterResponse, Status> + Send + Sync>,
    sessions: mpsc::Sender<Session>,
}

#[tonic::async_trait]
impl Control for FakeRouter {
    async fn register(&self, _: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        (self.answer)().map(Response::new)
    }

    type SessionStream = ReceiverStream<Result<v1::RouterMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::NodeMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (down, rx) = mpsc::channel(16);
        let _ = self.sessions.send((request.into_inner(), down)).await;
        Ok(Response::new(ReceiverStream::new(rx)))
    }
}

fn taken() -> v1::RegisterResponse {
    v1::RegisterResponse {
        node: 7,
        slot: 2,
        token: vec![1, 2, 3],
        secret: vec![9; 32],
        heartbeat_ms: 20,
        lease_ms: 60_000,
    }
}

fn play(
    listener: TcpListener,
    answer: impl Fn() -> Result<v1::RegisterResponse, Status> + Send + Sync + 'static,
) -> mpsc::Receiver<Session> {
    let (sessions, rx) = mpsc::channel(1);
    let router = ControlServer::new(FakeRouter { answer: Box::new(answer), sessions });
    let server = tonic::transport::Server::builder().add_service(router);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    rx
}

async fn listen() -> (TcpListener, NodeSpec) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let spec = spec(format!("http://{}", listener.local_addr().unwrap()));
    (listener, spec)
}

fn spec(router: String) -> NodeSpec {
    NodeSpec {
        role: Role::Expert,
        name: "test".into(),
        router,
        model_digest: [5; 32],
        model: v1::ModelInfo::default(),
        addr: "tcp://127.0.0.1:1".into(),
        transport: "tcp".into(),
        compute: "cpu".into(),
        protocol: 1,
        slot: SlotWish::Any,
        capacity_bytes: 0,
    }
}

/// A target that prepares when it is let, and writes down what happens.
#[derive(Default)]
struct Target {
    gate: Notify,
    wait: bool,
    fail: bool,
    seen: Mutex<Vec<String>>,
}

impl Target {
    fn note(&self, what: String) {
        self.seen.lock().unwrap().push(what);
    }
}

impl ViewTarget for Target {
    fn prepare(&self, view: Arc<View>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            self.note(format!("prepare {}", view.id.0));
            if self.wait {
                self.gate.notified().await;
            }
            if self.fail { Err("no room".into()) } else { Ok(()) }
        })
    }

    fn commit(&self, view: ViewId) -> BoxFuture<'_, Result<(), String>> {
        self.note(format!("commit {}", view.0));
        Box::pin(async { Ok(()) })
    }

    fn abandon(&self, view: ViewId) {
        self.note(format!("abandon {}", view.0));
        self.gate.notify_one();
    }

    fn load(&self) -> v1::NodeLoad {
        v1::NodeLoad { experts_held: 4, ..v1::NodeLoad::default() }
    }
}

fn view(id: u64) -> v1::ViewMessage {
    let slot = Slot(2);
    v1::ViewMessage::from(&View {
        id: ViewId(id),
        attention: vec![],
        experts: vec![Member { slot, node: NodeId(7), data_addr: "tcp://127.0.0.1:1".into() }],
        placement: Placement::balanced(vec![LayerId(0)], 2, &[slot], 1).unwrap(),
    })
}

struct Played {
    up: Streaming<v1::NodeMessage>,
    down: mpsc::Sender<Result<v1::RouterMessage, Status>>,
    evidence: mpsc::Sender<Evidence>,
    stop: CancellationToken,
    run: tokio::task::JoinHandle<Result<(), ServiceError>>,
}

impl Played {
    async fn start(target: Arc<Target>) -> Self {
        Self::start_with(target, PATIENCE).await
    }

    async fn start_with(target: Arc<Target>, drain_max: Duration) -> Self {
        let (listener, spec) = listen().await;
        let mut sessions = play(listener, || Ok(taken()));
        let registration = register(&spec, PATIENCE).await.unwrap();
        assert_eq!((registration.node, registration.slot, registration.secret), (NodeId(7), Slot(2), [9; 32]));
        let (evidence, mut evidence_rx) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let run = tokio::spawn(async move { registration.run(target, &mut evidence_rx, stopping, drain_max).await });
        let (up, down) = timeout(PATIENCE, sessions.recv()).await.unwrap().unwrap();
        let mut played = Self { up, down, evidence, stop, run };
        let hello = Up::Hello(v1::SessionHello { node: 7, token: vec![1, 2, 3] });
        assert_eq!(played.heard().await, Some(hello), "the first message is the hello");
        played
    }

    async fn heard(&mut self) -> Option<Up> {
        let message = timeout(PATIENCE, self.up.message()).await.expect("a message in time").unwrap();
        message.map(|m| m.message.expect("no empty messages"))
    }

    /// The next message that is no heartbeat, and the heartbeats before it.
    async fn answer(&mut self) -> (Option<Up>, usize) {
        let mut heartbeats = 0;
        loop {
            match self.heard().await {
                Some(Up::Heartbeat(load)) => {
                    assert_eq!(load.experts_held, 4);
                    heartbeats += 1;
                }
                other => return (other, heartbeats),
            }
        }
    }

    async fn tell(&self, message: Down) {
        self.down.send(Ok(v1::RouterMessage { message: Some(message) })).await.unwrap();
    }

    async fn ended(self) -> Result<(), ServiceError> {
        timeout(PATIENCE, self.run).await.expect("ends in time").unwrap()
    }
}

#[tokio::test]
async fn a_view_is_prepared_and_committed_and_each_is_reported() {
    let target = Arc::new(Target::default());
    let mut router = Played::start(target.clone()).await;
    router.tell(Down::Prepare(view(3))).await;
    assert_eq!(router.answer().await.0, Some(Up::Prepared(v1::ViewPrepared { view: 3 })));
    router.tell(Down::Commit(v1::ViewId { view: 3 })).await;
    assert_eq!(router.answer().await.0, Some(Up::Committed(v1::ViewCommitted { view: 3 })));
    assert_eq!(*target.seen.lock().unwrap(), ["prepare 3", "commit 3"]);
}

#[tokio::test]
async fn heartbeats_go_on_while_a_view_is_being_prepared() {
    let target = Arc::new(Target { wait: true, ..Target::default() });
    let mut router = Played::start(target.clone()).await;
    router.tell(Down::Prepare(view(3))).await;
    for _ in 0..5 {
        assert!(matches!(router.heard().await, Some(Up::Heartbeat(_))));
    }
    target.gate.notify_one();
    assert_eq!(router.answer().await.0, Some(Up::Prepared(v1::ViewPrepared { view: 3 })));
}

#[tokio::test]
async fn an_abandoned_view_is_not_reported_and_the_next_one_is() {
    let target = Arc::new(Target { wait: true, ..Target::default() });
    let mut router = Played::start(target.clone()).await;
    router.tell(Down::Prepare(view(3))).await;
    router.tell(Down::Abandon(v1::ViewId { view: 3 })).await;
    router.tell(Down::Prepare(view(4))).await;
    // The abandon ended the first wait; this ends the second.
    while !target.seen.lock().unwrap().contains(&"prepare 4".to_owned()) {
        assert!(matches!(router.heard().await, Some(Up::Heartbeat(_))));
    }
    target.gate.notify_one();
    assert_eq!(router.answer().await.0, Some(Up::Prepared(v1::ViewPrepared { view: 4 })));
}

#[tokio::test]
async fn a_view_that_fails_or_contradicts_itself_is_reported_and_the_session_goes_on() {
    let target = Arc::new(Target { fail: true, ..Target::default() });
    let mut router = Played::start(target.clone()).await;
    router.tell(Down::Prepare(view(3))).await;
    let failed = v1::ViewFailed { view: 3, reason: "no room".into() };
    assert_eq!(router.answer().await.0, Some(Up::Failed(failed)));
    router.tell(Down::Prepare(v1::ViewMessage { experts_per_layer: 9, ..view(4) })).await;
    assert!(matches!(router.answer().await.0, Some(Up::Failed(v1::ViewFailed { view: 4, .. }))));
    assert_eq!(*target.seen.lock().unwrap(), ["prepare 3"]);
}

#[tokio::test]
async fn evidence_goes_up_and_a_shutdown_asks_for_a_handover_and_ends_when_dismissed() {
    let mut router = Played::start(Arc::default()).await;
    let seen = Evidence { view: ViewId(3), expert_slot: Slot(1), what: "closed".into() };
    router.evidence.send(seen).await.unwrap();
    let told = v1::Evidence { view: 3, expert_slot: 1, what: "closed".into() };
    assert_eq!(router.answer().await.0, Some(Up::Evidence(told)));
    router.stop.cancel();
    assert!(matches!(router.answer().await.0, Some(Up::Draining(_))));
    // The node still does what it is told while others take over.
    router.tell(Down::Abandon(v1::ViewId { view: 9 })).await;
    router.tell(Down::Dismissed(v1::Dismissed { why: "drained".into(), drained: true })).await;
    router.ended().await.unwrap();
}

#[tokio::test]
async fn a_node_that_nobody_takes_over_from_in_time_leaves_by_itself() {
    let mut router = Played::start_with(Arc::default(), Duration::from_millis(50)).await;
    assert!(matches!(router.heard().await, Some(Up::Heartbeat(_))), "the session is open");
    router.stop.cancel();
    assert!(matches!(router.answer().await.0, Some(Up::Draining(_))));
    assert!(matches!(router.answer().await.0, Some(Up::Leaving(_))));
    let Played { down, run, .. } = router;
    drop(down);
    timeout(PATIENCE, run).await.expect("ends in time").unwrap().unwrap();
}

#[tokio::test]
async fn an_operators_drain_ends_the_node_in_good_order() {
    let router = Played::start(Arc::default()).await;
    router.tell(Down::Dismissed(v1::Dismissed { why: "drained".into(), drained: true })).await;
    router.ended().await.unwrap();
}

#[tokio::test]
async fn dismissal_and_a_lost_session_end_the_membership_with_the_reason() {
    let router = Played::start(Arc::default()).await;
    router.tell(Down::Dismissed(v1::Dismissed { why: "too slow".into(), drained: false })).await;
    let ended = router.ended().await.unwrap_err();
    assert!(matches!(&ended, ServiceError::Dismissed { why, .. } if why == "too slow"), "{ended}");
    assert!(ended.may_rejoin(), "it is well itself");

    let Played { down, run, evidence: _evidence, up: _up, .. } = Played::start(Arc::default()).await;
    drop(down);
    let ended = timeout(PATIENCE, run).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(ended, ServiceError::SessionLost { .. }), "{ended}");
}

#[tokio::test]
async fn a_router_that_is_not_up_yet_is_waited_for() {
    let (listener, spec) = listen().await;
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let registered = tokio::spawn(async move { register(&spec, PATIENCE).await });
    tokio::time::sleep(Duration::from_millis(120)).await;
    let _sessions = play(TcpListener::bind(addr).await.unwrap(), || Ok(taken()));
    assert_eq!(registered.await.unwrap().unwrap().slot, Slot(2));
}

#[tokio::test]
async fn silence_ends_after_its_time_and_names_the_router() {
    let (listener, spec) = listen().await;
    drop(listener);
    let silent = register(&spec, Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(silent, ServiceError::RouterSilent { .. }), "{silent}");
    assert!(silent.to_string().contains(&spec.router));
}

#[tokio::test]
async fn a_refusal_is_final_and_typed() {
    let (listener, spec) = listen().await;
    let _sessions = play(listener, || Err(MeshError::new(Code::SlotTaken, "slot 2 is node-1's").into()));
    let refused = timeout(PATIENCE, register(&spec, PATIENCE * 10)).await.expect("at once").unwrap_err();
    assert!(matches!(&refused, ServiceError::Refused { error, .. } if error.code == Code::SlotTaken), "{refused}");
}

#[tokio::test]
async fn an_answer_that_makes_no_sense_is_a_broken_protocol() {
    for broken in [
        v1::RegisterResponse { secret: vec![1; 31], ..taken() },
        v1::RegisterResponse { slot: 1 << 20, ..taken() },
        v1::RegisterResponse { heartbeat_ms: 0, ..taken() },
        v1::RegisterResponse { lease_ms: 20, ..taken() },
    ] {
        let (listener, spec) = listen().await;
        let _sessions = play(listener, move || Ok(broken.clone()));
        let refused = register(&spec, PATIENCE).await.unwrap_err();
        assert!(matches!(refused, ServiceError::Protocol { .. }), "{refused}");
    }
    let refused = register(&spec("not an address".into()), PATIENCE).await.unwrap_err();
    assert!(matches!(refused, ServiceError::RouterUri { .. }), "{refused}");
}
