//! A node of the mesh that sends wrong frames: each is refused with its reason or costs that node its channel, and the
//! streams of others go on untouched.

use std::time::Instant;

use integration_tests::patience::{patience, soon};
use integration_tests::{Mesh, Transport};
use mesh_core::{ExpertId, Lane, LayerId, NodeId, Role, Seq, Slot, ViewId};
use mesh_proto::v1::control_client::ControlClient;
use mesh_proto::v1::{NodeRole, RegisterRequest};
use mesh_transport::frame::{AbortReason, FrameHeader, Kind, PROTOCOL_VERSION, dispatch_body_bytes, write_dispatch};
use mesh_transport::{Credentials, Event, Identity, Limits, Transport as Channels, TransportKind};

use super::bad_input::Bystander;

/// Bytes of a row of the shipped model: hidden 192 in f32, which the harness starts meshes in.
const ROW_BYTES: usize = 192 * 4;

/// An attention node that is registered, so that it knows the secret, and that never joins a view.
struct Rogue {
    transport: Box<dyn Channels>,
    slot: Slot,
    addr: String,
}

impl Rogue {
    async fn register(mesh: &Mesh) -> Self {
        let status = mesh.status().await;
        let model = status.model.expect("the model is known");
        let digest = (0..32).map(|i| u8::from_str_radix(&model.digest[2 * i..2 * i + 2], 16).expect("hex"));
        let digest: Vec<u8> = digest.collect();
        let mut control = ControlClient::connect(format!("http://{}", mesh.grpc())).await.expect("the router answers");
        let request = RegisterRequest {
            role: NodeRole::Attention as i32,
            name: "rogue".to_owned(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL_VERSION.into(),
            model_digest: digest.clone(),
            model: Some(model),
            addr: "http://127.0.0.1:1".to_owned(),
            transport: "tcp".to_owned(),
            compute: status.nodes[0].compute.clone(),
            slot: None,
            slot_optional: false,
            capacity_bytes: 0,
        };
        let answer = soon("a registration", control.register(request)).await.expect("it is taken").into_inner();
        let slot = Slot(u16::try_from(answer.slot).expect("a slot"));
        let model = digest.try_into().expect("32 bytes");
        let identity = Identity { node: NodeId(answer.node), role: Role::Attention, slot, model };
        let credentials = Credentials { secret: answer.secret.try_into().expect("32 bytes"), identity };
        let transport = mesh_transport::client(TransportKind::Tcp, Limits::default(), None, credentials);
        Self { transport: transport.expect("a client"), slot, addr: mesh.expert_addr(0) }
    }

    /// Sends one row for one expert on a channel of its own, changed as the case wants, and returns what came of it.
    fn send(&mut self, view: u64, layer: u16, expert: u16, change: impl FnOnce(&mut FrameHeader, &mut [u8])) -> Event {
        let deadline = Instant::now() + patience();
        let (channel, _) = self.transport.connect(&self.addr, deadline).expect("a registered node is let in");
        let bytes = dispatch_body_bytes(1, 1, ROW_BYTES).expect("a small frame");
        let mut body = self.transport.buffer(bytes).expect("room for one row");
        write_dispatch(&mut body, &[1], &[ExpertId(expert)]).fill(0);
        let mut header = FrameHeader {
            kind: Kind::Dispatch,
            flags: 0,
            view: ViewId(view),
            seq: Seq(1),
            layer: LayerId(layer),
            lane: Lane(0),
            chunk: 0,
            chunks: 1,
            rows: 1,
            pairs: 1,
            row_bytes: ROW_BYTES as u32,
            body_bytes: bytes as u32,
            server_ns: 0,
            origin: self.slot,
        };
        change(&mut header, &mut body);
        self.transport.send(channel, &header, body).expect("the channel is open");
        let mut events = Vec::new();
        while events.is_empty() {
            assert!(Instant::now() < deadline, "the expert node says nothing");
            self.transport.wait(deadline);
            self.transport.poll(&mut events);
        }
        self.transport.close(channel);
        events.remove(0)
    }
}

fn assert_refused(event: &Event, wanted: AbortReason) {
    match event {
        Event::Frame { header, .. } if header.kind == Kind::Abort => {
            assert_eq!(AbortReason::from_flags(header.flags), wanted);
        }
        other => panic!("{wanted} is due, and came {other:?}"),
    }
}

/// Sends every wrong frame between two right ones. Blocks.
fn misbehave(mut rogue: Rogue, view: u64, held: u16) {
    let assert_served = |event: Event| {
        assert!(matches!(&event, Event::Frame { header, .. } if header.kind == Kind::Combine), "{event:?}");
    };
    assert_served(rogue.send(view, 0, held, |_, _| ()));
    assert_refused(&rogue.send(view - 1, 0, held, |_, _| ()), AbortReason::StaleView);
    assert_refused(&rogue.send(view + 9, 0, held, |_, _| ()), AbortReason::FutureView);
    assert_refused(&rogue.send(view, 99, held, |_, _| ()), AbortReason::UnknownLayer);
    assert_refused(&rogue.send(view, 0, 999, |_, _| ()), AbortReason::ExpertNotHeld);
    let as_combine = |header: &mut FrameHeader, _: &mut [u8]| {
        header.kind = Kind::Combine;
        header.pairs = header.body_bytes / 64;
        header.row_bytes = 64;
    };
    for (what, event) in [
        ("counts that do not add up", rogue.send(view, 0, held, |_, body| body[0] = 7)),
        ("another's name", rogue.send(view, 0, held, |header, _| header.origin = Slot(77))),
        ("a wrong kind", rogue.send(view, 0, held, as_combine)),
    ] {
        assert!(matches!(event, Event::Closed { .. }), "{what}: {event:?}");
    }
    assert_served(rogue.send(view, 0, held, |_, _| ()));
}

#[tokio::test]
async fn wrong_frames_are_refused_by_name_and_nobody_else_notices() {
    let mesh = Mesh::builder().experts(2).transport(Transport::Tcp).start().await;
    let status = mesh.status().await;
    let held = status.placement[0].experts.iter().position(|s| s.slots == [0]).expect("slot 0 holds an expert");
    let held = u16::try_from(held).expect("an expert");
    let bystander = Bystander::start(&mesh).await;
    let rogue = Rogue::register(&mesh).await;
    let done = tokio::task::spawn_blocking(move || misbehave(rogue, status.view, held));
    soon("every wrong frame's answer", done).await.expect("all as they should be");
    bystander.assert_untouched().await;
    mesh.assert_idle().await;
}
