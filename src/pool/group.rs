//! The sockets of one address, which form one reuseport group of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Instant;

use log::{debug, warn};

use crate::address::Address;
use crate::ids::{Borrower, MemberId, SlotId};
use crate::kernel::sockdiag::Listener;
use crate::kernel::sys;
use crate::pool::closed::Standing;
use crate::pool::foreign::{self, ForeignMembers};
use crate::pool::member::{Member, Members, Owner};
use crate::steering::by_client::{Key, Origin};
use crate::steering::load::{Balancing, Load, least_loaded};
use crate::steering::order::Order;
use crate::steering::program::{Aim, Choice, MAX_AIMS, Targets, program};
use crate::steering::{self, Decision, Plan, Role};

#[derive(Debug)]
pub struct Group {
    address: Address,
    /// Of the first worker that has bound it.
    pub owner: Owner,
    /// Our members, also those that don't listen yet.
    ids: BTreeSet<MemberId>,
    foreign: ForeignMembers,
    /// The kernel's array.
    order: Order,
    /// What the attached program chooses from, if that is known.
    targets: Option<Targets>,
    /// The sources of connections of our own that are being opened, and the index to which each of them goes.
    aims: BTreeMap<SocketAddr, AimedAt>,
    /// Whether the attached program may know connections of our own.
    has_aims: bool,
    balancing: Balancing,
}

/// Where a connection of our own goes.
#[derive(Debug, Clone, Copy)]
enum AimedAt {
    Member(MemberId),
    Index(u32),
}

impl Group {
    pub fn new(address: Address, owner: Owner, balancing: Balancing) -> Self {
        Self {
            address,
            owner,
            ids: BTreeSet::new(),
            foreign: ForeignMembers::default(),
            order: Order::default(),
            targets: None,
            aims: BTreeMap::new(),
            has_aims: false,
            balancing,
        }
    }

    pub fn ids(&self) -> &BTreeSet<MemberId> {
        &self.ids
    }

    /// Adds a member that doesn't listen yet.
    pub fn add(&mut self, id: MemberId) {
        self.ids.insert(id);
    }

    pub fn remove(&mut self, id: MemberId) {
        self.ids.remove(&id);
    }

    /// Whether nobody borrows a member of it and no successor is awaited.
    pub fn is_free(&self, members: &Members) -> bool {
        self.ids.iter().all(|id| members[*id].is_free())
    }

    /// Members for the borrower, the best first: those with which its predecessor in slot and generation died, and free
    /// ones.
    pub fn spares(&self, borrower: Borrower, members: &Members) -> Vec<MemberId> {
        let is_reserved = |id: &MemberId| members[*id].is_reserved_for(borrower.slot, borrower.generation);
        let is_free = |id: &MemberId| members[*id].is_free();
        let ids = || self.ids.iter().copied();
        ids().filter(is_reserved).chain(ids().filter(is_free)).collect()
    }

    /// `members` have left the kernel's array, in an unknown order.
    pub fn left(&mut self, members: &BTreeSet<MemberId>) {
        if !members.is_empty() {
            self.targets = None; // one may have been the last member, with which the kernel drops the program
        }
        self.order.leave(members);
    }

    /// `member` began to listen.
    pub fn joined(&mut self, member: MemberId) {
        self.order.push(member);
    }

    /// Whether a member may be in the kernel's array.
    pub fn has_place(&self, member: MemberId) -> bool {
        self.order.places(member).next().is_some()
    }

    /// Whether to find out which foreign listeners are in the group before a member begins to listen: their order in
    /// the kernel's array is that of their calls of listen(2).
    pub fn is_foreign_check_due(&self, now: Instant) -> bool {
        self.foreign.is_check_due(now)
    }

    /// Takes the foreign listeners that overlap with the address. Those that are in the group are never
    /// targets; each of them is reported once.
    pub fn update_foreign(&mut self, found: Vec<Listener>, new_id: impl FnMut() -> MemberId) {
        let in_group =
            |listener: &Listener| listener.address == self.address && listener.uid == self.owner.uid;
        let changes = self.foreign.update(found.into_iter().filter(in_group), new_id, Instant::now());
        self.order.leave(&changes.left);
        for (id, listener) in changes.joined {
            let (address, who) = (self.address, foreign::describe(&listener));
            warn!("{address} is shared by another program, which gets no connections: {who}");
            self.order.push(id);
        }
    }

    /// Carries out what [`steering::decide`] says by this plan, among those with the first rank. The kernel applies it to all new connections of the
    /// address at once. Returns how many spare members the group lacks: see [`Order::spares_lacking`].
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn steer(
        &mut self,
        plan: &Plan,
        rank: impl Fn(MemberId) -> (Standing, Load, bool),
        members: &mut Members,
    ) -> io::Result<usize> {
        let decisions = self.decisions(plan, members);
        let all = |decision| {
            let of_it = decisions.iter().filter(move |(_, _, other)| *other == decision);
            of_it.map(|(id, ..)| *id).collect::<BTreeSet<MemberId>>()
        };
        let (mut primary, canary) = (all(Decision::Target), all(Decision::Canary));
        for id in primary.union(&canary) {
            members.get_mut(*id).map_or(Ok(()), Member::resume)?;
        }
        let sinks = all(Decision::Sink);
        sinks.iter().try_for_each(|id| members.get_mut(*id).map_or(Ok(()), Member::hold))?;
        // There are no targets then. The other sinks are its spares.
        primary.extend(self.order.first_of(&sinks));
        let (primary_indices, canary_indices) = (self.order.indices(&primary), self.order.indices(&canary));
        let kept_indices = self.order.indices(&kept(&decisions));
        let last = [&primary_indices, &kept_indices].into_iter().filter_map(|all| all.last()).max().copied();
        let weighted = |indices: &[u32]| self.weighted(indices, |id| members[id].serving(plan));
        let all_indices = Targets {
            primary: weighted(&primary_indices),
            canary: weighted(&canary_indices),
            share: plan.share,
            choice: self.choice([&primary, &canary], members),
            aims: self.aims(),
        };
        // Without a target the program stays as it is, unless it knows connections of our own.
        let any = decisions.iter().map(|(id, ..)| *id).find(|id| primary.is_empty() || primary.contains(id));
        let is_due = !primary.is_empty() || !all_indices.aims.is_empty() || self.has_aims;
        if let Some(any) = any.filter(|_| is_due) {
            let least = |members: &BTreeSet<MemberId>, all: Vec<u32>| {
                let least = least_loaded(members, &rank);
                if least.len() == members.len() {
                    return all;
                }
                let indices = weighted(&self.order.indices(&least));
                if indices.is_empty() { all } else { indices }
            };
            let mut targets = all_indices;
            targets.primary = least(&primary, targets.primary);
            targets.canary = least(&canary, targets.canary);
            if targets.primary.is_empty() {
                targets.canary.clear(); // no index of a primary is known, and then the canary's share would be everything
            }
            self.attach(&members[any], targets)?;
        }
        for id in all(Decision::Hold) {
            members.get_mut(id).map_or(Ok(()), Member::hold)?;
        }
        Ok(self.order.spares_lacking(last, leaving(&decisions, |id| rank(id).0 == Standing::Closed)))
    }

    /// These indices, each as often as workers serve its member's queue.
    fn weighted(&self, indices: &[u32], serving: impl Fn(MemberId) -> usize) -> Vec<u32> {
        let weight = |index: &u32| self.order.member(*index).map_or(1, |id| serving(id).max(1));
        let weights: Vec<usize> = indices.iter().map(weight).collect();
        if weights.iter().all(|weight| *weight == weights[0]) {
            return indices.to_vec();
        }
        indices.iter().zip(weights).flat_map(|(index, weight)| vec![*index; weight]).collect()
    }

    /// How one of the primary members is chosen, and of the canary's. A datagram goes where others of its flow went: only
    /// there is it known what they said.
    fn choice(&self, lists: [&BTreeSet<MemberId>; 2], members: &Members) -> Choice {
        let of = match self.balancing {
            Balancing::Client => Origin::Client,
            _ if self.address.is_udp() => Origin::Flow,
            _ => return Choice::Random,
        };
        let mut keys: BTreeMap<u32, Key> = BTreeMap::new();
        for list in lists {
            let mut numbers: BTreeMap<SlotId, u32> = BTreeMap::new();
            let of_slot = list.iter().filter_map(|id| Some((*id, members.get(*id)?.slot()?)));
            let by_id = of_slot.map(|(id, slot)| {
                let next = numbers.entry(slot).or_default();
                *next += 1;
                (id, Key { slot, number: *next - 1 })
            });
            keys.extend(self.order.assign(by_id.collect()));
        }
        Choice::By(of, keys)
    }

    /// Has a connection of our own, from `source`, go to a member from the next [`Group::steer`] on.
    ///
    /// # Errors
    /// If its index is unknown, and WouldBlock if too many such connections are being opened.
    pub fn aim(&mut self, source: SocketAddr, member: MemberId) -> io::Result<()> {
        if self.order.index(member).is_none() {
            return Err(io::Error::other("its place among the listeners is unknown"));
        }
        if self.aims.len() >= MAX_AIMS {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.aims.insert(source, AimedAt::Member(member));
        Ok(())
    }

    /// The same for whichever member has this index.
    pub fn aim_at_index(&mut self, source: SocketAddr, index: u32) {
        self.aims.insert(source, AimedAt::Index(index));
    }

    /// A connection of our own is open, or given up.
    pub fn forget_aim(&mut self, source: SocketAddr) {
        self.aims.remove(&source);
    }

    /// Whether it is known where a member stands in the kernel's array.
    pub fn knows_place(&self, member: MemberId) -> bool {
        self.order.index(member).is_some()
    }

    /// The indices at which a member may stand, each with all members that may stand there.
    pub fn places(&self, member: MemberId) -> impl Iterator<Item = (u32, &BTreeSet<MemberId>)> {
        self.order.places(member)
    }

    /// It was found out which member has this index.
    pub fn found(&mut self, index: u32, member: MemberId) {
        self.order.found(index, member);
    }

    fn aims(&self) -> Vec<Aim> {
        let index = |at| match at {
            AimedAt::Member(member) => self.order.index(member),
            AimedAt::Index(index) => Some(index),
        };
        self.aims
            .iter()
            .filter_map(|(source, at)| Some(Aim { source: *source, index: index(*at)? }))
            .collect()
    }

    /// Whether the group needs a member that nobody borrows, to send new connections to.
    pub fn lacks_sink(&self, plan: &Plan, members: &Members) -> bool {
        if !plan.roles.values().any(|role| role.is_leaving()) {
            return false; // as nearly always
        }
        let decisions = self.decisions(plan, members);
        decisions.iter().any(|(_, role, _)| role.is_leaving())
            && !decisions.iter().any(|(_, _, decision)| matches!(decision, Decision::Target | Decision::Sink))
    }

    /// The members that listen, with their roles and what [`steering::decide`] says.
    fn decisions(&self, plan: &Plan, members: &Members) -> Vec<(MemberId, Role, Decision)> {
        let ids: Vec<MemberId> = self.ids.iter().copied().filter(|id| members[*id].listening).collect();
        let roles: Vec<Role> = ids.iter().map(|id| members[*id].role(plan)).collect();
        let decisions = steering::decide(&roles);
        ids.into_iter().zip(roles).zip(decisions).map(|((id, role), decision)| (id, role, decision)).collect()
    }

    /// Attaches a program to the group of `member`, unless the attached one chooses from the same targets.
    fn attach(&mut self, member: &Member, targets: Targets) -> io::Result<()> {
        if self.targets.as_ref() == Some(&targets) {
            return Ok(());
        }
        sys::attach_reuseport_cbpf(member.socket.as_fd(), &program(&targets))?;
        self.has_aims = !targets.aims.is_empty();
        let Targets { primary, canary, share, .. } = &targets;
        let (address, of) = (self.address, self.order.len());
        let last = self.targets.as_ref().map(|last| (&last.primary, &last.canary, last.share));
        match canary.is_empty() {
            // It was attached for a connection of our own.
            _ if primary.is_empty() || last == Some((primary, canary, *share)) => {}
            true => debug!("{address}: new connections go to {primary:?} of {of}"),
            false => debug!("{address}: new connections go to {primary:?}, {share} to {canary:?} of {of}"),
        }
        self.targets = Some(targets);
        Ok(())
    }
}

/// How many members may leave by themselves at any time, or are about to be closed.
fn leaving(decisions: &[(MemberId, Role, Decision)], is_closed: impl Fn(MemberId) -> bool) -> usize {
    decisions.iter().filter(|(id, role, _)| role.is_leaving() || is_closed(*id)).count()
}

/// The members that somebody borrows, or will, and that don't leave.
fn kept(decisions: &[(MemberId, Role, Decision)]) -> BTreeSet<MemberId> {
    let kept = decisions.iter().filter(|(_, role, _)| *role != Role::Free && !role.is_leaving());
    kept.map(|(id, ..)| *id).collect()
}
