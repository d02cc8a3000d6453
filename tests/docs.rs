//! README.md and docs as texts: their links lead somewhere, their figures are those of the tables, and they name each
//! option and each message.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::reuse_run;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[track_caller]
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// README.md, CHANGELOG.md and all pages of docs.
fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(here("docs")).expect("docs").map(|entry| entry.expect("a file").path());
    let docs = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    docs.chain([here("README.md"), here("CHANGELOG.md")]).collect()
}

/// A page without its code blocks.
fn prose(path: &Path) -> String {
    let (text, mut fenced) = (read(path), false);
    let mut is_prose = |line: &&str| {
        let is_fence = line.starts_with("```");
        fenced ^= is_fence;
        !is_fence && !fenced && !line.starts_with("    ")
    };
    text.lines().filter(|line| is_prose(line)).map(|line| format!("{line}\n")).collect()
}

// Links.

/// The anchors that GitHub gives the headings of a page.
fn anchors(path: &Path) -> BTreeSet<String> {
    let heading = |line: &str| line.starts_with('#').then(|| line.trim_start_matches('#').trim().to_owned());
    let anchor = |heading: String| {
        let kept = heading.to_lowercase().replace(' ', "-");
        kept.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect::<String>()
    };
    prose(path).lines().filter_map(heading).map(anchor).collect()
}

#[test]
fn every_relative_link_leads_to_a_file_and_a_heading() {
    let mut count = 0;
    for page in pages() {
        let text = prose(&page);
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { page.clone() } else { page.with_file_name(path) };
            assert!(target.exists(), "{}: no {link}", page.display());
            let found = anchor.is_empty() || anchors(&target).contains(anchor);
            assert!(found, "{}: no heading for {link}: {:?}", page.display(), anchors(&target));
            count += 1;
        }
    }
    assert!(count > 50, "{count} links");
}

#[test]
fn the_readme_names_the_oldest_rust() {
    let rust = format!("Rust {} or newer", env!("CARGO_PKG_RUST_VERSION"));
    assert!(read(&here("README.md")).contains(&rust), "no {rust:?}");
}

#[test]
fn every_page_is_linked_from_the_readme_and_says_for_whom_it_is() {
    let readme = read(&here("README.md"));
    for page in pages().iter().filter(|page| page.starts_with(here("docs"))) {
        let name = page.file_name().expect("a name").to_string_lossy().into_owned();
        assert!(readme.contains(&format!("](docs/{name}")), "the README has no link to {name}");
        let text = read(page);
        let first = text.lines().nth(2).expect("a first line");
        assert!(first.starts_with("For those who "), "{name} begins with {first:?}");
    }
}

#[test]
fn the_readmes_picture_is_small_well_formed_and_needs_no_other_file() {
    assert!(read(&here("README.md")).contains("](docs/demo.svg)"));
    let picture = read(&here("docs/demo.svg"));
    assert!(picture.len() < 20_000, "{} bytes", picture.len());
    for foreign in ["href", "<script", "url(", "@import"] {
        assert!(!picture.contains(foreign), "{foreign}");
    }
    let parse = "import sys, xml.dom.minidom; xml.dom.minidom.parse(sys.argv[1])";
    let status = Command::new("python3").args(["-c", parse]).arg(here("docs/demo.svg")).status();
    assert!(status.expect("python3").success(), "docs/demo.svg is no XML");
}

#[test]
fn the_readme_has_at_most_250_lines() {
    assert!(read(&here("README.md")).lines().count() <= 250);
}

#[test]
fn every_build_that_is_shown_takes_the_versions_of_cargo_lock() {
    let shown = pages().into_iter().chain([here("scripts/build-static")]);
    let texts: Vec<String> = shown.map(|path| read(&path)).collect();
    let lines = texts.iter().flat_map(|text| text.lines());
    let builds: Vec<&str> = lines
        .map(str::trim)
        .filter(|line| line.starts_with("cargo install ") || line.starts_with("cargo build "))
        .collect();
    assert!(builds.len() >= 2, "{builds:?}");
    assert!(builds.iter().all(|line| line.contains(" --locked ")), "{builds:?}");
}

// The threat model.

/// The file in which a function is that a page names as `path::name`.
fn file_of(path: &str) -> PathBuf {
    match path.strip_suffix("::fuzz") {
        Some(source) => here(&format!("src/{source}.rs")),
        None => here(&format!("tests/{path}.rs")),
    }
}

/// Asserts that there is a test of this name, as `FILE::TEST` or as `servers::FOLDER`.
#[track_caller]
fn assert_test_exists(name: &str) {
    let (path, function) = name.rsplit_once("::").unwrap_or_else(|| panic!("{name} has no file"));
    let found = match path {
        "servers" => here(&format!("tests/servers/{function}/server.toml")).exists(),
        _ => {
            read(&file_of(path)).lines().any(|line| line.trim_start().starts_with(&format!("fn {function}(")))
        }
    };
    assert!(found, "there is no {name}");
}

#[test]
fn every_row_of_the_threat_model_names_tests_and_every_test_exists() {
    let page = read(&here("docs/threat-model.md"));
    let rows = page.lines().filter(|line| line.starts_with("| ") && !line.ends_with(" held by |"));
    let mut count = 0;
    for row in rows {
        let held_by = cells(row).pop().expect("a cell");
        let names: Vec<&str> = held_by.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "no test holds: {row}");
        for name in names {
            assert_test_exists(name);
            count += 1;
        }
    }
    assert!(count > 60, "{count} tests");
}

// Moving over.

/// What stands in tests/moving/held.toml for a row that only names another tool.
const ANOTHER_TOOL: &str = "another tool";

#[test]
fn every_row_about_moving_over_is_held_by_tests_that_exist() {
    let text = read(&here("tests/moving/held.toml"));
    let held: BTreeMap<String, BTreeMap<String, Vec<String>>> =
        toml::from_str(&text).expect("pages, rows and tests");
    let pages = ["docs/gunicorn.md", "docs/node-cluster.md", "docs/pm2.md", "docs/puma.md"];
    assert_eq!(held.keys().collect::<Vec<_>>(), pages);
    for (page, held) in held {
        let text = read(&here(&page));
        // The line after the names of the columns has dashes alone.
        let is_row = |(line, next): &(&str, &str)| line.starts_with("| ") && !next.starts_with("|-");
        let rows =
            text.lines().zip(text.lines().skip(1).chain([""])).filter(is_row).map(|(line, _)| cells(line));
        let rows: BTreeMap<String, String> =
            rows.map(|cells| (cells[0].clone(), cells[1..].join(" "))).collect();
        assert_eq!(rows.keys().collect::<Vec<_>>(), held.keys().collect::<Vec<_>>(), "{page}");
        for (row, tests) in held {
            assert!(!tests.is_empty(), "{page}: no test holds {row}");
            let says_nothing = !rows[&row].contains("reuse-run") && !rows[&row].contains("--");
            for name in tests.iter().filter(|name| *name != ANOTHER_TOOL || !says_nothing) {
                assert_test_exists(name);
            }
        }
    }
}

// Figures.

/// The cells of a table's row.
fn cells(row: &str) -> Vec<String> {
    row.trim_matches('|').split('|').map(|cell| cell.replace("**", "").trim().to_owned()).collect()
}

/// What reuse-run lost in reloads, by program: the cells of its row in each table.
fn losses() -> BTreeMap<String, Vec<String>> {
    let mut losses = BTreeMap::new();
    let mut program = String::new();
    for row in read(&here("scripts/bench-results/reload.md")).lines().filter(|line| line.starts_with('|')) {
        let cells = cells(row);
        if cells.last().is_some_and(String::is_empty) {
            // A header. Other tables are no loss of a program's connections.
            program = if cells[1] == "new connections" { cells[0].clone() } else { String::new() };
        } else if cells[0] == "reuse-run" && !program.is_empty() {
            losses.insert(program.clone(), cells[1..4].to_vec());
        }
    }
    losses
}

#[test]
fn the_readmes_figures_of_lost_requests_are_those_of_the_bench() {
    let losses = losses();
    let readme = read(&here("README.md"));
    let table = readme.split("| kept open, no pause |").nth(1).expect("the table");
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), losses.len(), "each program of the bench has a row");
    for row in rows {
        let cells = cells(row);
        let program = cells[0].split(',').next().expect("a program");
        assert_eq!(losses.get(program), Some(&cells[1..4].to_vec()), "{program}");
    }
}

#[test]
fn the_tables_show_no_lost_request_on_a_new_connection() {
    assert!(losses().values().all(|cells| cells[0].starts_with("0 of ")), "{:?}", losses());
    let results = read(&here("tests/servers/RESULTS.md"));
    let rows = results.lines().filter(|line| line.starts_with("| ")).skip(1).map(cells);
    let rows: Vec<Vec<String>> = rows.collect();
    for row in &rows {
        assert!(row[2..4].iter().all(|cell| cell == "–" || cell.starts_with("0 of ")), "{row:?}");
    }
    let number = format!("[{} servers](tests/servers/RESULTS.md)", rows.len());
    assert!(read(&here("README.md")).contains(&number), "the README doesn't have {number}");
}

// Options.

/// The long options in a text, with the default that follows each, if one does.
fn options<'a>(lines: impl Iterator<Item = &'a str>) -> BTreeMap<String, Option<String>> {
    let option = |line: &'a str| {
        let word = line.split("--").nth(1)?.split(|c: char| !c.is_ascii_lowercase() && c != '-').next()?;
        let default = line.split("(default ").nth(1).and_then(|rest| rest.split(')').next());
        Some((word.to_owned(), default.map(str::to_owned)))
    };
    lines.filter_map(option).collect()
}

#[test]
fn the_readmes_options_are_those_of_help() {
    let output = reuse_run().arg("--help").output().expect("run reuse-run");
    let help = String::from_utf8(output.stdout).expect("UTF-8");
    let list = help.split("Options:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("options");
    // A description that needs several lines is indented by more.
    let mut entries: Vec<String> = Vec::new();
    for line in list.lines() {
        match entries.last_mut() {
            Some(entry) if !line.starts_with("  -") => *entry += &format!(" {}", line.trim()),
            _ => entries.push(line.trim().to_owned()),
        }
    }
    let of_help = options(entries.iter().map(String::as_str));
    let readme = read(&here("README.md"));
    let rows: Vec<String> = readme
        .lines()
        .filter(|line| line.starts_with("| `-"))
        .flat_map(|line| {
            let cells = cells(line);
            let names: Vec<&str> = cells[0].split(';').collect();
            let default = cells[1].trim_matches('`').to_owned();
            names.iter().map(|name| format!("{name} (default {default})")).collect::<Vec<_>>()
        })
        .collect();
    let of_readme = options(rows.iter().map(String::as_str));
    assert_eq!(of_readme.keys().collect::<Vec<_>>(), of_help.keys().collect::<Vec<_>>());
    for (option, default) in of_help {
        if let Some(default) = default.filter(|default| !default.contains(' ')) {
            assert_eq!(of_readme[&option], Some(default), "the default of --{option}");
        }
    }
}

// Messages.

/// A string literal in a source.
struct Literal {
    /// Where it begins, in bytes.
    at: usize,
    text: String,
}

/// A source without its tests, with blanks in place of comments and of what strings hold; and the strings.
fn lex(source: &str) -> (Vec<u8>, Vec<Literal>) {
    let source = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let (mut code, mut literals) = (source.as_bytes().to_vec(), Vec::new());
    let bytes = source.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if source[at..].starts_with("//") => {
                at + source[at..].find('\n').unwrap_or(bytes.len() - at)
            }
            // A character, and not a lifetime.
            b'\'' if source[at..].starts_with("'\\") => at + 2 + source[at + 2..].find('\'').unwrap_or(0) + 1,
            b'\'' if bytes.get(at + 2) == Some(&b'\'') => at + 3,
            b'"' => {
                let mut end = at + 1;
                while bytes[end] != b'"' {
                    end += if bytes[end] == b'\\' { 2 } else { 1 };
                }
                literals.push(Literal { at, text: unescape(&source[at + 1..end]) });
                end + 1
            }
            _ => {
                at += 1;
                continue;
            }
        };
        code[at..end].fill(b' ');
        at = end;
    }
    (code, literals)
}

/// A literal's text: a backslash at the end of a line takes away the line's end and what indents the next.
fn unescape(text: &str) -> String {
    let mut lines = text.split("\\\n");
    let first = lines.next().unwrap_or_default().to_owned();
    let joined = lines.fold(first, |text, line| text + line.trim_start());
    joined.replace("\\\"", "\"").replace("\\n", "\n")
}

/// A message cut at its placeholders, `{…}` in a source and `<…>` on the page, without signs between the parts.
fn parts(message: &str, open: char, close: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut depth = 0;
    for c in message.chars() {
        if c == open {
            depth += 1;
            parts.push(String::new());
        } else if c == close && depth > 0 {
            depth -= 1;
        } else if depth == 0 {
            parts.last_mut().expect("a part").push(c);
        }
    }
    let trimmed =
        parts.iter().map(|part| part.trim_matches(|c: char| c.is_whitespace() || ":;,.()".contains(c)));
    trimmed.filter(|part| part.contains(char::is_alphabetic)).map(str::to_owned).collect()
}

/// All sources but those of tests.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("src").map(|entry| entry.expect("an entry").path());
    let all = entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] });
    all.filter(|path| !path.ends_with("tests.rs")).collect()
}

/// The messages that the page explains: each fills a line of a list.
fn documented() -> Vec<String> {
    let page = read(&here("docs/troubleshooting.md"));
    let item = |line: &str| {
        let line = line.strip_prefix("- ").or(line.strip_prefix("  "))?.trim_end_matches('\\').to_owned();
        let message = line.strip_prefix('`')?.strip_suffix('`')?;
        (!message.contains('`')).then(|| message.to_owned())
    };
    page.lines().filter_map(item).collect()
}

/// The strings within the parentheses or braces that begin at `open`.
fn within(code: &[u8], literals: &[Literal], open: usize) -> Vec<String> {
    let mut depth = 0;
    let mut end = open;
    while end < code.len() {
        match code[end] {
            b'(' | b'{' => depth += 1,
            b')' | b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        end += 1;
    }
    literals.iter().filter(|it| (open..end).contains(&it.at)).map(|it| it.text.clone()).collect()
}

#[test]
fn every_explained_message_is_in_the_source() {
    let texts: Vec<String> = sources(&here("src")).iter().map(|path| read(path)).collect();
    let literals = texts.iter().flat_map(|text| lex(text).1);
    let known: Vec<String> = literals.flat_map(|literal| parts(&literal.text, '{', '}')).collect();
    let mut missing = Vec::new();
    for message in documented() {
        for part in parts(&message, '<', '>') {
            if !known.iter().any(|known| known.contains(&part)) {
                missing.push(format!("{part:?} of {message:?}"));
            }
        }
    }
    assert!(missing.is_empty(), "not in src:\n{}", missing.join("\n"));
    assert!(documented().len() > 50, "{:?}", documented());
}

/// What makes a message that a user reads.
const MESSAGES: [&str; 13] = [
    "warn!(",
    "error!(",
    ".warn(",
    ".give_up(",
    ".abandon(",
    "StartError::new(",
    "StartError {",
    "failed(",
    "Err(",
    "map_err(",
    "for Refusal {",
    "Error::other(",
    "Error::new(",
];

#[test]
fn every_warning_and_error_is_explained() {
    let explained: Vec<Vec<String>> = documented().iter().map(|message| parts(message, '<', '>')).collect();
    let explains = |explained: &[String], parts: &[String]| {
        let mut rest = explained.iter();
        parts.iter().all(|part| rest.by_ref().any(|known| known.contains(part.as_str())))
    };
    let mut missing = BTreeSet::new();
    let mut count = 0;
    for path in sources(&here("src")) {
        let source = read(&path);
        let (code, literals) = lex(&source);
        let text = String::from_utf8_lossy(&code).into_owned();
        let ends_a_word =
            |at: usize| at > 0 && (code[at - 1].is_ascii_alphanumeric() || code[at - 1] == b'_');
        for head in MESSAGES {
            for (at, _) in
                text.match_indices(head).filter(|(at, _)| head.starts_with('.') || !ends_a_word(*at))
            {
                for message in within(&code, &literals, at + head.len() - 1) {
                    count += 1;
                    let parts = parts(&message, '{', '}');
                    let says_something = parts.iter().any(|part| part.contains(' '));
                    if says_something && !explained.iter().any(|known| explains(known, &parts)) {
                        let name = path.strip_prefix(here("")).unwrap_or(&path).display().to_string();
                        missing.insert(format!("{name}: {message}"));
                    }
                }
            }
        }
    }
    let missing: Vec<String> = missing.into_iter().collect();
    assert!(missing.is_empty(), "not in docs/troubleshooting.md:\n{}", missing.join("\n"));
    assert!(count > 50, "{count} messages");
}
