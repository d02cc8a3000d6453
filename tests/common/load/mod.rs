//! A strict load client, of HTTP/1.1 or Redis. Each request needs a complete and correct answer; anything else is a failure,
//! counted by its kind. The client never retries.
#![allow(dead_code, unused_imports)]

mod connection;
mod http;
mod redis;
mod report;

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use socket2::SockAddr;

use connection::Connection;
pub use report::{Answer, Failure, Kind, Origin, Record, Report, Snapshot, number};

/// How many failures a client keeps with their details. All are counted.
const MAX_FAILURES_KEPT: usize = 1000;

/// How a client uses its connections.
#[derive(Clone, Copy, Debug)]
pub enum Mode {
    /// A new connection for each request, with `Connection: close`, see [`LoadOptions::pause`].
    NewConnection,
    /// All requests on one connection, with a pause of `think` between an answer and the next request.
    KeepAlive { think: Duration },
}

/// What the clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http,
    Redis,
}

/// What to load, and how.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// TCP or Unix.
    pub addr: SockAddr,
    /// Concurrent clients, a thread each.
    pub clients: usize,
    pub mode: Mode,
    pub protocol: Protocol,
    /// The request's target, or the command of Redis. `{id}` in it is replaced by the request's id, and the answer must then contain
    /// `work=<id>`.
    pub path: String,
    /// How long a request may take, with its connection.
    pub timeout: Duration,
    /// Requests a second of all clients together; `None` is full speed.
    pub rate: Option<f64>,
    /// How long a client of new connections waits between an answer and its next request.
    pub pause: Duration,
    /// How much later than the client before it each client begins.
    pub stagger: Duration,
    /// Whether to keep start, end and generation of every answer, for [`Report::stale`].
    pub record: bool,
}

impl LoadOptions {
    /// Full speed, a new connection for each request.
    pub fn new(addr: impl Into<SockAddr>, clients: usize) -> Self {
        LoadOptions {
            addr: addr.into(),
            clients,
            mode: Mode::NewConnection,
            protocol: Protocol::Http,
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

    pub fn protocol(self, protocol: Protocol) -> Self {
        LoadOptions { protocol, ..self }
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

/// What one client has seen so far. Each client has its own, so that none waits for another's lock.
#[derive(Default)]
struct Tally {
    counts: Snapshot,
    failures: Vec<Failure>,
    latencies: Vec<Duration>,
    records: Vec<Record>,
}

/// A running load. Dropping it tells the clients to end, without waiting for them.
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

    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        let mut sum = Snapshot::default();
        for tally in &self.tallies {
            sum.add(&lock(tally).counts);
        }
        sum
    }

    /// How many requests of each client have failed until now.
    pub fn failed_by_client(&self) -> Vec<u64> {
        self.tallies.iter().map(|tally| lock(tally).counts.failed).collect()
    }

    /// Waits until every request that has begun has ended, then reports.
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

/// A loopback address for a client. Each has its own, so that a new connection for each request at full speed
/// doesn't use up the ephemeral ports.
fn next_source() -> Ipv4Addr {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    Ipv4Addr::new(127, 0, 1 + (n / 250 % 250) as u8, 1 + (n % 250) as u8)
}

/// Sends one HTTP request on a new connection.
pub fn get(addr: impl Into<SockAddr>, path: &str, timeout: Duration) -> Result<Answer, Failure> {
    ask(Protocol::Http, addr, path, timeout)
}

/// Sends one request on a new connection.
pub fn ask(
    protocol: Protocol,
    addr: impl Into<SockAddr>,
    path: &str,
    timeout: Duration,
) -> Result<Answer, Failure> {
    let deadline = Instant::now() + timeout;
    let mut connection = Connection::open(protocol, &addr.into(), next_source(), deadline)?;
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
                // A client that is late continues from now; it doesn't catch up in a burst.
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

    /// Sends request `n`, on `idle` if the server has left that open, and counts its outcome. Returns the connection
    /// if another request can follow on it.
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
            let is_open = connection.is_open();
            if !is_open {
                lock(&self.tally).counts.closed_while_idle += 1;
            }
            is_open
        });
        let reused = idle.is_some();
        let connection = match idle {
            Some(connection) => Ok(connection),
            None => {
                lock(&self.tally).counts.connections += 1;
                Connection::open(self.options.protocol, &self.options.addr, self.source, deadline)
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
        if tally.failures.len() < MAX_FAILURES_KEPT {
            tally.failures.push(failure);
        }
        drop(tally);
        // A refusal comes at once. Without this pause a client would use a whole CPU to count them.
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
