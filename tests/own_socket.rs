//! The socket that a worker made stays what it was to the worker, whatever the worker did with it before and after bind.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use common::load::{self, LoadOptions, Report};
use common::{
    DEADLINE, Service, User, arguments, free_address, needs_other_users, own_socket, python,
    reload_under_load, send, wait_until,
};
use nix::sys::signal::Signal;
use socket2::SockAddr;

/// tests/apps/python/own_socket.py at a free address, with 2 workers.
fn app(what: &str) -> (SocketAddr, Service) {
    let addr = free_address();
    let command = python("own_socket.py", &[what, &addr.port().to_string()]);
    (addr, Service::run_ready("-n 2", &command))
}

/// Reloads under load, and asserts that nothing failed and the last generation answered.
fn reload(service: &Service, addr: SocketAddr, times: u32) -> Report {
    let report = reload_under_load(service, LoadOptions::new(addr, 4), times);
    assert_eq!(report.counts.generations.keys().next_back(), Some(&(times + 1)), "{report}");
    report
}

#[test]
fn a_socket_that_is_bound_and_never_listened_on_gets_no_connection() {
    let (addr, mut service) = app("reserves");
    reload(&service, addr, 4); // from the third generation on such a socket listens already
    service.stop();
}

#[test]
fn a_program_by_which_a_worker_chooses_among_its_listeners_is_left_out() {
    let (addr, mut service) = app("program");
    reload(&service, addr, 3);
    service.stop();
}

/// How reuse-run is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rights {
    Root,
    /// As another user, without any capability and with no_new_privs.
    User,
    /// As root where pidfd_getfd(2) is refused, as by Docker's and containerd's profiles.
    RootWithoutGetfd,
    UserWithoutGetfd,
    /// As root where ptrace(2) is refused.
    RootWithoutPtrace,
    /// As root where both are refused.
    Neither,
}

impl Rights {
    /// `reuse-run -n 2 -- PROGRAM WORDS`.
    fn command(self, user: &User, program: &str, words: &[&str]) -> Command {
        self.command_with("-n 2", user, program, words)
    }

    fn command_with(self, options: &str, user: &User, program: &str, words: &[&str]) -> Command {
        let refused = match self {
            Rights::RootWithoutPtrace => "ptrace",
            Rights::Neither => "ptrace,pidfd_getfd",
            _ => "pidfd_getfd",
        };
        let refuses = python("without.py", &[refused, "EPERM"]);
        let id = user.id.to_string();
        let drops = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--bounding-set=-all"];
        let drops = [&drops[..], &["--inh-caps=-all", "--no-new-privs", "--"]].concat();
        let mut line: Vec<&str> = Vec::new();
        if ![Rights::Root, Rights::User].contains(&self) {
            line.extend(refuses.iter().map(String::as_str));
        }
        if [Rights::User, Rights::UserWithoutGetfd].contains(&self) {
            line.extend(drops);
        }
        let (reuse_run, options) =
            (user.folder.path("reuse-run"), arguments(options, &[&[program], words].concat()));
        let mut command = Command::new("env");
        command.args(line).arg(reuse_run).args(options).current_dir("/").env_remove("REUSE_RUN_LOG");
        command
    }
}

/// Asserts that tests/tools/own_socket.c serves with each of these words, and loses no request in a reload.
#[track_caller]
fn assert_stays(rights: &[Rights], cases: &[&str]) {
    let user = User::new();
    let program = own_socket(&user.folder);
    for rights in rights {
        for case in cases {
            println!("{rights:?}: {case}");
            let addr = free_address();
            let port = addr.port().to_string();
            let words: Vec<&str> = [port.as_str()].into_iter().chain(case.split_whitespace()).collect();
            let addr = if words.contains(&"ipv6") { (Ipv6Addr::LOCALHOST, addr.port()).into() } else { addr };
            let mut service = Service::spawn_ready(rights.command(&user, &program, &words));
            reload(&service, addr, 1);
            service.stop();
            let log = service.log.text();
            assert!(!log.contains("warn") && !log.contains("error"), "{log}");
        }
    }
}

const ALL: [Rights; 4] = [Rights::Root, Rights::User, Rights::RootWithoutGetfd, Rights::UserWithoutGetfd];

#[test]
fn epolls_that_watch_a_socket_before_it_is_bound_watch_it_afterwards() {
    needs_other_users!();
    assert_stays(&ALL, &["level", "edge", "oneshot", "exclusive", "edge two", "level two nested"]);
    assert_stays(
        &[Rights::User, Rights::UserWithoutGetfd],
        &["edge ipv6", "edge thread", "level two thread"],
    );
    assert_stays(
        &[Rights::RootWithoutPtrace],
        &["level", "edge two", "exclusive thread", "oneshot duplicate", "options edge"],
    );
}

#[test]
fn a_duplicate_from_before_bind_stays_one() {
    needs_other_users!();
    assert_stays(&ALL, &["duplicate", "duplicate edge two"]);
    assert_stays(&[Rights::Neither], &["duplicate"]);
}

#[test]
fn options_from_before_bind_stay() {
    needs_other_users!();
    assert_stays(&ALL, &["options", "options edge", "options thread"]);
    assert_stays(&[Rights::UserWithoutGetfd], &["options ipv6", "options duplicate edge"]);
}

#[test]
fn a_worker_that_is_traced_already_keeps_what_its_socket_had() {
    needs_other_users!();
    assert_stays(&[Rights::Root, Rights::User], &["traced edge two", "traced options duplicate"]);
}

#[test]
fn a_bind_fails_if_the_worker_could_not_watch_its_socket() {
    needs_other_users!();
    let user = User::new();
    let program = own_socket(&user.folder);
    for (rights, words) in [(Rights::Neither, "edge"), (Rights::UserWithoutGetfd, "edge traced")] {
        let port = free_address().port().to_string();
        let words: Vec<&str> = [port.as_str()].into_iter().chain(words.split(' ')).collect();
        let mut service = Service::spawn(rights.command(&user, &program, &words));
        assert_eq!(service.wait_end().code(), Some(1));
        let log = service.log.text();
        assert!(log.contains("can't bind a socket that it watches by epoll already"), "{log}");
        assert!(
            log.contains("bind: Operation not permitted") && log.contains("before it was ready"),
            "{log}"
        );
    }
}

#[test]
fn processes_that_are_killed_amid_their_binds_leave_no_warning_and_no_trace() {
    needs_other_users!();
    assert_stays(&[Rights::User, Rights::UserWithoutGetfd, Rights::RootWithoutPtrace], &["killed level"]);
}

#[test]
fn the_end_of_a_worker_that_is_killed_amid_its_bind_is_seen_and_it_is_replaced() {
    needs_other_users!();
    const WORKERS: usize = 16; // each is replaced at once only the first time
    let user = User::new();
    let program = own_socket(&user.folder);
    for rights in [Rights::RootWithoutGetfd, Rights::UserWithoutGetfd, Rights::User] {
        println!("{rights:?}");
        let port = free_address().port().to_string();
        let command = rights.command_with(&format!("-n {WORKERS}"), &user, &program, &[&port, "dies"]);
        let mut service = Service::spawn_ready(command);
        let first: BTreeSet<u32> = service.workers().into_iter().collect();
        assert_eq!(first.len(), WORKERS);
        for (index, worker) in first.iter().enumerate() {
            send(*worker, Signal::SIGUSR1);
            wait_until("a worker is replaced", DEADLINE, || {
                let has_ended = service.log.count_of("was killed by SIGKILL") == index + 1;
                has_ended && service.workers().len() == WORKERS
            });
        }
        service.stop();
    }
}

#[test]
fn a_socket_whose_epolls_can_not_be_found_stays_the_workers_own() {
    needs_other_users!();
    let user = User::new();
    let program = own_socket(&user.folder);
    let addr = free_address();
    // As if reuse-run could open no more files.
    let mut line = python("without.py", &["readlinkat", "EMFILE", env!("CARGO_BIN_EXE_reuse-run")]);
    line.extend(["-n", "1", "--", &program, &addr.port().to_string(), "edge"].map(str::to_owned));
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).env_remove("REUSE_RUN_LOG");
    let _service = Service::spawn(command);
    wait_until("the worker answers", DEADLINE, || load::get(addr, "/", Duration::from_secs(5)).is_ok());
}

#[test]
fn a_server_that_looks_at_a_flag_when_accept_times_out_ends() {
    needs_other_users!();
    assert_stays(&ALL, &["timeout"]);
}

#[test]
fn a_unix_socket_stays_what_it_was_too() {
    needs_other_users!();
    let user = User::new();
    let program = own_socket(&user.folder);
    std::os::unix::fs::chown(&user.folder.0, Some(user.id), None).expect("chown");
    for rights in ALL {
        for case in ["edge", "duplicate level", "timeout"] {
            println!("{rights:?}: {case}");
            let path = user.folder.path("socket");
            let words = [&[path.as_str(), "unix"], &case.split_whitespace().collect::<Vec<_>>()[..]].concat();
            let mut service = Service::spawn_ready(rights.command(&user, &program, &words));
            let addr = SockAddr::unix(&path).expect("an address");
            for generation in [1, 2] {
                let answer = load::get(addr.clone(), "/", DEADLINE).expect("an answer");
                assert_eq!(answer.origin.generation, Some(generation));
                if generation == 1 {
                    service.reload();
                }
            }
            service.stop();
        }
    }
}
