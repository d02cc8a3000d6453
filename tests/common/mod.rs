//! The black-box harness: starts the real binary, reads what it says, sends it signals, and leaves
//! nothing behind, whatever becomes of the test.
#![allow(dead_code)]

#[path = "../tools/load.rs"]
pub mod load;
#[path = "../tools/netns.rs"]
mod netns;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// For whatever must happen at all. Much more than it takes, as the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(5);
/// The environment variable by which a service's processes are known, wherever they went.
pub const MARK: &str = "REUSE_RUN_TEST_MARK";

/// Waits until `condition` holds; panics with `what` when it doesn't in time.
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !condition() {
        assert!(Instant::now() < end, "not within {deadline:?}: {what}");
        thread::sleep(POLL);
    }
}

/// Watches that `condition` holds for as long as `period`; panics with `what` at once when it doesn't.
/// Only for what can't be shown by a later event.
#[track_caller]
pub fn holds_for(what: &str, period: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + period;
    while Instant::now() < end {
        assert!(condition(), "did not hold for {period:?}: {what}");
        thread::sleep(POLL);
    }
}

/// A network namespace of its own for this test's thread and everything that it starts from now on,
/// so that no port can be taken and fixed ports disturb nobody.
#[track_caller]
pub fn own_network() {
    netns::enter().expect("a network namespace of its own: the tests need root (CAP_SYS_ADMIN)");
}

/// The network of a process for this test's thread and everything that it starts from now on.
#[track_caller]
pub fn join_network(pid: u32) {
    netns::join(pid).expect("the network namespace of another process");
}

/// The turn of a test that keeps every processor busy; the next one starts when it is dropped.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A port that nothing on IPv4 or IPv6 has. It is not an ephemeral one, so no client gets it either.
pub fn free_port() -> u16 {
    // Where namespaces can be had nobody else is near; without them the search below must do.
    let _ = netns::enter();
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let start = std::process::id() as usize * 97;
    for _ in 0..20_000 {
        let port = 10_000 + ((start + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000) as u16;
        let free_on_ipv6 = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
            Ok(_) => true,
            Err(error) => error.kind() != std::io::ErrorKind::AddrInUse,
        };
        if free_on_ipv6 && TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}

/// A free port on the loopback address.
pub fn free_address() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()))
}

/// The path of an example of this package, built beside the running test.
pub fn example(name: &str) -> String {
    let test = std::env::current_exe().expect("the path of the test");
    let built = test.parent().and_then(|deps| deps.parent()).expect("target/PROFILE/deps/TEST");
    let path = built.join("examples").join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --examples` first", path.display());
    path.into_os_string().into_string().expect("a path in UTF-8")
}

/// The naive test server.
pub fn server() -> String {
    example("server")
}

/// The path of an app under tests/apps.
pub fn app(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/apps").join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path.into_os_string().into_string().expect("a path in UTF-8")
}

/// The path of an app that needs the packages of tests/apps/package-lock.json.
pub fn node_app(name: &str) -> String {
    let modules = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/apps/node_modules");
    assert!(
        modules.exists(),
        "{} is missing: run scripts/test, or `npm ci` in tests/apps",
        modules.display()
    );
    app(name)
}

/// A program that may change from one start to the next, as a deployment does: what runs is the test
/// server with the arguments that the file holds when a worker starts.
pub struct Deployment {
    file: PathBuf,
}

impl Deployment {
    pub fn new(arguments: &str) -> Deployment {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("reuse-run-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let deployment = Deployment { file: std::env::temp_dir().join(name) };
        deployment.replace(arguments);
        deployment
    }

    /// Installs a new version; whatever runs goes on as it is.
    pub fn replace(&self, arguments: &str) {
        fs::write(&self.file, arguments).expect("write the server's arguments");
    }

    /// The command to run it with.
    pub fn command(&self) -> Vec<String> {
        let file = self.file.display().to_string();
        ["sh", "-c", r#"exec "$0" $(cat "$1")"#, &server(), &file].map(str::to_owned).to_vec()
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// A line that was printed, and when it was read.
#[derive(Clone, Debug)]
pub struct Line {
    pub text: String,
    pub at: Instant,
}

/// The lines of a stream, as they come.
#[derive(Clone, Default)]
pub struct Lines {
    state: Arc<(Mutex<Vec<Line>>, Condvar)>,
}

impl Lines {
    fn read(&self, stream: impl Read + Send + 'static) -> JoinHandle<()> {
        let lines = self.clone();
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut bytes = Vec::new();
            while let Ok(count) = stream.read_until(b'\n', &mut bytes) {
                if count == 0 {
                    break;
                }
                let text = String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned();
                lines.lock().push(Line { text, at: Instant::now() });
                lines.state.1.notify_all();
                bytes.clear();
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Line>> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are: a position to wait from.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    pub fn all(&self) -> Vec<Line> {
        self.lock().clone()
    }

    /// The first line from position `from` on that contains `part`.
    pub fn find(&self, from: usize, part: &str) -> Option<Line> {
        self.lock().iter().skip(from).find(|line| line.text.contains(part)).cloned()
    }

    /// How many lines contain `part`.
    pub fn count_of(&self, part: &str) -> usize {
        self.lock().iter().filter(|line| line.text.contains(part)).count()
    }

    pub fn text(&self) -> String {
        let texts: Vec<String> = self.lock().iter().map(|line| line.text.clone()).collect();
        texts.join("\n")
    }

    /// Waits for a line from position `from` on that satisfies `wanted`.
    fn wait_for(&self, from: usize, deadline: Duration, wanted: impl Fn(&str) -> bool) -> Option<Line> {
        let end = Instant::now() + deadline;
        let mut next = from;
        let mut lines = self.lock();
        loop {
            if let Some(line) = lines.iter().skip(next).find(|line| wanted(&line.text)) {
                return Some(line.clone());
            }
            next = lines.len().max(from);
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            lines = self.state.1.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

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

/// The binary under test, with the log level that it has by default.
pub fn reuse_run() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_reuse-run"));
    command.env_remove("RUST_LOG");
    command
}

/// `OPTIONS -- COMMAND` as arguments, the options of REUSE_RUN_TEST_OPTIONS before them.
pub fn arguments<S: AsRef<str>>(options: &str, command: &[S]) -> Vec<String> {
    let always = std::env::var("REUSE_RUN_TEST_OPTIONS").unwrap_or_default();
    let options = always.split_whitespace().chain(options.split_whitespace());
    options.chain(["--"]).chain(command.iter().map(AsRef::as_ref)).map(str::to_owned).collect()
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

/// A Python program in a few lines, as a command.
pub fn inline(program: &str, rest: &[&str]) -> Vec<String> {
    ["python3", "-c", program].iter().chain(rest).map(|word| (*word).to_owned()).collect()
}

/// The children of a process, zombies included.
pub fn children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn pids() -> BTreeSet<u32> {
    let entries = fs::read_dir("/proc").expect("read /proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// A line of /proc/PID/stat.
pub struct Process {
    pub state: char,
    pub group: u32,
}

impl Process {
    pub fn read(pid: u32) -> Option<Process> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // After the name, which may contain anything: state, parent, group.
        let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
        let state = fields.next()?.chars().next()?;
        Some(Process { state, group: fields.nth(1)?.parse().ok()? })
    }
}

/// The processor time that a process has used, in ticks of a hundredth of a second.
#[track_caller]
pub fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the stat of a process");
    let fields = stat[stat.rfind(')').expect("a name") + 1..].split_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number")).sum()
}

/// How often a process has slept and been woken.
#[track_caller]
pub fn wake_ups(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the status of a process");
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.and_then(|count| count.trim().parse().ok()).expect("a number")
}

/// The naive server as a command.
pub fn naive(addr: SocketAddr) -> Vec<String> {
    vec![server(), "--listen".to_owned(), addr.to_string()]
}

/// Who answers a request on a connection of its own, which must succeed.
#[track_caller]
pub fn get(addr: SocketAddr) -> load::Origin {
    match load::get(addr, "/", Duration::from_secs(15)) {
        Ok(answer) => answer.origin,
        Err(failure) => panic!("GET / from {addr}: {failure:?}"),
    }
}

/// Waits until the load has got answers from now on.
#[track_caller]
pub fn answered_more(load: &load::Load) {
    wait_for_answers(load, 0);
}

/// Waits until the load has got more answers than this from now on.
#[track_caller]
pub fn wait_for_answers(load: &load::Load, more: u64) {
    let answered = load.snapshot().answered;
    wait_until("answers", DEADLINE, || load.snapshot().answered > answered + more);
}

/// Sends a signal to a process, which must exist.
#[track_caller]
pub fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap_or_else(|error| panic!("{signal} to {pid}: {error}"));
}

/// A folder for a test's files, many of which are mere flags.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("reuse-run-folder-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("make a folder");
        Folder(path)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().expect("a path in UTF-8")
    }

    pub fn raise(&self, flag: &str) {
        fs::write(self.path(flag), "").expect("raise a flag");
    }

    pub fn lower(&self, flag: &str) {
        fs::remove_file(self.path(flag)).expect("lower a flag");
    }

    /// The naive server behind a script that heeds flags. `hold-G-S` keeps the worker of generation G and
    /// slot S from going on; with `broken-G-S` it then prints `broken G-S NANOSECONDS` and exits with 3.
    pub fn server(&self, addr: SocketAddr, more: &[&str]) -> Vec<String> {
        let text = r#"me=$REUSE_RUN_GENERATION-$REUSE_RUN_SLOT; folder=$1; shift
            while [ -e "$folder/hold-$me" ]; do sleep 0.02; done
            if [ -e "$folder/broken-$me" ]; then echo "broken $me $(date +%s%N)"; exit 3; fi
            exec "$0" "$@""#;
        let addr = addr.to_string();
        let command = ["sh", "-c", text, &server(), &self.path(""), "--listen", &addr];
        command.iter().chain(more).map(|word| (*word).to_owned()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A client that has sent its request and waits.
pub struct Waiting(TcpStream);

impl Waiting {
    /// Connects, which takes no more than a listener with room in its queue, and asks.
    #[track_caller]
    pub fn new(addr: SocketAddr) -> Waiting {
        let mut stream = TcpStream::connect(addr).expect("connect");
        stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("ask");
        stream.set_nonblocking(true).expect("set non-blocking");
        Waiting(stream)
    }

    /// Whether neither an answer nor an end has come.
    pub fn waits(&self) -> bool {
        matches!(self.0.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
    }

    /// Waits for what becomes of it.
    pub fn outcome(mut self) -> std::io::Result<load::Origin> {
        let mut text = String::new();
        self.0.set_nonblocking(false)?;
        self.0.set_read_timeout(Some(DEADLINE))?;
        self.0.read_to_string(&mut text)?;
        if text.is_empty() { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(load::Origin::of(&text)) }
    }

    /// Waits for the reset that it must get.
    #[track_caller]
    pub fn assert_reset(self) {
        match self.outcome() {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("not reset but {other:?}"),
        }
    }
}

/// The names of the signals in a line of /proc/PID/status such as "SigBlk:".
pub fn signals_in(pid: u32, line: &str) -> Vec<Signal> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the status of a process");
    let mask = status.lines().find_map(|text| text.strip_prefix(line)).expect("a line of the status");
    let mask = u64::from_str_radix(mask.trim(), 16).expect("a mask");
    Signal::iterator().filter(|signal| mask & (1 << (*signal as u64 - 1)) != 0).collect()
}
