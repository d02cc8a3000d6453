//! reuse-run as an init: signals, orphans and exit statuses, as PID 1 and otherwise; what a worker leaves behind; the
//! death of reuse-run; and a broken stderr.
#![cfg_attr(clippy, deny(warnings))]
#![allow(unsafe_code)]

mod common;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use common::load::{self, Load, LoadOptions};
use common::{
    DEADLINE, Folder, Process, Service, behind, behind_shell, children, free_address, get, naive, python,
    redirected, reuse_run_with, script, send, server, signals_in, terminal, wait_until,
};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

/// `reuse-run OPTIONS -- COMMAND` as PID 1 of a new PID namespace. unshare exits with its status.
fn as_pid_1<S: AsRef<str>>(options: &str, command: &[S]) -> Service {
    let unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--"];
    Service::spawn(behind(&unshare, options, command))
}

/// The pid of reuse-run outside its namespace.
fn pid_1(service: &Service) -> u32 {
    let mut pid = None;
    wait_until("PID 1 runs", DEADLINE, || {
        pid = service.workers().first().copied();
        let name = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok());
        name.is_some_and(|name| name.trim() == "reuse-run")
    });
    pid.expect("the pid of reuse-run")
}

fn is_zombie(pid: u32) -> bool {
    Process::read(pid).is_some_and(|process| process.state == 'Z')
}

fn signal_printer(more: &[&str]) -> Vec<String> {
    python("signals.py", more)
}

// Orphans.

/// A worker that starts twenty orphans and listens. The orphans have sessions of their own and live until `live` is
/// lowered.
fn with_orphans(folder: &Folder, addr: SocketAddr) -> Vec<String> {
    let text = r#"for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
            (setsid sh -c 'while [ -e "$0/live" ]; do sleep 0.05; done; exit 5' "$2" &)
        done; exec "$0" --listen "$1""#;
    let mut command = script(text, addr);
    command.push(folder.path(""));
    command
}

/// Asserts that the twenty become children of reuse-run, and that it reaps them.
#[track_caller]
fn assert_orphans_are_reaped(wrapper: u32, folder: &Folder, addr: SocketAddr) {
    wait_until("the orphans come to reuse-run", DEADLINE, || children(wrapper).len() == 21);
    folder.lower("live");
    wait_until("the orphans are reaped", DEADLINE, || children(wrapper).len() == 1);
    assert!(!is_zombie(children(wrapper)[0]));
    get(addr);
}

#[test]
fn as_pid_1_reuse_run_reaps_orphans() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("live");
    let mut service = as_pid_1("-n 1", &with_orphans(&folder, addr));
    service.wait_until_ready();
    let wrapper = pid_1(&service);
    assert_orphans_are_reaped(wrapper, &folder, addr);
    send(wrapper, Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(0), "{}", service.log.text());
}

#[test]
fn not_as_pid_1_reuse_run_also_reaps_orphans() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("live");
    let mut service = Service::run_ready("-n 1", &with_orphans(&folder, addr));
    assert_orphans_are_reaped(service.pid(), &folder, addr);
    service.stop();
}

#[test]
fn an_orphan_that_ends_during_a_stop_does_not_end_the_stop() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("live");
    let mut command = with_orphans(&folder, addr);
    command[2] = command[2].replace("--listen", "--ignore-int --listen");
    let mut service = as_pid_1("-n 1 --stop-timeout 1s", &command);
    service.wait_until_ready();
    let wrapper = pid_1(&service);
    wait_until("the orphans come to reuse-run", DEADLINE, || children(wrapper).len() == 21);
    send(wrapper, Signal::SIGTERM);
    service.wait_for_output("ignored SIGINT");
    folder.lower("live");
    assert_eq!(service.wait_end().code(), Some(1), "the worker had to be killed: {}", service.log.text());
}

#[test]
fn when_pid_1_is_killed_every_process_of_its_namespace_ends() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("live");
    let mut service = as_pid_1("-n 1", &with_orphans(&folder, addr));
    service.wait_until_ready();
    let wrapper = pid_1(&service);
    wait_until("the orphans come to reuse-run", DEADLINE, || children(wrapper).len() == 21);
    send(wrapper, Signal::SIGKILL);
    service.wait_exit();
    wait_until("no process is left", DEADLINE, || service.descendants().is_empty());
}

// Signals.

/// Asserts that SIGUSR2 and SIGHUP reload and aren't forwarded, and that other signals reach each worker once.
#[track_caller]
fn assert_signals_are_forwarded(mut service: Service, wrapper: u32) {
    for (reload, signal) in [Signal::SIGUSR2, Signal::SIGHUP].into_iter().enumerate() {
        send(wrapper, signal);
        wait_until("a reload", DEADLINE, || service.log.count_of("reload done") == reload + 1);
    }
    // That it isn't forwarded is shown by those that come after it.
    send(wrapper, Signal::SIGWINCH);
    const FORWARDED: [(&str, &str); 9] = [
        ("USR1", "SIGUSR1"),
        ("CONT", "SIGCONT"),
        ("ALRM", "SIGALRM"),
        ("VTALRM", "SIGVTALRM"),
        ("PROF", "SIGPROF"),
        ("PWR", "SIGPWR"),
        ("34", "SIG34"),
        ("50", "SIG50"),
        ("64", "SIG64"),
    ];
    for (sent, got) in FORWARDED {
        let mut kill = Command::new("sh");
        let status = kill.args(["-c", &format!("kill -{sent} {wrapper}")]).status().expect("run sh");
        assert!(status.success());
        wait_until("the signal at both workers", DEADLINE, || {
            service.out.count_of(&format!("generation=3 {got}")) == 2
        });
    }
    send(wrapper, Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(0), "{}", service.log.text());
    let mut lines: Vec<String> = service.out.all().into_iter().map(|line| line.text).collect();
    lines.sort();
    let mut expected = Vec::new();
    for generation in 1..=3 {
        for what in FORWARDED.iter().map(|(_, got)| *got).chain(["SIGINT", "ready"]) {
            if generation == 3 || ["SIGINT", "ready"].contains(&what) {
                expected.extend([
                    format!("generation={generation} {what}"),
                    format!("generation={generation} {what}"),
                ]);
            }
        }
    }
    expected.sort();
    assert_eq!(lines, expected);
}

#[test]
fn as_pid_1_reuse_run_forwards_signals_that_it_does_not_use_itself() {
    let service = as_pid_1("-n 2 --ready notify", &signal_printer(&[]));
    service.wait_until_ready();
    let wrapper = pid_1(&service);
    assert_signals_are_forwarded(service, wrapper);
}

#[test]
fn not_as_pid_1_reuse_run_forwards_the_same_signals() {
    let service = Service::run_ready("-n 2 --ready notify", &signal_printer(&[]));
    let wrapper = service.pid();
    assert_signals_are_forwarded(service, wrapper);
}

#[test]
fn the_stop_signal_is_not_forwarded_as_another_signal() {
    let mut service = Service::run_ready(
        "-n 2 --ready notify --stop-signal USR1 --stop-timeout 100ms",
        &signal_printer(&["stays"]),
    );
    service.signal(Signal::SIGUSR1);
    service.signal(Signal::SIGALRM);
    wait_until("the later signal", DEADLINE, || service.out.count_of("SIGALRM") == 2);
    assert_eq!(service.out.count_of("SIGUSR1"), 0, "{}", service.out.text());
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(1), "they don't end by it: {}", service.log.text());
    assert_eq!(service.out.count_of("SIGUSR1"), 2, "{}", service.out.text());
}

#[test]
fn a_worker_that_is_not_ready_yet_also_gets_forwarded_signals() {
    // The shell has a handler, as most signals kill otherwise.
    let text = "trap 'echo got it' USR1; echo prepares; while :; do sleep 0.05; done";
    let mut service = Service::run("-n 1 --ready notify", &["sh", "-c", text]);
    service.wait_for_output("prepares");
    service.signal(Signal::SIGUSR1);
    service.wait_for_output("got it");
    service.stop();
}

#[test]
fn as_pid_1_a_first_signal_stops_and_a_second_kills_unless_it_comes_within_a_second() {
    let mut service = as_pid_1("-n 2 --ready notify --stop-timeout 1h", &signal_printer(&["stays"]));
    service.wait_until_ready();
    let wrapper = pid_1(&service);
    // The kernel merges equal signals that are pending, so the second is another one.
    send(wrapper, Signal::SIGTERM);
    send(wrapper, Signal::SIGINT);
    let stopping = service.wait_for_line("stopping 2 workers");
    wait_until("the signal at both workers", DEADLINE, || service.out.count_of("SIGINT") == 2);
    wait_until("a second", DEADLINE, || stopping.at.elapsed() > Duration::from_secs(1));
    assert!(!service.log.text().contains("killing"), "{}", service.log.text());
    send(wrapper, Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert_eq!(service.out.count_of("SIGINT"), 2, "{}", service.out.text());
    assert!(service.log.text().contains("SIGTERM again: killing 2 workers"), "{}", service.log.text());
}

#[test]
fn as_pid_1_every_stop_signal_works() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let addr = free_address();
        let mut service = as_pid_1("-n 2", &naive(addr));
        service.wait_until_ready();
        send(pid_1(&service), signal);
        assert_eq!(service.wait_end().code(), Some(0), "{signal}: {}", service.log.text());
    }
}

// Exit statuses.

#[test]
fn as_pid_1_reuse_run_exits_with_the_status_of_a_worker_that_fails_at_the_start() {
    for (of_worker, expected) in [(0, 1), (1, 1), (42, 42), (255, 255)] {
        let mut service = as_pid_1("-n 1", &["sh", "-c", &format!("exit {of_worker}")]);
        assert_eq!(service.wait_end().code(), Some(expected), "{}", service.log.text());
    }
}

#[test]
fn as_pid_1_reuse_run_exits_with_128_and_the_signal_that_kills_a_worker_at_the_start() {
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGKILL,
        Signal::SIGABRT,
        Signal::SIGSEGV,
        Signal::SIGUSR2,
        Signal::SIGPIPE,
    ] {
        let mut service =
            as_pid_1("-n 1", &["sh", "-c", &format!("ulimit -c 0; kill -{} $$", signal as i32)]);
        assert_eq!(service.wait_end().code(), Some(128 + signal as i32), "{}", service.log.text());
    }
}

#[test]
fn as_pid_1_reuse_run_exits_with_126_or_127_for_a_command_that_cannot_be_started() {
    for (command, status) in [("/etc/passwd", 126), ("no-such-program-anywhere", 127)] {
        let mut service = as_pid_1("-n 2", &[command]);
        assert_eq!(service.wait_end().code(), Some(status), "{command}: {}", service.log.text());
    }
}

#[test]
fn as_pid_1_reuse_run_exits_with_1_when_a_worker_had_to_be_killed() {
    let mut service = as_pid_1("-n 1 --ready notify --stop-timeout 500ms", &signal_printer(&["stays"]));
    service.wait_until_ready();
    send(pid_1(&service), Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
}

// The stop signal and the worker.

/// Makes a command start with signals ignored and blocked.
fn with_everything_ignored_and_blocked(command: &mut Command) {
    let hostile = || {
        let ignored = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR2, Signal::SIGCHLD];
        for signal in ignored {
            // SAFETY: only changes a disposition to one that runs no code.
            unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigIgn) }?;
        }
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
        Ok(())
    };
    // SAFETY: the closure only makes system calls, which is all right between fork and exec.
    unsafe { command.pre_exec(hostile) };
}

#[test]
fn reloads_and_stops_work_even_if_the_starter_ignores_and_blocks_signals() {
    let addr = free_address();
    for (options, worker) in [("-n 2 --ready notify", signal_printer(&[])), ("-n 2", naive(addr))] {
        let mut command = reuse_run_with(options, &worker);
        with_everything_ignored_and_blocked(&mut command);
        let mut service = Service::spawn(command);
        service.wait_until_ready();
        for pid in service.workers() {
            // glibc's pthread_create blocks all signals for a moment.
            wait_until("no signal is blocked", DEADLINE, || signals_in(pid, "SigBlk:").is_empty());
            let ignored = signals_in(pid, "SigIgn:");
            assert!(!ignored.contains(&Signal::SIGINT), "{ignored:?}");
        }
        service.reload();
        service.stop();
        assert_eq!(service.log.count_of("killed"), 0, "{}", service.log.text());
    }
}

#[test]
fn a_worker_that_ignores_the_stop_signal_is_killed_with_its_group_after_the_time_out() {
    let addr = free_address();
    let text = r#"sh -c "trap '' INT; sleep 1000 & sleep 1000" & exec "$0" --ignore-int --listen "$1""#;
    let mut service = Service::run_ready("-n 2 --stop-timeout 500ms", &script(text, addr));
    wait_until("the helpers run", DEADLINE, || service.descendants().len() == 8);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_exit().code(), Some(1), "{}", service.log.text());
    wait_until("no process is left", DEADLINE, || service.descendants().is_empty());
    assert_eq!(service.out.count_of("ignored SIGINT"), 2);
}

#[test]
fn other_processes_of_a_dead_workers_group_are_killed() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1", &script(r#"sleep 1000 & exec "$0" --listen "$1""#, addr));
    wait_until("worker and helper run", DEADLINE, || service.descendants().len() == 2);
    let before = service.descendants();
    send(service.workers()[0], Signal::SIGKILL);
    service.wait_for_line("is ready, a replacement");
    wait_until("all of the group is gone", DEADLINE, || {
        let now = service.descendants();
        now.len() == 2 && before.iter().all(|pid| !now.contains(pid))
    });
    service.stop();
}

/// `npm start` for a package in the folder whose start script is this.
fn npm_start(folder: &Folder, start: &str) -> Vec<String> {
    let package = format!(r#"{{"name": "app", "version": "1.0.0", "scripts": {{"start": "{start}"}}}}"#);
    fs::write(folder.path("package.json"), package).expect("write package.json");
    let command = ["npm", "start", "--silent", "--no-update-notifier", "--prefix", &folder.path("")];
    command.map(str::to_owned).to_vec()
}

#[test]
fn npm_start_and_its_server_are_reloaded_killed_and_stopped_together() {
    let (addr, folder) = (free_address(), Folder::new());
    // npm runs the script by `sh -c` and forwards signals to that shell only, hence `exec`.
    let start = format!("exec {} --listen {addr}", server());
    let mut service = Service::run_ready("-n 1", &npm_start(&folder, &start));
    service.reload();
    let of_second = get(addr);
    assert_eq!(of_second.generation, Some(2));
    let npm = service.workers();
    assert_eq!(npm.len(), 1);
    assert_ne!(Some(npm[0]), of_second.pid, "npm is the worker, and the server its child");
    let before = service.descendants();
    send(npm[0], Signal::SIGKILL);
    service.wait_for_line("is ready, a replacement");
    wait_until("all of the group is gone", DEADLINE, || {
        let now = service.descendants();
        before.iter().all(|pid| !now.contains(pid))
    });
    assert_ne!(get(addr).pid, of_second.pid);
    service.stop();
}

#[test]
fn the_stop_signal_reaches_a_server_behind_npm_and_behind_a_shell_that_forwards_nothing() {
    let (addr, folder) = (free_address(), Folder::new());
    let behind_npm = npm_start(&folder, &format!("{} --listen {addr}", server()));
    let behind_sh = ["sh", "-c", &format!("{} --listen {addr}; true", server())].map(str::to_owned).to_vec();
    for command in [behind_npm, behind_sh] {
        // If the signal didn't reach the server, this test would time out.
        let mut service = Service::run_ready("-n 1 --stop-timeout 1h", &command);
        service.reload();
        assert_eq!(get(addr).generation, Some(2));
        service.stop();
    }
}

#[test]
fn processes_that_npm_start_leaves_behind_a_shell_are_killed() {
    let (addr, folder) = (free_address(), Folder::new());
    let start = format!("{} --listen {addr}; true", server());
    let mut service =
        Service::run_ready("-n 1 --stop-signal TERM --stop-timeout 2s", &npm_start(&folder, &start));
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.signal(Signal::SIGTERM);
    service.wait_end();
    assert_eq!(service.descendants(), [0u32; 0], "{}", service.log.text());
}

// The death of reuse-run.

#[test]
fn when_reuse_run_is_killed_its_workers_die_and_the_next_start_finds_the_port_free() {
    let addr = free_address();
    for _ in 0..5 {
        let mut service = Service::run_ready("-n 2", &naive(addr));
        let load = Load::start(LoadOptions::new(addr, 4));
        wait_until("answers", DEADLINE, || load.snapshot().answered > 20);
        let workers = service.workers();
        service.signal(Signal::SIGKILL);
        service.wait_exit();
        wait_until("the workers are gone", Duration::from_secs(10), || {
            let alive = |pid: &u32| Process::read(*pid).is_some_and(|process| process.state != 'Z');
            !workers.iter().any(alive)
        });
        load.stop();
    }
    let mut service = Service::run_ready("-n 2", &naive(addr));
    get(addr);
    service.stop();
}

// A broken stderr.

/// Asserts that reuse-run starts, reloads three times, replaces a worker and stops, by the answers and without the log.
fn assert_works(mut service: Service, addr: SocketAddr) {
    let serves = |generation| {
        wait_until("the generation serves", DEADLINE, || {
            load::get(addr, "/", DEADLINE).is_ok_and(|answer| answer.origin.generation == Some(generation))
        });
        wait_until("it serves alone", DEADLINE, || service.workers().len() == 2);
    };
    serves(1);
    for generation in 2..=4 {
        service.signal(Signal::SIGUSR2);
        serves(generation);
    }
    let victim = get(addr).pid.expect("a pid");
    send(victim, Signal::SIGKILL);
    wait_until("a replacement", DEADLINE, || {
        service.workers().len() == 2 && !service.workers().contains(&victim)
    });
    get(addr);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_exit().code(), Some(0));
}

#[test]
fn with_closed_standard_streams_reuse_run_works() {
    for redirections in ["2>&-", "<&- >&- 2>&-"] {
        println!("{redirections}");
        let addr = free_address();
        assert_works(Service::spawn(redirected(redirections, "-n 2", &naive(addr))), addr);
    }
}

#[test]
fn with_a_full_pipe_on_stderr_that_is_not_read_reuse_run_works() {
    let (addr, folder) = (free_address(), Folder::new());
    let path = folder.path("pipe");
    nix::unistd::mkfifo(path.as_str(), nix::sys::stat::Mode::S_IRWXU).expect("make a pipe");
    let mut pipe = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .expect("open the pipe");
    while pipe.write(&[b'x'; 4096]).is_ok() {}
    while pipe.write(b"x").is_ok() {}
    let mut command = redirected(&format!("2>{path}"), "-n 2", &naive(addr));
    command.env("REUSE_RUN_LOG", "debug");
    assert_works(Service::spawn(command), addr);
}

#[test]
fn with_a_pipe_on_stderr_whose_reader_has_closed_reuse_run_works() {
    let addr = free_address();
    // `true` ends immediately and closes the pipe.
    let text = r#"exec 3>&1; { "$0" "$@" 2>&1 >&3 3>&- & echo "wrapper $!" >&3; exec 3>&-; } | true"#;
    let service = Service::spawn(behind_shell(text, "-n 2", &naive(addr)));
    let line = service.wait_for_output("wrapper ").text;
    let wrapper: u32 = line.trim_start_matches("wrapper ").parse().expect("a pid");
    wait_until("an answer", DEADLINE, || load::get(addr, "/", DEADLINE).is_ok());
    send(wrapper, Signal::SIGUSR2);
    wait_until("the second generation serves", DEADLINE, || get(addr).generation == Some(2));
    send(wrapper, Signal::SIGTERM);
    wait_until("no process is left", DEADLINE, || service.descendants().is_empty());
}

#[test]
fn when_the_terminal_on_stderr_hangs_up_reuse_run_works() {
    let addr = free_address();
    let (master, path) = terminal();
    let service = Service::spawn(redirected(&format!("2>{path}"), "-n 2", &naive(addr)));
    wait_until("an answer", DEADLINE, || load::get(addr, "/", DEADLINE).is_ok());
    drop(master);
    assert_works(service, addr);
}

#[test]
fn when_the_controlling_terminal_hangs_up_reuse_run_stops() {
    let addr = free_address();
    let (master, path) = terminal();
    let mut command = redirected(&format!("<{path} 2>{path}"), "-n 2", &naive(addr));
    // SAFETY: setsid(2) is a system call and no more, which is all right between fork and exec.
    unsafe { command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
    let mut service = Service::spawn(command);
    wait_until("an answer", DEADLINE, || load::get(addr, "/", DEADLINE).is_ok());
    drop(master);
    assert_eq!(service.wait_exit().code(), Some(0));
}
