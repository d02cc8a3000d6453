//! Sockets that are given: by `-l` to workers, by systemd to reuse-run; and what reuse-run tells systemd.

mod common;

use std::cell::RefCell;
use std::fs;
use std::io::IoSliceMut;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::process::Command;
use std::time::{Duration, Instant};

use common::load::{self, Kind, Load, LoadOptions};
use common::{
    DEADLINE, Folder, MARK, Service, Waiting, answered_more, app, arguments, free_address, free_port, get,
    inline, naive, node_app, own_network, packaged, reuse_run, send, turn, wait_until,
};
use nix::cmsg_space;
use nix::sys::signal::Signal;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt::PassCred,
};
use nix::time::{ClockId, clock_gettime};
use socket2::{Domain, Socket, Type};

/// tests/apps/python/given.py, ready in this way.
fn python(how: &str) -> Vec<String> {
    ["python3", &app("python/given.py"), how].map(str::to_owned).to_vec()
}

fn node() -> Vec<String> {
    ["node", &app("node/given.js")].map(str::to_owned).to_vec()
}

/// Waits until so many workers have printed what they were given, and returns those lines.
#[track_caller]
fn told(service: &Service, what: &str, workers: usize) -> Vec<String> {
    wait_until("what the workers were given", DEADLINE, || service.out.count_of(what) >= workers);
    let lines = service.out.all().into_iter().map(|line| line.text);
    lines.filter(|line| line.starts_with(what)).collect()
}

/// The word after `name=` in a line.
#[track_caller]
fn word<'a>(line: &'a str, name: &str) -> &'a str {
    let value = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_else(|| panic!("no {name} in {line:?}"))
}

/// A listener as given.py shows it: fd, address, port, inode number, whether it blocks.
#[track_caller]
fn listeners(line: &str) -> Vec<Vec<&str>> {
    word(line, "listeners").split(',').map(|listener| listener.split('/').collect()).collect()
}

/// Reloads under load, with a new connection for each request: none fails, every generation answers, and
/// where the switch has to be `atomic` nothing comes from one that was replaced.
#[track_caller]
fn reloads_lose_nothing(service: &Service, addr: SocketAddr, times: u32, atomic: bool) {
    let load = Load::start(LoadOptions::new(addr, 8).record());
    answered_more(&load);
    for _ in 0..times {
        service.reload();
        answered_more(&load);
    }
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_failed();
    let newest = report.counts.generations.keys().next_back();
    assert_eq!(newest, Some(&(times + 1)), "{:?}", report.counts.generations);
    if atomic {
        report.assert_nothing_stale();
        let generations = report.counts.generations.len();
        assert_eq!(generations as u32, times + 1, "{:?}", report.counts.generations);
    }
}

// Listeners by -l.

#[test]
fn a_python_worker_is_given_its_listeners_as_systemd_would_give_them() {
    let addrs = [free_address(), free_address()];
    let ports = addrs.map(|addr| addr.port().to_string());
    let options = format!("-n 2 -l {} -l {}", addrs[0], addrs[1]);
    let mut service = Service::run_ready(&options, &python("listen"));
    let lines = told(&service, "given ", 2);
    let mut inodes = Vec::new();
    for line in &lines {
        assert_eq!(word(line, "listen_pid"), word(line, "pid"), "{line}");
        assert!(service.workers().contains(&word(line, "pid").parse().expect("a pid")), "{line}");
        assert_eq!(word(line, "fds"), "2");
        assert_eq!(word(line, "names"), ports.join(":"));
        assert_eq!(word(line, "ready_fd"), "5", "the number after those of the listeners");
        for (index, listener) in listeners(line).iter().enumerate() {
            assert_eq!(listener[..3], [&*(3 + index).to_string(), "127.0.0.1", &*ports[index]], "{line}");
            assert_eq!(listener[4], "True", "it blocks, as a new socket does: {line}");
            inodes.push(listener[3].to_owned());
        }
    }
    inodes.sort();
    inodes.dedup();
    assert_eq!(inodes.len(), 4, "each worker has its own: {lines:?}");
    for addr in addrs {
        assert_eq!(get(addr).generation, Some(1));
    }
    service.stop();
}

#[test]
fn a_node_worker_that_listens_on_fds_3_and_4_serves_what_it_is_given() {
    let addrs = [free_address(), free_address()];
    let options = format!("-n 2 -l {} -l {}", addrs[0], addrs[1]);
    let mut service = Service::run_ready(&options, &node());
    for line in told(&service, "given ", 2) {
        assert_eq!(word(&line, "listen_pid"), word(&line, "pid"), "{line}");
        assert_eq!(word(&line, "fds"), "2");
        assert_eq!(word(&line, "names"), format!("{}:{}", addrs[0].port(), addrs[1].port()));
        assert_eq!(word(&line, "ready_fd"), "5");
    }
    for addr in addrs {
        assert_eq!(get(addr).generation, Some(1));
    }
    service.stop();
}

#[test]
fn an_address_may_be_a_port_or_a_port_of_one_address_or_of_all() {
    own_network();
    let ports: Vec<u16> = (0..4).map(|_| free_port()).collect();
    let options = format!(
        "-n 1 -l {} -l :{} --listen 127.0.0.1:{} --listen=[::]:{}",
        ports[0], ports[1], ports[2], ports[3]
    );
    let mut service = Service::run_ready(&options, &python("listen"));
    let line = &told(&service, "given ", 1)[0];
    assert_eq!(word(line, "ready_fd"), "7", "one digit, as dash wants it");
    for port in &ports {
        assert_eq!(get((Ipv4Addr::LOCALHOST, *port).into()).generation, Some(1));
    }
    for port in [ports[0], ports[1], ports[3]] {
        assert_eq!(get((Ipv6Addr::LOCALHOST, port).into()).generation, Some(1));
    }
    let elsewhere =
        load::get(SocketAddr::from((Ipv6Addr::LOCALHOST, ports[2])), "/", Duration::from_secs(15));
    assert_eq!(elsewhere.expect_err("nobody listens there").kind, Kind::Refused);
    service.stop();
}

#[test]
fn a_python_server_with_two_given_listeners_loses_no_request_on_either_in_10_reloads() {
    let _turn = turn();
    let addrs = [free_address(), free_address()];
    let options = format!("-n 2 -l {} -l {}", addrs[0], addrs[1]);
    let mut service = Service::run_ready(&options, &python("listen"));
    let loads = addrs.map(|addr| Load::start(LoadOptions::new(addr, 4).record()));
    loads.iter().for_each(answered_more);
    for _ in 0..10 {
        service.reload();
        loads.iter().for_each(answered_more);
    }
    for load in loads {
        let report = load.stop();
        println!("{report}");
        report.assert_nothing_failed();
        report.assert_nothing_stale();
        assert_eq!(report.counts.generations.len(), 11, "{:?}", report.counts.generations);
    }
    service.stop();
}

#[test]
fn a_node_server_with_a_given_listener_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready(&format!("-n 2 -l {addr}"), &node());
    reloads_lose_nothing(&service, addr, 5, true);
    service.stop();
}

#[test]
fn a_server_that_never_calls_listen_loses_no_request_in_5_reloads_under_ready_notify() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready(&format!("-n 2 --ready notify -l {addr}"), &python("pipe"));
    reloads_lose_nothing(&service, addr, 5, true);
    service.stop();
}

#[test]
fn without_interception_given_listeners_lose_no_request_either() {
    let _turn = turn();
    let addr = free_address();
    let options = format!("-n 2 --no-intercept --ready notify -l {addr}");
    let mut service = Service::run_ready(&options, &python("pipe"));
    reloads_lose_nothing(&service, addr, 5, true);
    service.stop();
}

#[test]
fn a_worker_that_binds_the_given_address_anyway_gets_the_same_socket() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready(&format!("-n 2 -l {addr}"), &python("bind"));
    let (given, bound) = (told(&service, "given ", 2), told(&service, "bound ", 2));
    for line in given {
        let same = bound.iter().find(|other| word(other, "pid") == word(&line, "pid")).expect("it binds");
        assert_eq!(listeners(same)[0][3], listeners(&line)[0][3], "inode numbers: {line}; {same}");
    }
    reloads_lose_nothing(&service, addr, 5, true);
    service.stop();
}

#[test]
fn an_app_that_knows_nothing_of_given_listeners_works_with_them_as_it_is() {
    let _turn = turn();
    own_network();
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 3000));
    let mut service = Service::run_ready("-n 2 -l 3000", &["node", &node_app("express/app.js")]);
    let load = Load::start(LoadOptions::new(addr, 8));
    answered_more(&load);
    for _ in 0..3 {
        service.reload();
        answered_more(&load);
    }
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_failed();
    service.stop();
}

/// What waits on the listener of a worker that is killed is answered by the worker that replaces it.
#[track_caller]
fn a_queue_outlives_its_worker(command: &[String], addr: SocketAddr, deaf: &Folder) {
    let mut service = Service::run_ready(&format!("-n 1 -l {addr}"), command);
    let first = service.workers()[0];
    let queued: Vec<Waiting> = (0..5).map(|_| Waiting::new(addr)).collect();
    assert!(queued.iter().all(Waiting::waits));
    send(first, Signal::SIGKILL);
    deaf.lower("deaf");
    for client in queued {
        let origin = client.outcome().expect("an answer");
        assert_eq!(origin.generation, Some(1));
        assert_ne!(origin.pid, Some(first));
    }
    service.stop();
}

#[test]
fn the_replacement_of_a_crashed_worker_serves_what_was_queued_on_its_given_listener() {
    // Alone: the queue is reset when the replacement takes long.
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("deaf");
    let mut command = python("listen");
    command.push(folder.path("deaf"));
    a_queue_outlives_its_worker(&command, addr, &folder);
}

#[test]
fn the_replacement_of_a_crashed_worker_that_binds_the_given_address_serves_what_was_queued() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("deaf");
    let mut command = naive(addr);
    command.extend(["--deaf-while".to_owned(), folder.path("deaf")]);
    a_queue_outlives_its_worker(&command, addr, &folder);
}

#[test]
fn what_is_queued_on_a_given_listener_is_served_although_the_command_was_missing_for_a_while() {
    // Alone: the queue is reset when the replacement takes long.
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("deaf");
    let (script, away) = (folder.path("serve"), folder.path("away"));
    let text = format!("#!/bin/sh\nexec {} --deaf-while {}\n", naive(addr).join(" "), folder.path("deaf"));
    fs::write(&script, text).expect("write a script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("make it executable");
    let mut service = Service::run_ready(&format!("-n 1 -l {addr}"), &[&script]);
    let first = service.workers()[0];
    let queued = Waiting::new(addr);
    fs::rename(&script, &away).expect("move the script away");
    send(first, Signal::SIGKILL);
    service.wait_for_line("can't be started");
    let later = Waiting::new(addr);
    fs::rename(&away, &script).expect("put the script back");
    folder.lower("deaf");
    for client in [queued, later] {
        let origin = client.outcome().expect("an answer");
        assert_eq!(origin.generation, Some(1));
        assert_ne!(origin.pid, Some(first));
    }
    service.stop();
}

#[test]
fn a_given_listener_has_a_long_queue_whatever_the_workers_before_have_done_to_it() {
    let addr = free_address();
    let program = "import os, signal, socket, struct, sys\n\
        server = socket.socket(fileno=3)\n\
        info = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)\n\
        os.write(1, b'queue of %d\\n' % struct.unpack_from('I', info, 28)[0])\n\
        def stop(*_):\n\
        \x20   server.shutdown(socket.SHUT_RDWR)\n\
        \x20   sys.exit(0)\n\
        signal.signal(signal.SIGINT, stop)\n\
        os.write(int(os.environ['READY_FD']), b'\\n')\n\
        while True: signal.pause()";
    let mut service = Service::run_ready(&format!("-n 2 --ready notify -l {addr}"), &inline(program, &[]));
    for _ in 0..3 {
        service.reload();
    }
    let from = service.log.count();
    send(service.workers()[0], Signal::SIGKILL);
    service.wait_for_line_after(from, "a replacement");
    wait_until("9 workers", DEADLINE, || service.out.count_of("queue of") == 9);
    service.stop();
    let short = |line: &common::Line| {
        line.text
            .strip_prefix("queue of ")
            .and_then(|long| long.parse().ok())
            .is_none_or(|long: u32| long < 100)
    };
    assert!(!service.out.all().iter().any(short), "{}", service.out.text());
}

// Listeners that workers share by themselves.

#[test]
fn without_interception_an_old_worker_may_finish_its_request_too() {
    let (addr, folder) = (free_address(), Folder::new());
    let program = "import os, socket, socketserver, sys, time\n\
        folder, port = sys.argv[1:]\n\
        class Handler(socketserver.StreamRequestHandler):\n\
        \x20   def handle(self):\n\
        \x20       while self.rfile.readline().strip(): pass\n\
        \x20       print('works', flush=True)\n\
        \x20       while not os.path.exists(folder + 'go'): time.sleep(0.01)\n\
        \x20       body = 'generation=' + os.environ['REUSE_RUN_GENERATION'] + '\\n'\n\
        \x20       head = 'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n'\n\
        \x20       self.wfile.write((head % len(body) + body).encode())\n\
        class Server(socketserver.ThreadingTCPServer):\n\
        \x20   daemon_threads = True\n\
        \x20   def server_bind(self):\n\
        \x20       self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n\
        \x20       super().server_bind()\n\
        Server(('127.0.0.1', int(port)), Handler).serve_forever()";
    let command = inline(program, &[&folder.path(""), &addr.port().to_string()]);
    let mut service = Service::run_ready("-n 1 --no-intercept --drain 100s", &command);
    let old = service.workers()[0];
    let client = Waiting::new(addr);
    service.wait_for_output("works");
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    service.wait_for_line_after(from, "generation 2 serves");
    service.keeps(old);
    assert!(client.waits());
    folder.raise("go");
    assert_eq!(client.outcome().expect("an answer").generation, Some(1));
    service.wait_for_line_after(from, "reload done");
    service.stop();
}

// Addresses that can't be had.

/// `-l` fails: status 1, an error in one line with these parts, and no worker was started.
#[track_caller]
fn assert_not_to_be_had(command: impl FnOnce(&[String]) -> Command, listen: &str, parts: &[&str]) {
    let folder = Folder::new();
    let worker = ["touch", &folder.path("started")].map(str::to_owned);
    let options = format!("-n 2 -l {listen}");
    let mut service = Service::spawn(command(&arguments(&options, &worker)));
    let status = service.wait_end();
    let log = service.log.text();
    assert_eq!(status.code(), Some(1), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
    for part in parts.iter().chain(&[": error: "]) {
        assert!(log.contains(part), "no {part:?} in {log}");
    }
    assert!(!fs::exists(folder.path("started")).expect("look"), "a worker was started: {log}");
}

fn plain(arguments: &[String]) -> Command {
    let mut command = reuse_run();
    command.args(arguments);
    command
}

#[test]
fn an_address_in_use_ends_the_start_before_a_worker_runs() {
    let addr = free_address();
    let _listener = TcpListener::bind(addr).expect("listen");
    let port = addr.port();
    for listen in [addr.to_string(), port.to_string(), format!("0.0.0.0:{port}")] {
        assert_not_to_be_had(plain, &listen, &[&port.to_string(), "in use"]);
    }
}

#[test]
fn an_address_whose_owner_would_share_it_is_in_use_too() {
    let addr = free_address();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
    socket.set_reuse_port(true).expect("SO_REUSEPORT");
    socket.bind(&addr.into()).expect("bind");
    socket.listen(1).expect("listen");
    assert_not_to_be_had(plain, &addr.to_string(), &[&addr.to_string(), "in use"]);
}

#[test]
fn the_last_of_several_addresses_in_use_ends_the_start_before_a_worker_runs() {
    let (free, taken) = (free_address(), free_address());
    let _listener = TcpListener::bind(taken).expect("listen");
    assert_not_to_be_had(plain, &format!("{free} -l {taken}"), &[&taken.to_string(), "in use"]);
}

#[test]
fn a_port_that_another_user_may_not_have_ends_the_start_before_a_worker_runs() {
    own_network(); // a new one has the kernel's default of net.ipv4.ip_unprivileged_port_start
    let folder = Folder::new();
    let copy = folder.path("reuse-run"); // where that user finds it
    fs::copy(reuse_run().get_program(), &copy).expect("copy the program");
    let as_user = |arguments: &[String]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=54321", "--regid=54321", "--clear-groups", "--", &copy]);
        command.args(arguments).current_dir("/").env_remove("RUST_LOG");
        command
    };
    let parts = ["127.0.0.1:80", "Permission denied", "takes root or CAP_NET_BIND_SERVICE"];
    assert_not_to_be_had(as_user, "127.0.0.1:80", &parts);
}

#[test]
fn an_address_that_is_not_local_ends_the_start_before_a_worker_runs() {
    let addr = format!("192.0.2.1:{}", free_port());
    assert_not_to_be_had(plain, &addr, &[&addr, "Cannot assign requested address"]);
}

#[test]
fn a_worker_that_binds_another_address_of_the_given_port_is_told_of() {
    let port = free_port();
    let addr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let mut service = Service::run(&format!("-n 1 -l {port}"), &naive(addr));
    assert_eq!(service.wait_end().code(), Some(98), "the server exits with its errno, EADDRINUSE");
    let line = service.wait_for_line("have -l and the program name the same address").text;
    assert!(line.contains(&addr.to_string()) && line.contains(&format!("[::]:{port}")), "{line}");
}

// Servers from PyPI.

#[test]
fn gunicorn_with_a_given_listener_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    // SIGTERM is its graceful stop, SIGINT a quick one. It never calls listen(2) on what it is given but
    // says READY=1 to NOTIFY_SOCKET.
    let options = format!("-n 2 --stop-signal TERM -l {addr}");
    let mut service = packaged(&options, "gunicorn", &["--workers", "2", "web:wsgi"]);
    reloads_lose_nothing(&service, addr, 5, true);
    service.stop();
}

#[test]
fn gunicorn_that_binds_by_itself_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    // It asks the kernel whether its socket listens already (SO_ACCEPTCONN), and if so leaves that out.
    let more = ["--workers", "2", "--bind", &addr.to_string(), "web:wsgi"];
    let mut service = packaged("-n 2 --stop-signal TERM", "gunicorn", &more);
    reloads_lose_nothing(&service, addr, 5, true);
    service.stop();
}

#[test]
fn uvicorn_with_a_given_listener_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    let more = ["--fd", "3", "--lifespan", "off", "--no-access-log", "web:asgi"];
    let mut service = packaged(&format!("-n 2 -l {addr}"), "uvicorn", &more);
    reloads_lose_nothing(&service, addr, 5, true);
    service.stop();
}

// systemd's own tools.

#[test]
fn what_systemd_socket_activate_gives_reuse_run_is_shared_by_all_workers() {
    let _turn = turn();
    let (shared, own) = (free_address(), free_address());
    let mut command = Command::new("systemd-socket-activate");
    // It gives its child no environment but what it is told to.
    command.args(["--listen", &shared.to_string(), "--fdname=web", "--setenv", MARK]);
    command.arg(reuse_run().get_program());
    command.args(arguments(&format!("-n 2 --ready notify -l {own}"), &python("pipe")));
    let mut service = Service::spawn(command);
    service.wait_for_line(&format!("Listening on {shared}"));
    let first = Waiting::new(shared); // reuse-run is started by the first client, and in the same process
    service.wait_for_line("generation 1 is ready");
    assert_eq!(first.outcome().expect("an answer").generation, Some(1));

    let lines = told(&service, "given ", 2);
    let inode = |listener: usize| lines.iter().map(|line| listeners(line)[listener][3]).collect::<Vec<_>>();
    for line in &lines {
        assert_eq!(word(line, "listen_pid"), word(line, "pid"), "{line}");
        assert_eq!((word(line, "fds"), word(line, "ready_fd")), ("2", "5"), "{line}");
        assert_eq!(word(line, "names"), format!("web:{}", own.port()));
        let ports: Vec<&str> = listeners(line).iter().map(|listener| listener[2]).collect();
        assert_eq!(ports, [shared.port().to_string(), own.port().to_string()], "{line}");
    }
    assert_eq!(inode(0)[0], inode(0)[1], "one socket for both");
    assert_ne!(inode(1)[0], inode(1)[1], "one for each");

    let load = Load::start(LoadOptions::new(shared, 8));
    wait_until("both workers answer", DEADLINE, || load.snapshot().slots.len() == 2);
    load.stop().assert_nothing_failed();
    // Both generations have the one queue for a while, so that switch is not atomic.
    reloads_lose_nothing(&service, shared, 5, false);
    assert_eq!(get(own).generation, Some(6));
    service.stop();
}

#[test]
fn a_worker_that_listens_on_what_systemd_gave_reuse_run_is_ready() {
    let shared = free_address();
    let mut command = Command::new("systemd-socket-activate");
    command.args(["--listen", &shared.to_string(), "--setenv", MARK]);
    command.arg(reuse_run().get_program());
    command.args(arguments("-n 2 --ready listen --ready-timeout 20s", &python("listen")));
    let mut service = Service::spawn(command);
    service.wait_for_line(&format!("Listening on {shared}"));
    let first = Waiting::new(shared);
    let over = |line: &str| line.contains("generation 1 is ready") || line.contains("giving up");
    let line = service.wait_for_line_where(0, "tells how the start went", over);
    assert!(line.text.contains("generation 1 is ready"), "{}", service.log.text());
    assert_eq!(first.outcome().expect("an answer").generation, Some(1));
    service.reload();
    service.stop();
}

#[test]
fn systemd_notify_started_by_a_worker_says_that_it_is_ready() {
    let addr = free_address();
    let options = format!("-n 2 --ready notify -l {addr}");
    let mut service = Service::run_ready(&options, &python("systemd-notify"));
    // It waits until its message was read, and fails when it wasn't.
    for line in told(&service, "systemd-notify ", 2) {
        assert_eq!(word(&line, "status"), "0", "{line}");
    }
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

// What systemd is told.

/// A service manager: its end of NOTIFY_SOCKET.
struct Manager {
    socket: UnixDatagram,
    /// What was said, by whom and when.
    heard: RefCell<Vec<Message>>,
}

#[derive(Clone, Debug)]
struct Message {
    text: String,
    pid: u32,
    at: Instant,
}

impl Message {
    fn says(&self, line: &str) -> bool {
        self.text.lines().any(|text| text == line)
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    }
}

impl Manager {
    fn at(folder: &Folder) -> Manager {
        Manager::new(UnixDatagram::bind(folder.path("notify")).expect("bind"))
    }

    fn new(socket: UnixDatagram) -> Manager {
        socket.set_nonblocking(true).expect("set non-blocking");
        setsockopt(&socket, PassCred, &true).expect("SO_PASSCRED");
        Manager { socket, heard: RefCell::default() }
    }

    /// All that was said so far.
    fn heard(&self) -> Vec<Message> {
        let mut bytes = [0; 4096];
        let mut space = cmsg_space!(UnixCredentials);
        loop {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            let fd = self.socket.as_raw_fd();
            let Ok(message) = recvmsg::<()>(fd, &mut buffers, Some(&mut space), MsgFlags::empty()) else {
                return self.heard.borrow().clone();
            };
            let pid = message.cmsgs().expect("control messages").find_map(|control| match control {
                ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid() as u32),
                _ => None,
            });
            let (pid, length) = (pid.expect("credentials"), message.bytes);
            let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
            self.heard.borrow_mut().push(Message { text, pid, at: Instant::now() });
        }
    }

    /// Waits for message number `index`, which must say this.
    #[track_caller]
    fn wait_for(&self, index: usize, line: &str) -> Message {
        wait_until(line, DEADLINE, || self.heard().len() > index);
        let message = self.heard()[index].clone();
        assert!(message.says(line), "not {line:?} but {:?}", self.heard());
        message
    }
}

/// reuse-run as a manager starts it, and SIGHUP as it is with a manager, whoever runs the tests.
fn managed(socket: &str, more: &[(&str, &str)], arguments: &[String]) -> Service {
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP").arg(reuse_run().get_program()).args(arguments);
    command.env_remove("RUST_LOG").env("NOTIFY_SOCKET", socket).envs(more.iter().copied());
    Service::spawn(command)
}

fn monotonic_usec() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a clock");
    now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000
}

#[test]
fn systemd_hears_of_ready_reloading_and_stopping_each_at_its_time() {
    let (addr, folder, sockets) = (free_address(), Folder::new(), Folder::new());
    let manager = Manager::at(&sockets);
    folder.raise("hold-1-1");
    let options = arguments("-n 2", &folder.server(addr, &[]));
    let mut service = managed(&sockets.path("notify"), &[], &options);
    let pid = service.pid();

    // Worker 0 is ready and answers; worker 1 isn't.
    wait_until("the first worker", DEADLINE, || TcpStream::connect(addr).is_ok());
    assert_eq!(get(addr).slot, Some(0));
    assert_eq!(manager.heard().len(), 0, "{:?}", manager.heard());
    folder.lower("hold-1-1");
    let ready = manager.wait_for(0, "READY=1");
    assert_eq!(ready.value("STATUS"), Some("2 workers of generation 1 serve"));

    // A reload by SIGHUP, held up half-way.
    folder.raise("hold-2-1");
    let (from, before) = (service.log.count(), monotonic_usec());
    service.signal(Signal::SIGHUP);
    let reloading = manager.wait_for(1, "RELOADING=1");
    let stamp: i64 = reloading.value("MONOTONIC_USEC").expect("a time").parse().expect("a number");
    assert!((before..=monotonic_usec()).contains(&stamp), "{stamp}");
    assert!(reloading.value("STATUS").is_some(), "{reloading:?}");
    assert!(!reloading.says("READY=1"), "{reloading:?}");
    wait_until("worker 0 of generation 2", DEADLINE, || service.workers().len() == 4);
    assert_eq!(manager.heard().len(), 2, "{:?}", manager.heard());
    folder.lower("hold-2-1");
    service.wait_for_line_after(from, "reload done");
    let ready = manager.wait_for(2, "READY=1");
    assert_eq!(ready.value("STATUS"), Some("2 workers of generation 2 serve"));

    // One that is abandoned.
    folder.raise("broken-3-0");
    let from = service.log.count();
    service.signal(Signal::SIGHUP);
    manager.wait_for(3, "RELOADING=1");
    service.wait_for_line_after(from, "reload abandoned");
    let ready = manager.wait_for(4, "READY=1");
    assert_eq!(ready.value("STATUS"), Some("2 workers of generation 2 serve"));
    assert_eq!(get(addr).generation, Some(2));

    service.stop();
    let stopping = manager.wait_for(5, "STOPPING=1");
    assert!(stopping.value("STATUS").is_some(), "{stopping:?}");
    let heard = manager.heard();
    assert_eq!(heard.len(), 6, "{heard:?}");
    for message in heard {
        assert_eq!(message.pid, pid, "{message:?}");
        assert_eq!(message.value("MAINPID"), None, "the main process never changes");
        assert_eq!(message.value("WATCHDOG"), None, "none was asked for");
    }
}

#[test]
fn a_manager_with_an_abstract_socket_is_told_too() {
    own_network(); // abstract names belong to the network
    let name = "reuse-run-test-manager";
    let address = UnixAddr::from_abstract_name(name).expect("a name");
    let manager = Manager::new(UnixDatagram::bind_addr(&address).expect("bind"));
    let addr = free_address();
    let mut service = managed(&format!("@{name}"), &[], &arguments("-n 1", &naive(addr)));
    manager.wait_for(0, "READY=1");
    service.stop();
    manager.wait_for(1, "STOPPING=1");
}

#[test]
fn a_watchdog_hears_twice_in_its_time_whatever_goes_on() {
    let (addr, folder, sockets) = (free_address(), Folder::new(), Folder::new());
    let manager = Manager::at(&sockets);
    let period = Duration::from_secs(2);
    let options = arguments("-n 2", &folder.server(addr, &[]));
    let mut service = managed(&sockets.path("notify"), &[("WATCHDOG_USEC", "2000000")], &options);
    let beats = || {
        let heard = manager.heard().into_iter().filter(|message| message.says("WATCHDOG=1"));
        heard.map(|message| message.at).collect::<Vec<_>>()
    };
    // Nothing happens during the first three, a reload is held up during the rest.
    wait_until("3 beats", DEADLINE, || beats().len() >= 3);
    folder.raise("hold-2-0");
    service.signal(Signal::SIGHUP);
    wait_until("5 beats", DEADLINE, || beats().len() >= 5);
    let beats = beats();
    for pair in beats.windows(2) {
        assert!(pair[1] - pair[0] < period, "a manager would give up on it: {beats:?}");
    }
    let all = beats[4] - beats[0];
    assert!(all > 4 * period / 2 - Duration::from_millis(500), "no more often than needed: {beats:?}");
    folder.lower("hold-2-0");
    service.wait_for_line("reload done");
    service.stop();
}

#[test]
fn a_watchdog_of_another_process_hears_nothing() {
    let (addr, sockets) = (free_address(), Folder::new());
    let manager = Manager::at(&sockets);
    let watchdog = [("WATCHDOG_USEC", "1000"), ("WATCHDOG_PID", "1")];
    let mut service = managed(&sockets.path("notify"), &watchdog, &arguments("-n 1", &naive(addr)));
    manager.wait_for(0, "READY=1");
    service.reload();
    manager.wait_for(2, "READY=1");
    service.stop();
    manager.wait_for(3, "STOPPING=1");
    assert_eq!(manager.heard().len(), 4, "{:?}", manager.heard());
}

#[test]
fn a_manager_that_has_gone_is_no_trouble() {
    let (addr, sockets) = (free_address(), Folder::new());
    let manager = Manager::at(&sockets);
    let watchdog = [("WATCHDOG_USEC", "20000")];
    let mut service = managed(&sockets.path("notify"), &watchdog, &arguments("-n 2", &naive(addr)));
    service.wait_for_line("generation 1 is ready");
    drop(manager);
    service.reload();
    fs::remove_file(sockets.path("notify")).expect("remove the socket");
    service.reload();
    assert_eq!(get(addr).generation, Some(3));
    service.stop();
}

#[test]
fn a_manager_that_does_not_read_holds_nothing_up() {
    let (addr, sockets) = (free_address(), Folder::new());
    let manager = Manager::at(&sockets);
    let watchdog = [("WATCHDOG_USEC", "2000")];
    let mut service = managed(&sockets.path("notify"), &watchdog, &arguments("-n 1", &naive(addr)));
    // Full is its queue when it takes no message of ours either (net.unix.max_dgram_qlen).
    let other = UnixDatagram::unbound().expect("a socket");
    other.set_nonblocking(true).expect("set non-blocking");
    wait_until("a full queue", DEADLINE, || other.send_to(b"", sockets.path("notify")).is_err());
    service.wait_for_line("generation 1 is ready");
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
    drop(manager);
}
