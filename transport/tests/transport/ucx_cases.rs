//! What the UCX transport promises beyond the others; and whether its cases can run here at all, said aloud.

use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_transport::TransportKind;
use mesh_transport::ucx::{self, UcxInfo, UcxOptions};

static CASES: AtomicUsize = AtomicUsize::new(0);

/// The UCX that the cases run over, opened once: out of `MESH_UCX_LIB_DIR` if that is set.
fn found() -> &'static Result<UcxInfo, String> {
    static FOUND: OnceLock<Result<UcxInfo, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let library_dir = std::env::var_os("MESH_UCX_LIB_DIR").map(PathBuf::from);
        ucx::probe(&UcxOptions { library_dir, tls: None }).map_err(|error| error.to_string())
    })
}

/// The UCX transport for one more case, or none after a line that says why. Past the test harness, which would keep the line
/// of a case that passes to itself.
pub fn kind() -> Option<TransportKind> {
    let case = std::thread::current().name().unwrap_or("a case").to_owned();
    let count = CASES.fetch_add(1, Ordering::Relaxed) + 1;
    let mut out = std::io::stderr();
    match found() {
        Ok(info) => {
            let _ = writeln!(out, "UCX {}: {count} UCX cases run, now {case}", info.version);
            Some(TransportKind::Ucx)
        }
        Err(why) => {
            let _ = writeln!(out, "UCX not found ({why}): {count} UCX cases not run, now {case}");
            None
        }
    }
}
