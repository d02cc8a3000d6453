//! Which UDP ports workers hold, and which of them a replacement has to hold before it gets a connection.
//!
//! A UDP port is not shared: unless the program shares it itself, a replacement can't bind it beside the worker that it
//! replaces. That has to be known before the switch.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::address::Address;
use crate::ids::WorkerId;

/// What has become of a UDP port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UdpChange {
    /// A worker asks the kernel for it.
    Binds,
    Holds,
    Closed,
}

/// The UDP ports that each worker has asked for.
#[derive(Debug, Default)]
pub struct UdpPorts(BTreeMap<WorkerId, BTreeMap<Address, Port>>);

#[derive(Debug)]
struct Port {
    asked_at: Instant,
    is_held: bool,
}

impl UdpPorts {
    pub fn change(&mut self, id: WorkerId, address: Address, change: UdpChange, now: Instant) {
        if change == UdpChange::Closed {
            if let Some(ports) = self.0.get_mut(&id) {
                ports.remove(&address);
            }
            return;
        }
        let ports = self.0.entry(id).or_default();
        let port = ports.entry(address).or_insert(Port { asked_at: now, is_held: false });
        port.is_held |= change == UdpChange::Holds;
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn remove_worker(&mut self, id: WorkerId) {
        self.0.remove(&id);
    }

    /// The ports of `old` that `new` has asked for and doesn't hold.
    pub fn refused(&self, new: WorkerId, old: WorkerId) -> Vec<Address> {
        self.lacking(new, old).filter(|(address, _)| self.has_asked(new, address)).map(|(it, _)| it).collect()
    }

    /// When `old` asked for the last one of its ports for which `new` hasn't asked.
    pub fn last_unasked(&self, new: WorkerId, old: WorkerId) -> Option<Instant> {
        self.lacking(new, old).filter(|(address, _)| !self.has_asked(new, address)).map(|(_, at)| at).max()
    }

    fn lacking(&self, new: WorkerId, old: WorkerId) -> impl Iterator<Item = (Address, Instant)> {
        let holds = |id, address| {
            self.0.get(&id).and_then(|ports| ports.get(address)).is_some_and(|port| port.is_held)
        };
        let ports = self.0.get(&old).into_iter().flatten();
        let lacking = ports.filter(move |(address, port)| port.is_held && !holds(new, address));
        lacking.map(|(address, port)| (*address, port.asked_at))
    }

    fn has_asked(&self, id: WorkerId, address: &Address) -> bool {
        self.0.get(&id).is_some_and(|its| its.contains_key(address))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_port_of_the_old_worker_is_refused_to_the_new_one_until_it_holds_it_and_unasked_until_it_asks() {
        let (old, new, begun) = (WorkerId(0), WorkerId(1), Instant::now());
        let [a, b] = [53, 54].map(|port| Address::new(([127, 0, 0, 1], port).into(), false, 0));
        let mut ports = UdpPorts::default();
        let state = |ports: &UdpPorts| (ports.refused(new, old), ports.last_unasked(new, old));
        ports.change(old, a, UdpChange::Binds, begun);
        ports.change(old, b, UdpChange::Binds, begun + Duration::from_secs(1));
        assert_eq!(state(&ports), (vec![], None), "the old one has asked and holds nothing");
        ports.change(old, a, UdpChange::Holds, begun);
        ports.change(old, b, UdpChange::Holds, begun);
        assert_eq!(state(&ports), (vec![], Some(begun + Duration::from_secs(1))));
        ports.change(new, b, UdpChange::Binds, begun);
        assert_eq!(state(&ports), (vec![b], Some(begun)));
        ports.change(new, b, UdpChange::Holds, begun);
        assert_eq!(state(&ports), (vec![], Some(begun)));
        ports.change(old, a, UdpChange::Closed, begun);
        assert_eq!(state(&ports), (vec![], None));
        ports.change(new, b, UdpChange::Closed, begun);
        ports.remove_worker(old);
        assert_eq!(state(&ports), (vec![], None));
    }
}
