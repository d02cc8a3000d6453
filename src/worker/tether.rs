//! What kills workers when the wrapper dies before it can do it. The kernel kills its children (PR_SET_PDEATHSIG), but not
//! those that have changed their user, nor what they have started.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use nix::unistd::{Pid, pipe2};

use crate::kernel::sys;

/// The end of a pipe that this process alone has, for as long as it lives.
#[derive(Debug)]
pub struct Tethers(OwnedFd);

/// Kills a process group when [`Tethers`] is closed before it.
#[derive(Debug)]
pub struct Tether {
    /// The socket in whose queue the other end of the pipe is. What is in a queue is closed after everything that this
    /// process has open, when it dies: so the kernel finds that end when it looks for those to tell of the death.
    _socket: OwnedFd,
}

impl Tethers {
    pub fn new() -> io::Result<Self> {
        let (_, write) = pipe2(OFlag::O_CLOEXEC)?;
        Ok(Self(write))
    }

    /// Ties a process group, which must exist, to this process. The kernel remembers the group itself and not its number,
    /// which may become another group's.
    pub fn tie(&self, group: Pid) -> io::Result<Tether> {
        // Each open file has one owner.
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let end: File = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        sys::kill_group_at_event(end.as_fd(), group)?;
        let flags = SockFlag::SOCK_CLOEXEC;
        let (sender, socket) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags)?;
        let rights = [end.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(sender.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::empty(), None)?;
        Ok(Tether { _socket: socket })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::Command;

    use super::*;

    #[test]
    fn a_group_is_killed_when_the_pipe_is_closed_unless_its_tether_is_dropped_before() {
        let sleep = || Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
        let (mut killed, mut spared) = (sleep(), sleep());
        let tethers = Tethers::new().unwrap();
        let tie = |child: &std::process::Child| tethers.tie(Pid::from_raw(child.id() as i32)).unwrap();
        let _tether = tie(&killed);
        drop(tie(&spared));
        drop(tethers);
        assert_eq!(killed.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert!(spared.try_wait().unwrap().is_none());
        spared.kill().unwrap();
        spared.wait().unwrap();
    }
}
