//! Which process has a socket open: a look at one place, and a search through all processes, a little at a time.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::time::Instant;

use nix::unistd::Pid;

use crate::kernel::open_sockets;
use crate::kernel::procfs::{self, Life};

/// A descriptor of a process. A program may have another one for the same socket, in this process or in another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub pid: Pid,
    pub fd: u32,
}

/// What was seen at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The socket is there.
    Here,
    /// It is not.
    Gone,
    /// This process may not look.
    Unknown,
}

impl Place {
    /// Looks for a socket there. This is one readlink(2).
    pub fn look(self, inode: u64) -> Seen {
        match procfs::socket_inode(self.pid, self.fd) {
            Ok(found) if found == Some(inode) => Seen::Here,
            Ok(_) => Seen::Gone,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Seen::Gone,
            Err(_) => Seen::Unknown,
        }
    }

    /// Whether its process has ended.
    pub fn has_ended(self) -> bool {
        procfs::life(self.pid) != Life::Lives
    }
}

/// What a search has shown of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    At(Place),
    /// No process has it.
    Nowhere,
    /// Some process of a worker may not be searched, a descriptor is on its way to a process, or /proc shows nothing.
    Unknown,
}

/// A search for sockets of workers. Between two parts of it a process may give a socket to one that was searched
/// before: only a second search is sure.
#[derive(Debug)]
pub struct Search {
    /// By inode number, with what was found of each.
    wanted: HashMap<u64, Option<Place>>,
    /// Those that are left, the next one last.
    pids: Vec<Pid>,
    current: Option<Current>,
    is_unsure: bool,
}

/// The process that is being searched.
struct Current {
    pid: Pid,
    /// Whether a worker has started it, or it is one.
    is_workers: bool,
    /// `None` for a descriptor that is no socket.
    descriptors: Box<dyn Iterator<Item = io::Result<Option<(u32, u64)>>>>,
}

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.pid.fmt(f)
    }
}

/// After how many descriptors to look at the clock.
const AT_ONCE: usize = 64;

impl Search {
    /// `likely` processes are searched first.
    pub fn new(likely: &[Pid], wanted: impl IntoIterator<Item = u64>) -> Self {
        let mut pids: Vec<Pid> = procfs::others().filter(|pid| !likely.contains(pid)).collect();
        pids.extend(likely);
        let wanted = wanted.into_iter().map(|inode| (inode, None)).collect();
        let is_unsure = !procfs::has_own_numbers().unwrap_or(false);
        Self { wanted, pids, current: None, is_unsure }
    }

    /// Goes on until this time, or a little longer. Returns whether the search has come to its end.
    pub fn advance(&mut self, until: Instant) -> bool {
        while self.wanted.values().any(Option::is_none) {
            let Some(mut current) = self.current.take().or_else(|| self.next_process()) else { return true };
            let mut count = 0;
            for descriptor in current.descriptors.by_ref().take(AT_ONCE) {
                count += 1;
                self.is_unsure |= current.is_workers && descriptor.is_err();
                let Ok(Some((fd, inode))) = descriptor else { continue };
                if let Some(found) = self.wanted.get_mut(&inode) {
                    *found = Some(Place { pid: current.pid, fd });
                }
                self.is_unsure |=
                    current.is_workers && open_sockets::has_descriptors_waiting(current.pid, fd);
            }
            self.current = (count == AT_ONCE).then_some(current);
            if Instant::now() >= until {
                return false;
            }
        }
        true
    }

    fn next_process(&mut self) -> Option<Current> {
        let pid = self.pids.pop()?;
        let is_workers = procfs::is_of_tree(pid, Pid::this());
        // The table of a main thread that has ended before the others is empty.
        let is_over = is_workers && procfs::life(pid) == Life::Ended;
        let thread = is_over.then(|| procfs::threads(pid).into_iter().find(|tid| *tid != pid)).flatten();
        let pid = thread.unwrap_or(pid);
        let descriptors: Box<dyn Iterator<Item = _>> = match open_sockets::each_descriptor(pid) {
            Ok(descriptors) => Box::new(descriptors),
            Err(_) => {
                // What has ended and wasn't reaped has nothing. Only root may see that.
                self.is_unsure |= is_workers && (!is_over || thread.is_some());
                Box::new(std::iter::empty())
            }
        };
        Some(Current { pid, is_workers, descriptors })
    }

    pub fn found(&self, inode: u64) -> Found {
        match self.wanted.get(&inode).copied().flatten() {
            Some(place) => Found::At(place),
            None if self.is_unsure => Found::Unknown,
            None => Found::Nowhere,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::{AsFd, AsRawFd};
    use std::process::{Child, Command};
    use std::time::Duration;

    use super::*;
    use crate::kernel::sys;

    const FD: u32 = 500;

    /// A listener that nothing but a process of its own has open, by this number.
    fn elsewhere() -> (u64, Child) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = procfs::inode(listener.as_fd()).unwrap();
        let mut command = Command::new("sleep");
        command.arg("1000");
        sys::before_exec(&mut command, move || sys::dup2_for_exec(listener.as_fd(), FD as i32));
        (inode, command.spawn().unwrap())
    }

    /// Searches until the answer is certain: not while another test has a child that can't be looked into, as when it ends.
    fn search(likely: &[Pid], inode: u64) -> Found {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut search = Search::new(likely, [inode]);
            let mut parts = 0;
            while !search.advance(Instant::now()) {
                parts += 1;
            }
            assert!(parts < 100_000);
            let found = search.found(inode);
            if found != Found::Unknown || Instant::now() >= deadline {
                return found;
            }
        }
    }

    #[test]
    fn a_socket_is_found_in_whichever_process_has_it_and_nowhere_after_that_has_ended() {
        let (inode, mut process) = elsewhere();
        let place = Place { pid: Pid::from_raw(process.id() as i32), fd: FD };
        assert_eq!(place.look(inode), Seen::Here);
        assert_eq!([place.look(inode + 1), Place { fd: FD + 1, ..place }.look(inode)], [Seen::Gone; 2]);
        assert!(!place.has_ended());
        assert_eq!(search(&[], inode), Found::At(place));
        assert_eq!(search(&[place.pid], inode), Found::At(place));
        process.kill().unwrap();
        process.wait().unwrap();
        assert!(place.has_ended() && place.look(inode) == Seen::Gone);
        assert_eq!(search(&[place.pid], inode), Found::Nowhere);
    }

    #[test]
    fn a_search_goes_on_until_its_time_is_over() {
        let mut search = Search::new(&[], [0]);
        assert!(search.advance(Instant::now() + Duration::from_secs(3600)));
        assert!(!matches!(search.found(0), Found::At(_)));
    }

    #[test]
    fn descriptors_in_the_queue_of_a_unix_socket_are_seen() {
        use std::io::IoSlice;

        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        let (ours, its) = std::os::unix::net::UnixStream::pair().unwrap();
        let waits = || open_sockets::has_descriptors_waiting(Pid::this(), its.as_raw_fd() as u32);
        assert!(!waits());
        let fds = [ours.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(b"x")], &message, MsgFlags::empty(), None).unwrap();
        assert!(waits());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(!open_sockets::has_descriptors_waiting(Pid::this(), listener.as_raw_fd() as u32));
    }
}
