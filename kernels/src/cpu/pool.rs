//! Threads: work is cut into more tasks than threads and taken from a counter, so that a slow core stalls nothing.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::KernelError;

/// Most threads of one backend.
pub const THREADS_MAX: usize = 1024;
/// Work below this many multiply-accumulates (some ten microseconds) runs where it is: waking a thread costs as much.
const SHARE_COST_MIN: u64 = 1 << 20;
/// Tasks for each thread, where the work can be cut so far.
const TASKS_PER_THREAD: usize = 4;

/// The caller's thread and `threads - 1` others.
pub(crate) struct Pool {
    others: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Pool {
    pub fn new(threads: usize) -> Result<Pool, KernelError> {
        if threads == 0 || threads > THREADS_MAX {
            return Err(KernelError::Threads { asked: threads, max: THREADS_MAX });
        }
        let others = if threads == 1 {
            None
        } else {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads - 1).thread_name(|i| format!("compute-{i}"));
            Some(pool.build().map_err(|source| KernelError::Pool { threads, source })?)
        };
        Ok(Pool { others, threads })
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Into how many tasks work of `cost` multiply-accumulates is best cut.
    pub fn tasks(&self, cost: u64) -> usize {
        if self.others.is_none() || cost < SHARE_COST_MIN { 1 } else { self.threads * TASKS_PER_THREAD }
    }

    /// Runs `body` for every task below `tasks`, on all threads if `cost` is worth it.
    pub fn run(&self, tasks: usize, cost: u64, body: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                body(task);
            }
        };
        match &self.others {
            Some(pool) if tasks > 1 && cost >= SHARE_COST_MIN => pool.in_place_scope(|scope| {
                for _ in 1..self.threads.min(tasks) {
                    scope.spawn(|_| work());
                }
                work();
            }),
            _ => work(),
        }
    }
}

/// A slice that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: parts are only made by `part`, whose caller promises that they are disjoint.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn new(slice: &mut [T]) -> Shared<T> {
        Shared { start: slice.as_mut_ptr(), len: slice.len() }
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
            let pool = Pool::new(threads).unwrap();
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
        assert!(matches!(Pool::new(0), Err(KernelError::Threads { .. })));
        assert!(matches!(Pool::new(THREADS_MAX + 1), Err(KernelError::Threads { .. })));
    }
}
