//! Random checkpoints in the published form, so that anyone can run the benchmarks: Qwen3-MoE in bf16, written as a
//! stream, the same bytes for the same flags.
//!
//! Every block adds about as much to the residual stream as is there, and routing is decisive, so that activations stay
//! sane over any number of layers and tokens vary.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;
use mesh_model::{ModelConfig, schema};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::error::BenchError;

/// Bytes of tensors in a file, at most, unless one tensor alone has more.
const SHARD_BYTES_MAX: u64 = 1_000_000_000;
/// Bytes of a bf16 element.
const ELEMENT: u64 = 2;
/// Elements drawn before they are handed on.
const CHUNK: usize = 1 << 15;
/// Files of a tokenizer; the first must be there.
const TOKENIZER_FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];
/// The folder with the shipped tokenizer, in the repository.
const TOKENIZER: &str = "fixtures/tiny-moe";

/// `mesh-bench model`.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// The folder to make.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// What model.
    #[command(flatten)]
    pub shape: Shape,
    /// A folder with tokenizer.json; `fixtures/tiny-moe` of the repository when absent.
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
}

/// The sizes of a model.
#[derive(Clone, Copy, Debug, Args, Serialize)]
pub struct Shape {
    /// Width of the residual stream.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub hidden: usize,
    /// Layers.
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub layers: usize,
    /// Experts of each layer.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub experts: usize,
    /// Experts that a token goes to.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub top_k: usize,
    /// Width inside of an expert.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub intermediate: usize,
    /// Query heads.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub heads: usize,
    /// Key and value heads.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub kv_heads: usize,
    /// Width of a head.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    #[arg(long, value_name = "N", default_value_t = 32000)]
    pub vocab: usize,
    /// Positions.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub max_position: usize,
    /// Makes the weights repeatable.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl Shape {
    /// `config.json` as published.
    pub fn config_json(&self) -> Value {
        json!({
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": null,
            "decoder_sparse_step": 1,
            "eos_token_id": 0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": 2 * self.hidden,
            "max_position_embeddings": self.max_position,
            "max_window_layers": self.layers,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": true,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "output_router_logits": false,
            "rms_norm_eps": 1e-6,
            "rope_scaling": null,
            "rope_theta": 1e6,
            "router_aux_loss_coef": 0.001,
            "sliding_window": null,
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": self.vocab,
        })
    }

    /// The same, checked.
    ///
    /// # Errors
    /// Sizes that make no model, by their key.
    pub fn config(&self) -> Result<ModelConfig, BenchError> {
        Ok(ModelConfig::parse(&self.config_json().to_string())?)
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Parameters.
    pub parameters: u64,
    /// Files of weights.
    pub shards: usize,
}

/// Writes the model. `config.json` comes last: a folder that is not whole is no model.
///
/// # Errors
/// The sizes make no model, the folder has one already, or the system fails.
pub fn write(args: &ModelArgs) -> Result<Written, BenchError> {
    write_in_shards(args, SHARD_BYTES_MAX)
}

fn write_in_shards(args: &ModelArgs, shard_bytes_max: u64) -> Result<Written, BenchError> {
    let config = args.shape.config()?;
    let tokenizer = tokenizer_folder(args.tokenizer.as_deref())?;
    make_folder(&args.out)?;
    let shards = shards(&config, shard_bytes_max)?;
    let mut weight_map = Map::new();
    let (mut parameters, mut tensor_number) = (0, 0);
    for (number, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        write_shard(&args.out.join(&name), shard, args.shape.seed, &mut tensor_number)?;
        for tensor in shard {
            parameters += tensor.elements();
            weight_map.insert(tensor.name.clone(), Value::from(name.clone()));
        }
    }
    let index = json!({
        "metadata": {"total_parameters": parameters, "total_size": parameters * ELEMENT}, "weight_map": weight_map,
    });
    write_json(&args.out.join("model.safetensors.index.json"), &index)?;
    for file in TOKENIZER_FILES.iter().filter(|file| tokenizer.join(file).is_file()) {
        let to = args.out.join(file);
        std::fs::copy(tokenizer.join(file), &to).map_err(BenchError::file(to))?;
    }
    write_json(
        &args.out.join("generation_config.json"),
        &json!({"_from_model_config": true, "do_sample": false, "eos_token_id": 0, "transformers_version": "4.51.0"}),
    )?;
    write_json(&args.out.join("config.json"), &args.shape.config_json())?;
    Ok(Written { parameters, shards: shards.len() })
}

/// `fixtures/tiny-moe` of the repository that this directory, this program or its source lies in, unless another is named.
fn tokenizer_folder(named: Option<&Path>) -> Result<PathBuf, BenchError> {
    let folders: Vec<PathBuf> = match named {
        Some(folder) => vec![folder.to_owned()],
        None => {
            let here = [std::env::current_dir().ok(), std::env::current_exe().ok()].into_iter().flatten();
            let here = here.chain([PathBuf::from(env!("CARGO_MANIFEST_DIR"))]);
            here.flat_map(|place| place.ancestors().map(|dir| dir.join(TOKENIZER)).collect::<Vec<_>>()).collect()
        }
    };
    folders.into_iter().find(|dir| dir.join(TOKENIZER_FILES[0]).is_file()).ok_or_else(|| {
        let named = named.map_or_else(|| TOKENIZER.to_owned(), |dir| dir.display().to_string());
        BenchError::Other(format!("no tokenizer.json in {named}; name a folder that has one with --tokenizer"))
    })
}

fn make_folder(out: &Path) -> Result<(), BenchError> {
    std::fs::create_dir_all(out).map_err(BenchError::file(out))?;
    for entry in std::fs::read_dir(out).map_err(BenchError::file(out))? {
        let found = entry.map_err(BenchError::file(out))?.file_name().to_string_lossy().into_owned();
        if found == "config.json" || found.ends_with(".safetensors") {
            return Err(BenchError::Occupied { path: out.to_owned(), found });
        }
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<(), BenchError> {
    std::fs::write(path, format!("{value:#}\n")).map_err(BenchError::file(path))
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
}

impl Tensor {
    fn elements(&self) -> u64 {
        self.shape.iter().map(|size| *size as u64).product()
    }
}

/// Every tensor of the model, in files.
fn shards(config: &ModelConfig, bytes_max: u64) -> Result<Vec<Vec<Tensor>>, BenchError> {
    let mut shards: Vec<Vec<Tensor>> = Vec::new();
    let mut filled = u64::MAX;
    schema::for_each_tensor(config, |name, shape, _| {
        let tensor = Tensor { name, shape: shape.to_vec() };
        let bytes = tensor.elements() * ELEMENT;
        if filled.saturating_add(bytes) > bytes_max {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
        Ok::<(), BenchError>(())
    })?;
    Ok(shards)
}

fn write_shard(path: &Path, tensors: &[Tensor], seed: u64, tensor_number: &mut u64) -> Result<(), BenchError> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.elements() * ELEMENT;
        let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut header = Value::from(header).to_string();
    // The data begins at a multiple of 8.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let file = File::create(path).map_err(BenchError::file(path))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let head = file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(header.as_bytes()));
    head.map_err(BenchError::file(path))?;
    for tensor in tensors {
        write_tensor(&mut file, tensor, Random::new(seed, *tensor_number)).map_err(BenchError::file(path))?;
        *tensor_number += 1;
    }
    file.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_data()).map_err(BenchError::file(path))
}

fn write_tensor(file: &mut impl std::io::Write, tensor: &Tensor, mut random: Random) -> std::io::Result<()> {
    let fill = Fill::of(tensor);
    let mut bytes = Vec::with_capacity(CHUNK * ELEMENT as usize);
    let mut left = tensor.elements();
    while left > 0 {
        let count = left.min(CHUNK as u64);
        bytes.clear();
        (0..count).for_each(|_| bytes.extend_from_slice(&bf16(fill.draw(&mut random)).to_le_bytes()));
        file.write_all(&bytes)?;
        left -= count;
    }
    Ok(())
}

/// What a tensor is drawn from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    /// Around 0 with this deviation.
    Normal(f32),
    /// Evenly from 0.6 to 1.4: norms that do something, so that one that is forgotten shows.
    Norm,
}

impl Fill {
    fn of(tensor: &Tensor) -> Self {
        let (name, fan_in) = (tensor.name.as_str(), tensor.shape.last().copied().unwrap_or(1) as f32);
        let any = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
        let gain = match tensor.shape.len() {
            1 => return Fill::Norm,
            _ if name == schema::EMBEDDING => return Fill::Normal(1.0),
            // Of a few likely tokens, the likeliest is rarely a close call.
            _ if name == schema::HEAD => 4.0,
            // Decisive routing: a rounding difference seldom changes an expert.
            _ if any(&["mlp.gate.weight"]) => 3.0,
            _ if any(&["q_proj", "k_proj"]) => 1.3,
            _ if any(&["gate_proj", "up_proj"]) => 1.2,
            // The product of silu and gate has less than unit deviation.
            _ if any(&["down_proj"]) => 2.0,
            _ => 1.0,
        };
        Fill::Normal(gain / fan_in.sqrt())
    }

    fn draw(self, random: &mut Random) -> f32 {
        match self {
            Fill::Normal(deviation) => deviation * random.nearly_normal(),
            Fill::Norm => 0.6 + 0.8 * (random.bits() >> 40) as f32 / (1u64 << 24) as f32,
        }
    }
}

/// Rounded to the nearest, ties to even; what is drawn here is finite.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// SplitMix64, one for each tensor: the same bytes on every machine.
struct Random(u64);

/// The odd constant nearest to 2^64 over the golden ratio.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

impl Random {
    fn new(seed: u64, tensor: u64) -> Self {
        let mut of_seed = Random(seed);
        Random(of_seed.bits() ^ Random(tensor).bits())
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// The sum of four uniforms, of mean 0 and deviation 1: near enough to a normal, and one draw of bits.
    fn nearly_normal(&mut self) -> f32 {
        const PARTS: u32 = 4;
        // Four values evenly from 0 to 65535 have mean 2 * 65535 and variance (65536^2 - 1) / 3.
        const MEAN: f32 = 131_070.0;
        const DEVIATION: f32 = 37_837.23;
        let bits = self.bits();
        let sum: u32 = (0..PARTS).map(|part| (bits >> (16 * part)) as u32 & 0xffff).sum();
        (sum as f32 - MEAN) / DEVIATION
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::{ExpertId, LayerId};
    use mesh_model::{Checkpoint, Tokenizer, to_f32};

    fn tiny(out: &Path, seed: u64) -> ModelArgs {
        let shape = Shape {
            hidden: 64,
            layers: 2,
            experts: 4,
            top_k: 2,
            intermediate: 32,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab: 2048,
            max_position: 128,
            seed,
        };
        ModelArgs { out: out.to_owned(), shape, tokenizer: None }
    }

    #[test]
    fn the_mesh_reads_what_was_written_in_several_files() {
        let dir = tempfile::tempdir().unwrap();
        let written = write_in_shards(&tiny(dir.path(), 0), 300_000).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(written.shards > 1);
        assert_eq!(written.parameters * ELEMENT, checkpoint.trunk_bytes() + checkpoint.expert_bytes() * 2 * 4);
        let down = to_f32(checkpoint.expert(LayerId(1), ExpertId(3)).unwrap().down);
        let deviation = (down.iter().map(|x| x * x).sum::<f32>() / down.len() as f32).sqrt();
        assert!((deviation / (2.0 / 32f32.sqrt()) - 1.0).abs() < 0.1, "{deviation}");
        let norm = to_f32(checkpoint.final_norm().unwrap());
        assert!(norm.iter().all(|x| (0.59..=1.41).contains(x)) && norm.iter().any(|x| *x != norm[0]));
        assert!(Tokenizer::open(dir.path()).is_ok());
    }

    #[test]
    fn the_same_seed_makes_the_same_bytes_and_another_others() {
        let content = |seed| {
            let dir = tempfile::tempdir().unwrap();
            write(&tiny(dir.path(), seed)).unwrap();
            std::fs::read(dir.path().join("model-00001-of-00001.safetensors")).unwrap()
        };
        assert_eq!(content(1), content(1));
        assert_ne!(content(1), content(2));
    }

    #[test]
    fn a_folder_with_a_model_is_left_alone_and_sizes_that_make_none_write_nothing() {
        let dir = tempfile::tempdir().unwrap();
        write(&tiny(dir.path(), 0)).unwrap();
        assert!(matches!(write(&tiny(dir.path(), 1)), Err(BenchError::Occupied { .. })));
        let mut bad = tiny(&dir.path().join("bad"), 0);
        bad.shape.top_k = 5;
        assert!(matches!(write(&bad), Err(BenchError::Model(_))));
        assert!(!bad.out.exists());
    }

    #[test]
    fn draws_have_their_moments_and_rounding_is_to_nearest() {
        let mut random = Random::new(3, 1);
        let drawn: Vec<f64> = (0..100_000).map(|_| f64::from(random.nearly_normal())).collect();
        let mean = drawn.iter().sum::<f64>() / 1e5;
        let deviation = (drawn.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 1e5).sqrt();
        assert!(mean.abs() < 0.02 && (deviation - 1.0).abs() < 0.02, "{mean} {deviation}");
        // 1 + 2^-8 lies between two neighbours and goes to the even one; a little more goes up.
        assert_eq!([1.0, 1.0 + 1.0 / 256.0, 1.0 + 1.1 / 256.0, -1.0].map(bf16), [0x3f80, 0x3f80, 0x3f81, 0xbf80]);
    }
}
