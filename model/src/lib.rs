//! Hugging Face checkpoints as typed shards: config, safetensors, tokenizer.
//!
//! A node opens the whole directory, which costs a read of the headers, and touches only the pages of the tensors that
//! its roles and experts need.
//!
//! # Layout
//! - [`config`]: `config.json` of Mixtral, Qwen3-MoE and OLMoE, published or written by transformers 5
//! - [`rope`]: rotary frequencies and their scaling
//! - [`header`]: the head of a safetensors file, bounded and checked
//! - [`schema`]: which tensors a config calls for, and their shapes
//! - [`checkpoint`]: the opened directory: every tensor by its role
//! - [`tensor`]: views of mapped tensors
//! - [`tokenizer`] and [`decode`]: text to ids, and ids back to text piece by piece
//! - [`error`]: the one error of this crate
//!
//! Private: `mapping` (the only unsafe code), `files` (bounded reads, shards and their index), `digest`.

#![deny(unsafe_code)]

pub mod checkpoint;
pub mod config;
pub mod decode;
mod digest;
pub mod error;
mod files;
pub mod header;
mod mapping;
pub mod rope;
pub mod schema;
pub mod tensor;
pub mod tokenizer;

pub use checkpoint::{AttentionTensors, Checkpoint, FfnTensors};
pub use config::{Family, LayerKind, ModelConfig, MoeConfig, QkNorm};
pub use decode::TextDecoder;
pub use error::ModelError;
pub use rope::{RopeConfig, RopeScaling};
pub use tensor::{TensorView, WeightDtype, to_f32};
pub use tokenizer::Tokenizer;
