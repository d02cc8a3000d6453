//! The signals that reuse-run receives, through signal-hook's pipe.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use libc::c_int;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Pid, getsid};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::WithRawSiginfo;

use crate::kernel::{procfs, sys};

/// What a signal asks reuse-run to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// A process has ended and has to be reaped.
    Reap,
    Reload,
    Stop(Signal),
    /// Add a worker, or remove one.
    Scale {
        more: bool,
    },
    /// Forward the signal with this number to the workers; it has no meaning for reuse-run itself.
    Forward(c_int),
}

/// SIGHUP reloads, as with gunicorn and systemd, unless it says that the terminal is gone. Some container images are stopped by SIGQUIT. SIGTTIN and SIGTTOU add
/// and remove a worker, as with unicorn, gunicorn and puma.
const MEANINGS: [(Signal, Meaning); 8] = [
    (Signal::SIGCHLD, Meaning::Reap),
    (Signal::SIGUSR2, Meaning::Reload),
    (Signal::SIGHUP, Meaning::Reload),
    (Signal::SIGTERM, Meaning::Stop(Signal::SIGTERM)),
    (Signal::SIGINT, Meaning::Stop(Signal::SIGINT)),
    (Signal::SIGQUIT, Meaning::Stop(Signal::SIGQUIT)),
    (Signal::SIGTTIN, Meaning::Scale { more: true }),
    (Signal::SIGTTOU, Meaning::Scale { more: false }),
];

/// The signals that are forwarded: those that would end reuse-run and are meant for a program, and SIGCONT. All others keep
/// their default action. SIGTSTP stops reuse-run alone, SIGSEGV reports a fault of the receiver, and SIGWINCH says that
/// reuse-run's terminal has another size, which Apache would take for a command to stop.
fn forwarded() -> impl Iterator<Item = c_int> {
    let named = [
        Signal::SIGUSR1,
        Signal::SIGCONT,
        Signal::SIGALRM,
        Signal::SIGVTALRM,
        Signal::SIGPROF,
        Signal::SIGSTKFLT,
        Signal::SIGIO,
        Signal::SIGPWR,
    ];
    named.into_iter().map(|signal| signal as c_int).chain(libc::SIGRTMIN()..=libc::SIGRTMAX())
}

/// Signals that have arrived. Several of one kind count as one, as in the kernel.
#[derive(Debug)]
pub struct Signals {
    delivery: SignalDelivery<UnixStream, WithRawSiginfo>,
    /// Whether there was a controlling terminal at the start.
    had_terminal: bool,
}

impl Signals {
    /// Installs the handlers. An inherited "ignore" is replaced too: shells without job control set it for what they
    /// start in the background. Only an ignored SIGHUP stays ignored: nohup(1) does that, so that the end of the
    /// terminal has no effect.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    pub fn new() -> io::Result<Self> {
        // The parent process may have blocked some.
        SigSet::empty().thread_set_mask()?;
        let (read, write) = UnixStream::pair()?;
        let wanted =
            |signal: &Signal| *signal != Signal::SIGHUP || !procfs::ignores(Pid::this(), Signal::SIGHUP);
        let signals = MEANINGS.iter().map(|(signal, _)| *signal).filter(wanted).map(|signal| signal as c_int);
        let signals = signals.chain(forwarded());
        let delivery = SignalDelivery::with_pipe(read, write, WithRawSiginfo, signals)?;
        Ok(Self { delivery, had_terminal: procfs::has_terminal() })
    }

    /// What the signals since the last call mean. Never blocks. It empties the pipe before it checks the signals: a
    /// signal that arrives in between writes another byte, so it is not missed.
    pub fn pending(&mut self) -> Vec<Meaning> {
        let mut meanings = Vec::new();
        for info in self.delivery.pending() {
            let own = MEANINGS.iter().find(|(signal, _)| *signal as c_int == info.si_signo);
            let meaning = match own {
                Some((Signal::SIGHUP, _)) if self.had_terminal && is_hang_up(sys::sender(&info)) => {
                    Meaning::Stop(Signal::SIGHUP)
                }
                Some((_, meaning)) => *meaning,
                None => Meaning::Forward(info.si_signo),
            };
            if !meanings.contains(&meaning) {
                meanings.push(meaning);
            }
        }
        meanings
    }
}

/// Whether a SIGHUP says that the terminal is gone: from the kernel, or passed on by the shell that leads the session.
fn is_hang_up(sender: Option<Pid>) -> bool {
    !procfs::has_terminal() && sender.is_none_or(|sender| getsid(None) == Ok(sender))
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.delivery.get_read().as_fd()
    }
}
