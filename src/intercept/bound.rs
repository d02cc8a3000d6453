//! The sockets that a worker has bound and not yet listened on.

use std::collections::HashMap;

use crate::address::Endpoint;
use crate::intercept::install::Answers;

const MIN_FULL: usize = 64;

/// By inode number. The kernel may see such a socket as listening already: the pool's may be so before they
/// are lent.
#[derive(Debug)]
pub struct BoundSockets {
    answers: Answers,
    sockets: HashMap<u64, Endpoint>,
    /// At so many sockets those that the worker has closed are forgotten.
    full_at: usize,
}

impl BoundSockets {
    pub fn new(answers: Answers) -> Self {
        Self { answers, sockets: HashMap::new(), full_at: MIN_FULL }
    }

    /// Whether a bind was carried out before and the worker perhaps never got the answer, so that it asks
    /// again. A program that binds a socket to the same address twice looks the same.
    pub fn is_repetition(&self, inode: u64, endpoint: &Endpoint) -> bool {
        self.answers == Answers::MayBeLost && self.sockets.get(&inode) == Some(endpoint)
    }

    /// `is_lent` says whether another one is still the wrapper's and lent.
    pub fn insert(&mut self, inode: u64, endpoint: Endpoint, is_lent: impl Fn(u64, &Endpoint) -> bool) {
        if self.sockets.len() >= self.full_at {
            self.sockets.retain(|inode, endpoint| is_lent(*inode, endpoint));
            self.full_at = MIN_FULL.max(2 * self.sockets.len());
        }
        self.sockets.insert(inode, endpoint);
    }

    pub fn contains(&self, inode: u64) -> bool {
        self.sockets.contains_key(&inode)
    }

    /// The worker listens on the socket.
    pub fn remove(&mut self, inode: u64) {
        self.sockets.remove(&inode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bind_is_a_repetition_only_where_answers_may_be_lost_and_until_the_worker_listens() {
        let [one, other] = ["/run/1", "/run/2"].map(|path| Endpoint::Unix(path.into()));
        for (answers, expected) in [(Answers::Arrive, false), (Answers::MayBeLost, true)] {
            let mut bound = BoundSockets::new(answers);
            bound.insert(7, one.clone(), |_, _| true);
            assert!(bound.contains(7));
            assert_eq!(bound.is_repetition(7, &one), expected);
            assert!(!bound.is_repetition(7, &other) && !bound.is_repetition(8, &one));
            bound.remove(7);
            assert!(!bound.contains(7) && !bound.is_repetition(7, &one));
        }
    }

    #[test]
    fn sockets_that_were_closed_without_listen_do_not_pile_up() {
        let mut bound = BoundSockets::new(Answers::Arrive);
        for inode in 0..10_000 {
            bound.insert(inode, Endpoint::Unix("/run/1".into()), |inode, _| inode < 100);
        }
        assert!(bound.sockets.len() <= 200 && (0..100).all(|inode| bound.contains(inode)));
    }
}
