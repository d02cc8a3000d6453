//! What outlives the wrapper: processes that workers left behind are behind their filters still, and without an answer their
//! calls of bind and unlink would fail (ENOSYS). A process of the wrapper's stays with them until the last one has ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use log::{info, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, chdir, setsid};

use super::Interception;
use crate::kernel::helper;
use crate::kernel::procfs;
use crate::kernel::sys::{self, NotifResponse};
use crate::words::count;

/// Leaves a process that answers for these filters, if anyone needs it. Call it last: it has a copy of what is open now until
/// it has closed that.
pub fn leave(interceptions: impl IntoIterator<Item = Interception>) {
    let fds: Vec<OwnedFd> = interceptions.into_iter().map(|interception| interception.notify_fd).collect();
    let others = procfs::tree(Pid::this()).into_iter().skip(1).filter(|pid| !helper::is_helper(*pid));
    let living = others.filter(|pid| !procfs::is_ending(*pid)).count();
    // With process 1 of its PID namespace all others end.
    if fds.is_empty() || living == 0 || Pid::this().as_raw() == 1 {
        return;
    }
    let others = count(living, "process");
    match sys::fork() {
        Ok(None) => keep(fds),
        Ok(Some(keeper)) => {
            info!(
                "{others} that workers left behind live on; process {keeper} answers their calls of bind and unlink"
            );
        }
        Err(error) => warn!("{others} that workers left behind can't bind any more: {error}"),
    }
}

/// The life of that process.
fn keep(fds: Vec<OwnedFd>) -> ! {
    sys::close_all_but(&fds);
    let _ = prctl::set_name(c"reuse-run-keep");
    // No terminal, folder or signal of the wrapper's matters to it; it can be ended as any other process.
    let _ = setsid();
    let _ = chdir("/");
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
        let _ = sys::signal_default(signal);
    }
    answer_all(fds);
    std::process::exit(0)
}

/// Answers all calls with "continue" until every filter is that of no process any more.
fn answer_all(mut fds: Vec<OwnedFd>) {
    while !fds.is_empty() {
        let mut polled: Vec<PollFd> =
            fds.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        let _ = poll(&mut polled, PollTimeout::NONE);
        let events: Vec<PollFlags> =
            polled.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
        let mut events = events.into_iter();
        fds.retain(|fd| {
            let events = events.next().unwrap_or(PollFlags::empty());
            let has_call = events.contains(PollFlags::POLLIN);
            if has_call {
                let _ = answer(fd);
            }
            has_call || events.is_empty()
        });
    }
}

fn answer(fd: &OwnedFd) -> io::Result<()> {
    let notif = sys::seccomp_notif_recv(fd.as_fd())?;
    sys::seccomp_notif_send(fd.as_fd(), notif.id, NotifResponse::Continue)
}
