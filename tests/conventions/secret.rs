//! `--secret`.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::common::load::LoadOptions;
use crate::common::{
    Folder, Service, User, arguments, behind_shell, free_address, naive, needs_other_users,
    reload_under_load, reuse_run_with,
};
use crate::{SECRET, assert_reload_fails, assert_start_fails, replace_one, value_in};

#[test]
fn a_secret_is_its_file_without_the_last_newline_and_is_read_by_each_generation() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("key", "first\n");
    let mut service = Service::run_ready(&format!("-n 2 --secret KEY={file}"), &naive(addr));
    assert_eq!(value_in(&service, 1, "KEY").as_deref(), Some("first"));
    for (generation, content, value) in
        [(2, "second", "second"), (3, "two\nlines = $HOME 'x\n\n", "two\nlines = $HOME 'x\n"), (4, "", "")]
    {
        folder.write("key", content);
        service.reload();
        assert_eq!(value_in(&service, generation, "KEY").as_deref(), Some(value), "{content:?}");
    }
    service.stop();
}

#[test]
fn a_secret_that_other_users_can_read_or_write_is_refused() {
    let (addr, folder) = (free_address(), Folder::new());
    for mode in [0o604, 0o602] {
        let file = folder.write_with("key", SECRET, mode);
        let service = Service::run(&format!("-n 2 --secret KEY={file}"), &naive(addr));
        assert_start_fails(service, &format!("{file} can be read or written by other users"));
    }
    let file = folder.write_with("key", SECRET, 0o640);
    let mut service = Service::run_ready(&format!("-n 2 --secret KEY={file}"), &naive(addr));
    folder.write_with("key", "changed", 0o644);
    assert_reload_fails(&service, addr, &format!("{file} can be read or written by other users"));
    fs::remove_file(&file).expect("remove the secret");
    assert_reload_fails(&service, addr, &format!("{file}: No such file or directory"));
    assert_eq!(value_in(&service, 1, "KEY").as_deref(), Some(SECRET));
    service.stop();
}

#[test]
fn a_secret_is_in_no_log_no_command_line_and_not_in_reuse_runs_environment() {
    let (addr, folder) = (free_address(), Folder::new());
    let secret = folder.write("key", &format!("{SECRET}\n"));
    let env_file = folder.write("env", &format!("PASSWORD={SECRET}\n"));
    let options = format!("-n 2 --secret KEY={secret} --env-file {env_file}");
    let mut command = reuse_run_with(&options, &naive(addr));
    command.env("REUSE_RUN_LOG", "debug");
    let mut service = Service::spawn_ready(command);
    service.reload();
    replace_one(&service);
    for name in ["KEY", "PASSWORD"] {
        assert_eq!(value_in(&service, 2, name).as_deref(), Some(SECRET), "{name}");
    }
    fs::remove_file(&secret).expect("remove the secret");
    service.failing_reload();
    let shown =
        |file: String| String::from_utf8_lossy(&fs::read(file).expect("read from /proc")).into_owned();
    let wrapper = service.pid();
    assert!(!shown(format!("/proc/{wrapper}/environ")).contains("hunter2"));
    for pid in service.workers().into_iter().chain([wrapper]) {
        let line = shown(format!("/proc/{pid}/cmdline"));
        assert!(line.contains("server") && !line.contains("hunter2"), "{line}");
    }
    service.stop();
    assert!(service.log.text().contains("started"), "the level is debug: {}", service.log.text());
    for text in [service.log.text(), service.out.text()] {
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[test]
fn reuse_run_dumps_no_core_when_it_has_read_values() {
    let folder = Folder::new();
    let (secret, env_file) = (folder.write("key", SECRET), folder.write("env", "A=1\n"));
    for (options, leaves_a_core) in [
        (String::new(), true),
        (format!("--secret KEY={secret}"), false),
        (format!("--env-file {env_file}"), false),
    ] {
        let addr = free_address();
        let text = r#"ulimit -c unlimited && exec "$0" "$@""#;
        let mut command = behind_shell(text, &options, &naive(addr));
        command.current_dir(&folder.0);
        let mut service = Service::spawn_ready(command);
        service.signal(Signal::SIGABRT);
        let status = service.wait_exit();
        assert_eq!(status.signal(), Some(Signal::SIGABRT as i32), "{options}: {status:?}");
        assert_eq!(status.core_dumped(), leaves_a_core, "{options:?}: {status:?}");
    }
}

#[test]
fn a_user_may_run_reuse_run_with_secrets_and_their_other_processes_cannot_read_them() {
    needs_other_users!();
    let (addr, user) = (free_address(), User::new());
    let secret = user.folder.write("key", SECRET);
    chown(&secret, Some(user.id), Some(user.id)).expect("chown");
    let worker = [user.server(), "--listen".to_owned(), addr.to_string()];
    let options = arguments(&format!("-n 2 --secret KEY={secret}"), &worker);
    let mut service = Service::spawn_ready(user.command(&[], &options));
    reload_under_load(&service, LoadOptions::new(addr, 16), 2);
    assert_eq!(value_in(&service, 3, "KEY").as_deref(), Some(SECRET));

    let may_read = |pid: u32| {
        let mut cat = Command::new("cat");
        cat.arg(format!("/proc/{pid}/environ")).uid(user.id).gid(user.id).current_dir("/");
        cat.output().expect("run cat").status.success()
    };
    assert!(!may_read(service.pid()), "reuse-run itself");
    assert!(may_read(service.workers()[0]), "a worker");
    service.stop();
}
