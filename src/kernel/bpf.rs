//! Instructions of classic BPF, which filters and steering programs are made of.

use libc::sock_filter;

/// One instruction (linux/filter.h).
pub const fn op(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}
