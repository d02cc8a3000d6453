//! The kernel's array of the members of a reuseport group.
//!
//! The kernel keeps the members of a group in an array, in the order of their listen(2) calls. When a socket leaves,
//! the last one takes its place (`__reuseport_detach_sock`, net/core/sock_reuseport.c). The program that
//! SO_ATTACH_REUSEPORT_CBPF attaches returns an index into that array.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::ids::MemberId;

/// What is known of the kernel's array of a group.
///
/// Usually each index has one candidate: the member that stands there. When several members were found to have left
/// at once, the order in which they left is unknown, and so is what moved where. Then an index has several
/// candidates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Order {
    candidates: Vec<Rc<BTreeSet<MemberId>>>,
}

impl Order {
    /// How many members there are.
    pub fn len(&self) -> usize {
        self.candidates.len()
    }

    /// `member` has begun to listen.
    pub fn push(&mut self, member: MemberId) {
        self.candidates.push(Rc::new(BTreeSet::from([member])));
    }

    /// All of `members` have left, in an unknown order.
    ///
    /// When k of n members leave, the array is n-k long. A member below index n-k that stays never moves, since it
    /// is never the last. A place below n-k that becomes free goes to a member that stood at n-k or above.
    pub fn leave(&mut self, members: &BTreeSet<MemberId>) {
        let may_leave = |place: &BTreeSet<MemberId>| !place.is_disjoint(members);
        let left = self.candidates.len().saturating_sub(members.len());
        let moving: BTreeSet<MemberId> = (0..)
            .zip(&self.candidates)
            .filter(|(i, place)| *i >= left || may_leave(place))
            .flat_map(|(_, place)| place.iter().copied())
            .filter(|member| !members.contains(member))
            .collect();
        let moving = Rc::new(moving);
        self.candidates.truncate(left);
        for place in self.candidates.iter_mut().filter(|place| may_leave(place)) {
            *place = Rc::clone(&moving);
        }
    }

    /// The indices, ascending, that hold one of `members` whatever the unknown order was: all their candidates are
    /// among them.
    pub fn indices(&self, members: &BTreeSet<MemberId>) -> Vec<u32> {
        let places = (0..).zip(&self.candidates);
        places.filter(|(_, place)| place.is_subset(members)).map(|(i, _)| i).collect()
    }

    /// What belongs to each of these members, by its index. Where some indices are unknown, what belongs to these members is
    /// assigned to the indices at which they stand, in any order.
    pub fn assign<T>(&self, mut of_members: BTreeMap<MemberId, T>) -> BTreeMap<u32, T> {
        let indices = self.indices(&of_members.keys().copied().collect());
        let mut assigned = BTreeMap::new();
        for index in &indices {
            let known = self.member(*index).and_then(|id| of_members.remove(&id));
            assigned.extend(known.map(|it| (*index, it)));
        }
        let unknown: Vec<u32> = indices.into_iter().filter(|index| !assigned.contains_key(index)).collect();
        assigned.extend(unknown.into_iter().zip(of_members.into_values()));
        assigned
    }

    /// The index of this member; `None` if it is unknown.
    pub fn index(&self, member: MemberId) -> Option<u32> {
        self.indices(&BTreeSet::from([member])).first().copied()
    }

    /// The member that has this index, if that is known.
    pub fn member(&self, index: u32) -> Option<MemberId> {
        let place = self.candidates.get(index as usize).filter(|place| place.len() == 1)?;
        place.first().copied()
    }

    /// Which of `members` has the lowest index that is known.
    pub fn first_of(&self, members: &BTreeSet<MemberId>) -> Option<MemberId> {
        let known = self.candidates.iter().filter(|place| place.len() == 1);
        known.filter_map(|place| place.first().copied()).find(|member| members.contains(member))
    }

    /// The indices at which a member may stand, each with all members that may stand there.
    pub fn places(&self, member: MemberId) -> impl Iterator<Item = (u32, &BTreeSet<MemberId>)> {
        let places = (0..).zip(self.candidates.iter().map(Rc::as_ref));
        places.filter(move |(_, place)| place.contains(&member))
    }

    /// It was found out which member has this index.
    pub fn found(&mut self, index: u32, member: MemberId) {
        for (place, candidates) in (0..).zip(&mut self.candidates) {
            if place == index {
                *candidates = Rc::new(BTreeSet::from([member]));
            } else if candidates.contains(&member) {
                Rc::make_mut(candidates).remove(&member);
            }
        }
    }

    /// How many free members the group lacks at the end of its array, if `last` is the last index that a program may
    /// choose, and `leaving` of the other members may leave by themselves at any time.
    ///
    /// The last member takes the place of one that leaves. If there are as many members behind the last target as
    /// may leave, no target ever moves, and the program stays right whenever they leave.
    pub fn spares_lacking(&self, last: Option<u32>, leaving: usize) -> usize {
        let behind = last.map_or(self.len(), |last| self.len().saturating_sub(last as usize + 1));
        leaving.saturating_sub(behind)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn ids(numbers: &[u32]) -> BTreeSet<MemberId> {
        numbers.iter().map(|n| MemberId(*n)).collect()
    }

    fn order(numbers: &[u32]) -> Order {
        let mut order = Order::default();
        numbers.iter().for_each(|n| order.push(MemberId(*n)));
        order
    }

    #[test]
    fn the_last_member_takes_the_place_of_one_that_leaves() {
        let mut order = order(&[0, 1, 2, 3]);
        order.leave(&ids(&[1]));
        assert_eq!(order.indices(&ids(&[2, 3])), [1, 2]);
        assert_eq!(order.indices(&ids(&[3])), [1]);
    }

    #[test]
    fn an_index_is_known_if_it_holds_for_every_order_in_which_members_may_have_left() {
        let mut order = order(&[0, 1, 2, 3, 4]);
        order.leave(&ids(&[0, 1]));
        // Either 4, 3, 2 or 3, 4, 2.
        assert_eq!(order.indices(&ids(&[2, 3, 4])), [0, 1, 2]);
        assert_eq!(order.indices(&ids(&[3, 4])), [0, 1]);
        assert_eq!(order.indices(&ids(&[2, 3])), [2]);
    }

    #[test]
    fn what_belongs_to_members_is_assigned_to_their_indices_also_where_these_are_unknown() {
        let mut order = order(&[0, 1, 2, 3, 4]);
        let of = |numbers: &[u32]| numbers.iter().map(|n| (MemberId(*n), n * 10)).collect::<BTreeMap<_, _>>();
        let assign =
            |order: &Order, numbers: &[u32]| order.assign(of(numbers)).into_iter().collect::<Vec<_>>();
        assert_eq!(assign(&order, &[4, 1]), [(1, 10), (4, 40)]);
        order.leave(&ids(&[0, 1]));
        assert_eq!(assign(&order, &[2, 3, 4]), [(0, 30), (1, 40), (2, 20)], "3 or 4 stands at 0");
        assert_eq!(assign(&order, &[2, 3]), [(2, 20)]);
        assert_eq!(assign(&order, &[2, 3, 9]), [(2, 20)], "9 is in no group");
    }

    #[test]
    fn one_member_that_is_found_tells_where_the_others_stand() {
        let mut order = order(&[0, 1, 2, 3, 4]);
        order.leave(&ids(&[0, 1]));
        assert_eq!([2, 3, 4].map(|n| order.index(MemberId(n))), [Some(2), None, None]);
        assert_eq!((order.first_of(&ids(&[2, 3, 4])), order.first_of(&ids(&[3]))), (Some(MemberId(2)), None));
        assert!(order.places(MemberId(3)).eq([(0, &ids(&[3, 4])), (1, &ids(&[3, 4]))]));
        order.found(0, MemberId(4));
        assert_eq!([2, 3, 4].map(|n| order.index(MemberId(n))), [Some(2), Some(1), Some(0)]);
        assert_eq!(order.first_of(&ids(&[2, 3])), Some(MemberId(3)));
    }

    #[test]
    fn a_group_lacks_spares_if_fewer_members_stand_behind_its_last_target_than_may_leave() {
        let order = order(&[0, 1, 2, 3]);
        assert_eq!(order.len(), 4);
        let cases =
            [(Some(3), 0, 0), (Some(3), 2, 2), (Some(1), 2, 0), (Some(1), 3, 1), (None, 4, 0), (None, 6, 2)];
        for (last, leaving, lacking) in cases {
            assert_eq!(order.spares_lacking(last, leaving), lacking, "{last:?} {leaving}");
        }
    }

    proptest! {
        /// Simulates the kernel's array, and a member that joins and leaves again while others leave, until it joins while nobody
        /// leaves.
        #[test]
        fn each_member_of_the_array_is_a_candidate_for_its_index(
            batches in vec((0usize..4, vec(any::<(bool, prop::sample::Index)>(), 0..4), any::<bool>()), 1..12)
        ) {
            let mut array: Vec<MemberId> = Vec::new();
            let mut order = Order::default();
            let mut new_ids = (0..).map(MemberId);
            for (joins, leaves, is_joining) in batches {
                for new in new_ids.by_ref().take(joins) {
                    array.push(new);
                    order.push(new);
                }
                let newcomer = new_ids.next().filter(|_| is_joining);
                let leave = |array: &mut Vec<MemberId>, member| {
                    let at = array.iter().position(|other| *other == member);
                    at.map(|at| array.swap_remove(at)).is_some()
                };
                let mut gone = BTreeSet::new();
                for (is_newcomers_turn, of) in leaves {
                    let newcomers = newcomer.filter(|_| is_newcomers_turn);
                    if newcomers.is_some_and(|newcomer| !leave(&mut array, newcomer)) {
                        array.extend(newcomers);
                    }
                    let others: Vec<MemberId> =
                        array.iter().copied().filter(|other| Some(*other) != newcomer).collect();
                    if !others.is_empty() {
                        let one = *of.get(&others);
                        leave(&mut array, one);
                        gone.insert(one);
                    }
                }
                if let Some(newcomer) = newcomer {
                    leave(&mut array, newcomer);
                    array.push(newcomer);
                    order.push(newcomer);
                    gone.insert(newcomer);
                }
                order.leave(&gone);
                newcomer.into_iter().for_each(|newcomer| order.push(newcomer));
                prop_assert_eq!(order.candidates.len(), array.len());
                for (place, member) in order.candidates.iter().zip(&array) {
                    prop_assert!(place.contains(member), "{:?} not in {:?}", member, place);
                }
                let places: Vec<u32> = newcomer.iter().filter_map(|newcomer| order.index(*newcomer)).collect();
                prop_assert_eq!(places.len(), usize::from(is_joining), "its own place is known");
            }
        }

        /// Whatever the order in which the members leave that were counted as leaving, the targets stay where they are.
        #[test]
        fn with_enough_spares_no_target_ever_moves(
            kinds in vec(0u8..3, 1..20), turns in vec(any::<prop::sample::Index>(), 20)
        ) {
            // 0: target, 1: leaving, 2: free
            let of_kind = |kind| (0u32..).zip(&kinds).filter(move |(_, k)| **k == kind).map(|(i, _)| i);
            let targets: Vec<u32> = of_kind(0).collect();
            let mut leaving: Vec<u32> = of_kind(1).collect();
            let mut array: Vec<u32> = (0..kinds.len() as u32).collect();
            let lacking = order(&array).spares_lacking(targets.last().copied(), leaving.len());
            array.extend((0..lacking as u32).map(|spare| 1000 + spare));
            for turn in turns {
                if leaving.is_empty() {
                    break;
                }
                let gone = leaving.swap_remove(turn.index(leaving.len()));
                let at = array.iter().position(|member| *member == gone).unwrap();
                array.swap_remove(at);
                prop_assert!(targets.iter().all(|index| array[*index as usize] == *index));
            }
        }
    }
}
