//! Which workers get the next of the connections that come one by one and stay: pure rules.
//!
//! Chosen at random, some workers get twice as many of a few long-lived connections as others, and one that was started
//! later never catches up. So while such connections come, each new one goes to the workers that have the fewest. How many
//! a worker has, its number of descriptors tells well enough: all workers run the same program.
//!
//! - A short while after a connection has come the numbers are looked at. If they are as they were, connections don't stay:
//!   then the next ones aren't heeded for a while.
//! - Of connections that come at the same time, all would go to one worker. So as soon as one has come others may go to any,
//!   until the look. And if it comes shortly after the last look, they don't come one by one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::ids::MemberId;

/// How long after a connection has come the look is: a short request is over by then.
const PAUSE: Duration = Duration::from_millis(10);
/// Of connections that come one by one, the next one comes later after the last look.
const ONE_BY_ONE: Duration = Duration::from_millis(5);
/// How long others aren't heeded.
const REST_WHEN_MANY: Duration = Duration::from_millis(100);
/// How long connections that don't stay aren't heeded.
const REST_WHEN_SHORT: Duration = Duration::from_secs(1);

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
    /// How many descriptors the worker of each member had at the last look.
    counts: BTreeMap<MemberId, u64>,
    last_look: Option<Instant>,
    /// Whether new connections go to those with the fewest.
    is_narrow: bool,
    next: Next,
}

impl Spread {
    pub fn new() -> Self {
        Self { counts: BTreeMap::new(), last_look: None, is_narrow: false, next: Next::Await }
    }

    pub fn next(&self) -> Next {
        self.next
    }

    /// A connection has come. Returns whether new ones may go to other members than before.
    pub fn came(&mut self, now: Instant) -> bool {
        let is_alone = self.last_look.is_none_or(|at| now.saturating_duration_since(at) >= ONE_BY_ONE);
        self.next = if is_alone { Next::LookAt(now + PAUSE) } else { Next::RestUntil(now + REST_WHEN_MANY) };
        let was_narrow = self.is_narrow;
        self.is_narrow = false;
        was_narrow
    }

    pub fn rested(&mut self) {
        self.next = Next::Await;
    }

    /// Takes how many descriptors the worker of each member that gets connections has. Returns whether new connections may go
    /// to other members than before.
    pub fn look(&mut self, counts: BTreeMap<MemberId, u64>, now: Instant) -> bool {
        let stays = counts.len() > 1 && counts != self.counts;
        self.next = if stays { Next::Await } else { Next::RestUntil(now + REST_WHEN_SHORT) };
        (self.is_narrow, self.counts, self.last_look) = (stays, counts, Some(now));
        stays
    }

    /// New connections go to the members with the least of this.
    pub fn rank(&self, id: MemberId) -> u64 {
        self.counts.get(&id).copied().filter(|_| self.is_narrow).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: [MemberId; 3] = [MemberId(0), MemberId(1), MemberId(2)];

    struct Test {
        spread: Spread,
        now: Instant,
    }

    impl Test {
        fn new() -> Self {
            Self { spread: Spread::new(), now: Instant::now() }
        }

        fn after(&mut self, millis: u64) -> &mut Self {
            self.now += Duration::from_millis(millis);
            self
        }

        /// A connection comes, and a look follows that finds these counts. Returns the members that new connections go to
        /// before and after it.
        fn comes(&mut self, counts: [u64; 3]) -> [Vec<usize>; 2] {
            self.spread.came(self.now);
            let Next::LookAt(at) = self.spread.next() else { panic!("{:?}", self.spread) };
            let before = self.targets();
            self.now = at;
            self.spread.look(IDS.into_iter().zip(counts).collect(), at);
            [before, self.targets()]
        }

        fn targets(&self) -> Vec<usize> {
            let least = IDS.map(|id| self.spread.rank(id)).into_iter().min();
            (0..3).filter(|index| Some(self.spread.rank(IDS[*index])) == least).collect()
        }
    }

    #[test]
    fn of_connections_that_stay_the_next_one_goes_to_those_with_the_fewest_and_others_at_the_same_time_to_any()
     {
        let mut test = Test::new();
        let any = || vec![0, 1, 2];
        assert_eq!(test.comes([6, 5, 5]), [any(), vec![1, 2]]);
        assert_eq!(test.after(20).comes([6, 5, 6]), [any(), vec![1]]);
        assert_eq!(test.after(20).comes([6, 6, 6]), [any(), any()]);
        assert_eq!(test.after(20).comes([6, 6, 7]), [any(), vec![0, 1]]);
        assert_eq!(test.spread.next(), Next::Await, "however late the next one comes");
    }

    #[test]
    fn connections_that_do_not_stay_or_come_at_short_intervals_are_not_heeded_for_a_while() {
        let mut test = Test::new();
        test.comes([6, 5, 5]);
        assert_eq!(test.after(20).comes([6, 5, 5])[1], [0, 1, 2]);
        assert_eq!(test.spread.next(), Next::RestUntil(test.now + REST_WHEN_SHORT));
        test.spread.rested();
        test.after(20).comes([6, 5, 6]);
        let now = test.after(4).now;
        assert!(test.spread.came(now), "they may go to any");
        assert_eq!(test.spread.next(), Next::RestUntil(now + REST_WHEN_MANY));
    }

    #[test]
    fn a_worker_that_is_the_only_one_is_not_looked_at_often() {
        let (mut spread, now) = (Spread::new(), Instant::now());
        assert!(!spread.look([(MemberId(0), 5)].into(), now));
        assert_eq!(spread.next(), Next::RestUntil(now + REST_WHEN_SHORT));
    }
}
