//! Packed weights kept in files, so that a second start maps them instead of packing the checkpoint again.
//!
//! A [`Packer`] packs for one backend, and with a cache directory keeps what it packed: a folder for one content in one
//! layout, in it a file for each matrix or FFN. Nodes that share the directory write and map files independently, and a
//! file appears whole (written beside, then renamed) or not at all. The data come first, so that they begin where a huge
//! page may; the footer, 512 bytes, comes last:
//!
//! | bytes | |
//! |---|---|
//! | 0..8 | `EMPACK01` |
//! | 8..12 | CRC-32C of the footer from byte 12 on |
//! | 12..16 | CRC-32C of the data |
//! | 16..18 | length of the key |
//! | 18..20 | matrices, 1 or 2 |
//! | 20..22 | layout of each matrix |
//! | 22..24 | 0 |
//! | 24..56, 56..88 | offset, bytes, outputs and inputs of each matrix, 8 bytes each |
//! | 88..512 | the key: content, layout and name, then zeros |
//!
//! Numbers are little-endian.
//!
//! A file is read only if its key, its shapes and both sums are what is asked for; anything else is packed and written
//! anew. What would not lie in huge pages when it is mapped, as the last megabyte of an expert of three, is copied to where
//! packed weights lie without a file. A mapped file must not be truncated or rewritten in place, as with a checkpoint's; replacing it is safe.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crc_fast::{CrcAlgorithm, Digest};
use memmap2::Mmap;

use crate::matrix::{Layout, Weights, packed_bytes};
use crate::memory::{AlignedBuf, HUGE_PAGE_BYTES, LINE_BYTES, REGION_PART_MIN};
use crate::rows::MatrixView;
use crate::{Compute, Dtype, Ffn, Matrix};

const MAGIC: [u8; 8] = *b"EMPACK01";
const FOOTER_BYTES: usize = 512;
const KEY_AT: usize = 88;
const MATRICES_MAX: usize = 2;
/// A matrix is copied out of a mapped file if more of it than one part of this many would lie in small pages.
const SMALL_PAGES_PART: usize = 8;
/// What a process left half written when it died is removed after this long.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);
/// Ends the names of files that are being written.
const UNFINISHED: &str = "unfinished";

/// Why weights are not mapped from a file, or not kept in one.
#[derive(Debug, thiserror::Error)]
pub enum PackedError {
    /// The system refused.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file or directory.
        file: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{}: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Packs weights for a backend, and with a cache directory maps those that were packed before.
pub struct Packer {
    compute: Arc<dyn Compute>,
    cache: Option<Cache>,
}

/// The files of one content in one layout.
struct Cache {
    dir: PathBuf,
    /// What every file's key begins with.
    content: String,
}

impl Packer {
    /// Packs for `compute` and keeps nothing.
    pub fn new(compute: Arc<dyn Compute>) -> Packer {
        Packer { compute, cache: None }
    }

    /// Packs for `compute` and keeps what it packs under `root`, in a folder for what `content` names: a fingerprint of
    /// the checkpoint, in letters and digits. Makes the folder.
    ///
    /// # Errors
    /// [`PackedError::Io`] when it cannot be made.
    pub fn with_cache(compute: Arc<dyn Compute>, root: &Path, content: &str) -> Result<Packer, PackedError> {
        let layout = compute.layout();
        let dir = root.join(format!("{content}-{layout}"));
        fs::create_dir_all(&dir).map_err(|source| PackedError::Io { file: dir.clone(), source })?;
        remove_abandoned(&dir);
        tracing::info!(dir = %dir.display(), "packed weights are kept");
        Ok(Packer { compute, cache: Some(Cache { dir, content: format!("{content} {layout}") }) })
    }

    /// The backend.
    pub fn compute(&self) -> &Arc<dyn Compute> {
        &self.compute
    }

    /// [`Compute::pack`], under a name of letters, digits, `.` and `-` that is this matrix's alone.
    pub fn pack(&self, name: &str, parts: &[MatrixView<'_>]) -> Matrix {
        let Some(cache) = &self.cache else { return self.compute.pack(parts) };
        let shape = (parts.iter().map(|part| part.n).sum(), parts.first().map_or(0, |part| part.k));
        let [matrix] = cache.take(name, self.compute.dtype(), [shape], || [self.compute.pack(parts)]);
        matrix
    }

    /// [`Compute::pack_ffn`], the same.
    pub fn pack_ffn(&self, name: &str, gate: MatrixView<'_>, up: MatrixView<'_>, down: MatrixView<'_>) -> Ffn {
        let Some(cache) = &self.cache else { return self.compute.pack_ffn(gate, up, down) };
        let shapes = [(gate.n + up.n, gate.k), (down.n, down.k)];
        let [gate_up, down] = cache.take(name, self.compute.dtype(), shapes, || {
            let Ffn { gate_up, down } = self.compute.pack_ffn(gate, up, down);
            [gate_up, down]
        });
        Ffn { gate_up, down }
    }
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dir = self.cache.as_ref().map(|cache| &cache.dir);
        f.debug_struct("Packer").field("compute", &self.compute.name()).field("cache", &dir).finish()
    }
}

impl Cache {
    /// The matrices of shapes `[n, k]` under `name`: mapped, or packed, kept and then mapped. A cache that fails costs
    /// time and memory, never the weights: they are then what `pack` made.
    fn take<const N: usize>(
        &self,
        name: &str,
        dtype: Dtype,
        shapes: [(usize, usize); N],
        pack: impl FnOnce() -> [Matrix; N],
    ) -> [Matrix; N] {
        let file = self.dir.join(format!("{name}.pack"));
        let key = format!("{} {name}", self.content);
        match read(&file, &key, dtype, shapes) {
            Ok(Some(mapped)) => return mapped,
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "packed weights cannot be used; packing them anew"),
        }
        let packed = pack();
        let kept = write(&file, &key, &packed).and_then(|()| read(&file, &key, dtype, shapes));
        match kept {
            Ok(Some(mapped)) => mapped,
            Ok(None) => packed,
            Err(error) => {
                tracing::warn!(%error, "packed weights cannot be kept; they stay in memory");
                packed
            }
        }
    }
}

/// Maps a file and checks all of it; `None` where there is no file.
fn read<const N: usize>(
    file: &Path,
    key: &str,
    dtype: Dtype,
    shapes: [(usize, usize); N],
) -> Result<Option<[Matrix; N]>, PackedError> {
    let io = |source| PackedError::Io { file: file.to_owned(), source };
    let damaged = |what| PackedError::Damaged { file: file.to_owned(), what };
    let opened = match File::open(file) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    if opened.metadata().map_err(io)?.len() < FOOTER_BYTES as u64 {
        return Err(damaged("it is shorter than its footer"));
    }
    // SAFETY: the mapping is read-only. Nobody truncates or rewrites a finished file: writers rename a new one into its
    // place, and that users leave it alone is the documented condition of the cache.
    let map = unsafe { Mmap::map(&opened) }.map_err(io)?;
    // One row's GEMM walks all weights: with huge pages it misses the TLB less. A refusal is harmless.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    let (data, footer) = map.split_at(map.len() - FOOTER_BYTES);
    let footer: &[u8; FOOTER_BYTES] = footer.try_into().map_err(|_| damaged("it has no footer"))?;
    let places = check_footer(footer, key, dtype, shapes, data.len()).map_err(damaged)?;
    if crc32c(data) != u32_at(footer, 12) {
        return Err(damaged("its data do not match their sum"));
    }
    let map = Arc::new(map);
    Ok(Some(std::array::from_fn(|i| {
        let (layout, start, len) = places[i];
        let (n, k) = shapes[i];
        let copied = if fills_huge_pages(start, len) { None } else { copied(&map, start, len) };
        let data = copied.map_or_else(|| Weights::mapped(map.clone(), start, len), Weights::from);
        Matrix { n, k, dtype, layout, data }
    })))
}

/// Whether a mapping of these bytes of a file lies in huge pages, but for a small part, or they are too few to matter.
fn fills_huge_pages(start: usize, len: usize) -> bool {
    let whole = ((start + len) / HUGE_PAGE_BYTES).saturating_sub(start.div_ceil(HUGE_PAGE_BYTES)) * HUGE_PAGE_BYTES;
    len < REGION_PART_MIN || len - whole <= len / SMALL_PAGES_PART
}

/// These bytes of a mapping in memory of their own, if there is some; the mapping's pages go back to the system.
fn copied(map: &Mmap, start: usize, len: usize) -> Option<AlignedBuf> {
    let mut buf = AlignedBuf::for_weights(len).ok()?;
    buf.as_mut_slice().copy_from_slice(&map[start..start + len]);
    // SAFETY: nobody writes to the mapping: whoever reads there again finds what the file has. A refusal is harmless.
    #[cfg(target_os = "linux")]
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
    Some(buf)
}

fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Layout, offset and length of each matrix, if the footer is sound and is of what is asked for.
fn check_footer<const N: usize>(
    footer: &[u8; FOOTER_BYTES],
    key: &str,
    dtype: Dtype,
    shapes: [(usize, usize); N],
    data_bytes: usize,
) -> Result<[(Layout, usize, usize); N], &'static str> {
    if footer[..8] != MAGIC {
        return Err("it is no file of packed weights, or of another version");
    }
    if crc32c(&footer[12..]) != u32_at(footer, 8) {
        return Err("its footer does not match its sum");
    }
    let key_bytes = usize::from(u16_at(footer, 16));
    if footer.get(KEY_AT..KEY_AT + key_bytes) != Some(key.as_bytes()) {
        return Err("it holds other weights than its name says");
    }
    if usize::from(u16_at(footer, 18)) != N {
        return Err("it holds another number of matrices");
    }
    let mut places = [(Layout::RowMajor, 0, 0); N];
    for (i, (place, (n, k))) in places.iter_mut().zip(shapes).enumerate() {
        let layout = Layout::from_code(footer[20 + i]).ok_or("it has an unknown layout")?;
        let [start, len, rows, inputs] = std::array::from_fn(|field| u64_at(footer, 24 + 32 * i + 8 * field));
        if (rows, inputs) != (n as u64, k as u64) || len != packed_bytes(layout, dtype, n, k) as u64 {
            return Err("its matrices have other shapes");
        }
        let end = start.checked_add(len).ok_or("a matrix lies outside of it")?;
        if end > data_bytes as u64 || !start.is_multiple_of(LINE_BYTES as u64) {
            return Err("a matrix lies outside of it");
        }
        *place = (layout, start as usize, len as usize);
    }
    Ok(places)
}

/// Writes a file beside its place and renames it there.
fn write(file: &Path, key: &str, matrices: &[Matrix]) -> Result<(), PackedError> {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let count = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let beside = file.with_extension(format!("{}-{count}.{UNFINISHED}", std::process::id()));
    let written = write_new(&beside, key, matrices).and_then(|()| fs::rename(&beside, file));
    written.map_err(|source| {
        // What is half written serves nobody; that it cannot be removed either adds nothing.
        let _ = fs::remove_file(&beside);
        PackedError::Io { file: file.to_owned(), source }
    })
}

fn write_new(file: &Path, key: &str, matrices: &[Matrix]) -> io::Result<()> {
    if key.len() > FOOTER_BYTES - KEY_AT || matrices.len() > MATRICES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the footer has no room for it"));
    }
    let mut footer = [0u8; FOOTER_BYTES];
    let mut put = |at: usize, bytes: &[u8]| footer[at..at + bytes.len()].copy_from_slice(bytes);
    let mut out = File::create_new(file)?;
    let (mut end, mut sum) = (0usize, Digest::new(CrcAlgorithm::Crc32Iscsi));
    for (i, matrix) in matrices.iter().enumerate() {
        let data = matrix.data.as_slice();
        put(20 + i, &[matrix.layout.code()]);
        for (field, value) in [end, data.len(), matrix.n, matrix.k].into_iter().enumerate() {
            put(24 + 32 * i + 8 * field, &(value as u64).to_le_bytes());
        }
        let padding = &[0u8; LINE_BYTES][..data.len().next_multiple_of(LINE_BYTES) - data.len()];
        for part in [data, padding] {
            out.write_all(part)?;
            sum.update(part);
            end += part.len();
        }
    }
    put(0, &MAGIC);
    put(12, &(sum.finalize() as u32).to_le_bytes());
    put(16, &(key.len() as u16).to_le_bytes());
    put(18, &(matrices.len() as u16).to_le_bytes());
    put(KEY_AT, key.as_bytes());
    let sum = crc32c(&footer[12..]);
    footer[8..12].copy_from_slice(&sum.to_le_bytes());
    out.write_all(&footer)
}

/// Removes what was left half written long ago. Whatever cannot be removed is left: it is only in the way.
fn remove_abandoned(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let age = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        if path.extension().is_some_and(|e| e == UNFINISHED) && age().is_some_and(|age| age > ABANDONED_AFTER) {
            let _ = fs::remove_file(&path);
        }
    }
}

fn u16_at(footer: &[u8; FOOTER_BYTES], at: usize) -> u16 {
    u16::from_le_bytes([footer[at], footer[at + 1]])
}

fn u32_at(footer: &[u8; FOOTER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| footer[at + i]))
}

fn u64_at(footer: &[u8; FOOTER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| footer[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, CpuOptions};
    use crate::reference::Reference;

    const N: usize = 48;
    const K: usize = 34;

    fn backends(dtype: Dtype) -> [Arc<dyn Compute>; 2] {
        let cpu = Cpu::new(CpuOptions { dtype, threads: 1, isa: None, bind_from: None }).unwrap();
        [Arc::new(cpu), Arc::new(Reference::new(dtype))]
    }

    fn values(seed: u32) -> Vec<u8> {
        (0..(N * K) as u32).flat_map(|i| ((i * 37 + seed) as f32 * 0.01).to_le_bytes()).collect()
    }

    fn view(n: usize, k: usize, bytes: &[u8]) -> MatrixView<'_> {
        MatrixView { dtype: Dtype::F32, n, k, bytes }
    }

    fn is_mapped(matrix: &Matrix) -> bool {
        matches!(matrix.data, Weights::Mapped { .. })
    }

    fn entry(packer: &Packer, name: &str) -> PathBuf {
        packer.cache.as_ref().unwrap().dir.join(format!("{name}.pack"))
    }

    #[test]
    fn what_was_packed_before_is_mapped_with_the_same_bytes() {
        let root = tempfile::tempdir().unwrap();
        for compute in [Dtype::F32, Dtype::Bf16].into_iter().flat_map(backends) {
            let (gate, up, down) = (values(1), values(2), values(3));
            let ffn = |packer: &Packer| packer.pack_ffn("e", view(N, K, &gate), view(N, K, &up), view(K, N, &down));
            let stacked = |packer: &Packer| packer.pack("m", &[view(N, K, &gate), view(N, K, &up)]);
            let plain = Packer::new(compute.clone());
            for _ in 0..2 {
                let packer = Packer::with_cache(compute.clone(), root.path(), "c0ffee").unwrap();
                for (kept, fresh) in [
                    (&stacked(&packer), &stacked(&plain)),
                    (&ffn(&packer).gate_up, &ffn(&plain).gate_up),
                    (&ffn(&packer).down, &ffn(&plain).down),
                ] {
                    assert!(is_mapped(kept) && !is_mapped(fresh));
                    assert_eq!(
                        (kept.n, kept.k, kept.dtype, kept.layout),
                        (fresh.n, fresh.k, fresh.dtype, fresh.layout)
                    );
                    assert_eq!(kept.data.as_slice(), fresh.data.as_slice());
                    assert_eq!(kept.data.as_slice().as_ptr() as usize % LINE_BYTES, 0);
                }
            }
        }
        let folders = fs::read_dir(root.path()).unwrap().count();
        assert_eq!(folders, 4, "each layout and dtype has its own");
    }

    #[test]
    fn what_does_not_fill_huge_pages_of_a_file_is_copied_from_it() {
        let root = tempfile::tempdir().unwrap();
        let [cpu, _] = backends(Dtype::Bf16);
        let (n, k) = (512, HUGE_PAGE_BYTES / 2 / 1024);
        let bytes: Vec<u8> = (0..(n * k) as u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let packer = Packer::with_cache(cpu.clone(), root.path(), "1").unwrap();
        let view = || view(n, k, &bytes);
        let fresh = Packer::new(cpu).pack_ffn("", view(), view(), MatrixView { n: k, k: n, ..view() });
        for _ in 0..2 {
            let kept = packer.pack_ffn("e", view(), view(), MatrixView { n: k, k: n, ..view() });
            assert_eq!((kept.gate_up.bytes(), kept.down.bytes()), (HUGE_PAGE_BYTES, HUGE_PAGE_BYTES / 2));
            assert!(is_mapped(&kept.gate_up) && !is_mapped(&kept.down));
            assert_eq!(kept.gate_up.data.as_slice(), fresh.gate_up.data.as_slice());
            assert_eq!(kept.down.data.as_slice(), fresh.down.data.as_slice());
        }
    }

    #[test]
    fn a_second_start_does_not_read_the_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        let [cpu, _] = backends(Dtype::Bf16);
        let packer = Packer::with_cache(cpu, root.path(), "1").unwrap();
        let right = values(1);
        let first = packer.pack("m", &[view(N, K, &right)]);
        // Other bytes under the same name: only a packer that reads them would show it.
        let second = packer.pack("m", &[view(N, K, &values(9))]);
        assert_eq!(first.data.as_slice(), second.data.as_slice());
    }

    #[test]
    fn any_damaged_byte_is_found_and_the_file_made_anew() {
        let root = tempfile::tempdir().unwrap();
        let [cpu, _] = backends(Dtype::Bf16);
        let packer = Packer::with_cache(cpu, root.path(), "1").unwrap();
        let bytes = values(5);
        let right = packer.pack("m", &[view(N, K, &bytes)]);
        let file = entry(&packer, "m");
        let whole = fs::read(&file).unwrap();
        let ends = [whole.len() - 1, whole.len() - FOOTER_BYTES, FOOTER_BYTES - 1, 1, 0].into_iter();
        let shorter = ends.map(|len| whole[..len].to_vec());
        let flipped = (0..whole.len()).filter(|at| at % 97 == 0 || *at >= whole.len() - FOOTER_BYTES).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            bytes
        });
        for damaged in shorter.chain(flipped) {
            // As a writer would: beside, then renamed, for the file is mapped.
            let beside = root.path().join("beside");
            fs::write(&beside, &damaged).unwrap();
            fs::rename(&beside, &file).unwrap();
            let again = packer.pack("m", &[view(N, K, &bytes)]);
            assert_eq!(again.data.as_slice(), right.data.as_slice());
            assert_eq!(fs::read(&file).unwrap(), whole, "the file is whole again");
        }
    }

    #[test]
    fn a_sound_file_of_other_weights_is_not_taken() {
        let root = tempfile::tempdir().unwrap();
        let [cpu, _] = backends(Dtype::Bf16);
        let packer = Packer::with_cache(cpu, root.path(), "1").unwrap();
        let (a, b) = (values(1), values(2));
        packer.pack("a", &[view(N, K, &a)]);
        fs::copy(entry(&packer, "a"), entry(&packer, "b")).unwrap();
        let taken = packer.pack("b", &[view(N, K, &b)]);
        assert_eq!(
            taken.data.as_slice(),
            Packer::new(packer.compute.clone()).pack("", &[view(N, K, &b)]).data.as_slice()
        );
        // Under the right name, but of another shape.
        let other = packer.pack("a", &[view(K, N, &a)]);
        assert_eq!((other.n, other.k), (K, N));
    }

    #[test]
    fn a_cache_that_cannot_be_written_costs_no_weights() {
        let root = tempfile::tempdir().unwrap();
        let [cpu, _] = backends(Dtype::Bf16);
        let packer = Packer::with_cache(cpu, root.path(), "1").unwrap();
        fs::remove_dir_all(&packer.cache.as_ref().unwrap().dir).unwrap();
        let bytes = values(5);
        let matrix = packer.pack("m", &[view(N, K, &bytes)]);
        assert!(!is_mapped(&matrix));
        assert_eq!(
            matrix.data.as_slice(),
            Packer::new(packer.compute.clone()).pack("", &[view(N, K, &bytes)]).data.as_slice()
        );
    }

    #[test]
    fn only_what_was_abandoned_long_ago_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let [cpu, _] = backends(Dtype::F32);
        let dir = Packer::with_cache(cpu.clone(), root.path(), "1").unwrap().cache.unwrap().dir;
        let [fresh, old] = ["m.1-0.unfinished", "m.1-1.unfinished"].map(|name| dir.join(name));
        for file in [&fresh, &old] {
            fs::write(file, "half").unwrap();
        }
        let long_ago = std::time::SystemTime::now() - 2 * ABANDONED_AFTER;
        File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
        Packer::with_cache(cpu, root.path(), "1").unwrap();
        assert!(fresh.exists() && !old.exists());
    }
}
