//! Compares reuse-run with its alternatives, see scripts/bench.
#![cfg_attr(clippy, deny(warnings))]

mod balance;
mod cost;
mod filter;
mod latency;
#[path = "../common/lines.rs"]
mod lines;
#[path = "../common/load/mod.rs"]
mod load;
mod machine;
mod micro;
#[path = "../common/netns.rs"]
mod netns;
mod peers;
mod plots;
mod process;
mod protocols;
mod reload;
mod report;
mod wrapper;

use std::fmt::Display;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The error is a message for the user.
pub type Result<T> = std::result::Result<T, String>;

pub trait Context<T> {
    fn context(self, what: &str) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: &str) -> Result<T> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

/// The experiments, by their names on the command line.
type Experiment = fn(&Options) -> Result<()>;
const EXPERIMENTS: [(&str, Experiment); 7] = [
    ("balance", balance::run),
    ("reload", reload::run),
    ("latency", latency::run),
    ("cost", cost::run),
    ("wrapper", wrapper::run),
    ("filter", filter::run),
    ("micro", micro::run),
];

pub struct Options {
    /// Measure less of everything, within five minutes.
    pub quick: bool,
    pub runs: Option<u32>,
    pub seed: u32,
    /// The reuse-run to measure.
    pub binary: PathBuf,
    /// target/PROFILE, which holds the examples.
    pub binary_folder: PathBuf,
    /// The folder for results.
    pub out: PathBuf,
    /// The folder for all other files.
    pub work: PathBuf,
    /// Measure only parts of experiments with this in their name.
    pub only: Option<String>,
}

impl Options {
    /// Whether to measure the part with this name.
    pub fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only))
    }
}

fn main() -> ExitCode {
    if let Some(file) = std::env::var_os(filter::PROBE) {
        return filter::probe(&file);
    }
    match parse().and_then(|(options, names)| run(&options, &names)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<(Options, Vec<String>)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    // target/PROFILE/examples/bench finds target/PROFILE/reuse-run.
    let own = std::env::current_exe().context("own path")?;
    let built = own.ancestors().nth(2).ok_or("own path is too short")?;
    let mut options = Options {
        quick: false,
        runs: None,
        seed: 1,
        binary: built.join("reuse-run"),
        binary_folder: built.to_owned(),
        out: root.join("scripts/bench-results"),
        work: built.join("bench"),
        only: None,
    };
    let mut names = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--quick" => options.quick = true,
            "--runs" => options.runs = Some(value()?.parse::<NonZeroU32>().context("--runs")?.get()),
            "--seed" => options.seed = value()?.parse().context("--seed")?,
            "--binary" => options.binary = std::path::absolute(value()?).context("--binary")?,
            "--out" => options.out = std::path::absolute(value()?).context("--out")?,
            "--only" => options.only = Some(value()?),
            name if EXPERIMENTS.iter().any(|(known, _)| *known == name) => names.push(arg),
            _ => return Err(format!("unknown argument {arg} (see scripts/bench --help)")),
        }
    }
    Ok((options, names))
}

/// Runs the experiments of these names, or all.
fn run(options: &Options, names: &[String]) -> Result<()> {
    std::env::set_current_dir(env!("CARGO_MANIFEST_DIR")).context("the repository")?;
    for folder in [&options.out, &options.work] {
        std::fs::create_dir_all(folder).context(&folder.display().to_string())?;
    }
    process::adopt_orphans()?;
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("catch SIGINT")?;
    thread::spawn(move || {
        signals.forever().next();
        process::end_all(&[]);
        std::process::exit(1);
    });
    for (name, experiment) in EXPERIMENTS {
        if names.is_empty() || names.iter().any(|wanted| wanted == name) {
            let begun = Instant::now();
            experiment(options)?;
            eprintln!("{name}: took {:.0} s", begun.elapsed().as_secs_f64());
        }
    }
    Ok(())
}

/// Does `work` in a new network namespace, in which port 3000 is free and no connection of an earlier measurement is left. Then
/// ends all processes that it has started.
pub fn isolated<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            netns::enter().context("no network namespace (root may make one)")?;
            let result = work();
            process::end_all(&[]);
            result
        });
        thread.join().unwrap_or_else(|_| {
            process::end_all(&[]);
            Err("the bench itself failed".to_owned())
        })
    })
}

/// The order in which `count` servers are loaded: forth and back, each time beginning with another one, so that each server
/// has each place equally often.
pub fn in_turn(turn: u32, count: usize) -> impl Iterator<Item = usize> {
    let first = turn as usize / 2;
    let place = move |place| if turn.is_multiple_of(2) { place } else { count - 1 - place };
    (0..count).map(move |index| (first + place(index)) % count)
}

/// `long`, or `short` for --quick.
pub fn length(options: &Options, long: f64, short: f64) -> Duration {
    Duration::from_secs_f64(if options.quick { short } else { long })
}
