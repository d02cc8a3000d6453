//! `status`, as text and as JSON.

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use crate::common::{
    DEADLINE, Folder, Outcome, Service, begin, free_address, free_port, naive, python, run, send, status,
    wait_until, workers_where,
};

#[track_caller]
fn assert_fits_the_schema(status: &Value) {
    let text = include_str!("../status.schema.json");
    let schema: Value = serde_json::from_str(text).expect("a schema in JSON");
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler.add_resource("status.schema.json", schema).expect("add the schema");
    let index = compiler.compile("status.schema.json", &mut schemas).expect("a schema");
    schemas.validate(status, index).unwrap_or_else(|error| panic!("{error}\n{status:#}"));
}

/// Waits until a worker is in a state. Each output of `status --json` until then must fit the schema.
#[track_caller]
fn wait_for_state(service: &Service, state: &str) -> Value {
    let mut last = Value::Null;
    wait_until(&format!("a worker is {state}"), DEADLINE, || {
        last = status(service);
        assert_fits_the_schema(&last);
        last["workers"].as_array().expect("workers").iter().any(|worker| worker["state"] == state)
    });
    last
}

#[test]
fn the_schema_describes_each_field_and_refuses_others() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let good = status(&service);
    assert_fits_the_schema(&good);
    for (pointer, value) in [("", "x"), ("/workers/0", "x"), ("/workers/0", "state")] {
        let mut bad = good.clone();
        bad.pointer_mut(pointer).expect("an object")[value] = Value::from("frobnicating");
        std::panic::catch_unwind(|| assert_fits_the_schema(&bad)).expect_err("the schema accepts it");
    }
    let schema: Value = serde_json::from_str(include_str!("../status.schema.json")).expect("JSON");
    for object in ["", "/$defs/worker", "/$defs/reload"] {
        let object = schema.pointer(object).expect("an object");
        for (name, field) in object["properties"].as_object().expect("properties") {
            assert!(field["description"].as_str().is_some_and(|text| text.ends_with('.')), "{name}");
        }
    }
    service.stop();
}

#[test]
fn status_shows_workers_that_start_are_ready_drain_and_stop_and_exits_with_4_and_0() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("hold-1-0");
    let mut service = Service::run("-n 1 --drain 100s", &folder.server(addr, &["--ignore-int"]));
    // A command finds no reuse-run until its control socket is there.
    wait_until("status answers", DEADLINE, || run(&service, "status").code != Some(1));
    let shown = wait_for_state(&service, "starting");
    assert_eq!((&shown["state"], &shown["ready"]), (&Value::from("starting"), &Value::from(0)));
    assert_eq!(run(&service, "status").code, Some(4));
    folder.lower("hold-1-0");
    let shown = wait_for_state(&service, "ready");
    assert_eq!(shown["addresses"], Value::from(vec![addr.to_string()]));
    assert_eq!(shown["last_reload"], Value::Null);
    let outcome = run(&service, "status");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.out.contains(&format!("1 of 1 slots ready on {addr}")), "{outcome:?}");

    let mut client = TcpStream::connect(addr).expect("connect");
    client.write_all(b"GET / HTTP/1.1\r\n").expect("begin a request, which holds up the drain");
    wait_until("it is accepted", DEADLINE, || status(&service)["workers"][0]["connections"] == 1);
    let reload = begin(&service, "reload");
    let shown = wait_for_state(&service, "draining");
    assert_eq!((&shown["state"], &shown["generation"]), (&Value::from("reloading"), &Value::from(2)));
    assert_eq!(run(&service, "status").code, Some(0), "a worker that drains is in no slot");
    drop(client);
    let shown = wait_for_state(&service, "stopping");
    let workers = shown["workers"].as_array().expect("workers");
    let old = workers.iter().find(|worker| worker["state"] == "stopping").expect("the old worker");
    assert_eq!((&old["generation"], &old["serves"]), (&Value::from(1), &Value::from(false)));
    send(old["pid"].as_u64().expect("a pid") as u32, Signal::SIGKILL);
    Outcome::of(reload).assert_done("1 worker of generation 2 serve");
    service.signal(Signal::SIGTERM);
    wait_until("reuse-run is stopping", DEADLINE, || {
        let shown = status(&service);
        assert_fits_the_schema(&shown);
        shown["state"] == "stopping"
    });
    assert_eq!(run(&service, "status").code, Some(4));
    send(service.workers()[0], Signal::SIGKILL);
    assert_eq!(service.wait_end().code(), Some(0), "{}", service.log.text());
}

#[test]
fn status_shows_a_worker_that_was_killed_and_has_not_ended() {
    let mut service = Service::run_ready("-n 1 --stop-timeout 100ms", &naive(free_address()));
    let worker = Pid::from_raw(service.workers()[0] as i32);
    // The parent of a traced process learns of its end after the tracer, see ptrace(2).
    ptrace::seize(worker, ptrace::Options::empty()).expect("trace the worker");
    let reload = begin(&service, "reload");
    wait_for_state(&service, "killed");
    while !matches!(waitpid(worker, None), Ok(WaitStatus::Signaled(..))) {}
    Outcome::of(reload).assert_done("1 worker of generation 2 serve");
    service.stop();
}

#[test]
fn status_exits_with_3_while_some_slots_are_down_and_counts_restarts() {
    let (_, folder, mut service) = Service::with_flags("-n 2 --max-failures 0", &[]);
    folder.raise("broken-1-1");
    let victim = workers_where(&service, |worker| worker["slot"] == 1)[0]["pid"].as_u64();
    send(victim.expect("a pid") as u32, Signal::SIGKILL);
    let shown = wait_for_state(&service, "down");
    assert_eq!((&shown["ready"], &shown["slots"]), (&Value::from(1), &Value::from(2)));
    assert_eq!(run(&service, "status").code, Some(3));
    folder.lower("broken-1-1");
    wait_until("all are ready", DEADLINE, || run(&service, "status").code == Some(0));
    let restarts = |slot: usize| status(&service)["workers"][slot]["restarts"].as_u64().expect("a number");
    assert_eq!(restarts(0), 0);
    assert!(restarts(1) >= 2, "{}", status(&service));
    run(&service, "reload").assert_done("2 workers of generation 2 serve");
    assert_eq!((restarts(0), restarts(1)), (0, 0));
    service.stop();
}

#[test]
fn status_shows_accept_queue_connections_and_memory() {
    let (addr, folder) = (free_address(), Folder::new());
    folder.raise("deaf");
    let deaf = ["--deaf-while", &folder.path("deaf")];
    let mut service = Service::run_ready("-n 1", &folder.server(addr, &deaf));
    let clients: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(addr).expect("connect")).collect();
    let worker = || status(&service)["workers"][0].clone();
    let shown = worker();
    assert_eq!((&shown["accept_queue"], &shown["connections"]), (&Value::from(3), &Value::from(0)));
    assert!(shown["rss_kib"].as_u64().is_some_and(|kib| kib > 100), "{shown}");
    assert_eq!(shown["status"], Value::Null);
    folder.lower("deaf");
    wait_until("three connections are accepted", DEADLINE, || {
        let shown = worker();
        shown["accept_queue"] == 0 && shown["connections"] == 3
    });
    drop(clients);
    wait_until("no connection is open", DEADLINE, || worker()["connections"] == 0);
    service.stop();
}

#[test]
fn status_shows_the_cpu_time_of_a_worker_and_of_what_it_has_started() {
    let busy = "(while :; do :; done) & echo >&$READY_FD; wait";
    let mut service = Service::run_ready("-n 1 --ready notify", &["sh", "-c", busy]);
    let number = |worker: &Value, field: &str| worker[field].as_f64().expect("a number");
    let mut shown = Value::Null;
    wait_until("CPU time", DEADLINE, || {
        shown = status(&service)["workers"][0].clone();
        number(&shown, "cpu_seconds") >= 0.2
    });
    // It uses one CPU; a tick is 10 ms.
    assert!(number(&shown, "cpu_seconds") <= number(&shown, "age_seconds") + 0.1, "{shown}");
    service.stop();
}

#[test]
fn status_shows_what_a_worker_says_about_itself() {
    let port = free_port().to_string();
    let command = python("notify.py", &[&port, "STATUS=half asleep\\nREADY=1"]);
    let mut service = Service::run_ready("-n 1 --ready notify", &command);
    wait_until("its status", DEADLINE, || status(&service)["workers"][0]["status"] == "half asleep");
    assert!(run(&service, "status").out.contains("half asleep"));
    service.stop();
}

#[test]
fn status_shows_the_result_of_the_last_reload() {
    let (_, folder, mut service) = Service::with_flags("-n 1", &[]);
    run(&service, "reload").assert_done("generation 2");
    let last = status(&service)["last_reload"].clone();
    assert_eq!((&last["generation"], &last["ok"]), (&Value::from(2), &Value::from(true)), "{last}");
    assert_eq!(last["reason"], Value::Null);
    let shown = run(&service, "status").out;
    assert!(shown.contains("last reload: generation 2") && shown.ends_with("done"), "{shown}");
    folder.raise("broken-3-0");
    run(&service, "reload").assert_failed(&["status 3"]);
    let shown = status(&service);
    assert_fits_the_schema(&shown);
    let last = &shown["last_reload"];
    assert_eq!((&last["generation"], &last["ok"]), (&Value::from(3), &Value::from(false)), "{last}");
    assert!(last["reason"].as_str().is_some_and(|why| why.contains("exited with status 3")), "{last}");
    service.stop();
}

#[test]
fn status_prints_again_and_again_with_watch() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let watch = begin(&service, "status --watch --json");
    wait_until("three lines", DEADLINE, || watch.out.count() >= 3);
    for line in watch.out.all() {
        assert_fits_the_schema(&serde_json::from_str(&line.text).expect("a line of JSON"));
    }
    watch.signal(Signal::SIGINT);
    assert_eq!(Outcome::of(watch).signal, Some(Signal::SIGINT as i32));
    service.stop();
}

/// poll(2) reports a signal instead of what it has seen: eleven of sixty commands were taken for ones that have ended.
#[test]
fn commands_are_answered_whatever_signals_arrive() {
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let pid = Pid::from_raw(service.pid() as i32);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _ = nix::sys::signal::kill(pid, Signal::SIGCONT);
            }
        });
        let outcomes: Vec<Outcome> = (0..20).map(|_| run(&service, "status")).collect();
        is_over.store(true, Ordering::Relaxed);
        let refused = outcomes.iter().find(|outcome| outcome.code != Some(0));
        assert!(refused.is_none(), "{refused:?}");
    });
    service.stop();
}
