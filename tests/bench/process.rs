//! Starts processes, measures their CPU time, and ends them.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

use crate::{Context, Result};

/// Makes this process the parent of orphans among its descendants, so that it can find and end daemons.
pub fn adopt_orphans() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context("become a subreaper")
}

/// Starts a command in its own process group, with its output in a file, and with `listener` as fd 3, see
/// sd_listen_fds(3).
pub fn spawn(command: &mut Command, log: &File, listener: Option<&OwnedFd>) -> Result<Child> {
    let shown = format!("start {:?}", command.get_program());
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("log")?)
        .stderr(log.try_clone().context("log")?);
    command.process_group(0);
    if listener.is_some() {
        command.env("LISTEN_FDS", "1");
    }
    let listener = listener.map(AsRawFd::as_raw_fd);
    // SAFETY: prctl and dup2 are async-signal-safe, and the descriptor is open in the parent.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            if let Some(listener) = listener
                && libc::dup2(listener, 3) == -1
            {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command.spawn().context(&shown)
}

/// Has a command run behind a filter that allows every system call, as a container's program runs behind one that allows nearly
/// all (seccomp(2)).
pub fn filter(command: &mut Command) {
    // SAFETY: prctl and seccomp are async-signal-safe, and the program outlives the call.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_no_new_privs()?;
            let code = (libc::BPF_RET | libc::BPF_K) as u16;
            let mut allow = libc::sock_filter { code, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
            let program = libc::sock_fprog { len: 1, filter: &raw mut allow };
            match libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
}

/// A file to append the output of a server to.
pub fn log_file(path: &std::path::Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(path).context(&path.display().to_string())
}

/// The children of every process.
fn children() -> BTreeMap<i32, Vec<i32>> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let Ok(processes) = fs::read_dir("/proc") else { return children };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Some(parent) = stat(pid).and_then(|fields| fields.get(1)?.parse().ok()) else { continue };
        children.entry(parent).or_default().push(pid);
    }
    children
}

/// The fields of /proc/PID/stat from the state on, which is the third.
fn stat(pid: i32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

/// The name of a process, as it gives it itself.
pub fn name(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
}

/// Whether a process is neither dead nor a zombie.
pub fn lives(pid: i32) -> bool {
    stat(pid).is_some_and(|fields| fields[0] != "Z" && fields[0] != "X")
}

/// All descendants of a process.
pub fn descendants(pid: i32) -> Vec<i32> {
    let children = children();
    let mut found = Vec::new();
    let mut open = vec![pid];
    while let Some(pid) = open.pop() {
        for child in children.get(&pid).into_iter().flatten() {
            found.push(*child);
            open.push(*child);
        }
    }
    found
}

/// All descendants of this process.
pub fn tree() -> Vec<i32> {
    descendants(std::process::id() as i32)
}

/// The CPU time of processes, user and system, with that of ended threads.
pub fn cpu_time(pids: &[i32]) -> Duration {
    let of = |pid: &i32| clock_getcpuclockid(Pid::from_raw(*pid)).and_then(nix::time::ClockId::now);
    pids.iter().filter_map(|pid| of(pid).ok()).map(Duration::from).sum()
}

/// Sends a signal. It is no error if the process has ended.
pub fn signal(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

/// Ends all processes that were started and waits for their end: `first` by SIGTERM, and after a while the others by SIGKILL.
pub fn end_all(first: &[i32]) {
    first.iter().for_each(|pid| signal(*pid, Signal::SIGTERM));
    let patience = Instant::now() + Duration::from_secs(3);
    loop {
        reap();
        let left = tree();
        if left.is_empty() {
            return;
        }
        if Instant::now() > patience || !first.iter().any(|pid| lives(*pid)) {
            left.iter().for_each(|pid| signal(*pid, Signal::SIGKILL));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn reap() {
    while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
    {
    }
}

/// Waits until `condition` returns something.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if Instant::now() > deadline {
            return Err(format!("waited {} s in vain for {what}", limit.as_secs()));
        }
        thread::sleep(Duration::from_millis(5));
    }
}
