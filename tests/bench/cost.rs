//! The cost of reuse-run: throughput and CPU time, compared with the same program without it.

use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::load::{Load, LoadOptions, Mode};
use crate::peers::{App, Peer, Program, Server};
use crate::report::{self, median, quartiles, table};
use crate::{Context, Options, Result, in_turn, isolated, length, process};

/// What the clients send.
#[derive(Clone, Copy)]
enum Traffic {
    Http(Mode),
    /// Each client sends the next datagram when the last one was answered.
    Datagrams,
}

const HTTP: &[(&str, Traffic)] = &[
    ("new connections", Traffic::Http(Mode::NewConnection)),
    ("keep-alive", Traffic::Http(Mode::KeepAlive { think: Duration::ZERO })),
];
const DATAGRAMS: &[(&str, Traffic)] = &[("UDP", Traffic::Datagrams)];

/// Servers that run side by side and are loaded in turns. All are compared with the first one.
struct Group {
    name: &'static str,
    program: Program,
    traffic: &'static [(&'static str, Traffic)],
    workers: u32,
    clients: usize,
    /// Whether all of them run behind a filter of system calls, as in a container.
    is_filtered: bool,
    peers: Vec<Peer>,
}

impl Group {
    /// The names of its peers. A second peer of the same kind shows how much equal peers differ.
    fn names(&self) -> Vec<String> {
        let name = |(index, peer): (usize, &Peer)| match self.peers[..index].contains(peer) {
            true => format!("{}, once more", peer.name()),
            false => peer.name(),
        };
        self.peers.iter().enumerate().map(name).collect()
    }
}

fn groups() -> [Group; 7] {
    let ours = Peer::ReuseRun(Vec::new());
    let three = || vec![Peer::Bare, Peer::Bare, ours.clone()];
    let reuseport = || Peer::Reuseport { migrate: false };
    let udp = |name, workers, is_filtered| {
        let peer = || if workers == 1 { Peer::Bare } else { reuseport() };
        Group {
            name,
            program: Program::Datagrams,
            traffic: DATAGRAMS,
            workers,
            clients: 4 * workers as usize,
            is_filtered,
            peers: vec![peer(), peer(), Peer::ReuseRun(vec!["--udp"])],
        }
    };
    [
        Group {
            name: "one trivial server",
            program: Program::Trivial,
            traffic: HTTP,
            workers: 1,
            clients: 4,
            is_filtered: false,
            peers: three(),
        },
        Group {
            name: "one Node app",
            program: Program::Naive,
            traffic: HTTP,
            workers: 1,
            clients: 8,
            is_filtered: false,
            peers: three(),
        },
        Group {
            name: "four Node apps",
            program: Program::Naive,
            traffic: HTTP,
            workers: 4,
            clients: 16,
            is_filtered: false,
            peers: vec![
                reuseport(),
                reuseport(),
                ours,
                Peer::SharedQueue,
                Peer::Cluster,
                Peer::Pm2 { wait_ready: false },
            ],
        },
        udp("one server of UDP", 1, false),
        udp("four servers of UDP", 4, false),
        udp("one server of UDP in a container", 1, true),
        udp("four servers of UDP in a container", 4, true),
    ]
}

#[derive(Serialize)]
struct Figure {
    group: &'static str,
    clients: &'static str,
    peer: String,
    run: u32,
    requests_per_second: f64,
    cpu_us_per_request: f64,
    /// Ratio to the first of the group in the same run.
    throughput_ratio: f64,
    cpu_ratio: f64,
    failed: u64,
}

/// The sum of all measurements of one server.
#[derive(Default, Clone)]
struct Sum {
    requests: u64,
    failed: u64,
    seconds: f64,
    cpu: Duration,
}

pub fn run(options: &Options) -> Result<()> {
    let mut figures = Vec::new();
    for group in groups() {
        if !options.wants(group.name) {
            continue;
        }
        for run in 0..options.runs.unwrap_or(if options.quick { 1 } else { 12 }) {
            eprintln!("cost: {}, run {run}", group.name);
            figures.extend(isolated(|| measure(&group, run, options))?);
        }
    }
    let markdown = markdown(&figures);
    report::write(options, "cost", &figures, &markdown)
}

fn measure(group: &Group, run: u32, options: &Options) -> Result<Vec<Figure>> {
    let app = App { is_filtered: group.is_filtered, ..App::new(group.program, group.workers) };
    let servers = Server::start_side_by_side(&group.peers, &app, options)?;
    let mut figures = Vec::new();
    for &(clients, traffic) in group.traffic {
        let slice = |server: &Server, time| {
            let before = process::cpu_time(&server.pids());
            let sum = match traffic {
                Traffic::Http(mode) => {
                    let load = Load::start(LoadOptions::new(server.address(), group.clients).mode(mode));
                    thread::sleep(time);
                    let report = load.stop();
                    let (requests, failed) = (report.counts.requests, report.counts.failed);
                    Sum { requests, failed, seconds: report.elapsed.as_secs_f64(), ..Sum::default() }
                }
                Traffic::Datagrams => send_datagrams(server.address(), group.clients, time)?,
            };
            Ok::<Sum, String>(Sum { cpu: process::cpu_time(&server.pids()) - before, ..sum })
        };
        for server in &servers {
            slice(server, length(options, 1.0, 0.3))?;
        }
        let mut sums = vec![Sum::default(); servers.len()];
        for turn in 0..if options.quick { 4 } else { 12 } {
            // Turns are short, so that other load on the machine slows all servers equally.
            for index in in_turn(turn, servers.len()) {
                let more = slice(&servers[index], Duration::from_millis(250))?;
                let sum = &mut sums[index];
                sum.requests += more.requests;
                sum.failed += more.failed;
                sum.seconds += more.seconds;
                sum.cpu += more.cpu;
            }
        }
        let rate = |sum: &Sum| sum.requests as f64 / sum.seconds;
        let cpu = |sum: &Sum| sum.cpu.as_secs_f64() * 1e6 / sum.requests as f64;
        figures.extend(group.names().into_iter().zip(&sums).map(|(peer, sum)| Figure {
            group: group.name,
            clients,
            peer,
            run,
            requests_per_second: rate(sum),
            cpu_us_per_request: cpu(sum),
            throughput_ratio: rate(sum) / rate(&sums[0]),
            cpu_ratio: cpu(sum) / cpu(&sums[0]),
            failed: sum.failed,
        }));
    }
    Ok(figures)
}

/// Has so many clients ask and wait for the answer, again and again. One that waits for a second has failed.
fn send_datagrams(server: SocketAddr, clients: usize, time: Duration) -> Result<Sum> {
    let begun = Instant::now();
    let client = || {
        let socket = UdpSocket::bind("127.0.0.1:0").context("a socket")?;
        socket.connect(server).context("connect")?;
        socket.set_read_timeout(Some(Duration::from_secs(1))).context("a time-out")?;
        let (mut sum, mut answer) = (Sum::default(), [0; 256]);
        while begun.elapsed() < time {
            sum.requests += 1;
            let is_answered = socket.send(&[b'x'; 32]).is_ok() && socket.recv(&mut answer).is_ok();
            sum.failed += u64::from(!is_answered);
        }
        Ok::<Sum, String>(sum)
    };
    let clients: Vec<Result<Sum>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a client")).collect()
    });
    let mut all = Sum { seconds: begun.elapsed().as_secs_f64(), ..Sum::default() };
    for sum in clients {
        let Sum { requests, failed, .. } = sum?;
        all.requests += requests;
        all.failed += failed;
    }
    Ok(all)
}

fn markdown(figures: &[Figure]) -> String {
    let mut text = "Servers run side by side on one machine and are loaded in turns of 250 ms. Ratios are to the first line \
                    of each table, a program without reuse-run: the median over all runs and the quartiles. Each run \
                    starts the servers again. \"Once more\" shows how much two equal servers differ. CPU is user \
                    and system time of all processes of the server. \"In a container\" means: behind a filter of system calls \
                    that allows all of them, as a container's program runs behind one.\n\n"
        .to_owned();
    let first_runs = figures.iter().filter(|figure| figure.run == 0);
    let mut tables: Vec<(&str, &str)> = first_runs.map(|figure| (figure.group, figure.clients)).collect();
    tables.dedup();
    for (group, clients) in tables {
        let own: Vec<&Figure> =
            figures.iter().filter(|figure| (figure.group, figure.clients) == (group, clients)).collect();
        let mut peers: Vec<&str> = own.iter().map(|figure| &*figure.peer).collect();
        let first_run = own.iter().filter(|figure| figure.run == 0).count();
        peers.truncate(first_run);
        let rows = peers.iter().map(|peer| {
            let own = || own.iter().filter(|figure| figure.peer == *peer);
            let ratio = |figure: fn(&Figure) -> f64| {
                let [low, middle, high] = quartiles(own().map(|own| figure(own)));
                format!("{middle:.3} ({low:.3} to {high:.3})")
            };
            vec![
                peer.to_string(),
                format!("{:.0}", median(own().map(|figure| figure.requests_per_second))),
                ratio(|figure| figure.throughput_ratio),
                format!("{:.1}", median(own().map(|figure| figure.cpu_us_per_request))),
                ratio(|figure| figure.cpu_ratio),
                own().map(|figure| figure.failed).sum::<u64>().to_string(),
            ]
        });
        let title = format!("{group}, {clients}");
        let header = [&*title, "requests/s", "ratio", "CPU µs per request", "ratio", "failed"];
        text += &format!("{}\n", table(&header, &rows.collect::<Vec<_>>()));
    }
    text
}
