//! Which sockets are shared, which are left alone, and which ports a worker may have.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use common::load::{self, Kind, LoadOptions};
use common::{
    DEADLINE, Deployment, Service, free_address, free_port, get, inline, naive, python, reload_under_loads,
    run, server, wait_until,
};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

/// A first worker is ready when it listens on one port. It prints a line when it listens on all.
fn wait_for_every_port(service: &Service) {
    wait_until("both workers listen on every port", DEADLINE, || service.out.count_of("listening ") == 2);
}

#[test]
fn an_app_with_several_ports_loses_no_request_on_any_of_them() {
    let addrs = [free_address(), free_address(), free_address()];
    let mut command = vec![server()];
    for addr in addrs {
        command.extend(["--listen".to_owned(), addr.to_string()]);
    }
    let mut service = Service::run_ready("-n 2", &command);
    wait_for_every_port(&service);
    let loads = addrs.map(|addr| LoadOptions::new(addr, 4).record());
    for report in reload_under_loads(&service, loads, 5) {
        report.assert_switched_atomically(6);
    }
    service.stop();
}

#[test]
fn a_dual_stack_listener_is_shared_for_ipv4_and_ipv6() {
    let port = free_port();
    let mut service = Service::run_ready("-n 2", &naive((Ipv6Addr::UNSPECIFIED, port).into()));
    let ips: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let loads = ips.map(|ip| LoadOptions::new(SocketAddr::new(ip, port), 4));
    for report in reload_under_loads(&service, loads, 5) {
        assert_eq!(report.counts.generations.keys().next_back(), Some(&6), "{report}");
    }
    service.stop();
}

#[test]
fn ipv4_and_ipv6_wildcards_on_one_port_are_two_addresses() {
    let port = free_port();
    let command = python("binds.py", &["wildcards", &port.to_string()]);
    let mut service = Service::run_ready("-n 2", &command);
    // A first worker is ready when it listens on one address; the other may follow.
    let listens = |ip: IpAddr| TcpStream::connect((ip, port)).is_ok();
    wait_until("both addresses", DEADLINE, || {
        listens(Ipv4Addr::LOCALHOST.into()) && listens(Ipv6Addr::LOCALHOST.into())
    });
    for generation in 1..=3 {
        for _ in 0..4 {
            assert_eq!(get((Ipv4Addr::LOCALHOST, port).into()).generation, Some(generation));
            assert_eq!(get((Ipv6Addr::LOCALHOST, port).into()).generation, Some(generation));
        }
        service.reload();
    }
    service.stop();
}

#[test]
fn socket_options_from_before_bind_are_kept_after_it_and_not_given_to_the_next_generation() {
    let port = free_port();
    let command = python("binds.py", &["options", &port.to_string()]);
    let mut service = Service::run_ready("-n 1", &command);
    service.reload();
    service.reload(); // which uses the socket of the first generation again
    wait_until("three workers have printed", DEADLINE, || service.out.count_of("options: ") == 3);
    let lines = service.out.all().into_iter().map(|line| line.text);
    let printed: Vec<(String, String)> = lines
        .filter_map(|line| {
            let (before, after) = line.strip_prefix("options: ")?.split_once(" before, ")?;
            Some((before.to_owned(), after.strip_suffix(" after")?.to_owned()))
        })
        .collect();
    assert!(printed.iter().all(|(before, after)| before == after), "{printed:?}");
    assert_ne!(printed[0], printed[2], "only the first generation sets options");
    service.stop();
}

/// Programs in Go listen by MPTCP unless they are told not to.
#[test]
fn a_socket_of_mptcp_becomes_one_of_tcp_and_loses_no_request() {
    let program = "import http.server, os, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'pid=%d generation=%s' % (os.getpid(), os.environb[b'REUSE_RUN_GENERATION'])
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET
    def say(self, when): os.write(1, b'%s %d\\n' % (when, self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)))
server = Server((sys.argv[1], int(sys.argv[2])), Handler, bind_and_activate=False)
server.socket = socket.socket(Server.address_family, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
server.say(b'before'); server.server_bind(); server.server_activate(); server.say(b'after'); server.serve_forever()";
    for host in ["127.0.0.1", "::"] {
        let addr = free_address();
        let mut service = Service::run_ready("-n 2", &inline(program, &[host, &addr.port().to_string()]));
        reload_under_loads(&service, [LoadOptions::new(addr, 4).rate(200.0)], 3);
        service.stop();
        assert_eq!([service.out.count_of("before 262"), service.out.count_of("after 6")], [8, 8], "{host}");
    }
}

#[test]
fn when_a_replacement_lacks_an_address_the_log_names_it_and_the_reload_is_abandoned() {
    let (kept, missing) = (free_address(), free_address());
    let deployment = Deployment::new(&format!("--listen {kept} --listen {missing}"));
    let mut service = Service::run_ready("-n 2 --ready-timeout 3s", &deployment.command());
    wait_for_every_port(&service);
    deployment.replace(&format!("--listen {kept}"));

    let begun = service.log.count();
    let started = std::time::Instant::now();
    service.signal(Signal::SIGUSR2);
    let missing_name = missing.to_string();
    let waits = service
        .wait_for_line_where(begun, "waits", |line| line.contains("wait") && line.contains(&missing_name));
    let after = waits.at - started;
    assert!(after >= Duration::from_millis(900), "logged before a second has passed: {after:?}");
    assert!(after < Duration::from_millis(2900), "logged after the time-out: {after:?}");
    service.wait_for_line_after(begun, "reload abandoned");
    let log: Vec<String> = service.log.all().into_iter().skip(begun).map(|line| line.text).collect();
    let names = |line: &&String| line.contains(&missing.to_string()) && line.contains("--ports-may-change");
    assert!(
        log.iter().any(|line| names(&line)),
        "no line names the address and the remedy:\n{}",
        log.join("\n")
    );

    for addr in [kept, missing] {
        for _ in 0..4 {
            assert_eq!(get(addr).generation, Some(1));
        }
    }
    service.stop();
}

#[test]
fn with_ports_may_change_a_replacement_may_lack_an_address_and_that_is_closed() {
    let (kept, dropped) = (free_address(), free_address());
    let deployment = Deployment::new(&format!("--listen {kept} --listen {dropped} --ready-after 0"));
    let mut service = Service::run_ready("-n 2 --ready notify", &deployment.command());
    assert_eq!(get(dropped).generation, Some(1));
    deployment.replace(&format!("--listen {kept} --ready-after 0"));
    run(&service, "reload --ports-may-change").assert_done("2 workers of generation 2");
    assert_eq!(get(kept).generation, Some(2));
    wait_until(
        "the dropped port is refused",
        DEADLINE,
        || matches!(load::get(dropped, "/", Duration::from_secs(2)), Err(failure) if failure.kind == Kind::Refused),
    );
    service.stop();
}

#[test]
fn a_replacement_may_listen_on_more_addresses() {
    let (first, second) = (free_address(), free_address());
    let deployment = Deployment::new(&format!("--listen {first}"));
    let mut service = Service::run_ready("-n 2", &deployment.command());
    deployment.replace(&format!("--listen {first} --listen {second}"));
    service.reload();
    assert_eq!(get(first).generation, Some(2));
    wait_until(
        "the new port serves",
        DEADLINE,
        || matches!(load::get(second, "/", Duration::from_secs(2)), Ok(answer) if answer.origin.generation == Some(2)),
    );
    service.stop();
}

#[test]
fn udp_unix_and_port_0_binds_are_left_to_the_kernel() {
    let port = free_port();
    let command = python("binds.py", &["others", &port.to_string()]);
    let mut service = Service::run_ready("-n 2", &command);
    wait_until("both workers have bound everything", DEADLINE, || service.out.count_of("port 0: ") == 2);
    // Only one worker can have a UDP port. If it were shared like a TCP port, both would have it.
    assert_eq!(service.out.count_of("udp: bound"), 1, "{}", service.out.text());
    assert_eq!(service.out.count_of("udp: in use"), 1, "{}", service.out.text());
    assert_eq!(service.out.count_of("unix: bound"), 2, "{}", service.out.text());
    // With port 0 the kernel gives each worker another port.
    let mut ports = Vec::new();
    for line in service.out.all() {
        if let Some(port) = line.text.strip_prefix("port 0: ") {
            ports.push(port.parse::<u16>().expect("a port"));
        }
    }
    assert_ne!(ports[0], ports[1]);
    for port in ports {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connect");
    }
    assert_eq!(get((Ipv4Addr::LOCALHOST, port).into()).generation, Some(1));
    service.stop();
}

/// A listener of this test, on the port that a worker will bind.
fn foreign_listener(addr: SocketAddr, reuse_port: bool) -> TcpListener {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.set_reuse_port(reuse_port).expect("SO_REUSEPORT");
    socket.bind(&addr.into()).expect("bind");
    socket.listen(16).expect("listen");
    socket.into()
}

/// Asserts that the worker gets EADDRINUSE (its exit status), that reuse-run exits with the same, and that the log
/// names the port and this process.
#[track_caller]
fn assert_in_use(wanted: SocketAddr) {
    let mut service = Service::run("-n 2", &naive(wanted));
    let status = service.wait_end();
    let log = service.log.text();
    assert_eq!(status.code(), Some(libc::EADDRINUSE), "{log}");
    let names = |line: &str| line.starts_with("reuse-run[") && line.contains(&wanted.port().to_string());
    assert!(log.lines().any(names), "no line names the port:\n{log}");
    let owner = std::process::id().to_string();
    assert!(log.contains(&owner), "no line names its process ({owner}):\n{log}");
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn a_port_of_another_process_is_in_use_even_if_that_has_so_reuseport_or_another_address() {
    let rows = [(Ipv4Addr::LOCALHOST, false), (Ipv4Addr::LOCALHOST, true), (Ipv4Addr::UNSPECIFIED, true)];
    for (ip, reuse_port) in rows {
        println!("a listener of {ip}, SO_REUSEPORT: {reuse_port}");
        let addr = free_address();
        let _listener = foreign_listener((ip, addr.port()).into(), reuse_port);
        assert_in_use(addr);
    }
}

#[test]
fn a_second_reuse_run_cannot_have_the_same_port() {
    let addr = free_address();
    let mut first = Service::run_ready("-n 2", &naive(addr));
    let mut second = Service::run("-n 2", &naive(addr));
    let status = second.wait_end();
    assert_eq!(status.code(), Some(libc::EADDRINUSE), "{}", second.log.text());
    for _ in 0..4 {
        let pid = get(addr).pid.expect("a pid");
        assert!(first.workers().contains(&pid));
    }
    first.stop();
}

#[test]
fn a_port_in_time_wait_is_not_in_use() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1", &naive(addr));
    // The server closes the connections first, so its port is in TIME_WAIT.
    for _ in 0..10 {
        get(addr);
    }
    service.stop();
    let mut service = Service::run_ready("-n 1", &naive(addr));
    get(addr);
    service.stop();
}

#[test]
fn a_workers_socket_says_that_it_listens_only_after_listen() {
    let addr = free_address();
    let server = "import os, socket, sys, time\n\
        listener = socket.socket()\n\
        listener.bind(('127.0.0.1', int(sys.argv[1])))\n\
        listens = lambda: listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)\n\
        before = listens()\n\
        listener.listen()\n\
        print('listens:', before, listens(), flush=True)\n\
        time.sleep(1000)";
    let mut service = Service::run_ready("-n 1", &["python3", "-c", server, &addr.port().to_string()]);
    for _ in 0..3 {
        service.reload();
    }
    wait_until("a line from each of four workers", DEADLINE, || service.out.count_of("listens: 0 1") == 4);
    service.stop();
}
