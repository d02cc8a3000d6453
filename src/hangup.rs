//! Hangs up for workers that die of the stop signal, as those do that have no handler for it.
//!
//! When a process ends, the kernel frees its memory first and closes its files last (do_exit, kernel/exit.c), which
//! takes milliseconds. A client that keeps its connection open and sends the next request in that time gets no answer.
//! So the first such worker of a generation has its idle connections closed as soon as it is seen to die, and all
//! others have theirs closed before the signal. A worker that has a handler ends its connections as it likes.

use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use socket2::SockRef;

use crate::procfs;
use crate::sockdiag::Traffic;
use crate::sys;

/// Who is still alive so long after the stop signal has a handler for it.
const LONGEST: Duration = Duration::from_millis(3);

/// A connection that is idle, kept open by its client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub fd: u32,
    pub inode: u64,
    /// How many bytes had come when it was looked at.
    pub received: u64,
}

impl Kept {
    /// A duplicate, if this process may have it and the thread still has it open.
    fn copy(&self, tid: Pid) -> Option<OwnedFd> {
        let copy = sys::pidfd_getfd(tid.as_raw(), self.fd).ok()?;
        procfs::inode(copy.as_fd()).is_ok_and(|inode| inode == self.inode).then_some(copy)
    }

    /// Whether something has come since it was looked at, as far as this process may know.
    fn is_awake(&self, copy: &OwnedFd) -> bool {
        sys::tcp_info_bytes(copy.as_fd()).is_ok_and(|info| Traffic::parse(&info).received != self.received)
    }

    /// Closes it, as far as this process may. Returns false if something has come and it is left open.
    fn close(&self, tid: Pid) -> bool {
        let Some(copy) = self.copy(tid) else { return true };
        let is_awake = self.is_awake(&copy);
        if !is_awake {
            let _ = SockRef::from(&copy).shutdown(Shutdown::Both); // else the client has closed it
        }
        !is_awake
    }
}

/// A process and its idle connections.
pub type Idle = (Pid, Vec<Kept>);

/// Whether something has come since these connections were looked at, as far as this process may know.
pub fn are_awake(idle: &[Idle]) -> bool {
    let is_awake = |pid, kept: &Kept| kept.copy(pid).is_some_and(|copy| kept.is_awake(&copy));
    idle.iter().any(|(pid, connections)| connections.iter().any(|kept| is_awake(*pid, kept)))
}

/// Closes these connections, as far as this process may, but for those on which something has come. Returns whether
/// there are none of these.
pub fn hang_up(idle: &[Idle]) -> bool {
    let mut all = true;
    for (pid, connections) in idle {
        for kept in connections {
            all &= kept.close(*pid);
        }
    }
    all
}

/// Waits a moment for processes that were sent the stop signal, and closes these connections of those that it kills.
/// Returns whether it kills all of them, and there are any.
pub fn see_off(idle: &[Idle]) -> bool {
    let begun = Instant::now();
    let mut alive: Vec<&Idle> = idle.iter().collect();
    // Without a pause: who sleeps when a process of many threads ends may be woken only after it.
    while !alive.is_empty() && begun.elapsed() < LONGEST {
        alive.retain(|(pid, connections)| {
            let is_killed = procfs::is_killed(*pid);
            if is_killed {
                // The main thread may be gone already while another still has the files.
                for tid in procfs::threads(*pid) {
                    connections.iter().for_each(|kept| _ = kept.close(tid));
                }
            }
            !is_killed
        });
    }
    alive.is_empty() && !idle.is_empty()
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::process::Command;

    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::{Id, WaitPidFlag, waitid};

    use super::*;

    /// A client, the server's end of its connection, and what is known of that.
    fn connection() -> (TcpStream, TcpStream, Kept) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let inode = procfs::inode(server.as_fd()).unwrap();
        let fd = server.as_raw_fd() as u32;
        (client, server, Kept { fd, inode, received: 0 })
    }

    fn is_open(client: &mut TcpStream) -> bool {
        client.set_nonblocking(true).unwrap();
        client.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    #[test]
    fn idle_connections_are_closed_and_one_on_which_something_has_come_is_not() {
        let (mut idle_client, _idle_server, idle) = connection();
        let (mut client, mut server, kept) = connection();
        let both = [(Pid::this(), vec![kept.clone(), idle.clone()])];
        assert!(!are_awake(&both));
        client.write_all(b"?").unwrap();
        server.read_exact(&mut [0]).unwrap();
        assert!(are_awake(&both) && !are_awake(&[(Pid::this(), vec![idle])]));
        assert!(!hang_up(&both));
        assert!(is_open(&mut client) && !is_open(&mut idle_client));
        assert!(hang_up(&[(Pid::this(), vec![Kept { received: 1, ..kept }])]));
        assert!(!is_open(&mut client));
    }

    #[test]
    fn another_socket_under_the_same_number_is_left_alone() {
        let (mut client, _server, kept) = connection();
        assert!(hang_up(&[(Pid::this(), vec![Kept { inode: kept.inode + 1, ..kept }])]));
        assert!(is_open(&mut client));
    }

    #[test]
    fn whom_the_signal_kills_is_told_from_who_lives_on() {
        assert!(!see_off(&[(Pid::this(), Vec::new())]), "it lives");
        let mut naive = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(naive.id() as i32);
        kill(pid, Signal::SIGINT).unwrap();
        waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
        assert!(see_off(&[(pid, Vec::new())]));
        naive.wait().unwrap();
        assert!(!see_off(&[]), "there was nobody to see");
    }
}
