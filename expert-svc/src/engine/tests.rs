//! An engine whose turns the test takes itself, and attention nodes played by the test, in one thread: nothing sleeps.

mod rig;

use mesh_core::placement::Placement;
use mesh_core::view::View;
use mesh_core::{ExpertId, LayerId, Seq, ViewId};
use mesh_kernels::packed::Packer;
use mesh_model::Checkpoint;
use mesh_service::membership::ViewTarget;
use mesh_transport::frame::{self, dispatch_body_bytes};
use mesh_transport::local::LocalTransport;

use self::rig::*;
use super::*;
use crate::load::Loader;

#[test]
fn every_pair_is_answered_in_order_with_what_its_expert_says_to_its_row() {
    let mut rig = Rig::serving();
    let mut attention = rig.attention(0);
    let rows: [Row<'_>; 3] = [(5, &[0, 3]), (6, &[1]), (7, &[0, 2])];
    let sent = attention.dispatch(1, 2, &rows);
    rig.turn();
    let (answer, body) = attention.answer();
    assert_eq!(answer, sent.combine(SLOT, answer.server_ns));
    assert!(answer.server_ns > 0);
    let pairs: Vec<(u32, u16)> = rows.iter().flat_map(|(seed, e)| e.iter().map(|e| (*seed, *e))).collect();
    for ((seed, expert), found) in pairs.into_iter().zip(body.chunks_exact(ROW)) {
        let (found, wanted) = (floats(found), rig.expected(2, expert, &row(seed)));
        let largest = wanted.iter().fold(0f32, |m, w| m.max(w.abs()));
        let off = found.iter().zip(&wanted).fold(0f32, |m, (f, w)| m.max((f - w).abs()));
        assert!(largest > 0.0 && off <= 1e-5 * largest, "row {seed}, expert {expert}: off by {off} of {largest}");
    }
    let load = rig.load();
    assert_eq!((load.rows, load.pairs, load.frames_received, load.frames_sent), (3, 5, 1, 1));
    assert_eq!((load.dispatch_bytes, load.combine_bytes), (3 * ROW as u64, 5 * ROW as u64));
    assert_eq!(load.experts_held, 16);
    let mut wanted = vec![0u64; rig.engine.parts.shape.len()];
    for expert in rows.iter().flat_map(|(_, experts)| experts.iter()) {
        wanted[rig.engine.parts.shape.index(LayerId(2), ExpertId(*expert)).unwrap()] += 1;
    }
    assert_eq!(load.expert_rows, wanted, "each expert's rows, for placement");
    let table = rig.engine.parts.tables.served().current.unwrap();
    let expert = |e| table.get(rig.engine.parts.shape.index(LayerId(2), ExpertId(e)).unwrap()).unwrap();
    let pair_flops = 2 * 3 * (expert(0).hidden() * expert(0).intermediate()) as u64;
    let [receive, ffn, answer] = &load.parts[..] else { panic!("{load:?}") };
    assert_eq!((ffn.part.as_str(), ffn.flops), ("ffn", 5 * pair_flops));
    assert_eq!(ffn.weight_bytes, 4 * expert(0).bytes() as u64, "an expert that two rows want is gone through once");
    assert!(ffn.ns > 0 && answer.ns > 0 && receive.flops + answer.flops == 0, "{load:?}");
}

#[test]
fn rows_batched_over_nodes_and_layers_get_the_same_bits_as_alone() {
    let mut rig = Rig::serving();
    let (mut a, mut b) = (rig.attention(0), rig.attention(1));
    let (of_a, of_b): ([Row<'_>; 2], [Row<'_>; 2]) = ([(5, &[0, 3]), (6, &[1])], [(7, &[0, 1]), (8, &[3])]);
    let mut alone = Vec::new();
    let mut lone = |attention: &mut Attention, rows: &[Row<'_>], layer| {
        attention.dispatch(1, layer, rows);
        rig.turn();
        alone.push(attention.answer().1.to_vec());
    };
    lone(&mut a, &of_a, 1);
    lone(&mut b, &of_b, 1);
    lone(&mut b, &of_a, 2);
    let rounds = rig.engine.parts.counters.rounds();
    let sent = [a.dispatch(1, 1, &of_a), b.dispatch(1, 1, &of_b), b.dispatch(1, 2, &of_a)];
    rig.turn();
    assert_eq!(rig.engine.parts.counters.rounds(), rounds + 1, "one round took all three");
    assert_eq!(a.answer().1.to_vec(), alone[0]);
    for event in b.events() {
        let Event::Frame { header, body, .. } = event else { panic!("{event:?}") };
        let i = sent.iter().position(|s| s.seq == header.seq && s.layer == header.layer).unwrap();
        assert_eq!(body.to_vec(), alone[i]);
    }
}

#[test]
fn what_cannot_be_answered_is_refused_with_its_reason_and_the_channel_goes_on() {
    let mut rig = Rig::serving();
    let mut attention = rig.attention(0);
    let unheld = attention.dispatch(1, 0, &[(1, &[0, 4])]);
    rig.turn();
    attention.is_refused(&unheld, AbortReason::ExpertNotHeld);
    let unknown = attention.dispatch(1, 0, &[(1, &[8])]);
    rig.turn();
    attention.is_refused(&unknown, AbortReason::ExpertNotHeld);
    let layer = attention.dispatch(1, 4, &[(1, &[0])]);
    rig.turn();
    attention.is_refused(&layer, AbortReason::UnknownLayer);
    let narrow = FrameHeader {
        row_bytes: ROW as u32 / 2,
        body_bytes: dispatch_body_bytes(1, 1, ROW / 2).unwrap() as u32,
        ..attention.header(1, 0, &[(1, &[0])])
    };
    attention.send(narrow, &[(1, &[0])]);
    rig.turn();
    attention.is_refused(&narrow, AbortReason::WrongRowBytes);
    // 33 rows of 2 pairs: the dispatch fits a frame, the answer does not.
    let many: Vec<Row<'_>> = (0..33).map(|i| (i, &[0u16, 1][..])).collect();
    let large = attention.dispatch(1, 0, &many);
    rig.turn();
    attention.is_refused(&large, AbortReason::Overloaded);
    let reasons = [Refusal::ExpertNotHeld, Refusal::UnknownLayer, Refusal::WrongRowBytes, Refusal::Overloaded];
    assert_eq!(reasons.map(|r| rig.refused(r)), [2, 1, 1, 1]);
    attention.is_served(&mut rig, 1);
}

#[test]
fn what_cannot_be_trusted_closes_its_channel_and_no_other() {
    let rows: [Row<'_>; 2] = [(1, &[0, 3]), (2, &[1])];
    type Twist = fn(&mut FrameHeader, &mut [u8]);
    let twists: [(&str, Twist); 6] = [
        ("experts out of order", |_, body| body[4..8].copy_from_slice(&[3, 0, 0, 0])),
        ("a row without experts", |_, body| body[..4].copy_from_slice(&[3, 0, 0, 0])),
        ("pairs that do not add up", |_, body| body[..4].copy_from_slice(&[9, 0, 9, 0])),
        ("a repeated number", |header, _| header.seq = Seq(1)),
        ("another's name", |header, _| header.origin = Slot(9)),
        ("a combine", |header, _| {
            header.kind = Kind::Combine;
            header.pairs = header.body_bytes / 64;
            header.row_bytes = 64;
        }),
    ];
    let mut rig = Rig::serving();
    let mut bystander = rig.attention(5);
    for (i, (what, twist)) in twists.into_iter().enumerate() {
        let mut attention = rig.attention(0);
        attention.is_served(&mut rig, 1);
        let mut header = attention.header(1, 0, &rows);
        let mut body = attention.body(&header, &rows);
        twist(&mut header, &mut body);
        attention.transport.send(attention.channel, &header, body).unwrap();
        rig.turn();
        attention.is_closed();
        let closed = rig.refused(Refusal::BadBody) + rig.refused(Refusal::Protocol);
        assert_eq!(closed, i as u64 + 1, "{what}");
        bystander.is_served(&mut rig, 1);
    }
    assert_eq!(rig.engine.parts.counters.channels(), 1);
}

#[test]
fn an_empty_dispatch_and_another_expert_node_are_turned_away_and_a_probe_is_nothing() {
    let mut rig = Rig::serving();
    let mut attention = rig.attention(0);
    attention.transport.send(attention.channel, &FrameHeader::probe(Slot(0)), FrameBuf::empty()).unwrap();
    attention.is_served(&mut rig, 1);
    let none = attention.header(1, 0, &[]);
    attention.send(none, &[]);
    rig.turn();
    attention.is_closed();
    let peer = credentials(Role::Expert, OTHER);
    let mut peer = LocalTransport::client(rig.hub.clone(), window(), peer);
    if peer.connect(&rig.addr, Instant::now() + Duration::from_secs(30)).is_ok() {
        rig.turn();
        let mut events = Vec::new();
        peer.poll(&mut events);
        assert!(matches!(events[..], [Event::Closed { .. }]), "{events:?}");
    }
}

#[test]
fn a_frame_of_a_newer_view_waits_for_it_and_is_answered_when_it_comes() {
    let mut rig = Rig::serving();
    let mut attention = rig.attention(0);
    attention.dispatch(2, 0, &[(1, &[5])]);
    rig.turn();
    assert!(attention.events().is_empty());
    rig.prepare(view(2, 4..8)).unwrap();
    rig.turn();
    assert_eq!(attention.answer().0.view, ViewId(2), "prepared is enough: who has committed may use it");
    attention.is_served(&mut rig, 1);
}

#[test]
fn a_frame_whose_view_does_not_come_is_refused_after_its_time_and_few_may_wait() {
    let mut rig = Rig::serving();
    let mut attention = rig.attention(0);
    let sent: Vec<FrameHeader> = (0..3).map(|_| attention.dispatch(9, 0, &[(1, &[0])])).collect();
    rig.turn();
    attention.is_refused(&sent[2], AbortReason::FutureView);
    let start = rig.now;
    rig.now = start + LIMITS.parked_max - Duration::from_millis(1);
    rig.turn();
    assert!(attention.events().is_empty());
    rig.now = start + LIMITS.parked_max;
    assert!(rig.engine.turn(rig.now).is_some());
    assert_eq!(attention.events().len(), 2);
    assert_eq!(rig.refused(Refusal::FutureView), 3);
    attention.is_served(&mut rig, 1);
}

#[test]
fn a_view_that_lingers_is_served_until_it_expires_and_then_is_stale() {
    let mut rig = Rig::serving();
    let mut attention = rig.attention(0);
    rig.put_in_force(view(2, 2..6));
    attention.is_served(&mut rig, 1);
    attention.is_served(&mut rig, 2);
    rig.engine.parts.tables.expire(ViewId(1));
    let stale = attention.dispatch(1, 0, &[(1, &[2])]);
    rig.turn();
    attention.is_refused(&stale, AbortReason::StaleView);
    let gone = attention.dispatch(2, 0, &[(1, &[0])]);
    rig.turn();
    attention.is_refused(&gone, AbortReason::ExpertNotHeld);
    assert_eq!((rig.refused(Refusal::StaleView), rig.refused(Refusal::ExpertNotHeld)), (1, 1));
}

#[test]
fn a_change_loads_what_is_new_shares_what_stays_and_frees_what_goes() {
    let rig = Rig::serving();
    let tables = rig.engine.parts.tables.clone();
    let before = tables.served().current.unwrap();
    rig.put_in_force(view(2, 2..6));
    let after = tables.served().current.unwrap();
    let index = |e| rig.loader.shape().index(LayerId(3), ExpertId(e)).unwrap();
    assert!(Arc::ptr_eq(before.get(index(2)).unwrap(), after.get(index(2)).unwrap()));
    assert!(after.get(index(0)).is_none() && after.get(index(5)).is_some());
    let leaving = Arc::downgrade(before.get(index(0)).unwrap());
    drop(before);
    let told = |rig: &Rig| (rig.load().experts_held, rig.load().experts_in_memory);
    assert!(leaving.upgrade().is_some(), "the view before lingers");
    assert_eq!(told(&rig), (16, 24), "two experts more in each of four layers");
    tables.expire(ViewId(1));
    assert!(leaving.upgrade().is_none());
    assert_eq!(told(&rig), (16, 16));
}

#[test]
fn an_abandoned_view_leaves_the_one_in_force() {
    let mut rig = Rig::serving();
    rig.prepare(view(2, 4..8)).unwrap();
    rig.views.abandon(ViewId(2));
    assert!(rig.runtime.block_on(rig.views.commit(ViewId(2))).is_err());
    let mut attention = rig.attention(0);
    attention.is_served(&mut rig, 1);
    let older = rig.prepare(view(1, 0..4)).unwrap_err();
    assert!(older.contains("not newer"), "{older}");
    let foreign =
        View { placement: Placement::balanced(vec![LayerId(0)], 8, &[SLOT], 1).unwrap(), ..(*view(3, 0..8)).clone() };
    let foreign = rig.prepare(Arc::new(foreign)).unwrap_err();
    assert!(foreign.contains("the model has 8 of 4"), "{foreign}");
    let small =
        Loader::new(Checkpoint::open(fixture()).unwrap(), Packer::new(rig.engine.parts.compute.clone()), 1 << 20);
    let full = small.load(view(4, 0..8), SLOT, &[], &AtomicBool::new(false)).unwrap_err();
    assert!(full.to_string().contains("--capacity-bytes"), "{full}");
    let ended = rig.loader.load(view(4, 0..1), SLOT, &[], &AtomicBool::new(true)).unwrap_err();
    assert!(matches!(ended, crate::error::LoadError::Abandoned), "{ended}");
}

#[test]
fn nobody_waits_behind_one_node_that_sends_much() {
    let mut rig = Rig::serving();
    let (mut busy, mut quiet) = (rig.attention(0), rig.attention(1));
    let much: Vec<Row<'_>> = (0..40).map(|i| (i, &[0u16][..])).collect();
    for _ in 0..4 {
        busy.dispatch(1, 0, &much);
    }
    quiet.dispatch(1, 0, &[(1, &[0])]);
    rig.engine.turn(rig.now);
    assert_eq!(quiet.events().len(), 1, "the first round takes one frame of each");
    assert_eq!(busy.events().len(), 1);
    rig.turn();
    assert_eq!(busy.events().len(), 3);
}

#[test]
fn too_many_waiting_frames_are_refused_and_all_room_comes_back() {
    let mut rig = Rig::serving();
    let mut attention = rig.attention(0);
    let sent: Vec<FrameHeader> = (0..10).map(|i| attention.dispatch(1, 0, &[(i, &[1])])).collect();
    rig.turn();
    let events = attention.events();
    let aborts = events.iter().filter(|e| matches!(e, Event::Frame { header, .. } if header.kind == Kind::Abort));
    assert_eq!((events.len(), aborts.count()), (sent.len(), 2));
    assert_eq!(rig.refused(Refusal::Overloaded), 2);
    drop(events);
    assert_eq!(rig.engine.parts.transport.stats().bodies_in_use, 0);
    assert_eq!(attention.transport.stats().bodies_in_use, 0);
}

#[test]
fn a_full_window_delays_answers_and_loses_none() {
    let mut rig = Rig::serving();
    let mut attention = rig.attention(0);
    let mut held = Vec::new();
    while let Ok(body) = rig.engine.parts.transport.buffer(1) {
        held.push(body);
    }
    attention.dispatch(1, 0, &[(1, &[0])]);
    rig.turn();
    assert!(attention.events().is_empty());
    held.clear();
    rig.turn();
    assert_eq!(attention.events().len(), 1);
    assert_eq!(rig.engine.parts.transport.stats().bodies_in_use, 0);
}

#[test]
fn a_node_that_leaves_takes_its_waiting_frames_with_it() {
    let mut rig = Rig::serving();
    let mut attention = rig.attention(0);
    attention.dispatch(9, 0, &[(1, &[0])]);
    rig.turn();
    assert_eq!(rig.engine.parts.counters.channels(), 1);
    attention.dispatch(1, 0, &[(1, &[0])]);
    let channel = attention.channel;
    attention.transport.close(channel);
    rig.turn();
    assert_eq!(rig.engine.parts.counters.channels(), 0);
    assert_eq!(rig.engine.parts.transport.stats().bodies_in_use, 0);
    assert!(rig.engine.queues.next_expiry().is_none());
    rig.attention(1).is_served(&mut rig, 1);
}

#[test]
fn frames_are_held_for_others_no_longer_than_allowed() {
    let hold = Duration::from_millis(5);
    let mut rig = Rig::new(EngineLimits { hold_max: hold, ..LIMITS });
    rig.put_in_force(view(1, 0..4));
    let (mut a, mut b) = (rig.attention(0), rig.attention(1));
    a.dispatch(1, 0, &[(1, &[0])]);
    assert_eq!(rig.engine.turn(rig.now), Some(rig.now + hold));
    assert!(a.events().is_empty());
    b.dispatch(1, 0, &[(2, &[0])]);
    rig.turn();
    assert_eq!((a.events().len(), b.events().len()), (1, 1), "everybody is there: no reason to wait");
    assert_eq!(rig.engine.parts.counters.rounds(), 1);
    a.dispatch(1, 0, &[(1, &[0])]);
    rig.turn();
    rig.now += hold;
    rig.turn();
    assert_eq!(a.events().len(), 1);
}

#[test]
fn on_its_own_thread_it_wakes_for_frames_and_stops_when_told() {
    let Rig { hub, addr, engine, views, runtime, .. } = Rig::serving();
    let counters = engine.parts.counters.clone();
    let (ended, told) = std::sync::mpsc::channel();
    let handle = engine.spawn(move || ended.send(()).unwrap()).unwrap();
    let mut transport = LocalTransport::client(hub, window(), credentials(Role::Attention, Slot(0)));
    let deadline = Instant::now() + Duration::from_secs(30);
    let (channel, _) = transport.connect(&addr, deadline).unwrap();
    let mut attention = Attention { transport: Box::new(transport), channel, slot: Slot(0), seq: 0 };
    attention.dispatch(2, 0, &[(1, &[5])]);
    // The frame waits for its view; preparing it must wake the engine.
    runtime.block_on(views.prepare(view(2, 4..8))).unwrap();
    let mut events = Vec::new();
    while events.is_empty() && Instant::now() < deadline {
        attention.transport.wait(deadline);
        attention.transport.poll(&mut events);
    }
    assert!(matches!(&events[..], [Event::Frame { header, .. }] if header.kind == frame::Kind::Combine), "{events:?}");
    handle.stop().unwrap();
    told.recv_timeout(Duration::from_secs(30)).unwrap();
    let load = counters.load(0, 0);
    let parts: u64 = load.parts.iter().map(|p| p.ns).sum();
    assert!(parts > 0 && parts == load.busy_ns && load.busy_ns < load.uptime_ns, "{load:?}");
}
