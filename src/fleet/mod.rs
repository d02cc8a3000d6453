//! What to do with the workers: slots, generations, reload, restart and stop.
//!
//! This module decides and knows no system call: [`Fleet::handle`] takes an event and the time, and
//! returns the actions that follow, in their order.
//!
//! A slot holds one worker that serves. A reload starts a second one beside it, of the next generation, in
//! every slot, or in a batch of slots after the other; when all of these are ready they become the ones that
//! serve, and the others retire. To scale is to add slots, or to retire the last ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::address::{Address, Endpoint};
use crate::ids::{SlotId, WorkerId};
use crate::steering::{Plan, Role, Share};
use crate::words::{count, list, millis};

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
    /// After so many failed starts in a row, with no worker ready, everything ends. 0: never.
    pub max_failures: u32,
    /// How a signal's reload goes.
    pub rollout: Rollout,
}

/// How a reload replaces the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rollout {
    AllAtOnce,
    /// So many slots at a time, each batch when the one before is done.
    Batches(u32),
    /// All at once, after the next generation has had this share of new connections for so long.
    Canary {
        share: Share,
        period: Duration,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    /// By the signal of this number.
    Killed(i32),
}

impl End {
    /// The status by which a shell would report it.
    fn status(self) -> u8 {
        match self {
            Self::Exited(status) => status as u8,
            Self::Killed(signal) => (128 + signal) as u8,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Killed(signal) => match Signal::try_from(*signal) {
                Ok(signal) => write!(f, "was killed by {signal}"),
                Err(_) => write!(f, "was killed by signal {signal}"),
            },
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
        endpoint: Endpoint,
    },
    StoppedListening {
        worker: WorkerId,
        endpoint: Endpoint,
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
    Reload(Rollout),
    /// End the reload that goes on, or waits to, and keep the workers that serve.
    Abort,
    /// Have so many slots.
    Scale(u32),
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
        slot: SlotId,
        generation: u32,
    },
    /// Have the kernel send new connections where this plan says.
    Steer(Plan),
    /// Watch what a worker still has to do, until [`Event::Drained`].
    Drain {
        worker: WorkerId,
    },
    /// Send it the stop signal.
    Signal {
        worker: WorkerId,
    },
    /// Send the stop signal to those of its processes whose parent is a shell, which doesn't pass it on.
    SignalBehindShells {
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
    /// The successor of a worker of this slot and generation is long in coming: reset what waits for it.
    ResetQueue {
        slot: SlotId,
        generation: u32,
    },
    /// Look for programs that have come to share our addresses.
    LookForStrangers,
    /// The successor that was promised to a worker of this slot and generation won't come.
    Unreserve {
        slot: SlotId,
        generation: u32,
    },
    Log {
        level: log::Level,
        line: String,
    },
    /// Tell the service manager.
    Announce(Announcement),
    /// A reload that was to make this generation the one that serves is over, done or given up.
    ReloadEnded {
        generation: u32,
        result: Result<(), String>,
        /// Who serves now.
        serving: String,
        /// The worker that it failed by.
        culprit: Option<WorkerId>,
    },
    /// The number of slots is what [`Event::Scale`] wanted, or could not be.
    ScaleEnded {
        /// See [`Fleet::next_scaling`].
        number: u32,
        result: Result<(), String>,
        serving: String,
        culprit: Option<WorkerId>,
    },
    Exit {
        status: u8,
    },
}

/// How the service as a whole stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Announcement {
    Reloading,
    Ready { status: String },
    Stopping,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Starting {
        ready_by: Instant,
        /// Once it listens somewhere: when to say what is missing, or to believe that nothing is.
        hint_at: Option<Instant>,
    },
    Ready,
    Draining {
        until: Instant,
    },
    Stopping {
        /// When to have the signal reach those behind shells too.
        nudge_at: Option<Instant>,
        kill_at: Instant,
    },
    /// SIGKILL was sent.
    Killed {
        lost_at: Instant,
    },
}

#[derive(Debug)]
struct Worker {
    slot: SlotId,
    generation: u32,
    pid: Option<i32>,
    started: Instant,
    ready_at: Option<Instant>,
    state: State,
    /// Since when it has been in that state.
    since: Instant,
    /// Where it listens.
    endpoints: BTreeSet<Endpoint>,
}

impl Worker {
    fn enter(&mut self, state: State, now: Instant) {
        self.state = state;
        self.since = now;
    }
}

/// A place for a worker that serves.
#[derive(Debug)]
struct Slot {
    /// That of the worker that serves here, or will.
    generation: u32,
    /// How often a worker had to be started anew, other than by a reload.
    restarts: u32,
    /// Set while no worker is there: when to start the next.
    restart_at: Option<Instant>,
    /// Set from the end of a worker until the next is ready: when to stop having clients wait for it.
    reset_at: Option<Instant>,
    /// How long the next restart waits.
    delay: Duration,
    /// Where its last ready worker listened: what a replacement has to do as well.
    endpoints: BTreeSet<Endpoint>,
}

impl Slot {
    fn new(generation: u32) -> Self {
        Self {
            generation,
            restarts: 0,
            restart_at: None,
            reset_at: None,
            delay: Duration::ZERO,
            endpoints: BTreeSet::new(),
        }
    }

    /// Its worker is another by a reload.
    fn replaced_by(&mut self, generation: u32) {
        let endpoints = std::mem::take(&mut self.endpoints);
        *self = Self { endpoints, ..Self::new(generation) };
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The first generation is not ready yet.
    Starting,
    Serving,
    /// The next generation starts, in a batch of slots from this one on.
    Replacing {
        since: Instant,
        from: usize,
    },
    /// The next generation is tried with a share of the connections.
    Trying {
        since: Instant,
        until: Instant,
    },
    /// The next generation serves in all slots before `next`, and what served there retires.
    Retiring {
        since: Instant,
        next: usize,
    },
    /// The next generation failed and is stopped.
    Abandoning,
    /// There are new slots from this one on, or the workers of removed ones retire.
    Scaling {
        from: usize,
    },
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
    /// The newest generation that serves, from 1: in all slots, but while and after a rolling reload is given
    /// up.
    generation: u32,
    /// The newest generation that was begun.
    newest: u32,
    slots: Vec<Slot>,
    workers: BTreeMap<WorkerId, Worker>,
    next: WorkerId,
    /// Where several workers have listened.
    shared: BTreeSet<Endpoint>,
    begun: Instant,
    /// How the reload goes that is under way.
    rollout: Rollout,
    /// To reload when the phase allows, and how.
    reload_wanted: Option<Rollout>,
    /// To scale when the phase allows.
    scale_wanted: Option<u32>,
    /// How many scalings were begun.
    scalings: u32,
    last_reload: Option<LastReload>,
    /// Starts of the generation that serves which failed since the last that didn't.
    failures: u32,
    /// The status of the last of these.
    last_status: u8,
    actions: Vec<Action>,
}

/// How the last reload went.
#[derive(Debug, Clone)]
pub struct LastReload {
    pub generation: u32,
    pub result: Result<(), String>,
    pub ended: Instant,
}

/// How a slot stands, or a worker that doesn't serve in it: not yet, or no more.
#[derive(Debug)]
pub struct Place {
    pub slot: SlotId,
    pub generation: u32,
    pub serves: bool,
    /// `None` while the slot waits for its next worker.
    pub worker: Option<(WorkerId, i32)>,
    pub state: &'static str,
    pub since: Option<Instant>,
    pub started: Option<Instant>,
    /// Of the slot.
    pub restarts: u32,
}

/// The first restart of a slot is at once, the next after this; each doubles it.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// A worker that was ready for so long is restarted at once again.
const PROVEN: Duration = Duration::from_secs(10);
/// A replacement that listens on some addresses only is given so long before the log says what it lacks. One
/// that has a Unix socket only, which nobody shares, is given so long to listen elsewhere as well.
const HINT_AFTER: Duration = Duration::from_secs(1);
/// Clients wait so long for the next worker of a slot; from then on they had better try again.
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// A worker that is a shell, or npm, which runs one, ends only with the program in it. A shell that has
/// passed the signal on, as a trap can, has done so by then.
const NUDGE_AFTER: Duration = Duration::from_secs(1);
/// A process that has not ended so long after SIGKILL is stuck in the kernel, and is waited for no more.
const LOST_AFTER: Duration = Duration::from_secs(10);

impl Fleet {
    /// A fleet that has yet to start, and the actions that do so.
    pub fn new(policy: Policy, now: Instant) -> (Self, Vec<Action>) {
        let mut fleet = Self {
            phase: Phase::Starting,
            generation: 1,
            newest: 1,
            slots: (0..policy.workers).map(|_| Slot::new(1)).collect(),
            workers: BTreeMap::new(),
            next: WorkerId(0),
            begun: now,
            shared: BTreeSet::new(),
            rollout: policy.rollout,
            reload_wanted: None,
            scale_wanted: None,
            scalings: 0,
            last_reload: None,
            failures: 0,
            last_status: 0,
            actions: Vec::new(),
            policy,
        };
        for slot in 0..fleet.policy.workers {
            fleet.start(SlotId(slot), 1, now);
        }
        let actions = std::mem::take(&mut fleet.actions);
        (fleet, actions)
    }

    /// What follows from `event`.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Started { worker, pid } => self.started(worker, pid, now),
            Event::StartFailed { worker, why, status } => self.start_failed(worker, &why, status, now),
            Event::Listens { worker, endpoint } => self.listens(worker, endpoint, now),
            Event::StoppedListening { worker, endpoint } => self.stopped_listening(worker, &endpoint, now),
            Event::SaysReady { worker } => self.says_ready(worker, now),
            Event::Drained { worker } => self.drained(worker, now),
            Event::Ended { worker, end } => self.ended(worker, end, now),
            Event::Reload(rollout) => self.reload_asked(rollout),
            Event::Abort => self.abort_asked(now),
            Event::Scale(workers) => self.scale_asked(workers),
            Event::Stop { signal } => self.stop_asked(signal, now),
            Event::Tick => self.tick(now),
        }
        self.restart(now);
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
            State::Stopping { nudge_at, kill_at } => nudge_at.into_iter().chain([kill_at]).min(),
            State::Killed { lost_at } => Some(lost_at),
            State::Ready => None,
        };
        let workers = self.workers.values().filter_map(of_worker);
        let slots = self.slots.iter().flat_map(|slot| [slot.restart_at, slot.reset_at]).flatten();
        let trial = match self.phase {
            Phase::Trying { until, .. } => Some(until),
            _ => None,
        };
        workers.chain(slots).chain(trial).min()
    }

    /// The newest generation that serves.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The oldest generation of which a worker may yet be started.
    pub fn oldest_generation(&self) -> u32 {
        self.slots.iter().map(|slot| slot.generation).min().unwrap_or(self.generation)
    }

    /// Whether a worker of this generation serves in some slot, or will.
    pub fn has_slot_of(&self, generation: u32) -> bool {
        self.slots.iter().any(|slot| slot.generation == generation)
    }

    /// The generation that a reload will make, if it is asked for now.
    pub fn next_generation(&self) -> u32 {
        self.newest + 1
    }

    pub fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The number, from 1, of the scaling that is begun, or waits, if it is asked for now.
    pub fn next_scaling(&self) -> u32 {
        self.scalings + 1
    }

    /// How the reload goes that waits its turn, if one does.
    pub fn waiting_reload(&self) -> Option<Rollout> {
        self.reload_wanted
    }

    /// How many workers there are to be.
    pub fn workers_wanted(&self) -> u32 {
        self.scale_wanted.unwrap_or(self.slots.len() as u32)
    }

    pub fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Stopping { .. })
    }

    /// How a signal's reload goes.
    pub fn default_rollout(&self) -> Rollout {
        self.policy.rollout
    }

    pub fn last_reload(&self) -> Option<&LastReload> {
        self.last_reload.as_ref()
    }

    /// What the fleet is doing, in a word.
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Starting => "starting",
            Phase::Serving => "serving",
            Phase::Replacing { .. } | Phase::Trying { .. } | Phase::Retiring { .. } => "reloading",
            Phase::Abandoning => "abandoning a reload",
            Phase::Scaling { .. } => "scaling",
            Phase::Stopping { .. } => "stopping",
        }
    }

    /// Where workers listen or have listened, as far as clients are concerned.
    pub fn endpoints(&self) -> BTreeSet<&Endpoint> {
        let endpoints = self.slots.iter().flat_map(|slot| &slot.endpoints);
        endpoints.filter(|endpoint| self.is_public(endpoint) || self.slots.len() == 1).collect()
    }

    /// How all slots and workers stand, by slot, those that serve first.
    pub fn places(&self) -> Vec<Place> {
        let of_worker = |(id, worker): (&WorkerId, &Worker)| Place {
            slot: worker.slot,
            generation: worker.generation,
            serves: self.serves(worker),
            worker: worker.pid.map(|pid| (*id, pid)),
            state: match worker.state {
                State::Starting { .. } => "starting",
                State::Ready => "ready",
                State::Draining { .. } => "draining",
                State::Stopping { .. } => "stopping",
                State::Killed { .. } => "killed",
            },
            since: Some(worker.since),
            started: Some(worker.started),
            restarts: self.slots.get(worker.slot.index()).map_or(0, |slot| slot.restarts),
        };
        let mut places: Vec<Place> = self.workers.iter().map(of_worker).collect();
        for (number, slot) in (0..).map(SlotId).zip(&self.slots) {
            if !places.iter().any(|place| place.slot == number && place.serves) {
                let (generation, restarts) = (slot.generation, slot.restarts);
                let (serves, worker, state) = (true, None, "down");
                let (since, started) = (None, None);
                places.push(Place {
                    slot: number,
                    generation,
                    serves,
                    worker,
                    state,
                    since,
                    started,
                    restarts,
                });
            }
        }
        places.sort_by_key(|place| (place.slot, !place.serves, place.generation));
        places
    }

    /// Whether a worker is the one of its slot.
    fn serves(&self, worker: &Worker) -> bool {
        self.slots.get(worker.slot.index()).is_some_and(|slot| slot.generation == worker.generation)
    }

    /// The workers that have yet to become ready.
    pub fn starting(&self) -> Vec<WorkerId> {
        let starting = |worker: &Worker| matches!(worker.state, State::Starting { .. });
        self.workers.iter().filter(|(_, worker)| starting(worker)).map(|(id, _)| *id).collect()
    }

    pub fn is_starting(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|worker| matches!(worker.state, State::Starting { .. }))
    }

    /// The TCP addresses that a worker listens on.
    pub fn addresses(&self, worker: WorkerId) -> impl Iterator<Item = Address> {
        let endpoints = self.workers.get(&worker).map(|worker| &worker.endpoints).into_iter().flatten();
        endpoints.filter_map(|endpoint| match endpoint {
            Endpoint::Tcp(address) => Some(*address),
            Endpoint::Unix(_) => None,
        })
    }

    /// Which workers get new connections.
    fn plan(&self) -> Plan {
        let roles = self.workers.iter().filter_map(|(id, worker)| Some((*id, self.role(worker)?))).collect();
        let share = match (self.phase, self.rollout) {
            (Phase::Trying { .. }, Rollout::Canary { share, .. }) => share,
            _ => Share::default(),
        };
        Plan { roles, share, generation: self.generation }
    }

    /// What a worker is to the steering; `None` for one that starts.
    fn role(&self, worker: &Worker) -> Option<Role> {
        match worker.state {
            State::Ready if self.serves(worker) => Some(Role::Ready),
            State::Ready if matches!(self.phase, Phase::Trying { .. }) => Some(Role::Canary),
            State::Ready | State::Starting { .. } => None,
            State::Draining { .. } => Some(Role::Draining),
            State::Stopping { .. } | State::Killed { .. } => Some(Role::Leaving),
        }
    }

    fn steer(&mut self) {
        let plan = self.plan();
        self.actions.push(Action::Steer(plan));
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

    fn start(&mut self, slot: SlotId, generation: u32, now: Instant) {
        let id = self.next;
        self.next = WorkerId(id.0 + 1);
        let state = State::Starting { ready_by: now + self.policy.ready_timeout, hint_at: None };
        let (pid, ready_at, endpoints) = (None, None, BTreeSet::new());
        let (started, since) = (now, now);
        let worker = Worker { slot, generation, pid, started, ready_at, state, since, endpoints };
        self.workers.insert(id, worker);
        self.actions.push(Action::Start { worker: id, slot, generation });
    }

    fn started(&mut self, id: WorkerId, pid: i32, now: Instant) {
        let patience = match self.policy.readiness {
            Readiness::Alive(needed) => self.policy.ready_timeout.max(needed),
            Readiness::Listen | Readiness::Notify => self.policy.ready_timeout,
        };
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.pid = Some(pid);
            worker.started = now;
            worker.enter(State::Starting { ready_by: now + patience, hint_at: None }, now);
        }
    }

    fn listens(&mut self, id: WorkerId, endpoint: Endpoint, now: Instant) {
        let newly_shared = !self.is_public(&endpoint) && self.is_anothers(id, &endpoint);
        if newly_shared {
            self.shared.insert(endpoint.clone());
        }
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.endpoints.insert(endpoint);
        match worker.state {
            State::Starting { ready_by, hint_at } if self.policy.readiness == Readiness::Listen => {
                worker.state = State::Starting { ready_by, hint_at: hint_at.or(Some(now + HINT_AFTER)) };
                if newly_shared { self.look_again(now) } else { self.look_again_at(id, now) }
            }
            State::Ready => {
                self.remember_endpoints(id);
                self.steer();
            }
            _ => {}
        }
    }

    /// Whether another worker than this one listens there, or has.
    fn is_anothers(&self, id: WorkerId, endpoint: &Endpoint) -> bool {
        let others = self.workers.iter().filter(|(other, _)| **other != id);
        let others = others.map(|(_, worker)| &worker.endpoints);
        let before = self.slots.iter().map(|slot| &slot.endpoints);
        others.chain(before).any(|endpoints| endpoints.contains(endpoint))
    }

    fn stopped_listening(&mut self, id: WorkerId, endpoint: &Endpoint, now: Instant) {
        let is_public = self.is_public(endpoint);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.endpoints.remove(endpoint);
        if worker.state == State::Ready {
            let name = self.name(id);
            if is_public {
                self.warn(format!("{name} has stopped listening on {endpoint}"));
            }
            self.remember_endpoints(id);
            self.look_again(now);
            let on_trial = matches!(self.phase, Phase::Trying { .. }) && !self.missing(id).is_empty();
            if on_trial && !self.workers.get(&id).is_some_and(|worker| self.serves(worker)) {
                self.abandon(&format!("{name} has stopped listening on {endpoint}"), Some(id), now);
            }
        }
        self.steer();
    }

    /// Workers that start may have what it takes by now: another listens where they do, or their predecessors
    /// have stopped to.
    fn look_again(&mut self, now: Instant) {
        let starting = |worker: &Worker| matches!(worker.state, State::Starting { .. });
        let candidates = self.workers.iter().filter(|(_, worker)| starting(worker)).map(|(id, _)| *id);
        candidates.collect::<Vec<_>>().into_iter().for_each(|id| self.look_again_at(id, now));
    }

    fn look_again_at(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get(&id) else { return };
        let is_starting = matches!(worker.state, State::Starting { .. });
        let listens = worker.endpoints.iter().any(|endpoint| self.is_public(endpoint));
        if self.policy.readiness == Readiness::Listen && is_starting && listens && self.missing(id).is_empty()
        {
            self.ready(id, now);
        }
    }

    /// Whether clients come there. A Unix socket may be a worker's own, for processes that it starts, until
    /// another worker listens there as well.
    fn is_public(&self, endpoint: &Endpoint) -> bool {
        matches!(endpoint, Endpoint::Tcp(_)) || self.shared.contains(endpoint)
    }

    fn says_ready(&mut self, id: WorkerId, now: Instant) {
        let starting = self.workers.get(&id).is_some_and(|w| matches!(w.state, State::Starting { .. }));
        if starting && !matches!(self.policy.readiness, Readiness::Alive(_)) {
            self.ready(id, now);
        }
    }

    /// Where a worker has to listen and doesn't yet.
    fn missing(&self, id: WorkerId) -> Vec<Endpoint> {
        let Some(worker) = self.workers.get(&id) else { return Vec::new() };
        let Some(Slot { endpoints: wanted, .. }) = self.slots.get(worker.slot.index()) else {
            return Vec::new();
        };
        wanted.difference(&worker.endpoints).filter(|endpoint| self.is_public(endpoint)).cloned().collect()
    }

    /// A worker that serves sets what its replacements have to do.
    fn remember_endpoints(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get(&id).filter(|worker| self.serves(worker)) {
            self.slots[worker.slot.index()].endpoints.clone_from(&worker.endpoints);
        }
    }

    fn ready(&mut self, id: WorkerId, now: Instant) {
        let name = self.name(id);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.enter(State::Ready, now);
        worker.ready_at = Some(now);
        let (slot, generation, took) = (worker.slot.index(), worker.generation, now - worker.started);
        let serves = self.workers.get(&id).is_some_and(|worker| self.serves(worker));
        self.log(log::Level::Debug, format!("{name} is ready after {}", millis(took)));
        if serves {
            self.failures = 0;
            self.slots[slot].reset_at = None;
            self.remember_endpoints(id);
            self.steer();
            if self.phase != Phase::Starting {
                let is_new = self.slots[slot].restarts == 0;
                let what = if is_new { "a new one" } else { "a replacement" };
                self.info(format!("{name} is ready, {what}, after {}", millis(took)));
                // What it has not taken up of its predecessor's it never will.
                self.actions.push(Action::Unreserve { slot: SlotId::of_index(slot), generation });
            }
        }
        match self.phase {
            Phase::Starting if self.are_ready(0..self.slots.len(), generation) => {
                self.announce_ready(generation, self.begun, now);
                self.phase = Phase::Serving;
                self.announce_serving();
            }
            Phase::Replacing { since, from } if self.are_ready(self.batch(from), self.newest) => {
                self.announce_ready(self.newest, since, now);
                if let Rollout::Canary { share, period } = self.rollout {
                    self.phase = Phase::Trying { since, until: now + period };
                    let period = humantime::format_duration(period);
                    let newest = self.newest;
                    self.info(format!("generation {newest} gets {share} of new connections for {period}"));
                    self.steer();
                } else {
                    self.switch(since, from, now);
                }
            }
            _ => {}
        }
    }

    fn announce_ready(&mut self, generation: u32, since: Instant, now: Instant) {
        let is_ready = |worker: &&Worker| worker.generation == generation && worker.state == State::Ready;
        let of_generation = || self.workers.values().filter(is_ready);
        let endpoints: BTreeSet<&Endpoint> = of_generation().flat_map(|worker| &worker.endpoints).collect();
        let on = if endpoints.is_empty() { String::new() } else { format!(" on {}", list(endpoints)) };
        let workers = count(of_generation().count(), "worker");
        self.info(format!("generation {generation} is ready after {}: {workers}{on}", millis(now - since)));
    }

    fn announce_serving(&mut self) {
        self.actions.push(Action::Announce(Announcement::Ready { status: self.who_serves() }));
    }

    /// "4 workers of generation 3"; after a rolling reload that was given up, "2 workers of generation 3 and 2 of
    /// generation 2".
    fn composition(&self) -> String {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        for slot in &self.slots {
            *counts.entry(slot.generation).or_default() += 1;
        }
        let mut counts = counts.into_iter().rev();
        let (generation, first) = counts.next().unwrap_or((self.generation, 0));
        let mut text = format!("{} of generation {generation}", count(first, "worker"));
        for (generation, number) in counts {
            text += &format!(" and {number} of generation {generation}");
        }
        text
    }

    /// "4 workers of generation 3 serve"
    pub fn who_serves(&self) -> String {
        format!("{} {}", self.composition(), if self.slots.len() == 1 { "serves" } else { "serve" })
    }

    /// The slots that are replaced together, from the first of them on.
    fn batch(&self, from: usize) -> Range<usize> {
        let most = match self.rollout {
            Rollout::Batches(most) => most as usize,
            Rollout::AllAtOnce | Rollout::Canary { .. } => self.slots.len(),
        };
        from..self.slots.len().min(from.saturating_add(most))
    }

    fn are_ready(&self, slots: Range<usize>, generation: u32) -> bool {
        let is_ready = |worker: &&Worker| {
            let of_these = slots.contains(&(worker.slot.index())) && worker.generation == generation;
            of_these && worker.state == State::Ready
        };
        self.workers.values().filter(is_ready).count() == slots.len()
    }

    /// The moment of a reload: the newest generation becomes the one that serves, in a batch of slots.
    fn switch(&mut self, since: Instant, from: usize, now: Instant) {
        let batch = self.batch(from);
        let retired: Vec<WorkerId> = self
            .workers
            .iter()
            .filter(|(_, worker)| batch.contains(&(worker.slot.index())) && self.serves(worker))
            .map(|(id, _)| *id)
            .collect();
        let last = self.slots[from].generation;
        self.generation = self.newest;
        self.phase = Phase::Retiring { since, next: batch.end };
        self.retire(&retired, now);
        for slot in batch.clone() {
            self.actions.push(Action::Unreserve {
                slot: SlotId::of_index(slot),
                generation: self.slots[slot].generation,
            });
            self.slots[slot].replaced_by(self.newest);
        }
        self.failures = 0;
        for id in self.of_generation(self.newest) {
            self.remember_endpoints(id);
        }
        self.steer();
        if batch.len() == self.slots.len() {
            self.info(format!("generation {} serves; generation {last} drains", self.generation));
        } else {
            let (slots, done) = (self.slots.len(), batch.end);
            self.info(format!("generation {} serves in {done} of {slots} slots", self.generation));
        }
        self.let_go(&retired, now);
    }

    /// Marks workers that get no more connections, before the program is told.
    fn retire(&mut self, workers: &[WorkerId], now: Instant) {
        let until = now + self.policy.drain;
        for id in workers {
            if let Some(worker) = self.workers.get_mut(id).filter(|worker| worker.state == State::Ready) {
                worker.enter(State::Draining { until }, now);
            }
        }
    }

    /// Has retired workers end when they have finished what they have: after the program was told.
    fn let_go(&mut self, workers: &[WorkerId], now: Instant) {
        for id in workers {
            match self.workers.get(id).map(|worker| &worker.state) {
                Some(State::Draining { .. }) => self.actions.push(Action::Drain { worker: *id }),
                Some(State::Starting { .. }) => self.stop(*id, now), // it was a restart
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
                let (nudge_at, kill_at) = (Some(now + NUDGE_AFTER), now + self.policy.stop_timeout);
                worker.enter(State::Stopping { nudge_at, kill_at }, now);
                self.steer(); // before the signal: it may shut its listener down
                self.actions.push(Action::Signal { worker: id });
            }
            State::Stopping { .. } | State::Killed { .. } => {}
        }
    }

    fn kill(&mut self, id: WorkerId, now: Instant) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.enter(State::Killed { lost_at: now + LOST_AFTER }, now);
            self.actions.push(Action::Kill { worker: id });
            if let Phase::Stopping { status: status @ 0 } = &mut self.phase {
                *status = 1;
            }
        }
    }

    fn start_failed(&mut self, id: WorkerId, why: &str, status: u8, now: Instant) {
        let name = self.name(id);
        let Some(worker) = self.workers.remove(&id) else { return };
        let why = format!("{name} can't be started: {why}");
        // What it was to be given is for the next.
        let successor = self.serves(&worker) && !self.is_on_trial(&worker) && !self.is_over();
        self.actions.push(Action::Release { worker: id, successor });
        match self.phase {
            Phase::Starting => self.give_up(&why, status, now),
            Phase::Stopping { .. } => {}
            _ if self.is_on_trial(&worker) => self.abandon(&why, Some(id), now),
            _ if self.serves(&worker) => {
                self.warn(why);
                self.restart_later(&worker, status, now);
            }
            _ => {}
        }
    }

    /// Whether a reload has replaced some slots and not all.
    fn is_rolling(&self) -> bool {
        match self.phase {
            Phase::Replacing { from, .. } => from > 0,
            Phase::Retiring { next, .. } => next < self.slots.len(),
            _ => false,
        }
    }

    /// Whether no worker is started any more.
    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Stopping { .. })
    }

    /// Whether the reload, or the scaling, stands and falls with a worker.
    fn is_on_trial(&self, worker: &Worker) -> bool {
        match self.phase {
            Phase::Replacing { .. } | Phase::Trying { .. } => {
                worker.generation == self.newest && !self.serves(worker)
            }
            Phase::Scaling { from } => {
                worker.ready_at.is_none() && worker.slot.index() >= from && self.serves(worker)
            }
            _ => false,
        }
    }

    fn ended(&mut self, id: WorkerId, end: End, now: Instant) {
        let name = self.name(id);
        let Some(worker) = self.workers.remove(&id) else { return };
        let expected = matches!(worker.state, State::Stopping { .. } | State::Killed { .. });
        let was_ready = worker.ready_at.is_some();
        let before = if was_ready { "" } else { " before it was ready" };
        let ended = format!("{name} {end}{before}");
        let successor = self.serves(&worker) && !self.is_on_trial(&worker);
        match self.phase {
            Phase::Starting if !was_ready => {
                self.actions.push(Action::Release { worker: id, successor: false });
                self.give_up(&ended, end.status(), now);
            }
            Phase::Stopping { .. } => {
                self.actions.push(Action::Release { worker: id, successor: false });
                self.log(if expected { log::Level::Debug } else { log::Level::Warn }, ended);
            }
            _ if self.is_on_trial(&worker) => {
                self.actions.push(Action::Release { worker: id, successor: false });
                self.abandon(&ended, Some(id), now);
            }
            _ if successor => {
                self.actions.push(Action::Release { worker: id, successor: true });
                let is_new = worker.generation == self.newest && self.is_rolling();
                self.restart_later(&worker, end.status(), now);
                self.steer();
                if is_new {
                    self.abandon(&ended, Some(id), now);
                } else {
                    self.warn(ended);
                }
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

    fn restart_later(&mut self, worker: &Worker, status: u8, now: Instant) {
        let slot = &mut self.slots[worker.slot.index()];
        slot.restarts += 1;
        match worker.ready_at {
            Some(ready_at) if now - ready_at >= PROVEN => slot.delay = Duration::ZERO,
            Some(_) => {}
            None => {
                self.failures += 1;
                self.last_status = status;
            }
        }
        slot.restart_at = Some(now + slot.delay);
        slot.delay = (slot.delay * 2).clamp(FIRST_DELAY, LONGEST_DELAY);
        slot.reset_at.get_or_insert(now + LONGEST_WAIT);
    }

    /// Whether there is nothing that works and no prospect of it.
    fn is_hopeless(&self) -> bool {
        let ready = || self.workers.values().any(|worker| worker.state == State::Ready);
        self.policy.max_failures > 0 && self.failures >= self.policy.max_failures && !ready()
    }

    fn reload_asked(&mut self, rollout: Rollout) {
        match self.phase {
            Phase::Stopping { .. } => {
                self.info("no reload: everything is being stopped".to_owned());
                return;
            }
            Phase::Serving => {}
            Phase::Starting => self.info("reload: as soon as the first generation is ready".to_owned()),
            Phase::Scaling { .. } => self.info("reload: as soon as the scaling is over".to_owned()),
            _ => self.info("reload: once more as soon as this one is over".to_owned()),
        }
        self.reload_wanted = Some(rollout);
    }

    fn scale_asked(&mut self, workers: u32) {
        match self.phase {
            Phase::Stopping { .. } => {
                self.info("no scaling: everything is being stopped".to_owned());
                return;
            }
            Phase::Serving => {}
            _ => self.info(format!("scale to {workers}: as soon as what goes on is over")),
        }
        self.scale_wanted = Some(workers);
    }

    /// Whether [`Event::Abort`] would end a reload.
    pub fn can_abort(&self) -> bool {
        let goes_on = match self.phase {
            Phase::Replacing { .. } | Phase::Trying { .. } => true,
            Phase::Retiring { .. } => self.is_rolling(),
            _ => false,
        };
        goes_on || self.reload_wanted.is_some()
    }

    fn abort_asked(&mut self, now: Instant) {
        match self.phase {
            Phase::Replacing { .. } | Phase::Trying { .. } => self.abandon("aborted", None, now),
            Phase::Retiring { .. } if self.is_rolling() => self.abandon("aborted", None, now),
            _ => {}
        }
        if self.reload_wanted.take().is_some() {
            let (generation, result) = (self.next_generation(), Err("aborted".to_owned()));
            let serving = self.who_serves();
            self.actions.push(Action::ReloadEnded { generation, result, serving, culprit: None });
        }
    }

    /// Ends what has nothing left to wait for, and begins what waited for that.
    fn settle(&mut self, now: Instant) {
        let other = || self.workers.values().any(|worker| !self.serves(worker));
        match self.phase {
            Phase::Retiring { since, next } if !other() && next < self.slots.len() => {
                self.start_batch(since, next, now);
            }
            Phase::Retiring { since, .. } if !other() => {
                self.phase = Phase::Serving;
                let (generation, took) = (self.generation, millis(now - since));
                self.info(format!("reload done after {took}: generation {generation} serves alone"));
                self.announce_serving();
                self.reload_ended(Ok(()), None, now);
            }
            Phase::Abandoning if !other() => {
                self.phase = Phase::Serving;
                self.announce_serving();
            }
            Phase::Scaling { from } if !other() && self.are_scaled(from) => {
                self.phase = Phase::Serving;
                self.info(format!("scaling done: {}", self.composition()));
                self.announce_serving();
                self.scale_ended(Ok(()), None);
            }
            Phase::Stopping { status } if self.workers.is_empty() => {
                self.actions.push(Action::Exit { status });
                return;
            }
            _ => {}
        }
        if self.phase != Phase::Serving {
            return;
        }
        if let Some(workers) = self.scale_wanted.take() {
            self.scale(workers as usize, now);
            self.settle(now); // there may be nothing to wait for
        } else if let Some(rollout) = self.reload_wanted.take() {
            self.reload(rollout, now);
        } else if self.is_hopeless() {
            let (failures, status) = (count(self.failures as usize, "start"), self.last_status);
            self.give_up(
                &format!("no worker is ready and the last {failures} failed (see --max-failures)"),
                status,
                now,
            );
            self.settle(now);
        }
    }

    fn reload(&mut self, rollout: Rollout, now: Instant) {
        self.rollout = rollout;
        self.newest += 1;
        let (generation, workers) = (self.newest, count(self.slots.len(), "worker"));
        let how = match rollout {
            Rollout::AllAtOnce => String::new(),
            Rollout::Batches(most) => format!(", {most} at a time"),
            Rollout::Canary { .. } => ", with a trial".to_owned(),
        };
        self.info(format!("reload: starting generation {generation}, {workers}{how}"));
        self.actions.push(Action::Announce(Announcement::Reloading));
        self.actions.push(Action::LookForStrangers);
        self.start_batch(now, 0, now);
    }

    fn start_batch(&mut self, since: Instant, from: usize, now: Instant) {
        self.phase = Phase::Replacing { since, from };
        for slot in self.batch(from) {
            self.start(SlotId::of_index(slot), self.newest, now);
        }
    }

    /// Adds slots, or removes the last ones.
    fn scale(&mut self, workers: usize, now: Instant) {
        self.scalings += 1;
        let before = self.slots.len();
        self.info(format!("scaling from {before} to {}", count(workers, "worker")));
        self.phase = Phase::Scaling { from: before.min(workers) };
        if workers > before {
            for slot in before..workers {
                self.slots.push(Slot::new(self.generation));
                self.start(SlotId::of_index(slot), self.generation, now);
            }
        } else {
            self.remove_slots(workers, now);
        }
    }

    /// Removes all slots from this one on.
    fn remove_slots(&mut self, from: usize, now: Instant) {
        let of_these = |worker: &Worker| worker.slot.index() >= from && self.serves(worker);
        let retired = self.workers.iter().filter(|(_, worker)| of_these(worker)).map(|(id, _)| *id);
        let retired: Vec<WorkerId> = retired.collect();
        self.retire(&retired, now);
        for (number, slot) in (0..).map(SlotId).zip(&self.slots).skip(from) {
            self.actions.push(Action::Unreserve { slot: number, generation: slot.generation });
        }
        self.slots.truncate(from);
        self.steer();
        self.let_go(&retired, now);
    }

    /// Whether the workers of all slots from this one on are ready.
    fn are_scaled(&self, from: usize) -> bool {
        let ready = |worker: &&Worker| worker.slot.index() >= from && worker.state == State::Ready;
        self.workers.values().filter(ready).count() == self.slots.len() - from
    }

    /// What was begun is no good: stop the workers on trial. Those that serve never noticed.
    fn abandon(&mut self, why: &str, culprit: Option<WorkerId>, now: Instant) {
        if let Phase::Scaling { from } = self.phase {
            self.phase = Phase::Abandoning;
            self.remove_slots(from, now);
            self.warn(format!("{why}; scaling abandoned, {} on", self.who_serves()));
            self.scale_ended(Err(why.to_owned()), culprit);
            return;
        }
        let tried: Vec<WorkerId> =
            self.workers.iter().filter(|(_, worker)| self.is_on_trial(worker)).map(|(id, _)| *id).collect();
        let had_connections = matches!(self.phase, Phase::Trying { .. });
        self.phase = Phase::Abandoning;
        if had_connections {
            self.retire(&tried, now);
            self.steer();
            self.let_go(&tried, now);
        } else {
            tried.into_iter().for_each(|id| self.stop(id, now));
        }
        let rest = match self.slots.iter().all(|slot| slot.generation == self.generation) {
            true => format!("generation {} serves", self.generation),
            false => self.who_serves(),
        };
        self.warn(format!("{why}; reload abandoned, {rest} on"));
        self.reload_ended(Err(why.to_owned()), culprit, now);
    }

    fn reload_ended(&mut self, result: Result<(), String>, culprit: Option<WorkerId>, now: Instant) {
        let generation = self.newest;
        self.last_reload = Some(LastReload { generation, result: result.clone(), ended: now });
        let serving = self.who_serves();
        self.actions.push(Action::ReloadEnded { generation, result, serving, culprit });
    }

    fn scale_ended(&mut self, result: Result<(), String>, culprit: Option<WorkerId>) {
        let (number, serving) = (self.scalings, self.who_serves());
        self.actions.push(Action::ScaleEnded { number, result, serving, culprit });
    }

    /// There is nothing that works: stop what there is and exit with `status`.
    fn give_up(&mut self, why: &str, status: u8, now: Instant) {
        self.log(log::Level::Error, format!("{why}; giving up"));
        self.stop_all(status, now);
    }

    fn stop_all(&mut self, status: u8, now: Instant) {
        self.actions.push(Action::Announce(Announcement::Stopping));
        self.phase = Phase::Stopping { status };
        for (number, slot) in (0..).map(SlotId).zip(&mut self.slots) {
            slot.restart_at = None;
            slot.reset_at = None;
            self.actions.push(Action::Unreserve { slot: number, generation: slot.generation });
        }
        for id in self.workers.keys().copied().collect::<Vec<_>>() {
            self.stop(id, now);
        }
    }

    fn stop_asked(&mut self, signal: &'static str, now: Instant) {
        if matches!(self.phase, Phase::Stopping { .. }) {
            self.warn(format!("{signal} again: killing {}", count(self.workers.len(), "worker")));
            for id in self.workers.keys().copied().collect::<Vec<_>>() {
                self.kill(id, now);
            }
        } else {
            let (workers, how) = (count(self.workers.len(), "worker"), self.policy.stop_signal);
            self.info(format!("{signal}: stopping {workers} with {how}"));
            self.stop_all(0, now);
        }
    }

    /// Does what is due.
    fn tick(&mut self, now: Instant) {
        if let Phase::Trying { since, until } = self.phase
            && until <= now
        {
            self.switch(since, 0, now);
        }
        for id in self.workers.keys().copied().collect::<Vec<_>>() {
            self.tick_worker(id, now);
        }
    }

    /// Starts workers whose time has come, which is at once after some events.
    fn restart(&mut self, now: Instant) {
        for slot in 0..self.slots.len() {
            let generation = self.slots[slot].generation;
            if self.slots[slot].restart_at.is_some_and(|at| at <= now) {
                self.slots[slot].restart_at = None;
                self.start(SlotId::of_index(slot), generation, now);
            }
            if self.slots[slot].reset_at.is_some_and(|at| at <= now) {
                self.slots[slot].reset_at = None;
                self.actions.push(Action::ResetQueue { slot: SlotId::of_index(slot), generation });
            }
        }
    }

    fn tick_worker(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id).filter(|worker| worker.pid.is_some()) else { return };
        match worker.state {
            State::Starting { ready_by, hint_at } => {
                let lived = now - worker.started;
                if matches!(self.policy.readiness, Readiness::Alive(needed) if lived >= needed) {
                    self.ready(id, now);
                } else if ready_by <= now {
                    self.late(id, now);
                } else if hint_at.is_some_and(|at| at <= now) {
                    worker.state = State::Starting { ready_by, hint_at: None };
                    let (name, lacks) = (self.name(id), self.missing(id));
                    if !lacks.is_empty() {
                        let lacks = list(lacks);
                        self.info(format!(
                            "{name} waits: it does not listen on {lacks}, as the worker it replaces does"
                        ));
                    } else if self.slots.len() == 1 {
                        self.ready(id, now);
                    }
                }
            }
            State::Draining { until } if until <= now => {
                let (name, drain) = (self.name(id), self.policy.drain);
                let drain = humantime::format_duration(drain);
                self.info(format!("{name} was not seen idle within {drain} (see --drain)"));
                self.stop(id, now);
            }
            State::Stopping { kill_at, .. } if kill_at <= now => {
                let (name, timeout) = (self.name(id), humantime::format_duration(self.policy.stop_timeout));
                let signal = self.policy.stop_signal;
                self.warn(format!(
                    "{name} did not end within {timeout} of {signal} (see --stop-timeout); killing it"
                ));
                self.kill(id, now);
            }
            State::Stopping { kill_at, nudge_at: Some(at) } if at <= now => {
                worker.state = State::Stopping { nudge_at: None, kill_at };
                self.actions.push(Action::SignalBehindShells { worker: id });
            }
            State::Killed { lost_at } if lost_at <= now => {
                let (name, waited) = (self.name(id), humantime::format_duration(LOST_AFTER));
                self.warn(format!("{name} has not ended {waited} after SIGKILL; it is waited for no more"));
                self.ended(id, End::Killed(libc::SIGKILL), now);
            }
            State::Draining { .. } | State::Stopping { .. } | State::Ready | State::Killed { .. } => {}
        }
    }

    /// A worker was not ready in time.
    fn late(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get(&id) else { return };
        let lacks = match self.policy.readiness {
            Readiness::Notify => "it did not say that it is".to_owned(),
            _ if !worker.endpoints.is_empty() && self.missing(id).is_empty() => {
                "it listens only on Unix sockets that no other worker has (see --ready notify)".to_owned()
            }
            _ if worker.endpoints.is_empty() => {
                "it listens on no TCP port or Unix socket that can be shared, and has not said that it is (see --ready)".to_owned()
            }
            _ => format!(
                "it does not listen on {}, as the worker it replaces does (see --ready notify)",
                list(self.missing(id))
            ),
        };
        let is_on_trial = self.is_on_trial(worker);
        let timeout = humantime::format_duration(self.policy.ready_timeout);
        let why = format!("{} was not ready within {timeout}: {lacks} (see --ready-timeout)", self.name(id));
        match self.phase {
            Phase::Starting => self.give_up(&why, 1, now),
            _ if is_on_trial => self.abandon(&why, Some(id), now),
            _ => {
                self.warn(format!("{why}; starting another"));
                self.stop(id, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const WORKERS: u32 = 3;

    fn policy(readiness: Readiness) -> Policy {
        Policy {
            workers: WORKERS,
            readiness,
            ready_timeout: Duration::from_secs(60),
            drain: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(30),
            stop_signal: "SIGINT",
            max_failures: 10,
            rollout: Rollout::AllAtOnce,
        }
    }

    /// What the kernel would make of the fleet's actions, with a made-up clock.
    struct World {
        fleet: Fleet,
        now: Instant,
        /// The living, and what they were told.
        alive: BTreeMap<WorkerId, Told>,
        /// The slot and the generation of everyone that ever lived.
        places: BTreeMap<WorkerId, (u32, u32)>,
        draining: BTreeSet<WorkerId>,
        log: Vec<String>,
        exit: Option<u8>,
        reset: Vec<u32>,
        /// Slot and generation of those that got connections when it was last said who gets them.
        steered_to: Vec<(u32, u32)>,
        /// Slot and generation of those whose sockets are kept for a successor.
        reserved: BTreeSet<(u32, u32)>,
        next_pid: i32,
        /// Whether starts fail from now on.
        starts_fail: bool,
        most_alive: usize,
        /// The generations of reloads that are over, and whether they succeeded.
        reloads: Vec<(u32, bool)>,
        scalings: Vec<bool>,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Told {
        Nothing,
        Stop,
        Kill,
    }

    impl World {
        fn new(policy: Policy) -> Self {
            let now = Instant::now();
            let (fleet, actions) = Fleet::new(policy, now);
            let mut world = Self {
                fleet,
                now,
                alive: BTreeMap::new(),
                places: BTreeMap::new(),
                draining: BTreeSet::new(),
                log: Vec::new(),
                exit: None,
                reset: Vec::new(),
                steered_to: Vec::new(),
                reserved: BTreeSet::new(),
                next_pid: 100,
                starts_fail: false,
                most_alive: 0,
                reloads: Vec::new(),
                scalings: Vec::new(),
            };
            world.carry_out(actions);
            world
        }

        fn carry_out(&mut self, actions: Vec<Action>) {
            let mut actions = std::collections::VecDeque::from(actions);
            while let Some(action) = actions.pop_front() {
                assert_eq!(self.exit, None, "{action:?} after the exit");
                match action {
                    Action::Start { worker, .. } if !self.fleet.wants(worker) => {}
                    Action::Start { worker, .. } if self.starts_fail => {
                        let why = "no memory".to_owned();
                        actions.extend(
                            self.fleet.handle(Event::StartFailed { worker, why, status: 1 }, self.now),
                        );
                    }
                    Action::Start { worker, slot, generation } => {
                        self.places.insert(worker, (slot.0, generation));
                        self.alive.insert(worker, Told::Nothing);
                        self.most_alive = self.most_alive.max(self.alive.len());
                        self.next_pid += 1;
                        let started = Event::Started { worker, pid: self.next_pid };
                        actions.extend(self.fleet.handle(started, self.now));
                    }
                    Action::Drain { worker } => {
                        assert!(self.alive.contains_key(&worker), "{worker:?} is dead and to be drained");
                        self.draining.insert(worker);
                    }
                    Action::Signal { worker } => {
                        let told = self.alive.insert(worker, Told::Stop);
                        assert_eq!(told, Some(Told::Nothing), "{worker:?} is to be told to stop");
                    }
                    Action::SignalBehindShells { worker } => {
                        assert_eq!(self.alive.get(&worker), Some(&Told::Stop), "{worker:?} is to be nudged");
                    }
                    Action::Kill { worker } => {
                        let told = self.alive.insert(worker, Told::Kill);
                        assert!(told.is_some(), "{worker:?} is dead and to be killed");
                    }
                    Action::Release { worker, successor } => {
                        self.reserved.extend(self.places.get(&worker).filter(|_| successor));
                        // It has ended, or is stuck in the kernel and given up.
                        let told = self.alive.remove(&worker);
                        assert!(
                            matches!(told, None | Some(Told::Kill)),
                            "{worker:?} lives and loses its sockets"
                        );
                    }
                    Action::ResetQueue { slot, .. } => self.reset.push(slot.0),
                    Action::Log { line, .. } => self.log.push(line),
                    Action::Exit { status } => self.exit = Some(status),
                    Action::Steer(plan) => {
                        let ready = self.places.iter().filter(|(id, _)| plan.role(**id) == Role::Ready);
                        self.steered_to = ready.map(|(_, place)| *place).collect();
                        self.steered_to.sort_unstable();
                    }
                    Action::Unreserve { slot, generation } => {
                        self.reserved.remove(&(slot.0, generation));
                    }
                    Action::ReloadEnded { generation, result, .. } => {
                        self.reloads.push((generation, result.is_ok()));
                    }
                    Action::ScaleEnded { result, .. } => self.scalings.push(result.is_ok()),
                    Action::LookForStrangers | Action::Announce(_) => {}
                }
            }
        }

        fn event(&mut self, event: Event) {
            if self.exit.is_none() {
                let actions = self.fleet.handle(event, self.now);
                self.carry_out(actions);
            }
        }

        /// Lets time pass, waking the fleet when it wants to be.
        fn pass(&mut self, duration: Duration) {
            let end = self.now + duration;
            while let Some(deadline) = self.fleet.deadline().filter(|at| *at <= end && self.exit.is_none()) {
                self.now = self.now.max(deadline);
                self.event(Event::Tick);
            }
            self.now = end;
            self.event(Event::Tick);
        }

        fn end(&mut self, worker: WorkerId, end: End) {
            self.alive.remove(&worker);
            self.draining.remove(&worker);
            self.event(Event::Ended { worker, end });
        }

        /// Those that were told to stop or killed do end.
        fn obey(&mut self) {
            let told = |told: &Told| *told != Told::Nothing;
            for worker in self.alive.iter().filter(|(_, t)| told(t)).map(|(id, _)| *id).collect::<Vec<_>>() {
                self.end(worker, End::Exited(0));
            }
        }

        fn ready_all(&mut self) {
            for worker in self.alive.keys().copied().collect::<Vec<_>>() {
                self.event(Event::SaysReady { worker });
            }
        }

        fn drain_all(&mut self) {
            for worker in std::mem::take(&mut self.draining) {
                self.event(Event::Drained { worker });
            }
        }

        fn ids(&self) -> Vec<WorkerId> {
            self.alive.keys().copied().collect()
        }

        fn steered_to(&self) -> Vec<(u32, u32)> {
            self.steered_to.clone()
        }

        fn said(&self, part: &str) -> bool {
            self.log.iter().any(|line| line.contains(part))
        }
    }

    fn serving() -> World {
        let mut world = World::new(policy(Readiness::Notify));
        world.ready_all();
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        world
    }

    fn address(port: u16) -> Endpoint {
        Endpoint::Tcp(Address { socket: ([127, 0, 0, 1], port).into(), v6only: false })
    }

    #[test]
    fn a_reload_switches_when_all_are_ready_and_stops_each_old_worker_when_it_is_drained() {
        let mut world = serving();
        world.event(Event::Reload(Rollout::AllAtOnce));
        let [a, b, c] = world.ids()[3..] else { panic!("{:?}", world.ids()) };
        world.event(Event::SaysReady { worker: a });
        world.event(Event::SaysReady { worker: b });
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        world.event(Event::SaysReady { worker: c });
        assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
        assert!(
            world.alive.values().all(|told| *told == Told::Nothing),
            "nobody is told before it is drained"
        );
        world.drain_all();
        world.obey();
        assert!(world.said("reload done"));
        assert_eq!(world.ids(), [a, b, c]);
    }

    #[test]
    fn a_replacement_that_ends_or_is_late_ends_the_reload_and_the_old_never_notice() {
        for late in [false, true] {
            let mut world = serving();
            world.event(Event::Reload(Rollout::AllAtOnce));
            let first = world.ids()[3];
            if late {
                world.pass(Duration::from_secs(61));
                assert!(world.said("was not ready within 1m"), "{:?}", world.log);
            } else {
                world.end(first, End::Killed(libc::SIGSEGV));
                assert!(world.said("was killed by SIGSEGV before it was ready; reload abandoned"));
            }
            world.obey();
            assert_eq!(world.ids().len(), 3);
            assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
            world.event(Event::Reload(Rollout::AllAtOnce));
            world.ready_all();
            assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3)], "the next one may succeed");
        }
    }

    #[test]
    fn reloads_asked_for_during_a_reload_are_one_more() {
        let mut world = serving();
        for _ in 0..5 {
            world.event(Event::Reload(Rollout::AllAtOnce));
        }
        for _ in 0..3 {
            world.ready_all();
            world.drain_all();
            world.obey();
        }
        assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3)]);
        assert_eq!(world.log.iter().filter(|line| line.contains("reload done")).count(), 2);
    }

    #[test]
    fn a_reload_asked_for_before_the_first_generation_is_ready_comes_after_it() {
        let mut world = World::new(policy(Readiness::Notify));
        world.event(Event::Reload(Rollout::AllAtOnce));
        assert_eq!(world.ids().len(), 3);
        world.ready_all();
        assert_eq!(world.ids().len(), 6);
    }

    #[test]
    fn a_worker_that_dies_is_restarted_at_once_then_ever_later_and_at_once_again_when_it_was_proven() {
        let mut world = serving();
        let mut waits = Vec::new();
        for _ in 0..9 {
            let worker = *world.ids().last().unwrap();
            world.end(worker, End::Exited(1));
            let died = world.now;
            while world.ids().len() < 3 {
                world.pass(Duration::from_millis(10));
            }
            waits.push((world.now - died).as_millis());
            world.ready_all();
        }
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        world.pass(PROVEN);
        let worker = *world.ids().last().unwrap();
        world.end(worker, End::Exited(1));
        assert_eq!(world.ids().len(), 3, "restarted at once");
    }

    #[test]
    fn clients_of_a_slot_that_is_down_for_two_seconds_are_reset() {
        let mut world = serving();
        world.starts_fail = true;
        let worker = world.ids()[1];
        world.end(worker, End::Exited(1));
        world.pass(Duration::from_millis(1999));
        assert_eq!(world.reset, [0u32; 0]);
        world.pass(Duration::from_millis(1));
        assert_eq!(world.reset, [1]);
    }

    #[test]
    fn when_no_worker_is_ready_and_ten_starts_failed_it_exits_with_the_last_status() {
        let mut world = serving();
        let ids = world.ids();
        ids.into_iter().for_each(|worker| world.end(worker, End::Exited(7)));
        for failures in 1..=10 {
            while world.ids().is_empty() {
                world.pass(Duration::from_millis(50));
            }
            assert_eq!(world.exit, None, "after {failures} failures");
            let worker = world.ids()[0];
            world.end(worker, End::Exited(40 + failures));
        }
        world.obey();
        assert_eq!(world.exit, Some(50), "{:?}", world.log);
    }

    #[test]
    fn with_max_failures_0_it_never_gives_up() {
        let mut world = World::new(Policy { max_failures: 0, ..policy(Readiness::Notify) });
        world.ready_all();
        let ids = world.ids();
        ids.into_iter().for_each(|worker| world.end(worker, End::Exited(7)));
        world.starts_fail = true;
        world.pass(Duration::from_secs(600));
        assert_eq!(world.exit, None);
    }

    #[test]
    fn a_first_worker_that_ends_before_it_is_ready_ends_everything_with_its_status() {
        let mut world = World::new(policy(Readiness::Notify));
        let first = world.ids()[0];
        world.end(first, End::Exited(3));
        assert_eq!(world.exit, None, "the others are stopped first");
        world.obey();
        assert_eq!(world.exit, Some(3));
    }

    #[test]
    fn a_stop_exits_with_0_and_with_1_when_somebody_had_to_be_killed() {
        let mut world = serving();
        world.event(Event::Stop { signal: "SIGTERM" });
        world.obey();
        assert_eq!(world.exit, Some(0));

        let mut world = serving();
        world.event(Event::Stop { signal: "SIGTERM" });
        world.pass(Duration::from_secs(30));
        assert!(world.alive.values().all(|told| *told == Told::Kill));
        world.obey();
        assert_eq!(world.exit, Some(1));

        let mut world = serving();
        world.event(Event::Stop { signal: "SIGTERM" });
        world.event(Event::Stop { signal: "SIGTERM" });
        assert!(world.alive.values().all(|told| *told == Told::Kill), "a second one kills at once");
        world.obey();
        assert_eq!(world.exit, Some(1));
    }

    #[test]
    fn a_stop_in_the_middle_of_a_reload_stops_both_generations() {
        let mut world = serving();
        world.event(Event::Reload(Rollout::AllAtOnce));
        world.event(Event::Stop { signal: "SIGTERM" });
        assert!(world.alive.values().all(|told| *told == Told::Stop));
        world.event(Event::Reload(Rollout::AllAtOnce));
        world.obey();
        assert_eq!(world.exit, Some(0));
    }

    #[test]
    fn a_process_that_outlives_sigkill_holds_nothing_up() {
        let mut world = serving();
        world.event(Event::Reload(Rollout::AllAtOnce));
        world.ready_all();
        world.pass(Duration::from_secs(10 + 30 + 10));
        assert!(world.said("reload done"), "{:?}", world.log);
    }

    #[test]
    fn a_replacement_has_to_listen_where_the_worker_before_it_does() {
        let mut world = World::new(policy(Readiness::Listen));
        for worker in world.ids() {
            world.event(Event::Listens { worker, endpoint: address(1) });
            world.event(Event::Listens { worker, endpoint: address(2) });
        }
        world.event(Event::Reload(Rollout::AllAtOnce));
        for worker in world.ids().split_off(3) {
            world.event(Event::Listens { worker, endpoint: address(1) });
        }
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        world.pass(Duration::from_secs(1));
        assert!(world.said("does not listen on 127.0.0.1:2"), "{:?}", world.log);
        for worker in world.ids().split_off(3) {
            world.event(Event::Listens { worker, endpoint: address(2) });
        }
        assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
    }

    #[test]
    fn a_restarted_worker_has_to_listen_where_the_dead_one_did() {
        let mut world = World::new(policy(Readiness::Listen));
        for worker in world.ids() {
            world.event(Event::Listens { worker, endpoint: address(1) });
            world.event(Event::Listens { worker, endpoint: address(2) });
        }
        let worker = world.ids()[0];
        world.end(worker, End::Exited(0));
        let worker = *world.ids().last().unwrap();
        world.event(Event::Listens { worker, endpoint: address(2) });
        assert_eq!(world.steered_to().len(), 2);
        world.event(Event::Listens { worker, endpoint: address(1) });
        assert_eq!(world.steered_to().len(), 3);
    }

    #[test]
    fn a_unix_socket_counts_when_two_workers_listen_on_it_or_after_a_while_that_of_the_only_one() {
        let path = |name: &str| Endpoint::Unix(name.into());
        let mut world = World::new(policy(Readiness::Listen));
        let ids = world.ids();
        for (worker, name) in ids.iter().zip(["a", "b", "c"]) {
            world.event(Event::Listens { worker: *worker, endpoint: path(name) });
        }
        assert_eq!(world.steered_to(), [], "each has one of its own");
        world.event(Event::Listens { worker: ids[0], endpoint: path("public") });
        assert_eq!(world.steered_to(), []);
        world.event(Event::Listens { worker: ids[1], endpoint: path("public") });
        world.event(Event::Listens { worker: ids[2], endpoint: path("public") });
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        world.event(Event::Reload(Rollout::AllAtOnce));
        let new = world.ids().split_off(3);
        for worker in &new {
            world.event(Event::Listens { worker: *worker, endpoint: path("public") });
        }
        assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)], "nobody asks for a, b and c");

        let mut world = World::new(Policy { workers: 1, ..policy(Readiness::Listen) });
        let worker = world.ids()[0];
        world.event(Event::Listens { worker, endpoint: path("a") });
        assert_eq!(world.steered_to(), [], "it may listen elsewhere yet");
        world.pass(HINT_AFTER);
        assert_eq!(world.steered_to(), [(0, 1)]);
    }

    #[test]
    fn a_rolling_reload_replaces_one_batch_after_the_other() {
        let mut world = serving();
        world.event(Event::Reload(Rollout::Batches(2)));
        assert_eq!(world.ids().len(), 5);
        world.ready_all();
        assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 1)]);
        assert_eq!(world.ids().len(), 5, "the next batch waits for the old workers' ends");
        world.drain_all();
        world.obey();
        assert_eq!(world.ids().len(), 4);
        world.ready_all();
        world.drain_all();
        assert_eq!(world.reloads, []);
        world.obey();
        assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
        assert_eq!((world.reloads.as_slice(), world.most_alive), (&[(2, true)][..], 5));
    }

    #[test]
    fn a_rolling_reload_that_fails_leaves_both_generations_and_the_next_one_replaces_all() {
        let mut world = serving();
        world.event(Event::Reload(Rollout::Batches(1)));
        world.ready_all();
        world.drain_all();
        world.obey();
        let failed = *world.ids().last().unwrap();
        world.end(failed, End::Exited(3));
        assert_eq!(world.steered_to(), [(0, 2), (1, 1), (2, 1)]);
        assert!(world.said("1 worker of generation 2 and 2 of generation 1 serve on"), "{:?}", world.log);
        assert_eq!((world.reloads.as_slice(), world.fleet.oldest_generation()), (&[(2, false)][..], 1));
        // Who crashes comes back as he was.
        let old = world.ids()[0];
        world.end(old, End::Exited(1));
        world.pass(Duration::ZERO);
        world.ready_all();
        assert_eq!(world.steered_to(), [(0, 2), (1, 1), (2, 1)]);
        world.event(Event::Reload(Rollout::AllAtOnce));
        world.ready_all();
        assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3)]);
    }

    #[test]
    fn a_rolling_reload_stops_when_a_new_worker_dies_that_was_ready() {
        let mut world = serving();
        world.event(Event::Reload(Rollout::Batches(1)));
        world.ready_all();
        let new = *world.ids().last().unwrap();
        world.end(new, End::Exited(1));
        assert_eq!(world.reloads, [(2, false)]);
        world.drain_all();
        world.obey();
        world.pass(Duration::from_secs(1));
        world.ready_all();
        assert_eq!(world.steered_to(), [(0, 2), (1, 1), (2, 1)], "no other slot is touched");
    }

    #[test]
    fn a_canary_is_tried_and_then_all_follow() {
        let period = Duration::from_secs(60);
        let share = Share(1000);
        let mut world = serving();
        world.event(Event::Reload(Rollout::Canary { share, period }));
        assert_eq!(world.fleet.plan().share, Share::default());
        world.ready_all();
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        assert_eq!(world.fleet.plan().share, share);
        let plan = world.fleet.plan();
        let canaries = world.ids().into_iter().filter(|id| plan.role(*id) == Role::Canary).count();
        assert_eq!(canaries, 3);
        world.pass(period - Duration::from_millis(1));
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        world.pass(Duration::from_millis(1));
        assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
        assert_eq!(world.fleet.plan().share, Share::default());
        world.drain_all();
        world.obey();
        assert_eq!(world.reloads, [(2, true)]);
    }

    #[test]
    fn a_canary_that_dies_has_the_others_drained_and_the_old_generation_serves_on() {
        let mut world = serving();
        let period = Duration::from_secs(60);
        world.event(Event::Reload(Rollout::Canary { share: Share(1000), period }));
        world.ready_all();
        let [a, b, c] = world.ids()[3..] else { panic!() };
        world.end(b, End::Killed(libc::SIGSEGV));
        assert_eq!(world.reloads, [(2, false)]);
        assert_eq!(world.draining, BTreeSet::from([a, c]), "they may have requests");
        assert_eq!(world.fleet.plan().share, Share::default());
        world.drain_all();
        world.obey();
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        assert_eq!(world.ids().len(), 3);
    }

    #[test]
    fn an_abort_ends_a_reload_before_its_switch_and_one_that_waits() {
        let mut world = serving();
        assert!(!world.fleet.can_abort());
        world.event(Event::Reload(Rollout::AllAtOnce));
        world.event(Event::Reload(Rollout::AllAtOnce));
        assert!(world.fleet.can_abort());
        world.event(Event::Abort);
        world.obey();
        assert_eq!(world.reloads, [(2, false), (3, false)]);
        assert_eq!(world.ids().len(), 3);
        world.event(Event::Reload(Rollout::AllAtOnce));
        world.ready_all();
        assert!(!world.fleet.can_abort(), "the new ones serve");
        world.event(Event::Abort);
        assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3)]);
    }

    #[test]
    fn scaling_adds_slots_and_drains_those_that_it_removes() {
        let mut world = serving();
        world.event(Event::Scale(5));
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        let new = world.ids().split_off(3);
        world.event(Event::SaysReady { worker: new[1] });
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1), (4, 1)]);
        assert!(world.scalings.is_empty());
        world.ready_all();
        assert_eq!(world.scalings, [true]);
        world.event(Event::Scale(1));
        assert_eq!(world.steered_to(), [(0, 1)]);
        assert_eq!(world.draining.len(), 4);
        world.drain_all();
        world.obey();
        assert_eq!((world.ids().len(), world.scalings.as_slice()), (1, &[true, true][..]));
        world.event(Event::Scale(1));
        assert_eq!(world.scalings, [true; 3], "nothing to do is done at once");
    }

    #[test]
    fn a_new_worker_that_fails_ends_the_scaling_and_the_others_serve_on() {
        let mut world = serving();
        world.event(Event::Scale(5));
        let new = world.ids().split_off(3);
        world.event(Event::SaysReady { worker: new[0] });
        world.end(new[1], End::Exited(1));
        assert_eq!(world.scalings, [false]);
        assert_eq!(world.draining, BTreeSet::from([new[0]]), "it may have requests");
        world.drain_all();
        world.obey();
        assert_eq!(world.ids().len(), 3);
        assert_eq!(world.fleet.workers_wanted(), 3);
    }

    #[test]
    fn what_is_asked_for_meanwhile_is_done_afterwards() {
        let mut world = serving();
        world.event(Event::Reload(Rollout::AllAtOnce));
        world.event(Event::Scale(4));
        assert_eq!((world.ids().len(), world.fleet.workers_wanted()), (6, 4));
        world.ready_all();
        world.drain_all();
        world.obey();
        assert_eq!((world.ids().len(), world.reloads.as_slice()), (4, &[(2, true)][..]));
        world.event(Event::Reload(Rollout::AllAtOnce));
        world.ready_all();
        assert_eq!(world.scalings, [true]);
        world.ready_all();
        assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3), (3, 3)]);
    }

    #[test]
    fn every_place_is_told_of() {
        let mut world = serving();
        let dead = world.ids()[1];
        world.end(dead, End::Exited(1));
        world.ready_all();
        world.end(WorkerId(3), End::Exited(1)); // ended twice in a row: its slot waits
        let states = |world: &World| {
            let places = world.fleet.places().into_iter();
            places.map(|place| (place.slot.0, place.serves, place.state, place.restarts)).collect::<Vec<_>>()
        };
        assert_eq!(states(&world)[1], (1, true, "down", 2));
        world.event(Event::Reload(Rollout::AllAtOnce));
        assert_eq!(
            states(&world)[..3],
            [(0, true, "ready", 0), (0, false, "starting", 0), (1, true, "down", 2)]
        );
    }

    #[test]
    fn ready_after_a_duration_means_alive_that_long_even_past_the_ready_timeout() {
        let mut world = World::new(policy(Readiness::Alive(Duration::from_secs(90))));
        world.pass(Duration::from_millis(89_999));
        assert_eq!(world.steered_to().len(), 0);
        world.pass(Duration::from_millis(1));
        assert_eq!(world.steered_to().len(), 3);
    }

    /// Something that the world does to the fleet; indices choose among those alive.
    #[derive(Debug, Clone)]
    enum Step {
        Ready(prop::sample::Index),
        Listens(prop::sample::Index, u16),
        Unlistens(prop::sample::Index, u16),
        Ends(prop::sample::Index),
        Drained(prop::sample::Index),
        Pass(u64),
        StartsFail(bool),
        Reload(Rollout),
        Abort,
        Scale(u32),
        Stop,
    }

    fn step() -> impl Strategy<Value = Step> {
        let who = any::<prop::sample::Index>;
        prop_oneof![
            8 => who().prop_map(Step::Ready),
            2 => (who(), 1u16..3).prop_map(|(who, port)| Step::Listens(who, port)),
            1 => (who(), 1u16..3).prop_map(|(who, port)| Step::Unlistens(who, port)),
            4 => who().prop_map(Step::Ends),
            4 => who().prop_map(Step::Drained),
            4 => (1u64..40_000).prop_map(Step::Pass),
            1 => any::<bool>().prop_map(Step::StartsFail),
            4 => rollout().prop_map(Step::Reload),
            1 => Just(Step::Abort),
            1 => (1..=MOST_WORKERS).prop_map(Step::Scale),
            1 => Just(Step::Stop),
        ]
    }

    /// To how many workers tests scale.
    const MOST_WORKERS: u32 = 4;

    fn rollout() -> impl Strategy<Value = Rollout> {
        let canary =
            |seconds| Rollout::Canary { share: Share::default(), period: Duration::from_secs(seconds) };
        prop_oneof![
            2 => Just(Rollout::AllAtOnce),
            1 => (1u32..4).prop_map(Rollout::Batches),
            1 => (0u64..30).prop_map(canary),
        ]
    }

    impl World {
        /// Takes a step. With `gentle`, no worker that serves ends unless it was told to.
        fn take(&mut self, step: Step, gentle: bool) {
            let choose = |who: prop::sample::Index, of: Vec<WorkerId>| {
                (!of.is_empty()).then(|| of[who.index(of.len())])
            };
            match step {
                Step::Ready(who) => {
                    if let Some(worker) = choose(who, self.ids()) {
                        self.event(Event::SaysReady { worker });
                    }
                }
                Step::Listens(who, port) => {
                    if let Some(worker) = choose(who, self.ids()) {
                        self.event(Event::Listens { worker, endpoint: address(port) });
                    }
                }
                Step::Unlistens(who, port) => {
                    if let Some(worker) = choose(who, self.ids()) {
                        self.event(Event::StoppedListening { worker, endpoint: address(port) });
                    }
                }
                Step::Ends(who) => {
                    let plan = self.fleet.plan();
                    let may = |id: &WorkerId| !gentle || plan.role(*id) != Role::Ready;
                    let candidates = self.ids().into_iter().filter(may).collect();
                    if let Some(worker) = choose(who, candidates) {
                        self.end(worker, End::Exited(1));
                    }
                }
                Step::Drained(who) => {
                    if let Some(worker) = choose(who, self.draining.iter().copied().collect()) {
                        self.draining.remove(&worker);
                        self.event(Event::Drained { worker });
                    }
                }
                Step::Pass(ms) => self.pass(Duration::from_millis(ms)),
                Step::StartsFail(fail) => self.starts_fail = fail,
                Step::Reload(rollout) => self.event(Event::Reload(rollout)),
                Step::Abort => self.event(Event::Abort),
                Step::Scale(workers) => self.event(Event::Scale(workers)),
                Step::Stop => self.event(Event::Stop { signal: "SIGTERM" }),
            }
        }

        fn stopping(&self) -> bool {
            self.exit.is_some() || matches!(self.fleet.phase, Phase::Stopping { .. })
        }
    }

    fn readiness() -> impl Strategy<Value = Readiness> {
        prop_oneof![
            Just(Readiness::Listen),
            Just(Readiness::Notify),
            Just(Readiness::Alive(Duration::from_secs(2)))
        ]
    }

    proptest! {
        /// Whatever happens, a worker is never named after its end, there are never more than two
        /// generations, everything ends when it is told to, and then nobody lives. (The world itself
        /// checks that no action names a dead worker.)
        #[test]
        fn whatever_happens_a_reload_and_a_stop_come_to_an_end(
            readiness in readiness(), steps in vec(step(), 0..60)
        ) {
            let mut world = World::new(policy(readiness));
            for step in steps {
                world.take(step, false);
                prop_assert!(world.most_alive <= 2 * MOST_WORKERS as usize, "{} alive", world.most_alive);
                let has_slot = |(slot, generation): &(u32, u32)| {
                    world.fleet.slots.get(*slot as usize).is_some_and(|slot| slot.generation == *generation)
                };
                let kept = world.reserved.iter().all(has_slot);
                prop_assert!(kept, "kept for no successor: {:?}", world.reserved);
                let plan = world.fleet.plan();
                let ready = world.places.iter().filter(|(id, _)| plan.role(**id) == Role::Ready);
                let ready: BTreeSet<_> = ready.map(|(_, place)| *place).collect();
                prop_assert_eq!(&world.steered_to.iter().copied().collect::<BTreeSet<_>>(), &ready);
            }
            // Nobody does anything any more but end when killed: the longest way through two rolling reloads.
            for _ in 0..1000 {
                world.pass(Duration::from_secs(1));
                let killed = |(id, told): (&WorkerId, &Told)| (*told == Told::Kill).then_some(*id);
                for worker in world.alive.iter().filter_map(killed).collect::<Vec<_>>() {
                    world.end(worker, End::Killed(libc::SIGKILL));
                }
            }
            let phase = world.fleet.phase;
            prop_assert!(world.exit.is_some() || matches!(phase, Phase::Starting | Phase::Serving), "{phase:?}");
            world.event(Event::Stop { signal: "SIGTERM" });
            world.obey();
            prop_assert!(world.exit.is_some());
            prop_assert!(world.alive.is_empty());
            prop_assert!(world.reserved.is_empty());
        }

        /// Of every reload it is told how it ended.
        #[test]
        fn of_every_reload_it_is_told_how_it_ended(readiness in readiness(), steps in vec(step(), 0..60)) {
            let mut world = World::new(policy(readiness));
            for step in steps {
                world.take(step, false);
            }
            // One that was aborted before it began has left its number to the next.
            let done: Vec<u32> = world.reloads.iter().filter(|(_, done)| *done).map(|(g, _)| *g).collect();
            prop_assert!(done.is_sorted_by(|a, b| a < b), "{:?}", world.reloads);
            if world.fleet.phase == Phase::Serving {
                let all: BTreeSet<u32> = world.reloads.iter().map(|(generation, _)| *generation).collect();
                let expected: BTreeSet<u32> = (2..=world.fleet.newest).collect();
                prop_assert!(expected.is_subset(&all), "{all:?} of {expected:?}");
            }
        }

        /// A rolling reload has never more than a batch of extra workers.
        #[test]
        fn in_batches_there_are_never_more_workers_than_one_batch_more(
            readiness in readiness(), most in 1u32..3, steps in vec(step(), 0..80)
        ) {
            let mut world = World::new(policy(readiness));
            for step in steps {
                match step {
                    Step::Scale(_) => {}
                    Step::Reload(_) => world.take(Step::Reload(Rollout::Batches(most)), false),
                    step => world.take(step, false),
                }
                let allowed = (WORKERS + most) as usize;
                prop_assert!(world.most_alive <= allowed, "{} alive", world.most_alive);
            }
        }

        /// From the moment that a worker is ready there always is one that gets connections, through all
        /// reloads and scalings, unless those that serve end by themselves or everything is stopped.
        #[test]
        fn at_every_moment_of_a_reload_somebody_gets_connections(
            readiness in readiness(), steps in vec(step(), 0..60)
        ) {
            let mut world = World::new(policy(readiness));
            let mut begun = false;
            let is_rolling = |step: &Step| matches!(step, Step::Reload(Rollout::Batches(_)));
            let rolling = steps.iter().any(is_rolling);
            for step in steps {
                world.take(step.clone(), true);
                begun |= !world.steered_to().is_empty();
                if world.stopping() {
                    break;
                }
                prop_assert!(!begun || !world.steered_to().is_empty(), "nobody after {step:?}");
                let mut generations: Vec<u32> = world.steered_to().iter().map(|(_, g)| *g).collect();
                generations.dedup();
                prop_assert!(rolling || generations.len() <= 1, "two generations get connections: {generations:?}");
            }
        }
    }
}
