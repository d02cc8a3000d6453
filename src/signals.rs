//! The signals that the wrapper gets, through signal-hook's pipe.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM, SIGUSR2};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Some process has ended.
    Reap,
    Reload,
    Stop {
        signal: &'static str,
    },
}

/// Signals that arrived and have not been looked at. Several of one kind count as one, as with the kernel.
#[derive(Debug)]
pub struct Signals(SignalDelivery<UnixStream, SignalOnly>);

impl Signals {
    /// Begins to receive, in place of the signals' former dispositions, an inherited "ignore" included.
    pub fn new() -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        let signals = [SIGCHLD, SIGINT, SIGTERM, SIGUSR2];
        Ok(Self(SignalDelivery::with_pipe(read, write, SignalOnly, signals)?))
    }

    /// What was asked for since the last call. Never blocks. The pipe is emptied before the signals are
    /// looked at, so that one that arrives in between is told of by a byte in the pipe.
    pub fn pending(&mut self) -> Vec<Asked> {
        let meaning = |signal| match signal {
            SIGCHLD => Some(Asked::Reap),
            SIGUSR2 => Some(Asked::Reload),
            SIGINT => Some(Asked::Stop { signal: "SIGINT" }),
            SIGTERM => Some(Asked::Stop { signal: "SIGTERM" }),
            _ => None,
        };
        self.0.pending().filter_map(meaning).collect()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_read().as_fd()
    }
}
