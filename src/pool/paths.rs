//! Unix sockets: all workers of a generation share the one that is bound to a path, and the next
//! generation's takes its place by rename(2), so that a client always finds one there.
//!
//! A worker that unlinks the path, to bind it or on its way out, would take it from the others: it is told
//! that it has, and the wrapper removes the path when nobody serves it any more. A path that only one worker
//! has bound is its own to unlink.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
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
use crate::kernel::procfs;

/// At how many paths it is looked which of them are abandoned.
const MANY: usize = 64;

/// A name in a directory, by whatever way a worker calls it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(PathBuf);

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
        Some(Self(directory.join(full.file_name()?)))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A name beside it for the socket of a generation, until that takes the place: short, since addresses are,
    /// and the same each time, so that what a killed wrapper has left is found again.
    fn beside(&self, generation: u32) -> PathBuf {
        // FNV-1a: each name in a directory has its own.
        let bytes = self.0.as_os_str().as_bytes();
        let hash = bytes
            .iter()
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        self.0.with_file_name(format!(".{hash:08x}.{generation}"))
    }
}

/// What tells a file from every other, whatever its name is.
type FileId = (u64, u64);

fn file_id(path: &Path) -> io::Result<FileId> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
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
    /// The file that is to be there: somebody may have put another in its place.
    file: FileId,
    /// What it was bound as, which stays with it and with the connections that it accepts.
    name: String,
    /// The workers that have bound it, the dead ones too.
    borrowers: BTreeMap<WorkerId, Pid>,
}

impl Bound {
    /// Binds a new socket to a path, with the permissions that a process with this umask gives it.
    ///
    /// # Errors
    /// What bind(2) says; an error without a number when the path is too long even so.
    fn new(path: PathBuf, mask: u32) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        let (address, _directory) = short_enough(&path)?;
        let before = umask(Mode::from_bits_truncate(mask));
        let result = socket.bind(&address);
        umask(before);
        result?;
        let name = address.as_pathname().unwrap_or(&path).to_string_lossy().into_owned();
        let (inode, file) = (procfs::inode(socket.as_fd())?, file_id(&path)?);
        Ok(Self { socket, inode, path, file, name, borrowers: BTreeMap::new() })
    }

    /// Takes a path in one step, with the owner and mode of the socket that is there.
    fn take(&mut self, path: &Path) -> io::Result<()> {
        // The directory may be a worker's own, and whoever it is now may put anything there in between: so this
        // follows no links, and changes nothing but its own file.
        let own = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(&self.path)?;
        let metadata = own.metadata()?;
        if (metadata.dev(), metadata.ino()) != self.file {
            return Err(io::Error::other(format!("{} is another file by now", self.path.display())));
        }
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

    fn is_listening(&self) -> bool {
        self.socket.is_listener().unwrap_or(false)
    }
}

impl Drop for Bound {
    /// Removes its file, if that is still where it was put.
    fn drop(&mut self) {
        if file_id(&self.path).is_ok_and(|file| file == self.file)
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!("can't remove {}: {error}", self.path.display());
        }
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

/// What has become of a path that a worker wanted to remove.
#[derive(Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is there, since others have it too.
    Kept,
    Removed,
    NotOurs,
}

/// The sockets of all paths, by generation.
#[derive(Debug, Default)]
pub struct UnixSockets(BTreeMap<Place, BTreeMap<u32, Bound>>);

impl UnixSockets {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a name may be that of a path that is served.
    pub fn may_have(&self, path: &Path) -> bool {
        let of = |bound: &Bound| bound.path.file_name() == path.file_name();
        self.0
            .iter()
            .any(|(place, sockets)| place.path().file_name() == path.file_name() || sockets.values().any(of))
    }

    /// What becomes of a path that a worker removes: its socket is forgotten, unless others have it as well.
    pub fn remove(&mut self, place: &Place, worker: WorkerId) -> Removal {
        let Some(sockets) = self.0.get(place) else {
            // One that has yet to take its place bears another name, which the worker may have asked for.
            let is_ours = self.0.values().flat_map(BTreeMap::values).any(|bound| bound.path == place.path());
            return if is_ours { Removal::Kept } else { Removal::NotOurs };
        };
        if sockets.values().any(|bound| bound.borrowers.keys().any(|other| *other != worker)) {
            return Removal::Kept;
        }
        self.0.remove(place); // and the file with it, if that was still the socket's
        if fs::symlink_metadata(place.path()).is_err() { Removal::Removed } else { Removal::NotOurs }
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
        let mut path = place.path().to_owned();
        if self.0.contains_key(place) {
            path = place.beside(generation);
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
        Ok(place.path().to_owned())
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
            let Some(bound) = sockets.get_mut(&generation).filter(|bound| bound.path != place.path()) else {
                continue;
            };
            match bound.take(place.path()) {
                Ok(()) => debug!("{} is generation {generation}'s", place.path().display()),
                Err(error) => warn!("can't hand {} over: {error}", place.path().display()),
            }
        }
    }

    /// Closes the sockets of all generations but these, and removes the paths that nobody has any more.
    pub fn keep(&mut self, keep: impl Fn(u32) -> bool) {
        self.0.retain(|_, sockets| {
            sockets.retain(|generation, _| keep(*generation));
            !sockets.is_empty()
        });
    }

    /// The inode numbers of the connections that came by any of the sockets, as far as their clients are in this
    /// network namespace.
    pub fn connections(&self) -> Vec<u64> {
        if self.is_empty() {
            return Vec::new();
        }
        let names = self.names();
        let ours = procfs::unix_sockets()
            .into_iter()
            .filter(|row| row.is_connected && names.contains_key(&row.name));
        ours.map(|row| row.inode).collect()
    }

    /// The generations of all sockets, by what these were bound as.
    fn names(&self) -> HashMap<String, u32> {
        let all = self.0.values().flatten();
        all.map(|(generation, bound)| (bound.name.clone(), *generation)).collect()
    }

    /// Those of some workers, given with their generations, which have something to do that came by a path: a
    /// connection, or one that waits for any worker of the generation.
    pub fn busy(&self, workers: &[(WorkerId, Pid, u32)]) -> BTreeSet<WorkerId> {
        if self.is_empty() || workers.is_empty() {
            return BTreeSet::new();
        }
        let waits = |bound: &Bound| {
            let mut fds = [PollFd::new(bound.socket.as_fd(), PollFlags::POLLIN)];
            bound.is_listening() && poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        };
        let waiting = self.0.values().flatten().filter(|(_, bound)| waits(bound));
        let mut busy_generations: BTreeSet<u32> = waiting.map(|(generation, _)| *generation).collect();
        let names = self.names();
        let mut known: HashMap<u64, Option<u32>> = HashMap::new();
        for row in procfs::unix_sockets() {
            let generation = names.get(&row.name).copied().filter(|_| row.is_connected && row.inode != 0);
            known.insert(row.inode, generation);
        }
        let mut unheld: BTreeMap<u64, u32> =
            known.iter().filter_map(|(inode, generation)| Some((*inode, (*generation)?))).collect();
        let mut busy_processes: HashSet<Pid> = HashSet::new();
        for process in procfs::tree(Pid::this()).into_iter().skip(1) {
            let Ok(sockets) = procfs::sockets(process) else {
                busy_processes.insert(process); // for all that can be known
                continue;
            };
            for (fd, inode) in sockets {
                unheld.remove(&inode);
                let is_ours = match known.get(&inode) {
                    Some(generation) => generation.is_some(),
                    // Not of this network namespace: a connection has its client's (`unix_create1`).
                    None => procfs::socket_protocol(process, fd).is_ok_and(|name| name.starts_with("UNIX")),
                };
                if is_ours {
                    busy_processes.insert(process);
                }
            }
        }
        // Accepted just now by a thread that has yet to get its number.
        busy_generations.extend(unheld.into_values());
        let is_busy = |(_, pid, generation): &&(WorkerId, Pid, u32)| {
            busy_generations.contains(generation)
                || procfs::tree(*pid).iter().any(|process| busy_processes.contains(process))
        };
        workers.iter().filter(is_busy).map(|(worker, ..)| *worker).collect()
    }
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
    fn a_place_is_the_same_however_it_is_called() {
        let folder = Folder::new("place");
        std::os::unix::fs::symlink(&folder.0, folder.0.join("link")).unwrap();
        let place = |path: PathBuf| Place::of(Pid::this(), None, &path).unwrap();
        let direct = place(folder.0.join("socket"));
        assert_eq!(place(folder.0.join("link/./socket")), direct);
        assert_ne!(direct.beside(2), direct.beside(3));
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
        let workers = [(WorkerId(1), Pid::this(), 1), (WorkerId(3), Pid::this(), 2)];
        assert_eq!(sockets.busy(&workers), BTreeSet::from([WorkerId(1)]), "somebody waits");

        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let second = sockets.bind(&place, borrower(3, 2), 0o022).unwrap();
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
        assert_eq!(sockets.remove(&place, WorkerId(2)), Removal::Kept, "it is another's");
        assert_eq!(sockets.remove(&place, WorkerId(1)), Removal::Removed);
        assert!(sockets.socket(inode).is_none() && sockets.is_empty() && !place.path().exists());
        assert_eq!(sockets.remove(&place, WorkerId(1)), Removal::NotOurs);
        sockets.bind(&place, borrower(1, 1), 0).unwrap();
        sockets.bind(&place, borrower(2, 2), 0).unwrap();
        let beside = Place(place.beside(2));
        for place in [&place, &beside] {
            assert_eq!(sockets.remove(place, WorkerId(1)), Removal::Kept);
            assert_eq!(sockets.remove(place, WorkerId(2)), Removal::Kept);
        }
        sockets.switch(2);
        sockets.keep(|generation| generation == 2);
        assert_eq!(sockets.remove(&place, WorkerId(2)), Removal::Removed, "all others have gone");
    }

    #[test]
    fn what_somebody_has_put_in_the_place_of_a_socket_is_left_alone() {
        let folder = Folder::new("others");
        let path = folder.0.join("socket");
        let place = Place::of(Pid::this(), None, &path).unwrap();
        let mut sockets = UnixSockets::default();
        sockets.bind(&place, borrower(1, 1), 0).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        sockets.keep(|_| false);
        assert!(path.exists(), "it is another's");
    }

    #[test]
    fn a_link_in_the_place_of_a_socket_is_not_followed() {
        let folder = Folder::new("link");
        let (path, victim) = (folder.0.join("socket"), folder.0.join("victim"));
        let place = Place::of(Pid::this(), None, &path).unwrap();
        let mut sockets = UnixSockets::default();
        sockets.bind(&place, borrower(1, 1), 0).unwrap();
        sockets.bind(&place, borrower(2, 2), 0).unwrap();
        fs::write(&victim, "").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let beside = place.beside(2);
        fs::remove_file(&beside).unwrap();
        std::os::unix::fs::symlink(&victim, &beside).unwrap();
        sockets.switch(2);
        assert_eq!(fs::metadata(&victim).unwrap().permissions().mode() & 0o777, 0o600);
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
