//! Chaos: a load, and meanwhile random events, which follow from a seed. In the gentle mode no request may fail. In the rough
//! mode workers are killed while they serve, and only requests that these had accepted may fail.
#![cfg_attr(clippy, deny(warnings))]
#![allow(unsafe_code)]

#[path = "../common/built.rs"]
mod built;
#[path = "../common/load/mod.rs"]
mod load;
#[path = "../common/netns.rs"]
mod netns;
#[path = "../common/process.rs"]
mod process;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use load::{Kind, Load, LoadOptions, Report, number};

const USAGE: &str = "usage: chaos [--rough] [--seed N] [--plan] [SECONDS]
       chaos --reloads N
       chaos --idle N

Loads two workers for SECONDS (60). Meanwhile, at random, it reloads them, also to broken versions, recycles
single workers, and stops and continues workers. No request may fail.

  --rough   also kill workers that serve, stop some for ever, and reload to a version that crashes a second
            after it was ready; then as many requests may fail as these workers had accepted
  --seed N  repeat an earlier run (each prints its seed)
  --plan    only print what would happen

With --reloads N it reloads N times with --label. Then reuse-run may not have more descriptors or memory than
after a tenth of them. With --idle N it reloads while N idle connections are open, and no request may fail.

Exits with 0 if no more requests have failed than may, else with 1.";

const WORKERS: usize = 2;
const CLIENTS: usize = 16;
/// Less than two CPUs can do, so that there is CPU time left to start workers.
const REQUESTS_PER_SECOND: f64 = 2000.0;
/// How long to wait for something that must happen.
const DEADLINE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(5);
/// A worker that is continued so late is told of: after --drain it would lose what waits for it.
const LATE: Duration = Duration::from_millis(500);
/// After this time a version that hangs or is never ready is given up.
const READY_TIMEOUT: &str = "2s";
/// The exit status of the version that crashes.
const CRASH_STATUS: i32 = 9;

fn main() -> ExitCode {
    let settings = match Settings::parse(std::env::args().skip(1)) {
        Ok(Some(settings)) => settings,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            eprintln!("chaos: {wrong}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match settings.extreme {
        Some(Extreme::Reloads(count)) => return exit_code(many_reloads(count)),
        Some(Extreme::Idle(count)) => return exit_code(many_idle_connections(count)),
        None => {}
    }
    println!("chaos: {} mode, {} s, --seed {}", settings.mode(), settings.length.as_secs(), settings.seed);
    let plan = plan(&settings);
    if settings.plan_only {
        let mut at = Duration::ZERO;
        for step in &plan {
            at += step.pause;
            println!("{:8.3} s  {}", at.as_secs_f64(), step.what);
        }
        return ExitCode::SUCCESS;
    }
    exit_code(run(&settings, &plan))
}

fn exit_code(result: Result<bool, String>) -> ExitCode {
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("chaos: {message}");
            ExitCode::FAILURE
        }
    }
}

struct Settings {
    rough: bool,
    seed: u64,
    plan_only: bool,
    length: Duration,
    extreme: Option<Extreme>,
}

/// What is done instead of following a plan.
#[derive(Clone, Copy)]
enum Extreme {
    Reloads(u32),
    Idle(u32),
}

impl Settings {
    /// `None` when help is wanted.
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Settings>, String> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seed = u64::from(since.subsec_nanos()) ^ since.as_secs() & 0xffff;
        let length = Duration::from_secs(60);
        let mut settings = Settings { rough: false, seed, plan_only: false, length, extreme: None };
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--help" | "-h" => return Ok(None),
                "--rough" => settings.rough = true,
                "--plan" => settings.plan_only = true,
                "--reloads" | "--idle" => {
                    let value = args.next().ok_or_else(|| format!("{arg} needs a number"))?;
                    let count = value.parse().map_err(|_| format!("not a number: {value}"))?;
                    let kind = if arg == "--idle" { Extreme::Idle } else { Extreme::Reloads };
                    settings.extreme = Some(kind(count));
                }
                "--seed" => {
                    let value = args.next().ok_or("--seed needs a number")?;
                    settings.seed = value.parse().map_err(|_| format!("not a seed: {value}"))?;
                }
                text => match text.parse() {
                    Ok(seconds) if seconds > 0 => settings.length = Duration::from_secs(seconds),
                    _ => return Err(format!("not a number of seconds: {text}")),
                },
            }
        }
        Ok(Some(settings))
    }

    fn mode(&self) -> &'static str {
        if self.rough { "rough" } else { "gentle" }
    }
}

// The plan.

/// Pseudo-random numbers (Vigna's splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn milliseconds(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.next() % (to - from))
    }
}

/// What a broken version does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Exits,
    Hangs,
    NeverReady,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Reload,
    ReloadTo(Broken),
    /// SIGSTOP to one of all workers, old and new.
    Stop {
        nth: usize,
        length: Duration,
    },
    /// SIGKILL to one of the workers that serve.
    Kill {
        nth: usize,
    },
    ReloadToCrash,
    Recycle {
        slot: usize,
    },
    /// SIGSTOP to one of the workers that serve, which is not continued.
    Hang {
        nth: usize,
    },
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            What::Reload => write!(f, "reload"),
            What::ReloadTo(Broken::Exits) => write!(f, "reload to a version that exits at its start"),
            What::ReloadTo(Broken::Hangs) => write!(f, "reload to a version that hangs"),
            What::ReloadTo(Broken::NeverReady) => write!(f, "reload to a version that is never ready"),
            What::ReloadToCrash => write!(f, "reload to a version that crashes a second after it was ready"),
            What::Stop { nth, length } => {
                write!(f, "SIGSTOP to worker {nth} of all for {} ms", length.as_millis())
            }
            What::Kill { nth } => write!(f, "SIGKILL to worker {nth} of those that serve"),
            What::Recycle { slot } => write!(f, "recycle slot {slot}"),
            What::Hang { nth } => write!(f, "SIGSTOP for ever to worker {nth} of those that serve"),
        }
    }
}

struct Step {
    /// After the step before.
    pause: Duration,
    what: What,
}

/// More kills would make the back-off of a slot longer than two seconds, and then its accept queue is reset. A reload ends the
/// back-off.
const KILLS_BETWEEN_RELOADS: usize = 4;

/// Everything that will happen, in this order. It may happen later than planned, because each reload waits for the end of the
/// one before.
fn plan(settings: &Settings) -> Vec<Step> {
    let mut random = Random(settings.seed);
    let mut plan: Vec<Step> = Vec::new();
    let (mut at, mut kills) = (Duration::ZERO, 0);
    let mut bag = Vec::new();
    while at < settings.length {
        if bag.is_empty() {
            // Each kind comes once before any kind comes again.
            bag = (0..if settings.rough { 14 } else { 10 }).collect();
        }
        let what = match bag.swap_remove(random.below(bag.len())) {
            0 | 1 => What::Reload,
            2 => What::ReloadTo(Broken::Exits),
            3 => What::ReloadTo(Broken::Hangs),
            4 => What::ReloadTo(Broken::NeverReady),
            5..=7 => What::Stop { nth: random.below(2 * WORKERS), length: random.milliseconds(50, 900) },
            8 | 9 => What::Recycle { slot: random.below(WORKERS) },
            10 => What::Hang { nth: random.below(WORKERS) },
            11 | 12 if kills < KILLS_BETWEEN_RELOADS => What::Kill { nth: random.below(WORKERS) },
            11 | 12 => What::Reload,
            _ => What::ReloadToCrash,
        };
        match what {
            What::Kill { .. } => kills += 1,
            What::Reload | What::ReloadToCrash => kills = 0,
            What::ReloadTo(_) | What::Stop { .. } | What::Recycle { .. } | What::Hang { .. } => {}
        }
        let pause = random.milliseconds(20, 600);
        at += pause;
        plan.push(Step { pause, what });
        if what == What::ReloadToCrash {
            let pause = random.milliseconds(1200, 1800);
            at += pause;
            plan.push(Step { pause, what: What::Reload });
        }
    }
    plan
}

// The service.

/// What the log and the workers have printed so far.
#[derive(Default)]
struct Output {
    /// The generation that serves; 0 before the first.
    serving: u32,
    reloads_done: usize,
    reloads_given_up: usize,
    recycled: usize,
    /// Connections that reuse-run has reset, by its log.
    reset: u64,
    /// Pid and generation of each worker that has listened, in order.
    workers: Vec<(u32, u32)>,
    /// Accepted and closed connections, by pid.
    connections: HashMap<u32, (u64, u64)>,
    log: Vec<String>,
}

impl Output {
    fn add_log(&mut self, line: String) {
        let begins_to_serve = line.contains("generation 1 is ready after ") || line.contains(" serves; ");
        if let Some(generation) = number(&line, "]: generation ").filter(|_| begins_to_serve) {
            self.serving = generation;
        }
        if line.contains("]: reload done") {
            self.reloads_done += 1;
        } else if line.contains("]: recycling done") {
            self.recycled += 1;
        } else if line.contains("reload abandoned") {
            self.reloads_given_up += 1;
        } else if line.contains(" reset: ") {
            self.reset += u64::from(number(&line, "]: ").unwrap_or(1));
        }
        self.log.push(line);
    }

    fn add_worker(&mut self, line: &str) {
        let Some(pid) = number(line, "pid=") else { return };
        let (accepted, closed) = self.connections.entry(pid).or_default();
        if line.starts_with("accepted ") {
            *accepted += 1;
        } else if line.starts_with("closed ") {
            *closed += 1;
        } else if line.starts_with("listening ") {
            self.workers.push((pid, number(line, "generation=").unwrap_or(0)));
        }
    }
}

struct Service {
    child: Child,
    output: Arc<Mutex<Output>>,
    readers: Vec<JoinHandle<()>>,
    folder: PathBuf,
    /// The generation of the last reload.
    generation: u32,
    good: String,
}

impl Service {
    fn start(addr: SocketAddr) -> Result<Service, String> {
        // Each generation has one version, also after restarts.
        let text = r#"exec "$0" --announce $(cat "$1/$REUSE_RUN_GENERATION")"#;
        let options = ["--ready", "notify", "--ready-timeout", READY_TIMEOUT, "--hung-timeout", "2s"];
        let options = [&options[..], &["--drain", "3s", "--stop-timeout", "3s"]].concat();
        let server = built::program("examples/server")?.display().to_string();
        Self::start_as(&options, &["sh", "-c", text, &server], &format!("--listen {addr} --ready-after 0"))
    }

    /// Starts a command, to which it adds the folder of the versions; `good` is the first of these.
    fn start_as(options: &[&str], worker: &[&str], good: &str) -> Result<Service, String> {
        let program = built::program("reuse-run")?;
        let folder = std::env::temp_dir().join(format!("reuse-run-chaos-{}", std::process::id()));
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let mut command = Command::new(program);
        command
            .args(["-n", &WORKERS.to_string()])
            .args(options)
            .arg("--")
            .args(worker)
            .arg(&folder)
            .env_remove("REUSE_RUN_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: prctl(2) is a system call and nothing else, which is allowed between fork and exec.
        unsafe { command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?)) };
        fs::write(folder.join("1"), good).map_err(|error| error.to_string())?;
        let mut child = command.spawn().map_err(|error| format!("start reuse-run: {error}"))?;
        let output = Arc::new(Mutex::new(Output::default()));
        let readers = vec![
            read_lines(child.stderr.take(), &output, Output::add_log),
            read_lines(child.stdout.take(), &output, |output, line| output.add_worker(&line)),
        ];
        Ok(Service { child, output, readers, folder, generation: 1, good: good.to_owned() })
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, pid: u32, signal: Signal) -> bool {
        kill(Pid::from_raw(pid as i32), signal).is_ok()
    }

    /// Waits until `condition` holds for what it has printed.
    fn wait(&self, what: &str, condition: impl Fn(&Output) -> bool) -> Result<(), String> {
        self.wait_until(what, |service| Ok(condition(&service.output())))
    }

    fn wait_until(
        &self,
        what: &str,
        condition: impl Fn(&Self) -> Result<bool, String>,
    ) -> Result<(), String> {
        let end = Instant::now() + DEADLINE;
        while !condition(self)? {
            if Instant::now() > end {
                let log = self.output().log.join("\n");
                return Err(format!("not within {DEADLINE:?}: {what}; the log:\n{log}"));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// What a command to reuse-run prints.
    fn command(&self, words: &[&str]) -> Result<String, String> {
        let mut command = Command::new(built::program("reuse-run")?);
        let output = command.args(words).output().map_err(|error| format!("start a command: {error}"))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(format!("{words:?}: {}", String::from_utf8_lossy(&output.stderr))),
        }
    }

    /// Whether all workers are ready, and none is being replaced.
    fn only_serves(&self) -> Result<bool, String> {
        if self.workers().len() != WORKERS || !self.reloads_are_over() {
            return Ok(false);
        }
        let status = self.command(&["status", "--json", &self.child.id().to_string()]);
        Ok(status.is_ok_and(|status| status.contains(r#""state":"serving""#)))
    }

    /// Whether all reloads have ended.
    fn reloads_are_over(&self) -> bool {
        let output = self.output();
        output.reloads_done + output.reloads_given_up == self.generation as usize - 1
    }

    /// Reloads to a version. The last reload must be over.
    fn reload(&mut self, version: &str) -> Result<(), String> {
        self.generation += 1;
        let file = self.folder.join(self.generation.to_string());
        fs::write(file, version).map_err(|error| format!("install a version: {error}"))?;
        self.send(self.child.id(), Signal::SIGUSR2);
        Ok(())
    }

    /// Reloads to the same version, and waits until that is done.
    fn reload_and_wait(&mut self) -> Result<(), String> {
        let good = self.good.clone();
        self.reload(&good)?;
        let reloads = self.generation as usize - 1;
        self.wait("the reload is over", |output| output.reloads_done + output.reloads_given_up == reloads)
    }

    /// All workers, old and new.
    fn workers(&self) -> Vec<u32> {
        process::children(self.child.id())
    }

    /// The workers of the generation that serves.
    fn serving(&self) -> Vec<u32> {
        let alive = self.workers();
        let output = self.output();
        let of_generation = output.workers.iter().filter(|(_, generation)| *generation == output.serving);
        of_generation.map(|(pid, _)| *pid).filter(|pid| alive.contains(pid)).collect()
    }

    /// Stops reuse-run and reads the rest of its output. Returns the exit status.
    fn end(&mut self) -> Result<Option<i32>, String> {
        self.send(self.child.id(), Signal::SIGTERM);
        let end = Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.child.try_wait().map_err(|error| error.to_string())? {
                break status;
            }
            if Instant::now() > end {
                return Err(format!("reuse-run did not end within {DEADLINE:?} of SIGTERM"));
            }
            thread::sleep(POLL);
        };
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ok(status.code())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn read_lines(
    stream: Option<impl Read + Send + 'static>,
    output: &Arc<Mutex<Output>>,
    add: fn(&mut Output, String),
) -> JoinHandle<()> {
    let output = Arc::clone(output);
    thread::spawn(move || {
        let Some(stream) = stream else { return };
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            add(&mut output.lock().unwrap_or_else(PoisonError::into_inner), line);
        }
    })
}

// The run.

/// What has been done.
#[derive(Default)]
struct Done {
    stopped: usize,
    killed: HashSet<u32>,
    /// Generations of the version that crashes.
    crashing: HashSet<u32>,
    broken: usize,
    /// What continues stopped workers.
    to_continue: HashMap<u32, JoinHandle<()>>,
}

impl Done {
    /// Stops a worker for so long. A thread continues it, so that it isn't stopped for as long as --drain if the next step
    /// takes long.
    fn stop(&mut self, pid: u32, length: Duration) {
        let is_stopped = |thread: &JoinHandle<()>| !thread.is_finished();
        let process = Pid::from_raw(pid as i32);
        if self.to_continue.get(&pid).is_some_and(is_stopped) || kill(process, Signal::SIGSTOP).is_err() {
            return;
        }
        self.stopped += 1;
        let begun = Instant::now();
        let thread = thread::spawn(move || {
            thread::sleep(length);
            let _ = kill(process, Signal::SIGCONT); // it may have ended
            let late = begun.elapsed() - length;
            if late > LATE {
                println!("worker {pid} was continued {} ms late", late.as_millis());
            }
        });
        self.to_continue.insert(pid, thread);
    }
}

/// Runs the plan. True if no more has failed than may.
fn run(settings: &Settings, plan: &[Step]) -> Result<bool, String> {
    let addr = address()?;
    let mut service = Service::start(addr)?;
    service.wait("the first generation is ready", |output| output.serving == 1)?;
    let load = Load::start(LoadOptions::new(addr, CLIENTS).rate(REQUESTS_PER_SECOND));
    let begun = Instant::now();
    let mut done = Done::default();
    let mut at = begun;
    for step in plan {
        at += step.pause;
        let is_reload = matches!(step.what, What::Reload | What::ReloadTo(_) | What::ReloadToCrash);
        service.wait_until("the next step may begin", |service| {
            Ok(Instant::now() >= at && (!is_reload || service.reloads_are_over()))
        })?;
        at = Instant::now();
        if begun.elapsed() > settings.length {
            break;
        }
        println!("{:8.3} s  {}", begun.elapsed().as_secs_f64(), step.what);
        take(&mut service, &mut done, step.what)?;
    }
    done.to_continue.drain().for_each(|(_, thread)| drop(thread.join()));
    let reloads = service.generation as usize - 1;
    service
        .wait("the last reload is over", |output| output.reloads_done + output.reloads_given_up == reloads)?;
    let report = load.stop();
    let status = service.end()?;
    Ok(judge(settings, &service.output(), &done, &report, status))
}

// Extremes.

/// Reloads so often, and measures after a tenth and at the end.
fn many_reloads(count: u32) -> Result<bool, String> {
    /// In KiB. An allocator may keep a little more after one reload than after another.
    const MAX_GROWTH: u64 = 256;
    let server = built::program("examples/server")?.display().to_string();
    let text = r#"exec "$0" --listen "$1""#;
    let addr = address()?.to_string();
    let mut service = Service::start_as(&["--label"], &["sh", "-c", text, &server, &addr], "")?;
    service.wait("the first generation is ready", |output| output.serving == 1)?;
    let pid = service.child.id();
    let tenth = (count / 10).max(1);
    for _ in 0..tenth {
        service.reload_and_wait()?;
    }
    let (fds, memory) = uses(pid)?;
    println!("after {tenth} reloads: {fds} descriptors, {memory} KiB of memory of its own");
    for _ in tenth..count {
        service.reload_and_wait()?;
    }
    // What an old worker leaves is closed a moment after the reload is over.
    let is_flat = || matches!(uses(pid), Ok(now) if now.0 <= fds && now.1 <= memory + MAX_GROWTH);
    let end = Instant::now() + DEADLINE;
    while !is_flat() && Instant::now() < end {
        thread::sleep(POLL);
    }
    let is_flat = is_flat();
    let (fds, memory) = uses(pid)?;
    println!("after {count} reloads: {fds} descriptors, {memory} KiB of memory of its own");
    println!("{}", if is_flat { "flat" } else { "WRONG: they grow" });
    Ok(is_flat && service.end()? == Some(0))
}

/// How many descriptors a process has, and how many KiB of memory of its own.
fn uses(pid: u32) -> Result<(usize, u64), String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).map_err(|error| error.to_string())?.count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
    let memory = line.trim().trim_end_matches(" kB").parse().map_err(|_| "no RssAnon")?;
    Ok((fds, memory))
}

/// Processes that keep connections open, each as many as its limit of files allows.
struct Holders(Vec<Child>);

impl Holders {
    fn connect(addr: SocketAddr, count: u32) -> Result<Holders, String> {
        const EACH: u32 = 5000;
        const HOLD: &str = "import socket, sys
held = [socket.create_connection((sys.argv[1], int(sys.argv[2]))) for _ in range(int(sys.argv[3]))]
print('held', flush=True)
sys.stdin.read()";
        let mut holders = Holders(Vec::new());
        for first in (0..count).step_by(EACH as usize) {
            let count = EACH.min(count - first).to_string();
            let mut command = Command::new("python3");
            command.args(["-c", HOLD, &addr.ip().to_string(), &addr.port().to_string(), &count]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().map_err(|error| format!("start python3: {error}"))?;
            let stdout = child.stdout.take();
            holders.0.push(child);
            let line = stdout.and_then(|stdout| BufReader::new(stdout).lines().next()).transpose();
            if line.ok().flatten().is_none() {
                return Err("a process could not connect".to_owned());
            }
        }
        Ok(holders)
    }
}

impl Drop for Holders {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Reloads while so many idle connections are open.
fn many_idle_connections(count: u32) -> Result<bool, String> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|error| error.to_string())?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(|error| error.to_string())?;
    let addr = address()?;
    let port = addr.port().to_string();
    let holds = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/apps/python/extremes.py");
    let mut service = Service::start_as(&["--drain", "1h"], &["python3", holds, "holds", &port], "")?;
    service.wait("the first generation is ready", |output| output.serving == 1)?;
    let load = Load::start(LoadOptions::new(addr, 2).rate(50.0));
    let idle = Holders::connect(addr, count)?;
    let begun = Instant::now();
    service.reload_and_wait()?;
    println!("a reload with {count} idle connections: {} ms", begun.elapsed().as_millis());
    drop(idle);
    let report = load.stop();
    println!("{report}");
    let is_done = service.output().reloads_given_up == 0;
    Ok(service.end()? == Some(0) && is_done && report.counts.failed == 0 && report.counts.answered > 0)
}

/// A free port, in a new network namespace if there is the right to make one.
fn address() -> Result<SocketAddr, String> {
    let _ = netns::enter();
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    listener.and_then(|listener| listener.local_addr()).map_err(|error| format!("no port: {error}"))
}

fn take(service: &mut Service, done: &mut Done, what: What) -> Result<(), String> {
    let good = service.good.clone();
    match what {
        What::Reload => service.reload(&good)?,
        What::ReloadTo(broken) => {
            done.broken += 1;
            let listens = good.replace(" --ready-after 0", "");
            match broken {
                Broken::Exits => service.reload("--hang --exit-after 0 --exit-status 3")?,
                Broken::Hangs => service.reload("--hang")?,
                Broken::NeverReady => service.reload(&listens)?,
            }
        }
        What::ReloadToCrash => {
            service.reload(&format!("{good} --exit-after 1000 --exit-status {CRASH_STATUS}"))?;
            done.crashing.insert(service.generation);
        }
        What::Stop { nth, length } => {
            let workers = service.workers();
            let Some(pid) = workers.get(nth % workers.len().max(1)).copied() else { return Ok(()) };
            done.stop(pid, length);
        }
        What::Kill { nth } => {
            let serving = service.serving();
            let Some(pid) = serving.get(nth % serving.len().max(1)).copied() else { return Ok(()) };
            if service.send(pid, Signal::SIGKILL) {
                done.killed.insert(pid);
            }
        }
        What::Recycle { slot } => {
            let pid = service.child.id().to_string();
            service.command(&["recycle", "--no-wait", "--pid", &pid, &slot.to_string()])?;
        }
        // Nothing else meanwhile: nobody takes what waits for a worker that hangs when it is retired for another reason.
        What::Hang { nth } => {
            service.wait_until("it only serves", Service::only_serves)?;
            let serving = service.serving();
            let Some(pid) = serving.get(nth % serving.len().max(1)).copied() else { return Ok(()) };
            let continued = done.to_continue.remove(&pid).map(JoinHandle::join);
            continued.transpose().map_err(|_| "the thread that continues it has panicked")?;
            if service.send(pid, Signal::SIGSTOP) {
                done.killed.insert(pid);
                service.wait_until("a worker that hangs is replaced", |service| {
                    Ok(!service.workers().contains(&pid))
                })?;
            }
        }
    }
    Ok(())
}

/// Prints what has happened. True if no more has failed than may.
fn judge(settings: &Settings, output: &Output, done: &Done, report: &Report, status: Option<i32>) -> bool {
    let crashed: HashSet<u32> = output
        .log
        .iter()
        .filter(|line| line.contains(&format!("exited with status {CRASH_STATUS}")))
        .filter_map(|line| number(line, "(pid "))
        .collect();
    // A worker may have accepted one connection more than it had printed.
    let accepted =
        |pid: &u32| output.connections.get(pid).map_or(0, |(accepted, closed)| accepted - closed + 1);
    let allowed: u64 = done.killed.union(&crashed).map(accepted).sum();
    println!("\n{report}\n");
    println!(
        "reloads: {} done, {} abandoned; {} of them to a broken version, {} to a version that crashes",
        output.reloads_done,
        output.reloads_given_up,
        done.broken,
        done.crashing.len(),
    );
    println!(
        "workers: {} recycled, {} stopped and continued, {} killed or stopped for ever, {} crashed; {} connections reset \
         by reuse-run",
        output.recycled,
        done.stopped,
        done.killed.len(),
        crashed.len(),
        output.reset,
    );
    let failed = report.counts.failed;
    let mut wrong = Vec::new();
    if failed > allowed {
        wrong.push(format!("{failed} requests failed, but only {allowed} may"));
    }
    for kind in [Kind::Refused, Kind::TimeOut] {
        if report.count(kind) > 0 {
            wrong.push(format!("{kind}: {}, which the end of a worker doesn't explain", report.count(kind)));
        }
    }
    if report.counts.answered == 0 {
        wrong.push("no request was answered".to_owned());
    }
    if status != Some(0) {
        wrong.push(format!("reuse-run ended with status {status:?} instead of 0"));
    }
    if wrong.is_empty() {
        println!("requests: {} answered, {failed} failed, {allowed} may", report.counts.answered);
        return true;
    }
    println!("the log:\n{}", output.log.join("\n"));
    println!("WRONG: {}; again with: --seed {}", wrong.join("; "), settings.seed);
    false
}
