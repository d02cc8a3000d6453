//! Options by environment variables, for containers, whose command line expands nothing.

use std::ffi::OsString;

use argh::{FlagInfo, FlagInfoKind, Optionality};

use crate::worker::environment::PREFIX;

/// Those that aren't options: the level of the log, what a worker that is reuse-run itself has from another one, and the
/// version that an image says to have.
const OTHERS: [&str; 4] = ["REUSE_RUN_LOG", "REUSE_RUN_SLOT", "REUSE_RUN_GENERATION", "REUSE_RUN_VERSION"];

/// What the variables say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Options, each in words of its own: its variable, and it with its value.
    pub options: Vec<(String, Vec<String>)>,
    /// Variables that no option has.
    pub unknown: Vec<String>,
}

/// The variable of an option: REUSE_RUN_READY_TIMEOUT for --ready-timeout.
fn name(flag: &FlagInfo) -> String {
    PREFIX.to_owned() + &flag.long.trim_start_matches('-').replace('-', "_").to_uppercase()
}

/// Reads the variables of the options that aren't among the words of the command line. One that is empty counts as unset.
/// An option that may come more than once takes several values, with spaces between them.
///
/// # Errors
/// Which variable's value is neither 1 nor 0.
pub fn read(
    flags: &[FlagInfo],
    words: &[String],
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Said, String> {
    let mut said = Said::default();
    for (variable, value) in variables {
        let (Some(variable), value) = (variable.to_str(), value.to_string_lossy()) else { continue };
        if !variable.starts_with(PREFIX) || OTHERS.contains(&variable) || value.is_empty() {
            continue;
        }
        let is_its = |flag: &&FlagInfo| name(flag) == variable && flag.long != "--help";
        let Some(flag) = flags.iter().find(is_its) else {
            said.unknown.push(variable.to_owned());
            continue;
        };
        let short = flag.short.map(|short| format!("-{short}"));
        if words.iter().any(|word| word == flag.long || Some(word) == short.as_ref()) {
            continue;
        }
        let with = |value: &str| (variable.to_owned(), vec![flag.long.to_owned(), value.to_owned()]);
        match (&flag.kind, &flag.optionality, &*value) {
            (FlagInfoKind::Switch, _, "1") => {
                said.options.push((variable.to_owned(), vec![flag.long.to_owned()]));
            }
            (FlagInfoKind::Switch, _, "0") => {}
            (FlagInfoKind::Switch, ..) => return Err(format!("{variable}: {value:?} is neither 1 nor 0")),
            (_, Optionality::Repeating, _) => said.options.extend(value.split_whitespace().map(with)),
            _ => said.options.push(with(&value)),
        }
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use argh::ArgsInfo;

    use super::*;
    use crate::cli::args::RunArgs;

    fn read_line(variables: &str, words: &str) -> Result<Said, String> {
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        let variables = variables.split(';').map(|variable| {
            let (name, value) = variable.split_once('=').unwrap();
            (name.into(), value.into())
        });
        read(RunArgs::get_args_info().flags, &words, variables)
    }

    #[test]
    fn variables_become_options_unless_the_command_line_has_them() {
        let variables = "REUSE_RUN_WORKERS=4;REUSE_RUN_LABEL=1;REUSE_RUN_NO_INTERCEPT=0;REUSE_RUN_LISTEN=3000 [::1]:4000;\
                         REUSE_RUN_DRAIN=;REUSE_RUN_LOG=warn;REUSE_RUN_VERSION=2;REUSE_RUN_WORKER=4;REUSE_RUN_HELP=1;HOME=/root";
        let said = read_line(variables, "").unwrap();
        let words: Vec<String> = said.options.into_iter().flat_map(|(_, words)| words).collect();
        assert_eq!(words.join(" "), "--workers 4 --label --listen 3000 --listen [::1]:4000");
        assert_eq!(said.unknown, ["REUSE_RUN_WORKER", "REUSE_RUN_HELP"]);
        let words = "-n 2 --listen 5000 --label";
        assert_eq!(read_line(variables, words).unwrap().options, []);
    }

    #[test]
    fn a_switch_is_1_or_0() {
        let error = read_line("REUSE_RUN_LABEL=yes", "").unwrap_err();
        assert_eq!(error, r#"REUSE_RUN_LABEL: "yes" is neither 1 nor 0"#);
    }
}
