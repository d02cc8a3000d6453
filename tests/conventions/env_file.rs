//! `--env-file`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::common::{Folder, Service, free_address, get, naive, reuse_run_with};
use crate::{SECRET, assert_reload_fails, assert_start_fails, replace_one, value_in};

#[test]
fn each_generation_has_the_variables_that_the_env_file_holds_at_its_start() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "CHANGED=one\nREMOVED=here\n");
    let mut service = Service::run_ready(&format!("-n 2 --env-file {file}"), &naive(addr));
    let found = |generation| {
        ["CHANGED", "REMOVED", "ADDED"].map(|name| value_in(&service, generation, name).unwrap_or_default())
    };
    assert_eq!(found(1), ["one", "here", ""]);
    folder.write("env", "# a comment\nCHANGED=two\n\nexport ADDED='new here'\n");
    service.reload();
    assert_eq!(found(2), ["two", "", "new here"]);
    assert_eq!(value_in(&service, 2, "REMOVED"), None);
    service.stop();
}

#[test]
fn a_restarted_worker_has_the_environment_of_its_generation() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "RELEASE=one\n");
    let secret = folder.write("key", "first");
    let options = format!("-n 2 --env-file {file} --secret KEY={secret}");
    let mut service = Service::run_ready(&options, &naive(addr));
    folder.write("env", "RELEASE=two\n");
    folder.write("key", "second");
    replace_one(&service);
    assert_eq!(value_in(&service, 1, "RELEASE").as_deref(), Some("one"));
    assert_eq!(value_in(&service, 1, "KEY").as_deref(), Some("first"));
    service.reload();
    assert_eq!(value_in(&service, 2, "RELEASE").as_deref(), Some("two"));

    // A failed reload doesn't change that, and neither does a missing file.
    folder.write("env", "not a variable\n");
    service.failing_reload();
    fs::remove_file(&secret).expect("remove the secret");
    replace_one(&service);
    assert_eq!(value_in(&service, 2, "RELEASE").as_deref(), Some("two"));
    assert_eq!(value_in(&service, 2, "KEY").as_deref(), Some("second"));
    service.stop();
}

#[test]
fn of_two_env_files_the_later_one_wins() {
    let (addr, folder) = (free_address(), Folder::new());
    let (a, b) = (folder.write("a", "BOTH=a\nA=a\n"), folder.write("b", "BOTH=b\nB=b\n"));
    let mut service = Service::run_ready(&format!("-n 1 --env-file {a} --env-file={b}"), &naive(addr));
    assert_eq!(
        ["BOTH", "A", "B"].map(|name| value_in(&service, 1, name).unwrap_or_default()),
        ["b", "a", "b"]
    );
    service.stop();
}

#[test]
fn a_variable_of_an_env_file_replaces_the_one_of_reuse_run() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "GIVEN=file\n");
    let mut command = reuse_run_with(&format!("-n 1 --env-file {file}"), &naive(addr));
    command.env("GIVEN", "outside");
    let mut service = Service::spawn_ready(command);
    assert_eq!(value_in(&service, 1, "GIVEN").as_deref(), Some("file"));
    folder.write("env", "");
    service.reload();
    assert_eq!(value_in(&service, 2, "GIVEN").as_deref(), Some("outside"));
    service.stop();
}

#[test]
fn an_env_file_may_set_the_instance_of_node() {
    let folder = Folder::new();
    let env = folder.write("env", "NODE_APP_INSTANCE=\n");
    let mut service = Service::run_ready(&format!("--env-file {env}"), &naive(free_address()));
    assert_eq!(value_in(&service, 1, "NODE_APP_INSTANCE").as_deref(), Some(""));
    folder.write("env", "");
    service.reload();
    assert_eq!(value_in(&service, 2, "NODE_APP_INSTANCE").as_deref(), Some("0"));
    service.stop();
}

#[test]
fn when_an_env_file_is_missing_or_wrong_the_reload_is_abandoned() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "A=1\n");
    let mut command = reuse_run_with(&format!("-n 2 --env-file {file}"), &naive(addr));
    command.env("REUSE_RUN_LOG", "debug");
    let mut service = Service::spawn_ready(command);

    fs::remove_file(&file).expect("remove the file");
    assert_reload_fails(&service, addr, &format!("{file}: No such file or directory"));
    for (content, line) in [
        (format!("A=2\n\n# comment\nPASSWORD {SECRET}\nB=3\n"), 4),
        (format!("A=2\nB=3\nPASSWORD='{SECRET}\nC=4\n"), 3),
        (format!("A=2\nPASSWORD={SECRET} or so\n"), 2),
        (format!("A=2\nTEXT=\"two\nlines\"\nPASSWORD=\"{SECRET}\" or so\n"), 4),
    ] {
        folder.write("env", &content);
        assert_reload_fails(&service, addr, &format!("{file}:{line}: "));
    }
    assert_eq!(value_in(&service, 1, "A").as_deref(), Some("1"));

    folder.write("env", &format!("A=3\nPASSWORD={SECRET}\n"));
    service.reload();
    assert_eq!(get(addr).generation.map(|g| value_in(&service, g, "A")), Some(Some("3".to_owned())));
    service.stop();
    assert!(!service.log.text().contains("hunter2"), "{}", service.log.text());
}

#[test]
fn when_an_env_file_is_missing_or_wrong_the_start_fails_with_one_line_and_status_1() {
    let (addr, folder) = (free_address(), Folder::new());
    let missing = folder.path("missing");
    let service = Service::run(&format!("-n 2 --env-file {missing}"), &naive(addr));
    assert_start_fails(service, &format!("{missing}: No such file or directory"));
    let wrong = folder.write("wrong", &format!("A=1\nPASSWORD {SECRET}\n"));
    let service = Service::run(&format!("-n 2 --env-file {wrong}"), &naive(addr));
    let log = assert_start_fails(service, &format!("{wrong}:2: "));
    assert!(!log.contains("hunter2"), "{log}");
}

#[test]
fn an_env_file_may_begin_with_a_byte_order_mark() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "\u{feff}FIRST=1\r\nSECOND=2\n");
    let mut service = Service::run_ready(&format!("-n 1 --env-file {file}"), &naive(addr));
    assert_eq!(value_in(&service, 1, "FIRST").as_deref(), Some("1"));
    assert_eq!(value_in(&service, 1, "SECOND").as_deref(), Some("2"));
    service.stop();
}

#[test]
fn for_a_value_with_spaces_and_without_quotes_the_error_names_file_line_and_remedy() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write("env", "A=1\nGREETING=good morning\n");
    let service = Service::run(&format!("-n 1 --env-file {file}"), &naive(addr));
    let log = assert_start_fails(service, &format!("{file}:2: "));
    assert!(log.contains("with spaces in quotes"), "{log}");
}

#[test]
fn only_regular_files_are_read_and_others_hold_up_nothing() {
    let (addr, folder) = (free_address(), Folder::new());
    let place = folder.path("place");
    let fifo = || mkfifo(Path::new(&place), Mode::S_IRUSR).expect("make a FIFO");
    let directory = || fs::create_dir(&place).expect("make a folder");
    let device = || symlink("/dev/zero", &place).expect("make a link");
    let makes: [&dyn Fn(); 3] = [&fifo, &directory, &device];
    for option in ["--env-file ", "--secret KEY="] {
        let options = format!("-n 1 {option}{place}");
        for make in makes {
            make();
            let service = Service::run(&options, &naive(addr));
            assert_start_fails(service, &format!("{place}: not a regular file"));
            let _ = fs::remove_file(&place).or_else(|_| fs::remove_dir(&place));
        }
        folder.write("place", "A=1\n");
        let mut service = Service::run_ready(&options, &naive(addr));
        for make in makes {
            let _ = fs::remove_file(&place).or_else(|_| fs::remove_dir(&place));
            make();
            assert_reload_fails(&service, addr, &format!("{place}: not a regular file"));
        }
        service.stop();
        fs::remove_file(&place).expect("remove the link");
    }
}

#[test]
fn a_warning_names_an_env_file_that_other_users_can_read() {
    let (addr, folder) = (free_address(), Folder::new());
    let file = folder.write_with("env", "A=1\n", 0o644);
    let mut service = Service::run_ready(&format!("-n 2 --env-file {file}"), &naive(addr));
    assert_eq!(service.log.count_of(&format!("{file} can be read")), 1, "{}", service.log.text());
    service.stop();
}
