//! What control commands ask for, and what they are told.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::{Source, Supervisor};
use crate::fleet::{Event, Place, Rollout};
use crate::ids::WorkerId;
use crate::kernel::procfs::{self, Usage};
use crate::kernel::sockdiag::SockDiag;
use crate::operate::control::{Awaited, ClientId};
use crate::operate::protocol::{How, Reply, Request, Target};
use crate::operate::status::{LastReload, Status, Worker};
use crate::output::labels::Labels;
use crate::steering::Share;
use crate::steering::load::Load;
use crate::words::count;

impl Supervisor {
    pub(super) fn accept_clients(&mut self) {
        if let Some(control) = &mut self.control {
            control.accept(&self.epoll, Instant::now(), |id| Source::Client(id).to_token());
        }
    }

    pub(super) fn attend(&mut self, id: ClientId) {
        let Some(request) = self.control.as_mut().and_then(|control| control.attend(id)) else { return };
        let answer = match request {
            Request::Status => Answer::Now(Reply::Status(Box::new(self.status(false)))),
            Request::Brief => Answer::Now(Reply::Status(Box::new(self.status(true)))),
            Request::Stop { wait } => self.stop(wait),
            _ if self.fleet.is_stopping() => Answer::Now(failed("everything is being stopped")),
            Request::Reload { how, wait } => self.reload(how, wait),
            Request::Abort => Answer::Now(self.abort()),
            Request::Scale { to, wait } => self.scale(to, wait),
        };
        match answer {
            Answer::Now(reply) => self.finish(id, &reply),
            // It waits before the change begins, so that it sees all of it.
            Answer::Then(awaited, event) => {
                if let Some(control) = &mut self.control {
                    control.have_wait(id, awaited);
                    if event == Event::Tick {
                        control.send(id, &Reply::Step("everything is being stopped already".to_owned()));
                    }
                }
                self.handle(event);
            }
        }
    }

    fn stop(&mut self, wait: bool) -> Answer {
        let is_stopping = self.fleet.is_stopping();
        let event = if is_stopping { Event::Tick } else { Event::Stop { signal: "stop" } };
        if wait && !is_stopping {
            return Answer::Then(Awaited::Stop, event);
        }
        self.handle(event);
        if wait { Answer::Then(Awaited::Stop, Event::Tick) } else { done("the workers are being stopped") }
    }

    fn reload(&mut self, how: Option<How>, wait: bool) -> Answer {
        let waiting = self.fleet.waiting_reload();
        let rollout = match how {
            None => waiting.unwrap_or(self.fleet.default_rollout()),
            Some(How::Batch(0)) => return Answer::Now(failed("a batch has at least one worker")),
            Some(How::Batch(most)) => Rollout::Batches(most),
            Some(How::Canary { percent, seconds }) => {
                match (Share::from_percent(percent), Duration::try_from_secs_f64(seconds)) {
                    (Some(share), Ok(period)) if period < LONGEST_TRIAL => Rollout::Canary { share, period },
                    _ => return Answer::Now(failed("no such share, or no such time")),
                }
            }
        };
        if waiting.is_some_and(|waiting| waiting != rollout) {
            let why = "a reload waits its turn already, and goes another way (see reload --abort)";
            return Answer::Now(failed(why));
        }
        let generation = self.fleet.next_generation();
        if wait {
            return Answer::Then(Awaited::Reload(generation), Event::Reload(rollout));
        }
        self.handle(Event::Reload(rollout));
        done(&format!("the reload to generation {generation} has begun, or waits its turn"))
    }

    /// SIGUSR2 and SIGHUP.
    pub(super) fn reload_by_signal(&mut self) {
        let rollout = self.fleet.waiting_reload().unwrap_or(self.fleet.default_rollout());
        self.handle(Event::Reload(rollout));
    }

    fn abort(&mut self) -> Reply {
        if !self.fleet.can_abort() {
            return failed("there is no reload that could be aborted");
        }
        self.handle(Event::Abort);
        Reply::Done(format!("aborted; {} on", self.fleet.who_serves()))
    }

    fn scale(&mut self, to: Target, wait: bool) -> Answer {
        let now = self.fleet.workers_wanted();
        let workers = match to {
            Target::Exactly(number) => number,
            Target::More(number) => now.saturating_add(number),
            Target::Fewer(number) => now.saturating_sub(number),
        };
        if !(1..=MOST_WORKERS).contains(&workers) {
            let why = format!("there can be 1 to {MOST_WORKERS} workers, and not {workers}");
            return Answer::Now(failed(&why));
        }
        let number = self.fleet.next_scaling();
        // Who waits for the same turn with another number won't get it.
        let superseded = failed(&format!("{} were asked for since", count(workers as usize, "worker")));
        for (id, awaited) in self.waiting() {
            if matches!(awaited, Awaited::Scale { number: n, workers: w } if n == number && w != workers) {
                self.finish(id, &superseded);
            }
        }
        if wait {
            return Answer::Then(Awaited::Scale { number, workers }, Event::Scale(workers));
        }
        self.handle(Event::Scale(workers));
        done(&format!("scaling to {} has begun, or waits its turn", count(workers as usize, "worker")))
    }

    /// SIGTTIN and SIGTTOU.
    pub(super) fn scale_by(&mut self, more: bool) {
        let now = self.fleet.workers_wanted();
        let workers = if more { now + 1 } else { now - 1 };
        if (1..=MOST_WORKERS).contains(&workers) {
            self.handle(Event::Scale(workers));
        }
    }

    fn finish(&mut self, id: ClientId, reply: &Reply) {
        if let Some(control) = &mut self.control {
            control.finish(id, reply);
        }
    }

    /// Tells those that wait for it how a reload, or a scaling, has ended.
    pub(super) fn has_ended(
        &mut self,
        what: &str,
        is_it: impl Fn(Awaited) -> bool,
        result: Result<(), String>,
        serving: String,
        culprit: Option<WorkerId>,
    ) {
        let last_lines = |labels: &mut Labels| culprit.map(|worker| labels.last_lines(worker));
        let details = self.labels.as_mut().and_then(last_lines).unwrap_or_default();
        let reply = match result {
            Ok(()) => Reply::Done(serving),
            Err(why) => Reply::Failed(format!("the {what} failed: {why}; {serving} on"), details),
        };
        for (id, awaited) in self.waiting() {
            if is_it(awaited) {
                self.finish(id, &reply);
            }
        }
    }

    /// Tells all that still wait that it is over.
    pub(super) fn all_ended(&mut self, status: u8) {
        for (id, awaited) in self.waiting() {
            let reply = match awaited {
                Awaited::Stop if status == 0 => {
                    Reply::Done("stopped; every worker ended by itself".to_owned())
                }
                Awaited::Stop => {
                    failed(&format!("stopped with status {status}: see the log for what went wrong"))
                }
                Awaited::Reload(_) | Awaited::Scale { .. } => failed("everything was stopped"),
            };
            self.finish(id, &reply);
        }
    }

    fn waiting(&self) -> Vec<(ClientId, Awaited)> {
        self.control.as_ref().map_or(Vec::new(), super::super::operate::control::Control::waiting)
    }

    fn status(&self, brief: bool) -> Status {
        let now = Instant::now();
        let millis = |since: Instant| now.saturating_duration_since(since).as_millis();
        let seconds = |since: Instant| millis(since) as f64 / 1000.0;
        let places = self.fleet.places();
        let connections = if brief { BTreeMap::new() } else { self.connections(&places) };
        let of_place = |place: &Place| {
            let pid = place.worker.map(|(_, pid)| Pid::from_raw(pid));
            let Usage { cpu, rss_kib } = pid.filter(|_| !brief).map(procfs::usage).unwrap_or_default();
            let id = place.worker.map(|(id, _)| id);
            Worker {
                slot: place.slot.0,
                pid: pid.map(|pid| pid.as_raw() as u32),
                generation: place.generation,
                serves: place.serves,
                state: place.state.to_owned(),
                seconds: place.since.map(seconds),
                restarts: place.restarts,
                load: id.map_or(Load::Free, |id| self.pool.load(id)).to_string(),
                accept_queue: id.map_or(0, |id| self.pool.accept_queue(id)),
                connections: pid.and_then(|pid| connections.get(&pid).copied()).unwrap_or(0),
                rss_kib,
                cpu_seconds: cpu.as_secs_f64(),
                age_seconds: place.started.map(seconds),
                status: id.and_then(|id| self.workers.get(&id)).and_then(|worker| worker.status.clone()),
            }
        };
        let ready = places.iter().filter(|place| place.serves && place.state == "ready").count();
        let last_reload = self.fleet.last_reload().map(|last| LastReload {
            generation: last.generation,
            ok: last.result.is_ok(),
            reason: last.result.clone().err(),
            seconds_ago: seconds(last.ended),
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state: self.fleet.phase().to_owned(),
            generation: self.fleet.generation(),
            slots: self.fleet.slots(),
            ready: ready as u32,
            addresses: self.fleet.endpoints().into_iter().map(ToString::to_string).collect(),
            workers: places.iter().map(of_place).collect(),
            last_reload,
        }
    }

    /// How many connections each worker has, of those that came by its listeners.
    fn connections(&self, places: &[Place]) -> BTreeMap<Pid, u32> {
        let workers = || places.iter().filter_map(|place| place.worker);
        let addresses = workers().flat_map(|(id, _)| self.pool.addresses(id));
        let ports: BTreeMap<(bool, u16), _> = addresses
            .map(|address| ((address.socket.is_ipv6(), address.socket.port()), address.socket))
            .collect();
        let mut owners: HashMap<u64, Pid> = HashMap::new();
        for (_, pid) in workers() {
            let worker = Pid::from_raw(pid);
            for process in procfs::tree(worker) {
                let sockets = procfs::socket_inodes(process).unwrap_or_default();
                owners.extend(sockets.into_iter().map(|inode| (inode, worker)));
            }
        }
        let mut counts = BTreeMap::new();
        let mut inodes: Vec<u64> = self.unix.connections();
        if let Ok(mut diag) = SockDiag::new() {
            for socket in ports.into_values() {
                let connections = diag.connections(socket).unwrap_or_default();
                inodes.extend(connections.iter().map(|connection| u64::from(connection.inode)));
            }
        }
        for owner in inodes.iter().filter_map(|inode| owners.get(inode)) {
            *counts.entry(*owner).or_default() += 1;
        }
        counts
    }
}

/// To how many workers one can scale, as by `-n`.
const MOST_WORKERS: u32 = u16::MAX as u32;
/// A trial is no longer than anyone waits, so that no clock overflows.
const LONGEST_TRIAL: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// What a client gets.
enum Answer {
    Now(Reply),
    /// It waits for this, which then begins by that.
    Then(Awaited, Event),
}

fn done(text: &str) -> Answer {
    Answer::Now(Reply::Done(text.to_owned()))
}

fn failed(why: &str) -> Reply {
    Reply::Failed(why.to_owned(), Vec::new())
}
