//! Ports of UDP: each flow has its worker, and no query is lost.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{
    Answer, DEADLINE, Flow, FlowLoad, Service, ask, begin, behind_shell, flows, free_address, free_port,
    freeze, holds_for, own_network, python, run, run_words, send, serving, status, turn, wait_until,
    workers_of, workers_where,
};
use nix::sys::signal::Signal;

fn server(addresses: &[SocketAddr], more: &[&str]) -> Vec<String> {
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let mut words: Vec<&str> = addresses.iter().map(String::as_str).collect();
    words.extend(more);
    python("udp.py", &words)
}

/// So many workers at a free address.
fn started(options: &str, more: &[&str]) -> (SocketAddr, Service) {
    let address = free_address();
    (address, Service::run_ready(&format!("--udp --quiet-after 300ms {options}"), &server(&[address], more)))
}

fn addresses(service: &Service) -> Vec<String> {
    let addresses = status(service)["addresses"].clone();
    addresses.as_array().expect("a list").iter().map(|it| it.as_str().expect("a text").to_owned()).collect()
}

#[test]
fn no_query_is_lost_in_reloads_and_between_them_each_flow_has_one_worker() {
    const RELOADS: usize = 4;
    let (address, mut service) = started("-n 4", &[]);
    let load = FlowLoad::start(address, 50, 4);
    for _ in 0..RELOADS {
        load.wait_for_more();
        service.reload();
    }
    load.wait_for_more();
    let told = load.stop();
    assert_eq!(told.len(), 200);
    assert!(told.iter().all(|told| told.pids.len() == RELOADS + 1), "{told:?}");
    for number in 0..=RELOADS {
        let pids: BTreeSet<u32> = told.iter().map(|told| told.pids[number]).collect();
        assert_eq!(pids.len(), 4, "each worker of generation {} has flows", number + 1);
    }
    assert_eq!(addresses(&service), [format!("udp {address}")]);
    service.stop();
}

#[test]
fn ipv4_ipv6_and_both_on_one_socket_are_shared() {
    own_network();
    let port = free_port();
    let [v4, v6] = [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), (Ipv6Addr::LOCALHOST, port).into()];
    let [any_v4, any_v6] =
        [SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), (Ipv6Addr::UNSPECIFIED, port).into()];
    for (binds, clients) in [(&[v4, v6][..], &[v4, v6][..]), (&[any_v4], &[v4]), (&[any_v6], &[v4, v6])] {
        let mut service =
            Service::run_ready("-n 2 --udp --ready notify --quiet-after 300ms", &server(binds, &[]));
        let loads: Vec<FlowLoad> = clients.iter().map(|client| FlowLoad::start(*client, 20, 1)).collect();
        for _ in 0..2 {
            loads.iter().for_each(FlowLoad::wait_for_more);
            service.reload();
        }
        for told in loads.into_iter().map(FlowLoad::stop) {
            assert!(told.iter().all(|told| told.pids.len() == 3), "{binds:?}: {told:?}");
            let pids: BTreeSet<u32> = told.iter().map(|told| told.pids[2]).collect();
            assert_eq!(pids.len(), 2, "{binds:?}");
        }
        service.stop();
    }
}

#[test]
fn a_udp_server_and_tcp_on_one_port_switches_both() {
    let (address, mut service) = started("-n 2", &["--tcp"]);
    assert_eq!(addresses(&service), [address.to_string(), format!("udp {address}")]);
    let by_tcp = || {
        let mut connection = TcpStream::connect(address).expect("connect");
        connection.write_all(b"tcp").expect("ask");
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).expect("an answer");
        Answer::parse(&answer).generation
    };
    let load = FlowLoad::start(address, 20, 1);
    for generation in 2..4 {
        load.wait_for_more();
        let from = service.log.count();
        let reload = begin(&service, "reload");
        service.wait_for_line_after(from, &format!("generation {generation} serves; "));
        for flow in flows(address, 20) {
            assert_eq!((ask(&flow, "who").generation, by_tcp()), (generation, generation));
        }
        common::Outcome::of(reload).assert_done(&format!("2 workers of generation {generation}"));
    }
    load.stop();
    service.stop();
}

#[test]
fn a_server_that_binds_a_udp_port_first_is_ready_when_it_listens() {
    let (address, mut service) = started("-n 2", &["--tcp", "300"]);
    TcpStream::connect(address).expect("it listens");
    service.stop();
}

#[test]
fn many_udp_ports_leave_as_many_of_tcp_to_share() {
    own_network();
    let addresses: Vec<SocketAddr> = (3000..3012).map(|port| (Ipv4Addr::LOCALHOST, port).into()).collect();
    // 16 for each worker.
    let limited = r#"ulimit -n 256; exec "$0" "$@""#;
    let command = behind_shell(limited, "-n 2 --udp", &server(&addresses, &["--tcp"]));
    let mut service = Service::spawn_ready(command);
    wait_until("all are bound", DEADLINE, || TcpStream::connect(addresses[11]).is_ok());
    service.reload();
    assert!(!service.log.text().contains("more sockets bound"), "{}", service.log.text());
    service.stop();
}

/// The ports that each worker has for itself, by its process id.
fn private_ports(service: &Service) -> BTreeMap<u32, SocketAddr> {
    wait_until("both have said", DEADLINE, || service.out.count_of("private: ") == 2);
    let lines = service.out.all();
    let ports = lines.iter().filter_map(|line| line.text.strip_prefix("private: ")?.split_once(' '));
    let at = |port: &str| SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse().expect("a port")));
    ports.map(|(pid, port)| (pid.parse().expect("a process id"), at(port))).collect()
}

#[test]
fn a_port_that_one_worker_alone_has_is_its_own_until_it_ends() {
    let address = free_address();
    let server = server(&[address], &["--private"]);
    let mut service = Service::run_ready("-n 2 --udp --quiet-after 3s", &server);
    let ports = private_ports(&service);
    let flow = Flow::to(address);
    let old = ask(&flow, "who").pid;
    let (own, from) = (Flow::to(ports[&old]), service.log.count());
    let reload = begin(&service, "reload");
    service.wait_for_line_after(from, "generation 2 serves; ");
    assert_ne!(ask(&flow, "who").pid, old);
    assert_eq!(ask(&own, "who").pid, old, "it may ask others by it until it ends");
    common::Outcome::of(reload).assert_done("2 workers of generation 2");
    wait_until("it is free", DEADLINE, || UdpSocket::bind(ports[&old]).is_ok());
    service.stop();
}

#[test]
fn datagrams_at_a_port_of_its_own_do_not_keep_a_worker() {
    let server = server(&[free_address()], &["--private"]);
    let mut service = Service::run_ready("-n 2 --udp --quiet-after 300ms --drain 100s", &server);
    let ports = private_ports(&service);
    let (end, socket) = (AtomicBool::new(false), UdpSocket::bind("127.0.0.1:0").expect("a socket"));
    let took = thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                ports.values().for_each(|port| drop(socket.send_to(b"who", port)));
            }
        });
        let took = service.reload();
        end.store(true, Ordering::Relaxed);
        took
    });
    assert!(took < Duration::from_secs(40), "{took:?}");
    service.stop();
}

#[test]
fn a_socket_of_which_a_worker_has_made_what_no_other_can_use_costs_nothing_and_is_closed_with_it() {
    let _turn = turn();
    own_network();
    let address = free_address();
    let exists = |inode: &str| {
        let table = std::fs::read_to_string("/proc/thread-self/net/udp").expect("the kernel's table");
        table.lines().any(|line| line.split_whitespace().any(|field| field == inode))
    };
    // The only one that its process has.
    let socket_of = |pid: u32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its files");
        let links = files.filter_map(|file| {
            std::fs::read_link(file.ok()?.path()).ok()?.into_os_string().into_string().ok()
        });
        let inodes =
            links.filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()));
        inodes.into_iter().find(|inode| exists(inode)).expect("a UDP socket")
    };
    for what in ["shut", "refused", "join"] {
        let server = server(&[address], &[]);
        let mut service = Service::run_ready("-n 2 --udp --quiet-after 300ms", &server);
        let flows = flows(address, 40);
        let last = flows.iter().find(|flow| ask(flow, "who").slot == 1).expect("one of the last slot");
        let inode = socket_of(ask(last, "who").pid);
        last.say(what);
        let is_idle = || {
            let before = common::ticks(service.pid());
            holds_for("a while", Duration::from_secs(1), || true);
            let took = common::ticks(service.pid()) - before;
            assert!(took < 20, "{what}: {took} ticks of the CPU");
        };
        is_idle();
        assert!(exists(&inode), "{what}");
        run(&service, "scale -1").assert_done("1");
        wait_until("its socket is closed", DEADLINE, || !exists(&inode));
        is_idle();
        service.stop();
    }
}

#[test]
fn what_a_dead_worker_has_not_read_its_successor_answers() {
    let (address, mut service) = started("-n 2", &[]);
    let flows = flows(address, 40);
    let before = workers_of(&flows);
    let dead = before[0].pid;
    freeze(dead);
    let its: Vec<&Flow> =
        flows.iter().zip(&before).filter(|(_, answer)| answer.pid == dead).map(|it| it.0).collect();
    let others: Vec<(&Flow, &Answer)> =
        flows.iter().zip(&before).filter(|(_, answer)| answer.pid != dead).collect();
    assert!(its.len() > 5 && others.len() > 5);
    its.iter().for_each(|flow| flow.say("while it is stopped"));
    for (flow, answer) in &others {
        assert_eq!(ask(flow, "who").pid, answer.pid, "who else has a worker keeps it");
    }
    assert!(its[0].is_silent());
    send(dead, Signal::SIGKILL);
    for flow in &its {
        let answer = flow.hear().expect("an answer of the successor");
        assert_eq!((answer.slot, answer.text.as_str()), (before[0].slot, "while it is stopped"));
        assert_ne!(answer.pid, dead);
    }
    for (flow, answer) in &others {
        assert_eq!(ask(flow, "who").pid, answer.pid);
    }
    service.stop();
}

#[test]
fn the_flows_of_a_worker_that_is_stopped_wait_and_no_others() {
    let (address, mut service) = started("-n 4", &[]);
    let flows = flows(address, 80);
    let before = workers_of(&flows);
    let stopped = before[0].pid;
    freeze(stopped);
    flows.iter().for_each(|flow| flow.say("who"));
    for (flow, answer) in flows.iter().zip(&before).filter(|(_, answer)| answer.pid != stopped) {
        assert_eq!(flow.hear().as_ref(), Some(answer));
    }
    send(stopped, Signal::SIGCONT);
    for (flow, answer) in flows.iter().zip(&before).filter(|(_, answer)| answer.pid == stopped) {
        assert_eq!(flow.hear().as_ref(), Some(answer));
    }
    service.stop();
}

#[test]
fn more_workers_take_their_share_of_the_flows_and_fewer_give_it_back_and_nothing_is_lost() {
    let (address, mut service) = started("-n 3", &[]);
    let load = FlowLoad::start(address, 20, 2);
    let flows = flows(address, 120);
    let before = workers_of(&flows);
    run(&service, "scale +1").assert_done("4");
    let with = workers_of(&flows);
    let moved = before.iter().zip(&with).filter(|(before, with)| before != with);
    let to: Vec<u32> = moved.map(|(_, with)| with.slot).collect();
    assert!((10..60).contains(&to.len()) && to.iter().all(|slot| *slot == 3), "{to:?}");
    run(&service, "scale -1").assert_done("3");
    assert_eq!(workers_of(&flows), before);
    run_words(&format!("recycle --pid {} --all", service.pid())).assert_done("");
    let after = workers_of(&flows);
    let slots = |answers: &[Answer]| answers.iter().map(|answer| answer.slot).collect::<Vec<_>>();
    assert_eq!(slots(&after), slots(&before), "the next worker of a slot has its flows");
    load.wait_for_more();
    load.stop();
    service.stop();
}

#[test]
fn a_canary_has_its_share_of_the_flows_and_they_stay_there() {
    let (address, mut service) = started("-n 2", &[]);
    let load = FlowLoad::start(address, 20, 1);
    let from = service.log.count();
    let reload = begin(&service, "reload --canary 25 --for 5s");
    service.wait_for_line_after(from, "25 %");
    let flows = flows(address, 400);
    let first = workers_of(&flows);
    let at_canary = first.iter().filter(|answer| answer.generation == 2).count();
    assert!((60..140).contains(&at_canary), "{at_canary} of 400");
    assert_eq!(workers_of(&flows), first);
    common::Outcome::of(reload).assert_done("2 workers of generation 2");
    let after = workers_of(&flows);
    assert!(after.iter().all(|answer| answer.generation == 2));
    for (before, after) in first.iter().zip(&after).filter(|(before, _)| before.generation == 2) {
        assert_eq!(before, after);
    }
    load.stop();
    service.stop();
}

#[test]
fn a_query_that_is_being_answered_delays_the_stop_signal_as_long_as_it_was_asked_for() {
    let address = free_address();
    let mut service = Service::run_ready("-n 2 --udp --quiet-after 2s", &server(&[address], &[]));
    let flow = Flow::to(address);
    let old = ask(&flow, "who").pid;
    flow.say("sleep 1000 slow");
    let took = service.reload();
    let answer = flow.hear().expect("an answer");
    assert_eq!((answer.pid, answer.text.as_str()), (old, "sleep 1000 slow"));
    assert!(took >= Duration::from_secs(1), "{took:?}");
    assert_ne!(ask(&flow, "who").pid, old);
    service.stop();
}

#[test]
fn options_that_a_program_sets_before_its_bind_hold_on_the_socket_that_it_gets() {
    own_network();
    let port = free_port();
    for address in [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), (Ipv6Addr::LOCALHOST, port).into()] {
        let bare = {
            let mut command = server(&[address], &["--set"]).into_iter();
            let mut child = std::process::Command::new(command.next().expect("a program"));
            child.args(command).stdout(std::process::Stdio::piped());
            let mut child = child.spawn().expect("start it");
            let mut line = String::new();
            let out = child.stdout.take().expect("a pipe");
            std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("a line");
            child.kill().and_then(|()| child.wait()).expect("end it");
            line.trim().to_owned()
        };
        assert!(
            bare.contains("IP_PKTINFO") && bare.contains("SO_RCVBUF") && bare.contains("UDP_GRO"),
            "{bare}"
        );
        let mut service =
            Service::run_ready("-n 2 --udp --quiet-after 300ms", &server(&[address], &["--set"]));
        service.reload();
        wait_until("all have bound", DEADLINE, || service.out.count_of("options: ") == 4);
        assert_eq!(service.out.count_of(&bare), 4, "{bare}\n{}", service.out.text());
        service.stop();
    }
}

#[test]
fn a_port_to_send_from_is_asked_of_no_replacement_and_is_free_when_its_worker_has_closed_it() {
    let (address, mut service) = started("-n 2", &["--query"]);
    service.wait_for_output("query: ");
    assert_eq!(addresses(&service), [format!("udp {address}")]);
    service.reload();
    let ports: Vec<u16> =
        service.out.all().iter().filter_map(|line| line.text.strip_prefix("query: ")?.parse().ok()).collect();
    wait_until("the ports are free", DEADLINE, || {
        ports.iter().all(|port| UdpSocket::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
    });
    service.stop();
}

#[test]
fn a_port_that_a_worker_binds_long_after_its_start_is_its_own() {
    let (address, mut service) = started("-n 2", &[]);
    let (flow, port) = (Flow::to(address), free_port());
    let worker = ask(&flow, "who");
    let other =
        flows(address, 40).into_iter().find(|flow| ask(flow, "who").pid != worker.pid).expect("another");
    holds_for("the workers are no longer young", Duration::from_millis(1500), || true);
    assert!(ask(&flow, &format!("bind {port} x")).text.ends_with("bound"));
    assert!(ask(&other, &format!("bind {port} x")).text.ends_with("in use"));
    assert_eq!(addresses(&service), [format!("udp {address}")]);
    service.reload();
    service.stop();
}

#[test]
fn a_port_that_another_worker_has_for_itself_is_not_shared_by_chance() {
    let (address, mut service) = started("-n 2", &["--private"]);
    let worker = ask(&Flow::to(address), "who").pid;
    let ports = private_ports(&service);
    let (_, other) = ports.iter().find(|(pid, _)| **pid != worker).expect("another worker");
    holds_for("the workers are no longer young", Duration::from_millis(1500), || true);
    let own = Flow::to(ports[&worker]);
    assert!(ask(&own, &format!("bind {} x", other.port())).text.ends_with("in use"));
    service.stop();
}

#[test]
fn a_port_that_is_closed_without_a_datagram_is_free() {
    let (_, mut service) = started("-n 2", &["--query", "2500"]);
    let line = service.wait_for_output("query: ").text;
    let port: u16 = line["query: ".len()..].parse().expect("a port");
    wait_until("it is free", DEADLINE, || UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok());
    service.stop();
}

#[test]
fn when_a_worker_closes_its_socket_the_others_get_its_flows() {
    let (address, mut service) = started("-n 2", &[]);
    let flows = flows(address, 40);
    let before = workers_of(&flows);
    let closes = ask(&flows[0], "close now").pid;
    let its: Vec<&Flow> =
        flows.iter().zip(&before).filter(|(_, answer)| answer.pid == closes).map(|it| it.0).collect();
    wait_until("the other one answers all", DEADLINE, || {
        its.iter().all(|flow| {
            flow.0.set_read_timeout(Some(Duration::from_millis(200))).expect("a time-out");
            flow.ask("who").is_some_and(|answer| answer.pid != closes)
        })
    });
    service.wait_for_line("has stopped listening on udp");
    service.stop();
}

#[test]
fn a_socket_that_a_worker_connects_takes_its_client_and_no_other_flow() {
    let (address, mut service) = started("-n 2", &["--share"]);
    let flows = flows(address, 60);
    let before = workers_of(&flows);
    // Each of these has a socket of its own from then on.
    for (flow, answer) in flows.iter().zip(&before).take(6) {
        assert_eq!(ask(flow, "connect me").pid, answer.pid);
    }
    for _ in 0..3 {
        assert_eq!(workers_of(&flows[6..]), before[6..]);
        holds_for("a while", Duration::from_millis(400), || true);
    }
    service.reload();
    let after = workers_of(&flows[6..]);
    assert!(after.iter().all(|answer| answer.generation == 2));
    service.stop();
}

#[test]
fn when_a_worker_connects_its_only_socket_the_others_get_its_flows_and_keep_theirs() {
    let (address, mut service) = started("-n 3", &[]);
    service.reload(); // now there are free sockets
    let flows = flows(address, 60);
    let before = workers_of(&flows);
    let taken = &before[0];
    assert_eq!(&ask(&flows[0], "take me").pid, &taken.pid);
    // Until then some datagrams are lost.
    let others = &flows[1..];
    others.iter().for_each(|flow| flow.0.set_read_timeout(Some(Duration::from_millis(300))).expect("set it"));
    let is_right = |(before, flow): (&Answer, &Flow)| {
        let after = flow.ask("who").map(|answer| answer.pid);
        let stays = before.pid == taken.pid || after == Some(before.pid);
        stays && after.is_some_and(|pid| pid != taken.pid)
    };
    wait_until("they are steered", DEADLINE, || before[1..].iter().zip(others).all(is_right));
    assert!((0..5).all(|_| before[1..].iter().zip(others).all(is_right)));
    assert_eq!(&ask(&flows[0], "who").pid, &taken.pid);
    service.reload();
    assert!(workers_of(&flows[1..]).iter().all(|answer| answer.generation == 3));
    service.stop();
}

/// How much waits in the socket that is fullest (/proc/net/udp): it has room for 200 kB, with some 800 bytes for each line.
fn waiting_bytes(address: SocketAddr) -> u64 {
    let sockets = fs::read_to_string("/proc/thread-self/net/udp").expect("the sockets");
    let port = format!(":{:04X}", address.port());
    let waiting = sockets.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let is_its = fields.next()?.ends_with(&port);
        let (_, waiting) = fields.nth(2)?.split_once(':')?;
        u64::from_str_radix(waiting, 16).ok().filter(|_| is_its)
    });
    waiting.max().unwrap_or(0)
}

#[test]
fn a_receiver_of_lines_that_keeps_up_loses_none_of_them() {
    assert_all_are_received(200_000);
}

#[test]
#[ignore = "takes minutes"]
fn a_receiver_of_a_million_lines_that_keeps_up_loses_none_of_them() {
    assert_all_are_received(1_000_000);
}

#[track_caller]
fn assert_all_are_received(lines: usize) {
    let (address, mut service) = started("-n 2 --stop-signal TERM", &["--count"]);
    let sender = thread::spawn(move || {
        let flows = flows(address, 20);
        for number in 0..lines {
            flows[number % flows.len()].say("<14>a line");
            if number % 50 == 49 {
                wait_until("the receivers keep up", DEADLINE, || waiting_bytes(address) < 100_000);
            }
        }
    });
    while !sender.is_finished() {
        service.reload();
    }
    sender.join().expect("the sender");
    service.stop();
    let counts = service.out.all();
    let counts = counts.iter().filter_map(|line| line.text.strip_prefix("count ")?.parse::<usize>().ok());
    assert_eq!(counts.sum::<usize>(), lines, "{}", service.out.text());
}

#[test]
fn workers_are_given_udp_sockets() {
    let address = free_address();
    let options = format!("-n 2 -l udp:{address} --ready notify --quiet-after 300ms");
    for more in ["", " --no-intercept"] {
        let mut service =
            Service::run_ready(&format!("{options}{more}"), &python("udp.py", &["--given", "1"]));
        let load = FlowLoad::start(address, 20, 1);
        load.wait_for_more();
        service.reload();
        load.wait_for_more();
        let told = load.stop();
        assert!(told.iter().all(|told| told.pids.len() == 2), "{told:?}");
        assert_eq!(service.out.count_of(&format!("names: udp-{}", address.port())), 4);
        assert_eq!(addresses(&service), [format!("udp {address}")]);
        service.stop();
    }
}

#[test]
fn where_workers_are_not_intercepted_udp_ports_that_they_bind_cannot_be_shared() {
    let mut service = Service::run("-n 2 --udp --no-intercept", &server(&[free_address()], &[]));
    assert_eq!(service.wait_end().code(), Some(1));
    assert!(
        service.log.text().contains("no UDP port that they bind can be shared"),
        "{}",
        service.log.text()
    );
}

#[test]
fn with_balance_client_all_flows_from_one_address_go_to_one_worker() {
    own_network();
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, free_port()));
    let mut service =
        Service::run_ready("-n 4 --udp --balance client --quiet-after 300ms", &server(&[address], &[]));
    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, address.port()));
    let mut all = BTreeSet::new();
    for client in 1..=20 {
        let from = Ipv4Addr::new(127, 0, 1, client);
        let slots: BTreeSet<u32> = (0..5)
            .map(|_| {
                let flow = Flow(UdpSocket::bind((from, 0)).expect("a socket"));
                flow.0.connect(server).expect("connect it");
                ask(&flow, "who").slot
            })
            .collect();
        assert_eq!(slots.len(), 1, "{from}");
        all.extend(slots);
    }
    assert_eq!(all.len(), 4);
    service.stop();
}

#[test]
fn what_the_kernel_gives_to_every_socket_or_another_may_not_have_is_left_to_it_and_is_not_forgotten() {
    for more in ["--member", "--filter"] {
        let address = free_address();
        let options = "-n 2 --udp --ready notify --ready-timeout 5s";
        let mut service = Service::run_ready(options, &server(&[address], &[more]));
        wait_until("one of them can't bind it", DEADLINE, || {
            service.out.count_of("udp: Address already") == 1
        });
        run(&service, "reload").assert_failed(&[&format!("could not bind udp {address}")]);
        service.stop();
    }
}

/// Go and Java set SO_BROADCAST on each UDP socket.
#[test]
fn a_broadcast_comes_to_every_worker() {
    own_network();
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, free_port()));
    let mut service = Service::run_ready("-n 3 --udp --quiet-after 300ms", &server(&[address], &["--set"]));
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.set_broadcast(true).expect("set an option");
    socket.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    socket.send_to(b"all", (Ipv4Addr::new(127, 255, 255, 255), address.port())).expect("send it");
    let pids: BTreeSet<u32> = (0..3)
        .map(|_| {
            let mut answer = [0; 2048];
            let len = socket.recv(&mut answer).expect("an answer");
            Answer::parse(&answer[..len]).pid
        })
        .collect();
    assert_eq!(pids.len(), 3);
    service.stop();
}

#[test]
fn a_port_of_another_program_is_not_shared_with_it() {
    let other = UdpSocket::bind(free_address()).expect("a port");
    let address = other.local_addr().expect("its address");
    let mut service = Service::run("-n 2 --udp", &server(&[address], &[]));
    assert!(!service.wait_end().success());
    assert!(service.log.text().contains(&format!("udp {address} is in use: ")), "{}", service.log.text());
}

#[test]
fn a_worker_with_no_other_port_than_one_of_udp_is_ready_alone_too() {
    let (address, mut service) = started("-n 1", &[]);
    let load = FlowLoad::start(address, 10, 1);
    for _ in 0..2 {
        load.wait_for_more();
        service.reload();
    }
    assert!(load.stop().iter().all(|told| told.pids.len() == 3));
    assert_eq!(serving(&service), [(0, 3)]);
    service.stop();
}

#[test]
fn without_traffic_nothing_wakes_the_wrapper() {
    let _turn = turn();
    let (address, mut service) = started("-n 2", &[]);
    ask(&Flow::to(address), "who");
    let wake_ups = || common::wake_ups(service.pid());
    wait_until("it sleeps", DEADLINE, || {
        let before = wake_ups();
        holds_for("a while", Duration::from_secs(2), || true);
        wake_ups() == before
    });
    let slots: BTreeMap<u64, u64> = serving(&service).into_iter().collect();
    assert_eq!(workers_where(&service, |worker| worker["serves"] == true).len(), slots.len());
    service.stop();
}
