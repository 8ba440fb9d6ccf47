//! Threads: work is cut into more tasks than threads. Each thread has a span of neighbouring tasks, for what it asks memory for
//! ahead of one is what the next needs, and takes from the others' when its own is done, so that a slow core stalls nothing.
//!
//! A decoding step is some hundred calls of some ten microseconds each, and waking a sleeping thread takes as long as such a
//! call. So a thread without work looks for the next for a while, offering its processor to others all the time, before it
//! sleeps. The caller works too, and waits only for threads that took a task: one that is late finds nothing left to do.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::bind::bind_thread;
use crate::KernelError;

/// Most threads of one backend.
pub const THREADS_MAX: usize = 1024;
/// Work below this many multiply-accumulates (some ten microseconds) runs where it is.
const SHARE_COST_MIN: u64 = 1 << 18;
/// Tasks for each thread, where the work can be cut so far.
const TASKS_PER_THREAD: usize = 4;
/// How long a thread without work looks for some before it sleeps: longer than from one layer to the next.
const SPIN_MAX: Duration = Duration::from_millis(2);
/// Looks between two offers of the processor to others.
const LOOKS_PER_YIELD: usize = 64;

/// The caller's thread and `threads - 1` others.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    others: Vec<std::thread::JoinHandle<()>>,
    threads: usize,
    /// Held by the caller whose work the threads do; another caller meanwhile works alone.
    caller: Mutex<()>,
}

/// What callers and threads meet at.
struct Shared {
    /// The present job, or null. Whoever wants to work on it is counted in `inside` first and looks again.
    job: std::sync::atomic::AtomicPtr<Job<'static>>,
    inside: AtomicUsize,
    /// Jobs so far, for threads to see that there is a new one.
    jobs: AtomicUsize,
    stop: AtomicBool,
    /// Threads that sleep.
    sleeping: AtomicUsize,
    asleep: Mutex<()>,
    wake: Condvar,
}

/// A call's work.
struct Job<'a> {
    body: &'a (dyn Fn(usize) + Sync),
    /// One for each thread, all tasks together.
    spans: Box<[Span]>,
    panicked: AtomicBool,
}

/// Tasks that a thread takes one after another, as does whoever has done its own.
struct Span {
    next: AtomicUsize,
    end: usize,
}

impl<'a> Job<'a> {
    fn new(body: &'a (dyn Fn(usize) + Sync), tasks: usize, threads: usize) -> Job<'a> {
        let from = |thread: usize| tasks * thread / threads;
        let spans = (0..threads).map(|t| Span { next: AtomicUsize::new(from(t)), end: from(t + 1) }).collect();
        Job { body, spans, panicked: AtomicBool::new(false) }
    }

    /// Works as thread `thread`, its own span first.
    fn work(&self, thread: usize) {
        let (before, from) = self.spans.split_at(thread);
        for span in from.iter().chain(before) {
            loop {
                let task = span.next.fetch_add(1, Ordering::Relaxed);
                if task >= span.end {
                    break;
                }
                (self.body)(task);
            }
        }
    }
}

impl Pool {
    /// `threads` with the caller's; the others are bound to processors after number `bind_from`, if there is one.
    pub fn new(threads: usize, bind_from: Option<usize>) -> Result<Pool, KernelError> {
        if threads == 0 || threads > THREADS_MAX {
            return Err(KernelError::Threads { asked: threads, max: THREADS_MAX });
        }
        let shared = Arc::new(Shared {
            job: Default::default(),
            inside: AtomicUsize::new(0),
            jobs: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Pool { shared, others: Vec::new(), threads, caller: Mutex::new(()) };
        for i in 1..threads {
            let shared = pool.shared.clone();
            let thread = std::thread::Builder::new().name(format!("compute-{i}")).spawn(move || {
                if let Some(first) = bind_from {
                    bind_thread(first + i);
                }
                shared.serve(i);
            });
            pool.others.push(thread.map_err(|source| KernelError::Pool { threads, source })?);
        }
        Ok(pool)
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Into how many tasks work of `cost` multiply-accumulates is best cut.
    pub fn tasks(&self, cost: u64) -> usize {
        if self.threads == 1 || cost < SHARE_COST_MIN { 1 } else { self.threads * TASKS_PER_THREAD }
    }

    /// Runs `body` for every task below `tasks`, on all threads if `cost` is worth it and no other caller has them.
    ///
    /// # Panics
    /// When `body` does, on any thread; the other tasks may then not have run.
    pub fn run(&self, tasks: usize, cost: u64, body: impl Fn(usize) + Sync) {
        let shared = self.threads > 1 && tasks > 1 && cost >= SHARE_COST_MIN;
        let job = Job::new(&body, tasks, if shared { self.threads } else { 1 });
        let caller = if shared { self.caller.try_lock() } else { Err(TryLockError::WouldBlock) };
        match caller {
            Ok(guard) => self.share(&job, guard),
            // A call that panicked took its job back all the same.
            Err(TryLockError::Poisoned(guard)) => self.share(&job, guard.into_inner()),
            Err(TryLockError::WouldBlock) => job.work(0),
        }
        if job.panicked.into_inner() {
            panic!("a task on another thread panicked");
        }
    }

    fn share(&self, job: &Job<'_>, _caller: MutexGuard<'_, ()>) {
        /// Takes the job back and waits until nobody works on it any more, also when the caller's own task panics.
        struct TakeBack<'a>(&'a Shared);
        impl Drop for TakeBack<'_> {
            fn drop(&mut self) {
                self.0.job.store(std::ptr::null_mut(), Ordering::SeqCst);
                let mut looks = 0;
                while self.0.inside.load(Ordering::SeqCst) != 0 {
                    pause(&mut looks);
                }
            }
        }
        let shared = &*self.shared;
        let _taken_back = TakeBack(shared);
        let job: *const Job<'_> = job;
        shared.job.store(job.cast_mut().cast(), Ordering::SeqCst);
        shared.jobs.fetch_add(1, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            drop(shared.asleep.lock().unwrap_or_else(PoisonError::into_inner));
            shared.wake.notify_all();
        }
        // SAFETY: it is the caller's, and lives beyond this function.
        unsafe { (*job).work(0) };
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.asleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for thread in self.others.drain(..) {
            // Its panics were caught: there is nothing to learn from the join.
            let _ended = thread.join();
        }
    }
}

impl Shared {
    /// A thread's life; the caller is number 0.
    fn serve(&self, thread: usize) {
        let mut seen = 0;
        while let Some(jobs) = self.next_job(seen) {
            seen = jobs;
            self.inside.fetch_add(1, Ordering::SeqCst);
            let job = self.job.load(Ordering::SeqCst);
            if !job.is_null() {
                // SAFETY: whoever takes a job back waits, after that, for all who were counted before they saw it.
                let job = unsafe { &*job };
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job.work(thread))).is_err() {
                    job.panicked.store(true, Ordering::SeqCst);
                }
            }
            self.inside.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits for a job after number `seen`; its number, or `None` at the end.
    fn next_job(&self, seen: usize) -> Option<usize> {
        let news = || self.jobs.load(Ordering::SeqCst) != seen || self.stop.load(Ordering::SeqCst);
        let (started, mut looks) = (Instant::now(), 0);
        while !news() {
            pause(&mut looks);
            if looks.is_multiple_of(LOOKS_PER_YIELD) && started.elapsed() >= SPIN_MAX {
                let mut guard = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
                self.sleeping.fetch_add(1, Ordering::SeqCst);
                while !news() {
                    guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleeping.fetch_sub(1, Ordering::SeqCst);
            }
        }
        (!self.stop.load(Ordering::SeqCst)).then(|| self.jobs.load(Ordering::SeqCst))
    }
}

/// One look's pause; offers the processor to others now and then.
fn pause(looks: &mut usize) {
    *looks = looks.wrapping_add(1);
    if looks.is_multiple_of(LOOKS_PER_YIELD) { std::thread::yield_now() } else { std::hint::spin_loop() }
}

/// A slice that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Parts<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: parts are only made by `part`, whose caller promises that they are disjoint.
unsafe impl<T: Send> Send for Parts<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    pub fn new(slice: &mut [T]) -> Parts<T> {
        Parts { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// The place of element `index`, for kernels that write through pointers.
    pub fn at(&self, index: usize) -> *mut T {
        assert!(index <= self.len, "a place outside the slice");
        self.start.wrapping_add(index)
    }

    /// Elements `from..from + len`.
    /// # Safety
    /// The slice is still borrowed by whoever made this, and no other part that overlaps is alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.len && len <= self.len - from, "a part outside the slice");
        // SAFETY: inside the slice as checked, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads, None).unwrap();
            for (tasks, cost) in [(0, u64::MAX), (1, u64::MAX), (100, u64::MAX), (100, 1)] {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, cost, |task| {
                    runs[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn no_threads_and_too_many_are_errors() {
        assert!(matches!(Pool::new(0, None), Err(KernelError::Threads { .. })));
        assert!(matches!(Pool::new(THREADS_MAX + 1, None), Err(KernelError::Threads { .. })));
    }
}
