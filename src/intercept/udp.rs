//! Binds of UDP ports. The kernel carries them out; whether it did, its list of bound sockets tells afterwards.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::ids::WorkerId;

/// A bind that has not succeeded by then has failed, even on a busy machine.
const FAILED_AFTER: Duration = Duration::from_secs(60);
/// If a worker has too many, one that has not succeeded by then gives its place to another.
const REPLACED_AFTER: Duration = Duration::from_secs(1);
/// The first look at the list comes so soon after the bind, each further one after twice that time.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// Of a worker with more UDP ports, such as a DNS resolver with a port for each query, the others are not watched.
const MAX_PORTS: usize = 64;

/// The UDP ports that workers have bound, or are about to.
#[derive(Debug, Default)]
pub struct UdpBinds {
    ports: Vec<Port>,
    pause: Duration,
    /// `None` when nothing is about to be bound.
    next: Option<Instant>,
}

#[derive(Debug)]
struct Port {
    worker: WorkerId,
    inode: u64,
    address: Address,
    since: Instant,
    is_held: bool,
}

/// What the list has shown of a port: whether its worker holds it.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub worker: WorkerId,
    pub address: Address,
    pub is_held: bool,
}

impl UdpBinds {
    /// A worker asks the kernel for a port. Returns whether it is watched.
    pub fn add(&mut self, worker: WorkerId, inode: u64, address: Address, now: Instant) -> bool {
        let is_its = |port: &Port| (port.worker, port.inode) == (worker, inode);
        if self.ports.iter().any(is_its) {
            return false; // a second bind of a socket, or a second try with one
        }
        let mut its = self.ports.iter().enumerate().filter(|(_, port)| port.worker == worker);
        if its.clone().count() >= MAX_PORTS {
            // A program may try one port after the other.
            let has_failed = |port: &Port| !port.is_held && now - port.since >= REPLACED_AFTER;
            let Some((failed, _)) = its.find(|(_, port)| has_failed(port)) else { return false };
            self.ports.remove(failed);
        }
        self.ports.push(Port { worker, inode, address, since: now, is_held: false });
        self.pause = FIRST_PAUSE;
        let next = now + FIRST_PAUSE;
        self.next = Some(self.next.map_or(next, |earlier| earlier.min(next)));
        true
    }

    pub fn remove_worker(&mut self, worker: WorkerId) {
        self.ports.retain(|port| port.worker != worker);
    }

    pub fn is_empty(&self) -> bool {
        self.ports.is_empty()
    }

    /// When to call [`UdpBinds::look`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.next
    }

    /// What has changed, given the inode numbers of all UDP sockets that are bound.
    pub fn look(&mut self, bound: &HashSet<u64>, now: Instant) -> Vec<Seen> {
        let mut seen = Vec::new();
        self.ports.retain_mut(|port| {
            let is_bound = bound.contains(&port.inode);
            if is_bound != port.is_held {
                port.is_held = is_bound;
                seen.push(Seen { worker: port.worker, address: port.address, is_held: is_bound });
                return is_bound;
            }
            is_bound || now - port.since < FAILED_AFTER
        });
        self.pause *= 2;
        let is_open = self.ports.iter().any(|port| !port.is_held);
        self.next = is_open.then(|| now + self.pause);
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_held_from_when_it_is_listed_until_it_is_not_and_a_bind_that_failed_is_forgotten() {
        let (one, start) = (WorkerId(1), Instant::now());
        let [a, b] = [53, 54].map(|port| Address::new(([127, 0, 0, 1], port).into(), false, 0));
        let mut binds = UdpBinds::default();
        assert!(
            binds.add(one, 10, a, start) && !binds.add(one, 10, a, start) && binds.add(one, 11, b, start)
        );
        assert_eq!(binds.deadline(), Some(start + FIRST_PAUSE));
        let seen = |is_held| vec![Seen { worker: one, address: a, is_held }];
        assert_eq!(binds.look(&[10].into(), start), seen(true));
        assert_eq!(binds.look(&[10].into(), start), []);
        assert_eq!(binds.deadline(), Some(start + 4 * FIRST_PAUSE), "the other may yet come");
        assert_eq!(binds.look(&[10].into(), start + FAILED_AFTER), []);
        assert_eq!(binds.deadline(), None);
        assert_eq!(binds.look(&[].into(), start + FAILED_AFTER), seen(false));
        assert!(binds.is_empty());
    }

    #[test]
    fn of_one_worker_not_more_than_some_ports_are_watched() {
        let (mut binds, now) = (UdpBinds::default(), Instant::now());
        let address = |port| Address::new(([127, 0, 0, 1], port).into(), false, 0);
        let mut add = |from, to, now| {
            let all = from..to;
            all.filter(|port| binds.add(WorkerId(1), u64::from(*port), address(*port), now)).count()
        };
        assert_eq!(add(1, 100, now), MAX_PORTS);
        let later = now + REPLACED_AFTER;
        assert_eq!(add(100, 103, later), 3, "others have most likely failed");
        binds.look(&(1..1000).collect(), later);
        assert!(!binds.add(WorkerId(1), 1000, address(1000), later), "all are held");
        assert!(binds.add(WorkerId(2), 1, address(1), now));
        binds.remove_worker(WorkerId(1));
        assert!(binds.add(WorkerId(1), 1, address(1), now));
    }
}
