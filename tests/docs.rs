//! README.md and docs as texts: their links lead somewhere, their figures are those of the tables, and they name each
//! option and each message.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use common::reuse_run;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[track_caller]
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// README.md, CHANGELOG.md and all of docs.
fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(here("docs")).expect("docs").map(|entry| entry.expect("a file").path());
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
fn the_readme_has_at_most_250_lines() {
    assert!(read(&here("README.md")).lines().count() <= 250);
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
        if cells[1] == "new connections" {
            program.clone_from(&cells[0]);
        } else if cells[0] == "reuse-run" {
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
            Some(entry) if !line.trim_start().starts_with('-') => *entry += &format!(" {}", line.trim()),
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
