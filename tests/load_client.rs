//! The load client counts each failure by the right kind. All other tests rely on its "0 failed".
#![cfg_attr(clippy, deny(warnings))]

#[path = "common/load/mod.rs"]
mod load;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use load::{Kind, Load, LoadOptions, Mode, Report};

const DEADLINE: Duration = Duration::from_secs(30);

/// A server that does the same with each connection.
fn server(serve: impl Fn(TcpStream) + Send + Sync + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let addr = listener.local_addr().expect("own address");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    addr
}

/// Reads one request and returns its target. `None` if the client has closed.
fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    while !bytes.ends_with(b"\r\n\r\n") {
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return None,
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
        }
    }
    String::from_utf8(bytes).ok()?.split(' ').nth(1).map(str::to_owned)
}

fn answers(answer: &'static str) -> impl Fn(TcpStream) + Send + Sync + Clone + 'static {
    move |mut stream| {
        if read_request(&mut stream).is_some() {
            let _ = stream.write_all(answer.as_bytes());
        }
    }
}

/// Runs a load until some requests have ended.
fn run(options: LoadOptions) -> Report {
    let load = Load::start(options);
    let deadline = Instant::now() + DEADLINE;
    while load.snapshot().requests < 6 {
        assert!(Instant::now() < deadline, "too few requests: {:?}", load.snapshot());
        thread::sleep(Duration::from_millis(5));
    }
    load.stop()
}

fn run_new_connections(addr: SocketAddr) -> Report {
    run(LoadOptions::new(addr, 2).timeout(Duration::from_millis(300)))
}

#[track_caller]
fn assert_only(report: &Report, kind: Kind) {
    assert_eq!(report.counts.answered, 0, "{report}");
    assert!(report.counts.failed >= 6, "{report}");
    assert_eq!(report.count(kind), report.counts.failed, "{report}");
    assert_eq!(report.counts.requests, report.counts.failed, "{report}");
    assert!(report.failures.iter().all(|failure| failure.kind == kind), "{report}");
}

#[track_caller]
fn assert_all_answered(report: &Report) {
    report.assert_nothing_failed();
    assert_eq!(report.counts.answered, report.counts.requests, "{report}");
    assert_eq!(report.latencies.len() as u64, report.counts.answered, "{report}");
    assert!(report.failures.is_empty(), "{report}");
}

#[test]
fn a_complete_answer_counts_as_answered() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nyes",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nyes\r\n1;x=y\r\n!\r\n0\r\nTrailer: 1\r\n\r\n",
        // The end of the connection is the end of the answer.
        "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nyes",
        "HTTP/1.0 200 OK\r\n\r\nyes",
    ] {
        println!("{answer:?}");
        assert_all_answered(&run_new_connections(server(answers(answer))));
    }
}

#[test]
fn a_closed_port_counts_as_refused() {
    // Bound without listen, so that no other process gets the port.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("bind");
    let addr = socket.local_addr().expect("own address").as_socket().expect("an IP address");
    assert_only(&run_new_connections(addr), Kind::Refused);
}

#[test]
fn a_connection_closed_without_an_answer_counts_as_end_of_file() {
    let addr = server(|mut stream| {
        read_request(&mut stream);
    });
    assert_only(&run_new_connections(addr), Kind::EndOfFile);
}

#[test]
fn a_connection_reset_without_an_answer_counts_as_reset() {
    let addr = server(|mut stream| {
        read_request(&mut stream);
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    });
    assert_only(&run_new_connections(addr), Kind::Reset);
}

#[test]
fn an_answer_that_is_cut_short_counts_as_truncated() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 30\r\nConnection: close\r\n\r\nonly this",
        "HTTP/1.1 200 OK\r\nContent-",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nyes\r\n",
    ] {
        println!("{answer:?}");
        assert_only(&run_new_connections(server(answers(answer))), Kind::Truncated);
    }
}

#[test]
fn an_answer_reset_half_way_counts_as_truncated() {
    let addr = server(|mut stream| {
        read_request(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nonly this");
        // The bytes must arrive before the reset.
        thread::sleep(Duration::from_millis(30));
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    });
    assert_only(&run_new_connections(addr), Kind::Truncated);
}

#[test]
fn a_server_that_never_answers_counts_as_time_out() {
    let addr = server(|mut stream| {
        read_request(&mut stream);
        // Waits until the client closes.
        let _ = stream.read(&mut [0]);
    });
    assert_only(&run_new_connections(addr), Kind::TimeOut);
}

#[test]
fn another_status_a_longer_body_and_no_http_count_as_bad_responses() {
    for answer in [
        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nyes and no",
        "HTTP/1.1 200 OK\r\n\r\nneither a length nor Connection: close",
        "SSH-2.0-OpenSSH_9.2p1\r\n",
    ] {
        println!("{answer:?}");
        assert_only(&run_new_connections(server(answers(answer))), Kind::BadResponse);
    }
}

#[test]
fn the_answer_to_another_request_counts_as_a_bad_response() {
    let addr = server(answers("HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nwork=c9-9"));
    let options = LoadOptions::new(addr, 2).path("/?id={id}");
    assert_only(&run(options), Kind::BadResponse);
}

#[test]
fn each_request_has_an_id_of_its_own_when_the_path_asks_for_one() {
    let (send, seen) = mpsc::channel();
    let addr = server(move |mut stream| {
        let Some(target) = read_request(&mut stream) else { return };
        let id = target.strip_prefix("/?id=").unwrap_or("none").to_owned();
        let body = format!("work={id} generation=7 slot=1 pid=42\n");
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        let _ = stream.write_all((head + &body).as_bytes());
        let _ = send.send(id);
    });
    let report = run(LoadOptions::new(addr, 2).path("/?id={id}").record());
    assert_all_answered(&report);
    let mut ids: Vec<String> = seen.try_iter().collect();
    ids.sort();
    ids.dedup();
    let answered = report.counts.answered;
    assert_eq!(ids.len() as u64, answered);
    assert_eq!(report.records.len() as u64, answered);
    assert_eq!(report.counts.generations.get(&7), Some(&answered));
    assert_eq!(report.counts.slots.get(&1), Some(&answered));
    assert_eq!(report.counts.pids.get(&42), Some(&answered));
}

const KEPT: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes";

fn keep_alive(addr: SocketAddr, think: Duration) -> Report {
    run(LoadOptions::new(addr, 2).mode(Mode::KeepAlive { think }).timeout(Duration::from_secs(5)))
}

#[test]
fn keep_alive_sends_request_after_request_on_one_connection() {
    let addr =
        server(|mut stream| while read_request(&mut stream).is_some() && stream.write_all(KEPT).is_ok() {});
    let report = keep_alive(addr, Duration::ZERO);
    assert_all_answered(&report);
    assert_eq!(report.counts.connections, 2, "{report}");
    assert_eq!(report.counts.closed_while_idle, 0, "{report}");
}

#[test]
fn a_connection_that_is_closed_while_idle_is_replaced_and_is_no_failure() {
    let addr = server(|mut stream| {
        if read_request(&mut stream).is_some() {
            let _ = stream.write_all(KEPT);
            let _ = stream.shutdown(Shutdown::Both);
        }
    });
    let report = keep_alive(addr, Duration::from_millis(100));
    assert_all_answered(&report);
    assert!(report.counts.closed_while_idle >= 4, "{report}");
    assert_eq!(report.counts.connections, report.counts.requests, "{report}");
}

#[test]
fn after_connection_close_in_an_answer_a_new_connection_is_opened() {
    let addr = server(answers("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nyes"));
    let report = keep_alive(addr, Duration::ZERO);
    assert_all_answered(&report);
    assert_eq!(report.counts.closed_while_idle, 0, "{report}");
    assert_eq!(report.counts.connections, report.counts.requests, "{report}");
}

#[test]
fn a_second_request_without_an_answer_counts_as_failed_on_a_reused_connection() {
    let addr = server(|mut stream| {
        if read_request(&mut stream).is_some() && stream.write_all(KEPT).is_ok() {
            read_request(&mut stream);
        }
    });
    let report = keep_alive(addr, Duration::ZERO);
    assert!(report.counts.failed > 0, "{report}");
    assert_eq!(report.count(Kind::EndOfFile), report.counts.failed, "{report}");
    assert_eq!(
        report.counts.failures_on_reused.get(&Kind::EndOfFile),
        Some(&report.counts.failed),
        "{report}"
    );
    assert!(report.failures.iter().all(|failure| failure.on_reused_connection), "{report}");
}

#[test]
fn the_load_does_not_exceed_its_rate() {
    let addr = server(answers("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nyes"));
    let report = run(LoadOptions::new(addr, 3).rate(20.0));
    assert_all_answered(&report);
    // Each client sends its first request immediately and the others at intervals.
    let most = 3.0 + 20.0 * report.elapsed.as_secs_f64();
    assert!(report.counts.requests as f64 <= most + 1.0, "{report}");
}

#[test]
fn an_older_generation_on_a_later_connection_is_found_stale() {
    let addr = server(answers("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ngeneration=1"));
    let mut report = run(LoadOptions::new(addr, 1).record());
    assert!(report.stale().is_empty());
    report.records[0].generation = 2;
    assert_eq!(report.stale().len(), report.records.len() - 1);
    let last = report.records.len() - 1;
    report.records[0].generation = 1;
    report.records[last].generation = 2;
    assert!(report.stale().is_empty());
}
