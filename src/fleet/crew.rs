//! All slots and workers with their states, timers and endpoints: what is the same for every worker, whichever
//! operation it belongs to.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::endpoints::Endpoints;
use super::events::Action;
use super::gate::{self, Lack};
use super::phase::Phase;
use super::policy::{Policy, Readiness};
use super::roster::Roster;
use super::story;
use super::timers::{SlotTimer, Timer, Timers, WorkerTimer};
use super::udp::{UdpChange, UdpPorts};
use super::views::{self, View};
use super::worker::{SETTLED_AFTER, State, Worker};
use crate::address::{Address, Endpoint};
use crate::ids::{SlotId, WorkerId};
use crate::steering::{Plan, Role, Share};
use crate::words::millis;

/// The time from a failed request to a starting worker to the next one.
const PROBE_PAUSE: Duration = Duration::from_millis(100);
/// The time between two requests to a canary.
const CANARY_PROBE_PAUSE: Duration = Duration::from_secs(1);
/// How many of these in a row a canary may not answer.
const MAX_CANARY_FAILURES: u32 = 2;
/// Clients wait for the next worker of a slot for twice as long as the last one took to be ready, within these limits. Then
/// they are reset, so that they try again.
const QUEUE_WAIT: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(10)];

#[derive(Debug)]
pub struct Crew {
    pub(super) policy: Policy,
    pub(super) roster: Roster,
    pub(super) endpoints: Endpoints,
    udp: UdpPorts,
    pub(super) timers: Timers,
    /// What follows from the event that is being handled.
    pub(super) actions: Vec<Action>,
}

impl Crew {
    pub(super) fn new(policy: Policy, endpoints: Endpoints) -> Self {
        let roster = Roster::new(policy.workers);
        Self {
            policy,
            roster,
            endpoints,
            udp: UdpPorts::default(),
            timers: Timers::default(),
            actions: Vec::new(),
        }
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

    /// The TCP addresses at which connections came to this worker alone that it may still have.
    pub fn addresses_so_far(&self, worker: WorkerId) -> BTreeSet<Address> {
        self.endpoints.addresses_so_far(worker)
    }

    /// All slots and workers, by slot, and in each slot the one that serves first.
    pub fn views(&self) -> Vec<View> {
        views::views(&self.roster)
    }

    /// The workers that have yet to become ready.
    pub fn starting(&self) -> Vec<WorkerId> {
        self.roster.ids(|worker| worker.state == State::Starting)
    }

    /// Whether a retired worker is killed when it has finished its work, since its successor has its sockets.
    pub fn is_killed(&self, worker: WorkerId) -> bool {
        self.roster.get(worker).is_some_and(|worker| worker.is_killed)
    }

    /// How long a worker has been ready, if it starts or serves.
    pub fn ready_for(&self, worker: WorkerId, now: Instant) -> Option<Duration> {
        let is_retired = |worker: &Worker| !matches!(worker.state, State::Starting | State::Ready);
        let worker = self.roster.get(worker).filter(|worker| !is_retired(worker))?;
        Some(worker.ready_at.map_or(Duration::ZERO, |since| now - since))
    }

    pub fn was_ready(&self, worker: WorkerId) -> bool {
        self.roster.get(worker).is_some_and(|worker| worker.ready_at.is_some())
    }

    pub fn state(&self, worker: WorkerId) -> Option<State> {
        self.roster.state(worker)
    }

    /// Whether a worker may yet open what it opens at its start.
    pub fn is_opening(&self, worker: WorkerId, now: Instant) -> bool {
        self.roster
            .get(worker)
            .is_some_and(|worker| worker.state == State::Starting || now < worker.opens_until())
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
        // A worker that isn't ready yet would take connections from the queue that it shares.
        let is_first_start = phase == Phase::Starting;
        let all_wait =
            self.policy.shares_queue && is_first_start && !self.roster.are_ready(0..self.slots(), 1);
        let role = |worker: &Worker| match self.role(worker) {
            Some(Role::Ready) if all_wait => None,
            None if worker.state == State::Ready && canary.is_some() => Some(Role::Canary),
            role => role,
        };
        let roles = self.roster.workers().filter_map(|(id, worker)| Some((id, role(worker)?))).collect();
        let generation = (!phase.is_stopping()).then(|| self.generation());
        Plan { roles, share: canary.unwrap_or_default(), generation }
    }

    /// Who gets new connections when those serve in these slots that wait for their turn, and `newest` is the newest generation.
    pub(super) fn plan_of_switch(&self, slots: &Range<usize>, newest: u32) -> Plan {
        let role = |worker: &Worker| match worker.state {
            State::Ready if !slots.contains(&worker.slot.index()) => self.role(worker),
            State::Ready if self.roster.serves(worker) => Some(Role::Leaving),
            State::Ready => Some(Role::Ready),
            _ => self.role(worker),
        };
        let roles = self.roster.workers().filter_map(|(id, worker)| Some((id, role(worker)?))).collect();
        Plan { roles, share: Share::default(), generation: Some(newest) }
    }

    /// What a worker is to steering if no canary is tried; `None`: it waits for its turn.
    fn role(&self, worker: &Worker) -> Option<Role> {
        match worker.state {
            State::Ready => self.roster.serves(worker).then_some(Role::Ready),
            State::Starting => None,
            State::Draining | State::Stopping | State::Killed => Some(Role::Leaving),
        }
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
        self.udp.remove_worker(id);
        self.roster.remove(id)
    }

    /// Has the worker of a slot start.
    pub(super) fn start(&mut self, slot: SlotId, begins_generation: bool, now: Instant) {
        let generation = self.roster.slots[slot.index()].generation;
        let id = self.start_beside(slot, generation, begins_generation, now);
        self.roster.slots[slot.index()].serving = Some(id);
    }

    /// Has a worker start that may come to serve in a slot.
    pub(super) fn start_beside(
        &mut self,
        slot: SlotId,
        generation: u32,
        begins_generation: bool,
        now: Instant,
    ) -> WorkerId {
        let worker = self.roster.add(slot, generation, now);
        let shares_queue = begins_generation && self.policy.shares_queue;
        self.actions.push(Action::Start { worker, slot, generation, shares_queue });
        worker
    }

    pub(super) fn allow_other_ports(&mut self, id: WorkerId, may_change: bool) {
        if let Some(worker) = self.roster.get_mut(id) {
            worker.ports_may_change = may_change;
        }
    }

    pub(super) fn started(&mut self, id: WorkerId, pid: i32, now: Instant) {
        if let Some(worker) = self.roster.get_mut(id) {
            worker.pid = Some(pid);
            self.endpoints.add_worker(id);
            self.enter(id, State::Starting, now);
            self.begin_probes(id);
        }
    }

    /// A worker has called listen(2). Returns the workers that may be ready by that.
    pub(super) fn listens(&mut self, id: WorkerId, endpoint: Endpoint, now: Instant) -> Vec<WorkerId> {
        let became_public = self.endpoints.add(id, endpoint.clone(), self.slots());
        if !self.is_starting(id) {
            return Vec::new();
        }
        if let Some(worker) = self.roster.get_mut(id) {
            worker.shown.listens_since.get_or_insert(now);
        }
        self.timers.set_if_unset(Timer::Worker(id, WorkerTimer::Settled), now + SETTLED_AFTER);
        let concerned = if became_public { self.starting() } else { vec![id] };
        concerned.iter().for_each(|id| self.begin_probes(*id));
        concerned
    }

    /// Has requests sent to a worker that starts, if it listens where it may be sent some. A private Unix socket is only used
    /// until there is something better.
    pub(super) fn begin_probes(&mut self, id: WorkerId) {
        let Readiness::Answers { port } = self.policy.readiness else { return };
        let Some(worker) = self.roster.get(id).filter(|worker| worker.state == State::Starting) else {
            return;
        };
        let is_alone = worker.shown.has_settled && self.slots() == 1;
        let found = self.endpoints.probed_at(id, port, is_alone);
        let keeps = worker.shown.probed_at.as_ref().is_some_and(|now| {
            Some(now) == found || self.endpoints.has(id, now) && self.endpoints.is_public(now)
        });
        if keeps {
            return;
        }
        let found = found.cloned();
        if let Some(worker) = self.roster.get_mut(id) {
            (worker.shown.probed_at, worker.shown.has_answered) = (found, false);
        }
        self.probe(id);
    }

    /// Has a request sent to a worker that starts or is tried, where it listens.
    pub(super) fn probe(&mut self, id: WorkerId) {
        let is_due = |worker: &&Worker| match worker.state {
            State::Starting => true,
            State::Ready => !self.roster.serves(worker),
            State::Draining | State::Stopping | State::Killed => false,
        };
        let worker = self.roster.get(id).filter(is_due);
        let endpoint = worker.and_then(|worker| worker.shown.probed_at.clone());
        self.actions.extend(endpoint.map(|endpoint| Action::Probe { worker: id, endpoint }));
    }

    /// A worker that starts was sent a request. Returns whether it has answered.
    pub(super) fn probed(&mut self, id: WorkerId, outcome: Result<(), String>, now: Instant) -> bool {
        let Some(Worker { shown, .. }) = self.roster.get_mut(id) else { return false };
        let Err(why) = outcome else {
            shown.has_answered = true;
            return true;
        };
        shown.last_failure = Some(why);
        self.timers.set(Timer::Worker(id, WorkerTimer::Probe), now + PROBE_PAUSE);
        false
    }

    /// Has requests sent to the workers of a generation that is tried.
    pub(super) fn probe_canaries(&mut self, generation: u32, now: Instant) {
        if matches!(self.policy.readiness, Readiness::Answers { .. }) {
            for id in self.roster.ids(|worker| worker.generation == generation) {
                self.timers.set(Timer::Worker(id, WorkerTimer::Probe), now + CANARY_PROBE_PAUSE);
            }
        }
    }

    /// A ready worker that is tried was sent a request. Returns what it did instead of an answer if that is enough.
    pub(super) fn canary_probed(
        &mut self,
        id: WorkerId,
        outcome: Result<(), String>,
        now: Instant,
    ) -> Option<String> {
        let is_tried = |worker: &Worker| worker.state == State::Ready && !self.roster.serves(worker);
        self.roster.get(id).filter(|worker| is_tried(worker))?;
        self.timers.set(Timer::Worker(id, WorkerTimer::Probe), now + CANARY_PROBE_PAUSE);
        let worker = self.roster.get_mut(id)?;
        worker.shown.failures = if outcome.is_ok() { 0 } else { worker.shown.failures + 1 };
        let why = outcome.err().filter(|_| worker.shown.failures >= MAX_CANARY_FAILURES)?;
        Some(format!("{worker} {why}, {MAX_CANARY_FAILURES} times in a row"))
    }

    /// What keeps a worker that starts from being ready.
    pub(super) fn lack(&self, id: WorkerId, now: Instant) -> Option<Lack> {
        let worker = self.roster.get(id)?;
        let lack = gate::lack(id, worker, &self.policy, &self.endpoints, self.slots(), now);
        lack.or_else(|| self.lacks_udp(id, worker, now)).or_else(|| self.lacks_proof(id, worker, now))
    }

    /// Whether a worker that replaces another one may yet end at once.
    fn lacks_proof(&self, id: WorkerId, worker: &Worker, now: Instant) -> Option<Lack> {
        let until = worker.begun_to_listen() + self.policy.proof;
        (now < until && self.replaced_by(id, worker).is_some()).then_some(Lack::Moment { until })
    }

    /// The worker that serves where this one will.
    fn replaced_by(&self, id: WorkerId, worker: &Worker) -> Option<WorkerId> {
        let slot = worker.slot.index();
        self.serving_in(slot..slot + 1).into_iter().find(|other| *other != id)
    }

    /// Which UDP ports of the worker that it replaces keep a worker from being ready.
    fn lacks_udp(&self, id: WorkerId, worker: &Worker, now: Instant) -> Option<Lack> {
        if worker.ports_may_change || self.udp.is_empty() {
            return None;
        }
        let replaced = self.replaced_by(id, worker)?;
        let refused = self.udp.refused(id, replaced);
        if !refused.is_empty() {
            return Some(Lack::UdpPorts(refused));
        }
        let asked = self.udp.last_unasked(id, replaced)?;
        let since = self.roster.get(replaced)?.begun_to_listen();
        gate::moment(worker, asked.saturating_duration_since(since), now)
    }

    /// What a worker opens long after its first listener is not asked of its replacement.
    pub(super) fn udp_changed(&mut self, id: WorkerId, address: Address, change: UdpChange, now: Instant) {
        if change == UdpChange::Closed || self.is_opening(id, now) {
            self.udp.change(id, address, change, now);
        }
    }

    /// Whether a worker that starts is ready by now. If it may only be about to listen elsewhere, that has an end.
    pub(super) fn passes(&mut self, id: WorkerId, now: Instant) -> bool {
        let lack = self.lack(id, now);
        if let Some(Lack::Moment { until }) = lack {
            self.timers.set(Timer::Worker(id, WorkerTimer::Moment), until);
        }
        self.is_starting(id) && lack.is_none()
    }

    pub(super) fn fire_for_slot(&mut self, slot: SlotId, timer: SlotTimer, now: Instant) {
        let Some(generation) = self.roster.slots.get(slot.index()).map(|slot| slot.generation) else {
            return;
        };
        match timer {
            SlotTimer::Restart => self.start(slot, false, now),
            SlotTimer::ResetQueue => self.actions.push(Action::ResetQueue { slot, generation }),
            SlotTimer::Recycle => {} // it may be tried again
        }
    }

    pub(super) fn log_generation_ready(&mut self, generation: u32, since: Instant, now: Instant) {
        self.info(story::generation_ready(generation, now - since, &self.roster, &self.endpoints));
    }

    /// Has the next worker start in the slot of one that has ended with this status, at once or later.
    pub(super) fn restart(&mut self, ended: &Worker, status: u8, now: Instant) {
        let was_ready_for = ended.ready_at.map(|ready_at| now - ready_at);
        let delay = self.roster.slots[ended.slot.index()].restart(was_ready_for, status);
        self.endpoints.forget_later(ended.slot);
        self.timers.set(Timer::Slot(ended.slot, SlotTimer::Restart), now + delay);
        self.wait_for_next(ended, now);
    }

    /// Has clients wait for the next worker of a slot, for a while.
    fn wait_for_next(&mut self, ended: &Worker, now: Instant) {
        let start_took = ended.ready_at.map_or(Duration::ZERO, |ready_at| ready_at - ended.started);
        let wait = (start_took * 2).clamp(QUEUE_WAIT[0], QUEUE_WAIT[1]);
        self.timers.set_if_unset(Timer::Slot(ended.slot, SlotTimer::ResetQueue), now + wait);
    }

    /// The workers of these slots are ready: where they listen now, their replacements have to.
    pub(super) fn require_endpoints(&mut self, slots: Range<usize>) {
        for id in self.serving_in(slots) {
            if let Some(slot) = self.slot_served_by(id) {
                self.endpoints.require(id, slot);
            }
        }
    }

    /// A restarted worker is ready: where it listens now, its replacement has to as well.
    pub(super) fn require_too(&mut self, id: WorkerId) {
        if let Some(slot) = self.slot_served_by(id) {
            self.endpoints.require_too(id, slot);
        }
    }

    /// A ready worker that serves has called listen(2). What follows its first listener closely belongs to that: which of
    /// several workers is ready last doesn't decide what is required.
    pub(super) fn add_later(&mut self, id: WorkerId, endpoint: Endpoint, now: Instant) {
        let since = self.roster.get(id).and_then(|worker| worker.shown.listens_since.or(worker.ready_at));
        if let (Some(slot), Some(since)) = (self.slot_served_by(id), since) {
            if now - since < SETTLED_AFTER {
                self.endpoints.require_too(id, slot);
            } else {
                self.endpoints.add_later(slot, endpoint, now - since);
            }
        }
    }

    /// The ready worker that serves in a slot.
    pub(super) fn ready_in(&self, slot: SlotId) -> Option<WorkerId> {
        let serving = self.roster.slots.get(slot.index())?.serving?;
        (self.roster.state(serving) == Some(State::Ready)).then_some(serving)
    }

    /// The slot in which a ready worker serves.
    pub(super) fn slot_served_by(&self, id: WorkerId) -> Option<SlotId> {
        let worker = self.roster.get(id).filter(|worker| worker.state == State::Ready);
        worker.filter(|worker| self.roster.serves(worker)).map(|worker| worker.slot)
    }

    /// Puts a worker that starts into the state Ready. Returns its generation, and whether it serves.
    pub(super) fn ready(&mut self, id: WorkerId, now: Instant) -> Option<(u32, bool)> {
        if !self.is_starting(id) {
            return None; // the readiness of another may have stopped it
        }
        self.enter(id, State::Ready, now);
        let worker = self.roster.get(id)?;
        let (slot, generation, serves) = (worker.slot, worker.generation, self.roster.serves(worker));
        let line = format!("{worker} is ready after {}", millis(now - worker.started));
        self.log(log::Level::Debug, line);
        if serves {
            self.timers.cancel(Timer::Slot(slot, SlotTimer::ResetQueue));
            self.begin_to_age(id, now);
        }
        Some((generation, serves))
    }

    /// A worker became ready later than the others, and the kernel was told.
    pub(super) fn log_ready(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.roster.get(id) else { return };
        let is_new = self.roster.slots[worker.slot.index()].restarts == 0;
        let what = if is_new { "a new one" } else { "a replacement" };
        self.info(format!("{worker} is ready, {what}, after {}", millis(now - worker.started)));
    }

    /// A ready worker serves from now on.
    fn begin_to_age(&mut self, id: WorkerId, now: Instant) {
        if let Some(age) = self.roster.get(id).and_then(|worker| self.policy.age_limit(worker.slot)) {
            self.timers.set(Timer::Worker(id, WorkerTimer::MaxAge), now + age);
        }
    }

    /// A worker that serves has ended, and this one, which has started already, takes its place.
    pub(super) fn promote(&mut self, ended: &Worker, successor: WorkerId, now: Instant) {
        let slot = &mut self.roster.slots[ended.slot.index()];
        (slot.serving, slot.restarts) = (Some(successor), slot.restarts + 1);
        self.endpoints.forget_later(ended.slot);
        self.wait_for_next(ended, now);
    }

    pub(super) fn let_kill(&mut self, id: WorkerId, is_killed: bool) {
        if let Some(worker) = self.roster.get_mut(id) {
            worker.is_killed = is_killed;
        }
    }

    /// Whether a worker's process was started.
    pub(super) fn has_process(&self, id: WorkerId) -> bool {
        self.roster.get(id).is_some_and(|worker| worker.pid.is_some())
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
        let serving = self.roster.slots.get(slots).into_iter().flatten().filter_map(|slot| slot.serving);
        serving.filter(|id| self.roster.get(*id).is_some()).collect()
    }

    /// Has the ready workers that wait for their turn serve in these slots.
    pub(super) fn replace_slots(&mut self, slots: Range<usize>, now: Instant) {
        let waits = |worker: &Worker| worker.state == State::Ready && !self.roster.serves(worker);
        for id in self.roster.ids(|worker| slots.contains(&worker.slot.index()) && waits(worker)) {
            let Some(Worker { slot, generation, .. }) = self.roster.get(id) else { continue };
            let (slot, generation) = (*slot, *generation);
            let replaced = &mut self.roster.slots[slot.index()];
            self.actions.push(Action::Unreserve { slot, generation: replaced.generation });
            replaced.replace(generation, id);
            self.timers.cancel_slot(slot);
            self.begin_to_age(id, now);
        }
        self.require_endpoints(slots);
    }

    /// Marks workers that get no more connections, before the kernel is told.
    pub(super) fn retire(&mut self, workers: &[WorkerId], now: Instant) {
        for id in workers {
            if self.roster.state(*id) == Some(State::Ready) {
                self.enter(*id, State::Draining, now);
            }
        }
    }

    /// At a stop there is one time for all.
    pub(super) fn cancel_drain_timeouts(&mut self) {
        for id in self.roster.ids(|worker| worker.state == State::Draining) {
            self.timers.cancel(Timer::Worker(id, WorkerTimer::DrainTimeout));
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
