//! `bind` to a TCP or UDP port: the worker gets a socket of the pool in the place of its own.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;

use log::debug;

use crate::address::{Address, Endpoint, Transport};
use crate::intercept::caller::{Caller, OwnSocket};
use crate::intercept::carry::{Errands, OwnDuplicate};
use crate::intercept::complaints::Complaint;
use crate::intercept::inherit;
use crate::intercept::options::Options;
use crate::intercept::{Known, ListenChange};
use crate::kernel::duplicate::Duplicate;
use crate::kernel::procfs;
use crate::kernel::search::Place;
use crate::kernel::sys::{self, NotifResponse};
use crate::pool::{BindRequest, MinTtl, Pool};

/// Binds the caller's socket to the address in `sockaddr`, a `struct sockaddr`. What isn't a port that the caller may bind
/// is left to the kernel, and so is a UDP port that isn't in the pool already, unless `shares_udp`.
pub fn bind(
    caller: &Caller,
    own: OwnSocket,
    sockaddr: &[u8],
    known: &mut Known,
    pool: &mut Pool,
    shares_udp: bool,
) -> NotifResponse {
    let Caller { tid, borrower, .. } = *caller;
    let Known { options: noted, bound, complaints, errands, .. } = known;
    let is_shared = |address| shares_udp || pool.shares(borrower.worker, address);
    let bind = match understand(caller, own, sockaddr, noted.of(own.inode), errands, is_shared) {
        Ok(bind) => bind,
        Err(NotOurs::Unknown) => return NotifResponse::Success, // which the caller never sees
        Err(NotOurs::TheKernels { udp, is_limited }) => {
            if is_limited {
                complaints.make(borrower.slot, Complaint::LimitedSocket);
            }
            known.change = udp.filter(|_| caller.still_waits()).map(|address| binds_udp(own, address));
            return NotifResponse::Continue;
        }
    };
    if !caller.still_waits() {
        return NotifResponse::Continue;
    }
    let address = bind.request.address;
    if bound.is_repetition(own.inode, &address.into()) {
        return NotifResponse::Success;
    }
    if pool.lent(borrower.worker, own.inode).is_some() || bind.duplicate.as_ref().is_some_and(has_port) {
        return NotifResponse::Continue; // bound already: the kernel refuses it
    }
    let inode = match pool.lend(borrower, bind.request) {
        Ok(inode) => inode,
        Err(error) => {
            debug!("worker {} can't bind {address}: {error}", borrower.slot);
            complaints.make_if_too_many(borrower.slot, &error);
            if error.kind() == io::ErrorKind::PermissionDenied && caller.lost_capability() {
                complaints.make(borrower.slot, Complaint::LostCapability);
            }
            // An error without a number means that the pool can't do it. The kernel perhaps can. It also takes an
            // address that the machine doesn't have from a socket with IP_FREEBIND or IP_TRANSPARENT.
            let may_be_bound = |errno: &i32| match *errno {
                libc::EADDRINUSE => bind.may_be_in_use,
                errno => errno == libc::EADDRNOTAVAIL,
            };
            known.change = address.is_udp().then(|| binds_udp(own, address));
            let errno = error.raw_os_error().filter(|errno| !may_be_bound(errno));
            return errno.map_or(NotifResponse::Continue, NotifResponse::Errno);
        }
    };
    let Some(socket) = pool.lent(borrower.worker, inode) else { return NotifResponse::Continue };
    if let Some(duplicate) = &bind.duplicate
        && let Err(error) = inherit::carry_over(duplicate.as_fd(), socket, pool.is_new(inode))
    {
        debug!("worker {} can't have a socket of the pool: {error}", borrower.slot);
        complaints.make(borrower.slot, Complaint::LimitedSocket);
        pool.take_back(borrower.worker, inode);
        known.change = address.is_udp().then(|| binds_udp(own, address));
        return NotifResponse::Continue;
    }
    match errands.replace(caller, own, socket, bind.close_on_exec) {
        Ok(()) => {
            bound.insert(inode, address.into(), |other, endpoint| {
                matches!(endpoint, Endpoint::Unix(_)) || pool.lent(borrower.worker, other).is_some()
            });
            debug!("worker {} (pid {tid}) binds {address}", borrower.slot);
            noted.forget(own.inode);
            if address.is_udp() {
                known.change =
                    pool.receive(borrower.worker, inode).ok().map(|at| ListenChange::Listens(at.into()));
            }
            NotifResponse::Success
        }
        Err(error) => {
            pool.take_back_open(borrower.worker, inode); // it may have it under some numbers
            complaints.answer_not_replaced(caller, error)
        }
    }
}

/// A bind that the pool can carry out.
struct Bind {
    /// A duplicate of the caller's socket. `None` where nobody may have one: the socket is then taken for one that has no
    /// other options than those that were noted.
    duplicate: Option<Duplicate>,
    close_on_exec: bool,
    /// Whether the kernel lets it bind a UDP port that is in use, because all have SO_REUSEADDR. With SO_REUSEPORT it would
    /// be in the group of the pool's sockets.
    may_be_in_use: bool,
    request: BindRequest,
}

fn binds_udp(own: OwnSocket, address: Address) -> ListenChange {
    ListenChange::BindsUdp { inode: own.inode, address }
}

/// Why the pool doesn't carry out a bind.
enum NotOurs {
    /// It is no port that is shared, or that the caller may bind, or the caller can't be read.
    TheKernels {
        /// The UDP port, in the wrapper's network.
        udp: Option<Address>,
        /// Whether its socket limits who may connect in a way that no other socket can be given.
        is_limited: bool,
    },
    /// Not yet: the caller sends its socket first, and asks again.
    Unknown,
}

/// Reads what the caller asks for.
fn understand(
    caller: &Caller,
    own: OwnSocket,
    sockaddr: &[u8],
    noted: Options,
    errands: &mut Errands,
    is_shared: impl Fn(Address) -> bool,
) -> Result<Bind, NotOurs> {
    let others = || NotOurs::TheKernels { udp: None, is_limited: false };
    let protocol = caller.protocol(own.fd).map_err(|_| others())?;
    let v6only = noted.v6only.unwrap_or_else(|| protocol.ends_with("v6") && procfs::v6only_by_default());
    let address = Address::from_sockaddr(sockaddr, v6only, 0).ok_or_else(others)?;
    let transport = transport_of(&protocol, &address).ok_or_else(others)?;
    let (address, port) = (address.over(transport), address.socket.port());
    if port == 0 || address.is_udp() && goes_to_all(address.socket.ip()) {
        return Err(others());
    }
    let is_watched = address.is_udp() && procfs::same_namespace(caller.tid, "net");
    let udp = Some(address).filter(|_| is_watched);
    let not_ours = || NotOurs::TheKernels { udp, is_limited: false };
    let on_device = |device| Address::new(address.socket, address.v6only, device).over(transport);
    let is_private = |device| address.is_udp() && (noted.is_multicast || !is_shared(on_device(device)));
    if is_private(noted.device) || !caller.may_bind(port) {
        return Err(not_ours());
    }
    let flags = procfs::fd_flags(caller.tid, own.fd).map_err(|_| not_ours())?;
    let duplicate = match errands.duplicate(caller, own) {
        OwnDuplicate::Here(duplicate) => Some(duplicate),
        OwnDuplicate::Comes => return Err(NotOurs::Unknown),
        OwnDuplicate::Refused if address.is_udp() => return Err(not_ours()), // it would lose its options
        OwnDuplicate::Refused => None,
    };
    let has = |option| duplicate.as_ref().is_some_and(|it| has_option(it, option));
    let limits = duplicate.as_ref().map_or(Ok((noted.device, noted.min_ttl)), |duplicate| {
        let socket = duplicate.as_fd();
        Ok((sys::bound_device(socket)?, MinTtl::of(socket, address.socket.is_ipv6())?))
    });
    let (device, min_ttl) = limits.map_err(|_: io::Error| not_ours())?;
    let has_filter = |duplicate: &Duplicate| sys::has_filter(duplicate.as_fd()).unwrap_or(true);
    if noted.limits_peers || duplicate.as_ref().is_some_and(has_filter) {
        return Err(NotOurs::TheKernels { udp, is_limited: true });
    }
    if is_private(device) {
        return Err(not_ours()); // the kernel has bound it to a device by itself
    }
    let owner = caller.owner().ok_or_else(not_ours)?;
    let reuses_address = address.is_udp() && has(libc::SO_REUSEADDR);
    let nonblocking = flags & libc::O_NONBLOCK != 0;
    let place = Place { pid: procfs::process_of(caller.tid).unwrap_or(caller.tid), fd: own.fd };
    let (address, shares) = (on_device(device), noted.shares || reuses_address);
    let request = BindRequest { address, nonblocking, shares, min_ttl, owner, place };
    let may_be_in_use = reuses_address && !has(libc::SO_REUSEPORT);
    Ok(Bind { duplicate, close_on_exec: flags & libc::O_CLOEXEC != 0, may_be_in_use, request })
}

/// What a socket with this protocol name is shared as, if it is of the address's family.
fn transport_of(protocol: &str, address: &Address) -> Option<Transport> {
    let (name, is_ipv6) = protocol.strip_suffix("v6").map_or((protocol, false), |name| (name, true));
    let transport = match name {
        "TCP" | "MPTCP" => Transport::Tcp,
        "UDP" => Transport::Udp,
        _ => return None,
    };
    (is_ipv6 == address.socket.is_ipv6()).then_some(transport)
}

/// Whether the kernel gives a packet to such an address to every socket there.
fn goes_to_all(ip: IpAddr) -> bool {
    ip.is_multicast() || ip == Ipv4Addr::BROADCAST
}

fn has_option(socket: &impl AsFd, option: i32) -> bool {
    sys::socket_option(socket.as_fd(), libc::SOL_SOCKET, option).is_ok_and(|value| value != 0)
}

/// Whether a socket has a port already, because it is connected or was bound without the wrapper.
fn has_port(socket: &impl AsFd) -> bool {
    let address = socket2::SockRef::from(socket).local_addr();
    address.is_ok_and(|address| address.as_socket().is_some_and(|address| address.port() != 0))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use socket2::{Domain, Socket, Type};

    use super::*;

    #[test]
    fn only_a_socket_of_tcp_or_udp_and_of_the_family_of_its_address_is_bound_by_the_pool() {
        let v4 = Address::new("127.0.0.1:3000".parse().unwrap(), false, 0);
        let v6 = Address::new("[::1]:3000".parse().unwrap(), false, 0);
        let of = |protocol| (transport_of(protocol, &v4), transport_of(protocol, &v6));
        let (tcp, udp) = (Some(Transport::Tcp), Some(Transport::Udp));
        assert_eq!([of("TCP"), of("MPTCP"), of("UDP")], [(tcp, None), (tcp, None), (udp, None)]);
        assert_eq!([of("TCPv6"), of("MPTCPv6"), of("UDPv6")], [(None, tcp), (None, tcp), (None, udp)]);
        assert_eq!([of("UDP-Lite"), of("SCTP"), of("UNIX-STREAM")], [(None, None); 3]);
    }

    #[test]
    fn a_socket_has_a_port_once_it_is_bound() {
        assert!(!has_port(&Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()));
        assert!(has_port(&TcpListener::bind("127.0.0.1:0").unwrap()));
    }
}
