//! What happens in the child between fork(2) and execve(2), and how the wrapper hears about it.

use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::resource::{Resource, rlim_t, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use nix::unistd::{Pid, getppid};

use crate::intercept;
use crate::kernel::sys;
use crate::worker::fds::FIRST_FD;

/// Turns the child into a worker-to-be.
pub struct Preparation {
    pub wrapper: Pid,
    pub variables: Vec<(OsString, OsString)>,
    pub listeners: Vec<OwnedFd>,
    pub ready: OwnedFd,
    pub node: Option<OwnedFd>,
    /// The child's end of the [`ReportSocket`].
    pub report: OwnedFd,
    pub intercept: bool,
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
}

impl Step {
    const ALL: [Self; 5] = [Self::Limits, Self::Signals, Self::ParentDeath, Self::Fds, Self::Filter];

    /// The error of the step, without its cause.
    pub fn failure(self) -> &'static str {
        match self {
            Self::Limits => "can't set its limit of open files",
            Self::Signals => "can't reset its signals",
            Self::ParentDeath => "can't have the kernel kill it when reuse-run dies",
            Self::Fds => "can't set its environment and file descriptors",
            Self::Filter => "can't intercept its bind and listen (see docs/limits.md)",
        }
    }
}

/// What the child sends, with the filter's fd if it has one, after the last step.
const PREPARED: u8 = u8::MAX;

impl Preparation {
    /// Takes all steps and reports: the filter's fd, or the number of the step that failed.
    ///
    /// # Errors
    /// The error of that step.
    pub fn run(&self) -> io::Result<()> {
        let mut step = Step::Limits;
        let notify_fd = self.take_steps(&mut step).inspect_err(|_| {
            let _ = self.send(step as u8, &[]);
        })?;
        let fds: Vec<RawFd> = notify_fd.iter().map(AsRawFd::as_raw_fd).collect();
        self.send(PREPARED, &fds)
    }

    fn send(&self, byte: u8, fds: &[RawFd]) -> io::Result<()> {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let bytes = [byte];
        sendmsg::<()>(self.report.as_raw_fd(), &[IoSlice::new(&bytes)], rights, MsgFlags::empty(), None)?;
        Ok(())
    }

    fn take_steps(&self, step: &mut Step) -> io::Result<Option<OwnedFd>> {
        let (soft, hard) = self.open_files;
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;

        // A shell without job control starts background processes with SIGINT and SIGQUIT ignored. Go and
        // Python keep that and would never see the stop signal.
        *step = Step::Signals;
        SigSet::empty().thread_set_mask()?;
        for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, self.stop_signal] {
            // The disposition of SIGKILL can't be set (sigaction(2)).
            if signal != Signal::SIGKILL {
                sys::signal_default(signal)?;
            }
        }
        // Workers are in background process groups: after `stty tostop` their terminal would stop them at their first line.
        // An ignored SIGTTOU wouldn't help, because Node resets it. What has no controlling terminal may always write.
        [libc::STDOUT_FILENO, libc::STDERR_FILENO].into_iter().for_each(sys::give_up_terminal);

        // The kernel sends this signal when the parent dies, but not if it died before the call
        // (PR_SET_PDEATHSIG(2const)).
        *step = Step::ParentDeath;
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() != self.wrapper {
            return Err(Errno::ESRCH.into());
        }

        *step = Step::Fds;
        self.set_environment()?;
        let fds = self.listeners.iter().chain([&self.ready]).chain(&self.node);
        (FIRST_FD..).zip(fds).try_for_each(|(number, fd)| sys::dup2_for_exec(fd.as_fd(), number))?;

        *step = Step::Filter;
        Ok(self.intercept.then(intercept::install).transpose()?.map(|(notify_fd, _)| notify_fd))
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
        for (name, value) in &self.variables {
            sys::setenv(name, value)?;
        }
        if !self.listeners.is_empty() {
            sys::setenv("LISTEN_PID".as_ref(), std::process::id().to_string().as_ref())?;
        }
        Ok(())
    }
}

/// Why the child didn't reach execve(2).
#[derive(Debug)]
pub enum NotPrepared {
    Failed(Step),
    /// It reported nothing.
    Silent,
}

/// The wrapper's end of the socket on which the child reports.
pub struct ReportSocket(OwnedFd);

impl ReportSocket {
    /// A socket, and the child's end of it.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, its) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(ours), its))
    }

    /// The filter's fd, if the child has one. Call it after the child has executed the command or failed: it
    /// has reported by then, or never will.
    pub fn receive(&self) -> Result<Option<OwnedFd>, NotPrepared> {
        let mut byte = [0];
        let mut space = nix::cmsg_space!(RawFd);
        let mut buffers = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(self.0.as_raw_fd(), &mut buffers, Some(&mut space), flags);
        let received = received.map_err(|_| NotPrepared::Silent)?;
        let rights = received.cmsgs().map_err(|_| NotPrepared::Silent)?.find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        match (rights, byte[0]) {
            (Some(fd), _) => Ok(Some(sys::owned_fd(fd))),
            (None, PREPARED) => Ok(None),
            (None, step) => {
                let step = Step::ALL.get(usize::from(step));
                Err(step.map_or(NotPrepared::Silent, |step| NotPrepared::Failed(*step)))
            }
        }
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
            variables: Vec::new(),
            listeners: Vec::new(),
            ready: fd(),
            node: None,
            report: fd(),
            intercept: true,
            stop_signal: Signal::SIGTERM,
            open_files: (0, 0),
        };
        assert!(matches!(socket.receive(), Err(NotPrepared::Silent)));
        preparation.send(Step::ParentDeath as u8, &[]).unwrap();
        assert!(matches!(socket.receive(), Err(NotPrepared::Failed(Step::ParentDeath))));
        preparation.send(PREPARED, &[]).unwrap();
        assert!(matches!(socket.receive(), Ok(None)));
        preparation.send(PREPARED, &[report.as_raw_fd()]).unwrap();
        assert!(matches!(socket.receive(), Ok(Some(_))));
    }
}
