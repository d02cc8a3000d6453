//! Socket options: those that a worker sets before and after it binds, and what it hears about a socket of the pool.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;

use log::debug;
use nix::net::if_::if_nametoindex;
use nix::unistd::Pid;

use crate::intercept::caller::Caller;
use crate::intercept::complaints::{Complaint, Complaints};
use crate::intercept::filter::SocketOption;
use crate::kernel::procfs;
use crate::kernel::sys::{self, NotifResponse};
use crate::pool::{MinTtl, Pool};

/// At this many noted sockets they are forgotten: they were never bound, so they are outgoing connections.
const MAX_NOTED_SOCKETS: usize = 1024;

/// The size of an int, which the value of most options is.
const VALUE_SIZE: usize = size_of::<i32>();

/// What a worker has set on a socket that it hasn't bound yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// IPV6_V6ONLY; `None` if the worker hasn't set it.
    pub v6only: Option<bool>,
    /// SO_REUSEPORT.
    pub shares: bool,
    /// The index of the interface of SO_BINDTODEVICE; 0 for none.
    pub device: u32,
    pub min_ttl: MinTtl,
    /// Whether the socket may limit who may connect in a way that can't be read and set on another one.
    pub limits_peers: bool,
    /// Whether the socket has joined a multicast group.
    pub is_multicast: bool,
}

impl Options {
    fn has_limits(&self) -> bool {
        self.device != 0 || self.min_ttl != MinTtl::default() || self.limits_peers
    }
}

/// A value that a worker sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setting {
    V6Only(bool),
    ReusePort(bool),
    Device(u32),
    MinTtl { ipv6: bool, ttl: u8 },
    LimitsPeers,
    GroupProgram,
    Multicast,
}

impl Setting {
    /// Reads it from the caller's memory; `None` if the kernel refuses the value.
    fn read(caller: &Caller, option: SocketOption, value: u64, len: u64) -> Option<Self> {
        const MAX_NAME_LENGTH: u64 = libc::IFNAMSIZ as u64 - 1;
        let bytes = |len: u64| caller.memory(value, len).ok();
        let int = || Some(i32::from_ne_bytes(bytes(VALUE_SIZE as u64)?.try_into().ok()?));
        let int = || if len < VALUE_SIZE as u64 { None } else { int() };
        Some(match option {
            SocketOption::V6Only => Self::V6Only(int()? != 0),
            SocketOption::ReusePort => Self::ReusePort(int()? != 0),
            SocketOption::DeviceIndex => Self::Device(int()?.try_into().ok()?),
            SocketOption::DeviceName => {
                let name = bytes(len.min(MAX_NAME_LENGTH))?;
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                // The name is none of another network namespace: the wrapper binds nothing for a caller in one.
                Self::Device(if name.is_empty() { 0 } else { if_nametoindex(name).ok()? })
            }
            // One byte is enough (`do_ip_setsockopt`, net/ipv4/ip_sockglue.c).
            SocketOption::MinTtl if (1..VALUE_SIZE as u64).contains(&len) => {
                Self::MinTtl { ipv6: false, ttl: *bytes(1)?.first()? }
            }
            SocketOption::MinTtl => Self::MinTtl { ipv6: false, ttl: int()?.try_into().ok()? },
            SocketOption::MinHopCount => Self::MinTtl { ipv6: true, ttl: int()?.try_into().ok()? },
            SocketOption::Peers => Self::LimitsPeers,
            SocketOption::GroupProgram => Self::GroupProgram,
            SocketOption::Multicast => Self::Multicast,
        })
    }
}

/// The options that a worker has set, by its sockets' inode numbers.
#[derive(Debug, Default)]
pub struct NotedOptions {
    sockets: HashMap<u64, Options>,
    /// Whether sockets were forgotten that limit who may connect.
    forgot_limits: bool,
}

impl NotedOptions {
    pub fn of(&self, inode: u64) -> Options {
        let unknown = Options { limits_peers: self.forgot_limits, ..Options::default() };
        self.sockets.get(&inode).copied().unwrap_or(unknown)
    }

    /// Notes what a worker sets on a socket that isn't bound; the kernel then carries the call out. If the kernel
    /// refuses it, the note is wrong. That does no harm: it refuses these options only on a socket of another kind, or
    /// on a bound one, or to loosen a limit.
    fn note(&mut self, inode: u64, setting: Setting) {
        if self.sockets.len() >= MAX_NOTED_SOCKETS {
            self.sockets.retain(|_, options| options.has_limits());
        }
        if self.sockets.len() >= MAX_NOTED_SOCKETS {
            self.sockets.clear();
            self.forgot_limits = true;
        }
        let unknown = self.of(inode);
        let options = self.sockets.entry(inode).or_insert(unknown);
        match setting {
            Setting::V6Only(on) => options.v6only = Some(on),
            Setting::ReusePort(on) => options.shares = on,
            // Without CAP_NET_RAW the kernel refuses to change it.
            Setting::Device(device) if ![0, device].contains(&options.device) => options.limits_peers = true,
            Setting::Device(device) => options.device = device,
            Setting::MinTtl { ipv6: true, ttl } => options.min_ttl.v6 = ttl,
            Setting::MinTtl { ipv6: false, ttl } => options.min_ttl.v4 = ttl,
            Setting::LimitsPeers => options.limits_peers = true,
            Setting::Multicast => options.is_multicast = true,
            Setting::GroupProgram => {} // of a group that the socket leaves when it is bound
        }
    }

    /// The socket was replaced by one of the pool.
    pub fn forget(&mut self, inode: u64) {
        self.sockets.remove(&inode);
    }
}

/// Answers setsockopt, of which `value` and `len` are the last arguments. What is set on a socket of the pool, the next
/// borrower must not have.
pub fn set(
    caller: &Caller,
    fd: u32,
    option: SocketOption,
    (value, len): (u64, u64),
    noted: &mut NotedOptions,
    complaints: &mut Complaints,
    pool: &mut Pool,
) -> NotifResponse {
    let Some(inode) = caller.socket_inode(fd) else { return NotifResponse::Continue };
    let Some(setting) = Setting::read(caller, option, value, len) else { return NotifResponse::Continue };
    let Some(socket) = pool.lent(caller.borrower.worker, inode) else {
        noted.note(inode, setting);
        return NotifResponse::Continue;
    };
    match setting {
        // The kernel would let the group send it connections from other interfaces.
        Setting::Device(device) if sys::bound_device(socket).ok() != Some(device) => {
            complaints.make(caller.borrower.slot, Complaint::LateDevice);
            return NotifResponse::Errno(libc::EPERM);
        }
        Setting::MinTtl { ipv6, ttl } if caller.still_waits() && pool.set_min_ttl(inode, ipv6, ttl) => {
            return NotifResponse::Success;
        }
        Setting::LimitsPeers | Setting::Multicast => pool.never_lend_again(inode),
        // The group belongs to all workers, and has the wrapper's program.
        Setting::GroupProgram => {
            debug!(
                "worker {} chooses among its listeners by a program, which is left out",
                caller.borrower.slot
            );
            return NotifResponse::Success;
        }
        _ => {}
    }
    NotifResponse::Continue
}

/// Does what getsockopt of SO_ACCEPTCONN would do, and says "no". A socket of the pool may listen already when a worker binds
/// it, and a program that asks (gunicorn, HAProxy) would then leave its `listen` out.
///
/// # Errors
/// When the kernel has to answer: for anything unusual, or if the thread is another one by now. What is written to was opened
/// before that is asked.
pub fn deny_listening(tid: Pid, still_waits: impl Fn() -> bool, value: u64, len: u64) -> io::Result<()> {
    let memory = procfs::open_memory(tid)?;
    let mut size = [0; VALUE_SIZE];
    memory.read_exact_at(&mut size, len)?;
    if size != (VALUE_SIZE as i32).to_ne_bytes() || !still_waits() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    memory.write_all_at(&0i32.to_ne_bytes(), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_noted_by_socket_until_it_is_forgotten() {
        let mut noted = NotedOptions::default();
        noted.note(1, Setting::V6Only(false));
        noted.note(1, Setting::ReusePort(true));
        noted.note(1, Setting::Device(3));
        noted.note(1, Setting::MinTtl { ipv6: true, ttl: 9 });
        noted.note(2, Setting::ReusePort(true));
        noted.note(2, Setting::ReusePort(false));
        let min_ttl = MinTtl { v4: 0, v6: 9 };
        let expected =
            Options { v6only: Some(false), shares: true, device: 3, min_ttl, ..Options::default() };
        assert_eq!(noted.of(1), expected);
        assert_eq!(noted.of(2), Options::default());
        noted.forget(1);
        assert_eq!(noted.of(1), Options::default());
    }

    #[test]
    fn a_device_that_the_kernel_may_not_have_taken_back_is_a_limit() {
        for device in [0, 2] {
            let mut noted = NotedOptions::default();
            noted.note(1, Setting::Device(1));
            assert!(!noted.of(1).limits_peers);
            noted.note(1, Setting::Device(device));
            assert!(noted.of(1).limits_peers);
        }
    }

    #[test]
    fn sockets_that_are_never_bound_do_not_pile_up() {
        let mut noted = NotedOptions::default();
        noted.note(u64::MAX, Setting::Device(1));
        for inode in 0..10 * MAX_NOTED_SOCKETS as u64 {
            noted.note(inode, Setting::ReusePort(true));
            assert!(noted.of(inode).shares && noted.sockets.len() <= MAX_NOTED_SOCKETS);
        }
        assert_eq!(noted.of(u64::MAX).device, 1, "a limit is kept longer");
        for inode in 0..10 * MAX_NOTED_SOCKETS as u64 {
            noted.note(inode, Setting::Multicast);
        }
        assert!(!noted.of(u64::MAX - 1).limits_peers);
        for inode in 0..10 * MAX_NOTED_SOCKETS as u64 {
            noted.note(inode, Setting::LimitsPeers);
            assert!(noted.sockets.len() <= MAX_NOTED_SOCKETS);
        }
        assert!(noted.of(u64::MAX).limits_peers, "it may be one of those that were forgotten");
    }
}
