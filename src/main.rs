//! reuse-run runs N copies of any unmodified server on one port, and replaces them without losing a request on a new
//! connection.
//!
//! # Code map
//!
//! The process is single-threaded: one loop waits in epoll ([`supervisor`]), tells a pure state machine ([`fleet`]) what
//! has happened, and carries out the actions that it returns. "The wrapper" is this process, as opposed to its workers.
//!
//! Where to begin: [`supervisor::run`] is the program's life in its order. [`fleet::Event`] and [`fleet::Action`] are all
//! that can happen and all that can be done; `fleet/tests.rs` tells whole stories of them.
//!
//! | room | owns | to change |
//! |---|---|---|
//! | [`supervisor`] | the loop, the workers' processes; `commands`: requests and their replies, what status shows | what calls the kernel for an action, a new request |
//! | [`cli`] | the options (`args`) and how their values are written (`values`) | an option, a help text |
//! | [`worker`] | starting (`child`, `fds`, `program`), signalling and reaping a process, its `environment`, and how it says that it is ready (`ready`) | a way to say ready, a variable of the worker |
//! | [`intercept`] | each worker's seccomp filter, and the answers to what it stops (`tcp`, `unix`, `options`) | the answer to a bind, listen or unlink |
//! | [`drain`] | which retired workers have finished; `idle`: closing idle connections; `signal_effect`: what the stop signal does | when a connection counts as idle |
//! | [`pool`] | the TCP listeners that workers borrow; `paths`: Unix sockets; `unintercepted`: workers without a filter | lending, attaching a program, resetting a queue |
//! | [`operate`] | the control socket (`control`, `protocol`, `client`), `status`' table and JSON, `signals`, `systemd`, `pidfile` | a column of status, the meaning of a signal |
//! | [`fleet`] | pure: which workers there are and what becomes of them | see the next table |
//! | [`steering`] | pure: who gets new connections (`mod`), who is stuck (`load`), the kernel's array (`order`), the BPF program (`program`) | the choice of a worker |
//! | [`output`] | the log (`log`), the workers' output (`labels`), stdout and stderr (`sink`) | how a line is written |
//! | [`kernel`] | system calls (`sys`: the only unsafe code), /proc (`procfs`), sock_diag and TCP_INFO (`sockdiag`), BPF instructions (`bpf`) | a call to the kernel |
//! | [`ids`], [`address`], [`words`], [`lines`] | names for things, addresses, text helpers, splitting a stream into lines | |
//!
//! | file of fleet | owns | to change |
//! |---|---|---|
//! | `mod` | the operations: reload, scale, stop, and their failure | how a reload goes |
//! | `events` | events, actions, commands, tickets and refusals | what the loop can be asked to do |
//! | `crew` | slots and workers together with their timers and endpoints | what is the same for every worker |
//! | `worker`, `slot` | a worker's state; a slot's restarts and their back-off | the back-off |
//! | `timers`, `policy` | the table of timers; the options of the run, their limits, and the time that each state may take | a time-out, a limit |
//! | `endpoints` | where each worker listens, and where its replacement has to | when a worker that listens is ready |
//! | `phase`, `queue` | the operation that runs; those that wait, and their tickets | what is refused or queued |
//! | `roster`, `views`, `story` | lists of slots and workers, for the fleet, for status, and in words | a log line of a reload |
//!
//! # The ways through the rooms
//!
//! - **A bind.** The worker's bind(2) stops in its filter. epoll reports the filter's fd: `supervisor::answer` →
//!   `intercept::Interception::answer` reads the call and the address from the worker's memory → `intercept::tcp` →
//!   `pool::Pool::lend` finds or makes a socket in the address' reuseport group → `intercept` puts that socket over the
//!   worker's fd and answers "success". Its listen(2) goes the same way to `Pool::listen`; the supervisor then hands
//!   [`fleet::Event::Listens`] to the fleet, and with it the worker may be ready.
//! - **A SIGUSR2.** `operate::signals` → `supervisor::take_signals` → [`fleet::Fleet::command`] → [`fleet::Action::Start`] for
//!   each slot → `worker::Starter::start`. When all are ready the fleet switches: [`fleet::Action::Steer`] carries a
//!   [`steering::Plan`] → `Pool::steer` → `steering::decide` and `steering::program` → one setsockopt(2) an address.
//!   [`fleet::Action::Drain`] → `drain::Drain::poll` → [`fleet::Event::Drained`] → [`fleet::Action::Signal`].
//! - **A command.** `reuse-run reload` is `operate::client`. It writes a request to the control socket →
//!   `operate::control` → `supervisor::commands` → [`fleet::Fleet::command`] answers with a ticket or a refusal →
//!   the client waits for the ticket; log lines are its progress, and [`fleet::Action::Ended`] its end.
//! - **A line of output** (`--label`). The worker's pipe → `output::labels` reads, and `lines` splits → `output::sink`
//!   queues and writes it as far as there is room. Without `--label` the workers have the wrapper's own stdout and stderr.
//!
//! # What must not happen
//!
//! - Invariant: a listening socket belongs to the wrapper; a worker only borrows it. The kernel sends connections to ready
//!   workers only.
//! - Invariant: members that the steering program names never move in the kernel's array (`steering::spares_lacking`).
//! - Invariant: a replacement that fails never gets a connection, and the old workers are not touched.
//! - Invariant: the wrapper does nothing for a worker that the worker itself may not do (`intercept::caller`).
//! - Invariant: [`fleet`] and [`steering`] make no system call and read no clock (`tests/house.rs`).
//! - Invariant: a room imports only rooms that stand below it in the first table (`tests/house.rs`).
//! - Invariant: the request path is the kernel's, and without traffic nothing wakes the loop.
//! - Invariant: the loop waits for events in epoll alone. (`drain::idle::watch_end` spins, for 3 ms at most, once a
//!   generation.)
//! - Invariant: inside the loop an error is a warning and a plan; only before it does an error end the program.
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
mod steering;
mod supervisor;
mod words;
mod worker;

use std::io::Write;
use std::process::ExitCode;

use cli::Invocation;
use log::error;

/// The exit status when the command line is wrong.
const MISUSE: u8 = 2;

fn main() -> ExitCode {
    output::log::start();
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Print(text)) => {
            let _ = std::io::stdout().write_all(text.as_bytes()); // the reader may have seen enough
            ExitCode::SUCCESS
        }
        Ok(Invocation::Control(command)) => operate::client::run(command).into(),
        Ok(Invocation::Run(options)) => match supervisor::run(*options) {
            Ok(status) => status.into(),
            Err(error) => {
                error!("can't start: {error}");
                ExitCode::FAILURE
            }
        },
        Err(wrong) => {
            error!("{wrong}");
            MISUSE.into()
        }
    }
}
