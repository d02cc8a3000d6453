//! What a load has seen: failures by kind, counters, latencies.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant};

/// How many failures a report prints.
const MAX_FAILURES_SHOWN: usize = 8;

/// The ways in which a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The connection was refused.
    Refused,
    /// The connection was reset before a byte of the answer came.
    Reset,
    /// The connection was closed without an error before a byte of the answer came.
    EndOfFile,
    /// The connection ended in the middle of the answer, with or without an error.
    Truncated,
    /// The answer was not complete within the time-out.
    TimeOut,
    /// The answer is complete and wrong: not HTTP, not 200, too long, or to another request.
    BadResponse,
    /// Anything else, errors of the client included.
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
    /// The connection had carried an answer before.
    pub on_reused_connection: bool,
    /// The request's id, when its path has one.
    pub id: Option<String>,
    /// When it failed.
    pub at: Instant,
    /// The error.
    pub detail: String,
}

/// Which worker has answered, by the body of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    pub generation: Option<u32>,
    pub slot: Option<u32>,
    pub pid: Option<u32>,
}

impl Origin {
    /// Reads `generation=<n>`, `slot=<n>` and `pid=<n>`, or `process <pid>`.
    pub fn of(body: &str) -> Origin {
        Origin {
            generation: number(body, "generation="),
            slot: number(body, "slot="),
            pid: number(body, "pid=").or_else(|| number(body, "process ")),
        }
    }
}

/// The number that follows `label` in a text.
pub fn number(body: &str, label: &str) -> Option<u32> {
    let rest = &body[body.find(label)? + label.len()..];
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// A complete and correct answer.

#[derive(Clone, Debug)]
pub struct Answer {
    pub body: String,
    pub origin: Origin,
    /// Just before connect(2).
    pub connect_start: Instant,
    /// When the connection was established.
    pub connected: Instant,
    /// When the last byte of the answer had come.
    pub end: Instant,
}

/// When a request was answered, and by which generation.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Just before the request, or before its connection if it needed a new one.
    pub begin: Instant,
    pub connect_start: Instant,
    pub end: Instant,
    /// 0 if the answer doesn't tell.
    pub generation: u32,
}

/// The counters at some moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Requests that have been answered or have failed.
    pub requests: u64,
    pub answered: u64,
    pub failed: u64,
    /// Connections that the clients have tried to open.
    pub connections: u64,
    /// Idle connections that the server closed before the client wrote again. That is no failure.
    pub closed_while_idle: u64,
    pub failures: BTreeMap<Kind, u64>,
    /// Those of `failures` on connections that had carried an answer before.
    pub failures_on_reused: BTreeMap<Kind, u64>,
    pub generations: BTreeMap<u32, u64>,
    pub slots: BTreeMap<u32, u64>,
    pub pids: BTreeMap<u32, u64>,
}

impl Snapshot {
    pub fn count(&self, kind: Kind) -> u64 {
        self.failures.get(&kind).copied().unwrap_or(0)
    }

    pub(super) fn add(&mut self, other: &Snapshot) {
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
    /// In order of time, at most a thousand of each client.
    pub failures: Vec<Failure>,
    /// Of every answered request, with its connection, shortest first.
    pub latencies: Vec<Duration>,
    /// In order of their ends; empty unless asked for.
    pub records: Vec<Record>,
}

impl Report {
    pub fn count(&self, kind: Kind) -> u64 {
        self.counts.count(kind)
    }

    /// A latency that `percent` of the answered requests didn't exceed.
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

    /// Answers of an old generation on connections that were opened after a newer generation had answered. There are
    /// none when each switch was atomic.
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

    /// Panics unless each switch was atomic and all generations up to `newest` have answered.
    #[track_caller]
    pub fn assert_switched_atomically(&self, newest: u32) {
        self.assert_nothing_stale();
        self.assert_generations(1..=newest);
    }

    /// Panics unless exactly these generations have answered.
    #[track_caller]
    pub fn assert_generations(&self, expected: impl IntoIterator<Item = u32>) {
        let generations: Vec<u32> = self.counts.generations.keys().copied().collect();
        assert_eq!(generations, expected.into_iter().collect::<Vec<_>>(), "{self}");
    }

    /// Panics if there are [stale](Report::stale) answers.
    #[track_caller]
    pub fn assert_nothing_stale(&self) {
        let stale = self.stale();
        let generations: HashSet<u32> = stale.iter().map(|record| record.generation).collect();
        assert!(
            stale.is_empty(),
            "{} answers of generations {generations:?} on connections that were opened after the first answer of a \
             newer generation; the first such answer at {:?}\n{self}",
            stale.len(),
            stale[0].end.saturating_duration_since(self.started),
        );
    }

    /// Panics with the whole report unless there were requests and all were answered.
    #[track_caller]
    pub fn assert_nothing_failed(&self) {
        assert!(self.counts.answered > 0, "no request was answered\n{self}");
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
        for failure in self.failures.iter().take(MAX_FAILURES_SHOWN) {
            let after = failure.at.saturating_duration_since(self.started).as_secs_f64();
            write!(f, "\n  at {after:.3} s: {}: {}", failure.kind, failure.detail)?;
            if let Some(id) = &failure.id {
                write!(f, " (request {id})")?;
            }
        }
        Ok(())
    }
}
