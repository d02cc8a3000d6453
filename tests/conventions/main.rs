//! What existing programs rely on: readiness as for PM2 and systemd, and the environment and folder that each
//! generation starts with.
#![cfg_attr(clippy, deny(warnings))]

#[path = "../common/mod.rs"]
mod common;
mod directory;
mod env_file;
mod node;
mod notify;
mod secret;

use std::fs;
use std::net::SocketAddr;

use common::load::{Load, LoadOptions};
use common::{Service, answered_more, get, send};
use nix::sys::signal::Signal;

/// A value that may only be found in the environment of workers.
const SECRET: &str = "hunter2-correct-horse";
/// Debian's user without rights.
const NOBODY: u32 = 65_534;

/// A load that leaves CPU time for other things.
fn light_load(addr: SocketAddr) -> Load {
    let load = Load::start(LoadOptions::new(addr, 4).rate(200.0));
    answered_more(&load);
    load
}

/// Asserts that the start fails: status 1 and one line with `part`. Returns this line.
#[track_caller]
fn assert_start_fails(mut service: Service, part: &str) -> String {
    let status = service.wait_end();
    let log = service.log.text();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(part), "{part:?} is not in:\n{log}");
    assert_eq!(log.lines().count(), 1, "more than one line:\n{log}");
    log
}

/// Asserts that a reload fails under load, that no request fails, and that the log contains `part`. Returns the log.
#[track_caller]
fn assert_reload_fails(service: &Service, addr: SocketAddr, part: &str) -> String {
    let load = light_load(addr);
    let serving = get(addr).generation;
    let log = service.failing_reload();
    assert!(log.contains(part), "{part:?} is not in:\n{log}");
    answered_more(&load);
    let report = load.stop();
    report.assert_nothing_failed();
    report.assert_generations(serving);
    log
}

/// A variable of a process, as it was when its program began.
fn variable(pid: u32, name: &str) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).expect("the environment of a worker");
    let prefix = format!("{name}=").into_bytes();
    let value = environment.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(&*prefix));
    value.map(|value| String::from_utf8(value.to_vec()).expect("a value in UTF-8"))
}

/// The value of a variable in all workers. They must be of this generation and have the same value.
#[track_caller]
fn value_in(service: &Service, generation: u32, name: &str) -> Option<String> {
    let workers = service.workers();
    let number = Some(generation.to_string());
    for pid in &workers {
        assert_eq!(variable(*pid, "REUSE_RUN_GENERATION"), number, "the generation of {pid}");
    }
    let mut values: Vec<Option<String>> = workers.iter().map(|pid| variable(*pid, name)).collect();
    values.dedup();
    assert_eq!(values.len(), 1, "the workers differ in {name}: {values:?}");
    values.remove(0)
}

/// Kills one worker and waits for its replacement. Returns the pid of that.
#[track_caller]
fn replace_one(service: &Service) -> u32 {
    let (before, from) = (service.workers(), service.log.count());
    send(before[0], Signal::SIGKILL);
    service.wait_for_line_after(from, "a replacement");
    let after = service.workers();
    let new: Vec<u32> = after.into_iter().filter(|pid| !before.contains(pid)).collect();
    assert_eq!(new.len(), 1, "new workers: {new:?}");
    new[0]
}
