//! The control socket: which clients are allowed, what they request, and the replies. A client that stalls, floods or
//! sends nonsense is dropped, and delays nothing else.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::{Duration, Instant};

use log::debug;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use socket2::Socket;

use crate::fleet::Ticket;
use crate::kernel::inbox::{self, Inbox};
use crate::kernel::sys;
use crate::operate::peer::Peer;
use crate::operate::protocol::{self, MAX_REQUEST, Name, Reply, Request};

/// More clients at a time are refused.
const MAX_CLIENTS: usize = 128;
/// How many clients are accepted before the poll loop does something else.
const MAX_ACCEPTED_AT_ONCE: usize = 16;
/// The time that a client has to send its request, and to read the last reply.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// In bytes. A client that leaves more of its replies unread is dropped.
const MAX_UNREAD: usize = 256 * 1024;

/// The connection of a client. No two connections have the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub u32);

#[derive(Debug)]
struct Client {
    stream: Inbox,
    /// The time of the connection, or of the last reply.
    since: Instant,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The last step that was sent to it.
    last_step: String,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its request has not arrived, or not the whole of it.
    Requesting,
    Waiting(Ticket),
    /// Its last reply is being sent.
    Closing,
}

#[derive(Debug)]
pub struct Control {
    name: Option<Name>,
    /// What keeps others of this user from starting with the name.
    _claim: Option<Socket>,
    listener: UnixListener,
    /// A file descriptor in reserve. When no other is free it is closed for a moment, so that a client can be accepted and
    /// refused.
    spare: Option<File>,
    clients: BTreeMap<ClientId, Client>,
    next: u32,
}

impl Control {
    /// Listens under the name that belongs to the PID of this process, and to this name. Any user may take it before; then
    /// under a longer one, which nobody can know before.
    ///
    /// # Errors
    /// Without /proc, or when sockets can't be made.
    pub fn new(name: Option<Name>, claim: Option<Socket>) -> io::Result<Self> {
        let socket = protocol::socket_name(std::process::id(), name.as_ref())?;
        let listen = |name: &str| UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?);
        let listener = match listen(&socket) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                listen(&format!("{socket}/{}", RandomState::new().hash_one(())))
            }
            result => result,
        }?;
        listener.set_nonblocking(true)?;
        // Any user can send descriptors here. Connections inherit the option; older kernels than 6.16 don't know it.
        let _ = sys::refuse_descriptors(listener.as_fd());
        let spare = File::open("/dev/null").ok();
        Ok(Self { name, _claim: claim, listener, spare, clients: BTreeMap::new(), next: 0 })
    }

    pub fn name(&self) -> Option<&Name> {
        self.name.as_ref()
    }

    /// Accepts new clients and adds them to `epoll`, with a token from `token`.
    pub fn accept(&mut self, epoll: &Epoll, now: Instant, token: impl Fn(ClientId) -> u64) {
        if inbox::is_full() {
            let _ = epoll.delete(&self.listener); // until a child has ended
            return;
        }
        for _ in 0..MAX_ACCEPTED_AT_ONCE {
            let stream = match self.accept_one() {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    debug!("can't accept a control client: {error}");
                    self.spare = None;
                    drop(self.accept_one());
                    self.spare = File::open("/dev/null").ok();
                    return;
                }
            };
            let id = ClientId(self.next);
            if let Err(why) = self.admit(&stream) {
                let _ = write(&stream, &protocol::line(&Reply::Failed(why.to_owned(), Vec::new())));
                continue;
            }
            // Edge-triggered: each client is read, and written to, until the call would block.
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
            if epoll.add(&stream, EpollEvent::new(flags, token(id))).is_ok() {
                self.next = self.next.wrapping_add(1);
                let (input, output, last_step) = (Vec::new(), Vec::new(), String::new());
                let client =
                    Client { stream, since: now, input, output, last_step, state: State::Requesting };
                self.clients.insert(id, client);
            }
        }
    }

    fn accept_one(&self) -> io::Result<Inbox> {
        let (stream, _) = self.listener.accept()?;
        let stream = Inbox::stream(stream.into());
        fcntl(&stream, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(stream)
    }

    /// Whether a client may be here, and if not, what to tell it.
    fn admit(&self, stream: &Inbox) -> Result<(), &'static str> {
        let peer = Peer::of(stream).map_err(|_| "this command has ended")?;
        if peer.uid != 0 && peer.uid != nix::unistd::geteuid().as_raw() {
            return Err("this reuse-run is another user's");
        }
        if !peer.shares_namespaces() {
            return Err(
                "this reuse-run is in another PID or user namespace, or can't see the command in /proc",
            );
        }
        if self.clients.len() >= MAX_CLIENTS {
            return Err("too many commands wait for this reuse-run");
        }
        Ok(())
    }

    /// Reads from a client, and writes what it hasn't taken yet. Returns the request when all of it has arrived.
    pub fn read_request(&mut self, id: ClientId) -> Option<Request> {
        let client = self.clients.get_mut(&id)?;
        let (mut bytes, mut ended) = ([0; 1024], false);
        loop {
            match client.stream.receive(&mut bytes).map(|received| received.length) {
                Ok(0) => ended = true,
                Ok(count) if client.state == State::Requesting && client.input.len() <= MAX_REQUEST => {
                    client.input.extend_from_slice(&bytes[..count]);
                    continue;
                }
                Ok(_) => {
                    ended = true;
                    debug!("a control client is dropped: it sends more than a request");
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => ended = true,
            }
            break;
        }
        let line = client.input.iter().position(|byte| *byte == b'\n');
        let request =
            line.filter(|_| client.state == State::Requesting).map(|end| client.input[..end].to_vec());
        if client.flush().is_err() || (ended && request.is_none()) {
            self.clients.remove(&id);
            return None;
        }
        let request = request?;
        client.input = Vec::new();
        match protocol::parse(&request) {
            Ok(request) => Some(request),
            Err(why) => {
                self.reply_and_close(id, &Reply::Failed(why, Vec::new()));
                None
            }
        }
    }

    /// Sends a client its last reply.
    pub fn reply_and_close(&mut self, id: ClientId, reply: &Reply) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.state = State::Closing;
            client.since = Instant::now();
        }
        self.send(id, reply);
    }

    /// From now on a client gets each step, until the operation of this ticket ends and it gets its last reply.
    pub fn wait_for(&mut self, id: ClientId, ticket: Ticket) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.state = State::Waiting(ticket);
        }
    }

    /// The clients that wait, and what for.
    pub fn waiting(&self) -> Vec<(ClientId, Ticket)> {
        let ticket = |client: &Client| match client.state {
            State::Waiting(ticket) => Some(ticket),
            State::Requesting | State::Closing => None,
        };
        self.clients.iter().filter_map(|(id, client)| Some((*id, ticket(client)?))).collect()
    }

    /// Sends a step to all clients that wait. A step that is repeated, as when many request the same, is sent once.
    pub fn broadcast_step(&mut self, step: &str) {
        for (id, _) in self.waiting() {
            if let Some(client) = self.clients.get_mut(&id).filter(|client| client.last_step != step) {
                client.last_step = step.to_owned();
                self.send(id, &Reply::Step(step.to_owned()));
            }
        }
    }

    /// Sends a reply to a client, or drops the client if it doesn't read.
    pub fn send(&mut self, id: ClientId, reply: &Reply) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.output.extend(protocol::line(reply));
        if client.flush().is_err() || client.output.len() > MAX_UNREAD {
            self.clients.remove(&id);
        }
    }

    /// Leaves the clients' connections open until the end of this process, which can't be held up by them.
    pub fn leave(mut self) {
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Read); // nobody can connect any more
        while self.accept_one().is_ok() {}
        self.clients.retain(|_, client| client.stream.seal());
        mem::forget(self);
    }

    /// When to call [`Control::drop_idle`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.clients.values().filter_map(Client::deadline).min()
    }

    /// Drops the clients that have not sent their request, or not read their last reply, in time.
    pub fn drop_idle(&mut self, now: Instant) {
        self.clients.retain(|_, client| client.deadline().is_none_or(|at| at > now));
    }
}

/// Writes as much as there is room for.
fn write(stream: &Inbox, bytes: &[u8]) -> io::Result<usize> {
    Ok(send(stream.as_fd().as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?)
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Client {
    /// Writes as much of the replies as the client takes.
    ///
    /// # Errors
    /// When the client is gone, or has its last reply.
    fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match write(&self.stream, &self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        if self.state == State::Closing { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    /// When to drop it; `None` while it waits.
    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Waiting(_) => None,
            State::Requesting | State::Closing => Some(self.since + CLIENT_TIMEOUT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client may be any process of this user.
    mod fuzz {
        use std::io::Write;
        use std::os::unix::net::UnixStream;

        use proptest::collection::vec;
        use proptest::prelude::*;

        use super::*;
        use crate::operate::protocol::Envelope;

        /// A control socket with one client, which writes a stream in pieces. Returns what it has requested.
        fn requests_of(stream: &[u8], piece: usize) -> Result<Vec<Request>, TestCaseError> {
            let mut control = Control::new(None, None).unwrap();
            let (ours, its) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let id = ClientId(0);
            let (input, output, last_step) = (Vec::new(), Vec::new(), String::new());
            let since = Instant::now();
            let ours = Inbox::stream(ours.into());
            let client = Client { stream: ours, since, input, output, last_step, state: State::Requesting };
            control.clients.insert(id, client);
            let mut requests = Vec::new();
            for piece in stream.chunks(piece) {
                if (&its).write_all(piece).is_err() {
                    break; // it is dropped
                }
                if let Some(request) = control.read_request(id) {
                    requests.push(request);
                    control.reply_and_close(id, &Reply::Done(String::new()));
                }
                let kept =
                    control.clients.get(&id).map_or(0, |client| client.input.len() + client.output.len());
                prop_assert!(kept <= MAX_REQUEST + 1024, "{kept} bytes are kept");
            }
            Ok(requests)
        }

        proptest! {
            #[test]
            fn of_a_client_only_its_first_line_is_a_request(
                lines in vec(prop_oneof![
                    Just(protocol::line(&Envelope { version: 1, request: Request::Abort })),
                    vec(any::<u8>(), 0..50).prop_map(|line| [&line[..], b"\n"].concat()),
                ], 0..4),
                piece in 1usize..80,
            ) {
                let stream = lines.concat();
                let first = stream.split_inclusive(|byte| *byte == b'\n').next();
                let expected = first.and_then(|line| protocol::parse(line).ok());
                prop_assert_eq!(requests_of(&stream, piece)?, expected.into_iter().collect::<Vec<_>>());
            }

            #[test]
            fn no_more_than_a_request_is_kept_of_a_client(byte in any::<u8>(), len in 0..3 * MAX_REQUEST, piece in 1usize..8000) {
                let stream = vec![if byte == b'\n' { b' ' } else { byte }; len];
                prop_assert_eq!(requests_of(&stream, 1000 + piece)?, []);
            }
        }
    }
}
