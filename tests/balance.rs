//! `--balance`: who gets new connections when a worker is stuck, and what it costs to know.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::load::{Load, LoadOptions, Record, Report};
use common::{
    DEADLINE, Folder, Service, Waiting, free_address, get, naive, reuse_run, send, turn, wait_for_answers,
    wait_until, wake_ups,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const CLIENTS: usize = 16;
/// How long a worker is stopped under load.
const STOP: Duration = Duration::from_secs(2);

/// A worker that is stopped, and goes on at the end.
struct Stopped(u32);

impl Stopped {
    fn new(worker: u32) -> Self {
        send(worker, Signal::SIGSTOP);
        // A thread that has yet to notice it takes a connection before it stops.
        wait_until("all its threads have stopped", DEADLINE, || {
            let tasks = fs::read_dir(format!("/proc/{worker}/task")).expect("its threads");
            let stat = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            tasks.map(|task| stat(task.expect("a thread"))).all(|stat| stat.contains(") T "))
        });
        Self(worker)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0 as i32);
        let _ = nix::sys::signal::kill(pid, Signal::SIGCONT); // it may have ended
    }
}

/// Clients that pause between two requests, 16 of them, 300 requests a second in all.
fn load(addr: SocketAddr) -> Load {
    Load::start(LoadOptions::new(addr, CLIENTS).rate(300.0).record())
}

/// Stops a worker for a while under load: what the clients saw, and when it was stopped.
fn with_a_stopped_worker(options: &str) -> (Report, Instant) {
    let addr = free_address();
    let mut service = Service::run_ready(options, &naive(addr));
    let load = load(addr);
    wait_for_answers(&load, 150);
    let at = Instant::now();
    let stopped = Stopped::new(service.workers()[0]);
    wait_until("the time is over", DEADLINE, || at.elapsed() > STOP);
    drop(stopped);
    wait_for_answers(&load, 150);
    let report = load.stop();
    report.assert_nothing_failed();
    service.stop();
    (report, at)
}

fn took(record: &Record) -> Duration {
    record.end - record.connect_start
}

#[test]
fn a_stopped_worker_traps_few_and_all_others_are_answered_within_50_ms() {
    let _turn = turn();
    // A machine that is busy otherwise delays answers too; that is no matter of who got the connection.
    let mut slow = Vec::new();
    for _ in 0..20 {
        let (report, at) = with_a_stopped_worker("-n 4");
        let trapped: Vec<&Record> = report.records.iter().filter(|r| took(r) > STOP / 2).collect();
        let late = trapped.iter().filter(|r| r.connect_start > at + STOP / 4).count();
        assert_eq!(late, 0, "it was found out long before\n{report}");
        let others = report.records.iter().filter(|r| took(r) <= STOP / 2).map(took).max().expect("answers");
        if others < Duration::from_millis(50) && trapped.len() <= CLIENTS / 2 {
            return;
        }
        slow.push((others, trapped.len()));
    }
    panic!("the slowest of the other answers, and how many were trapped: {slow:?}");
}

#[test]
fn at_random_a_stopped_worker_traps_most_clients() {
    let _turn = turn();
    let (report, _) = with_a_stopped_worker("-n 4 --balance random");
    let trapped = report.records.iter().filter(|r| took(r) > STOP / 2).count();
    assert!(trapped > CLIENTS / 2, "{trapped}\n{report}");
}

#[test]
fn when_all_are_stuck_connections_wait_for_all_of_them() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 3", &naive(addr));
    let stopped: Vec<Stopped> = service.workers().into_iter().map(Stopped::new).collect();
    let mut clients: Vec<Waiting> = Vec::new();
    wait_until("all are seen to be stuck", DEADLINE, || {
        clients.push(Waiting::new(addr));
        loads(&service) == ["stuck"; 3]
    });
    let later: Vec<Waiting> = (0..60).map(|_| Waiting::new(addr)).collect();
    drop(stopped);
    for client in clients {
        client.outcome().expect("an answer");
    }
    let pids = later.into_iter().map(|client| client.outcome().expect("an answer").pid);
    assert_eq!(pids.collect::<std::collections::BTreeSet<_>>().len(), 3);
    wait_until("all are free again", DEADLINE, || loads(&service) == ["free"; 3]);
    service.stop();
}

/// How the workers are off, by slot, as `status --json` has it.
fn loads(service: &Service) -> Vec<String> {
    let output = reuse_run().args(["status", "--json", &service.pid().to_string()]).output().expect("status");
    let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let workers = status["workers"].as_array().expect("workers");
    workers.iter().map(|worker| worker["load"].as_str().expect("a load").to_owned()).collect()
}

#[test]
fn status_and_log_tell_who_is_left_out_and_when_that_is_over() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let worker = service.workers()[1];
    let stopped = Stopped::new(worker);
    let mut clients = Vec::new();
    wait_until("it is stuck", DEADLINE, || {
        clients.push(Waiting::new(addr));
        loads(&service).contains(&"stuck".to_owned())
    });
    let output = reuse_run().args(["status", &service.pid().to_string()]).output().expect("status");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.lines().any(|line| line.contains("ready, stuck") && line.contains(&worker.to_string())),
        "{text}"
    );
    assert_eq!(output.status.code(), Some(0), "it is ready all the same: {text}");
    // Nobody has to come for it to be seen.
    let line = service.wait_for_line("has taken no connection on").text;
    assert!(line.contains(&format!("(pid {worker}, generation 1)")) && line.ends_with("for 1 s"), "{line}");
    for _ in 0..20 {
        assert_ne!(get(addr).pid, Some(worker));
    }
    drop(stopped);
    let line = service.wait_for_line("takes connections on").text;
    assert!(line.contains(&format!("(pid {worker}, generation 1)")), "{line}");
    wait_until("it is free", DEADLINE, || loads(&service) == ["free"; 2]);
    wait_until("it gets connections again", DEADLINE, || get(addr).pid == Some(worker));
    for client in clients {
        client.outcome().expect("an answer");
    }
    assert_eq!(service.log.count_of("has taken no connection"), 1, "{}", service.log.text());
    service.stop();
}

#[test]
fn a_worker_that_has_been_stuck_gets_nothing_while_it_is_busy() {
    let _turn = turn();
    // Its main thread blocks for as long as the file says, for whoever asks for /block.
    let text = "import http.server, os, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != '/': time.sleep(float(self.path[1:]))
        body = b'pid=%d\\n' % os.getpid()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(('127.0.0.1', int(os.environ['TEST_PORT'])), Handler).serve_forever()";
    let addr = free_address();
    let mut command = reuse_run();
    command.args(common::arguments("-n 2", &["python3", "-c", text]));
    command.env("TEST_PORT", addr.port().to_string()).env("RUST_LOG", "debug");
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    let ask = |path: &str| {
        let mut stream = TcpStream::connect(addr).expect("connect");
        write!(stream, "GET /{path} HTTP/1.1\r\nHost: test\r\n\r\n").expect("ask");
        stream
    };
    let pid = |mut stream: TcpStream| {
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        common::load::Origin::of(&text).pid.expect("a pid")
    };
    // One is stuck, with others behind it, until all that wait have been answered.
    let blocked = ask("0.5");
    let mut others = Vec::new();
    wait_until("it is stuck", DEADLINE, || {
        others.push(ask(""));
        loads(&service).contains(&"stuck".to_owned())
    });
    let suspect = pid(blocked);
    for stream in others {
        pid(stream);
    }
    wait_until("it is free, and was seen to be idle", DEADLINE, || pid(ask("")) == suspect);
    // Now it blocks again. Looks are taken only while connections come, and the first of them that is taken
    // while it is busy leaves it out, although nothing waits there.
    let before = service.log.count_of("is busy: spared");
    let mut blocked = Vec::new();
    wait_until("it is left out before a connection waits", DEADLINE, || {
        let stream = ask("0.2");
        stream.set_nonblocking(true).expect("set non-blocking");
        blocked.push(stream);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(100) {
            drop(ask(""));
            thread::yield_now();
        }
        service.log.count_of("is busy: spared") > before
    });
    service.stop();
}

#[test]
fn however_many_connections_come_the_wrapper_wakes_up_a_few_hundred_times_a_second() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 4", &naive(addr));
    for rate in [Some(50.0), Some(1000.0), None] {
        let options = LoadOptions { rate, ..LoadOptions::new(addr, CLIENTS) };
        let load = Load::start(options);
        wait_for_answers(&load, 50);
        let (before, begun) = (wake_ups(service.pid()), Instant::now());
        wait_until("two seconds", DEADLINE, || begun.elapsed() > Duration::from_secs(2));
        let per_second = (wake_ups(service.pid()) - before) as f64 / begun.elapsed().as_secs_f64();
        assert!(per_second < 600.0, "{per_second} at a rate of {rate:?}");
        load.stop().assert_nothing_failed();
    }
    service.stop();
}

#[test]
fn after_the_last_connection_it_sleeps_and_one_that_waits_for_long_takes_few_looks() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = load(addr);
    wait_for_answers(&load, 100);
    load.stop().assert_nothing_failed();
    let mut before = wake_ups(service.pid());
    wait_until("it sleeps", DEADLINE, || {
        thread::sleep(Duration::from_millis(100));
        let (now, was) = (wake_ups(service.pid()), before);
        before = now;
        now == was
    });
    common::holds_for("it sleeps", Duration::from_secs(10), || wake_ups(service.pid()) == before);

    let stopped: Vec<Stopped> = service.workers().into_iter().map(Stopped::new).collect();
    let client = Waiting::new(addr);
    service.wait_for_line("has taken no connection");
    let (before, begun) = (wake_ups(service.pid()), Instant::now());
    wait_until("three seconds", DEADLINE, || begun.elapsed() > Duration::from_secs(3));
    let per_second = (wake_ups(service.pid()) - before) as f64 / begun.elapsed().as_secs_f64();
    assert!(per_second < 20.0, "{per_second}");
    drop(stopped);
    client.outcome().expect("an answer");
    service.stop();
}

#[test]
fn reloads_while_a_worker_is_stuck_lose_nothing_but_what_it_had() {
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    let mut service = Service::run_ready("-n 4 --drain 200ms", &folder.server(addr, &[]));
    let load = load(addr);
    for generation in 2..=4 {
        let stopped = Stopped::new(service.workers()[0]);
        wait_for_answers(&load, 100);
        // It goes on before it is killed, so that what waits for it is answered.
        thread::scope(|scope| {
            scope.spawn(|| service.reload());
            service.wait_for_line(&format!("generation {generation} serves"));
            drop(stopped);
        });
        wait_for_answers(&load, 100);
    }
    load.stop().assert_nothing_failed();
    assert_eq!(get(addr).generation, Some(4));
    service.stop();
}

#[test]
fn a_wrong_word_after_balance_is_refused() {
    let output = Command::new(reuse_run().get_program()).args(["--balance", "fair", "true"]).output();
    let output = output.expect("run reuse-run");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("neither load nor random"), "{output:?}");
}
