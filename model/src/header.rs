//! The head of a safetensors file, bounded and checked: every tensor lies in the file, none overlaps, and nothing is
//! between.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::error::ModelError;

/// Bytes that a header may have: the bound of the format itself.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Dimensions that a tensor may have.
pub const RANK_MAX: usize = 8;

const LENGTH_BYTES: usize = 8;

/// Where a tensor lies and how it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The type's name as it stands in the file.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// First byte, from the file's start.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// The tensors of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    tensors: HashMap<String, Entry>,
}

impl Header {
    /// Parses and checks the head of `bytes`, the whole of `file` (which is only named in errors). Touches no tensor.
    ///
    /// # Errors
    /// [`ModelError::BadHeader`], [`ModelError::Truncated`].
    pub fn parse(file: &Path, bytes: &[u8]) -> Result<Self, ModelError> {
        let bad = |reason: String| ModelError::BadHeader { file: file.to_path_buf(), reason };
        let file_len = bytes.len() as u64;
        let truncated = |what: String, expected: u64| ModelError::Truncated {
            file: file.to_path_buf(),
            what,
            expected,
            found: file_len,
        };
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(truncated("the header".to_owned(), LENGTH_BYTES as u64));
        };
        let length = u64::from_le_bytes(*length);
        if length > HEADER_BYTES_MAX {
            return Err(bad(format!("its header claims {length} bytes, at most {HEADER_BYTES_MAX} make sense")));
        }
        let Some(json) = rest.get(..length as usize) else {
            return Err(truncated("the header".to_owned(), LENGTH_BYTES as u64 + length));
        };
        let raw: RawHeader = serde_json::from_slice(json).map_err(|e| bad(format!("its header is not valid: {e}")))?;
        let data_start = LENGTH_BYTES + length as usize;
        let mut tensors: Vec<(String, Entry)> = Vec::with_capacity(raw.0.len());
        for (name, tensor) in raw.0 {
            let entry = tensor.place(data_start).map_err(|reason| bad(format!("tensor {name}: {reason}")))?;
            tensors.push((name, entry));
        }
        tensors.sort_unstable_by(|(a, x), (b, y)| (x.start, x.end, a).cmp(&(y.start, y.end, b)));
        let mut at = data_start;
        for (name, entry) in &tensors {
            if entry.start != at {
                let reason = format!("tensor {name} starts at byte {}, the one before it ends at {at}", entry.start);
                return Err(bad(reason));
            }
            if entry.end as u64 > file_len {
                return Err(truncated(format!("tensor {name}"), entry.end as u64));
            }
            at = entry.end;
        }
        if at as u64 != file_len {
            return Err(bad(format!("its tensors end at byte {at}, the file at {file_len}")));
        }
        Ok(Self { tensors: tensors.into_iter().collect() })
    }

    /// A tensor's entry.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name)
    }

    /// The names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All tensors, in no order.
    pub fn into_tensors(self) -> impl Iterator<Item = (String, Entry)> {
        self.tensors.into_iter()
    }
}

/// Bits of an element by the type's name in the format. All types are known here, so that those that are not read are
/// refused later by tensor and type.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "C64" | "F64" | "I64" | "U64" => 64,
        _ => return None,
    })
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl RawTensor {
    fn place(self, data_start: usize) -> Result<Entry, String> {
        let [begin, end] = self.data_offsets;
        if self.shape.len() > RANK_MAX {
            return Err(format!("{} dimensions, at most {RANK_MAX} make sense", self.shape.len()));
        }
        let bits = bits(&self.dtype).ok_or_else(|| format!("unknown type {:?}", self.dtype))?;
        let elements = self.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
        let wanted = elements.and_then(|n| n.checked_mul(bits)).map(|bits| bits.div_ceil(8));
        let found = end.checked_sub(begin).ok_or_else(|| format!("ends at {end}, before its start at {begin}"))?;
        if wanted != Some(found) {
            let wanted = wanted.map_or_else(|| "more than there can be".to_owned(), |w| w.to_string());
            let RawTensor { dtype, shape, .. } = self;
            return Err(format!("{dtype} of shape {shape:?} has {wanted} bytes, its offsets span {found}"));
        }
        let place = |offset: u64| usize::try_from(offset).ok().and_then(|o| o.checked_add(data_start));
        let (Some(start), Some(end)) = (place(begin), place(end)) else {
            return Err(format!("its offsets {begin} and {end} are beyond any file"));
        };
        let shape: Option<Vec<usize>> = self.shape.iter().map(|d| usize::try_from(*d).ok()).collect();
        let shape = shape.ok_or_else(|| "a dimension is beyond any memory".to_owned())?;
        Ok(Entry { dtype: self.dtype, shape, start, end })
    }
}

/// The header's map, with repeated names refused (a plain map would keep the last one in silence).
struct RawHeader(HashMap<String, RawTensor>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

struct RawHeaderVisitor;

impl<'de> Visitor<'de> for RawHeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut tensors = HashMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<HashMap<String, String>>()?;
                continue;
            }
            match tensors.entry(name) {
                Slot::Occupied(taken) => {
                    return Err(A::Error::custom(format!("tensor {} is named twice", taken.key())));
                }
                Slot::Vacant(free) => free.insert(map.next_value()?),
            };
        }
        Ok(RawHeader(tensors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    fn parse(header: &str, data: usize) -> Result<Header, ModelError> {
        Header::parse(Path::new("x.safetensors"), &file(header, data))
    }

    const TWO: &str = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F32","shape":[2],"data_offsets":[6,14]},
        "a":{"dtype":"BF16","shape":[3,1],"data_offsets":[0,6]}}"#;

    #[test]
    fn tensors_lie_where_the_header_says() {
        let header = parse(TWO, 14).unwrap();
        let start = 8 + TWO.len();
        let a = Entry { dtype: "BF16".to_owned(), shape: vec![3, 1], start, end: start + 6 };
        assert_eq!(header.get("a"), Some(&a));
        assert_eq!(header.get("b").unwrap().end, start + 14);
        assert_eq!(header.names().count(), 2);
    }

    #[test]
    fn a_file_that_ends_early_names_the_tensor_cut_off_and_both_lengths() {
        match parse(TWO, 9) {
            Err(ModelError::Truncated { what, expected, found, .. }) => {
                assert_eq!(what, "tensor b");
                assert_eq!(expected - found, 5);
            }
            other => panic!("{other:?}"),
        }
        let cut = Header::parse(Path::new("x"), &file(TWO, 0)[..40]);
        assert!(matches!(cut, Err(ModelError::Truncated { expected, found: 40, .. }) if expected > 40), "{cut:?}");
        let empty = Header::parse(Path::new("x"), &[0; 7]);
        assert!(matches!(empty, Err(ModelError::Truncated { expected: 8, found: 7, .. })), "{empty:?}");
    }

    #[test]
    fn heads_that_make_no_sense_are_refused() {
        let tensor = |name: &str, rest: &str| format!(r#""{name}":{{"dtype":"F32",{rest}}}"#);
        let whole = r#""shape":[1],"data_offsets":[0,4]"#;
        let cases = [
            ("{", 0),
            ("[]", 0),
            (r#"{"a":1}"#, 0),
            (&format!("{{{},{}}}", tensor("a", whole), tensor("a", whole)), 4),
            (&format!("{{{},{}}}", tensor("a", whole), tensor("b", whole)), 4),
            (&format!("{{{}}}", tensor("a", r#""shape":[1],"data_offsets":[4,8]"#)), 8),
            (&format!("{{{}}}", tensor("a", whole)), 9),
            (&format!("{{{}}}", tensor("a", r#""shape":[2],"data_offsets":[0,4]"#)), 4),
            (&format!("{{{}}}", tensor("a", r#""shape":[1],"data_offsets":[4,0]"#)), 4),
            (&format!("{{{}}}", tensor("a", r#""shape":[-1],"data_offsets":[0,4]"#)), 4),
            (&format!("{{{}}}", tensor("a", r#""shape":[4294967296,4294967296,4],"data_offsets":[0,0]"#)), 0),
            (
                &format!(
                    "{{{}}}",
                    tensor("a", r#""shape":[1],"data_offsets":[18446744073709551611,18446744073709551615]"#)
                ),
                0,
            ),
            (r#"{"a":{"dtype":"Q3","shape":[1],"data_offsets":[0,4]}}"#, 4),
            (r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#, 4),
        ];
        for (header, data) in cases {
            let refused = parse(header, data);
            assert!(matches!(refused, Err(ModelError::BadHeader { .. })), "{header}: {refused:?}");
        }
        let absurd = Header::parse(Path::new("x"), &u64::MAX.to_le_bytes());
        assert!(matches!(absurd, Err(ModelError::BadHeader { .. })), "{absurd:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Header::parse(Path::new("x"), &bytes);
        }

        /// A real head with some of its bytes replaced: whatever still parses lies in the file.
        #[test]
        fn what_parses_lies_in_the_file(
            hits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4)
        ) {
            let mut bytes = file(TWO, 14);
            for (at, byte) in hits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(header) = Header::parse(Path::new("x"), &bytes) {
                for (_, entry) in header.into_tensors() {
                    prop_assert!(entry.start <= entry.end && entry.end <= bytes.len());
                }
            }
        }
    }
}
