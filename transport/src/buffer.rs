//! The bounded window that frames are built and read in.
//!
//! Bodies come out of a [`Window`] and go back when dropped, from whichever thread; those that went back are handed out
//! again, so a steady state allocates nothing, and what a burst needed and nothing since goes back to the system. Sending
//! and receiving may each take three quarters of the window at most: a node whose queues are full of answers can still
//! receive, and one that is flooded can still answer, which is what keeps two nodes from waiting for each other for ever.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use memmap2::MmapMut;

use crate::{TransportError, Wake};

/// Alignment of every body: a cache line, and the widest SIMD register.
pub const BODY_ALIGN: usize = 64;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Block([u8; BODY_ALIGN]);

/// Bodies of at least so many bytes are mappings of their own: what the allocator frees it mostly keeps.
const MAPPED_BYTES: usize = 16 << 10;
/// Bodies taken between two looks at which of those that are free were not needed: some seconds of a busy node.
const TRIM_EVERY: usize = 16 << 10;

/// The memory of a body: all of its size class, or, shared, as many bytes as it has.
enum Memory {
    Allocated(Box<[Block]>),
    Mapped(MmapMut),
    Shared(Box<dyn Shared>),
}

/// Memory of one body that other processes of this host can read where it is.
pub trait Shared: DerefMut<Target = [u8]> + Send + Sync {
    /// What they find it by.
    fn key(&self) -> &[u8];

    /// From now on what it holds may be read by whom its owner calls `to`.
    fn lend(&self, to: u64);

    /// From now on it may not; what is written next is nobody's.
    fn take_back(&self);
}

/// Shared memory of so many bytes, aligned to [`BODY_ALIGN`], if there is any to be had. It goes back where it came from when it
/// is dropped: how much there is at once is bounded there, not by the window.
pub type TakeShared = Box<dyn Fn(usize) -> Option<Box<dyn Shared>> + Send + Sync>;

impl Memory {
    /// Of 64 << `class` bytes.
    fn new(class: usize) -> Self {
        let bytes = BODY_ALIGN << class;
        // A mapping begins at a page. One that the system refuses may still be had from what the allocator keeps.
        let mapped = (bytes >= MAPPED_BYTES).then(|| MmapMut::map_anon(bytes).ok()).flatten();
        mapped.map_or_else(|| Memory::Allocated(bytemuck::zeroed_slice_box(1 << class)), Memory::Mapped)
    }

    fn empty() -> Self {
        Memory::Allocated(Box::default())
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Memory::Allocated(blocks) => bytemuck::cast_slice(blocks),
            Memory::Mapped(bytes) => bytes,
            Memory::Shared(bytes) => bytes,
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Allocated(blocks) => bytemuck::cast_slice_mut(blocks),
            Memory::Mapped(bytes) => bytes,
            Memory::Shared(bytes) => bytes,
        }
    }
}

/// Bodies of one size class to be handed out again.
#[derive(Default)]
struct Free {
    bodies: Vec<Memory>,
    /// The fewest that there were since the last look: so many were not needed.
    spare: usize,
}

/// What a body was taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Send,
    Receive,
    /// It was sent, and a peer reads it where it is.
    Lent,
}

#[derive(Default)]
struct State {
    sending: usize,
    receiving: usize,
    /// By size class: `free[c]` holds bodies of `64 << c` bytes.
    free: Vec<Free>,
    free_count: usize,
    /// Bodies taken since the last look at what is spare.
    taken: usize,
    /// Whether somebody found the window full and waits for the waker.
    starved: bool,
}

/// A bounded number of bodies of bounded size.
pub struct Window {
    bodies_max: usize,
    body_bytes_max: usize,
    state: Mutex<State>,
    waker: OnceLock<Arc<dyn Wake>>,
    take_shared: OnceLock<TakeShared>,
}

impl Window {
    /// A window of `bodies_max` bodies (2 at least: one for each direction) of up to `body_bytes_max` bytes each.
    /// Memory is taken as it is first needed.
    pub fn new(bodies_max: usize, body_bytes_max: usize) -> Arc<Self> {
        let classes = size_class(body_bytes_max) + 1;
        let state = State { free: (0..classes).map(|_| Free::default()).collect(), ..State::default() };
        Arc::new(Self {
            bodies_max: bodies_max.max(2),
            body_bytes_max,
            state: Mutex::new(state),
            waker: OnceLock::new(),
            take_shared: OnceLock::new(),
        })
    }

    /// Larger bodies to build frames in are to be in shared memory from now on, as far as there is any. Only the first call
    /// counts.
    pub fn set_shared(&self, take: TakeShared) {
        // As with the waker.
        let _ = self.take_shared.set(take);
    }

    /// Whom to wake when a body comes back after the window was found full. Only the first call counts.
    pub fn set_waker(&self, waker: Arc<dyn Wake>) {
        // A second waker would be the same transport's: keeping the first is right.
        let _ = self.waker.set(waker);
    }

    /// A body to build a frame in. Its bytes are unspecified. An empty body takes no room.
    ///
    /// # Errors
    /// [`TransportError::BodyTooLarge`] and [`TransportError::WindowFull`].
    pub fn take(self: &Arc<Self>, bytes: usize) -> Result<FrameBuf, TransportError> {
        self.take_for(Use::Send, bytes)
    }

    /// A body to receive a frame in; otherwise as [`Window::take`].
    ///
    /// # Errors
    /// As [`Window::take`].
    pub fn take_received(self: &Arc<Self>, bytes: usize) -> Result<FrameBuf, TransportError> {
        self.take_for(Use::Receive, bytes)
    }

    /// Bodies that were taken and neither dropped nor lent yet.
    pub fn in_use(&self) -> usize {
        let state = self.lock();
        state.sending + state.receiving
    }

    /// The largest body.
    pub fn body_bytes_max(&self) -> usize {
        self.body_bytes_max
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics halfway through a change.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn take_for(self: &Arc<Self>, used: Use, bytes: usize) -> Result<FrameBuf, TransportError> {
        if bytes == 0 {
            return Ok(FrameBuf { memory: Memory::empty(), len: 0, window: None, used });
        }
        if bytes > self.body_bytes_max {
            return Err(TransportError::BodyTooLarge { bytes, max: self.body_bytes_max });
        }
        let class = size_class(bytes);
        let shared = if used == Use::Send { self.shared(class, bytes) } else { None };
        let mut unneeded = Vec::new();
        let recycled = {
            let mut guard = self.lock();
            let state = &mut *guard;
            let mine = if used == Use::Send { state.sending } else { state.receiving };
            let share = self.bodies_max - (self.bodies_max / 4).max(1);
            if mine >= share || state.sending + state.receiving >= self.bodies_max {
                state.starved = true;
                return Err(TransportError::WindowFull { bodies: self.bodies_max });
            }
            *(if used == Use::Send { &mut state.sending } else { &mut state.receiving }) += 1;
            let recycled = if shared.is_none() { state.free[class].take() } else { None };
            if recycled.is_none() && state.sending + state.receiving + state.free_count > self.bodies_max {
                // All memory is in other classes: give the largest back, so that the window's bound holds in bytes too.
                unneeded.extend(state.free.iter_mut().rev().find_map(Free::take));
            }
            state.taken += 1;
            if state.taken >= TRIM_EVERY {
                state.taken = 0;
                state.free.iter_mut().for_each(|free| free.trim(&mut unneeded));
            }
            state.free_count -= usize::from(recycled.is_some()) + unneeded.len();
            recycled
        };
        // Unmapped while nobody waits for the lock.
        drop(unneeded);
        let memory = shared.map(Memory::Shared).or(recycled).unwrap_or_else(|| Memory::new(class));
        Ok(FrameBuf { memory, len: bytes, window: Some(Arc::clone(self)), used })
    }

    /// Shared memory for a body that is worth it, if there is any left.
    fn shared(&self, class: usize, bytes: usize) -> Option<Box<dyn Shared>> {
        let take = self.take_shared.get().filter(|_| BODY_ALIGN << class >= MAPPED_BYTES)?;
        take(bytes)
    }

    fn give_back(&self, memory: Memory, used: Use) {
        let own = match memory {
            Memory::Shared(shared) => {
                if used == Use::Lent {
                    shared.take_back();
                }
                None
            }
            own => Some(own),
        };
        let starved = {
            let mut state = self.lock();
            state.end(used);
            if let Some(memory) = own {
                state.free[size_class(memory.len())].bodies.push(memory);
                state.free_count += 1;
            }
            std::mem::take(&mut state.starved)
        };
        self.wake_if(starved);
    }

    /// A body that was to be sent is lent: it makes room for another.
    fn lend(&self) {
        let starved = {
            let mut state = self.lock();
            state.end(Use::Send);
            std::mem::take(&mut state.starved)
        };
        self.wake_if(starved);
    }

    fn wake_if(&self, starved: bool) {
        if let Some(waker) = self.waker.get().filter(|_| starved) {
            waker.wake();
        }
    }
}

impl State {
    /// A body is no longer in use. One that is lent is beyond the window.
    fn end(&mut self, used: Use) {
        match used {
            Use::Send => self.sending -= 1,
            Use::Receive => self.receiving -= 1,
            Use::Lent => {}
        }
    }
}

impl Free {
    fn take(&mut self) -> Option<Memory> {
        let body = self.bodies.pop();
        self.spare = self.spare.min(self.bodies.len());
        body
    }

    /// Moves what was not needed since the last call to `unneeded`.
    fn trim(&mut self, unneeded: &mut Vec<Memory>) {
        // The last ones are the most likely to be in a cache.
        unneeded.extend(self.bodies.drain(..self.spare));
        self.spare = self.bodies.len();
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Window({} of {} bodies in use)", self.in_use(), self.bodies_max)
    }
}

/// The class of bodies of `64 << class` bytes that holds `bytes`.
fn size_class(bytes: usize) -> usize {
    bytes.div_ceil(BODY_ALIGN).max(1).next_power_of_two().ilog2() as usize
}

/// A frame's body: owned bytes, 64-byte aligned, that go back to their window when dropped.
pub struct FrameBuf {
    memory: Memory,
    len: usize,
    window: Option<Arc<Window>>,
    used: Use,
}

impl FrameBuf {
    /// A body of no bytes; takes no room in any window.
    pub fn empty() -> Self {
        FrameBuf { memory: Memory::empty(), len: 0, window: None, used: Use::Send }
    }

    /// What other processes of this host find the body by, if it is in shared memory.
    pub fn key(&self) -> Option<&[u8]> {
        match &self.memory {
            Memory::Shared(memory) => Some(memory.key()),
            _ => None,
        }
    }

    /// The body goes to a peer that reads it where it is, under the name `to`: until it is dropped it keeps its memory, but takes
    /// no room in the window. Does nothing to one that is not in shared memory.
    pub fn lend(&mut self, to: u64) {
        if let (Memory::Shared(memory), Some(window), Use::Send) = (&self.memory, &self.window, self.used) {
            memory.lend(to);
            window.lend();
            self.used = Use::Lent;
        }
    }
}

impl Deref for FrameBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for FrameBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

impl Drop for FrameBuf {
    fn drop(&mut self) {
        if let Some(window) = self.window.take() {
            window.give_back(std::mem::replace(&mut self.memory, Memory::empty()), self.used);
        }
    }
}

impl fmt::Debug for FrameBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrameBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn bodies_are_aligned_sized_and_counted() {
        let window = Window::new(8, 1000);
        for bytes in [1, 63, 64, 65, 999, 1000] {
            let body = window.take(bytes).unwrap();
            assert_eq!(body.len(), bytes);
            assert_eq!(body.as_ptr().addr() % BODY_ALIGN, 0);
            assert_eq!(window.in_use(), 1);
        }
        assert_eq!(window.in_use(), 0);
        assert!(matches!(window.take(1001), Err(TransportError::BodyTooLarge { bytes: 1001, max: 1000 })));
    }

    #[test]
    fn each_direction_leaves_room_for_the_other() {
        let window = Window::new(8, 64);
        let sending: Vec<_> = (0..6).map(|_| window.take(64).unwrap()).collect();
        assert!(matches!(window.take(1), Err(TransportError::WindowFull { bodies: 8 })));
        let receiving: Vec<_> = (0..2).map(|_| window.take_received(64).unwrap()).collect();
        assert!(window.take_received(1).is_err());
        assert!(window.take(0).is_ok(), "an empty body takes no room");
        drop(sending);
        assert_eq!(window.in_use(), 2);
        drop(receiving);
        assert_eq!(window.in_use(), 0);
    }

    #[test]
    fn a_steady_state_hands_the_same_memory_out_again() {
        let window = Window::new(4, 1 << 20);
        let first = window.take(70_000).unwrap().as_ptr().addr();
        for bytes in [70_000, 66_000, 131_072] {
            assert_eq!(window.take(bytes).unwrap().as_ptr().addr(), first);
        }
    }

    #[test]
    fn memory_is_bounded_over_all_size_classes() {
        let window = Window::new(4, 1 << 20);
        for class in 0..15 {
            let bodies: Vec<_> = (0..3).map(|_| window.take(64 << class).unwrap()).collect();
            drop(bodies);
            assert!(window.lock().free_count <= 4);
        }
    }

    #[test]
    fn what_a_burst_needed_and_nothing_since_is_given_back() {
        let window = Window::new(64, 1 << 20);
        let burst = |bodies: usize| drop((0..bodies).map(|_| window.take(1 << 20).unwrap()).collect::<Vec<_>>());
        let free = || window.lock().free_count;
        burst(20);
        assert_eq!(free(), 20);
        // What came before the first look is not known to be spare.
        (0..TRIM_EVERY).for_each(|_| burst(1));
        (0..2 * TRIM_EVERY).for_each(|_| burst(2));
        assert_eq!(free(), 2, "as many as are needed at once");
        (0..TRIM_EVERY).for_each(|_| drop(window.take(64).unwrap()));
        (0..TRIM_EVERY).for_each(|_| drop(window.take(64).unwrap()));
        assert_eq!(free(), 1, "other bodies are looked at as well");
    }

    /// Counts how many there are.
    struct Remembered(Box<[Block]>, Arc<AtomicUsize>);

    impl Deref for Remembered {
        type Target = [u8];
        fn deref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }

    impl DerefMut for Remembered {
        fn deref_mut(&mut self) -> &mut [u8] {
            bytemuck::cast_slice_mut(&mut self.0)
        }
    }

    impl Drop for Remembered {
        fn drop(&mut self) {
            self.1.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl Shared for Remembered {
        fn key(&self) -> &[u8] {
            b"key"
        }
        fn lend(&self, _: u64) {}
        fn take_back(&self) {}
    }

    /// Shared memory for `max` bodies, and how many there are.
    fn remembered(max: usize) -> (TakeShared, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let take = move |bytes: usize| {
            if counted.load(Ordering::Relaxed) >= max {
                return None;
            }
            counted.fetch_add(1, Ordering::Relaxed);
            let blocks = bytemuck::zeroed_slice_box(bytes.div_ceil(BODY_ALIGN));
            Some(Box::new(Remembered(blocks, Arc::clone(&counted))) as Box<dyn Shared>)
        };
        (Box::new(take), count)
    }

    #[test]
    fn larger_bodies_to_send_are_in_shared_memory_as_far_as_there_is_any() {
        let window = Window::new(16, 1 << 20);
        let before = window.take(70_000).unwrap();
        assert!(before.key().is_none(), "there is none yet");
        let (take, there_are) = remembered(4);
        window.set_shared(take);
        assert!(window.take(8192).unwrap().key().is_none(), "it is small");
        assert!(window.take_received(70_000).unwrap().key().is_none(), "nobody else reads it");
        let bodies: Vec<_> = (0..6).map(|_| window.take(70_000).unwrap()).collect();
        assert_eq!(bodies.iter().filter(|body| body.key().is_some()).count(), 4);
        assert!(bodies.iter().all(|body| body.len() == 70_000));
        drop((before, bodies));
        assert_eq!((window.in_use(), there_are.load(Ordering::Relaxed)), (0, 0), "the window keeps none");
        let mut lent = window.take(70_000).unwrap();
        lent.lend(7);
        let others: Vec<_> = (0..12).map(|_| window.take(70_000).unwrap()).collect();
        assert_eq!(window.in_use(), 12, "what is lent takes no room");
        assert!(matches!(window.take(70_000), Err(TransportError::WindowFull { .. })));
        assert_eq!(there_are.load(Ordering::Relaxed), 4);
        drop(others);
        assert!(matches!(window.take(70_000), Ok(body) if body.key().is_some()));
        drop(lent);
        assert_eq!((window.in_use(), there_are.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn whoever_found_the_window_full_is_woken_once() {
        #[derive(Default)]
        struct Count(AtomicUsize);
        impl Wake for Count {
            fn wake(&self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let (window, count) = (Window::new(2, 64), Arc::new(Count::default()));
        window.set_waker(count.clone());
        drop(window.take(1).unwrap());
        assert_eq!(count.0.load(Ordering::SeqCst), 0, "nobody waits");
        let body = window.take(1).unwrap();
        assert!(window.take(1).is_err());
        std::thread::spawn(move || drop(body)).join().unwrap();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        drop(window.take(1).unwrap());
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }
}
