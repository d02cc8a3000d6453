//! Reads workers' memory and follows their paths, in another process: what is read may lie in a file system that doesn't answer,
//! and who waits for that can wait for ever.
//!
//! All workers share one process. When an answer is late, the process stays with the worker that it was late for, and the others
//! get a new one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv, recvmsg, send,
    sendmsg, socketpair,
};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::ids::WorkerId;
use crate::intercept::options;
use crate::kernel::helper::Helper;
use crate::kernel::{procfs, sys};
use crate::pool::paths::SocketPath;

/// After so long the other workers get a new process. A busy machine makes it late too, so this is no failure.
const LATE_AFTER: Duration = Duration::from_millis(100);
/// After so long nothing more is read for this worker.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(10);
/// How long reuse-run waits in the end until the process is gone.
const FINISH_TIMEOUT: Duration = Duration::from_millis(500);
/// More than any question or answer is long: a path is one of both.
const MAX_LENGTH: usize = 64 * 1024;

/// What can be asked about a thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// Up to `len` bytes of its memory.
    Memory { tid: i32, address: u64, len: u64 },
    /// The kernel's name for the protocol of its socket.
    Protocol { tid: i32, fd: u32 },
    /// See [`SocketPath::resolve`]. The answer is what there is, a [`Found`], and the path.
    Place { tid: i32, from: Option<u32>, path: Vec<u8> },
    /// The capabilities of its program file: eight bytes.
    Capabilities { tid: i32 },
    /// Write into its memory that a socket doesn't listen: see [`options::deny_listening`].
    DenyListening { tid: i32, id: u64, value: u64, len: u64 },
}

/// The bytes, or an error number.
pub type Answer = Result<Vec<u8>, i32>;

/// What there is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Nothing,
    Socket,
    Other,
}

/// The answer to [`Question::Place`].
pub fn parse_place(mut answer: Vec<u8>) -> Option<(Found, SocketPath)> {
    let found = match answer.pop()? {
        0 => Found::Nothing,
        1 => Found::Socket,
        _ => Found::Other,
    };
    Some((found, SocketPath::resolved(std::ffi::OsString::from_vec(answer).into())))
}

/// The life of the process.
fn answer_all(socket: &OwnedFd) -> io::Result<()> {
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
        let (notify_fd, len) = (rights.next(), received.bytes);
        if len == 0 {
            return Ok(());
        }
        let questions: Vec<Question> = serde_json::from_slice(&bytes[..len])?;
        let answer = |question| {
            let answer = answer(question, notify_fd.as_ref().map(AsFd::as_fd));
            answer.map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL))
        };
        let answers: Vec<Answer> = questions.into_iter().map(answer).collect();
        send(socket.as_raw_fd(), &serde_json::to_vec(&answers)?, MsgFlags::MSG_NOSIGNAL)?;
    }
}

fn answer(question: Question, notify_fd: Option<BorrowedFd>) -> io::Result<Vec<u8>> {
    match question {
        Question::Memory { tid, address, len } => procfs::memory(Pid::from_raw(tid), address, len as usize),
        Question::Protocol { tid, fd } => {
            procfs::socket_protocol(Pid::from_raw(tid), fd).map(String::into_bytes)
        }
        Question::Place { tid, from, path } => {
            let path = PathBuf::from(std::ffi::OsString::from_vec(path));
            let place = SocketPath::resolve(Pid::from_raw(tid), from, &path);
            let place = place.ok_or(io::Error::from_raw_os_error(libc::ENOENT))?;
            let found = match fs::symlink_metadata(place.path()) {
                Ok(file) if file.file_type().is_socket() => Found::Socket,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Found::Nothing,
                _ => Found::Other,
            };
            let mut bytes = place.path().to_owned().into_os_string().into_vec();
            bytes.push(found as u8);
            Ok(bytes)
        }
        Question::Capabilities { tid } => {
            procfs::program_capabilities(Pid::from_raw(tid)).map(|set| set.to_ne_bytes().to_vec())
        }
        Question::DenyListening { tid, id, value, len } => {
            let notify_fd = notify_fd.ok_or(io::ErrorKind::InvalidInput)?;
            let still_waits = || sys::seccomp_notif_id_valid(notify_fd, id);
            options::deny_listening(Pid::from_raw(tid), still_waits, value, len).map(|()| Vec::new())
        }
    }
}

/// Questions about one call.
#[derive(Debug)]
struct Asked {
    worker: WorkerId,
    /// The kernel's id of the call.
    id: u64,
    questions: Vec<Question>,
    /// For [`Question::DenyListening`].
    notify_fd: Option<OwnedFd>,
}

/// A process that answers, one call after the other.
#[derive(Debug)]
struct Process {
    socket: OwnedFd,
    helper: Helper,
    queue: VecDeque<Asked>,
    /// When the first of the queue was sent.
    since: Instant,
}

impl Process {
    fn start(epoll: &Epoll) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let helper = Helper::start(c"reuse-run-read", vec![its], |fds| {
            let _ = answer_all(&fds[0]);
        })?;
        epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        Ok(Self { socket, helper, queue: VecDeque::new(), since: Instant::now() })
    }

    fn push(&mut self, asked: Asked) -> io::Result<()> {
        self.queue.push_back(asked);
        if self.queue.len() == 1 { self.send_first() } else { Ok(()) }
    }

    fn send_first(&mut self) -> io::Result<()> {
        self.since = Instant::now();
        let Some(Asked { questions, notify_fd, .. }) = self.queue.front() else { return Ok(()) };
        let bytes = serde_json::to_vec(questions)?;
        let fds: Vec<RawFd> = notify_fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.socket.as_raw_fd(), &[io::IoSlice::new(&bytes)], rights, flags, None)?;
        Ok(())
    }

    /// The answers to the first of the queue, if they have come. Sends the next one.
    ///
    /// # Errors
    /// If the process has ended.
    fn receive(&mut self) -> io::Result<Option<(Asked, Vec<Answer>)>> {
        let mut bytes = vec![0; MAX_LENGTH];
        let len = match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            received => received?,
        };
        let answers = serde_json::from_slice(&bytes[..len])?;
        let asked = self.queue.pop_front();
        self.send_first()?;
        Ok(asked.map(|asked| (asked, answers)))
    }

    fn is_late(&self, after: Duration, now: Instant) -> bool {
        !self.queue.is_empty() && now.saturating_duration_since(self.since) >= after
    }
}

/// What has come of questions about a call.
#[derive(Debug)]
pub struct Read {
    pub worker: WorkerId,
    pub id: u64,
    pub answers: Vec<(Question, Answer)>,
}

/// See the module's comment.
#[derive(Debug)]
pub struct Reader {
    /// Of all processes.
    epoll: Epoll,
    shared: Option<Process>,
    /// Of workers for which one was late.
    own: BTreeMap<WorkerId, Process>,
    /// Nothing is read for them any more.
    given_up: BTreeSet<WorkerId>,
    failed: Vec<Asked>,
}

impl Reader {
    /// # Errors
    /// When there is no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (own, given_up) = (BTreeMap::new(), BTreeSet::new());
        Ok(Self { epoll, shared: None, own, given_up, failed: Vec::new() })
    }

    /// Has questions about a call of a worker answered: see [`Reader::take`].
    pub fn ask(&mut self, worker: WorkerId, id: u64, questions: Vec<Question>, notify_fd: Option<OwnedFd>) {
        self.push(Asked { worker, id, questions, notify_fd });
    }

    fn push(&mut self, asked: Asked) {
        if self.given_up.contains(&asked.worker) {
            return self.failed.push(asked);
        }
        let process = match self.own.get_mut(&asked.worker) {
            Some(own) => own,
            None => match self.shared.take().map_or_else(|| Process::start(&self.epoll), Ok) {
                Ok(process) => self.shared.insert(process),
                Err(_) => return self.failed.push(asked),
            },
        };
        if process.push(asked).is_err() {
            self.replace_broken();
        }
    }

    /// A process has ended, or can't be written to: nothing in its queue is answered.
    fn replace_broken(&mut self) {
        if let Some(process) = self.shared.take() {
            self.failed.extend(process.queue);
        }
    }

    /// What has been answered, and what won't be. To be called when this is readable, and at its deadline.
    pub fn take(&mut self, now: Instant) -> Vec<Read> {
        let mut read = Vec::new();
        let mut receive = |process: &mut Process| {
            while let Some((Asked { worker, id, questions, .. }, answers)) = process.receive()? {
                read.push(Read { worker, id, answers: questions.into_iter().zip(answers).collect() });
            }
            Ok::<_, io::Error>(())
        };
        let is_broken = self.shared.as_mut().is_some_and(|shared| receive(shared).is_err());
        let failed = &mut self.failed;
        self.own.retain(|worker, process| {
            let ended = receive(process).is_err() || process.is_late(GIVEN_UP_AFTER, now);
            if ended {
                self.given_up.insert(*worker);
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
        let timed_out = |Asked { worker, id, questions, .. }| {
            let answers = questions.into_iter().map(|question| (question, Err(libc::ETIMEDOUT))).collect();
            Read { worker, id, answers }
        };
        read.extend(self.failed.drain(..).map(timed_out));
        read
    }

    /// The shared process stays with the worker that it is late for.
    fn set_aside(&mut self) {
        let Some(mut process) = self.shared.take() else { return };
        let rest = process.queue.split_off(1);
        if let Some(first) = process.queue.front() {
            self.own.insert(first.worker, process);
        }
        rest.into_iter().for_each(|asked| self.push(asked));
    }

    pub fn deadline(&self) -> Option<Instant> {
        let of = |process: &Process, after| (!process.queue.is_empty()).then(|| process.since + after);
        let own = self.own.values().filter_map(|process| of(process, GIVEN_UP_AFTER));
        let shared = self.shared.iter().filter_map(|process| of(process, LATE_AFTER));
        let failed = self.failed.first().map(|_| Instant::now());
        own.chain(shared).chain(failed).min()
    }

    /// The last process of a worker has ended.
    pub fn forget(&mut self, worker: WorkerId) {
        self.own.remove(&worker);
        self.given_up.remove(&worker);
    }

    /// Ends all processes.
    pub fn finish(self) {
        let until = Instant::now() + FINISH_TIMEOUT;
        let processes = self.shared.into_iter().chain(self.own.into_values());
        let helpers: Vec<Helper> = processes.map(|process| process.helper).collect();
        helpers.iter().for_each(Helper::kill);
        helpers.iter().for_each(|helper| helper.wait_end(until));
    }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
