//! What /proc tells about a process, and signals.
#![allow(dead_code)]

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The children of a process, zombies included, without the processes in which reuse-run does what may wait. Waits for those
/// that have yet to take a name, or to execute a program.
pub fn children(pid: u32) -> Vec<u32> {
    let identity = |pid: u32| ["comm", "cmdline"].map(|file| fs::read(format!("/proc/{pid}/{file}")).ok());
    let begun = Instant::now();
    loop {
        let (all, own) = (all_children(pid), identity(pid));
        if begun.elapsed() < Duration::from_secs(60) && all.iter().any(|child| identity(*child) == own) {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        let is_there = |pid: &u32| fs::exists(format!("/proc/{pid}")).is_ok_and(|is_there| is_there);
        return all.into_iter().filter(|pid| !is_helper(*pid) && is_there(pid)).collect();
    }
}

pub fn all_children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Whether a process is one in which a running reuse-run does what may wait.
pub fn is_helper(pid: u32) -> bool {
    let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap_or_default();
    name(&pid.to_string()).starts_with("reuse-run-") && name(parent.trim()).starts_with("reuse-run")
}

pub fn pids() -> BTreeSet<u32> {
    let entries = fs::read_dir("/proc").expect("read /proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Fields of /proc/PID/stat.
pub struct Process {
    pub state: char,
    pub group: u32,
}

impl Process {
    pub fn read(pid: u32) -> Option<Process> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // After the name, which may contain any character: state, parent, group.
        let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
        let state = fields.next()?.chars().next()?;
        Some(Process { state, group: fields.nth(1)?.parse().ok()? })
    }
}

/// The CPU time of a process, user and system, in hundredths of a second.
#[track_caller]
pub fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the stat of a process");
    let fields = stat[stat.rfind(')').expect("a name") + 1..].split_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number")).sum()
}

/// How often a process has gone to sleep.
#[track_caller]
pub fn wake_ups(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the status of a process");
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.and_then(|count| count.trim().parse().ok()).expect("a number")
}

/// Sends a signal to a process, which must exist.
#[track_caller]
pub fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap_or_else(|error| panic!("{signal} to {pid}: {error}"));
}

/// Major and minor version of the kernel.
pub fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().expect("a number"));
    (numbers.next().expect("a version"), numbers.next().expect("a version"))
}

/// The names of the signals in a line of /proc/PID/status such as "SigBlk:".
pub fn signals_in(pid: u32, line: &str) -> Vec<Signal> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the status of a process");
    let mask = status.lines().find_map(|text| text.strip_prefix(line)).expect("a line of the status");
    let mask = u64::from_str_radix(mask.trim(), 16).expect("a mask");
    Signal::iterator().filter(|signal| mask & (1 << (*signal as u64 - 1)) != 0).collect()
}
