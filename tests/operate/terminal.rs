//! `reload` at a terminal.

use std::process::Command;

use crate::common::{DEADLINE, Folder, Service, reuse_run, wait_until};

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
