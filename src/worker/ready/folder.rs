//! The folder of the NOTIFY_SOCKETs, in the folder for temporary files. Nobody can list it, and the names in it can't be
//! guessed. So only those can send that a worker tells of it, whatever user it has become.

use std::env;
use std::fs::{self, DirEntry, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;

const PREFIX: &str = "reuse-run-notify-";
const MODE: u32 = 0o711;

#[derive(Debug)]
pub struct Folder {
    /// The lock says that a process uses it; systemd-tmpfiles(8) leaves it alone too then.
    directory: Flock<File>,
    path: PathBuf,
}

impl Folder {
    /// A new one. Those that killed processes of this user have left are removed before.
    ///
    /// # Errors
    /// If there is no folder for temporary files that can be written to.
    pub fn new() -> io::Result<Self> {
        const ATTEMPTS: usize = 5;
        let parent = env::temp_dir();
        if !parent.is_absolute() {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        fs::read_dir(&parent)?.flatten().for_each(remove_stale);
        let mut result = Self::make(&parent);
        // Another process may take it for stale before it is locked.
        for _ in 1..ATTEMPTS {
            result = result.or_else(|_| Self::make(&parent));
        }
        result
    }

    fn make(parent: &Path) -> io::Result<Self> {
        let path = parent.join(format!("{PREFIX}{}", random_name()));
        with_umask(0, || fs::DirBuilder::new().mode(MODE).create(&path))?;
        let made = open(&path).map(|directory| Self { directory, path: path.clone() });
        if made.is_err() {
            let _ = fs::remove_dir(&path);
        }
        made
    }

    /// Binds a socket that every user may write to, and returns its path.
    pub fn bind(&self, socket: &OwnedFd) -> io::Result<PathBuf> {
        // Everybody can see the name that a socket was bound to (/proc/net/unix), but not what it is called then. By the
        // descriptor, because the owner of the parent may have put something else at the path.
        let (listed, name) = ("new", random_name());
        let path = self.path.join(&name);
        UnixAddr::new(&path)?; // it may be too long for the worker
        with_umask(0o111, || bind(socket.as_raw_fd(), &UnixAddr::new(&self.entry(listed))?))?;
        fs::rename(self.entry(listed), self.entry(&name))?;
        Ok(path)
    }

    /// Removes a path that [`Folder::bind`] returned.
    pub fn remove(&self, path: &Path) {
        let _ = path.file_name().map(|name| fs::remove_file(self.entry(&name.to_string_lossy())));
    }

    fn entry(&self, name: &str) -> PathBuf {
        by_descriptor(&self.directory).join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

fn by_descriptor(directory: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

/// 64 random bits.
fn random_name() -> String {
    format!("{:016x}", RandomState::new().hash_one(()))
}

fn with_umask<T>(mask: u32, make: impl FnOnce() -> T) -> T {
    let before = umask(Mode::from_bits_truncate(mask));
    let made = make();
    umask(before);
    made
}

/// Opens a folder of this user and locks it.
///
/// # Errors
/// If it is another file or another user's, or a process has locked it.
fn open(path: &Path) -> io::Result<Flock<File>> {
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let directory = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = directory.metadata()?;
    if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o777 != MODE {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
}

/// Removes what a killed process of this user has left: its folder, or a socket of version 0.1, which had no folder.
fn remove_stale(entry: DirEntry) {
    let (path, name) = (entry.path(), entry.file_name());
    if !name.to_string_lossy().starts_with(PREFIX) {
        return;
    }
    if let Ok(directory) = open(&path) {
        let files = fs::read_dir(by_descriptor(&directory)).into_iter().flatten().flatten();
        let sockets = files.filter(|file| file.file_type().is_ok_and(|kind| kind.is_socket()));
        sockets.for_each(|socket| drop(fs::remove_file(socket.path())));
        let _ = fs::remove_dir(&path);
    } else if entry.metadata().is_ok_and(|it| it.file_type().is_socket() && it.uid() == geteuid().as_raw())
        && is_refused(&path)
    {
        let _ = fs::remove_file(&path);
    }
}

/// Whether no socket is bound to this path any more.
fn is_refused(path: &Path) -> bool {
    let connect = || {
        let client = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        connect(client.as_raw_fd(), &UnixAddr::new(path)?)
    };
    connect() == Err(Errno::ECONNREFUSED)
}
