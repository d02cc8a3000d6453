//! The strict HTTP/1.1 load client: every request must get a complete, correct answer, and whatever
//! else happens to it is counted by its kind. Nothing is retried and nothing is tolerated.
//!
//! Used as a module by the tests and by the demo; it needs nothing but std, socket2 and nix.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use socket2::{SockAddr, Socket, Type};

/// How many failures a client keeps with all their details; all of them are counted.
const FAILURES_KEPT: usize = 1000;
/// How many failures a report prints.
const FAILURES_SHOWN: usize = 8;
/// How long a client waits for the server to close a connection after a complete last answer. The
/// answer counts already; the client waits only to leave the TIME_WAIT to the server.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// How a client uses its connections.
#[derive(Clone, Copy, Debug)]
pub enum Mode {
    /// A new connection for each request, with `Connection: close`, see [`LoadOptions::pause`].
    NewConnection,
    /// Requests one after the other on one connection, with a pause between an answer and the next
    /// request. `think` zero is full speed.
    KeepAlive { think: Duration },
}

/// What to load, and how.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// TCP or Unix.
    pub addr: SockAddr,
    /// Concurrent clients, a thread each.
    pub clients: usize,
    pub mode: Mode,
    /// The request's target. Each `{id}` in it becomes an id of its own for every request, and the
    /// answer must then bear `work=<id>`.
    pub path: String,
    /// The whole time a request may take, its connection included.
    pub timeout: Duration,
    /// Requests a second of all clients together; `None` is full speed.
    pub rate: Option<f64>,
    /// How long a client of new connections waits between an answer and its next request.
    pub pause: Duration,
    /// So much later than the client before it each begins.
    pub stagger: Duration,
    /// Keep start, end and generation of every answer, for [`Report::stale`].
    pub record: bool,
}

impl LoadOptions {
    /// Full speed, a new connection for each request.
    pub fn new(addr: impl Into<SockAddr>, clients: usize) -> Self {
        LoadOptions {
            addr: addr.into(),
            clients,
            mode: Mode::NewConnection,
            path: "/".to_owned(),
            timeout: Duration::from_secs(15),
            rate: None,
            pause: Duration::ZERO,
            stagger: Duration::ZERO,
            record: false,
        }
    }

    pub fn mode(self, mode: Mode) -> Self {
        LoadOptions { mode, ..self }
    }

    pub fn path(self, path: &str) -> Self {
        LoadOptions { path: path.to_owned(), ..self }
    }

    pub fn timeout(self, timeout: Duration) -> Self {
        LoadOptions { timeout, ..self }
    }

    pub fn rate(self, requests_per_second: f64) -> Self {
        LoadOptions { rate: Some(requests_per_second), ..self }
    }

    pub fn pause(self, pause: Duration) -> Self {
        LoadOptions { pause, ..self }
    }

    pub fn stagger(self, stagger: Duration) -> Self {
        LoadOptions { stagger, ..self }
    }

    pub fn record(self) -> Self {
        LoadOptions { record: true, ..self }
    }
}

/// The ways in which a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The connection was refused.
    Refused,
    /// The connection was reset before a byte of the answer came.
    Reset,
    /// The connection was closed in order before a byte of the answer came.
    EndOfFile,
    /// Some bytes of the answer came, then the connection ended in whatever way.
    Truncated,
    /// The answer was not complete within the time-out.
    TimeOut,
    /// A complete answer that is wrong: not HTTP, not 200, too long, or another request's.
    BadResponse,
    /// Anything else, the client's own troubles included.
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Refused => "refused",
            Kind::Reset => "reset",
            Kind::EndOfFile => "end of file",
            Kind::Truncated => "truncated",
            Kind::TimeOut => "time-out",
            Kind::BadResponse => "bad response",
            Kind::Other => "other",
        })
    }
}

/// A request that did not get its answer.
#[derive(Clone, Debug)]
pub struct Failure {
    pub kind: Kind,
    /// It was written to a connection which had carried an answer before.
    pub on_reused_connection: bool,
    /// The request's id, when its path has one.
    pub id: Option<String>,
    /// When it failed.
    pub at: Instant,
    /// What exactly went wrong.
    pub detail: String,
}

/// What an answer's body says about who gave it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    pub generation: Option<u32>,
    pub slot: Option<u32>,
    pub pid: Option<u32>,
}

impl Origin {
    /// Reads `generation=<n>`, `slot=<n>` and `pid=<n>`, or the `process <pid>` of an app that only
    /// says hello.
    pub fn of(body: &str) -> Origin {
        Origin {
            generation: number(body, "generation="),
            slot: number(body, "slot="),
            pid: number(body, "pid=").or_else(|| number(body, "process ")),
        }
    }
}

fn number(body: &str, label: &str) -> Option<u32> {
    let rest = &body[body.find(label)? + label.len()..];
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

fn token<'a>(body: &'a str, label: &str) -> Option<&'a str> {
    body.split_ascii_whitespace().find_map(|word| word.strip_prefix(label))
}

/// A complete and correct answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub body: String,
    pub origin: Origin,
    /// Just before the connection was asked for.
    pub connect_start: Instant,
    /// When the connection was there.
    pub connected: Instant,
    /// When the last byte of the answer was there.
    pub end: Instant,
}

/// When an answer came and from which generation.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Just before the request, or the connection if it needed one, was begun.
    pub begin: Instant,
    pub connect_start: Instant,
    pub end: Instant,
    /// 0 if the answer doesn't say.
    pub generation: u32,
}

/// The counters at some moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Requests that ended, one way or the other.
    pub requests: u64,
    pub answered: u64,
    pub failed: u64,
    /// Connections that were asked for.
    pub connections: u64,
    /// Idle connections that the server closed before the client wrote again: no failure.
    pub closed_while_idle: u64,
    pub failures: BTreeMap<Kind, u64>,
    /// The part of `failures` on connections that had carried an answer before.
    pub failures_on_reused: BTreeMap<Kind, u64>,
    pub generations: BTreeMap<u32, u64>,
    pub slots: BTreeMap<u32, u64>,
    pub pids: BTreeMap<u32, u64>,
}

impl Snapshot {
    pub fn count(&self, kind: Kind) -> u64 {
        self.failures.get(&kind).copied().unwrap_or(0)
    }

    fn add(&mut self, other: &Snapshot) {
        self.requests += other.requests;
        self.answered += other.answered;
        self.failed += other.failed;
        self.connections += other.connections;
        self.closed_while_idle += other.closed_while_idle;
        add_counts(&mut self.failures, &other.failures);
        add_counts(&mut self.failures_on_reused, &other.failures_on_reused);
        add_counts(&mut self.generations, &other.generations);
        add_counts(&mut self.slots, &other.slots);
        add_counts(&mut self.pids, &other.pids);
    }
}

fn add_counts<K: Ord + Copy>(sum: &mut BTreeMap<K, u64>, other: &BTreeMap<K, u64>) {
    for (key, count) in other {
        *sum.entry(*key).or_default() += count;
    }
}

/// Everything that a load saw from its start to its end.
#[derive(Clone, Debug)]
pub struct Report {
    pub counts: Snapshot,
    /// From the start of the load to the end of its last request.
    pub elapsed: Duration,
    pub started: Instant,
    /// In order of time, at most a thousand a client.
    pub failures: Vec<Failure>,
    /// Of every answered request, the connection included, shortest first.
    pub latencies: Vec<Duration>,
    /// In order of their ends; empty unless asked for.
    pub records: Vec<Record>,
}

impl Report {
    pub fn count(&self, kind: Kind) -> u64 {
        self.counts.count(kind)
    }

    /// The latency that `percent` of the answered requests didn't exceed.
    pub fn percentile(&self, percent: f64) -> Duration {
        let last = self.latencies.len().saturating_sub(1);
        let index = (last as f64 * percent / 100.0).round() as usize;
        self.latencies.get(index.min(last)).copied().unwrap_or_default()
    }

    pub fn longest(&self) -> Duration {
        self.latencies.last().copied().unwrap_or_default()
    }

    pub fn requests_per_second(&self) -> f64 {
        self.counts.requests as f64 / self.elapsed.as_secs_f64().max(0.001)
    }

    /// The answers of generation k on connections that were asked for after the first answer of a
    /// later generation had come. Empty when each switch was atomic.
    pub fn stale(&self) -> Vec<Record> {
        let mut first_answers: BTreeMap<u32, Instant> = BTreeMap::new();
        for record in &self.records {
            let first = first_answers.entry(record.generation).or_insert(record.end);
            *first = (*first).min(record.end);
        }
        let is_stale = |record: &&Record| {
            let mut later = first_answers.range(record.generation + 1..);
            later.any(|(_, first)| record.connect_start > *first)
        };
        self.records.iter().filter(is_stale).copied().collect()
    }

    /// Panics if a connection saw an older generation after a newer one had answered.
    #[track_caller]
    pub fn assert_nothing_stale(&self) {
        let stale = self.stale();
        let generations: HashSet<u32> = stale.iter().map(|record| record.generation).collect();
        assert!(
            stale.is_empty(),
            "{} answers of generations {generations:?} came on connections opened after the first answer of a \
             newer generation, the first of them at {:?}\n{self}",
            stale.len(),
            stale[0].end.saturating_duration_since(self.started),
        );
    }

    /// Panics with the whole report unless there were requests and every one was answered.
    #[track_caller]
    pub fn assert_nothing_failed(&self) {
        assert!(self.counts.answered > 0, "no request was answered at all\n{self}");
        assert_eq!(self.counts.failed, 0, "requests failed\n{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = &self.counts;
        write!(
            f,
            "{} requests in {:.1} s ({:.0}/s), {} failed, latency p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
            counts.requests,
            self.elapsed.as_secs_f64(),
            self.requests_per_second(),
            counts.failed,
            self.percentile(50.0).as_secs_f64() * 1e3,
            self.percentile(99.0).as_secs_f64() * 1e3,
            self.longest().as_secs_f64() * 1e3,
        )?;
        for (kind, count) in &counts.failures {
            let reused = counts.failures_on_reused.get(kind).unwrap_or(&0);
            write!(f, "\n  {kind}: {count} ({reused} on a reused connection)")?;
        }
        for failure in self.failures.iter().take(FAILURES_SHOWN) {
            let after = failure.at.saturating_duration_since(self.started).as_secs_f64();
            write!(f, "\n  at {after:.3} s: {}: {}", failure.kind, failure.detail)?;
            if let Some(id) = &failure.id {
                write!(f, " (request {id})")?;
            }
        }
        Ok(())
    }
}

/// What one client has seen so far. Each client has its own, so nobody waits for its lock.
#[derive(Default)]
struct Tally {
    counts: Snapshot,
    failures: Vec<Failure>,
    latencies: Vec<Duration>,
    records: Vec<Record>,
}

/// A load that runs. Dropping it tells the clients to end without waiting for them.
pub struct Load {
    started: Instant,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
    tallies: Vec<Arc<Mutex<Tally>>>,
}

impl Load {
    pub fn start(options: LoadOptions) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let options = Arc::new(options);
        let mut load = Load {
            started: Instant::now(),
            stop: Arc::clone(&stop),
            clients: Vec::new(),
            tallies: Vec::new(),
        };
        for index in 0..options.clients {
            let tally = Arc::new(Mutex::new(Tally::default()));
            let client = Client {
                index,
                source: next_source(),
                options: Arc::clone(&options),
                stop: Arc::clone(&stop),
                tally: Arc::clone(&tally),
            };
            let spawned = thread::Builder::new()
                .name(format!("client {index}"))
                .stack_size(256 * 1024)
                .spawn(move || client.run())
                .expect("spawn a client thread");
            load.clients.push(spawned);
            load.tallies.push(tally);
        }
        load
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        let mut sum = Snapshot::default();
        for tally in &self.tallies {
            sum.add(&lock(tally).counts);
        }
        sum
    }

    /// Lets every request that is under way come to its end, then reports.
    pub fn stop(mut self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        for client in &self.clients {
            client.thread().unpark();
        }
        for client in self.clients.drain(..) {
            client.join().expect("a client of the load panicked");
        }
        let mut report = Report {
            counts: self.snapshot(),
            elapsed: self.started.elapsed(),
            started: self.started,
            failures: Vec::new(),
            latencies: Vec::new(),
            records: Vec::new(),
        };
        for tally in &self.tallies {
            let mut tally = lock(tally);
            report.failures.append(&mut tally.failures);
            report.latencies.append(&mut tally.latencies);
            report.records.append(&mut tally.records);
        }
        report.failures.sort_by_key(|failure| failure.at);
        report.latencies.sort_unstable();
        report.records.sort_by_key(|record| record.end);
        report
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in &self.clients {
            client.thread().unpark();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A loopback address of its own for each client, so that full speed with a new connection a request
/// does not run out of ephemeral ports.
fn next_source() -> Ipv4Addr {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    Ipv4Addr::new(127, 0, 1 + (n / 250 % 250) as u8, 1 + (n % 250) as u8)
}

/// One request on a connection of its own.
pub fn get(addr: impl Into<SockAddr>, path: &str, timeout: Duration) -> Result<Answer, Failure> {
    let deadline = Instant::now() + timeout;
    let mut connection = Connection::open(&addr.into(), next_source(), deadline)?;
    let answer = connection.request(path, None, true, deadline)?;
    connection.finish();
    Ok(answer)
}

struct Client {
    index: usize,
    source: Ipv4Addr,
    options: Arc<LoadOptions>,
    stop: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
}

impl Client {
    fn run(self) {
        let interval = self
            .options
            .rate
            .map(|rate| Duration::from_secs_f64(self.options.clients as f64 / rate.max(0.001)));
        let mut next_start = Instant::now() + self.options.stagger * self.index as u32;
        self.pause_until(next_start);
        let mut idle: Option<Connection> = None;
        for n in 0u64.. {
            if self.stopped() {
                break;
            }
            if let Some(interval) = interval {
                self.pause_until(next_start);
                // A client that fell behind goes on from now, it does not catch up in a burst.
                next_start = (next_start + interval).max(Instant::now());
                if self.stopped() {
                    break;
                }
            }
            idle = self.one_request(n, idle);
            let pause = match self.options.mode {
                Mode::KeepAlive { think } => think,
                Mode::NewConnection => self.options.pause,
            };
            if !pause.is_zero() {
                self.pause_until(Instant::now() + pause);
            }
        }
    }

    /// Sends request `n`, on `idle` if that still stands, and counts what becomes of it. Returns the
    /// connection if it can carry another.
    fn one_request(&self, n: u64, idle: Option<Connection>) -> Option<Connection> {
        let id = self.options.path.contains("{id}").then(|| format!("c{}-{n}", self.index));
        let path = match &id {
            Some(id) => self.options.path.replace("{id}", id),
            None => self.options.path.clone(),
        };
        let close = matches!(self.options.mode, Mode::NewConnection);
        let begin = Instant::now();
        let deadline = begin + self.options.timeout;

        let idle = idle.filter(|connection| {
            let stands = connection.stands();
            if !stands {
                lock(&self.tally).counts.closed_while_idle += 1;
            }
            stands
        });
        let reused = idle.is_some();
        let connection = match idle {
            Some(connection) => Ok(connection),
            None => {
                lock(&self.tally).counts.connections += 1;
                Connection::open(&self.options.addr, self.source, deadline)
            }
        };
        let result = connection.and_then(|mut connection| {
            let answer = connection.request(&path, id.as_deref(), close, deadline)?;
            Ok((connection, answer))
        });
        match result {
            Ok((connection, answer)) => {
                self.count_answer(&answer, begin);
                if connection.last {
                    connection.finish();
                    None
                } else {
                    Some(connection)
                }
            }
            Err(failure) => {
                self.count_failure(Failure { id, on_reused_connection: reused, ..failure });
                None
            }
        }
    }

    fn count_answer(&self, answer: &Answer, begin: Instant) {
        let mut tally = lock(&self.tally);
        let counts = &mut tally.counts;
        counts.requests += 1;
        counts.answered += 1;
        if let Some(generation) = answer.origin.generation {
            *counts.generations.entry(generation).or_default() += 1;
        }
        if let Some(slot) = answer.origin.slot {
            *counts.slots.entry(slot).or_default() += 1;
        }
        if let Some(pid) = answer.origin.pid {
            *counts.pids.entry(pid).or_default() += 1;
        }
        tally.latencies.push(answer.end - begin);
        if self.options.record {
            let generation = answer.origin.generation.unwrap_or(0);
            let Answer { connect_start, end, .. } = *answer;
            tally.records.push(Record { begin, connect_start, end, generation });
        }
    }

    fn count_failure(&self, failure: Failure) {
        let mut tally = lock(&self.tally);
        let counts = &mut tally.counts;
        counts.requests += 1;
        counts.failed += 1;
        *counts.failures.entry(failure.kind).or_default() += 1;
        if failure.on_reused_connection {
            *counts.failures_on_reused.entry(failure.kind).or_default() += 1;
        }
        if tally.failures.len() < FAILURES_KEPT {
            tally.failures.push(failure);
        }
        drop(tally);
        // A server that refuses answers at once; without this a client would do nothing but count.
        self.pause_until(Instant::now() + Duration::from_millis(5));
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn pause_until(&self, end: Instant) {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stopped() {
                return;
            }
            thread::park_timeout(left);
        }
    }
}

fn name(addr: &SockAddr) -> String {
    let path = addr.as_pathname().map(|path| path.display().to_string());
    path.or_else(|| addr.as_socket().map(|addr| addr.to_string())).unwrap_or_default()
}

/// A connection and what is known of it.
struct Connection {
    /// Or a Unix stream, which reads and writes alike.
    stream: TcpStream,
    connect_start: Instant,
    connected: Instant,
    /// The server closes it, or said that it will.
    last: bool,
    /// The server has closed it.
    ended: bool,
}

impl Connection {
    fn open(addr: &SockAddr, source: Ipv4Addr, deadline: Instant) -> Result<Connection, Failure> {
        let connect_start = Instant::now();
        let connect = || -> io::Result<TcpStream> {
            let socket = Socket::new(addr.domain(), Type::STREAM.cloexec(), None)?;
            if addr.is_unix() {
                // Non-blocking it would fail at once when the accept queue is full.
                socket.set_write_timeout(Some(left(deadline)))?;
                socket.connect(addr)?;
                return Ok(socket.into());
            }
            if addr.as_socket_ipv4().is_some_and(|addr| *addr.ip() == Ipv4Addr::LOCALHOST) {
                // Without it `bind` takes a port, which then serves one destination only.
                setsockopt(&socket, IpBindAddressNoPort, &true)?;
                socket.bind(&SocketAddr::from((source, 0)).into())?;
            }
            socket.connect_timeout(addr, left(deadline))?;
            socket.set_tcp_nodelay(true)?;
            Ok(socket.into())
        };
        match connect() {
            Ok(stream) => {
                Ok(Connection { stream, connect_start, connected: Instant::now(), last: false, ended: false })
            }
            Err(error) => {
                let kind = match error.kind() {
                    io::ErrorKind::ConnectionRefused => Kind::Refused,
                    io::ErrorKind::ConnectionReset => Kind::Reset,
                    io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Kind::TimeOut,
                    _ => Kind::Other,
                };
                Err(failure(kind, format!("connect to {}: {error}", name(addr))))
            }
        }
    }

    /// Whether the server has left this idle connection open.
    fn stands(&self) -> bool {
        if self.stream.set_nonblocking(true).is_err() {
            return false;
        }
        // Bytes that nobody asked for are left for the request to stumble over.
        let stands = match self.stream.peek(&mut [0]) {
            Ok(count) => count > 0,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        stands && self.stream.set_nonblocking(false).is_ok()
    }

    fn request(
        &mut self,
        path: &str,
        id: Option<&str>,
        close: bool,
        deadline: Instant,
    ) -> Result<Answer, Failure> {
        let host = self.stream.peer_addr().map_or_else(|_| "localhost".to_owned(), |addr| addr.to_string());
        let connection = if close { "close" } else { "keep-alive" };
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\n\r\n");
        self.last = close;
        if let Err(error) = self.write(request.as_bytes(), deadline) {
            let kind = match error.kind() {
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Kind::Reset,
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Kind::TimeOut,
                _ => Kind::Other,
            };
            return Err(failure(kind, format!("write the request: {error}")));
        }

        let mut bytes = Vec::with_capacity(512);
        let (body, end) = loop {
            match parse(&bytes, self.ended) {
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

    /// Appends what comes next; an end of file before the answer is complete is noted if an answer
    /// could end so and a failure otherwise.
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
                let kind = match error.kind() {
                    io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Kind::TimeOut,
                    io::ErrorKind::ConnectionReset if got > 0 => Kind::Truncated,
                    io::ErrorKind::ConnectionReset => Kind::Reset,
                    _ => Kind::Other,
                };
                return Err(failure(kind, format!("read after {got} bytes of the answer: {error}")));
            }
        }
        Ok(())
    }

    /// Lets the server close first after the last answer, which is counted already.
    fn finish(mut self) {
        let deadline = Instant::now() + CLOSE_WAIT;
        let mut rest = [0; 1024];
        while !self.ended && Instant::now() < deadline {
            let read =
                self.stream.set_read_timeout(Some(left(deadline))).and_then(|()| self.stream.read(&mut rest));
            self.ended = !matches!(read, Ok(count) if count > 0);
        }
    }
}

fn failure(kind: Kind, detail: String) -> Failure {
    Failure { kind, on_reused_connection: false, id: None, at: Instant::now(), detail }
}

/// The time left, never the zero that would mean "no time-out".
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// What the bytes of an answer amount to so far.
enum Parsed {
    NeedsMore,
    Complete { body: Vec<u8>, keeps_open: bool },
    Wrong(String),
}

/// Reads an answer; `ended` says that no byte will follow.
fn parse(bytes: &[u8], ended: bool) -> Parsed {
    let Some(head_length) = find(bytes, b"\r\n\r\n") else {
        let plausible = bytes.len() < 64 * 1024 && b"HTTP/1.".starts_with(&bytes[..bytes.len().min(7)]);
        return if plausible {
            Parsed::NeedsMore
        } else {
            Parsed::Wrong(format!("not HTTP: {}", shown(bytes)))
        };
    };
    let body = &bytes[head_length + 4..];
    let Ok(head) = std::str::from_utf8(&bytes[..head_length]) else {
        return Parsed::Wrong(format!("not HTTP: {}", shown(bytes)));
    };
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if !status.starts_with("HTTP/1.1 200") && !status.starts_with("HTTP/1.0 200") {
        return Parsed::Wrong(format!("status line {status:?}"));
    }
    let mut keeps_open = status.starts_with("HTTP/1.1");
    let mut length: Option<usize> = None;
    let mut chunked = false;
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            return Parsed::Wrong(format!("header line {line:?}"));
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => match value.parse() {
                Ok(number) => length = Some(number),
                Err(_) => return Parsed::Wrong(format!("header line {line:?}")),
            },
            "transfer-encoding" => chunked = value.eq_ignore_ascii_case("chunked"),
            "connection" => {
                let words: HashSet<String> =
                    value.split(',').map(|word| word.trim().to_ascii_lowercase()).collect();
                keeps_open = !words.contains("close") && (keeps_open || words.contains("keep-alive"));
            }
            _ => {}
        }
    }
    if chunked {
        return parse_chunks(body, keeps_open);
    }
    match length {
        Some(length) if body.len() > length => {
            Parsed::Wrong(format!("{} bytes of body where {length} were announced", body.len()))
        }
        Some(length) if body.len() == length => Parsed::Complete { body: body.to_vec(), keeps_open },
        None if keeps_open => Parsed::Wrong("neither a length nor Connection: close".to_owned()),
        None if ended => Parsed::Complete { body: body.to_vec(), keeps_open },
        _ => Parsed::NeedsMore,
    }
}

fn parse_chunks(mut rest: &[u8], keeps_open: bool) -> Parsed {
    let mut body = Vec::new();
    loop {
        let Some(line_length) = find(rest, b"\r\n") else { return Parsed::NeedsMore };
        let line = String::from_utf8_lossy(&rest[..line_length]);
        let size = line.split(';').next().unwrap_or_default().trim();
        let Ok(size) = usize::from_str_radix(size, 16) else {
            return Parsed::Wrong(format!("chunk size {line:?}"));
        };
        rest = &rest[line_length + 2..];
        if size == 0 {
            // Trailers are allowed; the empty line after them ends the answer.
            loop {
                let Some(length) = find(rest, b"\r\n") else { return Parsed::NeedsMore };
                rest = &rest[length + 2..];
                if length == 0 {
                    break;
                }
            }
            return match rest.len() {
                0 => Parsed::Complete { body, keeps_open },
                extra => Parsed::Wrong(format!("{extra} bytes after the last chunk")),
            };
        }
        if rest.len() < size + 2 {
            return Parsed::NeedsMore;
        }
        if &rest[size..size + 2] != b"\r\n" {
            return Parsed::Wrong("a chunk is longer than it says".to_owned());
        }
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).escape_debug().to_string()
}
