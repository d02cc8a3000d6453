//! Hints where users get stuck: what can't work under reuse-run, and what to do instead.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use log::Level;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::{Process, Supervisor};
use crate::address::{Address, Endpoint, Transport};
use crate::fleet::{End, Readiness};
use crate::ids::WorkerId;
use crate::kernel::sockdiag::SockDiag;
use crate::kernel::{open_sockets, procfs};
use crate::worker::Program;
use crate::worker::environment::Environment;

impl Supervisor {
    /// Before a generation begins.
    pub(super) fn hint_at_program(&mut self, generation: u32) {
        let workers = self.fleet.crew().slots();
        let program = self.environments.program(generation);
        if let Some(hint) = program.and_then(|program| of_program(program, workers)) {
            self.say(Level::Info, hint);
        }
    }

    /// A worker was not ready in time.
    pub(super) fn explain_delay(&mut self, worker: WorkerId) {
        let Some(Process { pid, generation, .. }) = self.processes.get(&worker) else { return };
        if let Some(hint) = self.listens_unseen(worker) {
            return self.say(Level::Info, &hint);
        }
        let Some(program) = self.environments.program(*generation) else { return };
        let addresses = self.fleet.crew().addresses(worker);
        let hint = of_delay(program, self.fleet.policy().readiness, *pid, &addresses).map(str::to_owned);
        if let Some(hint) = hint.or_else(|| self.connects_first(worker)) {
            self.say(Level::Info, &format!("worker (pid {pid}): {hint}"));
        }
    }

    /// A worker has ended, perhaps before it was ready.
    pub(super) fn explain_end(&mut self, worker: WorkerId, end: End) {
        let has_failed = self.fleet.crew().is_starting(worker) && matches!(end, End::Exited(1..));
        let Some(Process { pid, generation, .. }) = self.processes.get(&worker).filter(|_| has_failed) else {
            return;
        };
        // It may have wanted the same port as a worker that lives.
        if let Some(hint) = self.processes.keys().find_map(|other| self.listens_unseen(*other)) {
            return self.say(Level::Info, &hint);
        }
        let Some(environment) = self.environments.known(*generation) else { return };
        let hint = of_early_end(environment, self.fleet.policy().readiness).map(str::to_owned);
        if let Some(hint) = hint.or_else(|| self.connects_first(worker)) {
            self.say(Level::Info, &format!("worker (pid {pid}): {hint}"));
        }
    }

    /// What a worker may do that doesn't listen where others serve: connect there, and take the port for another program's. A
    /// connection that was closed on this side leaves a trace for a minute.
    fn connects_first(&self, worker: WorkerId) -> Option<String> {
        let own = self.fleet.crew().addresses(worker);
        let others = self.fleet.crew().endpoints().into_iter().filter_map(Endpoint::tcp);
        let mut missing = others.filter(|address| !own.contains(address));
        let mut diag = SockDiag::new().ok()?;
        let found =
            missing.find(|address| diag.was_reached_from_here(address.socket.port()).unwrap_or(false))?;
        Some(format!(
            "if it connects to {found} first, to see whether the port is free, the workers there answer: use -l, or its own \
             option (see docs/limits.md)"
        ))
    }

    /// A worker has to be killed.
    pub(super) fn explain_kill(&mut self, worker: WorkerId) {
        let Some(main) = self.pid(worker) else { return };
        let mut server = [main].into_iter().chain(self.behind(worker));
        if let Some(pid) = server.find(|pid| procfs::ignores(*pid, self.stop_signal)) {
            let (signal, other) =
                (self.stop_signal, if self.stop_signal == Signal::SIGTERM { "INT" } else { "TERM" });
            self.say(
                Level::Info,
                &format!(
                    "worker (pid {pid}): it ignores {signal}: use another --stop-signal, such as {other}"
                ),
            );
        }
    }

    /// How to run a worker that went into the background in the foreground, with a blank before it, if that is known.
    pub(super) fn how_in_foreground(&self, worker: WorkerId) -> String {
        let Some(Process { pid, generation, .. }) = self.processes.get(&worker) else { return String::new() };
        let words = self.environments.program(*generation).map(Program::words).unwrap_or_default();
        let how = in_foreground(&words).or_else(|| in_foreground(&[procfs::name(*pid)?]));
        how.map_or(String::new(), |how| format!(" ({how})"))
    }

    /// Where a worker listens that has a filter, and by a call that this doesn't see.
    fn listens_unseen(&self, worker: WorkerId) -> Option<String> {
        self.interceptions.get(&worker).filter(|interception| !interception.has_seen_listen())?;
        let pid = self.processes.get(&worker)?.pid;
        // Listeners of -l and of systemd listen already.
        let given: HashSet<u64> = open_sockets::socket_inodes(Pid::this()).ok()?.into_iter().collect();
        let its = open_sockets::sockets_of_tree(pid).collect::<HashSet<u64>>();
        let mut listeners =
            SockDiag::new().and_then(|mut diag| diag.listeners(Transport::Tcp, 0)).ok()?.into_iter();
        let unseen =
            listeners.find(|it| its.contains(&it.inode.into()) && !given.contains(&it.inode.into()))?;
        Some(format!(
            "worker (pid {pid}): it listens on {} by io_uring or a 32-bit system call, which can't be intercepted: see -l",
            unseen.address
        ))
    }
}

const WAITS_FOR_ITSELF: &str = "it waits for a connection to its own port, and none reaches it before it is ready: say \
                                ready before such a request, or use --ready listen";
const HAS_NO_CHANNEL: &str = "npm, yarn and pnpm keep Node's IPC channel and READY_FD to themselves, so the program can't \
                              say that it is ready: run node itself, or use --ready listen";
const WANTS_A_FILE: &str = "NODE_CONFIG_STRICT_MODE is set, and node-config then wants a file for each NODE_APP_INSTANCE: \
                            a line NODE_APP_INSTANCE= in an --env-file leaves that empty";

/// How servers that go into the background by themselves are run in the foreground.
const IN_FOREGROUND: [(&str, &str); 21] = [
    ("nginx", "nginx -g 'daemon off;'"),
    ("openresty", "openresty -g 'daemon off;'"),
    ("httpd", "httpd -DFOREGROUND"),
    ("apache2", "apache2ctl -DFOREGROUND"),
    ("apache2ctl", "apache2ctl -DFOREGROUND"),
    ("apachectl", "apachectl -DFOREGROUND"),
    ("haproxy", "haproxy -db, without -D"),
    ("redis-server", "redis-server --daemonize no"),
    ("valkey-server", "valkey-server --daemonize no"),
    ("memcached", "memcached without -d"),
    ("lighttpd", "lighttpd -D"),
    ("sshd", "sshd -D"),
    ("dnsmasq", "dnsmasq --keep-in-foreground"),
    ("gunicorn", "gunicorn without --daemon"),
    ("php-fpm", "php-fpm -F"),
    ("squid", "squid -N"),
    ("varnishd", "varnishd -F"),
    ("named", "named -f"),
    ("unbound", "unbound -d"),
    ("postfix", "postfix start-fg"),
    ("uwsgi", "uwsgi without --daemonize"),
];

/// What the table has for a program that is named in some words. A version may follow the name, as in "php-fpm8.2".
fn in_foreground(words: &[String]) -> Option<&'static str> {
    let mut words = words.iter().flat_map(|word| word.split_whitespace());
    words.find_map(|word| {
        let name = Path::new(word).file_name()?.to_str()?;
        let name = name.trim_end_matches(|character: char| character.is_ascii_digit() || character == '.');
        let of = |name: &str| IN_FOREGROUND.iter().find(|(known, _)| *known == name).map(|(_, how)| *how);
        of(name).or_else(|| of(Path::new(word).file_name()?.to_str()?))
    })
}

/// What can be seen of a program before so many workers run it.
fn of_program(program: &Program, workers: usize) -> Option<&'static str> {
    let has_debugger = |word: &String| {
        let port = word.strip_prefix("--inspect").map(|rest| rest.strip_prefix("-brk").unwrap_or(rest));
        port.is_some_and(|port| {
            port.is_empty() || port.starts_with('=') && !port.ends_with(":0") && port != "=0"
        })
    };
    (workers > 1 && program.words().iter().any(has_debugger)).then_some(
        "all workers share the port of --inspect, so a debugger reaches any of them: use --inspect=0",
    )
}

/// Why a worker that listens at these addresses may not have been ready in time.
fn of_delay(
    program: &Program,
    readiness: Readiness,
    pid: Pid,
    addresses: &BTreeSet<Address>,
) -> Option<&'static str> {
    if addresses.iter().any(|address| is_connecting(pid, address.socket.port())) {
        return Some(WAITS_FOR_ITSELF);
    }
    hides_channel(program, readiness).then_some(HAS_NO_CHANNEL)
}

/// Why a worker may have failed before it was ready.
fn of_early_end(environment: &Environment, readiness: Readiness) -> Option<&'static str> {
    let is_strict = environment.variable("NODE_CONFIG_STRICT_MODE").is_some_and(|mode| !mode.is_empty());
    if is_strict && !environment.sets("NODE_APP_INSTANCE") {
        return Some(WANTS_A_FILE);
    }
    hides_channel(&environment.program, readiness).then_some(HAS_NO_CHANNEL)
}

/// Whether a package manager stands between reuse-run and a program that has to say that it is ready. These run in Node,
/// which lets its children inherit no other fd than the first three.
fn hides_channel(program: &Program, readiness: Readiness) -> bool {
    const MANAGERS: [&str; 4] = ["npm", "npx", "yarn", "pnpm"];
    let is_manager = |word: &str| {
        Path::new(word).file_name().is_some_and(|name| MANAGERS.iter().any(|manager| name == *manager))
    };
    readiness == Readiness::Notify
        && program.words().iter().flat_map(|word| word.split_whitespace()).any(is_manager)
}

/// Whether a process or one that it has started waits for a connection to this port of the same address.
fn is_connecting(pid: Pid, port: u16) -> bool {
    let Ok(waiting) = SockDiag::new().and_then(|mut diag| diag.connecting(port)) else { return false };
    let sockets: HashSet<u64> = open_sockets::sockets_of_tree(pid).collect();
    waiting.into_iter().any(|inode| sockets.contains(&inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(line: &str) -> Program {
        let mut words = line.split('|').map(Into::into);
        Program { command: words.next().unwrap(), args: words.collect() }
    }

    #[test]
    fn a_debugger_that_several_workers_share_is_noticed() {
        for line in
            ["node|--inspect|app.js", "node|--inspect-brk=9229|app.js", "node|--inspect=0.0.0.0:9229|app.js"]
        {
            assert!(
                of_program(&program(line), 2).is_some() && of_program(&program(line), 1).is_none(),
                "{line}"
            );
        }
        for line in
            ["node|--inspect=0|app.js", "node|--inspect=127.0.0.1:0|app.js", "node|app.js|--inspector"]
        {
            assert!(of_program(&program(line), 2).is_none(), "{line}");
        }
    }

    #[test]
    fn a_package_manager_hides_the_channel_from_a_program_that_has_to_say_ready() {
        let hint = |line, readiness| of_delay(&program(line), readiness, Pid::this(), &BTreeSet::new());
        for line in ["/usr/bin/npm|start", "yarn|start", "sh|-c|exec pnpm start"] {
            assert_eq!(hint(line, Readiness::Notify), Some(HAS_NO_CHANNEL), "{line}");
            assert_eq!(hint(line, Readiness::Listen), None, "{line}");
        }
        assert_eq!(hint("node|app.js", Readiness::Notify), None);
    }

    #[test]
    fn servers_that_go_into_the_background_are_known_by_their_names() {
        let of = |line: &str| in_foreground(&program(line).words());
        for (line, how) in [
            ("/usr/sbin/nginx|-c|x.conf", "nginx -g 'daemon off;'"),
            ("sh|-c|exec php-fpm8.2", "php-fpm -F"),
            ("apache2", "apache2ctl -DFOREGROUND"),
            ("runuser|-u|nobody|--|redis-server", "redis-server --daemonize no"),
        ] {
            assert_eq!(of(line), Some(how), "{line}");
        }
        assert_eq!(of("node|nginx.js"), None);
    }

    #[test]
    fn strict_mode_of_node_config_is_named_unless_an_env_file_sets_the_instance() {
        let environment = |pairs: &[(&str, &str)]| Environment {
            variables: pairs.iter().map(|(name, value)| (name.into(), value.into())).collect(),
            program: program("npm|start"),
            ..Environment::default()
        };
        let strict = ("NODE_CONFIG_STRICT_MODE", "1");
        let hint = |pairs: &[_]| of_early_end(&environment(pairs), Readiness::Listen);
        assert_eq!(hint(&[strict]), Some(WANTS_A_FILE));
        assert_eq!(hint(&[strict, ("NODE_APP_INSTANCE", "")]), None);
        assert_eq!(hint(&[("NODE_CONFIG_STRICT_MODE", "")]), None);
        assert_eq!(of_early_end(&environment(&[]), Readiness::Notify), Some(HAS_NO_CHANNEL));
    }
}
