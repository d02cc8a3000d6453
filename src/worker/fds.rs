//! The numbers of a worker's file descriptors, which this process keeps free for it, and the listeners that
//! this process was started with.
//!
//! After stdin, stdout and stderr come the listeners (sd_listen_fds(3)), the readiness pipe and Node's IPC
//! channel. The pipe's number has one digit as long as possible: dash takes no more in `>&$READY_FD`.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, fcntl};
use socket2::{SockRef, Type};

use crate::address::{Address, Endpoint, Transport};
use crate::kernel::procfs;
use crate::kernel::sys;

/// The number of a worker's first listener.
pub const FIRST_FD: RawFd = 3;

/// The number of the readiness pipe of a worker that has so many listeners.
pub fn ready_fd(listeners: usize) -> RawFd {
    FIRST_FD + listeners as RawFd
}

/// The number of its channel, if it has one.
pub fn node_channel_fd(listeners: usize) -> RawFd {
    ready_fd(listeners) + 1
}

/// A listening socket for a worker, and its name in LISTEN_FDNAMES.
#[derive(Debug)]
pub struct Listener {
    pub name: String,
    pub socket: OwnedFd,
}

impl Listener {
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { name: self.name.clone(), socket: self.socket.try_clone()? })
    }

    /// Its inode number and where it listens.
    pub fn endpoint(&self) -> Option<(u64, Endpoint)> {
        let socket = SockRef::from(&self.socket);
        let address = socket.local_addr().ok()?;
        let endpoint = match address.as_socket() {
            Some(socket_address) => {
                let v6only = socket_address.is_ipv6() && socket.only_v6().unwrap_or(false);
                let device = sys::bound_device(self.socket.as_fd()).unwrap_or(0);
                let is_datagram = socket.r#type().is_ok_and(|kind| kind == Type::DGRAM);
                let transport = if is_datagram { Transport::Udp } else { Transport::Tcp };
                Address::new(socket_address, v6only, device).over(transport).into()
            }
            None => Endpoint::Unix(address.as_pathname()?.to_owned()),
        };
        Some((procfs::inode(self.socket.as_fd()).ok()?, endpoint))
    }
}

/// The listeners that this process was started with (sd_listen_fds(3)). They move to other numbers: the workers' have
/// theirs. Every other fd that this process was started with is kept from its workers, apart from stdin, stdout and stderr.
///
/// # Errors
/// Without /proc of this PID namespace; or which listener is missing.
pub fn take_inherited() -> io::Result<Vec<Listener>> {
    let missing = |error: io::Error| io::Error::new(error.kind(), format!("/proc is needed: {error}"));
    if !procfs::has_own_numbers().map_err(missing)? {
        return Err(io::Error::other(
            "/proc is that of another PID namespace: mount its own (unshare --mount-proc)",
        ));
    }
    let open = fs::read_dir("/proc/self/fd").map_err(missing)?;
    let numbers: Vec<RawFd> = open.flatten().filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    let for_us = std::env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    let count = std::env::var("LISTEN_FDS").ok().and_then(|count| count.parse::<u16>().ok());
    let given = FIRST_FD..FIRST_FD + RawFd::from(count.filter(|_| for_us).unwrap_or(0));
    let started_with: Vec<RawFd> =
        numbers.into_iter().filter(|fd| *fd > 2 && sys::set_close_on_exec(*fd)).collect();
    if let Some(fd) = given.clone().find(|fd| !started_with.contains(fd)) {
        let what = format!("LISTEN_FDS is {}, but file descriptor {fd} is not open", given.len());
        return Err(io::Error::other(what));
    }
    take(given)
}

fn take(given: Range<RawFd>) -> io::Result<Vec<Listener>> {
    const FIRST_NEW_NUMBER: RawFd = 64;
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').filter(|name| !name.is_empty());
    let take = |number| {
        let fd = sys::owned_fd(number);
        let copy = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(FIRST_NEW_NUMBER))?;
        let name = names.next().unwrap_or("unknown").to_owned();
        Ok(Listener { name, socket: sys::owned_fd(copy) })
    };
    given.map(take).collect()
}

/// Opens /dev/null under each free number that a worker with so many listeners needs, so that no fd that this
/// process or std opens later has one of them. All are close-on-exec.
pub fn placeholders(listeners: usize) -> io::Result<Vec<File>> {
    let mut placeholders = Vec::new();
    loop {
        let file = File::open("/dev/null")?;
        if file.as_raw_fd() > node_channel_fd(listeners) {
            return Ok(placeholders);
        }
        placeholders.push(file);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_worker_finds_its_listeners_then_its_pipe_then_its_channel() {
        assert_eq!((ready_fd(0), node_channel_fd(0)), (3, 4));
        assert_eq!((ready_fd(2), node_channel_fd(2)), (5, 6));
        assert_eq!(ready_fd(6), 9, "docs/reference.md");
    }

    #[test]
    fn a_listener_knows_where_it_listens() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let expected = Address::new(socket.local_addr().unwrap(), false, 0);
        let listener = Listener { name: "http".to_owned(), socket: socket.into() };
        let (inode, endpoint) = listener.endpoint().unwrap();
        assert_eq!(endpoint, Endpoint::Port(expected));
        assert_eq!(
            listener.try_clone().unwrap().endpoint(),
            Some((inode, endpoint)),
            "a copy is the same socket"
        );
        let unnamed = UnixDatagram::unbound().unwrap();
        assert_eq!(Listener { name: String::new(), socket: unnamed.into() }.endpoint(), None);
    }
}
