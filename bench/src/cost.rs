//! What a model's work costs at least: floating-point operations of a prefill, bytes that a decode step must read.
//!
//! Left out, because they are small or depend on more than the model: norms, softmax, the rows themselves, the embedding's
//! few rows, and in a step's bytes the KV cache.

use mesh_model::{LayerKind, ModelConfig};

/// Parameters that every token passes in every layer together: attention, gate, dense blocks. Neither head nor experts.
fn trunk_parameters(config: &ModelConfig) -> f64 {
    let (hidden, q, kv) = (config.hidden, config.q_width(), config.kv_width());
    let attention = hidden * (q + 2 * kv) + q * hidden;
    let of = |kind: &LayerKind| match kind {
        LayerKind::Dense => attention + 3 * hidden * config.dense_intermediate,
        LayerKind::Moe => attention + hidden * config.moe.experts,
    };
    config.layers.iter().map(of).sum::<usize>() as f64
}

fn head_parameters(config: &ModelConfig) -> f64 {
    (config.hidden * config.vocab) as f64
}

fn expert_parameters(config: &ModelConfig) -> f64 {
    (3 * config.hidden * config.moe.intermediate) as f64
}

fn moe_layers(config: &ModelConfig) -> f64 {
    config.layers.iter().filter(|kind| **kind == LayerKind::Moe).count() as f64
}

/// Distinct experts of a layer that `rows` tokens go to, when each goes to `top_k` of `experts` with equal chances and
/// independently: the expectation. It is the most that a router can expect of them; a skewed one touches fewer.
pub fn distinct_experts(experts: usize, top_k: usize, rows: usize) -> f64 {
    let missed = 1.0 - top_k as f64 / experts as f64;
    experts as f64 * (1.0 - missed.powf(rows as f64))
}

/// Bytes of weights that a step of `rows` tokens must read: everything that all share once, and each distinct expert once
/// in each layer.
pub fn step_bytes(config: &ModelConfig, rows: usize, element_bytes: usize) -> f64 {
    let experts = distinct_experts(config.moe.experts, config.moe.top_k, rows) * moe_layers(config);
    let parameters = trunk_parameters(config) + head_parameters(config) + experts * expert_parameters(config);
    parameters * element_bytes as f64
}

/// Floating-point operations of a prompt of `tokens` up to its first new token: two for each parameter that a token passes,
/// the head once, and the pairs of query and key.
pub fn prefill_flops(config: &ModelConfig, tokens: usize) -> f64 {
    let tokens = tokens as f64;
    let experts = config.moe.top_k as f64 * moe_layers(config) * expert_parameters(config);
    let pairs = tokens * (tokens + 1.0) / 2.0 * config.layers.len() as f64;
    let attention = 4.0 * pairs * config.q_width() as f64;
    2.0 * tokens * (trunk_parameters(config) + experts) + 2.0 * head_parameters(config) + attention
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Shape;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        shape: Shape,
    }

    /// The model that `mesh-bench model` makes unless told otherwise.
    fn usual() -> ModelConfig {
        Flags::parse_from(["x"]).shape.config().unwrap()
    }

    #[test]
    fn one_token_of_the_usual_model_reads_216_million_parameters() {
        // A layer: 1024 x (1024 + 2 x 256) + 1024 x 1024 of attention, 64 x 1024 of gate, 8 experts of 3 x 1024 x 512.
        let layer = 2_621_440 + 65_536 + 8 * 1_572_864;
        let all = 12 * layer + 32_000 * 1024;
        assert_eq!(all, 216_006_656);
        assert!((step_bytes(&usual(), 1, 2) - 2.0 * f64::from(all)).abs() < 1.0);
    }

    #[test]
    fn a_large_batch_reads_every_matrix_of_the_checkpoint_once() {
        // Of 1,305,766,400 parameters, less the embedding and the norms.
        let norms = 12 * (2 * 1024 + 2 * 64) + 1024;
        let all = 1_305_766_400 - 32_000 * 1024 - norms;
        assert!((step_bytes(&usual(), 4096, 2) / (2.0 * f64::from(all)) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn distinct_experts_are_top_k_for_one_and_all_for_many() {
        assert!((distinct_experts(64, 8, 1) - 8.0).abs() < 1e-9);
        // 64 x (1 - (7/8)^2)
        assert!((distinct_experts(64, 8, 2) - 15.0).abs() < 1e-9);
        assert!((distinct_experts(64, 8, 8) - 42.0).abs() < 0.1);
        assert!(distinct_experts(64, 8, 1000) > 63.999);
        assert_eq!(distinct_experts(8, 8, 1), 8.0);
    }

    #[test]
    fn prefill_grows_with_tokens_and_their_pairs() {
        let config = usual();
        let head = 2.0 * 32_000.0 * 1024.0;
        let per_token = 2.0 * 12.0 * (2_621_440.0 + 65_536.0 + 8.0 * 1_572_864.0);
        assert_eq!(prefill_flops(&config, 1), per_token + head + 4.0 * 12.0 * 1024.0);
        let pairs = 512.0 * 513.0 / 2.0 * 12.0;
        assert_eq!(prefill_flops(&config, 512), 512.0 * per_token + head + 4.0 * pairs * 1024.0);
    }
}
