//! Looks for the sockets that workers have closed, and closes them.

use std::time::{Duration, Instant};

use log::debug;
use nix::unistd::Pid;

use super::Pool;
use crate::ids::{Borrower, MemberId, WorkerId};
use crate::kernel::open_sockets;
use crate::kernel::search::{Found, Place, Search, Seen};
use crate::pool::closed::{Patience, Standing};
use crate::pool::group::Group;
use crate::pool::member::{BindRequest, Member};

/// For how long a search goes on at once. Then it pauses for as long.
const SEARCH_TIME: Duration = Duration::from_millis(1);

/// A search that has begun, for these members.
#[derive(Debug)]
pub struct Ongoing {
    search: Search,
    ids: Vec<MemberId>,
    next: Instant,
}

impl Pool {
    /// When to call [`Pool::look_at_places`] and [`Pool::search_closed`] although there is no sample of the queues.
    pub(super) fn closed_deadline(&self) -> Option<Instant> {
        self.search.as_ref().map_or_else(|| self.closed.deadline(), |ongoing| Some(ongoing.next))
    }

    /// Looks for listeners where that is due.
    pub(super) fn look_at_places(&mut self, now: Instant) {
        for id in self.closed.to_look_at(now) {
            match self.members.get(id).map(Member::look) {
                Some(seen) => self.closed.looked(id, seen, now),
                None => self.closed.forget(id),
            }
        }
    }

    /// Searches for those that weren't there, if it is time to, and closes those that no process has any more. Returns
    /// whether there were any.
    pub(super) fn search_closed(&mut self, now: Instant) -> bool {
        let closed = self.search(now);
        closed.iter().for_each(|id| self.close(*id));
        !closed.is_empty()
    }

    /// Searches for a while. Returns those that are closed.
    fn search(&mut self, now: Instant) -> Vec<MemberId> {
        let Some(mut ongoing) = self.search.take().or_else(|| self.begin_search(now)) else {
            return Vec::new();
        };
        if ongoing.next > now || !ongoing.search.advance(now + SEARCH_TIME) {
            if ongoing.next <= now {
                ongoing.next = Instant::now() + SEARCH_TIME;
            }
            self.search = Some(ongoing);
            return Vec::new();
        }
        let now = Instant::now();
        let mut closed = Vec::new();
        for id in ongoing.ids {
            let Some(member) = self.members.get(id) else { continue };
            let (found, patience) = (ongoing.search.found(member.inode), self.patience(id));
            if let (Found::At(place), Some(member)) = (found, self.members.get_mut(id)) {
                member.place = Some(place);
            }
            if self.closed.searched(id, found, patience, now) {
                closed.push(id);
            } else if self.members[id].address.is_udp() && self.closed.standing(id) == Standing::Open {
                self.closed.forget(id); // its queue isn't sampled
                self.await_datagram(id, now);
            }
        }
        closed
    }

    fn begin_search(&self, now: Instant) -> Option<Ongoing> {
        let ids = self.closed.to_search(now);
        if ids.is_empty() {
            return None;
        }
        let members: Vec<&Member> = ids.iter().filter_map(|id| self.members.get(*id)).collect();
        let places = members.iter().filter_map(|member| Some(member.place?.pid));
        let borrowers = members.iter().flat_map(|member| &member.loans).map(|loan| loan.borrower.pid);
        let likely: Vec<Pid> = borrowers.chain(places).collect();
        let search = Search::new(&likely, members.iter().map(|member| member.inode));
        Some(Ongoing { search, ids, next: now })
    }

    fn patience(&self, id: MemberId) -> Patience {
        let member = &self.members[id];
        let group = self.groups.get(&member.address).map(Group::ids).into_iter().flatten();
        let serves = |other: MemberId| {
            let role = self.members[other].role(&self.plan);
            role.is_served() && self.closed.standing(other) != Standing::Closed
        };
        let is_alone = !group.copied().any(|other| other != id && serves(other));
        match is_alone || member.place.is_some_and(Place::has_ended) {
            true => Patience::Long,
            false => Patience::Short,
        }
    }

    /// The other listeners on the same address that only this worker has.
    fn others(&self, id: MemberId, worker: WorkerId) -> impl Iterator<Item = MemberId> {
        let address = self.members[id].address;
        let is_one = move |member: &Member| member.loans.len() == 1 && member.is_listener_on(worker, address);
        let lent = self.members.lent_to(worker).filter(move |(_, member)| is_one(member));
        lent.map(|(other, _)| other).filter(move |other| *other != id)
    }

    /// The worker has begun to listen on this member. It may do so to close another one of the same process, in whose queue a
    /// connection would be lost.
    pub(super) fn supersede_others(&mut self, id: MemberId, worker: WorkerId) -> bool {
        if !self.members[id].role(&self.plan).is_served() {
            return false;
        }
        let pid = |id: MemberId| self.members[id].place.map(|place| place.pid);
        let mut superseded: Vec<MemberId> =
            self.others(id, worker).filter(|other| pid(*other) == pid(id)).collect();
        let now = Instant::now();
        if self.members[id].address.is_udp() && !superseded.is_empty() {
            superseded = vec![id]; // it may be about to connect this one
        }
        superseded.iter().for_each(|other| self.closed.is_superseded(*other, now));
        self.closed.take_changed()
    }

    /// The socket of a process of the worker that has ended, for one that binds in its place: so what waits there isn't lost.
    pub(super) fn of_ended_process(&self, borrower: Borrower, request: BindRequest) -> Option<MemberId> {
        let is_left = |member: &Member| {
            let [loan] = member.loans[..] else { return false };
            member.address == request.address
                && loan.shares
                && request.shares
                && loan.heir.is_none()
                && !loan.given
                && member
                    .place
                    .is_some_and(|place| place.look(member.inode) == Seen::Gone && place.has_ended())
                && !member.is_limited()
                && open_sockets::first_holders(borrower.pid, &|inode| inode == member.inode).is_empty()
        };
        self.members.lent_to(borrower.worker).find(|(_, member)| is_left(member)).map(|(id, _)| id)
    }

    /// No process has this socket any more.
    fn close(&mut self, id: MemberId) {
        self.closed.forget(id);
        let Some(Member { inode, loans, address, .. }) = self.members.get(id) else { return };
        let (inode, loans) = (*inode, loans.clone());
        loans.iter().for_each(|loan| debug!("{} has closed a listener of {address}", loan.borrower));
        if loans.iter().any(|loan| loan.heir.is_some()) {
            return loans.iter().for_each(|loan| self.take_back(loan.borrower.worker, inode));
        }
        loans.iter().for_each(|loan| self.note_stopped(id, loan.borrower.worker));
        if !loans.is_empty() {
            self.shut_down(id);
        }
    }
}
