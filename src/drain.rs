//! When a retired worker has nothing left to do.
//!
//! After the switch nothing new is sent to it. What was on its way arrives: handshakes complete and are
//! accepted. When that is over and each of its connections is quiet, it may be told to stop.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use log::warn;
use nix::unistd::Pid;

use crate::address::Address;
use crate::fleet::WorkerId;
use crate::listeners::Pool;
use crate::procfs;
use crate::sockdiag::{Connection, SockDiag};

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
    since: Instant,
    addresses: BTreeSet<Address>,
    /// Clients whose handshake was under way at the first look; `None` before it.
    handshakes: Option<HashSet<SocketAddr>>,
    /// Whether the accept queues were empty at the last look. What was accepted just then may not be among
    /// the worker's fds yet, so that is believed at the second look.
    was_empty: bool,
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
    pub fn watch(&mut self, worker: WorkerId, pid: Pid, addresses: BTreeSet<Address>, now: Instant) {
        let retired = Retired { pid, since: now, addresses, handshakes: None, was_empty: false };
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

    /// The workers that have nothing left to do, if it is time for a look.
    pub fn look(&mut self, pool: &Pool, now: Instant) -> Vec<WorkerId> {
        if self.next_look.is_none_or(|at| at > now) {
            return Vec::new();
        }
        let connections = match self.connections() {
            Ok(connections) => connections,
            Err(error) => {
                warn!("can't look at connections, so that retired workers get all of --drain: {error}");
                self.next_look = None;
                return Vec::new();
            }
        };
        let of = |address: &Address| connections.get(&key(address)).map_or(&[][..], Vec::as_slice);
        let mut done = Vec::new();
        for (worker, retired) in &mut self.retired {
            let rows: Vec<&Connection> = retired.addresses.iter().flat_map(of).collect();
            if retired.look(&rows, pool.accept_queues_are_empty(*worker), now) {
                done.push(*worker);
            }
        }
        self.next_look = Some(now + INTERVAL.max(now.elapsed() * SHARE));
        done
    }

    /// The connections of all addresses that retired workers listen on, by family and port.
    fn connections(&mut self) -> io::Result<HashMap<(bool, u16), Vec<Connection>>> {
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

impl Retired {
    /// Whether the worker is done, given the connections to its ports.
    fn look(&mut self, rows: &[&Connection], queues_are_empty: bool, now: Instant) -> bool {
        let opening: HashSet<SocketAddr> =
            rows.iter().filter(|row| row.opening).map(|row| row.peer).collect();
        let was_empty = std::mem::replace(&mut self.was_empty, queues_are_empty);
        let Some(handshakes) = &mut self.handshakes else {
            self.handshakes = Some(opening);
            return false;
        };
        handshakes.retain(|peer| opening.contains(peer));
        let arrived = handshakes.is_empty() || now - self.since > LONGEST_HANDSHAKE;
        if !(arrived && was_empty && queues_are_empty) {
            return false;
        }
        let busy: HashSet<u64> =
            rows.iter().filter(|row| !row.opening && !is_quiet(row)).map(|row| row.inode.into()).collect();
        busy.is_empty()
            || !procfs::tree(self.pid).into_iter().flat_map(procfs::socket_inodes).any(|i| busy.contains(&i))
    }
}

/// Whether nothing is being worked on for the client of a connection, as far as the kernel can tell:
/// everything was read, and answered by something that was sent at the same time or later.
///
/// Times have the resolution of the kernel's tick. A request that arrives in the tick in which the answer
/// to the last one left looks answered.
fn is_quiet(connection: &Connection) -> bool {
    let traffic = connection.traffic;
    if connection.unread > 0 || connection.unacknowledged > 0 {
        return false;
    }
    match (traffic.has_received, traffic.has_sent) {
        (false, _) => traffic.received_ago >= FIRST_REQUEST,
        (true, false) => false,
        (true, true) => traffic.sent_ago <= traffic.received_ago,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sockdiag::Traffic;

    fn connection(sent_ago: u64, received_ago: u64, has_sent: bool, has_received: bool) -> Connection {
        let traffic = Traffic {
            sent_ago: Duration::from_millis(sent_ago),
            received_ago: Duration::from_millis(received_ago),
            has_sent,
            has_received,
        };
        let peer = "127.0.0.1:1".parse().unwrap();
        Connection { peer, opening: false, inode: 1, unread: 0, unacknowledged: 0, traffic }
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
        assert!(!is_quiet(&Connection { unacknowledged: 1, ..answered }));
    }

    #[test]
    fn a_worker_is_done_when_handshakes_have_arrived_and_the_queue_was_empty_twice() {
        let start = Instant::now();
        let mut retired = Retired {
            pid: Pid::from_raw(i32::MAX),
            since: start,
            addresses: BTreeSet::new(),
            handshakes: None,
            was_empty: false,
        };
        let opening = Connection { opening: true, inode: 0, ..connection(0, 0, false, false) };
        let other = Connection { peer: "127.0.0.1:2".parse().unwrap(), ..opening };
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!retired.look(&[&opening], true, at(0)), "the first look only takes note");
        assert!(!retired.look(&[&opening], true, at(20)), "the handshake goes on");
        assert!(!retired.look(&[&other], false, at(40)), "it has arrived and waits");
        assert!(!retired.look(&[&other], true, at(60)), "it was accepted just now");
        assert!(retired.look(&[&other], true, at(80)), "a later handshake is not its own");
    }

    #[test]
    fn a_handshake_that_takes_too_long_is_not_waited_for() {
        let start = Instant::now();
        let (handshakes, addresses) = (None, BTreeSet::new());
        let mut retired =
            Retired { pid: Pid::from_raw(i32::MAX), since: start, addresses, handshakes, was_empty: false };
        let opening = Connection { opening: true, inode: 0, ..connection(0, 0, false, false) };
        assert!(!retired.look(&[&opening], true, start));
        assert!(!retired.look(&[&opening], true, start + LONGEST_HANDSHAKE));
        assert!(retired.look(&[&opening], true, start + LONGEST_HANDSHAKE + INTERVAL));
    }
}
