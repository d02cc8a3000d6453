//! Samples of the accept queues of lent listeners, taken only while connections come.
//!
//! The epoll in here reports each listener on which a connection waits. The pool's epoll watches this epoll and reports
//! it once (EPOLLONESHOT). The first look comes a while later: nearly always the connection has been taken by then, and the
//! pool's epoll is armed again. While a queue stands, samples follow at a short interval. So there is no timer without traffic,
//! and however many connections come, the wrapper wakes up hardly more often than at the interval.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::ids::MemberId;
use crate::kernel::sockdiag;
use crate::steering::load::LONG;

/// The time until the first look, and until the next one if every queue has moved, unless some worker was stuck lately.
const FIRST_LOOK: Duration = Duration::from_millis(10);
/// After so many samples in a row at which nothing waited, the epoll takes over, if some worker was stuck lately; else after one.
const QUIET_SAMPLES: u32 = 4;
/// The interval for queues that haven't moved for [`LONG`], which otherwise would cost as much as traffic for ever, and
/// for a queue that is the only one.
const SLOW_INTERVAL: Duration = Duration::from_millis(100);
/// Sampling takes at most one part in this many of a CPU's time. (To wake up takes about as much again.)
const CPU_SHARE: u32 = 200;
/// The same while the next sample should come soon.
const CPU_SHARE_WHEN_SOON: u32 = 50;
/// How many queues that were empty at the sample before are doubtful at most. On a busy machine there are many.
const MAX_NEW: u32 = 4;
/// The next sample is put off by at most this much for the sake of the CPU's time.
const MAX_PAUSE: Duration = Duration::from_millis(50);
/// The interval while the next sample should come soon, at most.
pub const SOON: Duration = Duration::from_millis(2);

/// What a sample has shown.
#[derive(Debug, Default)]
pub struct Sample {
    /// How many connections wait in each queue that isn't empty.
    pub lengths: BTreeMap<MemberId, u32>,
    /// Those of them from which nothing was taken since the sample before, and some that were empty then.
    pub doubtful: BTreeSet<MemberId>,
    /// Those from which something was taken for sure.
    pub taken: BTreeSet<MemberId>,
}

/// See the module's comment.
#[derive(Debug)]
pub struct AcceptQueues {
    epoll: Epoll,
    interval: Duration,
    /// At how many samples in a row nothing waited; `None` while the epoll is to report it.
    quiet: Option<u32>,
    next_sample: Option<Instant>,
    /// Whether some worker was stuck lately, so that no connection should wait for long to be seen.
    is_wary: bool,
    /// Whether the last sample came soon after the one before.
    is_frequent: bool,
    watched: BTreeSet<MemberId>,
    /// The queues that weren't empty at the last sample: their lengths, and since which sample they haven't moved.
    filled: BTreeMap<MemberId, (u32, Instant)>,
    /// Those that haven't moved for [`LONG`]. The epoll doesn't report them.
    slow: BTreeSet<MemberId>,
}

impl AcceptQueues {
    /// `interval` is the time between two samples while a queue stands.
    pub fn new(interval: Duration) -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            interval,
            quiet: None,
            next_sample: None,
            is_wary: false,
            is_frequent: false,
            watched: BTreeSet::new(),
            filled: BTreeMap::new(),
            slow: BTreeSet::new(),
        })
    }

    /// Samples this listener's queue from now on.
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

    /// Doesn't sample this listener's queue any more.
    pub fn forget(&mut self, id: MemberId, listener: BorrowedFd) {
        if self.watched.remove(&id) {
            let _ = self.epoll.delete(listener);
            self.filled.remove(&id);
            self.slow.remove(&id);
        }
    }

    /// The epoll has reported that a connection waits.
    pub fn begin(&mut self, now: Instant) {
        self.quiet = Some(0);
        self.is_frequent = self.is_wary;
        self.next_sample = Some(now + self.interval());
    }

    /// The interval that holds now. If there is only one queue, no connection could go to another one.
    fn interval(&self) -> Duration {
        self.interval.max(match self.len() > 1 {
            true if self.is_frequent => Duration::ZERO,
            true => FIRST_LOOK,
            false => SLOW_INTERVAL,
        })
    }

    /// Whether the epoll is to report when a connection waits.
    pub fn is_resting(&self) -> bool {
        self.quiet.is_none()
    }

    /// When to call [`AcceptQueues::sample`].
    pub fn deadline(&self) -> Option<Instant> {
        self.next_sample
    }

    /// Call [`AcceptQueues::set_next`] after it.
    pub fn sample<'a>(
        &mut self,
        now: Instant,
        listener: impl Fn(MemberId) -> Option<BorrowedFd<'a>>,
    ) -> Sample {
        let mut events = vec![EpollEvent::empty(); self.watched.len().max(1)];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        let reported: BTreeSet<MemberId> =
            events[..count].iter().map(|event| MemberId(event.data() as u32)).collect();
        let before = mem::take(&mut self.filled);
        let (mut sample, mut new, mut stands) = (Sample::default(), 0, false);
        for id in reported.union(&self.slow.clone()).copied() {
            let Some(fd) = listener(id) else { continue };
            let length = sockdiag::listen_info(fd).map_or(0, |info| info.accept_queue);
            let unmoved = before.get(&id).filter(|(before, _)| *before <= length);
            let since = unmoved.map_or(now, |(_, since)| *since);
            let is_slow = length > 0 && now.saturating_duration_since(since) >= LONG;
            if is_slow != self.slow.contains(&id) {
                self.set_slow(id, fd, is_slow);
            }
            if length > 0 {
                stands |= unmoved.is_some() || !self.is_frequent;
                sample.lengths.insert(id, length);
                let is_new = !before.contains_key(&id) && new < MAX_NEW;
                new += u32::from(is_new);
                sample.doubtful.extend((unmoved.is_some() || is_new).then_some(id));
                self.filled.insert(id, (length, since));
            }
        }
        let now_waiting = |id| sample.lengths.get(id).copied().unwrap_or(0);
        sample
            .taken
            .extend(before.iter().filter(|(id, (length, _))| now_waiting(id) < *length).map(|(id, _)| *id));
        let quiet_samples = if self.is_wary { QUIET_SAMPLES } else { 1 };
        self.is_frequent = self.is_wary || stands;
        self.quiet = match reported.is_empty() {
            true => self.quiet.map(|samples| samples + 1).filter(|samples| *samples < quiet_samples),
            false => Some(0),
        };
        self.next_sample = match self.is_resting() {
            true => (!self.slow.is_empty()).then_some(now + SLOW_INTERVAL.max(self.interval)),
            false => Some(now + self.interval()),
        };
        sample
    }

    /// The listeners whose queues haven't moved for [`LONG`].
    pub fn slow(&self) -> impl Iterator<Item = MemberId> {
        self.slow.iter().copied()
    }

    /// How many listeners there are.
    pub fn len(&self) -> usize {
        self.watched.len()
    }

    /// Whether some queue was empty at the last sample.
    pub fn has_empty(&self) -> bool {
        self.filled.len() < self.len()
    }

    /// Sets when the next sample comes, after one that took so much of a CPU's time. It may take a larger share of the
    /// CPU if the next one should come `soon`. With `is_needed` it comes even if the epoll reports nothing.
    pub fn set_next(&mut self, took: Duration, soon: bool, is_needed: bool, now: Instant) {
        self.is_wary = soon;
        let share = if soon { CPU_SHARE_WHEN_SOON } else { CPU_SHARE };
        let earliest = now + (took * share).min(MAX_PAUSE);
        let needed = is_needed.then_some(now + SLOW_INTERVAL);
        let is_early = soon && self.len() > 1;
        let next = self.next_sample.map(|next| if is_early { next.min(now + SOON) } else { next });
        self.next_sample = next.or(needed).map(|next| next.max(earliest));
    }

    fn set_slow(&mut self, id: MemberId, listener: BorrowedFd, is_slow: bool) {
        let flags = if is_slow { EpollFlags::empty() } else { EpollFlags::EPOLLIN };
        let _ = self.epoll.modify(listener, &mut EpollEvent::new(flags, u64::from(id.0)));
        match is_slow {
            true => self.slow.insert(id),
            false => self.slow.remove(&id),
        };
    }
}

impl AsFd for AcceptQueues {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    /// When the next sample comes at this interval, after one that took 0.1 ms, with connections waiting at so many of these listeners,
    /// and whether some queue is empty.
    fn next_sample(interval: Duration, count: usize, filled: usize, soon: bool) -> (Duration, bool) {
        let listeners: Vec<TcpListener> =
            (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let mut queues = AcceptQueues::new(interval).unwrap();
        for (id, listener) in (0..).map(MemberId).zip(&listeners) {
            queues.watch(id, listener.as_fd()).unwrap();
        }
        let now = Instant::now();
        queues.begin(now);
        let connect = |listener: &TcpListener| TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _waiting: Vec<TcpStream> = listeners[..filled].iter().map(connect).collect();
        // The client may see its connection a moment before it is in the queue.
        for listener in &listeners[..filled] {
            let mut readable = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut readable, PollTimeout::from(60_000u16)), Ok(1));
        }
        let sample = queues.sample(now, |id| Some(listeners[id.0 as usize].as_fd()));
        assert_eq!(sample.lengths.len(), filled);
        queues.set_next(Duration::from_micros(100), soon, false, now);
        (queues.deadline().unwrap() - now, queues.has_empty())
    }

    #[test]
    fn samples_take_a_share_of_a_cpu_and_a_larger_one_if_the_next_should_come_soon() {
        let (seldom, often) = (Duration::from_millis(20), Duration::from_millis(5));
        let interval = Duration::from_millis(1);
        assert_eq!(next_sample(interval, 2, 1, false), (seldom, true));
        assert_eq!(next_sample(interval, 2, 1, true), (often, true));
        assert_eq!(next_sample(interval, 2, 2, true), (often, false));
        let interval = Duration::from_millis(200);
        assert_eq!(next_sample(interval, 2, 1, false), (interval, true));
        assert_eq!(next_sample(interval, 2, 1, true), (often, true), "whatever the interval is");
    }

    #[test]
    fn the_first_look_comes_late_and_others_soon_only_while_a_queue_stands() {
        const SHORT: Duration = Duration::from_millis(1);
        let listeners: Vec<TcpListener> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let mut queues = AcceptQueues::new(SHORT).unwrap();
        for (id, listener) in (0..).map(MemberId).zip(&listeners) {
            queues.watch(id, listener.as_fd()).unwrap();
        }
        let now = Instant::now();
        let sample = |queues: &mut AcceptQueues, is_wary| {
            queues.sample(now, |id| Some(listeners[id.0 as usize].as_fd()));
            queues.set_next(Duration::ZERO, is_wary, false, now);
            queues.deadline().map(|next| next - now)
        };
        let connect = |listener: &TcpListener| TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        queues.begin(now);
        assert_eq!(queues.deadline(), Some(now + FIRST_LOOK));
        assert_eq!(sample(&mut queues, false), None, "nothing waits");

        queues.begin(now);
        let _first = connect(&listeners[0]);
        assert_eq!([sample(&mut queues, false), sample(&mut queues, false)], [Some(SHORT); 2], "it stands");
        drop(listeners[0].accept().unwrap());
        let _second = connect(&listeners[1]);
        assert_eq!(sample(&mut queues, false), Some(FIRST_LOOK), "it has moved, and another one is new");
        drop(listeners[1].accept().unwrap());
        assert_eq!(sample(&mut queues, true), None);

        queues.begin(now);
        assert_eq!(queues.deadline(), Some(now + SHORT), "some worker was stuck lately");
        assert_eq!(sample(&mut queues, true), Some(SHORT));
        let rest: Vec<_> = (0..QUIET_SAMPLES).map(|_| sample(&mut queues, true)).collect();
        assert_eq!(rest.last(), Some(&None), "{rest:?}");
    }

    #[test]
    fn a_queue_that_is_the_only_one_is_sampled_slowly() {
        assert_eq!(next_sample(Duration::from_millis(1), 1, 1, true), (SLOW_INTERVAL, false));
    }
}
