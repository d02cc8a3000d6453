//! The fleet in a made-up world with a made-up clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::policy::{Target, example as policy};
use super::slot::PROVEN_AFTER;
use super::*;
use crate::address::Address;
use crate::steering::{Plan, Role, Share};
use crate::words::list;
use std::time::Duration;

/// As many as [`policy`] says.
const WORKERS: u32 = 3;

/// What becomes of the fleet's actions.
pub(super) struct World {
    pub(super) fleet: Fleet,
    pub(super) now: Instant,
    /// The living workers, and what they were sent.
    pub(super) alive: BTreeMap<WorkerId, Told>,
    /// The slot and the generation of each worker that ever lived.
    pub(super) places: BTreeMap<WorkerId, (u32, u32)>,
    draining: BTreeSet<WorkerId>,
    pub(super) log: Vec<String>,
    exit: Option<u8>,
    reset: Vec<u32>,
    /// Slot and generation of the workers that get connections by the last plan.
    steered_to: Vec<(u32, u32)>,
    /// How many lines were logged before the last plan.
    logged_before_plan: usize,
    /// Slot and generation of the sockets that are kept for a successor.
    pub(super) reserved: BTreeSet<(u32, u32)>,
    next_pid: i32,
    /// Whether starts fail from now on.
    starts_fail: bool,
    most_alive: usize,
    /// Operations that were accepted and haven't ended.
    pending: BTreeMap<Ticket, Command>,
    ended: BTreeSet<Ticket>,
    /// Whether the reloads that have ended succeeded.
    reloads: Vec<bool>,
    scalings: Vec<bool>,
    pub(super) recyclings: Vec<bool>,
    /// The workers that were sent a request, and where.
    probed: BTreeMap<WorkerId, Endpoint>,
    /// What the kernel says to the next switch.
    pub(super) next_switch: Result<(), String>,
    /// Whether workers have ever taken connections from one queue.
    has_shared_queue: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    Nothing,
    Stop,
    Kill,
}

impl World {
    pub(super) fn new(policy: Policy) -> Self {
        let now = Instant::now();
        let (fleet, actions) = Fleet::new(policy, Endpoints::default(), now);
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
            logged_before_plan: 0,
            reserved: BTreeSet::new(),
            next_pid: 100,
            starts_fail: false,
            most_alive: 0,
            pending: BTreeMap::new(),
            ended: BTreeSet::new(),
            reloads: Vec::new(),
            scalings: Vec::new(),
            recyclings: Vec::new(),
            probed: BTreeMap::new(),
            next_switch: Ok(()),
            has_shared_queue: false,
        };
        world.carry_out(actions);
        world
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        let mut actions = VecDeque::from(actions);
        self.has_shared_queue |= self.fleet.must_replace_all();
        while let Some(action) = actions.pop_front() {
            assert_eq!(self.exit, None, "{action:?} after the exit");
            match action {
                Action::Start { worker, .. } if !self.fleet.crew.wants(worker) => {}
                Action::Start { worker, .. } if self.starts_fail => {
                    let why = "no memory".to_owned();
                    actions
                        .extend(self.fleet.handle(Event::StartFailed { worker, why, status: 1 }, self.now));
                }
                Action::Start { worker, slot, generation, .. } => {
                    self.places.insert(worker, (slot.0, generation));
                    self.alive.insert(worker, Told::Nothing);
                    self.most_alive = self.most_alive.max(self.alive.len());
                    self.next_pid += 1;
                    let started = Event::Started { worker, pid: self.next_pid };
                    actions.extend(self.fleet.handle(started, self.now));
                }
                Action::Drain { worker, .. } => {
                    assert!(self.alive.contains_key(&worker), "{worker:?} is dead and to be drained");
                    self.draining.insert(worker);
                }
                Action::Signal { worker } => {
                    let told = self.alive.insert(worker, Told::Stop);
                    assert_eq!(told, Some(Told::Nothing), "{worker:?} is to be told to stop");
                }
                Action::SignalBehind { worker } => {
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
                    self.logged_before_plan = self.log.len();
                }
                Action::Unreserve { slot, generation } => {
                    self.reserved.remove(&(slot.0, generation));
                }
                Action::Ended { ticket, outcome, .. } => {
                    assert!(self.ended.insert(ticket), "{ticket:?} has ended twice");
                    match self.pending.remove(&ticket) {
                        Some(Command::Reload(_)) => self.reloads.push(outcome.is_ok()),
                        Some(Command::Scale(_)) => self.scalings.push(outcome.is_ok()),
                        Some(Command::Recycle(_)) => self.recyclings.push(outcome.is_ok()),
                        None if self.has_shared_queue => {} // a reload that nobody asked for
                        other => panic!("{ticket:?} of {other:?} has ended"),
                    }
                }
                Action::Switch(_) => {
                    let outcome = mem::replace(&mut self.next_switch, Ok(()));
                    actions.extend(self.fleet.handle(Event::Switched { outcome }, self.now));
                }
                Action::Probe { worker, endpoint } => drop(self.probed.insert(worker, endpoint)),
                Action::BeginGeneration { .. }
                | Action::LetInherit { .. }
                | Action::Explain { .. }
                | Action::FindForeignListeners
                | Action::Announce(_) => {}
            }
        }
    }

    pub(super) fn event(&mut self, event: Event) {
        if self.exit.is_none() {
            let actions = self.fleet.handle(event, self.now);
            self.carry_out(actions);
        }
    }

    pub(super) fn plan(&self) -> Plan {
        self.fleet.crew.plan(self.fleet.phase)
    }

    pub(super) fn refusal(&mut self, command: Command) -> Option<Refusal> {
        let (answer, actions) = self.fleet.command(command, self.now);
        self.carry_out(actions);
        answer.err()
    }

    pub(super) fn command(&mut self, command: Command) {
        if self.exit.is_some() {
            return;
        }
        let is_stop = command == Command::Stop;
        let (answer, actions) = self.fleet.command(command.clone(), self.now);
        if let Ok(Accepted::Begun(ticket) | Accepted::Queued(ticket)) = answer
            && !is_stop
        {
            self.pending.insert(ticket, command);
        }
        self.carry_out(actions);
    }

    /// Lets time pass, with a tick at each deadline.
    pub(super) fn pass(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(deadline) = self.fleet.deadline().filter(|at| *at <= end && self.exit.is_none()) {
            self.now = self.now.max(deadline);
            self.event(Event::Tick);
        }
        self.now = end;
        self.event(Event::Tick);
    }

    pub(super) fn end(&mut self, worker: WorkerId, end: End) {
        self.alive.remove(&worker);
        self.draining.remove(&worker);
        self.event(Event::Ended { worker, end });
    }

    /// The workers that were sent a signal end.
    pub(super) fn obey(&mut self) {
        let told = |told: &Told| *told != Told::Nothing;
        for worker in self.alive.iter().filter(|(_, t)| told(t)).map(|(id, _)| *id).collect::<Vec<_>>() {
            self.end(worker, End::Exited(0));
        }
    }

    pub(super) fn ready_all(&mut self) {
        for worker in self.alive.keys().copied().collect::<Vec<_>>() {
            self.event(Event::SaysReady { worker });
        }
    }

    pub(super) fn drain_all(&mut self) {
        for worker in std::mem::take(&mut self.draining) {
            self.event(Event::Drained { worker });
        }
    }

    pub(super) fn ids(&self) -> Vec<WorkerId> {
        self.alive.keys().copied().collect()
    }

    pub(super) fn steered_to(&self) -> Vec<(u32, u32)> {
        self.steered_to.clone()
    }

    pub(super) fn said(&self, part: &str) -> bool {
        self.log.iter().any(|line| line.contains(part))
    }

    /// Whether it was logged after the kernel was told.
    fn said_after_plan(&self, part: &str) -> bool {
        self.log[self.logged_before_plan..].iter().any(|line| line.contains(part))
    }
}

pub(super) fn reload() -> Command {
    Command::Reload(ReloadOptions::default())
}

pub(super) fn recycle(slots: impl IntoIterator<Item = u32>) -> Command {
    Command::Recycle(slots.into_iter().map(SlotId).collect())
}

fn sickness() -> impl Strategy<Value = Sickness> {
    prop_oneof![Just(Sickness::Memory(500)), Just(Sickness::Old)]
}

fn reload_by(rollout: Rollout) -> Command {
    Command::Reload(ReloadOptions { rollout: Some(rollout), ..ReloadOptions::default() })
}

pub(super) fn serving() -> World {
    let mut world = World::new(policy(Readiness::Notify));
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    world
}

/// A Unix socket stands for the third port.
fn endpoint(port: u16) -> Endpoint {
    if port == 3 { Endpoint::Unix("a".into()) } else { address(port) }
}

pub(super) fn address(port: u16) -> Endpoint {
    Endpoint::Port(Address::new(([127, 0, 0, 1], port).into(), false, 0))
}

/// "0 Leaving, 1 Ready"
fn roles(plan: &Plan) -> String {
    plan.roles.iter().map(|(id, role)| format!("{} {role:?}", id.0)).collect::<Vec<_>>().join(", ")
}

/// A list of actions in words.
fn story(actions: &[Action]) -> Vec<String> {
    let words = |action: &Action| match action {
        Action::Start { worker, slot, generation, .. } => {
            format!("start {} in slot {slot}, generation {generation}", worker.0)
        }
        Action::Steer(plan) => format!("steer: {}", roles(plan)),
        Action::Switch(plan) => format!("switch: {}", roles(plan)),
        Action::Drain { worker, addresses } => format!("drain {} of {}", worker.0, list(addresses)),
        Action::Signal { worker } => format!("signal {}", worker.0),
        Action::Release { worker, successor } => format!("release {}, successor {successor}", worker.0),
        Action::Unreserve { slot, generation } => format!("unreserve slot {slot}, generation {generation}"),
        Action::Log { line, .. } => format!("log {line}"),
        Action::Ended { outcome, .. } => format!("ended {outcome:?}"),
        other => format!("{other:?}"),
    };
    actions.iter().map(words).collect()
}

#[test]
fn a_worker_of_the_first_start_waits_a_moment_for_others_unless_it_is_the_first_or_the_last() {
    let mut world = World::new(Policy { workers: 4, ..policy(Readiness::Notify) });
    let ready = |world: &mut World, slot: usize| {
        let worker = world.ids()[slot];
        world.event(Event::SaysReady { worker });
        world.steered_to()
    };
    assert_eq!(ready(&mut world, 0), [(0, 1)]);
    assert_eq!(ready(&mut world, 1), [(0, 1)]);
    world.pass(policy::STEER_WITHIN / 2);
    assert_eq!(ready(&mut world, 2), [(0, 1)]);
    world.pass(policy::STEER_WITHIN / 2);
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    assert_eq!(ready(&mut world, 3), [(0, 1), (1, 1), (2, 1), (3, 1)]);
    assert!(!world.fleet.crew.timers.is_set(Timer::Steer));
}

#[test]
fn at_the_first_start_nobody_waits_for_connections_that_no_other_worker_gets() {
    let mut world = World::new(Policy { workers: 4, ..policy(Readiness::Listen) });
    let ids = world.ids();
    let mut listens = |worker, port| {
        world.event(Event::Listens { worker, endpoint: address(port) });
        world.steered_to()
    };
    assert_eq!(listens(ids[0], 1), [(0, 1)]);
    assert_eq!(listens(ids[1], 1), [(0, 1)]);
    assert_eq!(listens(ids[2], 2), [(0, 1), (1, 1), (2, 1)], "the first one on this port");
    assert_eq!(listens(ids[3], 1).len(), 4);

    let mut world = World::new(Policy { workers: 4, ..policy(Readiness::Notify) });
    world.ids()[..2].iter().for_each(|worker| world.event(Event::SaysReady { worker: *worker }));
    world.end(ids[0], End::Exited(1));
    assert_eq!(world.steered_to(), [(1, 1)], "the one that got all has ended");
}

#[test]
fn the_actions_of_a_reload_are_a_story() {
    let now = Instant::now();
    let policy = Policy { workers: 1, ..policy(Readiness::Listen) };
    let (mut fleet, actions) = Fleet::new(policy, Endpoints::default(), now);
    assert_eq!(story(&actions), ["start 0 in slot 0, generation 1"]);
    let mut tell = |events: Vec<Event>| {
        let actions: Vec<Action> = events.into_iter().flat_map(|event| fleet.handle(event, now)).collect();
        story(&actions)
    };
    let [old, new] = [0, 1].map(WorkerId);
    let listens = |worker| Event::Listens { worker, endpoint: address(1) };
    assert_eq!(
        tell(vec![Event::Started { worker: old, pid: 10 }, listens(old)]),
        [
            "log worker 0 (pid 10, generation 1) is ready after 0 ms",
            "steer: 0 Ready",
            "log generation 1 is ready after 0 ms: 1 worker on 127.0.0.1:1",
            "Announce(Ready { status: \"1 worker of generation 1 serves\" })",
        ]
    );
    let (accepted, actions) = fleet.command(reload(), now);
    assert!(matches!(accepted, Ok(Accepted::Begun(_))));
    assert_eq!(
        story(&actions),
        [
            "BeginGeneration { generation: 2, command: None, like: 1 }",
            "log reload: starting generation 2, 1 worker",
            "Announce(Reloading)",
            "FindForeignListeners",
            "start 1 in slot 0, generation 2",
        ]
    );
    let mut tell = |events: Vec<Event>| {
        let actions: Vec<Action> = events.into_iter().flat_map(|event| fleet.handle(event, now)).collect();
        story(&actions)
    };
    assert_eq!(
        tell(vec![Event::Started { worker: new, pid: 11 }, listens(new)]),
        [
            "log worker 0 (pid 11, generation 2) is ready after 0 ms",
            "log generation 2 is ready after 0 ms: 1 worker on 127.0.0.1:1",
            "switch: 0 Leaving, 1 Ready",
        ]
    );
    assert_eq!(
        tell(vec![Event::Switched { outcome: Ok(()) }]),
        [
            "unreserve slot 0, generation 1",
            "steer: 0 Leaving, 1 Ready",
            "log generation 2 serves; generation 1 drains",
            "drain 0 of 127.0.0.1:1",
        ]
    );
    assert_eq!(tell(vec![Event::Drained { worker: old }]), ["signal 0"]);
    assert_eq!(
        tell(vec![Event::Ended { worker: old, end: End::Exited(0) }]),
        [
            "release 0, successor false",
            "log worker 0 (pid 10, generation 1) exited with status 0",
            "log reload done after 0 ms: generation 2 serves alone",
            "Announce(Ready { status: \"1 worker of generation 2 serves\" })",
            "ended Ok(\"1 worker of generation 2 serves\")",
        ]
    );
}

#[test]
fn a_command_gets_a_ticket_or_the_reason_of_its_refusal() {
    let mut world = serving();
    let mut ask = |command: Command| {
        let (answer, actions) = world.fleet.command(command.clone(), world.now);
        if let Ok(Accepted::Begun(ticket) | Accepted::Queued(ticket)) = answer {
            world.pending.insert(ticket, command);
        }
        world.carry_out(actions);
        answer
    };
    let Ok(Accepted::Begun(first)) = ask(reload()) else { panic!("it begins at once") };
    let Ok(Accepted::Queued(next)) = ask(reload()) else { panic!("it is queued") };
    assert_eq!(ask(reload()), Ok(Accepted::Queued(next)), "it is the same one");
    let other = reload_by(Rollout::Batches(1));
    assert_eq!(ask(other), Err(Refusal::OtherReloadQueued));
    let Ok(Accepted::Queued(four)) = ask(Command::Scale(Target::More(1))) else { panic!("it is queued") };
    let Ok(Accepted::Queued(five)) = ask(Command::Scale(Target::More(1))) else { panic!("it is queued") };
    assert!(![first, next, four].contains(&five));
    assert!(matches!(ask(Command::Scale(Target::Fewer(5))), Err(Refusal::Limit(_))));
    let Ok(Accepted::Begun(stop)) = ask(Command::Stop) else { panic!("it begins at once") };
    assert_eq!(ask(Command::Stop), Ok(Accepted::Joined(stop)));
    for command in [reload(), Command::Abort, Command::Scale(Target::Exactly(1))] {
        assert_eq!(ask(command), Err(Refusal::Stopping));
    }
    assert_eq!(world.fleet.stop_ticket(), Some(stop));
    assert_eq!(world.pending.keys().copied().collect::<Vec<_>>(), [first, next, five, stop]);
    assert_eq!(world.fleet.activity(), Activity::Stopping);
    for line in ["reload: queued until the current reload ends", "scaling to 5 workers: queued until"] {
        assert!(world.said(line), "{:?}", world.log);
    }
    assert_eq!(world.scalings, [false], "it was superseded");
}

#[test]
fn a_reload_switches_when_all_are_ready_and_stops_each_old_worker_when_it_is_drained() {
    let mut world = serving();
    world.command(reload_by(Rollout::AllAtOnce));
    let [a, b, c] = world.ids()[3..] else { panic!("{:?}", world.ids()) };
    world.event(Event::SaysReady { worker: a });
    world.event(Event::SaysReady { worker: b });
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    world.event(Event::SaysReady { worker: c });
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
    assert!(
        world.alive.values().all(|told| *told == Told::Nothing),
        "no worker gets the stop signal before it is drained"
    );
    world.drain_all();
    world.obey();
    assert!(world.said("reload done"));
    assert_eq!(world.ids(), [a, b, c]);
}

#[test]
fn a_replacement_that_ends_or_is_late_ends_the_reload_and_the_old_workers_serve_on() {
    for late in [false, true] {
        let mut world = serving();
        world.command(reload_by(Rollout::AllAtOnce));
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
        world.command(reload_by(Rollout::AllAtOnce));
        world.ready_all();
        assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3)], "the next one may succeed");
    }
}

fn into_background(worker: WorkerId) -> Event {
    Event::WentIntoBackground { worker, pid: 99, instead: " (known -f)".to_owned() }
}

#[test]
fn a_program_that_goes_into_the_background_fails_the_start_or_the_reload_and_a_restart_is_tried_again() {
    let said = "went into the background; run it in the foreground (known -f)";
    let mut world = World::new(policy(Readiness::Notify));
    world.event(into_background(WorkerId(1)));
    assert!(world.said(&format!("worker 1 (pid 102, generation 1) {said}; giving up")), "{:?}", world.log);
    world.obey();
    assert_eq!(world.exit, Some(1));

    let mut world = serving();
    world.command(reload());
    let first = world.ids()[3];
    world.event(into_background(first));
    assert!(world.said(&format!("{said}; reload abandoned")), "{:?}", world.log);
    world.obey();
    assert_eq!((world.ids().len(), world.steered_to()), (3, vec![(0, 1), (1, 1), (2, 1)]));

    world.end(WorkerId(0), End::Killed(libc::SIGKILL));
    let restarted = world.ids()[2];
    world.event(into_background(restarted));
    world.obey();
    assert_eq!(world.exit, None);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.ids().len(), 3, "another one has started");
    world.ready_all();
    world.event(into_background(WorkerId(1))); // no reload, no restart: it is the program
    world.drain_all();
    world.obey();
    assert_eq!(world.exit, Some(1));
}

#[test]
fn a_replacement_has_to_live_on_for_a_moment_after_it_has_begun_to_listen() {
    let proof = Duration::from_millis(100);
    let mut world = World::new(Policy { workers: 1, proof, ..policy(Readiness::Listen) });
    let listens = |worker| Event::Listens { worker, endpoint: address(1) };
    world.event(listens(WorkerId(0)));
    assert_eq!(world.steered_to(), [(0, 1)], "there is nobody to keep it from");
    world.command(reload());
    world.event(listens(WorkerId(1)));
    world.pass(proof / 2);
    assert_eq!(world.steered_to(), [(0, 1)]);
    world.pass(proof / 2);
    assert_eq!(world.steered_to(), [(0, 2)]);
}

#[test]
fn several_reload_commands_during_a_reload_cause_one_more_reload() {
    let mut world = serving();
    for _ in 0..5 {
        world.command(reload_by(Rollout::AllAtOnce));
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
fn a_reload_command_before_the_first_generation_is_ready_is_queued() {
    let mut world = World::new(policy(Readiness::Notify));
    world.command(reload_by(Rollout::AllAtOnce));
    assert_eq!(world.ids().len(), 3);
    world.ready_all();
    assert_eq!(world.ids().len(), 6);
}

#[test]
fn a_worker_that_dies_is_restarted_at_once_then_later_each_time_and_at_once_again_after_ten_seconds_of_service()
 {
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
    world.pass(PROVEN_AFTER);
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
fn clients_of_a_slot_whose_worker_took_long_to_start_are_reset_later() {
    for (took, reset_after) in [(1_500, 3_000), (20_000, 10_000)] {
        let mut world = World::new(policy(Readiness::Notify));
        world.pass(Duration::from_millis(took));
        world.ready_all();
        world.starts_fail = true;
        let worker = world.ids()[1];
        world.end(worker, End::Exited(1));
        world.pass(Duration::from_millis(reset_after - 1));
        assert_eq!(world.reset, [0u32; 0]);
        world.pass(Duration::from_millis(1));
        assert_eq!(world.reset, [1]);
    }
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
fn if_a_first_worker_ends_before_it_is_ready_reuse_run_exits_with_its_status() {
    let mut world = World::new(policy(Readiness::Notify));
    let first = world.ids()[0];
    world.end(first, End::Exited(3));
    assert_eq!(world.exit, None, "the others are stopped first");
    world.obey();
    assert_eq!(world.exit, Some(3));

    let mut world = World::new(policy(Readiness::Notify));
    let first = world.ids()[0];
    world.end(first, End::Exited(0));
    world.obey();
    assert_eq!(world.exit, Some(1), "a server that ends has failed");
}

fn told(world: &World) -> Vec<Told> {
    world.alive.values().copied().collect()
}

#[test]
fn at_a_stop_each_worker_gets_the_signal_when_it_has_finished_its_requests() {
    let mut world = serving();
    let [idle, busy, stuck] = world.ids()[..] else { panic!() };
    world.event(Event::StopSignal { signal: "SIGTERM" });
    assert!(world.steered_to().is_empty());
    assert_eq!(told(&world), [Told::Nothing; 3]);
    world.event(Event::Drained { worker: idle });
    assert_eq!(told(&world), [Told::Stop, Told::Nothing, Told::Nothing]);
    world.pass(Duration::from_millis(5_999));
    assert_eq!(told(&world), [Told::Stop, Told::Nothing, Told::Nothing]);
    world.pass(Duration::from_millis(1));
    assert_eq!(told(&world), [Told::Stop; 3]);
    assert!(world.said("worker 1 (pid 102, generation 1) was not seen idle within 6s (see --stop-within)"));
    world.end(idle, End::Exited(0));
    world.end(busy, End::Exited(0));
    world.pass(Duration::from_millis(2_999));
    assert_eq!(told(&world), [Told::Stop]);
    world.pass(Duration::from_millis(1));
    assert_eq!(told(&world), [Told::Kill]);
    assert!(
        world.said("worker 2 (pid 103, generation 1) did not end within 9s (see --stop-within); killing it")
    );
    world.end(stuck, End::Killed(libc::SIGKILL));
    assert_eq!(world.exit, Some(1));
}

#[test]
fn at_a_stop_drain_does_not_hold_and_stop_timeout_does() {
    let second = Duration::from_secs(1);
    let mut world = World::new(Policy { drain: second, stop_timeout: second, ..policy(Readiness::Notify) });
    world.ready_all();
    world.event(Event::StopSignal { signal: "SIGTERM" });
    world.pass(second * 5);
    assert_eq!(told(&world), [Told::Nothing; 3]);
    world.pass(second);
    assert_eq!(told(&world), [Told::Stop; 3]);
    world.pass(second);
    assert_eq!(told(&world), [Told::Kill; 3]);
}

#[test]
fn a_stop_exits_with_0_or_with_1_if_a_worker_had_to_be_killed() {
    let mut world = serving();
    world.event(Event::StopSignal { signal: "SIGTERM" });
    world.drain_all();
    world.obey();
    assert_eq!(world.exit, Some(0));

    let mut world = serving();
    world.event(Event::StopSignal { signal: "SIGTERM" });
    world.pass(Duration::from_secs(9));
    assert_eq!(told(&world), [Told::Kill; 3]);
    world.obey();
    assert_eq!(world.exit, Some(1));

    let mut world = serving();
    world.event(Event::StopSignal { signal: "SIGTERM" });
    world.pass(Duration::from_millis(999));
    world.event(Event::StopSignal { signal: "SIGINT" });
    assert_eq!(told(&world), [Told::Nothing; 3], "it is the same one");
    world.pass(Duration::from_millis(1));
    world.event(Event::StopSignal { signal: "SIGTERM" });
    assert_eq!(told(&world), [Told::Kill; 3], "a second one kills");
    world.obey();
    assert_eq!(world.exit, Some(1));
}

#[test]
fn what_happened_in_time_counts_though_the_loop_is_late() {
    let mut world = serving();
    world.command(reload());
    let new = world.ids().split_off(3);
    world.now += Duration::from_secs(60);
    new.into_iter().for_each(|worker| world.event(Event::SaysReady { worker }));
    world.event(Event::Tick);
    assert!(world.reloads.is_empty(), "{:?}", world.log);
    world.now += Duration::from_secs(10);
    world.drain_all();
    assert!(!world.said("was not seen idle"), "{:?}", world.log);
    world.obey();
    world.event(Event::StopSignal { signal: "SIGTERM" });
    world.now += Duration::from_secs(6);
    world.drain_all();
    assert!(!world.said("was not seen idle"), "{:?}", world.log);
    world.now += Duration::from_secs(3);
    world.obey();
    assert_eq!(world.exit, Some(0), "{:?}", world.log);
}

#[test]
fn a_worker_that_was_stopped_by_the_readiness_of_another_is_not_ready_any_more() {
    let path = || Endpoint::Unix("a".into());
    let mut world = World::new(Policy { workers: 1, ..policy(Readiness::Listen) });
    let first = world.ids()[0];
    world.event(Event::SaysReady { worker: first });
    world.command(reload());
    let new = world.ids()[1];
    world.end(first, End::Exited(1));
    let restarted = *world.ids().last().unwrap();
    for worker in [restarted, new] {
        world.event(Event::Listens { worker, endpoint: path() });
    }
    world.pass(Duration::from_secs(60));
    assert_eq!(world.reloads, [true], "{:?}", world.log);
}

#[test]
fn after_a_stop_that_no_signal_began_the_second_signal_kills() {
    let mut world = serving();
    world.command(Command::Stop);
    world.event(Event::StopSignal { signal: "SIGTERM" });
    assert_eq!(told(&world), [Told::Nothing; 3]);
    world.pass(Duration::from_secs(1));
    world.event(Event::StopSignal { signal: "SIGTERM" });
    assert_eq!(told(&world), [Told::Kill; 3]);
}

#[test]
fn while_the_kernel_is_asked_to_switch_no_older_plan_follows() {
    let mut world = serving();
    world.command(reload_by(Rollout::Canary { share: Share(1000), period: Duration::from_secs(60) }));
    world.ready_all();
    let old = world.ids()[0];
    world.pass(Duration::from_secs(10));
    world.end(old, End::Exited(1));
    world.now += Duration::from_secs(120);
    let actions = world.fleet.handle(Event::Tick, world.now);
    let is_plan = |action: &&Action| matches!(action, Action::Steer(_) | Action::Switch(_));
    let plans: Vec<String> = story(&actions.iter().filter(is_plan).cloned().collect::<Vec<_>>());
    assert!(plans.last().is_some_and(|plan| plan.starts_with("switch: ")), "{plans:?}");
}

#[test]
fn a_restarted_worker_that_is_not_ready_at_the_switch_is_stopped_at_once() {
    let mut world = serving();
    world.command(reload());
    let (old, new) = (world.ids()[0], world.ids().split_off(3));
    world.end(old, End::Exited(1));
    let restarted = *world.ids().last().unwrap();
    for worker in new {
        world.event(Event::SaysReady { worker });
    }
    assert_eq!(world.alive.get(&restarted), Some(&Told::Stop));
    assert_eq!(world.draining.len(), 2);
}

#[test]
fn the_log_says_when_a_worker_ended() {
    let mut world = serving();
    world.command(reload());
    world.ready_all();
    let [drains, stops, slow] = world.ids()[..3] else { panic!() };
    world.end(drains, End::Exited(1));
    assert!(world.said("(pid 101, generation 1) exited with status 1 while it drained"), "{:?}", world.log);
    world.draining.remove(&stops);
    world.event(Event::Drained { worker: stops });
    world.end(stops, End::Exited(0));
    assert!(world.log.iter().any(|line| line.ends_with("(pid 102, generation 1) exited with status 0")));
    world.pass(Duration::from_secs(10 + 30 + 10));
    for line in [
        "worker 2 (pid 103, generation 1) was not seen idle within 10s (see --drain)",
        "worker 2 (pid 103, generation 1) did not end within 30s of SIGINT (see --stop-timeout); killing it",
        "worker 2 (pid 103, generation 1) has not ended 10s after SIGKILL; no longer waiting for it",
    ] {
        assert!(world.said(line), "{line}: {:?}", world.log);
    }
    assert!(!world.alive.contains_key(&slow));
}

#[test]
fn a_stop_in_the_middle_of_a_reload_stops_both_generations() {
    let mut world = serving();
    world.command(reload_by(Rollout::AllAtOnce));
    world.event(Event::StopSignal { signal: "SIGTERM" });
    assert_eq!(told(&world)[3..], [Told::Stop; 3], "they have no requests");
    world.command(reload_by(Rollout::AllAtOnce));
    world.drain_all();
    world.obey();
    assert_eq!(world.exit, Some(0));
}

#[test]
fn a_process_that_sigkill_does_not_end_delays_nothing_for_more_than_ten_seconds() {
    let mut world = serving();
    world.command(reload_by(Rollout::AllAtOnce));
    world.ready_all();
    world.pass(Duration::from_secs(10 + 30 + 10));
    assert!(world.said("reload done"), "{:?}", world.log);
}

#[test]
fn a_replacement_has_to_listen_where_its_predecessor_does() {
    let mut world = World::new(policy(Readiness::Listen));
    for worker in world.ids() {
        world.event(Event::Listens { worker, endpoint: address(1) });
        world.event(Event::Listens { worker, endpoint: address(2) });
    }
    world.command(reload_by(Rollout::AllAtOnce));
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

/// One worker that listens on port 1, and its replacement.
fn with_replacement(readiness: Readiness, options: ReloadOptions) -> (World, WorkerId) {
    let mut world = World::new(Policy { workers: 1, ..policy(readiness) });
    let old = world.ids()[0];
    world.event(Event::Listens { worker: old, endpoint: address(1) });
    world.event(Event::SaysReady { worker: old });
    world.event(Event::Probed { worker: old, outcome: Ok(()) });
    world.pass(Duration::from_secs(5));
    assert_eq!(world.steered_to(), [(0, 1)]);
    world.command(Command::Reload(options));
    let new = world.ids()[1];
    (world, new)
}

#[test]
fn a_replacement_that_says_ready_or_lives_long_enough_gets_no_connection_before_it_listens() {
    for readiness in [Readiness::Listen, Readiness::Notify, Readiness::Alive(Duration::from_secs(1))] {
        let (mut world, new) = with_replacement(readiness, ReloadOptions::default());
        world.event(Event::SaysReady { worker: new });
        world.pass(Duration::from_secs(10));
        assert_eq!(world.steered_to(), [(0, 1)], "{readiness:?}");
        world.event(Event::Listens { worker: new, endpoint: address(1) });
        assert_eq!(world.steered_to(), [(0, 2)], "{readiness:?}");

        let (mut world, new) = with_replacement(readiness, ReloadOptions::default());
        world.event(Event::SaysReady { worker: new });
        world.pass(Duration::from_secs(60));
        assert_eq!((world.steered_to(), &world.reloads[..]), (vec![(0, 1)], &[false][..]));
        assert!(
            world.said("does not listen on 127.0.0.1:1, as the worker that it replaces does"),
            "{:?}",
            world.log
        );
    }
}

#[test]
fn what_a_worker_opens_within_a_second_of_its_first_listener_is_required() {
    let mut world = World::new(policy(Readiness::Listen));
    for port in [1, 2] {
        for worker in world.ids() {
            world.event(Event::Listens { worker, endpoint: address(port) });
        }
        world.pass(Duration::from_millis(999));
    }
    world.command(reload());
    for worker in world.ids().split_off(3) {
        world.event(Event::Listens { worker, endpoint: address(1) });
    }
    world.pass(Duration::from_secs(60));
    assert_eq!((world.steered_to(), &world.reloads[..]), (vec![(0, 1), (1, 1), (2, 1)], &[false][..]));
    assert!(world.said("does not listen on 127.0.0.1:2"), "{:?}", world.log);
}

#[test]
fn what_a_worker_opens_a_second_after_its_first_listener_or_later_is_waited_for_and_not_required() {
    let mut world = World::new(Policy { workers: 1, ..policy(Readiness::Listen) });
    let old = world.ids()[0];
    world.event(Event::Listens { worker: old, endpoint: address(1) });
    world.pass(Duration::from_secs(1));
    world.event(Event::Listens { worker: old, endpoint: address(2) });
    world.command(reload());
    let new = world.ids()[1];
    world.event(Event::Listens { worker: new, endpoint: address(1) });
    world.pass(Duration::from_millis(2999));
    assert_eq!(world.steered_to(), [(0, 1)], "it may be about to listen on port 2");
    world.pass(Duration::from_millis(1));
    assert_eq!(world.steered_to(), [(0, 2)]);

    world.end(new, End::Exited(1));
    let restarted = *world.ids().last().unwrap();
    world.event(Event::Listens { worker: restarted, endpoint: address(1) });
    assert_eq!(world.steered_to(), [(0, 2)], "its predecessor's debugger is gone");
}

#[test]
fn a_port_that_need_not_be_opened_makes_no_worker_late() {
    let ready_timeout = Duration::from_secs(2);
    let mut world = World::new(Policy { workers: 1, ready_timeout, ..policy(Readiness::Listen) });
    let old = world.ids()[0];
    world.event(Event::Listens { worker: old, endpoint: address(1) });
    world.pass(Duration::from_secs(5));
    world.event(Event::Listens { worker: old, endpoint: address(2) });
    world.command(reload());
    let new = world.ids()[1];
    world.event(Event::Listens { worker: new, endpoint: address(1) });
    world.pass(ready_timeout);
    assert_eq!(world.steered_to(), [(0, 2)], "{:?}", world.log);
}

#[test]
fn a_port_that_a_worker_opens_some_time_after_its_first_is_waited_for_twice_as_long() {
    let mut world = World::new(Policy { workers: 1, ..policy(Readiness::Listen) });
    let old = world.ids()[0];
    world.event(Event::Listens { worker: old, endpoint: address(1) });
    world.pass(Duration::from_millis(2500));
    world.event(Event::Listens { worker: old, endpoint: address(2) });
    world.command(reload());
    let new = world.ids()[1];
    world.event(Event::Listens { worker: new, endpoint: address(1) });
    world.pass(Duration::from_millis(5999));
    assert_eq!(world.steered_to(), [(0, 1)]);
    world.event(Event::Listens { worker: new, endpoint: address(2) });
    assert_eq!(world.steered_to(), [(0, 2)]);
}

#[test]
fn a_worker_that_closes_its_port_before_it_ends_frees_its_successor_of_it_and_not_the_one_after() {
    let mut world = World::new(Policy { workers: 1, ..policy(Readiness::Notify) });
    let old = world.ids()[0];
    world.event(Event::Listens { worker: old, endpoint: address(1) });
    world.event(Event::SaysReady { worker: old });
    world.event(Event::StoppedListening { worker: old, endpoint: address(1) });
    world.end(old, End::Exited(0));
    let restarted = *world.ids().last().unwrap();
    world.event(Event::Listens { worker: restarted, endpoint: address(1) });
    world.event(Event::SaysReady { worker: restarted });
    world.command(reload());
    let new = *world.ids().last().unwrap();
    world.event(Event::SaysReady { worker: new });
    assert_eq!(world.steered_to(), [(0, 1)]);
    world.event(Event::Listens { worker: new, endpoint: address(1) });
    assert_eq!(world.steered_to(), [(0, 2)]);
}

#[test]
fn with_ports_may_change_a_replacement_has_to_listen_somewhere() {
    let options = ReloadOptions { ports_may_change: true, ..ReloadOptions::default() };
    let (mut world, new) = with_replacement(Readiness::Notify, options);
    world.event(Event::SaysReady { worker: new });
    world.pass(Duration::from_secs(10));
    assert_eq!(world.steered_to(), [(0, 1)]);
    world.event(Event::Listens { worker: new, endpoint: address(2) });
    assert_eq!(world.steered_to(), [(0, 2)]);
    world.drain_all();
    world.obey();
    world.command(reload());
    let next = *world.ids().last().unwrap();
    world.event(Event::SaysReady { worker: next });
    world.event(Event::Listens { worker: next, endpoint: address(1) });
    world.pass(Duration::from_secs(10));
    assert_eq!(world.steered_to(), [(0, 2)], "it holds for one reload");
}

#[test]
fn a_worker_is_sent_requests_until_it_has_answered_one() {
    let policy = Policy { workers: 1, ..policy(Readiness::Answers { port: Some(2) }) };
    let mut world = World::new(policy);
    let worker = world.ids()[0];
    let was_probed = |world: &mut World| world.probed.remove(&worker).is_some();
    world.event(Event::SaysReady { worker });
    world.event(Event::Listens { worker, endpoint: address(1) });
    assert!(!was_probed(&mut world), "that is another port");
    world.event(Event::Listens { worker, endpoint: address(2) });
    assert!(was_probed(&mut world));
    let why = "answered GET / with 503 Service Unavailable".to_owned();
    world.event(Event::Probed { worker, outcome: Err(why.clone()) });
    assert!(!was_probed(&mut world));
    world.pass(Duration::from_millis(100));
    assert!(was_probed(&mut world));
    assert!(world.steered_to().is_empty());
    world.event(Event::Probed { worker, outcome: Ok(()) });
    assert_eq!(world.steered_to(), [(0, 1)]);

    world.command(reload());
    let new = world.ids()[1];
    for port in [1, 2] {
        world.event(Event::Listens { worker: new, endpoint: address(port) });
    }
    world.event(Event::Probed { worker: new, outcome: Err(why) });
    world.pass(Duration::from_secs(60));
    let told = "worker 0 (pid 102, generation 2) answered GET / with 503 Service Unavailable, and was not ready within 1m";
    assert!(world.said(told), "{:?}", world.log);
    assert_eq!(world.reloads, [false]);
}

#[test]
fn a_worker_is_sent_requests_where_clients_come_and_where_it_still_listens() {
    let answers = |workers| Policy { workers, ..policy(Readiness::Answers { port: None }) };
    let unix = |name: &str| Endpoint::Unix(name.into());
    let mut world = World::new(answers(2));
    let [one, two] = world.ids()[..] else { panic!("two workers") };
    world.event(Event::Listens { worker: one, endpoint: unix("/own") });
    world.event(Event::Listens { worker: one, endpoint: unix("/shared") });
    assert!(world.probed.is_empty(), "each may be its own");
    world.event(Event::Listens { worker: two, endpoint: unix("/shared") });
    assert_eq!(world.probed, [(one, unix("/shared")), (two, unix("/shared"))].into());
    world.event(Event::Listens { worker: one, endpoint: address(1) });
    world.event(Event::StoppedListening { worker: two, endpoint: unix("/shared") });
    world.event(Event::Listens { worker: two, endpoint: address(1) });
    assert_eq!(world.probed, [(one, unix("/shared")), (two, address(1))].into());

    let mut world = World::new(answers(1));
    let worker = world.ids()[0];
    world.event(Event::Listens { worker, endpoint: unix("/own") });
    assert!(world.probed.is_empty(), "it may be about to listen elsewhere");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.probed, [(worker, unix("/own"))].into());
    world.event(Event::Listens { worker, endpoint: address(1) });
    assert_eq!(world.probed, [(worker, address(1))].into());
}

#[test]
fn what_a_worker_is_given_is_asked_from_its_start_and_once_it_serves_nothing_is() {
    let now = Instant::now();
    let given = Address::new(([127, 0, 0, 1], 1).into(), false, 0);
    let policy = Policy { workers: 1, ..policy(Readiness::Answers { port: None }) };
    let (mut fleet, actions) = Fleet::new(policy, Endpoints::new([given].into(), BTreeSet::new()), now);
    let [Action::Start { worker, .. }] = actions[..] else { panic!("{actions:?}") };
    let probe = Action::Probe { worker, endpoint: given.into() };
    assert_eq!(fleet.handle(Event::Started { worker, pid: 1 }, now), [probe]);
    let actions = fleet.handle(Event::Probed { worker, outcome: Ok(()) }, now);
    assert!(actions.iter().any(|action| matches!(action, Action::Steer(_))));
    fleet.crew.timers.set(Timer::Worker(worker, WorkerTimer::Probe), now);
    assert_eq!(fleet.handle(Event::Tick, now), []);
}

#[test]
fn two_failures_in_a_row_take_a_canary_back() {
    let mut world = World::new(Policy { workers: 1, ..policy(Readiness::Answers { port: None }) });
    let answer = |world: &mut World, worker, outcome| world.event(Event::Probed { worker, outcome });
    let old = world.ids()[0];
    world.event(Event::Listens { worker: old, endpoint: address(1) });
    answer(&mut world, old, Ok(()));
    world.command(reload_by(Rollout::Canary { share: Share(1000), period: Duration::from_secs(60) }));
    let new = world.ids()[1];
    world.event(Event::Listens { worker: new, endpoint: address(1) });
    answer(&mut world, new, Ok(()));
    let fails = || Err("did not answer GET / within 1s".to_owned());
    for outcome in [fails(), Ok(()), fails()] {
        world.probed.clear();
        world.pass(Duration::from_secs(1));
        assert!(world.probed.contains_key(&new));
        answer(&mut world, new, outcome);
        assert!(world.reloads.is_empty());
    }
    answer(&mut world, new, fails());
    assert_eq!(world.reloads, [false]);
    let told =
        "worker 0 (pid 102, generation 2) did not answer GET / within 1s, 2 times in a row; reload abandoned";
    assert!(world.said(told), "{:?}", world.log);
}

#[test]
fn a_switch_that_the_kernel_refuses_fails_the_reload() {
    let mut world = serving();
    world.command(reload());
    world.next_switch = Err("can't steer 127.0.0.1:1: no memory".to_owned());
    world.ready_all();
    assert_eq!(world.reloads, [false]);
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    assert!(
        world.said("the kernel refused the switch: can't steer 127.0.0.1:1: no memory; reload abandoned")
    );
    assert_eq!(world.draining, world.ids().split_off(3).into_iter().collect(), "they may have connections");
}

#[test]
fn if_the_kernel_does_not_steer_the_first_workers_reuse_run_exits_and_later_it_says_so() {
    let why = || "can't steer 127.0.0.1:1: no memory".to_owned();
    let mut world = World::new(policy(Readiness::Notify));
    let worker = world.ids()[0];
    world.event(Event::SaysReady { worker });
    world.event(Event::SteerFailed { why: why() });
    world.drain_all();
    world.obey();
    assert_eq!(world.exit, Some(1));

    let mut world = serving();
    world.event(Event::SteerFailed { why: why() });
    assert!(world.said(&why()) && told(&world) == [Told::Nothing; 3]);
}

#[test]
fn a_restarted_worker_has_to_listen_where_its_dead_predecessor_did() {
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
fn a_unix_socket_makes_ready_when_two_workers_listen_on_it_or_after_a_second_if_there_is_one_worker() {
    let path = |name: &str| Endpoint::Unix(name.into());
    let mut world = World::new(policy(Readiness::Listen));
    let ids = world.ids();
    for (worker, name) in ids.iter().zip(["a", "b", "c"]) {
        world.event(Event::Listens { worker: *worker, endpoint: path(name) });
    }
    assert_eq!(world.steered_to(), [], "each worker has a socket of its own");
    world.event(Event::Listens { worker: ids[0], endpoint: path("public") });
    assert_eq!(world.steered_to(), []);
    world.event(Event::Listens { worker: ids[1], endpoint: path("public") });
    world.event(Event::Listens { worker: ids[2], endpoint: path("public") });
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    world.command(reload_by(Rollout::AllAtOnce));
    let new = world.ids().split_off(3);
    for worker in &new {
        world.event(Event::Listens { worker: *worker, endpoint: path("public") });
    }
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)], "a, b and c are not needed");

    let mut world = World::new(Policy { workers: 1, ..policy(Readiness::Listen) });
    let worker = world.ids()[0];
    world.event(Event::Listens { worker, endpoint: path("a") });
    assert_eq!(world.steered_to(), [], "it may still listen elsewhere");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.steered_to(), [(0, 1)]);
}

#[test]
fn a_rolling_reload_replaces_one_batch_after_the_other() {
    let mut world = serving();
    world.command(reload_by(Rollout::Batches(2)));
    assert_eq!(world.ids().len(), 5);
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 1)]);
    assert_eq!(world.ids().len(), 5, "the next batch waits until the old workers have ended");
    world.drain_all();
    world.obey();
    assert_eq!(world.ids().len(), 4);
    world.ready_all();
    world.drain_all();
    assert!(world.reloads.is_empty());
    world.obey();
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
    assert_eq!((world.reloads.as_slice(), world.most_alive), (&[true][..], 5));
}

#[test]
fn after_a_failed_rolling_reload_both_generations_serve_and_the_next_reload_replaces_all() {
    let mut world = serving();
    world.command(reload_by(Rollout::Batches(1)));
    world.ready_all();
    world.drain_all();
    world.obey();
    let failed = *world.ids().last().unwrap();
    world.end(failed, End::Exited(3));
    assert_eq!(world.steered_to(), [(0, 2), (1, 1), (2, 1)]);
    assert!(world.said("1 worker of generation 2 and 2 of generation 1 serve on"), "{:?}", world.log);
    assert_eq!((world.reloads.as_slice(), world.fleet.crew.oldest_generation()), (&[false][..], 1));
    // A worker that crashes is replaced by one of its own generation.
    let old = world.ids()[0];
    world.end(old, End::Exited(1));
    world.pass(Duration::ZERO);
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 2), (1, 1), (2, 1)]);
    world.command(reload_by(Rollout::AllAtOnce));
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3)]);
}

#[test]
fn a_rolling_reload_stops_when_a_new_worker_dies_after_it_was_ready() {
    let mut world = serving();
    world.command(reload_by(Rollout::Batches(1)));
    world.ready_all();
    let new = *world.ids().last().unwrap();
    world.end(new, End::Exited(1));
    assert_eq!(world.reloads, [false]);
    world.drain_all();
    world.obey();
    world.pass(Duration::from_secs(1));
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 2), (1, 1), (2, 1)], "no other slot is touched");
}

#[test]
fn a_canary_gets_its_share_for_its_period_and_then_everything() {
    let period = Duration::from_secs(60);
    let share = Share(1000);
    let mut world = serving();
    world.command(reload_by(Rollout::Canary { share, period }));
    assert_eq!(world.plan().share, Share::default());
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    assert_eq!(world.plan().share, share);
    let plan = world.plan();
    let canaries = world.ids().into_iter().filter(|id| plan.role(*id) == Role::Canary).count();
    assert_eq!(canaries, 3);
    world.pass(period - Duration::from_millis(1));
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
    assert_eq!(world.plan().share, Share::default());
    world.drain_all();
    world.obey();
    assert_eq!(world.reloads, [true]);
}

#[test]
fn when_a_canary_dies_the_other_canaries_drain_and_the_old_generation_serves_on() {
    let mut world = serving();
    let period = Duration::from_secs(60);
    world.command(reload_by(Rollout::Canary { share: Share(1000), period }));
    world.ready_all();
    let [a, b, c] = world.ids()[3..] else { panic!() };
    world.end(b, End::Killed(libc::SIGSEGV));
    assert_eq!(world.reloads, [false]);
    assert_eq!(world.draining, BTreeSet::from([a, c]), "they may have requests");
    assert_eq!(world.plan().share, Share::default());
    world.drain_all();
    world.obey();
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    assert_eq!(world.ids().len(), 3);
}

#[test]
fn an_old_worker_that_dies_in_a_rolling_reload_is_restarted_and_the_reload_continues() {
    let mut world = serving();
    world.command(reload_by(Rollout::Batches(1)));
    world.ready_all();
    let old = world.ids()[1];
    world.end(old, End::Exited(1));
    assert!(world.reloads.is_empty());
    for _ in 0..3 {
        world.drain_all();
        world.obey();
        world.ready_all();
    }
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
}

#[test]
fn a_ready_replacement_gets_nothing_before_the_switch() {
    let mut world = serving();
    world.command(reload());
    let new = world.ids()[3];
    world.event(Event::SaysReady { worker: new });
    assert_eq!(world.plan().role(new), Role::Starting);
    assert!(world.plan().roles.keys().all(|id| *id != new));
}

#[test]
fn a_reload_sets_what_the_next_replacements_have_to_do() {
    let mut world = World::new(policy(Readiness::Listen));
    let listen = |world: &mut World, from: usize, ports: &[u16]| {
        for worker in world.ids().split_off(from) {
            ports.iter().for_each(|port| {
                world.event(Event::Listens { worker, endpoint: address(*port) });
            });
        }
    };
    listen(&mut world, 0, &[1]);
    world.command(reload());
    listen(&mut world, 3, &[3, 1]);
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
    assert_eq!(world.fleet.crew().endpoints(), [&address(1), &address(3)].into());
    let serving = world.ids()[3];
    let addresses: Vec<String> =
        world.fleet.crew().addresses(serving).iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["127.0.0.1:1", "127.0.0.1:3"]);
    world.drain_all();
    world.obey();
    let generations = [1, 2, 3].map(|generation| world.fleet.crew().has_slot_of(generation));
    assert_eq!((generations, world.fleet.crew().oldest_generation()), ([false, true, false], 2));
    world.command(reload());
    listen(&mut world, 3, &[1]);
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)], "port 3 is missing");
    listen(&mut world, 3, &[3]);
    assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3)]);
}

#[test]
fn failed_starts_do_not_end_everything_while_a_worker_is_ready() {
    let mut world = serving();
    let [one, two, _] = world.ids()[..] else { panic!() };
    world.starts_fail = true;
    world.end(one, End::Exited(1));
    world.end(two, End::Exited(1));
    world.pass(Duration::from_secs(600));
    assert_eq!(world.exit, None);
    assert_eq!(world.steered_to().len(), 1);
}

#[test]
fn a_failed_start_is_logged_and_tried_again() {
    let mut world = serving();
    world.starts_fail = true;
    let worker = world.ids()[0];
    world.end(worker, End::Exited(1));
    assert!(world.said("worker 0 (generation 1) can't be started: no memory"), "{:?}", world.log);
    world.starts_fail = false;
    world.pass(Duration::from_millis(100));
    assert_eq!(world.ids().len(), 3);
}

#[test]
fn sockets_are_kept_for_a_successor_until_it_is_ready() {
    let mut world = serving();
    let worker = world.ids()[1];
    world.end(worker, End::Exited(1));
    assert_eq!(world.reserved, [(1, 1)].into());
    world.ready_all();
    assert!(world.reserved.is_empty(), "what it has not taken by now it never will");
}

#[test]
fn the_log_tells_a_replacement_from_a_new_worker() {
    let mut world = serving();
    let dead = world.ids()[0];
    world.end(dead, End::Exited(1));
    world.ready_all();
    let ready = "worker 0 (pid 104, generation 1) is ready, a replacement, after";
    assert!(world.said_after_plan(ready), "{:?}", world.log);
    world.command(Command::Scale(Target::Exactly(4)));
    world.ready_all();
    let ready = "worker 3 (pid 105, generation 1) is ready, a new one, after";
    assert!(world.said_after_plan(ready), "{:?}", world.log);
}

/// Three workers that listen on ports 1 and 2, and three canaries that do too.
fn with_canaries() -> (World, Vec<WorkerId>, Vec<WorkerId>) {
    let mut world = World::new(policy(Readiness::Listen));
    let listen = |world: &mut World, worker| {
        world.event(Event::Listens { worker, endpoint: address(1) });
        world.event(Event::Listens { worker, endpoint: address(2) });
    };
    let old = world.ids();
    old.iter().for_each(|worker| listen(&mut world, *worker));
    let period = Duration::from_secs(60);
    world.command(reload_by(Rollout::Canary { share: Share(1000), period }));
    let new = world.ids().split_off(3);
    new.iter().for_each(|worker| listen(&mut world, *worker));
    let tried = "generation 2 gets 10 % of new connections for 1m";
    assert!(world.said_after_plan(tried), "{:?}", world.log);
    (world, old, new)
}

#[test]
fn a_canary_that_stops_listening_where_its_predecessor_does_fails_the_reload() {
    let (mut world, _, new) = with_canaries();
    world.event(Event::StoppedListening { worker: new[1], endpoint: address(1) });
    assert!(world.said("worker 1 (pid 105, generation 2) has stopped listening on 127.0.0.1:1"));
    assert_eq!(world.reloads, [false]);
    assert_eq!(world.draining, new.into_iter().collect());
}

#[test]
fn a_worker_that_serves_may_stop_listening_while_there_are_canaries_and_they_need_not_listen_there() {
    let (mut world, old, new) = with_canaries();
    for worker in [old[0], new[0]] {
        world.event(Event::StoppedListening { worker, endpoint: address(1) });
    }
    assert!(world.reloads.is_empty());
    world.event(Event::StoppedListening { worker: new[2], endpoint: address(3) });
    assert!(world.reloads.is_empty(), "it need not listen there");
}

#[test]
fn a_worker_that_waits_for_an_endpoint_is_ready_when_its_predecessor_has_stopped_listening_there() {
    let mut world = World::new(policy(Readiness::Listen));
    let old = world.ids();
    for worker in &old {
        world.event(Event::Listens { worker: *worker, endpoint: address(1) });
        world.event(Event::Listens { worker: *worker, endpoint: address(2) });
    }
    world.command(reload());
    let new = world.ids().split_off(3);
    for worker in &new {
        world.event(Event::Listens { worker: *worker, endpoint: address(1) });
    }
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    for worker in &old {
        world.event(Event::StoppedListening { worker: *worker, endpoint: address(2) });
    }
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
}

#[test]
fn the_last_reload_is_remembered_with_its_result() {
    let mut world = serving();
    assert!(world.fleet.last_reload().is_none());
    world.command(reload());
    assert_eq!(world.refusal(Command::Abort), None);
    let last = world.fleet.last_reload().unwrap();
    assert_eq!((last.generation, &last.result), (2, &Err("aborted".to_owned())));
    world.obey();
    world.command(reload());
    world.ready_all();
    world.drain_all();
    world.obey();
    let last = world.fleet.last_reload().unwrap();
    assert_eq!((last.generation, &last.result), (3, &Ok(())));
}

#[test]
fn an_abort_ends_the_reload_before_its_switch_and_the_queued_one() {
    let mut world = serving();
    assert_eq!(world.refusal(Command::Abort), Some(Refusal::NoReloadToAbort));
    world.command(reload_by(Rollout::AllAtOnce));
    world.command(reload_by(Rollout::AllAtOnce));
    world.command(Command::Abort);
    world.obey();
    assert_eq!(world.reloads, [false, false]);
    assert_eq!(world.ids().len(), 3);
    world.command(reload_by(Rollout::AllAtOnce));
    world.ready_all();
    assert_eq!(world.refusal(Command::Abort), Some(Refusal::NoReloadToAbort), "the new ones serve");
    world.command(Command::Abort);
    assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3)]);
}

#[test]
fn scaling_adds_slots_and_drains_the_workers_of_those_that_it_removes() {
    let mut world = serving();
    world.command(Command::Scale(Target::Exactly(5)));
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    let new = world.ids().split_off(3);
    world.event(Event::SaysReady { worker: new[1] });
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1), (4, 1)]);
    assert!(world.scalings.is_empty());
    world.ready_all();
    assert_eq!(world.scalings, [true]);
    world.command(Command::Scale(Target::Exactly(1)));
    assert_eq!(world.steered_to(), [(0, 1)]);
    assert_eq!(world.draining.len(), 4);
    world.drain_all();
    world.obey();
    assert_eq!((world.ids().len(), world.scalings.as_slice()), (1, &[true, true][..]));
    world.command(Command::Scale(Target::Exactly(1)));
    assert_eq!(world.scalings, [true; 3], "nothing to do is done at once");
}

#[test]
fn when_a_new_worker_fails_the_scaling_ends_and_the_others_serve_on() {
    let mut world = serving();
    world.command(Command::Scale(Target::Exactly(5)));
    let new = world.ids().split_off(3);
    world.event(Event::SaysReady { worker: new[0] });
    world.end(new[1], End::Exited(1));
    assert_eq!(world.scalings, [false]);
    assert_eq!(world.draining, BTreeSet::from([new[0]]), "it may have requests");
    world.drain_all();
    world.obey();
    assert_eq!(world.ids().len(), 3);
    assert_eq!(world.fleet.crew.slots(), 3);
}

#[test]
fn commands_during_an_operation_are_carried_out_after_it() {
    let mut world = serving();
    world.command(reload_by(Rollout::AllAtOnce));
    world.command(Command::Scale(Target::Exactly(4)));
    assert_eq!((world.ids().len(), world.fleet.queue.workers()), (6, Some(4)));
    world.ready_all();
    world.drain_all();
    world.obey();
    assert_eq!((world.ids().len(), world.reloads.as_slice()), (4, &[true][..]));
    world.command(reload_by(Rollout::AllAtOnce));
    world.ready_all();
    assert_eq!(world.scalings, [true]);
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3), (3, 3)]);
}

#[test]
fn each_slot_and_each_other_worker_has_a_view() {
    let mut world = serving();
    let dead = world.ids()[1];
    world.end(dead, End::Exited(1));
    world.ready_all();
    world.end(WorkerId(3), End::Exited(1)); // ended twice in a row: its slot waits
    let states = |world: &World| {
        let views = world.fleet.crew.views().into_iter();
        let state = |view: &View| view.process.map(|process| process.state);
        views.map(|view| (view.slot.0, view.serves, state(&view), view.restarts)).collect::<Vec<_>>()
    };
    assert_eq!(states(&world)[1], (1, true, None, 2));
    world.command(reload_by(Rollout::AllAtOnce));
    assert_eq!(
        states(&world)[..3],
        [(0, true, Some(State::Ready), 0), (0, false, Some(State::Starting), 0), (1, true, None, 2)]
    );
}

#[test]
fn ready_after_a_duration_holds_even_if_the_ready_timeout_is_shorter() {
    let mut world = World::new(policy(Readiness::Alive(Duration::from_secs(90))));
    world.pass(Duration::from_millis(89_999));
    assert_eq!(world.steered_to().len(), 0);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.steered_to().len(), 3);
}

/// Something that happens to the fleet; an index chooses one of the living workers.
#[derive(Debug, Clone)]
enum Step {
    Ready(prop::sample::Index),
    Listens(prop::sample::Index, u16),
    Unlistens(prop::sample::Index, u16),
    Answers(prop::sample::Index, bool),
    RefusesSwitch,
    Ends(prop::sample::Index),
    Drained(prop::sample::Index),
    Pass(u64),
    StartsFail(bool),
    Reload(Rollout),
    Abort,
    Scale(u32),
    Recycle(BTreeSet<u32>),
    Sick(prop::sample::Index, Sickness),
    Hangs(prop::sample::Index),
    Recovers(prop::sample::Index),
    Stop,
}

fn step() -> impl Strategy<Value = Step> {
    let who = any::<prop::sample::Index>;
    prop_oneof![
        8 => who().prop_map(Step::Ready),
        3 => (who(), 1u16..4).prop_map(|(who, port)| Step::Listens(who, port)),
        1 => (who(), 1u16..4).prop_map(|(who, port)| Step::Unlistens(who, port)),
        6 => (who(), any::<bool>()).prop_map(|(who, answers)| Step::Answers(who, answers)),
        1 => Just(Step::RefusesSwitch),
        4 => who().prop_map(Step::Ends),
        4 => who().prop_map(Step::Drained),
        4 => (1u64..40_000).prop_map(Step::Pass),
        1 => any::<bool>().prop_map(Step::StartsFail),
        4 => rollout().prop_map(Step::Reload),
        1 => Just(Step::Abort),
        1 => (1..=MOST_WORKERS).prop_map(Step::Scale),
        2 => btree_set(0..MOST_WORKERS, 0..3).prop_map(Step::Recycle),
        2 => (who(), sickness()).prop_map(|(who, sickness)| Step::Sick(who, sickness)),
        2 => who().prop_map(Step::Hangs),
        1 => who().prop_map(Step::Recovers),
        1 => Just(Step::Stop),
    ]
}

/// The tests scale to at most so many workers.
const MOST_WORKERS: u32 = 4;

fn rollout() -> impl Strategy<Value = Rollout> {
    let canary = |seconds| Rollout::Canary { share: Share::default(), period: Duration::from_secs(seconds) };
    prop_oneof![
        2 => Just(Rollout::AllAtOnce),
        1 => (1u32..4).prop_map(Rollout::Batches),
        1 => (0u64..30).prop_map(canary),
    ]
}

impl World {
    /// Takes a step. With `gentle`, no worker that serves ends unless it was told to.
    fn take(&mut self, step: Step, gentle: bool) {
        let choose =
            |who: prop::sample::Index, of: Vec<WorkerId>| (!of.is_empty()).then(|| of[who.index(of.len())]);
        match step {
            Step::Ready(who) => {
                if let Some(worker) = choose(who, self.ids()) {
                    self.event(Event::SaysReady { worker });
                }
            }
            Step::Listens(who, port) => {
                if let Some(worker) = choose(who, self.ids()) {
                    self.event(Event::Listens { worker, endpoint: endpoint(port) });
                }
            }
            Step::Answers(who, answers) => {
                if let Some(worker) = choose(who, self.probed.keys().copied().collect()) {
                    self.probed.remove(&worker);
                    let outcome = if answers { Ok(()) } else { Err("closed the connection".to_owned()) };
                    self.event(Event::Probed { worker, outcome });
                }
            }
            Step::RefusesSwitch => self.next_switch = Err("no memory".to_owned()),
            Step::Unlistens(who, port) => {
                if let Some(worker) = choose(who, self.ids()) {
                    self.event(Event::StoppedListening { worker, endpoint: endpoint(port) });
                }
            }
            Step::Ends(who) => {
                let plan = self.plan();
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
            Step::Reload(rollout) => self.command(reload_by(rollout)),
            Step::Abort => self.command(Command::Abort),
            Step::Scale(workers) => self.command(Command::Scale(Target::Exactly(workers))),
            Step::Recycle(slots) => self.command(recycle(slots)),
            Step::Sick(who, sickness) => {
                if let Some(worker) = choose(who, self.ids()) {
                    self.event(Event::Sick { worker, sickness });
                }
            }
            Step::Hangs(who) => {
                if let Some(worker) = choose(who, self.ids()) {
                    self.event(Event::Hangs { worker });
                }
            }
            Step::Recovers(who) => {
                if let Some(worker) = choose(who, self.ids()) {
                    self.event(Event::Recovered { worker });
                }
            }
            Step::Stop => self.event(Event::StopSignal { signal: "SIGTERM" }),
        }
    }

    fn stopping(&self) -> bool {
        self.exit.is_some() || matches!(self.fleet.phase, Phase::Stopping { .. })
    }
}

/// Three ready workers that share a queue.
fn sharing() -> World {
    let mut world = World::new(Policy { shares_queue: true, ..policy(Readiness::Notify) });
    world.ready_all();
    world
}

/// The same, by a Unix socket.
fn sharing_a_path() -> World {
    let mut world = serving();
    for worker in world.ids() {
        world.event(Event::Listens { worker, endpoint: endpoint(3) });
    }
    world
}

#[test]
fn with_one_queue_nobody_gets_connections_until_the_whole_first_generation_is_ready() {
    let mut world = World::new(Policy { shares_queue: true, ..policy(Readiness::Notify) });
    for worker in world.ids() {
        assert_eq!(world.steered_to(), []);
        world.event(Event::SaysReady { worker });
    }
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
}

#[test]
fn with_one_queue_a_scaling_to_fewer_workers_replaces_all_of_them() {
    for (mut world, endpoint) in [(sharing(), endpoint(1)), (sharing_a_path(), endpoint(3))] {
        world.command(Command::Scale(Target::Exactly(2)));
        assert_eq!(world.alive.len(), 5, "two more");
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        for worker in world.ids() {
            world.event(Event::Listens { worker, endpoint: endpoint.clone() });
        }
        world.ready_all();
        assert_eq!(world.steered_to(), [(0, 2), (1, 2)]);
        world.drain_all();
        world.obey();
        assert_eq!((world.alive.len(), world.scalings.clone()), (2, vec![true]));
        assert_eq!(world.fleet.crew.slots(), 2);
    }
}

#[test]
fn a_path_of_one_of_several_workers_is_its_own_and_of_a_single_one_it_would_be_its_successors_too() {
    let mut world = serving();
    let (first, path) = (world.ids()[0], endpoint(3));
    world.event(Event::Listens { worker: first, endpoint: path.clone() });
    assert!(!world.fleet.must_replace_all(), "it may be its own");
    world.command(Command::Scale(Target::Exactly(1)));
    world.drain_all();
    world.obey();
    assert!(world.fleet.must_replace_all(), "its successor would have it as well");
    world.command(recycle([0]));
    let new = *world.ids().last().unwrap();
    world.event(Event::Listens { worker: new, endpoint: path });
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 2)]);
    world.event(Event::Listens { worker: new, endpoint: endpoint(1) });
    assert!(world.fleet.must_replace_all(), "also if it serves on a port");
}

#[test]
fn by_a_shared_path_all_are_replaced_also_while_the_other_is_restarted() {
    let mut world = sharing_a_path();
    for worker in world.ids().into_iter().skip(1) {
        world.end(worker, End::Exited(1));
    }
    world.command(recycle([0]));
    assert_eq!(world.fleet.phase.reload().map(|reload| reload.shrinks_to), Some(None), "{:?}", world.log);
}

#[test]
fn a_recycling_that_is_queued_at_the_start_replaces_all_that_then_share_a_path() {
    let mut world = World::new(policy(Readiness::Notify));
    world.command(recycle([0, 1]));
    for worker in world.ids() {
        world.event(Event::Listens { worker, endpoint: endpoint(3) });
    }
    world.ready_all();
    assert_eq!(world.alive.len(), 6);
    for worker in world.ids() {
        world.event(Event::Listens { worker, endpoint: endpoint(3) });
    }
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
    world.drain_all();
    world.obey();
    assert_eq!((world.recyclings.clone(), world.alive.len()), (vec![true], 3));
}

#[test]
fn with_one_queue_a_scaling_to_fewer_workers_that_fails_changes_nothing() {
    let mut world = sharing();
    world.command(Command::Scale(Target::Exactly(1)));
    let new = world.ids()[3];
    world.end(new, End::Exited(1));
    assert_eq!((world.scalings.clone(), world.fleet.crew.slots()), (vec![false], 3));
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
}

#[test]
fn with_one_queue_a_recycling_is_a_reload_and_a_reload_in_batches_is_refused() {
    let mut world = sharing();
    world.command(recycle([1]));
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 2), (1, 2), (2, 2)]);
    world.drain_all();
    world.obey();
    assert_eq!(world.recyclings, [true]);
    let refusal = world.refusal(reload_by(Rollout::Batches(1))).expect("it is refused");
    assert!(refusal.to_string().contains("--balance queue"), "{refusal}");
}

#[test]
fn with_one_queue_a_sick_worker_has_all_replaced_and_the_next_try_waits_if_that_fails() {
    let mut world = sharing();
    for sick in [world.ids()[1], world.ids()[2]] {
        world.event(Event::Sick { worker: sick, sickness: Sickness::Memory(500) });
    }
    assert_eq!(world.alive.len(), 6);
    let new = world.ids()[3];
    world.end(new, End::Exited(1));
    world.obey();
    assert_eq!((world.alive.len(), world.steered_to()), (3, vec![(0, 1), (1, 1), (2, 1)]));
    world.pass(Duration::from_millis(900));
    assert_eq!(world.alive.len(), 3);
    world.pass(Duration::from_millis(200));
    assert_eq!(world.alive.len(), 6);
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 3), (1, 3), (2, 3)]);
}

#[test]
fn with_one_queue_a_worker_that_hangs_is_replaced_alone() {
    let mut world = sharing();
    let hung = world.ids()[1];
    world.fleet.crew.policy.hung_timeout = Some(Duration::from_secs(1));
    world.event(Event::Hangs { worker: hung });
    assert_eq!(world.alive.len(), 4);
    world.ready_all();
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    assert!(world.draining.contains(&hung));
}

fn readiness() -> impl Strategy<Value = Readiness> {
    prop_oneof![
        Just(Readiness::Listen),
        Just(Readiness::Notify),
        Just(Readiness::Alive(Duration::from_secs(2))),
        Just(Readiness::Answers { port: None })
    ]
}

proptest! {
    /// There are never more than two generations, each operation ends, and after a stop no worker lives. (The world
    /// itself checks that no action names a dead worker.)
    #[test]
    fn whatever_happens_a_reload_and_a_stop_come_to_an_end(
        readiness in readiness(), shares_queue: bool, steps in vec(step(), 0..60)
    ) {
        let mut world = World::new(Policy { shares_queue, ..policy(readiness) });
        for step in steps {
            world.take(step, false);
            prop_assert!(world.most_alive <= 2 * MOST_WORKERS as usize, "{} alive", world.most_alive);
            let has_slot = |(slot, generation): &(u32, u32)| {
                world.fleet.crew.roster.slots.get(*slot as usize).is_some_and(|slot| slot.generation == *generation)
            };
            let kept = world.reserved.iter().all(has_slot);
            prop_assert!(kept, "kept for no successor: {:?}", world.reserved);
            let plan = world.plan();
            let ready = world.places.iter().filter(|(id, _)| plan.role(**id) == Role::Ready);
            let ready: BTreeSet<_> = ready.map(|(_, place)| *place).collect();
            let steered_to = world.steered_to.iter().copied().collect::<BTreeSet<_>>();
            match world.fleet.crew.timers.is_set(Timer::Steer) {
                true => {
                    prop_assert_eq!(world.fleet.phase, Phase::Starting);
                    prop_assert!(shares_queue || !steered_to.is_empty());
                    prop_assert!(steered_to.is_subset(&ready));
                }
                false => prop_assert_eq!(&steered_to, &ready),
            }
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
        // The successor of a sick worker is tried again for as long as that is sick.
        let is_sick = !world.fleet.sick.is_empty() || !world.fleet.hung.is_empty();
        let tries = matches!(phase, Phase::Recycling(Recycling { ticket: None, .. }) | Phase::Abandoning)
            || world.has_shared_queue && phase.reload().is_some();
        let rests = matches!(phase, Phase::Starting | Phase::Serving) || is_sick && tries;
        prop_assert!(world.exit.is_some() || rests, "{phase:?}");
        world.event(Event::StopSignal { signal: "SIGTERM" });
        world.drain_all();
        world.obey();
        prop_assert!(world.exit.is_some());
        prop_assert!(world.alive.is_empty());
        prop_assert!(world.reserved.is_empty());
    }

    /// Each ticket is answered once, unless a stop begins before. (The world checks that none is answered twice.)
    #[test]
    fn every_accepted_command_is_told_how_it_ended(
        readiness in readiness(), shares_queue: bool, steps in vec(step(), 0..60)
    ) {
        let mut world = World::new(Policy { shares_queue, ..policy(readiness) });
        for step in steps {
            world.take(step, false);
            let is_known = |ticket: &Ticket| {
                world.fleet.queue.has(*ticket) || world.fleet.phase.ticket() == Some(*ticket)
            };
            let ends_with_the_stop = world.fleet.stop_ticket().is_some();
            prop_assert!(ends_with_the_stop || world.pending.keys().all(is_known), "{:?}", world.pending);
        }
    }

    #[test]
    fn a_rolling_reload_never_has_more_extra_workers_than_a_batch(
        readiness in readiness(), most in 1u32..3, steps in vec(step(), 0..80)
    ) {
        let mut world = World::new(policy(readiness));
        for step in steps {
            match step {
                Step::Scale(_) | Step::Listens(_, 3) => {}
                Step::Reload(_) => world.take(Step::Reload(Rollout::Batches(most)), false),
                step => world.take(step, false),
            }
            let allowed = (WORKERS + most) as usize;
            prop_assert!(world.most_alive <= allowed, "{} alive", world.most_alive);
        }
    }

    /// One worker after the other, as long as only successors fail.
    #[test]
    fn a_recycling_never_leaves_a_slot_without_a_worker_and_never_has_two_successors(
        readiness in readiness(), steps in vec(step(), 0..80)
    ) {
        let mut world = World::new(policy(readiness));
        world.pass(Duration::from_secs(3));
        for worker in world.ids() {
            world.event(Event::Listens { worker, endpoint: endpoint(1) });
            world.event(Event::SaysReady { worker });
            world.event(Event::Probed { worker, outcome: Ok(()) });
        }
        let all = [(0, 1), (1, 1), (2, 1)];
        prop_assert_eq!(world.steered_to(), all);
        for step in steps {
            if !matches!(step, Step::Scale(_) | Step::Reload(_) | Step::Listens(_, 3) | Step::Stop) {
                world.take(step, true);
                prop_assert_eq!(world.steered_to(), all);
                prop_assert!(world.alive.len() <= WORKERS as usize + 1, "{} alive", world.alive.len());
            }
        }
    }

    /// One that does goes on to accept from the queue of the others. (One that hangs doesn't.)
    #[test]
    fn with_one_queue_no_worker_drains_while_another_of_its_generation_gets_connections(
        readiness in readiness(), by_path: bool, steps in vec(step(), 0..60)
    ) {
        let mut world = World::new(Policy { shares_queue: !by_path, ..policy(readiness) });
        for worker in world.ids() {
            world.event(Event::Listens { worker, endpoint: endpoint(3) });
        }
        for step in steps {
            let has_other_rules = match step {
                Step::Listens(_, port) => by_path && port != 3,
                Step::Unlistens(..) | Step::Reload(Rollout::Batches(_)) => by_path,
                _ => false,
            };
            if matches!(step, Step::Hangs(_)) || has_other_rules {
                continue;
            }
            world.take(step, false);
            let plan = world.plan();
            let crew = &world.fleet.crew;
            let shares = |id| !by_path || crew.endpoints.of(id).any(|its| *its == endpoint(3));
            let workers = || crew.roster.workers().filter(|(id, _)| shares(*id));
            let get_connections = workers().filter(|(id, _)| plan.role(*id) == Role::Ready);
            let get_connections: BTreeSet<u32> = get_connections.map(|(_, worker)| worker.generation).collect();
            let mut drain = workers().filter(|(_, worker)| worker.state == State::Draining);
            prop_assert!(!drain.any(|(_, worker)| get_connections.contains(&worker.generation)));
        }
    }

    /// From the moment that a worker is ready, through all reloads and scalings, unless serving workers end by
    /// themselves or everything is stopped.
    #[test]
    fn at_every_moment_some_worker_gets_connections(
        readiness in readiness(), shares_queue: bool, steps in vec(step(), 0..60)
    ) {
        let mut world = World::new(Policy { shares_queue, ..policy(readiness) });
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
