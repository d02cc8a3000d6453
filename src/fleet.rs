//! What to do with the workers: slots, generations, reload, restart and stop.
//!
//! This module decides and knows no system call: [`Fleet::handle`] takes an event and the time, and
//! returns the actions that follow, in their order.
//!
//! A slot holds one worker of the generation that serves. A reload starts a second one beside it, of the
//! next generation, in every slot; when all of these are ready they become the generation that serves,
//! and the others retire.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::steering::Standing;

/// A worker, from its start to its end; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u32);

/// When a worker counts as ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// When it listens, or says so.
    Listen,
    /// When it says so.
    Notify,
    /// When it has lived for so long.
    Alive(Duration),
}

#[derive(Debug, Clone)]
pub struct Policy {
    pub workers: u32,
    pub readiness: Readiness,
    pub ready_timeout: Duration,
    /// How long a retired worker may take to finish what it has.
    pub drain: Duration,
    /// How long a worker may take to end after the stop signal.
    pub stop_timeout: Duration,
    /// The name of the stop signal.
    pub stop_signal: &'static str,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    Killed { signal: i32, name: &'static str },
}

impl End {
    /// The status by which a shell would report it.
    fn status(self) -> u8 {
        match self {
            Self::Exited(status) => status as u8,
            Self::Killed { signal, .. } => (128 + signal) as u8,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Killed { name, .. } => write!(f, "was killed by {name}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A worker was started as [`Action::Start`] asked.
    Started {
        worker: WorkerId,
        pid: i32,
    },
    /// It could not be. `status` is what the wrapper exits with if that is the end of it.
    StartFailed {
        worker: WorkerId,
        why: String,
        status: u8,
    },
    Listens {
        worker: WorkerId,
        address: Address,
    },
    StoppedListening {
        worker: WorkerId,
        address: Address,
    },
    SaysReady {
        worker: WorkerId,
    },
    /// A worker of [`Action::Drain`] has nothing left to do.
    Drained {
        worker: WorkerId,
    },
    Ended {
        worker: WorkerId,
        end: End,
    },
    Reload,
    /// The named signal asks for the end.
    Stop {
        signal: &'static str,
    },
    /// Time has passed: see [`Fleet::deadline`].
    Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start a worker; [`Event::Started`] or [`Event::StartFailed`] answers.
    Start {
        worker: WorkerId,
        slot: u32,
        generation: u32,
    },
    /// Point new connections where [`Fleet::standing`] now says.
    Steer,
    /// Watch what a worker still has to do, until [`Event::Drained`].
    Drain {
        worker: WorkerId,
    },
    /// Send it the stop signal.
    Signal {
        worker: WorkerId,
    },
    /// Send SIGKILL to its process group.
    Kill {
        worker: WorkerId,
    },
    /// Take back the sockets of a worker that has ended; for a successor if there will be one.
    Release {
        worker: WorkerId,
        successor: bool,
    },
    /// The successor that was promised to a worker of this slot and generation won't come.
    Unreserve {
        slot: u32,
        generation: u32,
    },
    Log {
        level: log::Level,
        line: String,
    },
    Exit {
        status: u8,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Starting {
        ready_by: Instant,
        /// When to say what is missing, once some of the addresses are there.
        hint_at: Option<Instant>,
    },
    Ready,
    Draining {
        until: Instant,
    },
    Stopping {
        kill_at: Instant,
    },
    /// SIGKILL was sent.
    Killed,
}

#[derive(Debug)]
struct Worker {
    slot: u32,
    generation: u32,
    pid: Option<i32>,
    started: Instant,
    ready_at: Option<Instant>,
    state: State,
    /// Where it listens.
    addresses: BTreeSet<Address>,
}

/// A place of the generation that serves.
#[derive(Debug, Default)]
struct Slot {
    /// Set while no worker is there: when to start the next.
    restart_at: Option<Instant>,
    /// How long the next restart waits.
    delay: Duration,
    /// Where its last ready worker listened: what a replacement has to do as well.
    addresses: BTreeSet<Address>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The first generation is not ready yet.
    Starting,
    Serving,
    /// The next generation starts.
    Replacing {
        since: Instant,
    },
    /// The next generation has become the one that serves, and the last one retires.
    Retiring {
        since: Instant,
    },
    /// The next generation failed and is stopped.
    Abandoning,
    /// Everything ends.
    Stopping {
        status: u8,
    },
}

/// See the module's comment.
#[derive(Debug)]
pub struct Fleet {
    policy: Policy,
    phase: Phase,
    /// The generation that serves, from 1.
    generation: u32,
    /// The newest generation that was begun.
    newest: u32,
    slots: Vec<Slot>,
    workers: BTreeMap<WorkerId, Worker>,
    next: WorkerId,
    begun: Instant,
    /// Whether to reload when the phase allows.
    reload_wanted: bool,
    actions: Vec<Action>,
}

/// The first restart of a slot is at once, the next after this; each doubles it.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// A worker that was ready for so long is restarted at once again.
const PROVEN: Duration = Duration::from_secs(10);
/// A replacement that listens on some addresses only is given so long before the log says what it lacks.
const HINT_AFTER: Duration = Duration::from_secs(1);

impl Fleet {
    /// A fleet that has yet to start, and the actions that do so.
    pub fn new(policy: Policy, now: Instant) -> (Self, Vec<Action>) {
        let mut fleet = Self {
            phase: Phase::Starting,
            generation: 1,
            newest: 1,
            slots: (0..policy.workers).map(|_| Slot::default()).collect(),
            workers: BTreeMap::new(),
            next: WorkerId(0),
            begun: now,
            reload_wanted: false,
            actions: Vec::new(),
            policy,
        };
        for slot in 0..fleet.policy.workers {
            fleet.start(slot, 1, now);
        }
        let actions = std::mem::take(&mut fleet.actions);
        (fleet, actions)
    }

    /// What follows from `event`.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Started { worker, pid } => {
                if let Some(worker) = self.workers.get_mut(&worker) {
                    worker.pid = Some(pid);
                }
            }
            Event::StartFailed { worker, why, status } => self.start_failed(worker, &why, status, now),
            Event::Listens { worker, address } => self.listens(worker, address, now),
            Event::StoppedListening { worker, address } => self.stopped_listening(worker, address),
            Event::SaysReady { worker } => self.says_ready(worker, now),
            Event::Drained { worker } => self.drained(worker, now),
            Event::Ended { worker, end } => self.ended(worker, end, now),
            Event::Reload => self.reload_asked(),
            Event::Stop { signal } => self.stop_asked(signal, now),
            Event::Tick => {}
        }
        self.tick(now);
        self.settle(now);
        std::mem::take(&mut self.actions)
    }

    /// Whether [`Action::Start`] of this worker still stands.
    pub fn wants(&self, worker: WorkerId) -> bool {
        self.workers.contains_key(&worker)
    }

    /// When to call [`Fleet::handle`] with [`Event::Tick`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let alive = match self.policy.readiness {
            Readiness::Alive(for_so_long) => Some(for_so_long),
            Readiness::Listen | Readiness::Notify => None,
        };
        let of_worker = |worker: &Worker| match worker.state {
            State::Starting { ready_by, hint_at } => {
                [Some(ready_by), hint_at, alive.map(|alive| worker.started + alive)]
                    .into_iter()
                    .flatten()
                    .min()
            }
            State::Draining { until } => Some(until),
            State::Stopping { kill_at } => Some(kill_at),
            State::Ready | State::Killed => None,
        };
        let workers = self.workers.values().filter_map(of_worker);
        workers.chain(self.slots.iter().filter_map(|slot| slot.restart_at)).min()
    }

    /// Tells what each worker is to the steering of new connections.
    pub fn standing(&self) -> impl Fn(WorkerId) -> Standing {
        // Once one of those that drain is told to stop, a good while has passed since the switch, and
        // whatever still comes to the others comes by mistake.
        let retired = |worker: &Worker| worker.generation != self.generation;
        let late = self.workers.values().any(|w| retired(w) && matches!(w.state, State::Stopping { .. }));
        move |id| match self.workers.get(&id) {
            Some(worker) => match worker.state {
                State::Ready if worker.generation == self.generation => Standing::Ready,
                State::Ready | State::Starting { .. } => Standing::Starting,
                State::Draining { .. } if !late => Standing::Draining,
                State::Draining { .. } | State::Stopping { .. } | State::Killed => Standing::Leaving,
            },
            None => Standing::Leaving,
        }
    }

    fn log(&mut self, level: log::Level, line: String) {
        self.actions.push(Action::Log { level, line });
    }

    fn info(&mut self, line: String) {
        self.log(log::Level::Info, line);
    }

    fn warn(&mut self, line: String) {
        self.log(log::Level::Warn, line);
    }

    /// "worker 2 (pid 12, generation 3)"
    fn name(&self, id: WorkerId) -> String {
        match self.workers.get(&id) {
            Some(Worker { slot, generation, pid: Some(pid), .. }) => {
                format!("worker {slot} (pid {pid}, generation {generation})")
            }
            Some(Worker { slot, generation, pid: None, .. }) => {
                format!("worker {slot} (generation {generation})")
            }
            None => "a worker".to_owned(),
        }
    }

    fn start(&mut self, slot: u32, generation: u32, now: Instant) {
        let id = self.next;
        self.next = WorkerId(id.0 + 1);
        let patience = match self.policy.readiness {
            Readiness::Alive(needed) => self.policy.ready_timeout.max(needed),
            Readiness::Listen | Readiness::Notify => self.policy.ready_timeout,
        };
        let state = State::Starting { ready_by: now + patience, hint_at: None };
        let (pid, ready_at, addresses) = (None, None, BTreeSet::new());
        let worker = Worker { slot, generation, pid, started: now, ready_at, state, addresses };
        self.workers.insert(id, worker);
        self.actions.push(Action::Start { worker: id, slot, generation });
    }

    fn listens(&mut self, id: WorkerId, address: Address, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.addresses.insert(address);
        match worker.state {
            State::Starting { ready_by, hint_at } if self.policy.readiness == Readiness::Listen => {
                worker.state = State::Starting { ready_by, hint_at: hint_at.or(Some(now + HINT_AFTER)) };
                if self.missing(id).is_empty() {
                    self.ready(id, now);
                }
            }
            State::Ready => {
                self.remember_addresses(id);
                self.actions.push(Action::Steer);
            }
            _ => {}
        }
    }

    fn stopped_listening(&mut self, id: WorkerId, address: Address) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.addresses.remove(&address);
        if worker.state == State::Ready {
            let name = self.name(id);
            self.warn(format!("{name} has stopped listening on {address}"));
            self.remember_addresses(id);
        }
        self.actions.push(Action::Steer);
    }

    fn says_ready(&mut self, id: WorkerId, now: Instant) {
        let starting = self.workers.get(&id).is_some_and(|w| matches!(w.state, State::Starting { .. }));
        if starting && !matches!(self.policy.readiness, Readiness::Alive(_)) {
            self.ready(id, now);
        }
    }

    /// The addresses on which a worker has to listen and doesn't yet.
    fn missing(&self, id: WorkerId) -> Vec<Address> {
        let Some(worker) = self.workers.get(&id) else { return Vec::new() };
        let wanted = &self.slots[worker.slot as usize].addresses;
        wanted.difference(&worker.addresses).copied().collect()
    }

    /// A worker of the generation that serves sets what its replacements have to do.
    fn remember_addresses(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get(&id).filter(|worker| worker.generation == self.generation) {
            self.slots[worker.slot as usize].addresses.clone_from(&worker.addresses);
        }
    }

    fn ready(&mut self, id: WorkerId, now: Instant) {
        let name = self.name(id);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.state = State::Ready;
        worker.ready_at = Some(now);
        let (generation, took) = (worker.generation, now - worker.started);
        self.log(log::Level::Debug, format!("{name} is ready after {}", millis(took)));
        if generation == self.generation {
            self.remember_addresses(id);
            self.actions.push(Action::Steer);
            if self.phase != Phase::Starting {
                self.info(format!("{name} is ready, a replacement, after {}", millis(took)));
            }
        }
        match self.phase {
            Phase::Starting if self.all_ready(generation) => {
                self.announce_ready(generation, self.begun, now);
                self.phase = Phase::Serving;
            }
            Phase::Replacing { since } if generation == self.newest && self.all_ready(generation) => {
                self.announce_ready(generation, since, now);
                self.switch(since, now);
            }
            _ => {}
        }
    }

    fn announce_ready(&mut self, generation: u32, since: Instant, now: Instant) {
        let of_generation = || self.workers.values().filter(|worker| worker.generation == generation);
        let addresses: BTreeSet<&Address> = of_generation().flat_map(|worker| &worker.addresses).collect();
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let on = if addresses.is_empty() { String::new() } else { format!(" on {}", addresses.join(" ")) };
        let workers = count(of_generation().count(), "worker");
        self.info(format!("generation {generation} is ready after {}: {workers}{on}", millis(now - since)));
    }

    fn all_ready(&self, generation: u32) -> bool {
        let ready = self.workers.values().filter(|w| w.generation == generation && w.state == State::Ready);
        ready.count() == self.slots.len()
    }

    /// The moment of a reload: the newest generation becomes the one that serves.
    fn switch(&mut self, since: Instant, now: Instant) {
        let last = self.generation;
        self.generation = self.newest;
        self.phase = Phase::Retiring { since };
        let retired: Vec<WorkerId> = self.of_generation(last);
        for id in &retired {
            if let Some(worker) = self.workers.get_mut(id).filter(|worker| worker.state == State::Ready) {
                worker.state = State::Draining { until: now + self.policy.drain };
            }
        }
        self.actions.push(Action::Steer);
        for slot in 0..self.slots.len() {
            if self.slots[slot].restart_at.take().is_some() {
                self.actions.push(Action::Unreserve { slot: slot as u32, generation: last });
            }
            self.slots[slot].delay = Duration::ZERO;
        }
        for id in self.of_generation(self.generation) {
            self.remember_addresses(id);
        }
        self.info(format!("generation {} serves; generation {last} drains", self.generation));
        for id in retired {
            match self.workers.get(&id).map(|worker| &worker.state) {
                Some(State::Draining { .. }) => self.actions.push(Action::Drain { worker: id }),
                Some(State::Starting { .. }) => self.stop(id, now), // it was a restart
                _ => {}
            }
        }
    }

    fn of_generation(&self, generation: u32) -> Vec<WorkerId> {
        let workers = self.workers.iter().filter(|(_, worker)| worker.generation == generation);
        workers.map(|(id, _)| *id).collect()
    }

    fn drained(&mut self, id: WorkerId, now: Instant) {
        if self.workers.get(&id).is_some_and(|w| matches!(w.state, State::Draining { .. })) {
            self.stop(id, now);
        }
    }

    /// Sends the stop signal, once.
    fn stop(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.pid.is_none() {
            self.workers.remove(&id); // its start has yet to be carried out, and won't be
            return;
        }
        match worker.state {
            State::Starting { .. } | State::Ready | State::Draining { .. } => {
                worker.state = State::Stopping { kill_at: now + self.policy.stop_timeout };
                self.actions.push(Action::Steer); // before the signal: it may shut its listener down
                self.actions.push(Action::Signal { worker: id });
            }
            State::Stopping { .. } | State::Killed => {}
        }
    }

    fn kill(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.state = State::Killed;
            self.actions.push(Action::Kill { worker: id });
            if let Phase::Stopping { status: status @ 0 } = &mut self.phase {
                *status = 1;
            }
        }
    }

    fn start_failed(&mut self, id: WorkerId, why: &str, status: u8, now: Instant) {
        let name = self.name(id);
        let Some(worker) = self.workers.remove(&id) else { return };
        let (slot, generation) = (worker.slot, worker.generation);
        match self.phase {
            Phase::Starting => self.give_up(&format!("{name} can't be started: {why}"), status, now),
            Phase::Replacing { .. } if generation == self.newest => {
                self.abandon(&format!("{name} can't be started: {why}"), now);
            }
            Phase::Stopping { .. } => {}
            _ if generation == self.generation => {
                self.warn(format!("{name} can't be started: {why}"));
                self.restart_later(slot, &worker, now);
            }
            _ => {}
        }
    }

    fn ended(&mut self, id: WorkerId, end: End, now: Instant) {
        let name = self.name(id);
        let Some(worker) = self.workers.remove(&id) else { return };
        let expected = matches!(worker.state, State::Stopping { .. } | State::Killed);
        let was_ready = worker.ready_at.is_some();
        let before = if was_ready { "" } else { " before it was ready" };
        let ended = format!("{name} {end}{before}");
        let serves = worker.generation == self.generation;
        match self.phase {
            Phase::Starting if !was_ready => {
                self.actions.push(Action::Release { worker: id, successor: false });
                self.give_up(&ended, end.status(), now);
            }
            Phase::Replacing { .. } if !serves => {
                self.actions.push(Action::Release { worker: id, successor: false });
                self.abandon(&ended, now);
            }
            Phase::Starting
            | Phase::Serving
            | Phase::Replacing { .. }
            | Phase::Retiring { .. }
            | Phase::Abandoning
                if serves =>
            {
                self.actions.push(Action::Release { worker: id, successor: true });
                self.warn(ended);
                self.restart_later(worker.slot, &worker, now);
                self.actions.push(Action::Steer);
            }
            _ => {
                self.actions.push(Action::Release { worker: id, successor: false });
                match worker.state {
                    State::Draining { .. } => self.warn(format!("{ended} while it drained")),
                    _ if expected => self.log(log::Level::Debug, ended),
                    _ => self.warn(ended),
                }
            }
        }
    }

    fn restart_later(&mut self, slot: u32, worker: &Worker, now: Instant) {
        let slot = &mut self.slots[slot as usize];
        if worker.ready_at.is_some_and(|ready_at| now - ready_at >= PROVEN) {
            slot.delay = Duration::ZERO;
        }
        slot.restart_at = Some(now + slot.delay);
        slot.delay = (slot.delay * 2).clamp(FIRST_DELAY, LONGEST_DELAY);
    }

    fn reload_asked(&mut self) {
        match self.phase {
            Phase::Stopping { .. } => self.info("no reload: everything is being stopped".to_owned()),
            Phase::Serving => self.reload_wanted = true,
            Phase::Starting => {
                self.reload_wanted = true;
                self.info("reload: as soon as the first generation is ready".to_owned());
            }
            _ => {
                self.reload_wanted = true;
                self.info("reload: once more as soon as this one is over".to_owned());
            }
        }
    }

    /// Ends what has nothing left to wait for, and begins what waited for that.
    fn settle(&mut self, now: Instant) {
        let other = self.workers.values().any(|worker| worker.generation != self.generation);
        match self.phase {
            Phase::Retiring { since } if !other => {
                self.phase = Phase::Serving;
                let (generation, took) = (self.generation, millis(now - since));
                self.info(format!("reload done after {took}: generation {generation} serves alone"));
            }
            Phase::Abandoning if !other => self.phase = Phase::Serving,
            Phase::Stopping { status } if self.workers.is_empty() => {
                self.actions.push(Action::Exit { status });
                return;
            }
            _ => {}
        }
        if self.phase == Phase::Serving && self.reload_wanted {
            self.reload_wanted = false;
            self.newest += 1;
            self.phase = Phase::Replacing { since: now };
            let (generation, workers) = (self.newest, count(self.slots.len(), "worker"));
            self.info(format!("reload: starting generation {generation}, {workers}"));
            for slot in 0..self.slots.len() as u32 {
                self.start(slot, generation, now);
            }
        }
    }

    /// The next generation is no good: stop it. The one that serves never noticed.
    fn abandon(&mut self, why: &str, now: Instant) {
        self.warn(format!("{why}; reload abandoned, generation {} serves on", self.generation));
        self.phase = Phase::Abandoning;
        for id in self.of_generation(self.newest) {
            self.stop(id, now);
        }
    }

    /// There is nothing that works: stop what there is and exit with `status`.
    fn give_up(&mut self, why: &str, status: u8, now: Instant) {
        self.log(log::Level::Error, format!("{why}; giving up"));
        self.stop_all(status, now);
    }

    fn stop_all(&mut self, status: u8, now: Instant) {
        self.phase = Phase::Stopping { status };
        for slot in 0..self.slots.len() {
            if self.slots[slot].restart_at.take().is_some() {
                self.actions.push(Action::Unreserve { slot: slot as u32, generation: self.generation });
            }
        }
        for id in self.workers.keys().copied().collect::<Vec<_>>() {
            self.stop(id, now);
        }
    }

    fn stop_asked(&mut self, signal: &'static str, now: Instant) {
        if matches!(self.phase, Phase::Stopping { .. }) {
            self.warn(format!("{signal} again: killing {}", count(self.workers.len(), "worker")));
            for id in self.workers.keys().copied().collect::<Vec<_>>() {
                self.kill(id);
            }
        } else {
            let (workers, how) = (count(self.workers.len(), "worker"), self.policy.stop_signal);
            self.info(format!("{signal}: stopping {workers} with {how}"));
            self.stop_all(0, now);
        }
    }

    /// Does what is due.
    fn tick(&mut self, now: Instant) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].restart_at.is_some_and(|at| at <= now) {
                self.slots[slot].restart_at = None;
                self.start(slot as u32, self.generation, now);
            }
        }
        for id in self.workers.keys().copied().collect::<Vec<_>>() {
            self.tick_worker(id, now);
        }
    }

    fn tick_worker(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        match worker.state {
            State::Starting { ready_by, hint_at } => {
                let lived = now - worker.started;
                if matches!(self.policy.readiness, Readiness::Alive(needed) if lived >= needed) {
                    self.ready(id, now);
                } else if ready_by <= now {
                    self.late(id, now);
                } else if hint_at.is_some_and(|at| at <= now) {
                    worker.state = State::Starting { ready_by, hint_at: None };
                    let (name, lacks) = (self.name(id), list(&self.missing(id)));
                    self.info(format!(
                        "{name} waits: it does not listen on {lacks}, as the worker it replaces does"
                    ));
                }
            }
            State::Draining { until } if until <= now => {
                let (name, drain) = (self.name(id), self.policy.drain);
                let drain = humantime::format_duration(drain);
                self.info(format!("{name} still had connections after {drain} (see --drain)"));
                self.stop(id, now);
            }
            State::Stopping { kill_at } if kill_at <= now => {
                let (name, timeout) = (self.name(id), humantime::format_duration(self.policy.stop_timeout));
                let signal = self.policy.stop_signal;
                self.warn(format!(
                    "{name} did not end within {timeout} of {signal} (see --stop-timeout); killing it"
                ));
                self.kill(id);
            }
            State::Draining { .. } | State::Stopping { .. } | State::Ready | State::Killed => {}
        }
    }

    /// A worker was not ready in time.
    fn late(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get(&id) else { return };
        let lacks = match self.policy.readiness {
            Readiness::Notify => "it said nothing on READY_FD".to_owned(),
            _ if worker.addresses.is_empty() => "it listens on no TCP port (see --ready)".to_owned(),
            _ => format!(
                "it does not listen on {}, as the worker it replaces does (see --ready notify)",
                list(&self.missing(id))
            ),
        };
        let serves = worker.generation == self.generation;
        let timeout = humantime::format_duration(self.policy.ready_timeout);
        let why = format!("{} was not ready within {timeout}: {lacks} (see --ready-timeout)", self.name(id));
        match self.phase {
            Phase::Starting => self.give_up(&why, 1, now),
            Phase::Replacing { .. } if !serves => self.abandon(&why, now),
            _ => {
                self.warn(format!("{why}; starting another"));
                self.stop(id, now);
            }
        }
    }
}

fn list(addresses: &[Address]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// "1 worker", "4 workers"
pub fn count(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

fn millis(duration: Duration) -> String {
    match duration.as_millis() {
        ms @ 0..10_000 => format!("{ms} ms"),
        ms => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
    }
}
