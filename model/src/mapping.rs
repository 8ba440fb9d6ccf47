//! Read-only file mappings: the only unsafe code of this crate.

#![allow(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::{Mmap, UncheckedAdvice};

use crate::error::ModelError;

/// A file mapped whole and read-only.
///
/// **A checkpoint's files must not be truncated or rewritten in place while a node serves from them**: the system
/// answers a read past a shortened file's end with SIGBUS. Replacing a file (write beside it, then rename) is safe:
/// the mapping keeps the old one.
#[derive(Debug)]
pub(crate) struct Mapping {
    file: PathBuf,
    map: Mmap,
    modified: Option<SystemTime>,
}

impl Mapping {
    /// Maps `path`, touching none of its pages.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { file: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(io(std::io::Error::other("not a regular file")));
        }
        if metadata.len() == 0 {
            let what = "the header".to_owned();
            return Err(ModelError::Truncated { file: path.to_path_buf(), what, expected: 8, found: 0 });
        }
        // SAFETY: the mapping is read-only and private to this struct. That nobody truncates or rewrites the file while
        // it is mapped is the documented condition under which a checkpoint is served; within this process nobody does.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { file: path.to_path_buf(), map, modified: metadata.modified().ok() })
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// When the file was last written, where the system tells.
    pub(crate) fn modified(&self) -> Option<SystemTime> {
        self.modified
    }

    /// Asks the system to read a range ahead. A hint: its failure changes nothing.
    pub(crate) fn prefetch(&self, offset: usize, len: usize) {
        if len > 0 {
            let _ = self.map.advise_range(memmap2::Advice::WillNeed, offset, len);
        }
    }

    /// Gives a range's pages back; a later read faults them in again from the file. A hint as well.
    pub(crate) fn release(&self, offset: usize, len: usize) {
        if len > 0 {
            // SAFETY: dropping pages of a read-only file mapping loses nothing: they are never dirty, and the next read
            // of them, through whatever reference, finds the file's bytes again.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, len) };
        }
    }
}
