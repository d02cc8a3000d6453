//! The instructions that choose the member for a new connection.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use libc::sock_filter;

use crate::kernel::bpf::{
    add, jump, jump_at_least, jump_equal, load, load_byte, load_half, modulo, ret, ret_accumulator,
};
use crate::steering::Share;
use crate::steering::by_client::{self, Key, Origin};

/// The indices that a program chooses from, each as often as it stands here. Both lists ascend.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Targets {
    pub primary: Vec<u32>,
    pub canary: Vec<u32>,
    /// What `canary` gets, if there is also a `primary`.
    pub share: Share,
    pub choice: Choice,
    /// Connections of our own, which go elsewhere.
    pub aims: Vec<Aim>,
}

/// How a program chooses one of several indices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Choice {
    #[default]
    Random,
    /// By where the packet comes from, and these keys of the indices.
    By(Origin, BTreeMap<u32, Key>),
}

/// The connection from one source address goes to one index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aim {
    pub source: SocketAddr,
    pub index: u32,
}

/// A program has at most this many aims, so that there is room for the rest.
pub const MAX_AIMS: usize = 64;

/// The longest program that the kernel takes (linux/bpf_common.h).
const BPF_MAXINSNS: usize = 4096;

/// Where a load finds a random number, a new one each time (SKF_AD_RANDOM, linux/filter.h).
const RANDOM: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM) as u32;

/// Where a load finds a byte of the packet's IP header. (The packet itself begins behind the TCP header.)
pub(super) const fn ip_header(offset: u32) -> u32 {
    (libc::SKF_NET_OFF as u32).wrapping_add(offset)
}

/// A program that chooses one of the indices: at random, each entry of a list with the same probability, in O(log n) steps;
/// or by the client's address, in O(n) steps. Without any index, its result is out of range: then the kernel chooses among
/// all members by the connection's hash.
/// A connection from the source of an aim goes to the index of that aim.
///
/// It chooses at random and not by the hash, since a retransmitted SYN finds its request socket by its addresses
/// before the kernel looks for a listener. If there are so many
/// indices, or so scattered ones, that the program would be too long for the kernel, it chooses among those that fit.
pub fn program(targets: &Targets) -> Vec<sock_filter> {
    let mut program: Vec<sock_filter> = targets.aims.iter().take(MAX_AIMS).flat_map(aim_at).collect();
    let choose = choose(targets, BPF_MAXINSNS - program.len());
    program.extend(choose);
    program
}

/// Instructions that end the program with an aim's index if the packet comes from its source.
fn aim_at(aim: &Aim) -> Vec<sock_filter> {
    const V4_WITHOUT_OPTIONS: u32 = 0x45;
    const V6: u32 = 0x60;
    let end = ret(aim.index);
    let port = u32::from(aim.source.port());
    let words: Vec<(u32, u32)> = match aim.source.ip() {
        IpAddr::V4(ip) => vec![(12, u32::from(ip))],
        IpAddr::V6(ip) => {
            let ip = u128::from(ip);
            (0..4).map(|word| (8 + 4 * word, (ip >> (96 - 32 * word)) as u32)).collect()
        }
    };
    // From the last comparison backward, each jumps over all that follow it.
    let port_at = if aim.source.is_ipv4() { 20 } else { 40 };
    let mut code = vec![end, jump_equal(port, 0, 1), load_half(ip_header(port_at))];
    for (offset, word) in words.into_iter().rev() {
        code.push(jump_equal(word, 0, code.len() as u8));
        code.push(load(ip_header(offset)));
    }
    let rest = code.len() as u8;
    match aim.source.is_ipv4() {
        true => code.push(jump_equal(V4_WITHOUT_OPTIONS, 0, rest)),
        false => code.push(jump_at_least(V6, 0, rest)),
    }
    code.push(load_byte(ip_header(0)));
    code.reverse();
    code
}

/// A program of at most `max_len` instructions that chooses one of the indices.
fn choose(targets: &Targets, max_len: usize) -> Vec<sock_filter> {
    let Targets { primary, canary, share, choice, .. } = targets;
    if let ([only], []) | ([], [only]) = (&primary[..], &canary[..]) {
        return vec![ret(*only)];
    }
    let (mut program, number) = match choice {
        Choice::Random => (Vec::new(), vec![load(RANDOM)]),
        Choice::By(of, _) => (by_client::hash(*of), by_client::number_for_canary()),
    };
    let choose_one = |indices: &[u32], max_len| match choice {
        Choice::Random => choose_one(indices, max_len),
        Choice::By(_, keys) => by_client::choose_one(indices, keys, max_len),
    };
    let max_len = max_len - program.len();
    match (primary.is_empty(), canary.is_empty()) {
        (true, true) => program.push(ret(u32::MAX)),
        (true, false) => program.extend(choose_one(canary, max_len)),
        (false, true) => program.extend(choose_one(primary, max_len)),
        (false, false) => {
            // The jump over the canary's half may take two instructions.
            let max_len = max_len - number.len() - 2;
            let choose_canary = choose_one(canary, max_len / 2);
            let max_len = max_len - choose_canary.len();
            program.extend(number);
            jump_if_at_least(share.of_random_numbers(), choose_canary.len(), &mut program);
            program.extend(choose_canary);
            program.extend(choose_one(primary, max_len));
        }
    }
    program
}

/// A program of at most `max_len` instructions that returns one of `indices` at random.
fn choose_one(indices: &[u32], max_len: usize) -> Vec<sock_filter> {
    let mut runs = runs(indices);
    // Each run takes two instructions, each inner node of the tree above them at most two.
    runs.truncate((max_len - 2) / 4);
    let total: u32 = runs.iter().map(|run| run.len).sum();
    let mut program = vec![load(RANDOM), modulo(total)];
    search(&runs, &mut program);
    program
}

/// Appends a jump over `len` instructions, taken if the accumulator is at least `k`.
fn jump_if_at_least(k: u32, len: usize, program: &mut Vec<sock_filter>) {
    // A conditional jump reaches 255 instructions, an unconditional one any.
    match u8::try_from(len) {
        Ok(len) => program.push(jump_at_least(k, len, 0)),
        Err(_) => {
            program.push(jump_at_least(k, 0, 1));
            program.push(jump(len as u32));
        }
    }
}

/// Successive indices, and how many of the chosen indices come before them.
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

/// Appends a binary search. The accumulator holds n, and the program returns the n-th of the chosen indices, counted
/// from 0.
fn search(runs: &[Run], program: &mut Vec<sock_filter>) {
    let Some((&first, rest)) = runs.split_first() else { return };
    if rest.is_empty() {
        // Less than 0 where indices stand several times; the kernel's sums wrap too.
        program.push(add(first.start.wrapping_sub(first.before)));
        program.push(ret_accumulator());
        return;
    }
    let (low, high) = runs.split_at(runs.len() / 2);
    let mut lower = Vec::new();
    search(low, &mut lower);
    jump_if_at_least(high[0].before, lower.len(), program);
    program.append(&mut lower);
    search(high, program);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::bpf;

    fn primary(indices: &[u32]) -> Targets {
        Targets { primary: indices.to_vec(), ..Targets::default() }
    }

    fn run(program: &[sock_filter], random: u32) -> (u32, usize) {
        run_with(program, &[random])
    }

    /// Runs a steering program as the kernel would, with these random numbers.
    fn run_with(program: &[sock_filter], random: &[u32]) -> (u32, usize) {
        let mut random = random.iter().copied();
        bpf::run(program, |offset, _| {
            assert_eq!(offset, 0xffff_f038, "SKF_AD_RANDOM is 56, behind -0x1000");
            random.next().unwrap()
        })
    }

    #[test]
    fn a_program_chooses_each_index_equally_often_and_no_other_index() {
        let scattered: Vec<u32> = (0..1000).map(|i| i * 2 + 1).collect();
        let sets: [&[u32]; 6] = [&[0], &[7], &[0, 1, 2, 3], &[4, 5, 6, 7], &[0, 3, 4, 9], &scattered];
        for indices in sets {
            let program = program(&primary(indices));
            let chosen: Vec<u32> = (0..indices.len() as u32).map(|n| run(&program, n).0).collect();
            assert_eq!(chosen, indices);
            assert_eq!(run(&program, indices.len() as u32).0, indices[0]);
        }
    }

    #[test]
    fn an_index_is_chosen_as_often_as_it_stands_in_the_list() {
        for indices in [&[0, 0, 0, 4][..], &[2, 5, 5], &[1; 32], &[0, 0, 1, 1, 2, 7, 7]] {
            let program = program(&primary(indices));
            let chosen: Vec<u32> = (0..indices.len() as u32).map(|n| run(&program, n).0).collect();
            assert_eq!(chosen, indices);
        }
    }

    #[test]
    fn a_program_for_a_thousand_scattered_members_fits_the_kernels_limit_and_takes_few_steps() {
        let scattered: Vec<u32> = (0..1000).map(|i| i * 2).collect();
        let program = program(&primary(&scattered));
        assert!(program.len() <= BPF_MAXINSNS, "{}", program.len());
        let most = (0..1000).map(|n| run(&program, n).1).max().unwrap();
        assert!(most <= 4 + 2 * 10, "{most} steps");
    }

    #[test]
    fn a_program_that_would_be_too_long_chooses_among_the_members_that_fit() {
        let scattered: Vec<u32> = (0..3000).map(|i| i * 2).collect();
        let program = program(&primary(&scattered));
        assert!(program.len() <= BPF_MAXINSNS);
        let chosen: BTreeSet<u32> = (0..5000).map(|n| run(&program, n).0).collect();
        assert_eq!(chosen, scattered[..1023].iter().copied().collect(), "each may take four instructions");
    }

    #[test]
    fn successive_indices_take_no_more_instructions_than_two_and_a_single_one_takes_one() {
        assert_eq!(program(&primary(&[4, 5, 6, 7])).len(), program(&primary(&[4, 5])).len());
        assert_eq!(program(&primary(&[4])).len(), 1);
    }

    #[test]
    fn without_a_target_the_kernel_chooses_among_all_members() {
        assert_eq!(run(&program(&Targets::default()), 0).0, u32::MAX, "out of range");
    }

    #[test]
    fn a_canary_without_a_primary_gets_everything() {
        let targets = Targets { canary: vec![3], share: Share(1), ..Targets::default() };
        assert_eq!(run(&program(&targets), u32::MAX).0, 3);
    }

    #[test]
    fn the_canary_gets_its_share_of_all_random_numbers() {
        let scattered: Vec<u32> = (0..3000).map(|i| i * 2).collect();
        let odd: Vec<u32> = scattered.iter().map(|index| index + 1).collect();
        let sets: [(&[u32], &[u32]); 4] =
            [(&[0, 1], &[2, 3]), (&[5], &[0, 7]), (&scattered, &[1]), (&odd, &scattered)];
        for (primary, canary) in sets {
            for share in [1, 1000, 5000, 9999].map(Share) {
                let (primary_indices, canary_indices) = (primary.to_vec(), canary.to_vec());
                let program = program(&Targets {
                    primary: primary_indices,
                    canary: canary_indices,
                    share,
                    ..Targets::default()
                });
                assert!(program.len() <= BPF_MAXINSNS, "{}", program.len());
                let border = share.of_random_numbers();
                let chosen = |first: u32| -> BTreeSet<u32> {
                    (0..1000).map(|second| run_with(&program, &[first, second]).0).collect()
                };
                let fitting = |indices: &[u32]| indices.iter().take(511).copied().collect::<BTreeSet<u32>>();
                assert_eq!(chosen(0), fitting(canary));
                assert!(chosen(border).is_superset(&fitting(primary)));
                for second in 0..10 {
                    assert!(canary.contains(&run_with(&program, &[0, second]).0));
                    assert!(canary.contains(&run_with(&program, &[border - 1, second]).0));
                    assert!(primary.contains(&run_with(&program, &[border, second]).0));
                    assert!(primary.contains(&run_with(&program, &[u32::MAX, second]).0));
                }
                let expected = f64::from(share.0) / 10_000.0;
                assert!((f64::from(border) / 2f64.powi(32) - expected).abs() < 1e-6);
            }
        }
    }

    /// The IP header and the ports of a SYN, with so many bytes of IPv4 options.
    fn packet(source: SocketAddr, options: usize) -> Vec<u8> {
        let mut packet = vec![0xa5; 40];
        match source.ip() {
            IpAddr::V4(ip) => {
                packet.truncate(20 + options);
                packet[0] = 0x40 | (packet.len() / 4) as u8;
                packet[12..16].copy_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                packet[0] = 0x6f; // with a traffic class
                packet[8..24].copy_from_slice(&ip.octets());
            }
        }
        packet.extend(source.port().to_be_bytes());
        packet.extend([0xa5; 18]);
        packet
    }

    /// What a program returns for a packet, with these random numbers.
    fn run_for(targets: &Targets, packet: &[u8], random: [u32; 2]) -> u32 {
        let (program, mut random) = (program(targets), random.into_iter());
        assert!(program.len() <= BPF_MAXINSNS, "{}", program.len());
        let result = bpf::run(&program, |offset, size| match offset {
            0xffff_f038 => random.next().unwrap(),
            _ => {
                let at = (offset - 0xfff0_0000) as usize; // SKF_NET_OFF is -0x100000
                packet[at..at + size].iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
            }
        });
        result.0
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_connection_of_our_own_goes_to_its_index_and_any_other_as_without_it() {
        let sources =
            ["127.0.0.1:4000", "127.0.0.2:4000", "[::1]:4000", "[2001:db8::1]:5000", "127.0.0.1:4001"];
        let aims = |numbers: &[usize]| {
            let aim = |number: &usize| Aim { source: address(sources[*number]), index: 10 + *number as u32 };
            numbers.iter().map(aim).collect::<Vec<Aim>>()
        };
        let plans = [
            Targets::default(),
            primary(&[2]),
            Targets { canary: vec![1], share: Share(5000), ..primary(&[3, 4]) },
        ];
        for plan in plans {
            for aimed in [&[0][..], &[2], &[0, 2], &[0, 1, 2, 3, 4]] {
                let targets = Targets { aims: aims(aimed), ..plan.clone() };
                for (number, source) in sources.iter().enumerate() {
                    let packet = packet(address(source), 0);
                    for random in [[0, 0], [1, 1], [u32::MAX, 1]] {
                        let expected = match aimed.contains(&number) {
                            true => 10 + number as u32,
                            false => run_for(&plan, &packet, random),
                        };
                        assert_eq!(
                            run_for(&targets, &packet, random),
                            expected,
                            "{source} {aimed:?} {plan:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_packet_of_the_other_family_or_with_options_is_not_taken_for_ours() {
        let source = address("127.0.0.1:4000");
        let targets = Targets { aims: vec![Aim { source, index: 9 }], ..primary(&[2]) };
        assert_eq!(run_for(&targets, &packet(source, 4), [0, 0]), 2, "its ports stand elsewhere");
        let mut v6 = packet(address("[::1]:4000"), 0);
        v6[12..16].copy_from_slice(&Ipv4Addr::LOCALHOST.octets());
        v6[20..22].copy_from_slice(&4000u16.to_be_bytes());
        assert_eq!(run_for(&targets, &v6, [0, 0]), 2);
    }

    #[test]
    fn with_as_many_aims_as_there_can_be_a_program_fits_the_kernels_limit() {
        let scattered: Vec<u32> = (0..3000).map(|i| i * 2).collect();
        let aim =
            |port: u16| Aim { source: ("::1".parse::<IpAddr>().unwrap(), port).into(), index: port.into() };
        let aims: Vec<Aim> = (1..=2 * MAX_AIMS as u16).map(aim).collect();
        let targets = Targets { aims, canary: vec![1], share: Share(5000), ..primary(&scattered) };
        assert_eq!(run_for(&targets, &packet(address("[::1]:64"), 0), [0, 0]), 64);
        assert_eq!(run_for(&targets, &packet(address("[::1]:65"), 0), [0, 0]), 1, "there is no room for it");
    }

    proptest! {
        #[test]
        fn of_any_packets_only_ours_are_aimed(
            sources in vec(any::<(IpAddr, u16)>(), 0..8), other: (IpAddr, u16), random: [u32; 2]
        ) {
            let sources: Vec<SocketAddr> = sources.into_iter().map(SocketAddr::from).collect();
            let aims = (10..).zip(&sources).map(|(index, source)| Aim { source: *source, index }).collect();
            let plan = primary(&[2, 5]);
            let targets = Targets { aims, ..plan.clone() };
            for packet_source in sources.iter().copied().chain([other.into()]) {
                let packet = packet(packet_source, 0);
                let index = sources.iter().position(|source| *source == packet_source);
                let expected = index.map_or(run_for(&plan, &packet, random), |index| 10 + index as u32);
                prop_assert_eq!(run_for(&targets, &packet, random), expected);
            }
        }
    }
}
