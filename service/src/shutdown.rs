//! SIGINT and SIGTERM: the first asks for a stop in good order, the second stops at once.

use tokio::signal::unix::{Signal, SignalKind, signal as watch};
use tokio_util::sync::CancellationToken;

use crate::ServiceError;

/// What a process exits with when a second signal cuts its orderly stop short, as a shell reports SIGINT.
const INTERRUPTED: i32 = 130;

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self, ServiceError> {
        let interrupt = watch(SignalKind::interrupt()).map_err(ServiceError::Signals)?;
        let terminate = watch(SignalKind::terminate()).map_err(ServiceError::Signals)?;
        Ok(Self { interrupt, terminate })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

/// A token that is cancelled at the first SIGINT or SIGTERM; a second one ends the process at once.
///
/// Must be called within a tokio runtime; signals are watched from the call on, as long as the runtime lives.
///
/// # Errors
/// [`ServiceError::Signals`] when the system does not let signals be watched.
pub fn on_signals() -> Result<CancellationToken, ServiceError> {
    let token = CancellationToken::new();
    let cancelled = token.clone();
    let mut signals = Signals::new()?;
    tokio::spawn(async move {
        let name = signals.next().await;
        tracing::info!(signal = name, "stopping; a second signal stops at once");
        cancelled.cancel();
        let name = signals.next().await;
        tracing::warn!(signal = name, "stopped by a second signal");
        std::process::exit(INTERRUPTED);
    });
    Ok(token)
}

/// Completes at SIGINT or SIGTERM, with its name.
///
/// # Errors
/// [`ServiceError::Signals`] when the system does not let signals be watched.
pub async fn signal() -> Result<&'static str, ServiceError> {
    Ok(Signals::new()?.next().await)
}
