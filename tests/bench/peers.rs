//! Those who are compared: how each is started, reloaded and ended.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use crate::process::{self, wait_for};
use crate::{Context, Options, Result};

/// The port of every application.
pub const PORT: u16 = 3000;
const APPS: &str = "tests/bench/apps";

pub fn address() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, PORT))
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// With these options.
    ReuseRun(Vec<String>),
    /// A listener with SO_REUSEPORT for each worker: the kernel chooses by the connection's hash.
    Reuseport,
    /// One listener that all workers have inherited.
    SharedQueue,
    /// Node's module, by a script of the size that its documentation has.
    Cluster,
    Pm2 {
        wait_ready: bool,
    },
}

impl Peer {
    pub fn name(&self) -> String {
        match self {
            Peer::ReuseRun(options) if options.is_empty() => "reuse-run".to_owned(),
            Peer::ReuseRun(options) => format!("reuse-run {}", options.join(" ")),
            Peer::Reuseport => "SO_REUSEPORT".to_owned(),
            Peer::SharedQueue => "shared queue".to_owned(),
            Peer::Cluster => "Node's cluster".to_owned(),
            Peer::Pm2 { wait_ready: false } => "PM2".to_owned(),
            Peer::Pm2 { wait_ready: true } => "PM2 wait_ready".to_owned(),
        }
    }
}

/// A server of some workers that runs.
pub struct Server {
    /// What was started; all else descends from it, but for daemons.
    main: Vec<i32>,
    pm2_home: Option<PathBuf>,
}

/// What is started: an application and how many workers of it.
pub struct App<'a> {
    pub workers: u32,
    /// Of tests/bench/apps/app.js.
    pub manner: &'a str,
    pub environment: &'a [(&'a str, String)],
}

impl Server {
    /// Starts it and waits until all workers listen.
    pub fn start(peer: &Peer, app: &App, options: &Options) -> Result<Server> {
        let ready = options.work.join("ready");
        File::create(&ready).context("ready")?;
        let log = process::log_file(&options.work.join(format!("{}.log", peer.name().replace('/', " "))))?;
        let workers = app.workers.to_string();
        let script = format!("{APPS}/app.js");
        let command = |program: &Path, args: &[&str]| {
            let mut command = Command::new(program);
            command.args(args).env_remove("RUST_LOG").env("BENCH_READY", &ready);
            command.envs(app.environment.iter().map(|(name, value)| (*name, value)));
            command
        };
        let node = Path::new("node");
        let mut server = Server { main: Vec::new(), pm2_home: None };
        let each = |listeners: &[OwnedFd]| -> Result<Vec<i32>> {
            let start = |slot| {
                let mut command = command(node, &[&script, app.manner]);
                command.env("NODE_APP_INSTANCE", u32::to_string(&slot));
                let listener = &listeners[slot as usize % listeners.len()];
                Ok(process::spawn(&mut command, &log, Some(listener))?.id() as i32)
            };
            (0..app.workers).map(start).collect()
        };
        server.main = match peer {
            Peer::ReuseRun(args) => {
                let mut command = command(&options.binary, &["-n", &workers]);
                command.args(args).args(["--", "node", &script, app.manner]);
                vec![process::spawn(&mut command, &log, None)?.id() as i32]
            }
            Peer::Reuseport => {
                each(&(0..app.workers).map(|_| listener()).collect::<Result<Vec<OwnedFd>>>()?)?
            }
            Peer::SharedQueue => each(&[listener()?])?,
            Peer::Cluster => {
                let cluster = format!("{APPS}/cluster.js");
                let mut command = command(node, &[&cluster, &workers, &script, app.manner]);
                vec![process::spawn(&mut command, &log, None)?.id() as i32]
            }
            Peer::Pm2 { wait_ready } => {
                let home = options.work.join("pm2");
                let _ = fs::remove_dir_all(&home);
                let pm2 = std::path::absolute(format!("{APPS}/node_modules/.bin/pm2")).context("pm2")?;
                let mut command = command(
                    &pm2,
                    &["start", &script, "-n", "app", "-i", &workers, "--kill-timeout", "10000"],
                );
                if *wait_ready {
                    command.arg("--wait-ready");
                }
                command.args(["--", app.manner]).env("PM2_HOME", &home);
                server.pm2_home = Some(home);
                let status = process::spawn(&mut command, &log, None)?.wait().context("pm2 start")?;
                if !status.success() {
                    return Err(format!("pm2 start: {status}"));
                }
                // The daemon, which is ours since it is an orphan.
                process::tree().into_iter().take(1).collect()
            }
        };
        let listening = || fs::read_to_string(&ready).unwrap_or_default().lines().count() as u32;
        let all = || (listening() >= app.workers).then_some(());
        wait_for(&format!("{} to listen", peer.name()), Duration::from_secs(30), all)?;
        Ok(server)
    }

    /// Ends it, and whatever else has been started.
    pub fn end(self) {
        // What PM2 starts is killed with it and not restarted by it.
        process::end_all(if self.pm2_home.is_some() { &[] } else { &self.main });
    }
}

/// A listener with SO_REUSEPORT on the port of the applications.
fn listener() -> Result<OwnedFd> {
    let listen = || -> std::io::Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)).into())?;
        socket.listen(511)?; // As Node does.
        Ok(socket)
    };
    Ok(listen().context("listen")?.into())
}
