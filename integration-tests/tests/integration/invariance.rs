//! Invariant 1: logits are the same bits whatever the mesh's shape, transport, company and chunks of prefill.

use std::collections::BTreeSet;
use std::time::Instant;

use integration_tests::fixture::{self, Fixture};
use integration_tests::generation::generate;
use integration_tests::mesh::ucx_missing;
use integration_tests::patience::{patience, soon};
use integration_tests::{Dtype, Mesh, Transport, ids_request};
use mesh_proto::v1::GenerateRequest;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

/// Attention and expert nodes, and the prefill chunk of that mesh (`None`: a whole prompt at once).
const SHAPES: [(u16, u16, Option<u32>); 4] = [(1, 1, Some(1)), (1, 4, Some(7)), (2, 3, None), (3, 2, Some(7))];
const TOKENS: u32 = 12;
const COMPANY: usize = 64;

/// Every token's id and its logits' bytes.
type Bits = Vec<(u32, Vec<u8>)>;

/// The watched prompts: the fixture's, and one of several KV pages.
fn prompts() -> Vec<Vec<u32>> {
    let fixture = Fixture::read(&fixture::tiny_moe());
    let mut prompts: Vec<Vec<u32>> = fixture.prompts.into_iter().take(3).map(|p| p.ids).collect();
    prompts.push((0..83).map(|i| 200 + i * 7 % 1500).collect());
    prompts
}

fn watched(prompt: &[u32]) -> GenerateRequest {
    GenerateRequest { return_logits: true, ..ids_request(prompt, TOKENS) }
}

async fn bits(mesh: &Mesh, prompt: &[u32]) -> Bits {
    let answer = mesh.generate(watched(prompt)).await.unwrap_or_else(|e| panic!("{e}\n{}", mesh.log()));
    answer.tokens.into_iter().map(|t| (t.id, t.logits)).collect()
}

/// What a mesh of one node each computes for each prompt alone, the prompt in one piece.
async fn reference(dtype: Dtype) -> &'static [Bits] {
    static F32: OnceCell<Vec<Bits>> = OnceCell::const_new();
    static BF16: OnceCell<Vec<Bits>> = OnceCell::const_new();
    let cell = match dtype {
        Dtype::F32 => &F32,
        Dtype::Bf16 => &BF16,
    };
    let compute = || async {
        let mesh = Mesh::builder().dtype(dtype).start().await;
        let mut all = Vec::new();
        for prompt in prompts() {
            all.push(bits(&mesh, &prompt).await);
        }
        assert!(all.iter().flatten().all(|(_, logits)| !logits.is_empty()), "logits were asked for");
        all
    };
    cell.get_or_init(compute).await
}

fn assert_same(at: &str, found: &Bits, wanted: &Bits) {
    assert_eq!(found.len(), wanted.len(), "{at}: tokens");
    for (step, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let differing = found.1.chunks(4).zip(wanted.1.chunks(4)).filter(|(a, b)| a != b).count();
        assert_eq!(differing, 0, "{at}: step {step}: logits that differ in their bits");
        assert_eq!(found.0, wanted.0, "{at}: step {step}: id");
    }
}

async fn every_shape(transport: Transport, dtype: Dtype) {
    let wanted = reference(dtype).await;
    for (attention, experts, chunk) in SHAPES {
        let at = format!("{attention}A{experts}E over {} in {}, chunk {chunk:?}", transport.flag(), dtype.flag());
        let builder = Mesh::builder().attention(attention).experts(experts).transport(transport).dtype(dtype);
        let builder = if let Some(tokens) = chunk { builder.prefill_chunk(tokens) } else { builder };
        let mesh = builder.micro_batch_rows(8).start().await;
        for (prompt, wanted) in prompts().iter().zip(wanted) {
            assert_same(&at, &bits(&mesh, prompt).await, wanted);
        }
        in_company(&at, &mesh, attention, wanted).await;
    }
}

/// The watched prompts among requests that join and leave at other steps, until every attention node had its share.
async fn in_company(at: &str, mesh: &Mesh, attention: u16, wanted: &[Bits]) {
    let mut company = JoinSet::new();
    for i in 0..COMPANY {
        let length = 1 + i * 5 % 40;
        let prompt: Vec<u32> = (0..length).map(|j| 100 + (i as u32 * 31 + j as u32 * 17) % 1900).collect();
        company.spawn(generate(mesh.client(), ids_request(&prompt, 1 + (i as u32 * 11) % 30)));
        // Half of them are under way before the watched ones join.
        if i == COMPANY / 2 {
            tokio::task::yield_now().await;
        }
    }
    let mut slots = BTreeSet::new();
    // At least twice; and the router's choice rests on heartbeats, so that an even share may take some of them.
    let start = Instant::now();
    for wave in 0.. {
        slots.extend(watch(&format!("{at}, among {COMPANY} others, wave {wave}"), mesh, wanted).await);
        if wave > 0 && (slots.len() == usize::from(attention) || start.elapsed() > patience()) {
            break;
        }
    }
    while let Some(done) = soon("the company", company.join_next()).await {
        done.expect("no panic").unwrap_or_else(|e| panic!("{at}: {e}\n{}", mesh.log()));
    }
    assert_eq!(slots.len(), usize::from(attention), "{at}: attention nodes that served a watched request: {slots:?}");
}

/// All watched prompts twice, at once; returns the slots that served them.
async fn watch(at: &str, mesh: &Mesh, wanted: &[Bits]) -> BTreeSet<u32> {
    let mut watching = JoinSet::new();
    for (i, prompt) in prompts().iter().enumerate().chain(prompts().iter().enumerate()) {
        let (client, request) = (mesh.client(), watched(prompt));
        watching.spawn(async move { (i, generate(client, request).await) });
    }
    let mut slots = BTreeSet::new();
    while let Some(done) = soon("a watched request", watching.join_next()).await {
        let (i, answer) = done.expect("no panic");
        let answer = answer.unwrap_or_else(|e| panic!("{at}: {e}\n{}", mesh.log()));
        slots.insert(answer.started.attention_slot);
        let found = answer.tokens.into_iter().map(|t| (t.id, t.logits)).collect();
        assert_same(at, &found, &wanted[i]);
    }
    slots
}

#[tokio::test]
async fn local_f32() {
    every_shape(Transport::Local, Dtype::F32).await;
}

#[tokio::test]
async fn local_bf16() {
    every_shape(Transport::Local, Dtype::Bf16).await;
}

#[tokio::test]
async fn tcp_f32() {
    every_shape(Transport::Tcp, Dtype::F32).await;
}

#[tokio::test]
async fn tcp_bf16() {
    every_shape(Transport::Tcp, Dtype::Bf16).await;
}

#[tokio::test]
async fn ucx_f32() {
    if ucx_missing("invariance in f32").await.is_none() {
        every_shape(Transport::Ucx, Dtype::F32).await;
    }
}

#[tokio::test]
async fn ucx_bf16() {
    if ucx_missing("invariance in bf16").await.is_none() {
        every_shape(Transport::Ucx, Dtype::Bf16).await;
    }
}

/// A seeded sample is as reproducible as a greedy one.
#[tokio::test]
async fn seeded_samples_do_not_depend_on_the_shape() {
    let mut samples = Vec::new();
    for (attention, experts, chunk) in [(1, 1, 512), (2, 3, 7)] {
        let mesh = Mesh::builder().attention(attention).experts(experts).prefill_chunk(chunk).start().await;
        let mut request = ids_request(&prompts()[0], 24);
        let sampling = request.sampling.get_or_insert_default();
        (sampling.temperature, sampling.top_p, sampling.seed) = (Some(0.9), Some(0.95), Some(7));
        sampling.repetition_penalty = Some(1.1);
        let sample = mesh.generate(request.clone()).await.expect("a sample").ids();
        let sampling = request.sampling.get_or_insert_default();
        sampling.seed = Some(8);
        let other = mesh.generate(request).await.expect("a sample").ids();
        assert_ne!(sample, other, "two seeds");
        samples.push(sample);
    }
    assert_eq!(samples[0], samples[1]);
}
