//! Man pages and completions.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::common::{Folder, reuse_run};
use crate::{here, run};

/// What is typed before Tab, and what its last word becomes. `[folder]` is a folder that holds `app.env`.
const COMPLETED: [(&str, &str); 21] = [
    ("reuse-run --bal", "--balance"),
    ("reuse-run --balance q", "queue"),
    ("reuse-run -n 4 --ready n", "notify"),
    ("reuse-run --balance=q", "--balance=queue"),
    ("reuse-run --workers=2 --bal", "--balance"),
    ("reuse-run -l 127.0.0.1:3000 --bal", "--balance"),
    ("reuse-run --ready :3000/x --bal", "--balance"),
    ("reuse-run --secret A=[folder]/app.env --bal", "--balance"),
    ("reuse-run --secret A=[folder]/ap", "A=[folder]/app.env"),
    ("reuse-run -n m", "max"),
    ("reuse-run --env-file [folder]/ap", "[folder]/app.env"),
    ("reuse-run -C [folder]/fo", "[folder]/folder"),
    ("reuse-run relo", "reload"),
    ("reuse-run reload --can", "--canary"),
    ("reuse-run status --j", "--json"),
    ("reuse-run recycle --a", "--all"),
    ("reuse-run -n 4 relo", "relo"),
    ("reuse-run -n 4 busybo", "busybox"),
    ("reuse-run -n 4 -- busybo", "busybox"),
    ("reuse-run reload --no-wait -- busybo", "busybox"),
    ("reuse-run -- node [folder]/ap", "[folder]/app.env"),
];

/// Man pages and completions of the reuse-run under test.
fn made() -> Folder {
    let folder = Folder::new();
    let binary = reuse_run().get_program().to_owned();
    run(Command::new(here("scripts/manuals")).arg(binary).arg(&folder.0));
    fs::create_dir_all(folder.path("files/folder")).expect("make a folder");
    folder.write("files/app.env", "");
    folder
}

/// Asserts that a shell completes each line, given a function that returns what becomes of one.
#[track_caller]
fn assert_completes(folder: &Folder, complete: impl Fn(&str) -> String) {
    for (typed, completed) in COMPLETED {
        let [typed, completed] = [typed, completed].map(|it| it.replace("[folder]", &folder.path("files")));
        let (before, _) = typed.rsplit_once(' ').expect("several words");
        let line = complete(&typed);
        // Shells end a word, an option and a folder, each in its own way.
        assert_eq!(line.trim_end_matches(['/', ' ', '=']), format!("{before} {completed}"), "{typed}");
    }
}

/// Types a line, Tab and Ctrl-G at a shell in a terminal. Its start-up file has Ctrl-G print the line.
#[track_caller]
fn type_at(shell: &str, folder: &Folder, line: &str) -> String {
    let mut terminal = Command::new("timeout");
    terminal.args(["60", "script", "--quiet", "--return", "--command", shell, "/dev/null"]);
    terminal.env("ZDOTDIR", &folder.0).env("TERM", "dumb").env("HOME", &folder.0);
    let terminal = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start a terminal");
    write!(terminal.stdin.as_ref().expect("stdin"), "{line}\t\x07").expect("type");
    let output = terminal.wait_with_output().expect("the end of the shell");
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.rsplit_once("line=<").and_then(|(_, rest)| rest.split('>').next());
    line.unwrap_or_else(|| panic!("{shell}: {text}")).to_owned()
}

#[test]
fn bash_completes_options_values_commands_and_programs() {
    let folder = made();
    let file = folder.path("completions/reuse-run.bash");
    let show = r#"show() { printf 'line=<%s>\n' "$READLINE_LINE"; exit; }"#;
    let start = folder.write("bashrc", &format!("source {file}\n{show}\nbind -x '\"\\C-g\": show'\n"));
    let shell = format!("bash --rcfile {start} -i");
    assert_completes(&folder, |line| type_at(&shell, &folder, line));
}

#[test]
fn zsh_completes_options_values_commands_and_programs() {
    let folder = made();
    let functions = folder.path("completions");
    let lines = [
        &format!("fpath=({functions} $fpath)"),
        "autoload -Uz compinit; compinit -u -D",
        r#"show() { print -r -- "line=<$BUFFER>"; exit }"#,
        "zle -N show; bindkey '^G' show",
    ];
    folder.write(".zshrc", &lines.join("\n"));
    assert_completes(&folder, |line| type_at("zsh -i", &folder, line));
}

#[test]
fn fish_completes_options_values_commands_and_programs() {
    let folder = made();
    let file = folder.path("completions/reuse-run.fish");
    assert_completes(&folder, |line| {
        let script = format!("source {file}; complete -C '{line}'");
        let found = run(Command::new("fish").args(["-c", &script]).env("HOME", &folder.0));
        let (before, last) = line.rsplit_once(' ').expect("several words");
        // It also finds words that contain the last one, and shows them after those that begin with it.
        let words = found.lines().filter_map(|line| line.split('\t').next());
        let mut words = words.filter(|word| word.starts_with(last));
        let word = words.next().unwrap_or(last);
        assert_eq!(words.next(), None, "{line}: {found}");
        format!("{before} {word}")
    });
}

#[test]
fn reuse_run_and_each_command_has_a_man_page_without_fault() {
    let folder = made();
    let pages = fs::read_dir(folder.path("man/man1")).expect("pages").map(|entry| entry.expect("a page"));
    let mut names: Vec<String> = pages.map(|page| page.file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    let commands = ["-recycle", "-reload", "-scale", "-status", "-stop", ""];
    assert_eq!(names, commands.map(|command| format!("reuse-run{command}.1")));
    for name in &names {
        let page = folder.path(&format!("man/man1/{name}"));
        let output = Command::new("mandoc").args(["-T", "lint", &page]).output().expect("run mandoc");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // The other pages aren't installed.
        let is_other = |line: &str| line.contains("manual not found: Xr reuse-run");
        let faults: Vec<&str> = text.lines().filter(|line| !is_other(line)).collect();
        assert!(faults.is_empty(), "{name}: {faults:#?}");
        let text = words(&printed(&run(Command::new("mandoc").args(["-T", "ascii", &page]))));
        let command = name.trim_end_matches(".1").trim_start_matches("reuse-run").trim_start_matches('-');
        let help = run(reuse_run().args(command.split_whitespace()).arg("--help"));
        // A row of a table begins with two blanks, and its other lines with more.
        for row in help.replace("\n   ", " ").lines().filter(|line| line.starts_with("  ")).map(words) {
            assert!(text.contains(&row), "{name} has no {row:?}: {text}");
        }
    }
}

/// A text for a printer, in which bold letters are printed twice, as it looks.
fn printed(text: &str) -> String {
    let mut looks = String::new();
    for c in text.chars() {
        match c {
            '\u{8}' => drop(looks.pop()),
            c => looks.push(c),
        }
    }
    looks
}

/// A text with one blank between each two words.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
