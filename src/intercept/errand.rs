//! System calls that the wrapper has a worker's thread do, while that waits for the answer to its bind.
//!
//! What hangs on the worker's socket in the worker's own table of descriptors can be changed by the worker alone. So its
//! thread is traced, stops as the bind returns, does the calls with the bind's own instruction, and then runs on with
//! its registers as they were. This needs no privilege for a descendant of the same user, and Docker's and containerd's profiles allow it.
//!
//! The loop waits for none of it: each stop of the thread is a SIGCHLD, after which [`Errand::advance`] takes the next step.

use std::collections::VecDeque;
use std::io;
use std::mem;

use nix::unistd::Pid;

use crate::kernel::fdtable::Watch;
use crate::kernel::procfs;
use crate::kernel::tracee::{Registers, State, SystemCall, Tracee};

/// What a thread has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    Nothing,
    /// Add these entries to its epolls. Its bind then succeeds, or fails if that failed.
    Watch(Vec<Watch>),
    /// Send a duplicate of `fd` by the socket `channel`, and close that one. Then its bind begins again.
    SendDuplicate {
        fd: u32,
        channel: u32,
    },
}

/// The calls of a task, and the memory that their arguments point to.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    memory: Vec<u8>,
    calls: Vec<SystemCall>,
}

impl Task {
    fn memory_length(&self) -> u64 {
        self.plan(0).memory.len() as u64
    }

    /// The plan if the memory is at the address `at`.
    fn plan(&self, at: u64) -> Plan {
        match self {
            Self::Nothing => Plan { memory: Vec::new(), calls: Vec::new() },
            Self::Watch(watches) => {
                const EVENT_LENGTH: usize = size_of::<libc::epoll_event>();
                let memory = watches.iter().flat_map(|watch| {
                    let mut event = [0; EVENT_LENGTH];
                    event[..4].copy_from_slice(&watch.events.to_ne_bytes());
                    event[EVENT_LENGTH - 8..].copy_from_slice(&watch.data.to_ne_bytes());
                    event
                });
                let add = libc::EPOLL_CTL_ADD as u64;
                let calls = watches.iter().enumerate().map(|(index, watch)| {
                    let event = at + (index * EVENT_LENGTH) as u64;
                    let args = [watch.epoll.into(), add, watch.fd.into(), event, 0, 0];
                    SystemCall { number: libc::SYS_epoll_ctl, args }
                });
                Plan { memory: memory.collect(), calls: calls.collect() }
            }
            Self::SendDuplicate { fd, channel } => {
                let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;
                let channel = u64::from(*channel);
                let send = SystemCall { number: libc::SYS_sendmsg, args: [channel, at, flags, 0, 0, 0] };
                let close = SystemCall { number: libc::SYS_close, args: [channel, 0, 0, 0, 0, 0] };
                Plan { memory: message_with(*fd, at), calls: vec![send, close] }
            }
        }
    }
}

/// A `struct msghdr` at the address `at` and what it points to: one byte, and a descriptor (cmsg(3)).
fn message_with(fd: u32, at: u64) -> Vec<u8> {
    const HEADER: u64 = size_of::<libc::msghdr>() as u64;
    const PART: u64 = size_of::<libc::iovec>() as u64;
    const CONTROL_LENGTH: u64 = size_of::<libc::cmsghdr>() as u64 + 4;
    const CONTROL_SPACE: u64 = CONTROL_LENGTH.next_multiple_of(8);
    let part = at + HEADER;
    let control = part + PART;
    let header = [0, 0, part, 1, control, CONTROL_SPACE, 0];
    let part = [control, 1];
    let kind = (libc::SOL_SOCKET as u64) | (libc::SCM_RIGHTS as u64) << 32;
    let control = [CONTROL_LENGTH, kind, fd.into()];
    header.iter().chain(&part).chain(&control).flat_map(|word: &u64| word.to_ne_bytes()).collect()
}

/// How an errand has ended.
#[derive(Debug)]
pub enum Outcome {
    Done,
    Failed(io::Error),
    /// The thread has ended.
    Gone,
}

/// A stopped bind.
#[derive(Debug, Clone, Copy)]
pub struct StoppedCall {
    pub call: SystemCall,
    /// The address behind its instruction.
    pub end: u64,
}

#[derive(Debug)]
pub struct Errand {
    pub tid: Pid,
    tracee: Tracee,
    bind: StoppedCall,
    task: Task,
    /// The registers and the signal mask of the thread, once it has stopped.
    before: Option<(Registers, u64)>,
    /// The calls that are left. The first one is under way.
    calls: VecDeque<SystemCall>,
    /// Whether the call under way has begun.
    has_begun: bool,
    failure: Option<io::Error>,
}

impl Errand {
    /// For a thread that waits for the answer to `bind`, which must be given next.
    ///
    /// # Errors
    /// ESRCH if the thread has ended.
    pub fn begin(tid: Pid, tracee: Tracee, bind: StoppedCall, task: Task) -> io::Result<Self> {
        tracee.interrupt()?;
        let (before, calls, failure) = (None, VecDeque::new(), None);
        Ok(Self { tid, tracee, bind, task, before, calls, has_begun: false, failure })
    }

    /// Goes on as far as possible. Returns `None` until it has ended.
    pub fn advance(&mut self) -> Option<Outcome> {
        loop {
            let has_ended = match (self.tracee.state(), self.before) {
                (State::Runs, _) => return None,
                (State::Gone, _) => return Some(Outcome::Gone),
                (State::Interrupted, None) => self.start(),
                (State::InCall, Some((registers, _))) => self.proceed(&registers),
                // All signals are blocked except SIGKILL and SIGSTOP. The latter stops the process after the errand.
                (State::GetsSignal(signal), _) => self.tracee.go_on(signal).map(|()| false),
                (State::Interrupted, Some(_)) | (State::InCall, None) => self.tracee.go_on(0).map(|()| false),
            };
            match has_ended {
                Ok(false) => {}
                Ok(true) => return Some(self.failure.take().map_or(Outcome::Done, Outcome::Failed)),
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Some(Outcome::Gone), // killed
                Err(error) => {
                    self.failure = Some(error);
                    let _ = self.finish();
                    return self.failure.take().map(Outcome::Failed);
                }
            }
        }
    }

    /// The thread has stopped. Returns whether the errand has ended.
    fn start(&mut self) -> io::Result<bool> {
        let registers = self.tracee.registers()?;
        if !registers.are_in_call(self.bind.end) {
            return Err(io::ErrorKind::Other.into());
        }
        if self.task == Task::Nothing {
            return self.finish().map(|()| true);
        }
        self.before = Some((registers, self.tracee.signal_mask()?));
        self.tracee.set_signal_mask(u64::MAX)?;
        // It has to be memory of its own: there may be no room on the thread's stack.
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE) as u64;
        let args = [0, self.task.memory_length(), protection, flags, u64::MAX, 0];
        self.calls.push_back(SystemCall { number: libc::SYS_mmap, args });
        self.do_next(&registers)
    }

    /// The thread has stopped at the beginning or the end of the call under way.
    fn proceed(&mut self, before: &Registers) -> io::Result<bool> {
        if !mem::replace(&mut self.has_begun, true) {
            self.tracee.go_on(0)?;
            return Ok(false);
        }
        self.has_begun = false;
        let result = self.tracee.registers()?.result();
        let done = self.calls.pop_front().map(|call| call.number);
        match (done, error_in(result)) {
            (Some(libc::SYS_mmap), None) => self.has_memory(result as u64),
            (Some(libc::SYS_epoll_ctl), Some(libc::EEXIST)) | (_, None) => {}
            (_, Some(errno)) => self.fail(io::Error::from_raw_os_error(errno)),
        }
        self.do_next(before)
    }

    fn has_memory(&mut self, at: u64) {
        let Plan { memory, calls } = self.task.plan(at);
        match procfs::set_memory(self.tid, at, &memory) {
            Ok(()) => self.calls.extend(calls),
            Err(error) => self.fail(error),
        }
        let args = [at, self.task.memory_length(), 0, 0, 0, 0];
        self.calls.push_back(SystemCall { number: libc::SYS_munmap, args });
    }

    fn fail(&mut self, error: io::Error) {
        self.failure.get_or_insert(error);
    }

    fn do_next(&mut self, before: &Registers) -> io::Result<bool> {
        let Some(next) = self.calls.front() else { return self.finish().map(|()| true) };
        self.tracee.set_registers(&before.calling(self.bind.end, next))?;
        self.tracee.go_on(0)?;
        Ok(false)
    }

    /// Lets the thread go.
    fn finish(&self) -> io::Result<()> {
        let restored = self.before.map_or(Ok(()), |(before, signals)| {
            let after = match (&self.task, &self.failure) {
                (Task::SendDuplicate { .. } | Task::Nothing, _) => {
                    before.calling(self.bind.end, &self.bind.call)
                }
                (Task::Watch(_), None) => before.returning(self.bind.end, 0),
                (Task::Watch(_), Some(error)) => {
                    let errno = error.raw_os_error().unwrap_or(libc::EPERM);
                    before.returning(self.bind.end, -i64::from(errno))
                }
            };
            self.tracee.set_registers(&after).and(self.tracee.set_signal_mask(signals))
        });
        self.tracee.let_go().and(restored)
    }
}

/// The errno that a system call has returned.
fn error_in(result: i64) -> Option<i32> {
    const MAX_ERRNO: i64 = 4095; // linux/err.h
    (-MAX_ERRNO..0).contains(&result).then(|| -result as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errand_adds_each_entry_from_its_place_in_memory() {
        let watch = |epoll, data| Watch { epoll, fd: 7, events: 0x8000_0001, data };
        let Plan { memory, calls } = Task::Watch(vec![watch(4, 1), watch(5, u64::MAX)]).plan(0x1000);
        let length = size_of::<libc::epoll_event>();
        assert_eq!(memory.len(), 2 * length);
        assert_eq!(memory[..4], 0x8000_0001u32.to_ne_bytes());
        assert_eq!(memory[2 * length - 8..], u64::MAX.to_ne_bytes());
        assert!(calls.iter().all(|call| call.number == libc::SYS_epoll_ctl));
        assert_eq!(calls[1].args, [5, 1, 7, 0x1000 + length as u64, 0, 0]);
    }

    #[test]
    fn only_small_negative_results_are_errors() {
        assert_eq!(
            [0, 1, -1, -4095, -4096, i64::MIN].map(error_in),
            [None, None, Some(1), Some(4095), None, None]
        );
    }
}
