//! NOTIFY_SOCKET, as systemd has it.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::common::load::LoadOptions;
use crate::common::{
    self, DEADLINE, Folder, Service, answered_more, free_address, inline, naive, needs_other_users,
    python_packages, reload_under_load, reuse_run_with, run, turn, wait_until,
};
use crate::{NOBODY, light_load, variable};

/// A server that sends these messages to NOTIFY_SOCKET.
fn python(addr: SocketAddr, messages: &[&str]) -> Vec<String> {
    common::python("notify.py", &[&[addr.port().to_string().as_str()], messages].concat())
}

#[test]
fn a_python_server_that_notifies_systemd_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    let messages = ["STATUS=warming up", r"STATUS=warm\nREADY=1\nMAINPID=1"];
    let mut service = Service::run_ready("-n 2 --ready notify", &python(addr, &messages));
    reload_under_load(&service, LoadOptions::new(addr, 16), 5);
    service.stop();
}

#[test]
fn a_server_that_notifies_with_the_package_sdnotify_is_ready() {
    let addr = free_address();
    let worker = common::python("sdnotify_package.py", &[&addr.port().to_string()]);
    let mut command = reuse_run_with("-n 2 --ready notify", &worker);
    command.env("PYTHONPATH", python_packages("sdnotify"));
    let mut service = Service::spawn_ready(command);
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
    let mut service = Service::run("-n 1 --ready notify --ready-timeout 10s", &python(addr, &messages));
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert_eq!(service.out.count_of("said "), messages.len(), "{}", service.out.text());
    assert!(service.log.text().contains("not ready within 10s"), "{}", service.log.text());
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
fn a_worker_that_has_given_up_its_privileges_may_become_ready() {
    needs_other_users!();
    let addr = free_address();
    let user = format!("uid={NOBODY}");
    let messages = [user.as_str(), "BARRIER=1", "READY=1"];
    let options = "-n 1 --ready notify --ready-timeout 10s";
    let mut service = Service::run_ready(options, &python(addr, &messages));
    service.stop();
}

/// A worker that sends what any process may send to its NOTIFY_SOCKET: `say(bytes, fds)`. It is ready at once, and
/// continues when the file exists that its first argument names.
fn sender(program: &str, rest: &[&str]) -> Vec<String> {
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
fn fds_that_come_with_notifications_are_closed_even_if_there_are_many() {
    needs_other_users!();
    let folder = Folder::new();
    // When the barrier is closed, everything before it has been read.
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
    let mut service = Service::run_ready("-n 1 --ready notify", &sender(program, &[&folder.path("go")]));
    let before = service.fds();
    folder.write("go", "");
    service.wait_for_output("all was read");
    assert!(service.fds() < before + 10, "{} fds, and {before} before", service.fds());
    service.stop();
}

#[test]
fn a_connection_with_so_linger_that_comes_with_a_notification_holds_up_nothing() {
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
    let command = sender(program, &["go", "on"].map(|name| folder.path(name)).each_ref().map(String::as_str));
    let mut service = Service::run_ready("-n 1 --ready notify", &command);
    folder.write("go", "");
    service.wait_for_output("has sent all it can");
    // So that the fd in the notification is the last one of the connection.
    service.signal(Signal::SIGSTOP);
    folder.write("on", "");
    service.wait_for_output("said");
    let begun = Instant::now();
    service.signal(Signal::SIGCONT);
    let outcome = run(&service, "status");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    service.stop();
}

#[test]
fn a_status_with_control_characters_is_shown_without_them() {
    let folder = Folder::new();
    let program = "say(b'STATUS=one\\r\\x1b[2J\\x07two\\xc2\\x9b3')";
    let mut command = reuse_run_with("-n 1 --ready notify", &sender(program, &[&folder.path("go")]));
    command.env("REUSE_RUN_LOG", "debug");
    let mut service = Service::spawn(command);
    folder.write("go", "");
    service.wait_for_line("says: one");
    for words in ["status", "status --json"] {
        let text = run(&service, words).out;
        assert!(text.contains("two"), "{text:?}");
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    }
    service.stop();
    let log = service.log.text();
    assert!(!log.contains(|c: char| c.is_control() && c != '\n'), "{log:?}");
}

#[test]
fn workers_do_not_inherit_the_variables_of_reuse_runs_own_supervisor() {
    let addr = free_address();
    let folder = Folder::new();
    let outer = folder.path("notify");
    let _socket = UnixDatagram::bind(&outer).expect("a socket of the outer supervisor");
    let mut command = reuse_run_with("-n 2", &naive(addr));
    command.envs([
        ("NOTIFY_SOCKET", outer.as_str()),
        ("LISTEN_FDS", "2"),
        ("LISTEN_PID", "1"), // another process: these fds are not for reuse-run
        ("LISTEN_FDNAMES", "a:b"),
        ("WATCHDOG_USEC", "600000000"),
        ("WATCHDOG_PID", "1"),
    ]);
    let mut service = Service::spawn_ready(command);
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
        assert_eq!(sockets.len(), 2, "each worker has its own: {sockets:?}");
        service.reload();
    }
    service.stop();
}

/// The entries of a folder whose names begin as those of reuse-run do.
fn entries(folder: &Folder) -> Vec<String> {
    let names = fs::read_dir(&folder.0).expect("a folder").flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("reuse-run-notify-")).collect()
}

/// A reuse-run whose folder for temporary files is this one.
fn with_temporary(folder: &Folder, options: &str) -> Service {
    let mut command = reuse_run_with(options, &naive(free_address()));
    command.env("TMPDIR", &folder.0);
    Service::spawn_ready(command)
}

#[test]
fn no_other_user_can_find_the_sockets() {
    needs_other_users!();
    let folder = Folder::new();
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut service = with_temporary(&folder, "-n 1");
    let names = entries(&folder);
    let path = variable(service.workers()[0], "NOTIFY_SOCKET").expect("a path");
    assert!(path.starts_with(&folder.path(&names[0])), "{path} is not in {names:?}");
    let listed = fs::read_to_string("/proc/net/unix").expect("the list of sockets");
    assert!(!listed.contains(&path), "{listed}");
    let list = ["--reuid=54322", "--regid=54322", "--clear-groups", "ls", &folder.path(&names[0])];
    let list = Command::new("setpriv").args(list).output().expect("run ls");
    assert!(!list.status.success(), "{list:?}");
    service.stop();
    assert_eq!(entries(&folder), [""; 0]);
}

#[test]
fn what_killed_ones_have_left_is_removed_at_the_next_start() {
    needs_other_users!();
    let folder = Folder::new();
    let mut killed = with_temporary(&folder, "-n 2");
    killed.signal(Signal::SIGKILL);
    killed.wait_exit();
    let mut living = with_temporary(&folder, "-n 1");
    // What version 0.1 has left, what it uses, and what belongs to others.
    let old = UnixDatagram::bind(folder.path("reuse-run-notify-0123456789abcdef")).expect("a socket");
    let _used = UnixDatagram::bind(folder.path("reuse-run-notify-1123456789abcdef")).expect("a socket");
    drop(old);
    let foreign = folder.path("reuse-run-notify-2123456789abcdef");
    fs::create_dir(&foreign).expect("a folder");
    fs::set_permissions(&foreign, fs::Permissions::from_mode(0o711)).expect("chmod");
    chown(&foreign, Some(54322), Some(54322)).expect("chown");
    let used = variable(living.workers()[0], "NOTIFY_SOCKET").expect("a path");
    let mut service = with_temporary(&folder, "-n 1");
    let mut left = entries(&folder);
    left.sort_unstable();
    assert!(Path::new(&used).exists() && left.len() == 4, "{left:?}");
    assert!(left.iter().any(|name| name.ends_with("1123456789abcdef")), "{left:?}");
    assert!(left.iter().any(|name| name.ends_with("2123456789abcdef")), "{left:?}");
    living.stop();
    service.stop();
    assert_eq!(entries(&folder).len(), 2);
}

/// As root, for workers of the user who owns the folder for temporary files.
#[test]
fn the_owner_of_the_folder_for_temporary_files_gets_no_other_file() {
    needs_other_users!();
    let (folder, victims) = (Folder::new(), Folder::new());
    chown(&folder.0, Some(54322), Some(54322)).expect("chown");
    let victim = victims.write("victim", "");
    // Whatever appears is replaced by a link.
    let program = "import os, sys\n\
        os.setgid(54322)\n\
        os.setuid(54322)\n\
        os.chdir(sys.argv[1])\n\
        seen = 0\n\
        print('swaps', flush=True)\n\
        while True:\n\
        \x20   for name in os.listdir():\n\
        \x20       if name.startswith('reuse-run-notify-') and not os.path.islink(name):\n\
        \x20           seen += 1\n\
        \x20           os.rename(name, f'old{seen}')\n\
        \x20           os.symlink(sys.argv[2 + seen % 2], name)\n\
        \x20           print('swapped', flush=True)";
    let mut swapper = Command::new("python3");
    swapper.args(["-c", program, &folder.path(""), &victim, &victims.path("")]);
    let swapper = Service::spawn(swapper);
    swapper.wait_for_output("swaps");
    for _ in 0..20 {
        let mut service = with_temporary(&folder, "-n 2");
        service.reload();
        assert_eq!(fs::read_dir(&victims.0).expect("a folder").count(), 1, "nothing else is there");
        service.stop();
    }
    assert!(swapper.out.count_of("swapped") > 0);
    assert_eq!(fs::metadata(&victim).expect("the victim").permissions().mode() & 0o777, 0o600);
}
