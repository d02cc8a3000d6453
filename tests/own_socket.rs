//! The socket that a worker made stays what it was to the worker, whatever the worker did with it before and after bind.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::net::SocketAddr;

use common::load::{LoadOptions, Report};
use common::{Service, free_address, python, reload_under_load};

/// tests/apps/python/own_socket.py at a free address, with 2 workers.
fn own_socket(what: &str) -> (SocketAddr, Service) {
    let addr = free_address();
    let command = python("own_socket.py", &[what, &addr.port().to_string()]);
    (addr, Service::run_ready("-n 2", &command))
}

/// Reloads under load, and asserts that nothing failed and the last generation answered.
fn reload(service: &Service, addr: SocketAddr, times: u32) -> Report {
    let report = reload_under_load(service, LoadOptions::new(addr, 4), times);
    assert_eq!(report.counts.generations.keys().next_back(), Some(&(times + 1)), "{report}");
    report
}

#[test]
fn a_socket_that_is_bound_and_never_listened_on_gets_no_connection() {
    let (addr, mut service) = own_socket("reserves");
    reload(&service, addr, 4); // from the third generation on such a socket listens already
    service.stop();
}

#[test]
fn a_program_by_which_a_worker_chooses_among_its_listeners_is_left_out() {
    let (addr, mut service) = own_socket("program");
    reload(&service, addr, 3);
    service.stop();
}
