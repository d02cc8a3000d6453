//! Which members take no connections, so that new ones go to the others: pure rules over samples of the accept queues.
//!
//! A kernel that chooses by hash or at random sends connections to a stuck worker although others are idle. To choose
//! the shortest queue would be best if its length were known exactly (Winston 1977). But what is known is as old as the
//! last sample: then every connection goes to the queue that was shortest and makes it the longest, and a random choice
//! is better (Mitzenmacher, "How Useful Is Old Information?", 2000). So each new connection goes to a random member,
//! except those whose queue doesn't move: connections wait, and none was taken since the last sample.
//!
//! - One sample is not enough: the queue of an idle worker also looks so if a connection came a moment ago. A member is
//!   stuck after two such samples in a row.
//! - If all queues are always filled, two such samples may be chance. A member that turns out not to have been stuck (a
//!   false alarm) needs twice as many samples the next time: hysteresis with a back-off.
//! - A worker that waits for a CPU takes no connections either, and then the others wait as well. One that could run is
//!   stuck only if it has run for half of the time since it was first suspected.
//! - A member that was stuck for at least 50 ms is a suspect for 10 s: one sample is enough to find it stuck again, and
//!   it is also skipped while it is busy, before any connection waits.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::time::{Duration, Instant};

use crate::ids::MemberId;

/// Which workers get new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balancing {
    /// Any ready worker that isn't stuck.
    Load,
    /// Any ready worker.
    Random,
    /// As `Load`, but the workers that a generation started with take their connections from one queue.
    Queue,
    /// The one that the client's address stands for, if it hasn't been stuck for [`LONG`].
    Client,
}

/// How loaded a member is. New connections go to the members with the least load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Load {
    Free,
    /// It was stuck in the last 10 s, and it does something else than wait for connections and requests.
    Busy,
    /// Connections wait, and it takes none.
    Stuck,
}

/// The members of `members` with the least load, or what else ranks them: never none, even if all are stuck.
pub fn least_loaded<R: Ord>(
    members: &BTreeSet<MemberId>,
    load: impl Fn(MemberId) -> R,
) -> BTreeSet<MemberId> {
    let least = members.iter().map(|id| load(*id)).min();
    members.iter().copied().filter(|id| Some(load(*id)) == least).collect()
}

/// What the thread that accepts connections does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// How long it has had a CPU since it was started.
    pub ran: Duration,
    /// Whether it has one or waits for one.
    pub is_runnable: bool,
}

/// What a sample has changed for a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It has this load now. It had the load before for this long.
    To(Load, Duration),
    /// It has been stuck for [`LONG`].
    StuckLong,
}

impl Change {
    /// Whether it is about a member that was stuck for [`LONG`].
    fn is_long(self) -> bool {
        match self {
            Self::To(load, lasted) => load == Load::Free && lasted >= LONG,
            Self::StuckLong => true,
        }
    }
}

/// A member that is stuck for this long is reported, and its queue is sampled more seldom.
pub const LONG: Duration = Duration::from_secs(1);
/// A member is stuck when its queue didn't move at this many samples in a row.
const STUCK_AFTER: u32 = 2;
/// The same for a suspect.
const SUSPECT_STUCK_AFTER: u32 = 1;
/// The same after false alarms, at most.
const MAX_STUCK_AFTER: u32 = 4;
/// A member that was stuck for this long, and at two samples at least, becomes a suspect. Where CPUs are scarce, a
/// worker waits up to some 10 ms for its turn, and nothing is wrong with it.
const MIN_STUCK_TIME: Duration = Duration::from_millis(50);
/// How long a false alarm counts.
const FALSE_ALARM_AGE: Duration = Duration::from_secs(1);
/// How long a member is a suspect after it was stuck.
const SUSPECT_TIME: Duration = Duration::from_secs(10);

/// The load of all members. See the module's comment.
#[derive(Debug, Default)]
pub struct LoadTracker {
    members: BTreeMap<MemberId, Tracked>,
    /// Whether a member counts as free until it has been stuck for [`LONG`], and is never a suspect: its clients have to come
    /// back to it.
    is_patient: bool,
}

#[derive(Debug)]
struct Tracked {
    load: Load,
    /// Since when it has this load.
    since: Instant,
    /// Whether it was reported that it is stuck for long.
    is_reported: bool,
    /// Of its queue, at the last sample.
    length: u32,
    /// At how many samples in a row its queue didn't move.
    unmoved: u32,
    /// When its worker was first looked at since, and how long that had run then.
    looked_at: Option<(Instant, Duration)>,
    /// At how many samples it was stuck, after the one that found it so.
    still_stuck: u32,
    /// How many false alarms count, at most as many as matter, and when the last one was.
    false_alarms: u32,
    last_false_alarm: Instant,
    /// When it was stuck last for [`MIN_STUCK_TIME`].
    last_stuck: Option<Instant>,
    /// Whether it was seen waiting for something to do since. (The main thread of some programs never does.)
    was_idle: bool,
}

impl LoadTracker {
    pub fn new(balancing: Balancing) -> Self {
        Self { is_patient: balancing == Balancing::Client, ..Self::default() }
    }

    /// Takes a sample: how many connections wait in each queue that isn't empty. `is_busy` is called for suspects only,
    /// `turn` for those that seem to be stuck; they return `None` if it can't be known. Returns what has changed.
    pub fn sample(
        &mut self,
        queues: &BTreeMap<MemberId, u32>,
        is_busy: impl Fn(MemberId) -> Option<bool>,
        turn: impl Fn(MemberId) -> Option<Turn>,
        now: Instant,
    ) -> Vec<(MemberId, Change)> {
        for id in queues.keys() {
            self.members.entry(*id).or_insert_with(|| Tracked::new(now));
        }
        let of_member = |(id, member): (&MemberId, &mut Tracked)| {
            let length = queues.get(id).copied().unwrap_or(0);
            let change = member.sample(length, || is_busy(*id), || turn(*id), now)?;
            if self.is_patient {
                member.last_stuck = None;
            }
            let is_seen = !self.is_patient || change.is_long();
            is_seen.then_some((*id, change))
        };
        self.members.iter_mut().filter_map(of_member).collect()
    }

    pub fn load(&self, id: MemberId) -> Load {
        let is_seen = |member: &&Tracked| !self.is_patient || member.is_reported;
        self.members.get(&id).filter(is_seen).map_or(Load::Free, |member| member.load)
    }

    /// Whether a member is a suspect: it was stuck for at least 50 ms, and that was less than 10 s ago.
    pub fn has_suspects(&self, now: Instant) -> bool {
        self.members.values().any(|member| member.is_suspect(now))
    }

    /// Whether a member has been stuck for less than [`LONG`], so that the next sample should come soon: to send it
    /// connections again, or to be sure that it is stuck all the time.
    /// `members` is how many there are: if all of them are stuck, none is skipped. (The members of all addresses are
    /// counted together.)
    pub fn skips_some(&self, members: usize, now: Instant) -> bool {
        let stuck = || self.members.values().filter(|member| member.load == Load::Stuck);
        let is_new = |member: &Tracked| now.saturating_duration_since(member.since) < LONG;
        stuck().count() < members && stuck().any(is_new)
    }

    /// Whether a member is skipped because it is busy. No connection comes to it, so only a sample can find out that it
    /// no longer is.
    pub fn has_busy(&self) -> bool {
        self.members.values().any(|member| member.load == Load::Busy)
    }

    pub fn forget(&mut self, id: MemberId) {
        self.members.remove(&id);
    }

    /// Forgets the others.
    pub fn retain(&mut self, is_kept: impl Fn(&MemberId) -> bool) {
        self.members.retain(|id, _| is_kept(id));
    }
}

impl Tracked {
    fn new(now: Instant) -> Self {
        Self {
            load: Load::Free,
            since: now,
            is_reported: false,
            length: 0,
            unmoved: 0,
            looked_at: None,
            still_stuck: 0,
            false_alarms: 0,
            last_false_alarm: now,
            last_stuck: None,
            was_idle: false,
        }
    }

    fn sample(
        &mut self,
        length: u32,
        is_busy: impl Fn() -> Option<bool>,
        turn: impl Fn() -> Option<Turn>,
        now: Instant,
    ) -> Option<Change> {
        let is_unmoved = length > 0 && length >= self.length;
        self.length = length;
        self.unmoved = if is_unmoved { self.unmoved + 1 } else { 0 };
        if !is_unmoved {
            self.looked_at = None;
        }
        let gets_stuck = self.load != Load::Stuck
            && is_unmoved
            && self.unmoved >= self.stuck_after(now)
            && !self.waits_for_cpu(turn, now);
        let load = match self.load {
            Load::Stuck if is_unmoved => {
                self.still_stuck += 1;
                Load::Stuck
            }
            Load::Stuck => {
                self.judge_past_stuck(now);
                Load::Free
            }
            _ if gets_stuck => Load::Stuck,
            _ => self.free_or_busy(is_busy, now),
        };
        let lasted = now.saturating_duration_since(self.since);
        if load == self.load {
            let is_long = load == Load::Stuck && lasted >= LONG;
            return (is_long && !mem::replace(&mut self.is_reported, true)).then_some(Change::StuckLong);
        }
        (self.load, self.since, self.is_reported, self.still_stuck) = (load, now, false, 0);
        Some(Change::To(load, lasted))
    }

    /// Whether it may only wait for a CPU. Of one that was stuck lately that isn't asked.
    fn waits_for_cpu(&mut self, turn: impl Fn() -> Option<Turn>, now: Instant) -> bool {
        if self.is_suspect(now) {
            return false;
        }
        let Some(turn) = turn().filter(|turn| turn.is_runnable) else { return false };
        let (since, ran_before) = *self.looked_at.get_or_insert((now, turn.ran));
        let ran = turn.ran.saturating_sub(ran_before);
        since == now || ran * 2 < now.saturating_duration_since(since)
    }

    /// It is stuck when its queue didn't move at this many samples in a row.
    fn stuck_after(&self, now: Instant) -> u32 {
        let samples = if self.is_suspect(now) { SUSPECT_STUCK_AFTER } else { STUCK_AFTER };
        (samples << self.false_alarms_at(now)).min(MAX_STUCK_AFTER)
    }

    /// It was stuck, and has taken a connection since the last sample: was it a false alarm?
    fn judge_past_stuck(&mut self, now: Instant) {
        if self.still_stuck == 0 {
            self.false_alarms = (self.false_alarms_at(now) + 1).min(MAX_STUCK_AFTER.ilog2());
            self.last_false_alarm = now;
        } else if now.saturating_duration_since(self.since) >= MIN_STUCK_TIME {
            (self.last_stuck, self.was_idle, self.false_alarms) = (Some(now), false, 0);
        }
    }

    fn false_alarms_at(&self, now: Instant) -> u32 {
        let counts = now.saturating_duration_since(self.last_false_alarm) < FALSE_ALARM_AGE;
        if counts { self.false_alarms } else { 0 }
    }

    fn is_suspect(&self, now: Instant) -> bool {
        self.last_stuck.is_some_and(|at| now.saturating_duration_since(at) < SUSPECT_TIME)
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
    /// A member whose queue moves after so many samples becomes a suspect: it was stuck for 50 ms from the second on.
    const SAMPLES_OF_SUSPECT: usize = 26;
    const ID: MemberId = MemberId(7);

    /// One member, sampled every 2 ms.
    struct World {
        tracker: LoadTracker,
        now: Instant,
        turn: (Duration, bool),
    }

    impl World {
        fn new() -> Self {
            Self { tracker: LoadTracker::default(), now: Instant::now(), turn: (Duration::ZERO, false) }
        }

        fn sample(&mut self, length: u32, is_busy: bool) -> Load {
            self.now += EVERY;
            let queues = std::iter::once((ID, length)).filter(|_| length > 0).collect();
            let (ran, is_runnable) = self.turn;
            self.tracker.sample(&queues, |_| Some(is_busy), |_| Some(Turn { ran, is_runnable }), self.now);
            self.tracker.load(ID)
        }

        fn samples(&mut self, lengths: &[u32]) -> Vec<Load> {
            lengths.iter().map(|length| self.sample(*length, false)).collect()
        }
    }

    use Load::*;

    #[test]
    fn for_a_choice_by_client_a_member_counts_as_free_until_it_has_been_stuck_for_long() {
        let mut world = World { tracker: LoadTracker::new(Balancing::Client), ..World::new() };
        let queues = BTreeMap::from([(ID, 1)]);
        let mut changes = Vec::new();
        let begun = world.now;
        while world.now < begun + LONG + 4 * EVERY {
            world.now += EVERY;
            let change = world.tracker.sample(&queues, |_| Some(true), |_| None, world.now);
            changes.extend(
                change.into_iter().map(|(_, change)| (world.now - begun, change, world.tracker.load(ID))),
            );
            let looks_stuck = world.now >= begun + 2 * EVERY && world.now < begun + 2 * EVERY + LONG;
            assert_eq!(world.tracker.skips_some(2, world.now), looks_stuck, "the next sample comes soon");
        }
        assert_eq!(changes, [(LONG + 2 * EVERY, Change::StuckLong, Stuck)]);
        world.now += EVERY;
        let change = world.tracker.sample(&BTreeMap::new(), |_| Some(true), |_| None, world.now);
        assert!(matches!(change[..], [(ID, Change::To(Free, lasted))] if lasted >= LONG), "{change:?}");
        assert!(!world.tracker.has_suspects(world.now) && !world.tracker.has_busy());
        for _ in 0..100 {
            assert_eq!(world.sample(1, true), Free, "it is no suspect");
        }
        assert_eq!(world.sample(0, true), Free);
    }

    #[test]
    fn a_member_is_stuck_from_the_second_sample_at_which_its_queue_does_not_move_until_it_moves() {
        let mut world = World::new();
        assert_eq!(
            world.samples(&[0, 1, 1, 3, 3, 2, 1, 0]),
            [Free, Free, Stuck, Stuck, Stuck, Free, Free, Free]
        );
    }

    #[test]
    fn each_false_alarm_within_a_second_doubles_the_samples_until_a_member_is_stuck() {
        let mut world = World::new();
        assert_eq!(world.samples(&[1, 1, 0]), [Free, Stuck, Free]);
        assert_eq!(world.samples(&[1, 1, 1, 1, 0]), [Free, Free, Free, Stuck, Free]);
        assert_eq!(world.samples(&[1; 4]), [Free, Free, Free, Stuck], "four at most");
        assert_eq!(world.samples(&[0]), [Free]);
        world.now += FALSE_ALARM_AGE;
        assert_eq!(world.samples(&[1, 1, 0]), [Free, Stuck, Free]);
    }

    #[test]
    fn for_ten_seconds_a_suspect_is_stuck_at_the_first_sample_and_skipped_while_busy() {
        let mut world = World::new();
        assert_eq!(world.sample(0, true), Free, "it is no suspect");
        world.samples(&[1; SAMPLES_OF_SUSPECT]);
        assert_eq!(world.sample(0, true), Free);
        assert_eq!(world.sample(0, true), Free, "it was not seen idle, and may never be");
        assert_eq!(world.sample(0, false), Free);
        assert_eq!(
            [world.sample(0, true), world.sample(0, true), world.sample(0, false)],
            [Busy, Busy, Free]
        );
        assert_eq!(world.samples(&[1, 1]), [Stuck, Stuck]);
        world.sample(0, false);
        world.now += SUSPECT_TIME;
        assert_eq!(world.sample(0, true), Free);
        assert_eq!(world.samples(&[1, 1]), [Free, Stuck]);
    }

    #[test]
    fn a_member_that_waited_for_a_cpu_is_no_suspect() {
        let mut world = World::new();
        world.sample(0, false);
        world.samples(&[1; SAMPLES_OF_SUSPECT - 1]);
        assert!(world.tracker.skips_some(2, world.now));
        assert!(!world.tracker.skips_some(1, world.now), "all are stuck");
        assert!(!world.tracker.skips_some(2, world.now + LONG), "it is stuck for long");
        assert_eq!([world.sample(0, true), world.sample(0, false), world.sample(0, true)], [Free; 3]);
        assert!(!world.tracker.has_suspects(world.now) && !world.tracker.skips_some(2, world.now));
    }

    #[test]
    fn a_worker_that_waits_for_a_cpu_is_not_stuck_and_one_that_computes_is() {
        for (runs, expected) in [(EVERY * 2 / 5, Free), (EVERY / 2, Stuck), (EVERY, Stuck)] {
            let mut world = World::new();
            let mut loads = Vec::new();
            for _ in 0..40 {
                world.turn = (world.turn.0 + runs, true);
                loads.push(world.sample(1, false));
            }
            assert_eq!((loads[1], loads[2], loads[39]), (Free, expected, expected), "{runs:?} of {EVERY:?}");
        }
        let mut world = World::new();
        world.turn = (EVERY, true);
        assert_eq!(world.samples(&[1, 1, 1]), [Free; 3]);
        world.turn.1 = false;
        assert_eq!(world.samples(&[1]), [Stuck], "it sleeps");
    }

    #[test]
    fn a_long_stuck_member_is_reported_once_and_its_end_with_the_duration() {
        let mut world = World::new();
        let mut changes = Vec::new();
        for (length, at) in [1; 700].into_iter().chain([0; 600]).zip(1..) {
            world.now += EVERY;
            let queues = std::iter::once((ID, length)).filter(|_| length > 0).collect();
            let found = world.tracker.sample(&queues, |_| None, |_| None, world.now);
            changes.extend(found.into_iter().map(|(_, change)| (at, change)));
        }
        let stuck =
            [(2, Change::To(Stuck, EVERY)), (502, Change::StuckLong), (701, Change::To(Free, EVERY * 699))];
        assert_eq!(changes, stuck, "LONG is 500 samples");
    }

    #[test]
    fn a_suspect_is_busy_however_often_it_was_seen_idle_until_it_is_forgotten() {
        let mut world = World::new();
        world.samples(&[1; SAMPLES_OF_SUSPECT]);
        assert_eq!(world.samples(&[0, 0, 0]), [Free; 3]);
        assert!(world.tracker.has_suspects(world.now) && !world.tracker.has_busy());
        assert_eq!(world.sample(0, true), Busy);
        assert!(world.tracker.has_busy());
        world.tracker.forget(ID);
        assert_eq!(world.tracker.load(ID), Free);
        assert!(!world.tracker.has_suspects(world.now) && !world.tracker.has_busy());
    }

    #[test]
    fn a_stuck_member_asks_for_a_sample_soon_until_it_is_stuck_for_long() {
        let mut world = World::new();
        world.samples(&[1, 1]);
        assert!(world.tracker.skips_some(2, world.now + LONG - EVERY));
        assert!(!world.tracker.skips_some(2, world.now + LONG));
    }

    #[test]
    fn a_false_alarm_counts_for_less_than_a_second() {
        for (age, last) in [(FALSE_ALARM_AGE - EVERY, Free), (FALSE_ALARM_AGE, Stuck)] {
            let mut world = World::new();
            world.samples(&[1, 1, 0]);
            world.now += age - 2 * EVERY;
            assert_eq!(world.samples(&[1, 1]), [Free, last], "{age:?}");
        }
    }

    #[test]
    fn a_member_is_a_suspect_for_less_than_ten_seconds() {
        let mut world = World::new();
        world.samples(&[1; SAMPLES_OF_SUSPECT]);
        world.samples(&[0]);
        assert!(world.tracker.has_suspects(world.now + SUSPECT_TIME - EVERY));
        assert!(!world.tracker.has_suspects(world.now + SUSPECT_TIME));
    }

    proptest! {
        #[test]
        fn a_queue_that_moves_is_not_stuck_at_the_next_sample_and_one_that_does_not_is_stuck_within_four(
            samples in proptest::collection::vec((0u32..4, any::<bool>()), 0..200)
        ) {
            let mut world = World::new();
            let (mut before, mut unmoved) = (0, 0);
            for (length, is_busy) in samples {
                let load = world.sample(length, is_busy);
                unmoved = if length > 0 && length >= before { unmoved + 1 } else { 0 };
                before = length;
                if unmoved == 0 {
                    prop_assert!(load != Stuck);
                    prop_assert!(load == Free || is_busy);
                }
                if unmoved >= MAX_STUCK_AFTER {
                    prop_assert_eq!(load, Stuck);
                }
            }
            world.now += SUSPECT_TIME;
            prop_assert_eq!(world.sample(0, true), Free);
        }

        #[test]
        fn some_member_is_least_loaded_and_no_other_has_less_load(loads in proptest::collection::vec(0u8..3, 1..12)) {
            let load = |id: MemberId| [Free, Busy, Stuck][usize::from(loads[id.0 as usize])];
            let all: BTreeSet<MemberId> = (0..loads.len() as u32).map(MemberId).collect();
            let least = least_loaded(&all, load);
            prop_assert!(!least.is_empty() && least.is_subset(&all));
            prop_assert!(least.iter().all(|id| all.iter().all(|other| load(*id) <= load(*other))));
            prop_assert!(all.difference(&least).all(|id| least.iter().all(|other| load(*id) > load(*other))));
        }
    }
}
