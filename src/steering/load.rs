//! Who had better get no new connections for a while, as pure computation over looks at the accept queues.
//!
//! A kernel that hashes or draws lots hands connections to a worker that is stuck although others are idle. To
//! join the shortest queue would be best with exact knowledge (Winston 1977); with knowledge that is as old as
//! the time between two looks, everybody joins what was the shortest and makes it the longest, and to draw lots
//! is better (Mitzenmacher, "How Useful Is Old Information?", 2000). So lots are drawn among all but those whose
//! queue *stands*: connections wait, and none was taken since the last look. That holds for an idle worker only
//! when a connection came a moment ago, so two looks are asked for; and under a load that keeps all queues
//! filled it may hold by chance, so whoever turns out to have been left out without need is granted twice as
//! many looks the next time (hysteresis with a back-off). Someone who was stuck in earnest is watched closely
//! for a time: one look will do, and it is left out even before a connection waits, when it is busy.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use crate::ids::MemberId;
use crate::pool::accept_queues::LONG;

/// Who gets new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balancing {
    /// Any ready worker that isn't stuck.
    Load,
    /// Any ready worker.
    Random,
}

/// How a member is off; new connections go to those that are best off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Load {
    Free,
    /// It was stuck not long ago and does something other than wait for connections and requests.
    Busy,
    /// Connections wait, and it takes none.
    Stuck,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Free => "free",
            Self::Busy => "busy",
            Self::Stuck => "stuck",
        })
    }
}

/// What a look has found out of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It is so now, and was otherwise for so long.
    To(Load, Duration),
    /// It has been stuck for long.
    StuckLong,
}

/// At how many looks in a row a queue stands until its member is stuck.
const LOOKS: u32 = 2;
/// The same for one that was stuck not long ago.
const LOOKS_AT_SUSPECTS: u32 = 1;
/// At most, whatever was granted.
const MOST_LOOKS: u32 = 4;
/// Whose queue stood for so long, and at one look more at least, was stuck in earnest. Where CPUs are short a
/// worker waits for its turn for some 10 ms, with nothing wrong with it.
const EARNEST: Duration = Duration::from_millis(50);
/// How long it is remembered that a member was left out without need.
const DOUBT: Duration = Duration::from_secs(1);
/// How long it is remembered that a member was stuck.
const SUSPICION: Duration = Duration::from_secs(10);

/// See the module's comment.
#[derive(Debug, Default)]
pub struct Balance {
    members: BTreeMap<MemberId, Member>,
}

#[derive(Debug)]
struct Member {
    load: Load,
    since: Instant,
    /// Whether it was told that it is stuck for long.
    told: bool,
    length: u32,
    /// At how many looks in a row the queue stood, and at how many of them since it counts as stuck.
    stood: u32,
    out: u32,
    /// How often it was left out without need, and when last.
    doubts: u32,
    doubted: Instant,
    /// When it was stuck last, and whether it was seen to wait for something to do since. (The main thread of
    /// some programs never is.)
    stuck: Option<Instant>,
    was_idle: bool,
}

impl Balance {
    /// Takes what a look has found: how many connections wait in each queue that isn't empty and, asked of few
    /// members only, whether one is busy, if that can be known. Returns what has changed.
    pub fn look(
        &mut self,
        queues: &BTreeMap<MemberId, u32>,
        is_busy: impl Fn(MemberId) -> Option<bool>,
        now: Instant,
    ) -> Vec<(MemberId, Change)> {
        for id in queues.keys() {
            self.members.entry(*id).or_insert_with(|| Member::new(now));
        }
        let of_member = |(id, member): (&MemberId, &mut Member)| {
            let length = queues.get(id).copied().unwrap_or(0);
            Some((*id, member.look(length, || is_busy(*id), now)?))
        };
        self.members.iter_mut().filter_map(of_member).collect()
    }

    pub fn load(&self, id: MemberId) -> Load {
        self.members.get(&id).map_or(Load::Free, |member| member.load)
    }

    /// Whether someone was stuck not long ago.
    pub fn has_suspects(&self, now: Instant) -> bool {
        self.members.values().any(|member| member.is_suspect(now))
    }

    /// Whether one of so many members is stuck, but not for long: it is left out until a look finds that it is
    /// over. Nobody is left out when all are stuck. (Of several addresses all are counted together.)
    pub fn leaves_out(&self, members: usize, now: Instant) -> bool {
        let stuck = || self.members.values().filter(|member| member.load == Load::Stuck);
        let is_new = |member: &Member| now.saturating_duration_since(member.since) < LONG;
        stuck().count() < members && stuck().any(is_new)
    }

    /// Whether someone is left out though nothing waits there, of which no connection would tell when it is over.
    pub fn has_busy(&self) -> bool {
        self.members.values().any(|member| member.load == Load::Busy)
    }

    pub fn forget(&mut self, id: MemberId) {
        self.members.remove(&id);
    }
}

impl Member {
    fn new(now: Instant) -> Self {
        Self {
            load: Load::Free,
            since: now,
            told: false,
            length: 0,
            stood: 0,
            out: 0,
            doubts: 0,
            doubted: now,
            stuck: None,
            was_idle: false,
        }
    }

    fn look(&mut self, length: u32, is_busy: impl Fn() -> Option<bool>, now: Instant) -> Option<Change> {
        let stands = length > 0 && length >= self.length;
        self.length = length;
        self.stood = if stands { self.stood + 1 } else { 0 };
        let load = match self.load {
            Load::Stuck if stands => {
                self.out += 1;
                Load::Stuck
            }
            Load::Stuck => {
                self.learn(now);
                Load::Free
            }
            _ if stands && self.stood >= self.looks(now) => Load::Stuck,
            _ => self.free_or_busy(is_busy, now),
        };
        let lasted = now.saturating_duration_since(self.since);
        if load == self.load {
            let is_long = load == Load::Stuck && lasted >= LONG;
            return (is_long && !std::mem::replace(&mut self.told, true)).then_some(Change::StuckLong);
        }
        (self.load, self.since, self.told, self.out) = (load, now, false, 0);
        Some(Change::To(load, lasted))
    }

    /// At how many looks in a row its queue has to stand.
    fn looks(&self, now: Instant) -> u32 {
        let looks = if self.is_suspect(now) { LOOKS_AT_SUSPECTS } else { LOOKS };
        (looks << self.doubts_at(now)).min(MOST_LOOKS)
    }

    /// It was stuck, and has taken a connection since the last look.
    fn learn(&mut self, now: Instant) {
        if self.out > 0 && now.saturating_duration_since(self.since) >= EARNEST {
            (self.stuck, self.was_idle, self.doubts) = (Some(now), false, 0);
        } else if self.out == 0 {
            self.doubts = (self.doubts_at(now) + 1).min(MOST_LOOKS.ilog2());
            self.doubted = now;
        }
    }

    fn doubts_at(&self, now: Instant) -> u32 {
        if now.saturating_duration_since(self.doubted) < DOUBT { self.doubts } else { 0 }
    }

    fn is_suspect(&self, now: Instant) -> bool {
        self.stuck.is_some_and(|at| now.saturating_duration_since(at) < SUSPICION)
    }

    fn free_or_busy(&mut self, is_busy: impl Fn() -> Option<bool>, now: Instant) -> Load {
        let is_busy = if self.is_suspect(now) { is_busy() } else { None };
        self.was_idle |= is_busy == Some(false);
        if is_busy == Some(true) && self.was_idle { Load::Busy } else { Load::Free }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVERY: Duration = Duration::from_millis(2);
    /// At so many looks the queue of such a member stands.
    const STUCK_IN_EARNEST: usize = 26;
    const ID: MemberId = MemberId(7);

    /// One member, looked at every 2 ms.
    struct World {
        balance: Balance,
        now: Instant,
    }

    impl World {
        fn new() -> Self {
            Self { balance: Balance::default(), now: Instant::now() }
        }

        fn look(&mut self, length: u32, is_busy: bool) -> Load {
            self.now += EVERY;
            let queues = std::iter::once((ID, length)).filter(|_| length > 0).collect();
            self.balance.look(&queues, |_| Some(is_busy), self.now);
            self.balance.load(ID)
        }

        fn looks(&mut self, lengths: &[u32]) -> Vec<Load> {
            lengths.iter().map(|length| self.look(*length, false)).collect()
        }
    }

    use Load::*;

    #[test]
    fn a_queue_that_stands_at_two_looks_leaves_its_member_out_until_it_is_shorter() {
        let mut world = World::new();
        assert_eq!(
            world.looks(&[0, 1, 1, 3, 3, 2, 1, 0]),
            [Free, Free, Stuck, Stuck, Stuck, Free, Free, Free]
        );
    }

    #[test]
    fn who_was_left_out_without_need_is_granted_twice_as_many_looks_each_time_and_not_for_long() {
        let mut world = World::new();
        assert_eq!(world.looks(&[1, 1, 0]), [Free, Stuck, Free]);
        assert_eq!(world.looks(&[1, 1, 1, 1, 0]), [Free, Free, Free, Stuck, Free]);
        assert_eq!(world.looks(&[1; 4]), [Free, Free, Free, Stuck], "and no more than four");
        assert_eq!(world.looks(&[0]), [Free]);
        world.now += DOUBT;
        assert_eq!(world.looks(&[1, 1, 0]), [Free, Stuck, Free]);
    }

    #[test]
    fn who_was_stuck_in_earnest_is_left_out_at_the_first_look_and_when_it_is_busy_for_ten_seconds() {
        let mut world = World::new();
        assert_eq!(world.look(0, true), Free, "nobody asks");
        world.looks(&[1; STUCK_IN_EARNEST]);
        assert_eq!(world.look(0, true), Free);
        assert_eq!(world.look(0, true), Free, "it wasn't seen to be idle; it may never be");
        assert_eq!(world.look(0, false), Free);
        assert_eq!([world.look(0, true), world.look(0, true), world.look(0, false)], [Busy, Busy, Free]);
        assert_eq!(world.looks(&[1, 1]), [Stuck, Stuck]);
        world.look(0, false);
        world.now += SUSPICION;
        assert_eq!(world.look(0, true), Free);
        assert_eq!(world.looks(&[1, 1]), [Free, Stuck]);
    }

    #[test]
    fn who_has_waited_for_a_cpu_is_no_suspect() {
        let mut world = World::new();
        world.look(0, false);
        world.looks(&[1; STUCK_IN_EARNEST - 1]);
        assert!(world.balance.leaves_out(2, world.now));
        assert!(!world.balance.leaves_out(1, world.now), "all are stuck");
        assert!(!world.balance.leaves_out(2, world.now + LONG), "it may be so for long");
        assert_eq!([world.look(0, true), world.look(0, false), world.look(0, true)], [Free; 3]);
        assert!(!world.balance.has_suspects(world.now) && !world.balance.leaves_out(2, world.now));
    }

    #[test]
    fn it_is_told_once_that_a_member_has_been_stuck_for_long_and_for_how_long() {
        let mut world = World::new();
        let mut changes = Vec::new();
        for length in [1; 700].into_iter().chain([0]) {
            world.now += EVERY;
            let queues = std::iter::once((ID, length)).filter(|_| length > 0).collect();
            let found = world.balance.look(&queues, |_| None, world.now);
            changes.extend(found.into_iter().map(|(_, change)| change));
        }
        let [Change::To(Stuck, _), Change::StuckLong, Change::To(Free, lasted)] = changes[..] else {
            panic!("{changes:?}")
        };
        assert_eq!(lasted, EVERY * 699);
    }

    proptest! {
        #[test]
        fn who_takes_connections_is_forgiven_at_the_next_look_and_who_takes_none_is_found_out_within_four(
            looks in proptest::collection::vec((0u32..4, any::<bool>()), 0..200)
        ) {
            let mut world = World::new();
            let (mut before, mut stood) = (0, 0);
            for (length, is_busy) in looks {
                let load = world.look(length, is_busy);
                stood = if length > 0 && length >= before { stood + 1 } else { 0 };
                before = length;
                if stood == 0 {
                    prop_assert!(load != Stuck);
                    prop_assert!(load == Free || is_busy);
                }
                if stood >= MOST_LOOKS {
                    prop_assert_eq!(load, Stuck);
                }
            }
            world.now += SUSPICION;
            prop_assert_eq!(world.look(0, true), Free);
        }
    }
}
