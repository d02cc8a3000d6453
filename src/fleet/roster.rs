//! Which slots and workers there are.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use super::slot::Slot;
use super::worker::{State, Worker};
use crate::ids::{SlotId, WorkerId};

#[derive(Debug)]
pub struct Roster {
    pub slots: Vec<Slot>,
    workers: BTreeMap<WorkerId, Worker>,
    next: WorkerId,
}

impl Roster {
    /// So many slots of the first generation, without workers.
    pub fn new(slots: u32) -> Self {
        let slots = (0..slots).map(|_| Slot::new(1, None)).collect();
        Self { slots, workers: BTreeMap::new(), next: WorkerId(0) }
    }

    /// Adds a worker that is about to start.
    pub fn add(&mut self, slot: SlotId, generation: u32, now: Instant) -> WorkerId {
        let id = self.next;
        self.next = WorkerId(id.0 + 1);
        self.workers.insert(id, Worker::new(id, slot, generation, now));
        id
    }

    pub fn get(&self, id: WorkerId) -> Option<&Worker> {
        self.workers.get(&id)
    }

    pub fn get_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        self.workers.get_mut(&id)
    }

    pub fn remove(&mut self, id: WorkerId) -> Option<Worker> {
        self.workers.remove(&id)
    }

    pub fn workers(&self) -> impl Iterator<Item = (WorkerId, &Worker)> {
        self.workers.iter().map(|(id, worker)| (*id, worker))
    }

    /// The workers for which `wanted` holds, the oldest first.
    pub fn ids(&self, wanted: impl Fn(&Worker) -> bool) -> Vec<WorkerId> {
        self.workers().filter(|(_, worker)| wanted(worker)).map(|(id, _)| id).collect()
    }

    /// How many workers there are.
    pub fn len(&self) -> usize {
        self.workers.len()
    }

    pub fn state(&self, id: WorkerId) -> Option<State> {
        self.get(id).map(|worker| worker.state)
    }

    /// "worker 2 (pid 12, generation 3)"
    pub fn name(&self, id: WorkerId) -> String {
        self.get(id).map_or("a worker".to_owned(), Worker::to_string)
    }

    /// Whether a worker is the one of its slot: not a replacement before the switch, nor a retired one.
    pub fn serves(&self, worker: &Worker) -> bool {
        self.slots.get(worker.slot.index()).is_some_and(|slot| slot.serving == Some(worker.id))
    }

    /// Whether all of these slots have a ready worker of this generation.
    pub fn are_ready(&self, slots: Range<usize>, generation: u32) -> bool {
        let is_ready = |worker: &&Worker| {
            let is_one = slots.contains(&worker.slot.index()) && worker.generation == generation;
            is_one && worker.state == State::Ready
        };
        self.workers.values().filter(is_ready).count() == slots.len()
    }

    /// Whether some worker serves in no slot.
    pub fn has_others(&self) -> bool {
        self.workers.values().any(|worker| !self.serves(worker))
    }
}
