//! `reload`, and how reloads and scalings wait for each other.

use crate::common::{
    DEADLINE, Folder, Outcome, Service, begin, free_address, get, naive, run, status, wait_until,
};
use nix::sys::signal::Signal;

/// Begins a reload to generation 2 whose worker 0 waits until `hold-2-0` is lowered.
pub fn begin_held(service: &Service, folder: &Folder) -> Service {
    folder.raise("hold-2-0");
    let reload = begin(service, "reload");
    reload.wait_for_output("starting generation 2");
    reload
}

#[test]
fn reload_waits_until_the_new_workers_serve_alone_and_exits_with_0() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let before = service.workers();
    let outcome = run(&service, "reload");
    outcome.assert_done("2 workers of generation 2 serve");
    assert!(outcome.out.contains("reload: starting generation 2"), "{outcome:?}");
    assert!(!service.workers().iter().any(|pid| before.contains(pid)), "an old worker is left");
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn a_reload_whose_worker_fails_exits_with_1_and_says_why() {
    let (addr, folder, mut service) = Service::with_flags("-n 2", &[]);
    folder.raise("broken-2-1");
    let outcome = run(&service, "reload");
    outcome.assert_failed(&["worker 1", "exited with status 3 before", "2 workers of generation 1 serve on"]);
    assert_eq!(outcome.err.lines().count(), 1, "{outcome:?}");
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn a_reload_whose_worker_is_not_ready_in_time_exits_with_1_and_says_so() {
    let (addr, folder, mut service) = Service::with_flags("-n 2 --ready-timeout 3s", &[]);
    folder.raise("hold-2-0");
    run(&service, "reload").assert_failed(&["was not ready within 3s", "generation 1 serve on"]);
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn an_abort_exits_with_0_and_the_aborted_reload_with_1() {
    let (addr, folder, mut service) = Service::with_flags("-n 2", &[]);
    let reload = begin_held(&service, &folder);
    run(&service, "reload --abort").assert_done("2 workers of generation 1 serve on");
    Outcome::of(reload).assert_failed(&["aborted", "2 workers of generation 1 serve on"]);
    assert_eq!(get(addr).generation, Some(1));
    run(&service, "reload").assert_done("2 workers of generation 3 serve");
    service.stop();
}

#[test]
fn an_abort_without_a_reload_exits_with_1() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    run(&service, "reload --abort").assert_failed(&["there is no reload to abort"]);
    service.stop();
}

#[test]
fn an_abort_also_ends_the_reload_that_is_queued() {
    let (_, folder, mut service) = Service::with_flags("-n 1", &[]);
    let first = begin_held(&service, &folder);
    let second = begin(&service, "reload");
    second.wait_for_output("reload: queued until the current reload ends");
    run(&service, "reload --abort").assert_done("1 worker of generation 1 serve");
    for waiting in [first, second] {
        Outcome::of(waiting).assert_failed(&["aborted"]);
    }
    run(&service, "reload").assert_done("serve");
    assert_eq!(service.log.count_of("reload: starting"), 2, "{}", service.log.text());
    service.stop();
}

#[test]
fn a_reload_exits_with_1_when_reuse_run_is_killed_during_it() {
    let (_, folder, mut service) = Service::with_flags("-n 1", &[]);
    let reload = begin_held(&service, &folder);
    service.signal(Signal::SIGKILL);
    Outcome::of(reload).assert_failed(&["has ended"]);
    service.wait_exit();
}

#[test]
fn a_reload_exits_with_1_when_everything_is_stopped_during_it() {
    let (_, folder, mut service) = Service::with_flags("-n 1", &[]);
    let reload = begin_held(&service, &folder);
    service.stop();
    Outcome::of(reload).assert_failed(&["everything was stopped"]);
}

#[test]
fn no_wait_returns_when_the_reload_has_begun() {
    let (addr, folder, mut service) = Service::with_flags("-n 1", &[]);
    folder.raise("hold-2-0");
    run(&service, "reload --no-wait").assert_done("reload begun");
    assert_eq!(get(addr).generation, Some(1));
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    service.stop();
}

#[test]
fn timeout_ends_the_wait_and_not_the_reload() {
    let (addr, folder, mut service) = Service::with_flags("-n 1", &[]);
    folder.raise("hold-2-0");
    run(&service, "reload --timeout 200ms").assert_failed(&[
        "200ms",
        "--timeout",
        "continues in the background",
    ]);
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn timeout_promises_nothing_of_a_reuse_run_that_has_not_answered() {
    let (_, _, mut service) = Service::with_flags("-n 1", &[]);
    service.signal(Signal::SIGSTOP);
    let outcome = run(&service, "reload --timeout 200ms");
    service.signal(Signal::SIGCONT);
    let why = format!("process {} has not answered after 200ms (see --timeout)", service.pid());
    outcome.assert_failed(&[&why]);
    assert_eq!(status(&service)["generation"], 1, "it was not read");
    service.stop();
}

#[test]
fn an_interrupt_ends_the_wait_and_not_the_reload() {
    let (addr, folder, mut service) = Service::with_flags("-n 1", &[]);
    let reload = begin_held(&service, &folder);
    reload.signal(Signal::SIGINT);
    let outcome = Outcome::of(reload);
    assert_eq!(outcome.signal, Some(Signal::SIGINT as i32), "{outcome:?}");
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn twenty_reloads_at_once_succeed_by_two() {
    let (_, folder, mut service) = Service::with_flags("-n 2", &[]);
    folder.raise("hold-2-0");
    let reloads: Vec<Service> = (0..20).map(|_| begin(&service, "reload")).collect();
    reloads.iter().for_each(|reload| drop(reload.wait_for_output("reload: ")));
    folder.lower("hold-2-0");
    for reload in reloads {
        assert!(reload.out.count_of("queued until") <= 1, "{}", reload.out.text());
        Outcome::of(reload).assert_done("serve");
    }
    // The reloads that were asked for during the first one were all done by a second one.
    assert_eq!(service.log.count_of("reload: starting"), 2, "{}", service.log.text());
    service.stop();
}

#[test]
fn each_of_20_reloads_at_once_is_told_its_own_result() {
    let (_, folder, mut service) = Service::with_flags("-n 1", &[]);
    ["hold-2-0", "broken-2-0"].into_iter().for_each(|flag| folder.raise(flag));
    let reloads: Vec<Service> = (0..20).map(|_| begin(&service, "reload")).collect();
    reloads.iter().for_each(|reload| drop(reload.wait_for_output("reload: ")));
    folder.lower("hold-2-0");
    let mut failed = 0;
    for reload in reloads {
        let is_first = reload.out.find(0, "reload: starting generation 2").is_some();
        let outcome = Outcome::of(reload);
        if is_first {
            failed += 1;
            outcome.assert_failed(&["exited with status 3", "1 worker of generation 1 serve"]);
        } else {
            outcome.assert_done("1 worker of generation 3 serve");
        }
    }
    assert_eq!(failed, 1, "only the first reload fails: {}", service.log.text());
    assert_eq!(service.log.count_of("reload: starting"), 2, "{}", service.log.text());
    service.stop();
}

#[test]
fn a_reload_before_the_first_generation_is_ready_waits_for_that() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("hold-1-0");
    let mut service = Service::run("-n 1", &folder.server(addr, &[]));
    let mut reload = None;
    wait_until("a reload is accepted", DEADLINE, || {
        let command = begin(&service, "reload");
        wait_until("an answer", DEADLINE, || command.out.count() + command.log.count() > 0);
        let is_accepted = command.out.count() > 0;
        reload = is_accepted.then_some(command);
        is_accepted
    });
    let reload = reload.expect("a reload");
    reload.wait_for_output("reload: queued until the first generation is ready");
    folder.lower("hold-1-0");
    Outcome::of(reload).assert_done("1 worker of generation 2 serve");
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn a_queued_reload_keeps_its_options_when_a_signal_asks_for_another() {
    let (_, folder, mut service) = Service::with_flags("-n 2", &[]);
    let first = begin_held(&service, &folder);
    let queued = begin(&service, "reload --batch 1");
    queued.wait_for_output("reload: queued until the current reload ends");
    service.signal(Signal::SIGUSR2);
    run(&service, "reload --batch 2").assert_failed(&["a reload of another kind is queued"]);
    folder.lower("hold-2-0");
    Outcome::of(first).assert_done("2 workers of generation 2 serve");
    let outcome = Outcome::of(queued);
    outcome.assert_done("2 workers of generation 3 serve");
    assert!(outcome.out.contains("generation 3 serves in 1 of 2 slots"), "{outcome:?}");
    service.stop();
}

#[test]
fn a_reload_during_a_scaling_waits_for_its_end() {
    let (_, folder, mut service) = Service::with_flags("-n 1", &[]);
    folder.raise("hold-1-1");
    let scale = begin(&service, "scale 2");
    scale.wait_for_output("scaling from 1 to 2");
    let reload = begin(&service, "reload");
    reload.wait_for_output("reload: queued until the scaling ends");
    folder.lower("hold-1-1");
    Outcome::of(scale).assert_done("2 workers of generation 1 serve");
    Outcome::of(reload).assert_done("2 workers of generation 2 serve");
    service.stop();
}
