//! SIGINT, SIGTERM and SIGHUP as something to wait for.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::CliError;

/// The signals that end a command. From its making on, none of them ends the process by itself.
#[derive(Debug)]
pub struct StopSignals([Signal; 3]);

impl StopSignals {
    /// Starts to watch.
    ///
    /// # Errors
    /// [`CliError::Os`] when the machine denies it.
    pub fn watch() -> Result<Self, CliError> {
        let watch = |kind| signal(kind).map_err(|source| CliError::Os { what: "watching for signals", source });
        Ok(Self([
            watch(SignalKind::interrupt())?,
            watch(SignalKind::terminate())?,
            // The terminal was closed.
            watch(SignalKind::hangup())?,
        ]))
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => (),
            _ = terminate.recv() => (),
            _ = hangup.recv() => (),
        }
    }

    /// Runs `work` unless a signal comes first.
    ///
    /// # Errors
    /// [`CliError::Interrupted`], and what `work` fails with.
    pub async fn unless<T>(&mut self, work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
        tokio::select! {
            done = work => done,
            () = self.next() => Err(CliError::Interrupted),
        }
    }
}
