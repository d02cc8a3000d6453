//! What status shows of the fleet.

use std::time::Instant;

use super::phase::Phase;
use super::roster::Roster;
use super::worker::{State, Worker};
use crate::ids::{SlotId, WorkerId};

/// What the fleet is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    Starting,
    Serving,
    Reloading,
    Abandoning,
    Scaling,
    Recycling,
    Stopping,
}

impl From<Phase> for Activity {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Starting => Self::Starting,
            Phase::Serving => Self::Serving,
            Phase::Replacing { .. }
            | Phase::Canary { .. }
            | Phase::Switching { .. }
            | Phase::Retiring { .. } => Self::Reloading,
            Phase::Abandoning => Self::Abandoning,
            Phase::Scaling { .. } => Self::Scaling,
            Phase::Recycling(_) => Self::Recycling,
            Phase::Stopping { .. } => Self::Stopping,
        }
    }
}

/// How the last reload went.
#[derive(Debug, Clone)]
pub struct LastReload {
    pub generation: u32,
    pub result: Result<(), String>,
    pub ended: Instant,
}

/// A process of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub worker: WorkerId,
    /// `None` for a moment, until it is started.
    pub pid: Option<i32>,
    pub state: State,
    /// Since when it has been in that state.
    pub since: Instant,
    pub started: Instant,
}

/// A slot, or a worker that doesn't serve in it: not yet, or no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub slot: SlotId,
    pub generation: u32,
    pub serves: bool,
    /// `None` while the slot waits for its next worker.
    pub process: Option<Process>,
    /// Of the slot.
    pub restarts: u32,
}

/// All slots and workers, by slot, and in each slot the one that serves first.
pub fn views(roster: &Roster) -> Vec<View> {
    let restarts = |slot: SlotId| roster.slots.get(slot.index()).map_or(0, |slot| slot.restarts);
    let of_worker = |(id, worker): (WorkerId, &Worker)| {
        let Worker { slot, generation, pid, started, state, since, .. } = *worker;
        let process = Some(Process { worker: id, pid, state, since, started });
        View { slot, generation, serves: roster.serves(worker), process, restarts: restarts(slot) }
    };
    let mut views: Vec<View> = roster.workers().map(of_worker).collect();
    for (id, slot) in (0..).map(SlotId).zip(&roster.slots) {
        if !views.iter().any(|view| view.slot == id && view.serves) {
            let (generation, restarts) = (slot.generation, slot.restarts);
            views.push(View { slot: id, generation, serves: true, process: None, restarts });
        }
    }
    views.sort_by_key(|view| (view.slot, !view.serves, view.generation));
    views
}
