//! The one table of timers: each is kept here, and found here when it is due.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use crate::ids::{SlotId, WorkerId};

/// Of two timers that are due at the same time the lesser one comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// At the first start: steer to the workers that have become ready since the last steering.
    Steer,
    /// The canary has had its share for long enough.
    CanaryPeriod,
    /// At a stop, the workers have had their time to finish their requests.
    StopDrain,
    Worker(WorkerId, WorkerTimer),
    Slot(SlotId, SlotTimer),
    /// A stop has taken as long as it may.
    StopEnd,
}

/// [`super::policy::Policy::timers`] sets all but `Settled`, `Moment`, `Probe` and `MaxAge`. `AliveLongEnough` has to be the first and `KillGrace` the
/// last one: see [`Timers::cancel_worker`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkerTimer {
    /// It has lived long enough to be ready.
    AliveLongEnough,
    /// It has listened somewhere for a while and isn't ready: see what it lacks.
    Settled,
    /// It need no longer be waited for where it may be about to listen.
    Moment,
    /// Send it the next request.
    Probe,
    ReadyTimeout,
    /// It has served for as long as it may.
    MaxAge,
    DrainTimeout,
    /// Its main process may keep the stop signal from the server.
    ForwardGrace,
    StopTimeout,
    /// SIGKILL hasn't ended it.
    KillGrace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SlotTimer {
    /// Start the next worker.
    Restart,
    /// The next worker takes so long that its clients shouldn't wait for it.
    ResetQueue,
    /// Until then a successor that has failed isn't tried again.
    Recycle,
}

#[derive(Debug, Default)]
pub struct Timers {
    /// When each timer is due.
    at: BTreeMap<Timer, Instant>,
    /// The same, in the order of time.
    order: BTreeSet<(Instant, Timer)>,
}

impl Timers {
    /// Sets a timer, or moves it.
    pub fn set(&mut self, timer: Timer, at: Instant) {
        self.cancel(timer);
        self.at.insert(timer, at);
        self.order.insert((at, timer));
    }

    pub fn is_set(&self, timer: Timer) -> bool {
        self.at.contains_key(&timer)
    }

    pub fn set_if_unset(&mut self, timer: Timer, at: Instant) {
        if !self.is_set(timer) {
            self.set(timer, at);
        }
    }

    pub fn cancel(&mut self, timer: Timer) {
        if let Some(at) = self.at.remove(&timer) {
            self.order.remove(&(at, timer));
        }
    }

    pub fn cancel_worker(&mut self, id: WorkerId) {
        let first = Timer::Worker(id, WorkerTimer::AliveLongEnough);
        let last = Timer::Worker(id, WorkerTimer::KillGrace);
        let timers: Vec<Timer> = self.at.range(first..=last).map(|(timer, _)| *timer).collect();
        timers.into_iter().for_each(|timer| self.cancel(timer));
    }

    pub fn cancel_slot(&mut self, slot: SlotId) {
        self.cancel(Timer::Slot(slot, SlotTimer::Restart));
        self.cancel(Timer::Slot(slot, SlotTimer::ResetQueue));
        self.cancel(Timer::Slot(slot, SlotTimer::Recycle));
    }

    /// When the next timer is due.
    pub fn next(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Takes the timer that is due first among those for which `which` holds.
    pub fn pop_due(&mut self, now: Instant, which: impl Fn(&Timer) -> bool) -> Option<Timer> {
        let mut due = self.order.iter().take_while(|(at, _)| *at <= now);
        let (at, timer) = due.find(|(_, timer)| which(timer)).copied()?;
        self.order.remove(&(at, timer));
        self.at.remove(&timer);
        Some(timer)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn timers_come_when_they_are_due_in_order_of_time_and_those_that_were_cancelled_do_not() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let worker = |id, timer| Timer::Worker(WorkerId(id), timer);
        let slot = |id, timer| Timer::Slot(SlotId(id), timer);
        let mut timers = Timers::default();
        assert_eq!(timers.next(), None);
        timers.set(worker(1, WorkerTimer::StopTimeout), at(5));
        timers.set(worker(1, WorkerTimer::ForwardGrace), at(5));
        timers.set(worker(2, WorkerTimer::AliveLongEnough), at(1));
        timers.set(worker(2, WorkerTimer::KillGrace), at(1));
        timers.set(slot(0, SlotTimer::Restart), at(4));
        timers.set(slot(1, SlotTimer::Restart), at(1));
        timers.set(slot(1, SlotTimer::ResetQueue), at(1));
        timers.set(Timer::CanaryPeriod, at(9));
        timers.set(Timer::CanaryPeriod, at(3));
        timers.set_if_unset(Timer::CanaryPeriod, at(2));
        timers.cancel_worker(WorkerId(2));
        timers.cancel_slot(SlotId(1));
        assert_eq!(timers.next(), Some(at(3)));
        assert_eq!(timers.pop_due(at(2), |_| true), None);
        let due: Vec<Timer> = std::iter::from_fn(|| timers.pop_due(at(5), |_| true)).collect();
        let expected = [
            Timer::CanaryPeriod,
            slot(0, SlotTimer::Restart),
            worker(1, WorkerTimer::ForwardGrace),
            worker(1, WorkerTimer::StopTimeout),
        ];
        assert_eq!(due, expected);
        assert_eq!(timers.next(), None);
        timers.set_if_unset(Timer::CanaryPeriod, at(2));
        assert_eq!(timers.next(), Some(at(2)));
    }
}
