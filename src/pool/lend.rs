//! Lends the pool's sockets to workers, and takes them back.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use log::{debug, warn};
use nix::sys::resource::{Resource, getrlimit, rlim_t};
use nix::unistd::Pid;

use super::{Group, Pool, foreign};
use crate::address::{Address, Transport};
use crate::ids::{Borrower, MemberId, SlotId, WorkerId};
use crate::kernel::{open_sockets, procfs};
use crate::pool::member::{BindRequest, Heir, Loan, Member, MinTtl, Overlap, Owner, Reserved};
use crate::steering::Role;

/// After so many binds, the sockets that a worker has closed are taken back if it has as many.
const TAKE_BACK_EVERY: usize = 64;
/// The backlog of sockets that workers are given, as systemd sets it (systemd.socket(5)).
const GIVEN_BACKLOG: i32 = 4096;

/// At most one part in so many of the time goes into finding out what ended workers have left open.
const LEFT_OPEN_SHARE: u32 = 20;

/// How many sockets of TCP one worker may borrow, and how many of UDP. Each takes a descriptor of the wrapper's, which needs
/// some for every worker.
pub(super) fn max_for_each_worker() -> usize {
    const SHARE: rlim_t = 16;
    let open_files = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    (open_files / SHARE).clamp(16, 1024) as usize
}

impl Pool {
    /// Lends a socket that listens on `address` already, for a worker that is about to start. It gets no connection
    /// until [`Pool::steer`] sends it some.
    ///
    /// # Errors
    /// What bind(2) or listen(2) says.
    pub fn give(&mut self, borrower: Borrower, address: Address) -> io::Result<OwnedFd> {
        if let Some(id) = self.inherit(borrower, address, true) {
            return self.members[id].socket.as_fd().try_clone_to_owned();
        }
        let id = self.spare_or_new(borrower, address, Owner::this_process())?;
        if let Err(error) = self.listen_on(id, GIVEN_BACKLOG) {
            self.vacate(id, None);
            return Err(error);
        }
        let member = self.members.get_mut(id).ok_or(io::ErrorKind::NotFound)?;
        member.lend(Loan { listens: true, given: true, ..Loan::new(borrower) });
        member.place = None;
        member.set_min_ttl(MinTtl::default())?;
        member.socket.set_nonblocking(false)?;
        let socket = member.socket.as_fd().try_clone_to_owned()?;
        self.looks.forget(id);
        self.watch(id);
        Ok(socket)
    }

    /// The process of a worker that was given sockets before it started.
    pub fn has_started(&mut self, worker: WorkerId, pid: Pid) {
        self.members.set_pid(worker, pid);
    }

    /// Lends a socket that is bound to the address, and listens already if it had a borrower before. Returns its inode
    /// number.
    ///
    /// # Errors
    /// What bind(2) would have said to the worker; QuotaExceeded, without a number, if it borrows as many as it may.
    pub fn lend(&mut self, borrower: Borrower, request: BindRequest) -> io::Result<u64> {
        let again = self
            .of_ended_process(borrower, request)
            .map_or_else(|| self.members.lent_again(borrower, request), |id| Ok(Some(id)));
        let id = match again {
            Ok(Some(id)) => id,
            Ok(None) if self.has_too_many(borrower, request.address.transport) => {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            Ok(None) => match self.inherit(borrower, request.address, false) {
                Some(id) => id,
                None => match self.sharable(borrower, request) {
                    Some(id) => id,
                    None => self.spare_or_new(borrower, request.address, request.owner)?,
                },
            },
            Err(Overlap(id)) => {
                self.warn_of_given(borrower, id, request.address);
                return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
            }
        };
        let member = self.members.get_mut(id).ok_or(io::ErrorKind::NotFound)?;
        member.socket.set_nonblocking(request.nonblocking)?;
        let loan = member.loan(borrower.worker);
        if loan.is_some_and(|loan| loan.heir.is_some()) {
            return Ok(member.inode); // the rest is as its predecessor has it
        }
        let listens = loan.is_some_and(|loan| loan.given);
        member.set_min_ttl(request.min_ttl)?;
        member.lend(Loan { listens, shares: request.shares, ..Loan::new(borrower) });
        member.place = Some(request.place);
        let inode = member.inode;
        self.closed.forget(id);
        self.looks.forget(id);
        self.watch(id);
        Ok(inode)
    }

    /// Whether a worker borrows as many sockets of TCP, or of UDP, as it may. One that borrows very many, to find a free port
    /// for example, has closed most of them: these are taken back first.
    fn has_too_many(&mut self, borrower: Borrower, transport: Transport) -> bool {
        let max = max_for_each_worker();
        let is_such = |(_, member): &(MemberId, &Member)| member.address.transport == transport;
        let count = |pool: &Self| pool.members.lent_to(borrower.worker).filter(is_such).count();
        let lent = count(self);
        self.unchecked += 1;
        if lent.min(self.unchecked) >= TAKE_BACK_EVERY - 1 {
            self.unchecked = 0;
            self.take_back_closed(borrower);
        }
        lent >= max && count(self) >= max
    }

    fn take_back_closed(&mut self, borrower: Borrower) {
        let lent = self.members.lent_to(borrower.worker);
        let inodes: HashSet<u64> = lent.map(|(_, member)| member.inode).collect();
        let open = open_sockets::open_elsewhere(borrower.pid, &inodes);
        inodes.difference(&open).for_each(|inode| self.take_back(borrower.worker, *inode));
    }

    fn warn_of_given(&mut self, borrower: Borrower, id: MemberId, address: Address) {
        if self.members[id].loan(borrower.worker).is_some_and(|loan| loan.given)
            && let Some(more) = self.warnings.take(Instant::now())
        {
            warn!(
                "worker {} can't bind {address}, since it was given {}: use the same address for -l and in the \
                 program{more}",
                borrower.slot, self.members[id].address
            );
        }
    }

    /// Has a worker that is about to start be the heir of one that hangs: it accepts from the sockets of that one, so that it
    /// takes what waits there. They become its own when it serves.
    pub fn let_inherit(&mut self, heir: WorkerId, of: WorkerId) {
        self.heirs.insert(heir, of);
    }

    /// Has a worker that is about to start share the sockets of others for which that holds, as long as none of them gets
    /// connections.
    pub fn let_share(&mut self, worker: WorkerId) {
        self.sharing.insert(worker);
    }

    /// Makes a worker the heir of the socket that its predecessor, which hangs, has at this address.
    fn inherit(&mut self, borrower: Borrower, address: Address, listens: bool) -> Option<MemberId> {
        let of = *self.heirs.get(&borrower.worker)?;
        let id = self.members.heritable(of, address)?;
        let member = self.members.get_mut(id)?;
        let heir = Some(Heir { of, was_nonblocking: member.socket.nonblocking().ok()? });
        member.lend(Loan { listens, heir, ..Loan::new(borrower) });
        Some(id)
    }

    /// With one queue for a generation, the socket that others of it have. Of two workers that hear of a connection, one is
    /// late: its accept(2) must not wait, because it may have other listeners.
    fn sharable(&self, borrower: Borrower, request: BindRequest) -> Option<MemberId> {
        let shares =
            request.nonblocking && !request.address.is_udp() && self.sharing.contains(&borrower.worker);
        let is_sharing = |worker| self.sharing.contains(&worker) && self.plan.role(worker) == Role::Starting;
        shares.then(|| self.members.sharable(borrower, request.address, is_sharing)).flatten()
    }

    /// # Errors
    /// EADDRINUSE if a foreign listener is in the way, and what bind(2) says.
    fn spare_or_new(&mut self, borrower: Borrower, address: Address, owner: Owner) -> io::Result<MemberId> {
        let spares = self.groups.get(&address).map(|group| group.spares(borrower, &self.members));
        for id in spares.unwrap_or_default() {
            if self.is_left_open(id) || self.members.get(id).is_none() {
                continue; // or it was closed with its address
            }
            if self.members[id].is_limited() {
                debug!("a socket of {address} is closed: its last worker limited who reaches it");
                self.shut_down(id);
                continue;
            }
            let member = &self.members[id];
            if !member.is_free() || !member.listening {
                return Ok(id);
            }
            match self.locate(address, id) {
                Ok(Some(found)) if self.members[found].is_limited() => self.shut_down(found),
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                Err(error) => {
                    debug!("{address}: can't find out where a free listener stands: {error}");
                    break;
                }
            }
        }
        let is_alone = self.look_for_foreign(address).map_err(|listener| {
            if let Some(more) = self.warnings.take(Instant::now()) {
                warn!("{address} is in use: {}{more}", foreign::describe(&listener));
            }
            io::Error::from_raw_os_error(libc::EADDRINUSE)
        })?;
        let id = self.add(address, owner)?;
        if let Some(group) = self.groups.get_mut(&address).filter(|_| is_alone) {
            group.update_foreign(Vec::new(), || self.members.new_id()); // the next look isn't due at once
        }
        Ok(id)
    }

    /// Whether a process that an ended worker left behind has the socket open, or a worker whose bind has failed since. It
    /// may accept connections from it. Such a socket is lent to nobody, so it gets none.
    fn is_left_open(&mut self, id: MemberId) -> bool {
        if self.members.get(id).is_none_or(|member| member.left_by.is_empty()) {
            return false;
        }
        let now = Instant::now();
        if self.left_open.as_ref().is_none_or(|(until, _)| *until < now) {
            let open = open_sockets::holders(&self.members.left_behind());
            self.left_open = Some((Instant::now() + LEFT_OPEN_SHARE * now.elapsed(), open));
        }
        let holder = self.left_open.as_ref().and_then(|(_, open)| open.get(&self.members[id].inode).copied());
        let Some(member) = self.members.get_mut(id) else { return false };
        let Some(pid) = holder else {
            member.left_by.clear();
            return false;
        };
        member.reserved = None;
        self.unserved.add(id);
        let Some(member) = self.members.get_mut(id) else { return false };
        if !mem::replace(&mut member.is_aside, true) {
            warn!(
                "a process that an ended worker left behind has a listener of {} open, which is set aside: {} (pid {pid})",
                member.address,
                procfs::command_line(pid.as_raw() as u32)
            );
        }
        true
    }

    /// The last process of a worker that has ended is gone.
    pub fn nobody_is_left(&mut self, worker: WorkerId) {
        self.members.nobody_is_left(worker);
    }

    /// Whether this worker, or several others, have the address, so that a further socket of it is not another worker's port
    /// by chance.
    pub fn shares(&self, worker: WorkerId, address: Address) -> bool {
        let ids = self.groups.get(&address).map(Group::ids).into_iter().flatten();
        let workers: BTreeSet<WorkerId> = ids.flat_map(|id| self.members[*id].workers()).collect();
        workers.len() > 1 || workers.contains(&worker)
    }

    /// The socket with this inode number, if it is lent to `worker`.
    pub fn lent(&self, worker: WorkerId, inode: u64) -> Option<BorrowedFd<'_>> {
        let member = self.members.get(self.members.id(inode)?)?;
        member.loan(worker).map(|_| member.socket.as_fd())
    }

    /// Whether nobody but its present borrower had the socket with this inode number.
    pub fn is_new(&self, inode: u64) -> bool {
        self.members.id(inode).is_some_and(|id| self.members[id].lends == 1)
    }

    /// Whether the socket with this inode number is lent to `worker` because that has bound its address.
    pub fn is_bound_by(&self, worker: WorkerId, inode: u64) -> bool {
        let member = self.members.id(inode).and_then(|id| self.members.get(id));
        member.and_then(|member| member.loan(worker)).is_some_and(|loan| !loan.given)
    }

    /// Closes a socket that can't be lent any more, although another process may have it open.
    pub(super) fn shut_down(&mut self, id: MemberId) {
        let Some(member) = self.members.get_mut(id) else { return };
        (member.loans, member.reserved) = (Vec::new(), None);
        let address = member.address;
        if member.listening && !address.is_udp() {
            let _ = member.leave(); // or that process has shut it down already
            let mut departed = self.departed();
            departed.entry(address).or_default().insert(id);
            self.have_departed(departed);
        }
        self.remove(id);
        self.close_if_free(address);
    }

    /// The borrower sets IP_MINTTL or for `ipv6` IPV6_MINHOPCOUNT. Returns whether the pool does that later.
    pub fn set_min_ttl(&mut self, inode: u64, ipv6: bool, ttl: u8) -> bool {
        let member = self.members.id(inode).and_then(|id| self.members.get_mut(id));
        member.is_some_and(|member| member.sets_min_ttl(ipv6, ttl))
    }

    /// The borrower sets what limits who may connect, and what can't be taken back.
    pub fn never_lend_again(&mut self, inode: u64) {
        if let Some(member) = self.members.id(inode).and_then(|id| self.members.get_mut(id)) {
            member.limit();
        }
    }

    /// Takes back a socket that never reached the worker, or that it has closed.
    pub fn take_back(&mut self, worker: WorkerId, inode: u64) {
        let Some(id) = self.members.id(inode) else { return };
        if self.members[id].loan(worker).is_none() {
            return;
        }
        if self.members[id].listening {
            self.note_stopped(id, worker);
        }
        self.end_loan(id, worker, None);
    }

    /// Takes back a socket that its borrower has open, although it was not to get it. As long as it has, nobody else gets
    /// the socket.
    pub fn take_back_open(&mut self, worker: WorkerId, inode: u64) {
        self.left_open = None;
        if let Some(member) = self.members.id(inode).and_then(|id| self.members.get_mut(id)) {
            member.left_by.insert(worker);
        }
        self.take_back(worker, inode);
    }

    /// A worker has died. If it will have a `successor`, the next worker of its slot and generation, its sockets are
    /// kept for that. Otherwise they become free, and what is queued on them is reset.
    pub fn release(&mut self, worker: WorkerId, successor: bool) {
        self.handle_events();
        self.left_open = None;
        self.heirs.remove(&worker);
        self.sharing.remove(&worker);
        let lent: Vec<MemberId> = self.members.lent_to(worker).map(|(id, _)| id).collect();
        for id in lent {
            let Some(member) = self.members.get_mut(id) else { continue };
            let Some(Loan { borrower, heir, .. }) = member.loan(worker).copied() else { continue };
            let reserved = (successor && heir.is_none()).then_some(Reserved {
                slot: borrower.slot,
                generation: borrower.generation,
                overdue: false,
            });
            if heir.is_none() {
                member.left_by.insert(worker);
            }
            self.end_loan(id, worker, reserved);
        }
    }

    /// There will be no successor for this slot and generation.
    pub fn unreserve(&mut self, slot: SlotId, generation: u32) {
        for id in self.members.reserved_for(slot, generation) {
            self.vacate(id, None);
        }
    }

    /// The successor for this slot and generation takes long to come. The connections that wait for it are reset, and
    /// so are those that come until then.
    pub fn reset_reserved(&mut self, slot: SlotId, generation: u32) {
        for id in self.members.reserved_for(slot, generation) {
            if let Some(member) = self.members.get_mut(id) {
                if member.address.is_udp() || member.loans.iter().any(|loan| loan.listens) {
                    continue; // nobody can be told to try again, or it takes them
                }
                member.reserved = Some(Reserved { slot, generation, overdue: true });
            }
            self.unserved.add(id);
        }
    }

    /// A worker has a socket no more. If nobody else has, but perhaps its heir, it is `reserved`, or becomes free.
    fn end_loan(&mut self, id: MemberId, worker: WorkerId, reserved: Option<Reserved>) {
        let Some(member) = self.members.get_mut(id) else { return };
        let was_heir = member.loan(worker).is_some_and(|loan| loan.heir.is_some());
        member.end_loan(worker);
        let has_others = member.loans.iter().any(|loan| loan.heir.is_none());
        if !has_others && !was_heir {
            self.vacate(id, reserved);
        }
    }

    /// A socket has no borrower any more, but perhaps an heir. It is `reserved`, or becomes free.
    fn vacate(&mut self, id: MemberId, reserved: Option<Reserved>) {
        self.closed.forget(id);
        let Some(member) = self.members.get_mut(id) else { return };
        if reserved.is_none() {
            member.loans.clear();
        }
        let (address, listening) = (member.address, member.listening);
        // A limited one may be in multicast groups, of which the kernel would go on to give it the packets.
        let is_used_up = address.is_udp() && member.is_limited();
        if !listening || is_used_up && !self.is_left_open(id) {
            self.remove(id);
        } else {
            let Some(member) = self.members.get_mut(id) else { return };
            member.reserved = reserved;
            if reserved.is_none() {
                self.unserved.add(id);
            }
            self.watch(id);
        }
        self.close_if_free(address);
    }
}
