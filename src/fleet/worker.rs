//! A worker as the fleet sees it.

use std::fmt;
use std::time::{Duration, Instant};

use crate::address::Endpoint;
use crate::ids::{SlotId, WorkerId};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Starting,
    Ready,
    /// It gets no new connections and finishes its work.
    Draining,
    /// It was sent the stop signal.
    Stopping,
    /// It was sent SIGKILL.
    Killed,
}

#[derive(Debug)]
pub struct Worker {
    pub id: WorkerId,
    pub slot: SlotId,
    pub generation: u32,
    /// `None` until [`super::Action::Start`] was carried out.
    pub pid: Option<i32>,
    pub started: Instant,
    pub ready_at: Option<Instant>,
    pub state: State,
    /// Since when it has been in that state.
    pub since: Instant,
    pub shown: Shown,
    /// Whether another worker has its sockets, which it might shut down at its end: then it is killed instead of stopped.
    pub is_killed: bool,
    /// Whether it need not listen where the worker that it replaces does.
    pub ports_may_change: bool,
}

/// A worker that has begun to listen may begin to listen elsewhere for so long. Then its log line says where it has to; and
/// the only worker that has nothing but a Unix socket, which may be its own, is taken as ready, and so is one that has bound a
/// UDP port and doesn't listen.
pub const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// What a worker has said or shown of its readiness.
#[derive(Debug, Default)]
pub struct Shown {
    /// Whether it has said that it is ready.
    pub says_ready: bool,
    /// Whether it has lived long enough.
    pub is_old_enough: bool,
    /// Since when it has listened somewhere.
    pub listens_since: Option<Instant>,
    /// Whether that is a while.
    pub has_settled: bool,
    /// Where it is sent requests.
    pub probed_at: Option<Endpoint>,
    /// Whether it has answered one of these.
    pub has_answered: bool,
    /// The last failure before it was ready.
    pub last_failure: Option<String>,
    /// How many it has failed to answer in a row since it was ready.
    pub failures: u32,
}

impl Worker {
    pub fn new(id: WorkerId, slot: SlotId, generation: u32, now: Instant) -> Self {
        Self {
            id,
            slot,
            generation,
            pid: None,
            started: now,
            ready_at: None,
            state: State::Starting,
            since: now,
            shown: Shown::default(),
            is_killed: false,
            ports_may_change: false,
        }
    }

    /// Until when it may open what it opens at its start. On a busy machine that takes as long as all before it.
    pub fn opens_until(&self) -> Instant {
        let begun = self.begun_to_listen();
        begun + SETTLED_AFTER.max(begun - self.started)
    }

    /// When it first listened, or else when it started.
    pub fn begun_to_listen(&self) -> Instant {
        self.shown.listens_since.unwrap_or(self.started)
    }

    pub fn enter(&mut self, state: State, now: Instant) {
        (self.state, self.since) = (state, now);
        match state {
            State::Starting => self.started = now,
            State::Ready => self.ready_at = Some(now),
            State::Draining | State::Stopping | State::Killed => {}
        }
    }
}

/// "worker 2 (pid 12, generation 3)"
impl fmt::Display for Worker {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { slot, generation, .. } = self;
        match self.pid {
            Some(pid) => write!(f, "worker {slot} (pid {pid}, generation {generation})"),
            None => write!(f, "worker {slot} (generation {generation})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_opens_what_it_opens_at_its_start_within_a_second_or_as_long_as_it_took_before() {
        let start = Instant::now();
        let mut worker = Worker::new(WorkerId(0), SlotId(0), 1, start);
        assert_eq!(worker.opens_until(), start + Duration::from_secs(1));
        worker.shown.listens_since = Some(start + Duration::from_millis(200));
        assert_eq!(worker.opens_until(), start + Duration::from_millis(1200));
        worker.shown.listens_since = Some(start + Duration::from_secs(4));
        assert_eq!(worker.opens_until(), start + Duration::from_secs(8));
    }
}
