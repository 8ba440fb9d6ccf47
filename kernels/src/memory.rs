//! Storage aligned to cache lines, zeroed, and lazily committed by the system.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use memmap2::MmapMut;

use crate::KernelError;

/// Alignment of every buffer: a cache line, and a full SIMD register.
pub(crate) const LINE_BYTES: usize = 64;
/// Weights of at least this size are aligned to, and asked to lie in, huge pages: at one row a GEMM walks all of them,
/// and a TLB miss every 4 KiB costs about a tenth of the bandwidth.
const HUGE_PAGE_BYTES: usize = 2 << 20;
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
        if len < MAPPED_BYTES_MIN { AlignedBuf::zeroed(len) } else { AlignedBuf::mapped(len, LINE_BYTES) }
    }

    /// As [`AlignedBuf::passing`], for bytes that will be written at once and read often.
    pub fn for_weights(len: usize) -> Result<AlignedBuf, KernelError> {
        if len < HUGE_PAGE_BYTES {
            return AlignedBuf::passing(len);
        }
        let buf = AlignedBuf::mapped(len, HUGE_PAGE_BYTES)?;
        #[cfg(target_os = "linux")]
        // SAFETY: the range is whole pages inside our own mapping, and the advice changes no contents. A refusal (a kernel
        // without huge pages) is harmless, so its result is not needed.
        unsafe {
            libc::madvise(buf.start.as_ptr().cast(), len - len % HUGE_PAGE_BYTES, libc::MADV_HUGEPAGE);
        }
        Ok(buf)
    }

    // Over-maps and aligns by hand, if a page's alignment is not enough.
    fn mapped(len: usize, align: usize) -> Result<AlignedBuf, KernelError> {
        let memory = || KernelError::Memory { bytes: len };
        let total = if align > LINE_BYTES { len.checked_add(align).ok_or_else(memory)? } else { len };
        let mut map = MmapMut::map_anon(total).map_err(|_| memory())?;
        let base = NonNull::new(map.as_mut_ptr()).ok_or_else(memory)?;
        let skip = base.as_ptr().align_offset(align);
        // SAFETY: skip is 0 for an alignment that pages have, else less than align, and len + align bytes were mapped.
        let start = unsafe { base.add(skip) };
        Ok(AlignedBuf { storage: Storage::Mapped(map), start, len })
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
        if let Storage::Allocated(base, layout) = self.storage {
            // SAFETY: allocated in `with_alignment` with this layout, freed once.
            unsafe { dealloc(base.as_ptr(), layout) }
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
    fn more_than_the_address_space_is_an_error() {
        assert!(matches!(AlignedBuf::zeroed(usize::MAX - 8), Err(KernelError::Memory { .. })));
    }
}
