//! `meshctl doctor`: what this machine offers, and why not more.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::exit::{CliError, Exit};
use crate::generate::show;
use crate::probe::{self, Native};
use crate::up::print_line;

/// How long `ucx_info` may take.
const UCX_INFO_MAX: Duration = Duration::from_secs(20);

/// One instruction set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Simd {
    /// Its name.
    pub name: &'static str,
    /// Whether the processor has it.
    pub present: bool,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The version of this build.
    pub version: &'static str,
    /// The processor architecture.
    pub arch: &'static str,
    /// Threads that this process may run at once.
    pub processors: usize,
    /// Bytes of memory, 0 where the system does not say.
    pub memory_bytes: u64,
    /// Instruction sets that the CPU backend can use.
    pub simd: Vec<Simd>,
    /// UCX.
    pub ucx: Native,
    /// Transports that UCX finds, or why they cannot be listed.
    pub ucx_transports: Result<Vec<String>, String>,
    /// Whether there are RDMA devices.
    pub rdma: Result<Vec<String>, String>,
    /// The CUDA driver.
    pub cuda: Native,
    /// NCCL.
    pub nccl: Native,
    /// The CUDA run-time compiler.
    pub nvrtc: Native,
}

/// Runs the command.
///
/// # Errors
/// [`CliError::Os`] when nobody reads stdout.
pub async fn run(args: &DoctorArgs) -> Result<Exit, CliError> {
    let report = examine().await;
    if args.json {
        print_line(&report);
    } else {
        show(&report.to_text())?;
    }
    Ok(Exit::Ok)
}

async fn examine() -> Report {
    Report {
        version: env!("CARGO_PKG_VERSION"),
        arch: std::env::consts::ARCH,
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: memory_bytes(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()),
        simd: simd(),
        ucx: probe::ucx(),
        ucx_transports: ucx_transports().await,
        rdma: rdma(Path::new("/sys/class/infiniband")),
        cuda: probe::cuda(),
        nccl: probe::nccl(),
        nvrtc: probe::nvrtc(),
    }
}

#[cfg(target_arch = "x86_64")]
fn simd() -> Vec<Simd> {
    use std::arch::is_x86_feature_detected as has;
    vec![
        Simd { name: "avx2", present: has!("avx2") },
        Simd { name: "fma", present: has!("fma") },
        Simd { name: "f16c", present: has!("f16c") },
        Simd { name: "avx512f", present: has!("avx512f") },
        Simd { name: "avx512bw", present: has!("avx512bw") },
        Simd { name: "avx512vl", present: has!("avx512vl") },
        Simd { name: "avx512vnni", present: has!("avx512vnni") },
        Simd { name: "avx512bf16", present: has!("avx512bf16") },
    ]
}

#[cfg(target_arch = "aarch64")]
fn simd() -> Vec<Simd> {
    use std::arch::is_aarch64_feature_detected as has;
    vec![
        Simd { name: "neon", present: has!("neon") },
        Simd { name: "dotprod", present: has!("dotprod") },
        Simd { name: "bf16", present: has!("bf16") },
    ]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn simd() -> Vec<Simd> {
    Vec::new()
}

/// `MemTotal` of /proc/meminfo, in bytes.
fn memory_bytes(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// The transports of `ucx_info -d`, where that program is installed.
async fn ucx_transports() -> Result<Vec<String>, String> {
    let mut command = tokio::process::Command::new("ucx_info");
    command.arg("-d").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(UCX_INFO_MAX, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(transports(&String::from_utf8_lossy(&output.stdout))),
        Ok(Ok(output)) => Err(format!("ucx_info -d failed ({})", output.status)),
        Ok(Err(error)) => Err(format!("ucx_info cannot be run ({error}); Debian has it in ucx-utils")),
        Err(_) => Err(format!("ucx_info -d took more than {} s", UCX_INFO_MAX.as_secs())),
    }
}

fn transports(listing: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in listing.lines().filter_map(|l| l.split_once("Transport:")).map(|(_, name)| name.trim()) {
        if !names.iter().any(|n| n == name) {
            names.push(name.to_owned());
        }
    }
    names
}

fn rdma(class: &Path) -> Result<Vec<String>, String> {
    let entries =
        std::fs::read_dir(class).map_err(|_| format!("{} does not exist: no RDMA device", class.display()))?;
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    if names.is_empty() { Err(format!("{} is empty: no RDMA device", class.display())) } else { Ok(names) }
}

impl Report {
    /// The report for people.
    pub fn to_text(&self) -> String {
        let memory = self.memory_bytes as f64 / f64::from(1 << 30);
        let mut lines = vec![
            format!("meshctl {} on {}, {} processors, {memory:.1} GiB", self.version, self.arch, self.processors),
            simd_line(&self.simd),
            native_line("ucx", &self.ucx),
            list_line("ucx transports", &self.ucx_transports),
            list_line("rdma devices", &self.rdma),
            native_line("cuda", &self.cuda),
            native_line("nccl", &self.nccl),
            native_line("nvrtc", &self.nvrtc),
        ];
        lines.push("compute: this version computes on the CPU; a GPU is reported and not used".to_owned());
        lines.push(String::new());
        lines.join("\n")
    }
}

fn simd_line(simd: &[Simd]) -> String {
    let words = |present| {
        let names: Vec<&str> = simd.iter().filter(|s| s.present == present).map(|s| s.name).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(" ") }
    };
    format!("simd: {}; missing: {}", words(true), words(false))
}

fn native_line(what: &str, native: &Native) -> String {
    if native.usable {
        format!("{what}: {} ({})", native.found, native.library)
    } else {
        format!("{what}: no: {}", native.why_not)
    }
}

fn list_line(what: &str, list: &Result<Vec<String>, String>) -> String {
    match list {
        Ok(names) => format!("{what}: {}", names.join(" ")),
        Err(why) => format!("{what}: no: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transports_are_named_once() {
        let listing =
            "#      Transport: posix\n#         Device: memory\n#      Transport: tcp\n#      Transport: tcp\n";
        assert_eq!(transports(listing), ["posix", "tcp"]);
        assert!(transports("").is_empty());
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(memory_bytes("MemTotal:       16 kB\nMemFree: 1 kB\n"), 16 * 1024);
        assert_eq!(memory_bytes(""), 0);
    }

    #[tokio::test]
    async fn the_report_says_something_of_everything() {
        let report = examine().await;
        let text = report.to_text();
        for what in ["simd:", "ucx:", "ucx transports:", "rdma devices:", "cuda:", "nccl:", "nvrtc:", "compute:"] {
            assert!(text.contains(what), "{what} in {text}");
        }
        assert!(serde_json::to_value(&report).unwrap()["processors"].as_u64() >= Some(1));
    }
}
