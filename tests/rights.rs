//! What a worker may not do, reuse-run doesn't do for it, and what keeps others out stays.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::Duration;

use common::load::LoadOptions;
use common::{
    Folder, Service, User, arguments, behind, get, get_path, needs_other_users, own_network, python,
    reload_under_load, reuse_run_with,
};

/// A server on port 20000 of a new network namespace whose socket has these options.
fn limited(options: &str) -> (SocketAddr, Vec<String>) {
    own_network();
    let words: Vec<&str> = options.split_whitespace().chain(["20000"]).collect();
    (SocketAddr::from((Ipv4Addr::LOCALHOST, 20_000)), python("limits.py", &words))
}

/// How reuse-run starts where it may duplicate the workers' descriptors, and where it may not.
fn prefixes() -> [Vec<String>; 2] {
    [vec!["env".to_owned()], python("without.py", &["pidfd_getfd", "EPERM"])]
}

fn start(prefix: &[String], options: &str, command: &[String]) -> Service {
    let prefix: Vec<&str> = prefix.iter().map(String::as_str).collect();
    Service::spawn(behind(&prefix, options, command))
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status().expect("run ip");
    assert!(status.success(), "ip {arguments}");
}

#[track_caller]
fn assert_refused(addr: SocketAddr) {
    let error = TcpStream::connect_timeout(&addr, Duration::from_secs(5)).expect_err("a refused connection");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
}

#[test]
fn a_server_for_one_interface_answers_on_no_other() {
    own_network();
    ip("link add v0 index 7 type veth peer name v1");
    ip("link set v0 up");
    for prefix in prefixes() {
        for option in ["device v0", "index 7"] {
            let (addr, command) = limited(option);
            let mut service = start(&prefix, "-n 2", &command);
            service.wait_until_ready();
            assert_refused(addr);
            service.reload();
            assert_refused(addr);
            service.stop();
        }
    }
}

#[test]
fn workers_share_a_port_of_one_interface() {
    for prefix in prefixes() {
        let (addr, command) = limited("device lo");
        let mut service = start(&prefix, "-n 2", &command);
        service.wait_until_ready();
        reload_under_load(&service, LoadOptions::new(addr, 4), 3);
        service.stop();
    }
}

/// The places of those that nobody borrows are found out, so they are lent again.
#[test]
fn listeners_of_one_interface_that_are_shut_down_at_each_reload_get_no_more_with_each() {
    own_network();
    ip("link add v2 type veth peer name v3");
    ip("address add 10.0.0.1/24 dev v2");
    ip("link set v2 up");
    let (_, command) = limited("device v2 shutdown");
    let mut service = Service::run_ready("-n 4", &command);
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", service.pid())).expect("its fds").count();
    let before = descriptors();
    for _ in 0..12 {
        service.reload();
    }
    let after = descriptors();
    assert!(after <= before + 8, "{before}, then {after}");
    service.stop();
}

#[test]
fn a_device_that_is_set_after_bind_is_refused() {
    let (addr, command) = limited("then device lo");
    let mut service = Service::run_ready("-n 1", &command);
    service.wait_for_line("worker 0 can't set SO_BINDTODEVICE after bind");
    service.wait_for_output("device EPERM");
    get(addr);
    service.stop();
}

#[test]
fn a_socket_with_a_filter_or_a_key_is_left_to_the_kernel() {
    for prefix in prefixes() {
        for option in ["filter", "key"] {
            let (addr, command) = limited(option);
            let service = start(&prefix, "-n 1", &command);
            service.wait_for_line("worker 0 limits who may connect");
            service.wait_for_output("min-ttl");
            let error = TcpStream::connect_timeout(&addr, Duration::from_millis(500)).expect_err("no answer");
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{option}: {error}");
        }
    }
}

#[test]
fn what_a_worker_sets_after_bind_to_keep_clients_out_is_gone_with_it() {
    for option in ["then filter", "then key"] {
        let (addr, mut command) = limited(option);
        let script = r#"[ $REUSE_RUN_GENERATION = 1 ] && exec "$@"; exec python3 "$2" 20000"#;
        command.splice(0..0, ["sh", "-c", script, "sh"].map(str::to_owned));
        let mut service = Service::run_ready("-n 1", &command);
        let error = TcpStream::connect_timeout(&addr, Duration::from_millis(500)).expect_err("no answer");
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{option}: {error}");
        for generation in 2..=5 {
            service.reload();
            assert_eq!(get(addr).generation, Some(generation), "{option}");
        }
        service.stop();
    }
}

#[test]
fn the_least_time_to_live_of_a_worker_stays() {
    for prefix in prefixes() {
        for option in ["min-ttl 9", "then min-ttl 9", "after min-ttl 9"] {
            let (addr, mut command) = limited(option);
            let script = r#"[ $REUSE_RUN_GENERATION = 4 ] && exec python3 "$2" 20000; exec "$@""#;
            command.splice(0..0, ["sh", "-c", script, "sh"].map(str::to_owned));
            let mut service = start(&prefix, "-n 1", &command);
            service.wait_until_ready();
            for generation in 1..=4 {
                let expected = if generation == 4 { "min-ttl=0" } else { "min-ttl=9" };
                let body = get_path(addr, "/").body;
                assert!(body.contains(expected), "{option} in generation {generation}: {body}");
                if generation < 4 {
                    service.reload();
                }
            }
            service.stop();
        }
    }
}

#[test]
fn the_largest_time_to_live_that_is_asked_for_while_a_socket_is_held_stays() {
    let (addr, command) = limited("after min-ttl 255");
    let mut service = Service::run_ready("-n 1", &command);
    service.wait_for_output("min-ttl 255");
    let error = TcpStream::connect_timeout(&addr, Duration::from_millis(500)).expect_err("no answer");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    service.stop();
}

// Users and namespaces.

#[test]
fn in_a_user_namespace_of_its_own_a_worker_gets_no_privileged_port_and_removes_no_file() {
    needs_other_users!();
    own_network();
    let folder = Folder::new();
    let [listener, new] = ["listener", "new"].map(|name| folder.path(name));
    let _listener = UnixListener::bind(&listener).expect("bind a path");
    chown(&folder.0, Some(54321), Some(54321)).expect("chown");
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o755)).expect("chmod");
    let words = ["namespace", "unlink", &listener, "path", &new, "then", "81"];
    let mut service = Service::run("-n 1", &python("limits.py", &words));
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    let lines: Vec<String> = service.out.all().into_iter().map(|line| line.text).collect();
    assert_eq!(lines, ["unlink EACCES", "path EACCES", "then EACCES"], "{}", service.log.text());
    assert!(fs::exists(&listener).expect("a folder"));
}

/// The users of the sockets that listen on a port (proc_net(5)).
fn owners(service: &Service, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let table = fs::read_to_string(format!("/proc/{}/net/tcp", service.pid())).expect("a table");
    let rows = table.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    let of_port = rows.filter(|row| row[1].ends_with(&format!(":{port:04X}")) && row[3] == LISTEN);
    of_port.map(|row| row[7].to_owned()).collect()
}

#[test]
fn the_sockets_of_a_worker_that_became_another_user_belong_to_that_user() {
    needs_other_users!();
    let (addr, command) = limited("user 54321");
    let mut service = Service::spawn_ready(reuse_run_with("-n 2", &command));
    assert_eq!(owners(&service, addr.port()), ["54321", "54321"]);
    reload_under_load(&service, LoadOptions::new(addr, 4), 3);
    let owners = owners(&service, addr.port());
    assert!(owners.len() >= 4 && owners.iter().all(|owner| owner == "54321"), "{owners:?}");
    let status = fs::read_to_string(format!("/proc/{}/status", service.pid())).expect("its status");
    assert!(status.contains("Uid:\t0\t0\t0\t0\n"), "{status}");
    service.stop();
}

#[test]
fn a_worker_without_root_binds_a_privileged_port_if_it_has_the_capability() {
    needs_other_users!();
    for (caps, expected) in [("+net_bind_service", true), ("-all", false)] {
        own_network();
        let ambient = if expected { "--ambient-caps=+net_bind_service" } else { "--ambient-caps=-all" };
        let user = User::new();
        let inh = format!("--inh-caps={caps}");
        let server = user.server();
        let command = [
            "setpriv",
            "--reuid=54321",
            "--clear-groups",
            &inh,
            ambient,
            &server,
            "--listen",
            "127.0.0.1:81",
        ];
        let mut service = Service::run("-n 2", &command);
        if expected {
            service.wait_until_ready();
            assert_eq!(owners(&service, 81), ["54321", "54321"]);
            service.stop();
        } else {
            assert_eq!(service.wait_end().code(), Some(libc::EACCES));
        }
    }
}

#[test]
fn a_mark_is_carried_over() {
    let (addr, command) = limited("mark 5");
    let mut service = Service::run_ready("-n 2", &command);
    service.wait_for_output(" mark 5");
    get(addr);
    service.stop();
}

#[test]
fn a_file_capability_that_the_filter_takes_away_is_named_and_an_ambient_one_is_enough() {
    needs_other_users!();
    own_network();
    let user = User::new();
    // VFS_CAP_REVISION_2 with the effective bit, CAP_NET_BIND_SERVICE permitted: capabilities(7), linux/capability.h.
    let set = "import os, struct, sys\n\
        os.setxattr(sys.argv[1], 'security.capability', struct.pack('<5I', 0x02000001, 1 << 10, 0, 0, 0))";
    let status = Command::new("python3").args(["-c", set, &user.server()]).status().expect("run python3");
    assert!(status.success(), "the capability can't be set");
    let options = arguments("-n 1", &[&user.server(), "--listen", "127.0.0.1:80"].map(str::to_owned));
    let mut service = Service::spawn(user.command(&[], &options));
    assert_ne!(service.wait_end().code(), Some(0));
    service.wait_for_line("worker 0 may not bind its port: the capability of its program file doesn't count");

    let ambient = ["--inh-caps=+net_bind_service", "--ambient-caps=+net_bind_service"];
    let mut service = Service::spawn_ready(user.command(&ambient, &options));
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 80));
    reload_under_load(&service, LoadOptions::new(addr, 4), 2);
    service.stop();
}
