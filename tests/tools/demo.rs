//! The demo: copies of an unmodified Express app behind reuse-run, clients that send requests without a pause, and a reload
//! about every second. It shows how many requests fail. It can run the same with PM2 in place of reuse-run.
#![cfg_attr(clippy, deny(warnings))]
#![allow(unsafe_code)]

#[path = "../common/built.rs"]
mod built;
#[path = "../common/lines.rs"]
mod lines;
#[path = "../common/load/mod.rs"]
mod load;
#[path = "../common/netns.rs"]
mod netns;
#[path = "../common/process.rs"]
mod process;

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGINT, SIGTERM};

use lines::{Line, Lines};
use load::{Load, LoadOptions, Snapshot};

const APP: &str = "tests/apps/express/app.js";
/// The port of the app.
const PORT: u16 = 3000;
const WORKERS: usize = 4;
const CLIENTS: usize = 32;
/// Less than two CPUs can do, so that there is CPU time left to start workers.
const REQUESTS_PER_SECOND: f64 = 1000.0;
/// From the start of a reload to the start of the next, unless a reload takes longer.
const RELOAD_EVERY: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(300);
const REDRAW: Duration = Duration::from_millis(100);
const PLAIN_LINE: Duration = Duration::from_secs(1);
const START_TIMEOUT: Duration = Duration::from_secs(60);
const RELOAD_TIMEOUT: Duration = Duration::from_secs(120);

const USAGE: &str = "usage: demo [--pm2 FILE] [SECONDS]

Runs 4 copies of an unmodified Express app with reuse-run. 32 clients send requests without a pause, each on a
new connection, and about every second all 4 copies are replaced. Ends after SECONDS (15) or at Ctrl-C. Exits
with 0 only if every request was answered. With --pm2 the program FILE, a PM2, runs and reloads the copies;
PM2_HOME must name a new folder, because the demo ends PM2's daemon.";

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut pm2 = None;
    if arguments.len() > 1 && arguments[0] == "--pm2" {
        pm2 = arguments.drain(..2).nth(1);
    }
    let seconds = match arguments.first().map(String::as_str) {
        None => 15,
        Some("--help" | "-h") => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Some(text) => match text.parse() {
            Ok(seconds) if seconds > 0 => seconds,
            _ => {
                eprintln!("demo: not a number of seconds: {text}\n{USAGE}");
                return ExitCode::from(2);
            }
        },
    };
    match run(pm2, Duration::from_secs(seconds)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("demo: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the demo; true if every request was answered.
fn run(pm2: Option<String>, length: Duration) -> Result<bool, String> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).map_err(|error| error.to_string())?;
    }
    if pm2.is_some() && std::env::var_os("PM2_HOME").is_none() {
        return Err(
            "set PM2_HOME to a new folder, because the demo ends the daemon of that folder".to_owned()
        );
    }
    network()?;

    let mut service = Service::start(pm2)?;
    let started = Instant::now();
    while service.generation == 0 {
        service.follow()?;
        if interrupted.load(Ordering::Relaxed) {
            return Err("interrupted before the app was ready".to_owned());
        }
        if started.elapsed() > START_TIMEOUT {
            return Err(format!("the app was not ready within {} s", START_TIMEOUT.as_secs()));
        }
        thread::sleep(Duration::from_millis(10));
    }

    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let load = Load::start(LoadOptions::new(addr, CLIENTS).rate(REQUESTS_PER_SECOND));
    let begun = Instant::now();
    let mut screen = Screen::new();
    let mut next_reload = begun + RELOAD_EVERY;
    loop {
        service.follow()?;
        let now = Instant::now();
        if let Some(begun) = service.reload_begun.filter(|begun| begun.elapsed() > RELOAD_TIMEOUT) {
            return Err(format!("a reload has not ended within {} s", begun.elapsed().as_secs()));
        }
        // The demo waits for the end of the last reload.
        let over = begun.elapsed() >= length && service.reload_begun.is_none();
        if over || interrupted.load(Ordering::Relaxed) {
            break;
        }
        if service.reload_begun.is_some() {
            next_reload = next_reload.max(now + PAUSE);
        } else if now >= next_reload && begun.elapsed() < length {
            service.reload()?;
            next_reload = now + RELOAD_EVERY;
        }
        if screen.show(&service, &load.snapshot(), begun.elapsed()).is_err() {
            break; // stdout is closed
        }
        thread::sleep(Duration::from_millis(20));
    }
    let _ = screen.last(&service, &load.snapshot(), begun.elapsed());
    let report = load.stop();
    service.stop();

    let counts = &report.counts;
    let perfect = counts.failed == 0 && counts.answered > 0 && service.abandoned == 0;
    let mut summary = format!(
        "{} requests in {:.1} s, {} failed, {} reloads of {WORKERS} workers",
        grouped(counts.requests),
        report.elapsed.as_secs_f64(),
        grouped(counts.failed),
        service.reloads.len(),
    );
    if let Some(longest) = service.reloads.iter().max() {
        let mean = service.reloads.iter().sum::<Duration>() / service.reloads.len() as u32;
        summary += &format!(" ({} each, the longest {})", seconds(mean), seconds(*longest));
    }
    summary += &format!(
        "; the median answer took {}, the longest {}",
        milliseconds(report.percentile(50.0)),
        milliseconds(report.longest())
    );
    if !perfect {
        summary += &format!("\n{report}");
    }
    let _ = writeln!(io::stdout(), "{summary}");
    Ok(perfect)
}

/// Enters a new network namespace; without the rights for it, checks that the app's port is free.
fn network() -> Result<(), String> {
    if netns::enter().is_ok() {
        return Ok(());
    }
    let free = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)).is_ok()
        || TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).is_ok();
    if free {
        return Ok(());
    }
    Err(format!(
        "port {PORT}, which the app uses, is in use; free it, or run the demo as root, in a network namespace"
    ))
}

/// reuse-run with the app, and its state by its log; or PM2 with the app.
struct Service {
    pm2: Option<String>,
    /// reuse-run, or the last command of PM2.
    child: Child,
    log: Lines,
    reader: JoinHandle<()>,
    /// How many lines of the log have been read.
    lines_read: usize,
    /// Of the workers that serve; 0 before the first ones are ready.
    generation: u32,
    reload_begun: Option<Instant>,
    switched: bool,
    reloads: Vec<Duration>,
    abandoned: u32,
}

impl Service {
    fn start(pm2: Option<String>) -> Result<Service, String> {
        let program = match &pm2 {
            Some(file) => std::path::absolute(file).map_err(|error| format!("{file}: {error}"))?,
            None => built::program("reuse-run")?,
        };
        let mut command = Command::new(&program);
        command
            .args(Self::arguments(pm2.is_some()))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env_remove("REUSE_RUN_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C goes to the demo, which then stops reuse-run.
            .process_group(0);
        // SAFETY: prctl(2) is a system call and nothing else, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?));
        }
        let mut child = command.spawn().map_err(|error| format!("start {}: {error}", program.display()))?;
        let log = Lines::default();
        let reader = log.read(child.stderr.take().expect("stderr is a pipe"));
        Ok(Service {
            pm2,
            child,
            log,
            reader,
            lines_read: 0,
            generation: 0,
            reload_begun: None,
            switched: false,
            reloads: Vec::new(),
            abandoned: 0,
        })
    }

    fn arguments(pm2: bool) -> Vec<String> {
        let line =
            if pm2 { format!("start {APP} -i {WORKERS}") } else { format!("-n {WORKERS} -- node {APP}") };
        line.split(' ').map(str::to_owned).collect()
    }

    /// The command as a user would type it in this repository.
    fn command_line(&self) -> String {
        let name = if self.pm2.is_some() { "pm2" } else { "reuse-run" };
        format!("{name} {}", Self::arguments(self.pm2.is_some()).join(" "))
    }

    /// A command to PM2's daemon.
    fn pm2_command(file: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(file);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.process_group(0);
        command
    }

    /// Looks whether PM2's command has ended.
    fn follow_pm2(&mut self) -> Result<(), String> {
        let Some(status) = self.child.try_wait().map_err(|error| format!("wait for PM2: {error}"))? else {
            return Ok(());
        };
        if self.generation == 0 {
            if !status.success() {
                return Err(format!("PM2 has not started the app ({status}):\n{}", self.last_lines()));
            }
            // PM2 says that workers are online before they listen.
            if TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).is_ok() {
                self.generation = 1;
            }
        } else if let Some(begun) = self.reload_begun.take() {
            if status.success() {
                self.reloads.push(begun.elapsed());
                self.generation += 1;
            } else {
                self.abandoned += 1;
            }
        }
        Ok(())
    }

    /// Reads new lines of the log. An error if reuse-run has ended.
    fn follow(&mut self) -> Result<(), String> {
        if self.pm2.is_some() {
            return self.follow_pm2();
        }
        for Line { text: line, .. } in self.log.all_from(self.lines_read) {
            self.lines_read += 1;
            if line.starts_with("reuse-run[") {
                if line.contains("reload done") {
                    self.reloads.extend(self.reload_begun.take().map(|begun| begun.elapsed()));
                } else if line.contains("reload abandoned") {
                    self.reload_begun = None;
                    self.abandoned += 1;
                } else if let Some(generation) = generation(&line, " serves") {
                    self.generation = generation;
                    self.switched = true;
                } else if let Some(generation) = generation(&line, " is ready") {
                    // The first workers serve when they are ready, others after the switch.
                    if self.generation == 0 {
                        self.generation = generation;
                    }
                }
            }
        }
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => {
                Err(format!("reuse-run has ended ({status}); its last lines:\n{}", self.last_lines()))
            }
            Err(error) => Err(format!("wait for reuse-run: {error}")),
        }
    }

    /// What a program that has ended wrote last.
    fn last_lines(&self) -> String {
        // It may still be in the pipe.
        let deadline = Instant::now() + Duration::from_millis(200);
        while !self.reader.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        let from = self.log.count().saturating_sub(10);
        let lines: Vec<String> = self.log.all_from(from).into_iter().map(|line| line.text).collect();
        lines.join("\n")
    }

    fn reload(&mut self) -> Result<(), String> {
        self.reload_begun = Some(Instant::now());
        self.switched = false;
        if let Some(file) = &self.pm2 {
            let reload = Self::pm2_command(file, &["reload", "app"]).spawn();
            self.child = reload.map_err(|error| format!("start {file}: {error}"))?;
        } else {
            self.signal(Signal::SIGUSR2);
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    fn stop(&mut self) {
        if let Some(file) = self.pm2.take() {
            let _ = self.child.kill();
            let _ = Self::pm2_command(&file, &["kill"]).status();
        } else {
            self.signal(Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }

    /// The pids of all workers.
    fn workers(&self) -> Vec<String> {
        process::children(self.child.id()).iter().map(u32::to_string).collect()
    }

    fn doing(&self) -> String {
        let generation = self.generation;
        match self.reload_begun {
            None => "serving".to_owned(),
            Some(_) if self.pm2.is_some() => "reload".to_owned(),
            Some(_) if !self.switched => {
                format!("reload: {WORKERS} new workers start beside generation {generation}, which serves on")
            }
            Some(_) => {
                format!("reload: generation {generation} serves, the old workers finish their requests")
            }
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.pm2.is_some() || matches!(self.child.try_wait(), Ok(None)) {
            self.stop();
        }
    }
}

/// K of `generation K` followed by `what`.
fn generation(line: &str, what: &str) -> Option<u32> {
    let end = line.find(what)?;
    line[..end].rsplit(' ').next()?.parse().ok()
}

/// The output: on a terminal some lines that are drawn again and again, else a line each second.
struct Screen {
    terminal: bool,
    drawn: usize,
    next: Instant,
    reloads_printed: usize,
    /// The number of requests at times in about the last second, for the rate.
    recent: VecDeque<(Instant, u64)>,
}

impl Screen {
    fn new() -> Screen {
        Screen {
            terminal: io::stdout().is_terminal(),
            drawn: 0,
            next: Instant::now(),
            reloads_printed: 0,
            recent: VecDeque::new(),
        }
    }

    fn show(&mut self, service: &Service, counts: &Snapshot, elapsed: Duration) -> io::Result<()> {
        let now = Instant::now();
        if now < self.next {
            return Ok(());
        }
        self.next = now + if self.terminal { REDRAW } else { PLAIN_LINE };
        self.last(service, counts, elapsed)
    }

    /// Shows it immediately.
    fn last(&mut self, service: &Service, counts: &Snapshot, elapsed: Duration) -> io::Result<()> {
        let rate = self.rate(counts.requests);
        if self.terminal {
            self.draw(service, counts, elapsed, rate)
        } else {
            self.print(service, counts, elapsed, rate)
        }
    }

    fn rate(&mut self, requests: u64) -> u64 {
        let now = Instant::now();
        self.recent.push_back((now, requests));
        while self.recent.len() > 2 && now - self.recent[1].0 >= Duration::from_secs(1) {
            self.recent.pop_front();
        }
        let (then, before) = self.recent[0];
        let period = (now - then).as_secs_f64();
        if period < 0.05 { 0 } else { ((requests - before) as f64 / period).round() as u64 }
    }

    fn draw(&mut self, service: &Service, counts: &Snapshot, elapsed: Duration, rate: u64) -> io::Result<()> {
        let (green, red, bold, plain) = ("\x1b[32;1m", "\x1b[31;1m", "\x1b[1m", "\x1b[0m");
        let colour = if counts.failed == 0 { green } else { red };
        let times: Vec<String> =
            service.reloads.iter().rev().take(8).rev().map(|time| seconds(*time)).collect();
        let lines = [
            format!("{bold}{}{plain}    an unmodified Express app", service.command_line()),
            format!("{CLIENTS} clients, a new connection for each request, {:.0} s", elapsed.as_secs_f64()),
            String::new(),
            format!("  requests   {bold}{:>9}{plain}   {} a second", grouped(counts.requests), grouped(rate)),
            format!("  failed     {colour}{:>9}{plain}", grouped(counts.failed)),
            format!(
                "  generation {bold}{:>9}{plain}   pids {}",
                service.generation,
                service.workers().join(" ")
            ),
            format!("  reloads    {bold}{:>9}{plain}   {}", service.reloads.len(), times.join("  ")),
            String::new(),
            format!("  {}", service.doing()),
        ];
        let mut frame = String::new();
        if self.drawn > 0 {
            frame += &format!("\x1b[{}A\r", self.drawn);
        }
        // Without line wrap, because wrapped lines would be more than those that the cursor goes up again.
        frame += "\x1b[?7l";
        for line in &lines {
            frame += &format!("{line}\x1b[K\n");
        }
        frame += "\x1b[?7h";
        self.drawn = lines.len();
        let mut out = io::stdout().lock();
        out.write_all(frame.as_bytes())?;
        out.flush()
    }

    fn print(
        &mut self,
        service: &Service,
        counts: &Snapshot,
        elapsed: Duration,
        rate: u64,
    ) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.drawn == 0 {
            writeln!(out, "{}    an unmodified Express app", service.command_line())?;
            writeln!(out, "{CLIENTS} clients, a new connection for each request")?;
            self.drawn = 1;
        }
        let new = &service.reloads[self.reloads_printed..];
        let times: Vec<String> = new.iter().map(|time| format!("reloaded in {}", seconds(*time))).collect();
        self.reloads_printed = service.reloads.len();
        writeln!(
            out,
            "{:4.0} s  {:>9} requests  {:>6}/s  {} failed  generation {:<3} {}",
            elapsed.as_secs_f64(),
            grouped(counts.requests),
            grouped(rate),
            grouped(counts.failed),
            service.generation,
            times.join(", "),
        )?;
        out.flush()
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// `1,234,567` for 1234567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
