//! Listeners that `-l` gives to workers.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::load::{self, Kind, LoadOptions};
use crate::common::{
    DEADLINE, Folder, Line, Service, Waiting, free_address, free_port, get, inline, naive, naive_with,
    node_app, own_network, packaged, reload_under_load, reload_under_loads, send, turn, wait_until,
};
use crate::{lines_with, listeners, node, python, word};

#[test]
fn a_python_worker_is_given_its_listeners_as_systemd_would_give_them() {
    let addrs = [free_address(), free_address()];
    let ports = addrs.map(|addr| addr.port().to_string());
    let options = format!("-n 2 -l {} -l {}", addrs[0], addrs[1]);
    let mut service = Service::run_ready(&options, &python("listen"));
    let lines = lines_with(&service, "given ", 2);
    let mut inodes = Vec::new();
    for line in &lines {
        assert_eq!(word(line, "listen_pid"), word(line, "pid"), "{line}");
        assert!(service.workers().contains(&word(line, "pid").parse().expect("a pid")), "{line}");
        assert_eq!(word(line, "fds"), "2");
        assert_eq!(word(line, "names"), ports.join(":"));
        assert_eq!(word(line, "ready_fd"), "5", "the number after those of the listeners");
        for (index, listener) in listeners(line).iter().enumerate() {
            assert_eq!(listener[..3], [&*(3 + index).to_string(), "127.0.0.1", &*ports[index]], "{line}");
            assert_eq!(listener[4], "True", "it is blocking, as a new socket is: {line}");
            inodes.push(listener[3].to_owned());
        }
    }
    inodes.sort();
    inodes.dedup();
    assert_eq!(inodes.len(), 4, "each worker has its own sockets: {lines:?}");
    for addr in addrs {
        assert_eq!(get(addr).generation, Some(1));
    }
    service.stop();
}

#[test]
fn a_node_worker_that_listens_on_fds_3_and_4_serves_both_given_listeners() {
    let addrs = [free_address(), free_address()];
    let options = format!("-n 2 -l {} -l {}", addrs[0], addrs[1]);
    let mut service = Service::run_ready(&options, &node());
    for line in lines_with(&service, "given ", 2) {
        assert_eq!(word(&line, "listen_pid"), word(&line, "pid"), "{line}");
        assert_eq!(word(&line, "fds"), "2");
        assert_eq!(word(&line, "names"), format!("{}:{}", addrs[0].port(), addrs[1].port()));
        assert_eq!(word(&line, "ready_fd"), "5");
    }
    for addr in addrs {
        assert_eq!(get(addr).generation, Some(1));
    }
    service.stop();
}

#[test]
fn an_address_may_be_a_port_alone_or_with_an_ip_address() {
    own_network();
    let ports: Vec<u16> = (0..4).map(|_| free_port()).collect();
    let options = format!(
        "-n 1 -l {} -l :{} --listen 127.0.0.1:{} --listen=[::]:{}",
        ports[0], ports[1], ports[2], ports[3]
    );
    let mut service = Service::run_ready(&options, &python("listen"));
    let line = &lines_with(&service, "given ", 1)[0];
    assert_eq!(word(line, "ready_fd"), "7", "one digit, as dash needs it");
    for port in &ports {
        assert_eq!(get((Ipv4Addr::LOCALHOST, *port).into()).generation, Some(1));
    }
    for port in [ports[0], ports[1], ports[3]] {
        assert_eq!(get((Ipv6Addr::LOCALHOST, port).into()).generation, Some(1));
    }
    let elsewhere =
        load::get(SocketAddr::from((Ipv6Addr::LOCALHOST, ports[2])), "/", Duration::from_secs(15));
    assert_eq!(elsewhere.expect_err("no listener").kind, Kind::Refused);
    service.stop();
}

#[test]
fn a_python_server_with_two_given_listeners_loses_no_request_on_either_in_10_reloads() {
    let _turn = turn();
    let addrs = [free_address(), free_address()];
    let options = format!("-n 2 -l {} -l {}", addrs[0], addrs[1]);
    let mut service = Service::run_ready(&options, &python("listen"));
    let loads = addrs.map(|addr| LoadOptions::new(addr, 4).record());
    for report in reload_under_loads(&service, loads, 10) {
        report.assert_switched_atomically(11);
    }
    service.stop();
}

#[test]
fn a_node_server_with_a_given_listener_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready(&format!("-n 2 -l {addr}"), &node());
    reload_under_load(&service, LoadOptions::new(addr, 8).record(), 5).assert_switched_atomically(6);
    service.stop();
}

#[test]
fn a_server_that_never_calls_listen_loses_no_request_in_5_reloads_under_ready_notify() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready(&format!("-n 2 --ready notify -l {addr}"), &python("pipe"));
    reload_under_load(&service, LoadOptions::new(addr, 8).record(), 5).assert_switched_atomically(6);
    service.stop();
}

#[test]
fn without_interception_given_listeners_lose_no_request_either() {
    let _turn = turn();
    let addr = free_address();
    let options = format!("-n 2 --no-intercept --ready notify -l {addr}");
    let mut service = Service::run_ready(&options, &python("pipe"));
    reload_under_load(&service, LoadOptions::new(addr, 8).record(), 5).assert_switched_atomically(6);
    service.stop();
}

#[test]
fn a_worker_that_binds_the_given_address_anyway_gets_the_same_socket() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready(&format!("-n 2 -l {addr}"), &python("bind"));
    let (given, bound) = (lines_with(&service, "given ", 2), lines_with(&service, "bound ", 2));
    for line in given {
        let same = bound.iter().find(|other| word(other, "pid") == word(&line, "pid")).expect("it binds");
        assert_eq!(listeners(same)[0][3], listeners(&line)[0][3], "inode numbers: {line}; {same}");
    }
    reload_under_load(&service, LoadOptions::new(addr, 8).record(), 5).assert_switched_atomically(6);
    service.stop();
}

#[test]
fn an_app_without_support_for_given_listeners_works_with_them_unmodified() {
    let _turn = turn();
    own_network();
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 3000));
    let mut service = Service::run_ready("-n 2 -l 3000", &["node", &node_app("express/app.js")]);
    reload_under_load(&service, LoadOptions::new(addr, 8), 3);
    service.stop();
}

/// Kills a worker that accepts nothing. The connections in its accept queue are answered by its replacement.
#[track_caller]
fn assert_queue_outlives_its_worker(command: &[String], addr: SocketAddr, deaf: &Folder) {
    let mut service = Service::run_ready(&format!("-n 1 -l {addr}"), command);
    let first = service.workers()[0];
    let queued: Vec<Waiting> = (0..5).map(|_| Waiting::new(addr)).collect();
    assert!(queued.iter().all(Waiting::waits));
    send(first, Signal::SIGKILL);
    deaf.lower("deaf");
    for client in queued {
        let origin = client.outcome().expect("an answer");
        assert_eq!(origin.generation, Some(1));
        assert_ne!(origin.pid, Some(first));
    }
    service.stop();
}

#[test]
fn the_replacement_of_a_crashed_worker_serves_the_queue_of_its_given_listener() {
    // Runs alone, because the queue is reset when the replacement takes too long.
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("deaf");
    let mut command = python("listen");
    command.push(folder.path("deaf"));
    assert_queue_outlives_its_worker(&command, addr, &folder);
}

#[test]
fn the_replacement_of_a_crashed_worker_that_binds_the_given_address_serves_its_queue() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("deaf");
    let command = naive_with(addr, &["--deaf-while", &folder.path("deaf")]);
    assert_queue_outlives_its_worker(&command, addr, &folder);
}

#[test]
fn the_queue_of_a_given_listener_is_served_after_the_command_was_missing_for_a_while() {
    // Runs alone, because the queue is reset when the replacement takes too long.
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("deaf");
    let (script, away) = (folder.path("serve"), folder.path("away"));
    let text = format!("#!/bin/sh\nexec {} --deaf-while {}\n", naive(addr).join(" "), folder.path("deaf"));
    folder.write_with("serve", &text, 0o755);
    let mut service = Service::run_ready(&format!("-n 1 -l {addr}"), &[&script]);
    let first = service.workers()[0];
    let queued = Waiting::new(addr);
    fs::rename(&script, &away).expect("move the script away");
    send(first, Signal::SIGKILL);
    service.wait_for_line("can't be started");
    let later = Waiting::new(addr);
    fs::rename(&away, &script).expect("put the script back");
    folder.lower("deaf");
    for client in [queued, later] {
        let origin = client.outcome().expect("an answer");
        assert_eq!(origin.generation, Some(1));
        assert_ne!(origin.pid, Some(first));
    }
    service.stop();
}

#[test]
fn a_given_listener_has_a_long_accept_queue_even_after_a_worker_shut_it_down() {
    let addr = free_address();
    let program = "import os, signal, socket, struct, sys, time\n\
        server = socket.socket(fileno=3)\n\
        info = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)\n\
        os.write(1, b'queue of %d\\n' % struct.unpack_from('I', info, 28)[0])\n\
        def stop(*_):\n\
        \x20   server.shutdown(socket.SHUT_RDWR)\n\
        \x20   sys.exit(0)\n\
        signal.signal(signal.SIGINT, stop)\n\
        os.write(int(os.environ['READY_FD']), b'\\n')\n\
        while True: time.sleep(0.1)";
    let mut service = Service::run_ready(&format!("-n 2 --ready notify -l {addr}"), &inline(program, &[]));
    for _ in 0..3 {
        service.reload();
    }
    let from = service.log.count();
    send(service.workers()[0], Signal::SIGKILL);
    service.wait_for_line_after(from, "a replacement");
    wait_until("9 workers", DEADLINE, || service.out.count_of("queue of") == 9);
    service.stop();
    let short = |line: &Line| {
        line.text
            .strip_prefix("queue of ")
            .and_then(|long| long.parse().ok())
            .is_none_or(|long: u32| long < 100)
    };
    assert!(!service.out.all().iter().any(short), "{}", service.out.text());
}

#[test]
fn without_interception_an_old_worker_may_also_finish_its_request() {
    let (addr, folder) = (free_address(), Folder::new());
    let program = "import os, socket, socketserver, sys, time\n\
        folder, port = sys.argv[1:]\n\
        class Handler(socketserver.StreamRequestHandler):\n\
        \x20   def handle(self):\n\
        \x20       while self.rfile.readline().strip(): pass\n\
        \x20       print('works', flush=True)\n\
        \x20       while not os.path.exists(folder + 'go'): time.sleep(0.01)\n\
        \x20       body = 'generation=' + os.environ['REUSE_RUN_GENERATION'] + '\\n'\n\
        \x20       head = 'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n'\n\
        \x20       self.wfile.write((head % len(body) + body).encode())\n\
        class Server(socketserver.ThreadingTCPServer):\n\
        \x20   daemon_threads = True\n\
        \x20   def server_bind(self):\n\
        \x20       self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n\
        \x20       super().server_bind()\n\
        Server(('127.0.0.1', int(port)), Handler).serve_forever()";
    let command = inline(program, &[&folder.path(""), &addr.port().to_string()]);
    let mut service = Service::run_ready("-n 1 --no-intercept --drain 100s", &command);
    let old = service.workers()[0];
    let client = Waiting::new(addr);
    service.wait_for_output("works");
    let from = service.log.count();
    service.signal(Signal::SIGUSR2);
    service.wait_for_line_after(from, "generation 2 serves");
    service.assert_keeps(old);
    assert!(client.waits());
    folder.raise("go");
    assert_eq!(client.outcome().expect("an answer").generation, Some(1));
    service.wait_for_line_after(from, "reload done");
    service.stop();
}

#[test]
fn gunicorn_with_a_given_listener_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    // Its graceful stop is SIGTERM, not SIGINT. It doesn't call listen(2) on a given listener, but sends READY=1 to
    // NOTIFY_SOCKET.
    let options = format!("-n 2 --stop-signal TERM -l {addr}");
    let mut service = packaged(&options, "gunicorn", &["--workers", "2", "web:wsgi"]);
    reload_under_load(&service, LoadOptions::new(addr, 8).record(), 5).assert_switched_atomically(6);
    service.stop();
}

#[test]
fn gunicorn_that_binds_by_itself_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    // It asks the kernel whether its socket listens already (SO_ACCEPTCONN), and calls listen(2) only if not.
    let more = ["--workers", "2", "--bind", &addr.to_string(), "web:wsgi"];
    let mut service = packaged("-n 2 --stop-signal TERM", "gunicorn", &more);
    reload_under_load(&service, LoadOptions::new(addr, 8).record(), 5).assert_switched_atomically(6);
    service.stop();
}

#[test]
fn uvicorn_with_a_given_listener_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    let more = ["--fd", "3", "--lifespan", "off", "--no-access-log", "web:asgi"];
    let mut service = packaged(&format!("-n 2 -l {addr}"), "uvicorn", &more);
    reload_under_load(&service, LoadOptions::new(addr, 8).record(), 5).assert_switched_atomically(6);
    service.stop();
}
