//! What every result says of itself: the machine, the commit, the command, the time; and where results go.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::Serialize;

use crate::error::BenchError;

/// Where a command's results go.
#[derive(Clone, Debug, Default, Args)]
pub struct JsonArg {
    /// Write the results as JSON to FILE; without one, or with `-`, to stdout, and the table goes to stderr.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

impl JsonArg {
    /// Prints the table and writes the JSON where that was asked for.
    ///
    /// # Errors
    /// The file or stdout cannot be written.
    pub fn write<T: Serialize>(&self, results: &T, table: &str) -> Result<(), BenchError> {
        let Some(path) = &self.json else { return show(table) };
        let whole = Whole { about: About::here(), results };
        let failed = |e: serde_json::Error| BenchError::Other(format!("cannot write JSON: {e}"));
        if path == Path::new("-") {
            eprint!("{table}");
            return show(&(serde_json::to_string(&whole).map_err(failed)? + "\n"));
        }
        // The table first: a file that cannot be written must not lose the measurement.
        show(table)?;
        let text = serde_json::to_string_pretty(&whole).map_err(failed)? + "\n";
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(BenchError::file(parent))?;
        }
        std::fs::write(path, text).map_err(BenchError::file(path))
    }
}

/// Writes to stdout.
pub fn show(text: &str) -> Result<(), BenchError> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(BenchError::io("print the report"))
}

#[derive(Serialize)]
struct Whole<'a, T: Serialize> {
    about: About,
    #[serde(flatten)]
    results: &'a T,
}

/// What a result must say to be worth keeping.
#[derive(Debug, Serialize)]
pub struct About {
    /// Of this program.
    pub version: &'static str,
    /// The command line.
    pub command: Vec<String>,
    /// When it was written: seconds since 1970.
    pub unix_s: u64,
    /// The checkout that this program was built from; absent where that is no checkout.
    pub commit: Option<Commit>,
    /// What it ran on.
    pub machine: Machine,
}

/// A checkout.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Commit {
    /// Its head.
    pub id: String,
    /// Whether files differ from it.
    pub dirty: bool,
}

/// A machine. What cannot be read is absent.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: Option<String>,
    /// Logical processors that this process may use.
    pub processors: usize,
    /// Memory, bytes.
    pub memory_bytes: Option<u64>,
    /// The kernel.
    pub kernel: Option<String>,
    /// Architecture and system of the build.
    pub platform: String,
}

impl About {
    /// Of this run.
    pub fn here() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
            unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            commit: commit(Path::new(env!("CARGO_MANIFEST_DIR"))),
            machine: Machine::here(),
        }
    }
}

fn commit(dir: &Path) -> Option<Commit> {
    let git = |args: &[&str]| {
        let ran = Command::new("git").arg("-C").arg(dir).args(args).output().ok()?;
        ran.status.success().then(|| String::from_utf8_lossy(&ran.stdout).trim().to_owned())
    };
    Some(Commit { id: git(&["rev-parse", "HEAD"])?, dirty: !git(&["status", "--porcelain"])?.is_empty() })
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        let read = |path| std::fs::read_to_string(path).ok();
        let cpuinfo = read("/proc/cpuinfo");
        Self {
            cpu: cpuinfo.as_deref().and_then(|text| field(text, "model name")).map(str::to_owned),
            processors: processors(),
            memory_bytes: memory("MemTotal"),
            kernel: read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned()),
            platform: format!("{} {}", std::env::consts::ARCH, std::env::consts::OS),
        }
    }

    /// In words.
    pub fn words(&self) -> String {
        let memory = self.memory_bytes.map_or_else(String::new, |bytes| format!(", {} GiB", bytes >> 30));
        format!("{}, {} processors{memory}", self.cpu.as_deref().unwrap_or(&self.platform), self.processors)
    }
}

/// Logical processors that this process may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A line of `/proc/meminfo`, bytes.
pub fn memory(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    field(&text, name)?.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "processor\t: 0\nmodel name\t: A: B\nMemTotal:  12 kB\n";
        assert_eq!((field(text, "model name"), field(text, "model")), (Some("A: B"), None));
    }

    #[test]
    fn a_folder_that_is_no_checkout_has_no_commit() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(commit(dir.path()), None);
    }

    #[test]
    fn a_result_stands_beside_what_it_was_measured_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new").join("result.json");
        JsonArg { json: Some(path.clone()) }.write(&serde_json::json!({"figures": [1]}), "").unwrap();
        let read: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(read["figures"][0], 1);
        assert!(read["about"]["machine"]["processors"].as_u64().unwrap() >= 1);
        assert!(read["about"]["unix_s"].as_u64().unwrap() > 1_700_000_000);
    }
}
