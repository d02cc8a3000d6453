//! The command line: from words to validated options.

use std::ffi::OsString;
use std::num::NonZero;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use argh::{EarlyExit, FromArgs};
use nix::sys::signal::Signal;

use crate::address::Address;
use crate::fleet::{Policy, Readiness, Rollout};
use crate::operate::client::{Command, What};
use crate::operate::protocol::{How, Request, Target};
use crate::steering::Share;
use crate::steering::load::Balancing;
use crate::worker::Program;
use crate::worker::environment::{Secret, Sources};

/// Run N copies of any server on one port, and replace them without losing a request.
#[derive(FromArgs, Debug)]
#[argh(
    help_triggers("-h", "--help"),
    note = "SIGUSR2 replaces the workers; SIGTERM and SIGINT stop them; SIGTTIN and SIGTTOU are one more and one less.\n\
            reuse-run reload, status, scale and stop do the same and tell how it went: see their --help.\n\
            Durations are written as 500ms, 10s, 2m.\n\
            RUST_LOG sets what is logged on stderr: error, warn, info (default), debug.",
    example = "reuse-run -n 4 -- node app.js",
    example = "reuse-run reload",
    error_code(2, "the command line is wrong"),
    error_code(126, "the command can't be executed"),
    error_code(127, "the command was not found")
)]
struct Args {
    /// how many workers to run; max: as many as CPUs may be used (default 1)
    #[argh(option, short = 'n', default = "Workers(1)", arg_name = "count|max")]
    workers: Workers,

    /// when a worker is ready: listen (it listens on a port or path, or says so, default), notify (it says so,
    /// by READY_FD, process.send or sd_notify) or a duration (it has lived so long)
    #[argh(option, default = "Ready(Readiness::Listen)", arg_name = "listen|notify|duration")]
    ready: Ready,

    /// how long a worker may take to get ready (default 60s)
    #[argh(option, default = "Length(Duration::from_secs(60))", arg_name = "duration")]
    ready_timeout: Length,

    /// how long a replaced worker may take to finish what it has before it gets the stop signal (default 10s)
    #[argh(option, default = "Length(Duration::from_secs(10))", arg_name = "duration")]
    drain: Length,

    /// how long a worker may take to end after the stop signal before it is killed (default 30s)
    #[argh(option, default = "Length(Duration::from_secs(30))", arg_name = "duration")]
    stop_timeout: Length,

    /// the signal that tells a worker to stop (default INT)
    #[argh(option, default = "StopSignal(Signal::SIGINT)", arg_name = "signal")]
    stop_signal: StopSignal,

    /// end everything, with the last worker's status, after so many failed starts in a row while no worker
    /// is ready; 0: never (default 10)
    #[argh(option, default = "10", arg_name = "count")]
    max_failures: u32,

    /// who gets new connections: load, which spares workers that are stuck with some, or random (default load)
    #[argh(option, default = "Balancing::Load", arg_name = "how")]
    balance: Balancing,

    // Not a doc comment: rustdoc would take the brackets for a link.
    #[argh(
        option,
        short = 'l',
        arg_name = "address",
        description = "an address that reuse-run itself listens on and hands to the workers as systemd does \
                       (LISTEN_FDS): 3000, 127.0.0.1:3000 or [::1]:3000 (repeatable)"
    )]
    listen: Vec<Address>,

    /// a file of NAME=value lines for the workers' environment, read anew for each generation (repeatable)
    #[argh(option, arg_name = "file")]
    env_file: Vec<PathBuf>,

    /// a file whose content is the value of the variable NAME in the workers' environment, read anew for
    /// each generation (repeatable)
    #[argh(option, arg_name = "name=file")]
    secret: Vec<Secret>,

    /// the workers' directory, resolved anew for each generation (default: the current one)
    #[argh(option, short = 'C', arg_name = "directory")]
    chdir: Option<PathBuf>,

    /// give workers no IPC channel like that of Node's fork
    #[argh(switch)]
    no_node_ipc: bool,

    /// leave the workers' bind and listen alone: for listeners by -l, or workers that share their port
    /// themselves
    #[argh(switch)]
    no_intercept: bool,

    /// replace at most so many workers at a time at SIGUSR2 (default: all at once)
    #[argh(option, arg_name = "count")]
    batch: Option<NonZero<u32>>,

    /// a file to write the PID to once the first workers are ready, and to remove at the end
    #[argh(option, arg_name = "file")]
    pidfile: Option<PathBuf>,

    /// put slot and PID before each line that a worker prints
    #[argh(switch)]
    label: bool,

    /// print the version
    #[argh(switch, short = 'V')]
    version: bool,
}

/// Replace the workers of a running reuse-run, and wait until it is done. Exits with 0 only if the new ones serve.
#[derive(FromArgs, Debug)]
#[argh(help_triggers("-h", "--help"))]
struct ReloadArgs {
    /// replace at most so many workers at a time
    #[argh(option, arg_name = "count")]
    batch: Option<NonZero<u32>>,

    /// give the new workers this share of new connections first, in percent; needs --for
    #[argh(option, arg_name = "percent")]
    canary: Option<Percent>,

    /// how long the new workers have only their share
    #[argh(option, long = "for", arg_name = "duration")]
    period: Option<Length>,

    /// do not wait for the end
    #[argh(switch)]
    no_wait: bool,

    /// wait no longer than this; the reload goes on
    #[argh(option, arg_name = "duration")]
    timeout: Option<Length>,

    /// end the reload that goes on, and keep the workers that serve
    #[argh(switch)]
    abort: bool,

    /// the PID of the reuse-run (default: 1 if that is one, else this user's only one)
    #[argh(positional)]
    pid: Option<u32>,
}

/// Show how a running reuse-run stands. Exits with 0 if all slots are ready, 3 if some, 4 if none.
#[derive(FromArgs, Debug)]
#[argh(help_triggers("-h", "--help"))]
struct StatusArgs {
    /// print it as JSON, in one line
    #[argh(switch)]
    json: bool,

    /// print it anew each second
    #[argh(switch)]
    watch: bool,

    /// the PID of the reuse-run (default: 1 if that is one, else this user's only one)
    #[argh(positional)]
    pid: Option<u32>,
}

/// Change the number of workers of a running reuse-run, and wait until it is done.
#[derive(FromArgs, Debug)]
#[argh(help_triggers("-h", "--help"))]
struct ScaleArgs {
    /// do not wait for the end
    #[argh(switch)]
    no_wait: bool,

    /// wait no longer than this; the scaling goes on
    #[argh(option, arg_name = "duration")]
    timeout: Option<Length>,

    /// how many workers: 4, or +1, -1 for more and fewer
    #[argh(positional)]
    workers: Target,

    /// the PID of the reuse-run (default: 1 if that is one, else this user's only one)
    #[argh(positional)]
    pid: Option<u32>,
}

/// Stop a running reuse-run as SIGTERM does, and wait for its end. Exits with 0 if every worker ended by itself.
#[derive(FromArgs, Debug)]
#[argh(help_triggers("-h", "--help"))]
struct StopArgs {
    /// do not wait for the end
    #[argh(switch)]
    no_wait: bool,

    /// wait no longer than this; the workers are being stopped all the same
    #[argh(option, arg_name = "duration")]
    timeout: Option<Length>,

    /// the PID of the reuse-run (default: 1 if that is one, else this user's only one)
    #[argh(positional)]
    pid: Option<u32>,
}

/// The words that are commands to a running reuse-run, if the first word is one of them.
const COMMANDS: [&str; 4] = ["reload", "status", "scale", "stop"];

/// argh would leave out the command, which it isn't given: see [`split`].
const USAGE: &str = "Usage: reuse-run [options] [--] command [arguments]";

/// The options that stand alone; all others are followed by a value.
const SWITCHES: [&str; 7] = ["-h", "--help", "-V", "--version", "--no-node-ipc", "--no-intercept", "--label"];

/// The short options that may have their value in the same word.
const VALUED: [&str; 3] = ["-n", "-l", "-C"];

#[derive(Debug)]
struct Workers(u32);

impl FromStr for Workers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "max" {
            // Affinity and cgroup quota are looked at by std.
            let usable = std::thread::available_parallelism().map_err(|error| error.to_string())?;
            return Ok(Self(u32::try_from(usable.get()).unwrap_or(u32::MAX)));
        }
        match text.parse::<NonZero<u16>>() {
            Ok(count) => Ok(Self(count.get().into())),
            Err(_) => Err(format!("{text:?} is not a number of workers from 1 to 65535, nor max")),
        }
    }
}

/// More than 0 and less than 100.
#[derive(Debug, PartialEq)]
struct Percent(f64);

impl FromStr for Balancing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "load" => Ok(Self::Load),
            "random" => Ok(Self::Random),
            _ => Err(format!("{text:?} is neither load nor random")),
        }
    }
}

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim_end_matches('%').parse::<f64>() {
            Ok(percent) if Share::from_percent(percent).is_some() => Ok(Self(percent)),
            _ => Err(format!("{text:?} is not a share between 0.01 and 99.99 percent")),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (sign, number) = text.split_at(text.find(|c: char| c.is_ascii_digit()).unwrap_or(0));
        match (sign, number.parse::<NonZero<u16>>()) {
            ("", Ok(number)) => Ok(Self::Exactly(number.get().into())),
            ("+", Ok(number)) => Ok(Self::More(number.get().into())),
            ("-", Ok(number)) => Ok(Self::Fewer(number.get().into())),
            _ => Err(format!("{text:?} is not a number of workers such as 4, +1 or -1")),
        }
    }
}

const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

#[derive(Debug)]
struct Length(Duration);

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            // Far more than anyone waits, and far less than would overflow a clock.
            Ok(duration) if duration > LONGEST => Err(format!("{text:?} is longer than a year")),
            Ok(duration) => Ok(Self(duration)),
            Err(error) => Err(format!("{text:?} is not a duration such as 500ms, 10s or 2m: {error}")),
        }
    }
}

#[derive(Debug)]
struct Ready(Readiness);

impl FromStr for Ready {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "listen" => Ok(Self(Readiness::Listen)),
            "notify" => Ok(Self(Readiness::Notify)),
            _ => match text.parse() {
                Ok(Length(duration)) => Ok(Self(Readiness::Alive(duration))),
                Err(_) => Err(format!("{text:?} is neither listen nor notify nor a duration such as 2s")),
            },
        }
    }
}

#[derive(Debug)]
struct StopSignal(Signal);

impl FromStr for StopSignal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.to_uppercase();
        let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
        let numbered = || text.parse::<i32>().ok().and_then(|number| Signal::try_from(number).ok());
        match Signal::from_str(&name).ok().or_else(numbered) {
            Some(Signal::SIGSTOP | Signal::SIGCONT | Signal::SIGCHLD) | None => {
                Err(format!("{text:?} is not a signal that stops a worker, such as INT, TERM or QUIT"))
            }
            Some(signal) => Ok(Self(signal)),
        }
    }
}

/// How to run.
#[derive(Debug)]
pub struct Options {
    pub program: Program,
    pub policy: Policy,
    pub sources: Sources,
    /// Addresses whose sockets workers are given.
    pub listen: Vec<Address>,
    pub balance: Balancing,
    pub pidfile: Option<PathBuf>,
    /// Whether the workers' output passes through here, line by line.
    pub label: bool,
}

/// What was asked for.
#[derive(Debug)]
pub enum Invocation {
    Run(Box<Options>),
    Control(Command),
    /// Print this to stdout and exit with 0.
    Print(String),
}

/// Reads the command line, without the name of this program.
///
/// The command begins after "--", or at the first word that is neither an option nor an option's value.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Invocation, String> {
    let words: Vec<OsString> = words.into_iter().collect();
    if let Some((first, rest)) = words.split_first()
        && let Some(name) = COMMANDS.iter().find(|name| first == **name)
    {
        let rest: Vec<String> = rest.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        return control(name, &rest);
    }
    let (options, mut command, is_marked) = split(words)?;
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let args = match understand::<Args>(&["reuse-run"], &options)? {
        Ok(args) => args,
        Err(help) => {
            let after_usage = help.split_once('\n').map_or("", |(_, rest)| rest);
            return Ok(Invocation::Print(format!("{USAGE}\n{after_usage}")));
        }
    };
    if args.version {
        return Ok(Invocation::Print(concat!("reuse-run ", env!("CARGO_PKG_VERSION"), "\n").to_owned()));
    }
    if command.is_empty() {
        return Err("no command to run, as in reuse-run -n 4 -- node app.js".to_owned());
    }
    if let Some(name) = COMMANDS.iter().find(|name| command[0] == **name && !is_marked) {
        return Err(format!(
            "{name} stands first, and its options after it; a program of that name, after --"
        ));
    }
    let Args { workers, ready, ready_timeout, drain, stop_timeout, stop_signal, max_failures, .. } = args;
    let program = Program {
        command: command.remove(0),
        args: command,
        stop_signal: stop_signal.0,
        node_ipc: !args.no_node_ipc,
        intercept: !args.no_intercept,
    };
    let sources = Sources { env_files: args.env_file, secrets: args.secret, directory: args.chdir };
    let policy = Policy {
        workers: workers.0,
        readiness: ready.0,
        ready_timeout: ready_timeout.0,
        drain: drain.0,
        stop_timeout: stop_timeout.0,
        stop_signal: stop_signal.0.as_str(),
        max_failures,
        rollout: args.batch.map_or(Rollout::AllAtOnce, |most| Rollout::Batches(most.get())),
    };
    Ok(Invocation::Run(Box::new(Options {
        program,
        policy,
        sources,
        listen: args.listen,
        balance: args.balance,
        pidfile: args.pidfile,
        label: args.label,
    })))
}

/// What argh makes of some words: the arguments, or the help that was asked for.
///
/// # Errors
/// One line that says what is wrong.
fn understand<T: FromArgs>(name: &[&str], words: &[&str]) -> Result<Result<T, String>, String> {
    match T::from_args(name, words) {
        Ok(args) => Ok(Ok(args)),
        Err(EarlyExit { output, status: Ok(()) }) => Ok(Err(output)),
        Err(EarlyExit { output, status: Err(()) }) => {
            let said = output.split(&format!("Run {} --help", name[0])).next().unwrap_or_default();
            let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
            Err(said.trim_start_matches("Error ").to_owned() + " (see --help)")
        }
    }
}

/// Reads a command to a running reuse-run.
fn control(name: &str, words: &[String]) -> Result<Invocation, String> {
    // argh takes "-1" for an option, but not after "--".
    let is_negative = |word: &&str| word.strip_prefix('-').is_some_and(|rest| rest.parse::<u32>().is_ok());
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let Some(at) = words.iter().position(is_negative).filter(|_| name == "scale") {
        words.insert(at, "--");
    }
    let path = ["reuse-run", name];
    let (pid, timeout, request) = match name {
        "status" => {
            return Ok(match understand::<StatusArgs>(&path, &words)? {
                Ok(StatusArgs { json, watch, pid }) => {
                    Invocation::Control(Command { pid, what: What::Status { json, watch } })
                }
                Err(help) => Invocation::Print(help),
            });
        }
        "reload" => match understand::<ReloadArgs>(&path, &words)? {
            Ok(args) => {
                let request = args.request()?;
                (args.pid, args.timeout, request)
            }
            Err(help) => return Ok(Invocation::Print(help)),
        },
        "scale" => match understand::<ScaleArgs>(&path, &words)? {
            Ok(args) => (args.pid, args.timeout, Request::Scale { to: args.workers, wait: !args.no_wait }),
            Err(help) => return Ok(Invocation::Print(help)),
        },
        _ => match understand::<StopArgs>(&path, &words)? {
            Ok(args) => (args.pid, args.timeout, Request::Stop { wait: !args.no_wait }),
            Err(help) => return Ok(Invocation::Print(help)),
        },
    };
    let timeout = timeout.map(|Length(duration)| duration);
    Ok(Invocation::Control(Command { pid, what: What::Change { request, timeout } }))
}

impl ReloadArgs {
    fn request(&self) -> Result<Request, String> {
        let how = match (&self.batch, &self.canary, &self.period) {
            (None, None, None) => None,
            (Some(most), None, None) => Some(How::Batch(most.get())),
            (None, Some(Percent(percent)), Some(Length(period))) => {
                Some(How::Canary { percent: *percent, seconds: period.as_secs_f64() })
            }
            (Some(_), _, _) => return Err("--batch goes with neither --canary nor --for".to_owned()),
            _ => return Err("--canary and --for go together".to_owned()),
        };
        match (self.abort, &how) {
            (false, _) => Ok(Request::Reload { how, wait: !self.no_wait }),
            (true, None) => Ok(Request::Abort),
            (true, Some(_)) => Err("--abort begins no reload, so it goes with no other option".to_owned()),
        }
    }
}

/// Parts our own options, each as one word with its value as another, from the command, and says whether that is
/// marked by "--".
fn split(words: Vec<OsString>) -> Result<(Vec<String>, Vec<OsString>, bool), String> {
    let mut words = words.into_iter();
    let mut options = Vec::new();
    while let Some(word) = words.next() {
        if word == "--" {
            return Ok((options, words.collect(), true));
        }
        let text = word.to_string_lossy();
        if !text.starts_with('-') || text == "-" {
            return Ok((options, [word].into_iter().chain(words).collect(), false));
        }
        if let Some((name, value)) = text.split_once('=').filter(|_| text.starts_with("--")) {
            options.extend([name.to_owned(), value.to_owned()]);
        } else if let Some(value) =
            text.get(2..).filter(|value| !value.is_empty() && VALUED.contains(&&text[..2]))
        {
            options.extend([text[..2].to_owned(), value.to_owned()]);
        } else {
            options.push(text.clone().into_owned());
            if !SWITCHES.contains(&&*text) {
                if let Err(wrong) = understand::<Args>(&["reuse-run"], &[&text, "1"])
                    && wrong.contains("nrecognized")
                {
                    return Err(wrong);
                }
                let value = words.next().filter(|value| value != "--");
                let value = value.ok_or_else(|| format!("{text} needs a value (see --help)"))?;
                options.push(value.to_string_lossy().into_owned());
            }
        }
    }
    Ok((options, Vec::new(), false))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<(Program, Policy), String> {
        match parse(line.split_whitespace().map(OsString::from))? {
            Invocation::Run(options) => Ok((options.program, options.policy)),
            Invocation::Print(text) => Err(text),
            Invocation::Control(command) => Err(format!("{command:?}")),
        }
    }

    #[test]
    fn options_end_where_the_command_begins() {
        for line in [
            "-n 4 -- node --inspect app.js",
            "-n4 node --inspect app.js",
            "--workers=4 node --inspect app.js",
        ] {
            let (program, policy) = run(line).unwrap();
            assert_eq!(policy.workers, 4, "{line}");
            assert_eq!(program.command, "node", "{line}");
            assert_eq!(program.args, ["--inspect", "app.js"], "{line}");
        }
    }

    #[test]
    fn every_option_is_understood() {
        let line =
            "-n 2 --ready notify --ready-timeout 5s --drain 250ms --stop-timeout 1m --stop-signal sigterm x";
        let (program, policy) = run(line).unwrap();
        assert_eq!(policy.readiness, Readiness::Notify);
        assert_eq!(policy.ready_timeout, Duration::from_secs(5));
        assert_eq!(policy.drain, Duration::from_millis(250));
        assert_eq!(policy.stop_timeout, Duration::from_secs(60));
        assert_eq!(program.stop_signal, Signal::SIGTERM);
        assert_eq!(run("--ready 2s x").unwrap().1.readiness, Readiness::Alive(Duration::from_secs(2)));
        assert!(run("-n max x").unwrap().1.workers >= 1);
        let attached = parse(["-n2", "-l3000", "-C/srv", "x"].map(OsString::from)).unwrap();
        let Invocation::Run(attached) = attached else { panic!("{attached:?}") };
        assert_eq!((attached.policy.workers, attached.listen[0].socket.port()), (2, 3000));
        assert_eq!(attached.sources.directory, Some("/srv".into()));
        assert_eq!(run("--stop-signal 3 x").unwrap().0.stop_signal, Signal::SIGQUIT);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("", "no command"),
            ("-n 4 --", "no command"),
            ("-n 0 x", "\"0\""),
            ("-n -- x", "-n needs a value"),
            ("--drain 10 x", "\"10\" is not a duration"),
            ("--drain 2years x", "longer than a year"),
            ("--ready soon x", "\"soon\""),
            ("--stop-signal STOP x", "\"STOP\""),
            ("--frobnicate 1 x", "--frobnicate"),
            ("--frobnicate", "nrecognized argument: --frobnicate"),
        ];
        for (line, part) in cases {
            let error = run(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
            assert!(!error.contains('\n'), "{line}: {error}");
        }
    }

    #[test]
    fn help_and_version_need_no_command() {
        assert!(run("--help").unwrap_err().contains("--ready-timeout"));
        assert!(run("--version").unwrap_err().starts_with("reuse-run "));
    }
}
