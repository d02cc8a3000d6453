//! The filter that workers run behind, and the decoding of the system calls that it stops. Pure computation.

use libc::sock_filter;

use crate::kernel::bpf::{Assembler, Label};
use crate::kernel::sys;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xC000_003E; // AUDIT_ARCH_X86_64 (linux/audit.h)
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xC000_00B7; // AUDIT_ARCH_AARCH64
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("reuse-run knows the system calls of x86_64 and aarch64 only");

/// System calls that the filter stops whatever their arguments are.
const STOPPED: &[libc::c_long] = &[
    libc::SYS_bind,
    libc::SYS_listen,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// The socket options that the filter stops, by level: those that decide which sockets may be bound side by side,
/// who may connect, and which socket of a group gets a connection.
const OPTIONS: &[(i32, &[(i32, SocketOption)])] = &[
    (
        libc::SOL_SOCKET,
        &[
            (libc::SO_REUSEPORT, SocketOption::ReusePort),
            (libc::SO_BINDTODEVICE, SocketOption::DeviceName),
            (sys::SO_BINDTOIFINDEX, SocketOption::DeviceIndex),
            (libc::SO_ATTACH_FILTER, SocketOption::Peers),
            (libc::SO_ATTACH_BPF, SocketOption::Peers),
            (libc::SO_ATTACH_REUSEPORT_CBPF, SocketOption::GroupProgram),
            (libc::SO_ATTACH_REUSEPORT_EBPF, SocketOption::GroupProgram),
            (SO_DETACH_REUSEPORT_BPF, SocketOption::GroupProgram),
        ],
    ),
    (
        libc::IPPROTO_IPV6,
        &[
            (libc::IPV6_V6ONLY, SocketOption::V6Only),
            (libc::IPV6_MINHOPCOUNT, SocketOption::MinHopCount),
            (libc::IPV6_IPSEC_POLICY, SocketOption::Peers),
            (libc::IPV6_XFRM_POLICY, SocketOption::Peers),
            (libc::IPV6_ADD_MEMBERSHIP, SocketOption::Multicast),
            (MCAST_JOIN_GROUP, SocketOption::Multicast),
            (MCAST_JOIN_SOURCE_GROUP, SocketOption::Multicast),
        ],
    ),
    (
        libc::IPPROTO_IP,
        &[
            (libc::IP_MINTTL, SocketOption::MinTtl),
            (libc::IP_IPSEC_POLICY, SocketOption::Peers),
            (libc::IP_XFRM_POLICY, SocketOption::Peers),
            (libc::IP_ADD_MEMBERSHIP, SocketOption::Multicast),
            (libc::IP_ADD_SOURCE_MEMBERSHIP, SocketOption::Multicast),
            (MCAST_JOIN_GROUP, SocketOption::Multicast),
            (MCAST_JOIN_SOURCE_GROUP, SocketOption::Multicast),
        ],
    ),
    (
        libc::IPPROTO_TCP,
        &[
            (libc::TCP_MD5SIG, SocketOption::Peers),
            (libc::TCP_MD5SIG_EXT, SocketOption::Peers),
            (TCP_AO_ADD_KEY, SocketOption::Peers),
        ],
    ),
];

/// asm-generic/socket.h, Linux 5.3.
const SO_DETACH_REUSEPORT_BPF: i32 = 68;
/// linux/in.h.
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;
/// linux/tcp.h, Linux 6.7.
const TCP_AO_ADD_KEY: i32 = 38;

/// The filter. It stops bind and listen, setsockopt of [`OPTIONS`], the question whether a socket listens (getsockopt
/// with SO_ACCEPTCONN), and unlink, which could take the path of a Unix socket from other workers. It allows
/// everything else, also calls of another ABI. What is of interest for UDP ports alone it stops only if it `has_udp`.
///
/// A filter can't read memory, only the numbers in `struct seccomp_data` (linux/seccomp.h).
pub fn filter(has_udp: bool) -> Vec<sock_filter> {
    const NR: u32 = 0;
    const ARCH: u32 = 4;
    const LEVEL: u32 = arg(1);
    const OPTION: u32 = arg(2);
    const fn arg(n: u32) -> u32 {
        16 + 8 * n // the lower half: both architectures are little-endian
    }
    const NEXT: Label = Label::NEXT;
    let mut code = Assembler::default();
    let [no_question, allow, stop] = code.labels();
    // The x32 ABI shares AUDIT_ARCH_X86_64 but sets bit 30 of the number, so none of these matches.
    code.load(ARCH);
    code.jump_equal(ARCHITECTURE, NEXT, allow);
    code.load(NR);
    for number in STOPPED {
        code.jump_equal(*number as u32, stop, NEXT);
    }

    code.jump_equal(libc::SYS_getsockopt as u32, NEXT, no_question);
    code.load(LEVEL);
    code.jump_equal(libc::SOL_SOCKET as u32, NEXT, allow);
    code.load(OPTION);
    code.jump_equal(libc::SO_ACCEPTCONN as u32, stop, allow);

    code.place(no_question);
    code.jump_equal(libc::SYS_setsockopt as u32, NEXT, allow);
    code.load(LEVEL);
    for (level, options) in OPTIONS {
        let [other_level] = code.labels();
        code.jump_equal(*level as u32, NEXT, other_level);
        code.load(OPTION);
        let stopped = options.iter().filter(|(_, option)| has_udp || *option != SocketOption::Multicast);
        for (option, _) in stopped {
            code.jump_equal(*option as u32, stop, NEXT);
        }
        code.ret(libc::SECCOMP_RET_ALLOW);
        code.place(other_level);
    }

    code.place(allow);
    code.ret(libc::SECCOMP_RET_ALLOW);
    code.place(stop);
    code.ret(libc::SECCOMP_RET_USER_NOTIF);
    code.finish()
}

/// A stopped system call, which waits for its answer. Addresses are those of the worker's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Bind {
        fd: u32,
        address: u64,
        len: u64,
    },
    Listen {
        fd: u32,
        backlog: i32,
    },
    SetOption {
        fd: u32,
        option: SocketOption,
        value: u64,
        len: u64,
    },
    /// getsockopt of SO_ACCEPTCONN: whether the socket listens.
    AsksWhetherListening {
        fd: u32,
        value: u64,
        len: u64,
    },
    Unlink {
        /// The directory fd that a relative path starts from; `None` for the current directory.
        from: Option<u32>,
        path: u64,
    },
    /// Nothing that reuse-run answers itself.
    Other,
}

/// A socket option that decides about a bind, about who may connect, or which socket of a group gets a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketOption {
    /// IPV6_V6ONLY.
    V6Only,
    /// SO_REUSEPORT.
    ReusePort,
    /// SO_BINDTODEVICE.
    DeviceName,
    /// SO_BINDTOIFINDEX.
    DeviceIndex,
    /// IP_MINTTL.
    MinTtl,
    /// IPV6_MINHOPCOUNT.
    MinHopCount,
    /// A filter, a key or a policy.
    Peers,
    /// The program that chooses a member of a reuseport group.
    GroupProgram,
    /// The socket joins a multicast group.
    Multicast,
}

/// Decodes what the kernel says about a stopped call.
pub fn decode(data: &libc::seccomp_data) -> Call {
    // The kernel reads fds, levels and options as int and ignores the upper halves of their registers.
    let fd = data.args[0] as u32;
    match i64::from(data.nr) {
        libc::SYS_bind => Call::Bind { fd, address: data.args[1], len: u64::from(data.args[2] as u32) },
        libc::SYS_listen => Call::Listen { fd, backlog: data.args[1] as i32 },
        libc::SYS_setsockopt => {
            let Some(option) = option(data.args[1] as i32, data.args[2] as i32) else { return Call::Other };
            Call::SetOption { fd, option, value: data.args[3], len: u64::from(data.args[4] as u32) }
        }
        libc::SYS_getsockopt
            if (data.args[1] as i32, data.args[2] as i32) == (libc::SOL_SOCKET, libc::SO_ACCEPTCONN) =>
        {
            Call::AsksWhetherListening { fd, value: data.args[3], len: data.args[4] }
        }
        #[cfg(target_arch = "x86_64")]
        libc::SYS_unlink => Call::Unlink { from: None, path: data.args[0] },
        libc::SYS_unlinkat if data.args[2] as i32 & libc::AT_REMOVEDIR == 0 => {
            Call::Unlink { from: (fd as i32 != libc::AT_FDCWD).then_some(fd), path: data.args[1] }
        }
        _ => Call::Other,
    }
}

/// The option with this level and name, if the filter stops it.
fn option(level: i32, name: i32) -> Option<SocketOption> {
    let (_, options) = OPTIONS.iter().find(|(stopped, _)| *stopped == level)?;
    options.iter().find(|(stopped, _)| *stopped == name).map(|(_, option)| *option)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::bpf;

    fn seccomp_data(nr: i64, args: [u64; 6]) -> libc::seccomp_data {
        libc::seccomp_data { nr: nr as i32, arch: ARCHITECTURE, instruction_pointer: 0, args }
    }

    /// Runs a filter as the kernel would.
    fn verdict_of(filter: &[sock_filter], data: &libc::seccomp_data) -> u32 {
        let mut words = vec![data.nr as u32, data.arch, 0, 0];
        words.extend(data.args.iter().flat_map(|arg| [*arg as u32, (*arg >> 32) as u32]));
        bpf::run(filter, |offset, _| words[offset as usize / 4]).0
    }

    fn verdict(nr: i64, arch: u32, args: [u64; 6]) -> u32 {
        verdict_of(&filter(true), &libc::seccomp_data { arch, ..seccomp_data(nr, args) })
    }

    /// Whether the filter stops exactly the calls that [`decode`] understands.
    fn agree(filter: &[sock_filter], data: &libc::seccomp_data) -> bool {
        let stopped = verdict_of(filter, data) == libc::SECCOMP_RET_USER_NOTIF;
        // The filter stops rmdir too, which is unlinkat with a flag.
        let is_rmdir = i64::from(data.nr) == libc::SYS_unlinkat && decode(data) == Call::Other;
        stopped == (decode(data) != Call::Other || is_rmdir)
    }

    #[test]
    fn the_filter_stops_bind_listen_unlink_and_some_socket_options_and_nothing_else() {
        let option = |level: i32, name: i32| {
            verdict(libc::SYS_setsockopt, ARCHITECTURE, [3, level as u64, name as u64, 0, 4, 0])
        };
        let (allow, notify) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF);
        assert_eq!(verdict(libc::SYS_bind, ARCHITECTURE, [3, 0, 16, 0, 0, 0]), notify);
        assert_eq!(verdict(libc::SYS_listen, ARCHITECTURE, [3, 128, 0, 0, 0, 0]), notify);
        assert_eq!(option(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY), notify);
        assert_eq!(option(libc::SOL_SOCKET, libc::SO_REUSEPORT), notify);
        for (level, options) in OPTIONS {
            assert!(options.iter().all(|(name, _)| option(*level, *name) == notify), "level {level}");
        }
        assert_eq!(option(libc::SOL_SOCKET, libc::SO_REUSEADDR), allow);
        assert_eq!(option(libc::IPPROTO_TCP, libc::IPV6_V6ONLY), allow);
        assert_eq!(option(libc::IPPROTO_TCP, libc::TCP_NODELAY), allow);
        assert_eq!(option(libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS), allow);
        assert_eq!(verdict(libc::SYS_unlinkat, ARCHITECTURE, [0, 1, 0, 0, 0, 0]), notify);
        let question = |name: i32| {
            verdict(libc::SYS_getsockopt, ARCHITECTURE, [3, libc::SOL_SOCKET as u64, name as u64, 0, 0, 0])
        };
        assert_eq!((question(libc::SO_ACCEPTCONN), question(libc::SO_ERROR)), (notify, allow));
        for nr in [libc::SYS_accept4, libc::SYS_read, libc::SYS_connect, libc::SYS_getsockopt] {
            assert_eq!(verdict(nr, ARCHITECTURE, [3, 0, 0, 0, 0, 0]), allow);
        }
        assert_eq!(verdict(libc::SYS_bind, 0x4000_0003, [3, 0, 16, 0, 0, 0]), allow); // i386
        assert_eq!(verdict(libc::SYS_bind | 0x4000_0000, ARCHITECTURE, [3, 0, 16, 0, 0, 0]), allow); // x32
    }

    #[test]
    fn without_udp_ports_no_worker_waits_when_it_joins_a_multicast_group() {
        let data = seccomp_data(libc::SYS_setsockopt, [3, 0, libc::IP_ADD_MEMBERSHIP as u64, 0, 8, 0]);
        let verdicts = [false, true].map(|has_udp| verdict_of(&filter(has_udp), &data));
        assert_eq!(verdicts, [libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF]);
    }

    #[test]
    fn every_system_call_and_option_gets_the_verdict_that_its_decoding_says() {
        let filter = filter(true);
        let levels = [libc::SOL_SOCKET, libc::IPPROTO_IP, libc::IPPROTO_TCP, libc::IPPROTO_IPV6, -1];
        for nr in 0..1024 {
            for level in levels {
                for option in -1..100 {
                    let data = seccomp_data(nr, [3, level as u64, option as u64, 0, 4, 0]);
                    assert!(agree(&filter, &data), "system call {nr}, level {level}, option {option}");
                }
            }
        }
    }

    proptest! {
        /// Only what the kernel reads decides, whatever else the registers hold.
        #[test]
        fn the_upper_halves_of_registers_make_no_difference(
            nr in prop::sample::select(vec![
                libc::SYS_bind, libc::SYS_listen, libc::SYS_setsockopt, libc::SYS_getsockopt, libc::SYS_unlinkat,
                libc::SYS_read,
            ]),
            level in prop::sample::select(vec![libc::IPPROTO_IPV6, libc::SOL_SOCKET, libc::IPPROTO_TCP]),
            option in prop::sample::select(vec![
                libc::IPV6_V6ONLY, libc::SO_REUSEPORT, libc::SO_ACCEPTCONN, libc::SO_REUSEADDR, libc::TCP_MD5SIG,
            ]),
            upper: u32,
            args: [u64; 6],
        ) {
            let upper = u64::from(upper) << 32;
            let chosen = [args[0], upper | level as u64, upper | option as u64, args[3], args[4], args[5]];
            for args in [args, chosen] {
                let data = seccomp_data(nr, args);
                prop_assert!(agree(&filter(true), &data), "{data:?}");
                if let Call::Bind { fd, len, .. } = decode(&data) {
                    prop_assert_eq!((u64::from(fd), len), (args[0] & 0xffff_ffff, args[2] & 0xffff_ffff));
                }
            }
        }
    }
}
