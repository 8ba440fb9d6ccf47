//! The mesh from outside: a harness that starts real processes and cases by behaviour.
//!
//! # Layout
//! - [`mesh`]: `Mesh::builder()...start()`: a mesh as `meshctl up` starts it, and its end
//! - [`generation`]: requests and their collected answers
//! - [`fixture`]: checkpoints with what the reference computed for them
//! - [`checkpoint`]: copies of checkpoints with one thing wrong
//! - [`patience`]: how long anything may take, and waiting until something holds

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod fixture;
pub mod generation;
pub mod mesh;
pub mod patience;

pub use generation::{Generation, ids_request};
pub use mesh::{Dtype, Mesh, MeshBuilder, Transport};
