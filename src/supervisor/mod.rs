//! The poll loop: gathers events, asks the fleet what follows from them, and carries that out.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Instant;

use libc::c_int;
use log::{debug, info, log, warn};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use socket2::Socket;

use self::health::Health;
use self::source::Source;
use self::starts::Starts;
use crate::address::{Address, Endpoint};
use crate::cli::Options;
use crate::drain::Drain;
use crate::drain::idle::EndWatch;
use crate::drain::signal_effect::SignalEffect;
use crate::fleet::{
    Action, Announcement, Command, Endpoints, Event, Fleet, ReloadOptions, Target, UdpChange,
};
use crate::ids::WorkerId;
use crate::intercept::reader::{self, Reader};
use crate::intercept::udp::{Seen, UdpBinds};
use crate::intercept::{self, Answers, Interception, keeper};
use crate::kernel::{helper, inbox, procfs};
use crate::operate::control::Control;
use crate::operate::find::{self, Which};
use crate::operate::pidfile::PidFile;
use crate::operate::protocol::Name;
use crate::operate::signals::{Meaning, Signals};
use crate::operate::systemd::Systemd;
use crate::output::labels::Labels;
use crate::pool::paths::UnixSockets;
use crate::pool::unintercepted::{self, Unintercepted};
use crate::pool::{Pool, StoppedListening};
use crate::probe::{Outcome, Probes};
use crate::steering::Plan;
use crate::words::count;
use crate::worker::environment::Environments;
use crate::worker::ready::{NodeChannel, NotifySocket, ReadyPipe};
use crate::worker::{self, Change, Starter, Tether};

mod behind;
mod calls;
mod commands;
mod draining;
mod health;
mod hints;
mod messages;
mod source;
mod starts;

/// The process of a worker, and the ways by which it can say something.
struct Process {
    pid: Pid,
    generation: u32,
    /// `None` when the worker has closed its end, or has none.
    pipe: Option<ReadyPipe>,
    node: Option<NodeChannel>,
    notify: NotifySocket,
    _tether: Option<Tether>,
    /// Its last STATUS= message.
    status: Option<String>,
    /// If it is what a main process left, which went into the background: when that one was started.
    main_started: Option<u64>,
    /// Whether it had a listener when it was sent the stop signal.
    is_server: bool,
}

/// How it becomes known where workers listen.
enum ListenerWatch {
    Interception(Answers),
    Scan(Unintercepted),
}

pub struct Supervisor {
    fleet: Fleet,
    pool: Pool,
    unix: UnixSockets,
    probes: Probes,
    drain: Drain,
    signal_effect: SignalEffect,
    end_watch: Option<EndWatch>,
    /// Workers that are stopped by SIGSTOP, to be sure that they have finished their work.
    frozen: BTreeSet<WorkerId>,
    listener_watch: ListenerWatch,
    systemd: Systemd,
    /// `None` when the socket could not be bound.
    control: Option<Control>,
    pidfile: Option<PidFile>,
    labels: Option<Labels>,
    signals: Signals,
    starter: Starter,
    environments: Environments,
    /// Addresses whose sockets workers are given.
    listen: Vec<Address>,
    /// The listeners that this process was given itself, by inode number.
    inherited: Rc<[(u64, Endpoint)]>,
    stop_signal: Signal,
    /// What tells a worker that it gets no more connections.
    retire_signal: Option<Signal>,
    shares_udp: bool,
    starts: Starts,
    processes: BTreeMap<WorkerId, Process>,
    /// One for each worker; also for one that has ended, as long as a process that it started lives on.
    interceptions: BTreeMap<WorkerId, Interception>,
    udp_binds: UdpBinds,
    health: Health,
    reader: Reader,
    pids: HashMap<Pid, WorkerId>,
    /// Of which generations a worker has gone into the background.
    background: BTreeSet<u32>,
    epoll: Epoll,
    actions: VecDeque<Action>,
    /// Set at the end: what to exit with.
    exit: Option<u8>,
}

/// Runs the workers until the end, and returns the status to exit with.
///
/// # Errors
/// What keeps reuse-run from starting at all. From then on no error ends it.
pub fn run(options: Options) -> io::Result<u8> {
    let mut supervisor = Supervisor::new(options)?;
    supervisor.hint_at_program(supervisor.fleet.crew().generation());
    supervisor.act();
    let status = loop {
        if let Some(status) = supervisor.exit {
            break status;
        }
        supervisor.wait_and_handle();
    };
    supervisor.finish(status);
    Ok(status)
}

/// Finds out whether workers can be intercepted. If not, says what that means.
///
/// # Errors
/// When nothing else could tell that a worker is ready.
fn listener_watch(options: &Options) -> io::Result<ListenerWatch> {
    let answers = options.settings.intercept.then(intercept::probe).transpose();
    let why = match answers {
        Ok(Some(answers)) => return Ok(ListenerWatch::Interception(answers)),
        Ok(None) => "workers are not intercepted".to_owned(),
        Err(error) => format!("workers can't be intercepted ({error})"),
    };
    if options.shares_udp {
        let what =
            format!("{why}, so no UDP port that they bind can be shared: use -l udp:ADDRESS, not --udp");
        return Err(io::Error::other(what));
    }
    unintercepted::announce(&why, !options.listen.is_empty(), options.policy.readiness)?;
    Ok(ListenerWatch::Scan(Unintercepted::default()))
}

/// The control socket, if there can be one.
///
/// # Errors
/// When another reuse-run of this user has the name: commands couldn't tell them apart.
fn control(name: Option<Name>) -> io::Result<Option<Control>> {
    let warning =
        |error| warn!("no control socket, so reload, status, scale, recycle and stop can't work: {error}");
    let Some(name) = name else { return Ok(Control::new(None, None).map_err(warning).ok()) };
    let claim = find::claim(&name)?;
    let control = Control::new(Some(name.clone()), claim).map_err(warning).ok();
    // Where another user has kept it from making its claim; or an older reuse-run, which makes none.
    let found = find::find(Some(&Which::Name(name.clone()))).unwrap_or_default();
    match found.iter().map(|other| other.pid).find(|pid| *pid != std::process::id()) {
        Some(pid) => Err(find::has_name(pid, &name)),
        None => Ok(control),
    }
}

/// Rounded up to milliseconds: a time-out that is too short would come again and again.
fn epoll_timeout(deadline: Option<Instant>) -> EpollTimeout {
    let Some(deadline) = deadline else { return EpollTimeout::NONE };
    let left = deadline.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
    EpollTimeout::try_from(left.min(60_000) as i32).unwrap_or(EpollTimeout::ZERO)
}

fn watch(epoll: &Epoll, what: &impl AsFd, source: Source) -> io::Result<()> {
    Ok(epoll.add(what.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, source.to_token()))?)
}

impl Supervisor {
    fn new(options: Options) -> io::Result<Self> {
        // First: while SIGCHLD is ignored, a child that ends can't be waited for.
        let signals = Signals::new()?;
        let (labels, listener_watch) = (Labels::if_wanted(options.label)?, listener_watch(&options)?);
        let Options { program, mut settings, policy, sources, listen, balance, .. } = options;
        settings.intercept = matches!(listener_watch, ListenerWatch::Interception(_));
        // No core dump of this process may hold secrets (PR_SET_DUMPABLE(2const)).
        sources.has_values().then(|| nix::sys::prctl::set_dumpable(false)).transpose()?;
        let (stop_signal, hung_timeout) = (settings.stop_signal, policy.hung_timeout);
        let starter = Starter::new(settings, listen.len())?;
        let inherited: Rc<[(u64, Endpoint)]> = starter.inherited().into();
        let mut pool = Pool::new(balance)?;
        listen.iter().try_for_each(|address| pool.take(*address))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (reader, unix) = (reader::start()?, UnixSockets::new()?);
        watch(&epoll, &signals, Source::Signals).and_then(|()| watch(&epoll, &pool, Source::Pool))?;
        watch(&epoll, &reader, Source::Reader).and_then(|()| watch(&epoll, &unix, Source::Paths))?;
        let control = control(options.name)?;
        control.iter().try_for_each(|control| watch(&epoll, control, Source::Control))?;
        labels.iter().try_for_each(|labels| watch(&epoll, labels, Source::Labels))?;
        let intercepts = inherited.iter().filter(|_| settings.intercept); // a scan can't tell them from a worker's own
        let shared = intercepts.map(|(_, endpoint)| endpoint.clone());
        let endpoints = Endpoints::new(listen.iter().copied().collect(), shared.collect());
        let (fleet, actions) = Fleet::new(policy, endpoints, Instant::now());
        Ok(Self {
            fleet,
            pool,
            unix,
            probes: Probes::new(options.probe_path.unwrap_or_default()),
            drain: Drain::new(options.idle_rule),
            signal_effect: SignalEffect::default(),
            end_watch: None,
            listener_watch,
            systemd: Systemd::new(Instant::now()),
            control,
            pidfile: options.pidfile.map(PidFile::new).transpose()?,
            labels,
            signals,
            starter,
            environments: Environments::new(sources.with_current_directory(), program),
            listen,
            inherited,
            stop_signal,
            retire_signal: options.retire_signal,
            shares_udp: options.shares_udp,
            starts: Starts::default(),
            processes: BTreeMap::new(),
            interceptions: BTreeMap::new(),
            reader,
            udp_binds: UdpBinds::default(),
            health: Health::new(hung_timeout, options.max_memory, Instant::now()),
            frozen: BTreeSet::new(),
            pids: HashMap::new(),
            background: BTreeSet::new(),
            epoll,
            actions: actions.into(),
            exit: None,
        })
    }

    /// Removes what is left, and tells the clients that wait for the end.
    fn finish(mut self, status: u8) {
        self.unix.finish();
        self.stop_ended(status);
        self.labels.into_iter().for_each(Labels::finish);
        drop(self.pool);
        // Clients wait for the end of file. It comes when the process has ended, and with it every port is free.
        self.control.into_iter().for_each(Control::leave);
        drop(self.processes);
        inbox::leave();
        drop(self.starts);
        self.reader.finish();
        keeper::leave(self.interceptions.into_values());
    }

    fn wait_and_handle(&mut self) {
        self.labels.iter_mut().for_each(Labels::flush_and_watch);
        let deadline = self.deadline();
        let mut events = [EpollEvent::empty(); 256];
        let timeout = epoll_timeout(deadline.into_iter().chain(self.pool.deadline()).min());
        let ready = match self.epoll.wait(&mut events, timeout) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => 0,
            Err(error) => {
                warn!("can't wait for events: {error}");
                0
            }
        };
        let (mut pool_has_event, mut probed) = (false, Vec::new());
        for event in &events[..ready] {
            match Source::from_token(event.data()) {
                Source::Signals => self.take_signals(),
                Source::Pool => pool_has_event = true, // handled below, after the workers' system calls
                Source::Control => self.accept_clients(),
                Source::Client(id) => self.attend(id),
                Source::Labels => self.labels.iter_mut().for_each(Labels::read),
                Source::Filter(worker) => self.take_call(worker, event.events()),
                Source::Reader => self.take_readings(),
                Source::Paths => probed.extend(self.take_paths()),
                Source::Environment(generation) => self.take_environment(generation),
                Source::Start(worker) => self.advance_start(worker),
                Source::Probe(worker) => {
                    probed.extend(self.probes.advance(worker, &mut self.pool, Instant::now()));
                }
                source @ (Source::Pipe(worker) | Source::Node(worker) | Source::Notify(worker)) => {
                    self.read_messages(worker, source);
                }
            }
        }
        probed.extend(self.take_late(Instant::now()));
        self.fail_late_starts(Instant::now());
        let changed = self.pool.sample_queues(Instant::now());
        self.look_at_health(Instant::now());
        if !changed && ready == 0 && deadline.is_none_or(|at| at > Instant::now()) {
            return; // Woken for that sample alone, many times a second while connections come.
        }
        self.stop_drained();
        self.scan_listeners();
        if self.udp_binds.deadline().is_some_and(|at| at <= Instant::now()) {
            self.look_at_udp_ports();
        }
        self.probe(probed);
        self.systemd.ping_watchdog(Instant::now());
        if let Some(control) = &mut self.control {
            control.drop_idle(Instant::now());
        }
        for StoppedListening { worker, address } in self.pool.stopped_listening(pool_has_event) {
            self.handle(Event::StoppedListening { worker, endpoint: address.into() });
        }
        self.handle(Event::Tick);
        self.reset_unserved();
    }

    fn reset_unserved(&mut self) {
        for (address, connections) in self.pool.reset_unserved() {
            let connections = count(connections, "connection");
            info!("{connections} to {address} reset: there is no worker to accept them");
        }
    }

    /// Sends workers the requests that are due, and tells the fleet of those that have ended, with those that had before.
    fn probe(&mut self, mut ended: Vec<(WorkerId, Outcome)>) {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        let watch = |socket: &Socket, worker| {
            let token = Source::Probe(worker).to_token();
            Ok(self.epoll.add(socket, EpollEvent::new(flags, token))?)
        };
        ended.extend(self.probes.proceed(&mut self.pool, &mut self.unix, watch, Instant::now()));
        for (worker, outcome) in ended {
            if let Some(pid) = self.pid(worker) {
                let what = outcome.as_ref().map_or_else(String::as_str, |()| "has answered");
                debug!("worker (pid {pid}) {what}");
            }
            self.handle(Event::Probed { worker, outcome });
        }
    }

    /// Without interception: finds out which workers listen.
    fn scan_listeners(&mut self) {
        let ListenerWatch::Scan(scan) = &mut self.listener_watch else { return };
        let pid = |id: WorkerId| self.processes.get(&id).map(|process| (id, process.pid));
        let starting: Vec<(WorkerId, Pid)> =
            self.fleet.crew().starting().into_iter().filter_map(pid).collect();
        for (worker, address) in scan.scan(&starting, Instant::now()) {
            self.handle(Event::Listens { worker, endpoint: address.into() });
        }
    }

    fn look_at_udp_ports(&mut self) {
        for Seen { worker, address, is_held } in self.udp_binds.look(&procfs::udp_sockets(), Instant::now()) {
            let change = if is_held { UdpChange::Holds } else { UdpChange::Closed };
            self.react(Event::Udp { worker, address, change });
        }
    }

    /// When the loop has to go round at the latest, samples of the accept queues aside.
    fn deadline(&self) -> Option<Instant> {
        let scan = match &self.listener_watch {
            ListenerWatch::Interception(_) => None,
            ListenerWatch::Scan(scan) => scan.deadline(),
        };
        let deadlines = [
            scan,
            self.fleet.deadline(),
            self.drain.deadline(),
            self.end_watch.as_ref().map(EndWatch::deadline),
            self.probes.deadline(),
            self.udp_binds.deadline(),
            self.health.deadline(),
            self.reader.deadline(),
            self.unix.deadline(),
            self.starts.deadline(),
            self.systemd.deadline(),
            self.control.as_ref().and_then(Control::deadline),
            self.pool.has_news().then(Instant::now),
        ];
        deadlines.into_iter().flatten().min()
    }

    fn handle(&mut self, event: Event) {
        self.react(event);
        self.act();
    }

    /// Carries out actions until none is left. Some cause events, and these new actions.
    fn act(&mut self) {
        while let Some(action) = self.actions.pop_front() {
            match action {
                Action::Start { worker, slot, generation, shares_queue } => {
                    self.start(worker, slot, generation, shares_queue);
                }
                Action::LetInherit { heir, of } => self.pool.let_inherit(heir, of),
                Action::Steer(plan) => {
                    self.steer_paths(&plan);
                    if let Err(why) = self.pool.steer(plan) {
                        self.react(Event::SteerFailed { why });
                    }
                }
                Action::Switch(plan) => {
                    let outcome = self.pool.switch(plan);
                    self.react(Event::Switched { outcome });
                }
                Action::Probe { worker, endpoint } => {
                    if let Some(Process { generation, .. }) = self.processes.get(&worker) {
                        self.probes.begin(worker, *generation, endpoint, Instant::now());
                    }
                }
                Action::BeginGeneration { generation, command, like } => {
                    self.environments.begin(generation, command, like);
                    self.hint_at_program(generation);
                }
                Action::Drain { worker, addresses } => self.begin_drain(worker, addresses),
                Action::Signal { worker } => {
                    self.probes.forget(worker, &mut self.pool);
                    self.drain.forget(worker);
                    self.note_server(worker);
                    self.send_stop_signal(self.pid(worker));
                    self.thaw(worker);
                }
                Action::SignalBehind { worker } => self.send_stop_signal(self.behind(worker)),
                Action::Kill { worker } => {
                    self.explain_kill(worker);
                    self.pid(worker).into_iter().for_each(worker::kill_tree);
                }
                Action::Release { worker, successor } => self.pool.release(worker, successor),
                Action::ResetQueue { slot, generation } => self.pool.reset_reserved(slot, generation),
                Action::Explain { worker } => self.explain_delay(worker),
                Action::FindForeignListeners => self.pool.find_foreign_listeners(),
                Action::Unreserve { slot, generation } => self.pool.unreserve(slot, generation),
                Action::Log { level, line } => self.say(level, &line),
                Action::Announce(announcement) => {
                    if let Announcement::Stopping { .. } = announcement {
                        self.drain.hurry();
                    }
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

    /// Tells the fleet what an action has led to.
    fn react(&mut self, event: Event) {
        self.actions.extend(self.fleet.handle(event, Instant::now()));
    }

    /// Logs a line, and shows it to the users who wait for a command.
    fn say(&mut self, level: log::Level, line: &str) {
        log!(level, "{line}");
        if let Some(control) = self.control.as_mut().filter(|_| level <= log::Level::Info) {
            control.broadcast_step(line);
        }
    }

    fn steer_paths(&mut self, plan: &Plan) {
        match plan.generation {
            Some(generation) => self.unix.switch(generation),
            None => self.unix.remove_paths(),
        }
    }

    /// Closes the Unix sockets of generations that are gone.
    fn forget_paths(&mut self) {
        let alive = |generation| self.processes.values().any(|process| process.generation == generation);
        self.unix.keep(|generation| self.fleet.crew().has_slot_of(generation) || alive(generation));
    }

    /// The process of a worker, until it is reaped.
    fn pid(&self, worker: WorkerId) -> Option<Pid> {
        self.processes.get(&worker).map(|process| process.pid)
    }

    fn send_stop_signal(&self, pids: impl IntoIterator<Item = Pid>) {
        pids.into_iter().for_each(|pid| worker::signal(pid, self.stop_signal as c_int));
    }

    fn take_signals(&mut self) {
        for meaning in self.signals.pending() {
            match meaning {
                Meaning::Reap => {
                    self.reap();
                    self.read_what_waits();
                }
                Meaning::Reload => self.command_by_signal(Command::Reload(ReloadOptions::default())),
                Meaning::Stop(signal) => self.handle(Event::StopSignal { signal: signal.as_str() }),
                Meaning::Scale { more } => {
                    let target = if more { Target::More(1) } else { Target::Fewer(1) };
                    self.command_by_signal(Command::Scale(target));
                }
                Meaning::Forward(signal) => self.forward(signal),
            }
        }
    }

    /// Forwards a signal to the workers. One that is their stop signal comes from [`Action::Signal`] alone.
    fn forward(&mut self, signal: c_int) {
        if signal == self.stop_signal as c_int {
            debug!("signal {signal} is not forwarded: it is the stop signal");
            return;
        }
        self.advance_starts();
        debug!("signal {signal} is forwarded to {}", count(self.processes.len(), "worker"));
        self.processes.values().for_each(|process| worker::signal(process.pid, signal));
    }

    /// A process has ended, or a thread that does something for the wrapper has stopped.
    fn reap(&mut self) {
        loop {
            let interceptions = self.interceptions.values_mut();
            let errands: usize = interceptions.map(|it| it.run_errands(&mut self.pool)).sum();
            let mut heir = None;
            let reaped = match worker::reap(|ended| {
                let leads_group = self.pids.contains_key(&ended.pid) || self.starts.has(ended.pid);
                self.starts.worker(ended.pid).into_iter().for_each(|worker| self.advance_start(worker));
                heir = self.heir(ended);
                leads_group && !heir.is_some_and(|heir| heir.is_in_group_of(ended.pid))
            }) {
                Some(Change::Ended(reaped)) => reaped,
                Some(Change::Stopped) if errands > 0 => continue,
                Some(Change::Stopped) | None => return,
            };
            self.end_watch.iter_mut().for_each(|watch| watch.reaped(reaped.pid, reaped.end));
            let Some(worker) = self.pids.remove(&reaped.pid) else {
                debug!("reaped {}, which is no worker", reaped.pid);
                helper::forget(reaped.pid);
                continue;
            };
            if let Some(heir) = heir {
                self.goes_on_as(worker, heir);
                continue;
            }
            self.labels.iter_mut().for_each(|labels| labels.worker_ended(worker));
            self.explain_end(worker, reaped.end);
            if let Some(process) = self.processes.remove(&worker) {
                self.forget_messages(&process);
            }
            if let Some(interception) = self.interceptions.get_mut(&worker) {
                interception.worker_has_ended();
            }
            self.probes.forget(worker, &mut self.pool);
            self.drain.forget(worker);
            self.frozen.remove(&worker);
            self.udp_binds.remove_worker(worker);
            self.handle(Event::Ended { worker, end: reaped.end });
            self.forget_paths();
        }
    }
}
