//! The scaling: slots are added, or the last ones are removed with their workers.

use std::time::Instant;

use super::Fleet;
use super::events::{Action, Refusal, Ticket};
use super::phase::Phase;
use super::policy::{Rollout, Target};
use super::slot::Slot;
use crate::ids::SlotId;
use crate::words::count;

impl Fleet {
    pub(super) fn queue_scaling(&mut self, target: Target) -> Result<Ticket, Refusal> {
        let shrinks_to = self.phase.reload().and_then(|reload| reload.shrinks_to);
        let slots = shrinks_to.unwrap_or(self.crew.slots()) as u32;
        let now = self.queue.workers().unwrap_or(slots);
        let workers = target.workers(now).map_err(Refusal::Limit)?;
        let (ticket, superseded) = self.queue.push_scaling(workers);
        if let Some(ticket) = superseded {
            let outcome = Err(format!("superseded by a scaling to {}", count(workers as usize, "worker")));
            self.crew.actions.push(Action::Ended { ticket, outcome, culprit: None });
        }
        Ok(ticket)
    }

    /// Adds slots, or removes the last ones.
    pub(super) fn scale(&mut self, workers: usize, ticket: Ticket, now: Instant) {
        let before = self.crew.slots();
        self.crew.info(format!("scaling from {before} to {}", count(workers, "worker")));
        if workers < before && self.must_replace_all() {
            return self.replace_together(Rollout::AllAtOnce, Some(workers), ticket, now);
        }
        self.phase = Phase::Scaling { from: before.min(workers), ticket };
        if workers < before {
            self.remove_slots(workers, now);
        }
        for slot in before..workers {
            self.crew.roster.slots.push(Slot::new(self.crew.generation(), None));
            self.crew.start(SlotId::of_index(slot), false, now);
        }
    }

    /// Removes all slots from this one on.
    pub(super) fn remove_slots(&mut self, from: usize, now: Instant) {
        let retired = self.crew.serving_in(from..self.crew.slots());
        self.crew.retire(&retired, now);
        self.crew.remove_slots(from);
        self.steer();
        self.end_retired(&retired, now);
    }
}
