//! Workers that do odd things with sockets, strangers on the port, and a system that has run out of
//! something: nothing blocks reuse-run, and everybody gets what the kernel would have said.

mod common;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::time::Duration;

use common::load::{Load, LoadOptions};
use common::{
    DEADLINE, Folder, Service, Waiting, answered_more, app, arguments, free_address, free_port, get,
    holds_for, naive, own_network, reuse_run, send, server, wait_until,
};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

fn python(script: &str, arguments: &[&str]) -> Vec<String> {
    let script = app(&format!("python/{script}"));
    ["python3", &script].iter().chain(arguments).map(|word| (*word).to_owned()).collect()
}

/// The worker that binds in some way, with ports from 20000 on in a network of its own.
fn resources(what: &str, more: &[&str]) -> (SocketAddr, Vec<String>) {
    own_network();
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 20_000));
    let arguments: Vec<&str> = [what, "20000"].into_iter().chain(more.iter().copied()).collect();
    (addr, python("resources.py", &arguments))
}

/// How much one worker's doings may add to what reuse-run has open.
const FDS: usize = 200;

// Hostile and odd calls.

#[test]
fn odd_calls_get_what_the_kernel_would_have_said() {
    own_network();
    let probe = python("probe.py", &["20001", "20002", "20003"]);
    let bare = Command::new(&probe[0]).args(&probe[1..]).output().expect("run the probe");
    assert!(bare.status.success(), "{bare:?}");
    let bare = String::from_utf8(bare.stdout).expect("text");
    assert!(bare.lines().count() > 150, "{bare}");

    let mut service = Service::run("-n 1 --ready notify", &probe);
    assert_eq!(service.wait_end().code(), Some(0), "{}", service.log.text());
    let wrapped = service.out.text();
    // Before Linux 5.19 a signal may have a bind repeated, which can't be told from a second one.
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

/// Major and minor version.
fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().expect("a number"));
    (numbers.next().expect("a version"), numbers.next().expect("a version"))
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
    let mut service = Service::run("-n 1 --ready-timeout 10m", &command); // it takes seconds, or more on a busy machine
    let mut most = 0;
    wait_until("it serves", DEADLINE, || {
        most = most.max(service.fds());
        service.out.count_of("serves") == 1
    });
    assert!(most < FDS, "reuse-run had {most} fds open");
    service.wait_for_line("generation 1 is ready");
    assert_eq!(get(addr).generation, Some(1));
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

/// A listener that is not the worker's own but of a process behind it is open all the same.
#[track_caller]
fn assert_queue_is_left_alone(what: &str) {
    let folder = Folder::new();
    folder.raise("deaf");
    let (addr, command) = resources(what, &[&folder.path("deaf")]);
    let mut service = Service::run_ready("-n 1", &command);
    let client = Waiting::new(addr);
    // Longer than it takes to find out that nobody has a listener.
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
    assert_queue_is_left_alone("grandchild");
}

#[test]
fn a_worker_may_bind_from_a_grandchild_whose_parent_is_gone() {
    assert_queue_is_left_alone("orphan");
}

/// The worker does something violent and serves afterwards; reuse-run is all there.
#[track_caller]
fn assert_survived(command: &[String], addr: SocketAddr, says: &str) {
    let mut service = Service::run_ready("-n 1", command);
    service.wait_for_output("serves");
    service.wait_for_output(says);
    assert_eq!(get(addr).generation, Some(1));
    assert!(service.fds() < FDS, "reuse-run has {} fds open", service.fds());
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    assert!(service.fds() < FDS, "reuse-run has {} fds open", service.fds());
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
fn a_process_may_be_stopped_while_its_bind_is_answered_and_nobody_else_waits_for_it() {
    let (addr, command) = resources("stopped", &[]);
    assert_survived(&command, addr, "50 are dead");
}

#[test]
fn a_worker_killed_again_and_again_while_it_binds_is_replaced_each_time() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 2 --max-failures 0", &folder.server(addr, &[]));
    let load = Load::start(LoadOptions::new(addr, 2));
    // Killed as soon as they exist, so in every step of their start; by reloads the delay stays short.
    for _ in 0..10 {
        let before = service.workers();
        let from = service.log.count();
        service.signal(Signal::SIGUSR2);
        let mut new = None;
        wait_until("a new worker", DEADLINE, || {
            new = service.workers().into_iter().find(|pid| !before.contains(pid));
            new.is_some()
        });
        let _ =
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(new.expect("a pid") as i32), Signal::SIGKILL);
        service.wait_for_line_where(from, "ends the reload", |line| {
            line.contains("reload abandoned") || line.contains("reload done")
        });
        wait_until("two workers", DEADLINE, || service.workers().len() == 2);
    }
    service.reload();
    let report = load.stop();
    // One that was killed when it served already may take with it what it had.
    assert!(report.counts.failed <= 20, "{report}");
    get(addr);
    service.stop();
}

// Strangers.

fn stranger(addr: SocketAddr, share: bool, v6only: bool) -> TcpListener {
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
fn a_stranger_is_found_before_the_first_bind_and_named() {
    let (any, local): (IpAddr, IpAddr) = (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into());
    let (any6, local6): (IpAddr, IpAddr) = (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into());
    let pairs = [(local, local), (any, local), (any6, local), (any6, any), (any, any6), (any6, local6)];
    for share in [false, true] {
        for (its, wanted) in pairs {
            let port = free_port();
            let (its, wanted) = (SocketAddr::new(its, port), SocketAddr::new(wanted, port));
            let _listener = stranger(its, share, false);
            let mut service = Service::run("-n 2", &naive(wanted));
            let status = service.wait_end();
            let log = service.log.text();
            assert_eq!(status.code(), Some(libc::EADDRINUSE), "{its} has what {wanted} wants: {log}");
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
fn a_listener_that_does_not_overlap_is_no_stranger() {
    let port = free_port();
    let _other_address = stranger((Ipv4Addr::new(127, 0, 0, 9), port).into(), false, false);
    let _other_family = stranger((Ipv6Addr::UNSPECIFIED, port).into(), false, true);
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut service = Service::run_ready("-n 2", &naive(addr));
    get(addr);
    service.stop();
}

#[test]
fn a_stranger_that_joins_later_is_found_at_the_next_reload_and_kept_out() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 4).timeout(Duration::from_secs(30)));
    wait_until("answers", DEADLINE, || load.snapshot().answered > 50);
    let listener = stranger(addr, true, false);
    service.reload();
    let line = service.log.find(0, "shared by another program").expect("the log tells").text;
    for part in [addr.to_string(), std::process::id().to_string()] {
        assert!(line.contains(&part), "{part:?} is not in: {line}");
    }
    while let Ok((connection, _)) = listener.accept() {
        drop(connection);
    }
    let nobody_came = || assert!(listener.accept().is_err(), "the stranger got a connection");
    for _ in 0..10 {
        service.reload();
        nobody_came();
    }
    // It may go, and another one come.
    drop(listener);
    service.reload();
    let listener = stranger(addr, true, false);
    for _ in 0..5 {
        service.reload();
    }
    assert!(listener.accept().is_err(), "the stranger got a connection");
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_failed();
    assert_eq!(service.log.count_of("shared by another program"), 2, "{}", service.log.text());
    service.stop();
}

// What runs out or isn't there.

/// Ends by itself with status 1, one line of the log that says `part`, and nothing left.
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

/// `reuse-run OPTIONS -- COMMAND` behind a shell's `text`, which is to run "$0" "$@".
fn behind_shell(text: &str, options: &str, command: &[String]) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", text]).arg(reuse_run().get_program()).args(arguments(options, command));
    shell
}

#[test]
fn without_proc_it_says_so_and_exits_1() {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", r#"mount -t tmpfs none /proc && exec "$0" "$@""#]);
    command.arg(reuse_run().get_program()).args(arguments("-n 2", &naive(free_address())));
    assert_ends(command, "/proc");
}

#[test]
fn without_seccomp_it_says_so_and_goes_on_without_interception() {
    for errno in ["EPERM", "ENOSYS", "EINVAL", "ENOMEM"] {
        let command = python("without_seccomp.py", &[errno]);
        let mut python = Command::new(&command[0]);
        python.args(&command[1..]).arg(reuse_run().get_program());
        python.args(arguments("-n 1", &naive(free_address())));
        let mut service = Service::spawn(python);
        service.wait_for_line("workers can't be intercepted");
        assert_starts(&service);
        service.stop();
    }
}

#[test]
fn inside_another_reuse_run_it_says_so_and_goes_on_without_interception() {
    let inner = reuse_run().get_program().to_str().expect("a path in UTF-8").to_owned();
    let addr = free_address();
    let inner: Vec<String> = [inner].into_iter().chain(arguments("-n 1", &naive(addr))).collect();
    let mut service = Service::run("-n 1", &inner);
    service.wait_for_line("workers can't be intercepted");
    assert_starts(&service);
    service.stop();
}

#[test]
fn too_few_fds_for_the_first_generation_end_the_start_with_1_and_leave_nothing() {
    let command = behind_shell(r#"ulimit -n 24; exec "$0" "$@""#, "-n 20", &naive(free_address()));
    let mut service = Service::spawn(command);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert!(service.log.text().contains("Too many open files"), "{}", service.log.text());
    assert_eq!(service.descendants(), [0u32; 0]);
}

/// The first generation gets ready; that it doesn't is seen at once.
#[track_caller]
fn assert_starts(service: &Service) {
    let over = |line: &str| line.contains("generation 1 is ready") || line.contains("giving up");
    let line = service.wait_for_line_where(0, "tells how the start went", over);
    assert!(line.text.contains("generation 1 is ready"), "{}", service.log.text());
}

/// Sets the soft limit of a running process.
#[track_caller]
fn set_limit(pid: u32, limit: &str) {
    let owner = fs::metadata(format!("/proc/{pid}")).expect("it runs").uid();
    // Its own user may do that; root may not everywhere.
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={owner}"), &format!("--regid={owner}"), "--clear-groups", "prlimit"]);
    let status = command.args(["--pid", &pid.to_string(), limit]).status();
    assert!(status.expect("run prlimit").success(), "{limit}");
}

/// Under a limit that allows no start a reload is given up, a dead worker stays dead and the log says why;
/// without it the worker comes back.
#[track_caller]
fn assert_comes_back(mut service: Service, addr: SocketAddr, tight: &str, wide: &str, why: &str) {
    assert_starts(&service);
    set_limit(service.pid(), tight);
    let log = service.failing_reload();
    assert!(log.contains(why), "{log}");
    wait_until("the old workers serve on", DEADLINE, || service.workers().len() == 2);
    get(addr);

    let from = service.log.count();
    let victim = service.workers()[0];
    send(victim, Signal::SIGKILL);
    let is_failure = |line: &str| line.contains("can't be started") && line.contains(why);
    service.wait_for_line_where(from, "tells of the failure", is_failure);
    let next = service.log.count();
    service.wait_for_line_where(next, "tells of another", is_failure);
    set_limit(service.pid(), wide);
    service.wait_for_line_after(from, "is ready, a replacement");
    service.reload();
    get(addr);
    service.stop();
}

/// `reuse-run OPTIONS -- server` as a user of its own, who has no other processes. `folder` gets copies of
/// the programs where that user finds them.
fn as_user(folder: &Folder, privileges: &[&str], options: &str, addr: SocketAddr) -> Command {
    let programs = [reuse_run().get_program().to_str().expect("UTF-8").to_owned(), server()];
    let copies = ["reuse-run", "server"].map(|name| folder.path(name));
    for (program, copy) in programs.iter().zip(&copies) {
        fs::copy(program, copy).expect("copy a program");
        fs::set_permissions(copy, fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=54321", "--regid=54321", "--clear-groups"])
        .args(privileges)
        .args(["--", &copies[0]]);
    let worker = [copies[1].clone(), "--listen".to_owned(), addr.to_string()];
    command.args(arguments(options, &worker)).current_dir("/").env_remove("RUST_LOG");
    command
}

#[test]
fn an_unprivileged_user_may_run_it() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::spawn(as_user(&folder, &[], "-n 2", addr));
    assert_starts(&service);
    let load = Load::start(LoadOptions::new(addr, 4));
    for _ in 0..5 {
        answered_more(&load);
        service.reload();
    }
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_failed();
    service.stop();
}

#[test]
fn when_no_process_can_be_forked_it_is_logged_and_tried_again() {
    let (addr, folder) = (free_address(), Folder::new());
    let privileges = ["--inh-caps=+net_admin", "--ambient-caps=+net_admin"];
    let service = Service::spawn(as_user(&folder, &privileges, "-n 2 --max-failures 0", addr));
    assert_comes_back(service, addr, "--nproc=1:", "--nproc=10000:", "Resource temporarily unavailable");
}

#[test]
fn when_fds_run_out_it_is_logged_and_tried_again() {
    let addr = free_address();
    let service = Service::run("-n 2 --max-failures 0", &naive(addr));
    assert_comes_back(service, addr, "--nofile=6:", "--nofile=10000:", "Too many open files");
}
