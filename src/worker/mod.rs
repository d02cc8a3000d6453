//! Starts a worker, signals it, and finds out how it ended.

pub mod environment;
pub mod ready;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use nix::unistd::{Pid, getppid};

use socket2::SockRef;

use crate::address::{Address, Endpoint};
use crate::fleet::End;
use crate::ids::SlotId;
use crate::intercept;
use crate::kernel::procfs;
use crate::kernel::sys;
use crate::worker::environment::Environment;
use crate::worker::ready::{NodeChannel, NotifySocket, ReadyPipe};

/// The number of the first listener that a worker is given (sd_listen_fds(3)). After the listeners come the
/// readiness pipe, with one digit as long as it can be, since that is all that `>&$READY_FD` takes in dash,
/// and Node's IPC channel.
const FIRST_FD: RawFd = 3;

/// What every worker is.
#[derive(Debug, Clone)]
pub struct Program {
    pub command: OsString,
    pub args: Vec<OsString>,
    pub stop_signal: Signal,
    /// Whether to give workers an IPC channel as Node's `fork` does.
    pub node_ipc: bool,
    /// Whether to start workers behind the filter.
    pub intercept: bool,
}

impl Program {
    /// Whether Node is what the command starts or may start, by its words and, if it is a script, its text.
    ///
    /// Other programs aren't given Node's channel: those that they start inherit the variable but perhaps not
    /// the fd, and a Node among those would die of that.
    fn leads_to_node(&self, environment: &Environment) -> bool {
        let names_node = |text: &[u8]| text.windows(4).any(|word| word == b"node");
        let mut words = [&self.command].into_iter().chain(&self.args);
        words.any(|word| names_node(word.as_bytes())) || names_node(&self.script(environment))
    }

    /// The text of the command, or its beginning, if that is a script.
    fn script(&self, environment: &Environment) -> Vec<u8> {
        const LONGEST: u64 = 64 * 1024;
        let command = Path::new(&self.command);
        let file = if command.components().count() > 1 {
            let directory =
                environment.directory.as_ref().map_or(Path::new(""), |directory| &directory.physical);
            Some(directory.join(command))
        } else {
            let set = environment.variables.iter().rev().find(|(name, _)| name == "PATH");
            let path = set.map_or_else(|| std::env::var_os("PATH"), |(_, path)| Some(path.clone()));
            let path = path.unwrap_or_default();
            std::env::split_paths(&path).map(|folder| folder.join(command)).find(|file| file.is_file())
        };
        let mut text = Vec::new();
        let read = file.map(|file| File::open(file)?.take(LONGEST).read_to_end(&mut text));
        if read.is_some_and(|read| read.is_ok()) && text.starts_with(b"#!") { text } else { Vec::new() }
    }
}

/// A worker that runs, or is about to.
#[derive(Debug)]
pub struct Started {
    pub pid: Pid,
    /// Tells of what its filter stops, if it has one.
    pub notify_fd: Option<OwnedFd>,
    pub ready: ReadyPipe,
    pub node: Option<NodeChannel>,
    pub notify: NotifySocket,
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

/// Starts workers, with all that has to be known for it from before the first.
#[derive(Debug)]
pub struct Starter {
    program: Program,
    /// The wrapper's own soft limit of open files before it was raised.
    open_files: (rlim_t, rlim_t),
    /// Listeners that this process was given itself, for every worker.
    inherited: Vec<Listener>,
    /// Keep the low fd numbers from being used: in the child they are the worker's.
    _placeholders: Vec<File>,
}

/// A listening socket for a worker, and the name that LISTEN_FDNAMES gives it.
#[derive(Debug)]
pub struct Listener {
    pub name: String,
    pub socket: OwnedFd,
}

impl Starter {
    /// Prepares this process to have workers, each of which is given so many listeners besides those that
    /// this process was started with: its own fds stay its own, and it may have as many as the hard limit
    /// allows. Call it before anything is opened that is to live on.
    pub fn new(program: Program, listeners: usize) -> io::Result<Self> {
        close_inherited_fds_on_exec()?;
        let inherited = inherited_listeners()?;
        // Orphans of the workers come to this process, which reaps them, also when it isn't PID 1.
        nix::sys::prctl::set_child_subreaper(true)?;
        let open_files = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, open_files.1, open_files.1)?;
        let (pipe, channel) = (1, 1);
        let last = FIRST_FD + (inherited.len() + listeners + pipe + channel) as RawFd - 1;
        Ok(Self { program, open_files, inherited, _placeholders: occupy_fds_up_to(last)? })
    }

    /// The listeners that this process was given, by inode number.
    pub fn inherited(&self) -> Vec<(u64, Endpoint)> {
        let of = |listener: &Listener| {
            let socket = SockRef::from(&listener.socket);
            let address = socket.local_addr().ok()?;
            let endpoint = match address.as_socket() {
                Some(socket_address) => {
                    let v6only = socket_address.is_ipv6() && socket.only_v6().unwrap_or(false);
                    Endpoint::Tcp(Address { socket: socket_address, v6only })
                }
                None => Endpoint::Unix(address.as_pathname()?.to_owned()),
            };
            Some((procfs::inode(listener.socket.as_fd()).ok()?, endpoint))
        };
        self.inherited.iter().filter_map(of).collect()
    }

    /// Starts one worker in a process group of its own, behind the filter.
    ///
    /// `output` is its stdout and stderr, which otherwise are this process's.
    ///
    /// # Errors
    /// Status 127 when the command isn't found, 126 when it can't be executed, 1 for all else.
    pub fn start(
        &self,
        slot: SlotId,
        generation: u32,
        environment: &Environment,
        listeners: Vec<Listener>,
        output: Option<[OwnedFd; 2]>,
    ) -> Result<Started, StartError> {
        let (ready, ready_end) = ReadyPipe::new().map_err(|e| StartError::new("no pipe for READY_FD", &e))?;
        let directory = environment.directory.as_ref();
        let node = self.program.node_ipc && self.program.leads_to_node(environment);
        let node = node.then(NodeChannel::new).transpose();
        let node = node.map_err(|e| StartError::new("no channel for NODE_CHANNEL_FD", &e))?;
        let (node, node_end) = node.unzip();
        let notify = NotifySocket::new().map_err(|e| StartError::new("no socket for NOTIFY_SOCKET", &e))?;
        let (ours, its) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|e| StartError::new("no socket to prepare it through", &e.into()))?;
        let mut command = Command::new(&self.program.command);
        command.args(&self.program.args).stdin(Stdio::null()).process_group(0);
        if let Some([stdout, stderr]) = output {
            command.stdout(stdout).stderr(stderr);
        }
        let mut variables = environment.variables.clone();
        if let Some(directory) = directory {
            command.current_dir(&directory.physical);
            variables.push(("PWD".into(), directory.name().into()));
        }
        let mut set = |name: &str, value: String| variables.push((name.into(), value.into()));
        let inherited = self.inherited.iter().map(|listener| {
            Ok(Listener { name: listener.name.clone(), socket: listener.socket.try_clone()? })
        });
        let mut given =
            inherited.collect::<io::Result<Vec<_>>>().map_err(|e| StartError::new("no listener", &e))?;
        given.extend(listeners);
        let ready_fd = FIRST_FD + given.len() as RawFd;
        set("READY_FD", ready_fd.to_string());
        set("NOTIFY_SOCKET", notify.name().to_owned());
        if node.is_some() {
            set("NODE_CHANNEL_FD", (ready_fd + 1).to_string());
            set("NODE_CHANNEL_SERIALIZATION_MODE", "json".to_owned());
        }
        if !given.is_empty() {
            let names: Vec<&str> = given.iter().map(|listener| listener.name.as_str()).collect();
            set("LISTEN_FDS", given.len().to_string());
            set("LISTEN_FDNAMES", names.join(":"));
        }
        set("REUSE_RUN_SLOT", slot.to_string());
        set("REUSE_RUN_GENERATION", generation.to_string());
        set("NODE_APP_INSTANCE", slot.to_string());
        let preparation = Preparation {
            wrapper: Pid::this(),
            variables,
            listeners: given.into_iter().map(|listener| listener.socket).collect(),
            ready: ready_end,
            node: node_end,
            report: its,
            intercept: self.program.intercept,
            stop_signal: self.program.stop_signal,
            open_files: self.open_files,
        };
        // What is set through `Command` would replace what the preparation sets, so it sets all.
        sys::before_exec(&mut command, move || preparation.run());
        // std reports a failure of the preparation and one of execve alike; but only after a preparation
        // that succeeded has the filter's fd arrived.
        let spawned = command.spawn();
        drop(command); // closes the worker's ends
        match (spawned, receive_notify_fd(&ours)) {
            (Ok(child), Ok(notify_fd)) => {
                // Reaped by waitpid with all others; a `Child` does nothing when it is dropped.
                Ok(Started { pid: Pid::from_raw(child.id() as i32), notify_fd, ready, node, notify })
            }
            (Err(error), Ok(_)) => Err(self.not_executed(&error)),
            (Err(error), Err(NotPrepared::Failed(step))) => Err(StartError::new(step.describe(), &error)),
            (Err(error), Err(NotPrepared::Silent)) => Err(StartError::new("can't start a process", &error)),
            (Ok(child), Err(_)) => {
                let _ = nix::sys::signal::kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
                let why = "its filter did not reach the wrapper".to_owned();
                Err(StartError { why, status: 1 })
            }
        }
    }

    fn not_executed(&self, error: &io::Error) -> StartError {
        let command = self.program.command.to_string_lossy();
        if error.kind() == io::ErrorKind::NotFound {
            let why = format!("{command}: command not found, or the interpreter that it names");
            StartError { why, status: 127 }
        } else {
            StartError { why: format!("can't execute {command}: {error}"), status: 126 }
        }
    }
}

/// What is done in the child before it becomes the worker.
struct Preparation {
    wrapper: Pid,
    variables: Vec<(OsString, OsString)>,
    listeners: Vec<OwnedFd>,
    ready: OwnedFd,
    node: Option<OwnedFd>,
    report: OwnedFd,
    intercept: bool,
    stop_signal: Signal,
    open_files: (rlim_t, rlim_t),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Limits,
    Signals,
    ParentDeath,
    Fds,
    Filter,
}

impl Step {
    const ALL: [Self; 5] = [Self::Limits, Self::Signals, Self::ParentDeath, Self::Fds, Self::Filter];

    fn describe(self) -> &'static str {
        match self {
            Self::Limits => "can't set its limit of open files",
            Self::Signals => "can't reset its signals",
            Self::ParentDeath => "can't tie its life to the wrapper's",
            Self::Fds => "can't give it its file descriptors",
            Self::Filter => "can't intercept its bind and listen (see \"Limits\" in the README)",
        }
    }
}

impl Preparation {
    /// Sends the filter's fd, or the number of the step that failed, and returns that error.
    fn run(&self) -> io::Result<()> {
        let mut step = Step::Limits;
        let notify_fd = self.take_steps(&mut step).inspect_err(|_| {
            let _ = sendmsg::<()>(
                self.report.as_raw_fd(),
                &[IoSlice::new(&[step as u8])],
                &[],
                MsgFlags::empty(),
                None,
            );
        })?;
        let fds: Vec<RawFd> = notify_fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights: Vec<ControlMessage> = notify_fd.iter().map(|_| ControlMessage::ScmRights(&fds)).collect();
        let byte = [IoSlice::new(&[PREPARED])];
        sendmsg::<()>(self.report.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None)?;
        Ok(())
    }

    fn take_steps(&self, step: &mut Step) -> io::Result<Option<OwnedFd>> {
        let (soft, hard) = self.open_files;
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
        // A shell without job control starts what it puts into the background with SIGINT and SIGQUIT
        // ignored. Go and Python keep that and would never see the stop signal.
        *step = Step::Signals;
        SigSet::empty().thread_set_mask()?;
        for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, self.stop_signal] {
            // That of SIGKILL can't be another (sigaction(2)).
            if signal != Signal::SIGKILL {
                sys::signal_default(signal)?;
            }
        }
        // The signal comes when the parent dies; the parent that died before this call is not noticed by
        // it (PR_SET_PDEATHSIG(2const)).
        *step = Step::ParentDeath;
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() != self.wrapper {
            return Err(Errno::ESRCH.into());
        }
        *step = Step::Fds;
        self.hand_over()?;
        *step = Step::Filter;
        Ok(self.intercept.then(intercept::install).transpose()?.map(|(notify_fd, _)| notify_fd))
    }

    /// Gives the worker its environment, and its fds their numbers.
    fn hand_over(&self) -> io::Result<()> {
        // What reuse-run itself was told by its supervisor is not meant for workers (sd_notify(3),
        // sd_listen_fds(3), sd_watchdog_enabled(3)).
        for name in [
            "LISTEN_FDS",
            "LISTEN_PID",
            "LISTEN_PIDFDID",
            "LISTEN_FDNAMES",
            "WATCHDOG_USEC",
            "WATCHDOG_PID",
            "NODE_CHANNEL_FD",
        ] {
            sys::unsetenv(name.as_ref())?;
        }
        for (name, value) in &self.variables {
            sys::setenv(name, value)?;
        }
        if !self.listeners.is_empty() {
            sys::setenv("LISTEN_PID".as_ref(), std::process::id().to_string().as_ref())?;
        }
        let fds = self.listeners.iter().chain([&self.ready]).chain(&self.node);
        (FIRST_FD..).zip(fds).try_for_each(|(number, fd)| sys::dup2_for_exec(fd.as_fd(), number))
    }
}

/// What the child sends, with the filter's fd if there is one, when all steps are taken.
const PREPARED: u8 = u8::MAX;

enum NotPrepared {
    Failed(Step),
    Silent,
}

/// What the child has sent; it has done so before it became the worker, or never will.
fn receive_notify_fd(report: &OwnedFd) -> Result<Option<OwnedFd>, NotPrepared> {
    let mut byte = [0];
    let mut space = nix::cmsg_space!(RawFd);
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(report.as_raw_fd(), &mut buffers, Some(&mut space), flags);
    let received = received.map_err(|_| NotPrepared::Silent)?;
    let rights = received.cmsgs().map_err(|_| NotPrepared::Silent)?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    match rights {
        Some(fd) => Ok(Some(sys::owned_fd(fd))),
        None if byte[0] == PREPARED => Ok(None),
        None => {
            Err(Step::ALL.get(usize::from(byte[0])).map_or(NotPrepared::Silent, |s| NotPrepared::Failed(*s)))
        }
    }
}

/// A process that has ended and been reaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reaped {
    pub pid: Pid,
    pub end: End,
}

/// Reaps one process that has ended, whether it was a worker or an orphan that this process inherited.
/// `None` when there is no more. What is left of its process group is killed if `leads_group` says so.
pub fn reap(leads_group: impl Fn(Pid) -> bool) -> Option<Reaped> {
    let ended = sys::waitid_ended(None, libc::WNOWAIT).ok()??;
    let pid = Pid::from_raw(ended.pid);
    // While the dead leader isn't reaped, its pid can't name another group than its own.
    if leads_group(pid) {
        kill_group(pid);
    }
    sys::waitid_ended(Some(ended.pid), 0).ok()??;
    let end = match ended.code {
        libc::CLD_EXITED => End::Exited(ended.status),
        _ => End::Killed(ended.status), // CLD_KILLED or CLD_DUMPED
    };
    Some(Reaped { pid, end })
}

/// Sends a signal to the worker alone: npm and shells forward it, and many programs quit hard at a second.
pub fn signal(pid: Pid, signal: Signal) {
    // It may be dead and not yet reaped, which is no error.
    let _ = nix::sys::signal::kill(pid, signal);
}

/// Sends SIGKILL to the worker and all that it started and that stayed in its process group.
pub fn kill_group(pid: Pid) {
    let _ = nix::sys::signal::killpg(pid, Signal::SIGKILL);
}

/// fds that this process was started with are not meant for its workers, the standard ones apart.
fn close_inherited_fds_on_exec() -> io::Result<()> {
    let missing = |error: io::Error| io::Error::new(error.kind(), format!("/proc is needed: {error}"));
    let open = std::fs::read_dir("/proc/self/fd").map_err(missing)?;
    let numbers: Vec<RawFd> = open.flatten().filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    numbers.into_iter().filter(|fd| *fd > 2).for_each(sys::set_close_on_exec);
    Ok(())
}

/// The listeners that this process was started with (sd_listen_fds(3)), moved out of the way of those that
/// workers are to have under the same numbers.
fn inherited_listeners() -> io::Result<Vec<Listener>> {
    const OUT_OF_THE_WAY: RawFd = 64;
    let for_us = std::env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    let count = std::env::var("LISTEN_FDS").ok().and_then(|count| count.parse::<u16>().ok());
    let count = count.filter(|_| for_us).unwrap_or(0);
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').filter(|name| !name.is_empty());
    let take = |number| {
        let fd = sys::owned_fd(number);
        let copy = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(OUT_OF_THE_WAY))?;
        let name = names.next().unwrap_or("unknown").to_owned();
        Ok(Listener { name, socket: sys::owned_fd(copy) })
    };
    (FIRST_FD..FIRST_FD + RawFd::from(count)).map(take).collect()
}

/// Fills every free fd number up to and including `last` with /dev/null, close-on-exec, so that no fd
/// that this process or std opens later is one of them.
fn occupy_fds_up_to(last: RawFd) -> io::Result<Vec<File>> {
    let mut placeholders = Vec::new();
    loop {
        let file = File::open("/dev/null")?;
        if file.as_raw_fd() > last {
            return Ok(placeholders);
        }
        placeholders.push(file);
    }
}
