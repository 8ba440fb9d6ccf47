//! Weights in a backend's own layout.

use std::sync::Arc;

use memmap2::Mmap;

use crate::memory::AlignedBuf;
use crate::rows::{MatrixView, narrow_into, widen};
use crate::{Dtype, KernelError};

/// Output channels that lie across the lanes of one packed block.
pub(crate) const LANES: usize = 16;

/// Blocks of a panel.
pub(crate) const PANEL_BLOCKS: usize = 4;

/// How a matrix's elements lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[n][k]`, as in a checkpoint.
    RowMajor,
    /// Blocks of sixteen outputs. f32: `[n / 16][k][16]`; bf16: `[n / 16][k / 2][16][2]`. `n` and `k` are padded with zeros.
    Lanes,
    /// As `Lanes`, with the blocks of two equal halves taken in turn: gate, up, gate, up.
    LanesInTurn,
    /// The blocks of `Lanes`, four at a time side by side: `[n / 64][k][4][16]`, or `[n / 64][k / 2][4][16][2]`. Whoever
    /// multiplies four blocks reads one stream. The last panel has the blocks that are left.
    Panels,
    /// The same of `LanesInTurn`.
    PanelsInTurn,
    /// As `Panels`, two at a time.
    Pairs,
    /// The same of `LanesInTurn`.
    PairsInTurn,
}

impl Layout {
    const ALL: [Layout; 7] = [
        Layout::RowMajor,
        Layout::Lanes,
        Layout::LanesInTurn,
        Layout::Panels,
        Layout::PanelsInTurn,
        Layout::Pairs,
        Layout::PairsInTurn,
    ];

    /// With so many blocks side by side, those of two halves in turn or not.
    pub(crate) fn of_blocks(side_by_side: usize, in_turn: bool) -> Layout {
        match (side_by_side, in_turn) {
            (1, false) => Layout::Lanes,
            (1, true) => Layout::LanesInTurn,
            (2, false) => Layout::Pairs,
            (2, true) => Layout::PairsInTurn,
            (PANEL_BLOCKS, false) => Layout::Panels,
            (PANEL_BLOCKS, true) => Layout::PanelsInTurn,
            _ => unreachable!("no instruction set packs {side_by_side} blocks side by side"),
        }
    }

    /// The layout in a file.
    pub(crate) fn code(self) -> u8 {
        match self {
            Layout::RowMajor => 0,
            Layout::Lanes => 1,
            Layout::LanesInTurn => 2,
            Layout::Panels => 3,
            Layout::PanelsInTurn => 4,
            Layout::Pairs => 5,
            Layout::PairsInTurn => 6,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Layout> {
        Layout::ALL.into_iter().find(|layout| layout.code() == code)
    }

    /// Blocks that lie side by side.
    pub(crate) fn side_by_side(self) -> usize {
        match self {
            Layout::RowMajor | Layout::Lanes | Layout::LanesInTurn => 1,
            Layout::Pairs | Layout::PairsInTurn => 2,
            Layout::Panels | Layout::PanelsInTurn => PANEL_BLOCKS,
        }
    }

    /// Blocks of [`LANES`] outputs, of `n` outputs.
    fn blocks(self, n: usize) -> usize {
        match self {
            Layout::RowMajor | Layout::Lanes | Layout::Panels | Layout::Pairs => n.div_ceil(LANES),
            Layout::LanesInTurn | Layout::PanelsInTurn | Layout::PairsInTurn => 2 * (n / 2).div_ceil(LANES),
        }
    }
}

/// Where packed weights lie.
#[derive(Debug)]
pub(crate) enum Weights {
    /// In memory of their own.
    Owned(AlignedBuf),
    /// In a mapped file, in these bytes of it.
    Mapped { map: Arc<Mmap>, start: usize, len: usize },
}

impl Weights {
    /// Bytes `start..start + len` of a mapping, which has them.
    pub(crate) fn mapped(map: Arc<Mmap>, start: usize, len: usize) -> Weights {
        assert!(start <= map.len() && len <= map.len() - start, "weights outside of their file");
        Weights::Mapped { map, start, len }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Weights::Owned(buf) => buf.as_slice(),
            Weights::Mapped { map, start, len } => &map[*start..start + len],
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Weights::Owned(buf) => buf.len(),
            Weights::Mapped { len, .. } => *len,
        }
    }
}

impl From<AlignedBuf> for Weights {
    fn from(buf: AlignedBuf) -> Weights {
        Weights::Owned(buf)
    }
}

/// A weight matrix `[n, k]` (outputs x inputs) in a backend's own layout.
#[derive(Debug)]
pub struct Matrix {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) dtype: Dtype,
    pub(crate) layout: Layout,
    pub(crate) data: Weights,
}

impl Matrix {
    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Bytes of one block of [`LANES`] outputs.
    pub(crate) fn block_bytes(&self) -> usize {
        block_bytes(self.dtype, self.k)
    }

    /// Blocks of [`LANES`] outputs.
    pub(crate) fn blocks(&self) -> usize {
        self.layout.blocks(self.n)
    }

    /// Row-major in `dtype`, `parts` stacked.
    pub(crate) fn row_major(dtype: Dtype, parts: &[MatrixView<'_>]) -> Matrix {
        let (n, k) = stacked_shape(parts);
        let mut data = AlignedBuf::zeroed(n * k * dtype.bytes()).unwrap_or_else(|e| out_of_memory(&e));
        let mut rest = data.as_mut_slice();
        for part in parts {
            let (here, after) = rest.split_at_mut(part.n * k * dtype.bytes());
            narrow_into(dtype, &widen(part.dtype, part.bytes), here);
            rest = after;
        }
        Matrix { n, k, dtype, layout: Layout::RowMajor, data: data.into() }
    }
}

/// A SwiGLU FFN (`down(silu(gate x) * (up x))`) in a backend's own layout.
#[derive(Debug)]
pub struct Ffn {
    pub(crate) gate_up: Matrix,
    pub(crate) down: Matrix,
}

impl Ffn {
    /// Width of its input and output rows.
    pub fn hidden(&self) -> usize {
        self.gate_up.k
    }

    /// Width of its intermediate rows.
    pub fn intermediate(&self) -> usize {
        self.down.k
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }
}

/// Bytes of a matrix in a layout.
pub(crate) fn packed_bytes(layout: Layout, dtype: Dtype, n: usize, k: usize) -> usize {
    match layout {
        Layout::RowMajor => n * k * dtype.bytes(),
        packed => packed.blocks(n) * block_bytes(dtype, k),
    }
}

/// Bytes of one block of [`LANES`] outputs over `k` inputs.
pub(crate) fn block_bytes(dtype: Dtype, k: usize) -> usize {
    let padded = match dtype {
        Dtype::F32 => k,
        Dtype::Bf16 => k.next_multiple_of(2),
    };
    padded * LANES * dtype.bytes()
}

/// The shape of `parts` stacked along `n`.
pub(crate) fn stacked_shape(parts: &[MatrixView<'_>]) -> (usize, usize) {
    let k = parts.first().map_or(0, |part| part.k);
    for part in parts {
        assert_eq!(part.k, k, "matrices that are packed together need equal k");
        assert_eq!(part.bytes.len(), part.n * part.k * part.dtype.bytes(), "matrix bytes contradict its shape");
    }
    (parts.iter().map(|part| part.n).sum(), k)
}

/// Checks an FFN's three shapes against each other.
pub(crate) fn check_ffn(gate: &MatrixView<'_>, up: &MatrixView<'_>, down: &MatrixView<'_>) {
    assert_eq!((gate.n, gate.k), (up.n, up.k), "gate and up differ in shape");
    assert_eq!((down.n, down.k), (gate.k, gate.n), "down is not the transpose of gate in shape");
}

/// Weights have nowhere to go: as with any other failed allocation, the process cannot go on.
pub(crate) fn out_of_memory(error: &KernelError) -> ! {
    panic!("packing weights: {error}")
}
