//! Servers that were written without reuse-run in mind, reloaded five times under load: a test for each folder of
//! tests/servers, which holds a server and its `server.toml`. Those that run by hand are ignored tests. The table of
//! results is written to target/servers.md and, with UPDATE_SERVERS=1, to tests/servers/RESULTS.md if all tests pass.
//! A server that wasn't run keeps its row.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use common::load::{self, Failure, Kind, Load, LoadOptions, Mode, Protocol, Report};
use common::{DEADLINE, Folder, Service, arguments, free_port, is_left_out, reuse_run, wait_until};
use libtest_mimic::{Arguments, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

const RELOADS: u32 = 5;
/// Clients at each address that open a connection for each request.
const NEW_CONNECTIONS: usize = 6;
/// Their requests a second. Less than full speed, because starts and stops are tested, not throughput.
const RATE: f64 = 300.0;
/// Clients at each address that keep their connection, with a pause between an answer and the next request.
const KEEP_ALIVE: usize = 8;
const THINK: Duration = Duration::from_millis(100);

/// So many servers run at a time, on however many processors: most of them wait most of the time.
const AT_A_TIME: usize = 4;

/// Stands instead of numbers for a server that closes each connection after one answer.
const CLOSES: &str = "closes";

/// A `server.toml`. A shell runs the commands, in the server's folder and with the variables of [`environment`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    title: String,
    /// `COMMAND=PACKAGE`, separated by spaces: the Debian packages that scripts/test installs.
    #[serde(default, rename = "needs")]
    _needs: String,
    /// Why it isn't tested by every run: its test is ignored unless asked for by `--ignored` or `--include-ignored`.
    by_hand: Option<String>,
    /// Whether it changes its user. It is left out where there is none but root.
    #[serde(default)]
    changes_user: bool,
    /// A command that prints the version. The first word with a digit and a dot counts.
    version: String,
    /// A command that prepares the server, for example compiles it.
    build: Option<String>,
    /// Where the clients connect.
    #[serde(default = "loopback")]
    addresses: Vec<String>,
    /// A command of Redis, to be sent instead of `GET /` by HTTP.
    redis: Option<String>,
    /// New connections a second, for a server that can't answer [`RATE`].
    #[serde(default = "usual_rate")]
    rate: f64,
    /// Without any handling of signals.
    naive: Option<Variant>,
    /// With the graceful stop of its platform.
    graceful: Option<Variant>,
}

fn loopback() -> Vec<String> {
    vec!["127.0.0.1:$PORT".to_owned()]
}

fn usual_rate() -> f64 {
    RATE
}

/// A way to run a server.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Variant {
    run: String,
    /// Options of reuse-run.
    #[serde(default)]
    options: String,
    /// Why requests on new connections fail. Without this, none may.
    loses: Option<String>,
    /// Why requests on kept connections fail although the connection wasn't closed. Without this, none may.
    loses_kept: Option<String>,
    /// Another note about requests on kept connections.
    note: Option<String>,
}

/// What the clients of one variant have seen, a report for each address.
struct Outcome {
    new: Vec<Report>,
    kept: Vec<Report>,
}

/// A row of the table.
struct Row {
    manifest: Manifest,
    cells: Cells,
}

/// The version; what failed on new connections, naive and graceful; and the same on kept ones. Without marks of notes.
type Cells = [String; 5];

type Rows = BTreeMap<String, Row>;

fn main() {
    let servers = servers();
    let update = std::env::var_os("UPDATE_SERVERS").is_some();
    let rows: Arc<Mutex<Rows>> = Arc::default();
    let mut trials: Vec<Trial> = servers
        .iter()
        .cloned()
        .map(|name| {
            let rows = Arc::clone(&rows);
            let manifest = manifest(&name);
            let by_hand = manifest.as_ref().is_ok_and(|manifest| manifest.by_hand.is_some());
            let changes_user = manifest.is_ok_and(|manifest| manifest.changes_user);
            let title = name.clone();
            let test =
                move || if changes_user && is_left_out(&name) { Ok(()) } else { Ok(test(&name, &rows)?) };
            Trial::test(title, test).with_ignored_flag(by_hand)
        })
        .collect();
    if !update {
        trials.push(Trial::test("the_table_is_of_these_servers", || Ok(results_are_of_these_servers()?)));
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    let conclusion = libtest_mimic::run(&arguments, trials);
    let mut rows = rows.lock().unwrap_or_else(PoisonError::into_inner);
    if !rows.is_empty() {
        for (name, row) in earlier_rows().expect("the table of earlier runs") {
            rows.entry(name).or_insert(row);
        }
        let table = table(&rows);
        fs::write(target().join("servers.md"), &table).expect("write the table");
        if update && !conclusion.has_failed() {
            fs::write(folder("RESULTS.md"), &table).expect("write the table");
        }
    }
    conclusion.exit();
}

/// Whether tests/servers/RESULTS.md has a row for each server, and what the manifests say.
fn results_are_of_these_servers() -> Result<(), String> {
    let rows = earlier_rows()?;
    let missing: Vec<String> = servers().into_iter().filter(|name| !rows.contains_key(name)).collect();
    let lines = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !line.starts_with(MEASURED)).map(str::to_owned).collect()
    };
    let (is, should) = (lines(&results()?), lines(&table(&rows)));
    if missing.is_empty() && is == should {
        return Ok(());
    }
    let first = is.iter().zip(&should).find(|(is, should)| is != should);
    Err(format!(
        "outdated, write it by UPDATE_SERVERS=1 scripts/test --test servers, or with a server's name after `--`; \
         missing: {missing:?}; the first difference: {first:?}"
    ))
}

fn results() -> Result<String, String> {
    fs::read_to_string(folder("RESULTS.md")).map_err(|error| format!("RESULTS.md: {error}"))
}

/// The rows that the table has, by the titles of the servers.
fn earlier_rows() -> Result<Rows, String> {
    let results = results()?;
    let without_marks = |cell: &str| cell.split(" [").next().unwrap_or_default().to_owned();
    let cells = |line: &str| -> Option<Vec<String>> {
        let line = line.strip_prefix("| ")?.strip_suffix(" |")?;
        Some(line.split(" | ").map(without_marks).collect())
    };
    let lines: Vec<Vec<String>> = results.lines().filter_map(cells).collect();
    let mut rows = Rows::new();
    for name in servers() {
        let manifest = manifest(&name)?;
        let line = lines.iter().find(|cells| cells[0] == manifest.title);
        if let Some(cells) = line.and_then(|cells| Cells::try_from(cells[1..].to_vec()).ok()) {
            rows.insert(name, Row { manifest, cells });
        }
    }
    Ok(rows)
}

fn manifest(name: &str) -> Result<Manifest, String> {
    let text = fs::read_to_string(folder(name).join("server.toml")).map_err(|error| error.to_string())?;
    toml::from_str(&text).map_err(|error| format!("{name}/server.toml: {error}"))
}

/// The names of the folders that hold a server.
fn servers() -> Vec<String> {
    let entries = fs::read_dir(folder("")).expect("read tests/servers").flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join("server.toml").exists())
        .map(|entry| entry.file_name().into_string().expect("a name in UTF-8"))
        .collect();
    names.sort();
    names
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers").join(name)
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target")
}

/// Tests all variants of a server. The error has a line for each that fails.
fn test(name: &str, rows: &Mutex<Rows>) -> Result<(), String> {
    let manifest = manifest(name)?;
    let mut errors = Vec::new();

    if let Some(build) = &manifest.build {
        output(&mut shell(name, build, &environment(name)))?;
    }
    let version = version(&output(&mut shell(name, &manifest.version, &environment(name)))?);
    let mut run = |kind: &str, variant: &Option<Variant>| {
        let variant = variant.as_ref()?;
        // In a thread with a network namespace of its own. (This thread needs the registries.)
        let outcome = thread::scope(|scope| {
            let thread = scope.spawn(|| reload_under_load(name, &manifest, variant));
            thread.join().map_err(|panic| panic_message(&*panic))
        });
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                errors.push(format!("{kind}: {error}"));
                return None;
            }
        };
        for report in &outcome.new {
            println!("{name} {kind}, new connections: {report}");
        }
        for report in &outcome.kept {
            println!("{name} {kind}, kept connections: {report}");
        }
        if let Err(error) = check(kind, variant, &outcome) {
            errors.push(format!("{kind}: {error}"));
        }
        Some(outcome)
    };
    let naive = run("naive", &manifest.naive);
    let graceful = run("graceful", &manifest.graceful);
    let cell = |outcome: &Option<Outcome>, show: &dyn Fn(&Outcome) -> String| {
        outcome.as_ref().map_or_else(|| "–".to_owned(), show)
    };
    let new = |outcome: &Outcome| lost(&outcome.new);
    let kept = |outcome: &Outcome| {
        let keeps = |report: &Report| report.counts.connections < report.counts.requests;
        if outcome.kept.iter().any(keeps) { lost(&outcome.kept) } else { CLOSES.to_owned() }
    };
    let [new_naive, kept_naive] = [cell(&naive, &new), cell(&naive, &kept)];
    let cells = [version, new_naive, cell(&graceful, &new), kept_naive, cell(&graceful, &kept)];
    let row = Row { manifest, cells };
    rows.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), row);
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

/// Reloads two workers five times, under load at each address.
fn reload_under_load(name: &str, manifest: &Manifest, variant: &Variant) -> Outcome {
    let scratch = Folder::new();
    for generation in 1..=RELOADS + 1 {
        let site = scratch.path(&format!("site/{generation}"));
        fs::create_dir_all(&site).expect("make a site");
        fs::write(format!("{site}/index.html"), format!("generation={generation}\n")).expect("write a page");
    }
    let ports = [free_port(), free_port()].map(|port| port.to_string());
    let mut variables = environment(name);
    variables.insert("PORT", ports[0].clone());
    variables.insert("PORT_2", ports[1].clone());
    variables.insert("SCRATCH", scratch.path("").trim_end_matches('/').to_owned());
    variables.insert("SITE", scratch.path("site"));
    // Some servers write to their home, two of them to the same file.
    variables.insert("HOME", variables["SCRATCH"].clone());
    let addresses: Vec<SocketAddr> = manifest
        .addresses
        .iter()
        .map(|text| text.replace("$PORT_2", &ports[1]).replace("$PORT", &ports[0]))
        .map(|text| text.parse().expect("an address"))
        .collect();

    let (protocol, path) = match &manifest.redis {
        Some(command) => (Protocol::Redis, command.as_str()),
        None => (Protocol::Http, "/"),
    };

    let _leftovers = Leftovers;
    let mut command = reuse_run();
    command.args(arguments(
        &format!("-n 2 --ready-timeout 10m {}", variant.options),
        &["sh", "-c", &variant.run],
    ));
    command.current_dir(folder(name)).envs(&variables);
    let mut service = Service::spawn(command);
    service.wait_until_ready();
    // A worker is ready when it listens on one address. It may be another one: asyncio binds IPv4 and IPv6 in any order.
    for addr in &addresses {
        wait_until(&format!("an answer at {addr}"), DEADLINE, || {
            load::ask(protocol, *addr, path, DEADLINE).is_ok()
        });
    }

    let load = |mode: Mode, clients: usize, rate: Option<f64>| {
        let each = addresses.iter().map(|addr| {
            let options = LoadOptions::new(*addr, clients).mode(mode).protocol(protocol).path(path).record();
            Load::start(LoadOptions { rate, ..options }.timeout(DEADLINE))
        });
        each.collect::<Vec<Load>>()
    };
    let new = load(Mode::NewConnection, NEW_CONNECTIONS, Some(manifest.rate / addresses.len() as f64));
    let kept = load(Mode::KeepAlive { think: THINK }, KEEP_ALIVE, None);
    // A generation that never answers would time out here.
    let answers = |generation: u32| {
        wait_until(&format!("answers of generation {generation} at every address"), DEADLINE, || {
            let of = |load: &Load| load.snapshot().generations.get(&generation).copied().unwrap_or(0);
            new.iter().all(|load| of(load) >= 50) && kept.iter().all(|load| of(load) >= 20)
        });
    };
    answers(1);
    for reload in 1..=RELOADS {
        service.reload();
        answers(reload + 1);
    }
    let stop = |loads: Vec<Load>| loads.into_iter().map(Load::stop).collect();
    let outcome = Outcome { kept: stop(kept), new: stop(new) };
    service.signal(Signal::SIGTERM);
    let status = service.wait_end();
    // Servers that are known to get stuck have a --stop-timeout of their own and are killed then.
    let in_order = status.success() || variant.options.contains("--stop-timeout");
    assert!(in_order, "{status} of reuse-run after SIGTERM; log:\n{}", service.log.text());
    let left = neighbours();
    assert!(left.is_empty(), "left behind: {left:?}; log:\n{}", service.log.text());
    outcome
}

/// Checks a variant's results against its manifest.
fn check(kind: &str, variant: &Variant, outcome: &Outcome) -> Result<(), String> {
    let all: Vec<u32> = (1..=RELOADS + 1).collect();
    for report in outcome.new.iter().chain(&outcome.kept) {
        let generations: Vec<u32> = report.counts.generations.keys().copied().collect();
        if generations != all {
            return Err(format!("answered by generations {generations:?}"));
        }
    }
    for report in &outcome.new {
        if report.counts.failed > 0 && variant.loses.is_none() {
            return Err(format!("requests on new connections failed: {report}"));
        }
        if !report.stale().is_empty() {
            return Err(format!(
                "{} answers of a generation after a newer one had answered",
                report.stale().len()
            ));
        }
    }
    for report in &outcome.kept {
        let tolerated = |failure: &&Failure| {
            let is_closed = match failure.kind {
                Kind::EndOfFile | Kind::Reset => true,
                // A signal kills it, also in the middle of an answer.
                Kind::Truncated => kind == "naive",
                _ => false,
            };
            failure.on_reused_connection && (is_closed || variant.loses_kept.is_some())
        };
        let others = report.counts.failed - report.failures.iter().filter(tolerated).count() as u64;
        if others > 0 {
            return Err(format!(
                "{others} requests failed although their connection wasn't closed: {report}"
            ));
        }
    }
    Ok(())
}

/// The variables of every command. A running server also has PORT and PORT_2, which are free; SCRATCH, an empty folder;
/// and SITE, a folder with a static site `$SITE/$REUSE_RUN_GENERATION` for each generation.
fn environment(name: &str) -> BTreeMap<&'static str, String> {
    let text = |path: PathBuf| path.into_os_string().into_string().expect("a path in UTF-8");
    let build = target().join("servers").join(name);
    fs::create_dir_all(&build).expect("make the folder of what is built");
    let path = std::env::var("PATH").unwrap_or_default();
    let commands = text(folder("node_modules/.bin"));
    BTreeMap::from([
        // The folder for the results of `build`.
        ("BUILD", text(build)),
        // Some servers are in /usr/sbin, others come from npm.
        ("PATH", format!("{path}:/usr/sbin:/sbin:{commands}")),
        ("PYTHONPATH", text(target().join("servers-python"))),
        ("PYTHONDONTWRITEBYTECODE", "1".to_owned()),
    ])
}

fn shell(name: &str, text: &str, variables: &BTreeMap<&str, String>) -> Command {
    let mut command = Command::new("sh");
    command.args(["-e", "-c", text]).current_dir(folder(name)).envs(variables).stdin(Stdio::null());
    command
}

/// What a command has printed, which must succeed.
fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() { Ok(text) } else { Err(format!("{command:?}: {}\n{text}", output.status)) }
}

/// The first word that looks like a version, without the suffix of a distribution.
fn version(text: &str) -> String {
    let is_part = |c: char| c.is_ascii_digit() || c == '.';
    let words = text.split(|c: char| c.is_whitespace() || "/\"'(),".contains(c));
    let words = words.map(|word| word.trim_start_matches(|c: char| !c.is_ascii_digit()));
    let mut versions = words.map(|word| word.split(|c| !is_part(c)).next().unwrap_or_default());
    versions.find(|word| word.contains('.')).unwrap_or("unknown").to_owned()
}

/// The other processes in this thread's network namespace: all that its server has started.
fn neighbours() -> Vec<i32> {
    let network = fs::read_link("/proc/thread-self/ns/net").expect("a network namespace");
    let pids = fs::read_dir("/proc").expect("read /proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_near = |pid: &i32| fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|its| its == network);
    pids.filter(|pid| *pid != std::process::id() as i32).filter(is_near).collect()
}

/// Kills every process that a test leaves behind, also those that [`Service`] doesn't find, because they have another
/// environment.
struct Leftovers;

impl Drop for Leftovers {
    fn drop(&mut self) {
        for pid in neighbours() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// The beginning of the line about the machine.
const MEASURED: &str = "Measured by ";

/// The results in Markdown.
fn table(rows: &Rows) -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut text = format!(
        "<!-- Written by tests/servers.rs. -->\n\n\
         # Servers that were written without reuse-run in mind\n\n\
         Two workers of each, reloaded {RELOADS} times under load: how many requests failed, of how many. Naive: without\n\
         handling of signals. Graceful: with the graceful stop of its platform.\n\n\
         Keep-alive: clients wait for {think} ms between an answer and the next request on their connection. A request\n\
         fails if it comes in the moment in which a server that stops closes its connection, with or without\n\
         reuse-run. That moment takes milliseconds when a signal kills the server, because the kernel frees its\n\
         memory before it closes its connections. {CLOSES:?} stands for servers that close each connection after one answer.\n\n\
         {MEASURED}reuse-run {version} on Linux {kernel} with {cpus} CPUs. A\n\
         server that a run leaves out keeps its row.\n\n\
         | server | version | naive | graceful | keep-alive, naive | keep-alive, graceful |\n\
         |---|---|---|---|---|---|\n",
        think = THINK.as_millis(),
        version = env!("CARGO_PKG_VERSION"),
        kernel = version(&kernel),
        cpus = thread::available_parallelism().map_or(0, NonZero::get),
    );
    let mut notes: Vec<&String> = Vec::new();
    for Row { manifest, cells: [version, new_naive, new_graceful, kept_naive, kept_graceful] } in
        rows.values()
    {
        let mut cells =
            vec![manifest.title.clone() + &marks(&mut notes, manifest.by_hand.iter()), version.clone()];
        for (variant, cell) in [(&manifest.naive, new_naive), (&manifest.graceful, new_graceful)] {
            let reasons = variant.iter().flat_map(|variant| &variant.loses);
            cells.push(cell.clone() + &marks(&mut notes, reasons));
        }
        for (variant, cell) in [(&manifest.naive, kept_naive), (&manifest.graceful, kept_graceful)] {
            let reasons = variant.iter().flat_map(|variant| [&variant.loses_kept, &variant.note]).flatten();
            cells.push(cell.clone() + &marks(&mut notes, reasons));
        }
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    for (index, note) in notes.into_iter().enumerate() {
        let _ = write!(text, "\n{}. {note}", index + 1);
    }
    text.trim_end().to_owned() + "\n"
}

/// Adds these to the notes and returns their marks, for behind a number.
fn marks<'a>(notes: &mut Vec<&'a String>, these: impl Iterator<Item = &'a String>) -> String {
    let mark = |note| {
        let index = notes.iter().position(|known| *known == note).unwrap_or_else(|| {
            notes.push(note);
            notes.len() - 1
        });
        format!(" [{}]", index + 1)
    };
    these.map(mark).collect()
}

fn lost(reports: &[Report]) -> String {
    let sum = |number: fn(&Report) -> u64| reports.iter().map(number).sum::<u64>();
    format!("{} of {}", sum(|report| report.counts.failed), sum(|report| report.counts.requests))
}
