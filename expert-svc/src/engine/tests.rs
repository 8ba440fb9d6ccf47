//! An engine whose turns the test takes itself, and attention nodes played by the test, in one thread: nothing sleeps.

use std::path::PathBuf;

use mesh_core::placement::Placement;
use mesh_core::view::{Member, View};
use mesh_core::{ExpertId, Lane, LayerId, NodeId, Seq, ViewId};
use mesh_kernels::cpu::{Cpu, CpuOptions};
use mesh_kernels::reference::Reference;
use mesh_kernels::{Dtype, FfnGroup};
use mesh_model::Checkpoint;
use mesh_service::membership::ViewTarget;
use mesh_transport::frame::{self, dispatch_body_bytes, write_dispatch};
use mesh_transport::local::{LocalBound, LocalHub, LocalTransport};
use mesh_transport::{Bound, Credentials, Limits};

use super::*;
use crate::load::Loader;
use crate::views::ExpertViews;

const LIMITS: EngineLimits = EngineLimits {
    round_pairs_max: 64,
    channel_frames_max: 8,
    parked_frames_max: 2,
    parked_max: Duration::from_secs(2),
    hold_max: Duration::ZERO,
};
const SLOT: Slot = Slot(1);
const OTHER: Slot = Slot(4);
const ROW: usize = 192 * 4;

fn fixture() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-moe"))
}

fn credentials(role: Role, slot: Slot) -> Credentials {
    let node = NodeId(u64::from(slot.0) + 10);
    Credentials { secret: [3; 32], identity: Identity { node, role, slot, model: [1; 32] } }
}

fn window() -> Limits {
    Limits { body_bytes_max: 64 * ROW, bodies_max: 16, channels_max: 8, ..Limits::default() }
}

/// A view in which `held` of every layer's eight experts are this node's, the rest another's.
fn view(id: u64, held: std::ops::Range<u16>) -> Arc<View> {
    let member = |slot: Slot| Member { slot, node: NodeId(slot.0.into()), data_addr: String::new() };
    let slots = |e: u16| vec![if held.contains(&e) { SLOT } else { OTHER }];
    let table = (0..4).flat_map(|_| (0..8).map(slots)).collect();
    let placement = Placement::new((0..4).map(LayerId).collect(), 8, table).unwrap();
    Arc::new(View { id: ViewId(id), attention: vec![], experts: vec![member(SLOT), member(OTHER)], placement })
}

struct Rig {
    hub: Arc<LocalHub>,
    addr: String,
    engine: Engine,
    loader: Arc<Loader>,
    views: ExpertViews,
    runtime: tokio::runtime::Runtime,
    now: Instant,
}

impl Rig {
    fn new(limits: EngineLimits) -> Self {
        let hub = LocalHub::new();
        let bound = LocalBound::bind(hub.clone(), "", window()).unwrap();
        let transport = Box::new(bound).start(credentials(Role::Expert, SLOT)).unwrap();
        let compute: Arc<dyn Compute> =
            Arc::new(Cpu::new(CpuOptions { dtype: Dtype::F32, threads: 1, isa: None }).unwrap());
        let loader = Arc::new(Loader::new(Checkpoint::open(fixture()).unwrap(), compute.clone(), 0));
        let (tables, counters) = (Arc::new(Tables::default()), Arc::new(Counters::default()));
        let (addr, waker) = (transport.local_addr().to_owned(), transport.waker());
        let shape = loader.shape().clone();
        assert_eq!(shape.row_bytes, ROW);
        let parts = EngineParts {
            transport,
            compute,
            tables: tables.clone(),
            counters: counters.clone(),
            shape,
            slot: SLOT,
            limits,
        };
        let views = ExpertViews::new(loader.clone(), tables, counters, waker, SLOT, Duration::from_secs(3600));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { hub, addr, engine: Engine::new(parts), loader, views, runtime, now: Instant::now() }
    }

    /// A node that holds experts 0..4 of every layer under view 1.
    fn serving() -> Self {
        let rig = Self::new(LIMITS);
        rig.put_in_force(view(1, 0..4));
        rig
    }

    fn prepare(&self, view: Arc<View>) -> Result<(), String> {
        self.runtime.block_on(self.views.prepare(view))
    }

    fn put_in_force(&self, view: Arc<View>) {
        let id = view.id;
        self.prepare(view).unwrap();
        self.runtime.block_on(self.views.commit(id)).unwrap();
    }

    fn attention(&self, slot: u16) -> Attention {
        let credentials = credentials(Role::Attention, Slot(slot));
        let mut transport = LocalTransport::client(self.hub.clone(), window(), credentials);
        let (channel, peer) = transport.connect(&self.addr, Instant::now() + Duration::from_secs(30)).unwrap();
        assert_eq!(peer.slot, SLOT);
        Attention { transport: Box::new(transport), channel, slot: Slot(slot), seq: 0 }
    }

    /// Takes turns until there is nothing more to do at this moment.
    fn turn(&mut self) {
        for _ in 0..100 {
            if self.engine.turn(self.now).is_some() {
                return;
            }
        }
        panic!("the engine does not come to rest");
    }

    fn refused(&self, why: Refusal) -> u64 {
        self.engine.parts.counters.refused(why)
    }

    fn load(&self) -> mesh_proto::v1::NodeLoad {
        self.views.load()
    }

    /// What the reference says to one row at one expert.
    fn expected(&self, layer: u16, expert: u16, row: &[u8]) -> Vec<f32> {
        let reference = Reference::new(Dtype::F32);
        let tensors = self.loader.checkpoint().expert(LayerId(layer), ExpertId(expert)).unwrap();
        let [gate, up, down] = [tensors.gate, tensors.up, tensors.down].map(|t| crate::load::matrix(&t));
        let ffn = reference.pack_ffn(gate, up, down);
        let mut out = vec![0; ROW];
        reference.ffn(&mut [FfnGroup { weights: &ffn, x: vec![row], out: vec![&mut out] }]);
        floats(&out)
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// A row to send: its seed, and the experts that it wants.
type Row<'a> = (u32, &'a [u16]);

/// A row that no other seed gives.
fn row(seed: u32) -> Vec<u8> {
    let values = (0..192u32).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 48.0 - 1.0);
    values.flat_map(f32::to_le_bytes).collect()
}

struct Attention {
    transport: Box<dyn Transport>,
    channel: ChannelId,
    slot: Slot,
    seq: u64,
}

impl Attention {
    fn header(&mut self, view: u64, layer: u16, rows: &[Row<'_>]) -> FrameHeader {
        self.seq += 1;
        let pairs: usize = rows.iter().map(|(_, experts)| experts.len()).sum();
        FrameHeader {
            kind: Kind::Dispatch,
            view: ViewId(view),
            seq: Seq(self.seq),
            layer: LayerId(layer),
            lane: Lane(3),
            chunk: 1,
            chunks: 2,
            rows: rows.len() as u32,
            pairs: pairs as u32,
            row_bytes: ROW as u32,
            body_bytes: dispatch_body_bytes(rows.len(), pairs, ROW).unwrap() as u32,
            ..FrameHeader::probe(self.slot)
        }
    }

    fn body(&mut self, header: &FrameHeader, rows: &[Row<'_>]) -> FrameBuf {
        let mut body = self.transport.buffer(header.body_bytes as usize).unwrap();
        let counts: Vec<u16> = rows.iter().map(|(_, experts)| experts.len() as u16).collect();
        let experts: Vec<ExpertId> = rows.iter().flat_map(|(_, e)| e.iter().map(|e| ExpertId(*e))).collect();
        let place = write_dispatch(&mut body, &counts, &experts);
        for (place, (seed, _)) in place.chunks_exact_mut(header.row_bytes as usize).zip(rows) {
            place[..ROW.min(header.row_bytes as usize)]
                .copy_from_slice(&row(*seed)[..ROW.min(header.row_bytes as usize)]);
        }
        body
    }

    /// Sends rows (a seed and the experts wanted) and gives the header back.
    fn dispatch(&mut self, view: u64, layer: u16, rows: &[Row<'_>]) -> FrameHeader {
        let header = self.header(view, layer, rows);
        self.send(header, rows)
    }

    fn send(&mut self, header: FrameHeader, rows: &[Row<'_>]) -> FrameHeader {
        let body = self.body(&header, rows);
        self.transport.send(self.channel, &header, body).unwrap();
        header
    }

    fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        self.transport.poll(&mut events);
        events
    }

    /// The only event, which is a frame.
    fn answer(&mut self) -> (FrameHeader, FrameBuf) {
        let mut events = self.events();
        assert_eq!(events.len(), 1, "{events:?}");
        match events.remove(0) {
            Event::Frame { header, body, .. } => (header, body),
            other => panic!("{other:?}"),
        }
    }

    fn is_refused(&mut self, header: &FrameHeader, reason: AbortReason) {
        let (answer, _) = self.answer();
        assert_eq!(answer, header.abort(SLOT, reason));
    }

    fn is_closed(&mut self) {
        let events = self.events();
        assert!(matches!(events[..], [Event::Closed { .. }]), "{events:?}");
    }

    /// That the channel works: one row goes there and back.
    fn is_served(&mut self, rig: &mut Rig, view: u64) {
        let sent = self.dispatch(view, 0, &[(1, &[2])]);
        rig.turn();
        assert_eq!(self.answer().0.seq, sent.seq);
    }
}

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
    assert!(leaving.upgrade().is_some(), "the view before lingers");
    tables.expire(ViewId(1));
    assert!(leaving.upgrade().is_none());
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
    let small = Loader::new(Checkpoint::open(fixture()).unwrap(), rig.engine.parts.compute.clone(), 1 << 20);
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
}
