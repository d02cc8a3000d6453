//! Clients: one request, and what a load has to show.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::load;
use super::wait::{DEADLINE, wait_until};

/// Who answers a request on a connection of its own, which must succeed.
#[track_caller]
pub fn get(addr: SocketAddr) -> load::Origin {
    match load::get(addr, "/", Duration::from_secs(15)) {
        Ok(answer) => answer.origin,
        Err(failure) => panic!("GET / from {addr}: {failure:?}"),
    }
}

/// Waits until the load has got answers from now on.
#[track_caller]
pub fn answered_more(load: &load::Load) {
    wait_for_answers(load, 0);
}

/// Waits until the load has got more answers than this from now on.
#[track_caller]
pub fn wait_for_answers(load: &load::Load, more: u64) {
    let answered = load.snapshot().answered;
    wait_until("answers", DEADLINE, || load.snapshot().answered > answered + more);
}

/// A client that has sent its request and waits.
pub struct Waiting(TcpStream);

impl Waiting {
    /// Connects, which takes no more than a listener with room in its queue, and asks.
    #[track_caller]
    pub fn new(addr: SocketAddr) -> Waiting {
        let mut stream = TcpStream::connect(addr).expect("connect");
        stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("ask");
        stream.set_nonblocking(true).expect("set non-blocking");
        Waiting(stream)
    }

    /// Whether neither an answer nor an end has come.
    pub fn waits(&self) -> bool {
        matches!(self.0.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
    }

    /// Waits for what becomes of it.
    pub fn outcome(mut self) -> std::io::Result<load::Origin> {
        let mut text = String::new();
        self.0.set_nonblocking(false)?;
        self.0.set_read_timeout(Some(DEADLINE))?;
        self.0.read_to_string(&mut text)?;
        if text.is_empty() { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(load::Origin::of(&text)) }
    }

    /// Waits for the reset that it must get.
    #[track_caller]
    pub fn assert_reset(self) {
        match self.outcome() {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("not reset but {other:?}"),
        }
    }
}
