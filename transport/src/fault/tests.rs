//! Each fault does what its name says, is counted, and comes again from the same seed.

use mesh_core::{Lane, LayerId, NodeId, Role, Seq, Slot, ViewId};

use super::*;
use crate::frame::Kind;
use crate::{Credentials, Limits, LocalHub, bind, client, open};

const PATIENCE: Duration = Duration::from_secs(60);
const ROW_BYTES: usize = 64;

/// A client whose frames are harmed, and a server.
struct Pair {
    client: Box<dyn Transport>,
    server: Box<dyn Transport>,
    near: ChannelId,
    far: ChannelId,
}

fn credentials(role: Role) -> Credentials {
    Credentials { secret: [5; 32], identity: Identity { node: NodeId(1), role, slot: Slot(0), model: [3; 32] } }
}

fn pair(kind: TransportKind, limits: &Limits, spec: &str) -> Pair {
    let hub = LocalHub::new();
    let server = bind(kind, "127.0.0.1:0", limits.clone(), Some(hub.clone())).unwrap();
    let mut server = server.start(credentials(Role::Expert)).unwrap();
    let client = client(kind, limits.clone(), Some(hub), credentials(Role::Attention)).unwrap();
    let mut client = wrap(client, Some(&spec.parse().unwrap()));
    let addr = server.local_addr().to_owned();
    let (near, accepted) = std::thread::scope(|scope| {
        let near = scope.spawn(|| client.connect(&addr, Instant::now() + PATIENCE).unwrap().0);
        let accepted = collect(&mut server, 1);
        (near.join().unwrap(), accepted)
    });
    let far = accepted[0].channel();
    Pair { client, server, near, far }
}

fn local(spec: &str) -> Pair {
    pair(TransportKind::Local, &Limits::default(), spec)
}

/// A dispatch of one row for one expert, or a combine of one row.
fn header(kind: Kind, seq: u64) -> FrameHeader {
    let body_bytes = if kind == Kind::Combine { ROW_BYTES } else { ROW_BYTES + 64 } as u32;
    let counts =
        FrameHeader { rows: 1, pairs: 1, row_bytes: ROW_BYTES as u32, body_bytes, ..FrameHeader::probe(Slot(0)) };
    FrameHeader { kind, view: ViewId(5), seq: Seq(seq), layer: LayerId(2), lane: Lane(1), ..counts }
}

fn send(transport: &mut Box<dyn Transport>, channel: ChannelId, kind: Kind, seq: u64) {
    let header = header(kind, seq);
    let mut body = transport.buffer(header.body_bytes as usize).unwrap();
    body.fill(seq as u8);
    transport.send(channel, &header, body).unwrap();
}

/// Waits for `count` events at least.
fn collect(transport: &mut Box<dyn Transport>, count: usize) -> Vec<Event> {
    let (mut events, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    while events.len() < count {
        assert!(Instant::now() < deadline, "{count} events are due, and came {events:?}");
        transport.poll(&mut events);
        if events.len() < count {
            transport.wait(Instant::now() + Duration::from_millis(20));
        }
    }
    events
}

/// As [`collect`], while the other end does its part too, which UCX needs; what arrives there is dropped.
fn arriving(transport: &mut Box<dyn Transport>, other: &mut Box<dyn Transport>) -> Event {
    let (mut events, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    while events.is_empty() {
        assert!(Instant::now() < deadline, "nothing came");
        other.poll(&mut Vec::new());
        transport.poll(&mut events);
        if events.is_empty() {
            transport.wait(Instant::now() + Duration::from_millis(1));
        }
    }
    events.remove(0)
}

/// The numbers of frames, whose bodies must be theirs.
fn seqs(events: &[Event]) -> Vec<u64> {
    let seq = |event: &Event| match event {
        Event::Frame { header, body, .. } => {
            assert!(body.len() == header.body_bytes as usize && body.iter().all(|b| *b == header.seq.0 as u8));
            header.seq.0
        }
        other => panic!("{other:?}"),
    };
    events.iter().map(seq).collect()
}

fn counts(transport: &dyn Transport) -> Vec<(&'static str, u64)> {
    transport.stats().injected.into_iter().collect()
}

#[test]
fn without_faults_nothing_is_wrapped_and_nothing_counted() {
    let Pair { mut client, mut server, near, .. } = local("seed=9");
    (1..=3).for_each(|seq| send(&mut client, near, Kind::Dispatch, seq));
    assert_eq!(seqs(&collect(&mut server, 3)), [1, 2, 3]);
    assert_eq!(counts(client.as_ref()), []);
}

#[test]
fn a_dropped_frame_is_gone_both_ways_and_its_body_is_back() {
    let Pair { mut client, mut server, near, far } = local("drop=1");
    (1..=5).for_each(|seq| send(&mut client, near, Kind::Dispatch, seq));
    (1..=4).for_each(|seq| send(&mut server, far, Kind::Combine, seq));
    let (mut there, mut here) = (Vec::new(), Vec::new());
    assert_eq!((server.poll(&mut there), client.poll(&mut here)), (0, 0));
    assert_eq!(counts(client.as_ref()), [("injected_drop", 9)]);
    assert_eq!((client.stats().bodies_in_use, server.stats().bodies_in_use), (0, 0));
}

#[test]
fn delayed_frames_keep_their_order_and_the_wait_wakes_for_them() {
    let Pair { mut client, mut server, near, far } = local("delay=0.5:10ms-30ms");
    let begun = Instant::now();
    (1..=20).for_each(|seq| send(&mut client, near, Kind::Dispatch, seq));
    (1..=20).for_each(|seq| send(&mut server, far, Kind::Combine, seq));
    let mut here = Vec::new();
    while here.len() < 20 {
        client.poll(&mut here);
        if here.len() < 20 {
            client.wait(begun + PATIENCE);
        }
    }
    assert!(begun.elapsed() >= Duration::from_millis(10) && begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    // Those that it sends may be held for longer than those that it received.
    let held = Instant::now() + Duration::from_millis(40);
    while Instant::now() < held {
        client.wait(held);
        client.poll(&mut here);
    }
    assert_eq!(seqs(&here), (1..=20).collect::<Vec<_>>());
    assert_eq!(seqs(&collect(&mut server, 20)), (1..=20).collect::<Vec<_>>());
    let counts = counts(client.as_ref());
    assert!(matches!(counts[..], [("injected_delay", 10..30)]), "{counts:?}");
}

#[test]
fn only_so_many_frames_are_held_and_those_beyond_pass_in_order() {
    let limits = Limits { bodies_max: 512, ..Limits::default() };
    let Pair { mut client, mut server, near, .. } = pair(TransportKind::Local, &limits, "delay=1:10s-10s");
    let sent = 3 * HELD_MAX as u64;
    for seq in 1..=sent {
        send(&mut client, near, Kind::Dispatch, seq);
    }
    let passed = seqs(&collect(&mut server, 2 * HELD_MAX - 2));
    assert_eq!(passed, (1..=passed.len() as u64).collect::<Vec<_>>());
    let skipped = client.stats().injected["skipped_delay"];
    assert_eq!((skipped, client.stats().injected["injected_delay"]), (3, sent - 3));
    // Held frames go with their channel.
    client.close(near);
    drop(server);
    assert_eq!(client.stats().bodies_in_use, 0);
}

#[test]
fn a_duplicate_has_a_body_of_its_own_or_is_left_out_when_there_is_none() {
    let limits = Limits { bodies_max: 4, ..Limits::default() };
    let Pair { mut client, mut server, near, .. } = pair(TransportKind::Local, &limits, "duplicate=1");
    send(&mut client, near, Kind::Dispatch, 1);
    let twice = collect(&mut server, 2);
    assert_eq!(seqs(&twice), [1, 1]);
    // Two of the three bodies that may be sent are out still.
    send(&mut client, near, Kind::Dispatch, 2);
    assert_eq!(seqs(&collect(&mut server, 1)), [2]);
    assert_eq!(counts(client.as_ref()), [("injected_duplicate", 1), ("skipped_duplicate", 1)]);
    let abort = header(Kind::Dispatch, 3).abort(Slot(0), crate::frame::AbortReason::BadBody);
    client.send(near, &abort, FrameBuf::empty()).unwrap();
    assert_eq!(collect(&mut server, 2).len(), 2);
}

#[test]
fn the_next_frame_overtakes_one_to_be_reordered_and_alone_it_goes_on() {
    let Pair { mut client, mut server, near, .. } = local("reorder=1");
    (1..=4).for_each(|seq| send(&mut client, near, Kind::Dispatch, seq));
    assert_eq!(seqs(&collect(&mut server, 4)), [2, 1, 4, 3]);
    assert_eq!(counts(client.as_ref()), [("injected_reorder", 2), ("skipped_reorder", 2)]);
    send(&mut client, near, Kind::Dispatch, 5);
    let mut there = Vec::new();
    assert_eq!(server.poll(&mut there), 0);
    client.wait(Instant::now() + PATIENCE);
    client.poll(&mut Vec::new());
    assert_eq!(seqs(&collect(&mut server, 1)), [5]);
    assert_eq!(counts(client.as_ref()), [("injected_reorder", 2), ("skipped_reorder", 3)]);
}

fn assert_damaged(event: &Event) {
    let Event::Closed { error: TransportError::Frame { .. }, .. } = event else { panic!("{event:?}") };
}

#[test]
fn damage_meets_the_receivers_own_check_on_every_backend() {
    let kinds = [TransportKind::Local, TransportKind::Tcp, TransportKind::Ucx];
    for kind in kinds.into_iter().filter(|kind| *kind != TransportKind::Ucx || open::ucx_missing().is_none()) {
        for seed in 0..10 {
            let spec = format!("seed={seed},corrupt=1");
            let Pair { mut client, mut server, near, .. } = pair(kind, &Limits::default(), &spec);
            send(&mut client, near, Kind::Dispatch, 1);
            assert_damaged(&arriving(&mut server, &mut client));
            assert_eq!(server.stats().refused["bad frame"], 1, "{kind}");
            assert_eq!(counts(client.as_ref()), [("injected_corrupt", 1)], "{kind}");

            // What has arrived is whole: the next one is struck.
            let Pair { mut client, mut server, far, .. } = pair(kind, &Limits::default(), &spec);
            send(&mut server, far, Kind::Combine, 1);
            assert_eq!(seqs(&[arriving(&mut client, &mut server)]), [1]);
            assert_eq!(counts(client.as_ref()), []);
            send(&mut server, far, Kind::Combine, 2);
            assert_damaged(&arriving(&mut client, &mut server));
            assert_eq!(client.stats().refused["bad frame"], 1, "{kind}");
            assert_eq!(counts(client.as_ref()), [("injected_corrupt", 1)], "{kind}");
        }
    }
}

#[test]
fn a_frame_that_says_something_wrong_arrives_so_both_ways() {
    for (key, name) in [
        ("stale", "injected_stale"),
        ("wrong_lane", "injected_wrong_lane"),
        ("wrong_layer", "injected_wrong_layer"),
        ("wrong_pairs", "injected_wrong_pairs"),
        ("wrong_seq", "injected_wrong_seq"),
    ] {
        let Pair { mut client, mut server, near, far } = local(&format!("{key}=1"));
        send(&mut client, near, Kind::Dispatch, 1);
        send(&mut server, far, Kind::Combine, 1);
        let fields = |h: &FrameHeader| (h.view, h.lane, h.layer, h.pairs, h.seq);
        let arrived = [(Kind::Dispatch, collect(&mut server, 1)), (Kind::Combine, collect(&mut client, 1))];
        for (kind, events) in arrived {
            let Event::Frame { header: wrong, .. } = &events[0] else { panic!("{events:?}") };
            assert_ne!(fields(wrong), fields(&header(kind, 1)), "{key}");
        }
        assert_eq!(counts(client.as_ref()), [(name, 2)]);
    }
}

#[test]
fn a_cut_closes_the_channel_at_both_ends_and_loses_the_frame() {
    let Pair { mut client, mut server, near, .. } = local("cut=1");
    send(&mut client, near, Kind::Dispatch, 1);
    assert!(matches!(collect(&mut client, 1)[..], [Event::Closed { channel, .. }] if channel == near));
    assert!(matches!(collect(&mut server, 1)[..], [Event::Closed { .. }]));
    let late = client.send(near, &FrameHeader::probe(Slot(0)), FrameBuf::empty());
    assert!(matches!(late, Err(TransportError::NoChannel { .. })), "{late:?}");

    let Pair { mut client, mut server, far, near } = local("cut=1");
    (1..=3).for_each(|seq| send(&mut server, far, Kind::Combine, seq));
    assert!(matches!(collect(&mut client, 1)[..], [Event::Closed { channel, .. }] if channel == near));
    assert_eq!(counts(client.as_ref()), [("injected_cut", 1)]);
    assert_eq!(client.stats().channels, 0);
}

#[test]
fn a_closed_channel_reports_nothing_more() {
    let Pair { mut client, mut server, near, far } = local("cut=1");
    send(&mut client, near, Kind::Dispatch, 1);
    client.close(near);
    let _gone = server.send(far, &FrameHeader::probe(Slot(0)), FrameBuf::empty());
    assert_eq!(client.poll(&mut Vec::new()), 0);
}

/// What came of 2000 frames each way over two channels.
fn run(spec: &str) -> (Vec<FrameHeader>, Vec<FrameHeader>, BTreeMap<&'static str, u64>) {
    let Pair { mut client, mut server, near, far } = local(spec);
    let addr = server.local_addr().to_owned();
    let (second, _) = client.connect(&addr, Instant::now() + PATIENCE).unwrap();
    let second_far = collect(&mut server, 1)[0].channel();
    let (mut there, mut here) = (Vec::new(), Vec::new());
    for seq in 1..=1000 {
        for (near, far) in [(near, far), (second, second_far)] {
            send(&mut client, near, Kind::Dispatch, seq);
            send(&mut server, far, Kind::Combine, seq);
        }
        for (transport, into) in [(&mut server, &mut there), (&mut client, &mut here)] {
            let mut events = Vec::new();
            transport.poll(&mut events);
            into.extend(events.into_iter().map(|event| match event {
                Event::Frame { header, .. } => header,
                other => panic!("{other:?}"),
            }));
        }
    }
    (there, here, client.stats().injected)
}

#[test]
fn the_same_seed_makes_the_same_faults_and_another_makes_others() {
    let spec = |seed| format!("seed={seed},drop=0.05,duplicate=0.05,stale=0.05,wrong_lane=0.05,wrong_seq=0.05");
    let first = run(&spec(7));
    assert_eq!(first, run(&spec(7)));
    assert_ne!(first, run(&spec(8)));
    assert_eq!(first.2.len(), 5);
    assert!(first.2.values().all(|count| (100..300).contains(count)), "{:?}", first.2);
}
