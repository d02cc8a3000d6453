//! NOTIFY_SOCKET: a datagram socket that the worker writes to as it would to systemd's (sd_notify(3)).

use std::env;
use std::fs::{self, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, UnixCredentials, bind,
    getsockname, recvmsg, setsockopt, socket, sockopt,
};
use nix::unistd::{self, Pid};
use socket2::SockRef;

use crate::kernel::procfs;
use crate::kernel::sys;
use crate::worker::ready::{MAX_BYTES_PER_TURN, Message};

/// In bytes; the rest of a longer message is lost.
const MAX_MESSAGE_LENGTH: usize = 4096;

/// The fds that one message can carry (SCM_MAX_FD). If the buffer had room for fewer, the kernel would cut
/// the list off, and nix would not return the fds that came: they would stay open.
const MAX_FDS: usize = 253;

/// A worker's own socket. Its name is a path, because Puma ends when it is given an abstract name. Where no
/// folder can be written to, the name is abstract all the same (unix(7)).
#[derive(Debug)]
pub struct NotifySocket {
    socket: OwnedFd,
    name: String,
}

impl NotifySocket {
    pub fn new() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        // Every user can find the socket and send to it, so each message has to tell its sender.
        setsockopt(&socket, sockopt::PassCred, &true)?;
        if let Some(name) = bind_to_path(&socket) {
            return Ok(Self { name, socket });
        }
        // Bound without a name, it gets a unique one from the kernel ("autobind").
        bind(socket.as_raw_fd(), &UnixAddr::new_unnamed())?;
        let address: UnixAddr = getsockname(socket.as_raw_fd())?;
        let name =
            address.as_abstract().map(String::from_utf8_lossy).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { name: format!("@{name}"), socket })
    }

    /// The value of NOTIFY_SOCKET.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads the messages of this user, of root, and of the worker's processes, whatever their user. Drops all
    /// others.
    pub fn read(&self, worker: Pid) -> Vec<Message> {
        let mut messages = Vec::new();
        for _ in 0..MAX_BYTES_PER_TURN / MAX_MESSAGE_LENGTH {
            let mut bytes = [0; MAX_MESSAGE_LENGTH];
            let mut space = nix::cmsg_space!(UnixCredentials, [RawFd; MAX_FDS]);
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            let Ok(message) = recvmsg::<()>(self.socket.as_raw_fd(), &mut buffers, Some(&mut space), flags)
            else {
                break;
            };
            let mut may_send = false;
            for control in message.cmsgs().into_iter().flatten() {
                match control {
                    ControlMessageOwned::ScmCredentials(sender) => may_send = is_accepted(&sender, worker),
                    // BARRIER=1 comes with an fd that the reader closes when it has read all earlier
                    // messages. No other message that we know needs an fd.
                    ControlMessageOwned::ScmRights(fds) => {
                        for fd in fds.into_iter().map(sys::owned_fd) {
                            // Anyone can send a socket that lingers. To close it would block for that long.
                            let _ = SockRef::from(&fd).set_linger(None);
                        }
                    }
                    _ => {}
                }
            }
            let count = message.bytes;
            if may_send {
                messages.extend(parse(&String::from_utf8_lossy(&bytes[..count])));
            }
        }
        messages
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        if self.name.starts_with('/') {
            let _ = fs::remove_file(&self.name);
        }
    }
}

impl AsFd for NotifySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn is_accepted(sender: &UnixCredentials, worker: Pid) -> bool {
    sender.uid() == unistd::geteuid().as_raw()
        || sender.uid() == 0
        || procfs::is_of_tree(Pid::from_raw(sender.pid()), worker)
}

/// Gives a socket a path that nothing else has, if that is possible.
fn bind_to_path(socket: &OwnedFd) -> Option<String> {
    // Random: a wrapper that was killed leaves its paths behind.
    let name = format!("reuse-run-notify-{:016x}", RandomState::new().hash_one(()));
    let path = env::temp_dir().join(name);
    let path = path.to_str().filter(|path| path.starts_with('/'))?.to_owned();
    bind(socket.as_raw_fd(), &UnixAddr::new(path.as_str()).ok()?).ok()?;
    // For a worker that has become another user.
    let _ = fs::set_permissions(&path, Permissions::from_mode(0o666));
    Some(path)
}

fn parse(text: &str) -> Vec<Message> {
    let message = |line: &str| match line.split_once('=') {
        Some(("READY", "1")) => Some(Message::Ready),
        Some(("STOPPING", "1")) => Some(Message::Stopping),
        Some(("STATUS", status)) => Some(Message::Status(status.to_owned())),
        _ => None,
    };
    text.lines().filter_map(message).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_is_read_line_by_line() {
        let expected = [Message::Status("warm = yes".to_owned()), Message::Ready, Message::Stopping];
        assert_eq!(parse("STATUS=warm = yes\nREADY=1\nMAINPID=7\nSTOPPING=1\nREADY=0"), expected);
    }

    #[test]
    fn a_message_to_the_notify_socket_is_read_and_a_barrier_answered() {
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
        assert_eq!(notify.read(Pid::this()), [Message::Ready]);
        assert_eq!(unistd::read(&barrier, &mut [0]), Ok(0), "the wrapper has closed its copy");
        let path = notify.name().to_owned();
        drop(notify);
        assert!(!fs::exists(path).unwrap(), "nothing is left behind");
    }

    /// Every user of the machine can find the socket.
    mod fuzz {
        use proptest::prelude::*;

        use super::*;

        /// Lines as programs write them, and others.
        fn line() -> impl Strategy<Value = String> {
            prop_oneof![
                Just("READY=1".to_owned()),
                Just("STOPPING=1".to_owned()),
                "STATUS=[^\r\n]{0,20}",
                "(READY|STOPPING|MAINPID|X)[= ]?[01]{0,2}",
                "[^\r\n]{0,20}",
            ]
        }

        proptest! {
            #[test]
            fn a_message_means_what_its_lines_mean_one_by_one(lines in proptest::collection::vec(line(), 0..8)) {
                let text = lines.join("\n");
                let expected: Vec<Message> = lines.iter().filter_map(|line| match line.as_str() {
                    "READY=1" => Some(Message::Ready),
                    "STOPPING=1" => Some(Message::Stopping),
                    _ => line.strip_prefix("STATUS=").map(|status| Message::Status(status.to_owned())),
                }).collect();
                prop_assert_eq!(parse(&text), expected);
            }

            #[test]
            fn of_any_bytes_no_more_is_kept_than_was_sent(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
                let text = String::from_utf8_lossy(&bytes);
                let lengths = parse(&text).into_iter().map(|message| match message {
                    Message::Status(status) => status.len() + "STATUS=".len(),
                    Message::Ready | Message::Stopping | Message::Closed => "READY=1".len(),
                });
                prop_assert!(lengths.sum::<usize>() <= text.len());
            }
        }
    }
}
