//! The names that rooms call things by, in a room of their own: so nobody imports a whole room for an id.

use std::fmt;

use nix::unistd::Pid;

/// A worker, from its start to its end; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u32);

/// A place for one serving worker, from 0; its replacements have the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl SlotId {
    /// The slot with this index among all slots.
    pub fn of_index(index: usize) -> Self {
        Self(u32::try_from(index).unwrap_or(u32::MAX)) // there are at most 65,535
    }

    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A listening socket of the pool, for as long as the pool lives; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub u32);

/// The worker that borrows a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Borrower {
    pub worker: WorkerId,
    pub pid: Pid,
    pub slot: SlotId,
    pub generation: u32,
}

impl fmt::Display for Borrower {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "worker {} (pid {}, generation {})", self.slot, self.pid, self.generation)
    }
}
