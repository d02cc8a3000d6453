//! A slot: a place for a worker that serves, and how long its next restart waits. Also the count of failed starts.

use std::fmt;
use std::time::Duration;

use crate::ids::WorkerId;
use crate::words::count;

/// The first restart of a slot is at once, the next after this; each doubles it.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(5);
/// After the successor of a recycled worker has failed, the next one waits for this; each failure doubles it.
const FIRST_PUT_OFF: Duration = Duration::from_secs(1);
const MAX_PUT_OFF: Duration = Duration::from_secs(60);
/// A worker that uses too much memory sooner after it was ready may have done so from its start on.
pub const SOON: Duration = Duration::from_secs(60);
/// If the one before it did too, it is replaced after [`SOON`]; each further one doubles it.
pub const MAX_REST: Duration = Duration::from_secs(600);
/// A worker that was ready for so long is restarted at once again.
pub const PROVEN_AFTER: Duration = Duration::from_secs(10);
/// The same if it ends with status 0, as one does that is to handle so many requests.
const DONE_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct Slot {
    /// The generation of the worker that serves here, or will.
    pub generation: u32,
    /// The worker that serves here, or will, or the last one that did.
    pub serving: Option<WorkerId>,
    /// How often a worker had to be restarted since the last reload.
    pub restarts: u32,
    /// How long the next restart waits.
    delay: Duration,
    /// Whether its worker was recycled since the last reload.
    pub is_recycled: bool,
    /// How long the next recycling waits if this one fails.
    put_off: Duration,
    /// Whether the next reload is for the sake of a sick worker.
    pub is_renewed: bool,
    /// The worker that was last found to use too much memory.
    outgrown: Option<WorkerId>,
    /// If that was soon: how long it has to be ready before it is replaced.
    rest: Option<Duration>,
}

impl Slot {
    pub fn new(generation: u32, serving: Option<WorkerId>) -> Self {
        Self {
            generation,
            serving,
            restarts: 0,
            delay: Duration::ZERO,
            is_recycled: false,
            put_off: FIRST_PUT_OFF,
            is_renewed: false,
            outgrown: None,
            rest: None,
        }
    }

    /// Its worker has ended with this status, after it was ready for so long if it ever was. Returns how long the next one
    /// waits.
    pub fn restart(&mut self, was_ready_for: Option<Duration>, status: u8) -> Duration {
        self.restarts += 1;
        let enough = if status == 0 { DONE_AFTER } else { PROVEN_AFTER };
        if was_ready_for.is_some_and(|ready_for| ready_for >= enough) {
            self.delay = Duration::ZERO;
        }
        let delay = self.delay;
        self.delay = (delay * 2).clamp(FIRST_DELAY, MAX_DELAY);
        delay
    }

    /// Another worker, of this generation, serves here from now on. By recycling nothing else changes.
    pub fn replace(&mut self, generation: u32, serving: WorkerId) {
        if generation == self.generation {
            (self.serving, self.is_recycled, self.put_off) = (Some(serving), true, FIRST_PUT_OFF);
        } else {
            let (outgrown, rest) = if self.is_renewed { (self.outgrown, self.rest) } else { (None, None) };
            *self = Self { outgrown, rest, ..Self::new(generation, Some(serving)) };
        }
    }

    /// The successor of its worker has failed. Returns how long the next one waits.
    pub fn put_off(&mut self) -> Duration {
        let delay = self.put_off;
        self.put_off = (delay * 2).min(MAX_PUT_OFF);
        delay
    }

    /// Its worker, which has been ready for so long, uses too much memory. Returns whether it should be replaced now: another
    /// one doesn't help if each needs as much from its start on.
    pub fn outgrows(&mut self, worker: WorkerId, ready_for: Duration) -> bool {
        if self.outgrown.replace(worker) != Some(worker) {
            let longer = |rest: Duration| (rest * 2).clamp(SOON, MAX_REST);
            self.rest = (ready_for < SOON).then(|| self.rest.map_or(Duration::ZERO, longer));
        }
        ready_for >= self.rest.unwrap_or_default()
    }

    /// Whether two workers in a row used too much memory soon.
    pub fn needs_more_memory(&self) -> bool {
        self.rest > Some(Duration::ZERO)
    }
}

/// Starts of serving workers that failed since the last one that didn't.
#[derive(Debug, Default)]
pub struct Failures {
    in_a_row: u32,
    /// The exit status of the last of them.
    pub last_status: u8,
}

impl Failures {
    pub fn add(&mut self, status: u8) {
        (self.in_a_row, self.last_status) = (self.in_a_row + 1, status);
    }

    pub fn clear(&mut self) {
        self.in_a_row = 0;
    }

    /// Whether there are `max` of them; 0: there are never too many.
    pub fn are_too_many(&self, max: u32) -> bool {
        max > 0 && self.in_a_row >= max
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let failures = count(self.in_a_row as usize, "start");
        write!(f, "no worker is ready and the last {failures} failed (see --max-failures)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_too_many_when_there_are_as_many_in_a_row_as_allowed() {
        let mut failures = Failures::default();
        failures.add(3);
        failures.add(4);
        assert_eq!([1, 2, 3, 0].map(|max| failures.are_too_many(max)), [true, true, false, false]);
        assert_eq!(failures.last_status, 4);
        assert!(failures.to_string().contains("the last 2 starts failed"), "{failures}");
        failures.clear();
        assert!(!failures.are_too_many(1));
    }

    #[test]
    fn restarts_wait_twice_as_long_each_time_until_a_worker_has_proven_itself() {
        let mut slot = Slot::new(1, None);
        let mut wait = |was_ready_for| slot.restart(was_ready_for, 1).as_millis();
        let waits: Vec<u128> = (0..8).map(|_| wait(None)).collect();
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000]);
        assert_eq!(wait(Some(PROVEN_AFTER - Duration::from_nanos(1))), 5000);
        assert_eq!([wait(Some(PROVEN_AFTER)), wait(Some(Duration::ZERO))], [0, 100]);
        assert_eq!(slot.restarts, 11);
        let mut done = |was_ready_for| slot.restart(Some(was_ready_for), 0).as_millis();
        assert_eq!([done(DONE_AFTER / 2), done(DONE_AFTER), done(DONE_AFTER)], [200, 0, 0]);
    }
}
