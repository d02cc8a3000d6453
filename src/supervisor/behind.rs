//! The processes behind a worker's main one: a server that a main process keeps the stop signal from, and what one leaves that
//! goes into the background.

use std::time::Instant;

use nix::unistd::{Pid, getpgid};

use super::{Process, Supervisor};
use crate::fleet::policy::{AT_ONCE, PROVEN_AFTER};
use crate::fleet::{End, Event, State};
use crate::ids::WorkerId;
use crate::kernel::{helper, open_sockets, procfs};
use crate::worker::{self, Reaped};

/// A process that goes on in the place of a worker's main process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heir {
    pid: Pid,
    /// When the main process was started, in ticks since the boot.
    main_started: u64,
}

impl Heir {
    pub(super) fn is_in_group_of(self, leader: Pid) -> bool {
        getpgid(Some(self.pid)) == Ok(leader)
    }
}

impl Supervisor {
    /// The process that goes on in the background in the place of a worker's, which has just ended and isn't reaped yet.
    ///
    /// A program that goes into the background ends its main process by itself, with status 0, before it is ready or soon
    /// after, and what it leaves has the listener open, or has yet to bind it, and leaves the process group in a moment. So a
    /// process that a worker leaves when it was told to stop, fails, or has served for a while (a helper of a log for example) is
    /// none, nor is one that a ready worker leaves and that has no listener of it, nor are children of a master that ends. But
    /// what one worker of a generation has done, the others do too.
    pub(super) fn heir(&self, ended: Reaped) -> Option<Heir> {
        let worker = *self.pids.get(&ended.pid)?;
        let process = self.processes.get(&worker)?;
        let crew = self.fleet.crew();
        let ready_for = crew.ready_for(worker, Instant::now()).filter(|_| ended.end == End::Exited(0));
        let is_known = self.background.contains(&process.generation);
        if !is_known && ready_for.is_none_or(|ready_for| ready_for >= PROVEN_AFTER) {
            return None;
        }
        let in_group_too = is_known || ready_for.is_some_and(|ready_for| ready_for < AT_ONCE);
        let main_started = process.main_started.or_else(|| procfs::start_time(ended.pid))?;
        let (is_intercepted, filters) =
            (self.interceptions.contains_key(&worker), procfs::filters(Pid::this()));
        let may_have_left = |pid: &Pid| {
            let is_other = self.pids.contains_key(pid) || self.starts.has(*pid) || helper::is_helper(*pid);
            // Others of the container come to its process 1 as well.
            let is_stranger = is_intercepted && procfs::filters(*pid) <= filters;
            !is_other && !is_stranger && procfs::start_time(*pid).is_some_and(|start| start >= main_started)
        };
        let holds = |pid: Pid| {
            let is_its = |inode| self.pool.lent(worker, inode).is_some() || self.unix.socket(inode).is_some();
            let open = |pid| open_sockets::socket_inodes(pid).unwrap_or_default();
            procfs::tree(pid).into_iter().flat_map(open).any(is_its)
        };
        let is_heir = |pid: &Pid| {
            let heir = Heir { pid: *pid, main_started };
            let may_be = !procfs::is_ending(*pid) && (in_group_too || !heir.is_in_group_of(ended.pid));
            may_have_left(pid) && may_be && (!crew.was_ready(worker) || holds(*pid))
        };
        // Of two forks the first process ends at once: the second comes here from it, perhaps during the search.
        let orphans = procfs::children(Pid::this());
        let of_orphans =
            || orphans.iter().filter(|pid| may_have_left(pid)).flat_map(|pid| procfs::tree(*pid));
        let pid = (orphans.iter().copied().find(is_heir))
            .or_else(|| of_orphans().find(is_heir))
            .or_else(|| procfs::children(Pid::this()).into_iter().find(is_heir))?;
        Some(Heir { pid, main_started })
    }

    /// From now on this process is the worker's. It isn't to serve: it is stopped as a worker is.
    pub(super) fn goes_on_as(&mut self, worker: WorkerId, Heir { pid, main_started }: Heir) {
        let Some(process) = self.processes.get_mut(&worker) else { return };
        (process.pid, process.main_started) = (pid, Some(main_started));
        self.background.insert(process.generation);
        self.pids.insert(pid, worker);
        self.pool.has_started(worker, pid);
        match self.fleet.crew().state(worker) {
            Some(State::Starting | State::Ready) => {
                let instead = self.how_in_foreground(worker);
                self.handle(Event::WentIntoBackground { worker, pid: pid.as_raw(), instead });
            }
            Some(State::Draining) => {
                let (crew, generation) = (self.fleet.crew(), process.generation);
                self.drain.forget(worker);
                let addresses = crew.addresses_so_far(worker);
                self.drain.watch(worker, pid, generation, addresses, Instant::now());
            }
            None => {}
            Some(State::Stopping) => self.send_stop_signal([pid]),
            Some(State::Killed) => worker::kill_tree(pid),
        }
    }

    /// Notes whether a worker's main process is the server: it may close its listeners when it gets the stop signal.
    pub(super) fn note_server(&mut self, worker: WorkerId) {
        let is_server = self.first_holders(worker).first().copied() == self.pid(worker);
        self.processes.entry(worker).and_modify(|process| process.is_server = is_server);
    }

    /// Which processes get the stop signal when a worker's main process hasn't ended.
    ///
    /// If that had no listener and others behind it have one, they are the server, and haven't heard of the signal: a server
    /// closes its listeners first. A main process that had one is the server itself, and tells its children what they have to
    /// know. Where nobody has one, or it was given to them all (`-l`), only shells are known to keep the signal to themselves.
    pub(super) fn behind(&self, worker: WorkerId) -> Vec<Pid> {
        match self.processes.get(&worker) {
            // On its way into the background it may have forgotten the first one, as nginx does.
            Some(Process { pid, main_started: Some(_), .. }) => vec![*pid],
            Some(Process { pid, is_server: false, .. }) => match self.first_holders(worker) {
                holders if holders.is_empty() => procfs::children_of_shells(*pid),
                holders => holders.into_iter().filter(|holder| holder != pid).collect(),
            },
            Some(_) | None => Vec::new(),
        }
    }

    /// Of a worker's processes those that have a listener which it has bound, without what is below them.
    fn first_holders(&self, worker: WorkerId) -> Vec<Pid> {
        let is_its = |inode| self.pool.is_bound_by(worker, inode) || self.unix.socket(inode).is_some();
        self.pid(worker).map(|main| open_sockets::first_holders(main, &is_its)).unwrap_or_default()
    }
}
