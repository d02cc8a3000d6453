//! Starts workers, signals them, and finds out how they ended.

mod child;
pub mod environment;
mod fds;
mod program;
pub mod ready;
mod tether;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::rc::Rc;

use libc::c_int;
use log::debug;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::address::Endpoint;
use crate::fleet::End;
use crate::ids::SlotId;
use crate::kernel::{procfs, sys};
use crate::worker::child::{NotPrepared, Preparation, ReportSocket};
use crate::worker::environment::{Environment, Given};
use crate::worker::ready::{Folder, NodeChannel, NotifySocket, ReadyPipe};
use crate::worker::tether::Tethers;

pub use fds::Listener;
pub use program::Program;
pub use tether::Tether;

/// How workers are started and stopped, whatever they run.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub stop_signal: Signal,
    /// Whether workers that start Node get an IPC channel as from Node's `fork`.
    pub node_ipc: bool,
    /// Whether workers run behind the filter.
    pub intercept: bool,
}

/// A worker that has executed its command.
#[derive(Debug)]
pub struct Started {
    pub pid: Pid,
    /// The fd from which the system calls are read that its filter stops, if it has one.
    pub notify_fd: Option<OwnedFd>,
    pub ready: ReadyPipe,
    pub node: Option<NodeChannel>,
    pub notify: NotifySocket,
    /// `None` if it could not be made.
    pub tether: Option<Tether>,
}

/// Why a worker could not be started, and the status that a shell would exit with.
#[derive(Debug)]
pub struct StartError {
    pub why: String,
    pub status: u8,
}

impl StartError {
    pub fn new(what: &str, error: &io::Error) -> Self {
        Self { why: format!("{what}: {error}"), status: 1 }
    }
}

/// Starts workers, and has what must be known before the first one starts.
#[derive(Debug)]
pub struct Starter {
    settings: Settings,
    /// The wrapper's own limits of open files (soft, hard) before it raised the soft one.
    open_files: (rlim_t, rlim_t),
    /// Listeners that this process was started with. Every worker gets them.
    inherited: Vec<Listener>,
    /// Where the NOTIFY_SOCKETs are, from the first one on.
    notify_folder: Option<Rc<Folder>>,
    tethers: Tethers,
    /// They keep the low fd numbers free: in the child these are the worker's.
    _placeholders: Vec<File>,
}

impl Starter {
    /// Prepares this process to have workers. Each gets `listeners` listeners besides those that this process
    /// was started with. This process keeps its own fds to itself, and may open as many as the hard limit
    /// allows. Call it before anything is opened that lives on.
    pub fn new(settings: Settings, listeners: usize) -> io::Result<Self> {
        fds::close_inherited_on_exec()?;
        let inherited = fds::inherited_listeners()?;
        // Orphans of the workers become children of this process, which reaps them, also if it isn't PID 1.
        nix::sys::prctl::set_child_subreaper(true)?;
        let open_files = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, open_files.1, open_files.1)?;
        let placeholders = fds::placeholders(inherited.len() + listeners)?;
        let tethers = Tethers::new()?;
        Ok(Self {
            settings,
            open_files,
            inherited,
            notify_folder: None,
            tethers,
            _placeholders: placeholders,
        })
    }

    /// The listeners that this process was started with, by inode number.
    pub fn inherited(&self) -> Vec<(u64, Endpoint)> {
        self.inherited.iter().filter_map(Listener::endpoint).collect()
    }

    /// Starts one worker in a process group of its own.
    ///
    /// `output` is its stdout and stderr; without it the worker has those of this process.
    ///
    /// # Errors
    /// Status 127 if the command isn't found, 126 if it can't be executed, 1 for everything else.
    pub fn start(
        &mut self,
        slot: SlotId,
        generation: u32,
        environment: &Environment,
        listeners: Vec<Listener>,
        output: Option<[OwnedFd; 2]>,
    ) -> Result<Started, StartError> {
        let failed = |what: &'static str| move |error: io::Error| StartError::new(what, &error);
        let (ready, ready_end) = ReadyPipe::new().map_err(failed("can't make a pipe for READY_FD"))?;
        let node = self.settings.node_ipc && environment.program.may_start_node(environment);
        let node = node.then(NodeChannel::new).transpose();
        let (node, node_end) = node.map_err(failed("can't make a channel for NODE_CHANNEL_FD"))?.unzip();
        let notify = NotifySocket::new(&mut self.notify_folder);
        let notify = notify.map_err(failed("can't make a socket for NOTIFY_SOCKET"))?;
        let (report, report_end) =
            ReportSocket::new().map_err(failed("can't make a socket to prepare it through"))?;
        let inherited = self.inherited.iter().map(Listener::try_clone).collect::<io::Result<Vec<_>>>();
        let mut given = inherited.map_err(failed("can't duplicate a listener"))?;
        given.extend(listeners);
        let names: Vec<&str> = given.iter().map(|listener| listener.name.as_str()).collect();
        let has_node_channel = node.is_some();
        let variables = environment.of_worker(&Given {
            slot,
            generation,
            listeners: &names,
            has_node_channel,
            notify_socket: notify.name(),
        });
        let preparation = Preparation {
            wrapper: Pid::this(),
            variables,
            listeners: given.into_iter().map(|listener| listener.socket).collect(),
            ready: ready_end,
            node: node_end,
            report: report_end,
            intercept: self.settings.intercept,
            stop_signal: self.settings.stop_signal,
            open_files: self.open_files,
        };
        sys::has_fds_in_reserve().map_err(failed("can't start a process"))?;
        let (pid, notify_fd) = self.execute(preparation, &report, environment, output)?;
        let tether = self
            .tethers
            .tie(pid)
            .inspect_err(|error| debug!("can't tie {pid} to this process: {error}"))
            .ok();
        Ok(Started { pid, notify_fd, ready, node, notify, tether })
    }

    /// Has a child prepare itself and execute the command. Returns its pid and the fd of its filter.
    fn execute(
        &self,
        preparation: Preparation,
        report: &ReportSocket,
        environment: &Environment,
        output: Option<[OwnedFd; 2]>,
    ) -> Result<(Pid, Option<OwnedFd>), StartError> {
        let mut command = Command::new(&environment.program.command);
        command.args(&environment.program.args).stdin(Stdio::null()).process_group(0);
        if let Some([stdout, stderr]) = output {
            command.stdout(stdout).stderr(stderr);
        }
        if let Some(directory) = &environment.directory {
            command.current_dir(&directory.physical);
        }
        // The preparation sets all variables: what `Command` sets would replace them.
        sys::before_exec(&mut command, move || preparation.run());
        let spawned = command.spawn();
        drop(command); // closes the worker's ends
        // std reports an error of the preparation and one of execve alike. But the report arrives only after
        // a preparation that succeeded.
        match (spawned, report.receive()) {
            // The child is reaped by `reap`, as all others; a `Child` does nothing when it is dropped.
            (Ok(child), Ok(notify_fd)) => Ok((Pid::from_raw(child.id() as i32), notify_fd)),
            (Err(error), Ok(_)) => Err(not_executed(&environment.program.command, &error)),
            (Err(error), Err(NotPrepared::Failed(step))) => Err(StartError::new(step.failure(), &error)),
            (Err(error), Err(NotPrepared::Silent)) => Err(StartError::new("can't start a process", &error)),
            (Ok(child), Err(_)) => {
                signal(Pid::from_raw(child.id() as i32), libc::SIGKILL);
                Err(StartError {
                    why: "reuse-run did not receive the fd of its filter".to_owned(),
                    status: 1,
                })
            }
        }
    }
}

fn not_executed(command: &OsStr, error: &io::Error) -> StartError {
    let command = command.display();
    if error.kind() == io::ErrorKind::NotFound {
        let why = format!("{command}: command not found, or the interpreter that it names");
        StartError { why, status: 127 }
    } else {
        StartError { why: format!("can't execute {command}: {error}"), status: 126 }
    }
}

/// A process that has ended and was reaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reaped {
    pub pid: Pid,
    pub end: End,
}

/// What waitid(2) reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Ended(Reaped),
    /// A thread that this process traces has stopped. Until its tracer has heard of that, it hides those that have ended.
    Stopped,
}

/// Reaps one process that has ended: a worker, or an orphan whose new parent is this process. `None` if there
/// is none. Kills the rest of its process group if `leads_group` says that it leads one.
pub fn reap(leads_group: impl Fn(Pid) -> bool) -> Option<Change> {
    let ended = sys::waitid_ended(None, libc::WNOWAIT).ok()??;
    if ![libc::CLD_EXITED, libc::CLD_KILLED, libc::CLD_DUMPED].contains(&ended.code) {
        return Some(Change::Stopped);
    }
    let pid = Pid::from_raw(ended.pid);
    // As long as the dead leader isn't reaped, its pid can't become another group's.
    if leads_group(pid) {
        kill_group(pid);
    }
    sys::waitid_ended(Some(ended.pid), 0).ok()??;
    let end = match ended.code {
        libc::CLD_EXITED => End::Exited(ended.status),
        _ => End::Killed(ended.status), // CLD_KILLED or CLD_DUMPED
    };
    Some(Change::Ended(Reaped { pid, end }))
}

/// Sends a signal to the worker's process alone: npm and shells forward it, and many programs quit at once
/// when they get a second one.
pub fn signal(pid: Pid, signal: c_int) {
    // It may be dead and not yet reaped, which is no error.
    let _ = sys::kill(pid.as_raw(), signal);
}

/// Sends SIGKILL to the worker, to its descendants also if they left its process group, and to everything that it started
/// and that stayed in its group. A daemon, which has left the group and whose parent has ended, is left alone.
pub fn kill_tree(pid: Pid) {
    const MAX_PASSES: usize = 16;
    let mut found = BTreeSet::new();
    for _ in 0..MAX_PASSES {
        let new: Vec<Pid> = procfs::tree(pid).into_iter().filter(|pid| found.insert(*pid)).collect();
        // A stopped process starts no other one meanwhile.
        new.iter().for_each(|pid| signal(*pid, libc::SIGSTOP));
        if new.is_empty() {
            break;
        }
    }
    found.into_iter().for_each(|pid| signal(pid, libc::SIGKILL));
    kill_group(pid);
}

/// Sends SIGKILL to the worker and to everything that it started and that stayed in its process group.
fn kill_group(pid: Pid) {
    let _ = killpg(pid, Signal::SIGKILL);
}
