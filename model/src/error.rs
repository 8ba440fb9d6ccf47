//! The one error of this crate; every variant names the file, key or tensor and what was expected and found.

use std::path::PathBuf;

use mesh_core::{ExpertId, LayerId};

use crate::config::Family;

/// Why a model directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be opened, read or mapped.
    #[error("cannot read {}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is larger than anything of its kind.
    #[error("{} has {found} bytes, at most {limit} are read", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its length.
        found: u64,
        /// The bound.
        limit: u64,
    },
    /// A file is not the JSON that it should be.
    #[error("{} is not valid: {reason}", file.display())]
    BadJson {
        /// The file.
        file: PathBuf,
        /// What the parser said, with line and column.
        reason: String,
    },
    /// The architecture is none of the supported ones.
    #[error("architecture {found:?} is not supported; supported are {}", Family::SUPPORTED)]
    UnknownArchitecture {
        /// What the config names.
        found: String,
    },
    /// A key that nothing else could replace is absent.
    #[error("config key {key:?} is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A key's value has the wrong type, or is outside of what makes sense.
    #[error("config key {key:?} is {found}, expected {expected}")]
    BadKey {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// The config asks for something that this version does not compute.
    #[error("config key {key:?} is {found}, which is not supported: {remedy}")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What to do instead.
        remedy: String,
    },
    /// Two keys of the config exclude each other.
    #[error("config keys {first:?} and {second:?} contradict each other: {reason}")]
    Contradiction {
        /// One key.
        first: String,
        /// The other.
        second: String,
        /// How they disagree.
        reason: String,
    },
    /// The directory holds no weights in a form that is read.
    #[error(
        "{} holds neither model.safetensors nor model.safetensors.index.json; convert the weights to safetensors",
        dir.display()
    )]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// The index and the shards disagree.
    #[error("{} is contradicted by the shards: {reason}", index.display())]
    IndexContradiction {
        /// The index file.
        index: PathBuf,
        /// How.
        reason: String,
    },
    /// A shard that the index names does not exist.
    #[error("{} is missing, though the index names it (for {tensor}); download it again", file.display())]
    MissingShard {
        /// The shard.
        file: PathBuf,
        /// The first tensor that it should hold.
        tensor: String,
    },
    /// The head of a safetensors file makes no sense.
    #[error("{} is not a safetensors file: {reason}", file.display())]
    BadHeader {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file ends before its last tensor does.
    #[error("{} is truncated: {what} ends at byte {expected}, the file has {found}; download it again", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// The tensor that is cut off, or the header.
        what: String,
        /// Where it ends by the header.
        expected: u64,
        /// The file's length.
        found: u64,
    },
    /// The config calls for a tensor that no file holds.
    #[error("tensor {tensor} is missing; the config calls for it with shape {expected:?}")]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The shape that it should have.
        expected: Vec<usize>,
    },
    /// A tensor's shape contradicts the config.
    #[error("tensor {tensor} of {} has shape {found:?}, the config calls for {expected:?}", file.display())]
    WrongShape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// By the config.
        expected: Vec<usize>,
        /// In the file.
        found: Vec<usize>,
    },
    /// A tensor is stored in a type that is not read.
    #[error(
        "tensor {tensor} of {} is {found}, supported are BF16 and F32; convert the checkpoint to bf16",
        file.display()
    )]
    WrongDtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type's name in the file.
        found: String,
    },
    /// Tensors that the config does not call for: likely another model's, and never ignored in silence.
    #[error("{count} tensors that the config does not call for, the first: {}", first.join(", "))]
    ExtraTensors {
        /// How many.
        count: usize,
        /// The first few by name, with their file.
        first: Vec<String>,
    },
    /// A tensor was asked for that this model has not.
    #[error("the model has no tensor {tensor}")]
    NoSuchTensor {
        /// The name.
        tensor: String,
    },
    /// A layer was asked for that this model has not, or not of that kind.
    #[error("{layer} is not one of the model's {expected} layers")]
    NoSuchLayer {
        /// The layer.
        layer: LayerId,
        /// `transformer`, `mixture-of-experts` or `dense`.
        expected: &'static str,
    },
    /// An expert was asked for that this model has not.
    #[error("{expert} of {layer} does not exist; a layer has {experts} experts")]
    NoSuchExpert {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// Experts per layer.
        experts: usize,
    },
    /// The tokenizer cannot be loaded, or refuses a text.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What it said.
        reason: String,
    },
}
