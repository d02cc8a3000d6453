//! What scripts/manuals and scripts/release make: man pages, completions and packages.
#![cfg_attr(clippy, deny(warnings))]

#[path = "../common/mod.rs"]
mod common;
mod manuals;
#[path = "../container/oci.rs"]
mod oci;
mod packages;
mod systemd;

use std::path::{Path, PathBuf};
use std::process::Command;

/// A file of the repository.
fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Runs a command, which must succeed. Returns what it has printed.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error} (see scripts/test)"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}\n{errors}", output.status);
    text
}
