//! The workers' output line by line, each with the slot and the PID of the worker before it.
//!
//! Writing never makes the loop wait: what stdout or stderr doesn't take is kept, and when that is much, the
//! workers' pipes are not read until it is less, so that they wait as they would without us.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::{self, Pid};

use crate::fleet::WorkerId;
use crate::logging;
use crate::procfs;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// A worker's pipe; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PipeId(pub u32);

/// What a poll loop is told by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    Pipe(PipeId),
    Output(Stream),
}

/// No more is read at once, so that a worker that floods doesn't hold up others, in bytes.
const MOST_AT_ONCE: usize = 64 * 1024;
/// A line that is longer is parted, in bytes.
const LONGEST_LINE: usize = 64 * 1024;
/// When so much waits to be written, nothing more is read, in bytes.
const MOST_WAITING: usize = 256 * 1024;
/// What fits into a pipe whole or not at all, and without a wait when poll(2) says that it can be written to
/// (PIPE_BUF, pipe(7)).
const WHOLE: usize = 4096;
/// How much is kept of what a worker said last: lines, and of how many workers.
const LAST_LINES: usize = 5;
const LAST_WORKERS: usize = 64;
/// How long the last words of all wait for a slow reader.
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module's comment.
pub struct Labels {
    pipes: BTreeMap<PipeId, Pipe>,
    next: u32,
    stdout: Output,
    stderr: Output,
    /// What workers wrote last to stderr.
    last: BTreeMap<WorkerId, VecDeque<String>>,
}

struct Pipe {
    fd: OwnedFd,
    worker: WorkerId,
    stream: Stream,
    lines: Lines,
}

/// The reading ends of a worker's pipes, until it has started.
pub struct Ends {
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Labels {
    pub fn new() -> Self {
        Self {
            pipes: BTreeMap::new(),
            next: 0,
            stdout: Output::new(Stream::Stdout),
            stderr: Output::new(Stream::Stderr),
            last: BTreeMap::new(),
        }
    }

    /// Pipes for a worker's output: our ends, and its stdout and stderr.
    pub fn pipes() -> io::Result<(Ends, [OwnedFd; 2])> {
        let pipe = || -> io::Result<(OwnedFd, OwnedFd)> {
            let (read, write) = unistd::pipe2(OFlag::O_CLOEXEC)?;
            fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            Ok((read, write))
        };
        let ((stdout, its_stdout), (stderr, its_stderr)) = (pipe()?, pipe()?);
        Ok((Ends { stdout, stderr }, [its_stdout, its_stderr]))
    }

    /// Reads what a worker writes, whenever `epoll` tells of it by the token that `token` makes.
    pub fn add(
        &mut self,
        worker: WorkerId,
        slot: u32,
        pid: Pid,
        ends: Ends,
        epoll: &Epoll,
        token: impl Fn(Ready) -> u64,
    ) -> io::Result<()> {
        for (stream, fd) in [(Stream::Stdout, ends.stdout), (Stream::Stderr, ends.stderr)] {
            let id = PipeId(self.next);
            self.next = self.next.wrapping_add(1);
            let flags = if self.output(stream).is_full { EpollFlags::empty() } else { EpollFlags::EPOLLIN };
            epoll.add(&fd, EpollEvent::new(flags, token(Ready::Pipe(id))))?;
            let lines = Lines::new(format!("{slot}|{pid} "));
            self.pipes.insert(id, Pipe { fd, worker, stream, lines });
        }
        Ok(())
    }

    fn output(&mut self, stream: Stream) -> &mut Output {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    /// Goes on where something is ready.
    pub fn attend(&mut self, ready: Ready, epoll: &Epoll, token: impl Fn(Ready) -> u64) {
        let stream = match ready {
            Ready::Output(stream) => stream,
            Ready::Pipe(id) => {
                let Some(stream) = self.pipes.get(&id).map(|pipe| pipe.stream) else { return };
                self.read(id);
                stream
            }
        };
        self.go_on(stream, epoll, token);
    }

    /// Writes what was read, and reads more or less according to that.
    fn go_on(&mut self, stream: Stream, epoll: &Epoll, token: impl Fn(Ready) -> u64) {
        let output = self.output(stream);
        output.flush();
        output.watch(epoll, token(Ready::Output(stream)));
        let is_full = output.waiting() >= MOST_WAITING;
        if is_full != std::mem::replace(&mut output.is_full, is_full) {
            let flags = if is_full { EpollFlags::empty() } else { EpollFlags::EPOLLIN };
            for (id, pipe) in self.pipes.iter().filter(|(_, pipe)| pipe.stream == stream) {
                let _ = epoll.modify(&pipe.fd, &mut EpollEvent::new(flags, token(Ready::Pipe(*id))));
            }
        }
    }

    /// Reads from a pipe once. Returns whether there may be more.
    fn read(&mut self, id: PipeId) -> bool {
        let Some(pipe) = self.pipes.get_mut(&id) else { return false };
        let mut bytes = vec![0; MOST_AT_ONCE];
        let (lines, goes_on) = match unistd::read(&pipe.fd, &mut bytes) {
            Ok(count) if count > 0 => (pipe.lines.take(&bytes[..count]), true),
            Err(Errno::EAGAIN) => return false,
            // The end: nobody has the other end any more.
            _ => (pipe.lines.end().into_iter().collect(), false),
        };
        let (worker, stream, label) = (pipe.worker, pipe.stream, pipe.lines.label.len());
        if stream == Stream::Stderr {
            let last = self.last.entry(worker).or_default();
            for line in &lines {
                last.push_back(procfs::printable(&line[label..line.len() - 1]));
            }
            last.drain(..last.len().saturating_sub(LAST_LINES));
            if self.last.len() > LAST_WORKERS {
                self.last.pop_first();
            }
        }
        self.output(stream).queue.extend(lines);
        if !goes_on {
            self.pipes.remove(&id);
        }
        goes_on
    }

    /// What a worker has written last to stderr.
    pub fn last_lines(
        &mut self,
        worker: WorkerId,
        epoll: &Epoll,
        token: impl Fn(Ready) -> u64,
    ) -> Vec<String> {
        let its = |pipe: &Pipe| pipe.worker == worker && pipe.stream == Stream::Stderr;
        let pipe = self.pipes.iter().find(|(_, pipe)| its(pipe)).map(|(id, _)| *id);
        if let Some(id) = pipe {
            self.read_up(id);
            self.go_on(Stream::Stderr, epoll, token);
        }
        self.last.get(&worker).map_or(Vec::new(), |lines| lines.iter().cloned().collect())
    }

    /// Reads what is in a pipe, which holds no more than this unless somebody has enlarged it or goes on to write.
    fn read_up(&mut self, id: PipeId) {
        const MOST: usize = 1024 * 1024 / MOST_AT_ONCE;
        let _ = (0..MOST).take_while(|_| self.read(id)).count();
    }

    /// Writes what is left, at the end.
    pub fn finish(&mut self) {
        for id in self.pipes.keys().copied().collect::<Vec<_>>() {
            self.read_up(id);
            if let Some(pipe) = self.pipes.get_mut(&id) {
                let (stream, lines) = (pipe.stream, pipe.lines.end());
                self.output(stream).queue.extend(lines);
            }
        }
        let until = Instant::now() + PATIENCE;
        for output in [&mut self.stdout, &mut self.stderr] {
            while !output.flush() && Instant::now() < until {
                let left = until.saturating_duration_since(Instant::now()).as_millis() as u16;
                let mut fds = [PollFd::new(output.fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut fds, PollTimeout::from(left.max(1)));
            }
        }
    }
}

/// Parts a stream into lines, and puts the label before each.
struct Lines {
    label: String,
    begun: Vec<u8>,
}

impl Lines {
    fn new(label: String) -> Self {
        Self { label, begun: Vec::new() }
    }

    /// The lines that are whole by now, each with its newline.
    fn take(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match part.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (part, false),
            };
            let mut rest = text;
            while self.begun.len() + rest.len() > LONGEST_LINE {
                let (fits, more) = rest.split_at(LONGEST_LINE - self.begun.len());
                self.begun.extend_from_slice(fits);
                lines.push(self.line());
                rest = more;
            }
            self.begun.extend_from_slice(rest);
            if ended {
                lines.push(self.line());
            }
        }
        lines
    }

    /// What is left at the end of the stream.
    fn end(&mut self) -> Option<Vec<u8>> {
        (!self.begun.is_empty()).then(|| self.line())
    }

    fn line(&mut self) -> Vec<u8> {
        let mut line = self.label.clone().into_bytes();
        line.append(&mut self.begun);
        line.push(b'\n');
        line
    }
}

/// stdout or stderr.
struct Output {
    stream: Stream,
    sink: Sink,
    queue: VecDeque<Vec<u8>>,
    /// What is being written: whole lines, or the rest of one.
    current: Vec<u8>,
    is_watched: bool,
    is_full: bool,
}

enum Sink {
    /// Opened anew and non-blocking, which the workers and whoever else has the same pipe or terminal don't
    /// notice.
    Own(File),
    Socket,
    /// It takes whatever comes.
    RegularFile,
    /// It can't be opened anew: written to when it can take as much as is written.
    Other,
}

impl Output {
    fn new(stream: Stream) -> Self {
        let path = format!("/proc/self/fd/{}", if stream == Stream::Stdout { 1 } else { 2 });
        let sink = match std::fs::metadata(&path).map(|metadata| metadata.file_type()) {
            Ok(kind) if kind.is_socket() => Sink::Socket,
            Ok(kind) if kind.is_file() => Sink::RegularFile,
            _ => {
                let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
                let own = OpenOptions::new().write(true).custom_flags(flags).open(path);
                own.map_or(Sink::Other, Sink::Own)
            }
        };
        let (queue, current) = (VecDeque::new(), Vec::new());
        Self { stream, sink, queue, current, is_watched: false, is_full: false }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        use std::sync::LazyLock;
        static STDOUT: LazyLock<io::Stdout> = LazyLock::new(io::stdout);
        static STDERR: LazyLock<io::Stderr> = LazyLock::new(io::stderr);
        match (&self.sink, self.stream) {
            (Sink::Own(file), _) => file.as_fd(),
            (_, Stream::Stdout) => STDOUT.as_fd(),
            (_, Stream::Stderr) => STDERR.as_fd(),
        }
    }

    fn waiting(&self) -> usize {
        self.current.len() + self.queue.iter().map(Vec::len).sum::<usize>()
    }

    /// Writes as much as is taken. Returns whether nothing is left.
    fn flush(&mut self) -> bool {
        loop {
            if self.current.is_empty() {
                if self.stream == Stream::Stderr {
                    self.current = logging::release();
                }
                while let Some(line) = self.queue.front()
                    && (self.current.is_empty() || self.current.len() + line.len() <= WHOLE)
                {
                    self.current.extend(self.queue.pop_front().into_iter().flatten());
                }
            }
            if self.current.is_empty() {
                return true;
            }
            match self.write() {
                Ok(count) => drop(self.current.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // Nobody reads any more.
                Err(_) => self.current.clear(),
            }
        }
        // The log is written by another way, and is not to end up in the middle of a line.
        if self.stream == Stream::Stderr {
            logging::hold();
        }
        false
    }

    fn write(&self) -> io::Result<usize> {
        match &self.sink {
            Sink::Own(file) => (&mut &*file).write(&self.current),
            Sink::RegularFile => Ok(unistd::write(self.fd(), &self.current)?),
            Sink::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(send(self.fd().as_raw_fd(), &self.current, flags)?)
            }
            Sink::Other => {
                let mut fds = [PollFd::new(self.fd(), PollFlags::POLLOUT)];
                if poll(&mut fds, PollTimeout::ZERO)? == 0 {
                    return Err(ErrorKind::WouldBlock.into());
                }
                Ok(unistd::write(self.fd(), &self.current[..self.current.len().min(WHOLE)])?)
            }
        }
    }

    /// Has `epoll` tell when more can be written, as long as there is something to write.
    fn watch(&mut self, epoll: &Epoll, token: u64) {
        let wants = !self.current.is_empty() || !self.queue.is_empty();
        if wants != self.is_watched {
            let changed = match wants {
                true => epoll.add(self.fd(), EpollEvent::new(EpollFlags::EPOLLOUT, token)),
                false => epoll.delete(self.fd()),
            };
            self.is_watched = if changed.is_ok() { wants } else { self.is_watched };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_parted_and_nothing_lost() {
        let mut lines = Lines::new("0|1 ".to_owned());
        let text = vec![b'x'; 2 * LONGEST_LINE + 5];
        let mut read = lines.take(&text);
        assert_eq!(read.len(), 2);
        read.extend(lines.take(b"y\nz"));
        read.extend(lines.end());
        assert_eq!(lines.end(), None);
        assert_eq!(read[2], b"0|1 xxxxxy\n");
        assert_eq!(read[3], b"0|1 z\n");
        assert_eq!(read.iter().map(|line| line.len() - 5).sum::<usize>(), text.len() + 2);
    }

    proptest! {
        #[test]
        fn lines_are_the_same_however_the_stream_is_cut(
            text in proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..300),
            cuts in proptest::collection::vec(1usize..50, 0..40)
        ) {
            let (mut lines, mut rest, mut read) = (Lines::new("7|42 ".to_owned()), text.as_slice(), Vec::new());
            for cut in cuts {
                let (part, later) = rest.split_at(cut.min(rest.len()));
                read.extend(lines.take(part));
                rest = later;
            }
            read.extend(lines.take(rest));
            read.extend(lines.end());
            let mut expected: Vec<Vec<u8>> =
                text.split(|byte| *byte == b'\n').map(|line| [b"7|42 ", line, b"\n"].concat()).collect();
            if text.is_empty() || text.ends_with(b"\n") {
                expected.pop();
            }
            prop_assert_eq!(read, expected);
        }
    }
}
