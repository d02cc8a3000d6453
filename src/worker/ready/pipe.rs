//! READY_FD: a pipe that the worker writes to when it is ready.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd;

use crate::worker::ready::Message;

/// The end that the wrapper reads.
#[derive(Debug)]
pub struct ReadyPipe(OwnedFd);

impl ReadyPipe {
    /// A pipe, and the worker's end of it. Both are close-on-exec.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self(read), write))
    }

    /// Any byte means ready. Several that are read at once count as one.
    pub fn read(&self) -> Vec<Message> {
        match unistd::read(&self.0, &mut [0; 512]) {
            Ok(0) => vec![Message::Closed],
            Ok(_) => vec![Message::Ready],
            Err(_) => Vec::new(),
        }
    }
}

impl AsFd for ReadyPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_byte_means_ready_and_an_end_of_file_does_not() {
        let (pipe, worker) = ReadyPipe::new().unwrap();
        assert_eq!(pipe.read(), []);
        unistd::write(&worker, b"\n").unwrap();
        assert_eq!(pipe.read(), [Message::Ready]);
        assert_eq!(pipe.read(), []);
        drop(worker);
        assert_eq!(pipe.read(), [Message::Closed]);
    }
}
