//! Whether the loop of reuse-run waits for anything: what it does for others meanwhile.

use std::fs;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::{Duration, Instant};

use super::folder::Folder;
use super::program::python;
use super::service::Service;
use super::stranger::control_name;
use super::wait::{DEADLINE, wait_until};

/// The best of some tries must be faster than this.
const PROMPT: Duration = Duration::from_millis(100);
const TRIES: usize = 20;

/// A worker that calls unlink(2) again and again: tests/apps/python/unlinks.py. It says when it is ready.
pub fn unlinking(folder: &Folder) -> Vec<String> {
    python("unlinks.py", &[&folder.path("")])
}

/// Asserts that reuse-run answers `status`, and an unlink of [`unlinking`] in this folder, within 100 ms.
#[track_caller]
pub fn assert_prompt(service: &Service, folder: &Folder) {
    assert_prompt_of(service.pid(), folder);
}

/// [`assert_prompt`] of the reuse-run with this PID.
#[track_caller]
pub fn assert_prompt_of(pid: u32, folder: &Folder) {
    let times = || -> Vec<f64> {
        let text = fs::read_to_string(folder.path("unlinks")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    let before = times().len();
    let status = (0..TRIES).map(|_| status_time(pid));
    let status = status.min().expect("a try");
    wait_until("answers to unlink", DEADLINE, || times().len() > before + TRIES);
    let unlink = times()[before + 1..].iter().copied().fold(f64::MAX, f64::min);
    println!("meanwhile: status {status:?}, unlink {unlink} ms");
    assert!(status < PROMPT, "status took {status:?}");
    assert!(unlink < PROMPT.as_secs_f64() * 1000.0, "unlink took {unlink} ms");
}

/// The time that a status takes, without that of starting a command.
pub fn status_time(pid: u32) -> Duration {
    let address = SocketAddr::from_abstract_name(control_name(pid)).expect("a name");
    let begun = Instant::now();
    let mut client = UnixStream::connect_addr(&address).expect("connect");
    client.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    client.write_all(b"{\"version\":1,\"request\":\"status\"}\n").expect("send the request");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("{\"status\""), "{answer}");
    begun.elapsed()
}
