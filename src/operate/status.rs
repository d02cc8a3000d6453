//! What `reuse-run status` shows: as a table for users, as JSON for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::words::{escaped, is_unsafe, printable};

/// What `status --json` prints; tests/status.schema.json describes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// The version of the running reuse-run.
    pub version: String,
    pub pid: u32,
    /// What commands may call it instead of by its PID.
    #[serde(default)]
    pub name: Option<String>,
    pub state: State,
    /// The newest generation that serves.
    pub generation: u32,
    pub slots: u32,
    /// The number of slots with a ready worker.
    pub ready: u32,
    /// What the newest generation that serves runs.
    #[serde(default)]
    pub command: Vec<String>,
    pub addresses: Vec<String>,
    pub workers: Vec<WorkerStatus>,
    pub last_reload: Option<LastReload>,
}

/// What reuse-run is doing: see [`crate::fleet::Activity`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Starting,
    Serving,
    Reloading,
    #[serde(rename = "abandoning a reload")]
    Abandoning,
    Scaling,
    #[serde(rename = "recycling a worker")]
    Recycling,
    Stopping,
    /// A word that this version doesn't know; only a command can get it.
    #[serde(other)]
    Unknown,
}

/// A slot with its worker; or a worker that doesn't serve in its slot yet, or no longer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WorkerStatus {
    pub slot: u32,
    /// `None` while the slot waits for its next worker.
    pub pid: Option<u32>,
    pub generation: u32,
    /// What it runs if that isn't [`Status::command`].
    #[serde(default)]
    pub command: Option<Vec<String>>,
    pub serves: bool,
    pub state: WorkerState,
    /// Time in that state.
    pub seconds: Option<f64>,
    /// Restarts in the slot since the last reload.
    pub restarts: u32,
    pub load: WorkerLoad,
    /// Connections that wait to be accepted.
    pub accept_queue: u32,
    /// Connections that were accepted.
    pub connections: u32,
    /// Of the worker and all processes that it has started.
    pub rss_kib: u64,
    pub cpu_seconds: f64,
    /// Time since its start.
    pub age_seconds: Option<f64>,
    /// The last STATUS= that it sent: sd_notify(3).
    pub status: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerState {
    Starting,
    Ready,
    Draining,
    Stopping,
    Killed,
    /// The slot has no process.
    Down,
    /// A word that this version doesn't know; only a command can get it.
    #[serde(other)]
    Unknown,
}

/// Whether a worker is skipped for new connections: see [`crate::steering::load::Load`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerLoad {
    Free,
    Busy,
    Stuck,
    /// It has been stuck and has done nothing for as long as `--hung-timeout` says, or 10 s.
    Hung,
    /// A word that this version doesn't know; only a command can get it.
    #[serde(other)]
    Unknown,
}

/// In the table stands the same word as in the JSON.
macro_rules! display_as_in_json {
    ($($name:ty),*) => {
        $(impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
                self.serialize(f)
            }
        })*
    };
}

display_as_in_json!(State, WorkerState, WorkerLoad);

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastReload {
    pub generation: u32,
    pub ok: bool,
    /// Why it failed.
    pub reason: Option<String>,
    pub seconds_ago: f64,
}

impl Status {
    /// The exit status of the command: 0 if all slots have a ready worker that doesn't hang, 3 if some have, 4 if none has.
    pub fn exit_status(&self) -> u8 {
        let hangs = |worker: &&WorkerStatus| worker.serves && worker.load == WorkerLoad::Hung;
        match self.ready.saturating_sub(self.workers.iter().filter(hangs).count() as u32) {
            0 => 4,
            healthy if healthy < self.slots => 3,
            _ => 0,
        }
    }
}

impl Status {
    /// What `status --json` prints, on one line. serde_json escapes control characters below U+0020 only; others can stand
    /// in strings alone.
    ///
    /// # Errors
    /// Those of serde_json.
    pub fn to_json(&self) -> serde_json::Result<String> {
        let escape = |c: char| if is_unsafe(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
        Ok(serde_json::to_string(self)?.chars().map(escape).collect())
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { version, pid, state, ready, slots, .. } = self;
        let on = if self.addresses.is_empty() {
            String::new()
        } else {
            format!(" on {}", escaped(&self.addresses.join(" ")))
        };
        let version = escaped(version);
        let name = self.name.as_ref().map_or(String::new(), |name| format!("{}, ", escaped(name)));
        writeln!(f, "reuse-run {version}, {name}pid {pid}: {state}, {ready} of {slots} slots ready{on}")?;
        const HEAD: [&str; 11] = [
            "SLOT",
            "PID",
            "GENERATION",
            "STATE",
            "SINCE",
            "RESTARTS",
            "QUEUE",
            "CONNECTIONS",
            "RSS",
            "CPU",
            "STATUS",
        ];
        f.write_str(&table(HEAD, self.workers.iter().map(WorkerStatus::row).collect()))?;
        writeln!(f, "command: {}", command_line(&self.command))?;
        let of_worker =
            |worker: &WorkerStatus| Some((worker.generation, command_line(worker.command.as_ref()?)));
        for (generation, command) in self.workers.iter().filter_map(of_worker).collect::<BTreeMap<_, _>>() {
            writeln!(f, "command of generation {generation}: {command}")?;
        }
        if let Some(LastReload { generation, reason, seconds_ago, .. }) = &self.last_reload {
            let how =
                reason.as_ref().map_or("done".to_owned(), |reason| format!("failed, {}", escaped(reason)));
            writeln!(f, "last reload: generation {generation}, {} ago: {how}", span(*seconds_ago))?;
        }
        Ok(())
    }
}

/// A line for each reuse-run, by PID; `None` for one that doesn't answer.
pub fn table_of(all: &[(u32, Option<Box<Status>>)]) -> String {
    let row = |(pid, status): &(u32, Option<Box<Status>>)| {
        let of = |text: fn(&Status) -> String| status.as_ref().map_or("-".to_owned(), |status| text(status));
        let state = status.as_ref().map_or("does not answer".to_owned(), |status| status.state.to_string());
        let name = of(|status| status.name.as_deref().map_or("-".to_owned(), escaped));
        let ready = of(|status| format!("{}/{}", status.ready, status.slots));
        let generation = of(|status| status.generation.to_string());
        [pid.to_string(), name, state, ready, generation, of(|status| command_line(&status.command))]
    };
    table(["PID", "NAME", "STATE", "READY", "GENERATION", "COMMAND"], all.iter().map(row).collect())
}

/// Rows below their heads. Columns of text are aligned to the left.
fn table<const N: usize>(heads: [&str; N], rows: Vec<[String; N]>) -> String {
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).chain([heads[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for row in [&heads.map(str::to_owned)].into_iter().chain(&rows) {
        let cells = row.iter().zip(&widths).zip(heads).map(|((text, width), head)| match head {
            "NAME" | "STATE" | "STATUS" | "COMMAND" => format!("{text:width$}"),
            _ => format!("{text:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text += "\n";
    }
    text
}

fn command_line(words: &[String]) -> String {
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// A word of a command as a shell would take it; control characters are escaped.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "_@%+=:,./-".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", printable(word.as_bytes()).replace('\'', "'\\''")),
    }
}

impl WorkerStatus {
    fn row(&self) -> [String; 11] {
        let state = match self.load {
            _ if !self.serves => format!("({})", self.state),
            WorkerLoad::Free => self.state.to_string(),
            load => format!("{}, {load}", self.state),
        };
        let cpu = self.age_seconds.filter(|age| *age > 0.0).map(|age| self.cpu_seconds / age * 100.0);
        let of_process = |text: String| if self.pid.is_some() { text } else { "-".to_owned() };
        [
            self.slot.to_string(),
            self.pid.map_or("-".to_owned(), |pid| pid.to_string()),
            self.generation.to_string(),
            state,
            self.seconds.map_or("-".to_owned(), span),
            self.restarts.to_string(),
            of_process(self.accept_queue.to_string()),
            of_process(self.connections.to_string()),
            of_process(format!("{:.1} MiB", self.rss_kib as f64 / 1024.0)),
            of_process(format!("{:.1}%", cpu.unwrap_or(0.0))),
            self.status.as_deref().map(escaped).unwrap_or_default(),
        ]
    }
}

/// "850ms" below a second, "3m 5s" below an hour, else "2h 7m".
pub fn span(seconds: f64) -> String {
    let exact = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    let rounded = match exact {
        exact if exact < Duration::from_secs(1) => Duration::from_millis(exact.as_millis() as u64),
        exact if exact < Duration::from_secs(3600) => Duration::from_secs(exact.as_secs()),
        exact => Duration::from_secs(exact.as_secs() / 60 * 60),
    };
    humantime::format_duration(rounded).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(state: WorkerState, load: WorkerLoad, serves: bool) -> WorkerStatus {
        WorkerStatus {
            slot: 0,
            pid: Some(42),
            generation: 2,
            command: None,
            serves,
            state,
            seconds: Some(7.0),
            restarts: 1,
            load,
            accept_queue: 3,
            connections: 4,
            rss_kib: 2048,
            cpu_seconds: 1.0,
            age_seconds: Some(10.0),
            status: None,
        }
    }

    fn status(workers: Vec<WorkerStatus>, ready: u32, slots: u32) -> Status {
        Status {
            version: "0.1.0".to_owned(),
            pid: 1,
            name: None,
            state: State::Abandoning,
            generation: 2,
            slots,
            ready,
            command: ["node", "my app.js", "it's", ""].map(str::to_owned).to_vec(),
            addresses: vec!["[::]:3000".to_owned()],
            workers,
            last_reload: None,
        }
    }

    #[test]
    fn the_exit_status_says_whether_all_slots_some_or_none_are_ready() {
        let hung = || worker(WorkerState::Ready, WorkerLoad::Hung, true);
        let retired = || worker(WorkerState::Draining, WorkerLoad::Hung, false);
        for (ready, workers, expected) in [
            (2, vec![], 0),
            (1, vec![], 3),
            (0, vec![], 4),
            (2, vec![hung(), retired()], 3),
            (2, vec![hung(), hung()], 4),
        ] {
            assert_eq!(status(workers, ready, 2).exit_status(), expected);
        }
    }

    #[test]
    fn states_and_loads_are_the_same_words_in_the_table_and_in_the_json() {
        let status = status(vec![worker(WorkerState::Draining, WorkerLoad::Stuck, true)], 0, 1);
        let json = serde_json::to_string(&status).unwrap();
        for field in [r#""state":"abandoning a reload""#, r#""state":"draining""#, r#""load":"stuck""#] {
            assert!(json.contains(field), "{json}");
        }
        let table = status.to_string();
        assert!(
            table.starts_with(
                "reuse-run 0.1.0, pid 1: abandoning a reload, 0 of 1 slots ready on [::]:3000\n"
            )
        );
        assert!(table.contains("  draining, stuck  "), "{table}");
        assert!(table.ends_with("\ncommand: node 'my app.js' 'it'\\''s' ''\n"), "{table}");
    }

    #[test]
    fn another_command_of_some_workers_is_shown_once_for_each_generation() {
        let worker = |generation, words: Option<&[&str]>| WorkerStatus {
            generation,
            command: words.map(|words| words.iter().map(|word| (*word).to_owned()).collect()),
            ..worker(WorkerState::Ready, WorkerLoad::Free, true)
        };
        let (old, new) = (Some(&["node", "old.js"][..]), Some(&["true"][..]));
        let workers = vec![worker(1, old), worker(1, old), worker(2, None), worker(3, new)];
        let table = status(workers, 3, 3).to_string();
        assert!(
            table.ends_with(" ''\ncommand of generation 1: node old.js\ncommand of generation 3: true\n"),
            "{table}"
        );
    }

    #[test]
    fn a_worker_that_does_not_serve_stands_in_parentheses_and_a_slot_without_process_has_dashes() {
        let mut down = worker(WorkerState::Down, WorkerLoad::Free, true);
        (down.pid, down.seconds, down.age_seconds) = (None, None, None);
        let rows =
            [worker(WorkerState::Ready, WorkerLoad::Busy, false), down].map(|worker| worker.row().join(" "));
        assert_eq!(rows[0], "0 42 2 (ready) 7s 1 3 4 2.0 MiB 10.0% ");
        assert_eq!(rows[1], "0 - 2 down - 1 - - - - ");
    }

    #[test]
    fn a_word_that_a_newer_version_has_is_shown_as_unknown() {
        let status = status(vec![worker(WorkerState::Ready, WorkerLoad::Free, true)], 1, 1);
        let json = serde_json::to_string(&status).unwrap();
        let newer = json.replace("abandoning a reload", "sleeping").replace("ready\",", "late\",");
        let newer = newer.replace("\"free\"", "\"odd\",\"more\":1");
        let read: Status = serde_json::from_str(&newer).unwrap();
        assert_eq!(read.state, State::Unknown);
        assert_eq!(
            (read.workers[0].state, read.workers[0].load),
            (WorkerState::Unknown, WorkerLoad::Unknown)
        );
        assert!(read.to_string().contains("pid 1: unknown"), "{read}");
    }

    #[test]
    fn no_text_of_a_status_controls_the_terminal() {
        let text = "a\n\x1b[2J\u{9b}2J\u{202e}\x7fä";
        let mut hostile = worker(WorkerState::Ready, WorkerLoad::Free, true);
        hostile.status = Some(text.to_owned());
        let mut status = status(vec![hostile], 1, 1);
        (status.version, status.addresses) = (text.to_owned(), vec![text.to_owned()]);
        status.command = vec![text.to_owned()];
        let reason = Some(text.to_owned());
        status.last_reload = Some(LastReload { generation: 1, ok: false, reason, seconds_ago: 1.0 });
        let table = status.to_string();
        assert_eq!(table.lines().count(), 5);
        assert!(!table.contains(|c| is_unsafe(c) && c != '\n'), "{table:?}");
        let json = status.to_json().unwrap();
        assert!(!json.contains(is_unsafe), "{json:?}");
        let read: Status = serde_json::from_str(&json).unwrap();
        assert_eq!(read.addresses, [text]);
    }

    #[test]
    fn a_span_is_as_exact_as_its_length_needs() {
        let spans = [0.8501, 185.9, 7_659.0].map(span);
        assert_eq!(spans, ["850ms", "3m 5s", "2h 7m"]);
    }
}
