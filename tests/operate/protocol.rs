//! The control socket, and clients that misuse it.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::{Duration, Instant};

use crate::common::load::{Load, LoadOptions};
use crate::common::{
    DEADLINE, Service, free_address, get, holds_for, naive, status, ticks, turn, wait_for_answers, wait_until,
};

fn control(service: &Service) -> UnixStream {
    let namespace = fs::metadata("/proc/self/ns/pid").expect("the PID namespace").ino();
    let name = format!("reuse-run/{namespace}/{}", service.pid());
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let stream = UnixStream::connect_addr(&address).expect("connect to the control socket");
    stream.set_read_timeout(Some(DEADLINE)).expect("set a time-out");
    stream
}

/// All that comes until the connection ends, with or without an error.
pub fn rest(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("the connection is not closed"),
        _ => String::from_utf8(bytes).expect("UTF-8"),
    }
}

/// A client that has sent this.
pub fn say(service: &Service, bytes: &[u8]) -> UnixStream {
    let mut stream = control(service);
    // reuse-run closes the connection in the middle of what is too long.
    let _ = stream.write_all(bytes);
    stream
}

#[test]
fn wrong_requests_on_the_control_socket_are_answered_or_dropped_and_disturb_nothing() {
    let _turn = turn();
    let (addr, folder, mut service) = Service::with_flags("-n 2", &[]);
    let load = Load::start(LoadOptions::new(addr, 4));
    wait_for_answers(&load, 100);
    for _ in 0..10 {
        for garbage in [&b"garbage\n"[..], b"\n", b"{}\n", b"\xff\0\n", b"[[[[[[[[\n"] {
            assert!(rest(say(&service, garbage)).contains("not a request"));
        }
        let answer = rest(say(&service, b"{\"version\":1,\"request\":\"frobnicate\"}\n"));
        assert!(answer.contains("not a request"), "{answer}");
        let answer = rest(say(&service, b"{\"version\":4,\"request\":\"status\"}\n"));
        assert!(answer.contains("speaks versions 1 to 3") && answer.contains("not 4"), "{answer}");
        assert_eq!(rest(say(&service, &[b'x'; 100_000])), "");
        let half = say(&service, b"{\"version\":1,");
        half.shutdown(Shutdown::Write).expect("shut down");
        assert_eq!(rest(half), "");
        let answer = rest(say(&service, b"{\"version\":1,\"request\":\"status\"}\nand more\n"));
        assert!(answer.contains("\"slots\":2"), "{answer}");
    }

    // One client waits for a reload and reads nothing; others connect and close.
    folder.raise("hold-2-0");
    let deaf = say(&service, b"{\"version\":1,\"request\":{\"reload\":{\"how\":null,\"wait\":true}}}\n");
    service.wait_for_line("starting generation 2");
    drop(say(&service, b"{\"version\":1,\"request\":{\"reload\":{\"how\":null,\"wait\":true}}}\n"));
    (0..50).for_each(|_| drop(control(&service)));
    assert_eq!(status(&service)["state"], "reloading");
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    wait_until("no reload runs", DEADLINE, || status(&service)["state"] == "serving");
    assert!(rest(deaf).contains("done"));
    load.stop().assert_nothing_failed();
    let before = ticks(service.pid());
    holds_for("reuse-run is idle", Duration::from_secs(1), || ticks(service.pid()) - before <= 3);
    service.stop();
}

#[test]
fn a_silent_control_client_is_dropped_after_10_s() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let (begun, before) = (Instant::now(), service.fds());
    let clients = [control(&service), say(&service, b"{\"version\":1,")];
    for client in clients {
        assert_eq!(rest(client), "");
    }
    let took = begun.elapsed();
    assert!((Duration::from_secs(9)..Duration::from_secs(30)).contains(&took), "{took:?}");
    wait_until("their sockets are closed", DEADLINE, || service.fds() <= before);
    service.stop();
}

#[test]
fn a_control_client_that_reads_nothing_is_dropped_before_it_takes_much_memory() {
    let (addr, folder, mut service) = Service::with_flags("-n 1", &[]);
    folder.raise("hold-2-0");
    let deaf = say(&service, b"{\"version\":1,\"request\":{\"reload\":{\"how\":null,\"wait\":true}}}\n");
    service.wait_for_line("starting generation 2");
    let before = ticks(service.pid());
    holds_for("reuse-run is idle while one client waits", Duration::from_secs(1), || {
        ticks(service.pid()) - before <= 3
    });
    let (fds, memory) = (service.fds(), service.memory_kib());
    // Each scaling has a log line of its own, which is also sent to clients that wait.
    let scale = |workers: u32| {
        format!(
            "{{\"version\":1,\"request\":{{\"scale\":{{\"to\":{{\"exactly\":{workers}}},\"wait\":false}}}}}}\n"
        )
    };
    wait_until("the client is dropped", DEADLINE, || {
        for workers in [3, 2].repeat(50) {
            let answer = rest(say(&service, scale(workers).as_bytes()));
            assert!(answer.contains("queued until"), "{answer}");
        }
        service.fds() < fds
    });
    let more = service.memory_kib().saturating_sub(memory);
    assert!(more < 2048, "{more} KiB more");
    let received = rest(deaf);
    assert!(
        received.contains("scaling to 2 workers") && !received.contains("done"),
        "it was dropped before the end: {} bytes",
        received.len()
    );
    assert_eq!(get(addr).generation, Some(1));
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    service.wait_for_line("scaling done: 2 workers");
    service.stop();
}

#[test]
fn a_hundred_control_clients_at_once_are_answered() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let fds = service.fds();
    let mut clients: Vec<UnixStream> = (0..100).map(|_| control(&service)).collect();
    for client in &mut clients {
        client.write_all(b"{\"version\":1,\"request\":\"status\"}\n").expect("ask");
    }
    for client in clients {
        let answer = rest(client);
        assert!(answer.contains("\"slots\":1"), "{answer}");
    }
    wait_until("their sockets are closed", DEADLINE, || service.fds() <= fds);
    let before = ticks(service.pid());
    holds_for("reuse-run is idle", Duration::from_secs(1), || ticks(service.pid()) - before <= 3);
    service.stop();
}
