//! The text of --help, from the table that is the parser's too. scripts/manuals reads it and makes the man pages and the
//! completions.

use argh::{CommandInfoWithArgs, FlagInfo, FlagInfoKind, Optionality};

/// How many characters a line has at most.
const WIDTH: usize = 80;
/// Where the second column begins.
const COLUMN: usize = 28;

/// The help of `reuse-run`, or of `reuse-run COMMAND`. `operands` is what follows the options.
pub fn text(name: &str, operands: &str, info: &CommandInfoWithArgs) -> String {
    let usage = format!("Usage: {name} [options] {operands}").trim_end().to_owned() + "\n";
    let arguments = info.positionals.iter().map(|it| (it.name.to_uppercase(), it.description));
    // argh puts its own --help first.
    let flags = info.flags.iter().filter(|flag| flag.long != "--help");
    let options = flags.map(|flag| (option(flag), flag.description));
    let options = options.chain([("-h, --help".to_owned(), "print this text")]);
    let statuses = info.error_codes.iter().map(|status| (status.code.to_string(), status.description));
    let examples = info.examples.iter().map(|example| ((*example).to_owned(), ""));
    let notes = info.notes.iter().map(|note| filled(note, 2)).collect::<Vec<_>>().join("\n");
    let commands = info.commands.iter().map(|it| (it.name.to_owned(), it.command.description));
    [
        usage,
        filled(info.description, 0),
        table("Arguments", arguments),
        table("Options", options),
        table("Commands", commands),
        table("Exit status", statuses),
        table("Examples", examples),
        if notes.is_empty() { notes } else { format!("Notes:\n{notes}") },
    ]
    .into_iter()
    .filter(|part| !part.is_empty())
    .collect::<Vec<_>>()
    .join("\n")
}

/// What follows the options of a command: `WORKERS [PID]`.
pub fn operands(info: &CommandInfoWithArgs) -> String {
    let operand = |name: String, optionality: &Optionality| match optionality {
        Optionality::Required => name,
        Optionality::Optional => format!("[{name}]"),
        Optionality::Repeating | Optionality::Greedy => format!("[{name}...]"),
    };
    let operands = info.positionals.iter().map(|it| operand(it.name.to_uppercase(), &it.optionality));
    operands.collect::<Vec<_>>().join(" ")
}

/// An option's names, and that of its value.
fn option(flag: &FlagInfo) -> String {
    let short = flag.short.map(|short| format!("-{short}, ")).unwrap_or_default();
    match flag.kind {
        FlagInfoKind::Switch => short + flag.long,
        FlagInfoKind::Option { arg_name } => format!("{short}{} {arg_name}", flag.long),
    }
}

/// Rows of two columns, or nothing if there are none.
fn table<'a>(title: &str, rows: impl Iterator<Item = (String, &'a str)>) -> String {
    let row = |(name, about): (String, &str)| {
        let name = format!("  {name}");
        match (about.is_empty(), filled(about, COLUMN)) {
            (true, _) => name + "\n",
            (false, about) if name.len() + 2 <= COLUMN => name.clone() + &about[name.len()..],
            (false, about) => format!("{name}\n{about}"),
        }
    };
    let rows: String = rows.map(row).collect();
    if rows.is_empty() { rows } else { format!("{title}:\n{rows}") }
}

/// A text in lines that begin with so many blanks.
fn filled(text: &str, indent: usize) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => *line += word,
            Some(line) if indent + line.len() + 1 + word.len() <= WIDTH => *line += &format!(" {word}"),
            _ => lines.push(word.to_owned()),
        }
    }
    lines.iter().map(|line| format!("{}{line}\n", " ".repeat(indent))).collect()
}
