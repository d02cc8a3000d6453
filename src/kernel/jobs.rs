//! Work that may wait for ever, such as for a file system that doesn't answer. Another process does it, one job after the other,
//! and the loop hears of the end by epoll.
//!
//! All keys share one process. When it is late, it stays with the key that it was late for, and the others get a new one. So what
//! is asked for with the same key is done in this order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::CStr;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv, recvmsg, send,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::kernel::helper::Helper;
use crate::kernel::{ready, sys};

/// After so long the other keys get a new process. A busy machine makes it late too, so this is no failure.
const LATE_AFTER: Duration = Duration::from_millis(100);
/// After so long nothing more is done for this key.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(10);
/// How long reuse-run waits in the end until the processes are gone.
const FINISH_TIMEOUT: Duration = Duration::from_millis(500);
/// More than any job or outcome is long: a path is one of both.
const MAX_LENGTH: usize = 64 * 1024;

/// The bytes, or an error number: ETIMEDOUT if nothing came in time.
pub type Outcome = Result<Vec<u8>, i32>;

/// What the process does with a job and the descriptor that came with it.
pub type Do<J> = fn(J, Option<BorrowedFd>) -> io::Result<Vec<u8>>;

/// The life of the process.
fn do_all<J: DeserializeOwned>(socket: &OwnedFd, work: Do<J>) -> io::Result<()> {
    let mut bytes = vec![0; MAX_LENGTH];
    loop {
        let mut space = nix::cmsg_space!(RawFd);
        let mut buffers = [io::IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), flags)?;
        let mut rights = received.cmsgs()?.filter_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied().map(sys::owned_fd),
            _ => None,
        });
        let (fd, len) = (rights.next(), received.bytes);
        if len == 0 {
            return Ok(());
        }
        let jobs: Vec<J> = serde_json::from_slice(&bytes[..len])?;
        let outcome = |job| {
            let outcome = work(job, fd.as_ref().map(AsFd::as_fd));
            outcome.map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL))
        };
        let outcomes: Vec<Outcome> = jobs.into_iter().map(outcome).collect();
        drop(fd);
        send(socket.as_raw_fd(), &serde_json::to_vec(&outcomes)?, MsgFlags::MSG_NOSIGNAL)?;
    }
}

/// Jobs that are done together.
#[derive(Debug)]
struct Order<K, T, J> {
    key: K,
    tag: T,
    jobs: Vec<J>,
    fd: Option<OwnedFd>,
}

/// What has come of jobs.
#[derive(Debug)]
pub struct Done<K, T, J> {
    pub key: K,
    pub tag: T,
    pub outcomes: Vec<(J, Outcome)>,
}

impl<K, T, J> Order<K, T, J> {
    fn failed(self) -> Done<K, T, J> {
        let Self { key, tag, jobs, .. } = self;
        Done { key, tag, outcomes: jobs.into_iter().map(|job| (job, Err(libc::ETIMEDOUT))).collect() }
    }
}

/// A process that does one order after the other.
#[derive(Debug)]
struct Process<K, T, J> {
    socket: OwnedFd,
    helper: Helper,
    queue: VecDeque<Order<K, T, J>>,
    /// When the first of the queue was sent.
    since: Instant,
}

impl<K, T, J: Serialize + DeserializeOwned> Process<K, T, J> {
    fn start(name: &CStr, work: Do<J>, epoll: &Epoll) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let helper = Helper::start(name, vec![its], |fds| {
            let _ = do_all(&fds[0], work);
        })?;
        epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        Ok(Self { socket, helper, queue: VecDeque::new(), since: Instant::now() })
    }

    fn push(&mut self, order: Order<K, T, J>) -> io::Result<()> {
        self.queue.push_back(order);
        if self.queue.len() == 1 { self.send_first() } else { Ok(()) }
    }

    fn send_first(&mut self) -> io::Result<()> {
        self.since = Instant::now();
        let Some(Order { jobs, fd, .. }) = self.queue.front() else { return Ok(()) };
        let bytes = serde_json::to_vec(jobs)?;
        let fds: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.socket.as_raw_fd(), &[io::IoSlice::new(&bytes)], rights, flags, None)?;
        Ok(())
    }

    /// What has come of the first of the queue, if it is done. Sends the next one.
    ///
    /// # Errors
    /// If the process has ended.
    fn receive(&mut self) -> io::Result<Option<Done<K, T, J>>> {
        let mut bytes = vec![0; MAX_LENGTH];
        let len = match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            received => received?,
        };
        let outcomes: Vec<Outcome> = serde_json::from_slice(&bytes[..len])?;
        let order = self.queue.pop_front();
        self.send_first()?;
        let done = |Order { key, tag, jobs, .. }| Done {
            key,
            tag,
            outcomes: jobs.into_iter().zip(outcomes).collect(),
        };
        Ok(order.map(done))
    }

    fn is_late(&self, after: Duration, now: Instant) -> bool {
        !self.queue.is_empty() && now.saturating_duration_since(self.since) >= after
    }
}

/// See the module's comment.
#[derive(Debug)]
pub struct Jobs<K, T, J> {
    /// Of the processes.
    name: &'static CStr,
    work: Do<J>,
    /// Of all processes.
    epoll: Epoll,
    shared: Option<Process<K, T, J>>,
    /// Of keys for which one was late.
    own: BTreeMap<K, Process<K, T, J>>,
    /// Nothing is done for them any more.
    given_up: BTreeSet<K>,
    failed: Vec<Order<K, T, J>>,
}

impl<K: Ord + Clone, T, J: Serialize + DeserializeOwned> Jobs<K, T, J> {
    /// # Errors
    /// When there is no file descriptor left.
    pub fn new(name: &'static CStr, work: Do<J>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (own, given_up) = (BTreeMap::new(), BTreeSet::new());
        Ok(Self { name, work, epoll, shared: None, own, given_up, failed: Vec::new() })
    }

    /// Has jobs done with this descriptor: see [`Jobs::take`].
    pub fn ask(&mut self, key: K, tag: T, jobs: Vec<J>, fd: Option<OwnedFd>) {
        self.push(Order { key, tag, jobs, fd });
    }

    fn push(&mut self, order: Order<K, T, J>) {
        if self.given_up.contains(&order.key) {
            return self.failed.push(order);
        }
        let process = match self.own.get_mut(&order.key) {
            Some(own) => own,
            None => {
                let start = || Process::start(self.name, self.work, &self.epoll);
                match self.shared.take().map_or_else(start, Ok) {
                    Ok(process) => self.shared.insert(process),
                    Err(_) => return self.failed.push(order),
                }
            }
        };
        if process.push(order).is_err() {
            self.replace_broken();
        }
    }

    /// A process has ended, or can't be written to: nothing in its queue is done.
    fn replace_broken(&mut self) {
        if let Some(process) = self.shared.take() {
            self.failed.extend(process.queue);
        }
    }

    /// What has been done, and what won't be. To be called when this is readable, and at its deadline.
    pub fn take(&mut self, now: Instant) -> Vec<Done<K, T, J>> {
        let mut all = Vec::new();
        let mut receive = |process: &mut Process<K, T, J>| {
            while let Some(done) = process.receive()? {
                all.push(done);
            }
            Ok::<_, io::Error>(())
        };
        let is_broken = self.shared.as_mut().is_some_and(|shared| receive(shared).is_err());
        let failed = &mut self.failed;
        self.own.retain(|key, process| {
            let ended = receive(process).is_err() || process.is_late(GIVEN_UP_AFTER, now);
            if ended {
                self.given_up.insert(key.clone());
                failed.extend(process.queue.drain(..));
            }
            !ended && !process.queue.is_empty()
        });
        if is_broken {
            self.replace_broken();
        }
        if self.shared.as_ref().is_some_and(|shared| shared.is_late(LATE_AFTER, now)) {
            self.set_aside();
        }
        all.extend(self.failed.drain(..).map(Order::failed));
        all
    }

    /// The shared process stays with the key that it is late for.
    fn set_aside(&mut self) {
        let Some(mut process) = self.shared.take() else { return };
        let rest = process.queue.split_off(1);
        if let Some(first) = process.queue.front() {
            self.own.insert(first.key.clone(), process);
        }
        rest.into_iter().for_each(|order| self.push(order));
    }

    fn processes(&self) -> impl Iterator<Item = &Process<K, T, J>> {
        self.shared.iter().chain(self.own.values())
    }

    /// What isn't done yet.
    pub fn pending(&self) -> impl Iterator<Item = (&K, &T)> {
        let orders = self.processes().flat_map(|process| &process.queue);
        orders.chain(&self.failed).map(|order| (&order.key, &order.tag))
    }

    pub fn deadline(&self) -> Option<Instant> {
        let of =
            |process: &Process<K, T, J>, after| (!process.queue.is_empty()).then(|| process.since + after);
        let own = self.own.values().filter_map(|process| of(process, GIVEN_UP_AFTER));
        let shared = self.shared.iter().filter_map(|process| of(process, LATE_AFTER));
        let failed = self.failed.first().map(|_| Instant::now());
        own.chain(shared).chain(failed).min()
    }

    /// From now on something is done for a key again.
    pub fn forgive(&mut self, key: &K) {
        self.given_up.remove(key);
    }

    /// Nothing is wanted for a key any more.
    pub fn forget(&mut self, key: &K) {
        self.own.remove(key);
        self.forgive(key);
    }

    /// For the end: waits until something is done. Returns whether something is left to wait for, and time.
    pub fn wait(&self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || self.pending().next().is_none() {
            return false;
        }
        ready::wait(&[self.as_fd()], PollFlags::POLLIN, until).is_ok()
    }

    /// Ends all processes.
    pub fn finish(&mut self) {
        let until = Instant::now() + FINISH_TIMEOUT;
        let processes = self.shared.take().into_iter().chain(mem::take(&mut self.own).into_values());
        let helpers: Vec<Helper> = processes.map(|process| process.helper).collect();
        helpers.iter().for_each(Helper::kill);
        helpers.iter().for_each(|helper| helper.wait_end(until));
    }
}

impl<K, T, J> AsFd for Jobs<K, T, J> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
