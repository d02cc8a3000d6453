//! How evenly load is shared, and the latency when a worker is slow.

use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::Serialize;

use crate::load::{Load, LoadOptions, Mode, Report};
use crate::peers::{App, Peer, Program, Server};
use crate::report::{self, Latencies, median, table};
use crate::{Context, Options, Result, in_turn, isolated, length, process};

const WORKERS: u32 = 4;
const THINK: Duration = Duration::from_millis(10);

#[derive(Clone)]
struct Experiment {
    name: String,
    what: String,
    program: Program,
    workers: u32,
    clients: usize,
    mode: Mode,
    pause: Duration,
    /// Requests a second of all clients together; `None` is full speed.
    rate: Option<f64>,
    /// How much later than the client before it each client begins.
    stagger: Duration,
    /// How many workers block now and then.
    heavy: u32,
    /// One worker is stopped for a while.
    stops: bool,
    /// The number of turns. Each opens all connections again.
    turns: u32,
    /// One of many, by number of workers: shorter, and without the peers that are never nearly the best.
    is_one_of_many: bool,
}

/// More than the CPUs can do.
const SATURATED: usize = 32;
/// The numbers of workers that are compared.
const NUMBERS: [u32; 5] = [2, 4, 8, 16, 32];
/// About 5 and 50 % of what two CPUs can do.
const LIGHT: f64 = 500.0;
const MEDIUM: f64 = 5000.0;

fn experiments() -> Vec<Experiment> {
    let new = |name: &str, what: &str| Experiment {
        name: name.to_owned(),
        what: what.to_owned(),
        program: Program::Naive,
        workers: WORKERS,
        clients: 16,
        mode: Mode::NewConnection,
        pause: Duration::ZERO,
        rate: None,
        stagger: Duration::ZERO,
        heavy: 0,
        stops: false,
        turns: 1,
        is_one_of_many: false,
    };
    let long_lived = |stagger, name: &str, what: &str| Experiment {
        clients: 20,
        mode: Mode::KeepAlive { think: THINK },
        stagger,
        turns: 10,
        ..new(name, what)
    };
    let saturated =
        |mode, name: &str, what: &str| Experiment { clients: SATURATED, mode, turns: 10, ..new(name, what) };
    let mut experiments = vec![
        Experiment {
            pause: THINK,
            heavy: 2,
            ..new(
                "blocking",
                "Two of four workers block for 200 ms in 2 % of their requests; 16 clients, a new connection for each \
                 request, 10 ms between an answer and the next request.",
            )
        },
        Experiment {
            pause: THINK,
            stops: true,
            ..new(
                "stopped",
                "One of four workers is stopped (SIGSTOP) for 2 s (1 s with --quick); clients as above.",
            )
        },
        long_lived(
            Duration::ZERO,
            "long-lived",
            "20 connections to four workers, opened at once and kept, 10 ms between an answer and the next request; ten \
             times.",
        ),
        long_lived(
            Duration::from_millis(20),
            "long-lived, gradually",
            "The same, but each connection is opened 20 ms after the one before, so that the first ones carry a bit more \
             load: five for each worker in turn would be 26 to 24 %.",
        ),
        saturated(
            Mode::NewConnection,
            "saturated, new connections",
            "More load than the CPUs can do: 32 clients at full speed, a new connection for each request.",
        ),
        saturated(
            Mode::KeepAlive { think: Duration::ZERO },
            "saturated, keep-alive",
            "More load than the CPUs can do: 32 clients at full speed, each on one connection.",
        ),
    ];
    for (program, kind) in [(Program::Naive, "Node"), (Program::NonBlocking, "a thread for each connection")]
    {
        for workers in NUMBERS {
            for (rate, load) in [(Some(LIGHT), "light"), (Some(MEDIUM), "medium"), (None, "full")] {
                let requests = rate.map_or("as many as they can".to_owned(), |rate| format!("{rate:.0}"));
                let what = format!(
                    "{workers} workers ({kind}), {SATURATED} clients, a new connection for each request, {requests} a second."
                );
                let name = format!("{kind}, {workers} workers, {load} load");
                let (clients, turns, is_one_of_many) = (SATURATED, 3, true);
                experiments.push(Experiment {
                    program,
                    workers,
                    clients,
                    rate,
                    turns,
                    is_one_of_many,
                    ..new(&name, &what)
                });
            }
        }
    }
    experiments
}

#[derive(Serialize)]
struct Run {
    experiment: String,
    peer: String,
    run: u32,
    requests: u64,
    failed: u64,
    requests_per_second: f64,
    latency_ms: Latencies,
    /// CPU time of all processes of the server.
    cpu_us_per_request: f64,
    /// Of this, what reuse-run itself took.
    wrapper_percent: Option<f64>,
    /// The workers' shares of all requests, the largest first; the mean over all turns.
    shares_of_workers: Vec<f64>,
}

/// The peers: reuse-run with each --balance, if it has this option, and its alternatives.
fn peers(options: &Options) -> Result<Vec<Peer>> {
    let help = std::process::Command::new(&options.binary).arg("--help").output();
    let help = help.context(&options.binary.display().to_string())?.stdout;
    let ours = match String::from_utf8_lossy(&help).contains("--balance") {
        true => {
            ["random", "load", "queue", "client"].map(|way| Peer::ReuseRun(vec!["--balance", way])).into()
        }
        false => vec![Peer::ReuseRun(Vec::new())],
    };
    let others = [
        Peer::Reuseport { migrate: false },
        Peer::SharedQueue,
        Peer::Cluster,
        Peer::Pm2 { wait_ready: false },
    ];
    Ok([ours, others.into()].concat())
}

pub fn run(options: &Options) -> Result<()> {
    let (peers, mut runs) = (peers(options)?, Vec::new());
    let measured = measure_all(&peers, &mut runs, options);
    let markdown = markdown(&peers, &runs);
    report::write(options, "balance", &runs, &markdown)?; // also what was measured before it failed
    measured
}

fn measure_all(peers: &[Peer], runs: &mut Vec<Run>, options: &Options) -> Result<()> {
    for experiment in &experiments() {
        let is_near = |peer: &Peer| !matches!(peer, Peer::Cluster | Peer::Pm2 { .. });
        let wanted = |peer: &&Peer| {
            let name = format!("{}, {}", experiment.name, peer.name());
            options.wants(&name) && (!experiment.is_one_of_many || is_near(peer))
        };
        let peers: Vec<Peer> = peers.iter().filter(wanted).cloned().collect();
        if peers.is_empty() {
            continue;
        }
        for run in 0..options.runs.unwrap_or(if options.quick { 1 } else { 5 }) {
            eprintln!("balance: {}, run {run}", experiment.name);
            runs.extend(isolated(|| measure(experiment, &peers, run, options))?);
        }
    }
    Ok(())
}

fn measure(experiment: &Experiment, peers: &[Peer], run: u32, options: &Options) -> Result<Vec<Run>> {
    let seed = options.seed.wrapping_mul(1000).wrapping_add(run);
    let mut app = App::new(experiment.program, experiment.workers);
    app.environment = vec![("BENCH_HEAVY", experiment.heavy.to_string()), ("BENCH_SEED", seed.to_string())];
    let servers = Server::start_side_by_side(peers, &app, options)?;
    let load = |server: &Server, mode| {
        let path = if experiment.program == Program::Naive { "/?id={id}" } else { "/" };
        LoadOptions::new(server.address(), experiment.clients).mode(mode).path(path)
    };
    let warm_up = |server| {
        // Node compiles code while it runs.
        let warm = Load::start(load(server, Mode::NewConnection));
        thread::sleep(length(options, 1.0, 0.3));
        warm.stop().counts.pids.into_keys().map(|pid| pid as i32).collect()
    };
    let workers: Vec<Vec<i32>> = servers.iter().map(warm_up).collect();

    let (long, quick) = if experiment.is_one_of_many { (3.0, 0.3) } else { (10.0, 1.5) };
    let length =
        length(options, long, quick) / experiment.turns + experiment.stagger * experiment.clients as u32;
    let mut measured: Vec<(Vec<Report>, [Duration; 2])> =
        servers.iter().map(|_| Default::default()).collect();
    for turn in 0..experiment.turns {
        for index in in_turn(run + turn, servers.len()) {
            let (server, (reports, cpu)) = (&servers[index], &mut measured[index]);
            let cpu_time = || [process::cpu_time(&server.pids()), process::cpu_time(server.main())];
            let before = cpu_time();
            let load = load(server, experiment.mode).pause(experiment.pause).stagger(experiment.stagger);
            let load = Load::start(LoadOptions { rate: experiment.rate, ..load });
            match experiment.stops {
                true => stop_one(workers[index][0], length, options),
                false => thread::sleep(length),
            }
            reports.push(load.stop());
            for ((cpu, before), after) in cpu.iter_mut().zip(before).zip(cpu_time()) {
                *cpu += after - before;
            }
        }
    }
    let figures = |(peer, (reports, cpu)): (&Peer, &(Vec<Report>, [Duration; 2]))| {
        figures(experiment, peer, run, reports, *cpu)
    };
    Ok(peers.iter().zip(&measured).map(figures).collect())
}

/// Stops a worker in the middle of this time.
fn stop_one(worker: i32, time: Duration, options: &Options) {
    let stopped = length(options, 2.0, 1.0);
    let pause = time.saturating_sub(stopped) / 2;
    thread::sleep(pause);
    process::signal(worker, Signal::SIGSTOP);
    thread::sleep(stopped);
    process::signal(worker, Signal::SIGCONT);
    thread::sleep(pause);
}

fn figures(
    experiment: &Experiment,
    peer: &Peer,
    run: u32,
    reports: &[Report],
    [cpu, of_main]: [Duration; 2],
) -> Run {
    let all = Latencies::of(reports);
    let requests = reports.iter().map(|report| report.counts.requests).sum();
    let seconds: f64 = reports.iter().map(|report| report.elapsed.as_secs_f64()).sum();
    let mut shares = vec![0.0; experiment.workers as usize];
    for report in reports {
        let mut of_workers: Vec<u64> = report.counts.pids.values().copied().collect();
        of_workers.sort_by(|a, b| b.cmp(a));
        for (share, requests) in shares.iter_mut().zip(of_workers) {
            *share += requests as f64 / report.counts.answered as f64 / reports.len() as f64;
        }
    }
    Run {
        experiment: experiment.name.clone(),
        peer: peer.name(),
        run,
        requests,
        failed: reports.iter().map(|report| report.counts.failed).sum(),
        requests_per_second: requests as f64 / seconds,
        latency_ms: all,
        cpu_us_per_request: cpu.as_secs_f64() * 1e6 / requests as f64,
        wrapper_percent: matches!(peer, Peer::ReuseRun(_))
            .then(|| 100.0 * of_main.as_secs_f64() / cpu.as_secs_f64()),
        shares_of_workers: shares,
    }
}

fn markdown(peers: &[Peer], runs: &[Run]) -> String {
    let mut text =
        "The workers of each peer, side by side on one machine and loaded in turns. Figures are medians over \
                    all runs, but `longest` is the maximum and `failed` the sum. Each run starts the servers again.\n\n"
            .to_owned();
    for experiment in &experiments() {
        let of = |peer: &Peer| -> Vec<&Run> {
            let name = peer.name();
            runs.iter().filter(|run| run.experiment == experiment.name && run.peer == name).collect()
        };
        let measured = peers.iter().filter(|peer| !of(peer).is_empty());
        let rows: Vec<Vec<String>> = measured.map(|peer| row(peer, &of(peer), runs)).collect();
        if rows.is_empty() {
            continue;
        }
        let header = [
            "",
            "requests/s",
            "ratio to the best peer",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "ratio to the best peer",
            "longest ms",
            "busiest worker's share",
            "least busy worker's share",
            "CPU µs per request",
            "of this, reuse-run",
            "failed",
        ];
        text += &format!("### {}\n\n{}\n\n{}\n", experiment.name, experiment.what, table(&header, &rows));
    }
    text
}

/// Medians over all runs. Ratios are to the best other peer in the same run.
fn row(peer: &Peer, own: &[&Run], all: &[Run]) -> Vec<String> {
    let others = |run: &Run| -> Vec<&Run> {
        let same = |other: &&Run| other.experiment == run.experiment && other.run == run.run;
        all.iter().filter(same).filter(|other| !other.peer.starts_with("reuse-run")).collect()
    };
    let of = |figure: fn(&Run) -> f64| median(own.iter().map(|run| figure(run)));
    let rate_ratio = own.iter().filter_map(|run| {
        let best = others(run).iter().map(|other| other.requests_per_second).reduce(f64::max)?;
        Some(run.requests_per_second / best)
    });
    let tail_ratio = own.iter().filter_map(|run| {
        let best = others(run).iter().map(|other| other.latency_ms.p999).reduce(f64::min)?;
        Some(run.latency_ms.p999 / best)
    });
    // Other peers may be missing.
    let ratio = |ratios: Vec<f64>| match ratios.is_empty() {
        true => "–".to_owned(),
        false => format!("{:.2}", median(ratios)),
    };
    let share = |place: usize| 100.0 * median(own.iter().map(|run| run.shares_of_workers[place]));
    vec![
        peer.name(),
        format!("{:.0}", of(|run| run.requests_per_second)),
        ratio(rate_ratio.collect()),
        format!("{:.1}", of(|run| run.latency_ms.p50)),
        format!("{:.1}", of(|run| run.latency_ms.p99)),
        format!("{:.1}", of(|run| run.latency_ms.p999)),
        ratio(tail_ratio.collect()),
        format!("{:.0}", own.iter().map(|run| run.latency_ms.longest).fold(0.0, f64::max)),
        format!("{:.0} %", share(0)),
        format!("{:.0} %", share(own[0].shares_of_workers.len() - 1)),
        format!("{:.0}", of(|run| run.cpu_us_per_request)),
        own[0].wrapper_percent.map_or("–".to_owned(), |_| {
            format!("{:.1} %", of(|run| run.wrapper_percent.unwrap_or_default()))
        }),
        own.iter().map(|run| run.failed).sum::<u64>().to_string(),
    ]
}
