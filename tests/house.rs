//! The code map in src/main.rs is true, and the sizes that it rests on are kept.
#![cfg_attr(clippy, deny(warnings))]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const MAX_LINES_OF_FILE: usize = 600;
const MAX_LINES_OF_FUNCTION: usize = 60;

/// Files that nobody looks for: they declare modules, or serve the others of their room.
const HELPERS: [&str; 14] = [
    "cli/mod",
    "cli/split",
    "fleet/roster",
    "fleet/worker",
    "fleet/tests",
    "intercept/mod",
    "intercept/bound",
    "intercept/install",
    "kernel/mod",
    "kernel/bpf",
    "operate/mod",
    "output/mod",
    "pool/watcher",
    "supervisor/source",
];

/// All source files, and their text.
fn sources() -> Vec<(PathBuf, String)> {
    let (mut folders, mut files) = (vec![PathBuf::from("src")], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push((path.clone(), fs::read_to_string(path).expect("UTF-8"))),
            }
        }
    }
    assert!(files.len() > 30);
    files
}

/// The text without its tests.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap_or(text)
}

fn room(path: &Path) -> String {
    let inside = path.strip_prefix("src").expect("below src");
    inside
        .components()
        .next()
        .expect("a name")
        .as_os_str()
        .to_string_lossy()
        .trim_end_matches(".rs")
        .to_owned()
}

/// The rooms in the order of the map's first table, and those of its last row, which may not import each other either
/// way round.
fn rooms() -> Vec<Vec<String>> {
    let map = fs::read_to_string("src/main.rs").expect("the map");
    let rows = map.lines().filter(|line| line.starts_with("//! | [`"));
    let names = |row: &str| -> Vec<String> {
        let first = row.trim_start_matches("//! | ").split(" | ").next().expect("a cell");
        first.split(", ").map(|name| name.trim_matches(['[', '`', ']']).to_owned()).collect()
    };
    rows.map(names).collect()
}

#[test]
fn every_room_stands_in_the_map() {
    let mapped: BTreeSet<String> = rooms().into_iter().flatten().collect();
    let mut rooms: BTreeSet<String> = sources().iter().map(|(path, _)| room(path)).collect();
    rooms.remove("main");
    assert_eq!(mapped, rooms);
}

#[test]
fn every_file_stands_in_the_map() {
    let map = fs::read_to_string("src/main.rs").expect("the map");
    let mapped: BTreeSet<&str> = map
        .lines()
        .filter(|line| line.starts_with("//! | ") && !line.contains("[`"))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .collect();
    for file in &mapped {
        let path = format!("src/{file}");
        assert!(Path::new(&path).is_dir() || Path::new(&format!("{path}.rs")).exists(), "no {file}");
    }
    for (path, _) in sources() {
        let file = path.strip_prefix("src").expect("below src").with_extension("");
        let file = file.to_str().expect("UTF-8");
        let is_mapped = mapped
            .iter()
            .any(|mapped| file == *mapped || file.starts_with(&format!("{}/", mapped.trim_end_matches('/'))));
        let is_plain = !file.contains('/') || HELPERS.contains(&file);
        assert!(is_mapped || is_plain, "{file} is not in the map");
    }
}

#[test]
fn a_room_imports_only_rooms_below_it() {
    let rooms = rooms();
    let floor = |name: &str| rooms.iter().position(|row| row.iter().any(|room| room == name));
    let mut imports = 0;
    for (path, text) in sources() {
        let Some(own) = floor(&room(&path)) else { continue };
        for imported in text.split("crate::").skip(1) {
            let name: String = imported.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let Some(other) = floor(&name) else { panic!("{}: crate::{name}", path.display()) };
            imports += 1;
            assert!(other > own || name == room(&path), "{} imports {name}", path.display());
        }
    }
    assert!(imports > 100, "{imports}");
}

#[test]
fn pure_rooms_call_no_kernel_and_read_no_clock() {
    let pure = sources().into_iter().filter(|(path, _)| ["fleet", "steering"].contains(&room(path).as_str()));
    for (path, text) in pure.filter(|(path, _)| !path.ends_with("tests.rs")) {
        for word in
            ["Instant::now", "SystemTime", "kernel::sys", "kernel::procfs", "kernel::sockdiag", "std::fs"]
        {
            assert!(!code(&text).contains(word), "{} has {word}", path.display());
        }
    }
}

#[test]
fn files_and_functions_are_short() {
    for (path, text) in sources().into_iter().filter(|(path, _)| !path.ends_with("tests.rs")) {
        let code = code(&text);
        let lines = code.lines().count();
        assert!(lines <= MAX_LINES_OF_FILE, "{} has {lines} lines", path.display());
        let mut begun: Option<(usize, &str)> = None;
        for (number, line) in code.lines().enumerate() {
            let text = line.trim_start();
            let indent = line.len() - text.len();
            let words = text.trim_start_matches("pub ").trim_start_matches("pub(super) ");
            if begun.is_none() && indent <= 4 && (words.starts_with("fn ") || words.starts_with("const fn "))
            {
                begun = Some((number, line));
            }
            let Some((first, name)) = begun else { continue };
            let is_end = line == "}" || line == "    }" || (number == first && line.ends_with(['}', ';']));
            if is_end {
                let lines = number - first + 1;
                assert!(lines <= MAX_LINES_OF_FUNCTION, "{}: {lines} lines: {name}", path.display());
                begun = None;
            }
        }
    }
}
