//! Classic BPF: its instructions, which filters and steering programs are made of, and a small assembler.

use libc::sock_filter;

/// One instruction (linux/filter.h).
const fn op(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

/// Loads the 32-bit word at an offset of the data into the accumulator.
pub const fn load(offset: u32) -> sock_filter {
    op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

/// Loads the 16-bit number, in network order, at an offset of the data into the accumulator.
pub const fn load_half(offset: u32) -> sock_filter {
    op(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, offset)
}

/// Loads the byte at an offset of the data into the accumulator.
pub const fn load_byte(offset: u32) -> sock_filter {
    op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, offset)
}

/// Loads the length in bytes of the IPv4 header at an offset of the data into the index register.
pub const fn load_header_len(offset: u32) -> sock_filter {
    op(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0, 0, offset)
}

/// As [`load_half`], at an offset behind what the index register says.
pub const fn load_half_behind(offset: u32) -> sock_filter {
    op(libc::BPF_LD | libc::BPF_H | libc::BPF_IND, 0, 0, offset)
}

pub const fn add(k: u32) -> sock_filter {
    op(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K, 0, 0, k)
}

pub const fn multiply(k: u32) -> sock_filter {
    op(libc::BPF_ALU | libc::BPF_MUL | libc::BPF_K, 0, 0, k)
}

pub const fn shift_right(k: u32) -> sock_filter {
    op(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 0, 0, k)
}

pub const fn xor(k: u32) -> sock_filter {
    op(libc::BPF_ALU | libc::BPF_XOR | libc::BPF_K, 0, 0, k)
}

/// The accumulator and the index register.
pub const fn xor_index() -> sock_filter {
    op(libc::BPF_ALU | libc::BPF_XOR | libc::BPF_X, 0, 0, 0)
}

/// Copies the accumulator to the index register.
pub const fn to_index() -> sock_filter {
    op(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0)
}

/// Loads a constant into the accumulator.
pub const fn load_constant(k: u32) -> sock_filter {
    op(libc::BPF_LD | libc::BPF_IMM, 0, 0, k)
}

/// Loads a word of the program's memory into the accumulator.
pub const fn load_memory(word: u32) -> sock_filter {
    op(libc::BPF_LD | libc::BPF_MEM, 0, 0, word)
}

/// Stores the accumulator in a word of the program's memory.
pub const fn store(word: u32) -> sock_filter {
    op(libc::BPF_ST, 0, 0, word)
}

/// Skips `jt` instructions if the accumulator is greater than the index register, and `jf` if it isn't.
pub const fn jump_greater_than_index(jt: u8, jf: u8) -> sock_filter {
    op(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_X, jt, jf, 0)
}

pub const fn modulo(k: u32) -> sock_filter {
    op(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, 0, 0, k)
}

/// Skips `jt` instructions if the accumulator is at least `k`, and `jf` if it isn't.
pub const fn jump_at_least(k: u32, jt: u8, jf: u8) -> sock_filter {
    op(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, jt, jf, k)
}

/// Skips `jt` instructions if the accumulator is `k`, and `jf` if it isn't.
pub const fn jump_equal(k: u32, jt: u8, jf: u8) -> sock_filter {
    op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, jf, k)
}

/// Skips `len` instructions.
pub const fn jump(len: u32) -> sock_filter {
    op(libc::BPF_JMP | libc::BPF_JA, 0, 0, len)
}

/// Ends the program with this result.
pub const fn ret(k: u32) -> sock_filter {
    op(libc::BPF_RET | libc::BPF_K, 0, 0, k)
}

/// Ends the program with the accumulator as its result.
pub const fn ret_accumulator() -> sock_filter {
    op(libc::BPF_RET | libc::BPF_A, 0, 0, 0)
}

/// A place in a program that jumps lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label(usize);

impl Label {
    /// The next instruction.
    pub const NEXT: Self = Self(usize::MAX);
}

/// Puts a program together and computes its jumps, which lead forward only and over at most 255 instructions.
#[derive(Debug, Default)]
pub struct Assembler {
    program: Vec<sock_filter>,
    /// Each jump: its index, and where it leads if the comparison holds and if it doesn't.
    jumps: Vec<(usize, Label, Label)>,
    /// By label: the index of its instruction, once it is placed.
    places: Vec<usize>,
}

impl Assembler {
    /// New labels, to be placed later.
    pub fn labels<const N: usize>(&mut self) -> [Label; N] {
        std::array::from_fn(|_| {
            self.places.push(usize::MAX);
            Label(self.places.len() - 1)
        })
    }

    /// The label stands for the instruction that is added next.
    pub fn place(&mut self, label: Label) {
        self.places[label.0] = self.program.len();
    }

    /// Loads the 32-bit word at an offset of the data into the accumulator.
    pub fn load(&mut self, offset: u32) {
        self.program.push(load(offset));
    }

    /// Jumps by whether the accumulator is `k`.
    pub fn jump_equal(&mut self, k: u32, if_equal: Label, otherwise: Label) {
        self.jumps.push((self.program.len(), if_equal, otherwise));
        self.program.push(jump_equal(k, 0, 0));
    }

    /// Ends the program with a result.
    pub fn ret(&mut self, k: u32) {
        self.program.push(ret(k));
    }

    /// The program with its jumps.
    ///
    /// # Panics
    /// When a jump leads backward, too far or to a label that wasn't placed. Programs are fixed, so a test
    /// finds that.
    pub fn finish(mut self) -> Vec<sock_filter> {
        for (index, if_equal, otherwise) in self.jumps {
            let offset = |label: Label| match label {
                Label::NEXT => 0,
                Label(label) => {
                    let distance = self.places[label].wrapping_sub(index + 1);
                    assert!(
                        distance <= usize::from(u8::MAX),
                        "a jump leads forward over at most 255 instructions"
                    );
                    distance as u8
                }
            };
            let jump = &mut self.program[index];
            (jump.jt, jump.jf) = (offset(if_equal), offset(otherwise));
        }
        self.program
    }
}

/// Runs a program as the kernel would, for tests. `load` is given the offset and the size, in bytes, of what the program
/// loads. Returns the result and the number of instructions that it took.
#[cfg(test)]
pub fn run(program: &[sock_filter], mut load: impl FnMut(u32, usize) -> u32) -> (u32, usize) {
    use libc::{BPF_A, BPF_ABS, BPF_ADD, BPF_ALU, BPF_B, BPF_H, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K};
    use libc::{
        BPF_IMM, BPF_JGT, BPF_LD, BPF_MEM, BPF_MISC, BPF_MOD, BPF_MUL, BPF_RET, BPF_RSH, BPF_ST, BPF_TAX,
    };
    use libc::{BPF_IND, BPF_LDX, BPF_MSH, BPF_W, BPF_X, BPF_XOR};
    let (mut accumulator, mut next, mut steps) = (0u32, 0usize, 0usize);
    // The kernel refuses a program that loads a word before it has stored it.
    let (mut index, mut memory) = (0u32, [None; libc::BPF_MEMWORDS as usize]);
    loop {
        let sock_filter { code, jt, jf, k } = program[next];
        (next, steps) = (next + 1, steps + 1);
        let mut jump_if = |holds: bool| next += usize::from(if holds { jt } else { jf });
        match u32::from(code) {
            code if code == BPF_LD | BPF_W | BPF_ABS => accumulator = load(k, 4),
            code if code == BPF_LD | BPF_H | BPF_ABS => accumulator = load(k, 2),
            code if code == BPF_LD | BPF_B | BPF_ABS => accumulator = load(k, 1),
            code if code == BPF_LD | BPF_H | BPF_IND => accumulator = load(index.wrapping_add(k), 2),
            code if code == BPF_LDX | BPF_B | BPF_MSH => index = (load(k, 1) & 0xf) * 4,
            code if code == BPF_ALU | BPF_MOD | BPF_K => accumulator %= k,
            code if code == BPF_ALU | BPF_ADD | BPF_K => accumulator = accumulator.wrapping_add(k),
            code if code == BPF_ALU | BPF_MUL | BPF_K => accumulator = accumulator.wrapping_mul(k),
            code if code == BPF_ALU | BPF_RSH | BPF_K => accumulator >>= k,
            code if code == BPF_ALU | BPF_XOR | BPF_K => accumulator ^= k,
            code if code == BPF_ALU | BPF_XOR | BPF_X => accumulator ^= index,
            code if code == BPF_MISC | BPF_TAX => index = accumulator,
            code if code == BPF_LD | BPF_IMM => accumulator = k,
            code if code == BPF_LD | BPF_MEM => accumulator = memory[k as usize].expect("it was stored"),
            code if code == BPF_ST => memory[k as usize] = Some(accumulator),
            code if code == BPF_JMP | BPF_JA => next += k as usize,
            code if code == BPF_JMP | BPF_JEQ | BPF_K => jump_if(accumulator == k),
            code if code == BPF_JMP | BPF_JGE | BPF_K => jump_if(accumulator >= k),
            code if code == BPF_JMP | BPF_JGT | BPF_X => jump_if(accumulator > index),
            code if code == BPF_RET | BPF_K => return (k, steps),
            code if code == BPF_RET | BPF_A => return (accumulator, steps),
            code => panic!("unexpected instruction {code:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_lead_to_their_labels_however_many_instructions_lie_between() {
        for between in [1, 100, 253] {
            let mut code = Assembler::default();
            let [one, two] = code.labels();
            code.load(0);
            code.jump_equal(1, one, Label::NEXT);
            code.jump_equal(2, two, Label::NEXT);
            (1..between).for_each(|_| code.load(0));
            code.ret(0);
            code.place(two);
            code.ret(20);
            code.place(one);
            code.ret(10);
            let program = code.finish();
            let result = |word| run(&program, |_, _| word).0;
            assert_eq!([result(0), result(1), result(2)], [0, 10, 20], "{between}");
        }
    }

    #[test]
    #[should_panic(expected = "at most 255 instructions")]
    fn a_jump_over_more_than_255_instructions_is_refused() {
        let mut code = Assembler::default();
        let [end] = code.labels();
        code.jump_equal(0, end, Label::NEXT);
        (0..256).for_each(|_| code.load(0));
        code.place(end);
        code.ret(0);
        code.finish();
    }
}
