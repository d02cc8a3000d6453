//! `reload` at a terminal, and the end of the terminal.

use std::fs;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::common::{
    DEADLINE, Folder, Process, Service, children, free_address, get, naive, reuse_run, send, wait_until,
};

/// A terminal (by tmux) in which a command runs.
struct Terminal {
    folder: Folder,
}

impl Terminal {
    fn run(command: &str) -> Terminal {
        let terminal = Terminal { folder: Folder::new() };
        // `cat` keeps the terminal open when the command has ended.
        let shell = format!("{command}; echo exit status $?; exec cat");
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "150", "-y", "40", &shell]);
        terminal
    }

    fn command(&self) -> Command {
        let mut command = Command::new("tmux");
        command.env_remove("TMUX").args(["-S", &self.folder.path("tmux")]);
        command
    }

    fn tmux(&self, words: &[&str]) -> String {
        let mut command = self.command();
        command.args(words);
        let output = command.output().expect("run tmux");
        assert!(output.status.success(), "tmux {words:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn lines(&self) -> Vec<String> {
        let text = self.tmux(&["capture-pane", "-p"]);
        text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.command().arg("kill-server").output();
    }
}

#[test]
fn at_a_terminal_reload_draws_a_line_for_each_worker_and_in_the_end_leaves_steps_and_result() {
    let (_, folder, mut service) = Service::with_flags("-n 2", &[]);
    folder.raise("hold-2-1");
    let program = reuse_run().get_program().to_string_lossy().into_owned();
    let terminal = Terminal::run(&format!("'{program}' reload {}", service.pid()));
    let of_worker = |line: &&String| line.starts_with("  worker ");
    let mut seen = Vec::new();
    wait_until("a line for each worker", DEADLINE, || {
        seen = terminal.lines();
        let drawn = |slot: u32, generation: u32, state: &str| {
            let is_it = |line: &&String| {
                line.starts_with(&format!("  worker {slot} (pid "))
                    && line.contains(&format!("generation {generation}): {state}"))
            };
            seen.iter().filter(of_worker).filter(is_it).count() == 1
        };
        drawn(0, 1, "ready") && drawn(1, 1, "ready") && drawn(0, 2, "ready") && drawn(1, 2, "starting for 1s")
    });
    assert_eq!(seen.iter().filter(of_worker).count(), 4, "each line is drawn once: {seen:#?}");
    folder.lower("hold-2-1");
    wait_until("the end", DEADLINE, || {
        seen = terminal.lines();
        seen.last().is_some_and(|line| line.starts_with("exit status"))
    });
    let expected = [
        "reload: starting generation 2",
        "generation 2 is ready after",
        "generation 2 serves; generation 1 drains",
        "reload done after",
        "2 workers of generation 2 serve",
        "exit status 0",
    ];
    assert_eq!(seen.len(), expected.len(), "{seen:#?}");
    for (line, part) in seen.iter().zip(expected) {
        assert!(line.starts_with(part), "{seen:#?}");
    }
    service.stop();
}

/// reuse-run at a terminal, with its log in a file.
struct AtTerminal {
    terminal: Terminal,
    files: Folder,
    pid: u32,
}

impl AtTerminal {
    /// `shell` is the script in which `REUSE_RUN` stands for the command.
    fn run(shell: &str) -> AtTerminal {
        let files = Folder::new();
        let (log, pidfile, addr) = (files.path("log"), files.path("pid"), free_address());
        let program = reuse_run().get_program().to_string_lossy().into_owned();
        let command = naive(addr).join(" ");
        let command = format!("{program} --pidfile {pidfile} -- {command} >/dev/null 2>{log}");
        let terminal = Terminal::run(&shell.replace("REUSE_RUN", &command));
        let mut pid = None;
        wait_until("the PID file", DEADLINE, || {
            pid = fs::read_to_string(&pidfile).ok().and_then(|text| text.trim().parse().ok());
            pid.is_some()
        });
        get(addr);
        AtTerminal { terminal, files, pid: pid.expect("a PID") }
    }

    fn close(&self) {
        self.terminal.tmux(&["kill-session"]);
    }

    fn wait_for_log(&self, part: &str) {
        let log = self.files.path("log");
        wait_until(part, DEADLINE, || fs::read_to_string(&log).expect("read the log").contains(part));
    }

    fn wait_for_end(&self) {
        wait_until("the end", DEADLINE, || {
            Process::read(self.pid).is_none_or(|process| process.state == 'Z')
        });
    }
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        if Process::read(self.pid).is_some_and(|process| process.state != 'Z') {
            children(self.pid).into_iter().for_each(|worker| send(worker, Signal::SIGKILL));
            send(self.pid, Signal::SIGKILL);
        }
    }
}

#[test]
fn a_sighup_reloads_at_a_terminal_until_the_terminal_is_gone_and_that_stops_everything() {
    let reuse_run = AtTerminal::run("REUSE_RUN");
    let worker = children(reuse_run.pid)[0];
    send(reuse_run.pid, Signal::SIGHUP);
    reuse_run.wait_for_log("reload done");
    assert_ne!(children(reuse_run.pid), [worker]);
    reuse_run.close();
    reuse_run.wait_for_end();
    reuse_run.wait_for_log("SIGHUP: stopping 1 worker");
}

/// A shell passes the signal on to its jobs, as an interactive one does.
#[test]
fn a_sighup_that_the_shell_of_a_closed_terminal_passes_on_stops_everything() {
    let reuse_run = AtTerminal::run("set -m; REUSE_RUN & trap 'kill -HUP $!; exit' HUP; wait");
    reuse_run.close();
    reuse_run.wait_for_end();
    reuse_run.wait_for_log("SIGHUP: stopping 1 worker");
}

#[test]
fn a_sighup_from_elsewhere_reloads_when_the_terminal_is_gone() {
    let reuse_run = AtTerminal::run("set -m; REUSE_RUN & wait");
    let shell =
        reuse_run.terminal.tmux(&["display-message", "-p", "#{pane_pid}"]).trim().parse().expect("a PID");
    reuse_run.close();
    wait_until("the end of the shell", DEADLINE, || Process::read(shell).is_none());
    send(reuse_run.pid, Signal::SIGHUP);
    reuse_run.wait_for_log("reload done");
    send(reuse_run.pid, Signal::SIGTERM);
    reuse_run.wait_for_end();
}
