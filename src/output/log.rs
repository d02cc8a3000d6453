//! The log, on stderr. A write never makes reuse-run wait, even if the reader of stderr is slow, stopped or gone.

use std::ffi::OsString;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use env_logger::{Builder, Target};
use log::Level;

use crate::output::sink::{Output, Sink, Stream};
use crate::words::escaped;

/// How the log is written when it must not wait.
#[derive(Debug)]
enum Way {
    /// A line that can't be written at once is lost, and counted.
    Alone(Mutex<Sink>),
    /// With --label: the output of the workers' stderr. The log uses it too, so that it never cuts a line of theirs.
    Shared(Arc<Mutex<Output>>),
}

/// Unset as long as the log may wait.
static WAY: OnceLock<Way> = OnceLock::new();

/// How long reuse-run waits in the end for a slow reader.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// From now on the log is written through this output.
pub fn write_through(output: Arc<Mutex<Output>>) {
    let _ = WAY.set(Way::Shared(output));
}

/// From now on no line of the log waits for its reader.
///
/// # Errors
/// When there is no process or file descriptor left.
pub fn never_wait() -> io::Result<()> {
    let _ = WAY.set(Way::Alone(Mutex::new(Sink::new(Stream::Stderr)?)));
    Ok(())
}

/// Waits for what another process has yet to write. After this nothing is logged.
pub fn finish() {
    let until = Instant::now() + FINISH_TIMEOUT;
    match WAY.get() {
        Some(Way::Alone(sink)) => sink.lock().unwrap_or_else(PoisonError::into_inner).finish(until),
        Some(Way::Shared(output)) => output.lock().unwrap_or_else(PoisonError::into_inner).finish(until),
        None => {}
    }
}

/// Starts the log. `level` is the value of REUSE_RUN_LOG: error, warn, info or debug; `info` by default. (RUST_LOG is for the
/// workers, which may be written in Rust.)
///
/// # Errors
/// What else it is, in one line.
pub fn start(level: Option<OsString>) -> Result<(), String> {
    const LEVELS: [Level; 4] = [Level::Error, Level::Warn, Level::Info, Level::Debug];
    let pid = std::process::id();
    let level = level.filter(|level| !level.is_empty()).map(|level| level.to_string_lossy().into_owned());
    let named = |text: &str| LEVELS.into_iter().find(|level| level.as_str().eq_ignore_ascii_case(text));
    let known = level.as_deref().map_or(Some(Level::Info), named);
    Builder::new()
        .filter_level(known.unwrap_or(Level::Info).to_level_filter())
        .format(move |out, record| {
            let text = escaped(&record.args().to_string()); // paths and much else come from others
            match record.level() {
                Level::Info => writeln!(out, "reuse-run[{pid}]: {text}"),
                level => writeln!(out, "reuse-run[{pid}]: {}: {text}", level.as_str().to_lowercase()),
            }
        })
        .target(Target::Pipe(Box::new(Log { lost: 0 })))
        .init();
    let wrong = level.filter(|_| known.is_none());
    wrong
        .map_or(Ok(()), |text| Err(format!("REUSE_RUN_LOG: {text:?} is none of error, warn, info and debug")))
}

/// Prints on stderr why a command failed.
pub fn print_error(why: &str) {
    let _ = writeln!(io::stderr(), "reuse-run: {why}");
}

/// stderr.
struct Log {
    lost: usize,
}

impl Log {
    fn write_line(&self, line: &[u8]) -> io::Result<()> {
        let locked = io::Error::from(io::ErrorKind::WouldBlock);
        // There is one thread, so nothing is ever locked here; but never wait for it either.
        let written = match WAY.get() {
            Some(Way::Shared(output)) => return output.try_lock().map_err(|_| locked)?.log(line),
            Some(Way::Alone(sink)) => sink.try_lock().map_err(|_| locked)?.write(line)?,
            None => return io::stderr().write_all(line),
        };
        // A line that was written in part counts as lost: its rest must not come before the next line.
        if written == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

impl Write for Log {
    /// Takes one line: env_logger writes a record in one call.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lost > 0 {
            let note =
                format!("reuse-run[{}]: {} lines of the log were lost\n", std::process::id(), self.lost);
            if self.write_line(note.as_bytes()).is_ok() {
                self.lost = 0;
            }
        }
        if self.lost > 0 || self.write_line(line).is_err() {
            self.lost += 1;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
