//! Where the options end and the command begins.

use std::ffi::OsString;

use argh::{FlagInfo, FlagInfoKind};

/// A command line of `[options] [--] command [arguments]`.
#[derive(Debug, PartialEq)]
pub struct Split {
    /// Each option as one word, and its value as another.
    pub options: Vec<String>,
    pub command: Vec<OsString>,
    /// Whether "--" stands before the command.
    pub is_marked: bool,
}

/// Splits a command line at "--", or else at the first word that is neither an option of `flags` nor the value of one.
/// An unknown option is taken for one without a value: argh refuses it, or takes it as `-h`.
///
/// # Errors
/// Which option has no value.
pub fn split(words: impl IntoIterator<Item = OsString>, flags: &[FlagInfo]) -> Result<Split, String> {
    let mut words = words.into_iter();
    let mut options = Vec::new();
    while let Some(word) = words.next() {
        if word == "--" {
            return Ok(Split { options, command: words.collect(), is_marked: true });
        }
        let text = word.to_string_lossy();
        if !text.starts_with('-') || text == "-" {
            let command = [word].into_iter().chain(words).collect();
            return Ok(Split { options, command, is_marked: false });
        }
        if let Some((name, value)) = text.split_once('=').filter(|_| text.starts_with("--")) {
            options.extend([name.to_owned(), value.to_owned()]);
        } else if let Some((name, value)) = text.split_at_checked(2).filter(|(name, value)| {
            // As in -n4.
            !value.is_empty() && takes_value(flags, name)
        }) {
            options.extend([name.to_owned(), value.to_owned()]);
        } else {
            options.push(text.clone().into_owned());
            if takes_value(flags, &text) {
                let value = words.next().filter(|value| value != "--");
                let value = value.ok_or_else(|| format!("{text} needs a value (see --help)"))?;
                options.push(value.to_string_lossy().into_owned());
            }
        }
    }
    Ok(Split { options, command: Vec::new(), is_marked: false })
}

/// Whether an option, by its long or its short name, is followed by a value.
fn takes_value(flags: &[FlagInfo], name: &str) -> bool {
    let is_named = |flag: &&FlagInfo| {
        flag.long == name
            || flag.short.is_some_and(|short| name.strip_prefix('-') == Some(short.encode_utf8(&mut [0; 4])))
    };
    flags.iter().find(is_named).is_some_and(|flag| matches!(flag.kind, FlagInfoKind::Option { .. }))
}

#[cfg(test)]
mod tests {
    use argh::ArgsInfo;

    use super::*;
    use crate::cli::args::RunArgs;

    fn split_line(line: &str) -> Result<Split, String> {
        split(line.split_whitespace().map(OsString::from), RunArgs::get_args_info().flags)
    }

    #[test]
    fn the_command_begins_after_the_mark_or_at_the_first_other_word() {
        for (line, options, command, is_marked) in [
            ("-n 4 -- node -n app.js", "-n 4", "node -n app.js", true),
            ("-n4 node --label x", "-n 4", "node --label x", false),
            ("--workers=4 --label node", "--workers 4 --label", "node", false),
            ("-l 3000 -C/srv - x", "-l 3000 -C /srv", "- x", false),
            ("-V -h", "-V -h", "", false),
            ("--unknown x", "--unknown", "x", false),
            ("--label -- -- x", "--label", "-- x", true),
            ("", "", "", false),
        ] {
            let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            let command = words(command).into_iter().map(OsString::from).collect();
            assert_eq!(split_line(line), Ok(Split { options: words(options), command, is_marked }), "{line}");
        }
    }

    #[test]
    fn an_option_without_its_value_is_refused() {
        for line in ["--drain", "--drain -- x", "-n", "--label -C --"] {
            let error = split_line(line).unwrap_err();
            assert!(error.ends_with(" needs a value (see --help)"), "{line}: {error}");
        }
    }

    #[test]
    fn every_option_of_the_help_takes_a_value_if_one_is_named_there() {
        for flag in RunArgs::get_args_info().flags {
            let names = [Some(flag.long.to_owned()), flag.short.map(|short| format!("-{short}"))];
            for name in names.into_iter().flatten() {
                let split = split_line(&format!("{name} 1 x")).unwrap();
                let has_value = matches!(flag.kind, FlagInfoKind::Option { .. });
                assert_eq!(split.options.len(), 1 + usize::from(has_value), "{name}");
            }
        }
    }

    mod fuzz {
        use std::os::unix::ffi::OsStringExt;

        use proptest::collection::vec;
        use proptest::prelude::*;

        use super::*;

        fn word() -> impl Strategy<Value = OsString> {
            prop_oneof![
                "-{0,2}[a-zC]{0,3}=?[a-z0-9]{0,2}".prop_map(OsString::from),
                prop::sample::select(vec!["--", "-", "-n", "-n4", "--drain", "--label", "-l"])
                    .prop_map(OsString::from),
                vec(any::<u8>(), 0..4).prop_map(OsString::from_vec),
            ]
        }

        proptest! {
            #[test]
            fn the_command_is_the_end_of_the_line_as_it_was_written(words in vec(word(), 0..8)) {
                let Ok(split) = split(words.clone(), RunArgs::get_args_info().flags) else { return Ok(()) };
                let (options, command) = words.split_at(words.len() - split.command.len());
                prop_assert_eq!(command, &split.command);
                let mark = options.iter().position(|word| word == "--");
                prop_assert_eq!(mark, split.is_marked.then(|| options.len() - 1));
                let is_command = |word: &OsString| word == "-" || !word.to_string_lossy().starts_with('-');
                prop_assert!(split.is_marked || command.first().is_none_or(is_command));
                prop_assert!(split.options.len() <= 2 * options.len());
            }
        }
    }
}
