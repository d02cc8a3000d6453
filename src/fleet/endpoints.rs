//! Where workers listen, and where their replacements have to. Nobody else keeps that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::address::{Address, Endpoint};
use crate::ids::{SlotId, WorkerId};

/// What the worker of a slot has shown of an endpoint, for its replacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// It listened there when its generation became ready: the replacement has to.
    Required,
    /// It did, and has stopped since: the replacement need not.
    Closed,
    /// It began later, so long after it first listened anywhere: the replacement may.
    Later(Duration),
}

/// How many addresses are kept on which a worker listens no more. Some programs open and close very many.
const MAX_LEFT: usize = 64;

/// Programs that send from a port that nobody has to know choose none below this: bindresvport(3) begins here, resolvers with
/// another port for each query at 1024.
const FIRST_RANDOM_PORT: u16 = 512;

#[derive(Debug, Default)]
pub struct Endpoints {
    /// Addresses on which each worker is given a socket that listens already.
    given: BTreeSet<Address>,
    /// Where systemd, or another program that started reuse-run, listens for all workers: nobody steers these
    /// connections.
    inherited: BTreeSet<Endpoint>,
    /// Where each worker listens, and whether it has called listen(2) itself, which a UDP port doesn't take.
    of_workers: BTreeMap<WorkerId, BTreeMap<Endpoint, bool>>,
    /// Where each worker has stopped listening. It may still have connections that came there.
    left: BTreeMap<WorkerId, BTreeSet<Address>>,
    /// Where the worker of a slot listens, or listened when it ended.
    of_slots: BTreeMap<SlotId, BTreeMap<Endpoint, Need>>,
    /// Unix sockets that several workers have listened on, and UDP ports that the workers of all slots have bound, and more
    /// than one. Another one may be a worker's own: a Unix socket for processes that it starts, a port to send from, which
    /// two workers may have chosen by chance.
    shared: BTreeSet<Endpoint>,
}

impl Endpoints {
    pub fn new(given: BTreeSet<Address>, inherited: BTreeSet<Endpoint>) -> Self {
        Self { given, inherited, ..Self::default() }
    }

    /// A worker has started, with what it is given.
    pub fn add_worker(&mut self, id: WorkerId) {
        let given = self.given.iter().map(|address| ((*address).into(), address.is_udp())).collect();
        self.of_workers.insert(id, given);
    }

    /// A worker has called listen(2), or bound a UDP port, where there are so many slots. Returns whether clients are known
    /// to come there from now on, since so many workers listen there.
    pub fn add(&mut self, id: WorkerId, endpoint: Endpoint, slots: usize) -> bool {
        let others = if endpoint.is_udp() { slots.max(2) - 1 } else { 1 };
        let is_new = !self.is_public(&endpoint) && self.count_of_others(id, &endpoint) >= others;
        if is_new {
            self.shared.insert(endpoint.clone());
        }
        if let Some(endpoints) = self.of_workers.get_mut(&id) {
            endpoints.insert(endpoint, true);
        }
        is_new
    }

    pub fn remove(&mut self, id: WorkerId, endpoint: &Endpoint) {
        if self.of_workers.get_mut(&id).is_some_and(|endpoints| endpoints.remove(endpoint).is_some())
            && let Some(address) = endpoint.tcp()
            && !self.inherited.contains(endpoint)
        {
            let left = self.left.entry(id).or_default();
            left.extend((left.len() < MAX_LEFT).then_some(address));
        }
    }

    pub fn remove_worker(&mut self, id: WorkerId) {
        self.of_workers.remove(&id);
        self.left.remove(&id);
    }

    /// Where a worker has called listen(2).
    pub fn of(&self, id: WorkerId) -> impl Iterator<Item = &Endpoint> {
        let endpoints = self.of_workers.get(&id).into_iter().flatten();
        endpoints.filter(|(_, has_called)| **has_called).map(|(endpoint, _)| endpoint)
    }

    /// Whether a worker listens there.
    pub fn has(&self, id: WorkerId, endpoint: &Endpoint) -> bool {
        self.of_workers.get(&id).is_some_and(|endpoints| endpoints.contains_key(endpoint))
    }

    /// Whether one of the others listens wherever this worker does.
    pub fn are_shared(&self, id: WorkerId, others: &[WorkerId]) -> bool {
        self.of(id).all(|endpoint| others.iter().any(|other| self.has(*other, endpoint)))
    }

    /// Where to send a worker requests: on this port if one is named, and only where clients are known to come, unless there
    /// is only this worker. What it is given counts although it has not called listen(2).
    pub fn probed_at(&self, id: WorkerId, port: Option<u16>, is_alone: bool) -> Option<&Endpoint> {
        let endpoints = self.of_workers.get(&id).into_iter().flatten().map(|(endpoint, _)| endpoint);
        endpoints.filter(|endpoint| !endpoint.is_udp()).find(|endpoint| {
            let is_named = |port| endpoint.tcp().is_some_and(|address| address.socket.port() == port);
            port.is_none_or(is_named) && (is_alone || self.is_public(endpoint))
        })
    }

    /// The TCP addresses at which connections come to this worker alone.
    pub fn addresses(&self, id: WorkerId) -> BTreeSet<Address> {
        let endpoints = self.of_workers.get(&id).into_iter().flatten().map(|(endpoint, _)| endpoint);
        let own = endpoints.filter(|endpoint| !self.inherited.contains(*endpoint));
        own.filter_map(Endpoint::tcp).collect()
    }

    /// The TCP addresses at which connections came to this worker alone that it may still have.
    pub fn addresses_so_far(&self, id: WorkerId) -> BTreeSet<Address> {
        self.addresses(id).into_iter().chain(self.left.get(&id).into_iter().flatten().copied()).collect()
    }

    /// Whether clients are known to come to an endpoint.
    pub fn is_public(&self, endpoint: &Endpoint) -> bool {
        let is_known = matches!(endpoint, Endpoint::Port(address)
            if !address.is_udp() || address.socket.port() < FIRST_RANDOM_PORT || self.given.contains(address));
        is_known || self.shared.contains(endpoint)
    }

    /// Whether clients are known to come to some endpoint of a worker.
    pub fn has_public(&self, id: WorkerId) -> bool {
        self.of(id).any(|endpoint| self.is_public(endpoint))
    }

    /// Whether they open connections there.
    pub fn has_listener(&self, id: WorkerId) -> bool {
        self.of(id).any(|endpoint| self.is_public(endpoint) && !endpoint.is_udp())
    }

    /// Whether workers of several slots have the same Unix socket, or, if there is one slot, the successor of its worker would.
    pub fn shares_path(&self, slots: usize) -> bool {
        let open = self.of_slots.values().flatten().filter(|(_, need)| **need != Need::Closed);
        let is_path = |path: &&Endpoint| matches!(path, Endpoint::Unix(_)) && !self.inherited.contains(*path);
        let mut seen = BTreeSet::new();
        open.map(|(endpoint, _)| endpoint).filter(is_path).any(|path| slots == 1 || !seen.insert(path))
    }

    /// How many other workers listen there, or in how many slots the last one did.
    fn count_of_others(&self, id: WorkerId, endpoint: &Endpoint) -> usize {
        let others = self.of_workers.keys().filter(|other| **other != id);
        let listen = others.filter(|other| self.of(**other).any(|its| its == endpoint)).count();
        listen.max(self.of_slots.values().filter(|endpoints| endpoints.contains_key(endpoint)).count())
    }

    /// Where a worker of this slot has to listen and doesn't yet.
    pub fn missing(&self, id: WorkerId, slot: SlotId) -> Vec<Endpoint> {
        let lacking = self.lacking(id, slot).filter(|(_, need)| *need == Need::Required);
        lacking.map(|(endpoint, _)| endpoint.clone()).collect()
    }

    /// How long after its first listener the last worker of this slot began to listen where this one doesn't, of those
    /// endpoints where it need not.
    pub fn lacks_later(&self, id: WorkerId, slot: SlotId) -> Option<Duration> {
        let after = |need| match need {
            Need::Later(after) => Some(after),
            Need::Required | Need::Closed => None,
        };
        self.lacking(id, slot).filter_map(|(_, need)| after(need)).max()
    }

    fn lacking(&self, id: WorkerId, slot: SlotId) -> impl Iterator<Item = (&Endpoint, Need)> {
        let its: BTreeSet<&Endpoint> = self.of(id).collect();
        let of_slot = self.of_slots.get(&slot).into_iter().flatten();
        let lacking = of_slot.filter(move |(endpoint, _)| !its.contains(endpoint));
        lacking.filter_map(|(endpoint, need)| match need {
            _ if self.is_public(endpoint) => Some((endpoint, *need)),
            Need::Required if endpoint.is_udp() => Some((endpoint, Need::Later(Duration::ZERO))), // for a moment
            _ => None,
        })
    }

    /// Whether the last worker of this slot listens for clients, where there are so many slots. A single one may have a port
    /// of UDP to send from.
    pub fn are_expected(&self, slot: SlotId, slots: usize) -> bool {
        let mut open =
            self.of_slots.get(&slot).into_iter().flatten().filter(|(_, need)| **need != Need::Closed);
        open.any(|(endpoint, _)| slots == 1 && !endpoint.is_udp() || self.is_public(endpoint))
    }

    /// The generation of a worker that serves in this slot is ready: where it listens now its replacement has to.
    pub fn require(&mut self, id: WorkerId, slot: SlotId) {
        self.of_slots.remove(&slot);
        self.require_too(id, slot);
    }

    /// A worker that serves in this slot has been restarted: where it listens now its replacement has to as well.
    pub fn require_too(&mut self, id: WorkerId, slot: SlotId) {
        let its: Vec<Endpoint> = self.of(id).cloned().collect();
        let of_slot = self.of_slots.entry(slot).or_default();
        of_slot.extend(its.into_iter().map(|endpoint| (endpoint, Need::Required)));
    }

    /// The worker that serves in this slot has begun to listen, so long after its first listener.
    pub fn add_later(&mut self, slot: SlotId, endpoint: Endpoint, after: Duration) {
        let need = self.of_slots.entry(slot).or_default().entry(endpoint).or_insert(Need::Later(after));
        if *need == Need::Closed {
            *need = Need::Required;
        }
    }

    /// The worker of this slot has ended: what it opened later is gone with it.
    pub fn forget_later(&mut self, slot: SlotId) {
        if let Some(of_slot) = self.of_slots.get_mut(&slot) {
            of_slot.retain(|_, need| !matches!(need, Need::Later(_)));
        }
    }

    /// The worker that serves in this slot has stopped listening: its replacement need not begin.
    pub fn waive(&mut self, slot: SlotId, endpoint: &Endpoint) {
        let Some(of_slot) = self.of_slots.get_mut(&slot) else { return };
        match of_slot.get_mut(endpoint) {
            Some(Need::Later(_)) => drop(of_slot.remove(endpoint)),
            Some(need) => *need = Need::Closed,
            None => {}
        }
    }

    pub fn remove_slot(&mut self, slot: SlotId) {
        self.of_slots.remove(&slot);
    }

    /// Where the workers of so many slots listen, or have listened, for clients: of a single one, anywhere.
    pub fn public(&self, slots: usize) -> BTreeSet<&Endpoint> {
        let open = self.of_slots.values().flatten().filter(|(_, need)| **need != Need::Closed);
        let endpoints = open.map(|(endpoint, _)| endpoint);
        endpoints.filter(|endpoint| slots == 1 || self.is_public(endpoint)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Transport;

    const ONE: WorkerId = WorkerId(1);
    const TWO: WorkerId = WorkerId(2);

    fn address(port: u16) -> Address {
        Address::new(([127, 0, 0, 1], port).into(), false, 0)
    }

    fn udp(port: u16) -> Endpoint {
        address(port).over(Transport::Udp).into()
    }

    fn path(name: &str) -> Endpoint {
        Endpoint::Unix(name.into())
    }

    #[test]
    fn connections_come_to_a_worker_alone_by_what_it_is_given_and_by_its_own_listeners_only() {
        let inherited = Endpoint::Port(address(1));
        let mut endpoints = Endpoints::new([address(2)].into(), [inherited.clone()].into());
        endpoints.add_worker(ONE);
        assert_eq!(endpoints.of(ONE).count(), 0, "it hasn't called listen");
        assert_eq!(endpoints.addresses(ONE), [address(2)].into());
        for endpoint in [inherited, address(3).into(), path("a")] {
            endpoints.add(ONE, endpoint, 2);
        }
        assert_eq!(endpoints.addresses(ONE), [address(2), address(3)].into());
        endpoints.remove(ONE, &address(2).into());
        assert_eq!(endpoints.addresses(ONE), [address(3)].into());
        assert_eq!(
            endpoints.addresses_so_far(ONE),
            [address(2), address(3)].into(),
            "it may have connections"
        );
        endpoints.remove_worker(ONE);
        assert!(endpoints.addresses_so_far(ONE).is_empty() && endpoints.of(ONE).next().is_none());
    }

    #[test]
    fn a_unix_socket_is_public_from_its_second_worker_on() {
        let mut endpoints = Endpoints::default();
        endpoints.add_worker(ONE);
        endpoints.add_worker(TWO);
        assert!(!endpoints.add(ONE, path("a"), 2) && !endpoints.has_public(ONE));
        assert!(!endpoints.add(ONE, path("a"), 2), "it is the same worker");
        assert!(endpoints.add(TWO, path("a"), 2) && endpoints.has_public(ONE) && endpoints.has_public(TWO));
        assert!(!endpoints.add(ONE, path("a"), 2), "it is public already");

        let mut endpoints = Endpoints::default();
        endpoints.add_worker(ONE);
        endpoints.add(ONE, path("a"), 2);
        endpoints.require(ONE, SlotId(0));
        endpoints.remove_worker(ONE);
        endpoints.add_worker(TWO);
        assert!(endpoints.add(TWO, path("a"), 2), "its slot's last worker had it");
    }

    #[test]
    fn a_replacement_lacks_what_its_slot_had_and_clients_come_to() {
        let mut endpoints = Endpoints::default();
        endpoints.add_worker(ONE);
        for endpoint in [address(1).into(), address(2).into(), path("own")] {
            endpoints.add(ONE, endpoint, 2);
        }
        endpoints.require(ONE, SlotId(0));
        endpoints.add_worker(TWO);
        endpoints.add(TWO, address(2).into(), 2);
        assert_eq!(endpoints.missing(TWO, SlotId(0)), [address(1).into()]);
        assert_eq!(endpoints.missing(TWO, SlotId(1)), []);
        assert_eq!(endpoints.public(1).len(), 3, "clients of the only worker may come anywhere");
        endpoints.require(TWO, SlotId(1));
        assert_eq!(endpoints.public(2), [&address(1).into(), &address(2).into()].into());
        assert_eq!(endpoints.missing(TWO, SlotId(0)), [address(1).into()]);
        endpoints.remove_slot(SlotId(0));
        assert_eq!(endpoints.missing(TWO, SlotId(0)), []);
        assert_eq!(endpoints.public(2), [&address(2).into()].into());
    }

    #[test]
    fn a_udp_port_from_512_on_is_public_when_a_worker_of_each_slot_has_it_and_is_waited_for_until_then() {
        let mut endpoints = Endpoints::default();
        endpoints.add_worker(ONE);
        endpoints.add_worker(TWO);
        assert!(!endpoints.add(ONE, udp(53), 2) && endpoints.has_public(ONE), "nobody sends from port 53");
        assert!(!endpoints.has_listener(ONE));
        assert!(!endpoints.add(ONE, udp(512), 2) && !endpoints.is_public(&udp(512)));
        assert!(endpoints.addresses(ONE).is_empty() && endpoints.probed_at(ONE, None, true).is_none());
        endpoints.require(ONE, SlotId(0));
        assert_eq!(endpoints.missing(TWO, SlotId(0)), [udp(53)]);
        assert_eq!(endpoints.lacks_later(TWO, SlotId(0)), Some(Duration::ZERO));
        assert!(
            !endpoints.add(TWO, udp(512), 3) && !endpoints.is_public(&udp(512)),
            "two of three by chance"
        );
        assert!(endpoints.add(TWO, udp(512), 1));
        assert_eq!(endpoints.lacks_later(TWO, SlotId(0)), None);
        endpoints.remove(TWO, &udp(512));
        assert_eq!(endpoints.missing(TWO, SlotId(0)), [udp(53), udp(512)]);
    }

    #[test]
    fn a_udp_port_that_the_only_worker_may_send_from_is_expected_of_no_replacement() {
        let mut endpoints = Endpoints::default();
        endpoints.add_worker(ONE);
        endpoints.add(ONE, udp(4000), 1);
        endpoints.require(ONE, SlotId(0));
        assert!(!endpoints.are_expected(SlotId(0), 1));
        endpoints.add_worker(TWO);
        assert!(endpoints.add(TWO, udp(4000), 1) && endpoints.are_expected(SlotId(0), 1));
    }
}
