//! `--balance client`: each client address has its worker.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::load::Origin;
use common::{
    DEADLINE, Lines, Outcome, Service, Waiting, begin, free_address, free_port, freeze, naive, node_app,
    own_network, run, send, serving, turn, wait_until, workers_where,
};
use nix::sys::signal::Signal;

/// The origin of the answer to a client.
#[track_caller]
fn ask(client: IpAddr, server: SocketAddr) -> Origin {
    Waiting::from(client, server).outcome().expect("an answer")
}

#[track_caller]
fn slot_of(client: IpAddr, server: SocketAddr) -> u32 {
    ask(client, server).slot.expect("a slot")
}

/// So many addresses of loopback, in many networks.
fn loopback(count: u32) -> Vec<IpAddr> {
    (0..count).map(|n| Ipv4Addr::from(0x7f00_0102 + n * 0x0203).into()).collect()
}

/// Clients, and the slot of the worker that each has.
struct Clients {
    server: SocketAddr,
    slots: BTreeMap<IpAddr, u32>,
}

impl Clients {
    /// Asks from each address.
    #[track_caller]
    fn new(clients: impl IntoIterator<Item = IpAddr>, server: SocketAddr) -> Clients {
        let slots = clients.into_iter().map(|client| (client, slot_of(client, server))).collect();
        Clients { server, slots }
    }

    /// Asks again from each address.
    #[track_caller]
    fn again(&self) -> Clients {
        Clients::new(self.slots.keys().copied(), self.server)
    }

    fn of(&self, slot: u32) -> Vec<IpAddr> {
        let of_slot = self.slots.iter().filter(|(_, other)| **other == slot);
        of_slot.map(|(client, _)| *client).collect()
    }

    /// Asks again from each address whose worker has another slot, and asserts that it still has it.
    #[track_caller]
    fn assert_others_stay(&self, slot: u32) {
        for (client, other) in self.slots.iter().filter(|(_, other)| **other != slot) {
            assert_eq!(slot_of(*client, self.server), *other, "{client}");
        }
    }

    #[track_caller]
    fn assert_all_stay(&self) {
        assert_eq!(self.again().slots, self.slots);
    }

    /// Asserts that each of so many workers has a share of the clients.
    #[track_caller]
    fn assert_spread_over(&self, workers: u32) {
        let fair = self.slots.len() / workers as usize;
        let counts: Vec<usize> = (0..workers).map(|slot| self.of(slot).len()).collect();
        assert_eq!(counts.iter().sum::<usize>(), self.slots.len());
        assert!(counts.iter().all(|count| (fair / 2..fair * 2).contains(count)), "{counts:?}");
    }
}

/// So many workers with 100 clients.
fn started(workers: u32) -> (Service, Clients) {
    let server = free_address();
    let service = Service::run_ready(&format!("-n {workers} --balance client"), &naive(server));
    let clients = Clients::new(loopback(100), server);
    clients.assert_spread_over(workers);
    (service, clients)
}

fn pid_of(service: &Service, slot: u32) -> u32 {
    let workers = workers_where(service, |worker| worker["slot"] == slot && worker["serves"] == true);
    workers[0]["pid"].as_u64().expect("a pid") as u32
}

#[test]
fn all_connections_of_a_client_reach_one_worker_and_each_worker_has_its_share_of_the_clients() {
    let (mut service, clients) = started(4);
    for _ in 0..5 {
        clients.assert_all_stay();
    }
    service.stop();
}

#[test]
fn clients_over_ipv6_and_ipv4_of_one_listener_keep_their_workers() {
    own_network();
    let route = Command::new("ip").args("-6 route add local 2001:db8::/32 dev lo".split(' ')).status();
    assert!(route.expect("run ip").success(), "a route to the clients");
    let port = free_port();
    let mut service =
        Service::run_ready("-n 4 --balance client", &naive(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))));
    let v6 = |shift: u32| {
        let from = u128::from("2001:db8::2".parse::<Ipv6Addr>().expect("an address"));
        (0..60).map(move |n: u128| IpAddr::from(Ipv6Addr::from(from + (n << shift))))
    };
    let to_v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let to_v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    for clients in [
        Clients::new(v6(0), to_v6),
        Clients::new(v6(64), to_v6),
        Clients::new(v6(80), to_v6),
        Clients::new(loopback(60), to_v4),
    ] {
        clients.assert_spread_over(4);
        clients.assert_all_stay();
    }
    service.stop();
}

#[test]
fn after_a_crash_the_next_worker_of_the_slot_gets_its_clients_and_no_other_client_moves() {
    let (mut service, clients) = started(4);
    let dead = pid_of(&service, 1);
    send(dead, Signal::SIGKILL);
    wait_until("the clients are back", DEADLINE, || {
        clients.assert_others_stay(1);
        clients.of(1).into_iter().all(|client| {
            let Origin { slot, pid, .. } = ask(client, clients.server);
            (slot, pid != Some(dead)) == (Some(1), true)
        })
    });
    clients.assert_all_stay();
    service.stop();
}

#[test]
fn more_workers_take_their_share_of_the_clients_and_fewer_give_it_back() {
    let (mut service, clients) = started(4);
    run(&service, "scale +1").assert_done("5 workers of generation 1 serve");
    let more = clients.again();
    more.assert_spread_over(5);
    for (client, slot) in &more.slots {
        assert!(*slot == 4 || *slot == clients.slots[client], "{client} has moved between old workers");
    }
    run(&service, "scale -1").assert_done("4 workers of generation 1 serve");
    clients.assert_all_stay();
    service.stop();
}

#[test]
fn over_reloads_each_client_keeps_its_slot() {
    let (mut service, clients) = started(4);
    for (generation, words) in [(2, "reload"), (3, "reload --batch 1"), (4, "reload")] {
        let reload = begin(&service, words);
        wait_until("all slots are replaced", DEADLINE, || {
            clients.assert_all_stay();
            serving(&service).iter().all(|(_, serving)| *serving == generation)
        });
        Outcome::of(reload).assert_done(&format!("4 workers of generation {generation} serve"));
        clients.assert_all_stay();
    }
    service.stop();
}

#[test]
fn a_client_stays_with_the_canary_or_without_it_and_keeps_its_slot_in_the_end() {
    let (mut service, clients) = started(2);
    let reload = begin(&service, "reload --canary 30 --for 100s");
    reload.wait_for_output("generation 2 gets 30 % of new connections");
    let generations = || -> BTreeMap<IpAddr, u32> {
        let addresses = clients.slots.keys().copied();
        addresses
            .map(|client| (client, ask(client, clients.server).generation.expect("a generation")))
            .collect()
    };
    let first = generations();
    let canary = first.values().filter(|generation| **generation == 2).count();
    assert!((15..=45).contains(&canary), "{canary} of 100");
    for _ in 0..3 {
        assert_eq!(generations(), first);
    }
    for (client, _) in first.iter().filter(|(_, generation)| **generation == 1) {
        assert_eq!(slot_of(*client, clients.server), clients.slots[client], "{client}");
    }
    run(&service, "reload --abort").assert_done("2 workers of generation 1 serve on");
    Outcome::of(reload).assert_failed(&["aborted"]);
    clients.assert_all_stay();
    service.stop();
}

#[test]
fn the_clients_of_a_worker_that_is_stopped_for_long_are_answered_by_others_until_it_takes_connections_again()
{
    let _turn = turn();
    let (mut service, clients) = started(4);
    let stopped = pid_of(&service, 2);
    let moving = clients.of(2);
    let (begun, mut waiting) = (Instant::now(), Vec::new());
    freeze(stopped);
    wait_until("a client is answered by another worker", DEADLINE, || {
        clients.assert_others_stay(2);
        waiting.push(Waiting::from(moving[0], clients.server));
        waiting.iter().any(|client| !client.waits())
    });
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(1), "{took:?}");
    service.wait_for_line("has taken no connection on");
    let others: BTreeSet<u32> = moving.iter().map(|client| slot_of(*client, clients.server)).collect();
    assert_eq!(others, BTreeSet::from([0, 1, 3]), "not all of them have gone to one worker");
    clients.assert_others_stay(2);
    send(stopped, Signal::SIGCONT);
    for client in waiting {
        client.outcome().expect("an answer");
    }
    service.wait_for_line("takes connections on");
    clients.assert_all_stay();
    service.stop();
}

#[test]
fn a_client_waits_for_a_worker_that_is_busy_for_less_than_a_second() {
    let _turn = turn();
    let (mut service, clients) = started(4);
    let busy = pid_of(&service, 2);
    let moving = clients.of(2);
    let is_shown = || {
        let begun = Instant::now();
        freeze(busy);
        let mut waiting = Vec::new();
        while begun.elapsed() < Duration::from_millis(800) {
            let client = moving[waiting.len() % moving.len()];
            waiting.push(Waiting::from(client, clients.server));
            clients.assert_others_stay(2);
        }
        send(busy, Signal::SIGCONT);
        let is_short = begun.elapsed() < Duration::from_secs(1);
        let pids: Vec<_> =
            waiting.into_iter().map(|client| client.outcome().expect("an answer").pid).collect();
        assert!(!is_short || pids.iter().all(|pid| *pid == Some(busy)), "{pids:?}");
        is_short
    };
    wait_until("the stop was short enough on a busy machine", DEADLINE, is_shown);
    clients.assert_all_stay();
    service.stop();
}

/// Clients of tests/apps/socketio.
struct SocketIo {
    lines: Lines,
    program: Child,
    reader: Option<JoinHandle<()>>,
}

impl SocketIo {
    fn start(transport: &str, port: u16, count: u32) -> SocketIo {
        let mut command = Command::new("node");
        command.args([
            node_app("socketio/clients.js"),
            transport.to_owned(),
            port.to_string(),
            count.to_string(),
        ]);
        let mut program =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start the clients");
        let lines = Lines::default();
        let reader = Some(lines.read(program.stdout.take().expect("stdout is a pipe")));
        SocketIo { lines, program, reader }
    }

    /// Waits for as many more answers.
    #[track_caller]
    fn wait_for_answers(&self, count: usize) {
        let answered =
            self.lines.wait_for_nth(count, self.lines.count(), DEADLINE, |line| line.starts_with("ok"));
        assert!(answered.is_some(), "no {count} answers:\n{}", self.unwanted().join("\n"));
    }

    fn unwanted(&self) -> Vec<String> {
        let all = self.lines.all().into_iter().map(|line| line.text);
        all.filter(|line| !line.starts_with("ok")).collect()
    }
}

impl Drop for SocketIo {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
        let _ = self.reader.take().map(JoinHandle::join);
    }
}

/// 200 clients, which exchange so many messages with 4 workers.
#[track_caller]
fn socket_io_loses_no_session(options: &str, transport: &str, messages: usize) {
    let _turn = turn();
    let port = free_port();
    let app = ["node", &node_app("socketio/app.js"), &port.to_string()].map(str::to_owned);
    let mut service = Service::run_ready(&format!("-n 4 {options}"), &app);
    let clients = SocketIo::start(transport, port, 200);
    clients.wait_for_answers(messages);
    assert_eq!(clients.unwanted(), [""; 0]);
    let who: BTreeSet<String> = clients.lines.all().into_iter().map(|line| line.text).collect();
    assert_eq!(who.len(), 200, "each of them is answered");
    drop(clients);
    service.stop();
}

#[test]
fn socket_io_loses_no_session_with_long_polling() {
    socket_io_loses_no_session("--balance client", "polling", 4000);
}

#[test]
fn socket_io_loses_no_session_with_websocket_alone_whichever_worker_a_connection_reaches() {
    socket_io_loses_no_session("--balance random", "websocket", 4000);
}
