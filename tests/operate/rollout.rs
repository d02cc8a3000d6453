//! `reload --batch` and `reload --canary`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::load::{Load, LoadOptions};
use crate::common::{
    DEADLINE, Outcome, Service, all_children, begin, free_address, get, naive, run, send, serving, turn,
    wait_for_answers, wait_until, workers_where,
};

/// Counts the workers of a reuse-run, and keeps the highest number.
struct MostChildren {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<usize>>,
}

impl MostChildren {
    fn watch(service: &Service) -> MostChildren {
        let (stop, pid) = (Arc::new(AtomicBool::new(false)), service.pid());
        // A process in which reuse-run does what may wait has the name of that one at first, and none at its end.
        let is_worker = |pid: &u32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            !name.is_empty() && !name.starts_with("reuse-run")
        };
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut most = 0;
            while !stopped.load(Ordering::Relaxed) {
                most = most.max(all_children(pid).into_iter().filter(is_worker).count());
                thread::sleep(Duration::from_millis(1));
            }
            most
        });
        MostChildren { stop, thread: Some(thread) }
    }

    fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("a thread").join().expect("the highest number")
    }
}

impl Drop for MostChildren {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Reloads 4 workers under load, and asserts that no request fails. Returns the highest number of workers at once.
#[track_caller]
fn roll(options: &str, reload: impl FnOnce(&Service)) -> usize {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready(&format!("-n 4 {options}"), &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 8));
    wait_for_answers(&load, 100);
    let most = MostChildren::watch(&service);
    reload(&service);
    let most = most.stop();
    assert_eq!(serving(&service), [(0, 2), (1, 2), (2, 2), (3, 2)]);
    wait_for_answers(&load, 100);
    load.stop().assert_nothing_failed();
    service.stop();
    most
}

#[test]
fn in_batches_no_request_fails_and_there_is_one_batch_of_workers_more_at_most() {
    for batch in [1, 2] {
        let most = roll("", |service| {
            run(service, &format!("reload --batch {batch}")).assert_done("4 workers of generation 2 serve");
        });
        assert_eq!(most, 4 + batch);
    }
}

#[test]
fn the_option_batch_holds_for_a_reload_by_signal() {
    let most = roll("--batch 1", |service| {
        service.reload();
    });
    assert_eq!(most, 5);
}

#[test]
fn a_new_worker_that_dies_after_its_batch_ends_the_reload() {
    let (_, folder, mut service) = Service::with_flags("-n 2", &[]);
    folder.raise("hold-2-1");
    let reload = begin(&service, "reload --batch 1");
    reload.wait_for_output("generation 2 serves in 1 of 2 slots");
    let new = workers_where(&service, |worker| worker["generation"] == 2 && worker["slot"] == 0);
    send(new[0]["pid"].as_u64().expect("a pid") as u32, Signal::SIGKILL);
    Outcome::of(reload)
        .assert_failed(&["was killed by SIGKILL", "1 worker of generation 2 and 1 of generation 1"]);
    assert_eq!(serving(&service), [(0, 2), (1, 1)]);
    service.wait_for_line("is ready, a replacement");
    folder.lower("hold-2-1");
    service.stop();
}

#[test]
fn a_failure_in_the_second_batch_leaves_two_generations_until_the_next_reload() {
    let (addr, folder, mut service) = Service::with_flags("-n 4", &[]);
    folder.raise("broken-2-2");
    let outcome = run(&service, "reload --batch 2");
    let both = "2 workers of generation 2 and 2 of generation 1 serve on";
    outcome.assert_failed(&["worker 2", "exited with status 3", both]);
    assert_eq!(serving(&service), [(0, 2), (1, 2), (2, 1), (3, 1)]);
    let shown = run(&service, "status");
    assert_eq!(shown.code, Some(0), "{shown:?}");
    assert!(shown.out.contains("last reload: generation 2") && shown.out.contains("failed"), "{shown:?}");
    for slot in [1, 2] {
        wait_until("both generations answer", DEADLINE, || get(addr).slot == Some(slot));
    }
    run(&service, "reload").assert_done("4 workers of generation 3 serve");
    assert_eq!(serving(&service), [(0, 3), (1, 3), (2, 3), (3, 3)]);
    service.stop();
}

#[test]
fn an_abort_between_batches_keeps_the_workers_that_serve() {
    let (_, folder, mut service) = Service::with_flags("-n 2", &[]);
    folder.raise("hold-2-1");
    let reload = begin(&service, "reload --batch 1");
    wait_until("the first worker is replaced", DEADLINE, || serving(&service) == [(0, 2), (1, 1)]);
    let aborted = run(&service, "reload --abort");
    aborted.assert_done("1 worker of generation 2 and 1 of generation 1 serve on");
    Outcome::of(reload).assert_failed(&["aborted", "1 worker of generation 2 and 1 of generation 1"]);
    assert_eq!(serving(&service), [(0, 2), (1, 1)]);
    wait_until("the replaced worker and the abandoned new one have ended", DEADLINE, || {
        service.workers().len() == 2
    });
    send(service.workers()[0], Signal::SIGKILL);
    service.wait_for_line("is ready, a replacement");
    assert_eq!(serving(&service), [(0, 2), (1, 1)], "each slot keeps its generation");
    service.stop();
}

#[test]
fn canaries_get_their_share_of_new_connections_evenly_and_at_an_abort_no_request_fails() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 4", &naive(addr));
    let reload = begin(&service, "reload --canary 10 --for 100s");
    reload.wait_for_output("generation 2 gets 10 % of new connections");
    let load = Load::start(LoadOptions::new(addr, 8));
    wait_for_answers(&load, 10_000);
    let counts = load.snapshot();
    run(&service, "reload --abort").assert_done("4 workers of generation 1 serve on");
    Outcome::of(reload).assert_failed(&["aborted", "4 workers of generation 1 serve on"]);
    let switched = load.snapshot().generations.get(&2).copied();
    wait_for_answers(&load, 100);
    assert_eq!(
        load.snapshot().generations.get(&2).copied(),
        switched,
        "the old workers get all connections again"
    );
    load.stop().assert_nothing_failed();

    let of_generation = |number: u32| counts.generations.get(&number).copied().unwrap_or(0);
    let share = of_generation(2) as f64 * 100.0 / counts.answered as f64;
    assert!((8.0..=12.0).contains(&share), "{share} %: {counts:?}");
    let mut each: Vec<u64> = counts.pids.into_values().collect();
    each.sort_unstable();
    assert_eq!(each.len(), 8, "{each:?}");
    for workers in [&each[..4], &each[4..]] {
        let mean = workers.iter().sum::<u64>() as f64 / 4.0;
        let is_even = |count: &u64| (0.7..=1.3).contains(&(*count as f64 / mean));
        assert!(workers.iter().all(is_even), "{each:?}");
    }
    service.stop();
}

#[test]
fn canaries_that_live_get_all_connections_in_the_end_and_no_request_fails() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 8));
    wait_for_answers(&load, 100);
    run(&service, "reload --canary 10 --for 500ms").assert_done("2 workers of generation 2 serve");
    let before = load.snapshot().generations.get(&1).copied();
    wait_for_answers(&load, 100);
    let report = load.stop();
    report.assert_nothing_failed();
    assert_eq!(report.counts.generations.get(&1).copied(), before, "{report}");
    assert_eq!(serving(&service), [(0, 2), (1, 2)]);
    service.stop();
}

#[test]
fn a_canary_that_dies_ends_the_reload_and_the_old_workers_get_all_connections() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let reload = begin(&service, "reload --canary 50 --for 100s");
    reload.wait_for_output("generation 2 gets 50 % of new connections");
    wait_until("a canary answers", DEADLINE, || get(addr).generation == Some(2));
    let canaries = workers_where(&service, |worker| worker["generation"] == 2);
    assert!(canaries.iter().all(|worker| worker["serves"] == false), "{canaries:?}");
    send(canaries[1]["pid"].as_u64().expect("a pid") as u32, Signal::SIGKILL);
    Outcome::of(reload).assert_failed(&["worker 1", "SIGKILL", "2 workers of generation 1 serve on"]);
    for _ in 0..50 {
        assert_eq!(get(addr).generation, Some(1));
    }
    service.stop();
}
