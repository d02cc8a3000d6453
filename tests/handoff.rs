//! The handoff from one generation to the next, under load and with real programs: no request fails.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use common::load::{self, Kind, Load, LoadOptions, Mode};
use common::{
    DEADLINE, Deployment, Service, answered_more, app, free_address, get, get_path, inline, naive,
    naive_with, node_app, own_network, python, reload_under_load, run, run_words, send, server, turn,
    wait_until,
};
use nix::sys::signal::Signal;

/// Reloads under load and stops reuse-run. Returns the load's report.
#[track_caller]
fn reload_and_stop(mut service: Service, load: LoadOptions, times: u32) -> load::Report {
    let report = reload_under_load(&service, load, times);
    service.stop();
    report
}

#[test]
fn an_express_app_loses_no_request_in_10_reloads_of_4_workers() {
    let _turn = turn();
    own_network();
    let service = Service::run_ready("-n 4", &["node", &node_app("express/app.js")]);
    let report = reload_and_stop(service, LoadOptions::new(SocketAddr::from(([127, 0, 0, 1], 3000)), 32), 10);
    assert!(report.counts.pids.len() >= 11, "every generation has answered: {:?}", report.counts.pids);
}

#[test]
fn an_express_app_that_says_ready_loses_no_request_in_5_reloads() {
    let _turn = turn();
    own_network();
    let service = Service::run_ready("-n 2 --ready notify", &["node", &node_app("express-ready/app.js")]);
    reload_and_stop(service, LoadOptions::new(SocketAddr::from(([127, 0, 0, 1], 3000)), 16), 5);
}

#[test]
fn a_naive_server_loses_no_request_in_50_reloads_at_full_speed() {
    let _turn = turn();
    let addr = free_address();
    let service = Service::run_ready("-n 2", &naive(addr));
    let report = reload_and_stop(service, LoadOptions::new(addr, 16), 50);
    report.assert_generations(1..=51);
    assert_eq!(report.counts.slots.keys().copied().collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn pythons_threading_http_server_loses_no_request_in_10_reloads() {
    let _turn = turn();
    let addr = free_address();
    let service = Service::run_ready("-n 2", &python("naive.py", &[&addr.port().to_string()]));
    let report = reload_and_stop(service, LoadOptions::new(addr, 8), 10);
    assert_eq!(report.counts.generations.len(), 11, "{:?}", report.counts.generations);
}

#[test]
fn a_python_server_with_a_graceful_stop_loses_no_request_in_10_reloads() {
    let _turn = turn();
    let addr = free_address();
    let service = Service::run_ready("-n 2", &python("polite.py", &[&addr.port().to_string()]));
    reload_and_stop(service, LoadOptions::new(addr, 8), 10);
}

#[test]
fn a_node_server_with_a_graceful_stop_loses_no_keep_alive_request_at_full_speed() {
    let _turn = turn();
    let addr = free_address();
    let port = addr.port().to_string();
    let service = Service::run_ready("-n 2", &["node", &app("node/polite.js"), &port]);
    let report = reload_and_stop(
        service,
        LoadOptions::new(addr, 16).mode(Mode::KeepAlive { think: Duration::ZERO }),
        10,
    );
    assert_eq!(report.counts.generations.len(), 11, "{:?}", report.counts.generations);
}

#[test]
fn the_switch_is_atomic() {
    let _turn = turn();
    let addr = free_address();
    let service = Service::run_ready("-n 4", &naive(addr));
    let report = reload_and_stop(service, LoadOptions::new(addr, 16).record(), 20);
    report.assert_switched_atomically(21);
}

#[test]
fn a_replacement_that_listens_but_never_says_ready_gets_no_connection() {
    let addr = free_address();
    let deployment = Deployment::new(&format!("--listen {addr} --ready-after 0"));
    // Long enough for both to listen in an emulated machine (scripts/kernels).
    let mut service = Service::run_ready("-n 2 --ready notify --ready-timeout 10s", &deployment.command());
    let load = Load::start(LoadOptions::new(addr, 8).path("/?id={id}"));
    wait_until("answers before the reload", DEADLINE, || load.snapshot().answered > 0);

    deployment.replace(&format!("--listen {addr}"));
    let log = service.failing_reload();
    assert!(log.contains("not ready within 10s"), "{log}");
    assert_eq!(service.out.count_of("listening "), 4, "both replacements listened:\n{}", service.out.text());

    answered_more(&load);
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_failed();
    report.assert_generations([1]);
    service.stop();
}

#[test]
fn a_first_generation_that_listens_but_has_not_said_ready_gets_no_connection_yet() {
    let addr = free_address();
    let deployment = Deployment::new(&format!("--listen {addr} --ready-after 2000"));
    let mut service = Service::run("-n 2 --ready notify", &deployment.command());
    wait_until("both workers listen", DEADLINE, || service.out.count_of("listening ") == 2);
    // The client connects before any worker is ready. The kernel drops its SYN until then and the client sends it
    // again. The server prints `begun` as soon as it has accepted, so the order of the lines shows which came first.
    let answer = load::get(addr, "/?id=early", Duration::from_secs(60)).expect("an answer once ready");
    assert!(answer.body.contains("work=early"), "{}", answer.body);
    service.stop();
    let lines: Vec<String> = service.out.all().into_iter().map(|line| line.text).collect();
    let position = |text: &str| lines.iter().position(|line| line == text).unwrap_or(usize::MAX);
    assert!(position("ready") < position("begun early"), "{lines:#?}");
}

#[test]
fn a_worker_that_shuts_its_own_listener_down_loses_no_request() {
    let _turn = turn();
    let addr = free_address();
    let service = Service::run_ready("-n 2", &naive_with(addr, &["--shutdown-on-int"]));
    let report = reload_and_stop(service, LoadOptions::new(addr, 16).record(), 20);
    report.assert_switched_atomically(21);
}

/// Workers that leave together shut their listeners down in an unknown order, and free sockets take their places in the kernel's
/// array. The next workers get these sockets, of which only some get connections later.
#[test]
fn the_places_of_those_who_stay_are_known_although_many_shut_their_listeners_down_at_once() {
    let _turn = turn();
    let addr = free_address();
    let both_families = SocketAddr::from((Ipv6Addr::UNSPECIFIED, free_address().port()));
    assert_places_are_known(addr, addr, 2);
    assert_places_are_known(both_families, SocketAddr::from((Ipv6Addr::LOCALHOST, both_families.port())), 1);
}

#[track_caller]
fn assert_places_are_known(listener: SocketAddr, clients_target: SocketAddr, times: u32) {
    let mut service = Service::run_ready("-n 8", &naive_with(listener, &["--shutdown-on-int"]));
    let load = Load::start(LoadOptions::new(clients_target, 16).record());
    for _ in 0..times {
        for words in ["reload", "reload", "scale +3", "scale 2", "scale 8"] {
            run(&service, words).assert_done("");
        }
        run_words(&format!("recycle --pid {} --all", service.pid())).assert_done("");
    }
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn idle_keep_alive_connections_do_not_hold_up_the_drain_and_no_request_in_progress_is_cut() {
    // A request may arrive between the last check of its connection and the stop signal. The server reads it and dies.
    // Nothing outside the server can prevent that, so these requests are counted apart.
    const JUST_ARRIVED: Duration = Duration::from_millis(100);

    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --drain 10s", &naive_with(addr, &["--keep-alive"]));
    let think = Duration::from_secs(1);
    let load =
        Load::start(LoadOptions::new(addr, 8).mode(Mode::KeepAlive { think }).path("/sleep/200?id={id}"));
    wait_until("every client has an answer", DEADLINE, || load.snapshot().answered >= 8);
    for _ in 0..5 {
        let took = service.reload();
        assert!(took < Duration::from_secs(6), "the old workers ended long before 10 s: {took:?}");
        let answered = load.snapshot().answered;
        wait_until("answers between two reloads", DEADLINE, || load.snapshot().answered >= answered + 8);
    }
    let report = load.stop();
    service.stop();

    let mut begun: HashMap<String, Instant> = HashMap::new();
    for line in service.out.all() {
        if let Some(id) = line.text.strip_prefix("begun ") {
            begun.insert(id.to_owned(), line.at);
        }
    }
    let (mut cut, mut just_arrived, mut never_read) = (Vec::new(), 0, 0);
    for failure in &report.failures {
        assert!(failure.on_reused_connection, "a request on a new connection failed: {failure:?}");
        assert!(matches!(failure.kind, Kind::EndOfFile | Kind::Reset), "{failure:?}");
        match begun.get(failure.id.as_deref().expect("every request has an id")) {
            None => never_read += 1,
            Some(at) if failure.at.saturating_duration_since(*at) < JUST_ARRIVED => just_arrived += 1,
            Some(_) => cut.push(failure),
        }
    }
    println!("{report}\nnever read: {never_read}, just arrived: {just_arrived}");
    assert!(cut.is_empty(), "cut in progress: {cut:#?}");
    assert!(never_read + just_arrived <= 4, "more than a rare race: {report}");
}

#[test]
fn a_request_of_3_s_that_began_before_the_reload_is_answered_in_full_by_the_old_worker() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let slow = thread::spawn(move || get_path(addr, "/sleep/3000?id=slow"));
    service.wait_for_output("begun slow");
    service.signal(Signal::SIGUSR2);
    let switched = service.wait_for_line("generation 2 serves");
    assert_eq!(get(addr).generation, Some(2));

    let answer = slow.join().expect("the slow request");
    assert_eq!(answer.origin.generation, Some(1));
    assert!(answer.end > switched.at, "it was in progress during the switch");
    let done = service.wait_for_line("reload done");
    assert!(done.at >= answer.end, "the reload ended after the answer");
    service.stop();
}

#[test]
fn a_request_at_a_foreign_listener_on_another_address_of_the_port_does_not_delay_a_reload() {
    let addr = free_address();
    let foreign = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 2), addr.port())).expect("a foreign listener");
    let mut client = TcpStream::connect(foreign.local_addr().expect("its address")).expect("connect");
    let (mut connection, _) = foreign.accept().expect("accept");
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("write");
    assert!(connection.read(&mut [0; 100]).expect("read") > 0);
    let mut service = Service::run_ready("-n 2", &naive(addr));
    service.reload();
    assert!(!service.log.text().contains("was not seen idle"), "{}", service.log.text());
    service.stop();
    drop((connection, client)); // the request was under way until now
}

/// Two listeners on one port, of which the second is shut down when the first request begins.
const TWO_LISTENERS: &str = r#"
import os, select, socket, sys, time
def listen():
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(('127.0.0.1', int(sys.argv[1])))
    listener.listen(8)
    return listener
kept, other = listen(), listen()
while True:
    ready, _, _ = select.select([kept] + ([other] if other else []), [], [])
    connection, _ = ready[0].accept()
    connection.recv(65536)
    if other:
        other.shutdown(socket.SHUT_RD)
        other = None
        os.write(1, b'begun\n')
        time.sleep(2)
    body = b'pid=%d\n' % os.getpid()
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n' % len(body) + body)
    connection.close()
"#;

#[test]
fn a_request_is_answered_by_an_old_worker_that_has_closed_another_listener_on_the_same_port() {
    let addr = free_address();
    let command = inline(TWO_LISTENERS, &[&addr.port().to_string()]);
    let mut service = Service::run_ready("-n 1", &command);
    let old = service.workers()[0];
    let slow = thread::spawn(move || get_path(addr, "/"));
    service.wait_for_output("begun");
    service.reload();
    let answer = slow.join().expect("the slow request");
    assert!(answer.body.contains(&format!("pid={old}")), "{answer:?}");
    service.stop();
}

#[test]
fn when_a_new_version_listens_on_another_port_the_old_port_is_refused() {
    let (old, new) = (free_address(), free_address());
    let deployment = Deployment::new(&format!("--listen {old} --ready-after 0"));
    let mut service = Service::run_ready("-n 2 --ready notify", &deployment.command());
    assert_eq!(get(old).generation, Some(1));

    deployment.replace(&format!("--listen {new} --ready-after 0"));
    let reload = || run(&service, "reload --ports-may-change").assert_done("2 workers of generation");
    reload();
    for _ in 0..10 {
        assert_eq!(get(new).generation, Some(2));
    }
    wait_until(
        "the old port is refused",
        DEADLINE,
        || matches!(load::get(old, "/", Duration::from_secs(2)), Err(failure) if failure.kind == Kind::Refused),
    );

    // And back: a closed address can be opened again.
    deployment.replace(&format!("--listen {old} --ready-after 0"));
    reload();
    for _ in 0..10 {
        assert_eq!(get(old).generation, Some(3));
    }
    service.stop();
}

#[test]
fn after_200_reloads_there_are_no_more_fds_processes_or_memory() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let mut fds_after_2 = 0;
    let mut memory_after_20 = 0;
    for reload in 1..=200 {
        service.reload();
        match reload {
            2 => fds_after_2 = service.fds(),
            20 => memory_after_20 = service.memory_kib(),
            _ => {}
        }
    }
    assert_eq!(get(addr).generation, Some(201));
    assert_eq!(service.log.count_of("left behind"), 0, "a worker that starts is taken for somebody else");
    assert!(fds_after_2 > 0);
    // The fds of an old worker may be closed a moment after its end is logged.
    wait_until("no more file descriptors after 200 reloads than after 2", DEADLINE, || {
        service.fds() <= fds_after_2
    });
    // Less than a KiB for each reload: some pages of the allocator, but nothing that each reload keeps.
    let memory = service.memory_kib();
    assert!(memory <= memory_after_20 + 128, "KiB after 20 reloads: {memory_after_20}, after 200: {memory}");
    assert_eq!(service.zombies(), [0u32; 0], "zombies");
    let mut workers = service.workers();
    workers.sort_unstable();
    assert_eq!(workers.len(), 2, "workers: {workers:?}");
    assert_eq!(service.descendants(), workers, "orphans");
    service.stop();
}

#[test]
fn a_worker_that_dies_is_replaced_in_its_slot_and_no_connection_is_refused() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 2", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 8));
    for _ in 0..5 {
        answered_more(&load);
        let before = service.workers();
        let from = service.log.count();
        let victim = get(addr);
        let pid = victim.pid.expect("a pid");
        send(pid, Signal::SIGKILL);
        service.wait_for_line_after(from, "SIGKILL");
        wait_until("a replacement in the same slot answers", DEADLINE, || {
            let origin = get_or_none(addr);
            origin.is_some_and(|origin| {
                origin.slot == victim.slot && origin.pid.is_some_and(|pid| !before.contains(&pid))
            })
        });
    }
    let report = load.stop();
    println!("{report}");
    assert!(report.counts.answered > 0);
    assert_eq!(report.count(Kind::Refused), 0, "{report}");
    assert_eq!(report.count(Kind::TimeOut), 0, "the replacement serves the accept queue: {report}");
    report.assert_generations([1]);
    // A reload works after that.
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
}

#[test]
fn when_the_only_worker_dies_no_connection_is_refused() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1", &naive(addr));
    let load = Load::start(LoadOptions::new(addr, 4));
    for _ in 0..3 {
        wait_until("an answer", DEADLINE, || get_or_none(addr).is_some());
        let victim = service.workers();
        assert_eq!(victim.len(), 1);
        send(victim[0], Signal::SIGKILL);
        wait_until("its replacement answers", DEADLINE, || {
            get_or_none(addr).is_some_and(|origin| origin.pid.is_some_and(|pid| pid != victim[0]))
        });
    }
    let report = load.stop();
    println!("{report}");
    assert_eq!(report.count(Kind::Refused), 0, "{report}");
    assert_eq!(report.count(Kind::TimeOut), 0, "{report}");
    service.stop();
}

#[test]
fn who_comes_when_the_only_worker_has_died_is_answered_by_one_that_takes_as_long_to_start() {
    let addr = free_address();
    let slow = [&["sh", "-c", "sleep 3; exec \"$@\"", "sh"].map(str::to_owned)[..], &naive(addr)].concat();
    let mut service = Service::run_ready("-n 1", &slow);
    let from = service.log.count();
    let victim = service.workers()[0];
    send(victim, Signal::SIGKILL);
    service.wait_for_line_after(from, "SIGKILL");
    assert_ne!(get(addr).pid, Some(victim));
    service.stop();
}

/// Who answers. `None` if the connection is cut, as it may be when a worker dies.
fn get_or_none(addr: SocketAddr) -> Option<load::Origin> {
    match load::get(addr, "/", Duration::from_secs(15)) {
        Ok(answer) => Some(answer.origin),
        Err(failure) if failure.kind == Kind::Refused => panic!("refused: {failure:?}"),
        Err(_) => None,
    }
}

#[test]
fn clients_that_ask_again_before_their_answer_is_acknowledged_do_not_hold_up_the_drain() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --drain 100s", &naive(addr));
    // The client's kernel delays an acknowledgement by up to 40 ms, to send it with the next request.
    let mode = Mode::KeepAlive { think: Duration::from_millis(20) };
    let load = Load::start(LoadOptions::new(addr, 4).mode(mode));
    wait_until("answers", DEADLINE, || load.snapshot().answered > 20);
    let took = service.reload();
    assert!(took < Duration::from_secs(50), "{took:?}");
    assert_eq!(service.log.count_of("was not seen idle"), 0, "{}", service.log.text());
    load.stop(); // a server without a graceful stop may cut some; other tests count these
    service.stop();
}

/// A keep-alive connection to a worker.
struct Kept {
    stream: TcpStream,
    worker: u32,
}

impl Kept {
    /// A connection to the worker in this slot.
    fn of_slot(slot: u32, addr: SocketAddr) -> Self {
        let mut kept = None;
        wait_until("a connection to the worker", DEADLINE, || {
            let mut stream = TcpStream::connect(addr).expect("connect");
            stream.set_read_timeout(Some(DEADLINE)).expect("set a timeout");
            let origin = ask(&mut stream);
            kept = (origin.slot == Some(slot))
                .then(|| Self { stream, worker: origin.pid.expect("the worker's number") });
            kept.is_some()
        });
        kept.unwrap()
    }

    fn is_open(&mut self) -> bool {
        self.stream.set_nonblocking(true).expect("set non-blocking");
        let open = self.stream.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        self.stream.set_nonblocking(false).expect("set blocking");
        open
    }
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n";

fn ask(stream: &mut TcpStream) -> load::Origin {
    stream.write_all(REQUEST).expect("ask");
    answer(stream)
}

fn answer(stream: &mut TcpStream) -> load::Origin {
    let mut text = Vec::new();
    let mut chunk = [0; 1024];
    // The body is one line.
    while !text.ends_with(b"\n") || text.ends_with(b"\r\n") {
        let count = stream.read(&mut chunk).expect("an answer");
        assert!(count > 0, "no end in the answer: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&chunk[..count]);
    }
    load::Origin::of(&String::from_utf8_lossy(&text))
}

/// A client without a pause: its last request follows in the clock tick of the answer before it, and takes long. The kernel's
/// times can't tell which of the two came last.
#[test]
fn a_long_request_right_after_an_answer_is_answered_at_a_reload_and_at_a_stop() {
    let _turn = turn();
    for signal in [Signal::SIGUSR2, Signal::SIGTERM] {
        let addr = free_address();
        let mut service = Service::run_ready("-n 2", &naive_with(addr, &["--keep-alive"]));
        let client = move || {
            let mut stream = TcpStream::connect(addr).expect("connect");
            stream.set_read_timeout(Some(DEADLINE)).expect("set a timeout");
            for _ in 0..20 {
                ask(&mut stream);
            }
            stream.write_all(b"GET /sleep/2000?id=long HTTP/1.1\r\nHost: test\r\n\r\n").expect("ask");
            answer(&mut stream)
        };
        let clients = [(); 8].map(|()| thread::spawn(client));
        wait_until("the long requests", DEADLINE, || service.out.count_of("begun long") == 8);
        service.signal(signal);
        for client in clients {
            client.join().expect("the long request was answered");
        }
        if signal == Signal::SIGUSR2 {
            service.wait_for_line("reload done");
            service.stop();
        } else {
            assert_eq!(service.wait_end().code(), Some(0));
        }
    }
}

/// Two clock ticks of the slowest kernels.
const TICKS: Duration = Duration::from_millis(20);

/// Two workers that get their stop signals one after the other.
struct Pair {
    service: Service,
    addr: SocketAddr,
    reloads: usize,
}

impl Pair {
    /// The first worker gets this option, if any; the second ignores SIGINT.
    fn start(option: &str) -> Self {
        let addr = free_address();
        let text = format!(
            r#"[ "$REUSE_RUN_SLOT" = 0 ] && set -- "$@" {option} || set -- "$@" --ignore-int; exec "$0" "$@""#
        );
        let command = ["sh", "-c", &text, &server(), "--listen", &addr.to_string(), "--keep-alive"];
        let service = Service::run_ready("-n 2 --idle-after 0s --drain 1h --stop-timeout 1h", &command);
        Self { service, addr, reloads: 0 }
    }

    /// Reloads. Returns whether an idle connection of the second worker, which closes nothing itself, is still open after
    /// the stop signal.
    fn is_open_after_a_reload(&mut self) -> bool {
        let mut idle = Kept::of_slot(0, self.addr);
        let mut busy = Kept::of_slot(1, self.addr);
        thread::sleep(TICKS);
        let (begin, end) = REQUEST.split_at(10);
        busy.stream.write_all(begin).expect("begin to ask");
        self.service.signal(Signal::SIGUSR2);
        assert_eq!(idle.stream.read(&mut [0]).expect("the end of the first worker's connection"), 0);
        busy.stream.write_all(end).expect("ask");
        assert_eq!(answer(&mut busy.stream).pid, Some(busy.worker));
        self.reloads += 1;
        let ignored = || self.service.out.count_of("ignored SIGINT") == self.reloads;
        wait_until("the signal", DEADLINE, ignored);
        let is_open = busy.is_open();
        send(busy.worker, Signal::SIGKILL);
        let done = || self.service.log.count_of("reload done") == self.reloads;
        wait_until("the reload's end", DEADLINE, done);
        is_open
    }
}

#[test]
fn when_the_signal_kills_one_worker_idle_connections_of_the_others_are_closed_before_it() {
    let _turn = turn();
    for option in ["", "--die-of-int 100"] {
        let mut pair = Pair::start(option);
        assert!((0..3).all(|_| !pair.is_open_after_a_reload()), "{option}");
    }
}

#[test]
fn when_one_worker_handles_the_signal_idle_connections_of_the_others_are_left_open() {
    let _turn = turn();
    let mut pair = Pair::start("--exit-on-int");
    assert!([(); 3].iter().all(|()| pair.is_open_after_a_reload()));
}

#[test]
fn a_worker_that_handles_the_signal_keeps_its_idle_connections() {
    let _turn = turn();
    let addr = free_address();
    let command = naive_with(addr, &["--keep-alive", "--ignore-int"]);
    let service = Service::run_ready("-n 2 --idle-after 0s --drain 1h --stop-timeout 1h", &command);
    let mut kept = [0, 1].map(|slot| Kept::of_slot(slot, addr));
    service.signal(Signal::SIGUSR2);
    wait_until("both signals", DEADLINE, || service.out.count_of("ignored SIGINT") == 2);
    for kept in &mut kept {
        assert!(kept.is_open());
        assert_eq!(ask(&mut kept.stream).pid, Some(kept.worker));
        send(kept.worker, Signal::SIGKILL);
    }
    service.wait_for_line("reload done");
}
