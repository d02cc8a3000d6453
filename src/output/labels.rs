//! The workers' output with `slot|pid` before each line (--label).
//!
//! Each worker has a pipe for stdout and one for stderr. reuse-run reads them and writes whole lines to its own stdout and
//! stderr. If the reader of one of these is slow, its queue fills up, and the pipes aren't read until there is room again:
//! the workers wait for that reader, as they do without reuse-run.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::unistd::{Pid, pipe2, read};

use crate::ids::{SlotId, WorkerId};
use crate::kernel::ready;
use crate::lines::{Lines, TooLong};
use crate::output::log;
use crate::output::sink::{self, Output, Stream};
use crate::words::printable;

/// A longer line becomes several.
const MAX_LINE_LENGTH: usize = 64 * 1024;

/// In bytes. A pipe is not read further until the others had their turn, so that a worker that floods its pipe doesn't
/// delay the others.
const MAX_READ_AT_ONCE: usize = 64 * 1024;

/// What a pipe holds at most, in bytes (/proc/sys/fs/pipe-max-size).
const MAX_PIPE_SIZE: usize = 1024 * 1024;

/// How long reuse-run waits for a slow reader before it exits.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// How many of a worker's last lines are kept, and how many bytes of each.
const KEPT_LINES: usize = 5;
const KEPT_BYTES: usize = 200;

/// How many ended workers' last lines are kept.
const MAX_ENDED_WORKERS: usize = 64;

/// The epoll's token for an output that has room again; those of the pipes are made by [`token`].
const ROOM_TOKEN: u64 = u64::MAX;

fn token(WorkerId(id): WorkerId, stream: Stream) -> u64 {
    u64::from(id) << 1 | stream as u64
}

fn from_token(token: u64) -> (WorkerId, Stream) {
    (WorkerId((token >> 1) as u32), Stream::ALL[(token & 1) as usize])
}

/// Makes the pipes for a new worker: the ends that reuse-run reads, and the ends that become the worker's stdout and stderr.
/// All are close-on-exec.
///
/// # Errors
/// When there is no file descriptor left.
pub fn pipes() -> io::Result<([OwnedFd; 2], [OwnedFd; 2])> {
    let pipe = || -> io::Result<_> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((read, write))
    };
    let (stdout, stderr) = (pipe()?, pipe()?);
    Ok(([stdout.0, stderr.0], [stdout.1, stderr.1]))
}

/// The end of a pipe that reuse-run reads.
#[derive(Debug)]
struct Pipe {
    end: OwnedFd,
    lines: Lines,
    /// Whether the pipe is in the epoll. While it isn't read it must not be there: epoll(7) reports a pipe without a writer
    /// (EPOLLHUP) whatever events were asked for.
    is_watched: bool,
}

/// What is left in a pipe after a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    Unknown,
    Empty,
    EndOfFile,
}

/// The output of a worker that runs, or that has ended and whose last lines are kept.
#[derive(Debug)]
struct WorkerOutput {
    label: String,
    /// By stream, until end of file. Processes that the worker has started can hold a pipe open longer than the worker.
    pipes: [Option<Pipe>; 2],
    last_lines: VecDeque<Vec<u8>>,
    ended: bool,
}

impl WorkerOutput {
    /// Reads from a pipe until it is empty, the output is full or about `most` bytes are read.
    fn read(&mut self, stream: Stream, output: &mut Output, most: usize) -> Rest {
        let Self { label, pipes, last_lines, .. } = self;
        let pipe = &mut pipes[stream as usize];
        let Some(Pipe { end, lines, .. }) = pipe else { return Rest::EndOfFile };
        let mut read_so_far = 0;
        // In small pieces: with labels, short lines become several times as long.
        let mut bytes = [0; 16 * 1024];
        while read_so_far < most && !output.is_full() {
            let mut line = |text: &[u8]| {
                output.push(&[label.as_bytes(), text, b"\n"]);
                if stream == Stream::Stderr {
                    keep(last_lines, text);
                }
            };
            match read(&*end, &mut bytes) {
                Ok(count @ 1..) => {
                    lines.take(&bytes[..count], &mut line);
                    read_so_far += count;
                }
                Err(Errno::EAGAIN) => return Rest::Empty,
                Err(Errno::EINTR) => {}
                Ok(0) | Err(_) => {
                    lines.end(&mut line);
                    output.flush();
                    *pipe = None; // closing it removes it from the epoll
                    return Rest::EndOfFile;
                }
            }
            output.flush();
        }
        Rest::Unknown
    }

    /// Closes a pipe that other processes may still hold open.
    fn close(&mut self, stream: Stream, output: &mut Output) {
        if let Some(mut pipe) = self.pipes[stream as usize].take() {
            pipe.lines.end(&mut |text| output.push(&[self.label.as_bytes(), text, b"\n"]));
        }
    }
}

fn keep(last_lines: &mut VecDeque<Vec<u8>>, text: &[u8]) {
    if last_lines.len() == KEPT_LINES {
        last_lines.pop_front();
    }
    last_lines.push_back(text[..text.len().min(KEPT_BYTES)].to_vec());
}

/// Passes on the output of all workers to stdout and stderr.
#[derive(Debug)]
pub struct Labels {
    /// Of the pipes and the outputs. The epoll of the poll loop holds only this one.
    epoll: Epoll,
    /// By stream. If stdout and stderr are the same file, both are the same output.
    outputs: [Arc<Mutex<Output>>; 2],
    workers: BTreeMap<WorkerId, WorkerOutput>,
    /// By output: the token of the pipe that was read last for it.
    last_read: [u64; 2],
}

/// The lock must not be held while something is logged: the log uses the same output.
fn lock(output: &Mutex<Output>) -> MutexGuard<'_, Output> {
    output.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Labels {
    /// From now on no line of the log waits for its reader, with labels or without.
    ///
    /// # Errors
    /// When there is no process or file descriptor left.
    pub fn if_wanted(wanted: bool) -> io::Result<Option<Self>> {
        if wanted { Self::new().map(Some) } else { log::never_wait().map(|()| None) }
    }

    /// From now on the log is written through the same output as the workers' stderr.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    fn new() -> io::Result<Self> {
        let stderr = Arc::new(Mutex::new(Output::new(Stream::Stderr)?));
        let stdout = if sink::is_one_file() {
            Arc::clone(&stderr)
        } else {
            Arc::new(Mutex::new(Output::new(Stream::Stdout)?))
        };
        let labels = Self::to([stdout, Arc::clone(&stderr)])?;
        log::write_through(stderr);
        Ok(labels)
    }

    fn to(outputs: [Arc<Mutex<Output>>; 2]) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, outputs, workers: BTreeMap::new(), last_read: [0; 2] })
    }

    /// A worker has started, with the other ends of these [`pipes`].
    pub fn add(&mut self, worker: WorkerId, slot: SlotId, pid: Pid, pipes: [OwnedFd; 2]) {
        self.forget_oldest();
        let pipes = pipes.map(|end| {
            Some(Pipe { end, lines: Lines::new(MAX_LINE_LENGTH, TooLong::Split), is_watched: false })
        });
        let label = format!("{slot}|{pid} ");
        self.workers.insert(worker, WorkerOutput { label, pipes, last_lines: VecDeque::new(), ended: false });
    }

    /// A worker has ended. Its output is written now, as far as there is room, so that it comes before the log line that
    /// says how the worker ended.
    pub fn worker_ended(&mut self, worker: WorkerId) {
        self.read_all(worker);
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.ended = true;
        }
    }

    /// The last lines that a worker wrote to stderr. The worker may have ended.
    pub fn last_lines(&mut self, worker: WorkerId) -> Vec<String> {
        self.read_all(worker);
        let Some(worker) = self.workers.get(&worker) else { return Vec::new() };
        let mut last_lines = worker.last_lines.clone();
        if let Some(pipe) = &worker.pipes[Stream::Stderr as usize]
            && !pipe.lines.unfinished().is_empty()
        {
            keep(&mut last_lines, pipe.lines.unfinished());
        }
        last_lines.iter().map(|line| printable(line)).collect()
    }

    /// Reads from the pipes that the epoll reports. To be called when the epoll is readable.
    pub fn read(&mut self) {
        let mut events = [EpollEvent::empty(); 64];
        let ready = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in events[..ready].iter().filter(|event| event.data() != ROOM_TOKEN) {
            let (id, stream) = from_token(event.data());
            let Some(worker) = self.workers.get_mut(&id) else { continue };
            let mut output = lock(&self.outputs[stream as usize]);
            if !output.is_full() {
                worker.read(stream, &mut output, MAX_READ_AT_ONCE);
                drop(output);
                self.last_read[self.output_of(stream)] = event.data();
            }
        }
    }

    /// Writes what there is room for, and decides which pipes and outputs the epoll watches: pipes only while their output
    /// has room, outputs only while something waits for room. To be called before the poll loop waits.
    pub fn flush_and_watch(&mut self) {
        for output in &self.outputs {
            let mut output = lock(output);
            output.flush();
            output.watch(&self.epoll, ROOM_TOKEN);
        }
        // The epoll reports pipes in the order in which they are added here. The pipe whose last turn was longest ago comes
        // first: otherwise workers that flood a slow reader would keep the others' lines from it for ever.
        let last_read = Stream::ALL.map(|stream| self.last_read[self.output_of(stream)]);
        for is_next in [true, false] {
            for (id, worker) in &mut self.workers {
                for stream in Stream::ALL {
                    let Some(pipe) = &mut worker.pipes[stream as usize] else { continue };
                    let token = token(*id, stream);
                    if (token > last_read[stream as usize]) != is_next {
                        continue;
                    }
                    let output = lock(&self.outputs[stream as usize]);
                    if pipe.is_watched && output.is_full() {
                        pipe.is_watched = self.epoll.delete(&pipe.end).is_err();
                    } else if !pipe.is_watched && output.has_much_room() {
                        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
                        pipe.is_watched = self.epoll.add(&pipe.end, event).is_ok();
                    }
                }
            }
        }
    }

    /// The index of the output for a stream; 0 for both if they share it.
    fn output_of(&self, stream: Stream) -> usize {
        if Arc::ptr_eq(&self.outputs[0], &self.outputs[1]) { 0 } else { stream as usize }
    }

    /// Reads and writes what is left before reuse-run exits. Waits for a slow reader for up to 5 s.
    pub fn finish(mut self) {
        let until = Instant::now() + FINISH_TIMEOUT;
        loop {
            for worker in self.workers.values_mut() {
                for (stream, output) in Stream::ALL.into_iter().zip(&self.outputs) {
                    let mut output = lock(output);
                    if worker.read(stream, &mut output, MAX_READ_AT_ONCE) == Rest::Empty {
                        worker.close(stream, &mut output);
                    }
                }
            }
            self.workers.retain(|_, worker| worker.pipes.iter().any(Option::is_some));
            self.flush_and_watch();
            let left = until.saturating_duration_since(Instant::now());
            let written = self.outputs.iter().all(|output| lock(output).is_empty());
            if left.is_zero() || (written && self.workers.is_empty()) {
                if self.output_of(Stream::Stderr) != 0 {
                    lock(&self.outputs[0]).finish(until); // that of stderr is the log's too
                }
                return;
            }
            if !written {
                let left = EpollTimeout::try_from(left).unwrap_or(EpollTimeout::ZERO);
                let _ = self.epoll.wait(&mut [EpollEvent::empty()], left);
            }
        }
    }

    /// Reads all that is in a worker's pipes, as far as there is room for it.
    fn read_all(&mut self, worker: WorkerId) {
        let Some(worker) = self.workers.get_mut(&worker) else { return };
        for (stream, output) in Stream::ALL.into_iter().zip(&self.outputs) {
            worker.read(stream, &mut lock(output), MAX_PIPE_SIZE);
        }
    }

    /// Limits the number of ended workers that are kept. If workers die one after the other while nobody reads reuse-run's
    /// output, the output of the first of them is lost.
    fn forget_oldest(&mut self) {
        let ended: Vec<WorkerId> =
            self.workers.iter().filter(|(_, worker)| worker.ended).map(|(id, _)| *id).collect();
        for id in ended.iter().take(ended.len().saturating_sub(MAX_ENDED_WORKERS)) {
            self.read_all(*id);
            let Some(worker) = self.workers.get_mut(id) else { continue };
            for pipe in &mut worker.pipes {
                pipe.take_if(|pipe| has_no_writer(&pipe.end));
            }
            if worker.pipes.iter().all(Option::is_none) {
                self.workers.remove(id);
            }
        }
    }
}

impl AsFd for Labels {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

fn has_no_writer(pipe: &OwnedFd) -> bool {
    ready::now(pipe.as_fd(), PollFlags::empty()).contains(PollFlags::POLLHUP)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    /// Labels whose stdout and stderr are pipes, and the reading ends of these.
    fn labels() -> (Labels, [File; 2]) {
        let [stdout, stderr] = [(), ()].map(|()| pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap());
        let outputs = [stdout.1, stderr.1].map(|end| Arc::new(Mutex::new(Output::to_pipe(end))));
        (Labels::to(outputs).unwrap(), [stdout.0.into(), stderr.0.into()])
    }

    fn add(labels: &mut Labels, worker: u32) -> [File; 2] {
        let (ours, its) = pipes().unwrap();
        labels.add(WorkerId(worker), SlotId(7), Pid::from_raw(42), ours);
        its.map(File::from)
    }

    fn text(file: &mut File) -> String {
        let mut bytes = vec![0; 1024 * 1024];
        let count = file.read(&mut bytes).unwrap_or(0);
        String::from_utf8(bytes[..count].to_vec()).unwrap()
    }

    #[test]
    fn the_last_lines_are_those_on_stderr_in_a_printable_form() {
        let (mut labels, [mut stdout, mut stderr]) = labels();
        let [mut out, mut err] = add(&mut labels, 0);
        out.write_all(b"on stdout\n").unwrap();
        let long = "x".repeat(1000);
        err.write_all(format!("1\n2\n3\n4\n\x1b[2J\n{long}\nnot ended").as_bytes()).unwrap();
        let expected = ["3", "4", "\\u{1b}[2J", &long[..200], "not ended"];
        assert_eq!(labels.last_lines(WorkerId(0)), expected);
        drop((out, err));
        labels.worker_ended(WorkerId(0));
        assert_eq!(labels.last_lines(WorkerId(0)), expected);
        assert_eq!(labels.last_lines(WorkerId(1)), [""; 0]);
        assert_eq!(text(&mut stdout), "7|42 on stdout\n");
        assert!(text(&mut stderr).ends_with("7|42 not ended\n"));
    }

    #[test]
    fn a_quiet_worker_is_read_between_many_that_flood_a_slow_reader() {
        let (mut labels, [mut stdout, _stderr]) = labels();
        let mut workers: Vec<[File; 2]> = (0..8).map(|worker| add(&mut labels, worker)).collect();
        for [out, _] in &workers {
            fcntl(out, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        }
        labels.flush_and_watch();
        let mut read = String::new();
        for turn in 0.. {
            for [out, _] in &mut workers[..7] {
                while out.write(&[b'x'; 1024]).is_ok() {}
            }
            if turn == 10 {
                workers[7][0].write_all(b"little\n").unwrap();
            }
            labels.read();
            labels.flush_and_watch();
            read = text(&mut stdout);
            if read.contains("7|42 little\n") {
                break;
            }
            assert!(turn < 500, "no line after {turn} turns");
        }
        assert!(read.len() < MAX_PIPE_SIZE);
    }

    /// Floods some streams, by worker and stream, writes one line to another, and waits until the reader has it.
    #[track_caller]
    fn assert_line_arrives(
        labels: &mut Labels,
        workers: &mut [[File; 2]],
        reader: &mut File,
        floods: &[(usize, usize)],
        quiet: (usize, usize),
    ) {
        for (worker, stream) in floods {
            fcntl(&workers[*worker][*stream], FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        }
        labels.flush_and_watch();
        for turn in 0.. {
            for (worker, stream) in floods {
                while workers[*worker][*stream].write(&[b'\n'; 1024]).is_ok() {}
            }
            if turn == 10 {
                workers[quiet.0][quiet.1].write_all(b"little\n").unwrap();
            }
            labels.read();
            labels.flush_and_watch();
            if text(reader).contains("7|42 little\n") {
                break;
            }
            assert!(turn < 500, "no line after {turn} turns");
        }
    }

    #[test]
    fn one_stream_of_a_worker_is_read_while_its_other_stream_floods_the_same_slow_reader() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        let output = Arc::new(Mutex::new(Output::to_pipe(writer)));
        let mut labels = Labels::to([Arc::clone(&output), output]).unwrap();
        let mut workers = [add(&mut labels, 0)];
        assert_line_arrives(&mut labels, &mut workers, &mut reader.into(), &[(0, 0)], (0, 1));
    }

    #[test]
    fn reads_for_one_output_do_not_change_the_turns_of_the_other() {
        let (mut labels, [mut stdout, _stderr]) = labels();
        let mut workers: Vec<[File; 2]> = (0..8).map(|worker| add(&mut labels, worker)).collect();
        let floods: Vec<(usize, usize)> = (1..7).map(|worker| (worker, 0)).collect();
        let floods = [&floods[..], &[(0, 1)]].concat();
        assert_line_arrives(&mut labels, &mut workers, &mut stdout, &floods, (7, 0));
    }

    #[test]
    fn ended_workers_are_forgotten_unless_a_process_holds_their_pipes() {
        let (mut labels, _readers) = labels();
        let held = add(&mut labels, 0);
        labels.worker_ended(WorkerId(0));
        for worker in 1..1000 {
            let [mut out, mut err] = add(&mut labels, worker);
            out.write_all(&[b'x'; 60 * 1024]).unwrap();
            err.write_all(&[b'x'; 60 * 1024]).unwrap();
            drop((out, err));
            labels.worker_ended(WorkerId(worker));
            labels.flush_and_watch();
        }
        assert!(labels.workers.len() <= MAX_ENDED_WORKERS + 2, "{}", labels.workers.len());
        assert!(labels.workers.contains_key(&WorkerId(0)));
        drop(held);
    }

    mod fuzz {
        use proptest::collection::vec;
        use proptest::prelude::*;

        use super::*;
        use crate::words::is_unsafe;

        proptest! {
            #[test]
            fn each_line_has_its_label_and_the_last_ones_are_kept_however_they_arrive(
                lines in vec(vec(any::<u8>().prop_filter("no newline", |it| *it != b'\n'), 0..300), 0..12),
                piece in 1usize..2000,
            ) {
                let (mut labels, [_stdout, mut stderr]) = labels();
                let [_out, mut err] = add(&mut labels, 0);
                let stream: Vec<u8> = lines.iter().flat_map(|line| [line, &b"\n"[..]].concat()).collect();
                for piece in stream.chunks(piece) {
                    err.write_all(piece).unwrap();
                    let last = labels.last_lines(WorkerId(0));
                    prop_assert!(last.len() <= KEPT_LINES);
                    prop_assert!(last.iter().all(|line| line.len() <= KEPT_BYTES * 10 && !line.contains(is_unsafe)));
                }
                let kept = labels.last_lines(WorkerId(0));
                let expected = lines[lines.len().saturating_sub(KEPT_LINES)..].iter();
                let expected: Vec<String> = expected.map(|line| printable(&line[..line.len().min(KEPT_BYTES)])).collect();
                prop_assert_eq!(kept, expected);
                let labelled: Vec<u8> = lines.iter().flat_map(|line| [b"7|42 ", &line[..], b"\n"].concat()).collect();
                let mut written = vec![0; labelled.len() + 1];
                let count = stderr.read(&mut written).unwrap_or(0);
                prop_assert_eq!(&written[..count], &labelled);
            }
        }
    }
}
