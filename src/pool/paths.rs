//! Unix sockets: all workers of a generation share the socket that is bound to a path. The socket of the next generation
//! replaces it by rename(2), so clients always find a socket there.
//!
//! If a worker could unlink the path, before it binds it or when it ends, the others would lose it. So the worker is told
//! that it has unlinked the path, and the wrapper removes it when no worker serves it any more. A path that only one
//! worker has bound is its own to unlink.
//!
//! Here it is decided what happens, at once. [`super::files`] does it, in the same order for each path, and a call of a
//! worker that needs it done is answered then.

use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::poll::PollFlags;
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

use crate::ids::{Borrower, WorkerId};
use crate::kernel::jobs::{Done, Jobs};
use crate::kernel::{inbox, open_sockets, procfs, ready, sys};
use crate::pool::files::{self, FileId, Job, OwnFile};
use crate::pool::lend::max_for_each_worker;

/// After so many binds, those whose sockets are closed are forgotten if a worker has as many.
const FORGET_CLOSED_EVERY: usize = 64;
/// How long reuse-run waits in the end until the paths are removed.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

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

    fn bytes(&self) -> Vec<u8> {
        self.0.as_os_str().as_bytes().to_vec()
    }

    /// The name, in the same directory, of a newer generation's socket until it replaces the one at the path. It is
    /// short, since the addresses of Unix sockets are, and always the same, so that a file which a killed wrapper left
    /// is found.
    fn temporary(&self, generation: u32) -> Self {
        // FNV-1a, so that each path in a directory has its own name.
        let bytes = self.0.as_os_str().as_bytes();
        let hash = bytes
            .iter()
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        Self(self.0.with_file_name(format!(".{hash:08x}.{generation}")))
    }
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

/// A call of a worker, with the kernel's id.
pub type CallId = (WorkerId, u64);

/// A socket with a path.
#[derive(Debug)]
pub(super) struct Bound {
    socket: ManuallyDrop<Socket>,
    pub(super) inode: u64,
    /// `None` until it is bound.
    file: Option<OwnFile>,
    /// Whether it has a temporary name, since an older generation has the path.
    is_aside: bool,
    /// The workers that have bound it, also those that died.
    borrowers: BTreeMap<WorkerId, Pid>,
}

impl Bound {
    fn new(is_aside: bool) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        let inode = procfs::inode(socket.as_fd())?;
        let socket = ManuallyDrop::new(socket);
        Ok(Self { socket, inode, file: None, is_aside, borrowers: BTreeMap::new() })
    }

    /// Whether a connection waits to be accepted. One that a worker has shut down (SHUT_RDWR) is always readable, and has
    /// POLLHUP (`unix_poll`, net/unix/af_unix.c): nothing more comes.
    pub(super) fn has_waiting(&self) -> bool {
        self.readiness() == PollFlags::POLLIN
    }

    fn readiness(&self) -> PollFlags {
        match self.socket.is_listener() {
            Ok(true) => ready::now(self.socket.as_fd(), PollFlags::POLLIN),
            _ => PollFlags::empty(),
        }
    }

    /// The name that it was bound to. The kernel keeps it for the socket and the connections that it accepts.
    pub(super) fn name(&self) -> Option<String> {
        Some(self.socket.local_addr().ok()?.as_pathname()?.to_string_lossy().into_owned())
    }

    /// Whether this is its temporary name. Resolved paths are equal if their bytes are, which are compared much faster.
    fn had_name(&self, path: &SocketPath) -> bool {
        let name = self.file.as_ref().and_then(OwnFile::temporary);
        name.is_some_and(|name| name.as_os_str() == path.0.as_os_str())
    }

    fn removal(&self) -> Option<Job> {
        self.file.clone().map(|file| Job::Remove { file })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let waiting = !self.readiness().is_empty();
        let socket = sys::take_in_drop(&mut self.socket);
        if waiting {
            inbox::close_elsewhere(socket.into()); // anyone may have sent anything on these connections
        }
    }
}

/// What has become of a path that a worker wanted to remove.
#[derive(Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is still there, since other workers have bound it too.
    Kept,
    /// It is being removed, or something else has to be done with it before.
    Pending,
}

/// How it goes on with a call that had to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Ask again. What was pending is done.
    Again,
    /// The path is removed. Whether the worker has bound it before.
    Removed {
        was_its_own: bool,
    },
    Failed(i32),
    /// Only the kernel can do it.
    LeftToKernel,
}

/// What has been done.
#[derive(Debug)]
pub enum News {
    Call(CallId, Outcome),
    /// See [`UnixSockets::reach`].
    Reached(WorkerId, io::Result<()>),
}

/// What a job was for.
#[derive(Debug)]
enum Purpose {
    Bind {
        generation: u32,
        call: CallId,
    },
    HandOver {
        generation: u32,
    },
    /// The sockets are closed when their files are gone.
    Remove {
        _sockets: Vec<Bound>,
    },
    Unlink {
        sockets: Vec<Bound>,
        call: CallId,
    },
    Wait {
        call: CallId,
    },
    Reach {
        worker: WorkerId,
    },
}

/// The sockets of all paths, by generation.
#[derive(Debug)]
pub struct UnixSockets {
    paths: BTreeMap<SocketPath, BTreeMap<u32, Bound>>,
    /// How many paths were bound since it was last found out which sockets are closed.
    unchecked: usize,
    jobs: Jobs<SocketPath, Purpose, Job>,
}

impl UnixSockets {
    /// # Errors
    /// When there is no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let jobs = Jobs::new(c"reuse-run-path", files::work)?;
        Ok(Self { paths: BTreeMap::new(), unchecked: 0, jobs })
    }

    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// Whether `path`, which isn't resolved yet, may be a path of ours: one of them has the same file name.
    pub fn may_have(&self, path: &Path) -> bool {
        self.names().any(|ours| ours.file_name() == path.file_name())
    }

    /// All paths, and the names of the sockets that were bound while an older one had the path.
    fn names(&self) -> impl Iterator<Item = &Path> {
        let temporaries = self.bound().filter_map(|bound| bound.file.as_ref()?.temporary());
        self.paths.keys().map(SocketPath::path).chain(temporaries)
    }

    /// Whether a worker has bound a socket that had this name until it replaced an older one. getsockname(2) shows it as long
    /// as the socket lives.
    pub fn had_name(&self, worker: WorkerId, path: &SocketPath) -> bool {
        self.bound().any(|bound| bound.borrowers.contains_key(&worker) && bound.had_name(path))
    }

    /// Removes a path for a worker, and forgets its socket, unless other workers have bound it too.
    pub fn remove(&mut self, path: &SocketPath, call: CallId) -> Removal {
        let (worker, _) = call;
        let sockets = self.paths.get(path);
        let is_others = |bound: &Bound| bound.borrowers.keys().any(|other| *other != worker);
        if sockets.is_some_and(|sockets| sockets.values().any(is_others)) {
            return Removal::Kept;
        }
        // A socket that hasn't replaced the older one yet has a temporary name, which the worker may have asked for.
        if sockets.is_none() && self.bound().any(|bound| bound.is_aside && bound.had_name(path)) {
            return Removal::Kept;
        }
        if sockets.is_some_and(|sockets| sockets.values().any(|bound| bound.file.is_none())) {
            self.jobs.ask(path.clone(), Purpose::Wait { call }, vec![Job::Nothing], None);
            return Removal::Pending;
        }
        let sockets: Vec<Bound> =
            self.paths.remove(path).into_iter().flat_map(BTreeMap::into_values).collect();
        let own = sockets.iter().filter_map(Bound::removal);
        let jobs = own.chain([Job::Unlink { path: path.bytes() }]).collect();
        self.jobs.ask(path.clone(), Purpose::Unlink { sockets, call }, jobs, None);
        Removal::Pending
    }

    /// Binds a path for a call of a worker, and returns the inode number of the socket that the worker's generation shares;
    /// `None` if that isn't bound yet. If another generation has the path, the socket has a temporary name until
    /// [`UnixSockets::switch`].
    ///
    /// # Errors
    /// QuotaExceeded if it has bound as many paths as it may, and those of socket(2).
    pub fn bind(
        &mut self,
        path: &SocketPath,
        borrower: Borrower,
        mask: u32,
        call: CallId,
    ) -> io::Result<Option<u64>> {
        let Borrower { worker, pid, generation, .. } = borrower;
        if let Some(bound) = self.paths.get_mut(path).and_then(|sockets| sockets.get_mut(&generation)) {
            if bound.file.is_none() {
                self.jobs.ask(path.clone(), Purpose::Wait { call }, vec![Job::Nothing], None);
                return Ok(None);
            }
            bound.borrowers.insert(worker, pid);
            return Ok(Some(bound.inode));
        }
        if self.has_too_many(borrower) {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let is_aside = self.paths.contains_key(path);
        let mut bound = Bound::new(is_aside)?;
        bound.borrowers.insert(worker, pid);
        let its_path = if is_aside { path.temporary(generation) } else { path.clone() };
        let job = Job::Bind { path: its_path.bytes(), is_temporary: is_aside, mask };
        let socket = bound.socket.try_clone()?;
        self.jobs.ask(path.clone(), Purpose::Bind { generation, call }, vec![job], Some(socket.into()));
        self.paths.entry(path.clone()).or_default().insert(generation, bound);
        Ok(None)
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
            let may_be =
                |bound: &&Bound| bound.file.is_some() && of_worker(bound) && bound.borrowers.len() == 1;
            let own: HashSet<u64> = self.bound().filter(may_be).map(|bound| bound.inode).collect();
            let open = open_sockets::open_elsewhere(borrower.pid, &own);
            let is_closed = |bound: &Bound| own.contains(&bound.inode) && !open.contains(&bound.inode);
            self.retain(|sockets| sockets.len() > 1 || !sockets.values().all(is_closed), |_| true);
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

    /// Begins to open a connection to the socket that a worker's generation has for a path, whatever name it has now. It
    /// is news when the connection is open, or why it is not: WouldBlock if the queue is full.
    ///
    /// # Errors
    /// NotFound if it has none, and those of socket(2).
    pub fn reach(&mut self, path: &Path, generation: u32, worker: WorkerId) -> io::Result<Socket> {
        let mut of_path = self.paths.iter().filter(|(socket_path, _)| socket_path.path() == path);
        let bound = of_path.find_map(|(path, sockets)| Some((path, sockets.get(&generation)?.file.clone()?)));
        let (path, file) = bound.ok_or(io::ErrorKind::NotFound)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        let its = socket.try_clone()?.into();
        self.jobs.ask(path.clone(), Purpose::Reach { worker }, vec![Job::Connect { file }], Some(its));
        Ok(socket)
    }

    /// Has the sockets of a generation replace older ones, each in one step, with their owner and mode: a worker that
    /// changed those meant the path and not the socket.
    pub fn switch(&mut self, generation: u32) {
        for (path, sockets) in &mut self.paths {
            let Some(bound) = sockets.get_mut(&generation).filter(|bound| bound.is_aside) else { continue };
            let Some(file) = bound.file.clone() else { continue };
            bound.is_aside = false;
            let job = Job::HandOver { file, path: path.bytes() };
            self.jobs.ask(path.clone(), Purpose::HandOver { generation }, vec![job], None);
        }
    }

    /// Removes all paths, so that no new connections come. The sockets serve those that have come.
    pub fn remove_paths(&mut self) {
        for (path, sockets) in &self.paths {
            let jobs = sockets.values().filter_map(Bound::removal).collect();
            self.jobs.ask(path.clone(), Purpose::Remove { _sockets: Vec::new() }, jobs, None);
        }
    }

    /// Closes the sockets of all other generations, and removes the paths that no generation has any more.
    pub fn keep(&mut self, keep: impl Fn(u32) -> bool) {
        self.retain(|_| true, keep);
    }

    /// Closes the sockets for which one of these is false, and removes their files. What isn't bound yet is kept.
    fn retain(
        &mut self,
        keep: impl Fn(&BTreeMap<u32, Bound>) -> bool,
        keep_generation: impl Fn(u32) -> bool,
    ) {
        for (path, sockets) in &mut self.paths {
            let keeps = keep(sockets);
            let stays =
                |generation, bound: &Bound| bound.file.is_none() || (keeps && keep_generation(generation));
            let gone = sockets.iter().filter(|(generation, bound)| !stays(**generation, bound));
            let gone: Vec<u32> = gone.map(|(generation, _)| *generation).collect();
            let gone: Vec<Bound> = gone.iter().filter_map(|generation| sockets.remove(generation)).collect();
            if !gone.is_empty() {
                let jobs = gone.iter().filter_map(Bound::removal).collect();
                self.jobs.ask(path.clone(), Purpose::Remove { _sockets: gone }, jobs, None);
            }
        }
        self.paths.retain(|_, sockets| !sockets.is_empty());
    }

    /// What has been done. To be called when this is readable, and at its deadline.
    pub fn take(&mut self, now: Instant) -> Vec<News> {
        let done = self.jobs.take(now);
        done.into_iter().filter_map(|done| self.follow(done)).collect()
    }

    fn follow(&mut self, done: Done<SocketPath, Purpose, Job>) -> Option<News> {
        let Done { key: path, tag, outcomes } = done;
        self.jobs.forgive(&path);
        let failure = outcomes.iter().find_map(|(_, outcome)| outcome.clone().err());
        match tag {
            Purpose::Bind { generation, call } => {
                let file =
                    outcomes.iter().find_map(|(_, outcome)| files::parse_bound(outcome.as_ref().ok()?));
                let outcome = match failure {
                    _ if self.is_bound(&path, generation, file) => Outcome::Again,
                    Some(errno) => Outcome::Failed(errno),
                    None => Outcome::LeftToKernel,
                };
                Some(News::Call(call, outcome))
            }
            Purpose::HandOver { generation } => {
                let name = path.path().display();
                let Some(errno) = failure else {
                    debug!("{name} belongs to generation {generation}");
                    return None;
                };
                let why = match errno {
                    libc::ESTALE => "it is another file by now".to_owned(),
                    libc::ETIMEDOUT => "its file system does not answer".to_owned(),
                    _ => io::Error::from_raw_os_error(errno).to_string(),
                };
                warn!("can't hand {name} over to generation {generation}: {why}");
                let sockets = self.paths.get_mut(&path);
                let bound = sockets.and_then(|sockets| sockets.get_mut(&generation));
                bound.into_iter().for_each(|bound| bound.is_aside = true);
                None
            }
            Purpose::Remove { .. } => None,
            Purpose::Unlink { sockets, call } => {
                let has_removed = outcomes.iter().any(|(_, outcome)| outcome.is_ok());
                let removed = Outcome::Removed { was_its_own: !sockets.is_empty() };
                Some(News::Call(call, failure.filter(|_| !has_removed).map_or(removed, Outcome::Failed)))
            }
            Purpose::Wait { call } => Some(News::Call(call, Outcome::Again)),
            Purpose::Reach { worker } => {
                let reached = failure.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
                Some(News::Reached(worker, reached))
            }
        }
    }

    /// The socket of a generation has this file now, or could not be bound. Returns whether it is bound.
    fn is_bound(&mut self, path: &SocketPath, generation: u32, file: Option<(FileId, Vec<u8>)>) -> bool {
        let Some(sockets) = self.paths.get_mut(path) else { return false };
        if let (Some(bound), Some((id, its_path))) = (sockets.get_mut(&generation), file) {
            bound.file = Some(OwnFile { id, paths: [its_path, path.bytes()] });
            return true;
        }
        sockets.remove(&generation);
        if sockets.is_empty() {
            self.paths.remove(path);
        }
        false
    }

    /// When to call [`UnixSockets::take`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.jobs.deadline()
    }

    /// Removes all paths, but doesn't wait long for that.
    pub fn finish(&mut self) {
        let until = Instant::now() + FINISH_TIMEOUT;
        while self.jobs.wait(until) {
            self.take(Instant::now());
        }
        self.keep(|_| false);
        while self.jobs.wait(until) {
            self.take(Instant::now());
        }
        self.jobs.finish();
    }

    /// All sockets with their generations.
    pub(super) fn sockets(&self) -> impl Iterator<Item = (u32, &Bound)> {
        self.paths.values().flatten().map(|(generation, bound)| (*generation, bound))
    }

    /// The generations of the paths that are being handed over or removed. Until then clients come by the old sockets.
    pub(super) fn changing(&self) -> impl Iterator<Item = u32> {
        let is_change =
            |purpose: &Purpose| matches!(purpose, Purpose::HandOver { .. } | Purpose::Remove { .. });
        let changing = self.jobs.pending().filter(move |(_, purpose)| is_change(purpose));
        changing
            .flat_map(|(path, _)| self.paths.get(path).into_iter().flatten())
            .map(|(generation, _)| *generation)
    }
}

impl AsFd for UnixSockets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.jobs.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::fd::AsRawFd;
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

    fn sockets() -> UnixSockets {
        UnixSockets::new().unwrap()
    }

    /// Waits until all is done.
    fn settle(sockets: &mut UnixSockets) -> Vec<News> {
        let mut news = Vec::new();
        while sockets.jobs.wait(Instant::now() + Duration::from_secs(60)) {
            news.extend(sockets.take(Instant::now()));
        }
        news
    }

    fn outcome(sockets: &mut UnixSockets) -> Outcome {
        let outcomes = settle(sockets).into_iter().map(|news| match news {
            News::Call(_, outcome) => outcome,
            News::Reached(..) => panic!("{news:?}"),
        });
        outcomes.last().unwrap()
    }

    fn bind(sockets: &mut UnixSockets, path: &SocketPath, borrower: Borrower, mask: u32) -> io::Result<u64> {
        loop {
            if let Some(inode) = sockets.bind(path, borrower, mask, (borrower.worker, 0))? {
                return Ok(inode);
            }
            match outcome(sockets) {
                Outcome::Again => {}
                Outcome::Failed(errno) => return Err(io::Error::from_raw_os_error(errno)),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Returns what has become of the path, unless it was kept.
    fn remove(sockets: &mut UnixSockets, path: &SocketPath, worker: u32) -> Option<Outcome> {
        match sockets.remove(path, (WorkerId(worker), 0)) {
            Removal::Kept => None,
            Removal::Pending => Some(outcome(sockets)),
        }
    }

    fn reach(sockets: &mut UnixSockets, path: &Path, generation: u32) -> io::Result<Socket> {
        let socket = sockets.reach(path, generation, WorkerId(0))?;
        match settle(sockets).pop() {
            Some(News::Reached(_, reached)) => reached.map(|()| socket),
            other => panic!("{other:?}"),
        }
    }

    fn switch(sockets: &mut UnixSockets, generation: u32) {
        sockets.switch(generation);
        settle(sockets);
    }

    fn keep(sockets: &mut UnixSockets, keep: impl Fn(u32) -> bool) {
        sockets.keep(keep);
        settle(sockets);
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
        let mut sockets = sockets();
        let first = bind(&mut sockets, &socket_path, borrower(1, 1), 0o077).unwrap();
        assert_eq!(
            bind(&mut sockets, &socket_path, borrower(2, 1), 0o077).unwrap(),
            first,
            "siblings share it"
        );
        sockets.listen(first, 8).unwrap();
        switch(&mut sockets, 1);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let _client = UnixStream::connect(&path).unwrap();
        // Of this process other tests have children, which get its sockets.
        let no_process = Pid::from_raw(i32::MAX);
        let workers = [(WorkerId(1), no_process, 1), (WorkerId(3), no_process, 2)];
        assert_eq!(sockets.busy(&workers), BTreeSet::from([WorkerId(1)]), "a connection waits");

        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let second = bind(&mut sockets, &socket_path, borrower(3, 2), 0o022).unwrap();
        assert_ne!(second, first);
        sockets.listen(second, 8).unwrap();
        switch(&mut sockets, 2);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666, "the mode is kept");
        keep(&mut sockets, |generation| generation == 2);
        let _client = UnixStream::connect(&path).unwrap();
        assert_eq!(sockets.busy(&workers), BTreeSet::from([WorkerId(3)]));
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "nothing else is left");

        keep(&mut sockets, |_| false);
        assert!(sockets.is_empty() && !path.exists());
    }

    #[test]
    fn each_generation_is_reached_by_its_own_socket_before_and_after_the_switch() {
        let folder = Folder::new("reach");
        let path = folder.0.join("n".repeat(80)); // with its folder longer than an address
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let mut sockets = sockets();
        let first = bind(&mut sockets, &socket_path, borrower(1, 1), 0).unwrap();
        let second = bind(&mut sockets, &socket_path, borrower(2, 2), 0).unwrap();
        for (inode, backlog) in [(first, 8), (second, 0)] {
            sockets.listen(inode, backlog).unwrap();
        }
        let has_waiting = |sockets: &UnixSockets| {
            [1, 2].map(|generation| sockets.paths[&socket_path][&generation].has_waiting())
        };
        let _client = reach(&mut sockets, &path, 2).unwrap();
        assert_eq!(has_waiting(&sockets), [false, true]);
        let error = reach(&mut sockets, &path, 2).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "its queue is full");
        assert_eq!(reach(&mut sockets, &path, 3).unwrap_err().kind(), io::ErrorKind::NotFound);
        switch(&mut sockets, 2);
        sockets.socket(second).map(|socket| nix::sys::socket::accept(socket.as_raw_fd()).unwrap());
        reach(&mut sockets, &path, 2).unwrap();
    }

    #[test]
    fn a_generation_that_fails_leaves_the_path_to_the_one_that_serves() {
        let folder = Folder::new("fails");
        let path = folder.0.join("socket");
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let mut sockets = sockets();
        let first = bind(&mut sockets, &socket_path, borrower(1, 1), 0).unwrap();
        sockets.listen(first, 8).unwrap();
        bind(&mut sockets, &socket_path, borrower(2, 2), 0).unwrap();
        keep(&mut sockets, |generation| generation == 1);
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_worker_may_unlink_a_path_until_another_worker_has_bound_it() {
        let folder = Folder::new("own");
        let socket_path = SocketPath::resolve(Pid::this(), None, &folder.0.join("socket")).unwrap();
        let mut sockets = sockets();
        let inode = bind(&mut sockets, &socket_path, borrower(1, 1), 0).unwrap();
        let (removed, nothing) = (Outcome::Removed { was_its_own: true }, Outcome::Failed(libc::ENOENT));
        assert_eq!(remove(&mut sockets, &socket_path, 2), None, "another worker has it");
        assert_eq!(remove(&mut sockets, &socket_path, 1), Some(removed));
        assert!(sockets.socket(inode).is_none() && sockets.is_empty() && !socket_path.path().exists());
        assert_eq!(remove(&mut sockets, &socket_path, 1), Some(nothing));
        bind(&mut sockets, &socket_path, borrower(1, 1), 0).unwrap();
        bind(&mut sockets, &socket_path, borrower(2, 2), 0).unwrap();
        let temporary = socket_path.temporary(2);
        for socket_path in [&socket_path, &temporary] {
            assert_eq!(remove(&mut sockets, socket_path, 1), None);
            assert_eq!(remove(&mut sockets, socket_path, 2), None);
        }
        switch(&mut sockets, 2);
        assert!(!temporary.path().exists() && sockets.may_have(temporary.path()));
        assert_eq!([1, 2].map(|worker| sockets.had_name(WorkerId(worker), &temporary)), [false, true]);
        assert_eq!(remove(&mut sockets, &temporary, 2), Some(nothing), "not ours any more");
        keep(&mut sockets, |generation| generation == 2);
        assert_eq!(remove(&mut sockets, &socket_path, 2), Some(removed), "the others are gone");
    }

    #[test]
    fn calls_for_a_path_are_answered_as_if_each_had_been_carried_out_at_once() {
        let folder = Folder::new("order");
        let socket_path = SocketPath::resolve(Pid::this(), None, &folder.0.join("socket")).unwrap();
        let mut sockets = sockets();
        let [one, other] = [borrower(1, 1), borrower(2, 1)];
        assert_eq!(sockets.bind(&socket_path, one, 0, (one.worker, 1)).unwrap(), None);
        assert_eq!(
            sockets.bind(&socket_path, other, 0, (other.worker, 2)).unwrap(),
            None,
            "it waits for the first"
        );
        assert_eq!(sockets.remove(&socket_path, (one.worker, 3)), Removal::Pending);
        sockets.keep(|_| false);
        let calls = settle(&mut sockets).into_iter().map(|news| match news {
            News::Call((_, id), outcome) => (id, outcome),
            News::Reached(..) => panic!("{news:?}"),
        });
        assert_eq!(calls.collect::<Vec<_>>(), [1, 2, 3].map(|id| (id, Outcome::Again)));
        let shared = bind(&mut sockets, &socket_path, one, 0).unwrap();
        assert_eq!(bind(&mut sockets, &socket_path, other, 0).unwrap(), shared);
        // A removal and a bind behind it.
        keep(&mut sockets, |_| false);
        bind(&mut sockets, &socket_path, one, 0).unwrap();
        assert_eq!(sockets.remove(&socket_path, (one.worker, 4)), Removal::Pending);
        let new = bind(&mut sockets, &socket_path, one, 0).unwrap();
        assert_ne!(new, shared);
        UnixStream::connect(socket_path.path()).unwrap_err(); // it doesn't listen
        sockets.finish();
        assert!(!socket_path.path().exists());
    }

    #[test]
    fn a_file_that_replaced_the_socket_is_not_removed() {
        let folder = Folder::new("others");
        let path = folder.0.join("socket");
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let mut sockets = sockets();
        bind(&mut sockets, &socket_path, borrower(1, 1), 0).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        keep(&mut sockets, |_| false);
        assert!(path.exists(), "another worker has it");
    }

    #[test]
    fn a_link_that_replaced_the_socket_is_not_followed() {
        let folder = Folder::new("link");
        let (path, victim) = (folder.0.join("socket"), folder.0.join("victim"));
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let mut sockets = sockets();
        bind(&mut sockets, &socket_path, borrower(1, 1), 0).unwrap();
        bind(&mut sockets, &socket_path, borrower(2, 2), 0).unwrap();
        fs::write(&victim, "").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let temporary = socket_path.temporary(2).0;
        fs::remove_file(&temporary).unwrap();
        std::os::unix::fs::symlink(&victim, &temporary).unwrap();
        switch(&mut sockets, 2);
        assert_eq!(fs::metadata(&victim).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn sockets_that_their_workers_have_closed_are_forgotten() {
        let folder = Folder::new("many");
        let mut sockets = sockets();
        for number in 0..3 * FORGET_CLOSED_EVERY {
            let path = folder.0.join(number.to_string());
            let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
            let dead = Pid::from_raw(i32::MAX);
            bind(&mut sockets, &socket_path, Borrower { pid: dead, ..borrower(1, 1) }, 0).unwrap();
        }
        assert!(sockets.paths.len() <= FORGET_CLOSED_EVERY, "{}", sockets.paths.len());
    }

    #[test]
    fn a_path_that_a_foreign_listener_has_is_in_use() {
        let folder = Folder::new("in-use");
        let path = folder.0.join("socket");
        let _other = UnixListener::bind(&path).unwrap();
        let socket_path = SocketPath::resolve(Pid::this(), None, &path).unwrap();
        let error = bind(&mut sockets(), &socket_path, borrower(1, 1), 0).unwrap_err();
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
