//! The recycling: beside the worker of one slot another one of the same generation starts, and takes its place when it is
//! ready. Until then, and if it fails, the worker serves on.

use std::collections::BTreeSet;
use std::time::Instant;

use humantime::format_duration;

use super::events::{Action, Refusal, Ticket};
use super::phase::{Phase, Recycling, Reload, Step};
use super::slot::{MAX_REST, SOON, Slot};
use super::timers::{SlotTimer, Timer};
use super::worker::{State, Worker};
use super::{Fleet, ReloadOptions, Rollout, Sickness};
use crate::ids::{SlotId, WorkerId};
use crate::words::millis;

impl Fleet {
    /// Accepts that the workers of these slots are replaced, or of all slots if there are none.
    pub(super) fn queue_recycling(&mut self, mut slots: BTreeSet<SlotId>) -> Result<Ticket, Refusal> {
        let there = self.crew.slots();
        if let Some(slot) = slots.iter().find(|slot| slot.index() >= there) {
            return Err(Refusal::Limit(format!("there is no slot {slot}: the last one is {}", there - 1)));
        }
        if slots.is_empty() {
            slots = (0..there).map(SlotId::of_index).collect();
        }
        Ok(self.queue.push_recycling(slots))
    }

    /// A worker should be replaced.
    pub(super) fn sick(&mut self, id: WorkerId, sickness: Sickness, now: Instant) {
        if matches!(sickness, Sickness::Memory(_)) && !self.outgrows(id, sickness, now) {
            return;
        }
        if self.crew.slot_served_by(id).is_some() && self.sick.insert(id, sickness).is_none() {
            let name = self.crew.roster.name(id);
            let level = if sickness == Sickness::Old { log::Level::Info } else { log::Level::Warn };
            self.crew.log(level, format!("{name} {sickness}: it will be replaced"));
        }
    }

    /// Whether a worker that uses too much memory should be replaced now. One warning says so if workers need more than they may.
    fn outgrows(&mut self, id: WorkerId, sickness: Sickness, now: Instant) -> bool {
        let ready_at = self.crew.roster.get(id).and_then(|worker| worker.ready_at);
        let (Some(slot), Some(ready_at)) = (self.crew.slot_served_by(id), ready_at) else { return false };
        let is_known = self.crew.roster.slots.iter().any(Slot::needs_more_memory);
        let slot = &mut self.crew.roster.slots[slot.index()];
        let is_due = slot.outgrows(id, now - ready_at);
        if slot.needs_more_memory() && !is_known {
            let (name, soon, most) =
                (self.crew.roster.name(id), format_duration(SOON), format_duration(MAX_REST));
            self.crew.warn(format!(
                "{name} {sickness} less than {soon} after it was ready, as the one before it: a fresh worker needs more, and the next ones are replaced later each time, up to {most}"
            ));
        }
        is_due
    }

    pub(super) fn hangs(&mut self, id: WorkerId) {
        let is_new = self.crew.slot_served_by(id).is_some() && self.hung.insert(id);
        if let Some(timeout) = self.crew.policy.hung_timeout.filter(|_| is_new) {
            let (name, timeout) = (self.crew.roster.name(id), format_duration(timeout));
            self.crew.warn(format!(
                "{name} has taken no connection for {timeout} and done nothing else (see --hung-timeout): it will be replaced"
            ));
        }
    }

    pub(super) fn recovered(&mut self, id: WorkerId) {
        self.hung.remove(&id);
    }

    /// Begins to replace the worker that is next, if there is one.
    pub(super) fn recycle_next(&mut self, now: Instant) {
        while let Some((slot, ticket)) = self.queue.take_recycling() {
            if self.must_replace_all() {
                self.queue.forget_recycling(ticket);
                return self.replace_together(self.crew.policy.rollout, None, ticket, now);
            }
            match self.crew.ready_in(slot) {
                Some(id) => return self.recycle(id, Some(ticket), now),
                None => {
                    let why = format!("slot {slot} has no ready worker to replace");
                    self.fail_recycling(ticket, why, None);
                }
            }
        }
        let serves = |id: &WorkerId| self.crew.slot_served_by(*id).is_some();
        self.sick.retain(|id, _| serves(id));
        self.hung.retain(serves);
        let may_try = |id: &WorkerId| {
            let slot = self.crew.slot_served_by(*id);
            slot.is_some_and(|slot| !self.crew.timers.is_set(Timer::Slot(slot, SlotTimer::Recycle)))
        };
        let replaces_hung = self.crew.policy.hung_timeout.is_some();
        let hung = self.hung.iter().filter(|_| replaces_hung);
        // What failed for one that can't be replaced alone isn't tried at once for another one.
        let waits = !self.sick.keys().all(may_try) && self.must_replace_all();
        let sick = self.sick.keys().filter(|_| !waits);
        match hung.chain(sick).copied().find(may_try) {
            Some(id) if !self.hung.contains(&id) && self.must_replace_all() => {
                self.replace_all(id, now);
            }
            Some(id) => self.recycle(id, None, now),
            None => {}
        }
    }

    /// Whether no worker can be replaced alone, since none can be kept from a queue that it shares: by --balance queue, or on a
    /// Unix socket.
    pub(super) fn must_replace_all(&self) -> bool {
        self.crew.policy.shares_queue || self.crew.endpoints.shares_path(self.crew.slots())
    }

    /// All workers are replaced at the command of a recycling or a scaling to fewer.
    pub(super) fn replace_together(
        &mut self,
        rollout: Rollout,
        shrinks_to: Option<usize>,
        ticket: Ticket,
        now: Instant,
    ) {
        self.crew.info("all workers are replaced: none can be kept from the queue that it shares".to_owned());
        let reload = Reload { rollout, since: now, ticket, ports_may_change: false, shrinks_to };
        self.reload(reload, None, now);
    }

    /// The worker can't be replaced alone.
    fn replace_all(&mut self, id: WorkerId, now: Instant) {
        let Some(slot) = self.crew.slot_served_by(id) else { return };
        let delay = self.crew.roster.slots[slot.index()].put_off(); // for the case that this reload fails
        self.crew.timers.set(Timer::Slot(slot, SlotTimer::Recycle), now + delay);
        if self.queue.push_reload(ReloadOptions::default(), self.crew.policy.rollout).is_ok() {
            self.crew.roster.slots.iter_mut().for_each(|slot| slot.is_renewed = true);
            self.begin_next(now);
        }
    }

    fn recycle(&mut self, id: WorkerId, ticket: Option<Ticket>, now: Instant) {
        let Some(Worker { slot, generation, .. }) = self.crew.roster.get(id) else { return };
        let (slot, generation) = (*slot, *generation);
        let name = self.crew.roster.name(id);
        self.crew.info(format!("recycling: starting a successor of {name}"));
        self.crew.actions.push(Action::FindForeignListeners);
        let before_start = self.crew.actions.len();
        let successor = self.crew.start_beside(slot, generation, false, now);
        let inherits = self.hung.contains(&id);
        if inherits {
            self.crew.actions.insert(before_start, Action::LetInherit { heir: successor, of: id });
        }
        let step = Step::Starts;
        self.phase = Phase::Recycling(Recycling { slot, successor, inherits, since: now, ticket, step });
    }

    /// The kernel is asked to send the share of the worker to its successor, which is ready.
    pub(super) fn switch_to_successor(&mut self, recycling: Recycling) {
        let slot = recycling.slot.index();
        let plan = self.crew.plan_of_switch(&(slot..slot + 1), self.crew.generation());
        self.phase = Phase::Recycling(Recycling { step: Step::Switches, ..recycling });
        self.crew.actions.push(Action::Switch(plan));
    }

    /// The kernel has done it, or has refused it.
    pub(super) fn switched_to_successor(
        &mut self,
        recycling: Recycling,
        outcome: Result<(), String>,
        now: Instant,
    ) {
        if let Err(why) = outcome {
            self.abandon_recycling(&format!("the kernel refused the switch: {why}"), recycling, None, now);
            return;
        }
        let slot = recycling.slot.index();
        let retired = self.crew.serving_in(slot..slot + 1);
        self.phase = Phase::Recycling(Recycling { step: Step::Retires, ..recycling });
        retired.iter().for_each(|id| self.crew.let_kill(*id, recycling.inherits));
        self.crew.retire(&retired, now);
        self.crew.replace_slots(slot..slot + 1, now);
        self.failures.clear();
        self.steer();
        let name = self.crew.roster.name(recycling.successor);
        for id in &retired {
            let old = self.crew.roster.name(*id);
            self.crew.info(format!("{name} serves instead of {old}, which drains"));
        }
        self.end_retired(&retired, now);
    }

    /// A reload comes before what nobody has asked for.
    pub(super) fn put_recycling_off(&mut self, now: Instant) {
        if let Phase::Recycling(recycling @ Recycling { ticket: None, step: Step::Starts, .. }) = self.phase {
            self.abandon_recycling("a reload comes first", recycling, None, now);
        }
    }

    /// The successor has failed; the worker never notices.
    pub(super) fn abandon_recycling(
        &mut self,
        why: &str,
        recycling: Recycling,
        culprit: Option<WorkerId>,
        now: Instant,
    ) {
        self.phase = Phase::Abandoning;
        let Recycling { slot, successor, ticket, .. } = recycling;
        let is_ready = self.crew.roster.state(successor) == Some(State::Ready);
        if is_ready {
            self.crew.let_kill(successor, recycling.inherits);
            self.crew.retire(&[successor], now);
            self.steer();
            self.end_retired(&[successor], now);
        } else if recycling.inherits && self.crew.has_process(successor) {
            self.kill(successor, now); // it might shut the sockets down that the worker has
        } else {
            self.stop(&[successor], now);
        }
        let serving = self.crew.ready_in(slot).map_or("no worker".to_owned(), |id| self.crew.roster.name(id));
        let Some(ticket) = ticket else {
            let delay = self.crew.roster.slots[slot.index()].put_off();
            self.crew.timers.set(Timer::Slot(slot, SlotTimer::Recycle), now + delay);
            let delay = format_duration(delay);
            self.crew.warn(format!("{why}; {serving} serves on, and the next try comes after {delay}"));
            return;
        };
        self.crew.warn(format!("{why}; recycling abandoned, {serving} serves on"));
        self.fail_recycling(ticket, why.to_owned(), culprit);
    }

    /// A worker has ended that serves in the slot whose successor is on the way. Returns whether that takes its place. One that
    /// has sockets of its own already can't: nobody would take what waits on those of the worker.
    pub(super) fn succeeds(&mut self, ended: &Worker, now: Instant) -> bool {
        let Phase::Recycling(recycling @ Recycling { slot, step: Step::Starts, .. }) = self.phase else {
            return false;
        };
        let Recycling { successor, inherits, ticket, .. } = recycling;
        if slot != ended.slot || self.crew.roster.get(successor).is_none() {
            return false;
        }
        let takes_over = inherits || self.crew.addresses(successor).is_empty();
        if takes_over {
            self.crew.promote(ended, successor, now);
            self.serve();
        } else {
            self.phase = Phase::Abandoning;
            self.stop(&[successor], now);
        }
        let why = "the worker has ended before its successor was ready".to_owned();
        ticket.into_iter().for_each(|ticket| self.fail_recycling(ticket, why.clone(), None));
        takes_over
    }

    /// The retired worker has ended.
    pub(super) fn recycled(&mut self, recycling: Recycling, now: Instant) {
        let Recycling { successor, since, ticket, .. } = recycling;
        self.serve();
        let lives = self.crew.roster.get(successor).is_some();
        if lives {
            let (name, took) = (self.crew.roster.name(successor), millis(now - since));
            self.crew.info(format!("recycling done after {took}: {name} serves alone"));
        }
        let Some(ticket) = ticket else { return };
        if !lives {
            self.fail_recycling(ticket, "the new worker has ended".to_owned(), None);
        } else if !self.queue.has(ticket) {
            self.end_operation(ticket, "recycling", Ok(()), None);
        }
    }

    /// What a command asked for has failed in one slot, and isn't tried in the others.
    fn fail_recycling(&mut self, ticket: Ticket, why: String, culprit: Option<WorkerId>) {
        self.queue.forget_recycling(ticket);
        self.end_operation(ticket, "recycling", Err(why), culprit);
    }
}

#[cfg(test)]
mod tests;
