//! Who gets new connections, as pure computation: what the kernel's array of a reuseport group looks
//! like, and the program that names members in it.
//!
//! The kernel keeps the members of a group in an array in the order of their listen(2) calls. A socket
//! that leaves is replaced by the last one (`__reuseport_detach_sock`, net/core/sock_reuseport.c). The
//! program that SO_ATTACH_REUSEPORT_CBPF attaches returns an index into that array.

pub mod load;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use libc::sock_filter;

use crate::ids::{MemberId, WorkerId};
use crate::kernel::bpf::op;
use crate::steering::load::Load;

/// What the kernel is to do with new connections for a member of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steer {
    /// The program names it.
    Named,
    /// The program names it for a share of the connections.
    Tried,
    /// The program doesn't name it, and what reaches it all the same is dropped in silence, so that the
    /// client's next attempt goes where the program then says.
    Held,
    /// The program doesn't name it, if it names anyone; a handshake that was sent to it before may go on.
    AsIs,
}

/// A part of all new connections, in 1/10,000.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share(pub u32);

impl Share {
    const WHOLE: u32 = 10_000;

    /// `None` for what is, rounded, nothing or everything.
    pub fn from_percent(percent: f64) -> Option<Self> {
        let share = (percent / 100.0 * f64::from(Self::WHOLE)).round();
        (share > 0.0 && share < f64::from(Self::WHOLE)).then_some(Self(share as u32))
    }

    /// How many of the 2^32 values of a random number are this share.
    fn of_random_numbers(self) -> u32 {
        ((u64::from(self.0) << 32) / u64::from(Self::WHOLE)) as u32
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} %", f64::from(self.0) * 100.0 / f64::from(Self::WHOLE))
    }
}

/// What a member is to the pool, as far as steering is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Borrowed by a worker that has yet to become ready.
    Starting,
    /// Borrowed by a ready worker that is to get connections.
    Ready,
    /// Borrowed by a ready worker of a generation that is tried with a share of the connections.
    Canary,
    /// Borrowed by a worker that was replaced a moment ago: what was sent to it before may still arrive.
    Draining,
    /// Borrowed by a worker that gets no more and may leave the group at any time.
    Leaving,
    /// Its worker died and will be replaced by one that inherits what is queued here.
    Reserved,
    /// Nobody's.
    Free,
}

/// Which workers get new connections: the fleet decides it, the pool carries it out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// All workers but those that start.
    pub roles: BTreeMap<WorkerId, Role>,
    /// What the workers whose role is [`Role::Canary`] get.
    pub share: Share,
    /// The generation whose Unix sockets have the paths.
    pub generation: u32,
}

impl Plan {
    /// A worker that the plan doesn't name was started after it was made.
    pub fn role(&self, worker: WorkerId) -> Role {
        self.roles.get(&worker).copied().unwrap_or(Role::Starting)
    }
}

/// Decides for each member of a group, given what each of them is.
///
/// Ready workers get everything, but for a share that is tried on others. When there is none, connections wait where
/// a replacement will take them up; when there is no such place, they are held off.
pub fn decide(standings: &[Role]) -> Vec<Steer> {
    let any = |standing| standings.contains(&standing);
    let served = any(Role::Ready) || any(Role::Canary);
    let awaited = any(Role::Reserved);
    let decide = |standing: &Role| match standing {
        Role::Canary if any(Role::Ready) => Steer::Tried,
        Role::Ready | Role::Canary => Steer::Named,
        Role::Reserved if !served => Steer::Named,
        // It listens where its successors don't, and would never be done otherwise.
        Role::Draining if !served && !awaited => Steer::Held,
        Role::Reserved | Role::Draining | Role::Leaving => Steer::AsIs,
        Role::Starting | Role::Free => Steer::Held,
    };
    standings.iter().map(decide).collect()
}

/// Those of some members that are best off: someone is named however badly all are.
pub fn best_off(members: &BTreeSet<MemberId>, load: impl Fn(MemberId) -> Load) -> BTreeSet<MemberId> {
    let best = members.iter().map(|id| load(*id)).min();
    members.iter().copied().filter(|id| Some(load(*id)) == best).collect()
}

/// The indices that a program chooses from, each list ascending.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Targets {
    pub named: Vec<u32>,
    pub tried: Vec<u32>,
    /// What `tried` gets, if there are both.
    pub share: Share,
}

/// How many free members a group lacks at the end of its array, where `last` is the last index that a program
/// may choose and `leaving` of the others may leave by themselves at any time.
///
/// Whoever leaves is replaced by the last member. With as many members behind the last named one as may
/// leave, none that is named ever moves, and the program stays right whenever they do.
pub fn spares_lacking(len: usize, last: Option<u32>, leaving: usize) -> usize {
    let behind = last.map_or(len, |last| len.saturating_sub(last as usize + 1));
    leaving.saturating_sub(behind)
}

/// The kernel's array of a group's members, as far as it can be known.
///
/// Usually each index is known to hold one member. When several were found to have left at once, nobody
/// can say in which order, and what moved where depends on it; then an index has several candidates, and
/// counts as named only when all of them are.
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
    /// Of n members k leave: the array is then n-k long, and a member below n-k that stays never moves,
    /// since it is never the last. A place below n-k that becomes free goes to one of those that stood
    /// at n-k or above.
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

    /// `member` began to listen and `others` left, and which came first can't be known.
    pub fn push_while_leaving(&mut self, member: MemberId, others: &BTreeSet<MemberId>) {
        let mut left_first = self.clone();
        left_first.leave(others);
        left_first.push(member);
        self.push(member);
        self.leave(others);
        for (place, other) in self.candidates.iter_mut().zip(left_first.candidates) {
            if *place != other {
                *place = Rc::new(place.union(&other).copied().collect());
            }
        }
    }

    /// The indices, ascending, that surely hold one of `named`.
    pub fn indices(&self, named: &BTreeSet<MemberId>) -> Vec<u32> {
        let places = (0..).zip(&self.candidates);
        places.filter(|(_, place)| place.is_subset(named)).map(|(i, _)| i).collect()
    }
}

/// The longest program that the kernel takes (linux/bpf_common.h).
const BPF_MAXINSNS: usize = 4096;

/// A program that chooses one of some indices at random, each of a list with the same chance, within O(log n)
/// instructions. For no index at all, one that leaves the choice to the kernel: a result out of range makes it
/// choose among all members by the connection's hash.
///
/// Random and not by the connection's hash: either balances, and a retransmitted SYN finds its request
/// socket by its addresses, before any listener is looked for. When the indices are so scattered that
/// the program would be too long for the kernel, those that fit are chosen from.
pub fn program(targets: &Targets) -> Vec<sock_filter> {
    let Targets { named, tried, share } = targets;
    let (named, tried) = match (named.is_empty(), tried.is_empty()) {
        (true, true) => return vec![op(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX)],
        (false, false) => (named, tried),
        (true, false) => return choose_one(tried, BPF_MAXINSNS),
        (false, true) => return choose_one(named, BPF_MAXINSNS),
    };
    let choose_tried = choose_one(tried, BPF_MAXINSNS / 2 - 2);
    let mut program = vec![op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, RANDOM)];
    jump_if_at_least(share.of_random_numbers(), choose_tried.len(), &mut program);
    program.extend(choose_tried);
    program.extend(choose_one(named, BPF_MAXINSNS / 2 - 2));
    program
}

/// Where a load finds a random number, another each time (SKF_AD_RANDOM, linux/filter.h).
const RANDOM: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM) as u32;

/// A program that returns one of `indices`, within so many instructions.
fn choose_one(indices: &[u32], longest: usize) -> Vec<sock_filter> {
    let mut runs = runs(indices);
    // Each run takes two instructions, each inner node of the tree above them at most two.
    runs.truncate((longest - 2) / 4);
    let total: u32 = runs.iter().map(|run| run.len).sum();
    let mut program = vec![
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, RANDOM),
        op(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, 0, 0, total),
    ];
    choose(&runs, &mut program);
    program
}

/// Appends a jump over `len` instructions, taken if the accumulator is at least `k`.
fn jump_if_at_least(k: u32, len: usize, program: &mut Vec<sock_filter>) {
    const JUMP: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    // A conditional jump reaches 255 instructions, an unconditional one any.
    match u8::try_from(len) {
        Ok(len) => program.push(op(JUMP, len, 0, k)),
        Err(_) => {
            program.push(op(JUMP, 0, 1, k));
            program.push(op(libc::BPF_JMP | libc::BPF_JA, 0, 0, len as u32));
        }
    }
}

/// Successive indices, and how many of the chosen ones come before them.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: u32,
    len: u32,
    before: u32,
}

fn runs(indices: &[u32]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (before, &index) in (0..).zip(indices) {
        match runs.last_mut() {
            Some(run) if run.start + run.len == index => run.len += 1,
            _ => runs.push(Run { start: index, len: 1, before }),
        }
    }
    runs
}

/// Appends a search tree: the accumulator holds which of the chosen indices it is to be, counted from
/// 0, and the program returns that index.
fn choose(runs: &[Run], program: &mut Vec<sock_filter>) {
    let Some((&first, rest)) = runs.split_first() else { return };
    if rest.is_empty() {
        // start >= before, since the indices ascend.
        program.push(op(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K, 0, 0, first.start - first.before));
        program.push(op(libc::BPF_RET | libc::BPF_A, 0, 0, 0));
        return;
    }
    let (low, high) = runs.split_at(runs.len() / 2);
    let mut lower = Vec::new();
    choose(low, &mut lower);
    jump_if_at_least(high[0].before, lower.len(), program);
    program.append(&mut lower);
    choose(high, program);
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

    fn named(indices: &[u32]) -> Targets {
        Targets { named: indices.to_vec(), ..Targets::default() }
    }

    fn run(program: &[sock_filter], random: u32) -> (u32, usize) {
        run_with(program, &[random])
    }

    /// Runs a steering program as the kernel would, with these random numbers.
    fn run_with(program: &[sock_filter], random: &[u32]) -> (u32, usize) {
        let mut random = random.iter().copied();
        let (mut a, mut pc, mut steps) = (0u32, 0usize, 0usize);
        loop {
            let op = program[pc];
            steps += 1;
            pc += 1;
            match u32::from(op.code) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    assert_eq!(op.k, RANDOM);
                    a = random.next().unwrap();
                }
                code if code == libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K => a %= op.k,
                code if code == libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K => a += op.k,
                code if code == libc::BPF_JMP | libc::BPF_JA => pc += op.k as usize,
                code if code == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => {
                    pc += usize::from(if a >= op.k { op.jt } else { op.jf });
                }
                code if code == libc::BPF_RET | libc::BPF_A => return (a, steps),
                code => panic!("unexpected instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn a_program_chooses_each_index_equally_often_and_no_other() {
        let scattered: Vec<u32> = (0..1000).map(|i| i * 2 + 1).collect();
        let sets: [&[u32]; 6] = [&[0], &[7], &[0, 1, 2, 3], &[4, 5, 6, 7], &[0, 3, 4, 9], &scattered];
        for indices in sets {
            let program = program(&named(indices));
            let chosen: Vec<u32> = (0..indices.len() as u32).map(|n| run(&program, n).0).collect();
            assert_eq!(chosen, indices);
            assert_eq!(run(&program, indices.len() as u32).0, indices[0]);
        }
    }

    #[test]
    fn a_program_for_a_thousand_scattered_members_is_short_enough_and_takes_few_steps() {
        let scattered: Vec<u32> = (0..1000).map(|i| i * 2).collect();
        let program = program(&named(&scattered));
        assert!(program.len() <= BPF_MAXINSNS, "{}", program.len());
        let most = (0..1000).map(|n| run(&program, n).1).max().unwrap();
        assert!(most <= 4 + 2 * 10, "{most} steps");
    }

    #[test]
    fn a_program_that_would_be_too_long_names_the_members_that_fit() {
        let scattered: Vec<u32> = (0..3000).map(|i| i * 2).collect();
        let program = program(&named(&scattered));
        assert!(program.len() <= BPF_MAXINSNS);
        assert!((0..5000).all(|n| scattered.contains(&run(&program, n).0)));
    }

    #[test]
    fn a_share_of_all_random_numbers_goes_to_those_that_are_tried() {
        let scattered: Vec<u32> = (0..3000).map(|i| i * 2).collect();
        let odd: Vec<u32> = scattered.iter().map(|index| index + 1).collect();
        let sets: [(&[u32], &[u32]); 4] =
            [(&[0, 1], &[2, 3]), (&[5], &[0, 7]), (&scattered, &[1]), (&odd, &scattered)];
        for (named, tried) in sets {
            for share in [1, 1000, 5000, 9999].map(Share) {
                let program = program(&Targets { named: named.to_vec(), tried: tried.to_vec(), share });
                assert!(program.len() <= BPF_MAXINSNS, "{}", program.len());
                let border = share.of_random_numbers();
                for second in 0..10 {
                    assert!(tried.contains(&run_with(&program, &[0, second]).0));
                    assert!(tried.contains(&run_with(&program, &[border - 1, second]).0));
                    assert!(named.contains(&run_with(&program, &[border, second]).0));
                    assert!(named.contains(&run_with(&program, &[u32::MAX, second]).0));
                }
                let expected = f64::from(share.0) / 10_000.0;
                assert!((f64::from(border) / 2f64.powi(32) - expected).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_share_is_read_in_percent_and_neither_nothing_nor_everything() {
        assert_eq!(Share::from_percent(12.5), Some(Share(1250)));
        assert_eq!(Share(1250).to_string(), "12.5 %");
        for percent in [0.0, -1.0, 0.001, 99.999, 100.0, f64::NAN, f64::INFINITY] {
            assert_eq!(Share::from_percent(percent), None, "{percent}");
        }
    }

    #[test]
    fn the_last_member_moves_to_the_place_of_one_that_leaves() {
        let mut order = order(&[0, 1, 2, 3]);
        order.leave(&ids(&[1]));
        assert_eq!(order.indices(&ids(&[2, 3])), [1, 2]);
        assert_eq!(order.indices(&ids(&[3])), [1]);
    }

    #[test]
    fn what_is_named_holds_in_every_order_in_which_several_may_have_left() {
        let mut order = order(&[0, 1, 2, 3, 4]);
        order.leave(&ids(&[0, 1]));
        // Either 4, 3, 2 or 3, 4, 2.
        assert_eq!(order.indices(&ids(&[2, 3, 4])), [0, 1, 2]);
        assert_eq!(order.indices(&ids(&[3, 4])), [0, 1]);
        assert_eq!(order.indices(&ids(&[2, 3])), [2]);
    }

    #[test]
    fn a_member_that_joined_while_another_left_is_named_only_where_it_surely_is() {
        let mut order = order(&[0, 1]);
        order.push_while_leaving(MemberId(2), &ids(&[0]));
        // Either 1, 2 (left first) or 2, 1 (joined first).
        assert_eq!(order.indices(&ids(&[1])), [0u32; 0]);
        assert_eq!(order.indices(&ids(&[1, 2])), [0, 1]);
    }

    proptest! {
        /// The kernel's array, simulated, always agrees with what is said to be known of it.
        #[test]
        fn an_index_never_holds_a_member_that_is_no_candidate(
            batches in vec((0usize..4, 0usize..4, any::<bool>(), any::<u64>()), 1..12)
        ) {
            let mut array: Vec<MemberId> = Vec::new();
            let mut order = Order::default();
            let mut next = 0;
            for (joins, leaves, at_once, seed) in batches {
                for _ in 0..joins {
                    array.push(MemberId(next));
                    order.push(MemberId(next));
                    next += 1;
                }
                let mut gone = BTreeSet::new();
                let joined_first = seed % 2 == 0;
                if at_once && joined_first {
                    array.push(MemberId(next));
                }
                let mut random = seed;
                for _ in 0..leaves.min(array.len()) {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let at = (random >> 33) as usize % array.len();
                    if array[at] != MemberId(next) {
                        gone.insert(array.swap_remove(at));
                    }
                }
                if at_once {
                    if !joined_first {
                        array.push(MemberId(next));
                    }
                    order.push_while_leaving(MemberId(next), &gone);
                    next += 1;
                } else {
                    order.leave(&gone);
                }
                prop_assert_eq!(order.candidates.len(), array.len());
                for (place, member) in order.candidates.iter().zip(&array) {
                    prop_assert!(place.contains(member), "{:?} not in {:?}", member, place);
                }
            }
        }
    }

    #[test]
    fn ready_workers_get_everything_and_without_one_connections_wait_for_a_replacement() {
        use Role::*;
        use Steer::*;
        assert_eq!(decide(&[Ready, Reserved, Draining, Starting, Leaving]), [Named, AsIs, AsIs, Held, AsIs]);
        assert_eq!(decide(&[Ready, Canary, Reserved]), [Named, Tried, AsIs]);
        assert_eq!(
            decide(&[Canary, Reserved, Draining]),
            [Named, AsIs, AsIs],
            "it listens where the old don't"
        );
        assert_eq!(decide(&[Starting, Reserved, Draining, Free]), [Held, Named, AsIs, Held]);
        assert_eq!(decide(&[Starting, Draining, Leaving, Free]), [Held, Held, AsIs, Held]);
    }

    proptest! {
        #[test]
        fn someone_is_named_and_nobody_who_is_worse_off_than_another(loads in vec(0u8..3, 1..12)) {
            let load = |id: MemberId| [Load::Free, Load::Busy, Load::Stuck][usize::from(loads[id.0 as usize])];
            let all: BTreeSet<MemberId> = (0..loads.len() as u32).map(MemberId).collect();
            let best = best_off(&all, load);
            prop_assert!(!best.is_empty() && best.is_subset(&all));
            prop_assert!(best.iter().all(|id| all.iter().all(|other| load(*id) <= load(*other))));
            prop_assert!(all.difference(&best).all(|id| best.iter().all(|other| load(*id) > load(*other))));
        }

        /// In whatever order members leave that were counted as leaving, those that are named stay put.
        #[test]
        fn with_enough_spares_no_named_member_ever_moves(
            kinds in vec(0u8..3, 1..20), turns in vec(any::<prop::sample::Index>(), 20)
        ) {
            // 0: named, 1: leaving, 2: free
            let of_kind = |kind| (0u32..).zip(&kinds).filter(move |(_, k)| **k == kind).map(|(i, _)| i);
            let named: Vec<u32> = of_kind(0).collect();
            let mut leaving: Vec<u32> = of_kind(1).collect();
            let mut array: Vec<u32> = (0..kinds.len() as u32).collect();
            let lacking = spares_lacking(array.len(), named.last().copied(), leaving.len());
            array.extend((0..lacking as u32).map(|spare| 1000 + spare));
            for turn in turns {
                if leaving.is_empty() {
                    break;
                }
                let gone = leaving.swap_remove(turn.index(leaving.len()));
                let at = array.iter().position(|member| *member == gone).unwrap();
                array.swap_remove(at);
                prop_assert!(named.iter().all(|index| array[*index as usize] == *index));
            }
        }
    }
}
