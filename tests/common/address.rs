//! Networks and ports that nobody else uses.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::netns;

/// A network namespace of its own for this test's thread and everything that it starts from now on,
/// so that no port can be taken and fixed ports disturb nobody.
#[track_caller]
pub fn own_network() {
    netns::enter().expect("a network namespace of its own: the tests need root (CAP_SYS_ADMIN)");
}

/// The network of a process for this test's thread and everything that it starts from now on.
#[track_caller]
pub fn join_network(pid: u32) {
    netns::join(pid).expect("the network namespace of another process");
}

/// A port that nothing on IPv4 or IPv6 has. It is not an ephemeral one, so no client gets it either.
pub fn free_port() -> u16 {
    // Where namespaces can be had nobody else is near; without them the search below must do.
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
