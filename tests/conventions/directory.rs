//! The folder that workers start in: `--chdir`, and the logical current folder.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use crate::common::{
    DEADLINE, Folder, Service, answered_more, free_address, naive, reuse_run_with, server, wait_until,
};
use crate::{assert_reload_fails, assert_start_fails, light_load, replace_one, value_in, variable};

/// The current folder of all workers. It must be the same.
#[track_caller]
fn directory(service: &Service) -> String {
    let directory = |pid: &u32| fs::read_link(format!("/proc/{pid}/cwd")).expect("the directory of a worker");
    let mut directories: Vec<PathBuf> = service.workers().iter().map(directory).collect();
    directories.dedup();
    assert_eq!(directories.len(), 1, "{directories:?}");
    directories.remove(0).display().to_string()
}

/// `current` points to release 1 at first and then to release 2. Asserts that each worker starts in the release of its
/// generation, also when it is restarted later.
#[track_caller]
fn assert_follows_the_link(folder: &Folder, addr: SocketAddr, mut service: Service, logical: &str) {
    let releases = [1, 2].map(|number| folder.path(&format!("releases/{number}")));
    service.wait_until_ready();
    assert_eq!(directory(&service), releases[0]);
    assert_eq!(value_in(&service, 1, "PWD").as_deref(), Some(logical));
    let printed = |line: &str, times: usize| {
        wait_until(line, DEADLINE, || service.out.count_of(line) >= times);
        assert_eq!(service.out.count_of(line), times, "{line}");
    };
    printed("release 1", 2);

    link(folder, "releases/2");
    let restarted = replace_one(&service);
    assert_eq!(directory(&service), releases[0], "a restarted worker is of the old release");
    assert_eq!(variable(restarted, "PWD").as_ref(), Some(&releases[0]), "`current` points elsewhere now");
    printed("release 1", 3); // its command too
    assert_eq!(service.out.count_of("release 2"), 0);

    let load = light_load(addr);
    service.reload();
    answered_more(&load);
    load.stop().assert_nothing_failed();
    assert_eq!(directory(&service), releases[1]);
    printed("release 2", 2); // their command too
    assert_eq!(value_in(&service, 2, "PWD").as_deref(), Some(logical));

    fs::remove_file(folder.path("current")).expect("remove the link");
    let log = assert_reload_fails(&service, addr, "No such file or directory");
    assert!(log.contains(&folder.path("current")), "the log names the folder:\n{log}");
    replace_one(&service);
    assert_eq!(directory(&service), releases[1]);
    service.stop();
}

/// Makes a release: a folder with a program that prints its number and serves.
fn release(folder: &Folder, number: u32, addr: SocketAddr) {
    let name = format!("releases/{number}");
    fs::create_dir_all(folder.path(&name)).expect("make a release");
    let text = format!("#!/bin/sh\necho \"release {number}\"\nexec '{}' --listen {addr}\n", server());
    folder.write_with(&format!("{name}/serve"), &text, 0o755);
}

/// Lets `current` point to `target`, by a rename as deployment tools do it. Returns its path.
fn link(folder: &Folder, target: &str) -> String {
    let (new, current) = (folder.path("new-link"), folder.path("current"));
    symlink(target, &new).expect("make a link");
    fs::rename(new, &current).expect("rename the link");
    current
}

/// Two releases, and `current`, which points to the first.
fn releases(addr: SocketAddr) -> (Folder, String) {
    let folder = Folder::new();
    release(&folder, 1, addr);
    release(&folder, 2, addr);
    let current = link(&folder, "releases/1");
    (folder, current)
}

#[test]
fn the_folder_of_chdir_is_resolved_for_each_generation() {
    let addr = free_address();
    let (folder, current) = releases(addr);
    let service = Service::run(&format!("-n 2 -C {current}"), &["./serve"]);
    assert_follows_the_link(&folder, addr, service, &current);
}

#[test]
fn without_chdir_the_logical_current_folder_is_resolved_for_each_generation() {
    let addr = free_address();
    let (folder, current) = releases(addr);
    let mut command = reuse_run_with("-n 2", &["./serve"]);
    command.current_dir(&current).env("PWD", &current);
    assert_follows_the_link(&folder, addr, Service::spawn(command), &current);
}

#[test]
fn a_relative_chdir_starts_at_the_logical_current_folder_and_pwd_is_absolute() {
    let addr = free_address();
    let (folder, current) = releases(addr);
    let parent = folder.0.display().to_string();
    let mut command = reuse_run_with("-n 2 --chdir current", &["./serve"]);
    command.current_dir(&parent).env("PWD", &parent);
    assert_follows_the_link(&folder, addr, Service::spawn(command), &current);
}

#[test]
fn a_wrong_pwd_is_ignored() {
    let (addr, folder) = (free_address(), Folder::new());
    let mut command = reuse_run_with("-n 1", &naive(addr));
    command.current_dir(&folder.0).env("PWD", "/proc");
    let mut service = Service::spawn_ready(command);
    assert_eq!(directory(&service), folder.0.display().to_string());
    assert_eq!(value_in(&service, 1, "PWD").as_deref(), Some("/proc"), "PWD is left as it is");
    service.stop();
}

#[test]
fn when_the_folder_is_missing_the_start_fails_with_one_line_and_status_1() {
    let (addr, folder) = (free_address(), Folder::new());
    let missing = folder.path("missing");
    let service = Service::run(&format!("-n 2 --chdir {missing}"), &naive(addr));
    assert_start_fails(service, &format!("{missing}: No such file or directory"));
    let file = folder.write("file", "");
    let service = Service::run(&format!("-n 2 --chdir {file}"), &naive(addr));
    assert_start_fails(service, &format!("{file}: Not a directory"));
}
