//! Which sockets are shared, which are left alone, and who may have a port.

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use common::load::{self, Kind, Load, LoadOptions};
use common::{
    DEADLINE, Deployment, Service, answered_more, app, free_address, free_port, server, wait_until,
};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

fn naive(addr: SocketAddr) -> Vec<String> {
    vec![server(), "--listen".to_owned(), addr.to_string()]
}

fn get(addr: SocketAddr) -> load::Origin {
    match load::get(addr, "/", Duration::from_secs(15)) {
        Ok(answer) => answer.origin,
        Err(failure) => panic!("GET / from {addr}: {failure:?}"),
    }
}

#[test]
fn an_app_with_several_ports_loses_no_request_on_any_of_them() {
    let addrs = [free_address(), free_address(), free_address()];
    let mut command = vec![server()];
    for addr in addrs {
        command.extend(["--listen".to_owned(), addr.to_string()]);
    }
    let mut service = Service::run_ready("-n 2", &command);
    // A worker of the first generation counts as ready at its first port; it prints after its last.
    wait_until("both workers listen on every port", DEADLINE, || service.out.count_of("listening ") == 2);
    let loads: Vec<Load> =
        addrs.iter().map(|addr| Load::start(LoadOptions::new(*addr, 4).record())).collect();
    for _ in 0..5 {
        service.reload();
        for load in &loads {
            answered_more(load);
        }
    }
    for load in loads {
        let report = load.stop();
        println!("{report}");
        report.assert_nothing_failed();
        assert_eq!(report.counts.generations.keys().next_back(), Some(&6), "{:?}", report.counts.generations);
        report.assert_nothing_stale();
    }
    service.stop();
}

#[test]
fn a_dual_stack_listener_is_shared_for_ipv4_and_ipv6() {
    let port = free_port();
    let mut service = Service::run_ready("-n 2", &naive((Ipv6Addr::UNSPECIFIED, port).into()));
    let loads = [
        Load::start(LoadOptions::new(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), 4)),
        Load::start(LoadOptions::new(SocketAddr::from((Ipv6Addr::LOCALHOST, port)), 4)),
    ];
    for _ in 0..5 {
        service.reload();
    }
    for load in loads {
        answered_more(&load);
        let report = load.stop();
        println!("{report}");
        report.assert_nothing_failed();
        assert_eq!(report.counts.generations.keys().next_back(), Some(&6), "{:?}", report.counts.generations);
    }
    service.stop();
}

#[test]
fn ipv4_and_ipv6_wildcards_on_one_port_are_two_addresses() {
    let port = free_port();
    let command = ["python3", &app("python/binds.py"), "wildcards", &port.to_string()].map(str::to_owned);
    let mut service = Service::run_ready("-n 2", &command);
    // The first generation is ready at its first listen, which may be the only one yet.
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
fn options_that_are_set_before_bind_are_there_after_it_and_gone_with_the_program_that_set_them() {
    let port = free_port();
    let command = ["python3", &app("python/binds.py"), "options", &port.to_string()].map(str::to_owned);
    let mut service = Service::run_ready("-n 1", &command);
    service.reload();
    service.reload(); // to the socket that the first generation had
    wait_until("three have told", DEADLINE, || service.out.count_of("options: ") == 3);
    let lines = service.out.all().into_iter().map(|line| line.text);
    let told: Vec<(String, String)> = lines
        .filter_map(|line| {
            let (before, after) = line.strip_prefix("options: ")?.split_once(" before, ")?;
            Some((before.to_owned(), after.strip_suffix(" after")?.to_owned()))
        })
        .collect();
    assert!(told.iter().all(|(before, after)| before == after), "{told:?}");
    assert_ne!(told[0], told[2], "only the first sets any");
    service.stop();
}

#[test]
fn a_replacement_that_listens_on_some_of_the_addresses_is_named_and_given_up() {
    let (kept, missing) = (free_address(), free_address());
    let deployment = Deployment::new(&format!("--listen {kept} --listen {missing}"));
    let mut service = Service::run_ready("-n 2 --ready-timeout 3s", &deployment.command());
    // A worker of the first generation counts as ready at its first port; it prints after its last.
    wait_until("both workers listen on every port", DEADLINE, || service.out.count_of("listening ") == 2);
    deployment.replace(&format!("--listen {kept}"));

    let begun = service.log.count();
    let started = std::time::Instant::now();
    service.signal(Signal::SIGUSR2);
    let missing_name = missing.to_string();
    let waits = service
        .wait_for_line_where(begun, "waits", |line| line.contains("wait") && line.contains(&missing_name));
    let after = waits.at - started;
    assert!(after >= Duration::from_millis(900), "it says what it waits for after a second: {after:?}");
    assert!(after < Duration::from_millis(2900), "it says so before the time-out: {after:?}");
    service.wait_for_line_after(begun, "reload abandoned");
    let log: Vec<String> = service.log.all().into_iter().skip(begun).map(|line| line.text).collect();
    let names = |line: &&String| line.contains(&missing.to_string()) && line.contains("--ready notify");
    assert!(
        log.iter().any(|line| names(&line)),
        "the time-out names the address and the way out:\n{}",
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
fn the_same_replacement_is_welcome_with_ready_notify_and_the_lost_port_is_closed() {
    let (kept, dropped) = (free_address(), free_address());
    let deployment = Deployment::new(&format!("--listen {kept} --listen {dropped} --ready-after 0"));
    let mut service = Service::run_ready("-n 2 --ready notify", &deployment.command());
    assert_eq!(get(dropped).generation, Some(1));
    deployment.replace(&format!("--listen {kept} --ready-after 0"));
    service.reload();
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
fn udp_unix_and_port_0_binds_go_through_untouched() {
    let port = free_port();
    let command = ["python3", &app("python/binds.py"), "others", &port.to_string()].map(str::to_owned);
    let mut service = Service::run_ready("-n 2", &command);
    wait_until("both workers have bound everything", DEADLINE, || service.out.count_of("port 0: ") == 2);
    // A UDP port has one owner: were it shared like a TCP port, both workers would have it.
    assert_eq!(service.out.count_of("udp: bound"), 1, "{}", service.out.text());
    assert_eq!(service.out.count_of("udp: in use"), 1, "{}", service.out.text());
    assert_eq!(service.out.count_of("unix: bound"), 2, "{}", service.out.text());
    // Port 0 gives each worker a port of its own, and the kernel's answer is the true one.
    let mut ports = Vec::new();
    for line in service.out.all() {
        if let Some(port) = line.text.strip_prefix("port 0: ") {
            ports.push(port.parse::<u16>().expect("a port"));
        }
    }
    assert_ne!(ports[0], ports[1]);
    for port in ports {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("a port of its own listens");
    }
    assert_eq!(get((Ipv4Addr::LOCALHOST, port).into()).generation, Some(1));
    service.stop();
}

/// A listener of the test itself on a port that a worker will want.
fn foreign_listener(addr: SocketAddr, reuse_port: bool) -> TcpListener {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.set_reuse_port(reuse_port).expect("SO_REUSEPORT");
    socket.bind(&addr.into()).expect("bind");
    socket.listen(16).expect("listen");
    socket.into()
}

/// The worker gets EADDRINUSE, here as its exit status, and reuse-run ends with it and says whose port it is.
#[track_caller]
fn assert_in_use(wanted: SocketAddr) {
    let mut service = Service::run("-n 2", &naive(wanted));
    let status = service.wait_end();
    let log = service.log.text();
    assert_eq!(status.code(), Some(libc::EADDRINUSE), "{log}");
    let said = |line: &str| line.starts_with("reuse-run[") && line.contains(&wanted.port().to_string());
    assert!(log.lines().any(said), "the log names the port:\n{log}");
    let owner = std::process::id().to_string();
    assert!(log.contains(&owner), "the log names who has it ({owner}):\n{log}");
    assert_eq!(service.descendants(), [0u32; 0]);
}

#[test]
fn a_port_of_another_process_is_in_use() {
    let addr = free_address();
    let _listener = foreign_listener(addr, false);
    assert_in_use(addr);
}

#[test]
fn a_port_of_another_process_is_in_use_even_if_it_would_share_it() {
    let addr = free_address();
    let _listener = foreign_listener(addr, true);
    assert_in_use(addr);
}

#[test]
fn a_port_on_another_overlapping_address_is_in_use_too() {
    let addr = free_address();
    let _listener = foreign_listener((Ipv4Addr::UNSPECIFIED, addr.port()).into(), true);
    assert_in_use(addr);
}

#[test]
fn a_second_reuse_run_on_the_same_port_is_refused_it() {
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
    // The server closes first, so the port is left in TIME_WAIT.
    for _ in 0..10 {
        get(addr);
    }
    service.stop();
    let mut service = Service::run_ready("-n 1", &naive(addr));
    get(addr);
    service.stop();
}

#[test]
fn a_socket_listens_by_its_own_account_only_after_listen_though_it_is_borrowed() {
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
    wait_until("the answers of four workers", DEADLINE, || service.out.count_of("listens: 0 1") == 4);
    service.stop();
}
