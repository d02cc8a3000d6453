//! NODE_CHANNEL_FD: the channel that Node's `process.send` writes to, a stream socket with one JSON value a
//! line (lib/internal/child_process/serialization.js).

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use crate::kernel::inbox::Inbox;
use crate::lines::{Lines, TooLong};
use crate::worker::ready::{MAX_BYTES_PER_TURN, Message};

/// Longer lines than this, in bytes, mean nothing to the wrapper.
const MAX_LINE_LENGTH: usize = 64;

/// The wrapper's end. It stays open as long as the worker lives: when it is closed, Node emits 'disconnect'.
#[derive(Debug)]
pub struct NodeChannel {
    inbox: Inbox,
    lines: Lines,
}

impl NodeChannel {
    /// A channel, and the worker's end of it.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, its) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let inbox = Inbox::stream(ours.into());
        Ok((Self { inbox, lines: Lines::new(MAX_LINE_LENGTH, TooLong::Drop) }, its.into()))
    }

    /// PM2 waits for the string "ready", naught for "online": both mean ready. Everything else is ignored.
    pub fn read(&mut self) -> Vec<Message> {
        let mut bytes = vec![0; MAX_BYTES_PER_TURN];
        match self.inbox.receive_all(&mut bytes).map(|received| received.length) {
            Ok(0) => vec![Message::Closed],
            Ok(count) => {
                let mut is_ready = false;
                self.lines.take(&bytes[..count], &mut |line: &[u8]| {
                    is_ready |= matches!(line, b"\"ready\"" | b"\"online\"");
                });
                if is_ready { vec![Message::Ready] } else { Vec::new() }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Vec::new(),
            Err(_) => vec![Message::Closed],
        }
    }
}

impl AsRef<Inbox> for NodeChannel {
    fn as_ref(&self) -> &Inbox {
        &self.inbox
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn on_nodes_channel_the_two_words_mean_ready_and_nothing_else_does() {
        let (mut channel, worker) = NodeChannel::new().unwrap();
        let mut worker = UnixStream::from(worker);
        let mut say = |text: &[u8]| {
            worker.write_all(text).unwrap();
            channel.read()
        };
        assert_eq!(say(b"{\"cmd\":\"NODE_HANDLE\"}\n\"started\"\n"), []);
        assert_eq!(say(&[b'x'; 3 * MAX_LINE_LENGTH]), []);
        assert_eq!(say(b"\"ready\"\n"), [], "that was the end of a longer line");
        assert_eq!(say(b"\"rea"), []);
        assert_eq!(say(b"dy\"\n"), [Message::Ready]);
        assert_eq!(say(b"\"online\"\n"), [Message::Ready]);
        drop(worker);
        assert_eq!(channel.read(), [Message::Closed]);
    }

    mod fuzz {
        use proptest::collection::vec;
        use proptest::prelude::*;

        use super::*;

        fn line() -> impl Strategy<Value = Vec<u8>> {
            prop_oneof![
                Just(b"\"ready\"".to_vec()),
                Just(b"\"online\"".to_vec()),
                "\"(ready|online|started)\"? ?".prop_map(String::into_bytes),
                vec(
                    prop_oneof![Just(b'x'), any::<u8>()].prop_filter("no newline", |it| *it != b'\n'),
                    0..100
                ),
            ]
        }

        proptest! {
            #[test]
            fn a_worker_is_ready_when_a_whole_line_says_so_however_it_arrives(
                lines in vec(line(), 0..8), cuts: [prop::sample::Index; 3]
            ) {
                let stream: Vec<u8> = lines.iter().flat_map(|line| [line, &b"\n"[..]].concat()).collect();
                let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
                places.extend([0, stream.len()]);
                places.sort_unstable();
                let (mut channel, worker) = NodeChannel::new().unwrap();
                let mut worker = UnixStream::from(worker);
                let mut heard = Vec::new();
                for piece in places.windows(2).map(|places| &stream[places[0]..places[1]]) {
                    worker.write_all(piece).unwrap();
                    heard.extend(channel.read());
                    prop_assert!(channel.lines.unfinished().len() <= MAX_LINE_LENGTH);
                }
                let says_ready = |line: &Vec<u8>| [&b"\"ready\""[..], b"\"online\""].contains(&line.as_slice());
                prop_assert_eq!(heard.contains(&Message::Ready), lines.iter().any(says_ready));
                prop_assert!(heard.iter().all(|message| *message == Message::Ready));
            }
        }
    }
}
