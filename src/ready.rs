//! The ways a worker says that it is ready: for now, a byte on a pipe.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::unistd;

/// The reading end of the pipe whose other end a worker has as READY_FD.
#[derive(Debug)]
pub struct ReadyPipe(OwnedFd);

/// What reading a [`ReadyPipe`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    Nothing,
    Ready,
    /// The worker has closed its end; there is no more to come.
    Closed,
}

impl ReadyPipe {
    /// A pipe, and the end that is for the worker. Both are close-on-exec.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = unistd::pipe2(OFlag::O_CLOEXEC)?;
        nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self(read), write))
    }

    /// Never blocks. Any byte means ready; what else is written at once goes with it.
    pub fn read(&self) -> Said {
        let mut bytes = [0; 512];
        match unistd::read(&self.0, &mut bytes) {
            Ok(0) => Said::Closed,
            Ok(_) => Said::Ready,
            Err(_) => Said::Nothing,
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
        assert_eq!(pipe.read(), Said::Nothing);
        unistd::write(&worker, b"\n").unwrap();
        assert_eq!(pipe.read(), Said::Ready);
        assert_eq!(pipe.read(), Said::Nothing);
        drop(worker);
        assert_eq!(pipe.read(), Said::Closed);
    }
}
