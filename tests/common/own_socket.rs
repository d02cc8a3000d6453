//! tests/tools/own_socket.c, a server whose socket has something before bind.

use std::process::Command;

use super::folder::Folder;

/// Compiles it, so that it needs nothing to run. Returns its path.
pub fn own_socket(folder: &Folder) -> String {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tools/own_socket.c");
    let program = folder.path("own_socket");
    let compiled = Command::new("cc").args(["-static", "-O1", source, "-o", &program]).status();
    assert!(compiled.expect("run cc").success());
    program
}
