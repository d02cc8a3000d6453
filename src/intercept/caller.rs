//! The thread that waits for the answer to its system call: what it may do, and how the wrapper reaches it.
//!
//! The wrapper acts for a thread only where the kernel would have let the thread do the same, by its user, groups,
//! capabilities, namespaces, mounts and the profile of its security module. It can't see the rules of Landlock.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::unistd::{self, Pid};

use crate::ids::Borrower;
use crate::intercept::errand::StoppedCall;
use crate::intercept::reader::{Found, Question, parse_place};
use crate::kernel::jobs::Outcome;
use crate::kernel::procfs;
use crate::kernel::sys;
use crate::kernel::tracee::SystemCall;
use crate::pool::Owner;
use crate::pool::paths::{self, CallId, SocketPath};

/// The capability that ports below 1024 need (capabilities(7)).
const NET_BIND_SERVICE: u64 = 1 << 10;

/// A thread of a worker, or of a process that the worker started.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    pub tid: Pid,
    pub borrower: Borrower,
    notify_fd: BorrowedFd<'a>,
    /// The kernel's id of this call.
    id: u64,
    pub stopped: StoppedCall,
    readings: &'a Readings,
}

/// What was read about a call, and what has yet to be read before it can be answered.
#[derive(Debug, Default)]
pub struct Readings {
    pub answers: Vec<(Question, Outcome)>,
    pub missing: RefCell<Vec<Question>>,
    /// What has come of its path.
    pub path: Option<paths::Outcome>,
    /// Whether something has yet to be done with its path.
    pub waits_for_path: Cell<bool>,
}

/// A socket of a caller.
#[derive(Debug, Clone, Copy)]
pub struct OwnSocket {
    pub fd: u32,
    pub inode: u64,
}

impl<'a> Caller<'a> {
    pub fn new(
        notify_fd: BorrowedFd<'a>,
        notif: &libc::seccomp_notif,
        borrower: Borrower,
        readings: &'a Readings,
    ) -> Self {
        let call = SystemCall { number: notif.data.nr.into(), args: notif.data.args };
        let stopped = StoppedCall { call, end: notif.data.instruction_pointer };
        Self { tid: Pid::from_raw(notif.pid as i32), borrower, notify_fd, id: notif.id, stopped, readings }
    }

    /// What the reader says. Until it has, the question is noted as missing, and whatever is answered to the call is void.
    fn ask(&self, question: Question) -> io::Result<Vec<u8>> {
        let known = self.readings.answers.iter().find(|(known, _)| *known == question);
        match known {
            Some((_, answer)) => answer.clone().map_err(io::Error::from_raw_os_error),
            None => {
                self.readings.missing.borrow_mut().push(question);
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
    }

    /// Up to `len` bytes of its memory; fewer if the readable memory ends before.
    pub fn memory(&self, address: u64, len: u64) -> io::Result<Vec<u8>> {
        self.ask(Question::Memory { tid: self.tid.as_raw(), address, len })
    }

    /// The kernel's name for the protocol of a socket of the caller.
    pub fn protocol(&self, fd: u32) -> io::Result<String> {
        let name = self.ask(Question::Protocol { tid: self.tid.as_raw(), fd })?;
        String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// What it means by a path, and what there is: see [`SocketPath::resolve`].
    pub fn place(&self, from: Option<u32>, path: &Path) -> Option<(Found, SocketPath)> {
        let path = path.as_os_str().as_bytes().to_vec();
        parse_place(self.ask(Question::Place { tid: self.tid.as_raw(), from, path }).ok()?)
    }

    /// Says in its memory that a socket doesn't listen: see [`options::deny_listening`](super::options::deny_listening).
    pub fn deny_listening(&self, value: u64, len: u64) -> io::Result<()> {
        let (tid, id) = (self.tid.as_raw(), self.id);
        self.ask(Question::DenyListening { tid, id, value, len }).map(drop)
    }

    pub fn call(&self) -> CallId {
        (self.borrower.worker, self.id)
    }

    /// What has come of the path of this call, if it had to wait for that.
    pub fn path_outcome(&self) -> Option<paths::Outcome> {
        self.readings.path
    }

    /// It has to wait until something is done with its path. Whatever is answered is void.
    pub fn wait_for_path(&self) {
        self.readings.waits_for_path.set(true);
    }

    /// Whether the thread still waits for the answer. If it was killed, its id may name another thread by
    /// now: what was read under this id is sure to be the caller's only if this holds afterwards
    /// (seccomp_unotify(2)).
    pub fn still_waits(&self) -> bool {
        sys::seccomp_notif_id_valid(self.notify_fd, self.id)
    }

    /// An fd for the caller's process.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        // One for a thread that isn't its process's first needs Linux 6.9.
        let of_first = sys::pidfd_open(self.tid.as_raw());
        of_first.or_else(|_| sys::pidfd_open(procfs::process_of(self.tid)?.as_raw()))
    }

    /// The inode number of a socket of the caller; `None` if the fd is no socket or can't be read.
    pub fn socket_inode(&self, fd: u32) -> Option<u64> {
        procfs::socket_inode(self.tid, fd).ok().flatten()
    }

    /// Puts `socket` in the place of the caller's `fd`.
    pub fn replace(&self, fd: u32, socket: BorrowedFd, close_on_exec: bool) -> io::Result<()> {
        sys::seccomp_notif_addfd(self.notify_fd, self.id, socket, Some(fd), close_on_exec).map(|_| ())
    }

    /// Gives the caller a duplicate of `socket` under a new number, which is closed on exec.
    pub fn give(&self, socket: BorrowedFd) -> io::Result<u32> {
        sys::seccomp_notif_addfd(self.notify_fd, self.id, socket, None, true)
    }

    /// Whether the caller itself could bind a TCP port of the wrapper's network: it is in the same network namespace, under
    /// the same security profile, and hasn't given up a right that the port needs. In a user namespace of its own it has no
    /// right to the ports of this one, whatever capabilities it shows.
    pub fn may_bind(&self, port: u16) -> bool {
        let has_right = || {
            let has = |pid| procfs::credentials(pid).is_ok_and(|it| it.effective & NET_BIND_SERVICE != 0);
            // What a complaint needs is read now: afterwards, calls of the thread may have been made for the wrapper.
            let is_known = || self.program_has_capability().is_some();
            procfs::same_namespace(self.tid, "user") && (has(self.tid) || (!has(Pid::this()) && is_known()))
        };
        procfs::same_namespace(self.tid, "net")
            && procfs::same_profile(self.tid)
            && (port >= procfs::first_unprivileged_port() || has_right())
    }

    /// Who owns what the caller makes.
    pub fn owner(&self) -> Option<Owner> {
        const FILE_SYSTEM: usize = 3;
        let its = procfs::credentials(self.tid).ok()?;
        Some(Owner { uid: its.uids[FILE_SYSTEM], gid: *its.gids.get(FILE_SYSTEM)? })
    }

    /// Whether the caller's program file has the capability for ports below 1024, but not the caller: with no_new_privs
    /// execve(2) grants nothing.
    pub fn lost_capability(&self) -> bool {
        let credentials = procfs::credentials(self.tid);
        let has = credentials.is_ok_and(|its| its.effective & NET_BIND_SERVICE != 0);
        !has && self.program_has_capability() == Some(true)
    }

    /// `None`: it hasn't been read yet.
    fn program_has_capability(&self) -> Option<bool> {
        let set = match self.ask(Question::Capabilities { tid: self.tid.as_raw() }) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            set => set.ok().and_then(|set| set.try_into().ok()).map_or(0, u64::from_ne_bytes),
        };
        Some(set & NET_BIND_SERVICE != 0)
    }

    /// Whether the caller has the wrapper's user.
    pub fn has_same_user(&self) -> bool {
        procfs::credentials(self.tid).is_ok_and(|its| its.uids == [unistd::geteuid().as_raw(); 4])
    }

    /// Whether the caller may do exactly what the wrapper may do.
    pub fn has_same_rights(&self) -> bool {
        let credentials = (procfs::credentials(self.tid), procfs::credentials(Pid::this()));
        matches!(credentials, (Ok(its), Ok(ours)) if its == ours)
            && procfs::same_namespace(self.tid, "user")
            && procfs::same_profile(self.tid)
    }
}
