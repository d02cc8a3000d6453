//! What control commands and signals ask for, and the replies to commands.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::time::{Duration, Instant};

use log::info;
use nix::unistd::Pid;

use super::{Source, Supervisor};
use crate::fleet::{Accepted, Activity, Command, ReloadOptions, Rollout, State, Target, Ticket, View};
use crate::ids::{SlotId, WorkerId};
use crate::kernel::open_sockets;
use crate::kernel::procfs::{self, Usage};
use crate::kernel::sockdiag::SockDiag;
use crate::operate::control::{ClientId, Control};
use crate::operate::protocol::{self, How, Reply, Request};
use crate::operate::status::{self, LastReload, Status, WorkerLoad, WorkerState, WorkerStatus};
use crate::output::labels::Labels;
use crate::steering::load::Load;
use crate::worker::Program;

impl Supervisor {
    pub(super) fn accept_clients(&mut self) {
        if let Some(control) = &mut self.control {
            control.accept(&self.epoll, Instant::now(), |id| Source::Client(id).to_token());
        }
    }

    pub(super) fn attend(&mut self, id: ClientId) {
        let Some(request) = self.control.as_mut().and_then(|control| control.read_request(id)) else {
            return;
        };
        let (command, wait) = match request {
            Request::Status => return self.reply(id, &Reply::Status(Box::new(self.status(true)))),
            Request::Brief => return self.reply(id, &Reply::Status(Box::new(self.status(false)))),
            Request::Stop { wait } => (Ok(Command::Stop), wait),
            Request::Reload { how, ports_may_change, command, wait } => {
                (self.reload_options(how, ports_may_change, command).map(Command::Reload), wait)
            }
            Request::Abort => (Ok(Command::Abort), false),
            Request::Scale { to, wait } => (Ok(Command::Scale(target(to))), wait),
            Request::Recycle { slots, wait } => {
                (Ok(Command::Recycle(slots.into_iter().map(SlotId).collect())), wait)
            }
        };
        match command {
            Ok(command) => self.command(id, command, wait),
            Err(why) => self.reply(id, &failed(why)),
        }
    }

    fn reload_options(
        &mut self,
        how: Option<How>,
        ports_may_change: bool,
        command: Option<Vec<String>>,
    ) -> Result<ReloadOptions, String> {
        let rollout = how.map(rollout).transpose()?;
        let program = command.map(program).transpose()?;
        let command = program.map(|program| self.environments.command_id(program));
        Ok(ReloadOptions { rollout, ports_may_change, command })
    }

    fn command(&mut self, id: ClientId, command: Command, wait: bool) {
        let name = match command {
            Command::Reload(_) => "reload",
            Command::Scale(_) => "scaling",
            Command::Recycle(_) => "recycling",
            Command::Abort => "abort",
            Command::Stop => "stop",
        };
        let (answer, actions) = self.fleet.command(command, Instant::now());
        let done = |text: &str| Reply::Done(text.to_owned());
        // A client that waits is noted before the actions are carried out, so that it sees all of them; one that doesn't
        // gets its reply after them.
        let reply = match answer {
            Err(refusal) => Some(failed(refusal.to_string())),
            Ok(Accepted::Aborted) => Some(done(&format!("aborted; {} on", self.fleet.crew().who_serves()))),
            Ok(Accepted::Begun(ticket) | Accepted::Queued(ticket)) if wait => {
                self.wait(id, ticket);
                None
            }
            Ok(Accepted::Joined(ticket)) if wait => {
                self.wait(id, ticket);
                if let Some(control) = &mut self.control {
                    control.send(id, &Reply::Step("reuse-run is stopping already".to_owned()));
                }
                None
            }
            Ok(Accepted::Begun(_)) => Some(done(&format!("{name} begun"))),
            Ok(Accepted::Queued(_)) => Some(done(&format!("{name} queued until the current operation ends"))),
            Ok(Accepted::Joined(_)) => Some(done("reuse-run is stopping already")),
        };
        self.actions.extend(actions);
        self.act();
        if let Some(reply) = reply {
            self.reply(id, &reply);
        }
    }

    /// What a signal asks for; nobody waits for an answer.
    pub(super) fn command_by_signal(&mut self, command: Command) {
        let (answer, actions) = self.fleet.command(command, Instant::now());
        if let Err(refusal) = answer {
            info!("the signal is ignored: {refusal}");
        }
        self.actions.extend(actions);
        self.act();
    }

    fn wait(&mut self, id: ClientId, ticket: Ticket) {
        if let Some(control) = &mut self.control {
            control.wait_for(id, ticket);
        }
    }

    fn reply(&mut self, id: ClientId, reply: &Reply) {
        if let Some(control) = &mut self.control {
            control.reply_and_close(id, reply);
        }
    }

    /// Tells the clients that wait for an operation how it has ended.
    pub(super) fn operation_ended(
        &mut self,
        ticket: Ticket,
        outcome: Result<String, String>,
        culprit: Option<WorkerId>,
    ) {
        let last_lines = |labels: &mut Labels| culprit.map(|worker| labels.last_lines(worker));
        let reply = match outcome {
            Ok(serving) => Reply::Done(serving),
            Err(why) => Reply::Failed(why, self.labels.as_mut().and_then(last_lines).unwrap_or_default()),
        };
        let waiting = self.control.as_ref().map_or(Vec::new(), Control::waiting);
        for (id, _) in waiting.into_iter().filter(|(_, waits_for)| *waits_for == ticket) {
            self.reply(id, &reply);
        }
    }

    /// Tells the clients that still wait, for the stop or for what it has ended, that it is over.
    pub(super) fn stop_ended(&mut self, status: u8) {
        let stop = self.fleet.stop_ticket();
        let reply = |ticket| match status {
            _ if Some(ticket) != stop => failed("everything was stopped".to_owned()),
            0 => Reply::Done("stopped; every worker ended by itself".to_owned()),
            _ => failed(format!("stopped with status {status}: see the log for what went wrong")),
        };
        let Some(control) = &mut self.control else { return };
        // Not closed: the end of file tells the client that the process has ended.
        for (id, ticket) in control.waiting() {
            control.send(id, &reply(ticket));
        }
    }

    /// With `usage`, also what takes long to find out: connections, and what processes use.
    fn status(&self, usage: bool) -> Status {
        let now = Instant::now();
        let seconds = |since: Instant| now.saturating_duration_since(since).as_millis() as f64 / 1000.0;
        let crew = self.fleet.crew();
        let views = crew.views();
        let connections = if usage { self.connections(&views) } else { BTreeMap::new() };
        let program = self.environments.program(crew.generation());
        let of_view = |view: &View| {
            let process = view.process;
            let pid = process.and_then(|process| process.pid).map(Pid::from_raw);
            let Usage { cpu, rss_kib } = pid.filter(|_| usage).map(procfs::usage).unwrap_or_default();
            let id = process.map(|process| process.worker);
            WorkerStatus {
                slot: view.slot.0,
                pid: pid.map(|pid| pid.as_raw() as u32),
                generation: view.generation,
                command: (self.environments.program(view.generation))
                    .filter(|other| program != Some(other))
                    .map(Program::words),
                serves: view.serves,
                state: process.map_or(WorkerState::Down, |process| process.state.into()),
                seconds: process.map(|process| seconds(process.since)),
                restarts: view.restarts,
                load: id.map_or(WorkerLoad::Free, |id| match self.health.hangs(id) {
                    true => WorkerLoad::Hung,
                    false => self.pool.load(id).into(),
                }),
                accept_queue: id.map_or(0, |id| self.pool.accept_queue(id)),
                connections: pid.and_then(|pid| connections.get(&pid).copied()).unwrap_or(0),
                rss_kib,
                cpu_seconds: cpu.as_secs_f64(),
                age_seconds: process.map(|process| seconds(process.started)),
                status: id.and_then(|id| self.processes.get(&id)).and_then(|it| it.status.clone()),
            }
        };
        let is_ready =
            |view: &&View| view.serves && view.process.is_some_and(|process| process.state == State::Ready);
        let last_reload = self.fleet.last_reload().map(|last| LastReload {
            generation: last.generation,
            ok: last.result.is_ok(),
            reason: last.result.clone().err(),
            seconds_ago: seconds(last.ended),
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            name: self.control.as_ref().and_then(Control::name).map(ToString::to_string),
            state: self.fleet.activity().into(),
            generation: crew.generation(),
            slots: crew.slots() as u32,
            ready: views.iter().filter(is_ready).count() as u32,
            command: program.map(Program::words).unwrap_or_default(),
            addresses: crew.endpoints().into_iter().map(ToString::to_string).collect(),
            workers: views.iter().map(of_view).collect(),
            last_reload,
        }
    }

    /// How many connections each worker has, of those that came by its listeners.
    fn connections(&self, views: &[View]) -> BTreeMap<Pid, u32> {
        let workers = || {
            let processes = views.iter().filter_map(|view| view.process);
            processes.filter_map(|process| Some((process.worker, Pid::from_raw(process.pid?))))
        };
        let addresses = workers().flat_map(|(id, _)| self.fleet.crew().addresses(id));
        let ports: BTreeMap<(bool, u16), _> = addresses
            .map(|address| ((address.socket.is_ipv6(), address.socket.port()), address.socket))
            .collect();
        let mut owners: HashMap<u64, Pid> = HashMap::new();
        for (_, worker) in workers() {
            owners.extend(open_sockets::sockets_of_tree(worker).map(|inode| (inode, worker)));
        }
        let mut inodes: Vec<u64> = self.unix.connections();
        if let Ok(mut diag) = SockDiag::new() {
            for socket in ports.into_values() {
                let connections = diag.connections(socket).unwrap_or_default();
                inodes.extend(connections.iter().map(|connection| u64::from(connection.inode)));
            }
        }
        let mut counts = BTreeMap::new();
        for owner in inodes.iter().filter_map(|inode| owners.get(inode)) {
            *counts.entry(*owner).or_default() += 1;
        }
        counts
    }
}

fn program(words: Vec<String>) -> Result<Program, String> {
    let mut words = words.into_iter().map(OsString::from);
    let command = words.next().ok_or("the command to run has no words")?;
    Ok(Program { command, args: words.collect() })
}

fn rollout(how: How) -> Result<Rollout, String> {
    match how {
        How::Batch(most) => Rollout::batches(most),
        How::Canary { percent, seconds } => {
            let period = Duration::try_from_secs_f64(seconds)
                .map_err(|_| format!("{seconds} is not a number of seconds"))?;
            Rollout::canary(percent, period)
        }
    }
}

fn target(to: protocol::Target) -> Target {
    match to {
        protocol::Target::Exactly(workers) => Target::Exactly(workers),
        protocol::Target::More(workers) => Target::More(workers),
        protocol::Target::Fewer(workers) => Target::Fewer(workers),
    }
}

fn failed(why: String) -> Reply {
    Reply::Failed(why, Vec::new())
}

impl From<State> for WorkerState {
    fn from(state: State) -> Self {
        match state {
            State::Starting => Self::Starting,
            State::Ready => Self::Ready,
            State::Draining => Self::Draining,
            State::Stopping => Self::Stopping,
            State::Killed => Self::Killed,
        }
    }
}

impl From<Activity> for status::State {
    fn from(activity: Activity) -> Self {
        match activity {
            Activity::Starting => Self::Starting,
            Activity::Serving => Self::Serving,
            Activity::Reloading => Self::Reloading,
            Activity::Abandoning => Self::Abandoning,
            Activity::Scaling => Self::Scaling,
            Activity::Recycling => Self::Recycling,
            Activity::Stopping => Self::Stopping,
        }
    }
}

impl From<Load> for WorkerLoad {
    fn from(load: Load) -> Self {
        match load {
            Load::Free => Self::Free,
            Load::Busy => Self::Busy,
            Load::Stuck => Self::Stuck,
        }
    }
}

#[cfg(test)]
mod tests {
    mod fuzz {
        use proptest::prelude::*;

        use super::super::*;
        use crate::fleet::policy::{MAX_DURATION, MAX_WORKERS};

        proptest! {
            #[test]
            fn a_rollout_is_within_its_limits_or_is_refused(most: u32, percent: f64, seconds: f64) {
                prop_assert_eq!(rollout(How::Batch(most)).is_ok(), most > 0);
                if let Ok(Rollout::Canary { period, .. }) = rollout(How::Canary { percent, seconds }) {
                    prop_assert!((0.0..100.0).contains(&percent) && period <= MAX_DURATION);
                }
            }

            #[test]
            fn a_number_of_workers_is_within_its_limits_or_is_refused(number: u32, now in 1..=MAX_WORKERS) {
                use crate::operate::protocol::Target::{Exactly, Fewer, More};
                for to in [Exactly(number), More(number), Fewer(number)] {
                    let workers = target(to).workers(now);
                    prop_assert!(workers.is_err() || workers.is_ok_and(|it| (1..=MAX_WORKERS).contains(&it)));
                }
            }
        }
    }
}
