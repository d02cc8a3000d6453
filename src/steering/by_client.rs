//! Instructions that choose a member by the client's address, so that a client always reaches the same worker; or by its
//! port as well, so that a flow of datagrams does.
//!
//! Rendezvous hashing (Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998): each target has a
//! score, which follows from the client's address and the target's key, and the greatest score wins. When a target goes,
//! only its own clients move. When one comes, it takes its share of them from all others, and nobody else moves.

use std::collections::BTreeMap;

use libc::sock_filter;

use super::program::ip_header;
use crate::ids::SlotId;
use crate::kernel::bpf::{
    jump, jump_at_least, jump_greater_than_index, load, load_byte, load_constant, load_half,
    load_half_behind, load_header_len, load_memory, multiply, ret_accumulator, shift_right, store, to_index,
    xor, xor_index,
};

/// What a target is for its clients. Another worker that takes its place has the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub slot: SlotId,
    /// Which one it is of the sockets that the worker has at the address.
    pub number: u32,
}

/// The words of the program's memory: the hash of where the packet comes from, and the index with the greatest score so far.
const HASH: u32 = 0;
const BEST: u32 = 1;

/// The constants of murmur3's finalizer, which changes each bit of the result with probability 1/2 when one bit of the input
/// changes.
const FACTORS: [u32; 2] = [0x85eb_ca6b, 0xc2b2_ae35];
/// By how much it shifts to the right: before, between and after the multiplications.
const SHIFTS: [u32; 3] = [16, 13, 16];

/// How many instructions each target takes, at most.
const LEN_OF_TARGET: usize = 7;

/// What goes to one target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// All packets from an address.
    Client,
    /// All packets from a port of an address.
    Flow,
}

/// Instructions that store the hash of where the packet comes from. The address stands where it does whichever options or
/// extension headers follow. The port stands behind IPv4's options. Behind extension headers of IPv6 something else is taken for
/// it, which is nearly always the same for all packets of a flow.
pub fn hash(of: Origin) -> Vec<sock_filter> {
    const V6: u32 = 0x60;
    let mut of_v4 = vec![load_header_len(ip_header(0)), load_half_behind(ip_header(0))];
    let mut of_v6 = vec![load_half(ip_header(40))];
    for (code, address) in [(&mut of_v4, 12), (&mut of_v6, 8)] {
        match of {
            Origin::Client => *code = vec![load(ip_header(address))],
            Origin::Flow => code.extend(mixed_with(address)),
        }
    }
    for offset in [12, 16, 20] {
        of_v6.extend(mixed_with(offset));
    }
    of_v4.push(jump(of_v6.len() as u32));
    let mut code = vec![load_byte(ip_header(0)), jump_at_least(V6, of_v4.len() as u8, 0)];
    code.extend(of_v4);
    code.extend(of_v6);
    for (shift, factor) in SHIFTS.into_iter().zip(FACTORS) {
        code.extend(xor_shifted(shift));
        code.push(multiply(factor));
    }
    code.extend(xor_shifted(SHIFTS[2]));
    code.push(store(HASH));
    code
}

/// Mixes the accumulator, and XORs it with a word of the IP header.
fn mixed_with(offset: u32) -> Vec<sock_filter> {
    let mut code = vec![multiply(FACTORS[0])];
    code.extend(xor_shifted(16));
    code.extend([to_index(), load(ip_header(offset)), xor_index()]);
    code
}

/// Instructions that make a number of the hash, by which a client belongs to the canary's share or doesn't.
pub fn number_for_canary() -> Vec<sock_filter> {
    score(u32::MAX).to_vec()
}

/// A program of at most `max_len` instructions that returns the index with the greatest score, and of equal ones the one
/// with the least key. Needs the hash. What doesn't fit is left out.
pub fn choose_one(indices: &[u32], keys: &BTreeMap<u32, Key>, max_len: usize) -> Vec<sock_filter> {
    let key = |index: u32| keys.get(&index).copied().unwrap_or_default();
    let mut targets: Vec<(Key, u32)> = indices.iter().map(|index| (key(*index), *index)).collect();
    targets.sort_unstable();
    targets.truncate((max_len - 2) / LEN_OF_TARGET);
    let mut code = Vec::new();
    for (key, index) in targets {
        let is_first = code.is_empty();
        code.extend(score(key.slot.0 << 16 | key.number));
        if !is_first {
            code.push(jump_greater_than_index(0, 3));
        }
        code.extend([to_index(), load_constant(index), store(BEST)]);
    }
    code.extend([load_memory(BEST), ret_accumulator()]);
    code
}

/// A score is as good as random if no two targets have the same multiplier: with one for all, the shares of 16 targets differ
/// by 5 %, and within a canary's share, of 500, by a third.
fn score(key: u32) -> [sock_filter; 3] {
    let seed = mix(key);
    let multiplier = mix(seed.wrapping_add(1)) | 1; // an odd one loses no bit
    [load_memory(HASH), xor(seed), multiply(multiplier)]
}

/// XORs the accumulator with itself, shifted to the right.
fn xor_shifted(by: u32) -> [sock_filter; 3] {
    [to_index(), shift_right(by), xor_index()]
}

/// As the program does it.
fn mix(number: u32) -> u32 {
    let steps = SHIFTS.into_iter().zip(FACTORS.into_iter().chain([1]));
    steps.fold(number, |number, (shift, factor)| (number ^ number >> shift).wrapping_mul(factor))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::bpf;
    use crate::steering::Share;
    use crate::steering::program::{Choice, Targets, program};

    /// Workers, each with one socket, whose index is far from its slot.
    fn targets(slots: impl IntoIterator<Item = u32>) -> Targets {
        let keys = slots.into_iter().map(|slot| (index(slot), Key { slot: SlotId(slot), number: 0 }));
        let keys: BTreeMap<u32, Key> = keys.collect();
        Targets {
            primary: keys.keys().copied().collect(),
            choice: Choice::By(Origin::Client, keys),
            ..Targets::default()
        }
    }

    fn index(slot: u32) -> u32 {
        (slot * 37 + 11) % 4099
    }

    /// The same that are chosen by flow.
    fn by_flow(targets: Targets) -> Targets {
        let Choice::By(_, keys) = targets.choice else { unreachable!() };
        Targets { choice: Choice::By(Origin::Flow, keys), ..targets }
    }

    /// What the program returns for a packet from this port, with so many bytes of IPv4 options.
    fn run_flow(program: &[sock_filter], flow: SocketAddr, options: usize) -> u32 {
        let mut packet = match flow.ip() {
            IpAddr::V4(ip) => {
                let mut header = vec![0x5a; 20 + options];
                header[0] = 0x40 | (header.len() / 4) as u8;
                header[12..16].copy_from_slice(&ip.octets());
                header
            }
            IpAddr::V6(ip) => {
                let mut header = vec![0x60; 40];
                header[8..24].copy_from_slice(&ip.octets());
                header
            }
        };
        packet.extend(flow.port().to_be_bytes());
        let load = |offset: u32, size: usize| {
            let at = (offset - 0xfff0_0000) as usize;
            packet[at..at + size].iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
        };
        bpf::run(program, load).0
    }

    /// What the program returns for a packet from this address.
    fn run(program: &[sock_filter], client: IpAddr) -> u32 {
        let (version, at, octets) = match client {
            IpAddr::V4(ip) => (0x4f, 12, ip.octets().to_vec()), // with options
            IpAddr::V6(ip) => (0x6f, 8, ip.octets().to_vec()),
        };
        let load = |offset: u32, size: usize| {
            let offset = (offset - 0xfff0_0000) as usize; // SKF_NET_OFF is -0x100000
            if (offset, size) == (0, 1) {
                return version;
            }
            octets[offset - at..offset - at + size]
                .iter()
                .fold(0, |number, byte| number << 8 | u32::from(*byte))
        };
        bpf::run(program, load).0
    }

    /// As many addresses as there usually are of clients of one kind.
    fn kinds_of_clients() -> Vec<(&'static str, Vec<IpAddr>)> {
        let v4 = |from: [u8; 4], count: u32, step: u32| {
            let from = u32::from(Ipv4Addr::from(from));
            (0..count).map(|n| Ipv4Addr::from(from + n * step).into()).collect()
        };
        let v6 = |shift: u32| {
            let from = u128::from("2001:db8::1".parse::<Ipv6Addr>().unwrap());
            (0..10_000).map(|n: u128| Ipv6Addr::from(from + (n << shift)).into()).collect()
        };
        vec![
            ("a /16", v4([10, 1, 0, 0], 10_000, 1)),
            ("a /24", v4([192, 168, 7, 0], 256, 1)),
            ("hosts .1 of many networks", v4([10, 0, 0, 1], 10_000, 256)),
            ("an IPv6 /64", v6(0)),
            ("IPv6 addresses of many /64", v6(64)),
            ("IPv6 addresses of many /48", v6(80)),
        ]
    }

    /// How many clients each index gets.
    fn counts(targets: &Targets, clients: &[IpAddr]) -> BTreeMap<u32, usize> {
        let program = program(targets);
        let mut counts = BTreeMap::new();
        clients.iter().for_each(|client| *counts.entry(run(&program, *client)).or_default() += 1);
        counts
    }

    /// Whether the count is what chance makes of a share: within 4.5 standard deviations.
    fn is_fair(count: usize, of: usize, share: f64) -> bool {
        let (count, of) = (count as f64, of as f64);
        (count - of * share).abs() <= 4.5 * (of * share * (1.0 - share)).sqrt()
    }

    #[test]
    fn clients_are_spread_evenly() {
        for (kind, clients) in kinds_of_clients() {
            for count in [1, 2, 4, 7, 16] {
                let targets = targets(0..count);
                let counts = counts(&targets, &clients);
                assert_eq!(counts.keys().copied().collect::<BTreeSet<_>>(), (0..count).map(index).collect());
                for number in counts.values() {
                    assert!(is_fair(*number, clients.len(), 1.0 / f64::from(count)), "{kind}: {counts:?}");
                }
            }
        }
    }

    #[test]
    fn the_flows_of_one_client_are_spread_evenly() {
        for ip in ["127.0.0.1", "10.1.2.3", "::1", "2001:db8::7"].map(|ip| ip.parse::<IpAddr>().unwrap()) {
            for count in [1, 2, 4, 7, 16] {
                let program = program(&by_flow(targets(0..count)));
                let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
                for port in 32_768..60_999 {
                    *counts.entry(run_flow(&program, SocketAddr::new(ip, port), 0)).or_default() += 1;
                }
                assert_eq!(counts.keys().copied().collect::<BTreeSet<_>>(), (0..count).map(index).collect());
                let is_fair = |number: &usize| is_fair(*number, 60_999 - 32_768, 1.0 / f64::from(count));
                assert!(counts.values().all(is_fair), "{ip}: {counts:?}");
            }
        }
    }

    #[test]
    fn a_canary_has_its_share_of_the_flows_of_one_client() {
        let mut targets = by_flow(targets(0..6));
        targets.canary = targets.primary.split_off(4);
        targets.share = Share(2000);
        let program = program(&targets);
        let flows = (1024..65_535).map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let at_canary = flows.filter(|flow| targets.canary.contains(&run_flow(&program, *flow, 0))).count();
        assert!(is_fair(at_canary, 65_535 - 1024, 0.2), "{at_canary}");
    }

    #[test]
    fn a_client_stays_on_one_side_of_a_canary_and_the_sides_are_spread_evenly() {
        for (kind, clients) in kinds_of_clients() {
            for percent in [1, 10, 50] {
                let (all, mut targets) = (targets(0..4), targets(0..8));
                // The canary's workers have the slots of those that they replace.
                let canary: BTreeMap<u32, Key> = [900, 901]
                    .into_iter()
                    .zip(0..)
                    .map(|(index, slot)| (index, Key { slot: SlotId(slot), number: 0 }))
                    .collect();
                targets.canary = canary.keys().copied().collect();
                targets.share = Share(percent * 100);
                targets.primary = all.primary.clone();
                if let Choice::By(_, keys) = &mut targets.choice {
                    keys.extend(canary);
                }
                let (with, without) = (program(&targets), program(&all));
                let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
                for client in &clients {
                    let index = run(&with, *client);
                    *counts.entry(index).or_default() += 1;
                    assert!(targets.canary.contains(&index) || index == run(&without, *client));
                }
                let share = f64::from(percent) / 100.0;
                for (indices, share) in
                    [(&targets.canary, share / 2.0), (&targets.primary, (1.0 - share) / 4.0)]
                {
                    for index in indices {
                        let count = counts.get(index).copied().unwrap_or(0);
                        assert!(is_fair(count, clients.len(), share), "{kind}: {percent} % {counts:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn where_a_worker_has_several_sockets_all_of_them_get_clients() {
        let keys: BTreeMap<u32, Key> =
            (0..8).map(|index| (index, Key { slot: SlotId(index / 2), number: index % 2 })).collect();
        let targets = Targets {
            primary: (0..8).collect(),
            choice: Choice::By(Origin::Client, keys),
            ..Targets::default()
        };
        let (_, clients) = kinds_of_clients().swap_remove(0);
        let counts = counts(&targets, &clients);
        assert_eq!(counts.len(), 8);
        assert!(counts.values().all(|count| is_fair(*count, clients.len(), 1.0 / 8.0)), "{counts:?}");
    }

    #[test]
    fn five_hundred_workers_fit_into_a_program_and_what_does_not_fit_is_left_out() {
        let (_, clients) = kinds_of_clients().swap_remove(0);
        assert_eq!(counts(&targets(0..500), &clients).len(), 500);
        let mut with_canary = targets(0..502);
        with_canary.canary = with_canary.primary.split_off(500);
        with_canary.share = Share(5000);
        assert_eq!(counts(&with_canary, &clients).len(), 502);
        let too_many = targets(0..4000);
        assert!(program(&too_many).len() <= 4096);
        let chosen: BTreeSet<u32> = counts(&too_many, &clients).into_keys().collect();
        assert!(
            chosen.is_subset(&(0..585).map(index).collect()),
            "those of the least slots stay: {chosen:?}"
        );
    }

    #[test]
    fn without_a_key_a_target_is_chosen_as_well() {
        let choice = Choice::By(Origin::Client, BTreeMap::new());
        let targets = Targets { primary: vec![7, 9], choice, ..Targets::default() };
        assert!(targets.primary.contains(&run(&program(&targets), Ipv4Addr::LOCALHOST.into())));
    }

    proptest! {
        #[test]
        fn when_a_worker_goes_or_comes_only_its_flows_move(
            slots in btree_set(0u32..64, 2..12), which: prop::sample::Index,
            flows in vec(any::<(IpAddr, u16)>(), 64), options in 0usize..10
        ) {
            let one = *which.get(&slots.iter().copied().collect::<Vec<_>>());
            let with = program(&by_flow(targets(slots.iter().copied())));
            let without = program(&by_flow(targets(slots.iter().copied().filter(|slot| *slot != one))));
            for flow in flows.into_iter().map(SocketAddr::from) {
                let (before, after) = (run_flow(&with, flow, options * 4), run_flow(&without, flow, options * 4));
                prop_assert!(before == after || before == index(one));
                prop_assert!(after != index(one));
                prop_assert_eq!(before, run_flow(&with, flow, 0), "options make no other flow");
            }
        }

        #[test]
        fn when_a_worker_goes_or_comes_only_its_clients_move(
            slots in btree_set(0u32..64, 2..12), which: prop::sample::Index, clients in vec(any::<IpAddr>(), 64)
        ) {
            let one = *which.get(&slots.iter().copied().collect::<Vec<_>>());
            let with = program(&targets(slots.iter().copied()));
            let without = program(&targets(slots.iter().copied().filter(|slot| *slot != one)));
            for client in clients {
                let (before, after) = (run(&with, client), run(&without, client));
                prop_assert!(before == after || before == index(one));
                prop_assert!(after != index(one));
            }
        }

        #[test]
        fn only_the_slots_matter_and_not_which_sockets_their_workers_have(
            slots in btree_set(0u32..64, 1..12), other: u32, client: IpAddr
        ) {
            let other = other % 4000;
            let moved = |index: u32| (index + other) % 4099;
            let targets = targets(slots);
            let Choice::By(_, keys) = &targets.choice else { unreachable!() };
            let keys = keys.iter().map(|(index, key)| (moved(*index), *key)).collect();
            let primary = targets.primary.iter().map(|index| moved(*index)).collect();
            let reloaded = Targets { primary, choice: Choice::By(Origin::Client, keys), ..Targets::default() };
            prop_assert_eq!(run(&program(&reloaded), client), moved(run(&program(&targets), client)));
        }
    }
}
