//! What the fleet is doing: one operation at a time.

use std::ops::Range;
use std::time::Instant;

use super::events::Ticket;
use super::policy::Rollout;
use super::worker::Worker;
use crate::ids::{SlotId, WorkerId};
use crate::steering::Share;

/// A reload that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reload {
    pub rollout: Rollout,
    pub since: Instant,
    pub ticket: Ticket,
    pub ports_may_change: bool,
    /// It is a scaling to fewer slots, of workers that are replaced together.
    pub shrinks_to: Option<usize>,
}

impl Reload {
    /// "reload"
    pub fn name(&self) -> &'static str {
        if self.shrinks_to.is_some() { "scaling" } else { "reload" }
    }

    /// The slots of a batch that get a new worker.
    pub fn filled(&self, from: usize, slots: usize) -> Range<usize> {
        let Range { start, end } = self.batch(from, slots);
        start..end.min(self.shrinks_to.unwrap_or(slots))
    }

    /// The slots that are replaced together, from this one on, when there are so many slots.
    pub fn batch(&self, from: usize, slots: usize) -> Range<usize> {
        let most = match self.rollout {
            Rollout::Batches(most) => most as usize,
            Rollout::AllAtOnce | Rollout::Canary { .. } => slots,
        };
        from..slots.min(from.saturating_add(most))
    }
}

/// The worker of a slot is being replaced by another one of its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recycling {
    pub slot: SlotId,
    pub successor: WorkerId,
    /// Whether it accepts what waits for the worker, which hangs.
    pub inherits: bool,
    pub since: Instant,
    /// `None` if no command asked for it.
    pub ticket: Option<Ticket>,
    pub step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The successor isn't ready yet.
    Starts,
    /// It is, and the kernel is asked to switch.
    Switches,
    /// It serves, and the other worker is retired.
    Retires,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The first generation isn't ready yet.
    Starting,
    Serving,
    /// The next generation starts, in a batch of slots from this one on.
    Replacing {
        reload: Reload,
        from: usize,
    },
    /// The next generation is ready and has the canary's share of new connections.
    Canary {
        reload: Reload,
    },
    /// The next generation is ready, and the kernel is asked to switch in a batch of slots from this one on.
    Switching {
        reload: Reload,
        from: usize,
    },
    /// The next generation serves in all slots before `next`; the workers that served there are retired.
    Retiring {
        reload: Reload,
        next: usize,
    },
    /// One worker is replaced.
    Recycling(Recycling),
    /// The next generation, a new slot or a successor has failed and is stopped.
    Abandoning,
    /// There are new slots from this one on, or the workers of removed ones are retired.
    Scaling {
        from: usize,
        ticket: Ticket,
    },
    /// All workers are stopped.
    Stopping {
        /// When a signal asked for it.
        signalled: Option<Instant>,
        status: u8,
        ticket: Ticket,
    },
}

impl Phase {
    /// The operation's ticket, if there is an operation.
    pub fn ticket(self) -> Option<Ticket> {
        match self {
            Self::Starting | Self::Serving | Self::Abandoning => None,
            Self::Scaling { ticket, .. } | Self::Stopping { ticket, .. } => Some(ticket),
            Self::Recycling(recycling) => recycling.ticket,
            _ => self.reload().map(|reload| reload.ticket),
        }
    }

    pub fn reload(self) -> Option<Reload> {
        match self {
            Self::Replacing { reload, .. }
            | Self::Canary { reload }
            | Self::Switching { reload, .. }
            | Self::Retiring { reload, .. } => Some(reload),
            _ => None,
        }
    }

    pub fn is_stopping(self) -> bool {
        matches!(self, Self::Stopping { .. })
    }

    /// Whether a reload has replaced some of so many slots and not all.
    pub fn is_rolling(self, slots: usize) -> bool {
        match self {
            Self::Replacing { from, .. } | Self::Switching { from, .. } => from > 0,
            Self::Retiring { next, .. } => next < slots,
            _ => false,
        }
    }

    /// Whether a reload runs that hasn't replaced all of so many slots.
    pub fn can_abort(self, slots: usize) -> bool {
        matches!(self, Self::Replacing { .. } | Self::Canary { .. } | Self::Switching { .. })
            || self.is_rolling(slots)
    }

    /// Whether the kernel is asked to switch.
    pub fn is_switching(self) -> bool {
        matches!(self, Self::Switching { .. } | Self::Recycling(Recycling { step: Step::Switches, .. }))
    }

    /// Whether the reload to the `newest` generation, the scaling or the recycling fails if this worker does.
    pub fn is_on_trial(self, worker: &Worker, serves: bool, newest: u32) -> bool {
        match self {
            Self::Replacing { .. } | Self::Canary { .. } | Self::Switching { .. } => {
                worker.generation == newest && !serves
            }
            Self::Recycling(recycling) => worker.id == recycling.successor && !serves,
            Self::Scaling { from, .. } => worker.ready_at.is_none() && worker.slot.index() >= from && serves,
            _ => false,
        }
    }

    /// The share of new connections that the canary gets, while there is one.
    pub fn canary(self) -> Option<Share> {
        match self {
            Self::Canary { reload: Reload { rollout: Rollout::Canary { share, .. }, .. } } => Some(share),
            _ => None,
        }
    }

    /// Whether workers that would be abandoned may have got connections.
    pub fn has_tried(self) -> bool {
        matches!(self, Self::Canary { .. } | Self::Switching { .. })
    }

    /// What a queued operation waits for.
    pub fn queued_until(self) -> &'static str {
        match self {
            Self::Starting => "the first generation is ready",
            Self::Scaling { .. } => "the scaling ends",
            Self::Recycling(_) => "the recycling ends",
            Self::Abandoning => "the workers of the failed operation have ended",
            _ => "the current reload ends",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::worker::State;
    use crate::ids::{SlotId, WorkerId};

    fn reload() -> Reload {
        Reload {
            rollout: Rollout::Batches(1),
            shrinks_to: None,
            since: Instant::now(),
            ticket: Ticket(7),
            ports_may_change: false,
        }
    }

    #[test]
    fn a_reload_is_rolling_from_its_second_batch_until_its_last() {
        let reload = reload();
        let replacing = |from| Phase::Replacing { reload, from };
        let retiring = |next| Phase::Retiring { reload, next };
        assert_eq!([replacing(0), replacing(1)].map(|phase| phase.is_rolling(3)), [false, true]);
        assert_eq!([retiring(2), retiring(3)].map(|phase| phase.is_rolling(3)), [true, false]);
        assert!(!Phase::Serving.is_rolling(3));
        let can_abort = [replacing(0), Phase::Canary { reload }, retiring(2), retiring(3), Phase::Serving];
        assert_eq!(can_abort.map(|phase| phase.can_abort(3)), [true, true, true, false, false]);
    }

    #[test]
    fn an_operation_fails_with_the_workers_that_it_has_started() {
        let (reload, now) = (reload(), Instant::now());
        let worker = |slot, generation| Worker::new(WorkerId(0), SlotId(slot), generation, now);
        for phase in [Phase::Replacing { reload, from: 0 }, Phase::Canary { reload }] {
            assert!(phase.is_on_trial(&worker(0, 2), false, 2));
            assert!(!phase.is_on_trial(&worker(0, 2), true, 2), "it serves");
            assert!(!phase.is_on_trial(&worker(0, 1), false, 2), "it is of the old generation");
        }
        let scaling = Phase::Scaling { from: 2, ticket: reload.ticket };
        assert!(scaling.is_on_trial(&worker(2, 1), true, 1));
        assert!(!scaling.is_on_trial(&worker(1, 1), true, 1), "its slot is older");
        assert!(!scaling.is_on_trial(&worker(2, 1), false, 1), "its slot is gone");
        let mut ready = worker(2, 1);
        ready.enter(State::Ready, now);
        assert!(!scaling.is_on_trial(&ready, true, 1), "it was ready");
        assert!(!Phase::Serving.is_on_trial(&worker(0, 1), false, 1));
    }

    #[test]
    fn a_queued_operation_is_told_what_it_waits_for() {
        let ticket = reload().ticket;
        assert!(Phase::Starting.queued_until().contains("first generation"));
        assert!(Phase::Scaling { from: 0, ticket }.queued_until().contains("scaling"));
        assert!(Phase::Replacing { reload: reload(), from: 0 }.queued_until().contains("reload"));
    }

    #[test]
    fn a_batch_ends_with_the_last_slot_and_all_at_once_is_one_batch() {
        let batch = |rollout, from| Reload { rollout, ..reload() }.batch(from, 5);
        assert_eq!(batch(Rollout::Batches(2), 0), 0..2);
        assert_eq!(batch(Rollout::Batches(2), 4), 4..5);
        assert_eq!(batch(Rollout::Batches(u32::MAX), 1), 1..5);
        assert_eq!(batch(Rollout::AllAtOnce, 0), 0..5);
    }
}
