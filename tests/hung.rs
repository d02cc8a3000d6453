//! File systems that don't answer. Nothing that a worker does with one keeps the others waiting.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::os::unix::net::UnixListener;

use common::{
    DEADLINE, Folder, HungFileSystem, Service, app, assert_prompt, at_once, reuse_run_with, run, unlinking,
    wait_until,
};
use nix::sys::signal::Signal;

/// Slot 1 runs unlinks.py, the others hung.py.
fn workers(what: &str, folder: &Folder, file: &str) -> Vec<String> {
    let text = r#"if [ "$REUSE_RUN_SLOT" != 1 ]; then exec python3 "$0" "$1" "$2" "$3"; fi
        shift 3; exec "$@""#;
    let first = ["sh", "-c", text, &app("python/hung.py"), what, &folder.path(""), file];
    first.iter().map(|word| (*word).to_owned()).chain(unlinking(folder)).collect()
}

/// Waits until the worker of slot 1 is ready, which unlinks.
fn wait_until_slot_1_unlinks(folder: &Folder) {
    let path = folder.path("unlinks");
    wait_until("a worker that unlinks", DEADLINE, || std::path::Path::new(&path).exists());
}

#[track_caller]
fn stop(mut service: Service, mut hung: HungFileSystem) {
    service.signal(Signal::SIGTERM);
    service.wait_exit();
    hung.end(&service);
}

#[test]
fn a_call_whose_argument_lies_in_a_hung_file_system_keeps_no_other_worker_waiting() {
    let rows = [
        ("bind", "file", ""),
        ("early-option", "file", ""),
        ("early-unlink", "file", ""),
        ("early-unlink-path", "folder/socket", ""),
        ("early-bind-path", "folder/socket", ""),
        ("early-unlink-path", "folder/socket", "unlink"),
        ("early-bind-path", "folder/socket", "mknod"),
    ];
    at_once(rows, |(what, file, deaf_to)| {
        println!("{what} {deaf_to}");
        let (hung, folder) = (HungFileSystem::deaf_to(deaf_to), Folder::new());
        if deaf_to == "unlink" {
            UnixListener::bind(hung.path(file)).expect("a socket to remove");
        }
        let service =
            Service::run("-n 2 --ready notify --stop-timeout 1s", &workers(what, &folder, &hung.path(file)));
        wait_until_slot_1_unlinks(&folder);
        service.wait_for_output("waits");
        hung.hang();
        folder.raise("go");
        service.wait_for_output("calls");
        assert_prompt(&service, &folder);
        assert_eq!(service.out.count_of("returns"), 0, "it didn't hang");
        stop(service, hung);
    });
}

/// Three workers, two of which listen on a path of this file system and one unlinks something else.
fn serving(hung: &HungFileSystem, folder: &Folder, options: &str) -> Service {
    let command = workers("early-serve-path", folder, &hung.path("folder/socket"));
    let mut command = reuse_run_with(&format!("-n 3 --stop-timeout 1s {options}"), &command);
    command.env("REUSE_RUN_LOG", "debug");
    let service = Service::spawn(command);
    wait_until_slot_1_unlinks(folder);
    wait_until("both have bound it", DEADLINE, || service.out.count_of("waits") == 2);
    service
}

#[test]
fn a_path_that_cannot_be_handed_over_keeps_nobody_waiting_and_the_reload_goes_on() {
    let (hung, folder) = (HungFileSystem::deaf_to("rename"), Folder::new());
    let service = serving(&hung, &folder, "--ready notify");
    folder.raise("go");
    service.wait_for_line("generation 1 is ready");
    hung.hang();
    service.signal(Signal::SIGUSR2);
    service.wait_for_line("generation 2 is ready");
    assert_prompt(&service, &folder);
    service.wait_for_line("can't hand");
    service.wait_for_line("reload done");
    assert_prompt(&service, &folder);
    stop(service, hung);
}

#[test]
fn a_path_that_cannot_be_removed_keeps_nobody_waiting_and_holds_up_no_stop() {
    let (hung, folder) = (HungFileSystem::deaf_to("unlink"), Folder::new());
    let service = serving(&hung, &folder, "--ready notify");
    folder.raise("go");
    service.wait_for_line("generation 1 is ready");
    hung.hang();
    service.signal(Signal::SIGTERM);
    service.wait_for_line("stopping");
    assert_prompt(&service, &folder);
    stop(service, hung);
}

#[test]
fn a_path_to_which_no_request_can_be_sent_keeps_nobody_waiting() {
    let (hung, folder) = (HungFileSystem::new(), Folder::new());
    let service = serving(&hung, &folder, "--ready /");
    hung.hang();
    folder.raise("go");
    service.wait_for_line("GET /");
    assert_prompt(&service, &folder);
    stop(service, hung);
}

/// Starts reuse-run with these options and a command, and asserts that in a reload, after the file system has begun to hang, nobody
/// waits, that the reload is abandoned, and that the log says what was waited for.
#[track_caller]
fn assert_reload_is_abandoned(
    options: &[&str],
    command: &[String],
    hung: HungFileSystem,
    folder: &Folder,
    what: &str,
) {
    let options = format!("-n 2 --ready notify --stop-timeout 1s {}", options.join(" "));
    let service = Service::run_ready(&options, command);
    hung.hang();
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    service.wait_for_line_after(from, "starting generation 2");
    assert_prompt(&service, folder);
    service.wait_for_line_after(from, &format!("{what} could not be read within"));
    service.wait_for_line_after(from, "reload abandoned");
    assert_prompt(&service, folder);
    stop(service, hung);
}

#[test]
fn files_and_folders_in_a_hung_file_system_keep_nobody_waiting_and_fail_a_reload() {
    at_once(["--env-file", "--secret", "--chdir"], |option| {
        println!("{option}");
        let (hung, folder) = (HungFileSystem::new(), Folder::new());
        let path = hung.path(if option == "--chdir" { "folder" } else { "env" });
        let value = if option == "--secret" { format!("KEY={path}") } else { path.clone() };
        let command = unlinking(&folder);
        assert_reload_is_abandoned(&[option, &value], &command, hung, &folder, &path);
    });
}

#[test]
fn a_command_in_a_hung_file_system_keeps_nobody_waiting_and_fails_a_reload() {
    let (hung, folder) = (HungFileSystem::new(), Folder::new());
    let path = hung.path("file");
    // A script of the file system that runs the command that it is given.
    let command: Vec<String> = [path.clone()].into_iter().chain(unlinking(&folder)).collect();
    assert_reload_is_abandoned(&[], &command, hung, &folder, &path);
}

#[test]
fn a_first_start_from_a_hung_file_system_fails_and_can_be_stopped() {
    at_once([false, true], |stops| {
        let (mut hung, folder) = (HungFileSystem::new(), Folder::new());
        let path = hung.path("env");
        hung.hang();
        let mut service =
            Service::run(&format!("-n 2 --ready notify --env-file {path}"), &unlinking(&folder));
        let is_up = || run(&service, "status").out.contains("pid");
        wait_until("an answer to status", DEADLINE, is_up);
        if stops {
            service.signal(Signal::SIGTERM);
            assert_eq!(service.wait_exit().code(), Some(0));
        } else {
            service.wait_for_line(&format!("{path} could not be read within"));
            assert_eq!(service.wait_exit().code(), Some(1));
        }
        hung.end(&service);
    });
}
