//! Starts of workers: what has to be read first, and children until they have executed their command.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use log::debug;
use nix::unistd::Pid;

use super::source::Source;
use super::{ListenerWatch, Process, Supervisor, watch};
use crate::address::Address;
use crate::fleet::Event;
use crate::ids::{Borrower, SlotId, WorkerId};
use crate::intercept::Interception;
use crate::kernel::helper;
use crate::output::labels;
use crate::worker::environment::Environment;
use crate::worker::{self, Listener, Progress, Reading, START_TIMEOUT, StartError, Starting};

/// What has begun.
#[derive(Debug, Default)]
pub struct Starts {
    /// By generation: its environment, and until when it has to be read.
    readings: BTreeMap<u32, (Reading, Instant)>,
    /// The workers that wait for that, by generation.
    waiting: BTreeMap<u32, Vec<(WorkerId, SlotId)>>,
    children: BTreeMap<WorkerId, Child>,
}

#[derive(Debug)]
struct Child {
    starting: Starting,
    slot: SlotId,
    generation: u32,
    /// The ends of its output that are read.
    output: Option<[OwnedFd; 2]>,
    until: Instant,
}

impl Starts {
    /// When what has begun is late.
    pub fn deadline(&self) -> Option<Instant> {
        let readings = self.readings.values().map(|(_, until)| *until);
        readings.chain(self.children.values().map(|child| child.until)).min()
    }

    /// The worker that this child is about to be.
    pub fn worker(&self, pid: Pid) -> Option<WorkerId> {
        self.children.iter().find(|(_, child)| child.starting.pid == pid).map(|(worker, _)| *worker)
    }

    pub fn has(&self, pid: Pid) -> bool {
        self.worker(pid).is_some()
    }
}

impl Drop for Starts {
    fn drop(&mut self) {
        self.children.values().for_each(|child| worker::kill_tree(child.starting.pid));
    }
}

impl Supervisor {
    pub(super) fn start(&mut self, worker: WorkerId, slot: SlotId, generation: u32, shares_queue: bool) {
        if !self.fleet.crew().wants(worker) {
            return;
        }
        if shares_queue {
            self.pool.let_share(worker);
        }
        let living = self.processes.values().map(|process| process.generation);
        self.environments.forget_older(living.fold(self.fleet.crew().oldest_generation(), u32::min));
        if let Some(environment) = self.environments.known(generation).cloned() {
            return self.begin(worker, slot, generation, &environment);
        }
        self.starts.waiting.entry(generation).or_default().push((worker, slot));
        if !self.starts.readings.contains_key(&generation)
            && let Err(error) = self.begin_to_read(generation)
        {
            self.environment_is(generation, Err(StartError::new("can't start a process", &error)));
        }
    }

    fn begin_to_read(&mut self, generation: u32) -> io::Result<()> {
        let reading = self.environments.read(generation)?;
        watch(&self.epoll, &reading, Source::Environment(generation))?;
        self.starts.readings.insert(generation, (reading, Instant::now() + START_TIMEOUT));
        Ok(())
    }

    /// Something has come of an environment that is being read.
    pub(super) fn take_environment(&mut self, generation: u32) {
        let reading = self.starts.readings.get_mut(&generation);
        if let Some(read) = reading.and_then(|(reading, _)| reading.receive()) {
            self.environment_is(generation, read.map_err(|why| StartError { why, status: 1 }));
            self.act();
        }
    }

    /// Starts the workers that have waited for it, or fails the start of each.
    fn environment_is(&mut self, generation: u32, read: Result<Environment, StartError>) {
        self.starts.readings.remove(&generation);
        if let Ok(environment) = &read {
            self.environments.add(generation, environment.clone());
        }
        for (worker, slot) in self.starts.waiting.remove(&generation).unwrap_or_default() {
            if !self.fleet.crew().wants(worker) {
                continue;
            }
            match &read {
                Ok(environment) => self.begin(worker, slot, generation, environment),
                Err(StartError { why, status }) => {
                    self.react(Event::StartFailed { worker, why: why.clone(), status: *status });
                }
            }
        }
    }

    fn begin(&mut self, worker: WorkerId, slot: SlotId, generation: u32, environment: &Environment) {
        if !self.udp_binds.is_empty() {
            self.look_at_udp_ports(); // what is closed by now is not asked of this one
        }
        if let Err(StartError { why, status }) = self.fork(worker, slot, generation, environment) {
            self.react(Event::StartFailed { worker, why, status });
        }
    }

    fn fork(
        &mut self,
        worker: WorkerId,
        slot: SlotId,
        generation: u32,
        environment: &Environment,
    ) -> Result<(), StartError> {
        let listeners = self.listeners(Borrower { worker, pid: Pid::from_raw(0), slot, generation })?;
        let pipes = self.labels.is_some().then(labels::pipes).transpose();
        let pipes = pipes.map_err(|error| StartError::new("no pipes for its output", &error))?;
        let (output, its_output) = pipes.unzip();
        let starting = self.starter.start(slot, generation, environment, listeners, its_output)?;
        let watched = watch(&self.epoll, &starting, Source::Start(worker));
        let until = Instant::now() + START_TIMEOUT;
        self.starts.children.insert(worker, Child { starting, slot, generation, output, until });
        watched.map_err(|error| self.give_up_start(worker, &error))
    }

    /// The sockets that a worker is given.
    fn listeners(&mut self, borrower: Borrower) -> Result<Vec<Listener>, StartError> {
        let give = |address: &Address| match self.pool.give(borrower, *address) {
            Ok(socket) => Ok(Listener { name: listener_name(address), socket }),
            Err(error) => Err(StartError::new(&format!("can't listen on {address}"), &error)),
        };
        self.listen.iter().map(give).collect()
    }

    fn give_up_start(&mut self, worker: WorkerId, error: &io::Error) -> StartError {
        self.end_start(worker);
        StartError { why: format!("can't watch it: {error}"), status: 1 }
    }

    /// Kills a child that is no worker yet.
    fn end_start(&mut self, worker: WorkerId) {
        if let Some(child) = self.starts.children.remove(&worker) {
            worker::kill_tree(child.starting.pid);
            self.interceptions.remove(&worker);
            self.reader.forget(&worker);
        }
    }

    /// Learns which workers run by now. One may do so before that is reported.
    pub(super) fn advance_starts(&mut self) {
        let workers: Vec<WorkerId> = self.starts.children.keys().copied().collect();
        workers.into_iter().for_each(|worker| self.advance_start(worker));
    }

    /// A child has reported something, or has ended.
    pub(super) fn advance_start(&mut self, worker: WorkerId) {
        loop {
            let Some(child) = self.starts.children.get_mut(&worker) else { return };
            let failed = match child.starting.advance() {
                Progress::Nothing => return,
                Progress::Prepared(notify_fd) => self.intercept(worker, notify_fd),
                Progress::Executed => self.executed(worker),
                Progress::Failed(error) => Err(error),
            };
            if let Err(StartError { why, status }) = failed {
                self.end_start(worker);
                self.handle(Event::StartFailed { worker, why, status });
            }
        }
    }

    fn intercept(&mut self, worker: WorkerId, notify_fd: Option<OwnedFd>) -> Result<(), StartError> {
        let Some(child) = self.starts.children.get(&worker) else { return Ok(()) };
        let (pid, slot, generation) = (child.starting.pid, child.slot, child.generation);
        let borrower = Borrower { worker, pid, slot, generation };
        match (&mut self.listener_watch, notify_fd) {
            (ListenerWatch::Interception(answers), Some(notify_fd)) => {
                let interception =
                    Interception::new(notify_fd, borrower, Rc::clone(&self.inherited), *answers);
                let watched = watch(&self.epoll, &interception, Source::Filter(worker));
                watched.map_err(|error| self.give_up_start(worker, &error))?;
                self.interceptions.insert(worker, interception);
            }
            (ListenerWatch::Interception(_), None) => {
                let why = "reuse-run did not receive the fd of its filter".to_owned();
                return Err(StartError { why, status: 1 });
            }
            (ListenerWatch::Scan(scan), _) => scan.wake(Instant::now()),
        }
        Ok(())
    }

    /// A child is a worker now, unless it isn't wanted any more.
    fn executed(&mut self, worker: WorkerId) -> Result<(), StartError> {
        if !self.fleet.crew().wants(worker) {
            self.end_start(worker);
            self.pool.release(worker, false);
            return Ok(());
        }
        let Some(Child { starting, slot, generation, output, .. }) = self.starts.children.remove(&worker)
        else {
            return Ok(());
        };
        let Starting { pid, ready, node, notify, tether, .. } = starting;
        helper::forget(pid);
        self.pool.has_started(worker, pid);
        let watched = watch(&self.epoll, &ready, Source::Pipe(worker))
            .and_then(|()| watch(&self.epoll, notify.as_ref(), Source::Notify(worker)))
            .and_then(|()| match &node {
                Some(node) => watch(&self.epoll, node.as_ref(), Source::Node(worker)),
                None => Ok(()),
            });
        if let Err(error) = watched {
            worker::kill_tree(pid);
            return Err(StartError { why: format!("can't watch it: {error}"), status: 1 });
        }
        debug!("worker {slot} (pid {pid}, generation {generation}) started");
        if let (Some(labels), Some(output)) = (&mut self.labels, output) {
            labels.add(worker, slot, pid, output);
        }
        let process = Process {
            pid,
            generation,
            pipe: Some(ready),
            node,
            notify,
            _tether: tether,
            status: None,
            main_started: None,
            is_server: false,
        };
        self.processes.insert(worker, process);
        self.pids.insert(pid, worker);
        self.handle(Event::Started { worker, pid: pid.as_raw() });
        Ok(())
    }

    /// What isn't done in time has failed.
    pub(super) fn fail_late_starts(&mut self, now: Instant) {
        if self.starts.deadline().is_none_or(|at| at > now) {
            return;
        }
        let late = self.starts.readings.iter().filter(|(_, (_, until))| *until <= now);
        let late: Vec<_> = late.map(|(of, (reading, _))| (*of, reading.waits_for())).collect();
        for (generation, what) in late {
            self.environment_is(generation, Err(worker::too_late(&what)));
            self.act();
        }
        let late = self.starts.children.iter().filter(|(_, child)| child.until <= now);
        let late: Vec<_> = late.map(|(worker, child)| (*worker, child.starting.late())).collect();
        for (worker, StartError { why, status }) in late {
            self.end_start(worker);
            if self.fleet.crew().wants(worker) {
                self.handle(Event::StartFailed { worker, why, status });
            } else {
                self.pool.release(worker, false);
            }
        }
    }
}

/// In LISTEN_FDNAMES, which separates names by colons: "443", or "udp-443".
fn listener_name(address: &Address) -> String {
    let port = address.socket.port();
    if address.is_udp() { format!("udp-{port}") } else { port.to_string() }
}
