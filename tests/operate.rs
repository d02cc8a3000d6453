//! Operating a running reuse-run: the commands reload, status, scale and stop, what they say and exit with,
//! the signals that do the same, the socket that they speak through, and the PID file.

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::load::{Load, LoadOptions};
use common::{DEADLINE, Folder, Service, free_address, get, naive, reuse_run, send, turn, wait_until};
use nix::sys::signal::Signal;
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
                let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
                most = most.max(children.unwrap_or_default().split_whitespace().count());
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

/// Waits until the load has got so many more answers.
#[track_caller]
fn wait_for_answers(load: &Load, more: u64) {
    let before = load.snapshot().answered;
    wait_until("answers", DEADLINE, || load.snapshot().answered >= before + more);
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
        Outcome::of(reload).assert_done("serve");
    }
    // What came during the first waited for one more, which was for all of them.
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
    send(service.workers()[0], Signal::SIGKILL);
    service.wait_for_line("is ready, a replacement");
    assert_eq!(serving(&service), [(0, 2), (1, 1)], "each slot restarts what it had");
    service.stop();
}
