//! Bounds on what travels by gRPC, named once for both ends.

/// Largest message that either end decodes or encodes. tonic's own default of 4 MiB does not take the raw logits of a
/// large vocabulary for a run of tokens.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// MoE layers of a view.
pub const LAYERS_MAX: usize = 1024;

/// Routed experts of one layer.
pub const EXPERTS_PER_LAYER_MAX: usize = 4096;

/// Attention nodes, or expert nodes, of one mesh; slots are below it.
pub const SLOTS_MAX: usize = 1024;

/// Holders of one expert.
pub const REPLICAS_MAX: usize = 64;

/// Longest address of a node, bytes.
pub const ADDR_BYTES_MAX: usize = 4096;
