//! A router in this process, and fake nodes that say and record what a test wants.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_proto::v1::attention_server::{Attention, AttentionServer};
use mesh_proto::v1::control_client::ControlClient;
use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::generate_response::Event;
use mesh_proto::v1::mesh_client::MeshClient;
use mesh_proto::v1::node_message::Message as Say;
use mesh_proto::v1::router_message::Message as Order;
use mesh_proto::{Code, MeshError, v1};
use router_svc::{RouterConfig, RouterError};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

/// Longer than anything takes on the slowest machine: only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

pub async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, f).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not happen within {PATIENCE:?}"),
    }
}

pub async fn eventually(what: &str, mut ok: impl AsyncFnMut() -> bool) {
    soon(what, async {
        while !ok().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// The default with a lease that no loaded machine lets lapse: fake nodes send no heartbeats.
pub fn calm() -> RouterConfig {
    RouterConfig { lease: Duration::from_secs(3600), ..RouterConfig::default() }
}

pub struct Router {
    pub addr: std::net::SocketAddr,
    pub channel: Channel,
    pub stop: CancellationToken,
    pub task: JoinHandle<Result<(), RouterError>>,
}

impl Router {
    pub async fn start(config: RouterConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(router_svc::serve(config, listener, stop.clone().cancelled_owned()));
        let channel = Channel::from_shared(format!("http://{addr}")).unwrap().connect_lazy();
        Self { addr, channel, stop, task }
    }

    pub fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel.clone())
    }

    pub fn mesh(&self) -> MeshClient<Channel> {
        MeshClient::new(self.channel.clone())
    }

    pub async fn status(&self) -> v1::StatusResponse {
        self.mesh().status(v1::StatusRequest {}).await.unwrap().into_inner()
    }

    pub async fn view(&self, wanted: u64) {
        eventually(&format!("view {wanted}"), async || {
            let status = self.status().await;
            status.view == wanted && status.serving
        })
        .await;
    }

    pub async fn generate(&self, text: &str) -> Result<Streaming<v1::GenerateResponse>, MeshError> {
        let call = self.mesh().generate(prompt(text)).await;
        call.map(Response::into_inner).map_err(|s| MeshError::from_status(&s))
    }
}

pub fn prompt(text: &str) -> v1::GenerateRequest {
    v1::GenerateRequest { prompt: Some(Prompt::Text(text.into())), ..Default::default() }
}

/// Reads a stream to its end: its events, and the error that it ended with.
pub async fn read(mut stream: Streaming<v1::GenerateResponse>) -> (Vec<Event>, Option<MeshError>) {
    let mut events = Vec::new();
    loop {
        match soon("the stream's end", stream.message()).await {
            Ok(Some(message)) => events.extend(message.event),
            Ok(None) => return (events, None),
            Err(status) => return (events, Some(MeshError::from_status(&status))),
        }
    }
}

pub fn registration(role: v1::NodeRole) -> v1::RegisterRequest {
    v1::RegisterRequest {
        role: role as i32,
        name: role.as_str_name().to_lowercase(),
        pid: 1,
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: 1,
        model_digest: vec![5; 32],
        model: Some(v1::ModelInfo {
            name: "tiny".into(),
            dtype: "f32".into(),
            moe_layers: vec![0, 2],
            experts: 8,
            ..Default::default()
        }),
        addr: "tcp://127.0.0.1:9".into(),
        transport: "tcp".into(),
        compute: "cpu".into(),
        slot: None,
        slot_optional: false,
        capacity_bytes: 0,
    }
}

/// A registered node with its session.
pub struct Node {
    pub registered: v1::RegisterResponse,
    pub say: mpsc::Sender<v1::NodeMessage>,
    pub orders: Streaming<v1::RouterMessage>,
}

impl Node {
    pub async fn join(router: &Router, request: v1::RegisterRequest) -> Self {
        let registered = router.control().register(request).await.unwrap().into_inner();
        let (say, orders) = session(router, registered.node, registered.token.clone()).await;
        Self { registered, say, orders }
    }

    pub async fn say(&self, message: Say) {
        self.say.send(v1::NodeMessage { message: Some(message) }).await.unwrap();
    }

    pub async fn order(&mut self) -> Order {
        let order = soon("an order", self.orders.message()).await;
        order.unwrap().expect("the session goes on").message.unwrap()
    }

    pub async fn prepare(&mut self) -> v1::ViewMessage {
        match self.order().await {
            Order::Prepare(view) => view,
            other => panic!("expected Prepare, got {other:?}"),
        }
    }

    /// Does from here on what it is told; each order is recorded under the node's number.
    pub fn obey(mut self, record: mpsc::UnboundedSender<(u64, Order)>) -> Obedient {
        let (node, registered) = (self.registered.node, self.registered.clone());
        let task = tokio::spawn(async move {
            while let Ok(Some(v1::RouterMessage { message: Some(order) })) = self.orders.message().await {
                let _unread = record.send((node, order.clone()));
                match order {
                    Order::Prepare(view) => self.say(Say::Prepared(v1::ViewPrepared { view: view.view })).await,
                    Order::Commit(id) => self.say(Say::Committed(v1::ViewCommitted { view: id.view })).await,
                    Order::Abandon(_) | Order::Ping(_) => {}
                    Order::Dismissed(_) => return,
                }
            }
        });
        Obedient { registered, task }
    }
}

/// A node that does what it is told until it is killed.
pub struct Obedient {
    pub registered: v1::RegisterResponse,
    task: JoinHandle<()>,
}

impl Obedient {
    /// Drops the session, as the death of the process does.
    pub async fn kill(self) {
        self.task.abort();
        let _cancelled = self.task.await;
    }
}

pub async fn session(
    router: &Router,
    node: u64,
    token: Vec<u8>,
) -> (mpsc::Sender<v1::NodeMessage>, Streaming<v1::RouterMessage>) {
    let (say, outbound) = mpsc::channel(16);
    say.send(v1::NodeMessage { message: Some(Say::Hello(v1::SessionHello { node, token })) }).await.unwrap();
    let orders = router.control().session(ReceiverStream::new(outbound)).await.unwrap().into_inner();
    (say, orders)
}

/// An attention node's gRPC end: what it does depends on the prompt.
#[derive(Clone, Default)]
pub struct FakeAttention {
    /// Streams that neither ended nor were dropped.
    pub open: Arc<AtomicUsize>,
    /// Streams begun.
    pub begun: Arc<AtomicUsize>,
}

struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tonic::async_trait]
impl Attention for FakeAttention {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let Some(Prompt::Text(text)) = &request.prompt else { return Err(Status::internal("only text here")) };
        if text == "refuse" {
            return Err(MeshError::new(Code::ContextExceeded, "too long").at_field("prompt").into());
        }
        let seed = request.sampling.and_then(|s| s.seed).unwrap_or_default();
        let event = |event| Ok(v1::GenerateResponse { event: Some(event) });
        let started = event(Event::Started(v1::Started { request_id: request.request_id, seed, ..Default::default() }));
        let token = |id| {
            event(Event::Tokens(v1::Tokens {
                tokens: vec![v1::Token { id, ..Default::default() }],
                ..Default::default()
            }))
        };
        let finished = event(Event::Finished(v1::Finished { completion_tokens: 3, ..Default::default() }));
        let events = match text.as_str() {
            "break" => vec![started, token(1), Err(Status::unknown("broken pipe"))],
            "short" => vec![started, token(1)],
            "hang" | "flood" => vec![started, token(1)],
            _ => vec![started, token(1), token(2), token(3), finished],
        };
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.open.fetch_add(1, Ordering::SeqCst);
        let open = Open(Arc::clone(&self.open));
        let held = move |_: &Result<_, _>| {
            let _held = &open;
            true
        };
        let first = tokio_stream::iter(events);
        Ok(Response::new(match text.as_str() {
            "hang" => Box::pin(first.chain(tokio_stream::pending()).take_while(held)),
            "flood" => Box::pin(first.chain(Flood).take_while(held)),
            _ => Box::pin(first.take_while(held)),
        }))
    }
}

/// Large messages without end.
struct Flood;

impl Stream for Flood {
    type Item = Result<v1::GenerateResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let token = v1::Token { logits: vec![0; 128 << 10], ..Default::default() };
        let event = Event::Tokens(v1::Tokens { tokens: vec![token], ..Default::default() });
        Poll::Ready(Some(Ok(v1::GenerateResponse { event: Some(event) })))
    }
}

impl FakeAttention {
    /// Serves on a free port of loopback until the test ends; returns the address.
    pub async fn serve(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = AttentionServer::new(self.clone());
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener)));
        format!("http://{addr}")
    }
}

/// One attention and `experts` expert nodes that do what they are told, in view 1.
pub struct Served {
    pub router: Router,
    pub attention: Obedient,
    pub experts: Vec<Obedient>,
    pub fake: FakeAttention,
    pub orders: mpsc::UnboundedReceiver<(u64, Order)>,
    pub record: mpsc::UnboundedSender<(u64, Order)>,
}

pub async fn served(config: RouterConfig, experts: usize) -> Served {
    let router = Router::start(RouterConfig { experts_min: experts, ..config }).await;
    let (record, orders) = mpsc::unbounded_channel();
    let fake = FakeAttention::default();
    let at = v1::RegisterRequest { addr: fake.serve().await, ..registration(v1::NodeRole::Attention) };
    let attention = Node::join(&router, at).await.obey(record.clone());
    let mut held = Vec::new();
    for _ in 0..experts {
        held.push(Node::join(&router, registration(v1::NodeRole::Expert)).await.obey(record.clone()));
    }
    router.view(1).await;
    Served { router, attention, experts: held, fake, orders, record }
}
