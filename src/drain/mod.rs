//! Which retired workers have finished their work.
//!
//! After the switch no new connection is sent to them. What was under way arrives: handshakes complete and connections
//! are accepted. When that is over and each of its connections is idle, a worker may get the stop signal.

pub mod idle;
pub mod rule;
pub mod signal_effect;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use log::warn;
use nix::unistd::Pid;

use crate::address::Address;
use crate::drain::idle::{Idle, OpenConnection};
use crate::drain::rule::{IdleRule, Seen};
use crate::ids::WorkerId;
use crate::kernel::sockdiag::{Connection, SockDiag};
use crate::kernel::{open_sockets, procfs};
use crate::pool::Pool;
use crate::pool::paths::UnixSockets;

/// The time between two polls, at least.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Polls take at most one part in so many of the time, however many connections there are.
const POLL_SHARE: u32 = 10;
/// The time until connections are listed again after that has failed.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// A client that takes longer than this for its handshake is not waited for.
const MAX_HANDSHAKE: Duration = Duration::from_secs(3);

#[derive(Debug)]
struct Retired {
    pid: Pid,
    generation: u32,
    since: Instant,
    addresses: BTreeSet<Address>,
    /// Clients whose handshake was under way at the first poll; `None` before it.
    handshakes: Option<HashSet<SocketAddr>>,
    /// Since when its queues were empty at each poll.
    empty_since: Option<Instant>,
}

/// A worker to which everything has come that was on its way.
#[derive(Debug, PartialEq, Eq)]
pub struct Arrived {
    pub worker: WorkerId,
    pub generation: u32,
    /// Whether it has finished its work.
    pub is_done: bool,
    /// The idle connections that its clients keep open.
    pub idle: Vec<Idle>,
}

impl Arrived {
    /// The number of idle connections that its clients keep open.
    pub fn connections(&self) -> usize {
        self.idle.iter().map(|(_, connections)| connections.len()).sum()
    }
}

/// The retired workers that are watched.
pub struct Drain {
    rule: IdleRule,
    /// What the last poll has shown of each connection, by inode number.
    seen: HashMap<u64, Seen>,
    retired: BTreeMap<WorkerId, Retired>,
    /// Open from the beginning: later there may be no file descriptor left.
    diag: Option<SockDiag>,
    /// Whether the last poll could not list connections.
    has_failed: bool,
    next_poll: Option<Instant>,
}

impl Drain {
    pub fn new(rule: IdleRule) -> Self {
        let (seen, retired) = (HashMap::new(), BTreeMap::new());
        Self { rule, seen, retired, diag: SockDiag::new().ok(), has_failed: false, next_poll: None }
    }

    /// Everything is being stopped.
    pub fn hurry(&mut self) {
        self.rule.is_stopping = true;
    }

    /// Begins to watch a worker's connections to these addresses; call it after the switch.
    pub fn watch(
        &mut self,
        worker: WorkerId,
        pid: Pid,
        generation: u32,
        addresses: BTreeSet<Address>,
        now: Instant,
    ) {
        let retired = Retired { pid, generation, since: now, addresses, handshakes: None, empty_since: None };
        self.retired.insert(worker, retired);
        self.next_poll.get_or_insert(now);
    }

    /// Stops watching a worker.
    pub fn forget(&mut self, worker: WorkerId) {
        self.retired.remove(&worker);
        if self.retired.is_empty() {
            self.next_poll = None;
            self.has_failed = false;
            self.seen.clear();
        }
    }

    /// When to call [`Drain::poll`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.next_poll
    }

    /// The workers that may have finished their work, if a poll is due. Call [`Drain::polled`] after it.
    pub fn poll(&mut self, pool: &Pool, unix: &UnixSockets, now: Instant) -> Vec<Arrived> {
        if self.next_poll.is_none_or(|at| at > now) {
            return Vec::new();
        }
        // The queues first: a connection that leaves its queue later has an owner when connections are listed.
        for (worker, retired) in &mut self.retired {
            let since = retired.empty_since.unwrap_or(now);
            retired.empty_since = pool.queues_are_empty(*worker).then_some(since);
        }
        let connections = match self.connections() {
            Ok(connections) => connections,
            Err(error) => {
                if !mem::replace(&mut self.has_failed, true) {
                    warn!("can't list connections, so retired workers take up to all of --drain: {error}");
                }
                self.next_poll = Some(now + RETRY_INTERVAL);
                return Vec::new();
            }
        };
        self.has_failed = false;
        let of = |address: &Address| connections.get(&key(address)).map_or(&[][..], Vec::as_slice);
        let mut arrived = Vec::new();
        let workers: Vec<(WorkerId, Pid, u32)> =
            self.retired.iter().map(|(worker, retired)| (*worker, retired.pid, retired.generation)).collect();
        let busy_on_paths = unix.busy(&workers);
        for (worker, retired) in &mut self.retired {
            let at = |address| of(address).iter().filter(|row| address.accepts(row.local));
            let rows: Vec<&Connection> = retired.addresses.iter().flat_map(at).collect();
            let is_quiet = |since| !pool.gets_datagrams(*worker) || self.rule.is_quiet(since, now);
            let has_answered = retired.empty_since.is_some_and(is_quiet) && !busy_on_paths.contains(worker);
            if retired.has_arrived(&rows, retired.empty_since.is_some(), now) && has_answered {
                arrived.push((*worker, retired.pid, retired.generation));
            }
        }
        let (mut open, mut busy) = (HashMap::new(), Busy::default());
        let watched: BTreeSet<&Address> =
            self.retired.values().flat_map(|retired| &retired.addresses).collect();
        let mut last_seen = mem::take(&mut self.seen);
        for row in connections.values().flatten().filter(|row| !row.opening && row.inode != 0) {
            open.insert(row.inode.into(), row.traffic.received);
            let seen = Seen::update(last_seen.remove(&row.inode.into()), row, now);
            self.seen.insert(row.inode.into(), seen);
            if !self.rule.is_idle(row, &seen) {
                busy.all.insert(row.inode.into());
                if watched.iter().any(|address| address.accepts(row.local)) {
                    busy.ours.insert(row.inode.into());
                }
            }
        }
        if arrived.is_empty() { Vec::new() } else { self.idle(&arrived, &busy, &Owned::find(&open)) }
    }

    /// The poll that began then is over, and its workers were dealt with, which took this time of the CPU.
    pub fn polled(&mut self, begun: Instant, now: Instant, cpu_time: Duration) {
        if self.next_poll.is_some_and(|at| at <= begun) {
            self.next_poll = Some(now + POLL_INTERVAL.max(cpu_time * POLL_SHARE));
        }
    }

    /// Which connections of these workers are idle, and whether they have none of the busy ones.
    fn idle(&mut self, workers: &[(WorkerId, Pid, u32)], busy: &Busy, owned: &Owned) -> Vec<Arrived> {
        let mut unowned = busy.ours.difference(&owned.inodes).peekable();
        if unowned.peek().is_some() {
            // It has ended since, or a thread accepts it right now and has yet to get its descriptor.
            let Ok(connections) = self.connections() else { return Vec::new() };
            let exist: HashSet<u64> = connections.values().flatten().map(|row| row.inode.into()).collect();
            if unowned.any(|inode| exist.contains(inode)) {
                return Vec::new();
            }
        }
        let arrived = |(worker, pid, generation): &(WorkerId, Pid, u32)| {
            let mut is_done = true;
            let mut idle = owned.below(*pid)?;
            for (_, open) in &mut idle {
                let all = open.len();
                open.retain(|open| !busy.all.contains(&open.inode));
                is_done &= open.len() == all;
            }
            idle.retain(|(_, open)| !open.is_empty());
            Some(Arrived { worker: *worker, generation: *generation, is_done, idle })
        };
        workers.iter().filter_map(arrived).collect()
    }

    /// The connections to all addresses that are watched, by family and port.
    fn connections(&mut self) -> io::Result<HashMap<(bool, u16), Vec<Connection>>> {
        self.list().inspect_err(|_| self.diag = None) // replies may be left in it
    }

    fn list(&mut self) -> io::Result<HashMap<(bool, u16), Vec<Connection>>> {
        let diag = match &mut self.diag {
            Some(diag) => diag,
            none => none.insert(SockDiag::new()?),
        };
        let mut connections = HashMap::new();
        for address in self.retired.values().flat_map(|retired| &retired.addresses) {
            if let std::collections::hash_map::Entry::Vacant(entry) = connections.entry(key(address)) {
                entry.insert(diag.connections(address.socket)?);
            }
        }
        Ok(connections)
    }
}

fn key(address: &Address) -> (bool, u16) {
    (address.socket.is_ipv6(), address.socket.port())
}

/// The busy connections to the watched ports, by inode number.
#[derive(Default)]
struct Busy {
    all: HashSet<u64>,
    /// Those that can have come to one of our listeners. Others have come to a foreign listener on another address, or
    /// to ours by a transparent proxy: they count if a worker has them.
    ours: HashSet<u64>,
}

/// Which process among this one's descendants has which of some connections open.
#[derive(Default)]
struct Owned {
    processes: HashMap<Pid, Vec<OpenConnection>>,
    inodes: HashSet<u64>,
}

impl Owned {
    /// `connections` are inode numbers with the number of bytes received.
    fn find(connections: &HashMap<u64, u64>) -> Self {
        let mut owned = Self::default();
        for pid in procfs::tree(Pid::this()) {
            // A process that this one may not inspect owns nothing here, so its connections have no owner.
            let all = open_sockets::sockets(pid).unwrap_or_default().into_iter();
            let open: Vec<OpenConnection> = all
                .filter_map(|(fd, inode)| {
                    Some(OpenConnection { fd, inode, received: *connections.get(&inode)? })
                })
                .collect();
            owned.inodes.extend(open.iter().map(|open| open.inode));
            owned.processes.insert(pid, open);
        }
        owned
    }

    /// The connections that a process and its descendants have; `None` if one of these is new.
    fn below(&self, pid: Pid) -> Option<Vec<Idle>> {
        procfs::tree(pid).into_iter().map(|pid| Some((pid, self.processes.get(&pid)?.clone()))).collect()
    }
}

impl Retired {
    /// Whether every connection that was steered to the worker before the switch has reached it, given all
    /// connections to its ports.
    fn has_arrived(&mut self, rows: &[&Connection], queues_are_empty: bool, now: Instant) -> bool {
        let opening: HashSet<SocketAddr> =
            rows.iter().filter(|row| row.opening).map(|row| row.peer).collect();
        let Some(handshakes) = &mut self.handshakes else {
            self.handshakes = Some(opening);
            return false;
        };
        handshakes.retain(|peer| opening.contains(peer));
        queues_are_empty && (handshakes.is_empty() || now - self.since > MAX_HANDSHAKE)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::process::Command;

    use super::*;
    use crate::kernel::sockdiag::Traffic;
    use crate::kernel::sys;

    fn drain() -> Drain {
        Drain::new(IdleRule::default())
    }

    fn opening(peer: &str) -> Connection {
        let (local, peer) = ("127.0.0.1:80".parse().unwrap(), peer.parse().unwrap());
        Connection { local, peer, opening: true, inode: 0, unread: 0, traffic: Traffic::default() }
    }

    fn retired(since: Instant) -> Retired {
        Retired {
            pid: Pid::from_raw(i32::MAX),
            generation: 1,
            since,
            addresses: BTreeSet::new(),
            handshakes: None,
            empty_since: None,
        }
    }

    #[test]
    fn all_has_arrived_when_the_handshakes_of_the_first_poll_are_over_and_the_queues_are_empty() {
        let start = Instant::now();
        let mut retired = retired(start);
        let (opening, other) = (opening("127.0.0.1:1"), opening("127.0.0.1:2"));
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!retired.has_arrived(&[&opening], true, at(0)), "the first poll only takes note");
        assert!(!retired.has_arrived(&[&opening], true, at(20)), "the handshake goes on");
        assert!(!retired.has_arrived(&[&other], false, at(40)), "it has arrived and waits");
        assert!(retired.has_arrived(&[&other], true, at(60)), "a later handshake goes to another worker");
    }

    #[test]
    fn a_handshake_that_takes_too_long_is_not_waited_for() {
        let start = Instant::now();
        let mut retired = retired(start);
        let opening = opening("127.0.0.1:1");
        assert!(!retired.has_arrived(&[&opening], true, start));
        assert!(!retired.has_arrived(&[&opening], true, start + MAX_HANDSHAKE));
        assert!(retired.has_arrived(&[&opening], true, start + MAX_HANDSHAKE + POLL_INTERVAL));
    }

    #[test]
    fn polls_take_a_share_of_the_time() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut drain = drain();
        let cpu = Duration::from_millis;
        drain.polled(at(0), at(10), cpu(10));
        assert_eq!(drain.deadline(), None, "nobody is watched");
        drain.watch(WorkerId(1), Pid::this(), 1, BTreeSet::new(), at(0));
        drain.polled(at(0), at(1), cpu(1));
        assert_eq!(drain.deadline(), Some(at(21)));
        drain.polled(at(20), at(20), cpu(0));
        assert_eq!(drain.deadline(), Some(at(21)), "no poll was due");
        drain.polled(at(21), at(131), cpu(10));
        assert_eq!(drain.deadline(), Some(at(231)), "it waited for a CPU for most of the time");
    }

    /// A process of its own has the connection: this one may start others at any time, for other tests.
    #[test]
    fn a_busy_connection_keeps_its_owner_and_one_without_an_owner_keeps_all_workers() {
        const FD: u32 = 500;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::new(listener.local_addr().unwrap(), false, 0);
        let _client = TcpStream::connect(address.socket).unwrap();
        let (server, _) = listener.accept().unwrap();
        let inode = procfs::inode(server.as_fd()).unwrap();
        let mut command = Command::new("sleep");
        command.arg("1000");
        sys::before_exec(&mut command, move || sys::dup2_for_exec(server.as_fd(), FD as i32));
        let mut process = command.spawn().unwrap();
        drop(command); // and with it this process's descriptor of the connection
        let pid = Pid::from_raw(process.id() as i32);

        let mut drain = drain();
        drain.watch(WorkerId(1), pid, 1, BTreeSet::from([address]), Instant::now());
        let mut idle_of = |busy: &Busy, owned: &Owned| drain.idle(&[(WorkerId(1), pid, 1)], busy, owned);
        let busy = |inodes: &[u64]| Busy {
            all: inodes.iter().copied().collect(),
            ours: inodes.iter().copied().collect(),
        };
        let mut idle = |inodes: &[u64], owned: &Owned| idle_of(&busy(inodes), owned);
        let its = Owned::find(&HashMap::from([(inode, 42)]));
        let unowned = Owned::find(&HashMap::new());
        let arrived = |is_done, idle: &[Idle]| {
            [Arrived { worker: WorkerId(1), generation: 1, is_done, idle: idle.to_vec() }]
        };
        let drained = |idle: &[Idle]| arrived(true, idle);
        assert_eq!(idle(&[], &unowned), drained(&[]));
        let open = OpenConnection { fd: FD, inode, received: 42 };
        assert_eq!(idle(&[], &its), drained(&[(pid, vec![open])]), "its client keeps it open");
        assert_eq!([idle(&[], &its), idle(&[], &unowned)].map(|idle| idle[0].connections()), [1, 0]);
        assert_eq!(idle(&[inode], &its), arrived(false, &[]), "this worker has it");
        assert!(idle(&[inode], &unowned).is_empty(), "it exists and has no owner");
        assert_eq!(idle(&[u64::MAX], &unowned), drained(&[]), "it is gone");
        let foreign = Busy { ours: HashSet::new(), ..busy(&[inode]) };
        assert_eq!(idle_of(&foreign, &unowned), drained(&[]), "it came to a foreign listener");
        assert_eq!(idle_of(&foreign, &its), arrived(false, &[]), "it came by a proxy");
        process.kill().unwrap();
        process.wait().unwrap();
    }
}
