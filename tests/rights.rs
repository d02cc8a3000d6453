//! What a worker may not do, reuse-run doesn't do for it, and what keeps others out stays.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use common::load::LoadOptions;
use common::{Service, User, arguments, behind, get, get_path, own_network, python, reload_under_load};

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
