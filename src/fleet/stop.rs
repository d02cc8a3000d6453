//! The stop: workers finish their requests, get the stop signal, and are killed in the end.

use std::time::Instant;

use super::events::{Action, Announcement, Ticket};
use super::phase::Phase;
use super::policy::SAME_STOP_WITHIN;
use super::timers::Timer;
use super::{Fleet, State, story};
use crate::words::count;

impl Fleet {
    /// Nothing works: stops all workers, to exit with `status`.
    pub(super) fn give_up(&mut self, why: &str, status: u8, now: Instant) {
        self.crew.log(log::Level::Error, format!("{why}; giving up"));
        self.stop_all(status, None, now);
    }

    pub(super) fn stop_signal(&mut self, signal: &'static str, now: Instant) {
        let Phase::Stopping { signalled, .. } = &mut self.phase else {
            self.begin_stop(signal, Some(now), now);
            return;
        };
        // The first signal after a stop that no signal has begun is like the first one.
        if now - *signalled.get_or_insert(now) < SAME_STOP_WITHIN {
            return;
        }
        self.crew.warn(format!("{signal} again: killing {}", count(self.crew.roster.len(), "worker")));
        for id in self.crew.roster.ids(|_| true) {
            self.kill(id, now);
        }
    }

    pub(super) fn begin_stop(&mut self, asked_by: &str, signalled: Option<Instant>, now: Instant) -> Ticket {
        self.crew.info(story::stop_begins(asked_by, self.crew.roster.len(), &self.crew.policy));
        self.stop_all(0, signalled, now)
    }

    /// Retires all workers. Nothing else that was asked for will be done.
    fn stop_all(&mut self, status: u8, signalled: Option<Instant>, now: Instant) -> Ticket {
        let within = self.crew.policy.stop_within;
        self.crew.actions.push(Action::Announce(Announcement::Stopping { within }));
        self.queue.clear(); // who waits for what was queued, or runs, is told at the end: see Fleet::stop_ticket
        let ticket = self.queue.ticket();
        self.phase = Phase::Stopping { signalled, status, ticket };
        self.crew.close_slots();
        self.crew.timers.set(Timer::StopDrain, now + self.crew.policy.stop_drain());
        self.crew.timers.set(Timer::StopEnd, now + within);
        let retired = self.crew.roster.ids(|worker| worker.state == State::Ready);
        let starting = self.crew.starting();
        self.crew.retire(&retired, now);
        self.crew.cancel_drain_timeouts();
        self.steer();
        self.end_retired(&retired, now);
        self.stop(&starting, now);
        ticket
    }

    /// Workers have had their time to finish their requests.
    pub(super) fn stop_drain_over(&mut self, now: Instant) {
        let draining = self.crew.roster.ids(|worker| worker.state == State::Draining);
        for id in &draining {
            let line = story::not_idle_at_stop(&self.crew.roster.name(*id), &self.crew.policy);
            self.crew.info(line);
        }
        self.stop(&draining, now);
    }

    pub(super) fn stop_over(&mut self, now: Instant) {
        for id in self.crew.roster.ids(|worker| worker.state != State::Killed) {
            let line = story::not_stopped_at_stop(&self.crew.roster.name(id), &self.crew.policy);
            self.crew.warn(line);
            self.kill(id, now);
        }
    }
}
