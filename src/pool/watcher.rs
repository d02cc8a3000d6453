//! What the pool's epoll reports of each socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::ids::MemberId;
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
}

/// What epoll reports when the accept queues are to be sampled.
const QUEUES: u64 = u64::MAX;
const REPORTED_ONCE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLONESHOT);

#[derive(Debug)]
pub struct Watcher {
    epoll: Epoll,
    pub queues: AcceptQueues,
}

/// Some of the events that epoll has to report.
pub struct Batch {
    pub events: Vec<(MemberId, EpollFlags)>,
    /// Whether there may be more.
    pub is_full: bool,
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
        Ok(Self { epoll, queues })
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
        let mut events = Vec::with_capacity(count);
        for event in &ready[..count] {
            match event.data() {
                QUEUES => self.queues.begin(Instant::now()),
                id => events.push((MemberId(id as u32), event.events())),
            }
        }
        Batch { events, is_full: count == ready.len() }
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
