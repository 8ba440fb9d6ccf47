//! What every daemon shares, so that a service only assembles.
//!
//! # Layout
//! - [`config`]: flag over environment over file, and exit code 64 for what cannot be run
//! - [`telemetry`]: logs to stderr
//! - [`shutdown`]: SIGINT and SIGTERM, once in good order, twice at once
//! - [`ready`]: the line that says that a program is up
//! - [`profile`]: where an engine's time goes
//! - [`advertise`]: under which address others reach a node
//! - [`membership`]: a node's side of the control plane: registration, lease, views

#![forbid(unsafe_code)]

pub mod advertise;
pub mod config;
mod error;
pub mod membership;
pub mod profile;
pub mod ready;
pub mod shutdown;
pub mod telemetry;

pub use error::ServiceError;

/// A boxed future, for traits that must be objects.
pub type BoxFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;
