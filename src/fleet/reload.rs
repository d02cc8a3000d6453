//! The reload: a generation starts, is tried, takes the connections, and the one before it retires; or it is abandoned.

use std::time::Instant;

use humantime::format_duration;

use super::events::{Action, Announcement, CommandId, Refusal};
use super::phase::{Phase, Reload};
use super::policy::Rollout;
use super::timers::Timer;
use super::{Fleet, LastReload, Outcome, story};
use crate::ids::{SlotId, WorkerId};

impl Fleet {
    pub(super) fn reload(&mut self, reload: Reload, command: Option<CommandId>, now: Instant) {
        self.newest += 1;
        let (generation, like) = (self.newest, self.crew.generation());
        self.crew.actions.push(Action::BeginGeneration { generation, command, like });
        let workers = reload.shrinks_to.unwrap_or(self.crew.slots());
        self.crew.info(story::reload_begins(self.newest, workers, reload.rollout));
        self.crew.actions.push(Action::Announce(Announcement::Reloading));
        self.crew.actions.push(Action::FindForeignListeners);
        self.start_batch(reload, 0, now);
    }

    pub(super) fn start_batch(&mut self, reload: Reload, from: usize, now: Instant) {
        self.phase = Phase::Replacing { reload, from };
        for slot in reload.filled(from, self.crew.slots()) {
            let id = self.crew.start_beside(SlotId::of_index(slot), self.newest, true, now);
            self.crew.allow_other_ports(id, reload.ports_may_change);
        }
    }

    /// A batch of the next generation is ready.
    pub(super) fn replaced(&mut self, reload: Reload, from: usize, now: Instant) {
        let Rollout::Canary { share, period } = reload.rollout else {
            self.switch(from);
            return;
        };
        self.phase = Phase::Canary { reload };
        self.crew.probe_canaries(self.newest, now);
        self.crew.timers.set(Timer::CanaryPeriod, now + period);
        let (newest, period) = (self.newest, format_duration(period));
        self.steer();
        self.crew.info(format!("generation {newest} gets {share} of new connections for {period}"));
    }

    /// The moment of a reload: in a batch of slots, from this one on, the kernel is asked to send connections to the newest
    /// generation.
    pub(super) fn switch(&mut self, from: usize) {
        if let Some(reload) = self.phase.reload() {
            let plan = self.crew.plan_of_switch(&reload.batch(from, self.crew.slots()), self.newest);
            self.phase = Phase::Switching { reload, from };
            self.crew.actions.push(Action::Switch(plan));
        }
    }

    /// The kernel has switched, and the newest generation becomes the one that serves; or it has refused.
    pub(super) fn switched(&mut self, outcome: Result<(), String>, now: Instant) {
        if let Phase::Recycling(recycling) = self.phase {
            self.switched_to_successor(recycling, outcome, now);
            return;
        }
        let Phase::Switching { reload, from } = self.phase else { return };
        if let Err(why) = outcome {
            self.abandon(&format!("the kernel refused the switch: {why}"), None, now);
            return;
        }
        let slots = self.crew.slots();
        let batch = reload.batch(from, slots);
        let retired = self.crew.serving_in(batch.clone());
        let last = self.crew.roster.slots[from].generation;
        self.phase = Phase::Retiring { reload, next: batch.end };
        self.crew.retire(&retired, now);
        if let Some(slots) = reload.shrinks_to {
            self.crew.remove_slots(slots);
        }
        self.crew.replace_slots(reload.filled(from, slots), now);
        self.failures.clear();
        self.steer();
        self.crew.info(story::switched(self.newest, last, &batch, slots));
        self.end_retired(&retired, now);
    }

    /// The kernel steers as before, which is nowhere if it never took a program.
    pub(super) fn steer_failed(&mut self, why: &str, now: Instant) {
        match self.phase {
            Phase::Starting => self.give_up(why, 1, now),
            Phase::Canary { .. } => self.abandon(why, None, now),
            _ => self.crew.warn(why.to_owned()),
        }
    }

    /// The reload or scaling has failed: stop the new workers. Those that serve never notice.
    pub(super) fn abandon(&mut self, why: &str, culprit: Option<WorkerId>, now: Instant) {
        if let Phase::Recycling(recycling) = self.phase {
            self.abandon_recycling(why, recycling, culprit, now);
            return;
        }
        if let Phase::Scaling { from, ticket } = self.phase {
            self.phase = Phase::Abandoning;
            self.remove_slots(from, now);
            self.crew.warn(format!("{why}; scaling abandoned, {} on", self.crew.who_serves()));
            self.end_operation(ticket, "scaling", Err(why.to_owned()), culprit);
            return;
        }
        let Some(reload) = self.phase.reload() else { return };
        let tried = self.crew.roster.ids(|worker| self.is_on_trial(worker));
        let had_connections = self.phase.has_tried();
        self.phase = Phase::Abandoning;
        self.crew.timers.cancel(Timer::CanaryPeriod);
        if had_connections {
            self.crew.retire(&tried, now);
            self.steer();
            self.end_retired(&tried, now);
        } else {
            self.stop(&tried, now);
        }
        let rest = match self.crew.oldest_generation() == self.crew.generation() {
            true => format!("generation {} serves", self.crew.generation()),
            false => self.crew.who_serves(),
        };
        self.crew.warn(format!("{why}; reload abandoned, {rest} on"));
        self.end_reload(reload, Err(why.to_owned()), culprit, now);
    }

    pub(super) fn abort(&mut self, now: Instant) -> Result<(), Refusal> {
        let can_abort = self.phase.can_abort(self.crew.slots());
        if can_abort {
            self.abandon("aborted", None, now);
        }
        match self.queue.take_reload() {
            Some((_, ticket)) => self.end_operation(ticket, "reload", Err("aborted".to_owned()), None),
            None if !can_abort => return Err(Refusal::NoReloadToAbort),
            None => {}
        }
        Ok(())
    }

    pub(super) fn end_reload(
        &mut self,
        reload: Reload,
        result: Outcome,
        culprit: Option<WorkerId>,
        now: Instant,
    ) {
        let generation = self.newest;
        self.last_reload = Some(LastReload { generation, result: result.clone(), ended: now });
        self.end_operation(reload.ticket, reload.name(), result, culprit);
    }
}
