//! The signals that the wrapper gets, through signal-hook's pipe.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::signal::{SigSet, Signal};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::kernel::procfs;

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Some process has ended.
    Reap,
    Reload,
    Stop(Signal),
    /// One worker more, or one less.
    Scale {
        more: bool,
    },
    /// It means nothing to the wrapper and is passed on to the workers.
    Forward(Signal),
}

/// SIGHUP reloads, as users of gunicorn and systemd expect. SIGQUIT is what some images of containers
/// are stopped with. SIGTTIN and SIGTTOU are one worker more and one less with unicorn, gunicorn and puma. Never
/// forwarded: those; SIGUSR2; SIGTSTP, which stops the wrapper alone; and what reports a fault of the receiver
/// itself.
const MEANINGS: [(Signal, Asked); 12] = [
    (Signal::SIGCHLD, Asked::Reap),
    (Signal::SIGUSR2, Asked::Reload),
    (Signal::SIGHUP, Asked::Reload),
    (Signal::SIGTERM, Asked::Stop(Signal::SIGTERM)),
    (Signal::SIGINT, Asked::Stop(Signal::SIGINT)),
    (Signal::SIGQUIT, Asked::Stop(Signal::SIGQUIT)),
    (Signal::SIGTTIN, Asked::Scale { more: true }),
    (Signal::SIGTTOU, Asked::Scale { more: false }),
    (Signal::SIGUSR1, Asked::Forward(Signal::SIGUSR1)),
    (Signal::SIGWINCH, Asked::Forward(Signal::SIGWINCH)),
    (Signal::SIGCONT, Asked::Forward(Signal::SIGCONT)),
    (Signal::SIGALRM, Asked::Forward(Signal::SIGALRM)),
];

/// Signals that arrived and have not been looked at. Several of one kind count as one, as with the kernel.
#[derive(Debug)]
pub struct Signals(SignalDelivery<UnixStream, SignalOnly>);

impl Signals {
    /// Begins to receive, in place of the signals' former dispositions. An inherited "ignore" is replaced
    /// too, since shells without job control set it on what they start in the background; but not that of
    /// SIGHUP, with which nohup(1) says that the end of the terminal is not meant.
    pub fn new() -> io::Result<Self> {
        // Who started this process may have left some blocked.
        SigSet::empty().thread_set_mask()?;
        let (read, write) = UnixStream::pair()?;
        let wanted = |signal: &Signal| *signal != Signal::SIGHUP || !procfs::ignores(Signal::SIGHUP);
        let signals = MEANINGS.iter().map(|(signal, _)| *signal).filter(wanted).map(|signal| signal as i32);
        Ok(Self(SignalDelivery::with_pipe(read, write, SignalOnly, signals)?))
    }

    /// What was asked for since the last call. Never blocks. The pipe is emptied before the signals are
    /// looked at, so that one that arrives in between is told of by a byte in the pipe.
    pub fn pending(&mut self) -> Vec<Asked> {
        let meaning = |number| MEANINGS.iter().find(|(signal, _)| *signal as i32 == number);
        self.0.pending().filter_map(|number| meaning(number).map(|(_, asked)| *asked)).collect()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_read().as_fd()
    }
}
