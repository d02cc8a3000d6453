//! The ways a worker says that it is ready: a byte on a pipe, a message on Node's IPC channel, or one to
//! a socket as systemd has it. Reading them never blocks.

use std::env;
use std::fs::{self, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, bind, getsockname, recvmsg,
    setsockopt, socket, sockopt,
};
use nix::unistd::{self, Pid};
use socket2::SockRef;

use crate::kernel::procfs;
use crate::kernel::sys;
use crate::lines::{Lines, TooLong};

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    Ready,
    /// How it is, in its own words.
    Status(String),
    /// That it is about to end.
    Stopping,
    /// Nothing any more: the channel is closed.
    Closed,
}

/// No more than this is read at once, so that a worker that floods its channel doesn't hold up others.
const MOST_AT_ONCE: usize = 64 * 1024;

/// No line on Node's channel that means something is longer, in bytes.
const MAX_CHANNEL_LINE: usize = 64;

/// The reading end of the pipe whose other end a worker has as READY_FD.
#[derive(Debug)]
pub struct ReadyPipe(OwnedFd);

impl ReadyPipe {
    /// A pipe, and the end that is for the worker. Both are close-on-exec.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self(read), write))
    }

    /// Any byte means ready; what else is written at once goes with it.
    pub fn read(&self) -> Vec<Said> {
        let mut bytes = [0; 512];
        match unistd::read(&self.0, &mut bytes) {
            Ok(0) => vec![Said::Closed],
            Ok(_) => vec![Said::Ready],
            Err(_) => Vec::new(),
        }
    }
}

impl AsFd for ReadyPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The wrapper's end of the channel that Node's `process.send` writes to: NODE_CHANNEL_FD, a stream socket
/// with one JSON value a line (lib/internal/child_process/serialization.js). It stays open as long as the
/// worker lives, since its end makes `process.emit('disconnect')`.
#[derive(Debug)]
pub struct NodeChannel {
    stream: UnixStream,
    lines: Lines,
}

impl NodeChannel {
    /// A channel, and the end that is for the worker.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, its) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self { stream: ours, lines: Lines::new(MAX_CHANNEL_LINE, TooLong::Drop) }, its.into()))
    }

    /// The string "ready" is what PM2 waits for, "online" what naught does. All else is ignored.
    pub fn read(&mut self) -> Vec<Said> {
        let mut bytes = vec![0; MOST_AT_ONCE];
        match self.stream.read(&mut bytes) {
            Ok(0) => vec![Said::Closed],
            Ok(count) => {
                let mut is_ready = false;
                self.lines.take(&bytes[..count], &mut |line: &[u8]| {
                    is_ready |= matches!(line, b"\"ready\"" | b"\"online\"");
                });
                if is_ready { vec![Said::Ready] } else { Vec::new() }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Vec::new(),
            Err(_) => vec![Said::Closed],
        }
    }
}

impl AsFd for NodeChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A worker's own NOTIFY_SOCKET (sd_notify(3)). It has a path, since Puma ends when it is given an abstract
/// name; where there is no folder to write to it has one all the same (unix(7)).
#[derive(Debug)]
pub struct NotifySocket {
    socket: OwnedFd,
    name: String,
}

impl NotifySocket {
    pub fn new() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        // Anyone can find it: whoever isn't us is not listened to.
        setsockopt(&socket, sockopt::PassCred, &true)?;
        if let Some(name) = bind_to_path(&socket) {
            return Ok(Self { name, socket });
        }
        // Bound to no name, it gets a unique one from the kernel ("autobind").
        bind(socket.as_raw_fd(), &UnixAddr::new_unnamed())?;
        let address: UnixAddr = getsockname(socket.as_raw_fd())?;
        let name =
            address.as_abstract().map(String::from_utf8_lossy).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { name: format!("@{name}"), socket })
    }

    /// What NOTIFY_SOCKET is to be.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Listens to what has the right to speak: this user, root, and the worker's own processes, whoever they
    /// have become.
    pub fn read(&self, worker: Pid) -> Vec<Said> {
        const LONGEST: usize = 4096;
        const MOST_FDS: usize = 253; // SCM_MAX_FD: of a message that is cut off, those that fit would stay open
        let mut said = Vec::new();
        for _ in 0..MOST_AT_ONCE / LONGEST {
            let mut bytes = [0; LONGEST];
            let mut space = nix::cmsg_space!(nix::sys::socket::UnixCredentials, [RawFd; MOST_FDS]);
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            let Ok(message) = recvmsg::<()>(self.socket.as_raw_fd(), &mut buffers, Some(&mut space), flags)
            else {
                break;
            };
            let mut from_us = false;
            for control in message.cmsgs().into_iter().flatten() {
                match control {
                    ControlMessageOwned::ScmCredentials(credentials) => {
                        let us = unistd::geteuid().as_raw();
                        let from = Pid::from_raw(credentials.pid());
                        from_us = credentials.uid() == us
                            || credentials.uid() == 0
                            || procfs::tree(worker).contains(&from);
                    }
                    // With BARRIER=1 comes an fd that is to be closed when all before it was read. No other
                    // message that we know needs one.
                    ControlMessageOwned::ScmRights(fds) => {
                        for fd in fds.into_iter().map(sys::owned_fd) {
                            // Anyone can send one, and to close a socket that lingers would take as long.
                            let _ = SockRef::from(&fd).set_linger(None);
                        }
                    }
                    _ => {}
                }
            }
            let count = message.bytes;
            if from_us {
                said.extend(parse_notification(&String::from_utf8_lossy(&bytes[..count])));
            }
        }
        said
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        if self.name.starts_with('/') {
            let _ = fs::remove_file(&self.name);
        }
    }
}

/// Gives a socket a path that nobody has, if it can be.
fn bind_to_path(socket: &OwnedFd) -> Option<String> {
    // Random, for what was killed has left its own behind.
    let name = format!("reuse-run-notify-{:016x}", RandomState::new().hash_one(()));
    let path = env::temp_dir().join(name);
    let path = path.to_str().filter(|path| path.starts_with('/'))?.to_owned();
    bind(socket.as_raw_fd(), &UnixAddr::new(path.as_str()).ok()?).ok()?;
    // For a worker that has become another user.
    let _ = fs::set_permissions(&path, Permissions::from_mode(0o666));
    Some(path)
}

impl AsFd for NotifySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn parse_notification(text: &str) -> Vec<Said> {
    let said = |line: &str| match line.split_once('=') {
        Some(("READY", "1")) => Some(Said::Ready),
        Some(("STOPPING", "1")) => Some(Said::Stopping),
        Some(("STATUS", status)) => Some(Said::Status(status.to_owned())),
        _ => None,
    };
    text.lines().filter_map(said).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn any_byte_means_ready_and_an_end_of_file_does_not() {
        let (pipe, worker) = ReadyPipe::new().unwrap();
        assert_eq!(pipe.read(), []);
        unistd::write(&worker, b"\n").unwrap();
        assert_eq!(pipe.read(), [Said::Ready]);
        assert_eq!(pipe.read(), []);
        drop(worker);
        assert_eq!(pipe.read(), [Said::Closed]);
    }

    #[test]
    fn on_nodes_channel_the_two_words_mean_ready_and_nothing_else_does() {
        let (mut channel, worker) = NodeChannel::new().unwrap();
        let mut worker = UnixStream::from(worker);
        let mut say = |text: &[u8]| {
            worker.write_all(text).unwrap();
            channel.read()
        };
        assert_eq!(say(b"{\"cmd\":\"NODE_HANDLE\"}\n\"started\"\n"), []);
        assert_eq!(say(&[b'x'; 3 * MAX_CHANNEL_LINE]), []);
        assert_eq!(say(b"\"ready\"\n"), [], "that was the end of a longer line");
        assert_eq!(say(b"\"rea"), []);
        assert_eq!(say(b"dy\"\n"), [Said::Ready]);
        assert_eq!(say(b"\"online\"\n"), [Said::Ready]);
        drop(worker);
        assert_eq!(channel.read(), [Said::Closed]);
    }

    #[test]
    fn a_notification_is_read_line_by_line() {
        let expected = [Said::Status("warm = yes".to_owned()), Said::Ready, Said::Stopping];
        assert_eq!(
            parse_notification("STATUS=warm = yes\nREADY=1\nMAINPID=7\nSTOPPING=1\nREADY=0"),
            expected
        );
    }

    #[test]
    fn what_is_sent_to_the_notify_socket_is_heard_and_a_barrier_answered() {
        use nix::sys::socket::{ControlMessage, sendmsg};
        let notify = NotifySocket::new().unwrap();
        let worker = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::empty(), None).unwrap();
        let address = UnixAddr::new(notify.name()).unwrap();
        let send = |text: &[u8], rights: &[RawFd]| {
            let rights = [ControlMessage::ScmRights(rights)];
            let rights = if rights[0] == ControlMessage::ScmRights(&[]) { &[][..] } else { &rights[..] };
            sendmsg(worker.as_raw_fd(), &[io::IoSlice::new(text)], rights, MsgFlags::empty(), Some(&address))
                .unwrap();
        };
        send(b"READY=1", &[]);
        let (barrier, its) = unistd::pipe().unwrap();
        send(b"BARRIER=1", &[its.as_raw_fd()]);
        drop(its);
        assert_eq!(notify.read(Pid::this()), [Said::Ready]);
        assert_eq!(unistd::read(&barrier, &mut [0]), Ok(0), "the wrapper has closed its copy");
        let path = notify.name().to_owned();
        drop(notify);
        assert!(!fs::exists(path).unwrap(), "nothing is left behind");
    }
}
