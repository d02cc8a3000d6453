//! Puts workers behind the filter, and answers what it stops.
//!
//! A worker's `bind` to a TCP port puts a socket of the pool in the place of its own, and its `listen` is
//! done by the wrapper. Everything else is answered with "continue", so that the kernel says what it would
//! have said without us. See seccomp_unotify(2).

pub mod filter;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use log::{debug, warn};
use nix::unistd::Pid;

use crate::address::{Address, Endpoint};
use crate::ids::Borrower;
use crate::intercept::filter::{Call, SocketOption, decode, filter};
use crate::kernel::procfs;
use crate::kernel::sys::{self, NotifResponse};
use crate::pool::paths::{self, Place, Removal, UnixSockets};
use crate::pool::{Pool, Wish};

/// What becomes of the answers to stopped calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    Arrive,
    /// A signal can have the caller repeat its call although it was answered, without a word of it to us.
    MayBeLost,
}

/// Installs the filter on the calling thread, for it and all that it starts, and returns the fd that
/// tells of what it stops. Sets no_new_privs where the process has no right to do without.
///
/// # Errors
/// EBUSY when the process already is under such a filter; ENOSYS and EINVAL on kernels without.
pub fn install() -> io::Result<(OwnedFd, Answers)> {
    let install = || {
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        let killable = flags | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV; // Linux 5.19
        match sys::seccomp_set_mode_filter(killable, &filter()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                sys::seccomp_set_mode_filter(flags, &filter()).map(|fd| (fd, Answers::MayBeLost))
            }
            result => result.map(|fd| (fd, Answers::Arrive)),
        }
    };
    match install() {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            nix::sys::prctl::set_no_new_privs()?;
            install()
        }
        result => result,
    }
}

/// How workers can be intercepted, tried in a process of its own that ends at once.
///
/// # Errors
/// Why they can't.
pub fn probe() -> io::Result<Answers> {
    let mut child = Command::new("/");
    // What the child is stopped from executing by isn't an error of seccomp(2).
    const ANSWERS_ARRIVE: i32 = libc::ECANCELED;
    const ANSWERS_MAY_BE_LOST: i32 = libc::ERESTART;
    sys::before_exec(&mut child, || {
        let (_notify_fd, answers) = install()?;
        Err(io::Error::from_raw_os_error(match answers {
            Answers::Arrive => ANSWERS_ARRIVE,
            Answers::MayBeLost => ANSWERS_MAY_BE_LOST,
        }))
    });
    match child.spawn() {
        Err(error) if error.raw_os_error() == Some(ANSWERS_ARRIVE) => Ok(Answers::Arrive),
        Err(error) if error.raw_os_error() == Some(ANSWERS_MAY_BE_LOST) => Ok(Answers::MayBeLost),
        Err(error) => Err(error),
        Ok(_) => Err(io::ErrorKind::Other.into()), // it can't have executed a directory
    }
}

/// What a worker has set on a socket that it hasn't bound yet.
#[derive(Debug, Clone, Copy, Default)]
struct Options {
    v6only: Option<bool>,
    shares: bool,
}

/// What a worker does by a system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    Listens(Endpoint),
    /// It has removed the path of a socket of its own.
    Ceases(Endpoint),
}

/// The wrapper's end of one worker's filter.
#[derive(Debug)]
pub struct Interception {
    notify_fd: OwnedFd,
    borrower: Borrower,
    /// The listeners that all workers have from the wrapper's own start, by inode number.
    inherited: Rc<[(u64, Endpoint)]>,
    /// By inode number.
    options: HashMap<u64, Options>,
    answers: Answers,
    /// Sockets that the worker has bound and not yet listened on, whatever the kernel would say, by inode number.
    bound: HashMap<u64, Endpoint>,
    /// Whether the worker has ended: what is behind the filter still is left to the kernel.
    retired: bool,
    /// Whether the log says already that the worker has rights of its own.
    warned: bool,
}

/// No address is longer (`struct sockaddr_storage`).
const LONGEST_ADDRESS: u64 = size_of::<libc::sockaddr_storage>() as u64;

/// Past this many sockets with options that were never bound, all are forgotten: they are a worker's
/// outgoing connections.
const MOST_OPTIONS: usize = 1024;

impl Interception {
    pub fn new(
        notify_fd: OwnedFd,
        borrower: Borrower,
        inherited: Rc<[(u64, Endpoint)]>,
        answers: Answers,
    ) -> Self {
        Self {
            notify_fd,
            borrower,
            inherited,
            options: HashMap::new(),
            answers,
            bound: HashMap::new(),
            retired: false,
            warned: false,
        }
    }

    /// The worker has ended. Without an answer its children's calls would fail (ENOSYS), so there goes on
    /// to be one: "continue".
    pub fn retire(&mut self) {
        self.retired = true;
    }

    /// Answers one system call, after [`Interception::as_fd`] became readable. Returns what the worker has begun
    /// or ceased to do by it. `is_starting` says whether it has yet to become ready.
    pub fn answer(&mut self, pool: &mut Pool, unix: &mut UnixSockets, is_starting: bool) -> Option<Heard> {
        let notif = match sys::seccomp_notif_recv(self.notify_fd.as_fd()) {
            Ok(notif) => notif,
            Err(error) => {
                debug!("worker {}: a system call went before its answer: {error}", self.borrower.slot);
                return None;
            }
        };
        let tid = Pid::from_raw(notif.pid as i32);
        let (response, heard) = match decode(&notif.data) {
            Call::Unlink { .. } if unix.is_empty() && !is_starting => (NotifResponse::Continue, None),
            Call::Unlink { from, path } => self.unlink(unix, notif.id, tid, from, path, is_starting),
            _ if self.retired => (NotifResponse::Continue, None),
            Call::Bind { fd, address, len } => {
                let address = procfs::memory(tid, address, len.min(LONGEST_ADDRESS) as usize);
                let response = match address.inspect_err(|error| self.warn_of_rights(error)) {
                    Ok(bytes) if bytes.len() as u64 == len => match paths::path_of_sockaddr(&bytes) {
                        Some(path) => self.bind_unix(unix, notif.id, tid, fd, &path),
                        None => self.bind(pool, notif.id, tid, fd, &bytes),
                    },
                    // Too long, or not all of it is there: which the kernel refuses.
                    _ => NotifResponse::Continue,
                };
                (response, None)
            }
            Call::Listen { fd, backlog } => {
                let (response, listens) = self.listen(pool, unix, notif.id, tid, fd, backlog);
                (response, listens.map(Heard::Listens))
            }
            Call::SetOption { fd, option, value, len } => {
                self.note_option(tid, fd, option, value, len);
                (NotifResponse::Continue, None)
            }
            Call::AsksWhetherListening { fd, value, len } => {
                (self.deny_listening(notif.id, tid, fd, value, len), None)
            }
            Call::Other => (NotifResponse::Continue, None),
        };
        if let Err(error) = sys::seccomp_notif_send(self.notify_fd.as_fd(), notif.id, response) {
            debug!("worker {}: an answer came too late: {error}", self.borrower.slot);
        }
        heard
    }

    fn bind(&mut self, pool: &mut Pool, id: u64, tid: Pid, fd: u32, bytes: &[u8]) -> NotifResponse {
        let Some(bind) = self.understand_bind(tid, fd, bytes) else { return NotifResponse::Continue };
        // Only now is it sure that all that was read is of the thread that waits.
        if !sys::seccomp_notif_id_valid(self.notify_fd.as_fd(), id) {
            return NotifResponse::Continue;
        }
        if self.may_be_repeated(bind.inode, &bind.wish.address.into()) {
            return NotifResponse::Success;
        }
        if pool.lent(self.borrower.worker, bind.inode).is_some() || bind.own.as_ref().is_some_and(is_bound) {
            return NotifResponse::Continue; // bound already, which the kernel refuses
        }
        let inode = match pool.lend(self.borrower, bind.wish) {
            Ok(inode) => inode,
            Err(error) => {
                debug!("worker {} can't bind {}: {error}", self.borrower.slot, bind.wish.address);
                return NotifResponse::Errno(error.raw_os_error().unwrap_or(libc::EADDRINUSE));
            }
        };
        let Some(socket) = pool.lent(self.borrower.worker, inode) else { return NotifResponse::Continue };
        if let Some(own) = &bind.own {
            carry_options_over(own.as_fd(), socket);
        }
        match sys::seccomp_notif_addfd(self.notify_fd.as_fd(), id, socket, fd, bind.close_on_exec) {
            Ok(()) => {
                self.bound.insert(inode, bind.wish.address.into());
                debug!("worker {} (pid {tid}) binds {}", self.borrower.slot, bind.wish.address);
                self.options.remove(&bind.inode);
                NotifResponse::Success
            }
            Err(error) => {
                debug!("worker {} did not get its socket: {error}", self.borrower.slot);
                pool.take_back(inode);
                NotifResponse::Continue
            }
        }
    }

    /// Whether a bind was done before and perhaps not told, so that this is the same again. A program that binds
    /// a socket to its own address for a second time can't be told from that.
    fn may_be_repeated(&self, inode: u64, endpoint: &Endpoint) -> bool {
        self.answers == Answers::MayBeLost && self.bound.get(&inode) == Some(endpoint)
    }

    /// Has a worker share its generation's socket of a path.
    fn bind_unix(
        &mut self,
        unix: &mut UnixSockets,
        id: u64,
        tid: Pid,
        fd: u32,
        path: &Path,
    ) -> NotifResponse {
        let Some((own, place)) = understand_unix_bind(tid, fd, path) else { return NotifResponse::Continue };
        let (Ok(flags), Ok(mask)) = (procfs::fd_flags(tid, fd), procfs::umask(tid)) else {
            return NotifResponse::Continue;
        };
        if !sys::seccomp_notif_id_valid(self.notify_fd.as_fd(), id) {
            return NotifResponse::Continue;
        }
        if self.may_be_repeated(own, &Endpoint::Unix(place.path().to_owned())) {
            return NotifResponse::Success;
        }
        if unix.socket(own).is_some() {
            return NotifResponse::Continue; // bound already, which the kernel refuses
        }
        let inode = match unix.bind(&place, self.borrower, mask) {
            Ok(inode) => inode,
            // Without a number it is one that we can't do, not that can't be done.
            Err(error) => return error.raw_os_error().map_or(NotifResponse::Continue, NotifResponse::Errno),
        };
        let Some(socket) = unix.socket(inode) else { return NotifResponse::Continue };
        // All workers of the generation share these flags, as they share the socket.
        let (nonblocking, close_on_exec) = (flags & libc::O_NONBLOCK != 0, flags & libc::O_CLOEXEC != 0);
        let placed = (socket2::SockRef::from(&socket).set_nonblocking(nonblocking)).and_then(|()| {
            sys::seccomp_notif_addfd(self.notify_fd.as_fd(), id, socket.as_fd(), fd, close_on_exec)
        });
        match placed {
            Ok(()) => {
                self.bound.insert(inode, Endpoint::Unix(place.path().to_owned()));
                debug!("worker {} (pid {tid}) binds {}", self.borrower.slot, place.path().display());
                NotifResponse::Success
            }
            Err(_) => NotifResponse::Continue,
        }
    }

    /// A borrowed socket listens already when it is bound, and a program that asks (gunicorn, HAProxy) would then
    /// leave its `listen` out. To it the socket is one that was merely bound.
    fn deny_listening(&self, id: u64, tid: Pid, fd: u32, value: u64, len: u64) -> NotifResponse {
        let inode = procfs::socket_inode(tid, fd).ok().flatten();
        let is_bound_only = inode.is_some_and(|inode| self.bound.contains_key(&inode));
        // Anything odd is left to the kernel.
        let Ok(size) = procfs::memory(tid, len, size_of::<i32>()) else { return NotifResponse::Continue };
        let fits = size == (size_of::<i32>() as i32).to_ne_bytes();
        if !is_bound_only || !fits || !sys::seccomp_notif_id_valid(self.notify_fd.as_fd(), id) {
            return NotifResponse::Continue;
        }
        match procfs::set_memory(tid, value, &0i32.to_ne_bytes()) {
            Ok(()) => NotifResponse::Success,
            Err(_) => NotifResponse::Continue,
        }
    }

    /// Keeps a worker from removing a path that others of its kind have.
    ///
    /// Another socket's path, such as one that an earlier run has left, or one that isn't there, is seen to here as
    /// well and not by the kernel after the answer: a sibling could bind it in between, and lose it then. Of a
    /// worker that is ready nothing is looked at but names that are served, since a look at a file may take long.
    fn unlink(
        &self,
        unix: &mut UnixSockets,
        id: u64,
        tid: Pid,
        from: Option<u32>,
        path: u64,
        is_starting: bool,
    ) -> (NotifResponse, Option<Heard>) {
        const NOT_OURS: (NotifResponse, Option<Heard>) = (NotifResponse::Continue, None);
        let path = procfs::memory(tid, path, libc::PATH_MAX as usize).ok();
        let path = path.and_then(|bytes| paths::path_of_bytes(&bytes));
        let path = path.filter(|path| is_starting || unix.may_have(path));
        let Some(place) = path.and_then(|path| Place::of(tid, from, &path)) else { return NOT_OURS };
        if !same_rights(tid) || !sys::seccomp_notif_id_valid(self.notify_fd.as_fd(), id) {
            return NOT_OURS;
        }
        match fs::symlink_metadata(place.path()) {
            Ok(file) if file.file_type().is_socket() => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return (NotifResponse::Errno(libc::ENOENT), None);
            }
            _ => return NOT_OURS,
        }
        let ceases = || Some(Heard::Ceases(Endpoint::Unix(place.path().to_owned())));
        match unix.remove(&place, self.borrower.worker) {
            Removal::Kept => (NotifResponse::Success, None),
            Removal::Removed => (NotifResponse::Success, ceases()),
            Removal::NotOurs => match fs::remove_file(place.path()) {
                Ok(()) => (NotifResponse::Success, None),
                Err(error) => {
                    (error.raw_os_error().map_or(NotifResponse::Continue, NotifResponse::Errno), None)
                }
            },
        }
    }

    /// What is asked for, if it is ours to give: a TCP port that this process itself could bind.
    fn understand_bind(&mut self, tid: Pid, fd: u32, bytes: &[u8]) -> Option<Bind> {
        let inode = procfs::socket_inode(tid, fd).inspect_err(|error| self.warn_of_rights(error)).ok()??;
        let options = self.options.get(&inode).copied().unwrap_or_default();
        let v6only = options.v6only.unwrap_or_else(procfs::v6only_by_default);
        let address = Address::from_sockaddr(bytes, v6only)?;
        let family_fits = match procfs::socket_protocol(tid, fd).ok()?.as_str() {
            "TCP" | "MPTCP" => address.socket.is_ipv4(),
            "TCPv6" | "MPTCPv6" => address.socket.is_ipv6(),
            _ => false,
        };
        if !family_fits || address.socket.port() == 0 || !may_bind(tid, address.socket.port()) {
            return None;
        }
        // Where it is refused, the socket is taken for a new one without options.
        let process = procfs::process_of(tid).and_then(|pid| sys::pidfd_open(pid.as_raw(), 0));
        let own = process.and_then(|process| sys::pidfd_getfd(process.as_fd(), fd)).ok();
        let flags = procfs::fd_flags(tid, fd).ok()?;
        Some(Bind {
            inode,
            own,
            close_on_exec: flags & libc::O_CLOEXEC != 0,
            wish: Wish { address, nonblocking: flags & libc::O_NONBLOCK != 0, shares: options.shares },
        })
    }

    /// A worker that has changed its user can't be looked into without CAP_SYS_PTRACE. What it binds is
    /// its own then.
    fn warn_of_rights(&mut self, error: &io::Error) {
        if error.kind() == io::ErrorKind::PermissionDenied && !self.warned {
            self.warned = true;
            let slot = self.borrower.slot;
            warn!(
                "worker {slot} acts as another user and can't be looked into, so its sockets can't be shared \
                 (start reuse-run as that user)"
            );
        }
    }

    fn listen(
        &mut self,
        pool: &mut Pool,
        unix: &UnixSockets,
        id: u64,
        tid: Pid,
        fd: u32,
        backlog: i32,
    ) -> (NotifResponse, Option<Endpoint>) {
        let inode = procfs::socket_inode(tid, fd).ok().flatten();
        let valid = || sys::seccomp_notif_id_valid(self.notify_fd.as_fd(), id);
        let Some(inode) = inode.filter(|_| valid()) else { return (NotifResponse::Continue, None) };
        if let Some((_, endpoint)) = self.inherited.iter().find(|(inherited, _)| *inherited == inode) {
            return (NotifResponse::Continue, Some(endpoint.clone()));
        }
        let listens = if pool.lent(self.borrower.worker, inode).is_some() {
            pool.listen(inode, backlog).map(Endpoint::Tcp)
        } else if unix.socket(inode).is_some() {
            unix.listen(inode, backlog).map(Endpoint::Unix)
        } else {
            return (NotifResponse::Continue, None);
        };
        match listens {
            Ok(endpoint) => {
                self.bound.remove(&inode);
                debug!("worker {} (pid {tid}) listens on {endpoint}", self.borrower.slot);
                (NotifResponse::Success, Some(endpoint))
            }
            Err(error) => (NotifResponse::Errno(error.raw_os_error().unwrap_or(libc::EINVAL)), None),
        }
    }

    /// Remembers an option of a socket that may be bound later. The kernel sets it; should it refuse,
    /// what was noted is wrong, but such a call is refused for what it is and not repeated.
    fn note_option(&mut self, tid: Pid, fd: u32, option: SocketOption, value: u64, len: u64) {
        if len < size_of::<i32>() as u64 {
            return;
        }
        let Ok(Some(inode)) = procfs::socket_inode(tid, fd) else { return };
        let Ok(bytes) = procfs::memory(tid, value, size_of::<i32>()) else { return };
        let Ok(bytes) = bytes.try_into() else { return };
        let on = i32::from_ne_bytes(bytes) != 0;
        if self.options.len() >= MOST_OPTIONS {
            self.options.clear();
        }
        let options = self.options.entry(inode).or_default();
        match option {
            SocketOption::V6Only => options.v6only = Some(on),
            SocketOption::ReusePort => options.shares = on,
        }
    }
}

impl AsFd for Interception {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notify_fd.as_fd()
    }
}

struct Bind {
    /// Of the socket that the worker made.
    inode: u64,
    own: Option<OwnedFd>,
    close_on_exec: bool,
    wish: Wish,
}

/// The inode number of a worker's own Unix socket and the place that it is to be bound to, if that is ours
/// to give: the thread is the same user and sees the same files.
fn understand_unix_bind(tid: Pid, fd: u32, path: &Path) -> Option<(u64, Place)> {
    let inode = procfs::socket_inode(tid, fd).ok()??;
    let is_stream = match procfs::socket_protocol(tid, fd).ok()?.as_str() {
        "UNIX-STREAM" => true,
        // Before Linux 5.15 those were called so, too.
        "UNIX" => procfs::unix_sockets().iter().any(|row| row.inode == inode && row.is_stream),
        _ => false,
    };
    let place = (is_stream && same_rights(tid)).then(|| Place::of(tid, None, path))??;
    Some((inode, place))
}

/// Whether a thread may do what this process may.
fn same_rights(tid: Pid) -> bool {
    matches!((procfs::credentials(tid), procfs::credentials(Pid::this())), (Ok(its), Ok(ours)) if its == ours)
}

/// Whether a socket has a port already, by its connection or by a bind that was not ours.
fn is_bound(socket: &OwnedFd) -> bool {
    let address = socket2::SockRef::from(socket).local_addr();
    address.is_ok_and(|address| address.as_socket().is_some_and(|address| address.port() != 0))
}

/// Options that a connection has from its listener and that programs set before they bind: level and name.
const CARRIED_OVER: [(i32, i32); 13] = [
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_SOCKET, libc::SO_RCVBUF),
    (libc::SOL_SOCKET, libc::SO_SNDBUF),
];

/// Gives `ours` the options of a worker's own socket. Those of the worker that had it before go, too.
fn carry_options_over(own: BorrowedFd, ours: BorrowedFd) {
    for (level, name) in CARRIED_OVER {
        let (Ok(wanted), Ok(had)) =
            (sys::socket_option(own, level, name), sys::socket_option(ours, level, name))
        else {
            continue;
        };
        // The kernel tells twice what was asked for: socket(7).
        let is_buffer = level == libc::SOL_SOCKET && [libc::SO_RCVBUF, libc::SO_SNDBUF].contains(&name);
        let value = if is_buffer { wanted / 2 } else { wanted };
        if wanted != had
            && let Err(error) = sys::set_socket_option(ours, level, name, value)
        {
            debug!("socket option {level}/{name} is not carried over: {error}");
        }
    }
}

/// Whether a thread could do itself what the wrapper would do for it: it is in the same network namespace,
/// and hasn't given up a right that the port takes. Otherwise the kernel decides.
fn may_bind(tid: Pid, port: u16) -> bool {
    const NET_BIND_SERVICE: u64 = 1 << 10; // capabilities(7)
    let me = Pid::this();
    let namespaces = (procfs::network_namespace(tid), procfs::network_namespace(me));
    if !matches!(namespaces, (Ok(its), Ok(ours)) if its == ours) {
        return false;
    }
    port >= procfs::first_unprivileged_port()
        || matches!(
            (procfs::credentials(tid), procfs::credentials(me)),
            (Ok(its), Ok(ours)) if its.uids == ours.uids
                && its.effective & NET_BIND_SERVICE == ours.effective & NET_BIND_SERVICE
        )
}
