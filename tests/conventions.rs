//! What people's programs speak already: readiness as PM2 and systemd have it, and the environment and the
//! directory that each generation starts with.

mod common;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::load::{self, Load, LoadOptions};
use common::{
    DEADLINE, Service, answered_more, app, arguments, free_address, inline, node_app, own_network, reuse_run,
    server, turn, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

/// A value that must be found nowhere but in a worker's environment.
const SECRET: &str = "hunter2-correct-horse";
/// The user with no rights on a Debian.
const NOBODY: u32 = 65_534;

fn naive(addr: SocketAddr) -> Vec<String> {
    vec![server(), "--listen".to_owned(), addr.to_string()]
}

fn node(addr: SocketAddr, messages: &[&str]) -> Vec<String> {
    served_by("node", &app("node/esm.mjs"), addr, messages)
}

fn python(addr: SocketAddr, messages: &[&str]) -> Vec<String> {
    served_by("python3", &app("python/notify.py"), addr, messages)
}

fn served_by(interpreter: &str, file: &str, addr: SocketAddr, rest: &[&str]) -> Vec<String> {
    let port = addr.port().to_string();
    let command = [interpreter, file, &port].map(str::to_owned);
    command.into_iter().chain(rest.iter().map(|word| (*word).to_owned())).collect()
}

fn get(addr: SocketAddr, path: &str) -> load::Answer {
    match load::get(addr, path, DEADLINE) {
        Ok(answer) => answer,
        Err(failure) => panic!("GET {path} from {addr}: {failure:?}"),
    }
}

/// A load that leaves the processors time for other things.
fn light_load(addr: SocketAddr) -> Load {
    let load = Load::start(LoadOptions::new(addr, 4).rate(200.0));
    answered_more(&load);
    load
}

/// Reloads `times` times under a load at full speed; not one request fails.
#[track_caller]
fn reloads_lose_nothing(service: &Service, addr: SocketAddr, times: usize) {
    let load = Load::start(LoadOptions::new(addr, 16));
    answered_more(&load);
    for _ in 0..times {
        service.reload();
        answered_more(&load);
    }
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_failed();
}

/// Waits until the first generation is ready, or has failed.
#[track_caller]
fn wait_until_ready(service: &Service) {
    let over = |line: &str| line.contains("generation 1 is ready") || line.contains("giving up");
    let line = service.wait_for_line_where(0, "tells how the start went", over);
    assert!(line.text.contains("generation 1 is ready"), "{}", line.text);
}

/// A start that fails by itself: status 1 and one line with `part` in it. Returns that line.
#[track_caller]
fn assert_start_fails(mut service: Service, part: &str) -> String {
    let status = service.wait_end();
    let log = service.log.text();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(part), "{part:?} is not in:\n{log}");
    assert_eq!(log.lines().count(), 1, "one line says it all:\n{log}");
    log
}

/// A reload that fails under load: not one request does, and the log has `part` in it. Returns the log.
#[track_caller]
fn assert_reload_fails(service: &Service, addr: SocketAddr, part: &str) -> String {
    let load = light_load(addr);
    let serving = get(addr, "/").origin.generation;
    let log = service.failing_reload();
    assert!(log.contains(part), "{part:?} is not in:\n{log}");
    answered_more(&load);
    let report = load.stop();
    report.assert_nothing_failed();
    assert_eq!(report.counts.generations.keys().copied().collect::<Vec<_>>(), Vec::from_iter(serving));
    log
}

/// A variable of a process, as it was when its program began.
fn variable(pid: u32, name: &str) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).expect("the environment of a worker");
    let prefix = format!("{name}=").into_bytes();
    let value = environment.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(&*prefix));
    value.map(|value| String::from_utf8(value.to_vec()).expect("a value in UTF-8"))
}

/// What all workers have in this variable; they must be of this generation and agree.
#[track_caller]
fn value_in(service: &Service, generation: u32, name: &str) -> Option<String> {
    let workers = service.workers();
    let number = Some(generation.to_string());
    for pid in &workers {
        assert_eq!(variable(*pid, "REUSE_RUN_GENERATION"), number, "the generation of {pid}");
    }
    let mut values: Vec<Option<String>> = workers.iter().map(|pid| variable(*pid, name)).collect();
    values.dedup();
    assert_eq!(values.len(), 1, "the workers differ in {name}: {values:?}");
    values.remove(0)
}

/// Kills one worker and waits until another has taken its place; returns the pid of that.
#[track_caller]
fn replace_one(service: &Service) -> u32 {
    let (before, from) = (service.workers(), service.log.count());
    kill(Pid::from_raw(before[0] as i32), Signal::SIGKILL).expect("kill a worker");
    service.wait_for_line_after(from, "a replacement");
    let after = service.workers();
    let new: Vec<u32> = after.into_iter().filter(|pid| !before.contains(pid)).collect();
    assert_eq!(new.len(), 1, "new workers: {new:?}");
    new[0]
}

/// A folder for a test's files.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("reuse-run-conventions-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("make a folder");
        // Links in the way to it would be resolved too.
        Folder(fs::canonicalize(path).expect("the path of the folder"))
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().expect("a path in UTF-8")
    }

    /// Writes a file that is readable for its owner only, and returns its path.
    fn write(&self, name: &str, content: &str) -> String {
        self.write_with(name, content, 0o600)
    }

    fn write_with(&self, name: &str, content: &str, mode: u32) -> String {
        let path = self.path(name);
        let _ = fs::remove_file(&path);
        fs::write(&path, content).expect("write a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set its mode");
        path
    }

    /// A release: a folder with a program that serves and knows its number.
    fn release(&self, number: u32, addr: SocketAddr) -> String {
        let name = format!("releases/{number}");
        fs::create_dir_all(self.path(&name)).expect("make a release");
        let text = format!("#!/bin/sh\necho \"release {number}\"\nexec '{}' --listen {addr}\n", server());
        self.write_with(&format!("{name}/serve"), &text, 0o755);
        self.path(&name)
    }

    /// Has `name` point to `target`, at once as deployment tools do it.
    fn link(&self, name: &str, target: &str) -> String {
        let new = self.path("new-link");
        symlink(target, &new).expect("make a link");
        fs::rename(new, self.path(name)).expect("put the link in place");
        self.path(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

// Node's channel.

#[track_caller]
fn express_app_of_the_seed_that_says_ready(options: &str) {
    let _turn = turn();
    own_network();
    let mut service = Service::run_ready(options, &["node", &node_app("express-process-send/app.js")]);
    reloads_lose_nothing(&service, ([127, 0, 0, 1], 3000).into(), 5);
    service.stop();
}

#[test]
fn the_express_app_of_the_seed_that_says_ready_as_for_pm2_loses_no_request_under_notify() {
    express_app_of_the_seed_that_says_ready("-n 2 --ready notify");
}

#[test]
fn the_express_app_of_the_seed_that_says_ready_as_for_pm2_loses_no_request_under_listen() {
    express_app_of_the_seed_that_says_ready("-n 2 --ready listen");
}

#[test]
fn a_node_es_module_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --ready notify", &node(addr, &[]));
    reloads_lose_nothing(&service, addr, 5);
    service.stop();
}

#[test]
fn a_node_worker_is_connected_and_never_hears_of_a_disconnect() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --ready notify", &node(addr, &[]));
    for _ in 0..3 {
        let answer = get(addr, "/ipc");
        assert!(answer.body.contains(" connected=true send=function "), "{}", answer.body);
        service.reload();
    }
    service.stop();
    assert_eq!(service.out.count_of("disconnect"), 0, "{}", service.out.text());
}

#[test]
fn a_flood_of_messages_holds_up_neither_the_node_worker_nor_the_wrapper() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --ready notify --drain 60s", &node(addr, &[]));
    let flooded = thread::spawn(move || get(addr, "/flood"));
    service.wait_for_output("flood ");
    let during = get(addr, "/");
    assert_eq!(during.origin.generation, Some(1));
    // A reload in the middle of it: the next generation serves, and the flood goes on to its end.
    service.signal(Signal::SIGUSR2);
    let switched = service.wait_for_line("generation 2 serves");
    assert_eq!(get(addr, "/").origin.generation, Some(2));
    let answer = flooded.join().expect("the flood");
    assert!(answer.body.contains("called=100001"), "every send called back: {}", answer.body);
    assert_eq!(answer.origin.generation, Some(1));
    assert!(during.end < answer.end && switched.at < answer.end, "all that was during the flood");
    service.wait_for_line("reload done");
    service.stop();
    assert_eq!(service.out.count_of("disconnect"), 0, "{}", service.out.text());
}

#[test]
fn the_word_online_means_ready_too() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --ready notify", &node(addr, &[r#""online""#]));
    service.reload();
    service.stop();
}

#[test]
fn other_messages_of_a_node_worker_do_not_mean_ready() {
    let addr = free_address();
    let messages =
        [r#""started""#, r#"{"ready":true}"#, r#"["ready"]"#, r#""Ready""#, r#""ready\n""#, "true"];
    let mut service = Service::run("-n 1 --ready notify --ready-timeout 1500ms", &node(addr, &messages));
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert!(service.log.text().contains("not ready within 1s 500ms"), "{}", service.log.text());
    assert!(!service.log.text().contains("generation 1 is ready"), "{}", service.log.text());
}

#[test]
fn without_node_ipc_there_is_no_channel() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --no-node-ipc", &node(addr, &[]));
    let answer = get(addr, "/ipc");
    assert!(answer.body.contains(" connected=undefined send=undefined fd=undefined"), "{}", answer.body);
    assert_eq!(value_in(&service, 1, "NODE_CHANNEL_FD"), None);
    assert_eq!(value_in(&service, 1, "NODE_CHANNEL_SERIALIZATION_MODE"), None);
    service.stop();
}

#[test]
fn a_node_that_another_program_starts_does_not_miss_the_channel_of_that_program() {
    // subprocess closes all fds but inherits all variables: with NODE_CHANNEL_FD that Node would die (EPIPE).
    let starter = "import os, socket, subprocess, time\n\
        code = subprocess.run([bytes.fromhex('6e6f6465'), '-e', 'process.exitCode = 7; process.send?.(1)']).returncode\n\
        print('its child exits with', code, flush=True)\n\
        time.sleep(1000)";
    let mut service = Service::run_ready("-n 1 --ready 10ms", &["python3", "-c", starter]);
    service.wait_for_output("its child exits with 7");
    assert_eq!(variable(service.workers()[0], "NODE_CHANNEL_FD"), None);
    service.stop();
}

#[test]
fn a_node_behind_a_script_has_its_channel() {
    let (addr, folder) = (free_address(), Folder::new());
    let script = format!("#!/bin/sh\nexec {}\n", node(addr, &[]).join(" "));
    let file = folder.write_with("serve", &script, 0o755);
    let mut service = Service::run_ready("-n 1 --ready notify", &[&file]);
    assert!(variable(service.workers()[0], "NODE_CHANNEL_FD").is_some());
    service.stop();
}

#[test]
fn a_node_behind_a_script_that_only_the_env_files_path_leads_to_has_its_channel() {
    let (addr, folder) = (free_address(), Folder::new());
    let script = format!("#!/bin/sh\nexec {}\n", node(addr, &[]).join(" "));
    folder.write_with("serve-it", &script, 0o755);
    let path = format!("{}:{}", folder.path(""), std::env::var("PATH").expect("a PATH"));
    let file = folder.write("env", &format!("PATH='{path}'\n"));
    let options = format!("-n 1 --ready notify --ready-timeout 20s --env-file {file}");
    let mut service = Service::run(&options, &["serve-it"]);
    wait_until_ready(&service);
    assert!(variable(service.workers()[0], "NODE_CHANNEL_FD").is_some());
    service.stop();
}

#[test]
fn the_channel_that_reuse_run_itself_was_given_is_not_its_workers() {
    let addr = free_address();
    let mut command = reuse_run();
    command.args(arguments("-n 1 --no-node-ipc", &naive(addr)));
    command.envs([("NODE_CHANNEL_FD", "9"), ("NODE_CHANNEL_SERIALIZATION_MODE", "advanced")]);
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    assert_eq!(value_in(&service, 1, "NODE_CHANNEL_FD"), None);
    service.stop();
}

// systemd's socket.

#[test]
fn a_python_server_that_notifies_as_for_systemd_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    let messages = ["STATUS=warming up", r"STATUS=warm\nREADY=1\nMAINPID=1"];
    let mut service = Service::run_ready("-n 2 --ready notify", &python(addr, &messages));
    reloads_lose_nothing(&service, addr, 5);
    service.stop();
}

#[test]
fn a_server_that_notifies_with_the_package_sdnotify_is_ready() {
    let packages = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/python");
    assert!(
        packages.join("sdnotify").exists(),
        "sdnotify is missing in {}: run scripts/test",
        packages.display()
    );
    let addr = free_address();
    let mut command = reuse_run();
    let file = app("python/sdnotify_package.py");
    command.args(arguments("-n 2 --ready notify", &served_by("python3", &file, addr, &[])));
    let mut service = Service::spawn({
        command.env("PYTHONPATH", packages);
        command
    });
    service.wait_for_line("generation 1 is ready");
    let load = light_load(addr);
    service.reload();
    answered_more(&load);
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn a_status_alone_does_not_mean_ready() {
    let addr = free_address();
    let messages = ["STATUS=READY=1", "READY=0", "STOPPING=1", "XREADY=1"];
    let mut service = Service::run("-n 1 --ready notify --ready-timeout 1500ms", &python(addr, &messages));
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert_eq!(service.out.count_of("said "), messages.len(), "{}", service.out.text());
    assert!(service.log.text().contains("not ready within 1s 500ms"), "{}", service.log.text());
}

#[test]
fn a_barrier_is_answered_before_and_after_the_worker_is_ready() {
    let addr = free_address();
    let messages = ["BARRIER=1", "READY=1", "BARRIER=1"];
    let mut service = Service::run_ready("-n 1 --ready notify", &python(addr, &messages));
    wait_until("both answers", DEADLINE, || service.out.count_of("barrier b''") == 2);
    service.stop();
}

#[test]
fn a_worker_that_gives_up_its_privileges_is_heard_all_the_same() {
    let addr = free_address();
    let user = format!("uid={NOBODY}");
    let messages = [user.as_str(), "BARRIER=1", "READY=1"];
    let mut service = Service::run("-n 1 --ready notify --ready-timeout 10s", &python(addr, &messages));
    wait_until_ready(&service);
    service.stop();
}

/// A worker that speaks to its NOTIFY_SOCKET as any user can who finds it: `say(bytes, fds)`. It is ready at
/// once, and goes on when the file of its argument is there.
fn stranger(program: &str, rest: &[&str]) -> Vec<String> {
    let begin = "import os, socket, struct, sys, time\n\
        def say(text, fds=()):\n\
        \x20   with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:\n\
        \x20       client.connect(os.environ['NOTIFY_SOCKET'])\n\
        \x20       socket.send_fds(client, [text], fds)\n\
        os.write(int(os.environ['READY_FD']), b'\\n')\n\
        while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n";
    inline(&format!("{begin}{program}\ntime.sleep(1000)"), rest)
}

#[test]
fn fds_that_come_with_notifications_are_closed_however_many_they_are() {
    let folder = Folder::new();
    // What was said before a barrier was read when that is closed.
    let program = "user = os.fork()\n\
        if not user:\n\
        \x20   os.setgroups([])\n\
        \x20   os.setuid(65534)\n\
        for _ in range(50): say(b'X=1', [1] * 20)\n\
        if not user: os._exit(0)\n\
        os.waitpid(user, 0)\n\
        say(b'X=1', [1] * 253)\n\
        barrier, its = os.pipe()\n\
        say(b'BARRIER=1', [its])\n\
        os.close(its)\n\
        os.read(barrier, 1)\n\
        print('all was read', flush=True)";
    let mut service = Service::run_ready("-n 1 --ready notify", &stranger(program, &[&folder.path("go")]));
    let before = service.fds();
    folder.write("go", "");
    service.wait_for_output("all was read");
    assert!(service.fds() < before + 10, "{} fds, and {before} before", service.fds());
    service.stop();
}

#[test]
fn a_connection_that_lingers_and_comes_with_a_notification_holds_nothing_up() {
    let folder = Folder::new();
    let program = "listener = socket.create_server(('127.0.0.1', 0))\n\
        client = socket.create_connection(listener.getsockname())\n\
        deaf, _ = listener.accept()\n\
        client.setblocking(False)\n\
        try:\n\
        \x20   while True: client.send(b'x' * 65536)\n\
        except BlockingIOError: pass\n\
        client.setblocking(True)\n\
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 60))\n\
        print('has sent all it can', flush=True)\n\
        while not os.path.exists(sys.argv[2]): time.sleep(0.01)\n\
        say(b'X=1', [client.fileno()])\n\
        client.close()\n\
        print('said', flush=True)";
    let command =
        stranger(program, &["go", "on"].map(|name| folder.path(name)).each_ref().map(String::as_str));
    let mut service = Service::run_ready("-n 1 --ready notify", &command);
    folder.write("go", "");
    service.wait_for_output("has sent all it can");
    // So that it has the last of the connection's fds.
    service.signal(Signal::SIGSTOP);
    folder.write("on", "");
    service.wait_for_output("said");
    let begun = Instant::now();
    service.signal(Signal::SIGCONT);
    let mut status = reuse_run();
    let status = status.args(["status", &service.pid().to_string()]).output().expect("run reuse-run status");
    assert_eq!(status.status.code(), Some(0), "{status:?}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    service.stop();
}

#[test]
fn a_status_with_control_characters_is_shown_without_them() {
    let folder = Folder::new();
    let program = "say(b'STATUS=one\\r\\x1b[2J\\x07two\\xc2\\x9b3')";
    let mut command = reuse_run();
    let worker = stranger(program, &[&folder.path("go")]);
    command.args(arguments("-n 1 --ready notify", &worker)).env("RUST_LOG", "debug");
    let mut service = Service::spawn(command);
    folder.write("go", "");
    service.wait_for_line("says: one");
    let pid = service.pid().to_string();
    for arguments in [vec!["status", &pid], vec!["status", "--json", &pid]] {
        let output = reuse_run().args(arguments).output().expect("run reuse-run status");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        assert!(text.contains("two"), "{text:?}");
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    }
    service.stop();
    let log = service.log.text();
    assert!(!log.contains(|c: char| c.is_control() && c != '\n'), "{log:?}");
}

#[test]
fn what_reuse_run_was_told_by_its_own_supervisor_is_not_passed_on_to_workers() {
    let addr = free_address();
    let folder = Folder::new();
    let outer = folder.path("notify");
    let _socket = std::os::unix::net::UnixDatagram::bind(&outer).expect("a socket of the outer supervisor");
    let mut command = reuse_run();
    command.args(arguments("-n 2", &naive(addr))).envs([
        ("NOTIFY_SOCKET", outer.as_str()),
        ("LISTEN_FDS", "2"),
        ("LISTEN_PID", "1"), // somebody else's, so that they are for nobody here
        ("LISTEN_FDNAMES", "a:b"),
        ("WATCHDOG_USEC", "600000000"),
        ("WATCHDOG_PID", "1"),
    ]);
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    for generation in 1..=2 {
        let workers = service.workers();
        assert_eq!(workers.len(), 2);
        for pid in &workers {
            assert_eq!(variable(*pid, "REUSE_RUN_GENERATION"), Some(generation.to_string()));
            for name in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"] {
                assert_eq!(variable(*pid, name), None, "{name}");
            }
        }
        let mut sockets: Vec<_> = workers.iter().map(|pid| variable(*pid, "NOTIFY_SOCKET")).collect();
        assert!(sockets.iter().all(|name| name.as_ref().is_some_and(|name| *name != outer)), "{sockets:?}");
        sockets.dedup();
        assert_eq!(sockets.len(), 2, "one for each worker: {sockets:?}");
        service.reload();
    }
    service.stop();
}

// Files of variables.

#[test]
fn the_next_generation_has_what_the_env_file_says_then() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "CHANGED=one\nREMOVED=here\n");
    let mut service = Service::run_ready(&format!("-n 2 --env-file {file}"), &naive(addr));
    let found = |generation| {
        ["CHANGED", "REMOVED", "ADDED"].map(|name| value_in(&service, generation, name).unwrap_or_default())
    };
    assert_eq!(found(1), ["one", "here", ""]);
    folder.write("env", "# a comment\nCHANGED=two\n\nexport ADDED='new here'\n");
    service.reload();
    assert_eq!(found(2), ["two", "", "new here"]);
    assert_eq!(value_in(&service, 2, "REMOVED"), None);
    service.stop();
}

#[test]
fn a_restarted_worker_has_the_environment_of_its_generation() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "RELEASE=one\n");
    let secret = folder.write("key", "first");
    let options = format!("-n 2 --env-file {file} --secret KEY={secret}");
    let mut service = Service::run_ready(&options, &naive(addr));
    folder.write("env", "RELEASE=two\n");
    folder.write("key", "second");
    replace_one(&service);
    assert_eq!(value_in(&service, 1, "RELEASE").as_deref(), Some("one"));
    assert_eq!(value_in(&service, 1, "KEY").as_deref(), Some("first"));
    service.reload();
    assert_eq!(value_in(&service, 2, "RELEASE").as_deref(), Some("two"));

    // Neither a reload that failed nor a file that is gone changes that.
    folder.write("env", "not a variable\n");
    service.failing_reload();
    fs::remove_file(&secret).expect("remove the secret");
    replace_one(&service);
    assert_eq!(value_in(&service, 2, "RELEASE").as_deref(), Some("two"));
    assert_eq!(value_in(&service, 2, "KEY").as_deref(), Some("second"));
    service.stop();
}

#[test]
fn of_two_env_files_the_later_one_wins() {
    let (addr, folder) = (free_address(), Folder::new());
    let (a, b) = (folder.write("a", "BOTH=a\nA=a\n"), folder.write("b", "BOTH=b\nB=b\n"));
    let mut service = Service::run_ready(&format!("-n 1 --env-file {a} --env-file={b}"), &naive(addr));
    assert_eq!(
        ["BOTH", "A", "B"].map(|name| value_in(&service, 1, name).unwrap_or_default()),
        ["b", "a", "b"]
    );
    service.stop();
}

#[test]
fn a_variable_of_an_env_file_replaces_one_of_reuse_runs_own_environment() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "GIVEN=file\n");
    let mut command = reuse_run();
    command.args(arguments(&format!("-n 1 --env-file {file}"), &naive(addr))).env("GIVEN", "outside");
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    assert_eq!(value_in(&service, 1, "GIVEN").as_deref(), Some("file"));
    folder.write("env", "");
    service.reload();
    assert_eq!(value_in(&service, 2, "GIVEN").as_deref(), Some("outside"));
    service.stop();
}

#[test]
fn an_env_file_that_is_missing_or_wrong_ends_the_reload_and_the_old_generation_serves_on() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "A=1\n");
    let mut command = reuse_run();
    command.args(arguments(&format!("-n 2 --env-file {file}"), &naive(addr))).env("RUST_LOG", "debug");
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");

    fs::remove_file(&file).expect("remove the file");
    assert_reload_fails(&service, addr, &format!("{file}: No such file or directory"));
    folder.write("env", &format!("A=2\n\n# comment\nPASSWORD {SECRET}\nB=3\n"));
    assert_reload_fails(&service, addr, &format!("{file}:4: "));
    folder.write("env", &format!("A=2\nB=3\nPASSWORD='{SECRET}\nC=4\n"));
    assert_reload_fails(&service, addr, &format!("{file}:3: "));
    folder.write("env", &format!("A=2\nPASSWORD={SECRET} or so\n"));
    assert_reload_fails(&service, addr, &format!("{file}:2: "));
    folder.write("env", &format!("A=2\nTEXT=\"two\nlines\"\nPASSWORD=\"{SECRET}\" or so\n"));
    assert_reload_fails(&service, addr, &format!("{file}:4: "));
    assert_eq!(value_in(&service, 1, "A").as_deref(), Some("1"));

    folder.write("env", &format!("A=3\nPASSWORD={SECRET}\n"));
    service.reload();
    assert_eq!(
        get(addr, "/").origin.generation.map(|g| value_in(&service, g, "A")),
        Some(Some("3".to_owned()))
    );
    service.stop();
    assert!(!service.log.text().contains("hunter2"), "{}", service.log.text());
}

#[test]
fn an_env_file_that_is_missing_or_wrong_ends_the_start_with_one_line_and_status_1() {
    let (addr, folder) = (free_address(), Folder::new());
    let missing = folder.path("missing");
    let service = Service::run(&format!("-n 2 --env-file {missing}"), &naive(addr));
    assert_start_fails(service, &format!("{missing}: No such file or directory"));
    let wrong = folder.write("wrong", &format!("A=1\nPASSWORD {SECRET}\n"));
    let service = Service::run(&format!("-n 2 --env-file {wrong}"), &naive(addr));
    let log = assert_start_fails(service, &format!("{wrong}:2: "));
    assert!(!log.contains("hunter2"), "{log}");
}

#[test]
fn an_env_file_may_begin_with_a_byte_order_mark() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "\u{feff}FIRST=1\r\nSECOND=2\n");
    let mut service = Service::run(&format!("-n 1 --env-file {file}"), &naive(addr));
    wait_until_ready(&service);
    assert_eq!(value_in(&service, 1, "FIRST").as_deref(), Some("1"));
    assert_eq!(value_in(&service, 1, "SECOND").as_deref(), Some("2"));
    service.stop();
}

#[test]
fn a_value_with_spaces_and_no_quotes_is_named_by_file_and_line_and_the_way_out_is_told() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "A=1\nGREETING=good morning\n");
    let service = Service::run(&format!("-n 1 --env-file {file}"), &naive(addr));
    let log = assert_start_fails(service, &format!("{file}:2: "));
    assert!(log.contains("with spaces in quotes"), "{log}");
}

#[test]
fn what_is_no_regular_file_is_refused_and_holds_nothing_up() {
    let (addr, folder) = (free_address(), Folder::new());
    let place = folder.path("place");
    let fifo = || mkfifo(Path::new(&place), Mode::S_IRUSR).expect("make a FIFO");
    let directory = || fs::create_dir(&place).expect("make a folder");
    let device = || symlink("/dev/zero", &place).expect("make a link");
    let makes: [&dyn Fn(); 3] = [&fifo, &directory, &device];
    for option in ["--env-file ", "--secret KEY="] {
        let options = format!("-n 1 {option}{place}");
        for make in makes {
            make();
            let service = Service::run(&options, &naive(addr));
            assert_start_fails(service, &format!("{place}: not a regular file"));
            let _ = fs::remove_file(&place).or_else(|_| fs::remove_dir(&place));
        }
        folder.write("place", "A=1\n");
        let mut service = Service::run_ready(&options, &naive(addr));
        for make in makes {
            let _ = fs::remove_file(&place).or_else(|_| fs::remove_dir(&place));
            make();
            assert_reload_fails(&service, addr, &format!("{place}: not a regular file"));
        }
        service.stop();
        fs::remove_file(&place).expect("remove the link");
    }
}

#[test]
fn an_env_file_that_others_may_read_is_warned_of() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write_with("env", "A=1\n", 0o644);
    let mut service = Service::run_ready(&format!("-n 2 --env-file {file}"), &naive(addr));
    assert_eq!(service.log.count_of(&format!("{file} can be read")), 1, "{}", service.log.text());
    service.stop();
}

// Secrets.

#[test]
fn a_secret_is_what_its_file_holds_less_one_newline_and_read_anew() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("key", "first\n");
    let mut service = Service::run_ready(&format!("-n 2 --secret KEY={file}"), &naive(addr));
    assert_eq!(value_in(&service, 1, "KEY").as_deref(), Some("first"));
    for (generation, content, value) in
        [(2, "second", "second"), (3, "two\nlines = $HOME 'x\n\n", "two\nlines = $HOME 'x\n"), (4, "", "")]
    {
        folder.write("key", content);
        service.reload();
        assert_eq!(value_in(&service, generation, "KEY").as_deref(), Some(value), "{content:?}");
    }
    service.stop();
}

#[test]
fn a_secret_that_others_have_access_to_is_refused() {
    let (addr, folder) = (free_address(), Folder::new());
    for mode in [0o604, 0o602] {
        let file = folder.write_with("key", SECRET, mode);
        let service = Service::run(&format!("-n 2 --secret KEY={file}"), &naive(addr));
        assert_start_fails(service, &format!("{file} can be read or written by other users"));
    }
    let file = folder.write_with("key", SECRET, 0o640);
    let mut service = Service::run_ready(&format!("-n 2 --secret KEY={file}"), &naive(addr));
    folder.write_with("key", "changed", 0o644);
    assert_reload_fails(&service, addr, &format!("{file} can be read or written by other users"));
    fs::remove_file(&file).expect("remove the secret");
    assert_reload_fails(&service, addr, &format!("{file}: No such file or directory"));
    assert_eq!(value_in(&service, 1, "KEY").as_deref(), Some(SECRET));
    service.stop();
}

#[test]
fn a_secret_is_in_no_log_no_command_line_and_not_in_the_wrappers_environment() {
    let (addr, folder) = (free_address(), Folder::new());
    let secret = folder.write("key", &format!("{SECRET}\n"));
    let env_file = folder.write("env", &format!("PASSWORD={SECRET}\n"));
    let mut command = reuse_run();
    let options = format!("-n 2 --secret KEY={secret} --env-file {env_file}");
    command.args(arguments(&options, &naive(addr))).env("RUST_LOG", "debug");
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    service.reload();
    replace_one(&service);
    for name in ["KEY", "PASSWORD"] {
        assert_eq!(value_in(&service, 2, name).as_deref(), Some(SECRET), "{name}");
    }
    fs::remove_file(&secret).expect("remove the secret");
    service.failing_reload();
    let shown =
        |file: String| String::from_utf8_lossy(&fs::read(file).expect("read from /proc")).into_owned();
    let wrapper = service.pid();
    assert!(!shown(format!("/proc/{wrapper}/environ")).contains("hunter2"));
    for pid in service.workers().into_iter().chain([wrapper]) {
        let line = shown(format!("/proc/{pid}/cmdline"));
        assert!(line.contains("server") && !line.contains("hunter2"), "{line}");
    }
    service.stop();
    assert!(service.log.text().contains("started"), "the level is debug: {}", service.log.text());
    for text in [service.log.text(), service.out.text()] {
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[test]
fn a_wrapper_with_values_leaves_no_core() {
    let folder = Folder::new();
    let (secret, env_file) = (folder.write("key", SECRET), folder.write("env", "A=1\n"));
    for (options, leaves_a_core) in [
        (String::new(), true),
        (format!("--secret KEY={secret}"), false),
        (format!("--env-file {env_file}"), false),
    ] {
        let addr = free_address();
        let mut command = Command::new("sh");
        command.args(["-c", r#"ulimit -c unlimited && exec "$0" "$@""#]).current_dir(&folder.0);
        command.arg(reuse_run().get_program()).args(arguments(&options, &naive(addr)));
        let mut service = Service::spawn(command);
        service.wait_for_line("generation 1 is ready");
        service.signal(Signal::SIGABRT);
        let status = service.wait_exit();
        assert_eq!(status.signal(), Some(Signal::SIGABRT as i32), "{options}: {status:?}");
        assert_eq!(status.core_dumped(), leaves_a_core, "{options:?}: {status:?}");
    }
}

#[test]
fn a_wrapper_with_secrets_works_for_an_ordinary_user_whose_other_processes_cannot_look_into_it() {
    let (addr, folder) = (free_address(), Folder::new());
    let secret = folder.write("key", SECRET);
    nix::unistd::chown(Path::new(&secret), Some(NOBODY.into()), Some(NOBODY.into())).expect("give it away");
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o755)).expect("open the folder");
    // Where these programs were built may be closed to that user.
    let copy = |from: &str, name: &str| {
        fs::copy(from, folder.path(name)).expect("copy a program");
        fs::set_permissions(folder.path(name), fs::Permissions::from_mode(0o755)).expect("set its mode");
        folder.path(name)
    };
    let (program, server) = (copy(env!("CARGO_BIN_EXE_reuse-run"), "reuse-run"), copy(&server(), "server"));
    let mut command = Command::new(program);
    let worker = [server, "--listen".to_owned(), addr.to_string()];
    command.args(arguments(&format!("-n 2 --secret KEY={secret}"), &worker)).env_remove("RUST_LOG");
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    let mut service = Service::spawn(command);
    wait_until_ready(&service);
    reloads_lose_nothing(&service, addr, 2);
    assert_eq!(value_in(&service, 3, "KEY").as_deref(), Some(SECRET));

    let may_read = |pid: u32| {
        let mut cat = Command::new("cat");
        cat.arg(format!("/proc/{pid}/environ")).uid(NOBODY).gid(NOBODY).current_dir("/");
        cat.output().expect("run cat").status.success()
    };
    assert!(!may_read(service.pid()), "the wrapper");
    assert!(may_read(service.workers()[0]), "a worker, which is theirs");
    service.stop();
}

// The directory.

/// The directory that all workers are in.
#[track_caller]
fn directory(service: &Service) -> String {
    let directory = |pid: &u32| fs::read_link(format!("/proc/{pid}/cwd")).expect("the directory of a worker");
    let mut directories: Vec<PathBuf> = service.workers().iter().map(directory).collect();
    directories.dedup();
    assert_eq!(directories.len(), 1, "{directories:?}");
    directories.remove(0).display().to_string()
}

/// A server with `current` pointing to release 1, which becomes 2: old and new workers each start in the
/// release of their generation.
#[track_caller]
fn follows_the_link(folder: &Folder, addr: SocketAddr, mut service: Service, logical: &str) {
    let releases = [1, 2].map(|number| folder.path(&format!("releases/{number}")));
    service.wait_for_line("generation 1 is ready");
    assert_eq!(directory(&service), releases[0]);
    assert_eq!(value_in(&service, 1, "PWD").as_deref(), Some(logical));
    let printed = |line: &str, times: usize| {
        wait_until(line, DEADLINE, || service.out.count_of(line) >= times);
        assert_eq!(service.out.count_of(line), times, "{line}");
    };
    printed("release 1", 2);

    folder.link("current", "releases/2");
    let restarted = replace_one(&service);
    assert_eq!(directory(&service), releases[0], "one that crashed is of the old release still");
    assert_eq!(variable(restarted, "PWD").as_ref(), Some(&releases[0]), "where `current` no longer leads");
    printed("release 1", 3); // so is its command
    assert_eq!(service.out.count_of("release 2"), 0);

    let load = light_load(addr);
    service.reload();
    answered_more(&load);
    load.stop().assert_nothing_failed();
    assert_eq!(directory(&service), releases[1]);
    printed("release 2", 2); // the command is of the new release too
    assert_eq!(value_in(&service, 2, "PWD").as_deref(), Some(logical));

    fs::remove_file(folder.path("current")).expect("remove the link");
    let log = assert_reload_fails(&service, addr, "No such file or directory");
    assert!(log.contains(&folder.path("current")), "the directory is named:\n{log}");
    replace_one(&service);
    assert_eq!(directory(&service), releases[1]);
    service.stop();
}

/// Two releases, and `current` that points to the first.
fn releases(addr: SocketAddr) -> (Folder, String) {
    let folder = Folder::new();
    folder.release(1, addr);
    folder.release(2, addr);
    let current = folder.link("current", "releases/1");
    (folder, current)
}

#[test]
fn the_directory_of_chdir_is_resolved_anew_for_each_generation() {
    let addr = free_address();
    let (folder, current) = releases(addr);
    let service = Service::run(&format!("-n 2 -C {current}"), &["./serve"]);
    follows_the_link(&folder, addr, service, &current);
}

#[test]
fn without_chdir_the_logical_current_directory_is_resolved_anew() {
    let addr = free_address();
    let (folder, current) = releases(addr);
    let mut command = reuse_run();
    command.args(arguments("-n 2", &["./serve"])).current_dir(&current).env("PWD", &current);
    follows_the_link(&folder, addr, Service::spawn(command), &current);
}

#[test]
fn a_relative_chdir_is_taken_from_the_logical_current_directory_and_pwd_is_absolute() {
    let addr = free_address();
    let (folder, current) = releases(addr);
    let parent = folder.0.display().to_string();
    let mut command = reuse_run();
    command.args(arguments("-n 2 --chdir current", &["./serve"])).current_dir(&parent).env("PWD", &parent);
    follows_the_link(&folder, addr, Service::spawn(command), &current);
}

#[test]
fn a_pwd_that_is_not_the_current_directory_is_not_believed() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut command = reuse_run();
    command.args(arguments("-n 1", &naive(addr))).current_dir(&folder.0).env("PWD", "/proc");
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    assert_eq!(directory(&service), folder.0.display().to_string());
    assert_eq!(value_in(&service, 1, "PWD").as_deref(), Some("/proc"), "nor is it mended");
    service.stop();
}

#[test]
fn a_missing_directory_ends_the_start_with_one_line_and_status_1() {
    let (addr, folder) = (free_address(), Folder::new());
    let missing = folder.path("missing");
    let service = Service::run(&format!("-n 2 --chdir {missing}"), &naive(addr));
    assert_start_fails(service, &format!("{missing}: No such file or directory"));
    let file = folder.write("file", "");
    let service = Service::run(&format!("-n 2 --chdir {file}"), &naive(addr));
    assert_start_fails(service, &format!("{file}: Not a directory"));
}
