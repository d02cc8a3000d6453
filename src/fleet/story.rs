//! The log's longer texts.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use humantime::format_duration;

use super::endpoints::Endpoints;
use super::events::Command;
use super::phase::Phase;
use super::policy::{KILL_GRACE, Policy, Rollout};
use super::roster::Roster;
use super::slot::Slot;
use super::worker::{State, Worker};
use crate::address::Endpoint;
use crate::words::{count, list, millis};

/// "4 workers of generation 3"; after a rolling reload that was given up, "2 workers of generation 3 and 2 of
/// generation 2".
pub fn composition(slots: &[Slot]) -> String {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for slot in slots {
        *counts.entry(slot.generation).or_default() += 1;
    }
    let parts = counts.into_iter().rev().enumerate().map(|(index, (generation, number))| {
        let number = if index == 0 { count(number, "worker") } else { number.to_string() };
        format!("{number} of generation {generation}")
    });
    parts.collect::<Vec<_>>().join(" and ")
}

/// "4 workers of generation 3 serve"
pub fn who_serves(slots: &[Slot]) -> String {
    format!("{} {}", composition(slots), if slots.len() == 1 { "serves" } else { "serve" })
}

/// "scaling to 5 workers: queued until the current reload ends"
pub fn queued(command: &Command, workers: Option<u32>, phase: Phase) -> String {
    let what = match (command, workers) {
        (Command::Scale(_), Some(workers)) => format!("scaling to {}", count(workers as usize, "worker")),
        (Command::Recycle(_), _) => "recycling".to_owned(),
        _ => "reload".to_owned(),
    };
    format!("{what}: queued until {}", phase.queued_until())
}

/// "reload: starting generation 3, 4 workers, 2 at a time"
pub fn reload_begins(generation: u32, slots: usize, rollout: Rollout) -> String {
    let how = match rollout {
        Rollout::AllAtOnce => String::new(),
        Rollout::Batches(most) => format!(", {most} at a time"),
        Rollout::Canary { .. } => ", with a canary".to_owned(),
    };
    format!("reload: starting generation {generation}, {}{how}", count(slots, "worker"))
}

/// "generation 3 serves; generation 2 drains"; after a batch, in how many slots it serves.
pub fn switched(newest: u32, last: u32, batch: &Range<usize>, slots: usize) -> String {
    match batch.len() == slots {
        true => format!("generation {newest} serves; generation {last} drains"),
        false => format!("generation {newest} serves in {} of {slots} slots", batch.end),
    }
}

/// `generation 3 is ready after 186 ms: 4 workers on [::]:3000`
pub fn generation_ready(generation: u32, took: Duration, roster: &Roster, endpoints: &Endpoints) -> String {
    let ready = roster.ids(|worker| worker.generation == generation && worker.state == State::Ready);
    let on: BTreeSet<&Endpoint> = ready.iter().flat_map(|id| endpoints.of(*id)).collect();
    let on = if on.is_empty() { String::new() } else { format!(" on {}", list(on)) };
    let workers = count(ready.len(), "worker");
    format!("generation {generation} is ready after {}: {workers}{on}", millis(took))
}

/// A worker that starts waits to be ready.
pub fn waits(worker: &Worker, missing: Vec<Endpoint>) -> String {
    let missing = list(missing);
    format!("{worker} waits: it does not listen on {missing}, as the worker that it replaces does")
}

pub fn not_idle(name: &str, policy: &Policy) -> String {
    format!("{name} was not seen idle within {} (see --drain)", format_duration(policy.drain))
}

pub fn stop_begins(asked_by: &str, workers: usize, policy: &Policy) -> String {
    let (workers, signal) = (count(workers, "worker"), policy.stop_signal);
    let drain = format_duration(policy.stop_drain());
    format!(
        "{asked_by}: stopping {workers} with {signal}, after at most {drain} for their requests (see --stop-within)"
    )
}

pub fn not_idle_at_stop(name: &str, policy: &Policy) -> String {
    format!("{name} was not seen idle within {} (see --stop-within)", format_duration(policy.stop_drain()))
}

pub fn not_stopped_at_stop(name: &str, policy: &Policy) -> String {
    format!(
        "{name} did not end within {} (see --stop-within); killing it",
        format_duration(policy.stop_within)
    )
}

pub fn not_stopped(name: &str, policy: &Policy) -> String {
    let (signal, timeout) = (policy.stop_signal, format_duration(policy.stop_timeout));
    format!("{name} did not end within {timeout} of {signal} (see --stop-timeout); killing it")
}

pub fn not_killed(name: &str) -> String {
    let waited = format_duration(KILL_GRACE);
    format!("{name} has not ended {waited} after SIGKILL; no longer waiting for it")
}
