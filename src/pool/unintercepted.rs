//! Without interception: workers bind and listen by themselves, and the wrapper finds their listeners in /proc.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::unistd::Pid;

use crate::address::{Address, Transport};
use crate::fleet::Readiness;
use crate::ids::WorkerId;
use crate::kernel::sockdiag::SockDiag;
use crate::kernel::{open_sockets, procfs};

/// The time between two scans while workers start.
const INTERVAL: Duration = Duration::from_millis(50);

/// Finds out where workers listen.
#[derive(Debug, Default)]
pub struct Unintercepted {
    next_scan: Option<Instant>,
    /// What was returned already.
    known: BTreeMap<WorkerId, BTreeSet<Address>>,
}

/// Logs `why` workers can't be intercepted, and what reuse-run promises in spite of it. `given` says whether workers are
/// given listeners (-l).
///
/// # Errors
/// If it can't be found out when a worker is ready.
pub fn announce(why: &str, given: bool, readiness: Readiness) -> io::Result<()> {
    if let (Readiness::Answers { .. }, false) = (readiness, given) {
        let what = format!(
            "{why}, so a request can't be sent to one of them alone: use -l, or another --ready than a path"
        );
        return Err(io::Error::other(what));
    }
    if given {
        if readiness == Readiness::Listen {
            let what = format!(
                "{why}, so reuse-run can't know when a worker uses the listeners of -l: use --ready notify, or a \
                 duration"
            );
            return Err(io::Error::other(what));
        }
        warn!("{why}: the listeners of -l are still handed over without a lost connection");
    } else if procfs::migrates_requests() {
        warn!(
            "{why}: workers have to set SO_REUSEPORT themselves, or use -l; net.ipv4.tcp_migrate_req is 1, so \
             a reload resets no connection, but for a while both generations get new ones"
        );
    } else {
        warn!(
            "{why}: workers have to set SO_REUSEPORT themselves, or use -l; connections that are queued on a \
             listener when it is closed are reset (sysctl -w net.ipv4.tcp_migrate_req=1 prevents that)"
        );
    }
    Ok(())
}

impl Unintercepted {
    /// Workers were started: scan soon.
    pub fn wake(&mut self, now: Instant) {
        self.next_scan.get_or_insert(now + INTERVAL);
    }

    /// When to call [`Unintercepted::scan`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.next_scan
    }

    /// Where the given workers have begun to listen since the last call, if it is time to scan.
    pub fn scan(&mut self, starting: &[(WorkerId, Pid)], now: Instant) -> Vec<(WorkerId, Address)> {
        if self.next_scan.is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.next_scan = (!starting.is_empty()).then(|| now + INTERVAL);
        self.known.retain(|worker, _| starting.iter().any(|(id, _)| id == worker));
        let listeners = match SockDiag::new().and_then(|mut diag| diag.listeners(Transport::Tcp, 0)) {
            Ok(listeners) => listeners,
            Err(error) => {
                debug!("can't find out who listens: {error}");
                return Vec::new();
            }
        };
        let mut found = Vec::new();
        for (worker, pid) in starting {
            let sockets = procfs::tree(*pid)
                .into_iter()
                .flat_map(|pid| open_sockets::socket_inodes(pid).unwrap_or_default());
            let sockets: HashSet<u64> = sockets.collect();
            let its = listeners.iter().filter(|listener| sockets.contains(&listener.inode.into()));
            let known = self.known.entry(*worker).or_default();
            found.extend(
                its.map(|listener| listener.address).filter(|a| known.insert(*a)).map(|a| (*worker, a)),
            );
        }
        found
    }
}
