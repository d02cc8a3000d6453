//! Waiting for a condition, with a deadline.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// For whatever must happen at all. Much more than it takes, as the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(120);
pub const POLL: Duration = Duration::from_millis(5);

/// Waits until `condition` holds; panics with `what` when it doesn't in time.
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !condition() {
        assert!(Instant::now() < end, "not within {deadline:?}: {what}");
        thread::sleep(POLL);
    }
}

/// Watches that `condition` holds for as long as `period`; panics with `what` at once when it doesn't.
/// Only for what can't be shown by a later event.
#[track_caller]
pub fn holds_for(what: &str, period: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + period;
    while Instant::now() < end {
        assert!(condition(), "did not hold for {period:?}: {what}");
        thread::sleep(POLL);
    }
}

/// The turn of a test that keeps every processor busy; the next one starts when it is dropped.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
