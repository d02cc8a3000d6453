//! The only unsafe code: thin wrappers named after their system calls.
//!
//! Each returns the `io::Error` of its call and decides nothing.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use libc::{c_int, sock_filter, sock_fprog};
use nix::sys::signal::{SigHandler, Signal};

/// Turns -1 into the `io::Error` that errno tells.
fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn fprog(program: &[sock_filter]) -> io::Result<sock_fprog> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // The kernel only reads through the pointer, although the struct says *mut.
    Ok(sock_fprog { len, filter: program.as_ptr().cast_mut() })
}

/// seccomp(2), SECCOMP_SET_MODE_FILTER: installs `program` for the calling thread and returns the
/// notification fd that SECCOMP_FILTER_FLAG_NEW_LISTENER in `flags` asks for (close-on-exec).
pub fn seccomp_set_mode_filter(flags: libc::c_ulong, program: &[sock_filter]) -> io::Result<OwnedFd> {
    let fprog = fprog(program)?;
    // SAFETY: fprog points to `program`, which outlives the call; the kernel copies it.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const fprog) };
    let fd = check(result as c_int)?;
    // SAFETY: with NEW_LISTENER a result that isn't -1 is a fresh fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_RECV: the next trapped system call.
///
/// # Errors
/// ENOENT when the caller died before its notification was fetched.
pub fn seccomp_notif_recv(notify_fd: BorrowedFd) -> io::Result<libc::seccomp_notif> {
    // SAFETY: all-zero is a valid value of this plain struct, and what the kernel demands.
    let mut notif: libc::seccomp_notif = unsafe { zeroed() };
    // SAFETY: the ioctl writes one struct seccomp_notif through the pointer.
    check(unsafe { libc::ioctl(notify_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut notif) })?;
    Ok(notif)
}

/// seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_ID_VALID: whether the caller still waits for the answer,
/// that is, whether what was read under its thread id was really its own.
pub fn seccomp_notif_id_valid(notify_fd: BorrowedFd, id: u64) -> bool {
    // SAFETY: the ioctl reads one u64 through the pointer.
    let result =
        unsafe { libc::ioctl(notify_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id) };
    result == 0
}

/// seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_ADDFD with SECCOMP_ADDFD_FLAG_SETFD: puts `fd` in place of
/// the caller's `target`, as dup3(2) would.
pub fn seccomp_notif_addfd(
    notify_fd: BorrowedFd,
    id: u64,
    fd: BorrowedFd,
    target: u32,
    close_on_exec: bool,
) -> io::Result<()> {
    let request = libc::seccomp_notif_addfd {
        id,
        flags: libc::SECCOMP_ADDFD_FLAG_SETFD as u32,
        srcfd: fd.as_raw_fd() as u32,
        newfd: target,
        newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
    };
    // SAFETY: the ioctl reads one struct seccomp_notif_addfd through the pointer.
    check(unsafe {
        libc::ioctl(notify_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw const request)
    })?;
    Ok(())
}

/// A child that has ended: `si_pid`, `si_code` and `si_status` of waitid(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub pid: c_int,
    pub code: c_int,
    pub status: c_int,
}

/// waitid(2) of any child that has ended, or of the one with this pid, without waiting. With WNOWAIT in
/// `options` it stays a zombie. (nix's waitid takes the real-time signals for an error.)
pub fn waitid_ended(pid: Option<c_int>, options: c_int) -> io::Result<Option<Ended>> {
    let (kind, id) = pid.map_or((libc::P_ALL, 0), |pid| (libc::P_PID, pid as libc::id_t));
    // SAFETY: all-zero is a valid value of this plain struct; si_pid stays 0 if nobody has ended.
    let mut info: libc::siginfo_t = unsafe { zeroed() };
    let options = options | libc::WEXITED | libc::WNOHANG;
    // SAFETY: the kernel writes one siginfo_t through the pointer.
    check(unsafe { libc::waitid(kind, id, &raw mut info, options) })?;
    // SAFETY: waitid fills in the fields of SIGCHLD, and all of them are zero if it has nothing to tell.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok((pid != 0).then_some(Ended { pid, code: info.si_code, status }))
}

/// pidfd_open(2) of a process, or with PIDFD_THREAD, since Linux 6.9, of one of its threads.
pub fn pidfd_open(tid: c_int, flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers.
    let pidfd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, flags) } as c_int)?;
    // SAFETY: a result that isn't -1 is a fresh fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// pidfd_getfd(2): a duplicate of fd number `fd` of a process or thread.
///
/// # Errors
/// EPERM where ptrace access is denied; some seccomp profiles deny the call to all without CAP_SYS_PTRACE.
pub fn pidfd_getfd(pidfd: BorrowedFd, fd: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three numbers.
    let duplicate =
        check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) } as c_int)?;
    // SAFETY: a result that isn't -1 is a fresh fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}

/// What a trapped system call gets to hear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotifResponse {
    /// The kernel carries the call out as if nobody had asked.
    Continue,
    /// The call returns 0.
    Success,
    /// The call fails with this errno.
    Errno(i32),
}

/// seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_SEND: lets the caller go on with `response`.
///
/// # Errors
/// ENOENT when the caller was interrupted or killed meanwhile.
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

/// setsockopt(2), SO_ATTACH_REUSEPORT_CBPF: `program` names, for the whole group of `socket`, the
/// index of the member that gets a new connection. An attached program is replaced atomically.
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

/// setsockopt(2), IP_MINTTL (ip(7)) or, for `ipv6`, IPV6_MINHOPCOUNT: the socket drops packets in silence
/// whose time to live has come down to less than `ttl`. 0 lets all pass.
pub fn set_min_ttl(socket: BorrowedFd, ipv6: bool, ttl: u8) -> io::Result<()> {
    const IPV6_MINHOPCOUNT: c_int = 73; // linux/in6.h
    let (level, option) =
        if ipv6 { (libc::IPPROTO_IPV6, IPV6_MINHOPCOUNT) } else { (libc::IPPROTO_IP, libc::IP_MINTTL) };
    set_socket_option(socket, level, option, ttl.into())
}

/// getsockopt(2) of an option whose value is an int.
pub fn socket_option(socket: BorrowedFd, level: c_int, name: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, one int, through the pointer.
    check(unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len)
    })?;
    Ok(value)
}

/// setsockopt(2) of an option whose value is an int.
pub fn set_socket_option(socket: BorrowedFd, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads one int through the pointer.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) })?;
    Ok(())
}

/// getsockopt(2), TCP_INFO: the beginning of a `struct tcp_info` (linux/tcp.h), zero where the kernel is too old.
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

/// Up to `tcpi_data_segs_out`, which is the last that anybody here asks for.
const TCP_INFO_LEN: usize = 160;

/// getxattr(2): the value of `name` at `path`, following links.
///
/// # Errors
/// ERANGE when the value is longer than `size` bytes.
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

/// Has `prepare` run in the child of `command` between fork(2) and execve(2).
///
/// `prepare` may allocate and use any safe code: the wrapper has one thread, so no lock can be held
/// by another at the moment of the fork.
pub fn before_exec(command: &mut Command, prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: the process is single-threaded, so that what a child may do after fork isn't limited
    // to async-signal-safe functions; the closure touches no fd that it doesn't own.
    unsafe { command.pre_exec(prepare) };
}

/// signal(2): gives `signal` its default disposition.
pub fn signal_default(signal: Signal) -> io::Result<()> {
    // SAFETY: SIG_DFL runs no code of ours.
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }?;
    Ok(())
}

/// dup2(2): makes `target` a copy of `fd` that survives execve(2); whatever `target` was is closed.
/// For use in a child that is about to exec: there the number belongs to the program to come.
pub fn dup2_for_exec(fd: BorrowedFd, target: c_int) -> io::Result<()> {
    // SAFETY: the caller owns `target` as a number kept free for this; see the fn's comment.
    check(unsafe { libc::dup2(fd.as_raw_fd(), target) })?;
    Ok(())
}

/// fcntl(2), F_SETFD: sets FD_CLOEXEC on the raw `fd`. An fd that isn't open is no error.
pub fn set_close_on_exec(fd: c_int) {
    // SAFETY: F_SETFD changes a flag of a number; on one that isn't open it fails with EBADF.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
}

/// Takes charge of an fd that the kernel has just put into this process, by SCM_RIGHTS say, or that it was
/// started with for this purpose.
pub fn owned_fd(fd: c_int) -> OwnedFd {
    // SAFETY: the callers pass only numbers that were just installed for them, or that LISTEN_FDS says are
    // this process's; nothing else uses these.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// setenv(3), in a child that is about to exec. Not by way of std, which holds a lock of its own across the
/// fork.
///
/// # Errors
/// EINVAL when the name is empty or contains '='.
pub fn setenv(name: &OsStr, value: &OsStr) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    let value = CString::new(value.as_bytes())?;
    // SAFETY: both strings end with a zero byte and are copied; no other thread reads the environment.
    check(unsafe { libc::setenv(name.as_ptr(), value.as_ptr(), 1) })?;
    Ok(())
}

/// unsetenv(3), in a child that is about to exec.
///
/// # Errors
/// As of [`setenv`].
pub fn unsetenv(name: &OsStr) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    // SAFETY: as of setenv.
    check(unsafe { libc::unsetenv(name.as_ptr()) })?;
    Ok(())
}
