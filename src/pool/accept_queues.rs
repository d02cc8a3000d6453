//! The accept queues of lent listeners, looked at only while connections come.
//!
//! The epoll in here tells of each listener on which a connection waits. It is itself watched by the pool's,
//! which tells of it once (EPOLLONESHOT). From that moment on the queues are looked at every so often, and
//! when nothing has waited at a few looks in a row, the pool's epoll is asked to tell again. So there is no
//! timer without traffic, and under load the wrapper wakes up hardly more often than the timer has it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::ids::MemberId;
use crate::kernel::sockdiag;

/// After so many looks at which nothing waited the epoll tells again.
const QUIET_LOOKS: u32 = 4;
/// A queue that stands for so long is looked at more seldom, lest one that does so forever cost as much as
/// traffic.
pub const LONG: Duration = Duration::from_secs(1);
/// How often that is, and so is the only queue that there is.
const SELDOM: Duration = Duration::from_millis(100);
/// The next look is put off so far that this one has taken no more than one part in so many of a CPU's time. (To
/// wake up takes about as much again.)
const SHARE: u32 = 200;
/// The same while it had better come soon.
const SHARE_WHEN_SOON: u32 = 50;
/// It is not put off longer than this.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// See the module's comment.
#[derive(Debug)]
pub struct Queues {
    epoll: Epoll,
    every: Duration,
    /// At how many looks in a row nothing waited; `None` while it is the epoll that tells.
    quiet: Option<u32>,
    next_look: Option<Instant>,
    watched: BTreeSet<MemberId>,
    /// The queues that weren't empty at the last look: how long they were, and since which look they haven't become
    /// shorter.
    filled: BTreeMap<MemberId, (u32, Instant)>,
    /// Those that have stood for long, of which the epoll doesn't tell.
    aside: BTreeSet<MemberId>,
}

impl Queues {
    /// Queues that are looked at so often while connections come.
    pub fn new(every: Duration) -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            every,
            quiet: None,
            next_look: None,
            watched: BTreeSet::new(),
            filled: BTreeMap::new(),
            aside: BTreeSet::new(),
        })
    }

    /// Looks at this listener's queue too.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn watch(&mut self, id: MemberId, listener: BorrowedFd) -> io::Result<()> {
        if !self.watched.contains(&id) {
            self.epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, u64::from(id.0)))?;
            self.watched.insert(id);
        }
        Ok(())
    }

    /// Doesn't any more.
    pub fn forget(&mut self, id: MemberId, listener: BorrowedFd) {
        if self.watched.remove(&id) {
            let _ = self.epoll.delete(listener);
            self.filled.remove(&id);
            self.aside.remove(&id);
        }
    }

    /// The epoll has told that something waits.
    pub fn begin(&mut self, now: Instant) {
        self.quiet = Some(0);
        self.next_look = Some(now + self.every());
    }

    /// How often the queues are looked at: of one that is the only one nobody would be told to go elsewhere.
    fn every(&self) -> Duration {
        if self.len() > 1 { self.every } else { self.every.max(SELDOM) }
    }

    /// Whether the epoll is to tell when something waits.
    pub fn rests(&self) -> bool {
        self.quiet.is_none()
    }

    /// When to call [`Queues::look`].
    pub fn deadline(&self) -> Option<Instant> {
        self.next_look
    }

    /// How many connections wait in each queue that isn't empty. To be followed by [`Queues::has_looked`].
    pub fn look<'a>(
        &mut self,
        now: Instant,
        listener: impl Fn(MemberId) -> Option<BorrowedFd<'a>>,
    ) -> BTreeMap<MemberId, u32> {
        let mut events = vec![EpollEvent::empty(); self.watched.len().max(1)];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        let told: BTreeSet<MemberId> =
            events[..count].iter().map(|event| MemberId(event.data() as u32)).collect();
        let before = std::mem::take(&mut self.filled);
        let mut lengths = BTreeMap::new();
        for id in told.union(&self.aside.clone()).copied() {
            let Some(fd) = listener(id) else { continue };
            let length = sockdiag::listen_info(fd).map_or(0, |info| info.accept_queue);
            let stands = before.get(&id).filter(|(before, _)| *before <= length);
            let since = stands.map_or(now, |(_, since)| *since);
            let is_aside = length > 0 && now.saturating_duration_since(since) >= LONG;
            if is_aside != self.aside.contains(&id) {
                self.set_aside(id, fd, is_aside);
            }
            if length > 0 {
                lengths.insert(id, length);
                self.filled.insert(id, (length, since));
            }
        }
        self.quiet = match told.is_empty() {
            true => self.quiet.map(|looks| looks + 1).filter(|looks| *looks < QUIET_LOOKS),
            false => Some(0),
        };
        self.next_look = match self.rests() {
            true => (!self.aside.is_empty()).then_some(now + SELDOM.max(self.every)),
            false => Some(now + self.every()),
        };
        lengths
    }

    /// How many listeners there are.
    pub fn len(&self) -> usize {
        self.watched.len()
    }

    /// Whether nothing waited in some queue at the last look.
    pub fn has_empty(&self) -> bool {
        self.filled.len() < self.len()
    }

    /// The last look has taken so much of a CPU's time. The next one comes `soon` or not, and also if the epoll
    /// doesn't tell, when one is `wanted`.
    pub fn has_looked(&mut self, took: Duration, soon: bool, wanted: bool, now: Instant) {
        let share = if soon { SHARE_WHEN_SOON } else { SHARE };
        let earliest = now + (took * share).min(LONGEST_PAUSE);
        let wanted = wanted.then_some(now + SELDOM);
        self.next_look = self.next_look.or(wanted).map(|next| next.max(earliest));
    }

    fn set_aside(&mut self, id: MemberId, listener: BorrowedFd, is_aside: bool) {
        let flags = if is_aside { EpollFlags::empty() } else { EpollFlags::EPOLLIN };
        let _ = self.epoll.modify(listener, &mut EpollEvent::new(flags, u64::from(id.0)));
        match is_aside {
            true => self.aside.insert(id),
            false => self.aside.remove(&id),
        };
    }
}

impl AsFd for Queues {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    /// When the next look comes after one that took 0.1 ms, with connections waiting at so many of these listeners,
    /// and whether some queue is empty.
    fn next_look(count: usize, filled: usize, soon: bool) -> (Duration, bool) {
        let listeners: Vec<TcpListener> =
            (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let mut queues = Queues::new(Duration::from_millis(1)).unwrap();
        for (id, listener) in (0..).map(MemberId).zip(&listeners) {
            queues.watch(id, listener.as_fd()).unwrap();
        }
        let now = Instant::now();
        queues.begin(now);
        let connect = |listener: &TcpListener| TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _waiting: Vec<TcpStream> = listeners[..filled].iter().map(connect).collect();
        // To the client a connection may be there a moment before it is in the queue.
        for listener in &listeners[..filled] {
            let mut readable = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut readable, PollTimeout::from(60_000u16)), Ok(1));
        }
        let lengths = queues.look(now, |id| Some(listeners[id.0 as usize].as_fd()));
        assert_eq!(lengths.len(), filled);
        queues.has_looked(Duration::from_micros(100), soon, false, now);
        (queues.deadline().unwrap() - now, queues.has_empty())
    }

    #[test]
    fn looks_take_a_share_of_a_cpu_and_more_of_it_while_they_had_better_come_soon() {
        let (seldom, often) = (Duration::from_millis(20), Duration::from_millis(5));
        assert_eq!(next_look(2, 1, false), (seldom, true));
        assert_eq!(next_look(2, 1, true), (often, true));
        assert_eq!(next_look(2, 2, true), (often, false));
    }

    #[test]
    fn the_only_queue_is_looked_at_seldom() {
        assert_eq!(next_look(1, 1, true), (SELDOM, false));
    }
}
