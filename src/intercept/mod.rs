//! Answers the system calls of workers that the filter stops (seccomp_unotify(2)).
//!
//! A worker's `bind` to a TCP or UDP port replaces its socket by one of the pool, and the wrapper does its `listen`.
//! A `bind` to a Unix socket's path replaces its socket by the one of its generation. An `unlink` of such a path,
//! and the question whether a lent socket listens, are answered as the worker expects it of a socket of its own.
//! Everything else is answered with "continue": the kernel then does what it would have done without the wrapper.

mod bound;
mod caller;
mod carry;
mod complaints;
mod errand;
pub mod filter;
mod inherit;
mod install;
pub mod keeper;
mod options;
mod port;
pub mod reader;
pub mod udp;
mod unix;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use log::debug;

use crate::address::{Address, Endpoint};
use crate::ids::Borrower;
use crate::intercept::bound::BoundSockets;
use crate::intercept::caller::{Caller, OwnSocket, Readings};
use crate::intercept::carry::{Errands, Unwatched};
use crate::intercept::complaints::{Complaint, Complaints};
use crate::intercept::filter::{Call, decode};
use crate::intercept::options::NotedOptions;
use crate::intercept::reader::{Question, Reader};
use crate::kernel::jobs::Outcome;
use crate::kernel::procfs;
use crate::kernel::sys::{self, NotifResponse};
use crate::pool::Pool;
use crate::pool::paths::{self, UnixSockets};

pub use install::{Answers, install, probe};

/// A system call that changed where a worker listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenChange {
    Listens(Endpoint),
    /// The worker removed the path of its own socket.
    StoppedListening(Endpoint),
    /// The worker asks the kernel for a UDP port that isn't shared, for the socket with this inode number.
    BindsUdp {
        inode: u64,
        address: Address,
    },
}

/// The wrapper's end of one worker's filter, and what it knows about the worker's sockets.
#[derive(Debug)]
pub struct Interception {
    notify_fd: OwnedFd,
    borrower: Borrower,
    /// The listeners that the wrapper was started with and every worker has, by inode number.
    inherited: Rc<[(u64, Endpoint)]>,
    known: Known,
    /// Whether the filter has stopped a `listen`.
    has_seen_listen: bool,
    worker_ended: bool,
    /// Calls whose answer needs something that is being read or done, by the kernel's id.
    waiting: HashMap<u64, (libc::seccomp_notif, Readings)>,
}

/// What calls are answered with.
pub struct AtHand<'a> {
    pub pool: &'a mut Pool,
    pub unix: &'a mut UnixSockets,
    pub reader: &'a mut Reader,
    /// Whether the worker has yet to become ready.
    pub is_starting: bool,
    /// Whether the UDP ports that it binds now are shared.
    pub shares_udp: bool,
}

/// What is known about a worker.
#[derive(Debug)]
struct Known {
    options: NotedOptions,
    bound: BoundSockets,
    complaints: Complaints,
    /// What the bind that is being answered means at once.
    change: Option<ListenChange>,
    errands: Errands,
}

impl Interception {
    pub fn new(
        notify_fd: OwnedFd,
        borrower: Borrower,
        inherited: Rc<[(u64, Endpoint)]>,
        answers: Answers,
    ) -> Self {
        let (options, bound) = (NotedOptions::default(), BoundSockets::new(answers));
        let (complaints, errands) = (Complaints::default(), Errands::default());
        let known = Known { options, bound, complaints, change: None, errands };
        let waiting = HashMap::new();
        Self { notify_fd, borrower, inherited, known, has_seen_listen: false, worker_ended: false, waiting }
    }

    /// Whether the worker has called `listen` at all, in a way that the filter sees.
    pub fn has_seen_listen(&self) -> bool {
        self.has_seen_listen
    }

    /// The worker has ended. Processes that it started may live on behind the filter. Their calls are
    /// answered with "continue" from now on; without an answer they would fail (ENOSYS).
    pub fn worker_has_ended(&mut self) {
        self.worker_ended = true;
    }

    /// Takes one system call, after [`Interception::as_fd`] became readable, and answers it, or has the reader read what
    /// its answer needs.
    pub fn take(&mut self, at_hand: &mut AtHand) -> Option<ListenChange> {
        let slot = self.borrower.slot;
        let notif = match sys::seccomp_notif_recv(self.notify_fd.as_fd()) {
            Ok(notif) => notif,
            Err(error) => {
                debug!("worker {slot}: a system call was interrupted before its answer: {error}");
                return None;
            }
        };
        self.answer(notif, Readings::default(), at_hand)
    }

    /// Goes on with a call of which this was read.
    pub fn go_on(
        &mut self,
        id: u64,
        answers: Vec<(Question, Outcome)>,
        at_hand: &mut AtHand,
    ) -> Option<ListenChange> {
        let (notif, mut readings) = self.waiting.remove(&id)?;
        readings.answers.extend(answers);
        self.answer(notif, readings, at_hand)
    }

    /// Goes on with a call for whose path this was done.
    pub fn go_on_with_path(
        &mut self,
        id: u64,
        outcome: paths::Outcome,
        at_hand: &mut AtHand,
    ) -> Option<ListenChange> {
        let (notif, readings) = self.waiting.remove(&id)?;
        self.answer(notif, Readings { path: Some(outcome), ..readings }, at_hand)
    }

    fn answer(
        &mut self,
        notif: libc::seccomp_notif,
        readings: Readings,
        at_hand: &mut AtHand,
    ) -> Option<ListenChange> {
        let slot = self.borrower.slot;
        let (response, change) = self.carry_out(&notif, &readings, at_hand);
        let missing = readings.missing.take();
        if readings.waits_for_path.take() {
            self.waiting.insert(notif.id, (notif, readings));
            return None;
        }
        if !missing.is_empty() {
            let writes = missing.iter().any(|question| matches!(question, Question::DenyListening { .. }));
            let notify_fd = writes.then(|| self.notify_fd.try_clone().ok()).flatten();
            at_hand.reader.ask(self.borrower.worker, notif.id, missing, notify_fd);
            self.waiting.insert(notif.id, (notif, readings));
            return None;
        }
        if let Err(error) = sys::seccomp_notif_send(self.notify_fd.as_fd(), notif.id, response) {
            debug!("worker {slot}: an answer came too late: {error}");
        }
        change
    }

    /// A process has stopped or ended: goes on with what the worker's threads do for the wrapper. Returns how many do
    /// something.
    pub fn run_errands(&mut self, pool: &mut Pool) -> usize {
        let Known { bound, complaints, errands, .. } = &mut self.known;
        for Unwatched { inode, error } in errands.advance() {
            debug!(
                "worker {}: its epoll can't watch the socket that it was lent: {error}",
                self.borrower.slot
            );
            complaints.make(self.borrower.slot, Complaint::Unwatched);
            bound.remove(inode);
            pool.take_back_open(self.borrower.worker, inode);
        }
        errands.count()
    }

    fn carry_out(
        &mut self,
        notif: &libc::seccomp_notif,
        readings: &Readings,
        at_hand: &mut AtHand,
    ) -> (NotifResponse, Option<ListenChange>) {
        const CONTINUE: (NotifResponse, Option<ListenChange>) = (NotifResponse::Continue, None);
        let AtHand { pool, unix, is_starting, shares_udp, .. } = at_hand;
        let caller = Caller::new(self.notify_fd.as_fd(), notif, self.borrower, readings);
        let Known { options, bound, complaints, .. } = &mut self.known;
        match decode(&notif.data) {
            Call::Unlink { from, path } => {
                let (response, removed) = unix::unlink(&caller, from, path, *is_starting, complaints, unix);
                (response, removed.map(ListenChange::StoppedListening))
            }
            _ if self.worker_ended => CONTINUE,
            Call::Bind { fd, address, len } => match read_bind(&caller, fd, address, len) {
                Ok(Some((own, sockaddr))) => {
                    let response = match paths::path_of_sockaddr(&sockaddr) {
                        Some(path) => unix::bind(&caller, own, &path, &mut self.known, unix),
                        None => port::bind(&caller, own, &sockaddr, &mut self.known, pool, *shares_udp),
                    };
                    (response, self.known.change.take())
                }
                Ok(None) => CONTINUE,
                Err(error) => {
                    match error.kind() {
                        _ if !caller.still_waits() => {}
                        io::ErrorKind::PermissionDenied if caller.has_same_user() => {
                            complaints.make(self.borrower.slot, Complaint::Unreadable);
                        }
                        io::ErrorKind::PermissionDenied => {
                            complaints.make(self.borrower.slot, Complaint::OtherUser);
                        }
                        io::ErrorKind::TimedOut => complaints.make(self.borrower.slot, Complaint::Hung),
                        _ => {}
                    }
                    CONTINUE
                }
            },
            Call::Listen { fd, backlog } => {
                self.has_seen_listen = true;
                let (response, endpoint) = listen(&caller, fd, backlog, &self.inherited, bound, pool, unix);
                (response, endpoint.map(ListenChange::Listens))
            }
            Call::SetOption { fd, option, value, len } => {
                (options::set(&caller, fd, option, (value, len), options, complaints, pool), None)
            }
            Call::AsksWhetherListening { fd, value, len } => match caller.socket_inode(fd) {
                Some(inode) if bound.contains(inode) && caller.deny_listening(value, len).is_ok() => {
                    (NotifResponse::Success, None)
                }
                _ => CONTINUE,
            },
            Call::Other => CONTINUE,
        }
    }
}

impl AsFd for Interception {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notify_fd.as_fd()
    }
}

/// The socket and the `struct sockaddr` of a bind. `None` for a bind that the kernel refuses: the fd is no
/// socket, or the address is too long or not all there.
///
/// # Errors
/// Why the caller can't be read.
fn read_bind(caller: &Caller, fd: u32, address: u64, len: u64) -> io::Result<Option<(OwnSocket, Vec<u8>)>> {
    const MAX_SOCKADDR_LENGTH: u64 = size_of::<libc::sockaddr_storage>() as u64;
    let Some(inode) = procfs::socket_inode(caller.tid, fd)? else { return Ok(None) };
    let _ = caller.protocol(fd); // is needed too
    let sockaddr = caller.memory(address, len.min(MAX_SOCKADDR_LENGTH))?;
    Ok((sockaddr.len() as u64 == len).then_some((OwnSocket { fd, inode }, sockaddr)))
}

/// Does `listen` on a socket that the wrapper owns. Returns the answer, and where the worker listens now.
fn listen(
    caller: &Caller,
    fd: u32,
    backlog: i32,
    inherited: &[(u64, Endpoint)],
    bound: &mut BoundSockets,
    pool: &mut Pool,
    unix: &UnixSockets,
) -> (NotifResponse, Option<Endpoint>) {
    let Some(inode) = caller.socket_inode(fd).filter(|_| caller.still_waits()) else {
        return (NotifResponse::Continue, None);
    };
    if let Some((_, endpoint)) = inherited.iter().find(|(inherited, _)| *inherited == inode) {
        return (NotifResponse::Continue, Some(endpoint.clone()));
    }
    let listens = if pool.lent(caller.borrower.worker, inode).is_some() {
        pool.listen(caller.borrower.worker, inode, backlog).map(Endpoint::Port)
    } else if unix.socket(inode).is_some() {
        unix.listen(inode, backlog).map(Endpoint::Unix)
    } else {
        return (NotifResponse::Continue, None);
    };
    match listens {
        Ok(endpoint) => {
            bound.remove(inode);
            debug!("worker {} (pid {}) listens on {endpoint}", caller.borrower.slot, caller.tid);
            (NotifResponse::Success, Some(endpoint))
        }
        Err(error) => (NotifResponse::Errno(error.raw_os_error().unwrap_or(libc::EINVAL)), None),
    }
}
