//! The commands to a running reuse-run.

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::thread;
use std::time::{Duration, Instant};

use crate::operate::find::{self, CommandError, Target, Which};
use crate::operate::protocol::{self, Envelope, MAX_REQUEST, Reply, Request};
use crate::operate::replies::{NoReply, Replies};
use crate::operate::status::{self, Status, WorkerStatus, span};
use crate::output::log;
use crate::words::escaped;

/// A command, and the reuse-run that it is for.
#[derive(Debug)]
pub struct Command {
    pub which: Option<Which>,
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

/// Runs a command and returns its exit status: 0 if it was done, 1 if not, 2 if it isn't clear which reuse-run should do
/// it. The exit status of `status` is that of [`Status::exit_status`].
pub fn run(command: Command) -> u8 {
    let result = find::find(command.which.as_ref()).and_then(|found| match command.operation {
        Operation::Show { json: false, watch } => {
            show(watch, watch && io::stdout().is_terminal(), || overview(&found))
        }
        Operation::Show { json: true, watch } => show(watch, false, || json(&found)),
        Operation::Change { request, timeout } => change(find::only(&found)?, request, timeout),
    });
    result.unwrap_or_else(|CommandError { why, exit_status }| {
        log::print_error(&why);
        exit_status
    })
}

/// Sends a request and returns what the replies are read from.
fn send(target: Target, request: Request) -> Result<Replies, CommandError> {
    let line = protocol::line(&Envelope { version: request.version(), request });
    if line.len() > MAX_REQUEST {
        let limit = MAX_REQUEST / 1024;
        return Err(format!("the command is longer than {limit} KiB: put it into a script").into());
    }
    let stream = target.connect()?;
    stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
    match (&stream).write_all(&line) {
        // It is closed already. The reason may have been sent before.
        Err(error) if !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
            Err(error.into())
        }
        _ => Ok(Replies::new(stream)),
    }
}

/// What it means that no reply comes.
fn no_reply(pid: u32, no_reply: NoReply) -> CommandError {
    match no_reply {
        NoReply::Late => format!("process {pid} does not answer").into(),
        NoReply::Closed => {
            format!("process {pid} has ended, or closed the connection without an answer").into()
        }
        NoReply::Failed(why) => format!("can't read the answer of process {pid}: {}", escaped(&why)).into(),
    }
}

fn fetch_status(target: Target, request: Request, timeout: Duration) -> Result<Box<Status>, CommandError> {
    let pid = target.pid;
    let deadline = Instant::now() + timeout;
    match send(target, request)?.next(Some(deadline)).map_err(|none| no_reply(pid, none))? {
        Reply::Status(status) => Ok(status),
        Reply::Failed(why, _) => Err(escaped(&why).into()),
        Reply::Step(_) | Reply::Done(_) => Err(format!("process {pid} sent no status").into()),
    }
}

/// A status as JSON, and its exit status.
fn json(found: &[Target]) -> Result<(String, u8), CommandError> {
    let status = fetch_status(find::only(found)?, Request::Status, REPLY_TIMEOUT)?;
    Ok((status.to_json()? + "\n", status.exit_status()))
}

/// The workers of one reuse-run, or a line for each of several. The exit status is the highest of theirs, or 1 if one
/// doesn't answer.
fn overview(found: &[Target]) -> Result<(String, u8), CommandError> {
    if let [target] = found {
        let status = fetch_status(*target, Request::Status, REPLY_TIMEOUT)?;
        return Ok((status.to_string(), status.exit_status()));
    }
    let fetch = |target: &Target| (target.pid, fetch_status(*target, Request::Brief, REPLY_TIMEOUT).ok());
    let all: Vec<(u32, Option<Box<Status>>)> = found.iter().map(fetch).collect();
    let exit_status = |(_, status): &(u32, Option<Box<Status>>)| Some(status.as_ref()?.exit_status());
    let exit_statuses: Option<Vec<u8>> = all.iter().map(exit_status).collect();
    Ok((status::table_of(&all), exit_statuses.and_then(|all| all.into_iter().max()).unwrap_or(1)))
}

/// Prints a status once, or again and again, and then over the last one if `redraws`.
fn show(
    watch: bool,
    redraws: bool,
    fetch: impl Fn() -> Result<(String, u8), CommandError>,
) -> Result<u8, CommandError> {
    loop {
        let (text, exit_status) = fetch()?;
        // Clear to the end of each line, and everything below.
        let text = if redraws { format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")) } else { text };
        let shown = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
        match shown {
            Ok(()) if watch => thread::sleep(WATCH_INTERVAL),
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                return Err(format!("can't write the status: {error}").into());
            }
            _ => return Ok(exit_status), // it is enough for the reader
        }
    }
}

/// Sends a request and waits until it is done.
fn change(target: Target, request: Request, timeout: Option<Duration>) -> Result<u8, CommandError> {
    let begun = Instant::now();
    let mut replies = send(target, request)?;
    let mut screen = Screen::new(target);
    let end = timeout.map(|timeout| begun + timeout);
    let mut first_reply = Some(begun + REPLY_TIMEOUT);
    loop {
        let redraw = screen.interval().map(|interval| Instant::now() + interval);
        let deadline = [end, first_reply, redraw].into_iter().flatten().min();
        let reply = match replies.next(deadline) {
            Ok(reply) => reply,
            Err(NoReply::Late) => {
                let now = Instant::now();
                if let Some(timeout) = timeout.filter(|timeout| now >= begun + *timeout) {
                    let timeout = humantime::format_duration(timeout);
                    return Err(match first_reply {
                        None => {
                            format!(
                                "not finished after {timeout} (see --timeout); it continues in the background"
                            )
                        }
                        Some(_) => {
                            format!("process {} has not answered after {timeout} (see --timeout)", target.pid)
                        }
                    }
                    .into());
                }
                if first_reply.is_some_and(|at| now >= at) {
                    return Err(no_reply(target.pid, NoReply::Late));
                }
                screen.draw();
                continue;
            }
            Err(none) => return Err(no_reply(target.pid, none)),
        };
        first_reply = None;
        screen.clear();
        match reply {
            Reply::Step(step) => print(&step),
            Reply::Done(text) => {
                print(&text);
                replies.wait_for_end(REPLY_TIMEOUT);
                return Ok(0);
            }
            Reply::Failed(why, details) => {
                details.iter().for_each(|detail| eprintln!("  {}", escaped(detail)));
                replies.wait_for_end(REPLY_TIMEOUT);
                return Err(escaped(&why).into());
            }
            Reply::Status(_) => {}
        }
        screen.draw();
    }
}

fn print(text: &str) {
    let _ = writeln!(io::stdout(), "{}", escaped(text)); // the reader may have closed it, as head(1) does
}

/// At a terminal: a line for each worker below the steps, drawn again while time passes, removed at the end.
struct Screen {
    target: Target,
    is_terminal: bool,
    /// How many lines it shows now.
    lines: usize,
}

impl Screen {
    fn new(target: Target) -> Self {
        Self { target, is_terminal: io::stdout().is_terminal(), lines: 0 }
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
        let Ok(status) = fetch_status(self.target, Request::Brief, REDRAW_INTERVAL) else { return };
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
