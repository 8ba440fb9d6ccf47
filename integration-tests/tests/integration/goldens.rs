//! Every public fixture of the three families, and the shipped trained model, against Hugging Face transformers.

use integration_tests::fixture::{self, Fixture, Golden, GoldenLayer};
use integration_tests::{Dtype, Generation, Mesh, Transport, ids_request};
use mesh_proto::v1::GenerateRequest;

/// Logits may differ from the reference's by this, relative to the larger of 1 and the reference's.
const LOGIT_TOLERANCE: f32 = 1e-4;
/// Routing weights closer than this count as tied.
const WEIGHT_TIE: f64 = 1e-6;
/// The reference's own bf16 paths part where the best token leads by less than this.
const BF16_MARGIN: f64 = 0.5;

/// All prompts of a fixture at once on a mesh of 1 attention and 2 expert nodes, in the order of the goldens.
async fn run(fixture: &Fixture, dtype: Dtype) -> Vec<Generation> {
    let mesh = Mesh::builder().model(&fixture.model).experts(2).dtype(dtype).transport(Transport::Local).start().await;
    let mut requests = Vec::new();
    for golden in &fixture.prompts {
        let mut request = ids_request(&golden.ids, u32::try_from(golden.tokens.len()).expect("few tokens"));
        request.return_logits = dtype == Dtype::F32;
        request.return_routing = dtype == Dtype::F32;
        requests.push(tokio::spawn(integration_tests::generation::generate(mesh.client(), request)));
    }
    let mut answers = Vec::new();
    for (i, request) in requests.into_iter().enumerate() {
        let answer = integration_tests::patience::soon("a golden prompt", request).await.expect("no panic");
        answers.push(answer.unwrap_or_else(|e| panic!("{} prompt {i}: {e}\n{}", fixture.name, mesh.log())));
    }
    answers
}

async fn check_f32(fixture: &Fixture) {
    for (i, (golden, answer)) in fixture.prompts.iter().zip(run(fixture, Dtype::F32).await).enumerate() {
        let at = format!("{} prompt {i} ({} tokens)", fixture.name, golden.ids.len());
        check_routing(&at, golden, &answer);
        check_logits(&at, golden, &answer.logits(0));
        assert_eq!(answer.ids(), golden.tokens, "{at}: greedy ids");
    }
    let copy = if fixture.is_copy() { ", with a larger context than published" } else { "" };
    eprintln!("golden f32: {}: {} prompts{copy}", fixture.name, fixture.prompts.len());
}

async fn check_bf16(fixture: &Fixture) {
    let mut compared = 0;
    for (i, (golden, answer)) in fixture.prompts.iter().zip(run(fixture, Dtype::Bf16).await).enumerate() {
        let sure = golden.bf16_sure_steps(BF16_MARGIN);
        assert_eq!(answer.ids()[..sure], golden.bf16_tokens[..sure], "{} prompt {i}: greedy ids", fixture.name);
        compared += sure;
    }
    assert!(compared > 0, "{}: no step of the reference is sure", fixture.name);
    eprintln!("golden bf16: {}: {compared} sure steps of {} prompts", fixture.name, fixture.prompts.len());
}

fn check_logits(at: &str, golden: &Golden, found: &[f32]) {
    assert_eq!(found.len(), golden.last_logits.len(), "{at}: vocabulary");
    for (id, (found, wanted)) in found.iter().zip(&golden.last_logits).enumerate() {
        let bound = LOGIT_TOLERANCE * wanted.abs().max(1.0);
        assert!((found - wanted).abs() <= bound, "{at}: logit {id} is {found}, the reference's {wanted}");
    }
}

/// The prompt's rows come first; what follows is the answer's.
fn check_routing(at: &str, golden: &Golden, answer: &Generation) {
    let layers: Vec<u32> = answer.routing.keys().copied().collect();
    assert_eq!(layers, golden.router.iter().map(|l| l.layer).collect::<Vec<_>>(), "{at}: MoE layers");
    for layer in &golden.router {
        let (experts, weights) = &answer.routing[&layer.layer];
        assert_eq!(experts.len(), weights.len(), "{at}");
        for (token, wanted) in layer.ids.iter().enumerate() {
            let k = wanted.len();
            let found = experts.get(token * k..(token + 1) * k);
            let found = found.unwrap_or_else(|| panic!("{at}: layer {} has no routing of token {token}", layer.layer));
            let same = same_experts(layer, token, found);
            assert!(same, "{at}: layer {} token {token}: {found:?}, the reference's {wanted:?}", layer.layer);
        }
    }
}

/// Whether the same experts were chosen in the same order, but for the order of tied ones.
fn same_experts(layer: &GoldenLayer, token: usize, found: &[u32]) -> bool {
    let (wanted, weights) = (&layer.ids[token], &layer.weights[token]);
    let weight_of = |expert: u32| wanted.iter().position(|e| *e == expert).map(|i| weights[i]);
    let mut seen = found.to_vec();
    seen.sort_unstable();
    seen.dedup();
    let distinct = seen.len() == wanted.len();
    distinct
        && found
            .iter()
            .zip(weights)
            .all(|(expert, weight)| weight_of(*expert).is_some_and(|w| (w - weight).abs() <= WEIGHT_TIE))
}

/// Checks those public fixtures that are there and says which are not.
async fn public(family: &str, dtype: Dtype) {
    let names = fixture::PUBLIC.iter().filter(|n| n.starts_with(family));
    let (mut here, mut absent) = (0, Vec::new());
    for name in names {
        match fixture::find(name) {
            Some(model) => {
                here += 1;
                let fixture = Fixture::read(&model);
                match dtype {
                    Dtype::F32 => check_f32(&fixture).await,
                    Dtype::Bf16 => check_bf16(&fixture).await,
                }
            }
            None => absent.push(*name),
        }
    }
    if !absent.is_empty() {
        let absent = absent.join(", ");
        eprintln!(
            "NOT RUN: goldens of {absent}: not in the repository; make them with fixtures/scripts/build_public.py and \
             set MESH_REFERENCE_DIR to the folder that has checkpoints/"
        );
    }
    assert!(here > 0, "no fixture of {family} is in the repository");
}

#[tokio::test]
async fn the_trained_model_agrees_in_f32() {
    check_f32(&Fixture::read(&fixture::tiny_moe())).await;
}

/// The trained model's first steps are close calls, so its answers are laid before it and judged step by step.
#[tokio::test]
async fn the_trained_model_agrees_in_bf16_where_the_choice_is_clear() {
    let fixture = Fixture::read(&fixture::tiny_moe());
    let mesh = Mesh::builder().model(&fixture.model).experts(2).dtype(Dtype::Bf16).start().await;
    let mut compared = 0;
    for (i, golden) in fixture.prompts.iter().enumerate() {
        let laid: Vec<u32> = golden.ids.iter().chain(&golden.bf16_tokens).copied().collect();
        let request = GenerateRequest { prompt_logprobs: Some(1), ..ids_request(&laid, 1) };
        let answer = mesh.generate(request).await.expect("an answer");
        assert_eq!(answer.prompt.len(), laid.len() - 1, "one entry for each prompt token but the first");
        // Entry t is of token t + 1, so the answer's first token is judged by entry `prompt - 1`.
        let judged = answer.prompt[golden.ids.len() - 1..].iter();
        for (step, (entry, wanted)) in judged.zip(&golden.bf16_tokens).enumerate() {
            if golden.bf16_margins[step] >= BF16_MARGIN {
                assert_eq!(entry.top[0].id, *wanted, "prompt {i} step {step}");
                compared += 1;
            }
        }
    }
    assert!(compared > 0, "no step of the reference is sure");
    eprintln!("golden bf16: {}: {compared} sure steps, judged one by one", fixture.name);
}

#[tokio::test]
async fn mixtral_agrees_in_f32() {
    public("mixtral", Dtype::F32).await;
}

#[tokio::test]
async fn mixtral_agrees_in_bf16_where_the_choice_is_clear() {
    public("mixtral", Dtype::Bf16).await;
}

#[tokio::test]
async fn qwen3_moe_agrees_in_f32() {
    public("qwen3moe", Dtype::F32).await;
}

#[tokio::test]
async fn qwen3_moe_agrees_in_bf16_where_the_choice_is_clear() {
    public("qwen3moe", Dtype::Bf16).await;
}

#[tokio::test]
async fn olmoe_agrees_in_f32() {
    public("olmoe", Dtype::F32).await;
}

#[tokio::test]
async fn olmoe_agrees_in_bf16_where_the_choice_is_clear() {
    public("olmoe", Dtype::Bf16).await;
}
