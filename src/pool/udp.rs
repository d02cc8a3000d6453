//! What is different about UDP sockets.
//!
//! A UDP socket is in the kernel's array of its group from its bind on. When its worker connects it, only the peer reaches it,
//! and on most kernels it leaves the array ([`datagrams::leaves_by_connecting`]).
//!
//! A socket that is bound afterwards would make a new group with the connected one, if that still had SO_REUSEPORT
//! (`udp_reuseport_add_sock`), and the kernel would prefer that group. So a connected socket has SO_REUSEADDR instead, and so has
//! each other one during its bind.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use log::{debug, warn};
use nix::unistd::Pid;

use super::{Group, Pool};
use crate::address::Address;
use crate::ids::{MemberId, WorkerId};
use crate::kernel::search::Seen;
use crate::kernel::{datagrams, open_sockets};
use crate::pool::member::{Member, Owner};
use crate::pool::watcher::Interest;

impl Pool {
    /// Looks whether workers still have the sockets that they got, or to which datagrams came, a while ago, and has the next
    /// datagram reported.
    pub(super) fn look_at_datagram_sockets(&mut self, now: Instant) {
        let due = self.looks.take_due(now);
        let addresses: BTreeSet<Address> =
            due.iter().filter_map(|id| Some(self.members.get(*id)?.address)).collect();
        for address in addresses {
            self.find_connected(address);
        }
        for id in due {
            let Some(member) = self.members.get(id).filter(|member| member.is_lent()) else { continue };
            let is_gone = match member.place {
                Some(_) => member.look() == Seen::Gone,
                None => member.loans.iter().all(|loan| !is_open_below(loan.borrower.pid, member.inode)), // it was given
            };
            match is_gone {
                true => self.closed.looked(id, Seen::Gone, now),
                false => self.await_datagram(id, now),
            }
        }
    }

    /// Has epoll report what matters of a UDP socket that a worker has, or will, or of one that has yet to be emptied. Returns
    /// whether it is one.
    pub(super) fn watch_datagrams(&mut self, id: MemberId, now: Instant) -> bool {
        let Some(member) = self.members.get(id).filter(|member| member.address.is_udp()) else {
            return false;
        };
        match (member.is_free(), self.unserved.contains(id)) {
            (false, _) if !self.looks.has(id) => {
                self.looks.begin(id, now);
                self.await_datagram(id, now);
            }
            (false, _) => {}
            (true, is_noted) if is_noted || member.is_limited() => {
                self.watcher.forget(id, member.socket.as_fd());
                self.looks.forget(id);
            }
            (true, _) => return false,
        }
        true
    }

    /// Has epoll report the next datagram.
    pub(super) fn await_datagram(&mut self, id: MemberId, now: Instant) {
        let Some(member) = self.members.get(id) else { return };
        if self.watcher.watch(id, member.socket.as_fd(), Interest::Datagram).is_err() {
            self.looks.begin(id, now); // for all that is known
        }
    }

    /// A datagram has come, or an error. Nobody reads those of a free socket.
    pub(super) fn datagram_came(&mut self, id: MemberId, now: Instant) {
        let Some(member) = self.members.get(id) else { return };
        self.watcher.forget(id, member.socket.as_fd());
        if !member.is_free() {
            return self.looks.begin(id, now);
        }
        let address = member.address;
        self.unserved.add(id);
        self.find_connected(address); // that may be why
    }

    /// The worker that borrowed a UDP socket has it. If others are ready, it gets no datagram until [`Pool::steer`] sends it
    /// some.
    ///
    /// # Errors
    /// NotFound if there is no such socket.
    pub fn receive(&mut self, worker: WorkerId, inode: u64) -> io::Result<Address> {
        let id = self.members.id(inode).ok_or(io::ErrorKind::NotFound)?;
        self.serve(worker, id)
    }

    /// Notes which sockets of an address workers have connected since the last call. They have left its group, in an unknown
    /// order, and so has the one that was just `closed`. Returns whether there are any.
    fn note_left(&mut self, address: Address, closed: Option<MemberId>) -> bool {
        let ids = self.groups.get(&address).map(|group| group.ids().clone()).unwrap_or_default();
        let is_connected = |id: &MemberId| self.members[*id].listening && self.members[*id].is_connected();
        let connected: BTreeSet<MemberId> = ids.into_iter().filter(is_connected).collect();
        let leaves = datagrams::leaves_by_connecting(address.socket);
        let left = connected.iter().copied().filter(|_| leaves).chain(closed).collect();
        if let Some(group) = self.groups.get_mut(&address) {
            group.left(&left);
        }
        for id in &connected {
            debug!("a socket of {address} is connected to one peer by its worker");
            let Some(member) = self.members.get_mut(*id) else { continue };
            member.listening = false;
            let set =
                member.socket.set_reuse_address(true).and_then(|()| member.socket.set_reuse_port(false));
            if let Err(error) = set {
                warn!("can't keep a connected socket of {address} out of its group: {error}");
            }
            if leaves {
                self.remove(*id); // it is its worker's alone, which may close it
            }
        }
        self.must_steer |= !connected.is_empty();
        !connected.is_empty()
    }

    /// Finds out which sockets of an address workers have connected. Returns whether there are new ones.
    pub(super) fn find_connected(&mut self, address: Address) -> bool {
        let is_any = self.note_left(address, None);
        if is_any {
            self.close_if_free(address);
        }
        is_any
    }

    /// A socket was closed, which epoll doesn't report.
    pub(super) fn has_closed(&mut self, id: MemberId, address: Address) {
        if self.groups.get(&address).is_some_and(|group| group.has_place(id)) {
            self.note_left(address, Some(id));
        }
    }

    /// Makes a new socket that joins the group of its address.
    ///
    /// # Errors
    /// What bind(2) says; EAGAIN if workers connect their sockets all the time.
    pub(super) fn bind_datagrams(&mut self, address: Address, owner: Owner) -> io::Result<MemberId> {
        const TRIES: usize = 10;
        self.update_foreign_if_due(address);
        self.find_connected(address);
        for _ in 0..TRIES {
            let id = self.members.bind(address, owner)?;
            if !self.find_connected(address) {
                return Ok(id);
            }
            self.members.remove(id); // it may be in a group with one that was connected a moment ago
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    /// Whether a worker may have datagrams to answer.
    pub fn gets_datagrams(&self, worker: WorkerId) -> bool {
        let is_such = |member: &Member| member.address.is_udp() && !self.is_private(member.address);
        self.members.lent_to(worker).any(|(_, member)| is_such(member))
    }

    /// Whether a worker that is retired is alone among several with a UDP port: it may send from it. What comes there is
    /// for it, until it ends.
    pub(super) fn is_private(&self, address: Address) -> bool {
        let ids = self.groups.get(&address).filter(|_| address.is_udp()).map(Group::ids);
        let members = || ids.into_iter().flatten().map(|id| &self.members[*id]);
        let workers: BTreeSet<WorkerId> = members().flat_map(Member::workers).collect();
        let is_retired = |worker: &WorkerId| self.plan.role(*worker).is_leaving();
        workers.len() == 1
            && workers.iter().all(is_retired)
            && self.plan.roles.len() > 1
            && members().all(|member| member.is_lent() && member.reserved.is_none())
    }
}

/// Whether a process or one of its descendants has a socket open; also if that can't be known.
fn is_open_below(pid: Pid, inode: u64) -> bool {
    pid.as_raw() == 0 || !open_sockets::first_holders(pid, &|other| other == inode).is_empty()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

    use super::*;
    use crate::address::Transport;
    use crate::steering::load::Balancing;

    /// A pool with five sockets of an address.
    fn pool() -> (Pool, Address, Vec<MemberId>) {
        let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = Address::new((Ipv4Addr::UNSPECIFIED, port).into(), false, 0).over(Transport::Udp);
        let mut pool = Pool::new(Balancing::Load).unwrap();
        let ids = (0..5).map(|_| pool.add(address, Owner::this_process()).unwrap()).collect();
        (pool, address, ids)
    }

    fn connect(pool: &Pool, id: MemberId) {
        let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
        pool.members[id].socket.connect(&nobody.into()).unwrap();
    }

    fn is_known(pool: &Pool, address: Address, id: MemberId) -> bool {
        pool.groups[&address].knows_place(id)
    }

    #[test]
    fn the_order_in_which_sockets_were_connected_is_unknown() {
        let (mut pool, address, ids) = pool();
        assert!(ids.iter().all(|id| is_known(&pool, address, *id)));
        connect(&pool, ids[2]);
        connect(&pool, ids[1]);
        assert!(pool.note_left(address, None) && !pool.note_left(address, None));
        assert!(pool.members.get(ids[1]).is_none() && pool.members.get(ids[2]).is_none());
        let known: Vec<bool> = ids.iter().map(|id| is_known(&pool, address, *id)).collect();
        assert_eq!(known, [true, false, false, false, false]);
    }

    #[test]
    fn a_socket_may_have_been_connected_before_another_one_was_closed_or_after() {
        let (mut pool, address, ids) = pool();
        connect(&pool, ids[2]);
        pool.remove(ids[1]);
        let known: Vec<bool> = ids.iter().map(|id| is_known(&pool, address, *id)).collect();
        assert_eq!(known, [true, false, false, false, false]);
        assert!(!pool.note_left(address, None), "it was noticed");
    }
}
