//! Foreign listeners: sockets of other programs that listen on an address of the pool.
//!
//! The kernel lets a program of the same user that asks for SO_REUSEPORT join our group. Then it has a place in the
//! group's array, so [`ForeignMembers`] keeps track of it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::time::{Duration, Instant};

use log::debug;

use super::Pool;
use crate::address::Address;
use crate::ids::MemberId;
use crate::kernel::open_sockets;
use crate::kernel::sockdiag::{Listener, SockDiag};

/// How long a check is good for while workers begin to listen: when a thousand workers start at once, one check for
/// each would take long.
const CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// The listeners that overlap with an address and whose inode numbers are not `ours`.
///
/// # Errors
/// Those of sock_diag(7).
pub fn find(address: Address, ours: impl Fn(u64) -> bool) -> io::Result<Vec<Listener>> {
    let mut listeners = SockDiag::new()?.listeners(address.transport, address.socket.port())?;
    listeners.retain(|listener| listener.address.overlaps(&address) && !ours(listener.inode.into()));
    Ok(listeners)
}

/// Whether only processes that are about to end have it, such as the workers of a reuse-run that was killed a moment ago.
pub fn is_dying(listener: &Listener) -> bool {
    let inode = listener.inode.into();
    open_sockets::socket_owner(inode).is_some() && open_sockets::holders(&HashSet::from([inode])).is_empty()
}

/// Who listens where, for the log.
pub fn describe(listener: &Listener) -> String {
    match open_sockets::socket_owner(listener.inode.into()) {
        Some((pid, command)) => format!("{command} (pid {pid}) listens on {}", listener.address),
        None => format!("a process of user {} listens on {}", listener.uid, listener.address),
    }
}

/// The foreign members of a group.
#[derive(Debug, Default)]
pub struct ForeignMembers {
    /// By inode number.
    ids: BTreeMap<u32, MemberId>,
    checked_at: Option<Instant>,
}

/// What a check has changed.
#[derive(Debug, PartialEq, Eq)]
pub struct Changes {
    pub left: BTreeSet<MemberId>,
    pub joined: Vec<(MemberId, Listener)>,
}

impl ForeignMembers {
    /// Whether the last check is too old to rely on.
    pub fn is_check_due(&self, now: Instant) -> bool {
        self.checked_at.is_none_or(|at| now.saturating_duration_since(at) > CHECK_INTERVAL)
    }

    /// Takes the foreign listeners that were found in the group.
    pub fn update(
        &mut self,
        found: impl IntoIterator<Item = Listener>,
        mut new_id: impl FnMut() -> MemberId,
        now: Instant,
    ) -> Changes {
        self.checked_at = Some(now);
        let found: BTreeMap<u32, Listener> =
            found.into_iter().map(|listener| (listener.inode, listener)).collect();
        let left =
            self.ids.iter().filter(|(inode, _)| !found.contains_key(inode)).map(|(_, id)| *id).collect();
        self.ids.retain(|inode, _| found.contains_key(inode));
        let mut joined = Vec::new();
        for (inode, listener) in found {
            if let Entry::Vacant(entry) = self.ids.entry(inode) {
                joined.push((*entry.insert(new_id()), listener));
            }
        }
        Changes { left, joined }
    }
}

impl Pool {
    /// Looks for a foreign listener that is in the way of the first bind of an address. The kernel would let a program of
    /// the same user that asks for SO_REUSEPORT share the port without notice. (To bind and see is no check: connections in
    /// TIME_WAIT are in its way too.) Returns whether there is none for sure, not even one that is dying.
    pub(super) fn look_for_foreign(&self, address: Address) -> Result<bool, Listener> {
        if self.groups.contains_key(&address) {
            return Ok(false);
        }
        let found = find(address, |inode| self.members.id(inode).is_some());
        let found =
            found.inspect_err(|error| debug!("can't find out who else listens on {address}: {error}"));
        let Ok(found) = found else { return Ok(false) };
        let is_alone = found.is_empty();
        found.into_iter().find(|listener| !is_dying(listener)).map_or(Ok(is_alone), Err)
    }

    /// Finds programs that share an address since it was first bound.
    pub fn find_foreign_listeners(&mut self) {
        for address in self.groups.keys().copied().collect::<Vec<_>>() {
            self.update_foreign(address);
        }
    }

    pub(super) fn update_foreign_if_due(&mut self, address: Address) {
        if self.groups.get(&address).is_some_and(|group| group.is_foreign_check_due(Instant::now())) {
            self.update_foreign(address);
        }
    }

    fn update_foreign(&mut self, address: Address) {
        let Ok(found) = find(address, |inode| self.members.id(inode).is_some()) else { return };
        if let Some(group) = self.groups.get_mut(&address) {
            group.update_foreign(found, || self.members.new_id());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_member_joins_once_and_leaves_when_it_is_no_longer_found() {
        let socket = "127.0.0.1:3000".parse().unwrap();
        let listener = |inode| Listener { address: Address::new(socket, false, 0), inode, uid: 0 };
        let (mut foreign, mut next, start) = (ForeignMembers::default(), 0, Instant::now());
        let mut update = |found: &[u32]| {
            let new_id = || {
                next += 1;
                MemberId(next)
            };
            let changes = foreign.update(found.iter().map(|inode| listener(*inode)), new_id, start);
            let joined: Vec<u32> = changes.joined.iter().map(|(_, listener)| listener.inode).collect();
            (changes.left.into_iter().collect::<Vec<_>>(), joined)
        };
        assert_eq!(update(&[7, 5]), (vec![], vec![5, 7]));
        assert_eq!(update(&[7, 5]), (vec![], vec![]));
        assert_eq!(update(&[7, 9]), (vec![MemberId(1)], vec![9]));
        assert_eq!(update(&[]), (vec![MemberId(2), MemberId(3)], vec![]));
    }

    #[test]
    fn a_check_is_good_for_ten_milliseconds() {
        let (mut foreign, start) = (ForeignMembers::default(), Instant::now());
        assert!(foreign.is_check_due(start));
        foreign.update([], || MemberId(0), start);
        assert!(!foreign.is_check_due(start + CHECK_INTERVAL));
        assert!(foreign.is_check_due(start + CHECK_INTERVAL + Duration::from_millis(1)));
    }
}
