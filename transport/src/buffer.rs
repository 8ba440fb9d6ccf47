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

/// The memory of a body: all of its size class.
enum Memory {
    Allocated(Box<[Block]>),
    Mapped(MmapMut),
    Shared(Box<dyn Shared>),
}

/// Memory that other processes of this host can read where it is.
pub trait Shared: DerefMut<Target = [u8]> + Send + Sync {
    /// What they find it by.
    fn key(&self) -> &[u8];

    /// From now on what it holds may be read by whom its owner calls `to`.
    fn lend(&self, to: u64);

    /// From now on it may not; what is written next is nobody's.
    fn take_back(&self);
}

/// Makes shared memory of so many bytes, aligned to [`BODY_ALIGN`], if there is any to be had.
pub type MakeShared = Box<dyn Fn(usize) -> Option<Box<dyn Shared>> + Send + Sync>;

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

    fn is_shared(&self) -> bool {
        matches!(self, Memory::Shared(_))
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
    /// Bodies that peers read where they are: beyond the window, at most as many as are shared.
    lent: usize,
    /// By size class: `free[c]` holds bodies of `64 << c` bytes; behind those, in the same order, the shared ones.
    free: Vec<Free>,
    free_count: usize,
    /// Bodies in shared memory, in use or free.
    shared: usize,
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
    make_shared: OnceLock<MakeShared>,
}

impl Window {
    /// A window of `bodies_max` bodies (2 at least: one for each direction) of up to `body_bytes_max` bytes each.
    /// Memory is taken as it is first needed.
    pub fn new(bodies_max: usize, body_bytes_max: usize) -> Arc<Self> {
        let classes = size_class(body_bytes_max) + 1;
        let state = State { free: (0..2 * classes).map(|_| Free::default()).collect(), ..State::default() };
        Arc::new(Self {
            bodies_max: bodies_max.max(2),
            body_bytes_max,
            state: Mutex::new(state),
            waker: OnceLock::new(),
            make_shared: OnceLock::new(),
        })
    }

    /// Larger bodies to build frames in are to be in shared memory from now on, as long as it can be had and at most
    /// [`Self::shared_max`] are. Only the first call counts.
    pub fn set_shared(&self, make: MakeShared) {
        // As with the waker.
        let _ = self.make_shared.set(make);
    }

    /// Bodies in shared memory, at most: a quarter of all.
    pub fn shared_max(&self) -> usize {
        self.bodies_max / 4
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
        let mut unneeded = Vec::new();
        let (recycled, make) = {
            let mut guard = self.lock();
            let state = &mut *guard;
            let mine = if used == Use::Send { state.sending } else { state.receiving };
            let share = self.bodies_max - (self.bodies_max / 4).max(1);
            if mine >= share || state.sending + state.receiving >= self.bodies_max {
                state.starved = true;
                return Err(TransportError::WindowFull { bodies: self.bodies_max });
            }
            *(if used == Use::Send { &mut state.sending } else { &mut state.receiving }) += 1;
            let can_share =
                used == Use::Send && BODY_ALIGN << class >= MAPPED_BYTES && self.make_shared.get().is_some();
            let shared = state.free.len() / 2 + class;
            let mut recycled = if can_share { state.free[shared].take() } else { None };
            let make = can_share && recycled.is_none() && state.shared < self.shared_max();
            state.shared += usize::from(make);
            if recycled.is_none() && !make {
                recycled = state.free[class].take();
            }
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
            state.shared -= unneeded.iter().filter(|memory| memory.is_shared()).count();
            (recycled, make)
        };
        // Unmapped while nobody waits for the lock.
        drop(unneeded);
        let memory = recycled.unwrap_or_else(|| if make { self.new_shared(class) } else { Memory::new(class) });
        Ok(FrameBuf { memory, len: bytes, window: Some(Arc::clone(self)), used })
    }

    /// Shared memory, which is counted already; other memory where there is none.
    fn new_shared(&self, class: usize) -> Memory {
        let made = self.make_shared.get().and_then(|make| make(BODY_ALIGN << class));
        made.map_or_else(
            || {
                self.lock().shared -= 1;
                Memory::new(class)
            },
            Memory::Shared,
        )
    }

    fn give_back(&self, memory: Memory, used: Use) {
        if let (Memory::Shared(memory), Use::Lent) = (&memory, used) {
            memory.take_back();
        }
        let starved = {
            let mut state = self.lock();
            state.end(used);
            let class = size_class(memory.len()) + if memory.is_shared() { state.free.len() / 2 } else { 0 };
            state.free[class].bodies.push(memory);
            state.free_count += 1;
            std::mem::take(&mut state.starved)
        };
        self.wake_if(starved);
    }

    /// A body that was to be sent is lent: it makes room for another.
    fn lend(&self) {
        let starved = {
            let mut state = self.lock();
            state.end(Use::Send);
            state.lent += 1;
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
    /// A body is no longer in use.
    fn end(&mut self, used: Use) {
        *(match used {
            Use::Send => &mut self.sending,
            Use::Receive => &mut self.receiving,
            Use::Lent => &mut self.lent,
        }) -= 1;
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

    struct Remembered(Box<[Block]>);

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

    impl Shared for Remembered {
        fn key(&self) -> &[u8] {
            b"key"
        }
        fn lend(&self, _: u64) {}
        fn take_back(&self) {}
    }

    #[test]
    fn larger_bodies_to_send_are_in_shared_memory_up_to_a_quarter_of_all() {
        let window = Window::new(16, 1 << 20);
        let before = window.take(70_000).unwrap();
        assert!(before.key().is_none(), "there is none yet");
        window.set_shared(Box::new(|bytes| Some(Box::new(Remembered(bytemuck::zeroed_slice_box(bytes / BODY_ALIGN))))));
        assert!(window.take(8192).unwrap().key().is_none(), "it is small");
        assert!(window.take_received(70_000).unwrap().key().is_none(), "nobody else reads it");
        let bodies: Vec<_> = (0..6).map(|_| window.take(70_000).unwrap()).collect();
        assert_eq!(bodies.iter().filter(|body| body.key().is_some()).count(), window.shared_max());
        assert_eq!(window.shared_max(), 4);
        drop((before, bodies));
        let mut lent = window.take(70_000).unwrap();
        lent.lend(7);
        let others: Vec<_> = (0..12).map(|_| window.take(70_000).unwrap()).collect();
        assert_eq!(window.in_use(), 12, "what is lent takes no room");
        drop((lent, others));
        assert_eq!((window.in_use(), window.lock().lent), (0, 0));
        for bytes in [70_000, 500_000, 70_000] {
            assert_eq!(
                window.take(bytes).unwrap().key().is_some(),
                bytes == 70_000,
                "all there may be are of another size"
            );
        }
        (0..2 * TRIM_EVERY).for_each(|_| drop(window.take(64).unwrap()));
        assert!(window.take(500_000).unwrap().key().is_some(), "those were not needed");
    }

    #[test]
    fn where_no_memory_can_be_shared_bodies_are_as_without() {
        let window = Window::new(16, 1 << 20);
        window.set_shared(Box::new(|_| None));
        let bodies: Vec<_> = (0..6).map(|_| window.take(70_000).unwrap()).collect();
        assert!(bodies.iter().all(|body| body.key().is_none() && body.len() == 70_000));
        assert_eq!(window.lock().shared, 0);
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
