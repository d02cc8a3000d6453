//! The options of the program and of its commands, from which argh makes the parser, the help and the table that
//! [`super::split`] uses.

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};
use nix::sys::signal::Signal;

use super::values::{Patience, Percent, Period, Ready, Size, StopSignal, Workers};
use crate::address::Address;
use crate::fleet::{Readiness, Rollout};
use crate::operate::find::Which;
use crate::operate::protocol::{How, Name, Request, Target};
use crate::steering::load::Balancing;
use crate::worker::environment::Secret;

const READY: Ready = Ready { readiness: Readiness::Listen, path: None };

/// Run N copies of any server on one port, and replace them without losing a request on a new connection.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(
    help_triggers("-h", "--help"),
    note = "If a worker of the first generation ends before it is ready, or if --max-failures is reached, the exit status is \
            that of the worker, or 128+n for signal n.",
    note = "SIGUSR2 and SIGHUP replace the workers. SIGTERM, SIGINT and SIGQUIT stop them. SIGTTIN adds a worker, SIGTTOU \
            removes one.",
    note = "A command speaks to a running reuse-run and prints the result: see reuse-run reload --help.",
    note = "A duration is a number with its unit: 500ms, 10s, 2m.",
    note = "Each option can be given by a variable too, --ready-timeout by REUSE_RUN_READY_TIMEOUT: the command line wins, \
            --label is 1 or 0, and several of -l, --env-file and --secret have spaces between them.",
    note = "The variable REUSE_RUN_LOG sets what is logged on stderr: error, warn, info (default) or debug.",
    example = "reuse-run -n 4 -- node app.js",
    example = "reuse-run reload",
    error_code(0, "stopped by a signal or by reuse-run stop, and every worker ended by itself"),
    error_code(
        1,
        "a worker had to be killed, the first workers were not ready in time, or reuse-run could not start"
    ),
    error_code(2, "the command line is wrong"),
    error_code(126, "the command can't be executed"),
    error_code(127, "the command was not found")
)]
pub struct RunArgs {
    /// number of workers (copies of the command); max: one for each CPU that reuse-run may use (default 1)
    #[argh(option, short = 'n', default = "Workers(1)", arg_name = "COUNT|max")]
    pub workers: Workers,

    /// when a worker counts as ready. listen: when it listens on a port or path, or says that it is ready. notify:
    /// when it says so, by READY_FD, process.send or sd_notify. A duration: when it has lived that long. /path, or
    /// :PORT/path: when it answers an HTTP request for it with 2xx or 3xx (default listen)
    #[argh(option, default = "READY", arg_name = "listen|notify|DURATION|PATH")]
    pub ready: Ready,

    /// time that a worker has to become ready; after that its start has failed (default 60s)
    #[argh(option, default = "Period(Duration::from_secs(60))", arg_name = "DURATION")]
    pub ready_timeout: Period,

    /// time that a replaced worker has to finish its requests before it gets the stop signal (default 10s)
    #[argh(option, default = "Period(Duration::from_secs(10))", arg_name = "DURATION")]
    pub drain: Period,

    /// time that a worker has to end after the stop signal; after that it is killed (default 30s)
    #[argh(option, default = "Period(Duration::from_secs(30))", arg_name = "DURATION")]
    pub stop_timeout: Period,

    /// time that a stop takes at most: the workers have two thirds of it to finish their requests, then they get the
    /// stop signal, and at the end they are killed (default 9s)
    #[argh(option, default = "Period(Duration::from_secs(9))", arg_name = "DURATION")]
    pub stop_within: Period,

    /// time for which no data must have moved on a connection before it is idle; for HTTP/2, gRPC and streams
    /// (default: as long as the kernel's figures call for)
    #[argh(option, arg_name = "DURATION")]
    pub idle_after: Option<Period>,

    /// how long a worker that gets no more datagrams of UDP may take to answer those that it has read (default 5s)
    #[argh(option, default = "Period(Duration::from_secs(5))", arg_name = "DURATION")]
    pub quiet_after: Period,

    /// replace a worker that does nothing for so long while a connection waits for it; should be longer than the longest
    /// request of a program that serves one after the other (default: never)
    #[argh(option, arg_name = "DURATION")]
    pub hung_timeout: Option<Patience>,

    /// replace a worker that uses more memory than this, with all processes that it has started: the RSS of
    /// reuse-run status, looked at every 10s, three times in a row; 500M, 2G (default: no limit)
    #[argh(option, arg_name = "SIZE")]
    pub max_memory: Option<Size>,

    /// time that a worker serves before it is replaced as by reuse-run recycle, or up to a tenth less, so that they don't
    /// end together (default: no limit)
    #[argh(option, arg_name = "DURATION")]
    pub max_age: Option<Patience>,

    /// signal that tells a worker to stop (default INT)
    #[argh(option, default = "StopSignal(Signal::SIGINT)", arg_name = "SIGNAL")]
    pub stop_signal: StopSignal,

    /// signal that tells a worker that it gets no more connections, before it finishes its requests (default: none)
    #[argh(option, arg_name = "SIGNAL")]
    pub retire_signal: Option<StopSignal>,

    /// exit after this many failed starts in a row while no worker is ready, with the exit status of the last one;
    /// 0: never (default 10)
    #[argh(option, default = "10", arg_name = "COUNT", from_str_fn(times))]
    pub max_failures: u32,

    /// which worker gets a new connection. load: a random one, but not a worker that is stuck (connections wait and
    /// it takes none). random: any ready worker. queue: whichever takes it first from a queue that they share. client: the same
    /// one for all connections from one address, as long as it serves (default load)
    #[argh(option, default = "Balancing::Load", arg_name = "load|random|queue|client")]
    pub balance: Balancing,

    // Not a doc comment: rustdoc takes the brackets for a link.
    #[argh(
        option,
        short = 'l',
        arg_name = "ADDRESS",
        description = "listen on this address and give the socket to the workers, as systemd does (LISTEN_FDS): 3000, \
                       127.0.0.1:3000 or [::1]:3000; udp:3000 for UDP (repeatable)"
    )]
    pub listen: Vec<Address>,

    /// file with variables for the workers, lines of NAME=value; each reload reads it again (repeatable)
    #[argh(option, arg_name = "FILE")]
    pub env_file: Vec<PathBuf>,

    /// variable NAME for the workers, whose value is the content of the file; each reload reads it again
    /// (repeatable)
    #[argh(option, arg_name = "NAME=FILE")]
    pub secret: Vec<Secret>,

    /// directory of the workers; each reload resolves its links again (default: the current directory)
    #[argh(option, short = 'C', arg_name = "DIRECTORY")]
    pub chdir: Option<PathBuf>,

    /// share the UDP ports that workers bind at their start, as those of TCP
    #[argh(switch)]
    pub udp: bool,

    /// give workers no IPC channel like that of Node's fork
    #[argh(switch)]
    pub no_node_ipc: bool,

    /// do not intercept the workers' bind and listen: for programs that take their sockets from -l, or that set
    /// SO_REUSEPORT themselves
    #[argh(switch)]
    pub no_intercept: bool,

    /// at SIGUSR2, replace at most this many workers at a time (default: all at once)
    #[argh(option, arg_name = "COUNT", from_str_fn(at_a_time))]
    pub batch: Option<NonZero<u32>>,

    /// name by which commands find this reuse-run: reuse-run reload web
    #[argh(option, arg_name = "NAME")]
    pub name: Option<Name>,

    /// file for the PID of reuse-run; written when the first workers are ready, removed at the end
    #[argh(option, arg_name = "FILE")]
    pub pidfile: Option<PathBuf>,

    /// put the slot and the PID of the worker before each line that it prints
    #[argh(switch)]
    pub label: bool,

    /// print the version
    #[argh(switch, short = 'V')]
    pub version: bool,
}

fn slot(text: &str) -> Result<u32, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not the number of a slot; a PID or a name comes after --pid"))
}

fn at_a_time(text: &str) -> Result<NonZero<u32>, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number of workers from 1 on"))
}

fn times(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number from 0 on"))
}

/// A command to a running reuse-run.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand)]
pub enum CommandArgs {
    Reload(ReloadArgs),
    Status(StatusArgs),
    Scale(ScaleArgs),
    Recycle(RecycleArgs),
    Stop(StopArgs),
}

/// Replace the workers of a running reuse-run and wait until this is done.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(
    subcommand,
    name = "reload",
    help_triggers("-h", "--help"),
    note = "After --, another command for the new workers. If they serve, it is the command from then on.",
    example = "reuse-run reload",
    example = "reuse-run reload --canary 5 --for 10m",
    example = "reuse-run reload -- node other.js",
    error_code(0, "the new workers serve, or with --no-wait: the reload has begun"),
    error_code(
        1,
        "the old workers serve, the reload is not done after --timeout, or no reuse-run has answered"
    ),
    error_code(2, "the command line is wrong, or several reuse-run are running and none is named")
)]
pub struct ReloadArgs {
    /// replace at most this many workers at a time (default: as reuse-run was started)
    #[argh(option, arg_name = "COUNT", from_str_fn(at_a_time))]
    pub batch: Option<NonZero<u32>>,

    /// give the new workers this share of the new connections at first, in percent; needs --for
    #[argh(option, arg_name = "PERCENT")]
    pub canary: Option<Percent>,

    /// time for which the new workers keep the share of --canary; then they get all connections
    #[argh(option, long = "for", arg_name = "DURATION")]
    pub period: Option<Period>,

    /// the new workers need not listen where the old ones do
    #[argh(switch)]
    pub ports_may_change: bool,

    /// do not wait until the reload is done
    #[argh(switch)]
    pub no_wait: bool,

    /// wait at most this long; after that the reload continues in the background (default: no limit)
    #[argh(option, arg_name = "DURATION")]
    pub timeout: Option<Period>,

    /// end the current reload, and keep the workers that serve
    #[argh(switch)]
    pub abort: bool,

    /// PID or name of the reuse-run (default: PID 1 if that is a reuse-run, else the only one of this user)
    #[argh(positional, arg_name = "pid|name")]
    pub which: Option<Which>,
}

/// Show the workers of a running reuse-run.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(
    subcommand,
    name = "status",
    help_triggers("-h", "--help"),
    example = "reuse-run status --watch",
    error_code(0, "all slots have a ready worker that does not hang"),
    error_code(1, "no reuse-run has answered"),
    error_code(
        2,
        "the command line is wrong, or --json is given, several reuse-run are running and none is named"
    ),
    error_code(3, "some slots have such a worker"),
    error_code(4, "no slot has such a worker")
)]
pub struct StatusArgs {
    /// print one line of JSON
    #[argh(switch)]
    pub json: bool,

    /// print it again every second
    #[argh(switch)]
    pub watch: bool,

    /// PID or name of the reuse-run (default: PID 1 if that is a reuse-run, else those of this user)
    #[argh(positional, arg_name = "pid|name")]
    pub which: Option<Which>,
}

/// Change the number of workers of a running reuse-run and wait until this is done.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(
    subcommand,
    name = "scale",
    help_triggers("-h", "--help"),
    example = "reuse-run scale 4",
    example = "reuse-run scale +1",
    error_code(0, "so many workers serve, or with --no-wait: the scaling has begun"),
    error_code(
        1,
        "a new worker failed and the number is what it was, the scaling is not done after --timeout, or no reuse-run has answered"
    ),
    error_code(2, "the command line is wrong, or several reuse-run are running and none is named")
)]
pub struct ScaleArgs {
    /// do not wait until the scaling is done
    #[argh(switch)]
    pub no_wait: bool,

    /// wait at most this long; after that the scaling continues in the background (default: no limit)
    #[argh(option, arg_name = "DURATION")]
    pub timeout: Option<Period>,

    /// number of workers: 4; or how many more or fewer: +1, -1
    #[argh(positional)]
    pub workers: Target,

    /// PID or name of the reuse-run (default: PID 1 if that is a reuse-run, else the only one of this user)
    #[argh(positional, arg_name = "pid|name")]
    pub which: Option<Which>,
}

/// Replace the worker of one slot after the other by a new one of the same generation, and wait until this is done. If workers
/// share a queue (--balance queue, a Unix socket), all of them are replaced.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(
    subcommand,
    name = "recycle",
    help_triggers("-h", "--help"),
    example = "reuse-run recycle 0 2",
    example = "reuse-run recycle --all",
    error_code(0, "the new workers serve, or with --no-wait: the recycling has begun"),
    error_code(
        1,
        "a new worker failed and the old one serves on, the recycling is not done after --timeout, or no reuse-run has answered"
    ),
    error_code(2, "the command line is wrong, or several reuse-run are running and none is named")
)]
pub struct RecycleArgs {
    /// recycle the workers of all slots
    #[argh(switch)]
    pub all: bool,

    /// do not wait until the recycling is done
    #[argh(switch)]
    pub no_wait: bool,

    /// wait at most this long; after that the recycling continues in the background (default: no limit)
    #[argh(option, arg_name = "DURATION")]
    pub timeout: Option<Period>,

    /// PID or name of the reuse-run (default: PID 1 if that is a reuse-run, else the only one of this user)
    #[argh(option, arg_name = "PID|NAME", long = "pid")]
    pub which: Option<Which>,

    /// slots, as status shows them
    #[argh(positional, arg_name = "slot", from_str_fn(slot))]
    pub slots: Vec<u32>,
}

/// Stop a running reuse-run as SIGTERM does, and wait for its end.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(
    subcommand,
    name = "stop",
    help_triggers("-h", "--help"),
    example = "reuse-run stop --timeout 30s",
    error_code(0, "every worker ended by itself, or with --no-wait: the stop has begun"),
    error_code(
        1,
        "a worker had to be killed, the stop is not done after --timeout, or no reuse-run has answered"
    ),
    error_code(2, "the command line is wrong, or several reuse-run are running and none is named")
)]
pub struct StopArgs {
    /// do not wait until reuse-run has ended
    #[argh(switch)]
    pub no_wait: bool,

    /// wait at most this long; after that the workers are stopped in the background (default: no limit)
    #[argh(option, arg_name = "DURATION")]
    pub timeout: Option<Period>,

    /// PID or name of the reuse-run (default: PID 1 if that is a reuse-run, else the only one of this user)
    #[argh(positional, arg_name = "pid|name")]
    pub which: Option<Which>,
}

impl RecycleArgs {
    /// # Errors
    /// When it isn't clear which workers are meant.
    pub fn request(&self) -> Result<Request, String> {
        if self.all != self.slots.is_empty() {
            return Err("name the slots, as in recycle 0 2, or write recycle --all".to_owned());
        }
        Ok(Request::Recycle { slots: self.slots.clone(), wait: !self.no_wait })
    }
}

impl ReloadArgs {
    /// # Errors
    /// Which options can't be combined, or that there is no such share.
    pub fn request(&self, command: Option<Vec<String>>) -> Result<Request, String> {
        let how = match (&self.batch, &self.canary, &self.period) {
            (None, None, None) => None,
            (Some(most), None, None) => Some(How::Batch(most.get())),
            (None, Some(Percent(percent)), Some(Period(period))) => {
                Rollout::canary(*percent, *period)?;
                Some(How::Canary { percent: *percent, seconds: period.as_secs_f64() })
            }
            (Some(_), _, _) => return Err("--batch can't be combined with --canary or --for".to_owned()),
            (None, Some(_), None) => {
                return Err("--canary needs --for, as in --canary 5 --for 10m".to_owned());
            }
            (None, None, Some(_)) => {
                return Err("--for needs --canary, as in --canary 5 --for 10m".to_owned());
            }
        };
        if !self.abort {
            let ports_may_change = self.ports_may_change;
            return Ok(Request::Reload { how, ports_may_change, command, wait: !self.no_wait });
        }
        match (how, self.ports_may_change, command) {
            (None, false, None) => Ok(Request::Abort),
            _ => Err("--abort starts no reload, so it can't be combined with what a reload does".to_owned()),
        }
    }
}
