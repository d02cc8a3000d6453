//! Reads the environment of a generation in another process: its files may lie in a file system that doesn't answer.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use log::warn;
use serde::{Deserialize, Serialize};

use crate::kernel::helper::Helper;
use crate::words::printable;
use crate::worker::Program;
use crate::worker::environment::{Directory, Environment, Note, Sources};

/// What the process says, one to a line.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    Opens(Vec<u8>),
    Warns(String),
    Failed(String),
    Read {
        variables: Vec<(Vec<u8>, Vec<u8>)>,
        /// The logical and the physical one.
        directory: Option<(Vec<u8>, Vec<u8>)>,
        may_start_node: bool,
    },
}

/// An environment that is being read.
#[derive(Debug)]
pub struct Reading {
    program: Program,
    socket: UnixStream,
    come: Vec<u8>,
    _helper: Helper,
}

impl Reading {
    /// # Errors
    /// When there is no process or file descriptor left.
    pub fn begin(sources: &Sources, program: Program) -> io::Result<Self> {
        let (socket, its) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        let helper = Helper::start(c"reuse-run-env", vec![its.into()], |fds| {
            if let Ok(socket) = fds[0].try_clone() {
                read(sources, &program, File::from(socket));
            }
        })?;
        Ok(Self { program, socket, come: Vec::new(), _helper: helper })
    }

    /// What was read, or one line that says why nothing was. `None`: not all has come yet.
    pub fn receive(&mut self) -> Option<Result<Environment, String>> {
        match self.socket.read_to_end(&mut self.come) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            _ => {}
        }
        let mut last = None;
        for message in self.messages() {
            match message {
                Message::Warns(what) => warn!("{what}"),
                message => last = Some(message),
            }
        }
        Some(match last {
            Some(Message::Failed(why)) => Err(why),
            Some(Message::Read { variables, directory, may_start_node }) => {
                let variables = variables.into_iter().map(|(name, value)| (os(name), os(value))).collect();
                let directory = directory.map(|(logical, physical)| Directory {
                    logical: PathBuf::from(os(logical)),
                    physical: PathBuf::from(os(physical)),
                });
                Ok(Environment { program: self.program.clone(), variables, directory, may_start_node })
            }
            _ => Err("the process that reads its files has ended".to_owned()),
        })
    }

    /// What it waits for, for users.
    pub fn waits_for(&self) -> String {
        let opened = self.messages().into_iter().rev().find_map(|message| match message {
            Message::Opens(path) => Some(printable(&path)),
            _ => None,
        });
        opened.unwrap_or_else(|| "its files".to_owned())
    }

    fn messages(&self) -> Vec<Message> {
        let lines = self.come.split_inclusive(|byte| *byte == b'\n');
        lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }
}

impl AsFd for Reading {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn os(bytes: Vec<u8>) -> OsString {
    OsString::from_vec(bytes)
}

/// The life of the process.
fn read(sources: &Sources, program: &Program, mut socket: File) {
    let bytes = |text: &OsStr| text.as_bytes().to_vec();
    let mut send = |message: &Message| {
        let text = serde_json::to_string(message).unwrap_or_default();
        let _ = writeln!(socket, "{text}");
    };
    let read = sources.read(&mut |note| match note {
        Note::Opens(path) => send(&Message::Opens(bytes(path.as_os_str()))),
        Note::Warns(what) => send(&Message::Warns(what)),
    });
    let message = match read {
        Ok(environment) => {
            send(&Message::Opens(bytes(&program.command)));
            let may_start_node = program.may_start_node(&environment);
            let variables = environment.variables.iter().map(|(name, value)| (bytes(name), bytes(value)));
            let directory = environment.directory.as_ref();
            let paths = |it: &Directory| (bytes(it.logical.as_os_str()), bytes(it.physical.as_os_str()));
            Message::Read { variables: variables.collect(), directory: directory.map(paths), may_start_node }
        }
        Err(why) => Message::Failed(why),
    };
    send(&message);
}
