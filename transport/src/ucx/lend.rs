//! Bodies that a process of this host reads where they are: no copy on the sender's side, one on the receiver's, and no
//! queue in between.
//!
//! The sender has UCX make memory that it can share (`ucp_mem_map` with `UCP_MEM_MAP_ALLOCATE`) and sends, in place of a body,
//! what the receiver finds it by; the receiver attaches it (`ucp_ep_rkey_unpack`, `ucp_rkey_ptr`), copies the body out, and
//! checks the copy. The sender keeps the body until the frame is acknowledged. If the channel ends before that, the sender
//! writes other frames there, perhaps while the receiver copies: so the memory begins with a stamp that says to which channel its
//! body is lent, and a copy counts only if the stamp is still that channel's afterwards. A process that dies leaves its memory
//! to those who have attached it, and nothing behind.

use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use ucx_sys as sys;

use super::inbox::Token;
use super::library::{Context, UcxError, check};
use crate::buffer::{BODY_ALIGN, MakeShared, Shared};

/// Bytes of a key at most: number, address and length of the memory, then what UCX packs, which for memory of one host is
/// some thirty bytes.
pub const KEY_BYTES_MAX: usize = 128;
/// Bytes of a key before what UCX packs.
const PLACE_BYTES: usize = 24;
/// Bytes before the body: the stamp, and what aligns the body.
const STAMP_BYTES: usize = BODY_ALIGN;
/// The stamp of memory whose body nobody may read.
const NOT_LENT: u64 = 0;
/// What follows a packed key when it is unpacked, so that one that says more than it has is read to its end within it: UCX takes
/// no length, and reads at most a byte and so many bytes more for each of 64 domains.
const PACKED_BYTES_MAX: usize = 64 * 256 + 64;
/// Memories of one peer that are kept attached, at most: as many as a peer lends at once, with its usual window.
const ATTACHED_MAX: usize = 64;

/// Memory of ours that others can attach: a stamp, then room for a body.
struct Region {
    context: Arc<Context>,
    memory: sys::ucp_mem_h,
    start: *mut u8,
    /// Of the body.
    bytes: usize,
    key: Vec<u8>,
}

// SAFETY: owned memory and a handle without ties to a thread, of a context that is set up for several threads.
unsafe impl Send for Region {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Region {}

impl Region {
    /// For bodies of `bytes`, zeroed, numbered `number` within this process.
    fn new(context: Arc<Context>, bytes: usize, number: u64) -> Result<Self, UcxError> {
        use sys::ucp_mem_map_params_field as field;
        let ucp = &context.ucp;
        // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
        let mut params: sys::ucp_mem_map_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from((field::UCP_MEM_MAP_PARAM_FIELD_LENGTH | field::UCP_MEM_MAP_PARAM_FIELD_FLAGS).0);
        let whole = STAMP_BYTES + bytes;
        params.length = whole;
        params.flags = sys::UCP_MEM_MAP_ALLOCATE.0;
        let mut memory: sys::ucp_mem_h = std::ptr::null_mut();
        // SAFETY: a live context, parameters that outlive the call and name what is set, a place to write to.
        let status = unsafe { ucp.ucp_mem_map(context.raw, &raw const params, &raw mut memory) };
        check(ucp, "ucp_mem_map", status)?;
        let mut region =
            Self { memory, start: std::ptr::null_mut(), bytes, key: Vec::with_capacity(KEY_BYTES_MAX), context };
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
        for word in [number, attr.address as u64, whole as u64] {
            region.key.extend_from_slice(&word.to_le_bytes());
        }
        // SAFETY: on success, so many readable bytes until they are released below.
        region.key.extend_from_slice(unsafe { std::slice::from_raw_parts(packed.cast::<u8>(), packed_bytes) });
        // SAFETY: got from this library above, released once.
        unsafe { ucp.ucp_rkey_buffer_release(packed) };
        let unfit = |reason: String| UcxError::NoMemory { bytes, reason };
        if attr.length < whole || attr.address.is_null() || !attr.address.addr().is_multiple_of(BODY_ALIGN) {
            return Err(unfit(format!("UCX made {} bytes at {:p}", attr.length, attr.address)));
        }
        if region.key.len() > KEY_BYTES_MAX {
            return Err(unfit(format!("its key has {packed_bytes} bytes")));
        }
        region.start = attr.address.cast();
        // Fresh from the system it is zero, but nobody promises that.
        region.stamp().store(NOT_LENT, Ordering::Relaxed);
        region.fill(0);
        Ok(region)
    }

    fn stamp(&self) -> &AtomicU64 {
        // SAFETY: aligned, of this process until `drop`, and used as an atomic by everybody.
        unsafe { AtomicU64::from_ptr(self.start.cast()) }
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        if self.start.is_null() {
            return &[];
        }
        // SAFETY: so many bytes of this process, initialised by `new`, until `drop`. Other processes only read them.
        unsafe { std::slice::from_raw_parts(self.start.add(STAMP_BYTES), self.bytes) }
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        if self.start.is_null() {
            return &mut [];
        }
        // SAFETY: as above, and borrowed mutably. While another process may read it, it belongs to the channel that lent it; what
        // the other reads after that channel's end does not count.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(STAMP_BYTES), self.bytes) }
    }
}

impl Shared for Region {
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

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: made by ucp_mem_map of this context, not used again.
        let status = unsafe { self.context.ucp.ucp_mem_unmap(self.context.raw, self.memory) };
        if let Err(error) = check(&self.context.ucp, "ucp_mem_unmap", status) {
            tracing::warn!(%error, bytes = self.bytes, "cannot give shared memory back");
        }
    }
}

/// Makes shared memory by `context`. After a first failure there is none any more: bodies are copied then.
pub fn maker(context: Arc<Context>) -> MakeShared {
    let (made, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    Box::new(move |bytes| {
        if failed.load(Ordering::Relaxed) {
            return None;
        }
        match Region::new(Arc::clone(&context), bytes, made.fetch_add(1, Ordering::Relaxed)) {
            Ok(region) => Some(Box::new(region)),
            Err(error) => {
                failed.store(true, Ordering::Relaxed);
                tracing::info!(%error, "no memory to share with peers of this host: bodies are copied");
                None
            }
        }
    })
}

/// One memory of a peer, attached.
#[derive(Debug)]
struct Attached {
    number: u64,
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

/// The memories of one peer that are attached here.
#[derive(Debug, Default)]
pub struct Borrowed {
    /// The last used comes last.
    attached: Vec<Attached>,
}

// SAFETY: handles and addresses without ties to a thread.
unsafe impl Send for Borrowed {}

impl Borrowed {
    /// Copies the beginning of the body in the memory that a peer's `key` names to `body`; what it holds counts only if the body
    /// was still lent to the channel that we call `ours` afterwards.
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
        let Some((place, packed)) = key.split_first_chunk::<PLACE_BYTES>() else {
            return Err(unfit("a key too short"));
        };
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| place[at * 8 + byte]));
        let number = word(0);
        match self.attached.iter().position(|attached| attached.number == number) {
            Some(at) => self.attached[at..].rotate_left(1),
            None => {
                // SAFETY: the caller's promise.
                let attached = unsafe { attach(ucp, endpoint, number, (word(1), word(2)), packed) }?;
                if self.attached.len() >= ATTACHED_MAX {
                    release(ucp, self.attached.remove(0));
                }
                self.attached.push(attached);
            }
        }
        let room = |attached: &&Attached| {
            attached.start.addr().is_multiple_of(BODY_ALIGN) && attached.bytes >= STAMP_BYTES + body.len()
        };
        let from = self.attached.last().filter(room);
        let Some(from) = from else { return Err(unfit("the memory has no place for the body")) };
        // SAFETY: so many readable bytes of an attached memory, as the kernel says. The peer may write to them meanwhile, if
        // it does not keep to the protocol or has given the channel up: they are copied as bytes, for which any value is valid,
        // and the copy is checked.
        unsafe { std::ptr::copy_nonoverlapping(from.start.add(STAMP_BYTES), body.as_mut_ptr(), body.len()) };
        fence(Ordering::Acquire);
        // SAFETY: readable as above, aligned, and only loaded from.
        let stamp = unsafe { AtomicU64::from_ptr(from.start.cast_mut().cast()) }.load(Ordering::Relaxed);
        Ok(if stamp == ours.0 { Fetched::Whole } else { Fetched::TakenBack })
    }

    /// Detaches all.
    pub fn detach(&mut self, ucp: &sys::Ucp) {
        self.attached.drain(..).for_each(|attached| release(ucp, attached));
    }
}

/// # Safety
/// A live endpoint, and `packed` from a peer's `ucp_rkey_pack`.
unsafe fn attach(
    ucp: &sys::Ucp,
    endpoint: sys::ucp_ep_h,
    number: u64,
    (address, said_bytes): (u64, u64),
    packed: &[u8],
) -> Result<Attached, UcxError> {
    let mut key: sys::ucp_rkey_h = std::ptr::null_mut();
    let mut padded = packed.to_vec();
    padded.resize(PACKED_BYTES_MAX, 0);
    // SAFETY: a live endpoint; the packed key came from an authenticated peer, and ends in zeros.
    let status = unsafe { ucp.ucp_ep_rkey_unpack(endpoint, padded.as_ptr().cast(), &raw mut key) };
    check(ucp, "ucp_ep_rkey_unpack", status)?;
    let mut attached = Attached { number, key, start: std::ptr::null(), bytes: 0 };
    let mut start: *mut c_void = std::ptr::null_mut();
    // SAFETY: a live key and a place to write to.
    let status = unsafe { ucp.ucp_rkey_ptr(key, address, &raw mut start) };
    if let Err(error) = check(ucp, "ucp_rkey_ptr", status) {
        release(ucp, attached);
        return Err(error);
    }
    attached.start = start.cast();
    attached.bytes = mapped_from(start.addr()).min(said_bytes as usize);
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
    use super::*;

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
