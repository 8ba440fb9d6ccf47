//! Nodes of one mesh, an expert node that echoes, and patience.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_core::{ExpertId, Lane, LayerId, NodeId, Role, Seq, Slot, ViewId};
use mesh_transport::buffer::FrameBuf;
use mesh_transport::frame::{DispatchBody, FrameHeader, Kind, dispatch_body_bytes, write_dispatch};
use mesh_transport::{
    Bound, ChannelId, Credentials, Event, Identity, Limits, LocalHub, Transport, TransportError, TransportKind, Wake,
    bind, client,
};

/// More than anything here takes on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Mesh {
    pub kind: TransportKind,
    hub: Arc<LocalHub>,
}

pub fn credentials(role: Role, slot: u16) -> Credentials {
    let identity = Identity { node: NodeId(100 + u64::from(slot)), role, slot: Slot(slot), model: [3; 32] };
    Credentials { secret: [5; 32], identity }
}

impl Mesh {
    pub fn new(kind: TransportKind) -> Self {
        Self { kind, hub: LocalHub::new() }
    }

    pub fn bind(&self, limits: &Limits) -> Box<dyn Bound> {
        bind(self.kind, "127.0.0.1:0", limits.clone(), Some(self.hub.clone())).unwrap()
    }

    pub fn server(&self, slot: u16, limits: &Limits) -> Box<dyn Transport> {
        let bound = self.bind(limits);
        let addr = bound.local_addr().to_owned();
        let transport = bound.start(credentials(Role::Expert, slot)).unwrap();
        assert_eq!(transport.local_addr(), addr);
        transport
    }

    pub fn client(&self, slot: u16, limits: &Limits) -> Box<dyn Transport> {
        self.client_as(credentials(Role::Attention, slot), limits)
    }

    pub fn client_as(&self, credentials: Credentials, limits: &Limits) -> Box<dyn Transport> {
        client(self.kind, limits.clone(), Some(self.hub.clone()), credentials).unwrap()
    }

    /// A client and a server that are connected, and the channel at each.
    pub fn pair(&self, limits: &Limits) -> Pair {
        let (mut client, mut server) = (self.client(0, limits), self.server(0, limits));
        let (near, far) = meet(&mut client, &mut server);
        Pair { client, server, near, far }
    }
}

pub struct Pair {
    pub client: Box<dyn Transport>,
    pub server: Box<dyn Transport>,
    pub near: ChannelId,
    pub far: ChannelId,
}

pub fn meet(client: &mut Box<dyn Transport>, server: &mut Box<dyn Transport>) -> (ChannelId, ChannelId) {
    let addr = server.local_addr().to_owned();
    std::thread::scope(|scope| {
        let near = scope.spawn(move || client.connect(&addr, Instant::now() + PATIENCE).unwrap());
        let far = match next(server) {
            Event::Accepted { channel, peer } => {
                assert_eq!(peer.role, Role::Attention);
                channel
            }
            other => panic!("{other:?}"),
        };
        let (near, identity) = near.join().unwrap();
        assert_eq!(identity.role, Role::Expert);
        (near, far)
    })
}

/// Polls and waits until `done` says so.
pub fn until(transport: &mut Box<dyn Transport>, mut done: impl FnMut(&mut Box<dyn Transport>) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done(transport) {
        assert!(Instant::now() < deadline, "nothing more came");
        transport.wait(Instant::now() + Duration::from_millis(20));
    }
}

/// The next event, which must be the only one at its time.
pub fn next(transport: &mut Box<dyn Transport>) -> Event {
    let mut events = Vec::new();
    until(transport, |transport| transport.poll(&mut events) > 0);
    assert_eq!(events.len(), 1, "{events:?}");
    events.remove(0)
}

/// A dispatch of `rows` rows to one expert each.
pub fn dispatch(seq: u64, rows: usize, row_bytes: usize) -> FrameHeader {
    FrameHeader {
        kind: Kind::Dispatch,
        flags: 0,
        view: ViewId(1),
        seq: Seq(seq),
        layer: LayerId(0),
        lane: Lane(0),
        chunk: 0,
        chunks: 1,
        rows: rows as u32,
        pairs: rows as u32,
        row_bytes: row_bytes as u32,
        body_bytes: dispatch_body_bytes(rows, rows, row_bytes).unwrap() as u32,
        server_ns: 0,
        origin: Slot(0),
    }
}

/// What byte `at` of the rows of frame `seq` is.
pub fn byte(seq: u64, at: usize) -> u8 {
    (seq as usize).wrapping_mul(31).wrapping_add(at).wrapping_add(at >> 8) as u8
}

pub fn fill(header: &FrameHeader, body: &mut FrameBuf) {
    let rows = write_dispatch(body, &vec![1; header.rows as usize], &vec![ExpertId(0); header.rows as usize]);
    rows.iter_mut().enumerate().for_each(|(at, b)| *b = byte(header.seq.0, at));
}

/// Sends a dispatch, or says that the window is full.
pub fn try_send(transport: &mut Box<dyn Transport>, channel: ChannelId, header: &FrameHeader) -> bool {
    match transport.buffer(header.body_bytes as usize) {
        Ok(mut body) => {
            fill(header, &mut body);
            transport.send(channel, header, body).unwrap();
            true
        }
        Err(TransportError::WindowFull { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

/// Checks that a combine answers `dispatch(seq, ..)` and carries its rows.
pub fn check_echo(seq: u64, header: &FrameHeader, body: &[u8]) {
    assert_eq!((header.kind, header.seq), (Kind::Combine, Seq(seq)));
    assert_eq!(body.len(), header.body_bytes as usize);
    let wrong = body.iter().enumerate().find(|(at, b)| **b != byte(seq, *at));
    assert_eq!(wrong, None, "of frame {seq}");
}

/// An expert node on its own thread that answers each dispatch with its own rows.
pub struct Echo {
    pub addr: String,
    stop: Arc<AtomicBool>,
    waker: Arc<dyn Wake>,
    thread: JoinHandle<Box<dyn Transport>>,
}

impl Echo {
    pub fn start(transport: Box<dyn Transport>) -> Self {
        let (addr, waker, stop) =
            (transport.local_addr().to_owned(), transport.waker(), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || echo(transport, &stop)
        });
        Self { addr, stop, waker, thread }
    }

    pub fn stop(self) -> Box<dyn Transport> {
        self.stop.store(true, Ordering::SeqCst);
        self.waker.wake();
        self.thread.join().unwrap()
    }
}

fn echo(mut transport: Box<dyn Transport>, stop: &AtomicBool) -> Box<dyn Transport> {
    let (mut events, mut asked) = (Vec::new(), VecDeque::new());
    while !stop.load(Ordering::SeqCst) {
        transport.poll(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Frame { channel, header, body } => asked.push_back((channel, header, body)),
                Event::Closed { channel, .. } => asked.retain(|(of, ..)| *of != channel),
                Event::Accepted { .. } => {}
            }
        }
        while let Some((channel, header, body)) = asked.front() {
            let rows = DispatchBody::parse(header, body).unwrap();
            let answer = header.combine(Slot(0), 1);
            match transport.buffer(answer.body_bytes as usize) {
                Ok(mut place) => {
                    place.copy_from_slice(rows.rows());
                    // A client that went away meanwhile is told of by `Closed`.
                    let _ = transport.send(*channel, &answer, place);
                }
                Err(TransportError::WindowFull { .. }) => break,
                Err(error) => panic!("{error}"),
            }
            asked.pop_front();
        }
        transport.wait(Instant::now() + PATIENCE);
    }
    drop(asked);
    settle(&mut transport);
    transport
}

/// Lets the transport notice that what it sent has arrived, which frees bodies that a peer fetched.
fn settle(transport: &mut Box<dyn Transport>) {
    let deadline = Instant::now() + PATIENCE / 10;
    while transport.stats().bodies_in_use > 0 && Instant::now() < deadline {
        transport.poll(&mut Vec::new());
        transport.wait(Instant::now() + Duration::from_millis(5));
    }
}
