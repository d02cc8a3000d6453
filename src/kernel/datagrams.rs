//! Datagrams that wait in a socket.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

use crate::kernel::{bpf, ready, sys};

/// How many are discarded at once. More may come as fast as they are read.
const AT_ONCE: usize = 4096;

/// Whether a datagram waits to be read. (The kernel's count of bytes includes some that were read: `udp_rmem_release`,
/// net/ipv4/udp.c.) Not in a socket that is shut down: that is always readable.
pub fn wait(socket: BorrowedFd) -> bool {
    ready::now(socket, PollFlags::POLLIN).contains(PollFlags::POLLIN) && !is_shut_down(socket)
}

/// Whether reading from the socket was shut down. It has its port all the same.
pub fn is_shut_down(socket: BorrowedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::from_bits_retain(libc::POLLRDHUP))];
    let is_seen = |seen: PollFlags| seen.bits() & libc::POLLRDHUP != 0;
    poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].revents().is_none_or(is_seen) // nix has no name for it
}

/// Reads what waits, and the errors that wait.
///
/// # Errors
/// WouldBlock if there may be more.
pub fn discard(socket: &Socket) -> io::Result<()> {
    let _ = socket.take_error(); // such as that a datagram found no receiver
    let read = |flags| socket.recv_with_flags(&mut [MaybeUninit::uninit()], flags | libc::MSG_DONTWAIT);
    let has_error = |_| read(libc::MSG_ERRQUEUE).is_ok();
    let had_datagram = |_| wait(socket.as_fd()) && !matches!(read(0), Err(error) if is_empty(&error));
    match (0..AT_ONCE).all(has_error) || (0..AT_ONCE).all(had_datagram) {
        true => Err(io::ErrorKind::WouldBlock.into()),
        false => Ok(()),
    }
}

/// Any other error is that of an earlier datagram.
fn is_empty(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// Whether connect(2) takes a socket that is bound to this address from its reuseport group: one of a particular address since
/// Linux 6.13 (`udp_lib_hash4`, net/ipv4/udp.c), any other one always (`udp_lib_rehash`).
pub fn leaves_by_connecting(address: SocketAddr) -> bool {
    static OF_PARTICULAR: OnceLock<bool> = OnceLock::new();
    address.ip().is_unspecified() || *OF_PARTICULAR.get_or_init(|| tries_to_leave().unwrap_or(false))
}

/// Only a socket in a group takes a program for it.
fn tries_to_leave() -> io::Result<bool> {
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let new = || Socket::new(Domain::IPV4, Type::DGRAM, None);
    let (socket, peer) = (new()?, new()?);
    socket.set_reuse_port(true)?;
    socket.bind(&any_port.into())?;
    peer.bind(&any_port.into())?;
    socket.connect(&peer.local_addr()?)?;
    Ok(sys::attach_reuseport_cbpf(socket.as_fd(), &[bpf::ret(0)]).is_err())
}

#[cfg(test)]
mod tests {
    use std::net::{Shutdown, UdpSocket};

    use super::*;

    #[test]
    fn datagrams_wait_until_they_are_read_or_discarded() {
        let [ours, other] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let send = |text: &[u8]| other.send_to(text, ours.local_addr().unwrap()).unwrap();
        assert!(!wait(ours.as_fd()));
        send(b"one");
        assert!(wait(ours.as_fd()));
        ours.recv(&mut [0; 8]).unwrap();
        assert!(!wait(ours.as_fd()));
        let _ = [&b"two"[..], b"", b"three"].map(send);
        let socket = Socket::from(ours);
        discard(&socket).unwrap();
        assert!(!wait(socket.as_fd()));
        discard(&socket).unwrap();
    }

    #[test]
    fn in_a_socket_that_is_shut_down_nothing_waits() {
        for how in [Shutdown::Read, Shutdown::Both] {
            let socket = Socket::from(UdpSocket::bind("127.0.0.1:0").unwrap());
            assert!(!is_shut_down(socket.as_fd()));
            let _ = socket.shutdown(how); // ENOTCONN, and it is shut down all the same
            assert!(!wait(socket.as_fd()) && is_shut_down(socket.as_fd()), "{how:?}");
            discard(&socket).unwrap();
        }
    }

    #[test]
    fn an_error_that_waits_is_discarded() {
        let ours = UdpSocket::bind("127.0.0.1:0").unwrap();
        let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        ours.connect(nobody).unwrap();
        ours.send(b"refused").unwrap();
        let has_error =
            |ours: &Socket| ready::now(ours.as_fd(), PollFlags::empty()).contains(PollFlags::POLLERR);
        let socket = Socket::from(ours);
        assert!(has_error(&socket));
        discard(&socket).unwrap();
        assert!(!has_error(&socket));
    }
}
