//! The state of TCP and UDP sockets: of all in this network namespace by sock_diag(7), and of one socket by TCP_INFO
//! (tcp(7)). Which file each Unix socket belongs to, by sock_diag(7).

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{
    AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, TCP_ESTABLISHED, TCP_SYN_RECV,
};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use netlink_packet_sock_diag::unix::nlas::Nla as UnixNla;
use netlink_packet_sock_diag::unix::{self, ShowFlags, UnixRequest, UnixResponse};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

use crate::address::{Address, Transport};
use crate::kernel::sys;

/// A TCP connection, from the point of view of the side that accepts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    pub local: SocketAddr,
    pub peer: SocketAddr,
    /// Whether the handshake isn't finished.
    pub opening: bool,
    /// 0 before the connection is accepted, and after it is closed.
    pub inode: u32,
    /// Bytes that the program hasn't read.
    pub unread: u32,
    pub traffic: Traffic,
}

/// What was sent and received on a connection, at the moment of the reading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Time since data was last sent, or else since the connection was made.
    pub sent_ago: Duration,
    /// Time since data was last received, or else since the connection was made.
    pub received_ago: Duration,
    /// Bytes that the program has written and the kernel not sent, because the peer or the network takes no
    /// more.
    pub unsent: u32,
    /// Time since something was last acknowledged, by a segment with or without data.
    pub acknowledged_ago: Duration,
    /// Segments with data that were sent and not acknowledged.
    pub unacknowledged: u32,
    /// Segments without data that were received.
    pub bare_segments_received: u32,
    /// Segments with data that were sent and received.
    pub segments_sent: u32,
    pub segments_received: u32,
    /// The shortest, without the client's delay.
    pub round_trip: Duration,
    /// Received bytes. The end of the stream counts as one (`tcp_rcv_nxt_update`, net/ipv4/tcp_input.c).
    pub received: u64,
    /// Bytes that the peer has acknowledged.
    pub acknowledged: u64,
}

impl Traffic {
    /// Parses a `struct tcp_info` (linux/tcp.h). Fields that the kernel doesn't know count as zero.
    pub fn parse(info: &[u8]) -> Self {
        const LAST_DATA_SENT: usize = 44;
        const LAST_DATA_RECV: usize = 52;
        const UNACKED: usize = 24;
        const LAST_ACK_RECV: usize = 56;
        const MIN_RTT: usize = 148; // in microseconds
        const SEGS_IN: usize = 140;
        const BYTES_ACKED: usize = 120;
        const BYTES_RECEIVED: usize = 128;
        const NOTSENT_BYTES: usize = 144;
        const DATA_SEGS_IN: usize = 152;
        const DATA_SEGS_OUT: usize = 156;
        let field = |at| field(info, at);
        let long = |at: usize| {
            let bytes = info.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_ne_bytes)
        };
        Self {
            sent_ago: Duration::from_millis(field(LAST_DATA_SENT).into()),
            received_ago: Duration::from_millis(field(LAST_DATA_RECV).into()),
            unsent: field(NOTSENT_BYTES),
            acknowledged_ago: Duration::from_millis(field(LAST_ACK_RECV).into()),
            unacknowledged: field(UNACKED),
            bare_segments_received: field(SEGS_IN).saturating_sub(field(DATA_SEGS_IN)),
            segments_sent: field(DATA_SEGS_OUT),
            segments_received: field(DATA_SEGS_IN),
            round_trip: Duration::from_micros(field(MIN_RTT).into()),
            received: long(BYTES_RECEIVED),
            acknowledged: long(BYTES_ACKED),
        }
    }
}

/// The state of a socket that should be listening.
#[derive(Debug, Clone, Copy)]
pub struct ListenInfo {
    /// Whether it is in the LISTEN state.
    pub listening: bool,
    /// Whether it is in the CLOSE state: it neither listens nor is a connection.
    pub closed: bool,
    /// The number of connections that wait to be accepted (`tcpi_unacked` of a listener, net/ipv4/tcp.c).
    pub accept_queue: u32,
}

/// Reads the state of a socket that should be listening.
///
/// # Errors
/// Those of getsockopt(2).
pub fn listen_info(socket: BorrowedFd) -> io::Result<ListenInfo> {
    const STATE: usize = 0;
    const TCP_CLOSE: u8 = 7;
    const TCP_LISTEN: u8 = 10;
    const UNACKED: usize = 24;
    let info = sys::tcp_info(socket)?;
    let (listening, closed) = (info[STATE] == TCP_LISTEN, info[STATE] == TCP_CLOSE);
    Ok(ListenInfo { listening, closed, accept_queue: field(&info, UNACKED) })
}

/// The 32-bit field at an offset of a `struct tcp_info`, 0 if the struct is shorter.
fn field(info: &[u8], at: usize) -> u32 {
    let bytes = info.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_ne_bytes)
}

/// A listening TCP socket of any process, or one of UDP that isn't connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    pub address: Address,
    pub inode: u32,
    pub uid: u32,
}

/// Which file a Unix socket was bound to, whatever the name of that is (`UNIX_DIAG_VFS`, linux/unix_diag.h).
pub use netlink_packet_sock_diag::unix::nlas::Vfs as SocketFile;

/// A Unix socket of any process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnixSocket {
    pub inode: u64,
    pub is_connected: bool,
    /// The other end of a connection.
    pub peer: Option<u64>,
    /// An accepted connection has its listener's. `None` if it isn't bound to a path.
    pub file: Option<SocketFile>,
}

/// A netlink socket for sock_diag requests.
pub struct SockDiag {
    socket: Socket,
    buffer: Vec<u8>,
}

impl SockDiag {
    pub fn new() -> io::Result<Self> {
        Ok(Self { socket: Socket::new(NETLINK_SOCK_DIAG)?, buffer: Vec::with_capacity(64 * 1024) })
    }

    /// The connections to `local`'s port that are being opened, open or half closed, of its address family
    /// only. An IPv4 client's connection to an IPv6 socket belongs to the IPv6 family.
    pub fn connections(&mut self, local: SocketAddr) -> io::Result<Vec<Connection>> {
        let states = StateFlags::SYN_RECV
            | StateFlags::ESTABLISHED
            | StateFlags::CLOSE_WAIT
            | StateFlags::FIN_WAIT1
            | StateFlags::FIN_WAIT2
            | StateFlags::LAST_ACK
            | StateFlags::CLOSING;
        let (family, mut socket_id) = match local {
            SocketAddr::V4(_) => (AF_INET, SocketId::new_v4()),
            SocketAddr::V6(_) => (AF_INET6, SocketId::new_v6()),
        };
        socket_id.source_port = local.port();
        let extensions = ExtensionFlags::INFO;
        let request = InetRequest { family, protocol: IPPROTO_TCP, extensions, states, socket_id };
        let mut connections = Vec::new();
        self.dump_inet(request, |response| connections.push(connection(response)))?;
        Ok(connections)
    }

    /// The inode numbers of the sockets that wait for a connection to this port of their own address, of both families.
    pub fn connecting(&mut self, port: u16) -> io::Result<Vec<u64>> {
        let mut inodes = Vec::new();
        self.dump_both(
            IPPROTO_TCP,
            StateFlags::SYN_SENT,
            |id| id.destination_port = port,
            |response| {
                let SocketId { source_address, destination_address, .. } = response.header.socket_id;
                if source_address == destination_address {
                    inodes.push(response.header.inode.into());
                }
            },
        )?;
        Ok(inodes)
    }

    /// Whether somebody on this machine had a connection to this port of the machine, closed it first, and that a minute ago at
    /// the most.
    pub fn was_reached_from_here(&mut self, port: u16) -> io::Result<bool> {
        let mut was = false;
        self.dump_both(
            IPPROTO_TCP,
            StateFlags::TIME_WAIT | StateFlags::FIN_WAIT1 | StateFlags::FIN_WAIT2,
            |id| id.destination_port = port,
            |response| {
                let SocketId { source_address, destination_address, .. } = response.header.socket_id;
                was |= source_address == destination_address;
            },
        )?;
        Ok(was)
    }

    /// All sockets that listen on `port`, or on any port if it is 0, of both families.
    pub fn listeners(&mut self, transport: Transport, port: u16) -> io::Result<Vec<Listener>> {
        let (protocol, states) = match transport {
            Transport::Tcp => (IPPROTO_TCP, StateFlags::LISTEN),
            Transport::Udp => (IPPROTO_UDP, StateFlags::CLOSE),
        };
        let mut listeners = Vec::new();
        let each = |response: &InetResponse| listeners.push(listener(response, transport));
        self.dump_both(protocol, states, |id| id.source_port = port, each)?;
        Ok(listeners)
    }

    /// All Unix sockets of this network namespace.
    ///
    /// # Errors
    /// ENOENT if the kernel can't list them (CONFIG_UNIX_DIAG).
    pub fn unix_sockets(&mut self) -> io::Result<Vec<UnixSocket>> {
        let state_flags = unix::StateFlags::from_bits_retain(u32::MAX);
        let show_flags = ShowFlags::VFS | ShowFlags::PEER;
        let request = UnixRequest { state_flags, inode: 0, show_flags, cookie: [0xff; 8] };
        let mut sockets = Vec::new();
        self.dump(SockDiagMessage::UnixRequest(request), |message| {
            if let SockDiagMessage::UnixResponse(response) = message {
                sockets.push(unix_socket(response));
            }
        })?;
        Ok(sockets)
    }

    /// The sockets of both families in these states, of the port that `choose` sets.
    fn dump_both(
        &mut self,
        protocol: u8,
        states: StateFlags,
        choose: impl Fn(&mut SocketId),
        mut each: impl FnMut(&InetResponse),
    ) -> io::Result<()> {
        for (family, mut socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            choose(&mut socket_id);
            let (extensions, states) = (ExtensionFlags::empty(), states.clone());
            let request = InetRequest { family, protocol, extensions, states, socket_id };
            self.dump_inet(request, &mut each)?;
        }
        Ok(())
    }

    fn dump_inet(&mut self, request: InetRequest, mut each: impl FnMut(&InetResponse)) -> io::Result<()> {
        self.dump(SockDiagMessage::InetRequest(request), |message| {
            if let SockDiagMessage::InetResponse(response) = message {
                each(response);
            }
        })
    }

    fn dump(&mut self, request: SockDiagMessage, mut each: impl FnMut(&SockDiagMessage)) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut message = NetlinkMessage::new(header, request.into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            self.buffer.clear();
            self.socket.recv(&mut self.buffer, 0)?; // doesn't block: the kernel has answered already
            if parse(&self.buffer, &mut each)? {
                return Ok(());
            }
        }
    }
}

/// Hands each socket in a part of an answer to `each`. Returns whether the answer ends there.
///
/// # Errors
/// What the kernel says instead of an answer; InvalidData if it is no netlink message.
fn parse(part: &[u8], each: &mut impl FnMut(&SockDiagMessage)) -> io::Result<bool> {
    let mut rest = part;
    while !rest.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        match message.payload {
            NetlinkPayload::InnerMessage(message) => each(&message),
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            _ => {}
        }
        let length = message.header.length as usize;
        // Messages are aligned to four bytes (netlink(7)).
        rest = rest.get(length.next_multiple_of(4).max(16)..).unwrap_or_default();
    }
    Ok(false)
}

fn listener(response: &InetResponse, transport: Transport) -> Listener {
    let header = &response.header;
    let id = &header.socket_id;
    let v6only = response.nlas.iter().any(|nla| matches!(nla, Nla::SkV6Only(true)));
    let socket = SocketAddr::new(id.source_address, id.source_port);
    let address = Address::new(socket, v6only, id.interface_id).over(transport);
    Listener { address, inode: header.inode, uid: header.uid }
}

fn unix_socket(response: &UnixResponse) -> UnixSocket {
    let file = response.nlas.iter().find_map(|nla| match nla {
        UnixNla::Vfs(file) => Some(file.clone()),
        _ => None,
    });
    let header = &response.header;
    // Those that nobody has accepted yet have no inode number.
    let is_connected = header.state == TCP_ESTABLISHED && header.inode != 0;
    UnixSocket { inode: header.inode.into(), is_connected, peer: response.peer().map(Into::into), file }
}

fn connection(response: &InetResponse) -> Connection {
    let header = &response.header;
    let info = response.nlas.iter().find_map(|nla| match nla {
        Nla::TcpInfo(info) => Some(Traffic::parse(info)),
        _ => None,
    });
    let id = &header.socket_id;
    Connection {
        local: SocketAddr::new(id.source_address, id.source_port),
        peer: SocketAddr::new(id.destination_address, id.destination_port),
        opening: header.state == TCP_SYN_RECV,
        inode: header.inode,
        unread: header.recv_queue,
        traffic: info.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use proptest::prelude::*;

    use super::*;

    /// The kernel writes the answers; the addresses in them are those of any process.
    mod fuzz {
        use proptest::collection::vec;

        use super::*;

        /// SOCK_DIAG_BY_FAMILY (linux/sock_diag.h), and NLMSG_DONE (linux/netlink.h).
        const TYPE: u16 = 20;
        const NLMSG_DONE: u16 = 3;

        #[derive(Debug, Clone)]
        struct Socket {
            local: SocketAddr,
            peer: SocketAddr,
            state: u8,
            inode: u32,
            uid: u32,
            unread: u32,
            v6only: bool,
            info: Vec<u8>,
        }

        prop_compose! {
            fn socket()(
                addresses: (std::net::Ipv6Addr, std::net::Ipv6Addr),
                is_ipv4: bool,
                ports: (u16, u16),
                state in 1u8..12,
                numbers: (u32, u32, u32),
                v6only: bool,
                info in vec(any::<u8>(), 0..240),
            ) -> Socket {
                let address = |ip: std::net::Ipv6Addr, port| match is_ipv4 {
                    true => SocketAddr::from((std::net::Ipv4Addr::from_bits(ip.to_bits() as u32), port)),
                    false => SocketAddr::from((ip, port)),
                };
                let (local, peer) = (address(addresses.0, ports.0), address(addresses.1, ports.1));
                let (inode, uid, unread) = numbers;
                Socket { local, peer, state, inode, uid, unread, v6only: v6only && !is_ipv4, info }
            }
        }

        /// A `struct inet_diag_msg` with its attributes (linux/inet_diag.h).
        fn payload(socket: &Socket) -> Vec<u8> {
            const INET_DIAG_INFO: u16 = 2;
            const INET_DIAG_SKV6ONLY: u16 = 11;
            let family = if socket.local.is_ipv4() { AF_INET } else { AF_INET6 };
            let mut bytes = vec![family, socket.state, 0, 0];
            bytes.extend([socket.local.port().to_be_bytes(), socket.peer.port().to_be_bytes()].concat());
            for address in [socket.local, socket.peer] {
                match address.ip() {
                    std::net::IpAddr::V4(ip) => bytes.extend([&ip.octets()[..], &[0; 12]].concat()),
                    std::net::IpAddr::V6(ip) => bytes.extend(ip.octets()),
                }
            }
            bytes.extend([0; 16]); // interface, cookie, expires
            for number in [socket.unread, 0, socket.uid, socket.inode] {
                bytes.extend(number.to_ne_bytes());
            }
            for (kind, value) in
                [(INET_DIAG_SKV6ONLY, &[u8::from(socket.v6only)][..]), (INET_DIAG_INFO, &socket.info)]
            {
                bytes.extend([(4 + value.len() as u16).to_ne_bytes(), kind.to_ne_bytes()].concat());
                bytes.extend(value);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
            bytes
        }

        /// A `struct nlmsghdr` with its payload (netlink(7)).
        fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
            let mut bytes = (16 + payload.len() as u32).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(payload);
            bytes
        }

        /// Does with a message all that its readers do.
        fn read(message: &SockDiagMessage) {
            match message {
                SockDiagMessage::InetResponse(response) => {
                    let _ = (listener(response, Transport::Tcp), connection(response));
                }
                SockDiagMessage::UnixResponse(response) => {
                    let _ = unix_socket(response);
                }
                _ => {}
            }
        }

        proptest! {
            #[test]
            fn a_tcp_info_of_any_length_is_read(info: Vec<u8>) {
                let traffic = Traffic::parse(&info);
                prop_assert!(info.len() >= 160 || traffic.segments_sent == 0);
                prop_assert!(info.len() >= 136 || traffic.received == 0);
            }

            #[test]
            fn sockets_are_read_as_the_kernel_writes_them(sockets in vec(socket(), 0..6), is_last: bool) {
                let mut part: Vec<u8> = sockets.iter().flat_map(|socket| message(TYPE, &payload(socket))).collect();
                if is_last {
                    part.extend(message(NLMSG_DONE, &[0; 4]));
                }
                let mut read = Vec::new();
                let ended = parse(&part, &mut |message| {
                    if let SockDiagMessage::InetResponse(response) = message {
                        read.push((listener(response, Transport::Tcp), connection(response)));
                    }
                }).unwrap();
                prop_assert_eq!(ended, is_last);
                prop_assert_eq!(read.len(), sockets.len());
                for ((listener, connection), socket) in read.iter().zip(&sockets) {
                    let address = Address::new(socket.local, socket.v6only, 0);
                    prop_assert_eq!(*listener, Listener { address, inode: socket.inode, uid: socket.uid });
                    prop_assert_eq!((connection.local, connection.peer), (socket.local, socket.peer));
                    prop_assert_eq!((connection.inode, connection.unread), (socket.inode, socket.unread));
                    prop_assert_eq!(connection.opening, socket.state == TCP_SYN_RECV);
                    prop_assert_eq!(connection.traffic, Traffic::parse(&socket.info));
                }
            }

            #[test]
            fn a_damaged_answer_is_an_error_or_holds_no_more_sockets(
                sockets in vec(socket(), 1..6), cut: prop::sample::Index, at: prop::sample::Index, byte: u8
            ) {
                let mut part: Vec<u8> = sockets.iter().flat_map(|socket| message(TYPE, &payload(socket))).collect();
                let at = at.index(part.len());
                part[at] = byte;
                part.truncate(cut.index(part.len()));
                let mut count = 0;
                let _ = parse(&part, &mut |message| {
                    read(message);
                    count += 1;
                });
                prop_assert!(count * 32 <= part.len(), "{count} sockets in {} bytes", part.len());
            }

            #[test]
            fn no_bytes_make_the_parser_panic(part in vec(any::<u8>(), 0..200)) {
                let _ = parse(&part, &mut read);
            }
        }
    }

    #[test]
    fn a_connection_has_the_file_of_its_listener_and_no_other_socket_has() {
        use std::os::fd::AsFd;
        use std::os::unix::net::{UnixListener, UnixStream};
        let inode = |socket: &dyn AsFd| crate::kernel::procfs::inode(socket.as_fd()).unwrap();
        let path =
            |name: &str| std::env::temp_dir().join(format!("reuse-run-diag-{}-{name}", std::process::id()));
        let paths = [path("a"), path("b")];
        let [a, b] = [0, 1].map(|index| UnixListener::bind(&paths[index]).unwrap());
        let client = UnixStream::connect(&paths[0]).unwrap();
        let (accepted, _) = a.accept().unwrap();
        let all = SockDiag::new().unwrap().unix_sockets().unwrap();
        let of = |socket: &dyn AsFd| all.iter().find(|it| it.inode == inode(socket)).unwrap();
        assert!(of(&a).file.is_some() && of(&a).file == of(&accepted).file && of(&a).file != of(&b).file);
        assert_eq!(of(&client).file, None);
        assert_eq!([of(&a), of(&b), of(&accepted)].map(|it| it.is_connected), [false, false, true]);
        assert_eq!([of(&a).peer, of(&accepted).peer], [None, Some(inode(&client))]);
        paths.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    }

    #[test]
    fn listeners_of_a_port_are_told_of_with_what_sets_their_groups_apart() {
        let any = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
        any.set_only_v6(true).unwrap();
        any.bind(&"[::]:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        any.listen(1).unwrap();
        let port = any.local_addr().unwrap().as_socket().unwrap().port();
        let _v4 = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let mut addresses: Vec<Address> = SockDiag::new()
            .unwrap()
            .listeners(Transport::Tcp, port)
            .unwrap()
            .iter()
            .map(|listener| listener.address)
            .collect();
        addresses.sort();
        let address = |text: &str, v6only| Address::new(format!("{text}:{port}").parse().unwrap(), v6only, 0);
        assert_eq!(addresses, [address("127.0.0.1", false), address("[::]", true)]);
    }

    #[test]
    fn a_socket_that_waits_for_a_connection_to_its_own_address_is_found() {
        let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        full.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        full.listen(0).unwrap();
        let address = full.local_addr().unwrap();
        let port = address.as_socket().unwrap().port();
        let _queued = TcpStream::connect(address.as_socket().unwrap()).unwrap();
        let client = |source: &str| {
            let client = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            client.bind(&format!("{source}:0").parse::<SocketAddr>().unwrap().into()).unwrap();
            client.set_nonblocking(true).unwrap();
            client.connect(&address).unwrap_err(); // EINPROGRESS
            client
        };
        let (own, _other) = (client("127.0.0.1"), client("127.0.0.2"));
        let inode = crate::kernel::procfs::inode(std::os::fd::AsFd::as_fd(&own)).unwrap();
        assert_eq!(SockDiag::new().unwrap().connecting(port).unwrap(), [inode]);
    }

    #[test]
    fn a_connection_is_listed_with_its_queues_and_traffic() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        let mut diag = SockDiag::new().unwrap();
        let read = |diag: &mut SockDiag| diag.connections(address).unwrap();

        let connections = read(&mut diag);
        assert_eq!(connections.len(), 1, "{connections:?}");
        assert_eq!(connections[0].peer, client.local_addr().unwrap());
        assert_eq!(connections[0].inode, 0, "nobody has accepted it");
        assert!(!connections[0].opening && connections[0].traffic.received == 0);

        client.write_all(b"request").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let connection = read(&mut diag)[0];
        assert_ne!(connection.inode, 0);
        assert_eq!(connection.unread, 7);
        let Traffic { received, segments_received, segments_sent, .. } = connection.traffic;
        assert_eq!((received, segments_received, segments_sent), (7, 1, 0));

        server.read_exact(&mut [0; 7]).unwrap();
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut [0; 6]).unwrap();
        let connection = read(&mut diag)[0];
        assert_eq!(connection.unread, 0);
        assert_eq!((connection.traffic.segments_received, connection.traffic.segments_sent), (1, 1));
        assert!(connection.traffic.sent_ago <= connection.traffic.received_ago);
    }
}
