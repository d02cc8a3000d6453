//! Sockets that reuse-run is given or gives: by `-l` to workers, by systemd to reuse-run; and what reuse-run tells
//! systemd.
#![cfg_attr(clippy, deny(warnings))]

mod activation;
#[path = "../common/mod.rs"]
mod common;
mod listeners;
mod manager;
mod refused;

use common::{DEADLINE, Service, app, wait_until};

/// tests/apps/python/given.py, which becomes ready in this `way`.
fn python(way: &str) -> Vec<String> {
    common::python("given.py", &[way])
}

fn node() -> Vec<String> {
    ["node", &app("node/given.js")].map(str::to_owned).to_vec()
}

/// Waits until so many workers have printed a line that begins with `what`. Returns these lines.
#[track_caller]
fn lines_with(service: &Service, what: &str, workers: usize) -> Vec<String> {
    wait_until(what, DEADLINE, || service.out.count_of(what) >= workers);
    let lines = service.out.all().into_iter().map(|line| line.text);
    lines.filter(|line| line.starts_with(what)).collect()
}

/// The word after `name=` in a line.
#[track_caller]
fn word<'a>(line: &'a str, name: &str) -> &'a str {
    let value = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_else(|| panic!("no {name} in {line:?}"))
}

/// A listener as given.py shows it: fd, address, port, inode number, whether it blocks.
#[track_caller]
fn listeners(line: &str) -> Vec<Vec<&str>> {
    word(line, "listeners").split(',').map(|listener| listener.split('/').collect()).collect()
}
