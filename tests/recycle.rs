//! Workers that are replaced one at a time: on request, and because they hang, grow or are old.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use common::load::{Load, LoadOptions};
use common::{
    DEADLINE, Deployment, Folder, Outcome, Service, Waiting, answered_more, app, at_once, free_address,
    freeze, get, get_path, naive, packaged, python, run, run_words, send, serving, wait_for_answers,
    wait_until, workers_where,
};
use nix::sys::signal::Signal;
use socket2::SockAddr;

fn load(addr: impl Into<SockAddr>) -> Load {
    let load = Load::start(LoadOptions::new(addr, 8).rate(200.0));
    answered_more(&load);
    load
}

/// The PIDs of the workers that serve, by slot.
fn pids(service: &Service) -> Vec<u32> {
    let workers = workers_where(service, |worker| worker["serves"] == true);
    workers.iter().map(|worker| worker["pid"].as_u64().expect("a PID") as u32).collect()
}

fn recycle(service: &Service, what: &str) -> Outcome {
    run_words(&format!("recycle --pid {} {what}", service.pid()))
}

/// Asks for something to which no answer comes.
fn ask(addr: SocketAddr, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(addr).expect("connect");
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("ask");
    stream
}

/// Recycles one slot after the other under load and then all, without a failed request.
fn recycle_each(options: &str, command: &[String], addr: impl Into<SockAddr>) {
    let mut service = Service::run_ready(&format!("-n 3 {options}"), command);
    let load = load(addr);
    for slot in 0..3 {
        let before = pids(&service);
        recycle(&service, &slot.to_string()).assert_done("3 workers of generation 1 serve");
        let after = pids(&service);
        for other in 0..3 {
            assert_eq!(
                before[other] == after[other],
                other != slot,
                "slot {slot}: {before:?}, then {after:?}"
            );
        }
        answered_more(&load);
    }
    let before: BTreeSet<u32> = pids(&service).into_iter().collect();
    recycle(&service, "--all").assert_done("3 workers");
    assert!(before.is_disjoint(&pids(&service).into_iter().collect()));
    answered_more(&load);
    service.reload();
    assert_eq!(serving(&service), [(0, 2), (1, 2), (2, 2)]);
    answered_more(&load);
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn each_slot_is_recycled_under_load_without_a_failed_request() {
    let addr = free_address();
    recycle_each("", &naive(addr), addr);
}

#[test]
fn each_slot_is_recycled_with_balance_random() {
    let addr = free_address();
    recycle_each("--balance random", &naive(addr), addr);
}

#[test]
fn each_slot_is_recycled_with_probes() {
    let addr = free_address();
    recycle_each("--ready /", &naive(addr), addr);
}

#[test]
fn each_slot_is_recycled_with_given_sockets() {
    let addr = free_address();
    recycle_each(&format!("-l {addr} --ready /"), &python("sick.py", &["fd:3"]), addr);
}

#[test]
fn each_slot_is_recycled_with_given_sockets_without_interception() {
    let addr = free_address();
    recycle_each(&format!("-l {addr} --no-intercept --ready /"), &python("sick.py", &["fd:3"]), addr);
}

/// At the stop signal Node's `server.close()` closes a connection that it has accepted a moment before, so none may come then.
#[test]
fn workers_that_share_a_unix_socket_are_replaced_together() {
    let folder = Folder::new();
    let path = folder.path("s");
    let node = ["node", &app("node/unix.js"), &path].map(str::to_owned);
    let mut service = Service::run_ready("-n 3", &node);
    let load = load(SockAddr::unix(&path).expect("a path that fits"));
    for generation in 2..=4 {
        let before: BTreeSet<u32> = pids(&service).into_iter().collect();
        recycle(&service, "1").assert_done(&format!("3 workers of generation {generation} serve"));
        assert!(before.is_disjoint(&pids(&service).into_iter().collect()));
        answered_more(&load);
    }
    for words in ["scale 1", "scale 4", "scale 3", "scale 2"] {
        run(&service, words).assert_done("of generation");
        answered_more(&load);
    }
    recycle(&service, "--all").assert_done("2 workers of generation 8 serve");
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn a_command_that_names_no_slot_or_one_that_is_not_there_is_refused() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    recycle(&service, "2").assert_failed(&["there is no slot 2: the last one is 1"]);
    for (what, why) in
        [("", "name the slots, as in recycle 0 2"), ("--all 1", "name the slots"), ("one", "--help")]
    {
        let outcome = recycle(&service, what);
        assert!(outcome.code == Some(2) && outcome.err.contains(why), "{outcome:?}");
    }
    recycle(&service, "--no-wait 1").assert_done("recycling begun");
    service.wait_for_line("recycling done");
    service.stop();
}

#[test]
fn a_successor_that_fails_changes_nothing_and_the_command_says_why() {
    let (addr, folder) = (free_address(), Folder::new());
    let flag = folder.path("fails");
    let mut service = Service::run_ready("-n 2", &python("sick.py", &[&addr.to_string(), &flag]));
    let load = load(addr);
    let before = pids(&service);
    folder.raise("fails");
    recycle(&service, "1")
        .assert_failed(&["exited with status 1 before it was ready", "2 workers of generation 1 serve on"]);
    folder.lower("fails");
    assert_eq!(pids(&service), before);
    recycle(&service, "1").assert_done("2 workers");
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn workers_that_are_old_are_replaced_one_after_the_other_under_load() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --max-age 3s", &naive(addr));
    let first: BTreeSet<u32> = pids(&service).into_iter().collect();
    let load = load(addr);
    wait_until("both are replaced", DEADLINE, || first.is_disjoint(&pids(&service).into_iter().collect()));
    load.stop().assert_nothing_failed();
    service.wait_for_line("has served for long enough (see --max-age): it will be replaced");
    service.stop();
}

/// Three fail here. Ten, for which the real waits would take minutes, do so in a test of the fleet with a made-up clock.
#[test]
fn three_successors_fail_after_longer_waits_each_time_while_the_old_worker_serves_and_the_fourth_replaces_it()
{
    let (addr, folder) = (free_address(), Folder::new());
    let command = python("sick.py", &[&addr.to_string(), &folder.path("fails")]);
    let mut service = Service::run_ready("-n 1 --max-age 2s", &command);
    folder.raise("fails");
    let (worker, load) = (pids(&service)[0], load(addr));
    for wait in [1, 2, 4] {
        service.wait_for_line(&format!(
            "{worker}, generation 1) serves on, and the next try comes after {wait}s"
        ));
    }
    folder.lower("fails");
    let lines = service.log.all();
    let third =
        lines.iter().position(|line| line.text.contains("comes after 4s")).expect("the third failure");
    let waited = service.wait_for_line_after(third, "starting a successor").at - lines[third].at;
    assert!(waited > Duration::from_secs(2), "the fourth try came after {waited:?}");
    wait_until("it is replaced", DEADLINE, || !pids(&service).contains(&worker));
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn a_worker_that_leaks_is_replaced_under_load() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --max-memory 100M", &python("sick.py", &[&addr.to_string()]));
    let load = load(addr);
    let leaks = get_path(addr, "/leak").origin.pid.expect("a PID");
    wait_until("a second leak of the same worker", DEADLINE, || {
        get_path(addr, "/leak").origin.pid == Some(leaks)
    });
    wait_until("the worker that leaks is replaced", DEADLINE, || !pids(&service).contains(&leaks));
    load.stop().assert_nothing_failed();
    service.wait_for_line("MiB of memory (see --max-memory): it will be replaced");
    service.stop();
}

/// Starts so many workers, has some of them hang, and asserts that these are replaced, that clients that wait for them are
/// answered, and that no other client notices.
fn replaces_those_that_hang(
    options: &str,
    command: &[String],
    addr: SocketAddr,
    (hang, workers): (usize, usize),
    make_hang: impl FnOnce(&Service, &[u32]) -> Option<TcpStream>,
) {
    let options = format!("-n {workers} --hung-timeout 2s --drain 1s {options}");
    let mut service = Service::run_ready(&options, command);
    let first = pids(&service);
    let lost = make_hang(&service, &first);
    let waiting: Vec<Waiting> = (0..32).map(|_| Waiting::new(addr)).collect();
    let load = (hang < workers).then(|| Load::start(LoadOptions::new(addr, 4).rate(50.0).timeout(DEADLINE)));
    wait_until("those that hang are replaced", DEADLINE, || {
        let now = pids(&service);
        first.iter().filter(|pid| !now.contains(pid)).count() == hang
    });
    for client in waiting {
        client.outcome().expect("an answer");
    }
    load.iter().for_each(answered_more);
    load.into_iter().for_each(|load| load.stop().assert_nothing_failed());
    wait_until("the old ones have ended", DEADLINE, || service.log.count_of("recycling done") == hang);
    let replaced = service.log.count_of("(see --hung-timeout): it will be replaced");
    assert_eq!(replaced, hang);
    let (log, now) = (service.log.text(), pids(&service));
    for pid in first.iter().filter(|pid| !now.contains(pid)) {
        assert!(!log.contains(&format!("(pid {pid}, generation 1) takes connections")), "{log}");
    }
    drop(lost);
    service.stop();
}

/// Has the first workers hang by a signal: SIGSTOP, or one of those of sick.py.
fn by(signal: Signal, count: usize) -> impl FnOnce(&Service, &[u32]) -> Option<TcpStream> {
    move |service, workers| {
        let mut lacking = workers[..count].to_vec();
        if signal == Signal::SIGSTOP {
            lacking.drain(..).for_each(freeze);
        }
        wait_until("they take no connection any more", DEADLINE, || {
            lacking.retain(|worker| service.out.count_of(&format!("ill {worker}.")) == 0);
            // Python misses one that comes just before accept(2).
            lacking.iter().for_each(|worker| send(*worker, signal));
            lacking.is_empty()
        });
        None
    }
}

/// One of four workers, and then all of them.
fn one_and_all_are_replaced(signal: Signal) {
    at_once([1, 4], |hang| {
        let addr = free_address();
        replaces_those_that_hang(
            "",
            &python("sick.py", &[&addr.to_string()]),
            addr,
            (hang, 4),
            by(signal, hang),
        );
    });
}

#[test]
fn one_and_all_of_four_stopped_workers_are_replaced_and_what_waits_for_them_is_answered() {
    one_and_all_are_replaced(Signal::SIGSTOP);
}

#[test]
fn one_and_all_of_four_workers_in_an_endless_loop_are_replaced() {
    one_and_all_are_replaced(Signal::SIGUSR1);
}

#[test]
fn one_and_all_of_four_workers_in_a_deadlock_are_replaced() {
    one_and_all_are_replaced(Signal::SIGUSR2);
}

#[test]
fn workers_that_hang_are_replaced_whoever_has_made_their_socket() {
    let rows = [
        ("--balance random", false, Signal::SIGUSR2, 1),
        ("--ready /", false, Signal::SIGSTOP, 4),
        ("-l ADDRESS --ready /", true, Signal::SIGUSR2, 4),
        ("-l ADDRESS --ready / --no-intercept", true, Signal::SIGSTOP, 4),
    ];
    at_once(rows, |(options, given, signal, hang)| {
        println!("{options}");
        let addr = free_address();
        let options = options.replace("ADDRESS", &addr.to_string());
        let socket = if given { "fd:3".to_owned() } else { addr.to_string() };
        replaces_those_that_hang(&options, &python("sick.py", &[&socket]), addr, (hang, 4), by(signal, hang));
    });
}

#[test]
fn of_workers_that_share_a_unix_socket_the_others_answer_for_one_that_hangs_until_it_is_recycled() {
    let folder = Folder::new();
    let path = folder.path("s");
    let node = ["node", &app("node/unix.js"), &path].map(str::to_owned);
    let mut service = Service::run_ready("-n 4 --hung-timeout 1s --drain 1s --stop-timeout 5s", &node);
    let workers = pids(&service);
    freeze(workers[2]);
    let load = load(SockAddr::unix(&path).expect("a path that fits"));
    wait_for_answers(&load, 800); // 200 a second
    assert_eq!((service.log.count_of("will be replaced"), pids(&service)), (0, workers.clone()));
    recycle(&service, "2").assert_done("4 workers");
    assert!(!pids(&service).contains(&workers[2]));
    answered_more(&load);
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn a_worker_in_an_endless_loop_is_replaced() {
    let addr = free_address();
    let hang = |_: &Service, _: &[u32]| Some(ask(addr, "/loop"));
    replaces_those_that_hang("", &python("sick.py", &[&addr.to_string()]), addr, (1, 3), hang);
}

#[test]
fn the_only_worker_is_replaced_when_it_waits_for_ever() {
    let addr = free_address();
    let hang = |_: &Service, _: &[u32]| Some(ask(addr, "/deadlock"));
    replaces_those_that_hang("", &python("sick.py", &[&addr.to_string()]), addr, (1, 1), hang);
}

#[test]
fn a_worker_that_works_again_before_its_successor_is_ready_is_left_alone_if_that_fails() {
    let (addr, folder) = (free_address(), Folder::new());
    let flag = folder.path("fails");
    let command = python("sick.py", &[&addr.to_string(), &flag]);
    let mut service = Service::run_ready("-n 1 --hung-timeout 1s", &command);
    folder.raise("fails");
    let worker = pids(&service)[0];
    freeze(worker);
    let waiting: Vec<Waiting> = (0..8).map(|_| Waiting::new(addr)).collect();
    service.wait_for_line("serves on, and the next try comes after 1s");
    service.wait_for_line("serves on, and the next try comes after 2s");
    send(worker, Signal::SIGCONT);
    for client in waiting {
        assert_eq!(client.outcome().expect("an answer").pid, Some(worker));
    }
    assert_eq!(get(addr).pid, Some(worker));
    folder.lower("fails");
    service.stop();
}

#[test]
fn a_worker_that_is_slow_and_works_is_not_replaced() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --hung-timeout 2s", &python("sick.py", &[&addr.to_string()]));
    let first = pids(&service);
    // More than both can do: connections wait all the time, and the queues don't get shorter.
    let options = LoadOptions::new(addr, 16).path("/work/0.3").timeout(DEADLINE);
    let load = Load::start(options);
    wait_until("many answers", DEADLINE, || load.snapshot().answered > 40);
    assert_eq!(pids(&service), first);
    load.stop().assert_nothing_failed();
    assert_eq!(service.log.count_of("will be replaced"), 0);
    service.stop();
}

#[test]
fn status_says_which_workers_hang_and_its_exit_status_too() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let workers = pids(&service);
    assert_eq!(run(&service, "status").code, Some(0));
    workers.iter().copied().for_each(freeze);
    let clients: Vec<Waiting> = (0..32).map(|_| Waiting::new(addr)).collect();
    for (hung, expected) in [(2, 4), (1, 3), (0, 0)] {
        wait_until(&format!("{hung} hang"), DEADLINE, || run(&service, "status").code == Some(expected));
        assert_eq!(workers_where(&service, |worker| worker["load"] == "hung").len(), hung);
        assert_eq!(run(&service, "status").out.contains("  ready, hung  "), hung > 0);
        workers.iter().take(hung).next_back().into_iter().for_each(|worker| send(*worker, Signal::SIGCONT));
    }
    for client in clients {
        client.outcome().expect("an answer");
    }
    assert_eq!(pids(&service), workers, "without --hung-timeout nothing is replaced");
    service.stop();
}

/// Reloads while a request is under way, and asserts that the worker in slot 0 does its job until it is told that it is
/// retired, and not once after that.
fn job_ends_at_the_switch(command: impl Fn(&str) -> Vec<String>) {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --retire-signal USR2", &command(&addr.port().to_string()));
    let old = pids(&service)[0];
    service.wait_for_output(&format!("job {old}"));
    let requests: Vec<TcpStream> = (0..16).map(|_| ask(addr, "/")).collect();
    service.reload();
    let new = pids(&service)[0];
    let first = service.out.count();
    service
        .out
        .wait_for(first, DEADLINE, |line| line == format!("job {new}"))
        .expect("the new worker does the job");
    let lines: Vec<String> = service.out.all().into_iter().map(|line| line.text).collect();
    let retired = lines.iter().position(|line| *line == format!("retired {old}")).expect("it was told");
    let job = format!("job {old}");
    assert!(lines[..retired].contains(&job) && !lines[retired..].contains(&job), "{lines:?}");
    drop(requests);
    service.stop();
}

#[test]
fn a_node_worker_ends_its_jobs_when_it_is_retired() {
    job_ends_at_the_switch(|port| ["node", &app("node/cron.js"), port].map(str::to_owned).to_vec());
}

#[test]
fn a_python_worker_ends_its_jobs_when_it_is_retired() {
    job_ends_at_the_switch(|port| python("cron.py", &[port]));
}

/// One gunicorn sync worker, which gets a request of 10 s, and another one meanwhile. Neither may fail. Returns whether the
/// worker was replaced.
fn gunicorn_is_replaced(options: &str) -> bool {
    let addr = free_address();
    let bind = addr.to_string();
    let mut service = packaged(options, "gunicorn", &["--timeout", "0", "--bind", &bind, "slow:application"]);
    let worker = pids(&service)[0];
    for mut client in [ask(addr, "/work"), ask(addr, "/")] {
        let mut answer = String::new();
        client.set_read_timeout(Some(DEADLINE)).expect("set a time-out");
        client.read_to_string(&mut answer).expect("an answer");
        assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
    }
    let is_replaced = service.log.count_of("(see --hung-timeout): it will be replaced") > 0;
    wait_until("its successor serves", DEADLINE, || (pids(&service)[0] != worker) == is_replaced);
    service.stop();
    is_replaced
}

#[test]
fn a_sync_worker_whose_requests_are_longer_than_the_time_out_is_replaced_and_finishes_its_request() {
    assert!(gunicorn_is_replaced("--hung-timeout 3s --drain 30s"));
}

#[test]
fn a_sync_worker_whose_requests_are_shorter_than_the_time_out_is_left_alone() {
    assert!(!gunicorn_is_replaced("--hung-timeout 14s"));
}

/// Both take connections from one socket then, until the old one is stopped in a moment in which it has none.
#[test]
fn a_worker_that_works_again_after_its_successor_serves_loses_no_request() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --hung-timeout 1s", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 4).timeout(DEADLINE));
    answered_more(&load);
    for round in 1..=10 {
        let worker = pids(&service)[0];
        freeze(worker);
        let client = Waiting::new(addr);
        wait_until("its successor serves", DEADLINE, || service.log.count_of(" serves instead of ") == round);
        send(worker, Signal::SIGCONT);
        wait_until("it has ended", DEADLINE, || service.log.count_of("recycling done") == round);
        client.outcome().expect("an answer");
        answered_more(&load);
    }
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn if_the_successor_of_a_worker_that_hangs_fails_after_it_has_its_socket_that_one_serves_on() {
    let addr = free_address();
    let deployment = Deployment::new(&format!("--listen {addr} --ready-after 0"));
    let options = "-n 1 --ready notify --ready-timeout 3s --hung-timeout 1s";
    let mut service = Service::run_ready(options, &deployment.command());
    deployment.replace(&format!("--listen {addr}")); // takes connections, and is never ready
    let worker = pids(&service)[0];
    freeze(worker);
    let waiting: Vec<Waiting> = (0..8).map(|_| Waiting::new(addr)).collect();
    service.wait_for_line("serves on, and the next try comes after 1s");
    for client in waiting {
        client.outcome().expect("an answer of the successor");
    }
    send(worker, Signal::SIGCONT);
    wait_until("only the worker is left", DEADLINE, || service.workers() == [worker]);
    let load = load(addr);
    answered_more(&load);
    load.stop().assert_nothing_failed();
    assert_eq!(pids(&service), [worker]);
    service.stop();
}

#[test]
fn if_a_worker_that_hangs_is_killed_its_successor_takes_its_place_and_its_connections() {
    let addr = free_address();
    let deployment = Deployment::new(&format!("--listen {addr} --ready-after 0"));
    let options = "-n 1 --ready notify --hung-timeout 1s";
    let mut service = Service::run_ready(options, &deployment.command());
    deployment.replace(&format!("--listen {addr} --ready-after 2000"));
    let worker = pids(&service)[0];
    freeze(worker);
    let mut waiting: Vec<Waiting> = (0..8).map(|_| Waiting::new(addr)).collect();
    service.wait_for_line("recycling: starting a successor");
    send(worker, Signal::SIGKILL);
    service.wait_for_line("was killed by SIGKILL");
    waiting.extend((0..8).map(|_| Waiting::new(addr)));
    for client in waiting {
        assert_ne!(client.outcome().expect("an answer").pid, Some(worker));
    }
    wait_until("the successor serves", DEADLINE, || run(&service, "status").code == Some(0));
    service.stop();
}
