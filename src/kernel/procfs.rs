//! Reads /proc (proc(5)): threads and processes, their sockets, and settings of the network.
//!
//! If a thread is gone, permission is lacking or a text isn't as proc(5) describes it, a function returns an
//! error or nothing. A worker can change much of this at any time, so callers must not trust it further.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::iter;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::kernel::{helper, sys};
use crate::words::printable;

pub(super) fn path(pid: Pid, rest: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{rest}"))
}

/// What a file of /proc says, read at once: `fs::read_to_string` asks for its size, which is 0, and begins with 32 bytes.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let mut text = String::with_capacity(PAGE);
    File::open(path)?.take(u64::MAX).read_to_string(&mut text)?;
    Ok(text)
}

const PAGE: usize = 4096;

/// The value of a line such as "Tgid:\t42" in a table such as /proc/PID/status. `name` includes the colon.
pub(super) fn field<'a>(table: &'a str, name: &str) -> Option<&'a str> {
    table.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// Reads up to `len` bytes of a thread's memory. It returns fewer if the readable memory ends before.
pub fn memory(tid: Pid, address: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let read = File::open(path(tid, "mem"))?.read_at(&mut bytes, address)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Writes to a thread's memory.
pub fn set_memory(tid: Pid, address: u64, bytes: &[u8]) -> io::Result<()> {
    open_memory(tid)?.write_all_at(bytes, address)
}

/// A thread's memory, to read and to write.
pub fn open_memory(tid: Pid) -> io::Result<File> {
    File::options().read(true).write(true).open(path(tid, "mem"))
}

/// The inode number of a thread's fd if that is a socket.
pub fn socket_inode(tid: Pid, fd: u32) -> io::Result<Option<u64>> {
    let link = fs::read_link(path(tid, &format!("fd/{fd}")))?;
    Ok(parse_socket_link(link.as_os_str()))
}

pub(super) fn parse_socket_link(link: &OsStr) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The kernel's name for the protocol of a socket: "TCP", "TCPv6", "UDP", "MPTCP", "NETLINK" and so on
/// (`sockfs_xattr_get`, net/socket.c).
pub fn socket_protocol(tid: Pid, fd: u32) -> io::Result<String> {
    const MAX_NAME_LENGTH: usize = 64;
    let name = OsStr::new("system.sockprotoname");
    let value = sys::getxattr(&path(tid, &format!("fd/{fd}")), name, MAX_NAME_LENGTH)?;
    Ok(String::from_utf8_lossy(&value).trim_end_matches('\0').to_owned())
}

/// The flags of an open fd as fcntl(2) has them: O_NONBLOCK, O_CLOEXEC.
pub fn fd_flags(tid: Pid, fd: u32) -> io::Result<i32> {
    let text = read(&path(tid, &format!("fdinfo/{fd}")))?;
    parse_fd_flags(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_fd_flags(fdinfo: &str) -> Option<i32> {
    i32::from_str_radix(field(fdinfo, "flags:")?, 8).ok()
}

/// The users, groups and capabilities that decide what a thread may do (credentials(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The real, effective, saved and filesystem uid.
    pub uids: [u32; 4],
    /// The same four gids, then the supplementary groups.
    pub gids: Vec<u32>,
    /// The effective capabilities, one bit each (capabilities(7)).
    pub effective: u64,
}

/// Whether /proc has the numbers of this process's PID namespace (pid_namespaces(7)). Otherwise they are those of strangers.
///
/// # Errors
/// If /proc isn't mounted.
pub fn has_own_numbers() -> io::Result<bool> {
    Ok(fs::read_link("/proc/self")?.as_os_str() == Pid::this().to_string().as_str())
}

/// The process that a thread belongs to.
pub fn process_of(tid: Pid) -> io::Result<Pid> {
    let text = read(&path(tid, "status"))?;
    let pid = field(&text, "Tgid:").and_then(|pid| pid.parse().ok());
    pid.map(Pid::from_raw).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

pub fn credentials(tid: Pid) -> io::Result<Credentials> {
    let text = read(&path(tid, "status"))?;
    parse_credentials(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_credentials(status: &str) -> Option<Credentials> {
    let mut uids = [0; 4];
    let mut words = field(status, "Uid:")?.split_whitespace();
    for uid in &mut uids {
        *uid = words.next()?.parse().ok()?;
    }
    let gids = field(status, "Gid:")?.split_whitespace();
    let groups = field(status, "Groups:").unwrap_or_default().split_whitespace();
    let gids = gids.chain(groups).map(str::parse).collect::<Result<_, _>>().ok()?;
    let effective = u64::from_str_radix(field(status, "CapEff:")?, 16).ok()?;
    Some(Credentials { uids, gids, effective })
}

/// The capabilities that the file of a thread's program is permitted (capabilities(7), "File capabilities").
///
/// # Errors
/// ENODATA if it has none; or why it can't be read.
pub fn program_capabilities(tid: Pid) -> io::Result<u64> {
    const MAX_LENGTH: usize = 24; // struct vfs_ns_cap_data, linux/capability.h
    let value = sys::getxattr(&path(tid, "exe"), OsStr::new("security.capability"), MAX_LENGTH)?;
    parse_capabilities(&value).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// From a `struct vfs_cap_data`: a word of flags, then for each half the permitted and the inheritable ones.
fn parse_capabilities(value: &[u8]) -> Option<u64> {
    let half = |at| Some(u64::from(u32::from_le_bytes(value.get(at..at + 4)?.try_into().ok()?)));
    Some(half(4)? | half(12).unwrap_or(0) << 32)
}

/// Whether a process ignores a signal.
pub fn ignores(pid: Pid, signal: Signal) -> bool {
    fs::read_to_string(path(pid, "status")).is_ok_and(|text| has_signal(&text, "SigIgn:", signal as u32))
}

/// Whether a line of /proc/PID/status such as "SigIgn:" has a signal.
fn has_signal(status: &str, line: &str, signal: u32) -> bool {
    let set = field(status, line).and_then(|set| u64::from_str_radix(set, 16).ok());
    set.is_some_and(|set| set & 1 << (signal - 1) != 0)
}

/// Whether this process has a controlling terminal. The kernel takes it away when the terminal hangs up.
pub fn has_terminal() -> bool {
    const TTY_NR: usize = 7;
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    stat_field(&stat, TTY_NR).is_some_and(|device| device != 0)
}

/// The umask of the process that a thread belongs to.
pub fn umask(tid: Pid) -> io::Result<u32> {
    let status = read(&path(tid, "status"))?;
    let mask = field(&status, "Umask:").and_then(|mask| u32::from_str_radix(mask, 8).ok());
    mask.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Whether a path leads a thread to the same file as this process: both have the same mounts and root.
pub fn same_mounts(tid: Pid) -> bool {
    let of = |what: &str, pid: Pid| {
        let metadata = fs::metadata(path(pid, what));
        metadata.map(|metadata| (metadata.dev(), metadata.ino())).ok()
    };
    ["ns/mnt", "root"].iter().all(|what| {
        let its = of(what, tid);
        its.is_some() && its == of(what, Pid::this())
    })
}

/// A line of /proc/net/unix (proc_net(5)).
#[derive(Debug, PartialEq, Eq)]
pub struct UnixSocket {
    pub inode: u64,
    pub is_stream: bool,
    pub is_connected: bool,
    /// The name that it was bound to. An accepted connection has its listener's.
    pub name: String,
}

/// All Unix sockets of this network namespace.
pub fn unix_sockets() -> Vec<UnixSocket> {
    let table = fs::read("/proc/net/unix").unwrap_or_default(); // names need not be UTF-8
    parse_unix_sockets(&String::from_utf8_lossy(&table))
}

/// The inode numbers of the UDP sockets of this network namespace that have a port (proc_net(5)).
pub fn udp_sockets() -> HashSet<u64> {
    let table = |name: &str| fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default();
    ["udp", "udp6"].into_iter().flat_map(|name| parse_udp_sockets(&table(name))).collect()
}

fn parse_udp_sockets(table: &str) -> Vec<u64> {
    const INODE: usize = 9;
    table.lines().filter_map(|line| line.split_whitespace().nth(INODE)?.parse().ok()).collect()
}

fn parse_unix_sockets(table: &str) -> Vec<UnixSocket> {
    const STREAM: &str = "0001";
    const CONNECTED: &str = "03";
    let row = |line: &str| {
        let mut words = line.split_whitespace();
        let (kind, state, inode) = (words.nth(4)?, words.next()?, words.next()?);
        // The name is all that follows one space; it may contain spaces itself.
        let end_of_inode = inode.as_ptr().addr() + inode.len() - line.as_ptr().addr();
        let name = line[end_of_inode..].strip_prefix(' ').unwrap_or_default().to_owned();
        let (is_stream, is_connected) = (kind == STREAM, state == CONNECTED);
        Some(UnixSocket { inode: inode.parse().ok()?, is_stream, is_connected, name })
    };
    table.split('\n').filter_map(row).collect() // a name may end with a carriage return
}

/// The inode number of a socket of this process, the same that /proc/PID/fd shows.
pub fn inode(fd: BorrowedFd) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(fd)?.st_ino)
}

/// Whether a process is in the PID namespace and in the user namespace of this process (pid_namespaces(7),
/// user_namespaces(7)). `pid` is its number in the PID namespace of this process.
///
/// The links in /proc/PID/ns tell, but only to a reader with ptrace access. Everybody may read the other two signs. A
/// process that has a number here is in this PID namespace or below it, and has one number for each namespace down to its
/// own (NSpid). Its uid_map is shown as seen from here: another user namespace has another map, unless root gave it all
/// users.
///
/// # Errors
/// When /proc doesn't show the process, or belongs to another PID namespace.
pub fn shares_namespaces(pid: Pid) -> io::Result<bool> {
    if !has_own_numbers()? {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let depth = |pid: Pid| Ok::<_, io::Error>(parse_depth(&fs::read_to_string(path(pid, "status"))?));
    let map = |pid: Pid| fs::read_to_string(path(pid, "uid_map"));
    let namespace = |pid: Pid, name: &str| fs::metadata(path(pid, name)).map(|it| (it.dev(), it.ino()));
    // An empty map says nothing: any process may make a user namespace without one.
    let (its, ours) = (map(pid)?, map(Pid::this())?);
    let by_signs = depth(pid)? == depth(Pid::this())? && its == ours && !ours.is_empty();
    let by_link = |name| match (namespace(pid, name), namespace(Pid::this(), name)) {
        (Ok(its), Ok(ours)) => its == ours,
        _ => true,
    };
    Ok(by_signs && by_link("ns/pid") && by_link("ns/user"))
}

/// In how many PID namespaces a process has a number.
fn parse_depth(status: &str) -> Option<usize> {
    Some(field(status, "NSpid:")?.split_whitespace().count())
}

/// Whether a thread is in this process's namespace of a kind: "net", "user" and so on (namespaces(7)). Not if it can't be
/// read.
pub fn same_namespace(tid: Pid, kind: &str) -> bool {
    let namespace = |pid| {
        let metadata = fs::metadata(path(pid, &format!("ns/{kind}")));
        metadata.map(|metadata| (metadata.dev(), metadata.ino())).ok()
    };
    let its = namespace(tid);
    its.is_some() && its == namespace(Pid::this())
}

/// Whether a thread runs under the same profile of AppArmor, or context of SELinux or Smack, as this process, as far as the
/// system has any (proc_pid_attr(5)).
pub fn same_profile(tid: Pid) -> bool {
    static OURS: OnceLock<String> = OnceLock::new();
    let profile = |pid| read(&path(pid, "attr/current")).unwrap_or_default();
    profile(tid) == *OURS.get_or_init(|| profile(Pid::this()))
}

/// A process and its descendants, except those behind a process that has ended: these have another parent
/// now.
pub fn tree(root: Pid) -> Vec<Pid> {
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(pid) = tree.get(next).copied() {
        next += 1;
        tree.extend(children(pid).into_iter().filter(|child| !tree.contains(child)).collect::<Vec<_>>());
    }
    tree
}

/// Whether a process is in the [`tree`] of another. This takes as many steps as there are processes between them.
pub fn is_of_tree(pid: Pid, root: Pid) -> bool {
    const MAX_DEPTH: usize = 64;
    let parents = iter::successors(Some(pid), |pid| parent(*pid));
    parents.take(MAX_DEPTH).any(|pid| pid == root)
}

fn parent(pid: Pid) -> Option<Pid> {
    const PPID: usize = 4;
    let stat = fs::read_to_string(path(pid, "stat")).ok()?;
    stat_field(&stat, PPID).map(|parent| Pid::from_raw(parent as i32)).filter(|parent| parent.as_raw() > 0)
}

/// When a process was started, in ticks since the boot. A zombie has it still.
pub fn start_time(pid: Pid) -> Option<u64> {
    const START_TIME: usize = 22;
    stat_field(&fs::read_to_string(path(pid, "stat")).ok()?, START_TIME)
}

/// Behind how many seccomp filters a process is.
pub fn filters(pid: Pid) -> Option<u32> {
    field(&fs::read_to_string(path(pid, "status")).ok()?, "Seccomp_filters:")?.parse().ok()
}

/// The children of each shell among a process and its descendants. A shell that gets SIGINT doesn't pass it
/// on, and acts on it only when its child has ended.
pub fn children_of_shells(root: Pid) -> Vec<Pid> {
    const SHELLS: [&str; 6] = ["sh", "dash", "bash", "ash", "ksh", "zsh"];
    let is_shell = |pid: &Pid| name(*pid).is_some_and(|name| SHELLS.contains(&name.trim_end()));
    tree(root).into_iter().filter(is_shell).flat_map(children).collect()
}

/// The children of all threads of a process, adopted ones included.
pub fn children(pid: Pid) -> Vec<Pid> {
    let of_thread = |tid: Pid| fs::read_to_string(path(pid, &format!("task/{tid}/children")));
    let texts = threads(pid).into_iter().flat_map(of_thread);
    texts.flat_map(|text| parse_children(&text)).collect()
}

fn parse_children(text: &str) -> Vec<Pid> {
    text.split_whitespace().filter_map(|word| word.parse().ok()).map(Pid::from_raw).collect()
}

/// All threads of a process; none if it has ended.
pub fn threads(pid: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir(path(pid, "task")) else { return Vec::new() };
    let tid = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    entries.flatten().filter_map(tid).map(Pid::from_raw).collect()
}

/// Whether a process lives, and if not how it ended, as far as /proc shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Nothing shows that it ends.
    Lives,
    /// This signal kills it. It may still have files open.
    Killed(u32),
    /// Its main thread has ended in another way, or the process is gone.
    Ended,
}

/// Whether a process lives (proc_pid_stat(5)).
pub fn life(pid: Pid) -> Life {
    match fs::read_to_string(path(pid, "stat")) {
        Ok(stat) => parse_life(&stat).unwrap_or(Life::Ended),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Life::Ended,
        Err(_) => Life::Lives, // nothing shows it
    }
}

fn parse_life(stat: &str) -> Option<Life> {
    const FLAGS: usize = 9;
    const EXIT_CODE: usize = 52; // 0 for a reader that has no ptrace access
    const PF_EXITING: u64 = 0x4; // linux/sched.h
    const PF_SIGNALED: u64 = 0x400; // also after another thread's exit_group(2) (get_signal, kernel/signal.c)
    let flags = stat_field(stat, FLAGS)?;
    let signal = (stat_field(stat, EXIT_CODE)? & 0x7f) as u32; // as wait(2) has it
    let is_zombie = stat.get(stat.rfind(')')? + 1..)?.starts_with(" Z");
    Some(match (flags & PF_SIGNALED != 0, signal) {
        // The kernel sets the flag a moment before the code.
        (true, 0) if !is_zombie => Life::Lives,
        (true, 1..) => Life::Killed(signal),
        _ if is_zombie || flags & PF_EXITING != 0 => Life::Ended,
        _ => Life::Lives,
    })
}

/// A field of /proc/PID/stat by its number in proc_pid_stat(5), from 3 on.
fn stat_field(stat: &str, number: usize) -> Option<u64> {
    const FIRST: usize = 3; // field 2, the name, may contain any character
    stat.get(stat.rfind(')')? + 1..)?.split_whitespace().nth(number - FIRST)?.parse().ok()
}

/// All processes except this one and its own.
pub fn others() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw);
    pids.filter(|pid| *pid != Pid::this() && !helper::is_helper(*pid))
}

/// Whether a process has ended or was sent SIGKILL. It may have files open for a moment.
pub fn is_ending(pid: Pid) -> bool {
    let status = fs::read_to_string(path(pid, "status")).unwrap_or_default();
    let is_killed = |name| has_signal(&status, name, Signal::SIGKILL as u32);
    life(pid) != Life::Lives || is_killed("SigPnd:") || is_killed("ShdPnd:")
}

/// The name of a process, which it can change (proc_pid_comm(5)).
pub fn name(pid: Pid) -> Option<String> {
    fs::read_to_string(path(pid, "comm")).ok()
}

/// The command line of a process as one printable line.
pub fn command_line(pid: u32) -> String {
    printable(&fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default())
}

/// Processor time and resident memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu: Duration,
    pub rss_kib: u64,
}

/// Whether the main thread of a process runs, or is in a system call other than [`WAITING_CALLS`]. `None` if
/// that can't be known (proc_pid_syscall(5)).
pub fn is_main_thread_busy(pid: Pid) -> Option<bool> {
    let text = fs::read_to_string(path(pid, "syscall")).ok()?;
    let number = text.split(' ').next().and_then(|number| number.parse().ok());
    // Instead of a number the file can also say "running".
    Some(!number.is_some_and(|number| WAITING_CALLS.contains(&number)))
}

/// The system calls in which programs wait for connections and requests.
const WAITING_CALLS: &[libc::c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_io_uring_enter,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_select,
];

/// What a process and its descendants use together.
pub fn usage(pid: Pid) -> Usage {
    let mut sum = Usage::default();
    for pid in tree(pid) {
        let read = |file: &str| fs::read_to_string(path(pid, file)).unwrap_or_default();
        sum.cpu += parse_cpu(&read("stat")).unwrap_or_default();
        let status = read("status");
        let rss = field(&status, "VmRSS:").and_then(|rss| rss.trim_end_matches(" kB").parse::<u64>().ok());
        sum.rss_kib += rss.unwrap_or(0);
    }
    sum
}

/// User and system time in /proc/PID/stat. It counts ticks, 100 a second on every kernel (USER_HZ, time(7)).
fn parse_cpu(stat: &str) -> Option<Duration> {
    const UTIME: usize = 14;
    const STIME: usize = 15;
    let ticks = stat_field(stat, UTIME)?.saturating_add(stat_field(stat, STIME)?);
    Some(Duration::from_millis(ticks.saturating_mul(10)))
}

/// The lowest port that can be bound without CAP_NET_BIND_SERVICE (net.ipv4.ip_unprivileged_port_start,
/// ip(7)).
pub fn first_unprivileged_port() -> u16 {
    let text = read("/proc/sys/net/ipv4/ip_unprivileged_port_start".as_ref()).unwrap_or_default();
    text.trim().parse().unwrap_or(1024)
}

/// Whether the kernel has IPv6 (proc_net(5)).
pub fn has_ipv6() -> bool {
    fs::exists("/proc/net/if_inet6").unwrap_or(false)
}

/// Whether the connections in a listener's queue move to another listener of its group when it is closed
/// (net.ipv4.tcp_migrate_req, ip-sysctl).
pub fn migrates_requests() -> bool {
    fs::read_to_string("/proc/sys/net/ipv4/tcp_migrate_req").is_ok_and(|text| text.trim() == "1")
}

/// Whether IPv6 sockets are IPv6-only by default (net.ipv6.bindv6only, ipv6(7)).
pub fn v6only_by_default() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/bindv6only").is_ok_and(|text| text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bound_udp_sockets_are_listed_by_inode() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
                     2096: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0 0\n";
        assert_eq!(parse_udp_sockets(table), [4711]);
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(udp_sockets().contains(&inode(std::os::fd::AsFd::as_fd(&socket)).unwrap()));
    }

    #[test]
    fn links_and_tables_are_read_as_proc_writes_them() {
        assert_eq!(parse_socket_link(OsStr::new("socket:[4242]")), Some(4242));
        assert_eq!(parse_socket_link(OsStr::new("pipe:[4242]")), None);
        assert_eq!(parse_socket_link(OsStr::new("/tmp/socket:[1]")), None);
        assert_eq!(parse_fd_flags("pos:\t0\nflags:\t02004002\nmnt_id:\t9\n"), Some(0o2004002));
        assert_eq!(parse_fd_flags("pos:\t0\n"), None);
        let status =
            "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t5\t5\t5\nGroups:\t7 8 \nCapEff:\t0000000000000400\n";
        let (uids, gids) = ([1, 2, 3, 4], vec![5, 5, 5, 5, 7, 8]);
        assert_eq!(parse_credentials(status), Some(Credentials { uids, gids, effective: 0x400 }));
        assert_eq!(parse_credentials("Uid:\t1\t2\t3\nCapEff:\t0\n"), None);
        let of_file = [1, 0, 0, 2, 0, 4, 0, 0, 9, 9, 9, 9, 1, 0, 0, 0, 9, 9, 9, 9];
        assert_eq!(parse_capabilities(&of_file), Some(0x1_0000_0400));
        assert_eq!(parse_capabilities(&of_file[..12]), Some(0x400), "version 1 has one half");
        assert_eq!(parse_capabilities(&of_file[..4]), None);
        let table = "Num RefCount Protocol Flags Type St Inode Path\n\
                     0: 00000003 00000000 00000000 0001 03    41 /run/a  b\n\
                     0: 00000002 00000000 00010000 0005 01 42 @c\n\
                     0: 00000002 00000000 00000000 0002 01 1234567\n";
        let row = |inode, is_stream, is_connected, name: &str| UnixSocket {
            inode,
            is_stream,
            is_connected,
            name: name.to_owned(),
        };
        let rows =
            [row(41, true, true, "/run/a  b"), row(42, false, false, "@c"), row(1234567, false, false, "")];
        assert_eq!(parse_unix_sockets(table), rows);
        assert!(has_signal("SigIgn:\t0000000000000003\n", "SigIgn:", 1));
        assert!(!has_signal("SigIgn:\t0000000000000002\n", "SigIgn:", 1));
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 90 0 0 0 120 3 9 9 20 0 1 0";
        assert_eq!(parse_cpu(stat), Some(Duration::from_millis(1230)));
        assert_eq!(parse_cpu("7 (a) S 1"), None);
        let life = |state: char, flags: u64, code: u32| {
            parse_life(&format!("7 (a) b) {state} 1 7 7 0 -1 {flags} {}{code}", "0 ".repeat(42))).unwrap()
        };
        assert_eq!([life('R', 0x400000, 0), life('T', 0x400000, 19)], [Life::Lives; 2]);
        assert_eq!([life('R', 0x400404, 0x82), life('Z', 0x400404, 2)], [Life::Killed(2); 2]);
        assert_eq!(life('R', 0x400404, 0), Life::Lives, "its code may come later");
        assert_eq!([life('Z', 0x400404, 2 << 8), life('R', 0x400004, 0)], [Life::Ended; 2]);
        assert_eq!(parse_depth("Tgid:\t7\nNSpid:\t7\t1\n"), Some(2));
        assert_eq!(parse_depth("Tgid:\t7\n"), None);
        assert_eq!(parse_children("12 34 "), [Pid::from_raw(12), Pid::from_raw(34)]);
    }

    #[test]
    fn a_process_finds_its_own_memory_sockets_and_rights() {
        let me = Pid::this();
        let secret = *b"reuse-run";
        assert_eq!(memory(me, secret.as_ptr() as u64, secret.len()).unwrap(), secret);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&listener) as u32;
        let inode = socket_inode(me, fd).unwrap().unwrap();
        assert!(crate::kernel::open_sockets::socket_inodes(me).unwrap().contains(&inode));
        assert_eq!(socket_protocol(me, fd).unwrap(), "TCP");
        assert_ne!(fd_flags(me, fd).unwrap() & libc::O_CLOEXEC, 0);
        assert_eq!(credentials(me).unwrap().uids[1], nix::unistd::geteuid().as_raw());
        assert_eq!(tree(me)[0], me);
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let its = Pid::from_raw(child.id() as i32);
        assert!(is_of_tree(its, me) && is_of_tree(me, me) && tree(me).contains(&its));
        assert!(!is_of_tree(me, its) && !is_of_tree(Pid::from_raw(i32::MAX), me));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(shares_namespaces(me).unwrap());
    }

    /// A process chooses its name, its arguments and the paths of its sockets.
    mod fuzz {
        use super::*;

        proptest! {
            /// A process chooses its name, which is part of its status.
            #[test]
            fn a_process_name_cannot_pass_for_a_line_of_the_kernel(name in "[^\n\\\\]{0,15}", uid: u32, effective: u64) {
                let status = format!(
                    "Name:\t{name}\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nGid:\t{uid}\nSigIgn:\t{:016x}\nCapEff:\t{effective:016x}\n", 1 << 9
                );
                prop_assert_eq!(parse_credentials(&status), Some(Credentials { uids: [uid; 4], gids: vec![uid], effective }));
                prop_assert!(has_signal(&status, "SigIgn:", 10));
            }

            #[test]
            fn no_text_makes_a_parser_panic(text: String, signal in 1u32..=64) {
                let _ = parse_credentials(&text);
                let _ = parse_credentials(&format!("Uid:{text}\nCapEff:{text}"));
                let _ = has_signal(&format!("SigIgn:{text}"), "SigIgn:", signal);
                let _ = parse_fd_flags(&format!("flags:{text}"));
                prop_assert!(parse_children(&text).iter().all(|pid| text.contains(&pid.to_string()) || pid.as_raw() >= 0));
                let link = parse_socket_link(OsStr::new(&text));
                prop_assert!(link.is_none() || text.starts_with("socket:["));
            }

            #[test]
            fn numbers_are_read_as_they_were_written(inode: u64, flags in 0i32..i32::MAX, pids: Vec<u16>) {
                let link = format!("socket:[{inode}]");
                prop_assert_eq!(parse_socket_link(OsStr::new(&link)), Some(inode));
                prop_assert_eq!(parse_fd_flags(&format!("pos:\t0\nflags:\t0{flags:o}\n")), Some(flags));
                let text: String = pids.iter().map(|pid| format!("{pid} ")).collect();
                let read: Vec<i32> = parse_children(&text).into_iter().map(Pid::as_raw).collect();
                prop_assert_eq!(read, pids.into_iter().map(i32::from).collect::<Vec<_>>());
            }

            /// A name can't make its own line look like another socket's. (It may hold a newline: see [`unix_sockets`].)
            #[test]
            fn a_socket_keeps_its_row_whatever_its_name_is(inode: u64, name in "[^\n ][^\n]{0,30}", is_stream: bool) {
                let kind = if is_stream { 1 } else { 5 };
                let table = format!("Num RefCount\n0000000000000000: 00000002 00000000 00010000 {kind:04X} 01 {inode:>5} {name}\n");
                let row = UnixSocket { inode, is_stream, is_connected: false, name };
                prop_assert_eq!(parse_unix_sockets(&table), [row]);
            }

            #[test]
            fn no_table_makes_a_parser_panic(table in "(0000: 1 1 1 000[0-9] 0[0-9] [0-9]{0,22} ?[^\n]{0,9}\n|[ -~\n]{0,30}){0,5}") {
                let rows = parse_unix_sockets(&table);
                prop_assert!(rows.len() <= table.lines().count());
                prop_assert!(rows.iter().all(|row| table.contains(&row.inode.to_string()) && table.contains(&row.name)));
                let _ = (parse_depth(&table), parse_life(&table), parse_cpu(&table));
            }

            /// The name is the second field, in parentheses, and may hold parentheses itself.
            #[test]
            fn the_fields_of_a_stat_are_found_behind_any_name(
                name in "[^\n]{0,15}", state in "[RSDZTX]", numbers in proptest::collection::vec(any::<u64>(), 49)
            ) {
                let text: String = numbers.iter().map(|number| format!(" {number}")).collect();
                let stat = format!("7 ({name}) {state}{text}\n");
                for (index, number) in numbers.iter().enumerate() {
                    prop_assert_eq!(stat_field(&stat, index + 4), Some(*number));
                }
                prop_assert_eq!(stat_field(&stat, 53), None);
                let cpu = numbers[10].saturating_add(numbers[11]).saturating_mul(10);
                prop_assert_eq!(parse_cpu(&stat), Some(Duration::from_millis(cpu)));
                prop_assert!(parse_life(&stat).is_some());
            }

            #[test]
            fn capabilities_are_read_from_both_halves(flags: u32, low: u32, high: u32, inheritable: u32, len in 0usize..=20) {
                let words = [flags, low, inheritable, high, inheritable];
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let expected = match len {
                    0..8 => None,
                    8..16 => Some(u64::from(low)),
                    _ => Some(u64::from(low) | u64::from(high) << 32),
                };
                prop_assert_eq!(parse_capabilities(&bytes[..len]), expected);
            }
        }
    }
}
