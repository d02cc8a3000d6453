//! The signals that reuse-run receives, through signal-hook's pipe.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::signal::{SigSet, Signal};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::kernel::procfs;

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
    /// Forward it to the workers; it has no meaning for reuse-run itself.
    Forward(Signal),
}

/// SIGHUP reloads, as with gunicorn and systemd. Some container images are stopped by SIGQUIT. SIGTTIN and SIGTTOU add
/// and remove a worker, as with unicorn, gunicorn and puma. All other signals keep their default action: SIGTSTP, for
/// example, stops reuse-run alone, and SIGSEGV reports a fault of the receiver.
const MEANINGS: [(Signal, Meaning); 12] = [
    (Signal::SIGCHLD, Meaning::Reap),
    (Signal::SIGUSR2, Meaning::Reload),
    (Signal::SIGHUP, Meaning::Reload),
    (Signal::SIGTERM, Meaning::Stop(Signal::SIGTERM)),
    (Signal::SIGINT, Meaning::Stop(Signal::SIGINT)),
    (Signal::SIGQUIT, Meaning::Stop(Signal::SIGQUIT)),
    (Signal::SIGTTIN, Meaning::Scale { more: true }),
    (Signal::SIGTTOU, Meaning::Scale { more: false }),
    (Signal::SIGUSR1, Meaning::Forward(Signal::SIGUSR1)),
    (Signal::SIGWINCH, Meaning::Forward(Signal::SIGWINCH)),
    (Signal::SIGCONT, Meaning::Forward(Signal::SIGCONT)),
    (Signal::SIGALRM, Meaning::Forward(Signal::SIGALRM)),
];

/// Signals that have arrived. Several of one kind count as one, as in the kernel.
#[derive(Debug)]
pub struct Signals(SignalDelivery<UnixStream, SignalOnly>);

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
        let wanted = |signal: &Signal| *signal != Signal::SIGHUP || !procfs::ignores(Signal::SIGHUP);
        let signals = MEANINGS.iter().map(|(signal, _)| *signal).filter(wanted).map(|signal| signal as i32);
        Ok(Self(SignalDelivery::with_pipe(read, write, SignalOnly, signals)?))
    }

    /// What the signals since the last call mean. Never blocks. It empties the pipe before it checks the signals: a
    /// signal that arrives in between writes another byte, so it is not missed.
    pub fn pending(&mut self) -> Vec<Meaning> {
        let meaning = |number| MEANINGS.iter().find(|(signal, _)| *signal as i32 == number);
        self.0.pending().filter_map(meaning).map(|(_, meaning)| *meaning).collect()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_read().as_fd()
    }
}
