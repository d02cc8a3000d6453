//! The instructions that choose the member for a new connection.

use libc::sock_filter;

use crate::kernel::bpf::{add, jump, jump_at_least, load, modulo, ret, ret_accumulator};
use crate::steering::Share;

/// The indices that a program chooses from. Both lists ascend.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Targets {
    pub primary: Vec<u32>,
    pub canary: Vec<u32>,
    /// What `canary` gets, if there is also a `primary`.
    pub share: Share,
}

/// The longest program that the kernel takes (linux/bpf_common.h).
const BPF_MAXINSNS: usize = 4096;

/// Where a load finds a random number, a new one each time (SKF_AD_RANDOM, linux/filter.h).
const RANDOM: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM) as u32;

/// A program that chooses one of the indices at random, each of a list with the same probability, in O(log n) steps.
/// Without any index, its result is out of range: then the kernel chooses among all members by the connection's hash.
///
/// It chooses at random and not by the hash, since a retransmitted SYN finds its request socket by its addresses
/// before the kernel looks for a listener. If the indices are so scattered that the program would be too long for the
/// kernel, it chooses among those that fit.
pub fn program(targets: &Targets) -> Vec<sock_filter> {
    let Targets { primary, canary, share } = targets;
    match (primary.is_empty(), canary.is_empty()) {
        (true, true) => vec![ret(u32::MAX)],
        (true, false) => choose_one(canary, BPF_MAXINSNS),
        (false, true) => choose_one(primary, BPF_MAXINSNS),
        (false, false) => {
            // The load and the jump over the canary's half, which may take two instructions, need room too.
            let choose_canary = choose_one(canary, BPF_MAXINSNS / 2 - 2);
            let mut program = vec![load(RANDOM)];
            jump_if_at_least(share.of_random_numbers(), choose_canary.len(), &mut program);
            program.extend(choose_canary);
            program.extend(choose_one(primary, BPF_MAXINSNS / 2 - 2));
            program
        }
    }
}

/// A program of at most `max_len` instructions that returns one of `indices`.
fn choose_one(indices: &[u32], max_len: usize) -> Vec<sock_filter> {
    let mut runs = runs(indices);
    // Each run takes two instructions, each inner node of the tree above them at most two.
    runs.truncate((max_len - 2) / 4);
    let total: u32 = runs.iter().map(|run| run.len).sum();
    let mut program = vec![load(RANDOM), modulo(total)];
    choose(&runs, &mut program);
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
fn choose(runs: &[Run], program: &mut Vec<sock_filter>) {
    let Some((&first, rest)) = runs.split_first() else { return };
    if rest.is_empty() {
        // start >= before, since the indices ascend.
        program.push(add(first.start - first.before));
        program.push(ret_accumulator());
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
    use std::collections::BTreeSet;

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
        bpf::run(program, |offset| {
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
    fn successive_indices_take_no_more_instructions_than_one() {
        assert_eq!(program(&primary(&[4, 5, 6, 7])).len(), program(&primary(&[4])).len());
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
                let program = program(&Targets { primary: primary.to_vec(), canary: canary.to_vec(), share });
                assert!(program.len() <= BPF_MAXINSNS, "{}", program.len());
                let border = share.of_random_numbers();
                let chosen = |first: u32| -> BTreeSet<u32> {
                    (0..1000).map(|second| run_with(&program, &[first, second]).0).collect()
                };
                let fitting = |indices: &[u32]| indices.iter().take(511).copied().collect();
                assert_eq!((chosen(0), chosen(border)), (fitting(canary), fitting(primary)));
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
}
