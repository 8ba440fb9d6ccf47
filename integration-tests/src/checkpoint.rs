//! Copies of checkpoints with one thing wrong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use tempfile::TempDir;

/// A tensor as it is in the file.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// A copy of a single-file checkpoint, to be changed.
#[derive(Debug)]
pub struct Copy {
    folder: TempDir,
}

impl Copy {
    /// Copies a checkpoint's files.
    pub fn of(model: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for entry in std::fs::read_dir(model).expect("the checkpoint's folder") {
            let from = entry.expect("an entry").path();
            let name = from.file_name().expect("a file name");
            if !name.to_string_lossy().starts_with("golden") {
                let bytes = std::fs::read(&from).expect("a readable file");
                std::fs::write(folder.path().join(name), bytes).expect("a writable folder");
            }
        }
        Self { folder }
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    fn weights(&self) -> PathBuf {
        self.path().join("model.safetensors")
    }

    /// Changes config.json.
    #[must_use]
    pub fn config(self, change: impl FnOnce(&mut Value)) -> Self {
        let path = self.path().join("config.json");
        let mut config = serde_json::from_slice(&std::fs::read(&path).expect("config.json")).expect("JSON");
        change(&mut config);
        std::fs::write(&path, config.to_string()).expect("a writable folder");
        self
    }

    /// Gives every tensor other values, by the last bit of each bf16, and leaves all that is written about them.
    #[must_use]
    pub fn retuned(self) -> Self {
        let files =
            std::fs::read_dir(self.path()).expect("the copy's folder").map(|entry| entry.expect("an entry").path());
        for file in files.filter(|file| file.extension().is_some_and(|ext| ext == "safetensors")) {
            let mut bytes = std::fs::read(&file).expect("the weights");
            let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
            bytes[8 + header..].iter_mut().step_by(2).for_each(|low| *low ^= 1);
            std::fs::write(&file, bytes).expect("a writable folder");
        }
        self
    }

    /// Changes the set of tensors.
    #[must_use]
    pub fn tensors(self, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> Self {
        let file = std::fs::read(self.weights()).expect("model.safetensors");
        let read = SafeTensors::deserialize(&file).expect("a valid file");
        let mut tensors: BTreeMap<String, Tensor> = read
            .tensors()
            .into_iter()
            .map(|(name, t)| (name, Tensor { dtype: t.dtype(), shape: t.shape().to_vec(), data: t.data().to_vec() }))
            .collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(name, t)| {
            (name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.data).expect("shape and bytes agree"))
        });
        let bytes = safetensors::serialize(views, None).expect("serialisable tensors");
        std::fs::write(self.weights(), bytes).expect("a writable folder");
        self
    }

    /// Cuts the weights' file short.
    #[must_use]
    pub fn truncated(self) -> Self {
        let bytes = std::fs::read(self.weights()).expect("model.safetensors");
        std::fs::write(self.weights(), &bytes[..bytes.len() - bytes.len() / 3]).expect("a writable folder");
        self
    }
}
