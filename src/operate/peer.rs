//! Who is at the other end of a control connection. Both sides ask: any process may connect to a name in the abstract
//! namespace, and any process may take one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::PollFlags;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;

use crate::kernel::{procfs, ready, sys};

/// The process that has called connect(2), or listen(2), as SO_PEERCRED shows it (unix(7)).
#[derive(Debug)]
pub struct Peer {
    /// 0 if it has no number in this PID namespace.
    pub pid: u32,
    pub uid: u32,
    /// `None` before Linux 6.5.
    pidfd: Option<OwnedFd>,
}

impl Peer {
    pub fn of(stream: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(stream, PeerCredentials)?;
        let pidfd = match sys::peer_pidfd(stream.as_fd()) {
            Ok(pidfd) => Some(pidfd),
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { pid: credentials.pid() as u32, uid: credentials.uid(), pidfd })
    }

    /// Whether it is in the PID namespace and in the user namespace of this process. `false` if that can't be known, as
    /// when it has ended.
    pub fn shares_namespaces(&self) -> bool {
        self.pid != 0
            && procfs::shares_namespaces(Pid::from_raw(self.pid as i32)).unwrap_or(false)
            && !self.has_ended()
    }

    /// Whether it has ended, so that its number may be another process's by now (pidfd_open(2), "poll"). Without a pidfd
    /// that can't be known.
    fn has_ended(&self) -> bool {
        let Some(pidfd) = &self.pidfd else { return false };
        !ready::now(pidfd.as_fd(), PollFlags::POLLIN).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&stream).unwrap();
        assert_eq!((peer.pid, peer.uid), (std::process::id(), nix::unistd::geteuid().as_raw()));
        assert!(peer.shares_namespaces());
    }
}
