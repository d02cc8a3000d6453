//! The sockets that a worker has bound and not yet listened on.

use std::collections::HashMap;

use crate::address::Endpoint;
use crate::intercept::install::Answers;

/// By inode number. The kernel may see such a socket as listening already: the pool's may be so before they
/// are lent.
#[derive(Debug)]
pub struct BoundSockets {
    answers: Answers,
    sockets: HashMap<u64, Endpoint>,
}

impl BoundSockets {
    pub fn new(answers: Answers) -> Self {
        Self { answers, sockets: HashMap::new() }
    }

    /// Whether a bind was carried out before and the worker perhaps never got the answer, so that it asks
    /// again. A program that binds a socket to the same address twice looks the same.
    pub fn is_repetition(&self, inode: u64, endpoint: &Endpoint) -> bool {
        self.answers == Answers::MayBeLost && self.sockets.get(&inode) == Some(endpoint)
    }

    pub fn insert(&mut self, inode: u64, endpoint: Endpoint) {
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
            bound.insert(7, one.clone());
            assert!(bound.contains(7));
            assert_eq!(bound.is_repetition(7, &one), expected);
            assert!(!bound.is_repetition(7, &other) && !bound.is_repetition(8, &one));
            bound.remove(7);
            assert!(!bound.contains(7) && !bound.is_repetition(7, &one));
        }
    }
}
