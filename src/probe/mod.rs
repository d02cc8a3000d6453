//! Probes: a request to one worker, to find out whether it serves (`--ready /path`).
//!
//! A try is a connection of our own, by the address to which clients connect, and one HTTP request on it. [`Pool::reach`]
//! brings it to that worker and to no other. The loop never waits for it. [`answer`] reads what comes back.

mod answer;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::libc::MSG_NOSIGNAL;
use socket2::Socket;

use self::answer::{Answer, End, TIME_OUT};
use crate::address::Endpoint;
use crate::ids::WorkerId;
use crate::pool::paths::UnixSockets;
use crate::pool::{Pool, Reach};
use crate::steering::program::MAX_AIMS;

/// A connection that isn't open by then is given up. The kernel repeats a lost SYN after 1 s (TCP_TIMEOUT_INIT), and it may
/// go elsewhere then.
const OPEN_WITHIN: Duration = Duration::from_millis(900);

/// How a request went: if it wasn't answered, what the worker did instead, as it follows its name in a log line.
pub type Outcome = Result<(), String>;

/// The requests that workers are sent, at most one at a time each.
#[derive(Debug)]
pub struct Probes {
    path: String,
    wanted: VecDeque<Wanted>,
    tries: BTreeMap<WorkerId, Try>,
}

/// A request that is yet to be sent.
#[derive(Debug)]
struct Wanted {
    worker: WorkerId,
    generation: u32,
    endpoint: Endpoint,
    since: Instant,
}

#[derive(Debug)]
struct Try {
    socket: Socket,
    begun: Instant,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Not known to be open yet; of a Unix socket's connection there is no [`Reach`].
    Opening(Option<Reach>),
    Reading(Answer),
}

impl Probes {
    /// Probes with requests for this path.
    pub fn new(path: String) -> Self {
        Self { path, wanted: VecDeque::new(), tries: BTreeMap::new() }
    }

    /// Has a worker of this generation be sent a request, where it listens. If it is being sent one already, that is the one.
    pub fn begin(&mut self, worker: WorkerId, generation: u32, endpoint: Endpoint, now: Instant) {
        let is_wanted = self.wanted.iter().any(|wanted| wanted.worker == worker);
        if !is_wanted && !self.tries.contains_key(&worker) {
            self.wanted.push_back(Wanted { worker, generation, endpoint, since: now });
        }
    }

    /// A worker is no longer of interest.
    pub fn forget(&mut self, worker: WorkerId, pool: &mut Pool) {
        self.wanted.retain(|wanted| wanted.worker != worker);
        if let Some(attempt) = self.tries.remove(&worker) {
            attempt.close(pool);
        }
    }

    /// When to call [`Probes::proceed`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let wanted = self.wanted.front().filter(|_| self.has_room()).map(|wanted| wanted.since);
        self.tries.values().map(Try::deadline).chain(wanted).min()
    }

    fn has_room(&self) -> bool {
        self.tries.values().filter(|attempt| matches!(attempt.stage, Stage::Opening(Some(_)))).count()
            < MAX_AIMS
    }

    /// Begins what is wanted, and ends what takes too long. `watch` has [`Probes::advance`] called when something happens on
    /// the socket (edge-triggered). Returns the requests that have come to their end, by worker.
    pub fn proceed(
        &mut self,
        pool: &mut Pool,
        unix: &mut UnixSockets,
        watch: impl Fn(&Socket, WorkerId) -> io::Result<()>,
        now: Instant,
    ) -> Vec<(WorkerId, Outcome)> {
        let mut ended = Vec::new();
        while self.has_room()
            && let Some(Wanted { worker, generation, endpoint, .. }) = self.wanted.pop_front()
        {
            let opened = match &endpoint {
                Endpoint::Port(address) => {
                    pool.reach(worker, *address).map(|(socket, reach)| (socket, Some(reach)))
                }
                Endpoint::Unix(path) => unix.reach(path, generation, worker).map(|socket| (socket, None)),
            };
            let begun = opened.and_then(|(socket, reach)| {
                let attempt = Try { socket, begun: now, stage: Stage::Opening(reach) };
                let watched = watch(&attempt.socket, worker);
                self.tries.insert(worker, attempt);
                watched
            });
            ended.extend(match begun {
                Ok(()) => self.advance(worker, pool, now),
                Err(error) => {
                    self.forget(worker, pool);
                    Some((worker, Err(self.not_sent(&endpoint, &error))))
                }
            });
        }
        let late = self.tries.iter().filter(|(_, attempt)| attempt.deadline() <= now);
        for worker in late.map(|(worker, _)| *worker).collect::<Vec<_>>() {
            ended.extend(self.end(worker, End::TimedOut, pool));
        }
        ended
    }

    /// A connection to the Unix socket of a worker is open, or can't be. Returns the request if that was its end.
    pub fn reached(
        &mut self,
        worker: WorkerId,
        reached: io::Result<()>,
        pool: &mut Pool,
        now: Instant,
    ) -> Option<(WorkerId, Outcome)> {
        let Err(error) = reached else { return self.advance(worker, pool, now) };
        let attempt = self.tries.get(&worker)?;
        matches!(attempt.stage, Stage::Opening(None)).then_some(())?;
        let request = self.request();
        let outcome = match error.kind() {
            io::ErrorKind::WouldBlock => {
                format!("took no connection for {request}: its accept queue is full")
            }
            _ => describe(&request, &error),
        };
        self.forget(worker, pool);
        Some((worker, Err(outcome)))
    }

    /// Something has happened on a worker's socket. Returns the request if that was its end.
    pub fn advance(
        &mut self,
        worker: WorkerId,
        pool: &mut Pool,
        now: Instant,
    ) -> Option<(WorkerId, Outcome)> {
        let request = self.request();
        let attempt = self.tries.get_mut(&worker)?;
        let advanced = match attempt.stage {
            // By now the kernel may have repeated the SYN, and another worker may have got it.
            Stage::Opening(_) if attempt.deadline() <= now => Ok(Some(End::TimedOut)),
            Stage::Opening(reach) => attempt.is_open().and_then(|is_open| {
                if !is_open {
                    return Ok(None);
                }
                attempt.stage = Stage::Reading(Answer::default());
                let sent = attempt.send(&self.path);
                reach.into_iter().for_each(|reach| pool.has_reached(reach));
                sent.map(|()| None)
            }),
            Stage::Reading(_) => Ok(None),
        };
        match advanced.and_then(|end| end.map_or_else(|| attempt.read(), |end| Ok(Some(end)))) {
            Ok(None) => None,
            Ok(Some(end)) => self.end(worker, end, pool),
            Err(error) => {
                let outcome = Err(describe(&request, &error));
                self.forget(worker, pool);
                Some((worker, outcome))
            }
        }
    }

    fn end(&mut self, worker: WorkerId, end: End, pool: &mut Pool) -> Option<(WorkerId, Outcome)> {
        let attempt = self.tries.remove(&worker)?;
        let request = self.request();
        let outcome = match &attempt.stage {
            Stage::Opening(_) => Answer::default().outcome(&request, end),
            Stage::Reading(answer) => answer.outcome(&request, end),
        };
        attempt.close(pool);
        Some((worker, outcome))
    }

    fn request(&self) -> String {
        format!("GET {}", self.path)
    }

    /// What a worker did, or couldn't be asked, when the connection could not even be begun.
    fn not_sent(&self, endpoint: &Endpoint, error: &io::Error) -> String {
        let request = self.request();
        match error.kind() {
            io::ErrorKind::NotFound => {
                format!("has no listener of its own on {endpoint} to which {request} could be sent")
            }
            _ => describe(&request, error),
        }
    }
}

fn describe(request: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => format!("refused the connection for {request}"),
        _ => format!("could not be sent {request}: {error}"),
    }
}

impl Try {
    fn deadline(&self) -> Instant {
        self.begun
            + match self.stage {
                Stage::Opening(_) => OPEN_WITHIN,
                Stage::Reading(_) => TIME_OUT,
            }
    }

    /// Closes the connection; only then does nothing lead here any more.
    fn close(self, pool: &mut Pool) {
        drop(self.socket);
        if let Stage::Opening(Some(reach)) = self.stage {
            pool.has_reached(reach);
        }
    }

    /// # Errors
    /// Why it could not be opened.
    fn is_open(&self) -> io::Result<bool> {
        match self.socket.take_error()? {
            Some(error) => Err(error),
            None => Ok(self.socket.peer_addr().is_ok()),
        }
    }

    fn send(&self, path: &str) -> io::Result<()> {
        // Without the scope of a link-local address, which is no part of a host's name.
        let peer = self.socket.peer_addr()?.as_socket();
        let host = peer.map(|peer| SocketAddr::new(peer.ip(), peer.port()).to_string());
        let host = host.unwrap_or("localhost".to_owned());
        let text = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: reuse-run\r\nConnection: close\r\n\r\n"
        );
        match self.socket.send_with_flags(text.as_bytes(), MSG_NOSIGNAL) {
            Ok(sent) if sent < text.len() => Err(io::ErrorKind::WriteZero.into()), // the buffer of a new socket holds it
            Err(error) if !is_closed(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Reads what has come. Returns whether it is all.
    fn read(&mut self) -> io::Result<Option<End>> {
        let Stage::Reading(answer) = &mut self.stage else { return Ok(None) };
        let mut bytes = [0; 16 * 1024];
        loop {
            match (&self.socket).read(&mut bytes) {
                Ok(0) => return Ok(Some(End::Closed)),
                Ok(len) if answer.add(&bytes[..len]) => return Ok(Some(End::Closed)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if is_closed(&error) => return Ok(Some(End::Closed)),
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}
