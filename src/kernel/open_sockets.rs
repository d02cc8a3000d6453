//! Which processes have which sockets open, as /proc/PID/fd shows it (proc_pid_fd(5)). As for all of [`super::procfs`], a worker can
//! change it at any time.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;

use nix::unistd::Pid;

use crate::kernel::procfs::{
    children, command_line, field, is_ending, others, parse_socket_link, path, read, tree,
};

/// Of a process and its descendants those that have such a socket open, without what is below them. One that can't be read
/// may have one.
pub fn first_holders(root: Pid, is_wanted: &impl Fn(u64) -> bool) -> Vec<Pid> {
    const MAX_PROCESSES: usize = 10_000;
    let (mut searched, mut holders) = (vec![root], Vec::new());
    let mut next = 0;
    while let Some(pid) = searched.get(next).copied().filter(|_| next < MAX_PROCESSES) {
        next += 1;
        let may_have = |it: io::Result<Option<(u32, u64)>>| {
            it.map_or(true, |it| it.is_some_and(|(_, inode)| is_wanted(inode)))
        };
        if each_descriptor(pid).map_or(true, |mut open| open.any(may_have)) {
            holders.push(pid);
        } else {
            let more = children(pid).into_iter().filter(|child| !searched.contains(child));
            searched.extend(more.collect::<Vec<_>>());
        }
    }
    holders
}

/// The inode numbers of all sockets that a process has open; none if it has ended.
///
/// # Errors
/// When this process has no ptrace access (ptrace(2), "Ptrace access mode checking").
pub fn socket_inodes(pid: Pid) -> io::Result<Vec<u64>> {
    Ok(sockets(pid)?.into_iter().map(|(_, inode)| inode).collect())
}

/// The fd number and the inode number of each socket that a process has open; none if it has ended.
///
/// # Errors
/// As for [`socket_inodes`].
pub fn sockets(pid: Pid) -> io::Result<Vec<(u32, u64)>> {
    each_descriptor(pid)?.filter_map(Result::transpose).collect()
}

/// As [`sockets`], one after the other, with `None` for each descriptor that is no socket.
///
/// Root may list them without ptrace access, by CAP_DAC_OVERRIDE (`proc_fd_permission`, fs/proc/fd.c), but not see what
/// they are: then each of them is an error.
///
/// # Errors
/// As for [`socket_inodes`].
pub fn each_descriptor(pid: Pid) -> io::Result<impl Iterator<Item = io::Result<Option<(u32, u64)>>>> {
    let fds = match fs::read_dir(path(pid, "fd")) {
        Ok(fds) => Some(fds),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => None,
        Err(error) => return Err(error),
    };
    let socket = |fd: fs::DirEntry| match fs::read_link(fd.path()) {
        Ok(link) => {
            let fd = fd.file_name().to_str().and_then(|fd| fd.parse().ok());
            Ok(fd.zip(parse_socket_link(link.as_os_str())))
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(error),
        Err(_) => Ok(None), // it is closed by now, or a file whose path is too long
    };
    Ok(fds.into_iter().flatten().flatten().map(socket))
}

/// Whether descriptors wait in the queue of a Unix socket for the process that will receive them (`unix_show_fdinfo`,
/// net/unix/af_unix.c). Meanwhile no process has them.
pub fn has_descriptors_waiting(pid: Pid, fd: u32) -> bool {
    let waiting = read(&path(pid, &format!("fdinfo/{fd}")));
    waiting.is_ok_and(|text| field(&text, "scm_fds:").is_some_and(|count| count != "0"))
}

/// The inode numbers of the sockets that a process and its descendants have open, as far as these can be read.
pub fn sockets_of_tree(root: Pid) -> impl Iterator<Item = u64> {
    tree(root).into_iter().flat_map(|pid| socket_inodes(pid).unwrap_or_default())
}

/// Which of these sockets, given by inode number, other processes may have open. These are all of them if
/// `suspect` or one of its descendants can't be read.
pub fn open_elsewhere(suspect: Pid, inodes: &HashSet<u64>) -> HashSet<u64> {
    if tree(suspect).into_iter().any(|pid| socket_inodes(pid).is_err()) {
        return inodes.clone();
    }
    let open = others().flat_map(|pid| socket_inodes(pid).unwrap_or_default());
    open.filter(|inode| inodes.contains(inode)).collect()
}

/// Whether another process may have the socket open. It may if `suspect` or one of its descendants can't be
/// read. These are searched first.
pub fn is_open_elsewhere(suspect: Pid, inode: u64) -> bool {
    let may_have = |pid: Pid| socket_inodes(pid).map_or(true, |open| open.contains(&inode));
    let has = |pid: Pid| socket_inodes(pid).is_ok_and(|open| open.contains(&inode));
    tree(suspect).into_iter().any(may_have) || others().any(has)
}

/// Which of these sockets, given by inode number, living processes have open, and one process for each of them. Processes
/// that this one may not read are left out.
pub fn holders(inodes: &HashSet<u64>) -> HashMap<u64, Pid> {
    let mut holders = HashMap::new();
    for pid in others() {
        let mut open = socket_inodes(pid).unwrap_or_default();
        open.retain(|inode| inodes.contains(inode));
        if !open.is_empty() && !is_ending(pid) {
            holders.extend(open.into_iter().map(|inode| (inode, pid)));
        }
    }
    holders
}

/// A process that has the socket open, and its command line. `None` if none of those that this process may
/// read has it.
pub fn socket_owner(inode: u64) -> Option<(Pid, String)> {
    let pid = others().find(|pid| socket_inodes(*pid).is_ok_and(|open| open.contains(&inode)))?;
    Some((pid, command_line(pid.as_raw() as u32)))
}
