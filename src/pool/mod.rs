//! The pool: listening sockets that belong to the wrapper and are lent to workers.
//!
//! All sockets of one [`Address`] form one reuseport group of the kernel. When the borrower of a socket dies, the socket
//! stays in its group, new connections are steered around it, and it is lent again. So no queued connection is lost, and
//! the kernel's array of the group, into which the steering program points, keeps its order. When nobody borrows a
//! socket of an address any more and no successor is awaited, the whole group is closed. Then the address refuses
//! connections, as it would without the wrapper.
//!
//! [`Pool`] is the face of this room; [`lend`] lends and takes back. [`member`] owns the sockets, [`group`] the model of a group, [`watcher`] the epoll,
//! [`accept_queues`] the samples, [`closed`] and [`unserved`] what is wrong with some sockets; [`foreign`] finds other
//! programs' listeners. [`paths`] is the pool's counterpart for Unix sockets, and [`unintercepted`] finds listeners where
//! workers can't be intercepted.

pub mod accept_queues;
mod closed;
mod closing;
mod files;
mod foreign;
mod group;
mod lend;
mod looks;
mod member;
mod path_clients;
pub mod paths;
mod reach;
mod steer;
mod udp;
pub mod unintercepted;
mod unserved;
mod watcher;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use nix::sys::epoll::EpollFlags;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use self::accept_queues::Sample;
use self::closed::ClosedListeners;
use self::closing::Ongoing;
use self::group::Group;
use self::looks::Looks;
pub use self::member::{BindRequest, MinTtl, Owner};
use self::member::{Loan, Member, Members, Reserved};
pub use self::reach::Reach;
use self::unserved::Unserved;
use self::watcher::{Interest, Watcher};
use crate::address::{Address, Transport};
use crate::ids::{MemberId, WorkerId};
use crate::kernel::duplicate::close_without_waiting;
use crate::kernel::{procfs, scheduling};
use crate::output::seldom::Seldom;
use crate::steering::Plan;
use crate::steering::load::{Balancing, Change, LONG, Load, LoadTracker, Turn};
use crate::steering::spread::Spread;

/// A worker has shut down or closed its last listener on an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoppedListening {
    pub worker: WorkerId,
    pub address: Address,
}

/// The backlog of a new socket that nobody borrows. A borrower sets its own.
const SPARE_BACKLOG: i32 = 1;

#[derive(Debug)]
pub struct Pool {
    members: Members,
    groups: BTreeMap<Address, Group>,
    watcher: Watcher,
    looks: Looks,
    balancing: Balancing,
    /// All members are free in it if `balancing` is random.
    tracker: LoadTracker,
    spread: Spread,
    /// Whether connections should go to other workers than they do.
    must_steer: bool,
    closed: ClosedListeners,
    /// The search for some of them.
    search: Option<Ongoing>,
    unserved: Unserved,
    /// What workers can do again and again.
    warnings: Seldom,
    /// How many binds there were since it was last found out which sockets a worker has closed.
    unchecked: usize,
    /// Which sockets processes have open that ended workers have left behind, and until when that is good enough.
    left_open: Option<(Instant, HashMap<u64, Pid>)>,
    /// The workers that share sockets with each other.
    sharing: BTreeSet<WorkerId>,
    /// Workers that start, and their predecessors, which hang.
    heirs: BTreeMap<WorkerId, WorkerId>,
    /// For [`Pool::stopped_listening`].
    stopped: Vec<StoppedListening>,
    /// The sockets of several workers that one of them has shut down.
    shut: Vec<MemberId>,
    plan: Plan,
}

impl Pool {
    /// # Errors
    /// Those of epoll_create(2) and epoll_ctl(2).
    pub fn new(balancing: Balancing) -> io::Result<Self> {
        let sample_interval = match balancing {
            Balancing::Load | Balancing::Queue => accept_queues::SOON,
            // Samples then show only closed listeners, and those that may have been stuck for long.
            Balancing::Random | Balancing::Client => closed::SAMPLE_INTERVAL,
        };
        let mut watcher = Watcher::new(sample_interval)?;
        if balancing == Balancing::Load {
            watcher.heed_connections();
        }
        Ok(Self {
            members: Members::default(),
            groups: BTreeMap::new(),
            watcher,
            looks: Looks::default(),
            balancing,
            tracker: LoadTracker::new(balancing),
            spread: Spread::new(),
            must_steer: false,
            closed: ClosedListeners::default(),
            search: None,
            unserved: Unserved::default(),
            warnings: Seldom::default(),
            unchecked: 0,
            left_open: None,
            sharing: BTreeSet::new(),
            heirs: BTreeMap::new(),
            stopped: Vec::new(),
            shut: Vec::new(),
            plan: Plan::default(),
        })
    }

    /// Takes an address before the first worker starts, which is then given this socket.
    ///
    /// # Errors
    /// Why the address can't be taken, in one line.
    pub fn take(&mut self, address: Address) -> io::Result<()> {
        let error = |why: String| io::Error::other(format!("can't listen on {address}: {why}"));
        if let Err(listener) = self.look_for_foreign(address) {
            return Err(error(format!("it is in use, {}", foreign::describe(&listener))));
        }
        let Err(cause) = self.add(address, Owner::this_process()) else { return Ok(()) };
        let first_port = procfs::first_unprivileged_port();
        Err(error(match cause.kind() {
            io::ErrorKind::PermissionDenied if address.socket.port() < first_port => {
                format!("{cause}; a port below {first_port} takes root or CAP_NET_BIND_SERVICE")
            }
            io::ErrorKind::AddrNotAvailable => format!("{cause}; this machine doesn't have the address"),
            _ => cause.to_string(),
        }))
    }

    /// Makes a new socket and binds it. If it is not the first one of its address, it belongs to the owner of the others.
    fn add(&mut self, address: Address, owner: Owner) -> io::Result<MemberId> {
        let owner = self.groups.get(&address).map_or(owner, |group| group.owner);
        let id = match address.transport {
            Transport::Tcp => self.members.bind(address, owner)?,
            Transport::Udp => self.bind_datagrams(address, owner)?,
        };
        self.groups.entry(address).or_insert_with(|| Group::new(address, owner, self.balancing)).add(id);
        if address.is_udp() {
            self.begin_to_listen(id, 0)?;
        }
        Ok(id)
    }

    /// Does listen(2) for the worker that borrowed the socket. It gets no connection until [`Pool::steer`] sends it some.
    ///
    /// # Errors
    /// What listen(2) would have said to the worker.
    pub fn listen(&mut self, worker: WorkerId, inode: u64, backlog: i32) -> io::Result<Address> {
        let id = self.members.id(inode).ok_or(io::ErrorKind::NotFound)?;
        if self.members[id].address.is_udp() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        self.handle_events();
        self.listen_on(id, backlog)?;
        self.serve(worker, id)
    }

    /// A worker listens by this socket from now on.
    fn serve(&mut self, worker: WorkerId, id: MemberId) -> io::Result<Address> {
        let member = self.members.get_mut(id).ok_or(io::ErrorKind::NotFound)?;
        if let Some(loan) = member.loan_mut(worker) {
            loan.listens = true;
        }
        let address = member.address;
        if self.supersede_others(id, worker)
            && let Err(error) = self.steer_address(address)
        {
            warn!("can't steer {address}: {error}");
        }
        Ok(address)
    }

    fn listen_on(&mut self, id: MemberId, backlog: i32) -> io::Result<()> {
        match self.members.get_mut(id).filter(|member| member.listening) {
            Some(member) => member.listen(backlog), // its queue may have been shorter
            None => self.begin_to_listen(id, backlog),
        }
    }

    fn begin_to_listen(&mut self, id: MemberId, backlog: i32) -> io::Result<()> {
        let address = self.members.get(id).ok_or(io::ErrorKind::NotFound)?.address;
        if !address.is_udp() {
            self.update_foreign_if_due(address);
        }
        self.members.get_mut(id).map_or(Ok(()), Member::hold)?;
        let mut left = BTreeSet::new();
        let joined = self.join(id, backlog, &mut left);
        if let Some(group) = self.groups.get_mut(&address).filter(|_| !left.is_empty()) {
            group.joined(id);
            group.left(&left.iter().copied().chain([id]).collect()); // it has left between its calls of listen(2)
            self.note_departed(left);
        }
        joined?;
        self.groups.entry(address).and_modify(|group| group.joined(id));
        self.watch(id);
        Ok(())
    }

    /// Does listen(2), and again if others of the group have left meanwhile, before or after it. In the end the member is the
    /// last one in the kernel's array, which has the order of the calls of listen(2), or of bind(2) for UDP. Adds those that
    /// have left to `left`.
    fn join(&mut self, id: MemberId, backlog: i32, left: &mut BTreeSet<MemberId>) -> io::Result<()> {
        loop {
            let member = self.members.get_mut(id).ok_or(io::ErrorKind::NotFound)?;
            let address = member.address;
            member.listen(backlog)?;
            let mut departed = self.departed();
            let others = departed.remove(&address);
            self.have_departed(departed);
            let Some(others) = others else { return Ok(()) };
            left.extend(others);
            self.members.get_mut(id).map_or(Ok(()), Member::leave)?;
        }
    }

    /// Handles what epoll reports.
    fn handle_events(&mut self) {
        let departed = self.departed();
        self.have_departed(departed);
    }

    /// Handles what epoll reports, but for the members that have left the array of their group, which are returned.
    fn departed(&mut self) -> BTreeMap<Address, BTreeSet<MemberId>> {
        let mut departed: BTreeMap<Address, BTreeSet<MemberId>> = BTreeMap::new();
        loop {
            let batch = self.watcher.next_batch();
            if batch.has_come {
                self.must_steer |= self.spread.came(Instant::now());
            }
            for (id, event) in batch.events {
                let Some(member) = self.members.get_mut(id) else { continue };
                let address = member.address;
                if address.is_udp() {
                    self.datagram_came(id, Instant::now());
                } else if !member.listening {
                    // A worker may bind a socket to connect from it. The wrapper's duplicate would keep the connection
                    // open when the worker closes it, so the wrapper closes the duplicate as soon as the socket is, or
                    // becomes, a connection.
                    if member.listen_info().is_ok_and(|info| !info.closed && !info.listening) {
                        self.remove(id);
                        self.close_if_free(address);
                    }
                } else if event.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                    member.listening = false;
                    self.watcher.forget(id, member.socket.as_fd());
                    self.tracker.forget(id);
                    departed.entry(address).or_default().insert(id);
                } else {
                    self.unserved.add(id);
                    self.watch(id);
                }
            }
            if !batch.is_full {
                break;
            }
        }
        departed
    }

    /// Takes what has left a group's array from its order.
    fn have_departed(&mut self, departed: BTreeMap<Address, BTreeSet<MemberId>>) {
        for (address, ids) in departed {
            self.groups.entry(address).and_modify(|group| group.left(&ids));
            self.note_departed(ids);
        }
    }

    /// Notes which workers shut their listeners down, and drops such sockets that nobody borrows.
    fn note_departed(&mut self, ids: BTreeSet<MemberId>) {
        for id in ids {
            let Some(member) = self.members.get(id) else { continue };
            let borrowers: Vec<WorkerId> = member.workers().collect();
            match borrowers[..] {
                [] => self.remove(id),
                [worker] => self.note_stopped(id, worker),
                // One of several has shut it down for all. The others go on to accept from it.
                [..] if !member.role(&self.plan).is_leaving() => self.shut.push(id),
                [..] => borrowers.iter().for_each(|worker| self.note_stopped(id, *worker)),
            }
        }
    }

    /// A worker has closed a listener, or shut it down. It still listens on the address if it has another one there.
    fn note_stopped(&mut self, id: MemberId, worker: WorkerId) {
        let member = &self.members[id];
        let address = member.address;
        if !member.loan(worker).is_some_and(|loan| loan.listens && loan.heir.is_none()) {
            return;
        }
        let is_another =
            |(other, member): (MemberId, &Member)| other != id && member.is_listener_on(worker, address);
        if !self.members.lent_to(worker).any(is_another) {
            self.stopped.push(StoppedListening { worker, address });
        }
    }

    fn remove(&mut self, id: MemberId) {
        self.closed.forget(id);
        self.unserved.forget(id);
        if let Some(member) = self.members.remove(id) {
            self.watcher.forget(id, member.socket.as_fd());
            self.tracker.forget(id);
            close_without_waiting(member.socket.as_fd()); // a worker may have made a connection of it
            self.looks.forget(id);
            let address = member.address;
            if let Some(group) = self.groups.get_mut(&address) {
                group.remove(id);
            }
            drop(member);
            if address.is_udp() {
                self.has_closed(id, address);
            }
        }
    }

    /// When to call [`Pool::sample_queues`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let of_queues = self.watcher.queues.deadline();
        let others = [self.unserved.deadline(), self.closed_deadline(), self.spread_deadline()];
        others.into_iter().chain([of_queues, self.looks.deadline()]).flatten().min()
    }

    /// Finds out which workers take connections and which don't, if it is time to, and steers accordingly. Returns
    /// whether anything has changed.
    pub fn sample_queues(&mut self, now: Instant) -> bool {
        for id in self.unserved.take_due(now) {
            self.watch(id); // epoll reports it at once if connections still wait
        }
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let samples = is_due(self.watcher.queues.deadline());
        let spreads = is_due(self.spread_deadline());
        self.look_at_datagram_sockets(now);
        if !samples && !spreads && !is_due(self.closed_deadline()) && !self.must_steer {
            return false;
        }
        let begun = cpu_time();
        let changes = if samples { self.take_sample(now) } else { Vec::new() };
        let load_changed = changes.iter().any(|(_, change)| self.steers_by(*change));
        self.look_at_places(now);
        if spreads {
            self.advance_spread(now);
        }
        let took = cpu_time().saturating_sub(begun);
        let closed = self.search_closed(now);
        let standing_changed = self.closed.take_changed();
        if (load_changed || standing_changed || self.must_steer)
            && let Err(why) = self.steer_all()
        {
            warn!("{why}");
        }
        changes.iter().for_each(|(id, change)| self.log_change(*id, *change)); // by now it is so
        if samples {
            self.set_next_sample(took, now);
        }
        load_changed || closed
    }

    /// Returns what has changed in the load of workers.
    fn take_sample(&mut self, now: Instant) -> Vec<(MemberId, Change)> {
        let socket = |id| self.members.get(id).map(|member| member.socket.as_fd());
        let Sample { lengths, doubtful, taken } = self.watcher.queues.sample(now, socket);
        self.closed.sampled(&doubtful, &taken, now);
        if let Err(error) = self.watcher.rearm() {
            warn!("can't watch accept queues: {error}");
        }
        if self.balancing == Balancing::Random { Vec::new() } else { self.update_load(&lengths, now) }
    }

    /// Whether new connections go elsewhere by such a change.
    fn steers_by(&self, change: Change) -> bool {
        self.balancing == Balancing::Client || change != Change::StuckLong
    }

    /// The sample took this time of a CPU.
    fn set_next_sample(&mut self, took: Duration, now: Instant) {
        let queues = &mut self.watcher.queues;
        // A suspect that gets stuck can be skipped, unless connections wait in all queues.
        let suspected = self.tracker.has_suspects(now) && queues.has_empty();
        let soon = suspected || self.tracker.skips_some(queues.len(), now);
        queues.set_next(took, soon, self.tracker.has_busy(), now);
    }

    /// Finds out the load of ready workers from their queues. Returns what has changed.
    fn update_load(&mut self, lengths: &BTreeMap<MemberId, u32>, now: Instant) -> Vec<(MemberId, Change)> {
        let is_ready =
            |id: &MemberId| self.members.get(*id).is_some_and(|member| member.role(&self.plan).is_served());
        self.tracker.retain(is_ready); // one that drains takes no connections again when its queue is emptied
        let lengths = lengths.iter().filter(|(id, _)| is_ready(id)).map(|(id, length)| (*id, *length));
        let is_busy = |id| {
            let loans = self.members.get(id)?.loans.iter();
            let mut busy = loans.map(|loan| procfs::is_main_thread_busy(loan.borrower.pid));
            busy.try_fold(true, |all, is_busy| Some(all && is_busy?))
        };
        let turn = |id| {
            let turn = |loan: &Loan| {
                let turns = scheduling::of(loan.borrower.pid)?;
                Some(Turn { ran: turns.ran, is_runnable: turns.is_runnable })
            };
            self.members.get(id)?.loans.iter().find_map(turn)
        };
        self.tracker.sample(&lengths.collect(), is_busy, turn, now)
    }

    fn log_change(&self, id: MemberId, change: Change) {
        let Some(Member { address, loans, .. }) = self.members.get(id) else { return };
        for Loan { borrower, .. } in loans {
            match change {
                Change::To(Load::Stuck, _) => debug!("{borrower} takes no connections on {address}: skipped"),
                Change::To(Load::Busy, _) => debug!("{borrower} is busy: skipped"),
                // Which of several has taken some isn't known.
                Change::To(Load::Free, lasted) if lasted >= LONG && loans.len() == 1 => {
                    let lasted = lasted.as_secs_f64();
                    info!("{borrower} takes connections on {address} again, after {lasted:.1} s");
                }
                Change::To(Load::Free, _) => debug!("{borrower} is no longer skipped"),
                Change::StuckLong => {
                    info!("{borrower} has taken no connection on {address} for {} s", LONG.as_secs());
                }
            }
        }
    }

    /// Has epoll report what matters of a socket.
    fn watch(&mut self, id: MemberId) {
        if self.watch_datagrams(id, Instant::now()) {
            return;
        }
        let Some(member) = self.members.get(id) else { return };
        let interest = match member.reserved {
            _ if !member.listening => Interest::Changes,
            None if member.is_lent() => Interest::AcceptQueue,
            _ if self.unserved.contains(id) => Interest::ShutDown,
            Some(Reserved { overdue: false, .. }) => Interest::ShutDown,
            None | Some(Reserved { overdue: true, .. }) => Interest::Connections,
        };
        if interest != Interest::AcceptQueue {
            self.tracker.forget(id);
        }
        if let Err(error) = self.watcher.watch(id, member.socket.as_fd(), interest) {
            warn!("can't watch a listener of {}: {error}", member.address);
        }
    }

    /// Resets the connections that wait on sockets without a borrower, so that the clients learn at once that they have
    /// to try again. Returns how many there were on which address. Call it when new connections are steered away from
    /// such sockets: what came until then is lost.
    pub fn reset_unserved(&mut self) -> Vec<(Address, usize)> {
        let ids = self.unserved.take_pending();
        let reset: Vec<(Address, usize)> = ids.into_iter().filter_map(|id| self.reset_queue(id)).collect();
        reset.into_iter().filter(|(_, connections)| *connections > 0).collect()
    }

    fn reset_queue(&mut self, id: MemberId) -> Option<(Address, usize)> {
        let member = self.members.get(id).filter(|member| member.is_unserved())?;
        let (address, (connections, result)) = (member.address, member.reset_queue());
        if let Err(error) = result {
            // More datagrams come as fast as they are read.
            if error.kind() != io::ErrorKind::WouldBlock {
                warn!("can't reset the connections that wait on {address}: {error}");
            }
            self.unserved.retry_later(id, Instant::now());
        }
        self.watch(id);
        Some((address, connections))
    }

    /// Closes an address if no worker borrows a socket of it and no successor is awaited.
    fn close_if_free(&mut self, address: Address) {
        if self.groups.get(&address).is_some_and(|group| group.is_free(&self.members)) {
            debug!("{address} is closed: no worker borrows it any more");
            let group = self.groups.remove(&address);
            group.iter().flat_map(Group::ids).for_each(|id| self.remove(*id));
        }
    }

    /// Which workers have stopped listening since the last call. `is_reported` is whether [`Pool::as_fd`] became
    /// readable.
    pub fn stopped_listening(&mut self, is_reported: bool) -> Vec<StoppedListening> {
        if is_reported {
            self.handle_events();
        }
        self.listen_again();
        if self.must_steer
            && let Err(why) = self.steer_all()
        {
            warn!("{why}");
        }
        mem::take(&mut self.stopped)
    }

    /// What one of several workers has shut down goes on to serve the others.
    fn listen_again(&mut self) {
        let shut = mem::take(&mut self.shut);
        for id in &shut {
            let Some(member) = self.members.get(*id).filter(|member| !member.listening) else { continue };
            let (address, backlog) = (member.address, member.backlog);
            if let Err(error) = self.begin_to_listen(*id, backlog) {
                warn!("can't listen on {address} again: {error}");
                let workers: Vec<WorkerId> = self.members[*id].workers().collect();
                workers.into_iter().for_each(|worker| self.note_stopped(*id, worker));
            }
        }
        if !shut.is_empty()
            && let Err(why) = self.steer_all()
        {
            warn!("{why}");
        }
    }

    /// Whether there is a reason to call [`Pool::stopped_listening`] or [`Pool::reset_unserved`].
    pub fn has_news(&self) -> bool {
        !self.stopped.is_empty() || !self.shut.is_empty() || self.unserved.has_pending()
    }

    /// Whether no connection and no datagram waits for the worker.
    pub fn queues_are_empty(&self, worker: WorkerId) -> bool {
        !self
            .members
            .lent_to(worker)
            .any(|(_, member)| member.is_awaited() && !self.is_private(member.address))
    }

    /// How many connections wait to be accepted by the worker.
    pub fn accept_queue(&self, worker: WorkerId) -> u32 {
        let infos = self.members.lent_to(worker).filter_map(|(_, member)| member.listen_info().ok());
        infos.filter(|info| info.listening).map(|info| info.accept_queue).sum()
    }

    /// The workers for which connections have waited for [`LONG`] without being taken.
    pub fn awaited_for_long(&self) -> BTreeSet<WorkerId> {
        let members = self.watcher.queues.slow().filter_map(|id| self.members.get(id));
        members.flat_map(|member| &member.loans).map(|loan| loan.borrower.worker).collect()
    }

    /// The load of the worker, on the address where it is greatest.
    pub fn load(&self, worker: WorkerId) -> Load {
        self.members.lent_to(worker).map(|(id, _)| self.tracker.load(id)).max().unwrap_or(Load::Free)
    }
}

impl AsFd for Pool {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watcher.as_fd()
    }
}

fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
