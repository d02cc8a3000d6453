//! Workers that fail: they die, also during a reload, can't be restarted, or close their listeners and live on.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::load::{self, Kind, Load, LoadOptions};
use common::{
    DEADLINE, Folder, Service, Waiting, free_address, get, naive, naive_with, python, send, turn,
    wait_for_answers, wait_until,
};
use nix::sys::signal::Signal;

/// How many connections a worker has accepted and not closed, by what it has printed.
fn open_connections(service: &Service, pid: u32) -> usize {
    let count =
        |what: &str| service.out.all().iter().filter(|line| line.text == format!("{what} pid={pid}")).count();
    count("accepted") - count("closed")
}

/// The pid of the worker that listened last in this slot.
fn worker_of_slot(service: &Service, slot: u32) -> u32 {
    let lines = service.out.all();
    let mut of_slot = lines.iter().rev().filter(|line| line.text.ends_with(&format!(" slot={slot}")));
    let line = of_slot.find(|line| line.text.starts_with("listening ")).expect("a worker that listens");
    load::Origin::of(&line.text).pid.expect("a pid")
}

/// Waits until `count` workers have printed that they listen.
fn wait_for_listening(service: &Service, count: usize) {
    wait_until("the workers listen", DEADLINE, || service.out.count_of("listening ") >= count);
}

// Crashes.

#[test]
fn a_worker_that_dies_under_load_fails_only_requests_that_it_had_accepted() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive_with(addr, &["--announce"]));
    let load = Load::start(LoadOptions::new(addr, 8));
    let mut killed = Vec::new();
    for _ in 0..4 {
        wait_for_answers(&load, 100);
        let from = service.log.count();
        let victim = worker_of_slot(&service, 0);
        send(victim, Signal::SIGKILL);
        killed.push(victim);
        service.wait_for_line_after(from, "is ready, a replacement");
        wait_for_listening(&service, 2 + killed.len());
    }
    let report = load.stop();
    service.stop();
    // A killed worker may have accepted one connection more than it had printed.
    let accepted: usize = killed.iter().map(|pid| open_connections(&service, *pid) + 1).sum();
    println!("{report}\naccepted by killed workers: {accepted}");
    assert!(report.counts.failed as usize <= accepted, "killed workers had {accepted}: {report}");
    assert_eq!(report.count(Kind::Refused), 0, "{report}");
    assert_eq!(report.count(Kind::TimeOut), 0, "{report}");
}

#[test]
fn the_accept_queue_of_a_dead_worker_is_served_by_its_replacement() {
    for workers in [1, 2] {
        let (addr, folder) = (free_address(), Folder::new());
        folder.raise("deaf");
        let command = naive_with(addr, &["--deaf-while", &folder.path("deaf")]);
        let mut service = Service::run_ready(&format!("-n {workers}"), &command);
        let clients: Vec<Waiting> = (0..10).map(|_| Waiting::new(addr)).collect();
        let before = service.workers();
        // Stopped first, so that they accept nothing when the flag is lowered.
        before.iter().for_each(|pid| send(*pid, Signal::SIGSTOP));
        folder.lower("deaf");
        assert!(clients.iter().all(Waiting::waits));
        before.iter().for_each(|pid| send(*pid, Signal::SIGKILL));
        for client in clients {
            let origin = client.outcome().expect("an answer");
            assert!(!before.contains(&origin.pid.expect("a pid")), "{origin:?}");
        }
        assert_eq!(service.log.count_of("reset"), 0, "{}", service.log.text());
        service.stop();
    }
}

#[test]
fn no_connection_goes_to_a_dead_slot_while_another_worker_is_ready() {
    let (addr, folder, mut service) = Service::with_flags("-n 2", &[]);
    wait_for_listening(&service, 2);
    folder.raise("broken-1-1");
    send(worker_of_slot(&service, 1), Signal::SIGKILL);
    service.wait_for_line("SIGKILL");
    wait_until("two failed starts", DEADLINE, || service.out.count_of("broken 1-1") >= 2);
    for _ in 0..50 {
        let begun = Instant::now();
        assert_eq!(get(addr).slot, Some(0));
        // A SYN that was dropped is sent again after a second.
        assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
    }
    folder.lower("broken-1-1");
    wait_until("the slot serves again", DEADLINE, || get(addr).slot == Some(1));
    service.stop();
}

#[test]
fn the_first_restart_is_immediate_and_later_ones_wait_100_ms_and_then_twice_as_long_each_time() {
    let (addr, folder, mut service) = Service::with_flags("-n 1", &[]);
    folder.raise("broken-1-0");
    let killed_at = SystemTime::now();
    send(service.workers()[0], Signal::SIGKILL);
    wait_until("five failed starts", DEADLINE, || service.out.count_of("broken 1-0") >= 5);
    let stamp = |line: &str| {
        let nanoseconds = line.strip_prefix("broken 1-0 ")?.parse().ok()?;
        let at = UNIX_EPOCH + Duration::from_nanos(nanoseconds);
        at.duration_since(killed_at).ok()
    };
    let starts: Vec<Duration> = service.out.all().iter().filter_map(|line| stamp(&line.text)).collect();
    for (start, earliest) in starts.iter().zip([0, 100, 300, 700, 1500]) {
        assert!(*start >= Duration::from_millis(earliest), "{starts:?}");
    }
    folder.lower("broken-1-0");
    service.wait_for_line("is ready, a replacement");
    get(addr);
    service.stop();
}

#[test]
fn when_a_slot_is_down_for_more_than_2_s_its_accept_queue_is_reset_and_the_log_says_so() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("deaf");
    let mut service = Service::run_ready(
        "-n 1 --max-failures 0",
        &folder.server(addr, &["--deaf-while", &folder.path("deaf")]),
    );
    let clients: Vec<Waiting> = (0..3).map(|_| Waiting::new(addr)).collect();
    folder.raise("broken-1-0");
    let killed_at = Instant::now();
    send(service.workers()[0], Signal::SIGKILL);
    clients.into_iter().for_each(Waiting::assert_reset);
    assert!(killed_at.elapsed() >= Duration::from_secs(2), "{:?}", killed_at.elapsed());
    let line = service.wait_for_line("reset");
    assert!(line.text.contains("3 connections") && line.text.contains(&addr.to_string()), "{line:?}");
    // New connections are reset as well while it is down.
    let failure = load::get(addr, "/", DEADLINE).expect_err("no worker that answers");
    assert_eq!(failure.kind, Kind::Reset, "{failure:?}");

    folder.lower("deaf");
    folder.lower("broken-1-0");
    service.wait_for_line("is ready, a replacement");
    assert_eq!(get(addr).slot, Some(0));
    service.stop();
}

// Giving up.

#[test]
fn when_no_worker_is_ready_and_max_failures_starts_have_failed_it_exits_with_the_last_status() {
    for (options, workers, failures) in [("-n 5", 5, 10), ("-n 1 --max-failures 3", 1, 3)] {
        let (_, folder, mut service) = Service::with_flags(options, &[]);
        wait_for_listening(&service, workers);
        (0..workers).for_each(|slot| folder.raise(&format!("broken-1-{slot}")));
        service.workers().into_iter().for_each(|pid| send(pid, Signal::SIGKILL));
        assert_eq!(service.wait_end().code(), Some(3), "{options}: {}", service.log.text());
        for part in ["giving up", "--max-failures"] {
            assert!(service.log.text().contains(part), "{options}: no {part:?} in {}", service.log.text());
        }
        // When the last of them has failed, the other slots may have a worker that starts.
        let started = service.out.count_of("broken ");
        assert!(
            (failures..failures + workers).contains(&started),
            "{options}: {started}: {}",
            service.log.text()
        );
        assert_eq!(service.descendants(), [0u32; 0], "{options}");
    }
}

#[test]
fn with_max_failures_0_it_never_gives_up() {
    let (addr, folder, mut service) = Service::with_flags("-n 4 --max-failures 0", &[]);
    wait_for_listening(&service, 4);
    (0..4).for_each(|slot| folder.raise(&format!("broken-1-{slot}")));
    service.workers().into_iter().for_each(|pid| send(pid, Signal::SIGKILL));
    wait_until("more than ten failed starts", DEADLINE, || service.out.count_of("broken ") > 12);
    (0..4).for_each(|slot| folder.lower(&format!("broken-1-{slot}")));
    wait_until("four replacements", DEADLINE, || service.log.count_of("is ready, a replacement") == 4);
    get(addr);
    service.stop();
}

#[test]
fn it_does_not_give_up_while_a_worker_is_ready() {
    let (addr, folder, mut service) = Service::with_flags("-n 2 --max-failures 2", &[]);
    wait_for_listening(&service, 2);
    folder.raise("broken-1-1");
    send(worker_of_slot(&service, 1), Signal::SIGKILL);
    wait_until("twice as many failed starts", DEADLINE, || service.out.count_of("broken 1-1") >= 4);
    assert_eq!(get(addr).slot, Some(0));
    folder.lower("broken-1-1");
    service.wait_for_line("is ready, a replacement");
    service.stop();
}

// During a reload.

/// Two workers, and a reload whose new workers wait until their flags `hold-2-0` and `hold-2-1` are lowered.
fn held_reload(options: &str, more: &[&str]) -> (SocketAddr, Folder, Service) {
    let (addr, folder, service) = Service::with_flags(options, more);
    wait_for_listening(&service, 2);
    folder.raise("hold-2-0");
    folder.raise("hold-2-1");
    service.signal(Signal::SIGUSR2);
    wait_until("old and new workers run", DEADLINE, || service.workers().len() == 4);
    (addr, folder, service)
}

fn finish_held_reload(service: &Service, folder: &Folder) {
    folder.lower("hold-2-0");
    folder.lower("hold-2-1");
    service.wait_for_line("reload done");
}

fn new_workers(service: &Service) -> Vec<u32> {
    let old = [worker_of_slot(service, 0), worker_of_slot(service, 1)];
    service.workers().into_iter().filter(|pid| !old.contains(pid)).collect()
}

#[test]
fn an_old_worker_that_dies_while_the_new_ones_start_is_restarted_and_the_reload_continues() {
    let (addr, folder, mut service) = held_reload("-n 2", &[]);
    send(worker_of_slot(&service, 0), Signal::SIGKILL);
    service.wait_for_line("is ready, a replacement");
    assert_eq!(get(addr).generation, Some(1));
    finish_held_reload(&service, &folder);
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn old_workers_that_all_die_while_the_new_ones_start_are_restarted_and_the_reload_continues() {
    let (addr, folder, mut service) = held_reload("-n 2", &[]);
    send(worker_of_slot(&service, 0), Signal::SIGKILL);
    send(worker_of_slot(&service, 1), Signal::SIGKILL);
    wait_until("both old workers are dead", DEADLINE, || service.log.count_of("was killed by SIGKILL") == 2);
    assert_eq!(get(addr).generation, Some(1), "the connection waits for a restarted worker");
    finish_held_reload(&service, &folder);
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn a_slot_that_is_down_at_the_switch_is_taken_over_by_its_new_worker() {
    let (addr, folder, mut service) = held_reload("-n 2 --max-failures 0", &[]);
    folder.raise("broken-1-0");
    folder.raise("broken-1-1");
    send(worker_of_slot(&service, 0), Signal::SIGKILL);
    send(worker_of_slot(&service, 1), Signal::SIGKILL);
    wait_until("failed restarts", DEADLINE, || service.out.count_of("broken 1-") >= 4);
    finish_held_reload(&service, &folder);
    assert_eq!(get(addr).generation, Some(2));
    service.reload();
    service.reload();
    // A restart that the switch has stopped may have written its line; what follows comes after its end.
    for generation in [3, 4] {
        service.wait_for_output(&format!("generation={generation}"));
    }
    let lines = service.out.all().into_iter().skip_while(|line| !line.text.contains("generation=3"));
    let broken = lines.filter(|line| line.text.contains("broken"));
    assert_eq!(broken.count(), 0, "a worker of generation 1 was started again");
    service.stop();
}

#[test]
fn a_new_worker_that_dies_while_it_starts_ends_the_reload() {
    let (addr, _folder, mut service) = held_reload("-n 2", &[]);
    let new = new_workers(&service);
    send(new[0], Signal::SIGKILL);
    service
        .wait_for_line("was killed by SIGKILL before it was ready; reload abandoned, generation 1 serves on");
    wait_until("the other one is stopped", DEADLINE, || service.workers().len() == 2);
    assert_eq!(get(addr).generation, Some(1));
    service.reload();
    assert_eq!(get(addr).generation, Some(3));
    service.stop();
}

#[test]
fn a_ready_new_worker_that_dies_before_all_are_ready_ends_the_reload() {
    let (addr, folder, mut service) = held_reload("-n 2", &[]);
    folder.lower("hold-2-0");
    wait_for_listening(&service, 3);
    send(worker_of_slot(&service, 0), Signal::SIGKILL);
    service.wait_for_line("reload abandoned, generation 1 serves on");
    wait_until("the other one is stopped", DEADLINE, || service.workers().len() == 2);
    for _ in 0..10 {
        assert_eq!(get(addr).generation, Some(1));
    }
    service.reload();
    assert_eq!(get(addr).generation, Some(3));
    service.stop();
}

#[test]
fn an_old_worker_that_dies_while_it_drains_is_not_restarted_and_the_reload_ends() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --drain 1h", &naive(addr));
    let slow = std::thread::spawn(move || load::get(addr, "/sleep/60000?id=slow", DEADLINE));
    service.wait_for_output("begun slow");
    let old = service.workers()[0];
    service.signal(Signal::SIGUSR2);
    service.wait_for_line("generation 1 drains");
    send(old, Signal::SIGKILL);
    service.wait_for_line("was killed by SIGKILL while it drained");
    service.wait_for_line("reload done");
    assert!(slow.join().expect("the slow request").is_err());
    assert_eq!(service.out.count_of("generation=1"), 1, "{}", service.out.text());
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn a_new_worker_that_dies_while_the_old_one_drains_is_restarted_and_the_reload_ends() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --drain 1h", &naive(addr));
    let slow = std::thread::spawn(move || load::get(addr, "/sleep/3000?id=slow", DEADLINE));
    service.wait_for_output("begun slow");
    service.signal(Signal::SIGUSR2);
    service.wait_for_line("generation 1 drains");
    let new = get(addr);
    assert_eq!(new.generation, Some(2));
    send(new.pid.expect("a pid"), Signal::SIGKILL);
    service.wait_for_line("is ready, a replacement");
    assert_eq!(slow.join().expect("the slow request").expect("its answer").origin.generation, Some(1));
    service.wait_for_line("reload done");
    let again = get(addr);
    assert!(again.generation == Some(2) && again.pid != new.pid, "{again:?}");
    service.stop();
}

#[test]
fn an_old_worker_that_dies_while_a_reload_is_abandoned_is_restarted() {
    let (addr, folder) = (free_address(), Folder::new());
    // They ignore the stop signal, so that the new ones live until the stop time-out.
    let more = ["--ignore-int", "--ready-after", "0"];
    let mut service = Service::run_ready(
        "-n 2 --ready notify --stop-timeout 3s --ready-timeout 60s",
        &folder.server(addr, &more),
    );
    wait_for_listening(&service, 2);
    folder.raise("broken-2-1");
    folder.raise("hold-2-1");
    service.signal(Signal::SIGUSR2);
    wait_for_listening(&service, 3);
    let new = worker_of_slot(&service, 0);
    folder.lower("hold-2-1");
    service.wait_for_line("reload abandoned, generation 1 serves on");
    service.signal(Signal::SIGUSR2);
    service.wait_for_line("reload: queued until the workers of the failed operation have ended");
    let old: Vec<u32> = service.workers().into_iter().filter(|pid| *pid != new).collect();
    old.iter().for_each(|pid| send(*pid, Signal::SIGKILL));
    wait_until("two replacements", DEADLINE, || service.log.count_of("is ready, a replacement") == 2);
    assert_eq!(get(addr).generation, Some(1));
    // The queued reload begins when the failed one is over.
    service.wait_for_line("generation 3 serves");
    service.wait_for_line("reload done");
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(1), "they ignore the signal: {}", service.log.text());
}

#[test]
fn sigterm_while_new_workers_start_stops_all_workers() {
    let (_addr, _folder, mut service) = held_reload("-n 2", &[]);
    service.stop();
    assert!(service.log.text().contains("SIGTERM: stopping 4 workers"), "{}", service.log.text());
}

#[test]
fn sigterm_while_old_workers_drain_stops_all_workers() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --drain 1h", &naive(addr));
    let slow = std::thread::spawn(move || load::get(addr, "/sleep/60000?id=slow", DEADLINE));
    service.wait_for_output("begun slow");
    service.signal(Signal::SIGUSR2);
    service.wait_for_line("generation 1 drains");
    service.stop();
    assert!(service.log.text().contains("SIGTERM: stopping 2 workers"), "{}", service.log.text());
    assert!(slow.join().expect("the slow request").is_err());
}

#[test]
fn sigterm_while_a_reload_is_abandoned_stops_all_workers() {
    let (addr, folder) = (free_address(), Folder::new());
    let more = ["--ignore-int", "--ready-after", "0"];
    let mut service =
        Service::run_ready("-n 2 --ready notify --stop-timeout 2s", &folder.server(addr, &more));
    wait_for_listening(&service, 2);
    folder.raise("broken-2-1");
    folder.raise("hold-2-1");
    service.signal(Signal::SIGUSR2);
    wait_for_listening(&service, 3);
    folder.lower("hold-2-1");
    service.wait_for_line("reload abandoned");
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(1), "they ignore the signal: {}", service.log.text());
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn sigterm_while_the_only_worker_is_down_exits_with_0() {
    let (_addr, folder, mut service) = Service::with_flags("-n 1 --max-failures 0", &[]);
    folder.raise("broken-1-0");
    send(service.workers()[0], Signal::SIGKILL);
    wait_until("failed restarts", DEADLINE, || service.out.count_of("broken 1-") >= 4);
    service.stop();
}

#[test]
fn sigusr2_before_the_first_generation_is_ready_reloads_as_soon_as_it_is() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("hold-1-1");
    let mut service = Service::run("-n 2", &folder.server(addr, &[]));
    wait_for_listening(&service, 1);
    service.signal(Signal::SIGUSR2);
    service.wait_for_line("reload: queued until the first generation is ready");
    assert_eq!(service.workers().len(), 2, "no worker of generation 2 runs yet");
    folder.lower("hold-1-1");
    service.wait_for_line("generation 1 is ready");
    service.wait_for_line("reload done");
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn sigusr2_during_a_stop_is_refused_in_the_log() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --stop-timeout 1s", &naive_with(addr, &["--ignore-int"]));
    service.signal(Signal::SIGTERM);
    service.wait_for_line("SIGTERM: stopping");
    service.signal(Signal::SIGUSR2);
    service.wait_for_line("the signal is ignored: reuse-run is stopping");
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert_eq!(service.out.count_of("generation=2"), 0);
    assert_eq!(service.descendants(), [0u32; 0]);
}

// A worker that closes its listener and lives on.

/// Two workers, which close their listeners while `close-0` and `close-1` are raised.
fn closing_workers() -> (SocketAddr, Folder, Service) {
    let (addr, folder) = (free_address(), Folder::new());
    let worker = python("closes.py", &[&addr.port().to_string(), &folder.path("")]);
    let service = Service::run_ready("-n 2", &worker);
    (addr, folder, service)
}

#[test]
fn a_worker_that_closes_its_listener_gets_no_more_connections_and_its_accept_queue_is_reset() {
    let (addr, folder, mut service) = closing_workers();
    folder.raise("close-1");
    service.wait_for_output("closed 1");
    // Connects until a client comes to the closed listener. The other worker answers all others.
    wait_until("a client of the closed listener is reset", DEADLINE, || match Waiting::new(addr).outcome() {
        Ok(origin) => {
            assert_eq!(origin.slot, Some(0));
            false
        }
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    });
    service.wait_for_line("has stopped listening on");
    for _ in 0..50 {
        let begun = Instant::now();
        assert_eq!(get(addr).slot, Some(0));
        assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
    }
    folder.lower("close-1");
    service.wait_for_output("opened 1");
    wait_until("it serves again", DEADLINE, || get(addr).slot == Some(1));
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn when_all_workers_have_closed_an_address_it_is_refused_until_one_listens_again() {
    let (addr, folder, mut service) = closing_workers();
    folder.raise("close-0");
    folder.raise("close-1");
    service.wait_for_output("closed 0");
    service.wait_for_output("closed 1");
    let workers = service.workers();
    let mut clients = Vec::new();
    wait_until("it is refused", DEADLINE, || {
        let connected = TcpStream::connect_timeout(&addr, Duration::from_millis(200));
        let refused =
            matches!(&connected, Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused);
        clients.extend(connected);
        refused
    });
    // The log says so a moment later.
    wait_until("two lines in the log", DEADLINE, || service.log.count_of("has stopped listening on") == 2);
    assert_eq!(service.workers(), workers, "the workers live on");

    folder.lower("close-0");
    service.wait_for_output("opened 0");
    assert_eq!(get(addr).slot, Some(0));
    folder.lower("close-1");
    service.wait_for_output("opened 1");
    wait_until("both serve again", DEADLINE, || get(addr).slot == Some(1));
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}
