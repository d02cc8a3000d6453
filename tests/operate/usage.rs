//! Wrong options, help, and programs with the name of a command.

use std::os::unix::fs::symlink;

use crate::common::{Folder, Outcome, Service, reuse_run, run_words};

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
        let outcome = run_words(words);
        assert_eq!(outcome.code, Some(2), "{words}: {outcome:?}");
        assert_eq!((outcome.err.lines().count(), outcome.out.as_str()), (1, ""), "{words}: {outcome:?}");
    }
}

#[test]
fn two_dashes_come_before_a_program_with_the_name_of_a_command() {
    let folder = Folder::new();
    for name in ["reload", "status", "scale", "stop"] {
        symlink("/bin/echo", folder.path(name)).expect("make a link");
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
        let outcome = run_words(&format!("{name} --help"));
        assert_eq!((outcome.code, outcome.err.as_str()), (Some(0), ""), "{outcome:?}");
        assert!(outcome.out.contains(part) && outcome.out.contains(name), "{outcome:?}");
    }
}
