//! Why a drill cannot be run, or could not be carried through.

use std::path::PathBuf;

use crate::bench::record::Failure;
use crate::exit::Exit;

/// Failures of a drill. What fails because the mesh is disturbed is counted in its report, not raised.
#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    /// The plan is no TOML, or has keys and types that a plan has not.
    #[error("{}: {why}", path.display())]
    NoPlan {
        /// As given.
        path: PathBuf,
        /// What is wrong, with its place where there is one.
        why: String,
    },
    /// A key's value makes no sense.
    #[error("{}: {key}: {why}", path.display())]
    BadKey {
        /// As given.
        path: PathBuf,
        /// Which, as in `phase[2].who`.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// The lengths do not fit the model.
    #[error("prompts of {input} and answers of {output} tokens exceed the model's context of {context}")]
    TooLong {
        /// The longest prompt.
        input: u32,
        /// The longest answer.
        output: u32,
        /// What the mesh says.
        context: u32,
    },
    /// Without disturbance the mesh does not answer every request, so there is nothing to compare with.
    #[error("{failed} of {requests} requests failed in the undisturbed run; the first: {}: {why}", first.code())]
    Undisturbed {
        /// How many.
        failed: usize,
        /// Of how many.
        requests: usize,
        /// How the first one failed.
        first: Failure,
        /// What it said.
        why: String,
    },
    /// There is no node to disturb.
    #[error("no {who} is there to {what}")]
    Nobody {
        /// Whom the plan names.
        who: String,
        /// What should be done to it.
        what: &'static str,
    },
    /// Every node of a kind has ended: the mesh cannot come back by itself.
    #[error("no {group} node runs any more")]
    AllEnded {
        /// Which kind.
        group: &'static str,
    },
    /// A node ended while it was waited for.
    #[error("{name} ended before it had its part in the mesh ({status})")]
    EndedEarly {
        /// Which.
        name: String,
        /// How.
        status: std::process::ExitStatus,
    },
    /// A node did not end when it was asked to.
    #[error("{name} still ran {} s after SIGTERM", waited.as_secs_f64())]
    NotEnded {
        /// Which.
        name: String,
        /// How long it had.
        waited: std::time::Duration,
    },
}

impl DrillError {
    /// What the process ends with.
    pub fn exit(&self) -> Exit {
        match self {
            DrillError::NoPlan { .. } | DrillError::BadKey { .. } => Exit::Usage,
            DrillError::TooLong { .. } => Exit::Usage,
            DrillError::Undisturbed { first: Failure::Mesh(code), .. } => Exit::of_code(*code),
            DrillError::Undisturbed { .. } => Exit::Unavailable,
            DrillError::Nobody { .. } | DrillError::AllEnded { .. } => Exit::Unmet,
            DrillError::EndedEarly { .. } | DrillError::NotEnded { .. } => Exit::Unmet,
        }
    }

    /// What the user can do about it.
    pub fn remedy(&self) -> Option<&'static str> {
        Some(match self {
            DrillError::NoPlan { .. } | DrillError::BadKey { .. } => {
                "docs/OPERATING.md (Fault drills) has every key; the plans in drills/ are examples"
            }
            DrillError::TooLong { .. } => "lower prompt_tokens or output_tokens of [load]",
            DrillError::Undisturbed { .. } => "look at the nodes' logs with --verbose, or lower [load] streams",
            _ => return None,
        })
    }
}
