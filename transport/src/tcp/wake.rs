//! Waking a thread that may sleep in epoll, without a system call when it does not.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Wake;

/// What other threads wake a TCP transport with.
pub(super) struct TcpWaker {
    waker: mio::Waker,
    woken: AtomicBool,
    sleeping: AtomicBool,
}

impl TcpWaker {
    pub fn new(waker: mio::Waker) -> Self {
        Self { waker, woken: AtomicBool::new(false), sleeping: AtomicBool::new(false) }
    }

    /// Whether somebody woke this thread since the last call.
    pub fn take(&self) -> bool {
        // The plain load keeps the spinning thread from writing the line all the time.
        self.woken.load(Ordering::Relaxed) && self.woken.swap(false, Ordering::SeqCst)
    }

    /// Announces that the thread is about to sleep (and then looks once more), or is up again.
    pub fn set_sleeping(&self, sleeping: bool) {
        self.sleeping.store(sleeping, Ordering::SeqCst);
    }

    /// As [`TcpWaker::take`], ordered after `set_sleeping`: either this sees the wake, or the waker sees the sleeper.
    pub fn take_before_sleep(&self) -> bool {
        self.woken.swap(false, Ordering::SeqCst)
    }
}

impl Wake for TcpWaker {
    fn wake(&self) {
        self.woken.store(true, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst)
            && let Err(error) = self.waker.wake()
        {
            tracing::error!(%error, "cannot wake the transport's thread; it goes on at its deadline");
        }
    }
}

impl fmt::Debug for TcpWaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpWaker").finish_non_exhaustive()
    }
}
