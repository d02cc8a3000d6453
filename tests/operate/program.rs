//! `reload -- COMMAND`: the next generation runs another command.

use std::fs;
use std::io::ErrorKind;
use std::net::TcpStream;

use nix::sys::signal::Signal;

use super::protocol::{rest, say};
use crate::common::load::{Load, LoadOptions};
use crate::common::{
    DEADLINE, Folder, Outcome, Service, answered_more, begin, free_address, get, naive, run, send, status,
    wait_until,
};

/// Begins a reload to another command.
fn begin_to(service: &Service, options: &str, command: &[String]) -> Service {
    let options = format!("reload {options} {} --", service.pid());
    Service::start(options.split_whitespace().chain(command.iter().map(String::as_str)))
}

fn to(service: &Service, options: &str, command: &[String]) -> Outcome {
    Outcome::of(begin_to(service, options, command))
}

fn commands_of_workers(service: &Service) -> Vec<String> {
    let of = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("a worker");
    service.workers().into_iter().map(|pid| of(pid).replace('\0', " ").trim_end().to_owned()).collect()
}

#[track_caller]
fn assert_all_run(service: &Service, command: &[String]) {
    assert_eq!(commands_of_workers(service), vec![command.join(" "); 2]);
    assert_eq!(status(service)["command"], serde_json::json!(command));
}

#[test]
fn a_command_that_serves_stays_and_one_that_does_not_leaves_the_old_one() {
    let addr = free_address();
    let (first, second) = (naive(addr), [naive(addr), vec!["--announce".to_owned()]].concat());
    let mut service = Service::run_ready("-n 2", &first);
    assert_all_run(&service, &first);
    to(&service, "", &second).assert_done("2 workers of generation 2 serve");
    assert_all_run(&service, &second);
    send(service.workers()[0], Signal::SIGKILL);
    service.wait_for_line("is ready, a replacement");
    assert_all_run(&service, &second);
    let load = Load::start(LoadOptions::new(addr, 8));
    answered_more(&load);
    assert!(run(&service, "status").out.contains(&format!("command: {}", second.join(" "))));

    let failing = |words: &[&str], parts: &[&str]| {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        to(&service, "--batch 1", &words).assert_failed(parts);
        assert_all_run(&service, &second);
    };
    failing(&["/nonexistent", "x"], &["/nonexistent: command not found", "of generation 2 serve on"]);
    failing(&["/"], &["can't execute /", "of generation 2 serve on"]);
    failing(&["false"], &["exited with status 1 before it was ready"]);

    let folder = Folder::new();
    let held = folder.server(addr, &[]);
    folder.raise("hold-6-1");
    let reload = begin_to(&service, "", &held);
    reload.wait_for_output("starting generation 6");
    wait_until("status shows both commands", DEADLINE, || {
        let status = status(&service);
        let workers = status["workers"].as_array().expect("workers");
        let commands = |generation| {
            let of = workers.iter().filter(move |worker| worker["generation"] == generation);
            of.map(|worker| worker["command"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(status["command"], serde_json::json!(second));
        assert_eq!(commands(2), vec![serde_json::Value::Null; 2]);
        commands(6) == vec![serde_json::json!(held); 2]
    });
    assert!(run(&service, "status").out.contains("command of generation 6: sh -c '"));
    run(&service, "reload --abort").assert_done("2 workers of generation 2 serve on");
    Outcome::of(reload).assert_failed(&["aborted"]);

    run(&service, "reload").assert_done("2 workers of generation 7 serve");
    assert_all_run(&service, &second);
    to(&service, "", &first).assert_done("2 workers of generation 8 serve");
    assert_all_run(&service, &first);
    answered_more(&load);
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn a_command_that_is_too_long_to_be_sent_or_that_has_no_words_changes_nothing() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let long = ["echo".to_owned(), "x".repeat(100_000)];
    to(&service, "", &long).assert_failed(&["the command is longer than 64 KiB"]);
    let request = br#"{"version": 2, "request": {"reload": {"how": null, "command": [], "wait": true}}}"#;
    let answer = rest(say(&service, &[request, &b"\n"[..]].concat()));
    assert!(answer.contains("the command to run has no words"), "{answer}");
    assert_all_run(&service, &naive(addr));
    service.stop();
}

#[test]
fn a_command_that_listens_elsewhere_needs_ports_may_change() {
    let (old, new) = (free_address(), free_address());
    let mut service = Service::run_ready("-n 2 --ready-timeout 1s", &naive(old));
    to(&service, "", &naive(new)).assert_failed(&[&format!("does not listen on {old}")]);
    assert_eq!(get(old).generation, Some(1));
    to(&service, "--ports-may-change", &naive(new)).assert_done("2 workers of generation 3 serve");
    assert_eq!(get(new).generation, Some(3));
    let refused = TcpStream::connect(old).expect_err("the old port has nobody");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(status(&service)["addresses"], serde_json::json!([new.to_string()]));
    send(service.workers()[0], Signal::SIGKILL);
    service.wait_for_line("is ready, a replacement");
    run(&service, "reload").assert_done("2 workers of generation 4 serve");
    assert_eq!(get(new).generation, Some(4));
    to(&service, "--ports-may-change", &naive(old)).assert_done("2 workers of generation 5 serve");
    assert_eq!(get(old).generation, Some(5));
    service.stop();
}

#[test]
fn while_one_reload_is_queued_one_with_another_command_is_refused_and_an_equal_one_is_the_same() {
    let (addr, folder, mut service) = Service::with_flags("-n 2", &[]);
    folder.raise("hold-2-0");
    let first = begin(&service, "reload");
    first.wait_for_output("starting generation 2");
    let other = naive(addr);
    let queued = [(); 2].map(|()| {
        let command = begin_to(&service, "", &other);
        service.wait_for_line("reload: queued");
        command
    });
    to(&service, "", &["false".to_owned()]).assert_failed(&["a reload of another kind is queued already"]);
    folder.lower("hold-2-0");
    Outcome::of(first).assert_done("2 workers of generation 2 serve");
    for command in queued {
        Outcome::of(command).assert_done("2 workers of generation 3 serve");
    }
    assert_all_run(&service, &other);
    service.stop();
}
