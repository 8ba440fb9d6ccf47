//! What a caller may get wrong at start-up, as typed errors.

use crate::Dtype;
use crate::cpu::Isa;
use crate::kv::KvShape;

/// Why a backend or a cache could not be made.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// An instruction set was asked for that this machine lacks.
    #[error("this machine has no {asked}; leave the instruction set unset to take the best it has ({best})")]
    IsaMissing {
        /// What was asked for.
        asked: Isa,
        /// The best one here.
        best: Isa,
    },
    /// A name that is no instruction set.
    #[error("unknown instruction set `{0}`; choose amx-bf16, avx512-bf16, avx512, avx2, neon or portable")]
    IsaUnknown(String),
    /// A name that is no compute dtype.
    #[error("unknown dtype `{0}`; choose f32 or bf16")]
    DtypeUnknown(String),
    /// A thread count outside the bounds.
    #[error("{asked} compute threads asked for; choose 1 to {max}")]
    Threads {
        /// What was asked for.
        asked: usize,
        /// The bound.
        max: usize,
    },
    /// The system refused the threads.
    #[error("cannot start {threads} compute threads; ask for fewer or raise the process limit")]
    Pool {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A cache shape with a zero in it, or one whose size overflows.
    #[error("a KV cache of {shape:?} in {dtype} is empty or too large to address; choose fewer pages")]
    KvShape {
        /// The shape.
        shape: KvShape,
        /// Its element type.
        dtype: Dtype,
    },
    /// The system had no memory for it.
    #[error("no memory for {bytes} bytes; choose a smaller cache")]
    Memory {
        /// How much was asked for.
        bytes: usize,
    },
}
