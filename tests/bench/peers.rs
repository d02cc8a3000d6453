//! The peers that are compared: how each is started, reloaded and ended.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

use crate::load;
use crate::process::{self, wait_for};
use crate::{Context, Options, Result};

/// The default port of all apps.
pub const PORT: u16 = 3000;
const APPS: &str = "tests/bench/apps";
/// How long a start or a reload may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What runs copies of a program and replaces them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// With these options.
    ReuseRun(Vec<&'static str>),
    /// Nothing: one copy, which is stopped and started again for a reload.
    Bare,
    /// A listener with SO_REUSEPORT for each worker; the kernel chooses by a hash of the connection. New workers start with
    /// new listeners, then the old ones get a stop signal.
    Reuseport {
        migrate: bool,
    },
    /// One listener that all workers inherit. It has no reload.
    SharedQueue,
    /// Node's cluster module, with a script like that in its documentation.
    Cluster,
    Pm2 {
        wait_ready: bool,
    },
    ServerStarter,
    /// The program itself, by SIGHUP.
    Itself,
}

impl Peer {
    pub fn name(&self) -> String {
        match self {
            Peer::ReuseRun(options) if options.is_empty() => "reuse-run".to_owned(),
            Peer::ReuseRun(options) => format!("reuse-run {}", options.join(" ")),
            Peer::Bare => "the bare program".to_owned(),
            Peer::Reuseport { migrate } => format!("SO_REUSEPORT, tcp_migrate_req {}", *migrate as u8),
            Peer::SharedQueue => "shared queue".to_owned(),
            Peer::Cluster => "Node's cluster".to_owned(),
            Peer::Pm2 { wait_ready: false } => "PM2".to_owned(),
            Peer::Pm2 { wait_ready: true } => "PM2 wait_ready".to_owned(),
            Peer::ServerStarter => "Server::Starter".to_owned(),
            Peer::Itself => "its own reload".to_owned(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// tests/apps/express/app.js.
    Express,
    /// tests/bench/apps/app.js without signal handling.
    Naive,
    /// tests/bench/apps/app.js with a graceful stop.
    Polite,
    Gunicorn,
    Uvicorn,
    Nginx,
    /// tests/tools/server.rs.
    Trivial,
    /// The same with a non-blocking listener.
    NonBlocking,
    /// The same, also with a UDP port.
    Datagrams,
}

impl Program {
    pub fn name(self) -> &'static str {
        match self {
            Program::Express => "Express app",
            Program::Naive => "naive Node app",
            Program::Polite => "polite Node app",
            Program::Gunicorn => "gunicorn",
            Program::Uvicorn => "uvicorn",
            Program::Nginx => "nginx",
            Program::Trivial => "trivial server",
            Program::NonBlocking => "trivial server, non-blocking",
            Program::Datagrams => "trivial server of UDP",
        }
    }

    /// The signal for a graceful stop, if the program has one.
    fn stop_signal(self) -> &'static str {
        match self {
            Program::Gunicorn => "TERM",
            Program::Nginx => "QUIT",
            _ => "INT",
        }
    }

    fn is_node(self) -> bool {
        matches!(self, Program::Express | Program::Naive | Program::Polite)
    }

    /// Whether its workers write a line to the file BENCH_READY when they listen.
    fn writes_ready(self) -> bool {
        matches!(self, Program::Naive | Program::Polite)
    }
}

/// A program and its number of workers.
#[derive(Clone)]
pub struct App {
    pub program: Program,
    pub workers: u32,
    pub port: u16,
    pub environment: Vec<(&'static str, String)>,
    /// How long replaced workers may take to finish.
    pub patience: Duration,
    /// Whether all of it runs behind a filter of system calls, as in a container.
    pub is_filtered: bool,
}

impl App {
    pub fn new(program: Program, workers: u32) -> App {
        let patience = Duration::from_secs(10); // the default of reuse-run's --drain
        App { program, workers, port: PORT, environment: Vec::new(), patience, is_filtered: false }
    }

    /// The file to which workers write when they listen.
    fn ready(&self, options: &Options) -> PathBuf {
        options.work.join(format!("ready-{}", self.port))
    }

    /// The command that runs it, with `workers` workers of its own if the program can have some.
    fn command(&self, workers: u32, options: &Options) -> Result<Vec<String>> {
        let (port, workers) = (self.port.to_string(), workers.to_string());
        let words = |text: &str| text.split(' ').map(str::to_owned).collect();
        Ok(match self.program {
            Program::Express => words("node tests/apps/express/app.js"),
            Program::Naive => words(&format!("node {APPS}/app.js naive {port}")),
            Program::Polite => words(&format!("node {APPS}/app.js polite {port}")),
            Program::Gunicorn => words(&format!(
                "python3 -m gunicorn --chdir tests/apps/python --worker-class gthread --threads 4 \
                 --workers {workers} --bind 0.0.0.0:{port} web:wsgi"
            )),
            Program::Uvicorn if workers == "1" => words(&format!("{UVICORN} --port {port} web:asgi")),
            Program::Uvicorn => words(&format!("{UVICORN} --workers {workers} --port {port} web:asgi")),
            Program::Nginx => {
                let file = options.work.join(format!("nginx-{workers}.conf"));
                fs::write(&file, nginx_conf(&workers, &port, &options.work)).context("nginx.conf")?;
                words(&format!("nginx -c {}", file.display()))
            }
            Program::Trivial | Program::NonBlocking => {
                let server = options.binary_folder.join("examples/server").display().to_string();
                let more =
                    if self.program == Program::NonBlocking { "--non-blocking" } else { "--keep-alive" };
                let listen = format!("0.0.0.0:{port}");
                [server.as_str(), "--listen", &listen, "--keep-alive", more].map(str::to_owned).into()
            }
            Program::Datagrams => {
                let server = options.binary_folder.join("examples/server").display().to_string();
                let address = format!("0.0.0.0:{port}");
                [server.as_str(), "--listen", &address, "--udp", &address].map(str::to_owned).into()
            }
        })
    }
}

const UVICORN: &str =
    "python3 -m uvicorn --app-dir tests/apps/python --host 0.0.0.0 --lifespan off --no-access-log";

fn nginx_conf(workers: &str, port: &str, work: &Path) -> String {
    let work = work.display();
    format!(
        "daemon off;\nworker_processes {workers};\npid {work}/nginx.pid;\nerror_log {work}/nginx.log;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n  access_log off;\n  server {{\n    listen {port};\n    \
         location / {{ return 200 \"pid=$pid\\n\"; }}\n  }}\n}}\n"
    )
}

/// A running server.
pub struct Server<'a> {
    peer: Peer,
    app: App,
    options: &'a Options,
    log: File,
    /// The process that survives a reload, or the workers if there is none.
    main: Vec<i32>,
}

impl Server<'_> {
    /// Starts a server and waits until its workers listen, see [`Server::wait_until_ready`].
    pub fn start<'a>(peer: &Peer, app: &App, options: &'a Options) -> Result<Server<'a>> {
        File::create(app.ready(options)).context("ready")?;
        let log = process::log_file(&options.work.join("servers.log"))?;
        let mut server = Server { peer: peer.clone(), app: app.clone(), options, log, main: Vec::new() };
        if let Peer::Reuseport { migrate } = peer {
            fs::write("/proc/sys/net/ipv4/tcp_migrate_req", if *migrate { "1" } else { "0" })
                .context("tcp_migrate_req")?;
        }
        server.launch()?;
        server.wait_until_ready(0)?;
        Ok(server)
    }

    /// Starts one server of each peer, on successive ports.
    pub fn start_side_by_side<'a>(
        peers: &[Peer],
        app: &App,
        options: &'a Options,
    ) -> Result<Vec<Server<'a>>> {
        let start = |(port, peer): (u16, &Peer)| {
            let app = App { port, ..app.clone() };
            Server::start(peer, &app, options)
        };
        (app.port..).zip(peers).map(start).collect()
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.app.port))
    }

    /// All its processes.
    pub fn pids(&self) -> Vec<i32> {
        let descendants = self.main.iter().flat_map(|pid| process::descendants(*pid));
        self.main.iter().copied().chain(descendants).collect()
    }

    /// The process that survives a reload, or the workers if there is none.
    pub fn main(&self) -> &[i32] {
        &self.main
    }

    /// The processes that a reload replaces.
    fn replaceable(&self) -> Vec<i32> {
        match self.peer {
            Peer::Bare | Peer::Reuseport { .. } | Peer::SharedQueue => self.pids(),
            _ => {
                let mut pids = self.pids();
                pids.retain(|pid| {
                    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    // A helper of Python's multiprocessing lives as long as its parent, and so do those of reuse-run.
                    let is_helper = String::from_utf8_lossy(&line).contains("resource_tracker")
                        || process::name(*pid).starts_with("reuse-run-");
                    !self.main.contains(pid) && !is_helper
                });
                pids
            }
        }
    }

    fn command(&self, words: &[String]) -> Command {
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env_remove("REUSE_RUN_LOG");
        command.env("BENCH_READY", self.app.ready(self.options));
        command.env("BENCH_PATIENCE_MS", self.app.patience.as_millis().to_string());
        command.env("PYTHONPATH", Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python"));
        command.env("PM2_HOME", self.options.work.join("pm2"));
        command.envs(self.app.environment.iter().map(|(name, value)| (*name, value)));
        if self.app.is_filtered {
            process::filter(&mut command);
        }
        command
    }

    fn spawn(&self, words: &[String]) -> Result<i32> {
        Ok(process::spawn(&mut self.command(words), &self.log, None)?.id() as i32)
    }

    /// Starts a worker for each slot, each with one of these listeners.
    fn spawn_each(&self, listeners: &[OwnedFd]) -> Result<Vec<i32>> {
        let mut words = self.app.command(1, self.options)?;
        if let Some(at) = words.iter().position(|word| word == "--listen") {
            words.splice(at..at + 2, ["--given".to_owned()]); // the trivial server takes it only if asked to
        }
        let spawn = |slot: u32| {
            let mut command = self.command(&words);
            command.env("NODE_APP_INSTANCE", slot.to_string());
            let listener = &listeners[slot as usize % listeners.len()];
            Ok(process::spawn(&mut command, &self.log, Some(listener))?.id() as i32)
        };
        (0..self.app.workers).map(spawn).collect()
    }

    /// Runs a PM2 command to its end.
    fn pm2(&self, arguments: &[&str]) -> Result<()> {
        let pm2 = std::path::absolute(format!("{APPS}/node_modules/.bin/pm2")).context("pm2")?;
        let mut command = self.command(&[pm2.display().to_string()]);
        command.args(arguments);
        let mut child = process::spawn(&mut command, &self.log, None)?;
        let status = wait_for("pm2", LIMIT, || child.try_wait().transpose())?.context("pm2")?;
        status.success().then_some(()).ok_or(format!("pm2 {}: {status}", arguments[0]))
    }

    fn launch(&mut self) -> Result<()> {
        let (app, options) = (&self.app, self.options);
        let workers = app.workers.to_string();
        let one = app.command(1, options)?;
        let words = |first: &[&str]| -> Vec<String> {
            first.iter().map(std::string::ToString::to_string).chain(one.clone()).collect()
        };
        self.main = match &self.peer {
            Peer::ReuseRun(given) => {
                let patience = format!("{}ms", app.patience.as_millis());
                let binary = options.binary.display().to_string();
                let signal = app.program.stop_signal();
                let mut first = vec![&*binary, "-n", &workers, "--drain", &patience, "--stop-signal", signal];
                first.extend(given);
                first.push("--");
                vec![self.spawn(&words(&first))?]
            }
            Peer::Bare => vec![self.spawn(&one)?],
            Peer::Reuseport { .. } if app.program == Program::Datagrams => {
                let one = [one, vec!["--share".to_owned()]].concat();
                (0..app.workers).map(|_| self.spawn(&one)).collect::<Result<_>>()?
            }
            Peer::Reuseport { .. } => {
                let listeners = (0..app.workers).map(|_| listener(app)).collect::<Result<Vec<_>>>()?;
                self.spawn_each(&listeners)?
            }
            Peer::SharedQueue => self.spawn_each(&[listener(app)?])?,
            Peer::Cluster => {
                let script: Vec<String> =
                    [&["node", &format!("{APPS}/cluster.js"), &workers].map(str::to_owned), &one[1..]]
                        .concat();
                vec![self.spawn(&script)?]
            }
            Peer::Pm2 { wait_ready } => {
                let _ = fs::remove_dir_all(options.work.join("pm2"));
                let patience = app.patience.as_millis().to_string();
                let script = match app.program {
                    Program::Express if *wait_ready => "tests/apps/express-process-send/app.js",
                    _ => &one[1],
                };
                let mut arguments =
                    vec!["start", script, "-n", "app", "-i", &workers, "--kill-timeout", &patience];
                arguments.extend(wait_ready.then_some("--wait-ready"));
                if one.len() > 2 {
                    arguments.push("--");
                    arguments.extend(one[2..].iter().map(String::as_str));
                }
                self.pm2(&arguments)?;
                // The daemon is a child of the bench, because it became an orphan.
                let is_daemon = |pid: &i32| {
                    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    String::from_utf8_lossy(&line).starts_with("PM2 ")
                };
                vec![process::tree().into_iter().find(is_daemon).ok_or("PM2 has no daemon")?]
            }
            Peer::ServerStarter => {
                let prefork = format!("{APPS}/prefork.sh");
                vec![self.spawn(&words(&[
                    "start_server",
                    "--port",
                    &app.port.to_string(),
                    "--",
                    &prefork,
                    &workers,
                ]))?]
            }
            Peer::Itself => vec![self.spawn(&app.command(app.workers, options)?)?],
        };
        Ok(())
    }

    /// Waits until all workers listen: until the file BENCH_READY has a line for each after the first `before` lines or, for
    /// programs that don't write it, until one worker answers and all processes are there.
    fn wait_until_ready(&self, before: u32) -> Result<()> {
        let workers = if self.peer == Peer::Bare { 1 } else { self.app.workers };
        let what = format!("{} to listen ({})", self.peer.name(), self.app.program.name());
        if self.app.program.writes_ready() {
            return wait_for(&what, LIMIT, || (self.ready_lines() >= before + workers).then_some(()));
        }
        let answers = || load::get(self.address(), "/", Duration::from_secs(1)).is_ok();
        wait_for(&what, LIMIT, || (answers() && self.replaceable().len() as u32 >= workers).then_some(()))
    }

    /// The number of lines in the file BENCH_READY.
    fn ready_lines(&self) -> u32 {
        fs::read_to_string(self.app.ready(self.options)).unwrap_or_default().lines().count() as u32
    }

    /// Replaces all workers. Returns the time until the last old one has ended.
    pub fn reload(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        let old = self.replaceable();
        let ready_lines = self.ready_lines();
        match self.peer {
            Peer::ReuseRun(_) | Peer::Cluster => process::signal(self.main[0], Signal::SIGUSR2),
            Peer::ServerStarter | Peer::Itself => process::signal(self.main[0], Signal::SIGHUP),
            Peer::Pm2 { .. } => self.pm2(&["reload", "app"])?,
            Peer::Bare => {
                process::signal(self.main[0], Signal::SIGINT);
                self.wait_for_end(&old)?;
                self.launch()?;
                self.wait_until_ready(ready_lines)?;
            }
            Peer::Reuseport { .. } => {
                self.launch()?;
                self.wait_until_ready(ready_lines)?;
                old.iter().for_each(|pid| process::signal(*pid, Signal::SIGINT));
            }
            Peer::SharedQueue => return Err("a shared queue alone has no reload".to_owned()),
        }
        self.wait_for_end(&old)?;
        Ok(begun.elapsed())
    }

    /// Stops all as its users do. Returns the time until the last process has ended.
    pub fn stop(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        let all = self.pids();
        match self.peer {
            Peer::Pm2 { .. } => self.pm2(&["kill"])?,
            _ => self.main.iter().for_each(|pid| process::signal(*pid, Signal::SIGTERM)),
        }
        self.wait_for_end(&all)?;
        Ok(begun.elapsed())
    }

    fn wait_for_end(&self, old: &[i32]) -> Result<()> {
        let what = format!("processes of {} to end", self.peer.name());
        wait_for(&what, LIMIT, || (!old.iter().any(|pid| process::lives(*pid))).then_some(()))
    }

    /// Ends the server, and all other processes that were started.
    pub fn end(self) {
        // All processes are killed together, so that PM2 restarts none.
        process::end_all(if matches!(self.peer, Peer::Pm2 { .. }) { &[] } else { &self.main });
    }
}

/// A listener with SO_REUSEPORT, otherwise as the program opens its own.
fn listener(app: &App) -> Result<OwnedFd> {
    let is_node = app.program.is_node();
    let any: IpAddr = if is_node { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let address = SocketAddr::from((any, app.port));
    let listen = || -> std::io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        if is_node {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(app.program == Program::NonBlocking)?;
        socket.bind(&address.into())?;
        socket.listen(511)?; // As Node does.
        Ok(socket)
    };
    Ok(listen().context("listen")?.into())
}
