//! Connections of our own to one worker, by the address to which clients connect.
//!
//! The steering program sends them to that worker's member by their source address, and everything else as before. Nobody
//! else is disturbed. A member that drops clients' SYNs takes ours, since these have the greatest time to live
//! ([`super::Member::hold`]).

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use nix::poll::PollFlags;
use socket2::{Domain, Protocol, Socket, Type};

use super::Pool;
use crate::address::Address;
use crate::ids::{MemberId, WorkerId};
use crate::kernel::{ready, sys};

/// A connection that is being opened. Give it back to [`Pool::has_reached`] when it is open, or when its socket is closed.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    address: Address,
    source: SocketAddr,
}

/// How long a connection of our own takes at most to come into the queue of a listener that nobody accepts from. It takes
/// some microseconds, on a busy machine some milliseconds.
const ARRIVES_WITHIN: Duration = Duration::from_millis(10);

impl Pool {
    /// Begins to open a connection to the listener that a worker borrows at an address. Without waiting: the socket becomes
    /// writable.
    ///
    /// # Errors
    /// NotFound if it borrows none there, WouldBlock if too many connections are being opened, and what the kernel says.
    pub fn reach(&mut self, worker: WorkerId, address: Address) -> io::Result<(Socket, Reach)> {
        self.handle_events();
        let mut lent =
            self.members.lent_to(worker).filter(|(_, member)| member.is_listener_on(worker, address));
        let member = lent.next().map(|(id, _)| id).ok_or(io::ErrorKind::NotFound)?;
        drop(lent);
        let (socket, source) = client(address)?;
        let group = self.groups.get_mut(&address).ok_or(io::ErrorKind::NotFound)?;
        group.aim(source, member)?;
        let reach = Reach { address, source };
        let begun = self.steer_address(address).and_then(|()| connect(&socket, address, source.ip()));
        if let Err(error) = begun {
            self.has_reached(reach);
            return Err(error);
        }
        Ok((socket, reach))
    }

    /// From now on no connection is taken for this one.
    pub fn has_reached(&mut self, reach: Reach) {
        let Reach { address, source } = reach;
        let Some(group) = self.groups.get_mut(&address) else { return };
        group.forget_aim(source);
        if let Err(error) = self.steer_address(address) {
            warn!("can't steer {address}: {error}");
        }
    }

    /// A free member whose place in the kernel's array of its group is known: this one if it is, and else whichever a
    /// connection of our own finds at an index where this one may stand. `None` if there is nothing to find out: a datagram of
    /// ours couldn't be told from a client's, and a connection to a member that is lent or left open may be accepted by somebody
    /// else.
    ///
    /// # Errors
    /// Why no connection of our own has come to a member, or none that is certain.
    pub(super) fn locate(&mut self, address: Address, member: MemberId) -> io::Result<Option<MemberId>> {
        self.handle_events();
        let Some(group) = self.groups.get(&address) else { return Ok(None) };
        if group.knows_place(member) {
            return Ok(Some(member));
        }
        let is_ours =
            |id: &MemberId| self.members.get(*id).is_some_and(|it| it.is_free() && it.left_by.is_empty());
        let is_such = |(_, candidates): &(u32, &BTreeSet<MemberId>)| candidates.iter().all(is_ours);
        let place = group.places(member).find(is_such).filter(|_| !address.is_udp());
        let Some((index, candidates)) = place.map(|(index, candidates)| (index, candidates.clone())) else {
            return Ok(None);
        };
        let (socket, source) = client(address)?;
        self.groups.entry(address).and_modify(|group| group.aim_at_index(source, index));
        let begun = self.steer_address(address).and_then(|()| connect(&socket, address, source.ip()));
        let found = begun.and_then(|()| self.find_queued(source, &candidates));
        drop(socket);
        self.handle_events();
        // If some have left meanwhile, another one may have stood there before.
        let is_as_before = |place: (u32, &BTreeSet<MemberId>)| place == (index, &candidates);
        let found = match (found, self.groups.get_mut(&address)) {
            (Ok(found), Some(group)) if group.places(found).any(is_as_before) => {
                debug!("{address}: index {index} is that of listener {}", found.0);
                group.found(index, found);
                Ok(Some(found))
            }
            (found, _) => found.and(Err(io::ErrorKind::Interrupted.into())),
        };
        self.has_reached(Reach { address, source });
        found
    }

    /// The member at which the connection from `source` waits.
    fn find_queued(&self, source: SocketAddr, candidates: &BTreeSet<MemberId>) -> io::Result<MemberId> {
        let members = || candidates.iter().filter_map(|id| Some((*id, self.members.get(*id)?)));
        let end = Instant::now() + ARRIVES_WITHIN;
        loop {
            let queues: Vec<BorrowedFd> = members().map(|(_, member)| member.socket.as_fd()).collect();
            let waits = ready::wait(&queues, PollFlags::POLLIN, end);
            let found = members().find(|(_, member)| member.reset_queue_with(source));
            match found {
                Some((id, _)) => return Ok(id),
                None if Instant::now() >= end => return Err(io::ErrorKind::TimedOut.into()),
                None => drop(waits?),
            }
        }
    }
}

/// A socket to connect to an address from, and its own address.
fn client(address: Address) -> io::Result<(Socket, SocketAddr)> {
    const MAX_TTL: u32 = 255;
    let ip = own_ip(address);
    let domain = if ip.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    match ip {
        IpAddr::V4(_) => socket.set_ttl_v4(MAX_TTL)?,
        IpAddr::V6(_) => socket.set_unicast_hops_v6(MAX_TTL)?,
    }
    if address.device != 0 {
        let device = address.device as i32;
        sys::set_socket_option(socket.as_fd(), libc::SOL_SOCKET, sys::SO_BINDTOIFINDEX, device)?;
    }
    socket.bind(&with_port(address, ip, 0).into())?;
    let source = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok((socket, source))
}

/// Begins to connect to an address by this IP address.
fn connect(socket: &Socket, address: Address, ip: IpAddr) -> io::Result<()> {
    let target = with_port(address, ip, address.socket.port());
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        result => result,
    }
}

/// An address of this machine by which a listener can be reached from itself. One that is bound to an interface takes only
/// connections to an address of that interface, from a socket that is bound to it (`rt_iif` in `__mkroute_output`,
/// net/ipv4/route.c).
fn own_ip(listener: Address) -> IpAddr {
    let own = listener.socket.ip().to_canonical();
    if own.is_unspecified()
        && let Some(ip) = ip_of_interface(listener.device, !listener.socket.is_ipv6(), listener.v6only)
    {
        return ip;
    }
    match own {
        IpAddr::V6(ip) if ip.is_unspecified() && listener.v6only => Ipv6Addr::LOCALHOST.into(),
        ip if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        ip => ip,
    }
}

/// An address of this interface, if there is one, and of IPv4 rather than IPv6 if both will do.
fn ip_of_interface(index: u32, only_ipv4: bool, only_ipv6: bool) -> Option<IpAddr> {
    if index == 0 {
        return None;
    }
    let is_of_it = |name: &str| if_nametoindex(name).is_ok_and(|its| its == index);
    let addresses = getifaddrs().ok()?.filter(|it| is_of_it(&it.interface_name));
    let ips = addresses.filter_map(|it| {
        let address = it.address?;
        let ipv4 = address.as_sockaddr_in().map(|it| it.ip().into());
        ipv4.or_else(|| address.as_sockaddr_in6().map(|it| it.ip().into()))
    });
    let fits = |ip: &IpAddr| if ip.is_ipv4() { !only_ipv6 } else { !only_ipv4 };
    ips.filter(fits).min_by_key(IpAddr::is_ipv6)
}

/// With the listener's scope, which a link-local address needs.
fn with_port(listener: Address, ip: IpAddr, port: u16) -> SocketAddr {
    let mut socket = SocketAddr::new(ip, port);
    if let (SocketAddr::V6(socket), SocketAddr::V6(listener)) = (&mut socket, listener.socket) {
        socket.set_scope_id(listener.scope_id());
    }
    socket
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::pool::Owner;
    use crate::steering::load::Balancing;

    #[test]
    fn where_free_members_stand_is_found_out_for_each_family() {
        for listener in ["127.0.0.1", "0.0.0.0", "[::]", "[::1]"] {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let address = Address::new(format!("{listener}:{port}").parse().unwrap(), false, 0);
            let mut pool = Pool::new(Balancing::Load).unwrap();
            let ids: Vec<MemberId> = (0..5)
                .map(|_| {
                    let id = pool.add(address, Owner::this_process()).unwrap();
                    pool.begin_to_listen(id, 1).unwrap();
                    id
                })
                .collect();
            for id in &ids[..2] {
                pool.members[*id].socket.shutdown(std::net::Shutdown::Both).unwrap();
            }
            assert_eq!(pool.locate(address, ids[2]).unwrap(), Some(ids[2]), "it has never moved");
            let knows = |pool: &Pool| ids.iter().filter(|id| pool.groups[&address].knows_place(**id)).count();
            assert_eq!(knows(&pool), 1, "{listener}");
            // On a busy machine a connection may take longer than the loop waits for it.
            let deadline = Instant::now() + Duration::from_secs(20);
            let tries = std::iter::repeat_with(|| pool.locate(address, ids[3]));
            let found = tries.take_while(|_| Instant::now() < deadline).find_map(Result::ok).flatten();
            assert!(found == Some(ids[3]) || found == Some(ids[4]), "{listener}: {found:?}");
            assert_eq!(knows(&pool), 3, "{listener}: by one of two, both are known");
        }
    }

    #[test]
    fn a_listener_is_reached_by_an_address_at_which_it_takes_connections() {
        let cases = [
            ("0.0.0.0:1", false, "127.0.0.1"),
            ("127.0.0.2:1", false, "127.0.0.2"),
            ("[::]:1", false, "127.0.0.1"),
            ("[::]:1", true, "::1"),
            ("[::1]:1", false, "::1"),
            ("[2001:db8::1]:1", true, "2001:db8::1"),
            ("[::ffff:127.0.0.3]:1", false, "127.0.0.3"),
            ("[::ffff:0.0.0.0]:1", false, "127.0.0.1"),
        ];
        for (listener, v6only, ip) in cases {
            let address = Address::new(listener.parse().unwrap(), v6only, 0);
            assert_eq!(own_ip(address), ip.parse::<IpAddr>().unwrap(), "{listener}");
        }
        let scoped = Address::new("[fe80::1%7]:1".parse().unwrap(), false, 0);
        assert_eq!(with_port(scoped, own_ip(scoped), 2), "[fe80::1%7]:2".parse().unwrap());
    }
}
