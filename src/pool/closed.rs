//! Listeners that their worker has closed although it lives on: when to look for them, and what follows.
//!
//! The wrapper's duplicate keeps such a socket open, so the kernel reports nothing. What shows it:
//!
//! - Its queue doesn't move. Then a look at the place where the socket was seen last tells whether it is still there.
//! - Its process has opened another listener on the address, perhaps in its place.
//!
//! A program may have moved a socket, or handed it to another process. So a socket that isn't at its place is searched for
//! in all processes. Meanwhile new connections go to other listeners if there are any. If a second search doesn't find it
//! either, it is closed: a process may give it to another one during a search, and a worker that ends closes its sockets a
//! moment before its end is reported.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::ids::MemberId;
use crate::kernel::search::{Found, Seen};

/// The time between two samples of the queues, if these are to show closed listeners only.
pub const SAMPLE_INTERVAL: Duration = Duration::from_millis(20);
/// The time until the second look at a place where the socket was seen. It doubles with each look.
const FIRST_INTERVAL: Duration = Duration::from_millis(20);
const MAX_INTERVAL: Duration = Duration::from_secs(1);
/// When to look again if this process can't find out.
const UNKNOWN_INTERVAL: Duration = Duration::from_secs(10);
/// For how long a listener gets no connections after its process has opened another one: it may be about to close this
/// one.
const SUPERSEDED_TIME: Duration = Duration::from_millis(250);

/// How long after the first search a second one shows that a listener is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    Short,
    /// The process at its place has ended, and another one may replace it and take what waits. Or no other listener of the
    /// address gets connections, and its worker may be about to open it again.
    Long,
}

impl Patience {
    fn time(self) -> Duration {
        match self {
            Self::Short => Duration::from_millis(20),
            Self::Long => Duration::from_millis(500),
        }
    }
}

/// Whether a listener is open, as far as it is known. New connections go to the members that come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    Open,
    InDoubt,
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    /// It was there at the last look. There will be another one after this time, if its queue still doesn't move.
    Seen { next: Instant, interval: Duration },
    /// Its process has opened another listener. The next look is then; at the end it is as any other.
    Superseded { next: Instant, end: Instant },
    /// It is not at its place.
    Missing { since: Instant },
    /// A search hasn't found it.
    Closed { since: Instant, second_search: Instant },
}

impl Check {
    fn standing(self) -> Standing {
        match self {
            Self::Seen { .. } => Standing::Open,
            Self::Superseded { .. } | Self::Missing { .. } => Standing::InDoubt,
            Self::Closed { .. } => Standing::Closed,
        }
    }
}

/// See the module's comment.
#[derive(Debug, Default)]
pub struct ClosedListeners {
    checks: BTreeMap<MemberId, Check>,
    has_changed: bool,
    last_sample: Option<Instant>,
}

impl ClosedListeners {
    pub fn standing(&self, id: MemberId) -> Standing {
        self.checks.get(&id).map_or(Standing::Open, |check| check.standing())
    }

    /// Whether a standing has changed since the last call.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.has_changed)
    }

    /// When to call [`ClosedListeners::to_look_at`] and [`ClosedListeners::to_search`] although there is no sample.
    pub fn deadline(&self) -> Option<Instant> {
        let deadline = |check: &Check| match check {
            Check::Seen { .. } => None,
            Check::Superseded { next, .. } => Some(*next),
            Check::Missing { since } => Some(*since),
            Check::Closed { second_search, .. } => Some(*second_search),
        };
        self.checks.values().filter_map(deadline).min()
    }

    /// A sample has shown on which queues connections wait that perhaps nobody takes, and from which some were taken.
    pub fn sampled(&mut self, doubtful: &BTreeSet<MemberId>, taken: &BTreeSet<MemberId>, now: Instant) {
        // What was taken since the sample before may have been taken before it was closed.
        let before = self.last_sample.replace(now);
        let is_after = |since: &Instant| before.is_some_and(|before| before > *since);
        let moves = |id: &MemberId, check: &Check| match check {
            Check::Seen { .. } => !doubtful.contains(id),
            Check::Superseded { .. } => false,
            Check::Missing { since } | Check::Closed { since, .. } => taken.contains(id) && is_after(since), // somebody has it
        };
        let moved: Vec<MemberId> =
            self.checks.iter().filter(|(id, check)| moves(id, check)).map(|(id, _)| *id).collect();
        moved.into_iter().for_each(|id| self.set(id, None));
        for id in doubtful {
            let seen = Check::Seen { next: now, interval: Duration::ZERO };
            if let Check::Superseded { next, .. } = self.checks.entry(*id).or_insert(seen) {
                *next = now;
            }
        }
    }

    /// Its process has opened another listener on the address.
    pub fn is_superseded(&mut self, id: MemberId, now: Instant) {
        if self.standing(id) == Standing::Open {
            let end = now + SUPERSEDED_TIME;
            self.set(id, Some(Check::Superseded { next: end, end }));
        }
    }

    /// The listeners at whose places it is time to look.
    pub fn to_look_at(&self, now: Instant) -> Vec<MemberId> {
        let is_due = |check: &Check| match check {
            Check::Seen { next, .. } | Check::Superseded { next, .. } => *next <= now,
            Check::Missing { .. } | Check::Closed { .. } => false,
        };
        self.checks.iter().filter(|(_, check)| is_due(check)).map(|(id, _)| *id).collect()
    }

    /// What was seen at its place.
    pub fn looked(&mut self, id: MemberId, seen: Seen, now: Instant) {
        let check = match (self.checks.get(&id), seen) {
            (_, Seen::Gone) => Check::Missing { since: now },
            (Some(Check::Seen { interval, .. }), Seen::Here) => {
                let interval = (*interval * 2).clamp(FIRST_INTERVAL, MAX_INTERVAL);
                Check::Seen { next: now + interval, interval }
            }
            (Some(Check::Seen { .. }), Seen::Unknown) => {
                Check::Seen { next: now + UNKNOWN_INTERVAL, interval: UNKNOWN_INTERVAL }
            }
            (Some(Check::Superseded { end, .. }), Seen::Here) if *end > now => {
                Check::Superseded { next: *end, end: *end }
            }
            (_, Seen::Here | Seen::Unknown) => return self.set(id, None),
        };
        self.set(id, Some(check));
    }

    /// The listeners for which it is time to search.
    pub fn to_search(&self, now: Instant) -> Vec<MemberId> {
        let is_due = |check: &Check| match check {
            Check::Seen { .. } | Check::Superseded { .. } => false,
            Check::Missing { since: at } | Check::Closed { second_search: at, .. } => *at <= now,
        };
        self.checks.iter().filter(|(_, check)| is_due(check)).map(|(id, _)| *id).collect()
    }

    /// What a search has shown. Returns whether the listener is closed.
    pub fn searched(&mut self, id: MemberId, found: Found, patience: Patience, now: Instant) -> bool {
        let check = match (self.checks.get(&id), found) {
            (Some(Check::Missing { .. }), Found::Nowhere) => {
                Check::Closed { since: now, second_search: now + patience.time() }
            }
            (Some(Check::Closed { since, .. }), Found::Nowhere) if *since + patience.time() > now => {
                Check::Closed { since: *since, second_search: *since + patience.time() } // its process has ended since
            }
            (Some(Check::Closed { .. }), Found::Nowhere) => return true,
            (Some(Check::Missing { .. } | Check::Closed { .. }), Found::At(_)) => {
                Check::Seen { next: now + FIRST_INTERVAL, interval: FIRST_INTERVAL }
            }
            (Some(Check::Missing { .. } | Check::Closed { .. }), Found::Unknown) => {
                Check::Seen { next: now + UNKNOWN_INTERVAL, interval: UNKNOWN_INTERVAL }
            }
            (Some(Check::Seen { .. } | Check::Superseded { .. }) | None, _) => return false,
        };
        self.set(id, Some(check));
        false
    }

    pub fn forget(&mut self, id: MemberId) {
        self.set(id, None);
    }

    fn set(&mut self, id: MemberId, check: Option<Check>) {
        let before = self.standing(id);
        match check {
            Some(check) => drop(self.checks.insert(id, check)),
            None => drop(self.checks.remove(&id)),
        }
        self.has_changed |= self.standing(id) != before;
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::Pid;
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::search::Place;

    const ID: MemberId = MemberId(3);
    const AT: Found = Found::At(Place { pid: Pid::from_raw(1), fd: 7 });

    /// One listener, and a clock in milliseconds.
    struct World {
        listeners: ClosedListeners,
        start: Instant,
        ms: u64,
    }

    impl World {
        fn new() -> Self {
            Self { listeners: ClosedListeners::default(), start: Instant::now(), ms: 0 }
        }

        fn now(&self) -> Instant {
            self.start + Duration::from_millis(self.ms)
        }

        fn standing(&self) -> Standing {
            self.listeners.standing(ID)
        }

        /// Samples at this time. Returns whether to look at its place.
        fn sample(&mut self, ms: u64, is_doubtful: bool, is_taken: bool) -> bool {
            self.ms = ms;
            let only = |is| std::iter::once(ID).filter(|_| is).collect();
            self.listeners.sampled(&only(is_doubtful), &only(is_taken), self.now());
            !self.listeners.to_look_at(self.now()).is_empty()
        }

        fn look(&mut self, seen: Seen) -> Standing {
            self.listeners.looked(ID, seen, self.now());
            self.standing()
        }

        /// Searches at this time. Returns whether it is closed; `None` if there is nothing to search.
        fn search(&mut self, ms: u64, found: Found, patience: Patience) -> Option<bool> {
            self.ms = ms;
            let is_due = self.listeners.to_search(self.now()) == [ID];
            is_due.then(|| self.listeners.searched(ID, found, patience, self.now()))
        }
    }

    #[test]
    fn a_stuck_listener_that_is_at_its_place_costs_a_look_at_growing_intervals() {
        let mut world = World::new();
        let mut looks = Vec::new();
        for ms in (0..5000).step_by(2) {
            if world.sample(ms, true, false) {
                looks.push(ms);
                assert_eq!(world.look(Seen::Here), Standing::Open);
            }
        }
        assert_eq!(looks, [0, 20, 60, 140, 300, 620, 1260, 2260, 3260, 4260]);
        assert_eq!(world.listeners.deadline(), None, "it is sampled anyway");
        assert!(!world.sample(5000, false, true));
        assert!(world.sample(5002, true, false), "it has moved in between");
    }

    #[test]
    fn what_was_taken_before_a_listener_was_closed_is_no_sign_that_somebody_has_it() {
        let mut world = World::new();
        assert!(world.sample(0, true, false), "connections wait");
        // Now its worker takes them and closes it.
        assert_eq!(world.look(Seen::Gone), Standing::InDoubt);
        assert_eq!(world.search(0, Found::Nowhere, Patience::Long), Some(false));
        world.sample(20, false, true);
        assert_eq!(world.standing(), Standing::Closed);
        world.sample(40, false, true);
        assert_eq!(world.standing(), Standing::Open);
    }

    #[test]
    fn a_listener_that_two_searches_do_not_find_is_closed() {
        use Patience::{Long, Short};
        for (patience, second) in [(Short, 25), (Long, 505)] {
            let mut world = World::new();
            assert_eq!(world.search(0, Found::Nowhere, patience), None);
            assert!(world.sample(3, true, false));
            assert_eq!(world.look(Seen::Gone), Standing::InDoubt);
            assert!(world.listeners.take_changed() && !world.listeners.take_changed());
            assert_eq!(world.search(5, Found::Nowhere, patience), Some(false));
            assert_eq!(world.standing(), Standing::Closed);
            assert!(!world.sample(6, true, false));
            assert_eq!(world.search(second - 1, Found::Nowhere, patience), None, "{patience:?}");
            assert_eq!(world.search(second, Found::Nowhere, patience), Some(true));
        }
        let mut world = World::new();
        world.sample(0, true, false);
        world.look(Seen::Gone);
        assert_eq!(world.search(0, Found::Nowhere, Short), Some(false));
        assert_eq!(world.search(20, Found::Nowhere, Long), Some(false), "its process has ended since");
        assert_eq!(world.search(499, Found::Nowhere, Long), None);
        assert_eq!(world.search(500, Found::Nowhere, Long), Some(true));
    }

    #[test]
    fn a_listener_is_open_if_a_search_finds_it_or_somebody_accepts_from_it() {
        let gone = || {
            let mut world = World::new();
            world.sample(0, true, false);
            world.look(Seen::Gone);
            world
        };
        for found in [AT, Found::Unknown] {
            let mut world = gone();
            assert_eq!(world.search(0, found, Patience::Short), Some(false));
            assert_eq!(world.standing(), Standing::Open);
            assert!(!world.sample(19, true, false), "{found:?}");
            assert_eq!(world.sample(20, true, false), found == AT, "{found:?}");
            assert!(world.sample(10_000, true, false), "{found:?}");
        }
        let mut world = gone();
        assert_eq!(world.search(0, Found::Nowhere, Patience::Short), Some(false));
        assert_eq!(world.search(20, AT, Patience::Short), Some(false));
        assert_eq!(world.standing(), Standing::Open);
        let mut world = gone();
        assert_eq!(world.search(0, Found::Nowhere, Patience::Short), Some(false));
        world.sample(5, true, false);
        world.sample(10, false, true);
        assert_eq!(
            (world.standing(), world.search(20, Found::Nowhere, Patience::Short)),
            (Standing::Open, None)
        );
    }

    #[test]
    fn a_listener_that_cannot_be_looked_at_is_open_and_looked_at_seldom() {
        let mut world = World::new();
        assert!(world.sample(0, true, false));
        assert_eq!(world.look(Seen::Unknown), Standing::Open);
        assert!(!world.sample(9_999, true, false));
        assert!(world.sample(10_000, true, false));
    }

    #[test]
    fn a_superseded_listener_is_in_doubt_for_a_moment_and_looked_at_when_connections_wait() {
        let mut world = World::new();
        world.listeners.is_superseded(ID, world.now());
        assert_eq!(world.standing(), Standing::InDoubt);
        assert_eq!(world.listeners.deadline(), Some(world.start + SUPERSEDED_TIME));
        assert!(!world.sample(4, false, false));
        assert!(world.sample(6, true, false));
        assert_eq!(world.look(Seen::Here), Standing::InDoubt);
        assert!(!world.sample(249, false, false));
        assert!(world.sample(250, false, false));
        assert_eq!(world.look(Seen::Here), Standing::Open);
        assert_eq!(world.listeners.deadline(), None);

        world.listeners.is_superseded(ID, world.now());
        assert!(world.sample(500, false, false));
        assert_eq!(world.look(Seen::Gone), Standing::InDoubt);
        assert_eq!(world.search(501, Found::Nowhere, Patience::Short), Some(false));
        assert_eq!(world.search(521, Found::Nowhere, Patience::Short), Some(true));
    }

    proptest! {
        /// Whatever happens in which order.
        #[test]
        fn a_listener_is_closed_only_after_two_searches_in_a_row_that_did_not_find_it(
            steps in proptest::collection::vec((0u8..6, 0u64..30, any::<bool>()), 0..60)
        ) {
            let mut world = World::new();
            let mut in_vain = 0;
            for (step, pause, flag) in steps {
                let ms = world.ms + pause;
                match step {
                    0 => drop(world.sample(ms, flag, !flag)),
                    1 => drop(world.look(if flag { Seen::Here } else { Seen::Gone })),
                    2 => world.listeners.is_superseded(ID, world.now()),
                    _ => {
                        let found = if step == 3 { AT } else { Found::Nowhere };
                        match world.search(ms, found, Patience::Short) {
                            Some(true) => {
                                prop_assert!(in_vain >= 1 && found == Found::Nowhere);
                                world.listeners.forget(ID);
                            }
                            Some(false) if found == Found::Nowhere => in_vain += 1,
                            Some(false) | None => {}
                        }
                    }
                }
                if world.standing() != Standing::Closed {
                    in_vain = 0;
                }
            }
        }
    }
}
