//! All slots and workers with their states, timers and endpoints: what is the same for every worker, whichever
//! operation it belongs to.

use std::collections::BTreeSet;
use std::mem;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::endpoints::Endpoints;
use super::events::Action;
use super::phase::Phase;
use super::policy::{Policy, Readiness};
use super::roster::Roster;
use super::slot::Slot;
use super::story;
use super::timers::{SlotTimer, Timer, Timers, WorkerTimer};
use super::views::{self, View};
use super::worker::{State, Worker};
use crate::address::{Address, Endpoint};
use crate::ids::{SlotId, WorkerId};
use crate::steering::{Plan, Role};
use crate::words::millis;

/// When a worker that listens, but not on all that it has to, is checked again: its log line comes then; and the only
/// worker that has nothing but a Unix socket, which may be its own, is taken as ready then.
const CHECK_ENDPOINTS_AFTER: Duration = Duration::from_secs(1);
/// Clients wait so long for the next worker of a slot. Then they are reset, so that they try again.
const MAX_QUEUE_WAIT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Crew {
    pub(super) policy: Policy,
    pub(super) roster: Roster,
    pub(super) endpoints: Endpoints,
    pub(super) timers: Timers,
    /// What follows from the event that is being handled.
    pub(super) actions: Vec<Action>,
}

impl Crew {
    pub(super) fn new(policy: Policy, endpoints: Endpoints) -> Self {
        let roster = Roster::new(policy.workers);
        Self { policy, roster, endpoints, timers: Timers::default(), actions: Vec::new() }
    }

    /// Whether [`Action::Start`] of this worker still stands.
    pub fn wants(&self, worker: WorkerId) -> bool {
        self.roster.get(worker).is_some()
    }

    /// The newest generation that serves. It serves in all slots, except during a rolling reload, or after one that was
    /// given up.
    pub fn generation(&self) -> u32 {
        self.roster.slots.iter().map(|slot| slot.generation).max().unwrap_or(0)
    }

    /// The oldest generation of which a worker may yet be started.
    pub fn oldest_generation(&self) -> u32 {
        self.roster.slots.iter().map(|slot| slot.generation).min().unwrap_or(0)
    }

    /// Whether a worker of this generation serves in some slot, or will.
    pub fn has_slot_of(&self, generation: u32) -> bool {
        self.roster.slots.iter().any(|slot| slot.generation == generation)
    }

    pub fn slots(&self) -> usize {
        self.roster.slots.len()
    }

    /// Where the workers listen, or have listened, for clients.
    pub fn endpoints(&self) -> BTreeSet<&Endpoint> {
        self.endpoints.public(self.slots())
    }

    /// The TCP addresses at which connections come to this worker alone.
    pub fn addresses(&self, worker: WorkerId) -> BTreeSet<Address> {
        self.endpoints.addresses(worker)
    }

    /// All slots and workers, by slot, and in each slot the one that serves first.
    pub fn views(&self) -> Vec<View> {
        views::views(&self.roster)
    }

    /// The workers that have yet to become ready.
    pub fn starting(&self) -> Vec<WorkerId> {
        self.roster.ids(|worker| worker.state == State::Starting)
    }

    pub fn is_starting(&self, worker: WorkerId) -> bool {
        self.roster.state(worker) == Some(State::Starting)
    }

    /// "4 workers of generation 3 serve"
    pub fn who_serves(&self) -> String {
        story::who_serves(&self.roster.slots)
    }

    pub(super) fn log(&mut self, level: log::Level, line: String) {
        self.actions.push(Action::Log { level, line });
    }

    pub(super) fn info(&mut self, line: String) {
        self.log(log::Level::Info, line);
    }

    pub(super) fn warn(&mut self, line: String) {
        self.log(log::Level::Warn, line);
    }

    /// Who gets new connections. Ready workers that don't serve get the canary's share, if there is one.
    pub(super) fn plan(&self, phase: Phase) -> Plan {
        let canary = phase.canary();
        let role = |worker: &Worker| match worker.state {
            State::Ready if self.roster.serves(worker) => Some(Role::Ready),
            State::Ready if canary.is_some() => Some(Role::Canary),
            State::Ready | State::Starting => None,
            State::Draining => Some(Role::Draining),
            State::Stopping | State::Killed => Some(Role::Leaving),
        };
        let roles = self.roster.workers().filter_map(|(id, worker)| Some((id, role(worker)?))).collect();
        let generation = (!phase.is_stopping()).then(|| self.generation());
        Plan { roles, share: canary.unwrap_or_default(), generation }
    }

    /// Puts a worker into a state and sets the timers of that state.
    pub(super) fn enter(&mut self, id: WorkerId, state: State, now: Instant) {
        let Some(worker) = self.roster.get_mut(id) else { return };
        worker.enter(state, now);
        self.timers.cancel_worker(id);
        for (timer, after) in self.policy.timers(state) {
            self.timers.set(Timer::Worker(id, timer), now + after);
        }
    }

    pub(super) fn remove(&mut self, id: WorkerId) -> Option<Worker> {
        self.timers.cancel_worker(id);
        self.endpoints.remove_worker(id);
        self.roster.remove(id)
    }

    pub(super) fn start(&mut self, slot: SlotId, generation: u32, now: Instant) {
        let worker = self.roster.add(slot, generation, now);
        self.actions.push(Action::Start { worker, slot, generation });
    }

    pub(super) fn started(&mut self, id: WorkerId, pid: i32, now: Instant) {
        if let Some(worker) = self.roster.get_mut(id) {
            worker.pid = Some(pid);
            self.endpoints.add_worker(id);
            self.enter(id, State::Starting, now);
        }
    }

    /// A worker has called listen(2). Returns the workers that have all the endpoints that they need by now.
    pub(super) fn listens(&mut self, id: WorkerId, endpoint: Endpoint, now: Instant) -> Vec<WorkerId> {
        let became_public = self.endpoints.add(id, endpoint);
        if !self.is_starting(id) || self.policy.readiness != Readiness::Listen {
            return Vec::new();
        }
        self.timers.set_if_unset(Timer::Worker(id, WorkerTimer::CheckEndpoints), now + CHECK_ENDPOINTS_AFTER);
        if became_public { self.complete() } else { Vec::from_iter(self.is_complete(id).then_some(id)) }
    }

    /// The workers that start and have all the endpoints that they need, where that makes them ready.
    pub(super) fn complete(&self) -> Vec<WorkerId> {
        self.starting().into_iter().filter(|id| self.is_complete(*id)).collect()
    }

    fn is_complete(&self, id: WorkerId) -> bool {
        let has_all = |worker: &Worker| self.endpoints.missing(id, worker.slot).is_empty();
        self.policy.readiness == Readiness::Listen
            && self.endpoints.has_public(id)
            && self.roster.get(id).is_some_and(has_all)
    }

    pub(super) fn fire_for_slot(&mut self, slot: SlotId, timer: SlotTimer, now: Instant) {
        let Some(generation) = self.roster.slots.get(slot.index()).map(|slot| slot.generation) else {
            return;
        };
        match timer {
            SlotTimer::Restart => self.start(slot, generation, now),
            SlotTimer::ResetQueue => self.actions.push(Action::ResetQueue { slot, generation }),
        }
    }

    pub(super) fn log_generation_ready(&mut self, generation: u32, since: Instant, now: Instant) {
        self.info(story::generation_ready(generation, now - since, &self.roster, &self.endpoints));
    }

    /// Has the next worker start in the slot of one that has ended, at once or later.
    pub(super) fn restart(&mut self, ended: &Worker, now: Instant) {
        let was_ready_for = ended.ready_at.map(|ready_at| now - ready_at);
        let delay = self.roster.slots[ended.slot.index()].restart(was_ready_for);
        self.timers.set(Timer::Slot(ended.slot, SlotTimer::Restart), now + delay);
        self.timers.set_if_unset(Timer::Slot(ended.slot, SlotTimer::ResetQueue), now + MAX_QUEUE_WAIT);
    }

    /// A worker that serves sets what its replacements have to do.
    pub(super) fn remember_endpoints(&mut self, id: WorkerId) {
        if let Some(worker) = self.roster.get(id).filter(|worker| self.roster.serves(worker)) {
            self.endpoints.remember(id, worker.slot);
        }
    }

    /// Puts a worker that starts into the state Ready, with the log lines for that. Returns its generation, and whether it serves.
    pub(super) fn ready(&mut self, id: WorkerId, is_first_start: bool, now: Instant) -> Option<(u32, bool)> {
        if !self.is_starting(id) {
            return None; // the readiness of another may have stopped it
        }
        self.enter(id, State::Ready, now);
        let worker = self.roster.get(id)?;
        let (name, slot, generation) = (worker.to_string(), worker.slot, worker.generation);
        let (took, serves) = (millis(now - worker.started), self.roster.serves(worker));
        self.log(log::Level::Debug, format!("{name} is ready after {took}"));
        if serves {
            self.timers.cancel(Timer::Slot(slot, SlotTimer::ResetQueue));
            self.endpoints.remember(id, slot);
        }
        if serves && !is_first_start {
            let is_new = self.roster.slots[slot.index()].restarts == 0;
            let what = if is_new { "a new one" } else { "a replacement" };
            self.info(format!("{name} is ready, {what}, after {took}"));
        }
        Some((generation, serves))
    }

    /// What a ready worker has not taken over from its predecessor by now it never will. After the steering: until then
    /// these sockets may be targets.
    pub(super) fn unreserve(&mut self, id: WorkerId) {
        if let Some(Worker { slot, generation, .. }) = self.roster.get(id) {
            self.actions.push(Action::Unreserve { slot: *slot, generation: *generation });
        }
    }

    pub(super) fn has_ready(&self) -> bool {
        self.roster.workers().any(|(_, worker)| worker.state == State::Ready)
    }

    /// Whether all slots from this one on have a ready worker.
    pub(super) fn are_scaled(&self, from: usize) -> bool {
        self.roster.are_ready(from..self.slots(), self.generation())
    }

    /// The workers that serve in these slots.
    pub(super) fn serving_in(&self, slots: Range<usize>) -> Vec<WorkerId> {
        self.roster.ids(|worker| slots.contains(&worker.slot.index()) && self.roster.serves(worker))
    }

    /// Has the workers of this generation serve in these slots.
    pub(super) fn replace_slots(&mut self, slots: Range<usize>, generation: u32) {
        for slot in slots.map(SlotId::of_index) {
            let replaced = mem::replace(&mut self.roster.slots[slot.index()], Slot::new(generation));
            self.actions.push(Action::Unreserve { slot, generation: replaced.generation });
            self.timers.cancel_slot(slot);
        }
        for id in self.roster.ids(|worker| worker.generation == generation) {
            self.remember_endpoints(id);
        }
    }

    /// Marks workers that get no more connections, before the kernel is told.
    pub(super) fn retire(&mut self, workers: &[WorkerId], now: Instant) {
        for id in workers {
            if self.roster.state(*id) == Some(State::Ready) {
                self.enter(*id, State::Draining, now);
            }
        }
    }

    /// Marks workers that are to be sent the stop signal, each once, and returns those. One whose start has yet to be
    /// carried out is forgotten instead, and isn't started.
    pub(super) fn stop(&mut self, workers: &[WorkerId], now: Instant) -> Vec<WorkerId> {
        let mut stopped = Vec::new();
        for id in workers {
            match self.roster.get(*id) {
                Some(Worker { pid: None, .. }) => drop(self.remove(*id)),
                Some(Worker { state: State::Starting | State::Ready | State::Draining, .. }) => {
                    self.enter(*id, State::Stopping, now);
                    stopped.push(*id);
                }
                _ => {}
            }
        }
        stopped
    }

    /// No slot gets another worker, and nothing waits for one.
    pub(super) fn close_slots(&mut self) {
        self.timers.cancel(Timer::CanaryPeriod);
        for slot in (0..self.slots()).map(SlotId::of_index) {
            let generation = self.roster.slots[slot.index()].generation;
            self.timers.cancel_slot(slot);
            self.actions.push(Action::Unreserve { slot, generation });
        }
    }

    /// Removes all slots from this one on.
    pub(super) fn remove_slots(&mut self, from: usize) {
        let removed = self.roster.slots.split_off(from);
        for (slot, removed) in (from..).map(SlotId::of_index).zip(removed) {
            self.actions.push(Action::Unreserve { slot, generation: removed.generation });
            self.timers.cancel_slot(slot);
            self.endpoints.remove_slot(slot);
        }
    }
}
