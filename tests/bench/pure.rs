//! Micro-benchmarks of what is pure and hot, for several n: it is how the cost grows that is to be guarded.
//!
//! The crate is a binary, so its modules are compiled into this one.
#![cfg_attr(clippy, deny(warnings))]
// Much of them is for the rest of the program, or for their own tests, which have no harness here.
#![allow(dead_code, unused_imports)]

#[path = "../../src/address.rs"]
mod address;
#[path = "../../src/fleet/mod.rs"]
mod fleet;
#[path = "../../src/ids.rs"]
mod ids;
#[path = "../../src/intercept"]
mod intercept {
    pub mod filter;
}
#[path = "../../src/kernel/mod.rs"]
mod kernel;
#[path = "../../src/steering/mod.rs"]
mod steering;
#[path = "../../src/words.rs"]
mod words;

use std::collections::{BTreeMap, VecDeque};
use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use socket2::{Domain, Socket, Type};

use address::{Address, Endpoint};
use fleet::{Action, Command, End, Endpoints, Event, Fleet, Policy, Readiness, ReloadOptions, Rollout};
use ids::MemberId;
use steering::load::LoadTracker;
use steering::program::{Targets, program};

const SIZES: [u32; 3] = [10, 100, 1000];

/// n members of which no two are neighbours, for which the program is the longest.
fn scattered(n: u32) -> Targets {
    Targets { primary: (0..n).map(|i| i * 2).collect(), ..Targets::default() }
}

fn programs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("steering program");
    for n in SIZES {
        let targets = scattered(n);
        group.throughput(Throughput::Elements(n.into()));
        group.bench_with_input(BenchmarkId::from_parameter(n), &targets, |bencher, targets| {
            bencher.iter(|| program(black_box(targets)));
        });
    }
}

/// What the kernel does to check and compile the program for n members; it is the same for a group of one.
fn attaching(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attach a steering program");
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_port(true).expect("SO_REUSEPORT");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("bind");
    socket.listen(1).expect("listen");
    for n in SIZES {
        let program = program(&scattered(n));
        group.throughput(Throughput::Elements(n.into()));
        group.bench_function(BenchmarkId::from_parameter(n), |bencher| {
            bencher.iter(|| {
                kernel::sys::attach_reuseport_cbpf(socket.as_fd(), black_box(&program)).expect("attach");
            });
        });
    }
}

/// A sample of n accept queues, each with a connection that waits.
fn samples(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("look at accept queues");
    for n in SIZES {
        let queues: BTreeMap<MemberId, u32> = (0..n).map(|id| (MemberId(id), 1)).collect();
        let (mut tracker, now) = (LoadTracker::default(), Instant::now());
        group.throughput(Throughput::Elements(n.into()));
        group.bench_function(BenchmarkId::from_parameter(n), |bencher| {
            bencher.iter(|| tracker.sample(black_box(&queues), |_| None, |_| None, now));
        });
    }
}

fn decoding(criterion: &mut Criterion) {
    let args = [3, 0x7fff_0000_0000, 16, 0, 0, 0];
    let bind = libc::seccomp_data { nr: libc::SYS_bind as i32, arch: 0, instruction_pointer: 0, args };
    criterion.bench_function("decode a notification", |bencher| {
        bencher.iter(|| intercept::filter::decode(black_box(&bind)));
    });
}

/// A whole reload of n workers, from the wish for it to the end of the last old one.
fn reloads(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("reload in the state machine");
    for n in SIZES {
        let mut world = World::new(n);
        world.reload();
        assert_eq!(
            (world.fleet.crew().generation(), world.fleet.crew().oldest_generation()),
            (2, 2),
            "a whole reload"
        );
        group.throughput(Throughput::Elements(n.into()));
        group.bench_function(BenchmarkId::from_parameter(n), |bencher| {
            bencher.iter(|| world.reload());
        });
    }
}

/// A fleet whose workers listen at once, have nothing to finish and end when they are told to.
struct World {
    fleet: Fleet,
    now: Instant,
    endpoint: Endpoint,
}

impl World {
    fn new(workers: u32) -> World {
        let policy = Policy {
            workers,
            readiness: Readiness::Listen,
            ready_timeout: Duration::from_secs(60),
            proof: Duration::ZERO,
            drain: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(30),
            hung_timeout: None,
            max_age: None,
            stop_within: Duration::from_secs(9),
            stop_signal: "SIGINT",
            max_failures: 10,
            rollout: Rollout::AllAtOnce,
            shares_queue: false,
        };
        let now = Instant::now();
        let (fleet, actions) = Fleet::new(policy, Endpoints::default(), now);
        let socket = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 3000));
        let endpoint = Endpoint::Port(Address::new(socket, false, 0));
        let mut world = World { fleet, now, endpoint };
        world.carry_out(actions);
        world
    }

    fn reload(&mut self) {
        let (_accepted, actions) = self.fleet.command(Command::Reload(ReloadOptions::default()), self.now);
        self.carry_out(actions);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            let answers = match action {
                Action::Start { worker, .. } => vec![
                    Event::Started { worker, pid: worker.0 as i32 + 100 },
                    Event::Listens { worker, endpoint: self.endpoint.clone() },
                ],
                Action::Switch(_) => vec![Event::Switched { outcome: Ok(()) }],
                Action::Drain { worker, .. } => vec![Event::Drained { worker }],
                Action::Signal { worker } => vec![Event::Ended { worker, end: End::Exited(0) }],
                _ => Vec::new(),
            };
            for answer in answers {
                actions.extend(self.fleet.handle(answer, self.now));
            }
        }
    }
}

criterion_group!(benches, programs, attaching, samples, decoding, reloads);
criterion_main!(benches);
