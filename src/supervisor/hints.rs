//! Hints where users get stuck: what can't work under reuse-run, and what to do instead.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use nix::unistd::Pid;

use crate::address::Address;
use crate::fleet::Readiness;
use crate::kernel::procfs;
use crate::kernel::sockdiag::SockDiag;
use crate::worker::Program;

/// What can be seen of a program before so many workers run it.
pub fn of_program(program: &Program, workers: usize) -> Option<&'static str> {
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

/// Why a worker that listens at these addresses may not have said in time that it is ready.
pub fn of_late_worker(
    program: &Program,
    readiness: Readiness,
    pid: Pid,
    addresses: &BTreeSet<Address>,
) -> Option<&'static str> {
    const MANAGERS: [&str; 3] = ["npm", "yarn", "pnpm"];
    if readiness != Readiness::Notify {
        return None;
    }
    if addresses.iter().any(|address| is_connecting(pid, address.socket.port())) {
        return Some(
            "it waits for a connection to its own port, and none reaches it before it is ready: say ready before such a \
             request, or use --ready listen",
        );
    }
    let name = Path::new(&program.command).file_name()?.to_str()?;
    MANAGERS.contains(&name).then_some(
        "npm, yarn and pnpm keep Node's IPC channel to themselves, so process.send says nothing: run node itself, or use \
         READY_FD",
    )
}

/// Whether a process or one that it has started waits for a connection to this port.
fn is_connecting(pid: Pid, port: u16) -> bool {
    let Ok(waiting) = SockDiag::new().and_then(|mut diag| diag.connecting(port)) else { return false };
    let waiting: HashSet<u64> = waiting.into_iter().collect();
    let sockets =
        procfs::tree(pid).into_iter().flat_map(|pid| procfs::socket_inodes(pid).unwrap_or_default());
    sockets.into_iter().any(|inode| waiting.contains(&inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(line: &str) -> Program {
        let mut words = line.split(' ').map(Into::into);
        Program { command: words.next().unwrap(), args: words.collect() }
    }

    #[test]
    fn a_debugger_that_several_workers_share_is_noticed() {
        for line in
            ["node --inspect app.js", "node --inspect-brk=9229 app.js", "node --inspect=0.0.0.0:9229 app.js"]
        {
            assert!(
                of_program(&program(line), 2).is_some() && of_program(&program(line), 1).is_none(),
                "{line}"
            );
        }
        for line in
            ["node --inspect=0 app.js", "node --inspect=127.0.0.1:0 app.js", "node app.js --inspector"]
        {
            assert!(of_program(&program(line), 2).is_none(), "{line}");
        }
    }

    #[test]
    fn npm_keeps_the_channel() {
        let hint = |line, readiness| of_late_worker(&program(line), readiness, Pid::this(), &BTreeSet::new());
        assert!(hint("/usr/bin/npm start", Readiness::Notify).is_some_and(|hint| hint.contains("READY_FD")));
        assert!(
            hint("npm start", Readiness::Listen).is_none()
                && hint("node app.js", Readiness::Notify).is_none()
        );
    }
}
