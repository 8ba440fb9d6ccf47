//! Where fixtures lie, and small model directories written to order.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mesh_model::{ModelConfig, schema};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder of the repository's fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

/// Every model directory at hand: the repository's, and those of the folder that `MESH_REFERENCE_DIR` names.
pub fn models() -> Vec<PathBuf> {
    let shipped =
        ["tiny-moe", "checkpoints/mixtral-swa-f32", "checkpoints/olmoe-clip-gqa-f32", "checkpoints/qwen3moe-v5config"];
    let mut models: Vec<PathBuf> = shipped.into_iter().map(fixture).collect();
    if let Some(reference) = std::env::var_os("MESH_REFERENCE_DIR") {
        let more = [
            "mixtral-8e-top2",
            "qwen3moe-64e-top8",
            "qwen3moe-base",
            "qwen3moe-mlponly-nonorm-tied",
            "qwen3moe-yarn",
            "olmoe-64e-top8",
        ];
        models.extend(more.into_iter().map(|name| Path::new(&reference).join("checkpoints").join(name)));
    } else {
        println!(
            "MESH_REFERENCE_DIR is not set: only the shipped models are read, fixtures/README.md lists the others"
        );
    }
    models
}

/// The config that written directories have, if a test does not change it: two layers, the first of them dense.
pub fn config() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
        "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "vocab_size": 10, "max_position_embeddings": 64, "intermediate_size": 20, "moe_intermediate_size": 8,
        "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": true, "mlp_only_layers": [0],
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": null, "attention_bias": false,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "eos_token_id": 1, "bos_token_id": null,
    })
}

/// The config of [`config`] with keys replaced; a key is removed by the string `"(absent)"`.
pub fn config_with(changes: Value) -> Value {
    let mut config = config();
    let keys = config.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        if value == "(absent)" {
            keys.remove(key);
        } else {
            keys.insert(key.clone(), value.clone());
        }
    }
    config
}

/// A tensor to be written: type, shape, and the byte that fills it.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub fill: u8,
}

/// A model directory to be written.
pub struct Model {
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Model {
    /// With all the tensors that the config calls for.
    pub fn of(config: Value) -> Self {
        let parsed = ModelConfig::parse(&config.to_string()).unwrap();
        let mut tensors = BTreeMap::new();
        let mut fill = 0u8;
        schema::for_each_tensor(&parsed, |name, shape, _| {
            fill = fill.wrapping_add(1);
            tensors.insert(name, Tensor { dtype: "BF16", shape: shape.to_vec(), fill });
            Ok::<(), ()>(())
        })
        .unwrap();
        Self { config, tensors }
    }

    /// Of [`config`].
    pub fn sound() -> Self {
        Self::of(config())
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.get_mut(name).unwrap()
    }

    /// As one file.
    pub fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.path().join("model.safetensors"), safetensors(self.tensors.iter())).unwrap();
        dir
    }

    /// As two shards with an index, odd and even tensors by name.
    pub fn write_sharded(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        let mut map = BTreeMap::new();
        for (shard, name) in SHARDS.iter().enumerate() {
            let part = || self.tensors.iter().skip(shard).step_by(2);
            fs::write(dir.path().join(name), safetensors(part())).unwrap();
            map.extend(part().map(|(tensor, _)| (tensor.clone(), *name)));
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
        dir
    }
}

/// The shards that [`Model::write_sharded`] writes.
pub const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
/// Its index.
pub const INDEX: &str = "model.safetensors.index.json";

/// The bytes of a safetensors file.
fn safetensors<'a>(tensors: impl Iterator<Item = (&'a String, &'a Tensor)>) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let element = if tensor.dtype == "F32" { 4 } else { 2 };
        let start = data.len();
        data.resize(start + tensor.shape.iter().product::<usize>() * element, tensor.fill);
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}
