//! The few system calls that the standard library does not offer. The only unsafe of the crate beside [`crate::probe`].
#![allow(unsafe_code)]

use std::io;

use tokio::process::Command;

/// Makes the child die with this process, however this process ends, and shields it from the terminal's Ctrl-C, which
/// this process answers by stopping its children in order.
pub fn tie_to_parent(command: &mut Command) {
    command.process_group(0).kill_on_drop(true);
    #[cfg(target_os = "linux")]
    die_with_parent(command);
}

#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let tie = move || {
        // SAFETY: prctl with PR_SET_PDEATHSIG takes a signal number and no pointer; it is async-signal-safe, as what runs
        // between fork and exec must be.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // A parent that died before the call above will send no signal any more.
        if std::os::unix::process::parent_id() != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: `tie` calls prctl and getppid only: no allocation, no lock, no memory shared with the parent's threads.
    unsafe { command.pre_exec(tie) };
}

/// A signal that this crate sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Please stop.
    Term,
    /// Stop.
    Kill,
    /// Halt, without being asked and without ending.
    Halt,
    /// Go on after [`Signal::Halt`].
    Continue,
}

/// Sends a signal to a child. The caller has not reaped it yet, so the pid is still its own.
///
/// # Errors
/// The kernel's.
pub fn signal(pid: u32, signal: Signal) -> io::Result<()> {
    let number = match signal {
        Signal::Term => libc::SIGTERM,
        Signal::Kill => libc::SIGKILL,
        Signal::Halt => libc::SIGSTOP,
        Signal::Continue => libc::SIGCONT,
    };
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: kill takes two integers and touches no memory of ours.
    if unsafe { libc::kill(pid, number) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a process with this pid exists (a zombie counts).
pub fn exists(pid: u32) -> bool {
    std::path::Path::new("/proc").join(pid.to_string()).exists()
}
