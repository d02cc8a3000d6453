//! Which workers get new connections: pure rules, without a system call.
//!
//! The fleet says what each worker is ([`Plan`]). [`decide`] turns that into a decision for each member of a reuseport
//! group, [`load`] finds members that take no connections, [`spread`] those whose workers have the fewest, [`order`] keeps track
//! of the kernel's array of the group, and [`program`] writes the instructions that choose an index of that array: at random, or
//! [`by_client`]. The pool carries it out.

pub mod by_client;
pub mod load;
pub mod order;
pub mod program;
pub mod spread;

use std::collections::BTreeMap;
use std::fmt;

use crate::ids::WorkerId;

/// What a member is to steering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Borrowed by a worker that isn't ready yet.
    Starting,
    /// Borrowed by a ready worker that gets new connections.
    Ready,
    /// Borrowed by a ready worker of a generation that is tried with a share of the connections.
    Canary,
    /// Borrowed by a worker that gets no more connections. Clients' packets that were sent to it before may still arrive, and it
    /// may leave the group at any time.
    Leaving,
    /// Its worker died. The worker's successor inherits the connections that are queued here.
    Reserved,
    /// Nobody borrows it.
    Free,
}

impl Role {
    /// Whether its worker gets new connections.
    pub fn is_served(self) -> bool {
        matches!(self, Self::Ready | Self::Canary)
    }

    /// Whether its worker gets no more connections.
    pub fn is_leaving(self) -> bool {
        self == Self::Leaving
    }
}

/// Which workers get new connections: the fleet makes the plan, the pool carries it out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// All workers except those that start, or are ready and wait for the switch.
    pub roles: BTreeMap<WorkerId, Role>,
    /// What the workers whose role is [`Role::Canary`] get together.
    pub share: Share,
    /// The generation whose Unix sockets have the paths; `None` when there are no more new connections.
    pub generation: Option<u32>,
}

impl Plan {
    /// A worker that is not in the plan gets no connections yet.
    pub fn role(&self, worker: WorkerId) -> Role {
        self.roles.get(&worker).copied().unwrap_or(Role::Starting)
    }
}

/// What the kernel does with new connections for a member of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The program sends it new connections.
    Target,
    /// The program sends it a share of the new connections.
    Canary,
    /// The program sends it nothing, and its socket drops the SYNs that reach it anyway. The client sends its SYN
    /// again, and by then the program may have a target.
    Hold,
    /// The program sends it nothing. A handshake that reached it before may complete.
    Leave,
    /// The program sends it all new connections, so that nobody else gets them, and its socket drops their SYNs.
    Sink,
}

/// Decides for each member of a group. `roles` has the role of each member; the result has the same order.
///
/// Ready workers get all connections, except for the share of a canary. Without a ready worker, connections wait on
/// the members whose workers will have a successor. Without such a member, all SYNs are dropped, by a free member if
/// others may have handshakes under way: these would be dropped as well.
pub fn decide(roles: &[Role]) -> Vec<Decision> {
    let any = |role| roles.contains(&role);
    let is_served = any(Role::Ready) || any(Role::Canary);
    let is_awaited = any(Role::Reserved);
    let is_left = roles.iter().any(|role| role.is_leaving());
    let decide = |role: &Role| match role {
        Role::Canary if any(Role::Ready) => Decision::Canary,
        Role::Ready | Role::Canary => Decision::Target,
        Role::Reserved if !is_served => Decision::Target,
        Role::Reserved | Role::Leaving => Decision::Leave,
        // If those who leave still got connections, they would never finish.
        Role::Free if !is_served && !is_awaited && is_left => Decision::Sink,
        Role::Starting | Role::Free => Decision::Hold,
    };
    roles.iter().map(decide).collect()
}

/// A part of all new connections, in 1/10,000.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share(pub u32);

impl Share {
    const WHOLE: u32 = 10_000;

    /// `None` if the percentage, rounded to 1/10,000, is nothing or everything.
    pub fn from_percent(percent: f64) -> Option<Self> {
        let share = (percent / 100.0 * f64::from(Self::WHOLE)).round();
        (share > 0.0 && share < f64::from(Self::WHOLE)).then_some(Self(share as u32))
    }

    /// How many of the 2^32 values of a random number make this share.
    fn of_random_numbers(self) -> u32 {
        ((u64::from(self.0) << 32) / u64::from(Self::WHOLE)) as u32
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} %", f64::from(self.0) * 100.0 / f64::from(Self::WHOLE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_workers_get_everything_and_without_one_connections_wait_for_a_successor() {
        use Decision::{Hold, Leave, Target};
        use Role::*;
        assert_eq!(
            decide(&[Ready, Reserved, Leaving, Starting, Leaving]),
            [Target, Leave, Leave, Hold, Leave]
        );
        assert_eq!(decide(&[Ready, Canary, Reserved]), [Target, Decision::Canary, Leave]);
        assert_eq!(
            decide(&[Canary, Reserved, Leaving]),
            [Target, Leave, Leave],
            "only the canary listens on this address"
        );
        assert_eq!(decide(&[Ready, Leaving]), [Target, Leave]);
        assert_eq!(decide(&[Starting, Reserved, Leaving, Free]), [Hold, Target, Leave, Hold]);
        assert_eq!(decide(&[Starting, Free]), [Hold, Hold]);
    }

    #[test]
    fn connections_to_those_who_leave_end_in_a_free_member_if_nobody_else_takes_them() {
        use Decision::{Hold, Leave, Sink};
        use Role::*;
        assert_eq!(decide(&[Leaving, Free, Starting, Free]), [Leave, Sink, Hold, Sink]);
        assert_eq!(decide(&[Leaving, Free]), [Leave, Sink]);
    }

    #[test]
    fn a_worker_that_is_not_in_the_plan_is_starting() {
        let plan = Plan { roles: BTreeMap::from([(WorkerId(1), Role::Leaving)]), ..Plan::default() };
        assert_eq!([plan.role(WorkerId(1)), plan.role(WorkerId(2))], [Role::Leaving, Role::Starting]);
    }

    #[test]
    fn a_share_is_read_in_percent_and_is_neither_nothing_nor_everything() {
        assert_eq!(Share::from_percent(12.5), Some(Share(1250)));
        assert_eq!(Share(1250).to_string(), "12.5 %");
        for percent in [0.0, -1.0, 0.001, 99.999, 100.0, f64::NAN, f64::INFINITY] {
            assert_eq!(Share::from_percent(percent), None, "{percent}");
        }
    }
}
