//! What every transport promises.

use std::time::{Duration, Instant};

use mesh_core::{NodeId, Role, Seq, Slot};
use mesh_transport::frame::{AbortReason, FrameHeader, Kind};
use mesh_transport::handshake::HandshakeError;
use mesh_transport::{Event, Limits, Transport, TransportError, TransportKind};

use crate::support::{Echo, Mesh, PATIENCE, Pair, check_echo, credentials, dispatch, meet, next, try_send, until};

/// The suite as tests of a module `$name`.
macro_rules! suite {
    ($name:ident, $kind:expr) => {
        mod $name {
            use super::*;

            $crate::conformance::suite!(@tests $kind,
                both_ends_know_each_other
                frames_of_every_size_go_both_ways
                three_clients_and_two_servers_keep_their_frames_apart
                a_tiny_window_slows_down_and_loses_nothing
                small_frames_keep_their_order
                a_peer_that_goes_away_is_reported
                closing_gives_all_buffers_back
                frames_without_a_body_pass_a_full_window
                a_wake_ends_a_wait
                a_wait_ends_at_its_deadline
                dropping_a_body_elsewhere_resumes_a_full_window
                what_is_wrong_with_a_send_is_said_at_once
                the_wrong_secret_and_the_wrong_model_are_refused
                one_channel_too_many_is_refused
                nobody_at_an_address_is_an_error
                a_listener_that_is_not_started_is_waited_for
            );
        }
    };
    (@tests $kind:expr, $($test:ident)*) => {
        $(#[test]
        fn $test() {
            crate::conformance::$test($kind);
        })*
    };
}
pub(crate) use suite;

pub fn both_ends_know_each_other(kind: TransportKind) {
    let mesh = Mesh::new(kind);
    let echo = Echo::start(mesh.server(6, &Limits::default()));
    let mut client = mesh.client(7, &Limits::default());
    let (_, identity) = client.connect(&echo.addr, Instant::now() + PATIENCE).unwrap();
    assert_eq!(identity, credentials(Role::Expert, 6).identity);
    assert_eq!(client.kind(), kind);
    assert_eq!(client.stats().channels, 1);
    assert!(echo.addr.starts_with(&format!("{kind}://")));
    echo.stop();
}

pub fn frames_of_every_size_go_both_ways(kind: TransportKind) {
    let mesh = Mesh::new(kind);
    let echo = Echo::start(mesh.server(0, &Limits::default()));
    let mut client = mesh.client(0, &Limits::default());
    let (channel, _) = client.connect(&echo.addr, Instant::now() + PATIENCE).unwrap();
    let whole = (8 << 20) - 64;
    let shapes =
        [(0, 0), (1, 0), (1, 1), (1, 63), (3, 64), (8, 4096), (4, 16_384), (128, 4096), (1, 1 << 20), (1, whole)];
    for (seq, (rows, row_bytes)) in shapes.into_iter().enumerate() {
        assert!(try_send(&mut client, channel, &dispatch(seq as u64, rows, row_bytes)));
        match next(&mut client) {
            Event::Frame { channel: from, header, body } => {
                assert_eq!((from, body.len()), (channel, rows * row_bytes));
                check_echo(seq as u64, &header, &body);
            }
            other => panic!("{other:?}"),
        }
    }
    let stats = client.stats();
    assert_eq!((stats.frames_sent, stats.frames_received), (10, 10));
    assert!(stats.bytes_received > 9 << 20 && stats.bytes_sent > stats.bytes_received);
    all_bodies_come_back(&mut client);
    assert_eq!(echo.stop().stats().bodies_in_use, 0);
}

pub fn three_clients_and_two_servers_keep_their_frames_apart(kind: TransportKind) {
    const FRAMES: u64 = 200;
    let mesh = &Mesh::new(kind);
    let echoes: Vec<Echo> = (0..2).map(|slot| Echo::start(mesh.server(slot, &Limits::default()))).collect();
    let addrs: Vec<String> = echoes.iter().map(|echo| echo.addr.clone()).collect();
    std::thread::scope(|scope| {
        for slot in 0..3 {
            let mut client = mesh.client(slot, &Limits::default());
            let addrs = &addrs;
            scope.spawn(move || {
                let connected = addrs.iter().map(|addr| client.connect(addr, Instant::now() + PATIENCE).unwrap().0);
                let channels: Vec<_> = connected.collect();
                let seq = |server: usize, n: u64| n * 10 + u64::from(slot) * 1_000_000 + server as u64;
                for n in 0..FRAMES {
                    // 16 in flight on each channel at most.
                    for (server, channel) in channels.iter().enumerate() {
                        let header = dispatch(seq(server, n), (n % 5) as usize, 4096);
                        until(&mut client, |client| try_send(client, *channel, &header));
                    }
                    if n % 16 == 15 || n + 1 == FRAMES {
                        let (mut got, mut events) = ([0; 2], Vec::new());
                        let wanted = n % 16 + 1;
                        until(&mut client, |client| {
                            client.poll(&mut events);
                            for event in events.drain(..) {
                                let Event::Frame { channel, header, body } = event else { panic!("{event:?}") };
                                let server = channels.iter().position(|c| *c == channel).unwrap();
                                check_echo(seq(server, n + 1 - wanted + got[server]), &header, &body);
                                got[server] += 1;
                            }
                            got == [wanted; 2]
                        });
                    }
                }
                all_bodies_come_back(&mut client);
            });
        }
    });
    for echo in echoes {
        let stats = echo.stop().stats();
        assert_eq!((stats.bodies_in_use, stats.frames_received), (0, 3 * FRAMES));
    }
}

pub fn a_tiny_window_slows_down_and_loses_nothing(kind: TransportKind) {
    const FRAMES: u64 = 120;
    let limits = Limits { bodies_max: 4, ..Limits::default() };
    let mesh = &Mesh::new(kind);
    let echo = Echo::start(mesh.server(0, &limits));
    std::thread::scope(|scope| {
        for slot in 0..2 {
            let mut client = mesh.client(slot, &limits);
            let addr = &echo.addr;
            scope.spawn(move || {
                let (channel, _) = client.connect(addr, Instant::now() + PATIENCE).unwrap();
                let (mut sent, mut got, mut events) = (0, 0, Vec::new());
                until(&mut client, |client| {
                    while sent < FRAMES && try_send(client, channel, &dispatch(sent, 50, 4096)) {
                        sent += 1;
                    }
                    client.poll(&mut events);
                    for event in events.drain(..) {
                        let Event::Frame { header, body, .. } = event else { panic!("{event:?}") };
                        check_echo(got, &header, &body);
                        got += 1;
                    }
                    got == FRAMES
                });
                all_bodies_come_back(&mut client);
            });
        }
    });
    assert_eq!(echo.stop().stats().bodies_in_use, 0);
}

/// Where bodies are moved, the peer may hold one for a moment after its answer has arrived.
fn all_bodies_come_back(transport: &mut Box<dyn Transport>) {
    until(transport, |transport| transport.stats().bodies_in_use == 0);
}

pub fn small_frames_keep_their_order(kind: TransportKind) {
    const FRAMES: u64 = 5000;
    let Pair { mut client, mut server, near, .. } = Mesh::new(kind).pair(&Limits::default());
    let (mut sent, mut got, mut events) = (0, 0, Vec::new());
    until(&mut server, |server| {
        // Bursts, so that both ends see many frames at once, some with and some without a body.
        while sent < FRAMES && sent < got + 500 {
            let header = dispatch(sent, (sent % 3) as usize, 40);
            if !try_send(&mut client, near, &header) {
                break;
            }
            sent += 1;
        }
        assert_eq!(client.poll(&mut events), 0);
        server.poll(&mut events);
        for event in events.drain(..) {
            let Event::Frame { header, .. } = event else { panic!("{event:?}") };
            assert_eq!(header.seq, Seq(got));
            got += 1;
        }
        got == FRAMES
    });
}

pub fn a_peer_that_goes_away_is_reported(kind: TransportKind) {
    let Pair { mut client, server, near, .. } = Mesh::new(kind).pair(&Limits::default());
    let begun = Instant::now();
    drop(server);
    assert!(
        matches!(next(&mut client), Event::Closed { channel, error: TransportError::Closed { .. } } if channel == near)
    );
    assert!(begun.elapsed() < Duration::from_secs(5), "took {:?}", begun.elapsed());
    let header = FrameHeader::probe(Slot(0));
    let sent = client.buffer(0).and_then(|body| client.send(near, &header, body));
    assert!(matches!(sent, Err(TransportError::NoChannel { channel }) if channel == near));

    // The other way round, and with frames before the end: all of them arrive.
    let Pair { mut client, mut server, near, far } = Mesh::new(kind).pair(&Limits::default());
    assert!(try_send(&mut client, near, &dispatch(1, 2, 4096)));
    let mut events = Vec::new();
    until(&mut server, |server| {
        client.poll(&mut Vec::new());
        server.poll(&mut events) > 0
    });
    client.close(near);
    until(&mut server, |server| {
        server.poll(&mut events);
        events.len() == 2
    });
    assert!(matches!(&events[0], Event::Frame { channel, header, .. } if *channel == far && header.seq == Seq(1)));
    assert!(matches!(&events[1], Event::Closed { channel, .. } if *channel == far));
    assert_eq!(client.poll(&mut events), 0, "an end of one's own making is not reported");
}

pub fn closing_gives_all_buffers_back(kind: TransportKind) {
    let limits = Limits { bodies_max: 32, ..Limits::default() };
    let Pair { mut client, mut server, near, .. } = Mesh::new(kind).pair(&limits);
    let mut seq = 0;
    while seq < 24 && try_send(&mut client, near, &dispatch(seq, 1, 1 << 20)) {
        seq += 1;
    }
    client.close(near);
    let mut events = Vec::new();
    until(&mut server, |server| {
        server.poll(&mut events);
        let closed = events.iter().any(|event| matches!(event, Event::Closed { .. }));
        events.retain(|event| !matches!(event, Event::Frame { .. }));
        closed
    });
    client.poll(&mut events);
    assert_eq!((client.stats().bodies_in_use, server.stats().bodies_in_use), (0, 0));
    assert_eq!((client.stats().channels, server.stats().channels), (0, 0));
}

pub fn frames_without_a_body_pass_a_full_window(kind: TransportKind) {
    let limits = Limits { bodies_max: 2, ..Limits::default() };
    let Pair { mut client, mut server, near, far } = Mesh::new(kind).pair(&limits);
    assert!(try_send(&mut client, near, &dispatch(1, 1, 64)));
    let mut events = Vec::new();
    until(&mut server, |server| {
        client.poll(&mut Vec::new());
        server.poll(&mut events) > 0
    });
    let Event::Frame { header, .. } = &events[0] else { panic!("{events:?}") };
    // The frame's body is still held, and another is taken: both places of the window are.
    let held = server.buffer(64).unwrap();
    let abort = header.abort(Slot(0), AbortReason::Overloaded);
    let body = server.buffer(0).unwrap();
    server.send(far, &abort, body).unwrap();
    match next(&mut client) {
        Event::Frame { header, .. } => {
            assert_eq!((header.kind, header.seq), (Kind::Abort, Seq(1)));
            assert_eq!(AbortReason::from_flags(header.flags), AbortReason::Overloaded);
        }
        other => panic!("{other:?}"),
    }
    drop(held);
}

pub fn a_wake_ends_a_wait(kind: TransportKind) {
    let Pair { mut client, .. } = Mesh::new(kind).pair(&Limits::default());
    let waker = client.waker();
    let begun = Instant::now();
    waker.wake();
    client.wait(Instant::now() + PATIENCE);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Most often the other thread sleeps by now; if not, the wake before the wait must do.
            std::thread::sleep(Duration::from_millis(50));
            waker.wake();
        });
        client.wait(Instant::now() + PATIENCE);
    });
    assert!(begun.elapsed() < PATIENCE / 2);
}

pub fn a_wait_ends_at_its_deadline(kind: TransportKind) {
    let Pair { mut client, mut server, .. } = Mesh::new(kind).pair(&Limits::default());
    for transport in [&mut client, &mut server] {
        // What the connecting left behind may end waits early.
        for _ in 0..5 {
            transport.poll(&mut Vec::new());
            transport.wait(Instant::now() + Duration::from_millis(1));
        }
        let begun = Instant::now();
        transport.wait(begun + Duration::from_millis(60));
        assert!(begun.elapsed() >= Duration::from_millis(60), "only {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}

pub fn dropping_a_body_elsewhere_resumes_a_full_window(kind: TransportKind) {
    // Room for one body in each direction.
    let limits = Limits { bodies_max: 2, ..Limits::default() };
    let Pair { mut client, mut server, near, .. } = Mesh::new(kind).pair(&limits);
    assert!(try_send(&mut client, near, &dispatch(1, 1, 100)));
    let mut events = Vec::new();
    until(&mut server, |server| {
        client.poll(&mut Vec::new());
        server.poll(&mut events) > 0
    });
    let Some(Event::Frame { body: held, .. }) = events.pop() else { panic!("{events:?}") };
    // Where bodies are moved, the sender's window is full now; else the receiver's will be.
    let mut sent = try_send(&mut client, near, &dispatch(2, 1, 100));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(held);
        });
        // Only the window can end these waits.
        while !sent {
            client.wait(begun + PATIENCE);
            sent = try_send(&mut client, near, &dispatch(2, 1, 100));
            assert!(begun.elapsed() < PATIENCE / 2, "the sender was not woken");
        }
        while server.poll(&mut events) == 0 {
            client.poll(&mut Vec::new());
            server.wait(begun + PATIENCE);
            assert!(begun.elapsed() < PATIENCE / 2, "the receiver was not woken");
        }
    });
    assert!(matches!(&events[..], [Event::Frame { header, .. }] if header.seq == Seq(2)));
}

pub fn what_is_wrong_with_a_send_is_said_at_once(kind: TransportKind) {
    let limits = Limits { body_bytes_max: 5000, ..Limits::default() };
    let Pair { mut client, near, mut server, far } = Mesh::new(kind).pair(&limits);
    assert!(matches!(client.buffer(5001), Err(TransportError::BodyTooLarge { bytes: 5001, max: 5000 })));
    let body = client.buffer(100).unwrap();
    let lying = client.send(near, &dispatch(1, 1, 4096), body);
    assert!(matches!(lying, Err(TransportError::BadSend(_))), "{lying:?}");
    client.close(near);
    let body = client.buffer(0).unwrap();
    let late = client.send(near, &FrameHeader::probe(Slot(0)), body);
    assert!(matches!(late, Err(TransportError::NoChannel { .. })), "{late:?}");
    assert!(matches!(next(&mut server), Event::Closed { channel, .. } if channel == far));
    all_bodies_come_back(&mut client);
}

pub fn the_wrong_secret_and_the_wrong_model_are_refused(kind: TransportKind) {
    let mesh = Mesh::new(kind);
    let echo = Echo::start(mesh.server(0, &Limits::default()));
    let (mut no_secret, mut other_model) = (credentials(Role::Attention, 1), credentials(Role::Attention, 1));
    no_secret.secret[0] ^= 1;
    other_model.identity.model[0] ^= 1;
    other_model.identity.node = NodeId(77);
    let connect = |who| mesh.client_as(who, &Limits::default()).connect(&echo.addr, Instant::now() + PATIENCE);
    let refused = connect(no_secret);
    let wrong_secret = |error: &HandshakeError| error.name() == "wrong secret";
    assert!(matches!(&refused, Err(TransportError::Handshake { error, .. }) if wrong_secret(error)), "{refused:?}");
    let refused = connect(other_model);
    let wrong_model = |error: &HandshakeError| error.name() == "wrong model";
    assert!(matches!(&refused, Err(TransportError::Handshake { error, .. }) if wrong_model(error)), "{refused:?}");
    assert!(connect(credentials(Role::Attention, 1)).is_ok(), "the listener goes on");
    let mut server = echo.stop();
    until(&mut server, |server| {
        server.poll(&mut Vec::new());
        server.stats().refused.values().sum::<u64>() == 2
    });
    let refused: Vec<_> = server.stats().refused.into_iter().collect();
    assert_eq!(refused, [("wrong model", 1), ("wrong secret", 1)]);
}

pub fn one_channel_too_many_is_refused(kind: TransportKind) {
    let mesh = Mesh::new(kind);
    let limits = Limits { channels_max: 2, ..Limits::default() };
    let echo = Echo::start(mesh.server(0, &limits));
    let mut client = mesh.client(0, &Limits::default());
    for _ in 0..2 {
        client.connect(&echo.addr, Instant::now() + PATIENCE).unwrap();
    }
    let refused = client.connect(&echo.addr, Instant::now() + PATIENCE);
    assert!(matches!(&refused, Err(TransportError::Handshake { .. })), "{refused:?}");
    let mut small = mesh.client(1, &Limits { channels_max: 0, ..limits });
    let refused = small.connect(&echo.addr, Instant::now() + PATIENCE);
    assert!(matches!(refused, Err(TransportError::TooManyChannels { max: 0 })), "{refused:?}");
    echo.stop();
}

pub fn nobody_at_an_address_is_an_error(kind: TransportKind) {
    let mesh = Mesh::new(kind);
    let server = mesh.server(0, &Limits::default());
    let addr = server.local_addr().to_owned();
    drop(server);
    let refused = mesh.client(0, &Limits::default()).connect(&addr, Instant::now() + PATIENCE);
    assert!(matches!(&refused, Err(TransportError::Connect { peer, .. }) if *peer == addr), "{refused:?}");
}

pub fn a_listener_that_is_not_started_is_waited_for(kind: TransportKind) {
    let mesh = Mesh::new(kind);
    let bound = mesh.bind(&Limits::default());
    let addr = bound.local_addr().to_owned();
    let mut hasty = mesh.client(0, &Limits { handshake_max: Duration::from_millis(50), ..Limits::default() });
    let begun = Instant::now();
    assert!(hasty.connect(&addr, begun + PATIENCE).is_err(), "nobody answers");
    assert!(begun.elapsed() < PATIENCE / 2);
    let mut client = mesh.client(1, &Limits::default());
    let mut server = bound.start(credentials(Role::Expert, 0)).unwrap();
    let mut events = Vec::new();
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| client.connect(&addr, Instant::now() + PATIENCE).map(|_| ()));
        until(&mut server, |server| {
            server.poll(&mut events);
            events.iter().any(|e| matches!(e, Event::Accepted { peer, .. } if peer.slot == Slot(1)))
        });
        connecting.join().unwrap().unwrap();
    });
    let mut other = mesh.client(2, &Limits::default());
    meet(&mut other, &mut server);
}
