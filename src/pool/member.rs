//! The pool's sockets, and who borrows each of them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::Shutdown;
use std::ops::Index;
use std::os::fd::{AsFd, BorrowedFd};

use nix::unistd::{Pid, getegid, geteuid};
use socket2::{Domain, Protocol, Socket, Type};

use crate::address::{Address, Transport};
use crate::ids::{Borrower, MemberId, SlotId, WorkerId};
use crate::kernel::search::{Place, Seen};
use crate::kernel::sockdiag::{self, ListenInfo};
use crate::kernel::{datagrams, open_sockets, procfs, sys};
use crate::steering::{Plan, Role};

/// What a worker asks for by bind(2), with what its own socket was like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BindRequest {
    pub address: Address,
    pub nonblocking: bool,
    /// Whether SO_REUSEPORT was set, or for UDP SO_REUSEADDR, so that the worker may bind the address several times.
    pub shares: bool,
    pub min_ttl: MinTtl,
    pub owner: Owner,
    /// The descriptor that is bound.
    pub place: Place,
}

/// The user and group that a socket is made for: its packets belong to them (`meta skuid` of nft(8)), and all sockets of a
/// reuseport group have one user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

impl Owner {
    pub fn this_process() -> Self {
        Self { uid: geteuid().as_raw(), gid: getegid().as_raw() }
    }
}

/// IP_MINTTL (ip(7)) and IPV6_MINHOPCOUNT: packets that came a longer way are dropped. 0 is any way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MinTtl {
    /// For clients over IPv4, also on an IPv6 socket.
    pub v4: u8,
    pub v6: u8,
}

impl MinTtl {
    /// Only a neighbour that sends with 255 reaches the socket.
    const NOBODY: Self = Self { v4: u8::MAX, v6: u8::MAX };

    /// # Errors
    /// Those of getsockopt(2).
    pub fn of(socket: BorrowedFd, is_ipv6: bool) -> io::Result<Self> {
        let of = |ipv6| match sys::min_ttl(socket, ipv6) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(0), // MPTCP has neither
            limit => limit,
        };
        Ok(Self { v4: of(false)?, v6: if is_ipv6 { of(true)? } else { 0 } })
    }
}

/// That a worker has a socket of the pool.
#[derive(Debug, Clone, Copy)]
pub struct Loan {
    pub borrower: Borrower,
    /// Whether it has called listen(2), or was given the socket. A program may bind a socket only to keep its port, and
    /// accept from another one.
    pub listens: bool,
    /// Whether it was given the socket at its start. If it binds the address, it gets this socket again.
    pub given: bool,
    /// Whether it asked for SO_REUSEPORT itself.
    pub shares: bool,
    /// The borrower succeeds a worker that hangs: it accepts what waits on that one's socket, which becomes its own when it
    /// serves.
    pub heir: Option<Heir>,
}

#[derive(Debug, Clone, Copy)]
pub struct Heir {
    /// The worker that hangs.
    pub of: WorkerId,
    /// O_NONBLOCK of the socket before. Both have the same open file description.
    pub was_nonblocking: bool,
}

/// The borrower died. Its successor, the next worker of the same slot and generation, inherits the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    pub slot: SlotId,
    pub generation: u32,
    /// Whether the successor takes so long that connections shouldn't wait for it.
    pub overdue: bool,
}

/// A socket of the pool.
#[derive(Debug)]
pub struct Member {
    pub address: Address,
    pub socket: Socket,
    pub inode: u64,
    /// Where a borrower had it when that was last looked for.
    pub place: Option<Place>,
    /// The workers that have it. Several are of one generation, but for heirs.
    pub loans: Vec<Loan>,
    pub reserved: Option<Reserved>,
    /// Whether it listens, and so is in the array of its reuseport group.
    pub listening: bool,
    /// Whether it drops SYNs.
    held: bool,
    /// What the borrower wants. While the socket is held, the kernel has another value.
    min_ttl: MinTtl,
    /// SO_BINDTODEVICE of the new socket. A program of the system may set it too (`ip vrf exec`).
    device: u32,
    /// Whether a borrower has set what can't be taken back.
    is_limited: bool,
    /// The borrowers that have ended, if they or processes that they left behind may have the socket open.
    pub left_by: BTreeSet<WorkerId>,
    /// Whether it was logged that somebody has it open.
    pub is_aside: bool,
    /// How often it was lent.
    pub lends: u32,
    /// Of the last call of listen(2).
    pub backlog: i32,
}

impl Member {
    /// A new socket that is bound to `address`, and belongs to `owner` if this process may give it away.
    ///
    /// # Errors
    /// Those of socket(2), setsockopt(2) and bind(2).
    fn bind(address: Address, owner: Owner) -> io::Result<Self> {
        let domain = if address.socket.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
        let (kind, protocol) = match address.transport {
            Transport::Tcp => (Type::STREAM, Protocol::TCP),
            Transport::Udp => (Type::DGRAM, Protocol::UDP),
        };
        let new = || Socket::new(domain, kind, Some(protocol));
        let socket =
            if owner == Owner::this_process() { new() } else { sys::with_fsids(owner.uid, owner.gid, new) }?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        if address.socket.is_ipv6() {
            socket.set_only_v6(address.v6only)?;
        }
        if address.device != 0 {
            let device = address.device as i32;
            sys::set_socket_option(socket.as_fd(), libc::SOL_SOCKET, sys::SO_BINDTOIFINDEX, device)?;
        }
        socket.bind(&address.socket.into())?;
        if address.is_udp() {
            socket.set_reuse_address(false)?; // any user's program could take the packets (socket(7))
        }
        let inode = procfs::inode(socket.as_fd())?;
        let device = sys::bound_device(socket.as_fd())?;
        Ok(Self {
            address,
            device,
            socket,
            inode,
            place: None,
            loans: Vec::new(),
            reserved: None,
            listening: false,
            held: false,
            min_ttl: MinTtl::default(),
            is_limited: false,
            left_by: BTreeSet::new(),
            is_aside: false,
            lends: 0,
            backlog: 0,
        })
    }

    pub fn is_lent(&self) -> bool {
        !self.loans.is_empty()
    }

    /// Whether it has no borrower, or only heirs.
    pub fn is_unserved(&self) -> bool {
        self.loans.iter().all(|loan| loan.heir.is_some())
    }

    /// The slot of the worker that borrows it, or will.
    pub fn slot(&self) -> Option<SlotId> {
        let borrower = self.loans.first().map(|loan| loan.borrower.slot);
        borrower.or(self.reserved.map(|reserved| reserved.slot))
    }

    /// Whether nobody borrows it and no successor is awaited.
    pub fn is_free(&self) -> bool {
        !self.is_lent() && self.reserved.is_none()
    }

    /// The workers that have it.
    pub fn workers(&self) -> impl Iterator<Item = WorkerId> {
        self.loans.iter().map(|loan| loan.borrower.worker)
    }

    pub fn loan(&self, worker: WorkerId) -> Option<&Loan> {
        self.loans.iter().find(|loan| loan.borrower.worker == worker)
    }

    pub fn loan_mut(&mut self, worker: WorkerId) -> Option<&mut Loan> {
        self.loans.iter_mut().find(|loan| loan.borrower.worker == worker)
    }

    /// Whether the worker, to which it is lent, listens on this address by it.
    pub fn is_listener_on(&self, worker: WorkerId, address: Address) -> bool {
        self.listening && self.address == address && self.loan(worker).is_some_and(|loan| loan.listens)
    }

    pub fn is_reserved_for(&self, slot: SlotId, generation: u32) -> bool {
        self.reserved.is_some_and(|reserved| (reserved.slot, reserved.generation) == (slot, generation))
    }

    /// The role of its most important borrower.
    pub fn role(&self, plan: &Plan) -> Role {
        const BEFORE_RESERVED: [Role; 2] = [Role::Ready, Role::Canary];
        const OTHERS: [Role; 2] = [Role::Leaving, Role::Starting];
        let is_there = |role: &Role| self.loans.iter().any(|loan| loan.role(plan) == *role);
        let reserved = self.reserved.map(|_| Role::Reserved);
        let first = BEFORE_RESERVED.into_iter().find(is_there);
        first.or(reserved).or_else(|| OTHERS.into_iter().find(is_there)).unwrap_or(Role::Free)
    }

    /// How many borrowers get connections by this plan.
    pub fn serving(&self, plan: &Plan) -> usize {
        self.loans.iter().filter(|loan| loan.role(plan).is_served()).count()
    }

    /// Whether another worker of its generation may share it, because all that have it share theirs.
    fn may_be_shared_with(&self, borrower: Borrower, is_sharing: &impl Fn(WorkerId) -> bool) -> bool {
        let is_sibling = |loan: &Loan| {
            let other = loan.borrower;
            other.generation == borrower.generation
                && other.worker != borrower.worker
                && is_sharing(other.worker)
        };
        self.is_lent() && self.reserved.is_none() && self.loans.iter().all(is_sibling)
    }

    /// The heir that serves by this plan gets the socket. Returns whether there is one.
    fn succeed(&mut self, plan: &Plan) -> bool {
        let serves = |loan: &&mut Loan| loan.heir.is_some() && loan.role(plan) == Role::Ready;
        let Some(loan) = self.loans.iter_mut().find(serves) else { return false };
        let Some(heir) = loan.heir.take() else { return false };
        self.reserved = None;
        if self.loan(heir.of).is_some() {
            self.left_by.insert(heir.of);
            self.loans.retain(|loan| loan.borrower.worker != heir.of);
        }
        true
    }

    /// A worker gets it, or gets it again.
    pub fn lend(&mut self, loan: Loan) {
        self.loans.retain(|other| other.borrower.worker != loan.borrower.worker);
        self.loans.push(loan);
        if loan.heir.is_none() {
            self.reserved = None;
        }
        self.lends += 1;
    }

    /// The worker has gone, or hasn't got the socket.
    pub fn end_loan(&mut self, worker: WorkerId) {
        if let Some(heir) = self.loan(worker).and_then(|loan| loan.heir) {
            let _ = self.socket.set_nonblocking(heir.was_nonblocking);
        }
        self.loans.retain(|loan| loan.borrower.worker != worker);
    }

    /// Whether it is at its place; not if that is unknown. A worker that has yet to be started has it.
    pub fn look(&self) -> Seen {
        match self.place {
            _ if self.loans.iter().any(|loan| loan.borrower.pid.as_raw() == 0) => Seen::Here,
            Some(place) => place.look(self.inode),
            None => Seen::Gone,
        }
    }

    /// Does listen(2). A UDP socket has no such call: it is in the array of its group from its bind on.
    ///
    /// # Errors
    /// Those of listen(2).
    pub fn listen(&mut self, backlog: i32) -> io::Result<()> {
        if !self.address.is_udp() {
            self.socket.listen(backlog)?;
        }
        (self.listening, self.backlog) = (true, backlog);
        Ok(())
    }

    /// Leaves the array of its group, with all connections that wait. It may listen again.
    ///
    /// # Errors
    /// Those of shutdown(2).
    pub fn leave(&mut self) -> io::Result<()> {
        self.listening = false;
        self.socket.shutdown(Shutdown::Both)
    }

    /// Whether connections or datagrams wait for a borrower.
    pub fn is_awaited(&self) -> bool {
        match self.address.transport {
            Transport::Tcp => self.listen_info().is_ok_and(|info| info.accept_queue > 0 && info.listening),
            Transport::Udp => datagrams::wait(self.socket.as_fd()),
        }
    }

    /// Whether its borrower has connected it, so that only one peer reaches it.
    pub fn is_connected(&self) -> bool {
        self.address.is_udp() && self.socket.peer_addr().is_ok()
    }

    /// The state of the socket.
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn listen_info(&self) -> io::Result<ListenInfo> {
        sockdiag::listen_info(self.socket.as_fd())
    }

    /// Makes the socket drop SYNs. The client sends its SYN again after a second.
    ///
    /// The socket drops all packets whose time to live is below 255: all except those of a neighbour that sends with
    /// 255. (A socket filter could tell a SYN exactly, but new kernels ask for CAP_NET_ADMIN to attach one to a TCP
    /// socket.) Accepted connections inherit the limit, so no handshake may be under way on the socket. It means nothing
    /// to a UDP socket.
    ///
    /// # Errors
    /// Those of getsockopt(2) and setsockopt(2).
    pub fn hold(&mut self) -> io::Result<()> {
        if !self.held && !self.address.is_udp() {
            self.min_ttl = self.current_min_ttl()?;
            self.apply_min_ttl(MinTtl::NOBODY)?;
            self.held = true;
        }
        Ok(())
    }

    /// Makes the socket take SYNs again.
    ///
    /// # Errors
    /// Those of getsockopt(2) and setsockopt(2).
    pub fn resume(&mut self) -> io::Result<()> {
        if self.held {
            // Without interception the borrower may have set its own meanwhile.
            let (wanted, current) = (self.min_ttl, self.current_min_ttl()?);
            let or_current = |wanted, current| if current == u8::MAX { wanted } else { current };
            let (v4, v6) = (or_current(wanted.v4, current.v4), or_current(wanted.v6, current.v6));
            self.apply_min_ttl(MinTtl { v4, v6 })?;
            self.held = false;
        }
        Ok(())
    }

    /// Sets what the borrower wants. If the socket is held, it comes into force when it no longer is.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_min_ttl(&mut self, min_ttl: MinTtl) -> io::Result<()> {
        self.min_ttl = min_ttl;
        self.apply_min_ttl(if self.held { MinTtl::NOBODY } else { min_ttl })
    }

    /// The borrower sets one of both itself. Returns whether the wrapper does that later, since the socket is held.
    pub fn sets_min_ttl(&mut self, ipv6: bool, ttl: u8) -> bool {
        *(if ipv6 { &mut self.min_ttl.v6 } else { &mut self.min_ttl.v4 }) = ttl;
        self.held
    }

    fn current_min_ttl(&self) -> io::Result<MinTtl> {
        MinTtl::of(self.socket.as_fd(), self.address.socket.is_ipv6())
    }

    fn apply_min_ttl(&self, MinTtl { v4, v6 }: MinTtl) -> io::Result<()> {
        if self.address.socket.is_ipv6() {
            sys::set_min_ttl(self.socket.as_fd(), true, v6)?;
        }
        sys::set_min_ttl(self.socket.as_fd(), false, v4)
    }

    /// From now on nobody else can have the socket.
    pub fn limit(&mut self) {
        self.is_limited = true;
    }

    /// Whether a borrower has set, or done, what the next one must not have.
    pub fn is_limited(&self) -> bool {
        let socket = self.socket.as_fd();
        let is_as_new = sys::bound_device(socket).is_ok_and(|device| device == self.device)
            && sys::has_filter(socket).is_ok_and(|has| !has);
        let is_of_one = self.address.is_udp() && (self.is_connected() || datagrams::is_shut_down(socket));
        self.is_limited || !is_as_new || is_of_one
    }
}

impl Loan {
    pub fn new(borrower: Borrower) -> Self {
        Self { borrower, listens: false, given: false, shares: false, heir: None }
    }

    /// An heir has none until that worker gets no more connections.
    fn role(&self, plan: &Plan) -> Role {
        let waits = |heir: Heir| !matches!(plan.role(heir.of), Role::Leaving | Role::Starting);
        match self.listens && !self.heir.is_some_and(waits) {
            true => plan.role(self.borrower.worker),
            false => Role::Starting,
        }
    }
}

/// A socket that is in the way of a bind.
#[derive(Debug)]
pub struct Overlap(pub MemberId);

/// All sockets of the pool.
#[derive(Debug, Default)]
pub struct Members {
    by_id: BTreeMap<MemberId, Member>,
    ids: HashMap<u64, MemberId>,
    next: u32,
}

impl Members {
    /// An id that no member had before.
    pub fn new_id(&mut self) -> MemberId {
        self.next += 1;
        MemberId(self.next - 1)
    }

    /// Adds a new socket that is bound to `address`, and that nobody borrows.
    ///
    /// # Errors
    /// Those of socket(2), setsockopt(2) and bind(2).
    pub fn bind(&mut self, address: Address, owner: Owner) -> io::Result<MemberId> {
        let member = Member::bind(address, owner)?;
        let id = self.new_id();
        self.ids.insert(member.inode, id);
        self.by_id.insert(id, member);
        Ok(id)
    }

    pub fn remove(&mut self, id: MemberId) -> Option<Member> {
        let member = self.by_id.remove(&id)?;
        self.ids.remove(&member.inode);
        Some(member)
    }

    pub fn get(&self, id: MemberId) -> Option<&Member> {
        self.by_id.get(&id)
    }

    pub fn get_mut(&mut self, id: MemberId) -> Option<&mut Member> {
        self.by_id.get_mut(&id)
    }

    /// The member with this inode number.
    pub fn id(&self, inode: u64) -> Option<MemberId> {
        self.ids.get(&inode).copied()
    }

    pub fn lent_to(&self, worker: WorkerId) -> impl Iterator<Item = (MemberId, &Member)> {
        self.iter().filter(move |(_, member)| member.loan(worker).is_some())
    }

    /// A worker's socket of this address that has no heir.
    pub fn heritable(&self, worker: WorkerId, address: Address) -> Option<MemberId> {
        let is_one = |member: &Member| {
            let has_heir = member.loans.iter().any(|loan| loan.heir.is_some());
            !has_heir && member.is_listener_on(worker, address) && !member.is_limited()
        };
        self.lent_to(worker).find(|(_, member)| is_one(member)).map(|(id, _)| id)
    }

    /// A socket of this address that workers of the same generation have which share theirs.
    pub fn sharable(
        &self,
        borrower: Borrower,
        address: Address,
        is_sharing: impl Fn(WorkerId) -> bool,
    ) -> Option<MemberId> {
        let is_one = |member: &Member| {
            member.address == address
                && member.may_be_shared_with(borrower, &is_sharing)
                && !member.is_limited()
        };
        self.iter().find(|(_, member)| is_one(member)).map(|(id, _)| id)
    }

    /// The heirs that serve by this plan get their sockets. Returns these.
    pub fn succeed(&mut self, plan: &Plan) -> Vec<MemberId> {
        self.by_id.iter_mut().filter_map(|(id, member)| member.succeed(plan).then_some(*id)).collect()
    }

    /// The socket of this address that the worker was given, or that it borrowed earlier and has closed since.
    ///
    /// # Errors
    /// If the worker has an overlapping socket open and didn't ask to share both.
    pub fn lent_again(&self, borrower: Borrower, request: BindRequest) -> Result<Option<MemberId>, Overlap> {
        let mut again = None;
        for (id, member) in self.lent_to(borrower.worker) {
            let Some(loan) = member.loan(borrower.worker) else { continue };
            if !member.address.overlaps(&request.address) || loan.shares && request.shares {
                continue;
            }
            if loan.given && member.address == request.address {
                return Ok(Some(id));
            }
            let is_open = match member.loans.len() > 1 {
                true => !open_sockets::first_holders(borrower.pid, &|inode| inode == member.inode).is_empty(),
                false => open_sockets::is_open_elsewhere(borrower.pid, member.inode),
            };
            if is_open {
                return Err(Overlap(id));
            }
            if member.address == request.address {
                again = Some(id);
            }
        }
        Ok(again)
    }

    pub fn reserved_for(&self, slot: SlotId, generation: u32) -> Vec<MemberId> {
        let reserved = self.iter().filter(|(_, member)| member.is_reserved_for(slot, generation));
        reserved.map(|(id, _)| id).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (MemberId, &Member)> {
        self.by_id.iter().map(|(id, member)| (*id, member))
    }

    /// The inode numbers of the sockets that processes may have open which ended workers have left behind.
    pub fn left_behind(&self) -> HashSet<u64> {
        self.by_id.values().filter(|member| !member.left_by.is_empty()).map(|member| member.inode).collect()
    }

    /// No process of an ended worker lives any more.
    pub fn nobody_is_left(&mut self, worker: WorkerId) {
        for member in self.by_id.values_mut() {
            member.left_by.remove(&worker);
        }
    }

    /// Notes the process of a worker that was lent sockets before it was started.
    pub fn set_pid(&mut self, worker: WorkerId, pid: Pid) {
        for loan in self.by_id.values_mut().filter_map(|member| member.loan_mut(worker)) {
            loan.borrower.pid = pid;
        }
    }
}

impl Index<MemberId> for Members {
    type Output = Member;

    /// Panics if there is no such member: for ids that were just found here or in a group.
    fn index(&self, id: MemberId) -> &Member {
        &self.by_id[&id]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: &str = "127.0.0.1:0";

    fn worker(number: u32, generation: u32) -> Borrower {
        Borrower { worker: WorkerId(number), pid: Pid::this(), slot: SlotId(number), generation }
    }

    fn listening(number: u32) -> Loan {
        Loan { listens: true, ..Loan::new(worker(number, 1)) }
    }

    fn heir(number: u32, of: u32) -> Loan {
        Loan { heir: Some(Heir { of: WorkerId(of), was_nonblocking: false }), ..listening(number) }
    }

    fn plan<const N: usize>(roles: [(u32, Role); N]) -> Plan {
        Plan { roles: roles.map(|(id, role)| (WorkerId(id), role)).into(), ..Plan::default() }
    }

    fn member(loans: impl IntoIterator<Item = Loan>) -> Member {
        let address = Address::new(ANY.parse().unwrap(), false, 0);
        let mut member = Member::bind(address, Owner::this_process()).unwrap();
        loans.into_iter().for_each(|loan| member.lend(loan));
        member
    }

    #[test]
    fn a_socket_of_several_workers_serves_as_long_as_one_of_them_does() {
        use Role::{Canary, Free, Leaving, Ready, Starting};
        let mut member = member([listening(1), listening(2), Loan::new(worker(3, 1))]);
        let role = |member: &Member, first, second, third| {
            let plan = plan([(1, first), (2, second), (3, third)]);
            (member.role(&plan), member.serving(&plan))
        };
        assert_eq!(role(&member, Ready, Ready, Ready), (Ready, 2), "the third doesn't listen");
        assert_eq!(role(&member, Ready, Leaving, Leaving), (Ready, 1));
        assert_eq!(role(&member, Canary, Canary, Canary), (Canary, 2));
        assert_eq!(role(&member, Leaving, Leaving, Starting), (Leaving, 0));
        assert_eq!(role(&member, Starting, Starting, Ready), (Starting, 0));
        [1, 2, 3].into_iter().for_each(|id| member.end_loan(WorkerId(id)));
        assert_eq!(role(&member, Ready, Ready, Ready), (Free, 0));
        member.reserved = Some(Reserved { slot: SlotId(1), generation: 1, overdue: false });
        assert_eq!(role(&member, Ready, Ready, Ready), (Role::Reserved, 0));
        assert!(!member.is_free() && member.is_unserved());
    }

    #[test]
    fn an_heir_counts_when_its_predecessor_gets_no_more_connections_and_then_the_socket_is_its_own() {
        use Role::{Leaving, Ready, Starting};
        let mut member = member([listening(1), heir(2, 1)]);
        let before = plan([(1, Ready), (2, Starting)]);
        assert_eq!((member.role(&before), member.serving(&before)), (Ready, 1));
        assert!(!member.succeed(&before) && member.loans.len() == 2);
        assert_eq!(member.role(&plan([(1, Leaving), (2, Starting)])), Leaving);
        let after = plan([(1, Leaving), (2, Ready)]);
        assert_eq!((member.role(&after), member.serving(&after)), (Ready, 1));
        assert!(member.succeed(&after));
        assert!(member.loan(WorkerId(1)).is_none() && member.left_by.contains(&WorkerId(1)));
        assert!(member.loan(WorkerId(2)).is_some_and(|loan| loan.heir.is_none()));
    }

    #[test]
    fn a_worker_that_has_yet_to_be_started_has_what_it_was_given() {
        let mut loan = listening(1);
        loan.borrower.pid = Pid::from_raw(0);
        assert_eq!(member([loan]).look(), Seen::Here);
        assert_eq!(member([listening(1)]).look(), Seen::Gone, "the place is unknown");
    }

    #[test]
    fn a_socket_is_shared_within_a_generation_by_workers_that_share_theirs() {
        let member = member([listening(1), Loan::new(worker(2, 1))]);
        let may = |number, generation, sharing: &[u32]| {
            member.may_be_shared_with(worker(number, generation), &|other| sharing.contains(&other.0))
        };
        assert!(may(3, 1, &[1, 2]));
        assert!(!may(2, 1, &[1, 2]), "a second socket of its own");
        assert!(!may(3, 2, &[1, 2]), "another generation");
        assert!(!may(3, 1, &[1]) && !may(3, 1, &[2]));
    }
}
