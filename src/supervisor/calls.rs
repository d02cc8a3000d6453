//! System calls of workers that wait for an answer.

use std::time::Instant;

use nix::sys::epoll::EpollFlags;

use super::Supervisor;
use crate::fleet::{Event, UdpChange};
use crate::ids::WorkerId;
use crate::intercept::{AtHand, Interception, ListenChange};
use crate::kernel::jobs::Done;
use crate::pool::paths::News;
use crate::probe::Outcome;

impl Supervisor {
    /// The filter of a worker has stopped a call, or its last process has ended.
    pub(super) fn take_call(&mut self, worker: WorkerId, flags: EpollFlags) {
        if flags.contains(EpollFlags::EPOLLIN) {
            self.answer(worker, Interception::take);
        } else {
            self.interceptions.remove(&worker);
            self.reader.forget(&worker);
            self.pool.nobody_is_left(worker);
        }
    }

    /// What calls wait for was read.
    pub(super) fn take_readings(&mut self) {
        for Done { key: worker, tag: id, outcomes } in self.reader.take(Instant::now()) {
            self.answer(worker, |interception, at_hand| interception.go_on(id, outcomes, at_hand));
        }
    }

    /// What calls and probes wait for was done with paths. Returns the probes that have come to their end.
    pub(super) fn take_paths(&mut self) -> Vec<(WorkerId, Outcome)> {
        let (mut probed, mut is_anyone_gone) = (Vec::new(), false);
        for news in self.unix.take(Instant::now()) {
            match news {
                News::Call((worker, id), outcome) => {
                    is_anyone_gone |= !self.processes.contains_key(&worker);
                    self.answer(worker, |it, at_hand| it.go_on_with_path(id, outcome, at_hand));
                }
                News::Reached(worker, reached) => {
                    probed.extend(self.probes.reached(worker, reached, &mut self.pool, Instant::now()));
                }
            }
        }
        if is_anyone_gone {
            self.forget_paths();
        }
        probed
    }

    /// What has not been read or done in time.
    pub(super) fn take_late(&mut self, now: Instant) -> Vec<(WorkerId, Outcome)> {
        let is_over = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_over(self.reader.deadline()) {
            self.take_readings();
        }
        if is_over(self.unix.deadline()) { self.take_paths() } else { Vec::new() }
    }

    fn answer(
        &mut self,
        worker: WorkerId,
        answer: impl FnOnce(&mut Interception, &mut AtHand) -> Option<ListenChange>,
    ) {
        let Some(interception) = self.interceptions.get_mut(&worker) else { return };
        let (pool, unix, reader) = (&mut self.pool, &mut self.unix, &mut self.reader);
        let is_starting = self.fleet.crew().is_starting(worker);
        let shares_udp = self.shares_udp && self.fleet.crew().is_opening(worker, Instant::now());
        match answer(interception, &mut AtHand { pool, unix, reader, is_starting, shares_udp }) {
            Some(ListenChange::Listens(endpoint)) => self.handle(Event::Listens { worker, endpoint }),
            Some(ListenChange::StoppedListening(endpoint)) => {
                self.handle(Event::StoppedListening { worker, endpoint });
            }
            Some(ListenChange::BindsUdp { inode, address })
                if self.udp_binds.add(worker, inode, address, Instant::now()) =>
            {
                self.handle(Event::Udp { worker, address, change: UdpChange::Binds });
            }
            Some(ListenChange::BindsUdp { .. }) | None => {}
        }
    }
}
