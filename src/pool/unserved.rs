//! Sockets that nobody borrows and on which connections may wait: these connections are reset, so that their clients
//! learn at once that they have to try again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use socket2::SockAddr;

use crate::address::Transport;
use crate::ids::MemberId;
use crate::kernel::datagrams;
use crate::pool::member::Member;

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

impl Member {
    /// Accepts the connections that wait and closes them with a reset. Returns how many there were, and the error that
    /// left some in the queue. Datagrams are read, without a word to anybody.
    pub fn reset_queue(&self) -> (usize, io::Result<()>) {
        match self.address.transport {
            Transport::Tcp => self.reset_all(|_| {}),
            Transport::Udp => (0, datagrams::discard(&self.socket)),
        }
    }

    /// As [`Member::reset_queue`]. Returns whether a connection from `source` was among them.
    pub fn reset_queue_with(&self, source: SocketAddr) -> bool {
        let mut is_found = false;
        // A socket for IPv4 and IPv6 has IPv4's clients with an IPv6 address.
        let plain = |address: SocketAddr| (address.ip().to_canonical(), address.port());
        let _ = self.reset_all(|client| is_found |= client.as_socket().map(plain) == Some(plain(source)));
        is_found
    }

    fn reset_all(&self, mut note: impl FnMut(&SockAddr)) -> (usize, io::Result<()>) {
        if let Err(error) = self.socket.set_nonblocking(true) {
            return (0, Err(error));
        }
        let mut connections = 0;
        loop {
            match self.socket.accept() {
                Ok((connection, client)) => {
                    note(&client);
                    // A linger time of zero makes close(2) send a reset (socket(7)).
                    let _ = connection.set_linger(Some(Duration::ZERO));
                    connections += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return (connections, Ok(())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return (connections, Err(error)),
            }
        }
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
