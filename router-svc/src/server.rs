//! Runs a router: all its services on one listener, until told to stop.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::limits::MESSAGE_BYTES_MAX;
use mesh_proto::v1::control_server::ControlServer;
use mesh_proto::v1::mesh_server::MeshServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::config::{RouterConfig, RouterError};
use crate::control::ControlService;
use crate::front::FrontDoor;
use crate::plane::Plane;

/// How long a connection may be silent before it is asked for a sign of life, and how long that may take.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Calls of one connection beside its requests: sessions, status, health, reflection.
const STREAMS_BESIDE: usize = 64;
/// The health service's names: of the server as a whole, and of what clients call.
const HEALTH_NAMES: [&str; 2] = ["", "expertmesh.v1.Mesh"];

/// Runs a router on `listener` until `shutdown` completes; then dismisses the nodes, ends the streams with a typed
/// error, and waits at most `drain_max` for clients to take note.
///
/// # Errors
/// [`RouterError`], for a configuration that cannot be run at once.
pub async fn serve(
    config: RouterConfig,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RouterError> {
    config.validate()?;
    let plane = Arc::new(Plane::new(&config)?);
    let stopping = CancellationToken::new();
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(mesh_proto::v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let front = FrontDoor::new(Arc::clone(&plane), &config, stopping.clone());
    let front = MeshServer::new(front)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let control = ControlService::new(Arc::clone(&plane), config.hello_max);
    let control = ControlServer::new(control)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    // Admission decides what is too much, with a typed answer, before HTTP/2 does by silence.
    let streams_max = (2 * config.requests_max + STREAMS_BESIDE) as u32;
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(streams_max)
        // Many clients behind one connection may cancel at once: that is no attack.
        .http2_max_pending_accept_reset_streams(Some(streams_max as usize))
        .add_service(front)
        .add_service(control)
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            stopping.clone().cancelled_owned(),
        );
    let stop = async {
        shutdown.await;
        tracing::info!("router stopping");
        plane.close("the router is stopping");
        stopping.cancel();
        tokio::time::sleep(config.drain_max).await;
    };
    tokio::select! {
        served = server => served?,
        () = stop => tracing::warn!(waited = ?config.drain_max, "calls are still open and are cut off"),
        () = plane.keep_time() => {}
        () = report(reporter, plane.serving()) => {}
    }
    Ok(())
}

/// Tells the health service whether requests are taken, as long as it is polled.
async fn report(reporter: HealthReporter, mut serving: watch::Receiver<bool>) {
    loop {
        let status = match *serving.borrow_and_update() {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        for name in HEALTH_NAMES {
            reporter.set_service_status(name, status).await;
        }
        if serving.changed().await.is_err() {
            // The plane is gone, and with it the router.
            return std::future::pending().await;
        }
    }
}
