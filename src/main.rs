//! reuse-run runs N copies of any unmodified server on one port, and replaces them without losing a request on a new
//! connection.
//!
//! # Code map
//!
//! The process is single-threaded: one loop waits in epoll ([`supervisor`]), tells a pure state machine ([`fleet`]) what
//! has happened, and carries out the actions that it returns.
//!
//! Words: the *wrapper* is this process. A *worker* is one copy of the server, a *slot* the place of a worker that serves,
//! and a *generation* all workers that one reload started. A *member* is a listening socket of the wrapper, or one of UDP, in a
//! reuseport group of the kernel; it is *lent* to a worker, the *borrower*. A *room* is a folder here, or a file beside this one.
//!
//! Where to begin: [`supervisor::run`] reads as the process lives. [`fleet::Event`] lists what can happen, [`fleet::Action`]
//! what can be done about it. `fleet/tests.rs` has whole stories of both.
//!
//! The rooms. Each imports only rooms below it.
//!
//! | room | owns |
//! |---|---|
//! | [`supervisor`] | the loop and the workers' processes |
//! | [`cli`] | the command line |
//! | [`worker`] | starting, signalling and reaping a worker's process |
//! | [`intercept`] | the seccomp filter of each worker, and the answers to the system calls that it stops |
//! | [`drain`] | which retired workers have finished their work |
//! | [`probe`] | requests to workers, to find out whether they serve |
//! | [`pool`] | the listening sockets, and those of UDP |
//! | [`operate`] | control socket, status, signals, systemd, PID file |
//! | [`fleet`] | pure: which workers there are, and what happens to them next |
//! | [`steering`] | pure: which worker gets a new connection, or a flow of datagrams |
//! | [`output`] | the log, and the workers' output |
//! | [`kernel`] | system calls, /proc, sock_diag |
//! | [`ids`], [`address`], [`words`], [`lines`] | ids; addresses; text helpers; splitting a stream into lines |
//!
//! Where to change what:
//!
//! | to change | file |
//! |---|---|
//! | an option and what its help says; the form of the help; how a value is written; its variable | `cli/args`; `cli/help`; `cli/values`; `cli/variables` |
//! | which system calls an action or event means | `supervisor/mod` |
//! | a system call that waits for its answer; the start of a worker until it runs | `supervisor/calls`; `supervisor/starts` |
//! | a request of a command, the reply to it, where status' values come from | `supervisor/commands` |
//! | which workers hang or use too much memory | `supervisor/health` |
//! | processes behind a worker's main one; programs that go into the background | `supervisor/behind` |
//! | hints where users get stuck; what follows from a message of a worker | `supervisor/hints`; `supervisor/messages` |
//! | the steps of a reload; of a recycling; of a stop; of a scaling; what happens when a worker ends | `fleet/reload`; `fleet/recycle`; `fleet/stop`; `fleet/scale`; `fleet/mod` |
//! | what is the same for every worker, in whichever operation | `fleet/crew` |
//! | what the fleet can be told and can decide; tickets and refusals | `fleet/events` |
//! | time-outs, also after the stop signal and SIGKILL; limits of numbers | `fleet/policy` |
//! | the back-off of restarts; when to give up | `fleet/slot` |
//! | which timers there are | `fleet/timers` |
//! | what a worker has to do to be ready; where it and its replacement have to listen | `fleet/gate`; `fleet/endpoints`, `fleet/udp` |
//! | which operation may run or be aborted; which commands are queued | `fleet/phase`; `fleet/queue` |
//! | a log line of the fleet; the facts about workers for status | `fleet/story`; `fleet/views` |
//! | what each role of a worker means for new connections | `steering/mod` |
//! | which worker is stuck and skipped; which has the fewest connections | `steering/load`; `steering/spread` |
//! | the model of the kernel's array of members; the BPF instructions that choose one; those that choose by the client's address or flow | `steering/order`; `steering/program`; `steering/by_client` |
//! | lending a socket and taking it back; the sockets' states | `pool/lend`; `pool/member` |
//! | what epoll reports about the sockets | `pool/mod` |
//! | what is different about UDP sockets; when to see whether workers still have them | `pool/udp`; `pool/looks` |
//! | carrying out a plan; attaching the BPF program to a group | `pool/steer`; `pool/group` |
//! | connections of our own to one worker | `pool/reach` |
//! | sending a request to a worker; what counts as an answer | `probe/mod`; `probe/answer` |
//! | when the accept queues are sampled | `pool/accept_queues` |
//! | connections that wait for no worker | `pool/unserved` |
//! | when a listener counts as closed although its worker lives; looking for it, and closing it | `pool/closed`; `pool/closing` |
//! | other programs on our addresses; workers that can't be intercepted | `pool/foreign`; `pool/unintercepted` |
//! | Unix sockets: sharing a path, and its hand-over to the next generation; what is done to its file; who has clients | `pool/paths`; `pool/files`; `pool/path_clients` |
//! | which system calls are stopped | `intercept/filter` |
//! | what answers for processes that outlive the wrapper | `intercept/keeper` |
//! | the answer to a bind of a port; to a bind or unlink of a Unix socket's path | `intercept/port`; `intercept/unix` |
//! | which UDP ports workers hold that aren't shared | `intercept/udp` |
//! | socket options that a worker sets; what the log says about a worker once | `intercept/options`; `intercept/complaints` |
//! | what the wrapper may do for a worker; what is read of it, without waiting | `intercept/caller`; `intercept/reader` |
//! | what hangs on a worker's own socket when one of the pool takes its place; its options | `intercept/carry`; `intercept/inherit` |
//! | system calls that a worker's thread does for the wrapper | `intercept/errand` |
//! | starting, signalling and reaping a process; which programs get Node's channel | `worker/mod`; `worker/program` |
//! | the steps between fork and exec; descriptor numbers | `worker/child`; `worker/fds` |
//! | environment variables of a worker, env files, secrets; reading them without waiting | `worker/environment`; `worker/reading` |
//! | what kills workers when the wrapper is killed | `worker/tether` |
//! | how a worker says that it is ready | `worker/ready/` |
//! | when a connection counts as idle; when a worker is drained; what follows | `drain/rule`; `drain/mod`; `supervisor/draining` |
//! | closing idle connections; what the stop signal does to a worker | `drain/idle`; `drain/signal_effect` |
//! | the meaning of a signal to the wrapper | `operate/signals` |
//! | the columns and the JSON of status; its exit status | `operate/status` |
//! | clients of the control socket; who they are; the wire format | `operate/control`; `operate/peer`; `operate/protocol` |
//! | the commands' own process; which reuse-run it speaks to; what comes back | `operate/client`; `operate/find`; `operate/replies` |
//! | what systemd is told; the PID file | `operate/systemd`; `operate/pidfile` |
//! | labels before lines; how stdout and stderr are written; the log's form; lines that come once a second | `output/labels`; `output/sink`; `output/log`; `output/seldom` |
//! | a system call (with `kernel/tracee` and `kernel/notice` the only unsafe code); a file of /proc; a query to sock_diag | `kernel/sys`; `kernel/procfs`; `kernel/sockdiag` |
//! | how long threads have waited for a CPU; whether files are ready; that one was readable for a moment | `kernel/scheduling`; `kernel/ready`; `kernel/notice` |
//! | whether datagrams wait in a socket | `kernel/datagrams` |
//! | which process has a socket open; a search for one; duplicates of workers' sockets | `kernel/open_sockets`; `kernel/search`; `kernel/duplicate` |
//! | processes that do what may wait; their queues, and what becomes of one that is late | `kernel/helper`; `kernel/jobs` |
//! | what hangs on a worker's socket in its table of descriptors; tracing a thread | `kernel/fdtable`; `kernel/tracee` |
//! | sockets by which others may send descriptors; files that others may have replaced | `kernel/inbox`; `kernel/file` |
//!
//! # The ways through the rooms
//!
//! - **A bind.** The worker's bind(2) stops in its filter. epoll reports the filter's fd: `supervisor::calls` →
//!   `intercept::Interception::answer` reads the call, and `intercept::reader` the address in the worker's memory → `intercept::port` →
//!   `pool::Pool::lend` finds or makes a socket in the reuseport group of the address → `intercept` puts that socket over the
//!   worker's fd and answers "success". If the worker watches its socket by epoll already, or the wrapper may not duplicate it,
//!   the worker's thread is traced and does some system calls first: `intercept::errand`. Its listen(2) goes the same way to `Pool::listen`; the supervisor then hands
//!   [`fleet::Event::Listens`] to the fleet, and with it the worker may be ready. A UDP port takes no
//!   listen(2): its bind is that.
//! - **A SIGUSR2.** `operate::signals` → `supervisor::take_signals` → [`fleet::Fleet::command`] → [`fleet::Action::Start`] for
//!   each slot → `supervisor::starts` → `worker::Starter::start`. When all are ready the fleet switches: [`fleet::Action::Steer`] carries a
//!   [`steering::Plan`] → `Pool::steer` → `steering::decide` and `steering::program` → one setsockopt(2) for each address.
//!   [`fleet::Action::Drain`] → `drain::Drain::poll` → [`fleet::Event::Drained`] → [`fleet::Action::Signal`].
//! - **A probe** (`--ready /path`). [`fleet::Action::Probe`] → `probe::Probes::begin` → `Pool::reach` has the steering program
//!   send one connection to one member → `probe::answer` → [`fleet::Event::Probed`] → `fleet::gate`.
//! - **A command.** `reuse-run reload` is `operate::client`. It writes a request to the control socket →
//!   `operate::control` → `supervisor::commands` → [`fleet::Fleet::command`] answers with a ticket or a refusal →
//!   the client waits for the ticket; log lines are its progress, and [`fleet::Action::Ended`] its end.
//! - **A line of output** (`--label`). The worker's pipe → `output::labels` reads, and `lines` splits → `output::sink`
//!   queues and writes it as far as there is room. Without `--label` the workers have the wrapper's own stdout and stderr.
//!
//! # What must not happen
//!
//! - Invariant: a listening socket belongs to the wrapper; a worker only borrows it. The kernel sends connections only to
//!   ready workers, or, where none is ready, to the socket that the successor of a dead one inherits. (Datagrams reach a UDP
//!   socket from its bind on. While no worker is ready they wait for those that start.)
//! - Invariant: a member that the BPF program chooses keeps its index in the kernel's array, whichever others leave
//!   (`steering::order::Order::spares_lacking`). So does one that is lent, which may be chosen later; where a free one stands
//!   is found out before it is lent, or it isn't lent (`pool::reach`).
//! - Invariant: a replacement that fails never gets a connection, and the old workers are not touched.
//! - Invariant: the wrapper does nothing for a worker that the kernel would not allow the worker to do itself
//!   (`intercept::caller`).
//! - Invariant: [`fleet`] and [`steering`] make no system call and read no clock (`tests/house.rs`).
//! - Invariant: a room imports only rooms that stand below it in the table of rooms (`tests/house.rs`).
//! - Invariant: the request path is the kernel's, and without traffic nothing wakes the loop.
//! - Invariant: the loop waits for events in epoll alone. (`drain::idle::EndWatch` spins, for 3 ms at most, once a
//!   generation; `pool::reach` waits, for 10 ms at most, for a connection of its own.)
//! - Invariant: before the loop an error ends the program. Inside the loop it is logged, and the program goes on.
#![cfg_attr(clippy, deny(warnings))]
// A panic ends the wrapper, and with it the workers.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

#[cfg(not(target_os = "linux"))]
compile_error!("reuse-run needs Linux: it stands on seccomp user notification and SO_REUSEPORT programs");

mod address;
mod cli;
mod drain;
mod fleet;
mod ids;
mod intercept;
mod kernel;
mod lines;
mod operate;
mod output;
mod pool;
mod probe;
mod steering;
mod supervisor;
mod words;
mod worker;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use cli::Invocation;
use log::error;

/// The exit status when reuse-run can't start.
const FAILURE: u8 = 1;

/// The exit status when the command line is wrong.
const MISUSE: u8 = 2;

fn main() -> ExitCode {
    let level = output::log::start(std::env::var_os("REUSE_RUN_LOG"));
    let mut invocation = cli::parse(std::env::args_os().skip(1), std::env::vars_os());
    if !matches!(invocation, Ok(Invocation::Print(_))) {
        invocation = level.and(invocation);
    }
    match invocation {
        Ok(Invocation::Print(text)) => {
            let mut stdout = std::io::stdout();
            match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
                Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                    error!("can't write to stdout: {error}");
                    FAILURE.into()
                }
                _ => ExitCode::SUCCESS, // the reader may have seen enough
            }
        }
        Ok(Invocation::Control(command)) => operate::client::run(command).into(),
        Ok(Invocation::Run(options)) => {
            let status = supervisor::run(*options).unwrap_or_else(|error| {
                error!("can't start: {error}");
                FAILURE
            });
            output::log::finish();
            status.into()
        }
        Err(wrong) => {
            error!("{wrong}");
            MISUSE.into()
        }
    }
}
