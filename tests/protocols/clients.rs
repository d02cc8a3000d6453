//! The clients: a number of them at a time, each request on a new connection.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::common::{DEADLINE, Line, Lines, app, python_packages, wait_until};
use crate::servers::{Server, file, go_program};

/// How many clients there are at a time.
pub const CLIENTS: usize = 10;
/// Between two requests of a client of [`Client::Curl`]; the others take a random pause up to 60 ms.
const PAUSE: Duration = Duration::from_millis(20);
/// curl's status when it could not connect.
const NOT_CONNECTED: i32 = 7;

#[derive(Clone, Copy)]
pub enum Client {
    /// `client.js` with this kind.
    Node(&'static str),
    /// `client.go` with this kind.
    Go(&'static str),
    /// `grpc_client.py` with this kind.
    Grpc(&'static str),
    /// curl with these flags, and a body of so many bytes that waits for `100 Continue`.
    Curl { flags: &'static str, body: usize },
}

/// Clients that run. Each prints a line for each request: `ok …`, `failed …`, or `refused …` if it got no connection,
/// which ends it.
pub struct Clients {
    pub lines: Lines,
    program: Option<Child>,
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    pub fn start(client: Client, server: Server, port: u16, work: u64) -> Clients {
        let mut clients =
            Clients { lines: Lines::default(), program: None, ending: Arc::default(), threads: Vec::new() };
        let (port, milliseconds, count) = (port.to_string(), work.to_string(), CLIENTS.to_string());
        match client {
            Client::Node(kind) => {
                clients.spawn(Command::new("node").args([
                    &file("client.js"),
                    kind,
                    &port,
                    &milliseconds,
                    &count,
                ]));
            }
            Client::Go(kind) => {
                clients.spawn(Command::new(go_program("client")).args([
                    kind,
                    &port,
                    &milliseconds,
                    &count,
                    &app("tls"),
                ]));
            }
            Client::Grpc(kind) => {
                let arguments = [&file("grpc_client.py"), kind, &port, &milliseconds, &count];
                let mut command = Command::new("python3");
                clients.spawn(command.args(arguments).env("PYTHONPATH", python_packages("grpc")));
            }
            Client::Curl { flags, body } => {
                let scheme = if server.has_tls() { "https" } else { "http" };
                for client in 0..CLIENTS {
                    let (lines, ending) = (clients.lines.clone(), clients.ending.clone());
                    let url = format!("{scheme}://127.0.0.1:{port}");
                    let begin = Duration::from_millis(client as u64 * work / CLIENTS as u64);
                    let curl = move || {
                        thread::sleep(begin);
                        run_curl(&url, flags, body, client, &lines, &ending);
                    };
                    clients.threads.push(thread::spawn(curl));
                }
            }
        }
        clients
    }

    fn spawn(&mut self, command: &mut Command) {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start clients");
        self.threads.push(self.lines.read(child.stdout.take().expect("stdout is a pipe")));
        self.program = Some(child);
    }

    /// Waits for so many answers, counted from line number `from` on.
    #[track_caller]
    pub fn wait_for_answers(&self, from: usize, count: usize) {
        let answered = self.lines.wait_for_nth(count, from, DEADLINE, |line| line.starts_with("ok"));
        assert!(answered.is_some(), "no {count} answers within {DEADLINE:?}");
    }

    /// Waits for an answer that says `word`.
    #[track_caller]
    pub fn wait_for_answer(&self, word: &str) {
        let says = |line: &str| line.starts_with("ok") && line.contains(word);
        assert!(
            self.lines.wait_for(0, DEADLINE, says).is_some(),
            "no answer says {word:?} within {DEADLINE:?}"
        );
    }

    /// Lets each client finish its last request. Returns what all have printed.
    #[track_caller]
    pub fn end(&mut self) -> Vec<Line> {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(program) = &mut self.program {
            drop(program.stdin.take());
            wait_until("the end of the clients", DEADLINE, || program.try_wait().expect("wait").is_some());
            assert!(program.wait().expect("wait").success(), "the clients' program has failed");
        }
        self.threads.drain(..).for_each(|thread| thread.join().expect("a client"));
        self.lines.all()
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(program) = &mut self.program {
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}

/// One client of [`Client::Curl`].
fn run_curl(url: &str, flags: &str, body: usize, client: usize, lines: &Lines, ending: &AtomicBool) {
    let mut number = 0;
    while !ending.load(Ordering::Relaxed) {
        let id = format!("{client}-{number}");
        number += 1;
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--max-time", "30", "--expect100-timeout", "30"]);
        curl.args(["--cacert", &format!("{}/cert.pem", app("tls"))]).args(flags.split_whitespace());
        if body > 0 {
            curl.args(["--header", "Expect: 100-continue", "--data", &"x".repeat(body)]);
        }
        let begun = Instant::now();
        let output = curl.arg(format!("{url}/{id}")).output().expect("run curl");
        let (answer, error) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() && answer == format!("done {id} {body}\n") {
            lines.push("ok ");
        } else if output.status.code() == Some(NOT_CONNECTED) {
            lines.push(&format!("refused {error}"));
            return;
        } else {
            lines.push(&format!("failed {id} {:?}: {answer:?} {error}", begun.elapsed()));
        }
        thread::sleep(PAUSE);
    }
}
