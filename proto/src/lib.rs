//! The gRPC contracts and their conversion to and from core types.
//!
//! The code under `src/gen/` is generated from `proto/` by `proto/codegen` and checked in: building needs no protoc.
//!
//! # Layout
//! - [`v1`]: messages, clients and servers, generated
//! - [`convert`]: [`mesh_core`] types from and to the wire, with everything that arrives checked
//! - [`error`]: the mesh's closed set of error codes and the one mapping to and from a gRPC status
//! - [`limits`]: bounds on what travels

#![forbid(unsafe_code)]

pub mod convert;
pub mod error;
pub mod limits;

pub use convert::ProtoError;
pub use error::{Code, MeshError};

/// Package `expertmesh.v1`: messages, clients and servers.
#[allow(missing_docs, rustdoc::all, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod v1 {
    include!("gen/expertmesh.v1.rs");

    /// The package's descriptors, encoded: what the reflection service shows.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/descriptor.bin");
}
