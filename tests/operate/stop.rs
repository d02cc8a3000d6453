//! `stop` and `--pidfile`.

use std::fs::{self, OpenOptions};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use crate::common::{
    DEADLINE, Folder, Process, Service, User, begin, free_address, get, get_path, naive, naive_with,
    needs_other_users, own_network, redirected, run, send, wait_until,
};
use crate::find::run_as;

#[test]
fn stop_returns_when_the_process_has_ended_though_its_output_is_not_read() {
    let folder = Folder::new();
    let pipe = folder.path("pipe");
    nix::unistd::mkfifo(pipe.as_str(), Mode::S_IRWXU).expect("a FIFO");
    let reader = OpenOptions::new().read(true).write(true).open(&pipe).expect("open the FIFO");
    let flood = r#"echo >&$READY_FD; exec yes"#;
    let service = Service::spawn_ready(redirected(
        &format!(">{pipe}"),
        "--label -n 1 --ready notify",
        &["sh", "-c", flood],
    ));
    wait_until("a full pipe", DEADLINE, || {
        poll(&mut [PollFd::new(reader.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO) == Ok(0)
    });
    let pid = service.pid();
    let outcome = run(&service, "stop");
    let state = Process::read(pid).map(|process| process.state);
    assert!(state.is_none_or(|state| state == 'Z'), "it lives on: {state:?} {outcome:?}");
}

#[test]
fn when_stop_returns_the_port_is_free() {
    for _ in 0..10 {
        let addr = free_address();
        let mut service = Service::run_ready("-n 2", &naive(addr));
        get(addr);
        let outcome = run(&service, "stop");
        let bound = TcpListener::bind(addr);
        outcome.assert_done("every worker ended by itself");
        bound.unwrap_or_else(|error| panic!("bind {addr}: {error}"));
        assert_eq!(service.wait_end().code(), Some(0));
        assert_eq!(service.descendants(), [0u32; 0]);
    }
}

#[test]
fn a_stop_of_many_workers_makes_a_spare_socket_for_each_and_not_for_each_at_each_end() {
    own_network();
    let addr = free_address();
    let mut service = Service::run_ready("-n 16", &naive_with(addr, &["--keep-alive"]));
    let busy = thread::spawn(move || get_path(addr, "/sleep/1500?id=x"));
    service.wait_for_output("begun x");
    service.signal(Signal::SIGTERM);
    wait_until("the end of the others", DEADLINE, || service.workers().len() == 1);
    let sockets = fs::read_to_string("/proc/thread-self/net/tcp").expect("the sockets");
    let is_listening = |line: &&str| line.split_whitespace().nth(3) == Some("0A");
    let listeners = sockets.lines().filter(is_listening).count();
    assert!(listeners <= 2 * 16 + 1, "{listeners} listeners");
    busy.join().expect("the request was answered");
    assert_eq!(service.wait_end().code(), Some(0));
}

#[test]
fn stop_exits_with_1_when_a_worker_had_to_be_killed() {
    let addr = free_address();
    let command = naive_with(addr, &["--ignore-int"]);
    let mut service = Service::run_ready("-n 1 --stop-timeout 200ms", &command);
    run(&service, "stop").assert_failed(&["stopped with status 1"]);
    TcpListener::bind(addr).expect("the port is free");
    assert_eq!(service.wait_end().code(), Some(1));
}

#[test]
fn after_stop_with_no_wait_no_other_command_is_accepted() {
    let mut service = Service::run_ready("-n 1", &naive_with(free_address(), &["--ignore-int"]));
    run(&service, "stop --no-wait").assert_done("stop begun");
    for words in ["reload", "scale 2", "reload --abort"] {
        run(&service, words).assert_failed(&["reuse-run is stopping"]);
    }
    run(&service, "stop --timeout 100ms").assert_failed(&["100ms"]);
    let stop = begin(&service, "stop");
    send(service.workers()[0], Signal::SIGKILL);
    assert_eq!(service.wait_end().code(), Some(0));
    drop(stop);
}

#[test]
fn the_pid_file_exists_from_the_first_readiness_to_the_end() {
    let folder = Folder::new();
    let file = folder.path("pid");
    folder.raise("hold-1-0");
    let options = format!("-n 1 --pidfile {file}");
    let mut service = Service::run(&options, &folder.server(free_address(), &[]));
    wait_until("the worker runs", DEADLINE, || !service.workers().is_empty());
    assert!(!fs::exists(&file).expect("stat"));
    folder.lower("hold-1-0");
    wait_until("the PID file", DEADLINE, || fs::exists(&file).expect("stat"));
    let expected = format!("{}\n", service.pid());
    assert_eq!(fs::read_to_string(&file).expect("read"), expected);
    service.wait_for_line("generation 1 is ready");
    service.reload();
    assert_eq!(fs::read_to_string(&file).expect("read"), expected);
    let files = fs::read_dir(&folder.0).expect("list the folder").count();
    assert_eq!(files, 1, "there is no other file");
    service.stop();
    assert!(!fs::exists(&file).expect("stat"));
}

#[test]
fn a_pid_file_that_another_process_has_written_is_left_alone() {
    let folder = Folder::new();
    let file = folder.path("pid");
    let mut service = Service::run(&format!("-n 1 --pidfile {file}"), &naive(free_address()));
    wait_until("the PID file", DEADLINE, || fs::exists(&file).expect("stat"));
    fs::write(&file, "4194305\n").expect("write another PID");
    service.stop();
    assert_eq!(fs::read_to_string(&file).expect("read"), "4194305\n");
}

#[test]
fn a_pid_file_of_another_one_that_runs_is_taken_over_with_a_warning() {
    let folder = Folder::new();
    let options = format!("-n 1 --pidfile {}", folder.path("pid"));
    let mut one = Service::run_ready(&options, &naive(free_address()));
    let mut other = Service::run_ready(&options, &naive(free_address()));
    other.wait_for_line(&format!("it was that of process {}, which still runs", one.pid()));
    one.stop();
    let pid = fs::read_to_string(folder.path("pid")).expect("the other's");
    assert_eq!(pid, format!("{}\n", other.pid()));
    other.stop();
    assert!(!one.log.text().contains("warn"), "{}", one.log.text());
}

#[test]
fn when_the_pid_file_cannot_be_written_no_worker_is_started() {
    needs_other_users!();
    let user = User::new();
    let folder = user.folder.path("");
    for (file, part) in [
        (format!("{folder}none/pid"), "No such file"),
        (format!("{folder}pid"), "Permission denied"),
        (folder.trim_end_matches('/').to_owned(), "Is a directory"),
    ] {
        let outcome = run_as(&user, &format!("--pidfile {file} -- echo ran"));
        outcome.assert_failed(&["--pidfile", &file, part]);
        assert_eq!((outcome.err.lines().count(), outcome.out.as_str()), (1, ""), "{outcome:?}");
    }
}
