//! The commands that speak to a running reuse-run.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::kernel::procfs;
use crate::operate::protocol::{self, Envelope, Reply, Request, VERSION};
use crate::operate::status::{Status, Worker, span};
use crate::output::log;

/// A command, and which reuse-run it is for.
#[derive(Debug)]
pub struct Command {
    pub pid: Option<u32>,
    pub operation: Operation,
}

#[derive(Debug)]
pub enum Operation {
    Show {
        json: bool,
        watch: bool,
    },
    /// With the longest time to wait for the end.
    Change {
        request: Request,
        timeout: Option<Duration>,
    },
}

/// How long a running reuse-run may take for its first word.
const PATIENCE: Duration = Duration::from_secs(30);
/// The time between two looks of `status --watch`.
const WATCH: Duration = Duration::from_secs(1);
/// The time between two looks while a command waits at a terminal.
const LIVE: Duration = Duration::from_millis(200);

/// What went wrong, and the status to exit with.
struct Failure {
    why: String,
    status: u8,
}

impl<E: Display> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { why: error.to_string(), status: 1 }
    }
}

/// Does what was asked for, and returns the status to exit with: 0 when it was done, 1 when not, 2 when it isn't
/// clear by whom; for `status` see [`Status::exit_status`].
pub fn run(command: Command) -> u8 {
    let result = find(command.pid).and_then(|pid| match command.operation {
        Operation::Show { json, watch } => show(pid, json, watch),
        Operation::Change { request, timeout } => change(pid, request, timeout),
    });
    result.unwrap_or_else(|Failure { why, status }| {
        log::complain(&why);
        status
    })
}

/// The reuse-run that is meant: the given one, or PID 1, or else the only one that this user may speak to.
fn find(pid: Option<u32>) -> Result<u32, Failure> {
    if let Some(pid) = pid {
        return Ok(pid);
    }
    let sockets = procfs::unix_sockets();
    let all: BTreeSet<u32> = sockets.iter().filter_map(|socket| protocol::pid_of(&socket.name)).collect();
    if all.contains(&1) && connect(1).is_ok() {
        return Ok(1);
    }
    let ours: Vec<u32> = all.into_iter().filter(|pid| connect(*pid).is_ok()).collect();
    match ours[..] {
        [pid] => Ok(pid),
        [] => Err(Failure { why: "no reuse-run is running here".to_owned(), status: 1 }),
        _ => {
            let lines = ours.iter().map(|pid| format!("\n  {pid}  {}", procfs::command_line(*pid)));
            let why = format!("which reuse-run? Say its PID:{}", lines.collect::<String>());
            Err(Failure { why, status: 2 })
        }
    }
}

/// A connection to a reuse-run of this user, or any for root.
fn connect(pid: u32) -> Result<UnixStream, Failure> {
    let stream = UnixStream::connect_addr(&protocol::address(pid)?).map_err(|error| match error.kind() {
        ErrorKind::ConnectionRefused => format!(
            "process {pid} is no reuse-run that can be spoken to (one of an older version can't, nor one in another \
             PID or network namespace)"
        ),
        _ => format!("can't speak to process {pid}: {error}"),
    })?;
    // Anyone may have taken the name; only the right one is told what to do, and believed.
    let (user, peer) = (nix::unistd::geteuid().as_raw(), getsockopt(&stream, PeerCredentials)?);
    if peer.pid() as u32 != pid || (user != 0 && peer.uid() != user && peer.uid() != 0) {
        return Err(format!("process {pid} is not a reuse-run of this user").into());
    }
    Ok(stream)
}

/// Sends a request and returns where the replies are read from.
fn ask(pid: u32, request: Request) -> Result<BufReader<UnixStream>, Failure> {
    let stream = connect(pid)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    (&stream).write_all(&protocol::line(&Envelope { version: VERSION, request }))?;
    Ok(BufReader::new(stream))
}

/// The next reply; `None` at the end.
fn reply(replies: &mut impl BufRead) -> io::Result<Option<Reply>> {
    let mut line = Vec::new();
    match replies.read_until(b'\n', &mut line)? {
        0 => Ok(None),
        _ => Ok(Some(serde_json::from_slice(&line)?)),
    }
}

fn status(pid: u32, request: Request, patience: Duration) -> Result<Box<Status>, Failure> {
    let mut replies = ask(pid, request)?;
    replies.get_ref().set_read_timeout(Some(patience))?;
    let answer = reply(&mut replies).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => format!("process {pid} does not answer"),
        _ => format!("process {pid} can't be understood: {error}"),
    })?;
    match answer {
        Some(Reply::Status(status)) => Ok(status),
        Some(Reply::Failed(why, _)) => Err(why.into()),
        _ => {
            Err(format!("process {pid} refuses to answer: it is another user's, or busy with too many")
                .into())
        }
    }
}

fn show(pid: u32, json: bool, watch: bool) -> Result<u8, Failure> {
    loop {
        let status = status(pid, Request::Status, PATIENCE)?;
        let text = if json { serde_json::to_string(&status)? + "\n" } else { status.to_string() };
        // Clears what is left of the last one: to the end of each line, and below.
        let redraw = watch && !json && io::stdout().is_terminal();
        let text = if redraw { format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")) } else { text };
        let shown = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
        if !watch || shown.is_err() {
            return Ok(status.exit_status());
        }
        thread::sleep(WATCH);
    }
}

/// Asks for a change and waits for what comes of it.
fn change(pid: u32, request: Request, timeout: Option<Duration>) -> Result<u8, Failure> {
    let until = timeout.map(|timeout| Instant::now() + timeout);
    let mut replies = ask(pid, request)?;
    let (asked, mut has_answered) = (Instant::now(), false);
    let mut screen = Screen::new(pid);
    let mut line = Vec::new();
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if let (Some(Duration::ZERO), Some(timeout)) = (left, timeout) {
            screen.clear();
            let timeout = humantime::format_duration(timeout);
            return Err(format!("it is not over after {timeout} (see --timeout), and goes on").into());
        }
        let patience = (!has_answered).then_some(PATIENCE);
        let pause = screen.pause().into_iter().chain(left).chain(patience).min();
        replies.get_ref().set_read_timeout(pause)?;
        // What a time-out interrupts stays in `line`.
        match replies.read_until(b'\n', &mut line) {
            Ok(0) => {
                screen.clear();
                return Err(format!("process {pid} has ended, or turned this command away").into());
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                if !has_answered && asked.elapsed() >= PATIENCE {
                    screen.clear();
                    return Err(format!("process {pid} does not answer").into());
                }
                screen.draw();
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        let answer = serde_json::from_slice(&std::mem::take(&mut line))?;
        has_answered = true;
        screen.clear();
        match answer {
            Reply::Step(step) => say(&step),
            Reply::Done(text) => {
                say(&text);
                wait_for_end_of_file(&mut replies);
                return Ok(0);
            }
            Reply::Failed(why, details) => {
                details.iter().for_each(|detail| eprintln!("  {detail}"));
                wait_for_end_of_file(&mut replies);
                return Err(why.into());
            }
            Reply::Status(_) => {}
        }
        screen.draw();
    }
}

/// After the last reply to `stop` the process ends, and only then its port is free.
fn wait_for_end_of_file(replies: &mut BufReader<UnixStream>) {
    let _ = replies.get_ref().set_read_timeout(Some(PATIENCE));
    let _ = io::copy(replies, &mut io::sink());
}

fn say(text: &str) {
    let _ = writeln!(io::stdout(), "{text}"); // the reader may have seen enough
}

/// On a terminal, a line for each worker below what was said, drawn anew while time passes.
struct Screen {
    pid: u32,
    is_terminal: bool,
    lines: usize,
}

impl Screen {
    fn new(pid: u32) -> Self {
        Self { pid, is_terminal: io::stdout().is_terminal(), lines: 0 }
    }

    fn pause(&self) -> Option<Duration> {
        self.is_terminal.then_some(LIVE)
    }

    fn clear(&mut self) {
        if self.lines > 0 {
            let _ = write!(io::stdout(), "\x1b[{}A\x1b[J", self.lines);
            self.lines = 0;
        }
    }

    fn draw(&mut self) {
        if !self.is_terminal {
            return;
        }
        let Ok(status) = status(self.pid, Request::Brief, LIVE) else { return };
        self.clear();
        let line = |worker: &Worker| {
            let Worker { slot, pid, generation, state, .. } = worker;
            let pid = pid.map_or("no process".to_owned(), |pid| format!("pid {pid}"));
            let since = worker.seconds.map_or(String::new(), |seconds| format!(" for {}", span(seconds)));
            format!("  worker {slot} ({pid}, generation {generation}): {state}{since}\n")
        };
        let text: String = status.workers.iter().map(line).collect();
        self.lines = status.workers.len();
        let _ = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
    }
}
