//! What the command line decides for the whole run, and the limits of its numbers, which hold for commands as well.

use std::time::Duration;

pub use super::slot::PROVEN_AFTER;
use super::timers::WorkerTimer;
use super::worker::State;
use crate::ids::SlotId;
use crate::steering::Share;

/// How many workers there can be.
pub const MAX_WORKERS: u32 = 65_535;
/// No duration is longer: far more than anyone waits, and far less than would overflow a clock.
pub const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A main process that passes the stop signal on has done so by then, and a server that has heard of it has closed its
/// listeners; a shell, npm or runuser(1) ends only when its child does.
const FORWARD_GRACE: Duration = Duration::from_secs(1);
/// See [`Policy::proof`].
pub const PROOF: Duration = Duration::from_millis(100);
/// A worker that has been ready for less goes into the background at once, as its whole generation does.
pub const AT_ONCE: Duration = Duration::from_secs(3);
/// How long a worker of the first start waits for connections, if others get some wherever it listens. Each steering looks at
/// all workers: with a thousand of them, one for each that becomes ready takes a quarter of this process's CPU time.
pub const STEER_WITHIN: Duration = Duration::from_millis(20);
/// A process that hasn't ended so long after SIGKILL is stuck in the kernel.
pub const KILL_GRACE: Duration = Duration::from_secs(10);

/// A stop signal that comes so soon after the first is the same one: timeout(1) and some npm packages send it to the
/// process and to its group, and a terminal's Ctrl-C comes in addition.
pub const SAME_STOP_WITHIN: Duration = Duration::from_secs(1);

/// When a worker is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// When it listens, or says so.
    Listen,
    /// When it says so.
    Notify,
    /// When it has lived for so long.
    Alive(Duration),
    /// When it answers requests where it listens: on this port, or where it listened first.
    Answers { port: Option<u16> },
}

/// What the command line decides for the whole run.
#[derive(Debug, Clone)]
pub struct Policy {
    pub workers: u32,
    pub readiness: Readiness,
    pub ready_timeout: Duration,
    /// How long a new generation has to live on after it has begun to listen, before it gets connections: a program that goes
    /// into the background does so in that time.
    pub proof: Duration,
    /// How long a retired worker may take to finish its work.
    pub drain: Duration,
    /// How long a worker may take to end after the stop signal.
    pub stop_timeout: Duration,
    /// How long a stop of everything may take, until the workers that are left are killed.
    pub stop_within: Duration,
    /// After what time a worker that does nothing while a connection waits for it is replaced; `None`: never.
    pub hung_timeout: Option<Duration>,
    /// How long a worker serves before it is replaced; `None`: as long as it lives.
    pub max_age: Option<Duration>,
    /// The name of the stop signal.
    pub stop_signal: &'static str,
    /// After so many failed starts in a row, with no worker ready, reuse-run gives up. 0: never.
    pub max_failures: u32,
    /// How the workers are replaced when a reload doesn't say it.
    pub rollout: Rollout,
    /// Whether the workers of a generation take their connections from one queue. Then none of them can get no more while
    /// others do: they are replaced together.
    pub shares_queue: bool,
}

impl Policy {
    /// How long workers may take to finish their requests at a stop of everything. The rest of its time is for their end.
    pub fn stop_drain(&self) -> Duration {
        Duration::from_millis((self.stop_within * 2 / 3).as_millis() as u64)
    }

    /// How long the worker of this slot serves. Those of several slots that begin together end one after the other: each has
    /// another share of the last tenth (multiples of the golden ratio are spread evenly).
    pub fn age_limit(&self, slot: SlotId) -> Option<Duration> {
        const GOLDEN_RATIO: f64 = 0.618_033_988_749_895;
        let share = (f64::from(slot.0) * GOLDEN_RATIO).fract();
        self.max_age.map(|age| age.mul_f64(1.0 - share / 10.0))
    }

    /// The timers that begin when a worker enters a state.
    pub fn timers(&self, state: State) -> Vec<(WorkerTimer, Duration)> {
        match (state, self.readiness) {
            (State::Starting, Readiness::Alive(needed)) => {
                vec![
                    (WorkerTimer::AliveLongEnough, needed),
                    (WorkerTimer::ReadyTimeout, self.ready_timeout.max(needed)),
                ]
            }
            (State::Starting, _) => vec![(WorkerTimer::ReadyTimeout, self.ready_timeout)],
            (State::Ready, _) => Vec::new(),
            (State::Draining, _) => vec![(WorkerTimer::DrainTimeout, self.drain)],
            (State::Stopping, _) => {
                vec![
                    (WorkerTimer::ForwardGrace, FORWARD_GRACE),
                    (WorkerTimer::StopTimeout, self.stop_timeout),
                ]
            }
            (State::Killed, _) => vec![(WorkerTimer::KillGrace, KILL_GRACE)],
        }
    }
}

/// How a reload replaces the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rollout {
    AllAtOnce,
    /// At most so many slots at a time; each batch begins when the one before is done.
    Batches(u32),
    /// All at once, after the new workers have had this share of new connections for so long.
    Canary {
        share: Share,
        period: Duration,
    },
}

impl Rollout {
    /// # Errors
    /// When a batch would be empty.
    pub fn batches(most: u32) -> Result<Self, String> {
        if most == 0 { Err("a batch has at least 1 worker".to_owned()) } else { Ok(Self::Batches(most)) }
    }

    /// # Errors
    /// When the share is nothing or everything, or the period too long.
    pub fn canary(percent: f64, period: Duration) -> Result<Self, String> {
        let share = Share::from_percent(percent)
            .ok_or_else(|| format!("{percent} is not a share between 0.01 and 99.99 percent"))?;
        if period > MAX_DURATION {
            return Err("a canary lasts at most a year".to_owned());
        }
        Ok(Self::Canary { share, period })
    }
}

/// A number of workers, as a command gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Exactly(u32),
    More(u32),
    Fewer(u32),
}

impl Target {
    /// The number of workers, when there are `now`.
    ///
    /// # Errors
    /// When there can't be so many.
    pub fn workers(self, now: u32) -> Result<u32, String> {
        let workers = match self {
            Self::Exactly(number) => number.into(),
            Self::More(number) => i64::from(now) + i64::from(number),
            Self::Fewer(number) => i64::from(now) - i64::from(number),
        };
        let possible = u32::try_from(workers).ok().filter(|workers| (1..=MAX_WORKERS).contains(workers));
        possible.ok_or_else(|| format!("there can be 1 to {MAX_WORKERS} workers, not {workers}"))
    }
}

/// A policy for tests.
#[cfg(test)]
pub fn example(readiness: Readiness) -> Policy {
    Policy {
        workers: 3,
        readiness,
        ready_timeout: Duration::from_secs(60),
        proof: Duration::ZERO,
        drain: Duration::from_secs(10),
        stop_timeout: Duration::from_secs(30),
        stop_within: Duration::from_secs(9),
        hung_timeout: Some(Duration::from_secs(10)),
        max_age: None,
        stop_signal: "SIGINT",
        max_failures: 10,
        rollout: Rollout::AllAtOnce,
        shares_queue: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_duration_is_longer_than_a_year() {
        assert_eq!(MAX_DURATION.as_secs(), 31_536_000);
    }

    #[test]
    fn numbers_of_workers_batches_and_canaries_have_limits() {
        assert_eq!(Target::Exactly(4).workers(9), Ok(4));
        assert_eq!(Target::More(2).workers(MAX_WORKERS - 2), Ok(MAX_WORKERS));
        assert_eq!(Target::Fewer(2).workers(3), Ok(1));
        for (target, now) in [(Target::Exactly(0), 1), (Target::More(1), MAX_WORKERS), (Target::Fewer(3), 3)]
        {
            let limit = target.workers(now).unwrap_err();
            assert!(limit.contains("1 to 65535 workers"), "{limit}");
        }
        assert_eq!(Rollout::batches(1), Ok(Rollout::Batches(1)));
        assert!(Rollout::batches(0).is_err());
        let share = Share::from_percent(5.0).unwrap();
        assert_eq!(Rollout::canary(5.0, MAX_DURATION), Ok(Rollout::Canary { share, period: MAX_DURATION }));
        assert!(Rollout::canary(0.0, Duration::ZERO).is_err());
        assert!(Rollout::canary(5.0, MAX_DURATION + Duration::from_nanos(1)).is_err());
    }

    #[test]
    fn workers_that_begin_together_end_one_after_the_other() {
        let age = Duration::from_secs(100);
        let policy = Policy { max_age: Some(age), ..example(Readiness::Listen) };
        let mut limits: Vec<Duration> = (0..8).filter_map(|slot| policy.age_limit(SlotId(slot))).collect();
        assert_eq!(limits[0], age);
        limits.sort();
        assert!(limits.windows(2).all(|pair| pair[1] - pair[0] >= age / 200), "{limits:?}");
        assert!(limits[0] >= age * 9 / 10);
        assert_eq!(example(Readiness::Listen).age_limit(SlotId(3)), None);
    }

    #[test]
    fn a_worker_that_is_ready_after_a_duration_is_not_late_before_it() {
        for (needed, timeout) in [(2, 60), (90, 90)] {
            let needed = Duration::from_secs(needed);
            assert_eq!(
                example(Readiness::Alive(needed)).timers(State::Starting),
                [
                    (WorkerTimer::AliveLongEnough, needed),
                    (WorkerTimer::ReadyTimeout, Duration::from_secs(timeout))
                ]
            );
        }
    }
}
