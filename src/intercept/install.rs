//! Puts a thread, and everything that it starts, behind the filter.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;

use crate::intercept::filter::filter;
use crate::kernel::sys;

/// Whether an answer reaches the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    Arrive,
    /// A signal can make the worker repeat a call that was answered already, and the wrapper isn't told.
    MayBeLost,
}

/// Installs the filter for the calling thread and everything that it starts. Returns the fd from which the
/// stopped calls are read. `has_udp` is whether the worker may share UDP ports. Sets no_new_privs if the process may not
/// install a filter without it.
///
/// # Errors
/// EBUSY if the process is behind such a filter already; ENOSYS and EINVAL if the kernel has none.
pub fn install(has_udp: bool) -> io::Result<(OwnedFd, Answers)> {
    let install = || {
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        let killable = flags | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV; // Linux 5.19
        let filter = filter(has_udp);
        match sys::seccomp_set_mode_filter(killable, &filter) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                sys::seccomp_set_mode_filter(flags, &filter).map(|fd| (fd, Answers::MayBeLost))
            }
            result => result.map(|fd| (fd, Answers::Arrive)),
        }
    };
    match install() {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            nix::sys::prctl::set_no_new_privs()?;
            install()
        }
        result => result,
    }
}

/// Tries in a process of its own, which ends at once, whether workers can be intercepted.
///
/// # Errors
/// Why they can't.
pub fn probe() -> io::Result<Answers> {
    let mut child = Command::new("/");
    // The child reports by errors that seccomp(2) never returns.
    const ANSWERS_ARRIVE: i32 = libc::ECANCELED;
    const ANSWERS_MAY_BE_LOST: i32 = libc::ERESTART;
    sys::before_exec(&mut child, || {
        let (_notify_fd, answers) = install(false)?;
        Err(io::Error::from_raw_os_error(match answers {
            Answers::Arrive => ANSWERS_ARRIVE,
            Answers::MayBeLost => ANSWERS_MAY_BE_LOST,
        }))
    });
    match child.spawn() {
        Err(error) if error.raw_os_error() == Some(ANSWERS_ARRIVE) => Ok(Answers::Arrive),
        Err(error) if error.raw_os_error() == Some(ANSWERS_MAY_BE_LOST) => Ok(Answers::MayBeLost),
        Err(error) => Err(error),
        Ok(_) => Err(io::ErrorKind::Other.into()), // impossible: a directory can't be executed
    }
}
