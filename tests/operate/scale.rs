//! `scale`, SIGTTIN and SIGTTOU.

use nix::sys::signal::Signal;

use crate::common::load::{Load, LoadOptions};
use crate::common::{
    DEADLINE, Outcome, Service, begin, free_address, naive, run, serving, status, turn, wait_for_answers,
    wait_until,
};
use crate::reload::begin_held;

#[test]
fn no_request_fails_while_workers_are_added_and_removed() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 8));
    for workers in [16, 1, 4] {
        wait_for_answers(&load, 100);
        let noun = if workers == 1 { "worker" } else { "workers" };
        run(&service, &format!("scale {workers}"))
            .assert_done(&format!("{workers} {noun} of generation 1 serve"));
        assert_eq!(service.workers().len(), workers);
    }
    let before = load.snapshot();
    wait_until("all new workers answer", DEADLINE, || {
        let now = load.snapshot();
        let answers = |slot| now.slots.get(&slot).copied().unwrap_or(0);
        (0..4).all(|slot| answers(slot) > before.slots.get(&slot).copied().unwrap_or(0))
    });
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn scale_accepts_a_difference_and_a_number_that_may_be_the_present_one() {
    let mut service = Service::run_ready("-n 2", &naive(free_address()));
    for (words, wanted) in [("scale +2", 4), ("scale -1", 3), ("scale 3", 3), ("scale +1", 4)] {
        run(&service, words).assert_done(&format!("{wanted} workers of generation 1 serve"));
        assert_eq!(service.workers().len(), wanted, "{words}");
    }
    run(&service, "scale -4").assert_failed(&["1 to 65535", "not 0"]);
    assert_eq!(service.workers().len(), 4);
    service.stop();
}

#[test]
fn sigttin_adds_a_worker_and_sigttou_removes_one_but_never_the_last() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1", &naive(addr));
    let signal_and_wait = |signal, line: &str| {
        let from = service.log.count();
        service.signal(signal);
        service.wait_for_line_after(from, line);
    };
    signal_and_wait(Signal::SIGTTIN, "scaling done: 2 workers");
    signal_and_wait(Signal::SIGTTIN, "scaling done: 3 workers");
    signal_and_wait(Signal::SIGTTOU, "scaling done: 2 workers");
    signal_and_wait(Signal::SIGTTOU, "scaling done: 1 worker");
    service.signal(Signal::SIGTTOU);
    assert_eq!(status(&service)["slots"], 1); // answered after the signal
    signal_and_wait(Signal::SIGTTIN, "scaling done: 2 workers");
    assert_eq!(service.log.count_of("scaling from"), 5, "{}", service.log.text());
    assert_eq!(service.workers().len(), 2);
    service.stop();
}

#[test]
fn when_a_new_worker_fails_scaling_up_is_undone_and_no_request_fails() {
    let _turn = turn();
    let (addr, folder, mut service) = Service::with_flags("-n 2", &[]);
    let load = Load::start(LoadOptions::new(addr, 8));
    wait_for_answers(&load, 100);
    // The others are ready before it and get connections.
    ["hold-1-4", "broken-1-4"].into_iter().for_each(|flag| folder.raise(flag));
    let scale = begin(&service, "scale 5");
    wait_until("the new workers serve", DEADLINE, || load.snapshot().slots.contains_key(&3));
    folder.lower("hold-1-4");
    let outcome = Outcome::of(scale);
    outcome.assert_failed(&["worker 4", "exited with status 3", "2 workers of generation 1 serve on"]);
    wait_until("the old number of workers", DEADLINE, || service.workers().len() == 2);
    assert_eq!(serving(&service), [(0, 1), (1, 1)]);
    wait_for_answers(&load, 100);
    load.stop().assert_nothing_failed();
    folder.lower("broken-1-4");
    run(&service, "scale 5").assert_done("5 workers of generation 1 serve");
    service.stop();
}

#[test]
fn scaling_during_a_reload_is_queued() {
    let (_, folder, mut service) = Service::with_flags("-n 2", &[]);
    let reload = begin_held(&service, &folder);
    let scale = begin(&service, "scale 3");
    scale.wait_for_output("scaling to 3 workers: queued until the current reload ends");
    folder.lower("hold-2-0");
    Outcome::of(reload).assert_done("of generation 2 serve");
    Outcome::of(scale).assert_done("3 workers of generation 2 serve");
    assert_eq!(serving(&service), [(0, 2), (1, 2), (2, 2)]);
    service.stop();
}

#[test]
fn of_queued_scalings_the_last_is_done_and_each_is_told_its_own_result() {
    let (_, folder, mut service) = Service::with_flags("-n 2", &[]);
    folder.raise("hold-1-2");
    folder.raise("hold-1-3");
    let begun = begin(&service, "scale 3");
    begun.wait_for_output("scaling from 2 to 3");
    let queued = begin(&service, "scale 5");
    queued.wait_for_output("scaling to 5 workers: queued until the scaling ends");
    let last = begin(&service, "scale 4");
    Outcome::of(queued).assert_failed(&["superseded by a scaling to 4 workers"]);
    folder.lower("hold-1-2");
    Outcome::of(begun).assert_done("3 workers of generation 1 serve");
    last.wait_for_output("scaling from 3 to 4");
    assert!(
        last.out.find(0, "4 workers of generation 1 serve").is_none(),
        "it is not done before the worker is ready"
    );
    folder.lower("hold-1-3");
    Outcome::of(last).assert_done("4 workers of generation 1 serve");
    service.stop();
}
