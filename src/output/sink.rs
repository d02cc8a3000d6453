//! stdout and stderr. A write never makes reuse-run wait, even if the reader is slow, stopped or gone.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use nix::unistd::{read, write};

use crate::kernel::helper::Helper;

/// One of the two streams that a program writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub const ALL: [Self; 2] = [Self::Stdout, Self::Stderr];

    fn path(self) -> &'static str {
        match self {
            Self::Stdout => "/proc/self/fd/1",
            Self::Stderr => "/proc/self/fd/2",
        }
    }
}

/// Whether stdout and stderr of this process are the same file, as after `2>&1` and on a terminal.
pub fn is_one_file() -> bool {
    let id = |stream: Stream| std::fs::metadata(stream.path()).map(|file| (file.dev(), file.ino())).ok();
    id(Stream::Stdout).is_some_and(|stdout| Some(stdout) == id(Stream::Stderr))
}

/// The file behind stdout or stderr.
#[derive(Debug)]
pub struct Sink {
    file: File,
    mode: WriteMode,
    /// Writes what is sent to the socket `file`.
    writer: Option<Helper>,
}

/// How a write to a file is kept from waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriteMode {
    /// A pipe or a terminal, opened again with O_NONBLOCK. The inherited file description is shared with other processes:
    /// setting O_NONBLOCK there would change it for them too.
    NonBlocking,
    /// A socket: MSG_DONTWAIT holds for a single call. If a pipe or a terminal can't be opened again, because it belongs to
    /// another user, another process writes to it, and this is the way to that. (When poll(2) reports a terminal as
    /// writable, there may be room for one byte. A pipe has room for PIPE_BUF bytes, until a worker writes to it.)
    Socket,
    /// A regular file never makes a writer wait. (Opened again it would have its own offset.)
    Plain,
}

impl Sink {
    pub fn new(stream: Stream) -> io::Result<Self> {
        let inherited = || match stream {
            Stream::Stdout => io::stdout().as_fd().try_clone_to_owned(),
            Stream::Stderr => io::stderr().as_fd().try_clone_to_owned(),
        };
        let mode = match std::fs::metadata(stream.path()).map(|metadata| metadata.file_type()) {
            Ok(kind) if kind.is_socket() => WriteMode::Socket,
            Ok(kind) if !kind.is_fifo() && !kind.is_char_device() => WriteMode::Plain,
            Ok(_) => {
                let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
                match OpenOptions::new().write(true).custom_flags(flags).open(stream.path()) {
                    Ok(file) => return Ok(Self { file, mode: WriteMode::NonBlocking, writer: None }),
                    Err(_) => return Self::through_process(inherited()?),
                }
            }
            Err(_) => return Self::through_process(inherited()?), // /proc is not readable
        };
        Ok(Self { file: inherited()?.into(), mode, writer: None })
    }

    fn through_process(file: OwnedFd) -> io::Result<Self> {
        let (ours, its) = UnixStream::pair()?;
        let writer = Helper::start(c"reuse-run-write", vec![its.into(), file], |fds| {
            let _ = write_all_that_comes(&fds[0], &fds[1]);
        })?;
        Ok(Self { file: OwnedFd::from(ours).into(), mode: WriteMode::Socket, writer: Some(writer) })
    }

    /// Writes as much as there is room for, and returns the number of bytes.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room now; after any other error nothing can be written any more.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.mode {
            // After `stty tostop` a terminal sends SIGTTOU to a background process that writes, unless it blocks the signal
            // (`__tty_check_change`, drivers/tty/tty_jobctrl.c).
            WriteMode::NonBlocking => {
                let before = SigSet::from(Signal::SIGTTOU).thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
                let written = (&self.file).write(bytes);
                before.thread_set_mask()?;
                written
            }
            WriteMode::Plain => (&self.file).write(bytes),
            WriteMode::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(send(self.file.as_raw_fd(), bytes, flags)?)
            }
        }
    }

    /// Waits until all is written that was sent to another process, at most until `until`. Nothing can be written then.
    pub fn finish(&mut self, until: Instant) {
        if let Some(writer) = self.writer.take() {
            let _ = shutdown(self.file.as_raw_fd(), Shutdown::Write);
            writer.wait_end(until);
        }
    }
}

/// The life of the process that may wait. No signal reaches it, so that none makes a write start over.
fn write_all_that_comes(socket: &OwnedFd, file: &OwnedFd) -> nix::Result<()> {
    let mut bytes = [0; 4096];
    loop {
        let count = read(socket, &mut bytes)?;
        let mut rest = &bytes[..count];
        if rest.is_empty() {
            return Ok(());
        }
        while !rest.is_empty() {
            match write(file, rest) {
                Ok(written) => rest = &rest[written..],
                // Another process has made its file description non-blocking.
                Err(Errno::EAGAIN) => {
                    poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// A sink with a queue for lines that the reader isn't ready for, so that no line is lost or cut.
#[derive(Debug)]
pub struct Output {
    sink: Sink,
    queue: VecDeque<u8>,
    /// Whether the last write ended within a line.
    is_within_line: bool,
    /// Whether the sink is in the epoll.
    is_watched: bool,
}

/// In bytes: with more in its queue an output is full for the workers' lines.
const MAX_QUEUE: usize = 256 * 1024;

/// In bytes: with more in its queue an output is full for the log too. The log gets more room than the workers, because
/// they can wait, but a line of the log would be lost.
const MAX_QUEUE_FOR_LOG: usize = 1024 * 1024;

impl Output {
    pub fn new(stream: Stream) -> io::Result<Self> {
        Ok(Self::to(Sink::new(stream)?))
    }

    fn to(sink: Sink) -> Self {
        Self { sink, queue: VecDeque::new(), is_within_line: false, is_watched: false }
    }

    /// An output to a pipe whose writing end is non-blocking.
    #[cfg(test)]
    pub fn to_pipe(end: std::os::fd::OwnedFd) -> Self {
        Self::to(Sink { file: end.into(), mode: WriteMode::NonBlocking, writer: None })
    }

    pub fn is_full(&self) -> bool {
        self.queue.len() >= MAX_QUEUE
    }

    /// Whether it is far from full.
    pub fn has_much_room(&self) -> bool {
        self.queue.len() < MAX_QUEUE / 2
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Appends a line to the queue, given in parts, newline included. The next flush writes it, or a later one.
    pub fn push(&mut self, line: &[&[u8]]) {
        if self.queue.is_empty() && self.is_within_line {
            self.queue.push_back(b'\n'); // the rest of the line was dropped: end it
        }
        line.iter().for_each(|part| self.queue.extend(*part));
    }

    /// Takes a line of the log, and writes it at once if there is room.
    ///
    /// # Errors
    /// `WouldBlock` if the queue is full for the log too.
    pub fn log(&mut self, line: &[u8]) -> io::Result<()> {
        if self.queue.len() + line.len() > MAX_QUEUE_FOR_LOG {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.push(&[line]);
        self.flush();
        Ok(())
    }

    /// Writes as much as there is room for. If the reader is gone, or the disk is full, the queue is dropped.
    pub fn flush(&mut self) {
        while !self.queue.is_empty() {
            match self.sink.write(self.queue.as_slices().0) {
                Ok(written @ 1..) => {
                    self.is_within_line = self.queue[written - 1] != b'\n';
                    self.queue.drain(..written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(0) | Err(_) => self.queue.clear(),
            }
        }
        self.queue.shrink_to(MAX_QUEUE);
    }

    /// See [`Sink::finish`].
    pub fn finish(&mut self, until: Instant) {
        self.sink.finish(until);
    }

    /// Adds the sink to `epoll` while something waits for room, and removes it afterwards: epoll(7) reports a pipe without
    /// a reader (EPOLLERR) all the time.
    pub fn watch(&mut self, epoll: &Epoll, token: u64) {
        let wanted = !self.queue.is_empty();
        if wanted && !self.is_watched {
            match epoll.add(&self.sink.file, EpollEvent::new(EpollFlags::EPOLLOUT, token)) {
                Ok(()) => self.is_watched = true,
                Err(_) => self.queue.clear(), // it would never be flushed
            }
        } else if !wanted && self.is_watched {
            self.is_watched = epoll.delete(&self.sink.file).is_err();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;

    fn pipe() -> (File, Output) {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        (reader.into(), Output::to_pipe(writer))
    }

    #[test]
    fn lines_wait_for_a_slow_reader_and_stay_in_order() {
        let (mut reader, mut output) = pipe();
        let mut expected = Vec::new();
        for number in 0.. {
            let line = format!("line {number} of many\n");
            output.push(&[line.as_bytes()]);
            output.flush();
            expected.extend(line.into_bytes());
            if output.is_full() {
                break;
            }
        }
        output.log(b"the log\n").unwrap();
        expected.extend(b"the log\n");
        let (mut read, mut part) = (Vec::<u8>::new(), [0; 1000]);
        while let Ok(count) = reader.read(&mut part) {
            read.extend(&part[..count]);
            output.flush();
        }
        assert!(output.is_empty() && read == expected);
    }

    #[test]
    fn a_full_output_still_takes_some_lines_of_the_log() {
        let (_reader, mut output) = pipe();
        while !output.is_full() {
            output.push(&[&[b'x'; 1000], b"\n"]);
            output.flush();
        }
        let taken = (0..10_000).take_while(|_| output.log(&[b'x'; 1000]).is_ok()).count();
        assert!((700..800).contains(&taken), "{taken}");
    }

    #[test]
    fn the_queue_is_dropped_when_the_reader_is_gone() {
        let (reader, mut output) = pipe();
        drop(reader);
        output.push(&[b"line\n"]);
        output.flush();
        assert!(output.is_empty());
    }

    #[test]
    fn a_line_whose_second_half_was_dropped_is_ended_before_the_next() {
        let (mut reader, mut output) = pipe();
        output.push(&[b"half"]);
        output.flush();
        output.push(&[b"whole\n"]);
        output.flush();
        let mut read = [0; 100];
        let count = reader.read(&mut read).unwrap();
        assert_eq!(&read[..count], b"half\nwhole\n");
    }
}
