//! Operating a running reuse-run: the commands reload, status, scale and stop, what they say and exit with,
//! the signals that do the same, the socket that they speak through, and the PID file.

mod common;

use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::load::{Load, LoadOptions};
use common::{
    DEADLINE, Folder, Service, app, children, free_address, free_port, get, holds_for, naive, own_network,
    reuse_run, send, server, ticks, turn, wait_for_answers, wait_until,
};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

/// A command in words, for a given reuse-run; it is a process like that and is ended like that.
fn begin(service: &Service, words: &str) -> Service {
    let mut command = reuse_run();
    command.args(words.split_whitespace()).arg(service.pid().to_string());
    Service::spawn(command)
}

/// What has become of a command.
#[derive(Debug)]
struct Outcome {
    code: Option<i32>,
    signal: Option<i32>,
    out: String,
    err: String,
}

impl Outcome {
    fn of(mut command: Service) -> Outcome {
        let status = command.wait_end();
        let (code, signal) = (status.code(), status.signal());
        Outcome { code, signal, out: command.out.text(), err: command.log.text() }
    }

    /// It has done what it was to do, and said so last.
    #[track_caller]
    fn assert_done(&self, part: &str) {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert!(self.out.lines().last().is_some_and(|line| line.contains(part)), "{part:?} in {self:?}");
        assert_eq!(self.err, "", "{self:?}");
    }

    /// It has not, and says why.
    #[track_caller]
    fn assert_failed(&self, parts: &[&str]) {
        assert_eq!(self.code, Some(1), "{self:?}");
        parts.iter().for_each(|part| assert!(self.err.contains(part), "{part:?} in {self:?}"));
    }
}

fn run(service: &Service, words: &str) -> Outcome {
    Outcome::of(begin(service, words))
}

/// What `status --json` says.
#[track_caller]
fn status(service: &Service) -> Value {
    let outcome = run(service, "status --json");
    serde_json::from_str(&outcome.out).unwrap_or_else(|error| panic!("{error}: {outcome:?}"))
}

/// Slots and generations of the workers that serve.
#[track_caller]
fn serving(service: &Service) -> Vec<(u64, u64)> {
    let status = status(service);
    let workers = status["workers"].as_array().expect("workers").iter();
    let number = |worker: &Value, field: &str| worker[field].as_u64().expect("a number");
    let serves = |worker: &&Value| worker["serves"] == true;
    workers.filter(serves).map(|worker| (number(worker, "slot"), number(worker, "generation"))).collect()
}

/// The highest number of children that a process has had at once.
struct MostChildren {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<usize>>,
}

impl MostChildren {
    fn watch(service: &Service) -> MostChildren {
        let (stop, pid) = (Arc::new(AtomicBool::new(false)), service.pid());
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut most = 0;
            while !stopped.load(Ordering::Relaxed) {
                most = most.max(children(pid).len());
                thread::sleep(Duration::from_millis(1));
            }
            most
        });
        MostChildren { stop, thread: Some(thread) }
    }

    fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it runs").join().expect("it watches")
    }
}

impl Drop for MostChildren {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

// reload

#[test]
fn reload_waits_until_the_new_workers_serve_alone_and_exits_with_0() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let before = service.workers();
    let outcome = run(&service, "reload");
    outcome.assert_done("2 workers of generation 2 serve");
    assert!(outcome.out.contains("reload: starting generation 2"), "{outcome:?}");
    assert!(!service.workers().iter().any(|pid| before.contains(pid)), "the old ones have ended");
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn a_reload_whose_worker_fails_exits_with_1_and_says_why() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2", &folder.server(addr, &[]));
    folder.raise("broken-2-1");
    let outcome = run(&service, "reload");
    outcome.assert_failed(&["worker 1", "exited with status 3 before", "2 workers of generation 1 serve on"]);
    assert_eq!(outcome.err.lines().count(), 1, "{outcome:?}");
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn a_reload_whose_worker_is_not_ready_in_time_exits_with_1_and_says_so() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2 --ready-timeout 3s", &folder.server(addr, &[]));
    folder.raise("hold-2-0");
    run(&service, "reload").assert_failed(&["was not ready within 3s", "generation 1 serve on"]);
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn an_abort_exits_with_0_and_the_reload_that_it_ended_with_1() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2", &folder.server(addr, &[]));
    folder.raise("hold-2-0");
    let reload = begin(&service, "reload");
    reload.wait_for_output("starting generation 2");
    run(&service, "reload --abort").assert_done("2 workers of generation 1 serve on");
    Outcome::of(reload).assert_failed(&["aborted", "2 workers of generation 1 serve on"]);
    assert_eq!(get(addr).generation, Some(1));
    run(&service, "reload").assert_done("2 workers of generation 3 serve");
    service.stop();
}

#[test]
fn an_abort_without_a_reload_exits_with_1() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    run(&service, "reload --abort").assert_failed(&["there is no reload that could be aborted"]);
    service.stop();
}

#[test]
fn an_abort_ends_also_the_reload_that_waits_its_turn() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 1", &folder.server(addr, &[]));
    folder.raise("hold-2-0");
    let first = begin(&service, "reload");
    first.wait_for_output("starting generation 2");
    let second = begin(&service, "reload");
    second.wait_for_output("once more as soon as this one is over");
    run(&service, "reload --abort").assert_done("1 worker of generation 1 serve");
    for waiting in [first, second] {
        Outcome::of(waiting).assert_failed(&["aborted"]);
    }
    run(&service, "reload").assert_done("serve");
    assert_eq!(service.log.count_of("reload: starting"), 2, "{}", service.log.text());
    service.stop();
}

#[test]
fn a_reload_exits_with_1_when_reuse_run_is_killed_meanwhile() {
    let folder = Folder::new();
    let mut service = Service::run_ready("-n 1", &folder.server(free_address(), &[]));
    folder.raise("hold-2-0");
    let reload = begin(&service, "reload");
    reload.wait_for_output("starting generation 2");
    service.signal(Signal::SIGKILL);
    Outcome::of(reload).assert_failed(&["has ended"]);
    service.wait_exit();
}

#[test]
fn a_reload_exits_with_1_when_everything_is_stopped_meanwhile() {
    let folder = Folder::new();
    let mut service = Service::run_ready("-n 1", &folder.server(free_address(), &[]));
    folder.raise("hold-2-0");
    let reload = begin(&service, "reload");
    reload.wait_for_output("starting generation 2");
    service.stop();
    Outcome::of(reload).assert_failed(&["everything was stopped"]);
}

#[test]
fn with_no_wait_a_reload_is_only_begun() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 1", &folder.server(addr, &[]));
    folder.raise("hold-2-0");
    run(&service, "reload --no-wait").assert_done("generation 2 has begun");
    assert_eq!(get(addr).generation, Some(1));
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    service.stop();
}

#[test]
fn with_timeout_a_reload_is_waited_for_no_longer_and_goes_on() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 1", &folder.server(addr, &[]));
    folder.raise("hold-2-0");
    run(&service, "reload --timeout 200ms").assert_failed(&["200ms", "--timeout", "goes on"]);
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn an_interrupt_ends_the_wait_and_not_the_reload() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 1", &folder.server(addr, &[]));
    folder.raise("hold-2-0");
    let reload = begin(&service, "reload");
    reload.wait_for_output("starting generation 2");
    reload.signal(Signal::SIGINT);
    let outcome = Outcome::of(reload);
    assert_eq!(outcome.signal, Some(Signal::SIGINT as i32), "{outcome:?}");
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn of_20_reloads_at_once_all_succeed_by_two() {
    let folder = Folder::new();
    let mut service = Service::run_ready("-n 2", &folder.server(free_address(), &[]));
    folder.raise("hold-2-0");
    let reloads: Vec<Service> = (0..20).map(|_| begin(&service, "reload")).collect();
    reloads.iter().for_each(|reload| drop(reload.wait_for_output("reload: ")));
    folder.lower("hold-2-0");
    for reload in reloads {
        assert!(reload.out.count_of("once more as soon as") <= 1, "{}", reload.out.text());
        Outcome::of(reload).assert_done("serve");
    }
    // What came during the first waited for one more, which was for all of them.
    assert_eq!(service.log.count_of("reload: starting"), 2, "{}", service.log.text());
    service.stop();
}

#[test]
fn of_20_reloads_at_once_each_is_told_how_its_own_went() {
    let folder = Folder::new();
    let mut service = Service::run_ready("-n 1", &folder.server(free_address(), &[]));
    ["hold-2-0", "broken-2-0"].into_iter().for_each(|flag| folder.raise(flag));
    let reloads: Vec<Service> = (0..20).map(|_| begin(&service, "reload")).collect();
    reloads.iter().for_each(|reload| drop(reload.wait_for_output("reload: ")));
    folder.lower("hold-2-0");
    let mut failed = 0;
    for reload in reloads {
        let is_first = reload.out.find(0, "reload: starting generation 2").is_some();
        let outcome = Outcome::of(reload);
        if is_first {
            failed += 1;
            outcome.assert_failed(&["exited with status 3", "1 worker of generation 1 serve"]);
        } else {
            outcome.assert_done("1 worker of generation 3 serve");
        }
    }
    assert_eq!(failed, 1, "who comes later has the next: {}", service.log.text());
    assert_eq!(service.log.count_of("reload: starting"), 2, "{}", service.log.text());
    service.stop();
}

#[test]
fn a_reload_before_the_first_generation_is_ready_waits_for_that() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("hold-1-0");
    let mut service = Service::run("-n 1", &folder.server(addr, &[]));
    let mut reload = None;
    wait_until("a reload is taken", DEADLINE, || {
        let command = begin(&service, "reload");
        wait_until("an answer", DEADLINE, || command.out.count() + command.log.count() > 0);
        let taken = command.out.count() > 0;
        reload = taken.then_some(command);
        taken
    });
    let reload = reload.expect("a reload");
    reload.wait_for_output("as soon as the first generation is ready");
    folder.lower("hold-1-0");
    Outcome::of(reload).assert_done("1 worker of generation 2 serve");
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn wrong_options_of_a_command_exit_with_2_and_one_line() {
    for words in [
        "reload --batch 0",
        "reload --batch x",
        "reload --canary 10",
        "reload --for 10s",
        "reload --canary 0 --for 10s",
        "reload --canary 100 --for 10s",
        "reload --canary 10 --for soon",
        "reload --canary 10 --for 10s --batch 2",
        "reload --abort --batch 2",
        "reload --frobnicate",
        "reload --timeout 10",
        "reload me",
        "status --jason",
        "status 1 2",
        "scale",
        "scale 0",
        "scale +0",
        "scale many",
        "scale 65536",
        "stop --now",
        "-n 2 status",
        "-n 2 reload",
    ] {
        let mut command = reuse_run();
        command.args(words.split_whitespace());
        let outcome = Outcome::of(Service::spawn(command));
        assert_eq!(outcome.code, Some(2), "{words}: {outcome:?}");
        assert_eq!((outcome.err.lines().count(), outcome.out.as_str()), (1, ""), "{words}: {outcome:?}");
    }
}

#[test]
fn after_two_dashes_a_program_by_the_name_of_a_command_is_run() {
    let folder = Folder::new();
    for name in ["reload", "status", "scale", "stop"] {
        let mut command = Command::new("ln");
        command.args(["-s", "/bin/echo", &folder.path(name)]);
        assert!(command.status().expect("run ln").success());
        let mut command = reuse_run();
        command.args(["--", name, "was run"]).env("PATH", folder.path(""));
        let outcome = Outcome::of(Service::spawn(command));
        assert_eq!(outcome.out, "was run", "{outcome:?}");
    }
}

#[test]
fn every_command_has_help() {
    for (name, part) in
        [("reload", "--canary"), ("status", "--watch"), ("scale", "+1"), ("stop", "--no-wait")]
    {
        let mut command = reuse_run();
        command.args([name, "--help"]);
        let outcome = Outcome::of(Service::spawn(command));
        assert_eq!((outcome.code, outcome.err.as_str()), (Some(0), ""), "{outcome:?}");
        assert!(outcome.out.contains(part) && outcome.out.contains(name), "{outcome:?}");
    }
}

// scale

#[test]
fn scaling_up_and_down_under_load_fails_nothing() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 8));
    for workers in [16, 1, 4] {
        wait_for_answers(&load, 100);
        let noun = if workers == 1 { "worker" } else { "workers" };
        run(&service, &format!("scale {workers}"))
            .assert_done(&format!("{workers} {noun} of generation 1 serve"));
        assert_eq!(service.workers().len(), workers);
    }
    let before = load.snapshot();
    wait_until("all new workers answer", DEADLINE, || {
        let now = load.snapshot();
        let answers = |slot| now.slots.get(&slot).copied().unwrap_or(0);
        (0..4).all(|slot| answers(slot) > before.slots.get(&slot).copied().unwrap_or(0))
    });
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn scale_takes_more_and_fewer_and_the_number_that_there_is() {
    let mut service = Service::run_ready("-n 2", &naive(free_address()));
    for (words, wanted) in [("scale +2", 4), ("scale -1", 3), ("scale 3", 3), ("scale +1", 4)] {
        run(&service, words).assert_done(&format!("{wanted} workers of generation 1 serve"));
        assert_eq!(service.workers().len(), wanted, "{words}");
    }
    run(&service, "scale -4").assert_failed(&["1 to 65535", "not 0"]);
    assert_eq!(service.workers().len(), 4);
    service.stop();
}

#[test]
fn sigttin_and_sigttou_are_one_worker_more_and_less_but_never_none() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1", &naive(addr));
    let signal_and_wait = |signal, line: &str| {
        let from = service.log.count();
        service.signal(signal);
        service.wait_for_line_after(from, line);
    };
    signal_and_wait(Signal::SIGTTIN, "scaling done: 2 workers");
    signal_and_wait(Signal::SIGTTIN, "scaling done: 3 workers");
    signal_and_wait(Signal::SIGTTOU, "scaling done: 2 workers");
    signal_and_wait(Signal::SIGTTOU, "scaling done: 1 worker");
    service.signal(Signal::SIGTTOU);
    assert_eq!(status(&service)["slots"], 1); // it is answered after the signal
    signal_and_wait(Signal::SIGTTIN, "scaling done: 2 workers");
    assert_eq!(service.log.count_of("scaling from"), 5, "{}", service.log.text());
    assert_eq!(service.workers().len(), 2);
    service.stop();
}

#[test]
fn scaling_up_is_undone_under_load_when_a_new_worker_fails() {
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2", &folder.server(addr, &[]));
    let load = Load::start(LoadOptions::new(addr, 8));
    wait_for_answers(&load, 100);
    // The others are ready before and have their part of the load.
    ["hold-1-4", "broken-1-4"].into_iter().for_each(|flag| folder.raise(flag));
    let scale = begin(&service, "scale 5");
    wait_until("the new workers serve", DEADLINE, || load.snapshot().slots.contains_key(&3));
    folder.lower("hold-1-4");
    let outcome = Outcome::of(scale);
    outcome.assert_failed(&["worker 4", "exited with status 3", "2 workers of generation 1 serve on"]);
    wait_until("the number is as it was", DEADLINE, || service.workers().len() == 2);
    assert_eq!(serving(&service), [(0, 1), (1, 1)]);
    wait_for_answers(&load, 100);
    load.stop().assert_nothing_failed();
    folder.lower("broken-1-4");
    run(&service, "scale 5").assert_done("5 workers of generation 1 serve");
    service.stop();
}

#[test]
fn scaling_during_a_reload_waits_for_its_end() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2", &folder.server(addr, &[]));
    folder.raise("hold-2-0");
    let reload = begin(&service, "reload");
    reload.wait_for_output("starting generation 2");
    let scale = begin(&service, "scale 3");
    scale.wait_for_output("as soon as what goes on is over");
    folder.lower("hold-2-0");
    Outcome::of(reload).assert_done("of generation 2 serve");
    Outcome::of(scale).assert_done("3 workers of generation 2 serve");
    assert_eq!(serving(&service), [(0, 2), (1, 2), (2, 2)]);
    service.stop();
}

#[test]
fn of_scalings_that_wait_the_last_is_done_and_each_is_told_the_truth() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2", &folder.server(addr, &[]));
    folder.raise("hold-1-2");
    folder.raise("hold-1-3");
    let begun = begin(&service, "scale 3");
    begun.wait_for_output("scaling from 2 to 3");
    let waits = begin(&service, "scale 5");
    waits.wait_for_output("scale to 5: as soon as what goes on is over");
    let last = begin(&service, "scale 4");
    Outcome::of(waits).assert_failed(&["4 workers were asked for since"]);
    folder.lower("hold-1-2");
    Outcome::of(begun).assert_done("3 workers of generation 1 serve");
    last.wait_for_output("scaling from 3 to 4");
    assert!(last.out.find(0, "4 workers of generation 1 serve").is_none(), "it is not done yet");
    folder.lower("hold-1-3");
    Outcome::of(last).assert_done("4 workers of generation 1 serve");
    service.stop();
}

#[test]
fn a_reload_that_waits_its_turn_keeps_its_way_whatever_signals_come() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2", &folder.server(addr, &[]));
    folder.raise("hold-2-0");
    let first = begin(&service, "reload");
    first.wait_for_output("starting generation 2");
    let waits = begin(&service, "reload --batch 1");
    waits.wait_for_output("once more as soon as this one is over");
    service.signal(Signal::SIGUSR2);
    run(&service, "reload --batch 2").assert_failed(&["goes another way"]);
    folder.lower("hold-2-0");
    Outcome::of(first).assert_done("2 workers of generation 2 serve");
    let outcome = Outcome::of(waits);
    outcome.assert_done("2 workers of generation 3 serve");
    assert!(outcome.out.contains("generation 3 serves in 1 of 2 slots"), "{outcome:?}");
    service.stop();
}

#[test]
fn a_reload_during_a_scaling_waits_for_its_end() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 1", &folder.server(addr, &[]));
    folder.raise("hold-1-1");
    let scale = begin(&service, "scale 2");
    scale.wait_for_output("scaling from 1 to 2");
    let reload = begin(&service, "reload");
    reload.wait_for_output("as soon as the scaling is over");
    folder.lower("hold-1-1");
    Outcome::of(scale).assert_done("2 workers of generation 1 serve");
    Outcome::of(reload).assert_done("2 workers of generation 2 serve");
    service.stop();
}

// reload --batch

/// Reloads 4 workers under load and returns the most processes that there were.
#[track_caller]
fn roll(options: &str, reload: impl FnOnce(&Service)) -> usize {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready(&format!("-n 4 {options}"), &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 8));
    wait_for_answers(&load, 100);
    let most = MostChildren::watch(&service);
    reload(&service);
    let most = most.stop();
    assert_eq!(serving(&service), [(0, 2), (1, 2), (2, 2), (3, 2)]);
    wait_for_answers(&load, 100);
    load.stop().assert_nothing_failed();
    service.stop();
    most
}

#[test]
fn batches_of_1_and_2_under_load_fail_nothing_and_need_no_more_workers_than_that() {
    for batch in [1, 2] {
        let most = roll("", |service| {
            run(service, &format!("reload --batch {batch}")).assert_done("4 workers of generation 2 serve");
        });
        assert_eq!(most, 4 + batch);
    }
}

#[test]
fn the_option_batch_is_how_a_signal_reloads() {
    let most = roll("--batch 1", |service| {
        service.reload();
    });
    assert_eq!(most, 5);
}

#[test]
fn a_new_worker_that_dies_after_its_batch_ends_the_rolling_reload() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2", &folder.server(addr, &[]));
    folder.raise("hold-2-1");
    let reload = begin(&service, "reload --batch 1");
    reload.wait_for_output("generation 2 serves in 1 of 2 slots");
    let new = workers_where(&service, |worker| worker["generation"] == 2 && worker["slot"] == 0);
    send(new[0]["pid"].as_u64().expect("a pid") as u32, Signal::SIGKILL);
    Outcome::of(reload)
        .assert_failed(&["was killed by SIGKILL", "1 worker of generation 2 and 1 of generation 1"]);
    assert_eq!(serving(&service), [(0, 2), (1, 1)]);
    service.wait_for_line("is ready, a replacement");
    folder.lower("hold-2-1");
    service.stop();
}

#[test]
fn a_failure_in_the_second_batch_leaves_two_generations_until_the_next_reload() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 4", &folder.server(addr, &[]));
    folder.raise("broken-2-2");
    let outcome = run(&service, "reload --batch 2");
    let both = "2 workers of generation 2 and 2 of generation 1 serve on";
    outcome.assert_failed(&["worker 2", "exited with status 3", both]);
    assert_eq!(serving(&service), [(0, 2), (1, 2), (2, 1), (3, 1)]);
    let shown = run(&service, "status");
    assert_eq!(shown.code, Some(0), "{shown:?}");
    assert!(shown.out.contains("last reload: generation 2") && shown.out.contains("failed"), "{shown:?}");
    for slot in [1, 2] {
        wait_until("both generations answer", DEADLINE, || get(addr).slot == Some(slot));
    }
    run(&service, "reload").assert_done("4 workers of generation 3 serve");
    assert_eq!(serving(&service), [(0, 3), (1, 3), (2, 3), (3, 3)]);
    service.stop();
}

#[test]
fn an_abort_between_batches_keeps_what_serves() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2", &folder.server(addr, &[]));
    folder.raise("hold-2-1");
    let reload = begin(&service, "reload --batch 1");
    wait_until("the first is replaced", DEADLINE, || serving(&service) == [(0, 2), (1, 1)]);
    let aborted = run(&service, "reload --abort");
    aborted.assert_done("1 worker of generation 2 and 1 of generation 1 serve on");
    Outcome::of(reload).assert_failed(&["aborted", "1 worker of generation 2 and 1 of generation 1"]);
    assert_eq!(serving(&service), [(0, 2), (1, 1)]);
    wait_until("the replaced one and the new one that is given up have ended", DEADLINE, || {
        service.workers().len() == 2
    });
    send(service.workers()[0], Signal::SIGKILL);
    service.wait_for_line("is ready, a replacement");
    assert_eq!(serving(&service), [(0, 2), (1, 1)], "each slot restarts what it had");
    service.stop();
}

// reload --canary

/// The workers that `status` shows for which `wanted` holds.
#[track_caller]
fn workers_where(service: &Service, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
    let status = status(service);
    let workers = status["workers"].as_array().expect("workers").iter();
    workers.filter(|worker| wanted(worker)).cloned().collect()
}

#[test]
fn a_canary_gets_its_share_of_new_connections_evenly_and_an_abort_under_load_fails_nothing() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 4", &naive(addr));
    let reload = begin(&service, "reload --canary 10 --for 100s");
    reload.wait_for_output("generation 2 gets 10 % of new connections");
    let load = Load::start(LoadOptions::new(addr, 8));
    wait_for_answers(&load, 10_000);
    let counts = load.snapshot();
    run(&service, "reload --abort").assert_done("4 workers of generation 1 serve on");
    Outcome::of(reload).assert_failed(&["aborted", "4 workers of generation 1 serve on"]);
    let switched = load.snapshot().generations.get(&2).copied();
    wait_for_answers(&load, 100);
    assert_eq!(load.snapshot().generations.get(&2).copied(), switched, "the old ones have everything again");
    load.stop().assert_nothing_failed();

    let of_generation = |number: u32| counts.generations.get(&number).copied().unwrap_or(0);
    let share = of_generation(2) as f64 * 100.0 / counts.answered as f64;
    assert!((8.0..=12.0).contains(&share), "{share} %: {counts:?}");
    let mut each: Vec<u64> = counts.pids.into_values().collect();
    each.sort_unstable();
    assert_eq!(each.len(), 8, "{each:?}");
    for workers in [&each[..4], &each[4..]] {
        let mean = workers.iter().sum::<u64>() as f64 / 4.0;
        let is_even = |count: &u64| (0.7..=1.3).contains(&(*count as f64 / mean));
        assert!(workers.iter().all(is_even), "{each:?}");
    }
    service.stop();
}

#[test]
fn a_canary_that_lives_gets_everything_in_the_end_and_fails_nothing() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 8));
    wait_for_answers(&load, 100);
    run(&service, "reload --canary 10 --for 500ms").assert_done("2 workers of generation 2 serve");
    let before = load.snapshot().generations.get(&1).copied();
    wait_for_answers(&load, 100);
    let report = load.stop();
    report.assert_nothing_failed();
    assert_eq!(report.counts.generations.get(&1).copied(), before, "{report}");
    assert_eq!(serving(&service), [(0, 2), (1, 2)]);
    service.stop();
}

#[test]
fn a_canary_that_dies_ends_the_reload_and_the_old_workers_have_everything() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let reload = begin(&service, "reload --canary 50 --for 100s");
    reload.wait_for_output("generation 2 gets 50 % of new connections");
    wait_until("a canary answers", DEADLINE, || get(addr).generation == Some(2));
    let canaries = workers_where(&service, |worker| worker["generation"] == 2);
    assert!(canaries.iter().all(|worker| worker["serves"] == false), "{canaries:?}");
    send(canaries[1]["pid"].as_u64().expect("a pid") as u32, Signal::SIGKILL);
    Outcome::of(reload).assert_failed(&["worker 1", "SIGKILL", "2 workers of generation 1 serve on"]);
    for _ in 0..50 {
        assert_eq!(get(addr).generation, Some(1));
    }
    service.stop();
}

// status

#[track_caller]
fn assert_fits_the_schema(status: &Value) {
    let text = include_str!("status.schema.json");
    let schema: Value = serde_json::from_str(text).expect("a schema in JSON");
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler.add_resource("status.schema.json", schema).expect("add the schema");
    let index = compiler.compile("status.schema.json", &mut schemas).expect("a schema");
    schemas.validate(status, index).unwrap_or_else(|error| panic!("{error}\n{status:#}"));
}

/// Waits until a worker is in a state; what `status --json` says must fit the schema all the time.
#[track_caller]
fn wait_for_state(service: &Service, state: &str) -> Value {
    let mut last = Value::Null;
    wait_until(&format!("a worker is {state}"), DEADLINE, || {
        last = status(service);
        assert_fits_the_schema(&last);
        last["workers"].as_array().expect("workers").iter().any(|worker| worker["state"] == state)
    });
    last
}

#[test]
fn the_schema_refuses_what_it_does_not_describe_and_describes_each_field() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let good = status(&service);
    assert_fits_the_schema(&good);
    for (pointer, value) in [("", "x"), ("/workers/0", "x"), ("/workers/0", "state")] {
        let mut bad = good.clone();
        bad.pointer_mut(pointer).expect("an object")[value] = Value::from("frobnicating");
        std::panic::catch_unwind(|| assert_fits_the_schema(&bad)).expect_err("it does not fit");
    }
    let schema: Value = serde_json::from_str(include_str!("status.schema.json")).expect("JSON");
    for object in ["", "/$defs/worker", "/$defs/reload"] {
        let object = schema.pointer(object).expect("an object");
        for (name, field) in object["properties"].as_object().expect("properties") {
            assert!(field["description"].as_str().is_some_and(|text| text.ends_with('.')), "{name}");
        }
    }
    service.stop();
}

#[test]
fn status_tells_starting_ready_draining_and_stopping_workers_and_exits_with_4_and_0() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("hold-1-0");
    let mut service = Service::run("-n 1 --drain 100s", &folder.server(addr, &["--ignore-int"]));
    // Until it has its socket the command finds nobody.
    wait_until("status answers", DEADLINE, || run(&service, "status").code != Some(1));
    let shown = wait_for_state(&service, "starting");
    assert_eq!((&shown["state"], &shown["ready"]), (&Value::from("starting"), &Value::from(0)));
    assert_eq!(run(&service, "status").code, Some(4));
    folder.lower("hold-1-0");
    let shown = wait_for_state(&service, "ready");
    assert_eq!(shown["addresses"], Value::from(vec![addr.to_string()]));
    assert_eq!(shown["last_reload"], Value::Null);
    let outcome = run(&service, "status");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.out.contains(&format!("1 of 1 slots ready on {addr}")), "{outcome:?}");

    let mut client = TcpStream::connect(addr).expect("connect");
    client.write_all(b"GET / HTTP/1.1\r\n").expect("begin a request, which is waited for");
    wait_until("it is accepted", DEADLINE, || status(&service)["workers"][0]["connections"] == 1);
    let reload = begin(&service, "reload");
    let shown = wait_for_state(&service, "draining");
    assert_eq!((&shown["state"], &shown["generation"]), (&Value::from("reloading"), &Value::from(2)));
    assert_eq!(run(&service, "status").code, Some(0), "who drains is not missed");
    drop(client);
    let shown = wait_for_state(&service, "stopping");
    let workers = shown["workers"].as_array().expect("workers");
    let old = workers.iter().find(|worker| worker["state"] == "stopping").expect("the old one");
    assert_eq!((&old["generation"], &old["serves"]), (&Value::from(1), &Value::from(false)));
    send(old["pid"].as_u64().expect("a pid") as u32, Signal::SIGKILL);
    Outcome::of(reload).assert_done("1 worker of generation 2 serve");
    service.signal(Signal::SIGTERM);
    wait_until("all is being stopped", DEADLINE, || {
        let shown = status(&service);
        assert_fits_the_schema(&shown);
        shown["state"] == "stopping"
    });
    assert_eq!(run(&service, "status").code, Some(4));
    send(service.workers()[0], Signal::SIGKILL);
    assert_eq!(service.wait_end().code(), Some(0), "{}", service.log.text());
}

#[test]
fn status_tells_a_worker_that_was_killed_and_has_not_ended() {
    let mut service = Service::run_ready("-n 1 --stop-timeout 100ms", &naive(free_address()));
    let worker = Pid::from_raw(service.workers()[0] as i32);
    // The parent of a process that is traced hears of its end when the tracer has.
    ptrace::seize(worker, ptrace::Options::empty()).expect("trace the worker");
    let reload = begin(&service, "reload");
    wait_for_state(&service, "killed");
    while !matches!(waitpid(worker, None), Ok(WaitStatus::Signaled(..))) {}
    Outcome::of(reload).assert_done("1 worker of generation 2 serve");
    service.stop();
}

#[test]
fn status_exits_with_3_while_some_slots_are_down_and_tells_restarts() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2 --max-failures 0", &folder.server(addr, &[]));
    folder.raise("broken-1-1");
    let victim = workers_where(&service, |worker| worker["slot"] == 1)[0]["pid"].as_u64();
    send(victim.expect("a pid") as u32, Signal::SIGKILL);
    let shown = wait_for_state(&service, "down");
    assert_eq!((&shown["ready"], &shown["slots"]), (&Value::from(1), &Value::from(2)));
    assert_eq!(run(&service, "status").code, Some(3));
    folder.lower("broken-1-1");
    wait_until("all are ready", DEADLINE, || run(&service, "status").code == Some(0));
    let restarts = |slot: usize| status(&service)["workers"][slot]["restarts"].as_u64().expect("a number");
    assert_eq!(restarts(0), 0);
    assert!(restarts(1) >= 2, "{}", status(&service));
    run(&service, "reload").assert_done("2 workers of generation 2 serve");
    assert_eq!((restarts(0), restarts(1)), (0, 0));
    service.stop();
}

#[test]
fn status_tells_what_waits_what_is_open_and_what_it_takes() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("deaf");
    let deaf = ["--deaf-while", &folder.path("deaf")];
    let mut service = Service::run_ready("-n 1", &folder.server(addr, &deaf));
    let clients: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(addr).expect("connect")).collect();
    let worker = || status(&service)["workers"][0].clone();
    let shown = worker();
    assert_eq!((&shown["accept_queue"], &shown["connections"]), (&Value::from(3), &Value::from(0)));
    assert!(shown["rss_kib"].as_u64().is_some_and(|kib| kib > 100), "{shown}");
    assert_eq!(shown["status"], Value::Null);
    folder.lower("deaf");
    wait_until("three are accepted", DEADLINE, || {
        let shown = worker();
        shown["accept_queue"] == 0 && shown["connections"] == 3
    });
    drop(clients);
    wait_until("none is open", DEADLINE, || worker()["connections"] == 0);
    service.stop();
}

#[test]
fn status_tells_the_processor_time_of_a_worker_and_all_that_it_has_started() {
    let busy = "(while :; do :; done) & echo >&$READY_FD; wait";
    let mut service = Service::run_ready("-n 1 --ready notify", &["sh", "-c", busy]);
    let number = |worker: &Value, field: &str| worker[field].as_f64().expect("a number");
    let mut shown = Value::Null;
    wait_until("it has used some", DEADLINE, || {
        shown = status(&service)["workers"][0].clone();
        number(&shown, "cpu_seconds") >= 0.2
    });
    // It is busy on one processor; a tick is 10 ms.
    assert!(number(&shown, "cpu_seconds") <= number(&shown, "age_seconds") + 0.1, "{shown}");
    service.stop();
}

#[test]
fn status_tells_what_a_worker_says_of_itself() {
    let port = free_port().to_string();
    let command = ["python3", &app("python/notify.py"), &port, "STATUS=half asleep\\nREADY=1"];
    let mut service = Service::run_ready("-n 1 --ready notify", &command);
    wait_until("its words", DEADLINE, || status(&service)["workers"][0]["status"] == "half asleep");
    assert!(run(&service, "status").out.contains("half asleep"));
    service.stop();
}

#[test]
fn status_tells_how_the_last_reload_went() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 1", &folder.server(addr, &[]));
    run(&service, "reload").assert_done("generation 2");
    let last = status(&service)["last_reload"].clone();
    assert_eq!((&last["generation"], &last["ok"]), (&Value::from(2), &Value::from(true)), "{last}");
    assert_eq!(last["reason"], Value::Null);
    let shown = run(&service, "status").out;
    assert!(shown.contains("last reload: generation 2") && shown.ends_with("done"), "{shown}");
    folder.raise("broken-3-0");
    run(&service, "reload").assert_failed(&["status 3"]);
    let shown = status(&service);
    assert_fits_the_schema(&shown);
    let last = &shown["last_reload"];
    assert_eq!((&last["generation"], &last["ok"]), (&Value::from(3), &Value::from(false)), "{last}");
    assert!(last["reason"].as_str().is_some_and(|why| why.contains("exited with status 3")), "{last}");
    service.stop();
}

#[test]
fn status_with_watch_goes_on_printing() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let watch = begin(&service, "status --watch --json");
    wait_until("three lines", DEADLINE, || watch.out.count() >= 3);
    for line in watch.out.all() {
        assert_fits_the_schema(&serde_json::from_str(&line.text).expect("a line of JSON"));
    }
    watch.signal(Signal::SIGINT);
    assert_eq!(Outcome::of(watch).signal, Some(Signal::SIGINT as i32));
    service.stop();
}

// Finding it.

/// A command in words, as they are.
fn run_words(words: &str) -> Outcome {
    let mut command = reuse_run();
    command.args(words.split_whitespace());
    Outcome::of(Service::spawn(command))
}

/// Copies of the program and the server where any user finds them, and commands as such a user.
struct User {
    folder: Folder,
    id: u32,
}

impl User {
    fn new(id: u32) -> User {
        let folder = Folder::new();
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o755)).expect("open the folder");
        for (from, to) in
            [(reuse_run().get_program().into(), "reuse-run"), (OsString::from(server()), "server")]
        {
            let to = folder.path(to);
            fs::copy(from, &to).expect("copy a program");
            fs::set_permissions(to, fs::Permissions::from_mode(0o755)).expect("let it be executed");
        }
        User { folder, id }
    }

    fn start(&self, words: &[String]) -> Service {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={}", self.id), &format!("--regid={}", self.id)]);
        command.args(["--clear-groups", "--", &self.folder.path("reuse-run")]).args(words);
        command.current_dir("/").env_remove("RUST_LOG");
        Service::spawn(command)
    }

    fn run(&self, words: &str) -> Outcome {
        Outcome::of(self.start(&words.split_whitespace().map(str::to_owned).collect::<Vec<_>>()))
    }
}

#[test]
fn where_none_runs_a_command_says_so_and_exits_with_1() {
    own_network();
    for words in ["status", "reload", "scale 2", "stop"] {
        run_words(words).assert_failed(&["no reuse-run is running here"]);
    }
    let outcome = run_words(&format!("status {}", std::process::id()));
    outcome.assert_failed(&["is no reuse-run that can be spoken to"]);
}

#[test]
fn the_only_one_is_found_and_of_several_all_are_named() {
    own_network();
    let mut first = Service::run_ready("-n 1", &naive(free_address()));
    run_words("reload").assert_done("1 worker of generation 2 serve");
    let mut second = Service::run_ready("-n 1", &naive(free_address()));
    for words in ["status", "reload", "scale 2", "stop"] {
        let outcome = run_words(words);
        assert_eq!((outcome.code, outcome.out.as_str()), (Some(2), ""), "{outcome:?}");
        for pid in [first.pid(), second.pid()] {
            let named = |line: &str| line.contains(&pid.to_string()) && line.contains("--listen");
            assert!(outcome.err.lines().any(named), "{pid} in {outcome:?}");
        }
    }
    first.stop();
    assert_eq!(run_words("status").code, Some(0));
    second.stop();
}

#[test]
fn who_has_taken_the_name_of_pid_1_is_not_taken_for_it() {
    own_network();
    let namespace = fs::metadata("/proc/self/ns/pid").expect("a PID namespace").ino();
    let name = SocketAddr::from_abstract_name(format!("reuse-run/{namespace}/1")).expect("a name");
    let _impostor = std::os::unix::net::UnixListener::bind_addr(&name).expect("take the name");
    run_words("status 1").assert_failed(&["process 1 is not a reuse-run"]);
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    run_words("reload").assert_done("1 worker of generation 2 serve");
    service.stop();
}

#[test]
fn pid_1_of_a_pid_namespace_is_found_first() {
    own_network();
    let addr = free_address();
    let mut unshare = Command::new("unshare");
    unshare.args(["--pid", "--fork", "--mount-proc", "--kill-child", "--"]);
    unshare.arg(reuse_run().get_program()).args(common::arguments("-n 1", &naive(addr)));
    let container = Service::spawn(unshare);
    container.wait_for_line("generation 1 is ready");
    let inside = |words: &[String]| {
        let mut nsenter = Command::new("nsenter");
        nsenter.args([&format!("--target={}", container.workers()[0]), "--pid", "--mount", "--"]);
        nsenter.arg(reuse_run().get_program()).args(words).env_remove("RUST_LOG");
        Service::spawn(nsenter)
    };
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let other = inside(&common::arguments("-n 1", &naive(free_address())));
    other.wait_for_line("generation 1 is ready");
    Outcome::of(inside(&words("reload"))).assert_done("1 worker of generation 2 serve");
    assert_eq!(get(addr).generation, Some(2));
    let shown: Value = serde_json::from_str(&Outcome::of(inside(&words("status --json"))).out).expect("JSON");
    assert_eq!(shown["pid"], 1);
    run_words("status").assert_failed(&["no reuse-run is running here"]);
}

#[test]
fn a_user_finds_their_own_even_when_it_has_secrets_and_root_does_too() {
    own_network();
    let user = User::new(54321);
    let secret = user.folder.path("secret");
    fs::write(&secret, "open sesame").expect("write a secret");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o400)).expect("keep it");
    std::os::unix::fs::chown(&secret, Some(54321), Some(54321)).expect("give it away");
    let addr = free_address().to_string();
    let command = [&user.folder.path("server"), "--listen", &addr];
    let service = user.start(&common::arguments(&format!("-n 1 --secret WORD={secret}"), &command));
    service.wait_for_line("generation 1 is ready");
    user.run("reload").assert_done("1 worker of generation 2 serve");
    assert_eq!(user.run(&format!("status {}", service.pid())).code, Some(0));
    run_words("reload").assert_done("1 worker of generation 3 serve");
    run(&service, "stop").assert_done("stopped");
}

#[test]
fn another_user_is_refused_by_roots() {
    own_network();
    let user = User::new(54321);
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    for words in ["status", "reload", "stop", "scale 2"] {
        for words in [words.to_owned(), format!("{words} {}", service.pid())] {
            let outcome = user.run(&words);
            assert_eq!((outcome.code, outcome.out.as_str()), (Some(1), ""), "{outcome:?}");
            assert_eq!(outcome.err.lines().count(), 1, "{outcome:?}");
        }
    }
    assert_eq!(status(&service)["generation"], 1);
    assert_eq!(service.workers().len(), 1);
    service.stop();
}

// The control socket.

fn control(service: &Service) -> UnixStream {
    let namespace = fs::metadata("/proc/self/ns/pid").expect("the PID namespace").ino();
    let name = format!("reuse-run/{namespace}/{}", service.pid());
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let stream = UnixStream::connect_addr(&address).expect("connect to the control socket");
    stream.set_read_timeout(Some(DEADLINE)).expect("set a time-out");
    stream
}

/// What comes until the end, whatever end that is.
fn rest(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("it is not dropped"),
        _ => String::from_utf8(bytes).expect("UTF-8"),
    }
}

fn say(service: &Service, bytes: &[u8]) -> UnixStream {
    let mut stream = control(service);
    // What is too long may find nobody who reads on.
    let _ = stream.write_all(bytes);
    stream
}

#[test]
fn nonsense_on_the_control_socket_under_load_is_answered_or_dropped_and_harms_nobody() {
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2", &folder.server(addr, &[]));
    let load = Load::start(LoadOptions::new(addr, 4));
    wait_for_answers(&load, 100);
    for _ in 0..10 {
        for garbage in [&b"garbage\n"[..], b"\n", b"{}\n", b"\xff\0\n", b"[[[[[[[[\n"] {
            assert!(rest(say(&service, garbage)).contains("not a request"));
        }
        let answer = rest(say(&service, b"{\"version\":1,\"request\":\"frobnicate\"}\n"));
        assert!(answer.contains("not a request"), "{answer}");
        let answer = rest(say(&service, b"{\"version\":2,\"request\":\"status\"}\n"));
        assert!(answer.contains("speaks version 1") && answer.contains("not 2"), "{answer}");
        assert_eq!(rest(say(&service, &[b'x'; 100_000])), "");
        let half = say(&service, b"{\"version\":1,");
        half.shutdown(Shutdown::Write).expect("say no more");
        assert_eq!(rest(half), "");
        let answer = rest(say(&service, b"{\"version\":1,\"request\":\"status\"}\nand more\n"));
        assert!(answer.contains("\"slots\":2"), "{answer}");
    }

    // One waits for a reload and reads nothing of what it is told; others come and go in silence.
    folder.raise("hold-2-0");
    let deaf = say(&service, b"{\"version\":1,\"request\":{\"reload\":{\"how\":null,\"wait\":true}}}\n");
    service.wait_for_line("starting generation 2");
    drop(say(&service, b"{\"version\":1,\"request\":{\"reload\":{\"how\":null,\"wait\":true}}}\n"));
    (0..50).for_each(|_| drop(control(&service)));
    assert_eq!(status(&service)["state"], "reloading");
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    wait_until("no reload is left", DEADLINE, || status(&service)["state"] == "serving");
    assert!(rest(deaf).contains("done"));
    load.stop().assert_nothing_failed();
    let before = ticks(service.pid());
    holds_for("it is idle", Duration::from_secs(1), || ticks(service.pid()) - before <= 3);
    service.stop();
}

#[test]
fn a_silent_control_client_is_dropped_after_10_s() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let (begun, before) = (Instant::now(), service.fds());
    let clients = [control(&service), say(&service, b"{\"version\":1,")];
    for client in clients {
        assert_eq!(rest(client), "");
    }
    let took = begun.elapsed();
    assert!((Duration::from_secs(9)..Duration::from_secs(30)).contains(&took), "{took:?}");
    wait_until("their sockets are closed", DEADLINE, || service.fds() <= before);
    service.stop();
}

#[test]
fn a_control_client_that_reads_nothing_is_dropped_before_it_takes_much_memory() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 1", &folder.server(addr, &[]));
    folder.raise("hold-2-0");
    let deaf = say(&service, b"{\"version\":1,\"request\":{\"reload\":{\"how\":null,\"wait\":true}}}\n");
    service.wait_for_line("starting generation 2");
    let before = ticks(service.pid());
    holds_for("it is idle while one waits", Duration::from_secs(1), || ticks(service.pid()) - before <= 3);
    let (fds, memory) = (service.fds(), service.memory_kib());
    // Each is a line of the log, other than the last, which whoever waits is told.
    let scale = |workers: u32| {
        format!(
            "{{\"version\":1,\"request\":{{\"scale\":{{\"to\":{{\"exactly\":{workers}}},\"wait\":false}}}}}}\n"
        )
    };
    wait_until("it is dropped", DEADLINE, || {
        for workers in [3, 2].repeat(50) {
            let answer = rest(say(&service, scale(workers).as_bytes()));
            assert!(answer.contains("waits its turn"), "{answer}");
        }
        service.fds() < fds
    });
    let more = service.memory_kib().saturating_sub(memory);
    assert!(more < 2048, "{more} KiB more");
    let told = rest(deaf);
    assert!(told.contains("scale to 2") && !told.contains("done"), "not to its end: {} bytes", told.len());
    assert_eq!(get(addr).generation, Some(1));
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    service.wait_for_line("scaling done: 2 workers");
    service.stop();
}

#[test]
fn a_hundred_control_clients_at_once_are_all_answered() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let fds = service.fds();
    let mut clients: Vec<UnixStream> = (0..100).map(|_| control(&service)).collect();
    for client in &mut clients {
        client.write_all(b"{\"version\":1,\"request\":\"status\"}\n").expect("ask");
    }
    for client in clients {
        let answer = rest(client);
        assert!(answer.contains("\"slots\":1"), "{answer}");
    }
    wait_until("their sockets are closed", DEADLINE, || service.fds() <= fds);
    let before = ticks(service.pid());
    holds_for("it is idle", Duration::from_secs(1), || ticks(service.pid()) - before <= 3);
    service.stop();
}

// stop and --pidfile

#[test]
fn when_stop_returns_the_port_is_free() {
    for _ in 0..10 {
        let addr = free_address();
        let mut service = Service::run_ready("-n 2", &naive(addr));
        get(addr);
        let outcome = run(&service, "stop");
        let bound = TcpListener::bind(addr);
        outcome.assert_done("every worker ended by itself");
        bound.unwrap_or_else(|error| panic!("bind {addr}: {error}"));
        assert_eq!(service.wait_end().code(), Some(0));
        assert_eq!(service.descendants(), [0u32; 0]);
    }
}

#[test]
fn stop_exits_with_1_when_a_worker_had_to_be_killed() {
    let addr = free_address();
    let mut command = naive(addr);
    command.push("--ignore-int".to_owned());
    let mut service = Service::run_ready("-n 1 --stop-timeout 200ms", &command);
    run(&service, "stop").assert_failed(&["stopped with status 1"]);
    TcpListener::bind(addr).expect("the port is free");
    assert_eq!(service.wait_end().code(), Some(1));
}

#[test]
fn stop_with_no_wait_only_begins_it_and_then_nothing_else_is_begun() {
    let mut command = naive(free_address());
    command.push("--ignore-int".to_owned());
    let mut service = Service::run_ready("-n 1", &command);
    run(&service, "stop --no-wait").assert_done("being stopped");
    for words in ["reload", "scale 2", "reload --abort"] {
        run(&service, words).assert_failed(&["everything is being stopped"]);
    }
    run(&service, "stop --timeout 100ms").assert_failed(&["100ms"]);
    let stop = begin(&service, "stop");
    send(service.workers()[0], Signal::SIGKILL);
    assert_eq!(service.wait_end().code(), Some(0));
    drop(stop);
}

#[test]
fn the_pid_file_is_there_from_the_first_readiness_to_the_end() {
    let folder = Folder::new();
    let file = folder.path("pid");
    folder.raise("hold-1-0");
    let options = format!("-n 1 --pidfile {file}");
    let mut service = Service::run(&options, &folder.server(free_address(), &[]));
    wait_until("the worker runs", DEADLINE, || !service.workers().is_empty());
    assert!(!fs::exists(&file).expect("look for it"));
    folder.lower("hold-1-0");
    wait_until("it is there", DEADLINE, || fs::exists(&file).expect("look for it"));
    let expected = format!("{}\n", service.pid());
    assert_eq!(fs::read_to_string(&file).expect("read it"), expected);
    service.wait_for_line("generation 1 is ready");
    service.reload();
    assert_eq!(fs::read_to_string(&file).expect("read it"), expected);
    let files = fs::read_dir(&folder.0).expect("list the folder").count();
    assert_eq!(files, 1, "nothing else was left beside it");
    service.stop();
    assert!(!fs::exists(&file).expect("look for it"));
}

#[test]
fn a_pid_file_that_has_become_anothers_is_left_alone() {
    let folder = Folder::new();
    let file = folder.path("pid");
    let mut service = Service::run(&format!("-n 1 --pidfile {file}"), &naive(free_address()));
    wait_until("it is there", DEADLINE, || fs::exists(&file).expect("look for it"));
    fs::write(&file, "4194305\n").expect("take it over");
    service.stop();
    assert_eq!(fs::read_to_string(&file).expect("read it"), "4194305\n");
}

#[test]
fn a_pid_file_that_cannot_be_written_ends_the_start_before_a_worker_runs() {
    let user = User::new(54321);
    let folder = user.folder.path("");
    for (file, part) in [
        (format!("{folder}none/pid"), "No such file"),
        (format!("{folder}pid"), "Permission denied"),
        (folder.trim_end_matches('/').to_owned(), "Is a directory"),
    ] {
        let outcome = user.run(&format!("--pidfile {file} -- echo ran"));
        outcome.assert_failed(&["--pidfile", &file, part]);
        assert_eq!((outcome.err.lines().count(), outcome.out.as_str()), (1, ""), "{outcome:?}");
    }
}

// At a terminal.

/// A terminal of its own, in which a command runs.
struct Terminal {
    folder: Folder,
}

impl Terminal {
    fn run(command: &str) -> Terminal {
        let terminal = Terminal { folder: Folder::new() };
        // It stays when the command has ended.
        let shell = format!("{command}; echo exit status $?; exec cat");
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "150", "-y", "40", &shell]);
        terminal
    }

    fn command(&self) -> Command {
        let mut command = Command::new("tmux");
        command.env_remove("TMUX").args(["-S", &self.folder.path("tmux")]);
        command
    }

    fn tmux(&self, words: &[&str]) -> String {
        let mut command = self.command();
        command.args(words);
        let output = command.output().expect("run tmux");
        assert!(output.status.success(), "tmux {words:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn lines(&self) -> Vec<String> {
        let text = self.tmux(&["capture-pane", "-p"]);
        text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.command().arg("kill-server").output();
    }
}

#[test]
fn at_a_terminal_reload_draws_a_line_for_each_worker_and_leaves_the_steps_and_the_result() {
    let folder = Folder::new();
    let mut service = Service::run_ready("-n 2", &folder.server(free_address(), &[]));
    folder.raise("hold-2-1");
    let program = reuse_run().get_program().to_string_lossy().into_owned();
    let terminal = Terminal::run(&format!("'{program}' reload {}", service.pid()));
    let of_worker = |line: &&String| line.starts_with("  worker ");
    let mut seen = Vec::new();
    wait_until("a line for each worker", DEADLINE, || {
        seen = terminal.lines();
        let drawn = |slot: u32, generation: u32, state: &str| {
            let is_it = |line: &&String| {
                line.starts_with(&format!("  worker {slot} (pid "))
                    && line.contains(&format!("generation {generation}): {state}"))
            };
            seen.iter().filter(of_worker).filter(is_it).count() == 1
        };
        drawn(0, 1, "ready") && drawn(1, 1, "ready") && drawn(0, 2, "ready") && drawn(1, 2, "starting for 1s")
    });
    assert_eq!(seen.iter().filter(of_worker).count(), 4, "drawn anew, not again: {seen:#?}");
    folder.lower("hold-2-1");
    wait_until("the end", DEADLINE, || {
        seen = terminal.lines();
        seen.last().is_some_and(|line| line.starts_with("exit status"))
    });
    let expected = [
        "reload: starting generation 2",
        "generation 2 is ready after",
        "generation 2 serves; generation 1 drains",
        "reload done after",
        "2 workers of generation 2 serve",
        "exit status 0",
    ];
    assert_eq!(seen.len(), expected.len(), "{seen:#?}");
    for (line, part) in seen.iter().zip(expected) {
        assert!(line.starts_with(part), "{seen:#?}");
    }
    service.stop();
}
