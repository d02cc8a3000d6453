//! What was asked for and waits for its turn: at most one reload, one scaling, and slots whose workers are to be replaced.

use std::collections::BTreeSet;

use super::events::{Refusal, ReloadOptions, Ticket};
use super::policy::Rollout;
use crate::ids::SlotId;

/// Also the source of all tickets.
#[derive(Debug, Default)]
pub struct Queue {
    reload: Option<(ReloadOptions, Ticket)>,
    scaling: Option<(u32, Ticket)>,
    recycling: Option<(BTreeSet<SlotId>, Ticket)>,
    tickets: u32,
}

impl Queue {
    pub fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    /// Queues a reload, with the default rollout if it names none. One without options is the same as any that is queued.
    ///
    /// # Errors
    /// When another one is queued.
    pub fn push_reload(&mut self, wanted: ReloadOptions, default: Rollout) -> Result<Ticket, Refusal> {
        let full = ReloadOptions { rollout: wanted.rollout.or(Some(default)), ..wanted };
        match self.reload {
            Some((queued, ticket)) if full == queued || wanted == ReloadOptions::default() => Ok(ticket),
            Some(_) => Err(Refusal::OtherReloadQueued),
            None => {
                let ticket = self.ticket();
                self.reload = Some((full, ticket));
                Ok(ticket)
            }
        }
    }

    /// Queues a scaling to so many workers. Returns its ticket, and that of the queued one whose place it takes.
    pub fn push_scaling(&mut self, workers: u32) -> (Ticket, Option<Ticket>) {
        match self.scaling {
            Some((queued, ticket)) if queued == workers => (ticket, None),
            superseded => {
                let ticket = self.ticket();
                self.scaling = Some((workers, ticket));
                (ticket, superseded.map(|(_, ticket)| ticket))
            }
        }
    }

    /// Queues the replacement of the workers of these slots, with that of those which are queued.
    pub fn push_recycling(&mut self, slots: BTreeSet<SlotId>) -> Ticket {
        let (queued, ticket) = self.recycling.take().unwrap_or_else(|| (BTreeSet::new(), self.ticket()));
        self.recycling = Some((&queued | &slots, ticket));
        ticket
    }

    pub fn take_recycling(&mut self) -> Option<(SlotId, Ticket)> {
        let (slots, ticket) = self.recycling.as_mut()?;
        let next = slots.pop_first().map(|slot| (slot, *ticket));
        if slots.is_empty() {
            self.recycling = None;
        }
        next
    }

    /// Gives up what is queued with this ticket.
    pub fn forget_recycling(&mut self, ticket: Ticket) {
        self.recycling.take_if(|(_, queued)| *queued == ticket);
    }

    pub fn take_reload(&mut self) -> Option<(ReloadOptions, Ticket)> {
        self.reload.take()
    }

    pub fn take_scaling(&mut self) -> Option<(u32, Ticket)> {
        self.scaling.take()
    }

    pub fn clear(&mut self) {
        (self.reload, self.scaling, self.recycling) = (None, None, None);
    }

    /// How many workers the queued scaling wants.
    pub fn workers(&self) -> Option<u32> {
        self.scaling.map(|(workers, _)| workers)
    }

    pub fn has(&self, ticket: Ticket) -> bool {
        let recycling = self.recycling.as_ref().map(|(_, ticket)| *ticket);
        let tickets =
            [self.reload.map(|(_, ticket)| ticket), self.scaling.map(|(_, ticket)| ticket), recycling];
        tickets.contains(&Some(ticket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_wishes_share_a_ticket_and_another_reload_is_refused() {
        let mut queue = Queue::default();
        let of = |rollout| ReloadOptions { rollout: Some(rollout), ..ReloadOptions::default() };
        let (any, all, two) = (ReloadOptions::default(), of(Rollout::AllAtOnce), of(Rollout::Batches(2)));
        let ticket = queue.push_reload(any, Rollout::Batches(2)).unwrap();
        let mut push = |wanted| queue.push_reload(wanted, Rollout::AllAtOnce);
        assert_eq!(push(any), Ok(ticket), "as the queued one");
        assert_eq!(push(two), Ok(ticket));
        for other in [all, ReloadOptions { ports_may_change: true, ..two }] {
            assert_eq!(push(other), Err(Refusal::OtherReloadQueued));
        }
        assert!(queue.has(ticket));
        assert_eq!(queue.take_reload(), Some((two, ticket)));
        assert!(!queue.has(ticket));
        assert_ne!(queue.push_reload(all, Rollout::AllAtOnce), Ok(ticket));
    }

    #[test]
    fn a_later_scaling_takes_the_place_of_the_queued_one() {
        let mut queue = Queue::default();
        let (first, superseded) = queue.push_scaling(4);
        assert_eq!((superseded, queue.workers()), (None, Some(4)));
        assert_eq!(queue.push_scaling(4), (first, None));
        let (second, superseded) = queue.push_scaling(5);
        assert_eq!(superseded, Some(first));
        assert!(queue.has(second) && !queue.has(first));
        assert_eq!((queue.take_scaling(), queue.workers()), (Some((5, second)), None));
    }
}
