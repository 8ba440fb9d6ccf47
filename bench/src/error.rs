//! Why a run failed.

use std::path::PathBuf;
use std::process::ExitCode;

use mesh_kernels::KernelError;
use mesh_model::ModelError;
use mesh_transport::TransportError;

/// What a shell reports of a process that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The transport failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A backend could not be made.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A checkpoint could not be read, or one that was asked for makes no sense.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The system failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What it says.
        source: std::io::Error,
    },
    /// A file could not be written or read.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The folder already holds a model.
    #[error("{} already has a {found}; name another folder with --out, or remove it", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What lies there.
        found: String,
    },
    /// A program of the mesh is not where it should be.
    #[error("{} does not exist; build it (`cargo build --release --workspace --bins`) or name its folder with --bin-dir", path.display())]
    NoBinary {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A program does not do what a mesh-bench of this kind does.
    #[error(
        "{} ended at once as a process of this run; --beside wants another build's mesh-bench, of a commit that knows \
         --beside too", program.display()
    )]
    Stranger {
        /// Which.
        program: PathBuf,
    },
    /// Not one mesh would fit.
    #[error(
        "a mesh of this model needs about {needed_mib} MiB and this machine has {available_mib} MiB to spare; make a \
         smaller model with `mesh-bench model`"
    )]
    Memory {
        /// What a mesh needs.
        needed_mib: u64,
        /// What there is.
        available_mib: u64,
    },
    /// A program of the run failed; what it said is above, or here.
    #[error("{program} failed ({status}): {said}")]
    Failed {
        /// Which.
        program: String,
        /// How it ended.
        status: String,
        /// The end of what it said.
        said: String,
    },
    /// Ctrl-C or SIGTERM.
    #[error("interrupted; every process of the run has been stopped")]
    Interrupted,
    /// Another process or thread of the run is gone or says something else.
    #[error("{0}")]
    Other(String),
}

impl BenchError {
    /// Turns a system's error into one that says what was tried.
    pub fn io(what: &'static str) -> impl Fn(std::io::Error) -> BenchError {
        move |source| BenchError::Io { what, source }
    }

    /// The same for a file.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> BenchError {
        let path = path.into();
        move |source| BenchError::File { path, source }
    }

    /// What the process ends with.
    pub fn exit(&self) -> ExitCode {
        if matches!(self, BenchError::Interrupted) { ExitCode::from(INTERRUPTED) } else { ExitCode::FAILURE }
    }
}
