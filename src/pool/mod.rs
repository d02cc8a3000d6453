//! The pool: the listening sockets, which belong to the wrapper and are lent to workers.
//!
//! All sockets of one [`Address`] form one reuseport group of the kernel. A socket stays in its group
//! when its borrower dies, steered around, and is lent again; so nothing that is queued on it is lost,
//! and the group's array, into which the steering program points, keeps its order. When nobody borrows a
//! socket of an address any more and no replacement is awaited, the whole group is closed, and the
//! address refuses connections as it would without us.

pub mod accept_queues;
pub mod paths;
pub mod unintercepted;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use socket2::{Domain, Protocol, Socket, Type};

use self::accept_queues::Queues;
use crate::address::Address;
use crate::ids::{Borrower, MemberId, SlotId, WorkerId};
use crate::kernel::procfs;
use crate::kernel::sockdiag::{self, Listener, SockDiag};
use crate::kernel::sys;
use crate::steering::load::{Balance, Balancing, Change, Load};
use crate::steering::{self, Order, Plan, Role, Share, Steer, Targets};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Free,
    /// The borrower died; the next worker of the same slot and generation inherits the socket.
    Reserved {
        slot: SlotId,
        generation: u32,
        /// Whether that takes so long that connections had better not wait for it.
        overdue: bool,
    },
    Lent(Borrower),
}

impl Holder {
    fn is_reserved_for(&self, slot: SlotId, generation: u32) -> bool {
        matches!(self, Self::Reserved { slot: s, generation: g, .. } if (*s, *g) == (slot, generation))
    }
}

#[derive(Debug)]
struct Member {
    address: Address,
    socket: Socket,
    inode: u64,
    holder: Holder,
    /// In the group's array, which is: listening.
    listening: bool,
    /// Whether it takes no handshake.
    held: bool,
    /// Whether the borrower had asked for SO_REUSEPORT itself.
    shares: bool,
    /// Whether the borrower was given it at its start, and has it again if it binds the address.
    given: bool,
}

#[derive(Debug, Default)]
struct Group {
    members: BTreeSet<MemberId>,
    order: Order,
    /// What the attached program chooses from.
    targets: Option<Targets>,
    /// Members that belong to other programs, by inode number.
    strangers: BTreeMap<u32, MemberId>,
    /// When these were last looked for.
    looked_at: Option<Instant>,
}

/// What a worker's own socket was like, to be carried over to the one that takes its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    pub address: Address,
    pub nonblocking: bool,
    /// Whether SO_REUSEPORT was set, so that the worker may bind the address several times.
    pub shares: bool,
}

/// A worker has shut its listener down, or closed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoppedListening {
    pub worker: WorkerId,
    pub address: Address,
}

/// How many sockets a worker borrows before it is looked which of them it has closed again.
const MANY: usize = 64;
/// How long a look for strangers is good for while workers begin to listen.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long a connection waits to be accepted before it is looked whether anyone is there to accept it.
const QUEUE_STANDS: Duration = Duration::from_secs(1);
/// How long later it is looked again whether a listener is closed and its worker lives.
const CLOSED_STANDS: Duration = Duration::from_millis(200);
/// How often accept queues are looked at while connections come.
const LOOK_AT_LOAD_EVERY: Duration = Duration::from_millis(2);
/// Of sockets that workers are given, as systemd has it (systemd.socket(5)).
const GIVEN_BACKLOG: i32 = 4096;
/// Nobody is ever queued on a free socket; a borrower sets its own backlog.
const SPARE_BACKLOG: i32 = 1;

/// What the pool's epoll says when the queues are to be looked at.
const QUEUES: u64 = u64::MAX;
const TOLD_ONCE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLONESHOT);

#[derive(Debug)]
pub struct Pool {
    members: BTreeMap<MemberId, Member>,
    groups: BTreeMap<Address, Group>,
    inodes: HashMap<u64, MemberId>,
    next: MemberId,
    /// Tells which listeners were shut down (EPOLLHUP), on which of those that nobody borrows a connection
    /// waits (EPOLLIN), and when the queues of the others are to be looked at.
    epoll: Epoll,
    queues: Queues,
    balancing: Balancing,
    /// All are free in it when `balancing` is random.
    balance: Balance,
    /// When to look whether a listener is closed whose queue stands.
    checks: BTreeMap<MemberId, Instant>,
    /// Those of them that were closed at the last look.
    closed: BTreeSet<MemberId>,
    /// When to try again to reset what waits on a socket that nobody borrows.
    retries: BTreeMap<MemberId, Instant>,
    /// Sockets that nobody borrows and on which connections may wait, for [`Pool::reset_unserved`].
    unserved: BTreeSet<MemberId>,
    stopped: Vec<StoppedListening>,
    plan: Plan,
}

impl Pool {
    pub fn new(balancing: Balancing) -> io::Result<Self> {
        let every = match balancing {
            Balancing::Load => LOOK_AT_LOAD_EVERY,
            Balancing::Random => CLOSED_STANDS,
        };
        let (epoll, queues) = (Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, Queues::new(every)?);
        epoll.add(&queues, EpollEvent::new(TOLD_ONCE, QUEUES))?;
        Ok(Self {
            members: BTreeMap::new(),
            groups: BTreeMap::new(),
            inodes: HashMap::new(),
            next: MemberId(0),
            epoll,
            queues,
            balancing,
            balance: Balance::default(),
            checks: BTreeMap::new(),
            retries: BTreeMap::new(),
            closed: BTreeSet::new(),
            unserved: BTreeSet::new(),
            stopped: Vec::new(),
            plan: Plan::default(),
        })
    }

    /// Lends a socket that listens on `address` already, for a worker that is about to start. It gets no
    /// connection before [`Pool::steer`] says so.
    ///
    /// # Errors
    /// What bind(2) or listen(2) says.
    pub fn give(&mut self, borrower: Borrower, address: Address) -> io::Result<OwnedFd> {
        let id = match self.spare(borrower, address) {
            Some(id) => id,
            None => {
                self.refuse_stranger(address)?;
                self.add(address)?
            }
        };
        let listens = match self.members[&id].listening {
            true => self.members[&id].socket.listen(GIVEN_BACKLOG), // it may have been one with a short queue
            false => self.begin_to_listen(id, GIVEN_BACKLOG),
        };
        if let Err(error) = listens {
            self.vacate(id, None);
            return Err(error);
        }
        let member = self.members.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        member.holder = Holder::Lent(borrower);
        member.given = true;
        member.socket.set_nonblocking(false)?;
        let socket = member.socket.as_fd().try_clone_to_owned()?;
        self.watch(id);
        Ok(socket)
    }

    /// Takes an address before the first worker starts, which is then given this socket.
    ///
    /// # Errors
    /// Why it can't be had, in one line.
    pub fn take(&mut self, address: Address) -> io::Result<()> {
        let cannot = |why: String| io::Error::other(format!("can't listen on {address}: {why}"));
        if let Some(stranger) = self.first_stranger(address) {
            return Err(cannot(format!("it is in use, {}", describe(&stranger))));
        }
        let Err(error) = self.add(address) else { return Ok(()) };
        Err(cannot(match error.kind() {
            io::ErrorKind::PermissionDenied if address.socket.port() < procfs::first_unprivileged_port() => {
                format!("{error}; such a port takes root or CAP_NET_BIND_SERVICE")
            }
            io::ErrorKind::AddrNotAvailable => format!("{error}; it is not one of this machine's"),
            _ => error.to_string(),
        }))
    }

    /// The process of a worker that was given sockets before it started.
    pub fn has_started(&mut self, worker: WorkerId, pid: Pid) {
        for member in self.members.values_mut() {
            match &mut member.holder {
                Holder::Lent(borrower) if borrower.worker == worker => borrower.pid = pid,
                _ => {}
            }
        }
    }

    /// Lends a socket bound to `wish.address`, listening already if it had a borrower before, and returns
    /// its inode number.
    ///
    /// # Errors
    /// What bind(2) would have said to the worker.
    pub fn lend(&mut self, borrower: Borrower, wish: Wish) -> io::Result<u64> {
        self.take_back_closed(borrower);
        let id = match self.own_socket_again(borrower, wish)? {
            Some(id) => id,
            None => match self.spare(borrower, wish.address) {
                Some(id) => id,
                None => {
                    self.refuse_stranger(wish.address)?;
                    self.add(wish.address)?
                }
            },
        };
        let Some(member) = self.members.get_mut(&id) else { return Err(io::ErrorKind::NotFound.into()) };
        member.socket.set_nonblocking(wish.nonblocking)?;
        member.given = false;
        member.holder = Holder::Lent(borrower);
        member.shares = wish.shares;
        let inode = member.inode;
        self.watch(id);
        Ok(inode)
    }

    /// The socket of this address that the worker borrowed earlier and has closed since, unheard.
    ///
    /// # Errors
    /// EADDRINUSE when the worker has an overlapping socket open and didn't ask to share both.
    fn own_socket_again(&self, borrower: Borrower, wish: Wish) -> io::Result<Option<MemberId>> {
        let mut again = None;
        for (id, member) in self.lent_to(borrower.worker) {
            if !member.address.overlaps(&wish.address) || member.shares && wish.shares {
                continue;
            }
            if member.given && member.address == wish.address {
                return Ok(Some(id));
            }
            if procfs::is_open_elsewhere(borrower.pid, member.inode) {
                if member.given {
                    warn!(
                        "worker {} can't bind {}, since it was given {}: have -l and the program name the same \
                         address",
                        borrower.slot, wish.address, member.address
                    );
                }
                return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
            }
            if member.address == wish.address {
                again = Some(id);
            }
        }
        Ok(again)
    }

    /// A worker that has borrowed very many sockets, to find a free port say, has closed most of them.
    fn take_back_closed(&mut self, borrower: Borrower) {
        let inodes: HashSet<u64> = self.lent_to(borrower.worker).map(|(_, member)| member.inode).collect();
        if inodes.len() % MANY == MANY - 1 {
            let open = procfs::open_elsewhere(borrower.pid, &inodes);
            inodes.difference(&open).for_each(|inode| self.take_back(*inode));
        }
    }

    /// A socket of the pool that the borrower may have: the one that its predecessor in slot and
    /// generation died with, or else one that is nobody's.
    fn spare(&self, borrower: Borrower, address: Address) -> Option<MemberId> {
        let group = self.groups.get(&address)?;
        let find = |wanted: &dyn Fn(&Holder) -> bool| {
            group.members.iter().copied().find(|id| wanted(&self.members[id].holder))
        };
        find(&|holder| holder.is_reserved_for(borrower.slot, borrower.generation))
            .or_else(|| find(&|holder| *holder == Holder::Free))
    }

    /// Checks, before the first bind of an address, that no other process listens where it would be in
    /// the way. The kernel would let a program of the same user that asks for SO_REUSEPORT share the port
    /// in silence. (To bind and see is no check: connections in TIME_WAIT are in its way as well.)
    ///
    /// # Errors
    /// EADDRINUSE.
    fn refuse_stranger(&self, address: Address) -> io::Result<()> {
        match self.first_stranger(address) {
            Some(stranger) => {
                warn!("{address} is in use: {}", describe(&stranger));
                Err(io::Error::from_raw_os_error(libc::EADDRINUSE))
            }
            None => Ok(()),
        }
    }

    fn first_stranger(&self, address: Address) -> Option<Listener> {
        if self.groups.contains_key(&address) {
            return None;
        }
        let strangers = self.strangers(address);
        let strangers =
            strangers.inspect_err(|error| debug!("can't look who else listens on {address}: {error}"));
        strangers.ok()?.into_iter().next()
    }

    /// The listeners that overlap with an address and are not of this pool.
    fn strangers(&self, address: Address) -> io::Result<Vec<Listener>> {
        let mut listeners = SockDiag::new()?.listeners(address.socket.port())?;
        let ours = |listener: &Listener| self.inodes.contains_key(&listener.inode.into());
        listeners.retain(|listener| listener.address.overlaps(&address) && !ours(listener));
        Ok(listeners)
    }

    /// Looks for programs that have come to share an address since it was first bound. They are told of
    /// once, and get no connection, since the program doesn't name them.
    pub fn look_for_strangers(&mut self) {
        for address in self.groups.keys().copied().collect::<Vec<_>>() {
            self.note_strangers(address);
        }
    }

    /// Brings the model of a group's array up to date with the members that aren't ours.
    fn note_strangers(&mut self, address: Address) {
        let uid = nix::unistd::geteuid().as_raw();
        let Ok(strangers) = self.strangers(address) else { return };
        let Some(group) = self.groups.get_mut(&address) else { return };
        group.looked_at = Some(Instant::now());
        // Of those, only the ones in the same group take a place in its array.
        let in_group = |stranger: &Listener| stranger.address == address && stranger.uid == uid;
        let strangers: BTreeMap<u32, Listener> =
            strangers.into_iter().filter(in_group).map(|stranger| (stranger.inode, stranger)).collect();
        let gone = group.strangers.iter().filter(|(inode, _)| !strangers.contains_key(inode));
        let gone: BTreeSet<MemberId> = gone.map(|(_, id)| *id).collect();
        group.strangers.retain(|_, id| !gone.contains(id));
        group.order.leave(&gone);
        for (inode, stranger) in strangers {
            if let Entry::Vacant(entry) = group.strangers.entry(inode) {
                warn!("{address} is shared by another program, which gets nothing: {}", describe(&stranger));
                group.order.push(*entry.insert(self.next));
                self.next = MemberId(self.next.0 + 1);
            }
        }
    }

    /// Makes a new socket and binds it.
    fn add(&mut self, address: Address) -> io::Result<MemberId> {
        let domain = if address.socket.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        if address.socket.is_ipv6() {
            socket.set_only_v6(address.v6only)?;
        }
        socket.bind(&address.socket.into())?;
        let inode = procfs::inode(socket.as_fd())?;
        let id = self.next;
        self.next = MemberId(id.0 + 1);
        let holder = Holder::Free;
        let (listening, held, shares, given) = (false, false, false, false);
        self.members.insert(id, Member { address, socket, inode, holder, listening, held, shares, given });
        self.inodes.insert(inode, id);
        self.groups.entry(address).or_default().members.insert(id);
        Ok(id)
    }

    /// Takes a socket back that never reached its borrower, or that the borrower has closed.
    pub fn take_back(&mut self, inode: u64) {
        let Some(id) = self.inodes.get(&inode).copied() else { return };
        let Some(Member { address, holder: Holder::Lent(borrower), listening, .. }) = self.members.get(&id)
        else {
            return;
        };
        if *listening {
            self.stopped.push(StoppedListening { worker: borrower.worker, address: *address });
        }
        self.vacate(id, None);
    }

    /// The socket with this inode number, if it is lent to `worker`.
    pub fn lent(&self, worker: WorkerId, inode: u64) -> Option<BorrowedFd<'_>> {
        let member = self.members.get(self.inodes.get(&inode)?)?;
        matches!(member.holder, Holder::Lent(b) if b.worker == worker).then(|| member.socket.as_fd())
    }

    /// Does listen(2) for the worker that borrowed the socket. It gets no connection before
    /// [`Pool::steer`] says so.
    ///
    /// # Errors
    /// What listen(2) would have said to the worker.
    pub fn listen(&mut self, inode: u64, backlog: i32) -> io::Result<Address> {
        let id = *self.inodes.get(&inode).ok_or(io::ErrorKind::NotFound)?;
        self.note_departures(None);
        if self.members.get(&id).is_some_and(|member| !member.listening) {
            self.begin_to_listen(id, backlog)?;
        }
        let member = self.members.get(&id).ok_or(io::ErrorKind::NotFound)?;
        member.socket.listen(backlog)?; // of one that listens already it sets the backlog
        Ok(member.address)
    }

    fn begin_to_listen(&mut self, id: MemberId, backlog: i32) -> io::Result<()> {
        // A stranger that joined before has its place before; but a thousand workers that start at once
        // are not each worth a look.
        let address = self.members.get(&id).ok_or(io::ErrorKind::NotFound)?.address;
        if self
            .groups
            .get(&address)
            .and_then(|group| group.looked_at)
            .is_none_or(|at| at.elapsed() > LOOK_EVERY)
        {
            self.note_strangers(address);
        }
        let member = self.members.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        member.hold()?;
        // The array's order is that of the calls: what was known to have left before comes first, and what
        // is found to have left after may have done so on either side of this one.
        member.socket.listen(backlog)?;
        member.listening = true;
        self.note_departures(Some(id));
        self.watch(id);
        Ok(())
    }

    /// Takes from the model of each group what has left its array, and adds `newcomer`, which began to
    /// listen since the last call.
    fn note_departures(&mut self, newcomer: Option<MemberId>) {
        let mut departed: BTreeMap<Address, BTreeSet<MemberId>> = BTreeMap::new();
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            let count = self.epoll.wait(&mut ready, EpollTimeout::ZERO).unwrap_or(0);
            for event in &ready[..count] {
                if event.data() == QUEUES {
                    self.queues.begin(Instant::now());
                    continue;
                }
                let id = MemberId(event.data() as u32);
                let Some(member) = self.members.get_mut(&id) else { continue };
                if !member.listening {
                    // A worker may bind a socket to connect from it. With a duplicate here its close would
                    // end nothing, so the socket is let go as soon as it is, or becomes, a connection.
                    if sockdiag::listen_info(member.socket.as_fd())
                        .is_ok_and(|info| !info.closed && !info.listening)
                    {
                        let address = member.address;
                        self.remove(id);
                        self.close_if_unserved(address);
                    }
                } else if event.events().intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                    let _ = self.epoll.delete(&member.socket);
                    self.queues.forget(id, member.socket.as_fd());
                    self.balance.forget(id);
                    member.listening = false;
                    departed.entry(member.address).or_default().insert(id);
                } else {
                    self.unserved.insert(id);
                    self.watch(id);
                }
            }
            if count < ready.len() {
                break;
            }
        }
        if let Some(id) = newcomer {
            let address = self.members[&id].address;
            let others = departed.remove(&address).unwrap_or_default();
            self.group(address, &others).order.push_while_leaving(id, &others);
            self.forget_departed(&others);
        }
        for (address, ids) in departed {
            self.group(address, &ids).order.leave(&ids);
            self.forget_departed(&ids);
        }
    }

    /// The group of an address, to be told of those that left it: with the last of them the kernel drops
    /// the program, so that it has to be attached anew.
    fn group(&mut self, address: Address, left: &BTreeSet<MemberId>) -> &mut Group {
        let group = self.groups.entry(address).or_default();
        if !left.is_empty() {
            group.targets = None;
        }
        group
    }

    /// Tells of workers that shut their listeners down, and drops such sockets that nobody has.
    fn forget_departed(&mut self, ids: &BTreeSet<MemberId>) {
        for id in ids {
            let Some(member) = self.members.get(id) else { continue };
            match member.holder {
                Holder::Lent(Borrower { worker, .. }) => {
                    self.stopped.push(StoppedListening { worker, address: member.address });
                }
                Holder::Free | Holder::Reserved { .. } => self.remove(*id),
            }
        }
    }

    fn remove(&mut self, id: MemberId) {
        self.checks.remove(&id);
        self.closed.remove(&id);
        self.retries.remove(&id);
        self.unserved.remove(&id);
        if let Some(member) = self.members.remove(&id) {
            // A worker may have a duplicate yet, and then its end takes nothing out of an epoll.
            let _ = self.epoll.delete(&member.socket);
            self.queues.forget(id, member.socket.as_fd());
            self.balance.forget(id);
            self.inodes.remove(&member.inode);
            if let Some(group) = self.groups.get_mut(&member.address) {
                group.members.remove(&id);
            }
        }
    }

    /// When to call [`Pool::look_at_queues`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.queues.deadline().into_iter().chain(self.retries.values().copied()).min()
    }

    /// Looks who takes connections and who doesn't, when it is time to, and steers accordingly. Returns whether
    /// anything has changed.
    pub fn look_at_queues(&mut self, now: Instant) -> bool {
        let due: Vec<MemberId> =
            self.retries.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        for id in due {
            self.retries.remove(&id);
            self.watch(id); // it tells at once if connections wait still
        }
        if self.queues.deadline().is_none_or(|at| at > now) {
            return false;
        }
        let begun = cpu_time();
        let lengths = self.queues.look(now, |id| self.members.get(&id).map(|member| member.socket.as_fd()));
        let changed = self.balancing == Balancing::Load && self.weigh(&lengths, now);
        let found = self.take_back_unheard(&lengths, now);
        if self.queues.rests() {
            let armed = self.epoll.modify(&self.queues, &mut EpollEvent::new(TOLD_ONCE, QUEUES));
            armed.unwrap_or_else(|error| warn!("can't watch accept queues: {error}"));
        }
        if changed {
            self.steer_all();
        }
        // With a suspect somebody may be spared, unless something waits everywhere: then nobody is better off.
        let suspected = self.balance.has_suspects(now) && self.queues.has_empty();
        let soon = suspected || self.balance.leaves_out(self.queues.len(), now);
        let took = cpu_time().saturating_sub(begun);
        self.queues.has_looked(took, soon, self.balance.has_busy(), now);
        changed || found
    }

    /// Finds out from the queues of ready workers how these are off. Returns whether that has changed.
    fn weigh(&mut self, lengths: &BTreeMap<MemberId, u32>, now: Instant) -> bool {
        let borrower = |id: &MemberId| match self.members.get(id)?.holder {
            Holder::Lent(borrower) => Some(borrower),
            Holder::Free | Holder::Reserved { .. } => None,
        };
        let is_ready = |id: &MemberId| {
            let role = borrower(id).map(|borrower| self.plan.role(borrower.worker));
            matches!(role, Some(Role::Ready | Role::Canary))
        };
        let lengths =
            lengths.iter().filter(|(id, _)| is_ready(id)).map(|(id, length)| (*id, *length)).collect();
        let is_busy = |id| procfs::is_busy(borrower(&id)?.pid);
        let changes = self.balance.look(&lengths, is_busy, now);
        changes.iter().for_each(|(id, change)| self.tell(*id, *change));
        changes.iter().any(|(_, change)| *change != Change::StuckLong)
    }

    fn tell(&self, id: MemberId, change: Change) {
        let Some(Member { address, holder: Holder::Lent(borrower), .. }) = self.members.get(&id) else {
            return;
        };
        match change {
            Change::To(Load::Stuck, _) => debug!("{borrower} takes no connections on {address}: spared"),
            Change::To(Load::Busy, _) => debug!("{borrower} is busy: spared"),
            Change::To(Load::Free, lasted) if lasted >= accept_queues::LONG => {
                info!("{borrower} takes connections on {address} again, after {:.1} s", lasted.as_secs_f64());
            }
            Change::To(Load::Free, _) => debug!("{borrower} is spared no more"),
            Change::StuckLong => {
                info!(
                    "{borrower} has taken no connection on {address} for {} s",
                    accept_queues::LONG.as_secs()
                );
            }
        }
    }

    /// Finds out which workers have closed a listener and live on. The wrapper's duplicate keeps it open,
    /// so that only a queue that stands shows it, and /proc proves it. Such a socket becomes nobody's.
    /// Returns whether there is one.
    fn take_back_unheard(&mut self, lengths: &BTreeMap<MemberId, u32>, now: Instant) -> bool {
        let mut found = false;
        self.checks.retain(|id, _| lengths.contains_key(id));
        for id in lengths.keys() {
            let check = self.checks.entry(*id).or_insert(now + QUEUE_STANDS);
            let Some(Member { inode, holder: Holder::Lent(Borrower { pid, .. }), .. }) = self.members.get(id)
            else {
                continue;
            };
            if *check > now {
                continue;
            }
            let is_closed = !procfs::is_open_elsewhere(*pid, *inode);
            *check = now + if is_closed { CLOSED_STANDS } else { QUEUE_STANDS };
            // A worker that ends closes its sockets a moment before its end is told.
            let was_closed = if is_closed { !self.closed.insert(*id) } else { !self.closed.remove(id) };
            if is_closed && was_closed {
                self.take_back(*inode);
                found = true;
            }
        }
        self.closed.retain(|id| lengths.contains_key(id));
        found
    }

    /// Has epoll tell what matters of a listening socket: that it was shut down, and that a connection
    /// waits on it, of one that is lent by way of the queues.
    ///
    /// Of a socket that is bound only, each change of state. (Level-triggered, it would tell without end
    /// that it is closed.)
    fn watch(&mut self, id: MemberId) {
        let Some(member) = self.members.get(&id) else { return };
        let flags = match member.holder {
            _ if !member.listening => EpollFlags::EPOLLOUT | EpollFlags::EPOLLET,
            _ if self.retries.contains_key(&id) || self.unserved.contains(&id) => EpollFlags::empty(),
            Holder::Reserved { overdue: false, .. } | Holder::Lent(_) => EpollFlags::empty(),
            Holder::Free | Holder::Reserved { overdue: true, .. } => EpollFlags::EPOLLIN,
        };
        let is_lent = matches!(member.holder, Holder::Lent(_));
        let mut event = EpollEvent::new(flags, u64::from(id.0));
        let watched = self.epoll.modify(&member.socket, &mut event).or_else(|_| {
            let event = EpollEvent::new(flags, u64::from(id.0));
            self.epoll.add(&member.socket, event)
        });
        let watched = watched.map_err(io::Error::from).and_then(|()| match is_lent && member.listening {
            true => self.queues.watch(id, member.socket.as_fd()),
            false => {
                self.queues.forget(id, member.socket.as_fd());
                self.balance.forget(id);
                Ok(())
            }
        });
        if let Err(error) = watched {
            warn!("can't watch a listener of {}: {error}", member.address);
        }
    }

    /// A worker has died: its sockets are kept for its successor, the next worker of its slot and
    /// generation, or else become nobody's and what is queued on them is reset.
    pub fn release(&mut self, worker: WorkerId, successor: bool) {
        self.note_departures(None);
        let lent: Vec<MemberId> = self.lent_to(worker).map(|(id, _)| id).collect();
        for id in lent {
            let reserve = match self.members[&id].holder {
                Holder::Lent(Borrower { slot, generation, .. }) if successor => {
                    Some(Holder::Reserved { slot, generation, overdue: false })
                }
                _ => None,
            };
            self.vacate(id, reserve);
        }
    }

    /// No successor will come for what was kept for this slot and generation.
    pub fn unreserve(&mut self, slot: SlotId, generation: u32) {
        for id in self.reserved_for(slot, generation) {
            self.vacate(id, None);
        }
    }

    /// The successor for this slot and generation is long in coming: what waits for it is reset, and what
    /// comes meanwhile as well.
    pub fn reset_reserved(&mut self, slot: SlotId, generation: u32) {
        for id in self.reserved_for(slot, generation) {
            if let Some(member) = self.members.get_mut(&id) {
                member.holder = Holder::Reserved { slot, generation, overdue: true };
            }
            self.unserved.insert(id);
        }
    }

    fn reserved_for(&self, slot: SlotId, generation: u32) -> Vec<MemberId> {
        let reserved = |member: &Member| member.holder.is_reserved_for(slot, generation);
        self.members.iter().filter(|(_, member)| reserved(member)).map(|(id, _)| *id).collect()
    }

    fn vacate(&mut self, id: MemberId, reserve: Option<Holder>) {
        let Some(member) = self.members.get_mut(&id) else { return };
        let address = member.address;
        if !member.listening {
            self.remove(id);
        } else if let Some(reserved) = reserve {
            member.holder = reserved;
            self.watch(id);
        } else {
            member.holder = Holder::Free;
            self.unserved.insert(id);
            self.watch(id);
        }
        self.close_if_unserved(address);
    }

    /// Resets what waits on sockets that nobody borrows, so that the clients learn at once that they have to
    /// try again. Returns how many there were on which address. Call it when new connections are steered
    /// away from such sockets: what came until then is lost.
    pub fn reset_unserved(&mut self) -> Vec<(Address, usize)> {
        let unserved = mem::take(&mut self.unserved);
        let reset = unserved.into_iter().filter_map(|id| self.reset_queue(id)).collect::<Vec<_>>();
        reset.into_iter().filter(|(_, connections)| *connections > 0).collect()
    }

    fn reset_queue(&mut self, id: MemberId) -> Option<(Address, usize)> {
        let member = self.members.get(&id).filter(|member| !matches!(member.holder, Holder::Lent(_)))?;
        let (address, (connections, result)) = (member.address, member.reset_queue());
        if let Err(error) = result {
            // Without a free fd, say, they stay in the queue, and to look again at once would be in vain.
            warn!("can't reset what waits on {address}: {error}");
            self.retries.insert(id, Instant::now() + QUEUE_STANDS);
        }
        self.watch(id);
        Some((address, connections))
    }

    /// Closes an address when no worker borrows a socket of it and no replacement is awaited.
    fn close_if_unserved(&mut self, address: Address) {
        let Some(group) = self.groups.get(&address) else { return };
        let unserved = group.members.iter().all(|id| self.members[id].holder == Holder::Free);
        if unserved {
            debug!("{address} is closed: no worker has it any more");
            for id in self.groups.remove(&address).unwrap_or_default().members {
                self.remove(id);
            }
        }
    }

    /// Has the kernel send new connections where [`steering::decide`] wants them by this plan, from now until the
    /// next one. All new connections of an address change over in one system call.
    pub fn steer(&mut self, plan: Plan) {
        self.plan = plan;
        self.steer_all();
    }

    fn steer_all(&mut self) {
        self.note_departures(None);
        for address in self.groups.keys().copied().collect::<Vec<_>>() {
            let steered = self
                .steer_group(address)
                .and_then(|lacking| (0..lacking).try_for_each(|_| self.add_spare(address)));
            if let Err(error) = steered {
                warn!("can't steer {address}: {error}");
            }
        }
    }

    /// Returns how many spare members the group lacks: see [`steering::spares_lacking`].
    fn steer_group(&mut self, address: Address) -> io::Result<usize> {
        let Some(group) = self.groups.get_mut(&address) else { return Ok(0) };
        let listening = |id: &MemberId| self.members[id].listening;
        let ids: Vec<MemberId> = group.members.iter().copied().filter(listening).collect();
        let role = |id: &MemberId| match self.members[id].holder {
            Holder::Free => Role::Free,
            Holder::Reserved { .. } => Role::Reserved,
            Holder::Lent(borrower) => self.plan.role(borrower.worker),
        };
        let roles: Vec<Role> = ids.iter().map(role).collect();
        let load = |id| self.balance.load(id);
        let last = group.apply(&ids, &steering::decide(&roles), self.plan.share, load, &mut self.members)?;
        let leaving = roles.iter().filter(|s| matches!(s, Role::Draining | Role::Leaving)).count();
        Ok(steering::spares_lacking(group.order.len(), last, leaving))
    }

    /// Adds a member that is nobody's, at the end of the array.
    fn add_spare(&mut self, address: Address) -> io::Result<()> {
        let id = self.add(address)?;
        self.begin_to_listen(id, SPARE_BACKLOG)
    }

    /// Which workers have stopped listening since the last call; `told` is whether [`Pool::as_fd`] became readable.
    pub fn stopped_listening(&mut self, told: bool) -> Vec<StoppedListening> {
        if told {
            self.note_departures(None);
        }
        mem::take(&mut self.stopped)
    }

    /// Whether there is something to call [`Pool::stopped_listening`] or [`Pool::reset_unserved`] for.
    pub fn has_news(&self) -> bool {
        !self.stopped.is_empty() || !self.unserved.is_empty()
    }

    /// Whether no connection waits to be accepted by the worker.
    pub fn accept_queues_are_empty(&self, worker: WorkerId) -> bool {
        self.lent_to(worker).all(|(_, member)| {
            sockdiag::listen_info(member.socket.as_fd())
                .map_or(true, |info| info.accept_queue == 0 || !info.listening)
        })
    }

    /// How many connections wait to be accepted by the worker.
    pub fn accept_queue(&self, worker: WorkerId) -> u32 {
        let infos =
            self.lent_to(worker).filter_map(|(_, member)| sockdiag::listen_info(member.socket.as_fd()).ok());
        infos.filter(|info| info.listening).map(|info| info.accept_queue).sum()
    }

    /// How the worker is off, on the address where it is worst.
    pub fn load(&self, worker: WorkerId) -> Load {
        self.lent_to(worker).map(|(id, _)| self.balance.load(id)).max().unwrap_or(Load::Free)
    }

    fn lent_to(&self, worker: WorkerId) -> impl Iterator<Item = (MemberId, &Member)> {
        let lent = move |member: &Member| matches!(member.holder, Holder::Lent(b) if b.worker == worker);
        self.members.iter().filter(move |(_, member)| lent(member)).map(|(id, member)| (*id, member))
    }
}

impl AsFd for Pool {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl Group {
    /// Has the kernel do what is decided for each of `ids`, and of those that are to be named name the ones that
    /// are best off. Returns the last index that may be named.
    fn apply(
        &mut self,
        ids: &[MemberId],
        decided: &[Steer],
        share: Share,
        load: impl Fn(MemberId) -> Load,
        members: &mut BTreeMap<MemberId, Member>,
    ) -> io::Result<Option<u32>> {
        let are = |steer| ids.iter().zip(decided).filter(move |(_, s)| **s == steer).map(|(id, _)| *id);
        let named: BTreeSet<MemberId> = are(Steer::Named).collect();
        let tried: BTreeSet<MemberId> = are(Steer::Tried).collect();
        for id in named.union(&tried) {
            members.get_mut(id).map_or(Ok(()), Member::let_go)?;
        }
        let (all_named, all_tried) = (self.order.indices(&named), self.order.indices(&tried));
        let last = all_named.last().max(all_tried.last()).copied();
        // Without anyone to name the program stays.
        if let Some(any) = named.first() {
            let aim = |members: &BTreeSet<MemberId>, all: Vec<u32>| {
                let best = steering::best_off(members, &load);
                if best.len() == members.len() {
                    return all;
                }
                let indices = self.order.indices(&best);
                if indices.is_empty() { all } else { indices }
            };
            let (named, mut tried) = (aim(&named, all_named), aim(&tried, all_tried));
            if named.is_empty() {
                tried.clear(); // a share of nothing known would be everything
            }
            let targets = Targets { named, tried, share };
            if self.targets.as_ref() != Some(&targets) {
                sys::attach_reuseport_cbpf(members[any].socket.as_fd(), &steering::program(&targets))?;
                let Targets { named, tried, share } = &targets;
                let (address, of) = (members[any].address, self.order.len());
                match tried.is_empty() {
                    true => debug!("{address}: new connections go to {named:?} of {of}"),
                    false => {
                        debug!("{address}: new connections go to {named:?}, {share} to {tried:?} of {of}");
                    }
                }
                self.targets = Some(targets);
            }
        }
        for id in are(Steer::Held) {
            members.get_mut(&id).map_or(Ok(()), Member::hold)?;
        }
        Ok(last)
    }
}

impl Member {
    /// Has the socket take no handshake: its SYN is dropped, and the client sends it again after a second.
    ///
    /// No packet arrives with the time to live that this asks for, but from a neighbour that sends with 255.
    /// (A socket filter could tell a SYN exactly, but new kernels want CAP_NET_ADMIN for one on TCP.) What
    /// is accepted inherits the limit; so this is for sockets to which no handshake is under way.
    fn hold(&mut self) -> io::Result<()> {
        if !self.held {
            self.set_min_ttl(u8::MAX)?;
            self.held = true;
        }
        Ok(())
    }

    fn let_go(&mut self) -> io::Result<()> {
        if self.held {
            self.set_min_ttl(0)?;
            self.held = false;
        }
        Ok(())
    }

    fn set_min_ttl(&self, ttl: u8) -> io::Result<()> {
        if self.address.socket.is_ipv6() {
            sys::set_min_ttl(self.socket.as_fd(), true, ttl)?;
        }
        if !self.address.v6only {
            sys::set_min_ttl(self.socket.as_fd(), false, ttl)?; // of an IPv6 socket: for clients over IPv4
        }
        Ok(())
    }

    /// Accepts what waits and closes it with a reset. Returns how many there were, and what kept it from
    /// going on until none was left.
    fn reset_queue(&self) -> (usize, io::Result<()>) {
        if let Err(error) = self.socket.set_nonblocking(true) {
            return (0, Err(error));
        }
        let mut connections = 0;
        loop {
            match self.socket.accept() {
                Ok((connection, _)) => {
                    // A linger time of zero makes close(2) send a reset (socket(7)).
                    let _ = connection.set_linger(Some(Duration::ZERO));
                    connections += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return (connections, Ok(())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return (connections, Err(error)),
            }
        }
    }
}

fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn describe(stranger: &Listener) -> String {
    match procfs::socket_owner(stranger.inode.into()) {
        Some((pid, command)) => format!("{command} (pid {pid}) listens on {}", stranger.address),
        None => format!("a process of user {} listens on {}", stranger.uid, stranger.address),
    }
}
