//! Carries out the fleet's plan in every group.

use std::io;
use std::mem;
use std::time::Instant;

use log::warn;

use super::{Group, Pool, SPARE_BACKLOG};
use crate::address::Address;
use crate::ids::{MemberId, WorkerId};
use crate::kernel::{fdtable, sys};
use crate::pool::Owner;
use crate::pool::member::Member;
use crate::steering::spread::Next;
use crate::steering::{Plan, Role};

/// Among more listeners connections aren't spread evenly: to look at their workers would take long.
const MAX_SPREAD: usize = 128;

impl Pool {
    /// Has the kernel send new connections where [`crate::steering::decide`] wants them by this plan, from now on until
    /// the next one.
    ///
    /// # Errors
    /// Why the kernel has refused it for some address. There it steers as before.
    pub fn steer(&mut self, plan: Plan) -> Result<(), String> {
        self.plan = plan;
        // What was known of the predecessors doesn't hold for them.
        self.members.succeed(&self.plan).into_iter().for_each(|id| self.tracker.forget(id));
        self.heirs.retain(|heir, _| self.plan.role(*heir) == Role::Starting);
        self.steer_all()
    }

    /// As [`Pool::steer`], for all addresses or none.
    ///
    /// # Errors
    /// Why the kernel has refused it for some address. The last plan holds.
    pub fn switch(&mut self, plan: Plan) -> Result<(), String> {
        let refused = |role: &Role| if *role == Role::Ready { Role::Leaving } else { *role };
        let tried: Vec<(WorkerId, Role)> = plan.roles.iter().map(|(id, role)| (*id, refused(role))).collect();
        let last = mem::replace(&mut self.plan, plan);
        let switched = self.steer_all();
        if switched.is_err() {
            self.plan = last;
            for (worker, role) in tried {
                // It may have got connections at an address where the kernel has switched.
                self.plan.roles.entry(worker).or_insert(role);
            }
            let _ = self.steer_all(); // where it is refused as well, the old program is still there
        }
        switched
    }

    pub(super) fn steer_all(&mut self) -> Result<(), String> {
        self.handle_events();
        let addresses: Vec<Address> = self.groups.keys().copied().collect();
        let steer = |address| {
            let steered = self.steer_address(address);
            steered.map_err(|error| format!("can't steer {address}: {error}"))
        };
        // All of them, although one may fail.
        let steered = addresses.into_iter().map(steer).fold(Ok(()), Result::and);
        self.must_steer &= steered.is_err();
        steered
    }

    pub(super) fn steer_address(&mut self, address: Address) -> io::Result<()> {
        if address.is_udp() {
            self.find_connected(address);
        }
        if self.is_private(address) {
            return Ok(());
        }
        let lacks_sink = |group: &Group| group.lacks_sink(&self.plan, &self.members);
        if self.groups.get(&address).is_some_and(lacks_sink) {
            self.add_spare(address);
        }
        let Some(group) = self.groups.get_mut(&address) else { return Ok(()) };
        let rank = |id| (self.closed.standing(id), self.tracker.load(id), self.spread.is_full(id));
        let spares_lacking = group.steer(&self.plan, rank, &mut self.members)?;
        (0..spares_lacking).for_each(|_| self.add_spare(address));
        Ok(())
    }

    /// When to call [`Pool::advance_spread`].
    pub(super) fn spread_deadline(&self) -> Option<Instant> {
        match self.spread.next() {
            Next::Await => None,
            Next::LookAt(at) | Next::RestUntil(at) => Some(at),
        }
    }

    /// Does what is next to spread connections evenly.
    pub(super) fn advance_spread(&mut self, now: Instant) {
        match self.spread.next() {
            Next::LookAt(_) => self.look_at_descriptors(now),
            Next::Await | Next::RestUntil(_) => self.spread.rested(),
        }
        if self.spread.next() == Next::Await && !self.watcher.await_connection() {
            self.must_steer |= self.spread.cannot_await(now);
        }
    }

    /// Finds out which workers have the fewest connections.
    fn look_at_descriptors(&mut self, now: Instant) {
        let is_served = |(_, member): &(MemberId, &Member)| {
            !member.address.is_udp() && member.role(&self.plan).is_served()
        };
        let descriptors = |(id, member): (MemberId, &Member)| {
            let pid = member.loans.first()?.borrower.pid;
            Some((id, fdtable::len(pid)?))
        };
        let served: Vec<(MemberId, &Member)> = self.members.iter().filter(is_served).collect();
        self.must_steer |= match served.len() > MAX_SPREAD {
            true => self.spread.cannot_await(now),
            false => self.spread.look(&served.into_iter().filter_map(descriptors).collect(), now),
        };
    }

    /// Without it, connections may go astray for a moment when a worker leaves.
    fn add_spare(&mut self, address: Address) {
        let added = sys::has_fds_in_reserve()
            .and_then(|()| self.add(address, Owner::this_process()))
            .and_then(|spare| self.listen_on(spare, SPARE_BACKLOG));
        if let Err(error) = added
            && let Some(more) = self.warnings.take(Instant::now())
        {
            warn!("can't make a spare socket for {address}: {error}{more}");
        }
    }
}
