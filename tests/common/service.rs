//! `reuse-run` under test.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::lines::{Line, Lines};
use super::process::{Process, children, pids};
use super::program::{app, arguments, reuse_run};
use super::wait::{DEADLINE, POLL, holds_for, wait_until};

/// The environment variable by which a service's processes are known, wherever they went.
pub const MARK: &str = "REUSE_RUN_TEST_MARK";

/// A running `reuse-run` and all that it started.
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
        Service::start(arguments(options, command))
    }

    /// Like [`Service::run`], and waits until the first generation is ready.
    #[track_caller]
    pub fn run_ready<S: AsRef<str>>(options: &str, command: &[S]) -> Service {
        let service = Service::run(options, command);
        service.wait_for_line("generation 1 is ready");
        service
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

    /// Waits for a line of the log from position `from` on.
    #[track_caller]
    pub fn wait_for_line_after(&self, from: usize, part: &str) -> Line {
        match self.log.wait_for(from, DEADLINE, |line| line.contains(part)) {
            Some(line) => line,
            None => panic!("no line {part:?} within {DEADLINE:?} in the log:\n{}", self.log.text()),
        }
    }

    /// Waits for a line of the log from position `from` on that satisfies `wanted`.
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

    /// Reloads, which must fail and be given up; returns the log of it.
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

    /// Waits until reuse-run has exited, nobody holds its stdout and stderr any more, and every line
    /// is read; returns its status.
    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        let status = self.wait_exit();
        wait_until("the ends of stdout and stderr", DEADLINE, || {
            self.readers.iter().all(JoinHandle::is_finished)
        });
        status
    }

    /// Stops reuse-run by SIGTERM, which must end in order and leave nothing; every line is read then.
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

    /// The children of reuse-run, zombies included.
    pub fn workers(&self) -> Vec<u32> {
        children(self.pid())
    }

    /// The children of reuse-run that are dead and not reaped.
    pub fn zombies(&self) -> Vec<u32> {
        let state = |pid: &u32| Process::read(*pid).map(|process| process.state);
        self.workers().into_iter().filter(|pid| state(pid) == Some('Z')).collect()
    }

    /// Every living process that reuse-run or its workers started, wherever it is now.
    pub fn descendants(&self) -> Vec<u32> {
        let mark = format!("{MARK}={}", self.mark);
        let is_ours = |pid: &u32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
        };
        pids().into_iter().filter(|pid| *pid != self.pid()).filter(is_ours).collect()
    }

    /// Whether a process is a worker that lives on for half a second, after a reload say, which takes less
    /// than that to stop one that has nothing to do.
    #[track_caller]
    pub fn keeps(&self, worker: u32) {
        holds_for("the old worker lives", Duration::from_millis(500), || self.workers().contains(&worker));
    }

    /// How many file descriptors reuse-run has open.
    pub fn fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }

    /// The resident memory of reuse-run that is its own (no mapped file), in KiB.
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
            let _ = self.child.wait();
        }
        // A process can start another between the look and the blow; look until nobody is left.
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let left = self.descendants();
            if left.is_empty() || Instant::now() > end {
                break;
            }
            for pid in left {
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
            thread::sleep(POLL);
        }
    }
}

/// `python3 -m MODULE` with the packages of tests/apps/python/requirements.txt, in the apps' folder.
#[track_caller]
pub fn packaged(options: &str, module: &str, rest: &[&str]) -> Service {
    let packages = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/python");
    assert!(
        packages.join(module).exists(),
        "{module} is missing in {}: run scripts/test",
        packages.display()
    );
    let worker = ["python3", "-m", module].into_iter().chain(rest.iter().copied()).collect::<Vec<_>>();
    let mut command = reuse_run();
    command.args(arguments(options, &worker)).env("PYTHONPATH", packages).current_dir(app("python"));
    let service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    service
}
