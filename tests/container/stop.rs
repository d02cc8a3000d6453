//! How long a container takes to stop with the default options. Docker kills it after ten seconds.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::common::{get, needs_other_users};
use crate::oci::{ADDRESS, Bundle, Container, Identity, Runtime};

const SERVER: [&str; 3] = ["/server", "--listen", "0.0.0.0:8080"];
/// As long as `docker stop` waits.
const DOCKERS_TIMEOUT: Duration = Duration::from_secs(10);
/// What an idle container may take longer than its workers.
const MAX_EXTRA: Duration = Duration::from_millis(500);

/// A container with two workers, and a request of 20 s if `asked`.
fn container(options: &[&str], asked: bool) -> (Container, Option<TcpStream>) {
    let arguments = [&["-n", "2", "--"], &SERVER[..], options].concat();
    let (container, addr) = Bundle::empty(Identity::Bare).start_ready(Runtime::Runc, &arguments);
    let client = asked.then(|| {
        let mut client = TcpStream::connect(addr).expect("connect");
        client.write_all(b"GET /sleep/20000?id=long HTTP/1.1\r\nHost: test\r\n\r\n").expect("ask");
        container.service.wait_for_output("begun long");
        client
    });
    (container, client)
}

/// Sends a signal to PID 1 and waits for the end. Returns the exit status, and how long it took.
#[track_caller]
fn stop(mut container: Container, signal: &str) -> (Option<i32>, Duration) {
    let begun = Instant::now();
    let output = container.runtime(&["kill", &container.name, signal]);
    assert!(output.status.success(), "{output:?}");
    let status = container.service.wait_end();
    (status.code(), begun.elapsed())
}

#[test]
fn a_container_with_a_long_request_stops_in_time_for_docker() {
    needs_other_users!();
    let (container, _client) = container(&[], true);
    let (status, took) = stop(container, "TERM");
    assert_eq!(status, Some(0), "after {took:?}");
    assert!(took < DOCKERS_TIMEOUT, "{took:?}");
}

#[test]
fn a_container_whose_worker_ignores_the_stop_signal_stops_in_time_for_docker() {
    needs_other_users!();
    for asked in [false, true] {
        let (container, _client) = container(&["--ignore-int"], asked);
        let (status, took) = stop(container, "TERM");
        assert_eq!(status, Some(1), "after {took:?}");
        assert!(took < DOCKERS_TIMEOUT, "{took:?}, with a request: {asked}");
    }
}

/// The fastest of some stops.
fn fastest(stop: impl FnMut(i32) -> Duration) -> Duration {
    (0..3).map(stop).min().expect("a stop")
}

#[test]
fn an_idle_container_stops_hardly_later_than_its_worker_alone() {
    needs_other_users!();
    let alone = fastest(|_| {
        let mut bundle = Bundle::empty(Identity::Bare);
        bundle.config["process"]["args"] = [&SERVER[..], &["--exit-on-int"]].concat().into();
        let container = bundle.start_as_configured(Runtime::Runc);
        container.service.wait_for_output("listening");
        let (status, took) = stop(container, "INT");
        assert_eq!(status, Some(0), "after {took:?}");
        took
    });
    let wrapped = fastest(|_| {
        let (container, _) = container(&["--exit-on-int"], false);
        get(ADDRESS);
        let (status, took) = stop(container, "TERM");
        assert_eq!(status, Some(0), "after {took:?}");
        took
    });
    println!("alone {alone:?}, with reuse-run {wrapped:?}");
    assert!(wrapped < alone + MAX_EXTRA, "{wrapped:?}, and alone {alone:?}");
}
