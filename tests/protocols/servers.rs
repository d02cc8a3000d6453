//! The servers under tests/apps/protocols. None of them has a signal handler.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use crate::common::app;

#[derive(Clone, Copy)]
pub enum Server {
    /// `server.js` with this protocol.
    Node(&'static str),
    /// This file.
    Python(&'static str),
    /// `server.go`.
    Go,
}

/// The path of a file under tests/apps/protocols.
pub fn file(name: &str) -> String {
    app(&format!("protocols/{name}"))
}

impl Server {
    pub fn has_tls(self) -> bool {
        matches!(self, Server::Node("https" | "h2") | Server::Python("server.py") | Server::Go)
    }

    /// Its command, with a port and the milliseconds that a request takes.
    pub fn command(self, port: u16, work: u64) -> Vec<String> {
        let rest = [port.to_string(), work.to_string()];
        let first = match self {
            Server::Node(protocol) => vec!["node".to_owned(), file("server.js"), protocol.to_owned()],
            Server::Python(name) => vec!["python3".to_owned(), file(name)],
            Server::Go => vec![go_program("server")],
        };
        let certificate = matches!(self, Server::Go).then(|| app("tls"));
        first.into_iter().chain(rest).chain(certificate).collect()
    }
}

/// The path of a program in Go, which is built once.
pub fn go_program(name: &'static str) -> String {
    static FOLDER: OnceLock<String> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("protocols");
        for name in ["server", "client"] {
            let built = Command::new("go")
                .args(["build", "-o"])
                .args([folder.join(name), file(&format!("{name}.go")).into()])
                .env("CGO_ENABLED", "0")
                .status();
            assert!(built.expect("run go").success(), "{name}.go can't be built");
        }
        folder.into_os_string().into_string().expect("a path in UTF-8")
    });
    format!("{folder}/{name}")
}
