//! Which workers get the next of the connections that come one by one and stay: pure rules.
//!
//! Chosen at random, some workers get twice as many of a few long-lived connections as others, and a worker that was started
//! later never catches up. So while such connections come, each new one goes to the half of the workers that have the fewest.
//! Not to fewer: if the wrapper doesn't run for a while, a worker gets at most twice its share.
//!
//! - How many a worker has follows from its number of descriptors. A large increase isn't counted: many connections came at the
//!   same time, or the worker has opened files.
//! - A short while after a connection has come the numbers are looked at. If they are as they were, connections don't stay:
//!   then the next ones are ignored for a while.
//! - As soon as a connection has come, others may go to any worker until the look. If it came shortly after the last look,
//!   connections don't come one by one, and the next ones are ignored too.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::time::{Duration, Instant};

use crate::ids::MemberId;

/// How long after a connection has come the look is: a short request is over by then.
const PAUSE: Duration = Duration::from_millis(10);
/// Connections come one by one if each comes at least this long after the last look.
const ONE_BY_ONE: Duration = Duration::from_millis(5);
/// How many connections a worker may get between two looks, if they come one by one. On a busy machine looks are late.
const FEW: u64 = 2;
/// How long others are ignored, those that don't stay, and those that can't be awaited. Not for longer: a look may have come
/// too early.
const REST: Duration = Duration::from_millis(100);

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Call [`Spread::came`] when a connection comes.
    Await,
    /// Call [`Spread::look`] then.
    LookAt(Instant),
    /// Call [`Spread::rested`] then.
    RestUntil(Instant),
}

/// See the module's comment.
#[derive(Debug)]
pub struct Spread {
    counts: BTreeMap<MemberId, Count>,
    last_look: Option<Instant>,
    /// The other half, while new connections go to the half that has the fewest.
    full: BTreeSet<MemberId>,
    next: Next,
}

/// What is known of a member's worker.
#[derive(Debug, Clone, Copy)]
struct Count {
    /// At the last look.
    descriptors: u64,
    /// The connections that came one by one, as far as is known.
    connections: u64,
}

impl Spread {
    pub fn new() -> Self {
        Self { counts: BTreeMap::new(), last_look: None, full: BTreeSet::new(), next: Next::Await }
    }

    pub fn next(&self) -> Next {
        self.next
    }

    /// A connection has come. Returns whether new ones may go to other members than before.
    pub fn came(&mut self, now: Instant) -> bool {
        let is_alone = self.last_look.is_none_or(|at| now.saturating_duration_since(at) >= ONE_BY_ONE);
        self.next = if is_alone { Next::LookAt(now + PAUSE) } else { Next::RestUntil(now + REST) };
        !mem::take(&mut self.full).is_empty()
    }

    pub fn rested(&mut self) {
        self.next = Next::Await;
    }

    /// The next connection can't be awaited. Returns whether new ones may go to other members than before.
    pub fn cannot_await(&mut self, now: Instant) -> bool {
        self.next = Next::RestUntil(now + REST);
        !mem::take(&mut self.full).is_empty()
    }

    /// Takes how many descriptors the worker of each member that gets connections has, as far as is known. Returns whether new
    /// connections may go to other members than before.
    pub fn look(&mut self, descriptors: &BTreeMap<MemberId, u64>, now: Instant) -> bool {
        let last = |id: &MemberId| self.counts.get(id).map(|count| count.descriptors);
        let grown = |(id, now): (&MemberId, &u64)| last(id).map_or(0, |last| now.saturating_sub(last));
        let are_few = descriptors.iter().map(grown).all(|more| more <= FEW);
        let has_changed = descriptors.iter().any(|(id, now)| last(id).is_some_and(|last| *now != last));
        let count = |(id, now): (&MemberId, &u64)| {
            let known = self.counts.get(id).copied();
            let Count { descriptors, connections } =
                known.unwrap_or(Count { descriptors: *now, connections: 0 });
            let came = Some(now.saturating_sub(descriptors)).filter(|more| *more <= FEW).unwrap_or(0);
            let connections = (connections + came).saturating_sub(descriptors.saturating_sub(*now));
            (*id, Count { descriptors: *now, connections })
        };
        self.counts = descriptors.iter().map(count).collect();
        let come_one_by_one = has_changed && are_few;
        self.next = if come_one_by_one { Next::Await } else { Next::RestUntil(now + REST) };
        self.last_look = Some(now);
        let mut order: Vec<(u64, MemberId)> =
            self.counts.iter().map(|(id, count)| (count.connections, *id)).collect();
        order.sort_unstable();
        let is_even = order.first().map(|least| least.0) == order.last().map(|most| most.0);
        let half = if come_one_by_one && !is_even { order.len().div_ceil(2) } else { order.len() };
        self.full = order.into_iter().skip(half).map(|(_, id)| id).collect();
        !self.full.is_empty()
    }

    /// Whether new connections should go to other members.
    pub fn is_full(&self, id: MemberId) -> bool {
        self.full.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Test {
        spread: Spread,
        now: Instant,
    }

    impl Test {
        fn new(descriptors: &[u64]) -> Self {
            let mut test = Self { spread: Spread::new(), now: Instant::now() };
            test.look(descriptors);
            test.spread.rested();
            test
        }

        fn after(&mut self, millis: u64) -> &mut Self {
            self.now += Duration::from_millis(millis);
            self
        }

        fn look(&mut self, descriptors: &[u64]) {
            self.spread.look(&(0..).map(MemberId).zip(descriptors.iter().copied()).collect(), self.now);
        }

        /// A connection comes, and a look follows that finds so many descriptors. Returns the members that new connections go to.
        fn comes(&mut self, descriptors: &[u64]) -> Vec<u32> {
            let now = self.after(20).now;
            self.spread.came(now);
            let Next::LookAt(at) = self.spread.next() else { panic!("{:?}", self.spread) };
            assert!(!(0..9).any(|id| self.spread.is_full(MemberId(id))), "until the look to any");
            self.now = at;
            self.look(descriptors);
            (0..descriptors.len() as u32).filter(|id| !self.spread.is_full(MemberId(*id))).collect()
        }
    }

    #[test]
    fn the_next_of_connections_that_stay_goes_to_the_half_that_has_the_fewest() {
        let mut test = Test::new(&[5, 5, 5, 17]);
        assert_eq!(
            test.comes(&[5, 5, 6, 17]),
            [0, 1],
            "how many descriptors there were before makes no difference"
        );
        assert_eq!(test.comes(&[6, 5, 6, 17]), [1, 3]);
        assert_eq!(test.spread.next(), Next::Await, "however late the next one comes");
        assert_eq!(test.comes(&[6, 6, 6, 17]), [0, 3]);
        assert_eq!(test.comes(&[6, 6, 6, 18]), [0, 1, 2, 3], "all have as many");
        assert_eq!(test.comes(&[7, 6, 6, 18]), [1, 2]);
        assert_eq!(test.comes(&[6, 6, 6, 18]), [0, 1, 2, 3], "one has ended");
        assert_eq!(test.comes(&[6, 6, 6, 19]), [0, 1]);
        assert_eq!(test.comes(&[6, 6, 7, 19, 4]), [0, 1, 4], "a worker that comes later has none");
    }

    #[test]
    fn what_comes_at_the_same_time_is_not_counted() {
        let mut test = Test::new(&[5, 5]);
        assert_eq!(test.comes(&[5, 30]), [0, 1]);
        assert_eq!(test.spread.next(), Next::RestUntil(test.now + REST));
        test.spread.rested();
        assert_eq!(test.comes(&[6, 30]), [1]);
    }

    #[test]
    fn connections_that_do_not_stay_or_come_at_short_intervals_are_ignored_for_a_while() {
        let mut test = Test::new(&[5, 5]);
        assert_eq!(test.comes(&[5, 6]), [0]);
        assert_eq!(test.comes(&[5, 6]), [0, 1]);
        assert_eq!(test.spread.next(), Next::RestUntil(test.now + REST));
        test.spread.rested();
        assert_eq!(test.comes(&[5, 7]), [0]);
        let now = test.after(4).now;
        assert!(test.spread.came(now), "they may go to any");
        assert_eq!(test.spread.next(), Next::RestUntil(now + REST));
    }

    #[test]
    fn while_none_can_be_awaited_connections_go_to_any() {
        let mut test = Test::new(&[5, 5]);
        assert_eq!(test.comes(&[5, 6]), [0]);
        assert!(test.spread.cannot_await(test.now) && !test.spread.is_full(MemberId(1)));
        assert_eq!(test.spread.next(), Next::RestUntil(test.now + REST));
    }
}
