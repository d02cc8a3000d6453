//! `bind` and `unlink` of a Unix socket's path: the worker shares its generation's socket.

use std::os::fd::AsFd;
use std::path::Path;

use log::debug;
use socket2::SockRef;

use crate::address::Endpoint;
use crate::intercept::Known;
use crate::intercept::caller::{Caller, OwnSocket};
use crate::intercept::carry::{NotReplaced, OwnDuplicate};
use crate::intercept::complaints::{Complaint, Complaints};
use crate::intercept::inherit;
use crate::intercept::reader::Found;
use crate::kernel::procfs;
use crate::kernel::sys::NotifResponse;
use crate::pool::paths::{self, Outcome, Removal, UnixSockets};

/// Binds the caller's socket to a path. What isn't a stream socket, or a path that wrapper and caller see
/// alike, is left to the kernel.
pub fn bind(
    caller: &Caller,
    own: OwnSocket,
    path: &Path,
    Known { bound, complaints, errands, .. }: &mut Known,
    unix: &mut UnixSockets,
) -> NotifResponse {
    let Caller { tid, borrower, .. } = *caller;
    if !is_stream(caller, own) || !caller.has_same_rights() {
        return NotifResponse::Continue;
    }
    let Some((_, place)) = caller.place(None, path) else { return NotifResponse::Continue };
    let (Ok(flags), Ok(mask)) = (procfs::fd_flags(tid, own.fd), procfs::umask(tid)) else {
        return NotifResponse::Continue;
    };
    if !caller.still_waits() {
        return NotifResponse::Continue;
    }
    let endpoint = Endpoint::Unix(place.path().to_owned());
    if bound.is_repetition(own.inode, &endpoint) {
        return NotifResponse::Success;
    }
    if unix.socket(own.inode).is_some() {
        return NotifResponse::Continue; // bound already: the kernel refuses it
    }
    let inode = match caller.path_outcome() {
        Some(Outcome::Failed(errno)) => return not_done(caller, errno, complaints),
        Some(Outcome::LeftToKernel) => return NotifResponse::Continue,
        Some(Outcome::Again | Outcome::Removed { .. }) | None => {
            unix.bind(&place, borrower, mask, caller.call())
        }
    };
    let inode = match inode {
        Ok(Some(inode)) => inode,
        Ok(None) => {
            caller.wait_for_path();
            return NotifResponse::Continue;
        }
        // An error without a number means that the wrapper can't do it. The kernel perhaps can.
        Err(error) => {
            complaints.make_if_too_many(borrower.slot, &error);
            return error.raw_os_error().map_or(NotifResponse::Continue, NotifResponse::Errno);
        }
    };
    let duplicate = match errands.duplicate(caller, own) {
        OwnDuplicate::Here(duplicate) => Some(duplicate),
        OwnDuplicate::Comes => return NotifResponse::Success, // which the caller never sees
        OwnDuplicate::Refused => None,
    };
    let Some(socket) = unix.socket(inode) else { return NotifResponse::Continue };
    // All workers of the generation share the options and this flag, as they share the socket.
    if let Some(duplicate) = &duplicate
        && let Err(error) = inherit::carry_over(duplicate.as_fd(), socket, false)
    {
        debug!("worker {}: {error}", borrower.slot);
    }
    let replaced = SockRef::from(&socket)
        .set_nonblocking(flags & libc::O_NONBLOCK != 0)
        .map_err(NotReplaced::Other)
        .and_then(|()| errands.replace(caller, own, socket.as_fd(), flags & libc::O_CLOEXEC != 0));
    match replaced {
        Ok(()) => {
            debug!("worker {} (pid {tid}) binds {endpoint}", borrower.slot);
            bound.insert(inode, endpoint, |other, endpoint| {
                matches!(endpoint, Endpoint::Port(_)) || unix.socket(other).is_some()
            });
            NotifResponse::Success
        }
        Err(error) => complaints.answer_not_replaced(caller, error),
    }
}

/// The answer when what the caller wanted could not be done. What was not done in time may still happen, and the caller is to
/// wait for it itself.
fn not_done(caller: &Caller, errno: i32, complaints: &mut Complaints) -> NotifResponse {
    if errno != libc::ETIMEDOUT {
        return NotifResponse::Errno(errno);
    }
    complaints.make(caller.borrower.slot, Complaint::Hung);
    NotifResponse::Continue
}

fn is_stream(caller: &Caller, own: OwnSocket) -> bool {
    match caller.protocol(own.fd).as_deref() {
        Ok("UNIX-STREAM") => true,
        // Before Linux 5.15 stream sockets had this name too.
        Ok("UNIX") => procfs::unix_sockets().iter().any(|row| row.inode == own.inode && row.is_stream),
        _ => false,
    }
}

/// Keeps the caller from removing a path that other workers serve. `from` and `path` are as in
/// [`Call::Unlink`](crate::intercept::filter::Call::Unlink). Returns the answer, and the path of the worker's
/// own socket if that was removed.
///
/// The wrapper also answers for the path of any other socket, such as one that an earlier run left, and for a
/// path that doesn't exist. If the kernel did it after the answer, another worker could bind the path in
/// between and lose it. For a worker that is ready, only names that are served are examined, since to examine
/// a file can take long.
pub fn unlink(
    caller: &Caller,
    from: Option<u32>,
    path: u64,
    is_starting: bool,
    complaints: &mut Complaints,
    unix: &mut UnixSockets,
) -> (NotifResponse, Option<Endpoint>) {
    const NOT_OURS: (NotifResponse, Option<Endpoint>) = (NotifResponse::Continue, None);
    // A path that was removed for this call is none of ours any more.
    let examines = is_starting || caller.path_outcome().is_some();
    if !examines && unix.is_empty() {
        return NOT_OURS;
    }
    let path = caller.memory(path, libc::PATH_MAX as u64).ok();
    let path = path.and_then(|bytes| paths::path_of_bytes(&bytes));
    let path = path.filter(|path| examines || unix.may_have(path));
    let Some((found, place)) = path.and_then(|path| caller.place(from, &path)) else {
        return NOT_OURS;
    };
    if !caller.has_same_rights() || !caller.still_waits() {
        return NOT_OURS;
    }
    match found {
        Found::Socket => {}
        // What getsockname(2) shows after a reload. The path stays until the generation has ended.
        Found::Nothing if unix.had_name(caller.borrower.worker, &place) => {
            return (NotifResponse::Success, None);
        }
        Found::Nothing => return (NotifResponse::Errno(libc::ENOENT), None),
        Found::Other => return NOT_OURS,
    }
    match caller.path_outcome() {
        Some(Outcome::Removed { was_its_own }) => {
            let endpoint = Endpoint::Unix(place.path().to_owned());
            return (NotifResponse::Success, Some(endpoint).filter(|_| was_its_own));
        }
        Some(Outcome::Failed(errno)) => return (not_done(caller, errno, complaints), None),
        Some(Outcome::Again | Outcome::LeftToKernel) | None => {}
    }
    match unix.remove(&place, caller.call()) {
        Removal::Kept => (NotifResponse::Success, None),
        Removal::Pending => {
            caller.wait_for_path();
            NOT_OURS
        }
    }
}
