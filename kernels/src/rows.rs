//! Matrices of rows in the compute dtype, borrowed out of wire buffers, mapped files or scratch.

use crate::Dtype;

/// Rows of `cols` elements of `dtype`, one after another. Bytes need no alignment beyond the element's.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Elements in a row.
    pub cols: usize,
    /// `rows * cols` elements, little-endian.
    pub bytes: &'a [u8],
}

/// The same, to be written.
#[derive(Debug)]
pub struct RowsMut<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Elements in a row.
    pub cols: usize,
    /// `rows * cols` elements, little-endian.
    pub bytes: &'a mut [u8],
}

/// A weight matrix as a checkpoint holds it: row-major `[n, k]`, outputs x inputs. Bytes may be unaligned (mapped files).
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    /// Element type on disk, which need not be the compute dtype.
    pub dtype: Dtype,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// `n * k` elements, little-endian.
    pub bytes: &'a [u8],
}
