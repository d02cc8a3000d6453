//! The kernel's edge: system calls, /proc, sock_diag and BPF instructions.

pub mod bpf;
pub mod procfs;
pub mod sockdiag;
pub mod sys;
