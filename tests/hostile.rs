//! Workers that make unusual calls, foreign listeners on the port, and a system without resources. Nothing blocks
//! reuse-run, and each call gets the result that it would get from the kernel.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::time::{Duration, Instant};

use common::load::{Load, LoadOptions};
use common::{
    DEADLINE, Folder, Service, User, Waiting, app, arguments, assert_prompt, behind, behind_shell,
    free_address, free_port, get, holds_for, kernel, naive, needs_other_users, own_network, python,
    reload_under_load, reuse_run, script, send, ticks, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

/// A worker that binds in a certain way, on ports from 20000 on, in a new network namespace.
fn resources(what: &str, more: &[&str]) -> (SocketAddr, Vec<String>) {
    own_network();
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 20_000));
    let arguments: Vec<&str> = [what, "20000"].into_iter().chain(more.iter().copied()).collect();
    (addr, python("resources.py", &arguments))
}

/// How many fds reuse-run may have open, whatever a worker does.
const MAX_FDS: usize = 200;

// Unusual calls.

#[test]
fn odd_calls_get_the_same_results_as_without_reuse_run() {
    own_network();
    let probe = python("probe.py", &["20001", "20002", "20003"]);
    let bare = Command::new(&probe[0]).args(&probe[1..]).output().expect("run the probe");
    assert!(bare.status.success(), "{bare:?}");
    let bare = String::from_utf8(bare.stdout).expect("text");
    assert!(bare.lines().count() > 150, "{bare}");

    let mut service = Service::run("-n 1 --ready notify", &probe);
    assert_eq!(service.wait_end().code(), Some(1), "it ends before it is ready: {}", service.log.text());
    let wrapped = service.out.text();
    // Before Linux 5.19 a signal may restart an intercepted bind, which looks the same as a second bind.
    let known = "second bind, same address: ";
    let is_known = |line: &str| line.starts_with(known) && kernel() < (5, 19);
    let differences: Vec<String> = bare
        .lines()
        .zip(wrapped.lines())
        .filter(|(bare, wrapped)| bare != wrapped && !is_known(bare))
        .map(|(bare, wrapped)| format!("alone    {bare}\nwrapped  {wrapped}"))
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert_eq!(bare.lines().count(), wrapped.lines().count(), "{wrapped}");
}

// What a worker may bind.

#[test]
fn a_worker_may_bind_50_ports() {
    let (addr, command) = resources("fifty", &[]);
    let mut service = Service::run_ready("-n 2", &command);
    wait_until("both serve", DEADLINE, || service.out.count_of("serves") == 2);
    for generation in 1..=3 {
        for port in addr.port()..addr.port() + 50 {
            assert_eq!(get((Ipv4Addr::LOCALHOST, port).into()).generation, Some(generation));
        }
        service.reload();
    }
    service.stop();
}

#[test]
fn a_worker_may_bind_and_close_a_thousand_times() {
    let (addr, command) = resources("again", &[]);
    let mut service = Service::run("-n 1 --ready-timeout 10m", &command); // the binds take seconds, more on a busy machine
    let mut most = 0;
    wait_until("it serves", DEADLINE, || {
        most = most.max(service.fds());
        service.out.count_of("serves") == 1
    });
    assert!(most < MAX_FDS, "reuse-run had {most} fds open");
    service.wait_for_line("generation 1 is ready");
    assert_eq!(get(addr).generation, Some(1));
    service.stop();
}

#[test]
fn a_worker_that_binds_all_that_it_can_leaves_reuse_run_its_descriptors() {
    let folder = Folder::new();
    let (addr, command) = resources("hoard", &[&folder.path("")]);
    let limit = r#"ulimit -n 1024; exec "$0" "$@""#;
    let mut service = Service::spawn_ready(behind_shell(limit, "-n 1", &command));
    service.wait_for_output("has all");
    assert!(service.fds() < MAX_FDS, "reuse-run has {} fds open", service.fds());
    assert_eq!(service.log.count_of("worker 0 has more sockets bound than"), 1, "{}", service.log.text());
    get(addr);
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn binds_of_a_used_port_are_logged_once_a_second() {
    let (addr, command) = resources("used", &[]);
    let _listener = foreign_listener((addr.ip(), addr.port() + 1).into(), false, false);
    let begun = Instant::now();
    let mut service = Service::run_ready("-n 1", &command);
    service.wait_for_output("failed 3000 times");
    let lines = service.log.count_of(":20001 is in use") as u64;
    assert!((1..=begun.elapsed().as_secs() + 1).contains(&lines), "{}", service.log.text());
    get(addr);
    service.stop();
}

/// Another user of the machine, which can find the socket, writes to it without a pause.
#[test]
fn a_flood_of_notifications_from_another_user_costs_little_time() {
    needs_other_users!();
    const MESSAGES: u32 = 20_000;
    let addr = free_address();
    let text =
        r#"echo "socket $NOTIFY_SOCKET"; for i in $(seq 200); do sleep 1000 & done; exec "$0" --listen "$1""#;
    let mut service = Service::run_ready("-n 1", &script(text, addr));
    let line = service.wait_for_output("socket ").text;
    let path = line.strip_prefix("socket ").expect("a path");
    let flood = format!(
        "import os, socket, sys\nos.setresuid(54321, 54321, 54321)\n\
         s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n\
         for _ in range({MESSAGES}): s.sendto(b'READY=1', sys.argv[1])"
    );
    let before = ticks(service.pid());
    let other = Command::new("python3").args(["-c", &flood, path]).status().expect("run python3");
    assert!(other.success());
    let hundredths = ticks(service.pid()) - before;
    assert!(hundredths < 800, "{MESSAGES} messages cost {hundredths} hundredths of a second");
    get(addr);
    service.stop();
}

#[test]
fn a_worker_may_bind_an_address_twice_only_if_it_shares_both_times() {
    let (addr, command) = resources("twice", &[]);
    let mut service = Service::run_ready("-n 1", &command);
    service.wait_for_output("serves");
    let lines: Vec<String> = service.out.all().into_iter().map(|line| line.text).collect();
    assert_eq!(lines, ["not shared: EADDRINUSE", "shared: the second is fine", "serves"]);
    for _ in 0..20 {
        assert_eq!(get(addr).generation, Some(1), "both listeners are served");
    }
    service.reload();
    for _ in 0..20 {
        assert_eq!(get(addr).generation, Some(2));
    }
    service.stop();
}

#[test]
fn a_worker_may_bind_from_a_thread() {
    let (addr, command) = resources("thread", &[]);
    let mut service = Service::run_ready("-n 2", &command);
    assert_eq!(get(addr).generation, Some(1));
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

/// Asserts that the accept queue of a listener isn't reset when only a descendant of the worker has it open.
#[track_caller]
fn assert_queue_is_kept(what: &str) {
    let folder = Folder::new();
    folder.raise("deaf");
    let (addr, command) = resources(what, &[&folder.path("deaf")]);
    let mut service = Service::run_ready("-n 1", &command);
    let client = Waiting::new(addr);
    // Longer than it takes to find out that no process has the listener open.
    holds_for("the client waits", Duration::from_millis(2500), || client.waits());
    folder.lower("deaf");
    assert_eq!(client.outcome().expect("an answer").generation, Some(1));
    assert_eq!(service.log.count_of("stopped listening"), 0, "{}", service.log.text());
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn a_worker_may_bind_from_a_grandchild() {
    assert_queue_is_kept("grandchild");
}

#[test]
fn a_worker_may_bind_from_a_grandchild_whose_parent_is_gone() {
    assert_queue_is_kept("orphan");
}

/// Asserts that the worker serves after it has done this to its processes, and that reuse-run works.
#[track_caller]
fn assert_survived(command: &[String], addr: SocketAddr, says: &str) {
    let mut service = Service::run_ready("-n 1", command);
    service.wait_for_output("serves");
    service.wait_for_output(says);
    assert_eq!(get(addr).generation, Some(1));
    assert!(service.fds() < MAX_FDS, "reuse-run has {} fds open", service.fds());
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    assert!(service.fds() < MAX_FDS, "reuse-run has {} fds open", service.fds());
    service.stop();
}

#[test]
fn a_process_may_be_killed_while_its_bind_is_answered() {
    let (addr, command) = resources("killed", &[]);
    assert_survived(&command, addr, "200 are dead");
}

#[test]
fn a_process_may_get_signals_while_its_bind_is_answered() {
    let (addr, command) = resources("interrupted", &[]);
    assert_survived(&command, addr, "status 7");
}

#[test]
fn a_process_may_dump_core_while_its_bind_is_answered() {
    let (addr, command) = resources("aborts", &[]);
    let folder = Folder::new();
    let text = r#"ulimit -c unlimited; cd "$0"; exec "$@""#;
    let shell = ["sh", "-c", text, &folder.path("")].map(str::to_owned);
    let command: Vec<String> = shell.into_iter().chain(command).collect();
    assert_survived(&command, addr, "20 have aborted");
}

#[test]
fn a_process_may_be_stopped_while_its_bind_is_answered_and_no_other_waits_for_it() {
    let (addr, command) = resources("stopped", &[]);
    assert_survived(&command, addr, "50 are dead");
}

#[test]
fn a_worker_killed_again_and_again_while_it_binds_is_replaced_each_time() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2 --max-failures 0", &folder.server(addr, &[]));
    let load = Load::start(LoadOptions::new(addr, 2));
    // Each is killed as soon as it exists, so in any step of its start. A reload, not a crash, starts it, so that there is
    // no back-off.
    for _ in 0..10 {
        let before = service.workers();
        let from = service.log.count();
        service.signal(Signal::SIGUSR2);
        let mut new = None;
        wait_until("a new worker", DEADLINE, || {
            new = service.workers().into_iter().find(|pid| !before.contains(pid));
            new.is_some()
        });
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(new.expect("a pid") as i32), Signal::SIGKILL);
        service.wait_for_line_where(from, "ends the reload", |line| {
            line.contains("reload abandoned") || line.contains("reload done")
        });
        wait_until("two workers", DEADLINE, || service.workers().len() == 2);
    }
    service.reload();
    let report = load.stop();
    // A worker that served already when it was killed may have had requests.
    assert!(report.counts.failed <= 20, "{report}");
    get(addr);
    service.stop();
}

// What a worker leaves behind.

#[test]
fn a_listener_that_a_daemon_of_an_ended_worker_has_open_is_set_aside_until_the_daemon_ends() {
    let (addr, command) = resources("daemon", &[]);
    let mut service = Service::run_ready("-n 2", &command);
    wait_until("two daemons", DEADLINE, || service.out.count_of("daemon") == 2);
    for generation in 2..=5 {
        service.reload();
        for _ in 0..40 {
            assert_eq!(get(addr).generation, Some(generation));
        }
    }
    let aside = "left behind has a listener of 127.0.0.1:20000 open, which is set aside: ";
    assert_eq!(service.log.count_of(aside), 2, "{}", service.log.text());
    let fds = service.fds();
    for line in service.out.all().iter().filter(|line| line.text.contains("daemon")) {
        let pid: u32 = line.text.trim_start_matches("daemon ").parse().expect("a pid");
        assert!(service.log.text().contains(&format!("(pid {pid})")));
        send(pid, Signal::SIGKILL);
        wait_until("its end", DEADLINE, || !service.descendants().contains(&pid));
    }
    for generation in 6..=8 {
        service.reload();
        for _ in 0..10 {
            assert_eq!(get(addr).generation, Some(generation));
        }
    }
    assert!(service.fds() <= fds, "{} fds, {fds} before", service.fds());
    assert_eq!(service.log.count_of("set aside"), 2, "{}", service.log.text());
    service.stop();
}

#[test]
fn what_left_the_process_group_of_a_worker_is_killed_with_it() {
    let folder = Folder::new();
    let (_, leaves) = resources("leaves", &[]);
    let text = r#"[ "$REUSE_RUN_SLOT" = 0 ] || exec python3 "$0" "$1"; shift; exec "$@""#;
    let command = ["sh", "-c", text, &app("python/unlinks.py"), &folder.path("")].map(str::to_owned);
    let command: Vec<String> = command.into_iter().chain(leaves).collect();
    let mut service = Service::run_ready("-n 2 --ready 200ms --stop-timeout 100ms", &command);
    wait_until("both have left", DEADLINE, || service.out.count_of("left") == 2);
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    service.wait_for_line_after(from, "killing it");
    assert_prompt(&service, &folder);
    service.wait_for_line_after(from, "reload done");
    wait_until("both have left", DEADLINE, || service.out.count_of("left") == 4);
    wait_until("the first three are gone", DEADLINE, || service.descendants().len() == 4);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    wait_until("all are gone", DEADLINE, || service.descendants().is_empty());
}

#[test]
fn what_outlives_reuse_run_can_bind_and_unlink() {
    let folder = Folder::new();
    folder.raise("wait");
    folder.raise("begun");
    let (_, command) = resources("outlives", &[&folder.path("")]);
    let mut service = Service::run_ready("-n 1", &command);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_exit().code(), Some(0), "{}", service.log.text());
    // A process that has nothing open but the filter.
    let is_keeper = |pid: &u32| {
        let named = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|it| it == "reuse-run-keep\n");
        named && fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|fds| fds.count() == 1)
    };
    wait_until("one process beside the keeper", DEADLINE, || {
        let left = service.descendants();
        left.len() == 2 && left.iter().any(is_keeper)
    });
    folder.lower("wait");
    wait_until("it has bound and unlinked", DEADLINE, || fs::exists(folder.path("done")).expect("a folder"));
    wait_until("the keeper has ended with it", DEADLINE, || service.descendants().is_empty());
}

// Foreign listeners.

/// A listener of this test, on the port of a worker.
fn foreign_listener(addr: SocketAddr, share: bool, v6only: bool) -> TcpListener {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.set_reuse_port(share).expect("SO_REUSEPORT");
    if addr.is_ipv6() {
        socket.set_only_v6(v6only).expect("IPV6_V6ONLY");
    }
    socket.bind(&addr.into()).expect("bind");
    socket.listen(16).expect("listen");
    socket.set_nonblocking(true).expect("set non-blocking");
    socket.into()
}

#[test]
fn a_foreign_listener_is_found_before_the_first_bind_and_named() {
    let (any, local): (IpAddr, IpAddr) = (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into());
    let (any6, local6): (IpAddr, IpAddr) = (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into());
    let pairs = [(local, local), (any, local), (any6, local), (any6, any), (any, any6), (any6, local6)];
    for share in [false, true] {
        for (foreign, wanted) in pairs {
            let port = free_port();
            let (foreign, wanted) = (SocketAddr::new(foreign, port), SocketAddr::new(wanted, port));
            let _listener = foreign_listener(foreign, share, false);
            let mut service = Service::run("-n 2", &naive(wanted));
            let status = service.wait_end();
            let log = service.log.text();
            assert_eq!(status.code(), Some(libc::EADDRINUSE), "{foreign} overlaps {wanted}: {log}");
            let program = std::env::current_exe().expect("the path of the test");
            let name = program.file_name().expect("a name").to_string_lossy();
            let pid = std::process::id().to_string();
            for part in [wanted.to_string(), pid, name.into_owned()] {
                assert!(log.contains(&part), "{part:?} is not in: {log}");
            }
        }
    }
}

#[test]
fn a_listener_that_does_not_overlap_is_no_foreign_listener() {
    let port = free_port();
    let _other_address = foreign_listener((Ipv4Addr::new(127, 0, 0, 9), port).into(), false, false);
    let _other_family = foreign_listener((Ipv6Addr::UNSPECIFIED, port).into(), false, true);
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut service = Service::run_ready("-n 2", &naive(addr));
    get(addr);
    service.stop();
}

#[test]
fn a_foreign_listener_that_joins_later_is_found_at_the_next_reload_and_gets_no_connection() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 4).timeout(Duration::from_secs(30)));
    wait_until("answers", DEADLINE, || load.snapshot().answered > 50);
    let listener = foreign_listener(addr, true, false);
    service.reload();
    let line = service.log.find(0, "shared by another program").expect("a line of the log").text;
    for part in [addr.to_string(), std::process::id().to_string()] {
        assert!(line.contains(&part), "{part:?} is not in: {line}");
    }
    while let Ok((connection, _)) = listener.accept() {
        drop(connection);
    }
    let assert_no_connection =
        || assert!(listener.accept().is_err(), "the foreign listener got a connection");
    for _ in 0..10 {
        service.reload();
        assert_no_connection();
    }
    // It may close, and another one may join.
    drop(listener);
    service.reload();
    let listener = foreign_listener(addr, true, false);
    for _ in 0..5 {
        service.reload();
    }
    assert!(listener.accept().is_err(), "the foreign listener got a connection");
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_failed();
    assert_eq!(service.log.count_of("shared by another program"), 2, "{}", service.log.text());
    service.stop();
}

// Resources that run out or are missing.

/// Asserts that reuse-run ends by itself with status 1 and one line with `part`, and that no process is left.
#[track_caller]
fn assert_ends(command: Command, part: &str) {
    let mut service = Service::spawn(command);
    let status = service.wait_end();
    let log = service.log.text();
    assert_eq!(status.code(), Some(1), "{log}");
    let lines: Vec<&str> = log.lines().filter(|line| line.starts_with("reuse-run[")).collect();
    assert!(lines.len() == 1 && lines[0].contains(part), "one line with {part:?}: {log}");
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn without_proc_reuse_run_says_so_and_exits_with_1() {
    let hide = ["unshare", "--mount", "sh", "-c", r#"mount -t tmpfs none /proc && exec "$0" "$@""#];
    assert_ends(behind(&hide, "-n 2", &naive(free_address())), "/proc");
}

#[test]
fn with_the_proc_of_another_pid_namespace_reuse_run_says_so_and_exits_with_1() {
    let foreign = ["unshare", "--pid", "--fork", "--kill-child"];
    assert_ends(behind(&foreign, "-n 2", &naive(free_address())), "/proc is that of another PID namespace");
}

#[test]
fn a_program_that_its_own_user_may_not_read_is_named_as_such() {
    needs_other_users!();
    let (addr, user) = (free_address(), User::new());
    fs::set_permissions(user.server(), fs::Permissions::from_mode(0o711)).expect("chmod");
    let service = Service::spawn(as_user(&user, &[], "-n 2", addr));
    service.wait_for_line("worker 1 can't be read by processes of its own user");
    assert_eq!(service.log.count_of("start reuse-run as that user"), 0, "{}", service.log.text());
}

#[test]
fn without_seccomp_reuse_run_says_so_and_goes_on_without_interception() {
    for errno in ["EPERM", "ENOSYS", "EINVAL", "ENOMEM"] {
        let without = python("without.py", &["seccomp", errno]);
        let without: Vec<&str> = without.iter().map(String::as_str).collect();
        let mut service = Service::spawn(behind(&without, "-n 1", &naive(free_address())));
        service.wait_for_line("workers can't be intercepted");
        service.wait_until_ready();
        service.stop();
    }
}

#[test]
fn inside_another_reuse_run_the_inner_one_says_so_and_goes_on_without_interception() {
    let inner = reuse_run().get_program().to_str().expect("a path in UTF-8").to_owned();
    let addr = free_address();
    let inner: Vec<String> = [inner].into_iter().chain(arguments("-n 1", &naive(addr))).collect();
    let mut service = Service::run("-n 1", &inner);
    service.wait_for_line("workers can't be intercepted");
    service.wait_until_ready();
    service.stop();
}

#[test]
fn too_few_fds_for_the_first_generation_end_the_start_with_1_and_no_process_is_left() {
    let command = behind_shell(r#"ulimit -n 24; exec "$0" "$@""#, "-n 20", &naive(free_address()));
    let mut service = Service::spawn(command);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert!(service.log.text().contains("Too many open files"), "{}", service.log.text());
    assert_eq!(service.descendants(), [0u32; 0]);
}

/// Sets the soft limit of a running process.
#[track_caller]
fn set_limit(pid: u32, limit: &str) {
    let owner = fs::metadata(format!("/proc/{pid}")).expect("a running process").uid();
    // The user of the process may do that. Root may not in every container.
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={owner}"), &format!("--regid={owner}"), "--clear-groups", "prlimit"]);
    let status = command.args(["--pid", &pid.to_string(), limit]).status();
    assert!(status.expect("run prlimit").success(), "{limit}");
}

/// Asserts that under a limit that allows no start a reload is abandoned, a dead worker isn't replaced, and the log
/// says why; and that the worker is replaced when the limit is raised.
#[track_caller]
fn assert_is_replaced_later(mut service: Service, addr: SocketAddr, tight: &str, wide: &str, why: &str) {
    service.wait_until_ready();
    set_limit(service.pid(), tight);
    let log = service.failing_reload();
    assert!(log.contains(why), "{log}");
    wait_until("the old workers serve on", DEADLINE, || service.workers().len() == 2);
    get(addr);

    let from = service.log.count();
    let victim = service.workers()[0];
    send(victim, Signal::SIGKILL);
    let is_failure = |line: &str| line.contains("can't be started") && line.contains(why);
    service.wait_for_line_where(from, "tells about the failure", is_failure);
    let next = service.log.count();
    service.wait_for_line_where(next, "tells about another failure", is_failure);
    set_limit(service.pid(), wide);
    service.wait_for_line_after(from, "is ready, a replacement");
    service.reload();
    get(addr);
    service.stop();
}

/// `reuse-run OPTIONS -- server` as another user.
fn as_user(user: &User, privileges: &[&str], options: &str, addr: SocketAddr) -> Command {
    let worker = [user.server(), "--listen".to_owned(), addr.to_string()];
    user.command(privileges, &arguments(options, &worker))
}

#[test]
fn an_unprivileged_user_may_run_reuse_run() {
    needs_other_users!();
    let (addr, user) = (free_address(), User::new());
    let mut service = Service::spawn_ready(as_user(&user, &[], "-n 2", addr));
    reload_under_load(&service, LoadOptions::new(addr, 4), 5);
    service.stop();
}

#[test]
fn when_no_process_can_be_forked_the_log_says_so_and_the_start_is_tried_again() {
    needs_other_users!();
    let (addr, user) = (free_address(), User::new());
    let privileges = ["--inh-caps=+net_admin", "--ambient-caps=+net_admin"];
    let service = Service::spawn(as_user(&user, &privileges, "-n 2 --max-failures 0", addr));
    assert_is_replaced_later(
        service,
        addr,
        "--nproc=1:",
        "--nproc=10000:",
        "Resource temporarily unavailable",
    );
}

#[test]
fn when_fds_run_out_the_log_says_so_and_the_start_is_tried_again() {
    needs_other_users!();
    let addr = free_address();
    let service = Service::run("-n 2 --max-failures 0", &naive(addr));
    assert_is_replaced_later(service, addr, "--nofile=6:", "--nofile=10000:", "Too many open files");
}
