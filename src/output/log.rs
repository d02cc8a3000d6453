//! The log, on stderr. A write never makes reuse-run wait, even if the reader of stderr is slow, stopped or gone.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock};

use env_logger::{Builder, Env, Target};

use crate::output::sink::{Output, Sink, Stream};

/// With --label: the output of the workers' stderr. The log uses it too, so that it never cuts a line of theirs.
static SHARED: OnceLock<Arc<Mutex<Output>>> = OnceLock::new();

/// From now on the log is written through this output.
pub fn write_through(output: Arc<Mutex<Output>>) {
    let _ = SHARED.set(output);
}

/// Starts the log. RUST_LOG sets the level, `info` by default.
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

/// Prints on stderr why a command failed.
pub fn print_error(why: &str) {
    let _ = writeln!(io::stderr(), "reuse-run: {why}");
}

/// stderr. A line that can't be written at once is lost, and counted.
struct Log {
    stderr: Option<Sink>,
    lost: usize,
}

impl Log {
    fn write_line(&self, line: &[u8]) -> io::Result<()> {
        if let Some(output) = SHARED.get() {
            // There is one thread, so it is never locked here; but never wait for it either.
            return output.try_lock().map_err(|_| io::ErrorKind::WouldBlock)?.log(line);
        }
        let stderr = self.stderr.as_ref().ok_or(io::ErrorKind::NotFound)?;
        // A line that was written in part counts as lost: its rest must not come before the next line.
        if stderr.write(line)? == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
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
