//! Which workers should be replaced although they live: those that hang, and those that use too much memory.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::Supervisor;
use crate::fleet::{Event, Sickness, State};
use crate::ids::WorkerId;
use crate::kernel::scheduling::{self, Turns};
use crate::kernel::sockdiag::SockDiag;
use crate::kernel::{open_sockets, procfs};

/// A worker that takes no connections for so long hangs, if the command line names no time.
const HANGS_AFTER: Duration = Duration::from_secs(10);
/// The time between two looks at the workers' memory.
const MEMORY_INTERVAL: Duration = Duration::from_secs(10);
/// At so many looks in a row a worker has to use too much.
const MEMORY_LOOKS: u32 = 3;

/// What a worker has done.
#[derive(Debug, Clone, Default)]
struct Work {
    /// On each of its connections, how many bytes it has read, and written so that the client has them.
    moved: BTreeMap<u64, u64>,
    /// Of each of its threads.
    turns: BTreeMap<Pid, Turns>,
}

impl Work {
    /// How much of the time since the work before it was missing: the longest for which one of its threads waited for a CPU.
    fn starved_since(&self, before: &Work, elapsed: Duration) -> Duration {
        let waited = self.turns.iter().filter_map(|(tid, now)| {
            let before = before.turns.get(tid)?;
            // A wait is known when it is over. Until then, a thread that is runnable waited unless it ran.
            Some(match before.is_runnable && now.is_runnable {
                true => elapsed.saturating_sub(now.ran.saturating_sub(before.ran)),
                false => now.waited.saturating_sub(before.waited),
            })
        });
        waited.max().unwrap_or_default().min(elapsed)
    }
}

/// Of workers for which connections wait that they don't take. A worker that serves slowly takes one now and then, or sends
/// something; nothing tells one that computes for long from an endless loop.
#[derive(Debug)]
struct Suspect {
    /// For how long it has done nothing though it could: a thread that waits for a CPU may be about to.
    idle: Duration,
    /// At the last look.
    work: Work,
    looked: Instant,
    next_look: Instant,
    hangs: bool,
}

#[derive(Debug)]
pub struct Health {
    hangs_after: Duration,
    /// In KiB.
    max_memory: Option<u64>,
    suspects: BTreeMap<WorkerId, Suspect>,
    /// At how many looks in a row each worker has used too much memory.
    looks: BTreeMap<WorkerId, u32>,
    next_memory: Option<Instant>,
}

impl Health {
    pub fn new(hung_timeout: Option<Duration>, max_memory: Option<u64>, now: Instant) -> Self {
        Self {
            hangs_after: hung_timeout.unwrap_or(HANGS_AFTER),
            max_memory,
            suspects: BTreeMap::new(),
            looks: BTreeMap::new(),
            next_memory: max_memory.map(|_| now + MEMORY_INTERVAL),
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        let looks = self.suspects.values().map(|suspect| suspect.next_look);
        looks.chain(self.next_memory).min()
    }

    pub fn hangs(&self, worker: WorkerId) -> bool {
        self.suspects.get(&worker).is_some_and(|suspect| suspect.hangs)
    }

    /// Of the workers for which connections wait, those at which it is time to look.
    fn due(&self, awaited: &BTreeSet<WorkerId>, now: Instant) -> Vec<WorkerId> {
        let is_due = |worker: &WorkerId| self.suspects.get(worker).is_none_or(|it| it.next_look <= now);
        awaited.iter().copied().filter(is_due).collect()
    }

    /// Takes for which workers connections wait, and the work of those that are due. Returns the events that follow.
    fn look(
        &mut self,
        awaited: &BTreeSet<WorkerId>,
        work: impl IntoIterator<Item = (WorkerId, Work)>,
        now: Instant,
    ) -> Vec<Event> {
        let mut events = Vec::new();
        let interval = (self.hangs_after / 8).clamp(Duration::from_millis(100), Duration::from_secs(5));
        self.suspects.retain(|worker, suspect| {
            let stays = awaited.contains(worker);
            if !stays && suspect.hangs {
                events.push(Event::Recovered { worker: *worker });
            }
            stays
        });
        for (worker, work) in work {
            let next_look = now + interval;
            let new = Suspect { idle: Duration::ZERO, work, looked: now, next_look, hangs: false };
            let Some(suspect) = self.suspects.get_mut(&worker) else {
                self.suspects.insert(worker, new);
                continue;
            };
            let elapsed = now - suspect.looked;
            let idle = suspect.idle + (elapsed - new.work.starved_since(&suspect.work, elapsed));
            let (works, hung) = (suspect.work.moved != new.work.moved, suspect.hangs);
            *suspect = match works {
                true => new,
                false => Suspect { idle, hangs: idle >= self.hangs_after, ..new },
            };
            match (hung, suspect.hangs) {
                (false, true) => events.push(Event::Hangs { worker }),
                (true, false) => events.push(Event::Recovered { worker }),
                _ => {}
            }
        }
        events
    }

    /// Takes how much memory each worker uses, in KiB.
    fn look_at_memory(&mut self, memory: &BTreeMap<WorkerId, u64>, now: Instant) -> Vec<Event> {
        self.next_memory = self.max_memory.map(|_| now + MEMORY_INTERVAL);
        let max = self.max_memory.unwrap_or(u64::MAX);
        self.looks.retain(|worker, _| memory.get(worker).is_some_and(|kib| *kib > max));
        let mut events = Vec::new();
        for (worker, kib) in memory.iter().filter(|(_, kib)| **kib > max) {
            let looks = self.looks.entry(*worker).or_default();
            *looks += 1;
            if *looks >= MEMORY_LOOKS {
                events.push(Event::Sick { worker: *worker, sickness: Sickness::Memory(kib / 1024) });
            }
        }
        events
    }
}

impl Supervisor {
    /// Finds out which workers hang or use too much memory, as far as it is time to.
    pub(super) fn look_at_health(&mut self, now: Instant) {
        let awaited = self.pool.awaited_for_long();
        if !awaited.is_empty() || !self.health.suspects.is_empty() {
            let ready = awaited.into_iter().filter(|id| self.fleet.crew().state(*id) == Some(State::Ready));
            let ready = ready.collect();
            let due = self.health.due(&ready, now).into_iter();
            let work: Vec<(WorkerId, Work)> = due.map(|worker| (worker, self.work(worker))).collect();
            let events = self.health.look(&ready, work, now);
            events.into_iter().for_each(|event| self.handle(event));
        }
        if self.health.next_memory.is_some_and(|at| at <= now) {
            let is_ready = |id: &WorkerId| self.fleet.crew().state(*id) == Some(State::Ready);
            let ready = self.processes.iter().filter(|(id, _)| is_ready(id));
            let memory = ready.map(|(id, process)| (*id, procfs::usage(process.pid).rss_kib)).collect();
            let events = self.health.look_at_memory(&memory, now);
            events.into_iter().for_each(|event| self.handle(event));
        }
    }

    fn work(&self, worker: WorkerId) -> Work {
        let (Some(pid), Ok(mut diag)) = (self.pid(worker), SockDiag::new()) else { return Work::default() };
        let mut work = Work { turns: scheduling::of_tree(pid), ..Work::default() };
        let open: HashSet<u64> = open_sockets::sockets_of_tree(pid).collect();
        for address in self.fleet.crew().addresses(worker) {
            for connection in diag.connections(address.socket).unwrap_or_default() {
                let inode = u64::from(connection.inode);
                if open.contains(&inode) {
                    let read = connection.traffic.received.saturating_sub(connection.unread.into());
                    work.moved.insert(inode, read + connection.traffic.acknowledged);
                }
            }
        }
        work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKER: WorkerId = WorkerId(3);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Looks every second while connections wait, at work that is so much at each look. Returns what happened at which
    /// second.
    fn events(health: &mut Health, work: &[Option<u64>]) -> Vec<(usize, bool)> {
        let start = Instant::now();
        let mut told = Vec::new();
        for (second, work) in work.iter().enumerate() {
            let awaited = work.iter().map(|_| WORKER).collect();
            let now = start + seconds(second as u64);
            let due = health.due(&awaited, now).into_iter();
            let moved = BTreeMap::from([(1, work.unwrap_or(0))]);
            let work: Vec<_> = due.map(|id| (id, Work { moved: moved.clone(), ..Work::default() })).collect();
            let events = health.look(&awaited, work, now);
            told.extend(events.iter().map(|event| (second, matches!(event, Event::Hangs { .. }))));
        }
        told
    }

    #[test]
    fn a_worker_hangs_if_connections_wait_and_it_does_nothing_for_the_whole_time() {
        let new = || Health::new(Some(seconds(4)), None, Instant::now());
        let nothing = [Some(7); 12];
        assert_eq!(events(&mut new(), &nothing), [(4, true)]);
        let mut works = nothing;
        works[3] = Some(8);
        works[4..].fill(Some(8));
        assert_eq!(events(&mut new(), &works), [(7, true)], "it has done something at 3 s");
        let mut takes = nothing;
        takes[3] = None;
        assert_eq!(events(&mut new(), &takes), [(8, true)], "nobody waited at 3 s");
        let mut recovers = nothing;
        recovers[6..].fill(None);
        assert_eq!(events(&mut new(), &recovers), [(4, true), (6, false)]);
        recovers[6..].fill(Some(9));
        assert_eq!(events(&mut new(), &recovers), [(4, true), (6, false), (10, true)]);
    }

    /// After how many seconds a worker hangs whose thread shows these turns at each second, of milliseconds, and 4 s are allowed.
    fn hangs_after(turns: impl Fn(u64) -> (u64, u64, bool)) -> Option<u64> {
        let start = Instant::now();
        let mut health = Health::new(Some(seconds(4)), None, start);
        let awaited = BTreeSet::from([WORKER]);
        (0..40).find(|second| {
            let (ran, waited, is_runnable) = turns(*second);
            let [ran, waited] = [ran, waited].map(Duration::from_millis);
            let turns = BTreeMap::from([(Pid::this(), Turns { ran, waited, is_runnable })]);
            let work = [(WORKER, Work { turns, ..Work::default() })];
            !health.look(&awaited, work, start + seconds(*second)).is_empty()
        })
    }

    #[test]
    fn time_in_which_a_worker_waits_for_a_cpu_does_not_count() {
        assert_eq!(hangs_after(|_| (7, 7, false)), Some(4), "it sleeps, or is stopped");
        assert_eq!(hangs_after(|second| (second * 1000, 7, true)), Some(4), "it computes");
        assert_eq!(
            hangs_after(|second| (second * 250, second * 750, true)),
            Some(16),
            "it computes, with a fourth of a CPU"
        );
        assert_eq!(hangs_after(|_| (7, 7, true)), None, "it gets no CPU");
        let once_in_ten = |second| (second / 10, second / 10 * 10_000, true);
        assert_eq!(
            hangs_after(once_in_ten),
            None,
            "it waits for ten seconds each time, and that is known later"
        );
        let woken = |second| (7, 7, second == 2);
        assert_eq!(hangs_after(woken), Some(4), "a thread was woken a moment ago");
    }

    #[test]
    fn without_a_time_out_a_worker_hangs_after_ten_seconds() {
        let mut health = Health::new(None, None, Instant::now());
        assert_eq!(health.deadline(), None);
        assert_eq!(events(&mut health, &[Some(7); 12]), [(10, true)]);
        assert!(health.hangs(WORKER) && health.deadline().is_some());
    }

    #[test]
    fn memory_is_too_much_if_three_looks_in_a_row_find_it_so() {
        let start = Instant::now();
        let mut health = Health::new(None, Some(2048), start);
        assert_eq!(health.deadline(), Some(start + MEMORY_INTERVAL));
        let mut told = Vec::new();
        for (look, kib) in [3000, 3000, 2048, 3000, 3000, 3000, 3000].into_iter().enumerate() {
            let now = start + MEMORY_INTERVAL * (look as u32 + 1);
            told.extend(
                health.look_at_memory(&BTreeMap::from([(WORKER, kib)]), now).into_iter().map(|_| look),
            );
            assert_eq!(health.deadline(), Some(now + MEMORY_INTERVAL));
        }
        assert_eq!(told, [5, 6], "the fleet may not have heard of it as long as it didn't serve");
    }
}
