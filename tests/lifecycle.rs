//! How reuse-run starts, reloads and stops: exit statuses, signals, and the environment of a worker.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::load::{self, Load, LoadOptions};
use common::{
    DEADLINE, Deployment, Folder, Process, Service, behind, behind_shell, free_address, get, holds_for,
    naive, naive_with, reuse_run, reuse_run_with, script, send, server, signals_in, wait_until,
};
use nix::sys::signal::Signal;

/// Runs reuse-run until it ends by itself.
#[track_caller]
fn run_to_end(args: &[&str]) -> Output {
    let mut command = reuse_run();
    // If it doesn't end, it must not outlive the tests.
    let output =
        Command::new("timeout").args(["-s", "KILL", "60"]).arg(command.get_program()).args(args).output();
    command.args(args);
    output.unwrap_or_else(|error| panic!("run {command:?}: {error}"))
}

/// Asserts that reuse-run refuses these arguments: the status, one line on stderr with `part`, nothing on stdout.
#[track_caller]
fn assert_refused(args: &[&str], status: i32, part: &str) {
    let output = run_to_end(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {stderr}");
    assert!(stderr.contains(part), "{args:?}: {part:?} is not in {stderr:?}");
    assert_eq!(stderr.lines().filter(|line| !line.trim().is_empty()).count(), 1, "{args:?}: {stderr:?}");
    assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
}

// Errors before a worker is started.

#[test]
fn a_command_that_is_not_found_exits_127() {
    assert_refused(&["--", "no-such-program-anywhere"], 127, "no-such-program-anywhere");
    assert_refused(&["-n", "3", "--", "/no/such/folder/program"], 127, "/no/such/folder/program");
}

#[test]
fn a_command_that_is_not_executable_exits_126() {
    let folder = Folder::new();
    let path = folder.write_with("program", "#!/bin/sh\n", 0o644);
    assert_refused(&["--", &path], 126, &path);
    assert_refused(&["--", "/"], 126, "/");
}

#[test]
fn wrong_arguments_exit_2_with_one_line_that_names_them() {
    let rows: [(&[&str], &str); 13] = [
        (&["--wrokers", "2", "--", "true"], "--wrokers"),
        (&["-x", "--", "true"], "-x"),
        (&[], "command"),
        (&["-n", "2"], "command"),
        (&["-n", "2", "--"], "command"),
        (&["-n", "0", "--", "true"], "workers"),
        (&["-n", "-1", "--", "true"], "workers"),
        (&["-n", "two", "--", "true"], "workers"),
        (&["-n", "", "--", "true"], "workers"),
        (&["-n", "1.5", "--", "true"], "workers"),
        (&["-n", "99999999999999999999", "--", "true"], "workers"),
        (&["--ready", "maybe", "--", "true"], "maybe"),
        (&["--stop-signal", "NOSUCH", "--", "true"], "NOSUCH"),
    ];
    for (arguments, part) in rows {
        assert_refused(arguments, 2, part);
    }
    for option in ["--ready-timeout", "--drain", "--stop-timeout"] {
        for value in ["soon", "5 parsecs", "-1s", ""] {
            assert_refused(&[option, value, "--", "true"], 2, option);
        }
    }
}

#[test]
fn an_option_without_its_value_exits_2() {
    let output = run_to_end(&["--drain"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn version_prints_the_version_and_exits_0() {
    let output = run_to_end(&["--version"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.trim(), format!("reuse-run {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_names_every_option_on_stdout_and_exits_0() {
    let output = run_to_end(&["--help"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    for option in
        ["--workers", "--ready", "--ready-timeout", "--drain", "--stop-timeout", "--stop-signal", "--version"]
    {
        assert!(text.contains(option), "{option} is not in:\n{text}");
    }
}

// The start.

#[test]
fn a_first_worker_that_exits_before_it_is_ready_ends_reuse_run_with_its_status() {
    let addr = free_address();
    // The other workers are ready when this one fails.
    let text = r#"[ $REUSE_RUN_SLOT != 1 ] || { sleep 0.5; exit 7; }; exec "$0" --listen "$1""#;
    let mut service = Service::run("-n 3", &script(text, addr));
    let status = service.wait_end();
    assert_eq!(status.code(), Some(7), "{}", service.log.text());
    assert!(
        service.log.text().contains("exited with status 7 before it was ready"),
        "{}",
        service.log.text()
    );
    assert_eq!(service.descendants(), [0u32; 0], "the other workers are stopped");
}

#[test]
fn a_first_worker_killed_before_it_is_ready_ends_reuse_run_with_128_and_the_signal() {
    let mut service = Service::run("-n 2", &["sh", "-c", "kill -KILL $$"]);
    let status = service.wait_end();
    assert_eq!(status.code(), Some(128 + 9), "{}", service.log.text());
    assert!(
        service.log.text().contains("was killed by SIGKILL before it was ready"),
        "{}",
        service.log.text()
    );
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn a_first_generation_that_is_late_is_stopped_and_reuse_run_exits_with_1() {
    let command = [server(), "--hang".to_owned()];
    let mut service = Service::run("-n 2 --ready-timeout 500ms", &command);
    let status = service.wait_end();
    assert_eq!(status.code(), Some(1), "{}", service.log.text());
    assert!(service.log.text().contains("not ready within 500ms"), "{}", service.log.text());
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn every_line_of_the_log_begins_with_the_name_and_the_pid() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    service.reload();
    let prefix = format!("reuse-run[{}]: ", service.pid());
    service.stop();
    for line in service.log.all() {
        assert!(line.text.starts_with(&prefix), "{:?}", line.text);
    }
}

#[test]
fn reuse_run_log_sets_the_level() {
    let addr = free_address();
    let mut command = reuse_run_with("-n 2", &naive(addr));
    command.env("REUSE_RUN_LOG", "error");
    let mut service = Service::spawn(command);
    wait_until("an answer", DEADLINE, || load::get(addr, "/", Duration::from_secs(5)).is_ok());
    service.stop();
    assert_eq!(service.log.text(), "");
}

#[test]
fn max_workers_are_as_many_as_the_cpus_that_this_process_may_use() {
    let addr = free_address();
    let mut service = Service::run_ready("-n max", &naive(addr));
    let processors = std::thread::available_parallelism().expect("the number of processors").get();
    assert_eq!(service.workers().len(), processors);
    service.stop();
}

#[test]
fn max_workers_obey_the_cpu_affinity() {
    let addr = free_address();
    let taskset = ["taskset", "-c", "0"];
    let mut service = Service::spawn_ready(behind(&taskset, "--workers max", &naive(addr)));
    assert_eq!(service.workers().len(), 1);
    service.stop();
}

// Readiness.

#[test]
fn ready_with_a_duration_means_alive_for_that_long() {
    let addr = free_address();
    let begun = Instant::now();
    let mut service = Service::run("-n 2 --ready 2s", &naive(addr));
    let ready = service.wait_for_line("generation 1 is ready");
    assert!(ready.at - begun >= Duration::from_millis(1900), "{:?}", ready.at - begun);

    let load = Load::start(LoadOptions::new(addr, 4));
    let took = service.reload();
    assert!(took >= Duration::from_millis(1900), "{took:?}");
    let report = load.stop();
    report.assert_nothing_failed();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn a_worker_that_exits_within_the_duration_was_never_ready() {
    let mut service = Service::run("-n 1 --ready 30s", &["sh", "-c", "exit 9"]);
    assert_eq!(service.wait_end().code(), Some(9), "{}", service.log.text());
}

#[test]
fn a_shell_script_may_become_ready_by_ready_fd() {
    let mut service =
        Service::run_ready("-n 2 --ready notify", &["sh", "-c", "echo >&$READY_FD; exec sleep 1000"]);
    service.stop();
}

#[test]
fn without_ready_notify_a_byte_before_the_first_listen_also_means_ready() {
    let mut service = Service::run_ready("-n 2", &["sh", "-c", "echo >&$READY_FD; exec sleep 1000"]);
    service.stop();
}

#[test]
fn closing_ready_fd_without_a_byte_does_not_mean_ready() {
    let text = "eval \"exec $READY_FD>&-\"; exec sleep 1000";
    let mut service = Service::run("-n 1 --ready notify --ready-timeout 1s", &["sh", "-c", text]);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert!(service.log.text().contains("not ready within 1s"), "{}", service.log.text());
}

// The environment of a worker.

#[test]
fn a_worker_has_its_slot_its_generation_and_ready_fd_in_its_environment() {
    let addr = free_address();
    let text = r#"echo "env $REUSE_RUN_GENERATION $REUSE_RUN_SLOT $NODE_APP_INSTANCE $READY_FD"; exec "$0" --listen "$1""#;
    let mut service = Service::run_ready("-n 3", &script(text, addr));
    service.reload();
    service.stop();
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in service.out.all() {
        let Some(rest) = line.text.strip_prefix("env ") else { continue };
        let fields: Vec<&str> = rest.split(' ').collect();
        let [generation, slot, instance, ready_fd] = fields[..] else { panic!("{rest:?}") };
        assert_eq!(slot, instance);
        // dash can only redirect to an fd of one digit.
        assert!((3..=9).contains(&ready_fd.parse::<u32>().expect("a number")), "READY_FD={ready_fd}");
        found.entry(generation.to_owned()).or_default().push(slot.to_owned());
    }
    found.values_mut().for_each(|slots| slots.sort());
    let slots = ["0", "1", "2"].map(str::to_owned).to_vec();
    assert_eq!(found, BTreeMap::from([("1".to_owned(), slots.clone()), ("2".to_owned(), slots)]));
}

#[test]
fn a_worker_inherits_no_descriptor_but_stdio_ready_fd_and_nodes_channel() {
    let addr = free_address();
    // The word "node" in it gets it a channel.
    let text = r#": node; for f in /proc/$$/fd/*; do [ -e "$f" ] && echo "fd ${f##*/}"; done; echo "ready_fd $READY_FD"; echo "channel $NODE_CHANNEL_FD"; exec "$0" --listen "$1""#;
    // reuse-run itself gets some without close-on-exec.
    let starter = r#"exec 7</dev/null 8</dev/null 9</dev/null; exec "$0" "$@""#;
    let mut service = Service::spawn_ready(behind_shell(starter, "-n 2", &script(text, addr)));
    service.reload();
    service.stop();
    let lines: Vec<String> = service.out.all().into_iter().map(|line| line.text).collect();
    let ready_fd = lines.iter().find_map(|line| line.strip_prefix("ready_fd ")).expect("READY_FD");
    let channel = lines.iter().find_map(|line| line.strip_prefix("channel ")).expect("NODE_CHANNEL_FD");
    let expected = ["0", "1", "2", ready_fd, channel];
    let found: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("fd ")).collect();
    for fd in &found {
        assert!(expected.contains(fd), "a worker has descriptor {fd} open: {lines:#?}");
    }
    assert_eq!(found.len(), 4 * expected.len(), "five of each of four workers: {lines:#?}");
}

#[test]
fn a_worker_leads_its_own_process_group_and_reads_nothing_from_stdin() {
    let addr = free_address();
    let text = r#"read line && echo "read something"; echo "end of stdin"; exec "$0" --listen "$1""#;
    let mut service = Service::run_ready("-n 2", &script(text, addr));
    for pid in service.workers() {
        assert_eq!(Process::read(pid).expect("a worker").group, pid);
    }
    service.stop();
    assert_eq!(service.out.count_of("read something"), 0);
    assert_eq!(service.out.count_of("end of stdin"), 2);
}

#[test]
fn a_worker_has_default_dispositions_and_an_empty_mask_even_if_the_starter_ignores_signals() {
    let addr = free_address();
    // As a shell without job control starts its background jobs.
    let starter = r#"trap '' INT QUIT; exec "$0" "$@""#;
    let mut service = Service::spawn_ready(behind_shell(starter, "-n 2", &naive(addr)));
    for pid in service.workers() {
        // pthread_create(3) of the server blocks all signals for a moment.
        wait_until("no signal is blocked", DEADLINE, || signals_in(pid, "SigBlk:").is_empty());
        assert!(!signals_in(pid, "SigIgn:").contains(&Signal::SIGINT), "SIGINT is ignored");
    }
    service.reload();
    service.stop();
}

// The stop.

#[test]
fn sigterm_and_sigint_stop_every_worker_and_reuse_run_exits_with_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut service = Service::run_ready("-n 3", &naive(free_address()));
        service.signal(signal);
        assert_eq!(service.wait_end().code(), Some(0), "{signal}: {}", service.log.text());
        assert!(service.log.text().contains("stopping"), "{signal}: {}", service.log.text());
        assert_eq!(service.descendants(), [0u32; 0], "{signal}");
    }
}

#[test]
fn when_a_worker_has_to_be_killed_reuse_run_exits_with_1() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --stop-timeout 500ms", &naive_with(addr, &["--ignore-int"]));
    let begun = Instant::now();
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert!(
        begun.elapsed() >= Duration::from_millis(450),
        "they had until the time-out: {:?}",
        begun.elapsed()
    );
    assert_eq!(service.out.count_of("ignored SIGINT"), 2, "each got one signal: {}", service.out.text());
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn a_second_sigterm_kills_the_workers_immediately() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --stop-timeout 1h", &naive_with(addr, &["--ignore-int"]));
    service.signal(Signal::SIGTERM);
    wait_until("the first signal at both workers", DEADLINE, || service.out.count_of("ignored SIGINT") == 2);
    let stopping = service.wait_for_line("stopping");
    wait_until("a second", DEADLINE, || stopping.at.elapsed() > Duration::from_secs(1));
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert_eq!(service.out.count_of("ignored SIGINT"), 2);
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn the_stop_signal_can_be_chosen() {
    for name in ["TERM", "SIGTERM"] {
        let addr = free_address();
        let options = format!("-n 2 --stop-signal {name}");
        let mut service = Service::run_ready(&options, &naive_with(addr, &["--ignore-int"]));
        service.stop();
        assert_eq!(service.out.count_of("ignored SIGINT"), 0);
    }
}

#[test]
fn a_stop_during_the_start_leaves_nothing() {
    let mut service = Service::run("-n 2", &[server(), "--hang".to_owned()]);
    wait_until("both workers run", DEADLINE, || service.workers().len() == 2);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(0), "{}", service.log.text());
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn a_stop_during_a_reload_stops_both_generations() {
    let addr = free_address();
    let deployment = Deployment::new(&format!("--listen {addr}"));
    let mut service = Service::run_ready("-n 2", &deployment.command());
    deployment.replace("--hang");
    service.signal(Signal::SIGUSR2);
    wait_until("old and new workers run", DEADLINE, || service.workers().len() == 4);
    service.stop();
}

#[test]
fn processes_that_a_worker_has_started_do_not_outlive_it() {
    let addr = free_address();
    let text = r#"sleep 1000 & echo "helper $!"; exec "$0" --listen "$1""#;
    let mut service = Service::run_ready("-n 2", &script(text, addr));
    service.reload();
    wait_until("the helpers of the old workers are gone", DEADLINE, || service.descendants().len() == 4);
    service.stop();
}

#[test]
fn workers_do_not_outlive_reuse_run_when_that_is_killed() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    assert_eq!(service.descendants().len(), 2);
    service.signal(Signal::SIGKILL);
    service.wait_exit();
    wait_until("the workers are gone", DEADLINE, || service.descendants().is_empty());
}

// The reload.

#[test]
fn sigusr2_during_a_reload_means_one_more_reload_even_if_it_comes_again_and_again() {
    let addr = free_address();
    let command = naive_with(addr, &["--ready-after", "2000"]);
    let mut service = Service::run_ready("-n 2 --ready notify", &command);
    service.signal(Signal::SIGUSR2);
    wait_until("the replacements run", DEADLINE, || service.workers().len() == 4);
    // With pauses, as the kernel merges equal signals that are pending.
    for _ in 0..5 {
        service.signal(Signal::SIGUSR2);
        holds_for("the reload continues", Duration::from_millis(20), || {
            service.log.count_of("reload done") == 0
        });
    }
    wait_until("two reloads are done", DEADLINE, || service.log.count_of("reload done") == 2);
    holds_for("no third reload begins", Duration::from_secs(1), || service.workers().len() <= 2);
    assert_eq!(get(addr).generation, Some(3));
    service.reload();
    assert_eq!(get(addr).generation, Some(4));
    service.stop();
    assert_eq!(service.log.count_of("reload done"), 3);
}

#[test]
fn a_replacement_that_exits_ends_the_reload_and_the_old_workers_serve_on() {
    let addr = free_address();
    let deployment = Deployment::new(&format!("--listen {addr}"));
    let mut service = Service::run_ready("-n 2", &deployment.command());
    let mut before = service.workers();
    let load = Load::start(LoadOptions::new(addr, 4));

    deployment.replace("--hang --exit-after 200 --exit-status 3");
    let log = service.failing_reload();
    assert!(log.contains("exited with status 3 before it was ready"), "{log}");
    wait_until("the replacements are gone", DEADLINE, || service.workers().len() == 2);
    let mut after = service.workers();
    before.sort_unstable();
    after.sort_unstable();
    assert_eq!(before, after);

    // A version that works is accepted.
    deployment.replace(&format!("--listen {addr}"));
    service.reload();
    let origin = get(addr);
    assert!(
        origin.generation > Some(1) && !origin.pid.is_some_and(|pid| before.contains(&pid)),
        "{origin:?}"
    );
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_failed();
    service.stop();
}

#[test]
fn a_replacement_killed_by_a_signal_ends_the_reload() {
    let addr = free_address();
    let deployment = Deployment::new(&format!("--listen {addr}"));
    let mut service = Service::run_ready("-n 2", &deployment.command());
    let before = service.workers();
    deployment.replace("--hang");
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    wait_until("the replacements run", DEADLINE, || service.workers().len() == 4);
    let new = service.workers().into_iter().find(|pid| !before.contains(pid)).expect("a replacement");
    send(new, Signal::SIGKILL);
    service.wait_for_line_after(from, "was killed by SIGKILL before it was ready");
    service.wait_for_line_after(from, "reload abandoned");
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn a_replacement_that_is_late_ends_the_reload_and_is_stopped() {
    let addr = free_address();
    let deployment = Deployment::new(&format!("--listen {addr}"));
    let mut service = Service::run_ready("-n 2 --ready-timeout 2s", &deployment.command());
    let load = Load::start(LoadOptions::new(addr, 4));
    deployment.replace("--hang");
    let log = service.failing_reload();
    assert!(log.contains("was not ready within 2s"), "{log}");
    wait_until("the replacements are gone", DEADLINE, || service.descendants().len() == 2);
    let report = load.stop();
    report.assert_nothing_failed();
    report.assert_generations([1]);
    service.stop();
}

#[test]
fn a_reload_ends_when_the_command_is_missing() {
    let addr = free_address();
    let folder = Folder::new();
    let text = format!("#!/bin/sh\nexec {} --listen {addr}\n", server());
    let path = folder.write_with("program", &text, 0o755);
    let mut service = Service::run_ready("-n 2", &[&path]);
    fs::remove_file(&path).expect("remove the script");
    service.failing_reload();
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn an_old_worker_is_stopped_after_the_drain_and_killed_after_the_stop_timeout() {
    let addr = free_address();
    let command = naive_with(addr, &["--ignore-int"]);
    let service = Service::run_ready("-n 1 --drain 1s --stop-timeout 1s", &command);
    let stuck = std::thread::spawn(move || load::get(addr, "/sleep/60000?id=stuck", Duration::from_secs(70)));
    service.wait_for_output("begun stuck");
    let took = service.reload();
    assert!(took >= Duration::from_millis(1900), "it had the drain and the stop time-out: {took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(service.out.count_of("ignored SIGINT"), 1);
    assert!(stuck.join().expect("the stuck request").is_err());
    assert_eq!(get(addr).generation, Some(2));
}
