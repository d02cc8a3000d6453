//! Which requests fail in a reload.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use serde::Serialize;

use crate::load::{Load, LoadOptions, Mode};
use crate::peers::{App, Peer, Program, Server};
use crate::report::{self, median, table};
use crate::{Options, Result, isolated, length};

const WORKERS: u32 = 4;

/// How clients use their connections.
const CLIENTS: [(&str, usize, Mode); 3] = [
    ("new connections", 16, Mode::NewConnection),
    ("keep-alive with think time", 32, Mode::KeepAlive { think: Duration::from_millis(20) }),
    ("keep-alive at full speed", 8, Mode::KeepAlive { think: Duration::ZERO }),
];

#[derive(Serialize)]
struct Cell {
    program: &'static str,
    peer: String,
    clients: &'static str,
    reloads: u32,
    requests: u64,
    failed: u64,
    failures: BTreeMap<String, u64>,
    failed_per_reload: f64,
    reload_seconds: f64,
    /// The first failure.
    example: Option<String>,
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
        let mut times = Vec::new();
        for _ in 0..reloads {
            times.push(server.reload()?.as_secs_f64());
            // A worker that was started last may not be ready yet.
            thread::sleep(rest);
        }
        let report = load.stop();
        let counts = &report.counts;
        cells.push(Cell {
            program: program.name(),
            peer: peer.name(),
            clients,
            reloads,
            requests: counts.requests,
            failed: counts.failed,
            failures: counts.failures.iter().map(|(kind, count)| (kind.to_string(), *count)).collect(),
            failed_per_reload: counts.failed as f64 / f64::from(reloads),
            reload_seconds: median(times),
            example: report.failures.first().map(|failure| failure.detail.clone()),
        });
    }
    server.end();
    Ok(cells)
}

fn markdown(cells: &[Cell]) -> String {
    let mut programs: Vec<&str> = cells.iter().map(|cell| cell.program).collect();
    programs.dedup();
    let mut text = "Failed requests per reload of 4 workers, and the duration of a reload.\n\n".to_owned();
    for program in programs {
        let rows = cells.iter().filter(|cell| cell.program == program);
        let rows: Vec<&Cell> = rows.collect();
        let line = |cells: &[&Cell]| {
            let figure = |cell: &&Cell| match cell.failed {
                0 => format!("0 of {}", cell.requests / u64::from(cell.reloads)),
                _ => format!(
                    "**{:.1}** of {}",
                    cell.failed_per_reload,
                    cell.requests / u64::from(cell.reloads)
                ),
            };
            let mut row = vec![cells[0].peer.clone()];
            row.extend(cells.iter().map(figure));
            row.extend(cells.iter().map(|cell| format!("{:.1} s", cell.reload_seconds)));
            row
        };
        let rows: Vec<Vec<String>> = rows.chunks(CLIENTS.len()).map(line).collect();
        let names = CLIENTS.map(|(name, _, _)| name);
        let header = [program, names[0], names[1], names[2], "time", "", ""];
        text += &format!("{}\n", table(&header, &rows));
    }
    text
}
