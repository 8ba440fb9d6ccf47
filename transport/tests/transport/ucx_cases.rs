//! What the UCX transport promises beyond the others; and whether its cases can run here at all, said aloud.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use mesh_core::{Role, Slot};
use mesh_transport::buffer::FrameBuf;
use mesh_transport::frame::{DispatchBody, FrameHeader};
use mesh_transport::ucx::{self, UcxBound, UcxInfo, UcxOptions, UcxTransport};
use mesh_transport::{Bound, ChannelId, Event, FRAMES_QUEUED_MAX, Limits, Transport, TransportError, TransportKind};

use crate::support::{Mesh, PATIENCE, Pair, byte, credentials, dispatch, next, try_send, until};

/// Set for a process that is a node of its own: where it connects to.
const NODE_ADDR: &str = "MESH_TEST_UCX_ADDR";
/// ... and what it does then: [`ECHO`], [`SEND`], [`FLOOD`] or [`NOTHING`].
const NODE_WORK: &str = "MESH_TEST_UCX_WORK";
/// ... and its list of UCX transports.
const NODE_TLS: &str = "MESH_TEST_UCX_TLS";

const ECHO: &str = "echo";
/// Sends large frames and never polls again once they are announced.
const SEND: &str = "send";
/// Sends as many frames as it is let, each all in the queue of who gets it.
const FLOOD: &str = "flood";
/// Never polls at all.
const NOTHING: &str = "nothing";

fn options(tls: Option<String>) -> UcxOptions {
    UcxOptions { library_dir: std::env::var_os("MESH_UCX_LIB_DIR").map(PathBuf::from), tls }
}

/// The UCX that the cases run over, opened once: out of `MESH_UCX_LIB_DIR` if that is set.
fn found() -> &'static Result<UcxInfo, String> {
    static FOUND: OnceLock<Result<UcxInfo, String>> = OnceLock::new();
    FOUND.get_or_init(|| ucx::probe(&options(None)).map_err(|error| error.to_string()))
}

/// The UCX transport for one more case, or none after a line that says why. Past the test harness, which would keep the line
/// of a case that passes to itself.
pub fn kind() -> Option<TransportKind> {
    let case = std::thread::current().name().unwrap_or("a case").to_owned();
    let (line, kind) = match found() {
        Ok(info) => (format!("UCX: transport: {case}: ran on {}\n", info.version), Some(TransportKind::Ucx)),
        Err(why) => (format!("NOT RUN: UCX: transport: {case}: {why}\n"), None),
    };
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    kind
}

/// A process of its own with a node that connects to `addr`; killed when dropped.
struct Node(Child);

impl Node {
    fn start(addr: &str, work: &str, tls: Option<&str>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "ucx_cases::node_of_another_test", "--nocapture"]).stdout(Stdio::piped());
        command.env(NODE_ADDR, addr).env(NODE_WORK, work);
        tls.map(|tls| command.env(NODE_TLS, tls));
        Self(command.spawn().unwrap())
    }

    /// Until it does nothing any more.
    fn said_all(&mut self) {
        let mut said = BufReader::new(self.0.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(said.any(|line| line.contains("connected")));
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.0.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // One that was killed already is not there to be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a case: what the processes started by the cases below run. Does nothing in the test run itself.
#[test]
fn node_of_another_test() {
    let Ok(addr) = std::env::var(NODE_ADDR) else { return };
    let options = options(std::env::var(NODE_TLS).ok());
    let work = std::env::var(NODE_WORK).unwrap();
    let node = UcxTransport::client(Limits::default(), credentials(Role::Attention, 1), &options).unwrap();
    let mut node: Box<dyn Transport> = Box::new(node);
    let (channel, _) = node.connect(&addr, Instant::now() + PATIENCE).unwrap();
    if work == SEND {
        (0..4).for_each(|seq| assert!(try_send(&mut node, channel, &dispatch(seq, 2, 200_000))));
        // Long enough for UCX to announce them; their bodies stay here until the peer asks for them.
        let announced = Instant::now() + Duration::from_millis(200);
        while Instant::now() < announced {
            node.poll(&mut Vec::new());
            node.wait(announced);
        }
    }
    if work == FLOOD {
        println!("connected");
        let mut seq = 0;
        let mut events = Vec::new();
        while node.poll(&mut events) == 0 {
            seq += u64::from(try_send(&mut node, channel, &dispatch(seq, 2, 3_000)));
        }
        // All that can come is the channel's end.
        return;
    }
    if work != ECHO {
        println!("connected");
        std::thread::sleep(2 * PATIENCE);
    }
    let mut events = Vec::new();
    loop {
        node.poll(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Frame { channel, header, body } => node.send(channel, &header, body).unwrap(),
                Event::Closed { .. } => return,
                Event::Accepted { .. } => {}
            }
        }
        node.wait(Instant::now() + PATIENCE);
    }
}

fn server(tls: Option<&str>) -> Box<dyn Transport> {
    let bound = UcxBound::bind("127.0.0.1:0", Limits::default(), &options(tls.map(str::to_owned))).unwrap();
    Box::new(bound).start(credentials(Role::Expert, 0)).unwrap()
}

fn accepted(server: &mut Box<dyn Transport>) -> ChannelId {
    match next(server) {
        Event::Accepted { channel, .. } => channel,
        other => panic!("{other:?}"),
    }
}

/// A frame there and back.
fn round_trip(server: &mut Box<dyn Transport>, channel: ChannelId, seq: u64, row_bytes: usize) {
    assert!(try_send(server, channel, &dispatch(seq, 2, row_bytes)));
    match next(server) {
        Event::Frame { channel: from, header, .. } => assert_eq!((from, header.seq.0), (channel, seq)),
        other => panic!("{other:?}"),
    }
}

/// Processor time of this thread, in the system's ticks of 10 ms.
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn a_killed_process_is_reported_and_the_others_go_on(tls: Option<&str>) {
    let mut server = server(tls);
    let addr = server.local_addr().to_owned();
    let echo = Node::start(&addr, ECHO, tls);
    let alive = accepted(&mut server);
    let mut idle = Node::start(&addr, NOTHING, tls);
    let doomed = accepted(&mut server);
    idle.said_all();
    // Small and large frames under way to somebody who never takes them.
    let mut sent = 0;
    while sent < 100 && try_send(&mut server, doomed, &dispatch(sent, 2, [200, 200_000][sent as usize % 2])) {
        sent += 1;
    }
    round_trip(&mut server, alive, 1, 100);
    idle.kill();
    let killed = Instant::now();
    match next(&mut server) {
        Event::Closed { channel, error: TransportError::Closed { .. } } => assert_eq!(channel, doomed),
        other => panic!("{other:?}"),
    }
    assert!(killed.elapsed() < Duration::from_secs(5), "noticed after {:?}", killed.elapsed());
    for seq in 0..100 {
        round_trip(&mut server, alive, seq, [100, 100_000][seq as usize % 2]);
    }
    until(&mut server, |server| {
        assert_eq!(server.poll(&mut Vec::new()), 0);
        server.stats().bodies_in_use == 0
    });
    // What the dead left under way must not keep the living busy.
    let (before, begun) = (ticks(), Instant::now());
    while begun.elapsed() < Duration::from_secs(1) {
        server.wait(begun + Duration::from_secs(1));
        server.poll(&mut Vec::new());
    }
    assert!(ticks() - before < 30, "{} ticks in a second of waiting", ticks() - before);
    drop(echo);
    assert!(matches!(next(&mut server), Event::Closed { channel, .. } if channel == alive));
}

#[test]
fn a_killed_process_that_shares_memory_is_reported_and_the_others_go_on() {
    if kind().is_some() {
        a_killed_process_is_reported_and_the_others_go_on(None);
    }
}

#[test]
fn a_killed_process_over_the_network_is_reported_and_the_others_go_on() {
    if kind().is_some() {
        a_killed_process_is_reported_and_the_others_go_on(Some("tcp"));
    }
}

fn frames_of_a_process_that_was_killed_do_no_harm(tls: Option<&str>) {
    let mut server = server(tls);
    let addr = server.local_addr().to_owned();
    let echo = Node::start(&addr, ECHO, tls);
    let alive = accepted(&mut server);
    let mut idle = Node::start(&addr, SEND, tls);
    let doomed = accepted(&mut server);
    idle.said_all();
    idle.kill();
    // Now its frames are found, and their bodies are nowhere any more; unless some came just before.
    let mut events = Vec::new();
    until(&mut server, |server| {
        server.poll(&mut events);
        events.iter().any(|event| matches!(event, Event::Closed { .. }))
    });
    let closed = events.pop();
    assert!(matches!(closed, Some(Event::Closed { channel, .. }) if channel == doomed), "{closed:?}");
    for event in events.drain(..) {
        let Event::Frame { header, body, .. } = event else { panic!("{event:?}") };
        let wanted = |at| byte(header.seq.0, at);
        let rows = DispatchBody::parse(&header, &body).unwrap().rows();
        assert!(rows.iter().enumerate().all(|(at, b)| *b == wanted(at)), "frame {} was made up", header.seq.0);
    }
    for seq in 0..100 {
        round_trip(&mut server, alive, seq, [100, 100_000][seq as usize % 2]);
    }
    until(&mut server, |server| {
        assert_eq!(server.poll(&mut Vec::new()), 0);
        server.stats().bodies_in_use == 0
    });
    drop(echo);
}

#[test]
fn frames_of_a_process_that_was_killed_do_no_harm_in_shared_memory() {
    if kind().is_some() {
        frames_of_a_process_that_was_killed_do_no_harm(None);
    }
}

#[test]
fn frames_of_a_process_that_was_killed_do_no_harm_over_the_network() {
    if kind().is_some() {
        frames_of_a_process_that_was_killed_do_no_harm(Some("tcp"));
    }
}

/// What a server has seen of its peers.
#[derive(Default)]
struct Seen {
    accepted: Option<ChannelId>,
    closed: Vec<ChannelId>,
    /// Whom each frame came from; their bodies are dropped, or they would fill the window.
    frames: Vec<ChannelId>,
}

impl Seen {
    /// Polls and waits until `done` says so.
    fn until(&mut self, server: &mut Box<dyn Transport>, mut done: impl FnMut(&Self) -> bool) {
        let mut events = Vec::new();
        until(server, |server| {
            server.poll(&mut events);
            for event in events.drain(..) {
                match event {
                    Event::Accepted { channel, .. } => self.accepted = Some(channel),
                    Event::Closed { channel, .. } => self.closed.push(channel),
                    Event::Frame { channel, .. } => self.frames.push(channel),
                }
            }
            done(self)
        });
    }

    /// A process that does `work`, and its channel.
    fn start(&mut self, server: &mut Box<dyn Transport>, work: &str) -> (Node, ChannelId) {
        let node = Node::start(server.local_addr(), work, None);
        self.until(server, |seen| seen.accepted.is_some());
        (node, self.accepted.take().unwrap())
    }

    fn is_closed(&self, channel: ChannelId) -> bool {
        self.closed.contains(&channel)
    }

    fn frames_of(&self, channel: ChannelId) -> usize {
        self.frames.iter().filter(|from| **from == channel).count()
    }
}

/// In the queue by which processes of a host reach another, a place is taken before it is written: one that ends, or is
/// stopped, in between leaves it neither free nor full, and of what is behind it nothing would be read. A process that the
/// system leaves waiting for its processor in between looks the same, so that any channel may end at any time.
fn a_process_ended_while_it_writes_keeps_nobody_out_for_long(signal: &str) {
    const ENDED_MAX: u64 = 1000;
    let mut server = server(None);
    let (mut seen, mut blocked) = (Seen::default(), 0);
    let (mut echo, mut alive) = seen.start(&mut server, ECHO);
    for round in 0..ENDED_MAX {
        let (flood, doomed) = seen.start(&mut server, FLOOD);
        seen.until(&mut server, |seen| seen.frames_of(doomed) > 20 || seen.is_closed(doomed));
        // While it is read from: one that waits for room takes no place.
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(2000 + 37 * (round % 200)));
                flood.signal(signal);
            });
            seen.until(&mut server, |_| ended.is_finished());
        });
        // Either the way is free, or it is opened anew, and all who came by it are told to come again.
        let (before, begun) = (seen.frames_of(alive), Instant::now());
        assert!(seen.is_closed(alive) || try_send(&mut server, alive, &dispatch(round, 2, 100)));
        seen.until(&mut server, |seen| seen.frames_of(alive) > before || seen.is_closed(alive));
        assert!(begun.elapsed() < Duration::from_secs(1), "after {:?}", begun.elapsed());
        drop(flood);
        seen.until(&mut server, |seen| seen.is_closed(doomed));
        if seen.is_closed(alive) {
            let counted = server.stats().refused.get("blocked queue").copied().unwrap_or(0);
            assert!(counted > blocked, "{:?}", server.stats().refused);
            blocked = counted;
            drop(echo);
            (echo, alive) = seen.start(&mut server, ECHO);
            assert!(try_send(&mut server, alive, &dispatch(round, 2, 100_000)));
            seen.until(&mut server, |seen| seen.frames_of(alive) > 0 || seen.is_closed(alive));
        }
        if blocked >= 2 {
            break;
        }
    }
    assert!(blocked > 0, "of {ENDED_MAX} none was ended while it wrote");
    drop(echo);
}

#[test]
fn a_process_killed_while_it_writes_keeps_nobody_out_for_long() {
    if kind().is_some() {
        a_process_ended_while_it_writes_keeps_nobody_out_for_long("-KILL");
    }
}

#[test]
fn a_process_stopped_while_it_writes_keeps_nobody_out_for_long() {
    if kind().is_some() {
        a_process_ended_while_it_writes_keeps_nobody_out_for_long("-STOP");
    }
}

/// Mappings of memory that UCX shares with others of this host, by either of its two ways.
fn shared_mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| ["/dev/shm/ucx", "/SYSV"].iter().any(|name| line.contains(name))).count()
}

#[test]
fn what_killed_processes_shared_is_given_back() {
    const KILLED: usize = 24;
    if kind().is_none() {
        return;
    }
    let mut server = server(None);
    let addr = server.local_addr().to_owned();
    let before = shared_mappings();
    for _ in 0..KILLED {
        let mut node = Node::start(&addr, ECHO, None);
        let doomed = accepted(&mut server);
        round_trip(&mut server, doomed, 0, 100_000);
        node.kill();
        assert!(matches!(next(&mut server), Event::Closed { channel, .. } if channel == doomed));
    }
    // Each shared at least one; those of the cases that run beside this one come and go.
    until(&mut server, |server| {
        server.poll(&mut Vec::new());
        shared_mappings() < before + KILLED
    });
}

/// Two ends that share memory in different ways: each reads bodies of the other only if they are sent.
#[test]
fn a_body_that_cannot_be_read_where_it_is_is_sent() {
    if kind().is_none() {
        return;
    }
    let mut server = server(Some("posix,self,tcp"));
    let echo = Node::start(server.local_addr(), ECHO, None);
    let channel = accepted(&mut server);
    for seq in 0..50 {
        assert!(try_send(&mut server, channel, &dispatch(seq, 2, [100, 100_000][seq as usize % 2])));
        let Event::Frame { header, body, .. } = next(&mut server) else { panic!("frame {seq} does not come back") };
        let rows = DispatchBody::parse(&header, &body).unwrap().rows();
        assert!(rows.iter().enumerate().all(|(at, b)| *b == byte(seq, at)), "frame {seq}");
    }
    drop(echo);
    assert!(matches!(next(&mut server), Event::Closed { .. }));
}

/// A body that is read where it is belongs to its sender again when that closes the channel, and may hold the next one before the
/// receiver looks: that is a channel that was closed, and no frame that was damaged.
#[test]
fn a_body_that_its_sender_took_back_is_no_damaged_frame() {
    let Some(kind) = kind() else { return };
    const ROW_BYTES: usize = 100_000;
    let Pair { mut client, mut server, near, far } = Mesh::new(kind).pair(&Limits::default());
    let mut events = Vec::new();
    assert!(try_send(&mut client, near, &dispatch(0, 2, ROW_BYTES)));
    until(&mut server, |server| {
        client.poll(&mut Vec::new());
        server.poll(&mut events) > 0
    });
    assert!(matches!(events.pop(), Some(Event::Frame { .. })), "the way is made");
    // The server has not looked yet when the next bodies are written to the memory of the one that was lent.
    assert!(try_send(&mut client, near, &dispatch(1, 2, ROW_BYTES)));
    client.close(near);
    let mut others: Vec<_> = (0..4).map(|_| client.buffer(2 * ROW_BYTES + 1000).unwrap()).collect();
    others.iter_mut().for_each(|body| body.fill(0xee));
    until(&mut server, |server| server.poll(&mut events) > 0);
    let [Event::Closed { channel, error: TransportError::Closed { .. } }] = &events[..] else { panic!("{events:?}") };
    assert_eq!((*channel, server.stats().refused.get("bad frame")), (far, None));
}

#[test]
fn a_peer_that_never_polls_is_cut_off_at_the_bound() {
    let Some(kind) = kind() else { return };
    let Pair { mut client, mut server, near, far } = Mesh::new(kind).pair(&Limits::default());
    let mut events = Vec::new();
    for _ in 0..2 * FRAMES_QUEUED_MAX {
        if client.send(near, &FrameHeader::probe(Slot(0)), FrameBuf::empty()).is_err() {
            break;
        }
        client.poll(&mut events);
    }
    let [Event::Closed { error: TransportError::SlowPeer { frames, .. }, .. }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(*frames, FRAMES_QUEUED_MAX + 1);
    assert_eq!(client.stats().refused.get("slow peer"), Some(&1));
    until(&mut server, |server| {
        server.poll(&mut events);
        events.iter().any(|event| matches!(event, Event::Closed { channel, .. } if *channel == far))
    });
}

#[test]
fn addresses_of_other_transports_are_refused_with_the_right_form() {
    let Some(kind) = kind() else { return };
    let mut client = Mesh::new(kind).client(0, &Limits::default());
    for addr in ["tcp://127.0.0.1:1", "127.0.0.1:1", "ucx://127.0.0.1", "ucx://"] {
        let refused = client.connect(addr, Instant::now() + PATIENCE);
        let Err(error @ TransportError::BadAddress { .. }) = refused else { panic!("{addr}: {refused:?}") };
        assert!(error.to_string().contains("ucx://host:port"), "{error}");
    }
}

#[test]
fn a_transport_that_ucx_does_not_have_is_an_error_that_names_it() {
    if kind().is_none() {
        return;
    }
    let options = options(Some("nosuchthing".to_owned()));
    let refused = UcxTransport::client(Limits::default(), credentials(Role::Attention, 0), &options);
    let Err(TransportError::Unavailable { why, .. }) = refused.map(|_| ()) else { panic!("it was taken") };
    assert!(why.contains("nosuchthing"), "{why}");
}

#[test]
fn a_machine_without_ucx_is_told_what_to_install() {
    // Where UCX is open already, another folder is refused too, for another reason.
    let _ = kind();
    let nowhere = UcxOptions { library_dir: Some("/nonexistent".into()), tls: None };
    let why = ucx::probe(&nowhere).unwrap_err().to_string();
    assert!(why.contains("libucx0") || why.contains("already open"), "{why}");
    let refused = UcxBound::bind("127.0.0.1:0", Limits::default(), &nowhere);
    assert!(matches!(refused, Err(TransportError::Unavailable { kind: TransportKind::Ucx, .. })), "{refused:?}");
}
