//! Storage aligned to cache lines, zeroed, and lazily committed by the system.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

use crate::KernelError;

/// Alignment of every buffer: a cache line, and a full SIMD register.
pub(crate) const LINE_BYTES: usize = 64;
/// Weights are asked to lie in huge pages: at one row a GEMM walks all of them, and a TLB miss every 4 KiB costs about a tenth
/// of the bandwidth.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// What is given back to the system, at least.
const PAGE_BYTES: usize = 4 << 10;
/// Address space that weights are taken from one after another: an expert's own end would leave up to a huge page of small ones.
const REGION_BYTES: usize = 64 << 20;
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
    /// Whole pages of it.
    Part(#[allow(dead_code, reason = "held to be unmapped with the last part")] Arc<Region>),
}

/// Where weights lie, next to each other. Nothing that was given back is taken again: it is unmapped with its last part.
struct Region {
    start: NonNull<u8>,
    len: usize,
    #[allow(dead_code, reason = "held to be unmapped when it is dropped")]
    map: MmapMut,
}

// SAFETY: parts do not overlap, and each is one buffer's.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// The region that weights are taken from, and how much of it is taken.
static REGION: Mutex<Option<(Arc<Region>, usize)>> = Mutex::new(None);

impl Region {
    fn new(len: usize) -> Result<Region, KernelError> {
        let (map, start) = mapped(len, HUGE_PAGE_BYTES)?;
        #[cfg(target_os = "linux")]
        // SAFETY: the range is inside our own mapping, and the advice changes no contents. A refusal (a kernel without huge
        // pages) is harmless, so its result is not needed.
        unsafe {
            libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
        }
        Ok(Region { start, len, map })
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
        let (map, start) = mapped(len, LINE_BYTES)?;
        Ok(AlignedBuf { storage: Storage::Mapped(map), start, len })
    }

    /// As [`AlignedBuf::passing`], for bytes that will be written at once and read often.
    pub fn for_weights(len: usize) -> Result<AlignedBuf, KernelError> {
        if len < MAPPED_BYTES_MIN {
            return AlignedBuf::zeroed(len);
        }
        let whole = len.checked_next_multiple_of(PAGE_BYTES).ok_or(KernelError::Memory { bytes: len })?;
        if whole > REGION_BYTES / 2 {
            return Ok(AlignedBuf::part(Arc::new(Region::new(whole)?), 0, len));
        }
        let mut current = REGION.lock().unwrap_or_else(PoisonError::into_inner);
        let (region, from) = match current.take() {
            Some((region, taken)) if region.len - taken >= whole => (region, taken),
            _ => (Arc::new(Region::new(REGION_BYTES)?), 0),
        };
        *current = Some((region.clone(), from + whole));
        Ok(AlignedBuf::part(region, from, len))
    }

    // Pages from `from` on that nobody else has.
    fn part(region: Arc<Region>, from: usize, len: usize) -> AlignedBuf {
        assert!(from <= region.len && len <= region.len - from, "a part outside of its region");
        // SAFETY: inside the region's mapping as checked.
        let start = unsafe { region.start.add(from) };
        AlignedBuf { storage: Storage::Part(region), start, len }
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
            // SAFETY: whole pages of the region that are this buffer's alone and that nothing refers to any more. The system
            // may refuse, which keeps them until the region goes.
            Storage::Part(_) => unsafe {
                libc::madvise(self.start.as_ptr().cast(), self.len.next_multiple_of(PAGE_BYTES), libc::MADV_DONTNEED);
            },
            _ => {}
        }
    }
}

// Zeroed bytes of a mapping of their own. Over-maps and aligns by hand, if a page's alignment is not enough.
fn mapped(len: usize, align: usize) -> Result<(MmapMut, NonNull<u8>), KernelError> {
    let memory = || KernelError::Memory { bytes: len };
    let total = if align > LINE_BYTES { len.checked_add(align).ok_or_else(memory)? } else { len };
    let mut map = MmapMut::map_anon(total).map_err(|_| memory())?;
    let base = NonNull::new(map.as_mut_ptr()).ok_or_else(memory)?;
    let skip = base.as_ptr().align_offset(align);
    // SAFETY: skip is 0 for an alignment that pages have, else less than align, and len + align bytes were mapped.
    Ok((map, unsafe { base.add(skip) }))
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
        for len in [0, 1, 63, 64, 4097, MAPPED_BYTES_MIN, MAPPED_BYTES_MIN + 1, HUGE_PAGE_BYTES + 5] {
            let mut buf = AlignedBuf::for_weights(len).unwrap();
            assert_eq!(buf.as_slice().as_ptr() as usize % LINE_BYTES, 0);
            assert_eq!(buf.len(), len);
            assert!(buf.as_slice().iter().all(|&byte| byte == 0));
            buf.as_mut_slice().fill(7);
            assert!(buf.as_slice().iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn weights_lie_next_to_each_other_and_go_back_to_the_system_alone() {
        let buf = |byte| {
            let mut buf = AlignedBuf::for_weights(REGION_BYTES / 4 - PAGE_BYTES + 1).unwrap();
            buf.as_mut_slice().fill(byte);
            buf
        };
        let bufs: Vec<AlignedBuf> = (1..=9).map(buf).collect();
        for (byte, buf) in (1..=9).zip(&bufs) {
            assert!(buf.as_slice().iter().all(|&here| here == byte));
        }
        // Four fit a region: of nine in a row, whoever else takes weights meanwhile, some lie next to each other.
        let ends_where_next_begins = |pair: &[AlignedBuf]| {
            pair[0].as_slice().as_ptr() as usize + REGION_BYTES / 4 == pair[1].as_slice().as_ptr() as usize
        };
        let (first, second) = bufs.split_at(4);
        assert!(bufs.windows(2).any(ends_where_next_begins));
        assert!(first.iter().chain(second).all(|buf| buf.as_slice().as_ptr() as usize % PAGE_BYTES == 0));
        let mut kept = Vec::new();
        for (index, buf) in bufs.into_iter().enumerate() {
            if index % 2 == 0 {
                kept.push((index as u8 + 1, buf));
            } else {
                let at = buf.as_slice().as_ptr();
                drop(buf);
                assert!(!is_resident(at), "what was dropped is still in memory");
            }
        }
        assert!(kept.iter().all(|(byte, buf)| buf.as_slice().iter().all(|here| here == byte)));
    }

    /// Whether the page at `at` has memory.
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
