//! The command line: from words to validated options.

use std::ffi::OsString;
use std::path::PathBuf;

use argh::{ArgsInfo, CommandInfoWithArgs, EarlyExit, FromArgs, SubCommands};
use log::warn;
use nix::sys::signal::Signal;

use crate::address::Address;
use crate::drain::rule::IdleRule;
use crate::fleet::policy::PROOF;
use crate::fleet::{Policy, Rollout};
use crate::operate::client::{Command, Operation};
use crate::operate::protocol::{Name, Request};
use crate::steering::load::Balancing;
use crate::worker::environment::Sources;
use crate::worker::{Program, Settings};
use args::{CommandArgs, RunArgs, ScaleArgs, StatusArgs, StopArgs};
use split::Split;
use values::{Period, StopSignal};

mod args;
mod help;
mod split;
mod values;
mod variables;

/// How to run.
#[derive(Debug)]
pub struct Options {
    pub program: Program,
    pub settings: Settings,
    pub policy: Policy,
    /// What workers are asked for, under [`crate::fleet::Readiness::Answers`].
    pub probe_path: Option<String>,
    pub sources: Sources,
    /// Addresses whose sockets workers are given.
    pub listen: Vec<Address>,
    pub idle_rule: IdleRule,
    pub balance: Balancing,
    /// In KiB.
    pub max_memory: Option<u64>,
    pub retire_signal: Option<Signal>,
    /// By which commands find it.
    pub name: Option<Name>,
    /// Whether UDP ports that workers bind are shared.
    pub shares_udp: bool,
    pub pidfile: Option<PathBuf>,
    /// Whether the workers' output passes through here, line by line.
    pub label: bool,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    Run(Box<Options>),
    Control(Command),
    /// Print this to stdout and exit with 0.
    Print(String),
}

/// Reads the command line, without the name of this program, and the environment variables.
///
/// The command begins after "--", or at the first word that is neither an option nor the value of one.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse(
    words: impl IntoIterator<Item = OsString>,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Invocation, String> {
    let words: Vec<OsString> = words.into_iter().collect();
    if let Some((first, rest)) = words.split_first()
        && let Some(name) = command_name(first)
    {
        let (rest, program) = split_program(name, rest)?;
        return parse_command(name, &rest, program);
    }
    let Split { mut options, command, is_marked } = split::split(words, RunArgs::get_args_info().flags)?;
    let Some(args) = parse_options::<RunArgs>(&["reuse-run"], &options)? else {
        let commands = CommandArgs::get_args_info().commands;
        let info = CommandInfoWithArgs { commands, ..RunArgs::get_args_info() };
        return Ok(Invocation::Print(help::text("reuse-run", "[--] command [arguments]", &info)));
    };
    if args.version {
        return Ok(Invocation::Print(concat!("reuse-run ", env!("CARGO_PKG_VERSION"), "\n").to_owned()));
    }
    options.extend(options_of_variables(&options, variables)?);
    let args = parse_options::<RunArgs>(&["reuse-run"], &options)?.unwrap_or(args);
    if args.batch.is_some() && args.balance == Balancing::Queue {
        let why = "a generation with one queue is replaced as a whole";
        return Err(format!("--batch can't be combined with --balance queue: {why}"));
    }
    check_retire_signal(&args)?;
    let mut command = command.into_iter();
    let Some(program) = command.next() else {
        return Err("no command to run, as in reuse-run -n 4 -- node app.js".to_owned());
    };
    if let Some(name) = command_name(&program).filter(|_| !is_marked) {
        return Err(format!("put {name} first; to run a program of that name write -- {name}"));
    }
    Ok(Invocation::Run(Box::new(options_of(args, program, command.collect()))))
}

/// The options that are given by variables and aren't among those of the command line.
///
/// # Errors
/// Which variable is wrong.
fn options_of_variables(
    options: &[String],
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Vec<String>, String> {
    let said = variables::read(RunArgs::get_args_info().flags, options, variables)?;
    for name in said.unknown {
        warn!("there is no option for the variable {name} (see --help)");
    }
    let mut all = Vec::new();
    for (variable, words) in said.options {
        parse_options::<RunArgs>(&["reuse-run"], &words).map_err(|why| {
            let why = why.strip_prefix(&format!("{}: ", words[0])).unwrap_or(&why);
            format!("{variable}: {why}")
        })?;
        all.extend(words);
    }
    Ok(all)
}

/// # Errors
/// When a worker couldn't do what the signal asks for.
fn check_retire_signal(args: &RunArgs) -> Result<(), String> {
    match &args.retire_signal {
        Some(StopSignal(Signal::SIGKILL)) => {
            Err("--retire-signal KILL ends a worker before it has finished its requests".to_owned())
        }
        Some(signal) if *signal == args.stop_signal => {
            let name = signal.0.as_str();
            Err(format!("--retire-signal {name} is also the stop signal: a worker can't tell them apart"))
        }
        _ => Ok(()),
    }
}

/// The words of a command before "--", and those after it: what a reload starts.
///
/// # Errors
/// When there are none after it, or one that JSON can't hold.
fn split_program(name: &str, words: &[OsString]) -> Result<(Vec<String>, Option<Vec<String>>), String> {
    let is_mark = |word: &OsString| name == "reload" && word == "--";
    let (before, after) = match words.iter().position(is_mark) {
        Some(at) => (&words[..at], Some(&words[at + 1..])),
        None => (words, None),
    };
    let utf8 = |word: &OsString| {
        word.to_str().map(str::to_owned).ok_or_else(|| format!("{} is not UTF-8", word.display()))
    };
    let after = after.map(|words| words.iter().map(utf8).collect::<Result<Vec<_>, _>>()).transpose()?;
    if after.as_ref().is_some_and(Vec::is_empty) {
        return Err("no command after --, as in reuse-run reload -- node app.js".to_owned());
    }
    Ok((before.iter().map(|word| word.to_string_lossy().into_owned()).collect(), after))
}

/// The name of the command to a running reuse-run that a word is.
fn command_name(word: &OsString) -> Option<&'static str> {
    CommandArgs::COMMANDS.iter().map(|command| command.name).find(|name| word == name)
}

fn options_of(args: RunArgs, command: OsString, arguments: Vec<OsString>) -> Options {
    Options {
        program: Program { command, args: arguments },
        settings: Settings {
            stop_signal: args.stop_signal.0,
            node_ipc: !args.no_node_ipc,
            intercept: !args.no_intercept,
            has_udp: args.udp || args.listen.iter().any(Address::is_udp),
        },
        policy: Policy {
            workers: args.workers.0,
            readiness: args.ready.readiness,
            ready_timeout: args.ready_timeout.0,
            proof: PROOF,
            drain: args.drain.0,
            stop_timeout: args.stop_timeout.0,
            stop_within: args.stop_within.0,
            stop_signal: args.stop_signal.0.as_str(),
            hung_timeout: args.hung_timeout.map(|timeout| timeout.0),
            max_age: args.max_age.map(|age| age.0),
            max_failures: args.max_failures,
            rollout: args.batch.map_or(Rollout::AllAtOnce, |most| Rollout::Batches(most.get())),
            shares_queue: args.balance == Balancing::Queue,
        },
        probe_path: args.ready.path,
        sources: Sources { env_files: args.env_file, secrets: args.secret, directory: args.chdir },
        listen: args.listen,
        idle_rule: IdleRule {
            idle_after: args.idle_after.map(|after| after.0),
            quiet_after: args.quiet_after.0,
            is_stopping: false,
        },
        balance: args.balance,
        max_memory: args.max_memory.map(|size| size.0),
        retire_signal: args.retire_signal.map(|signal| signal.0),
        name: args.name,
        shares_udp: args.udp,
        pidfile: args.pidfile,
        label: args.label,
    }
}

/// What argh makes of some words, or nothing if they ask for the help.
///
/// # Errors
/// One line that says what is wrong.
fn parse_options<T: FromArgs>(name: &[&str], words: &[String]) -> Result<Option<T>, String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match T::from_args(name, &words) {
        Ok(args) => Ok(Some(args)),
        Err(EarlyExit { status: Ok(()), .. }) => Ok(None),
        Err(EarlyExit { output, status: Err(()) }) => Err(one_line(&output)),
    }
}

/// An error of argh's in our form: lower case, no full stop, one line. Our own errors repeat the value.
fn one_line(error: &str) -> String {
    let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
    let of_value = |kind: &str| {
        let (name, rest) = error.strip_prefix(kind)?.split_once("' with value '")?;
        Some(format!("{name}: {}", rest.split_once("': ")?.1))
    };
    let text = of_value("Error parsing option '").or_else(|| of_value("Error parsing positional argument '"));
    let text = text.unwrap_or_else(|| {
        let (first, rest) = error.split_at_checked(1).unwrap_or_default();
        first.to_lowercase() + rest.trim_end_matches('.')
    });
    text + " (see --help)"
}

/// Reads a command to a running reuse-run.
fn parse_command(name: &str, words: &[String], program: Option<Vec<String>>) -> Result<Invocation, String> {
    // argh takes "-1" for an option, but not " -1", which Target reads as well.
    let is_negative = |word: &str| {
        name == "scale" && word.strip_prefix('-').is_some_and(|rest| rest.parse::<u32>().is_ok())
    };
    let words: Vec<String> =
        words.iter().map(|word| if is_negative(word) { format!(" {word}") } else { word.clone() }).collect();
    let Some(args) = parse_options::<CommandArgs>(&["reuse-run", name], &words)? else {
        let info = CommandArgs::get_args_info().commands.into_iter().find(|it| it.name == name);
        let info = info.map(|it| it.command).unwrap_or_default();
        let program = if name == "reload" { " [-- command [arguments]]" } else { "" };
        let operands = help::operands(&info) + program;
        return Ok(Invocation::Print(help::text(&format!("reuse-run {name}"), &operands, &info)));
    };
    let (which, timeout, request) = match args {
        CommandArgs::Status(StatusArgs { json, watch, which }) => {
            return Ok(Invocation::Control(Command { which, operation: Operation::Show { json, watch } }));
        }
        CommandArgs::Reload(args) => {
            let request = args.request(program)?;
            (args.which, args.timeout, request)
        }
        CommandArgs::Scale(ScaleArgs { no_wait, timeout, workers, which }) => {
            (which, timeout, Request::Scale { to: workers, wait: !no_wait })
        }
        CommandArgs::Recycle(args) => {
            let request = args.request()?;
            (args.which, args.timeout, request)
        }
        CommandArgs::Stop(StopArgs { no_wait, timeout, which }) => {
            (which, timeout, Request::Stop { wait: !no_wait })
        }
    };
    let timeout = timeout.map(|Period(duration)| duration);
    Ok(Invocation::Control(Command { which, operation: Operation::Change { request, timeout } }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::sys::signal::Signal;

    use super::*;
    use crate::fleet::Readiness;
    use crate::operate::find::Which;
    use crate::operate::protocol::{How, Target};

    fn run(line: &str) -> Result<Options, String> {
        match parse(line.split_whitespace().map(OsString::from), [])? {
            Invocation::Run(options) => Ok(*options),
            Invocation::Print(text) => Err(text),
            Invocation::Control(command) => Err(format!("{command:?}")),
        }
    }

    fn command(line: &str) -> Result<(Option<Which>, Request, Option<Duration>), String> {
        match parse(line.split_whitespace().map(OsString::from), [])? {
            Invocation::Control(Command { which, operation: Operation::Change { request, timeout } }) => {
                Ok((which, request, timeout))
            }
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn every_option_is_understood() {
        let line = "-n 2 --ready :9000/healthz --ready-timeout 5s --drain 250ms --stop-timeout 1m --stop-within 25s --idle-after 2s \
                    --stop-signal sigterm --max-failures 3 --balance random --hung-timeout 8s --max-memory 500M --max-age 1h --retire-signal usr2 --udp --quiet-after 4s -l 3000 --env-file a --env-file b -C /srv --no-node-ipc \
                    --no-intercept --batch 2 --name web --pidfile p --label x y";
        let options = run(line).unwrap();
        let Options {
            program,
            settings,
            policy,
            probe_path,
            sources,
            listen,
            idle_rule,
            balance,
            max_memory,
            retire_signal,
            name,
            shares_udp,
            pidfile,
            label,
        } = options;
        assert_eq!((program.command, program.args), ("x".into(), vec!["y".into()]));
        assert_eq!(
            (settings.stop_signal, settings.node_ipc, settings.intercept),
            (Signal::SIGTERM, false, false)
        );
        let answers = Readiness::Answers { port: Some(9000) };
        assert_eq!((policy.workers, policy.readiness), (2, answers));
        assert_eq!(probe_path.as_deref(), Some("/healthz"));
        assert_eq!(policy.ready_timeout, Duration::from_secs(5));
        assert_eq!(policy.drain, Duration::from_millis(250));
        assert_eq!([policy.stop_timeout, policy.stop_within].map(|time| time.as_secs()), [60, 25]);
        assert_eq!(idle_rule.idle_after, Some(Duration::from_secs(2)));
        assert_eq!([policy.hung_timeout, policy.max_age], [8, 3600].map(|it| Some(Duration::from_secs(it))));
        assert_eq!((max_memory, retire_signal), (Some(500 * 1024), Some(Signal::SIGUSR2)));
        assert_eq!((shares_udp, idle_rule.quiet_after), (true, Duration::from_secs(4)));
        assert_eq!((policy.stop_signal, policy.max_failures), ("SIGTERM", 3));
        assert_eq!(policy.rollout, Rollout::Batches(2));
        assert_eq!(
            (sources.env_files, sources.directory),
            (vec!["a".into(), "b".into()], Some("/srv".into()))
        );
        assert_eq!((listen[0].socket.port(), balance), (3000, Balancing::Random));
        assert_eq!((name, pidfile, label), (Name::new("web"), Some("p".into()), true));
    }

    #[test]
    fn an_error_names_the_option_and_the_value_in_one_line() {
        let cases = [
            ("", "no command to run"),
            ("-n 4 --", "no command to run"),
            ("-n 0 x", "-n: \"0\" is neither a number of workers"),
            ("--workers=0 x", "--workers: \"0\" is"),
            ("-n -- x", "-n needs a value"),
            ("--drain 10 x", "--drain: \"10\" is not a duration"),
            ("--max-failures x y", "--max-failures: "),
            ("--ready soon x", "--ready: \"soon\" is neither listen nor notify"),
            ("--frobnicate 1 x", "unrecognized argument: --frobnicate"),
            ("--batch 1 --balance queue x", "--batch can't be combined with --balance queue"),
            ("--frobnicate", "unrecognized argument: --frobnicate"),
            ("--retire-signal INT x", "--retire-signal SIGINT is also the stop signal"),
            ("--stop-signal TERM --retire-signal 15 x", "--retire-signal SIGTERM is also the stop signal"),
            ("--retire-signal KILL x", "--retire-signal KILL ends a worker before"),
            ("--retire-signal STOP x", "--retire-signal: \"STOP\" is not a signal that a worker can take"),
            ("--drain 1s --drain 2s x", "--drain: duplicate values"),
            ("--label reload", "put reload first"),
            ("scale", "required positional arguments not provided: workers"),
            ("scale 0", "workers: \"0\" is not a number of workers"),
            ("scale 1 --timeout", "no value provided for option '--timeout' (see"),
            ("reload --batch 2 --canary 5 --for 1s", "--batch can't be combined"),
            ("reload --canary 5", "--canary needs --for"),
            ("reload --for 5s", "--for needs --canary"),
            ("reload --canary 0 --for 5s", "0 is not a share"),
            ("reload --canary NaN --for 5s", "NaN is not a share"),
            ("reload --canary 100% --for 5s", "100 is not a share"),
            ("reload --canary half --for 5s", "--canary: \"half\" is not a number of percent"),
            ("reload --abort --batch 1", "--abort starts no reload"),
            ("reload --abort --ports-may-change", "--abort starts no reload"),
            ("reload --abort -- node", "--abort starts no reload"),
            ("reload --", "no command after --"),
            ("stop 1x", "\"1x\" is neither a PID nor a name"),
        ];
        for (line, part) in cases {
            let error = parse(line.split_whitespace().map(OsString::from), []).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
            assert!(!error.contains('\n'), "{line}: {error}");
        }
    }

    #[test]
    fn a_word_that_json_cannot_hold_is_refused() {
        use std::os::unix::ffi::OsStringExt;
        let word = OsString::from_vec(b"caf\xe9.js".to_vec());
        let words = ["reload", "--", "node"].map(OsString::from).into_iter().chain([word]);
        let error = parse(words, []).unwrap_err();
        assert!(error.contains("is not UTF-8"), "{error}");
    }

    #[test]
    fn a_command_becomes_its_request() {
        let second = Some(Duration::from_secs(1));
        let canary = How::Canary { percent: 5.0, seconds: 60.0 };
        let reload = |how| Request::Reload { how, ports_may_change: false, command: None, wait: true };
        let words = Some(["node", "--batch", "app.js", "--"].map(str::to_owned).to_vec());
        let other = Request::Reload { how: None, ports_may_change: true, command: words, wait: false };
        for (line, expected) in [
            ("reload", (None, reload(None), None)),
            ("reload --batch 2 7", (Some(Which::Pid(7)), reload(Some(How::Batch(2))), None)),
            ("reload --canary 5% --for 1m", (None, reload(Some(canary)), None)),
            (
                "reload --ports-may-change --no-wait 7 -- node --batch app.js --",
                (Some(Which::Pid(7)), other, None),
            ),
            ("reload --abort 7", (Some(Which::Pid(7)), Request::Abort, None)),
            ("scale -1 --no-wait", (None, Request::Scale { to: Target::Fewer(1), wait: false }, None)),
            (
                "scale --timeout 1s 4 7",
                (Some(Which::Pid(7)), Request::Scale { to: Target::Exactly(4), wait: true }, second),
            ),
            ("stop --timeout 1s", (None, Request::Stop { wait: true }, second)),
            (
                "recycle --pid 7 0 2",
                (Some(Which::Pid(7)), Request::Recycle { slots: vec![0, 2], wait: true }, None),
            ),
            ("recycle --all --no-wait", (None, Request::Recycle { slots: Vec::new(), wait: false }, None)),
        ] {
            assert_eq!(command(line), Ok(expected), "{line}");
        }
    }

    #[test]
    fn a_program_with_the_name_of_a_command_runs_after_the_mark() {
        assert_eq!(run("-- reload x").unwrap().program.command, "reload");
        assert!(command("reload").is_ok());
    }

    #[test]
    fn help_and_version_need_no_command() {
        let help = run("--help").unwrap_err();
        assert!(help.starts_with("Usage: reuse-run [options] [--] command [arguments]\n"), "{help}");
        assert!(help.contains("--ready-timeout"));
        assert_eq!(run("-h").unwrap_err(), help);
        assert!(help.lines().all(|line| line.len() <= 80), "{help}");
        assert!(run("--version").unwrap_err().starts_with("reuse-run "));
        for command in CommandArgs::COMMANDS {
            let help = run(&format!("{} -h", command.name)).unwrap_err();
            assert!(help.starts_with(&format!("Usage: reuse-run {} [options] ", command.name)), "{help}");
            assert!(help.lines().all(|line| line.len() <= 80), "{help}");
            for section in ["\n\nArguments:\n", "\n\nOptions:\n", "\n\nExit status:\n", "\n\nExamples:\n"] {
                assert!(help.contains(section), "{section:?} is not in {help}");
            }
        }
    }
}
