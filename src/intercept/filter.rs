//! The filter that workers are started behind, and what the calls are that it stops, as pure computation.

use libc::sock_filter;

use crate::kernel::bpf::op;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xC000_003E; // AUDIT_ARCH_X86_64 (linux/audit.h)
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xC000_00B7; // AUDIT_ARCH_AARCH64
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("reuse-run knows the system calls of x86_64 and aarch64 only");

/// The filter: notifies of bind, listen, the setsockopt calls that decide which sockets may be bound side by
/// side (IPV6_V6ONLY, SO_REUSEPORT), the question whether a socket listens (SO_ACCEPTCONN), and unlink, which
/// could take a Unix socket's path from others; allows all else, calls of another ABI included.
///
/// No memory can be read here, only the numbers in `struct seccomp_data` (linux/seccomp.h).
pub fn filter() -> Vec<sock_filter> {
    const NR: u32 = 0;
    const ARCH: u32 = 4;
    const fn arg(n: u32) -> u32 {
        16 + 8 * n // the lower half, both architectures being little-endian
    }
    let load = |offset| op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let equal = |k, jt, jf| op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, jf, k);
    let ret = |k| op(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    // The x32 ABI shares AUDIT_ARCH_X86_64 but sets bit 30 of the number, so none of these matches.
    #[cfg(target_arch = "x86_64")]
    let unlink = libc::SYS_unlink;
    #[cfg(not(target_arch = "x86_64"))]
    let unlink = libc::SYS_unlinkat;
    vec![
        load(ARCH),
        equal(ARCHITECTURE, 0, 18),
        load(NR),
        equal(libc::SYS_bind as u32, 17, 0),
        equal(libc::SYS_listen as u32, 16, 0),
        equal(unlink as u32, 15, 0),
        equal(libc::SYS_unlinkat as u32, 14, 0),
        equal(libc::SYS_getsockopt as u32, 0, 4),
        load(arg(1)),
        equal(libc::SOL_SOCKET as u32, 0, 10),
        load(arg(2)),
        equal(libc::SO_ACCEPTCONN as u32, 9, 8),
        equal(libc::SYS_setsockopt as u32, 0, 7),
        load(arg(1)),
        equal(libc::IPPROTO_IPV6 as u32, 0, 2),
        load(arg(2)),
        equal(libc::IPV6_V6ONLY as u32, 4, 3),
        equal(libc::SOL_SOCKET as u32, 0, 2),
        load(arg(2)),
        equal(libc::SO_REUSEPORT as u32, 1, 0),
        ret(libc::SECCOMP_RET_ALLOW),
        ret(libc::SECCOMP_RET_USER_NOTIF),
    ]
}

/// A system call that waits for its answer.
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
    /// getsockopt(SO_ACCEPTCONN): does it listen?
    DoesListen {
        fd: u32,
        value: u64,
        len: u64,
    },
    Unlink {
        from: Option<u32>,
        path: u64,
    },
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketOption {
    V6Only,
    ReusePort,
}

/// What the call is that the kernel tells of.
pub fn decode(data: &libc::seccomp_data) -> Call {
    // The kernel takes fds, levels and options as int: the upper halves of the registers mean nothing.
    let fd = data.args[0] as u32;
    match i64::from(data.nr) {
        libc::SYS_bind => Call::Bind { fd, address: data.args[1], len: u64::from(data.args[2] as u32) },
        libc::SYS_listen => Call::Listen { fd, backlog: data.args[1] as i32 },
        libc::SYS_setsockopt => {
            let option = match (data.args[1] as i32, data.args[2] as i32) {
                (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY) => SocketOption::V6Only,
                (libc::SOL_SOCKET, libc::SO_REUSEPORT) => SocketOption::ReusePort,
                _ => return Call::Other,
            };
            Call::SetOption { fd, option, value: data.args[3], len: u64::from(data.args[4] as u32) }
        }
        libc::SYS_getsockopt
            if (data.args[1] as i32, data.args[2] as i32) == (libc::SOL_SOCKET, libc::SO_ACCEPTCONN) =>
        {
            Call::DoesListen { fd, value: data.args[3], len: data.args[4] }
        }
        #[cfg(target_arch = "x86_64")]
        libc::SYS_unlink => Call::Unlink { from: None, path: data.args[0] },
        libc::SYS_unlinkat if data.args[2] as i32 & libc::AT_REMOVEDIR == 0 => {
            Call::Unlink { from: (fd as i32 != libc::AT_FDCWD).then_some(fd), path: data.args[1] }
        }
        _ => Call::Other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs the filter as the kernel would.
    fn verdict(nr: i64, arch: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend((nr as u32).to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend(0u64.to_le_bytes());
        args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
        let (filter, mut a, mut pc) = (filter(), 0u32, 0);
        loop {
            let op = filter[pc];
            pc += 1;
            match u32::from(op.code) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    let at = op.k as usize;
                    a = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
                }
                code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => {
                    pc += usize::from(if a == op.k { op.jt } else { op.jf });
                }
                code if code == libc::BPF_RET | libc::BPF_K => return op.k,
                code => panic!("unexpected instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn the_filter_stops_bind_listen_unlink_and_three_socket_options_and_nothing_else() {
        let option = |level: i32, name: i32| {
            verdict(libc::SYS_setsockopt, ARCHITECTURE, [3, level as u64, name as u64, 0, 4, 0])
        };
        let (allow, notify) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF);
        assert_eq!(verdict(libc::SYS_bind, ARCHITECTURE, [3, 0, 16, 0, 0, 0]), notify);
        assert_eq!(verdict(libc::SYS_listen, ARCHITECTURE, [3, 128, 0, 0, 0, 0]), notify);
        assert_eq!(option(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY), notify);
        assert_eq!(option(libc::SOL_SOCKET, libc::SO_REUSEPORT), notify);
        assert_eq!(option(libc::SOL_SOCKET, libc::SO_REUSEADDR), allow);
        assert_eq!(option(libc::SOL_SOCKET, libc::IPV6_V6ONLY), allow);
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

    proptest! {
        /// What the filter stops is understood as what it is, whatever else is in the registers.
        #[test]
        fn a_call_is_understood_by_the_halves_of_registers_that_the_kernel_looks_at(
            nr in prop::sample::select(vec![
                libc::SYS_bind, libc::SYS_listen, libc::SYS_setsockopt, libc::SYS_getsockopt, libc::SYS_read,
            ]),
            args: [u64; 6],
        ) {
            let data = libc::seccomp_data { nr: nr as i32, arch: ARCHITECTURE, instruction_pointer: 0, args };
            let call = decode(&data);
            let stopped = verdict(nr, ARCHITECTURE, args) == libc::SECCOMP_RET_USER_NOTIF;
            prop_assert_eq!(stopped, call != Call::Other);
            if let Call::Bind { fd, len, .. } = call {
                prop_assert_eq!((u64::from(fd), len), (args[0] & 0xffff_ffff, args[2] & 0xffff_ffff));
            }
        }

        #[test]
        fn socket_options_are_told_apart_as_the_filter_tells_them(
            level in prop::sample::select(vec![libc::IPPROTO_IPV6, libc::SOL_SOCKET, libc::IPPROTO_TCP]),
            name in prop::sample::select(vec![libc::IPV6_V6ONLY, libc::SO_REUSEPORT, libc::SO_REUSEADDR]),
            upper: u32,
        ) {
            let upper = u64::from(upper) << 32;
            let args = [3, upper | level as u64, upper | name as u64, 0, 4, 0];
            let data = libc::seccomp_data {
                nr: libc::SYS_setsockopt as i32, arch: ARCHITECTURE, instruction_pointer: 0, args,
            };
            let stopped = verdict(libc::SYS_setsockopt, ARCHITECTURE, args) == libc::SECCOMP_RET_USER_NOTIF;
            prop_assert_eq!(stopped, decode(&data) != Call::Other);
        }
    }
}
