//! Workers that close listeners and go on. Nobody waits for a listener that no process has any more, and no listener is closed
//! that some process has.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::load::{Kind, Load, LoadOptions};
use common::{
    DEADLINE, Service, Waiting, answered_more, behind, free_address, get, holds_for, inline,
    needs_other_users, python, reuse_run_with, send, wait_until,
};
use nix::sys::signal::Signal;

const CLIENTS: usize = 8;

/// tests/apps/python/recycles.py at a free address, and a load whose clients wait no longer than this.
fn app(options: &str, what: &str, timeout: Duration) -> (SocketAddr, Service, Load) {
    let addr = free_address();
    let command = python("recycles.py", &[&addr.port().to_string(), what]);
    let mut command = reuse_run_with(options, &command);
    command.env("REUSE_RUN_LOG", "debug");
    let service = Service::spawn_ready(command);
    let load = Load::start(LoadOptions::new(addr, CLIENTS).timeout(timeout));
    answered_more(&load);
    (addr, service, load)
}

fn wait_for_closed(service: &Service, times: usize) {
    wait_until("listeners are closed", DEADLINE, || service.out.count_of("recycled") >= times);
}

/// Waits until several listeners have been replaced, and asserts that no request failed. (Without reuse-run some are reset.)
fn assert_nothing_fails(options: &str, what: &str) {
    let (_, mut service, load) = app(options, what, Duration::from_secs(1));
    wait_for_closed(&service, service.out.count_of("recycled") + 6);
    answered_more(&load);
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn a_listener_that_replaces_another_one_of_its_process_takes_all_new_connections() {
    assert_nothing_fails("-n 2", "reopens");
    assert_nothing_fails("-n 1", "reopens");
    assert_nothing_fails("-n 2 --balance random", "reopens");
}

#[test]
fn a_process_takes_the_listener_of_one_that_has_ended_and_what_waits_there() {
    assert_nothing_fails("-n 2", "children");
    assert_nothing_fails("-n 1", "children");
}

/// Has this worker close a listener. Each client may have come there once, and its connection is reset before it has waited
/// for so long.
fn close_under_load(options: &str, what: &str, timeout: Duration) -> (SocketAddr, Service) {
    let (addr, service, load) = app(options, what, timeout);
    let workers = service.workers();
    let listeners = workers.len() * if what == "threads" { 4 } else { 1 };
    wait_until("all listen", DEADLINE, || service.out.count_of("listens") == listeners);
    send(workers[0], Signal::SIGUSR1);
    wait_for_closed(&service, 1);
    // Until then new connections may come there. They wait, and are reset now.
    service.wait_for_line("has closed a listener of");
    (0..50).for_each(|_| assert!(get(addr).pid.is_some()));
    let report = load.stop();
    println!("{report}");
    assert!(report.counts.failed <= CLIENTS as u64, "{report}");
    assert_eq!(report.counts.failed, report.count(Kind::Reset), "{report}");
    (addr, service)
}

#[test]
fn clients_of_a_listener_that_a_thread_has_closed_wait_for_less_than_a_second() {
    for options in ["-n 2", "-n 1", "-n 2 --balance random"] {
        close_under_load(options, "threads", Duration::from_secs(1)).1.stop();
    }
}

#[test]
fn a_worker_that_watches_its_closed_listener_still_is_not_woken_by_it() {
    let (addr, mut service) = close_under_load("-n 2", "loop", DEADLINE);
    service.wait_for_line("has stopped listening on");
    let woken = || service.out.count_of("woken by a closed listener");
    let before = woken();
    (0..50).for_each(|_| assert!(get(addr).pid.is_some()));
    assert!(woken() <= before + 1, "one may have been on its way");
    service.stop();
}

#[test]
fn a_worker_that_has_closed_its_only_listener_finishes_its_request_before_it_gets_the_stop_signal() {
    let addr = free_address();
    let command = python("recycles.py", &[&addr.port().to_string(), "keeps"]);
    let mut service = Service::run_ready("-n 1 --drain 60s", &command);
    let old = service.workers()[0];
    let client = Waiting::new(addr);
    service.wait_for_output("accepted");
    send(old, Signal::SIGUSR1);
    wait_for_closed(&service, 1);
    Waiting::new(addr).assert_reset();
    service.wait_for_line("has stopped listening on");
    let from = service.log.count();
    send(service.pid(), Signal::SIGUSR2);
    service.wait_for_line_after(from, "generation 1 drains");
    holds_for("its request is not cut", Duration::from_millis(300), || client.waits());
    send(old, Signal::SIGUSR1);
    assert_eq!(client.outcome().expect("an answer").pid, Some(old));
    service.stop();
}

/// The only worker closes the descriptor that it has bound while its socket stays open, and accepts nothing for a second.
fn assert_stays_open(what: &str) {
    let addr = free_address();
    let command = python("recycles.py", &[&addr.port().to_string(), what]);
    let mut service = Service::run_ready("-n 1", &command);
    get(addr);
    send(service.workers()[0], Signal::SIGUSR1);
    wait_for_closed(&service, 1);
    let waiting: Vec<Waiting> = (0..4).map(|_| Waiting::new(addr)).collect();
    for client in waiting {
        client.outcome().expect("an answer");
    }
    get(addr);
    assert!(!service.log.text().contains("has stopped listening"), "{}", service.log.text());
    service.stop();
}

#[test]
fn a_listener_on_its_way_to_another_process_stays_open() {
    assert_stays_open("hands");
}

#[test]
fn a_listener_that_has_another_number_stays_open() {
    assert_stays_open("moves");
}

#[test]
fn a_listener_of_a_worker_whose_sockets_may_be_listed_but_not_seen_stays_open() {
    needs_other_users!();
    let addr = free_address();
    let program = "import os, socket\n\
        os.setgroups([])\n\
        os.setuid(65534)\n\
        listener = socket.socket(fileno=3)\n\
        os.write(int(os.environ['READY_FD']), b'\\n')\n\
        while True:\n\
        \x20   connection, _ = listener.accept()\n\
        \x20   connection.recv(65536)\n\
        \x20   body = b'pid=%d\\n' % os.getpid()\n\
        \x20   connection.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n' % len(body) + body)\n\
        \x20   connection.close()";
    // As root of a container, which has CAP_DAC_OVERRIDE.
    let setpriv = ["setpriv", "--inh-caps=-sys_ptrace", "--bounding-set=-sys_ptrace", "--"];
    for workers in [1, 2] {
        let options = format!("-n {workers} --ready notify -l {addr}");
        let mut service = Service::spawn_ready(behind(&setpriv, &options, &inline(program, &[])));
        service.workers().iter().for_each(|worker| send(*worker, Signal::SIGSTOP));
        let waiting: Vec<Waiting> = (0..8).map(|_| Waiting::new(addr)).collect();
        service.wait_for_line("has taken no connection on");
        service.workers().iter().for_each(|worker| send(*worker, Signal::SIGCONT));
        waiting.into_iter().for_each(|client| assert!(client.outcome().expect("an answer").pid.is_some()));
        assert!(!service.log.text().contains("has stopped listening"), "{}", service.log.text());
        service.stop();
    }
}
