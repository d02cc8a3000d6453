//! When a retired worker has nothing left to do.
//!
//! After the switch nothing new is sent to it. What was on its way arrives: handshakes complete and are
//! accepted. When that is over and each of its connections is quiet, it may be told to stop.

pub mod idle;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use log::warn;
use nix::unistd::Pid;

use crate::address::Address;
use crate::drain::idle::{Idle, OpenConnection};
use crate::ids::WorkerId;
use crate::kernel::procfs;
use crate::kernel::sockdiag::{Connection, SockDiag};
use crate::pool::Pool;
use crate::pool::paths::UnixSockets;

/// The time between two looks, at least.
const INTERVAL: Duration = Duration::from_millis(20);
/// Looks take at most one part in so many of the time, however many connections there are.
const SHARE: u32 = 10;
/// A client that takes longer than this for its handshake is not waited for.
const LONGEST_HANDSHAKE: Duration = Duration::from_secs(3);
/// A connection on which nothing has come yet is given so long to send its request.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Retired {
    pid: Pid,
    generation: u32,
    since: Instant,
    addresses: BTreeSet<Address>,
    /// Clients whose handshake was under way at the first look; `None` before it.
    handshakes: Option<HashSet<SocketAddr>>,
}

/// A worker that has nothing left to do.
#[derive(Debug, PartialEq, Eq)]
pub struct Drained {
    pub worker: WorkerId,
    /// What its clients keep open.
    pub idle: Vec<Idle>,
}

impl Drained {
    /// How many connections its clients keep open.
    pub fn connections(&self) -> usize {
        self.idle.iter().map(|(_, connections)| connections.len()).sum()
    }
}

/// Watches the workers that are retired.
#[derive(Default)]
pub struct Drain {
    retired: BTreeMap<WorkerId, Retired>,
    diag: Option<SockDiag>,
    next_look: Option<Instant>,
}

impl Drain {
    /// Begins to watch a worker; call it after the switch.
    pub fn watch(
        &mut self,
        worker: WorkerId,
        pid: Pid,
        generation: u32,
        addresses: BTreeSet<Address>,
        now: Instant,
    ) {
        let retired = Retired { pid, generation, since: now, addresses, handshakes: None };
        self.retired.insert(worker, retired);
        self.next_look.get_or_insert(now);
    }

    /// No longer watches a worker.
    pub fn forget(&mut self, worker: WorkerId) {
        self.retired.remove(&worker);
        if self.retired.is_empty() {
            self.next_look = None;
            self.diag = None;
        }
    }

    /// When to call [`Drain::look`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.next_look
    }

    /// The workers that have nothing left to do, if it is time for a look. To be followed by [`Drain::has_looked`].
    pub fn look(&mut self, pool: &Pool, unix: &UnixSockets, now: Instant) -> Vec<Drained> {
        if self.next_look.is_none_or(|at| at > now) {
            return Vec::new();
        }
        // The queues first: what leaves them later is among the connections as somebody's.
        let empty: BTreeSet<WorkerId> =
            self.retired.keys().copied().filter(|worker| pool.accept_queues_are_empty(*worker)).collect();
        let connections = match self.connections() {
            Ok(connections) => connections,
            Err(error) => {
                warn!("can't look at connections, so that retired workers get all of --drain: {error}");
                self.next_look = None;
                return Vec::new();
            }
        };
        let of = |address: &Address| connections.get(&key(address)).map_or(&[][..], Vec::as_slice);
        let mut arrived = Vec::new();
        let workers: Vec<(WorkerId, Pid, u32)> =
            self.retired.iter().map(|(worker, retired)| (*worker, retired.pid, retired.generation)).collect();
        let busy_on_paths = unix.busy(&workers);
        for (worker, retired) in &mut self.retired {
            let rows: Vec<&Connection> = retired.addresses.iter().flat_map(of).collect();
            if retired.has_arrived(&rows, empty.contains(worker), now) && !busy_on_paths.contains(worker) {
                arrived.push((*worker, retired.pid));
            }
        }
        let (mut open, mut busy) = (HashMap::new(), HashSet::new());
        for row in connections.values().flatten().filter(|row| !row.opening && row.inode != 0) {
            open.insert(row.inode.into(), row.traffic.received);
            if !is_quiet(row) {
                busy.insert(row.inode.into());
            }
        }
        if arrived.is_empty() { Vec::new() } else { self.idle(&arrived, &busy, &Owned::look(&open)) }
    }

    /// The look that began then is over, and what it gave is dealt with.
    pub fn has_looked(&mut self, begun: Instant, now: Instant) {
        if self.next_look.is_some_and(|at| at <= begun) {
            self.next_look = Some(now + INTERVAL.max((now - begun) * SHARE));
        }
    }

    /// Those of `workers` which have none of the busy connections, given by their inode numbers.
    fn idle(&mut self, workers: &[(WorkerId, Pid)], busy: &HashSet<u64>, owned: &Owned) -> Vec<Drained> {
        let mut nobodys = busy.difference(&owned.inodes).peekable();
        if nobodys.peek().is_some() {
            // It has ended since, or was accepted just now by a thread that has yet to get its number.
            let Ok(connections) = self.connections() else { return Vec::new() };
            let exist: HashSet<u64> = connections.values().flatten().map(|row| row.inode.into()).collect();
            if nobodys.any(|inode| exist.contains(inode)) {
                return Vec::new();
            }
        }
        let drained = |(worker, pid): &(WorkerId, Pid)| {
            let processes = owned.below(*pid)?;
            let is_idle = !processes.iter().flat_map(|(_, open)| open).any(|open| busy.contains(&open.inode));
            let idle = processes.into_iter().filter(|(_, open)| !open.is_empty()).collect();
            is_idle.then_some(Drained { worker: *worker, idle })
        };
        workers.iter().filter_map(drained).collect()
    }

    /// The connections of all addresses that retired workers listen on, by family and port.
    fn connections(&mut self) -> io::Result<HashMap<(bool, u16), Vec<Connection>>> {
        self.ask().inspect_err(|_| self.diag = None) // there may be answers left in it
    }

    fn ask(&mut self) -> io::Result<HashMap<(bool, u16), Vec<Connection>>> {
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

/// Which process below this one has which of some connections open.
#[derive(Default)]
struct Owned {
    processes: HashMap<Pid, Vec<OpenConnection>>,
    inodes: HashSet<u64>,
}

impl Owned {
    /// `connections` are inode numbers, and how many bytes came.
    fn look(connections: &HashMap<u64, u64>) -> Self {
        let mut owned = Self::default();
        for pid in procfs::tree(Pid::this()) {
            // A process that may not be looked into owns nothing here, so that what it owns is nobody's.
            let all = procfs::sockets(pid).unwrap_or_default().into_iter();
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

    /// What a process and each of its descendants have of them, unless one is new.
    fn below(&self, pid: Pid) -> Option<Vec<Idle>> {
        procfs::tree(pid).into_iter().map(|pid| Some((pid, self.processes.get(&pid)?.clone()))).collect()
    }
}

impl Retired {
    /// Whether all that was sent to the worker before the switch has reached it, given the connections to
    /// its ports.
    fn has_arrived(&mut self, rows: &[&Connection], queues_are_empty: bool, now: Instant) -> bool {
        let opening: HashSet<SocketAddr> =
            rows.iter().filter(|row| row.opening).map(|row| row.peer).collect();
        let Some(handshakes) = &mut self.handshakes else {
            self.handshakes = Some(opening);
            return false;
        };
        handshakes.retain(|peer| opening.contains(peer));
        queues_are_empty && (handshakes.is_empty() || now - self.since > LONGEST_HANDSHAKE)
    }
}

/// Whether nothing is being worked on for the client of a connection, as far as the kernel can tell:
/// everything was read, and answered by something that was sent at the same time or later.
///
/// Times have the resolution of the kernel's tick. A request that arrives in the tick in which the answer
/// to the last one left looks answered.
fn is_quiet(connection: &Connection) -> bool {
    let traffic = connection.traffic;
    // What was sent is the kernel's to deliver, whatever becomes of the worker; and its acknowledgement may be
    // delayed until the next request.
    if connection.unread > 0 || traffic.unsent > 0 {
        return false;
    }
    match (traffic.received > 0, traffic.has_sent) {
        (false, _) => traffic.received_ago >= FIRST_REQUEST,
        (true, false) => false,
        (true, true) => traffic.sent_ago <= traffic.received_ago,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sockdiag::Traffic;

    fn connection(sent_ago: u64, received_ago: u64, has_sent: bool, has_received: bool) -> Connection {
        let traffic = Traffic {
            sent_ago: Duration::from_millis(sent_ago),
            received_ago: Duration::from_millis(received_ago),
            unsent: 0,
            has_sent,
            received: has_received.into(),
        };
        let peer = "127.0.0.1:1".parse().unwrap();
        Connection { peer, opening: false, inode: 1, unread: 0, traffic }
    }

    #[test]
    fn a_connection_is_quiet_when_all_that_came_was_answered() {
        assert!(is_quiet(&connection(10, 20, true, true)), "answered");
        assert!(is_quiet(&connection(20, 20, true, true)), "answered at once");
        assert!(!is_quiet(&connection(20, 10, true, true)), "the next request is being worked on");
        assert!(!is_quiet(&connection(5000, 4000, false, true)), "so is the first");
        assert!(!is_quiet(&connection(500, 500, false, false)), "a request may be on its way");
        assert!(is_quiet(&connection(1000, 1000, false, false)), "none came in good time");
        assert!(is_quiet(&connection(10, 1000, true, false)), "a server that speaks first has spoken");
        let answered = connection(10, 20, true, true);
        assert!(!is_quiet(&Connection { unread: 1, ..answered }));
        let unsent = Traffic { unsent: 1, ..answered.traffic };
        assert!(!is_quiet(&Connection { traffic: unsent, ..answered }));
    }

    fn retired(since: Instant) -> Retired {
        Retired {
            pid: Pid::from_raw(i32::MAX),
            generation: 1,
            since,
            addresses: BTreeSet::new(),
            handshakes: None,
        }
    }

    #[test]
    fn all_has_arrived_when_the_handshakes_of_the_first_look_are_over_and_the_queues_empty() {
        let start = Instant::now();
        let mut retired = retired(start);
        let opening = Connection { opening: true, inode: 0, ..connection(0, 0, false, false) };
        let other = Connection { peer: "127.0.0.1:2".parse().unwrap(), ..opening };
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!retired.has_arrived(&[&opening], true, at(0)), "the first look only takes note");
        assert!(!retired.has_arrived(&[&opening], true, at(20)), "the handshake goes on");
        assert!(!retired.has_arrived(&[&other], false, at(40)), "it has arrived and waits");
        assert!(retired.has_arrived(&[&other], true, at(60)), "a later handshake is not its own");
    }

    #[test]
    fn a_handshake_that_takes_too_long_is_not_waited_for() {
        let start = Instant::now();
        let mut retired = retired(start);
        let opening = Connection { opening: true, inode: 0, ..connection(0, 0, false, false) };
        assert!(!retired.has_arrived(&[&opening], true, start));
        assert!(!retired.has_arrived(&[&opening], true, start + LONGEST_HANDSHAKE));
        assert!(retired.has_arrived(&[&opening], true, start + LONGEST_HANDSHAKE + INTERVAL));
    }

    #[test]
    fn looks_and_what_comes_of_them_take_a_share_of_the_time() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut drain = Drain::default();
        drain.has_looked(at(0), at(10));
        assert_eq!(drain.deadline(), None, "there is nobody to look at");
        drain.watch(WorkerId(1), Pid::this(), 1, BTreeSet::new(), at(0));
        drain.has_looked(at(0), at(1));
        assert_eq!(drain.deadline(), Some(at(21)));
        drain.has_looked(at(20), at(20));
        assert_eq!(drain.deadline(), Some(at(21)), "it was not time for a look");
        drain.has_looked(at(21), at(31));
        assert_eq!(drain.deadline(), Some(at(131)));
    }

    #[test]
    fn a_busy_connection_keeps_the_worker_that_has_it_and_one_that_nobody_has_keeps_all() {
        let me = (WorkerId(1), Pid::this());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address { socket: listener.local_addr().unwrap(), v6only: false };
        let _client = std::net::TcpStream::connect(address.socket).unwrap();
        let (server, _) = listener.accept().unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&server) as u32;
        let inode = procfs::socket_inode(Pid::this(), fd).unwrap().unwrap();

        let mut drain = Drain::default();
        drain.watch(WorkerId(1), Pid::this(), 1, BTreeSet::from([address]), Instant::now());
        let mut idle =
            |busy: &[u64], owned: &Owned| drain.idle(&[me], &busy.iter().copied().collect(), owned);
        let its = Owned::look(&HashMap::from([(inode, 42)]));
        let nobodys = Owned::look(&HashMap::new());
        let drained = |idle: &[Idle]| [Drained { worker: WorkerId(1), idle: idle.to_vec() }];
        assert_eq!(idle(&[], &nobodys), drained(&[]));
        let open = OpenConnection { fd, inode, received: 42 };
        assert_eq!(idle(&[], &its), drained(&[(Pid::this(), vec![open])]), "its client keeps it");
        assert_eq!([idle(&[], &its), idle(&[], &nobodys)].map(|idle| idle[0].connections()), [1, 0]);
        assert!(idle(&[inode], &its).is_empty(), "it is its own");
        assert!(idle(&[inode], &nobodys).is_empty(), "it exists, and is in nobody's hands");
        assert_eq!(idle(&[u64::MAX], &nobodys), drained(&[]), "it exists no more");
    }
}
