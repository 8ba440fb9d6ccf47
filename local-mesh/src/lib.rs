//! Every role of a mesh assembled in one process: the same services, each on a thread and a runtime of its own, as
//! separate as processes are except for their memory.
//!
//! # Layout
//! - [`config`]: how many nodes, and what each is started with
//! - [`mesh`]: start in order, wait until it serves, stop in order
//! - `thread`: one node's thread, from its start to its end
//! - [`error`]: why a mesh does not come to serve

#![forbid(unsafe_code)]

pub mod config;
pub mod error;
pub mod mesh;
mod thread;

pub use config::LocalMeshConfig;
pub use error::{LocalMeshError, NodeError};
pub use mesh::{LocalMesh, NodeEnd, NodeInfo};
