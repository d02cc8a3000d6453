//! Which reuse-run a command speaks to, and who may use it.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::SocketAddr;
use std::process::Command;

use serde_json::Value;

use crate::common::{
    DEADLINE, Outcome, Service, User, arguments, behind, free_address, get, naive, needs_other_users,
    own_network, reuse_run, run, run_words, status, wait_until,
};

/// Runs `reuse-run WORDS` as another user.
pub fn run_as(user: &User, words: &str) -> Outcome {
    let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    Outcome::of(Service::spawn(user.command(&[], &words)))
}

#[test]
fn when_no_reuse_run_is_running_a_command_says_so_and_exits_with_1() {
    own_network();
    for words in ["status", "reload", "scale 2", "stop"] {
        run_words(words).assert_failed(&["no reuse-run is running here"]);
    }
    let outcome = run_words(&format!("status {}", std::process::id()));
    outcome.assert_failed(&["is not a reuse-run that can be reached"]);
}

#[test]
fn a_command_finds_the_only_reuse_run_and_names_all_when_there_are_several() {
    own_network();
    let mut first = Service::run_ready("-n 1", &naive(free_address()));
    run_words("reload").assert_done("1 worker of generation 2 serve");
    let mut second = Service::run_ready("-n 1", &naive(free_address()));
    for words in ["status --json", "reload", "scale 2", "stop"] {
        let outcome = run_words(words);
        assert_eq!((outcome.code, outcome.out.as_str()), (Some(2), ""), "{outcome:?}");
        for pid in [first.pid(), second.pid()] {
            let named = |line: &str| line.contains(&pid.to_string()) && line.contains("--listen");
            assert!(outcome.err.lines().any(named), "{pid} in {outcome:?}");
        }
    }
    first.stop();
    assert_eq!(run_words("status").code, Some(0));
    second.stop();
}

#[test]
fn a_command_finds_a_reuse_run_by_its_name_and_status_shows_all() {
    own_network();
    let mut web = Service::run_ready("-n 2 --name web", &naive(free_address()));
    let mut api = Service::run_ready("-n 1 --name api", &naive(free_address()));
    let mut other = Service::run_ready("-n 1", &naive(free_address()));
    run_words("reload web").assert_done("2 workers of generation 2 serve");
    run_words("scale 2 api").assert_done("2 workers of generation 1 serve");
    run_words("recycle 0 --pid api").assert_done("2 workers of generation 1 serve");
    let shown: Value = serde_json::from_str(&run_words("status --json web").out).expect("JSON");
    assert_eq!((&shown["name"], &shown["pid"]), (&"web".into(), &web.pid().into()));
    assert!(run_words("status web").out.contains(&format!(", web, pid {}: serving", web.pid())));

    let outcome = run_words("status");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let expected = [(&web, "web", "2/2", 2), (&api, "api", "2/2", 1), (&other, "-", "1/1", 1)];
    for (service, name, ready, generation) in expected {
        let start =
            [&service.pid().to_string(), name, "serving", ready, &generation.to_string()].map(str::to_owned);
        let is_its = |line: &str| line.split_whitespace().take(5).eq(start.iter().map(String::as_str));
        assert!(outcome.out.lines().any(is_its), "{start:?} in {}", outcome.out);
    }
    run_words("reload mail").assert_failed(&["no reuse-run with the name mail is running here"]);
    let mut again = Service::run("-n 1 --name web", &naive(free_address()));
    assert_eq!(again.wait_end().code(), Some(1));
    assert_eq!(again.descendants(), [0u32; 0]);
    again.wait_for_line(&format!(
        "can't start: process {} is a reuse-run with the name web already",
        web.pid()
    ));
    web.stop();
    let mut again = Service::run_ready("-n 1 --name web", &naive(free_address()));
    run_words("stop web").assert_done("stopped");
    assert_eq!(again.wait_end().code(), Some(0));
    api.stop();
    other.stop();
}

#[test]
fn of_two_that_start_at_once_with_one_name_one_serves() {
    own_network();
    for _ in 0..20 {
        let start = || Service::run("--name web --ready 0s --stop-signal TERM", &["sleep", "1000"]);
        let mut services = [start(), start()];
        let said = |service: &Service, what: &str| service.log.count_of(what) == 1;
        let is_settled = |service: &Service| said(service, "is ready") || said(service, "already");
        wait_until("each has started or given up", DEADLINE, || services.iter().all(is_settled));
        services.sort_by_key(|service| said(service, "already"));
        let [one, other] = &mut services;
        assert!(said(one, "is ready"), "{}{}", one.log.text(), other.log.text());
        assert_eq!(other.wait_end().code(), Some(1), "{}", other.log.text());
        one.stop();
    }
}

#[test]
fn a_socket_of_another_process_gives_a_reuse_run_no_name() {
    own_network();
    let mut service = Service::run_ready("-n 1 --name web", &naive(free_address()));
    let namespace = fs::metadata("/proc/self/ns/pid").expect("a PID namespace").ino();
    let name = format!("reuse-run/{namespace}/{}/old", service.pid());
    let name = SocketAddr::from_abstract_name(name).expect("a name");
    let _other = std::os::unix::net::UnixListener::bind_addr(&name).expect("take the name");
    for words in ["stop old", "status old"] {
        run_words(words).assert_failed(&["no reuse-run with the name old is running here"]);
    }
    let mut old = Service::run_ready("-n 1 --name old", &naive(free_address()));
    run_words("reload old").assert_done("1 worker of generation 2 serve");
    old.stop();
    assert_eq!(run_words("status web").code, Some(0));
    service.stop();
}

#[test]
fn a_socket_with_the_name_of_pid_1s_is_not_mistaken_for_it() {
    own_network();
    let namespace = fs::metadata("/proc/self/ns/pid").expect("a PID namespace").ino();
    let name = SocketAddr::from_abstract_name(format!("reuse-run/{namespace}/1")).expect("a name");
    let _other = std::os::unix::net::UnixListener::bind_addr(&name).expect("take the name");
    run_words("status 1").assert_failed(&["process 1 is not a reuse-run of this user"]);
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    run_words("reload").assert_done("1 worker of generation 2 serve");
    service.stop();
}

#[test]
fn pid_1_of_a_pid_namespace_is_found_first() {
    own_network();
    let addr = free_address();
    let unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--"];
    let container = Service::spawn_ready(behind(&unshare, "-n 1", &naive(addr)));
    let inside = |words: &[String]| {
        let mut nsenter = Command::new("nsenter");
        nsenter.args([&format!("--target={}", container.workers()[0]), "--pid", "--mount", "--"]);
        nsenter.arg(reuse_run().get_program()).args(words).env_remove("REUSE_RUN_LOG");
        Service::spawn(nsenter)
    };
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let other = inside(&arguments("-n 1", &naive(free_address())));
    other.wait_until_ready();
    Outcome::of(inside(&words("reload"))).assert_done("1 worker of generation 2 serve");
    assert_eq!(get(addr).generation, Some(2));
    let shown: Value = serde_json::from_str(&Outcome::of(inside(&words("status --json"))).out).expect("JSON");
    assert_eq!(shown["pid"], 1);
    run_words("status").assert_failed(&["no reuse-run is running here"]);
}

#[test]
fn a_user_finds_their_reuse_run_and_root_commands_it_even_when_it_has_secrets() {
    needs_other_users!();
    own_network();
    let user = User::new();
    let secret = user.folder.path("secret");
    fs::write(&secret, "open sesame").expect("write a secret");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o400)).expect("keep it");
    std::os::unix::fs::chown(&secret, Some(user.id), Some(user.id)).expect("give it away");
    let addr = free_address().to_string();
    let worker = [&user.server(), "--listen", &addr];
    let options = format!("-n 1 --secret WORD={secret}");
    let service = Service::spawn_ready(user.command(&[], &arguments(&options, &worker)));
    run_as(&user, "reload").assert_done("1 worker of generation 2 serve");
    assert_eq!(run_as(&user, &format!("status {}", service.pid())).code, Some(0));
    run(&service, "reload").assert_done("1 worker of generation 3 serve");
    run(&service, "stop").assert_done("stopped");
}

#[test]
fn another_user_may_not_command_roots_reuse_run() {
    needs_other_users!();
    own_network();
    let user = User::new();
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    for words in ["status", "reload", "stop", "scale 2"] {
        for words in [words.to_owned(), format!("{words} {}", service.pid())] {
            let outcome = run_as(&user, &words);
            assert_eq!((outcome.code, outcome.out.as_str()), (Some(1), ""), "{outcome:?}");
            assert_eq!(outcome.err.lines().count(), 1, "{outcome:?}");
        }
    }
    assert_eq!(status(&service)["generation"], 1);
    assert_eq!(service.workers().len(), 1);
    service.stop();
}
