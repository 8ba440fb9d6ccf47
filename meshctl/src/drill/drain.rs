//! Draining a node, as `meshctl drain NODE` does.

use std::time::Duration;

use mesh_proto::v1::DrainRequest;

use crate::client::{Client, failed};
use crate::exit::CliError;

/// How long a node may take to be handed over.
const DRAIN_MAX: Duration = Duration::from_secs(120);

/// Has a node give up its part in the mesh at `grpc` and leave.
///
/// # Errors
/// [`CliError`]: the router's, or that it cannot be reached.
pub async fn drain(grpc: &str, node: &str) -> Result<(), CliError> {
    let mut client = Client::connect(grpc).await?;
    let mut request = tonic::Request::new(DrainRequest { node: node.to_owned() });
    request.set_timeout(DRAIN_MAX);
    client.mesh().drain(request).await.map_err(failed)?;
    Ok(())
}
