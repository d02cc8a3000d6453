//! What the pool's epoll reports of each socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use log::debug;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::ids::MemberId;
use crate::kernel::notice::Notice;
use crate::pool::accept_queues::AcceptQueues;

/// What to report of a socket. That a listener was shut down is always reported (EPOLLHUP).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Each change of state. Of a socket that doesn't listen. (A level-triggered epoll would report without end that it
    /// is closed.)
    Changes,
    ShutDown,
    /// That a connection waits.
    Connections,
    /// That a connection waits, by way of the accept queues.
    AcceptQueue,
    /// The next datagram, and nothing after it.
    Datagram,
}

/// What epoll reports when the accept queues are to be sampled.
const QUEUES: u64 = u64::MAX;
/// What it reports when a connection has come, although a worker may have taken it.
const COMES: u64 = u64::MAX - 1;
const REPORTED_ONCE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLONESHOT);

#[derive(Debug)]
pub struct Watcher {
    epoll: Epoll,
    pub queues: AcceptQueues,
    /// Tells of connections that workers take at once; `None` if these don't matter, or the kernel doesn't have it.
    comes: Option<Notice>,
}

/// Some of the events that epoll has to report.
pub struct Batch {
    pub events: Vec<(MemberId, EpollFlags)>,
    /// Whether there may be more.
    pub is_full: bool,
    /// Whether a connection has come: see [`Watcher::await_connection`].
    pub has_come: bool,
}

impl Watcher {
    /// `sample_interval` is the time between two samples of the accept queues while one stands.
    ///
    /// # Errors
    /// Those of epoll_create(2) and epoll_ctl(2).
    pub fn new(sample_interval: Duration) -> io::Result<Self> {
        let (epoll, queues) =
            (Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, AcceptQueues::new(sample_interval)?);
        epoll.add(&queues, EpollEvent::new(REPORTED_ONCE, QUEUES))?;
        Ok(Self { epoll, queues, comes: None })
    }

    /// Sets what is reported of a socket.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn watch(&mut self, id: MemberId, socket: BorrowedFd, interest: Interest) -> io::Result<()> {
        let flags = match interest {
            Interest::Changes => EpollFlags::EPOLLOUT | EpollFlags::EPOLLET,
            Interest::ShutDown | Interest::AcceptQueue => EpollFlags::empty(),
            Interest::Connections => EpollFlags::EPOLLIN,
            Interest::Datagram => REPORTED_ONCE,
        };
        let event = EpollEvent::new(flags, u64::from(id.0));
        self.epoll.modify(socket, &mut event.clone()).or_else(|_| self.epoll.add(socket, event))?;
        if interest == Interest::AcceptQueue {
            return self.queues.watch(id, socket);
        }
        self.queues.forget(id, socket);
        Ok(())
    }

    /// Reports nothing more of this socket. To close it is not enough: a worker may still have a duplicate, and an epoll
    /// watches a socket until the last one is closed (epoll(7)).
    pub fn forget(&mut self, id: MemberId, socket: BorrowedFd) {
        let _ = self.epoll.delete(socket);
        self.queues.forget(id, socket);
    }

    /// What has happened. Deal with all events of a batch before the next call.
    pub fn next_batch(&mut self) -> Batch {
        let mut ready = [EpollEvent::empty(); 64];
        let count = self.epoll.wait(&mut ready, EpollTimeout::ZERO).unwrap_or(0);
        let (mut events, mut has_come) = (Vec::with_capacity(count), false);
        for event in &ready[..count] {
            match event.data() {
                QUEUES => self.queues.begin(Instant::now()),
                COMES => {
                    self.comes.iter_mut().for_each(Notice::take);
                    has_come = true;
                }
                id => events.push((MemberId(id as u32), event.events())),
            }
        }
        Batch { events, is_full: count == ready.len(), has_come }
    }

    /// Awaits connections by a [`Notice`], where the kernel has it.
    pub fn heed_connections(&mut self) {
        let add = |comes: Notice| {
            self.epoll.add(&comes, EpollEvent::new(EpollFlags::EPOLLIN, COMES))?;
            Ok(comes)
        };
        let comes = Notice::new().and_then(add);
        self.comes = comes.inspect_err(|error| debug!("connections can't be awaited: {error}")).ok();
        self.await_connection();
    }

    /// Has a [`Batch`] tell of the next connection to a listener of the accept queues, even if a worker takes it at once. Returns
    /// whether it will.
    pub fn await_connection(&mut self) -> bool {
        self.comes.as_mut().is_some_and(|comes| comes.await_once(self.queues.as_fd()).is_ok())
    }

    /// Has the epoll report the next connection that waits, if the accept queues aren't sampled any more.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn rearm(&self) -> io::Result<()> {
        if self.queues.is_resting() {
            self.epoll.modify(&self.queues, &mut EpollEvent::new(REPORTED_ONCE, QUEUES))?;
        }
        Ok(())
    }
}

impl AsFd for Watcher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
