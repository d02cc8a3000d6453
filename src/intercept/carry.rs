//! What hangs on a worker's own socket, when one of the wrapper's takes its place: its duplicates, the epolls that watch it,
//! and its options, which have to be read from it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use log::debug;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;

use crate::intercept::caller::{Caller, OwnSocket};
use crate::intercept::errand::{Errand, Outcome, Task};
use crate::kernel::duplicate::{Duplicate, EPOLL_LINK, duplicate_file};
use crate::kernel::fdtable::{Attached, Watch};
use crate::kernel::inbox::Inbox;
use crate::kernel::procfs;
use crate::kernel::sys;
use crate::kernel::tracee::Tracee;

/// Why a socket of the wrapper's couldn't take the place of a worker's own.
#[derive(Debug)]
pub enum NotReplaced {
    /// The worker watches its socket, and would wait for ever by one that it doesn't watch.
    Watched(io::Error),
    Other(io::Error),
}

/// What an errand was for.
#[derive(Debug)]
enum Purpose {
    /// To have the socket with this inode number watched.
    Watch(u64),
    /// To get a duplicate of the worker's own socket, which has this inode number, by this channel.
    Duplicate(u64, Inbox),
}

/// A socket that its worker can't watch, and whose bind has failed for that.
#[derive(Debug)]
pub struct Unwatched {
    pub inode: u64,
    pub error: io::Error,
}

/// What the threads of a worker are doing for the wrapper.
#[derive(Debug, Default)]
pub struct Errands {
    under_way: Vec<(Errand, Purpose)>,
    /// The duplicates that threads have sent, with the inode number; `None` where that has failed.
    sent: HashMap<Pid, (u64, Option<Duplicate>)>,
    /// Whether the worker has had another file duplicated than it was asked for, which the wrapper keeps open. One such file is
    /// enough.
    swaps_files: bool,
}

/// How many threads may have sent a duplicate and not bound again. They may have been killed meanwhile.
const MAX_SENT: usize = 16;

/// How the epolls of a thread come to watch another socket.
enum Way {
    /// There are none.
    None,
    /// The thread adds it to them.
    Trace(Tracee),
    /// The wrapper does, by duplicates of them. Another process, such as a debugger, traces the thread already.
    Duplicates(Vec<OwnedFd>),
}

/// What is known about a worker's own socket.
pub enum OwnDuplicate {
    Here(Duplicate),
    /// It is on its way. The worker binds again afterwards.
    Comes,
    Refused,
}

impl Errands {
    pub fn count(&self) -> usize {
        self.under_way.len()
    }

    /// A duplicate of the caller's socket: by pidfd_getfd(2), or where that is refused, sent by the caller itself.
    pub fn duplicate(&mut self, caller: &Caller, own: OwnSocket) -> OwnDuplicate {
        let duplicate = self.take(|| Duplicate::of(caller.pidfd()?.as_fd(), caller.tid, own.fd, own.inode));
        if let Ok(duplicate) = duplicate {
            return OwnDuplicate::Here(duplicate);
        }
        match self.sent.remove(&caller.tid).filter(|(inode, _)| *inode == own.inode) {
            Some((_, Some(duplicate))) => OwnDuplicate::Here(duplicate),
            Some((_, None)) => OwnDuplicate::Refused,
            None if self.swaps_files => OwnDuplicate::Refused,
            None => match self.ask_for_duplicate(caller, own) {
                Ok(()) => OwnDuplicate::Comes,
                Err(error) => {
                    debug!("worker {} can't send its socket: {error}", caller.borrower.slot);
                    OwnDuplicate::Refused
                }
            },
        }
    }

    /// Takes something of the worker's, unless it has swapped files before.
    fn take<T>(&mut self, take: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.swaps_files {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        take().inspect_err(|error| self.swaps_files = error.kind() == io::ErrorKind::InvalidData)
    }

    /// # Errors
    /// When there is none, since this process may neither trace the thread nor duplicate its descriptors.
    fn way_to_watch(&mut self, caller: &Caller, watches: &[Watch]) -> io::Result<Way> {
        if watches.is_empty() {
            return Ok(Way::None);
        }
        let error = match Tracee::seize(caller.tid) {
            Ok(tracee) => return Ok(Way::Trace(tracee)),
            Err(error) => error,
        };
        let process = caller.pidfd()?;
        let epolls = self.take(|| {
            let epoll = |watch: &Watch| duplicate_file(process.as_fd(), caller.tid, watch.epoll, EPOLL_LINK);
            watches.iter().map(epoll).collect()
        });
        epolls.map(Way::Duplicates).map_err(|_| error)
    }

    fn ask_for_duplicate(&mut self, caller: &Caller, own: OwnSocket) -> io::Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, its) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags)?;
        let ours = Inbox::datagrams(ours)?; // other threads may send something there too
        let tracee = Tracee::seize(caller.tid)?;
        // The thread is traced now, and has to do its errand also if it was given no channel.
        let task = Task::SendDuplicate { fd: own.fd, channel: caller.give(its.as_fd()).unwrap_or(u32::MAX) };
        let errand = Errand::begin(caller.tid, tracee, caller.stopped, task)?;
        self.under_way.push((errand, Purpose::Duplicate(own.inode, ours)));
        Ok(())
    }

    /// Puts `socket` in the place of the caller's own, under all numbers of that, and has the caller's epolls watch it.
    pub fn replace(
        &mut self,
        caller: &Caller,
        own: OwnSocket,
        socket: BorrowedFd,
        close_on_exec: bool,
    ) -> Result<(), NotReplaced> {
        let attached = Attached::to_socket(caller.tid, own.fd, own.inode).map_err(NotReplaced::Other)?;
        let flags = attached.close_on_exec(caller.tid).map_err(NotReplaced::Other)?;
        let inode = procfs::inode(socket).map_err(NotReplaced::Other)?;
        let way = self.way_to_watch(caller, &attached.watches).map_err(NotReplaced::Watched)?;
        let duplicates = attached.duplicates.iter().copied().zip(flags);
        let replaced = duplicates
            .chain([(own.fd, close_on_exec)])
            .try_for_each(|(fd, close_on_exec)| caller.replace(fd, socket, close_on_exec));
        match way {
            Way::None => {}
            Way::Trace(tracee) => {
                let task = if replaced.is_ok() { Task::Watch(attached.watches) } else { Task::Nothing };
                let errand = Errand::begin(caller.tid, tracee, caller.stopped, task);
                self.under_way.push((errand.map_err(NotReplaced::Other)?, Purpose::Watch(inode)));
            }
            Way::Duplicates(epolls) => {
                for (epoll, watch) in epolls.into_iter().zip(attached.watches) {
                    let Watch { fd, events, data, .. } = watch;
                    sys::epoll_add_as(epoll, socket, fd, events, data).map_err(NotReplaced::Watched)?;
                }
            }
        }
        replaced.map_err(NotReplaced::Other)
    }

    /// Goes on with all errands. Returns the sockets of those that have failed.
    pub fn advance(&mut self) -> Vec<Unwatched> {
        let mut unwatched = Vec::new();
        let mut index = 0;
        while let Some((errand, _)) = self.under_way.get_mut(index) {
            let Some(outcome) = errand.advance() else {
                index += 1;
                continue;
            };
            let (errand, purpose) = self.under_way.swap_remove(index);
            match (purpose, outcome) {
                (Purpose::Watch(inode), Outcome::Failed(error)) => unwatched.push(Unwatched { inode, error }),
                (Purpose::Duplicate(inode, channel), Outcome::Done | Outcome::Failed(_)) => {
                    let duplicate = self.take(|| Duplicate::receive(&channel, inode)).ok();
                    if self.sent.len() >= MAX_SENT {
                        self.sent.clear();
                    }
                    self.sent.insert(errand.tid, (inode, duplicate));
                }
                (_, Outcome::Done | Outcome::Gone) => {}
            }
        }
        unwatched
    }
}
