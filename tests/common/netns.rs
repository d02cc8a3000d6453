//! Network namespaces.
#![allow(dead_code, unsafe_code)]

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sched::{CloneFlags, setns, unshare};

/// Moves this thread, and all that it starts from now on, into a new network namespace whose loopback is up. A
/// second call in the same thread does nothing. Needs root (CAP_SYS_ADMIN).
pub fn enter() -> io::Result<()> {
    thread_local! {
        static ENTERED: Cell<bool> = const { Cell::new(false) };
    }
    if ENTERED.get() {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNET)?;
    bring_loopback_up()?;
    ENTERED.set(true);
    Ok(())
}

/// Moves this thread, and all that it starts from now on, into the network namespace of a process.
pub fn join(pid: u32) -> io::Result<()> {
    Ok(setns(File::open(format!("/proc/{pid}/ns/net"))?, CloneFlags::CLONE_NEWNET)?)
}

/// See netdevice(7).
fn bring_loopback_up() -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: ifreq is plain data, for which all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request reads one ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
