//! `--ready /path`: each worker is asked itself before it gets a connection, and nobody else notices.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::thread;

use common::load::{Load, LoadOptions, number};
use common::{
    DEADLINE, Folder, Outcome, Service, answered_more, begin, free_address, free_port, inline, naive_with,
    python, run, send, serving, turn, wait_for_answers, wait_until,
};
use nix::sys::signal::Signal;
use socket2::SockAddr;

/// The app as a command. Without its packages (-S) Python starts several times as fast.
fn healthy(arguments: &[&str]) -> Vec<String> {
    let mut command = python("healthy.py", arguments);
    command.insert(1, "-S".to_owned());
    command
}

/// A service whose workers answer reuse-run as a file says.
struct Healthy {
    folder: Folder,
    service: Service,
}

impl Healthy {
    /// `healthy.py` at these addresses, where PATH stands for a path.
    #[track_caller]
    fn run(options: &str, addresses: &[&str]) -> Healthy {
        let healthy = Healthy::start(options, addresses);
        healthy.service.wait_until_ready();
        healthy
    }

    fn start(options: &str, addresses: &[&str]) -> Healthy {
        let folder = Folder::new();
        let (file, path) = (folder.path("health"), folder.path("socket"));
        let addresses =
            addresses.iter().map(|address| if *address == "PATH" { path.as_str() } else { address });
        let arguments: Vec<&str> = [file.as_str()].into_iter().chain(addresses).collect();
        let service = Service::run(options, &healthy(&arguments));
        Healthy { folder, service }
    }

    /// What the workers of a generation answer from now on.
    fn tell(&self, generation: u32, word: &str) {
        // In one step: a worker may read it at any time.
        let file = self.folder.write("next", word);
        std::fs::rename(file, self.folder.path(&format!("health-{generation}"))).expect("rename");
    }

    /// How often each process of a generation was asked and has found this word, since line `from` of the output.
    fn asked(&self, from: usize, generation: u32, word: &str) -> BTreeMap<u32, usize> {
        let part = format!(" generation={generation} ");
        let end = format!(" word={word}");
        let mut counts = BTreeMap::new();
        for line in self.service.out.all_from(from) {
            if line.text.starts_with("asked ") && line.text.contains(&part) && line.text.ends_with(&end) {
                *counts.entry(number(&line.text, "pid=").expect("a pid")).or_default() += 1;
            }
        }
        counts
    }

    /// Reloads under load to a generation that can't serve for a while. Asserts that meanwhile each of its 4 workers is asked
    /// again and again, and that none gets a client's request.
    #[track_caller]
    fn reload_to(&self, generation: u32, load: &Load, options: &str, shares: bool) {
        let workers = if shares { 1 } else { 4 };
        let have_answered = |from, generation| {
            let what = format!("the output of workers of generation {generation}");
            wait_until(&what, DEADLINE, || self.asked(from, generation, "200").len() >= workers);
        };
        have_answered(0, generation - 1);
        self.tell(generation, "503");
        let from = self.service.out.count();
        let reload = begin(&self.service, &format!("reload {options}"));
        wait_until("each new worker is asked three times", DEADLINE, || {
            let asked = self.asked(from, generation, "503");
            asked.len() >= workers && asked.values().all(|count| *count >= 3)
        });
        wait_for_answers(load, 200);
        assert!(!load.snapshot().generations.contains_key(&generation), "{:?}", load.snapshot().generations);
        self.tell(generation, "200");
        Outcome::of(reload).assert_done(&format!("4 workers of generation {generation}"));
        have_answered(from, generation);
        let all = self.service.out.all_from(from).into_iter().filter(|line| line.text.starts_with("asked "));
        let others = all.filter(|line| number(&line.text, "generation=") != Some(generation));
        assert_eq!(others.count(), 0, "no old worker is asked");
        answered_more(load);
        assert!(load.snapshot().generations.contains_key(&generation));
    }

    /// Reloads under load, to workers that answer so, and asserts that nobody notices.
    #[track_caller]
    fn reload(&self, addr: impl Into<SockAddr>, word: &str) -> Outcome {
        self.tell(2, word);
        let load = Load::start(LoadOptions::new(addr, 4).rate(200.0));
        answered_more(&load);
        let outcome = run(&self.service, "reload");
        answered_more(&load);
        load.stop().assert_nothing_failed();
        outcome
    }
}

/// How many reloads under load each row does; more by TEST_PROBE_RELOADS.
fn reloads() -> u32 {
    std::env::var("TEST_PROBE_RELOADS").map_or(3, |text| text.parse().expect("a number"))
}

/// Reloads a service under load; where PORT stands in `options` and `addresses` it is a free one.
#[track_caller]
fn assert_workers_are_asked_before_clients_reach_them(options: &str, addresses: &[&str], client: &str) {
    let _turn = turn();
    let (port, other) = (free_port().to_string(), free_port().to_string());
    let filled = |text: &str| text.replace("PORT", &port).replace("OTHER", &other);
    let addresses: Vec<String> = addresses.iter().map(|address| filled(address)).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let mut healthy = Healthy::run(&format!("-n 4 {}", filled(options)), &addresses);
    let shares = client == "PATH";
    let addr = match shares {
        true => SockAddr::unix(healthy.folder.path("socket")).expect("a path"),
        false => SockAddr::from(filled(client).parse::<SocketAddr>().expect("an address")),
    };
    let load = Load::start(LoadOptions::new(addr, 8));
    answered_more(&load);
    for generation in 2..2 + reloads() {
        healthy.reload_to(generation, &load, "", shares);
    }
    let report = load.stop();
    println!("{options} {addresses:?}: {report}");
    report.assert_nothing_failed();
    healthy.service.stop();
}

#[test]
fn workers_on_ipv4_are_asked_before_clients_reach_them() {
    assert_workers_are_asked_before_clients_reach_them(
        "--ready /healthz",
        &["0.0.0.0:PORT"],
        "127.0.0.1:PORT",
    );
}

#[test]
fn workers_on_one_address_are_asked_before_clients_reach_them() {
    assert_workers_are_asked_before_clients_reach_them(
        "--ready /healthz",
        &["127.0.0.2:PORT"],
        "127.0.0.2:PORT",
    );
}

#[test]
fn workers_on_ipv6_are_asked_before_clients_reach_them() {
    for address in ["[::1]:PORT", "v6only:PORT"] {
        assert_workers_are_asked_before_clients_reach_them("--ready /healthz", &[address], "[::1]:PORT");
    }
}

#[test]
fn workers_on_both_families_are_asked_before_clients_reach_them() {
    for client in ["127.0.0.1:PORT", "[::1]:PORT"] {
        assert_workers_are_asked_before_clients_reach_them("--ready /healthz", &["[::]:PORT"], client);
    }
}

#[test]
fn workers_on_a_unix_socket_are_asked_before_clients_reach_them() {
    assert_workers_are_asked_before_clients_reach_them("--ready /healthz", &["PATH"], "PATH");
}

#[test]
fn workers_on_two_ports_are_asked_before_clients_reach_either() {
    for client in ["127.0.0.1:PORT", "127.0.0.1:OTHER"] {
        let addresses = ["127.0.0.1:PORT", "127.0.0.1:OTHER"];
        assert_workers_are_asked_before_clients_reach_them("--ready :OTHER/healthz", &addresses, client);
    }
}

#[test]
fn workers_that_are_given_a_socket_are_asked_before_clients_reach_them() {
    for options in ["", "--no-intercept"] {
        let options = format!("--ready /healthz -l 127.0.0.1:PORT {options}");
        assert_workers_are_asked_before_clients_reach_them(&options, &["given"], "127.0.0.1:PORT");
    }
}

#[test]
fn with_any_balance_workers_are_asked_before_clients_reach_them() {
    for balance in ["random", "load"] {
        let options = format!("--ready /healthz --balance {balance}");
        assert_workers_are_asked_before_clients_reach_them(&options, &["127.0.0.1:PORT"], "127.0.0.1:PORT");
    }
}

/// What a worker does, and what is said of it.
const FAILURES: [(&str, &str); 6] = [
    (
        "503",
        "answered GET /healthz with 503 Service Unavailable, and was not ready within 10s (see --ready-timeout)",
    ),
    ("hangs", "did not answer GET /healthz within 1s, and was not ready within 10s"),
    ("closes", "closed the connection without an answer to GET /healthz (a TLS port?"),
    ("garbage", "answered GET /healthz with something that is not HTTP/1 (a TLS port?"),
    ("half", "did not end the header of its answer to GET /healthz within 1s"),
    ("endless", "answered GET /healthz with a header of more than 16 KiB"),
];

#[test]
fn a_replacement_that_does_not_answer_is_named_with_what_it_did_and_gets_no_connection() {
    let _turn = turn();
    let assert_named = |word: &str, said: &str| {
        let addr = free_address();
        let healthy = Healthy::run("-n 2 --ready /healthz --ready-timeout 10s", &[&addr.to_string()]);
        let outcome = healthy.reload(addr, word);
        let serves = "2 workers of generation 1 serve on";
        outcome.assert_failed(&["the reload failed: worker ", ", generation 2) ", said, serves]);
        assert_eq!(serving(&healthy.service), [(0, 1), (1, 1)]);
    };
    thread::scope(|scope| {
        for (word, said) in FAILURES {
            scope.spawn(move || assert_named(word, said));
        }
    });
}

#[test]
fn a_replacement_that_accepts_nothing_is_named_and_the_old_workers_serve() {
    let _turn = turn();
    let (addr, folder) = (free_address(), Folder::new());
    let deaf = folder.path("deaf");
    let options = "-n 2 --ready / --ready-timeout 6s";
    let mut service = Service::run_ready(options, &naive_with(addr, &["--deaf-while", &deaf]));
    folder.raise("deaf");
    let load = Load::start(LoadOptions::new(addr, 4));
    answered_more(&load);
    run(&service, "reload").assert_failed(&["did not answer GET / within 1s", "generation 1 serve on"]);
    folder.lower("deaf");
    run(&service, "reload").assert_done("2 workers of generation 3");
    answered_more(&load);
    load.stop().assert_nothing_failed();
    service.stop();
}

#[test]
fn a_port_that_speaks_tls_is_called_so() {
    let program = "
import socket, ssl, sys, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('tests/apps/tls/cert.pem', 'tests/apps/tls/key.pem')
def serve(connection):
    try: context.wrap_socket(connection, server_side=True)
    except (ssl.SSLError, OSError): connection.close()
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))
while True: threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()";
    let port = free_port().to_string();
    let mut service = Service::run("--ready / --ready-timeout 8s", &inline(program, &[&port]));
    assert_eq!(service.wait_end().code(), Some(1));
    service.wait_for_line("(a TLS port? --ready /path speaks plain HTTP), and was not ready within 8s");
}

#[test]
fn a_replacement_that_serves_after_a_while_a_long_answer_and_a_redirect_are_answers() {
    let _turn = turn();
    for word in ["503-for-2s", "10MB", "301"] {
        let addr = free_address();
        let mut healthy = Healthy::run("-n 2 --ready /healthz", &[&addr.to_string()]);
        healthy.reload(addr, word).assert_done("2 workers of generation 2");
        healthy.service.stop();
    }
}

#[test]
fn a_first_generation_that_does_not_answer_ends_reuse_run_with_1() {
    let addr = free_address().to_string();
    let folder = Folder::new();
    folder.write("health-1", "503");
    let command = healthy(&[&folder.path("health"), &addr]);
    let mut service = Service::run("-n 2 --ready /healthz --ready-timeout 8s", &command);
    assert_eq!(service.wait_end().code(), Some(1));
    service.wait_for_line("answered GET /healthz with 503 Service Unavailable, and was not ready within 8s");
}

#[test]
fn each_batch_is_asked_before_it_serves() {
    let _turn = turn();
    let addr = free_address();
    let mut healthy = Healthy::run("-n 4 --ready /healthz --batch 2", &[&addr.to_string()]);
    let load = Load::start(LoadOptions::new(addr, 8));
    answered_more(&load);
    for generation in 2..=4 {
        let from = healthy.service.out.count();
        run(&healthy.service, "reload").assert_done(&format!("4 workers of generation {generation}"));
        wait_until("all have answered", DEADLINE, || healthy.asked(from, generation, "200").len() == 4);
        assert!(healthy.asked(from, generation, "200").values().all(|count| *count == 1), "each once");
    }
    healthy.tell(5, "503");
    let reload = begin(&healthy.service, "reload");
    wait_until("the first batch is asked", DEADLINE, || healthy.asked(0, 5, "503").len() == 2);
    run(&healthy.service, "reload --abort").assert_done("aborted; 4 workers of generation 4 serve on");
    Outcome::of(reload).assert_failed(&["aborted"]);
    load.stop().assert_nothing_failed();
    healthy.service.stop();
}

#[test]
fn a_canary_that_stops_answering_is_taken_back_and_one_that_answers_is_kept() {
    let _turn = turn();
    for balance in ["load", "random"] {
        let addr = free_address();
        let options = format!("-n 4 --ready /healthz --balance {balance}");
        let mut healthy = Healthy::run(&options, &[&addr.to_string()]);
        let load = Load::start(LoadOptions::new(addr, 8));
        let reload = begin(&healthy.service, "reload --canary 30 --for 10m");
        healthy.service.wait_for_line("generation 2 gets 30 % of new connections");
        wait_until("each canary is asked twice more", DEADLINE, || {
            let asked = healthy.asked(0, 2, "200");
            asked.len() == 4 && asked.values().all(|count| *count >= 3)
        });
        wait_until("the canary answers clients", DEADLINE, || load.snapshot().generations.contains_key(&2));
        healthy.tell(2, "503");
        let said = "answered GET /healthz with 503 Service Unavailable, 2 times in a row";
        Outcome::of(reload).assert_failed(&[said, "4 workers of generation 1 serve on"]);
        assert!(healthy.asked(0, 2, "503").values().all(|count| *count <= 2), "each fails twice at most");
        let from = healthy.service.out.count();
        run(&healthy.service, "reload --canary 30 --for 2500ms").assert_done("4 workers of generation 3");
        wait_until("each has answered twice", DEADLINE, || {
            let asked = healthy.asked(from, 3, "200");
            asked.len() == 4 && asked.values().all(|count| *count >= 2)
        });
        answered_more(&load);
        load.stop().assert_nothing_failed();
        healthy.service.stop();
    }
}

#[test]
fn servers_that_shut_their_listeners_down_at_once_are_replaced_again_and_again() {
    let _turn = turn();
    for options in ["", "--batch 2"] {
        let addr = free_address();
        let options = format!("-n 4 --ready / --ready-timeout 10s {options}");
        let mut service = Service::run_ready(&options, &naive_with(addr, &["--shutdown-on-int"]));
        let load = Load::start(LoadOptions::new(addr, 8));
        answered_more(&load);
        for generation in 2..=6 {
            run(&service, "reload").assert_done(&format!("4 workers of generation {generation}"));
            answered_more(&load);
        }
        load.stop().assert_nothing_failed();
        service.stop();
    }
}

#[test]
fn workers_that_start_beside_others_are_asked_as_well() {
    let addr = free_address();
    let mut healthy = Healthy::run("-n 1 --ready /healthz", &[&addr.to_string()]);
    run(&healthy.service, "scale 3").assert_done("3 workers of generation 1");
    wait_until("all have answered", DEADLINE, || healthy.asked(0, 1, "200").len() == 3);
    healthy.tell(1, "503");
    let worker = healthy.service.workers()[0];
    send(worker, Signal::SIGKILL);
    wait_until("its successor is asked", DEADLINE, || !healthy.asked(0, 1, "503").is_empty());
    assert_eq!(serving(&healthy.service).len(), 3);
    healthy.tell(1, "200");
    healthy.service.wait_for_line("is ready, a replacement");
    healthy.service.stop();
}

#[test]
fn without_interception_and_given_sockets_no_worker_can_be_asked() {
    let mut service = Service::run("--no-intercept --ready /healthz", &["sleep", "1000"]);
    assert_eq!(service.wait_end().code(), Some(1));
    service.wait_for_line(
        "can't start: workers are not intercepted, so a request can't be sent to one of them alone: use -l, or another --ready",
    );
}
