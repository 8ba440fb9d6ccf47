//! The gRPC connection to a mesh, and its errors in words.

use std::time::Duration;

use mesh_proto::MeshError;
use mesh_proto::limits::MESSAGE_BYTES_MAX;
use mesh_proto::v1::mesh_client::MeshClient;
use mesh_proto::v1::{StatusRequest, StatusResponse};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::exit::CliError;

/// How long a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long a status, or a word about health, may take.
const STATUS_MAX: Duration = Duration::from_secs(10);
/// How often a silent peer is asked whether it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A connection to a mesh's front door.
#[derive(Clone, Debug)]
pub struct Client {
    inner: MeshClient<Channel>,
    health: HealthClient<Channel>,
}

impl Client {
    /// Connects to `addr`: `host:port`, with or without `http://`.
    ///
    /// # Errors
    /// [`CliError::BadAddress`] and [`CliError::NoMesh`].
    pub async fn connect(addr: &str) -> Result<Self, CliError> {
        let uri = if addr.contains("://") { addr.to_owned() } else { format!("http://{addr}") };
        let bad = |e: tonic::transport::Error| CliError::BadAddress { addr: addr.to_owned(), why: causes(&e) };
        let endpoint = Endpoint::from_shared(uri).map_err(bad)?;
        let endpoint = endpoint.connect_timeout(CONNECT_MAX).http2_keep_alive_interval(KEEP_ALIVE);
        let channel = endpoint.connect().await;
        let channel = channel.map_err(|e| CliError::NoMesh { addr: addr.to_owned(), why: causes(&e) })?;
        let health = HealthClient::new(channel.clone());
        let inner = MeshClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Self { inner, health })
    }

    /// The generated client.
    pub fn mesh(&mut self) -> &mut MeshClient<Channel> {
        &mut self.inner
    }

    /// Whether requests are taken, as the standard health service says.
    ///
    /// # Errors
    /// [`CliError::Mesh`].
    pub async fn serving(&mut self) -> Result<bool, CliError> {
        // The empty name is the server as a whole.
        let mut request = tonic::Request::new(HealthCheckRequest { service: String::new() });
        request.set_timeout(STATUS_MAX);
        let response = self.health.check(request).await.map_err(failed)?;
        Ok(response.into_inner().status() == ServingStatus::Serving)
    }

    /// Nodes, view, placement and load.
    ///
    /// # Errors
    /// [`CliError::Mesh`].
    pub async fn status(&mut self) -> Result<StatusResponse, CliError> {
        let mut request = tonic::Request::new(StatusRequest {});
        request.set_timeout(STATUS_MAX);
        let response = self.inner.status(request).await.map_err(failed)?;
        Ok(response.into_inner())
    }
}

/// A status as the typed error that it carries.
pub fn failed(status: tonic::Status) -> CliError {
    CliError::Mesh(MeshError::from_status(&status))
}

/// An error and what caused it; tonic's own words end at "transport error".
fn causes(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words.push_str(": ");
        words.push_str(&error.to_string());
        cause = error.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    #[tokio::test]
    async fn nobody_there_and_no_address_are_told_apart() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let nobody = Client::connect(&free.to_string()).await.unwrap_err();
        assert_eq!(nobody.exit(), Exit::Unavailable, "{nobody}");
        assert!(nobody.to_string().contains(&free.to_string()), "{nobody}");
        let nonsense = Client::connect("http://a b").await.unwrap_err();
        assert_eq!(nonsense.exit(), Exit::Usage, "{nonsense}");
    }
}
