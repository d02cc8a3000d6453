//! `--balance`: which workers get new connections when one is stuck, and what the samples of accept queues cost.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use common::load::{Load, LoadOptions, Origin, Record, Report};
use common::{
    DEADLINE, Outcome, Service, Waiting, free_address, freeze, get, holds_for, inline, kernel, naive,
    naive_with, reuse_run_with, run, run_words, server, turn, wait_for_answers, wait_until, wake_ups,
    workers_where,
};
use nix::sys::signal::Signal;

const CLIENTS: usize = 16;
/// How long a worker is stopped under load.
const STOP: Duration = Duration::from_secs(2);

/// A worker that is stopped by SIGSTOP until this is dropped.
struct Stopped(u32);

impl Stopped {
    fn new(worker: u32) -> Self {
        freeze(worker);
        Self(worker)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0 as i32);
        let _ = nix::sys::signal::kill(pid, Signal::SIGCONT); // it may have ended
    }
}

/// 16 clients that send 300 requests a second together, with pauses.
fn load(addr: SocketAddr) -> Load {
    Load::start(LoadOptions::new(addr, CLIENTS).rate(300.0).record())
}

/// Stops a worker for a while under load. Returns the load's report, and when the worker was stopped.
fn with_a_stopped_worker(options: &str) -> (Report, Instant) {
    let addr = free_address();
    let mut service = Service::run_ready(options, &naive(addr));
    let load = load(addr);
    wait_for_answers(&load, 150);
    let at = Instant::now();
    let stopped = Stopped::new(service.workers()[0]);
    wait_until("the end of the stop", DEADLINE, || at.elapsed() > STOP);
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
fn a_stopped_worker_delays_few_clients_and_all_others_are_answered_within_50_ms() {
    let _turn = turn();
    // A busy machine delays answers too, hence some more tries.
    let mut slow = Vec::new();
    for _ in 0..20 {
        let (report, at) = with_a_stopped_worker("-n 4");
        let delayed: Vec<&Record> = report.records.iter().filter(|r| took(r) > STOP / 2).collect();
        let late = delayed.iter().filter(|r| r.connect_start > at + STOP / 4).count();
        assert_eq!(late, 0, "it got connections long after it was stopped\n{report}");
        let others = report.records.iter().filter(|r| took(r) <= STOP / 2).map(took).max().expect("answers");
        if others < Duration::from_millis(50) && delayed.len() <= CLIENTS / 2 {
            return;
        }
        slow.push((others, delayed.len()));
    }
    panic!("the slowest other answer, and how many were delayed: {slow:?}");
}

#[test]
fn with_balance_random_a_stopped_worker_delays_most_clients() {
    let _turn = turn();
    let (report, _) = with_a_stopped_worker("-n 4 --balance random");
    let delayed = report.records.iter().filter(|r| took(r) > STOP / 2).count();
    assert!(delayed > CLIENTS / 2, "{delayed}\n{report}");
}

#[test]
fn when_all_workers_are_stuck_all_of_them_get_connections() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 3", &naive(addr));
    let stopped: Vec<Stopped> = service.workers().into_iter().map(Stopped::new).collect();
    let mut clients: Vec<Waiting> = Vec::new();
    wait_until("all workers are stuck", DEADLINE, || {
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
    wait_until("all workers are free again", DEADLINE, || loads(&service) == ["free"; 3]);
    service.stop();
}

/// The load of the workers in `status --json`, by slot.
fn loads(service: &Service) -> Vec<String> {
    let workers = workers_where(service, |_| true);
    workers.iter().map(|worker| worker["load"].as_str().expect("a load").to_owned()).collect()
}

#[test]
fn status_and_log_show_which_worker_is_stuck_and_when_it_is_free_again() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let worker = service.workers()[1];
    let stopped = Stopped::new(worker);
    let mut clients = Vec::new();
    wait_until("it is stuck", DEADLINE, || {
        clients.push(Waiting::new(addr));
        loads(&service).contains(&"stuck".to_owned())
    });
    let Outcome { code, out: text, .. } = run(&service, "status");
    assert!(
        text.lines().any(|line| line.contains("ready, stuck") && line.contains(&worker.to_string())),
        "{text}"
    );
    assert_eq!(code, Some(0), "a stuck worker is ready: {text}");
    // This is logged without further connections.
    let line = service.wait_for_line("has taken no connection on").text;
    assert!(line.contains(&format!("(pid {worker}, generation 1)")) && line.ends_with("for 1 s"), "{line}");
    for _ in 0..20 {
        assert_ne!(get(addr).pid, Some(worker));
    }
    drop(stopped);
    let line = service.wait_for_line("takes connections on").text;
    assert!(line.contains(&format!("(pid {worker}, generation 1)")), "{line}");
    wait_until("it is free", DEADLINE, || loads(&service) == ["free"; 2]);
    wait_until("the worker gets connections again", DEADLINE, || get(addr).pid == Some(worker));
    for client in clients {
        client.outcome().expect("an answer");
    }
    assert_eq!(service.log.count_of("has taken no connection"), 1, "{}", service.log.text());
    service.stop();
}

#[test]
fn a_worker_that_was_stuck_gets_no_connection_while_it_is_busy() {
    let _turn = turn();
    // Its main thread sleeps for as many seconds as the path says.
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
    let mut command = reuse_run_with("-n 2", &inline(text, &[]));
    command.env("TEST_PORT", addr.port().to_string()).env("REUSE_RUN_LOG", "debug");
    let mut service = Service::spawn_ready(command);
    let ask = |path: &str| {
        let mut stream = TcpStream::connect(addr).expect("connect");
        write!(stream, "GET /{path} HTTP/1.1\r\nHost: test\r\n\r\n").expect("ask");
        stream
    };
    let pid = |mut stream: TcpStream| {
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        Origin::of(&text).pid.expect("a pid")
    };
    // One worker is stuck, with connections in its accept queue, until all have been answered.
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
    wait_until("the worker is free and was idle in a sample", DEADLINE, || pid(ask("")) == suspect);
    // It blocks again. Samples are taken only while connections come. The first sample that finds it busy makes
    // reuse-run skip it, although no connection waits there.
    let before = service.log.count_of("is busy: skipped");
    let mut blocked = Vec::new();
    wait_until("the worker is skipped before a connection waits", DEADLINE, || {
        let stream = ask("0.2");
        stream.set_nonblocking(true).expect("set non-blocking");
        blocked.push(stream);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(100) {
            drop(ask(""));
            thread::yield_now();
        }
        service.log.count_of("is busy: skipped") > before
    });
    service.stop();
}

#[test]
fn reuse_run_wakes_up_a_few_hundred_times_a_second_at_any_rate_of_connections() {
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
fn after_the_last_connection_reuse_run_sleeps_and_for_a_stuck_worker_it_wakes_up_seldom() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = load(addr);
    wait_for_answers(&load, 100);
    load.stop().assert_nothing_failed();
    let mut before = wake_ups(service.pid());
    wait_until("it sleeps", DEADLINE, || {
        // After connections that didn't stay it rests before it heeds the next one.
        thread::sleep(Duration::from_millis(1500));
        let (now, was) = (wake_ups(service.pid()), before);
        before = now;
        now == was
    });
    holds_for("it sleeps", Duration::from_secs(10), || wake_ups(service.pid()) == before);

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
fn reloads_while_a_worker_is_stuck_lose_no_request() {
    let _turn = turn();
    let (addr, _folder, mut service) = Service::with_flags("-n 4 --drain 200ms", &[]);
    let load = load(addr);
    for generation in 2..=4 {
        let stopped = Stopped::new(service.workers()[0]);
        wait_for_answers(&load, 100);
        // It continues before it is killed, so that its accept queue is answered.
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

/// A crash, reloads, a canary, scalings and recyclings under load, without a failed request, with this --balance.
#[track_caller]
fn operations_lose_nothing(how: &str) {
    let addr = free_address();
    let server = naive_with(addr, &["--non-blocking"]);
    let mut service = Service::run_ready(&format!("-n 4 --balance {how}"), &server);
    let command = |words: &str| run_words(&words.replace("PID", &service.pid().to_string()));
    // It has accepted nothing, and what waits for it is answered by its successor.
    let worker = service.workers()[1];
    freeze(worker);
    let load = load(addr);
    wait_for_answers(&load, 4); // later all clients may wait for the frozen one
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker as i32), Signal::SIGKILL).expect("kill");
    service.wait_for_line("a replacement");
    wait_for_answers(&load, 100);

    for _ in 0..3 {
        service.reload();
        wait_for_answers(&load, 50);
    }
    command("reload --canary 50 --for 300ms PID").assert_done("4 workers of generation 5 serve");
    command("scale 6 PID").assert_done("6 workers");
    wait_for_answers(&load, 50);
    command("scale 3 PID").assert_done("3 workers");
    wait_for_answers(&load, 50);
    command("recycle --pid PID 1").assert_done("3 workers");
    command("recycle --pid PID --all").assert_done("3 workers");
    wait_for_answers(&load, 50);
    command("reload PID -- false").assert_failed(&["exited with status 1"]);
    wait_for_answers(&load, 50);
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn with_balance_load_no_operation_loses_a_request() {
    operations_lose_nothing("load");
}

#[test]
fn with_balance_random_no_operation_loses_a_request() {
    operations_lose_nothing("random");
}

#[test]
fn with_balance_queue_no_operation_loses_a_request() {
    operations_lose_nothing("queue");
}

#[test]
fn with_balance_client_no_operation_loses_a_request() {
    operations_lose_nothing("client");
}

/// Opens a connection, has a request answered, and keeps it open. Returns it with the slot of its worker.
fn kept(addr: SocketAddr) -> (TcpStream, u32) {
    let mut stream = TcpStream::connect(addr).expect("connect");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n").expect("send a request");
    let mut answer = [0; 1024];
    let length = stream.read(&mut answer).expect("an answer");
    let text = String::from_utf8_lossy(&answer[..length]);
    let slot = text.split("slot=").nth(1).and_then(|rest| rest.split_whitespace().next());
    (stream, slot.and_then(|slot| slot.parse().ok()).unwrap_or_else(|| panic!("no slot: {text}")))
}

/// Opens so many connections one by one, and returns how many each slot has of them.
fn keep_one_by_one(addr: SocketAddr, count: usize, open: &mut Vec<TcpStream>) -> BTreeMap<u32, usize> {
    let mut slots = BTreeMap::new();
    for _ in 0..count {
        thread::sleep(Duration::from_millis(40)); // no wait: they come so
        let (stream, slot) = kept(addr);
        open.push(stream);
        *slots.entry(slot).or_default() += 1;
    }
    slots
}

#[test]
fn connections_that_come_one_by_one_and_stay_are_spread_evenly_and_a_worker_that_comes_later_catches_up() {
    let _turn = turn();
    if kernel() < (6, 2) {
        eprintln!("left out: Linux before 6.2 doesn't tell how many descriptors a process has");
        return;
    }
    let addr = free_address();
    // On a busy machine looks are late, hence some more tries. By chance alone both hold once in three hundred times.
    let mut tries = Vec::new();
    for _ in 0..3 {
        let mut service = Service::run_ready("-n 4", &naive_with(addr, &["--keep-alive"]));
        let mut open = Vec::new();
        let first = keep_one_by_one(addr, 200, &mut open);
        run_words(&format!("scale 5 {}", service.pid())).assert_done("5 workers");
        let later = keep_one_by_one(addr, 120, &mut open).get(&4).copied().unwrap_or(0);
        drop(open);
        service.stop();
        let range = first.values().max().max(Some(&0)).unwrap_or(&0) - first.values().min().unwrap_or(&0);
        if range <= 6 && later >= 30 {
            return;
        }
        tries.push((first, later));
    }
    panic!("{tries:?}");
}

#[test]
fn with_balance_queue_no_connection_waits_for_a_stopped_worker() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 3 --balance queue", &naive_with(addr, &["--non-blocking"]));
    let stopped = Stopped::new(service.workers()[0]);
    let pids: Vec<u32> = (0..60).filter_map(|_| get(addr).pid).collect(); // each would fail after 30 s
    assert!(pids.len() == 60 && !pids.contains(&stopped.0), "{pids:?}");
    drop(stopped);
    service.stop();
}

/// How many connections wait for each worker, by slot, when clients have opened as many and nobody takes any.
fn queues(service: &Service, addr: SocketAddr, clients: u64) -> Vec<u64> {
    let stopped: Vec<Stopped> = service.workers().into_iter().map(Stopped::new).collect();
    let waiting: Vec<Waiting> = (0..clients).map(|_| Waiting::new(addr)).collect();
    let mut queues = Vec::new();
    wait_until("all clients wait in a queue", DEADLINE, || {
        let workers = workers_where(service, |worker| worker["serves"] == true);
        queues = workers.iter().map(|worker| worker["accept_queue"].as_u64().expect("a number")).collect();
        queues.iter().sum::<u64>() >= clients
    });
    drop(stopped);
    for client in waiting {
        client.outcome().expect("an answer");
    }
    queues
}

#[test]
fn with_balance_queue_what_waits_is_answered_when_all_workers_die_at_once() {
    let addr = free_address();
    let options = "-n 2 --balance queue --ready 300ms";
    let mut service = Service::run_ready(options, &naive_with(addr, &["--non-blocking"]));
    let workers = service.workers();
    workers.iter().for_each(|worker| freeze(*worker));
    let waiting: Vec<Waiting> = (0..20).map(|_| Waiting::new(addr)).collect();
    for worker in workers {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker as i32), Signal::SIGKILL).expect("kill");
    }
    for client in waiting {
        client.outcome().expect("an answer");
    }
    service.stop();
}

#[test]
fn with_balance_queue_workers_share_a_queue_if_their_sockets_do_not_block() {
    let addr = free_address();
    let port = addr.port().to_string();
    let program = "const { REUSE_RUN_SLOT: slot } = process.env; require('http')\
                   .createServer((_, answer) => answer.end(`pid=${process.pid} generation=1 slot=${slot}`))\
                   .listen(process.argv[1], '127.0.0.1')";
    let node = ["node", "-e", program, &port].map(str::to_owned);
    let commands = [
        ("", &node[..], true),
        ("", &naive_with(addr, &["--non-blocking"]), true),
        ("", &naive(addr), false),
        (&format!("-l {addr} --ready 300ms"), &[server(), "--given".to_owned()], false),
    ];
    for (options, command, is_shared) in commands {
        let mut service = Service::run_ready(&format!("-n 2 --balance queue {options}"), command);
        let queues = queues(&service, addr, 20);
        match is_shared {
            true => assert_eq!(queues, [20, 20], "{command:?}"),
            false => assert_eq!(queues.iter().sum::<u64>(), 20, "{command:?}: {queues:?}"),
        }
        service.stop();
    }
}

#[test]
fn with_balance_queue_a_worker_that_comes_later_has_a_queue_of_its_own_until_the_next_reload() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --balance queue", &naive_with(addr, &["--non-blocking"]));
    run_words(&format!("scale 4 {}", service.pid())).assert_done("4 workers");
    let own = queues(&service, addr, 60);
    assert!(own[0] == own[1] && own[0] + own[2] + own[3] == 60, "{own:?}");
    assert!(own.iter().all(|length| *length < 60), "{own:?}");
    service.reload();
    assert_eq!(queues(&service, addr, 20), [20; 4]);
    service.stop();
}

/// Some servers shut a listener down before they close it.
#[test]
fn with_balance_queue_a_worker_that_shuts_its_listener_down_leaves_it_to_the_others() {
    let addr = free_address();
    let program = r#"
import os, select, signal, socket, sys, time
listener = socket.socket()
listener.setblocking(False)
def leave(number, frame):
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    os.write(1, b'shut down\n')
signal.signal(signal.SIGUSR1, leave)
listener.bind(('127.0.0.1', int(sys.argv[1])))
listener.listen(64)
body = 'pid={} generation={} slot={}\n'.format(
    os.getpid(), os.environ['REUSE_RUN_GENERATION'], os.environ['REUSE_RUN_SLOT'])
head = 'HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n'.format(len(body))
while listener.fileno() >= 0:
    try:
        select.select([listener], [], [], 0.1)
        client = listener.accept()[0]
    except (OSError, ValueError):
        continue
    client.setblocking(True)
    client.recv(65536)
    client.sendall((head + body).encode())
    client.close()
while True:
    time.sleep(60)
"#;
    let port = addr.port().to_string();
    let mut service = Service::run_ready("-n 3 --balance queue", &inline(program, &[&port]));
    let worker = service.workers()[0];
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker as i32), Signal::SIGUSR1).expect("signal");
    wait_until("the shutdown", DEADLINE, || service.out.count_of("shut down") == 1);
    wait_until("the others serve", DEADLINE, || {
        workers_where(&service, |_| true).len() == 3 && std::net::TcpStream::connect(addr).is_ok()
    });
    let load = load(addr);
    wait_for_answers(&load, 60);
    let report = load.stop();
    report.assert_nothing_failed();
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn a_wrong_value_of_balance_is_refused() {
    let outcome = run_words("--balance fair true");
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.err.contains("none of load, random, queue and client"), "{outcome:?}");
}
