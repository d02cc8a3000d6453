//! Reads the replies to a command. Root may command another user's reuse-run, so they are as untrusted as any input: they
//! have a deadline and a greatest length, and nothing of them is printed raw.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::kernel::inbox::Inbox;
use crate::operate::protocol::Reply;

/// In bytes. That of a status with the most workers is shorter.
const MAX_REPLY: usize = 16 * 1024 * 1024;

/// The replies on a connection, in their order.
#[derive(Debug)]
pub struct Replies {
    stream: Inbox,
    /// What has come of the next line.
    input: Vec<u8>,
}

/// What comes instead of a reply.
#[derive(Debug)]
pub enum NoReply {
    /// The deadline. The next call goes on where this one has ended.
    Late,
    /// The other end has closed the connection.
    Closed,
    Failed(String),
}

impl Replies {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream: Inbox::stream(stream.into()), input: Vec::new() }
    }

    /// The next reply. Without a deadline it is waited for as long as it takes.
    ///
    /// # Errors
    /// When there is none in time, and none to come, and when it can't be read.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Reply, NoReply> {
        let failed = |error: &dyn std::fmt::Display| NoReply::Failed(error.to_string());
        let mut bytes = vec![0; 64 * 1024];
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let rest = self.input.split_off(end + 1);
                let line = std::mem::replace(&mut self.input, rest);
                return serde_json::from_slice(&line).map_err(|error| failed(&error));
            }
            if self.input.len() > MAX_REPLY {
                return Err(failed(&"it is too long"));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(NoReply::Late);
            }
            self.set_timeout(left).map_err(|error| failed(&error))?;
            match self.stream.receive(&mut bytes).map(|received| received.length) {
                Ok(0) => return Err(NoReply::Closed),
                Ok(count) => self.input.extend_from_slice(&bytes[..count]),
                // It was closed with a part of the request unread.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(NoReply::Closed),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(failed(&error)),
            }
        }
    }

    /// Waits for the end of the connection: after the last reply to `stop` the process ends, and its port is free only
    /// then.
    pub fn wait_for_end(self, timeout: Duration) {
        let _ = self.set_timeout(Some(timeout));
        while self.stream.receive(&mut [0; 1024]).is_ok_and(|received| received.length > 0) {}
    }

    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        SockRef::from(&self.stream.as_fd()).set_read_timeout(timeout)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_reply_that_comes_in_pieces_is_whole_after_several_deadlines() {
        let (mut wrapper, stream) = UnixStream::pair().unwrap();
        let mut replies = Replies::new(stream);
        let soon = || Some(Instant::now() + Duration::from_millis(1));
        assert!(matches!(replies.next(soon()), Err(NoReply::Late)));
        for piece in [r#"{"st"#, r#"ep":"a""#] {
            wrapper.write_all(piece.as_bytes()).unwrap();
            assert!(matches!(replies.next(soon()), Err(NoReply::Late)), "{piece}");
        }
        wrapper.write_all(b"}\n{\"done\":\"b\"}\nnonsense\n").unwrap();
        drop(wrapper);
        assert!(matches!(replies.next(None), Ok(Reply::Step(step)) if step == "a"));
        assert!(matches!(replies.next(None), Ok(Reply::Done(text)) if text == "b"));
        assert!(matches!(replies.next(None), Err(NoReply::Failed(_))));
        assert!(matches!(replies.next(None), Err(NoReply::Closed)));
    }

    #[test]
    fn a_trickle_does_not_put_off_the_deadline() {
        let (mut wrapper, stream) = UnixStream::pair().unwrap();
        let mut replies = Replies::new(stream);
        let writer = std::thread::spawn(move || while wrapper.write_all(b"x").is_ok() {});
        let begun = Instant::now();
        // Or it is too long by then.
        assert!(replies.next(Some(begun + Duration::from_millis(100))).is_err());
        drop(replies);
        writer.join().unwrap();
    }

    /// Who answers may be anyone, if root has named the process.
    mod fuzz {
        use proptest::collection::vec;
        use proptest::prelude::*;

        use super::*;
        use crate::operate::protocol;

        /// Writes a stream in pieces, and reads it meanwhile and to its end.
        fn read(stream: &[u8], cuts: &[prop::sample::Index]) -> (Vec<Reply>, usize) {
            let (mut wrapper, ours) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let mut replies = Replies::new(ours);
            let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            places.extend([0, stream.len()]);
            places.sort_unstable();
            let (mut read, mut failed) = (Vec::new(), 0);
            let mut read_until = |replies: &mut Replies, deadline: Option<Instant>| loop {
                match replies.next(deadline) {
                    Ok(reply) => read.push(reply),
                    Err(NoReply::Failed(_)) => failed += 1,
                    Err(NoReply::Late | NoReply::Closed) => return,
                }
            };
            for piece in places.windows(2).map(|places| &stream[places[0]..places[1]]) {
                wrapper.write_all(piece).unwrap();
                read_until(&mut replies, Some(Instant::now() + Duration::from_micros(50)));
            }
            drop(wrapper);
            read_until(&mut replies, None);
            (read, failed)
        }

        proptest! {
            #[test]
            fn replies_are_read_as_they_were_written_however_they_arrive(
                steps in vec(any::<String>(), 0..6), why: String, last_lines: Vec<String>, cuts: [prop::sample::Index; 3]
            ) {
                let steps = steps.into_iter().map(Reply::Step);
                let all: Vec<Reply> = steps.chain([Reply::Failed(why, last_lines)]).collect();
                let stream: Vec<u8> = all.iter().flat_map(protocol::line).collect();
                let (read, failed) = read(&stream, &cuts);
                prop_assert_eq!(format!("{read:?}"), format!("{all:?}"));
                prop_assert_eq!(failed, 0);
            }

            #[test]
            fn each_line_of_any_stream_is_one_reply_or_one_error(
                lines in vec(vec(any::<u8>(), 0..60), 0..10), cuts: [prop::sample::Index; 3]
            ) {
                let stream = lines.join(&b'\n');
                let (read, failed) = read(&stream, &cuts);
                // What follows the last newline is no line.
                let ends = stream.iter().filter(|byte| **byte == b'\n').count();
                prop_assert_eq!(read.len() + failed, ends);
            }
        }
    }
}
