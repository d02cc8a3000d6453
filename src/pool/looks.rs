//! When to see whether workers still have their UDP sockets.
//!
//! epoll reports the next datagram that waits in a socket once, and then nothing for a while: so traffic costs little. At the end
//! of such a while it is seen whether the worker has closed the socket, and again after some more, each twice as long as the
//! one before. Then nothing wakes the wrapper until the next datagram waits.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::ids::MemberId;

/// How long a socket is left alone after a datagram, or after it was lent.
const REST: Duration = Duration::from_secs(1);
/// After the last pause of this length it isn't looked for until the next datagram.
const LAST_PAUSE: Duration = Duration::from_secs(32);

/// See the module's comment.
#[derive(Debug, Default)]
pub struct Looks(BTreeMap<MemberId, Look>);

#[derive(Debug, Clone, Copy)]
struct Look {
    at: Option<Instant>,
    /// The time until the one after that.
    pause: Duration,
}

impl Looks {
    pub fn has(&self, id: MemberId) -> bool {
        self.0.contains_key(&id)
    }

    /// A worker has got the socket, or a datagram has come.
    pub fn begin(&mut self, id: MemberId, now: Instant) {
        self.0.insert(id, Look { at: Some(now + REST), pause: REST });
    }

    pub fn forget(&mut self, id: MemberId) {
        self.0.remove(&id);
    }

    /// When to call [`Looks::take_due`].
    pub fn deadline(&self) -> Option<Instant> {
        self.0.values().filter_map(|look| look.at).min()
    }

    /// The sockets at which it is time to look.
    pub fn take_due(&mut self, now: Instant) -> Vec<MemberId> {
        let due = self.0.iter_mut().filter(|(_, look)| look.at.is_some_and(|at| at <= now));
        due.map(|(id, look)| {
            look.at = (look.pause <= LAST_PAUSE).then(|| now + look.pause);
            look.pause *= 2;
            *id
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_left_alone_for_a_second_and_looked_for_less_and_less_often_and_then_no_more() {
        let (mut looks, start, id) = (Looks::default(), Instant::now(), MemberId(1));
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!looks.has(id) && looks.deadline().is_none());
        looks.begin(id, start);
        assert_eq!((looks.deadline(), looks.take_due(at(999))), (Some(at(1000)), vec![]));
        assert_eq!((looks.take_due(at(1000)), looks.deadline()), (vec![id], Some(at(2000))));
        looks.begin(id, at(5000));
        let mut seconds = Vec::new();
        while let Some(next) = looks.deadline() {
            assert_eq!(looks.take_due(next), [id]);
            seconds.push((next - start).as_secs());
        }
        assert_eq!(seconds, [6, 7, 9, 13, 21, 37, 69]);
        looks.forget(id);
        assert!(!looks.has(id));
    }
}
