//! The cost of reuse-run itself: memory, work while idle, and time for many workers.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::pipe;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde::Serialize;

use crate::lines::Lines;
use crate::process;
use crate::report::{self, median, table};
use crate::{Context, Options, Result, isolated, length, plots};

const LIMIT: Duration = Duration::from_secs(120);

#[derive(Serialize)]
struct Data {
    binary_bytes: u64,
    idle: Idle,
    wake_ups_in_a_reload: f64,
    /// With four workers: from SIGUSR2 to the switch, and the start of four servers without reuse-run.
    switch_ms: f64,
    own_start_ms: f64,
    /// The median of the differences in each run.
    switch_beyond_start_ms: f64,
    scale: Vec<Scale>,
    slopes: BTreeMap<&'static str, f64>,
}

#[derive(Serialize)]
struct Idle {
    seconds: f64,
    system_calls: u64,
    wake_ups: u64,
}

/// The figures for some number of workers.
#[derive(Clone, Copy, Serialize)]
struct Scale {
    workers: u32,
    /// As many servers without reuse-run, from the first start until all listen.
    bare_start_ms: f64,
    start_ms: f64,
    /// From SIGUSR2 to the switch.
    switch_ms: f64,
    /// From SIGUSR2 to the end of the old workers.
    reload_ms: f64,
    /// From SIGINT to the end of reuse-run, after the reload.
    stop_ms: f64,
    rss_kib: f64,
    rss_after_reload_kib: f64,
}

/// A file for the output of a program, and its lines.
fn lines() -> Result<(File, Lines)> {
    let (reader, writer) = pipe().context("pipe")?;
    let lines = Lines::default();
    lines.read(reader);
    Ok((File::from(OwnedFd::from(writer)), lines))
}

/// When the `count`th line with this text has come.
fn wait_for(lines: &Lines, text: &str, count: u32) -> Result<Instant> {
    let line = lines.wait_for_nth(count as usize, 0, LIMIT, |line| line.contains(text));
    Ok(line.ok_or(format!("waited in vain for {text:?}"))?.at)
}

fn server(options: &Options) -> std::path::PathBuf {
    options.binary_folder.join("examples/server")
}

/// reuse-run with trivial servers, all of which are ready. It may be reloaded once.
struct Wrapper {
    pid: i32,
    lines: Lines,
    start: Duration,
}

impl Wrapper {
    fn start(workers: u32, options: &Options) -> Result<Wrapper> {
        let (log, lines) = lines()?;
        let mut command = Command::new(&options.binary);
        command
            .args(["-n", &workers.to_string(), "--"])
            .arg(server(options))
            .args(["--listen", "127.0.0.1:3000"]);
        let begun = Instant::now();
        let pid = process::spawn(command.env_remove("REUSE_RUN_LOG"), &log, None)?.id() as i32;
        let start = wait_for(&lines, "generation 1 is ready", 1)? - begun;
        Ok(Wrapper { pid, lines, start })
    }

    /// From SIGUSR2 to the switch, and to the end of the old workers.
    fn reload(&self) -> Result<(Duration, Duration)> {
        let begun = Instant::now();
        process::signal(self.pid, Signal::SIGUSR2);
        let switch = wait_for(&self.lines, " serves; ", 1)? - begun;
        Ok((switch, wait_for(&self.lines, "reload done", 1)? - begun))
    }

    /// From SIGINT to the end of reuse-run, and with it of all workers.
    fn stop(self) -> Result<Duration> {
        let begun = Instant::now();
        process::signal(self.pid, Signal::SIGINT);
        process::wait_for("reuse-run to end", LIMIT, || (!process::lives(self.pid)).then_some(()))?;
        Ok(begun.elapsed())
    }

    /// A number from /proc/PID/status.
    fn status(&self, field: &str) -> Result<f64> {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.pid)).context("reuse-run's status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let number = line.and_then(|line| line.split_whitespace().next()).ok_or(field)?;
        number.parse().context(field)
    }
}

/// Starts servers, each on its own port, and waits until all listen.
fn bare_start(workers: u32, options: &Options) -> Result<Duration> {
    let (log, lines) = lines()?;
    let begun = Instant::now();
    for slot in 0..workers {
        let mut command = Command::new(server(options));
        command.args(["--listen", &format!("127.0.0.1:{}", 10_000 + slot)]);
        command.stdout(log.try_clone().context("pipe")?);
        command.spawn().context("start a server")?;
    }
    Ok(wait_for(&lines, "listening", workers)? - begun)
}

pub fn run(options: &Options) -> Result<()> {
    eprintln!("wrapper: idle");
    let idle = isolated(|| idle(options))?;
    let runs = options.runs.unwrap_or(if options.quick { 3 } else { 15 });
    let (mut switches, mut starts, mut beyond, mut wake_ups) = (vec![], vec![], vec![], vec![]);
    for run in 0..runs {
        eprintln!("wrapper: four workers, run {run}");
        let start = ms(isolated(|| bare_start(4, options))?);
        let (switch, woken) = isolated(|| {
            let wrapper = Wrapper::start(4, options)?;
            let before = wrapper.status("voluntary_ctxt_switches")?;
            let (switch, _) = wrapper.reload()?;
            Ok((ms(switch), wrapper.status("voluntary_ctxt_switches")? - before))
        })?;
        starts.push(start);
        switches.push(switch);
        beyond.push(switch - start);
        wake_ups.push(woken);
    }
    let mut scale = Vec::new();
    for workers in [1, 10, 100, 500, 1000] {
        if options.quick && workers > 100 {
            continue;
        }
        let runs = options.runs.unwrap_or(if options.quick { 1 } else { 3 });
        eprintln!("wrapper: {workers} workers");
        let measured =
            (0..runs).map(|_| isolated(|| of_size(workers, options))).collect::<Result<Vec<_>>>()?;
        scale.push(middle(workers, &measured));
    }
    let slope =
        |figure: fn(&Scale) -> f64| slope(scale.iter().map(|scale| (scale.workers.into(), figure(scale))));
    let data = Data {
        binary_bytes: fs::metadata(&options.binary).context("the binary")?.len(),
        idle,
        wake_ups_in_a_reload: median(wake_ups),
        switch_ms: median(switches),
        own_start_ms: median(starts),
        switch_beyond_start_ms: median(beyond),
        slopes: BTreeMap::from([
            ("bare start, ms a worker", slope(|scale| scale.bare_start_ms)),
            ("start, ms a worker", slope(|scale| scale.start_ms)),
            ("switch, ms a worker", slope(|scale| scale.switch_ms)),
            ("reload, ms a worker", slope(|scale| scale.reload_ms)),
            ("stop, ms a worker", slope(|scale| scale.stop_ms)),
            ("RSS, KiB a worker", slope(|scale| scale.rss_kib)),
        ]),
        scale,
    };
    let line =
        |figure: fn(&Scale) -> f64| data.scale.iter().map(|s| (f64::from(s.workers), figure(s))).collect();
    let lines = [
        ("start without reuse-run", line(|scale| scale.bare_start_ms)),
        ("start", line(|scale| scale.start_ms)),
        ("reload, to the switch", line(|scale| scale.switch_ms)),
        ("reload, to its end", line(|scale| scale.reload_ms)),
        ("stop", line(|scale| scale.stop_ms)),
    ];
    plots::lines(&options.out.join("scale.svg"), "time in ms by number of workers", "workers", &lines)?;
    report::write(options, "wrapper", &data, &markdown(&data))
}

fn idle(options: &Options) -> Result<Idle> {
    let wrapper = Wrapper::start(4, options)?;
    thread::sleep(Duration::from_secs(1)); // until the work of the start is over
    let time = length(options, 10.0, 3.0);
    let before = wrapper.status("voluntary_ctxt_switches")?;
    let output = Command::new("perf")
        .args(["stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p", &wrapper.pid.to_string()])
        .args(["--", "sleep", &time.as_secs_f64().to_string()])
        .output()
        .context("perf")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = text.lines().find(|line| line.contains("sys_enter")).ok_or(format!("perf: {text}"))?;
    // perf prints this for a process that didn't run at all.
    let count =
        if line.starts_with("<not counted>") { "0" } else { line.split(',').next().unwrap_or_default() };
    Ok(Idle {
        seconds: time.as_secs_f64(),
        system_calls: count.parse().context(&text)?,
        wake_ups: (wrapper.status("voluntary_ctxt_switches")? - before) as u64,
    })
}

fn of_size(workers: u32, options: &Options) -> Result<Scale> {
    let bare_start_ms = ms(bare_start(workers, options)?);
    process::end_all(&[]);
    let wrapper = Wrapper::start(workers, options)?;
    let rss_kib = wrapper.status("VmRSS")?;
    let (switch, reload) = wrapper.reload()?;
    let rss_after_reload_kib = wrapper.status("VmRSS")?;
    Ok(Scale {
        workers,
        bare_start_ms,
        start_ms: ms(wrapper.start),
        switch_ms: ms(switch),
        reload_ms: ms(reload),
        stop_ms: ms(wrapper.stop()?),
        rss_kib,
        rss_after_reload_kib,
    })
}

fn middle(workers: u32, measured: &[Scale]) -> Scale {
    let of = |figure: fn(&Scale) -> f64| median(measured.iter().map(figure));
    Scale {
        workers,
        bare_start_ms: of(|scale| scale.bare_start_ms),
        start_ms: of(|scale| scale.start_ms),
        switch_ms: of(|scale| scale.switch_ms),
        reload_ms: of(|scale| scale.reload_ms),
        stop_ms: of(|scale| scale.stop_ms),
        rss_kib: of(|scale| scale.rss_kib),
        rss_after_reload_kib: of(|scale| scale.rss_after_reload_kib),
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The slope of the best line through the points.
fn slope(points: impl Iterator<Item = (f64, f64)>) -> f64 {
    let points: Vec<(f64, f64)> = points.collect();
    let count = points.len() as f64;
    let mean = |axis: fn(&(f64, f64)) -> f64| points.iter().map(axis).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let products: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    products / points.iter().map(|point| (point.0 - x).powi(2)).sum::<f64>()
}

fn markdown(data: &Data) -> String {
    let row = |what: &str, figure: String| vec![what.to_owned(), figure];
    let rows = [
        row("binary", format!("{:.0} KiB", data.binary_bytes as f64 / 1024.0)),
        row("system calls while idle", format!("{} in {} s", data.idle.system_calls, data.idle.seconds)),
        row("wake-ups while idle", format!("{} in {} s", data.idle.wake_ups, data.idle.seconds)),
        row("wake-ups in a reload of 4 workers", format!("{:.0}", data.wake_ups_in_a_reload)),
        row("from SIGUSR2 to the switch, 4 workers", format!("{:.1} ms", data.switch_ms)),
        row("of this the start of the workers", format!("{:.1} ms", data.own_start_ms)),
        row("the rest", format!("{:.1} ms", data.switch_beyond_start_ms)),
    ];
    let mut text = format!("{}\n", table(&["reuse-run itself", ""], &rows));
    let line = |scale: &Scale| {
        let figures = [
            scale.bare_start_ms,
            scale.start_ms,
            scale.switch_ms,
            scale.reload_ms,
            scale.stop_ms,
            scale.rss_kib,
            scale.rss_after_reload_kib,
        ];
        let mut row = vec![scale.workers.to_string()];
        row.extend(figures.map(|figure| format!("{figure:.0}")));
        row
    };
    let header = [
        "trivial servers",
        "bare start, ms",
        "start, ms",
        "to the switch, ms",
        "reload, ms",
        "stop, ms",
        "RSS, KiB",
        "after a reload, KiB",
    ];
    text += &table(&header, &data.scale.iter().map(line).collect::<Vec<_>>());
    text += "\n![time by number of workers](scale.svg)\n\n";
    let rows: Vec<_> = data.slopes.iter().map(|(name, slope)| row(name, format!("{slope:.2}"))).collect();
    text + &table(&["slope", ""], &rows)
}
