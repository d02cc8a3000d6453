//! What happens in the child between fork(2) and execve(2), and how the wrapper hears about it.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::sys::resource::{Resource, rlim_t, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use nix::unistd::{Pid, chdir, execvp, getppid, setpgid};

use crate::intercept;
use crate::kernel::sys;
use crate::worker::Program;
use crate::worker::environment::{Directory, PREFIX};
use crate::worker::fds::FIRST_FD;

/// Turns the child into a worker.
pub struct Preparation {
    pub wrapper: Pid,
    pub program: Program,
    pub directory: Option<Directory>,
    /// stdout and stderr; `None`: those of the wrapper.
    pub output: Option<[OwnedFd; 2]>,
    pub variables: Vec<(OsString, OsString)>,
    pub listeners: Vec<OwnedFd>,
    pub ready: OwnedFd,
    pub node: Option<OwnedFd>,
    /// The child's end of the [`ReportSocket`].
    pub report: OwnedFd,
    pub intercept: bool,
    pub has_udp: bool,
    pub stop_signal: Signal,
    /// The soft and the hard limit.
    pub open_files: (rlim_t, rlim_t),
}

/// A step of the preparation, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Limits,
    Signals,
    ParentDeath,
    Fds,
    Filter,
    Directory,
    /// The only step that isn't over when it has succeeded: the child is the program then.
    Execute,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Limits,
        Self::Signals,
        Self::ParentDeath,
        Self::Fds,
        Self::Filter,
        Self::Directory,
        Self::Execute,
    ];

    /// The error of the step, without its cause.
    pub fn failure(self) -> &'static str {
        match self {
            Self::Limits => "can't set its limit of open files",
            Self::Signals => "can't reset its signals",
            Self::ParentDeath => "can't have the kernel kill it when reuse-run dies",
            Self::Fds => "can't set its environment and file descriptors",
            Self::Filter => "can't intercept its bind and listen (see docs/limits.md)",
            Self::Directory => "can't enter its directory",
            Self::Execute => "can't execute its command",
        }
    }
}

/// What the child sends, with the filter's fd if it has one, before the first step that concerns the file system.
const PREPARED: u8 = u8::MAX;
/// What it sends when it is in its directory.
const IN_DIRECTORY: u8 = u8::MAX - 1;

impl Preparation {
    /// Takes all steps. Reports the filter's fd, and then the step that failed and its error number, or nothing more.
    pub fn run(&self) -> ! {
        let mut step = Step::Limits;
        let Err(error) = self.take_steps(&mut step);
        let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
        let _ = self.send(&[&[step as u8], &errno.to_ne_bytes()[..]].concat(), &[]);
        sys::exit_now()
    }

    fn send(&self, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        sendmsg::<()>(self.report.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    fn take_steps(&self, step: &mut Step) -> io::Result<Infallible> {
        let (soft, hard) = self.open_files;
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;

        // A shell without job control starts background processes with SIGINT and SIGQUIT ignored. Go and
        // Python keep that and would never see the stop signal.
        *step = Step::Signals;
        SigSet::empty().thread_set_mask()?;
        for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGPIPE, self.stop_signal] {
            // The disposition of SIGKILL can't be set (sigaction(2)).
            if signal != Signal::SIGKILL {
                sys::signal_default(signal)?;
            }
        }

        // The kernel sends this signal when the parent dies, but not if it died before the call
        // (PR_SET_PDEATHSIG(2const)).
        *step = Step::ParentDeath;
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() != self.wrapper {
            return Err(Errno::ESRCH.into());
        }

        *step = Step::Fds;
        setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
        self.set_environment()?;
        self.take_fds()?;

        *step = Step::Filter;
        let notify_fd = self.intercept.then(|| intercept::install(self.has_udp)).transpose()?;
        let notify_fd = notify_fd.map(|(notify_fd, _)| notify_fd);
        let fds: Vec<RawFd> = notify_fd.iter().map(AsRawFd::as_raw_fd).collect();
        self.send(&[PREPARED], &fds)?;
        drop(notify_fd);

        // From here on the child may wait for a file system, and not even SIGKILL may end it. It has nothing open that isn't
        // the worker's.
        *step = Step::Directory;
        if let Some(directory) = &self.directory {
            chdir(&directory.physical)?;
            sys::setenv("PWD".as_ref(), directory.name().as_ref())?;
        }
        self.send(&[IN_DIRECTORY], &[])?;

        *step = Step::Execute;
        let word = |word: &OsString| Ok::<_, io::Error>(CString::new(word.as_bytes())?);
        let command = word(&self.program.command)?;
        let args = self.program.args.iter().map(word).collect::<Result<Vec<_>, _>>()?;
        let words: Vec<&CString> = [&command].into_iter().chain(&args).collect();
        Ok(execvp(&command, &words)?)
    }

    /// Puts the worker's fds under their numbers, and closes all others.
    fn take_fds(&self) -> io::Result<()> {
        let null = File::open("/dev/null")?;
        sys::dup2_for_exec(null.as_fd(), libc::STDIN_FILENO)?;
        for (number, fd) in (libc::STDOUT_FILENO..).zip(self.output.iter().flatten()) {
            sys::dup2_for_exec(fd.as_fd(), number)?;
        }
        // Workers are in background process groups: after `stty tostop` their terminal would stop them at their first line.
        // An ignored SIGTTOU wouldn't help, because Node resets it. What has no controlling terminal may always write.
        [libc::STDOUT_FILENO, libc::STDERR_FILENO].into_iter().for_each(sys::give_up_terminal);
        let fds: Vec<&OwnedFd> = self.listeners.iter().chain([&self.ready]).chain(&self.node).collect();
        let end = FIRST_FD + fds.len() as RawFd;
        (FIRST_FD..).zip(fds).try_for_each(|(number, fd)| sys::dup2_for_exec(fd.as_fd(), number))?;
        let kept: Vec<RawFd> = (0..end).chain([self.report.as_raw_fd()]).collect();
        std::mem::forget(null); // closed with the others
        sys::close_all_but(&kept);
        Ok(())
    }

    fn set_environment(&self) -> io::Result<()> {
        // What reuse-run's own supervisor told it is not for the workers (sd_notify(3), sd_listen_fds(3),
        // sd_watchdog_enabled(3)).
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
        // Nor is what reuse-run was told: a worker may be another reuse-run.
        let is_own = |name: &OsString| name.as_bytes().starts_with(PREFIX.as_bytes());
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_own(name)) {
            sys::unsetenv(&name)?;
        }
        for (name, value) in &self.variables {
            sys::setenv(name, value)?;
        }
        if !self.listeners.is_empty() {
            sys::setenv("LISTEN_PID".as_ref(), std::process::id().to_string().as_ref())?;
        }
        Ok(())
    }
}

/// What the child has reported.
#[derive(Debug)]
pub enum Report {
    Nothing,
    /// The filter's fd, if it has one.
    Prepared(Option<OwnedFd>),
    InDirectory,
    Failed(Step, io::Error),
    /// There will be no more: it is the program, or has ended.
    End,
}

/// The wrapper's end of the socket on which the child reports.
#[derive(Debug)]
pub struct ReportSocket(OwnedFd);

impl ReportSocket {
    /// A socket, and the child's end of it.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(ours), its))
    }

    pub fn receive(&self) -> Report {
        let mut bytes = [0; 5];
        let mut space = nix::cmsg_space!(RawFd);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let received = match recvmsg::<()>(self.0.as_raw_fd(), &mut buffers, Some(&mut space), flags) {
            Ok(received) if received.bytes > 0 => received,
            Err(Errno::EAGAIN) => return Report::Nothing,
            Ok(_) | Err(_) => return Report::End,
        };
        let rights = received.cmsgs().ok().and_then(|mut messages| {
            messages.find_map(|message| match message {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied().map(sys::owned_fd),
                _ => None,
            })
        });
        let [step, errno @ ..] = bytes;
        match (step, Step::ALL.get(usize::from(step))) {
            (PREPARED, _) => Report::Prepared(rights),
            (IN_DIRECTORY, _) => Report::InDirectory,
            (_, Some(step)) => Report::Failed(*step, io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
            (_, None) => Report::End,
        }
    }
}

impl AsFd for ReportSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_known_by_its_number() {
        for (number, step) in Step::ALL.into_iter().enumerate() {
            assert_eq!(step as usize, number);
        }
    }

    #[test]
    fn the_wrapper_hears_of_the_step_that_failed_or_gets_the_filters_fd() {
        let (socket, report) = ReportSocket::new().unwrap();
        let fd = || report.try_clone().unwrap();
        let preparation = Preparation {
            wrapper: Pid::this(),
            program: Program::default(),
            directory: None,
            output: None,
            variables: Vec::new(),
            listeners: Vec::new(),
            ready: fd(),
            node: None,
            report: fd(),
            intercept: true,
            has_udp: false,
            stop_signal: Signal::SIGTERM,
            open_files: (0, 0),
        };
        assert!(matches!(socket.receive(), Report::Nothing));
        preparation.send(&[PREPARED], &[]).unwrap();
        assert!(matches!(socket.receive(), Report::Prepared(None)));
        preparation.send(&[PREPARED], &[report.as_raw_fd()]).unwrap();
        assert!(matches!(socket.receive(), Report::Prepared(Some(_))));
        preparation.send(&[Step::ParentDeath as u8, 3, 0, 0, 0], &[]).unwrap();
        assert!(
            matches!(socket.receive(), Report::Failed(Step::ParentDeath, error) if error.raw_os_error() == Some(3))
        );
        drop((preparation, report));
        assert!(matches!(socket.receive(), Report::End));
    }
}
