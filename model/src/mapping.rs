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

    /// Gives a range's pages back, and those that came along with them; a later read faults them in again from the file. A
    /// hint as well.
    pub(crate) fn release(&self, offset: usize, len: usize) {
        if len > 0 {
            let end = offset.saturating_add(len).saturating_add(FAULT_AROUND_BYTES).min(self.map.len());
            let offset = offset.saturating_sub(FAULT_AROUND_BYTES).min(end);
            // SAFETY: dropping pages of a read-only file mapping loses nothing: they are never dirty, and the next read
            // of them, through whatever reference, finds the file's bytes again.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, end - offset) };
        }
    }
}

/// A page that is read brings along those around it that are in memory: on Linux so many bytes before and after it at most,
/// unless somebody set up more.
const FAULT_AROUND_BYTES: usize = 64 << 10;

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    /// Resident KiB of a mapped file, by the kernel's own accounting.
    fn resident_kib(file: &Path) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let of_file = maps.split_once(file.to_str().unwrap()).expect("it is mapped").1;
        let line = of_file.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().strip_suffix("kB").unwrap().trim().parse().unwrap()
    }

    #[test]
    fn what_came_along_with_a_range_is_given_back_too() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("weights");
        std::fs::write(&file, vec![7; 1 << 20]).unwrap();
        let mapping = Mapping::open(&file).unwrap();
        let read =
            |from: usize, len: usize| mapping.bytes()[from..from + len].iter().map(|b| u64::from(*b)).sum::<u64>();
        for (from, len) in [(0, 1), (300_000, 200_000), ((1 << 20) - 1, 1)] {
            assert_eq!(read(from, len), 7 * len as u64);
            assert!(resident_kib(&file) >= 4);
            mapping.release(from, len);
            assert_eq!(resident_kib(&file), 0, "{len} bytes from {from}");
        }
        assert_eq!(read(0, 1 << 20), 7 << 20, "what was given back is read again");
        mapping.release(0, usize::MAX);
        assert_eq!(resident_kib(&file), 0);
        mapping.release(1 << 20, 5);
    }
}
