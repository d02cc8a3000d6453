//! Addresses that `-l` can't have.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;

use socket2::{Domain, Socket, Type};

use crate::common::{
    Folder, Service, User, arguments, free_address, free_port, naive, needs_other_users, own_network,
    reuse_run,
};

/// Asserts that `-l` fails: status 1, one line with these parts, and no worker was started.
#[track_caller]
fn assert_refused(command: impl FnOnce(&[String]) -> Command, listen: &str, parts: &[&str]) {
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
    assert!(!fs::exists(folder.path("started")).expect("stat"), "a worker was started: {log}");
}

fn plain(arguments: &[String]) -> Command {
    let mut command = reuse_run();
    command.args(arguments);
    command
}

#[test]
fn when_an_address_is_in_use_no_worker_is_started() {
    let addr = free_address();
    let _listener = TcpListener::bind(addr).expect("listen");
    let port = addr.port();
    for listen in [addr.to_string(), port.to_string(), format!("0.0.0.0:{port}")] {
        assert_refused(plain, &listen, &[&port.to_string(), "in use"]);
    }
}

#[test]
fn an_address_is_in_use_even_if_its_listener_has_so_reuseport() {
    let addr = free_address();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
    socket.set_reuse_port(true).expect("SO_REUSEPORT");
    socket.bind(&addr.into()).expect("bind");
    socket.listen(1).expect("listen");
    assert_refused(plain, &addr.to_string(), &[&addr.to_string(), "in use"]);
}

#[test]
fn when_the_last_of_several_addresses_is_in_use_no_worker_is_started() {
    let (free, taken) = (free_address(), free_address());
    let _listener = TcpListener::bind(taken).expect("listen");
    assert_refused(plain, &format!("{free} -l {taken}"), &[&taken.to_string(), "in use"]);
}

#[test]
fn when_a_port_is_not_permitted_no_worker_is_started() {
    needs_other_users!();
    own_network(); // a new one has the kernel's default of net.ipv4.ip_unprivileged_port_start
    let user = User::new();
    let parts = ["127.0.0.1:80", "Permission denied", "takes root or CAP_NET_BIND_SERVICE"];
    assert_refused(|arguments| user.command(&[], arguments), "127.0.0.1:80", &parts);
}

#[test]
fn when_an_address_is_not_local_no_worker_is_started() {
    let addr = format!("192.0.2.1:{}", free_port());
    assert_refused(plain, &addr, &[&addr, "Cannot assign requested address"]);
}

#[test]
fn the_log_explains_why_a_worker_cannot_bind_another_address_of_the_given_port() {
    let port = free_port();
    let addr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let mut service = Service::run(&format!("-n 1 -l {port}"), &naive(addr));
    assert_eq!(service.wait_end().code(), Some(98), "the server exits with the errno, EADDRINUSE");
    let line = service.wait_for_line("use the same address for -l and in the program").text;
    assert!(line.contains(&addr.to_string()) && line.contains(&format!("[::]:{port}")), "{line}");
}
