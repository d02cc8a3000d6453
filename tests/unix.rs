//! Unix sockets: a path that all workers share and that every generation hands to the next.

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::load::{self, Load, LoadOptions};
use common::{
    DEADLINE, Folder, Service, app, arguments, free_address, inline, own_network, packaged, reuse_run, turn,
    wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use socket2::SockAddr;

fn node(path: &str) -> Vec<String> {
    ["node", &app("node/unix.js"), path].map(str::to_owned).to_vec()
}

fn python(path: &str) -> Vec<String> {
    ["python3", &app("python/unix.py"), path].map(str::to_owned).to_vec()
}

fn addr(path: &str) -> SockAddr {
    SockAddr::unix(path).expect("a path that fits")
}

/// Who answers on a path.
#[track_caller]
fn get(path: &str) -> load::Origin {
    load::get(addr(path), "/", DEADLINE).unwrap_or_else(|failure| panic!("{path}: {failure:?}")).origin
}

/// Reloads under load: nothing fails, each switch is atomic, and all generations answer.
#[track_caller]
fn reloads_lose_nothing(service: &Service, addr: impl Into<SockAddr>, times: u32) {
    let load = Load::start(LoadOptions::new(addr, 8).record());
    let answered_by = |generation: u32| {
        wait_until("answers of the newest generation", DEADLINE, || {
            load.snapshot().generations.contains_key(&generation)
        });
    };
    answered_by(1);
    for time in 1..=times {
        service.reload();
        answered_by(time + 1);
    }
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_failed();
    report.assert_nothing_stale();
    assert_eq!(report.counts.generations.len() as u32, times + 1, "{:?}", report.counts.generations);
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
fn a_node_server_that_unlinks_its_path_on_its_way_out_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let folder = Folder::new();
    let path = folder.path("socket");
    let mut service = Service::run_ready("-n 2", &node(&path));
    reloads_lose_nothing(&service, addr(&path), 5);
    assert_eq!(names(&folder), ["socket"]);
    service.stop();
    assert_eq!(names(&folder), [""; 0], "the path goes with the last worker");
}

#[test]
fn a_python_server_that_only_binds_its_path_loses_no_request_in_10_reloads() {
    let _turn = turn();
    let folder = Folder::new();
    let path = folder.path("socket");
    let mut service = Service::run_ready("-n 4", &python(&path));
    reloads_lose_nothing(&service, addr(&path), 10);
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
    reloads_lose_nothing(&service, addr(&path), 3);
    service.stop();

    let path = folder.path("uvicorn");
    let rest = ["--uds", &path, "--lifespan", "off", "--no-access-log", "web:asgi"];
    let mut service = packaged("-n 2", "uvicorn", &rest);
    reloads_lose_nothing(&service, addr(&path), 3);
    service.stop();
    assert_eq!(names(&folder), [""; 0]);
}

#[test]
fn a_path_of_a_workers_own_is_nobody_elses_business() {
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    let manager = "import multiprocessing, os, runpy, sys\n\
        manager = multiprocessing.Manager()\n\
        assert manager.list([1])[0] == 1\n\
        sys.argv = sys.argv[1:]\n\
        runpy.run_path(sys.argv[0], run_name='app')";
    for workers in [1, 2] {
        let mut command = reuse_run();
        let worker = ["python3", "-c", manager, &app("python/naive.py"), &addr.port().to_string()];
        command.args(arguments(&format!("-n {workers}"), &worker)).env("TMPDIR", &folder.0);
        let mut service = Service::spawn(command);
        service.wait_for_line("generation 1 is ready");
        reloads_lose_nothing(&service, addr, 2);
        service.stop();
    }
}

/// An nginx in the foreground that proxies what comes to a port.
struct Nginx(Child);

impl Nginx {
    fn start(folder: &Folder, port: u16, upstream: &str) -> Nginx {
        let root = folder.path("");
        let config = format!(
            "daemon off; master_process off; pid {root}nginx.pid; error_log stderr; worker_processes 1;
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
fn nginx_that_proxies_to_a_path_sees_no_request_fail_in_5_reloads() {
    let _turn = turn();
    let (folder, proxy, path) = (Folder::new(), free_address(), Folder::new());
    let path = path.path("socket");
    let mut service = Service::run_ready("-n 2", &node(&path));
    let nginx = Nginx::start(&folder, proxy.port(), &path);
    wait_until("nginx listens", DEADLINE, || std::net::TcpStream::connect(proxy).is_ok());
    reloads_lose_nothing(&service, proxy, 5);
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
    wait_until("the request is being worked on", DEADLINE, || {
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

/// Whether an fd's link is a connection that came by a path.
fn is_connected_to(path: &str, link: &Path) -> bool {
    let table = fs::read_to_string("/proc/net/unix").expect("the table of Unix sockets");
    let inode = link.display().to_string();
    let Some(inode) = inode.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) else {
        return false;
    };
    table.lines().any(|line| line.ends_with(&format!(" 03 {inode} {path}")))
}

#[test]
fn a_worker_that_crashes_is_replaced_on_the_path_and_nobody_is_refused() {
    let _turn = turn();
    let folder = Folder::new();
    let path = folder.path("socket");
    let mut service = Service::run_ready("-n 1", &python(&path));
    for _ in 0..3 {
        let from = service.log.count();
        let crashed = service.workers()[0];
        kill(Pid::from_raw(crashed as i32), Signal::SIGKILL).expect("kill a worker");
        wait_until("the worker is gone", DEADLINE, || !service.workers().contains(&crashed));
        get(&path);
        service.wait_for_line_after(from, "is ready, a replacement");
    }
    service.stop();
}

#[test]
fn a_failed_reload_leaves_the_path_to_the_generation_that_serves() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let script =
        format!("[ $REUSE_RUN_GENERATION$REUSE_RUN_SLOT = 21 ] && exit 3; exec {}", python(&path).join(" "));
    let mut service = Service::run_ready("-n 2", &["sh", "-c", &script]);
    service.failing_reload();
    assert_eq!(get(&path).generation, Some(1));
    assert_eq!(names(&folder), ["socket"], "nothing of generation 2 is left");
    service.reload();
    assert_eq!(get(&path).generation, Some(3));
    service.stop();
}

#[test]
fn the_mode_that_a_worker_or_its_umask_gave_the_path_stays() {
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
fn a_path_is_the_same_relative_by_a_link_or_longer_than_an_address_may_be() {
    let folder = Folder::new();
    let deep = folder.0.join("d".repeat(120));
    fs::create_dir(&deep).expect("make a folder");
    symlink(&deep, folder.0.join("link")).expect("make a link");
    let mut command = reuse_run();
    command.current_dir(folder.0.join("link")).args(arguments("-n 2", &python("socket")));
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    reloads_lose_nothing(&service, addr(&folder.path("link/socket")), 2);
    service.stop();
    assert!(!deep.join("socket").exists());
}

#[test]
fn a_path_that_another_program_has_is_in_use() {
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
fn a_file_that_a_worker_removes_is_removed_while_a_path_is_served() {
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
fn a_path_is_removed_when_all_is_over_whatever_the_workers_do() {
    let folder = Folder::new();
    let path = PathBuf::from(folder.path("socket"));
    // It crashes and is in its delay when the stop comes.
    let script = format!(
        "[ -e {0} ] && exit 3; exec {1}",
        folder.path("broken"),
        python(&folder.path("socket")).join(" ")
    );
    let mut service = Service::run_ready("-n 1", &["sh", "-c", &script]);
    folder.raise("broken");
    kill(Pid::from_raw(service.workers()[0] as i32), Signal::SIGKILL).expect("kill a worker");
    wait_until("a pause between restarts", DEADLINE, || service.log.count_of("status 3") >= 3);
    service.signal(Signal::SIGTERM);
    service.wait_end();
    assert!(!path.exists(), "{}", service.log.text());
}

// Paths that are removed and bound at the same time.

#[test]
fn programs_that_all_remove_their_paths_and_bind_them_at_the_same_time_have_them_when_they_are_ready() {
    let _turn = turn();
    let folder = Folder::new();
    for round in 0..2 {
        // Every other path is one that an earlier run has left.
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

// Paths where somebody else has been.

/// A worker that is ready when it has its path and, from generation 2 on, PATH.go is there too.
fn held_up(path: &str) -> Vec<String> {
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
fn a_link_that_the_owner_of_the_folder_lays_is_not_followed_at_the_switch() {
    let folder = Folder::new();
    let (path, victim) = (folder.path("socket"), folder.path("victim"));
    let mut service = Service::run_ready("-n 1 --ready notify", &held_up(&path));
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

#[test]
fn a_path_in_a_folder_that_was_replaced_is_the_next_generations_and_stays() {
    let folder = Folder::new();
    let inner = folder.path("run");
    let path = folder.path("run/socket");
    fs::create_dir(&inner).expect("make a folder");
    let mut service = Service::run_ready("-n 2", &python(&path));
    fs::rename(&inner, folder.path("run.old")).expect("move a folder");
    fs::create_dir(&inner).expect("make a folder");
    service.reload();
    // What reuse-run does when generation 1 has ended it has done when it answers.
    let status = reuse_run().args(["status", &service.pid().to_string()]).output();
    assert_eq!(status.expect("run reuse-run status").status.code(), Some(0));
    assert_eq!(get(&path).generation, Some(2));
    service.reload();
    assert_eq!(get(&path).generation, Some(3));
    service.stop();
    assert!(!Path::new(&path).exists());
}

#[test]
fn a_socket_that_another_program_has_put_in_the_place_of_the_workers_is_left_alone() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let mut service = Service::run_ready("-n 2", &python(&path));
    fs::remove_file(&path).expect("remove the path");
    let _other = UnixListener::bind(&path).expect("bind it");
    service.stop();
    UnixStream::connect(&path).expect("the other program still has it");
}

// What a worker may finish.

/// Waits until a worker has one more socket than it had.
#[track_caller]
fn accepted_one(worker: u32, before: usize) {
    wait_until("the request is being worked on", DEADLINE, || sockets(worker) == before + 1);
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
fn a_worker_that_has_become_another_user_and_cannot_be_looked_into_has_all_of_the_drain() {
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
    let mut command = Command::new("setpriv");
    command.args(["--inh-caps=-sys_ptrace", "--bounding-set=-sys_ptrace", "--"]);
    command.arg(reuse_run().get_program()).env_remove("RUST_LOG");
    command.args(arguments("-n 1 --drain 100s", &inline(program, &[&path])));
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
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
    service.stop();
}

#[test]
fn a_path_that_is_bound_and_never_listened_on_holds_no_reload_up() {
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

// What a worker may not do, and what it does for itself.

#[test]
fn a_root_worker_that_may_not_override_permissions_gets_what_it_would_get_alone() {
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
fn a_ready_worker_may_make_and_remove_listeners_of_its_own_without_a_word_or_a_trace() {
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
    let status = reuse_run().args(["status", "--json", &service.pid().to_string()]).output();
    let status = String::from_utf8(status.expect("run reuse-run status").stdout).expect("UTF-8");
    assert!(status.contains(&addr.to_string()) && !status.contains(&folder.path("")), "{status}");
    assert!(service.fds() < before + 20, "{} fds, and {before} before", service.fds());
    service.stop();
    assert_eq!(service.log.count_of("stopped listening"), 0, "{}", service.log.text());
}

#[test]
fn workers_with_nothing_but_a_path_of_their_own_are_told_of_the_way_out() {
    let folder = Folder::new();
    let script = format!("exec python3 {} {}-$REUSE_RUN_SLOT", app("python/unix.py"), folder.path("socket"));
    let mut service = Service::run("-n 2 --ready-timeout 4s", &["sh", "-c", &script]);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    let line = service.wait_for_line("not ready within").text;
    for part in ["Unix sockets that no other worker has", "--ready notify"] {
        assert!(line.contains(part), "no {part:?} in {line}");
    }
}
