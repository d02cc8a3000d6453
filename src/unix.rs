//! Unix sockets: all workers of a generation share the one that is bound to a path, and the next
//! generation's takes its place by rename(2), so that a client always finds one there.
//!
//! A worker that unlinks the path, to bind it or on its way out, would take it from the others: it is told
//! that it has, and the wrapper removes the path when nobody serves it any more. A path that only one worker
//! has bound is its own to unlink.

use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use log::{debug, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::fleet::WorkerId;
use crate::listeners::Borrower;
use crate::procfs;

/// At how many paths it is looked which of them are abandoned.
const MANY: usize = 64;

/// A name in a directory, by whatever way a worker calls it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    directory: (u64, u64),
    name: OsString,
    /// One way to call it.
    path: PathBuf,
}

impl Place {
    /// The place that thread `tid` means by `path`, from directory fd `from` or from its current one.
    /// `None` when that is none, or the thread has another root or mounts than the wrapper.
    pub fn of(tid: Pid, from: Option<u32>, path: &Path) -> Option<Self> {
        if !procfs::same_mounts(tid) {
            return None;
        }
        let base = from.map_or("cwd".to_owned(), |fd| format!("fd/{fd}"));
        let base = PathBuf::from(format!("/proc/{tid}/{base}"));
        let full = if path.is_absolute() { path.to_owned() } else { fs::read_link(&base).ok()?.join(path) };
        let directory = fs::canonicalize(full.parent()?).ok()?;
        let metadata = fs::metadata(&directory).ok()?;
        let name = full.file_name()?.to_owned();
        Some(Self { directory: (metadata.dev(), metadata.ino()), path: directory.join(&name), name })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The path in a `struct sockaddr_un` (unix(7)); `None` for another family, and for names that are no path.
pub fn path_of_sockaddr(bytes: &[u8]) -> Option<PathBuf> {
    let (family, path) = bytes.split_at_checked(2)?;
    let path = path.split(|byte| *byte == 0).next()?;
    let is_unix = i32::from(u16::from_ne_bytes([family[0], family[1]])) == libc::AF_UNIX;
    (is_unix && !path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path)))
}

/// A socket that is bound.
#[derive(Debug)]
struct Bound {
    socket: Socket,
    inode: u64,
    /// Where it is now.
    path: PathBuf,
    /// What it was bound as, which stays with it and with the connections that it accepts.
    name: String,
    /// The workers that have bound it, the dead ones too.
    borrowers: BTreeMap<WorkerId, Pid>,
}

impl Bound {
    /// Binds a new socket to a path, with the permissions that a process with this umask gives it.
    fn new(path: PathBuf, mask: u32) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        let (address, _directory) = short_enough(&path)?;
        let before = umask(Mode::from_bits_truncate(mask));
        let result = socket.bind(&address);
        umask(before);
        result?;
        let name = address.as_pathname().unwrap_or(&path).to_string_lossy().into_owned();
        Ok(Self { inode: procfs::inode(socket.as_fd())?, socket, path, name, borrowers: BTreeMap::new() })
    }
}

/// The address of a path, by way of its directory where it is longer than addresses can be (unix(7)), which
/// a worker gets around by being there.
fn short_enough(path: &Path) -> io::Result<(SockAddr, Option<fs::File>)> {
    if let Ok(address) = SockAddr::unix(path) {
        return Ok((address, None));
    }
    let directory = fs::File::open(path.parent().unwrap_or(Path::new("/")))?;
    let name = path.file_name().unwrap_or_default();
    let by_fd = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok((SockAddr::unix(by_fd)?, Some(directory)))
}

/// The sockets of all paths, by generation.
#[derive(Debug, Default)]
pub struct UnixSockets(BTreeMap<Place, BTreeMap<u32, Bound>>);

impl UnixSockets {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets the socket of a path that a worker removes, unless others have it as well. Returns whether the
    /// path is the worker's to remove.
    pub fn let_go(&mut self, place: &Place, worker: WorkerId) -> bool {
        let Some(sockets) = self.0.get(place) else { return true };
        let is_its_own = sockets.values().all(|bound| bound.borrowers.keys().all(|other| *other == worker));
        if is_its_own {
            self.0.remove(place);
        }
        is_its_own
    }

    /// The inode number of the socket that a worker is to have for a place. Until [`UnixSockets::switch`] that
    /// of a newer generation than one which has the place bears another name.
    ///
    /// # Errors
    /// What bind(2) would have said to the worker, whose umask is `mask`.
    pub fn bind(&mut self, place: &Place, borrower: Borrower, mask: u32) -> io::Result<u64> {
        let Borrower { worker, pid, generation, .. } = borrower;
        self.forget_abandoned();
        if let Some(bound) = self.0.get_mut(place).and_then(|sockets| sockets.get_mut(&generation)) {
            bound.borrowers.insert(worker, pid);
            return Ok(bound.inode);
        }
        let taken = self.0.contains_key(place);
        let mut path = place.path.clone();
        if taken {
            let mut name = OsString::from(".");
            name.push(&place.name);
            name.push(format!(".{generation}"));
            path.set_file_name(name);
            let _ = fs::remove_file(&path); // of a wrapper that was killed
        }
        let mut bound = Bound::new(path, mask)?;
        bound.borrowers.insert(worker, pid);
        let inode = bound.inode;
        self.0.entry(place.clone()).or_default().insert(generation, bound);
        Ok(inode)
    }

    /// A worker's own sockets that it has closed are forgotten when there are many of them.
    fn forget_abandoned(&mut self) {
        let is_abandoned = |sockets: &BTreeMap<u32, Bound>| {
            let mut all =
                sockets.values().flat_map(|bound| bound.borrowers.values().map(|pid| (bound.inode, *pid)));
            matches!((all.next(), all.next()), (Some((inode, pid)), None) if !procfs::is_open_elsewhere(pid, inode))
        };
        if self.0.len() % MANY == MANY - 1 {
            self.0.retain(|_, sockets| !is_abandoned(sockets));
        }
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
        let (place, bound) = self.find(inode).ok_or(io::ErrorKind::NotFound)?;
        bound.socket.listen(backlog)?;
        Ok(place.path.clone())
    }

    fn find(&self, inode: u64) -> Option<(&Place, &Bound)> {
        self.0.iter().find_map(|(place, bound)| {
            bound.values().find(|bound| bound.inode == inode).map(|bound| (place, bound))
        })
    }

    /// Has the sockets of a generation take the places of older ones, each in one step, with their owner and
    /// mode: a worker that has changed those meant the path.
    pub fn switch(&mut self, generation: u32) {
        for (place, sockets) in &mut self.0 {
            let Some(bound) = sockets.get_mut(&generation).filter(|bound| bound.path != place.path) else {
                continue;
            };
            if let Ok(old) = fs::metadata(&place.path) {
                let _ = std::os::unix::fs::chown(&bound.path, Some(old.uid()), Some(old.gid()));
                let _ = fs::set_permissions(&bound.path, old.permissions());
            }
            match fs::rename(&bound.path, &place.path) {
                Ok(()) => {
                    debug!("{} is generation {generation}'s", place.path.display());
                    bound.path.clone_from(&place.path);
                }
                Err(error) => warn!("can't hand {} over: {error}", place.path.display()),
            }
        }
    }

    /// Closes the sockets of all generations but these, and removes the paths that nobody has any more.
    pub fn keep(&mut self, keep: impl Fn(u32) -> bool) {
        self.0.retain(|_, sockets| {
            let gone: Vec<(u32, Bound)> =
                sockets.extract_if(.., |generation, _| !keep(*generation)).collect();
            for (_, bound) in gone {
                // The path is another's if a newer generation has taken it.
                let taken = sockets.values().any(|other| other.path == bound.path);
                if !taken && let Err(error) = fs::remove_file(&bound.path) {
                    debug!("can't remove {}: {error}", bound.path.display());
                }
            }
            !sockets.is_empty()
        });
    }

    /// The inode numbers of the connections that came by any of the sockets.
    pub fn connections(&self) -> Vec<u64> {
        match self.is_empty() {
            true => Vec::new(),
            false => connections(&self.0.values().flat_map(BTreeMap::values).collect::<Vec<_>>()),
        }
    }

    /// Whether no connection waits on the sockets of a generation, and a process and its descendants have
    /// none open that came by them.
    pub fn are_idle(&self, generation: u32, worker: Pid) -> bool {
        let bound: Vec<&Bound> = self.0.values().filter_map(|sockets| sockets.get(&generation)).collect();
        if bound.is_empty() {
            return true;
        }
        let waits = |bound: &&Bound| {
            let mut fds = [PollFd::new(bound.socket.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        };
        if bound.iter().any(waits) {
            return false;
        }
        let ours: HashSet<u64> = connections(&bound).into_iter().collect();
        let mut open =
            procfs::tree(worker).into_iter().flat_map(|pid| procfs::socket_inodes(pid).unwrap_or_default());
        !open.any(|inode| ours.contains(&inode))
    }
}

/// The inode numbers of the connections that came by some sockets.
fn connections(bound: &[&Bound]) -> Vec<u64> {
    let came_by = |name: &str| bound.iter().any(|bound| bound.name == name);
    let rows = procfs::unix_sockets().into_iter().filter(|row| row.is_connected && came_by(&row.name));
    rows.map(|row| row.inode).collect()
}

/// A path as a worker's memory holds it: up to its zero byte.
pub fn path_of_bytes(bytes: &[u8]) -> Option<PathBuf> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    (end > 0).then(|| PathBuf::from(OsString::from_vec(bytes[..end].to_vec())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use proptest::prelude::*;

    use super::*;

    fn borrower(worker: u32, generation: u32) -> Borrower {
        Borrower { worker: WorkerId(worker), pid: Pid::this(), slot: 0, generation }
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
    fn a_place_is_the_same_however_it_is_called() {
        let folder = Folder::new("place");
        std::os::unix::fs::symlink(&folder.0, folder.0.join("link")).unwrap();
        let place = |path: PathBuf| Place::of(Pid::this(), None, &path).unwrap();
        let direct = place(folder.0.join("socket"));
        assert_eq!(place(folder.0.join("link/./socket")).directory, direct.directory);
        assert_eq!(place(folder.0.join("link/../socket").components().collect()).name, direct.name);
        assert_eq!(Place::of(Pid::this(), None, &folder.0.join("missing/socket")), None);
        assert_eq!(Place::of(Pid::this(), None, Path::new("/")), None);
    }

    #[test]
    fn a_generation_shares_a_socket_and_the_next_takes_its_place() {
        let folder = Folder::new("generations");
        let path = folder.0.join("socket");
        let place = Place::of(Pid::this(), None, &path).unwrap();
        let mut sockets = UnixSockets::default();
        let first = sockets.bind(&place, borrower(1, 1), 0o077).unwrap();
        assert_eq!(sockets.bind(&place, borrower(2, 1), 0o077).unwrap(), first, "siblings share it");
        sockets.listen(first, 8).unwrap();
        sockets.switch(1);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let _client = UnixStream::connect(&path).unwrap();
        assert!(!sockets.are_idle(1, Pid::this()), "somebody waits");

        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let second = sockets.bind(&place, borrower(3, 2), 0o022).unwrap();
        assert_ne!(second, first);
        sockets.listen(second, 8).unwrap();
        sockets.switch(2);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666, "the mode is kept");
        sockets.keep(|generation| generation == 2);
        let _client = UnixStream::connect(&path).unwrap();
        assert!(!sockets.are_idle(2, Pid::this()));
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "nothing else is left");

        sockets.keep(|_| false);
        assert!(sockets.is_empty() && !path.exists());
    }

    #[test]
    fn a_generation_that_fails_leaves_the_path_to_the_one_that_serves() {
        let folder = Folder::new("fails");
        let path = folder.0.join("socket");
        let place = Place::of(Pid::this(), None, &path).unwrap();
        let mut sockets = UnixSockets::default();
        let first = sockets.bind(&place, borrower(1, 1), 0).unwrap();
        sockets.listen(first, 8).unwrap();
        sockets.bind(&place, borrower(2, 2), 0).unwrap();
        sockets.keep(|generation| generation == 1);
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_path_is_a_workers_own_to_unlink_until_another_has_bound_it() {
        let folder = Folder::new("own");
        let place = Place::of(Pid::this(), None, &folder.0.join("socket")).unwrap();
        let mut sockets = UnixSockets::default();
        let inode = sockets.bind(&place, borrower(1, 1), 0).unwrap();
        assert!(!sockets.let_go(&place, WorkerId(2)), "it is another's");
        assert!(sockets.let_go(&place, WorkerId(1)));
        assert!(sockets.socket(inode).is_none() && sockets.is_empty(), "it has removed it");
        fs::remove_file(place.path()).unwrap();
        sockets.bind(&place, borrower(1, 1), 0).unwrap();
        sockets.bind(&place, borrower(2, 2), 0).unwrap();
        assert!(!sockets.let_go(&place, WorkerId(1)) && !sockets.let_go(&place, WorkerId(2)));
        sockets.keep(|generation| generation == 2);
        assert!(sockets.let_go(&place, WorkerId(2)), "all others have gone");
    }

    #[test]
    fn sockets_that_their_workers_have_closed_do_not_pile_up() {
        let folder = Folder::new("many");
        let mut sockets = UnixSockets::default();
        for number in 0..3 * MANY {
            let path = folder.0.join(number.to_string());
            let place = Place::of(Pid::this(), None, &path).unwrap();
            let dead = Pid::from_raw(i32::MAX);
            sockets.bind(&place, Borrower { pid: dead, ..borrower(1, 1) }, 0).unwrap();
        }
        assert!(sockets.0.len() <= MANY, "{}", sockets.0.len());
    }

    #[test]
    fn a_path_that_somebody_else_has_is_in_use() {
        let folder = Folder::new("in-use");
        let path = folder.0.join("socket");
        let _other = UnixListener::bind(&path).unwrap();
        let place = Place::of(Pid::this(), None, &path).unwrap();
        let error = UnixSockets::default().bind(&place, borrower(1, 1), 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
    }

    proptest! {
        #[test]
        fn whatever_the_bytes_a_path_ends_at_its_zero_byte(bytes in proptest::collection::vec(any::<u8>(), 0..130)) {
            if let Some(path) = path_of_bytes(&bytes) {
                prop_assert!(!path.as_os_str().is_empty() && !path.as_os_str().as_bytes().contains(&0));
            }
            if let Some(path) = path_of_sockaddr(&bytes) {
                prop_assert_eq!(&bytes[..2], &(libc::AF_UNIX as u16).to_ne_bytes());
                prop_assert!(!path.as_os_str().is_empty());
            }
        }
    }
}
