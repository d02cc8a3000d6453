//! Sockets that nobody borrows and on which connections may wait: these connections are reset, so that their clients
//! learn at once that they have to try again.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::time::{Duration, Instant};

use crate::ids::MemberId;

/// When to try again after connections couldn't be reset.
const RETRY_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub struct Unserved {
    /// Whose connections are to be reset.
    pending: BTreeSet<MemberId>,
    /// Whose connections couldn't be reset, and when to try again.
    retries: BTreeMap<MemberId, Instant>,
}

impl Unserved {
    pub fn add(&mut self, id: MemberId) {
        self.pending.insert(id);
    }

    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    pub fn take_pending(&mut self) -> BTreeSet<MemberId> {
        mem::take(&mut self.pending)
    }

    /// Connections couldn't be reset, for lack of a free file descriptor, say. To try again at once would be in vain.
    pub fn retry_later(&mut self, id: MemberId, now: Instant) {
        self.retries.insert(id, now + RETRY_AFTER);
    }

    /// When to call [`Unserved::take_due`].
    pub fn deadline(&self) -> Option<Instant> {
        self.retries.values().min().copied()
    }

    /// The sockets for which it is time to try again.
    pub fn take_due(&mut self, now: Instant) -> Vec<MemberId> {
        let due = self.retries.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        self.retries.retain(|_, at| *at > now);
        due
    }

    /// Whether it is known already that connections may wait on this socket.
    pub fn contains(&self, id: MemberId) -> bool {
        self.pending.contains(&id) || self.retries.contains_key(&id)
    }

    pub fn forget(&mut self, id: MemberId) {
        self.pending.remove(&id);
        self.retries.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_could_not_be_reset_is_due_after_a_second() {
        let (mut unserved, now) = (Unserved::default(), Instant::now());
        unserved.add(MemberId(1));
        assert!(unserved.has_pending() && unserved.contains(MemberId(1)));
        assert_eq!(unserved.take_pending(), BTreeSet::from([MemberId(1)]));
        assert!(!unserved.has_pending() && !unserved.contains(MemberId(1)));

        unserved.retry_later(MemberId(1), now);
        assert!(unserved.contains(MemberId(1)) && !unserved.has_pending());
        assert_eq!(unserved.deadline(), Some(now + RETRY_AFTER));
        assert_eq!(unserved.take_due(now), []);
        assert_eq!(unserved.take_due(now + RETRY_AFTER), [MemberId(1)]);
        assert!(!unserved.contains(MemberId(1)) && unserved.deadline().is_none());
    }
}
