//! Unix sockets: all workers of a generation share the socket that is bound to a path. The socket of the next generation
//! replaces it by rename(2), so clients always find a socket there.
//!
//! If a worker could unlink the path, before it binds it or when it ends, the others would lose it. So the worker is told
//! that it has unlinked the path, and the wrapper removes it when no worker serves it any more. A path that only one
//! worker has bound is its own to unlink.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use log::{debug, warn};
use nix::fcntl::AtFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Pid, Uid, fchownat};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::ids::{Borrower, WorkerId};
use crate::kernel::sockdiag::{SockDiag, SocketFile, UnixSocket};
use crate::kernel::{inbox, procfs, sys};
use crate::pool::lend::max_for_each_worker;

/// After so many binds, those whose sockets are closed are forgotten if a worker has as many.
const FORGET_CLOSED_EVERY: usize = 64;

/// The path of a socket without links, so that it is the same however a worker calls it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SocketPath(PathBuf);

impl SocketPath {
    /// What thread `tid` means by `path`, which starts at directory fd `from` or at the thread's current directory.
    /// `None` if there is no such directory, or if the thread has another root or other mounts than the wrapper.
    pub fn resolve(tid: Pid, from: Option<u32>, path: &Path) -> Option<Self> {
        if !procfs::same_mounts(tid) {
            return None;
        }
        let base = from.map_or("cwd".to_owned(), |fd| format!("fd/{fd}"));
        let base = PathBuf::from(format!("/proc/{tid}/{base}"));
        let full = if path.is_absolute() { path.to_owned() } else { fs::read_link(&base).ok()?.join(path) };
        let directory = fs::canonicalize(full.parent()?).ok()?;
        Some(Self(directory.join(full.file_name()?)))
    }

    /// What [`SocketPath::resolve`] has found before.
    pub fn resolved(path: PathBuf) -> Self {
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The name, in the same directory, of a newer generation's socket until it replaces the one at the path. It is
    /// short, since the addresses of Unix sockets are, and always the same, so that a file which a killed wrapper left
    /// is found.
    fn temporary(&self, generation: u32) -> PathBuf {
        // FNV-1a, so that each path in a directory has its own name.
        let bytes = self.0.as_os_str().as_bytes();
        let hash = bytes
            .iter()
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        self.0.with_file_name(format!(".{hash:08x}.{generation}"))
    }
}

/// Device and inode: which file it is, whatever its name.
type FileId = (u64, u64);

fn file_id(path: &Path) -> io::Result<FileId> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The path in a `struct sockaddr_un` (unix(7)). `None` for another family, and for a name that is no path.
pub fn path_of_sockaddr(bytes: &[u8]) -> Option<PathBuf> {
    let (family, path) = bytes.split_at_checked(2)?;
    let path = path.split(|byte| *byte == 0).next()?;
    let is_unix = i32::from(u16::from_ne_bytes([family[0], family[1]])) == libc::AF_UNIX;
    (is_unix && !path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path)))
}

/// A path as a worker's memory holds it: up to its zero byte.
pub fn path_of_bytes(bytes: &[u8]) -> Option<PathBuf> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    (end > 0).then(|| PathBuf::from(OsString::from_vec(bytes[..end].to_vec())))
}

/// A bound socket.
#[derive(Debug)]
struct Bound {
    socket: ManuallyDrop<Socket>,
    inode: u64,
    /// Where its file is now.
    path: PathBuf,
    /// Its file. A worker may have put another file at the path.
    file: FileId,
    /// The name that it was bound to. The kernel keeps it for the socket and the connections that it accepts.
    name: String,
    /// The workers that have bound it, also those that died.
    borrowers: BTreeMap<WorkerId, Pid>,
}

impl Bound {
    /// Binds a new socket to a path, with the permissions that it gets from a process with this umask.
    ///
    /// # Errors
    /// What bind(2) says. Without an error number if the path is too long even by way of its directory.
    fn new(path: PathBuf, mask: u32) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        let (address, _directory) = short_address(&path)?;
        let before = umask(Mode::from_bits_truncate(mask));
        let result = socket.bind(&address);
        umask(before);
        result?;
        let name = address.as_pathname().unwrap_or(&path).to_string_lossy().into_owned();
        let (inode, file) = (procfs::inode(socket.as_fd())?, file_id(&path)?);
        let socket = ManuallyDrop::new(socket);
        Ok(Self { socket, inode, path, file, name, borrowers: BTreeMap::new() })
    }

    /// Its file, without the right to read or write it (O_PATH). The directory may belong to a worker, and another user
    /// may put anything there in between: so this follows no links, and is its own file or none.
    fn open_file(&self) -> io::Result<fs::File> {
        let own = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(&self.path)?;
        let metadata = own.metadata()?;
        if (metadata.dev(), metadata.ino()) != self.file {
            return Err(io::Error::other(format!("{} is another file by now", self.path.display())));
        }
        Ok(own)
    }

    /// Replaces the socket at a path, in one step, and takes over its owner and mode.
    fn replace(&mut self, path: &Path) -> io::Result<()> {
        let own = self.open_file()?;
        let old = fs::symlink_metadata(path).ok().filter(|old| old.file_type().is_socket());
        if let Some(old) = old {
            let (uid, gid) = (Some(Uid::from_raw(old.uid())), Some(Gid::from_raw(old.gid())));
            let _ = fchownat(&own, "", uid, gid, AtFlags::AT_EMPTY_PATH);
            let _ = fs::set_permissions(format!("/proc/self/fd/{}", own.as_raw_fd()), old.permissions());
        }
        fs::rename(&self.path, path)?;
        self.path = path.to_owned();
        Ok(())
    }

    /// Whether a connection waits to be accepted.
    fn has_waiting(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let is_listening = self.socket.is_listener().unwrap_or(false);
        is_listening && poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl Bound {
    /// Removes its file, if that is still where it was put.
    fn remove_file(&self) {
        if file_id(&self.path).is_ok_and(|file| file == self.file)
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!("can't remove {}: {error}", self.path.display());
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.remove_file();
        let waiting = self.has_waiting();
        let socket = sys::take_in_drop(&mut self.socket);
        if waiting {
            inbox::close_elsewhere(socket.into()); // anyone may have sent anything on these connections
        }
    }
}

/// The address of a path. If the path is longer than addresses can be (unix(7)), it goes by way of the fd of its
/// directory, which has to stay open until the bind. (A worker gets around the limit by changing into the directory.)
fn short_address(path: &Path) -> io::Result<(SockAddr, Option<fs::File>)> {
    if let Ok(address) = SockAddr::unix(path) {
        return Ok((address, None));
    }
    // Only a folder, because to open a FIFO would wait for a writer.
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let directory = fs::OpenOptions::new().read(true).custom_flags(flags).open(directory)?;
    let name = path.file_name().unwrap_or_default();
    let by_fd = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok((SockAddr::unix(by_fd)?, Some(directory)))
}

/// What has become of a path that a worker wanted to remove.
#[derive(Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is still there, since other workers have bound it too.
    Kept,
    Removed,
    NotOurs,
}

/// The sockets of all paths, by generation.
#[derive(Debug, Default)]
pub struct UnixSockets {
    paths: BTreeMap<SocketPath, BTreeMap<u32, Bound>>,
    /// How many paths were bound since it was last found out which sockets are closed.
    unchecked: usize,
}

impl UnixSockets {
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// Whether `path`, which isn't resolved yet, may be a path of ours: one of them has the same file name.
    pub fn may_have(&self, path: &Path) -> bool {
        let bound_paths = self.bound().map(|bound| bound.path.as_path());
        let mut ours = self.paths.keys().map(SocketPath::path).chain(bound_paths);
        ours.any(|ours| ours.file_name() == path.file_name())
    }

    /// Removes a path for a worker, and forgets its socket, unless other workers have bound it too.
    pub fn remove(&mut self, path: &SocketPath, worker: WorkerId) -> Removal {
        let Some(sockets) = self.paths.get(path) else {
            // A socket that hasn't replaced the older one yet has a temporary name, which the worker may have asked for.
            let is_ours = self.bound().any(|bound| bound.path == path.path());
            return if is_ours { Removal::Kept } else { Removal::NotOurs };
        };
        if sockets.values().any(|bound| bound.borrowers.keys().any(|other| *other != worker)) {
            return Removal::Kept;
        }
        self.paths.remove(path); // and the file, if it is still the socket's
        if fs::symlink_metadata(path.path()).is_err() { Removal::Removed } else { Removal::NotOurs }
    }

    /// Binds a path for a worker, and returns the inode number of the socket that the worker's generation shares. If
    /// another generation has the path, the socket has a temporary name until [`UnixSockets::switch`].
    ///
    /// # Errors
    /// What bind(2) would have said to the worker, whose umask is `mask`; QuotaExceeded, without a number, if it has
    /// bound as many paths as it may.
    pub fn bind(&mut self, path: &SocketPath, borrower: Borrower, mask: u32) -> io::Result<u64> {
        let Borrower { worker, pid, generation, .. } = borrower;
        if let Some(bound) = self.paths.get_mut(path).and_then(|sockets| sockets.get_mut(&generation)) {
            bound.borrowers.insert(worker, pid);
            return Ok(bound.inode);
        }
        if self.has_too_many(borrower) {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let mut file = path.path().to_owned();
        if self.paths.contains_key(path) {
            file = path.temporary(generation);
            let _ = fs::remove_file(&file); // a killed wrapper may have left it
        }
        let mut bound = Bound::new(file, mask)?;
        bound.borrowers.insert(worker, pid);
        let inode = bound.inode;
        self.paths.entry(path.clone()).or_default().insert(generation, bound);
        Ok(inode)
    }

    /// Whether a worker has bound as many paths as it may. Those that it alone has bound and has closed since are
    /// forgotten first.
    fn has_too_many(&mut self, borrower: Borrower) -> bool {
        let max = max_for_each_worker();
        let of_worker = |bound: &Bound| bound.borrowers.contains_key(&borrower.worker);
        let count = |sockets: &Self| sockets.bound().filter(|bound| of_worker(bound)).count();
        let has = count(self);
        self.unchecked += 1;
        if has.min(self.unchecked) >= FORGET_CLOSED_EVERY - 1 {
            self.unchecked = 0;
            let own = self.bound().filter(|bound| of_worker(bound) && bound.borrowers.len() == 1);
            let own: HashSet<u64> = own.map(|bound| bound.inode).collect();
            let open = procfs::open_elsewhere(borrower.pid, &own);
            let is_closed = |bound: &Bound| own.contains(&bound.inode) && !open.contains(&bound.inode);
            self.paths.retain(|_, sockets| sockets.len() > 1 || !sockets.values().all(is_closed));
        }
        has >= max && count(self) >= max
    }

    fn bound(&self) -> impl Iterator<Item = &Bound> {
        self.paths.values().flat_map(BTreeMap::values)
    }

    /// The socket with this inode number.
    pub fn socket(&self, inode: u64) -> Option<BorrowedFd<'_>> {
        self.find(inode).map(|(_, bound)| bound.socket.as_fd())
    }

    /// Does listen(2) on the socket with this inode number and returns its path.
    ///
    /// # Errors
    /// What listen(2) would have said to the worker.
    pub fn listen(&self, inode: u64, backlog: i32) -> io::Result<PathBuf> {
        let (path, bound) = self.find(inode).ok_or(io::ErrorKind::NotFound)?;
        bound.socket.listen(backlog)?;
        Ok(path.path().to_owned())
    }

    fn find(&self, inode: u64) -> Option<(&SocketPath, &Bound)> {
        self.paths.iter().find_map(|(path, sockets)| {
            sockets.values().find(|bound| bound.inode == inode).map(|bound| (path, bound))
        })
    }

    /// Begins to open a connection to the socket that a generation has for a path, whatever name it has now. Without
    /// waiting: if its queue is full, that is the error WouldBlock.
    ///
    /// # Errors
    /// NotFound if it has none, and those of connect(2).
    pub fn reach(&self, path: &Path, generation: u32) -> io::Result<Socket> {
        let mut of_path = self.paths.iter().filter(|(socket_path, _)| socket_path.path() == path);
        let bound =
            of_path.find_map(|(_, sockets)| sockets.get(&generation)).ok_or(io::ErrorKind::NotFound)?;
        let own = bound.open_file()?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(format!("/proc/self/fd/{}", own.as_raw_fd()))?)?;
        Ok(socket)
    }

    /// Has the sockets of a generation replace older ones, each in one step, with their owner and mode: a worker that
    /// changed those meant the path and not the socket.
    pub fn switch(&mut self, generation: u32) {
        for (path, sockets) in &mut self.paths {
            let path = path.path();
            let Some(bound) = sockets.get_mut(&generation).filter(|bound| bound.path != path) else {
                continue;
            };
            match bound.replace(path) {
                Ok(()) => debug!("{} belongs to generation {generation}", path.display()),
                Err(error) => warn!("can't hand {} over to generation {generation}: {error}", path.display()),
            }
        }
    }

    /// Removes all paths, so that no new connections come. The sockets serve those that have come.
    pub fn remove_paths(&self) {
        self.bound().for_each(Bound::remove_file);
    }

    /// Closes the sockets of all other generations, and removes the paths that no generation has any more.
    pub fn keep(&mut self, keep: impl Fn(u32) -> bool) {
        self.paths.retain(|_, sockets| {
            sockets.retain(|generation, _| keep(*generation));
            !sockets.is_empty()
        });
    }

    /// The inode numbers of the connections that came by any of the sockets. A connection whose client is in another
    /// network namespace is missing.
    pub fn connections(&self) -> Vec<u64> {
        if self.is_empty() {
            return Vec::new();
        }
        self.all().into_iter().filter_map(|(inode, came)| came.map(|_| inode)).collect()
    }

    /// All Unix sockets of this network namespace by inode number; with what is known of it, if it is a connection that
    /// came by one of ours.
    fn all(&self) -> HashMap<u64, Option<Came>> {
        self.all_by_file().unwrap_or_else(|_| self.all_by_name())
    }

    fn all_by_file(&self) -> io::Result<HashMap<u64, Option<Came>>> {
        let generations: HashMap<u64, u32> =
            self.paths.values().flatten().map(|(generation, bound)| (bound.inode, *generation)).collect();
        let all = SockDiag::new()?.unix_sockets()?;
        let files: Vec<(&SocketFile, u32)> =
            all.iter().filter_map(|it| Some((it.file.as_ref()?, *generations.get(&it.inode)?))).collect();
        let of_file = |file: &SocketFile| files.iter().find(|(ours, _)| *ours == file).map(|(_, it)| *it);
        let came = |it: &UnixSocket| {
            let generation = it.file.as_ref().filter(|_| it.is_connected).and_then(of_file)?;
            Some(Came { generation, client: it.peer })
        };
        Ok(all.iter().map(|it| (it.inode, came(it))).collect())
    }

    /// Where the kernel can't list their files. Any user can bind a socket whose name looks like a line of the table, or like
    /// ours in other mounts.
    fn all_by_name(&self) -> HashMap<u64, Option<Came>> {
        let all = self.paths.values().flatten();
        let generations: HashMap<&str, u32> =
            all.map(|(generation, bound)| (bound.name.as_str(), *generation)).collect();
        let came = |row: &procfs::UnixSocket| {
            let generation = generations.get(row.name.as_str()).copied();
            let generation = generation.filter(|_| row.is_connected && row.inode != 0)?;
            Some(Came { generation, client: None })
        };
        procfs::unix_sockets().iter().map(|row| (row.inode, came(row))).collect()
    }

    /// Which of some workers, given with their generations, have a connection that came by a path, or one that waits
    /// for any worker of their generation. What a worker's processes say to each other doesn't count.
    pub fn busy(&self, workers: &[(WorkerId, Pid, u32)]) -> BTreeSet<WorkerId> {
        if self.is_empty() || workers.is_empty() {
            return BTreeSet::new();
        }
        let waiting = self.paths.values().flatten().filter(|(_, bound)| bound.has_waiting());
        let mut busy_generations: BTreeSet<u32> = waiting.map(|(generation, _)| *generation).collect();
        let known = self.all();
        let processes = procfs::tree(Pid::this()).into_iter().skip(1);
        let held: Held = processes.map(|process| (process, procfs::sockets(process).ok())).collect();
        let inodes: HashSet<u64> = held.values().flatten().flatten().map(|(_, inode)| *inode).collect();
        // A thread has accepted what no process has, and hasn't got its fd yet.
        let unheld = known.iter().filter(|(inode, _)| !inodes.contains(inode));
        busy_generations.extend(unheld.filter_map(|(_, came)| Some(came.as_ref()?.generation)));
        let is_busy = |(_, pid, generation): &&(WorkerId, Pid, u32)| {
            busy_generations.contains(generation) || has_client(&procfs::tree(*pid), &held, &known)
        };
        workers.iter().filter(is_busy).map(|(worker, ..)| *worker).collect()
    }
}

/// A connection that came by one of our sockets.
struct Came {
    generation: u32,
    /// The inode number of its other end, if it is known.
    client: Option<u64>,
}

/// The sockets of processes, each its fd and inode number; `None` where they can't be seen.
type Held = HashMap<Pid, Option<Vec<(u32, u64)>>>;

/// Whether one of a worker's processes has a connection whose client is none of them.
fn has_client(processes: &[Pid], held: &Held, known: &HashMap<u64, Option<Came>>) -> bool {
    let sockets = || processes.iter().filter_map(|process| Some((*process, held.get(process)?.as_ref()?)));
    let own: HashSet<u64> = sockets().flat_map(|(_, its)| its).map(|(_, inode)| *inode).collect();
    let is_of_client = |process, fd, inode| match known.get(&inode) {
        Some(Some(came)) => came.client.is_none_or(|client| !own.contains(&client)),
        Some(None) => false,
        // In no list of this network namespace: a connection is in its client's (`unix_create1`).
        None => procfs::socket_protocol(process, fd).is_ok_and(|name| name.starts_with("UNIX")),
    };
    let may_have_one = |process: &Pid| matches!(held.get(process), Some(None));
    processes.iter().any(may_have_one)
        || sockets().any(|(process, its)| its.iter().any(|(fd, inode)| is_of_client(process, *fd, *inode)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use proptest::prelude::*;

    use super::*;
    use crate::ids::SlotId;

    fn borrower(worker: u32, generation: u32) -> Borrower {
        Borrower { worker: WorkerId(worker), pid: Pid::this(), slot: SlotId(0), generation }
    }

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("reuse-run-unix-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_socket_path_is_the_same_however_a_worker_calls_it() {
        let folder = Folder::new("socket_path");
        std::os::unix::fs::symlink(&folder.0, folder.0.join("link")).unwrap();
        let resolve = |path: PathBuf| SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let direct = resolve(folder.0.join("socket"));
        assert_eq!(resolve(folder.0.join("link/./socket")), direct);
        assert_ne!(direct.temporary(2), direct.temporary(3));
        assert_eq!(SocketPath::resolve(Pid::this(), None, &folder.0.join("missing/socket")), None);
        assert_eq!(SocketPath::resolve(Pid::this(), None, Path::new("/")), None);
    }

    #[test]
    fn a_generation_shares_a_socket_and_the_next_generations_socket_replaces_it() {
        let folder = Folder::new("generations");
        let path = folder.0.join("socket");
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let mut sockets = UnixSockets::default();
        let first = sockets.bind(&socket_path, borrower(1, 1), 0o077).unwrap();
        assert_eq!(sockets.bind(&socket_path, borrower(2, 1), 0o077).unwrap(), first, "siblings share it");
        sockets.listen(first, 8).unwrap();
        sockets.switch(1);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let _client = UnixStream::connect(&path).unwrap();
        let workers = [(WorkerId(1), Pid::this(), 1), (WorkerId(3), Pid::this(), 2)];
        assert_eq!(sockets.busy(&workers), BTreeSet::from([WorkerId(1)]), "a connection waits");

        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let second = sockets.bind(&socket_path, borrower(3, 2), 0o022).unwrap();
        assert_ne!(second, first);
        sockets.listen(second, 8).unwrap();
        sockets.switch(2);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666, "the mode is kept");
        sockets.keep(|generation| generation == 2);
        let _client = UnixStream::connect(&path).unwrap();
        assert_eq!(sockets.busy(&workers), BTreeSet::from([WorkerId(3)]));
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "nothing else is left");

        sockets.keep(|_| false);
        assert!(sockets.is_empty() && !path.exists());
    }

    #[test]
    fn each_generation_is_reached_by_its_own_socket_before_and_after_the_switch() {
        let folder = Folder::new("reach");
        let path = folder.0.join("n".repeat(80)); // with its folder longer than an address
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let mut sockets = UnixSockets::default();
        let first = sockets.bind(&socket_path, borrower(1, 1), 0).unwrap();
        let second = sockets.bind(&socket_path, borrower(2, 2), 0).unwrap();
        for (inode, backlog) in [(first, 8), (second, 0)] {
            sockets.listen(inode, backlog).unwrap();
        }
        let has_waiting = |sockets: &UnixSockets| {
            [1, 2].map(|generation| sockets.paths[&socket_path][&generation].has_waiting())
        };
        let _client = sockets.reach(&path, 2).unwrap();
        assert_eq!(has_waiting(&sockets), [false, true]);
        let error = sockets.reach(&path, 2).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "its queue is full");
        assert_eq!(sockets.reach(&path, 3).unwrap_err().kind(), io::ErrorKind::NotFound);
        sockets.switch(2);
        sockets.socket(second).map(|socket| nix::sys::socket::accept(socket.as_raw_fd()).unwrap());
        sockets.reach(&path, 2).unwrap();
    }

    #[test]
    fn a_generation_that_fails_leaves_the_path_to_the_one_that_serves() {
        let folder = Folder::new("fails");
        let path = folder.0.join("socket");
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let mut sockets = UnixSockets::default();
        let first = sockets.bind(&socket_path, borrower(1, 1), 0).unwrap();
        sockets.listen(first, 8).unwrap();
        sockets.bind(&socket_path, borrower(2, 2), 0).unwrap();
        sockets.keep(|generation| generation == 1);
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_worker_may_unlink_a_path_until_another_worker_has_bound_it() {
        let folder = Folder::new("own");
        let socket_path = SocketPath::resolve(Pid::this(), None, &folder.0.join("socket")).unwrap();
        let mut sockets = UnixSockets::default();
        let inode = sockets.bind(&socket_path, borrower(1, 1), 0).unwrap();
        assert_eq!(sockets.remove(&socket_path, WorkerId(2)), Removal::Kept, "another worker has it");
        assert_eq!(sockets.remove(&socket_path, WorkerId(1)), Removal::Removed);
        assert!(sockets.socket(inode).is_none() && sockets.is_empty() && !socket_path.path().exists());
        assert_eq!(sockets.remove(&socket_path, WorkerId(1)), Removal::NotOurs);
        sockets.bind(&socket_path, borrower(1, 1), 0).unwrap();
        sockets.bind(&socket_path, borrower(2, 2), 0).unwrap();
        let temporary = SocketPath(socket_path.temporary(2));
        for socket_path in [&socket_path, &temporary] {
            assert_eq!(sockets.remove(socket_path, WorkerId(1)), Removal::Kept);
            assert_eq!(sockets.remove(socket_path, WorkerId(2)), Removal::Kept);
        }
        sockets.switch(2);
        sockets.keep(|generation| generation == 2);
        assert_eq!(sockets.remove(&socket_path, WorkerId(2)), Removal::Removed, "the others are gone");
    }

    #[test]
    fn a_file_that_replaced_the_socket_is_not_removed() {
        let folder = Folder::new("others");
        let path = folder.0.join("socket");
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let mut sockets = UnixSockets::default();
        sockets.bind(&socket_path, borrower(1, 1), 0).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        sockets.keep(|_| false);
        assert!(path.exists(), "another worker has it");
    }

    #[test]
    fn a_link_that_replaced_the_socket_is_not_followed() {
        let folder = Folder::new("link");
        let (path, victim) = (folder.0.join("socket"), folder.0.join("victim"));
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let mut sockets = UnixSockets::default();
        sockets.bind(&socket_path, borrower(1, 1), 0).unwrap();
        sockets.bind(&socket_path, borrower(2, 2), 0).unwrap();
        fs::write(&victim, "").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let temporary = socket_path.temporary(2);
        fs::remove_file(&temporary).unwrap();
        std::os::unix::fs::symlink(&victim, &temporary).unwrap();
        sockets.switch(2);
        assert_eq!(fs::metadata(&victim).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn sockets_that_their_workers_have_closed_are_forgotten() {
        let folder = Folder::new("many");
        let mut sockets = UnixSockets::default();
        for number in 0..3 * FORGET_CLOSED_EVERY {
            let path = folder.0.join(number.to_string());
            let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
            let dead = Pid::from_raw(i32::MAX);
            sockets.bind(&socket_path, Borrower { pid: dead, ..borrower(1, 1) }, 0).unwrap();
        }
        assert!(sockets.paths.len() <= FORGET_CLOSED_EVERY, "{}", sockets.paths.len());
    }

    #[test]
    fn a_path_that_a_foreign_listener_has_is_in_use() {
        let folder = Folder::new("in-use");
        let path = folder.0.join("socket");
        let _other = UnixListener::bind(&path).unwrap();
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let error = UnixSockets::default().bind(&socket_path, borrower(1, 1), 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
    }

    /// A worker chooses the bytes.
    mod fuzz {
        use super::*;

        proptest! {
            #[test]
            fn in_any_bytes_a_path_ends_at_its_zero_byte(bytes in proptest::collection::vec(0u8..8, 0..20)) {
                let end = bytes.iter().position(|byte| *byte == 0);
                let expected = end.filter(|end| *end > 0).map(|end| bytes[..end].to_vec());
                prop_assert_eq!(path_of_bytes(&bytes).map(|path| path.into_os_string().into_vec()), expected);
            }

            #[test]
            fn of_any_bytes_only_the_sockaddr_of_a_path_is_read(
                family in prop_oneof![Just(libc::AF_UNIX as u16), any::<u16>()],
                name in proptest::collection::vec(0u8..8, 0..110),
                cut in 0usize..120,
            ) {
                let mut bytes = [&family.to_ne_bytes()[..], &name].concat();
                bytes.truncate(cut);
                let path = bytes.get(2..).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default();
                let is_path = bytes.len() > 2 && i32::from(family) == libc::AF_UNIX && !path.is_empty();
                let read = path_of_sockaddr(&bytes).map(|path| path.into_os_string().into_vec());
                prop_assert_eq!(read, is_path.then(|| path.to_vec()));
            }
        }
    }
}
