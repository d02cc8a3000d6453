//! Pseudo-terminals.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// A pseudo-terminal: its master, which no child inherits, and the path of its other end.
pub fn terminal() -> (File, String) {
    let flags = libc::O_NOCTTY;
    let master = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open("/dev/ptmx")
        .expect("open /dev/ptmx");
    let mut name = [0 as libc::c_char; 64];
    // SAFETY: the fd is a terminal's master for as long as the calls take, and the name has room for 64.
    let result = unsafe {
        libc::grantpt(master.as_raw_fd())
            | libc::unlockpt(master.as_raw_fd())
            | libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr(), name.len())
    };
    assert_eq!(result, 0, "a pseudo-terminal");
    // SAFETY: ptsname_r(3) has ended the name with a zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    (master, name.to_str().expect("a path in UTF-8").to_owned())
}
