//! A connection of a client, and one request on it.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use socket2::{SockAddr, Socket, Type};

use super::http::{self, Parsed};
use super::report::{Answer, Failure, Kind, Origin};
use super::{Protocol, redis};

/// How long a client waits until the server closes a connection after the last answer, which has been counted
/// already. The side that closes first has the TIME_WAIT, and that should be the server.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection and its state.
pub struct Connection {
    /// Or a Unix stream, on which read and write are the same calls.
    stream: TcpStream,
    protocol: Protocol,
    connect_start: Instant,
    connected: Instant,
    /// No request may follow: the server closes the connection, or has said so.
    pub last: bool,
    /// The server has closed the connection.
    ended: bool,
}

impl Connection {
    pub fn open(
        protocol: Protocol,
        addr: &SockAddr,
        source: Ipv4Addr,
        deadline: Instant,
    ) -> Result<Connection, Failure> {
        let connect_start = Instant::now();
        let connect = || -> io::Result<TcpStream> {
            let socket = Socket::new(addr.domain(), Type::STREAM.cloexec(), None)?;
            if addr.is_unix() {
                // A non-blocking connect(2) would fail at once when the accept queue is full.
                socket.set_write_timeout(Some(left(deadline)))?;
                socket.connect(addr)?;
                return Ok(socket.into());
            }
            if addr.as_socket_ipv4().is_some_and(|addr| *addr.ip() == Ipv4Addr::LOCALHOST) {
                // Without this option bind(2) takes a port, which could then be used for one destination only.
                setsockopt(&socket, IpBindAddressNoPort, &true)?;
                socket.bind(&SocketAddr::from((source, 0)).into())?;
            }
            socket.connect_timeout(addr, left(deadline))?;
            socket.set_tcp_nodelay(true)?;
            Ok(socket.into())
        };
        match connect() {
            Ok(stream) => {
                let connected = Instant::now();
                Ok(Connection { stream, protocol, connect_start, connected, last: false, ended: false })
            }
            Err(error) => Err(failure(kind_of(&error), format!("connect to {}: {error}", name(addr)))),
        }
    }

    /// Whether the server has left this idle connection open.
    pub fn is_open(&self) -> bool {
        if self.stream.set_nonblocking(true).is_err() {
            return false;
        }
        // Unexpected bytes are left there, so that the next request fails.
        let is_open = match self.stream.peek(&mut [0]) {
            Ok(count) => count > 0,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        is_open && self.stream.set_nonblocking(false).is_ok()
    }

    pub fn request(
        &mut self,
        path: &str,
        id: Option<&str>,
        close: bool,
        deadline: Instant,
    ) -> Result<Answer, Failure> {
        let request = match self.protocol {
            Protocol::Http => {
                let addr = self.stream.peer_addr();
                let host = addr.map_or_else(|_| "localhost".to_owned(), |addr| addr.to_string());
                let connection = if close { "close" } else { "keep-alive" };
                format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\n\r\n")
            }
            Protocol::Redis => redis::request(path, close),
        };
        self.last = close;
        if let Err(error) = self.write(request.as_bytes(), deadline) {
            return Err(failure(kind_of(&error), format!("write the request: {error}")));
        }

        let mut bytes = Vec::with_capacity(512);
        let (body, end) = loop {
            let parsed = match self.protocol {
                Protocol::Http => http::parse(&bytes, self.ended),
                Protocol::Redis => redis::parse(&bytes),
            };
            match parsed {
                Parsed::Complete { body, keeps_open } => {
                    self.last |= !keeps_open;
                    break (body, Instant::now());
                }
                Parsed::Wrong(reason) => return Err(failure(Kind::BadResponse, reason)),
                Parsed::NeedsMore => self.read_more(&mut bytes, deadline)?,
            }
        };
        let body = String::from_utf8(body)
            .map_err(|_| failure(Kind::BadResponse, "the body is not UTF-8".to_owned()))?;
        if let Some(id) = id
            && token(&body, "work=") != Some(id)
        {
            return Err(failure(Kind::BadResponse, format!("asked for work={id}, got {body:?}")));
        }
        let origin = Origin::of(&body);
        Ok(Answer { body, origin, connect_start: self.connect_start, connected: self.connected, end })
    }

    fn write(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        self.stream.set_write_timeout(Some(left(deadline)))?;
        self.stream.write_all(bytes)
    }

    /// Reads more bytes. The first end of file is only noted, as it may be the end of an answer; the second is a failure.
    fn read_more(&mut self, bytes: &mut Vec<u8>, deadline: Instant) -> Result<(), Failure> {
        let got = bytes.len();
        if self.ended {
            return Err(match got {
                0 => failure(Kind::EndOfFile, "closed without a byte of the answer".to_owned()),
                _ => failure(Kind::Truncated, format!("closed after {got} bytes of the answer")),
            });
        }
        let mut chunk = [0; 16 * 1024];
        let read =
            self.stream.set_read_timeout(Some(left(deadline))).and_then(|()| self.stream.read(&mut chunk));
        match read {
            Ok(0) => self.ended = true,
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                let kind = match kind_of(&error) {
                    Kind::Reset if got > 0 => Kind::Truncated,
                    kind => kind,
                };
                return Err(failure(kind, format!("read after {got} bytes of the answer: {error}")));
            }
        }
        Ok(())
    }

    /// Waits until the server closes the connection, see [`CLOSE_TIMEOUT`].
    pub fn finish(mut self) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        let mut rest = [0; 1024];
        while !self.ended && Instant::now() < deadline {
            let read =
                self.stream.set_read_timeout(Some(left(deadline))).and_then(|()| self.stream.read(&mut rest));
            self.ended = !matches!(read, Ok(count) if count > 0);
        }
    }
}

fn kind_of(error: &io::Error) -> Kind {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Kind::Refused,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Kind::Reset,
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Kind::TimeOut,
        _ => Kind::Other,
    }
}

fn failure(kind: Kind, detail: String) -> Failure {
    Failure { kind, on_reused_connection: false, id: None, at: Instant::now(), detail }
}

/// The time until the deadline, but never zero, which would mean "no time-out".
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

fn name(addr: &SockAddr) -> String {
    let path = addr.as_pathname().map(|path| path.display().to_string());
    path.or_else(|| addr.as_socket().map(|addr| addr.to_string())).unwrap_or_default()
}

fn token<'a>(body: &'a str, label: &str) -> Option<&'a str> {
    body.split_ascii_whitespace().find_map(|word| word.strip_prefix(label))
}
