//! The model's way through one step: trunk weights, the layer loop, and the exchange with the expert nodes.

use std::sync::Arc;

use mesh_core::routing::Routing;
use mesh_core::{LayerId, ViewId};

/// A token to be computed in a step.
#[derive(Clone, Copy, Debug)]
pub struct StepRow {
    /// Index into [`Step::sequences`].
    pub sequence: u32,
    /// The token's id, below the vocabulary's size.
    pub token: u32,
    /// Its position in its sequence. A sequence's rows of one step are consecutive positions, ascending, and all earlier
    /// positions were computed in earlier steps or stand before it in this one.
    pub position: u32,
    /// Whether its logits are wanted.
    pub logits: bool,
}

/// One step of the batch: any mix of prefill chunks and decode rows.
#[derive(Debug, Default)]
pub struct Step<'a> {
    /// Each sequence's KV pages, covering at least every position that the step writes.
    pub sequences: Vec<&'a [u32]>,
    /// Rows; those of one sequence are neighbours.
    pub rows: Vec<StepRow>,
    /// Whether the routing of all rows is wanted.
    pub routing: bool,
}

/// What a step computed.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// `[wanted rows][vocab]`, in row order.
    pub logits: Vec<f32>,
    /// When asked for: each MoE layer's routing of all rows, by layer.
    pub routing: Vec<(LayerId, Routing)>,
}
