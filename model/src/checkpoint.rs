//! The opened model directory: every tensor by its role, checked against the config before anything is computed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use mesh_core::{ExpertId, LayerId};

use crate::config::{LayerKind, ModelConfig, QkNorm};
use crate::digest;
use crate::error::ModelError;
use crate::files::open_shards;
use crate::header::Entry;
use crate::mapping::Mapping;
use crate::schema::{self, Owner};
use crate::tensor::{TensorView, WeightDtype};

/// Names that an error about extra tensors lists.
const EXTRA_LISTED: usize = 4;

/// Where a tensor lies: which file, and its place there.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    file: usize,
    pub(crate) dtype: WeightDtype,
    pub(crate) shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// Weights of one layer's attention. Matrices are `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionTensors<'a> {
    /// The norm before.
    pub input_norm: TensorView<'a>,
    /// Query projection.
    pub q: TensorView<'a>,
    /// Key projection.
    pub k: TensorView<'a>,
    /// Value projection.
    pub v: TensorView<'a>,
    /// Output projection.
    pub o: TensorView<'a>,
    /// Bias of the query projection.
    pub q_bias: Option<TensorView<'a>>,
    /// Bias of the key projection.
    pub k_bias: Option<TensorView<'a>>,
    /// Bias of the value projection.
    pub v_bias: Option<TensorView<'a>>,
    /// Bias of the output projection.
    pub o_bias: Option<TensorView<'a>>,
    /// Norm of the queries; its width follows the config's [`QkNorm`].
    pub q_norm: Option<TensorView<'a>>,
    /// Norm of the keys.
    pub k_norm: Option<TensorView<'a>>,
}

/// Weights of a feed-forward block: `down(silu(gate(x)) * up(x))`.
#[derive(Clone, Copy, Debug)]
pub struct FfnTensors<'a> {
    /// `[intermediate, hidden]`.
    pub gate: TensorView<'a>,
    /// `[intermediate, hidden]`.
    pub up: TensorView<'a>,
    /// `[hidden, intermediate]`.
    pub down: TensorView<'a>,
}

/// A model directory, mapped and checked.
///
/// Opening reads the config and the heads of the weight files, and no weights: a node's memory holds only the tensors
/// that it asks for. The files must not be truncated or rewritten in place while the checkpoint is open (a read would
/// end the process with SIGBUS); replacing them by rename is safe.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    files: Vec<Mapping>,
    tensors: HashMap<String, Stored>,
    expert_bytes: u64,
    trunk_bytes: u64,
    digest: OnceLock<[u8; 32]>,
}

impl Checkpoint {
    /// Opens a directory and checks all of its tensors against its config: each there, of the right shape and a type
    /// that is read, whole within its file, and none besides.
    ///
    /// # Errors
    /// [`ModelError`] naming the file, the key or the tensor.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ModelError> {
        let dir = dir.as_ref().to_path_buf();
        let config = ModelConfig::from_dir(&dir)?;
        let mut files = Vec::new();
        let mut found: HashMap<String, (usize, Entry)> = HashMap::new();
        for shard in open_shards(&dir)? {
            let file = files.len();
            found.extend(shard.header.into_tensors().map(|(name, entry)| (name, (file, entry))));
            files.push(shard.mapping);
        }
        let mut tensors = HashMap::with_capacity(found.len());
        let (mut expert_bytes, mut trunk_bytes) = (HashMap::new(), 0);
        schema::for_each_tensor(&config, |name, shape, owner| {
            let Some((file, entry)) = found.remove(&name) else {
                return Err(ModelError::MissingTensor { tensor: name, expected: shape.to_vec() });
            };
            let stored = claim(&files, file, &name, entry, shape)?;
            let bytes = (stored.end - stored.start) as u64;
            match owner {
                Owner::Trunk => trunk_bytes += bytes,
                Owner::Expert(layer, expert) => *expert_bytes.entry((layer, expert)).or_insert(0) += bytes,
            }
            tensors.insert(name, stored);
            Ok(())
        })?;
        refuse_extra(&files, &found)?;
        let expert_bytes = expert_bytes.into_values().max().unwrap_or(0);
        Ok(Self { dir, config, files, tensors, expert_bytes, trunk_bytes, digest: OnceLock::new() })
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The directory that was opened.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory's own name: what the model is called towards clients.
    pub fn name(&self) -> String {
        // "." and ".." have no name of their own, and neither does a path ending in them.
        let named = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        named.file_name().map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
    }

    /// Bytes of one routed expert in its file (of the largest, should they be stored in different types).
    pub fn expert_bytes(&self) -> u64 {
        self.expert_bytes
    }

    /// Bytes of all that is no routed expert: what every attention node holds.
    pub fn trunk_bytes(&self) -> u64 {
        self.trunk_bytes
    }

    /// A fingerprint by which two nodes know that they serve the same model.
    ///
    /// SHA-256 over the parsed config, over every tensor's name, type and shape in order, and over each file's length
    /// and 64 evenly spaced blocks of 4 KiB (the whole file where it is no longer than that). It reads 256 KiB a file,
    /// so a fine-tune of the same shapes differs with near certainty, while an edit of a few bytes may go unseen: it
    /// guards against mistakes, not against malice. Computed once.
    pub fn digest(&self) -> [u8; 32] {
        *self.digest.get_or_init(|| digest::digest(&self.config, &self.tensors, &self.files))
    }

    /// A name for what the files hold, for caches of what was made of it: [`Checkpoint::digest`] and the time at which
    /// each file was last written, so that an edit which the digest may not see has another name too. 32 hexadecimal
    /// digits.
    pub fn content(&self) -> String {
        digest::content(&self.digest(), &self.files)
    }

    /// A tensor by its name in the file.
    ///
    /// # Errors
    /// [`ModelError::NoSuchTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        let (name, stored) =
            self.tensors.get_key_value(name).ok_or_else(|| ModelError::NoSuchTensor { tensor: name.to_owned() })?;
        let bytes = &self.files[stored.file].bytes()[stored.start..stored.end];
        Ok(TensorView { name, dtype: stored.dtype, shape: &stored.shape, bytes })
    }

    /// Asks the system to read a tensor ahead. Returns at once.
    pub fn prefetch(&self, tensor: TensorView<'_>) {
        if let Some(stored) = self.tensors.get(tensor.name) {
            self.files[stored.file].prefetch(stored.start, stored.end - stored.start);
        }
    }

    /// Gives a tensor's pages back to the system, after it was copied or packed. Reading it again is allowed, and reads
    /// the file again.
    pub fn release(&self, tensor: TensorView<'_>) {
        if let Some(stored) = self.tensors.get(tensor.name) {
            self.files[stored.file].release(stored.start, stored.end - stored.start);
        }
    }

    /// The token embedding, `[vocab, hidden]`.
    ///
    /// # Errors
    /// None for an opened checkpoint; the same holds for [`Checkpoint::final_norm`] and [`Checkpoint::head`].
    pub fn embedding(&self) -> Result<TensorView<'_>, ModelError> {
        self.tensor(schema::EMBEDDING)
    }

    /// The norm before the head, `[hidden]`.
    ///
    /// # Errors
    /// None for an opened checkpoint.
    pub fn final_norm(&self) -> Result<TensorView<'_>, ModelError> {
        self.tensor(schema::FINAL_NORM)
    }

    /// The output head, `[vocab, hidden]`: the embedding where they are tied.
    ///
    /// # Errors
    /// None for an opened checkpoint.
    pub fn head(&self) -> Result<TensorView<'_>, ModelError> {
        self.tensor(if self.config.tied_embeddings { schema::EMBEDDING } else { schema::HEAD })
    }

    /// A layer's attention.
    ///
    /// # Errors
    /// [`ModelError::NoSuchLayer`].
    pub fn attention(&self, layer: LayerId) -> Result<AttentionTensors<'_>, ModelError> {
        self.require_layer(layer, None)?;
        let tensor = |rest: &str| self.tensor(&schema::attention(layer, rest));
        let bias = |rest: &str| self.config.attention_bias.then(|| tensor(rest)).transpose();
        let norm = |rest: &str| (self.config.qk_norm != QkNorm::None).then(|| tensor(rest)).transpose();
        Ok(AttentionTensors {
            input_norm: self.tensor(&schema::input_norm(layer))?,
            q: tensor("q_proj.weight")?,
            k: tensor("k_proj.weight")?,
            v: tensor("v_proj.weight")?,
            o: tensor("o_proj.weight")?,
            q_bias: bias("q_proj.bias")?,
            k_bias: bias("k_proj.bias")?,
            v_bias: bias("v_proj.bias")?,
            o_bias: bias("o_proj.bias")?,
            q_norm: norm("q_norm.weight")?,
            k_norm: norm("k_norm.weight")?,
        })
    }

    /// The norm after a layer's attention, `[hidden]`.
    ///
    /// # Errors
    /// [`ModelError::NoSuchLayer`].
    pub fn post_norm(&self, layer: LayerId) -> Result<TensorView<'_>, ModelError> {
        self.require_layer(layer, None)?;
        self.tensor(&schema::post_norm(layer))
    }

    /// The gate of a layer with routed experts, `[experts, hidden]`.
    ///
    /// # Errors
    /// [`ModelError::NoSuchLayer`].
    pub fn gate(&self, layer: LayerId) -> Result<TensorView<'_>, ModelError> {
        self.require_layer(layer, Some(LayerKind::Moe))?;
        self.tensor(&schema::gate(self.config.family, layer))
    }

    /// The block of a dense layer.
    ///
    /// # Errors
    /// [`ModelError::NoSuchLayer`].
    pub fn dense(&self, layer: LayerId) -> Result<FfnTensors<'_>, ModelError> {
        self.require_layer(layer, Some(LayerKind::Dense))?;
        self.ffn(schema::dense(layer))
    }

    /// A routed expert.
    ///
    /// # Errors
    /// [`ModelError::NoSuchLayer`], [`ModelError::NoSuchExpert`].
    pub fn expert(&self, layer: LayerId, expert: ExpertId) -> Result<FfnTensors<'_>, ModelError> {
        self.require_layer(layer, Some(LayerKind::Moe))?;
        let experts = self.config.moe.experts;
        if expert.index() >= experts {
            return Err(ModelError::NoSuchExpert { layer, expert, experts });
        }
        self.ffn(schema::expert(self.config.family, layer, expert))
    }

    fn ffn(&self, [gate, up, down]: [String; 3]) -> Result<FfnTensors<'_>, ModelError> {
        Ok(FfnTensors { gate: self.tensor(&gate)?, up: self.tensor(&up)?, down: self.tensor(&down)? })
    }

    fn require_layer(&self, layer: LayerId, kind: Option<LayerKind>) -> Result<(), ModelError> {
        let found = self.config.layers.get(layer.index());
        let expected = match kind {
            None => "transformer",
            Some(LayerKind::Moe) => "mixture-of-experts",
            Some(LayerKind::Dense) => "dense",
        };
        match found {
            Some(found) if kind.is_none_or(|kind| kind == *found) => Ok(()),
            _ => Err(ModelError::NoSuchLayer { layer, expected }),
        }
    }
}

/// Takes a tensor for the place that the config has for it.
fn claim(files: &[Mapping], file: usize, name: &str, entry: Entry, shape: &[usize]) -> Result<Stored, ModelError> {
    let path = || files[file].file().to_path_buf();
    let Some(dtype) = WeightDtype::from_name(&entry.dtype) else {
        return Err(ModelError::WrongDtype { file: path(), tensor: name.to_owned(), found: entry.dtype });
    };
    if entry.shape != shape {
        let (tensor, expected) = (name.to_owned(), shape.to_vec());
        return Err(ModelError::WrongShape { file: path(), tensor, expected, found: entry.shape });
    }
    Ok(Stored { file, dtype, shape: entry.shape, start: entry.start, end: entry.end })
}

fn refuse_extra(files: &[Mapping], unclaimed: &HashMap<String, (usize, Entry)>) -> Result<(), ModelError> {
    let mut extra: Vec<(&String, usize)> = unclaimed
        .iter()
        .filter(|(name, _)| !schema::is_harmless(name))
        .map(|(name, (file, _))| (name, *file))
        .collect();
    if extra.is_empty() {
        return Ok(());
    }
    extra.sort_unstable();
    let file = |file: usize| files[file].file().file_name().unwrap_or_default().to_string_lossy();
    let first = extra.iter().take(EXTRA_LISTED).map(|(name, at)| format!("{name} of {}", file(*at))).collect();
    Err(ModelError::ExtraTensors { count: extra.len(), first })
}
