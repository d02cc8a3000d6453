//! System calls of workers that wait for an answer.

use std::time::Instant;

use nix::sys::epoll::EpollFlags;

use super::Supervisor;
use crate::fleet::{Event, UdpChange};
use crate::ids::WorkerId;
use crate::intercept::reader::Read;
use crate::intercept::{AtHand, Interception, ListenChange};

impl Supervisor {
    /// The filter of a worker has stopped a call, or its last process has ended.
    pub(super) fn take_call(&mut self, worker: WorkerId, flags: EpollFlags) {
        if flags.contains(EpollFlags::EPOLLIN) {
            self.answer(worker, Interception::take);
        } else {
            self.interceptions.remove(&worker);
            self.reader.forget(worker);
            self.pool.nobody_is_left(worker);
        }
    }

    /// What calls wait for was read.
    pub(super) fn take_readings(&mut self) {
        for Read { worker, id, answers } in self.reader.take(Instant::now()) {
            self.answer(worker, |interception, at_hand| interception.go_on(id, answers, at_hand));
        }
    }

    fn answer(
        &mut self,
        worker: WorkerId,
        answer: impl FnOnce(&mut Interception, &mut AtHand) -> Option<ListenChange>,
    ) {
        let Some(interception) = self.interceptions.get_mut(&worker) else { return };
        let (pool, unix, reader) = (&mut self.pool, &mut self.unix, &mut self.reader);
        let is_starting = self.fleet.crew().is_starting(worker);
        match answer(interception, &mut AtHand { pool, unix, reader, is_starting }) {
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
