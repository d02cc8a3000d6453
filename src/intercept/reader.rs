//! Reads workers' memory and follows their paths, in another process: what is read may lie in a file system that doesn't answer,
//! and who waits for that can wait for ever.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::ids::WorkerId;
use crate::intercept::options;
use crate::kernel::jobs::Jobs;
use crate::kernel::{procfs, sys};
use crate::pool::paths::SocketPath;

/// Answers questions about a call of a worker, which has this id of the kernel's.
pub type Reader = Jobs<WorkerId, u64, Question>;

/// # Errors
/// When there is no file descriptor left.
pub fn start() -> io::Result<Reader> {
    Jobs::new(c"reuse-run-read", answer)
}

/// What can be asked about a thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// Up to `len` bytes of its memory.
    Memory { tid: i32, address: u64, len: u64 },
    /// The kernel's name for the protocol of its socket.
    Protocol { tid: i32, fd: u32 },
    /// See [`SocketPath::resolve`]. The answer is what there is, a [`Found`], and the path.
    Place { tid: i32, from: Option<u32>, path: Vec<u8> },
    /// The capabilities of its program file: eight bytes.
    Capabilities { tid: i32 },
    /// Write into its memory that a socket doesn't listen: see [`options::deny_listening`].
    DenyListening { tid: i32, id: u64, value: u64, len: u64 },
}

/// What there is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Nothing,
    Socket,
    Other,
}

/// The answer to [`Question::Place`].
pub fn parse_place(mut answer: Vec<u8>) -> Option<(Found, SocketPath)> {
    let found = match answer.pop()? {
        0 => Found::Nothing,
        1 => Found::Socket,
        _ => Found::Other,
    };
    Some((found, SocketPath::resolved(std::ffi::OsString::from_vec(answer).into())))
}

fn answer(question: Question, notify_fd: Option<BorrowedFd>) -> io::Result<Vec<u8>> {
    match question {
        Question::Memory { tid, address, len } => procfs::memory(Pid::from_raw(tid), address, len as usize),
        Question::Protocol { tid, fd } => {
            procfs::socket_protocol(Pid::from_raw(tid), fd).map(String::into_bytes)
        }
        Question::Place { tid, from, path } => {
            let path = PathBuf::from(std::ffi::OsString::from_vec(path));
            let place = SocketPath::resolve(Pid::from_raw(tid), from, &path);
            let place = place.ok_or(io::Error::from_raw_os_error(libc::ENOENT))?;
            let found = match fs::symlink_metadata(place.path()) {
                Ok(file) if file.file_type().is_socket() => Found::Socket,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Found::Nothing,
                _ => Found::Other,
            };
            let mut bytes = place.path().to_owned().into_os_string().into_vec();
            bytes.push(found as u8);
            Ok(bytes)
        }
        Question::Capabilities { tid } => {
            procfs::program_capabilities(Pid::from_raw(tid)).map(|set| set.to_ne_bytes().to_vec())
        }
        Question::DenyListening { tid, id, value, len } => {
            let notify_fd = notify_fd.ok_or(io::ErrorKind::InvalidInput)?;
            let still_waits = || sys::seccomp_notif_id_valid(notify_fd, id);
            options::deny_listening(Pid::from_raw(tid), still_waits, value, len).map(|()| Vec::new())
        }
    }
}
