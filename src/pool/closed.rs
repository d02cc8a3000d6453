//! Listeners that their worker has closed although it lives on.
//!
//! The wrapper's duplicate keeps such a socket open, so the kernel reports nothing. What shows it is that connections
//! wait for long. Then /proc tells whether the worker still has the socket.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::ids::MemberId;

/// How long connections wait before the first check, and the time between two checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The time until the second check of a listener that was found closed.
pub const SECOND_CHECK: Duration = Duration::from_millis(200);

/// The listeners on which connections wait.
#[derive(Debug, Default)]
pub struct ClosedListeners {
    checks: BTreeMap<MemberId, Check>,
}

#[derive(Debug)]
struct Check {
    next: Instant,
    /// What the last check found.
    is_closed: bool,
}

impl ClosedListeners {
    /// Checks the listeners on which connections wait, if it is time to, and returns those that were found closed at two
    /// checks in a row: a worker that ends closes its sockets a moment before its end is reported.
    ///
    /// `is_open` says whether the borrower has a socket open; `None` if nobody borrows it.
    pub fn check(
        &mut self,
        waiting: &BTreeMap<MemberId, u32>,
        is_open: impl Fn(MemberId) -> Option<bool>,
        now: Instant,
    ) -> Vec<MemberId> {
        self.checks.retain(|id, _| waiting.contains_key(id));
        let mut closed = Vec::new();
        for id in waiting.keys().copied() {
            let first = Check { next: now + CHECK_INTERVAL, is_closed: false };
            let check = self.checks.entry(id).or_insert(first);
            if check.next > now {
                continue;
            }
            let Some(is_open) = is_open(id) else { continue };
            if !is_open && check.is_closed {
                closed.push(id);
            }
            check.is_closed = !is_open;
            check.next = now + if is_open { CHECK_INTERVAL } else { SECOND_CHECK };
        }
        closed
    }

    pub fn forget(&mut self, id: MemberId) {
        self.checks.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MemberId = MemberId(3);

    /// Milliseconds, whether connections wait then, and whether the socket is open.
    type Sample = (u64, bool, Option<bool>);

    /// Checks at each sample, and returns at which of them the listener was found closed.
    fn closed_at(samples: &[Sample]) -> Vec<u64> {
        let (mut listeners, start) = (ClosedListeners::default(), Instant::now());
        let mut closed = Vec::new();
        for (ms, waits, is_open) in samples.iter().copied() {
            let waiting = std::iter::once((ID, 1)).filter(|_| waits).collect();
            if listeners.check(&waiting, |_| is_open, start + Duration::from_millis(ms)) == [ID] {
                closed.push(ms);
            }
        }
        closed
    }

    #[test]
    fn a_listener_is_closed_if_two_checks_in_a_row_find_it_so_while_connections_wait() {
        const CLOSED: Option<bool> = Some(false);
        const OPEN: Option<bool> = Some(true);
        let cases: [(&[Sample], &[u64]); 5] = [
            (&[(0, true, CLOSED), (999, true, CLOSED), (1000, true, CLOSED), (1199, true, CLOSED)], &[]),
            (&[(0, true, CLOSED), (1000, true, CLOSED), (1200, true, CLOSED)], &[1200]),
            (&[(0, true, CLOSED), (1000, true, CLOSED), (1200, true, OPEN), (2200, true, CLOSED)], &[]),
            (&[(0, true, CLOSED), (1000, true, CLOSED), (1100, false, CLOSED), (1200, true, CLOSED)], &[]),
            (&[(0, true, None), (1000, true, None), (1200, true, CLOSED), (1400, true, CLOSED)], &[1400]),
        ];
        for (samples, expected) in cases {
            assert_eq!(closed_at(samples), expected, "{samples:?}");
        }
    }
}
