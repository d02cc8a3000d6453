//! Other users of the machine and processes in other namespaces: tests/apps/python/stranger.py.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::program::python;
use super::service::Service;

/// A user that has no other process.
pub const STRANGER: &str = "54322";

/// The name of a control socket.
pub fn control_name(pid: u32) -> String {
    let namespace = fs::metadata("/proc/self/ns/pid").expect("the PID namespace").ino();
    format!("reuse-run/{namespace}/{pid}")
}

/// A stranger behind another command, such as unshare(1). It is ended when the result is dropped.
pub fn stranger_behind(prefix: &[&str], arguments: &[&str]) -> Service {
    let words = python("stranger.py", arguments);
    let words: Vec<&str> = prefix.iter().copied().chain(words.iter().map(String::as_str)).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    Service::spawn(command)
}

/// Another user.
pub fn stranger(arguments: &[&str]) -> Service {
    stranger_behind(&[], &[&["--uid", STRANGER], arguments].concat())
}
