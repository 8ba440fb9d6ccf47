//! Bodies that a process of this host reads where they are: no copy on the sender's side, one on the receiver's, and no
//! queue in between.
//!
//! The sender has UCX make memory that it can share (`ucp_mem_map` with `UCP_MEM_MAP_ALLOCATE`), once and of a fixed size, and
//! sends, in place of a body that lies there, what the receiver finds it by; the receiver attaches the memory the first time
//! (`ucp_ep_rkey_unpack`, `ucp_rkey_ptr`), copies the body out, and checks the copy. The sender keeps the body until the frame is
//! acknowledged. If the channel ends before that, the sender writes other frames there, perhaps while the receiver copies: so the
//! memory begins with stamps, one for each page, and that of a body's first page says to which channel it is lent: a copy counts
//! only if the stamp is still that channel's afterwards.
//! A process that dies leaves its memory to those who have attached it, and nothing behind.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use ucx_sys as sys;

use super::inbox::Token;
use super::library::{Context, UcxError, check};
use crate::buffer::{BODY_ALIGN, Shared, TakeShared};

/// Bytes of a key at most: where in the memory the body is, the memory's address and length, then what UCX packs, which for
/// memory of one host is some thirty bytes.
pub const KEY_BYTES_MAX: usize = 128;
/// Bytes of a key that say where the body is: the number of its first page. All that a peer needs that has attached the memory;
/// with so few UCX writes a frame's message into a place of its queue, and a longer one beside it.
pub const PLACE_BYTES: usize = 4;
/// Bytes of what names the memory, before what UCX packs.
const EXTENT_BYTES: usize = 16;
/// Bytes of a stamp.
const STAMP_BYTES: usize = 8;
/// The stamp of a page where no body begins that anybody may read.
const NOT_LENT: u64 = 0;
/// What follows a packed key when it is unpacked, so that one that says more than it has is read to its end within it: UCX takes
/// no length, and reads at most a byte and so many bytes more for each of 64 domains.
const PACKED_BYTES_MAX: usize = 64 * 256 + 64;
/// Bytes of the memory that a process shares: all of it is there from the first body on, here and with each peer, so that no
/// burst makes either grow. What finds no room in it is copied.
const SHARED_BYTES: usize = 16 << 20;
/// What it is handed out in. Part of the protocol: where a body's stamp is follows from it.
const PAGE_BYTES: usize = 4096;
const PAGES: usize = SHARED_BYTES / PAGE_BYTES;
/// Pages that have the stamps.
const STAMP_PAGES: usize = (PAGES * STAMP_BYTES).div_ceil(PAGE_BYTES);

/// Memory of ours that others can attach.
struct Region {
    context: Arc<Context>,
    memory: sys::ucp_mem_h,
    start: *mut u8,
    /// What names it to others.
    name: Vec<u8>,
    pages: Mutex<Pages>,
}

// SAFETY: owned memory and a handle without ties to a thread, of a context that is set up for several threads.
unsafe impl Send for Region {}
// SAFETY: as above; shared references only hand out pages, each to one owner.
unsafe impl Sync for Region {}

impl Region {
    /// [`SHARED_BYTES`], zeroed.
    fn new(context: Arc<Context>) -> Result<Self, UcxError> {
        use sys::ucp_mem_map_params_field as field;
        let ucp = &context.ucp;
        // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
        let mut params: sys::ucp_mem_map_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from((field::UCP_MEM_MAP_PARAM_FIELD_LENGTH | field::UCP_MEM_MAP_PARAM_FIELD_FLAGS).0);
        params.length = SHARED_BYTES;
        params.flags = sys::UCP_MEM_MAP_ALLOCATE.0;
        let mut memory: sys::ucp_mem_h = std::ptr::null_mut();
        // SAFETY: a live context, parameters that outlive the call and name what is set, a place to write to.
        let status = unsafe { ucp.ucp_mem_map(context.raw, &raw const params, &raw mut memory) };
        check(ucp, "ucp_mem_map", status)?;
        let pages = Mutex::new(Pages::new(STAMP_PAGES..PAGES));
        let mut region = Self { memory, start: std::ptr::null_mut(), name: Vec::new(), pages, context };
        let ucp = &region.context.ucp;
        // SAFETY: as above.
        let mut attr: sys::ucp_mem_attr_t = unsafe { std::mem::zeroed() };
        attr.field_mask = u64::from(
            (sys::ucp_mem_attr_field::UCP_MEM_ATTR_FIELD_ADDRESS | sys::ucp_mem_attr_field::UCP_MEM_ATTR_FIELD_LENGTH)
                .0,
        );
        // SAFETY: a live handle, and a place to write to whose mask names what it asks for.
        check(ucp, "ucp_mem_query", unsafe { ucp.ucp_mem_query(memory, &raw mut attr) })?;
        let (mut packed, mut packed_bytes) = (std::ptr::null_mut::<c_void>(), 0_usize);
        // SAFETY: a live context and handle, places to write to.
        let status = unsafe { ucp.ucp_rkey_pack(region.context.raw, memory, &raw mut packed, &raw mut packed_bytes) };
        check(ucp, "ucp_rkey_pack", status)?;
        for word in [attr.address as u64, SHARED_BYTES as u64] {
            region.name.extend_from_slice(&word.to_le_bytes());
        }
        // SAFETY: on success, so many readable bytes until they are released below.
        region.name.extend_from_slice(unsafe { std::slice::from_raw_parts(packed.cast::<u8>(), packed_bytes) });
        // SAFETY: got from this library above, released once.
        unsafe { ucp.ucp_rkey_buffer_release(packed) };
        let unfit = |reason: String| UcxError::NoMemory { bytes: SHARED_BYTES, reason };
        if attr.length < SHARED_BYTES || attr.address.is_null() || !attr.address.addr().is_multiple_of(BODY_ALIGN) {
            return Err(unfit(format!("UCX made {} bytes at {:p}", attr.length, attr.address)));
        }
        if PLACE_BYTES + region.name.len() > KEY_BYTES_MAX {
            return Err(unfit(format!("its key has {packed_bytes} bytes")));
        }
        region.start = attr.address.cast();
        // Fresh from the system it is zero, but nobody promises that; and now all of it is there.
        // SAFETY: so many bytes of this process, which nobody else knows of yet.
        unsafe { region.start.write_bytes(0, SHARED_BYTES) };
        Ok(region)
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        // Nothing in here panics halfway through a change.
        self.pages.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Room for a body of `bytes`, if there is any.
    fn take(self: &Arc<Self>, bytes: usize) -> Option<Body> {
        let count = bytes.div_ceil(PAGE_BYTES);
        let page = self.pages().take(count)?;
        let mut key = Vec::with_capacity(PLACE_BYTES + self.name.len());
        key.extend_from_slice(&(page as u32).to_le_bytes());
        key.extend_from_slice(&self.name);
        Some(Body { region: Arc::clone(self), page, count, bytes, key })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: made by ucp_mem_map of this context, not used again.
        let status = unsafe { self.context.ucp.ucp_mem_unmap(self.context.raw, self.memory) };
        if let Err(error) = check(&self.context.ucp, "ucp_mem_unmap", status) {
            tracing::warn!(%error, bytes = SHARED_BYTES, "cannot give shared memory back");
        }
    }
}

/// Which pages of a region are free.
struct Pages {
    /// Runs of them, as long as they can be: how many from which on.
    free: BTreeMap<usize, usize>,
}

impl Pages {
    /// These are.
    fn new(pages: Range<usize>) -> Self {
        Self { free: BTreeMap::from([(pages.start, pages.len())]) }
    }

    /// The first of `count` pages in a row, from where the first are that are free: those are the most likely to be in a cache.
    fn take(&mut self, count: usize) -> Option<usize> {
        let (at, free) = self.free.iter().map(|(at, free)| (*at, *free)).find(|(_, free)| *free >= count)?;
        self.free.remove(&at);
        if free > count {
            self.free.insert(at + count, free - count);
        }
        Some(at)
    }

    /// `count` pages from `at` on, which were taken, are free again.
    fn give_back(&mut self, at: usize, count: usize) {
        let after = self.free.remove(&(at + count)).unwrap_or(0);
        match self.free.range_mut(..at).next_back() {
            Some((before, free)) if before + *free == at => *free += count + after,
            _ => {
                self.free.insert(at, count + after);
            }
        }
    }
}

/// Room for a body in a region.
struct Body {
    region: Arc<Region>,
    /// The first of its pages.
    page: usize,
    /// How many are its own.
    count: usize,
    /// Of the body.
    bytes: usize,
    key: Vec<u8>,
}

impl Body {
    fn stamp(&self) -> &AtomicU64 {
        // SAFETY: within the region and aligned, of this process while the region is, and used as an atomic by everybody.
        unsafe { AtomicU64::from_ptr(self.region.start.add(self.page * STAMP_BYTES).cast()) }
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: within the region, as `Pages` hands out.
        unsafe { self.region.start.add(self.page * PAGE_BYTES) }
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes of this body's own pages, initialised when the region was made. Other processes only read them.
        unsafe { std::slice::from_raw_parts(self.start(), self.bytes) }
    }
}

impl DerefMut for Body {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably. While another process may read it, it belongs to the channel that lent it; what
        // the other reads after that channel's end does not count.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.bytes) }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.region.pages().give_back(self.page, self.count);
    }
}

impl Shared for Body {
    fn key(&self) -> &[u8] {
        &self.key
    }

    // The two ends of a sequence lock (Boehm, "Can seqlocks get along with programming language memory models?", 2012), of
    // which [`Borrowed::copy`] is the reader.

    fn lend(&self, to: u64) {
        self.stamp().store(to, Ordering::Release);
    }

    fn take_back(&self) {
        self.stamp().store(NOT_LENT, Ordering::Relaxed);
        // Whoever reads what is written to the body from now on finds the stamp gone.
        fence(Ordering::Release);
    }
}

/// Hands out memory of a region that `context` makes when the first body asks for it. If it cannot, there is none, and bodies are
/// copied.
pub fn taker(context: Arc<Context>) -> TakeShared {
    let made = OnceLock::new();
    Box::new(move |bytes| {
        let region = made.get_or_init(|| {
            let region = Region::new(Arc::clone(&context)).map(Arc::new);
            region.inspect_err(|error| tracing::info!(%error, "bodies for peers of this host are copied")).ok()
        });
        Some(Box::new(region.as_ref()?.take(bytes)?))
    })
}

/// A peer's memory, attached.
#[derive(Debug)]
struct Attached {
    /// What the peer names it by.
    name: Vec<u8>,
    key: sys::ucp_rkey_h,
    start: *const u8,
    bytes: usize,
}

/// What became of a body that a peer lends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// It was copied as the peer wrote it.
    Whole,
    /// The peer had given the channel up and taken the body back before the copy was done: it may be part of another.
    TakenBack,
}

/// The memory of one peer, once it is attached here.
#[derive(Debug, Default)]
pub struct Borrowed(Option<Attached>);

// SAFETY: handles and addresses without ties to a thread.
unsafe impl Send for Borrowed {}

impl Borrowed {
    /// Copies the beginning of the body in the memory that a peer's `key` names, or else in the one that is attached, to
    /// `body`; what it holds counts only if the body was still lent to the channel that we call `ours` afterwards.
    ///
    /// # Errors
    /// That it cannot be reached, with UCX's words.
    ///
    /// # Safety
    /// `endpoint` is a live endpoint to that peer, the same in every call, and [`Self::detach`] is called before it goes.
    pub unsafe fn copy(
        &mut self,
        ucp: &sys::Ucp,
        endpoint: sys::ucp_ep_h,
        key: &[u8],
        ours: Token,
        body: &mut [u8],
    ) -> Result<Fetched, UcxError> {
        let unfit = |reason: &str| UcxError::NoMemory { bytes: body.len(), reason: reason.to_owned() };
        let Some((place, name)) = key.split_first_chunk::<PLACE_BYTES>() else {
            return Err(unfit("a key too short"));
        };
        if !name.is_empty() && self.0.as_ref().is_none_or(|attached| attached.name != name) {
            self.detach(ucp);
            // SAFETY: the caller's promise.
            self.0 = Some(unsafe { attach(ucp, endpoint, name) }?);
        }
        let Some(memory) = self.0.as_ref() else {
            return Err(unfit("no memory is attached, and none is named"));
        };
        let at = (u32::from_le_bytes(*place) as usize).saturating_mul(PAGE_BYTES);
        if at < PAGE_BYTES || at.saturating_add(body.len()) > memory.bytes {
            return Err(unfit("the memory has no place for the body"));
        }
        // SAFETY: within the memory, and so is the stamp, which ends before any page but the first begins.
        let (from, stamp) =
            unsafe { (memory.start.add(at), memory.start.add(at / PAGE_BYTES * STAMP_BYTES).cast_mut().cast()) };
        // SAFETY: so many readable bytes of an attached memory, as the kernel says. The peer may write to them meanwhile, if
        // it does not keep to the protocol or has given the channel up: they are copied as bytes, for which any value is valid,
        // and the copy is checked.
        unsafe { std::ptr::copy_nonoverlapping(from, body.as_mut_ptr(), body.len()) };
        fence(Ordering::Acquire);
        // SAFETY: readable as above, aligned, and only loaded from.
        let stamp = unsafe { AtomicU64::from_ptr(stamp) }.load(Ordering::Relaxed);
        Ok(if stamp == ours.0 { Fetched::Whole } else { Fetched::TakenBack })
    }

    /// Detaches it.
    pub fn detach(&mut self, ucp: &sys::Ucp) {
        if let Some(attached) = self.0.take() {
            release(ucp, attached);
        }
    }
}

/// # Safety
/// A live endpoint, of the peer that named its memory so.
unsafe fn attach(ucp: &sys::Ucp, endpoint: sys::ucp_ep_h, name: &[u8]) -> Result<Attached, UcxError> {
    let unfit = |bytes, reason: &str| UcxError::NoMemory { bytes, reason: reason.to_owned() };
    let Some((extent, packed)) = name.split_first_chunk::<EXTENT_BYTES>() else {
        return Err(unfit(0, "a key too short"));
    };
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| extent[at * 8 + byte]));
    let (address, said_bytes) = (word(0), usize::try_from(word(1)).unwrap_or(usize::MAX));
    let mut key: sys::ucp_rkey_h = std::ptr::null_mut();
    let mut padded = packed.to_vec();
    padded.resize(PACKED_BYTES_MAX, 0);
    // SAFETY: a live endpoint; the packed key came from an authenticated peer, and ends in zeros.
    let status = unsafe { ucp.ucp_ep_rkey_unpack(endpoint, padded.as_ptr().cast(), &raw mut key) };
    check(ucp, "ucp_ep_rkey_unpack", status)?;
    let mut attached = Attached { name: name.to_vec(), key, start: std::ptr::null(), bytes: 0 };
    let mut start: *mut c_void = std::ptr::null_mut();
    // SAFETY: a live key and a place to write to.
    let status = unsafe { ucp.ucp_rkey_ptr(key, address, &raw mut start) };
    if let Err(error) = check(ucp, "ucp_rkey_ptr", status) {
        release(ucp, attached);
        return Err(error);
    }
    attached.start = start.cast();
    attached.bytes = mapped_from(start.addr()).min(said_bytes);
    if !start.addr().is_multiple_of(BODY_ALIGN) {
        release(ucp, attached);
        return Err(unfit(said_bytes, "it is not aligned"));
    }
    // At once rather than page by page when they are first read; systems that cannot (before Linux 5.14) do that.
    // SAFETY: whole pages of a mapping of this process, which are only looked at.
    unsafe { libc::madvise(start, attached.bytes, libc::MADV_POPULATE_READ) };
    Ok(attached)
}

fn release(ucp: &sys::Ucp, attached: Attached) {
    // SAFETY: unpacked on an endpoint that is still there, and not used again.
    unsafe { ucp.ucp_rkey_destroy(attached.key) };
}

/// How many bytes can be read from an address of this process on, in the shared mapping that it lies in. What a peer says of its
/// memory is not to be trusted, and UCX does not say.
fn mapped_from(address: usize) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let ends = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        let (readable, shared) = (rest.starts_with('r'), rest.get(3..4) == Some("s"));
        ((start..end).contains(&address) && readable && shared).then_some(end)
    });
    ends.map_or(0, |end| end - address)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pages_come_back_and_become_whole_again() {
        let mut pages = Pages::new(0..10);
        assert_eq!([3, 3, 3].map(|count| pages.take(count)), [Some(0), Some(3), Some(6)]);
        assert_eq!((pages.take(2), pages.take(1), pages.take(1)), (None, Some(9), None));
        pages.give_back(0, 3);
        pages.give_back(6, 3);
        assert_eq!(pages.take(4), None, "three and three");
        assert_eq!(pages.take(2), Some(0), "the first that are free");
        pages.give_back(3, 3);
        assert_eq!(pages.free, BTreeMap::from([(2, 7)]));
        pages.give_back(9, 1);
        pages.give_back(0, 2);
        assert_eq!(pages.free, BTreeMap::from([(0, 10)]));
    }

    proptest! {
        #[test]
        fn no_page_has_two_owners_and_none_is_lost(counts in vec((1..40_usize, any::<bool>()), 1..200)) {
            let mut pages = Pages::new(0..100);
            let mut taken: Vec<(usize, usize)> = Vec::new();
            for (count, give_back) in counts {
                if give_back && !taken.is_empty() {
                    let (at, count) = taken.swap_remove(count % taken.len());
                    pages.give_back(at, count);
                } else if let Some(at) = pages.take(count) {
                    prop_assert!(at + count <= 100);
                    prop_assert!(taken.iter().all(|(from, of)| at + count <= *from || from + of <= at));
                    taken.push((at, count));
                }
                let free: usize = pages.free.values().sum();
                prop_assert_eq!(free + taken.iter().map(|(_, count)| count).sum::<usize>(), 100);
            }
            taken.drain(..).for_each(|(at, count)| pages.give_back(at, count));
            prop_assert_eq!(pages.free, BTreeMap::from([(0, 100)]));
        }
    }

    #[test]
    fn what_can_be_read_ends_with_the_shared_mapping() {
        let page = 4096;
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * page as u64).unwrap();
        // SAFETY: nobody else has the file.
        let map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
        let start = map.as_ptr().addr();
        assert_eq!((mapped_from(start), mapped_from(start + page)), (4 * page, 3 * page));
        let private = [0_u8; 64];
        assert_eq!((mapped_from(private.as_ptr().addr()), mapped_from(0)), (0, 0));
    }
}
