//! Unix sockets: a path that all workers share and that each generation takes over from the one before.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::load::{self, Load, LoadOptions};
use common::{
    DEADLINE, Folder, Service, app, behind, free_address, inline, needs_other_users, own_network, packaged,
    reload_under_load, reuse_run_with, run, send, turn, wait_until,
};
use nix::sys::signal::Signal;
use socket2::SockAddr;

fn node(path: &str) -> Vec<String> {
    ["node", &app("node/unix.js"), path].map(str::to_owned).to_vec()
}

fn python(path: &str) -> Vec<String> {
    common::python("unix.py", &[path])
}

fn addr(path: &str) -> SockAddr {
    SockAddr::unix(path).expect("a path that fits")
}

/// Who answers on a path.
#[track_caller]
fn get(path: &str) -> load::Origin {
    load::get(addr(path), "/", DEADLINE).unwrap_or_else(|failure| panic!("{path}: {failure:?}")).origin
}

/// Reloads under load, and asserts that no request fails and that each switch is atomic.
#[track_caller]
fn assert_reloads_lose_nothing(service: &Service, addr: impl Into<SockAddr>, times: u32) {
    let report = reload_under_load(service, LoadOptions::new(addr, 8).record(), times);
    report.assert_switched_atomically(times + 1);
}

/// The names in a folder.
fn names(folder: &Folder) -> Vec<String> {
    let entries = fs::read_dir(&folder.0).expect("read a folder").flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().display().to_string()).collect();
    names.sort();
    names
}

fn mode(path: &str) -> u32 {
    fs::metadata(path).expect("a socket").permissions().mode() & 0o777
}

#[test]
fn a_node_server_that_unlinks_its_path_when_it_stops_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let folder = Folder::new();
    let path = folder.path("socket");
    let mut service = Service::run_ready("-n 2", &node(&path));
    assert_reloads_lose_nothing(&service, addr(&path), 5);
    assert_eq!(names(&folder), ["socket"]);
    service.stop();
    assert_eq!(names(&folder), [""; 0], "the path is removed with the last worker");
}

#[test]
fn a_python_server_that_only_binds_its_path_loses_no_request_in_10_reloads() {
    let _turn = turn();
    let folder = Folder::new();
    let path = folder.path("socket");
    let mut service = Service::run_ready("-n 4", &python(&path));
    assert_reloads_lose_nothing(&service, addr(&path), 10);
    let load = Load::start(LoadOptions::new(addr(&path), 16));
    wait_until("every worker answers", DEADLINE, || load.snapshot().slots.len() == 4);
    load.stop().assert_nothing_failed();
    service.stop();
    assert_eq!(names(&folder), [""; 0]);
}

#[test]
fn gunicorn_and_uvicorn_on_a_path_lose_no_request_in_3_reloads() {
    let _turn = turn();
    let folder = Folder::new();
    let path = folder.path("gunicorn");
    let bind = format!("unix:{path}");
    let rest = ["--workers", "2", "--bind", &bind, "web:wsgi"];
    let mut service = packaged("-n 2 --stop-signal TERM", "gunicorn", &rest);
    assert_reloads_lose_nothing(&service, addr(&path), 3);
    service.stop();

    let path = folder.path("uvicorn");
    let rest = ["--uds", &path, "--lifespan", "off", "--no-access-log", "web:asgi"];
    let mut service = packaged("-n 2", "uvicorn", &rest);
    assert_reloads_lose_nothing(&service, addr(&path), 3);
    service.stop();
    assert_eq!(names(&folder), [""; 0]);
}

#[test]
fn a_path_that_only_one_worker_uses_is_left_alone() {
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    let manager = "import multiprocessing, os, runpy, sys\n\
        manager = multiprocessing.Manager()\n\
        assert manager.list([1])[0] == 1\n\
        sys.argv = sys.argv[1:]\n\
        runpy.run_path(sys.argv[0], run_name='app')";
    for workers in [1, 2] {
        let worker = inline(manager, &[&app("python/naive.py"), &addr.port().to_string()]);
        let mut command = reuse_run_with(&format!("-n {workers}"), &worker);
        command.env("TMPDIR", &folder.0);
        let mut service = Service::spawn_ready(command);
        assert_reloads_lose_nothing(&service, addr, 2);
        service.stop();
    }
}

#[test]
fn a_connection_between_processes_of_one_worker_delays_no_reload_and_no_stop() {
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    let connected = "import multiprocessing, runpy, sys\n\
        shared = multiprocessing.Manager().list([1])\n\
        assert shared[0] == 1\n\
        sys.argv = sys.argv[1:]\n\
        runpy.run_path(sys.argv[0], run_name='app')";
    let worker = inline(connected, &[&app("python/naive.py"), &addr.port().to_string()]);
    let mut command = reuse_run_with("-n 2 --drain 1h --stop-within 1h", &worker);
    command.env("TMPDIR", &folder.0);
    let mut service = Service::spawn_ready(command);
    service.reload();
    service.stop();
}

/// An nginx in the foreground that forwards a port to a Unix socket.
struct Nginx(Child);

impl Nginx {
    fn start(folder: &Folder, port: u16, upstream: &str) -> Nginx {
        let root = folder.path("");
        let config = format!(
            "user root; daemon off; master_process off; pid {root}nginx.pid; error_log stderr; worker_processes 1;
             events {{ }}
             http {{
               access_log off;
               client_body_temp_path {root}body; proxy_temp_path {root}proxy; fastcgi_temp_path {root}fastcgi;
               uwsgi_temp_path {root}uwsgi; scgi_temp_path {root}scgi;
               server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://unix:{upstream}:/; }} }}
             }}"
        );
        let file = folder.path("nginx.conf");
        fs::write(&file, config).expect("write the configuration");
        let mut command = Command::new("nginx");
        command.args(["-e", "stderr", "-c", &file]).stdin(Stdio::null()).stdout(Stdio::null());
        Nginx(command.spawn().expect("start nginx: run scripts/test"))
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn behind_nginx_no_request_fails_in_5_reloads() {
    let _turn = turn();
    let (folder, proxy, path) = (Folder::new(), free_address(), Folder::new());
    let path = path.path("socket");
    let mut service = Service::run_ready("-n 2", &node(&path));
    let nginx = Nginx::start(&folder, proxy.port(), &path);
    wait_until("nginx listens", DEADLINE, || std::net::TcpStream::connect(proxy).is_ok());
    assert_reloads_lose_nothing(&service, proxy, 5);
    drop(nginx);
    service.stop();
}

#[test]
fn an_old_worker_may_finish_its_request_on_a_path_before_it_gets_the_stop_signal() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let command = [python(&path), vec!["slow".to_owned()]].concat();
    let mut service = Service::run_ready("-n 1 --drain 100s", &command);
    let old = service.workers();
    let client = std::thread::spawn({
        let path = path.clone();
        move || get(&path)
    });
    wait_until("the worker has accepted the request", DEADLINE, || {
        let open = fs::read_dir(format!("/proc/{}/fd", old[0])).map_or(0, |fds| {
            fds.flatten()
                .filter(|fd| is_connected_to(&path, &fs::read_link(fd.path()).unwrap_or_default()))
                .count()
        });
        open == 1
    });
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    service.wait_for_line_after(from, "generation 2 serves");
    service.assert_keeps(old[0]);
    folder.raise("socket.go");
    assert_eq!(client.join().expect("an answer").generation, Some(1));
    service.wait_for_line_after(from, "reload done");
    assert_eq!(get(&path).generation, Some(2));
    service.stop();
}

/// Whether the link of an fd is a connection to a path.
fn is_connected_to(path: &str, link: &Path) -> bool {
    let table = fs::read_to_string("/proc/net/unix").expect("the table of Unix sockets");
    let inode = link.display().to_string();
    let Some(inode) = inode.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) else {
        return false;
    };
    table.lines().any(|line| line.ends_with(&format!(" 03 {inode} {path}")))
}

#[test]
fn a_worker_that_crashes_is_replaced_on_the_path_and_no_connection_is_refused() {
    let _turn = turn();
    let folder = Folder::new();
    let path = folder.path("socket");
    let mut service = Service::run_ready("-n 1", &python(&path));
    for _ in 0..3 {
        let from = service.log.count();
        let crashed = service.workers()[0];
        send(crashed, Signal::SIGKILL);
        wait_until("the worker is gone", DEADLINE, || !service.workers().contains(&crashed));
        get(&path);
        service.wait_for_line_after(from, "is ready, a replacement");
    }
    service.stop();
}

#[test]
fn after_a_failed_reload_the_old_generation_keeps_the_path() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let script =
        format!("[ $REUSE_RUN_GENERATION$REUSE_RUN_SLOT = 21 ] && exit 3; exec {}", python(&path).join(" "));
    let mut service = Service::run_ready("-n 2", &["sh", "-c", &script]);
    service.failing_reload();
    assert_eq!(get(&path).generation, Some(1));
    assert_eq!(names(&folder), ["socket"], "a path of generation 2 is left");
    service.reload();
    assert_eq!(get(&path).generation, Some(3));
    service.stop();
}

#[test]
fn a_path_keeps_the_mode_that_a_worker_or_its_umask_gave_it() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let script = format!("umask 007; exec {}", python(&path).join(" "));
    let mut service = Service::run_ready("-n 1", &["sh", "-c", &script]);
    assert_eq!(mode(&path), 0o770);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o711)).expect("change the mode");
    service.reload();
    assert_eq!(mode(&path), 0o711);
    service.stop();
}

#[test]
fn a_path_may_be_relative_behind_a_link_or_longer_than_an_address() {
    let folder = Folder::new();
    let deep = folder.0.join("d".repeat(120));
    fs::create_dir(&deep).expect("make a folder");
    symlink(&deep, folder.0.join("link")).expect("make a link");
    let mut command = reuse_run_with("-n 2", &python("socket"));
    command.current_dir(folder.0.join("link"));
    let mut service = Service::spawn_ready(command);
    assert_reloads_lose_nothing(&service, addr(&folder.path("link/socket")), 2);
    service.stop();
    assert!(!deep.join("socket").exists());
}

#[test]
fn a_path_of_another_program_is_in_use() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let other = UnixListener::bind(&path).expect("bind a path");
    let mut service = Service::run("-n 1", &python(&path));
    assert_eq!(service.wait_end().code(), Some(1), "the worker's own status");
    assert!(service.log.text().contains("Address already in use"), "{}", service.log.text());
    UnixStream::connect(&path).expect("the other program still has it");
    drop(other);
}

#[test]
fn a_worker_may_remove_a_file_while_a_path_is_served() {
    let folder = Folder::new();
    let path = folder.path("socket");
    folder.raise("other");
    let script = format!("rm {} && exec {}", folder.path("other"), python(&path).join(" "));
    let mut service = Service::run_ready("-n 1", &["sh", "-c", &script]);
    folder.raise("other");
    service.reload(); // whose `rm` runs while generation 1 serves the path
    assert_eq!(names(&folder), ["socket"]);
    assert!(fs::metadata(&path).expect("the path").file_type().is_socket());
    service.stop();
}

#[test]
fn a_path_is_removed_at_the_end_even_if_the_worker_is_down() {
    let folder = Folder::new();
    let path = PathBuf::from(folder.path("socket"));
    // The worker is down, between two restarts, when the stop comes.
    let script = format!(
        "[ -e {0} ] && exit 3; exec {1}",
        folder.path("broken"),
        python(&folder.path("socket")).join(" ")
    );
    let mut service = Service::run_ready("-n 1", &["sh", "-c", &script]);
    folder.raise("broken");
    send(service.workers()[0], Signal::SIGKILL);
    wait_until("a pause between restarts", DEADLINE, || service.log.count_of("status 3") >= 3);
    service.signal(Signal::SIGTERM);
    service.wait_end();
    assert!(!path.exists(), "{}", service.log.text());
}

// Paths that are removed and bound at the same time.

#[test]
fn workers_that_remove_and_bind_the_same_paths_at_the_same_time_all_have_them() {
    let _turn = turn();
    let folder = Folder::new();
    for round in 0..2 {
        // Every second path is left from an earlier run.
        let path = |number: usize| folder.path(&format!("{round}-{number}"));
        for number in (0..100).step_by(2) {
            drop(UnixListener::bind(path(number)).expect("bind a path"));
        }
        let program = "import os, socket, sys, time\n\
            folder, round = sys.argv[1:]\n\
            open(folder + 'here-' + round + os.environ['REUSE_RUN_SLOT'], 'w').close()\n\
            here = lambda: sum(name.startswith('here-' + round) for name in os.listdir(folder))\n\
            while here() < 8: time.sleep(0.001)\n\
            sockets = []\n\
            for number in range(100):\n\
            \x20   path = folder + round + '-' + str(number)\n\
            \x20   time.sleep(0.02 - time.time() % 0.02)\n\
            \x20   try: os.unlink(path)\n\
            \x20   except FileNotFoundError: pass\n\
            \x20   sockets.append(socket.socket(socket.AF_UNIX))\n\
            \x20   sockets[-1].bind(path)\n\
            \x20   sockets[-1].listen(64)\n\
            os.write(int(os.environ['READY_FD']), b'\\n')\n\
            time.sleep(1000)";
        let command = inline(program, &[&folder.path(""), &round.to_string()]);
        let mut service = Service::run_ready("-n 8 --ready notify", &command);
        let missing: Vec<usize> = (0..100).filter(|number| !Path::new(&path(*number)).exists()).collect();
        assert_eq!(missing, [0usize; 0], "of 100 paths");
        service.stop();
    }
}

#[test]
fn a_worker_may_remove_its_path_by_the_name_that_getsockname_shows() {
    let _turn = turn();
    let folder = Folder::new();
    // Here the name of the next generation's socket is longer than an address.
    let long = folder.path(&"d".repeat(98 - folder.path("").len()));
    fs::create_dir(&long).expect("make a folder");
    let program = "import os, signal, socket, sys\n\
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n\
        server = socket.socket(socket.AF_UNIX)\n\
        server.bind(sys.argv[1])\n\
        server.listen(64)\n\
        os.write(int(os.environ['READY_FD']), b'\\n')\n\
        signal.sigwait({signal.SIGINT})\n\
        os.unlink(server.getsockname())\n\
        os.write(1, b'removed\\n')";
    for (path, removed) in [(folder.path("socket"), 6), (format!("{long}/socket"), 2)] {
        let mut service = Service::run_ready("-n 2 --ready notify", &inline(program, &[&path]));
        for _ in 0..2 {
            service.reload();
            assert!(Path::new(&path).exists(), "the next generation has it");
        }
        service.stop();
        assert_eq!(service.out.count_of("removed"), removed, "{}", service.log.text());
        assert!(!Path::new(&path).exists());
    }
    fs::remove_dir(long).expect("an empty folder");
    assert_eq!(names(&folder), [""; 0]);
}

// Paths that others have changed.

/// A worker that is ready when it has its path; from generation 2 on it first waits for the file PATH.go.
fn held(path: &str) -> Vec<String> {
    let program = "import os, socket, sys, time\n\
        path = sys.argv[1]\n\
        server = socket.socket(socket.AF_UNIX)\n\
        server.bind(path)\n\
        server.listen(64)\n\
        while os.environ['REUSE_RUN_GENERATION'] > '1' and not os.path.exists(path + '.go'): time.sleep(0.01)\n\
        os.write(int(os.environ['READY_FD']), b'\\n')\n\
        time.sleep(1000)";
    inline(program, &[path])
}

#[test]
fn a_link_in_the_place_of_the_new_socket_is_not_followed_at_the_switch() {
    let folder = Folder::new();
    let (path, victim) = (folder.path("socket"), folder.path("victim"));
    let mut service = Service::run_ready("-n 1 --ready notify", &held(&path));
    folder.raise("victim");
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).expect("close a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("open the path");
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    let new = || names(&folder).into_iter().find(|name| name.starts_with('.'));
    wait_until("generation 2 has bound", DEADLINE, || new().is_some());
    let new = folder.path(&new().expect("a name"));
    fs::remove_file(&new).expect("remove a socket");
    symlink(&victim, &new).expect("make a link");
    folder.raise("socket.go");
    service.wait_for_line_after(from, "reload done");
    assert_eq!(mode(&victim), 0o600, "{}", service.log.text());
    service.stop();
}

/// As another user may make one in a folder like /tmp, where the name can be known.
#[test]
fn a_folder_in_the_place_of_the_new_socket_fails_no_reload() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let mut service = Service::run_ready("-n 1 --ready notify", &held(&path));
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    let new = || names(&folder).into_iter().find_map(|name| Some(name.strip_suffix(".2")?.to_owned()));
    wait_until("generation 2 has bound", DEADLINE, || new().is_some());
    let taken = format!("{}.3", new().expect("a name"));
    folder.raise("socket.go");
    service.wait_for_line_after(from, "reload done");
    fs::create_dir(folder.path(&taken)).expect("make a folder");
    service.reload();
    service.stop();
    assert_eq!(names(&folder), [taken.as_str(), "socket.go"], "{}", service.log.text());
}

#[test]
fn in_a_folder_that_was_replaced_the_next_generation_has_the_path() {
    let folder = Folder::new();
    let inner = folder.path("run");
    let path = folder.path("run/socket");
    fs::create_dir(&inner).expect("make a folder");
    let mut service = Service::run_ready("-n 2", &python(&path));
    fs::rename(&inner, folder.path("run.old")).expect("move a folder");
    fs::create_dir(&inner).expect("make a folder");
    service.reload();
    // When reuse-run answers, it has done all that follows the end of generation 1.
    assert_eq!(run(&service, "status").code, Some(0));
    assert_eq!(get(&path).generation, Some(2));
    service.reload();
    assert_eq!(get(&path).generation, Some(3));
    service.stop();
    assert!(!Path::new(&path).exists());
}

#[test]
fn a_socket_that_another_program_has_bound_in_the_place_of_the_workers_is_left_alone() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let mut service = Service::run_ready("-n 2", &python(&path));
    fs::remove_file(&path).expect("remove the path");
    let _other = UnixListener::bind(&path).expect("bind it");
    service.stop();
    UnixStream::connect(&path).expect("the other program still has it");
}

// Requests in progress.

/// Waits until a worker has one socket more than before.
#[track_caller]
fn accepted_one(worker: u32, before: usize) {
    wait_until("the worker has accepted the request", DEADLINE, || sockets(worker) == before + 1);
}

fn sockets(pid: u32) -> usize {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return 0 };
    let links = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    links.filter(|link| link.display().to_string().starts_with("socket:")).count()
}

#[test]
fn a_request_from_another_network_namespace_is_finished_before_the_stop_signal() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let command = [python(&path), vec!["slow".to_owned()]].concat();
    let mut service = Service::run_ready("-n 1 --drain 100s", &command);
    let old = service.workers()[0];
    let before = sockets(old);
    let client = std::thread::spawn({
        let path = path.clone();
        move || {
            own_network();
            get(&path)
        }
    });
    accepted_one(old, before);
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    service.wait_for_line_after(from, "generation 2 serves");
    service.assert_keeps(old);
    folder.raise("socket.go");
    assert_eq!(client.join().expect("an answer").generation, Some(1));
    service.wait_for_line_after(from, "reload done");
    service.stop();
}

#[test]
fn a_worker_with_another_user_whose_fds_cannot_be_read_has_the_whole_drain() {
    needs_other_users!();
    let folder = Folder::new();
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o755)).expect("open the folder");
    let path = folder.path("socket");
    let program = "import os, socketserver, sys, time\n\
        path = sys.argv[1]\n\
        class Handler(socketserver.StreamRequestHandler):\n\
        \x20   def handle(self):\n\
        \x20       while self.rfile.readline().strip(): pass\n\
        \x20       print('works', flush=True)\n\
        \x20       while not os.path.exists(path + '.go'): time.sleep(0.01)\n\
        \x20       body = 'generation=' + os.environ['REUSE_RUN_GENERATION'] + '\\n'\n\
        \x20       head = 'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n'\n\
        \x20       self.wfile.write((head % len(body) + body).encode())\n\
        server = socketserver.ThreadingUnixStreamServer(path, Handler)\n\
        server.daemon_threads = True\n\
        os.chmod(path, 0o777)\n\
        os.setgroups([])\n\
        os.setuid(65534)\n\
        server.serve_forever()";
    let setpriv = ["setpriv", "--inh-caps=-sys_ptrace", "--bounding-set=-sys_ptrace", "--"];
    let mut service = Service::spawn_ready(behind(&setpriv, "-n 1 --drain 100s", &inline(program, &[&path])));
    let old = service.workers()[0];
    let client = std::thread::spawn({
        let path = path.clone();
        move || get(&path)
    });
    service.wait_for_output("works");
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    service.wait_for_line_after(from, "generation 2 serves");
    service.assert_keeps(old);
    folder.raise("socket.go");
    assert_eq!(client.join().expect("an answer").generation, Some(1));
    service.assert_keeps(old);
    service.stop();
}

#[test]
fn a_path_that_is_bound_without_listen_does_not_hold_up_a_reload() {
    let (addr, folder) = (free_address(), Folder::new());
    let program = "import runpy, os, socket, sys\n\
        idle = socket.socket(socket.AF_UNIX)\n\
        idle.bind(sys.argv[1])\n\
        sys.argv = sys.argv[2:]\n\
        runpy.run_path(sys.argv[0], run_name='app')";
    let rest = [&folder.path("idle"), &app("python/naive.py"), &addr.port().to_string()];
    let command = inline(program, &rest.map(String::as_str));
    let mut service = Service::run_ready("-n 1 --drain 100s", &command);
    for _ in 0..2 {
        let took = service.reload();
        assert!(took.as_secs() < 60, "{took:?}");
    }
    service.stop();
}

#[test]
fn a_path_that_one_worker_shuts_down_does_not_hold_up_the_others() {
    let folder = Folder::new();
    let program = "import os, signal, socket, sys, time\n\
        listener = socket.socket(socket.AF_UNIX)\n\
        def leave(*_):\n\
        \tlistener.shutdown(socket.SHUT_RDWR)\n\
        \tos._exit(0)\n\
        signal.signal(signal.SIGINT, leave)\n\
        listener.bind(sys.argv[1])\n\
        listener.listen(64)\n\
        time.sleep(1000)";
    let command = inline(program, &[&folder.path("socket")]);
    let mut service = Service::run_ready("-n 2 --batch 1 --drain 100s", &command);
    let took = service.reload();
    assert!(took.as_secs() < 60, "{took:?}");
    service.stop();
}

// Permissions, and paths of one worker.

#[test]
fn a_root_worker_without_cap_dac_override_gets_the_same_error_as_alone() {
    let folder = Folder::new();
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o555)).expect("close the folder");
    let program = "import socket, sys\n\
        try:\n\
        \x20   socket.socket(socket.AF_UNIX).bind(sys.argv[1])\n\
        \x20   print('bound')\n\
        except OSError as error:\n\
        \x20   print(error.strerror)";
    let without = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override", "--"];
    let command = [without.map(str::to_owned).to_vec(), inline(program, &[&folder.path("socket")])].concat();
    let alone = Command::new(&command[0]).args(&command[1..]).output().expect("run it");
    assert_eq!(String::from_utf8_lossy(&alone.stdout).trim(), "Permission denied", "{alone:?}");
    let mut service = Service::run("-n 1 --ready notify", &command);
    service.wait_end();
    assert_eq!(service.out.text(), "Permission denied", "{}", service.log.text());
    assert_eq!(names(&folder), [""; 0]);
}

#[test]
fn a_ready_worker_may_make_and_remove_its_own_listeners_and_nothing_is_logged_or_left() {
    let (addr, folder) = (free_address(), Folder::new());
    let program = "import os, socket, sys, time\n\
        folder, port = sys.argv[1:]\n\
        server = socket.create_server(('127.0.0.1', int(port)))\n\
        while not os.path.exists(folder + 'go'): time.sleep(0.01)\n\
        for number in range(300):\n\
        \x20   path = folder + str(number)\n\
        \x20   with socket.socket(socket.AF_UNIX) as own:\n\
        \x20       own.bind(path)\n\
        \x20       own.listen()\n\
        \x20   os.unlink(path)\n\
        print('all are gone', flush=True)\n\
        time.sleep(1000)";
    let command = inline(program, &[&folder.path(""), &addr.port().to_string()]);
    let mut service = Service::run_ready("-n 1", &command);
    let before = service.fds();
    folder.raise("go");
    service.wait_for_output("all are gone");
    assert_eq!(names(&folder), ["go"]);
    let addresses = common::status(&service)["addresses"].to_string();
    assert!(addresses.contains(&addr.to_string()) && !addresses.contains(&folder.path("")), "{addresses}");
    assert!(service.fds() < before + 20, "{} fds, and {before} before", service.fds());
    service.stop();
    assert_eq!(service.log.count_of("stopped listening"), 0, "{}", service.log.text());
}

#[test]
fn when_each_worker_has_only_its_own_path_the_log_names_the_remedy() {
    let folder = Folder::new();
    let script = format!("exec python3 {} {}-$REUSE_RUN_SLOT", app("python/unix.py"), folder.path("socket"));
    let mut service = Service::run("-n 2 --ready-timeout 4s", &["sh", "-c", &script]);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    let line = service.wait_for_line("not ready within").text;
    for part in ["Unix sockets or UDP ports that no other worker has", "--ready notify"] {
        assert!(line.contains(part), "no {part:?} in {line}");
    }
}

/// The kernel's table of Unix sockets has a line for each, with the name as it is. A stranger may choose a name with a line's
/// end in it, and what follows looks like a connection by a path of ours.
#[test]
fn a_name_that_another_user_chose_does_not_hold_up_a_reload() {
    needs_other_users!();
    own_network();
    let folder = Folder::new();
    let path = folder.path("s");
    let mut service = Service::run_ready("-n 1 --drain 1h", &python(&path));
    let stranger = "import os, socket, sys, time\nos.makedirs(sys.argv[1])\nos.chmod(sys.argv[1], 0o777)\n\
        os.chdir(sys.argv[1])\nos.setgroups([])\nos.setresgid(54322, 54322, 54322)\nos.setresuid(54322, 54322, 54322)\n\
        name = 'x\\n0 0 0 0 0001 03 4242 ' + sys.argv[2]\nos.makedirs(os.path.dirname(name))\n\
        s = socket.socket(socket.AF_UNIX)\ns.bind(name)\ns.listen()\nprint('bound', flush=True)\ntime.sleep(1000)";
    let mut command = Command::new("python3");
    command.args(["-c", stranger, &folder.path("strange"), &path]);
    let stranger = Service::spawn(command);
    stranger.wait_for_output("bound");
    service.reload();
    assert_eq!(get(&path).generation, Some(2));
    service.stop();
}
