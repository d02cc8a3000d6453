//! What the workers of a generation run.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::kernel::file::open_regular;
use crate::worker::environment::Environment;

/// How much of a script is searched for the name of Node, in bytes.
const MAX_SCRIPT_LENGTH: u64 = 64 * 1024;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    pub command: OsString,
    pub args: Vec<OsString>,
}

impl Program {
    /// Its words, for users.
    pub fn words(&self) -> Vec<String> {
        [&self.command]
            .into_iter()
            .chain(&self.args)
            .map(|word| word.to_string_lossy().into_owned())
            .collect()
    }

    /// Whether the command may start Node: its words say so or, if it is a script, its text does.
    ///
    /// Other programs aren't given Node's channel. What they start inherits its variable but perhaps not its
    /// fd, and a Node among those would die of that.
    pub fn may_start_node(&self, environment: &Environment) -> bool {
        let names_node = |text: &[u8]| text.windows(4).any(|word| word == b"node");
        let mut words = [&self.command].into_iter().chain(&self.args);
        words.any(|word| names_node(word.as_bytes())) || names_node(&self.script(environment))
    }

    /// The beginning of the command's file if it is a script, else nothing.
    fn script(&self, environment: &Environment) -> Vec<u8> {
        let mut text = Vec::new();
        let file = self.file(environment);
        let read = file.map(|file| open_regular(&file, 0)?.take(MAX_SCRIPT_LENGTH).read_to_end(&mut text));
        if read.is_some_and(|read| read.is_ok()) && text.starts_with(b"#!") { text } else { Vec::new() }
    }

    /// The file that the command names, by itself or in one of PATH's folders.
    fn file(&self, environment: &Environment) -> Option<PathBuf> {
        let command = Path::new(&self.command);
        if command.components().count() > 1 {
            let directory = environment.directory.as_ref();
            return Some(directory.map_or(Path::new(""), |directory| &directory.physical).join(command));
        }
        std::env::split_paths(&environment.variable("PATH").unwrap_or_default())
            .map(|folder| folder.join(command))
            .find(|file| file.is_file())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn program(words: &[&str]) -> Program {
        let (command, args) = words.split_first().unwrap();
        Program { command: command.into(), args: args.iter().map(OsString::from).collect() }
    }

    #[test]
    fn a_command_may_start_node_if_its_words_or_its_script_name_it() {
        let folder = std::env::temp_dir().join(format!("reuse-run-{}-program", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        file("start", "#!/bin/sh\nexec node app.js\n");
        file("serve", "#!/usr/bin/env python3\n");
        file("binary", "\x7fELF node");
        let variables = vec![("PATH".into(), "/nowhere".into()), ("PATH".into(), folder.clone().into())];
        let environment = Environment { variables, ..Environment::default() };
        let may_start_node = |words: &[&str]| program(words).may_start_node(&environment);
        let absolute = folder.join("start").into_os_string().into_string().unwrap();
        for words in [&["node", "app.js"][..], &["sh", "-c", "exec nodejs ."], &["start"], &[&absolute]] {
            assert!(may_start_node(words), "{words:?}");
        }
        for words in [&["serve"][..], &["binary"], &["missing"], &["python3", "-m", "http.server"]] {
            assert!(!may_start_node(words), "{words:?}");
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
