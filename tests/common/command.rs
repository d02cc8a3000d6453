//! The commands of a running `reuse-run` (reload, status, scale, stop) and what they say.

use std::os::unix::process::ExitStatusExt;

use serde_json::Value;

use super::program::reuse_run;
use super::service::Service;

/// Starts `reuse-run WORDS PID`.
pub fn begin(service: &Service, words: &str) -> Service {
    begin_words(&format!("{words} {}", service.pid()))
}

/// Starts `reuse-run WORDS`.
pub fn begin_words(words: &str) -> Service {
    Service::start(words.split_whitespace())
}

/// Runs `reuse-run WORDS PID`.
pub fn run(service: &Service, words: &str) -> Outcome {
    Outcome::of(begin(service, words))
}

/// Runs `reuse-run WORDS`.
pub fn run_words(words: &str) -> Outcome {
    Outcome::of(begin_words(words))
}

/// How a command has ended, and what it has printed.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Outcome {
    /// Waits for the end of a command.
    #[track_caller]
    pub fn of(mut command: Service) -> Outcome {
        let status = command.wait_end();
        let (code, signal) = (status.code(), status.signal());
        Outcome { code, signal, out: command.out.text(), err: command.log.text() }
    }

    /// The command has succeeded, and its last line contains `part`.
    #[track_caller]
    pub fn assert_done(&self, part: &str) {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert!(self.out.lines().last().is_some_and(|line| line.contains(part)), "{part:?} in {self:?}");
        assert_eq!(self.err, "", "{self:?}");
    }

    /// The command has failed with status 1, and its error contains all `parts`.
    #[track_caller]
    pub fn assert_failed(&self, parts: &[&str]) {
        assert_eq!(self.code, Some(1), "{self:?}");
        parts.iter().for_each(|part| assert!(self.err.contains(part), "{part:?} in {self:?}"));
    }
}

/// What `status --json` prints.
#[track_caller]
pub fn status(service: &Service) -> Value {
    let outcome = run(service, "status --json");
    serde_json::from_str(&outcome.out).unwrap_or_else(|error| panic!("{error}: {outcome:?}"))
}

/// The workers that `status --json` shows and that are `wanted`.
#[track_caller]
pub fn workers_where(service: &Service, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
    let status = status(service);
    let workers = status["workers"].as_array().expect("workers").iter();
    workers.filter(|worker| wanted(worker)).cloned().collect()
}

/// Slots and generations of the workers that serve.
#[track_caller]
pub fn serving(service: &Service) -> Vec<(u64, u64)> {
    let number = |worker: &Value, field: &str| worker[field].as_u64().expect("a number");
    let workers = workers_where(service, |worker| worker["serves"] == true);
    workers.iter().map(|worker| (number(worker, "slot"), number(worker, "generation"))).collect()
}
