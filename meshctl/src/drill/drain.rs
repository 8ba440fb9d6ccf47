//! Draining a node, as `meshctl drain NODE` does: the one place that drills ask for it.

use super::error::DrillError;
use super::step::Step;
use crate::exit::CliError;

/// Refuses phases that nothing can carry out, before anything is started.
///
/// # Errors
/// [`DrillError::NoDrain`].
pub fn check(steps: &[&Step]) -> Result<(), DrillError> {
    let drains = steps.iter().any(|step| matches!(step, Step::Drain { .. }));
    if drains { Err(DrillError::NoDrain) } else { Ok(()) }
}

/// Has `_node` give up its part in the mesh at `_grpc` and leave.
///
/// # Errors
/// [`DrillError::NoDrain`]: the router knows no such call.
pub async fn drain(_grpc: &str, _node: &str) -> Result<(), CliError> {
    Err(DrillError::NoDrain.into())
}
