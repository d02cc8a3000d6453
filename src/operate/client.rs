//! The commands to a running reuse-run.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::kernel::procfs;
use crate::operate::protocol::{self, Envelope, Reply, Request};
use crate::operate::status::{Status, WorkerStatus, span};
use crate::output::log;

/// A command, and the reuse-run that it is for.
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
    Change {
        request: Request,
        /// How long to wait until the change is done.
        timeout: Option<Duration>,
    },
}

/// How long a running reuse-run may take for its first reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// The pause of `status --watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How often the workers are shown again at a terminal while a command waits.
const REDRAW_INTERVAL: Duration = Duration::from_millis(200);

/// Why a command failed, and its exit status.
struct CommandError {
    why: String,
    exit_status: u8,
}

impl<E: Display> From<E> for CommandError {
    fn from(error: E) -> Self {
        Self { why: error.to_string(), exit_status: 1 }
    }
}

/// Runs a command and returns its exit status: 0 if it was done, 1 if not, 2 if it isn't clear which reuse-run should do
/// it. The exit status of `status` is that of [`Status::exit_status`].
pub fn run(command: Command) -> u8 {
    let result = find_pid(command.pid).and_then(|pid| match command.operation {
        Operation::Show { json, watch } => show(pid, json, watch),
        Operation::Change { request, timeout } => change(pid, request, timeout),
    });
    result.unwrap_or_else(|CommandError { why, exit_status }| {
        log::print_error(&why);
        exit_status
    })
}

/// The given PID, or 1 if that is a reuse-run, or else that of the only reuse-run of this user.
fn find_pid(pid: Option<u32>) -> Result<u32, CommandError> {
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
        [] => Err("no reuse-run is running here".into()),
        _ => {
            let lines = ours.iter().map(|pid| format!("\n  {pid}  {}", procfs::command_line(*pid)));
            let lines: String = lines.collect();
            let why = format!("several reuse-run are running; add the PID of one of them:{lines}");
            Err(CommandError { why, exit_status: 2 })
        }
    }
}

/// Connects to a reuse-run of this user, or to any if this user is root.
fn connect(pid: u32) -> Result<UnixStream, CommandError> {
    let stream = UnixStream::connect_addr(&protocol::address(pid)?).map_err(|error| match error.kind() {
        ErrorKind::ConnectionRefused => format!(
            "process {pid} is not a reuse-run that can be reached (not from another PID or network namespace)"
        ),
        _ => format!("can't connect to process {pid}: {error}"),
    })?;
    // Any process can take a name in the abstract namespace. Send nothing to another user's, and believe nothing.
    let (user, peer) = (nix::unistd::geteuid().as_raw(), getsockopt(&stream, PeerCredentials)?);
    if peer.pid() as u32 != pid || (user != 0 && peer.uid() != user && peer.uid() != 0) {
        return Err(format!("process {pid} is not a reuse-run of this user").into());
    }
    Ok(stream)
}

/// Sends a request and returns what the replies are read from.
fn send(pid: u32, request: Request) -> Result<BufReader<UnixStream>, CommandError> {
    let stream = connect(pid)?;
    stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
    stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
    (&stream).write_all(&protocol::line(&Envelope { version: request.version(), request }))?;
    Ok(BufReader::new(stream))
}

fn fetch_status(pid: u32, request: Request, timeout: Duration) -> Result<Box<Status>, CommandError> {
    let mut replies = send(pid, request)?;
    replies.get_ref().set_read_timeout(Some(timeout))?;
    let mut line = Vec::new();
    replies.read_until(b'\n', &mut line).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => format!("process {pid} does not answer"),
        _ => format!("can't read the answer of process {pid}: {error}"),
    })?;
    if line.is_empty() {
        return Err(format!(
            "process {pid} closed the connection without an answer: it is another user's, or has too many clients"
        )
        .into());
    }
    match serde_json::from_slice(&line) {
        Ok(Reply::Status(status)) => Ok(status),
        Ok(Reply::Failed(why, _)) => Err(why.into()),
        Ok(Reply::Step(_) | Reply::Done(_)) => Err(format!("process {pid} sent no status").into()),
        Err(error) => Err(format!("can't read the answer of process {pid}: {error}").into()),
    }
}

fn show(pid: u32, json: bool, watch: bool) -> Result<u8, CommandError> {
    loop {
        let status = fetch_status(pid, Request::Status, REPLY_TIMEOUT)?;
        let text = if json { serde_json::to_string(&status)? + "\n" } else { status.to_string() };
        // Write over the last status: clear to the end of each line, and everything below.
        let redraw = watch && !json && io::stdout().is_terminal();
        let text = if redraw { format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")) } else { text };
        let shown = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
        if !watch || shown.is_err() {
            return Ok(status.exit_status());
        }
        thread::sleep(WATCH_INTERVAL);
    }
}

/// Sends a request and waits until it is done.
fn change(pid: u32, request: Request, timeout: Option<Duration>) -> Result<u8, CommandError> {
    let begun = Instant::now();
    let mut replies = send(pid, request)?;
    let mut screen = Screen::new(pid);
    let mut has_answered = false;
    // A time-out can interrupt a line: its beginning stays here.
    let mut line = Vec::new();
    loop {
        let elapsed = begun.elapsed();
        if let Some(timeout) = timeout.filter(|timeout| elapsed >= *timeout) {
            let timeout = humantime::format_duration(timeout);
            return Err(format!(
                "not finished after {timeout} (see --timeout); it continues in the background"
            )
            .into());
        }
        if !has_answered && elapsed >= REPLY_TIMEOUT {
            return Err(format!("process {pid} does not answer").into());
        }
        let reply_timeout = (!has_answered).then_some(REPLY_TIMEOUT);
        let left = [timeout, reply_timeout].into_iter().flatten().map(|limit| limit - elapsed);
        replies.get_ref().set_read_timeout(left.chain(screen.interval()).min())?;
        match replies.read_until(b'\n', &mut line) {
            Ok(0) => {
                return Err(format!(
                    "process {pid} has ended, or refused this command: it is another user's, or has too many clients"
                )
                .into());
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                screen.draw();
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        has_answered = true;
        screen.clear();
        match serde_json::from_slice(&std::mem::take(&mut line))? {
            Reply::Step(step) => print(&step),
            Reply::Done(text) => {
                print(&text);
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

/// After the last reply to `stop` the process ends. Its port is free only then.
fn wait_for_end_of_file(replies: &mut BufReader<UnixStream>) {
    let _ = replies.get_ref().set_read_timeout(Some(REPLY_TIMEOUT));
    let _ = io::copy(replies, &mut io::sink());
}

fn print(text: &str) {
    let _ = writeln!(io::stdout(), "{text}"); // the reader may have closed it, as head(1) does
}

/// At a terminal: a line for each worker below the steps, drawn again while time passes, removed at the end.
struct Screen {
    pid: u32,
    is_terminal: bool,
    /// How many lines it shows now.
    lines: usize,
}

impl Screen {
    fn new(pid: u32) -> Self {
        Self { pid, is_terminal: io::stdout().is_terminal(), lines: 0 }
    }

    fn interval(&self) -> Option<Duration> {
        self.is_terminal.then_some(REDRAW_INTERVAL)
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
        let Ok(status) = fetch_status(self.pid, Request::Brief, REDRAW_INTERVAL) else { return };
        self.clear();
        let line = |worker: &WorkerStatus| {
            let WorkerStatus { slot, pid, generation, state, .. } = worker;
            let pid = pid.map_or("no process".to_owned(), |pid| format!("pid {pid}"));
            let since = worker.seconds.map_or(String::new(), |seconds| format!(" for {}", span(seconds)));
            format!("  worker {slot} ({pid}, generation {generation}): {state}{since}\n")
        };
        let text: String = status.workers.iter().map(line).collect();
        self.lines = status.workers.len();
        let _ = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.clear();
    }
}
