//! Wrong options, help, and programs with the name of a command.

use std::os::unix::fs::symlink;
use std::process::Command;

use crate::common::{
    Folder, Outcome, Service, free_address, naive, own_network, reuse_run, reuse_run_with, run_words,
};

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
        "reload 4x",
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
        "-n 2 recycle",
    ] {
        let outcome = run_words(words);
        assert_eq!(outcome.code, Some(2), "{words}: {outcome:?}");
        assert_eq!((outcome.err.lines().count(), outcome.out.as_str()), (1, ""), "{words}: {outcome:?}");
    }
}

#[test]
fn two_dashes_come_before_a_program_with_the_name_of_a_command() {
    let folder = Folder::new();
    for name in ["reload", "status", "scale", "recycle", "stop"] {
        symlink("/bin/echo", folder.path(name)).expect("make a link");
        let mut command = reuse_run();
        command.args(["--", name, "was run"]).env("PATH", folder.path(""));
        let outcome = Outcome::of(Service::spawn(command));
        assert_eq!(outcome.out, "was run", "{outcome:?}");
    }
}

#[test]
fn every_command_has_help() {
    for (name, part) in [
        ("reload", "--canary"),
        ("status", "--watch"),
        ("scale", "+1"),
        ("recycle", "--pid"),
        ("stop", "--no-wait"),
    ] {
        let outcome = run_words(&format!("{name} --help"));
        assert_eq!((outcome.code, outcome.err.as_str()), (Some(0), ""), "{outcome:?}");
        assert!(outcome.out.contains(part) && outcome.out.contains(name), "{outcome:?}");
    }
}

#[test]
fn a_variable_with_a_wrong_value_is_named() {
    for (name, value, part) in [
        ("REUSE_RUN_WORKERS", "many", "REUSE_RUN_WORKERS: \"many\" is neither a number"),
        ("REUSE_RUN_DRAIN", "5", "REUSE_RUN_DRAIN: \"5\" is not a duration"),
        ("REUSE_RUN_LABEL", "yes", "REUSE_RUN_LABEL: \"yes\" is neither 1 nor 0"),
        ("REUSE_RUN_LISTEN", "3000 x", "REUSE_RUN_LISTEN: \"x\" is not an address"),
        ("REUSE_RUN_LOG", "loud", "REUSE_RUN_LOG: \"loud\" is none of error, warn, info and debug"),
    ] {
        let mut command = reuse_run();
        command.args(["--", "true"]).env(name, value);
        let outcome = Outcome::of(Service::spawn(command));
        assert!(outcome.code == Some(2) && outcome.err.contains(part), "{outcome:?}");
    }
}

#[test]
fn help_and_version_are_printed_whatever_the_variables_are() {
    for (name, value) in [("REUSE_RUN_WORKERS", "many"), ("REUSE_RUN_LOG", "loud")] {
        for (option, part) in [("--help", "Usage: reuse-run"), ("--version", "reuse-run ")] {
            let mut command = reuse_run();
            command.arg(option).env(name, value);
            let outcome = Outcome::of(Service::spawn(command));
            assert!(outcome.code == Some(0) && outcome.out.starts_with(part), "{outcome:?}");
        }
    }
}

#[test]
fn what_cannot_be_written_is_an_error_and_a_closed_pipe_is_none() {
    own_network();
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    for words in ["--help", "--version", "reload --help", "status", "status --json"] {
        let shell = |rest: &str| {
            let mut shell = Command::new("bash");
            let closed_pipe = "exec 3> >(:); wait $!";
            shell.args([
                "-c",
                &format!("{closed_pipe}; {} {words} {rest}", reuse_run().get_program().display()),
            ]);
            Outcome::of(Service::spawn(shell))
        };
        let outcome = shell(">/dev/full");
        assert_eq!(outcome.code, Some(1), "{words}: {outcome:?}");
        assert!(outcome.err.contains("No space left on device"), "{words}: {outcome:?}");
        let outcome = shell(">&3");
        assert_eq!((outcome.code, outcome.err.as_str()), (Some(0), ""), "{words}: {outcome:?}");
    }
    service.stop();
}

#[test]
fn what_is_wrong_is_named() {
    for (words, part) in [
        ("-n 1 -n 2 -- true", "-n: duplicate values provided"),
        ("--batch 0 -- true", "--batch: \"0\" is not a number of workers from 1 on"),
        ("--max-failures -1 -- true", "--max-failures: \"-1\" is not a number from 0 on"),
        ("reload --batch 0", "--batch: \"0\" is not a number of workers from 1 on"),
        ("recycle web", "slots: \"web\" is not the number of a slot; a PID or a name comes after --pid"),
        ("--name 1a -- true", "\"1a\" is not a name: a letter"),
        ("stop a/b", "\"a/b\" is neither a PID nor a name"),
    ] {
        let outcome = run_words(words);
        assert!(outcome.code == Some(2) && outcome.err.contains(part), "{words}: {outcome:?}");
    }
}

#[test]
fn variables_are_options_that_the_command_line_overrides_and_that_workers_do_not_get() {
    for (options, workers) in [("", 2), ("-n 1", 1), ("--workers 1", 1)] {
        let mut command = reuse_run_with(options, &naive(free_address()));
        command.env("REUSE_RUN_WORKERS", "2").env("REUSE_RUN_WORKER", "3").env("REUSE_RUN_LABEL", "1");
        command.env("REUSE_RUN_LOG", "debug").env("RUST_LOG", "off");
        let mut service = Service::spawn_ready(command);
        service.wait_for_line("warn: there is no option for the variable REUSE_RUN_WORKER (see --help)");
        assert_eq!(service.workers().len(), workers, "{options}");
        let environment = std::fs::read_to_string(format!("/proc/{}/environ", service.workers()[0]));
        let environment = environment.expect("a worker's variables");
        let mut names: Vec<&str> = environment
            .split('\0')
            .filter_map(|variable| variable.split_once('='))
            .map(|(name, _)| name)
            .filter(|name| name.starts_with("REUSE_RUN_") || *name == "RUST_LOG")
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["REUSE_RUN_GENERATION", "REUSE_RUN_SLOT", "RUST_LOG"]);
        service.stop();
    }
}

#[test]
fn commands_of_other_process_managers_get_a_hint() {
    for (words, hint) in
        [("list", "reuse-run status"), ("restart app", "reuse-run reload"), ("help", "reuse-run --help")]
    {
        let outcome = run_words(words);
        assert!(outcome.code == Some(127) && outcome.err.contains(hint), "{outcome:?}");
    }
}
