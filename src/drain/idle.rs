//! Closes idle connections of workers that the stop signal kills, as far as this process may duplicate their
//! descriptors (pidfd_getfd(2)). [`super::signal_effect`] says why and decides when.

use std::mem;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use socket2::SockRef;

use crate::fleet::End;
use crate::kernel::duplicate::Duplicate;
use crate::kernel::procfs::{self, Life};
use crate::kernel::sockdiag::Traffic;
use crate::kernel::sys;

/// A worker that is still alive so long after the stop signal is assumed to handle it.
const WATCH_TIMEOUT: Duration = Duration::from_millis(400);
/// So many connections are held at most: each takes a descriptor.
const MAX_HELD: usize = 64;
/// The time of the first look, and between two later ones.
const FIRST_LOOK: Duration = Duration::from_millis(3);
const PAUSE: Duration = Duration::from_millis(1);

/// A connection that its client keeps open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenConnection {
    pub fd: u32,
    pub inode: u64,
    /// [`Traffic::received`] when it was found idle.
    pub received: u64,
}

/// A process and those of its connections that are idle.
pub type Idle = (Pid, Vec<OpenConnection>);

impl OpenConnection {
    /// A duplicate, if this process may have it and the connection is open still.
    fn duplicate(&self, pidfd: &OwnedFd, tid: Pid) -> Option<Duplicate> {
        Duplicate::of(pidfd.as_fd(), tid, self.fd, self.inode).ok()
    }

    /// Whether the process has it still.
    fn is_still_of(&self, pid: Pid) -> bool {
        procfs::socket_inode(pid, self.fd).is_ok_and(|inode| inode == Some(self.inode))
    }

    /// Whether something has come since it was found idle, if this process can know.
    fn has_new_data(&self, duplicate: &Duplicate) -> bool {
        sys::tcp_info(duplicate.as_fd()).is_ok_and(|info| Traffic::parse(&info).received != self.received)
    }

    /// Closes it, unless something has come. Returns whether nothing has.
    fn close(&self, duplicate: &Duplicate) -> bool {
        let is_idle = !self.has_new_data(duplicate);
        if is_idle {
            let _ = SockRef::from(duplicate).shutdown(Shutdown::Both); // an error means that the client has closed it
        }
        is_idle
    }
}

/// Whether something has come on these connections since they were found idle, if this process can know.
pub fn have_new_data(idle: &[Idle]) -> bool {
    let has_new_data = |(pid, connections): &Idle| {
        let Ok(pidfd) = sys::pidfd_open(pid.as_raw()) else { return false };
        let has_new_data =
            |it: &OpenConnection| it.duplicate(&pidfd, *pid).is_some_and(|fd| it.has_new_data(&fd));
        connections.iter().any(has_new_data)
    };
    idle.iter().any(has_new_data)
}

/// Closes these connections, except those on which something has come. Returns whether there are no such exceptions.
pub fn close(idle: &[Idle]) -> bool {
    let mut all = true;
    for (pid, connections) in idle {
        let Ok(pidfd) = sys::pidfd_open(pid.as_raw()) else { continue };
        for connection in connections {
            all &= connection.duplicate(&pidfd, *pid).is_none_or(|duplicate| connection.close(&duplicate));
        }
    }
    all
}

/// Processes that are sent the stop signal, until it is known what that does.
#[derive(Debug)]
pub struct EndWatch {
    generation: u32,
    stop_signal: Signal,
    alive: Vec<(Pid, Vec<Held>)>,
    kills: bool,
    until: Instant,
    next_look: Instant,
}

/// A connection that its process may lose at any time, but not before this process has closed it.
#[derive(Debug)]
struct Held {
    open: OpenConnection,
    duplicate: Duplicate,
}

impl EndWatch {
    /// Holds connections of processes of a worker of this generation, which are about to be sent the signal.
    pub fn hold(generation: u32, idle: &[Idle], stop_signal: Signal) -> Self {
        let mut room = MAX_HELD;
        let hold = |(pid, connections): &Idle| {
            let pidfd = sys::pidfd_open(pid.as_raw()).ok();
            let held = |open: &OpenConnection| {
                let duplicate = open.duplicate(pidfd.as_ref()?, *pid)?;
                Some(Held { open: open.clone(), duplicate })
            };
            let held: Vec<Held> = connections.iter().take(room).filter_map(held).collect();
            room -= held.len();
            (*pid, held)
        };
        let alive = idle.iter().map(hold).collect();
        let now = Instant::now();
        Self { generation, stop_signal, alive, kills: true, until: now + WATCH_TIMEOUT, next_look: now }
    }

    /// Looks for a moment, without a pause: what a process that handles the signal closes must not stay open here.
    pub fn begin(&mut self) {
        let end = Instant::now() + FIRST_LOOK;
        while !self.alive.is_empty() && Instant::now() < end {
            self.look();
        }
    }

    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// When to call [`EndWatch::look`] at the latest.
    pub fn deadline(&self) -> Instant {
        self.next_look
    }

    /// Closes the connections of those processes that the signal kills.
    pub fn look(&mut self) {
        for (pid, mut held) in mem::take(&mut self.alive) {
            match procfs::life(pid) {
                Life::Lives => {
                    held.retain(|Held { open, .. }| open.is_still_of(pid));
                    self.alive.push((pid, held));
                }
                Life::Killed(signal) => {
                    self.kills &= signal == self.stop_signal as u32;
                    held.iter().for_each(Held::close);
                }
                Life::Ended => self.kills = false,
            }
        }
        self.next_look = Instant::now() + PAUSE;
    }

    /// Whether the signal kills all of the processes, once that is known: one that is alive at the end handles it.
    pub fn verdict(&self, now: Instant) -> Option<bool> {
        match self.alive.is_empty() {
            true => Some(self.kills),
            false => (now >= self.until).then_some(false),
        }
    }

    /// A process was reaped: what /proc would have shown of it is gone.
    pub fn reaped(&mut self, pid: Pid, end: End) {
        for (_, held) in self.alive.extract_if(.., |(alive, _)| *alive == pid) {
            let is_killed = end == End::Killed(self.stop_signal as i32);
            self.kills &= is_killed;
            held.iter().filter(|_| is_killed).for_each(Held::close);
        }
    }
}

impl Held {
    fn close(&self) {
        self.open.close(&self.duplicate);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::process::{Child, Command};

    use nix::sys::signal::kill;
    use nix::sys::wait::{Id, WaitPidFlag, waitid};

    use super::*;

    /// A client, the server's end of its connection, and what is known of that.
    fn connection() -> (TcpStream, TcpStream, OpenConnection) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let inode = procfs::inode(server.as_fd()).unwrap();
        let fd = server.as_raw_fd() as u32;
        (client, server, OpenConnection { fd, inode, received: 0 })
    }

    fn is_open(client: &mut TcpStream) -> bool {
        client.set_nonblocking(true).unwrap();
        client.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    #[test]
    fn idle_connections_are_closed_and_one_on_which_something_has_come_is_not() {
        let (mut idle_client, _idle_server, idle) = connection();
        let (mut client, mut server, kept) = connection();
        let both = [(Pid::this(), vec![kept.clone(), idle.clone()])];
        assert!(!have_new_data(&both));
        client.write_all(b"?").unwrap();
        server.read_exact(&mut [0]).unwrap();
        assert!(have_new_data(&both) && !have_new_data(&[(Pid::this(), vec![idle])]));
        assert!(!close(&both));
        assert!(is_open(&mut client) && !is_open(&mut idle_client));
        assert!(close(&[(Pid::this(), vec![OpenConnection { received: 1, ..kept }])]));
        assert!(!is_open(&mut client));
    }

    #[test]
    fn another_socket_under_the_same_number_is_left_alone() {
        let (mut client, _server, kept) = connection();
        assert!(close(&[(Pid::this(), vec![OpenConnection { inode: kept.inode + 1, ..kept }])]));
        assert!(is_open(&mut client));
    }

    #[test]
    fn a_process_that_the_signal_kills_is_told_from_one_that_lives_on_and_one_that_exits() {
        let watch = |pid| {
            let mut watch = EndWatch::hold(1, &[(pid, Vec::new())], Signal::SIGTERM);
            watch.begin();
            watch
        };
        let mut lives = watch(Pid::this());
        assert_eq!(lives.verdict(Instant::now()), None);
        assert_eq!(lives.verdict(Instant::now() + WATCH_TIMEOUT), Some(false), "it lives");
        lives.reaped(Pid::from_raw(1), End::Killed(libc::SIGTERM));
        assert_eq!(lives.verdict(Instant::now()), None, "another one was reaped");
        lives.reaped(Pid::this(), End::Killed(libc::SIGTERM));
        assert_eq!(lives.verdict(Instant::now()), Some(true));
        let is_killed_by = |command: &mut Command, signal| {
            let mut child = command.spawn().unwrap();
            let pid = Pid::from_raw(child.id() as i32);
            kill(pid, signal).unwrap();
            waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
            let verdict = watch(pid).verdict(Instant::now());
            child.wait().unwrap();
            verdict.unwrap()
        };
        assert!(is_killed_by(Command::new("sleep").arg("1000"), Signal::SIGTERM));
        assert!(!is_killed_by(Command::new("sleep").arg("1000"), Signal::SIGUSR1), "by another signal");
        assert!(!is_killed_by(Command::new("sleep").arg("0"), Signal::SIGCONT), "it exits");
    }

    /// A process with a connection under this number, the client's end, and what is known of it.
    fn process_with_a_connection() -> (Child, TcpStream, OpenConnection) {
        const FD: i32 = 500;
        let (client, server, connection) = connection();
        let mut command = Command::new("sleep");
        command.arg("1000");
        sys::before_exec(&mut command, move || sys::dup2_for_exec(server.as_fd(), FD));
        let process = command.spawn().unwrap();
        (process, client, OpenConnection { fd: FD as u32, ..connection })
    }

    #[test]
    fn connections_of_a_killed_process_are_closed_unless_something_has_come() {
        for asks in [false, true] {
            let (mut killed, mut client, open) = process_with_a_connection();
            let pid = Pid::from_raw(killed.id() as i32);
            let mut watch = EndWatch::hold(1, &[(pid, vec![open])], Signal::SIGTERM);
            kill(pid, Signal::SIGTERM).unwrap();
            waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
            assert!(is_open(&mut client), "it is held over the end of its process");
            if asks {
                client.write_all(b"?").unwrap();
            }
            watch.begin();
            assert_eq!(watch.verdict(Instant::now()), Some(true));
            drop(watch);
            client.set_nonblocking(false).unwrap(); // a process that another test starts may have it for a moment
            let end = client.read(&mut [0]).map_err(|error| error.kind());
            assert_eq!(end, if asks { Err(ErrorKind::ConnectionReset) } else { Ok(0) });
            killed.wait().unwrap();
        }
    }

    #[test]
    fn a_connection_that_its_process_closes_itself_is_not_held() {
        let (mut client, server, open) = connection();
        let mut watch = EndWatch::hold(1, &[(Pid::this(), vec![open])], Signal::SIGTERM);
        watch.look();
        assert!(is_open(&mut client));
        drop(server);
        assert!(is_open(&mut client), "it is held");
        let deadline = Instant::now() + Duration::from_secs(60);
        while is_open(&mut client) {
            watch.look(); // a process that another test starts may have it for a moment
            assert!(Instant::now() < deadline);
        }
    }
}
