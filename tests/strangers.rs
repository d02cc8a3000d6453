//! Other users of the machine, and processes in other namespaces. Nobody but its own user and root can make reuse-run wait,
//! act or lie.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{
    DEADLINE, Outcome, Service, User, arguments, behind, control_name, free_address, get, naive,
    needs_other_users, own_network, reuse_run, run, run_words, status, stranger, stranger_behind, wait_until,
};
use nix::sys::signal::Signal;

const STOP: &str = r#"{"version":1,"request":{"stop":{"wait":true}}}"#;

/// What a stranger got as an answer.
#[track_caller]
fn answer(stranger: &Service) -> String {
    stranger.wait_for_output("answer:").text
}

/// Asserts that reuse-run refuses a request to stop with this reason, and serves.
#[track_caller]
fn assert_refuses(service: &Service, stranger: &Service, why: &str) {
    let answer = answer(stranger);
    assert!(answer.contains("failed") && answer.contains(why), "{answer:?}");
    assert_eq!(service.log.count_of("stop"), 0, "{}", service.log.text());
    assert_eq!(run(service, "status").code, Some(0));
}

// Whom the control socket answers.

#[test]
fn the_control_socket_refuses_other_users() {
    needs_other_users!();
    own_network();
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let stranger = stranger(&["ask", &control_name(service.pid()), STOP]);
    assert_refuses(&service, &stranger, "another user's");
    service.stop();
}

#[test]
fn the_control_socket_refuses_processes_of_other_pid_namespaces() {
    own_network();
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let name = control_name(service.pid());
    for prefix in [
        &["unshare", "--pid", "--fork", "--kill-child"][..],
        &["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"],
        // One namespace more between.
        &["unshare", "--pid", "--fork", "--kill-child", "unshare", "--pid", "--fork", "--kill-child"],
    ] {
        let stranger = stranger_behind(prefix, &["ask", &name, STOP]);
        assert_refuses(&service, &stranger, "another PID or user namespace");
    }
    service.stop();
}

#[test]
fn the_control_socket_of_a_pid_namespace_refuses_processes_outside_of_it() {
    own_network();
    let unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--"];
    let container = Service::spawn_ready(behind(&unshare, "-n 1", &naive(free_address())));
    let init = container.workers()[0];
    let namespace = std::fs::read_link(format!("/proc/{init}/ns/pid")).expect("its PID namespace");
    let namespace = namespace.to_string_lossy().replace("pid:[", "").replace(']', "");
    let stranger = stranger_behind(&[], &["ask", &format!("reuse-run/{namespace}/1"), STOP]);
    let answer = answer(&stranger);
    assert!(answer.contains("another PID or user namespace"), "{answer}");
}

#[test]
fn the_control_socket_refuses_processes_of_other_user_namespaces() {
    needs_other_users!();
    own_network();
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    let name = control_name(service.pid());
    let ask = ["ask", &name, STOP];
    for stranger in [
        stranger_behind(&["unshare", "--user", "--map-root-user"], &ask),
        stranger_behind(&["unshare", "--user"], &ask),
        stranger_behind(&[], &[&["--user-namespace"], &ask[..]].concat()),
    ] {
        assert_refuses(&service, &stranger, "another PID or user namespace");
    }
    service.stop();
}

/// In a user namespace each user without a number there looks like 65534.
#[test]
fn a_reuse_run_of_nobody_in_a_user_namespace_refuses_users_without_a_number() {
    needs_other_users!();
    own_network();
    let unshare = ["unshare", "--user", "--map-user=65534", "--map-group=65534", "--"];
    let service = Service::spawn_ready(behind(&unshare, "-n 1", &naive(free_address())));
    let stranger = stranger(&["ask", &control_name(service.pid()), STOP]);
    let refused = answer(&stranger);
    assert!(refused.contains("another PID or user namespace"), "{refused}");
    let mut inside = Command::new("nsenter");
    inside.args(["--user", "--preserve-credentials", &format!("--target={}", service.pid())]);
    inside.arg(reuse_run().get_program()).args(["status", &service.pid().to_string()]);
    let outcome = Outcome::of(Service::spawn(inside));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    service.signal(Signal::SIGTERM);
}

/// Its PID may be another process's by now (SO_PEERPIDFD tells, since Linux 6.5).
#[test]
fn a_client_whose_process_has_ended_is_refused() {
    own_network();
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    service.signal(Signal::SIGSTOP);
    let stranger = stranger_behind(&[], &["ask-by-another", &control_name(service.pid()), STOP]);
    stranger.wait_for_output("connected");
    service.signal(Signal::SIGCONT);
    assert_refuses(&service, &stranger, "failed");
    service.stop();
}

#[test]
fn a_flood_of_refused_clients_keeps_no_command_waiting() {
    needs_other_users!();
    own_network();
    let addr = free_address();
    let mut service = Service::run_ready("-n 1", &naive(addr));
    let strangers = [(); 2].map(|()| stranger(&["flood", &control_name(service.pid())]));
    strangers.iter().for_each(|stranger| drop(stranger.wait_for_output("floods")));
    let begun = Instant::now();
    for _ in 0..5 {
        assert_eq!(run(&service, "status").code, Some(0));
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    run(&service, "reload").assert_done("1 worker of generation 2 serve");
    drop(strangers);
    get(addr);
    service.stop();
}

#[test]
fn a_name_that_another_user_has_taken_keeps_no_reuse_run_from_being_commanded() {
    needs_other_users!();
    own_network();
    let addr = free_address();
    // Until the stranger has the name, reuse-run must not ask for it.
    let shell = ["sh", "-c", r#"echo "pid $$"; read -r go <"$0"; exec "$@""#];
    let folder = common::Folder::new();
    let fifo = folder.path("go");
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
    let mut service = Service::spawn(behind(&[&shell[..], &[&fifo]].concat(), "-n 1", &naive(addr)));
    service.wait_for_output("pid ");
    let stranger = stranger(&["listen", &control_name(service.pid())]);
    stranger.wait_for_output("listens");
    std::fs::write(&fifo, "go\n").expect("let it go");
    service.wait_until_ready();
    run(&service, "reload").assert_done("1 worker of generation 2 serve");
    run_words("reload").assert_done("1 worker of generation 3 serve");
    assert_eq!(status(&service)["generation"], 3);
    service.stop();
}

#[test]
fn a_claim_that_another_user_has_made_keeps_no_reuse_run_from_having_a_name() {
    needs_other_users!();
    own_network();
    let claim = control_name(0).replace("/0", &format!("/name/{}/web", nix::unistd::geteuid()));
    let stranger = stranger(&["listen", &claim]);
    stranger.wait_for_output("listens");
    let begun = Instant::now();
    let mut service = Service::run_ready("-n 1 --name web", &naive(free_address()));
    assert!(begun.elapsed() >= Duration::from_secs(1), "it has waited for the claim");
    run_words("reload web").assert_done("1 worker of generation 2 serve");
    let mut again = Service::run("-n 1 --name web", &naive(free_address()));
    assert_eq!(again.wait_end().code(), Some(1));
    again.wait_for_line(&format!("process {} is a reuse-run with the name web already", service.pid()));
    service.stop();
}

// What a command believes.

/// Starts a stranger that has taken names which may belong to a reuse-run of this user, and asserts that no command takes it
/// for one.
#[track_caller]
fn assert_is_not_believed(what: &str) {
    own_network();
    let (own, none) = (std::process::id(), 4_000_000);
    let names = [1, own, none].map(control_name);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let stranger = stranger(&[&[what], &names[..]].concat());
    stranger.wait_for_output("listens");
    for pid in [1, own, none] {
        let outcome = run_words(&format!("status {pid}"));
        assert_eq!((outcome.code, outcome.out.as_str()), (Some(1), ""), "{outcome:?}");
        assert!(outcome.err.contains(&format!("process {pid} ")), "{outcome:?}");
        assert!(!outcome.err.contains("impostor"), "{outcome:?}");
    }
    for words in ["status", "reload", "scale 2", "stop"] {
        run_words(words).assert_failed(&["no reuse-run is running here"]);
    }
    let mut service = Service::run_ready("-n 1", &naive(free_address()));
    assert_eq!(run(&service, "status").code, Some(0));
    run_words("reload").assert_done("1 worker of generation 2 serve");
    service.stop();
}

#[test]
fn a_command_believes_no_socket_of_another_user_whatever_its_name() {
    needs_other_users!();
    assert_is_not_believed("listen");
}

#[test]
fn a_command_does_not_wait_for_the_full_queue_of_another_user() {
    needs_other_users!();
    assert_is_not_believed("fill");
}

/// Root may name any process, also one that isn't a reuse-run at all.
#[test]
fn root_sees_no_control_character_of_a_process_that_it_has_named() {
    needs_other_users!();
    own_network();
    let stranger = stranger(&["listen", &control_name(0).replace("/0", "/{pid}")]);
    stranger.wait_for_output("listens");
    for words in ["status", "status --json", "reload", "stop --no-wait"] {
        let outcome = run_words(&format!("{words} {}", stranger.pid()));
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        let shown = format!("{}{}", outcome.out, outcome.err);
        assert!(shown.contains("impostor"), "{outcome:?}");
        assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{outcome:?}");
    }
    // Without its PID root doesn't ask it.
    for words in ["status", "reload", "scale 2", "stop"] {
        let outcome = run_words(words);
        assert_eq!((outcome.code, outcome.out.as_str()), (Some(2), ""), "{outcome:?}");
        assert!(outcome.err.contains("no reuse-run of root is running here"), "{outcome:?}");
    }
}

#[test]
fn root_does_not_wait_for_ever_for_a_process_that_it_has_named() {
    needs_other_users!();
    own_network();
    let name = control_name(0).replace("/0", "/{pid}");
    for (what, most) in [("fill", 20), ("be-silent", 60)] {
        let stranger = stranger(&[what, &name]);
        stranger.wait_for_output("listens");
        let begun = Instant::now();
        run_words(&format!("status {}", stranger.pid())).assert_failed(&["does not answer"]);
        assert!(begun.elapsed() < Duration::from_secs(most), "{:?}", begun.elapsed());
    }
}

// Which one of several.

/// `reuse-run -n 1 -- server` of a user.
fn of_user(user: &User) -> Service {
    let worker = [user.server(), "--listen".to_owned(), free_address().to_string()];
    Service::spawn_ready(user.command(&[], &arguments("-n 1", &worker)))
}

fn run_as(user: &User, words: &str) -> Outcome {
    let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    Outcome::of(Service::spawn(user.command(&[], &words)))
}

#[test]
fn each_user_commands_their_own_reuse_run_and_root_another_users_by_its_pid() {
    needs_other_users!();
    own_network();
    let user = User::new();
    run_as(&user, "status").assert_failed(&["no reuse-run is running here"]);
    let users = of_user(&user);
    for words in ["status", "reload", "stop"] {
        let outcome = run_words(words);
        assert_eq!((outcome.code, outcome.out.as_str()), (Some(2), ""), "{outcome:?}");
        let pid = users.pid().to_string();
        assert!(outcome.err.contains("of root") && outcome.err.contains(&pid), "{outcome:?}");
    }
    let mut roots = Service::run_ready("-n 1", &naive(free_address()));
    run_words("reload").assert_done("1 worker of generation 2 serve");
    run_as(&user, "reload").assert_done("1 worker of generation 2 serve");
    run(&users, "reload").assert_done("1 worker of generation 3 serve");
    run_as(&user, &format!("status {}", roots.pid())).assert_failed(&["is not a reuse-run of this user"]);
    run(&users, "stop").assert_done("stopped");
    run_as(&user, "status").assert_failed(&["of this user is running here, only another user's"]);
    roots.stop();
}

#[test]
fn the_129th_command_that_waits_is_told_so() {
    own_network();
    let folder = common::Folder::new();
    let mut service = Service::run_ready("-n 1", &folder.server(free_address(), &[]));
    folder.raise("hold-2-0");
    let reload = r#"{"version":1,"request":{"reload":{"how":null,"wait":true}}}"#;
    let waiting: Vec<UnixStream> = (0..128)
        .map(|_| {
            let name = SocketAddr::from_abstract_name(control_name(service.pid())).expect("a name");
            let mut stream = UnixStream::connect_addr(&name).expect("connect");
            stream.write_all(format!("{reload}\n").as_bytes()).expect("ask");
            stream
        })
        .collect();
    service.wait_for_line("starting generation 2");
    for words in ["status", "reload", "stop"] {
        run(&service, words).assert_failed(&["too many commands wait for this reuse-run"]);
    }
    drop(waiting);
    wait_until("there is room", DEADLINE, || run(&service, "status").code == Some(0));
    folder.lower("hold-2-0");
    service.wait_for_line("generation 2 serves alone");
    service.stop();
}
