//! What the stop signal does to workers, and what follows for their idle connections. Pure.
//!
//! When a process ends, the kernel frees its memory first and closes its files last (do_exit, kernel/exit.c). That takes
//! milliseconds, and a client that sends its next request in that time gets no answer. So the idle connections of a
//! worker that the signal kills are closed before the signal. A worker that handles the signal ends its connections in
//! its own way. The first worker of each generation shows which of the two it is, and the next generation is assumed to be like the last.

use super::Drained;

/// What to do with a drained worker when it is sent the stop signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Treatment {
    /// Before the signal: close its idle connections.
    pub close: bool,
    /// After the signal: watch what it does, and close the idle connections if it kills.
    pub watch: bool,
}

/// What is known of the stop signal's effect.
#[derive(Debug, Default)]
pub struct SignalEffect {
    /// Whether it killed the worker that was watched last, and the generation of that one.
    last: Option<(u32, bool)>,
}

impl SignalEffect {
    /// The first worker of a generation that has idle connections is watched: another version may handle the signal.
    /// Until it has shown that, it is assumed to be like the last one.
    pub fn treatment(&self, drained: &Drained) -> Treatment {
        let is_known = self.last.is_some_and(|(generation, _)| generation == drained.generation);
        Treatment {
            close: self.last.is_some_and(|(_, kills)| kills),
            watch: !is_known && !drained.idle.is_empty(),
        }
    }

    /// A worker of this generation was watched.
    pub fn learn(&mut self, generation: u32, kills: bool) {
        self.last = Some((generation, kills));
    }
}

/// Puts the worker with the fewest connections first: where nothing is known, the first one shows what the signal does,
/// and its connections are closed too late.
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
    fn the_first_worker_with_idle_connections_is_watched_and_shows_what_to_do_with_the_next_ones() {
        let mut effect = SignalEffect::default();
        let told = |effect: &SignalEffect, generation, connections| {
            let Treatment { close, watch } = effect.treatment(&drained(1, generation, connections));
            (close, watch)
        };
        assert_eq!(told(&effect, 1, 0), (false, false), "there is nothing to close");
        assert_eq!(told(&effect, 1, 1), (false, true));
        effect.learn(1, true);
        assert_eq!(told(&effect, 1, 1), (true, false));
        assert_eq!(told(&effect, 2, 1), (true, true), "as the last version");
        effect.learn(2, false);
        assert_eq!(told(&effect, 2, 1), (false, false));
        assert_eq!(told(&effect, 3, 1), (false, true));
    }
}
