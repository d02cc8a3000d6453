//! A thread that this process traces (ptrace(2)). It is how another process is made to do a system call.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};

use libc::{c_int, c_uint, c_void, user_regs_struct};
use nix::unistd::Pid;

use crate::kernel::sys;

/// The length of the instruction that makes a system call: `syscall`, or `svc #0`.
const CALL_LENGTH: u64 = if cfg!(target_arch = "x86_64") { 2 } else { 4 };

/// linux/ptrace.h.
const PTRACE_EVENT_STOP: c_int = 128;

/// A system call: its number, and its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemCall {
    pub number: libc::c_long,
    pub args: [u64; 6],
}

/// The registers of a thread that is in a system call, or has just returned from one.
#[derive(Clone, Copy)]
pub struct Registers(user_regs_struct);

impl std::fmt::Debug for Registers {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Registers at {:#x}", self.next_instruction())
    }
}

#[cfg(target_arch = "x86_64")]
impl Registers {
    pub fn next_instruction(&self) -> u64 {
        self.0.rip
    }

    /// What the system call has returned.
    pub fn result(&self) -> i64 {
        self.0.rax as i64
    }

    /// The thread does `call` next. `end` is the address behind an instruction that makes a system call.
    #[must_use]
    pub fn calling(mut self, end: u64, call: &SystemCall) -> Self {
        let [rdi, rsi, rdx, r10, r8, r9] = call.args;
        self = self.returning(end - CALL_LENGTH, call.number);
        self.0 = user_regs_struct { rdi, rsi, rdx, r10, r8, r9, ..self.0 };
        self
    }

    /// The thread goes on at `next`, and finds `result` there as that of its system call.
    #[must_use]
    pub fn returning(mut self, next: u64, result: i64) -> Self {
        // An orig_rax of -1: this is no system call that the kernel may have to repeat.
        self.0 = user_regs_struct { rip: next, rax: result as u64, orig_rax: u64::MAX, ..self.0 };
        self
    }
}

#[cfg(target_arch = "aarch64")]
impl Registers {
    pub fn next_instruction(&self) -> u64 {
        self.0.pc
    }

    /// What the system call has returned.
    pub fn result(&self) -> i64 {
        self.0.regs[0] as i64
    }

    /// The thread does `call` next. `end` is the address behind an instruction that makes a system call.
    #[must_use]
    pub fn calling(mut self, end: u64, call: &SystemCall) -> Self {
        const NUMBER: usize = 8;
        self.0.pc = end - CALL_LENGTH;
        self.0.regs[..call.args.len()].copy_from_slice(&call.args);
        self.0.regs[NUMBER] = call.number as u64;
        self
    }

    /// The thread goes on at `next`, and finds `result` there as that of its system call.
    #[must_use]
    pub fn returning(mut self, next: u64, result: i64) -> Self {
        self.0.pc = next;
        self.0.regs[0] = result as u64;
        self
    }
}

impl Registers {
    /// Whether the thread is in a system call, or returns from one, by the instruction that ends at `end`.
    /// aarch64 steps back before a stop if the kernel will repeat the call (`do_signal`, arch/arm64/kernel/signal.c).
    pub fn are_in_call(&self, end: u64) -> bool {
        [end, end - CALL_LENGTH].contains(&self.next_instruction())
    }
}

/// What a thread does that is traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Runs,
    /// It has ended, or is traced no more.
    Gone,
    /// Stopped by [`Tracee::interrupt`], or with its whole process by a signal such as SIGSTOP.
    Interrupted,
    /// Stopped at the beginning or the end of a system call.
    InCall,
    /// Stopped before it gets this signal.
    GetsSignal(c_int),
}

/// A thread that this process traces, until it is let go.
#[derive(Debug)]
pub struct Tracee(Pid);

impl Tracee {
    /// PTRACE_SEIZE. The thread goes on.
    ///
    /// # Errors
    /// EPERM if another process traces it, or this one may not.
    pub fn seize(tid: Pid) -> io::Result<Self> {
        let tracee = Self(tid);
        tracee.request(libc::PTRACE_SEIZE, libc::PTRACE_O_TRACESYSGOOD as usize)?;
        Ok(tracee)
    }

    /// PTRACE_INTERRUPT. A thread that waits for the answer to a stopped system call stops when it has that, before it does
    /// anything else; before Linux 5.19 at once, and the call is to be repeated.
    pub fn interrupt(&self) -> io::Result<()> {
        self.request(libc::PTRACE_INTERRUPT, 0)
    }

    /// PTRACE_SYSCALL: goes on until the next system call begins or ends. `signal` reaches the thread; 0 is none.
    pub fn go_on(&self, signal: c_int) -> io::Result<()> {
        self.request(libc::PTRACE_SYSCALL, signal as usize)
    }

    /// PTRACE_DETACH: the thread goes on, and is no longer traced.
    pub fn let_go(&self) -> io::Result<()> {
        self.request(libc::PTRACE_DETACH, 0)
    }

    /// waitid(2), without waiting. An end is left for the code that reaps the children, tracees included: the thread may be a
    /// worker's first one.
    pub fn state(&self) -> State {
        let changed = |options| sys::waitid(Some(self.0.as_raw()), options | libc::__WALL);
        match changed(libc::WSTOPPED) {
            Ok(Some(stopped)) if stopped.code == libc::CLD_TRAPPED => match stopped.status {
                status if status >> 8 == PTRACE_EVENT_STOP => State::Interrupted,
                status if status == libc::SIGTRAP | 0x80 => State::InCall, // PTRACE_O_TRACESYSGOOD
                status => State::GetsSignal(status & 0xff),
            },
            // Stopped, and not traced: another thread has called execve(2), and has this number now.
            Ok(Some(_)) | Err(_) => State::Gone,
            Ok(None) => match changed(libc::WEXITED | libc::WNOWAIT) {
                Ok(Some(changed)) if changed.code != libc::CLD_TRAPPED => State::Gone,
                Ok(_) => State::Runs, // it may have stopped since: that is another SIGCHLD
                Err(_) => State::Gone,
            },
        }
    }

    /// PTRACE_GETREGSET, of a stopped thread.
    pub fn registers(&self) -> io::Result<Registers> {
        // SAFETY: the struct has only integers, for which zero is valid.
        let mut registers: user_regs_struct = unsafe { zeroed() };
        self.register_set(libc::PTRACE_GETREGSET, &mut registers)?;
        Ok(Registers(registers))
    }

    /// PTRACE_SETREGSET, of a stopped thread.
    pub fn set_registers(&self, registers: &Registers) -> io::Result<()> {
        self.register_set(libc::PTRACE_SETREGSET, &mut registers.0.clone())
    }

    fn register_set(&self, request: c_uint, registers: &mut user_regs_struct) -> io::Result<()> {
        const NT_PRSTATUS: usize = 1; // linux/elf.h
        let iov_len = size_of::<user_regs_struct>();
        let mut part = libc::iovec { iov_base: (&raw mut *registers).cast(), iov_len };
        // SAFETY: the kernel reads or writes, as the iovec says, the one struct that it points to.
        check(unsafe { libc::ptrace(request, self.0.as_raw(), NT_PRSTATUS, &raw mut part) })
    }

    /// PTRACE_GETSIGMASK: the signals that a stopped thread blocks.
    pub fn signal_mask(&self) -> io::Result<u64> {
        let mut mask = 0;
        self.mask(libc::PTRACE_GETSIGMASK, &mut mask)?;
        Ok(mask)
    }

    /// PTRACE_SETSIGMASK, of a stopped thread.
    pub fn set_signal_mask(&self, mut mask: u64) -> io::Result<()> {
        self.mask(libc::PTRACE_SETSIGMASK, &mut mask)
    }

    fn mask(&self, request: c_uint, mask: &mut u64) -> io::Result<()> {
        // SAFETY: the kernel reads or writes so many bytes through the pointer, those of the u64.
        check(unsafe { libc::ptrace(request, self.0.as_raw(), size_of::<u64>(), &raw mut *mask) })
    }

    fn request(&self, request: c_uint, data: usize) -> io::Result<()> {
        let none = std::ptr::null_mut::<c_void>();
        // SAFETY: these requests take a number as data, and no pointer.
        check(unsafe { libc::ptrace(request, self.0.as_raw(), none, data) })
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
