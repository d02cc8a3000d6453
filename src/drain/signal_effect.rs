//! What the stop signal does to workers, and what follows for their idle connections. Pure.
//!
//! When a process ends, the kernel frees its memory first and closes its files last (do_exit, kernel/exit.c). That takes
//! milliseconds, and a client that sends its next request in that time gets no answer. So the idle connections of a
//! worker that the signal kills are closed before the signal. A worker that handles the signal ends its connections in
//! its own way. The first worker of each generation shows which of the two it is, and the next generation is assumed to be like the last.

use super::Arrived;

/// What to do with a worker to which everything has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Treatment {
    /// Close its idle connections. It has to have none left before the signal.
    pub close: bool,
    /// When it is done: send it the stop signal.
    pub stop: bool,
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
    /// `is_watching`: a worker that was sent the signal hasn't shown it yet. `is_killed`: this one gets SIGKILL instead, which
    /// shows nothing of the stop signal.
    pub fn treatment(&self, worker: &Arrived, is_watching: bool, is_killed: bool) -> Treatment {
        let is_known = self.last.is_some_and(|(generation, _)| generation == worker.generation);
        let has_idle = !worker.idle.is_empty();
        let nothing_is_known = is_watching && self.last.is_none();
        Treatment {
            close: self.last.is_some_and(|(_, kills)| kills),
            stop: worker.is_done && !(nothing_is_known && has_idle),
            watch: !is_watching && !is_known && has_idle && !is_killed,
        }
    }

    /// A worker of this generation was watched.
    pub fn learn(&mut self, generation: u32, kills: bool) {
        self.last = Some((generation, kills));
    }
}

/// Puts the worker with the fewest connections first: where nothing is known, the first one shows what the signal does,
/// and its connections are closed too late.
pub fn order(arrived: &mut [Arrived]) {
    arrived.sort_by_key(Arrived::connections);
}

#[cfg(test)]
mod tests {
    use nix::unistd::Pid;

    use super::*;
    use crate::drain::idle::OpenConnection;
    use crate::ids::WorkerId;

    fn arrived(worker: u32, generation: u32, connections: usize) -> Arrived {
        let open = vec![OpenConnection { fd: 3, inode: 1, received: 0 }; connections];
        let idle = if connections > 0 { vec![(Pid::this(), open)] } else { Vec::new() };
        Arrived { worker: WorkerId(worker), generation, is_done: true, idle }
    }

    #[test]
    fn the_worker_with_the_fewest_connections_comes_first() {
        let mut all = [arrived(1, 1, 3), arrived(2, 1, 1), arrived(3, 1, 2)];
        order(&mut all);
        assert_eq!(all.map(|arrived| arrived.worker), [2, 3, 1].map(WorkerId));
    }

    #[test]
    fn the_first_worker_with_idle_connections_is_watched_and_shows_what_to_do_with_the_next_ones() {
        let mut effect = SignalEffect::default();
        let told = |effect: &SignalEffect, generation, connections| {
            let Treatment { close, stop, watch } =
                effect.treatment(&arrived(1, generation, connections), false, false);
            assert!(stop);
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

    #[test]
    fn while_nothing_is_known_and_one_is_watched_the_others_with_idle_connections_wait() {
        let mut effect = SignalEffect::default();
        let stops = |effect: &SignalEffect, connections| {
            effect.treatment(&arrived(1, 1, connections), true, false).stop
        };
        assert!(!stops(&effect, 1) && stops(&effect, 0));
        effect.learn(0, true);
        assert!(stops(&effect, 1), "it is as the last version");
        assert!(!effect.treatment(&arrived(1, 1, 1), true, false).watch, "another one is watched");
    }

    #[test]
    fn a_worker_that_is_killed_shows_nothing_and_the_next_one_does() {
        let effect = SignalEffect::default();
        let [killed, next] =
            [true, false].map(|is_killed| effect.treatment(&arrived(1, 1, 1), false, is_killed));
        assert!(killed.stop && !killed.watch && next.watch);
    }

    #[test]
    fn a_busy_worker_is_not_stopped_and_its_idle_connections_are_closed_if_the_signal_kills() {
        let busy = Arrived { is_done: false, ..arrived(1, 1, 1) };
        let mut effect = SignalEffect::default();
        for kills in [None, Some(false), Some(true)] {
            kills.into_iter().for_each(|kills| effect.learn(0, kills));
            let Treatment { close, stop, .. } = effect.treatment(&busy, false, false);
            assert_eq!((close, stop), (kills == Some(true), false));
        }
    }
}
