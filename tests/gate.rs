//! A replacement that doesn't serve gets no connection: the deploy fails with status 1, names the reason, and no request fails.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use common::load::{Load, LoadOptions};
use common::{
    DEADLINE, Folder, Outcome, Service, answered_more, app, at_once, children, free_address, inline, kernel,
    node_app, own_network, python, run, send, server, turn, wait_until, workers_where,
};
use nix::sys::signal::Signal;

/// A service whose next version is what was written last.
struct Deployed {
    folder: Folder,
    service: Service,
    addr: SocketAddr,
}

impl Deployed {
    /// `version` is a shell script in which SERVER stands for the test server and ADDR for its address.
    fn run(options: &str, addr: SocketAddr, version: &str) -> Deployed {
        let folder = Folder::new();
        folder.write("version.node", &filled(version, addr));
        let command = ["sh".to_owned(), folder.path("version.node")];
        let service = Service::run_ready(options, &command);
        wait_until("the first generation listens", DEADLINE, || TcpStream::connect(addr).is_ok());
        Deployed { service, folder, addr }
    }

    fn deploy(&self, version: &str) {
        self.folder.write("version.node", &filled(version, self.addr));
    }

    /// Reloads by the command, while clients send requests; none of these fails.
    #[track_caller]
    fn reload(&self, options: &str) -> Outcome {
        let load = Load::start(LoadOptions::new(self.addr, 8));
        answered_more(&load);
        let outcome = run(&self.service, &format!("reload {options}"));
        answered_more(&load);
        load.stop().assert_nothing_failed();
        outcome
    }
}

fn filled(version: &str, addr: SocketAddr) -> String {
    version.replace("SERVER", &server()).replace("ADDR", &addr.to_string())
}

/// What workers open from now on follows their first listeners by more than a second.
fn wait_until_settled(service: &Service) {
    wait_until("a second", DEADLINE, || {
        workers_where(service, |worker| worker["seconds"].as_f64().is_some_and(|seconds| seconds > 1.0)).len()
            == 2
    });
}

const SERVES: &str = "exec SERVER --listen ADDR";

#[test]
fn an_express_app_that_says_ready_although_its_port_is_taken_gets_no_connection() {
    let _turn = turn();
    own_network();
    let app = |port: &str| {
        format!(
            "exec node -e \"require('{}')().get('/', (_, res) => res.send('pid=' + process.pid))\
             .listen({port}, () => process.send('ready')); setInterval(() => {{}}, 1000)\"",
            Path::new(&node_app("node_modules/express")).display()
        )
    };
    for readiness in ["listen", "notify"] {
        let addr = SocketAddr::from(([127, 0, 0, 1], 3000));
        let options = format!("-n 2 --ready {readiness} --ready-timeout 8s");
        let mut deployed = Deployed::run(&options, addr, &app("3000, '127.0.0.1'"));
        let _foreign = TcpListener::bind("127.0.0.1:3001").expect("bind");
        deployed.deploy(&app("3001, '127.0.0.1'"));
        deployed.reload("").assert_failed(&["it does not listen on 127.0.0.1:3000", "serve on"]);
        deployed.service.stop();
    }
}

#[test]
fn a_version_that_says_ready_and_does_not_listen_gets_no_connection() {
    at_once(["listen", "notify", "100ms"], |readiness| {
        let options = format!("-n 2 --ready {readiness} --ready-timeout 1s");
        let mut deployed =
            Deployed::run(&options, free_address(), "exec SERVER --listen ADDR --ready-after 0");
        deployed.deploy("echo >&$READY_FD; exec sleep 1000");
        deployed.reload("").assert_failed(&["it does not listen on", "serve on"]);
        deployed.service.stop();
    });
}

#[test]
fn a_replacement_that_listens_later_than_it_is_ready_is_waited_for() {
    let rows = [
        ("-n 2 --ready 200ms", "exec SERVER --listen ADDR --listen-after 600"),
        ("-n 2 --ready notify", "echo >&$READY_FD; exec SERVER --listen ADDR --listen-after 300"),
        ("-n 2", "echo >&$READY_FD; exec SERVER --listen ADDR --listen-after 300"),
    ];
    at_once(rows, |(options, version)| {
        let addr = free_address();
        let mut deployed = Deployed::run(options, addr, version);
        for _ in 0..3 {
            deployed.reload("").assert_done("2 workers of generation");
        }
        deployed.service.stop();
    });
}

#[test]
fn a_port_that_a_worker_opened_later_or_has_closed_since_is_not_asked_of_its_replacement() {
    let addr = free_address();
    let port = addr.port().to_string();
    let mut service = Service::run_ready("-n 2", &python("opens_later.py", &[&port]));
    for signal in [Signal::SIGUSR1, Signal::SIGALRM] {
        wait_until_settled(&service);
        service.signal(signal);
        let text = if signal == Signal::SIGUSR1 { "opened" } else { "closed" };
        wait_until(text, DEADLINE, || service.out.count_of(text) >= 2);
        if signal == Signal::SIGUSR1 {
            let worker = children(service.pid())[0];
            send(worker, Signal::SIGKILL);
            service.wait_for_line("is ready, a replacement");
        }
        run(&service, "reload").assert_done("2 workers of generation");
        wait_until_settled(&service);
        service.signal(Signal::SIGUSR1);
        wait_until("opened again", DEADLINE, || service.out.count_of("opened") >= 4);
    }
    service.stop();
}

#[test]
fn the_debugger_of_node_is_not_asked_of_a_replacement() {
    let _turn = turn();
    own_network();
    let mut service = Service::run_ready("-n 2 --ready-timeout 5s", &["node", &node_app("express/app.js")]);
    wait_until_settled(&service);
    service.signal(Signal::SIGUSR1);
    wait_until("the debugger", DEADLINE, || TcpStream::connect("127.0.0.1:9229").is_ok());
    run(&service, "reload").assert_done("2 workers of generation 2");
    service.stop();
}

#[test]
fn a_version_with_another_port_is_deployed_with_ports_may_change_only() {
    let (old, new) = (free_address(), free_address());
    let mut deployed = Deployed::run("-n 2 --ready-timeout 1s", old, SERVES);
    deployed.deploy(&SERVES.replace("ADDR", &new.to_string()));
    deployed.reload("").assert_failed(&[&format!("does not listen on {old}"), "--ports-may-change"]);
    run(&deployed.service, "reload --ports-may-change").assert_done("2 workers of generation 3");
    TcpStream::connect(new).expect("the new port");
    assert!(TcpStream::connect(old).is_err(), "the old port is closed");
    deployed.deploy("exec sleep 1000");
    run(&deployed.service, "reload --ports-may-change").assert_failed(&["listens on no TCP port"]);
    deployed.service.stop();
}

#[test]
fn a_replacement_that_cannot_bind_its_udp_port_gets_no_connection() {
    const BINDS: &str = "udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); SHARES\n";
    let program = |before: &str, after: &str| {
        format!(
            "import http.server, os, signal, socket, sys, time\naddress = ('127.0.0.1', int(sys.argv[1]))\n\
             {before}server = http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler)\n\
             {after}server.serve_forever()"
        )
    };
    let late = format!("time.sleep(.3); {BINDS}udp.bind(address)\n");
    let early = format!("{BINDS}udp.bind(address)\n");
    let on = format!("{BINDS}try: udp.bind(address)\nexcept OSError: pass\n");
    for (before, after, reason) in [
        ("", late.as_str(), "exited with status 1 before it was ready"),
        (&early, "", "exited with status 1 before it was ready"),
        ("", &on, "it could not bind udp 127.0.0.1:"),
    ] {
        let program = program(before, after);
        let alone = program.replace("SHARES", "pass");
        let addr = free_address();
        let mut service =
            Service::run_ready("-n 1 --ready-timeout 8s", &inline(&alone, &[&addr.port().to_string()]));
        let is_held = || std::net::UdpSocket::bind(addr).is_err();
        wait_until("the UDP port is held", DEADLINE, is_held);
        let load = Load::start(LoadOptions::new(addr, 4));
        answered_more(&load);
        run(&service, "reload").assert_failed(&[reason, "serves on"]);
        assert!(is_held(), "the old worker has it");
        run(&service, "reload --ports-may-change -- true").assert_failed(&["serves on"]);
        load.stop().assert_nothing_failed();
        service.stop();

        let shared = program.replace("SHARES", "udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)");
        let mut service = Service::run_ready("-n 2", &inline(&shared, &[&free_address().port().to_string()]));
        run(&service, "reload").assert_done("2 workers of generation 2");
        service.stop();
    }
}

#[test]
fn a_udp_port_that_was_closed_or_is_dropped_is_not_asked_of_a_replacement() {
    let program = "import http.server, os, socket, sys, threading, time\n\
        address = ('127.0.0.1', int(sys.argv[1]))\n\
        server = http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler)\n\
        def opens(after, closes):\n\
        \x20   time.sleep(after)\n\
        \x20   udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
        \x20   try: udp.bind(address)\n\
        \x20   except OSError: print('refused', flush=True); return\n\
        \x20   print('opened', flush=True)\n\
        \x20   if closes: udp.close()\n\
        \x20   else: held.append(udp)\n\
        held = []\n\
        if os.environ['REUSE_RUN_GENERATION'] == '1': opens(WHAT)\n\
        server.serve_forever()";
    for what in ["0, True", "0, False"] {
        let addr = free_address();
        let program = program.replace("WHAT", what);
        let mut service = Service::run_ready("-n 1", &inline(&program, &[&addr.port().to_string()]));
        wait_until("opened", DEADLINE, || service.out.count_of("opened") == 1);
        run(&service, "reload").assert_done("1 worker of generation 2");
        service.stop();
    }
}

#[test]
fn a_switch_that_the_kernel_refuses_fails_the_reload_and_at_the_start_reuse_run_exits() {
    let _turn = turn();
    own_network();
    let limit = |bytes: &str| fs::write("/proc/sys/net/core/optmem_max", bytes).expect("set the limit");
    let addr = SocketAddr::from(([127, 0, 0, 1], 3000));
    let mut deployed = Deployed::run("-n 3", addr, SERVES);
    limit("8");
    deployed
        .reload("")
        .assert_failed(&["the kernel refused the switch: can't steer 127.0.0.1:3000", "serve on"]);
    limit("131072");
    deployed.reload("").assert_done("3 workers of generation 3");
    deployed.service.stop();
    limit("8");
    let mut service = Service::run("-n 3", &[server(), "--listen".to_owned(), addr.to_string()]);
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    service.wait_for_line("can't steer 127.0.0.1:3000");
    limit("131072");
}

#[test]
fn a_first_worker_that_exits_with_0_makes_reuse_run_exit_with_1() {
    for command in [vec!["true"], vec!["sh", "-c", "echo address in use; exit 0"]] {
        let mut service = Service::run("", &command);
        assert_eq!(service.wait_end().code(), Some(1));
        service.wait_for_line("exited with status 0 before it was ready; giving up");
    }
}

#[test]
fn a_worker_that_sends_itself_a_request_before_it_says_ready_is_told_why_it_hangs() {
    let addr = free_address();
    let asks_itself = "import http.server, socket, sys, threading\n\
        address = ('127.0.0.1', int(sys.argv[1]))\n\
        server = http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler)\n\
        threading.Thread(target=server.serve_forever).start()\n\
        socket.create_connection(address)";
    let mut service =
        Service::run("--ready notify --ready-timeout 8s", &inline(asks_itself, &[&addr.port().to_string()]));
    assert_eq!(service.wait_end().code(), Some(1));
    service.wait_for_line("it waits for a connection to its own port");
}

#[test]
fn a_program_that_connects_first_to_see_whether_its_port_is_free_is_told_who_answers() {
    own_network(); // no other test's connections
    let (addr, folder) = (free_address(), Folder::new());
    // As CherryPy, Robyn and the `serve` of npm do when the port isn't free.
    let connects_first = "import http.server, os, socket, sys, time\n\
        (port, folder), address = sys.argv[1:], ('127.0.0.1', int(sys.argv[1]))\n\
        taken = os.path.exists(folder + '/checks') and socket.socket().connect_ex(address) == 0\n\
        if os.path.exists(folder + '/fails'): sys.exit(1)\n\
        if taken and os.path.exists(folder + '/exits'): sys.exit('port in use')\n\
        if taken and os.path.exists(folder + '/waits'): time.sleep(1000)\n\
        address = ('127.0.0.1', 0) if taken else address\n\
        http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()";
    let command = inline(connects_first, &[&addr.port().to_string(), &folder.path("")]);
    let service = Service::run_ready("-n 1 --ready-timeout 8s", &command);
    folder.raise("fails");
    let log = service.failing_reload();
    assert!(!log.contains("connects to"), "nobody has connected: {log}");
    folder.lower("fails");
    folder.raise("checks");
    let hint =
        format!("if it connects to {addr} first, to see whether the port is free, the workers there answer");
    for what in ["exits", "waits", "listens elsewhere"] {
        folder.raise(what);
        let log = service.failing_reload();
        assert!(log.contains(&hint), "{what}: {log}");
        folder.lower(what);
    }
}

#[test]
fn hints_name_what_several_workers_share_and_what_npm_keeps() {
    let mut service = Service::run("-n 2", &["sh", "-c", "exit 3", "--inspect"]);
    assert_eq!(service.wait_end().code(), Some(3));
    service.wait_for_line("use --inspect=0");
    let folder = Folder::new();
    let npm = folder.write_with("npm", "#!/bin/sh\n[ -e ${0%npm}fail ] && exit 1; exec sleep 1000\n", 0o755);
    for _ in 0..2 {
        let mut service = Service::run("--ready notify --ready-timeout 300ms", &[&npm]);
        assert_eq!(service.wait_end().code(), Some(1));
        service.wait_for_line("keep Node's IPC channel and READY_FD to themselves");
        folder.raise("fail");
    }
}

#[test]
fn a_hint_is_also_for_the_user_who_waits_for_the_reload() {
    let (_, folder, mut service) = Service::with_flags("--ready listen", &[]);
    folder.raise("broken-2-0");
    assert!(!run(&service, "reload").out.contains("node-config"));
    service.stop();
    let folder = Folder::new();
    folder.raise("broken-2-0");
    let env = folder.write("env", "NODE_CONFIG_STRICT_MODE=1\n");
    let mut service = Service::run_ready(&format!("--env-file {env}"), &folder.server(free_address(), &[]));
    let outcome = run(&service, "reload");
    outcome.assert_failed(&["exited with status 3 before it was ready"]);
    assert!(outcome.out.contains("node-config then wants a file for each NODE_APP_INSTANCE"), "{outcome:?}");
    service.stop();
}

/// Commands that bind and listen on a port by calls that no filter of reuse-run sees, as far as this machine has them.
fn past_the_filter(folder: &Folder, port: u16) -> Vec<Vec<String>> {
    let port = port.to_string();
    let mut commands = Vec::new();
    if kernel() >= (6, 11) {
        commands.push(python("io_uring.py", &[&port]));
    }
    if cfg!(target_arch = "x86_64") {
        let program = folder.path("listen32");
        let built = Command::new("cc").args(["-o", &program, &app("listen32.c")]).status().expect("run cc");
        assert!(built.success());
        commands.push(vec![program, port.clone()]);
    }
    // The second one begins when the first one listens: it fails, and then the first one is named.
    let first = format!("[ $REUSE_RUN_SLOT = 0 ] || (: < /dev/tcp/127.0.0.1/{port}) 2>/dev/null");
    let script = format!("until {first}; do sleep 0.01; done; exec \"$@\"");
    let in_turn = |command| [["bash", "-c", &script, "bash"].map(str::to_owned).to_vec(), command].concat();
    commands.into_iter().map(in_turn).collect()
}

/// Such a program can't be intercepted: one copy of it has the port, and the next one fails.
#[test]
fn a_worker_that_listens_past_the_filter_is_named_when_another_fails_and_when_it_is_late() {
    let (addr, folder) = (free_address(), Folder::new());
    for command in past_the_filter(&folder, addr.port()) {
        let mut service = Service::run("-n 2", &command);
        assert_ne!(service.wait_end().code(), Some(0));
        let hint =
            format!("it listens on {addr} by io_uring or a 32-bit system call, which can't be intercepted");
        service.wait_for_line(&hint);
        let mut service = Service::run("-n 1 --ready-timeout 8s", &command);
        assert_eq!(service.wait_end().code(), Some(1));
        service.wait_for_line(&hint);
    }
}
