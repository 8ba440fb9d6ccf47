//! Storage aligned to cache lines, zeroed, and lazily committed by the system.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
#[cfg(target_os = "linux")]
use std::sync::{Mutex, PoisonError};

use memmap2::MmapMut;

use crate::KernelError;

/// Alignment of every buffer: a cache line, and a full SIMD register.
pub(crate) const LINE_BYTES: usize = 64;
/// Weights are asked to lie in huge pages: at one row a GEMM walks all of them, and a TLB miss every 4 KiB costs about a tenth
/// of the bandwidth.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Address space that weights are taken from one after another. With a mapping for each, the last part of each, up to a huge
/// page, would lie in small ones.
const REGION_BYTES: usize = 64 << 20;
/// Weights below this would keep more of a huge page than they use when their neighbours go.
pub(crate) const REGION_PART_MIN: usize = HUGE_PAGE_BYTES / 4;
/// What weights are rounded up to in a region: a page, however large the system's are.
const PAGE_BYTES: usize = 64 << 10;
/// What is of at least this size has a mapping of its own if it comes and goes, which the system has back as soon as it is
/// dropped: an allocator keeps what experts leave behind that move to other nodes, and what the rows of a burst needed.
const MAPPED_BYTES_MIN: usize = 64 << 10;

/// Zeroed bytes, [`LINE_BYTES`] aligned.
pub(crate) struct AlignedBuf {
    storage: Storage,
    start: NonNull<u8>,
    len: usize,
}

enum Storage {
    None,
    Allocated(NonNull<u8>, Layout),
    Mapped(#[allow(dead_code, reason = "held to be unmapped when it is dropped")] MmapMut),
    /// Whole pages of a region, so many bytes: unmapped when dropped.
    #[cfg(target_os = "linux")]
    Part(usize),
}

/// What is left of the region that weights are taken from.
#[cfg(target_os = "linux")]
struct Region {
    start: NonNull<u8>,
    left: usize,
}

#[cfg(target_os = "linux")]
// SAFETY: pages that nobody else refers to.
unsafe impl Send for Region {}

#[cfg(target_os = "linux")]
static REGION: Mutex<Option<Region>> = Mutex::new(None);

#[cfg(target_os = "linux")]
impl Region {
    fn new(len: usize) -> Result<Region, KernelError> {
        let memory = || KernelError::Memory { bytes: len };
        let total = len.checked_add(HUGE_PAGE_BYTES).ok_or_else(memory)?;
        let mut map = MmapMut::map_anon(total).map_err(|_| memory())?;
        let base = NonNull::new(map.as_mut_ptr()).ok_or_else(memory)?;
        // Its parts are unmapped one by one.
        std::mem::forget(map);
        let skip = base.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // SAFETY: skip is at most what was mapped beyond `len`; what lies before and after is ours and is not referred to. The
        // advice changes no contents, and a refusal (a kernel without huge pages) is harmless, so its result is not needed.
        unsafe {
            let start = base.add(skip);
            unmap(base, skip);
            unmap(start.add(len), HUGE_PAGE_BYTES - skip);
            libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
            Ok(Region { start, left: len })
        }
    }

    /// Its first `bytes`, which it has.
    fn take(&mut self, bytes: usize) -> NonNull<u8> {
        assert!(bytes <= self.left, "more than is left of a region");
        let taken = self.start;
        // SAFETY: inside of what is mapped, or at its end.
        self.start = unsafe { taken.add(bytes) };
        self.left -= bytes;
        taken
    }
}

#[cfg(target_os = "linux")]
impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: pages that nobody refers to.
        unsafe { unmap(self.start, self.left) }
    }
}

/// # Safety
/// Whole pages of a mapping, to which nothing refers.
#[cfg(target_os = "linux")]
unsafe fn unmap(start: NonNull<u8>, len: usize) {
    if len > 0 {
        // SAFETY: the caller's promise. It fails where no mapping more can be had, of which this may need one: pages stay then.
        unsafe { libc::munmap(start.as_ptr().cast(), len) };
    }
}

// SAFETY: the buffer owns plain bytes; nothing in it is tied to a thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads; writing takes `&mut self`.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Result<AlignedBuf, KernelError> {
        AlignedBuf::with_alignment(len, LINE_BYTES)
    }

    /// No bytes.
    pub const fn empty() -> AlignedBuf {
        // SAFETY: the constant is not zero.
        let start = unsafe { NonNull::new_unchecked(std::ptr::without_provenance_mut(LINE_BYTES)) };
        AlignedBuf { storage: Storage::None, start, len: 0 }
    }

    /// `len` zero bytes that the system has back when they are dropped, if they are many.
    pub fn passing(len: usize) -> Result<AlignedBuf, KernelError> {
        if len < MAPPED_BYTES_MIN {
            return AlignedBuf::zeroed(len);
        }
        let memory = || KernelError::Memory { bytes: len };
        let mut map = MmapMut::map_anon(len).map_err(|_| memory())?;
        let start = NonNull::new(map.as_mut_ptr()).ok_or_else(memory)?;
        Ok(AlignedBuf { storage: Storage::Mapped(map), start, len })
    }

    /// As [`AlignedBuf::passing`], for bytes that will be written at once and read often.
    pub fn for_weights(len: usize) -> Result<AlignedBuf, KernelError> {
        #[cfg(target_os = "linux")]
        if len >= REGION_PART_MIN {
            let whole = len.checked_next_multiple_of(PAGE_BYTES).ok_or(KernelError::Memory { bytes: len })?;
            let part = |start| AlignedBuf { storage: Storage::Part(whole), start, len };
            if whole > REGION_BYTES / 2 {
                return Ok(part(Region::new(whole)?.take(whole)));
            }
            let mut region = REGION.lock().unwrap_or_else(PoisonError::into_inner);
            if region.as_ref().is_none_or(|region| region.left < whole) {
                *region = Some(Region::new(REGION_BYTES)?);
            }
            return Ok(part(region.as_mut().expect("there is one now").take(whole)));
        }
        AlignedBuf::passing(len)
    }

    // Over-allocates and aligns by hand: the allocator zeroes large plain requests lazily (fresh pages), but writes
    // through aligned ones, which would commit a whole KV cache at start.
    fn with_alignment(len: usize, align: usize) -> Result<AlignedBuf, KernelError> {
        if len == 0 {
            return Ok(AlignedBuf::empty());
        }
        let memory = || KernelError::Memory { bytes: len };
        let total = len.checked_add(align).ok_or_else(memory)?;
        let layout = Layout::from_size_align(total, 16).map_err(|_| memory())?;
        // SAFETY: the layout's size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(memory)?;
        let skip = base.as_ptr().align_offset(align);
        // SAFETY: skip < align, and len + align bytes were allocated.
        let start = unsafe { base.add(skip) };
        Ok(AlignedBuf { storage: Storage::Allocated(base, layout), start, len })
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: start..start+len lies in the live allocation (or is empty) and is initialised.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        match self.storage {
            // SAFETY: allocated in `with_alignment` with this layout, freed once.
            Storage::Allocated(base, layout) => unsafe { dealloc(base.as_ptr(), layout) },
            #[cfg(target_os = "linux")]
            // SAFETY: pages that were taken for this buffer alone, unmapped once.
            Storage::Part(bytes) => unsafe { unmap(self.start, bytes) },
            Storage::None | Storage::Mapped(_) => {}
        }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_writable_to_the_last_byte() {
        let sizes = [MAPPED_BYTES_MIN, MAPPED_BYTES_MIN + 1, REGION_PART_MIN, HUGE_PAGE_BYTES + 5, REGION_BYTES + 1];
        for len in [0, 1, 63, 64, 4097].into_iter().chain(sizes) {
            let mut buf = AlignedBuf::for_weights(len).unwrap();
            assert_eq!(buf.as_slice().as_ptr() as usize % LINE_BYTES, 0);
            assert_eq!(buf.len(), len);
            assert!(buf.as_slice().iter().all(|&byte| byte == 0));
            buf.as_mut_slice().fill(7);
            assert!(buf.as_slice().iter().all(|&byte| byte == 7));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn weights_lie_next_to_each_other_and_leave_memory_alone() {
        let bytes = REGION_BYTES / 8;
        let bufs: Vec<AlignedBuf> = (1..=17)
            .map(|byte| {
                let mut buf = AlignedBuf::for_weights(bytes - 1).unwrap();
                buf.as_mut_slice().fill(byte);
                buf
            })
            .collect();
        // Eight fit a region: some of them follow each other, whoever else takes weights meanwhile.
        let address = |buf: &AlignedBuf| buf.as_slice().as_ptr() as usize;
        assert!(bufs.windows(2).any(|pair| address(&pair[0]) + bytes == address(&pair[1])));
        let (mut kept, mut left) = (Vec::new(), Vec::new());
        for (index, buf) in bufs.into_iter().enumerate() {
            if index % 2 == 0 { kept.push((index as u8 + 1, buf)) } else { left.push(buf) }
        }
        let places: Vec<*const u8> = left.iter().map(|buf| buf.as_slice().as_ptr()).collect();
        assert!(places.iter().all(|&at| is_resident(at)));
        drop(left);
        // Others may have mapped something there since, but not everywhere.
        let still = places.iter().filter(|&&at| is_resident(at)).count();
        assert!(still <= places.len() / 2, "{still} of {} that were dropped are still in memory", places.len());
        assert!(kept.iter().all(|(byte, buf)| buf.as_slice().iter().all(|here| here == byte)));
    }

    /// Whether the page at `at` is mapped and has memory.
    #[cfg(target_os = "linux")]
    fn is_resident(at: *const u8) -> bool {
        let mut state = 0u8;
        // SAFETY: asks about one page, and writes one byte; an address that is not mapped is an error.
        let asked = unsafe { libc::mincore(at.cast_mut().cast(), 1, &raw mut state) };
        asked == 0 && state & 1 == 1
    }

    #[test]
    fn more_than_the_address_space_is_an_error() {
        assert!(matches!(AlignedBuf::zeroed(usize::MAX - 8), Err(KernelError::Memory { .. })));
    }
}
