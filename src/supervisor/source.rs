//! What the poll loop waits for, as epoll's tokens.

use crate::ids::WorkerId;
use crate::operate::control::ClientId;

/// The file descriptor that an event of the poll loop comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Signals,
    Pool,
    /// A new control client.
    Control,
    Client(ClientId),
    /// The workers' output, or room for it on stdout and stderr.
    Labels,
    /// A system call that the filter stopped, or the end of the last process behind it.
    Filter(WorkerId),
    /// The environment of a generation, as it is read.
    Environment(u32),
    /// A child's report about its start.
    Start(WorkerId),
    /// What was read of workers.
    Reader,
    /// What was done with paths of Unix sockets.
    Paths,
    /// READY_FD's pipe.
    Pipe(WorkerId),
    /// Node's IPC channel.
    Node(WorkerId),
    /// The worker's NOTIFY_SOCKET.
    Notify(WorkerId),
    /// The connection on which the worker is sent a request.
    Probe(WorkerId),
}

impl Source {
    pub fn to_token(self) -> u64 {
        let token = |kind: u64, id: u32| kind << 32 | u64::from(id);
        match self {
            Self::Signals => token(0, 0),
            Self::Pool => token(1, 0),
            Self::Filter(WorkerId(id)) => token(2, id),
            Self::Pipe(WorkerId(id)) => token(3, id),
            Self::Node(WorkerId(id)) => token(4, id),
            Self::Notify(WorkerId(id)) => token(5, id),
            Self::Control => token(6, 0),
            Self::Client(ClientId(id)) => token(7, id),
            Self::Labels => token(8, 0),
            Self::Probe(WorkerId(id)) => token(9, id),
            Self::Reader => token(10, 0),
            Self::Paths => token(13, 0),
            Self::Environment(generation) => token(11, generation),
            Self::Start(WorkerId(id)) => token(12, id),
        }
    }

    pub fn from_token(token: u64) -> Self {
        let id = WorkerId(token as u32);
        match token >> 32 {
            0 => Self::Signals,
            1 => Self::Pool,
            2 => Self::Filter(id),
            3 => Self::Pipe(id),
            4 => Self::Node(id),
            5 => Self::Notify(id),
            6 => Self::Control,
            7 => Self::Client(ClientId(token as u32)),
            9 => Self::Probe(id),
            10 => Self::Reader,
            13 => Self::Paths,
            11 => Self::Environment(token as u32),
            12 => Self::Start(id),
            _ => Self::Labels,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_found_by_its_token() {
        let (worker, client) = (WorkerId(u32::MAX), ClientId(7));
        for source in [
            Source::Signals,
            Source::Pool,
            Source::Control,
            Source::Client(client),
            Source::Labels,
            Source::Filter(worker),
            Source::Reader,
            Source::Paths,
            Source::Environment(u32::MAX),
            Source::Start(worker),
            Source::Pipe(worker),
            Source::Node(worker),
            Source::Notify(worker),
            Source::Probe(worker),
        ] {
            assert_eq!(Source::from_token(source.to_token()), source);
        }
    }
}
