//! Views of mapped tensors: name, type, shape and the bytes as they lie in the file.

use crate::error::ModelError;

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// IEEE single precision.
    F32,
    /// The upper half of a single.
    Bf16,
}

impl WeightDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            WeightDtype::F32 => 4,
            WeightDtype::Bf16 => 2,
        }
    }

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            WeightDtype::F32 => "F32",
            WeightDtype::Bf16 => "BF16",
        }
    }

    /// The type of that name in a safetensors header, if it is one that is read.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(WeightDtype::F32),
            "BF16" => Some(WeightDtype::Bf16),
            _ => None,
        }
    }
}

/// A tensor in its mapped file. Row-major, little-endian, `[out features, in features]` for matrices.
///
/// The bytes need not be aligned to the element: safetensors does not promise it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorView<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// How its elements are stored.
    pub dtype: WeightDtype,
    /// Its dimensions, outermost first.
    pub shape: &'a [usize],
    /// Its elements.
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// Elements that it has.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.bytes()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Rows and columns of a matrix.
    ///
    /// # Errors
    /// [`ModelError::NoSuchTensor`] when it is no matrix; a checkpoint's own accessors never give such a one.
    pub fn matrix(&self) -> Result<(usize, usize), ModelError> {
        match self.shape {
            [rows, cols] => Ok((*rows, *cols)),
            _ => Err(ModelError::NoSuchTensor { tensor: format!("{} as a matrix", self.name) }),
        }
    }
}

/// All elements widened to single precision, exactly. For vectors such as norms; matrices are packed from the bytes.
pub fn to_f32(tensor: TensorView<'_>) -> Vec<f32> {
    match tensor.dtype {
        WeightDtype::F32 => {
            let words = tensor.bytes.chunks_exact(4);
            words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        WeightDtype::Bf16 => {
            let halves = tensor.bytes.chunks_exact(2);
            halves.map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_stored_types_widen_exactly_and_from_unaligned_bytes() {
        let bytes = [0xff, 0x00, 0x00, 0x80, 0x3f, 0x00, 0x00, 0x20, 0xc0];
        let f32s = TensorView { name: "a", dtype: WeightDtype::F32, shape: &[2], bytes: &bytes[1..] };
        assert_eq!(to_f32(f32s), [1.0, -2.5]);
        let bf16s = TensorView { name: "b", dtype: WeightDtype::Bf16, shape: &[4], bytes: &bytes[1..] };
        assert_eq!(to_f32(bf16s), [0.0, 1.0, 0.0, -2.5]);
        assert_eq!((f32s.len(), bf16s.len()), (2, 4));
    }
}
