//! A short run of chaos in each of its modes; `scripts/chaos` runs it for as long as one likes.

mod common;

use std::process::{Command, Output};

use common::{example, reuse_run, server, turn};

fn chaos(arguments: &[&str]) -> Output {
    // It starts these.
    let _ = (reuse_run(), server());
    Command::new(example("chaos")).args(arguments).output().expect("run chaos")
}

#[track_caller]
fn assert_goes_well(arguments: &[&str]) {
    let _turn = turn();
    let output = chaos(arguments);
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}

#[test]
fn gentle_chaos_fails_no_request() {
    assert_goes_well(&["10"]);
}

#[test]
fn rough_chaos_fails_only_requests_that_killed_workers_had_accepted() {
    assert_goes_well(&["--rough", "10"]);
}

#[test]
fn a_seed_makes_the_same_plan_again() {
    let plan = |seed| chaos(&["--rough", "--plan", "--seed", seed, "60"]).stdout;
    assert_eq!(plan("7"), plan("7"));
    assert_ne!(plan("7"), plan("8"));
    let text = String::from_utf8(plan("7")).expect("text");
    for what in ["exits at its start", "hangs", "never ready", "crashes", "SIGSTOP", "SIGKILL", "--seed 7"] {
        assert!(text.contains(what), "{what:?} is not in:\n{text}");
    }
}
