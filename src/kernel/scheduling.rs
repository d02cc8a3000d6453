//! How long threads have had a CPU, and how long they have waited for one.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use nix::unistd::Pid;

use crate::kernel::procfs;

/// Of a thread: /proc/PID/schedstat (Documentation/scheduler/sched-stats.rst) and its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turns {
    pub ran: Duration,
    /// The kernel adds a wait when it is over.
    pub waited: Duration,
    /// It runs or waits for a CPU at this moment.
    pub is_runnable: bool,
}

/// Of each thread of a process and its descendants; of none if the kernel doesn't count it.
pub fn of_tree(root: Pid) -> BTreeMap<Pid, Turns> {
    let threads = procfs::tree(root).into_iter().flat_map(procfs::threads);
    threads.filter_map(|tid| Some((tid, of(tid)?))).collect()
}

/// Of one thread.
pub fn of(tid: Pid) -> Option<Turns> {
    let text = |file: &str| fs::read_to_string(format!("/proc/{tid}/{file}")).ok();
    parse(&text("schedstat")?, &text("stat")?)
}

fn parse(schedstat: &str, stat: &str) -> Option<Turns> {
    let mut numbers = schedstat.split_whitespace().map_while(|number| number.parse().ok());
    let (ran, waited) = (numbers.next()?, numbers.next()?);
    let is_runnable = stat.get(stat.rfind(')')? + 1..)?.trim_start().starts_with('R');
    let turns = Turns { ran: Duration::from_nanos(ran), waited: Duration::from_nanos(waited), is_runnable };
    (ran > 0).then_some(turns) // without CONFIG_SCHED_INFO all is 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_turns_of_a_thread_are_in_two_files() {
        let turns = |ran, waited, is_runnable| {
            let [ran, waited] = [ran, waited].map(Duration::from_nanos);
            Some(Turns { ran, waited, is_runnable })
        };
        assert_eq!(parse("12 34 5\n", "7 (a) R b) R 1"), turns(12, 34, true));
        assert_eq!(parse("12 34 5\n", "7 (a) R b) S 1"), turns(12, 34, false));
        for (schedstat, stat) in [("0 0 0\n", "7 (a) R 1"), ("12\n", "7 (a) R 1"), ("12 34 5\n", "")] {
            assert_eq!(parse(schedstat, stat), None, "{schedstat:?} {stat:?}");
        }
    }

    #[test]
    fn this_thread_runs() {
        let turns = of_tree(Pid::this())[&nix::unistd::gettid()];
        assert!(turns.is_runnable, "{turns:?}");
    }
}
