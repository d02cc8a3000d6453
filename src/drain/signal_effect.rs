//! What the stop signal does to workers, and what follows for their idle connections. Pure.
//!
//! When a process ends, the kernel frees its memory first and closes its files last (do_exit, kernel/exit.c). That takes
//! milliseconds, and a client that sends its next request in that time gets no answer. So the idle connections of a
//! worker that the signal kills are closed before the signal. A worker that handles the signal ends its connections in
//! its own way. The first worker of a generation with idle connections shows which of the two it is.

use std::collections::BTreeMap;

use super::Drained;

/// What to do with a drained worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// The signal kills it: close its idle connections, then send it.
    CloseFirst,
    /// It handles the signal, or has nothing to close: send it.
    Signal,
    /// Send the signal, watch what it does, and close the idle connections if it kills.
    SignalAndWatch,
}

/// By generation, whether the stop signal kills its workers, where that is known.
#[derive(Debug, Default)]
pub struct SignalEffects(BTreeMap<u32, bool>);

impl SignalEffects {
    pub fn treatment(&self, drained: &Drained) -> Treatment {
        match self.0.get(&drained.generation) {
            Some(true) => Treatment::CloseFirst,
            None if !drained.idle.is_empty() => Treatment::SignalAndWatch,
            Some(false) | None => Treatment::Signal,
        }
    }

    pub fn learn(&mut self, generation: u32, kills: bool) {
        self.0.insert(generation, kills);
    }

    /// Forgets all generations but these.
    pub fn keep(&mut self, is_alive: impl Fn(u32) -> bool) {
        self.0.retain(|generation, _| is_alive(*generation));
    }
}

/// Puts the worker with the fewest connections first: the first one of a generation shows what the signal does, and its
/// connections are closed too late.
pub fn order(drained: &mut [Drained]) {
    drained.sort_by_key(Drained::connections);
}

#[cfg(test)]
mod tests {
    use nix::unistd::Pid;

    use super::*;
    use crate::drain::idle::OpenConnection;
    use crate::ids::WorkerId;

    fn drained(worker: u32, generation: u32, connections: usize) -> Drained {
        let open = vec![OpenConnection { fd: 3, inode: 1, received: 0 }; connections];
        let idle = if connections > 0 { vec![(Pid::this(), open)] } else { Vec::new() };
        Drained { worker: WorkerId(worker), generation, idle }
    }

    #[test]
    fn the_worker_with_the_fewest_connections_comes_first() {
        let mut all = [drained(1, 1, 3), drained(2, 1, 1), drained(3, 1, 2)];
        order(&mut all);
        assert_eq!(all.map(|drained| drained.worker), [2, 3, 1].map(WorkerId));
    }

    #[test]
    fn the_first_worker_with_idle_connections_is_watched_and_shows_what_to_do_with_the_others() {
        let mut effects = SignalEffects::default();
        assert_eq!(effects.treatment(&drained(1, 1, 0)), Treatment::Signal, "there is nothing to close");
        assert_eq!(effects.treatment(&drained(1, 1, 1)), Treatment::SignalAndWatch);
        effects.learn(1, true);
        effects.learn(2, false);
        assert_eq!(effects.treatment(&drained(2, 1, 1)), Treatment::CloseFirst);
        assert_eq!(effects.treatment(&drained(2, 1, 0)), Treatment::CloseFirst);
        assert_eq!(effects.treatment(&drained(3, 2, 1)), Treatment::Signal);
        effects.keep(|generation| generation == 2);
        assert_eq!(effects.treatment(&drained(2, 1, 1)), Treatment::SignalAndWatch);
        assert_eq!(effects.treatment(&drained(3, 2, 1)), Treatment::Signal);
    }
}
