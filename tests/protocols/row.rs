//! A row of the table: a server, its clients, and what happens to both.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::clients::{CLIENTS, Client, Clients};
use crate::common::{Line, Outcome, Service, begin, free_port, python_packages, reuse_run_with};
use crate::servers::Server;

/// How long a request takes, in milliseconds.
const WORK: [u64; 2] = [50, 1000];
/// So many services run at a time, on however many processors: most of them wait most of the time.
const AT_A_TIME: usize = 8;
/// A stop takes less by default.
const MAX_STOP: Duration = Duration::from_secs(10);

#[derive(Clone, Copy)]
pub struct Row {
    pub name: &'static str,
    pub server: Server,
    pub client: Client,
    /// More options for reuse-run.
    pub options: &'static str,
    /// The service isn't touched before an answer says this, so that what the row tests has happened.
    pub answers: &'static str,
}

/// What happens to a row's service, under load.
#[derive(Clone, Copy, Debug)]
enum Event {
    ReloadsThenSigterm,
    StopCommand,
}

/// Runs each row with each amount of work and each event. Asserts that no request fails, and that at a stop each request
/// whose connection was made is answered.
#[track_caller]
pub fn assert_nothing_fails(rows: &[Row]) {
    let cells = rows.iter().flat_map(|row| {
        let events = [Event::ReloadsThenSigterm, Event::StopCommand];
        events.into_iter().flat_map(move |event| WORK.map(|work| (*row, work, event)))
    });
    let start = |(row, work, event): (Row, u64, Event)| {
        let name = format!("{}, {work} ms, {event:?}", row.name);
        let cell = move || {
            let _permit = Permit::take();
            row.run(work, event)
        };
        (name.clone(), thread::Builder::new().name(name).spawn(cell).expect("start a thread"))
    };
    let cells: Vec<_> = cells.map(start).collect();
    let mut failed = Vec::new();
    for (name, cell) in cells {
        match cell.join() {
            Ok(report) => println!("{name}: {report}"),
            Err(_) => failed.push(name),
        }
    }
    assert!(failed.is_empty(), "failed: {failed:#?}");
}

impl Row {
    /// Runs the row once, in a network of its own. Returns what to print.
    fn run(&self, work: u64, event: Event) -> String {
        let port = free_port();
        let mut command = reuse_run_with(&format!("-n 2 {}", self.options), &self.server.command(port, work));
        if matches!(self.server, Server::Python(_)) {
            command.env("PYTHONPATH", python_packages("grpc"));
        }
        let mut service = Service::spawn_ready(command);
        let mut clients = Clients::start(self.client, self.server, port, work);
        clients.wait_for_answers(0, CLIENTS);
        clients.wait_for_answer(self.answers);
        let mut report = String::new();
        if matches!(event, Event::ReloadsThenSigterm) {
            let took: Duration = (0..3).map(|_| reload(&service, &clients)).sum();
            report = format!("{}, 3 reloads took {took:.1?}; ", tally(&clients.lines.all(), |_| false));
        }
        let stopped_at = Instant::now();
        match event {
            Event::ReloadsThenSigterm => service.stop(),
            Event::StopCommand => {
                Outcome::of(begin(&service, "stop")).assert_done("every worker ended by itself");
                assert_eq!(service.wait_end().code(), Some(0));
            }
        }
        let took = stopped_at.elapsed();
        let lines = clients.end();
        let refused_late = |line: &Line| line.at > stopped_at && line.text.starts_with("refused");
        report += &format!("{}, the stop took {took:.1?}", tally(&lines, refused_late));
        let late = lines.iter().any(|line| line.at > stopped_at && line.text.starts_with("ok"));
        assert!(late || work < 1000, "{report}, and no request was under way at the stop");
        assert!(took < MAX_STOP, "{report}");
        report
    }
}

/// Reloads, and waits for answers of the new workers.
#[track_caller]
fn reload(service: &Service, clients: &Clients) -> Duration {
    let took = service.reload();
    clients.wait_for_answers(clients.lines.count(), CLIENTS);
    took
}

/// Asserts that each line is an answer or `allowed`. Returns how many answers there are.
#[track_caller]
fn tally(lines: &[Line], allowed: impl Fn(&Line) -> bool) -> String {
    let (answers, rest): (Vec<&Line>, Vec<&Line>) =
        lines.iter().partition(|line| line.text.starts_with("ok"));
    let bad: Vec<&str> =
        rest.into_iter().filter(|line| !allowed(line)).map(|line| line.text.as_str()).collect();
    let first = bad.iter().take(10).copied().collect::<Vec<_>>().join("\n");
    assert!(bad.is_empty(), "{} answers, {} failed, as these:\n{first}", answers.len(), bad.len());
    format!("{} answers", answers.len())
}

/// One of the places for rows that run at the same time.
struct Permit;

impl Permit {
    fn take() -> Permit {
        let mut free = Permit::lock();
        while *free == 0 {
            free = FREED.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Permit
    }

    fn lock() -> MutexGuard<'static, usize> {
        FREE.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

static FREE: Mutex<usize> = Mutex::new(AT_A_TIME);
static FREED: Condvar = Condvar::new();

impl Drop for Permit {
    fn drop(&mut self) {
        *Permit::lock() += 1;
        FREED.notify_one();
    }
}
