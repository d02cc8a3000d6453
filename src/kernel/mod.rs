//! The edge to the kernel: system calls, /proc, sock_diag and BPF instructions. It decides nothing.

pub mod bpf;
pub mod datagrams;
pub mod duplicate;
pub mod fdtable;
pub mod file;
pub mod helper;
pub mod inbox;
pub mod jobs;
pub mod notice;
pub mod open_sockets;
pub mod procfs;
pub mod ready;
pub mod scheduling;
pub mod search;
pub mod sockdiag;
pub mod sys;
pub mod tracee;
