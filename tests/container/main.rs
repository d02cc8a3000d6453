//! Real containers, by runc and crun: the static binary as PID 1 with the seccomp profiles, capabilities and root
//! filesystems of production.
#![cfg_attr(clippy, deny(warnings))]

#[path = "../common/mod.rs"]
mod common;
mod oci;
mod stop;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;

use common::{DEADLINE, FlowLoad, Folder, children, join_network, needs_other_users, own_socket, wait_until};
use oci::{ADDRESS, Bundle, Container, Identity, Runtime, profile};
use serde_json::{Value, json};

// Profiles, capabilities and users.

/// Asserts that reuse-run, as PID 1 of a container with a read-only root, serves, reaps orphans, reloads and stops.
#[track_caller]
fn assert_works_with(runtime: Runtime, name: &str) {
    // Each worker leaves three orphans in sessions of their own, which live as long as the file exists.
    const SCRIPT: &str = r#"for i in 1 2 3; do
            (/busybox setsid /busybox sh -c 'while [ -e /live ]; do /busybox sleep 0.05; done' &)
        done; exec /server --listen 0.0.0.0:8080"#;
    for identity in [Identity::Root, Identity::User, Identity::Bare] {
        let bundle = Bundle::with_shell(identity).seccomp(profile(name, identity, &[])).read_only();
        let live = bundle.root("live");
        fs::write(&live, "").expect("make a file");
        let command = ["-n", "2", "--", "/busybox", "sh", "-c", SCRIPT];
        let (container, addr) = bundle.start_ready(runtime, &command);

        let pid = container.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the status of PID 1");
        for line in
            identity.status().into_iter().chain([format!("NSpid:\t{pid}\t1"), "Seccomp:\t2".to_owned()])
        {
            assert!(status.lines().any(|other| *other == *line), "{identity:?}: {line:?} is not in {status}");
        }
        let (_, text) = container.exec(&["/busybox", "touch", "/file"]);
        assert!(text.contains("Read-only file system"), "{text}");

        wait_until("the orphans come to PID 1", DEADLINE, || children(pid).len() == 2 + 2 * 3);
        fs::remove_file(live).expect("remove the file");
        wait_until("the orphans are reaped", DEADLINE, || children(pid).len() == 2);
        container.assert_reloads_lose_nothing(addr, true);
        let log = container.service.log.text();
        assert!(!log.contains("intercept"), "{log}");
        container.stop();
    }
}

#[test]
fn runc_with_dockers_profile_runs_it_as_root_as_user_and_without_capabilities() {
    needs_other_users!();
    assert_works_with(Runtime::Runc, "docker.json");
}

#[test]
fn crun_with_dockers_profile_runs_it_as_root_as_user_and_without_capabilities() {
    needs_other_users!();
    assert_works_with(Runtime::Crun, "docker.json");
}

#[test]
fn runc_with_containerds_profile_runs_it_as_root_as_user_and_without_capabilities() {
    needs_other_users!();
    assert_works_with(Runtime::Runc, "containerd.json");
}

#[test]
fn crun_with_containerds_profile_runs_it_as_root_as_user_and_without_capabilities() {
    needs_other_users!();
    assert_works_with(Runtime::Crun, "containerd.json");
}

#[test]
fn runc_with_podmans_profile_runs_it_as_root_as_user_and_without_capabilities() {
    needs_other_users!();
    assert_works_with(Runtime::Runc, "podman.json");
}

#[test]
fn crun_with_podmans_profile_runs_it_as_root_as_user_and_without_capabilities() {
    needs_other_users!();
    assert_works_with(Runtime::Crun, "podman.json");
}

/// Asserts that an epoll that watches a socket before bind does so afterwards, and that all socket options stay.
#[track_caller]
fn assert_own_socket_stays(name: &str) {
    for identity in [Identity::Root, Identity::User, Identity::Bare] {
        let bundle = Bundle::empty(identity).seccomp(profile(name, identity, &[]));
        let folder = Folder::new();
        let program = own_socket(&folder);
        fs::copy(program, bundle.root("own_socket")).expect("copy a program");
        let command = ["-n", "2", "--", "/own_socket", "8080", "edge", "two", "duplicate", "options"];
        let (container, addr) = bundle.start_ready(Runtime::Runc, &command);
        container.assert_reloads_lose_nothing(addr, true);
        container.stop();
    }
}

#[test]
fn under_dockers_profile_a_workers_socket_stays_what_it_was() {
    needs_other_users!();
    assert_own_socket_stays("docker.json");
}

#[test]
fn under_containerds_profile_a_workers_socket_stays_what_it_was() {
    needs_other_users!();
    assert_own_socket_stays("containerd.json");
}

#[test]
fn under_podmans_profile_a_workers_socket_stays_what_it_was() {
    needs_other_users!();
    assert_own_socket_stays("podman.json");
}

/// Asserts that reuse-run shares a UDP port, and that reloads lose no query.
#[track_caller]
fn assert_shares_udp(name: &str) {
    for identity in [Identity::Root, Identity::User, Identity::Bare] {
        let bundle = Bundle::empty(identity).seccomp(profile(name, identity, &[]));
        let server = ["/server", "--udp", "0.0.0.0:8080", "--listen", "0.0.0.0:8080"];
        let command = [&["-n", "2", "--udp", "--quiet-after", "300ms", "--"], &server[..]].concat();
        let (container, addr) = bundle.start_ready(Runtime::Runc, &command);
        let load = FlowLoad::start(addr, 20, 1);
        for _ in 0..3 {
            load.wait_for_more();
            let (status, text) = container.exec(&["reuse-run", "reload"]);
            assert_eq!(status, Some(0), "{text}\nlog:\n{}", container.service.log.text());
        }
        let told = load.stop();
        assert!(told.iter().all(|told| told.pids.len() == 4), "{identity:?}: {told:?}");
        container.stop();
    }
}

#[test]
fn under_dockers_profile_a_udp_port_is_shared() {
    needs_other_users!();
    assert_shares_udp("docker.json");
}

#[test]
fn under_containerds_profile_a_udp_port_is_shared() {
    needs_other_users!();
    assert_shares_udp("containerd.json");
}

#[test]
fn under_podmans_profile_a_udp_port_is_shared() {
    needs_other_users!();
    assert_shares_udp("podman.json");
}

// Roots.

/// Asserts that reuse-run serves, reloads and stops on this root filesystem.
#[track_caller]
fn assert_works_on(bundle: Bundle, command: &[&str]) {
    let (container, addr) = bundle.start_ready(Runtime::Runc, &[&["-n", "2", "--"], command].concat());
    container.assert_reloads_lose_nothing(addr, true);
    container.stop();
}

#[test]
fn the_static_binary_needs_no_file_in_its_root_and_works_when_that_is_read_only() {
    needs_other_users!();
    let command = ["/server", "--listen", "0.0.0.0:8080"];
    assert_works_on(Bundle::empty(Identity::User), &command);
    assert_works_on(Bundle::empty(Identity::User).read_only(), &command);
}

#[test]
fn the_static_binary_works_in_alpines_layout_with_a_server_that_needs_musl() {
    needs_other_users!();
    assert_works_on(Bundle::alpine(Identity::User), &["/srv/app"]);
    // And with Alpine's shell.
    assert_works_on(Bundle::alpine(Identity::User).read_only(), &["sh", "-c", "cd /srv; ./app"]);
}

#[test]
fn the_static_binary_works_in_debian_with_a_server_that_needs_its_glibc() {
    needs_other_users!();
    assert_works_on(Bundle::debian(Identity::User), &["/srv/app", "--listen", "0.0.0.0:8080"]);
}

// Exit statuses.

#[test]
fn a_containers_exit_status_is_that_of_reuse_run() {
    needs_other_users!();
    let cases: [(&[&str], i32); 5] = [
        (&["--", "/busybox", "sh", "-c", "exit 42"], 42),
        (&["--", "/busybox", "sh", "-c", "kill -KILL $$"], 128 + 9),
        (&["--", "/proc/version"], 126),
        (&["--", "/no-such-program"], 127),
        (&["--no-such-option"], 2),
    ];
    for runtime in [Runtime::Runc, Runtime::Crun] {
        for (arguments, status) in cases {
            let mut container = Bundle::with_shell(Identity::Bare).start(runtime, arguments);
            let end = container.service.wait_end();
            assert_eq!(end.code(), Some(status), "{arguments:?}: {}", container.service.log.text());
        }
    }
}

#[test]
fn a_container_whose_worker_had_to_be_killed_exits_with_1() {
    needs_other_users!();
    let command = ["--stop-timeout", "500ms", "--", "/server", "--listen", "0.0.0.0:8080", "--ignore-int"];
    let (mut container, _) = Bundle::empty(Identity::Bare).start_ready(Runtime::Runc, &command);
    container.runtime(&["kill", &container.name, "TERM"]);
    assert_eq!(container.service.wait_end().code(), Some(1), "{}", container.service.log.text());
}

// Without interception.

/// A container whose profile forbids seccomp filters, which the log says.
#[track_caller]
fn without_filters(name: &str, arguments: &[&str], sysctl: Value) -> (Container, SocketAddr) {
    let profile = profile(name, Identity::User, &["seccomp"]);
    let mut bundle = Bundle::empty(Identity::User).seccomp(profile);
    bundle.config["linux"]["sysctl"] = sysctl;
    let container = bundle.start(Runtime::Runc, arguments);
    container.service.wait_for_line("workers can't be intercepted");
    container.service.wait_for_line("generation 1 is ready");
    join_network(container.pid());
    (container, ADDRESS)
}

#[test]
fn when_a_profile_forbids_filters_given_listeners_lose_no_request() {
    needs_other_users!();
    let options = ["-n", "2", "--ready", "notify", "-l", "0.0.0.0:8080", "--"];
    let command = ["/server", "--given", "--ready-after", "0"];
    for name in ["docker.json", "podman.json"] {
        let (container, addr) = without_filters(name, &[&options[..], &command].concat(), json!({}));
        container.assert_reloads_lose_nothing(addr, true);
        container.stop();
    }
}

#[test]
fn when_a_profile_forbids_filters_servers_with_so_reuseport_and_a_sysctl_lose_no_request() {
    needs_other_users!();
    let command = ["-n", "2", "--", "/server", "--share", "--shutdown-on-int", "--listen", "0.0.0.0:8080"];
    let sysctl = json!({"net.ipv4.tcp_migrate_req": "1"});
    let (container, addr) = without_filters("docker.json", &command, sysctl);
    container.service.wait_for_line("a reload resets no connection");
    container.assert_reloads_lose_nothing(addr, false);
    container.stop();
}

#[test]
fn when_a_worker_changes_its_user_given_listeners_lose_no_request() {
    needs_other_users!();
    let bundle = Bundle::with_shell(Identity::Root).seccomp(profile("docker.json", Identity::Root, &[]));
    fs::create_dir(bundle.root("etc")).expect("make a folder");
    fs::write(bundle.root("etc/passwd"), "app:x:65532:65532::/:/sh").expect("write a file");
    symlink("/busybox", bundle.root("sh")).expect("make a link");
    // reuse-run can't see which connections belong to the old worker, so the old worker gets the whole drain.
    let options = ["-n", "2", "--drain", "2s", "--ready", "notify", "-l", "0.0.0.0:8080", "--"];
    let command = ["/busybox", "su", "app", "-c", "exec /server --given --ready-after 0"];
    let (container, addr) = bundle.start_ready(Runtime::Runc, &[&options[..], &command].concat());
    container.assert_reloads_lose_nothing(addr, true);
    container.stop();
}
