//! The options of a worker's own socket, for the one that takes its place.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, IPPROTO_UDP, SOL_SOCKET};
use log::debug;
use socket2::{Domain, Socket, Type};

use crate::kernel::sys::{self, OptionValue};

/// Options that limit who may connect: level and name.
const LIMITS: [(i32, &[i32]); 3] = [
    (IPPROTO_IP, &[libc::IP_TTL]),
    (IPPROTO_IPV6, &[libc::IPV6_UNICAST_HOPS]),
    (SOL_SOCKET, &[libc::SO_DONTROUTE, libc::SO_MARK]), // the routes of the answers
];

/// All others that can be read and set, and that mean something for a listener, the connections that it accepts, or a UDP
/// socket. Those that decide where a socket is bound and how it is shared are not among them: the pool has set them. IP_TOS stands before
/// SO_PRIORITY, which it changes, and the sizes of buffers before SO_BUF_LOCK.
const OTHERS: [(i32, &[i32]); 3] = [
    (
        IPPROTO_IP,
        &[
            libc::IP_TOS,
            libc::IP_OPTIONS,
            libc::IP_PKTINFO,
            libc::IP_MTU_DISCOVER,
            libc::IP_RECVERR,
            libc::IP_RECVTTL,
            libc::IP_RECVTOS,
            libc::IP_FREEBIND,
            libc::IP_TRANSPARENT,
            libc::IP_UNICAST_IF,
        ],
    ),
    (
        IPPROTO_IPV6,
        &[
            libc::IPV6_TCLASS,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_RECVERR,
            libc::IPV6_RECVPKTINFO,
            libc::IPV6_RECVHOPLIMIT,
            libc::IPV6_RECVTCLASS,
            libc::IPV6_FLOWINFO_SEND,
            IPV6_AUTOFLOWLABEL,
            libc::IPV6_UNICAST_IF,
        ],
    ),
    (
        SOL_SOCKET,
        &[
            libc::SO_KEEPALIVE,
            libc::SO_OOBINLINE,
            libc::SO_PRIORITY,
            libc::SO_LINGER,
            libc::SO_RCVTIMEO,
            libc::SO_SNDTIMEO,
            libc::SO_RCVLOWAT,
            libc::SO_RCVBUF,
            libc::SO_SNDBUF,
            SO_BUF_LOCK,
            libc::SO_TIMESTAMP,
            libc::SO_TIMESTAMPNS,
            libc::SO_TIMESTAMPING,
            libc::SO_BUSY_POLL,
            libc::SO_INCOMING_CPU,
            libc::SO_MAX_PACING_RATE,
            libc::SO_ZEROCOPY,
            libc::SO_PASSCRED,
            libc::SO_PASSSEC,
        ],
    ),
];

/// Those of streams alone.
const OF_STREAMS: [(i32, &[i32]); 1] = [(
    IPPROTO_TCP,
    &[
        libc::TCP_NODELAY,
        libc::TCP_MAXSEG,
        libc::TCP_CORK,
        libc::TCP_KEEPIDLE,
        libc::TCP_KEEPINTVL,
        libc::TCP_KEEPCNT,
        libc::TCP_SYNCNT,
        libc::TCP_LINGER2,
        libc::TCP_DEFER_ACCEPT,
        libc::TCP_WINDOW_CLAMP,
        libc::TCP_CONGESTION,
        libc::TCP_THIN_LINEAR_TIMEOUTS,
        libc::TCP_USER_TIMEOUT,
        libc::TCP_FASTOPEN,
        libc::TCP_NOTSENT_LOWAT,
        libc::TCP_SAVE_SYN,
        libc::TCP_FASTOPEN_KEY,
        libc::TCP_FASTOPEN_NO_COOKIE,
        libc::TCP_INQ,
    ],
)];

/// Those of UDP sockets alone.
const OF_DATAGRAMS: [(i32, &[i32]); 4] = [
    (IPPROTO_UDP, &[UDP_ENCAP, UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX, libc::UDP_SEGMENT, libc::UDP_GRO]),
    (
        IPPROTO_IP,
        &[
            libc::IP_RECVOPTS,
            libc::IP_RETOPTS,
            libc::IP_PASSSEC,
            libc::IP_RECVORIGDSTADDR,
            libc::IP_CHECKSUM,
            libc::IP_RECVFRAGSIZE,
            IP_RECVERR_RFC4884,
            libc::IP_MULTICAST_IF,
            libc::IP_MULTICAST_TTL,
            libc::IP_MULTICAST_LOOP,
            libc::IP_MULTICAST_ALL,
        ],
    ),
    (
        IPPROTO_IPV6,
        &[
            libc::IPV6_RECVHOPOPTS,
            libc::IPV6_RECVRTHDR,
            libc::IPV6_RECVDSTOPTS,
            libc::IPV6_RECVPATHMTU,
            libc::IPV6_RECVORIGDSTADDR,
            libc::IPV6_RECVFRAGSIZE,
            libc::IPV6_DONTFRAG,
            libc::IPV6_MULTICAST_IF,
            libc::IPV6_MULTICAST_HOPS,
            libc::IPV6_MULTICAST_LOOP,
            libc::IPV6_MULTICAST_ALL,
        ],
    ),
    (
        SOL_SOCKET,
        &[libc::SO_REUSEADDR, libc::SO_BROADCAST, libc::SO_NO_CHECK, libc::SO_RXQ_OVFL, libc::SO_TXTIME],
    ),
];

/// linux/in.h, Linux 5.9.
const IP_RECVERR_RFC4884: i32 = 26;
/// linux/udp.h.
const UDP_ENCAP: i32 = 100;
const UDP_NO_CHECK6_TX: i32 = 101;
const UDP_NO_CHECK6_RX: i32 = 102;
/// linux/in6.h.
const IPV6_AUTOFLOWLABEL: i32 = 70;
/// asm-generic/socket.h, Linux 5.14.
const SO_BUF_LOCK: i32 = 72;

/// Gives a socket of the wrapper's the options of the worker's own socket. This also resets what an earlier borrower set.
/// If it had none (`is_new`), it is like every new socket.
///
/// # Errors
/// Those of setsockopt(2) for an option that limits who may connect. The worker must not get the socket then.
pub fn carry_over(own: BorrowedFd, ours: BorrowedFd, is_new: bool) -> io::Result<()> {
    let is_datagram = is(ours, libc::SO_TYPE, libc::SOCK_DGRAM);
    let defaults = if is_new { defaults_like(ours, is_datagram) } else { &[] };
    for (index, (level, name)) in others(is_datagram).enumerate() {
        let Ok(wanted) = OptionValue::of(own, level, name) else { continue };
        if defaults.get(index) == Some(&Some(wanted)) {
            continue;
        }
        if let Err(error) = carry_option_over(wanted, ours, level, name) {
            debug!("can't carry socket option {level}/{name} over: {error}");
        }
    }
    all(&LIMITS).try_for_each(|(level, name)| match OptionValue::of(own, level, name) {
        Ok(wanted) => carry_option_over(wanted, ours, level, name),
        Err(_) => Ok(()), // IPv4 has no options of IPv6, and old kernels lack some
    })
}

fn all(options: &'static [(i32, &[i32])]) -> impl Iterator<Item = (i32, i32)> {
    options.iter().flat_map(|(level, names)| names.iter().map(move |name| (*level, *name)))
}

fn others(is_datagram: bool) -> impl Iterator<Item = (i32, i32)> {
    all(if is_datagram { &OF_DATAGRAMS } else { &OF_STREAMS }).chain(all(&OTHERS))
}

fn is(socket: BorrowedFd, option: i32, value: i32) -> bool {
    sys::socket_option(socket, SOL_SOCKET, option).ok() == Some(value)
}

/// What [`others`] are for a new socket of the same family, as far as that has them.
fn defaults_like(socket: BorrowedFd, is_datagram: bool) -> &'static [Option<OptionValue>] {
    static DEFAULTS: [[OnceLock<Vec<Option<OptionValue>>>; 2]; 2] =
        [const { [const { OnceLock::new() }; 2] }; 2];
    let is_ipv6 = is(socket, libc::SO_DOMAIN, libc::AF_INET6);
    let domain = if is_ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    let kind = if is_datagram { Type::DGRAM } else { Type::STREAM };
    let defaults = &DEFAULTS[usize::from(is_datagram)][usize::from(is_ipv6)];
    defaults.get_or_init(|| match Socket::new(domain, kind, None) {
        Ok(new) => {
            others(is_datagram).map(|(level, name)| OptionValue::of(new.as_fd(), level, name).ok()).collect()
        }
        Err(_) => Vec::new(),
    })
}

fn carry_option_over(wanted: OptionValue, ours: BorrowedFd, level: i32, name: i32) -> io::Result<()> {
    match OptionValue::of(ours, level, name) {
        Ok(had) if had != wanted => to_set(level, name, wanted).set(ours, level, name),
        _ => Ok(()),
    }
}

/// The value to set for an option to be read as `wanted`.
fn to_set(level: i32, name: i32, wanted: OptionValue) -> OptionValue {
    const DEFAULT_MAXSEG: i32 = 536; // is shown where none is set, which is done by 0 (TCP_MSS_DEFAULT, linux/tcp.h)
    match (level, name) {
        // The kernel doubles the size that was asked for (socket(7)).
        (SOL_SOCKET, libc::SO_RCVBUF | libc::SO_SNDBUF) => OptionValue::from_int(wanted.to_int() / 2),
        (IPPROTO_TCP, libc::TCP_MAXSEG) if wanted.to_int() == DEFAULT_MAXSEG => OptionValue::from_int(0),
        _ => wanted,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use socket2::SockRef;

    use super::*;

    /// The options in which two sockets differ.
    fn differences(one: &Socket, other: &Socket) -> Vec<(i32, i32)> {
        let value = |socket: &Socket, (level, name)| OptionValue::of(socket.as_fd(), level, name).ok();
        others(is(one.as_fd(), libc::SO_TYPE, libc::SOCK_DGRAM))
            .chain(all(&LIMITS))
            .filter(|option| value(one, *option) != value(other, *option))
            .collect()
    }

    fn set(socket: &Socket) {
        let int = |level, name, value| OptionValue::from_int(value).set(socket.as_fd(), level, name).unwrap();
        let it = SockRef::from(socket);
        it.set_recv_buffer_size(20_000).unwrap();
        it.set_linger(Some(Duration::from_secs(3))).unwrap();
        it.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
        it.set_write_timeout(Some(Duration::from_secs(7))).unwrap();
        it.set_keepalive(true).unwrap();
        it.set_tcp_nodelay(true).unwrap();
        it.set_tcp_congestion(b"reno").unwrap();
        int(SOL_SOCKET, libc::SO_PRIORITY, 5);
        int(SOL_SOCKET, libc::SO_RCVLOWAT, 3);
        int(IPPROTO_TCP, libc::TCP_MAXSEG, 1000);
        int(IPPROTO_TCP, libc::TCP_KEEPIDLE, 77);
        int(IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 7000);
        int(IPPROTO_TCP, libc::TCP_FASTOPEN, 9);
        int(IPPROTO_TCP, libc::TCP_LINGER2, 11);
        int(IPPROTO_TCP, libc::TCP_SAVE_SYN, 1);
        int(IPPROTO_IP, libc::IP_TOS, 0x10);
        int(IPPROTO_IP, libc::IP_TTL, 3);
        int(IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT);
    }

    #[test]
    fn a_socket_of_the_wrappers_gets_all_options_of_the_workers_own_and_loses_its_earlier_ones() {
        for domain in [Domain::IPV4, Domain::IPV6] {
            let [own, ours, plain] = [(); 3].map(|()| Socket::new(domain, Type::STREAM, None).unwrap());
            ours.set_reuse_port(true).unwrap();
            set(&own);
            if domain == Domain::IPV6 {
                own.set_tclass_v6(0x20).unwrap();
            }
            assert!(differences(&own, &plain).len() >= 18);
            carry_over(own.as_fd(), ours.as_fd(), true).unwrap();
            assert_eq!(differences(&ours, &own), []);
            carry_over(plain.as_fd(), ours.as_fd(), false).unwrap();
            // The time stays, and means nothing.
            assert_eq!(differences(&ours, &plain), [(SOL_SOCKET, libc::SO_LINGER)]);
            assert!(ours.linger().unwrap().is_none() && ours.reuse_port().unwrap());
        }
    }

    #[test]
    fn a_udp_socket_has_options_of_its_own() {
        for domain in [Domain::IPV4, Domain::IPV6] {
            let [own, ours, plain] = [(); 3].map(|()| Socket::new(domain, Type::DGRAM, None).unwrap());
            let int =
                |level, name, value| OptionValue::from_int(value).set(own.as_fd(), level, name).unwrap();
            own.set_recv_buffer_size(20_000).unwrap();
            int(IPPROTO_UDP, libc::UDP_GRO, 1);
            int(IPPROTO_UDP, libc::UDP_SEGMENT, 1200);
            for name in [libc::IP_PKTINFO, libc::IP_RECVTOS, libc::IP_RECVTTL, libc::IP_RECVORIGDSTADDR] {
                int(IPPROTO_IP, name, 1);
            }
            int(IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT);
            int(IPPROTO_IP, libc::IP_TTL, 3);
            int(IPPROTO_IP, libc::IP_MULTICAST_TTL, 7);
            int(SOL_SOCKET, libc::SO_RXQ_OVFL, 1);
            own.set_reuse_address(true).unwrap();
            if domain == Domain::IPV6 {
                for name in [libc::IPV6_RECVPKTINFO, libc::IPV6_RECVTCLASS, libc::IPV6_DONTFRAG] {
                    int(IPPROTO_IPV6, name, 1);
                }
            }
            let count = differences(&own, &plain).len();
            assert!(count >= if domain == Domain::IPV6 { 15 } else { 12 }, "{count}");
            carry_over(own.as_fd(), ours.as_fd(), true).unwrap();
            assert_eq!(differences(&ours, &own), []);
            carry_over(plain.as_fd(), ours.as_fd(), false).unwrap();
            assert_eq!(differences(&ours, &plain), []);
        }
    }

    #[test]
    fn a_unix_socket_has_options_too() {
        let [own, ours] = [(); 2].map(|()| Socket::new(Domain::UNIX, Type::STREAM, None).unwrap());
        own.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        own.set_passcred(true).unwrap();
        carry_over(own.as_fd(), ours.as_fd(), false).unwrap();
        assert_eq!(differences(&ours, &own), []);
    }
}
