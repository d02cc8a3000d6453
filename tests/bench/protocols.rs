//! Requests over HTTPS and HTTP/2, and requests that are in flight at a stop. The program has no signal handler.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde::Deserialize;

use crate::peers::{App, Peer, Program, Server};
use crate::process::{self, wait_for};
use crate::reload::{Cell, WORKERS};
use crate::report::median;
use crate::{Context, Options, Result, isolated, length};

const CLIENTS: u32 = 16;
const WORK: Duration = Duration::from_millis(50);
/// At a stop.
const LONG_WORK: Duration = Duration::from_secs(1);
const RELOADED: &str = "naive Node app, 50 ms of work";
const STOPPED: &str = "stop of a naive Node app";
/// A stop while there is no request.
const IDLE: &str = "no request";

/// The text above a table.
pub fn about(table: &str) -> String {
    let peers = "`pm2 kill`, or SIGTERM to the others";
    match table {
        RELOADED => format!(
            "A reload over HTTP, HTTPS and HTTP/2: {CLIENTS} clients, a new connection for each request, \
             {} ms of work for each answer.\n\n",
            WORK.as_millis()
        ),
        STOPPED => format!(
            "A stop ({peers}) when the work for {CLIENTS} requests of {} s has begun, each on a new connection: how many \
             get no answer, and the time until the last process has ended.\n\n",
            LONG_WORK.as_secs()
        ),
        _ => String::new(),
    }
}

pub fn run(options: &Options) -> Result<Vec<Cell>> {
    let mut peers = vec![Peer::ReuseRun(Vec::new()), Peer::Pm2 { wait_ready: false }, Peer::Bare];
    let mut protocols = vec!["https", "h2"];
    if !options.quick {
        peers.insert(2, Peer::Cluster);
        protocols.insert(0, "http");
    }
    let mut cells = Vec::new();
    for (table, measure) in [(RELOADED, reloads as Measure), (STOPPED, stops)] {
        let idle = (table == STOPPED && !options.quick).then_some(IDLE);
        for peer in &peers {
            for column in protocols.iter().copied().chain(idle) {
                let name = format!("{table}, {column}, {}", peer.name());
                if options.wants(&name) {
                    eprintln!("reload: {name}");
                    cells.push(isolated(|| measure(peer, column, options))?);
                }
            }
        }
    }
    Ok(cells)
}

/// Measures a peer in the column of a table.
type Measure = fn(&Peer, &'static str, &Options) -> Result<Cell>;

fn reloads(peer: &Peer, protocol: &'static str, options: &Options) -> Result<Cell> {
    let mut server = Server::start(peer, &app(protocol, WORK), options)?;
    let clients = Clients::start(&server, protocol, CLIENTS, false, options)?;
    let rest = length(options, 1.0, 0.5);
    thread::sleep(rest);
    let mut times = Vec::new();
    for _ in 0..options.runs.unwrap_or(if options.quick { 1 } else { 5 }) {
        times.push(server.reload()?.as_secs_f64());
        thread::sleep(rest);
    }
    let seen = clients.end()?;
    server.end();
    Ok(cell(RELOADED, peer, protocol, times, vec![seen]))
}

fn stops(peer: &Peer, column: &'static str, options: &Options) -> Result<Cell> {
    let (protocol, count) = if column == IDLE { ("http", 0) } else { (column, CLIENTS) };
    let begun = options.work.join("begun");
    let mut app = app(protocol, LONG_WORK);
    app.environment.push(("BENCH_BEGUN", begun.display().to_string()));
    let (mut times, mut seen) = (Vec::new(), Vec::new());
    for _ in 0..options.runs.unwrap_or(if options.quick { 1 } else { 3 }) {
        let mut server = Server::start(peer, &app, options)?;
        fs::write(&begun, "").context("begun")?;
        let clients = Clients::start(&server, protocol, count, true, options)?;
        wait_for("all requests to begin", Duration::from_secs(10), || {
            (fs::read_to_string(&begun).ok()?.lines().count() as u32 == count).then_some(())
        })?;
        times.push(server.stop()?.as_secs_f64());
        seen.push(clients.end()?);
        server.end();
    }
    Ok(cell(STOPPED, peer, column, times, seen))
}

fn app(protocol: &str, work: Duration) -> App {
    let work = work.as_millis().to_string();
    let environment = vec![("BENCH_PROTOCOL", protocol.to_owned()), ("BENCH_WORK_MS", work)];
    App { environment, ..App::new(Program::Naive, WORKERS) }
}

fn cell(table: &'static str, peer: &Peer, column: &'static str, times: Vec<f64>, seen: Vec<Seen>) -> Cell {
    let mut failures = BTreeMap::new();
    for (kind, count) in seen.iter().flat_map(|seen| &seen.failures) {
        *failures.entry(kind.clone()).or_default() += count;
    }
    let (turns, failed) = (times.len() as u32, seen.iter().map(|seen| seen.failed).sum());
    Cell {
        table,
        peer: peer.name(),
        column,
        turns,
        requests: seen.iter().map(|seen| seen.requests).sum(),
        failed,
        failures,
        failed_per_turn: failed as f64 / f64::from(turns),
        most_of_a_client: None,
        seconds: median(times),
        example: seen.into_iter().find_map(|seen| seen.example),
    }
}

/// What clients have seen.
#[derive(Deserialize)]
struct Seen {
    requests: u64,
    failed: u64,
    failures: BTreeMap<String, u64>,
    /// The first failure.
    example: Option<String>,
}

/// A process with clients for all protocols, see apps/clients.js. It ends when its stdin is closed.
struct Clients {
    process: Child,
}

impl Clients {
    /// So many clients, which make requests all the time or `once` only.
    fn start(server: &Server, protocol: &str, count: u32, once: bool, options: &Options) -> Result<Clients> {
        let log = process::log_file(&options.work.join("servers.log"))?;
        let port = server.address().port().to_string();
        let mut command = Command::new("node");
        command.args(["tests/bench/apps/clients.js", protocol, &port, &count.to_string()]);
        command.args(once.then_some("once")).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        Ok(Clients { process: command.spawn().context("clients")? })
    }

    /// Waits until every request that has begun has ended.
    fn end(mut self) -> Result<Seen> {
        drop(self.process.stdin.take());
        let mut output = String::new();
        let stdout = self.process.stdout.as_mut().ok_or("clients without stdout")?;
        stdout.read_to_string(&mut output).context("clients")?;
        self.process.wait().context("clients")?;
        serde_json::from_str(&output).context("clients")
    }
}
