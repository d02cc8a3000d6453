//! Duplicates of other processes' sockets. The other process may close its own at any time, so that to drop the duplicate is
//! the last close: that must not wait.
//!
//! It may also put another file in the place of the socket. Each close of a file of FUSE waits for its server, as does
//! fstat(2). So a file that isn't the one that was asked for is known by its link in /proc, and stays open in this process.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::unistd::Pid;
use socket2::SockRef;

use crate::kernel::inbox::Inbox;
use crate::kernel::{sockdiag, sys};

/// The link of an epoll in /proc/PID/fd.
pub const EPOLL_LINK: &str = "anon_inode:[eventpoll]";

/// The link of a socket in /proc/PID/fd.
pub fn socket_link(inode: u64) -> String {
    format!("socket:[{inode}]")
}

/// A duplicate of the file with this link that a thread has under `fd`. `pidfd` is that of the thread or of its process.
///
/// # Errors
/// Those of pidfd_getfd(2). NotFound if another file has the number. InvalidData if one got it meanwhile, so that this
/// process keeps that open: the other process must not be asked again.
pub fn duplicate_file(pidfd: BorrowedFd, tid: Pid, fd: u32, link: &str) -> io::Result<OwnedFd> {
    if !has_link(&format!("/proc/{tid}/fd/{fd}"), link)? {
        return Err(ErrorKind::NotFound.into());
    }
    only_with_link(vec![sys::pidfd_getfd(pidfd, fd)?], link)
}

/// The one of `fds`, if it has this link. Otherwise they stay open.
fn only_with_link(fds: Vec<OwnedFd>, link: &str) -> io::Result<OwnedFd> {
    let is_it =
        |fd: &OwnedFd| has_link(&format!("/proc/self/fd/{}", fd.as_raw_fd()), link).unwrap_or_default();
    match <[OwnedFd; 1]>::try_from(fds) {
        Ok([fd]) if is_it(&fd) => Ok(fd),
        others => {
            others.map_or_else(|fds| fds, Vec::from).into_iter().for_each(mem::forget);
            Err(ErrorKind::InvalidData.into())
        }
    }
}

fn has_link(path: &str, link: &str) -> io::Result<bool> {
    Ok(fs::read_link(path)?.as_os_str() == OsStr::new(link))
}

#[derive(Debug)]
pub struct Duplicate(OwnedFd);

impl Duplicate {
    /// A duplicate of the socket with this inode number that a thread has under `fd`.
    ///
    /// # Errors
    /// Those of [`duplicate_file`].
    pub fn of(pidfd: BorrowedFd, tid: Pid, fd: u32, inode: u64) -> io::Result<Self> {
        duplicate_file(pidfd, tid, fd, &socket_link(inode)).map(Self)
    }

    /// The duplicate of the socket with this inode number that another process has sent to `channel`.
    ///
    /// # Errors
    /// Those of recvmsg(2). InvalidData if the next message there has other descriptors or none; this process keeps some of
    /// them open.
    pub fn receive(channel: &Inbox, inode: u64) -> io::Result<Self> {
        let duplicate = only_with_link(channel.peek_descriptors()?, &socket_link(inode))?;
        channel.discard_peeked();
        Ok(Self(duplicate))
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
    use std::fs::File;
    use std::io::{IoSlice, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::RawFd;
    use std::time::{Duration, Instant};

    use nix::fcntl::OFlag;
    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
    };
    use nix::unistd::pipe2;

    use super::*;
    use crate::kernel::procfs;

    fn duplicate(socket: &impl AsRawFd, inode: u64) -> io::Result<Duplicate> {
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
        assert_eq!(duplicate(&listener, inode + 1).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_was_sent_instead_of_the_socket_stays_open() {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, its) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags).unwrap();
        let channel = Inbox::datagrams(ours).unwrap();
        let send = |fds: &[RawFd]| {
            let rights = [ControlMessage::ScmRights(fds)];
            sendmsg::<()>(its.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None).unwrap();
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = procfs::inode(listener.as_fd()).unwrap();
        let receive = || Duplicate::receive(&channel, inode).map(drop).map_err(|error| error.kind());
        send(&[listener.as_raw_fd()]);
        assert_eq!(receive(), Ok(()));
        assert_eq!(receive(), Err(ErrorKind::WouldBlock));
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        send(&[writer.as_raw_fd()]);
        drop(writer);
        assert_eq!(receive(), Err(ErrorKind::InvalidData));
        channel.discard_peeked();
        let read = File::from(reader).read(&mut [0]);
        assert_eq!(read.unwrap_err().kind(), ErrorKind::WouldBlock, "the other end is open still");
        send(&[listener.as_raw_fd(); 3]);
        assert_eq!(receive(), Err(ErrorKind::InvalidData));
        channel.discard_peeked();
    }
}
