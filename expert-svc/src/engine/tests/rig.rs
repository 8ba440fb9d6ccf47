//! A node whose turns the test takes itself, and attention nodes played by the test.

use std::path::PathBuf;

use mesh_core::placement::Placement;
use mesh_core::view::{Member, View};
use mesh_core::{ExpertId, Lane, LayerId, NodeId, Seq, ViewId};
use mesh_kernels::cpu::{Cpu, CpuOptions};
use mesh_kernels::packed::Packer;
use mesh_kernels::reference::Reference;
use mesh_kernels::{Dtype, FfnGroup};
use mesh_model::Checkpoint;
use mesh_service::membership::ViewTarget;
use mesh_transport::frame::{dispatch_body_bytes, write_dispatch};
use mesh_transport::local::{LocalBound, LocalHub, LocalTransport};
use mesh_transport::{Bound, Credentials, Limits};

use super::super::*;
use crate::load::Loader;
use crate::views::ExpertViews;

pub(super) const LIMITS: EngineLimits = EngineLimits {
    round_pairs_max: 64,
    channel_frames_max: 8,
    parked_frames_max: 2,
    parked_max: Duration::from_secs(2),
    hold_max: Duration::ZERO,
};
pub(super) const SLOT: Slot = Slot(1);
pub(super) const OTHER: Slot = Slot(4);
pub(super) const ROW: usize = 192 * 4;

pub(super) fn fixture() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-moe"))
}

pub(super) fn credentials(role: Role, slot: Slot) -> Credentials {
    let node = NodeId(u64::from(slot.0) + 10);
    Credentials { secret: [3; 32], identity: Identity { node, role, slot, model: [1; 32] } }
}

pub(super) fn window() -> Limits {
    Limits { body_bytes_max: 64 * ROW, bodies_max: 16, channels_max: 8, ..Limits::default() }
}

/// A view in which `held` of every layer's eight experts are this node's, the rest another's.
pub(super) fn view(id: u64, held: std::ops::Range<u16>) -> Arc<View> {
    let member = |slot: Slot| Member { slot, node: NodeId(slot.0.into()), data_addr: String::new() };
    let slots = |e: u16| vec![if held.contains(&e) { SLOT } else { OTHER }];
    let table = (0..4).flat_map(|_| (0..8).map(slots)).collect();
    let placement = Placement::new((0..4).map(LayerId).collect(), 8, table).unwrap();
    Arc::new(View { id: ViewId(id), attention: vec![], experts: vec![member(SLOT), member(OTHER)], placement })
}

pub(super) struct Rig {
    pub(super) hub: Arc<LocalHub>,
    pub(super) addr: String,
    pub(super) engine: Engine,
    pub(super) loader: Arc<Loader>,
    pub(super) views: ExpertViews,
    pub(super) runtime: tokio::runtime::Runtime,
    pub(super) now: Instant,
}

impl Rig {
    pub(super) fn new(limits: EngineLimits) -> Self {
        let hub = LocalHub::new();
        let bound = LocalBound::bind(hub.clone(), "", window()).unwrap();
        let transport = Box::new(bound).start(credentials(Role::Expert, SLOT)).unwrap();
        let compute: Arc<dyn Compute> =
            Arc::new(Cpu::new(CpuOptions { dtype: Dtype::F32, threads: 1, isa: None, bind_from: None }).unwrap());
        let loader = Arc::new(Loader::new(Checkpoint::open(fixture()).unwrap(), Packer::new(compute.clone()), 0));
        let counters = Arc::new(Counters::new(loader.shape().len(), loader.expert_bytes()));
        let tables = Arc::new(Tables::default());
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
        let views =
            ExpertViews::new(loader.clone(), tables, counters, waker, SLOT, Duration::from_secs(3600), Vec::new());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { hub, addr, engine: Engine::new(parts), loader, views, runtime, now: Instant::now() }
    }

    /// A node that holds experts 0..4 of every layer under view 1.
    pub(super) fn serving() -> Self {
        let rig = Self::new(LIMITS);
        rig.put_in_force(view(1, 0..4));
        rig
    }

    pub(super) fn prepare(&self, view: Arc<View>) -> Result<(), String> {
        self.runtime.block_on(self.views.prepare(view))
    }

    pub(super) fn put_in_force(&self, view: Arc<View>) {
        let id = view.id;
        self.prepare(view).unwrap();
        self.runtime.block_on(self.views.commit(id)).unwrap();
    }

    pub(super) fn attention(&self, slot: u16) -> Attention {
        let credentials = credentials(Role::Attention, Slot(slot));
        let mut transport = LocalTransport::client(self.hub.clone(), window(), credentials);
        let (channel, peer) = transport.connect(&self.addr, Instant::now() + Duration::from_secs(30)).unwrap();
        assert_eq!(peer.slot, SLOT);
        Attention { transport: Box::new(transport), channel, slot: Slot(slot), seq: 0 }
    }

    /// Takes turns until there is nothing more to do at this moment.
    pub(super) fn turn(&mut self) {
        for _ in 0..100 {
            if self.engine.turn(self.now).is_some() {
                return;
            }
        }
        panic!("the engine does not come to rest");
    }

    pub(super) fn refused(&self, why: Refusal) -> u64 {
        self.engine.parts.counters.refused(why)
    }

    pub(super) fn load(&self) -> mesh_proto::v1::NodeLoad {
        self.views.load()
    }

    /// What the reference says to one row at one expert.
    pub(super) fn expected(&self, layer: u16, expert: u16, row: &[u8]) -> Vec<f32> {
        let reference = Reference::new(Dtype::F32);
        let tensors = self.loader.checkpoint().expert(LayerId(layer), ExpertId(expert)).unwrap();
        let [gate, up, down] = [tensors.gate, tensors.up, tensors.down].map(|t| crate::load::matrix(&t));
        let ffn = reference.pack_ffn(gate, up, down);
        let mut out = vec![0; ROW];
        reference.ffn(&mut [FfnGroup { weights: &ffn, x: vec![row], out: vec![&mut out] }]);
        floats(&out)
    }
}

pub(super) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// A row to send: its seed, and the experts that it wants.
pub(super) type Row<'a> = (u32, &'a [u16]);

/// A row that no other seed gives.
pub(super) fn row(seed: u32) -> Vec<u8> {
    let values = (0..192u32).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 48.0 - 1.0);
    values.flat_map(f32::to_le_bytes).collect()
}

pub(super) struct Attention {
    pub(super) transport: Box<dyn Transport>,
    pub(super) channel: ChannelId,
    pub(super) slot: Slot,
    pub(super) seq: u64,
}

impl Attention {
    pub(super) fn header(&mut self, view: u64, layer: u16, rows: &[Row<'_>]) -> FrameHeader {
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

    pub(super) fn body(&mut self, header: &FrameHeader, rows: &[Row<'_>]) -> FrameBuf {
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
    pub(super) fn dispatch(&mut self, view: u64, layer: u16, rows: &[Row<'_>]) -> FrameHeader {
        let header = self.header(view, layer, rows);
        self.send(header, rows)
    }

    pub(super) fn send(&mut self, header: FrameHeader, rows: &[Row<'_>]) -> FrameHeader {
        let body = self.body(&header, rows);
        self.transport.send(self.channel, &header, body).unwrap();
        header
    }

    pub(super) fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        self.transport.poll(&mut events);
        events
    }

    /// The only event, which is a frame.
    pub(super) fn answer(&mut self) -> (FrameHeader, FrameBuf) {
        let mut events = self.events();
        assert_eq!(events.len(), 1, "{events:?}");
        match events.remove(0) {
            Event::Frame { header, body, .. } => (header, body),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn is_refused(&mut self, header: &FrameHeader, reason: AbortReason) {
        let (answer, _) = self.answer();
        assert_eq!(answer, header.abort(SLOT, reason));
    }

    pub(super) fn is_closed(&mut self) {
        let events = self.events();
        assert!(matches!(events[..], [Event::Closed { .. }]), "{events:?}");
    }

    /// That the channel works: one row goes there and back.
    pub(super) fn is_served(&mut self, rig: &mut Rig, view: u64) {
        let sent = self.dispatch(view, 0, &[(1, &[2])]);
        rig.turn();
        assert_eq!(self.answer().0.seq, sent.seq);
    }
}
