//! Who connects to a TCP node's data port without belonging there, and what it can do: nothing to anybody else.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use mesh_core::{Role, Slot};
use mesh_transport::frame::FrameHeader;
use mesh_transport::handshake::Handshake;
use mesh_transport::{Event, Limits, Transport, TransportError, TransportKind};

use crate::support::{Mesh, PATIENCE, check_echo, credentials, dispatch, meet, next, try_send, until};

fn dial(server: &dyn Transport) -> TcpStream {
    let stream = TcpStream::connect(server.local_addr().strip_prefix("tcp://").unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Comes through the handshake by hand, so that what follows can be anything.
fn intrude(server: &mut Box<dyn Transport>) -> TcpStream {
    let mut stream = dial(server.as_ref());
    std::thread::scope(|scope| {
        let entered = scope.spawn(move || {
            let mut handshake = Handshake::client(&credentials(Role::Attention, 66), &[]).unwrap();
            while handshake.finished().is_none() {
                let written = stream.write(handshake.output()).unwrap();
                handshake.wrote(written);
                let mut bytes = vec![0; handshake.wanted()];
                let read = stream.read(&mut bytes).unwrap();
                handshake.advance(&bytes[..read]).unwrap();
            }
            stream
        });
        assert!(matches!(next(server), Event::Accepted { peer, .. } if peer.slot == Slot(66)));
        entered.join().unwrap()
    })
}

fn refused(server: &mut Box<dyn Transport>, reason: &str, count: u64) {
    until(server, |server| {
        server.poll(&mut Vec::new());
        server.stats().refused.get(reason) == Some(&count)
    });
}

#[test]
fn strangers_are_counted_and_hung_up_on_and_the_mesh_goes_on() {
    let mesh = Mesh::new(TransportKind::Tcp);
    let limits = Limits { handshake_max: Duration::from_millis(300), ..Limits::default() };
    let (mut client, mut server) = (mesh.client(0, &Limits::default()), mesh.server(0, &limits));
    let (near, far) = meet(&mut client, &mut server);

    let mut http = dial(server.as_ref());
    http.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    refused(&mut server, "not ours", 1);
    assert_eq!(http.read(&mut [0; 64]).unwrap_or(0), 0, "told nothing");

    let mut half = dial(server.as_ref());
    half.write_all(&Handshake::client(&credentials(Role::Attention, 1), &[]).unwrap().output()[..40]).unwrap();
    let silent = dial(server.as_ref());
    refused(&mut server, "handshake timeout", 2);
    drop((half, silent));

    drop(dial(server.as_ref()));
    refused(&mut server, "hung up", 1);

    assert!(try_send(&mut client, near, &dispatch(1, 1, 64)));
    assert!(matches!(next(&mut server), Event::Frame { channel, .. } if channel == far));
}

#[test]
fn more_strangers_than_there_is_room_for_do_not_keep_the_mesh_out() {
    let mesh = Mesh::new(TransportKind::Tcp);
    let limits = Limits { channels_max: 4, ..Limits::default() };
    let (mut client, mut server) = (mesh.client(0, &Limits::default()), mesh.server(0, &limits));
    let strangers: Vec<TcpStream> = (0..20).map(|_| dial(server.as_ref())).collect();
    meet(&mut client, &mut server);
    assert!(server.stats().refused["too many unauthenticated"] >= 16);
    drop(strangers);
}

#[test]
fn a_bad_frame_closes_its_channel_and_no_other() {
    let mesh = Mesh::new(TransportKind::Tcp);
    let (mut client, mut server) = (mesh.client(0, &Limits::default()), mesh.server(0, &Limits::default()));
    let (near, far) = meet(&mut client, &mut server);
    let body = vec![7; dispatch(1, 2, 100).body_bytes as usize];
    let good = dispatch(1, 2, 100).encode(&body);
    let damaged = |at: usize| {
        let mut bytes = good;
        bytes[at] ^= 0x40;
        bytes
    };
    let huge = FrameHeader { row_bytes: u32::MAX, ..dispatch(1, 2, 100) }.encode(&body);
    let lying = FrameHeader { rows: 3_000_000_000, ..dispatch(1, 2, 100) }.encode(&body);
    let mut other_body = body.clone();
    other_body[99] ^= 1;
    let other_body = [&good[..], &other_body].concat();
    let heads = [damaged(0), damaged(4), damaged(30), damaged(45), damaged(63), huge, lying];
    for (n, bytes) in heads.map(Vec::from).into_iter().chain([other_body]).enumerate() {
        let mut stream = intrude(&mut server);
        stream.write_all(&bytes).unwrap();
        let event = next(&mut server);
        let bad =
            |e: &Event| matches!(e, Event::Closed { channel, error: TransportError::Frame { .. } } if *channel != far);
        assert!(bad(&event), "{event:?}");
        assert_eq!(server.stats().refused["bad frame"], n as u64 + 1);
        assert_eq!(stream.read(&mut [0; 64]).unwrap_or(0), 0);
        assert!(try_send(&mut client, near, &dispatch(n as u64, 3, 64)));
        match next(&mut server) {
            Event::Frame { channel, header, body } => {
                assert_eq!(channel, far);
                let rows = mesh_transport::frame::DispatchBody::parse(&header, &body).unwrap();
                check_echo(n as u64, &FrameHeader { body_bytes: 192, ..header.combine(Slot(0), 0) }, rows.rows());
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_frame_cut_off_in_its_middle_is_not_delivered_and_frees_its_body() {
    let mut server = Mesh::new(TransportKind::Tcp).server(0, &Limits::default());
    for cut in [1, 63, 64, 100, 263] {
        let mut stream = intrude(&mut server);
        let mut bytes = dispatch(1, 2, 100).encode(&[1; 264]).to_vec();
        bytes.resize(264 + 64, 1);
        stream.write_all(&bytes[..cut]).unwrap();
        drop(stream);
        let event = next(&mut server);
        assert!(matches!(event, Event::Closed { error: TransportError::Closed { .. }, .. }), "{event:?}");
        assert_eq!(server.stats().bodies_in_use, 0);
    }
}

#[test]
fn a_frame_that_comes_byte_by_byte_arrives_whole() {
    let mut server = Mesh::new(TransportKind::Tcp).server(0, &Limits::default());
    let mut stream = intrude(&mut server);
    stream.set_nodelay(true).unwrap();
    let header = dispatch(1, 1, 20);
    let body = vec![7; header.body_bytes as usize];
    let bytes = [&header.encode(&body)[..], &body].concat();
    let mut events = Vec::new();
    for byte in &bytes {
        assert!(events.is_empty());
        stream.write_all(std::slice::from_ref(byte)).unwrap();
        server.wait(Instant::now() + Duration::from_millis(1));
        server.poll(&mut events);
    }
    until(&mut server, |server| {
        server.poll(&mut events);
        !events.is_empty()
    });
    assert!(
        matches!(&events[..], [Event::Frame { header: found, body, .. }] if *found == header && body[64..] == [7; 20])
    );
}
