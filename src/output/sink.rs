//! stdout and stderr. Whatever becomes of them, writing to them never makes the wrapper wait.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, send};

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

/// Whether this process's stdout and stderr are one file, as after `2>&1` and on a terminal.
pub fn is_one_file() -> bool {
    let id = |stream: Stream| std::fs::metadata(stream.path()).map(|file| (file.dev(), file.ino())).ok();
    id(Stream::Stdout).is_some_and(|stdout| Some(stdout) == id(Stream::Stderr))
}

/// Where a stream of this process goes.
#[derive(Debug)]
pub struct Sink {
    file: File,
    way: Way,
}

/// How not to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A pipe or a terminal, opened anew and non-blocking. To set O_NONBLOCK on what this process was given
    /// would set it for whoever else has the same pipe or terminal too.
    NonBlocking,
    /// MSG_DONTWAIT does it for a single call.
    Socket,
    /// A regular file never makes a writer wait, and opened anew it would have an offset of its own.
    AsIs,
    /// What can't be opened anew, such as another user's pipe or terminal. What poll(2) says holds for PIPE_BUF
    /// bytes (pipe(7)).
    Polled,
}

impl Sink {
    pub fn new(stream: Stream) -> io::Result<Self> {
        let opened_by_others = || {
            let copy = match stream {
                Stream::Stdout => io::stdout().as_fd().try_clone_to_owned(),
                Stream::Stderr => io::stderr().as_fd().try_clone_to_owned(),
            };
            copy.map(File::from)
        };
        let way = match std::fs::metadata(stream.path()).map(|metadata| metadata.file_type()) {
            Ok(kind) if kind.is_socket() => Way::Socket,
            Ok(kind) if !kind.is_fifo() && !kind.is_char_device() => Way::AsIs,
            Ok(_) => {
                let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
                match OpenOptions::new().write(true).custom_flags(flags).open(stream.path()) {
                    Ok(file) => return Ok(Self { file, way: Way::NonBlocking }),
                    Err(_) => Way::Polled,
                }
            }
            Err(_) => Way::Polled, // no /proc, say
        };
        Ok(Self { file: opened_by_others()?, way })
    }

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; all others mean that it is in vain.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.way {
            Way::NonBlocking | Way::AsIs => (&self.file).write(bytes),
            Way::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(send(self.file.as_raw_fd(), bytes, flags)?)
            }
            Way::Polled if is_writable(self.file.as_fd()) => {
                (&self.file).write(&bytes[..bytes.len().min(libc::PIPE_BUF)])
            }
            Way::Polled => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

fn is_writable(fd: BorrowedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// A sink with a queue for the lines that its reader isn't ready for, so that none is lost or torn.
#[derive(Debug)]
pub struct Output {
    sink: Sink,
    queue: VecDeque<u8>,
    /// Whether what was written ends amid a line.
    amid_line: bool,
    /// Whether epoll tells when there is room.
    watched: bool,
}

/// With more than this in its queue an output is full.
const FULL: usize = 256 * 1024;

/// Beyond it is room for the log, whose lines would be lost else.
const FULL_FOR_LOG: usize = 1024 * 1024;

impl Output {
    pub fn new(stream: Stream) -> io::Result<Self> {
        Ok(Self::to(Sink::new(stream)?))
    }

    fn to(sink: Sink) -> Self {
        Self { sink, queue: VecDeque::new(), amid_line: false, watched: false }
    }

    /// An output to a pipe whose writing end is non-blocking.
    #[cfg(test)]
    pub fn to_pipe(end: std::os::fd::OwnedFd) -> Self {
        Self::to(Sink { file: end.into(), way: Way::NonBlocking })
    }

    pub fn is_full(&self) -> bool {
        self.queue.len() >= FULL
    }

    /// Whether it is far from full.
    pub fn has_much_room(&self) -> bool {
        self.queue.len() < FULL / 2
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Takes a line, newline included, in parts. It is written by the next flush or a later one.
    pub fn push(&mut self, line: &[&[u8]]) {
        if self.queue.is_empty() && self.amid_line {
            self.queue.push_back(b'\n'); // the rest of that line could not be written
        }
        line.iter().for_each(|part| self.queue.extend(*part));
    }

    /// Takes a line of the log and writes it if it can.
    ///
    /// # Errors
    /// When there is no room, not even for the log.
    pub fn log(&mut self, line: &[u8]) -> io::Result<()> {
        if self.queue.len() + line.len() > FULL_FOR_LOG {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.push(&[line]);
        self.flush();
        Ok(())
    }

    /// Writes as much as there is room for. When the reader has gone, or the disk is full, the queue is dropped.
    pub fn flush(&mut self) {
        while !self.queue.is_empty() {
            match self.sink.write(self.queue.as_slices().0) {
                Ok(written @ 1..) => {
                    self.amid_line = self.queue[written - 1] != b'\n';
                    self.queue.drain(..written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(0) | Err(_) => self.queue.clear(),
            }
        }
        self.queue.shrink_to(FULL);
    }

    /// Has `epoll` tell when there is room, as long as something waits for it. (Of a pipe without a reader it
    /// would tell all the time.)
    pub fn watch(&mut self, epoll: &Epoll, token: u64) {
        let wanted = !self.queue.is_empty();
        if wanted && !self.watched {
            match epoll.add(&self.sink.file, EpollEvent::new(EpollFlags::EPOLLOUT, token)) {
                Ok(()) => self.watched = true,
                Err(_) => self.queue.clear(), // nobody would ever tell
            }
        } else if !wanted && self.watched {
            self.watched = epoll.delete(&self.sink.file).is_err();
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
    fn what_the_reader_is_not_ready_for_waits_and_comes_in_order() {
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
    fn a_full_output_takes_the_log_for_a_while_yet() {
        let (_reader, mut output) = pipe();
        while !output.is_full() {
            output.push(&[&[b'x'; 1000], b"\n"]);
            output.flush();
        }
        let taken = (0..10_000).take_while(|_| output.log(&[b'x'; 1000]).is_ok()).count();
        assert!((700..800).contains(&taken), "{taken}");
    }

    #[test]
    fn without_a_reader_nothing_is_kept() {
        let (reader, mut output) = pipe();
        drop(reader);
        output.push(&[b"line\n"]);
        output.flush();
        assert!(output.is_empty());
    }

    #[test]
    fn after_half_a_line_whose_other_half_was_dropped_a_new_one_begins() {
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
