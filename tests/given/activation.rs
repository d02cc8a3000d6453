//! systemd-socket-activate and systemd-notify.

use crate::common::load::{Load, LoadOptions};
use crate::common::{
    DEADLINE, MARK, Service, Waiting, behind, behind_shell, free_address, get, reload_under_load, turn,
    wait_until,
};
use crate::{lines_with, listeners, python, word};

#[test]
fn listeners_from_systemd_socket_activate_are_shared_by_all_workers() {
    let _turn = turn();
    let (shared, own) = (free_address(), free_address());
    // Its child gets only those variables that an option names.
    let listen = ["--listen", &shared.to_string(), "--fdname=web", "--setenv", MARK];
    let systemd = [&["systemd-socket-activate"], &listen[..]].concat();
    let options = format!("-n 2 --ready notify -l {own}");
    let mut service = Service::spawn(behind(&systemd, &options, &python("pipe")));
    service.wait_for_line(&format!("Listening on {shared}"));
    let first = Waiting::new(shared); // the first connection has it execute reuse-run, in the same process
    service.wait_until_ready();
    assert_eq!(first.outcome().expect("an answer").generation, Some(1));

    let lines = lines_with(&service, "given ", 2);
    let inode = |listener: usize| lines.iter().map(|line| listeners(line)[listener][3]).collect::<Vec<_>>();
    for line in &lines {
        assert_eq!(word(line, "listen_pid"), word(line, "pid"), "{line}");
        assert_eq!((word(line, "fds"), word(line, "ready_fd")), ("2", "5"), "{line}");
        assert_eq!(word(line, "names"), format!("web:{}", own.port()));
        let ports: Vec<&str> = listeners(line).iter().map(|listener| listener[2]).collect();
        assert_eq!(ports, [shared.port().to_string(), own.port().to_string()], "{line}");
    }
    assert_eq!(inode(0)[0], inode(0)[1], "both workers have the same socket");
    assert_ne!(inode(1)[0], inode(1)[1], "each worker has its own socket");

    let load = Load::start(LoadOptions::new(shared, 8));
    wait_until("both workers answer", DEADLINE, || load.snapshot().slots.len() == 2);
    load.stop().assert_nothing_failed();
    // For a while both generations accept from the one queue, so the switch isn't atomic.
    let report = reload_under_load(&service, LoadOptions::new(shared, 8), 5);
    assert_eq!(report.counts.generations.keys().next_back(), Some(&6), "{report}");
    assert_eq!(get(own).generation, Some(6));
    service.stop();
}

#[test]
fn a_socket_from_systemd_that_is_not_there_is_named() {
    for text in [
        "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&-",
        "LISTEN_PID=$$ LISTEN_FDS=2 exec \"$0\" \"$@\" 3</dev/null 4<&-",
    ] {
        let mut service = Service::spawn(behind_shell(text, "-n 1", &["sleep", "1000"]));
        assert_eq!(service.wait_end().code(), Some(1));
        let log = service.log.text();
        assert!(log.contains("but file descriptor ") && log.contains(" is not open"), "{log}");
    }
}

#[test]
fn a_worker_that_listens_on_a_socket_from_systemd_is_ready() {
    let shared = free_address();
    let systemd = ["systemd-socket-activate", "--listen", &shared.to_string(), "--setenv", MARK];
    let options = "-n 2 --ready listen --ready-timeout 20s";
    let mut service = Service::spawn(behind(&systemd, options, &python("listen")));
    service.wait_for_line(&format!("Listening on {shared}"));
    let first = Waiting::new(shared);
    service.wait_until_ready();
    assert_eq!(first.outcome().expect("an answer").generation, Some(1));
    service.reload();
    service.stop();
}

#[test]
fn a_worker_may_become_ready_by_systemd_notify() {
    let addr = free_address();
    let options = format!("-n 2 --ready notify -l {addr}");
    let mut service = Service::run_ready(&options, &python("systemd-notify"));
    // It waits until its message has been read, and fails otherwise.
    for line in lines_with(&service, "systemd-notify ", 2) {
        assert_eq!(word(&line, "status"), "0", "{line}");
    }
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}
