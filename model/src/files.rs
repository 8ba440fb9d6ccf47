//! Bounded reads of the small files, and the shards that hold the weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

use serde::Deserialize;

use crate::error::ModelError;
use crate::header::Header;
use crate::mapping::Mapping;

/// Bytes of a config file that are read at most: a thousand times a real one.
pub(crate) const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a weight index that are read at most; the largest published ones have under 20 MB.
pub(crate) const INDEX_BYTES_MAX: u64 = 128 << 20;
/// Bytes of a tokenizer that are read at most; the largest published ones have under 40 MB.
pub(crate) const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// Shards of one checkpoint at most.
pub(crate) const SHARDS_MAX: usize = 4096;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A text file of at most `limit` bytes.
pub(crate) fn read_text(file: &Path, limit: u64) -> Result<String, ModelError> {
    let io = |source| ModelError::Io { file: file.to_path_buf(), source };
    let opened = File::open(file).map_err(io)?;
    let found = opened.metadata().map_err(io)?.len();
    if found > limit {
        return Err(ModelError::TooLarge { file: file.to_path_buf(), found, limit });
    }
    let mut text = String::new();
    // The length may grow after it was looked at; the bound holds all the same.
    opened.take(limit).read_to_string(&mut text).map_err(io)?;
    Ok(text)
}

/// As [`read_text`], `None` when there is no such file.
pub(crate) fn read_text_if_present(file: &Path, limit: u64) -> Result<Option<String>, ModelError> {
    match read_text(file, limit) {
        Err(ModelError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// A mapped weight file and its checked head.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) mapping: Mapping,
    pub(crate) header: Header,
}

impl Shard {
    fn open(path: &Path) -> Result<Self, ModelError> {
        let mapping = Mapping::open(path)?;
        let header = Header::parse(path, mapping.bytes())?;
        Ok(Self { mapping, header })
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The checkpoint's shards: the single file if there is one (as transformers prefers it), else what the index names.
pub(crate) fn open_shards(dir: &Path) -> Result<Vec<Shard>, ModelError> {
    let single = dir.join(SINGLE);
    if single.exists() {
        return Ok(vec![Shard::open(&single)?]);
    }
    let index_file = dir.join(INDEX);
    let Some(text) = read_text_if_present(&index_file, INDEX_BYTES_MAX)? else {
        return Err(ModelError::NoWeights { dir: dir.to_path_buf() });
    };
    let index: Index = serde_json::from_str(&text)
        .map_err(|e| ModelError::BadJson { file: index_file.clone(), reason: e.to_string() })?;
    let contradiction = |reason| ModelError::IndexContradiction { index: index_file.clone(), reason };
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if names.is_empty() || names.len() > SHARDS_MAX {
        return Err(contradiction(format!("it names {} shards, 1 to {SHARDS_MAX} are read", names.len())));
    }
    let mut shards = Vec::with_capacity(names.len());
    for name in names {
        if !is_plain_name(name) {
            return Err(contradiction(format!("shard {name:?} is not a plain file name")));
        }
        shards.push(open_shard(dir, name, &index)?);
    }
    agree(&index, &shards).map_err(contradiction)?;
    Ok(shards)
}

fn open_shard(dir: &Path, name: &str, index: &Index) -> Result<Shard, ModelError> {
    let file = dir.join(name);
    Shard::open(&file).map_err(|e| match e {
        ModelError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            let holds = index.weight_map.iter().find(|(_, shard)| *shard == name);
            ModelError::MissingShard { file, tensor: holds.map(|(t, _)| t.clone()).unwrap_or_default() }
        }
        e => e,
    })
}

/// An index entry may lead only to a file of its own directory.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

/// Checks that every entry of the index is where it says, and that the shards hold nothing else.
fn agree(index: &Index, shards: &[Shard]) -> Result<(), String> {
    let mut placed = 0;
    for shard in shards {
        let file = shard.mapping.file().file_name().unwrap_or_default().to_string_lossy();
        for tensor in shard.header.names() {
            match index.weight_map.get(tensor) {
                Some(named) if *named == file => placed += 1,
                Some(named) => return Err(format!("{file} holds {tensor}, which the index places in {named}")),
                None => return Err(format!("{file} holds {tensor}, which the index does not name")),
            }
        }
    }
    if placed == index.weight_map.len() {
        return Ok(());
    }
    let held: BTreeSet<&str> = shards.iter().flat_map(|s| s.header.names()).collect();
    let lost = index.weight_map.iter().find(|(tensor, _)| !held.contains(tensor.as_str()));
    Err(match lost {
        Some((tensor, named)) => format!("it places {tensor} in {named}, which does not hold it"),
        None => "its entries and the shards' tensors differ in number".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_leads_nowhere_but_into_its_directory() {
        assert!(is_plain_name("model-00001-of-00002.safetensors"));
        for bad in ["", ".", "..", "../x", "/etc/passwd", "a/b", "a/", "./a"] {
            assert!(!is_plain_name(bad), "{bad:?}");
        }
    }
}
