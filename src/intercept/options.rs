//! Socket options: those that a worker sets before it binds, and what it hears about a socket of the pool.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;

use log::debug;

use crate::intercept::caller::Caller;
use crate::intercept::filter::SocketOption;
use crate::kernel::procfs;
use crate::kernel::sys::{self, NotifResponse};

/// At this many noted sockets all are forgotten: they were never bound, so they are outgoing connections.
const MAX_NOTED_SOCKETS: usize = 1024;

/// The size of the options' values, all of which are an int.
const VALUE_SIZE: usize = size_of::<i32>();

/// What a worker has set on a socket that it hasn't bound yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// IPV6_V6ONLY; `None` if the worker hasn't set it.
    pub v6only: Option<bool>,
    /// SO_REUSEPORT.
    pub shares: bool,
}

/// The options that a worker has set, by its sockets' inode numbers.
#[derive(Debug, Default)]
pub struct NotedOptions(HashMap<u64, Options>);

impl NotedOptions {
    pub fn of(&self, inode: u64) -> Options {
        self.0.get(&inode).copied().unwrap_or_default()
    }

    /// Notes an option that the caller sets; the kernel then carries the call out. If the kernel refuses it,
    /// the note is wrong. That does no harm: it refuses these options only on a socket of another kind, or on
    /// a bound one.
    pub fn read(&mut self, caller: &Caller, fd: u32, option: SocketOption, value: u64, len: u64) {
        if len < VALUE_SIZE as u64 {
            return;
        }
        let Some(inode) = caller.socket_inode(fd) else { return };
        let Ok(bytes) = procfs::memory(caller.tid, value, VALUE_SIZE) else { return };
        let Ok(bytes) = bytes.try_into() else { return };
        self.note(inode, option, i32::from_ne_bytes(bytes) != 0);
    }

    fn note(&mut self, inode: u64, option: SocketOption, on: bool) {
        if self.0.len() >= MAX_NOTED_SOCKETS {
            self.0.clear();
        }
        let options = self.0.entry(inode).or_default();
        match option {
            SocketOption::V6Only => options.v6only = Some(on),
            SocketOption::ReusePort => options.shares = on,
        }
    }

    /// The socket was replaced by one of the pool.
    pub fn forget(&mut self, inode: u64) {
        self.0.remove(&inode);
    }
}

/// Answers getsockopt of SO_ACCEPTCONN with "no". A socket of the pool may listen already when a worker binds
/// it, and a program that asks (gunicorn, HAProxy) would then leave its `listen` out.
pub fn answer_not_listening(caller: &Caller, value: u64, len: u64) -> NotifResponse {
    // Anything unusual is left to the kernel.
    let Ok(size) = procfs::memory(caller.tid, len, VALUE_SIZE) else { return NotifResponse::Continue };
    if size != (VALUE_SIZE as i32).to_ne_bytes() || !caller.still_waits() {
        return NotifResponse::Continue;
    }
    match procfs::set_memory(caller.tid, value, &0i32.to_ne_bytes()) {
        Ok(()) => NotifResponse::Success,
        Err(_) => NotifResponse::Continue,
    }
}

/// Options that a connection inherits from its listener and that programs set before they bind: level and
/// name.
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

/// Gives a socket of the pool the options of the worker's own socket. This also resets what an earlier
/// borrower set.
pub fn carry_over(own: BorrowedFd, ours: BorrowedFd) {
    for (level, name) in CARRIED_OVER {
        let (Ok(wanted), Ok(had)) =
            (sys::socket_option(own, level, name), sys::socket_option(ours, level, name))
        else {
            continue;
        };
        // The kernel doubles the size that was asked for (socket(7)).
        let is_buffer = level == libc::SOL_SOCKET && [libc::SO_RCVBUF, libc::SO_SNDBUF].contains(&name);
        let value = if is_buffer { wanted / 2 } else { wanted };
        if wanted != had
            && let Err(error) = sys::set_socket_option(ours, level, name, value)
        {
            debug!("can't carry socket option {level}/{name} over: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use socket2::{Domain, Socket, Type};

    use super::*;

    #[test]
    fn options_are_noted_by_socket_until_it_is_forgotten() {
        let mut noted = NotedOptions::default();
        noted.note(1, SocketOption::V6Only, false);
        noted.note(1, SocketOption::ReusePort, true);
        noted.note(2, SocketOption::ReusePort, true);
        noted.note(2, SocketOption::ReusePort, false);
        assert_eq!(noted.of(1), Options { v6only: Some(false), shares: true });
        assert_eq!(noted.of(2), Options::default());
        noted.forget(1);
        assert_eq!(noted.of(1), Options::default());
    }

    #[test]
    fn sockets_that_are_never_bound_do_not_pile_up() {
        let mut noted = NotedOptions::default();
        for inode in 0..10 * MAX_NOTED_SOCKETS as u64 {
            noted.note(inode, SocketOption::ReusePort, true);
            assert!(noted.of(inode).shares && noted.0.len() <= MAX_NOTED_SOCKETS);
        }
    }

    #[test]
    fn a_socket_of_the_pool_gets_the_options_of_the_workers_own_and_loses_its_earlier_ones() {
        let [own, ours] = [(); 2].map(|()| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
        own.set_tcp_nodelay(true).unwrap();
        own.set_recv_buffer_size(20_000).unwrap();
        ours.set_keepalive(true).unwrap();
        carry_over(own.as_fd(), ours.as_fd());
        assert!(ours.tcp_nodelay().unwrap() && !ours.keepalive().unwrap());
        assert_eq!(ours.recv_buffer_size().unwrap(), own.recv_buffer_size().unwrap());
    }
}
