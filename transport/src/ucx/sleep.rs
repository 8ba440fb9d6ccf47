//! Sleeping until a descriptor is readable, and being woken from another thread.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::Wake;

/// Wakes a transport: a flag for one that spins, an event descriptor for one that sleeps.
#[derive(Debug)]
pub struct Waker {
    woken: AtomicBool,
    sleeping: AtomicBool,
    event: File,
}

impl Waker {
    /// One that nobody has called yet.
    pub fn new() -> io::Result<Arc<Self>> {
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let event = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        Ok(Arc::new(Self { woken: AtomicBool::new(false), sleeping: AtomicBool::new(false), event }))
    }

    /// Whether somebody called since the last time this was asked.
    pub fn take(&self) -> bool {
        // Looking before writing keeps the cache line shared while the owner spins.
        self.woken.load(Ordering::SeqCst) && self.woken.swap(false, Ordering::SeqCst)
    }

    /// Announces that the owner is about to sleep; false when it was called and must not.
    fn fall_asleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        // The caller sets `woken` and then looks at `sleeping`: one of the two sees the other.
        let quiet = !self.woken.load(Ordering::SeqCst);
        if !quiet {
            self.wake_up();
        }
        quiet
    }

    fn wake_up(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
        let mut count = [0; 8];
        // Nothing to read is the common case; a stale count would only cost one early return.
        let _ = (&self.event).read(&mut count);
    }
}

impl Wake for Waker {
    fn wake(&self) {
        self.woken.store(true, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) {
            // Fails only when the counter is full, and then the descriptor is readable already.
            let _ = (&self.event).write(&1_u64.to_ne_bytes());
        }
    }
}

/// The descriptors that a transport looks at, in the order they were given.
#[derive(Debug, Default)]
pub struct Watched(Vec<libc::pollfd>);

impl Watched {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds one, to be looked at for readability (and for writability too if `write`).
    pub fn push(&mut self, fd: RawFd, write: bool) {
        let events = libc::POLLIN | libc::POLLRDHUP | if write { libc::POLLOUT } else { 0 };
        self.0.push(libc::pollfd { fd, events, revents: 0 });
    }

    /// Looks once, without blocking; whether any is ready.
    pub fn look(&mut self) -> bool {
        self.poll(0) > 0
    }

    /// Sleeps until one is ready, or `deadline`.
    pub fn look_until(&mut self, deadline: Instant) {
        self.poll(milliseconds_until(deadline));
    }

    /// Sleeps until one is ready, `waker` is called, or `deadline`.
    pub fn sleep(&mut self, waker: &Waker, deadline: Instant) {
        if !waker.fall_asleep() {
            return;
        }
        self.push(waker.event.as_raw_fd(), false);
        self.poll(milliseconds_until(deadline));
        self.0.pop();
        waker.wake_up();
    }

    /// Whether the one added as number `at` was ready when last looked at.
    pub fn ready(&self, at: usize) -> bool {
        self.0.get(at).is_some_and(|fd| fd.revents != 0)
    }

    fn poll(&mut self, timeout_ms: i32) -> i32 {
        // SAFETY: a valid array of as many entries as are named. A failure (a signal) leaves nothing ready.
        let ready = unsafe { libc::poll(self.0.as_mut_ptr(), self.0.len() as libc::nfds_t, timeout_ms) };
        if ready < 0 {
            self.0.iter_mut().for_each(|fd| fd.revents = 0);
        }
        ready
    }
}

/// Rounded up: a wait that ends just before its deadline would be asked again and again.
fn milliseconds_until(deadline: Instant) -> i32 {
    let left = deadline.saturating_duration_since(Instant::now()).saturating_add(Duration::from_micros(999));
    i32::try_from(left.as_millis()).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_before_the_sleep_prevents_it() {
        let waker = Waker::new().unwrap();
        waker.wake();
        let start = Instant::now();
        Watched::default().sleep(&waker, start + Duration::from_secs(30));
        assert!(start.elapsed() < Duration::from_secs(20));
        assert!(waker.take());
        assert!(!waker.take(), "a call is seen once");
    }

    #[test]
    fn a_call_during_the_sleep_ends_it() {
        let waker = Waker::new().unwrap();
        let caller = Arc::clone(&waker);
        let start = Instant::now();
        let thread = std::thread::spawn(move || {
            while !caller.sleeping.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            caller.wake();
        });
        Watched::default().sleep(&waker, start + Duration::from_secs(30));
        assert!(start.elapsed() < Duration::from_secs(20));
        assert!(waker.take());
        thread.join().unwrap();
    }

    #[test]
    fn nobody_calling_ends_at_the_deadline() {
        let waker = Waker::new().unwrap();
        let deadline = Instant::now() + Duration::from_millis(5);
        Watched::default().sleep(&waker, deadline);
        assert!(Instant::now() >= deadline);
        assert!(!waker.take());
    }
}
