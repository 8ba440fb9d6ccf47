//! Threads bound to processors.
//!
//! Where the nodes of a mesh share processors they take turns: whoever waits offers its processor to the others. For that,
//! threads that work at the same time must be on different processors from the start; the system moves those that never
//! sleep too rarely.

/// Binds the calling thread to number `index`, counted round, of the processors that the process may use. Where the system
/// refuses, the thread stays unbound: slower, not wrong.
#[cfg(target_os = "linux")]
pub(crate) fn bind_thread(index: usize) {
    use std::mem::{size_of, zeroed};
    // SAFETY: a set of processors is plain bits; the calls read and write sets of just this size.
    unsafe {
        let mut allowed: libc::cpu_set_t = zeroed();
        // The process's own: the thread that starts others may be bound already.
        if libc::sched_getaffinity(libc::getpid(), size_of::<libc::cpu_set_t>(), &mut allowed) != 0 {
            return;
        }
        let processors: Vec<usize> =
            (0..libc::CPU_SETSIZE as usize).filter(|&processor| libc::CPU_ISSET(processor, &allowed)).collect();
        let Some(&processor) = processors.get(index % processors.len().max(1)) else { return };
        let mut one: libc::cpu_set_t = zeroed();
        libc::CPU_SET(processor, &mut one);
        // A refusal leaves the thread where it was.
        let _refused = libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &one);
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn bind_thread(_index: usize) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_bound_thread_may_use_one_processor_and_others_as_before() {
        let allowed = || std::thread::available_parallelism().unwrap().get();
        let all = allowed();
        let bound = std::thread::spawn(move || {
            // Counted round: any number names a processor.
            bind_thread(1_000_003);
            allowed()
        });
        assert_eq!(bound.join().unwrap(), 1);
        assert_eq!(allowed(), all);
    }
}
