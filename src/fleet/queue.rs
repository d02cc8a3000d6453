//! What was asked for and waits for its turn: at most one reload and one scaling.

use super::events::{Refusal, Ticket};
use super::policy::Rollout;

/// Also the source of all tickets.
#[derive(Debug, Default)]
pub struct Queue {
    reload: Option<(Rollout, Ticket)>,
    scaling: Option<(u32, Ticket)>,
    tickets: u32,
}

impl Queue {
    pub fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    /// Queues a reload: of this kind, or of the queued one's, or of the default kind.
    ///
    /// # Errors
    /// When one of another kind is queued.
    pub fn push_reload(&mut self, wanted: Option<Rollout>, default: Rollout) -> Result<Ticket, Refusal> {
        match self.reload {
            Some((queued, ticket)) if wanted.is_none_or(|wanted| wanted == queued) => Ok(ticket),
            Some(_) => Err(Refusal::OtherReloadQueued),
            None => {
                let ticket = self.ticket();
                self.reload = Some((wanted.unwrap_or(default), ticket));
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

    pub fn take_reload(&mut self) -> Option<(Rollout, Ticket)> {
        self.reload.take()
    }

    pub fn take_scaling(&mut self) -> Option<(u32, Ticket)> {
        self.scaling.take()
    }

    pub fn clear(&mut self) {
        (self.reload, self.scaling) = (None, None);
    }

    /// How many workers the queued scaling wants.
    pub fn workers(&self) -> Option<u32> {
        self.scaling.map(|(workers, _)| workers)
    }

    pub fn has(&self, ticket: Ticket) -> bool {
        let tickets = [self.reload.map(|(_, ticket)| ticket), self.scaling.map(|(_, ticket)| ticket)];
        tickets.contains(&Some(ticket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_wishes_share_a_ticket_and_another_reload_is_refused() {
        let mut queue = Queue::default();
        let (all, two) = (Rollout::AllAtOnce, Rollout::Batches(2));
        let ticket = queue.push_reload(None, two).unwrap();
        assert_eq!(queue.push_reload(None, all), Ok(ticket), "as the queued one");
        assert_eq!(queue.push_reload(Some(two), all), Ok(ticket));
        assert_eq!(queue.push_reload(Some(all), all), Err(Refusal::OtherReloadQueued));
        assert!(queue.has(ticket));
        assert_eq!(queue.take_reload(), Some((two, ticket)));
        assert!(!queue.has(ticket));
        assert_ne!(queue.push_reload(Some(all), two), Ok(ticket));
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
