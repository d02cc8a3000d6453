//! Another process's table of descriptors: how many there are, and what hangs on a socket beside its descriptor: duplicates,
//! and the epolls that watch it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;

use nix::fcntl::readlinkat;
use nix::unistd::Pid;

use crate::kernel::duplicate::{EPOLL_LINK, socket_link};
use crate::kernel::procfs;

/// How many descriptors a process has; `None` if that can't be known (before Linux 6.2: proc_pid_fd(5)).
pub fn len(pid: Pid) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/fd")).ok().map(|folder| folder.len()).filter(|count| *count > 0)
}

/// An entry of an epoll (epoll_ctl(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    pub epoll: u32,
    /// The number of the socket in that entry.
    pub fd: u32,
    pub events: u32,
    pub data: u64,
}

/// What hangs on a socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attached {
    /// Its other numbers.
    pub duplicates: Vec<u32>,
    pub watches: Vec<Watch>,
}

impl Attached {
    /// Finds what hangs on the socket with this inode number that a thread has under `fd`.
    ///
    /// # Errors
    /// When this process has no ptrace access (ptrace(2), "Ptrace access mode checking"), or can't open so many files.
    pub fn to_socket(tid: Pid, fd: u32, inode: u64) -> io::Result<Self> {
        let folder = format!("/proc/{tid}/fd");
        let links = File::open(&folder)?; // a link is read faster by its folder's descriptor
        let own = socket_link(inode);
        let (mut duplicates, mut epolls) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&folder)? {
            let name = entry?.file_name();
            let Some(link) = unless_closed(readlinkat(&links, name.as_os_str()))? else { continue };
            let numbers = match link.as_os_str() {
                link if link == OsStr::new(&own) => &mut duplicates,
                link if link == OsStr::new(EPOLL_LINK) => &mut epolls,
                _ => continue,
            };
            numbers.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        duplicates.retain(|number| *number != fd);
        let is_number = |number: u32| number == fd || duplicates.contains(&number);
        let mut watches = Vec::new();
        for epoll in epolls {
            // Opened by its whole path, since /proc/TID/fdinfo is another folder.
            let text = fs::read_to_string(format!("/proc/{tid}/fdinfo/{epoll}"));
            let Some(text) = unless_closed(text)? else { continue };
            let entries = text.lines().filter_map(|line| parse_watch(line, epoll));
            watches
                .extend(entries.filter(|(of, watch)| *of == inode && is_number(watch.fd)).map(|(_, it)| it));
        }
        Ok(Self { duplicates, watches })
    }

    /// Which of the duplicates are closed on exec, in their order.
    pub fn close_on_exec(&self, tid: Pid) -> io::Result<Vec<bool>> {
        let flags = |fd: &u32| unless_closed(procfs::fd_flags(tid, *fd)).map(Option::unwrap_or_default);
        self.duplicates.iter().map(|fd| Ok(flags(fd)? & libc::O_CLOEXEC != 0)).collect()
    }
}

/// `None` if the other process has closed the file since, or has ended.
fn unless_closed<T, E: Into<io::Error>>(result: Result<T, E>) -> io::Result<Option<T>> {
    match result.map_err(Into::into) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
        result => result.map(Some),
    }
}

/// An entry in /proc/PID/fdinfo of an epoll (proc_pid_fdinfo(5)), after the inode number of what it watches.
fn parse_watch(line: &str, epoll: u32) -> Option<(u64, Watch)> {
    let mut words = line.strip_prefix("tfd:")?.split([' ', ':']).filter(|word| !word.is_empty());
    let fd = words.next()?.parse().ok()?;
    let mut hex_after = |name| {
        words.find(|word| *word == name)?;
        u64::from_str_radix(words.next()?, 16).ok()
    };
    let (events, data, inode) = (hex_after("events")?, hex_after("data")?, hex_after("ino")?);
    Some((inode, Watch { epoll, fd, events: u32::try_from(events).ok()?, data }))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::{AsFd, AsRawFd};

    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

    use super::*;

    #[test]
    fn entries_of_an_epoll_are_read() {
        let line = "tfd:        7 events: 8000001d data:     7ffd00000007  pos:0 ino:2c4f sdev:9";
        let watch = Watch { epoll: 5, fd: 7, events: 0x8000_001d, data: 0x7ffd_0000_0007 };
        assert_eq!(parse_watch(line, 5), Some((0x2c4f, watch)));
        assert_eq!(parse_watch("pos:\t0", 5), None);
        assert_eq!(parse_watch("tfd: 7 events: x", 5), None);
    }

    #[test]
    fn duplicates_and_epolls_of_a_socket_are_found_and_no_others() {
        let [socket, other] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let duplicate = socket.try_clone().unwrap();
        let epolls = [(); 2].map(|()| Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
        epolls[0].add(&socket, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1)).unwrap();
        epolls[1].add(&duplicate, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX)).unwrap();
        epolls[1].add(&other, EpollEvent::new(EpollFlags::EPOLLIN, 3)).unwrap();
        epolls[1].add(UdpSocket::bind("127.0.0.1:0").unwrap(), EpollEvent::empty()).unwrap();
        let inode = procfs::inode(socket.as_fd()).unwrap();
        let attached = Attached::to_socket(Pid::this(), socket.as_raw_fd() as u32, inode).unwrap();
        assert_eq!(attached.duplicates, [duplicate.as_raw_fd() as u32]);
        assert_eq!(attached.close_on_exec(Pid::this()).unwrap(), [true]);
        let found: Vec<(u32, u32, u64)> =
            attached.watches.iter().map(|it| (it.fd, it.events, it.data)).collect();
        let always = (EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP | EpollFlags::EPOLLIN).bits() as u32;
        let edge = always | EpollFlags::EPOLLET.bits() as u32;
        let (fd, duplicate) = (socket.as_raw_fd() as u32, duplicate.as_raw_fd() as u32);
        assert_eq!(found.len(), 2);
        assert!(
            found.contains(&(fd, edge, 1)) && found.contains(&(duplicate, always, u64::MAX)),
            "{found:x?}"
        );
    }
}
