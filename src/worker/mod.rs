//! Starts workers, signals them, and finds out how they ended.

mod child;
pub mod environment;
mod fds;
mod program;
mod reading;
pub mod ready;
mod tether;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use libc::c_int;
use log::debug;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, setpgid};

use crate::address::Endpoint;
use crate::fleet::End;
use crate::ids::SlotId;
use crate::kernel::{helper, procfs, sys};
use crate::worker::child::{Preparation, Report, ReportSocket, Step};
use crate::worker::environment::{Environment, Given};
use crate::worker::ready::{Folder, NodeChannel, NotifySocket, ReadyPipe};
use crate::worker::tether::Tethers;

pub use fds::Listener;
pub use program::Program;
pub use reading::Reading;
pub use tether::Tether;

/// How workers are started and stopped, whatever they run.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub stop_signal: Signal,
    /// Whether workers that start Node get an IPC channel as from Node's `fork`.
    pub node_ipc: bool,
    /// Whether workers run behind the filter.
    pub intercept: bool,
    /// Whether they may share UDP ports.
    pub has_udp: bool,
}

/// A child that is about to execute its command.
#[derive(Debug)]
pub struct Starting {
    pub pid: Pid,
    pub ready: ReadyPipe,
    pub node: Option<NodeChannel>,
    pub notify: NotifySocket,
    /// `None` if it could not be made.
    pub tether: Option<Tether>,
    report: ReportSocket,
    command: OsString,
    /// What it waits for if it says nothing more.
    waits_for: String,
}

/// What a child has done.
#[derive(Debug)]
pub enum Progress {
    Nothing,
    /// It has the filter whose system calls are read from this fd, or none.
    Prepared(Option<OwnedFd>),
    Executed,
    Failed(StartError),
}

impl Starting {
    /// Call it when it is readable, or when the process has ended, until there is nothing more.
    pub fn advance(&mut self) -> Progress {
        match self.report.receive() {
            Report::Nothing => Progress::Nothing,
            Report::Prepared(notify_fd) => Progress::Prepared(notify_fd),
            Report::InDirectory => {
                self.waits_for = self.command.display().to_string();
                self.advance()
            }
            Report::Failed(Step::Execute, error) => Progress::Failed(not_executed(&self.command, &error)),
            Report::Failed(step, error) => Progress::Failed(StartError::new(step.failure(), &error)),
            Report::End => Progress::Executed,
        }
    }

    /// It has taken too long.
    pub fn late(&self) -> StartError {
        too_late(&self.waits_for)
    }
}

impl AsFd for Starting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.report.as_fd()
    }
}

/// So much time has a start until the command is executed, and the reading of an environment.
pub const START_TIMEOUT: Duration = Duration::from_secs(20);

/// What a start has waited for didn't come.
pub fn too_late(what: &str) -> StartError {
    StartError { why: format!("{what} could not be read within {START_TIMEOUT:?}"), status: 1 }
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
        let inherited = fds::take_inherited()?;
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

    /// Starts one worker in a process group of its own. It then prepares itself: see [`Starting::advance`].
    ///
    /// `output` is its stdout and stderr; without it the worker has those of this process.
    ///
    /// # Errors
    /// When there is no process or file descriptor left.
    pub fn start(
        &mut self,
        slot: SlotId,
        generation: u32,
        environment: &Environment,
        listeners: Vec<Listener>,
        output: Option<[OwnedFd; 2]>,
    ) -> Result<Starting, StartError> {
        let failed = |what: &'static str| move |error: io::Error| StartError::new(what, &error);
        let (ready, ready_end) = ReadyPipe::new().map_err(failed("can't make a pipe for READY_FD"))?;
        let node = self.settings.node_ipc && environment.may_start_node;
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
            program: environment.program.clone(),
            directory: environment.directory.clone(),
            output,
            variables,
            listeners: given.into_iter().map(|listener| listener.socket).collect(),
            ready: ready_end,
            node: node_end,
            report: report_end,
            intercept: self.settings.intercept,
            has_udp: self.settings.has_udp,
            stop_signal: self.settings.stop_signal,
            open_files: self.open_files,
        };
        sys::has_fds_in_reserve().map_err(failed("can't start a process"))?;
        let Some(pid) = sys::fork().map_err(failed("can't start a process"))? else { preparation.run() };
        helper::add(pid); // until it has become the program
        let _ = setpgid(pid, pid); // the child does the same: one of the two is first
        let tether = self
            .tethers
            .tie(pid)
            .inspect_err(|error| debug!("can't tie {pid} to this process: {error}"))
            .ok();
        let waits_for =
            environment.directory.as_ref().map(|directory| directory.physical.display().to_string());
        let (command, waits_for) = (environment.program.command.clone(), waits_for.unwrap_or_default());
        Ok(Starting { pid, ready, node, notify, tether, report, command, waits_for })
    }
}

fn not_executed(command: &OsStr, error: &io::Error) -> StartError {
    let command = command.display();
    if error.kind() == io::ErrorKind::NotFound {
        let hint = meant(&command.to_string()).map_or(String::new(), |hint| format!(" ({hint})"));
        let why = format!("{command}: command not found, or the interpreter that it names{hint}");
        StartError { why, status: 127 }
    } else {
        StartError { why: format!("can't execute {command}: {error}"), status: 126 }
    }
}

/// What to write instead of a command that other process managers have.
fn meant(command: &str) -> Option<&'static str> {
    Some(match command {
        "help" => "see reuse-run --help",
        "list" | "ls" | "ps" => "see reuse-run status",
        "logs" => "reuse-run logs to stderr, and so do its workers: see --label",
        "restart" => "see reuse-run reload",
        "start" => "write reuse-run -n 4 -- node app.js",
        _ => return None,
    })
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
/// is none. Kills the rest of its process group if `kills_group` says so.
pub fn reap(kills_group: impl FnOnce(Reaped) -> bool) -> Option<Change> {
    let ended = sys::waitid(None, libc::WEXITED | libc::WNOWAIT).ok()??;
    if ![libc::CLD_EXITED, libc::CLD_KILLED, libc::CLD_DUMPED].contains(&ended.code) {
        return Some(Change::Stopped);
    }
    let pid = Pid::from_raw(ended.pid);
    let end = match ended.code {
        libc::CLD_EXITED => End::Exited(ended.status),
        _ => End::Killed(ended.status), // CLD_KILLED or CLD_DUMPED
    };
    let reaped = Reaped { pid, end };
    // As long as the dead leader isn't reaped, its pid can't become another group's.
    if kills_group(reaped) {
        kill_group(pid);
    }
    sys::waitid(Some(ended.pid), libc::WEXITED).ok()??;
    Some(Change::Ended(reaped))
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
    freeze(pid).into_iter().for_each(|pid| signal(pid, libc::SIGKILL));
    kill_group(pid);
}

/// Stops a worker and its descendants, and returns them.
pub fn freeze(pid: Pid) -> BTreeSet<Pid> {
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
    found
}

/// Sends SIGKILL to the worker and to everything that it started and that stayed in its process group.
fn kill_group(pid: Pid) {
    let _ = killpg(pid, Signal::SIGKILL);
}
