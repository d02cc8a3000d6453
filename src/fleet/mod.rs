//! Decides what to do with the workers. Pure: [`Fleet::handle`] takes an event and the time, and returns the actions
//! that follow, in their order; it makes no system call.
//!
//! A slot holds one worker that serves. A reload starts a second worker beside it, of the next generation, in every
//! slot or in one batch of slots after the other. When all of these are ready they become the ones that serve, and the
//! others are retired: they drain and stop. Scaling adds slots, or retires the workers of the last ones; a stop retires
//! all.

mod crew;
mod endpoints;
mod events;
mod gate;
mod phase;
pub mod policy;
mod queue;
mod recycle;
mod reload;
mod roster;
mod scale;
mod slot;
mod stop;
mod story;
mod timers;
mod udp;
mod views;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::time::Instant;

pub use self::crew::Crew;
pub use self::endpoints::Endpoints;
pub use self::events::{
    Accepted, Action, Announcement, Command, CommandId, End, Event, Refusal, ReloadOptions, Sickness, Ticket,
};
use self::gate::Lack;
use self::phase::{Phase, Recycling, Reload, Step};
pub use self::policy::{Policy, Readiness, Rollout, Target};
use self::queue::Queue;
use self::slot::{Failures, Slot};
use self::timers::{Timer, WorkerTimer};
pub use self::udp::UdpChange;
pub use self::views::{Activity, LastReload, View};
pub use self::worker::State;
use self::worker::{Shown, Worker};
use crate::address::Endpoint;
use crate::ids::{SlotId, WorkerId};
use crate::words::millis;

/// Of an operation: why it failed.
type Outcome = Result<(), String>;

/// See the module's comment.
#[derive(Debug)]
pub struct Fleet {
    crew: Crew,
    phase: Phase,
    queue: Queue,
    /// The newest generation that was begun, from 1.
    newest: u32,
    begun: Instant,
    last_reload: Option<LastReload>,
    failures: Failures,
    /// The workers that should be replaced without a command.
    sick: BTreeMap<WorkerId, Sickness>,
    /// The workers that serve and hang.
    hung: BTreeSet<WorkerId>,
}

impl Fleet {
    /// A fleet that has yet to start, and the actions that start it.
    pub fn new(policy: Policy, endpoints: Endpoints, now: Instant) -> (Self, Vec<Action>) {
        let mut fleet = Self {
            crew: Crew::new(policy, endpoints),
            phase: Phase::Starting,
            queue: Queue::default(),
            newest: 1,
            begun: now,
            last_reload: None,
            failures: Failures::default(),
            sick: BTreeMap::new(),
            hung: BTreeSet::new(),
        };
        for slot in (0..fleet.crew.policy.workers).map(SlotId) {
            fleet.crew.start(slot, true, now);
        }
        let actions = mem::take(&mut fleet.crew.actions);
        (fleet, actions)
    }

    /// What follows from `event`.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Started { worker, pid } => self.crew.started(worker, pid, now),
            Event::StartFailed { worker, why, status } => self.start_failed(worker, &why, status, now),
            Event::Listens { worker, endpoint } => self.listens(worker, endpoint, now),
            Event::StoppedListening { worker, endpoint } => self.stopped_listening(worker, &endpoint, now),
            Event::Udp { worker, address, change } => {
                self.crew.udp_changed(worker, address, change, now);
                self.check(&self.crew.starting(), now);
            }
            Event::SaysReady { worker } => self.shows(worker, now, |shown| shown.says_ready = true),
            Event::Probed { worker, outcome } => self.probed(worker, outcome, now),
            Event::Switched { outcome } => self.switched(outcome, now),
            Event::SteerFailed { why } => self.steer_failed(&why, now),
            Event::Drained { worker } if self.crew.roster.state(worker) == Some(State::Draining) => {
                self.drained(worker, now);
            }
            Event::Drained { .. } => {} // stopped meanwhile
            Event::WentIntoBackground { worker, pid, instead } => {
                self.went_into_background(worker, pid, &instead, now);
            }
            Event::Sick { worker, sickness } => self.sick(worker, sickness, now),
            Event::Hangs { worker } => self.hangs(worker),
            Event::Recovered { worker } => self.recovered(worker),
            Event::Ended { worker, end } => self.ended(worker, end, now),
            Event::StopSignal { signal } => self.stop_signal(signal, now),
            Event::Tick => self.fire_due(now, |_| true),
        }
        self.take_actions(now)
    }

    /// Accepts a command or refuses it, and returns what follows from it.
    pub fn command(&mut self, command: Command, now: Instant) -> (Result<Accepted, Refusal>, Vec<Action>) {
        if self.phase.is_stopping() && command != Command::Stop {
            return (Err(Refusal::Stopping), Vec::new());
        }
        let ticket = match command {
            Command::Reload(ReloadOptions { rollout: Some(Rollout::Batches(_)), .. })
                if self.crew.policy.shares_queue =>
            {
                let why = "a generation with one queue (--balance queue) is replaced as a whole";
                Err(Refusal::Limit(why.to_owned()))
            }
            Command::Reload(options) => {
                self.put_recycling_off(now);
                self.queue.push_reload(options, self.crew.policy.rollout)
            }
            Command::Scale(target) => self.queue_scaling(target),
            Command::Recycle(ref slots) => self.queue_recycling(slots.clone()),
            Command::Abort => {
                let aborted = self.abort(now).map(|()| Accepted::Aborted);
                return (aborted, self.take_actions(now));
            }
            Command::Stop => {
                let accepted = match self.phase {
                    Phase::Stopping { ticket, .. } => Accepted::Joined(ticket),
                    _ => Accepted::Begun(self.begin_stop("stop", None, now)),
                };
                return (Ok(accepted), self.take_actions(now));
            }
        };
        if ticket.is_ok() && self.phase != Phase::Serving {
            self.crew.info(story::queued(&command, self.queue.workers(), self.phase));
        }
        let actions = self.take_actions(now);
        let has_begun = |ticket| self.phase.ticket() == Some(ticket) || !self.queue.has(ticket);
        let accepted = |ticket| match has_begun(ticket) {
            true => Accepted::Begun(ticket),
            false => Accepted::Queued(ticket),
        };
        (ticket.map(accepted), actions)
    }

    pub fn policy(&self) -> &Policy {
        &self.crew.policy
    }

    pub fn last_reload(&self) -> Option<&LastReload> {
        self.last_reload.as_ref()
    }

    /// When to call [`Fleet::handle`] with [`Event::Tick`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.crew.timers.next()
    }

    /// The stop's ticket, from its beginning on. What has another ticket then ends with it, undone.
    pub fn stop_ticket(&self) -> Option<Ticket> {
        self.phase.ticket().filter(|_| self.phase.is_stopping())
    }

    /// What there is, to read.
    pub fn crew(&self) -> &Crew {
        &self.crew
    }

    pub fn activity(&self) -> Activity {
        self.phase.into()
    }

    /// Does what is due by now, and begins what was waiting for that.
    fn take_actions(&mut self, now: Instant) -> Vec<Action> {
        self.fire_due(now, |timer| matches!(timer, Timer::Slot(..)));
        self.settle(now);
        mem::take(&mut self.crew.actions)
    }

    /// A tick fires all timers, other events only those of slots: a worker isn't late because the loop is.
    fn fire_due(&mut self, now: Instant, which: impl Fn(&Timer) -> bool) {
        while let Some(timer) = self.crew.timers.pop_due(now, &which) {
            self.fire(timer, now);
        }
    }

    fn listens(&mut self, id: WorkerId, endpoint: Endpoint, now: Instant) {
        let may_be_ready = self.crew.listens(id, endpoint.clone(), now);
        self.crew.add_later(id, endpoint, now);
        if self.crew.roster.state(id) == Some(State::Ready) {
            self.steer_to(id, now);
        }
        self.check(&may_be_ready, now);
    }

    fn stopped_listening(&mut self, id: WorkerId, endpoint: &Endpoint, now: Instant) {
        self.crew.endpoints.remove(id, endpoint);
        self.crew.begin_probes(id);
        if let Some(worker @ Worker { state: State::Ready, slot, .. }) = self.crew.roster.get(id) {
            let why = format!("{worker} has stopped listening on {endpoint}");
            let (slot, serves) = (*slot, self.crew.roster.serves(worker));
            let is_lacking = !worker.ports_may_change && !self.crew.endpoints.missing(id, slot).is_empty();
            if self.crew.endpoints.is_public(endpoint) {
                self.crew.warn(why.clone());
            }
            if serves {
                self.crew.endpoints.waive(slot, endpoint);
                self.check(&self.crew.starting(), now);
            } else if self.phase.canary().is_some() && is_lacking {
                self.abandon(&why, Some(id), now);
            }
        }
        self.steer();
    }

    /// A worker has said or shown something of its readiness.
    fn shows(&mut self, id: WorkerId, now: Instant, note: impl FnOnce(&mut Shown)) {
        if let Some(worker) = self.crew.roster.get_mut(id) {
            note(&mut worker.shown);
        }
        self.check(&[id], now);
    }

    /// Those of these workers that start and lack nothing are ready.
    fn check(&mut self, workers: &[WorkerId], now: Instant) {
        for id in workers {
            if self.crew.passes(*id, now) {
                self.ready(*id, now);
            }
        }
    }

    /// A request was sent to a worker that starts, or to a canary.
    fn probed(&mut self, id: WorkerId, outcome: Result<(), String>, now: Instant) {
        if self.crew.is_starting(id) {
            if self.crew.probed(id, outcome, now) {
                self.check(&[id], now);
            }
        } else if self.phase.canary().is_some()
            && let Some(why) = self.crew.canary_probed(id, outcome, now)
        {
            self.abandon(&why, Some(id), now);
        }
    }

    fn ready(&mut self, id: WorkerId, now: Instant) {
        let is_first_start = self.phase == Phase::Starting;
        let Some((generation, serves)) = self.crew.ready(id, now) else { return };
        if serves {
            self.failures.clear();
            self.steer_to(id, now);
            if !is_first_start {
                self.crew.log_ready(id, now);
                self.crew.unreserve(id);
                self.crew.require_too(id);
            }
        }
        let slots = self.crew.slots();
        match self.phase {
            Phase::Starting if self.crew.roster.are_ready(0..slots, generation) => {
                self.crew.require_endpoints(0..slots);
                self.crew.log_generation_ready(generation, self.begun, now);
                self.serve();
            }
            Phase::Replacing { reload, from }
                if self.crew.roster.are_ready(reload.filled(from, slots), self.newest) =>
            {
                self.crew.log_generation_ready(generation, reload.since, now);
                self.replaced(reload, from, now);
            }
            Phase::Recycling(recycling @ Recycling { step: Step::Starts, successor, .. })
                if successor == id =>
            {
                self.switch_to_successor(recycling);
            }
            _ => {}
        }
    }

    /// While the kernel is asked to switch, that holds: [`Event::Switched`] steers.
    fn steer(&mut self) {
        self.crew.timers.cancel(Timer::Steer);
        if self.phase.is_switching() {
            return;
        }
        let plan = self.crew.plan(self.phase);
        self.crew.actions.push(Action::Steer(plan));
    }

    /// Steers to a ready worker: at once, unless it is one of many of the first start.
    fn steer_to(&mut self, id: WorkerId, now: Instant) {
        if self.phase == Phase::Starting && self.may_wait(id) {
            self.crew.timers.set_if_unset(Timer::Steer, now + policy::STEER_WITHIN);
        } else {
            self.steer();
        }
    }

    /// Whether others get connections wherever this worker listens, and some worker has yet to be ready.
    fn may_wait(&self, id: WorkerId) -> bool {
        let others = self.crew.roster.ids(|worker| worker.state == State::Ready && worker.id != id);
        !others.is_empty()
            && self.crew.endpoints.are_shared(id, &others)
            && !self.crew.roster.are_ready(0..self.crew.slots(), self.crew.generation())
    }

    /// Has retired workers end when they have finished their work, after the kernel was told.
    fn end_retired(&mut self, workers: &[WorkerId], now: Instant) {
        let in_state = |crew: &Crew, state| -> Vec<WorkerId> {
            workers.iter().copied().filter(|id| crew.roster.state(*id) == Some(state)).collect()
        };
        for worker in in_state(&self.crew, State::Draining) {
            let addresses = self.crew.endpoints.addresses_so_far(worker);
            self.crew.actions.push(Action::Drain { worker, addresses });
        }
        let restarts = in_state(&self.crew, State::Starting); // they have no work
        self.stop(&restarts, now);
    }

    /// A retired worker has finished its work, or has had its time for that.
    fn drained(&mut self, id: WorkerId, now: Instant) {
        if self.crew.is_killed(id) && !self.phase.is_stopping() {
            let name = self.crew.roster.name(id);
            self.crew.info(format!("{name} hung, and is killed, since its successor has its sockets"));
            self.kill(id, now);
        } else {
            self.stop(&[id], now);
        }
    }

    /// Sends workers the stop signal, each once. To steering, those that drain have left already.
    fn stop(&mut self, workers: &[WorkerId], now: Instant) {
        let drains = |id: &WorkerId| self.crew.roster.state(*id) == Some(State::Draining);
        let are_retired = workers.iter().all(drains);
        let stopped = self.crew.stop(workers, now);
        if !stopped.is_empty() && !are_retired {
            self.steer(); // before the signal: they may shut their listeners down
        }
        self.crew.actions.extend(stopped.into_iter().map(|worker| Action::Signal { worker }));
    }

    fn kill(&mut self, id: WorkerId, now: Instant) {
        self.crew.enter(id, State::Killed, now);
        self.crew.actions.push(Action::Kill { worker: id });
        if let Phase::Stopping { status: status @ 0, .. } = &mut self.phase {
            *status = 1;
        }
    }

    fn start_failed(&mut self, id: WorkerId, why: &str, status: u8, now: Instant) {
        if let Some(worker) = self.crew.remove(id) {
            let what = format!("{worker} can't be started: {why}");
            self.lost(id, &worker, what, status, now);
        }
    }

    /// The main process of a worker has ended, and what it left goes on. What the whole generation does at once isn't tried
    /// again.
    fn went_into_background(&mut self, id: WorkerId, pid: i32, instead: &str, now: Instant) {
        let Some(worker) = self.crew.roster.get_mut(id) else { return };
        let what = format!("{worker} went into the background; run it in the foreground{instead}");
        worker.pid = Some(pid);
        let slot = worker.slot;
        let Some(worker) = self.crew.roster.get(id) else { return };
        let is_rolling = self.phase.is_rolling(self.crew.slots());
        let at_once = worker.ready_at.is_none_or(|since| now - since < policy::AT_ONCE);
        let is_other = |slot: &Slot| slot.restarts > 0 || slot.is_recycled;
        let is_restarted = self.crew.roster.slots.get(slot.index()).is_none_or(is_other);
        if self.is_on_trial(worker) {
            self.abandon(&what, Some(id), now);
        } else if is_restarted || !at_once {
            self.crew.warn(what);
        } else if is_rolling {
            self.abandon(&what, Some(id), now);
        } else {
            self.give_up(&what, 1, now);
        }
        self.stop(&[id], now);
    }

    fn ended(&mut self, id: WorkerId, end: End, now: Instant) {
        let Some(worker) = self.crew.remove(id) else { return };
        let when = match worker.state {
            State::Draining => " while it drained",
            _ if worker.ready_at.is_none() => " before it was ready",
            _ => "",
        };
        self.lost(id, &worker, format!("{worker} {end}{when}"), end.status(), now);
    }

    /// A worker is no more: `what` happened.
    fn lost(&mut self, id: WorkerId, worker: &Worker, what: String, status: u8, now: Instant) {
        let is_on_trial = self.is_on_trial(worker);
        let successor = self.crew.roster.serves(worker)
            && !is_on_trial
            && match self.phase {
                Phase::Starting => worker.ready_at.is_some(),
                phase => !phase.is_stopping(),
            };
        self.crew.actions.push(Action::Release { worker: id, successor });
        if is_on_trial {
            self.abandon(&what, Some(id), now);
        } else if self.phase == Phase::Starting && !successor {
            self.give_up(&what, status.max(1), now); // a server that ends has failed, whatever its status
        } else if successor {
            let is_new = worker.generation == self.newest && self.phase.is_rolling(self.crew.slots());
            if worker.ready_at.is_none() {
                self.failures.add(status);
            }
            if !self.succeeds(worker, now) {
                self.crew.restart(worker, status, now);
            }
            self.steer();
            if is_new { self.abandon(&what, Some(id), now) } else { self.crew.warn(what) }
        } else {
            let is_expected = matches!(worker.state, State::Stopping | State::Killed);
            self.crew.log(if is_expected { log::Level::Debug } else { log::Level::Warn }, what);
        }
    }

    /// Whether the reload, or the scaling, fails if this worker does.
    fn is_on_trial(&self, worker: &Worker) -> bool {
        self.phase.is_on_trial(worker, self.crew.roster.serves(worker), self.newest)
    }

    /// Ends what has nothing left to wait for, and begins what is queued.
    fn settle(&mut self, now: Instant) {
        let slots = self.crew.slots();
        match self.phase {
            Phase::Retiring { reload, next } if !self.crew.roster.has_others() && next < slots => {
                self.start_batch(reload, next, now);
            }
            Phase::Retiring { reload, .. } if !self.crew.roster.has_others() => {
                let (generation, took) = (self.crew.generation(), millis(now - reload.since));
                let name = reload.name();
                self.crew.info(format!("{name} done after {took}: generation {generation} serves alone"));
                self.serve();
                self.end_reload(reload, Ok(()), None, now);
            }
            Phase::Recycling(recycling @ Recycling { step: Step::Retires, .. })
                if !self.crew.roster.has_others() =>
            {
                self.recycled(recycling, now);
            }
            Phase::Abandoning if !self.crew.roster.has_others() => self.serve(),
            Phase::Scaling { from, ticket }
                if !self.crew.roster.has_others() && self.crew.are_scaled(from) =>
            {
                self.crew.require_endpoints(from..slots);
                self.crew.info(format!("scaling done: {}", story::composition(&self.crew.roster.slots)));
                self.serve();
                self.end_operation(ticket, "scaling", Ok(()), None);
            }
            Phase::Stopping { status, .. } if self.crew.roster.len() == 0 => {
                self.crew.actions.push(Action::Exit { status });
            }
            _ => {}
        }
        if self.phase == Phase::Serving {
            self.begin_next(now);
        }
    }

    fn serve(&mut self) {
        self.phase = Phase::Serving;
        let status = self.crew.who_serves();
        self.crew.actions.push(Action::Announce(Announcement::Ready { status }));
    }

    fn begin_next(&mut self, now: Instant) {
        if let Some((workers, ticket)) = self.queue.take_scaling() {
            self.scale(workers as usize, ticket, now);
            self.settle(now); // there may be nothing to wait for
        } else if let Some((options, ticket)) = self.queue.take_reload() {
            let rollout = options.rollout.unwrap_or(self.crew.policy.rollout);
            let ports_may_change = options.ports_may_change;
            let reload = Reload { rollout, since: now, ticket, ports_may_change, shrinks_to: None };
            self.reload(reload, options.command, now);
        } else if self.failures.are_too_many(self.crew.policy.max_failures) && !self.crew.has_ready() {
            self.give_up(&self.failures.to_string(), self.failures.last_status, now);
            self.settle(now);
        } else {
            self.recycle_next(now);
        }
    }

    fn end_operation(&mut self, ticket: Ticket, what: &str, result: Outcome, culprit: Option<WorkerId>) {
        let serving = self.crew.who_serves();
        let outcome = match result {
            Ok(()) => Ok(serving),
            Err(why) => Err(format!("the {what} failed: {why}; {serving} on")),
        };
        self.crew.actions.push(Action::Ended { ticket, outcome, culprit });
    }

    /// A timer is due.
    fn fire(&mut self, timer: Timer, now: Instant) {
        match timer {
            Timer::Steer => self.steer(),
            Timer::CanaryPeriod => {
                if let Phase::Canary { .. } = self.phase {
                    self.switch(0);
                }
            }
            Timer::StopDrain => self.stop_drain_over(now),
            Timer::StopEnd => self.stop_over(now),
            Timer::Worker(id, timer) => self.fire_for_worker(id, timer, now),
            Timer::Slot(slot, timer) => self.crew.fire_for_slot(slot, timer, now),
        }
    }

    fn fire_for_worker(&mut self, id: WorkerId, timer: WorkerTimer, now: Instant) {
        let name = self.crew.roster.name(id);
        match timer {
            WorkerTimer::AliveLongEnough => self.shows(id, now, |shown| shown.is_old_enough = true),
            WorkerTimer::Settled => self.settled(id, now),
            WorkerTimer::Moment => self.check(&[id], now),
            WorkerTimer::Probe => self.crew.probe(id),
            WorkerTimer::ReadyTimeout => self.late(id, now),
            WorkerTimer::MaxAge => self.sick(id, Sickness::Old, now),
            WorkerTimer::DrainTimeout => {
                self.crew.info(story::not_idle(&name, &self.crew.policy));
                self.drained(id, now);
            }
            WorkerTimer::ForwardGrace => self.crew.actions.push(Action::SignalBehind { worker: id }),
            WorkerTimer::StopTimeout => {
                self.crew.warn(story::not_stopped(&name, &self.crew.policy));
                self.kill(id, now);
            }
            WorkerTimer::KillGrace => {
                self.crew.warn(story::not_killed(&name));
                self.ended(id, End::Killed(libc::SIGKILL), now);
            }
        }
    }

    /// A worker has listened for a while and isn't ready.
    fn settled(&mut self, id: WorkerId, now: Instant) {
        self.shows(id, now, |shown| shown.has_settled = true);
        self.crew.begin_probes(id);
        if let (Some(Lack::Endpoints(missing)), Some(worker)) =
            (self.crew.lack(id, now), self.crew.roster.get(id))
        {
            let line = story::waits(worker, missing);
            self.crew.info(line);
        }
    }

    /// A worker was not ready in time.
    fn late(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.crew.roster.get(id) else { return };
        let lack = self.crew.lack(id, now);
        if let Some(Lack::Moment { .. }) = lack {
            self.ready(id, now); // it need not do what is waited for
            return;
        }
        let why = gate::describe(lack, worker, &self.crew.policy);
        self.crew.actions.push(Action::Explain { worker: id });
        if self.phase == Phase::Starting {
            self.give_up(&why, 1, now);
        } else if self.is_on_trial(worker) {
            self.abandon(&why, Some(id), now);
        } else {
            self.crew.warn(format!("{why}; starting another"));
            self.stop(&[id], now);
        }
    }
}

#[cfg(test)]
mod tests;
