//! Latency in a reload, compared with the same load without one.

use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::load::{Kind, Load, LoadOptions, Report};
use crate::peers::{App, Peer, Program, Server};
use crate::report::{self, Latencies, median, table};
use crate::{Context, Options, Result, isolated, length, plots};

const WORKERS: u32 = 4;
const CLIENTS: usize = 32;
/// Requests per second of all clients together, about a tenth of what the machine can do.
const RATE: f64 = 500.0;
const TIMEOUT: Duration = Duration::from_secs(5);
/// "Through a reload" is from its start until this long after its end.
const AFTER: Duration = Duration::from_millis(500);

#[derive(Serialize)]
struct Run {
    peer: String,
    run: u32,
    reload_seconds: f64,
    failed: u64,
    without_ms: Latencies,
    through_ms: Latencies,
    /// For the plot, in the first run of some peers.
    timeline: Option<Timeline>,
}

#[derive(Serialize)]
pub struct Timeline {
    /// Seconds before the reload.
    pub before_reload: f64,
    pub reload_seconds: f64,
    pub buckets: Vec<Bucket>,
}

impl Timeline {
    /// The length of a bucket, in seconds.
    pub const BUCKET: f64 = 0.1;
}

#[derive(Clone, Default, Serialize)]
pub struct Bucket {
    /// From the start of the reload to the start of the bucket.
    pub second: f64,
    /// Answers per second.
    pub rate: f64,
    /// Of answered requests that began in the bucket.
    pub p50_ms: f64,
    pub longest_ms: f64,
    /// Failed requests that began in the bucket.
    pub failed: u64,
}

/// The peers whose first run is plotted.
fn drawn() -> [Peer; 2] {
    [Peer::ReuseRun(Vec::new()), Peer::Pm2 { wait_ready: false }]
}

pub fn run(options: &Options) -> Result<()> {
    let mut peers = drawn().to_vec();
    if !options.quick {
        peers.insert(1, Peer::ReuseRun(vec!["--batch", "1"]));
        peers.extend([Peer::Pm2 { wait_ready: true }, Peer::Cluster]);
    }
    let mut runs: Vec<Run> = Vec::new();
    for run in 0..options.runs.unwrap_or(if options.quick { 1 } else { 5 }) {
        for peer in &peers {
            eprintln!("latency: run {run}, {}", peer.name());
            runs.push(isolated(|| measure(peer, run, options))?);
        }
    }
    let columns: Vec<(&str, &Timeline)> =
        runs.iter().filter_map(|run| Some((&*run.peer, run.timeline.as_ref()?))).collect();
    plots::timelines(&options.out.join("reload.svg"), &columns)?;
    let markdown = markdown(&peers, &runs);
    report::write(options, "latency", &runs, &markdown)
}

fn measure(peer: &Peer, run: u32, options: &Options) -> Result<Run> {
    let mut server = Server::start(peer, &App::new(Program::Express, WORKERS), options)?;
    let load = || {
        let load = LoadOptions::new(server.address(), CLIENTS).rate(RATE).timeout(TIMEOUT).record();
        Load::start(load)
    };
    let warm = load();
    thread::sleep(length(options, 2.0, 0.5));
    drop(warm);
    let load = load();
    thread::sleep(length(options, 5.0, 1.5));
    let begun = Instant::now();
    let reload = server.reload()?;
    thread::sleep(length(options, 2.0, 1.0).max(AFTER));
    let stopped = Instant::now();
    let report = load.stop();
    server.end();

    let end = begun + reload + AFTER;
    Ok(Run {
        peer: peer.name(),
        run,
        reload_seconds: reload.as_secs_f64(),
        failed: report.counts.failed,
        without_ms: latencies(&report, |begin| begin < begun)?,
        through_ms: latencies(&report, |begin| begun <= begin && begin < end)?,
        timeline: (run == 0 && drawn().contains(peer)).then(|| timeline(&report, begun, reload, stopped)),
    })
}

/// Latencies of the requests that began at `wanted` times. A client that waits longer than its interval sends fewer requests
/// meanwhile. These missing requests are counted as if they had waited too (coordinated omission).
fn latencies(report: &Report, wanted: impl Fn(Instant) -> bool) -> Result<Latencies> {
    let interval = (CLIENTS as f64 / RATE * 1e6) as u64;
    let mut histogram = Histogram::<u64>::new(3).context("histogram")?;
    for record in report.records.iter().filter(|record| wanted(record.begin)) {
        let latency = (record.end - record.begin).as_micros() as u64;
        histogram.record_correct(latency.max(1), interval).context("histogram")?;
    }
    let at = |part: f64| histogram.value_at_quantile(part) as f64 / 1e3;
    Ok(Latencies { p50: at(0.5), p99: at(0.99), p999: at(0.999), longest: histogram.max() as f64 / 1e3 })
}

fn timeline(report: &Report, begun: Instant, reload: Duration, stopped: Instant) -> Timeline {
    let before = begun - report.started;
    let start = begun - before.min(Duration::from_secs(2));
    let before_reload = (begun - start).as_secs_f64();
    let count = ((stopped - start).as_secs_f64() / Timeline::BUCKET) as usize;
    let second = |index: usize| index as f64 * Timeline::BUCKET - before_reload;
    let mut buckets: Vec<Bucket> =
        (0..count).map(|index| Bucket { second: second(index), ..Bucket::default() }).collect();
    let index = |at: Instant| {
        let since = at.checked_duration_since(start)?;
        Some((since.as_secs_f64() / Timeline::BUCKET) as usize).filter(|index| *index < count)
    };
    let mut latencies = vec![Vec::new(); count];
    for record in &report.records {
        if let Some(index) = index(record.end) {
            buckets[index].rate += 1.0 / Timeline::BUCKET;
        }
        if let Some(index) = index(record.begin) {
            latencies[index].push((record.end - record.begin).as_secs_f64() * 1e3);
        }
    }
    for (bucket, latencies) in buckets.iter_mut().zip(latencies) {
        bucket.longest_ms = latencies.iter().copied().fold(0.0, f64::max);
        bucket.p50_ms = median(latencies);
    }
    for failure in &report.failures {
        let waited = if failure.kind == Kind::TimeOut { TIMEOUT } else { Duration::ZERO };
        if let Some(index) = failure.at.checked_sub(waited).and_then(index) {
            buckets[index].failed += 1;
        }
    }
    Timeline { before_reload, reload_seconds: reload.as_secs_f64(), buckets }
}

fn markdown(peers: &[Peer], runs: &[Run]) -> String {
    let rows = peers.iter().map(|peer| {
        let own: Vec<&Run> = runs.iter().filter(|run| run.peer == peer.name()).collect();
        let of = |figure: fn(&Run) -> f64| median(own.iter().map(|run| figure(run)));
        let pair = |figure: fn(&Latencies) -> f64| {
            let without = median(own.iter().map(|run| figure(&run.without_ms)));
            let through = median(own.iter().map(|run| figure(&run.through_ms)));
            format!("{without:.1} → {through:.1}")
        };
        vec![
            peer.name(),
            pair(|latencies| latencies.p50),
            pair(|latencies| latencies.p99),
            pair(|latencies| latencies.p999),
            pair(|latencies| latencies.longest),
            format!("{:.1} s", of(|run| run.reload_seconds)),
            format!("{:.1}", of(|run| run.failed as f64)),
        ]
    });
    let header = ["", "p50 ms", "p99 ms", "p99.9 ms", "longest ms", "reload", "failed"];
    format!(
        "Latency without a reload → through a reload: the Express app, {WORKERS} workers, {RATE} requests per second \
         of {CLIENTS} clients, a new connection for each request. Without failed requests.\n\n{}\n\
         ![rate, latency and failures over time](reload.svg)\n",
        table(&header, &rows.collect::<Vec<_>>())
    )
}
