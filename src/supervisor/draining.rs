//! Workers that are retired: what they are told, and what follows when they have finished their work.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use libc::c_int;
use nix::time::{ClockId, clock_gettime};

use super::{Process, Supervisor};
use crate::address::Address;
use crate::drain::Arrived;
use crate::drain::idle::{self, EndWatch};
use crate::drain::signal_effect::{self, Treatment};
use crate::fleet::Event;
use crate::ids::WorkerId;
use crate::kernel::procfs;
use crate::worker;

impl Supervisor {
    /// A worker gets no more connections: tells it, and watches those that it has.
    pub(super) fn begin_drain(&mut self, worker: WorkerId, addresses: BTreeSet<Address>) {
        self.probes.forget(worker, &mut self.pool);
        if let Some(Process { pid, generation, .. }) = self.processes.get(&worker) {
            self.retire_signal.into_iter().for_each(|signal| worker::signal(*pid, signal as c_int));
            self.drain.watch(worker, *pid, *generation, addresses, Instant::now());
        }
    }

    /// Stops the workers that have finished their work.
    pub(super) fn stop_drained(&mut self) {
        let begun = Instant::now();
        if self.end_watch.as_ref().is_some_and(|watch| watch.deadline() <= begun) {
            self.end_watch.iter_mut().for_each(EndWatch::look);
        }
        self.learn_signal_effect();
        let cpu_before = cpu_time();
        let mut arrived = self.drain.poll(&self.pool, &self.unix, begun);
        signal_effect::order(&mut arrived);
        for arrived in arrived {
            let is_killed = self.fleet.crew().is_killed(arrived.worker);
            let Treatment { close, stop, watch } =
                self.signal_effect.treatment(&arrived, self.end_watch.is_some(), is_killed);
            let Arrived { worker, generation, idle, .. } = arrived;
            // If something has come on an idle connection since, the worker waits for the next poll.
            let is_idle = if close { idle::close(&idle) } else { !stop || !idle::have_new_data(&idle) };
            if !is_idle || !stop {
                self.thaw(worker);
                continue;
            }
            if is_killed && self.frozen.insert(worker) {
                // It has sockets on which connections come: one may have come since. The next poll is sure.
                self.pid(worker).into_iter().for_each(|pid| drop(worker::freeze(pid)));
                continue;
            }
            let watch = watch.then(|| EndWatch::hold(generation, &idle, self.stop_signal));
            self.handle(Event::Drained { worker });
            if let Some(mut watch) = watch {
                watch.begin();
                self.end_watch = Some(watch);
                self.learn_signal_effect();
            }
        }
        self.drain.polled(begun, Instant::now(), cpu_time().saturating_sub(cpu_before));
    }

    /// Has a worker go on that is stopped by [`Supervisor::stop_drained`].
    pub(super) fn thaw(&mut self, worker: WorkerId) {
        if self.frozen.remove(&worker) {
            let processes = self.pid(worker).into_iter().flat_map(procfs::tree);
            processes.for_each(|pid| worker::signal(pid, libc::SIGCONT));
        }
    }

    fn learn_signal_effect(&mut self) {
        if let Some(watch) = &self.end_watch
            && let Some(kills) = watch.verdict(Instant::now())
        {
            self.signal_effect.learn(watch.generation(), kills);
            self.end_watch = None;
        }
    }
}

/// How long this thread has had a CPU.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
