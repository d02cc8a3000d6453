//! The log, on stderr. Whatever becomes of stderr, writing to it never makes the wrapper wait.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock};

use env_logger::{Builder, Env, Target};

use crate::output::sink::{Output, Sink, Stream};

/// Where the log goes besides what workers write to stderr, if that comes by here: else it could come amid a
/// line of theirs.
static SHARED: OnceLock<Arc<Mutex<Output>>> = OnceLock::new();

/// From now on the log goes through this output.
pub fn go_through(output: Arc<Mutex<Output>>) {
    let _ = SHARED.set(output);
}

/// Logs what RUST_LOG asks for, `info` and above without it.
pub fn start() {
    let pid = std::process::id();
    Builder::from_env(Env::default().default_filter_or("info"))
        .format(move |out, record| match record.level() {
            log::Level::Info => writeln!(out, "reuse-run[{pid}]: {}", record.args()),
            level => writeln!(out, "reuse-run[{pid}]: {}: {}", level.as_str().to_lowercase(), record.args()),
        })
        .target(Target::Pipe(Box::new(Log { stderr: Sink::new(Stream::Stderr).ok(), lost: 0 })))
        .init();
}

/// Says on stderr why a command was of no use.
pub fn print_error(why: &str) {
    let _ = writeln!(io::stderr(), "reuse-run: {why}");
}

/// stderr, to which a line is written at once or not at all.
struct Log {
    stderr: Option<Sink>,
    lost: usize,
}

impl Log {
    fn write_line(&self, line: &[u8]) -> io::Result<()> {
        if let Some(output) = SHARED.get() {
            // Nobody else has it locked, as there is one thread; if it were so, this must not wait.
            return output.try_lock().map_err(|_| io::ErrorKind::WouldBlock)?.log(line);
        }
        let stderr = self.stderr.as_ref().ok_or(io::ErrorKind::NotFound)?;
        // Half a line is as good as none, and its other half would only spoil the next.
        if stderr.write(line)? == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

impl Write for Log {
    /// Takes one line, which is what env_logger writes at a time.
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
