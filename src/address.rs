//! Where a worker listens. An address of TCP or UDP is what the pool groups its sockets by.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::path::PathBuf;

/// The protocol above IP. In the order in which a port is steered: who connects finds the new worker at both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    Tcp,
    Udp,
}

/// A port of TCP or UDP. Within a network namespace and for one user, the sockets that agree in these fields form a
/// reuseport group of the kernel: protocol, family, address, port, IPV6_V6ONLY and device (`inet_reuseport_add_sock`,
/// net/ipv4/inet_hashtables.c, and `udp_reuseport_add_sock`, net/ipv4/udp.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    pub socket: SocketAddr,
    pub transport: Transport,
    /// False for IPv4, which has no such option.
    pub v6only: bool,
    /// The index of the only interface that it gets connections from (SO_BINDTODEVICE, socket(7)); 0 for any.
    pub device: u32,
}

impl Address {
    /// Of TCP. A link-local address belongs to the interface that its scope names, or else its device (`__inet6_bind`).
    pub fn new(mut socket: SocketAddr, v6only: bool, mut device: u32) -> Self {
        if let SocketAddr::V6(v6) = &mut socket
            && v6.ip().is_unicast_link_local()
        {
            device = if v6.scope_id() == 0 { device } else { v6.scope_id() };
            v6.set_scope_id(device);
        }
        Self { socket, transport: Transport::Tcp, v6only: v6only && socket.is_ipv6(), device }
    }

    /// The same port of this protocol.
    pub fn over(self, transport: Transport) -> Self {
        Self { transport, ..self }
    }

    pub fn is_udp(&self) -> bool {
        self.transport == Transport::Udp
    }

    /// The address in a `struct sockaddr` as bind(2) takes it (ip(7), ipv6(7)), for a socket with this IPV6_V6ONLY and
    /// device. `None` if it isn't a whole IPv4 or IPv6 address; then the kernel decides about it.
    pub fn from_sockaddr(bytes: &[u8], v6only: bool, device: u32) -> Option<Self> {
        let family = u16::from_ne_bytes(bytes.get(0..2)?.try_into().ok()?);
        let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
        let socket = match i32::from(family) {
            // Old programs leave the family out for 0.0.0.0, and the kernel allows it (`__inet_bind`).
            libc::AF_INET | libc::AF_UNSPEC => {
                bytes.get(..16)?; // the kernel refuses a shorter struct sockaddr_in
                let ip: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
                if i32::from(family) == libc::AF_UNSPEC && ip != [0; 4] {
                    return None;
                }
                SocketAddr::V4(SocketAddrV4::new(ip.into(), port))
            }
            libc::AF_INET6 => {
                let ip: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
                // The scope id may be missing (SIN6_LEN_RFC2133). The flow label doesn't matter to bind.
                let scope = bytes.get(24..28).and_then(|scope| scope.try_into().ok());
                let scope = scope.map_or(0, u32::from_ne_bytes);
                SocketAddr::V6(SocketAddrV6::new(ip.into(), port, 0, scope))
            }
            _ => return None,
        };
        Some(Self::new(socket, v6only, device))
    }

    /// Whether a packet could belong to both addresses, so that the kernel refuses to bind the second one without
    /// SO_REUSEPORT.
    pub fn overlaps(&self, other: &Self) -> bool {
        let devices = [self.device, other.device];
        if self.transport != other.transport {
            return false;
        }
        if self.socket.port() != other.socket.port() || !devices.contains(&0) && devices[0] != devices[1] {
            return false;
        }
        match (self.socket.ip(), other.socket.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => a == b || a.is_unspecified() || b.is_unspecified(),
            (IpAddr::V6(a), IpAddr::V6(b)) => a == b || a.is_unspecified() || b.is_unspecified(),
            (IpAddr::V6(_), IpAddr::V4(b)) => self.takes_v4(b),
            (IpAddr::V4(a), IpAddr::V6(_)) => other.takes_v4(a),
        }
    }

    /// Whether a connection with this local address can have come to a listener here.
    pub fn accepts(&self, local: SocketAddr) -> bool {
        let (ip, same_port) = (self.socket.ip(), self.socket.port() == local.port());
        same_port && ip.is_ipv6() == local.is_ipv6() && (ip.is_unspecified() || ip == local.ip())
    }

    /// Whether this IPv6 address also gets connections to the IPv4 address `v4`.
    fn takes_v4(&self, v4: Ipv4Addr) -> bool {
        let IpAddr::V6(ip) = self.socket.ip() else { return false };
        if self.v6only {
            return false;
        }
        match ip.to_ipv4_mapped() {
            Some(mapped) => mapped == v4 || mapped.is_unspecified() || v4.is_unspecified(),
            None => ip.is_unspecified(),
        }
    }
}

/// Where a worker listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Endpoint {
    Port(Address),
    /// A Unix socket's path.
    Unix(PathBuf),
}

impl Endpoint {
    /// Where connections come.
    pub fn tcp(&self) -> Option<Address> {
        match self {
            Self::Port(address) => Some(*address).filter(|address| !address.is_udp()),
            Self::Unix(_) => None,
        }
    }

    pub fn is_udp(&self) -> bool {
        matches!(self, Self::Port(address) if address.is_udp())
    }
}

impl From<Address> for Endpoint {
    fn from(address: Address) -> Self {
        Self::Port(address)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Port(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.is_udp() {
            f.write_str("udp ")?;
        }
        self.socket.fmt(f)?;
        match self.socket {
            _ if self.device == 0 => Ok(()),
            SocketAddr::V6(v6) if v6.scope_id() == self.device => Ok(()), // said already
            _ => write!(f, " on interface {}", self.device),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn address(text: &str, v6only: bool) -> Address {
        Address::new(text.parse().unwrap(), v6only, 0)
    }

    #[test]
    fn a_sockaddr_is_read_as_the_kernel_reads_it() {
        let mut v4 = vec![0u8; 16];
        v4[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        v4[2..4].copy_from_slice(&3000u16.to_be_bytes());
        v4[4..8].copy_from_slice(&[127, 0, 0, 1]);
        assert_eq!(Address::from_sockaddr(&v4, true, 0), Some(address("127.0.0.1:3000", false)));
        assert_eq!(Address::from_sockaddr(&v4[..15], false, 0), None);

        let mut v6 = vec![0u8; 28];
        v6[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        v6[2..4].copy_from_slice(&3000u16.to_be_bytes());
        v6[23] = 1;
        v6[24..28].copy_from_slice(&7u32.to_ne_bytes());
        assert_eq!(Address::from_sockaddr(&v6, true, 0), Some(address("[::1%7]:3000", true)));
        assert_eq!(Address::from_sockaddr(&v6[..24], false, 0), Some(address("[::1]:3000", false)));
        assert_eq!(Address::from_sockaddr(&v6[..23], false, 0), None);
        assert_eq!(Address::from_sockaddr(&[], false, 0), None);
    }

    #[test]
    fn a_listener_accepts_connections_to_its_own_address_only() {
        let cases = [
            ("127.0.0.1:1", "127.0.0.1:1", true),
            ("127.0.0.1:1", "127.0.0.2:1", false),
            ("127.0.0.1:1", "127.0.0.1:2", false),
            ("0.0.0.0:1", "127.0.0.2:1", true),
            ("0.0.0.0:1", "[::1]:1", false),
            ("[::]:1", "[::ffff:127.0.0.1]:1", true),
            ("[::1]:1", "[::ffff:127.0.0.1]:1", false),
        ];
        for (listener, local, accepts) in cases {
            assert_eq!(
                address(listener, false).accepts(local.parse().unwrap()),
                accepts,
                "{local} at {listener}"
            );
        }
    }

    #[test]
    fn addresses_overlap_when_one_connection_could_reach_both() {
        let cases = [
            ("0.0.0.0:1", "127.0.0.1:1", false, true),
            ("0.0.0.0:1", "0.0.0.0:2", false, false),
            ("127.0.0.1:1", "127.0.0.2:1", false, false),
            ("[::]:1", "0.0.0.0:1", false, true),
            ("[::]:1", "0.0.0.0:1", true, false),
            ("[::]:1", "127.0.0.1:1", false, true),
            ("[::1]:1", "127.0.0.1:1", false, false),
            ("[::ffff:127.0.0.1]:1", "127.0.0.1:1", false, true),
            ("[::ffff:127.0.0.1]:1", "0.0.0.0:1", false, true),
            ("[::]:1", "[::1]:1", true, true),
        ];
        for (a, b, v6only, expected) in cases {
            let (a, b) = (address(a, v6only), address(b, false));
            assert_eq!(a.overlaps(&b), expected, "{a} and {b}");
            assert_eq!(b.overlaps(&a), expected, "{b} and {a}");
        }
    }

    #[test]
    fn addresses_on_different_interfaces_do_not_overlap() {
        let on = |device| Address::new("0.0.0.0:1".parse().unwrap(), false, device);
        assert!(on(1).overlaps(&on(1)) && on(1).overlaps(&on(0)) && on(0).overlaps(&on(2)));
        assert!(!on(1).overlaps(&on(2)));
        assert_eq!(
            [on(0), on(2)].map(|address| address.to_string()),
            ["0.0.0.0:1", "0.0.0.0:1 on interface 2"]
        );
    }

    #[test]
    fn a_port_of_tcp_and_one_of_udp_do_not_overlap_and_that_of_tcp_comes_first() {
        let tcp = address("127.0.0.1:53", false);
        let udp = tcp.over(Transport::Udp);
        assert!(udp.overlaps(&udp) && !udp.overlaps(&tcp) && !tcp.overlaps(&udp));
        assert!(tcp < udp && udp < address("127.0.0.1:54", false) && udp < address("127.0.0.2:53", false));
        assert_eq!([tcp, udp].map(|address| address.to_string()), ["127.0.0.1:53", "udp 127.0.0.1:53"]);
        assert_eq!(Endpoint::from(udp).tcp(), None);
    }

    #[test]
    fn a_link_local_address_has_its_scope_as_its_device() {
        let of = |text: &str, device| Address::new(text.parse().unwrap(), false, device);
        assert_eq!(of("[fe80::1%2]:1", 0), of("[fe80::1]:1", 2));
        assert_eq!(of("[fe80::1%2]:1", 3).device, 2, "the kernel prefers the scope");
        assert_eq!(of("[fe80::1%2]:1", 0).to_string(), "[fe80::1%2]:1");
        assert_eq!(of("[::1%2]:1", 0).device, 0);
    }

    /// A worker chooses the bytes.
    mod fuzz {
        use super::*;

        proptest! {
                #[test]
            fn of_any_bytes_only_a_whole_sockaddr_is_read(bytes in vec(any::<u8>(), 0..=128), v6only: bool) {
                let family = bytes.get(..2).map_or(0, |family| u16::from_ne_bytes([family[0], family[1]]));
                let whole = match i32::from(family) {
                    libc::AF_INET => bytes.len() >= 16,
                    libc::AF_UNSPEC => bytes.len() >= 16 && bytes[4..8] == [0; 4],
                    libc::AF_INET6 => bytes.len() >= 24,
                    _ => false,
                };
                prop_assert_eq!(Address::from_sockaddr(&bytes, v6only, 0).is_some(), whole);
            }

            #[test]
            fn a_sockaddr_as_libraries_write_it_is_read_back(ip: IpAddr, port: u16, scope: u32, v6only: bool) {
                let mut socket = SocketAddr::new(ip, port);
                if let SocketAddr::V6(v6) = &mut socket {
                    v6.set_scope_id(scope);
                }
                let mut bytes = vec![0; if ip.is_ipv4() { 16 } else { 28 }];
                match socket {
                    SocketAddr::V4(v4) => {
                        bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
                        bytes[2..4].copy_from_slice(&v4.port().to_be_bytes());
                        bytes[4..8].copy_from_slice(&v4.ip().octets());
                    }
                    SocketAddr::V6(v6) => {
                        bytes[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
                        bytes[2..4].copy_from_slice(&v6.port().to_be_bytes());
                        bytes[8..24].copy_from_slice(&v6.ip().octets());
                        bytes[24..28].copy_from_slice(&v6.scope_id().to_ne_bytes());
                    }
                }
                let read = Address::from_sockaddr(&bytes, v6only, 0).unwrap();
                prop_assert_eq!(read.socket, socket);
                prop_assert_eq!(read.v6only, v6only && socket.is_ipv6());
            }
        }
    }
}
