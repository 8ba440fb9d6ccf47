//! Matrices of rows in the compute dtype, borrowed out of wire buffers, mapped files or scratch.

use std::fmt;
use std::str::FromStr;

use crate::memory::AlignedBuf;
use crate::{Dtype, KernelError, bf16};

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }

    /// Its name in configuration and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Dtype {
    type Err = KernelError;

    fn from_str(name: &str) -> Result<Dtype, KernelError> {
        match name {
            "f32" => Ok(Dtype::F32),
            "bf16" => Ok(Dtype::Bf16),
            _ => Err(KernelError::DtypeUnknown(name.to_owned())),
        }
    }
}

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

impl<'a> Rows<'a> {
    /// How many rows there are.
    pub fn rows(&self) -> usize {
        count(self.bytes.len(), self.cols, self.dtype)
    }

    /// Row `index`.
    pub fn row(&self, index: usize) -> &'a [u8] {
        let row_bytes = self.cols * self.dtype.bytes();
        &self.bytes[index * row_bytes..][..row_bytes]
    }

    /// Every element widened to f32, for tests and tools.
    pub fn to_f32(&self) -> Vec<f32> {
        widen(self.dtype, self.bytes)
    }
}

impl RowsMut<'_> {
    /// How many rows there are.
    pub fn rows(&self) -> usize {
        count(self.bytes.len(), self.cols, self.dtype)
    }

    /// Row `index`.
    pub fn row(&mut self, index: usize) -> &mut [u8] {
        let row_bytes = self.cols * self.dtype.bytes();
        &mut self.bytes[index * row_bytes..][..row_bytes]
    }
}

impl MatrixView<'_> {
    /// The `k` elements that make output `index`.
    pub fn row(&self, index: usize) -> &[u8] {
        let row_bytes = self.k * self.dtype.bytes();
        &self.bytes[index * row_bytes..][..row_bytes]
    }
}

fn count(bytes: usize, cols: usize, dtype: Dtype) -> usize {
    if cols == 0 { 0 } else { bytes / (cols * dtype.bytes()) }
}

/// Elements of `dtype` widened to f32.
pub(crate) fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::Bf16 => bytes.as_chunks().0.iter().map(|&b| bf16::widen(u16::from_le_bytes(b))).collect(),
    }
}

/// Rounds f32 values into elements of `dtype`; `out` has room for exactly as many.
#[inline(always)]
pub(crate) fn narrow_into(dtype: Dtype, values: &[f32], out: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            for (to, from) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *to = from.to_le_bytes();
            }
        }
        Dtype::Bf16 => {
            for (to, from) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *to = bf16::narrow(*from).to_le_bytes();
            }
        }
    }
}

/// Sizes that a [`RowBuf`] takes between two looks at whether all of them had done with less: a second of a busy node.
const SIZES: u32 = 4096;

/// Rows that own their storage, cache-line aligned. Growing reallocates; shrinking does once a burst is long over, so that
/// nobody's memory is that of the largest batch it ever saw.
#[derive(Debug)]
pub struct RowBuf {
    dtype: Dtype,
    cols: usize,
    rows: usize,
    storage: AlignedBuf,
    /// Sizes taken since the last look.
    sizes: u32,
    /// The largest of them, bytes.
    most: usize,
}

impl RowBuf {
    /// `rows` zero rows.
    pub fn new(dtype: Dtype, rows: usize, cols: usize) -> Result<RowBuf, KernelError> {
        let most = Self::size(dtype, rows, cols)?;
        Ok(RowBuf { dtype, cols, rows, storage: AlignedBuf::passing(most)?, sizes: 0, most })
    }

    /// Makes it `rows` x `cols`. What the elements hold afterwards is unspecified.
    pub fn resize(&mut self, rows: usize, cols: usize) -> Result<(), KernelError> {
        let bytes = Self::size(self.dtype, rows, cols)?;
        let (most, look) = (self.most.max(bytes), self.sizes >= SIZES);
        // A quarter more than was needed is not worth the change.
        if bytes > self.storage.len() || look && self.storage.len() > most + most / 4 {
            self.storage = AlignedBuf::passing(most)?;
        }
        (self.sizes, self.most) = if look { (0, bytes) } else { (self.sizes + 1, most) };
        (self.rows, self.cols) = (rows, cols);
        Ok(())
    }

    /// The rows, to be read.
    pub fn as_rows(&self) -> Rows<'_> {
        let bytes = &self.storage.as_slice()[..self.used()];
        Rows { dtype: self.dtype, cols: self.cols, bytes }
    }

    /// The rows, to be written.
    pub fn as_rows_mut(&mut self) -> RowsMut<'_> {
        let used = self.used();
        RowsMut { dtype: self.dtype, cols: self.cols, bytes: &mut self.storage.as_mut_slice()[..used] }
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn used(&self) -> usize {
        self.rows * self.cols * self.dtype.bytes()
    }

    fn size(dtype: Dtype, rows: usize, cols: usize) -> Result<usize, KernelError> {
        let bytes = rows.checked_mul(cols).and_then(|elements| elements.checked_mul(dtype.bytes()));
        bytes.ok_or(KernelError::Memory { bytes: usize::MAX })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_keeps_its_shape_through_growing_and_shrinking() {
        let mut buf = RowBuf::new(Dtype::Bf16, 2, 3).unwrap();
        narrow_into(Dtype::Bf16, &[1.0, 2.0, 3.0], buf.as_rows_mut().row(1));
        assert_eq!(buf.as_rows().to_f32(), [0.0, 0.0, 0.0, 1.0, 2.0, 3.0]);
        buf.resize(100, 7).unwrap();
        assert_eq!((buf.as_rows().rows(), buf.as_rows().row(99).len()), (100, 14));
        buf.resize(0, 7).unwrap();
        assert_eq!(buf.as_rows().rows(), 0);
        assert!(buf.resize(usize::MAX, 2).is_err());
    }

    #[test]
    fn what_a_burst_needed_goes_back_once_many_have_done_with_less() {
        let mut buf = RowBuf::new(Dtype::Bf16, 0, 64).unwrap();
        let mut held = |rows: usize, times: u32| {
            (0..times).for_each(|_| buf.resize(rows, 64).unwrap());
            buf.storage.len()
        };
        let (few, many) = (held(10, 1), held(1000, 1));
        assert_eq!((few, many), (10 * 128, 1000 * 128));
        assert_eq!(held(10, SIZES), many, "it may come again soon");
        assert_eq!(held(10, SIZES + 1), few);
        assert_eq!(held(9, 2 * SIZES + 2), few, "a little more than is needed stays");
    }

    #[test]
    fn memory_that_cannot_be_had_changes_nothing() {
        let mut buf = RowBuf::new(Dtype::Bf16, 3, 64).unwrap();
        assert!(buf.resize(1 << 54, 64).is_err());
        assert_eq!((buf.rows(), buf.as_rows().bytes.len()), (3, 3 * 128));
        buf.resize(4, 64).unwrap();
        assert_eq!(buf.storage.len(), 4 * 128);
    }

    #[test]
    fn dtype_names_read_back() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            assert_eq!(dtype.as_str().parse::<Dtype>().unwrap(), dtype);
        }
        assert!("fp8".parse::<Dtype>().unwrap_err().to_string().contains("fp8"));
    }
}
