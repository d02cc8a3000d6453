//! What is done to the files of Unix sockets, in another process: a file system may not answer.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::socket::{UnixAddr, bind, connect};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, fchownat};
use serde::{Deserialize, Serialize};

/// Device and inode: which file it is, whatever its name.
pub type FileId = (u64, u64);

/// The file of a socket of ours. A worker may have put another one in its place.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OwnFile {
    pub id: FileId,
    /// It has one of these names: where it was bound, and where it was handed over to.
    pub paths: [Vec<u8>; 2],
}

/// Paths are bytes, because a name needn't be UTF-8.
#[derive(Debug, Serialize, Deserialize)]
pub enum Job {
    /// Bind the socket, with the permissions that the file gets from a process with this umask. If the path is temporary, another
    /// name in its directory will do. The outcome is the [`FileId`] and the path; nothing if the path is too long even by way
    /// of its directory.
    Bind {
        path: Vec<u8>,
        is_temporary: bool,
        mask: u32,
    },
    /// Have the file replace the one at a path, in one step, and take over its owner and mode.
    HandOver {
        file: OwnFile,
        path: Vec<u8>,
    },
    Remove {
        file: OwnFile,
    },
    /// Remove whatever is at a path.
    Unlink {
        path: Vec<u8>,
    },
    /// Connect the socket to that of the file.
    Connect {
        file: OwnFile,
    },
    /// All that was asked for before is done.
    Nothing,
}

/// Does a job, with the socket that came with it.
pub fn work(job: Job, socket: Option<BorrowedFd>) -> io::Result<Vec<u8>> {
    let socket = socket.map(|socket| socket.as_raw_fd());
    let socket = || socket.ok_or(io::ErrorKind::InvalidInput);
    match job {
        Job::Bind { path, is_temporary, mask } => {
            let mut path = Cow::Borrowed(as_path(&path));
            if is_temporary {
                let _ = fs::remove_file(&path); // a killed wrapper may have left it
            }
            umask(Mode::from_bits_truncate(mask));
            let mut bound = bind_path(socket()?, &path)?;
            if is_temporary && bound == Err(Errno::EADDRINUSE) {
                // Anyone may have put something there, if the directory is like /tmp.
                path = path.with_file_name(format!(".{:08x}.r", random())).into();
                bound = bind_path(socket()?, &path)?;
            }
            if bound == Err(Errno::ENAMETOOLONG) {
                return Ok(Vec::new());
            }
            bound?;
            let (device, inode) = file_id(&fs::symlink_metadata(&path)?);
            let path = path.as_os_str().as_bytes();
            return Ok([&device.to_ne_bytes(), &inode.to_ne_bytes(), path].concat());
        }
        Job::HandOver { file, path } => hand_over(&file, as_path(&path))?,
        Job::Remove { file } => fs::remove_file(file.find()?.0)?,
        Job::Unlink { path } => fs::remove_file(as_path(&path))?,
        Job::Connect { file } => {
            let (_, file) = file.find()?;
            connect(socket()?, &UnixAddr::new(&by_descriptor(&file))?)?;
        }
        Job::Nothing => {}
    }
    Ok(Vec::new())
}

/// The outcome of [`Job::Bind`].
pub fn parse_bound(bytes: &[u8]) -> Option<(FileId, Vec<u8>)> {
    let (device, rest) = bytes.split_first_chunk()?;
    let (inode, path) = rest.split_first_chunk()?;
    Some(((u64::from_ne_bytes(*device), u64::from_ne_bytes(*inode)), path.to_vec()))
}

fn random() -> u32 {
    RandomState::new().hash_one(()) as u32
}

fn as_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

fn file_id(metadata: &fs::Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

fn by_descriptor(file: &fs::File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

impl OwnFile {
    /// Where it was bound, if that isn't where it is, or will be, handed over to.
    pub fn temporary(&self) -> Option<&Path> {
        let [first, second] = &self.paths;
        (first != second).then(|| as_path(first))
    }

    /// Its path, and the file without the right to read or write it (O_PATH). The directory may belong to a worker, and another
    /// user may put anything there in between: so this follows no links, and is the own file or none.
    fn find(&self) -> io::Result<(&Path, fs::File)> {
        let [first, second] = self.paths.each_ref().map(|path| as_path(path));
        self.open(first).or_else(|_| self.open(second))
    }

    fn open<'a>(&self, path: &'a Path) -> io::Result<(&'a Path, fs::File)> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        if file_id(&file.metadata()?) != self.id {
            return Err(io::Error::from_raw_os_error(libc::ESTALE)); // it is another file by now
        }
        Ok((path, file))
    }
}

fn hand_over(file: &OwnFile, path: &Path) -> io::Result<()> {
    let (from, own) = file.find()?;
    let old = fs::symlink_metadata(path).ok().filter(|old| old.file_type().is_socket());
    if let Some(old) = old {
        let (uid, gid) = (Some(Uid::from_raw(old.uid())), Some(Gid::from_raw(old.gid())));
        let _ = fchownat(&own, "", uid, gid, AtFlags::AT_EMPTY_PATH);
        let _ = fs::set_permissions(by_descriptor(&own), old.permissions());
    }
    fs::rename(from, path)
}

/// Binds a path. If it is longer than addresses can be (unix(7)), it goes by way of the fd of its directory. (A worker gets
/// around the limit by changing into the directory.)
fn bind_path(socket: RawFd, path: &Path) -> io::Result<nix::Result<()>> {
    if let Ok(address) = UnixAddr::new(path) {
        return Ok(bind(socket, &address));
    }
    // Only a folder, because to open a FIFO would wait for a writer.
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let directory = fs::OpenOptions::new().read(true).custom_flags(flags).open(directory)?;
    let by_fd = by_descriptor(&directory).join(path.file_name().unwrap_or_default());
    Ok(UnixAddr::new(&by_fd).and_then(|address| bind(socket, &address)))
}
