//! NOTIFY_SOCKET: a datagram socket that the worker writes to as it would to systemd's (sd_notify(3)).

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::rc::Rc;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, getsockname, socket};
use nix::unistd::{self, Pid};

use crate::kernel::inbox::Inbox;
use crate::kernel::procfs;
use crate::worker::ready::folder::Folder;
use crate::worker::ready::{MAX_BYTES_PER_TURN, Message};

/// In bytes; the rest of a longer message is lost.
const MAX_MESSAGE_LENGTH: usize = 4096;

/// A worker's own socket. Its name is a path, because Puma ends when it is given an abstract name. Where no
/// folder can be written to, the name is abstract all the same (unix(7)).
#[derive(Debug)]
pub struct NotifySocket {
    inbox: Inbox,
    name: String,
    path: Option<(Rc<Folder>, PathBuf)>,
}

impl NotifySocket {
    /// A socket in this folder, or in a new one if there is none or somebody has removed it.
    pub fn new(folder: &mut Option<Rc<Folder>>) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        let bind_in = |folder: &Rc<Folder>| Some((Rc::clone(folder), folder.bind(&socket).ok()?));
        let path = folder.as_ref().and_then(bind_in).or_else(|| {
            *folder = Folder::new().ok().map(Rc::new);
            folder.as_ref().and_then(bind_in)
        });
        let name = match path.as_ref().and_then(|(_, path)| path.to_str()) {
            Some(path) => path.to_owned(),
            None => {
                // Bound without a name, it gets a unique one from the kernel ("autobind").
                bind(socket.as_raw_fd(), &UnixAddr::new_unnamed())?;
                let address: UnixAddr = getsockname(socket.as_raw_fd())?;
                let name = address.as_abstract().map(String::from_utf8_lossy);
                format!("@{}", name.ok_or(io::ErrorKind::AddrNotAvailable)?)
            }
        };
        Ok(Self { inbox: Inbox::datagrams(socket)?, name, path })
    }

    /// The value of NOTIFY_SOCKET.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads the messages of this user, of root, and of the worker's processes, whatever their user. Drops all
    /// others. BARRIER=1 comes with a descriptor that is closed when all earlier messages have been read.
    pub fn read(&mut self, worker: Pid) -> Vec<Message> {
        let mut messages = Vec::new();
        let mut bytes = [0; MAX_MESSAGE_LENGTH];
        for _ in 0..MAX_BYTES_PER_TURN / MAX_MESSAGE_LENGTH {
            let Ok(received) = self.inbox.receive_all(&mut bytes) else { break };
            if received.sender.is_some_and(|sender| is_accepted(&sender, worker)) {
                messages.extend(parse(&String::from_utf8_lossy(&bytes[..received.length])));
            }
        }
        messages
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        self.path.iter().for_each(|(folder, path)| folder.remove(path));
    }
}

impl AsRef<Inbox> for NotifySocket {
    fn as_ref(&self) -> &Inbox {
        &self.inbox
    }
}

fn is_accepted(sender: &libc::ucred, worker: Pid) -> bool {
    sender.uid == unistd::geteuid().as_raw()
        || sender.uid == 0
        || procfs::is_of_tree(Pid::from_raw(sender.pid), worker)
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
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixDatagram;
    use std::path::Path;

    use super::*;

    #[test]
    fn a_notification_is_read_line_by_line() {
        let expected = [Message::Status("warm = yes".to_owned()), Message::Ready, Message::Stopping];
        assert_eq!(parse("STATUS=warm = yes\nREADY=1\nMAINPID=7\nSTOPPING=1\nREADY=0"), expected);
    }

    #[test]
    fn the_notify_socket_is_where_nobody_can_list_it_and_nothing_is_left_behind() {
        let mut folder = None;
        let mut notify = NotifySocket::new(&mut folder).unwrap();
        let path = PathBuf::from(notify.name());
        let parent = path.parent().unwrap().to_owned();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&parent), mode(&path)), (0o711, 0o666));
        assert!(!fs::read_to_string("/proc/net/unix").unwrap().contains(notify.name()));
        UnixDatagram::unbound().unwrap().send_to(b"READY=1", &path).unwrap();
        assert_eq!(notify.read(Pid::this()), [Message::Ready]);
        drop(notify);
        assert_eq!(fs::read_dir(&parent).unwrap().count(), 0);
        fs::remove_dir(&parent).unwrap(); // as somebody who cleans up
        drop(NotifySocket::new(&mut folder).unwrap());
        assert!(folder.take().is_some() && !parent.exists());
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
