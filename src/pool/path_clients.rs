//! Which connections came by our paths, and which workers have some.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;

use nix::unistd::Pid;

use crate::ids::WorkerId;
use crate::kernel::sockdiag::{SockDiag, SocketFile, UnixSocket};
use crate::kernel::{open_sockets, procfs};
use crate::pool::paths::UnixSockets;

impl UnixSockets {
    /// The inode numbers of the connections that came by any of the sockets. A connection whose client is in another
    /// network namespace is missing.
    pub fn connections(&self) -> Vec<u64> {
        if self.is_empty() {
            return Vec::new();
        }
        self.all().into_iter().filter_map(|(inode, came)| came.map(|_| inode)).collect()
    }

    /// All Unix sockets of this network namespace by inode number; with what is known of it, if it is a connection that
    /// came by one of ours.
    fn all(&self) -> HashMap<u64, Option<Came>> {
        self.all_by_file().unwrap_or_else(|_| self.all_by_name())
    }

    fn all_by_file(&self) -> io::Result<HashMap<u64, Option<Came>>> {
        let generations: HashMap<u64, u32> =
            self.sockets().map(|(generation, bound)| (bound.inode, generation)).collect();
        let all = SockDiag::new()?.unix_sockets()?;
        let files: Vec<(&SocketFile, u32)> =
            all.iter().filter_map(|it| Some((it.file.as_ref()?, *generations.get(&it.inode)?))).collect();
        let of_file = |file: &SocketFile| files.iter().find(|(ours, _)| *ours == file).map(|(_, it)| *it);
        let came = |it: &UnixSocket| {
            let generation = it.file.as_ref().filter(|_| it.is_connected).and_then(of_file)?;
            Some(Came { generation, client: it.peer })
        };
        Ok(all.iter().map(|it| (it.inode, came(it))).collect())
    }

    /// Where the kernel can't list their files. Any user can bind a socket whose name looks like a line of the table, or like
    /// ours in other mounts.
    fn all_by_name(&self) -> HashMap<u64, Option<Came>> {
        let generations: HashMap<String, u32> =
            self.sockets().filter_map(|(generation, bound)| Some((bound.name()?, generation))).collect();
        let came = |row: &procfs::UnixSocket| {
            let generation = generations.get(&row.name).copied();
            let generation = generation.filter(|_| row.is_connected && row.inode != 0)?;
            Some(Came { generation, client: None })
        };
        procfs::unix_sockets().iter().map(|row| (row.inode, came(row))).collect()
    }

    /// Which of some workers, given with their generations, have a connection that came by a path, or one that waits
    /// for any worker of their generation. What a worker's processes say to each other doesn't count.
    pub fn busy(&self, workers: &[(WorkerId, Pid, u32)]) -> BTreeSet<WorkerId> {
        if self.is_empty() || workers.is_empty() {
            return BTreeSet::new();
        }
        let waiting =
            self.sockets().filter(|(_, bound)| bound.has_waiting()).map(|(generation, _)| generation);
        let mut busy_generations: BTreeSet<u32> = waiting.chain(self.changing()).collect();
        let known = self.all();
        let processes = procfs::tree(Pid::this()).into_iter().skip(1);
        let held: Held = processes.map(|process| (process, open_sockets::sockets(process).ok())).collect();
        let inodes: HashSet<u64> = held.values().flatten().flatten().map(|(_, inode)| *inode).collect();
        // A thread has accepted what no process has, and hasn't got its fd yet.
        let unheld = known.iter().filter(|(inode, _)| !inodes.contains(inode));
        busy_generations.extend(unheld.filter_map(|(_, came)| Some(came.as_ref()?.generation)));
        let is_busy = |(_, pid, generation): &&(WorkerId, Pid, u32)| {
            busy_generations.contains(generation) || has_client(&procfs::tree(*pid), &held, &known)
        };
        workers.iter().filter(is_busy).map(|(worker, ..)| *worker).collect()
    }
}

/// A connection that came by one of our sockets.
struct Came {
    generation: u32,
    /// The inode number of its other end, if it is known.
    client: Option<u64>,
}

/// The sockets of processes, each its fd and inode number; `None` where they can't be seen.
type Held = HashMap<Pid, Option<Vec<(u32, u64)>>>;

/// Whether one of a worker's processes has a connection whose client is none of them.
fn has_client(processes: &[Pid], held: &Held, known: &HashMap<u64, Option<Came>>) -> bool {
    let sockets = || processes.iter().filter_map(|process| Some((*process, held.get(process)?.as_ref()?)));
    let own: HashSet<u64> = sockets().flat_map(|(_, its)| its).map(|(_, inode)| *inode).collect();
    let is_of_client = |process, fd, inode| match known.get(&inode) {
        Some(Some(came)) => came.client.is_none_or(|client| !own.contains(&client)),
        Some(None) => false,
        // In no list of this network namespace: a connection is in its client's (`unix_create1`).
        None => procfs::socket_protocol(process, fd).is_ok_and(|name| name.starts_with("UNIX")),
    };
    let may_have_one = |process: &Pid| matches!(held.get(process), Some(None));
    processes.iter().any(may_have_one)
        || sockets().any(|(process, its)| its.iter().any(|(fd, inode)| is_of_client(process, *fd, *inode)))
}
