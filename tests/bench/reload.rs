//! Which requests fail in a reload.

use std::collections::BTreeMap;
use std::iter;
use std::thread;
use std::time::Duration;

use serde::Serialize;

use crate::load::{Load, LoadOptions, Mode};
use crate::peers::{App, Peer, Program, Server};
use crate::report::{self, median, table};
use crate::{Options, Result, isolated, length, protocols};

pub const WORKERS: u32 = 4;

/// How clients use their connections.
const CLIENTS: [(&str, usize, Mode); 3] = [
    ("new connections", 16, Mode::NewConnection),
    ("keep-alive with think time", 32, Mode::KeepAlive { think: Duration::from_millis(20) }),
    FULL_SPEED,
];
const FULL_SPEED: (&str, usize, Mode) =
    ("keep-alive at full speed", 8, Mode::KeepAlive { think: Duration::ZERO });

/// A peer in a column of a table.
#[derive(Serialize)]
pub struct Cell {
    /// The program, and what is done with it.
    pub table: &'static str,
    pub peer: String,
    pub column: &'static str,
    /// The number of reloads or stops.
    pub turns: u32,
    pub requests: u64,
    pub failed: u64,
    pub failures: BTreeMap<String, u64>,
    pub failed_per_turn: f64,
    /// The most requests that one client lost in one turn, where it was counted.
    pub most_of_a_client: Option<u64>,
    /// The median time of a reload or a stop.
    pub seconds: f64,
    /// The first failure.
    pub example: Option<String>,
}

/// Which peers run which programs.
fn rows(options: &Options) -> Vec<(Program, Peer)> {
    let ours = Peer::ReuseRun(Vec::new());
    let node = [
        ours.clone(),
        Peer::Pm2 { wait_ready: false },
        Peer::Pm2 { wait_ready: true },
        Peer::Cluster,
        Peer::Bare,
    ];
    let given = [Peer::ServerStarter, Peer::Reuseport { migrate: false }, Peer::Reuseport { migrate: true }];
    let mut rows = Vec::new();
    if !options.quick {
        rows.extend(node.iter().map(|peer| (Program::Express, peer.clone())));
    }
    for program in [Program::Naive, Program::Polite] {
        rows.extend(node.iter().chain(&given).map(|peer| (program, peer.clone())));
    }
    if options.quick {
        rows.retain(|(_, peer)| !matches!(peer, Peer::Bare | Peer::Reuseport { migrate: true }));
    }
    for program in [Program::Nginx, Program::Gunicorn, Program::Uvicorn] {
        rows.extend([(program, ours.clone()), (program, Peer::Itself)]);
    }
    rows
}

pub fn run(options: &Options) -> Result<()> {
    let mut cells: Vec<Cell> = Vec::new();
    let rows = rows(options);
    for (program, peer) in &rows {
        let name = format!("{}, {}", program.name(), peer.name());
        if !options.wants(&name) {
            continue;
        }
        eprintln!("reload: {name}");
        cells.extend(isolated(|| measure(*program, peer, options))?);
    }
    cells.extend(protocols::run(options)?);
    let markdown = markdown(&cells);
    report::write(options, "reload", &cells, &markdown)
}

fn measure(program: Program, peer: &Peer, options: &Options) -> Result<Vec<Cell>> {
    let mut app = App::new(program, WORKERS);
    app.patience = length(options, app.patience.as_secs_f64(), 1.0);
    let mut server = Server::start(peer, &app, options)?;
    let reloads = options.runs.unwrap_or(if options.quick { 1 } else { 5 });
    let mut cells = Vec::new();
    for (clients, count, mode) in CLIENTS {
        let load = LoadOptions::new(server.address(), count).mode(mode);
        let load = load.timeout(length(options, 5.0, 2.0));
        let load = Load::start(load);
        let rest = length(options, 0.5, 0.2);
        thread::sleep(rest);
        let (mut times, mut most) = (Vec::new(), 0);
        for _ in 0..reloads {
            let before = load.failed_by_client();
            times.push(server.reload()?.as_secs_f64());
            // A worker that was started last may not be ready yet.
            thread::sleep(rest);
            let failed =
                load.failed_by_client().into_iter().zip(before).map(|(after, before)| after - before);
            most = failed.max().unwrap_or(0).max(most);
        }
        let report = load.stop();
        let counts = &report.counts;
        cells.push(Cell {
            table: program.name(),
            peer: peer.name(),
            column: clients,
            turns: reloads,
            requests: counts.requests,
            failed: counts.failed,
            failures: counts.failures.iter().map(|(kind, count)| (kind.to_string(), *count)).collect(),
            failed_per_turn: counts.failed as f64 / f64::from(reloads),
            most_of_a_client: (clients == FULL_SPEED.0).then_some(most),
            seconds: median(times),
            example: report.failures.first().map(|failure| failure.detail.clone()),
        });
    }
    server.end();
    Ok(cells)
}

fn markdown(cells: &[Cell]) -> String {
    let mut text = format!(
        "Failed requests per reload of {WORKERS} workers, and the duration of a reload. \"Each client\" is the share of \
         each of the clients at full speed, and the most that one of them lost in one reload.\n\n"
    );
    for name in distinct(cells.iter().map(|cell| cell.table)) {
        let cells: Vec<&Cell> = cells.iter().filter(|cell| cell.table == name).collect();
        let columns = distinct(cells.iter().map(|cell| cell.column));
        let of_clients = cells.iter().any(|cell| cell.most_of_a_client.is_some());
        let row = |peer: &str| {
            let of = |column: &&str| cells.iter().find(|cell| cell.peer == peer && cell.column == *column);
            let own: Vec<Option<&&Cell>> = columns.iter().map(of).collect();
            let shown = |show: fn(&Cell) -> String| {
                own.iter().map(move |cell| cell.map_or("–".to_owned(), |cell| show(cell)))
            };
            let of_client = shown(of_a_client).next_back().filter(|_| of_clients);
            let time = |cell: &Cell| format!("{:.1} s", cell.seconds);
            iter::once(peer.to_owned()).chain(shown(failures)).chain(of_client).chain(shown(time)).collect()
        };
        let rows: Vec<Vec<String>> =
            distinct(cells.iter().map(|cell| &*cell.peer)).into_iter().map(row).collect();
        let mut header = [&[name], &*columns].concat();
        header.extend(of_clients.then_some("each client"));
        header.push("time");
        header.extend(vec![""; columns.len() - 1]);
        text += &format!("{}{}\n", protocols::about(name), table(&header, &rows));
    }
    text
}

/// Without repetitions, in their order.
fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    names.for_each(|name| {
        if !seen.contains(&name) {
            seen.push(name);
        }
    });
    seen
}

fn failures(cell: &Cell) -> String {
    let requests = cell.requests / u64::from(cell.turns);
    match (cell.requests, cell.failed) {
        (0, _) => "–".to_owned(),
        (_, 0) => format!("0 of {requests}"),
        _ => format!("**{:.1}** of {requests}", cell.failed_per_turn),
    }
}

fn of_a_client(cell: &Cell) -> String {
    match cell.most_of_a_client {
        None => "–".to_owned(),
        Some(0) => "0".to_owned(),
        Some(most) => format!("{:.1}, at most {most}", cell.failed_per_turn / FULL_SPEED.1 as f64),
    }
}
