//! The machine on which the figures were measured.

use std::process::Command;
use std::{fmt, fs};

use serde::Serialize;

#[derive(Serialize)]
pub struct Machine {
    cpu: String,
    cores: usize,
    memory_gib: f64,
    kernel: String,
    /// In UTC.
    date: String,
    versions: Vec<(String, String)>,
}

impl Machine {
    pub fn this(binary: &std::path::Path) -> Machine {
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = field(&meminfo, "MemTotal").and_then(|text| text.split(' ').next()?.parse().ok());
        let versions = [
            (binary.to_str().unwrap_or("reuse-run"), "--version"),
            ("node", "--version"),
            ("nginx", "-v"),
            ("python3", "--version"),
            ("rustc", "--version"),
        ];
        let name = |program: &str| program.rsplit('/').next().unwrap_or_default().to_owned();
        Machine {
            cpu: field(&cpuinfo, "model name").or(field(&cpuinfo, "CPU implementer")).unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(0, Into::into),
            memory_gib: (kib.unwrap_or(0.0) / 1024.0 / 1024.0 * 10.0_f64).round() / 10.0,
            kernel: first_line("uname", &["-r"]),
            date: first_line("date", &["-u", "+%Y-%m-%d %H:%M"]),
            versions: versions
                .map(|(program, option)| (name(program), first_line(program, &[option])))
                .into(),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, cores, memory_gib, kernel, date, versions } = self;
        write!(f, "Measured on {date} UTC: {cpu}, {cores} cores, {memory_gib} GiB, Linux {kernel}")?;
        versions.iter().try_for_each(|(_, version)| write!(f, ", {version}"))
    }
}

/// The first line that a command prints, to stdout or stderr.
fn first_line(program: &str, args: &[&str]) -> String {
    let Ok(output) = Command::new(program).args(args).output() else { return "missing".to_owned() };
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned()
}
