//! The cost of the seccomp filter for a worker: bind and listen, other system calls, and additional system calls.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use crate::load::{Load, LoadOptions, Mode};
use crate::peers::{App, Peer, Program, Server};
use crate::process::{self, wait_for};
use crate::report::{self, median, table};
use crate::{Context, Options, Result, isolated, length};

/// Names the file to which this program, as a worker, writes the cost of its system calls.
pub const PROBE: &str = "BENCH_PROBE";
const BINDS: u16 = 100;
const CALLS: u32 = 200_000;

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Probe {
    bind_and_listen_us: f64,
    /// A call that the filter allows without a check of its arguments.
    getppid_ns: f64,
    /// A call whose arguments the filter checks.
    setsockopt_ns: f64,
}

#[derive(Serialize)]
struct Data {
    bare: Probe,
    wrapped: Probe,
    system_calls: Vec<Calls>,
}

/// System calls for each request, by name.
#[derive(Serialize)]
struct Calls {
    program: &'static str,
    clients: &'static str,
    bare: BTreeMap<String, f64>,
    wrapped: BTreeMap<String, f64>,
}

/// Runs as the worker: measures, writes the figures, and waits to be killed.
pub fn probe(file: &OsStr) -> ExitCode {
    let result = measure_calls().map_err(|error| error.to_string()).and_then(|probe| {
        let text = serde_json::to_string(&probe).map_err(|error| error.to_string())?;
        let new = std::path::Path::new(file).with_extension("new");
        fs::write(&new, text).and_then(|()| fs::rename(&new, file)).map_err(|error| error.to_string())
    });
    match result {
        Ok(()) => loop {
            thread::park();
        },
        Err(message) => {
            eprintln!("bench: probe: {message}");
            ExitCode::FAILURE
        }
    }
}

fn measure_calls() -> io::Result<Probe> {
    let mut kept = Vec::new();
    let mut binds = Vec::new();
    for port in 3000..3000 + BINDS {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into();
        let begun = Instant::now();
        socket.bind(&addr)?;
        socket.listen(128)?;
        binds.push(begun.elapsed().as_secs_f64() * 1e6);
        kept.push(socket);
    }
    // The best of several rounds, because other load only adds to the time.
    let cheapest = |call: &dyn Fn()| {
        let rounds = (0..5).map(|_| {
            let begun = Instant::now();
            (0..CALLS).for_each(|_| call());
            begun.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
        });
        rounds.fold(f64::INFINITY, f64::min)
    };
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let on: libc::c_int = 1;
    Ok(Probe {
        bind_and_listen_us: median(binds),
        getppid_ns: cheapest(&|| {
            nix::unistd::getppid();
        }),
        setsockopt_ns: cheapest(&|| {
            // SAFETY: the kernel reads one int, which outlives the call.
            unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::IPPROTO_TCP,
                    libc::TCP_NODELAY,
                    (&raw const on).cast(),
                    size_of::<libc::c_int>() as u32,
                )
            };
        }),
    })
}

pub fn run(options: &Options) -> Result<()> {
    let (mut bare, mut wrapped) = (Vec::new(), Vec::new());
    for run in 0..options.runs.unwrap_or(if options.quick { 2 } else { 7 }) {
        eprintln!("filter: run {run}");
        bare.push(isolated(|| probed(false, options))?);
        wrapped.push(isolated(|| probed(true, options))?);
    }
    let mut system_calls = Vec::new();
    for program in [Program::Trivial, Program::Naive] {
        for (clients, mode) in [
            ("new connections", Mode::NewConnection),
            ("keep-alive", Mode::KeepAlive { think: Duration::ZERO }),
        ] {
            eprintln!("filter: system calls of the {}, {clients}", program.name());
            let calls = |peer| isolated(|| counted(program, peer, mode, options));
            let (bare, wrapped) = (calls(Peer::Bare)?, calls(Peer::ReuseRun(Vec::new()))?);
            system_calls.push(Calls { program: program.name(), clients, bare, wrapped });
        }
    }
    let data = Data { bare: middle(&bare), wrapped: middle(&wrapped), system_calls };
    report::write(options, "filter", &data, &markdown(&data))
}

fn middle(probes: &[Probe]) -> Probe {
    let of = |figure: fn(&Probe) -> f64| median(probes.iter().map(figure));
    Probe {
        bind_and_listen_us: of(|probe| probe.bind_and_listen_us),
        getppid_ns: of(|probe| probe.getppid_ns),
        setsockopt_ns: of(|probe| probe.setsockopt_ns),
    }
}

/// Runs this program as a worker, and reads its figures.
fn probed(wrapped: bool, options: &Options) -> Result<Probe> {
    let own = std::env::current_exe().context("own path")?;
    let file = options.work.join("probe");
    let _ = fs::remove_file(&file);
    let mut command = Command::new(if wrapped { &options.binary } else { &own });
    if wrapped {
        command.args(["-n", "1", "--"]).arg(&own);
    }
    command.env(PROBE, &file);
    process::spawn(&mut command, &process::log_file(&options.work.join("servers.log"))?, None)?;
    let text = wait_for("the probe", Duration::from_secs(30), || fs::read_to_string(&file).ok())?;
    serde_json::from_str(&text).context("the probe's figures")
}

/// The system calls of a worker for each request of one client.
fn counted(program: Program, peer: Peer, mode: Mode, options: &Options) -> Result<BTreeMap<String, f64>> {
    let server = Server::start(&peer, &App::new(program, 1), options)?;
    let load = || LoadOptions::new(server.address(), 1).mode(mode);
    let warm = Load::start(load());
    thread::sleep(length(options, 1.0, 0.5));
    let worker = warm.stop().counts.pids.into_keys().next().ok_or("no worker has answered")?;

    let file = options.work.join("strace");
    let mut command = Command::new("strace");
    command.args(["-f", "-c", "-U", "calls,name", "-p", &worker.to_string(), "-o"]).arg(&file);
    let log = process::log_file(&options.work.join("servers.log"))?;
    let strace = process::spawn(&mut command, &log, None)?.id() as i32;
    let traced = || {
        let status = fs::read_to_string(format!("/proc/{worker}/status")).ok()?;
        (!status.contains("TracerPid:\t0\n")).then_some(())
    };
    wait_for("strace", Duration::from_secs(10), traced)?;
    let load = Load::start(load());
    thread::sleep(length(options, 3.0, 1.0));
    let requests = load.stop().counts.answered as f64;
    process::signal(strace, Signal::SIGINT);
    wait_for("strace to end", Duration::from_secs(10), || (!process::lives(strace)).then_some(()))?;

    let text = fs::read_to_string(&file).context("strace's table")?;
    let mut calls = BTreeMap::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [count, name] = fields[..]
            && let Ok(count) = count.parse::<f64>()
            && name != "total"
            && count / requests > 0.01
        {
            calls.insert(name.to_owned(), count / requests);
        }
    }
    Ok(calls)
}

fn markdown(data: &Data) -> String {
    let row = |what: &str, figure: fn(&Probe) -> f64| {
        let (bare, wrapped) = (figure(&data.bare), figure(&data.wrapped));
        vec![
            what.to_owned(),
            format!("{bare:.1}"),
            format!("{wrapped:.1}"),
            format!("{:+.1}", wrapped - bare),
            format!("{:.2}", wrapped / bare),
        ]
    };
    let times = [
        row("bind and listen, µs", |probe| probe.bind_and_listen_us),
        row("getppid (always allowed), ns", |probe| probe.getppid_ns),
        row("setsockopt (arguments checked), ns", |probe| probe.setsockopt_ns),
    ];
    let mut text = format!("{}\n", table(&["", "bare", "under reuse-run", "difference", "ratio"], &times));
    text += "System calls of a worker per request, with one client:\n\n";
    let rows = data.system_calls.iter().map(|calls| {
        let shown = |calls: &BTreeMap<String, f64>| {
            let calls: Vec<String> = calls.iter().map(|(name, count)| format!("{name} {count:.2}")).collect();
            calls.join(", ")
        };
        vec![format!("{}, {}", calls.program, calls.clients), shown(&calls.bare), shown(&calls.wrapped)]
    });
    text + &table(&["", "bare", "under reuse-run"], &rows.collect::<Vec<_>>())
}
