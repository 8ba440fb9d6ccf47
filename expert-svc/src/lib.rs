//! Expert nodes: rows in, rows out, and no state of any request.
//!
//! One thread, the engine, owns the data plane: it gathers whatever frames are ready from any attention node, groups
//! their rows by expert, runs one grouped FFN straight from the received bodies into the answers' bodies, and answers
//! each frame with its mirror. Beside it a small asynchronous part keeps the lease and loads what views assign.
//!
//! # Layout
//! - [`engine`]: the loop, its queues and its checks; the place to start reading
//! - [`table`]: what a view assigns to this node, packed and ready, shared with the engine
//! - [`load`]: from the checkpoint to packed experts
//! - [`views`]: prepare, commit, abandon
//! - [`counters`]: what the node has done, for its heartbeats
//! - [`node`]: the assembly: open, bind, register, serve
//! - [`config`]: what a node is started with; [`error`]: why it cannot be

#![forbid(unsafe_code)]

pub mod config;
pub mod counters;
pub mod engine;
pub mod error;
pub mod load;
pub mod node;
pub mod table;
pub mod views;

pub use config::{EngineLimits, ExpertConfig};
pub use error::ExpertError;
pub use node::{ExpertNode, run};
