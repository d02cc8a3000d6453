//! Duplicates of other processes' sockets. The other process may close its own at any time, so that to drop the duplicate is
//! the last close: that must not wait.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;
use socket2::SockRef;

use crate::kernel::{procfs, sockdiag, sys};

#[derive(Debug)]
pub struct Duplicate(OwnedFd);

impl Duplicate {
    /// A duplicate of the socket with this inode number that a thread has under `fd`, if this process may have one. `pidfd` is
    /// that of the thread or of its process.
    pub fn of(pidfd: BorrowedFd, tid: Pid, fd: u32, inode: u64) -> Option<Self> {
        // By the link first: to close some other file can take long, as one of FUSE, whose server has to answer.
        let is_it = procfs::socket_inode(tid, fd).is_ok_and(|its| its == Some(inode));
        let duplicate = is_it.then(|| sys::pidfd_getfd(pidfd, fd))?.ok()?;
        Self(duplicate).with_inode(inode)
    }

    /// The duplicate of the socket with this inode number that another process has sent to `channel`, if it has.
    pub fn receive(channel: BorrowedFd, inode: u64) -> Option<Self> {
        let mut byte = [0];
        let mut space = nix::cmsg_space!(RawFd);
        let mut buffers = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(channel.as_raw_fd(), &mut buffers, Some(&mut space), flags).ok()?;
        let rights = received.cmsgs().ok()?.find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        Self(sys::owned_fd(rights?)).with_inode(inode)
    }

    fn with_inode(self, inode: u64) -> Option<Self> {
        procfs::inode(self.as_fd()).is_ok_and(|its| its == inode).then_some(self)
    }
}

impl AsFd for Duplicate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Duplicate {
    fn drop(&mut self) {
        close_without_waiting(self.0.as_fd());
    }
}

/// Makes the close that follows return at once. If a socket lingers (SO_LINGER, socket(7)), its last close waits until the
/// client has acknowledged everything. What this takes away from the other process is that its own close waits: the data
/// is sent all the same.
pub fn close_without_waiting(socket: BorrowedFd) {
    let reference = SockRef::from(&socket);
    let lingers = reference.linger().is_ok_and(|linger| linger.is_some_and(|time| !time.is_zero()));
    // The option of a socket that isn't a connection stays: its close never waits, and connections inherit it.
    if lingers && sockdiag::listen_info(socket).is_ok_and(|info| !info.closed && !info.listening) {
        let _ = reference.set_linger(None);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::time::{Duration, Instant};

    use super::*;

    fn duplicate(socket: &impl AsRawFd, inode: u64) -> Option<Duplicate> {
        let pidfd = sys::pidfd_open(Pid::this().as_raw()).unwrap();
        Duplicate::of(pidfd.as_fd(), Pid::this(), socket.as_raw_fd() as u32, inode)
    }

    #[test]
    fn the_last_close_of_a_connection_that_lingers_does_not_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap(); // reads nothing
        let (mut server, _) = listener.accept().unwrap();
        SockRef::from(&server).set_linger(Some(Duration::from_secs(20))).unwrap();
        server.set_nonblocking(true).unwrap();
        while !server.write(&[0; 65536]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {}
        let duplicate = duplicate(&server, procfs::inode(server.as_fd()).unwrap()).unwrap();
        drop(server);
        let begun = Instant::now();
        drop(duplicate);
        assert!(begun.elapsed() < Duration::from_secs(5), "it took {:?}", begun.elapsed());
    }

    #[test]
    fn a_listener_lingers_as_before_and_another_file_is_not_duplicated() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        SockRef::from(&listener).set_linger(Some(Duration::from_secs(20))).unwrap();
        let inode = procfs::inode(listener.as_fd()).unwrap();
        drop(duplicate(&listener, inode).unwrap());
        assert_eq!(SockRef::from(&listener).linger().unwrap(), Some(Duration::from_secs(20)));
        assert!(duplicate(&listener, inode + 1).is_none());
    }
}
