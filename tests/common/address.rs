//! Networks and ports that nobody else uses.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::netns;

/// Moves this thread, and all that it starts from now on, into a new network namespace: every port is free
/// there.
#[track_caller]
pub fn own_network() {
    netns::enter().expect("no network namespace: the tests need root (CAP_SYS_ADMIN)");
}

/// Moves this thread, and all that it starts from now on, into the network namespace of a process.
#[track_caller]
pub fn join_network(pid: u32) {
    netns::join(pid).expect("the network namespace of another process");
}

/// A port that is free on IPv4 and IPv6. It is no ephemeral port, so that no client gets it either.
pub fn free_port() -> u16 {
    // In a namespace of its own every port is free. Without one, the search below has to do.
    let _ = netns::enter();
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let start = std::process::id() as usize * 97;
    for _ in 0..20_000 {
        let port = 10_000 + ((start + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000) as u16;
        let free_on_ipv6 = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
            Ok(_) => true,
            Err(error) => error.kind() != std::io::ErrorKind::AddrInUse,
        };
        if free_on_ipv6 && TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}

/// A free port on the loopback address.
pub fn free_address() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()))
}
