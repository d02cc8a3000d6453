//! Thin wrappers named after their system calls. This, [`super::tracee`] and [`super::notice`] have the only unsafe code.
//!
//! Each wrapper returns the `io::Error` of its call and decides nothing.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr};
use std::io;
use std::mem::{ManuallyDrop, size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use libc::{c_int, sock_filter, sock_fprog};
use nix::sys::signal::{SigHandler, Signal};
use nix::unistd::Pid;

/// Turns the result -1 into the `io::Error` in errno.
pub(super) fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn fprog(program: &[sock_filter]) -> io::Result<sock_fprog> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // The kernel only reads through the pointer, although the struct says *mut.
    Ok(sock_fprog { len, filter: program.as_ptr().cast_mut() })
}

/// seccomp(2), SECCOMP_SET_MODE_FILTER: installs `program` for the calling thread and returns its
/// notification fd (close-on-exec). `flags` must include SECCOMP_FILTER_FLAG_NEW_LISTENER.
pub fn seccomp_set_mode_filter(flags: libc::c_ulong, program: &[sock_filter]) -> io::Result<OwnedFd> {
    let fprog = fprog(program)?;
    // SAFETY: fprog points to `program`, which outlives the call; the kernel copies it.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const fprog) };
    let fd = check(result as c_int)?;
    // SAFETY: with NEW_LISTENER a result other than -1 is a new fd of this process, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_RECV: the next stopped system call.
///
/// # Errors
/// ENOENT if the calling thread died or was interrupted before.
pub fn seccomp_notif_recv(notify_fd: BorrowedFd) -> io::Result<libc::seccomp_notif> {
    // SAFETY: the struct has only integers, for which zero is valid. The kernel requires zeros.
    let mut notif: libc::seccomp_notif = unsafe { zeroed() };
    // SAFETY: the ioctl writes one struct seccomp_notif through the pointer.
    check(unsafe { libc::ioctl(notify_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut notif) })?;
    Ok(notif)
}

/// seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_ID_VALID: whether the calling thread still waits for
/// the answer, so that what was read under its thread id was its own.
pub fn seccomp_notif_id_valid(notify_fd: BorrowedFd, id: u64) -> bool {
    // SAFETY: the ioctl reads one u64 through the pointer.
    let result =
        unsafe { libc::ioctl(notify_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id) };
    result == 0
}

/// seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_ADDFD: gives the calling thread a duplicate of `fd`, and returns its number. With
/// a `target` (SECCOMP_ADDFD_FLAG_SETFD) it takes the place of that one, as with dup3(2).
pub fn seccomp_notif_addfd(
    notify_fd: BorrowedFd,
    id: u64,
    fd: BorrowedFd,
    target: Option<u32>,
    close_on_exec: bool,
) -> io::Result<u32> {
    let request = libc::seccomp_notif_addfd {
        id,
        flags: target.map_or(0, |_| libc::SECCOMP_ADDFD_FLAG_SETFD as u32),
        srcfd: fd.as_raw_fd() as u32,
        newfd: target.unwrap_or(0),
        newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
    };
    // SAFETY: the ioctl reads one struct seccomp_notif_addfd through the pointer.
    let number = check(unsafe {
        libc::ioctl(notify_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw const request)
    })?;
    Ok(number as u32)
}

/// A child that has ended or stopped: `si_pid`, `si_code` and `si_status` of waitid(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changed {
    pub pid: c_int,
    pub code: c_int,
    pub status: c_int,
}

/// waitid(2), without waiting, for any child or for the one with this pid. With WNOWAIT in `options` it stays as it is.
/// (nix's waitid fails if a real-time signal killed the child.) It also reports threads that this process traces: that
/// they have ended, and that they have stopped (`wait_task_stopped`, kernel/exit.c), with CLD_TRAPPED.
pub fn waitid(pid: Option<c_int>, options: c_int) -> io::Result<Option<Changed>> {
    let (kind, id) = pid.map_or((libc::P_ALL, 0), |pid| (libc::P_PID, pid as libc::id_t));
    // SAFETY: zero is valid for siginfo_t, a struct of integers and raw pointers. si_pid stays 0 if no child
    // has changed.
    let mut info: libc::siginfo_t = unsafe { zeroed() };
    // SAFETY: the kernel writes one siginfo_t through the pointer.
    check(unsafe { libc::waitid(kind, id, &raw mut info, options | libc::WNOHANG) })?;
    // SAFETY: these fields are valid for SIGCHLD, which waitid reports; otherwise the union is still all
    // zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok((pid != 0).then_some(Changed { pid, code: info.si_code, status }))
}

/// pidfd_open(2): an fd for a process.
pub fn pidfd_open(pid: c_int) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and no pointer.
    let pidfd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as c_int)?;
    // SAFETY: a result that isn't -1 is a fresh fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// pidfd_getfd(2): a duplicate of fd number `fd` of a process or thread.
///
/// # Errors
/// EPERM without ptrace access. Some seccomp profiles refuse the call to everyone without CAP_SYS_PTRACE.
pub fn pidfd_getfd(pidfd: BorrowedFd, fd: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers and no pointer.
    let duplicate =
        check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) } as c_int)?;
    // SAFETY: a result that isn't -1 is a fresh fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}

/// The answer to a stopped system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotifResponse {
    /// The kernel carries the call out, as without a filter.
    Continue,
    /// The call returns 0.
    Success,
    /// The call fails with this errno.
    Errno(i32),
}

/// seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_SEND: answers a stopped system call.
///
/// # Errors
/// ENOENT if the calling thread was interrupted or killed meanwhile.
pub fn seccomp_notif_send(notify_fd: BorrowedFd, id: u64, response: NotifResponse) -> io::Result<()> {
    let (error, flags) = match response {
        NotifResponse::Continue => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        NotifResponse::Success => (0, 0),
        NotifResponse::Errno(errno) => (-errno, 0),
    };
    let mut response = libc::seccomp_notif_resp { id, val: 0, error, flags };
    // SAFETY: the ioctl reads one struct seccomp_notif_resp through the pointer.
    check(unsafe { libc::ioctl(notify_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut response) })?;
    Ok(())
}

/// setsockopt(2), SO_ATTACH_REUSEPORT_CBPF: from now on `program` returns, for the whole reuseport group of
/// `socket`, the index of the member that gets a new connection. It replaces an earlier program atomically.
pub fn attach_reuseport_cbpf(socket: BorrowedFd, program: &[sock_filter]) -> io::Result<()> {
    let fprog = fprog(program)?;
    // SAFETY: fprog points to `program`, which outlives the call; the kernel copies it.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const fprog).cast(),
            size_of::<sock_fprog>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// setsockopt(2), IP_MINTTL (ip(7)) or for `ipv6` IPV6_MINHOPCOUNT: the socket silently drops packets whose
/// time to live is less than `ttl`. 0 lets all packets pass.
pub fn set_min_ttl(socket: BorrowedFd, ipv6: bool, ttl: u8) -> io::Result<()> {
    let (level, option) = min_ttl_option(ipv6);
    set_socket_option(socket, level, option, ttl.into())
}

/// getsockopt(2): what [`set_min_ttl`] sets.
pub fn min_ttl(socket: BorrowedFd, ipv6: bool) -> io::Result<u8> {
    let (level, option) = min_ttl_option(ipv6);
    Ok(socket_option(socket, level, option)? as u8)
}

fn min_ttl_option(ipv6: bool) -> (c_int, c_int) {
    if ipv6 { (libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT) } else { (libc::IPPROTO_IP, libc::IP_MINTTL) }
}

/// getsockopt(2) for an option whose value is an int.
pub fn socket_option(socket: BorrowedFd, level: c_int, name: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, one int, through the pointer.
    check(unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len)
    })?;
    Ok(value)
}

/// setsockopt(2) for an option whose value is an int.
pub fn set_socket_option(socket: BorrowedFd, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads one int through the pointer.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) })?;
    Ok(())
}

/// The value of a socket option, as many bytes as the kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionValue {
    bytes: [u8; Self::MAX_LENGTH],
    len: libc::socklen_t,
}

impl OptionValue {
    const MAX_LENGTH: usize = 64;

    /// getsockopt(2).
    ///
    /// # Errors
    /// ENOPROTOOPT or EOPNOTSUPP if sockets of this kind don't have the option, or the kernel doesn't.
    pub fn of(socket: BorrowedFd, level: c_int, name: c_int) -> io::Result<Self> {
        let mut value = Self { bytes: [0; Self::MAX_LENGTH], len: Self::MAX_LENGTH as libc::socklen_t };
        let Self { bytes, len } = &mut value;
        // SAFETY: the kernel writes at most `len` bytes, the size of `bytes`, through the pointer.
        check(unsafe {
            libc::getsockopt(socket.as_raw_fd(), level, name, bytes.as_mut_ptr().cast(), &raw mut *len)
        })?;
        Ok(value)
    }

    /// setsockopt(2).
    pub fn set(&self, socket: BorrowedFd, level: c_int, name: c_int) -> io::Result<()> {
        // SAFETY: the kernel reads `len` bytes, which getsockopt has not made more than there are.
        check(unsafe {
            libc::setsockopt(socket.as_raw_fd(), level, name, self.bytes.as_ptr().cast(), self.len)
        })?;
        Ok(())
    }

    pub fn from_int(value: c_int) -> Self {
        let mut bytes = [0; Self::MAX_LENGTH];
        bytes[..size_of::<c_int>()].copy_from_slice(&value.to_ne_bytes());
        Self { bytes, len: size_of::<c_int>() as libc::socklen_t }
    }

    /// The value of an option that is an int.
    pub fn to_int(self) -> c_int {
        let [a, b, c, d, ..] = self.bytes;
        c_int::from_ne_bytes([a, b, c, d])
    }
}

/// setsockopt(2), SO_PASSRIGHTS (Linux 6.16): nobody can send descriptors to this socket, nor to its connections.
pub fn refuse_descriptors(socket: BorrowedFd) -> io::Result<()> {
    const SO_PASSRIGHTS: c_int = 83; // asm-generic/socket.h
    set_socket_option(socket, libc::SOL_SOCKET, SO_PASSRIGHTS, 0)
}

/// asm-generic/socket.h, Linux 5.1.
pub const SO_BINDTOIFINDEX: c_int = 62;

/// getsockopt(2), SO_BINDTOIFINDEX: the index of the interface that a socket is bound to; 0 for none.
pub fn bound_device(socket: BorrowedFd) -> io::Result<u32> {
    Ok(socket_option(socket, libc::SOL_SOCKET, SO_BINDTOIFINDEX)? as u32)
}

/// getsockopt(2), SO_GET_FILTER: whether a filter was attached to a socket (SO_ATTACH_FILTER, SO_ATTACH_BPF).
pub fn has_filter(socket: BorrowedFd) -> io::Result<bool> {
    let mut instructions: libc::socklen_t = 0;
    // SAFETY: with a length of 0 the kernel writes nothing but the number of instructions, in place of the length.
    let result = check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            std::ptr::null_mut(),
            &raw mut instructions,
        )
    });
    match result {
        Ok(_) => Ok(instructions > 0),
        // An eBPF program, whose instructions can't be read (`sk_get_filter`, net/core/filter.c).
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => Ok(true),
        Err(error) => Err(error),
    }
}

/// getsockopt(2), SO_PEERPIDFD (Linux 6.5): an fd for the process whose credentials SO_PEERCRED shows.
///
/// # Errors
/// ENOPROTOOPT on older kernels; another one if the process is gone.
pub fn peer_pidfd(socket: BorrowedFd) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: c_int = 77; // asm-generic/socket.h
    Ok(owned_fd(socket_option(socket, libc::SOL_SOCKET, SO_PEERPIDFD)?))
}

/// getsockopt(2), TCP_INFO: the beginning of a `struct tcp_info` (linux/tcp.h). Fields that the kernel
/// doesn't know are zero.
pub fn tcp_info(socket: BorrowedFd) -> io::Result<[u8; TCP_INFO_LEN]> {
    let mut info = [0; TCP_INFO_LEN];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `info`, through the pointer.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    Ok(info)
}

/// Up to the end of `tcpi_data_segs_out`, the last field that is used.
const TCP_INFO_LEN: usize = 160;

/// getxattr(2): the value of the attribute `name` of the file at `path`. Follows links.
///
/// # Errors
/// ERANGE if the value is longer than `size` bytes.
pub fn getxattr(path: &Path, name: &OsStr, size: usize) -> io::Result<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let name = CString::new(name.as_bytes())?;
    let mut value = vec![0u8; size];
    // SAFETY: both strings end with a zero byte; the kernel writes at most `size` bytes to `value`.
    let len = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    if len < 0 {
        return Err(io::Error::last_os_error());
    }
    value.truncate(len as usize);
    Ok(value)
}

/// Makes the child of `command` run `prepare` between fork(2) and execve(2).
///
/// `prepare` may allocate and use any safe code: the wrapper has one thread, so that no other one can hold a
/// lock at the moment of the fork.
pub fn before_exec(command: &mut Command, prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: this process has one thread, so its child isn't limited to async-signal-safe functions. `prepare`
    // closes no fd that std needs: the low numbers, which it takes for the worker, were occupied at the start
    // (worker::fds), so std's pipe for errors has a higher one.
    unsafe { command.pre_exec(prepare) };
}

/// signal(2): gives `signal` its default disposition.
pub fn signal_default(signal: Signal) -> io::Result<()> {
    // SAFETY: SIG_DFL is no handler, so no code of ours runs in a signal context.
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }?;
    Ok(())
}

/// kill(2) of one process, by any number of a signal. (nix knows no real-time signals.)
pub fn kill(pid: c_int, signal: c_int) -> io::Result<()> {
    // SAFETY: kill takes two numbers.
    check(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

/// fcntl(2), F_SETOWN, F_SETSIG and O_ASYNC: when something happens at `fd`, the kernel sends SIGKILL to a process group,
/// with the rights that this process has now.
pub fn kill_group_at_event(fd: BorrowedFd, group: Pid) -> io::Result<()> {
    const F_SETSIG: c_int = 10; // asm-generic/fcntl.h
    let settings = [
        (libc::F_SETOWN, -group.as_raw()),
        (F_SETSIG, libc::SIGKILL),
        (libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK),
    ];
    for (command, value) in settings {
        // SAFETY: these commands take a number and no pointer.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), command, value) })?;
    }
    Ok(())
}

/// dup2(2): makes the number `target` a duplicate of `fd` that survives execve(2), and closes what it was
/// before. For a child that is about to exec: its low numbers are placeholders kept for the new program.
pub fn dup2_for_exec(fd: BorrowedFd, target: c_int) -> io::Result<()> {
    // SAFETY: in such a child nothing uses `target` before execve(2): it is a placeholder, or a descriptor of
    // the wrapper's own that the child has no use for.
    check(unsafe { libc::dup2(fd.as_raw_fd(), target) })?;
    Ok(())
}

/// epoll_ctl(2), EPOLL_CTL_ADD: has another process's epoll, of which `epoll` is a duplicate, watch `socket` by the number
/// that this has there. Until the end of the call the number means `socket` here too, whatever it means otherwise.
///
/// # Errors
/// EBADF or EINVAL if no fd of this process may have such a number.
pub fn epoll_add_as(
    epoll: OwnedFd,
    socket: BorrowedFd,
    number: u32,
    events: u32,
    data: u64,
) -> io::Result<()> {
    let number = number as c_int;
    // SAFETY: fcntl takes numbers, and its result is a new fd of this process, or -1.
    let duplicate_above = |fd: c_int| check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, number + 1) });
    let epoll = owned_fd(duplicate_above(epoll.as_raw_fd())?);
    let socket = owned_fd(duplicate_above(socket.as_raw_fd())?);
    let other = match duplicate_above(number) {
        Ok(fd) => Some(owned_fd(fd)),
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => None, // nothing has the number
        Err(error) => return Err(error),
    };
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: `number` has its own file again before anybody uses it: this process has one thread, and `other` is that
    // file. Nothing is closed for the last time, so that no epoll forgets it. The kernel reads the event.
    let added = unsafe {
        check(libc::dup3(socket.as_raw_fd(), number, libc::O_CLOEXEC))?;
        let added = check(libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, number, &raw mut event));
        match other {
            // Workers inherit stdin, stdout and stderr alone.
            Some(other) if number <= 2 => check(libc::dup2(other.as_raw_fd(), number)),
            Some(other) => check(libc::dup3(other.as_raw_fd(), number, libc::O_CLOEXEC)),
            None => check(libc::close(number)),
        }
        .and(added)
    };
    added.map(|_| ())
}

/// fcntl(2), F_SETFD: sets FD_CLOEXEC on an fd number. A number that isn't open is no error. Returns whether it was open
/// without that flag, as what this process was started with is.
pub fn set_close_on_exec(fd: c_int) -> bool {
    // SAFETY: neither takes a pointer. Both fail with EBADF on a number that isn't open.
    unsafe { libc::fcntl(fd, libc::F_GETFD) == 0 && libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) == 0 }
}

/// Whether this process has file descriptors in reserve, for what it has to read, accept and answer whatever workers do.
///
/// # Errors
/// EMFILE or ENFILE.
pub fn has_fds_in_reserve() -> io::Result<()> {
    const RESERVE: usize = 8;
    let taken: Vec<OwnedFd> =
        (0..RESERVE).map(|_| io::stdin().as_fd().try_clone_to_owned()).collect::<Result<_, _>>()?;
    drop(taken);
    Ok(())
}

/// Takes ownership of an fd that the kernel has just given to this process (SCM_RIGHTS, SO_PEERPIDFD), or that
/// this process was started with (LISTEN_FDS).
pub fn owned_fd(fd: c_int) -> OwnedFd {
    // SAFETY: the callers pass each number once, right after the kernel returned it or, for LISTEN_FDS, at
    // the start. Nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Takes what a struct owns out of it, in its `drop`.
pub fn take_in_drop<T>(owned: &mut ManuallyDrop<T>) -> T {
    // SAFETY: the callers are implementations of Drop, which run once, and use `owned` no more.
    unsafe { ManuallyDrop::take(owned) }
}

/// What [`recvmsg`] returns.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// In bytes.
    pub length: usize,
    pub sender: Option<libc::ucred>,
    /// Whether descriptors came with it, which were closed; with MSG_PEEK, whether descriptors come with it.
    pub has_descriptors: bool,
}

/// recvmsg(2) without room for descriptors (SCM_RIGHTS). `tells_sender` says whether the socket has SO_PASSCRED.
pub fn recvmsg(
    socket: BorrowedFd,
    bytes: &mut [u8],
    flags: c_int,
    tells_sender: bool,
) -> io::Result<Received> {
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        sender: libc::ucred,
    }
    // SAFETY: both structs have only integers and raw pointers, for which zero is valid.
    let (mut control, mut message): (Control, libc::msghdr) = unsafe { (zeroed(), zeroed()) };
    let mut buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut buffer, 1);
    if tells_sender {
        // The sender comes first, and leaves no room (`scm_recv`, net/core/scm.c).
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>() as _;
    }
    // SAFETY: the kernel writes into `bytes` and `control`, at most as much as their lengths say, and into `message`.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let has_sender = control.header.cmsg_type == libc::SCM_CREDENTIALS;
    let has_descriptors = message.msg_flags & libc::MSG_CTRUNC != 0;
    Ok(Received { length, sender: has_sender.then_some(control.sender), has_descriptors })
}

/// setfsuid(2) and setfsgid(2): makes something that belongs to another user and group, if this process may do that.
/// What a change of these ids resets, it puts back: whether the process can be dumped (PR_SET_DUMPABLE(2const)), and the
/// signal that it gets when its parent dies (PR_SET_PDEATHSIG(2const)).
pub fn with_fsids<T>(uid: u32, gid: u32, make: impl FnOnce() -> T) -> T {
    let death_signal = nix::sys::prctl::get_pdeathsig();
    let is_dumpable = nix::sys::prctl::get_dumpable();
    // SAFETY: both take a number and return the old one. They concern this thread, the only one.
    let (old_gid, old_uid) = unsafe { (libc::setfsgid(gid), libc::setfsuid(uid)) };
    let made = make();
    // SAFETY: as above.
    unsafe { (libc::setfsuid(old_uid as libc::uid_t), libc::setfsgid(old_gid as libc::gid_t)) };
    let _ = is_dumpable.and_then(nix::sys::prctl::set_dumpable);
    let _ = death_signal.and_then(nix::sys::prctl::set_pdeathsig);
    made
}

/// fork(2). Returns `None` in the child, which may use any safe code, since the wrapper has one thread.
pub fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: this process has one thread, so its child isn't limited to async-signal-safe functions.
    let pid = check(unsafe { libc::fork() })?;
    Ok((pid != 0).then(|| Pid::from_raw(pid)))
}

/// close_range(2): closes every fd except these, in a child that uses nothing else of what the wrapper has open.
pub fn close_all_but(fds: &[impl AsRawFd]) {
    let mut kept: Vec<libc::c_uint> = fds.iter().map(|fd| fd.as_raw_fd() as libc::c_uint).collect();
    kept.sort_unstable();
    let mut first: libc::c_uint = 0;
    for fd in kept.into_iter().map(Some).chain([None]) {
        let last = fd.map_or(Some(libc::c_uint::MAX), |fd| fd.checked_sub(1));
        if let Some(last) = last.filter(|last| *last >= first) {
            // SAFETY: the owners of these numbers are never used or dropped again: the child exits without that.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
        first = fd.map_or(first, |fd| fd + 1);
    }
}

/// pidfd_send_signal(2).
pub fn pidfd_send_signal(pidfd: BorrowedFd, signal: Signal) -> io::Result<()> {
    // SAFETY: without a siginfo the call takes numbers only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as c_int,
            std::ptr::null::<()>(),
            0,
        )
    };
    check(result as c_int)?;
    Ok(())
}

/// _exit(2): ends a forked process without the wrapper's clean-up.
pub fn exit_now() -> ! {
    // SAFETY: it takes a number and doesn't return.
    unsafe { libc::_exit(0) }
}

/// ioctl_tty(2), TIOCNOTTY: gives up the controlling terminal if this is it. That concerns this process alone, unless it leads
/// its session. On any other file it fails and does nothing.
pub fn give_up_terminal(fd: c_int) {
    // SAFETY: the request takes no argument.
    unsafe { libc::ioctl(fd, libc::TIOCNOTTY) };
}

/// setenv(3), in a child that is about to exec. std's set_var can't be used there: std holds its lock of the
/// environment across the fork.
///
/// # Errors
/// EINVAL if the name is empty or contains '='.
pub fn setenv(name: &OsStr, value: &OsStr) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    let value = CString::new(value.as_bytes())?;
    // SAFETY: setenv copies both strings, which end with a zero byte. The child has no other thread that
    // could read the environment meanwhile.
    check(unsafe { libc::setenv(name.as_ptr(), value.as_ptr(), 1) })?;
    Ok(())
}

/// unsetenv(3), in a child that is about to exec.
///
/// # Errors
/// Those of [`setenv`].
pub fn unsetenv(name: &OsStr) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    // SAFETY: the name ends with a zero byte. The child has no other thread that could read the environment
    // meanwhile.
    check(unsafe { libc::unsetenv(name.as_ptr()) })?;
    Ok(())
}

/// The process that sent a signal (sigaction(2)); `None` if the kernel did.
pub fn sender(info: &libc::siginfo_t) -> Option<Pid> {
    const SI_KERNEL: c_int = 0x80; // asm-generic/siginfo.h
    // SAFETY: si_pid reads a field that the kernel has set, or zero, for any signal that kill(2) can send.
    (info.si_code != SI_KERNEL).then(|| Pid::from_raw(unsafe { info.si_pid() }))
}

#[cfg(test)]
mod tests {
    use nix::sys::prctl;
    use nix::sys::stat::fstat;
    use socket2::{Domain, Protocol, Socket, Type};

    use super::*;

    /// As root, unless that is the only user (user_namespaces(7)); for others nothing changes.
    #[test]
    fn what_is_made_with_other_fsids_belongs_to_them_and_nothing_else_changes() {
        prctl::set_pdeathsig(Signal::SIGUSR1).unwrap();
        let owner_of_new = || {
            let file = fstat(Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()).unwrap();
            (file.st_uid, file.st_gid)
        };
        let its = with_fsids(54321, 54322, owner_of_new);
        let ours = owner_of_new();
        let is_alone = std::fs::read_to_string("/proc/self/uid_map").unwrap().ends_with(" 1\n");
        let may_be_others = nix::unistd::geteuid().is_root() && !is_alone;
        assert_eq!(its, if may_be_others { (54321, 54322) } else { ours });
        assert_eq!(ours.0, nix::unistd::geteuid().as_raw());
        assert_eq!(prctl::get_pdeathsig(), Ok(Some(Signal::SIGUSR1)));
        assert_eq!(prctl::get_dumpable(), Ok(true));
        prctl::set_pdeathsig(None).unwrap();
    }

    /// Why a worker's socket of MPTCP becomes one of TCP (docs/limits.md).
    #[test]
    fn a_listener_of_mptcp_takes_no_limit_and_no_program() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket.listen(1).unwrap();
        let program = [crate::kernel::bpf::ret_accumulator()];
        for refused in
            [set_min_ttl(socket.as_fd(), false, 255), attach_reuseport_cbpf(socket.as_fd(), &program)]
        {
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
        }
    }
}
