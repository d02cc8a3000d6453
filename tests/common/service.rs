//! `reuse-run` under test.

use std::ffi::OsStr;
use std::fs;
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::address::free_address;
use super::folder::Folder;
use super::lines::{Line, Lines};
use super::process::{Process, children, is_helper, pids};
use super::program::{app, python_packages, reuse_run, reuse_run_with};
use super::wait::{DEADLINE, POLL, holds_for, wait_until};

/// The environment variable by which all processes of a service are found, whatever their parent.
pub const MARK: &str = "TEST_REUSE_RUN_MARK";

/// A running `reuse-run`. Dropping it kills every process that it or its workers have started.
pub struct Service {
    child: Child,
    status: Option<ExitStatus>,
    mark: String,
    /// The log of reuse-run, and what its workers print to stderr.
    pub log: Lines,
    /// What the workers print to stdout.
    pub out: Lines,
    readers: Vec<JoinHandle<()>>,
}

impl Service {
    /// `reuse-run` with these arguments.
    pub fn start<I, S>(args: I) -> Service
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = reuse_run();
        command.args(args);
        Service::spawn(command)
    }

    /// `reuse-run OPTIONS -- COMMAND`, options separated by spaces.
    pub fn run<S: AsRef<str>>(options: &str, command: &[S]) -> Service {
        Service::spawn(reuse_run_with(options, command))
    }

    /// `reuse-run OPTIONS -- COMMAND` whose first generation is ready.
    #[track_caller]
    pub fn run_ready<S: AsRef<str>>(options: &str, command: &[S]) -> Service {
        Service::spawn_ready(reuse_run_with(options, command))
    }

    /// A command that is or becomes `reuse-run` and whose first generation is ready.
    #[track_caller]
    pub fn spawn_ready(command: Command) -> Service {
        let service = Service::spawn(command);
        service.wait_until_ready();
        service
    }

    /// `reuse-run OPTIONS -- COMMAND` at a free address, whose first generation is ready. COMMAND is
    /// [`Folder::server`] with `more` options.
    #[track_caller]
    pub fn with_flags(options: &str, more: &[&str]) -> (SocketAddr, Folder, Service) {
        let (addr, folder) = (free_address(), Folder::new());
        let service = Service::run_ready(options, &folder.server(addr, more));
        (addr, folder, service)
    }

    /// Waits until the first generation is ready. Panics at once when reuse-run gives up.
    #[track_caller]
    pub fn wait_until_ready(&self) {
        let over = |line: &str| line.contains("generation 1 is ready") || line.contains("giving up");
        let line = self.wait_for_line_where(0, "says how the start went", over);
        assert!(line.text.contains("generation 1 is ready"), "{}", self.log.text());
    }

    /// A command that is or becomes `reuse-run`.
    pub fn spawn(mut command: Command) -> Service {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let mark = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        command.env(MARK, &mark).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("start reuse-run");
        let (log, out) = (Lines::default(), Lines::default());
        let readers = vec![
            log.read(child.stderr.take().expect("stderr is a pipe")),
            out.read(child.stdout.take().expect("stdout is a pipe")),
        ];
        Service { child, status: None, mark, log, out, readers }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of the log.
    #[track_caller]
    pub fn wait_for_line(&self, part: &str) -> Line {
        self.wait_for_line_after(0, part)
    }

    /// Waits for a line of the log, from number `from` on.
    #[track_caller]
    pub fn wait_for_line_after(&self, from: usize, part: &str) -> Line {
        match self.log.wait_for(from, DEADLINE, |line| line.contains(part)) {
            Some(line) => line,
            None => panic!("no line {part:?} within {DEADLINE:?} in the log:\n{}", self.log.text()),
        }
    }

    /// Waits for a line of the log, from number `from` on, that is `wanted`.
    #[track_caller]
    pub fn wait_for_line_where(&self, from: usize, what: &str, wanted: impl Fn(&str) -> bool) -> Line {
        match self.log.wait_for(from, DEADLINE, wanted) {
            Some(line) => line,
            None => panic!("no line that {what} within {DEADLINE:?} in the log:\n{}", self.log.text()),
        }
    }

    /// Waits for a line that a worker prints.
    #[track_caller]
    pub fn wait_for_output(&self, part: &str) -> Line {
        match self.out.wait_for(0, DEADLINE, |line| line.contains(part)) {
            Some(line) => line,
            None => panic!(
                "no line {part:?} within {DEADLINE:?} in the output:\n{}\nlog:\n{}",
                self.out.text(),
                self.log.text()
            ),
        }
    }

    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).expect("signal reuse-run");
    }

    /// Reloads and waits until the old generation has ended; returns how long that took.
    #[track_caller]
    pub fn reload(&self) -> Duration {
        let (begun, from) = (Instant::now(), self.log.count());
        self.signal(Signal::SIGUSR2);
        let ended = |line: &str| line.contains("reload done") || line.contains("reload abandoned");
        match self.log.wait_for(from, DEADLINE, ended) {
            Some(line) if line.text.contains("reload done") => line.at - begun,
            Some(_) => panic!("the reload was abandoned:\n{}", self.log.text()),
            None => panic!("the reload did not end within {DEADLINE:?}:\n{}", self.log.text()),
        }
    }

    /// Reloads and asserts that the reload is abandoned. Returns what was logged meanwhile.
    #[track_caller]
    pub fn failing_reload(&self) -> String {
        let from = self.log.count();
        self.signal(Signal::SIGUSR2);
        self.wait_for_line_after(from, "reload abandoned");
        let lines: Vec<String> = self.log.all().into_iter().skip(from).map(|line| line.text).collect();
        assert!(!lines.iter().any(|line| line.contains("reload done")), "{}", lines.join("\n"));
        lines.join("\n")
    }

    /// Waits until reuse-run has exited.
    #[track_caller]
    pub fn wait_exit(&mut self) -> ExitStatus {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.exited() {
                return status;
            }
            assert!(Instant::now() < end, "reuse-run did not exit within {DEADLINE:?}:\n{}", self.log.text());
            thread::sleep(POLL);
        }
    }

    /// Waits until reuse-run has exited and every line of stdout and stderr has been read (nobody holds them open any
    /// more). Returns its status.
    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        let status = self.wait_exit();
        wait_until("the ends of stdout and stderr", DEADLINE, || {
            self.readers.iter().all(JoinHandle::is_finished)
        });
        status
    }

    /// Stops reuse-run by SIGTERM. Asserts status 0 and that no process is left. Every line has been read then.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait_end();
        assert_eq!(status.code(), Some(0), "status of reuse-run after SIGTERM; log:\n{}", self.log.text());
        assert_eq!(self.descendants(), [0u32; 0], "left behind; log:\n{}", self.log.text());
    }

    fn exited(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("wait for reuse-run");
        }
        self.status
    }

    /// The children of reuse-run, zombies included, without the processes that help it.
    pub fn workers(&self) -> Vec<u32> {
        children(self.pid())
    }

    /// The children of reuse-run that are dead and not reaped yet.
    pub fn zombies(&self) -> Vec<u32> {
        let state = |pid: &u32| Process::read(*pid).map(|process| process.state);
        self.workers().into_iter().filter(|pid| state(pid) == Some('Z')).collect()
    }

    /// Every living process that reuse-run or its workers have started, whatever its parent is now. Without the helpers of a
    /// running reuse-run.
    pub fn descendants(&self) -> Vec<u32> {
        let mark = format!("{MARK}={}", self.mark);
        let is_ours = |pid: &u32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
        };
        let others = pids().into_iter().filter(|pid| *pid != self.pid() && !is_helper(*pid));
        others.filter(is_ours).collect()
    }

    /// Asserts that a worker lives for another half second. A reload takes less to stop an idle worker.
    #[track_caller]
    pub fn assert_keeps(&self, worker: u32) {
        holds_for("the worker lives", Duration::from_millis(500), || self.workers().contains(&worker));
    }

    /// How many file descriptors reuse-run has open.
    pub fn fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }

    /// The resident memory of reuse-run without mapped files, in KiB.
    pub fn memory_kib(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the status of reuse-run");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
        line.trim().trim_end_matches(" kB").parse().expect("a number of kB")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- log of reuse-run ---\n{}\n---", self.log.text());
        }
        if self.exited().is_none() {
            let _ = self.child.kill();
        }
        // A process may start another before it is killed, hence the loop. A file system may keep one alive.
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let left = self.descendants();
            if (left.is_empty() && self.exited().is_some()) || Instant::now() > end {
                break;
            }
            for pid in left {
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
            thread::sleep(POLL);
        }
    }
}

/// `reuse-run OPTIONS -- python3 -m MODULE` with the packages of tests/apps/python/requirements.txt, in the folder of the
/// Python apps.
#[track_caller]
pub fn packaged(options: &str, module: &str, rest: &[&str]) -> Service {
    let mut command = reuse_run_with(options, &[&["python3", "-m", module], rest].concat());
    command.env("PYTHONPATH", python_packages(module)).current_dir(app("python"));
    Service::spawn_ready(command)
}
