//! Which tensors a config calls for, by their published names, and their shapes.

use mesh_core::{ExpertId, LayerId};

use crate::config::{Family, LayerKind, ModelConfig, QkNorm};

/// The token embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The norm before the head.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The output head; absent from files whose head is the embedding.
pub const HEAD: &str = "lm_head.weight";

/// Tensors that older exports carry and nothing needs: they follow from the config.
pub fn is_harmless(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

/// A layer's own prefix.
fn layer_name(layer: LayerId, rest: &str) -> String {
    format!("model.layers.{}.{rest}", layer.0)
}

/// The norm before attention.
pub fn input_norm(layer: LayerId) -> String {
    layer_name(layer, "input_layernorm.weight")
}

/// The norm after attention.
pub fn post_norm(layer: LayerId) -> String {
    layer_name(layer, "post_attention_layernorm.weight")
}

/// A tensor of attention: `attention(layer, "q_proj.weight")`.
pub fn attention(layer: LayerId, rest: &str) -> String {
    layer_name(layer, &format!("self_attn.{rest}"))
}

/// The gate of a layer with routed experts.
pub fn gate(family: Family, layer: LayerId) -> String {
    match family {
        Family::Mixtral => layer_name(layer, "block_sparse_moe.gate.weight"),
        Family::Qwen3Moe | Family::Olmoe => layer_name(layer, "mlp.gate.weight"),
    }
}

/// Gate, up and down projection of a dense layer.
pub fn dense(layer: LayerId) -> [String; 3] {
    ["gate_proj", "up_proj", "down_proj"].map(|p| layer_name(layer, &format!("mlp.{p}.weight")))
}

/// Gate, up and down projection of a routed expert.
pub fn expert(family: Family, layer: LayerId, expert: ExpertId) -> [String; 3] {
    let (block, projections) = match family {
        Family::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
        Family::Qwen3Moe | Family::Olmoe => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
    };
    projections.map(|p| layer_name(layer, &format!("{block}.experts.{}.{p}.weight", expert.0)))
}

/// Whose tensor it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// Every attention node's.
    Trunk,
    /// Those expert nodes' that hold the expert.
    Expert(LayerId, ExpertId),
}

/// Calls `visit` with the name, shape and owner of every tensor that the config calls for, until it refuses one.
///
/// A visitor and no list, because an absurd config may call for millions of tensors; the first that is missing ends it.
///
/// # Errors
/// What `visit` returns.
pub fn for_each_tensor<E>(
    config: &ModelConfig,
    mut visit: impl FnMut(String, &[usize], Owner) -> Result<(), E>,
) -> Result<(), E> {
    let hidden = config.hidden;
    visit(EMBEDDING.to_owned(), &[config.vocab, hidden], Owner::Trunk)?;
    for (index, kind) in config.layers.iter().enumerate() {
        let layer = LayerId(index as u16);
        visit(input_norm(layer), &[hidden], Owner::Trunk)?;
        visit(post_norm(layer), &[hidden], Owner::Trunk)?;
        attention_tensors(config, layer, &mut visit)?;
        match kind {
            LayerKind::Dense => ffn(dense(layer), config.dense_intermediate, hidden, Owner::Trunk, &mut visit)?,
            LayerKind::Moe => {
                visit(gate(config.family, layer), &[config.moe.experts, hidden], Owner::Trunk)?;
                for index in 0..config.moe.experts {
                    let id = ExpertId(index as u16);
                    let names = expert(config.family, layer, id);
                    ffn(names, config.moe.intermediate, hidden, Owner::Expert(layer, id), &mut visit)?;
                }
            }
        }
    }
    visit(FINAL_NORM.to_owned(), &[hidden], Owner::Trunk)?;
    if config.tied_embeddings { Ok(()) } else { visit(HEAD.to_owned(), &[config.vocab, hidden], Owner::Trunk) }
}

fn attention_tensors<E>(
    config: &ModelConfig,
    layer: LayerId,
    visit: &mut impl FnMut(String, &[usize], Owner) -> Result<(), E>,
) -> Result<(), E> {
    let (q, kv, hidden) = (config.q_width(), config.kv_width(), config.hidden);
    let projections = [("q_proj", q, hidden), ("k_proj", kv, hidden), ("v_proj", kv, hidden), ("o_proj", hidden, q)];
    for (name, rows, cols) in projections {
        visit(attention(layer, &format!("{name}.weight")), &[rows, cols], Owner::Trunk)?;
        if config.attention_bias {
            visit(attention(layer, &format!("{name}.bias")), &[rows], Owner::Trunk)?;
        }
    }
    let norms = match config.qk_norm {
        QkNorm::None => return Ok(()),
        QkNorm::PerHead => [("q_norm.weight", config.head_dim), ("k_norm.weight", config.head_dim)],
        QkNorm::Whole => [("q_norm.weight", q), ("k_norm.weight", kv)],
    };
    norms.into_iter().try_for_each(|(name, width)| visit(attention(layer, name), &[width], Owner::Trunk))
}

fn ffn<E>(
    [gate, up, down]: [String; 3],
    intermediate: usize,
    hidden: usize,
    owner: Owner,
    visit: &mut impl FnMut(String, &[usize], Owner) -> Result<(), E>,
) -> Result<(), E> {
    visit(gate, &[intermediate, hidden], owner)?;
    visit(up, &[intermediate, hidden], owner)?;
    visit(down, &[hidden, intermediate], owner)
}
