//! Processes behind a worker's main one: programs that go into the background, and servers from which their main process keeps the stop
//! signal.
#![cfg_attr(clippy, deny(warnings))]
#![allow(unsafe_code)]

mod common;

use std::net::SocketAddr;

use common::load::{Load, LoadOptions};
use common::{
    DEADLINE, Folder, Process, Service, User, free_address, get, naive, needs_other_users, python, send,
    wait_until,
};
use nix::sys::signal::Signal;

/// What the log says when a worker goes into the background.
const WENT: &str = "went into the background; run it in the foreground";

/// tests/apps/python/behind.py
fn app(what: &str) -> (SocketAddr, Folder, Vec<String>) {
    let (addr, folder) = (free_address(), Folder::new());
    let command = python("behind.py", &[&addr.to_string(), &folder.path(""), what]);
    (addr, folder, command)
}

/// Asserts that the start fails with status 1 and a line with `hint`, and that nothing is left behind.
#[track_caller]
fn assert_start_fails(mut service: Service, hint: &str) {
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert!(service.log.text().contains(&format!("{WENT}{hint}; giving up")), "{}", service.log.text());
    assert_eq!(service.descendants(), [0u32; 0], "{}", service.log.text());
}

/// The configuration of an nginx that answers at this address. Returns the command.
fn nginx(folder: &Folder, addr: SocketAddr, more: &str) -> Vec<String> {
    let text = format!(
        "pid {}; error_log stderr; {more} events {{}}
         http {{ access_log off; server {{ listen {addr}; location / {{ return 200 \"ok\\n\"; }} }} }}",
        folder.path("nginx.pid")
    );
    let path = folder.write("nginx.conf", &text);
    ["nginx", "-p", &folder.path(""), "-c", &path].map(str::to_owned).to_vec()
}

#[test]
fn a_first_start_that_goes_into_the_background_fails_once_and_leaves_nothing() {
    for what in ["late", "early", "waits", "deaf"] {
        println!("{what}");
        let (_, folder, command) = app(what);
        folder.raise("background");
        let service = Service::run("-n 2 --stop-timeout 2s", &command);
        service.wait_for_line(WENT);
        let started = service.out.count_of("started");
        assert!(started <= 2, "{started} starts:\n{}", service.log.text());
        assert_start_fails(service, "");
    }
}

#[test]
fn nginx_with_its_default_daemon_on_is_told_how_to_run() {
    let (addr, folder) = (free_address(), Folder::new());
    let service = Service::run("-n 2", &nginx(&folder, addr, ""));
    assert_start_fails(service, " (nginx -g 'daemon off;')");
}

#[test]
fn a_reload_to_a_program_that_goes_into_the_background_fails_and_the_old_workers_serve_on() {
    for what in ["late", "early", "waits"] {
        println!("{what}");
        let (addr, folder, command) = app(what);
        let mut service = Service::run_ready("-n 2", &command);
        let load = Load::start(LoadOptions::new(addr, 4));
        wait_until("answers", DEADLINE, || load.snapshot().answered > 20);
        folder.raise("background");
        for _ in 0..2 {
            let log = service.failing_reload();
            assert!(log.contains(WENT), "{log}");
            wait_until("only the old workers are left", DEADLINE, || service.descendants().len() == 2);
            assert_eq!(get(addr).generation, Some(1));
        }
        folder.lower("background");
        service.reload();
        assert_eq!(get(addr).generation, Some(4));
        load.stop().assert_nothing_failed();
        service.stop();
    }
}

#[test]
fn a_restarted_worker_that_goes_into_the_background_is_replaced_until_it_no_longer_does() {
    let (addr, folder, command) = app("late");
    let mut service = Service::run_ready("-n 1", &command);
    let first = get(addr).pid.expect("a pid");
    folder.raise("background");
    send(first, Signal::SIGKILL);
    service.wait_for_line(WENT);
    folder.lower("background");
    wait_until("one process", DEADLINE, || {
        let left = service.descendants();
        left.len() == 1 && left == service.workers()
    });
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn what_a_worker_leaves_that_ends_as_it_should_is_no_program_in_the_background() {
    let (addr, folder, command) = app("recycled");
    let mut service = Service::run_ready("-n 1", &command);
    wait_until("a helper", DEADLINE, || service.out.count_of("helper") == 1);
    folder.raise("recycle");
    wait_until("the next one", DEADLINE, || service.out.count_of("helper") == 2);
    get(addr);
    let (_other, _folder, command) = app("helper");
    let mut with_listener = Service::run_ready("-n 1", &command);
    wait_until("a helper", DEADLINE, || with_listener.out.count_of("helper") == 1);
    with_listener.reload();
    wait_until("the next one", DEADLINE, || with_listener.out.count_of("helper") == 2);
    for service in [&mut service, &mut with_listener] {
        assert!(!service.log.text().contains(WENT), "{}", service.log.text());
        let helpers = service.out.all();
        for line in helpers.iter().filter_map(|line| line.text.strip_prefix("helper ")) {
            assert!(Process::read(line.parse().expect("a pid")).is_some(), "helper {line} was ended");
        }
        service.signal(Signal::SIGTERM);
        assert_eq!(service.wait_exit().code(), Some(0), "{}", service.log.text());
    }
}

#[test]
fn the_stop_signal_reaches_a_server_whose_parent_keeps_it_to_itself() {
    needs_other_users!();
    let user = User::new();
    let of_user = |addr: SocketAddr| vec![user.server(), "--listen".to_owned(), addr.to_string()];
    // As fakeroot(1) and strace(1) do.
    let keeper = "import signal, subprocess, sys; signal.signal(signal.SIGINT, lambda *_: None); subprocess.call(sys.argv[1:])";
    // The first process of a PID namespace is ended only by a signal that it handles.
    let polite = |addr: SocketAddr| python("polite.py", &[&addr.port().to_string()]);
    let assert_reached = |parent: &[&str], server: &dyn Fn(SocketAddr) -> Vec<String>| {
        println!("{parent:?}");
        let addr = free_address();
        let command: Vec<String> = parent.iter().map(|word| (*word).to_owned()).chain(server(addr)).collect();
        // If the signal didn't reach the server, this test would time out.
        let mut service = Service::run_ready("-n 1 --stop-timeout 1h --stop-within 1h", &command);
        service.reload();
        assert_eq!(get(addr).generation, Some(2));
        service.stop();
    };
    assert_reached(&["unshare", "--pid", "--fork", "--mount-proc"], &polite);
    assert_reached(&["sh", "-c", r#"unshare --pid --fork "$0" "$@"; true"#], &polite);
    assert_reached(&["runuser", "-u", "nobody", "--"], &of_user);
    assert_reached(&["setpriv", "--clear-groups", "sh", "-c", r#""$0" "$@"; true"#], &naive);
    assert_reached(&["python3", "-c", keeper], &naive);
}

#[test]
fn a_main_process_that_had_a_listener_tells_its_children_itself() {
    let (addr, _folder, command) = app("prefork");
    let mut service = Service::run_ready("-n 2", &command);
    service.reload(); // takes longer than the second after which others get the signal
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
    assert_eq!(service.out.count_of("child got SIGINT"), 0, "{}", service.out.text());
}

#[test]
fn when_a_worker_that_ignores_the_stop_signal_is_killed_the_log_names_the_option() {
    let (addr, _folder, command) = app("ignores");
    let service = Service::run_ready("-n 1 --stop-timeout 1s", &command);
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    let line = service.wait_for_line("it ignores SIGINT");
    assert!(line.text.contains("use another --stop-signal, such as TERM"), "{}", line.text);
}
