//! `config.json` and `generation_config.json` of the supported families, published style and transformers-5 style.
//!
//! What the weights cannot contradict (theta, epsilons, the gate's rule) must stand in the config: a default taken in
//! silence would give wrong text without an error. What they can contradict is checked when the checkpoint is opened.

pub(crate) mod keys;

use std::path::{Path, PathBuf};

use mesh_core::LayerId;
use mesh_core::routing::GateRule;
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::files::{CONFIG_BYTES_MAX, read_text, read_text_if_present};
use crate::rope::RopeConfig;
use crate::tensor::WeightDtype;
use keys::Keys;

/// Width of the residual stream at most.
pub const HIDDEN_MAX: usize = 1 << 16;
/// Transformer layers at most.
pub const LAYERS_MAX: usize = 1024;
/// Attention heads at most.
pub const HEADS_MAX: usize = 1024;
/// Width of a head at most.
pub const HEAD_DIM_MAX: usize = 1024;
/// Tokens of a vocabulary at most.
pub const VOCAB_MAX: usize = 1 << 22;
/// Positions at most.
pub const POSITION_MAX: usize = 1 << 24;
/// Width inside of a feed-forward block at most.
pub const INTERMEDIATE_MAX: usize = 1 << 20;
/// Routed experts of a layer at most.
pub const EXPERTS_MAX: usize = 4096;

/// The model families that are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Mixtral (8x7B, 8x22B and their kin).
    Mixtral,
    /// Qwen3-MoE (30B-A3B, 235B-A22B and their kin).
    Qwen3Moe,
    /// OLMoE (1B-7B and its kin).
    Olmoe,
}

impl Family {
    /// The supported architectures, as messages list them.
    pub const SUPPORTED: &'static str =
        "MixtralForCausalLM (mixtral), Qwen3MoeForCausalLM (qwen3_moe), OlmoeForCausalLM (olmoe)";

    const ALL: [Family; 3] = [Family::Mixtral, Family::Qwen3Moe, Family::Olmoe];

    /// `model_type` of its configs.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Mixtral => "mixtral",
            Family::Qwen3Moe => "qwen3_moe",
            Family::Olmoe => "olmoe",
        }
    }

    /// The entry of `architectures` in its configs.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Mixtral => "MixtralForCausalLM",
            Family::Qwen3Moe => "Qwen3MoeForCausalLM",
            Family::Olmoe => "OlmoeForCausalLM",
        }
    }
}

/// What stands after a layer's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// One feed-forward block, of the trunk.
    Dense,
    /// A gate and routed experts.
    Moe,
}

/// How queries and keys are normalised before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QkNorm {
    /// Not at all (Mixtral).
    None,
    /// Each head apart, one weight of `head_dim` for all (Qwen3-MoE).
    PerHead,
    /// The whole projection at once, before the split into heads (OLMoE).
    Whole,
}

/// The routed experts of each mixture-of-experts layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MoeConfig {
    /// Experts of a layer.
    pub experts: usize,
    /// Experts that a token goes to.
    pub top_k: usize,
    /// Width inside of an expert.
    pub intermediate: usize,
}

/// A validated model config.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which family's maths.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// What each layer is, first to last.
    pub layers: Vec<LayerKind>,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; need not be `hidden / heads`.
    pub head_dim: usize,
    /// Tokens of the embedding and the head (the tokenizer may know fewer).
    pub vocab: usize,
    /// Positions that the config allows.
    pub max_position: usize,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Keys that a query sees, itself included: a key at this distance or more is masked. In every layer, or `None`.
    pub sliding_window: Option<u32>,
    /// How queries and keys are normalised.
    pub qk_norm: QkNorm,
    /// Queries, keys and values are clamped to plus and minus this, after the norms.
    pub clip_qkv: Option<f32>,
    /// Whether the four attention projections have biases.
    pub attention_bias: bool,
    /// Whether the head is the embedding.
    pub tied_embeddings: bool,
    /// Width inside of a dense layer's block; 0 where there is no dense layer.
    pub dense_intermediate: usize,
    /// The routed experts.
    pub moe: MoeConfig,
    /// How gate logits become weights.
    pub gate: GateRule,
    /// The type that the config declares for the weights; each tensor's own is what is read.
    pub weight_dtype: WeightDtype,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// The token that begins one.
    pub bos: Option<u32>,
}

impl ModelConfig {
    /// Reads `config.json` of a model directory, and `generation_config.json` where there is one.
    ///
    /// # Errors
    /// [`ModelError`] naming the file or the key.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self, ModelError> {
        let file = dir.as_ref().join("config.json");
        let mut config = Self::parse_object(&object(&read_text(&file, CONFIG_BYTES_MAX)?, file)?)?;
        let file = dir.as_ref().join("generation_config.json");
        if let Some(text) = read_text_if_present(&file, CONFIG_BYTES_MAX)? {
            config.apply_generation(&object(&text, file)?)?;
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`ModelError`] naming the key.
    pub fn parse(json: &str) -> Result<Self, ModelError> {
        Self::parse_object(&object(json, PathBuf::from("config.json"))?)
    }

    /// The layers with routed experts.
    pub fn moe_layers(&self) -> Vec<LayerId> {
        let moe = self.layers.iter().enumerate().filter(|(_, kind)| **kind == LayerKind::Moe);
        moe.map(|(layer, _)| LayerId(layer as u16)).collect()
    }

    /// Width of the query projection.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the key and of the value projection.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn parse_object(object: &Map<String, Value>) -> Result<Self, ModelError> {
        let keys = Keys::new(object, "");
        let family = family(&keys)?;
        refuse_unsupported(&keys)?;
        let hidden = keys.count("hidden_size", 1, HIDDEN_MAX)?;
        let layer_count = keys.count("num_hidden_layers", 1, LAYERS_MAX)?;
        let (heads, kv_heads, head_dim) = heads(&keys, hidden)?;
        let max_position = keys.count("max_position_embeddings", 1, POSITION_MAX)?;
        let moe = moe(&keys, family)?;
        let normalise = match family {
            Family::Mixtral => true,
            Family::Qwen3Moe | Family::Olmoe => {
                keys.get("norm_topk_prob").ok_or_else(|| keys.missing("norm_topk_prob"))?;
                keys.flag("norm_topk_prob", false)?
            }
        };
        let layers = layers(&keys, family, layer_count)?;
        let dense = layers.contains(&LayerKind::Dense);
        let dense_intermediate = if dense { keys.count("intermediate_size", 1, INTERMEDIATE_MAX)? } else { 0 };
        Ok(Self {
            family,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab: keys.count("vocab_size", 1, VOCAB_MAX)?,
            max_position,
            rms_eps: keys.positive("rms_norm_eps")? as f32,
            rope: RopeConfig::from_keys(&keys, max_position)?,
            sliding_window: sliding_window(&keys, family)?,
            qk_norm: match family {
                Family::Mixtral => QkNorm::None,
                Family::Qwen3Moe => QkNorm::PerHead,
                Family::Olmoe => QkNorm::Whole,
            },
            clip_qkv: match family {
                Family::Olmoe => keys.positive_or_none("clip_qkv")?.map(|c| c as f32),
                Family::Mixtral | Family::Qwen3Moe => None,
            },
            attention_bias: match family {
                // Mixtral's projections never have biases; a file that has them is refused for its extra tensors.
                Family::Mixtral => false,
                Family::Qwen3Moe | Family::Olmoe => keys.flag("attention_bias", false)?,
            },
            tied_embeddings: keys.flag("tie_word_embeddings", false)?,
            dense_intermediate,
            moe,
            gate: GateRule { top_k: moe.top_k, normalise },
            weight_dtype: weight_dtype(&keys)?,
            eos: keys.token_ids("eos_token_id")?.unwrap_or_default(),
            bos: token_id(&keys, "bos_token_id")?,
        })
    }

    /// The generation config's ids take precedence, as in transformers.
    fn apply_generation(&mut self, object: &Map<String, Value>) -> Result<(), ModelError> {
        let keys = Keys::new(object, "generation_config.");
        if let Some(eos) = keys.token_ids("eos_token_id")? {
            self.eos = eos;
        }
        if let Some(bos) = token_id(&keys, "bos_token_id")? {
            self.bos = Some(bos);
        }
        Ok(())
    }
}

fn object(text: &str, file: PathBuf) -> Result<Map<String, Value>, ModelError> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ModelError::BadJson { file, reason: "it is not an object".to_owned() }),
        Err(e) => Err(ModelError::BadJson { file, reason: e.to_string() }),
    }
}

fn family(keys: &Keys<'_>) -> Result<Family, ModelError> {
    let unknown = |found: &str| ModelError::UnknownArchitecture { found: found.to_owned() };
    let architecture = match keys.get("architectures") {
        None => None,
        Some(list) => match list.as_array().map(Vec::as_slice) {
            Some([]) => None,
            Some([Value::String(one)]) => Some(one.as_str()),
            _ => return Err(keys.bad("architectures", list, "a list of one name")),
        },
    };
    let by_architecture = match architecture {
        None => None,
        Some(name) => {
            let family = Family::ALL.into_iter().find(|f| f.architecture() == name);
            Some(family.ok_or_else(|| unknown(name))?)
        }
    };
    let model_type = keys.text("model_type")?;
    let by_type = match model_type {
        None => None,
        Some(name) => {
            let family = Family::ALL.into_iter().find(|f| f.model_type() == name);
            Some(family.ok_or_else(|| unknown(name))?)
        }
    };
    match (by_architecture, by_type) {
        (Some(a), Some(b)) if a != b => Err(ModelError::Contradiction {
            first: "architectures".to_owned(),
            second: "model_type".to_owned(),
            reason: format!("{} and {}", a.architecture(), b.model_type()),
        }),
        (Some(family), _) | (None, Some(family)) => Ok(family),
        (None, None) => Err(keys.missing("model_type")),
    }
}

fn refuse_unsupported(keys: &Keys<'_>) -> Result<(), ModelError> {
    let refuse = |key: &str, found: &str, remedy: &str| {
        let (key, found, remedy) = (key.to_owned(), found.to_owned(), remedy.to_owned());
        Err(ModelError::Unsupported { key, found, remedy })
    };
    if let Some(act) = keys.text("hidden_act")?.filter(|act| !matches!(*act, "silu" | "swish")) {
        return refuse("hidden_act", act, "only silu is computed");
    }
    if keys.get("quantization_config").is_some() {
        return refuse("quantization_config", "present", "serve the bf16 or f32 checkpoint that it was made from");
    }
    let partial = keys.positive_or_none("partial_rotary_factor")?;
    if let Some(partial) = partial.filter(|p| *p != 1.0) {
        return refuse("partial_rotary_factor", &partial.to_string(), "these families rotate whole heads");
    }
    Ok(())
}

fn heads(keys: &Keys<'_>, hidden: usize) -> Result<(usize, usize, usize), ModelError> {
    let heads = keys.count("num_attention_heads", 1, HEADS_MAX)?;
    let kv_heads = keys.count_or_none("num_key_value_heads", 1, HEADS_MAX)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(ModelError::Contradiction {
            first: "num_attention_heads".to_owned(),
            second: "num_key_value_heads".to_owned(),
            reason: format!("{heads} query heads cannot share {kv_heads} key heads evenly"),
        });
    }
    let head_dim = match keys.count_or_none("head_dim", 1, HEAD_DIM_MAX)? {
        Some(explicit) => explicit,
        None if hidden.is_multiple_of(heads) && hidden / heads <= HEAD_DIM_MAX => hidden / heads,
        None => {
            return Err(ModelError::Contradiction {
                first: "hidden_size".to_owned(),
                second: "num_attention_heads".to_owned(),
                reason: format!("{hidden} does not divide by {heads} into sound heads, and head_dim is absent"),
            });
        }
    };
    if !head_dim.is_multiple_of(2) {
        let (key, found) = ("head_dim".to_owned(), head_dim.to_string());
        return Err(ModelError::BadKey { key, found, expected: "even: rotary embedding turns pairs".to_owned() });
    }
    Ok((heads, kv_heads, head_dim))
}

fn moe(keys: &Keys<'_>, family: Family) -> Result<MoeConfig, ModelError> {
    let experts = match family {
        Family::Mixtral => keys.count_either("num_local_experts", "num_experts", 1, EXPERTS_MAX)?,
        Family::Qwen3Moe | Family::Olmoe => keys.count_either("num_experts", "num_local_experts", 1, EXPERTS_MAX)?,
    };
    let top_k = keys.count("num_experts_per_tok", 1, EXPERTS_MAX)?;
    if top_k > experts {
        let found = top_k.to_string();
        let expected = format!("at most the {experts} experts that there are");
        return Err(ModelError::BadKey { key: "num_experts_per_tok".to_owned(), found, expected });
    }
    let intermediate = match family {
        Family::Mixtral | Family::Olmoe => "intermediate_size",
        Family::Qwen3Moe => "moe_intermediate_size",
    };
    Ok(MoeConfig { experts, top_k, intermediate: keys.count(intermediate, 1, INTERMEDIATE_MAX)? })
}

fn layers(keys: &Keys<'_>, family: Family, count: usize) -> Result<Vec<LayerKind>, ModelError> {
    if family != Family::Qwen3Moe {
        return Ok(vec![LayerKind::Moe; count]);
    }
    let step = keys.count_or_none("decoder_sparse_step", 1, LAYERS_MAX)?.unwrap_or(1);
    let mut layers: Vec<LayerKind> =
        (1..=count).map(|nth| if nth.is_multiple_of(step) { LayerKind::Moe } else { LayerKind::Dense }).collect();
    if let Some(only) = keys.get("mlp_only_layers") {
        let expected = || keys.bad("mlp_only_layers", only, format!("a list of layers under {count}"));
        for layer in only.as_array().ok_or_else(expected)? {
            let layer = layer.as_u64().and_then(|l| usize::try_from(l).ok());
            let kind = layer.and_then(|l| layers.get_mut(l)).ok_or_else(expected)?;
            *kind = LayerKind::Dense;
        }
    }
    if !layers.contains(&LayerKind::Moe) {
        let (key, found) = ("mlp_only_layers".to_owned(), "every layer".to_owned());
        let remedy = "a model without routed experts has nothing to spread over a mesh".to_owned();
        return Err(ModelError::Unsupported { key, found, remedy });
    }
    Ok(layers)
}

fn sliding_window(keys: &Keys<'_>, family: Family) -> Result<Option<u32>, ModelError> {
    let used = match family {
        Family::Mixtral => true,
        Family::Qwen3Moe => keys.flag("use_sliding_window", false)?,
        Family::Olmoe => false,
    };
    if !used {
        return Ok(None);
    }
    let window = keys.count_or_none("sliding_window", 1, POSITION_MAX)?;
    Ok(window.map(|w| w as u32))
}

fn weight_dtype(keys: &Keys<'_>) -> Result<WeightDtype, ModelError> {
    let key = if keys.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match keys.text(key)? {
        // transformers' own default.
        None | Some("float32") => Ok(WeightDtype::F32),
        Some("bfloat16") => Ok(WeightDtype::Bf16),
        Some(other) => Err(ModelError::Unsupported {
            key: key.to_owned(),
            found: other.to_owned(),
            remedy: "convert the checkpoint to bfloat16 or float32".to_owned(),
        }),
    }
}

fn token_id(keys: &Keys<'_>, key: &str) -> Result<Option<u32>, ModelError> {
    Ok(keys.token_ids(key)?.and_then(|ids| ids.first().copied()))
}
