//! Whether the loop of reuse-run waits for anything: what it does for others meanwhile.

use std::fs;
use std::time::{Duration, Instant};

use super::command::run;
use super::folder::Folder;
use super::program::python;
use super::service::Service;
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
    let times = || -> Vec<f64> {
        let text = fs::read_to_string(folder.path("unlinks")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    let before = times().len();
    let status = (0..TRIES).map(|_| {
        let begun = Instant::now();
        let outcome = run(service, "status");
        let is_answer = outcome.out.contains("pid") && matches!(outcome.code, Some(0 | 3)); // 3: not all are ready
        assert!(is_answer, "{outcome:?}; log:\n{}", service.log.text());
        begun.elapsed()
    });
    let status = status.min().expect("a try");
    wait_until("answers to unlink", DEADLINE, || times().len() > before + TRIES);
    let unlink = times()[before + 1..].iter().copied().fold(f64::MAX, f64::min);
    println!("meanwhile: status {status:?}, unlink {unlink} ms");
    assert!(status < PROMPT, "status took {status:?}");
    assert!(unlink < PROMPT.as_secs_f64() * 1000.0, "unlink took {unlink} ms");
}
