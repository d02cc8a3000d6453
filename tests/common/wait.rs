//! Waiting for a condition, with a deadline.
#![allow(dead_code)]

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::process::send;

/// How long to wait for something that must happen. Far longer than it takes, because the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(120);
pub const POLL: Duration = Duration::from_millis(5);

/// Waits until `condition` holds. Panics with `what` after the deadline.
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !condition() {
        assert!(Instant::now() < end, "not within {deadline:?}: {what}");
        thread::sleep(POLL);
    }
}

/// Checks that `condition` holds for all of `period`; panics with `what` as soon as it doesn't. Only for what no
/// later event can show.
#[track_caller]
pub fn holds_for(what: &str, period: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + period;
    while Instant::now() < end {
        assert!(condition(), "did not hold for {period:?}: {what}");
        thread::sleep(POLL);
    }
}

/// Does the same for each row of a table, each in a thread of its own: for rows that mostly wait.
pub fn at_once<R: Send>(rows: impl IntoIterator<Item = R>, test: impl Fn(R) + Sync) {
    let test = &test;
    thread::scope(|scope| rows.into_iter().for_each(|row| drop(scope.spawn(move || test(row)))));
}

/// Stops a process by SIGSTOP. A thread may accept a connection until it has stopped.
#[track_caller]
pub fn freeze(pid: u32) {
    send(pid, Signal::SIGSTOP);
    wait_until("all its threads have stopped", DEADLINE, || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
        let stat = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        tasks.map(|task| stat(task.expect("a thread"))).all(|stat| stat.contains(") T "))
    });
}

/// Locks out other tests that keep every processor busy, until the result is dropped.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
