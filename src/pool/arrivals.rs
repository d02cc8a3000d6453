//! When datagrams last came to the UDP sockets that workers have, and when to see whether workers still have them.
//!
//! epoll reports the next datagram of a socket once, and then nothing for a while: so traffic costs nothing. A socket that its
//! worker has closed is found at the end of such a while, or of one of some more, each twice as long as the one before.
//! Then nothing wakes the wrapper without traffic.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::ids::MemberId;

/// How long a socket is left alone after a datagram, or after it was lent.
const REST: Duration = Duration::from_secs(1);
/// After the last pause of this length it isn't looked for until the next datagram.
const LAST_PAUSE: Duration = Duration::from_secs(32);

/// See the module's comment.
#[derive(Debug, Default)]
pub struct Arrivals(BTreeMap<MemberId, Socket>);

#[derive(Debug, Clone, Copy)]
struct Socket {
    /// Whether the next datagram will be reported.
    is_watched: bool,
    /// Until when datagrams may have come, before it was watched; `None`: never.
    last: Option<Instant>,
    look_at: Option<Instant>,
    /// The time until the look after that.
    pause: Duration,
}

impl Arrivals {
    pub fn has(&self, id: MemberId) -> bool {
        self.0.contains_key(&id)
    }

    /// A worker has got the socket, and the next datagram will be reported.
    pub fn begin(&mut self, id: MemberId, now: Instant) {
        self.0.insert(id, Socket { is_watched: true, last: None, look_at: Some(now + REST), pause: REST });
    }

    /// A datagram has come. No other one will be reported.
    pub fn came(&mut self, id: MemberId, now: Instant) {
        let (last, look_at) = (Some(now), Some(now + REST));
        self.0.insert(id, Socket { is_watched: false, last, look_at, pause: REST });
    }

    /// The next datagram will be reported from now on.
    pub fn watch(&mut self, id: MemberId, now: Instant) {
        if let Some(socket) = self.0.get_mut(&id).filter(|socket| !socket.is_watched) {
            *socket = Socket { is_watched: true, last: Some(now), ..*socket };
        }
    }

    pub fn is_watched(&self, id: MemberId) -> bool {
        self.0.get(&id).is_some_and(|socket| socket.is_watched)
    }

    /// When a datagram may last have come; `None`: none has come.
    pub fn last(&self, id: MemberId, now: Instant) -> Option<Instant> {
        self.0.get(&id).and_then(|socket| if socket.is_watched { socket.last } else { Some(now) })
    }

    pub fn forget(&mut self, id: MemberId) {
        self.0.remove(&id);
    }

    /// When to call [`Arrivals::take_due`].
    pub fn deadline(&self) -> Option<Instant> {
        self.0.values().filter_map(|socket| socket.look_at).min()
    }

    /// The sockets at which it is time to look.
    pub fn take_due(&mut self, now: Instant) -> Vec<MemberId> {
        let due = self.0.iter_mut().filter(|(_, socket)| socket.look_at.is_some_and(|at| at <= now));
        due.map(|(id, socket)| {
            socket.look_at = (socket.pause <= LAST_PAUSE).then(|| now + socket.pause);
            socket.pause *= 2;
            *id
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_left_alone_for_a_second_after_a_datagram_and_quiet_from_when_it_is_watched_again() {
        let (mut arrivals, start, id) = (Arrivals::default(), Instant::now(), MemberId(1));
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!arrivals.has(id));
        arrivals.begin(id, start);
        assert_eq!((arrivals.is_watched(id), arrivals.last(id, at(500))), (true, None));
        assert_eq!((arrivals.deadline(), arrivals.take_due(at(999))), (Some(at(1000)), vec![]));
        assert_eq!((arrivals.take_due(at(1000)), arrivals.deadline()), (vec![id], Some(at(2000))));
        arrivals.watch(id, at(1000));
        assert_eq!(arrivals.last(id, at(2000)), None, "it was watched");
        arrivals.came(id, at(5000));
        assert_eq!((arrivals.is_watched(id), arrivals.last(id, at(5500))), (false, Some(at(5500))));
        assert_eq!(arrivals.deadline(), Some(at(6000)));
        arrivals.watch(id, at(6000));
        assert_eq!(arrivals.last(id, at(9000)), Some(at(6000)));
        let mut looks = Vec::new();
        while let Some(next) = arrivals.deadline() {
            assert_eq!(arrivals.take_due(next), [id]);
            looks.push((next - start).as_secs());
        }
        assert_eq!(looks, [6, 7, 9, 13, 21, 37, 69]);
        arrivals.forget(id);
        assert!(!arrivals.has(id) && arrivals.last(id, at(9000)).is_none());
    }
}
