//! Processes of reuse-run's own, which do what could make it wait. What waits for a terminal that nobody reads, or for a file
//! system that doesn't answer, may wait for ever, and SIGKILL doesn't always end it: so this is a process and not a thread,
//! and has nothing open but what it was given.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::poll::PollFlags;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Pid, getppid};

use crate::kernel::{ready, sys};

/// Those that haven't been reaped.
static PIDS: Mutex<BTreeSet<Pid>> = Mutex::new(BTreeSet::new());

fn pids() -> MutexGuard<'static, BTreeSet<Pid>> {
    PIDS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a process is one of reuse-run's own.
pub fn is_helper(pid: Pid) -> bool {
    pids().contains(&pid)
}

/// A child is one of reuse-run's own until [`forget`]: it still has everything open that reuse-run has.
pub fn add(pid: Pid) {
    pids().insert(pid);
}

/// A child was reaped, so its number may soon be another process's. Or it is another program now.
pub fn forget(pid: Pid) {
    pids().remove(&pid);
}

/// Forks a process with this name, which ends with reuse-run at the latest. Returns `None` in it.
///
/// # Errors
/// Those of fork(2).
pub fn fork(name: &CStr) -> io::Result<Option<Pid>> {
    let (wrapper, own_name) = (Pid::this(), prctl::get_name()?);
    prctl::set_name(name)?; // before: it may be killed before it has done anything
    let forked = sys::fork();
    if matches!(forked, Ok(None)) {
        let _ = SigSet::all().thread_set_mask(); // the handlers' pipe may be another file by its number here
        if prctl::set_pdeathsig(Signal::SIGKILL).is_err() || getppid() != wrapper {
            sys::exit_now();
        }
        return forked;
    }
    prctl::set_name(&own_name)?;
    pids().extend(forked.as_ref().ok().copied().flatten());
    forked
}

/// A process that is killed when this is dropped, or when reuse-run ends.
#[derive(Debug)]
pub struct Helper {
    pidfd: OwnedFd,
}

impl Helper {
    /// Starts a process with this name, which does `life` with these fds and ends. No signal but SIGKILL reaches it.
    ///
    /// # Errors
    /// Those of fork(2).
    pub fn start(name: &CStr, fds: Vec<OwnedFd>, life: impl FnOnce(&[OwnedFd])) -> io::Result<Self> {
        let Some(pid) = fork(name)? else {
            sys::close_all_but(&fds);
            life(&fds);
            sys::exit_now();
        };
        Ok(Self { pidfd: sys::pidfd_open(pid.as_raw())? })
    }

    pub fn kill(&self) {
        let _ = sys::pidfd_send_signal(self.as_fd(), Signal::SIGKILL);
    }

    /// Waits until it has ended, at most until `until`.
    pub fn wait_end(&self, until: Instant) {
        let _ = ready::wait(&[self.as_fd()], PollFlags::POLLIN, until);
    }
}

/// Readable when it has ended.
impl AsFd for Helper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::time::Duration;

    use nix::unistd::pipe;

    use super::*;

    #[test]
    fn a_helper_has_what_it_is_given_and_ends_when_it_is_dropped() {
        let (reader, writer) = pipe().unwrap();
        let (silent, held) = pipe().unwrap();
        let helper = Helper::start(c"reuse-run-test", vec![writer], |fds| {
            let pid = std::process::id().to_ne_bytes();
            let _ = File::from(fds[0].try_clone().unwrap()).write_all(&pid);
            std::thread::sleep(Duration::from_secs(600));
        });
        let (helper, mut reader, mut pid) = (helper.unwrap(), File::from(reader), [0; 4]);
        reader.read_exact(&mut pid).unwrap();
        let pid = Pid::from_raw(i32::from_ne_bytes(pid));
        assert!(is_helper(pid));
        drop(held);
        assert_eq!(File::from(silent).read(&mut [0]).unwrap(), 0, "it has not kept the other pipe open");
        drop(helper);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "it has ended");
        forget(pid);
        assert!(!is_helper(pid));
    }
}
