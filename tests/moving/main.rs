//! The pages about moving over from another tool: their commands, read from the page, do what it says with the programs that
//! people come from. tests/moving/held.toml names the test that holds each row of their tables.
#![cfg_attr(clippy, deny(warnings))]

#[path = "../common/mod.rs"]
mod common;
mod gunicorn;
mod node;
mod puma;

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::load::{self, Load, LoadOptions};
use common::{
    DEADLINE, Folder, Outcome, Service, answered_more, begin_words, free_address, get, own_network,
    reload_under_load, reuse_run, server,
};
use socket2::SockAddr;

/// Four workers on a page, or processes of a worker, are two here, for the sake of time.
const WORKERS: &str = "-n 2";

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The code of a page: indented lines and what stands between backticks.
fn code(page: &str) -> Vec<String> {
    let page = fs::read_to_string(here(page)).expect("a page");
    let lines = page.lines().filter_map(|line| line.strip_prefix("    "));
    lines.chain(spans(&page)).map(str::to_owned).collect()
}

fn spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The command line of a page that has this part, with fewer workers.
#[track_caller]
fn line(page: &str, part: &str) -> String {
    let mut lines =
        code(page).into_iter().filter(|code| code.starts_with("reuse-run ") && code.contains(part));
    lines
        .next()
        .unwrap_or_else(|| panic!("{page} has no {part}"))
        .replace("-n 4", WORKERS)
        .replace("-w 4", "-w 2")
}

/// The cells of a page's row that begins with this.
#[track_caller]
fn row(page: &str, begin: &str) -> Vec<String> {
    let page = fs::read_to_string(here(page)).expect("a page");
    let row = page.lines().find_map(|line| line.strip_prefix("| ").filter(|row| row.starts_with(begin)));
    row.unwrap_or_else(|| panic!("no row {begin}")).split(" | ").map(str::to_owned).collect()
}

/// A folder with a copy of a file, which begins with these lines.
fn app(begin: &str, file: &str) -> Folder {
    let (folder, file) = (Folder::new(), here(file));
    let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let name = file.file_name().and_then(|name| name.to_str()).expect("a name");
    folder.write_with(name, &format!("{begin}\n{text}"), 0o644);
    folder
}

/// A command line as a shell in this folder runs it, with reuse-run and the Python servers in its PATH.
fn shell(line: &str, folder: &Folder) -> Command {
    let packages = here("target/servers-python");
    assert!(packages.exists(), "{} is missing: run scripts/test", packages.display());
    let program = reuse_run().get_program().to_owned();
    let programs = Path::new(&program).parent().expect("a folder");
    let path = std::env::var("PATH").expect("PATH");
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec {line}")]).current_dir(&folder.0).env_remove("REUSE_RUN_LOG");
    shell.env("PATH", format!("{}:{}/bin:{path}", programs.display(), packages.display()));
    shell.env("PYTHONPATH", packages).env("PYTHONDONTWRITEBYTECODE", "1");
    shell.env("HOME", &folder.0).env_remove("XDG_RUNTIME_DIR"); // gunicorn has a socket in one of them
    // On a busy machine they take long to start and to stop.
    let patience = [("READY_TIMEOUT", "10m"), ("STOP_TIMEOUT", "2m"), ("STOP_WITHIN", "3m")];
    shell.envs(patience.map(|(option, value)| (format!("REUSE_RUN_{option}"), value)));
    // gunicorn, uvicorn and Puma start so many processes, unless the command line has another number.
    shell.env("WEB_CONCURRENCY", "3");
    shell
}

#[track_caller]
fn start(line: &str, folder: &Folder) -> Service {
    Service::spawn_ready(shell(line, folder))
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// A load that leaves CPU time for starts.
fn light(addr: impl Into<SockAddr>) -> LoadOptions {
    LoadOptions::new(addr, 4).rate(100.0).timeout(DEADLINE)
}

/// At a stop, a request may take as long as this row says. With the default options it would be cut after 9 s.
#[track_caller]
fn assert_long_request_is_answered_at_a_stop(page: &str, begin: &str) {
    let options = spans(&row(page, begin)[1]).next().expect("options").to_owned();
    let addr = free_address();
    let listen = addr.to_string();
    let mut service = Service::run_ready(&format!("-n 1 {options}"), &[&server(), "--listen", &listen]);
    let client = std::thread::spawn(move || load::get(addr, "/sleep/12000?id=long", DEADLINE));
    service.wait_for_output("begun long");
    service.stop();
    assert_eq!(client.join().expect("a client").expect("an answer").origin.generation, Some(1));
}

/// Reloads once, with clients at this address.
#[track_caller]
fn reload_loses_nothing(service: &Service, addr: impl Into<SockAddr>) {
    reload_under_load(service, light(addr), 1);
}

/// Runs a page's command line, and under load each command to a running reuse-run that the page shows. `stop` comes last.
#[track_caller]
fn every_command_loses_no_request(page: &str, part: &str, folder: &Folder, port: u16) {
    own_network();
    let mut service = start(&line(page, part), folder);
    let pid = service.pid();
    let of_running = ["recycle", "reload", "scale", "status"];
    let is_command =
        |code: &String| of_running.iter().any(|name| code.starts_with(&format!("reuse-run {name}")));
    let commands: BTreeSet<String> = code(page).into_iter().filter(is_command).collect();
    assert!(commands.len() > 2, "{commands:?}");
    let load = Load::start(light(local(port)));
    answered_more(&load);
    for command in &commands {
        let words = command.replace("reuse-run ", "").replace("10m", "1s");
        let whose = if words.starts_with("recycle") { "--pid " } else { "" };
        let outcome = Outcome::of(begin_words(&format!("{words} {whose}{pid}")));
        assert_eq!(outcome.code, Some(0), "{command}: {outcome:?}");
    }
    answered_more(&load);
    load.stop().assert_nothing_failed();
    assert!(code(page).contains(&"reuse-run stop".to_owned()), "{page}");
    let outcome = Outcome::of(begin_words(&format!("stop {pid}")));
    assert_eq!((outcome.code, service.wait_end().code()), (Some(0), Some(0)), "{outcome:?}");
}

/// A command line whose app waits while `go` is missing, and can't be loaded once `broken` exists. Whether workers are ready
/// only when they have loaded it; if so, a reload to an app that can't be loaded fails.
#[track_caller]
fn assert_ready_when_loaded(line: &str, folder: &Folder, port: u16, loads_first: bool) {
    own_network();
    let mut service = Service::spawn(shell(&line.replace(WORKERS, "-n 1"), folder));
    service.wait_for_output("loads");
    if loads_first {
        assert!(!service.log.text().contains("is ready"), "{line}: {}", service.log.text());
        folder.raise("go");
    }
    service.wait_until_ready();
    folder.raise("go");
    if loads_first {
        folder.raise("broken");
        service.failing_reload();
        assert_eq!(get(local(port)).generation, Some(1), "{line}");
    }
    service.stop();
}
