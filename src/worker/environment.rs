//! A generation's environment variables from files and its directory, and the variables of each worker.
//!
//! The files are read anew for every generation. Its workers that start later get what was read then.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::fleet::CommandId;
use crate::ids::SlotId;
use crate::kernel::file::open_regular;
use crate::worker::reading::Reading;
use crate::worker::{Program, fds};

/// What the names of reuse-run's own variables begin with.
pub const PREFIX: &str = "REUSE_RUN_";

/// Where variables and directory come from, as the command line says.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Files of NAME=value lines; a later one has precedence.
    pub env_files: Vec<PathBuf>,
    pub secrets: Vec<Secret>,
    /// The workers' directory; `None` for the one that reuse-run was started in.
    pub directory: Option<PathBuf>,
}

/// A variable whose value is a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    pub name: String,
    pub file: PathBuf,
}

impl FromStr for Secret {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, file)) if !name.is_empty() && !file.is_empty() => {
                Ok(Self { name: name.to_owned(), file: file.into() })
            }
            _ => Err(format!("{text:?} is not of the form NAME=FILE")),
        }
    }
}

/// What all workers of a generation start with.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment {
    pub program: Program,
    /// In their order; a later one has precedence.
    pub variables: Vec<(OsString, OsString)>,
    pub directory: Option<Directory>,
    pub may_start_node: bool,
}

/// Workers enter the physical directory. So a worker that starts later has the same release as the rest of
/// its generation, wherever a link points by then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// As it was named.
    pub logical: PathBuf,
    /// With all links resolved.
    pub physical: PathBuf,
}

impl Directory {
    /// The value of PWD: the logical name as long as it leads to the physical directory.
    pub fn name(&self) -> &Path {
        let leads_there = fs::canonicalize(&self.logical).is_ok_and(|now| now == self.physical);
        if leads_there { &self.logical } else { &self.physical }
    }
}

/// Shows names only: no value gets into a log.
impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let names: Vec<&OsString> = self.variables.iter().map(|(name, _)| name).collect();
        f.debug_struct("Environment")
            .field("program", &self.program)
            .field("names", &names)
            .field("directory", &self.directory)
            .finish()
    }
}

// The access of users other than the owner and the group to a file.
const OTHERS_READ: u32 = 0o004;
const OTHERS_WRITE: u32 = 0o002;

/// What a worker's variables tell it about itself.
pub struct Given<'a> {
    pub slot: SlotId,
    pub generation: u32,
    /// The names of its listeners, in the order of their fds.
    pub listeners: &'a [&'a str],
    pub has_node_channel: bool,
    pub notify_socket: &'a str,
}

impl Environment {
    /// A variable that all workers have from reuse-run.
    pub fn variable(&self, name: &str) -> Option<OsString> {
        let set = self.variables.iter().rev().find(|(set, _)| set == name);
        set.map_or_else(|| std::env::var_os(name), |(_, value)| Some(value.clone()))
    }

    /// Whether a file or secret sets the variable.
    pub fn sets(&self, name: &str) -> bool {
        self.variables.iter().any(|(set, _)| set == name)
    }

    /// The variables that a worker gets besides those of reuse-run itself; a later one has precedence.
    pub fn of_worker(&self, given: &Given) -> Vec<(OsString, OsString)> {
        let mut variables = self.variables.clone();
        let mut set = |name: &str, value: String| variables.push((name.into(), value.into()));
        let count = given.listeners.len();
        set("READY_FD", fds::ready_fd(count).to_string());
        set("NOTIFY_SOCKET", given.notify_socket.to_owned());
        if given.has_node_channel {
            set("NODE_CHANNEL_FD", fds::node_channel_fd(count).to_string());
            set("NODE_CHANNEL_SERIALIZATION_MODE", "json".to_owned());
        }
        if count > 0 {
            set("LISTEN_FDS", count.to_string());
            set("LISTEN_FDNAMES", given.listeners.join(":"));
        }
        set("REUSE_RUN_SLOT", given.slot.to_string());
        set("REUSE_RUN_GENERATION", given.generation.to_string());
        if !self.sets("NODE_APP_INSTANCE") {
            set("NODE_APP_INSTANCE", given.slot.to_string());
        }
        variables
    }
}

/// The number of the first generation.
const FIRST_GENERATION: u32 = 1;

/// The environment and the program of each generation that may still start workers: read when its first worker starts, and the same for
/// all of them.
#[derive(Debug)]
pub struct Environments {
    sources: Sources,
    by_generation: BTreeMap<u32, Environment>,
    /// What each generation runs.
    programs: BTreeMap<u32, CommandId>,
    commands: Vec<Program>,
}

impl Environments {
    /// `program` is that of the first generation.
    pub fn new(sources: Sources, program: Program) -> Self {
        let programs = [(FIRST_GENERATION, CommandId(0))].into();
        Self { sources, by_generation: BTreeMap::new(), programs, commands: vec![program] }
    }

    /// The name of a program for the fleet; equal ones have the same.
    pub fn command_id(&mut self, program: Program) -> CommandId {
        let at = self.commands.iter().position(|known| *known == program).unwrap_or(self.commands.len());
        if at == self.commands.len() {
            self.commands.push(program);
        }
        CommandId(at as u32)
    }

    /// A new generation runs this, or what the generation `like` runs.
    pub fn begin(&mut self, generation: u32, command: Option<CommandId>, like: u32) {
        if let Some(command) = command.or_else(|| self.programs.get(&like).copied()) {
            self.programs.insert(generation, command);
        }
    }

    /// What a generation runs.
    pub fn program(&self, generation: u32) -> Option<&Program> {
        self.commands.get(self.programs.get(&generation)?.0 as usize)
    }

    /// That of a generation which has started workers.
    pub fn known(&self, generation: u32) -> Option<&Environment> {
        self.by_generation.get(&generation)
    }

    /// Those of generations older than `oldest` are not needed any more.
    pub fn forget_older(&mut self, oldest: u32) {
        self.by_generation = self.by_generation.split_off(&oldest);
        self.programs = self.programs.split_off(&oldest);
    }

    /// Begins to read that of a generation.
    ///
    /// # Errors
    /// When there is no process or file descriptor left.
    pub fn read(&self, generation: u32) -> io::Result<Reading> {
        Reading::begin(&self.sources, self.program(generation).cloned().unwrap_or_default())
    }

    /// That of a generation was read.
    pub fn add(&mut self, generation: u32, environment: Environment) {
        self.by_generation.insert(generation, environment);
    }
}

/// What happens while the files are read.
#[derive(Debug)]
pub enum Note<'a> {
    Opens(&'a Path),
    Warns(String),
}

impl Sources {
    /// Completes the directory by the current one. That is PWD if it names the current directory
    /// (environ(7)): a link in it is then followed anew for each generation.
    pub fn with_current_directory(mut self) -> Self {
        let logical = std::env::var_os("PWD").map(PathBuf::from).filter(|path| path.is_absolute());
        let same = |a: &Path, b: &Path| match (fs::metadata(a), fs::metadata(b)) {
            (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
            _ => false,
        };
        let current = logical.filter(|path| same(path, Path::new(".")));
        // Without PWD, as under systemd, only the physical name is known.
        let current = current.or_else(|| std::env::current_dir().ok().filter(|_| self.directory.is_some()));
        self.directory = match (self.directory, current) {
            (Some(directory), Some(current)) => Some(current.join(directory).components().collect()),
            (directory, current) => directory.or(current),
        };
        self
    }

    /// Whether there are values that nobody else may see.
    pub fn has_values(&self) -> bool {
        !self.env_files.is_empty() || !self.secrets.is_empty()
    }

    /// Reads all files anew.
    ///
    /// # Errors
    /// One line that names the file and the line in it, but never a value.
    pub fn read(&self, tell: &mut impl FnMut(Note)) -> Result<Environment, String> {
        let mut variables = Vec::new();
        for file in &self.env_files {
            tell(Note::Opens(file));
            variables.extend(read_env_file(file, tell)?);
        }
        for secret in &self.secrets {
            tell(Note::Opens(&secret.file));
            variables.push((OsString::from(&secret.name), read_secret(&secret.file)?));
        }
        let mut resolve = |logical: &PathBuf| {
            tell(Note::Opens(logical));
            let wrong = |error: io::Error| format!("{}: {error}", logical.display());
            let physical = fs::canonicalize(logical).map_err(wrong)?;
            if !physical.is_dir() {
                return Err(wrong(io::Error::from_raw_os_error(libc::ENOTDIR)));
            }
            Ok::<_, String>(Directory { logical: logical.clone(), physical })
        };
        let directory = self.directory.as_ref().map(&mut resolve).transpose()?;
        Ok(Environment { variables, directory, ..Environment::default() })
    }
}

/// In bytes. Linux takes no longer variable (MAX_ARG_STRLEN, execve(2)).
const MAX_FILE_LENGTH: u64 = 128 * 1024;

/// A file's content, and the access that others have to it.
fn read_file(path: &Path) -> Result<(Vec<u8>, u32), String> {
    let read = || -> io::Result<(Vec<u8>, u32)> {
        let file = open_regular(path, 0)?;
        let metadata = file.metadata()?;
        let mut content = Vec::new();
        file.take(MAX_FILE_LENGTH + 1).read_to_end(&mut content)?;
        if content.len() as u64 > MAX_FILE_LENGTH {
            return Err(io::Error::other(format!("longer than {} KiB", MAX_FILE_LENGTH / 1024)));
        }
        Ok((content, metadata.mode() & (OTHERS_READ | OTHERS_WRITE)))
    };
    read().map_err(|error| format!("{}: {error}", path.display()))
}

fn read_env_file(path: &Path, tell: &mut impl FnMut(Note)) -> Result<Vec<(OsString, OsString)>, String> {
    let (content, others) = read_file(path)?;
    if others != 0 {
        let what = format!("{} can be read or written by other users (chmod o-rw)", path.display());
        tell(Note::Warns(what));
    }
    let text = String::from_utf8(content).map_err(|_| format!("{}: not UTF-8", path.display()))?;
    let pairs = parse(text.strip_prefix('\u{feff}').unwrap_or(&text)).map_err(|line| {
        format!("{}:{line}: not a line of the form NAME=value, with spaces in quotes", path.display())
    })?;
    pairs.into_iter().map(|(name, value)| variable(path, name.into(), value.into())).collect()
}

/// The variables of an env file.
///
/// # Errors
/// The number, from 1, of the line that is wrong, or in which a value begins that doesn't end. Nothing else: it may hold a
/// secret.
fn parse(text: &str) -> Result<Vec<(String, String)>, usize> {
    let text = format!("{text}\n"); // dotenvy takes a blank at the end for the beginning of something
    let taken = Cell::new(0);
    let lines = OneByOne { rest: text.as_bytes(), taken: &taken };
    let (mut pairs, mut good) = (Vec::new(), 0);
    for pair in dotenvy::Iter::new(lines) {
        let is_empty = |line: &&str| line.trim_start().is_empty() || line.trim_start().starts_with('#');
        pairs.push(pair.map_err(|_| 1 + good + text.lines().skip(good).take_while(is_empty).count())?);
        good = taken.get();
    }
    Ok(pairs)
}

/// A text of which each read gets one line at most, and the number of lines that were taken.
struct OneByOne<'a> {
    rest: &'a [u8],
    taken: &'a Cell<usize>,
}

impl Read for OneByOne<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let end = self.rest.iter().position(|byte| *byte == b'\n').map_or(self.rest.len(), |end| end + 1);
        let count = (&self.rest[..end]).read(buffer)?;
        self.rest = &self.rest[count..];
        self.taken.set(self.taken.get() + usize::from(count == end && count > 0));
        Ok(count)
    }
}

/// The file's content without one newline at its end.
fn read_secret(path: &Path) -> Result<OsString, String> {
    let (mut value, others) = read_file(path)?;
    if others != 0 {
        return Err(format!(
            "{} can be read or written by other users, and is no secret (chmod o-rw)",
            path.display()
        ));
    }
    value.pop_if(|last| *last == b'\n');
    Ok(variable(path, OsString::new(), OsString::from_vec(value))?.1)
}

/// Refuses a zero byte, which would end the variable (environ(7)).
fn variable(path: &Path, name: OsString, value: OsString) -> Result<(OsString, OsString), String> {
    let has_zero = |text: &OsStr| text.as_bytes().contains(&0);
    if has_zero(&name) || has_zero(&value) {
        return Err(format!("{}: a variable can't hold a zero byte", path.display()));
    }
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("reuse-run-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str, content: &[u8], mode: u32) -> PathBuf {
            let path = self.0.join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn read(env_files: Vec<PathBuf>, secrets: Vec<Secret>) -> Result<Vec<(String, String)>, String> {
        let sources = Sources { env_files, secrets, directory: None };
        let text = |text: OsString| text.into_string().unwrap();
        Ok(sources
            .read(&mut |_| ())?
            .variables
            .into_iter()
            .map(|(name, value)| (text(name), text(value)))
            .collect())
    }

    #[test]
    fn files_are_read_in_their_order() {
        let folder = Folder::new("order");
        let a = folder.file("a", b"# comment\nA=1\nexport B='two words'\n", 0o600);
        let b = folder.file("b", b"A=3\n", 0o600);
        let pairs = [("A", "1"), ("B", "two words"), ("A", "3")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(read(vec![a, b], vec![]).unwrap(), pairs);
    }

    #[test]
    fn a_line_that_cannot_be_parsed_is_named_by_file_and_number_and_not_shown() {
        let folder = Folder::new("parse");
        let file = folder.file("env", b"A=1\n\nPASSWORD 'hunter2\nB=2\n", 0o600);
        let error = read(vec![file.clone()], vec![]).unwrap_err();
        let what = "not a line of the form NAME=value, with spaces in quotes";
        assert_eq!(error, format!("{}:3: {what}", file.display()));
        let missing = folder.0.join("missing");
        let error = read(vec![missing.clone()], vec![]).unwrap_err();
        assert!(error.starts_with(&format!("{}: No such file", missing.display())), "{error}");
    }

    #[test]
    fn the_wrong_line_of_a_long_file_is_found_at_once() {
        let text = "#\n".repeat(60_000);
        assert_eq!(parse(&format!("A='1\n2'\n\n{text}wrong\n{text}")), Err(60_004));
        assert_eq!(parse("A=1 "), Ok(vec![("A".to_owned(), "1".to_owned())]), "without an end of the line");
    }

    #[test]
    fn a_secret_is_a_files_content_without_one_newline_at_its_end() {
        let folder = Folder::new("secret");
        let secret = |file| Secret { name: "KEY".to_owned(), file };
        let value = |content: &[u8]| {
            read(vec![], vec![secret(folder.file("key", content, 0o600))]).unwrap()[0].1.clone()
        };
        assert_eq!(value(b"hunter2\n"), "hunter2");
        assert_eq!(value(b"hunter2"), "hunter2");
        assert_eq!(value(b"two\nlines\n\n"), "two\nlines\n");
        let zero = secret(folder.file("zero", b"a\0b", 0o600));
        assert!(read(vec![], vec![zero]).unwrap_err().contains("zero byte"));
    }

    #[test]
    fn a_secret_that_others_may_read_or_write_is_refused() {
        let folder = Folder::new("modes");
        for (mode, allowed) in [(0o400, true), (0o660, true), (0o604, false), (0o602, false)] {
            let file = folder.file("key", b"x", mode);
            let result = read(vec![], vec![Secret { name: "KEY".to_owned(), file: file.clone() }]);
            assert_eq!(result.is_ok(), allowed, "{mode:o}: {result:?}");
            assert!(read(vec![folder.file("env", b"A=1", mode)], vec![]).is_ok(), "{mode:o}");
        }
    }

    #[test]
    fn no_value_is_shown_where_the_environment_is() {
        let folder = Folder::new("debug");
        let sources =
            Sources { env_files: vec![folder.file("env", b"NAME=hunter2", 0o600)], ..Sources::default() };
        let shown = format!("{:?}", sources.read(&mut |_| ()).unwrap());
        assert!(shown.contains("NAME") && !shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn a_worker_hears_of_what_it_is_given_and_of_nothing_else() {
        let environment = Environment {
            program: program("a"),
            variables: vec![("A".into(), "1".into()), ("READY_FD".into(), "x".into())],
            ..Environment::default()
        };
        let mut given = Given {
            slot: SlotId(2),
            generation: 7,
            listeners: &[],
            has_node_channel: false,
            notify_socket: "/tmp/notify",
        };
        let variables = |given: &Given| -> Vec<String> {
            let variables = environment.of_worker(given).into_iter();
            variables.map(|(name, value)| format!("{}={}", name.display(), value.display())).collect()
        };
        let always = ["REUSE_RUN_SLOT=2", "REUSE_RUN_GENERATION=7", "NODE_APP_INSTANCE=2"];
        let first = ["A=1", "READY_FD=x", "READY_FD=3", "NOTIFY_SOCKET=/tmp/notify"];
        assert_eq!(variables(&given), [&first[..], &always[..]].concat());
        given.listeners = &["http", "admin"];
        given.has_node_channel = true;
        let first = ["A=1", "READY_FD=x", "READY_FD=5", "NOTIFY_SOCKET=/tmp/notify"];
        let node = ["NODE_CHANNEL_FD=6", "NODE_CHANNEL_SERIALIZATION_MODE=json"];
        let listen = ["LISTEN_FDS=2", "LISTEN_FDNAMES=http:admin"];
        assert_eq!(variables(&given), [&first[..], &node, &listen, &always].concat());
    }

    #[test]
    fn a_directory_is_resolved_anew_each_time() {
        let folder = Folder::new("directory");
        let (one, two, current) = (folder.0.join("1"), folder.0.join("2"), folder.0.join("current"));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&two).unwrap();
        let sources = Sources { directory: Some(current.clone()), ..Sources::default() };
        for release in [&one, &two] {
            let _ = fs::remove_file(&current);
            std::os::unix::fs::symlink(release, &current).unwrap();
            let directory = sources.read(&mut |_| ()).unwrap().directory.unwrap();
            assert_eq!(directory.logical, current);
            assert_eq!(directory.physical, fs::canonicalize(release).unwrap());
            assert_eq!(directory.name(), current);
        }
        let earlier = Directory { logical: current.clone(), physical: fs::canonicalize(&one).unwrap() };
        assert_eq!(earlier.name(), earlier.physical, "the link leads elsewhere by now");
        fs::remove_file(&current).unwrap();
        assert!(sources.read(&mut |_| ()).is_err());
    }

    fn program(command: &str) -> Program {
        Program { command: command.into(), args: Vec::new() }
    }

    #[test]
    fn a_generation_runs_what_it_began_with_or_what_the_one_before_it_runs() {
        let mut environments = Environments::new(Sources::default(), program("a"));
        let other = environments.command_id(program("b"));
        assert_eq!(environments.command_id(program("b")), other);
        environments.begin(2, Some(other), 1);
        environments.begin(3, None, 1);
        environments.begin(4, None, 2);
        let runs =
            |environments: &Environments, generation| environments.program(generation).unwrap().clone();
        let commands = [1, 2, 3, 4].map(|generation| runs(&environments, generation).command);
        assert_eq!(commands, ["a", "b", "a", "b"], "generation 2 has failed, and then generation 3 has");
        environments.begin(5, None, 4);
        environments.forget_older(4);
        assert_eq!(runs(&environments, 5), program("b"));
        assert_eq!(environments.program(1), None, "it is forgotten");
    }

    #[test]
    fn a_generation_keeps_its_environment_until_it_is_older_than_the_oldest() {
        let folder = Folder::new("generations");
        let file = folder.file("env", b"A=1", 0o600);
        let mut environments =
            Environments::new(Sources { env_files: vec![file], ..Sources::default() }, program("a"));
        let read = |environments: &Environments| {
            let (mut reading, mut read) = (environments.read(1).unwrap(), None);
            while read.is_none() {
                poll(&mut [PollFd::new(reading.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
                read = reading.receive();
            }
            read.unwrap().unwrap()
        };
        let first = read(&environments);
        environments.add(1, first.clone());
        folder.file("env", b"A=2", 0o600);
        environments.add(2, read(&environments));
        assert!(environments.known(1) == Some(&first) && environments.known(2) != Some(&first));
        assert_eq!(first.variables, [("A".into(), "1".into())]);
        environments.forget_older(2);
        assert!(environments.known(1).is_none() && environments.known(2).is_some());
    }

    #[test]
    fn a_secret_is_given_by_name_and_file() {
        let expected = Secret { name: "KEY".to_owned(), file: "/run/secrets/key".into() };
        assert_eq!("KEY=/run/secrets/key".parse(), Ok(expected));
        assert!("KEY".parse::<Secret>().is_err() && "=x".parse::<Secret>().is_err());
    }

    /// What writes an env file may be another program, such as one that gets secrets.
    mod fuzz {
        use proptest::collection::vec;
        use proptest::prelude::*;

        use super::*;

        fn pair() -> impl Strategy<Value = (String, String)> {
            ("[A-Za-z_][A-Za-z0-9_.]{0,8}", "[^'\\\\]{0,12}")
                .prop_filter("a keyword", |(name, _)| name != "export")
        }

        proptest! {
            #[test]
            fn values_in_quotes_are_read_as_they_were_written(pairs in vec(pair(), 0..6), blank in "( *(#[^\n]*)?\n){0,2}") {
                let text: String = pairs.iter().map(|(name, value)| format!("{blank}{name}='{value}'\n")).collect();
                prop_assert_eq!(parse(&text), Ok(pairs));
            }

            #[test]
            fn the_first_wrong_line_is_named(
                pairs in vec(pair(), 0..6), wrong in "[=0-9%][ -~]{0,9}", after in "[ -~\n]{0,30}"
            ) {
                let good: String = pairs.iter().map(|(name, value)| format!("{name}='{value}'\n")).collect();
                let line = 1 + good.matches('\n').count();
                prop_assert_eq!(parse(&format!("{good}{wrong}\n{after}")), Err(line));
            }

            #[test]
            fn what_comes_before_the_line_that_is_named_is_right(text in "([A-Z]=|['\"\\\\$#{} \n]|[a-z]|\\PC){0,60}") {
                if let Err(line) = parse(&text) {
                    let before: Vec<&str> = text.split_inclusive('\n').take(line - 1).collect();
                    prop_assert_eq!(before.len(), line - 1, "there is such a line");
                    prop_assert!(parse(&before.concat()).is_ok());
                }
            }
        }
    }
}
