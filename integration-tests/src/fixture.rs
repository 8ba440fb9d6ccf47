//! Checkpoints with what the reference (Hugging Face transformers) computed for them.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::checkpoint::Copy;

/// Every public fixture of the families that are served.
pub const PUBLIC: [&str; 9] = [
    "mixtral-8e-top2",
    "mixtral-swa-f32",
    "qwen3moe-64e-top8",
    "qwen3moe-base",
    "qwen3moe-mlponly-nonorm-tied",
    "qwen3moe-v5config",
    "qwen3moe-yarn",
    "olmoe-64e-top8",
    "olmoe-clip-gqa-f32",
];

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository").to_owned()
}

/// The shipped trained model.
pub fn tiny_moe() -> PathBuf {
    repository().join("fixtures/tiny-moe")
}

/// What drills run on: the shipped model, or the one in `MESH_TEST_MODEL`.
pub fn drilled() -> PathBuf {
    std::env::var_os("MESH_TEST_MODEL").map_or_else(tiny_moe, PathBuf::from)
}

/// A fixture's folder: in the repository, or under `MESH_REFERENCE_DIR`.
pub fn find(name: &str) -> Option<PathBuf> {
    let outside = std::env::var_os("MESH_REFERENCE_DIR").map(PathBuf::from);
    let roots = [Some(repository().join("fixtures")), outside];
    let folders = roots.into_iter().flatten().map(|root| root.join("checkpoints").join(name));
    folders.into_iter().find(|folder| folder.join("golden.json").is_file())
}

/// A fixture that ships with the repository.
pub fn shipped(name: &str) -> PathBuf {
    find(name).unwrap_or_else(|| panic!("fixtures/checkpoints/{name} is not in this checkout"))
}

/// A fixture and its goldens.
#[derive(Debug)]
pub struct Fixture {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub model: PathBuf,
    /// What the reference computed, by prompt.
    pub prompts: Vec<Golden>,
    /// A copy whose context takes every golden, where the published one does not.
    copy: Option<Copy>,
}

/// What the reference computed for a prompt.
#[derive(Debug)]
pub struct Golden {
    /// The prompt.
    pub ids: Vec<u32>,
    /// Greedy tokens, f32.
    pub tokens: Vec<u32>,
    /// Greedy tokens, bf16.
    pub bf16_tokens: Vec<u32>,
    /// How far the best logit was ahead of the second at each bf16 step.
    pub bf16_margins: Vec<f64>,
    /// Logits after the prompt's last token, f32.
    pub last_logits: Vec<f32>,
    /// Routing of every prompt token, by MoE layer.
    pub router: Vec<GoldenLayer>,
}

/// A layer's routing.
#[derive(Debug)]
pub struct GoldenLayer {
    /// The layer.
    pub layer: u32,
    /// By token, experts by falling weight.
    pub ids: Vec<Vec<u32>>,
    /// Beside them their weights.
    pub weights: Vec<Vec<f64>>,
}

impl Fixture {
    /// Reads a checkpoint folder with its goldens.
    pub fn read(model: &Path) -> Self {
        let read = |name: &str| {
            let path = model.join(name);
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let golden: Value = serde_json::from_slice(&read("golden.json")).expect("golden.json is JSON");
        let file = read("golden.safetensors");
        let tensors = SafeTensors::deserialize(&file).expect("golden.safetensors is valid");
        let prompts = golden["prompts"].as_array().expect("prompts").iter().enumerate();
        let prompts = prompts.map(|(i, prompt)| Golden::read(prompt, &tensors, i)).collect();
        let name = model.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Self { name, model: model.to_owned(), prompts, copy: None }.with_room()
    }

    /// The reference does not hold itself to `max_position_embeddings`; the mesh does. A golden that goes past it is run on
    /// a copy that names a larger context, which changes nothing else: no rope of the public fixtures depends on it.
    fn with_room(mut self) -> Self {
        let needed = self.prompts.iter().map(|p| p.ids.len() + p.tokens.len()).max().unwrap_or(0);
        let config = std::fs::read(self.model.join("config.json")).expect("config.json");
        let config: Value = serde_json::from_slice(&config).expect("config.json is JSON");
        if config["max_position_embeddings"].as_u64().is_some_and(|context| context < needed as u64) {
            let copy = Copy::of(&self.model).config(|c| c["max_position_embeddings"] = needed.into());
            self.model = copy.path().to_owned();
            self.copy = Some(copy);
        }
        self
    }

    /// Whether it is run on a copy with a larger context than published.
    pub fn is_copy(&self) -> bool {
        self.copy.is_some()
    }
}

impl Golden {
    fn read(prompt: &Value, tensors: &SafeTensors<'_>, index: usize) -> Self {
        let name = format!("p{index}.f32.last_logits");
        let logits = tensors.tensor(&name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(logits.dtype(), Dtype::F32);
        let bytes = logits.data().chunks_exact(4);
        let layers = prompt["router"].as_array().expect("router").iter();
        Self {
            ids: numbers(&prompt["ids"]),
            tokens: numbers(&prompt["f32"]["tokens"]),
            bf16_tokens: numbers(&prompt["bf16"]["tokens"]),
            bf16_margins: floats(&prompt["bf16"]["margins"]),
            last_logits: bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            router: layers.map(GoldenLayer::read).collect(),
        }
    }

    /// Steps of the bf16 run before the first whose choice was close.
    pub fn bf16_sure_steps(&self, margin_min: f64) -> usize {
        self.bf16_margins.iter().position(|m| *m < margin_min).unwrap_or(self.bf16_margins.len())
    }
}

impl GoldenLayer {
    fn read(layer: &Value) -> Self {
        let rows = |key: &str| layer[key].as_array().unwrap_or_else(|| panic!("router.{key}")).clone();
        Self {
            layer: u32::try_from(layer["layer"].as_u64().expect("a layer")).expect("a layer"),
            ids: rows("ids").iter().map(numbers).collect(),
            weights: rows("weights").iter().map(floats).collect(),
        }
    }
}

fn numbers(list: &Value) -> Vec<u32> {
    let list = list.as_array().expect("a list of numbers").iter();
    list.map(|n| u32::try_from(n.as_u64().expect("a number")).expect("an id")).collect()
}

fn floats(list: &Value) -> Vec<f64> {
    list.as_array().expect("a list of numbers").iter().map(|n| n.as_f64().expect("a number")).collect()
}
