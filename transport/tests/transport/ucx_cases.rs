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
        loop {
            node.poll(&mut Vec::new());
            seq += u64::from(try_send(&mut node, channel, &dispatch(seq, 2, 3_000)));
        }
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

/// In the queue by which processes of a host reach another, a place is taken before it is written: one that ends, or is
/// stopped, in between leaves it neither free nor full, and of what is behind it nothing would be read.
fn a_process_ended_while_it_writes_keeps_nobody_out_for_long(signal: &str) {
    const ENDED_MAX: u64 = 200;
    let mut server = server(None);
    let addr = server.local_addr().to_owned();
    let mut echo = Node::start(&addr, ECHO, None);
    let mut alive = accepted(&mut server);
    let (mut events, mut blocked) = (Vec::new(), 0);
    for round in 0..ENDED_MAX {
        let flood = Node::start(&addr, FLOOD, None);
        let doomed = accepted(&mut server);
        let mut frames = 0;
        until(&mut server, |server| {
            server.poll(&mut events);
            frames += events.drain(..).filter(|event| matches!(event, Event::Frame { .. })).count();
            frames > 20
        });
        // While it is read from: one that waits for room takes no place.
        // What came before is dropped, or its bodies would fill the window.
        let of_doomed = |event: &Event| matches!(event, Event::Frame { channel, .. } if *channel == doomed);
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(2000 + 37 * round));
                flood.signal(signal);
            });
            until(&mut server, |server| {
                server.poll(&mut events);
                events.retain(|event| !of_doomed(event));
                ended.is_finished()
            });
        });
        // Either the way is free, or it is opened anew, and all who came by it are told to come again.
        assert!(try_send(&mut server, alive, &dispatch(round, 2, 100)));
        let begun = Instant::now();
        until(&mut server, |server| {
            server.poll(&mut events);
            events.retain(|event| !of_doomed(event));
            let of_alive = |event: &Event| match event {
                Event::Frame { channel, .. } | Event::Closed { channel, .. } => *channel == alive,
                Event::Accepted { .. } => false,
            };
            events.iter().any(of_alive)
        });
        assert!(begun.elapsed() < Duration::from_secs(1), "after {:?}", begun.elapsed());
        drop(flood);
        until(&mut server, |server| {
            server.poll(&mut events);
            events.iter().any(|event| matches!(event, Event::Closed { channel, .. } if *channel == doomed))
        });
        if events.drain(..).any(|event| matches!(event, Event::Closed { channel, .. } if channel == alive)) {
            blocked += 1;
            assert_eq!(server.stats().refused.get("blocked queue"), Some(&blocked));
            echo = Node::start(&addr, ECHO, None);
            alive = accepted(&mut server);
            round_trip(&mut server, alive, round, 100_000);
        }
        if blocked == 2 {
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
