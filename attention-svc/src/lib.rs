//! Attention nodes: scheduler, KV cache, layer loop, exchange, sampling.
//!
//! A node owns its requests: their tokens, their KV pages, their text. One thread, the engine, computes step after step
//! over all that run; an asynchronous part beside it speaks gRPC with the router.
//!
//! # Layout
//! - [`scheduler`]: which rows the next step computes, pure; the place to start reading
//! - [`kv_blocks`]: the pages of the KV cache
//! - [`engine`]: the thread that owns the model and every request
//! - [`runner`]: the model's way through one step: trunk, layer loop, exchange with the expert nodes
//! - [`sampling`]: logits to tokens and log-probabilities, pure
//! - [`output`]: tokens to text, and stop strings
//! - [`request`]: a client's request, checked
//! - [`service`]: the gRPC face
//! - [`views`]: prepare, commit, abandon; heartbeats
//! - [`load`]: the trunk's weights, the cache's size
//! - [`node`]: the assembly: open, register, serve
//! - [`config`]: what a node is started with; [`error`]: why it cannot be

#![forbid(unsafe_code)]

pub mod config;
pub mod engine;
pub mod error;
#[cfg(test)]
mod fake;
pub mod kv_blocks;
pub mod load;
pub mod node;
pub mod output;
pub mod request;
pub mod runner;
pub mod sampling;
pub mod scheduler;
pub mod service;
pub mod views;

pub use config::{AttentionConfig, KvBudget};
pub use error::AttentionError;
pub use node::{AttentionNode, run};
