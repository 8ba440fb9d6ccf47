//! The runner against a stand-in for expert nodes: a transport that computes each dispatched row itself, or misbehaves.

use std::collections::VecDeque;
use std::path::PathBuf;

use super::counters::linear_work;
use super::*;
use mesh_core::placement::Placement;
use mesh_core::view::Member;
use mesh_core::{ExpertId, NodeId, Role};
use mesh_kernels::cpu::{Cpu, CpuOptions};
use mesh_kernels::packed::Packer;
use mesh_kernels::{Dtype, Ffn, FfnGroup, KV_PAGE_TOKENS};
use mesh_model::Checkpoint;
use mesh_service::membership::Evidence;
use mesh_transport::buffer::{FrameBuf, Window};
use mesh_transport::frame::{AbortReason, DispatchBody, FrameHeader};
use mesh_transport::{ChannelId, Event, Identity, TransportError, TransportKind, TransportStats};
use tokio::sync::mpsc;

/// How long a slow stand-in takes.
const SLOW: Duration = Duration::from_millis(300);

/// What the stand-in does to the next answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Silent,
    Slow,
    Abort,
    Close,
    Twice,
    OtherView,
    ShortRows,
}

struct Experts {
    compute: Arc<dyn Compute>,
    ffns: Vec<Vec<Ffn>>,
    moe_layers: Vec<LayerId>,
    window: Arc<Window>,
    events: VecDeque<Event>,
    fault: Arc<std::sync::Mutex<Fault>>,
    /// Whether only the node at slot 0 has it.
    one_faulty: bool,
    channels: u64,
}

struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

impl Transport for Experts {
    fn kind(&self) -> TransportKind {
        TransportKind::Local
    }

    fn local_addr(&self) -> &str {
        "stand-in"
    }

    fn connect(&mut self, addr: &str, _: Instant) -> Result<(ChannelId, Identity), TransportError> {
        self.channels += 1;
        let slot: u16 = addr.parse().unwrap();
        let node = NodeId(100 + u64::from(slot));
        Ok((ChannelId(self.channels), Identity { node, role: Role::Expert, slot: Slot(slot), model: [0; 32] }))
    }

    fn close(&mut self, _: ChannelId) {}

    fn buffer(&mut self, bytes: usize) -> Result<FrameBuf, TransportError> {
        self.window.take(bytes)
    }

    fn send(&mut self, channel: ChannelId, header: &FrameHeader, body: FrameBuf) -> Result<(), TransportError> {
        let dispatch = DispatchBody::parse(header, &body).unwrap();
        let layer = self.moe_layers.iter().position(|l| *l == header.layer).unwrap();
        let row_bytes = header.row_bytes as usize;
        let mut answer = self.window.take(header.pairs as usize * row_bytes)?;
        for ((row, expert), out) in dispatch.pairs().zip(answer.chunks_exact_mut(row_bytes)) {
            let weights = &self.ffns[layer][expert.index()];
            self.compute.ffn(&mut [FfnGroup { weights, x: vec![dispatch.row(row)], out: vec![out] }]);
        }
        let mut header = header.combine(Slot(0), 1);
        let fault = *self.fault.lock().unwrap();
        match if self.one_faulty && channel != ChannelId(1) { Fault::None } else { fault } {
            Fault::Silent => return Ok(()),
            Fault::Slow => std::thread::sleep(SLOW),
            Fault::Abort => header = header.abort(Slot(0), AbortReason::ExpertNotHeld),
            Fault::Close => {
                let error = TransportError::NoChannel { channel };
                self.events.push_back(Event::Closed { channel, error });
                return Ok(());
            }
            Fault::Twice => {
                let mut copy = self.window.take(answer.len())?;
                copy.copy_from_slice(&answer);
                self.events.push_back(Event::Frame { channel, header, body: copy });
            }
            Fault::OtherView => {
                let stale = FrameHeader { view: ViewId(header.view.0 + 1), ..header };
                let body = self.window.take(answer.len())?;
                self.events.push_back(Event::Frame { channel, header: stale, body });
            }
            Fault::ShortRows => {
                let row_bytes = header.row_bytes / 2;
                let body = self.window.take(answer.len() / 2)?;
                let short = FrameHeader { row_bytes, body_bytes: body.len() as u32, ..header };
                self.events.push_back(Event::Frame { channel, header: short, body });
            }
            Fault::None => {}
        }
        self.events.push_back(Event::Frame { channel, header, body: answer });
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<Event>) -> usize {
        let count = self.events.len();
        events.extend(self.events.drain(..));
        count
    }

    fn wait(&mut self, deadline: Instant) {
        // Nobody else acts: unless something is there, the deadline is all that will come.
        while self.events.is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(NoWake)
    }

    fn stats(&self) -> TransportStats {
        TransportStats::default()
    }
}

struct Rig {
    runner: Runner,
    told: mpsc::Receiver<Evidence>,
    fault: Arc<std::sync::Mutex<Fault>>,
    window: Arc<Window>,
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures")).join(name)
}

fn rig(dir: PathBuf, dtype: Dtype, experts: u16, body_bytes_max: usize) -> Rig {
    rig_with(dir, dtype, experts, 1, body_bytes_max)
}

fn rig_with(dir: PathBuf, dtype: Dtype, experts: u16, replicas: usize, body_bytes_max: usize) -> Rig {
    let checkpoint = Arc::new(Checkpoint::open(&dir).unwrap());
    let compute: Arc<dyn Compute> =
        Arc::new(Cpu::new(CpuOptions { dtype, threads: 1, isa: None, bind_from: None }).unwrap());
    let config = checkpoint.config();
    let moe_layers = config.moe_layers();
    let pack = |layer: &LayerId| -> Vec<Ffn> {
        let expert = |e| checkpoint.expert(*layer, ExpertId(e)).unwrap();
        let packed = (0..config.moe.experts as u16).map(expert);
        packed
            .map(|t| compute.pack_ffn(weights::matrix(t.gate), weights::matrix(t.up), weights::matrix(t.down)))
            .collect()
    };
    let ffns = moe_layers.iter().map(pack).collect();
    let slots: Vec<Slot> = (0..experts).map(Slot).collect();
    let placement = Placement::balanced(moe_layers.clone(), config.moe.experts, &slots, replicas).unwrap();
    let member = |s: &Slot| Member { slot: *s, node: NodeId(100 + u64::from(s.0)), data_addr: s.0.to_string() };
    let view = View { id: ViewId(3), attention: vec![], experts: slots.iter().map(member).collect(), placement };
    let (fault, window) = (Arc::new(std::sync::Mutex::new(Fault::None)), Window::new(512, 8 << 20));
    let transport = Experts {
        compute: compute.clone(),
        ffns,
        moe_layers,
        window: window.clone(),
        events: VecDeque::new(),
        fault: fault.clone(),
        one_faulty: replicas > 1,
        channels: 0,
    };
    let trunk = Trunk::load(checkpoint, &Packer::new(compute.clone()), |_| ()).unwrap();
    let options = RunnerOptions {
        slot: Slot(0),
        kv_pages: 64,
        micro_batches: 3,
        micro_batch_rows_min: 4,
        silence_min: Duration::from_millis(100),
        answer_max: Duration::from_secs(20),
        connect_max: Duration::from_secs(1),
        body_bytes_max,
    };
    let (outside, told) = Outside::new();
    let mut runner = Runner::new(trunk, compute, Box::new(transport), options, outside).unwrap();
    runner.prepare_view(Arc::new(view)).unwrap();
    runner.commit_view(ViewId(3)).unwrap();
    Rig { runner, told, fault, window }
}

/// What the router was told since the last time.
fn told(rig: &mut Rig) -> Vec<Evidence> {
    std::iter::from_fn(|| rig.told.try_recv().ok()).collect()
}

/// Logits of the last of `ids`, computed `chunk` tokens at a time from an empty cache.
fn last_logits(runner: &mut Runner, ids: &[u32], chunk: usize) -> Vec<f32> {
    let pages: Vec<u32> = (0..ids.len().div_ceil(KV_PAGE_TOKENS) as u32).rev().collect();
    let mut logits = Vec::new();
    for (i, part) in ids.chunks(chunk).enumerate() {
        let row = |(j, token): (usize, &u32)| {
            let position = i * chunk + j;
            StepRow { sequence: 0, token: *token, position: position as u32, logits: position + 1 == ids.len() }
        };
        let rows = part.iter().enumerate().map(row).collect();
        logits = runner.step(&Step { sequences: vec![&pages], rows, routing: false }).unwrap().logits;
    }
    logits
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().fold(0, |best, (i, l)| if *l > logits[best] { i } else { best });
    best as u32
}

#[test]
fn greedy_tokens_are_the_references() {
    for name in
        ["tiny-moe", "checkpoints/mixtral-swa-f32", "checkpoints/olmoe-clip-gqa-f32", "checkpoints/qwen3moe-v5config"]
    {
        let golden: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(fixture(name).join("golden.json")).unwrap()).unwrap();
        let mut rig = rig(fixture(name), Dtype::F32, 3, 1 << 20);
        for prompt in golden["prompts"].as_array().unwrap() {
            let mut ids: Vec<u32> = serde_json::from_value(prompt["ids"].clone()).unwrap();
            let wanted: Vec<u32> = serde_json::from_value(prompt["f32"]["tokens"].clone()).unwrap();
            let length = ids.len();
            for _ in 0..8 {
                let logits = last_logits(&mut rig.runner, &ids, usize::MAX);
                ids.push(argmax(&logits));
            }
            assert_eq!(ids[length..], wanted[..8], "{name}, prompt of {length}");
        }
        assert_eq!(rig.window.in_use(), 0);
    }
}

#[test]
fn logits_are_the_same_bits_for_any_chunking_placement_and_frame_size() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let ids: Vec<u32> = (0..70).map(|i| (i * 37 + 11) % 2000).collect();
        let dir = || fixture("tiny-moe");
        let whole = last_logits(&mut rig(dir(), dtype, 1, 1 << 20).runner, &ids, usize::MAX);
        for (experts, chunk, body) in [(1, 1, 1 << 20), (3, 7, 1 << 20), (8, 70, 6000), (11, 33, 8000)] {
            let logits = last_logits(&mut rig(dir(), dtype, experts, body).runner, &ids, chunk);
            let same = whole.iter().zip(&logits).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{dtype:?} {experts} nodes, chunks of {chunk}, frames of {body}");
        }
    }
}

#[test]
fn rows_of_other_sequences_change_nothing() {
    let mut rig = rig(fixture("tiny-moe"), Dtype::Bf16, 2, 1 << 20);
    let alone = rig.runner.step(&Step {
        sequences: vec![&[5]],
        rows: vec![StepRow { sequence: 0, token: 9, position: 0, logits: true }],
        routing: true,
    });
    let alone = alone.unwrap();
    let pages: Vec<[u32; 1]> = (0..40).map(|p| [p]).collect();
    let rows = (0..40).map(|i| StepRow { sequence: i, token: 9 + (i + 7) % 40, position: 0, logits: true }).collect();
    let step = Step { sequences: pages.iter().map(|p| &p[..]).collect(), rows, routing: true };
    let among = rig.runner.step(&step).unwrap();
    let vocab = rig.runner.config().vocab;
    assert_eq!(alone.logits, among.logits[33 * vocab..34 * vocab]);
    assert_eq!(alone.routing[0].1.experts(0), among.routing[0].1.experts(33));
}

#[test]
fn a_node_that_is_silent_gone_or_refuses_is_named_and_the_runner_goes_on() {
    let mut rig = rig(fixture("tiny-moe"), Dtype::F32, 1, 1 << 20);
    let ids = [4, 5, 6];
    let good = last_logits(&mut rig.runner, &ids, 3);
    let rows = vec![StepRow { sequence: 0, token: 4, position: 0, logits: true }];
    let step = Step { sequences: vec![&[0]], rows, routing: false };

    *rig.fault.lock().unwrap() = Fault::Silent;
    let asked = Instant::now();
    assert!(matches!(rig.runner.step(&step), Err(RunError::Silent { slots, .. }) if slots == [Slot(0)]));
    // Told of when it is late, and again each time that it is late by as much more.
    let (late, told) = (asked.elapsed().as_millis() / 50, told(&mut rig));
    assert!((1..=late).contains(&(told.len() as u128)), "{told:?} in {late} times 50 ms");
    assert!(told.iter().all(|seen| seen.expert_slot == Slot(0)), "{told:?}");
    assert!(!rig.runner.serving(), "who was silent is not asked again at once");
    *rig.fault.lock().unwrap() = Fault::Abort;
    let patience = Instant::now() + Duration::from_secs(5);
    while !rig.runner.serving() && Instant::now() < patience {
        rig.runner.idle(patience);
    }
    let refused = rig.runner.step(&step);
    assert!(matches!(refused, Err(RunError::Aborted { reason: AbortReason::ExpertNotHeld, .. })), "{refused:?}");
    for harmless in [Fault::Twice, Fault::OtherView, Fault::ShortRows] {
        *rig.fault.lock().unwrap() = harmless;
        assert_eq!(last_logits(&mut rig.runner, &ids, 3), good, "{harmless:?}");
    }
    let read = rig.runner.counters().read();
    for name in ["wrong view", "duplicate answer", "wrong length"] {
        assert!(read.refused.get(name).is_some_and(|count| *count > 0), "{name}: {read:?}");
    }

    *rig.fault.lock().unwrap() = Fault::Close;
    assert!(matches!(rig.runner.step(&step), Err(RunError::NodeLost { slot: Slot(0), .. })));
    assert!(!rig.runner.serving());
    // It is connected again at once, and closes again.
    let again = rig.runner.step(&step);
    assert!(matches!(again, Err(RunError::NotServing | RunError::NodeLost { .. })), "{again:?}");
    *rig.fault.lock().unwrap() = Fault::None;
    rig.runner.idle(Instant::now() + Duration::from_secs(5));
    assert_eq!(last_logits(&mut rig.runner, &ids, 3), good);
    let read = rig.runner.counters().read();
    assert_eq!((read.lanes_total, read.lanes_free), (3, 3));
    assert_eq!(rig.window.in_use(), 0);
}

#[test]
fn what_a_node_owes_when_it_fails_another_holder_computes_with_the_same_bits() {
    let ids: Vec<u32> = (0..60).map(|i| (i * 37 + 11) % 2000).collect();
    let whole = last_logits(&mut rig(fixture("tiny-moe"), Dtype::Bf16, 1, 1 << 20).runner, &ids, 60);
    for fault in [Fault::Silent, Fault::Abort, Fault::Close] {
        // Frames of a few rows: a destination is more than one of them.
        for body in [1 << 20, 6000] {
            let mut rig = rig_with(fixture("tiny-moe"), Dtype::Bf16, 3, 2, body);
            *rig.fault.lock().unwrap() = fault;
            assert_eq!(last_logits(&mut rig.runner, &ids, 20), whole, "{fault:?} in frames of {body}");
            let read = rig.runner.counters().read();
            assert!(read.replayed > 0 && read.lanes_free == read.lanes_total, "{fault:?}: {read:?}");
            assert_eq!(rig.window.in_use(), 0, "{fault:?}");
            let lost = told(&mut rig);
            assert_eq!(lost.is_empty(), matches!(fault, Fault::Abort), "{fault:?}: {lost:?}");
            assert!(lost.iter().all(|seen| seen.expert_slot == Slot(0)), "{lost:?}");
        }
    }
}

#[test]
fn a_slow_node_is_waited_for_until_a_view_comes_without_it() {
    let mut rig = rig(fixture("tiny-moe"), Dtype::F32, 1, 1 << 20);
    let rows = vec![StepRow { sequence: 0, token: 4, position: 0, logits: true }];
    let step = Step { sequences: vec![&[0]], rows, routing: false };
    *rig.fault.lock().unwrap() = Fault::Slow;
    rig.runner.step(&step).unwrap();
    *rig.fault.lock().unwrap() = Fault::Silent;
    let waited = |rig: &mut Rig| match rig.runner.step(&step) {
        Err(RunError::Silent { waited, .. }) => waited,
        other => panic!("{other:?}"),
    };
    // As slow answers have been, four times as long is silence; the router hears of it long before.
    let coming = rig.runner.coming();
    let others = View { id: ViewId(4), ..View::default() };
    coming.set(Arc::new(View { id: ViewId(2), ..others.clone() }));
    let whole = waited(&mut rig);
    assert!(whole > 3 * SLOW, "{whole:?}: an older view is no reason");
    let seen = told(&mut rig);
    assert!(seen.len() > 1 && seen[0].view == ViewId(3) && seen[0].what.starts_with("no answer for"), "{seen:?}");
    coming.set(Arc::new(others));
    let patience = Instant::now() + Duration::from_secs(5);
    while !rig.runner.serving() && Instant::now() < patience {
        rig.runner.idle(patience);
    }
    let cut = waited(&mut rig);
    assert!(cut < 2 * SLOW, "{cut:?} of {whole:?}");
}

#[test]
fn only_the_prepared_view_can_be_committed() {
    let mut rig = rig(fixture("tiny-moe"), Dtype::F32, 1, 1 << 20);
    assert!(matches!(rig.runner.commit_view(ViewId(4)), Err(RunError::NotPrepared { prepared: None, .. })));
    assert!(rig.runner.serving());
}

#[test]
fn the_parts_of_steps_are_nearly_all_of_their_time_and_their_work_is_what_was_computed() {
    let mut rig = rig(fixture("tiny-moe"), Dtype::Bf16, 3, 1 << 20);
    let counters = rig.runner.counters();
    let ids: Vec<u32> = (0..200).map(|i| (i * 37 + 11) % 2000).collect();
    let began = Instant::now();
    counters.profile.start();
    last_logits(&mut rig.runner, &ids, 40);
    counters.profile.stop(StepPart::Sample);
    let whole = began.elapsed().as_nanos() as f64;

    let mut load = mesh_proto::v1::NodeLoad::default();
    counters.profile.report(&mut load);
    let part = |part: StepPart| &load.parts[part as usize];
    assert_eq!(
        (part(StepPart::Attention).part.as_str(), part(StepPart::Sample).part.as_str()),
        ("attention", "sample")
    );
    // The engine's own parts are none of the runner's.
    let runner: u64 = load.parts.iter().map(|p| p.ns).sum::<u64>() - part(StepPart::Sample).ns;
    let share = runner as f64 / whole;
    assert!((0.8..=1.01).contains(&share), "{share} of {whole} ns: {load:?}");
    for busy in [StepPart::Norm, StepPart::Qkv, StepPart::Attention, StepPart::Dispatch, StepPart::Combine] {
        assert!(part(busy).ns > 0, "{busy:?}: {load:?}");
    }
    let (trunk, layers) = (&rig.runner.trunk, rig.runner.config().layers.len() as u64);
    let qkv = linear_work(&trunk.layers[0].qkv, 200);
    assert_eq!(part(StepPart::Qkv).flops, layers * qkv.flops);
    // Five steps of 40 rows in three micro-batches, each of which reads the weights again.
    assert_eq!(part(StepPart::Qkv).weight_bytes, layers * 15 * qkv.weight_bytes);
    let head = linear_work(&trunk.head, 1);
    assert_eq!((part(StepPart::Head).flops, part(StepPart::Head).weight_bytes), (head.flops, head.weight_bytes));
}
