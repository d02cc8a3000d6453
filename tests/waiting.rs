//! Others send descriptors whose last close never returns, or put something else at a path. Nothing waits for them: no
//! command, no worker, no end. The system has to have /dev/fuse.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::fs;
use std::io::Read;
use std::net::{self, TcpStream};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{
    DEADLINE, Folder, Service, all_children, app, behind, control_name, free_address, inline, kernel, naive,
    needs_other_users, own_network, python, reuse_run_with, run, status, status_time, wait_until,
};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use socket2::{Domain, Socket, Type};

/// What is sent; see tests/apps/python/descriptors.py.
const KINDS: [&str; 4] = ["linger", "nested", "flush", "write"];
/// How long a status, and a worker's unlink, may take.
const SOON: Duration = Duration::from_millis(100);

/// A worker that answers as descriptors.py says, one of whose processes sends this.
fn worker(addr: net::SocketAddr, what: &[&str]) -> Vec<String> {
    python("descriptors.py", &[&["worker", &addr.port().to_string()], what].concat())
}

/// A folder that every user may search.
fn open_folder() -> Folder {
    let folder = Folder::new();
    fs::set_permissions(&folder.0, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    folder
}

/// The time that the worker's unlink takes.
fn unlink(addr: net::SocketAddr) -> Duration {
    let mut answer = String::new();
    let mut client = TcpStream::connect(addr).expect("connect");
    client.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    client.read_to_string(&mut answer).expect("an answer");
    Duration::from_secs_f64(answer.trim().parse::<f64>().expect("a time") / 1000.0)
}

/// Asserts that neither a status nor an unlink of the worker at this address waits for anything, in the best of some tries:
/// the machine may be busy.
#[track_caller]
fn assert_waits_for_nothing(service: &Service, addr: net::SocketAddr) {
    const TRIES: usize = 100;
    let times: Vec<Duration> = (0..TRIES).map(|_| status_time(service.pid())).collect();
    assert!(times.iter().any(|time| *time < SOON), "status took {times:?}");
    let times: Vec<Duration> = (0..TRIES).map(|_| unlink(addr)).collect();
    assert!(times.iter().any(|time| *time < SOON), "unlink took {times:?}");
}

/// Has a process send that waits for the flag. So that its own close isn't the last one, reuse-run is stopped meanwhile.
#[track_caller]
fn send(service: &Service, sender: &Service, folder: &Folder) {
    sender.wait_for_output("made");
    service.signal(Signal::SIGSTOP);
    folder.raise("go");
    sender.wait_for_output("sent");
    service.signal(Signal::SIGCONT);
}

/// Stops reuse-run while processes live on that can't be ended.
#[track_caller]
fn stop(mut service: Service) {
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_exit().code(), Some(0), "{}", service.log.text());
}

/// The processes that close for a reuse-run.
fn closers(service: &Service) -> usize {
    let name = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    all_children(service.pid()).iter().filter(|pid| name(pid) == "reuse-run-close\n").count()
}

#[test]
fn what_a_worker_sends_to_its_notify_socket_makes_nobody_wait() {
    needs_other_users!();
    for kind in KINDS {
        let (addr, folder) = (free_address(), open_folder());
        let service = Service::run_ready("-n 1", &worker(addr, &[kind, "notify", &folder.path("")]));
        send(&service, &service, &folder);
        assert_waits_for_nothing(&service, addr);
        wait_until("its message is read", DEADLINE, || status(&service)["workers"][0]["status"] == "sent 1");
        stop(service);
    }
}

#[test]
fn what_a_worker_sends_by_nodes_channel_makes_nobody_wait() {
    needs_other_users!();
    for kind in KINDS {
        let (addr, folder) = (free_address(), open_folder());
        let service = Service::run_ready("-n 1", &worker(addr, &[kind, "node", &folder.path("")]));
        send(&service, &service, &folder);
        assert_waits_for_nothing(&service, addr);
        stop(service);
    }
}

/// Commands as those of older kernels than 6.16, which don't know SO_PASSRIGHTS.
fn without_passrights(addr: net::SocketAddr) -> Service {
    let without = python("without.py", &["passrights", "ENOPROTOOPT"]);
    let without: Vec<&str> = without.iter().map(String::as_str).collect();
    Service::spawn_ready(behind(&without, "-n 1", &worker(addr, &[])))
}

/// Another user that sends to a control socket.
fn sender(service: &Service, kind: &str, folder: &Folder, count: usize) -> Service {
    let mut command = Command::new("python3");
    command.args([&app("python/descriptors.py"), "send", kind, &control_name(service.pid())]);
    command.args([&folder.path(""), &count.to_string()]);
    Service::spawn(command)
}

#[test]
fn what_another_user_sends_to_the_control_socket_makes_nobody_wait() {
    needs_other_users!();
    own_network();
    for kind in KINDS {
        let (addr, folder) = (free_address(), open_folder());
        let service = without_passrights(addr);
        let sender = sender(&service, kind, &folder, 1);
        send(&service, &sender, &folder);
        assert_waits_for_nothing(&service, addr);
        stop(service);
    }
}

#[test]
fn a_flood_of_files_that_cannot_be_closed_takes_a_few_processes() {
    needs_other_users!();
    const FLOOD: usize = 150;
    own_network();
    let (addr, folder) = (free_address(), open_folder());
    let service = without_passrights(addr);
    let flood = sender(&service, "write", &folder, FLOOD);
    send(&service, &flood, &folder);
    assert_waits_for_nothing(&service, addr);
    assert!((1..=16).contains(&closers(&service)), "{} processes", closers(&service));
    // When their server has ended, the files can be closed.
    drop(flood);
    wait_until("all is closed", DEADLINE, || closers(&service) == 0);
    assert!(service.fds() < 60, "{}", service.fds());
    stop(service);
}

#[test]
fn a_worker_that_floods_its_notify_socket_with_them_makes_only_itself_wait() {
    needs_other_users!();
    let (addr, folder) = (free_address(), open_folder());
    let service = Service::run_ready("-n 1", &worker(addr, &["flush", "notify", &folder.path(""), "10"]));
    send(&service, &service, &folder);
    wait_until("one message is read", DEADLINE, || status(&service)["workers"][0]["status"] == "sent 1");
    assert_waits_for_nothing(&service, addr);
    assert_eq!(closers(&service), 1, "it isn't read on before that has ended");
    run(&service, "reload").assert_done("1 worker of generation 2");
    stop(service);
}

#[test]
fn what_nobody_has_read_at_the_end_does_not_hold_it_up() {
    needs_other_users!();
    own_network();
    for kind in KINDS {
        let (addr, folder) = (free_address(), open_folder());
        let service = without_passrights(addr);
        let sender = sender(&service, kind, &folder, 50);
        sender.wait_for_output("made");
        service.signal(Signal::SIGSTOP);
        folder.raise("go");
        sender.wait_for_output("sent");
        service.signal(Signal::SIGTERM);
        service.signal(Signal::SIGCONT);
        stop(service);
    }
}

#[test]
fn the_control_socket_refuses_descriptors_where_the_kernel_can() {
    needs_other_users!();
    own_network();
    let (addr, folder) = (free_address(), open_folder());
    let mut service = Service::run_ready("-n 1", &worker(addr, &[]));
    let sender = sender(&service, "linger", &folder, 1);
    folder.raise("go");
    if kernel() >= (6, 16) {
        sender.wait_for_output("refused");
    }
    service.stop();
}

// Connections of the workers.

/// Answers each connection with the time in ms that an unlink takes, and keeps it open if it comes from elsewhere.
const LINGERS: &str = "import os, socket, struct, sys, time\n\
    listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n\
    kept = []\n\
    while True:\n\
    \x20   connection, (host, _) = listener.accept()\n\
    \x20   connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 3600))\n\
    \x20   begun = time.monotonic()\n\
    \x20   try: os.unlink('/nonexistent/socket')\n\
    \x20   except FileNotFoundError: pass\n\
    \x20   connection.sendall(b'%.3f\\n' % ((time.monotonic() - begun) * 1000))\n\
    \x20   if host == '127.0.0.1': connection.close()\n\
    \x20   else: kept.append(connection)";

/// Its client can't be reached any more, and never acknowledges the end of the connection.
#[test]
fn a_connection_of_a_worker_that_lingers_makes_nobody_wait_at_a_reload() {
    own_network();
    let addr = free_address();
    let service =
        Service::run_ready("-n 1 --idle-after 100ms", &inline(LINGERS, &[&addr.port().to_string()]));
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    client.bind(&net::SocketAddr::from(([127, 0, 0, 5], 0)).into()).expect("bind");
    client.connect(&addr.into()).expect("connect");
    (&client).read_exact(&mut [0]).expect("an answer");
    let route = Command::new("ip").args("route add blackhole 127.0.0.5 table local".split(' ')).status();
    assert!(route.expect("run ip").success());
    service.signal(Signal::SIGUSR2);
    service.wait_for_line("generation 2 is ready");
    assert_waits_for_nothing(&service, addr);
    service.wait_for_line("reload done");
    assert_waits_for_nothing(&service, addr);
    stop(service);
}

// Files that others have replaced.

#[test]
fn a_pidfile_that_became_a_fifo_or_a_link_to_one_does_not_hold_up_the_end() {
    for link in [false, true] {
        let folder = Folder::new();
        let (pidfile, fifo) = (folder.path("pid"), folder.path("fifo"));
        let options = format!("-n 1 --pidfile {pidfile}");
        let mut service = Service::run_ready(&options, &naive(free_address()));
        wait_until("the file", DEADLINE, || Path::new(&pidfile).exists());
        fs::remove_file(&pidfile).expect("remove the file");
        let path = if link { &fifo } else { &pidfile };
        mkfifo(path.as_str(), Mode::S_IRWXU).expect("a FIFO");
        if link {
            symlink(&fifo, &pidfile).expect("a link");
        }
        service.stop();
        assert!(fs::symlink_metadata(&pidfile).is_ok(), "it is another's");
    }
}

#[test]
fn a_unix_path_with_control_characters_is_shown_without_them() {
    let folder = Folder::new();
    let path = folder.path("a\nreuse-run[1]: error: \x1b[2J\u{202e}b");
    let program = "import socket, sys, time\n\
        listener = socket.socket(socket.AF_UNIX)\n\
        listener.bind(sys.argv[1])\n\
        listener.listen()\n\
        while True: time.sleep(0.1)";
    let systemd = UnixDatagram::bind(folder.path("systemd")).expect("a socket");
    systemd.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    let mut command = reuse_run_with("-n 1", &inline(program, &[&path]));
    command.env("REUSE_RUN_LOG", "debug").env("NOTIFY_SOCKET", folder.path("systemd"));
    let mut service = Service::spawn_ready(command);
    let mut shown = String::new();
    for words in ["status", "status --json"] {
        shown += &run(&service, words).out;
    }
    run(&service, "reload").assert_done("1 worker of generation 2");
    service.stop();
    for text in [shown, service.log.text()] {
        assert!(text.contains("\\n") && text.contains("202e"), "{text:?}");
        assert!(!text.contains(|c: char| c == '\u{202e}' || (c.is_control() && c != '\n')), "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("reuse-run[1]")), "{text:?}");
    }
    let mut bytes = [0; 4096];
    let length = systemd.recv(&mut bytes).expect("a notification");
    let notified = String::from_utf8_lossy(&bytes[..length]);
    let is_assignment = |line: &str| line.starts_with("READY=") || line.starts_with("STATUS=");
    assert!(notified.lines().all(is_assignment), "{notified:?}");
}
