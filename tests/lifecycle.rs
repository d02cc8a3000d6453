//! How reuse-run starts, stops, replaces and gives up: exit codes, signals, what a worker finds.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::load::{self, Load, LoadOptions};
use common::{
    DEADLINE, Deployment, Process, Service, arguments, free_address, holds_for, reuse_run, server, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn naive(addr: SocketAddr) -> Vec<String> {
    naive_with(addr, &[])
}

fn naive_with(addr: SocketAddr, more: &[&str]) -> Vec<String> {
    let addr = addr.to_string();
    let command = [&server(), "--listen", addr.as_str()].map(str::to_owned);
    command.into_iter().chain(more.iter().map(|arg| (*arg).to_owned())).collect()
}

/// A shell script as a worker's command; `$0` is the test server and `$1` the address to listen on.
fn script(text: &str, addr: SocketAddr) -> Vec<String> {
    ["sh", "-c", text, &server(), &addr.to_string()].map(str::to_owned).to_vec()
}

fn get(addr: SocketAddr) -> load::Origin {
    match load::get(addr, "/", Duration::from_secs(15)) {
        Ok(answer) => answer.origin,
        Err(failure) => panic!("GET / from {addr}: {failure:?}"),
    }
}

/// Runs reuse-run to its end, which must come by itself.
#[track_caller]
fn run_to_end(args: &[&str]) -> Output {
    let mut command = reuse_run();
    // A process that should have ended is not to outlive the test run.
    let output =
        Command::new("timeout").args(["-s", "KILL", "60"]).arg(command.get_program()).args(args).output();
    command.args(args);
    output.unwrap_or_else(|error| panic!("run {command:?}: {error}"))
}

/// Bad input: the status, one clear line on stderr with `part` in it, and nothing on stdout.
#[track_caller]
fn assert_refused(args: &[&str], status: i32, part: &str) {
    let output = run_to_end(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {stderr}");
    assert!(stderr.contains(part), "{args:?}: {part:?} is not in {stderr:?}");
    assert_eq!(stderr.lines().filter(|line| !line.trim().is_empty()).count(), 1, "{args:?}: {stderr:?}");
    assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
}

// What is wrong is said before anything is started.

#[test]
fn a_command_that_is_not_found_exits_127() {
    assert_refused(&["--", "no-such-program-anywhere"], 127, "no-such-program-anywhere");
    assert_refused(&["-n", "3", "--", "/no/such/folder/program"], 127, "/no/such/folder/program");
}

#[test]
fn a_command_that_is_not_executable_exits_126() {
    let path = std::env::temp_dir().join(format!("reuse-run-test-{}-not-executable", std::process::id()));
    fs::write(&path, "#!/bin/sh\n").expect("write a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
    let name = path.display().to_string();
    assert_refused(&["--", &name], 126, &name);
    fs::remove_file(&path).expect("remove the file");
    assert_refused(&["--", "/"], 126, "/");
}

#[test]
fn an_unknown_option_exits_2_and_is_named() {
    assert_refused(&["--wrokers", "2", "--", "true"], 2, "--wrokers");
    assert_refused(&["-x", "--", "true"], 2, "-x");
}

#[test]
fn a_missing_command_exits_2() {
    assert_refused(&[], 2, "command");
    assert_refused(&["-n", "2"], 2, "command");
    assert_refused(&["-n", "2", "--"], 2, "command");
}

#[test]
fn a_bad_number_of_workers_exits_2() {
    for count in ["0", "-1", "two", "", "1.5", "99999999999999999999"] {
        assert_refused(&["-n", count, "--", "true"], 2, "workers");
    }
}

#[test]
fn a_bad_duration_exits_2_and_names_its_option() {
    for option in ["--ready-timeout", "--drain", "--stop-timeout"] {
        for value in ["soon", "5 parsecs", "-1s", ""] {
            assert_refused(&[option, value, "--", "true"], 2, option);
        }
    }
}

#[test]
fn a_bad_kind_of_readiness_exits_2() {
    assert_refused(&["--ready", "maybe", "--", "true"], 2, "maybe");
}

#[test]
fn a_bad_stop_signal_exits_2() {
    assert_refused(&["--stop-signal", "NOSUCH", "--", "true"], 2, "NOSUCH");
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
fn a_first_worker_that_exits_before_it_is_ready_ends_the_start_with_its_status() {
    let addr = free_address();
    // The others are up and ready when it fails.
    let text = r#"[ $REUSE_RUN_SLOT != 1 ] || { sleep 0.5; exit 7; }; exec "$0" --listen "$1""#;
    let mut service = Service::run("-n 3", &script(text, addr));
    let status = service.wait_end();
    assert_eq!(status.code(), Some(7), "{}", service.log.text());
    assert!(
        service.log.text().contains("exited with status 7 before it was ready"),
        "{}",
        service.log.text()
    );
    assert_eq!(service.descendants(), [0u32; 0], "the others were stopped");
}

#[test]
fn a_first_worker_killed_before_it_is_ready_ends_the_start_with_128_and_the_signal() {
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
fn a_first_generation_that_is_late_is_stopped_and_exits_1() {
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
fn rust_log_sets_the_level() {
    let addr = free_address();
    let mut command = reuse_run();
    command.args(arguments("-n 2", &naive(addr))).env("RUST_LOG", "error");
    let mut service = Service::spawn(command);
    wait_until("an answer", DEADLINE, || load::get(addr, "/", Duration::from_secs(5)).is_ok());
    service.stop();
    assert_eq!(service.log.text(), "");
}

#[test]
fn max_workers_are_as_many_as_this_process_may_use_processors() {
    let addr = free_address();
    let mut service = Service::run_ready("-n max", &naive(addr));
    let processors = std::thread::available_parallelism().expect("the number of processors").get();
    assert_eq!(service.workers().len(), processors);
    service.stop();
}

#[test]
fn max_workers_follow_the_affinity() {
    let addr = free_address();
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]).arg(reuse_run().get_program()).args(arguments("--workers max", &naive(addr)));
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    assert_eq!(service.workers().len(), 1);
    service.stop();
}

// Readiness.

#[test]
fn ready_after_a_duration_means_alive_that_long() {
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
fn a_shell_says_ready_through_ready_fd() {
    let mut service =
        Service::run_ready("-n 2 --ready notify", &["sh", "-c", "echo >&$READY_FD; exec sleep 1000"]);
    service.stop();
}

#[test]
fn the_byte_counts_before_the_first_listen_too() {
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

// What a worker finds.

#[test]
fn a_worker_finds_its_slot_its_generation_and_ready_fd_in_its_environment() {
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
        // A shell like dash redirects to a number of one digit only.
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
    // It says "node" to get its channel.
    let text = r#": node; for f in /proc/$$/fd/*; do [ -e "$f" ] && echo "fd ${f##*/}"; done; echo "ready_fd $READY_FD"; echo "channel $NODE_CHANNEL_FD"; exec "$0" --listen "$1""#;
    // The wrapper itself is given some that nobody marked close-on-exec.
    let mut command = Command::new("sh");
    command.args(["-c", r#"exec 7</dev/null 8</dev/null 9</dev/null; exec "$0" "$@""#]);
    command.arg(reuse_run().get_program()).args(arguments("-n 2", &script(text, addr)));
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
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
    assert_eq!(found.len(), 4 * expected.len(), "four workers have five each: {lines:#?}");
}

#[test]
fn a_worker_leads_its_own_process_group_and_reads_nothing_from_stdin() {
    let addr = free_address();
    let text = r#"read line && echo "read something"; echo "end of stdin"; exec "$0" --listen "$1""#;
    let mut command = reuse_run();
    command.args(arguments("-n 2", &script(text, addr)));
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    for pid in service.workers() {
        assert_eq!(Process::read(pid).expect("a worker").group, pid);
    }
    service.stop();
    assert_eq!(service.out.count_of("read something"), 0);
    assert_eq!(service.out.count_of("end of stdin"), 2);
}

#[test]
fn a_worker_has_the_default_disposition_and_an_empty_mask_whatever_the_starter_ignored() {
    let addr = free_address();
    // As a shell without job control starts its background jobs.
    let mut command = Command::new("sh");
    command.args(["-c", r#"trap '' INT QUIT; exec "$0" "$@""#]);
    command.arg(reuse_run().get_program()).args(arguments("-n 2", &naive(addr)));
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    for pid in service.workers() {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a worker's status");
        let bits = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line of the status");
            u64::from_str_radix(line.trim(), 16).expect("a mask")
        };
        assert_eq!(bits("SigBlk:"), 0, "blocked");
        assert_eq!(bits("SigIgn:") & (1 << (Signal::SIGINT as u64 - 1)), 0, "SIGINT is ignored");
    }
    service.reload();
    service.stop();
}

// The stop.

#[test]
fn sigterm_stops_every_worker_and_exits_0() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 3", &naive(addr));
    service.stop();
    assert!(service.log.text().contains("stopping"), "{}", service.log.text());
}

#[test]
fn sigint_stops_every_worker_and_exits_0() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 3", &naive(addr));
    service.signal(Signal::SIGINT);
    assert_eq!(service.wait_end().code(), Some(0), "{}", service.log.text());
    assert!(service.log.text().contains("stopping"), "{}", service.log.text());
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn a_worker_that_has_to_be_killed_makes_the_exit_1() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --stop-timeout 500ms", &naive_with(addr, &["--ignore-int"]));
    let begun = Instant::now();
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert!(begun.elapsed() >= Duration::from_millis(450), "they had their time: {:?}", begun.elapsed());
    assert_eq!(service.out.count_of("ignored SIGINT"), 2, "each got one: {}", service.out.text());
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn a_second_sigterm_kills_at_once() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --stop-timeout 1h", &naive_with(addr, &["--ignore-int"]));
    service.signal(Signal::SIGTERM);
    wait_until("both got the first", DEADLINE, || service.out.count_of("ignored SIGINT") == 2);
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
fn what_a_worker_started_does_not_outlive_it() {
    let addr = free_address();
    let text = r#"sleep 1000 & echo "helper $!"; exec "$0" --listen "$1""#;
    let mut service = Service::run_ready("-n 2", &script(text, addr));
    service.reload();
    wait_until("the helpers of the old workers are gone", DEADLINE, || service.descendants().len() == 4);
    service.stop();
}

#[test]
fn workers_do_not_outlive_a_killed_wrapper() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    assert_eq!(service.descendants().len(), 2);
    service.signal(Signal::SIGKILL);
    service.wait_exit();
    wait_until("the workers are gone", DEADLINE, || service.descendants().is_empty());
}

// The reload.

#[test]
fn sigusr2_during_a_reload_means_one_more_reload_however_often_it_came() {
    let addr = free_address();
    let command = naive_with(addr, &["--ready-after", "2000"]);
    let mut service = Service::run_ready("-n 2 --ready notify", &command);
    service.signal(Signal::SIGUSR2);
    wait_until("the replacements run", DEADLINE, || service.workers().len() == 4);
    // Apart from each other, lest the kernel make one signal of them.
    for _ in 0..5 {
        service.signal(Signal::SIGUSR2);
        holds_for("the reload goes on", Duration::from_millis(20), || {
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
fn a_replacement_that_exits_ends_the_reload_and_the_old_workers_never_noticed() {
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

    // A better version is welcome.
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
    kill(Pid::from_raw(new as i32), Signal::SIGKILL).expect("kill it");
    service.wait_for_line_after(from, "was killed by SIGKILL before it was ready");
    service.wait_for_line_after(from, "reload abandoned");
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn a_late_replacement_ends_the_reload_and_is_stopped() {
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
    assert_eq!(report.counts.generations.keys().copied().collect::<Vec<_>>(), [1]);
    service.stop();
}

#[test]
fn a_command_that_is_gone_at_the_reload_ends_the_reload() {
    let addr = free_address();
    let path = std::env::temp_dir().join(format!("reuse-run-test-{}-program", std::process::id()));
    // Closed before it is run, and run by its interpreter: a busy text file is no matter then.
    let mut file = fs::File::create(&path).expect("create a script");
    writeln!(file, "#!/bin/sh\nexec {} --listen {addr}", server()).expect("write it");
    file.set_permissions(fs::Permissions::from_mode(0o755)).expect("chmod");
    drop(file);
    let mut service = Service::run_ready("-n 2", &[path.display().to_string()]);
    fs::remove_file(&path).expect("remove the script");
    service.failing_reload();
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn a_worker_past_the_drain_is_stopped_all_the_same_and_past_the_stop_timeout_it_is_killed() {
    let addr = free_address();
    let command = naive_with(addr, &["--ignore-int"]);
    let service = Service::run_ready("-n 1 --drain 1s --stop-timeout 1s", &command);
    let stuck = std::thread::spawn(move || load::get(addr, "/sleep/60000?id=stuck", Duration::from_secs(70)));
    service.wait_for_output("begun stuck");
    let took = service.reload();
    assert!(took >= Duration::from_millis(1900), "it had its drain and its time to stop: {took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(service.out.count_of("ignored SIGINT"), 1);
    assert!(stuck.join().expect("the stuck request").is_err());
    assert_eq!(get(addr).generation, Some(2));
}
