//! Chaos: a load, and meanwhile whatever may happen to a service, drawn from a seed. In the gentle mode
//! no request may fail. In the rough one workers are killed while they serve, and only requests that
//! these had accepted may.
#![allow(unsafe_code)]

#[path = "../common/load/mod.rs"]
mod load;
#[path = "../common/netns.rs"]
mod netns;

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

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use load::{Kind, Load, LoadOptions, Report};

const USAGE: &str = "usage: chaos [--rough] [--seed N] [--plan] [SECONDS]

Loads two workers for SECONDS (60) while it reloads them, reloads to versions that are broken, and stops
and continues workers, all at random. No request may fail. With --rough it also kills workers that serve,
and reloads to a version that crashes a second after it was ready; then at most as many requests may fail
as those workers had accepted. Exits 0 if that is so, and 1 if not.

What happens is drawn from a seed, which is printed; --seed N has it happen again. --plan only prints it.";

const WORKERS: usize = 2;
const CLIENTS: usize = 16;
/// Leaves something of two processors to start new workers with.
const REQUESTS_PER_SECOND: f64 = 2000.0;
/// For what must happen at all.
const DEADLINE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(5);
/// A version that hangs or is never ready costs so long.
const READY_TIMEOUT: &str = "2s";
/// The status by which a version that crashes is known.
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
    match run(&settings, &plan) {
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
}

impl Settings {
    /// `None` when help is wanted.
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Settings>, String> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seed = u64::from(since.subsec_nanos()) ^ since.as_secs() & 0xffff;
        let mut settings = Settings { rough: false, seed, plan_only: false, length: Duration::from_secs(60) };
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--help" | "-h" => return Ok(None),
                "--rough" => settings.rough = true,
                "--plan" => settings.plan_only = true,
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

/// Numbers that look random and follow from the seed (Vigna's splitmix64).
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

/// What a version does that isn't fit to serve.
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
    /// Of all workers there are, old and new ones.
    Stop {
        nth: usize,
        length: Duration,
    },
    /// Of those that serve.
    Kill {
        nth: usize,
    },
    ReloadToCrash,
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
        }
    }
}

struct Step {
    /// After the step before.
    pause: Duration,
    what: What,
}

/// A slot whose workers die all the time is restarted later and later, and past two seconds what waits
/// for it is reset. A reload that is done sets that back to zero.
const KILLS_BETWEEN_RELOADS: usize = 4;

/// Everything that will happen. Waiting for a reload to be over before the next may make it happen later
/// than planned, but in this order.
fn plan(settings: &Settings) -> Vec<Step> {
    let mut random = Random(settings.seed);
    let mut plan: Vec<Step> = Vec::new();
    let (mut at, mut kills) = (Duration::ZERO, 0);
    let mut bag = Vec::new();
    while at < settings.length {
        if bag.is_empty() {
            // Each kind comes once before any comes again.
            bag = (0..if settings.rough { 11 } else { 8 }).collect();
        }
        let what = match bag.swap_remove(random.below(bag.len())) {
            0 | 1 => What::Reload,
            2 => What::ReloadTo(Broken::Exits),
            3 => What::ReloadTo(Broken::Hangs),
            4 => What::ReloadTo(Broken::NeverReady),
            5..=7 => What::Stop { nth: random.below(2 * WORKERS), length: random.milliseconds(50, 900) },
            8 | 9 if kills < KILLS_BETWEEN_RELOADS => What::Kill { nth: random.below(WORKERS) },
            8 | 9 => What::Reload,
            _ => What::ReloadToCrash,
        };
        match what {
            What::Kill { .. } => kills += 1,
            What::Reload | What::ReloadToCrash => kills = 0,
            What::ReloadTo(_) | What::Stop { .. } => {}
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

/// What the log and the workers have said so far.
#[derive(Default)]
struct Heard {
    /// The generation that serves; 0 before the first.
    serving: u32,
    reloads_done: usize,
    reloads_given_up: usize,
    /// Connections that reuse-run reset, by its own account.
    reset: u64,
    /// Pid and generation of every worker that has listened, in order.
    workers: Vec<(u32, u32)>,
    /// By pid: connections accepted, and those of them that were closed.
    connections: HashMap<u32, (u64, u64)>,
    log: Vec<String>,
}

fn number(text: &str, label: &str) -> Option<u32> {
    let rest = &text[text.find(label)? + label.len()..];
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

impl Heard {
    fn hear_log(&mut self, line: String) {
        let begins_to_serve = line.contains("generation 1 is ready after ") || line.contains(" serves; ");
        if let Some(generation) = number(&line, "]: generation ").filter(|_| begins_to_serve) {
            self.serving = generation;
        }
        if line.contains("]: reload done") {
            self.reloads_done += 1;
        } else if line.contains("reload abandoned") {
            self.reloads_given_up += 1;
        } else if line.contains(" reset: ") {
            self.reset += u64::from(number(&line, "]: ").unwrap_or(1));
        }
        self.log.push(line);
    }

    fn hear_worker(&mut self, line: &str) {
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
    heard: Arc<Mutex<Heard>>,
    readers: Vec<JoinHandle<()>>,
    folder: PathBuf,
    /// The newest generation that was asked for.
    generation: u32,
    good: String,
}

impl Service {
    fn start(addr: SocketAddr) -> Result<Service, String> {
        // target/PROFILE/examples/chaos runs target/PROFILE/reuse-run and examples/server.
        let own = std::env::current_exe().map_err(|error| format!("own path: {error}"))?;
        let examples = own.parent().ok_or("no folder of its own")?;
        let program = examples.parent().ok_or("no folder of programs")?.join("reuse-run");
        let server = examples.join("server");
        for needed in [&program, &server] {
            if !needed.exists() {
                return Err(format!("{} is missing: run scripts/chaos", needed.display()));
            }
        }
        let folder = std::env::temp_dir().join(format!("reuse-run-chaos-{}", std::process::id()));
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;

        // Each generation is of one version, restarts included.
        let text = r#"exec "$0" --announce $(cat "$1/$REUSE_RUN_GENERATION")"#;
        let mut command = Command::new(program);
        command
            .args(["-n", &WORKERS.to_string(), "--ready", "notify", "--ready-timeout", READY_TIMEOUT])
            .args(["--", "sh", "-c", text])
            .args([&server, &folder])
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: a system call and no more, which is all right between fork and exec.
        unsafe { command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?)) };
        let good = format!("--listen {addr} --ready-after 0");
        fs::write(folder.join("1"), &good).map_err(|error| error.to_string())?;
        let mut child = command.spawn().map_err(|error| format!("start reuse-run: {error}"))?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let readers = vec![
            read_lines(child.stderr.take(), &heard, Heard::hear_log),
            read_lines(child.stdout.take(), &heard, |heard, line| heard.hear_worker(&line)),
        ];
        Ok(Service { child, heard, readers, folder, generation: 1, good })
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, pid: u32, signal: Signal) -> bool {
        kill(Pid::from_raw(pid as i32), signal).is_ok()
    }

    /// Waits for what must come.
    fn wait(&self, what: &str, condition: impl Fn(&Heard) -> bool) -> Result<(), String> {
        let end = Instant::now() + DEADLINE;
        while !condition(&self.heard()) {
            if Instant::now() > end {
                let log = self.heard().log.join("\n");
                return Err(format!("not within {DEADLINE:?}: {what}; the log:\n{log}"));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Whether every reload that was asked for is over.
    fn reloads_are_over(&self) -> bool {
        let heard = self.heard();
        heard.reloads_done + heard.reloads_given_up == self.generation as usize - 1
    }

    /// Reloads to a version, once the last reload is over.
    fn reload(&mut self, version: &str) -> Result<(), String> {
        self.generation += 1;
        let file = self.folder.join(self.generation.to_string());
        fs::write(file, version).map_err(|error| format!("install a version: {error}"))?;
        self.send(self.child.id(), Signal::SIGUSR2);
        Ok(())
    }

    /// All processes that reuse-run has started, old and new, in order of their pids.
    fn workers(&self) -> Vec<u32> {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// Those of the generation that serves.
    fn serving(&self) -> Vec<u32> {
        let alive = self.workers();
        let heard = self.heard();
        let of_generation = heard.workers.iter().filter(|(_, generation)| *generation == heard.serving);
        of_generation.map(|(pid, _)| *pid).filter(|pid| alive.contains(pid)).collect()
    }

    /// Stops it and reads all that was said; returns the exit status.
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
    heard: &Arc<Mutex<Heard>>,
    hear: fn(&mut Heard, String),
) -> JoinHandle<()> {
    let heard = Arc::clone(heard);
    thread::spawn(move || {
        let Some(stream) = stream else { return };
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            hear(&mut heard.lock().unwrap_or_else(PoisonError::into_inner), line);
        }
    })
}

// The run.

/// What was done, as far as it could be.
#[derive(Default)]
struct Done {
    stopped: usize,
    killed: HashSet<u32>,
    /// Generations of the version that crashes.
    crashing: HashSet<u32>,
    broken: usize,
    /// Stopped workers and when each is to go on.
    to_continue: Vec<(u32, Instant)>,
}

impl Done {
    fn continue_due(&mut self, service: &Service, now: Instant) {
        self.to_continue.retain(|(pid, at)| {
            let due = *at <= now;
            if due {
                service.send(*pid, Signal::SIGCONT);
            }
            !due
        });
    }
}

/// Runs it; true if all was as it should be.
fn run(settings: &Settings, plan: &[Step]) -> Result<bool, String> {
    let addr = address()?;
    let mut service = Service::start(addr)?;
    service.wait("the first generation is ready", |heard| heard.serving == 1)?;
    let load = Load::start(LoadOptions::new(addr, CLIENTS).rate(REQUESTS_PER_SECOND));
    let begun = Instant::now();
    let mut done = Done::default();
    let mut at = begun;
    for step in plan {
        at += step.pause;
        let is_reload = !matches!(step.what, What::Stop { .. } | What::Kill { .. });
        let end = Instant::now() + DEADLINE;
        while Instant::now() < at || is_reload && !service.reloads_are_over() {
            done.continue_due(&service, Instant::now());
            if Instant::now() > end {
                let log = service.heard().log.join("\n");
                return Err(format!("a reload has not ended within {DEADLINE:?}; the log:\n{log}"));
            }
            thread::sleep(POLL);
        }
        at = Instant::now();
        if begun.elapsed() > settings.length {
            break;
        }
        println!("{:8.3} s  {}", begun.elapsed().as_secs_f64(), step.what);
        take(&mut service, &mut done, step.what)?;
    }
    while !done.to_continue.is_empty() {
        done.continue_due(&service, Instant::now());
        thread::sleep(POLL);
    }
    let reloads = service.generation as usize - 1;
    service
        .wait("the last reload is over", |heard| heard.reloads_done + heard.reloads_given_up == reloads)?;
    let report = load.stop();
    let status = service.end()?;
    Ok(judge(settings, &service.heard(), &done, &report, status))
}

/// A port that nobody else has. Where there are no namespaces to be had it is a free one for now.
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
            if done.to_continue.iter().all(|(stopped, _)| *stopped != pid)
                && service.send(pid, Signal::SIGSTOP)
            {
                done.stopped += 1;
                done.to_continue.push((pid, Instant::now() + length));
            }
        }
        What::Kill { nth } => {
            let serving = service.serving();
            let Some(pid) = serving.get(nth % serving.len().max(1)).copied() else { return Ok(()) };
            if service.send(pid, Signal::SIGKILL) {
                done.killed.insert(pid);
            }
        }
    }
    Ok(())
}

/// Prints what has happened and whether it may.
fn judge(settings: &Settings, heard: &Heard, done: &Done, report: &Report, status: Option<i32>) -> bool {
    let crashed: HashSet<u32> = heard
        .log
        .iter()
        .filter(|line| line.contains(&format!("exited with status {CRASH_STATUS}")))
        .filter_map(|line| number(line, "(pid "))
        .collect();
    // A worker may have accepted one more than it had the time to say.
    let accepted =
        |pid: &u32| heard.connections.get(pid).map_or(0, |(accepted, closed)| accepted - closed + 1);
    let allowed: u64 = done.killed.union(&crashed).map(accepted).sum();
    println!("\n{report}\n");
    println!(
        "reloads: {} done, {} given up; {} of them were to a broken version, {} to one that crashes",
        heard.reloads_done,
        heard.reloads_given_up,
        done.broken,
        done.crashing.len(),
    );
    println!(
        "workers: {} stopped and continued, {} killed, {} crashed; {} connections reset by reuse-run",
        done.stopped,
        done.killed.len(),
        crashed.len(),
        heard.reset,
    );
    let failed = report.counts.failed;
    let mut wrong = Vec::new();
    if failed > allowed {
        wrong.push(format!("{failed} requests failed, which may be {allowed} at most"));
    }
    for kind in [Kind::Refused, Kind::TimeOut] {
        if report.count(kind) > 0 {
            wrong.push(format!("{kind}: {}, which no worker's end explains", report.count(kind)));
        }
    }
    if report.counts.answered == 0 {
        wrong.push("no request was answered".to_owned());
    }
    if status != Some(0) {
        wrong.push(format!("reuse-run ended with status {status:?} instead of 0"));
    }
    if wrong.is_empty() {
        println!(
            "requests: {} answered, {failed} failed, which may be {allowed} at most",
            report.counts.answered
        );
        return true;
    }
    println!("the log:\n{}", heard.log.join("\n"));
    println!("WRONG: {}; again with: --seed {}", wrong.join("; "), settings.seed);
    false
}
