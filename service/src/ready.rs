//! The one line on stdout by which a program says that it is up.

use std::io::Write;

/// Prints the line and flushes it. Whoever started the program and closed its stdout does not want to know.
pub fn print(line: &str) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
        tracing::debug!(%error, "nobody reads the ready line");
    }
}
