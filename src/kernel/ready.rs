//! Whether files are ready. poll(2) says of a signal that has arrived instead of what it has seen, also if it doesn't wait.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What is so of a file now: of `events`, and POLLHUP and POLLERR. Nothing if it can't be known.
pub fn now(file: BorrowedFd, events: PollFlags) -> PollFlags {
    wait(&[file], events, Instant::now()).map_or(PollFlags::empty(), |seen| seen[0])
}

/// Waits until something of this is so of one of the files, at most until `until`, and returns what is so of each.
///
/// # Errors
/// Those of poll(2), except EINTR.
pub fn wait(files: &[BorrowedFd], events: PollFlags, until: Instant) -> nix::Result<Vec<PollFlags>> {
    let mut fds: Vec<PollFd> = files.iter().map(|file| PollFd::new(*file, events)).collect();
    loop {
        // Rounded up, so that it doesn't look again and again in the last millisecond.
        let left = until.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect()),
        }
    }
}
