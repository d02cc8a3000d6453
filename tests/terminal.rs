//! Terminals as stdout and stderr: one that nobody reads, and one that stops background processes that write (`stty tostop`).
#![cfg_attr(clippy, deny(warnings))]
#![allow(unsafe_code)]

mod common;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::Command;

use common::{
    DEADLINE, Folder, Lines, Service, User, arguments, assert_prompt, assert_prompt_of, behind,
    needs_other_users, run, send, terminal, ticks, unlinking, wait_until,
};
use nix::sys::signal::Signal;

/// A session that a terminal controls, in which `bash` runs a script with reuse-run's command line as "$@". Until `read` is
/// called, nobody reads the terminal.
struct Session {
    master: File,
    service: Service,
}

impl Session {
    fn new(script: &str, command: Command) -> Session {
        let (master, path) = terminal();
        let mut bash = Command::new("bash");
        bash.args(["-c", &format!("exec <{path} >{path} 2>{path}; {script}"), "bash"]);
        bash.arg(command.get_program()).args(command.get_args()).env_remove("REUSE_RUN_LOG");
        // SAFETY: setsid(2) is a system call and no more, which is all right between fork and exec.
        unsafe { bash.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
        Session { master, service: Service::spawn(bash) }
    }

    /// Reads what is written to the terminal from now on.
    fn read(&self) -> Lines {
        let lines = Lines::default();
        lines.read(self.master.try_clone().expect("a duplicate"));
        lines
    }
}

#[track_caller]
fn wait_for(lines: &Lines, part: &str) {
    let found = lines.wait_for(0, DEADLINE, |line| line.contains(part));
    assert!(found.is_some(), "no line {part:?} on the terminal:\n{}", lines.text());
}

/// As after `su`: the terminal belongs to another user, and can't be opened again.
#[test]
fn another_users_terminal_that_nobody_reads_does_not_make_reuse_run_wait() {
    needs_other_users!();
    let (user, folder) = (User::new(), Folder::new());
    std::fs::set_permissions(&folder.0, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("chmod");
    for options in ["--label -n 2 --ready notify", "-n 2 --ready notify"] {
        let _ = std::fs::remove_file(folder.path("unlinks"));
        // Others may not enter the folder of the app.
        let app = user.folder.path("unlinks.py");
        std::fs::copy(common::app("python/unlinks.py"), &app).expect("copy the app");
        let command = ["python3", &app, &folder.path("")];
        let mut session = Session::new(
            r#"REUSE_RUN_LOG=debug exec "$@""#,
            user.command(&[], &arguments(options, &command)),
        );
        wait_until("both are ready", DEADLINE, || run(&session.service, "status").code == Some(0));
        folder.raise("flood");
        assert_prompt(&session.service, &folder);
        for _ in 0..20 {
            session.service.signal(Signal::SIGCONT); // a line of the log
            run(&session.service, "status");
        }
        assert_prompt(&session.service, &folder);
        folder.lower("flood");
        let lines = session.read();
        wait_for(&lines, "a line of many");
        session.service.signal(Signal::SIGTERM);
        assert_eq!(session.service.wait_exit().code(), Some(0));
        wait_for(&lines, "SIGTERM: stopping 2 workers");
        wait_until("nothing is left", DEADLINE, || session.service.descendants().is_empty());
    }
}

#[test]
fn a_terminal_that_stops_writers_in_the_background_lets_a_background_reuse_run_write() {
    for options in ["-n 2 --ready notify", "-n 2 --ready notify --label"] {
        let folder = Folder::new();
        let script =
            r#"stty tostop; set -m; "$@" & echo "started $!"; wait; echo "ended $?"; exec sleep 600"#;
        let session = Session::new(script, behind(&["env"], options, &unlinking(&folder)));
        let lines = session.read();
        wait_for(&lines, "generation 1 is ready");
        wait_for(&lines, "begins");
        let started = lines.find(0, "started ").expect("its PID").text;
        let pid = started.trim_end().rsplit(' ').next().and_then(|pid| pid.parse().ok()).expect("a PID");
        let before = ticks(pid);
        let begun = std::time::Instant::now();
        wait_until("a second", DEADLINE, || begun.elapsed().as_secs() >= 1);
        assert!(ticks(pid) - before < 50, "it is busy");
        assert_prompt_of(pid, &folder);
        send(pid, Signal::SIGTTOU);
        wait_for(&lines, "scaling done: 1");
        send(pid, Signal::SIGTERM);
        wait_for(&lines, "ended 0");
    }
}

#[test]
fn a_terminal_that_stops_writers_in_the_background_lets_the_workers_of_a_foreground_reuse_run_write() {
    for options in ["-n 2 --ready notify", "-n 2 --ready notify --label"] {
        let folder = Folder::new();
        let command = behind(&["env"], options, &unlinking(&folder));
        let mut session = Session::new(r#"stty tostop; exec "$@""#, command);
        let lines = session.read();
        let of_workers = lines.wait_for_nth(2, 0, DEADLINE, |line| line.contains("begins"));
        assert!(of_workers.is_some(), "{}", lines.text());
        wait_for(&lines, "generation 1 is ready");
        assert_prompt(&session.service, &folder);
        session.service.signal(Signal::SIGTERM);
        assert_eq!(session.service.wait_exit().code(), Some(0), "{}", lines.text());
    }
}

/// Node gives an ignored SIGTTOU its default action again.
#[test]
fn a_worker_of_node_may_write_to_such_a_terminal_too() {
    let text = "console.log('begins'); require('net').createServer().listen(0, '127.0.0.1'); \
                require('fs').writeSync(+process.env.READY_FD, '\\n')";
    let command = behind(&["env"], "-n 1 --ready notify", &["node", "-e", text]);
    let mut session = Session::new(r#"stty tostop; exec "$@""#, command);
    let lines = session.read();
    wait_for(&lines, "begins");
    wait_for(&lines, "generation 1 is ready");
    session.service.signal(Signal::SIGTERM);
    assert_eq!(session.service.wait_exit().code(), Some(0), "{}", lines.text());
}
