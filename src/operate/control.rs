//! The control socket: who may speak, what they ask, and what they are told. A client that stalls, floods or
//! talks nonsense is dropped and holds nobody up.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use log::debug;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::fleet::Ticket;
use crate::operate::protocol::{self, LONGEST_REQUEST, Reply, Request};

/// More at once are turned away.
const MOST_CLIENTS: usize = 128;
/// How many are taken in at once, lest a flood of them hold up everything else.
const MOST_AT_ONCE: usize = 16;
/// A client has so long to send its request.
const PATIENCE: Duration = Duration::from_secs(10);
/// A client that leaves so much unread, in bytes, is dropped.
const LONGEST_BACKLOG: usize = 256 * 1024;

/// A client, for as long as its connection lasts; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub u32);

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    since: Instant,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The step that it was told of last.
    told: String,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Asking,
    Waiting(Ticket),
    /// Has its last reply, or part of it.
    Ending,
}

#[derive(Debug)]
pub struct Control {
    listener: UnixListener,
    /// Given up for a moment when no other fd is to be had, so that a client can be turned away.
    spare: Option<File>,
    clients: BTreeMap<ClientId, Client>,
    next: u32,
}

impl Control {
    /// Listens under the name of this process.
    ///
    /// # Errors
    /// EADDRINUSE when somebody has taken that name.
    pub fn new() -> io::Result<Self> {
        let listener = UnixListener::bind_addr(&protocol::address(std::process::id())?)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, spare: File::open("/dev/null").ok(), clients: BTreeMap::new(), next: 0 })
    }

    /// Takes new clients in, and has `epoll` tell of them by the token that `token` makes.
    pub fn accept(&mut self, epoll: &Epoll, now: Instant, token: impl Fn(ClientId) -> u64) {
        for _ in 0..MOST_AT_ONCE {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    debug!("a control client is turned away: {error}");
                    self.spare = None;
                    drop(self.listener.accept());
                    self.spare = File::open("/dev/null").ok();
                    return;
                }
            };
            let id = ClientId(self.next);
            let may_come = self.clients.len() < MOST_CLIENTS && may_speak(&stream);
            // Edge-triggered: a client is read, and written to, until it would block.
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
            let watched = may_come
                && stream.set_nonblocking(true).is_ok()
                && epoll.add(&stream, EpollEvent::new(flags, token(id))).is_ok();
            if watched {
                self.next = self.next.wrapping_add(1);
                let (input, output, told) = (Vec::new(), Vec::new(), String::new());
                let client = Client { stream, since: now, input, output, told, state: State::Asking };
                self.clients.insert(id, client);
            }
        }
    }

    /// Reads from a client and goes on writing to it. Returns its request, once that is whole.
    pub fn attend(&mut self, id: ClientId) -> Option<Request> {
        let client = self.clients.get_mut(&id)?;
        let (mut bytes, mut ended) = ([0; 1024], false);
        loop {
            match client.stream.read(&mut bytes) {
                Ok(0) => ended = true,
                // What follows the request is of no interest, but has to be taken to see the end.
                Ok(count) if client.state == State::Asking && client.input.len() <= LONGEST_REQUEST => {
                    client.input.extend_from_slice(&bytes[..count]);
                    continue;
                }
                Ok(_) => {
                    ended = true;
                    debug!("a control client says too much");
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => ended = true,
            }
            break;
        }
        let line = client.input.iter().position(|byte| *byte == b'\n');
        let request = line.filter(|_| client.state == State::Asking).map(|end| client.input[..end].to_vec());
        if client.flush().is_err() || (ended && request.is_none()) {
            self.clients.remove(&id);
            return None;
        }
        let request = request?;
        client.input = Vec::new();
        match protocol::parse(&request) {
            Ok(request) => Some(request),
            Err(why) => {
                self.finish(id, &Reply::Failed(why, Vec::new()));
                None
            }
        }
    }

    /// Gives a client its last reply.
    pub fn finish(&mut self, id: ClientId, reply: &Reply) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.state = State::Ending;
            client.since = Instant::now();
        }
        self.send(id, reply);
    }

    /// Has a client wait for the end of an operation.
    pub fn have_wait(&mut self, id: ClientId, ticket: Ticket) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.state = State::Waiting(ticket);
        }
    }

    /// The clients that wait, and for what.
    pub fn waiting(&self) -> Vec<(ClientId, Ticket)> {
        let ticket = |client: &Client| match client.state {
            State::Waiting(ticket) => Some(ticket),
            State::Asking | State::Ending => None,
        };
        self.clients.iter().filter_map(|(id, client)| Some((*id, ticket(client)?))).collect()
    }

    /// Tells all that wait of a step; of one that comes again at once, as when many ask for the same, only once.
    pub fn tell(&mut self, step: &str) {
        for (id, _) in self.waiting() {
            if let Some(client) = self.clients.get_mut(&id).filter(|client| client.told != step) {
                client.told = step.to_owned();
                self.send(id, &Reply::Step(step.to_owned()));
            }
        }
    }

    /// Says something to a client.
    pub fn send(&mut self, id: ClientId, reply: &Reply) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.output.extend(protocol::line(reply));
        if client.flush().is_err() || client.output.len() > LONGEST_BACKLOG {
            self.clients.remove(&id);
        }
    }

    /// When to call [`Control::drop_idle`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let impatient = self.clients.values().filter(|client| client.is_idle());
        impatient.map(|client| client.since + PATIENCE).min()
    }

    /// Drops the clients that have not sent their request in good time, or don't take the reply.
    pub fn drop_idle(&mut self, now: Instant) {
        self.clients.retain(|_, client| !client.is_idle() || client.since + PATIENCE > now);
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Client {
    /// Writes what is to be written, as far as the client takes it.
    ///
    /// # Errors
    /// When it is gone, or has all that it is to get.
    fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        if self.state == State::Ending { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    fn is_idle(&self) -> bool {
        !matches!(self.state, State::Waiting(_))
    }
}

/// Whether a client is of this user, or root (SO_PEERCRED, unix(7)).
fn may_speak(stream: &UnixStream) -> bool {
    let uid = nix::unistd::geteuid().as_raw();
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| peer.uid() == uid || peer.uid() == 0)
}
