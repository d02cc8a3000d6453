//! The poll loop: gathers events, asks the fleet what follows from them, and does that.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Instant;

use log::{debug, info, log, warn};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::address::{Address, Endpoint};
use crate::cli::Options;
use crate::drain::idle;
use crate::drain::signal_effect::{self, SignalEffects, Treatment};
use crate::drain::{Drain, Drained};
use crate::fleet::{Action, Announcement, Command, Endpoints, Event, Fleet, Target};
use crate::ids::{Borrower, SlotId, WorkerId};
use crate::intercept::{self, Answers, Interception, ListenChange};
use crate::kernel::procfs;
use crate::operate::control::{ClientId, Control};
use crate::operate::pidfile::PidFile;
use crate::operate::signals::{Meaning, Signals};
use crate::operate::systemd::Systemd;
use crate::output::labels::{self, Labels};
use crate::pool::paths::UnixSockets;
use crate::pool::unintercepted::{self, Unintercepted};
use crate::pool::{Pool, StoppedListening};
use crate::words::{count, printable};
use crate::worker::environment::{Environment, Sources};
use crate::worker::ready::{Message, NodeChannel, NotifySocket, ReadyPipe};
use crate::worker::{self, Listener, StartError, Starter};

mod commands;

/// What an event of the poll loop comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Signals,
    Pool,
    /// New control clients.
    Control,
    Client(ClientId),
    /// What workers write, and the room that there is for it.
    Labels,
    Filter(WorkerId),
    /// A way by which a worker can say something.
    Pipe(WorkerId),
    Node(WorkerId),
    Notify(WorkerId),
}

impl Source {
    fn to_token(self) -> u64 {
        let token = |kind: u64, id: u32| kind << 32 | u64::from(id);
        match self {
            Self::Signals => token(0, 0),
            Self::Pool => token(1, 0),
            Self::Filter(WorkerId(id)) => token(2, id),
            Self::Pipe(WorkerId(id)) => token(3, id),
            Self::Node(WorkerId(id)) => token(4, id),
            Self::Notify(WorkerId(id)) => token(5, id),
            Self::Control => token(6, 0),
            Self::Client(ClientId(id)) => token(7, id),
            Self::Labels => token(8, 0),
        }
    }

    fn from_token(token: u64) -> Self {
        let id = WorkerId(token as u32);
        match token >> 32 {
            0 => Self::Signals,
            1 => Self::Pool,
            2 => Self::Filter(id),
            3 => Self::Pipe(id),
            4 => Self::Node(id),
            5 => Self::Notify(id),
            6 => Self::Control,
            7 => Self::Client(ClientId(token as u32)),
            _ => Self::Labels,
        }
    }
}

/// The process of a worker, and the ways by which it can say something.
struct Process {
    pid: Pid,
    generation: u32,
    /// `None` when the worker has closed its end, or has none.
    pipe: Option<ReadyPipe>,
    node: Option<NodeChannel>,
    notify: NotifySocket,
    /// Its last STATUS= message.
    status: Option<String>,
}

pub struct Supervisor {
    fleet: Fleet,
    pool: Pool,
    unix: UnixSockets,
    drain: Drain,
    signal_effects: SignalEffects,
    /// Set when workers aren't intercepted.
    bystander: Option<Unintercepted>,
    systemd: Systemd,
    /// `None` when its name could not be had.
    control: Option<Control>,
    pidfile: Option<PidFile>,
    labels: Option<Labels>,
    signals: Signals,
    starter: Starter,
    sources: Sources,
    /// What each generation starts with, for those that may still start workers.
    environments: BTreeMap<u32, Environment>,
    /// Addresses whose sockets workers are given.
    listen: Vec<Address>,
    /// What this process was given, by inode number.
    inherited: Rc<[(u64, Endpoint)]>,
    /// What becomes of answers to workers.
    answers: Answers,
    stop_signal: Signal,
    processes: BTreeMap<WorkerId, Process>,
    /// One for each worker; also for one that has ended, as long as a process that it started lives on.
    interceptions: BTreeMap<WorkerId, Interception>,
    pids: HashMap<Pid, WorkerId>,
    epoll: Epoll,
    actions: VecDeque<Action>,
    /// Set when it is over: what to exit with.
    exit: Option<u8>,
}

/// Runs the workers until the end, and returns the status to exit with.
///
/// # Errors
/// What keeps the wrapper from starting at all; from then on it goes on whatever happens.
pub fn run(options: Options) -> io::Result<u8> {
    let Options { mut program, policy, sources, listen, balance, pidfile, label } = options;
    // First, since a SIGCHLD that is ignored keeps children from being waited for.
    let signals = Signals::new()?;
    let mut bystander = None;
    let answers = program.intercept.then(intercept::probe).transpose();
    let answers = answers.map_err(|error| format!("workers can't be intercepted ({error})"));
    let answers = answers.and_then(|answers| answers.ok_or("workers are not intercepted".to_owned()));
    if let Err(why) = &answers {
        unintercepted::announce(why, !listen.is_empty(), policy.readiness)?;
        program.intercept = false;
        bystander = Some(Unintercepted::default());
    }
    if sources.has_values() {
        // No core of this process is to hold them (PR_SET_DUMPABLE(2const)).
        nix::sys::prctl::set_dumpable(false)?;
    }
    let stop_signal = program.stop_signal;
    let starter = Starter::new(program, listen.len())?;
    let inherited = starter.inherited();
    let mut pool = Pool::new(balance)?;
    listen.iter().try_for_each(|address| pool.take(*address))?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    watch(&epoll, &signals, Source::Signals)?;
    watch(&epoll, &pool, Source::Pool)?;
    let pidfile = pidfile.map(PidFile::new).transpose()?;
    let control =
        Control::new().inspect_err(|error| warn!("no control socket, and no reload, status...: {error}"));
    let control = control.ok();
    control.as_ref().map_or(Ok(()), |control| watch(&epoll, control, Source::Control))?;
    let labels = label.then(Labels::new).transpose()?;
    labels.iter().try_for_each(|labels| watch(&epoll, labels, Source::Labels))?;
    let endpoints = Endpoints::new(
        listen.iter().copied().collect(),
        inherited.iter().map(|(_, endpoint)| endpoint.clone()).collect(),
    );
    let (fleet, actions) = Fleet::new(policy, endpoints, Instant::now());
    let mut supervisor = Supervisor {
        fleet,
        pool,
        unix: UnixSockets::default(),
        drain: Drain::default(),
        signal_effects: SignalEffects::default(),
        bystander,
        systemd: Systemd::new(Instant::now()),
        control,
        pidfile,
        labels,
        signals,
        starter,
        sources: sources.with_current_directory(),
        environments: BTreeMap::new(),
        listen,
        inherited: inherited.into(),
        answers: answers.unwrap_or(Answers::Arrive), // or nobody asks
        stop_signal,
        processes: BTreeMap::new(),
        interceptions: BTreeMap::new(),
        pids: HashMap::new(),
        epoll,
        actions: actions.into(),
        exit: None,
    };
    supervisor.act();
    let status = loop {
        if let Some(status) = supervisor.exit {
            break status;
        }
        supervisor.wait_and_handle();
    };
    supervisor.unix.keep(|_| false);
    supervisor.stop_ended(status);
    supervisor.labels.into_iter().for_each(Labels::finish);
    // The clients are to see an end of file only when the process, and with it every port, is free.
    std::mem::forget(supervisor.control);
    Ok(status)
}

/// Rounded up, lest it wake up a moment too early over and over.
fn timeout(deadline: Option<Instant>) -> EpollTimeout {
    let Some(deadline) = deadline else { return EpollTimeout::NONE };
    let left = deadline.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
    EpollTimeout::try_from(left.min(60_000) as i32).unwrap_or(EpollTimeout::ZERO)
}

fn watch(epoll: &Epoll, what: &impl AsFd, source: Source) -> io::Result<()> {
    Ok(epoll.add(what.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, source.to_token()))?)
}

impl Supervisor {
    fn wait_and_handle(&mut self) {
        self.labels.iter_mut().for_each(Labels::flush_and_watch);
        let deadline = self.deadline();
        let mut events = [EpollEvent::empty(); 256];
        let timeout = timeout(deadline.into_iter().chain(self.pool.deadline()).min());
        let ready = match self.epoll.wait(&mut events, timeout) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => 0,
            Err(error) => {
                warn!("can't wait for events: {error}");
                0
            }
        };
        let mut pool_told = false;
        for event in &events[..ready] {
            match Source::from_token(event.data()) {
                Source::Signals => self.take_signals(),
                Source::Pool => pool_told = true, // looked at below, after what has happened
                Source::Control => self.accept_clients(),
                Source::Client(id) => self.attend(id),
                Source::Labels => self.labels.iter_mut().for_each(Labels::read),
                Source::Filter(worker) => self.answer(worker, event.events()),
                source @ (Source::Pipe(worker) | Source::Node(worker) | Source::Notify(worker)) => {
                    self.hear(worker, source);
                }
            }
        }
        let changed = self.pool.sample_queues(Instant::now());
        if !changed && ready == 0 && deadline.is_none_or(|at| at > Instant::now()) {
            return; // It was for that look alone, as it is several hundred times a second while connections come.
        }
        self.stop_drained();
        self.look_on();
        self.systemd.ping_watchdog(Instant::now());
        if let Some(control) = &mut self.control {
            control.drop_idle(Instant::now());
        }
        for StoppedListening { worker, address } in self.pool.stopped_listening(pool_told) {
            self.handle(Event::StoppedListening { worker, endpoint: address.into() });
        }
        self.handle(Event::Tick);
        for (address, connections) in self.pool.reset_unserved() {
            let connections = count(connections, "connection");
            info!("{connections} to {address} reset: no worker is there to take what came");
        }
    }

    /// Stops the workers that have finished their work.
    fn stop_drained(&mut self) {
        let begun = Instant::now();
        let mut drained = self.drain.poll(&self.pool, &self.unix, begun);
        signal_effect::order(&mut drained);
        for drained in drained {
            let treatment = self.signal_effects.treatment(&drained);
            let Drained { worker, generation, idle } = drained;
            // If something has come on an idle connection since, the worker waits for the next poll.
            let is_idle = match treatment {
                Treatment::CloseFirst => idle::close(&idle),
                Treatment::Signal | Treatment::SignalAndWatch => !idle::have_new_data(&idle),
            };
            if !is_idle {
                continue;
            }
            self.handle(Event::Drained { worker });
            if treatment == Treatment::SignalAndWatch {
                self.signal_effects.learn(generation, idle::watch_end(&idle, self.stop_signal));
            }
        }
        self.drain.polled(begun, Instant::now());
    }

    /// Without interception: finds out who listens.
    fn look_on(&mut self) {
        let Some(bystander) = &mut self.bystander else { return };
        let pid = |id: WorkerId| self.processes.get(&id).map(|worker| (id, worker.pid));
        let starting: Vec<(WorkerId, Pid)> =
            self.fleet.crew().starting().into_iter().filter_map(pid).collect();
        for (worker, address) in bystander.scan(&starting, Instant::now()) {
            self.handle(Event::Listens { worker, endpoint: address.into() });
        }
    }

    /// When there is something to do at the latest, but for looks at accept queues.
    fn deadline(&self) -> Option<Instant> {
        let deadlines = [
            self.fleet.deadline(),
            self.drain.deadline(),
            self.systemd.deadline(),
            self.bystander.as_ref().and_then(Unintercepted::deadline),
            self.control.as_ref().and_then(Control::deadline),
            self.pool.has_news().then(Instant::now),
        ];
        deadlines.into_iter().flatten().min()
    }

    fn handle(&mut self, event: Event) {
        self.actions.extend(self.fleet.handle(event, Instant::now()));
        self.act();
    }

    /// Carries out actions until none is left; some make events at once.
    fn act(&mut self) {
        while let Some(action) = self.actions.pop_front() {
            match action {
                Action::Start { worker, slot, generation } => self.start(worker, slot, generation),
                Action::Steer(plan) => {
                    let generation = plan.generation;
                    self.pool.steer(plan);
                    self.unix.switch(generation);
                }
                Action::Drain { worker, addresses } => {
                    if let Some(Process { pid, generation, .. }) = self.processes.get(&worker) {
                        self.drain.watch(worker, *pid, *generation, addresses, Instant::now());
                    }
                }
                Action::Signal { worker } => {
                    self.drain.forget(worker);
                    self.send_stop_signal(self.pid(worker));
                }
                Action::SignalBehindShells { worker } => {
                    self.send_stop_signal(self.pid(worker).into_iter().flat_map(procfs::children_of_shells));
                }
                Action::Kill { worker } => self.pid(worker).into_iter().for_each(worker::kill_group),
                Action::Release { worker, successor } => self.pool.release(worker, successor),
                Action::ResetQueue { slot, generation } => self.pool.reset_reserved(slot, generation),
                Action::FindForeignListeners => self.pool.find_foreign_listeners(),
                Action::Unreserve { slot, generation } => self.pool.unreserve(slot, generation),
                Action::Log { level, line } => {
                    log!(level, "{line}");
                    if let Some(control) = self.control.as_mut().filter(|_| level <= log::Level::Info) {
                        control.broadcast_step(&line);
                    }
                }
                Action::Announce(announcement) => {
                    if let (Announcement::Ready { .. }, Some(pidfile)) = (&announcement, &mut self.pidfile) {
                        pidfile.write();
                    }
                    self.systemd.announce(&announcement);
                }
                Action::Ended { ticket, outcome, culprit } => self.operation_ended(ticket, outcome, culprit),
                Action::Exit { status } => self.exit = Some(status),
            }
        }
    }

    /// The process of a worker, until it is reaped.
    fn pid(&self, worker: WorkerId) -> Option<Pid> {
        self.processes.get(&worker).map(|worker| worker.pid)
    }

    fn send_stop_signal(&self, pids: impl IntoIterator<Item = Pid>) {
        pids.into_iter().for_each(|pid| worker::signal(pid, self.stop_signal));
    }

    fn start(&mut self, worker: WorkerId, slot: SlotId, generation: u32) {
        if !self.fleet.crew().wants(worker) {
            return;
        }
        let event = match self.start_watched(worker, slot, generation) {
            Ok(pid) => Event::Started { worker, pid: pid.as_raw() },
            Err(StartError { why, status }) => Event::StartFailed { worker, why, status },
        };
        self.actions.extend(self.fleet.handle(event, Instant::now()));
    }

    fn start_watched(&mut self, worker: WorkerId, slot: SlotId, generation: u32) -> Result<Pid, StartError> {
        let environment = self.environment(generation)?;
        let listeners = self.listeners(Borrower { worker, pid: Pid::from_raw(0), slot, generation })?;
        let pipes = self.labels.is_some().then(labels::pipes).transpose();
        let pipes = pipes.map_err(|error| StartError::new("no pipes for its output", &error))?;
        let (ends, output) = pipes.unzip();
        let started = self.starter.start(slot, generation, &environment, listeners, output)?;
        let pid = started.pid;
        self.pool.has_started(worker, pid);
        let borrower = Borrower { worker, pid, slot, generation };
        let interception = started.notify_fd.map(|notify_fd| {
            Interception::new(notify_fd, borrower, Rc::clone(&self.inherited), self.answers)
        });
        let watched = (interception.as_ref())
            .map_or(Ok(()), |interception| watch(&self.epoll, interception, Source::Filter(worker)))
            .and_then(|()| watch(&self.epoll, &started.ready, Source::Pipe(worker)))
            .and_then(|()| watch(&self.epoll, &started.notify, Source::Notify(worker)))
            .and_then(|()| match &started.node {
                Some(node) => watch(&self.epoll, node, Source::Node(worker)),
                None => Ok(()),
            });
        if let Err(error) = watched {
            worker::kill_group(pid);
            return Err(StartError { why: format!("can't watch it: {error}"), status: 1 });
        }
        debug!("worker {slot} (pid {pid}, generation {generation}) started");
        if let (Some(labels), Some(ends)) = (&mut self.labels, ends) {
            labels.add(worker, slot, pid, ends);
        }
        let (pipe, node, notify) = (Some(started.ready), started.node, started.notify);
        self.processes.insert(worker, Process { pid, generation, pipe, node, notify, status: None });
        self.interceptions.extend(interception.map(|interception| (worker, interception)));
        if let Some(bystander) = &mut self.bystander {
            bystander.wake(Instant::now());
        }
        self.pids.insert(pid, worker);
        Ok(pid)
    }

    /// The sockets that a worker is given.
    fn listeners(&mut self, borrower: Borrower) -> Result<Vec<Listener>, StartError> {
        let give = |address: &Address| match self.pool.give(borrower, *address) {
            Ok(socket) => Ok(Listener { name: address.socket.port().to_string(), socket }),
            Err(error) => Err(StartError::new(&format!("can't listen on {address}"), &error)),
        };
        self.listen.iter().map(give).collect()
    }

    /// What a generation starts with: read when the first of its workers starts, and the same for all.
    fn environment(&mut self, generation: u32) -> Result<Environment, StartError> {
        let oldest = self.fleet.crew().oldest_generation();
        self.environments.retain(|generation, _| *generation >= oldest);
        if let Some(environment) = self.environments.get(&generation) {
            return Ok(environment.clone());
        }
        let environment = self.sources.read().map_err(|why| StartError { why, status: 1 })?;
        self.environments.insert(generation, environment.clone());
        Ok(environment)
    }

    fn take_signals(&mut self) {
        for meaning in self.signals.pending() {
            match meaning {
                Meaning::Reap => self.reap(),
                Meaning::Reload => self.command_by_signal(Command::Reload(None)),
                Meaning::Stop(signal) => self.handle(Event::StopSignal { signal: signal.as_str() }),
                Meaning::Scale { more } => {
                    let target = if more { Target::More(1) } else { Target::Fewer(1) };
                    self.command_by_signal(Command::Scale(target));
                }
                Meaning::Forward(signal) => self.forward(signal),
            }
        }
    }

    fn forward(&self, signal: Signal) {
        debug!("{signal} is passed on to {}", count(self.processes.len(), "worker"));
        self.processes.values().for_each(|worker| worker::signal(worker.pid, signal));
    }

    fn reap(&mut self) {
        while let Some(reaped) = worker::reap(|pid| self.pids.contains_key(&pid)) {
            let Some(worker) = self.pids.remove(&reaped.pid) else {
                debug!("reaped orphan {}", reaped.pid);
                continue;
            };
            self.labels.iter_mut().for_each(|labels| labels.worker_ended(worker));
            self.processes.remove(&worker); // closing its fd takes it out of epoll
            if let Some(interception) = self.interceptions.get_mut(&worker) {
                interception.worker_has_ended();
            }
            self.drain.forget(worker);
            self.handle(Event::Ended { worker, end: reaped.end });
            let alive = |generation| self.processes.values().any(|worker| worker.generation == generation);
            self.unix.keep(|generation| self.fleet.crew().has_slot_of(generation) || alive(generation));
            self.signal_effects.keep(alive);
        }
    }

    fn answer(&mut self, worker: WorkerId, flags: EpollFlags) {
        if !flags.contains(EpollFlags::EPOLLIN) {
            self.interceptions.remove(&worker); // no process is behind the filter any more
            return;
        }
        let Some(interception) = self.interceptions.get_mut(&worker) else { return };
        let is_starting = self.fleet.crew().is_starting(worker);
        match interception.answer(&mut self.pool, &mut self.unix, is_starting) {
            Some(ListenChange::Listens(endpoint)) => self.handle(Event::Listens { worker, endpoint }),
            Some(ListenChange::StoppedListening(endpoint)) => {
                self.handle(Event::StoppedListening { worker, endpoint });
            }
            None => {}
        }
    }

    fn hear(&mut self, id: WorkerId, source: Source) {
        let Some(worker) = self.processes.get_mut(&id) else { return };
        let said = match source {
            Source::Pipe(_) => worker.pipe.as_ref().map(ReadyPipe::read),
            Source::Node(_) => worker.node.as_mut().map(NodeChannel::read),
            _ => Some(worker.notify.read(worker.pid)),
        };
        let pid = worker.pid;
        for said in said.unwrap_or_default() {
            match said {
                // What it was said on stays open: a worker that says it twice is not to die of SIGPIPE.
                Message::Ready => self.handle(Event::SaysReady { worker: id }),
                Message::Status(text) => {
                    let text = printable(text.as_bytes());
                    debug!("worker (pid {pid}) says: {text}");
                    if let Some(worker) = self.processes.get_mut(&id) {
                        worker.status = Some(text);
                    }
                }
                Message::Stopping => debug!("worker (pid {pid}) says that it stops"),
                Message::Closed => {
                    let Some(worker) = self.processes.get_mut(&id) else { return };
                    match source {
                        Source::Pipe(_) => worker.pipe = None,
                        _ => worker.node = None,
                    }
                }
            }
        }
    }
}
