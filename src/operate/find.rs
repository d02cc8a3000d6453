//! Which reuse-run a command speaks to, and the connection to it. Any process may take a name in the abstract namespace, so
//! no name is believed: the kernel tells who listens under it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::{Pid, geteuid};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::kernel::procfs;
use crate::operate::peer::Peer;
use crate::operate::protocol::{self, Name};

/// How long to wait for room in the queue of a control socket.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait until it is known who has a name.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(1);
/// The pause between two attempts while there is no room.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Why a command failed, and its exit status.
#[derive(Debug)]
pub struct CommandError {
    pub why: String,
    pub exit_status: u8,
}

impl<E: Display> From<E> for CommandError {
    fn from(error: E) -> Self {
        Self { why: error.to_string(), exit_status: 1 }
    }
}

/// How a user says which reuse-run is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    Pid(u32),
    Name(Name),
}

/// The process that a command is for.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub pid: u32,
    /// `None`: of any user.
    uid: Option<u32>,
}

/// Why there is no connection.
enum Failure {
    Nothing,
    /// Something listens, but it is another process, another user's, or in another namespace.
    NotOurs,
    /// The queue stayed full.
    Full,
    Io(io::Error),
}

impl Target {
    /// The process with this PID. Root may command those of all users.
    fn named(pid: u32) -> Self {
        let user = geteuid();
        Self { pid, uid: (!user.is_root()).then_some(user.as_raw()) }
    }

    /// The process with this PID, of this user.
    fn own(pid: u32) -> Self {
        Self { pid, uid: Some(geteuid().as_raw()) }
    }

    /// Connects to it.
    ///
    /// # Errors
    /// When it isn't what was asked for, or takes no connection in time.
    pub fn connect(self) -> Result<UnixStream, CommandError> {
        let pid = self.pid;
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let names = names_of(pid).map_err(Failure::Io);
        let why = match names.and_then(|names| self.try_connect(names, deadline)) {
            Ok(stream) => return Ok(stream),
            Err(Failure::Nothing) => format!(
                "process {pid} is not a reuse-run that can be reached (not from another PID or network namespace)"
            ),
            Err(Failure::NotOurs) => format!("process {pid} is not a reuse-run of this user"),
            Err(Failure::Full) => format!("process {pid} does not answer"),
            Err(Failure::Io(error)) => format!("can't connect to process {pid}: {error}"),
        };
        Err(why.into())
    }

    /// Tries these names, and waits for those whose queue is full.
    fn try_connect(self, mut names: BTreeSet<String>, deadline: Instant) -> Result<UnixStream, Failure> {
        let mut failure = Failure::Nothing;
        loop {
            let mut full = BTreeSet::new();
            for name in names {
                match connect_now(&name) {
                    Ok(stream) if self.is(&stream) => return Ok(stream),
                    Ok(_) => failure = Failure::NotOurs,
                    Err(Errno::EAGAIN) => drop(full.insert(name)),
                    Err(Errno::ECONNREFUSED) => {}
                    Err(errno) => failure = Failure::Io(errno.into()),
                }
            }
            if full.is_empty() {
                return Err(failure);
            }
            if Instant::now() >= deadline {
                return Err(Failure::Full);
            }
            names = full;
            thread::sleep(RETRY_INTERVAL);
        }
    }

    /// Whether this process is the one that listens.
    fn is(self, stream: &UnixStream) -> bool {
        Peer::of(stream).is_ok_and(|peer| {
            peer.pid == self.pid && self.uid.is_none_or(|uid| uid == peer.uid) && peer.shares_namespaces()
        })
    }
}

/// The names under which the process with this PID may listen.
fn names_of(pid: u32) -> io::Result<BTreeSet<String>> {
    let is_its =
        |socket: &String| matches!(protocol::parse_socket_name(socket), Some((other, _)) if other == pid);
    Ok(listed_names().filter(is_its).chain([protocol::socket_name(pid, None)?]).collect())
}

/// All abstract names in this network namespace.
fn listed_names() -> impl Iterator<Item = String> {
    procfs::unix_sockets().into_iter().filter_map(|socket| Some(socket.name.strip_prefix('@')?.to_owned()))
}

/// Takes a name for this user, for as long as what is returned lives: of several that start at once, one gets it. Nobody can
/// connect to it. `None` if another user has taken it, for a second at least, or if there is no /proc.
///
/// # Errors
/// When another reuse-run of this user has it.
pub fn claim(name: &Name) -> io::Result<Option<Socket>> {
    let claim = || -> io::Result<Socket> {
        let address = SockAddr::unix(format!("\0{}", protocol::claim_name(geteuid().as_raw(), name)?))?;
        let claim = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        claim.bind(&address)?;
        Ok(claim)
    };
    let deadline = Instant::now() + CLAIM_TIMEOUT;
    loop {
        match claim() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            result => return Ok(result.ok()),
        }
        // Who has it has a control socket, or will.
        let found = find(Some(&Which::Name(name.clone()))).unwrap_or_default();
        match found.first() {
            Some(other) => return Err(has_name(other.pid, name)),
            None if Instant::now() >= deadline => return Ok(None),
            None => thread::sleep(RETRY_INTERVAL),
        }
    }
}

/// That this process has the name.
pub fn has_name(pid: u32, name: &Name) -> io::Error {
    io::Error::other(format!("process {pid} is a reuse-run with the name {name} already"))
}

/// Connects without waiting: EAGAIN if the queue is full.
fn connect_now(name: &str) -> nix::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(|_| Errno::last())?;
    Ok(stream)
}

/// Those that are meant, one at least: the given PID, or 1 if that is a reuse-run, or else all reuse-run of this user; of
/// them those with the given name.
///
/// # Errors
/// When there is none.
pub fn find(which: Option<&Which>) -> Result<Vec<Target>, CommandError> {
    let name = match which {
        Some(Which::Pid(pid)) => return Ok(vec![Target::named(*pid)]),
        Some(Which::Name(name)) => Some(name),
        None => None,
    };
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    // Others may listen under the PID of a reuse-run and another name. So only what listens under this one has it.
    let mut names: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
    for socket in listed_names() {
        if let Some((pid, its)) = protocol::parse_socket_name(&socket)
            && (name.is_none() || name == its.as_ref())
        {
            names.entry(pid).or_default().insert(socket);
        }
    }
    let all: Vec<u32> = names.keys().copied().collect();
    let try_connect = |target: Target, deadline| target.try_connect(names[&target.pid].clone(), deadline);
    // No user can choose to be PID 1, so root may trust it: in a container it may have given up root.
    if all.contains(&1) && try_connect(Target::named(1), deadline).is_ok() {
        return Ok(vec![Target::named(1)]);
    }
    let user = geteuid();
    // Others' sockets aren't even connected to: they could make this command wait.
    let (own, others): (Vec<u32>, Vec<u32>) = all.into_iter().partition(|pid| {
        let credentials = procfs::credentials(Pid::from_raw(*pid as i32));
        credentials.is_ok_and(|credentials| credentials.uids[1] == user.as_raw())
    });
    let found = |pid: &u32| match try_connect(Target::own(*pid), deadline) {
        Ok(_) => true,
        // It may be a reuse-run all the same. Otherwise others could choose which one is commanded, by their connections.
        Err(Failure::Full) if name.is_none() => is_called_as_this(*pid),
        Err(_) => false,
    };
    let found: Vec<Target> = own.into_iter().filter(found).map(Target::own).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let none = match name {
        Some(name) => format!("no reuse-run with the name {name} is running here"),
        None => "no reuse-run is running here".to_owned(),
    };
    if !others.is_empty() && !user.is_root() && name.is_none() {
        return Err("no reuse-run of this user is running here, only another user's".into());
    }
    let listens = |other: &Target| try_connect(*other, Instant::now()).is_ok();
    let others: Vec<Target> = others.into_iter().map(Target::named).filter(listens).collect();
    if others.is_empty() {
        return Err(none.into());
    }
    let list = list(&others);
    let why = format!("no reuse-run of root is running here; add the PID of another user's:{list}");
    Err(CommandError { why, exit_status: 2 })
}

/// Whether a process has this one's name in /proc, as each reuse-run has; but any process may choose it.
pub fn is_called_as_this(pid: u32) -> bool {
    procfs::name(Pid::from_raw(pid as i32)).is_some_and(|name| procfs::name(Pid::this()) == Some(name))
}

/// # Errors
/// When there are several.
pub fn only(found: &[Target]) -> Result<Target, CommandError> {
    if let [target] = found {
        return Ok(*target);
    }
    let list = list(found);
    let why = format!("several reuse-run are running; add the PID or the name of one of them:{list}");
    Err(CommandError { why, exit_status: 2 })
}

/// A line for each process.
fn list(found: &[Target]) -> String {
    found.iter().map(|Target { pid, .. }| format!("\n  {pid}  {}", procfs::command_line(*pid))).collect()
}
