//! Reads the replies to a command. Root may command another user's reuse-run, so they are as untrusted as any input: they
//! have a deadline and a greatest length, and nothing of them is printed raw.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::operate::protocol::Reply;

/// In bytes. That of a status with the most workers is shorter.
const MAX_REPLY: usize = 16 * 1024 * 1024;

/// The replies on a connection, in their order.
#[derive(Debug)]
pub struct Replies {
    stream: UnixStream,
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
        Self { stream, input: Vec::new() }
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
            self.stream.set_read_timeout(left).map_err(|error| failed(&error))?;
            match self.stream.read(&mut bytes) {
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
    pub fn wait_for_end(mut self, timeout: Duration) {
        let _ = self.stream.set_read_timeout(Some(timeout));
        let _ = io::copy(&mut self.stream, &mut io::sink());
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
}
