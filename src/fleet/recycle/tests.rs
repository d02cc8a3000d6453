//! Stories of recycling, in the made-up world of the fleet's tests.

use std::time::Duration;

use super::super::policy::{Readiness, example as policy};
use super::super::tests::{World, address, recycle, reload, serving};
use super::super::{Activity, Command, End, Event, Policy, Refusal, Sickness};
use crate::ids::{SlotId, WorkerId};
use crate::steering::Role;

#[test]
fn a_recycled_worker_serves_until_its_successor_is_ready_and_then_drains() {
    let mut world = serving();
    world.command(recycle([1]));
    assert_eq!(world.alive.len(), 4);
    let successor = WorkerId(3);
    assert_eq!(world.places[&successor], (1, 1));
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    assert_eq!(world.plan().role(successor), Role::Starting);
    world.event(Event::SaysReady { worker: successor });
    assert_eq!([WorkerId(1), successor].map(|id| world.plan().role(id)), [Role::Leaving, Role::Ready]);
    assert_eq!(world.fleet.activity(), Activity::Recycling);
    world.command(reload());
    assert_eq!(world.alive.len(), 4, "the reload waits");
    world.drain_all();
    world.obey();
    assert_eq!(world.recyclings, [true]);
    assert_eq!(world.fleet.activity(), Activity::Reloading);
    assert!(
        world.said("worker 1 (pid 104, generation 1) serves instead of worker 1 (pid 102, generation 1)")
    );
}

#[test]
fn all_workers_are_recycled_one_after_the_other_and_one_command_ends() {
    let mut world = serving();
    world.command(recycle([]));
    for _ in 0..3 {
        assert_eq!(world.alive.len(), 4);
        assert!(world.recyclings.is_empty());
        world.ready_all();
        world.drain_all();
        world.obey();
    }
    assert_eq!(world.recyclings, [true]);
    assert_eq!(world.ids(), [3, 4, 5].map(WorkerId));
}

#[test]
fn when_a_successor_fails_the_worker_serves_on_and_the_command_has_failed() {
    let mut world = serving();
    world.command(recycle([]));
    world.end(WorkerId(3), End::Exited(1));
    assert_eq!(world.recyclings, [false]);
    assert!(world.said("exited with status 1 before it was ready; recycling abandoned, worker 0 (pid 101, generation 1) serves on"));
    assert_eq!((world.ids(), world.fleet.activity()), ([0, 1, 2].map(WorkerId).to_vec(), Activity::Serving));
    world.next_switch = Err("no memory".to_owned());
    world.command(recycle([2]));
    world.ready_all();
    assert_eq!(world.recyclings, [false, false]);
    world.drain_all();
    world.obey();
    assert_eq!((world.ids(), world.fleet.activity()), ([0, 1, 2].map(WorkerId).to_vec(), Activity::Serving));
    let refusal = world.refusal(recycle([1, 3]));
    assert_eq!(refusal, Some(Refusal::Limit("there is no slot 3: the last one is 2".to_owned())));
}

#[test]
fn ten_successors_of_a_sick_worker_that_fail_are_tried_later_each_time_by_a_made_up_clock_and_the_eleventh_serves()
 {
    let mut world = serving();
    world.event(Event::Sick { worker: WorkerId(1), sickness: Sickness::Memory(500) });
    assert!(world.said(
        "worker 1 (pid 102, generation 1) uses 500 MiB of memory (see --max-memory): it will be replaced"
    ));
    let mut waits = Vec::new();
    for attempt in 3..13 {
        assert_eq!(world.alive.len(), 4);
        world.end(WorkerId(attempt), End::Exited(1));
        assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
        let failed = world.now;
        while world.alive.len() == 3 {
            world.pass(Duration::from_secs(1));
        }
        waits.push((world.now - failed).as_secs());
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]);
    world.ready_all();
    world.drain_all();
    world.obey();
    assert_eq!(world.ids(), [0, 2, 13].map(WorkerId));
    world.pass(Duration::from_secs(600));
    assert_eq!(world.alive.len(), 3);
}

/// The worker of this slot uses too much memory from so many seconds after it was ready on. Returns after how many it is
/// replaced.
fn replaced_after(world: &mut World, slot: u32, seconds: u64) -> u64 {
    let worker = world.fleet.crew.ready_in(SlotId(slot)).unwrap();
    let (ready_at, workers) = (world.now, world.alive.len());
    world.pass(Duration::from_secs(seconds));
    while world.alive.len() == workers {
        world.event(Event::Sick { worker, sickness: Sickness::Memory(500) });
        if world.alive.len() == workers {
            world.pass(Duration::from_secs(10));
        }
    }
    let after = world.now - ready_at;
    world.ready_all();
    world.drain_all();
    world.obey();
    after.as_secs()
}

#[test]
fn workers_that_use_too_much_memory_from_their_start_on_are_replaced_later_each_time_and_one_warning_says_so()
{
    let mut world = serving();
    let seconds: Vec<u64> = (0..8).map(|_| replaced_after(&mut world, 1, 30)).collect();
    assert_eq!(seconds, [30, 60, 120, 240, 480, 600, 600, 600]);
    let seconds: Vec<u64> = (0..3).map(|_| replaced_after(&mut world, 2, 30)).collect();
    assert_eq!(seconds, [30, 30, 60], "its first worker was ready for long before");
    let warnings = world.log.iter().filter(|line| line.contains("a fresh worker needs more"));
    assert_eq!(warnings.count(), 1);
    assert_eq!([100, 59, 59].map(|found| replaced_after(&mut world, 1, found)), [100, 59, 69]);
    world.command(reload());
    world.ready_all();
    world.drain_all();
    world.obey();
    assert_eq!([30, 30].map(|found| replaced_after(&mut world, 1, found)), [30, 60], "it is another program");
}

#[test]
fn a_worker_that_hung_and_works_again_is_not_replaced_and_one_that_leaks_is() {
    let mut world = serving();
    world.command(reload());
    world.event(Event::Hangs { worker: WorkerId(0) });
    for id in [1, 2] {
        world.event(Event::Hangs { worker: WorkerId(id) });
        world.event(Event::Sick { worker: WorkerId(id), sickness: Sickness::Old });
    }
    for id in [0, 1] {
        world.event(Event::Recovered { worker: WorkerId(id) });
    }
    world.command(Command::Abort);
    world.obey();
    assert_eq!(world.fleet.activity(), Activity::Recycling);
    assert_eq!(world.places[&WorkerId(6)], (2, 1), "the one that hangs is first");
    world.ready_all();
    world.drain_all();
    world.obey();
    assert_eq!(world.places[&WorkerId(7)], (1, 1));
}

#[test]
fn the_successor_of_a_worker_that_ends_meanwhile_takes_its_place() {
    let mut world = serving();
    world.command(recycle([1]));
    world.end(WorkerId(1), End::Killed(9));
    assert_eq!(world.ids(), [0, 2, 3].map(WorkerId));
    assert_eq!(
        (world.recyclings.as_slice(), world.fleet.activity()),
        ([false].as_slice(), Activity::Serving)
    );
    world.event(Event::SaysReady { worker: WorkerId(3) });
    assert_eq!(world.steered_to(), [(0, 1), (1, 1), (2, 1)]);
    world.end(WorkerId(3), End::Killed(9));
    world.command(recycle([1]));
    assert_eq!(world.recyclings, [false, false], "there is nobody to replace");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.alive.len(), 3, "it is restarted as any other");
}

#[test]
fn a_successor_with_sockets_of_its_own_does_not_take_the_place_of_a_worker_that_ends() {
    let mut world = serving();
    for worker in world.ids() {
        world.event(Event::Listens { worker, endpoint: address(1) });
    }
    world.command(recycle([1]));
    world.event(Event::Listens { worker: WorkerId(3), endpoint: address(2) });
    world.end(WorkerId(1), End::Killed(9));
    assert!(world.reserved.contains(&(1, 1)), "its sockets are for the next one");
    assert_eq!(world.recyclings, [false]);
    world.obey();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.ids(), [0, 2, 4].map(WorkerId));
}

#[test]
fn workers_that_are_old_are_replaced_one_at_a_time() {
    let age = Duration::from_secs(100);
    let mut world = World::new(Policy { max_age: Some(age), ..policy(Readiness::Listen) });
    world.ready_all();
    world.pass(age * 9 / 10 - Duration::from_secs(1));
    assert_eq!(world.alive.len(), 3);
    world.pass(age / 10 + Duration::from_secs(1));
    assert_eq!(world.alive.len(), 4);
    for _ in 0..3 {
        world.ready_all();
        world.drain_all();
        world.obey();
    }
    assert_eq!(world.alive.len(), 3);
    assert!(world.ids().into_iter().all(|id| id.0 >= 3), "{:?}", world.ids());
}
