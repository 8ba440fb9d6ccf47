//! Exit codes, and the errors that they stand for. The codes follow sysexits where it has one.

use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use mesh_proto::{Code, MeshError};

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Ok,
    /// What was asked about is not so: a drill's expectations were not met, or something is not well.
    Unmet,
    /// The flags make no sense.
    Usage,
    /// The mesh refused the request as one that it can never serve.
    Refused,
    /// Nobody answers, or the mesh does not serve.
    Unavailable,
    /// A defect: ours or a node's.
    Internal,
    /// The machine denied something: a port, a file, a process.
    Os,
    /// Overloaded: try again later.
    Overloaded,
    /// Another model or version than the mesh's, or a slot that is taken.
    Config,
    /// A deadline passed.
    Deadline,
    /// Ended by Ctrl-C before the work was done.
    Interrupted,
    /// A child's own exit code, handed on.
    Child(u8),
}

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Unmet => 1,
            Exit::Usage => 64,
            Exit::Refused => 65,
            Exit::Unavailable => 69,
            Exit::Internal => 70,
            Exit::Os => 71,
            Exit::Overloaded => 75,
            Exit::Config => 78,
            Exit::Deadline => 124,
            Exit::Interrupted => 130,
            Exit::Child(code) => code,
        }
    }

    /// What a typed error of the mesh ends the process with.
    pub fn of_code(code: Code) -> Self {
        match code {
            Code::InvalidRequest | Code::ContextExceeded => Exit::Refused,
            Code::Overloaded => Exit::Overloaded,
            Code::NotServing | Code::NodeLost => Exit::Unavailable,
            Code::Deadline => Exit::Deadline,
            Code::ModelMismatch | Code::VersionMismatch | Code::SlotTaken => Exit::Config,
            Code::Internal => Exit::Internal,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// An address that is none.
    #[error("`{addr}` is not a gRPC address: {why}")]
    BadAddress {
        /// As given.
        addr: String,
        /// What is wrong with it.
        why: String,
    },
    /// Nobody answers at the address.
    #[error("no mesh answers at {addr}: {why}")]
    NoMesh {
        /// The router's address.
        addr: String,
        /// The connection's error.
        why: String,
    },
    /// The mesh's own typed error.
    #[error("{}{}{}", .0, at(" (field ", &.0.field), at(" (node ", &.0.node))]
    Mesh(MeshError),
    /// A binary of the mesh is not where it should be.
    #[error("{} does not exist", path.display())]
    NoBinary {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The model directory is none.
    #[error("{} is not a checkpoint directory: it has no config.json", path.display())]
    NoModel {
        /// As given.
        path: PathBuf,
    },
    /// A process could not be started.
    #[error("cannot start {what}: {source}")]
    Spawn {
        /// Which.
        what: String,
        /// The machine's reason.
        source: std::io::Error,
    },
    /// A process ended before the mesh served; its last log lines have been shown.
    #[error("{what} ended ({status})")]
    ChildDied {
        /// Which.
        what: String,
        /// How.
        status: ExitStatus,
    },
    /// A process said something else than its ready line.
    #[error("{what} did not say that it is ready but `{line}`")]
    BadReadyLine {
        /// Which.
        what: String,
        /// What it said.
        line: String,
    },
    /// The mesh did not serve in time.
    #[error("the mesh does not serve after {} s: still waiting for {missing}", waited.as_secs())]
    StartTimeout {
        /// How long it had.
        waited: Duration,
        /// Who was waited for.
        missing: String,
    },
    /// The stream ended without a Finished message.
    #[error("the stream ended without a finish reason")]
    StreamCut,
    /// What should have been measured was not.
    #[error("{0}")]
    Demo(String),
    /// The machine denied an operation.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The machine's reason.
        source: std::io::Error,
    },
    /// A process of the mesh is spoken of that was never started.
    #[error("the mesh has no node {name}")]
    NoSuchNode {
        /// As given.
        name: String,
    },
    /// What runs cannot be started again.
    #[error("{name} (pid {pid}) still runs: only what has ended is started again")]
    StillRuns {
        /// Which.
        name: String,
        /// Its process.
        pid: u32,
    },
    /// A load test could not start, or its results could not be kept.
    #[error(transparent)]
    Bench(#[from] crate::bench::BenchError),
    /// A drill could not be run.
    #[error(transparent)]
    Drill(#[from] crate::drill::DrillError),
    /// Ctrl-C or SIGTERM before the work was done.
    #[error("interrupted")]
    Interrupted,
}

impl CliError {
    /// What the process ends with.
    pub fn exit(&self) -> Exit {
        match self {
            CliError::BadAddress { .. } | CliError::NoModel { .. } => Exit::Usage,
            CliError::NoSuchNode { .. } | CliError::StillRuns { .. } => Exit::Usage,
            CliError::NoMesh { .. } => Exit::Unavailable,
            CliError::Mesh(error) => Exit::of_code(error.code),
            CliError::NoBinary { .. } | CliError::Spawn { .. } | CliError::Os { .. } => Exit::Os,
            CliError::ChildDied { status, .. } => match status.code().and_then(|c| u8::try_from(c).ok()) {
                Some(code) if code != 0 => Exit::Child(code),
                _ => Exit::Internal,
            },
            CliError::BadReadyLine { .. } | CliError::StreamCut | CliError::Demo(_) => Exit::Internal,
            CliError::StartTimeout { .. } => Exit::Deadline,
            CliError::Bench(error) => error.exit(),
            CliError::Drill(error) => error.exit(),
            CliError::Interrupted => Exit::Interrupted,
        }
    }

    /// What the user can do about it.
    pub fn remedy(&self) -> Option<&'static str> {
        Some(match self {
            CliError::BadAddress { .. } => "give host:port, as `meshctl up` printed it, for example 127.0.0.1:50051",
            CliError::NoMesh { .. } => "start one with `meshctl up --model DIR`, or name its address with --grpc",
            CliError::NoBinary { .. } => {
                "build the services (`cargo build --release --bins`) or name their folder with --bin-dir"
            }
            CliError::NoModel { .. } => "name a folder with config.json, safetensors and tokenizer.json, as published",
            CliError::StartTimeout { .. } => {
                "look at the named node's log lines; raise --start-timeout for a large model"
            }
            CliError::ChildDied { .. } => "the log lines above say why; fix that and start again",
            CliError::Mesh(error) => remedy_of(error.code),
            CliError::Bench(error) => error.remedy(),
            CliError::Drill(error) => return error.remedy(),
            CliError::BadReadyLine { .. } => "build all binaries from one commit: `cargo build --release --bins`",
            _ => return None,
        })
    }
}

/// ` (field sampling.top_p)`, or nothing.
fn at(what: &str, which: &str) -> String {
    if which.is_empty() { String::new() } else { format!("{what}{which})") }
}

fn remedy_of(code: Code) -> &'static str {
    match code {
        Code::InvalidRequest => "change the named field; `meshctl generate --help` has the ranges",
        Code::ContextExceeded => "shorten the prompt or lower --max-new-tokens; `meshctl status` shows the context",
        Code::Overloaded => "try again later, or start more attention nodes",
        Code::NotServing => "wait until `meshctl status` says that the mesh serves",
        Code::NodeLost => "look at `meshctl status` for the node that is missing, then try again",
        Code::Deadline => "raise --timeout, or ask for fewer tokens",
        Code::ModelMismatch | Code::VersionMismatch => "start every node from one build on one checkpoint and dtype",
        Code::SlotTaken => "leave --slot out, or stop the node that holds it",
        Code::Internal => "this is a defect: report the message with the nodes' logs",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn errors_that_call_for_different_actions_have_different_codes() {
        let codes = [
            Exit::Ok,
            Exit::Unmet,
            Exit::Usage,
            Exit::Refused,
            Exit::Unavailable,
            Exit::Internal,
            Exit::Os,
            Exit::Overloaded,
            Exit::Config,
            Exit::Deadline,
            Exit::Interrupted,
        ];
        for (i, a) in codes.iter().enumerate() {
            assert!(codes[..i].iter().all(|b| a.code() != b.code()), "{a:?}");
        }
    }

    #[test]
    fn a_dead_child_never_ends_in_success() {
        let died = |raw| CliError::ChildDied { what: "expert-0".to_owned(), status: ExitStatus::from_raw(raw) }.exit();
        assert_eq!(died(78 << 8), Exit::Child(78));
        assert_eq!(died(0), Exit::Internal, "a clean exit before serving is a failure too");
        assert_eq!(died(9), Exit::Internal, "killed by a signal");
    }
}
