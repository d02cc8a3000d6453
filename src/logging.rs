//! The log, on stderr. Whatever becomes of stderr, writing to it never makes the wrapper wait.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Mutex, PoisonError};

use env_logger::{Builder, Env, Target};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Logs what RUST_LOG asks for, `info` and above without it.
pub fn start() {
    let pid = std::process::id();
    Builder::from_env(Env::default().default_filter_or("info"))
        .format(move |out, record| match record.level() {
            log::Level::Info => writeln!(out, "reuse-run[{pid}]: {}", record.args()),
            level => writeln!(out, "reuse-run[{pid}]: {}: {}", level.as_str().to_lowercase(), record.args()),
        })
        .target(Target::Pipe(Box::new(Stderr::new())))
        .init();
}

/// Says on stderr why a command was of no use.
pub fn complain(why: &str) {
    let _ = writeln!(io::stderr(), "reuse-run: {why}");
}

/// Lines of the log that wait for the end of another line, if there is one.
static HELD: Mutex<Option<Vec<u8>>> = Mutex::new(None);
/// No more of them are kept, in bytes.
const MOST_HELD: usize = 64 * 1024;

/// From now on lines of the log wait for [`release`].
pub fn hold() {
    HELD.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
}

/// The lines that have waited; from now on they don't.
pub fn release() -> Vec<u8> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default()
}

/// stderr, to which a line is written at once or not at all.
struct Stderr {
    /// stderr opened anew and non-blocking. To set O_NONBLOCK on stderr itself would set it for the
    /// workers too, and for whoever else has the same pipe or terminal.
    own: Option<File>,
    lost: usize,
}

impl Stderr {
    fn new() -> Self {
        // A regular file never makes a writer wait, and opened anew it would have an offset of its own.
        let own = std::fs::metadata("/proc/self/fd/2").and_then(|metadata| {
            let kind = metadata.file_type();
            if !kind.is_fifo() && !kind.is_char_device() {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
            OpenOptions::new().write(true).custom_flags(flags).open("/proc/self/fd/2")
        });
        Self { own: own.ok(), lost: 0 }
    }

    fn write_line(&self, line: &[u8]) -> io::Result<()> {
        match &self.own {
            Some(file) => whole((&mut &*file).write(line)?, line),
            None => {
                let stderr = io::stderr();
                if !is_writable(stderr.as_fd()) {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                whole(stderr.lock().write(line)?, line)
            }
        }
    }
}

/// Half a line is as good as none, and its other half would only spoil the next.
fn whole(written: usize, line: &[u8]) -> io::Result<()> {
    if written == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn is_writable(fd: BorrowedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

impl Write for Stderr {
    /// Takes one line, which is what env_logger writes at a time.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(held) = &mut *HELD.lock().unwrap_or_else(PoisonError::into_inner) {
            match held.len() + line.len() <= MOST_HELD {
                true => held.extend_from_slice(line),
                false => self.lost += 1,
            }
            return Ok(line.len());
        }
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
