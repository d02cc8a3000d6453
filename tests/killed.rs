//! SIGKILL of reuse-run itself.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::net::SocketAddr;

use common::{DEADLINE, Service, free_address, get, inline, naive, needs_other_users, wait_until};
use nix::sys::signal::Signal;

/// A worker that has started another process, and has given up root after its bind.
fn humble(addr: SocketAddr) -> Vec<String> {
    let program = "import os, signal, socket, sys\n\
        listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n\
        if os.fork() == 0: signal.pause()\n\
        os.setgroups([])\n\
        os.setgid(65534)\n\
        os.setuid(65534)\n\
        print('is nobody', flush=True)\n\
        while True: listener.accept()";
    inline(program, &[&addr.port().to_string()])
}

#[test]
fn workers_that_gave_up_root_and_what_they_started_do_not_outlive_a_killed_reuse_run() {
    needs_other_users!();
    let mut service = Service::run_ready("-n 2", &humble(free_address()));
    wait_until("both have given up root", DEADLINE, || service.out.count_of("is nobody") == 2);
    assert_eq!(service.descendants().len(), 4);
    service.signal(Signal::SIGKILL);
    service.wait_exit();
    wait_until("nothing is left", DEADLINE, || service.descendants().is_empty());
}

#[test]
fn after_sigkill_a_new_start_at_once_gets_the_port() {
    needs_other_users!();
    let addr = free_address();
    for _ in 0..5 {
        let mut killed = Service::run_ready("-n 2", &humble(addr));
        killed.signal(Signal::SIGKILL);
        killed.wait_exit();
        let mut next = Service::run_ready("-n 2", &naive(addr));
        get(addr);
        next.stop();
    }
}

#[test]
fn after_sigkill_in_a_reload_nothing_is_left_and_a_new_start_at_once_gets_the_port() {
    needs_other_users!();
    let addr = free_address();
    for _ in 0..5 {
        let mut killed = Service::run_ready("-n 2", &humble(addr));
        killed.signal(Signal::SIGUSR2);
        killed.wait_for_line("reload");
        killed.signal(Signal::SIGKILL);
        killed.wait_exit();
        let mut next = Service::run_ready("-n 2", &naive(addr));
        wait_until("nothing is left", DEADLINE, || killed.descendants().is_empty());
        get(addr);
        next.stop();
    }
}

/// Only SIGKILL kills the groups of the workers; what a stop has left alone lives on.
#[test]
fn what_left_its_workers_group_lives_on_after_a_stop() {
    let addr = free_address();
    let program = "import os, signal, sys\n\
        if os.fork() == 0:\n\
        \x20   os.setsid()\n\
        \x20   print('daemon', os.getpid(), flush=True)\n\
        \x20   signal.pause()\n\
        os.execvp(sys.argv[1], sys.argv[1:])";
    let worker = naive(addr);
    let words: Vec<&str> = worker.iter().map(String::as_str).collect();
    let mut service = Service::run_ready("-n 1", &inline(program, &words));
    let daemon = service.wait_for_output("daemon").text;
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_exit().code(), Some(0), "{}", service.log.text());
    let pid: u32 = daemon.trim_start_matches("daemon ").parse().expect("a PID");
    assert!(service.descendants().contains(&pid));
}
