//! What the log says about a worker at most once.

use std::collections::BTreeSet;
use std::io;

use log::{debug, warn};

use crate::ids::SlotId;
use crate::intercept::caller::Caller;
use crate::intercept::carry::NotReplaced;
use crate::kernel::sys::NotifResponse;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Complaint {
    /// It has changed its user, and reuse-run has no CAP_SYS_PTRACE.
    OtherUser,
    /// What its call refers to was not there in time.
    Hung,
    /// The kernel keeps its memory from other processes of the same user.
    Unreadable,
    /// It limits who may connect by what can't be set on a socket of the pool.
    LimitedSocket,
    /// It sets SO_BINDTODEVICE on a socket of the pool.
    LateDevice,
    /// It borrows as many sockets as it may.
    TooMany,
    /// It may not bind its port, and could without no_new_privs.
    LostCapability,
    /// It watches the socket that it binds, and can't be made to watch another one.
    Unwatched,
}

#[derive(Debug, Default)]
pub struct Complaints(BTreeSet<Complaint>);

impl Complaints {
    /// Makes the complaint if that is why a socket couldn't be lent.
    pub fn make_if_too_many(&mut self, slot: SlotId, error: &io::Error) {
        if error.raw_os_error().is_none() && error.kind() == io::ErrorKind::QuotaExceeded {
            self.make(slot, Complaint::TooMany);
        }
    }

    /// The answer to a bind whose socket could not take the place of the caller's own.
    pub fn answer_not_replaced(&mut self, caller: &Caller, why: NotReplaced) -> NotifResponse {
        let slot = caller.borrower.slot;
        match why {
            NotReplaced::Watched(error) if caller.still_waits() => {
                debug!("worker {slot} can't be traced: {error}");
                self.make(slot, Complaint::Unwatched);
                NotifResponse::Errno(libc::EPERM)
            }
            NotReplaced::Watched(error) | NotReplaced::Other(error) => {
                debug!("worker {slot} did not get its socket: {error}");
                NotifResponse::Continue
            }
        }
    }

    pub fn make(&mut self, slot: SlotId, complaint: Complaint) {
        if !self.0.insert(complaint) {
            return;
        }
        match complaint {
            Complaint::OtherUser => warn!(
                "worker {slot} runs as another user and reuse-run may not read its sockets, so it can't share them \
                 (start reuse-run as that user)"
            ),
            Complaint::Hung => warn!(
                "worker {slot} names a path, or memory of a file, that can't be reached in time, so reuse-run can't share its \
                 sockets (see whether a file system hangs)"
            ),
            Complaint::Unreadable => warn!(
                "worker {slot} can't be read by processes of its own user, so reuse-run can't share its sockets (make its \
                 program file readable, or start reuse-run as root)"
            ),
            Complaint::LimitedSocket => warn!(
                "worker {slot} limits who may connect to a socket in a way that reuse-run can't repeat, so the socket \
                 isn't shared (see docs/limits.md)"
            ),
            Complaint::LateDevice => {
                warn!("worker {slot} can't set SO_BINDTODEVICE after bind (set it before)");
            }
            Complaint::TooMany => {
                warn!(
                    "worker {slot} has more sockets bound than reuse-run can share: its other ports are its own"
                );
            }
            Complaint::Unwatched => warn!(
                "worker {slot} can't bind a socket that it watches by epoll already: reuse-run can't have it watched again \
                 (allow ptrace, or end the debugger)"
            ),
            Complaint::LostCapability => warn!(
                "worker {slot} may not bind its port: the capability of its program file doesn't count behind the filter \
                 (give reuse-run CAP_NET_BIND_SERVICE as an ambient capability)"
            ),
        }
    }
}
