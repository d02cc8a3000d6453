//! A short run of each mode of scripts/chaos.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::process::{Command, Output};

use common::{example, reuse_run, server, turn};

fn chaos(arguments: &[&str]) -> Output {
    // These must exist, because it starts them.
    let _ = (reuse_run(), server());
    Command::new(example("chaos")).args(arguments).output().expect("run chaos")
}

#[track_caller]
fn assert_succeeds(arguments: &[&str]) {
    let _turn = turn();
    let output = chaos(arguments);
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}

#[test]
fn in_gentle_chaos_no_request_fails() {
    assert_succeeds(&["10"]);
}

#[test]
fn in_rough_chaos_only_requests_that_killed_workers_had_accepted_fail() {
    assert_succeeds(&["--rough", "10"]);
}

#[test]
fn the_same_seed_makes_the_same_plan() {
    let plan = |seed| chaos(&["--rough", "--plan", "--seed", seed, "60"]).stdout;
    assert_eq!(plan("7"), plan("7"));
    assert_ne!(plan("7"), plan("8"));
    let text = String::from_utf8(plan("7")).expect("text");
    for what in [
        "exits at its start",
        "hangs",
        "never ready",
        "crashes",
        "SIGSTOP to",
        "SIGSTOP for ever",
        "recycle",
        "SIGKILL",
        "--seed 7",
    ] {
        assert!(text.contains(what), "{what:?} is not in:\n{text}");
    }
}
