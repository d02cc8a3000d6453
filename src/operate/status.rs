//! How everything stands, for people and programs.

use std::fmt::{self, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What `status --json` prints; the README describes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Of the running program.
    pub version: String,
    pub pid: u32,
    pub state: String,
    /// The newest that serves.
    pub generation: u32,
    pub slots: u32,
    /// How many of the slots have a worker that is ready.
    pub ready: u32,
    pub addresses: Vec<String>,
    pub workers: Vec<Worker>,
    pub last_reload: Option<LastReload>,
}

/// A slot, or a worker that doesn't serve in it: not yet, or no more.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Worker {
    pub slot: u32,
    /// `None` while the slot waits for its next worker.
    pub pid: Option<u32>,
    pub generation: u32,
    pub serves: bool,
    pub state: String,
    /// In that state.
    pub seconds: Option<f64>,
    /// Of the slot, since the last reload.
    pub restarts: u32,
    /// `busy` or `stuck` if others get the new connections: see [`crate::steering::load::Load`].
    pub load: String,
    /// Connections that wait to be accepted.
    pub accept_queue: u32,
    /// Connections that were accepted.
    pub connections: u32,
    /// Of the worker and all that it has started.
    pub rss_kib: u64,
    pub cpu_seconds: f64,
    /// Since it was started.
    pub age_seconds: Option<f64>,
    /// What it says of itself: sd_notify(3), STATUS=.
    pub status: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastReload {
    pub generation: u32,
    pub ok: bool,
    /// Why not.
    pub reason: Option<String>,
    pub seconds_ago: f64,
}

impl Status {
    /// The exit status of the command: 0 when all slots are ready, 3 when some are, 4 when none is.
    pub fn exit_status(&self) -> u8 {
        match self.ready {
            0 => 4,
            ready if ready < self.slots => 3,
            _ => 0,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { version, pid, state, ready, slots, .. } = self;
        let on = if self.addresses.is_empty() {
            String::new()
        } else {
            format!(" on {}", self.addresses.join(" "))
        };
        writeln!(f, "reuse-run {version}, pid {pid}: {state}, {ready} of {slots} slots ready{on}")?;
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
        let rows: Vec<[String; 11]> = self.workers.iter().map(Worker::row).collect();
        let width = |column: usize| {
            rows.iter().map(|row| row[column].chars().count()).chain([HEAD[column].len()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
        let heads = HEAD.map(str::to_owned);
        for row in [&heads].into_iter().chain(&rows) {
            let mut line = String::new();
            for (column, (text, width)) in row.iter().zip(&widths).enumerate() {
                let is_text = HEAD[column] == "STATE" || HEAD[column] == "STATUS";
                if is_text { write!(line, "{text:width$}  ")? } else { write!(line, "{text:>width$}  ")? }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        if let Some(LastReload { generation, reason, seconds_ago, .. }) = &self.last_reload {
            let how = reason.as_ref().map_or("done".to_owned(), |reason| format!("failed, {reason}"));
            writeln!(f, "last reload: generation {generation}, {} ago: {how}", span(*seconds_ago))?;
        }
        Ok(())
    }
}

impl Worker {
    fn row(&self) -> [String; 11] {
        let state = match self.load.as_str() {
            _ if !self.serves => format!("({})", self.state),
            "free" => self.state.clone(),
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
            self.status.clone().unwrap_or_default(),
        ]
    }
}

/// "850ms" of what is short, else "3m 5s"
pub fn span(seconds: f64) -> String {
    let exact = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    let rounded = match exact {
        short if short < Duration::from_secs(1) => Duration::from_millis(short.as_millis() as u64),
        long if long < Duration::from_secs(3600) => Duration::from_secs(long.as_secs()),
        longer => Duration::from_secs(longer.as_secs() / 60 * 60),
    };
    humantime::format_duration(rounded).to_string()
}
