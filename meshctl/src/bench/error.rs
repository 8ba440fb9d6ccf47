//! Why a load test cannot start or cannot keep its results.

use std::path::PathBuf;

use crate::exit::Exit;

/// Failures before or after the measurement. What fails within it is counted, not raised.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The dataset cannot be used.
    #[error("{} {why}", path.display())]
    Dataset {
        /// As given.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The lengths do not fit the model.
    #[error("{input} input and {output} output tokens exceed the model's context of {context}")]
    TooLong {
        /// The longest prompt asked for.
        input: u32,
        /// The longest output asked for.
        output: u32,
        /// What the mesh says.
        context: u32,
    },
    /// Every conversation of the dataset is too long for the model.
    #[error("no conversation of {} fits the model's context of {context} tokens with its answer", path.display())]
    NothingFits {
        /// As given.
        path: PathBuf,
        /// What the mesh says.
        context: u32,
    },
    /// The mesh does not say what it serves.
    #[error("the mesh does not serve yet")]
    NoModel,
    /// A result could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Output {
        /// As given.
        path: PathBuf,
        /// The machine's reason.
        source: std::io::Error,
    },
}

impl BenchError {
    /// What the process ends with.
    pub fn exit(&self) -> Exit {
        match self {
            BenchError::Dataset { .. } | BenchError::TooLong { .. } | BenchError::NothingFits { .. } => Exit::Usage,
            BenchError::NoModel => Exit::Unavailable,
            BenchError::Output { .. } => Exit::Os,
        }
    }

    /// What the user can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            BenchError::Dataset { .. } => {
                "give a JSON array of {\"conversations\": [{\"from\": \"human\", \"value\": ...}, {\"from\": \"gpt\", ...}]}"
            }
            BenchError::TooLong { .. } => "lower --input-tokens or --output-tokens",
            BenchError::NothingFits { .. } => "give --output-tokens, or a dataset with shorter conversations",
            BenchError::NoModel => "wait until `meshctl status` says that the mesh serves",
            BenchError::Output { .. } => "name a file in a folder that you may write to, or `--json -` for stdout",
        }
    }
}
