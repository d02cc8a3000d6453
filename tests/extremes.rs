//! What was tried and held: floods, and systems that lack something. reuse-run does its work, or says at once what it can't
//! do, and the workers that serve go on.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use common::load::{Load, LoadOptions};
use common::{
    DEADLINE, Folder, Outcome, Service, User, answered_more, arguments, begin, behind, behind_shell, example,
    free_address, get, naive, naive_with, needs_other_users, own_network, python, reload_under_load,
    reuse_run, run, server, status, turn, wait_until,
};
use nix::sys::signal::Signal;

/// How many fds reuse-run may have open, whatever a worker does.
const MAX_FDS: usize = 100;

/// tests/apps/python/extremes.py at a free address.
fn extreme(what: &str, more: &[&str]) -> (SocketAddr, Vec<String>) {
    let addr = free_address();
    let port = addr.port().to_string();
    (addr, python("extremes.py", &[&[what, port.as_str()], more].concat()))
}

/// Runs until a reload has ended, and returns whether it was done.
#[track_caller]
fn ends_a_reload(service: &Service) -> bool {
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    let is_end = |line: &str| line.contains("reload done") || line.contains("reload abandoned");
    service.wait_for_line_where(from, "ends the reload", is_end).text.contains("reload done")
}

// Floods.

#[test]
fn after_400_shutdowns_of_listeners_under_load_both_workers_serve_and_reloads_lose_nothing() {
    let _turn = turn();
    let (addr, command) = extreme("shutdowns", &[]);
    let mut service = Service::run_ready("-n 2", &command);
    // Some fail: whoever shuts a listener down resets what is queued on it.
    let load = Load::start(LoadOptions::new(addr, 2));
    wait_until("400 shutdowns", DEADLINE, || service.out.count_of("has shut down") == 2);
    load.stop();
    for slot in [0, 1] {
        wait_until("each serves", DEADLINE, || get(addr).slot == Some(slot));
    }
    assert!(service.fds() < MAX_FDS, "{} fds", service.fds());
    // Each has changed the order of the kernel's array of listeners, in which the next generations are found.
    reload_under_load(&service, LoadOptions::new(addr, 2), 3);
    service.stop();
}

#[test]
fn a_hundred_thousand_notifications_cost_no_request_and_no_memory() {
    let _turn = turn();
    let (addr, command) = extreme("notifications", &["100000"]);
    let mut service = Service::run_ready("-n 1 --ready notify", &command);
    let before = service.memory_kib();
    let load = Load::start(LoadOptions::new(addr, 2));
    let says = || status(&service)["workers"][0]["status"].as_str().map(str::to_owned);
    wait_until("the last of them", DEADLINE, || says().as_deref() == Some("the last"));
    answered_more(&load);
    load.stop().assert_nothing_failed();
    assert!(service.memory_kib() < before + 4096, "{} KiB, {before} before", service.memory_kib());
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn after_reloads_with_labels_memory_and_descriptors_are_the_same_as_before() {
    let _turn = turn();
    let _ = (reuse_run(), server()); // it starts these
    let output = Command::new(example("chaos")).args(["--reloads", "60"]).output().expect("run chaos");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_reload_does_not_wait_for_very_many_idle_connections() {
    let _turn = turn();
    let (addr, command) = extreme("holds", &[]);
    let mut service = Service::run_ready("-n 2 --drain 1h", &command);
    let idle: Vec<TcpStream> = (0..800).map(|_| TcpStream::connect(addr).expect("connect")).collect();
    let load = Load::start(LoadOptions::new(addr, 2));
    answered_more(&load);
    service.reload();
    answered_more(&load);
    load.stop().assert_nothing_failed();
    drop(idle);
    service.stop();
}

#[test]
fn four_hundred_workers_are_stopped_in_time() {
    let _turn = turn();
    let command = [server(), "--listen".to_owned(), free_address().to_string()];
    let mut service = Service::run_ready("-n 400 --stop-within 30s", &command);
    service.stop(); // with status 1 if one had to be killed
}

// A system that lacks something.

#[test]
fn twenty_workers_that_need_more_than_64_descriptors_are_not_started_and_none_is_left() {
    let addr = free_address();
    let mut service = Service::spawn(behind_shell(r#"ulimit -n 64; exec "$0" "$@""#, "-n 20", &naive(addr)));
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    service.wait_for_line("can't be started: can't start a process: Too many open files");
    assert_eq!(service.descendants(), [0u32; 0]);
}

/// It would take all of --drain if there were none left to find out which connections there are.
#[test]
fn with_few_descriptors_a_reload_is_done_or_abandoned_at_once_and_no_request_fails() {
    let _turn = turn();
    let mut done = [0; 2];
    for limit in [48, 54, 58, 64, 72] {
        let addr = free_address();
        let shell = format!(r#"ulimit -n {limit}; exec "$0" "$@""#);
        let mut service = Service::spawn_ready(behind_shell(&shell, "-n 4 --drain 1h", &naive(addr)));
        let load = Load::start(LoadOptions::new(addr, 2));
        for _ in 0..2 {
            done[usize::from(ends_a_reload(&service))] += 1;
        }
        answered_more(&load);
        load.stop().assert_nothing_failed();
        assert_eq!(service.log.count_of("can't list connections"), 0, "{limit}: {}", service.log.text());
        assert_eq!(run(&service, "status").code, Some(0), "{limit}");
        service.stop();
    }
    assert!(done[0] > 0 && done[1] > 0, "{done:?}");
}

#[test]
fn a_reload_that_may_start_no_process_is_abandoned_and_the_next_one_is_done() {
    needs_other_users!();
    let user = User::new();
    let addr = free_address();
    let command = [user.server(), "--listen".to_owned(), addr.to_string()];
    // The soft limit counts all processes of the user: three now.
    let mut service = Service::spawn_ready(user.command(&[], &arguments("-n 2", &command)));
    let limit = |number: &str| {
        let pid = service.pid().to_string();
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={}", user.id), "--clear-groups", &format!("--regid={}", user.id)]);
        command.args(["--", "prlimit", "--pid", &pid, &format!("--nproc={number}")]);
        assert!(command.status().expect("run prlimit").success());
    };
    limit("1:");
    let load = Load::start(LoadOptions::new(addr, 2));
    for _ in 0..3 {
        let log = service.failing_reload();
        assert!(log.contains("can't be started: can't start a process: "), "{log}");
    }
    answered_more(&load);
    limit("100:");
    service.reload();
    answered_more(&load);
    let report = load.stop();
    report.assert_nothing_failed();
    assert_eq!(get(addr).generation, Some(5));
    service.stop();
}

#[test]
fn with_a_full_or_read_only_folder_for_temporary_files_workers_can_say_that_they_are_ready() {
    for (kind, prepare) in [("full", "nr_inodes=1"), ("read-only", "ro")] {
        let (folder, addr) = (Folder::new(), free_address());
        let text = r#"mount -t tmpfs -o "$0" none "$1"; export TMPDIR="$1"; shift; exec "$@""#;
        let prefix = ["unshare", "--mount", "sh", "-c", text, prepare, &folder.path("")];
        let command = naive_with(addr, &["--ready-after", "0"]);
        let mut service = Service::spawn_ready(behind(&prefix, "-n 2 --ready notify --label", &command));
        let worker = service.workers()[0];
        let environment = fs::read(format!("/proc/{worker}/environ")).expect("its environment");
        let environment = String::from_utf8_lossy(&environment).replace('\0', "\n");
        assert!(environment.contains("\nNOTIFY_SOCKET=@"), "{kind}: {environment}");
        reload_under_load(&service, LoadOptions::new(addr, 2), 2);
        service.stop();
    }
}

#[test]
fn with_room_for_one_connection_in_each_queue_a_reload_loses_none() {
    let _turn = turn();
    own_network();
    fs::write("/proc/sys/net/core/somaxconn", "1").expect("set somaxconn");
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    reload_under_load(&service, LoadOptions::new(addr, 2), 4);
    service.stop();
}

// A wrapper that can't do anything.

#[test]
fn while_reuse_run_is_stopped_requests_are_answered_and_commands_end() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 2));
    service.signal(Signal::SIGSTOP);
    for command in ["status", "reload", "stop"].map(|words| begin(&service, words)) {
        Outcome::of(command).assert_failed(&["does not answer"]);
    }
    answered_more(&load);
    service.signal(Signal::SIGCONT);
    // What nobody waits for any more isn't done.
    assert_eq!(status(&service)["generation"], 1);
    service.reload();
    answered_more(&load);
    load.stop().assert_nothing_failed();
    service.stop();
}
